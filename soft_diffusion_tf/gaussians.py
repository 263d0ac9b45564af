"""Gaussians fitted to point sets, and the distance between two of them, in float64."""

import numpy as np


class Moments:
  """Mean and covariance of rows that arrive in batches, accumulated in float64.

  Rows are shifted by the first batch's mean before their squares are summed, so that a large
  common offset does not cancel away the covariance.
  """

  def __init__(self):
    self.count = 0
    self._shift = None
    self._sum = None
    self._outer = None

  def update(self, rows):
    """Adds rows [n, d] (any float dtype); returns self."""
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
    if not np.all(np.isfinite(rows)):
      raise ValueError("cannot take moments: a value is not finite; look for NaN in the images")
    if self._shift is None:
      self._shift = rows.mean(axis=0)
      self._sum = np.zeros_like(self._shift)
      self._outer = np.zeros([rows.shape[1]] * 2)
    rows = rows - self._shift
    self.count += len(rows)
    self._sum += rows.sum(axis=0)
    self._outer += rows.T @ rows
    return self

  @property
  def mean(self):
    """[d]."""
    return self._shift + self._sum / self.count

  @property
  def covariance(self):
    """[d, d], divided by count − 1."""
    if self.count < 2:
      raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
    mean = self._sum / self.count
    return (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
  """Squared 2-Wasserstein distance of two Gaussians: |m₁−m₂|² + tr(S₁ + S₂ − 2 (S₁S₂)^½).

  By two symmetric eigendecompositions in float64, so singular covariances are no trouble; tiny
  negative eigenvalues (rounding) count as 0. Source: Dowson & Landau 1982; Heusel et al. 2017.
  """
  values, vectors = np.linalg.eigh(np.asarray(covariance_1, np.float64))
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  inner = np.linalg.eigvalsh(root @ np.asarray(covariance_2, np.float64) @ root)
  trace = np.trace(covariance_1) + np.trace(covariance_2)
  gap = np.asarray(mean_1, np.float64) - np.asarray(mean_2, np.float64)
  return float(gap @ gap + trace - 2 * np.sum(np.sqrt(np.maximum(inner, 0))))


def frechet_between(rows_1, rows_2):
  """`frechet_distance` of the Gaussians fitted to two sets of rows [n, ...] and [m, ...]."""
  one, two = Moments().update(rows_1), Moments().update(rows_2)
  return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
