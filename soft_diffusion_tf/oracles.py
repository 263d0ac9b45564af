"""Exact denoisers E[x_0|x_t] for mixtures of Gaussians: they grade everything without training."""

import dataclasses

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture:
  """x_0 ~ Σ_k π_k N(m_k, S_k) over images.

  Attributes:
    means: float [K, H, W, C].
    std: components are N(m_k, std² I) when `covariances` is None.
    covariances: float [K, D, D] with D = H·W·C, for small images.
    weights: π, float [K]; equal when None.
  """

  means: np.ndarray
  std: float = 0.05
  covariances: np.ndarray | None = None
  weights: np.ndarray | None = None

  @classmethod
  def per_class(cls, images, labels, ridge=1e-4):
    """One full Gaussian per label, its covariance enlarged by `ridge` on the diagonal."""
    groups = [
      images[labels == label].reshape((labels == label).sum(), -1) for label in np.unique(labels)
    ]
    covariances = np.stack([np.cov(g, rowvar=False) + ridge * np.eye(g.shape[1]) for g in groups])
    means = np.stack([g.mean(0).reshape(images.shape[1:]) for g in groups])
    weights = np.array([len(g) for g in groups], np.float64)
    return cls(means, covariances=covariances, weights=weights / weights.sum())

  @property
  def log_weights(self):
    k = len(self.means)
    weights = np.full(k, 1 / k) if self.weights is None else self.weights
    return np.log(weights).astype(np.float32)

  def draw(self, count, seed=0):
    """Fresh images float32 [count, H, W, C]."""
    generator = np.random.default_rng(seed)
    weights = np.exp(self.log_weights.astype(np.float64))
    which = generator.choice(len(self.means), count, p=weights / weights.sum())
    shape = self.means.shape[1:]
    noise = generator.standard_normal([count, int(np.prod(shape))])
    if self.covariances is None:
      spread = self.std * noise
    else:
      roots = np.linalg.cholesky(self.covariances)
      spread = np.einsum("nij,nj->ni", roots[which], noise)
    return (self.means[which] + spread.reshape(count, *shape)).astype(np.float32)


def denoiser(mixture, diffusion):
  """The exact E[x_0|x_t] of a mixture under a diffusion, as a Denoiser (x_t, t) → x̂_0.

  All times of a call must be equal (as in sampling; checked when called eagerly): the corruption is
  decomposed once per call.
  With isotropic components the cost is one singular value decomposition of C_t (two small ones for
  a blur, none for a mask) and three matrix products; full covariances take K solves of size D.
  """
  if mixture.covariances is None:
    return _isotropic(mixture, diffusion)
  return _full(mixture, diffusion)


def _one_time(t):
  """The time that a whole batch shares, as a scalar."""
  t = tf.reshape(tf.cast(t, tf.float32), [-1])
  if tf.executing_eagerly() and np.ptp(t.numpy()) > 0:
    raise ValueError("an exact denoiser takes one time for the whole batch; call it once per time")
  return t[0]


def _isotropic(mixture, diffusion):
  means = tf.constant(mixture.means, tf.float32)
  log_weights = tf.constant(mixture.log_weights)
  variance = mixture.std**2

  def denoise(x_t, t):
    t = _one_time(t)
    parts = diffusion.corruption.svd(diffusion.level(t), diffusion.image_shape)
    noise = diffusion.sigma(t) ** 2
    s = tf.broadcast_to(parts.values, diffusion.image_shape)
    # In coefficients: c = Uᵀ x_t is N(s · Vᵀm_k, s² std² + σ²) under component k.
    spread = s**2 * variance + noise
    c = tf.reshape(parts.to_left(x_t), [tf.shape(x_t)[0], -1])
    m = tf.reshape(parts.to_right(means), [means.shape[0], -1])
    precision, flat_s = tf.reshape(1.0 / spread, [-1]), tf.reshape(s, [-1])
    centre = m * flat_s
    logits = (
      tf.matmul(c * precision, centre, transpose_b=True)
      - 0.5 * tf.reduce_sum(centre**2 * precision, axis=1)
      + log_weights
    )
    posterior = tf.matmul(tf.nn.softmax(logits), m)
    gain = variance * flat_s * precision
    mean = posterior + gain * (c - flat_s * posterior)
    return parts.from_right(tf.reshape(mean, tf.shape(x_t)))

  return denoise


def _full(mixture, diffusion):
  shape = diffusion.image_shape
  size = int(np.prod(shape))
  means = tf.constant(mixture.means.reshape(-1, size), tf.float64)
  covariances = tf.constant(mixture.covariances, tf.float64)
  log_weights = tf.cast(mixture.log_weights, tf.float64)

  def denoise(x_t, t):
    t = _one_time(t)
    x = tf.cast(tf.reshape(x_t, [-1, size]), tf.float64)
    basis = tf.reshape(tf.eye(size), [size, *shape])
    matrix = tf.transpose(
      tf.cast(tf.reshape(diffusion.corrupt(basis, t), [size, size]), tf.float64)
    )
    cross = tf.matmul(covariances, matrix, transpose_b=True)  # S_k Cᵀ
    noise = tf.cast(diffusion.sigma(t), tf.float64) ** 2
    total = tf.matmul(matrix, cross) + noise * tf.eye(size, dtype=tf.float64)
    root = tf.linalg.cholesky(total)
    gap = x[tf.newaxis] - tf.matmul(means, matrix, transpose_b=True)[:, tf.newaxis]  # [K, B, D]
    white = tf.linalg.triangular_solve(root, tf.linalg.matrix_transpose(gap))
    logits = (
      log_weights
      - 0.5 * tf.transpose(tf.reduce_sum(white**2, axis=1))
      - tf.reduce_sum(tf.math.log(tf.linalg.diag_part(root)), axis=1)
    )
    solved = tf.linalg.triangular_solve(root, white, adjoint=True)
    means_given = means[:, tf.newaxis] + tf.linalg.matrix_transpose(tf.matmul(cross, solved))
    mean = tf.einsum("bk,kbd->bd", tf.nn.softmax(logits), means_given)
    return tf.cast(tf.reshape(mean, tf.shape(x_t)), tf.float32)

  return denoise


def noisy(denoise, diffusion, size, seed=0):
  """A denoiser with a known error: E[x_0|x_t] plus size · (fixed smooth random field of x_t).

  The error is a fixed random linear map of x_t of operator norm about 1, the same at every call,
  as an imperfect network's error would be. For studies of what errors do to samplers.
  """
  n = int(np.prod(diffusion.image_shape))
  field = rng.normal(tf.constant([seed, 7]), 0, n, (n,)) / (2.0 * float(n) ** 0.5)

  def wrong(x_t, t):
    x_0 = denoise(x_t, t)
    flat = tf.reshape(x_t - tf.reduce_mean(x_t, axis=0, keepdims=True), [-1, n])
    return x_0 + size * tf.reshape(tf.matmul(flat, field), tf.shape(x_0))

  return wrong
