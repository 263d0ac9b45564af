import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from soft_diffusion_tf import drawing, files, priors, training

ROOT = pathlib.Path(__file__).parents[1]


def drawer_of(experiment, strategy=None, **options):
  """A sampler on a small real network whose weights are all at random."""
  process = experiment.build_diffusion()
  images = np.random.default_rng(0).random([50, *experiment.data.image_shape], np.float32)
  process = process.with_prior(priors.fit("blurred_colour", images, process))
  model = training.build(experiment, process)
  draw = np.random.default_rng(1)
  for variable in model.ema_network.variables:
    variable.assign(variable + 0.1 * draw.standard_normal(variable.shape).astype(np.float32))
  return drawing.BatchSampler(
    process, model.denoiser(), dataclasses.replace(experiment.sampling, **options), strategy
  )


@pytest.fixture
def sampler(tiny):
  return drawer_of(tiny)


@pytest.mark.parametrize("company", [False, True])
def test_a_seed_always_stands_in_its_place(company):
  seeds = np.array([5, 21, 100, 7, 37, 4, 16])
  drawn, wanted = drawing.batches(seeds, 16, company)
  for row, places in zip(drawn, wanted):
    np.testing.assert_array_equal(row % 16, np.arange(16))
    if company:
      assert len(set(row // 16)) == 1
    inside = places >= 0
    np.testing.assert_array_equal(row[inside], seeds[places[inside]])
  assert sorted(wanted[wanted >= 0]) == list(range(len(seeds)))  # each once
  assert len(drawn) == (4 if company else 3)  # 5, 21 and 37 want the same place


def test_a_range_fills_whole_batches():
  drawn, _ = drawing.batches(np.arange(32, 96), 16)
  np.testing.assert_array_equal(drawn, np.arange(32, 96).reshape(4, 16))


@pytest.mark.parametrize("sampler", ["momentum", "heun", "dormand_prince"])
def test_an_image_is_its_seeds_to_the_bit(tiny, sampler):
  """Whatever is asked for beside it, in whatever order, and alone."""
  sampler = drawer_of(tiny, sampler=sampler, tolerance=0.05)
  together = sampler.images(range(40))
  assert np.isfinite(together).all()
  np.testing.assert_array_equal(sampler.images([3, 39, 17, 3]), together[[3, 39, 17, 3]])
  np.testing.assert_array_equal(sampler.images([20]), together[[20]])
  assert len({image.tobytes() for image in together}) == 40


def test_what_was_drawn_before_changes_no_bit(tiny):
  """Neither another batch size nor another number of steps, which share what is traced."""
  fresh = drawer_of(tiny).images(range(16))
  sampler = drawer_of(tiny, batch_size=5, steps=3)
  sampler.images(range(5))
  other = sampler.with_options(tiny.sampling)
  np.testing.assert_array_equal(other.images(range(16)), fresh)


def test_two_replicas_draw_what_one_device_draws(tiny):
  """Bit for bit: every replica draws whole batches of the one size."""
  devices = [d.name for d in tf.config.list_logical_devices("CPU")]
  if len(devices) < 2:
    pytest.skip("needs two logical CPU devices; see test_two_replicas_in_a_process_of_their_own")
  strategy = tf.distribute.MirroredStrategy(devices[:2])
  with strategy.scope():
    many = drawer_of(tiny, strategy)
  np.testing.assert_array_equal(many.images(range(40)), drawer_of(tiny).images(range(40)))


def test_two_replicas_in_a_process_of_their_own():
  """The test above in a process that makes two devices before TensorFlow starts."""
  code = (
    "import sys, pytest, tensorflow as tf\n"
    "c = tf.config\n"
    "two = 2 * [c.LogicalDeviceConfiguration()]\n"
    "c.set_logical_device_configuration(c.list_physical_devices('CPU')[0], two)\n"
    "sys.exit(pytest.main(['-x', sys.argv[1] + '::test_two_replicas_draw_what_one_device_draws']))"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, __file__], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert "1 passed" in result.stdout


def test_a_grid_in_transport_length_measures_the_models_own_images(tiny):
  sampler = drawer_of(tiny, grid="transport", sampler="two_step", steps=6)
  times = sampler.plan.numpy()[:, 0]
  assert times[0] == 1
  assert np.all(np.diff(times) < 0)
  assert np.abs(times - np.linspace(1, 1 / 6, 6)).max() > 0.01  # not the uniform one


def test_a_measured_grid_follows_the_weights(tiny, tmp_path):
  """Pictures are drawn while training; what is drawn afterwards is as from the checkpoint."""
  measured = tiny.replace(
    sampling={"grid": "transport", "sampler": "two_step", "steps": 6},
    training={"sample_every": 3, "learning_rate": 0.05, "warmup_steps": 0, "ema_decay": 0.0},
  )
  run = training.train(measured, tmp_path, progress=False)
  np.testing.assert_array_equal(run.plan(), training.load(tmp_path).plan())


def test_bounds_of_the_prediction(tiny):
  free, clipped, bounded = (
    drawer_of(tiny, **options).images(range(16))
    for options in ({}, {"clip": True}, {"threshold": 90.0})
  )
  assert free.min() < 0 or free.max() > 1
  for images in (clipped, bounded):
    assert images.min() >= 0
    assert images.max() <= 1
  assert np.abs(clipped - bounded).max() > 0.01


# --- Folders --------------------------------------------------------------------------------------

SETTINGS = {"config": "abc", "checkpoint": 7, "sampler": "momentum", "nfe": 4, "version": "x"}


def contents(folder):
  """Seed → uint8 image of a folder of either format."""
  found = {}
  for path in sorted(folder.glob("*.npz")):
    with np.load(path) as file:
      for seed, image in zip(file["seeds"], file["images"]):
        assert seed not in found, f"seed {seed} is there twice"
        found[int(seed)] = image
  for path in sorted(folder.glob("*.png")):
    found[int(path.stem)] = np.asarray(Image.open(path))[..., None]
  return found


@pytest.mark.parametrize("form", drawing.FORMATS)
def test_folders_hold_the_images_whatever_the_shards(sampler, tmp_path, form):
  want = drawing.plots.to_uint8(sampler.images(range(300)))
  for k in (2, 1, 3):
    drawing.write(
      sampler, range(300), tmp_path / "a", SETTINGS, form=form, shard=(k, 3), progress=False
    )
  found = contents(tmp_path / "a")
  assert sorted(found) == list(range(300))
  np.testing.assert_array_equal(np.stack([found[k] for k in range(300)]), want)
  assert not list((tmp_path / "a").glob(".*"))


def test_a_file_of_samples_that_is_none_is_drawn_again(sampler, tmp_path):
  drawing.write(sampler, [3, 5], tmp_path / "a", SETTINGS, progress=False)
  want = contents(tmp_path / "a")
  (file,) = (tmp_path / "a").glob("*.npz")
  for images, seeds in (
    (np.zeros([2, 8, 8, 1]), np.array([3, 5])),
    (np.zeros([2], np.uint8), np.array([3, 5])),
    (np.array([{}, {}]), np.array([3, 5])),
    (np.zeros([1, 8, 8, 1], np.uint8), np.array([3, 5])),
  ):
    np.savez(file, images=images, seeds=seeds)
    drawing.write(sampler, [3, 5], tmp_path / "a", SETTINGS, progress=False)
    found = contents(tmp_path / "a")
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[k], want[k]) for k in want)


def test_every_file_says_what_it_is(sampler, tmp_path):
  drawing.write(sampler, [3, 5], tmp_path / "a", SETTINGS, progress=False)
  drawing.write(sampler, [3, 5], tmp_path / "b", SETTINGS, form="png", progress=False)
  with np.load(next((tmp_path / "a").glob("*.npz"))) as file:
    notes = json.loads(str(file["metadata"]))
  assert notes == {**SETTINGS, "seeds": [3, 5]}
  text = Image.open(tmp_path / "b" / "000005.png").text["soft_diffusion_tf"]
  assert json.loads(text) == {**SETTINGS, "seed": 5}
  assert json.loads((tmp_path / "a" / drawing.SETTINGS_FILE).read_text())["checkpoint"] == 7


@pytest.mark.parametrize("form", drawing.FORMATS)
def test_a_folder_grows_and_draws_nothing_twice(sampler, tmp_path, form):
  draw = lambda seeds: drawing.write(
    sampler, seeds, tmp_path / "a", SETTINGS, form=form, progress=False
  )
  assert draw(range(20)) == (20, 0)
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
  assert draw(range(20)) == (20, 20)
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()} == before
  assert draw(range(10, 40)) == (30, 10)
  found = contents(tmp_path / "a")
  want = drawing.plots.to_uint8(sampler.images(range(40)))
  np.testing.assert_array_equal(np.stack([found[k] for k in range(40)]), want)


def test_a_damaged_file_is_drawn_again(sampler, tmp_path):
  drawing.write(sampler, range(8), tmp_path / "a", SETTINGS, progress=False)
  path = next((tmp_path / "a").glob("*.npz"))
  whole = path.read_bytes()
  path.write_bytes(whole[:100])
  assert drawing.write(sampler, range(8), tmp_path / "a", SETTINGS, progress=False) == (8, 0)
  assert len(contents(tmp_path / "a")) == 8


def test_other_samples_are_not_overwritten(sampler, tmp_path):
  folder = tmp_path / "a"
  drawing.write(sampler, [1], folder, SETTINGS, progress=False)
  with pytest.raises(ValueError, match="differ in checkpoint; give another --out"):
    drawing.write(sampler, [1], folder, SETTINGS | {"checkpoint": 8}, progress=False)
  drawing.write(sampler, [2], folder, SETTINGS | {"checkpoint": 8}, force=True, progress=False)
  assert list(contents(folder)) == [2]
  for odd in ("[]", "5", "null"):  # JSON, but no settings: not taken for none
    (folder / drawing.SETTINGS_FILE).write_text(odd)
    with pytest.raises(ValueError, match="holds samples that differ in"):
      drawing.write(sampler, [1], folder, SETTINGS, progress=False)
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "note.txt").write_text("mine")
  (tmp_path / "b" / "000001.png").write_text("mine")
  for force in (False, True):
    with pytest.raises(ValueError, match="holds other files"):
      drawing.write(sampler, [1], tmp_path / "b", SETTINGS, force=force, progress=False)
  assert (tmp_path / "b" / "000001.png").read_text() == "mine"


def test_what_another_shard_has_half_written_is_no_other_file(sampler, tmp_path, monkeypatch):
  partials = []
  with monkeypatch.context() as patch, files.atomic(tmp_path / drawing.SETTINGS_FILE) as partial:
    partials.append(partial.name)
    patch.setattr(os, "getpid", lambda: 1)
    with files.atomic(tmp_path / drawing.SETTINGS_FILE) as other:
      partials.append(other.name)
      other.write_text("{}")
    partial.write_text("{")
  assert len(set(partials)) == 2  # each process has its own
  assert all(name[0] == "." for name in partials)
  (tmp_path / drawing.SETTINGS_FILE).rename(tmp_path / partials[0])  # as after a kill
  assert drawing.write(sampler, [1], tmp_path, SETTINGS, progress=False) == (1, 0)


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_bad_shards(sampler, tmp_path, shard):
  with pytest.raises(ValueError, match="give k/n"):
    drawing.write(sampler, [1], tmp_path / "a", SETTINGS, shard=shard, progress=False)
  assert not (tmp_path / "a").exists()


def test_no_seeds(sampler):
  with pytest.raises(ValueError, match="no seeds"):
    sampler.images([])


def test_an_error_of_the_writer_comes_out(sampler, tmp_path, monkeypatch):
  def full(path, **arrays):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  with pytest.raises(ValueError, match=r"No space left on device.*start again"):
    drawing.write(sampler, range(300), tmp_path / "a", SETTINGS, progress=False)


_KILLED = """
import sys, time
import numpy as np, tensorflow as tf
from soft_diffusion_tf import drawing, corruptions, diffusion, priors, schedules
from soft_diffusion_tf.experiment import Sampling
process = diffusion.Diffusion((4, 4, 1), corruptions.Identity(), schedules.Constant(0.0),
                              schedules.Geometric(0.01, 1.0)).with_prior(priors.zero((4, 4, 1)))
options = Sampling("momentum", steps=3, batch_size=4)
sampler = drawing.BatchSampler(process, lambda x, t: tf.tanh(x), options)
draw = sampler._draw
def slow(drawn):
  time.sleep(0.01)
  with open(sys.argv[3], "a") as log:
    log.write(" ".join(map(str, np.ravel(drawn))) + "\\n")
  return draw(drawn)
sampler._draw = slow
drawing.write(sampler, range(1000), sys.argv[1], {"version": "x"}, form=sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("form", [pytest.param("npz", marks=pytest.mark.slow), "png"])
def test_kill_9_costs_at_most_what_was_in_hand(tmp_path, form):
  """Killed at random moments until done: every seed is there once, and what was written stayed."""
  log = tmp_path / "log"
  command = [sys.executable, "-c", _KILLED, str(tmp_path / "a"), form, str(log)]
  env = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
  kills = 0
  for delay in (0.3, 0.9, 0.1, None):
    log_before = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    if delay is not None:
      while process.poll() is None and (not log.exists() or log.stat().st_size == log_before):
        time.sleep(0.02)  # it has begun to draw
      time.sleep(delay)
      kills += process.poll() is None
      process.send_signal(signal.SIGKILL)
    process.wait()
  assert process.returncode == 0
  assert kills >= 2
  assert sorted(contents(tmp_path / "a")) == list(range(1000))
  drawn = [int(word) for word in log.read_text().split()]
  in_hand = 4 * drawing._BATCHES_PER_FILE if form == "npz" else 4
  queued = 5 * in_hand  # drawn, and not yet written by the thread beside
  assert len(drawn) <= 1000 + kills * (in_hand + queued)
