"""Against brute force over all differences, which shares nothing with the blocked products."""

import numpy as np
import pytest

from soft_diffusion_tf import neighbours


def all_distances(x, y):
  x, y = x.reshape(len(x), -1).astype(float), y.reshape(len(y), -1).astype(float)
  return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def brute_precision_recall(real, fake, k):
  def inside(queries, points):
    own = np.sort(all_distances(points, points), axis=1)[:, k]  # column 0 is the point itself
    return (all_distances(queries, points) <= own[None]).any(1).mean()

  return inside(fake, real), inside(real, fake)


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(neighbours, "_ROWS", 7)
  monkeypatch.setattr(neighbours, "_COLUMNS", 5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_nearest_over_block_borders(k, small_blocks, rng):
  x, y = rng.standard_normal([30, 4, 2]), rng.standard_normal([23, 4, 2]) + 100.0
  distances, indices = neighbours.nearest(x + 100.0, y, k)
  want = all_distances(x + 100.0, y)
  np.testing.assert_array_equal(indices, np.argsort(want, axis=1)[:, :k])
  np.testing.assert_allclose(distances, np.sort(want, axis=1)[:, :k], rtol=1e-9)


def test_no_row_is_its_own_neighbour_but_a_copy_of_it_is(small_blocks, rng):
  x = rng.standard_normal([20, 3])
  x[13] = x[2]
  distances, indices = neighbours.nearest(x, x, 2, same=True)
  assert (indices != np.arange(20)[:, None]).all()
  assert indices[2, 0] == 13
  assert indices[13, 0] == 2
  # Products of rows of length √3 are right to 1e-16, so a distance of 0 is right to its root.
  assert distances[2, 0] < 1e-7
  with pytest.raises(ValueError, match="3 nearest neighbours asked for, but there are 2"):
    neighbours.nearest(x[:3], x[:3], 3, same=True)


@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0])
def test_precision_and_recall_are_the_printed_algorithm(shift, small_blocks, rng):
  real, fake = rng.standard_normal([60, 5]), 0.6 * rng.standard_normal([45, 5]) + shift
  got = neighbours.precision_recall(real.astype(np.float32), fake.astype(np.float32), 3)
  want = brute_precision_recall(real.astype(np.float32), fake.astype(np.float32), 3)
  assert got == pytest.approx(want, abs=1e-12)


def test_precision_and_recall_at_the_ends(rng):
  real = rng.standard_normal([50, 3])
  assert neighbours.precision_recall(real, real, 3) == (1.0, 1.0)
  assert neighbours.precision_recall(real, real + 100.0, 3) == (0.0, 0.0)
  # One mode of two, well hit: precise, but half of the real images are missed.
  two = np.concatenate([real, real + 100.0])
  precision, recall = neighbours.precision_recall(two, real, 3)
  assert precision == 1.0
  assert recall == 0.5
