"""Restoration: samples of the clean image, given a corrupted one.

A corrupted image y = C_t x_0 + σ_t η is the process' own x_t. So the sampler starts from y at the t
that matches its corruption, instead of from the prior at 1, and runs down to 0. That keeps y's
large features; what comes between is the model's.

Where σ stands still (P's blur stage) a deterministic sampler gives a single answer to a question
that has many, and P's momentum sampler is deterministic there. So the default is stochastic: with
the exact denoiser of a mixture its samples are as far from the clean image, and from each other, as
those of p(x_0 | y) are (docs/restoration.md). The spread of several samples is the uncertainty.

With `explain` every prediction x̂_0 on the way is moved to the nearest image that explains y:
‖C_t x̂_0 − y‖ ≲ σ_t √n (`consistent`).
"""

import dataclasses

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import moved, rng, samplers
from soft_diffusion_tf.experiment import Sampling
from soft_diffusion_tf.images import check_floats

DEFAULT = Sampling(sampler=samplers.StochasticTwoStep(noise=5.0), steps=30)

_NOISE = -3  # salt of the noise that `corrupt` adds; the prior's are −1 and −2
_HALVINGS = 24  # of the interval of log λ
_FINE = 4096  # times among which a level is looked up
_CANDIDATES = 64  # times among which a corruption is estimated


# --- Which t ------------------------------------------------------------------------------------


def time_of_level(diffusion, level):
  """The largest t at which the process' corruption has this level.

  Raises:
    ValueError: the schedule never has that level, or has only one.
  """
  times = np.linspace(0, 1, _FINE + 1, dtype=np.float32)
  levels = diffusion.level(times).numpy().astype(np.float64)
  sign = np.sign(levels[-1] - levels[0])
  if sign == 0:
    raise ValueError(
      f"this process has the level {levels[0]:g} at every t, which tells no t; give t itself"
    )
  low, high = sorted((levels[0], levels[-1]))
  level = float(np.float32(level))  # as the schedule rounds its own
  if not low <= level <= high:
    raise ValueError(
      f"level {level:g} is outside of {low:g} … {high:g}, which this model was trained on"
    )
  rising = np.maximum.accumulate(sign * levels)
  after = int(np.searchsorted(rising, sign * level, side="right"))
  if after > _FINE:
    return 1.0
  before = after - 1
  share = (sign * level - rising[before]) / (rising[after] - rising[before])
  return float(times[before] + share * (times[after] - times[before]))


def estimate_times(diffusion, y, clean):
  """The most likely t of each corrupted image, float64 [B].

  At each of 64 candidate times the corrupted images are taken for Gaussian, with the mean and
  covariance of C_t of `clean` plus σ_t²; directions beyond those that half of the clean images
  span have the variance that the other half shows there.

  Args:
    y: float [B, H, W, C].
    clean: float [N, H, W, C] of the same kind, such as the model's own samples; N ≥ 16.
  """
  if len(clean) < 16:
    raise ValueError(f"estimating t takes at least 16 clean images, got {len(clean)}")
  times = (np.arange(_CANDIDATES) + 0.5) / _CANDIDATES
  flat = np.asarray(y, np.float64).reshape(len(y), -1)
  half = len(clean) // 2
  scores = []
  for t in times:
    x_t = diffusion.corrupt(clean, np.float32(t)).numpy().astype(np.float64)
    x_t = x_t.reshape(len(clean), -1)
    noise = float(diffusion.sigma(t)) ** 2
    mean = x_t.mean(0)
    dimension = x_t.shape[1]
    rank = min(half // 2, dimension)
    axes = np.linalg.svd(x_t[:half] - mean, full_matrices=False)[2][:rank]
    held_out = x_t[half:] - mean
    inside = held_out @ axes.T
    variance = (inside**2).mean(0) + noise
    d = flat - mean
    c = d @ axes.T
    score = np.sum(c**2 / variance + np.log(variance), axis=1)
    rest = dimension - rank
    if rest:
      outside = ((held_out**2).sum(1) - (inside**2).sum(1)).mean() / rest + noise
      score += ((d**2).sum(1) - (c**2).sum(1)) / outside + rest * np.log(outside)
    scores.append(score)
  return times[np.argmin(scores, axis=0)]


# --- Denoisers ------------------------------------------------------------------------------------


def consistent(denoiser, diffusion, y, t):
  """The denoiser with x̂_0 moved to the nearest image that explains y.

  That is the nearest one with ‖C_t x − y‖² ≤ σ_t² (n + 2 √(2n)), which the clean image itself keeps
  with probability 0.98, found exactly in the singular basis of C_t: the minimum of
  ‖x − x̂_0‖² + λ ‖C_t x − y‖² with the smallest λ that reaches the bound. λ stays below 1/σ_t², the
  weight of y against a prior of standard deviation 1: what C_t wipes out below the noise cannot be
  asked back. A bound at σ_t² n itself would make half of the images explain noise.

  Args:
    y: float32 [B, H, W, C]; the denoiser must be called on the same batch.
    t: float32 scalar, the time of y.
  """
  sigma = tf.maximum(diffusion.sigma(t), 1e-6)
  svd = diffusion.corruption.svd(diffusion.level(t), diffusion.image_shape)
  gains = tf.broadcast_to(svd.values, diffusion.image_shape)
  target = svd.to_left(y)
  size = float(np.prod(diffusion.image_shape))
  bound = (size + 2.0 * np.sqrt(2.0 * size)) * sigma**2

  def explained(x_t, times):
    x = denoiser(x_t, times)
    c = svd.to_right(x)
    gap = gains * c - target

    def left_over(log_lambda):
      shrunk = gap / (1.0 + tf.reshape(tf.exp(log_lambda), [-1, 1, 1, 1]) * gains**2)
      return tf.reduce_sum(shrunk**2, axis=(1, 2, 3))

    def halve(k, low, high):
      middle = 0.5 * (low + high)
      far = left_over(middle) > bound
      return k + 1, tf.where(far, middle, low), tf.where(far, high, middle)

    top = tf.zeros_like(gap[:, 0, 0, 0]) - 2.0 * tf.math.log(sigma)
    first = (tf.constant(0), top - 20.0, top)
    log_lambda = tf.while_loop(lambda k, *_: k < _HALVINGS, halve, first)[2]
    near = tf.reduce_sum(gap**2, axis=(1, 2, 3)) <= bound
    weight = tf.reshape(tf.where(near, 0.0, tf.exp(log_lambda)), [-1, 1, 1, 1])
    # From x̂_0 on, so that what C_t does not see, and an image that is near already, stay as is.
    return x - svd.from_right(weight * gains * gap / (1.0 + weight * gains**2))

  return explained


def tiled(denoiser, tile, shape, overlap=0.5):
  """A denoiser for images larger than the network's: overlapping tiles, blended.

  Every call cuts x_t into tiles and blends their predictions, with weights that fall towards a
  tile's edge (MultiDiffusion, Bar-Tal et al. 2023). Corruption and noise are those of the whole
  image, so a sampler sees no tiles.

  Args:
    tile: (H, W, C) of the network.
    shape: (H, W, C) of the images, nowhere smaller.
    overlap: the share of a tile that its neighbour covers too, in [0, 1).
  """
  tile, shape = tuple(tile), tuple(shape)
  if shape[2] != tile[2] or shape[0] < tile[0] or shape[1] < tile[1]:
    raise ValueError(
      f"images of {shape} cannot be cut into the network's {tile}; enlarge them, or take a model "
      "for smaller ones"
    )
  if not 0 <= overlap < 1:
    raise ValueError(f"the overlap of tiles is a share in [0, 1), got {overlap:g}")
  if shape == tile:
    return denoiser

  def starts(whole, part):
    step = max(1, round(part * (1 - overlap)))
    return [*range(0, whole - part, step), whole - part]

  def window(part):
    edge = np.minimum(np.arange(part), np.arange(part)[::-1]) + 1.0
    return np.minimum(edge, max(1.0, overlap * part))

  places = [(i, j) for i in starts(shape[0], tile[0]) for j in starts(shape[1], tile[1])]
  weight = (window(tile[0])[:, None] * window(tile[1])[None, :])[..., None].astype(np.float32)
  total = np.zeros([*shape[:2], 1], np.float32)
  for i, j in places:
    total[i : i + tile[0], j : j + tile[1]] += weight

  def blended(x_t, t):
    cut = [x_t[:, i : i + tile[0], j : j + tile[1]] for i, j in places]
    parts = denoiser(tf.ensure_shape(tf.concat(cut, 0), [None, *tile]), tf.tile(t, [len(places)]))
    x0_hat = tf.zeros_like(x_t)
    for (i, j), part in zip(places, tf.split(parts, len(places))):
      margins = [[0, 0], [i, shape[0] - tile[0] - i], [j, shape[1] - tile[1] - j], [0, 0]]
      x0_hat += tf.pad(part * weight, margins)
    return x0_hat / total

  return blended


# --- Restoring ----------------------------------------------------------------------------------


def corrupt(diffusion, x_0, t, seeds):
  """x_t of clean images x_0 [B, H, W, C]; image i's noise depends on seeds[i] alone."""
  eta = rng.normal_per_image(tf.cast(seeds, tf.int64), _NOISE, diffusion.image_shape)
  return diffusion.forward(x_0, t, eta)


def plan(diffusion, t, options=DEFAULT):
  """The plan of a sampler's steps from t down to 0, float32 [N, 6]."""
  if (
    options.sampler.adaptive
    or options.times
    or options.grid
    not in (
      "uniform",
      "quadratic",
      "level",
    )
  ):
    raise ValueError(
      f"restoration makes its own steps from t: sampler {options.sampler} with grid "
      f"{options.grid!r} or fixed times cannot; take another sampler and the grid 'uniform'"
    )
  times = samplers.time_grid(options.steps, options.grid, diffusion, start=t)
  return samplers.plan(options.sampler, times, diffusion, denoise=options.denoise)


def restore(diffusion, denoiser, plan, seeds, y, explain=False):
  """One sample of the clean image for each y, as graph operations.

  Args:
    plan: the sampler's, from the time of y on (`plan`).
    seeds: int64 [B].
    y: float32 [B, H, W, C], all at the time plan[0, 0].
    explain: hold the predictions to y (`consistent`).

  Returns:
    float32 [B, H, W, C].
  """
  if explain:
    denoiser = consistent(denoiser, diffusion, y, plan[0, 0])
  return samplers.sample(diffusion, denoiser, plan, seeds, y).x


@dataclasses.dataclass(frozen=True)
class Restored:
  """What is known of the clean images of a batch.

  Attributes:
    samples: float32 [B, K, H, W, C].
    expected: E[x_0 | y] by one evaluation of the network, float32 [B, H, W, C]: the estimate of
      least mean square error, and smoother than any sample.
  """

  samples: np.ndarray
  expected: np.ndarray

  @property
  def mean(self):
    """The mean of the samples, [B, H, W, C]."""
    return self.samples.mean(axis=1)

  @property
  def uncertainty(self):
    """The standard deviation of the samples at each pixel, [B, H, W, C]; needs K > 1."""
    if self.samples.shape[1] < 2:
      raise ValueError("an uncertainty takes at least 2 samples per image")
    return self.samples.std(axis=1, ddof=1)


class Restorer:
  """A trained model as a restorer of images, of the network's size or larger.

  Example:
    restorer = Restorer(run.diffusion, run.denoiser())
    result = restorer(y, t=0.6, count=8)  # result.mean, result.uncertainty, result.samples

  Args:
    diffusion, denoiser: of the trained model.
    options: `experiment.Sampling`; steps are those from t to 0; `batch_size` images are computed
      side by side.
    explain: hold the predictions to y (`consistent`).
    overlap: of tiles, for images that are larger than the network's (`tiled`).
  """

  def __init__(self, diffusion, denoiser, options=DEFAULT, explain=False, overlap=0.5):
    self.diffusion = diffusion
    self.options = options
    self._explain, self._overlap = explain, overlap
    self._denoiser = samplers.bounded(denoiser, options.clip, options.threshold)
    self._by_shape = {}

  def check_shape(self, shape, name="an image"):
    """Raises the ValueError of an image that is smaller than the network's tiles."""
    if len(shape) != 3:
      raise ValueError(f"{name}: an image is [H, W, C], got shape {tuple(shape)}")
    try:
      tiled(self._denoiser, self.diffusion.image_shape, shape, self._overlap)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None

  def _process(self, shape):
    if tuple(shape) == tuple(self.diffusion.image_shape):
      return self.diffusion
    return dataclasses.replace(self.diffusion, image_shape=tuple(shape), prior=None)

  def corrupt(self, x_0, t, seed=0):
    """x_t of clean images [B, H, W, C] of any size; image b's noise has the seed seed + b."""
    check_floats(np.asarray(x_0).dtype, "the images to corrupt")
    process = self._process(np.shape(x_0)[1:])
    return corrupt(process, x_0, np.float32(t), seed + np.arange(len(x_0))).numpy()

  def _for(self, shape):
    if shape not in self._by_shape:
      diffusion = self._process(shape)
      denoiser = tiled(self._denoiser, self.diffusion.image_shape, shape, self._overlap)

      def run(plan, seeds, y):
        return restore(diffusion, denoiser, plan, seeds, y, self._explain)

      def expect(y, t):
        return denoiser(y, tf.fill(tf.shape(y)[:1], t))

      steps, seeds = tf.TensorSpec([None, samplers.COLUMNS]), tf.TensorSpec([None], tf.int64)
      image = tf.TensorSpec([None, *shape])
      self._by_shape[shape] = (
        tf.function(run, autograph=False, input_signature=[steps, seeds, image]),
        tf.function(expect, autograph=False, input_signature=[image, tf.TensorSpec([])]),
      )
    return self._by_shape[shape]

  def __call__(self, y, t, count=1, seed=0, progress=None):
    """`count` samples of each clean image.

    Args:
      y: corrupted images, float [B, H, W, C], all corrupted to the time t.
      t: in (0, 1].
      seed: sample k of image b has the image seed seed + b · count + k.
      progress: the text of a bar.

    Returns:
      `Restored`.
    """
    check_floats(np.asarray(y).dtype, "the corrupted images")
    y = np.asarray(y, np.float32)
    if y.ndim != 4 or not len(y):
      raise ValueError(f"images must be [B, H, W, C] with B > 0, got shape {y.shape}")
    if not np.all(np.isfinite(y)):
      raise ValueError("the corrupted images hold NaN or infinite values")
    if not 0 < t <= 1:
      raise ValueError(f"t = {t:g} is outside of (0, 1], the times of the process")
    if count < 1:
      raise ValueError(f"restoration takes at least 1 sample per image, got {count}")
    run, expect = self._for(y.shape[1:])
    steps = plan(self.diffusion, t, self.options)
    parts, size = [], self.options.batch_size
    index = np.arange(len(y) * count)
    for k in tqdm.tqdm(range(0, len(index), size), progress, disable=progress is None):
      part = index[k : k + size]
      parts.append(run(steps, seed + part, y[part // count]).numpy())
    samples = np.concatenate(parts).reshape(len(y), count, *y.shape[1:])
    expected = [expect(y[k : k + size], np.float32(t)).numpy() for k in range(0, len(y), size)]
    return Restored(samples, np.concatenate(expected))


__getattr__ = moved.getter(__name__)
