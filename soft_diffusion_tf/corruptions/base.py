"""What a corruption is: an operator for every level, its adjoint, matrix and singular values."""

import abc
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts, products


class Svd(NamedTuple):
  """C = U diag(values) Vᵀ: maps between images [B, H, W, C] and coefficients of the same shape."""

  to_left: Callable  # x → Uᵀx
  from_left: Callable  # c → U c
  to_right: Callable  # x → Vᵀx
  from_right: Callable  # c → V c
  values: tf.Tensor  # broadcasts against [B, H, W, C]; not negative


class Spectrum(NamedTuple):
  """C = Vᵀ diag(gains) V with a V that is the same at every level, and orthogonal."""

  to: Callable  # x → V x, coefficients of the same shape
  back: Callable  # c → Vᵀ c
  gains: Callable  # level [] or [B] → what broadcasts against [B, H, W, C]; not negative


def as_channels(images):
  """[N, H, W, C] → [1, H, W, N·C]: small images make small products, channels make large ones."""
  return np.ascontiguousarray(np.moveaxis(images, 0, 2).reshape(1, *images.shape[1:3], -1))


def verified(corruption, svd, level, image_shape):
  """The decomposition, after a look at it on random images where there are numbers to look at.

  Raises:
    ValueError: UᵀU or VᵀV is not I, or U S Vᵀ is not C.
  """
  if not tf.executing_eagerly():
    return svd
  x = np.random.default_rng(0).standard_normal([2, *image_shape]).astype(np.float32)
  pairs = {
    "UᵀU is not I": (svd.to_left(svd.from_left(x)), x),
    "VᵀV is not I": (svd.to_right(svd.from_right(x)), x),
    "U S Vᵀ is not C": (svd.from_left(svd.values * svd.to_right(x)), corruption(x, level)),
  }
  for what, (got, want) in pairs.items():
    error = float(np.max(np.abs(got - want)))
    if not error <= 1e-4 * max(1.0, float(np.max(np.abs(want)))):  # NaN as well
      raise ValueError(
        f"{type(corruption).__name__} at level {float(level):g} on {tuple(image_shape)}: its "
        f"singular values are wrong, {what} (off by {error:.2g}); see check_corruption"
      )
  return svd


class Corruption(parts.Part, abc.ABC, role="corruption"):
  """A linear operator for every level, the identity at the first end of `level_range`.

  A class that says `linear = False` may be another function of images. It is trained by the error
  after the corruption, C(x̂_0) − C(x_0), and sampled; it has no matrix, adjoint or singular values.
  """

  level_range = (0.0, math.inf)  # from the identity to the strongest corruption
  linear: ClassVar[bool] = True

  @abc.abstractmethod
  def apply(self, x, level):
    """C x, with x float32 [B, H, W, C] and level float32 [B or 1, 1, 1, 1]."""

  def __call__(self, x, level):
    """C x in float32, whatever the dtype policy: [B, H, W, C], [] or [B] → [B, H, W, C]."""
    return self.apply(*self._prepare(x, level))

  def _check_linear(self, what):
    if not self.linear:
      raise ValueError(
        f"{type(self).__name__} has linear = False, so it has no {what}: exact denoisers and "
        "restoration that explains y need a linear corruption"
      )

  def check_images(self, image_shape, levels):
    """Raises the ValueError of a C that changes the size of images, or is not linear unsaid.

    Args:
      image_shape: (H, W, C).
      levels: where to try it.
    """
    x, y = np.random.default_rng(0).random([2, *image_shape], np.float32)
    images = np.stack([x, y, 2.0 * x - 3.0 * y])
    name = type(self).__name__
    for level in levels:
      c = np.asarray(self(images, level))
      if c.shape != images.shape:
        raise ValueError(
          f"{name} at level {level:g} turns images of {tuple(image_shape)} into "
          f"{c.shape[1:]}; C must keep their shape: scale its result up again"
        )
      error, scale = np.max(np.abs(c[2] - (2.0 * c[0] - 3.0 * c[1]))), max(1.0, np.max(np.abs(c)))
      if self.linear and error > 1e-3 * scale:
        raise ValueError(
          f"{name} at level {level:g} is not linear: C(2x − 3y) is off by {error:.2g} from 2Cx − "
          "3Cy; give its class linear = False, or correct it"
        )

  def adjoint(self, y, level):
    """Cᵀ y. The default transposes `apply` by reverse-mode differentiation."""
    self._check_linear("adjoint")
    y, level = self._prepare(y, level)
    with tf.GradientTape() as tape:
      x = tf.zeros_like(y)
      tape.watch(x)
      c_x = self.apply(x, level)
    return tape.gradient(c_x, x, output_gradients=y)

  def mixes_channels(self, image_shape) -> bool:
    """Whether C does anything but the same to every channel; tried, since users' classes may."""
    x = np.random.default_rng(0).random([2, *image_shape], np.float32)
    first, last = self.level_range
    level = 0.5 * (first + last) if math.isfinite(last) else first + 1.0
    with tf.init_scope():
      try:
        apart = np.asarray(self(as_channels(x), level))
      except Exception:  # whatever a user's class raises for an unusual number of channels
        return True
      return not np.allclose(apart, as_channels(np.asarray(self(x, level))), atol=1e-5)

  def operator(self, level, image_shape) -> tf.linalg.LinearOperator:
    """C at one level as a matrix on the H·W pixels of a channel.

    One that mixes channels has a matrix on all H·W·C numbers instead (channels last).
    """
    self._check_linear("matrix")
    h, w = image_shape[:2]
    if self.mixes_channels(image_shape):
      size = math.prod(image_shape)
      columns = self(tf.reshape(tf.eye(size), [size, *image_shape]), level)
      return tf.linalg.LinearOperatorFullMatrix(tf.transpose(tf.reshape(columns, [size, size])))
    basis = tf.reshape(tf.eye(h * w), [h * w, h, w, 1])
    columns = tf.reshape(self(basis, level), [h * w, h * w])
    return tf.linalg.LinearOperatorFullMatrix(tf.transpose(columns))

  def spectrum(self, image_shape) -> Spectrum | None:
    """C in a basis of its own that is the same at every level, where it has one; else None."""
    return None

  def svd(self, level, image_shape) -> Svd:
    """Singular value decomposition at one level, that of `spectrum` where there is one.

    Else it is dense, O((H·W)³), in float64. It holds for operators of any rank, and is verified
    wherever it is called eagerly.

    Raises:
      ValueError: the operator mixes channels, so that it is not one on the pixels of each.
    """
    h, w = image_shape[:2]
    if own := self.spectrum(image_shape):
      values = tf.broadcast_to(own.gains(level), [1, h, w, 1])[0]
      return verified(self, Svd(own.to, own.back, own.to, own.back, values), level, image_shape)
    operator = self.operator(level, image_shape)
    if int(operator.domain_dimension) != h * w:
      raise ValueError(
        f"{type(self).__name__} mixes channels; only an operator that acts on each alike has the "
        "singular values that are asked for here"
      )
    s, u, v = (tf.cast(m, tf.float32) for m in products.svd(products.dense(operator)))

    def multiply(matrix, transpose):
      def function(x):
        flat = tf.reshape(x, [-1, h * w, tf.shape(x)[-1]])
        return tf.reshape(products.matmul(matrix, flat, transpose_a=transpose), tf.shape(x))

      return function

    parts = Svd(
      multiply(u, True),
      multiply(u, False),
      multiply(v, True),
      multiply(v, False),
      tf.reshape(s, [h, w, 1]),
    )
    return verified(self, parts, level, image_shape)

  def _prepare(self, x, level):
    x = tf.cast(x, tf.float32)
    if x.shape.rank != 4:
      raise ValueError(f"images must be [B, H, W, C], got shape {x.shape}; add the missing axes")
    level = tf.cast(level, tf.float32)
    if level.shape.rank not in (0, 1):
      raise ValueError(f"a level is one number or one per image, got shape {level.shape}")
    if tf.executing_eagerly():
      low, high = sorted(self.level_range)
      worst = level.numpy().ravel()
      worst = worst[~((worst >= low) & (worst <= high))]
      if worst.size:
        raise ValueError(
          f"level {worst[0]:g} is outside [{low:g}, {high:g}], the range of {type(self).__name__}"
        )
    return x, tf.reshape(level, [-1, 1, 1, 1])


def from_config(config, trust_code=False) -> Corruption:
  """The corruption that `get_config` described; see `parts.make`."""
  return parts.make(Corruption, config, trust_code=trust_code)
