"""Samples and priors graded against what is known exactly."""

import dataclasses
import functools

import numpy as np
import scipy.cluster.vq
import scipy.fft
import tensorflow as tf

from soft_diffusion_tf import (
  gaussians,
  oracles,
  priors,
  rng,
  samplers,
)
from soft_diffusion_tf.images import check_range
from soft_diffusion_tf.transport import sinkhorn

NFES = (5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226, 320, 453, 640, 1000)
_FLOORS = 8  # fresh draws behind a floor


@dataclasses.dataclass(frozen=True)
class Grade:
  """How far a set of samples is from the data.

  Attributes:
    nfe: evaluations of the denoiser.
    frechet: squared Fréchet distance in pixels to the exact moments of the data.
    sliced: squared W₂ to fresh draws, mean over 64 directions.
    frequency: RMS over 2-D cosine frequencies of (variance / exact variance − 1).
    sinkhorn: Sinkhorn divergence to fresh draws; None when not asked for.
  """

  nfe: int
  frechet: float
  sliced: float
  frequency: float
  sinkhorn: float | None = None


class Laboratory:
  """A mixture under a process, ready to grade samplers.

  Args:
    mixture: `oracles.GaussianMixture`.
    diffusion: its process; a prior of `prior` is fitted to `images`.
    images: clean images that the prior and the grids in transport length are fitted to.
    prior, rank: see `priors.fit`.
    count: samples per grade.
    error: (kind, size) of an error put into x̂_0 (`oracles.noisy`).
  """

  def __init__(self, mixture, diffusion, images, prior="subspace", rank=32, count=2000, error=None):
    if count < 2:
      raise ValueError(f"a grade takes at least 2 samples, got {count}")
    self.mixture, self.images, self.count = mixture, images, count
    self.diffusion = diffusion.with_prior(priors.fit(prior, images, diffusion, rank))
    denoiser = oracles.denoiser(mixture, self.diffusion)
    if error is not None:
      denoiser = oracles.noisy(denoiser, self.diffusion, error[1], kind=error[0])
    self.sampler = samplers.Sampler(self.diffusion, denoiser)
    self.mean, self.covariance = oracles.moments(mixture)
    size = int(np.prod(diffusion.image_shape))
    directions = np.random.default_rng(2).standard_normal([size, 64])
    self._directions = directions / np.linalg.norm(directions, axis=0)
    basis = np.eye(size).reshape(-1, *diffusion.image_shape)
    dct = scipy.fft.dctn(basis, axes=(1, 2), norm="ortho").reshape(size, size)
    self._dct = dct
    self._variance = np.einsum("ij,ik,kj->j", dct, self.covariance, dct)

  def draw(self, seed):
    """Fresh draws of the data, float64 [count, D]."""
    return self.mixture.draw(self.count, seed=seed).reshape(self.count, -1).astype(np.float64)

  @functools.cached_property
  def _fresh(self):
    return self.draw(1)

  def grade_images(self, images, nfe=0, full=False):
    """The `Grade` of a set of images [count, ...]."""
    rows = np.asarray(images, np.float64).reshape(len(images), -1)
    if not np.all(np.isfinite(rows)):
      return Grade(nfe, *3 * [float("inf")])
    own = gaussians.Moments().update(rows)
    sorted_1, sorted_2 = (np.sort(v @ self._directions, axis=0) for v in (rows, self._fresh))
    cosines = np.var(rows @ self._dct, axis=0, ddof=1)
    divergence = None
    if full:
      one, two = (v[:1000].astype(np.float32) for v in (rows, self._fresh))
      divergence = float(sinkhorn.sinkhorn_divergence(one, two).divergence)
    return Grade(
      nfe,
      gaussians.frechet_distance(own.mean, own.covariance, self.mean, self.covariance),
      float(np.mean((sorted_1 - sorted_2) ** 2)),
      float(np.sqrt(np.mean((cosines / self._variance - 1) ** 2))),
      divergence,
    )

  @functools.cached_property
  def floors(self):
    """Grades of fresh draws: what `count` perfect samples get."""
    return [self.grade_images(self.draw(seed), full=seed == 2) for seed in range(2, 2 + _FLOORS)]

  @functools.cached_property
  def floor(self):
    """The mean of `floors`."""
    mean = lambda name: float(np.mean([getattr(g, name) for g in self.floors]))
    return Grade(0, mean("frechet"), mean("sliced"), mean("frequency"), self.floors[0].sinkhorn)

  def bound(self, share=0.1):
    """The Fréchet distance that counts as converged: the floor and `share` of it, and two standard
    deviations of one fresh draw's distance.
    """
    spread = np.std([g.frechet for g in self.floors], ddof=1)
    return (1 + share) * self.floor.frechet + 2 * float(spread)

  def plan(self, rule, nfe, grid="uniform", denoise=True, **fields):
    """The plan of a sampler for at most `nfe` evaluations; `fields` are the rule's."""
    rule = samplers.with_fields(rule, fields)
    times = samplers.time_grid(
      samplers.steps_for(rule, nfe), grid, self.diffusion, images=self.images
    )
    return samplers.plan(rule, times, self.diffusion, denoise=denoise)

  def grade(self, rule, nfe, grid="uniform", full=False, **options):
    """The `Grade` of a sampler; `options` are those of `plan`. For the adaptive one its tolerance
    decides, and nfe does not count.
    """
    seeds, rule = np.arange(self.count), samplers.with_fields(rule, options)
    if rule.adaptive:
      images, nfe = self.sampler.adaptive(seeds, rtol=rule.tolerance, atol=rule.tolerance)
      return self.grade_images(images, nfe, full)
    plan = self.plan(rule, nfe, grid, **options)
    return self.grade_images(self.sampler(plan, seeds), int(plan.shape[0]), full)

  def drift(self, rule, nfe, frames=10, grid="uniform", **options):
    """Where an error arises: (t, squared Fréchet distance of the sampler's x_t to q_t, its floor).

    Against the exact moments of q_t; the floor is that of forward draws of the same number.
    """
    plan = self.plan(rule, nfe, grid, **options)
    times, states, _ = self.sampler.trajectory(plan, np.arange(self.count), frames)
    clean = self._fresh.reshape(states[0].shape)
    result = []
    for k, (t, x) in enumerate(zip(times, states)):
      if t == 0:  # the finished image is x̂_0: without the noise σ_0
        grade = self.grade_images(x)
        result.append((0.0, grade.frechet, self.floor.frechet))
        continue
      q_t = oracles.corrupted_moments(self.mixture, self.diffusion, t)
      eta = rng.normal(tf.constant([k, 9]), 0, self.count, self.diffusion.image_shape)
      forward = self.diffusion.forward(clean, np.float32(t), eta).numpy()
      own, fresh = (gaussians.Moments().update(v) for v in (x, forward))
      result.append(
        (
          float(t),
          gaussians.frechet_distance(own.mean, own.covariance, *q_t),
          gaussians.frechet_distance(fresh.mean, fresh.covariance, *q_t),
        )
      )
    return result

  def needed(self, rule, nfes=NFES, share=0.1, grid="uniform", grade=None, **options):
    """The fewest evaluations from which on a sampler's distance stays within `bound`.

    Goes up the ladder `nfes` until two rungs in a row are within it.

    Returns:
      The number or None, and the grades on the way.
    """
    grade = grade or self.grade
    grades, first = [], None
    for nfe in nfes:
      grades.append(grade(rule, nfe, grid=grid, **options))
      inside = grades[-1].frechet <= self.bound(share)
      if inside and first is not None:
        return first, grades
      first = grades[-1].nfe if inside else None
    return first, grades


def grade_prior(diffusion, images, seed=0, count=1000):
  """How far prior samples are from corrupted data: the start of sampling against the truth.

  Both sides carry the noise σ_1, drawn independently. The floors are the same distances between two
  disjoint halves of the data: what sampling alone gives.

  Returns:
    A dictionary: "frechet" (squared Fréchet distance in pixels), "frechet_floor", "sinkhorn" (the
    debiased divergence, also a squared distance), "sinkhorn_floor" and "rms_mean" (root mean square
    difference of the two means).
  """
  images = np.asarray(images, np.float32)
  check_range(images, "the images to grade a prior by")
  n = min(count, len(images) // 2)
  if n < 2:
    raise ValueError(f"grading a prior takes at least 4 images, got {len(images)}")
  order = np.random.default_rng(seed).permutation(len(images))
  corrupted = priors.corrupt_all(images[order[: 2 * n]], diffusion, 1.0)
  eta = rng.normal(tf.constant([seed, 0]), 0, 2 * n, diffusion.image_shape).numpy()
  corrupted = (corrupted + float(diffusion.sigma(1.0)) * eta).reshape(2, n, -1)
  drawn = diffusion.draw_prior(tf.range(n, dtype=tf.int64)).numpy().reshape(n, -1)

  def divergence(x, y):
    return float(sinkhorn.sinkhorn_divergence(x, y, relative_epsilon="std").divergence)

  return {
    "frechet": gaussians.frechet_between(drawn, corrupted[0]),
    "frechet_floor": gaussians.frechet_between(corrupted[1], corrupted[0]),
    "sinkhorn": divergence(drawn, corrupted[0]),
    "sinkhorn_floor": divergence(corrupted[1], corrupted[0]),
    "rms_mean": float(np.sqrt(np.mean((drawn.mean(0) - corrupted[0].mean(0)) ** 2))),
  }
