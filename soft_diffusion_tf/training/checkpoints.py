"""The state of a run on disk: network, averaged weights, Adam's slots and the step.

A save copies the state to host memory, which is quick, and a thread writes the copy while training
goes on. The newest few checkpoints stay, and those asked to be kept for good, which lie in a folder
of their own. What is in a checkpoint is named by the variables' own paths.
"""

import concurrent.futures
import contextlib
import pathlib
import re
import shutil

import tensorflow as tf
import tqdm

from soft_diffusion_tf import parts

KEPT = "kept"
_FILE = re.compile(r"(ckpt-([0-9]{1,18}))(\.index|\.data-[0-9]+-of-[0-9]+|_temp|\..*tempstate.*)")


def steps_in(folder):
  """Steps of the checkpoints in a folder, rising; what only looks like one is passed over."""
  return sorted({step for step, _, file in _files(folder) if file.suffix == ".index"})


def _files(folder):
  """(step, path without suffix, file) of whatever belongs to a checkpoint in a folder."""
  for file in sorted(pathlib.Path(folder).glob("ckpt-*")):
    if match := _FILE.fullmatch(file.name):
      yield int(match[2]), file.with_name(match[1]), file


def named_variables(model):
  """Variables by name; those of the optimizer lose its own name, which counts up in a process.

  So do the names that Keras gives to layers without one: variables of a network that is not this
  package's go by their places.
  """
  groups = {
    "network": model.network.variables,
    "ema": model.ema_network.variables,
    "optimizer": model.optimizer.variables,
    **{f"average_{k}": n.variables for k, n in enumerate(model.average_networks)},
  }
  own = type(model.network).__module__.partition(".")[0] == __name__.partition(".")[0]

  def name(group, place, variable):
    path = variable.path.split("/", 1)[-1] if group == "optimizer" else variable.path
    return f"{group}/{path}" if own else f"{group}/{place:05d}"

  return {
    name(group, place, variable): variable.value
    for group, variables in groups.items()
    for place, variable in enumerate(variables)
  }


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: where they lie.
    model: a `SoftDiffusionModel` whose optimizer is built.
    keep: how many of the newest stay.
  """

  def __init__(self, folder, model, keep=1):
    self.folder = pathlib.Path(folder)
    self._live = named_variables(model)
    self._step = model.optimizer.iterations
    self._keep = keep
    self._copy = None
    self._thread = None
    self._pending = None

  # --- Reading ------------------------------------------------------------------------------------

  def paths(self):
    """Every checkpoint, newest first, as paths without suffix."""
    found = {
      (step, folder == self.folder, path)
      for folder in (self.folder, self.folder / KEPT)
      for step, path, file in _files(folder)
      if file.suffix == ".index"
    }
    return [path for _, _, path in sorted(found, reverse=True)]

  def restore(self, step=None):
    """Restores the newest readable checkpoint, or the one of a step.

    Returns:
      Its step, or None when there is no checkpoint at all.

    Raises:
      ValueError: none can be read, or there is none of that step.
    """
    paths = self.paths()
    if step is not None:
      steps = sorted({_step_of(path) for path in paths})
      paths = [path for path in paths if _step_of(path) == step]
      if not paths:
        there = ", ".join(map(str, steps)) or "no step at all"
        raise ValueError(f"{self.folder}: no checkpoint of step {step} is kept, but of {there}")
    if step is None:
      self._say_what_lost_its_index(_step_of(paths[0]) if paths else -1)
    for path in paths:
      try:
        tf.train.Checkpoint(variables=self._live).restore(
          str(path)
        ).assert_existing_objects_matched()
        return int(self._step.numpy())
      except (tf.errors.OpError, AssertionError, ValueError, IndexError, RuntimeError) as error:
        text = parts.first_line(error)
        tqdm.tqdm.write(f"{path} cannot be read ({text}); trying the one before it")
    if paths:
      raise ValueError(
        f"{self.folder}: none of its {len(paths)} checkpoints can be read (damaged, or of another "
        "network?); restore one from a backup, or train in a new workdir"
      )
    return None

  def _say_what_lost_its_index(self, newest):
    for step, path, file in _files(self.folder):
      if step > newest and ".data-" in file.name and "tempstate" not in file.name:
        tqdm.tqdm.write(f"{path} has lost its .index file and cannot be read; it is passed over")

  # --- Writing ------------------------------------------------------------------------------------

  def save(self, for_good=False, wait=False):
    """Saves the state of now; the writing goes on in a thread unless `wait`.

    Args:
      for_good: never removed by later saves.

    Raises:
      ValueError: this save, or the one before it, could not be written; earlier ones are intact.
    """
    self.wait()
    step = int(self._step.numpy())
    if self._thread is None:
      with tf.device("CPU:0"):
        self._copy = {name: tf.Variable(v, trainable=False) for name, v in self._live.items()}
      self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
      saved = tf.train.Checkpoint(variables=self._copy)
      self._newest = tf.train.CheckpointManager(saved, str(self.folder), self._keep)
      self._kept = tf.train.CheckpointManager(saved, str(self.folder / KEPT), None)
    else:
      for name, value in self._live.items():
        self._copy[name].assign(value)
    self._pending = step, self._thread.submit(self._write, step, for_good)
    if wait:
      self.wait()

  def _write(self, step, for_good):
    if for_good:
      self._kept.save(checkpoint_number=step)
    self._newest.save(checkpoint_number=step)
    self._clear(step)

  def _clear(self, step):
    """Removes what killed and failed saves left, and what is older than the newest few.

    Checkpoints beyond this step stay: they could not be read, and nobody knows why.
    """
    stay = set(sorted(s for s in steps_in(self.folder) if s <= step)[-self._keep :])
    for folder in (self.folder, self.folder / KEPT):
      whole = set(steps_in(folder))
      for s, _, file in _files(folder):
        half = file.is_dir() or "tempstate" in file.name or s not in whole
        old = folder == self.folder and s not in stay
        if s <= step and (half or old):
          (shutil.rmtree if file.is_dir() else pathlib.Path.unlink)(file)

  @contextlib.contextmanager
  def finishing(self):
    """What goes wrong inside leaves no write behind that would meet the next run's."""
    try:
      yield
    finally:
      if self._pending is not None:
        concurrent.futures.wait([self._pending[1]])

  def wait(self):
    """Returns when what was saved is on disk; raises `save`'s ValueError if it is not."""
    if self._pending is None:
      return
    (step, future), self._pending = self._pending, None
    try:
      future.result()
    except (OSError, tf.errors.OpError) as error:
      with contextlib.suppress(OSError):  # half a checkpoint would take the space of a whole one
        self._clear(step)
      text = parts.first_line(error)
      raise ValueError(
        f"{self.folder}: cannot save step {step} ({text}); the checkpoints before it are intact: "
        "free some space and start again"
      ) from None


def _step_of(path):
  return int(path.name.split("-")[1])
