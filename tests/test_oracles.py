import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, gaussians, oracles, priors, samplers, schedules
from soft_diffusion_tf.diffusion import Diffusion


def posterior_mean_by_hand(mixture, diffusion, x_t, t):
  """E[x_0|x_t] in float64 with dense matrices and plain Bayes."""
  shape = diffusion.image_shape
  size = int(np.prod(shape))
  basis = np.eye(size, dtype=np.float32).reshape(size, *shape)
  matrix = diffusion.corrupt(basis, np.float32(t)).numpy().reshape(size, size).T.astype(float)
  sigma = float(diffusion.sigma(np.float32(t)))
  total, weights = 0.0, []
  for k, mean in enumerate(mixture.means.reshape(-1, size)):
    spread = (
      mixture.std**2 * np.eye(size) if mixture.covariances is None else mixture.covariances[k]
    )
    inner = matrix @ spread @ matrix.T + sigma**2 * np.eye(size)
    gap = x_t.reshape(-1, size) - matrix @ mean
    solved = np.linalg.solve(inner, gap.T).T
    logit = -0.5 * np.sum(gap * solved, 1) - 0.5 * np.linalg.slogdet(inner)[1]
    weights.append(logit + mixture.log_weights[k])
    total = [*(total or []), mean + solved @ (spread @ matrix.T).T]
  weights = np.exp(np.array(weights) - np.max(weights, 0))
  weights /= weights.sum(0)
  return np.einsum("kb,kbd->bd", weights, np.array(total)).reshape(x_t.shape)


@pytest.mark.parametrize(
  "corruption",
  [
    corruptions.GaussianBlur(),
    corruptions.Mask("centre"),
    corruptions.Identity(),
    corruptions.BlockAverage(),
  ],
  ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("full", [False, True])
def test_the_exact_denoiser_is_bayes(digits, rng, corruption, full):
  last = {"GaussianBlur": 4.0, "Mask": 1.0, "Identity": 0.0, "BlockAverage": 2.5}
  top = last[type(corruption).__name__]
  process = Diffusion(
    (8, 8, 1), corruption, schedules.Linear(0.0, top), schedules.Geometric(0.05, 0.5)
  )
  covariances = None
  if full:
    roots = rng.standard_normal([4, 64, 64]) * 0.03
    covariances = roots @ roots.transpose(0, 2, 1) + 1e-4 * np.eye(64)
  mixture = oracles.GaussianMixture(digits[:4], 0.2, covariances, np.array([0.1, 0.2, 0.3, 0.4]))
  denoise = oracles.denoiser(mixture, process)
  for t in (0.1, 0.6, 1.0):
    x_0 = mixture.draw(5, seed=1)
    x_t = process.forward(x_0, t, rng.standard_normal(x_0.shape).astype(np.float32)).numpy()
    want = posterior_mean_by_hand(mixture, process, x_t, t)
    np.testing.assert_allclose(denoise(x_t, np.full(5, t)), want, atol=2e-3)  # float32 logits


@pytest.mark.parametrize(
  ("corruption", "shape", "level"),
  [
    (corruptions.BlockAverage(), (12, 12, 1), 4.0),
    (corruptions.BlockAverage(), (12, 10, 1), 3.0),
    (corruptions.BlockAverage(), (16, 16, 1), 3.0),
    (
      corruptions.Compose(corruptions.BlockAverage(), corruptions.Mask(), (0, 4), (0, 1)),
      (12, 10, 1),
      0.7,
    ),
  ],
  ids=lambda v: type(v).__name__ if isinstance(v, corruptions.Corruption) else str(v),
)
def test_the_exact_denoiser_is_bayes_where_rank_is_lost(rng, corruption, shape, level):
  process = Diffusion(
    shape, corruption, schedules.Linear(0.0, level), schedules.Geometric(0.05, 0.5)
  )
  mixture = oracles.GaussianMixture(rng.random([5, *shape]), 0.2)
  denoise = oracles.denoiser(mixture, process)
  for t in (0.5, 1.0):
    x_0 = mixture.draw(4, seed=1)
    x_t = process.forward(x_0, t, rng.standard_normal(x_0.shape).astype(np.float32)).numpy()
    want = posterior_mean_by_hand(mixture, process, x_t, t)
    times = np.full(4, t, np.float32)
    for how in (denoise, tf.function(denoise)):
      np.testing.assert_allclose(how(x_t, times), want, atol=2e-3)  # float32 logits of ±100


def test_draws_have_the_mixtures_moments(digits):
  mixture = oracles.GaussianMixture(digits[:300], 0.1)
  drawn = gaussians.Moments().update(mixture.draw(20_000))
  want = gaussians.Moments().update(digits[:300])
  np.testing.assert_allclose(drawn.mean, want.mean, atol=0.02)
  np.testing.assert_allclose(
    np.diag(drawn.covariance), np.diag(want.covariance) * 299 / 300 + 0.01, atol=0.02
  )


@pytest.fixture(scope="module")
def laboratory(digits, blur_diffusion):
  """Digits as a mixture, its exact denoiser, and a function sampler, steps → Fréchet distance."""
  mixture = oracles.GaussianMixture(digits, 0.05)
  process = blur_diffusion.with_prior(priors.fit("subspace", digits, blur_diffusion, 32))
  sampler = samplers.Sampler(process, oracles.denoiser(mixture, process))
  fresh = mixture.draw(1500, seed=1)

  def grade(name, steps):
    plan = samplers.plan(name, samplers.time_grid(steps), process)
    return gaussians.frechet_between(sampler(plan, range(1500)), fresh)

  return grade, gaussians.frechet_between(mixture.draw(1500, seed=2), fresh)


def test_naive_samples_another_distribution_and_the_others_converge(laboratory):
  grade, floor = laboratory
  at_80 = {name: grade(name, 80) for name in ("naive", "momentum", "probability_flow", "ddim")}
  # At 80 steps a discretisation error of a fifth of the floor is left (docs/samplers.md),
  # and a distance between two samples of 1,500 varies by a tenth; Naive stays at five floors.
  for name in ("momentum", "probability_flow", "ddim"):
    assert at_80[name] < 1.6 * floor, (name, at_80, floor)
  assert at_80["naive"] > 3 * floor


def test_two_steps_are_closer_at_few_evaluations(laboratory):
  grade, _ = laboratory
  best = min(grade(name, 10) for name in ("momentum", "probability_flow", "ddim"))
  assert grade("two_step", 10) < 0.6 * best


def test_two_step_is_second_order_and_ddim_first(rng):
  """Gaussian data, whose flow is known: halving the step divides the error by 2, or by 4."""
  process = Diffusion(
    (8, 8, 1),
    corruptions.GaussianBlur(),
    schedules.Linear(0.01, 3.0),
    schedules.Geometric(0.05, 0.5),
  ).with_prior(priors.zero((8, 8, 1)))
  mixture = oracles.GaussianMixture(rng.random([1, 8, 8, 1]), 0.3)
  sampler = samplers.Sampler(process, oracles.denoiser(mixture, process))

  def end(name, steps):
    times = 0.2 + 0.8 * samplers.time_grid(steps)  # away from t = 0, where the last step is special
    return sampler(samplers.plan(name, times, process), range(4)).numpy().astype(np.float64)

  truth = end("two_step", 1280)
  order = {}
  for name in ("ddim", "probability_flow", "two_step"):
    errors = [np.sqrt(np.mean((end(name, n) - truth) ** 2)) for n in (20, 40, 80)]
    order[name] = np.log2(errors[0] / errors[-1]) / 2
  assert order["ddim"] == pytest.approx(1, abs=0.15)
  assert order["probability_flow"] == pytest.approx(1, abs=0.15)
  assert order["two_step"] == pytest.approx(2, abs=0.25)


def test_a_known_error_has_its_size(blur_diffusion, digits):
  mixture = oracles.GaussianMixture(digits[:50], 0.05)
  exact = oracles.denoiser(mixture, blur_diffusion)
  wrong = oracles.noisy(exact, blur_diffusion, 0.1)
  x, t = digits[:200], np.full(200, 0.5)
  gap = np.linalg.norm(wrong(x, t) - exact(x, t), axis=(1, 2)).ravel()
  size = np.linalg.norm(x - x.mean(0), axis=(1, 2)).ravel()
  assert 0.02 < np.median(gap / size) < 0.1
  np.testing.assert_array_equal(wrong(x, t), wrong(x, t))


def test_per_class(digits):
  labels = np.arange(len(digits)) % 3
  mixture = oracles.GaussianMixture.per_class(digits, labels)
  assert mixture.covariances.shape == (3, 64, 64)
  np.testing.assert_allclose(np.exp(mixture.log_weights).sum(), 1, rtol=1e-5)
  assert dataclasses.replace(mixture).draw(3).shape == (3, 8, 8, 1)


def test_means_that_are_no_images_are_refused(digits):
  with pytest.raises(ValueError, match=r"means of a mixture are uint8.*divide by 255"):
    oracles.GaussianMixture(np.uint8(255 * digits[:4]))
  with pytest.raises(ValueError, match="means of a mixture hold NaN"):
    oracles.GaussianMixture(digits[:4] * np.nan)
