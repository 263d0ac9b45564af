"""Exact denoisers E[x_0|x_t] for mixtures of Gaussians: they grade everything without training."""

import dataclasses

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import products, rng
from soft_diffusion_tf.images import check_floats


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

  def __post_init__(self):
    check_floats(np.asarray(self.means).dtype, "the means of a mixture")
    if not np.isfinite(self.means).all():
      raise ValueError("the means of a mixture hold NaN or infinity; leave such images out")

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
      products.matmul(c * precision, centre, transpose_b=True)
      - 0.5 * tf.reduce_sum(centre**2 * precision, axis=1)
      + log_weights
    )
    posterior = products.matmul(tf.nn.softmax(logits), m)
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


ERRORS = ("field", "smooth", "rough")


def noisy(denoise, diffusion, size, seed=0, kind="field"):
  """A denoiser with a known error: E[x_0|x_t] plus what an imperfect network might add to it.

  Each error is a fixed function of (x_t, t), the same at every call, as a network's would be:
  "field", size · F (x_t − ½) with a random matrix F of operator norm about 1: smooth in x_t;
  "smooth", the share `size` of x̂_0's detail (what a 3×3 mean takes away) is missing: a network
  errs to the side of too little detail;
  "rough", size · √2 sin(ω F (x_t − ½) + phase), RMS `size` a pixel, with ω so large that the error
  is another one after the smallest step: what the weights' own noise adds.
  """
  if kind not in ERRORS:
    raise ValueError(f"unknown error {kind!r}; choose one of {', '.join(ERRORS)}")
  n = int(np.prod(diffusion.image_shape))
  field = rng.normal(tf.constant([seed, 7]), 0, n, (n,)) / (2.0 * float(n) ** 0.5)
  phase = 6.2831853 * rng.uniform(tf.constant([seed, 8]), 0, n)
  frequency = 1000.0

  def wrong(x_t, t):
    x_0 = denoise(x_t, t)
    if kind == "smooth":
      mean = tf.nn.avg_pool2d(x_0, 3, 1, "SAME")
      return x_0 - size * (x_0 - mean)
    mapped = products.matmul(tf.reshape(x_t - 0.5, [-1, n]), field)
    if kind == "rough":
      mapped = 2.0**0.5 * tf.sin(frequency * mapped + phase)
    return x_0 + size * tf.reshape(mapped, tf.shape(x_0))

  return wrong


def moments(mixture):
  """Mean float64 [D] and covariance [D, D] of a mixture, exactly."""
  weights = np.exp(mixture.log_weights.astype(np.float64))
  weights /= weights.sum()
  means = mixture.means.reshape(len(weights), -1).astype(np.float64)
  mean = weights @ means
  gaps = (means - mean) * np.sqrt(weights)[:, None]
  if mixture.covariances is None:
    within = mixture.std**2 * np.eye(means.shape[1])
  else:
    within = np.einsum("k,kij->ij", weights, mixture.covariances)
  return mean, gaps.T @ gaps + within


def corrupted_moments(mixture, diffusion, t):
  """Mean [D] and covariance [D, D] of q_t, the distribution of x_t = C_t x_0 + σ_t η, exactly."""
  mean, covariance = moments(mixture)
  values, vectors = np.linalg.eigh(covariance)
  root = (vectors * np.sqrt(np.maximum(values, 0))).T
  rows = np.concatenate([mean[None], root]).reshape(-1, *diffusion.image_shape)
  rows = diffusion.corrupt(rows.astype(np.float32), np.float32(t)).numpy().astype(np.float64)
  rows = rows.reshape(len(rows), -1)
  noise = float(diffusion.sigma(np.float32(t))) ** 2
  return rows[0], rows[1:].T @ rows[1:] + noise * np.eye(len(mean))
