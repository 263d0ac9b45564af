"""The tool and what evaluations take from its file, as a user starts them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from soft_diffusion_tf import data, evaluation, gaussians

ROOT = pathlib.Path(__file__).parents[2]


def program(*command):
  return subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  out = tmp_path_factory.mktemp("stats") / "digits.npz"
  done = program(
    "tools/reference_stats.py",
    "--config=configs/digits_blur.py",
    "--samples=500",
    f"--out={out}",
    "--config.evaluation.neighbours=4",
  )
  assert done.returncode == 0, done.stderr
  assert "500 images of digits all in pixels" in done.stdout
  assert "floor (real against real): FD[pixels] " in done.stdout
  return out


def test_the_file_says_what_it_is_of(stored):
  real = evaluation.Reference.load(stored)
  assert real.conditions | {"content": ""} == {
    "data": "digits",
    "split": "all",
    "image_shape": [8, 8, 1],
    "crop": "auto",
    "feature_net": "pixels",
    "feature_net_sha256": "",
    "count": 500,
    "content": "",
  }
  images = data.load("digits", "all").images
  order = np.random.default_rng(0).permutation(len(images))
  flat = images.reshape(len(images), -1) / 255.0
  moments = gaussians.Moments().update(flat[order[:500]])
  # Features are float32.
  np.testing.assert_allclose(real.statistics.moments.mean, moments.mean, atol=1e-7)
  np.testing.assert_allclose(real.statistics.moments.covariance, moments.covariance, atol=1e-7)
  want = gaussians.frechet_between(flat[order[500:1000]], flat[order[:500]])
  assert real.floor["exact"] == pytest.approx(want, rel=1e-5)
  assert real.floor["neighbours"] == 4


def test_nothing_is_overwritten(stored):
  before = stored.read_bytes()
  done = program(
    "tools/reference_stats.py", "--config=configs/digits_blur.py", "--samples=9", f"--out={stored}"
  )
  assert done.returncode == 2
  assert "is there already" in done.stderr
  assert stored.read_bytes() == before


def test_an_evaluation_of_another_number_names_it(stored, tmp_path):
  from soft_diffusion_tf import plots

  for k, image in enumerate(data.load("digits", "all").images[:30]):
    plots.save_png(tmp_path / f"{k}.png", image)
  command = ("-m", "soft_diffusion_tf.bin.evaluate", f"--images={tmp_path}")
  done = program(*command, f"--reference={stored}", "--feature_net=pixels")
  assert done.returncode == 2
  assert "its count is 500, but 30 is evaluated" in done.stderr
  done = program(
    *command, f"--reference={stored}", "--feature_net=pixels", "--reference_samples=500"
  )
  assert done.returncode == 0, done.stderr
  assert "the reference's floor is at N = 500" in done.stdout
  assert "warning: N = 30 is not above the 64 features" in done.stdout
