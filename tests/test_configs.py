import pathlib

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import (
  corruptions,
  experiment,
  losses,
  parts,
  samplers,
  schedules,
  score_sde,
  training,
)

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_is_named_after_its_file(path):
  e = experiment.from_file(path)
  assert e.name == path.stem
  assert experiment.Experiment.from_config(e.to_config()) == e
  assert f"--config=configs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cifar10_blur", "celeba64_blur", "cifar10_ve"])
def test_the_papers_hyper_parameters(name):
  """P App. D and Song et al. 2021."""
  e = experiment.from_file(CONFIGS[0].parent / f"{name}.py")
  t = e.training
  assert (t.learning_rate, t.beta_1, t.beta_2, t.epsilon) == (2e-4, 0.9, 0.999, 1e-8)
  assert (t.clip_norm, t.warmup_steps, t.batch_size) == (1.0, 5000, 128)
  assert e.loss == losses.SoftScoreMatching("inverse_variance", True, 0.0)
  assert t.keep_every == 10_000
  assert parts.kind_of(e.prior) == ("zero" if name == "cifar10_ve" else "blurred_colour")
  steps = 1000 if name == "cifar10_ve" else 280
  assert (str(e.sampling.sampler), e.sampling.steps, e.sampling.grid) == (
    "momentum",
    steps,
    "uniform",
  )
  n = e.network
  assert (n.nf, n.ch_mult, n.num_res_blocks, n.attn_resolutions) == (128, (1, 2, 2, 2), 4, (16,))
  assert (n.progressive_input, n.embedding_type, n.fourier_scale) == ("residual", "fourier", 16.0)
  shape, half_size, last, cond_max = {
    "cifar10_blur": ((32, 32, 3), 32, 18.0, 50.0),
    "celeba64_blur": ((64, 64, 3), 80, 23.0, 90.0),
    "cifar10_ve": ((32, 32, 3), None, 0.0, 50.0),
  }[name]
  assert e.data.image_shape == shape
  assert n.cond_max == cond_max
  assert schedules.ends(e.level)[1] == pytest.approx(last)
  if half_size:
    assert e.corruption == corruptions.GaussianBlur(half_size)
    assert schedules.ends(e.sigma) == pytest.approx((0.01, 0.1))
    assert float(e.sigma(0.2)) == pytest.approx(0.1)
    assert schedules.ends(e.level)[0] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["digits_ve", "cifar10_ve", "celeba64_ve"])
def test_the_ve_baseline_is_that_of_song(name):
  """The network's own numbers are −η at every σ: of size 1, where a residual is of size σ."""
  e = experiment.from_file(CONFIGS[0].parent / f"{name}.py")
  blur = experiment.from_file(CONFIGS[0].parent / f"{name.replace('_ve', '_blur')}.py")
  assert {d for d in blur.differences(e) if d.startswith(("network.", "training."))} <= {
    "network.prediction",
    "network.scale_by_sigma",
    "network.cond_max",
  }
  small = e.replace(
    data={"image_shape": (8, 8, 1)},
    network={"nf": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
  )
  model = training.build(small, small.build_diffusion())
  t = np.float32([0.0, 0.3, 0.9, 1.0])
  sigma = model.diffusion.sigma(t).numpy()
  np.testing.assert_allclose(model.cond(t), sigma, rtol=1e-5)  # what it is told is σ
  draw = np.random.default_rng(0)
  model.network.set_weights([0.2 * draw.normal(size=w.shape) for w in model.network.get_weights()])
  x_0 = draw.random((4, 8, 8, 1)).astype(np.float32)
  eta = draw.normal(size=x_0.shape).astype(np.float32)
  x_t = model.diffusion.forward(x_0, t, eta)
  own = model.network(x_t, model.cond(t)).numpy() * sigma.reshape(-1, 1, 1, 1)
  # Their loss is ‖own + η‖², for w = 1/σ² undoes the σ² of x̂_0 = x_t + σ² s.
  want = np.sum((own + eta) ** 2, axis=(1, 2, 3))
  got = model.loss_function(model.diffusion, model.denoiser(ema=False), x_0, t, eta).numpy()
  # float32: x̂_0 − x_0 at σ = 0.01 has lost two of seven digits
  np.testing.assert_allclose(got, want, rtol=2e-3)


@pytest.mark.parametrize("data", ["digits", "cifar10", "celeba64"])
@pytest.mark.parametrize("kind", ["ddpm", "ddpmpp", "subvp"])
def test_the_vp_baselines_are_as_published(data, kind):
  """Their network's options are those that the published configuration imports as, and with
  w = 1/σ² Eq. 12 is the loss ‖ε̂ − ε‖² of Ho et al. 2020 at every t, the first one too.
  """
  e = experiment.from_file(CONFIGS[0].parent / f"{data}_{kind}.py")
  published = {
    "training": {"sde": "subvpsde" if kind == "subvp" else "vpsde", "continuous": True},
    "data": {"image_size": 32, "num_channels": 3, "centered": True, "dataset": "CIFAR10"},
    "model": {
      "name": "ddpm" if kind == "ddpm" else "ncsnpp",
      "scale_by_sigma": False,
      "nf": 128,
      "ema_rate": 0.9999,
      "ch_mult": [1, 2, 2, 2],
      "num_res_blocks": 2 if kind == "ddpm" else 4,
      "attn_resolutions": [16],
      "dropout": 0.1,
      "resamp_with_conv": True,
      "conditional": True,
      "fir": kind == "subvp",
      "skip_rescale": True,
      "resblock_type": "biggan",
      "init_scale": 0.0,
      "progressive": "none",
      "progressive_input": "residual" if kind == "subvp" else "none",
      "embedding_type": "positional",
      "nonlinearity": "swish",
    },
  }
  want = score_sde.experiment(published)
  assert (e.corruption, e.level, e.sigma) == (want.corruption, want.level, want.sigma)
  assert e.sampling.sampler == want.sampling.sampler == samplers.Ancestral()
  differs = {
    d
    for d in want.network.get_config()
    if d != "kind" and getattr(e.network, d) != getattr(want.network, d)
  }
  size = {"nf", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout"}
  of_sigma = {"sigma_min", "sigma_max"}  # which no label network reads
  assert differs - of_sigma <= (size if data == "digits" else set())
  if data != "digits":
    assert e.training.ema_decay == want.training.ema_decay
  assert e.weight_range() == (1.0, 1.0)
  # x̂_0 = (x_t − σ ε̂)/α: the error of C x̂_0 is σ times that of ε̂.
  process = e.replace(data={"image_shape": (8, 8, 1)}).build_diffusion()
  draw = np.random.default_rng(0)
  x_0 = draw.random((4, 8, 8, 1)).astype(np.float32)
  eta, guess = draw.normal(size=(2, *x_0.shape)).astype(np.float32)
  t = np.float32([1e-3, 0.1, 0.6, 1.0])
  level, sigma = (np.reshape(v, (-1, 1, 1, 1)) for v in (process.level(t), process.sigma(t)))
  denoiser = lambda x_t, t: (x_t - sigma * guess) / level
  got = e.loss(process, denoiser, x_0, t, eta)
  want = np.sum((guess - eta) ** 2, axis=(1, 2, 3))
  # float32: α = 0.007 at t = 1, and σ = 5e-5 at t = 1e-3 (sub-VP), of which x_t has three digits.
  np.testing.assert_allclose(got, want, rtol=1e-2)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_cold_diffusion_is_as_its_authors_have_it(data, rng):
  e = experiment.from_file(CONFIGS[0].parent / f"{data}_cold.py")
  assert schedules.ends(e.sigma) == (0.0, 0.0)
  assert e.loss == losses.AbsoluteError()
  level = schedules.Geometric(0.01, 6.0)
  process = e.replace(level=level, data={"image_shape": (8, 8, 1)}).build_diffusion()
  plan = samplers.plan(e.sampling.sampler, samplers.time_grid(4), process, denoise=False)
  np.testing.assert_array_equal(plan[:, 2:], [[1, 0, 0, 0]] * 4)  # Algorithm 2: x − C_t x̂ + C_s x̂
  x_0, x0_hat = rng.random([2, 3, 8, 8, 1], np.float32)
  got = e.loss(process, lambda x, t: x0_hat, x_0, np.float32([0.1, 0.5, 1.0]), 0 * x_0)
  np.testing.assert_allclose(got, np.abs(x0_hat - x_0).sum((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_ihdm_is_as_its_authors_have_it(data, rng):
  """By hand at step k of 200: the target is level k − 1, the noise 0.01, and 0.0125 in sampling."""
  e = experiment.from_file(CONFIGS[0].parent / f"{data}_ihdm.py")
  process = e.replace(data={"image_shape": (8, 8, 1)}).build_diffusion()
  levels = [0.0, *np.geomspace(0.5, schedules.ends(e.level)[1], 200)]
  k = np.array([1, 2, 120, 200])
  t = np.float32(k / 200)
  np.testing.assert_allclose(process.level(t), np.take(levels, k), rtol=1e-3)
  x_0, x0_hat = rng.random([2, 4, 8, 8, 1], np.float32)
  got = e.loss(process, lambda x, t: x0_hat, x_0, t, 0 * x_0)
  # float32 of t − 1/200 moves a level by a thousandth of a step
  heat = lambda x: e.corruption(x, np.take(levels, k - 1)).numpy()
  want = np.sum((heat(x0_hat) - heat(x_0)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-3)
  plan = samplers.plan(e.sampling.sampler, samplers.time_grid(e.sampling.steps), process).numpy()
  np.testing.assert_allclose(plan[:-1, 2:4], [[0.0, 0.0125]] * 199, rtol=1e-6)


def test_level_and_noise_of_one_found_path_are_trained(digits):
  """Level and σ of digits_joint are the nodes of one file, and a network learns by them."""
  e = experiment.from_file(CONFIGS[0].parent / "digits_joint.py")
  found = schedules.load_levels(CONFIGS[0].parent / "schedules" / "digits_joint.json")
  assert found["corruption"] == e.corruption.get_config()
  assert found["data"] == e.data.name
  t = np.linspace(0, 1, len(found["levels"]), dtype=np.float32)
  np.testing.assert_allclose(e.level(t), found["levels"], rtol=1e-4)
  np.testing.assert_allclose(e.sigma(t), found["sigmas"], rtol=1e-4)
  together = (np.diff(found["levels"]) > 0) & (np.diff(found["sigmas"]) > 0)
  assert together.mean() > 0.5  # P's process has no such step
  e = e.replace(
    network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
    training={"warmup_steps": 0, "low_variance_t": True},
  )
  model = training.build(e, e.build_diffusion())
  step = tf.function(model.update, autograph=False)
  losses_ = [float(step(digits[32 * k : 32 * k + 32])["loss"]) for k in range(40)]
  assert np.mean(losses_[-10:]) < 0.7 * np.mean(losses_[:3])


def test_shipped_schedules_are_sound():
  files = sorted((CONFIGS[0].parent / "schedules").glob("*.json"))
  assert files
  for file in files:
    content = schedules.load_levels(file)
    # Masks with sharp edges have fewer states than that.
    assert len(content["levels"]) == 32 or content["nearest"][0] == len(content["levels"]) < 32
    assert content["images"] >= 1000


@pytest.mark.parametrize(
  ("name", "changed"),
  [
    ("celeba64_blur_unfiltered", {"loss.filtered"}),
    ("celeba64_blur_sigma_005", {"sigma.inner.stop"}),
    ("celeba64_blur_sigma_0025", {"sigma.inner.stop"}),
    ("celeba64_blur_noise_throughout", None),
    ("celeba64_mask", None),
    ("celeba64_ve", None),
  ],
)
def test_ablations_change_one_thing(name, changed):
  base, other = (
    experiment.from_file(CONFIGS[0].parent / f"{n}.py") for n in ("celeba64_blur", name)
  )
  differs = set(base.differences(other)) - {"name"}
  if changed is None:  # another process: everything but process, prior and sampling stays
    groups = ["corruption", "level", "sigma", "prior", "sampling"]
    groups += ["network"] if name.endswith("_ve") else []  # in its own parametrisation, see below
    assert {d.split(".")[0] for d in differs} <= set(groups)
  else:
    assert differs == changed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shrunken_copy_of_every_config_takes_a_step(path):
  """Process, loss, weighting, prediction and optimizer as configured; images and network small."""
  e = experiment.from_file(path)
  channels = e.data.image_shape[2]
  level = e.level
  if isinstance(getattr(level, "inner", level), schedules.Unfound):  # its images are not at hand
    start, stop = schedules.ends(level)
    level = schedules.Geometric(max(start, 1e-3), stop)
  e = e.replace(
    level=level,
    data={"image_shape": (16, 16, channels)},
    network={"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)},
    training={"batch_size": 2, "warmup_steps": 0},
  )
  model = training.build(e, e.build_diffusion())
  before = [v.numpy() for v in model.network.trainable_variables]
  images = np.random.default_rng(0).random((2, 16, 16, channels)).astype(np.float32)
  out = model.update(images)
  assert np.isfinite(out["loss"])
  assert np.isfinite(out["gradient_norm"])
  moved = [np.any(v.numpy() != b) for v, b in zip(model.network.trainable_variables, before)]
  assert any(moved)
  assert int(model.optimizer.iterations) == 1
