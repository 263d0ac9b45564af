"""A training run in a workdir: the loop over `model.update` under any strategy.

A workdir holds everything: config.json, prior.npz, checkpoints/, metrics.jsonl (a line per
`log_every` steps), history.jsonl (fields that changed on the way, and from which step on),
tensorboard/, schedule.png, labels.json (the names of the labels). Starting again with the same
workdir goes on where it stopped, equal to the bit to a run that never did.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import pathlib
import re
import signal
import sys
import threading

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import (
  bulk,
  data,
  memory,
  parts,
  plots,
  priors,
  rng,
  strategies,
  trust,
)
from soft_diffusion_tf.checkpoints import Checkpoints
from soft_diffusion_tf.experiment import INCIDENTAL, Experiment
from soft_diffusion_tf.model import NonFiniteLoss, SoftDiffusionModel
from soft_diffusion_tf.monitoring import METRICS_FILE, WINDOWS_FILE, Monitor

BUCKETS = 10  # of t, for the loss by time
PRIOR_FILE = "prior.npz"
HISTORY_FILE = "history.jsonl"
LABELS_FILE = "labels.json"
CHECKPOINTS = "checkpoints"
GRID_IMAGES = 64
SHOWN_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of E[x_0|x_t], as in P Figure 7
PRIOR_IMAGES = 10_000  # the prior is fitted to at most this many training images, and to fewer
PRIOR_BYTES = 1 << 29  # where they would take more than this: 64 × 64 × 3 do not
HELD_OUT_IMAGES = 512  # of the test split, for the held-out loss
RECORDS = (  # of steps that were taken
  METRICS_FILE, WINDOWS_FILE, "evaluations.jsonl", "sweep/results.jsonl",
)  # fmt: skip

# What may change when a run goes on in its workdir; all else would make it another run. The rate is
# not incidental, but who is told to lower it has to be able to.
_MAY_CHANGE = (*INCIDENTAL, "training.learning_rate")

_WIDEST = 1e6  # ratio of the loss's weights over t that goes without a warning
_FIERCE, _LONG = 100, 500  # a gradient of so many times clip_norm, for so many steps


class Preempted(RuntimeError):
  """The run was asked to end (SIGTERM) and has saved its state."""


class WorkerLost(RuntimeError):
  """Another worker of this run is gone; the others end, and all of them start again."""


def _say(progress, text):
  """Prints what a run is at, above its bar."""
  if progress and text:
    tqdm.tqdm.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def lock(folder, busy="another process is training in it; wait for it or take another workdir",
         wait=False):  # fmt: skip
  """Holds a folder for one process; the second waits, or gets a ValueError with the text `busy`."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
      raise ValueError(f"{folder}: {busy}") from None
    yield


@contextlib.contextmanager
def _on_sigterm(handler):
  """SIGTERM calls `handler(number, frame)` meanwhile; only in the main thread can it."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _end_at_once(number, frame):
  raise Preempted("asked to end before the first step; start again to go on")


def _changes(workdir, experiment):
  """Fields that differ from the workdir's config, as {name: (old, new)}; a ValueError for those
  that would make it another run.
  """
  if not (workdir / "config.json").exists():
    return {}
  # What this run names is trusted, and no other code that a config.json of unknown origin names.
  with trust.trust_code(experiment.code()):
    try:
      before = Experiment.load(workdir)
    except trust.UntrustedCode:
      raise ValueError(
        f"{workdir} holds a run of another config (it names code that this config does not "
        "name); take another workdir"
      ) from None
  names = before.differences(experiment)
  if changed := [name for name in names if not name.startswith(_MAY_CHANGE)]:
    raise ValueError(
      f"{workdir} holds a run of another config (it differs in {', '.join(changed)}); "
      "take another workdir, or the config that the run was started with"
    )
  old, new = before.flat(), experiment.flat()
  return {name: (old.get(name), new.get(name)) for name in names}


def _spell(changes):
  short = lambda value: text if len(text := str(value)) <= 60 else text[:57] + "…"
  return ", ".join(f"{name} {short(old)} → {short(new)}" for name, (old, new) in changes.items())


def _check_records(workdir, restored, anew):
  """A ValueError where records tell of steps whose checkpoints are gone, unless `anew`."""
  if restored is not None and anew:
    raise ValueError(
      f"{workdir} has a checkpoint, of step {restored:,}, and --start_anew is for a workdir that "
      "has lost all of them; leave it out to go on, or take another workdir"
    )
  found = [
    name for name in RECORDS if (workdir / name).exists() and (workdir / name).stat().st_size
  ]
  history = workdir / HISTORY_FILE
  if history.exists() and any(map(int, re.findall(r'"step": (\d+)', history.read_text()))):
    found.append(HISTORY_FILE)
  if restored is None and found and not anew:
    raise ValueError(
      f"{workdir} has records ({', '.join(found)}) and no checkpoint: was {CHECKPOINTS}/ moved or "
      "deleted? Put it back, take another workdir, or give --start_anew, which puts the records "
      "into a folder and begins at step 0"
    )


def _put_away(workdir):
  """Moves the records of a run whose checkpoints are gone into records-1, or the next free one."""
  names = [
    n for n in (*RECORDS, HISTORY_FILE, "tensorboard", "best.json") if (workdir / n).exists()
  ]
  if not names:
    return
  k = 1
  while (folder := workdir / f"records-{k}").exists():
    k += 1
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).rename(folder / name)


def _ema_remark(experiment, step):
  """What to say of averages that still hold much of the random start at a step, or ""."""
  decay = experiment.training.ema_decay
  share = decay**step
  if step < 1 or share < 0.01:
    return ""
  return (
    f"training.ema_decay = {decay:g} is long for {step:,} steps: {share:.0%} of the averaged "
    "weights are still the random ones of the start"
  )


def build(experiment, diffusion):
  """A model with an optimizer, fresh: network, averaged weights and Adam's slots exist."""
  model = SoftDiffusionModel(
    experiment.build_network(), diffusion,
    training=experiment.training, options=experiment.network, loss=experiment.loss,
    seed=experiment.seed,
  )  # fmt: skip
  model.compile(optimizer=model.make_optimizer())
  model.optimizer.build(model.network.trainable_variables)
  return model


@dataclasses.dataclass
class Run:
  """A trained model, as a workdir holds it; `averaged`: it draws by the averaged weights."""

  experiment: Experiment
  model: SoftDiffusionModel
  step: int
  averaged: bool = True
  _drawers: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def diffusion(self):
    return self.model.diffusion

  @property
  def remark(self):
    """A warning about what it draws by, or ""."""
    text = _ema_remark(self.experiment, self.step) if self.averaged else ""
    return text and f"{text}; --raw_weights draws without them"

  def options(self, **changes):
    """The experiment's `Sampling` with other values for what is not None (`Sampling.changed`)."""
    return self.experiment.sampling.changed(**changes)

  def drawer(self, options=None, strategy=None):
    """A `bulk.Drawer`, by the experiment's sampler or other options."""
    options = options or self.experiment.sampling
    key = (options.clip, options.threshold, id(strategy))
    if key not in self._drawers:
      denoiser = self.model.denoiser(self.averaged)
      self._drawers[key] = bulk.Drawer(self.diffusion, denoiser, options, strategy)
    return self._drawers[key].with_options(options)

  def images(self, seeds, options=None, progress=None):
    """Samples float32 [N, H, W, C] for image seeds [N]; see `bulk`."""
    return self.drawer(options).images(seeds, progress)

  def sampler(self, options=None):
    """The `samplers.Sampler` of `drawer`."""
    return self.drawer(options).sampler

  def table(self, options=None):
    """The rows of the experiment's sampler, or of other `experiment.Sampling` options."""
    return self.drawer(options).rows


def load(workdir, step=None, trust_code=False, averaged=True):
  """A run, ready to sample from: its newest state, or the checkpoint kept at a step.

  Args:
    trust_code: import code that its config.json names (see `trust`).
    averaged: draw by the averaged weights, else by those under training.

  Raises:
    ValueError: the workdir holds no such checkpoint, or none that can be read.
  """
  workdir = pathlib.Path(workdir)
  with trust.trust_code(trust_code):
    experiment = Experiment.load(workdir)
    prior = priors.Prior.load(workdir / PRIOR_FILE)
  _check_size(workdir, experiment)
  model = build(experiment, experiment.build_diffusion().with_prior(prior))
  if Checkpoints(workdir / CHECKPOINTS, model).restore(step) is None:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  return Run(experiment, model, int(model.optimizer.iterations.numpy()), averaged)


def _check_size(workdir, experiment):
  """Raises the ValueError of a config whose network no checkpoint of the workdir can hold.

  Before the network is made: a config of unknown origin may ask for more memory than there is.
  """
  files = [f for f in (workdir / CHECKPOINTS).rglob("ckpt-*.data*") if f.is_file()]
  if not files:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  experiment.check_network()
  weights = sum(math.prod(shape) for shape in experiment.network_shapes())
  if 4 * weights > max(f.stat().st_size for f in files):
    raise ValueError(
      f"{workdir}: its config.json describes a network of {weights:,} weights, and no checkpoint "
      "in it has so many; restore the config.json that it was trained with"
    )


def write(run, workdir):
  """Writes a model that was not trained here as a workdir, to sample from or to train on."""
  workdir = pathlib.Path(workdir)
  if (workdir / "config.json").exists():
    raise ValueError(f"{workdir} holds a run already; take another folder")
  workdir.mkdir(parents=True, exist_ok=True)
  run.diffusion.prior.save(workdir / PRIOR_FILE)
  Checkpoints(workdir / CHECKPOINTS, run.model).save(wait=True)
  run.experiment.save(workdir)


def _make_loop(model, strategy):
  """`loop(iterator, n)`: n steps in one call of one compiled function.

  It returns sums over the steps ("wait" is the time spent on waiting for input, in seconds), and
  of the first loss or gradient that was not finite the step, or −1, and the mean t of the examples
  whose loss was not, or NaN where only the gradient was not.
  """

  def replica_step(x_0, labels=None, done=None):  # no model uses labels yet
    out = model.update(x_0, done)
    bucket = tf.minimum(tf.cast(out["t"] * BUCKETS, tf.int32), BUCKETS - 1)
    odd = ~tf.math.is_finite(out["losses"])
    return {
      "loss": out["loss"],
      "norm": out["gradient_norm"] / strategy.num_replicas_in_sync,
      "sums": tf.math.unsorted_segment_sum(out["losses"], bucket, BUCKETS),
      "counts": tf.math.unsorted_segment_sum(tf.ones_like(out["losses"]), bucket, BUCKETS),
      "odd": tf.reduce_sum(tf.cast(odd, tf.float32)),
      "odd_t": tf.reduce_sum(tf.where(odd, out["t"], 0.0)),
    }

  def loop(iterator, n):
    def body(k, totals, odd_step, odd_t):
      step = tf.cast(model.optimizer.iterations, tf.int64)
      with tf.control_dependencies([k]):  # the step before is done
        begin = tf.timestamp()
      with tf.control_dependencies([begin]):
        batch = iterator.get_next()
      local = [strategy.experimental_local_results(v) for v in tf.nest.flatten(batch)]
      with tf.control_dependencies(tf.nest.flatten(local)):
        wait = tf.timestamp() - begin
      with tf.control_dependencies([wait]):  # not later, with one thread, than the step itself
        batch = tf.nest.map_structure(tf.identity, batch, expand_composites=True)
      each = strategy.run(replica_step, args=batch if isinstance(batch, tuple) else (batch,))
      out = {k: strategy.reduce(tf.distribute.ReduceOp.SUM, v, None) for k, v in each.items()}
      out["wait"] = wait
      totals = {key: totals[key] + out[key] for key in totals}
      finite = tf.math.is_finite(out["loss"]) & tf.math.is_finite(out["norm"])
      first = (odd_step < 0) & ~finite
      odd_step = tf.where(first, step, odd_step)
      odd_t = tf.where(first, out["odd_t"] / out["odd"], odd_t)
      with tf.control_dependencies([out["loss"], out["norm"]]):
        return k + 1, totals, odd_step, odd_t

    zeros = {"loss": tf.zeros([]), "norm": tf.zeros([]), "wait": tf.zeros([], tf.float64)}
    zeros |= {"sums": tf.zeros([BUCKETS]), "counts": tf.zeros([BUCKETS])}
    start = (tf.constant(0), zeros, tf.constant(-1, tf.int64), tf.constant(0.0))
    return tf.while_loop(lambda k, *_: k < n, body, start)[1:]

  # Control flow is written out, so AutoGraph would only cost time: most of the tracing.
  return tf.function(loop, autograph=False)


def train(experiment, workdir, strategy=None, progress=True, anew=False, source=None):
  """Trains to `experiment.training.steps`, going on from the workdir's newest checkpoint.

  Args:
    experiment: an `Experiment`.
    workdir: its folder, made if need be.
    strategy: a `tf.distribute.Strategy`; by default the current one.
    progress: show a bar with the time left, and print what the run is at.
    anew: begin at step 0 in a workdir that has records and has lost its checkpoints.
    source: images of your own in place of the config's data set: an array [N, H, W, C], a
      `tf.data.Dataset`, an object with __len__ and __getitem__, or a `data.Source` (see
      `data.load`). A digest of the images is the data set's name in the workdir.

  Returns:
    The `Run` at its end.

  Raises:
    ValueError: bad input, or a workdir that belongs to another config or process.
    NonFiniteLoss: names step and, of a loss, t and σ; the last checkpoint stays.
    Preempted: SIGTERM came, to this worker or another; the state is saved.
    WorkerLost: another worker of a multi-worker run has died.
  """
  workdir = pathlib.Path(workdir)
  strategy = strategy or tf.distribute.get_strategy()
  replicas, batch = strategy.num_replicas_in_sync, experiment.training.batch_size
  shares = experiment.training.accumulate
  if batch % (replicas * shares):
    each = replicas * shares
    by = f" of {shares} parts each" if shares > 1 else ""
    raise ValueError(
      f"training.batch_size = {batch} cannot be shared by {replicas} replicas{by}; "
      f"take {batch // each * each or each} or another multiple of {each}"
    )
  # An unsound process or network is refused before a file is written.
  apart = bool(tf.config.list_physical_devices("GPU"))
  apart |= isinstance(strategy, tf.distribute.TPUStrategy)
  memory.check(experiment, *strategies.replicas_by_host(strategy), apart)
  parts.check_importable(list(experiment.code()))
  diffusion = experiment.build_diffusion()
  experiment.check_network()
  d = experiment.data
  with _on_sigterm(_end_at_once):  # there is nothing to save yet
    tell = functools.partial(_say, progress and _is_chief(strategy))
    if source is None:
      _say(progress, f"reading {d.name}")
      source = d.load(progress=progress, say=tell)
    else:
      source = data.load(source, "all", d.image_shape, d.crop, policy=d.policy, say=tell)
      experiment = experiment.replace(data={"name": source.name})
    if not _is_chief(strategy):
      with _lost_workers(strategy):
        return _train(experiment, source, diffusion, workdir, strategy, {}, anew, progress=False)
    with lock(workdir), _lost_workers(strategy):
      changes = _changes(workdir, experiment)
      return _train(experiment, source, diffusion, workdir, strategy, changes, anew, progress)


def _several_workers(strategy):
  return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _is_chief(strategy):
  """Whether this process writes; of several workers only the first does."""
  return not _several_workers(strategy) or not strategy.cluster_resolver.task_id


@contextlib.contextmanager
def _lost_workers(strategy):
  """Turns what TensorFlow raises when a peer is gone into a `WorkerLost`."""
  try:
    yield
  except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
    if not _several_workers(strategy):
      raise
    cause = next(
      (line for line in str(error).splitlines() if "/task:" in line or "aborted" in line), ""
    )
    raise WorkerLost(
      f"another worker is gone ({cause.strip()}); what is past the last checkpoint is lost: "
      "start all workers again to go on"
    ) from error


def _train(experiment, source, diffusion, workdir, strategy, changes, anew, progress):
  options, chief = experiment.training, _is_chief(strategy)

  def say(text):
    _say(progress, text)

  if (workdir / PRIOR_FILE).exists():
    with trust.trust_code(experiment.code()):  # its class is one that this run names
      prior = priors.Prior.load(workdir / PRIOR_FILE)
  else:
    most = min(PRIOR_IMAGES, max(64, PRIOR_BYTES // (4 * math.prod(experiment.data.image_shape))))
    picked = np.random.default_rng(experiment.seed).permutation(len(source))[:most]
    images = source.floats(np.sort(picked))
    say(f"fitting the prior to {len(images):,} images")
    prior = priors.fit(experiment.prior, images, diffusion)
  diffusion = diffusion.with_prior(prior)
  say("building the network")
  with strategy.scope():
    model = build(experiment, diffusion)
  checkpoints = Checkpoints(workdir / CHECKPOINTS, model, options.keep)
  restored = checkpoints.restore()
  step = restored or 0
  _check_records(workdir, restored, anew)
  _check_agreement(strategy, experiment, step, source, prior, model)
  run = Run(experiment, model, step)
  if restored is not None and step >= options.steps:
    say(f"{workdir} is at step {step:,} of {options.steps:,}: nothing is left to do")
    if changes:
      say(f"left as it was, for no step would have used it: {_spell(changes)}")
    return run
  if chief:  # not before: a config that cannot be trained does not claim the workdir
    if anew:
      _put_away(workdir)
    if changes:
      say(f"changed: {_spell(changes)} from step {step:,} on")
      with open(workdir / HISTORY_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "changed": changes}) + "\n")
    experiment.save(workdir)
    _save_labels(source, workdir)
    if not (workdir / PRIOR_FILE).exists():
      prior.save(workdir / PRIOR_FILE)
    if restored is None:
      checkpoints.save(wait=True)
    else:
      say(f"going on from step {step:,} of {options.steps:,}")
    if remark := _ema_remark(experiment, options.steps):
      say(f"warning: {remark}; take at most {0.01 ** (1 / options.steps):.4g}")
    low, high = experiment.weight_range()
    if high > _WIDEST * low:
      say(
        f"warning: over t the loss weighs what the network gives by {low:.1g} to {high:.1g}, so "
        "that the heaviest times are all it learns; take the prediction whose errors are of one "
        "size (score with scale_by_sigma, or noise), loss.weight = 'one', or a larger t_min"
      )
    held_out = _make_held_out(experiment, model, strategy, say)
    _say_what_evaluation_lacks(experiment, source, say)
  if restored is None:
    say(f"starting at step 0 of {options.steps:,}")
  hosts, each = strategies.replicas_by_host(strategy)

  def pipeline(context):  # a worker's own part of every batch
    return data.batches(
      source, options.batch_size, seed=experiment.seed, start=step, flip=experiment.data.flip,
      part=(context.input_pipeline_id, hosts), each=each, labels=True, told=True,
      balanced=experiment.data.balanced, augment=experiment.data.augment,
    )  # fmt: skip

  iterator = iter(strategy.distribute_datasets_from_function(pipeline))
  loop, norms = _make_loop(model, strategy), _make_norms(model)
  anywhere = _make_anywhere(strategy)
  monitor = Monitor(workdir, step, options.steps, options.batch_size, progress, chief)
  clipped = _Clipped(options.clip_norm, say)
  asked: list[int] = []  # not empty once SIGTERM has come
  with monitor, checkpoints.finishing(), _on_sigterm(lambda number, frame: asked.append(number)):
    show = _Pictures(run, source, monitor) if chief else None
    if show and step == 0:
      show.schedule(workdir)
    say("compiling the training step, which the first steps wait for")
    while step < options.steps:
      ahead = [e - step % e for e in _periods(options)] + [options.steps - step]
      n = min(options.steps_per_loop, *ahead, 2**31 - 1)
      totals, odd_step, odd_t = loop(iterator, tf.constant(n))
      if int(odd_step) >= 0:
        checkpoints.wait()
        what = "the gradient"
        if np.isfinite(odd_t):
          what = f"the loss (t = {float(odd_t):.4f}, σ = {float(diffusion.sigma(odd_t)):.4g})"
        raise NonFiniteLoss(
          f"{what} is not finite at step {int(odd_step)}; the last good checkpoint is "
          f"{checkpoints.paths()[0]}; lower training.learning_rate or look at the data"
        )
      step += n
      run.step = step
      monitor.advance(step, totals)
      last = step == options.steps
      if _due(step, options.log_every) or last:
        values = {"learning_rate": model.optimizer.learning_rate, **norms()}
        if chief and held_out and (monitor.passed(step, options.checkpoint_every) or last):
          values |= held_out()
        clipped.add(monitor.record(step, **values))
      if show and options.sample_every and (_due(step, options.sample_every) or last):
        say(f"drawing {GRID_IMAGES} samples at step {step:,}")
        show.samples()
        show.predictions()
      keep, stop = _due(step, options.keep_every), anywhere(asked)
      if chief and (_due(step, options.checkpoint_every) or keep or last or stop):
        monitor.flush(step)
        checkpoints.save(for_good=keep, wait=last or stop)
      if stop and not last:
        raise Preempted(f"asked to end at step {step}, which is saved; start again to go on")
  return run


def _save_labels(source, workdir):
  """Writes the names of the labels and how many images have each: labels.json."""
  values, counts = np.unique(source.labels, return_counts=True)
  if not source.label_names and len(values) < 2:
    return
  names = list(source.label_names) or list(map(str, range(int(values.max()) + 1)))
  content = {"names": names, "counts": dict(zip(map(str, values), map(int, counts)))}
  text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
  (workdir / LABELS_FILE).write_text(text, encoding="utf-8")


class _Clipped:
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


class _Pictures:
  """What TensorBoard shows in pictures: the schedule, samples, and E[x_0|x_t] (P Figure 7)."""

  def __init__(self, run, source, monitor):
    self._run, self._monitor = run, monitor
    self._clean = source.floats(slice(0, 8))
    self._denoise = tf.function(run.model.denoiser(), autograph=False)

  def schedule(self, workdir):
    path = workdir / "schedule.png"
    plots.schedule(path, self._run.diffusion)
    picture = tf.io.decode_png(tf.io.read_file(str(path)), channels=3)
    self._monitor.image("schedule", picture, 0)
    experiment = self._run.experiment
    self._monitor.hyperparameters(experiment.flat(), experiment.digest())

  def samples(self):
    """A grid from fixed seeds, by the averaged weights."""
    drawer = self._run.drawer()
    drawer.refresh()
    images = drawer.images(np.arange(GRID_IMAGES))
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


def _make_total(strategy):
  """A function that sums a tensor over the replicas of all workers; all of them have to call it."""

  @tf.function(autograph=False)
  def total(values):
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: values), None)

  return total


def _make_anywhere(strategy):
  """A function that says whether a flag is set in any worker; all of them have to call it."""
  if not _several_workers(strategy):
    return bool
  total = _make_total(strategy)
  return lambda flag: float(total(tf.constant(float(bool(flag))))) > 0


def _check_agreement(strategy, experiment, step, source, prior, model):
  """A ValueError in every worker unless all have one config, step, data, prior and state."""
  if not _several_workers(strategy):
    return
  sha = lambda arrays: hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
  state = [*model.network.variables, *model.ema_network.variables, *model.optimizer.variables]
  mine = {
    "step": (f"at step {step:,}", step),
    "config": (f"of config {experiment.identity()}", int(experiment.identity(), 16)),
    "images": (f"with {len(source):,} images", len(source)),
  }
  for name, digest in (
    ("data", source.digest()), ("prior", sha([prior.mean, prior.factors]).hexdigest()),
    ("weights", sha([v.numpy() for v in state]).hexdigest()),
  ):  # fmt: skip
    mine[name] = (f"with {name} {digest[:12]}", int(digest[:12], 16))
  # Pieces of 16 bits, whose squares float64 sums exactly.
  pieces = np.array(
    [[v >> 16 * k & 0xFFFF for k in range(3)] for _, v in mine.values()], np.float64
  )
  sums, squares = _make_total(strategy)(tf.constant(np.stack([pieces, pieces**2]))).numpy()
  # Σ x² · n = (Σ x)² for equal x alone.
  equal = (squares * strategy.num_replicas_in_sync == sums**2).all(axis=1)
  if not equal.all():
    differ = [name for name, same in zip(mine, equal) if not same]
    own = ", ".join(mine[name][0] for name in differ)
    raise ValueError(
      f"the workers differ in their {', '.join(differ)}: this one is {own}; start all with the "
      "same config and the same data, and with one workdir that all of them read"
    )


def _say_what_evaluation_lacks(experiment, source, say):
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


def _make_held_out(experiment, model, strategy, say):
  """A function that gives the loss of held-out images, for the records; None without such images.

  Of both sets of weights: those under training, and the averaged ones, which samples are made by.
  """
  d = experiment.data
  if d.test_split == d.train_split:
    say(f"no held-out loss: data.test_split and data.train_split are both {d.test_split!r}")
    return None
  try:
    source = d.load(d.test_split, progress=False)
  except ValueError as error:
    say(f"warning: no held-out loss: {error}")
    return None
  if not len(source):
    say(f"warning: no held-out loss: {d.test_split} of {d.name} has no images")
    return None
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


def _make_norms(model):
  """A function that gives the global norms of the weights and of their averages."""

  @tf.function(autograph=False)
  def norms():
    return {
      "parameter_norm": tf.linalg.global_norm([v.value for v in model.network.variables]),
      "ema_norm": tf.linalg.global_norm([v.value for v in model.ema_network.variables]),
    }

  return norms


def _periods(options):
  every = (
    options.log_every,
    options.checkpoint_every,
    options.keep_every,
    options.sample_every,
  )
  return [e for e in every if e > 0]


def _due(step, every):
  return every > 0 and step % every == 0
