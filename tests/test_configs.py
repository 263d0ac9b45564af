import pathlib

import numpy as np
import pytest

from soft_diffusion_tf import corruptions, experiment, losses, parts, schedules, training

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
    groups = ("corruption", "level", "sigma", "prior", "sampling")
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
