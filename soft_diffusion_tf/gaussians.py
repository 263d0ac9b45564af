"""Gaussians fitted to point sets, and the distance between two of them, in float64."""

import numpy as np
import threadpoolctl


class Moments:
  """Mean and covariance of rows that arrive in batches, accumulated in float64.

  What is kept is the count, the mean and the scatter Σ (x − mean)(x − mean)ᵀ; sets are joined by
  Chan, Golub & LeVeque's formula (1983), which a large common offset does not harm. `a + b` are the
  moments of both sets together.
  """

  def __init__(self, count=0, mean=None, scatter=None):
    self.count = count
    self.mean = mean  # [d]
    self.scatter = scatter  # [d, d]

  def update(self, rows):
    """Adds rows [n, ...] (any float dtype); returns self."""
    rows = np.asarray(rows, np.float64)
    if not len(rows):
      return self
    rows = rows.reshape(len(rows), -1)
    if not np.all(np.isfinite(rows)):
      raise ValueError("cannot take moments: a value is not finite; look for NaN in the images")
    mean = rows.mean(axis=0)
    centred = rows - mean
    self._join(len(rows), mean, centred.T @ centred)
    return self

  def _join(self, count, mean, scatter):
    if self.count == 0:
      self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
      return
    if len(mean) != len(self.mean):
      raise ValueError(f"cannot join moments of {len(self.mean)} and of {len(mean)} values a row")
    total, gap = self.count + count, mean - self.mean
    self.scatter += scatter
    self.scatter += np.outer(gap * (self.count * count / total), gap)
    self.mean += gap * (count / total)
    self.count = total

  def __add__(self, other):
    result = Moments()
    for part in (self, other):
      if part.count:
        result._join(part.count, part.mean, part.scatter)
    return result

  @property
  def covariance(self):
    """[d, d], divided by count − 1."""
    if self.count < 2:
      raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
    return self.scatter / (self.count - 1)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
  """Squared 2-Wasserstein distance of two Gaussians: |m₁−m₂|² + tr(S₁ + S₂ − 2 (S₁S₂)^½).

  The trace of the root is the sum of the singular values of √S₁ᵀ√S₂. Each of them is right to
  rounding, where the eigenvalues of S₁S₂ would need a root, which makes 1e-8 of a rounded zero. So
  singular covariances are no trouble, and the distance is never negative. Source: Dowson & Landau
  1982; Heusel et al. 2017.
  """
  # BLAS threads wait for each other by spinning: beside other work they are slower than one.
  with threadpoolctl.threadpool_limits(1, "blas"):
    one, two = _root(covariance_1), _root(covariance_2)
    cross = np.sum(np.linalg.svd(one.T @ two, compute_uv=False))
  gap = np.asarray(mean_1, np.float64) - np.asarray(mean_2, np.float64)
  return float(gap @ gap + max(np.sum(one**2) + np.sum(two**2) - 2 * cross, 0.0))


def _root(covariance):
  """A with A Aᵀ = S, [d, rank]: directions that only rounding gives a variance are left out."""
  values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
  kept = _large(values)
  return vectors[:, kept] * np.sqrt(values[kept])


def _large(values):
  """Which of rising eigenvalues are more than rounding, whose root would be 1e-8."""
  return values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)


def frechet_of_rows(rows, mean, covariance):
  """`frechet_distance` of the Gaussian fitted to rows [n, ...] and a known one.

  With fewer rows than dimensions it takes one eigendecomposition of n × n: S₁ = AᵀA, and S₁S₂ has
  the eigenvalues of A S₂ Aᵀ.
  """
  rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
  if len(rows) > rows.shape[1]:
    own = Moments().update(rows)
    return frechet_distance(own.mean, own.covariance, mean, covariance)
  root = (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)
  values = np.linalg.eigvalsh(root @ covariance @ root.T)
  gap = rows.mean(0) - mean
  trace = np.sum(root**2) + np.trace(covariance)
  return float(gap @ gap + max(trace - 2 * np.sum(np.sqrt(values[_large(values)])), 0.0))


def frechet_between(rows_1, rows_2):
  """`frechet_distance` of the Gaussians fitted to two sets of rows [n, ...] and [m, ...]."""
  one, two = Moments().update(rows_1), Moments().update(rows_2)
  return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
