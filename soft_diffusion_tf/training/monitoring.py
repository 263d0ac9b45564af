"""Records of a training run: metrics.jsonl, TensorBoard, progress on a terminal.

A run that goes on from step k first drops what was written past k by the process before it, so
every step stands once in every record. A record averages the "steps" steps since the one before it,
also where the run was stopped between them: a checkpoint's sums so far stand in windows.jsonl.
"""

import contextlib
import json
import os
import pathlib
import sys
import time

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import files

METRICS_FILE = "metrics.jsonl"
WINDOWS_FILE = "windows.jsonl"  # what a record had gathered when a checkpoint was written
EVENTS_FOLDER = "tensorboard"


class Monitor:
  """The records of one run, from `step` on; a context manager.

  Args:
    workdir: the run's folder.
    step: the step that the run stands at.
    steps: the step at which it ends.
    batch_size: images a step.
    progress: show a bar on a terminal, or a line per record where there is none.
    writes: False for the workers that leave the files to the chief.
  """

  def __init__(self, workdir, step, steps, batch_size, progress=True, writes=True):
    workdir = pathlib.Path(workdir)
    self._batch = batch_size
    self._window, self._begin, self._window_step = None, time.monotonic(), step
    self._first_step = step  # of this window, in this process: for the clock
    self._writer, path = tf.summary.create_noop_writer(), os.devnull
    if writes:
      path = workdir / METRICS_FILE
      _truncate_metrics(path, step)
      self._go_on(workdir / WINDOWS_FILE, step)
      _truncate_events(workdir / EVENTS_FOLDER, step)
      self._writer = tf.summary.create_file_writer(str(workdir / EVENTS_FOLDER))
    self._metrics = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    self._windows = path.with_name(WINDOWS_FILE) if writes else None
    self._lines = progress and not sys.stderr.isatty()
    self._steps = steps
    self._bar = tqdm.tqdm(
      total=steps,
      initial=step,
      desc="training",
      unit="step",
      mininterval=1.0,
      smoothing=0.05,
      disable=not progress or self._lines,
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._bar.close()
    self._writer.close()
    self._metrics.close()

  def _go_on(self, path, step):
    """Takes up the window that the process before had begun when it saved this step."""
    _truncate_metrics(path, step)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
      found = json.loads(line)
      if found["step"] == step:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged: anew
          sums, since = found["sums"], int(found["since"])
          window = {key: np.asarray(value, np.float64) for key, value in sums.items()}
          window["wait"] *= 0  # the clock is this process's
          self._window, self._window_step = window, since

  def flush(self, step):
    """To disk with all records: before a checkpoint, which must never be ahead of them."""
    self._writer.flush()
    if self._windows is not None and self._window is not None:
      sums = {key: value.tolist() for key, value in self._window.items()}
      with open(self._windows, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "since": self._window_step, "sums": sums}) + "\n")

  def passed(self, step, every):
    """Whether a multiple of `every` lies after the last record, up to `step`."""
    return every > 0 and step // every > self._window_step // every

  def advance(self, step, totals):
    """Takes in the sums over the steps since the last call (see `training`'s loop)."""
    totals = {key: np.asarray(value, np.float64) for key, value in totals.items()}
    before = self._window or dict.fromkeys(totals, 0.0)
    self._window = {key: before[key] + totals[key] for key in totals}
    self._bar.update(step - self._bar.n)

  def record(self, step, **values):
    """One line of metrics.jsonl and one point of every curve, for the steps since the last one.

    Args:
      values: further curves, by name: numbers, or one for each part of t.

    Returns:
      The line, as a dictionary.
    """
    steps, now = step - self._window_step, time.monotonic()
    window, elapsed = self._window, now - self._begin
    rate = (step - self._first_step) * self._batch / elapsed
    self._window, self._window_step, self._first_step, self._begin = None, step, step, now
    counts = window["counts"]
    by_t = np.where(counts > 0, window["sums"] / np.maximum(counts, 1), np.nan)
    values = {
      "loss": window["loss"] / steps,
      "gradient_norm": window["norm"] / steps,
      **values,
      "images_per_second": round(rate, 1),
      "input_wait": round(min(float(window["wait"]) / elapsed, 1.0), 5),
      "loss_by_t": by_t,
    }
    record = {"step": step, "steps": steps} | {k: _plain(v) for k, v in values.items()}
    self._metrics.write(json.dumps(record) + "\n")
    with self._writer.as_default():
      for name, value in values.items():
        parts = {name: value}
        if np.ndim(value):
          n = len(value)
          parts = {f"{name}/{k / n:.1f}-{(k + 1) / n:.1f}": v for k, v in enumerate(value)}
        for curve, number in parts.items():
          if not np.isnan(number):
            tf.summary.scalar(curve, number, step)
    self._bar.set_postfix_str(f"loss={record['loss']:.4g}, {rate:.0f} images/s", refresh=False)
    if self._lines:
      left = (self._steps - step) * self._batch / rate
      print(
        f"step {step}/{self._steps}: loss {record['loss']:.4g}, {rate:.0f} images/s, "
        f"{tqdm.tqdm.format_interval(left)} left",
        file=sys.stderr,
      )
    return record

  def image(self, name, picture, step):
    """A uint8 picture [H, W, 3] in TensorBoard."""
    with self._writer.as_default():
      tf.summary.image(name, picture[None], step)

  def hyperparameters(self, values, name):
    """The run's options, for TensorBoard's table of runs: plain values by name."""
    from tensorboard.plugins.hparams import api

    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
    with self._writer.as_default():
      api.hparams(plain, trial_id=name)


def _plain(value):
  """A number or an array for JSON, which has no NaN: None."""
  if np.ndim(value):
    return [_plain(v) for v in value]
  return float(value) if np.isfinite(value) else None


def _truncate_metrics(path, step):
  """Drops lines past `step`, and a line torn by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
  files.write_text(path, "".join(kept))


def _truncate_events(folder, step):
  """Drops TensorBoard's events past `step`, and one torn by a kill."""
  for file in sorted(pathlib.Path(folder).glob("events.*")):
    kept, whole = [], True
    try:
      for raw in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        if tf.compat.v1.Event.FromString(raw).step <= step:
          kept.append(raw)
        else:
          whole = False
    except tf.errors.DataLossError:
      whole = False
    if not whole:
      with files.atomic(file) as partial, tf.io.TFRecordWriter(str(partial)) as writer:
        for raw in kept:
          writer.write(raw)
        writer.close()
