"""Choosing corruption levels by optimal transport (P 3.3, App. C).

Candidate levels are nodes of a graph; an edge joins two corrupted data sets whose Wasserstein
distance is at most ε; the schedule is the shortest path from clean to most corrupted, with ε tuned
so that the path has the wanted number of nodes.

The distance is W₂, the square root of the transport cost: with the cost itself as the edge weight
the square of a sum exceeds the sum of squares, and the path takes every candidate at any ε.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph

from soft_diffusion_tf.corruptions import Corruption

Progress = Callable[[str, int, int], None]
CANDIDATES = ("transport", "linear", "geometric")


class NotClosedForm(ValueError):
  """The closed form does not hold for a corruption; the message says which condition fails."""


def check_closed_form(corruption: Corruption, levels: np.ndarray,
                      images: np.ndarray) -> dict[str, float]:  # fmt: skip
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
  for name, limit in (("asymmetry", 0.05), ("negativity", 0.05), ("commutator", 0.05),
                      ("excess", 0.01)):  # fmt: skip
    if defects[name] > limit:
      raise NotClosedForm(
        f"the closed form does not hold for {type(corruption).__name__} on these images: "
        f"{name} {defects[name]:.2g} exceeds {limit:g}; take --method=mse, or levels of your own"
      )
  return defects


def closed_form_distances(corruption: Corruption, levels: np.ndarray, images: np.ndarray,
                          progress: Progress | None = None) -> np.ndarray:  # fmt: skip
  """W₂ between all pairs of corrupted data sets: √E‖(C_i − C_j) x_0‖², float64 [L, L].

  Only second moments of the data enter. A corruption that treats channels alike is applied to the
  eigen-images of the pixels' second-moment matrix (H·W of them, exact) instead of to every image.

  Args:
    levels: [L], from clean to most corrupted.
    images: float [N, H, W, C] in [0, 1].
  """
  images = np.asarray(images, np.float32)
  if not np.all(np.isfinite(images)):
    raise ValueError("the images hold NaN or infinity; clean the data before scheduling")
  n, h, w, c = images.shape
  rows = np.moveaxis(images, 3, 1).reshape(n * c, h * w).astype(np.float64)
  shape, factor = (h, w, 1), 1.0 / n
  if _mixes_channels(corruption, (h, w, c)):
    rows, shape = images.reshape(n, -1).astype(np.float64), (h, w, c)
  if len(rows) > rows.shape[1]:
    values, vectors = np.linalg.eigh(rows.T @ rows)
    kept = values > 1e-12 * values[-1]
    rows = (vectors[:, kept] * np.sqrt(values[kept])).T
  gram = np.zeros([len(levels)] * 2)
  size = max(1, int(2e7 // (len(levels) * rows.shape[1])))
  starts = range(0, len(rows), size)
  for k, start in enumerate(starts):
    batch = rows[start : start + size].reshape(-1, *shape)
    corrupted = np.stack([np.asarray(corruption(batch, float(v)), np.float64) for v in levels])
    # Differences to the clean images are small where distances are: no cancellation in the Gram.
    corrupted = (corrupted - corrupted[:1]).reshape(len(levels), -1)
    gram += corrupted @ corrupted.T
    if progress:
      progress("distances", k + 1, len(starts))
  squares = np.diag(gram)[:, None] + np.diag(gram)[None, :] - 2 * gram
  return np.sqrt(np.maximum(squares * factor, 0.0))


def _mixes_channels(corruption: Corruption, shape: tuple[int, int, int]) -> bool:
  return int(corruption.operator(corruption.level_range[0], shape).domain_dimension) != (
    shape[0] * shape[1]
  )


def candidate_levels(corruption: Corruption, first: float, last: float, count: int, kind: str,
                     images: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
  """Candidate levels from `first` (clean) to `last`, float64 [count].

  Args:
    kind: "linear" or "geometric" in the level, or "transport": evenly spaced in transport length,
      which puts candidates where the images change (linear candidates are too coarse where the
      corruption sets in: one step there is worth a whole edge).
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
  fine = np.linspace(first, last, 4 * count + 1)
  if first > 0 and last > 0:
    fine = np.unique(np.concatenate([fine, np.geomspace(first, last, 4 * count)]))
    fine = fine if last > first else fine[::-1]
  sample = images[np.linspace(0, len(images) - 1, min(len(images), 64)).astype(int)]
  steps = [0.0]
  before = np.asarray(corruption(sample, float(fine[0])), np.float64)
  for level in fine[1:]:
    after = np.asarray(corruption(sample, float(level)), np.float64)
    steps.append(math.sqrt(np.sum((after - before) ** 2) / len(sample)))
    before = after
  length = np.cumsum(steps)
  if length[-1] <= 0:
    raise ValueError(f"the corruption changes nothing between levels {first:g} and {last:g}")
  levels = np.interp(np.linspace(0, length[-1], count), length, fine)
  levels[0], levels[-1] = first, last
  # A hard mask moves in jumps: candidates inside a jump coincide.
  return np.unique(levels) if last > first else np.unique(levels)[::-1]


def shortest_path(distances: np.ndarray, epsilon: float) -> list[int]:
  """The shortest path from the first node to the last over edges ≤ epsilon; [] if there is none."""
  weights = np.where(distances <= epsilon, distances, 0.0)
  # csgraph reads 0 as "no edge": equal data sets get the smallest positive weight instead.
  tiny = np.finfo(np.float64).tiny
  weights = np.where((distances <= epsilon) & (weights == 0.0), tiny, weights)
  np.fill_diagonal(weights, 0.0)
  length, before = scipy.sparse.csgraph.dijkstra(
    scipy.sparse.csr_matrix(weights), indices=0, return_predecessors=True
  )
  if not np.isfinite(length[-1]):
    return []
  path = [len(distances) - 1]
  while path[-1] != 0:
    path.append(int(before[path[-1]]))
  return path[::-1]


@dataclasses.dataclass(frozen=True)
class Path:
  """A found schedule.

  Attributes:
    levels: from clean to most corrupted.
    steps: W₂ from each level to the next.
    epsilon: the longest edge allowed.
    straight: W₂ from the first level to the last; `steps` sum to at least that.
    nearest: node counts next to the wanted one that some ε gives, when it is not to be had.
  """

  levels: np.ndarray
  steps: np.ndarray
  epsilon: float
  straight: float
  nearest: tuple[int, ...] = ()

  def to_dict(self) -> dict[str, Any]:
    return {
      "levels": [float(v) for v in self.levels],
      "steps": [float(v) for v in self.steps],
      "epsilon": self.epsilon,
      "straight": self.straight,
    }


def find_path(levels: np.ndarray, distances: np.ndarray, nodes: int = 32) -> Path:
  """The shortest path with `nodes` nodes, ε found exactly among the edge weights.

  The node count is a step function of ε that changes only at edge weights, so the search runs over
  the sorted weights: bisection, then a look around, since the count need not fall everywhere.

  Raises:
    ValueError: fewer than 2 nodes asked for, or more than there are candidates.
  """
  if not 2 <= nodes <= len(levels):
    raise ValueError(
      f"a path over {len(levels)} candidate levels can have 2 to {len(levels)} nodes, not {nodes}; "
      "give more candidates or ask for fewer nodes"
    )
  upper = np.triu_indices(len(levels), 1)
  weights = np.unique(distances[upper])
  # No path exists below the largest of the steps that must be bridged: bisect for it first.
  found: dict[int, list[int]] = {}

  def path_at(k: int) -> list[int]:
    if k not in found:
      found[k] = shortest_path(distances, float(weights[k]))
    return found[k]

  low, high = 0, len(weights) - 1
  while low < high:  # smallest ε with a path of at most `nodes` nodes
    middle = (low + high) // 2
    path = path_at(middle)
    if path and len(path) <= nodes:
      high = middle
    else:
      low = middle + 1
  around = [low] + [k for d in range(1, 33) for k in (low - d, low + d) if 0 <= k < len(weights)]
  best, counts = path_at(low), set()
  for k in around:
    path = path_at(k)
    if path:
      counts.add(len(path))
      if abs(len(path) - nodes) < abs(len(best) - nodes):
        best = path
      if len(path) == nodes:
        break
  epsilon = max(float(distances[i, j]) for i, j in itertools.pairwise(best))
  steps = np.array([distances[i, j] for i, j in itertools.pairwise(best)])
  nearest = () if len(best) == nodes else tuple(sorted(counts, key=lambda c: abs(c - nodes))[:2])
  return Path(
    np.asarray(levels, np.float64)[best], steps, epsilon, float(distances[0, -1]), nearest
  )


def find(corruption: Corruption, images: np.ndarray, first: float, last: float, *,
         count: int = 256, nodes: int = 32, candidates: str = "transport",
         progress: Progress | None = None) -> tuple[Path, dict[str, Any]]:  # fmt: skip
  """The schedule of a corruption for a data set, by the closed form (P's setting by default).

  Args:
    images: float [N, H, W, C] in [0, 1].
    first, last: the levels of clean and of most corrupted images.
    count: candidate levels; nodes: levels of the schedule; candidates: see `candidate_levels`.
    progress: called with (what, done, total).

  Returns:
    The path, and what a schedule file says of how it was found.

  Raises:
    NotClosedForm: the closed form does not hold for this corruption.
  """
  levels = candidate_levels(corruption, first, last, count, candidates, images)
  defects = check_closed_form(corruption, levels, images)
  distances = closed_form_distances(corruption, levels, images, progress)
  facts = {
    "corruption": corruption.get_config(),
    "images": len(images),
    "method": "closed_form",
    "candidates": candidates,
    "candidate_levels": len(levels),
    "closed_form_defects": defects,
  }
  return find_path(levels, distances, min(nodes, len(levels))), facts


def mse_matched(corruption: Corruption, images: np.ndarray, first: float, last: float,
                sigma: Callable[[np.ndarray], Any], ve_sigma: Callable[[np.ndarray], Any],
                nodes: int = 32) -> np.ndarray:  # fmt: skip
  """P's natural baseline (Eq. 55): levels whose MSE to the clean image decays as the VE process's.

  With noise, E‖x_0 − x_t‖² = E‖(I − C_t) x_0‖² + d σ_t²; the level at t is where its share of the
  value at t = 1 equals VE's σ_t² / σ_1².

  Args:
    sigma: the noise schedule of the corrupted process; ve_sigma: that of the VE process.

  Returns:
    Levels at `nodes` evenly spaced times, float64.
  """
  fine = candidate_levels(corruption, first, last, 512, "transport", images)
  sample = np.asarray(images[:: max(1, len(images) // 500)], np.float32)
  corrupted = (np.asarray(corruption(sample, float(level)), np.float64) for level in fine)
  mse = np.array([np.mean(np.sum((c - sample) ** 2, axis=(1, 2, 3))) for c in corrupted])
  mse = np.maximum.accumulate(mse)  # a blur's error grows with its level; rounding need not
  t = np.linspace(0, 1, nodes).astype(np.float32)
  noise = sample[0].size * np.asarray(sigma(t), np.float64) ** 2
  ve = np.asarray(ve_sigma(t), np.float64)
  share = (ve / ve[-1]) ** 2
  wanted = share * (mse[-1] + noise[-1]) - noise
  levels = np.interp(np.clip(wanted, mse[0], mse[-1]), mse, fine)
  levels[0], levels[-1] = first, last
  return levels
