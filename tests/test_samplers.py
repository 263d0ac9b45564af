import dataclasses
import importlib.util
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, rng, samplers, schedules
from soft_diffusion_tf.diffusion import Diffusion

_spec = importlib.util.spec_from_file_location(
  "printed_algorithms", pathlib.Path(__file__).parent / "printed_algorithms.py"
)
printed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(printed)

SEEDS = np.array([11, 5, 8])


@pytest.fixture(scope="module")
def rising(blur_diffusion):
  """Blur and noise that both change all along, so that every term of an update counts."""
  return dataclasses.replace(
    blur_diffusion,
    level=schedules.Geometric(0.01, 6.0),
    sigma_schedule=schedules.Geometric(0.01, 0.5),
  )


def denoiser(x_t, t):
  """A stand-in for a network: smooth, not linear, dependent on t."""
  t = tf.reshape(tf.cast(t, tf.float32), [-1, 1, 1, 1])
  return tf.tanh(x_t) * (1.2 - t) + 0.1


def run_printed(step, diffusion, times, seeds, **options):
  """The printed algorithm from the same start with the same noise as the sampler draws."""
  sigma = lambda t: float(diffusion.sigma(np.float32(t)))
  blur = lambda x, t: diffusion.corrupt(x.astype(np.float32), np.float32(t)).numpy().astype(float)
  predict = lambda x, t: denoiser(x.astype(np.float32), np.full(len(x), t)).numpy().astype(float)
  x = diffusion.draw_prior(seeds).numpy().astype(float)
  for k, (t, s) in enumerate(itertools.pairwise(times)):
    eta = rng.normal_per_image(rng.image_seeds(seeds), k, diffusion.image_shape).numpy()
    eta = eta if s > 0 else 0 * eta  # the one departure: no fresh noise in the finished image
    x = step(x, predict, blur, sigma, t, t - s, eta, **options)
  return x


@pytest.mark.parametrize("name", ["naive", "momentum", "probability_flow", "ddim"])
def test_every_rule_is_the_printed_algorithm(rising, name):
  times = samplers.time_grid(12)
  rows = samplers.table(name, times, rising, denoise=False)
  got = samplers.Sampler(rising, denoiser)(rows, SEEDS).numpy()
  want = run_printed(getattr(printed, name), rising, times, SEEDS)
  if name == "naive":  # P's σ_0 is 0; ours ends at the schedule's σ(0), which b = 0 leaves out
    assert np.isfinite(want).all()
  # float32 against float64 over 12 steps
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_ddim_with_fresh_noise(rising):
  times = samplers.time_grid(8)[:-1]  # stops before t = 0, where σ would fall below k
  rows = samplers.table("ddim", times, rising, k=0.008, denoise=False)
  got = samplers.Sampler(rising, denoiser)(rows, SEEDS).numpy()
  want = run_printed(printed.ddim, rising, times, SEEDS, k=0.008)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_momentum_without_corruption_is_the_ve_reverse_sde(ve_diffusion):
  times = samplers.time_grid(10)
  rows = samplers.table("momentum", times, ve_diffusion, denoise=False)
  got = samplers.Sampler(ve_diffusion, denoiser)(rows, SEEDS).numpy()
  want = run_printed(printed.ve_reverse_sde, ve_diffusion, times, SEEDS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)  # values start at σ = 50


def test_predictor_corrector_alternates(rising):
  times = samplers.time_grid(6)
  both = samplers.table("predictor_corrector", times, rising, denoise=False).numpy()
  ddim = samplers.table("ddim", times, rising, denoise=False).numpy()
  flow = samplers.table("probability_flow", times, rising, denoise=False).numpy()
  np.testing.assert_array_equal(both[0::2], ddim[0::2])
  np.testing.assert_array_equal(both[1::2], flow[1::2])


def test_vp_ancestral_sampling_is_a_ddim_row():
  """Song et al. 2021 (DDIM), Eq. 12 with σ_τ(η = 1): the ancestral sampler of DDPM."""
  process = Diffusion((8, 8, 1), corruptions.Scale(), schedules.VPScale(), schedules.VPSigma())
  t, s = 0.6, 0.5
  a_t, a_s = (float(process.level(np.float32(v))) ** 2 for v in (t, s))
  sigma_t, sigma_s = np.sqrt(1 - a_t), np.sqrt(1 - a_s)
  k = sigma_s / sigma_t * np.sqrt(1 - a_t / a_s)
  row = samplers.table("ddim", [t, s], process, k=k, denoise=False).numpy()[0]
  x_0, eps = 0.3, 0.7
  x_t = np.sqrt(a_t) * x_0 + sigma_t * eps
  beta = 1 - a_t / a_s
  mean = (np.sqrt(a_s) * beta * x_0 + np.sqrt(1 - beta) * (1 - a_s) * x_t) / (1 - a_t)
  got = np.sqrt(a_s) * x_0 + row[2] * (x_t - np.sqrt(a_t) * x_0)
  np.testing.assert_allclose(got, mean, rtol=1e-5)  # the mean of q(x_s | x_t, x_0)
  np.testing.assert_allclose(row[3] ** 2, beta * (1 - a_s) / (1 - a_t), rtol=1e-5)  # its variance


def test_rules_keep_the_noise_at_its_level(rising):
  """With a perfect x̂_0 the residual is σ_t η; after a step it must have the size σ_s."""
  times = samplers.time_grid(20)[:-1]
  sigma_s = rising.sigma(times[1:].astype(np.float32)).numpy()
  sigma_t = rising.sigma(times[:-1].astype(np.float32)).numpy()
  for name in ("naive", "momentum", "ddim"):
    rows = samplers.table(name, times, rising, k=0.004).numpy()
    size = np.sqrt((rows[:, 2] * sigma_t) ** 2 + rows[:, 3] ** 2)
    if name == "momentum":  # Euler-Maruyama: right to first order in the step
      np.testing.assert_allclose(size, sigma_s, rtol=0.15)
    else:
      np.testing.assert_allclose(size, sigma_s, rtol=1e-5)


def test_the_last_step(rising):
  times = samplers.time_grid(5)
  for name in samplers.SAMPLERS:
    final = samplers.table(name, times, rising).numpy()[-1]
    np.testing.assert_array_equal(final[1:], np.zeros(5))
    kept = samplers.table(name, times, rising, denoise=False).numpy()[-1]
    assert kept[3] == 0
    assert (kept[2] > 0) == (name != "naive")
  stopped = samplers.table("momentum", [1.0, 0.6, 0.3], rising).numpy()
  assert stopped[-1, 3] > 0  # a run that stops early keeps its noise


def test_an_image_is_its_seeds_alone(rising):
  rows = samplers.table("momentum", samplers.time_grid(6), rising)
  sampler = samplers.Sampler(rising, denoiser)
  together = sampler(rows, SEEDS).numpy()
  np.testing.assert_array_equal(sampler(rows, SEEDS[::-1])[::-1], together)
  for k, seed in enumerate(SEEDS):
    # A matrix product of another batch size may round differently; other noise differs by 1.
    np.testing.assert_allclose(sampler(rows, [seed])[0], together[k], atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.01


def test_one_trace_for_every_table_and_batch(rising):
  traces = []

  def counted(x_t, t):
    traces.append(1)
    return denoiser(x_t, t)

  sampler = samplers.Sampler(rising, counted)
  for name in samplers.SAMPLERS:
    for steps in (1, 7):
      sampler(samplers.table(name, samplers.time_grid(steps), rising), range(steps))
  assert len(traces) == 1


def test_xla_gives_the_same_images(rising):
  rows = samplers.table("momentum", samplers.time_grid(4), rising)
  seeds = rng.image_seeds(SEEDS)
  x = rising.draw_prior(seeds)
  args = (rows, seeds, x, tf.zeros_like(x), tf.constant(0))
  run = lambda *a: samplers.sample(rising, denoiser, *a)[0]
  np.testing.assert_allclose(tf.function(run, jit_compile=True)(*args), run(*args), atol=2e-5)


def test_the_trajectory_ends_where_the_sampler_does(rising):
  sampler = samplers.Sampler(rising, denoiser)
  for name in ("momentum", "two_step"):
    rows = samplers.table(name, samplers.time_grid(7), rising)
    times, states, predictions = sampler.trajectory(rows, SEEDS, 4)
    assert times[0] == 1
    assert times[-1] == 0
    assert len(states) == len(times) == len(predictions) + 1
    np.testing.assert_array_equal(states[-1], sampler(rows, SEEDS))


def test_sampling_from_a_given_state(rising):
  rows = samplers.table("ddim", samplers.time_grid(4, start=0.5), rising)
  x = np.full([3, 8, 8, 1], 0.3, np.float32)
  images = samplers.Sampler(rising, denoiser)(rows, SEEDS, x).numpy()
  np.testing.assert_allclose(images[0], images[2], atol=1e-6)  # deterministic, same start


@pytest.mark.parametrize("kind", samplers.GRIDS)
def test_time_grids(rising, kind):
  for steps in (1, 2, 17):
    grid = samplers.time_grid(steps, kind, rising, start=0.8)
    assert len(grid) == steps + 1
    assert grid[0] == pytest.approx(0.8)
    assert grid[-1] == 0
    assert np.all(np.diff(grid) < 0)


def test_the_level_grid_takes_even_steps_of_level(rising):
  process = dataclasses.replace(rising, level=schedules.Linear(0.0, 6.0))
  np.testing.assert_allclose(
    samplers.time_grid(10, "level", process), samplers.time_grid(10), atol=1e-3
  )
  grid = samplers.time_grid(10, "level", rising)
  steps = -np.diff(rising.level(grid.astype(np.float32)).numpy())
  assert steps.max() < 2.5 * np.median(steps)  # uniform t would give a factor of 100


def test_a_users_rule(rising):
  def halfway(sigma_t, sigma_s):
    a = 0.5 * (sigma_s / sigma_t)
    return a, np.sqrt(sigma_s**2 - (a * sigma_t) ** 2)

  rows = samplers.table(halfway, samplers.time_grid(5), rising)
  assert np.isfinite(samplers.Sampler(rising, denoiser)(rows, SEEDS)).all()


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (lambda d: samplers.table("momentun", [1, 0], d), "did you mean 'momentum'"),
    (lambda d: samplers.table("ddim", [0.0, 0.5, 1.0], d), "are they ascending"),
    (lambda d: samplers.table("ddim", [1.2, 0.5], d), r"within \[0, 1\]"),
    (lambda d: samplers.table("ddim", [1.0], d), "at least two"),
    (lambda d: samplers.time_grid(0), "at least 1 step, got 0"),
    (lambda d: samplers.time_grid(3, "linear"), "unknown time grid"),
    (lambda d: samplers.time_grid(3, start=0.0), "start time"),
  ],
)
def test_bad_requests(rising, make, text):
  with pytest.raises(ValueError, match=text):
    make(rising)


def test_a_reverse_step_must_not_raise_the_noise(rising):
  class Falling:
    sigma = staticmethod(lambda t: tf.constant(1.0 - 0.5 * np.asarray(t)))

  with pytest.raises(ValueError, match=r"raises the noise from 0\.5 to 0\.75"):
    samplers.table("momentum", [1.0, 0.5, 0.0], Falling())
