"""Requests and answers as JSON."""

import base64
import json

import numpy as np
import tensorflow as tf

from soft_diffusion_tf.serving.model import SIZES, Refused, Request, quote

MOST_VALUES = 4 << 20  # numbers of one answer; about 80 MB of JSON


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
  refuse = lambda what: Refused(400, f"input {quote(name)} must be {want}, not {what}")
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
        "text"
        if str in types or given != "O"
        else "null"
        if type(None) in types
        else "an object"
        if dict in types
        else "numbers of that size"
      )
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
      raise Refused(400, f"input {quote(name)} is {spec.dtype.name}, which JSON does not hold")
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
    raise Refused(400, f"{where} must be an object with {', '.join(map(quote, signature.inputs))}")
  missing, unknown = signature.inputs.keys() - given.keys(), given.keys() - signature.inputs.keys()
  if missing or unknown:
    odd = f"lacks {quote(min(missing))}" if missing else f"has an unknown {quote(min(unknown))}"
    raise Refused(
      400,
      f"{where} {odd}; {signature.name} takes {', '.join(map(quote, signature.inputs)) or '{}'}",
    )
  return given


def decode(model, body, max_rows):
  """The body of a predict request (bytes) → Request; a Refused names what is wrong with it."""
  content = _parse(body)
  unknown = content.keys() - {"signature_name", "instances", "inputs"}
  if unknown:
    raise Refused(
      400, f'unknown field {quote(min(unknown))}; give "signature_name", "instances" or "inputs"'
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
    said = ", ".join(f"{quote(n)} {c}" for n, c in counts.items())
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
    one = lambda v: (
      {"b64": base64.b64encode(v).decode()} if in_base64 else v.decode(errors="replace")
    )
    pack = lambda v: [pack(x) for x in v] if isinstance(v, list) else one(v)
    return pack(array.tolist())
  if array.dtype.kind == "V":  # bfloat16
    array = array.astype(np.float32)
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise Refused(400, f"output {quote(name)} is not finite for these inputs")
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
    rows = (
      next(iter(columns.values()))
      if len(columns) == 1
      else [dict(zip(columns, row)) for row in zip(*columns.values())]
    )
    return b'{"predictions":%s}' % _dump(rows)
  if len(columns) == 1:
    return b'{"outputs":%s}' % _dump(next(iter(columns.values())))
  pairs = (b"%s:%s" % (_dump(name), _dump(column)) for name, column in columns.items())
  return b'{"outputs":{%s}}' % b",".join(pairs)
