import itertools

import numpy as np
import pytest

from soft_diffusion_tf import corruptions as c
from soft_diffusion_tf import schedules
from soft_diffusion_tf import scheduling as s

LEVELS = np.linspace(0.01, 6.0, 40)


@pytest.fixture(scope="module")
def images(digits):
  return digits[:300]


@pytest.fixture(scope="module")
def distances(images):
  return s.closed_form_distances(c.GaussianBlur(), LEVELS, images)


def test_closed_form_is_the_mean_square_difference(images, distances):
  for i, j in ((1, 2), (3, 20), (10, 39)):
    gap = c.GaussianBlur()(images, LEVELS[i]) - c.GaussianBlur()(images, LEVELS[j])
    want = np.sqrt(np.mean(np.sum(np.asarray(gap, np.float64) ** 2, axis=(1, 2, 3))))
    assert distances[i, j] == pytest.approx(want, rel=1e-4)
  np.testing.assert_allclose(distances, distances.T)
  np.testing.assert_array_equal(np.diag(distances), 0)


def test_closed_form_with_colour_and_few_images(rng):
  images = rng.random([5, 6, 4, 3], np.float32)
  got = s.closed_form_distances(c.GaussianBlur(), LEVELS[:3], images)
  gap = c.GaussianBlur()(images, LEVELS[0]) - c.GaussianBlur()(images, LEVELS[2])
  assert got[0, 2] == pytest.approx(np.sqrt(np.mean(np.sum(gap**2, axis=(1, 2, 3)))), rel=1e-4)


def test_closed_form_is_claimed_where_it_holds_and_nowhere_else(images):
  for corruption, levels in (
    (c.GaussianBlur(), LEVELS), (c.Mask(), np.linspace(0, 1, 9)), (c.Scale(), np.linspace(1, 0, 9)),
    (c.BlockAverage(), np.linspace(0, 3, 9)),
  ):  # fmt: skip
    assert s.check_closed_form(corruption, levels, images)["excess"] < 1e-3
  shift = np.eye(64)[np.roll(np.arange(64), 3)]
  minus = -np.eye(64)
  for matrix, fault in ((shift, "asymmetry"), (minus, "negativity")):
    with pytest.raises(s.NotClosedForm, match=fault):
      s.check_closed_form(c.Matrix(matrix), np.linspace(0, 1, 9), images)
  crossed = c.Compose(c.GaussianBlur(), c.Mask("centre"), (0.0, 4.0), (0.0, 1.0))
  with pytest.raises(s.NotClosedForm):
    s.check_closed_form(crossed, np.linspace(0, 1, 9), images)


def all_paths(distances, epsilon):
  """Every path from first to last over edges ≤ ε, as (length, path)."""
  inner = range(1, len(distances) - 1)
  for size in range(len(distances) - 1):
    for middle in itertools.permutations(inner, size):
      path = [0, *middle, len(distances) - 1]
      edges = [distances[i, j] for i, j in itertools.pairwise(path)]
      if max(edges) <= epsilon:
        yield sum(edges), path


def test_shortest_path_against_brute_force(rng):
  for _ in range(5):
    points = rng.random([7, 2])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    for epsilon in (0.3, 0.6, 2.0):
      paths = list(all_paths(distances, epsilon))
      got = s.shortest_path(distances, epsilon)
      if not paths:
        assert got == []
      else:
        assert sum(distances[i, j] for i, j in itertools.pairwise(got)) == (
          pytest.approx(min(paths)[0])
        )


def test_equal_data_sets_are_still_joined():
  distances = np.array([[0, 0, 1.0], [0, 0, 1.0], [1.0, 1.0, 0]])
  assert s.shortest_path(distances, 1.0)[-1] == 2


@pytest.mark.parametrize("nodes", [2, 5, 9, 20, 32])
def test_epsilon_is_tuned_to_the_wanted_count(images, nodes):
  levels = s.candidate_levels(c.GaussianBlur(), 0.01, 6.0, 128, "transport", images)
  path = s.find_path(levels, s.closed_form_distances(c.GaussianBlur(), levels, images), nodes)
  assert len(path.levels) == nodes
  assert path.nearest == ()
  assert path.levels[0] == levels[0]
  assert path.levels[-1] == levels[-1]
  assert np.all(np.diff(path.levels) > 0)
  assert path.steps.max() == pytest.approx(path.epsilon)
  assert path.steps.sum() >= path.straight * (1 - 1e-9)


def test_the_path_equals_the_best_epsilon_by_trial(distances):
  counts = {len(s.shortest_path(distances, e)) for e in np.unique(distances)[1:]}
  for nodes in range(2, 12):
    got = len(s.find_path(LEVELS, distances, nodes).levels)
    assert (got == nodes) == (nodes in counts)


def test_ties_report_the_nearest_counts():
  line = np.arange(9.0)
  distances = np.abs(line[:, None] - line[None])  # only 9, 5, 4, 3, 2 nodes exist on even ties
  path = s.find_path(line, distances, 7)
  assert len(path.levels) != 7
  assert path.nearest
  assert len(path.levels) == path.nearest[0]


@pytest.mark.parametrize("kind", s.CANDIDATES)
def test_candidates_run_from_end_to_end(images, kind):
  levels = s.candidate_levels(c.GaussianBlur(), 0.01, 6.0, 30, kind, images)
  assert levels[0] == pytest.approx(0.01)
  assert levels[-1] == pytest.approx(6.0)
  assert np.all(np.diff(levels) > 0)


def test_transport_candidates_are_even_in_transport(images):
  levels = s.candidate_levels(c.GaussianBlur(), 0.01, 6.0, 30, "transport", images)
  steps = np.diagonal(s.closed_form_distances(c.GaussianBlur(), levels, images), 1)
  assert steps.max() < 1.3 * steps.min()
  linear = np.diagonal(s.closed_form_distances(c.GaussianBlur(), LEVELS, images), 1)
  assert linear.max() > 5 * linear.min()


def test_falling_levels(images):
  levels = s.candidate_levels(c.Scale(), 1.0, 0.0, 20, "transport", images)
  assert levels[0] == 1
  assert levels[-1] == 0
  path, _ = s.find(c.Scale(), images, 1.0, 0.0, count=40, nodes=8)
  assert np.all(np.diff(path.levels) < 0)


def test_find_is_deterministic_and_says_how(images):
  one, facts = s.find(c.GaussianBlur(), images, 0.01, 6.0, count=64, nodes=12)
  two, _ = s.find(c.GaussianBlur(), images, 0.01, 6.0, count=64, nodes=12)
  np.testing.assert_array_equal(one.levels, two.levels)
  assert facts["method"] == "closed_form"
  assert facts["images"] == 300


def test_bad_requests(images, distances):
  with pytest.raises(ValueError, match="2 to 40 nodes, not 41"):
    s.find_path(LEVELS, distances, 41)
  with pytest.raises(ValueError, match="2 to 40 nodes, not 1"):
    s.find_path(LEVELS, distances, 1)
  with pytest.raises(ValueError, match="NaN"):
    s.closed_form_distances(c.Mask(), LEVELS[:2] / 6, images + np.nan)
  with pytest.raises(ValueError, match="positive ends"):
    s.candidate_levels(c.Mask(), 0.0, 1.0, 9, "geometric")
  with pytest.raises(ValueError, match="unknown candidates"):
    s.candidate_levels(c.Mask(), 0.0, 1.0, 9, "even", images)
  with pytest.raises(ValueError, match="changes nothing"):
    s.candidate_levels(c.Identity(), 0.0, 1.0, 9, "transport", images)


def test_the_mse_of_the_natural_baseline_decays_as_ve(images):
  """P Eq. 55, evaluated again on the levels found."""
  sigma, ve = schedules.Constant(0.05), schedules.Geometric(0.5, 50.0)
  levels = s.mse_matched(c.GaussianBlur(), images, 0.01, 6.0, sigma, ve, nodes=9)
  t = np.linspace(0, 1, 9, dtype=np.float32)
  errors = []
  for level in levels:
    gap = np.asarray(c.GaussianBlur()(images, level), np.float64) - images
    errors.append(np.mean(np.sum(gap**2, axis=(1, 2, 3))) + 64 * 0.05**2)
  share, want = np.array(errors) / errors[-1], (ve(t).numpy() / 50.0) ** 2
  reached = want > 1.2 * errors[0] / errors[-1]  # below, the noise alone is more than VE allows
  assert reached.sum() >= 3
  np.testing.assert_allclose(share[reached], want[reached], rtol=0.05)
