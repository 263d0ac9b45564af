"""Corruptions made of others, and a user's own: compositions and families of matrices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts, products, schedules, trust
from soft_diffusion_tf.corruptions.base import Corruption
from soft_diffusion_tf.corruptions.operators import Scale


@dataclasses.dataclass(frozen=True)
class Compose(Corruption):
  """outer ∘ inner: the image goes through `inner` first.

  The level runs from 0 to 1; `inner_level` and `outer_level` are schedules that turn it into the
  level of each part (a pair of numbers means a straight line).
  """

  inner: Corruption
  outer: Corruption
  inner_level: schedules.Schedule | tuple[float, float] = (0.0, 1.0)
  outer_level: schedules.Schedule | tuple[float, float] = (0.0, 1.0)

  level_range = (0.0, 1.0)

  def __post_init__(self):
    super().__post_init__()
    for name in ("inner_level", "outer_level"):
      if isinstance(value := getattr(self, name), tuple):
        object.__setattr__(self, name, schedules.Linear(*value))
    for part, schedule in ((self.inner, self.inner_level), (self.outer, self.outer_level)):
      low, high = map(np.float32, sorted(part.level_range))  # a schedule's ends are float32
      ends = schedules.ends(schedule)
      if not all(low <= end <= high for end in ends):
        raise ValueError(
          f"the levels of {type(part).__name__} run from {ends[0]:g} to {ends[1]:g}, outside "
          f"[{low:g}, {high:g}]; correct its schedule in Compose"
        )

  @property
  def linear(self):
    return self.inner.linear and self.outer.linear

  def apply(self, x, level):
    return self.outer.apply(self.inner.apply(x, self.inner_level(level)), self.outer_level(level))

  def adjoint(self, y, level):
    self._check_linear("adjoint")
    y, level = self._prepare(y, level)
    flat = tf.reshape(level, [-1])
    return self.inner.adjoint(self.outer.adjoint(y, self.outer_level(flat)), self.inner_level(flat))

  def spectrum(self, image_shape):
    """That of `inner` where `outer` is a `Scale`."""
    own = self.inner.spectrum(image_shape)
    if own is None or not isinstance(self.outer, Scale):
      return None

    def gains(level):
      level = tf.reshape(tf.cast(level, tf.float32), [-1])
      return own.gains(self.inner_level(level)) * tf.reshape(self.outer_level(level), [-1, 1, 1, 1])

    return own._replace(gains=gains)


@dataclasses.dataclass(frozen=True)
class Family(Corruption):
  """A user's family of operators.

  Attributes:
    family: function of one scalar level that gives a `tf.linalg.LinearOperator` (or a matrix),
      on H·W (applied to each channel) or on H·W·C (pixels in row-major order, channels last).
      As a string "module:function" it also travels in configs.
    low, high: the levels of the identity and of the strongest corruption.
  """

  family: Callable | str
  low: Annotated[float, parts.Range(-math.inf, math.inf)] = 0.0
  high: Annotated[float, parts.Range(-math.inf, math.inf)] = 1.0

  @property
  def level_range(self):
    return (self.low, self.high)

  def _operator(self, level):
    function = trust.find(self.family) if isinstance(self.family, str) else self.family
    result = function(level)
    if isinstance(result, tf.linalg.LinearOperator):
      return result
    return tf.linalg.LinearOperatorFullMatrix(tf.cast(result, tf.float32))

  def _each(self, x, level, adjoint):
    shape = x.shape[1:]
    pixels = shape[0] * shape[1]

    def one(operator, batch):
      size = int(operator.domain_dimension)
      if size not in (pixels, pixels * shape[2]):
        raise ValueError(
          f"the operator acts on {size} numbers, but an image of {tuple(shape)} has {pixels} "
          f"pixels and {pixels * shape[2]} numbers"
        )
      flat = tf.reshape(batch, [-1, size, shape[2] if size == pixels else 1])
      return tf.reshape(products.operate(operator, flat, adjoint), [-1, *shape])

    level = tf.reshape(level, [-1])
    if level.shape[0] == 1:
      return one(self._operator(level[0]), x)
    level = tf.broadcast_to(level, [tf.shape(x)[0]])
    return tf.map_fn(
      lambda pair: one(self._operator(pair[1]), pair[0][tf.newaxis])[0],
      (x, level),
      fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )

  def apply(self, x, level):
    return self._each(x, level, adjoint=False)

  def adjoint(self, y, level):
    return self._each(*self._prepare(y, level), adjoint=True)

  def operator(self, level, image_shape):
    return self._operator(tf.cast(level, tf.float32))

  def get_config(self):
    if not isinstance(self.family, str):
      function = self.family
      name = f"{function.__module__}:{function.__qualname__}"
      parts.check_importable({"family": name})
      return {"kind": "Family", "family": name, "low": self.low, "high": self.high}
    return super().get_config()

  @classmethod
  def from_config(cls, config):
    """The family that `get_config` described; its function is imported at once, by consent."""
    family = config.get("family")
    if isinstance(family, str) and not callable(trust.load(family)):
      raise ValueError(f"{family} is not a function of the level; name one")
    return super().from_config(config)


class Matrix(Family):
  """A user's matrix A as a family: C = (1 − level) I + level A, from the identity to A."""

  def __init__(self, matrix):
    matrix = np.asarray(matrix, np.float32)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
      raise ValueError(f"the matrix must be square, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
      raise ValueError("the matrix holds NaN or infinite numbers")
    object.__setattr__(self, "matrix", matrix)
    super().__init__(self._blend)

  def _blend(self, level):
    eye = np.eye(len(self.matrix), dtype=np.float32)
    return (1.0 - level) * eye + level * self.matrix

  def __eq__(self, other):
    return isinstance(other, Matrix) and np.array_equal(self.matrix, other.matrix)

  def __hash__(self):
    return hash(self.matrix.tobytes())

  def get_config(self):
    return {"kind": "Matrix", "matrix": self.matrix.tolist()}
