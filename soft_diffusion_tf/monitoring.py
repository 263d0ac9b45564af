"""What is to be seen of a run while it trains: metrics.jsonl, TensorBoard, progress on a terminal.

A run that goes on from step k first drops what was written past k by the process before it, so
every step stands once in every record.
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

METRICS_FILE = "metrics.jsonl"
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
    self._writer, path = tf.summary.create_noop_writer(), os.devnull
    if writes:
      path = workdir / METRICS_FILE
      _truncate_metrics(path, step)
      _truncate_events(workdir / EVENTS_FOLDER, step)
      self._writer = tf.summary.create_file_writer(str(workdir / EVENTS_FOLDER))
    self._metrics = open(path, "a", buffering=1)  # noqa: SIM115
    self._lines = progress and not sys.stderr.isatty()
    self._steps = steps
    self._bar = tqdm.tqdm(
      total=steps, initial=step, desc="training", unit="step", mininterval=1.0, smoothing=0.05,
      disable=not progress or self._lines,
    )  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._bar.close()
    self._writer.close()
    self._metrics.close()

  def flush(self):
    """To disk with all records: before a checkpoint, which must never be ahead of them."""
    self._writer.flush()

  def advance(self, step, totals):
    """Takes in the sums over the steps since the last call (see `training`'s loop)."""
    totals = {key: np.asarray(value, np.float64) for key, value in totals.items()}
    before = self._window or dict.fromkeys(totals, 0.0)
    self._window = {key: before[key] + totals[key] for key in totals}
    self._bar.update(step - self._bar.n)

  def record(self, step, **values):
    """One line of metrics.jsonl and one point of every curve, for the steps since the last one.

    Args:
      values: further curves, by name.
    """
    steps, now = step - self._window_step, time.monotonic()
    window, elapsed = self._window, now - self._begin
    self._window, self._window_step, self._begin = None, step, now
    counts = window["counts"]
    by_t = np.where(counts > 0, window["sums"] / np.maximum(counts, 1), np.nan)
    record = {
      "step": step,
      "loss": float(window["loss"]) / steps,
      "gradient_norm": float(window["norm"]) / steps,
      **{name: float(value) for name, value in values.items()},
      "images_per_second": round(steps * self._batch / elapsed, 1),
      "input_wait": round(min(float(window["wait"]) / elapsed, 1.0), 5),
      "loss_by_t": [None if np.isnan(v) else float(v) for v in by_t],
    }
    self._metrics.write(json.dumps(record) + "\n")
    with self._writer.as_default():
      for name, value in record.items():
        if name not in ("step", "loss_by_t"):
          tf.summary.scalar(name, value, step)
      for k, value in enumerate(by_t):
        if not np.isnan(value):
          n = len(by_t)
          tf.summary.scalar(f"loss_by_t/{k / n:.1f}-{(k + 1) / n:.1f}", value, step)
    rate = record["images_per_second"]
    self._bar.set_postfix_str(f"loss={record['loss']:.4g}, {rate:.0f} images/s", refresh=False)
    if self._lines:
      left = (self._steps - step) * elapsed / steps
      print(
        f"step {step}/{self._steps}: loss {record['loss']:.4g}, {rate:.0f} images/s, "
        f"{tqdm.tqdm.format_interval(left)} left",
        file=sys.stderr,
      )

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


def _truncate_metrics(path, step):
  """Drops lines past `step`, and a line torn by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
  partial = path.with_suffix(".partial")
  partial.write_text("".join(kept))
  partial.replace(path)


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
      partial = folder / f".{file.name}.partial"
      with tf.io.TFRecordWriter(str(partial)) as writer:
        for raw in kept:
          writer.write(raw)
      partial.replace(file)
