"""Several workers of one run: whether they agree, and what ends them together."""

import contextlib
import hashlib
import signal
import threading

import numpy as np
import tensorflow as tf


class Preempted(RuntimeError):
  """The run was asked to end (SIGTERM) and has saved its state."""


class WorkerLost(RuntimeError):
  """Another worker of this run is gone; the others end, and all of them start again."""


@contextlib.contextmanager
def on_sigterm(handler):
  """SIGTERM calls `handler(number, frame)` meanwhile; only in the main thread can it."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def end_at_once(number, frame):
  raise Preempted("asked to end before the first step; start again to go on")


def _several_workers(strategy):
  return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_chief(strategy):
  """Whether this process writes; of several workers only the first does."""
  return not _several_workers(strategy) or not strategy.cluster_resolver.task_id


@contextlib.contextmanager
def lost_workers(strategy):
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


def _make_total(strategy):
  """A function that sums a tensor over the replicas of all workers; all of them have to call it."""

  @tf.function(autograph=False)
  def total(values):
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(lambda: values), None)

  return total


def make_any_worker(strategy):
  """A function that says whether a flag is set in any worker; all of them have to call it."""
  if not _several_workers(strategy):
    return bool
  total = _make_total(strategy)
  return lambda flag: float(total(tf.constant(float(bool(flag))))) > 0


def check_agreement(strategy, experiment, step, source, prior, model):
  """A ValueError in every worker unless all have one config, step, data, prior and state."""
  if not _several_workers(strategy):
    return
  sha = lambda arrays: hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
  networks = [model.network, model.ema_network, *model.average_networks]
  state = [v for part in (*networks, model.optimizer) for v in part.variables]
  mine = {
    "step": (f"at step {step:,}", step),
    "config": (f"of config {experiment.identity()}", int(experiment.identity(), 16)),
    "images": (f"with {len(source):,} images", len(source)),
  }
  for name, digest in (
    ("data", source.digest()),
    ("prior", sha([prior.mean, prior.factors]).hexdigest()),
    ("weights", sha([v.numpy() for v in state]).hexdigest()),
  ):
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
