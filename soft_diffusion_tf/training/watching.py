"""What a run shows of itself: pictures, the loss of held-out images, warnings."""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import data, plots, rng

BUCKETS = 10  # of t, for the loss by time
GRID_IMAGES = 64
SHOWN_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of E[x_0|x_t], as in P Figure 7
HELD_OUT_IMAGES = 512  # of the test split, for the held-out loss
_FIERCE, _LONG = 100, 500  # a gradient of so many times clip_norm, for so many steps


class Clipped:
  """Says once that the clip has decided the steps' length for long."""

  def __init__(self, clip_norm, say):
    self._most, self._clip, self._say, self._steps = _FIERCE * clip_norm, clip_norm, say, 0

  def add(self, record):
    """Takes in a record of `Monitor`."""
    before, norm = self._steps, record["gradient_norm"] or 0.0
    self._steps = before + record["steps"] if norm > self._most else 0
    if before < _LONG <= self._steps:
      self._say(
        f"warning: for {self._steps:,} steps the gradient's norm, now {norm:.3g}, has been more "
        f"than {_FIERCE} times training.clip_norm = {self._clip:g}: look at gradient_norm and "
        "loss_by_t, and at the loss's weight"
      )


class Pictures:
  """What TensorBoard shows in pictures: the schedule, samples, and E[x_0|x_t] (P Figure 7)."""

  def __init__(self, run, source, monitor):
    self._run, self._monitor = run, monitor
    self._clean = source.floats(slice(0, 8))
    self._denoise = tf.function(run.denoiser(), autograph=False)

  def schedule(self, workdir):
    path = workdir / "schedule.png"
    plots.schedule(path, self._run.diffusion)
    picture = tf.io.decode_png(tf.io.read_file(str(path)), channels=3)
    self._monitor.image("schedule", picture, 0)
    experiment = self._run.experiment
    self._monitor.hyperparameters(experiment.flat(), experiment.digest())

  def samples(self):
    """A grid from fixed seeds, by the averaged weights."""
    batch_sampler = self._run.batch_sampler()
    batch_sampler.refresh()
    images = batch_sampler.images(np.arange(GRID_IMAGES))
    self._show("samples", images)

  def _show(self, name, images, columns=None):
    """A grid of images, but of none that are not finite: a network that has hardly learnt may give
    them, which is no reason to end.
    """
    if np.isfinite(images).all():
      self._monitor.image(name, plots.grid(images, columns, zoom=4), self._run.step)

  def predictions(self):
    """Fixed images, and at fixed times their corruptions above what is predicted from them."""
    clean, rows = self._clean, [self._clean]
    for k, t in enumerate(SHOWN_TIMES):
      seed = tf.constant([self._run.experiment.seed, k], tf.int64)
      eta = rng.normal(seed, 0, len(clean), clean.shape[1:])
      t = tf.fill([len(clean)], t)
      x_t = self._run.diffusion.forward(clean, t, eta)
      rows += [x_t.numpy(), self._denoise(x_t, t).numpy()]
    self._show("predictions", np.concatenate(rows), len(clean))


def say_what_evaluation_lacks(experiment, source, say):
  """Tells, before hours of training, what soft-diffusion-evaluate would refuse after them."""
  e, d, have = experiment.evaluation, experiment.data, len(source)
  field, count = "reference_samples", e.reference_samples
  if not count:
    field, count = "samples", e.samples
  if count > have:
    say(
      f"warning: evaluation.{field} = {count:,}, and {d.train_split!r} of {d.name} has {have:,} "
      f"images: soft-diffusion-evaluate will refuse; set evaluation.{field} to at most {have:,}"
    )
  if min(count, e.samples) < 2:
    say("warning: a distance takes at least 2 images; set evaluation.samples to 2 or more")


def load_held_out(d, given, held_out, say):
  """The `data.Source` of the images that are not trained on, or None, which is said.

  Args:
    d: the experiment's `Data`.
    given: the images that are trained on were given by a program.
    held_out: images that were given by a program; by default the data set's split "test".

  Raises:
    ValueError: more of them cannot be used than `data.skip_bad` allows.
  """
  if held_out is not None:
    return data.load(held_out, "all", d.image_shape, d.crop, policy=d.policy)
  if given:
    say("no held-out loss: images were given as source=…, and none as held_out=…")
    return None
  if d.test_split == d.train_split:
    say(f"no held-out loss: data.test_split and data.train_split are both {d.test_split!r}")
    return None
  try:
    source = d.load(d.test_split, progress=False)
  except data.Refused:
    raise
  except ValueError as error:
    say(f"warning: no held-out loss: {error}")
    return None
  if not len(source):
    say(f"warning: no held-out loss: {d.test_split} of {d.name} has no images")
    return None
  return source


def make_held_out(experiment, source, model, strategy):
  """A function that gives the loss of held-out images, for the records; None without such images.

  Of both sets of weights: those under training, and the averaged ones, which samples are made by.
  """
  if source is None:
    return None
  d = experiment.data
  picked = np.sort(np.random.default_rng(0).permutation(len(source))[:HELD_OUT_IMAGES])
  images = source.floats(picked)
  shared = strategy.num_replicas_in_sync * experiment.training.accumulate
  size = max(1, experiment.training.batch_size // shared)  # what is known to fit in memory
  specs = [tf.TensorSpec([None, *d.image_shape], tf.float32), tf.TensorSpec([], tf.int32)]

  @tf.function(autograph=False, input_signature=specs)
  def both(x_0, first):
    one, t = model.held_out(x_0, False, first)
    return one, model.held_out(x_0, True, first)[0], t

  def held_out():
    parts = [both(images[k : k + size], k) for k in range(0, len(images), size)]
    one, two, t = (np.concatenate(list(map(np.asarray, part))) for part in zip(*parts))
    bucket = np.minimum(t * BUCKETS, BUCKETS - 1).astype(int)
    counts = np.bincount(bucket, minlength=BUCKETS)
    values = {}
    for name, each in (("held_out_loss", one), ("held_out_ema_loss", two)):
      sums = np.bincount(bucket, np.float64(each), BUCKETS)
      values[name] = float(np.mean(each, dtype=np.float64))
      values[f"{name}_by_t"] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return values

  return held_out


def make_norms(model):
  """A function that gives the global norms of the weights and of their averages."""

  @tf.function(autograph=False)
  def norms():
    return {
      "parameter_norm": tf.linalg.global_norm([v.value for v in model.network.variables]),
      "ema_norm": tf.linalg.global_norm([v.value for v in model.ema_network.variables]),
    }

  return norms
