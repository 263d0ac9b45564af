"""Wasserstein distances between corrupted data sets: one seam, several answers."""

from __future__ import annotations

import abc
import collections
import functools
import itertools
import json
import math
import pathlib
from typing import Any

import numpy as np

from soft_diffusion_tf.corruptions import Corruption
from soft_diffusion_tf.transport import sinkhorn
from soft_diffusion_tf.transport.operators import (
  Array,
  Progress,
  check_images,
  closed_form_distances,
  roots_of,
)

NOISES = ("none", "same", "independent")
_CACHE = 2**30
# Marginal error at which a transport problem counts as solved. What is wrongly placed costs about
# as much as a step, so it moves a squared distance by about that share; more digits would be lost
# on the sampling error, and cost hundreds of iterations where strong blur leaves four dimensions.
_THRESHOLD = 1e-2
_ITERATIONS = 2000


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

  def __init__(
    self,
    corruption: Corruption,
    levels: Array,
    sigmas: Array,
    images: Array,
    noise: str = "none",
    seed: int = 0,
    cut: float = 0.0,
  ) -> None:
    if noise not in NOISES:
      raise ValueError(f"unknown noise {noise!r}; choose one of {', '.join(NOISES)}")
    self.corruption, self.noise, self.seed, self.cut = corruption, noise, seed, cut
    self.images = check_images(images)
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
    roots, alike = roots_of(self.corruption, self.images)
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

  def __init__(
    self,
    clouds: Clouds,
    paired: Array,
    method: str = "sinkhorn",
    *,
    epsilon: float,
    neighbours: bool = False,
    warm: bool = True,
    threshold: float = _THRESHOLD,
  ) -> None:
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

  def _solve(
    self, i: int, j: int, x: Array, y: Array | None, init: tuple[Any, Any] | None
  ) -> sinkhorn.SinkhornResult:
    options = {"epsilon": self.epsilon, "threshold": self.threshold, "max_iterations": _ITERATIONS}
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
