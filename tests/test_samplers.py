import dataclasses
import importlib.util
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, priors, rng, samplers, schedules
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
  plan = samplers.plan(name, times, rising, denoise=False)
  got = samplers.Sampler(rising, denoiser)(plan, SEEDS).numpy()
  want = run_printed(getattr(printed, name), rising, times, SEEDS)
  if name == "naive":  # P's σ_0 is 0; ours ends at the schedule's σ(0), which b = 0 leaves out
    assert np.isfinite(want).all()
  # float32 against float64 over 12 steps
  np.testing.assert_allclose(got, want, atol=2e-5)


def cold(x, predict, blur, sigma, t, dt, eta):
  """Bansal et al. 2022, Algorithm 2, line by line."""
  x0_hat = predict(x, t)
  return x - blur(x0_hat, t) + blur(x0_hat, t - dt)


@pytest.mark.parametrize(
  "name", ["momentum", "probability_flow", "ddim", "ancestral", "predictor_corrector"]
)
def test_where_the_noise_stands_still_all_samplers_are_one(blur_diffusion, name):
  """They are Cold Diffusion's update there: in the paper's process for t > 0.2."""
  times = np.linspace(1.0, 0.25, 9)
  plan = samplers.plan(name, times, blur_diffusion)
  # σ is float32: equal to 6e-8, of which b is a root.
  np.testing.assert_allclose(plan[:, 2], 1.0, atol=1e-6)
  np.testing.assert_allclose(plan[:, 3], 0.0, atol=1e-4)
  got = samplers.Sampler(blur_diffusion, denoiser)(plan, SEEDS).numpy()
  want = run_printed(cold, blur_diffusion, times, SEEDS)
  np.testing.assert_allclose(got, want, atol=2e-4)  # of b: the square root of σ's rounding
  # Below, where the noise falls, none of them is that update.
  falling = samplers.plan(name, np.linspace(0.2, 0.0, 5), blur_diffusion, denoise=False)
  assert np.all(falling[:, 2] < 0.9)


RULES = (
  "naive",
  "momentum",
  "probability_flow",
  "ddim",
  "ancestral",
  "predictor_corrector",
  "stochastic_two_step",
  "langevin",
)


@pytest.mark.parametrize("name", RULES)
def test_without_noise_they_are_cold_diffusion_or_naive(blur_diffusion, name):
  """σ = 0 throughout: P Eq. 18, which is Bansal et al.'s Algorithm 2, and their Algorithm 1."""
  quiet = dataclasses.replace(blur_diffusion, sigma_schedule=schedules.Constant(0.0))
  times = samplers.time_grid(7)
  plan = samplers.plan(name, times, quiet, denoise=False)
  moves = plan.numpy()[:, 0] != plan.numpy()[:, 1]  # without the correctors that stay
  np.testing.assert_array_equal(plan[:, 3], 0.0)
  if name == "langevin":  # ε = 0: its corrector must not pull x to C x̂_0, which is no noise
    np.testing.assert_array_equal(plan.numpy()[~moves, 2], 1.0)
  plan = tf.constant(plan.numpy()[moves] * np.float32([1, 1, 1, 1, 0, 1]))  # γ: two-step's own
  got = samplers.Sampler(quiet, denoiser)(plan, SEEDS).numpy()
  want = run_printed(printed.naive if name == "naive" else cold, quiet, times, SEEDS)
  np.testing.assert_allclose(got, want, atol=2e-5)  # float32 against float64


def test_the_flow_without_noise_is_the_change_of_the_corruption(blur_diffusion, digits):
  quiet = dataclasses.replace(
    blur_diffusion, sigma_schedule=schedules.Constant(0.0), level=schedules.Linear(0.01, 3.0)
  )
  x, t, h = digits[:2], np.float32(0.5), 1e-2
  got = samplers.velocity(quiet, lambda x_t, t: x, x, tf.constant(t)).numpy()
  change = (quiet.corrupt(x, t + h) - quiet.corrupt(x, t - h)).numpy() / (2 * h)
  np.testing.assert_allclose(got, change, atol=2e-3 * np.abs(change).max())  # of h²


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_langevin_is_the_corrector_of_song(ve_diffusion, name):
  """Song et al. 2021, Algorithms 4 and 5, by hand in float64, their norms at their averages."""
  process = ve_diffusion if name == "ve" else vp_process().with_prior(priors.zero((8, 8, 1)))
  times, snr = samplers.time_grid(5), 0.16
  got = samplers.Sampler(process, denoiser)(
    samplers.plan("langevin(snr=0.16)", times, process), SEEDS
  )
  predictor = "momentum" if name == "ve" else "ancestral"
  steps = samplers.plan(predictor, times, process).numpy().astype(float)
  predict = lambda x, t: denoiser(x.astype(np.float32), np.full(len(x), t)).numpy().astype(float)
  scale = lambda t: 1.0 if name == "ve" else float(process.level(np.float32(t)))
  x, salt = process.draw_prior(SEEDS).numpy().astype(float), 0

  def noise():
    nonlocal salt
    salt += 1
    return rng.normal_per_image(rng.image_seeds(SEEDS), salt - 1, (8, 8, 1)).numpy()

  for t, s, a, b, *_ in steps:
    x0_hat, z = predict(x, t), noise()
    x = scale(s) * x0_hat + a * (x - scale(t) * x0_hat) + b * z
    if s > 0:
      sigma = float(process.sigma(np.float32(s)))
      score, z = (scale(s) * predict(x, s) - x) / sigma**2, noise()
      epsilon = 2 * (snr * sigma) ** 2  # 2 (snr ‖z‖/‖s‖)²
      x = x + epsilon * score + np.sqrt(2 * epsilon) * z
  np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-3 if name == "ve" else 2e-5)
  # Without its step it is its predictor, evaluated once more.
  none = samplers.plan("langevin(snr=0)", times, process).numpy()
  np.testing.assert_array_equal(none[none[:, 0] != none[:, 1]], steps.astype(np.float32))
  np.testing.assert_array_equal(none[none[:, 0] == none[:, 1], 2:4], [[1, 0]] * 4)


def test_langevin_leaves_the_noise_at_its_level(ve_diffusion):
  """With a perfect x̂_0 the residual is σ η, and stays of that size to snr⁴: (1 − 2s²)² + 4s²."""
  plan = samplers.plan("langevin(snr=0.1)", samplers.time_grid(4), ve_diffusion).numpy()
  plan = plan[plan[:, 0] == plan[:, 1]].astype(float)
  sigma = ve_diffusion.sigma(plan[:, 0].astype(np.float32)).numpy().astype(float)
  got = (plan[:, 2] * sigma) ** 2 + plan[:, 3] ** 2
  np.testing.assert_allclose(got, sigma**2 * (1 + 4 * 0.1**4), rtol=1e-5)


def test_ddim_with_fresh_noise(rising):
  times = samplers.time_grid(8)[:-1]  # stops before t = 0, where σ would fall below k
  plan = samplers.plan("ddim(k=0.008)", times, rising, denoise=False)
  got = samplers.Sampler(rising, denoiser)(plan, SEEDS).numpy()
  want = run_printed(printed.ddim, rising, times, SEEDS, k=0.008)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_momentum_without_corruption_is_the_ve_reverse_sde(ve_diffusion):
  times = samplers.time_grid(10)
  plan = samplers.plan("momentum", times, ve_diffusion, denoise=False)
  got = samplers.Sampler(ve_diffusion, denoiser)(plan, SEEDS).numpy()
  want = run_printed(printed.ve_reverse_sde, ve_diffusion, times, SEEDS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)  # values start at σ = 50


def test_predictor_corrector_alternates(rising):
  times = samplers.time_grid(6)
  both = samplers.plan("predictor_corrector", times, rising, denoise=False).numpy()
  ddim = samplers.plan("ddim", times, rising, denoise=False).numpy()
  flow = samplers.plan("probability_flow", times, rising, denoise=False).numpy()
  np.testing.assert_array_equal(both[0::2], ddim[0::2])
  np.testing.assert_array_equal(both[1::2], flow[1::2])


def test_any_rules_take_turns(rising):
  @dataclasses.dataclass(frozen=True)
  class Halfway(samplers.Rule):
    def coefficients(self, step):
      return samplers.Update(0.5 * step.sigma_s / step.sigma_t, np.sqrt(0.75) * step.sigma_s)

  halfway, times = Halfway(), samplers.time_grid(7)
  both = samplers.plan(("momentum", halfway), times, rising, denoise=False).numpy()
  np.testing.assert_array_equal(
    both[0::2], samplers.plan("momentum", times, rising, denoise=False)[0::2]
  )
  np.testing.assert_array_equal(
    both[1::2], samplers.plan(halfway, times, rising, denoise=False)[1::2]
  )
  named = samplers.plan("ddim+probability_flow", times, rising)
  np.testing.assert_array_equal(named, samplers.plan("predictor_corrector", times, rising))
  # A corrector of two rows keeps its place: ddim, heun (2), ddim, heun (2), …
  mixed = samplers.plan("ddim+heun", times, rising).numpy()
  np.testing.assert_array_equal(mixed[:, 5], [0, 0, 1, 0, 0, 1, 0, 0, 1, 0])


def vp_process():
  return Diffusion((8, 8, 1), corruptions.Scale(), schedules.VPScale(), schedules.VPSigma())


@pytest.mark.parametrize("k", [None, "by hand"])
def test_vp_ancestral_sampling_is_a_ddim_row(k):
  """Song et al. 2021 (DDIM), Eq. 12 with σ_τ(η = 1): the ancestral sampler of DDPM."""
  process = vp_process()
  t, s = 0.6, 0.5
  a_t, a_s = (float(process.level(np.float32(v))) ** 2 for v in (t, s))
  sigma_t, sigma_s = np.sqrt(1 - a_t), np.sqrt(1 - a_s)
  if k is None:
    row = samplers.plan("ancestral", [t, s], process, denoise=False).numpy()[0]
  else:
    k = sigma_s / sigma_t * np.sqrt(1 - a_t / a_s)
    row = samplers.plan(samplers.DDIM(k), [t, s], process, denoise=False).numpy()[0]
  x_0, eps = 0.3, 0.7
  x_t = np.sqrt(a_t) * x_0 + sigma_t * eps
  beta = 1 - a_t / a_s
  mean = (np.sqrt(a_s) * beta * x_0 + np.sqrt(1 - beta) * (1 - a_s) * x_t) / (1 - a_t)
  got = np.sqrt(a_s) * x_0 + row[2] * (x_t - np.sqrt(a_t) * x_0)
  np.testing.assert_allclose(got, mean, rtol=1e-5)  # the mean of q(x_s | x_t, x_0)
  np.testing.assert_allclose(row[3] ** 2, beta * (1 - a_s) / (1 - a_t), rtol=1e-5)  # its variance


def test_ancestral_without_corruption_is_the_posterior_of_ve(ve_diffusion):
  times = samplers.time_grid(6)[:-1]
  plan = samplers.plan("ancestral", times, ve_diffusion).numpy()
  sigma = ve_diffusion.sigma(times.astype(np.float32)).numpy().astype(float)
  t, s = sigma[:-1] ** 2, sigma[1:] ** 2
  np.testing.assert_allclose(plan[:, 2], s / t, rtol=1e-5)
  np.testing.assert_allclose(plan[:, 3] ** 2, s * (t - s) / t, rtol=1e-5)


def test_heun_by_hand(rising):
  """The trapezoidal rule in x̂_0, in float64 NumPy."""
  times = samplers.time_grid(4)
  got = samplers.Sampler(rising, denoiser)(samplers.plan("heun", times, rising), SEEDS).numpy()
  sigma = lambda t: float(rising.sigma(np.float32(t)))
  blur = lambda x, t: rising.corrupt(x.astype(np.float32), np.float32(t)).numpy().astype(float)
  predict = lambda x, t: denoiser(x.astype(np.float32), np.full(len(x), t)).numpy().astype(float)
  x = rising.draw_prior(SEEDS).numpy().astype(float)
  for t, s in itertools.pairwise(times):
    step = lambda x0, t=t, s=s, x=x: blur(x0, s) + sigma(s) / sigma(t) * (x - blur(x0, t))
    first = predict(x, t)
    x = first if s == 0 else step(0.5 * (first + predict(step(first), s)))
  np.testing.assert_allclose(got, x, atol=2e-5)  # float32 against float64


def test_the_amount_of_noise_of_the_stochastic_two_step(rising):
  times = samplers.time_grid(12)[:-1]
  h = times[:-1] - times[1:]
  sigma = rising.sigma(times.astype(np.float32)).numpy().astype(float)
  two_step = samplers.plan("two_step", times, rising).numpy()
  np.testing.assert_array_equal(
    samplers.plan("stochastic_two_step(noise=0)", times, rising), two_step
  )
  plan = samplers.plan("stochastic_two_step(noise=3)", times, rising).numpy()
  np.testing.assert_array_equal(plan[:, 4], two_step[:, 4])
  np.testing.assert_allclose(plan[:, 2], np.exp(-3 * h) * sigma[1:] / sigma[:-1], rtol=1e-5)
  # What is kept and what is fresh make up the noise of the new time.
  total = (plan[:, 2] * sigma[:-1]) ** 2 + plan[:, 3] ** 2
  np.testing.assert_allclose(total, sigma[1:] ** 2, rtol=1e-5)


@pytest.mark.parametrize("name", [*samplers.SAMPLERS, "ddim+heun", "heun+momentum"])
def test_evaluations_are_rows(rising, name):
  """`steps_for` finds the most steps that fit, and every row calls the denoiser once."""
  for nfe in (1, 2, 5, 8, 13):
    count = lambda steps: samplers.plan(name, samplers.time_grid(steps), rising).shape[0]
    steps = samplers.steps_for(name, nfe)
    assert count(steps) <= nfe < count(steps + 1)
  calls = tf.Variable(0)

  def counted(x_t, t):
    with tf.control_dependencies([calls.assign_add(1)]):
      return denoiser(x_t, t)

  plan = samplers.plan(name, samplers.time_grid(4), rising)
  samplers.Sampler(rising, counted)(plan, SEEDS)
  assert int(calls) == plan.shape[0]


def test_nothing_random_with_k_zero(rising):
  """Deterministic rules give one image from one start, whatever the seeds."""
  x = np.full([3, 8, 8, 1], 0.3, np.float32)
  for name in ("probability_flow", "ddim", "two_step", "heun", "predictor_corrector"):
    plan = samplers.plan(name, samplers.time_grid(5), rising)
    images = samplers.Sampler(rising, denoiser)(plan, SEEDS, x).numpy()
    np.testing.assert_allclose(images[0], images[2], atol=1e-6)
  plan = samplers.plan("ddim(k=0.005)", samplers.time_grid(5), rising)
  images = samplers.Sampler(rising, denoiser)(plan, SEEDS, x).numpy()
  assert np.abs(images[0] - images[2]).max() > 1e-3


def test_finite_from_end_to_end(rising, ve_diffusion):
  """Also where σ is 0 at t = 0 (VP) and where nothing of the image is left at t = 1."""
  mask = Diffusion(
    (8, 8, 1),
    corruptions.Mask(edge=1.0),
    schedules.Linear(0.0, 1.0),
    schedules.Geometric(0.01, 0.1),
  )
  for process in (rising, ve_diffusion, vp_process(), mask):
    process = process if process.prior else process.with_prior(priors.zero((8, 8, 1)))
    sampler = samplers.Sampler(process, denoiser)
    for name in samplers.SAMPLERS:
      plan = samplers.plan(samplers.with_fields(name, {"k": 0.01}), samplers.time_grid(3), process)
      assert np.isfinite(sampler(plan, SEEDS)).all(), name
      plan = samplers.plan(name, samplers.time_grid(3), process, denoise=False)
      assert np.isfinite(sampler(plan, SEEDS)).all(), name


def test_rules_keep_the_noise_at_its_level(rising):
  """With a perfect x̂_0 the residual is σ_t η; after a step it must have the size σ_s."""
  times = samplers.time_grid(20)[:-1]
  sigma_s = rising.sigma(times[1:].astype(np.float32)).numpy()
  sigma_t = rising.sigma(times[:-1].astype(np.float32)).numpy()
  for name in ("naive", "momentum", "ddim"):
    plan = samplers.plan(samplers.with_fields(name, {"k": 0.004}), times, rising).numpy()
    size = np.sqrt((plan[:, 2] * sigma_t) ** 2 + plan[:, 3] ** 2)
    if name == "momentum":  # Euler-Maruyama: right to first order in the step
      np.testing.assert_allclose(size, sigma_s, rtol=0.15)
    else:
      np.testing.assert_allclose(size, sigma_s, rtol=1e-5)


def test_the_last_step(rising):
  times = samplers.time_grid(5)
  for name in samplers.SAMPLERS:
    final = samplers.plan(name, times, rising).numpy()[-1]
    np.testing.assert_array_equal(final[1:], np.zeros(5))
    kept = samplers.plan(name, times, rising, denoise=False).numpy()[-1]
    assert kept[3] == 0
    assert (kept[2] > 0) == (name != "naive")
  stopped = samplers.plan("momentum", [1.0, 0.6, 0.3], rising).numpy()
  assert stopped[-1, 3] > 0  # a run that stops early keeps its noise


def test_an_image_is_its_seeds_alone(rising):
  plan = samplers.plan("momentum", samplers.time_grid(6), rising)
  sampler = samplers.Sampler(rising, denoiser)
  together = sampler(plan, SEEDS).numpy()
  np.testing.assert_array_equal(sampler(plan, SEEDS[::-1])[::-1], together)
  for k, seed in enumerate(SEEDS):
    # A matrix product of another batch size may round differently; other noise differs by 1.
    np.testing.assert_allclose(sampler(plan, [seed])[0], together[k], atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.01


def test_one_trace_for_every_table_and_batch(rising):
  traces = []

  def counted(x_t, t):
    traces.append(1)
    return denoiser(x_t, t)

  sampler = samplers.Sampler(rising, counted)
  for name in samplers.SAMPLERS:
    for steps in (1, 7):
      sampler(samplers.plan(name, samplers.time_grid(steps), rising), range(steps))
  assert len(traces) == 1


@pytest.mark.parametrize("name", ["momentum", "heun"])
def test_xla_gives_the_same_images(rising, name):
  """One compiled function for tables of any length, and the numbers of the plain one."""
  compiled = samplers.Sampler(rising, denoiser, jit_compile=True)
  plain = samplers.Sampler(rising, denoiser)
  for steps in (4, 7):
    plan = samplers.plan(name, samplers.time_grid(steps), rising)
    np.testing.assert_allclose(compiled(plan, SEEDS), plain(plan, SEEDS), atol=2e-5)


def test_rows_at_time_zero_are_filling(rising):
  plan = samplers.plan("momentum", samplers.time_grid(4), rising)
  sampler = samplers.Sampler(rising, denoiser)
  filled = tf.concat([plan, tf.zeros([3, samplers.COLUMNS])], axis=0)
  np.testing.assert_array_equal(sampler(filled, SEEDS), sampler(plan, SEEDS))


def test_the_trajectory_ends_where_the_sampler_does(rising):
  sampler = samplers.Sampler(rising, denoiser)
  for name in ("momentum", "two_step", "heun"):
    plan = samplers.plan(name, samplers.time_grid(7), rising)
    times, states, predictions = sampler.trajectory(plan, SEEDS, 4)
    assert times[0] == 1
    assert times[-1] == 0
    assert len(states) == len(times) == len(predictions) + 1
    np.testing.assert_array_equal(states[-1], sampler(plan, SEEDS))


def test_sampling_from_any_time(rising):
  """Two halves of a run are the run; and a table that starts below 1 asks for its start."""
  sampler = samplers.Sampler(rising, denoiser)
  times = samplers.time_grid(8)
  whole = samplers.plan("ddim", times, rising)
  half = samplers.plan("ddim", times[:5], rising)
  rest = samplers.plan("ddim", times[4:], rising)
  np.testing.assert_allclose(
    sampler(rest, SEEDS, sampler(half, SEEDS)), sampler(whole, SEEDS), atol=1e-6
  )
  with pytest.raises(ValueError, match=r"starts at t = 0\.5, and the prior is that of t = 1"):
    sampler(samplers.plan("ddim", samplers.time_grid(4, start=0.5), rising), SEEDS)


# --- The adaptive sampler -------------------------------------------------------------------------


def test_the_velocity_is_the_rate_of_a_ddim_step(rising):
  """P Eq. 19 against the limit of Eq. 52, whose frozen x̂_0 is exact to first order."""
  x = rising.draw_prior(SEEDS)
  sampler = samplers.Sampler(rising, denoiser)

  def rate_over(h):
    plan = samplers.plan("ddim", [0.6, 0.6 - h], rising)
    return (x - sampler(plan, SEEDS, x)) / h

  rate = samplers.velocity(rising, denoiser, x, tf.constant(0.6))
  # Richardson: without the first-order error; what is left is second order and float32 rounding / h
  np.testing.assert_allclose(2.0 * rate_over(1e-3) - rate_over(2e-3), rate, atol=3e-3)


def test_the_adaptive_sampler_agrees_with_small_steps(rising):
  sampler = samplers.Sampler(rising, denoiser)
  images, evaluations = sampler.adaptive(SEEDS, rtol=1e-5, atol=1e-5)
  times = np.append(1.0 - 0.999 * np.linspace(0, 1, 401), 0.0)
  want = sampler(samplers.plan("heun", times, rising), SEEDS)
  np.testing.assert_allclose(images, want, atol=2e-3)  # of second-order steps of 1/400
  _, fewer = sampler.adaptive(SEEDS, rtol=1e-2, atol=1e-2)
  assert fewer < evaluations


def test_the_adaptive_sampler_refuses_jumps(rising):
  hard = dataclasses.replace(
    rising, corruption=corruptions.Mask(), level=schedules.Linear(0.0, 1.0)
  )
  with pytest.raises(ValueError, match="Mask jumps with t"):
    samplers.Sampler(hard, denoiser).adaptive(SEEDS)
  samplers.check_smooth(
    dataclasses.replace(hard, corruption=corruptions.Mask(edge=0.5), prior=None)
  )


# --- Bounds and grids -----------------------------------------------------------------------------


def test_dynamic_thresholding_by_hand():
  y = np.zeros([2, 2, 5, 1], np.float32)
  y[0, 0, :, 0] = [0.5, -0.5, 1.5, 2.0, -3.0]  # |y|: seven up to 0.5, then 1.5, 2, 3
  bounded = samplers.thresholded(lambda x, t: 0.5 + 0.5 * y, 90.0)(y, None).numpy()
  want = 0.5 + 0.5 * np.clip(y, -2, 2) / 2
  np.testing.assert_allclose(bounded[0], want[0], atol=1e-6)
  np.testing.assert_allclose(bounded[1], 0.5)  # within [0, 1] already: untouched
  clipped = samplers.clipped(lambda x, t: 0.5 + 0.5 * y)(y, None).numpy()
  np.testing.assert_allclose(clipped, np.clip(0.5 + 0.5 * y, 0, 1))
  with pytest.raises(ValueError, match="percentile"):
    samplers.thresholded(denoiser, 0.0)


@pytest.mark.parametrize("relative", [False, True])
def test_path_length_of_noise_alone(ve_diffusion, digits, relative):
  """Without corruption the length is √d (σ_t − σ_s), or in units of σ √d log(σ_t / σ_s)."""
  times = np.linspace(0, 1, 2001)
  got = samplers.path_length(ve_diffusion, digits[:5], times, relative)
  want = np.log(50 / 0.01) if relative else 50 - 0.01
  np.testing.assert_allclose(got[-1], 8 * want, rtol=5e-3)  # the first order of 2,000 steps


def test_transport_steps_are_even(rising, digits):
  times = samplers.time_grid(10, "transport", rising, images=digits)
  length = np.diff(samplers.path_length(rising, digits, times[::-1]))
  # A tenth is spread evenly in t, which shortens the steps where hardly anything happens; and a
  # chord is shorter than its arc.
  assert length.max() < 1.1 * np.median(length)
  assert length.min() > 0.5 * length.max()
  uniform = np.diff(samplers.path_length(rising, digits, samplers.time_grid(10)[::-1]))
  assert uniform.min() < 0.3 * uniform.max()


@pytest.mark.parametrize("kind", samplers.GRIDS)
def test_time_grids(rising, digits, kind):
  for steps in (1, 2, 17):
    grid = samplers.time_grid(steps, kind, rising, start=0.8, images=digits[:20])
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
  @dataclasses.dataclass(frozen=True)
  class Halfway(samplers.Rule):
    share: float = 0.5

    def coefficients(self, step):
      assert step.diffusion is rising
      np.testing.assert_array_equal(step.level_t[1:], step.level_s[:-1])
      a = self.share * (step.sigma_s / step.sigma_t)
      return samplers.Update(a, np.sqrt(step.sigma_s**2 - (a * step.sigma_t) ** 2))

  def halfway(sigma_t, sigma_s):
    a = 0.5 * (sigma_s / sigma_t)
    return a, np.sqrt(sigma_s**2 - (a * sigma_t) ** 2)

  times = samplers.time_grid(5)
  plan = samplers.plan(Halfway(), times, rising)
  with pytest.warns(DeprecationWarning, match=r"derive a class from samplers\.Rule"):
    np.testing.assert_array_equal(samplers.plan(halfway, times, rising), plan)
  with pytest.warns(DeprecationWarning, match=r"samplers\.plan"):
    old = samplers.table("ddim", times, rising, k=0.01)
  np.testing.assert_array_equal(old, samplers.plan("ddim(k=0.01)", times, rising))
  assert not np.array_equal(plan, samplers.plan(Halfway(0.25), times, rising))
  assert np.isfinite(samplers.Sampler(rising, denoiser)(plan, SEEDS)).all()


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (lambda d: samplers.plan("momentun", [1, 0], d), "did you mean 'momentum'"),
    (lambda d: samplers.plan("ddim", [0.0, 0.5, 1.0], d), "are they ascending"),
    (lambda d: samplers.plan("ddim", [1.2, 0.5], d), r"within \[0, 1\]"),
    (lambda d: samplers.plan("ddim", [1.0], d), "at least two"),
    (lambda d: samplers.time_grid(0), "at least 1 step, got 0"),
    (lambda d: samplers.time_grid(3, "linear"), "time grid 'linear' is unknown"),
    (lambda d: samplers.time_grid(3, start=0.0), "start time"),
    (lambda d: samplers.time_grid(3, "transport", d), "give some clean ones"),
    (lambda d: samplers.time_grid(3, "level"), "needs the diffusion"),
    (lambda d: samplers.plan("ddim+momentm", [1, 0], d), "did you mean 'momentum'"),
    (lambda d: samplers.plan("dormand_prince", [1, 0], d), "Sampler.adaptive"),
    (lambda d: samplers.plan("ddim", [1, np.nan, 0], d), "must descend"),
    (lambda d: samplers.plan("ddim(k=-1)", [1, 0], d), "must be from 0 on"),
    (lambda d: samplers.steps_for("heun", 0), "at least 1 evaluation"),
  ],
)
def test_bad_requests(rising, make, text):
  with pytest.raises(ValueError, match=text):
    make(rising)


def test_a_reverse_step_must_not_raise_the_noise(rising):
  class Falling:
    sigma = level = staticmethod(lambda t: tf.constant(1.0 - 0.5 * np.asarray(t)))

  with pytest.raises(ValueError, match=r"raises the noise from 0\.5 to 0\.75"):
    samplers.plan("momentum", [1.0, 0.5, 0.0], Falling())


@pytest.mark.parametrize(("a", "b"), [(np.nan, 0.0), (0.5, np.inf), (1e300, 0.0)])
def test_coefficients_that_are_not_finite_are_refused(a, b, blur_diffusion):
  @dataclasses.dataclass(frozen=True)
  class Endless(samplers.Rule):
    def coefficients(self, step):
      return samplers.Update(a, b)

  with pytest.raises(ValueError, match=r"the step from t = 1 to 0.75 has a = .* not finite"):
    samplers.plan(Endless(), samplers.time_grid(4), blur_diffusion)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("most", [1e38, 1e300])
def test_options_without_end_give_finite_coefficients(name, most, blur_diffusion):
  plan = samplers.plan(
    samplers.with_fields(name, {"k": most, "noise": most}), samplers.time_grid(4), blur_diffusion
  )
  assert np.isfinite(plan).all()
