"""A SavedModel over HTTP, in the JSON of TensorFlow Serving's REST API, and a page to look at it.

From the bottom up: `Model` (signatures as they are in the file: nothing here knows samplers or
networks), `decode` and `encode` (JSON ↔ arrays, every mistake a `Refused` with one clear line),
`Batcher` (a bounded queue before one thread that calls the model), `App` (ASGI) and `make_server`
(uvicorn, with the time limits that it lacks).

Contract: https://www.tensorflow.org/tfx/serving/api_rest, except that JSON is strict: NaN and
Infinity are neither taken nor given.
"""

import asyncio
import base64
import collections
import concurrent.futures
import dataclasses
import importlib.resources
import ipaddress
import json
import logging
import math
import pathlib
import re
import socket
import threading
import time

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

SIZES = ("num",)  # scalar inputs that say how much is to be computed
MOST_VALUES = 4 << 20  # numbers of one answer; about 80 MB of JSON
_SIGNATURE = "serving_default"
_UNSENT = 128 << 10  # bytes of an answer that the kernel may hold back
_PAGE = {
  "/": ("index.html", "text/html; charset=utf-8"),
  "/page.css": ("page.css", "text/css; charset=utf-8"),
  "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = (
  (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; "
   b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
  (b"cache-control", b"no-cache"),
)  # fmt: skip
_ECHO = 40  # characters of a client's text that an error may repeat

_log = logging.getLogger(__name__)


class Refused(Exception):
  """A request that is not answered: HTTP status and one line that says why."""

  def __init__(self, status, message, headers=()):
    super().__init__(message)
    self.status = status
    self.headers = tuple(headers)


def _quote(value):
  """A client's text, short and on one line."""
  text = str(value)
  return json.dumps(text if len(text) <= _ECHO else text[:_ECHO] + "…")


class Signature:
  """One function of a SavedModel.

  Attributes:
    name: as in the file.
    inputs, outputs: {name: tf.TensorSpec}.
    row_wise: every input and output has a free first dimension. Then rows of several requests may
      share one call.
  """

  def __init__(self, name, function):
    self.name = name
    self.inputs = dict(function.structured_input_signature[1])
    self.outputs = {k: tf.TensorSpec(v.shape, v.dtype) for k, v in
                    function.structured_outputs.items()}  # fmt: skip
    self._function = function
    free = lambda spec: spec.shape.rank is None or (spec.shape.rank > 0 and spec.shape[0] is None)
    specs = [*self.inputs.values(), *self.outputs.values()]
    self.row_wise = bool(self.inputs) and all(map(free, specs))

  def __call__(self, inputs):
    """Arrays {name: array} → arrays {name: array}."""
    tensors = {k: tf.constant(v, self.inputs[k].dtype) for k, v in inputs.items()}
    return {k: v.numpy() for k, v in self._function(**tensors).items()}

  def example(self):
    """Zeros that fit the inputs, one of everything: what the first call may be tried with."""
    shape = lambda spec: [1 if n is None else n for n in (spec.shape.as_list())]
    return {
      k: np.ones([], v.dtype.as_numpy_dtype) if k in SIZES and v.shape.rank == 0
      else np.full(shape(v), b"") if v.dtype == tf.string
      else np.zeros(shape(v), v.dtype.as_numpy_dtype)
      for k, v in self.inputs.items()
    }  # fmt: skip


class Model:
  """A SavedModel and what it says of itself.

  Args:
    path: folder of a SavedModel, or one of numbered versions, of which the highest is taken.
    name: the model's name in URLs.

  Raises:
    ValueError: there is no SavedModel, or none that can be loaded.
  """

  def __init__(self, path, name="model"):
    path = pathlib.Path(path)
    if not re.fullmatch(r"[\w.-]+", name):
      raise ValueError(f"--name={name}: give letters, digits, dots, dashes and underscores")
    self.version = "1"
    versions = [p for p in path.glob("*") if p.name.isdecimal() and (p / "saved_model.pb").exists()]
    if not (path / "saved_model.pb").exists() and versions:
      path = max(versions, key=lambda p: int(p.name))
      self.version = path.name
    if not (path / "saved_model.pb").is_file():
      raise ValueError(f"{path}: no SavedModel (saved_model.pb); give the folder of an export")
    try:
      self._loaded = tf.saved_model.load(str(path))
      proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    except Exception as error:  # damaged files raise many kinds
      cause = " ".join(str(error).split())[:200] or type(error).__name__
      raise ValueError(f"{path}: the SavedModel cannot be loaded ({cause})") from None
    self.name, self.path = name, path
    self.signatures = {k: Signature(k, f) for k, f in sorted(self._loaded.signatures.items())}
    if not self.signatures:
      raise ValueError(f"{path}: this SavedModel has no signatures, so there is nothing to serve")
    definitions = proto.meta_graphs[0].signature_def
    as_dict = lambda message: json_format.MessageToDict(
      message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    self.definitions = {k: as_dict(definitions[k]) for k in self.signatures}
    self.files = {
      f"/{name}": (path / "assets.extra" / name if extra else path / name)
      for name, extra in (("manifest.json", True), ("README.md", False))
    }

  def rows_for(self, signature):
    """Of a sampler (num, seed) its twin (seeds [N]), if the export has one: the rows of its calls.

    The image of seed i is the same in both, so that `sample_…` of several clients can be one
    `draw_…`.
    """
    name = "sample" if signature.name == _SIGNATURE else signature.name
    kind, _, rest = name.partition("_")
    twin = self.signatures.get(f"draw_{rest}" if rest else "draw")
    good = (
      kind == "sample" and twin and twin.row_wise and set(signature.inputs) == {"num", "seed"}
      and list(twin.inputs) == ["seeds"] and set(twin.outputs) == set(signature.outputs)
    )  # fmt: skip
    return twin if good else None

  def status(self):
    """The answer to GET /v1/models/NAME."""
    good = {"error_code": "OK", "error_message": ""}
    return {
      "model_version_status": [{"version": self.version, "state": "AVAILABLE", "status": good}]
    }

  def metadata(self):
    """The answer to GET /v1/models/NAME/metadata."""
    spec = {"name": self.name, "signature_name": "", "version": self.version}
    return {
      "model_spec": spec,
      "metadata": {
        "signature_def": {
          "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
          "signature_def": self.definitions,
        }
      },
    }

  def signature(self, name=None):
    """The signature of this name; the default one, or the only one, for None."""
    if name is None:
      only = next(iter(self.signatures)) if len(self.signatures) == 1 else _SIGNATURE
      name = _SIGNATURE if _SIGNATURE in self.signatures else only
    if not isinstance(name, str) or name not in self.signatures:
      raise Refused(
        400, f'no signature {_quote(name)}; give "signature_name": {", ".join(self.signatures)}'
      )
    return self.signatures[name]

  def warm(self):
    """Calls once what requests will call, so that the first one does not wait for TensorFlow."""
    for signature in self.signatures.values():
      if self.rows_for(signature):
        continue
      try:
        signature(signature.example())
      except (tf.errors.OpError, ValueError) as error:  # ValueError: a shape that is not known
        _log.info("%s refuses zeros: %s", signature.name, error)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A call that was asked for.

  Attributes:
    signature: what is called.
    inputs: {name: array}.
    rows: how many; None: the call cannot be shared.
    as_rows: whether the answer lists rows ("predictions") or columns ("outputs").
    name: the signature's name as the client gave it.
  """

  signature: Signature
  inputs: dict
  rows: int | None
  as_rows: bool
  name: str = ""


class _Gone(Exception):
  """The client left before it was answered."""


def _no_constant(text):
  raise Refused(400, f"{text} is not JSON and not a finite number")


def _parse(body):
  try:
    content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
  except UnicodeDecodeError:
    raise Refused(400, "the body is not UTF-8 text") from None
  except RecursionError:
    raise Refused(400, "the body is nested too deeply") from None
  except ValueError as error:  # also a number of more digits than Python reads
    raise Refused(400, f"the body is not JSON: {str(error)[:100]}") from None
  if not isinstance(content, dict):
    raise Refused(400, 'the body must be a JSON object with "instances" or "inputs"')
  return content


def _unpack_bytes(value):
  """Strings and {"b64": …} → bytes, at any depth."""
  if isinstance(value, list):
    return [_unpack_bytes(v) for v in value]
  if isinstance(value, str):
    return value.encode()
  if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
    try:
      return base64.b64decode(value["b64"], validate=True)
    except ValueError:
      raise Refused(400, '"b64" holds no base64') from None
  raise Refused(400, 'an input of strings takes strings and {"b64": …} alone')


def _array(name, value, spec):
  """A JSON value as an array of the dtype and shape of an input."""
  shape = spec.shape.as_list() if spec.shape.rank is not None else "any"
  want = f"{spec.dtype.name} of shape {str(shape).replace('None', '-1')}"
  refuse = lambda what: Refused(400, f"input {_quote(name)} must be {want}, not {what}")
  dtype = np.dtype(spec.dtype.as_numpy_dtype)
  try:
    if spec.dtype == tf.string:
      array = np.array(_unpack_bytes(value), object)
      if not all(isinstance(v, bytes) for v in array.flat):
        raise refuse("a ragged list")
    else:
      array = np.asarray(value)
  except RecursionError:
    raise refuse("so deep a list") from None
  except (ValueError, OverflowError):
    raise refuse("a ragged list") from None
  if spec.dtype != tf.string:
    given = array.dtype.kind
    if not array.size:
      raise refuse("an empty list")
    if given in "OUS":
      types = {type(v) for v in array.flat}
      raise refuse(
        "text" if str in types or given != "O" else "null" if type(None) in types
        else "an object" if dict in types else "numbers of that size"
      )  # fmt: skip
    if spec.dtype.is_floating:
      if given not in "iuf":
        raise refuse("true or false")
      with np.errstate(over="ignore"):
        array = array.astype(dtype)
      if not np.isfinite(array.astype(np.float64)).all():
        raise refuse("infinite or too large")
    elif spec.dtype.is_integer:
      if given not in "iu":
        raise refuse("true or false" if given == "b" else "a number with a decimal point")
      low, high = int(array.min()), int(array.max())
      if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        raise refuse(f"{low if low < np.iinfo(dtype).min else high}")
      array = array.astype(dtype)
    elif spec.dtype == tf.bool:
      if given != "b":
        raise refuse("numbers")
    else:
      raise Refused(400, f"input {_quote(name)} is {spec.dtype.name}, which JSON does not hold")
  if not spec.shape.is_compatible_with(array.shape):
    raise refuse(f"of shape {list(array.shape)}")
  return array


def _by_name(signature, value, where):
  """What a client gave for each input: one object, or the bare value of the only input."""
  if isinstance(value, dict) and not (len(signature.inputs) == 1 and set(value) == {"b64"}):
    given = value
  elif len(signature.inputs) == 1:
    given = {next(iter(signature.inputs)): value}
  else:
    raise Refused(400, f"{where} must be an object with {', '.join(map(_quote, signature.inputs))}")
  missing, unknown = signature.inputs.keys() - given.keys(), given.keys() - signature.inputs.keys()
  if missing or unknown:
    odd = f"lacks {_quote(min(missing))}" if missing else f"has an unknown {_quote(min(unknown))}"
    raise Refused(
      400,
      f"{where} {odd}; {signature.name} takes {', '.join(map(_quote, signature.inputs)) or '{}'}",
    )
  return given


def decode(model, body, max_rows):
  """The body of a predict request (bytes) → Request; a Refused names what is wrong with it."""
  content = _parse(body)
  unknown = content.keys() - {"signature_name", "instances", "inputs"}
  if unknown:
    raise Refused(
      400, f'unknown field {_quote(min(unknown))}; give "signature_name", "instances" or "inputs"'
    )
  if ("instances" in content) == ("inputs" in content):
    raise Refused(400, 'give either "instances" (rows) or "inputs" (columns)')
  signature = model.signature(content.get("signature_name"))
  as_rows = "instances" in content
  if as_rows:
    rows = content["instances"]
    if not isinstance(rows, list) or not rows:
      raise Refused(400, '"instances" must be a list of at least one row')
    if not signature.row_wise:
      raise Refused(
        400, f'{signature.name} does not work by rows; give "inputs" in place of "instances"'
      )
    if len(rows) > max_rows:
      raise Refused(400, f"{len(rows)} results of one request; ask for at most {max_rows}")
    parts = [_by_name(signature, row, f"row {k}") for k, row in enumerate(rows)]
    given = {name: [part[name] for part in parts] for name in signature.inputs}
  else:
    given = _by_name(signature, content["inputs"], '"inputs"')
  inputs = {name: _array(name, given[name], spec) for name, spec in signature.inputs.items()}
  counts, amount = {}, 1
  for name, array in inputs.items():
    spec = signature.inputs[name]
    if array.ndim and (spec.shape.rank is None or spec.shape[0] is None):
      counts[name] = array.shape[0]
    elif name in SIZES and not array.ndim:
      if array < 1:
        raise Refused(400, f"{name} is {array}; give 1 to {max_rows}")
      amount *= int(array)
  sizes = sorted(set(counts.values()))
  if len(set(sizes) - {1}) > 1:
    said = ", ".join(f"{_quote(n)} {c}" for n, c in counts.items())
    raise Refused(400, f"the inputs differ in their number of rows: {said}")
  if (amount := amount * max(sizes, default=1)) > max_rows:
    raise Refused(400, f"{amount} results of one request; ask for at most {max_rows}")
  if "seed" in inputs and not inputs["seed"].ndim:  # image k has seed + k, which must not wrap
    seed = int(inputs["seed"])
    if seed + amount - 1 > np.iinfo(inputs["seed"].dtype).max:
      raise Refused(400, f"seed {seed} is too large for {amount} images")
  twin = model.rows_for(signature)
  if twin:
    seed, num = int(inputs["seed"]), int(inputs["num"])
    return Request(twin, {"seeds": seed + np.arange(num)}, num, False, signature.name)
  # A single row beside many is for the model to spread, so such a request has a call of its own.
  rows = sizes[0] if signature.row_wise and len(sizes) == 1 else None
  return Request(signature, inputs, rows, as_rows)


def _values(name, array):
  if array.dtype.kind in "OS":
    in_base64 = name.endswith("_bytes")  # as TensorFlow Serving decides
    one = lambda v: {"b64": base64.b64encode(v).decode()} if in_base64 else v.decode(
      errors="replace"
    )  # fmt: skip
    pack = lambda v: [pack(x) for x in v] if isinstance(v, list) else one(v)
    return pack(array.tolist())
  if array.dtype.kind == "V":  # bfloat16
    array = array.astype(np.float32)
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise Refused(400, f"output {_quote(name)} is not finite for these inputs")
  return array.tolist()


def _dump(value):
  """JSON, row by row: within a single dump no other thread gets its turn."""
  if isinstance(value, list):
    return b"[%s]" % b",".join(_dump_flat(v) for v in value)
  return _dump_flat(value)


def _dump_flat(value):
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def encode(request, outputs):
  """Outputs {name: array} → body of the answer, bytes. Floats are exact when read as doubles."""
  total = sum(array.size for array in outputs.values())
  if total > MOST_VALUES:
    raise Refused(400, f"the answer has {total} numbers; ask for at most {MOST_VALUES}")
  columns = {name: _values(name, array) for name, array in sorted(outputs.items())}
  if request.as_rows and len({len(column) for column in columns.values()}) > 1:
    raise Refused(400, f'{request.signature.name} does not work by rows; give "inputs"')
  if request.as_rows:
    rows = next(iter(columns.values())) if len(columns) == 1 else [
      dict(zip(columns, row)) for row in zip(*columns.values())
    ]  # fmt: skip
    return b'{"predictions":%s}' % _dump(rows)
  if len(columns) == 1:
    return b'{"outputs":%s}' % _dump(next(iter(columns.values())))
  pairs = (b"%s:%s" % (_dump(name), _dump(column)) for name, column in columns.items())
  return b'{"outputs":{%s}}' % b",".join(pairs)


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
          429, f"{self.limit} requests are waiting; try again in {wait} s",
          [(b"retry-after", str(wait).encode())],
        )  # fmt: skip
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
          first.rows and first.signature.row_wise
          and request.rows and rows + request.rows <= self.max_rows
          and request.signature is first.signature
          and all(request.inputs[k].shape[1:] == v.shape[1:] for k, v in first.inputs.items())
        )  # fmt: skip
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


class App:
  """The ASGI application: TensorFlow Serving's REST paths, /healthz, /metrics and the page.

  Args:
    model, batcher: what answers.
    timeout: seconds from a request's last byte to its answer, after which it is given up (504).
    body_timeout: seconds that a client may take to send a body (408).
    max_body: bytes of a body (413).
    hosts: what a request's Host may be, "name:port" or "name" at any port; None: anything. A page
      of another site that has its name point here (DNS rebinding) is refused by it.
    addresses: whether an IP address at any port may be the Host too: no site has one as its name.
  """

  _BODIES = 16  # bodies of full size that may be held at once

  def __init__(self, model, batcher, *, timeout=60.0, body_timeout=10.0, max_body=8 << 20,
               hosts=None, addresses=False):  # fmt: skip
    self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
    self.addresses = addresses
    self.model, self.batcher, self.metrics = model, batcher, batcher.metrics
    self.timeout, self.body_timeout, self.max_body = timeout, body_timeout, max_body
    self._held = 0
    self._codec = concurrent.futures.ThreadPoolExecutor(1, "codec")  # JSON holds the GIL anyway
    folder = importlib.resources.files("soft_diffusion_tf") / "page"
    self._page = {p: ((folder / f).read_bytes(), kind) for p, (f, kind) in _PAGE.items()}
    self._of_model = re.compile(
      r"/v1/models/([^/:]+)(?:/versions/([^/:]+))?(|/metadata|:[A-Za-z]+)"
    )

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return
    begin, what = time.monotonic(), {"signature": ""}
    headers, kind = (), "application/json"
    try:
      status, body, kind, headers = await self._respond(scope, receive, what)
    except Refused as refused:
      status, headers = refused.status, refused.headers
      body = json.dumps({"error": str(refused)}).encode()
    except _Gone:
      status, body = 499, b""
    except asyncio.CancelledError:  # the server stops and waits no longer
      status, body = 503, b'{"error":"the server is stopping"}'
    except Exception:
      _log.exception("%s %s", scope["method"], scope["path"])
      status, body = 500, b'{"error":"the server failed; its log says how"}'
    self.metrics.count("requests_total", code=status, **what)
    if what["signature"]:
      self.metrics.observe(
        "request_seconds", time.monotonic() - begin, Metrics.LATENCIES, **what
      )  # fmt: skip
    if status == 499:
      return
    await send({
      "type": "http.response.start", "status": status,
      "headers": [
        (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"), *headers,
      ],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": body})

  def _check_origin(self, scope):
    """Refuses what a page of another site asks for, by whatever name it found this server."""
    headers, method = dict(scope["headers"]), scope["method"]
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if self.hosts is not None and host and not self._serves(host):
      raise Refused(
        403, f"Host {_quote(host)} is not served here; start the server with --allow_host=NAME if "
        "it should be"
      )  # fmt: skip
    site = headers.get(b"sec-fetch-site")
    if site is None and b"origin" in headers:  # as browsers ask where there is no TLS
      own = headers[b"origin"].rpartition(b"//")[2].lower() == host.encode("latin-1")
      site = b"same-origin" if own else b"cross-site"
    link = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"  # somebody clicked
    if site not in (None, b"same-origin", b"none") and not link:
      raise Refused(403, "a page of another site may not use this server")

  def _serves(self, host):
    name, colon, port = host.rpartition(":")
    if not (colon and port.isdecimal()):
      name = host
    if host in self.hosts or name in self.hosts:
      return True
    try:
      return self.addresses and bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
      return False

  async def _respond(self, scope, receive, what):
    path, method = scope["path"], scope["method"]
    self._check_origin(scope)
    if path in self._page:
      self._allow(method, "GET")
      return 200, *self._page[path], _PAGE_HEADERS
    if path == "/healthz":
      self._allow(method, "GET")
      good = self.batcher.alive
      return _json({"status": "ok" if good else "failed"}, 200 if good else 503)
    if path == "/metrics":
      self._allow(method, "GET")
      gauges = {"queue_requests": self.batcher.waiting, "queue_limit": self.batcher.limit,
                "body_bytes_held": self._held}  # fmt: skip
      return 200, self.metrics.text(gauges).encode(), "text/plain; version=0.0.4", ()
    if path in self.model.files:
      self._allow(method, "GET")
      try:
        content = self.model.files[path].read_bytes()
      except OSError:
        raise Refused(404, f"this model has no {path[1:]}") from None
      return 200, content, ("application/json" if path.endswith("json") else _TEXT), ()
    if path == "/v1/models":
      self._allow(method, "GET")
      return _json({"models": [{"name": self.model.name, "version": self.model.version}]})
    match = self._of_model.fullmatch(path)
    if not match:
      raise Refused(404, f"nothing is at {_quote(path)}")
    name, version, verb = match.groups()
    if name != self.model.name or version not in (None, self.model.version):
      raise Refused(
        404, f"no model {_quote(name)}{f' of version {_quote(version)}' if version else ''}; "
        f"this is {self.model.name}, version {self.model.version}"
      )  # fmt: skip
    if verb == ":predict":
      self._allow(method, "POST")
      return await self._predict(scope, receive, what)
    if verb.startswith(":"):
      raise Refused(400, f"no verb {_quote(verb[1:])}; this server knows :predict")
    self._allow(method, "GET")
    return _json(self.model.metadata() if verb else self.model.status())

  def _allow(self, method, allowed):
    if method != allowed and (method, allowed) != ("HEAD", "GET"):
      raise Refused(405, f"this path takes {allowed}", [(b"allow", allowed.encode())])

  async def _predict(self, scope, receive, what):
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity") != b"identity":
      raise Refused(415, "send the body without a content-encoding")
    loop = asyncio.get_running_loop()
    body = await self._read(headers, receive)
    try:
      request = await loop.run_in_executor(
        self._codec, decode, self.model, body, self.batcher.max_rows
      )
    finally:
      self._held -= len(body)
    what["signature"] = request.name or request.signature.name
    outputs = await self._outputs(request, receive)
    return 200, await loop.run_in_executor(self._codec, encode, request, outputs), *_JSON

  async def _read(self, headers, receive):
    """The body of a request. The caller subtracts its length from _held."""
    too_large = Refused(413, f"the body is larger than {self.max_body} bytes")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18 or int(length) > self.max_body:
      raise too_large
    body, more = bytearray(), True
    try:
      async with asyncio.timeout(self.body_timeout):
        while more:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise _Gone
          body += message["body"]
          self._held += len(message["body"])
          more = message.get("more_body", False)
          if len(body) > self.max_body:
            raise too_large
          if self._held > self._BODIES * self.max_body:
            raise Refused(429, "too many bodies at once; try again", [(b"retry-after", b"1")])
    except BaseException as error:
      self._held -= len(body)
      if isinstance(error, TimeoutError):
        raise Refused(
          408, f"the body took longer than {self.body_timeout:g} s", [(b"connection", b"close")]
        ) from None
      raise
    return bytes(body)

  async def _outputs(self, request, receive):
    """What the model answers; gives up, and leaves the queue, when time is over or nobody waits."""
    future = self.batcher.submit(request)
    answer = asyncio.wrap_future(future)
    left = asyncio.ensure_future(_until_gone(receive))
    try:
      await asyncio.wait({answer, left}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
      if answer.done():
        return answer.result()
      if left.done():
        raise _Gone
      raise Refused(504, f"no answer within {self.timeout:g} s")
    except (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError,
            tf.errors.FailedPreconditionError) as error:  # fmt: skip
      raise Refused(400, f"the model refuses these inputs: {_cause(error)}") from None
    except tf.errors.ResourceExhaustedError:
      raise Refused(503, "out of memory; ask for less at once", [(b"retry-after", b"5")]) from None
    finally:
      left.cancel()
      future.cancel()  # at once; by way of `answer` it would wait for the loop's next turn
      answer.cancel()


def _cause(error):
  """What a check in the graph says, without TensorFlow's list of nodes."""
  _, found, text = " ".join(str(error.message).split()).partition("assertion failed: [")
  if found:
    # "[the message] [a value] [Condition …] …", each in brackets, and then nodes or further errors.
    text = re.split(r"\](?: \[\[| \(\d+\) | \d+ successful| Detected at|$)", text)[0]
    said, *more = text.split("] [")
    condition = next((k for k, part in enumerate(more) if part.startswith("Condition ")), len(more))
    return " ".join([said, *more[:condition]])[:200]
  lines = [x.strip() for x in str(error.message).splitlines()]
  lines = [
    x for x in lines if x and not x.startswith(("Graph execution", "Detected at", "[[", "("))
  ]
  return re.sub(r"\[\[.*$", "", lines[-1] if lines else "").strip()[:200]


async def _until_gone(receive):
  while (await receive())["type"] != "http.disconnect":
    pass


_JSON = ("application/json", ())
_TEXT = "text/plain; charset=utf-8"


def _json(content, status=200):
  return status, json.dumps(content).encode(), *_JSON


def _guarded(seconds):
  """uvicorn's protocol, which by itself waits for ever for a request's head and for a slow reader.

  A connection that has stood still for `seconds`, in the middle of a head or with bytes that the
  client does not fetch, is cut; so is one that goes on sending a body that was refused. Where there
  is no room, a connection that waits for its client is cut, of the client that has most of them: no
  client can keep the others out.
  """
  import h11
  from uvicorn.protocols.http.h11_impl import H11Protocol

  class Guarded(H11Protocol):
    _stuck = _timer = None

    def connection_made(self, transport):
      super().connection_made(transport)
      # A small buffer in the kernel, so that ours falls for a client that reads, if slowly.
      transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
      self._timer = self.loop.call_later(seconds, self._look)
      self._begin = self.loop.time()
      there = [c for c in self.connections if not c.transport.is_closing()]
      if self.limit_concurrency is not None and len(there) >= self.limit_concurrency:
        self._make_room(there)

    def _make_room(self, there):
      address = lambda c: c.client[0] if c.client else ""
      held = collections.Counter(map(address, there))
      waits = lambda c: c.cycle is None or c.cycle.response_complete
      idle = lambda c: waits(c) and not c.transport.get_write_buffer_size()
      free = [c for c in there if c is not self
              and (waits(c) or c.conn.their_state is h11.SEND_BODY)]  # fmt: skip
      if free:
        max(free, key=lambda c: (held[address(c)], idle(c), -c._begin)).transport.abort()

    def connection_lost(self, exc):
      self._timer.cancel()
      super().connection_lost(exc)

    def _look(self):
      begun = self.cycle is None or bool(self.conn.trailing_data[0])
      head = self.conn.their_state is h11.IDLE and begun
      refused = self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete
      unsent = self.transport.get_write_buffer_size()
      stuck = (self.cycle, head, refused, unsent) if head or refused or unsent else None
      if stuck and stuck == self._stuck:
        self.transport.abort()
        return
      self._stuck = stuck
      self._timer = self.loop.call_later(seconds, self._look)

  return Guarded


def uvicorn_module():
  """uvicorn, which comes with an extra; a ValueError says how to install it."""
  try:
    import uvicorn
  except ImportError:
    raise ValueError(
      "serving needs uvicorn; install it by: pip install 'soft-diffusion-tf[serve]'"
    ) from None
  return uvicorn


def make_server(app, *, connections=512, slow_client=10.0, grace=None):
  """A uvicorn.Server, to be run with sockets=[…]. On SIGTERM it answers what it took, then ends.

  Args:
    app: an ASGI application.
    connections: above so many, those that wait for their client are cut, of the client that has
      most; where there are none of these, requests are answered 503.
    slow_client: seconds (up to twice that) after which a client that stands still is cut.
    grace: seconds that the stop may take; requests that are left then are answered 503.

  Raises:
    ValueError: uvicorn is missing.
  """
  uvicorn = uvicorn_module()
  return uvicorn.Server(
    uvicorn.Config(
      app, http=_guarded(slow_client), ws="none", loop="asyncio", lifespan="off",
      log_config=None, access_log=False, server_header=False, proxy_headers=False,
      limit_concurrency=connections, timeout_keep_alive=math.ceil(slow_client),
      timeout_graceful_shutdown=grace, h11_max_incomplete_event_size=16 << 10,
    )
  )  # fmt: skip
