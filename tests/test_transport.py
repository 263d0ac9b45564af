import dataclasses
import itertools
import json

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

from soft_diffusion_tf import corruptions as c
from soft_diffusion_tf import gaussians, schedules
from soft_diffusion_tf import transport as s

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
    (c.GaussianBlur(), LEVELS),
    (c.Mask(), np.linspace(0, 1, 9)),
    (c.Scale(), np.linspace(1, 0, 9)),
    (c.BlockAverage(), np.linspace(0, 3, 9)),
  ):
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


@pytest.fixture(scope="module")
def fine(images):
  levels = s.candidate_levels(c.GaussianBlur(), 0.01, 6.0, 128, "transport", images)
  return levels, s.closed_form_distances(c.GaussianBlur(), levels, images)


@pytest.mark.parametrize("nodes", [2, 5, 9, 20, 32])
def test_epsilon_is_tuned_to_the_wanted_count(fine, nodes):
  levels, matrix = fine
  path = s.find_path(levels, matrix, nodes)
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


# --- The seam: other distances ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sideways(c.Corruption):
  """A user's own, which commutes with nothing: mixes the image with its half turn, and fades."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - level) * x + 0.8 * level * tf.reverse(x, [1, 2])


@dataclasses.dataclass(frozen=True)
class Grey(c.Corruption):
  """A user's own that mixes channels."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - level) * x + level * tf.reduce_mean(x, axis=3, keepdims=True)


CORRUPTIONS = [
  (c.GaussianBlur(), 0.01, 6.0),
  (c.Mask(), 0.0, 1.0),
  (c.Mask("centre", edge=0.3), 0.0, 1.0),
  (c.Scale(), 1.0, 0.0),
  (c.BlockAverage(), 0.0, 3.0),
  (c.Compose(c.GaussianBlur(), c.Scale(), (0.01, 3.0), (1.0, 0.1)), 0.0, 1.0),
  (c.Matrix(np.ones([64, 64]) / 64), 0.0, 1.0),
]


def direct(corruption, one, two, images):
  """√E‖(C_1 − C_2) x_0‖², image by image."""
  gap = np.asarray(corruption(images, one), np.float64) - np.asarray(corruption(images, two))
  return np.sqrt(np.mean(np.sum(gap**2, axis=(1, 2, 3))))


def assigned(x, y):
  """W₂ of two clouds of equal size, by the optimal assignment, float64."""
  x, y = (np.asarray(z, np.float64).reshape(len(z), -1) for z in (x, y))
  costs = np.sum(x**2, 1)[:, None] + np.sum(y**2, 1)[None] - 2 * x @ y.T
  return np.sqrt(np.mean(costs[scipy.optimize.linear_sum_assignment(costs)]))


@pytest.mark.parametrize(
  ("corruption", "first", "last"), CORRUPTIONS, ids=lambda v: type(v).__name__ if v else ""
)
def test_every_corruption_has_a_schedule(corruption, first, last, images):
  found = s.search(corruption, images, first, last, count=48, nodes=7)
  levels = found.path.levels
  assert (levels[0], levels[-1]) == (first, last)
  assert np.all(np.diff(levels) * np.sign(last - first) > 0)
  states = len(found.candidates)  # a hard mask on 8×8 has five
  assert len(levels) == min(7, states)
  for one, two, step in zip(levels, levels[1:], found.path.steps):
    # 1e-4 of a part of the path is what left-out increments may amount to, with float32's share
    assert step == pytest.approx(direct(corruption, one, two, images), rel=5e-4)


def test_a_hard_mask_offers_each_of_its_states_once(images):
  levels = s.candidate_levels(c.Mask(), 0.0, 1.0, 64, "transport", images)
  states = {np.asarray(c.Mask()(images, level)).tobytes() for level in levels}
  assert len(states) == len(levels)
  assert 4 <= len(levels) <= 5  # the outermost ring of the digits may be black
  path, _ = s.find(c.Mask(), images, 0.0, 1.0, count=64, nodes=32)
  assert path.nearest
  assert path.to_dict()["nearest"] == list(path.nearest)


def test_on_a_straight_line_the_steps_are_even(images):
  """Scaling moves all images along straight lines: any subdivision is equally short."""
  path, _ = s.find(c.Scale(), images, 1.0, 0.0, count=61, nodes=7)
  np.testing.assert_allclose(path.levels, np.linspace(1, 0, 7), atol=0.02)  # a candidate apart
  assert path.steps.sum() == pytest.approx(path.straight, rel=1e-5)


def test_channels_that_mix_are_noticed(rng):
  images = rng.random([40, 5, 4, 3], np.float32)
  got = s.closed_form_distances(Grey(), np.array([0.0, 0.5, 1.0]), images)
  assert got[0, 2] == pytest.approx(direct(Grey(), 0.0, 1.0, images), rel=1e-4)
  assert got[1, 2] == pytest.approx(direct(Grey(), 0.5, 1.0, images), rel=1e-4)
  path, _ = s.find(Grey(), images, 0.0, 1.0, count=30, nodes=5, method="sinkhorn")
  assert len(path.levels) == 5


@pytest.mark.parametrize(
  ("corruption", "first", "last"), [CORRUPTIONS[0], CORRUPTIONS[2]], ids=["blur", "mask"]
)
def test_sinkhorn_and_bures_agree_with_the_closed_form_where_operators_commute(
  corruption, first, last, images
):
  closed = s.search(corruption, images, first, last, count=40, nodes=8)
  for method, tolerance in (
    ("sinkhorn", 0.03),  # ε is 0.4 % of a squared step: the entropic coupling is a little longer
    ("divergence", 0.03),
    ("bures", 3e-3),  # exact but for the blurs' border, where commuting fails by 3 %
  ):
    other = s.search(
      corruption, images, first, last, count=40, nodes=8, method=method, epsilon=0.001
    )
    np.testing.assert_array_equal(other.candidates, closed.candidates)
    for (i, j), value in other.distances.known.items():
      assert value == pytest.approx(closed.distances(i, j), rel=tolerance), (method, i, j)
    # On the straight stretches of a fading mask, paths of one length are many.
    assert other.path.steps.sum() == pytest.approx(closed.path.steps.sum(), rel=tolerance)


def test_where_operators_do_not_commute_sinkhorn_finds_less_than_the_closed_form_says(images):
  with pytest.raises(s.NotClosedForm, match="--method=sinkhorn"):
    s.find(Sideways(), images, 0.0, 1.0)
  levels = np.linspace(0, 1, 5)
  epsilon = 0.005
  distances, facts = s.measure("sinkhorn", Sideways(), levels, images, epsilon=epsilon)
  assert "closed_form_defects" not in facts
  pairing = s.closed_form_distances(Sideways(), levels, images)
  optimal = assigned(images, Sideways()(images, 1.0))
  assert optimal < 0.9 * pairing[0, 4]  # the claim would be wrong by more than 10 %
  assert distances(0, 4) == pytest.approx(optimal, rel=5e-3)  # ε is 0.1 % of the costs
  # The Gaussians' distance bounds it from below.
  bures, _ = s.measure("bures", Sideways(), levels, images)
  assert bures(0, 4) <= optimal * (1 + 1e-6)
  found = s.search(Sideways(), images, 0.0, 1.0, count=24, nodes=6, method="sinkhorn")
  assert len(found.path.levels) == 6 or found.path.nearest[0] == len(found.path.levels)
  assert abs(len(found.path.levels) - 6) <= 2
  assert len(found.distances.known) < 24 * 23 / 2


def test_bures_is_the_frechet_distance(images):
  levels = np.array([0.01, 1.0, 3.0])
  distances, _ = s.measure("bures", c.GaussianBlur(), levels, images)
  rows = [np.asarray(c.GaussianBlur()(images, level)).reshape(len(images), -1) for level in levels]
  for i, j in ((0, 1), (1, 2), (0, 2)):
    moments = [gaussians.Moments().update(rows[k]) for k in (i, j)]
    scale = (len(images) - 1) / len(images)  # of the covariance of the images themselves
    want = gaussians.frechet_distance(
      moments[0].mean, scale * moments[0].covariance, moments[1].mean, scale * moments[1].covariance
    )
    # the reduced basis may cut 1.5 % of a mean step from a distance, in squares
    assert distances(i, j) ** 2 == pytest.approx(want, rel=1e-3)


def test_sinkhorn_between_gaussian_clouds_is_near_bures(rng):
  """Clouds of 1,500 points in 4 dimensions: both estimate the same W₂, each with its sampling."""
  images = 0.5 + 0.1 * rng.standard_normal([1500, 2, 2, 1]).astype(np.float32)
  matrix = np.diag([0.1, 0.3, 0.6, 0.9])
  levels = np.array([0.0, 1.0])
  sinkhorn, _ = s.measure("sinkhorn", c.Matrix(matrix), levels, images, epsilon=0.001)
  bures, _ = s.measure("bures", c.Matrix(matrix), levels, images)
  variance = 0.1**2 * np.sum((1 - np.diag(matrix)) ** 2)
  want = np.sqrt(variance + 0.25 * np.sum((1 - np.diag(matrix)) ** 2))
  assert bures(0, 1) == pytest.approx(want, rel=0.01)
  assert sinkhorn(0, 1) == pytest.approx(want, rel=0.01)


def test_the_regularised_cost_is_the_printed_one(images):
  """No root, and a price of about ε log n on every edge, even between equal data sets."""
  levels, epsilon = np.array([0.01, 2.0, 2.0001, 6.0]), 0.01
  distances, _ = s.measure("regularised", c.GaussianBlur(), levels, images[:100], epsilon=epsilon)
  plain, _ = s.measure("sinkhorn", c.GaussianBlur(), levels, images[:100], epsilon=epsilon)
  assert distances(0, 1) > plain(0, 1) ** 2
  assert 0 < distances(1, 2) <= epsilon * np.log(100) * (1 + 1e-3)
  divergence, _ = s.measure("divergence", c.GaussianBlur(), levels, images[:100], epsilon=epsilon)
  assert divergence(1, 2) < 0.02  # two data sets that hardly differ: the bias is gone


def test_noise_on_the_clouds(images):
  levels, sigma, d = np.array([0.01, 3.0]), 0.2, 64
  quiet = s.closed_form_distances(c.GaussianBlur(), levels, images)[0, 1]
  clouds = {
    noise: s.Clouds(c.GaussianBlur(), levels, np.full(2, sigma), images, noise, seed=1)
    for noise in s.NOISES
  }
  pairs = {noise: cloud(0, 1) for noise, cloud in clouds.items()}
  square = {n: np.mean(np.sum((x.astype(np.float64) - y) ** 2, 1)) for n, (x, y) in pairs.items()}
  assert square["none"] == pytest.approx(quiet**2, rel=1e-4)
  assert square["same"] == pytest.approx(quiet**2, rel=1e-4)  # the noise cancels
  added = 2 * sigma**2 * d
  # 300 × 64 squares of noise and their products with the images: a few percent of spread
  assert square["independent"] == pytest.approx(quiet**2 + added, rel=0.05)
  assert clouds["independent"].paired()[0, 1] ** 2 == pytest.approx(quiet**2 + added, rel=1e-6)
  again = s.Clouds(c.GaussianBlur(), levels, np.full(2, sigma), images, "same", seed=1)
  np.testing.assert_array_equal(again(1)[0], pairs["same"][1])
  with pytest.raises(ValueError, match="unknown noise"):
    s.Clouds(c.Scale(), levels, levels, images, "some")


def test_the_reduced_basis_cuts_no_more_than_it_says(digits):
  levels = np.array([0.01, 1.5, 2.5, 6.0])
  full = s.Clouds(c.GaussianBlur(), levels, 0 * levels, digits)
  cut = 0.05
  reduced = s.Clouds(c.GaussianBlur(), levels, 0 * levels, digits, cut=cut)
  for i, j in ((0, 1), (2, 3), (1, 2)):
    (x, y), (u, v) = full(i, j), reduced(i, j)
    assert u.shape == v.shape
    exact, short = (np.mean(np.sum((a - b) ** 2, 1)) for a, b in ((x, y), (u, v)))
    assert short <= exact * (1 + 1e-5)
    assert exact <= short + (2 * cut) ** 2
  assert reduced(3)[0].shape[1] < 32 < full(3)[0].shape[1]


def test_laws_of_the_distance(images):
  """Symmetry, the triangle, scaling, and reflection, which a blur commutes with."""
  levels = np.array([0.01, 1.0, 4.0])
  epsilon = 0.01
  one, _ = s.measure("sinkhorn", c.GaussianBlur(), levels, images, epsilon=epsilon)
  assert one(0, 2) == one(2, 0)
  assert one(1, 1) == 0
  half, _ = s.measure("sinkhorn", c.GaussianBlur(), levels, 0.5 * images, epsilon=epsilon / 4)
  assert half(0, 2) == pytest.approx(0.5 * one(0, 2), rel=1e-3)  # the threshold of the iteration
  assert one(0, 2) <= one(0, 1) + one(1, 2)
  closed = s.closed_form_distances(c.GaussianBlur(), levels, images)
  for mirrored in (images[:, ::-1], images[:, :, ::-1], np.swapaxes(images, 1, 2)):
    np.testing.assert_allclose(
      s.closed_form_distances(c.GaussianBlur(), levels, mirrored), closed, rtol=1e-4
    )
  moved = s.closed_form_distances(c.GaussianBlur(), levels, np.roll(images, 3, axis=2))
  assert not np.allclose(moved, closed, rtol=1e-2)  # but not with a shift, at the padded border


def test_warm_starts_save_iterations_and_change_nothing(images):
  levels = s.candidate_levels(c.GaussianBlur(), 0.01, 6.0, 10, "transport", images)
  clouds = s.Clouds(c.GaussianBlur(), levels, 0 * levels, images)
  warm, cold = (
    s.Sinkhorn(clouds, clouds.paired(), epsilon=0.002, warm=warm, threshold=1e-3)
    for warm in (True, False)
  )
  # Two edges leave one node, as in a search. Where a count stops depends on the machine's rounding;
  # without such a pair it is just about half of the cold one's.
  pairs = [(0, 3), (0, 4), (3, 6), (5, 9)]
  np.testing.assert_allclose(warm.pairs(pairs), cold.pairs(pairs), rtol=2e-3)  # the threshold
  assert sum(warm.iterations) < 0.5 * sum(cold.iterations)


def test_neighbours_help_where_the_identity_is_not_optimal(images):
  levels = np.linspace(0, 1, 30)
  clouds = s.Clouds(Sideways(), levels, 0 * levels, images)
  plain, taught = (
    s.Sinkhorn(clouds, clouds.paired(), epsilon=0.05, neighbours=n, threshold=1e-3)
    for n in (False, True)
  )
  pairs = [(k, 29) for k in range(3, 9)]
  np.testing.assert_allclose(plain.pairs(pairs), taught.pairs(pairs), rtol=5e-3)
  assert sum(taught.iterations) < sum(plain.iterations)


# --- The lazy search ------------------------------------------------------------------------------


class Counted(s.Distances):
  """A matrix whose entries are computed one by one; `guess` is what the search may go by."""

  def __init__(self, matrix, guess=None):
    super().__init__(len(matrix))
    self.truth, self.guess, self.asked = matrix, guess, []

  def compute(self, i, j):
    self.asked.append((i, j))
    return self.truth[i, j]

  def estimate(self):
    return super().estimate() if self.guess is None else self.guess.copy()


@pytest.mark.parametrize("nodes", [4, 11, 24])
def test_the_lazy_search_finds_the_same_path_with_few_edges(fine, nodes):
  levels, matrix = fine
  want = s.find_path(levels, matrix, nodes)
  lazy = Counted(matrix, matrix * 1.0)
  got = s.find_path(levels, lazy, nodes)
  np.testing.assert_array_equal(got.levels, want.levels)
  assert got.evaluated == len(set(lazy.asked)) == len(lazy.asked) == nodes  # and the straight line
  assert got.deviation == 0


def test_wrong_estimates_are_corrected(fine):
  """Estimates off by up to 10 %, smoothly: the path found is as short as its deviation promises."""
  levels, matrix = fine
  bend = 1 + 0.05 * np.sin(np.arange(128) / 20)
  lazy = Counted(matrix, matrix * bend[:, None] * bend[None, :])
  want, got = s.find_path(levels, matrix, 16), s.find_path(levels, lazy, 16)
  assert len(got.levels) == 16 or got.nearest
  assert len(lazy.asked) < 0.15 * 128 * 127 / 2
  assert got.steps.sum() <= want.steps.sum() * (1 + got.deviation + 0.01)
  for (i, j), step in zip(itertools.pairwise(got.indices), got.steps):
    assert step == matrix[i, j]


def test_without_estimates_the_line_of_candidates_is_the_guess(fine):
  levels, matrix = fine
  lazy = Counted(matrix)
  got, want = s.find_path(levels, lazy, 16), s.find_path(levels, matrix, 16)
  assert len(got.levels) == 16
  assert len(lazy.asked) < 0.1 * 128 * 127 / 2 + 127
  assert got.steps.sum() == pytest.approx(want.steps.sum(), rel=0.01)


def test_distances_are_remembered_on_disk(fine, tmp_path):
  levels, matrix = fine
  whole = Counted(matrix, matrix * 1.0)
  file = tmp_path / "d.edges"
  whole.keep_in(s.Journal(file, {"of": "this"}))
  want = s.find_path(levels, whole, 16)
  # Killed in the middle of a line, and started again.
  text = file.read_bytes()
  lines = text.splitlines(keepends=True)
  file.write_bytes(b"".join(lines[:8]) + lines[8][:7])
  again = Counted(matrix, matrix * 1.0)
  again.keep_in(s.Journal(file, {"of": "this"}))
  assert len(again.known) == 7
  got = s.find_path(levels, again, 16)
  np.testing.assert_array_equal(got.levels, want.levels)
  assert len(again.asked) == len(whole.asked) - 7
  assert file.read_bytes() == text
  # Parts do not see each other's distances.
  half = Counted(matrix)
  half.keep_in(s.Journal(file, {"of": "this"}), "half")
  assert not half.known


@pytest.mark.parametrize(
  ("content", "text"),
  [
    ('{"of": "that"}\n', "another search .of differs: that there, this here.; delete it"),
    ("[1, 2\n", "not a file of distances"),
    ('{"of": "this"}\nnonsense\n', "not a file of distances"),
  ],
)
def test_journals_of_something_else_are_refused(tmp_path, content, text):
  file = tmp_path / "d.edges"
  file.write_text(content)
  with pytest.raises(ValueError, match=text) as caught:
    s.Journal(file, {"of": "this"})
  assert str(file) in str(caught.value)
  assert file.read_text() == content


def test_a_search_goes_on_from_its_journal(images, tmp_path, monkeypatch):
  options = dict(count=40, nodes=8, method="sinkhorn", halves=True)
  want = s.search(c.GaussianBlur(), images, 0.01, 6.0, **options)
  file = tmp_path / "d.edges"
  real, solved = s.Sinkhorn.compute, []

  def killed(self, i, j):
    if len(solved) == 5:
      raise KeyboardInterrupt
    solved.append((i, j))
    return real(self, i, j)

  monkeypatch.setattr(s.Sinkhorn, "compute", killed)
  with pytest.raises(KeyboardInterrupt):
    s.search(c.GaussianBlur(), images, 0.01, 6.0, journal=file, **options)
  assert len(file.read_text().splitlines()) == 6
  before = list(solved)
  solved.clear()
  monkeypatch.setattr(
    s.Sinkhorn, "compute", lambda self, i, j: solved.append((i, j)) or real(self, i, j)
  )
  got = s.search(c.GaussianBlur(), images, 0.01, 6.0, journal=file, **options)
  assert not set(before) & set(solved[: len(got.distances.known) - 5])
  np.testing.assert_allclose(got.path.levels, want.path.levels, rtol=1e-4)
  np.testing.assert_allclose(got.path.steps, want.path.steps, rtol=1e-3)
  header = json.loads(file.read_text().splitlines()[0])
  assert header["corruption"] == c.GaussianBlur().get_config()
  with pytest.raises(ValueError, match="another search"):
    s.search(c.GaussianBlur(), images[:-1], 0.01, 6.0, journal=file, **options)


# --- Joint schedules, halves and bad input --------------------------------------------------------


@pytest.mark.parametrize("method", ["closed_form", "bures"])
def test_a_joint_schedule_runs_from_clean_to_terminal(images, method):
  found = s.search(
    c.GaussianBlur(), images, 0.01, 6.0, count=24, sigmas=(0.01, 0.1, 6), nodes=9, method=method
  )
  path = found.path
  assert (path.levels[0], path.levels[-1]) == (0.01, 6.0)
  assert (path.sigmas[0], path.sigmas[-1]) == pytest.approx((0.01, 0.1))
  assert np.all(np.diff(path.levels) >= 0)
  assert np.all(np.diff(path.sigmas) >= 0)
  assert np.all(np.diff(path.levels) + np.diff(path.sigmas) > 0)
  if method == "bures" and path.nearest:
    # Two of its edges are equal but for rounding: whether a threshold lies between them, which
    # gives 9 nodes, is up to the processor.
    assert tuple(path.nearest) == (8, 10)
    assert len(path.levels) in path.nearest
  else:
    assert not path.nearest
    assert len(path.levels) == 9
  assert path.to_dict()["sigmas"] == path.sigmas.tolist()
  assert found.candidates.shape == (24 * 6, 2)


def test_joint_distances_are_the_root_of_both_squares(images):
  found = s.search(c.GaussianBlur(), images, 0.01, 6.0, count=8, sigmas=(0.01, 0.1, 4), nodes=5)
  for k, (i, j) in enumerate(itertools.pairwise(found.path.indices)):
    (level_i, sigma_i), (level_j, sigma_j) = found.candidates[[i, j]]
    blur = direct(c.GaussianBlur(), level_i, level_j, images)
    want = np.sqrt(blur**2 + 64 * (sigma_i - sigma_j) ** 2)
    assert found.path.steps[k] == pytest.approx(want, rel=5e-4)


def test_two_halves_of_the_images(images):
  _, facts = s.find(c.GaussianBlur(), images, 0.01, 6.0, count=64, nodes=12, halves=True)
  assert 0 <= facts["sensitivity"] < 2  # steps: digits are alike
  same = np.concatenate([images[:50], images[:50]]).reshape(2, 50, 8, 8, 1).swapaxes(0, 1)
  _, facts = s.find(
    c.GaussianBlur(), same.reshape(100, 8, 8, 1), 0.01, 6.0, count=64, nodes=12, halves=True
  )
  assert facts["sensitivity"] == 0
  assert s.shift(np.array([0, 1.0, 2]), np.array([0, 1.5, 2]), np.array([0, 1.0, 2])) == (
    pytest.approx(0.5)
  )
  # Falling levels, and halves with other numbers of nodes.
  assert s.shift(np.array([1.0, 0]), np.array([1.0, 0.5, 0]), np.array([1.0, 0.5, 0])) == 0


@pytest.mark.parametrize("method", s.METHODS)
def test_bad_images_are_refused(images, method):
  broken = images.copy()
  broken[7, 3, 3, 0] = np.nan
  with pytest.raises(ValueError, match="NaN or infinity; clean the data"):
    s.find(c.GaussianBlur(), broken, 0.01, 6.0, method=method)
  for other in (np.uint8(255 * images), 2 * images - 1):
    with pytest.raises(ValueError, match=r"and images here are floats in \[0, 1\]: (divide|of im)"):
      s.find(c.GaussianBlur(), other, 0.01, 6.0, method=method)
  with pytest.raises(ValueError, match="at least 2 images"):
    s.find(c.GaussianBlur(), images[:1], 0.01, 6.0, method=method)


def test_other_bad_requests(images):
  with pytest.raises(ValueError, match="unknown method 'sinkhornn'"):
    s.find(c.GaussianBlur(), images, 0.01, 6.0, method="sinkhornn")
  with pytest.raises(ValueError, match=r"too small for float32.*--sinkhorn_epsilon"):
    s.find(c.GaussianBlur(), images, 0.01, 6.0, count=9, nodes=4, method="sinkhorn", epsilon=1e-9)
  with pytest.raises(ValueError, match="two halves need at least 4"):
    s.find(c.GaussianBlur(), images[:3], 0.01, 6.0, halves=True)
  with pytest.raises(ValueError, match="no path"):
    s.find_path(np.arange(3.0), np.full([3, 3], np.inf), 2)
  with pytest.raises(ValueError, match="distance between candidates 0 and 2 is nan"):
    Counted(np.full([3, 3], np.nan))(2, 0)
