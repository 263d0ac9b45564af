"""The shortest path from clean to most corrupted, with edges no longer than ε."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse.csgraph

from soft_diffusion_tf.transport.distances import Distances, Known
from soft_diffusion_tf.transport.operators import Array, Progress

# Price of an edge of the graph, as a share of the longest: above rounding, below what counts.
_TOLL = 1e-6
# What an edge must save, relatively, to be computed in place of one that is known.
_TIE = 1e-3
# Edges that near to ε are computed before a number of nodes is called infeasible.
_NEAR = 0.03
# How far the calibration of estimated distances carries, in candidate levels.
_REACH = 6.0


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


def find_path(
  levels: Array, distances: Array | Distances, nodes: int = 32, progress: Progress | None = None
) -> Path:
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
    np.asarray(levels, np.float64)[path],
    steps,
    float(steps.max()),
    distances(0, distances.count - 1),
    nearest,
    None,
    tuple(path),
    deviation,
    len(distances.known) if not exact else distances.count * (distances.count - 1) // 2,
  )
