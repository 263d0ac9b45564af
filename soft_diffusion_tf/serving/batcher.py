"""Requests of many clients, computed together."""

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time

import numpy as np

from soft_diffusion_tf.serving.model import Refused


class Gone(Exception):
  """The client left before it was answered."""


class Metrics:
  """Counters of a running server, as Prometheus reads them."""

  LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
  ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

  def __init__(self):
    self._lock = threading.Lock()
    self._counts = collections.Counter()
    self._histograms = {}
    self.start = time.time()

  def count(self, name, amount=1, **labels):
    with self._lock:
      self._counts[name, tuple(sorted(labels.items()))] += amount

  def observe(self, name, value, bounds, **labels):
    with self._lock:
      key = name, tuple(sorted(labels.items()))
      entry = self._histograms.setdefault(key, [bounds, [0] * (len(bounds) + 1), 0.0])
      entry[1][next((k for k, b in enumerate(bounds) if value <= b), len(bounds))] += 1
      entry[2] += value

  def text(self, gauges):
    """Exposition format 0.0.4; `gauges` {name: value} are added."""
    prefix = "soft_diffusion_"
    label = lambda pairs: "{" + ",".join(f'{k}="{v}"' for k, v in pairs) + "}" if pairs else ""
    lines, seen = [], set()

    def head(name, kind):
      if name not in seen:
        seen.add(name)
        lines.append(f"# TYPE {prefix}{name} {kind}")

    for name, value in {**gauges, "start_time_seconds": self.start}.items():
      head(name, "gauge")
      lines.append(f"{prefix}{name} {value}")
    with self._lock:
      for (name, labels), value in sorted(self._counts.items()):
        head(name, "counter")
        lines.append(f"{prefix}{name}{label(labels)} {value}")
      for (name, labels), (bounds, counts, total) in sorted(self._histograms.items()):
        head(name, "histogram")
        for bound, cumulated in zip([*bounds, "+Inf"], np.cumsum(counts)):
          lines.append(f"{prefix}{name}_bucket{label((*labels, ('le', bound)))} {cumulated}")
        lines.append(f"{prefix}{name}_sum{label(labels)} {total}")
        lines.append(f"{prefix}{name}_count{label(labels)} {sum(counts)}")
    return "\n".join(lines) + "\n"


class Batcher:
  """A bounded queue and the one thread that calls the model.

  TensorFlow spreads a call over the cores itself, so calls stand in line. While one runs, requests
  gather; those at the front that ask for the same row-wise signature then share the next call.
  A request never waits for others to come.

  Args:
    max_rows: of one call.
    limit: requests that may wait.
    fixed: pad every call of a row-wise signature to max_rows. Kernels round by the size of a batch,
      so without it a row's last bits depend on how many rows came along.
  """

  def __init__(self, max_rows=64, limit=64, fixed=False, metrics=None):
    self.max_rows, self.limit, self.fixed = max_rows, limit, fixed
    self.metrics = metrics or Metrics()
    self._waiting = collections.deque()
    self._changed = threading.Condition()
    self._closed = False
    self._seconds = 0.0  # of a call, recently
    self._thread = threading.Thread(target=self._run, name="model", daemon=True)
    self._thread.start()

  @property
  def alive(self):
    return self._thread.is_alive()

  @property
  def waiting(self):
    with self._changed:
      return sum(not future.done() for _, future in self._waiting)

  def submit(self, request):
    """A concurrent Future of the outputs {name: array}; cancelled, it leaves the queue."""
    with self._changed:
      if any(future.cancelled() for _, future in self._waiting):
        self._waiting = collections.deque(x for x in self._waiting if not x[1].cancelled())
      if self._closed:
        raise Refused(503, "the server is stopping", [(b"retry-after", b"5")])
      if len(self._waiting) >= self.limit:
        wait = math.ceil(min(max(self._seconds * len(self._waiting), 1), 60))
        raise Refused(
          429,
          f"{self.limit} requests are waiting; try again in {wait} s",
          [(b"retry-after", str(wait).encode())],
        )
      future = concurrent.futures.Future()
      self._waiting.append((request, future))
      self._changed.notify()
    return future

  def close(self):
    """Answers what is waiting, then ends the thread."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def _take(self):
    """The oldest request, and those that fit into its call; None at the end."""
    with self._changed:
      while not self._waiting and not self._closed:
        self._changed.wait()
      taken, left, rows, first = [], collections.deque(), 0, None
      for request, future in self._waiting:
        fits = first is None or (
          first.rows
          and first.signature.row_wise
          and request.rows
          and rows + request.rows <= self.max_rows
          and request.signature is first.signature
          and all(request.inputs[k].shape[1:] == v.shape[1:] for k, v in first.inputs.items())
        )
        if not fits:
          left.append((request, future))
        elif future.set_running_or_notify_cancel():
          taken.append((request, future))
          first, rows = first or request, rows + (request.rows or 0)
      self._waiting = left
      return taken or (None if self._closed and not left else [])

  def _call(self, requests):
    """Outputs of requests for one signature, which share a call."""
    signature, shared = requests[0].signature, requests[0].rows is not None
    inputs = requests[0].inputs
    if shared:
      counts = [request.rows for request in requests]
      rows = sum(counts)
      inputs = {k: np.concatenate([r.inputs[k] for r in requests]) for k in inputs}
      if self.fixed:
        inputs = {k: v[np.minimum(np.arange(self.max_rows), rows - 1)] for k, v in inputs.items()}
      self.metrics.observe("batch_rows", rows, Metrics.ROWS, signature=signature.name)
    begin = time.monotonic()
    outputs = signature(inputs)
    seconds = time.monotonic() - begin
    self._seconds += 0.2 * (seconds - self._seconds)
    self.metrics.count("model_seconds_total", seconds, signature=signature.name)
    self.metrics.count("model_calls_total", signature=signature.name)
    if not shared:
      return [outputs]
    given = len(next(iter(inputs.values())))
    if any(v.shape[:1] != (given,) for v in outputs.values()):
      # Its shapes promised rows, but there is something else, such as a list of times.
      signature.row_wise = False
      return [self._call([dataclasses.replace(r, rows=None)])[0] for r in requests]
    ends = np.cumsum(counts)
    return [{k: v[e - n : e] for k, v in outputs.items()} for n, e in zip(counts, ends)]

  def _run(self):
    while (taken := self._take()) is not None:
      groups = [taken] if taken else []
      while groups:
        group = groups.pop(0)
        try:
          answers = self._call([request for request, _ in group])
        except Exception as error:  # of any kind: it belongs to whoever asked
          if len(group) > 1:  # to one of them, perhaps
            groups = [[one] for one in group]
          else:
            group[0][1].set_exception(error)
        else:
          for (_, future), answer in zip(group, answers):
            future.set_result(answer)
