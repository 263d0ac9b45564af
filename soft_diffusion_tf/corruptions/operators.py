"""The corruptions of the package that are one operator each."""

import abc
import dataclasses
import math
from typing import Annotated

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts, products
from soft_diffusion_tf.corruptions.base import Corruption, Spectrum, Svd, verified

_MOST_HALF_SIZE = 1 << 16  # of a blur, in pixels: its kernel is made whole


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
    return verified(self, parts, level, image_shape)


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
