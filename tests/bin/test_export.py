"""soft-diffusion-export as a user starts it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import export, training

ROOT = pathlib.Path(__file__).parents[2]


def program(*flags):
  return subprocess.run(
    [sys.executable, "-m", "soft_diffusion_tf.bin.export", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )


def error_of(result):
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  return line


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir of the digits model, evaluated."""
  folder = tmp_path_factory.mktemp("run") / "w"
  run = export.from_pretrained("digits")
  training.write(run, folder)
  record = {
    "step": run.step,
    "sampler": "momentum",
    "nfe": 60,
    "samples": 640,
    "label": "FD[pixels]",
    "value": 0.5,
    "floor": {"value": 0.25},
    "sampling": {"sampler": "momentum", "steps": 60},
    "reference": {"data": "digits", "split": "all", "image_shape": [8, 8, 1], "crop": "auto"},
  }
  text = json.dumps(record)
  (folder / "evaluations.jsonl").write_text(f"{text}\n{text[:70]}")  # the second one was killed
  return folder


def test_a_packed_file(workdir, tmp_path):
  out = tmp_path / "m.npz"
  result = program(f"--workdir={workdir}", f"--out={out}", "--licence=CC0-1.0")
  assert result.returncode == 0, result.stderr
  assert "from_pretrained" in result.stdout
  card = out.with_suffix(".md").read_text()
  assert "| momentum | 60 | 640 | FD[pixels] 0.5 | 0.25 |" in card
  assert "CC0-1.0" in card
  one, other = (export.from_pretrained(n) for n in (out, "digits"))
  assert export.digest_of(one) == export.digest_of(other)
  assert "is there already" in error_of(program(f"--workdir={workdir}", f"--out={out}"))
  files = sorted(workdir.rglob("*"))
  assert "would mix with" in error_of(
    program(f"--workdir={workdir}", f"--out={workdir}", "--force")
  )
  assert sorted(workdir.rglob("*")) == files


@pytest.mark.slow
def test_a_saved_model(workdir, tmp_path):
  out = tmp_path / "m"
  flags = (f"--workdir={workdir}", f"--out={out}", "--samplers=two_step:4", "--batch_size=4")
  result = program(*flags)
  assert result.returncode == 0, result.stderr
  assert "sample_two_step_4" in result.stdout
  assert "FD[pixels] 0.5" in (out / "README.md").read_text()
  run = training.load(workdir)
  images = tf.saved_model.load(str(out)).signatures["sample"](num=5, seed=tf.constant(1, tf.int64))[
    "images"
  ]
  options = run.options(sampler="two_step", steps=4, batch_size=4)
  np.testing.assert_array_equal(images, run.images(range(1, 6), options))
  before = sorted((f.name, f.stat().st_mtime) for f in out.rglob("*"))
  assert "is there already" in error_of(program(*flags))
  assert sorted((f.name, f.stat().st_mtime) for f in out.rglob("*")) == before


@pytest.mark.parametrize(
  ("text", "flags"),
  [
    ("'momentum' is not SAMPLER:STEPS", ("--samplers=momentum",)),
    ("did you mean 'momentum'", ("--samplers=momentun:3",)),
    ("float16 does not go with", ("--dtype=float16",)),
    ("no config.json in it", ("--workdir=tests",)),
  ],
)
def test_mistakes_end_with_one_line(text, flags, workdir, tmp_path):
  assert text in error_of(program(f"--workdir={workdir}", f"--out={tmp_path / 'x'}", *flags))
  assert not (tmp_path / "x").exists()
