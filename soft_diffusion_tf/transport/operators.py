"""Operators on many images at once: distances in closed form, and candidate levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph

from soft_diffusion_tf.corruptions import Corruption, as_channels
from soft_diffusion_tf.images import check_range

Array = np.ndarray
Progress = Callable[[str, int, int], None]
CANDIDATES = ("transport", "linear", "geometric")
# Bytes of corrupted images held at a time: a block of increments, or the clouds last used.
_BLOCK = 2**28


class NotClosedForm(ValueError):
  """The closed form does not hold for a corruption; the message says which condition fails."""


def check_images(images: Any) -> Array:
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or len(images) < 2:
    raise ValueError(
      f"scheduling takes at least 2 images [N, H, W, C], got an array of {images.shape}; "
      "take a larger slice"
    )
  check_range(images, "the images to find levels by")
  return images


def roots_of(corruption: Corruption, images: Array) -> tuple[Array, bool]:
  """Images of which Σ‖C x‖² is E‖C x_0‖² for every C of a family, largest first, in one layout.

  A corruption that treats channels alike needs but the eigen-images of the pixels' second moments:
  H·W of them stand for any number of images, exactly.

  Returns:
    float32 [1, H, W, K] (True) for a corruption that treats channels alike, else [K, H, W, C].
  """
  n, h, w, c = images.shape
  if not corruption.linear:  # only the images themselves will do, and `weight_of` takes their mean
    return images, False
  alike = not corruption.mixes_channels((h, w, c))
  rows = np.moveaxis(images, 3, 1).reshape(n * c, h * w) if alike else images.reshape(n, -1)
  if len(rows) <= rows.shape[1]:
    roots = rows / np.float32(math.sqrt(n))
  else:
    moments = np.zeros([rows.shape[1]] * 2)
    for start in range(0, len(rows), 4096):  # float32 sums of few rows, added in float64
      part = rows[start : start + 4096]
      moments += part.T @ part
    values, vectors = np.linalg.eigh(moments / n)
    kept = values > 1e-12 * values[-1]
    roots = (vectors[:, kept] * np.sqrt(values[kept])).T[::-1].astype(np.float32)
  if not alike:
    return roots.reshape(-1, h, w, c), False
  return np.ascontiguousarray(roots.T).reshape(1, h, w, -1), True


def weight_of(corruption: Corruption, images: Array) -> float:
  """What Σ‖C x‖² over `roots_of` is multiplied by: roots of a linear C have their share in them."""
  return 1.0 if corruption.linear else 1.0 / len(images)


def check_closed_form(corruption: Corruption, levels: Array, images: Array) -> dict[str, float]:
  """Whether C_i x → C_j x is optimal transport on these images.

  If the operators are symmetric, positive semi-definite and commute, C_j C_i⁻¹ is symmetric and
  positive semi-definite too, the map is the gradient of a convex function, and by Brenier's theorem
  it is optimal. Blurs commute only up to their zero-padded border, so the conditions are measured,
  and so is what they are for: how much the optimal assignment of a sample beats the identity.

  Returns:
    The largest defects over pairs of five levels: "asymmetry", "negativity" and "commutator"
    relative to the images' norm, and "excess", the share by which √E‖(C_i − C_j)x‖² exceeds W₂ of
    a sample of 256 images.

  Raises:
    NotClosedForm: one of the first three exceeds 5 %, or the excess 1 %.
  """
  x = np.asarray(images[:256], np.float32)
  y = x[::-1]
  norm = float(np.linalg.norm(x))
  picked = [float(levels[k]) for k in np.linspace(0, len(levels) - 1, 5).round().astype(int)]
  c_x = [np.asarray(corruption(x, level), np.float64) for level in picked]
  defects = {"asymmetry": 0.0, "negativity": 0.0, "commutator": 0.0, "excess": 0.0}

  def worst(name: str, value: float) -> None:
    defects[name] = max(defects[name], value)

  for k, level in enumerate(picked):
    c_y = np.asarray(corruption(y, level), np.float64)
    gap = np.sum(c_x[k] * y, axis=(1, 2, 3)) - np.sum(x * c_y, axis=(1, 2, 3))
    worst("asymmetry", float(np.max(np.abs(gap))) * len(x) / norm**2)
    noise = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    quadratic = np.sum(np.asarray(corruption(noise, level)) * noise, axis=(1, 2, 3))
    worst("negativity", float(-np.min(quadratic) / noise[0].size))
    for j in range(k):
      one = np.asarray(corruption(c_x[j], level))
      two = np.asarray(corruption(c_x[k], picked[j]))
      worst("commutator", float(np.linalg.norm(one - two)) / norm)
      inner = c_x[k].reshape(len(x), -1) @ c_x[j].reshape(len(x), -1).T
      taken = scipy.optimize.linear_sum_assignment(inner, maximize=True)
      plain = float(np.sum((c_x[k] - c_x[j]) ** 2))
      optimal = plain - 2 * float(inner[taken].sum() - np.trace(inner))
      if plain > 1e-9 * norm**2:
        worst("excess", 1.0 - math.sqrt(max(optimal, 0.0) / plain))
  for name, limit in (
    ("asymmetry", 0.05),
    ("negativity", 0.05),
    ("commutator", 0.05),
    ("excess", 0.01),
  ):
    if defects[name] > limit:
      raise NotClosedForm(
        f"the closed form does not hold for {type(corruption).__name__} on these images: "
        f"{name} {defects[name]:.2g} exceeds {limit:g}; take --method=sinkhorn"
      )
  return defects


def closed_form_distances(
  corruption: Corruption, levels: Array, images: Array, progress: Progress | None = None
) -> Array:
  """√E‖(C_i − C_j) x_0‖² between all pairs of corrupted data sets, float64 [L, L].

  It is W₂ where `check_closed_form` passes, and bounds it from above everywhere (x_0 is paired with
  itself). Only second moments of the data enter. They are summed over increments between
  neighbouring levels, whose Gram matrix in float32 has no cancellation; increments of blocks of
  weak eigen-images that come to less than 1e-5 of the mean increment are left out, which moves a
  distance by less than 1e-4 of the length of its part of the path.

  Args:
    levels: [L], from clean to most corrupted.
    images: float [N, H, W, C] in [0, 1].
  """
  images = check_images(images)
  roots, alike = roots_of(corruption, images)
  axis = 3 if alike else 0
  size = max(1, int(_BLOCK // (4 * len(levels) * (roots.size // roots.shape[axis]))))
  starts = range(0, roots.shape[axis], size)
  gram = np.zeros([len(levels) - 1] * 2)
  largest = 0.0
  for k, start in enumerate(starts):
    batch = np.ascontiguousarray(
      roots.take(range(start, min(start + size, roots.shape[axis])), axis)
    )
    increments = np.empty([len(levels) - 1, batch.size], np.float32)
    before = None
    for row, level in enumerate(levels):
      after = np.asarray(corruption(batch, float(level))).ravel()
      if before is not None:
        np.subtract(after, before, out=increments[row - 1])
      before = after
    norms = np.sqrt(np.einsum("ij,ij->i", increments, increments))
    largest = max(largest, float(norms.mean()))
    kept = np.flatnonzero(norms > 1e-5 * largest)
    if len(kept):
      part = increments if len(kept) == len(increments) else increments[kept]
      gram[np.ix_(kept, kept)] += part @ part.T
    if progress:
      progress("closed form", k + 1, len(starts))
  gram *= weight_of(corruption, images)
  sums = np.zeros([len(levels)] * 2)
  sums[1:, 1:] = gram.cumsum(axis=0).cumsum(axis=1)
  squares = np.diag(sums)[:, None] + np.diag(sums)[None, :] - sums - sums.T
  squares = np.maximum((squares + squares.T) / 2, 0.0)
  # Increments of 0 leave rounding of the sums behind: equal data sets are at distance 0.
  return np.where(squares > 1e-13 * squares.max(), np.sqrt(squares), 0.0)


def candidate_levels(
  corruption: Corruption,
  first: float,
  last: float,
  count: int,
  kind: str,
  images: Array | None = None,
) -> Array:
  """Candidate levels from `first` (clean) to `last`, float64 [count].

  Args:
    kind: "linear" or "geometric" in the level, or "transport": evenly spaced in transport length,
      which puts candidates where the images change (linear candidates are too coarse where the
      corruption sets in: one step there is worth a whole edge). A corruption that moves in jumps,
      such as a hard mask, has fewer states than that: every state is then a candidate once.
    images: for "transport".
  """
  if count < 2:
    raise ValueError(f"at least 2 candidate levels are needed, got {count}")
  if kind == "linear":
    return np.linspace(first, last, count)
  if kind == "geometric":
    if not (first > 0 and last > 0):
      raise ValueError(
        f"geometric candidates need positive ends, got {first:g} and {last:g}; use linear"
      )
    return np.geomspace(first, last, count)
  if kind != "transport" or images is None:
    raise ValueError(f"unknown candidates {kind!r}; choose one of {', '.join(CANDIDATES)}")
  sample = images[np.linspace(0, len(images) - 1, min(len(images), 32)).astype(int)]
  if not corruption.mixes_channels(tuple(sample.shape[1:])):
    sample = as_channels(sample)

  def state(level: float) -> Array:
    return np.asarray(corruption(sample, level))

  def gap(one: Array, two: Array) -> float:
    difference = (one - two).ravel()
    return math.sqrt(float(difference @ difference))

  # From coarse to fine: an interval is halved until it is half as long as a step between
  # candidates, or (inside a jump) too short to matter. Depth first, so that few states are alive.
  start = before = state(first)
  total = 0.0
  for level in np.linspace(first, last, 65)[1:]:
    after = state(float(level))
    total += gap(before, after)
    before = after
  if total <= 0:
    raise ValueError(f"the corruption changes nothing between levels {first:g} and {last:g}")
  fine, length = [first], [0.0]

  def walk(low: float, high: float, at_low: Array, at_high: Array, depth: int) -> None:
    step = gap(at_low, at_high)
    if depth == 0 or (depth <= 10 and step <= total / (2 * count)):
      fine.append(high)
      length.append(length[-1] + step)
      return
    middle = 0.5 * (low + high)
    at_middle = state(middle)
    walk(low, middle, at_low, at_middle, depth - 1)
    walk(middle, high, at_middle, at_high, depth - 1)

  walk(first, last, start, before, 16)
  levels = np.interp(np.linspace(0, length[-1], count), length, fine)
  levels[0], levels[-1] = first, last
  kept, before = [first], start
  for level in levels[1:]:
    now = state(float(level))
    if gap(now, before) > 1e-6 * total:
      kept.append(float(level))
      before = now
  kept[-1] = last
  return np.array(kept)
