"""Nearest neighbours by Euclidean distance, exact, in blocks: memory does not grow with the sets.

Distances come from float64 products of centred rows, so their squares are right to about 1e-15 of
the rows' own squared length.
"""

import numpy as np
import tensorflow as tf

_ROWS, _COLUMNS = 1024, 4096  # a block of distances: 32 MB

_SPEC = tf.TensorSpec([None, None], tf.float64)


@tf.function(input_signature=[_SPEC, _SPEC], autograph=False)
def _squared(x, y):
  """Squared distances [n, m] of rows [n, d] and [m, d]."""
  lengths = tf.reduce_sum(x * x, 1)[:, None] + tf.reduce_sum(y * y, 1)[None]
  return tf.maximum(lengths - 2.0 * tf.matmul(x, y, transpose_b=True), 0.0)


def _blocks(rows, size, centre):
  for start in range(0, len(rows), size):
    part = np.asarray(rows[start : start + size], np.float64).reshape(-1, len(centre))
    yield start, tf.constant(part - centre)


def _flat(rows):
  return rows.reshape(len(rows), -1)


def _centre(rows):
  return np.asarray(rows[:_ROWS], np.float64).mean(axis=0)


def nearest(queries, points, k=1, same=False):
  """The k nearest points of every query.

  Args:
    queries: [n, ...]; points: [m, ...], any dtype.
    same: the two are one set, and no row is its own neighbour.

  Returns:
    Distances float64 [n, k], rising, and the points' indices int64 [n, k].

  Raises:
    ValueError: fewer than k points to choose from.
  """
  if len(points) - same < k:
    raise ValueError(
      f"{k} nearest neighbours asked for, but there are {len(points) - same} others to choose from"
    )
  queries, points = _flat(queries), _flat(points)
  centre = _centre(points)
  distances = np.full([len(queries), k], np.inf)
  indices = np.zeros([len(queries), k], np.int64)
  for row, x in _blocks(queries, _ROWS, centre):
    here = slice(row, row + len(x))
    for column, y in _blocks(points, _COLUMNS, centre):
      found = _squared(x, y)
      if same:
        own = tf.range(row, row + len(x))[:, None] == tf.range(column, column + len(y))[None]
        found = tf.where(own, np.float64(np.inf), found)
      values, places = tf.math.top_k(-found, min(k, len(y)))
      both = np.concatenate([distances[here], -values.numpy()], 1)
      which = np.concatenate([indices[here], places.numpy() + column], 1)
      order = np.argsort(both, axis=1, kind="stable")[:, :k]
      distances[here] = np.take_along_axis(both, order, 1)
      indices[here] = np.take_along_axis(which, order, 1)
  return np.sqrt(distances), indices


def covered(queries, points, radii):
  """Whether each query lies within `radii[j]` of some point j: bool [n]."""
  queries, points = _flat(queries), _flat(points)
  centre = _centre(points)
  squares = np.asarray(radii, np.float64) ** 2
  inside = np.zeros(len(queries), bool)
  for row, x in _blocks(queries, _ROWS, centre):
    for column, y in _blocks(points, _COLUMNS, centre):
      hit = tf.reduce_any(_squared(x, y) <= squares[column : column + len(y)], 1)
      inside[row : row + len(x)] |= hit.numpy()
  return inside


def precision_recall(real, fake, k=3):
  """Precision and recall of Kynkäänniemi et al. 2019 (Algorithm 1).

  A set's manifold is the union of balls around its rows that reach to their k-th neighbour within
  the set. Precision is the share of `fake` rows in the manifold of `real`, recall the other way
  round.
  """
  radii = [nearest(rows, rows, k, same=True)[0][:, -1] for rows in (real, fake)]
  precision = covered(fake, real, radii[0]).mean()
  recall = covered(real, fake, radii[1]).mean()
  return float(precision), float(recall)
