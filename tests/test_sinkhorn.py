"""Entropic transport against golden values, closed forms, laws and finite differences."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import linear_sum_assignment

from soft_diffusion_tf.transport import sinkhorn as module
from soft_diffusion_tf.transport.sinkhorn import identity_potentials, sinkhorn, sinkhorn_divergence
from tests import emulation

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden" / "sinkhorn").glob("*.npz"))
NAMES = [path.stem for path in GOLDEN]
TIGHT = {"dtype": tf.float64, "threshold": 1e-10, "max_iterations": 5000}


def _golden(name):
  with np.load(GOLDEN[NAMES.index(name)], allow_pickle=False) as data:
    return {key: data[key] for key in data}


def _clouds(n=40, m=50, d=5, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 0.5, rng.dirichlet(np.full(n, 3.0))


def _costs(x, y):
  return ((x[:, None] - y[None]) ** 2).sum(-1)


def _plan(result, costs):
  f, g, epsilon = (np.asarray(v, np.float64) for v in (result.f, result.g, result.epsilon))
  return np.exp((f[:, None] + g[None] - costs) / epsilon)


def test_golden_cases_are_present():
  assert len(GOLDEN) == 9


@pytest.mark.parametrize("name", NAMES)
def test_golden_float64(name):
  data = _golden(name)
  arguments = [data[key] for key in ("x", "y", "a", "b")]
  result = sinkhorn(*arguments, epsilon=data["epsilon"], **TIGHT)
  assert result.converged
  # The tolerances of the golden data, whose own threshold is 1e-10.
  np.testing.assert_allclose(result.reg_ot_cost, data["reg_ot_cost"], rtol=1e-7)
  np.testing.assert_allclose(result.transport_cost, data["transport_cost"], rtol=1e-7)
  np.testing.assert_allclose(
    result.f[:, None] + result.g[None], data["f"][:, None] + data["g"][None], rtol=0, atol=1e-5
  )


@pytest.mark.parametrize("name", NAMES)
def test_golden_divergence_float64(name):
  data = _golden(name)
  arguments = [data[key] for key in ("x", "y", "a", "b")]
  result = sinkhorn_divergence(*arguments, epsilon=data["epsilon"], **TIGHT)
  assert result.converged
  np.testing.assert_allclose(result.xx.reg_ot_cost, data["reg_self_x"], rtol=1e-7)
  np.testing.assert_allclose(result.yy.reg_ot_cost, data["reg_self_y"], rtol=1e-7)
  # A difference of terms that agree to 1e-7 each; most of it is what remains.
  scale = data["reg_ot_cost"]
  np.testing.assert_allclose(
    result.divergence, data["sinkhorn_divergence"], rtol=0, atol=1e-7 * scale
  )


@pytest.mark.parametrize("name", NAMES)
def test_golden_float32(name):
  data = _golden(name)
  arguments = [data[key] for key in ("x", "y", "a", "b")]
  result = sinkhorn(*arguments, epsilon=data["epsilon"], threshold=2e-5, dtype=tf.float32)
  assert result.converged
  assert result.reg_ot_cost.dtype == tf.float32
  # The golden data's tolerance; C is rounded to 1e-7 of the norms, and the threshold adds its part
  # to the transport cost in first order.
  np.testing.assert_allclose(result.reg_ot_cost, data["reg_ot_cost"], rtol=1e-4)
  np.testing.assert_allclose(result.transport_cost, data["transport_cost"], rtol=1e-4)


@pytest.mark.parametrize("relative", ["std", "mean"])
def test_relative_epsilon(relative):
  data = _golden("n64_m80_d8_weights")
  for chunk in (None, 16):
    result = sinkhorn(
      data["x"], data["y"], relative_epsilon=relative, chunk=chunk, dtype=tf.float64
    )
    # Moments of 5,120 costs, summed in another order.
    np.testing.assert_allclose(result.epsilon, data[f"default_epsilon_{relative}"], rtol=1e-12)


def test_default_is_the_golden_default():
  data = _golden("n200_d48_default")
  result = sinkhorn(data["x"], data["y"])
  # At the default threshold the cost is off by the square of 1e-3; float32 allows 1e-4.
  np.testing.assert_allclose(result.reg_ot_cost, data["reg_ot_cost"], rtol=1e-4)


def test_plan_has_the_marginals():
  x, y, a = _clouds()
  result = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  plan = _plan(result, _costs(x, y))
  # The threshold bounds the L1 error; 1e-12 for rounding in exponents of some 10.
  assert np.abs(plan.sum(0) - 1 / 50).sum() < 1e-10 + 1e-12
  assert np.abs(plan.sum(1) - a).sum() < 1e-10 + 1e-12
  np.testing.assert_allclose(result.transport_cost, (plan * _costs(x, y)).sum(), rtol=1e-12)
  divergence = (plan * np.log(plan / (a[:, None] / 50))).sum()
  np.testing.assert_allclose(
    result.reg_ot_cost, (plan * _costs(x, y)).sum() + 0.5 * divergence, rtol=1e-9
  )


def test_error_is_the_marginal_error_before_convergence():
  x, y, _ = _clouds()
  result = sinkhorn(x, y, epsilon=0.1, max_iterations=2, dtype=tf.float64)
  plan = _plan(result, _costs(x, y))
  assert not result.converged
  assert result.iterations == 2
  expected = np.abs(plan.sum(0) - 1 / 50).sum() + np.abs(plan.sum(1) - 1 / 40).sum()
  np.testing.assert_allclose(result.error, expected, rtol=1e-9)  # rounding alone


def test_small_epsilon_reaches_the_assignment():
  x, y, _ = _clouds(60, 60, 8)
  costs = _costs(x, y)
  exact = costs[linear_sum_assignment(costs)].mean()
  epsilon = 0.01
  result = sinkhorn(
    x, y, epsilon=epsilon, scaling=0.25, threshold=1e-6, dtype=tf.float64, max_iterations=20000
  )
  assert result.converged
  # <P, C> exceeds the exact cost by at most ε times the largest KL, log n; it cannot be lower but
  # by the marginal error times the spread of the costs.
  assert result.transport_cost >= exact - 1e-6 * costs.max()
  assert result.transport_cost <= exact + epsilon * np.log(60)
  assert result.reg_ot_cost <= exact + epsilon * np.log(60) + 1e-9


def test_scaling_of_epsilon_gives_the_same_value():
  x, y, a = _clouds()
  direct = sinkhorn(x, y, a, epsilon=0.05, **TIGHT)
  staged = sinkhorn(x, y, a, epsilon=0.05, scaling=0.3, **TIGHT)
  assert direct.converged
  assert staged.converged
  np.testing.assert_allclose(staged.reg_ot_cost, direct.reg_ot_cost, rtol=1e-9)  # ~ threshold²


def test_translation_law():
  x, y, a = _clouds()
  shift = np.array([3.0, -1.0, 0.5, 2.0, 0.0])
  base = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  moved = sinkhorn(x, y + shift, a, epsilon=0.5, **TIGHT)
  # ‖x − y − s‖² = ‖x − y‖² − 2 (x − y)·s + ‖s‖², and the middle term depends on marginals alone.
  expected = base.reg_ot_cost - 2 * (a @ x - y.mean(0)) @ shift + shift @ shift
  np.testing.assert_allclose(moved.reg_ot_cost, expected, rtol=1e-9)  # threshold 1e-10
  both = sinkhorn(x + 1e3, y + 1e3, a, epsilon=0.5)  # float64, default threshold
  loose = sinkhorn(x, y, a, epsilon=0.5)
  # Centring leaves the rounding of the input itself, 1e3 · 2e-16.
  np.testing.assert_allclose(both.reg_ot_cost, loose.reg_ot_cost, rtol=1e-9)


def test_scaling_law():
  x, y, a = _clouds()
  base = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  scaled = sinkhorn(3 * x, 3 * y, a, epsilon=4.5, **TIGHT)
  np.testing.assert_allclose(scaled.reg_ot_cost, 9 * base.reg_ot_cost, rtol=1e-9)  # threshold
  np.testing.assert_allclose(scaled.f + scaled.g[0], 9 * (base.f + base.g[0]), atol=1e-6)


def test_symmetry():
  x, y, a = _clouds()
  forward = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  backward = sinkhorn(y, x, None, a, epsilon=0.5, **TIGHT)
  np.testing.assert_allclose(forward.reg_ot_cost, backward.reg_ot_cost, rtol=1e-9)  # threshold
  np.testing.assert_allclose(forward.f + forward.g[0], backward.g + backward.f[0], atol=1e-6)


def test_cost_matrix_equals_points():
  x, y, a = _clouds()
  points = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  for chunk in (None, 7):
    matrix = sinkhorn(cost=_costs(x, y), a=a, epsilon=0.5, chunk=chunk, **TIGHT)
    np.testing.assert_allclose(matrix.reg_ot_cost, points.reg_ot_cost, rtol=1e-9)  # threshold


def test_negative_costs():
  x, y, a = _clouds()
  base = sinkhorn(cost=_costs(x, y), a=a, epsilon=0.5, **TIGHT)
  lowered = sinkhorn(cost=_costs(x, y) - 100, a=a, epsilon=0.5, **TIGHT)
  np.testing.assert_allclose(lowered.reg_ot_cost, base.reg_ot_cost - 100, rtol=1e-9)  # threshold


def test_points_without_weight_do_not_count():
  x, y, a = _clouds()
  keep = np.arange(40) % 4 > 0
  a = np.where(keep, a, 0) / a[keep].sum()
  b = np.r_[np.full(30, 1 / 30), np.zeros(20)]
  padded = sinkhorn(x, y, a, b, epsilon=0.5, **TIGHT)
  dropped = sinkhorn(x[keep], y[:30], a[keep], epsilon=0.5, **TIGHT)
  assert padded.converged
  np.testing.assert_allclose(padded.reg_ot_cost, dropped.reg_ot_cost, rtol=1e-9)  # threshold
  assert np.all(np.isneginf(padded.f.numpy()) == ~keep)
  again = sinkhorn(x, y, a, b, epsilon=0.5, init=(padded.f, padded.g), **TIGHT)
  assert again.iterations < padded.iterations


def test_chunks_do_not_change_the_result():
  x, y, a = _clouds()
  whole = sinkhorn(x, y, a, epsilon=0.3, **TIGHT)
  for chunk in (1, 7, 40, 64):
    parts = sinkhorn(x, y, a, epsilon=0.3, chunk=chunk, **TIGHT)
    np.testing.assert_allclose(parts.reg_ot_cost, whole.reg_ot_cost, rtol=1e-9)  # threshold
    np.testing.assert_allclose(parts.transport_cost, whole.transport_cost, rtol=1e-8)
    # Potentials follow the marginals at the problem's condition: 1e-10 times about 1e3.
    np.testing.assert_allclose(parts.f + parts.g[0], whole.f + whole.g[0], atol=1e-7)


def test_large_problems_are_streamed(monkeypatch):
  x, y, a = _clouds()
  whole = sinkhorn(x, y, a, epsilon=0.3, **TIGHT)
  monkeypatch.setattr(module, "_STORE_LIMIT", 2 * 40 * 50 * 8 - 1)
  shapes = []
  rows = module._rows
  monkeypatch.setattr(module, "_rows", lambda *args: shapes.append(args) or rows(*args))
  module._solver.cache_clear()
  parts = sinkhorn(x, y, a, epsilon=0.3, **TIGHT)
  module._solver.cache_clear()
  # Every read of the costs is a product of two factors: none is a stored matrix.
  assert shapes
  assert all(len(source) == 2 for source, *_ in shapes)
  np.testing.assert_allclose(parts.reg_ot_cost, whole.reg_ot_cost, rtol=1e-9)  # threshold


def test_warm_start_saves_iterations():
  x, y, a = _clouds()
  near = sinkhorn(x, 1.02 * y, a, epsilon=0.2, **TIGHT)
  cold = sinkhorn(x, y, a, epsilon=0.2, **TIGHT)
  warm = sinkhorn(x, y, a, epsilon=0.2, init=(near.f, near.g), **TIGHT)
  done = sinkhorn(x, y, a, epsilon=0.2, init=(None, cold.g), **TIGHT)
  assert warm.iterations < cold.iterations
  assert done.iterations <= 2  # the stopping rule aims at 0.8 of the threshold
  np.testing.assert_allclose(warm.reg_ot_cost, cold.reg_ot_cost, rtol=1e-9)  # threshold


@pytest.mark.parametrize("given", ["points", "cost"])
def test_identity_potentials(given):
  data = _golden("n200_d48_blurpair")
  x, y, epsilon = data["x"], data["y"], 0.05
  cold = sinkhorn(x, y, epsilon=epsilon, threshold=1e-5, max_iterations=5000)
  if given == "points":
    f, g = identity_potentials(x, y, epsilon=epsilon)
  else:
    f, g = identity_potentials(cost=_costs(x, y), epsilon=epsilon)
  # P_ii = 1 / n by construction, up to rounding of exponents of some 100.
  plan = np.exp((f + g - np.diag(_costs(x, y))) / epsilon)
  np.testing.assert_allclose(plan, 1 / 200, rtol=1e-9)
  warm = sinkhorn(x, y, epsilon=epsilon, threshold=1e-5, max_iterations=5000, init=(f, g))
  assert warm.converged
  assert warm.iterations < cold.iterations
  # The dual gap is below the marginal error, 1e-5, times the potentials' own, some 0.1.
  np.testing.assert_allclose(warm.reg_ot_cost, cold.reg_ot_cost, rtol=1e-6)


def test_brenier_potentials_are_optimal_at_small_epsilon():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(50, 6))
  root = rng.normal(size=(6, 6))
  y = x @ (root @ root.T / 6)
  f, g = identity_potentials(x, y)
  slack = _costs(x, y) - f.numpy()[:, None] - g.numpy()[None]
  # Dual feasible and tight on the diagonal: optimal. Rounding of costs up to some 100.
  assert slack.min() > -1e-12
  np.testing.assert_allclose(np.diag(slack), 0, atol=1e-12)


def test_symmetric_solver_equals_the_general_one():
  x, _, a = _clouds()
  general = sinkhorn(x, x, a, a, epsilon=0.5, **TIGHT)
  for chunk in (None, 16):
    fast = sinkhorn(x, a=a, epsilon=0.5, chunk=chunk, **TIGHT)
    assert fast.converged
    assert fast.iterations < general.iterations
    np.testing.assert_allclose(fast.reg_ot_cost, general.reg_ot_cost, rtol=1e-9)  # threshold
    np.testing.assert_array_equal(fast.f, fast.g)
    # 1e-10 of the weight in marginals; the rest is rounding.
    np.testing.assert_allclose(_plan(fast, _costs(x, x)).sum(1), a, atol=1e-10)


def test_divergence_is_zero_for_equal_clouds_and_positive_else():
  x, y, a = _clouds()
  same = sinkhorn_divergence(x, x, a, a, epsilon=0.5, **TIGHT)
  other = sinkhorn_divergence(x, y, a, epsilon=0.5, **TIGHT)
  scale = float(same.xy.reg_ot_cost)
  assert scale > 0.1  # what debiasing removes
  assert abs(same.divergence) < 1e-9 * scale  # threshold
  assert other.divergence > 0.1
  again = sinkhorn_divergence(x, y, a, epsilon=0.5, init=other, **TIGHT)
  assert all(new.iterations <= 2 < old.iterations for new, old in zip(again[2:], other[2:]))
  np.testing.assert_allclose(again.divergence, other.divergence, rtol=1e-9)  # threshold


def _gaussian_entropic_cost(mean_gap, s, t, epsilon):
  """Entropic cost between Gaussians with diagonal variances s, t (Janati et al. 2020, Theorem 1).

  With D = √(4 s t + (ε/2)²) per axis and KL against the product of the marginals:
  Σ s + t − D + (ε/2) (1 − log ε + log(D + ε/2)), for reg = ε KL and cost ‖x − y‖².
  """
  half = epsilon / 2
  d = np.sqrt(4 * s * t + half**2)
  return mean_gap @ mean_gap + np.sum(s + t - d + half * (1 - np.log(2 * half) + np.log(d + half)))


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_gaussian_clouds_follow_the_closed_form(epsilon):
  # Normal quantiles on a fine grid: a cloud of one dimension without sampling noise, so that what
  # remains is the tails' discretisation (below 0.5 % of a unit at 600 points).
  from scipy.stats import norm

  u = norm.ppf((np.arange(600) + 0.5) / 600)[:, None]
  x, y = 1.5 * u, 0.7 * u + 1.0
  result = sinkhorn(x, y, epsilon=epsilon, threshold=1e-7, dtype=tf.float64)
  expected = _gaussian_entropic_cost(np.ones(1), np.array([2.25]), np.array([0.49]), epsilon)
  np.testing.assert_allclose(result.reg_ot_cost, expected, rtol=0, atol=0.01)


def test_gaussian_samples_follow_bures():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 800, 2))
  z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)  # the samples' own moments are exact
  scales = np.array([1.5, 0.7])
  x, y = z[0], z[1] * scales + [1.0, 0.0]
  result = sinkhorn_divergence(x, y, epsilon=0.1, dtype=tf.float64)
  bures = 1.0 + np.sum((scales - 1) ** 2)
  # What is left are the samples' shapes: W₂² between two samples of a standard normal distribution
  # in the plane, about log(n) / n = 0.01, enters with its root through the triangle inequality.
  distance = np.sqrt(result.divergence)
  assert abs(distance - np.sqrt(bures)) < 0.1


@pytest.mark.parametrize("chunk", [None, 16])
def test_gradients_in_points(chunk):
  x, y, a = _clouds(12, 15, 3)
  x, y = tf.constant(x), tf.constant(y)
  weights = np.full(15, 1 / 15)
  a = a / a.sum()
  rng = np.random.default_rng(1)
  dx, dy = rng.normal(size=x.shape), rng.normal(size=y.shape)

  def value(step):
    return sinkhorn(x + step * dx, y + step * dy, a, weights, epsilon=0.5, chunk=chunk, **TIGHT)

  with tf.GradientTape() as tape:
    tape.watch([x, y])
    cost = sinkhorn(x, y, a, weights, epsilon=0.5, chunk=chunk, **TIGHT).reg_ot_cost
  gx, gy = tape.gradient(cost, [x, y])
  analytic = tf.reduce_sum(gx * dx) + tf.reduce_sum(gy * dy)
  numeric = (value(1e-4).reg_ot_cost - value(-1e-4).reg_ot_cost) / 2e-4
  # Central differences: step² times the third derivative (some 100) and rounding / step.
  np.testing.assert_allclose(analytic, numeric, rtol=1e-6)


def test_gradients_in_cost_and_weights():
  x, y, _ = _clouds(12, 15, 3)
  costs = tf.constant(_costs(x, y))
  a, b = (
    tf.fill([12], tf.constant(1 / 12, tf.float64)),
    tf.fill([15], tf.constant(1 / 15, "double")),
  )
  rng = np.random.default_rng(1)
  dc, da, db = (rng.normal(size=v.shape) for v in (costs, a, b))
  da, db = 0.1 * (da - da.mean()) / 12, 0.1 * (db - db.mean()) / 15

  def value(s):
    return sinkhorn(cost=costs + s * dc, a=a + s * da, b=b + s * db, epsilon=0.5, **TIGHT)

  with tf.GradientTape() as tape:
    tape.watch([costs, a, b])
    cost = 3 * sinkhorn(cost=costs, a=a, b=b, epsilon=0.5, **TIGHT).reg_ot_cost
  gradients = tape.gradient(cost, [costs, a, b])
  analytic = sum(tf.reduce_sum(g * d) for g, d in zip(gradients, (dc, da, db)))
  numeric = 3 * (value(1e-4).reg_ot_cost - value(-1e-4).reg_ot_cost) / 2e-4
  np.testing.assert_allclose(analytic, numeric, rtol=1e-6)  # as for points
  np.testing.assert_allclose(tf.reduce_sum(gradients[0]), 3, rtol=1e-9)  # three times the mass of P


def test_gradient_of_the_divergence():
  x, y, a = _clouds(12, 15, 3)
  x = tf.constant(x)
  direction = np.random.default_rng(1).normal(size=x.shape)

  def value(points):
    return sinkhorn_divergence(points, y, a, epsilon=0.5, **TIGHT).divergence

  with tf.GradientTape() as tape:
    tape.watch(x)
    divergence = value(x)
  analytic = tf.reduce_sum(tape.gradient(divergence, x) * direction)
  numeric = (value(x + 1e-4 * direction) - value(x - 1e-4 * direction)) / 2e-4
  np.testing.assert_allclose(analytic, numeric, rtol=1e-6)  # as for points
  with tf.GradientTape() as tape:
    tape.watch(x)
    still = sinkhorn_divergence(x, x, a, a, epsilon=0.5, **TIGHT).divergence
  # Its minimum: zero gradient, up to the threshold times the spread of the cloud.
  np.testing.assert_allclose(tape.gradient(still, x), 0, atol=1e-8)


def test_new_values_and_shapes_do_not_retrace(monkeypatch):
  x, y, a = _clouds()
  options = {"dtype": tf.float64, "scaling": 0.5}
  sinkhorn(x, y, a, epsilon=0.5, **options)
  traced = []
  for name in ("_sweep", "_column_potentials", "_anderson"):
    original = getattr(module, name)
    monkeypatch.setattr(
      module, name, lambda *args, _f=original, **kw: traced.append(1) or _f(*args, **kw)
    )
  sinkhorn(x + 1, y, epsilon=0.7, threshold=1e-4, max_iterations=7, **options)
  sinkhorn(x[:9], y[:11, :], init=(None, np.zeros(11)), **options)
  assert not traced  # Python code of the solver runs while it is traced only
  module._solver.cache_clear()
  sinkhorn(x, y, a, epsilon=0.5, **options)
  assert traced


def test_inside_a_function():
  x, y, a = _clouds()
  eager = sinkhorn(x, y, a, epsilon=0.5, **TIGHT)
  graph = tf.function(lambda x, y: sinkhorn(x, y, a, epsilon=0.5, **TIGHT))(
    tf.constant(x), tf.constant(y)
  )
  np.testing.assert_allclose(graph.reg_ot_cost, eager.reg_ot_cost, rtol=1e-12)  # same operations


def test_errors_name_value_cause_and_remedy():
  x, y, a = _clouds()
  with pytest.raises(ValueError, match=r"epsilon=1e-06 is too small for float32.*use dtype=tf.fl"):
    sinkhorn(x, y, epsilon=1e-6, dtype=tf.float32)
  with pytest.raises(ValueError, match=r"epsilon=1e-15 is too small for float64.*at least"):
    sinkhorn(cost=_costs(x, y), epsilon=1e-15)
  sinkhorn(x, y, epsilon=1e-4, dtype=tf.float64, max_iterations=2)  # what the message advises
  bad = x.copy()
  bad[7, 2] = np.nan
  with pytest.raises(ValueError, match=r"x holds NaN.* in 1 of 40 rows, first in row 7"):
    sinkhorn(bad, y)
  with pytest.raises(ValueError, match=r"y holds NaN"):
    sinkhorn(y, bad)
  with pytest.raises(ValueError, match=r"cost holds NaN, inf"):
    sinkhorn(cost=np.full((3, 3), np.inf))
  with pytest.raises(ValueError, match=r"a has the sum 2 .*divide by their sum"):
    sinkhorn(x, y, 2 * a)
  with pytest.raises(ValueError, match=r"b has the sum nan"):
    sinkhorn(x, y, a, np.full(50, np.nan))
  with pytest.raises(ValueError, match=r"smallest weight -0.2"):
    sinkhorn(x, y[:2], None, [1.2, -0.2])
  with pytest.raises(ValueError, match=r"a has shape \(39,\).*\(40,\)"):
    sinkhorn(x, y, a[1:])
  with pytest.raises(ValueError, match=r"x has 5 numbers per point and y has 4"):
    sinkhorn(x, y[:, 1:])
  with pytest.raises(ValueError, match=r"flatten each point"):
    sinkhorn(x[:, :, None], y)
  with pytest.raises(ValueError, match=r"positive size"):
    sinkhorn(x[:0], y)
  with pytest.raises(ValueError, match=r"either the points x and y, or cost"):
    sinkhorn(x, y, cost=_costs(x, y))
  with pytest.raises(ValueError, match=r"b is given without y"):
    sinkhorn(x, b=a)
  with pytest.raises(ValueError, match=r"relative_epsilon='median'"):
    sinkhorn(x, y, relative_epsilon="median")
  with pytest.raises(ValueError, match=r"epsilon=0 \(0.05 times the std of the costs\)"):
    sinkhorn(x[:1], y[:1])
  with pytest.raises(ValueError, match=r"epsilon=-1 must be positive"):
    sinkhorn(x, y, epsilon=-1.0)
  with pytest.raises(ValueError, match=r"scaling=2 must lie between"):
    sinkhorn(x, y, scaling=2)
  with pytest.raises(ValueError, match=r"chunk=0"):
    sinkhorn(x, y, chunk=0)
  with pytest.raises(ValueError, match=r"threshold=0"):
    sinkhorn(x, y, threshold=0)
  with pytest.raises(ValueError, match=r"max_iterations=0"):
    sinkhorn(x, y, max_iterations=0)
  with pytest.raises(ValueError, match=r"dtype=float16"):
    sinkhorn(x, y, dtype=tf.float16)
  with pytest.raises(ValueError, match=r"init's g has shape \(40,\)"):
    sinkhorn(x, y, init=(None, np.zeros(40)))
  with pytest.raises(ValueError, match=r"init's g holds NaN"):
    sinkhorn(x, y, init=(None, np.full(50, np.nan)))
  with pytest.raises(ValueError, match=r"x_i is paired with y_i"):
    identity_potentials(x, y)


@pytest.mark.slow
def test_twenty_thousand_points_without_the_matrix():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(20000, 8)).astype(np.float32)
  cold = sinkhorn(x, 1.1 * x + 0.1, epsilon=2.0)
  assert cold.converged
  # x → 1.1 x + 0.1 has the second moment below as its cost; blur by ε adds, but not without bound.
  exact = np.mean(np.sum((0.1 * x + 0.1) ** 2, axis=1))
  assert exact < cold.reg_ot_cost < exact + 2.0 * np.log(20000)


@pytest.mark.slow
def test_missed_marginals_at_their_prices_make_the_cost_right_to_second_order(rng):
  """Points in few dimensions, closer together than √ε, take many iterations."""
  x = rng.standard_normal((300, 2))
  y = 0.6 * x + 0.05 * rng.standard_normal((300, 2))
  solve = lambda threshold: sinkhorn(
    x, y, epsilon=0.02, threshold=threshold, max_iterations=100_000, dtype=tf.float64
  )
  truth = float(solve(1e-9).transport_cost)
  raw, priced = [], []
  for threshold in (3e-2, 1e-2, 3e-3):
    r = solve(threshold)
    assert r.converged
    raw.append(abs(float(r.transport_cost) - truth))
    priced.append(abs(float(r.transport_cost + r.missed_cost) - truth))
  assert np.all(np.array(priced) < 0.25 * np.array(raw))
  assert abs(float(solve(1e-9).missed_cost)) < 1e-8


@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_beside_a_gpu_nothing_depends_on_its_products(rng, monkeypatch, kind):
  """Costs, kernels, plans, gradients and starts from float32 points, as a GPU multiplies."""
  x, y = (rng.random([40, 30]).astype(np.float32) + 3.0 for _ in range(2))

  def forget():  # traced without the emulation, or with it
    for made in (module._solver, module._statistics, module._point_gradients):
      made.cache_clear()

  def everything(dtype=None):
    forget()
    parts = {}
    for chunk in (None, 16):  # stored and streamed
      points = tf.constant(x), tf.constant(y)
      with tf.GradientTape() as tape:
        tape.watch(points)
        result = sinkhorn(*points, chunk=chunk, dtype=dtype, threshold=1e-6)
      parts[f"gradients {chunk}"] = tape.gradient(result.reg_ot_cost, points)
      parts[f"costs {chunk}"] = [result.reg_ot_cost, result.transport_cost, result.epsilon]
      parts[f"potentials {chunk}"] = [result.f - result.f[0], result.g - result.g[0]]
    divergence = sinkhorn_divergence(x, y, dtype=dtype, threshold=1e-6)
    return parts | {
      "divergence": [divergence.divergence],
      "identity": identity_potentials(x, y),
    }

  def worst(got, want):
    return max(np.abs(np.subtract(g, w)).max() for k in want for g, w in zip(got[k], want[k]))

  try:
    want = everything(tf.float64)
    plain = worst(everything(), want)
    assert plain < 5e-3  # float32's rounding, which differs by processor
    with emulation.products(kind):
      assert worst(everything(), want) > 10 * plain  # it can fail
      monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [kind])
      beside = everything()
      assert worst(beside, want) < 5e-6
      assert {v.dtype for k in beside for v in beside[k]} == {tf.float32}
      assert {v.dtype for v in everything(tf.float64)["costs 16"]} == {tf.float64}
  finally:
    forget()
