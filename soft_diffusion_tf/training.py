"""A training run in a workdir: the loop over `model.update`, checkpoints, TensorBoard.

A workdir holds everything: config.json, prior.npz, checkpoints/, metrics.jsonl (a line per
`log_every` steps), tensorboard/. Starting again with the same workdir goes on where it stopped.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import threading
import time

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import bulk, data, plots, priors
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.model import SoftDiffusionModel

BUCKETS = 10  # of t, for the loss by time
PRIOR_FILE = "prior.npz"
METRICS_FILE = "metrics.jsonl"
GRID_IMAGES = 64
PRIOR_IMAGES = 10_000  # the prior is fitted to at most this many training images

# What may change when a run goes on in its workdir; all else would make it another run.
_MAY_CHANGE = (
  "name", "training.steps", "training.steps_per_loop", "training.log_every", "training.keep",
  "training.checkpoint_every", "training.keep_every", "training.sample_every", "data.data_dir",
  "data.test_split", "sampling.", "evaluation.",
)  # fmt: skip


class Preempted(RuntimeError):
  """The run was asked to end (SIGTERM) and has saved its state."""


class NonFiniteLoss(RuntimeError):
  """The loss or the gradient is not finite; the message says where."""


@contextlib.contextmanager
def lock(workdir):
  """Holds a workdir for one process; the second gets a ValueError."""
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(
        f"{workdir}: another process is training in it; wait for it or take another workdir"
      ) from None
    yield


@contextlib.contextmanager
def _sigterm():
  """Yields a list that is no longer empty once SIGTERM has come; only in the main thread."""
  asked: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield asked
    return
  before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
  try:
    yield asked
  finally:
    signal.signal(signal.SIGTERM, before)


def _claim(workdir, experiment):
  """Writes the config into a new workdir, or checks it against the one that is there."""
  if (workdir / "config.json").exists():
    changed = [
      name
      for name in Experiment.load(workdir).differences(experiment)
      if not name.startswith(_MAY_CHANGE)
    ]
    if changed:
      raise ValueError(
        f"{workdir} holds a run of another config (it differs in {', '.join(changed)}); "
        "take another workdir, or the config that the run was started with"
      )
  experiment.save(workdir)


def build(experiment, diffusion):
  """A model with an optimizer, fresh: network, averaged weights and Adam's slots exist."""
  model = SoftDiffusionModel(
    experiment.build_network(), diffusion,
    training=experiment.training, options=experiment.network, seed=experiment.seed,
  )  # fmt: skip
  model.compile(optimizer=model.make_optimizer())
  model.optimizer.build(model.network.trainable_variables)
  return model


def _checkpoint(model):
  return tf.train.Checkpoint(
    network=model.network, ema_network=model.ema_network, optimizer=model.optimizer
  )


def _restore_newest(checkpoint, folder):
  """Restores the newest readable checkpoint of a folder; None if there is none at all.

  Raises:
    ValueError: there are checkpoints, but none can be read.
  """
  newest = sorted(
    {f.with_suffix("") for part in (folder, folder / "kept") for f in part.glob("ckpt-*.index")},
    key=lambda f: (int(f.name.split("-")[1]), f.parent == folder),
    reverse=True,
  )
  for path in map(str, newest):
    try:
      checkpoint.restore(path).assert_existing_objects_matched()
      return path
    except (tf.errors.OpError, AssertionError, ValueError, IndexError, RuntimeError) as error:
      text = str(error).strip().splitlines()[0]
      tqdm.tqdm.write(f"{path} cannot be read ({text}); trying the one before it")
  if newest:
    raise ValueError(
      f"{folder}: none of its {len(newest)} checkpoints can be read (damaged, or of another "
      "network?); restore one from a backup, or train in a new workdir"
    )
  return None


@dataclasses.dataclass
class Run:
  """A trained model, as a workdir holds it."""

  experiment: Experiment
  model: SoftDiffusionModel
  step: int
  _drawers: dict = dataclasses.field(default_factory=dict, repr=False)

  @property
  def diffusion(self):
    return self.model.diffusion

  def options(self, **changes):
    """The experiment's `Sampling` with other values for what is not None (`Sampling.changed`)."""
    return self.experiment.sampling.changed(**changes)

  def drawer(self, options=None, strategy=None):
    """A `bulk.Drawer` on the averaged weights, by the experiment's sampler or other options."""
    key = (options or self.experiment.sampling, id(strategy))
    if key not in self._drawers:
      self._drawers[key] = bulk.Drawer(self.diffusion, self.model.denoiser(), key[0], strategy)
    return self._drawers[key]

  def images(self, seeds, options=None, progress=None):
    """Samples float32 [N, H, W, C] for image seeds [N]; see `bulk`."""
    return self.drawer(options).images(seeds, progress)

  def sampler(self, options=None):
    """The `samplers.Sampler` of `drawer`."""
    return self.drawer(options).sampler

  def table(self, options=None):
    """The rows of the experiment's sampler, or of other `experiment.Sampling` options."""
    return self.drawer(options).rows


def load(workdir, step=None):
  """A run, ready to sample from: its newest state, or the checkpoint kept at a step.

  Raises:
    ValueError: the workdir holds no such checkpoint, or none that can be read.
  """
  workdir = pathlib.Path(workdir)
  experiment = Experiment.load(workdir)
  prior = priors.Prior.load(workdir / PRIOR_FILE)
  model = build(experiment, experiment.build_diffusion().with_prior(prior))
  folder = workdir / "checkpoints"
  if step is not None:
    paths = [folder / f"ckpt-{step}", folder / "kept" / f"ckpt-{step}"]
    found = next((p for p in paths if p.with_suffix(".index").exists()), None)
    if found is None:
      raise ValueError(f"{workdir}: no checkpoint of step {step} is kept in it")
    _checkpoint(model).restore(str(found)).assert_existing_objects_matched()
  elif _restore_newest(_checkpoint(model), folder) is None:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  return Run(experiment, model, int(model.optimizer.iterations.numpy()))


def write(run, workdir):
  """Writes a model that was not trained here as a workdir, to sample from or to train on."""
  workdir = pathlib.Path(workdir)
  if (workdir / "config.json").exists():
    raise ValueError(f"{workdir} holds a run already; take another folder")
  workdir.mkdir(parents=True, exist_ok=True)
  run.diffusion.prior.save(workdir / PRIOR_FILE)
  tf.train.CheckpointManager(
    _checkpoint(run.model), str(workdir / "checkpoints"), max_to_keep=1
  ).save(checkpoint_number=run.step)
  run.experiment.save(workdir)


def _make_loop(model, strategy):
  """`loop(iterator, n)`: n steps in one call of one compiled function."""

  def replica_step(x_0):
    out = model.update(x_0)
    bucket = tf.minimum(tf.cast(out["t"] * BUCKETS, tf.int32), BUCKETS - 1)
    odd = tf.cast(~tf.math.is_finite(out["losses"]), tf.int32)
    return {
      "loss": out["loss"],
      "norm": out["gradient_norm"] / strategy.num_replicas_in_sync,
      "sums": tf.math.unsorted_segment_sum(out["losses"], bucket, BUCKETS),
      "counts": tf.math.unsorted_segment_sum(tf.ones_like(out["losses"]), bucket, BUCKETS),
      "odd_t": out["t"][tf.argmax(odd)] / strategy.num_replicas_in_sync,
    }

  def loop(iterator, n):
    def body(k, totals, odd_step, odd_t):
      step = tf.cast(model.optimizer.iterations, tf.int64)
      each = strategy.run(replica_step, args=(iterator.get_next(),))
      out = {k: strategy.reduce(tf.distribute.ReduceOp.SUM, v, None) for k, v in each.items()}
      totals = {key: totals[key] + out[key] for key in totals}
      finite = tf.math.is_finite(out["loss"]) & tf.math.is_finite(out["norm"])
      first = (odd_step < 0) & ~finite
      odd_step, odd_t = tf.where(first, step, odd_step), tf.where(first, out["odd_t"], odd_t)
      return k + 1, totals, odd_step, odd_t

    zeros = {"loss": tf.zeros([]), "norm": tf.zeros([])}
    zeros |= {"sums": tf.zeros([BUCKETS]), "counts": tf.zeros([BUCKETS])}
    start = (tf.constant(0), zeros, tf.constant(-1, tf.int64), tf.constant(0.0))
    return tf.while_loop(lambda k, *_: k < n, body, start)[1:]

  # Control flow is written out, so AutoGraph would only cost time: most of the tracing.
  return tf.function(loop, autograph=False)


def _truncate_metrics(path, step):
  """Drops lines past `step`, which a run that died had written after its last checkpoint."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by the kill
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
  partial = path.with_suffix(".partial")
  partial.write_text("".join(kept))
  partial.replace(path)


def train(experiment, workdir, strategy=None, progress=True):
  """Trains to `experiment.training.steps`, going on from the workdir's newest checkpoint.

  Args:
    experiment: an `Experiment`.
    workdir: its folder, made if need be.
    strategy: a `tf.distribute.Strategy`; by default the current one.
    progress: show a bar with the time left.

  Returns:
    The `Run` at its end.

  Raises:
    ValueError: bad input, or a workdir that belongs to another config or process.
    NonFiniteLoss: names step, t and σ; the last checkpoint stays.
  """
  workdir = pathlib.Path(workdir)
  strategy = strategy or tf.distribute.get_strategy()
  replicas, batch = strategy.num_replicas_in_sync, experiment.training.batch_size
  if batch % replicas:
    raise ValueError(
      f"training.batch_size = {batch} cannot be shared by {replicas} replicas; "
      f"take {batch // replicas * replicas or replicas} or another multiple of {replicas}"
    )
  # An unsound process or network is refused before a file is written.
  diffusion = experiment.build_diffusion()
  experiment.check_network()
  d = experiment.data
  source = data.load(d.name, d.train_split, d.image_shape, d.crop, d.data_dir or None, progress)
  if not _is_chief(strategy):
    return _train(experiment, source, diffusion, workdir, strategy, progress=False)
  with lock(workdir):
    _claim(workdir, experiment)
    return _train(experiment, source, diffusion, workdir, strategy, progress)


def _is_chief(strategy):
  """Whether this process writes; of several workers only the first does."""
  resolver = getattr(strategy, "cluster_resolver", None)
  several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
  return not several or not resolver.task_id


def _train(experiment, source, diffusion, workdir, strategy, progress):
  options, chief = experiment.training, _is_chief(strategy)
  if (workdir / PRIOR_FILE).exists():
    prior = priors.Prior.load(workdir / PRIOR_FILE)
  else:
    picked = np.random.default_rng(experiment.seed).permutation(len(source))[:PRIOR_IMAGES]
    images = source.floats(np.sort(picked))
    prior = priors.fit(experiment.prior.kind, images, diffusion, experiment.prior.rank)
    if chief:
      prior.save(workdir / PRIOR_FILE)
  diffusion = diffusion.with_prior(prior)
  with strategy.scope():
    model = build(experiment, diffusion)
  checkpoint = _checkpoint(model)
  folder = workdir / "checkpoints"
  manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=options.keep)
  kept = tf.train.CheckpointManager(checkpoint, str(folder / "kept"), max_to_keep=None)
  _restore_newest(checkpoint, folder)
  step = int(model.optimizer.iterations.numpy())
  run = Run(experiment, model, step)

  def save():
    if not chief:
      return
    try:
      manager.save(checkpoint_number=step)
      if step and _due(step, options.keep_every):
        kept.save(checkpoint_number=step)
    except (OSError, tf.errors.OpError) as error:
      text = str(error).strip().splitlines()[0]
      raise ValueError(
        f"{folder}: cannot save step {step} ({text}); the checkpoints before it are intact: "
        "free some space and start again"
      ) from None

  if step == 0 and manager.latest_checkpoint is None:
    save()
  if step >= options.steps:
    return run
  if chief:
    _truncate_metrics(workdir / METRICS_FILE, step)
  pipeline = data.batches(
    source, options.batch_size, seed=experiment.seed, start=step, flip=experiment.data.flip
  )
  iterator = iter(strategy.experimental_distribute_dataset(pipeline))
  loop = _make_loop(model, strategy)
  writer = tf.summary.create_noop_writer()
  if chief:
    writer = tf.summary.create_file_writer(str(workdir / "tensorboard"))
  sampler = run.sampler()
  bar = tqdm.tqdm(
    total=options.steps, initial=step, desc="training", unit="step", mininterval=1.0,
    disable=not progress, smoothing=0.05,
  )  # fmt: skip
  window, window_steps, window_start = None, 0, time.monotonic()
  log = open(workdir / METRICS_FILE if chief else os.devnull, "a", buffering=1)  # noqa: SIM115
  with bar, writer.as_default(), log as metrics, _sigterm() as asked:
    while step < options.steps:
      ahead = [e - step % e for e in _periods(options)] + [options.steps - step]
      n = min(options.steps_per_loop, *ahead)
      totals, odd_step, odd_t = loop(iterator, tf.constant(n))
      if int(odd_step) >= 0:
        sigma = float(diffusion.sigma(odd_t))
        raise NonFiniteLoss(
          f"the loss or its gradient is not finite at step {int(odd_step)} "
          f"(t = {float(odd_t):.4f}, σ = {sigma:.4g}); the last good checkpoint is "
          f"{manager.latest_checkpoint}; lower training.learning_rate or look at the data"
        )
      step += n
      run.step = step
      bar.update(n)
      totals = {k: np.asarray(v, np.float64) for k, v in totals.items()}
      window = totals if window is None else {k: window[k] + totals[k] for k in totals}
      window_steps += n
      last = step == options.steps
      if _due(step, options.log_every) or last:
        elapsed = time.monotonic() - window_start
        rate = window_steps * options.batch_size / elapsed
        _log(metrics, model, step, window, window_steps, rate)
        bar.set_postfix(loss=f"{float(window['loss']) / window_steps:.4g}", refresh=False)
        window, window_steps, window_start = None, 0, time.monotonic()
      if _due(step, options.checkpoint_every) or _due(step, options.keep_every) or last or asked:
        save()
      if asked and not last:
        raise Preempted(f"asked to end at step {step}, which is saved; start again to go on")
      if chief and (_due(step, options.sample_every) or (last and options.sample_every)):
        images = sampler(run.table(), np.arange(GRID_IMAGES)).numpy()
        tf.summary.image("samples", plots.grid(images, zoom=4)[None], step)
        writer.flush()
  return run


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


def _log(metrics, model, step, window, steps, rate):
  """One line in metrics.jsonl and one point of every TensorBoard curve."""
  counts = np.maximum(window["counts"], 1)
  buckets = np.where(window["counts"] > 0, window["sums"] / counts, np.nan)
  record = {
    "step": step,
    "loss": float(window["loss"]) / steps,
    "gradient_norm": float(window["norm"]) / steps,
    "learning_rate": float(model.optimizer.learning_rate),
    "images_per_second": round(rate, 1),
    "loss_by_t": [None if np.isnan(v) else float(v) for v in buckets],
  }
  metrics.write(json.dumps(record) + "\n")
  for key in ("loss", "gradient_norm", "learning_rate", "images_per_second"):
    tf.summary.scalar(key, record[key], step)
  for k, value in enumerate(buckets):
    if not np.isnan(value):
      tf.summary.scalar(f"loss_by_t/{k / BUCKETS:.1f}-{(k + 1) / BUCKETS:.1f}", value, step)
