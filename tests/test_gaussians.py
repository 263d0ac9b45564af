import numpy as np
import pytest
import scipy.linalg

from soft_diffusion_tf import gaussians


def test_moments_in_batches_equal_numpy(rng):
  rows = rng.standard_normal([1000, 7]).astype(np.float32) + 1000.0
  moments = gaussians.Moments()
  for part in np.array_split(rows, 9):
    moments.update(part)
  moments.update(rows[:0])  # nothing is nothing
  assert moments.count == 1000
  np.testing.assert_allclose(moments.mean, rows.astype(float).mean(0), rtol=1e-12)
  # An offset of 1000 times the spread costs nothing: float64 has 16 digits and none cancel.
  want = np.cov(rows.astype(float), rowvar=False)
  np.testing.assert_allclose(moments.covariance, want, rtol=1e-10, atol=1e-12)


def test_moments_of_two_sets_together(rng):
  rows = rng.standard_normal([50, 4]) + np.arange(4)
  one, two = gaussians.Moments().update(rows[:20]), gaussians.Moments().update(rows[20:])
  before = one.mean.copy(), one.scatter.copy()
  both = one + two
  np.testing.assert_allclose(both.mean, rows.mean(0), rtol=1e-12)
  np.testing.assert_allclose(both.covariance, np.cov(rows, rowvar=False), atol=1e-12)
  np.testing.assert_array_equal(one.mean, before[0])
  np.testing.assert_array_equal(one.scatter, before[1])
  empty = gaussians.Moments() + one
  np.testing.assert_array_equal(empty.covariance, one.covariance)


def test_frechet_against_scipys_matrix_root(rng):
  a, b = rng.standard_normal([2, 9, 9])
  s_1, s_2 = a @ a.T, b @ b.T
  m_1, m_2 = rng.standard_normal([2, 9])
  root = scipy.linalg.sqrtm(s_1 @ s_2)
  want = np.sum((m_1 - m_2) ** 2) + np.trace(s_1 + s_2 - 2 * root.real)
  assert gaussians.frechet_distance(m_1, s_1, m_2, s_2) == pytest.approx(want, rel=1e-9)


def test_frechet_of_commuting_and_singular_covariances():
  assert gaussians.frechet_distance([0, 0], np.diag([4.0, 0]), [3, 0], np.diag([1.0, 0])) == (
    pytest.approx(9 + 1)
  )
  assert gaussians.frechet_distance([1], [[2.0]], [1], [[2.0]]) == pytest.approx(0, abs=1e-12)


def test_refusals():
  with pytest.raises(ValueError, match="NaN"):
    gaussians.Moments().update(np.array([[np.nan]]))
  with pytest.raises(ValueError, match="at least 2 rows"):
    _ = gaussians.Moments().update(np.zeros([1, 2])).covariance
  with pytest.raises(ValueError, match="of 2 and of 3 values"):
    gaussians.Moments().update(np.zeros([1, 2])).update(np.zeros([1, 3]))


@pytest.mark.parametrize("count", [2, 3, 40, 64, 640])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 255.0])
def test_where_a_covariance_loses_rank(count, scale, rng):
  """Rows of 64 values, fewer of them than values or more: a shift alone is known exactly."""
  rows = scale * rng.random((count, 64))
  same = gaussians.frechet_between(rows, rows[rng.permutation(count)])
  trace = np.trace(gaussians.Moments().update(rows).covariance)
  assert 0 <= same <= 1e-14 * trace
  shifted = gaussians.frechet_between(rows, rows + 0.1 * scale)
  assert shifted == pytest.approx(0.64 * scale**2, rel=1e-12)
  # Rows times a are a Gaussian's with a root times a: the distance is (1 − a)² of the trace.
  centred = rows - rows.mean(0)
  assert gaussians.frechet_between(centred, 0.9 * centred) == pytest.approx(0.01 * trace, rel=1e-10)


@pytest.mark.parametrize("count", [2, 3, 40, 64, 100])
def test_rows_against_their_own_moments_have_no_distance(count, rng):
  rows = rng.random((count, 192))
  own = gaussians.Moments().update(rows)
  trace = np.trace(own.covariance)
  assert 0 <= gaussians.frechet_of_rows(rows, own.mean, own.covariance) <= 1e-14 * trace
  got = gaussians.frechet_of_rows(rows + 0.1, own.mean, own.covariance)
  assert got == pytest.approx(1.92, rel=1e-12)
