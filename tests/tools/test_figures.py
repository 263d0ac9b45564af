"""Every figure from a small run: there, not blank, the same twice."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data, evaluation, plots, training
from soft_diffusion_tf.evaluation import features, sweeps

ROOT = pathlib.Path(__file__).parents[2]
ALL = ("1", "2", "3", "6", "7", "8", "9", "11", "12")


def figures(*flags):
  return subprocess.run(
    [sys.executable, "tools/figures.py", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "tiny"
  training.train(tiny.replace(evaluation={"feature_net": "pixels"}), folder, progress=False)
  network = features.feature_network("pixels")
  images = data.load("digits", "train").images
  about = evaluation.conditions_of(network, "digits", "train", (8, 8, 1), "auto", 30)
  real = evaluation.reference(network, images, about, progress=False)
  sweeps.sweep(
    folder, network, real, 30, names=["naive", "momentum"], nfes=[2, 4], steps=[6], progress=False
  )
  return folder


@pytest.fixture(scope="module")
def drawn(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp("figures") / "a"
  done = figures(
    f"--workdir={workdir}", "--count=16", "--neighbours=16", "--nfe=20", f"--out={out}"
  )
  assert done.returncode == 0, done.stderr
  return out


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_there_and_not_blank(name, drawn):
  picture = np.asarray(Image.open(drawn / f"figure_{name}.png").convert("RGB"))
  assert picture.std() > 10
  assert min(picture.shape[:2]) > 100


def test_figure_6_is_naive_beside_momentum_of_the_same_seeds(workdir, drawn, tmp_path):
  run = training.load(workdir)
  draw = lambda sampler: run.images(np.arange(16), run.options(sampler=sampler))
  naive, momentum = draw("naive"), draw("momentum")
  assert np.abs(naive - momentum).mean() > 1e-3
  pairs = [("Naive Sampler, 4 NFE", naive), ("Momentum Sampler, 4 NFE", momentum)]
  plots.side_by_side(tmp_path / "6.png", pairs, 8)
  want, six = (np.asarray(Image.open(f)) for f in (tmp_path / "6.png", drawn / "figure_6.png"))
  np.testing.assert_array_equal(six, want)


def test_figure_11_is_one_sampler_at_one_number_of_evaluations(workdir, drawn, tmp_path):
  run = training.load(workdir)
  images = run.images(np.arange(16), run.options(sampler="probability_flow", steps=20))
  plots.side_by_side(tmp_path / "11.png", [("tiny: probability_flow, 20 NFE", images)], 8)
  want, got = (np.asarray(Image.open(f)) for f in (tmp_path / "11.png", drawn / "figure_11.png"))
  np.testing.assert_array_equal(got, want)


def test_several_runs_stand_in_one_plot_where_their_distances_compare(workdir, tmp_path):
  cells = sweeps.last_sweep(workdir)
  other = [c | {"value": 2 * c["value"]} if "value" in c else c for c in cells]
  sweeps.plot(tmp_path / "one.png", cells)
  sweeps.plot(tmp_path / "both.png", cells, other, names=["a", "b"])
  one, both = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("L")) for n in ("one", "both"))
  assert (both < 250).sum() > (one < 250).sum()  # twice as many lines
  with pytest.raises(ValueError, match="b is measured with samples = 7 and a with 30, so that"):
    sweeps.plot(tmp_path / "x.png", cells, [c | {"samples": 7} for c in cells], names=["a", "b"])


def test_nothing_is_overwritten(workdir, drawn):
  before = (drawn / "figure_8.png").read_bytes()
  refused = figures(f"--workdir={workdir}", f"--out={drawn}", "--figures=8")
  assert refused.returncode == 2
  assert "is there already" in refused.stderr
  assert (drawn / "figure_8.png").read_bytes() == before


def test_two_runs_of_one_name_are_refused(workdir, tmp_path):
  refused = figures(f"--workdir={workdir},elsewhere/tiny", f"--out={tmp_path}", "--figures=8")
  assert refused.returncode == 2
  assert "2 of the folders are called 'tiny'" in refused.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_run_gives_the_same_figures(workdir, drawn, tmp_path):
  flags = (f"--workdir={workdir}", "--count=16", "--neighbours=16", "--nfe=20", f"--out={tmp_path}")
  done = figures(*flags)
  assert done.returncode == 0, done.stderr
  for name in ALL:
    one, two = ((folder / f"figure_{name}.png").read_bytes() for folder in (drawn, tmp_path))
    assert one == two, name
