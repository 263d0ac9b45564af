"""The laboratory as a user starts it, and its parts."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from soft_diffusion_tf import corruptions, gaussians, laboratory, oracles, schedules

ROOT = pathlib.Path(__file__).parents[2]

OWN = """
import dataclasses
import tensorflow as tf
from soft_diffusion_tf import corruptions

@dataclasses.dataclass(frozen=True)
class Fade(corruptions.Corruption):
  level_range = (0.0, 1.0)
  def apply(self, x, level):
    return (1.0 - level) * x

@dataclasses.dataclass(frozen=True)
class Crooked(corruptions.Corruption):
  level_range = (0.0, 1.0)
  def apply(self, x, level):
    return (1.0 - level) * x + 0.1 * level
"""


@pytest.fixture(scope="module")
def images():
  return laboratory.load("digits", 60)


@pytest.fixture(scope="module")
def lab(images):
  process = laboratory.two_stage(
    corruptions.GaussianBlur(), schedules.Geometric(0.01, 6.0), (8, 8, 1)
  )
  return laboratory.Laboratory(laboratory.mixture_of(*images), process, images[0], count=400)


def run(*flags, cwd=ROOT):
  return subprocess.run(
    [sys.executable, str(ROOT / "tools/lab.py"), *flags],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"},
  )


def test_a_cluster_of_one_image_joins_the_largest(images):
  alone = np.concatenate([images[0][:10], 40 * images[0][20:22]])  # far from all, and each other
  mixture = laboratory.mixture_of(alone, np.arange(12), "class")
  assert np.isfinite(mixture.covariances).all()
  assert len(laboratory.mixture_of(images[0][:3], np.arange(3), "class").covariances) == 1


@pytest.mark.parametrize("components", laboratory.COMPONENTS)
def test_exact_moments_are_those_of_draws(images, components):
  mixture = laboratory.mixture_of(*images, components, std=0.1)
  mean, covariance = oracles.moments(mixture)
  own = gaussians.Moments().update(mixture.draw(40_000))
  np.testing.assert_allclose(own.mean, mean, atol=0.01)  # five standard errors
  np.testing.assert_allclose(own.covariance, covariance, atol=0.01)


def test_exact_moments_of_the_corrupted(images, lab):
  mixture, process = lab.mixture, lab.diffusion
  mean, covariance = oracles.corrupted_moments(mixture, process, 0.6)
  clean = mixture.draw(40_000)
  eta = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
  own = gaussians.Moments().update(process.forward(clean, np.float32(0.6), eta).numpy())
  np.testing.assert_allclose(own.mean, mean, atol=0.01)
  np.testing.assert_allclose(own.covariance, covariance, atol=0.01)


def test_grades_see_what_is_wrong(lab):
  """Each number is near its floor for fresh draws, and far above it for spoilt ones."""
  fresh = lab.draw(100).reshape(-1, 8, 8, 1)
  good = dataclasses.asdict(lab.grade_images(fresh))
  blurred = dataclasses.asdict(
    lab.grade_images(lab.diffusion.corrupt(fresh.astype(np.float32), np.float32(0.7)))
  )
  floor = dataclasses.asdict(lab.floor)
  for name in ("frechet", "sliced", "frequency"):
    assert good[name] < 2 * floor[name]
    assert blurred[name] > 3 * floor[name]
  assert lab.grade_images(np.full([400, 8, 8, 1], np.nan)).frechet == float("inf")


def test_the_naive_sampler_drifts_and_two_step_does_not(lab):
  naive, two_step = (lab.drift(rule, 40, frames=4) for rule in ("naive", "two_step"))
  assert [t for t, _, _ in naive] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
  for drift in (naive, two_step):
    assert drift[0][1] < 2 * drift[0][2]  # both start at q_1
  assert naive[-1][1] > 3 * naive[-1][2]
  # One set of 400 samples varies by 28 %: a fresh set stays within three standard deviations.
  spread = np.std([g.frechet for g in lab.floors], ddof=1)
  assert two_step[-1][1] < lab.floor.frechet + 3 * spread < naive[-1][1]


def test_needed_goes_up_the_ladder():
  class Fake(laboratory.Laboratory):
    def __init__(self, values):
      self.values = dict(values)

    def bound(self, share=0.1):
      return 1.0

    def grade(self, rule, nfe, grid="uniform", **options):
      return laboratory.Grade(nfe, self.values[nfe], 0.0, 0.0)

  ladder = (5, 10, 20, 40)
  cases = {(3, 2, 0.9, 0.8): 20, (3, 0.9, 2, 0.8): 40, (3, 2, 2, 2): None, (0.5, 0.4, 9, 9): 5}
  for values, want in cases.items():
    assert Fake(zip(ladder, values)).needed("ddim", ladder)[0] == want


def test_a_sound_corruption_is_well_posed_and_a_jump_is_not(images):
  """A mask with a hard edge jumps: whatever appears at once is the mean of what it could be."""
  mixture = laboratory.mixture_of(*images)
  options = {"kinds": ("linear",), "rules": ("two_step",), "nfes": (20, 40, 57), "count": 300}
  soft = laboratory.examine(corruptions.Mask(edge=1.0), images[0], mixture, **options)
  assert soft.well_posed
  assert soft.prior == "zero"
  assert "take two_step with" in str(soft)
  hard = laboratory.examine(corruptions.Mask(), images[0], mixture, **options)
  assert hard.verdict.ok
  assert hard.smooth.startswith("jumps")
  assert not hard.well_posed
  assert "not reached" in str(hard)


def test_a_corruption_that_is_not_linear_is_refused_at_once(images, tmp_path, monkeypatch):
  (tmp_path / "own_corruptions.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  crooked = corruptions.from_config({"kind": "own_corruptions:Crooked"}, trust_code=True)
  result = laboratory.examine(crooked, images[0], laboratory.mixture_of(*images))
  assert not result.well_posed
  assert "linear" in str(result)


@pytest.mark.slow
def test_the_tool_examines_a_users_corruption(tmp_path):
  (tmp_path / "own_corruptions.py").write_text(OWN)
  result = run(
    "--corruption=own_corruptions:Fade",
    "--images=40",
    "--count=200",
    f"--out={tmp_path}/out",
    cwd=tmp_path,
  )
  assert result.returncode == 0, result.stderr
  assert "Fade: sound" in result.stdout
  content = json.loads((tmp_path / "out" / "lab.json").read_text())
  assert {t["schedule"] for t in content["trials"]} == {"transport", "linear"}


def test_the_tool_grades_samplers(tmp_path):
  flags = (
    "--samplers=momentum,stochastic_two_step",
    "--noise=3",
    "--nfe=5,10",
    "--images=40",
    "--count=200",
  )
  result = run(*flags, f"--out={tmp_path}/out")
  assert result.returncode == 0, result.stderr
  content = json.loads((tmp_path / "out" / "lab.json").read_text())
  assert [(g["sampler"], g["nfe"]) for g in content["grades"]] == [
    ("momentum", 5),
    ("momentum", 10),
    ("stochastic_two_step", 5),
    ("stochastic_two_step", 10),
  ]
  # Where the drift ends is what was graded: the same sampler, with the same noise.
  assert content["drift"][-1][1] == pytest.approx(content["grades"][-1]["frechet"], rel=1e-3)
  assert all(g["frechet"] > content["floor"]["frechet"] / 2 for g in content["grades"])
  assert (tmp_path / "out" / "lab.md").read_text().count("|") > 30
  assert (tmp_path / "out" / "lab.png").stat().st_size > 1000
  again = run(*flags, f"--out={tmp_path}/out")
  assert again.returncode == 2
  assert "is there already" in again.stderr


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (("--samplers=momentun", "--out=x"), "did you mean 'momentum'"),
    (("--nfe=0", "--out=x"), "give positive whole numbers"),
    (("--corruption=blurr", "--out=x"), "choose one of blur"),
    (("--corruption=soft_mask", "--examine", "--components=x", "--out=x"), "unknown components"),
    (("--corruption=mine:Fade", "--nfe=5", "--out=x"), "leave --nfe=5 out"),
    (("--examine", "--noise=1", "--out=x"), "leave --noise=1.0 out"),
    (("--corruption=ve", "--schedule=linear", "--out=x"), "leave --schedule=linear out"),
    (("--samplers=momentum", "--k=0.5", "--out=x"), "k is of ddim alone; leave --k=0.5 out"),
    (("--report=x", "--samplers=heun"), "leave --samplers=heun out"),
    ((), "give --out=DIR"),
  ],
)
def test_mistakes_end_with_one_line(flags, text, tmp_path):
  result = run(*flags, cwd=tmp_path)
  assert result.returncode == 2
  assert text in result.stderr
  assert not list(tmp_path.iterdir())


def test_a_damaged_record_of_the_report_is_refused(tmp_path):
  (tmp_path / "results").mkdir()
  (tmp_path / "results" / "samplers.json").write_text("[]")
  result = run("--report=.", cwd=tmp_path)
  assert result.returncode == 2
  assert "samplers.json: not a record of this report; delete it to measure anew" in result.stderr
  assert [f.name for f in tmp_path.rglob("*")] == ["results", "samplers.json"]


def test_what_rounded_operators_cost_grows_with_the_rounding(blur_diffusion):
  """TF32 keeps 10 bits of a product's operands and bfloat16 7: 8 times less (P App. C's blur)."""
  mixture = oracles.GaussianMixture(laboratory.load("digits", 20)[0], std=0.05)
  study = laboratory.PrecisionStudy(mixture, blur_diffusion)
  clean = mixture.draw(32, seed=3)
  errors = {kind: study.one_blur(clean, kind, 0.8)[0] for kind in laboratory.PRECISIONS}
  assert errors["exact"] == 0.0
  assert 1e-5 < errors["tf32"] < 1e-3
  assert 4.0 < errors["bfloat16"] / errors["tf32"] < 16.0  # of few numbers' roundings
  samples = {k: study.sample(k, "ddim", 6, np.arange(32)) for k in laboratory.PRECISIONS}
  distance = {k: np.abs(samples[k] - samples["exact"]).max() for k in laboratory.PRECISIONS}
  assert 0.0 == distance["exact"] < distance["tf32"] < distance["bfloat16"] < 0.5
  assert study.frechet(samples["exact"]) == pytest.approx(study.frechet(samples["tf32"]), rel=0.05)
  # A cosine transform keeps the power: the bands hold all of it.
  image = np.random.default_rng(0).standard_normal([2, 8, 8, 1])
  count = np.bincount(study._band.ravel(), minlength=4)
  power = np.sum(count * np.square(np.nan_to_num(study.rms(image)))) / count.sum()
  assert power == pytest.approx(np.mean(image**2))
