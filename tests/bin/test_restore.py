"""soft-diffusion-restore, on the model that comes with the package: real processes."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import forks


def restore(*flags):
  return forks.shared().run("soft_diffusion_tf.bin.restore", *flags, limit=600)


def error_of(result):
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  return line


@pytest.fixture(scope="module")
def photos(tmp_path_factory, digits):
  """A folder of three digits."""
  folder = tmp_path_factory.mktemp("photos")
  for k in range(3):
    Image.fromarray(np.rint(digits[k, :, :, 0] * 255).astype(np.uint8)).save(folder / f"{k}.png")
  return folder


def test_it_restores_a_folder(photos, tmp_path, digits):
  out = tmp_path / "out"
  flags = ("--workdir=digits", f"--images={photos}", "--samples=4", "--steps=10", f"--out={out}")
  result = restore(*flags, "--corrupt_level=1.0")
  assert result.returncode == 0, result.stderr
  assert "3 images, 4 samples each" in result.stdout
  kinds = ["input", "mean", "expected", "uncertainty", *(f"sample-{k}" for k in range(4))]
  want = {f"{k}-{kind}.png" for k in range(3) for kind in kinds}
  want |= {"picture.png", "restored.npz", "times.json"}
  assert {f.name for f in out.iterdir()} == want
  with np.load(out / "restored.npz") as content:
    for k in range(3):
      y, samples, x = content[f"{k}/input"], content[f"{k}/samples"], digits[k]
      assert np.std(samples.mean(0) - x) < 0.8 * np.std(y - x)  # a mean of four samples
      np.testing.assert_allclose(content[f"{k}/uncertainty"], samples.std(0, ddof=1), atol=1e-6)
  times = json.loads((out / "times.json").read_text())
  assert len(set(times.values())) == 1  # one level, one time
  assert "is there already" in error_of(restore(*flags, "--corrupt_level=1.0"))
  flags = ("--workdir=digits", f"--images={photos}", f"--out={photos}", "--t=0.5", "--force")
  assert "would mix with" in error_of(restore(*flags))
  assert sorted(f.name for f in photos.iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
  ("text", "flags"),
  [
    ("both say how corrupted", ("--level=1", "--t=0.5")),
    ("level 9 is outside of 0.01 … 6", ("--level=9",)),
    ("no such model comes with the package", ("--workdir=digitz",)),
  ],
)
def test_mistakes_end_with_one_line(text, flags, photos, tmp_path):
  flags = (f"--images={photos}", f"--out={tmp_path / 'x'}", *flags)
  if not any(f.startswith("--workdir") for f in flags):
    flags = ("--workdir=digits", *flags)
  assert text in error_of(restore(*flags))
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("text", "flag"),
  [
    ("no such folder of images", "--images=no/such"),
    ("did you mean 'momentum'", "--sampler=momentun"),
    ("--t=2 is outside of (0, 1]", "--t=2"),
    ("image seeds from 9223372036854775807 to", "--seed=9223372036854775807"),
  ],
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(text, flag, photos, tmp_path):
  result = restore("--workdir=digits", f"--images={photos}", f"--out={tmp_path / 'x'}", flag)
  assert text in error_of(result)
  assert "loading the model" not in result.stdout


@pytest.mark.parametrize(
  ("text", "shape"),
  [
    ("has transparent pixels", (8, 8, 4)),
    ("RGB, but the model was trained on grey", (8, 8, 3)),
    ("cannot be cut into the network's", (7, 9)),
  ],
)
def test_images_that_do_not_fit_are_named(text, shape, tmp_path):
  Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "odd.png")
  result = restore(
    "--workdir=digits", f"--images={tmp_path / 'odd.png'}", "--t=0.5", f"--out={tmp_path / 'x'}"
  )
  line = error_of(result)
  assert text in line
  assert "odd" in line
  assert not (tmp_path / "x").exists()
