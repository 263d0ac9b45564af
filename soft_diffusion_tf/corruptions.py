"""Corruptions C: families of linear operators on images, indexed by a level (P Eq. 4, App. G).

Images are float32 [B, H, W, C] in [0, 1]; a level is a number, the same for the batch ([]) or one
per image ([B]). A new corruption is a frozen dataclass with one method:

    @dataclasses.dataclass(frozen=True)
    class Fade(Corruption):
      level_range = (0.0, 1.0)

      def apply(self, x, level):
        return (1.0 - level) * x

`check_corruption(Fade())` says whether it keeps what the theory asks of it. Everything else
(adjoint, matrix, singular values) follows from `apply` and is overridden only to be faster.
"""

import abc
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import faults, parts, products, schedules, trust

__all__ = [
  "BlockAverage",
  "Compose",
  "Family",
  "Gamma",
  "GaussianBlur",
  "HeatDissipation",
  "Identity",
  "Mask",
  "Matrix",
  "Scale",
]


_MOST_HALF_SIZE = 1 << 16  # of a blur, in pixels: its kernel is made whole


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


def _verified(corruption, svd, level, image_shape):
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
      raise ValueError(f"{type(self).__name__} is not linear and has no {what}; take another route")

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
          f"{name} at level {level:g} makes images of {c.shape[1:]} of those of "
          f"{tuple(image_shape)}; C must keep their shape: scale its result up again"
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
      return _verified(self, Svd(own.to, own.back, own.to, own.back, values), level, image_shape)
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
      multiply(u, True), multiply(u, False), multiply(v, True), multiply(v, False),
      tf.reshape(s, [h, w, 1]),
    )  # fmt: skip
    return _verified(self, parts, level, image_shape)

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


class _Separable(Corruption):
  """C x = A x Bᵀ with a matrix for the rows and one for the columns."""

  @abc.abstractmethod
  def matrices(self, level, h, w):
    """A [B or 1, H, H] and B [B or 1, W, W] for levels [B or 1]."""

  def _both(self, x, level):
    return self.matrices(tf.reshape(level, [-1]), x.shape[1], x.shape[2])

  def apply(self, x, level):
    a, b = self._both(x, level)
    return products.two_sided(a, x, b)

  def adjoint(self, y, level):
    y, level = self._prepare(y, level)
    a, b = self._both(y, level)
    return products.two_sided(tf.linalg.matrix_transpose(a), y, tf.linalg.matrix_transpose(b))

  def operator(self, level, image_shape):
    level = tf.reshape(tf.cast(level, tf.float32), [1])
    a, b = self.matrices(level, *image_shape[:2])
    full = tf.linalg.LinearOperatorFullMatrix
    return tf.linalg.LinearOperatorKronecker([full(a[0]), full(b[0])])

  def svd(self, level, image_shape):
    flat = tf.reshape(tf.cast(level, tf.float32), [1])
    (s_a, u_a, v_a), (s_b, u_b, v_b) = (
      [tf.cast(part, tf.float32) for part in products.svd(m)]
      for m in self.matrices(flat, *image_shape[:2])
    )
    t = tf.linalg.matrix_transpose
    parts = Svd(
      lambda x: products.two_sided(t(u_a), x, t(u_b)),
      lambda c: products.two_sided(u_a, c, u_b),
      lambda x: products.two_sided(t(v_a), x, t(v_b)),
      lambda c: products.two_sided(v_a, c, v_b),
      (s_a[0, :, None] * s_b[0, None, :])[..., None],
    )
    return _verified(self, parts, level, image_shape)


class _Diagonal(Corruption):
  """C x = g ⊙ x with one gain per pixel."""

  @abc.abstractmethod
  def gains(self, level, h, w):
    """g ≥ 0, broadcastable to [B, H, W, 1], for levels [B or 1, 1, 1, 1]."""

  def apply(self, x, level):
    return self.gains(level, x.shape[1], x.shape[2]) * x

  def adjoint(self, y, level):
    return self(y, level)

  def spectrum(self, image_shape):
    h, w = image_shape[:2]

    def gains(level):
      return self.gains(tf.reshape(tf.cast(level, tf.float32), [-1, 1, 1, 1]), h, w)

    return Spectrum(tf.identity, tf.identity, gains)

  def operator(self, level, image_shape):
    h, w = image_shape[:2]
    gains = tf.broadcast_to(self.spectrum(image_shape).gains(level), [1, h, w, 1])
    return tf.linalg.LinearOperatorDiag(tf.reshape(gains, [-1]))


# --- The corruptions of the paper ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GaussianBlur(_Separable):
  """Zero-padded Gaussian blur (P App. G); the level is the kernel's standard deviation in pixels.

  P convolves with exp(−(x²+y²)/2s²), truncated to a square of 2·half_size + 1 pixels and divided
  by its sum. That kernel is the product of two equal 1-D kernels, so with zero padding the blur is
  exactly T x Tᵀ with T the symmetric Toeplitz matrix of the 1-D kernel: two small matrix products.

  Attributes:
    half_size: 32 for CIFAR-10, 80 for CelebA-64 (P App. D).
  """

  half_size: Annotated[int, parts.Range(0, _MOST_HALF_SIZE)] = 32

  def _toeplitz(self, level, n):
    # Below a thousandth of a pixel every tap but the middle one is 0 in float32 already.
    s = tf.maximum(level, 1e-3)[:, tf.newaxis]
    taps = tf.range(-self.half_size, self.half_size + 1, dtype=tf.float32)
    total = tf.reduce_sum(tf.exp(-0.5 * (taps / s) ** 2), axis=1)
    offset = np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])
    kernel = tf.exp(-0.5 * (tf.constant(offset, tf.float32) / s[..., tf.newaxis]) ** 2)
    kernel *= tf.constant(offset <= self.half_size, tf.float32)
    return kernel / total[:, tf.newaxis, tf.newaxis]

  def matrices(self, level, h, w):
    a = self._toeplitz(level, h)
    return a, a if w == h else self._toeplitz(level, w)


@dataclasses.dataclass(frozen=True)
class HeatDissipation(Corruption):
  """The heat equation with reflecting borders (Rissanen et al. 2022); the level is the standard
  deviation in pixels of the Gaussian blur that it equals away from the borders.

  Cosines are its eigenvectors: C = Vᵀ exp(−½ level² λ) V, V the orthonormal DCT-II and
  λ = π² (n²/H² + m²/W²). No light leaves the image, so a constant image stays as it is at every
  level, where `GaussianBlur` darkens its borders. Blurs of levels a and b in a row are one of
  √(a² + b²), without a floor.

  Attributes:
    floor: the share of every frequency that stays: C = Vᵀ ((1 − floor) exp(…) + floor) V. Above 0
      no frequency is lost, and C has an inverse (Hoogeboom and Salimans 2022, with 0.001).
  """

  floor: parts.Share = 0.0

  def _cosines(self, n):
    k = np.arange(n)
    rows = np.cos(np.pi * np.outer(k, k + 0.5) / n) * np.sqrt(np.where(k == 0, 1, 2) / n)[:, None]
    return tf.constant(rows, tf.float32)

  def _gains(self, level, n):
    frequencies = tf.constant(np.pi * np.arange(n) / n, tf.float32)
    return tf.exp(-0.5 * (level[:, tf.newaxis] * frequencies) ** 2)

  def _matrix(self, level, n):
    v = self._cosines(n)
    return products.matmul(v * self._gains(level, n)[..., tf.newaxis], v, transpose_a=True)

  def apply(self, x, level):
    level = tf.reshape(level, [-1])
    blurred = products.two_sided(
      self._matrix(level, x.shape[1]), x, self._matrix(level, x.shape[2])
    )
    return (1.0 - self.floor) * blurred + self.floor * x if self.floor else blurred

  def adjoint(self, y, level):
    return self(y, level)

  def spectrum(self, image_shape):
    h, w = image_shape[:2]
    v_h, v_w = self._cosines(h), self._cosines(w)

    def gains(level):
      level = tf.reshape(tf.cast(level, tf.float32), [-1])
      both = self._gains(level, h)[:, :, tf.newaxis] * self._gains(level, w)[:, tf.newaxis]
      return (1.0 - self.floor) * both[..., tf.newaxis] + self.floor

    return Spectrum(
      lambda x: products.two_sided(v_h, x, v_w),
      lambda c: products.two_sided(tf.transpose(v_h), c, tf.transpose(v_w)),
      gains,
    )


@dataclasses.dataclass(frozen=True)
class Mask(_Diagonal):
  """Centred mask (P App. G); the level is the hidden share of the pixels, from 0 to 1.

  Rings of pixels (max-norm distance from the centre, scaled to the image's sides) disappear one
  after the other, a ring when the level passes the middle of the share that it covers.

  Attributes:
    hidden: "centre" (a growing hole) or "border" (a shrinking window). P says "centered" and its
      text speaks of a growing observed window in the reverse process: "border".
    edge: width of a soft edge as a share of the pixels; 0 is P's binary mask.
  """

  hidden: Annotated[str, parts.Choice(("border", "centre"))] = "border"
  edge: Annotated[float, parts.Range(0, 1)] = 0.0

  level_range = (0.0, 1.0)

  def gains(self, level, h, w):
    y = np.abs(2 * np.arange(h) + 1 - h)[:, None] * w  # integers, so that ties are exact
    x = np.abs(2 * np.arange(w) + 1 - w)[None, :] * h
    radius = np.maximum(y, x).ravel()
    if self.hidden == "border":
      radius = -radius
    _, ring, pixels = np.unique(radius, return_inverse=True, return_counts=True)
    middle = (np.cumsum(pixels) - pixels / 2) / (h * w)  # of the share that each ring covers
    order = tf.constant(middle[ring].reshape(1, h, w, 1), tf.float32)  # in (0, 1)
    if self.edge == 0:
      return tf.cast(order >= level, tf.float32)
    front = level * (1.0 + self.edge) - self.edge
    return tf.clip_by_value((order - front) / self.edge, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Identity(_Diagonal):
  """C = I at every level: the VE process of Song et al. 2021."""

  def gains(self, level, h, w):
    return tf.ones_like(level)


@dataclasses.dataclass(frozen=True)
class Scale(_Diagonal):
  """C = level · I: the VP and sub-VP processes; the level is α, from 1 down to 0."""

  level_range = (1.0, 0.0)

  def gains(self, level, h, w):
    return level


@dataclasses.dataclass(frozen=True)
class BlockAverage(Corruption):
  """Downsampling: each block of 2^level × 2^level pixels holds its average.

  At whole levels C is the orthogonal projection on block-wise constant images (blocks start at
  the top left; those cut by the border average what they hold). Levels between blend the two
  neighbours linearly, so C changes continuously, stays symmetric and positive semi-definite, and
  all levels commute since the blocks are nested.
  """

  def _stage(self, stage, n):
    """Averaging matrices [·, n, n] for whole stages [·]; blocks of 2^stage pixels."""
    last = max(1, math.ceil(math.log2(n)))
    block = np.arange(n)[None, :] >> np.arange(last + 1)[:, None]
    same = (block[:, :, None] == block[:, None, :]).astype(np.float32)
    average = tf.constant(same / same.sum(axis=2, keepdims=True))
    return tf.gather(average, tf.cast(tf.minimum(stage, float(last)), tf.int32))

  def apply(self, x, level):
    h, w = x.shape[1:3]
    level = tf.reshape(level, [-1])
    below = tf.floor(level)
    weight = (level - below)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    fine = products.two_sided(self._stage(below, h), x, self._stage(below, w))
    coarse = products.two_sided(self._stage(below + 1, h), x, self._stage(below + 1, w))
    return (1.0 - weight) * fine + weight * coarse

  def adjoint(self, y, level):
    return self(y, level)


@dataclasses.dataclass(frozen=True)
class Gamma(Corruption):
  """Contrast that is lost in the shadows: C x = sign(x) |x|^(1 + level), which is not linear."""

  linear = False

  def apply(self, x, level):
    return tf.sign(x) * tf.abs(x) ** (1.0 + level)


# --- Corruptions made of others, and a user's own -----------------------------------------------


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


def from_config(config, trust_code=False) -> Corruption:
  """The corruption that `get_config` described; see `parts.make`."""
  return parts.make(Corruption, config, trust_code=trust_code)


# --- The contract -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What `check_corruption` found: property → what is wrong with it; empty means sound."""

  corruption: str
  failures: dict[str, str]

  @property
  def ok(self):
    return not self.failures

  def __str__(self):
    if self.ok:
      return f"{self.corruption}: sound"
    return "\n".join(f"{self.corruption}: {k}: {v}" for k, v in self.failures.items())


def check_corruption(corruption, image_shape=(6, 4, 2), levels=None) -> Verdict:
  """Tests what the theory asks of a corruption, on small random images.

  The properties: "product" (what the class multiplies in float32 itself is right on this machine:
  tried in a process of its own, see `faults`), "linear", "identity" (C = I at the clean end),
  "matrix" (equals its own matrix, channels alike), "adjoint" (⟨Cx, y⟩ = ⟨x, Cᵀy⟩), "svd",
  "gradients" (finite in x and level), "broadcast" (one level per image equals one image at a time),
  "graph" (the same when compiled for any number of images), "float32" (also from bfloat16),
  "finite" and "config" (get_config and from_config give the same operator). Of one that says that
  it is not linear, "linear", "matrix", "adjoint" and "svd" are not asked.

  Args:
    corruption: a `Corruption`.
    image_shape: (H, W, C), small: matrices of (H·W)² are built.
    levels: the levels to try; by default five over `level_range`, or up to 8 past its start.
  """
  start, stop = corruption.level_range
  if levels is None:
    far = stop if math.isfinite(stop) else start + 8.0
    levels = start + (far - start) * np.array([0.0, 0.05, 0.3, 0.7, 1.0])
  levels = np.asarray(levels, np.float32)
  draw = np.random.default_rng(0)
  n = len(levels)
  x, y = (draw.standard_normal([n, *image_shape]).astype(np.float32) for _ in range(2))
  failures: dict[str, str] = {}

  def same(name, got, want, what):
    # float32 rounding over sums of a few hundred terms, with room for a user's own arithmetic
    error = float(np.max(np.abs(np.asarray(got) - np.asarray(want))))
    scale = max(1.0, float(np.max(np.abs(np.asarray(want)))))
    if not error <= 1e-4 * scale and name not in failures:
      failures[name] = f"{what} (off by {error:.3g})"

  def attempt(name, check):
    try:
      check()
    except Exception as error:  # the verdict is for the user's code: any fault is its finding
      failures.setdefault(name, f"raises {type(error).__name__}: {error}")

  def linear():
    combined = corruption(2.0 * x - 3.0 * y, levels)
    same("linear", combined, 2.0 * corruption(x, levels) - 3.0 * corruption(y, levels),
         "C(2x − 3y) is not 2Cx − 3Cy")  # fmt: skip

  def identity():
    same("identity", corruption(x, start), x, f"C is not I at level {start:g}")

  def finite():
    if not np.all(np.isfinite(corruption(x, levels))):
      failures["finite"] = "Cx is not finite"

  def matrix():
    for k, level in enumerate(levels):
      operator = corruption.operator(level, image_shape)
      per_channel = int(operator.domain_dimension) == image_shape[0] * image_shape[1]
      flat = x[k].reshape(-1, image_shape[2] if per_channel else 1)
      want = np.reshape(np.float64(products.dense(operator)) @ flat, image_shape)
      same("matrix", corruption(x[k : k + 1], level)[0], want,
           f"C at level {level:g} is not its own matrix")  # fmt: skip

  def adjoint():
    left = np.sum(corruption(x, levels) * y, axis=(1, 2, 3))
    right = np.sum(x * corruption.adjoint(y, levels), axis=(1, 2, 3))
    same("adjoint", left, right, "⟨Cx, y⟩ is not ⟨x, Cᵀy⟩")

  def svd():
    for level in levels:  # rank is lost at some
      if int(corruption.operator(level, image_shape).domain_dimension) != x[0, :, :, 0].size:
        return  # an operator that mixes channels has no decomposition of one channel
      try:
        _verified(corruption, corruption.svd(level, image_shape), level, image_shape)
      except ValueError as error:
        failures.setdefault("svd", str(error))

  def gradients():
    tensor, level = tf.constant(x), tf.constant(levels)
    with tf.GradientTape() as tape:
      tape.watch([tensor, level])
      total = tf.reduce_sum(corruption(tensor, level) ** 2)
    for part in tape.gradient(total, [tensor, level]):
      if part is not None and not np.all(np.isfinite(part)):
        failures["gradients"] = "not finite"

  def broadcast():
    together = corruption(x, levels)
    alone = tf.concat([corruption(x[k : k + 1], levels[k]) for k in range(n)], 0)
    same("broadcast", together, alone, "one level per image differs from one image at a time")

  def graph():
    images, one = tf.TensorSpec([None, *image_shape]), tf.TensorSpec([])
    for level, spec in ((levels, tf.TensorSpec([None])), (levels[n // 2], one)):
      compiled = tf.function(
        lambda x, level: corruption(x, level), input_signature=[images, spec], autograph=False
      )
      same("graph", compiled(x, level), corruption(x, level), "differs when compiled")

  def float32():
    result = corruption(tf.cast(x, tf.bfloat16), levels)
    if result.dtype != tf.float32:
      failures["float32"] = f"gives {result.dtype.name} for bfloat16 images"

  def config():
    # Through JSON, but by the class at hand: one defined in a notebook cannot be imported by name.
    with trust.trust_code():  # the user's own code, at hand and in use
      again = type(corruption).from_config(json.loads(json.dumps(corruption.get_config())))
    same("config", again(x, levels), corruption(x, levels), "from_config(get_config()) differs")

  def product():
    h, w = image_shape[:2]
    cases = []
    for shape in dict.fromkeys([tuple(image_shape), (h, w, 1), (28, 28, 1)]):
      images = tf.TensorSpec([None, *shape])
      function = tf.function(
        lambda x, level: corruption(x, level), autograph=False,
        input_signature=[images, tf.TensorSpec([None])],
      )  # fmt: skip
      try:
        concrete = function.get_concrete_function()
      except Exception:  # whatever it says of a shape: "graph" says it of the one asked for
        continue
      if faults.multiplies(concrete):
        batch = draw.random([n, *shape], np.float32)
        cases.append((f"on {shape}", concrete, (batch, levels)))
    if cases:
      found = faults.wrong_products(cases)
      if found:
        failures["product"] = (
          f"{'; '.join(found)}; multiply with soft_diffusion_tf.products.two_sided or matmul"
        )

  attempt("product", product)
  if "product" in failures:
    return Verdict(type(corruption).__name__, failures)  # the rest could end this process
  of_linear = (linear, matrix, adjoint, svd) if corruption.linear else ()
  for check in (*of_linear, identity, finite, gradients, broadcast, graph, float32, config):
    attempt(check.__name__, check)
  return Verdict(type(corruption).__name__, failures)
