"""Blurring Diffusion (Hoogeboom and Salimans 2022) against its printed formulas, in NumPy."""

import itertools
import pathlib

import numpy as np
import pytest
import scipy.fft
import tensorflow as tf

from soft_diffusion_tf import (
  corruptions,
  evaluation,
  experiment,
  export,
  laboratory,
  oracles,
  priors,
  rng,
  samplers,
  schedules,
  training,
)
from soft_diffusion_tf.diffusion import Diffusion
from soft_diffusion_tf.evaluation import features, sweeps

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHAPE = (8, 8, 1)
SEEDS = np.array([3, 14, 15])


def dct(x):
  return scipy.fft.dctn(x, axes=(1, 2), norm="ortho")


def idct(x):
  return scipy.fft.idctn(x, axes=(1, 2), norm="ortho")


def alpha_sigma(t, stop=6.0, floor=0.001):
  """α_t of each frequency and σ_t, for images in [−1, 1]: their Appendix A in float64."""
  blur = stop * np.sin(0.5 * np.pi * t) ** 2
  rate = (np.pi * np.arange(8) / 8) ** 2
  rate = rate[:, None, None] + rate[None, :, None]
  dissipated = (1 - floor) * np.exp(-rate * blur**2 / 2) + floor
  first, last = np.arctan(np.exp(-0.5 * 10)), np.arctan(np.exp(0.5 * 10))
  log_snr = -2 * np.log(np.tan((last - first) * t + first))
  return dissipated / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))


@pytest.fixture(scope="module")
def process():
  return experiment.from_file(CONFIGS / "digits_blurring.py").build_diffusion()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_process_is_theirs(name, rng):
  e = experiment.from_file(CONFIGS / f"{name}_blurring.py")
  stop = {"digits": 6.0, "cifar10": 20.0}[name]  # theirs is 20
  ours = e.replace(data={"image_shape": SHAPE}).build_diffusion()
  assert e.network.prediction == "noise"
  assert e.weight_range() == (1.0, 1.0)
  assert e.sampling.sampler == samplers.Ancestral()
  t = np.float32([0.0, 0.2, 0.5, 0.9, 1.0])
  x_0, eta = rng.random([5, *SHAPE]), rng.standard_normal([5, *SHAPE])
  alpha, sigma = zip(*(alpha_sigma(float(v), stop) for v in t))
  y_t = idct(np.stack(alpha) * dct(2 * x_0 - 1)) + np.reshape(sigma, (-1, 1, 1, 1)) * eta
  ones = ours.corrupt(np.ones_like(x_0), t).numpy()
  got = 2 * ours.forward(x_0, t, eta).numpy() - ones  # images in [0, 1] are y/2 + 1/2
  np.testing.assert_allclose(got, y_t, atol=2e-6)  # float32


def test_what_the_network_is_shown_and_trained_by(rng):
  e = experiment.from_file(CONFIGS / "digits_blurring.py")
  e = e.replace(network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()})
  model = training.build(e, e.build_diffusion())
  model.network.set_weights([0.2 * rng.normal(size=w.shape) for w in model.network.get_weights()])
  t = np.float32([0.05, 0.3, 0.7, 1.0])
  x_0, eta = rng.random([4, *SHAPE], np.float32), rng.normal(size=[4, *SHAPE]).astype(np.float32)
  alpha, sigma = zip(*(alpha_sigma(float(v)) for v in t))
  alpha, sigma = np.stack(alpha), np.reshape(sigma, (-1, 1, 1, 1))
  y_t = idct(alpha * dct(2.0 * x_0 - 1)) + sigma * eta
  own = model.network(y_t.astype(np.float32), 999.0 * t).numpy()
  # Their loss ‖ε̂ − ε‖², and u_0 = (u_t − σ ε̂)/α.
  got = model.loss_function(model.diffusion, model.denoiser(ema=False), x_0, t, eta).numpy()
  # float32: x̂_0 is of size 10⁵ at t = 1
  np.testing.assert_allclose(got, np.sum((own - eta) ** 2, axis=(1, 2, 3)), rtol=2e-3)
  x_t = model.diffusion.forward(x_0, t, eta)
  want = 0.5 + 0.5 * idct((dct(y_t) - sigma * dct(own)) / alpha)
  got = model(x_t, t).numpy()
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def printed(predict, x, times, seeds):
  """Their ancestral sampling in the cosine basis, step by step; images in [0, 1] with σ/2."""
  for k, (t, s) in enumerate(itertools.pairwise(times)):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    alpha_ts = alpha_t / alpha_s
    variance = 0.25 / (1 / sigma_s**2 + 1 / (sigma_t**2 / alpha_ts**2 - sigma_s**2))
    u, u_0 = dct(x), dct(predict(x, t))
    rest = sigma_t**2 - alpha_ts**2 * sigma_s**2
    mean = alpha_ts * sigma_s**2 / sigma_t**2 * u + alpha_s * rest / sigma_t**2 * u_0
    eta = rng.normal_per_image(rng.image_seeds(seeds), k, SHAPE).numpy()
    x = idct(mean + np.sqrt(variance) * dct(eta))
  return x


def stand_in(x_t, t):
  t = np.reshape(np.asarray(t, np.float32), (-1, 1, 1, 1))
  return 0.5 + 0.3 * np.tanh(np.asarray(x_t)) * (1.2 - t)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_sampler_is_the_printed_one(process, jit_compile):
  own = process.with_prior(priors.zero(SHAPE))
  times = samplers.time_grid(9)[:-1]  # into t = 0 we add no noise
  plan = samplers.plan("ancestral", times, own)
  assert np.all(plan.numpy()[:, 5] == samplers.FILTERED)
  denoiser = lambda x, t: 0.5 + 0.3 * tf.tanh(x) * (1.2 - tf.reshape(t, [-1, 1, 1, 1]))
  sampler = samplers.Sampler(own, denoiser, jit_compile=jit_compile)
  start = own.draw_prior(SEEDS)
  predict = lambda x, t: stand_in(x, np.full(len(x), t)).astype(float)
  want = printed(predict, start.numpy().astype(float), times, SEEDS)
  np.testing.assert_allclose(sampler(plan, SEEDS), want, atol=2e-5)  # float32 against float64
  # Seen at moments it is the same run, and its steps are no correctors.
  moments, states, _ = sampler.trajectory(plan, SEEDS, 4)
  np.testing.assert_allclose(moments, np.float32(times[::2]), rtol=1e-6)
  np.testing.assert_allclose(states[-1], want, atol=2e-5)
  # The step into t = 0 adds nothing of its own.
  last = samplers.plan("ancestral", [0.1, 0.0], own, denoise=False)
  x = np.float32(start)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(0.1), alpha_sigma(0.0)
  gain = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
  at, s = (own.corrupt(stand_in(x, [0.1]), t).numpy() for t in (0.1, 0.0))
  np.testing.assert_allclose(
    sampler.run(last, rng.image_seeds(SEEDS), samplers.State(x, 0 * x, x)).x,
    s + idct(gain * dct(x - at)),
    atol=2e-5,
  )


def test_without_blur_it_is_the_ancestral_sampler_of_vp(digits):
  sharp = corruptions.Compose(
    corruptions.HeatDissipation(), corruptions.Scale(), (0.0, 0.0), schedules.CosineScale()
  )
  sigma = schedules.Scaled(schedules.CosineSigma(), 0.5)
  mixture, times = oracles.GaussianMixture(digits[:20], 0.1), samplers.time_grid(12)
  images = []
  for corruption, level in (
    (sharp, schedules.Linear(0.0, 1.0)),
    (corruptions.Scale(), schedules.CosineScale()),
  ):
    own = Diffusion(SHAPE, corruption, level, sigma, priors.zero(SHAPE))
    plan = samplers.plan("ancestral", times, own)
    images.append(samplers.Sampler(own, oracles.denoiser(mixture, own))(plan, SEEDS))
  np.testing.assert_allclose(*images, atol=1e-5)


def test_the_samples_have_the_distribution_of_the_data(process, digits):
  """With the exact x̂_0; 500 samples are as near as fresh draws are (floor and two deviations)."""
  mixture = oracles.GaussianMixture(digits[:100], 0.05)
  lab = laboratory.Laboratory(mixture, process, digits[:100], prior="zero", count=500)
  few, many = (lab.grade("ancestral", nfe).frechet for nfe in (10, 160))
  assert many < lab.bound() < few


def test_other_corruptions_of_one_basis_are_drawn_by_their_own_chain(digits):
  """Also where σ stands still: what a soft mask hides and the heat takes is drawn afresh."""
  mixture = oracles.GaussianMixture(digits[:100], 0.05)
  for corruption, stop in ((corruptions.HeatDissipation(), 6.0), (corruptions.Mask(edge=1.0), 1.0)):
    own = laboratory.two_stage(corruption, schedules.Linear(0.0, stop), SHAPE)
    lab = laboratory.Laboratory(mixture, own, digits[:100], count=500)
    assert lab.grade("ancestral", 160).frechet < lab.bound()


@pytest.mark.slow
def test_a_run_is_swept_and_exported(tmp_path):
  e = experiment.from_file(CONFIGS / "digits_blurring.py").replace(
    network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
    training={"steps": 2, "sample_every": 0, "checkpoint_every": 0, "warmup_steps": 0},
    sampling={"steps": 3, "batch_size": 8},
    evaluation={"feature_net": "pixels:2", "samples": 24, "subset": 16},
  )
  run = training.train(e, tmp_path / "workdir", progress=False)
  images = run.images(SEEDS)
  assert np.isfinite(images).all()
  network = features.feature_network("pixels:2")
  clean = e.data.load(progress=False).images
  real = evaluation.reference(network, clean, {"data": "here", "count": 24}, 16, 24, k=3)
  cells = sweeps.sweep(
    tmp_path / "workdir",
    network,
    real,
    24,
    names=["ancestral", "ddim+ancestral"],
    nfes=[2, 3],
    steps=[2],
    progress=False,
  )
  assert all(np.isfinite(cell["value"]) for cell in cells)
  export.save(run, tmp_path / "export", [e.sampling])
  np.testing.assert_array_equal(export.load(tmp_path / "export").images(SEEDS), images)


def test_what_cannot_be_is_refused(blur_diffusion):
  class Filtered(samplers.Rule):
    def coefficients(self, step):
      return samplers.Update(step.ratio, 0.0, filtered=True)

  with pytest.raises(ValueError, match="need a corruption with a spectrum, unlike GaussianBlur"):
    samplers.plan(Filtered(), [1.0, 0.5], blur_diffusion)
  e = experiment.from_file(CONFIGS / "digits_blurring.py")
  for corruption, level in (
    (corruptions.GaussianBlur(), 3.0),
    (corruptions.HeatDissipation(), 60.0),
  ):
    with pytest.raises(ValueError, match=f"divides by C, and {type(corruption).__name__}"):
      e.replace(corruption=corruption, level=schedules.Linear(0.0, level))
