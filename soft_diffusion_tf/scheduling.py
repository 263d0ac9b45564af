"""Choosing corruption levels by optimal transport (P 3.3, App. C).

Candidate levels are nodes of a graph; an edge joins two corrupted data sets whose Wasserstein
distance is at most ε; the schedule is the shortest path from clean to most corrupted, with ε tuned
so that the path has the wanted number of nodes.

The distance is W₂, the square root of the transport cost: with the cost itself as the edge weight
the square of a sum exceeds the sum of squares, and the path takes every candidate at any ε.

`Distances` is the seam between what a distance is and the search for the path. Its answers:

| method      | weight of an edge                                                               |
|-------------|---------------------------------------------------------------------------------|
| closed_form | W₂ = √E‖(C_i − C_j) x_0‖², where C_i x → C_j x is the optimal map (checked)       |
| sinkhorn    | √<P, C> of the entropic coupling P: W₂ for any operators                         |
| divergence  | the root of the debiased Sinkhorn divergence                                     |
| regularised | <P, C> + ε KL(P ‖ a bᵀ), no root: P as printed                                   |
| bures       | W₂ of the Gaussians with the clouds' means and covariances: a lower bound of W₂  |

docs/scheduling.md derives the closed form and compares the methods.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph

from soft_diffusion_tf import __version__, sinkhorn
from soft_diffusion_tf.corruptions import Corruption, as_channels
from soft_diffusion_tf.images import check_range

Array = np.ndarray
Progress = Callable[[str, int, int], None]
CANDIDATES = ("transport", "linear", "geometric")
METHODS = ("closed_form", "sinkhorn", "divergence", "regularised", "bures")
NOISES = ("none", "same", "independent")

# Bytes of corrupted images held at a time: a block of increments, or the clouds last used.
_BLOCK = 2**28
_CACHE = 2**30
# What a reduced basis may cut from the images of a level, as a share of the mean step (root mean
# square r). Both sides of a pair are projected alike, so W₂² is low by at most (2r)² (`Clouds`).
_CUT = 0.015
# Default ε of the entropic problem, as a share of the squared mean step.
_ENTROPIC = 0.02
# Marginal error at which a transport problem counts as solved. What is wrongly placed costs about
# as much as a step, so it moves a squared distance by about that share; more digits would be lost
# on the sampling error, and cost hundreds of iterations where strong blur leaves four dimensions.
_THRESHOLD = 1e-2
_ITERATIONS = 2000
# Price of an edge of the graph, as a share of the longest: above rounding, below what counts.
_TOLL = 1e-6
# What an edge must save, relatively, to be computed in place of one that is known.
_TIE = 1e-3
# Edges that near to ε are computed before a number of nodes is called infeasible.
_NEAR = 0.03
# How far the calibration of estimated distances carries, in candidate levels.
_REACH = 6.0


class NotClosedForm(ValueError):
  """The closed form does not hold for a corruption; the message says which condition fails."""


def _check_images(images: Any) -> Array:
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or len(images) < 2:
    raise ValueError(
      f"scheduling takes at least 2 images [N, H, W, C], got an array of {images.shape}; "
      "take a larger slice"
    )
  check_range(images, "the images to find levels by")
  return images


# --- Operators on many images at once -------------------------------------------------------------


def _roots(corruption: Corruption, images: Array) -> tuple[Array, bool]:
  """Images of which Σ‖C x‖² is E‖C x_0‖² for every C of a family, largest first, in one layout.

  A corruption that treats channels alike needs but the eigen-images of the pixels' second moments:
  H·W of them stand for any number of images, exactly.

  Returns:
    float32 [1, H, W, K] (True) for a corruption that treats channels alike, else [K, H, W, C].
  """
  n, h, w, c = images.shape
  if not corruption.linear:  # only the images themselves will do, and `_weight` takes their mean
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


def _weight(corruption: Corruption, images: Array) -> float:
  """What Σ‖C x‖² over `_roots` is multiplied by: roots of a linear C have their share in them."""
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
  for name, limit in (("asymmetry", 0.05), ("negativity", 0.05), ("commutator", 0.05),
                      ("excess", 0.01)):  # fmt: skip
    if defects[name] > limit:
      raise NotClosedForm(
        f"the closed form does not hold for {type(corruption).__name__} on these images: "
        f"{name} {defects[name]:.2g} exceeds {limit:g}; take --method=sinkhorn"
      )
  return defects


def closed_form_distances(corruption: Corruption, levels: Array, images: Array,
                          progress: Progress | None = None) -> Array:  # fmt: skip
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
  images = _check_images(images)
  roots, alike = _roots(corruption, images)
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
  gram *= _weight(corruption, images)
  sums = np.zeros([len(levels)] * 2)
  sums[1:, 1:] = gram.cumsum(axis=0).cumsum(axis=1)
  squares = np.diag(sums)[:, None] + np.diag(sums)[None, :] - sums - sums.T
  squares = np.maximum((squares + squares.T) / 2, 0.0)
  # Increments of 0 leave rounding of the sums behind: equal data sets are at distance 0.
  return np.where(squares > 1e-13 * squares.max(), np.sqrt(squares), 0.0)


def candidate_levels(corruption: Corruption, first: float, last: float, count: int, kind: str,
                     images: Array | None = None) -> Array:  # fmt: skip
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


# --- Distances: one seam, several answers ---------------------------------------------------------


def _same(one: Any, two: Any) -> bool:
  """Equality, but for the rounding of lists of numbers."""
  if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
    return bool(np.allclose(one, two, rtol=1e-4, atol=1e-6))
  return bool(one == two)


def _brief(value: Any) -> str:
  return str(value) if len(str(value)) <= 60 else str(value)[:57] + "..."


class Journal:
  """Distances on disk, a line each, so that a search that was killed goes on where it was.

  Args:
    path: the file, made when the first distance is written.
    header: what the distances are of; a file of anything else is refused.

  Attributes:
    header: that of the file, if there is one: its numbers may differ from those given by rounding.
    epsilon: of the entropic problem, if it is one; on disk from the first distance on.
  """

  def __init__(self, path: str | pathlib.Path, header: dict[str, Any]) -> None:
    self.path = pathlib.Path(path)
    self.header = json.loads(json.dumps(header))
    self.known: dict[tuple[str, int, int], float] = {}
    self.epsilon: float | None = None
    if not self.path.is_file():
      return
    text = self.path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a line that was cut short counts as not written
    lines = whole.decode("utf-8", "replace").splitlines()
    try:
      found = json.loads(lines[0]) if lines else self.header
      rows = [json.loads(line) for line in lines[1:]]
      self.epsilon = found.pop("sinkhorn_epsilon", None)
      self.known = {(str(part), int(i), int(j)): float(value) for part, i, j, value in rows}
    except (ValueError, TypeError, AttributeError) as error:
      raise ValueError(f"{self.path}: not a file of distances ({error}); delete it") from None
    for key in {**found, **self.header}:
      if not _same(found.get(key), self.header.get(key)):
        raise ValueError(
          f"{self.path} holds distances of another search ({key} differs: "
          f"{_brief(found.get(key))} there, {_brief(self.header.get(key))} here); "
          "delete it or write to another file"
        )
    self.header = found
    if len(whole) < len(text):
      with self.path.open("r+b") as file:
        file.truncate(len(whole))

  def write(self, part: str, i: int, j: int, value: float) -> None:
    """Appends a distance; it is on disk when this returns."""
    self.known[part, i, j] = value
    if not self.path.is_file() or self.path.stat().st_size == 0:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      header = {**self.header, "sinkhorn_epsilon": self.epsilon}
      self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps([part, i, j, value]) + "\n")


class Distances(abc.ABC):
  """Weights of the edges between nodes 0 … count − 1 (candidate levels), each computed once.

  A distance of your own is a subclass with `compute`; everything else follows.

  Attributes:
    count: number of nodes.
    places: int [count, m], where nodes stand in the grid of candidates: on a line unless set. No
      edge leads back along two or more axes.
    known: the weights computed so far, by (i, j) with i < j.
  """

  def __init__(self, count: int) -> None:
    self.count = count
    self.places = np.arange(count)[:, None]
    self.known: dict[tuple[int, int], float] = {}
    self._journal: tuple[Journal, str] | None = None

  @abc.abstractmethod
  def compute(self, i: int, j: int) -> float:
    """The weight of the edge between i and j, i < j."""

  def estimate(self) -> Array:
    """A cheap guess of all weights, float64 [count, count].

    The search computes only the edges on paths that look shortest by it. The default is the
    length along the line of candidates, which takes the distances between neighbours, less a
    little for every candidate that is passed over: a step is never longer than the way along the
    line, and of paths that looked equal the search would keep to the neighbours that it knows.
    """
    steps = self.pairs(itertools.pairwise(range(self.count)))
    along = np.concatenate([[0.0], np.cumsum(steps)])
    node = np.arange(self.count)
    over = np.maximum(np.abs(node[:, None] - node[None, :]) - 1, 0)
    return np.abs(along[:, None] - along[None, :]) * (1 - 0.05 * over / self.count)

  def keep_in(self, journal: Journal, part: str = "") -> None:
    """Takes distances from a journal, and writes new ones to it, under the name `part`."""
    self._journal = journal, part
    self.known.update({(i, j): v for (p, i, j), v in journal.known.items() if p == part})

  def __call__(self, i: int, j: int) -> float:
    if i == j:
      return 0.0
    i, j = min(i, j), max(i, j)
    if (i, j) not in self.known:
      value = float(self.compute(i, j))
      if not math.isfinite(value):
        raise ValueError(f"the distance between candidates {i} and {j} is {value}")
      self.known[i, j] = value
      if self._journal:
        self._journal[0].write(self._journal[1], i, j, value)
    return self.known[i, j]

  def pairs(self, pairs: Any, progress: Progress | None = None) -> Array:
    """The weights of many pairs, float64 [len(pairs)], computed in an order that reuses clouds."""
    pairs = list(pairs)
    missing = sorted({(min(p), max(p)) for p in pairs} - self.known.keys())
    for done, (i, j) in enumerate(missing):
      if progress:
        progress("distances", len(self.known), len(self.known) + len(missing) - done)
      self(i, j)
    if progress and missing:
      progress("distances", len(self.known), len(self.known))
    return np.array([self(i, j) for i, j in pairs])

  def matrix(self) -> Array:
    """All weights known so far, float64 [count, count]; NaN where none is."""
    result = np.full([self.count] * 2, np.nan)
    np.fill_diagonal(result, 0.0)
    for (i, j), value in self.known.items():
      result[i, j] = result[j, i] = value
    return result


class Known(Distances):
  """Distances given as a symmetric matrix; ∞ where no edge may be."""

  def __init__(self, matrix: Array) -> None:
    super().__init__(len(matrix))
    self._matrix = np.asarray(matrix, np.float64)

  def compute(self, i: int, j: int) -> float:
    return float(self._matrix[i, j])

  def estimate(self) -> Array:
    return self._matrix.copy()

  def matrix(self) -> Array:
    return self._matrix.copy()


class Clouds:
  """The corrupted data sets C_k x_0 + σ_k η as points of a Euclidean space, made when asked for.

  Without noise, and for corruptions that treat channels alike, the points are coordinates in a
  common orthogonal basis in which strongly corrupted images come first. A pair of nodes is
  projected on the leading coordinates that both need. If r_i and r_j are the root mean squares of
  what that cuts, the projections P satisfy

      W₂(PX, PY)² ≤ W₂(X, Y)² ≤ W₂(PX, PY)² + (r_i + r_j)²:

  a projection shortens every distance, and the coupling that is optimal for the projections pays
  for the rest at most the last term, by Minkowski's inequality.

  Args:
    levels, sigmas: [L] each, one pair per node; sigmas are 0 without noise.
    images: float [N, H, W, C].
    noise: "none"; "same" (the same η for all nodes, which favours pairing every image with itself:
      it holds other pairs 2σ²d farther apart); "independent" (adds about 2σ²d to all costs).
    cut: largest root mean square that the reduced basis may cut from a node; 0 keeps the pixels.
  """

  def __init__(self, corruption: Corruption, levels: Array, sigmas: Array, images: Array,
               noise: str = "none", seed: int = 0, cut: float = 0.0) -> None:  # fmt: skip
    if noise not in NOISES:
      raise ValueError(f"unknown noise {noise!r}; choose one of {', '.join(NOISES)}")
    self.corruption, self.noise, self.seed, self.cut = corruption, noise, seed, cut
    self.images = _check_images(images)
    self.levels = np.asarray(levels, np.float64)
    self.sigmas = np.zeros_like(self.levels) if noise == "none" else np.asarray(sigmas, np.float64)
    self.dimension = int(np.prod(self.images.shape[1:]))
    self._cache: collections.OrderedDict[int, Array] = collections.OrderedDict()
    self._ranks: dict[int, int] = {}

  def __len__(self) -> int:
    return len(self.levels)

  @functools.cached_property
  def _basis(self) -> Array | None:
    if self.cut <= 0 or self.noise != "none":
      return None
    roots, alike = _roots(self.corruption, self.images)
    if not alike:
      return None
    pixels = roots.shape[1] * roots.shape[2]
    moments = np.zeros([pixels] * 2)
    # What little the strong corruptions leave must not drown in what the weak ones leave.
    for k, weight in zip(np.linspace(0, len(self) - 1, 9).astype(int), np.geomspace(1, 1e4, 9)):
      part = np.asarray(self.corruption(roots, self.levels[k])).reshape(pixels, -1)
      moments += weight * (part @ part.T)
    return np.linalg.eigh(moments)[1].astype(np.float32)

  def _make(self, k: int, rank: int) -> Array:
    """Points of node k with at least `rank` coordinates per channel, if there are as many."""
    level, n = float(self.levels[k]), len(self.images)
    parts = [self.corruption(self.images[s : s + 1024], level) for s in range(0, n, 1024)]
    corrupted = np.concatenate([np.asarray(part) for part in parts])
    if self._basis is None:
      points = corrupted.reshape(n, -1)
      self._ranks[k] = points.shape[1]
      if self.noise != "none":
        key = [self.seed, 0 if self.noise == "same" else k + 1]
        eta = np.random.default_rng(key).standard_normal(points.shape, np.float32)
        points = points + np.float32(self.sigmas[k]) * eta
      return points
    c = corrupted.shape[3]
    rows = np.moveaxis(corrupted, 3, 1).reshape(n * c, -1) @ self._basis
    if k not in self._ranks:
      energy = np.einsum("ij,ij->j", rows, rows, dtype=np.float64) / n
      weak = int(np.searchsorted(np.cumsum(energy), self.cut**2, side="right"))
      self._ranks[k] = max(1, len(energy) - weak)
    kept = max(rank, math.ceil(1.25 * self._ranks[k]))  # some more, for the partners of other pairs
    # Weak coordinates stay first: float32 sums that begin with large terms would lose small ones.
    points = rows.reshape(n, c, -1)[:, :, -kept:].swapaxes(1, 2)
    return np.ascontiguousarray(points).reshape(n, -1)

  def _points(self, k: int, rank: int = 0) -> Array:
    channels = 1 if self._basis is None else self.images.shape[3]
    full = self.dimension // channels
    if k not in self._cache or self._cache[k].shape[1] < min(rank, full) * channels:
      self._cache[k] = self._make(k, rank)
    self._cache.move_to_end(k)
    while len(self._cache) > 2 and sum(p.nbytes for p in self._cache.values()) > _CACHE:
      self._cache.popitem(last=False)
    return self._cache[k]

  def __call__(self, *nodes: int) -> list[Array]:
    """Points of nodes in one space, float32 [N, ·] each."""
    for k in nodes:
      self._points(k)
    rank = max(self._ranks[k] for k in nodes)
    size = rank * (1 if self._basis is None else self.images.shape[3])
    return [self._points(k, rank)[:, -size:] for k in nodes]

  def paired(self, by_level: Array | None = None) -> Array:
    """Root mean square distance of each image from itself between all nodes, float64 [L, L].

    Args:
      by_level: `closed_form_distances` of the levels, where known.
    """
    if by_level is None:
      by_level = closed_form_distances(self.corruption, self.levels, self.images)
    one, two = self.sigmas[:, None], self.sigmas[None, :]
    noise = (one - two) ** 2 if self.noise == "same" else one**2 + two**2
    squares = by_level**2 + self.dimension * noise
    np.fill_diagonal(squares, 0.0)
    return np.sqrt(squares)


class Sinkhorn(Distances):
  """Distances by entropic optimal transport between the clouds.

  Potentials start from those of pairing each image with itself, which are exact where the closed
  form holds (Brenier); with `neighbours` the correction that the nearest solved pair needed is
  added.

  Args:
    clouds: the corrupted data sets.
    paired: `clouds.paired()`, from which edges worth solving are guessed.
    method: "sinkhorn", "divergence" or "regularised" (see the module's text).
    epsilon: ε of the entropic problem, in units of the squared distance.
    neighbours: for operators where pairing each image with itself is not optimal.
    warm: False starts every problem anew.
    threshold: L1 error of the marginals at which a problem counts as solved.
  """

  def __init__(self, clouds: Clouds, paired: Array, method: str = "sinkhorn", *, epsilon: float,
               neighbours: bool = False, warm: bool = True,
               threshold: float = _THRESHOLD) -> None:  # fmt: skip
    super().__init__(len(clouds))
    self.clouds, self.method, self.epsilon = clouds, method, epsilon
    self.warm, self.neighbours, self.threshold = warm, neighbours, threshold
    self.iterations: list[int] = []
    self._paired = paired
    self._corrections: dict[tuple[int, int], Array] = {}
    self._selves: dict[int, float] = {}

  def estimate(self) -> Array:
    if self.method != "regularised":
      return self._paired.copy()
    # Pairing every image with itself has the relative entropy log n.
    return self._paired**2 + self.epsilon * math.log(len(self.clouds.images))

  def _solve(self, i: int, j: int, x: Array, y: Array | None,
             init: tuple[Any, Any] | None) -> sinkhorn.SinkhornResult:  # fmt: skip
    options = {
      "epsilon": self.epsilon, "threshold": self.threshold, "max_iterations": _ITERATIONS
    }  # fmt: skip
    try:
      result = sinkhorn.sinkhorn(x, y, init=init, **options)
      if not bool(result.converged):  # from far away, by way of larger ε
        result = sinkhorn.sinkhorn(x, y, scaling=0.5, **options)
    except ValueError as error:
      raise ValueError(f"{error} (--sinkhorn_epsilon)") from None
    if not bool(result.converged):
      raise ValueError(
        f"Sinkhorn between candidates {i} and {j} stopped after {int(result.iterations)} "
        f"iterations at a marginal error of {float(result.error):.2g}; take a larger "
        f"--sinkhorn_epsilon than {self.epsilon:.3g}"
      )
    self.iterations.append(int(result.iterations))
    return result

  def _nearest(self, i: int, j: int) -> Array | None:
    """The correction to the potentials of y that the nearest solved pair needed."""
    if not self._corrections:
      return None
    solved = list(self._corrections)
    place = np.concatenate([self.places[i], self.places[j]])
    theirs = np.array([np.concatenate([self.places[a], self.places[b]]) for a, b in solved])
    return self._corrections[solved[int(np.argmin(np.sum((theirs - place) ** 2, axis=1)))]]

  def _self(self, k: int) -> float:
    """The regularised cost of node k with itself."""
    if k not in self._selves:
      (x,) = self.clouds(k)
      self._selves[k] = float(self._solve(k, k, x, None, None).reg_ot_cost)
    return self._selves[k]

  def compute(self, i: int, j: int) -> float:
    x, y = self.clouds(i, j)
    init = None
    if self.warm:
      f, g = sinkhorn.identity_potentials(x, y, epsilon=self.epsilon)
      start = g.numpy()
      correction = self._nearest(i, j) if self.neighbours else None
      init = (f, start if correction is None else start + correction)
    result = self._solve(i, j, x, y, init)
    if self.warm and self.neighbours:
      self._corrections[i, j] = result.g.numpy() - start
    if self.method == "regularised":
      return float(result.reg_ot_cost)
    square = float(result.transport_cost) + float(result.missed_cost)
    if self.method == "divergence":
      square = float(result.reg_ot_cost) - (self._self(i) + self._self(j)) / 2
    return math.sqrt(max(square, 0.0))


class Bures(Distances):
  """W₂ of the Gaussians fitted to the clouds (Dowson & Landau 1982): W₂ itself is never below.

  With A_k Aᵀ_k the covariance of node k, the cross term is the nuclear norm of A_iᵀ A_j; A comes
  from a QR decomposition of the centred points, so covariances are never squared.
  """

  def __init__(self, clouds: Clouds, paired: Array) -> None:
    super().__init__(len(clouds))
    self.clouds, self._paired = clouds, paired

  def estimate(self) -> Array:
    return self._paired.copy()

  def compute(self, i: int, j: int) -> float:
    square, roots, means = 0.0, [], []
    for points in self.clouds(i, j):
      points = points.astype(np.float64)
      means.append(points.mean(axis=0))
      root: Array = np.linalg.qr(points - means[-1], mode="r")  # type: ignore[assignment]
      roots.append(root / math.sqrt(len(points)))
      square += float(np.sum(roots[-1] ** 2))
    cross = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    square += float(np.sum((means[0] - means[1]) ** 2)) - 2 * cross
    return math.sqrt(max(square, 0.0))


# --- The path -------------------------------------------------------------------------------------


def shortest_path(distances: Array, epsilon: float) -> list[int]:
  """The shortest path from the first node to the last over edges ≤ epsilon; [] if there is none.

  Args:
    distances: weights [L, L] from row to column; ∞ where no edge may be.
  """
  there = distances <= epsilon
  np.fill_diagonal(there, False)
  rows, columns = np.nonzero(there)
  weights = distances[rows, columns]
  # Where data sets lie on a straight line (scaling, a fading mask) any subdivision is as short as
  # the whole: a toll per edge makes long edges win. It also joins equal data sets: csgraph reads 0
  # as "no edge".
  weights = weights + max(_TOLL * float(np.max(weights, initial=0.0)), np.finfo(np.float64).tiny)
  graph = scipy.sparse.csr_matrix((weights, (rows, columns)), shape=distances.shape)
  length, before = scipy.sparse.csgraph.dijkstra(graph, indices=0, return_predecessors=True)
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
    steps: the weight of the edge from each level to the next.
    epsilon: the longest edge allowed.
    straight: the weight from the first level to the last; lengths of metrics sum to at least that.
    nearest: node counts next to the wanted one that some ε gives, when it is not to be had.
    sigmas: σ at each level, of a joint schedule.
    indices: the candidates on the path.
    deviation: how far estimates of edges were off, relatively, once the search had learned to
      correct them: the path is at most about that share (and 0.1 %) longer than the shortest. 0
      when all edges were known.
    evaluated: the number of edges computed.
  """

  levels: Array
  steps: Array
  epsilon: float
  straight: float
  nearest: tuple[int, ...] = ()
  sigmas: Array | None = None
  indices: tuple[int, ...] = ()
  deviation: float = 0.0
  evaluated: int = 0

  def to_dict(self) -> dict[str, Any]:
    """What a schedule file holds of the path; see `schedules.load_levels`."""
    content: dict[str, Any] = {"levels": [float(v) for v in self.levels]}
    if self.sigmas is not None:
      content["sigmas"] = [float(v) for v in self.sigmas]
    if self.nearest:
      content["nearest"] = list(self.nearest)
    return {
      **content,
      "steps": [float(v) for v in self.steps],
      "epsilon": self.epsilon,
      "straight": self.straight,
      "edges": self.evaluated,
      "deviation": self.deviation,
    }


def _tune(distances: Array, nodes: int) -> tuple[list[int], tuple[int, ...]]:
  """The path at the smallest ε that gives at most `nodes` nodes, or exactly as many if any does.

  The node count is a step function of ε that changes only at edge weights, so the search runs over
  the sorted weights: bisection, then a look around, since the count need not fall everywhere.

  Returns:
    The path, and the feasible counts nearest to `nodes` when it has another.
  """
  weights = np.unique(distances[~np.eye(len(distances), dtype=bool)])
  weights = weights[np.isfinite(weights)]
  if not len(weights):
    return [], ()
  found: dict[int, list[int]] = {}

  def path_at(k: int) -> list[int]:
    if k not in found:
      found[k] = shortest_path(distances, float(weights[k]))
    return found[k]

  low, high = 0, len(weights) - 1
  while low < high:
    middle = (low + high) // 2
    path = path_at(middle)
    if path and len(path) <= nodes:
      high = middle
    else:
      low = middle + 1
  best, counts = path_at(low), set()
  for k in [low, *(k for d in range(1, 33) for k in (low - d, low + d))]:
    path = path_at(k) if 0 <= k < len(weights) else []
    if path:
      counts.add(len(path))
      if abs(len(path) - nodes) < abs(len(best) - nodes):
        best = path
    if len(best) == nodes:
      return best, ()
  return best, tuple(sorted(counts, key=lambda c: abs(c - nodes))[:2])


def _calibrated(distances: Distances, guess: Array) -> Array:
  """The guess, corrected where edges have been computed, and by their ratio to it nearby.

  Guesses are a little dear, so that the search does not leave computed edges for equal ones.
  """
  known = {pair: v for pair, v in distances.known.items() if v > 0 and guess[pair] > 0}
  result = guess * (1 + _TIE)
  if known:
    i, j = np.array(list(known)).T
    ratios = np.log(np.array(list(known.values())) / guess[i, j])
    # Edges much longer than the longest step of a path are never on one.
    rows, columns = np.nonzero(np.triu(guess <= 4 * np.median(list(known.values())), 1))
    place = distances.places / _REACH
    total, weight = np.zeros(len(rows)), np.full(len(rows), 1e-12)
    for a, b, ratio in zip(i, j, ratios):
      square = np.sum((place[rows] - place[a]) ** 2 + (place[columns] - place[b]) ** 2, axis=1)
      kernel = 1 / (1 + square) ** 2
      total += kernel * ratio
      weight += kernel
    factor = np.exp(total / weight)
    result[rows, columns] *= factor
    back = np.isfinite(result[columns, rows])
    result[columns[back], rows[back]] *= factor[back]
  for (a, b), value in distances.known.items():
    for pair in ((a, b), (b, a)):
      if np.isfinite(guess[pair]):
        result[pair] = value
  return result


def find_path(levels: Array, distances: Array | Distances, nodes: int = 32,
              progress: Progress | None = None) -> Path:  # fmt: skip
  """The shortest path with `nodes` nodes, ε found exactly among the edge weights.

  Of `Distances` only those edges are computed that lie on a path that looks shortest by their
  estimates, which are corrected by what was computed; it ends when all edges of the path are known.

  Args:
    levels: [L] candidates.
    distances: a matrix [L, L], or `Distances` of L nodes.

  Raises:
    ValueError: fewer than 2 nodes asked for, or more than there are candidates.
  """
  if not 2 <= nodes <= len(levels):
    raise ValueError(
      f"a path over {len(levels)} candidate levels can have 2 to {len(levels)} nodes, not {nodes}; "
      "give more candidates or ask for fewer nodes"
    )
  if not isinstance(distances, Distances):
    distances = Known(distances)
  guess = distances.estimate()
  place = distances.places
  if place.shape[1] > 1:  # both the corruption and the noise of a joint schedule may only rise
    guess[~np.all(place[:, None] <= place[None, :], axis=2)] = np.inf
  exact = isinstance(distances, Known)
  deviation = 0.0
  for turn in itertools.count():
    weights = guess if exact else _calibrated(distances, guess)
    path, nearest = _tune(weights, nodes)
    if not path:
      raise ValueError(
        "no path leads from the first candidate level to the last, for too few distances are "
        "finite; give candidates whose distances are finite"
      )
    edges = [(min(e), max(e)) for e in itertools.pairwise(path)]
    if exact:
      break
    missing = [e for e in edges if e not in distances.known]
    if nearest and not missing:
      # Estimates must not decide that a count is not to be had: those near ε do.
      longest = max(distances(*e) for e in edges)
      near = np.argwhere(np.triu(np.abs(weights - longest) <= _NEAR * longest, 1))
      missing = [(int(i), int(j)) for i, j in near if (int(i), int(j)) not in distances.known]
    if not missing:
      break
    values = distances.pairs(missing, progress)
    if turn:
      expected = np.array([weights[e] for e in missing]) / (1 + _TIE)
      deviation = max(deviation, float(np.max(np.abs(expected / np.maximum(values, 1e-30) - 1))))
  steps = distances.pairs(edges)
  return Path(
    np.asarray(levels, np.float64)[path], steps, float(steps.max()),
    distances(0, distances.count - 1), nearest, None, tuple(path), deviation,
    len(distances.known) if not exact else distances.count * (distances.count - 1) // 2,
  )  # fmt: skip


# --- From images to a schedule --------------------------------------------------------------------


def shift(one: Array, two: Array, levels: Array) -> float:
  """The largest difference of two schedules at equal times, counted in steps of `levels`."""
  t = np.linspace(0, 1, 1001)
  sign = np.sign(levels[-1] - levels[0])  # np.interp wants rising abscissae
  step = np.arange(len(levels))

  def steps(path: Array) -> Array:
    values = np.interp(t, np.linspace(0, 1, len(path)), path)
    return np.interp(sign * values, sign * levels, step)

  return float(np.max(np.abs(steps(one) - steps(two))))


def measure(method: str, corruption: Corruption, levels: Array, images: Array, *,
            sigmas: Array | None = None, noise: str = "none", nodes: int = 32, seed: int = 0,
            epsilon: float | None = None,
            progress: Progress | None = None) -> tuple[Distances, dict[str, Any]]:  # fmt: skip
  """Distances of a method between corrupted data sets, and what a schedule file says of them.

  Args:
    method: one of `METHODS`.
    levels, sigmas: the candidates: a level and the σ of the noise on it (by `noise`, see `Clouds`).
      The closed form pairs each image with itself.
    nodes: of the schedule that is sought: sets the scale of what may be cut, and of ε.
    epsilon: of the entropic problem; None for 2 % of the squared mean step of a straight path of
      `nodes` nodes, or what float32 resolves if that is more.

  Raises:
    NotClosedForm: method "closed_form" for a corruption for which it does not hold.
    ValueError: unknown method or noise, NaN in images, fewer than 2 images.
  """
  if method not in METHODS:
    raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
  images = _check_images(images)
  facts: dict[str, Any] = {"method": method, "images": len(images), "noise": noise}
  line, row = np.unique(levels, return_inverse=True)  # a grid has every level many times
  if levels[-1] < levels[0]:
    line, row = line[::-1], len(line) - 1 - row
  commute = True
  try:
    facts["closed_form_defects"] = check_closed_form(corruption, line, images)
  except NotClosedForm:
    if method == "closed_form":
      raise
    commute = False
  by_level = closed_form_distances(corruption, line, images, progress)[np.ix_(row, row)]
  clouds = Clouds(corruption, levels, np.zeros(len(levels)) if sigmas is None else sigmas, images,
                  noise, seed)  # fmt: skip
  paired = clouds.paired(by_level)
  if method == "closed_form":
    return Known(paired), facts
  step = float(paired[0, -1]) / max(1, nodes - 1)
  clouds.cut = _CUT * step
  facts["cut"] = clouds.cut
  if method == "bures":
    return Bures(clouds, paired), facts
  if epsilon is None:
    centred = images.reshape(len(images), -1) - images.reshape(len(images), -1).mean(axis=0)
    largest = 4 * float(np.max(np.einsum("ij,ij->i", centred, centred)))
    largest += 4 * clouds.dimension * 1.5 * float(np.max(clouds.sigmas)) ** 2
    epsilon = max(_ENTROPIC * step**2, 25 * largest * float(np.finfo(np.float32).eps))
  facts["sinkhorn_epsilon"] = epsilon
  return Sinkhorn(clouds, paired, method, epsilon=epsilon, neighbours=not commute), facts


class Found(NamedTuple):
  """Everything that a search gives: `facts` are what a schedule file says of how it was found."""

  path: Path
  facts: dict[str, Any]
  candidates: Array  # [L], or [L, 2] with σ
  distances: Distances


def search(corruption: Corruption, images: Array, first: float, last: float, *,
           count: int = 256, nodes: int = 32, candidates: str = "transport",
           method: str = "closed_form", noise: str = "none", sigma: float = 0.0,
           sigmas: tuple[float, float, int] | None = None, epsilon: float | None = None,
           seed: int = 0, halves: bool = False, journal: str | pathlib.Path | None = None,
           progress: Progress | None = None) -> Found:  # fmt: skip
  """Finds the schedule of a corruption for a data set (P's setting by default).

  Args:
    images: float [N, H, W, C] in [0, 1].
    first, last: the levels of clean and of most corrupted images.
    count: candidate levels; nodes: levels of the schedule; candidates: see `candidate_levels`.
    method: one of `METHODS`.
    noise: see `Clouds`; sigma: its σ at all levels.
    sigmas: (first, last, count) of σ for a joint schedule: candidates are a grid of levels and σ
      (even in σ, which is even in transport length), and the path runs from (first, σ first) to
      (last, σ last), with both rising. Noise is then "same" unless said otherwise.
    epsilon: see `measure`. seed: of the noise.
    halves: also find the schedule on either half of the images, and report how far the two are
      apart: "sensitivity", the largest difference at equal times, in steps of the schedule.
    journal: file of distances to go on from, and to write to (not for the closed form).
    progress: called with (what, done, total).

  Raises:
    NotClosedForm: method "closed_form" for a corruption for which it does not hold.
  """
  images = _check_images(images)
  if halves and len(images) < 4:
    raise ValueError(f"two halves need at least 4 images, got {len(images)}; take a larger slice")
  line = candidate_levels(corruption, first, last, count, candidates, images)
  log: Journal | None = None
  if journal is not None and method != "closed_form":
    # Sums of many threads differ in their last digits from run to run, so a search that goes on
    # keeps the candidates, and the ε, that it began with.
    log = Journal(journal, {
      "version": __version__, "corruption": corruption.get_config(), "method": method,
      "noise": noise, "sigma": sigma, "sigmas": sigmas, "seed": seed, "nodes": nodes,
      "epsilon": epsilon, "candidates": line.tolist(),
      "images": hashlib.sha256(images.tobytes()).hexdigest()[:16],
    })  # fmt: skip
    line = np.array(log.header["candidates"])
    epsilon = log.epsilon if log.epsilon is not None else epsilon
  grid = line
  levels, noises = line, np.full(len(line), sigma)
  places = np.arange(len(line))[:, None]
  if sigmas is not None:
    noise = "same" if noise == "none" else noise
    noises = np.linspace(*sigmas)
    places = np.argwhere(np.ones([len(line), len(noises)], bool))
    levels, noises = line[places[:, 0]], noises[places[:, 1]]
    grid = np.stack([levels, noises], axis=1)
  wanted = min(nodes, len(levels))

  def distances_of(part: str, chosen: Array) -> tuple[Distances, dict[str, Any]]:
    found, facts = measure(method, corruption, levels, chosen, sigmas=noises, noise=noise,
                           nodes=nodes, seed=seed, epsilon=epsilon, progress=progress)  # fmt: skip
    found.places = places
    if log is not None:
      log.epsilon = facts.get("sinkhorn_epsilon")
      found.keep_in(log, part)
    return found, facts

  distances, facts = distances_of("all", images)
  path = find_path(levels, distances, wanted, progress)
  if wanted < nodes and not path.nearest:
    path = dataclasses.replace(path, nearest=(len(path.levels),))
  if sigmas is not None:
    path = dataclasses.replace(path, sigmas=noises[list(path.indices)])
  facts = {
    "corruption": corruption.get_config(), "candidates": candidates,
    "candidate_levels": len(line), "seed": seed, "version": __version__, **facts,
  }  # fmt: skip
  if noise != "none" and sigmas is None:
    facts["sigma"] = sigma
  if sigmas is not None:
    facts["candidate_sigmas"] = sigmas[2]
  if halves and sigmas is None:
    epsilon = facts.get("sinkhorn_epsilon")
    one, two = (
      find_path(levels, distances_of(f"half {k}", images[k::2])[0], wanted, progress).levels
      for k in range(2)
    )
    facts["sensitivity"] = shift(one, two, path.levels)
  return Found(path, facts, grid, distances)


def find(corruption: Corruption, images: Array, first: float, last: float,
         **options: Any) -> tuple[Path, dict[str, Any]]:  # fmt: skip
  """The path that `search` finds with the same arguments, and what a schedule file says of it."""
  return search(corruption, images, first, last, **options)[:2]


def mse_matched(corruption: Corruption, images: Array, first: float, last: float,
                sigma: Callable[[Array], Any], ve_sigma: Callable[[Array], Any],
                nodes: int = 32) -> Array:  # fmt: skip
  """P's natural baseline (Eq. 55): levels whose MSE to the clean image decays as the VE process's.

  With noise, E‖x_0 − x_t‖² = E‖(I − C_t) x_0‖² + d σ_t²; the level at t is where its share of the
  value at t = 1 equals VE's σ_t² / σ_1².

  Args:
    sigma: the noise schedule of the corrupted process; ve_sigma: that of the VE process.

  Returns:
    Levels at `nodes` evenly spaced times, float64.
  """
  images = _check_images(images)
  fine = candidate_levels(corruption, first, last, 512, "transport", images)
  roots, _ = _roots(corruption, images)
  gaps = (np.asarray(corruption(roots, float(level))).ravel() - roots.ravel() for level in fine)
  mse = np.array([float(gap @ gap) for gap in gaps]) * _weight(corruption, images)
  mse = np.maximum.accumulate(mse)  # a blur's error grows with its level; rounding need not
  t = np.linspace(0, 1, nodes).astype(np.float32)
  noise = images[0].size * np.asarray(sigma(t), np.float64) ** 2
  ve = np.asarray(ve_sigma(t), np.float64)
  share = (ve / ve[-1]) ** 2
  wanted = share * (mse[-1] + noise[-1]) - noise
  levels = np.interp(np.clip(wanted, mse[0], mse[-1]), mse, fine)
  levels[0], levels[-1] = first, last
  return levels
