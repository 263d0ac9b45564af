"""The measuring of restorations: its baselines against what is known of them, and a whole run."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import restoration as skimage

from soft_diffusion_tf import corruptions, training
from tools import measure_restoration as tool

ROOT = pathlib.Path(__file__).parents[2]


def blur(x, level=0.6):
  return corruptions.GaussianBlur()(x, level).numpy()


def test_psnr_of_a_known_error():
  assert tool.psnr(np.full([1, 8, 8, 1], 0.6), np.full([1, 8, 8, 1], 0.5)) == pytest.approx(20.0)
  assert tool.psnr(np.full([1, 8, 8, 1], 7.0), np.full([1, 8, 8, 1], 0.9)) == pytest.approx(20.0)


def test_wiener_inverts_a_light_blur(digits):
  point = np.zeros([1, 8, 8, 1], np.float32)
  point[0, 4, 4] = 1
  kernel = blur(point)[0, ..., 0]
  kernel = kernel / kernel.sum()
  # Its blur is periodic where ours is dark outside; digits are dark at the border as well.
  clean = np.pad(digits[:20], ((0, 0), (4, 4), (4, 4), (0, 0)))
  restored = tool.wiener(blur(clean), kernel, 1e-4)
  assert tool.psnr(restored, clean) > tool.psnr(blur(clean), clean) + 10


def test_total_variation_without_blur_is_chambolles(digits):
  same = lambda x: x
  got = tool.total_variation(digits[:3], same, same, 0.05, steps=3)
  want = [skimage.denoise_tv_chambolle(x, 0.05, channel_axis=-1) for x in digits[:3]]
  np.testing.assert_array_equal(got, want)


def test_total_variation_deblurs(digits):
  y = blur(digits[:10])
  got = tool.total_variation(y, blur, blur, 1e-4)  # this blur is its own adjoint
  assert tool.psnr(got, digits[:10]) > tool.psnr(y, digits[:10]) + 3


def test_bicubic_by_factor_one_changes_nothing(digits):
  np.testing.assert_allclose(tool.bicubic(digits[:2], 1.0), digits[:2], atol=1e-6)
  assert tool.bicubic(digits[:2], 2.0).shape == digits[:2].shape


def test_the_best_strength_is_the_one_of_the_best_psnr(digits):
  clean = digits[:4]
  assert tool.best((0.3, 0.01, 0.1), lambda v: clean + v, clean) == 0.01


@pytest.mark.slow
def test_a_run_is_measured(tiny, tmp_path):
  training.train(tiny, tmp_path / "run", progress=False)
  flags = ["--times=0.5", "--images=6", "--samples=2", "--reference=100", "--feature_net=pixels:4"]

  def run(*more):
    return subprocess.run(
      [
        sys.executable,
        "tools/measure_restoration.py",
        f"--workdir={tmp_path / 'run'}",
        *flags,
        f"--out={tmp_path / 'out'}",
        *more,
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
    )

  refused = run("--samples=1")
  assert refused.returncode == 2
  assert "--samples=1: give an integer in the range [2, 10000]" in refused.stderr
  assert not (tmp_path / "out").exists()
  result = run()
  assert result.returncode == 0, result.stderr
  content = json.loads((tmp_path / "out" / "restoration.json").read_text())
  assert (content["images"], content["samples"], content["reference"]) == (6, 2, 100)
  assert content["judge"] == "FD[pixels:4]"
  [at] = content["times"]
  assert set(at["methods"]) == {
    "corrupted",
    "wiener",
    "total_variation",
    "bicubic",
    "model",
    "model, held to y",
  }
  # What is held to y keeps ‖C x̂_0 − y‖² under σ² (n + 2 √(2n)), n = 64, in every step.
  held = at["methods"]["model, held to y"]["consistency"]
  assert held < 1.5 * at["sigma"]
  assert np.asarray(Image.open(tmp_path / "out" / "restoration.png").convert("L")).std() > 10
