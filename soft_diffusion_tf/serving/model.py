"""A SavedModel that answers requests: its signatures and their inputs."""

import dataclasses
import json
import logging
import pathlib
import re

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2

SIZES = ("num",)  # scalar inputs that say how much is to be computed
_SIGNATURE = "serving_default"
_ECHO = 40  # characters of a client's text that an error may repeat
_log = logging.getLogger(__name__)


class Refused(Exception):
  """A request that is not answered: HTTP status and one line that says why."""

  def __init__(self, status, message, headers=()):
    super().__init__(message)
    self.status = status
    self.headers = tuple(headers)


def quote(value):
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
    self.outputs = {
      k: tf.TensorSpec(v.shape, v.dtype) for k, v in function.structured_outputs.items()
    }
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
      k: np.ones([], v.dtype.as_numpy_dtype)
      if k in SIZES and v.shape.rank == 0
      else np.full(shape(v), b"")
      if v.dtype == tf.string
      else np.zeros(shape(v), v.dtype.as_numpy_dtype)
      for k, v in self.inputs.items()
    }


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
      kind == "sample"
      and twin
      and twin.row_wise
      and set(signature.inputs) == {"num", "seed"}
      and list(twin.inputs) == ["seeds"]
      and set(twin.outputs) == set(signature.outputs)
    )
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
        400, f'no signature {quote(name)}; give "signature_name": {", ".join(self.signatures)}'
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
