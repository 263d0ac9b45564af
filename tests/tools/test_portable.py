"""The portable program: what it exports, what runs it without TensorFlow, what comes back.

The tests that run it need an environment with JAX: `make test-portable` makes one, or PORTABLE_ENV
names it.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from soft_diffusion_tf import data, experiment, training
from soft_diffusion_tf.training import checkpoints
from tools import portable, portable_runner

ROOT = pathlib.Path(__file__).parents[2]
ENV = pathlib.Path(os.environ.get("PORTABLE_ENV", ROOT / ".portable_env"))
STEPS = 20


@pytest.fixture(scope="module")
def small():
  e = experiment.from_file(ROOT / "configs" / "digits_blur.py")
  return e.replace(
    data={"flip": True, "train_split": "train", "test_split": "test"},
    network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (), "dropout": 0.1},
    training={
      "batch_size": 16,
      "warmup_steps": 5,
      "steps": STEPS,
      "sample_every": 0,
      "checkpoint_every": STEPS,
      "log_every": 10,
    },
    sampling={"batch_size": 16},
  )


@pytest.fixture(scope="module")
def images(small):
  return portable.load_images(small, "train", jpeg=False)


@pytest.fixture(scope="module")
def fresh(small, images):
  return portable.fresh(small, images[2])


@pytest.fixture(scope="module")
def folder(fresh, images, tmp_path_factory):
  out = tmp_path_factory.mktemp("portable") / "export"
  portable.export(
    fresh, out, images, steps=STEPS, plans="two_step:5,momentum:8", sample_batch=16, held_out=32
  )
  return out


@pytest.fixture(scope="module")
def manifest(folder):
  return portable_runner.read_manifest(folder)


def values(model):
  return {name: v.numpy() for name, v in checkpoints.named_variables(model).items()}


# --- What is exported -----------------------------------------------------------------------------


def test_programs_name_every_variable(fresh, manifest):
  named = checkpoints.named_variables(fresh.model)
  assert manifest["state"].keys() == named.keys()
  train = manifest["programs"]["train"]
  # Fourier frequencies are frozen: their average is not read, and neither is written.
  assert set(named) - set(train["variables"]) == {"ema/fourier/frequencies"}
  still = {"ema/fourier/frequencies", "network/fourier/frequencies"}
  assert set(named) - set(train["updated"]) - still <= {"optimizer/learning_rate"}
  for name in ("sample", "evaluate"):
    assert all(v.startswith("ema/") for v in manifest["programs"][name]["variables"])
    assert manifest["programs"][name]["updated"] == []


def test_programs_call_nothing_that_one_device_has_alone(folder, manifest):
  import gzip

  for program in manifest["programs"].values():
    text = gzip.decompress((folder / program["file"]).read_bytes()).decode()
    assert "custom_call" not in text
    # Of TensorFlow's own dialect only attributes of the module are left, which run.py drops.
    assert not re.search(r"= \"?mhlo\.", text)


def test_the_state_is_drawn_again_to_the_bit(fresh, folder, manifest):
  state, want = portable_runner.initial_state(manifest, folder), values(fresh.model)
  assert state.keys() == want.keys()
  for name, value in want.items():
    assert state[name].dtype == value.dtype
    np.testing.assert_array_equal(state[name], value, err_msg=name)
  kinds = {recipe["kind"] for recipe in manifest["state"].values()}
  assert kinds == {"uniform", "fill", "same", "stored"}  # Fourier frequencies are stored
  assert (folder / "state.npz").stat().st_size < 5_000


def test_a_state_in_the_middle_is_stored(fresh, tmp_path):
  model = training.build(fresh.experiment, fresh.diffusion)
  draw = np.random.default_rng(0)
  for v in checkpoints.named_variables(model).values():
    if v.dtype == tf.float32:
      v.assign(draw.normal(size=v.shape))
  found, stored, digest = portable.recipes(model)
  np.savez(tmp_path / "state.npz", **stored)
  again = portable_runner.initial_state({"state": found, "state_digest": digest}, tmp_path)
  for name, value in values(model).items():
    np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_the_order_is_that_of_training(small, folder, manifest):
  source = data.load("digits", "train", small.data.image_shape)
  pipeline = data.batches(source, 16, seed=small.seed, flip=True)
  pictures = portable_runner.read_images(folder, manifest["images"])
  order = np.load(folder / "order.npy")
  assert order.shape == (STEPS, 16)
  for k, batch in enumerate(pipeline.take(3)):
    mine = data.examples(pictures, order[k].astype(np.int32), k * 16, small.seed, True)
    np.testing.assert_array_equal(mine, batch)


def test_plans_are_filled_to_one_length(folder, fresh):
  with np.load(folder / "plans.npz") as content:
    plans = dict(content)
  assert {v.shape for v in plans.values()} == {(8, 6)}
  want = fresh.plan(fresh.options(sampler="two_step", nfe=5)).numpy()
  np.testing.assert_array_equal(plans["two_step:5"][:5], want)
  assert not plans["two_step:5"][5:].any()  # t = 0: the sampler counts such rows out


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("two_step", "SAMPLER:EVALUATIONS"),
    ("two_step:-3", "SAMPLER:EVALUATIONS"),
    ("two_stp:5", "did you mean"),
  ],
)
def test_plans_that_are_none(fresh, text, message):
  with pytest.raises(ValueError, match=message):
    portable.plans_of(fresh, text)


def test_a_step_in_parts_is_refused(small, images, fresh, tmp_path):
  parts = dataclasses.replace(fresh, experiment=small.replace(training={"accumulate": 2}))
  with pytest.raises(ValueError, match=r"training\.accumulate = 2"):
    portable.export(parts, tmp_path / "x", images, steps=1, plans="", sample_batch=1, held_out=0)
  kept = dataclasses.replace(fresh, experiment=small.replace(training={"averages": (0.05,)}))
  with pytest.raises(ValueError, match=r"training\.averages are kept"):
    portable.export(kept, tmp_path / "x", images, steps=1, plans="", sample_batch=1, held_out=0)


def test_an_export_leaves_other_files_alone(fresh, images, tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="holds files already"):
    portable.export(fresh, tmp_path, images, steps=1, plans="", sample_batch=1, held_out=0)
  assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


# --- Reading it -----------------------------------------------------------------------------------


def copy(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "copy")
  return tmp_path / "copy"


def test_a_damaged_file_is_named(folder, tmp_path):
  here = copy(folder, tmp_path)
  content = bytearray((here / "order.npy").read_bytes())
  content[-1] ^= 1
  (here / "order.npy").write_bytes(content)
  with pytest.raises(portable_runner.Refused, match=r"order\.npy is damaged"):
    portable_runner.read_manifest(here)
  manifest = json.loads((here / "manifest.json").read_text())
  (here / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
  with pytest.raises(portable_runner.Refused, match=r"manifest\.json is damaged"):
    portable_runner.read_manifest(here)
  (here / "manifest.json").write_text(json.dumps(manifest))
  (here / "order.npy").unlink()
  with pytest.raises(portable_runner.Refused, match=r"order\.npy is missing"):
    portable_runner.read_manifest(here)


@pytest.mark.parametrize("content", ["null", "5", "[]", "{}", "{", '{"format": 1}'])
def test_what_is_no_manifest(content, tmp_path):
  (tmp_path / "manifest.json").write_text(content)
  with pytest.raises(portable_runner.Refused, match=r"not a manifest|damaged"):
    portable_runner.read_manifest(tmp_path)


def test_a_folder_of_another_format(folder, tmp_path):
  here = copy(folder, tmp_path)
  manifest = json.loads((here / "manifest.json").read_text()) | {"format": 99}
  (here / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(portable_runner.Refused, match="of format 99"):
    portable_runner.read_manifest(here)


def test_jpeg_files_travel_as_they_are(tmp_path):
  draw = np.random.default_rng(0)
  files = []
  for _ in range(5):
    picture = draw.integers(0, 256, [4, 4, 3], np.uint8).repeat(4, 0).repeat(4, 1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    files.append(file.getvalue())
  images = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
  np.savez(
    tmp_path / "images.npz",
    data=np.frombuffer(b"".join(files), np.uint8),
    sizes=np.array([len(f) for f in files]),
    digest=np.array(hashlib.sha256(images.tobytes()).hexdigest().encode()),
  )
  np.testing.assert_array_equal(portable_runner.read_images(tmp_path, "images.npz"), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_png(channels):
  images = np.random.default_rng(0).integers(0, 256, [7, 5, 4, channels], np.uint8)
  picture = portable_runner.sheet(images, 3)
  assert picture.shape == (15, 12, channels)
  read = np.asarray(Image.open(io.BytesIO(portable_runner.png(picture)))).reshape(picture.shape)
  np.testing.assert_array_equal(read, picture)
  np.testing.assert_array_equal(picture[5:10, 4:8], images[4])
  assert not picture[10:, 4:].any()


def test_results_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(portable_runner, "PART", 2**19 + 1000)
  arrays = {f"ema/{k}": np.full([100], k, np.float32) for k in range(7)}
  files = portable_runner.save_state(tmp_path, "averages-00000007", arrays)
  assert len(files) == 4  # two of 400 bytes in each
  record = {"saved": "averages", "step": 7, "files": files}
  (tmp_path / "result.json").write_text(json.dumps(record))
  # A kill in the middle of the next save: what the record names is whole.
  (tmp_path / "averages-00000009-0.npz").write_bytes(b"half")
  _, read = portable.read_results(tmp_path)
  for name, value in arrays.items():
    np.testing.assert_array_equal(read[name], value)


def run_py(folder, *flags, python=sys.executable):
  return subprocess.run(
    [python, str(folder / "run.py"), *flags],
    capture_output=True,
    text=True,
    check=False,
    env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"},
    cwd=folder,
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "give --steps=N or --seconds=S"),
    (("--steps=-1",), "--steps=-1 must be"),
    (("--steps=1.5",), "invalid int value"),
    (("--stepz=3",), "unrecognized arguments: --stepz=3"),
    (("--steps=4", "--limit=nan"), "--limit=nan must be"),
    (("--steps=4", "--limit=0"), "raise it"),
    (("--steps=4", "--reference=/nowhere.npz"), "--reference=/nowhere.npz"),
    (("--seconds=nan",), "--seconds=nan must be"),
    (("--steps=1", "--plans=heun:3"), "exported were two_step:5, momentum:8"),
    (("--steps=1", "--folder=/nowhere"), "no manifest.json in it"),
    (("--steps=1", "--out=."), "holds files already"),
    (("--steps=1", "--out=run.py"), "holds files already"),
    (("--check=h9",), "there is h100"),
  ],
)
def test_bad_flags_end_with_one_line(folder, flags, message):
  result = run_py(folder, *flags)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert message in result.stderr


def test_another_jax_is_refused(folder, tmp_path):
  (tmp_path / "jax.py").write_text("__version__ = '0.4.1'\n")
  result = subprocess.run(
    [sys.executable, str(folder / "run.py"), "--steps=1", f"--out={tmp_path / 'out'}"],
    capture_output=True,
    text=True,
    check=False,
    env={"PYTHONPATH": str(tmp_path)},
  )
  assert result.returncode == 2
  line = result.stderr.strip()
  assert "JAX 0.4.1 is installed" in line
  assert f"pip install jax=={portable_runner.JAX}" in line
  assert "\n" not in line


def test_memory_that_does_not_suffice_is_named():
  error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes\nmore")
  assert "smaller --config.training.batch_size" in str(
    portable_runner.refused("compiling 'train'", error)
  )
  assert "\n" not in str(portable_runner.refused("timing", error))


# --- Back -----------------------------------------------------------------------------------------


@pytest.fixture
def results(fresh, manifest, tmp_path):
  """What run.py would have left after 20 steps, with made-up weights."""
  draw = np.random.default_rng(1)
  state = {k: draw.normal(size=v.shape).astype(v.dtype) for k, v in values(fresh.model).items()}
  state["optimizer/iteration"] = np.array(STEPS, state["optimizer/iteration"].dtype)
  (tmp_path / "results").mkdir()

  def make(saved="state", dtype=None, **changes):
    files = portable_runner.save_state(
      tmp_path / "results",
      f"{saved}-{STEPS:08d}",
      {k: v for k, v in state.items() if saved == "state" or k.startswith("ema/")},
      dtype,
    )
    record = {"export": manifest["digest"], "saved": saved, "step": STEPS, "files": files} | changes
    (tmp_path / "results" / "result.json").write_text(json.dumps(record))
    return tmp_path / "results", state

  return make


def test_a_whole_state_comes_back(folder, results, tmp_path):
  where, state = results()
  portable.bring_back(folder, where, tmp_path / "back")
  run = training.load(tmp_path / "back")
  assert run.step == STEPS
  for name, value in values(run.model).items():
    np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_averages_alone_come_back(folder, results, tmp_path):
  where, state = results("averages", np.float16)
  portable.bring_back(folder, where, tmp_path / "back")
  run = training.load(tmp_path / "back")
  assert run.step == STEPS
  for name, value in values(run.model).items():
    if name.startswith("optimizer/"):
      continue
    of = state[name.replace("network/", "ema/", 1)]
    np.testing.assert_array_equal(value, of.astype(np.float16), err_msg=name)
  about = json.loads((tmp_path / "back" / "portable.json").read_text())
  assert about["whole_state"] is False


@pytest.mark.parametrize(
  ("fault", "message"),
  [
    ("export", "give the --folder that it was run from"),
    ("missing", "is missing; copy every file"),
    ("shape", r"is float32 \(3,\), and the config makes it"),
    ("nan", "not finite"),
    ("torn", "is damaged"),
    ("gone", "cannot be read"),
    ("step", "its record of step 7"),
    ("no step", "not a record of run.py"),
    ("nothing", "no result.json in it"),
    ("unsaved", "no weights were saved"),
    ("workdir", "holds files already"),
  ],
)
def test_what_cannot_come_back_is_named(folder, results, tmp_path, fault, message):
  where, state = results(**({"export": "0123"} if fault == "export" else {}))
  name = next(n for n in state if n.startswith("ema/") and state[n].ndim == 4)
  if fault == "missing":
    del state[name]
  if fault == "shape":
    state[name] = np.zeros([3], np.float32)
  if fault == "nan":
    state[name] = np.full_like(state[name], np.nan)
  if fault in ("missing", "shape", "nan"):
    results()
  if fault == "torn":
    next(where.glob("state-*-0.npz")).write_bytes(b"PK\3\4torn")
  if fault == "gone":
    next(where.glob("state-*-0.npz")).unlink()
  if fault == "step":
    results(step=7)
  if fault == "no step":
    results(step="x")
  if fault == "nothing":
    (where / "result.json").unlink()
  if fault == "unsaved":
    (where / "result.json").write_text("{}")
  if fault == "workdir":
    portable.bring_back(folder, where, tmp_path / "back")
  with pytest.raises(ValueError, match=message):
    portable.bring_back(folder, where, tmp_path / "back")
  if fault != "workdir":
    assert not (tmp_path / "back").exists()


# --- With JAX -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python():
  path = ENV / "bin" / "python"
  if not path.exists():
    pytest.skip(f"{ENV} holds no JAX; run make test-portable, or set PORTABLE_ENV")
  return str(path)


@pytest.fixture(scope="module")
def ran(python, folder, tmp_path_factory):
  """Twenty steps and both plans by JAX, without TensorFlow."""
  out = tmp_path_factory.mktemp("ran") / "results"
  result = run_py(
    folder, f"--out={out}", f"--steps={STEPS}", "--samples=32", "--save=state", python=python
  )
  assert result.returncode == 0, result.stderr
  return out


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
  """The same steps by TensorFlow."""
  return training.train(small, tmp_path_factory.mktemp("tf") / "run", progress=False)


def test_twenty_steps_equal_tensorflows(ran, trained, fresh):
  _, got = portable.read_results(ran)
  start = values(fresh.model)
  moved = 0.0
  for name, value in values(trained.model).items():
    # Rounding in another order; the steps themselves move weights by a thousand times as much.
    np.testing.assert_allclose(got[name], value, atol=1e-6, rtol=1e-5, err_msg=name)
    if name.startswith("network/"):
      moved = max(moved, float(np.abs(value - start[name]).max()))
  assert moved > 1e-3


def test_samples_equal_in_8_bits(ran, folder, tmp_path):
  run = portable.bring_back(folder, ran, tmp_path / "back")
  for plan in ("two_step:5", "momentum:8"):
    sampler, nfe = plan.split(":")
    images = run.images(np.arange(32), run.options(sampler=sampler, nfe=int(nfe)))
    path = ran / f"samples-{sampler}_{nfe}-000000.png"
    got = np.asarray(Image.open(path))[:8, : 32 * 8].reshape(8, 32, 8).transpose(1, 0, 2)
    want = np.rint(np.clip(images[..., 0], 0, 1) * 255).astype(int)
    # A value that lies on the border of two may fall to either side.
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got == want).mean() > 0.999


def test_the_workdir_goes_on(ran, folder, small, tmp_path):
  longer = small.replace(training={"steps": STEPS + 4})
  portable.bring_back(folder, ran, tmp_path / "back")
  on = training.train(longer, tmp_path / "back", progress=False)
  straight = training.train(longer, tmp_path / "straight", progress=False)
  assert on.step == straight.step == STEPS + 4
  for name, value in values(straight.model).items():
    np.testing.assert_allclose(values(on.model)[name], value, atol=2e-6, rtol=1e-4, err_msg=name)


def test_held_out_loss_and_record(ran):
  record = json.loads((ran / "result.json").read_text())
  assert record["complete"] is True
  assert record["trained"] == STEPS
  step, loss, by_t = record["held_out"][-1]
  assert step == STEPS
  assert len(by_t) == 10
  assert np.isclose(loss, np.mean(by_t), rtol=0.3)  # equally many times in each, nearly


@pytest.mark.slow
def test_the_programs_compile_for_an_h100(python, folder):
  result = run_py(folder, "--check=h100", python=python)
  if "no compiler for CUDA" in result.stderr:
    pytest.skip(result.stderr.strip())
  assert result.returncode == 0, result.stderr
  for name in ("train", "sample", "evaluate"):
    assert f"{name} compiles for NVIDIA H100" in result.stdout
