import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, data, files, schedules, training, transport
from soft_diffusion_tf.model import NonFiniteLoss, SoftDiffusionModel
from soft_diffusion_tf.training import monitoring, watching, workers
from soft_diffusion_tf.training import run as run_of
from soft_diffusion_tf.training import workdir as workdir_of
from soft_diffusion_tf.training.checkpoints import Checkpoints


def state(run):
  weights = [*run.model.network.variables, *run.model.ema_network.variables]
  return [v.numpy() for v in [*weights, *run.model.optimizer.variables]]


def metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_config_that_no_checkpoint_fits_is_refused_before_memory_is_taken(tiny, tmp_path):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "checkpoints" / "ckpt-2.data-00000-of-00001").write_bytes(bytes(100_000))
  run_of._check_size(tmp_path, tiny)
  largest = {"nf": 4096, "num_res_blocks": 128}
  with pytest.raises(ValueError, match=r"[\d,]{13,} weights, and no checkpoint|GiB of memory"):
    run_of._check_size(tmp_path, tiny.replace(network=largest))
  for field in ("nf", "num_res_blocks"):
    with pytest.raises(ValueError, match=f"network.{field} must be from"):
      tiny.replace(network={field: 10**6})


def test_a_workdir_holds_everything(tiny, tmp_path):
  run = training.train(tiny, tmp_path, progress=False)
  assert run.step == 6
  names = {f.name for f in tmp_path.iterdir()}
  assert {"config.json", "prior.npz", "checkpoints", "metrics.jsonl", "tensorboard"} <= names
  lines = metrics(tmp_path)
  assert [line["step"] for line in lines] == [2, 4, 6]
  assert all(np.isfinite(line["loss"]) and len(line["loss_by_t"]) == 10 for line in lines)
  loaded = training.load(tmp_path)
  for a, b in zip(state(run), state(loaded)):
    np.testing.assert_array_equal(a, b)
  images = loaded.sampler()(loaded.plan(), range(3))
  assert images.shape == (3, 8, 8, 1)
  np.testing.assert_array_equal(images, run.sampler()(run.plan(), range(3)))


def test_images_of_ones_own_are_trained_on_and_their_labels_are_named(tiny, tmp_path, rng):
  images, labels = rng.random([40, 8, 8, 1]), np.array(["cat", "tree"] * 20)
  short = tiny.replace(training={"steps": 2}, data={"balanced": True, "augment": ("shift",)})
  run = training.train(short, tmp_path, progress=False, source=(images, labels))
  assert run.step == 2
  assert json.loads((tmp_path / "labels.json").read_text()) == {
    "names": ["cat", "tree"],
    "counts": {"0": 20, "1": 20},
  }
  longer = short.replace(training={"steps": 4})
  with pytest.raises(ValueError, match=r"another config \(it differs in data.name\)"):
    training.train(longer, tmp_path, progress=False, source=(images[1:], labels[1:]))
  assert training.train(longer, tmp_path, progress=False, source=(images, labels)).step == 4


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
  whole = training.train(tiny, tmp_path / "whole", progress=False)
  training.train(tiny.replace(training={"steps": 2}), tmp_path / "parts", progress=False)
  # as after a kill: lines that the lost steps had written
  with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 4, "loss": -1}) + "\n")
  parts = training.train(tiny, tmp_path / "parts", progress=False)
  for a, b in zip(state(whole), state(parts)):
    np.testing.assert_array_equal(a, b)
  clock = {"images_per_second", "input_wait"}
  strip = lambda lines: [{k: v for k, v in x.items() if k not in clock} for x in lines]
  assert strip(metrics(tmp_path / "whole")) == strip(metrics(tmp_path / "parts"))


@pytest.mark.parametrize("stop", [5, pytest.param(6, marks=pytest.mark.slow)])
def test_records_of_a_run_that_was_killed_between_them_are_those_of_a_whole_one(
  tiny, tmp_path, monkeypatch, stop
):
  """Records at 4 and 8; checkpoints at 3 and 6, so that each falls inside of a window."""
  odd = tiny.replace(
    training={"steps": 9, "log_every": 4, "checkpoint_every": 3, "steps_per_loop": 1}
  )
  training.train(odd, tmp_path / "whole", progress=False)
  original = monitoring.Monitor.advance

  def kill(self, step, totals):
    original(self, step, totals)
    if step == stop + 1:
      raise KeyboardInterrupt

  monkeypatch.setattr(monitoring.Monitor, "advance", kill)
  with pytest.raises(KeyboardInterrupt):
    training.train(odd, tmp_path / "parts", progress=False)
  monkeypatch.undo()
  training.train(odd, tmp_path / "parts", progress=False)
  clock = {"images_per_second", "input_wait"}
  whole, parts = (
    [{k: v for k, v in x.items() if k not in clock} for x in metrics(tmp_path / name)]
    for name in ("whole", "parts")
  )
  assert whole == parts
  assert [x["steps"] for x in parts] == [4, 4, 1]


def test_tensorboard_has_the_curves_and_the_grid(tiny, tmp_path):
  training.train(tiny.replace(training={"sample_every": 4}), tmp_path, progress=False)
  events = [
    value.tag
    for file in (tmp_path / "tensorboard").iterdir()
    for event in tf.compat.v1.train.summary_iterator(str(file))
    for value in event.summary.value
  ]
  curves = {"loss", "gradient_norm", "learning_rate", "parameter_norm", "ema_norm"}
  assert curves | {"images_per_second", "input_wait"} <= set(events)
  assert {"samples", "predictions", "schedule", "_hparams_/session_start_info"} <= set(events)
  assert any(tag.startswith("loss_by_t/") for tag in events)
  assert {"held_out_loss", "held_out_ema_loss", "held_out_ema_loss_by_t/0.0-0.1"} <= set(events)


@pytest.mark.slow
def test_a_resumed_run_shows_no_step_twice(tiny, tmp_path):
  training.train(tiny, tmp_path, progress=False)
  for file in (tmp_path / "checkpoints").glob("ckpt-6.*"):  # as if killed before it was written
    file.unlink()
  training.train(tiny.replace(training={"steps": 8}), tmp_path, progress=False)
  steps = [
    event.step
    for file in (tmp_path / "tensorboard").iterdir()
    for event in tf.compat.v1.train.summary_iterator(str(file))
    for value in event.summary.value
    if value.tag == "loss"
  ]
  assert sorted(steps) == [2, 4, 6, 8]
  assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def test_without_a_terminal_progress_is_lines(tiny, tmp_path, capsys):
  training.train(tiny, tmp_path)
  lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
  assert len(lines) == 3
  assert re.fullmatch(r"step 6/6: loss [\d.]+, \d+ images/s, 00:00 left", lines[-1])


def test_another_config_is_refused_and_nothing_changes(tiny, tmp_path):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ValueError, match=r"another config \(it differs in network\.nf, seed\)"):
    training.train(tiny.replace(seed=5, network={"nf": 16}), tmp_path, progress=False)
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_second_process_is_refused(tiny, tmp_path):
  with (
    files.lock(tmp_path),
    pytest.raises(ValueError, match="another process is training in it"),
    files.lock(tmp_path),
  ):
    pass


def test_a_damaged_newest_checkpoint_is_passed_over(tiny, tmp_path, capsys):
  training.train(tiny, tmp_path, progress=False)
  newest = tmp_path / "checkpoints" / "ckpt-6.data-00000-of-00001"
  newest.write_bytes(newest.read_bytes()[:1000])
  run = training.load(tmp_path)
  assert run.step == 4
  assert "ckpt-6 cannot be read" in capsys.readouterr().out


def test_a_non_finite_loss_stops_the_run(tiny, tmp_path, monkeypatch):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  original = SoftDiffusionModel.call

  def poisoned(self, x_t, t, **options):
    late = (t > 0.6) & (self.optimizer.iterations >= 3)
    return (
      original(self, x_t, t, **options)
      + tf.where(late, np.float32(np.inf), 0.0)[:, None, None, None]
    )

  def steep(self, x_t, t, **options):
    return tf.sqrt(0.0 * original(self, x_t, t, **options))  # its derivative is not finite

  monkeypatch.setattr(SoftDiffusionModel, "call", poisoned)
  text = r"the loss \(t = 0\.[6-9]\d+, σ = 0\.1\) is not finite at step 3; the last good"
  with pytest.raises(NonFiniteLoss, match=text):
    training.train(tiny, tmp_path, progress=False)
  monkeypatch.setattr(SoftDiffusionModel, "call", steep)
  with pytest.raises(NonFiniteLoss, match="the gradient is not finite at step 2; the last"):
    training.train(tiny, tmp_path, progress=False)
  monkeypatch.undo()
  assert training.load(tmp_path).step == 2


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)

  def full(*args, **kwargs):
    raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

  monkeypatch.setattr(tf.train.CheckpointManager, "save", full)
  with pytest.raises(ValueError, match=r"cannot save step 4 .No space left on device.; .* intact"):
    training.train(tiny, tmp_path, progress=False)
  assert training.load(tmp_path).step == 2


def test_a_workdir_without_checkpoints(tiny, tmp_path, monkeypatch):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  shutil.rmtree(tmp_path / "checkpoints")
  monkeypatch.setattr(run_of, "build", None)  # said before the network is made
  with pytest.raises(ValueError, match="no readable checkpoint"):
    training.load(tmp_path)
  (tmp_path / "prior.npz").unlink()
  with pytest.raises(ValueError, match="not a saved prior"):
    training.load(tmp_path)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps(tiny, tmp_path):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  assert training.train(tiny, tmp_path, progress=False).step == 6
  assert training.train(tiny, tmp_path, progress=False).step == 6


def test_an_unfound_schedule_is_refused_before_anything_is_written(tiny, tmp_path):
  from soft_diffusion_tf import schedules

  unfound = tiny.replace(level=schedules.Unfound(0.01, 6.0, "x.json"))
  with pytest.raises(ValueError, match=r"soft-diffusion-schedule"):
    training.train(unfound, tmp_path / "w", progress=False)
  assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.slow
def test_checkpoints_are_kept_by_step(tiny, tmp_path):
  many = tiny.replace(training={"keep": 1, "checkpoint_every": 1, "keep_every": 4})
  training.train(many, tmp_path, progress=False)
  assert {f.stem for f in (tmp_path / "checkpoints").glob("*.index")} == {"ckpt-6"}
  assert {f.stem for f in (tmp_path / "checkpoints" / "kept").glob("*.index")} == {"ckpt-4"}
  assert training.load(tmp_path, step=4).step == 4
  with pytest.raises(ValueError, match="no checkpoint of step 3"):
    training.load(tmp_path, step=3)


def test_sigterm_saves_and_the_run_goes_on(tiny, tmp_path, monkeypatch):
  whole = training.train(tiny, tmp_path / "whole", progress=False)
  original = monitoring.Monitor.record

  def terminate(self, step, **values):
    record = original(self, step, **values)
    if step == 4:
      signal.raise_signal(signal.SIGTERM)
    return record

  rare = tiny.replace(training={"checkpoint_every": 100})
  monkeypatch.setattr(monitoring.Monitor, "record", terminate)
  with pytest.raises(training.Preempted, match="asked to end at step 4, which is saved"):
    training.train(rare, tmp_path / "parts", progress=False)
  monkeypatch.undo()
  assert training.load(tmp_path / "parts").step == 4
  parts = training.train(rare, tmp_path / "parts", progress=False)
  for a, b in zip(state(whole), state(parts)):
    np.testing.assert_array_equal(a, b)


def test_a_batch_must_divide_by_the_replicas(tiny, tmp_path):
  class Three:
    num_replicas_in_sync = 3

  with pytest.raises(ValueError, match=r"batch_size = 16 cannot be shared by 3 replicas; take 15"):
    training.train(tiny, tmp_path, Three(), progress=False)


_WORKER = """
import hashlib, json, os, sys
index, steps, ports, workdir = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
ports = ports.split(",")
import tensorflow as tf
if ports != [""]:
  cluster = {"worker": [f"127.0.0.1:{p}" for p in ports]}
  task = {"type": "worker", "index": index}
  os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
else:
  cpu = tf.config.list_physical_devices("CPU")[0]
  tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from soft_diffusion_tf import training
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.training.strategies import make_strategy
strategy = make_strategy("multi_worker" if ports != [""] else "mirrored")
e = Experiment.from_config(json.loads(sys.stdin.read())).replace(training={"steps": steps})
run = training.train(e, workdir, strategy, progress=False)
m = run.model
variables = [*m.network.variables, *m.ema_network.variables, *m.optimizer.variables]
values = [v.numpy().tobytes() for v in variables]
print("DIGEST", run.step, hashlib.md5(b"".join(values)).hexdigest())
"""


def _free_ports(count):
  sockets = [socket.socket() for _ in range(count)]
  for s in sockets:
    s.bind(("127.0.0.1", 0))
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  return ports


def _start(tiny, index, ports, workdir, steps):
  process = subprocess.Popen(
    [sys.executable, "-c", _WORKER, f"{index}", f"{steps}", ",".join(map(str, ports)), workdir],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdin.write(json.dumps(tiny.to_dict()))
  process.stdin.close()
  process.stdin = None  # so that communicate does not flush it again
  return process


def _digest(process):
  out, error = process.communicate(timeout=400)
  lines = [line for line in out.splitlines() if line.startswith("DIGEST")]
  assert lines, error[-3000:]
  return lines[0]


@pytest.mark.slow
def test_two_workers_equal_two_devices_and_a_checkpoint_moves_between_them(tiny, tmp_path):
  devices = _digest(_start(tiny, 0, [], tmp_path / "devices", 6))
  ports = _free_ports(2)
  half = [_start(tiny, k, ports, tmp_path / "workers", 4) for k in range(2)]
  halves = [_digest(p) for p in half]
  assert halves[0] == halves[1]
  assert _digest(_start(tiny, 0, [], tmp_path / "workers", 6)) == devices  # on two devices again


@pytest.mark.slow
def test_workers_that_differ_are_refused(tiny, tmp_path):
  ports = _free_ports(2)
  other = tiny.replace(training={"ema_decay": 0.5})
  both = [_start(e, k, ports, tmp_path / "w", 4) for k, e in enumerate((tiny, other))]
  for process in both:
    _, error = process.communicate(timeout=400)
    assert process.returncode
    assert "the workers differ: this one is at step 0 of config" in error


def test_two_devices_equal_one(tiny, tmp_path):
  """The same global batch, with the clip at work, 20 steps on.

  The replicas' gradients are summed in another order, which changes their last bits. Adam divides
  by √v + ε: where a gradient is itself no more than rounding, a tiny ε would blow that up to the
  size of a step (9e-7 was seen at ε = 1e-8), so ε is larger here.
  """
  tiny = tiny.replace(training={"steps": 20, "epsilon": 1e-3, "checkpoint_every": 0})
  process = _start(tiny, 0, [], tmp_path / "two", 20)
  training.train(tiny, tmp_path / "one", progress=False)
  _digest(process)
  assert all(line["gradient_norm"] > 10 for line in metrics(tmp_path / "one"))  # clipped at 1
  one, two = (training.load(tmp_path / name) for name in ("one", "two"))
  for a, b in zip(state(one), state(two)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def _start_program(config, workdir, index, ports, steps):
  cluster = {"worker": [f"127.0.0.1:{p}" for p in ports]}
  task = {"type": "worker", "index": index}
  environment = {**os.environ, "TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "soft_diffusion_tf.bin.train",
      f"--config={config}",
      f"--workdir={workdir}",
      f"--config.training.steps={steps}",
    ],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _two_at_work(experiment, tmp_path):
  """Two workers some steps on, through the program; and how to start others, given their number."""
  config = tmp_path / "config.py"
  config.write_text(
    f"from ml_collections import ConfigDict\nget_config = lambda: "
    f"ConfigDict({experiment.to_dict()!r}, convert_dict=True)\n"
  )

  def start(ports, steps):
    return [_start_program(config, tmp_path / "w", k, ports, steps) for k in range(2)]

  both = start(_free_ports(2), 100_000)
  while not (tmp_path / "w" / "metrics.jsonl").exists() or len(metrics(tmp_path / "w")) < 5:
    assert all(p.poll() is None for p in both)
    time.sleep(0.2)
  return both, start


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_worker_that_is_to_end_saves_for_all(tiny, tmp_path, asked):
  both, _ = _two_at_work(tiny.replace(training={"checkpoint_every": 0}), tmp_path)
  both[asked].send_signal(signal.SIGTERM)
  errors = [p.communicate(timeout=120)[1] for p in both]
  step = training.load(tmp_path / "w").step
  assert step >= 10
  for process, error in zip(both, errors):
    assert process.returncode == 75
    assert f"asked to end at step {step}, which is saved" in error


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_worker_ends_the_others_and_all_can_go_on(tiny, tmp_path, victim):
  """Through the program, as it is used: exit code 75 and one line, in less than 30 seconds."""
  both, start = _two_at_work(tiny.replace(training={"checkpoint_every": 4}), tmp_path)
  both[victim].kill()
  begin = time.monotonic()
  _, error = both[1 - victim].communicate(timeout=120)
  assert time.monotonic() - begin < 30
  assert both[1 - victim].returncode == 75
  assert "error: another worker is gone" in error
  both[victim].communicate()

  step = Checkpoints(tmp_path / "w" / "checkpoints", training.load(tmp_path / "w").model)
  steps = step.restore() + 4
  for process in start(_free_ports(2), steps):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-2000:]
  resumed = training.load(tmp_path / "w")
  assert resumed.step == steps
  two = tiny.replace(training={"checkpoint_every": 4})
  _digest(_start(two, 0, [], tmp_path / "whole", steps))
  for a, b in zip(state(training.load(tmp_path / "whole")), state(resumed)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_kills_at_any_moment_cost_nothing_but_time(tiny, tmp_path):
  """kill -9 at random moments, also while a checkpoint is written: the end is equal to the bit."""
  long = tiny.replace(training={"checkpoint_every": 2})
  generator, metrics_file = np.random.default_rng(0), tmp_path / "killed" / "metrics.jsonl"
  for _ in range(20):
    process = _start(long, 0, [], tmp_path / "killed", 100_000)
    size = metrics_file.stat().st_size if metrics_file.exists() else 0
    while not metrics_file.exists() or metrics_file.stat().st_size <= size:
      assert process.poll() is None, process.communicate()
      time.sleep(0.02)
    time.sleep(float(generator.uniform(0, 0.4)))  # it trains: any moment now
    process.kill()
    process.communicate()
  steps = metrics(tmp_path / "killed")[-1]["step"] + 10
  want = _digest(_start(long, 0, [], tmp_path / "whole", steps))
  assert _digest(_start(long, 0, [], tmp_path / "killed", steps)) == want
  curves = [[(x["step"], x["loss"]) for x in metrics(tmp_path / n)] for n in ("whole", "killed")]
  assert curves[0] == curves[1]
  assert len(curves[0]) == steps // 2


@pytest.mark.slow
def test_unreadable_checkpoints_never_start_a_run_anew(tiny, tmp_path):
  training.train(tiny, tmp_path, progress=False)
  files = sorted((tmp_path / "checkpoints").glob("*.data*"))
  for file in files:
    file.write_bytes(b"broken")
  before = {
    f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and "tensorb" not in str(f)
  }
  with pytest.raises(ValueError, match="none of its 3 checkpoints can be read"):
    training.train(tiny.replace(training={"steps": 8}), tmp_path, progress=False)
  assert all(f.read_bytes() == content for f, content in before.items())


@pytest.mark.slow
def test_a_torn_line_of_metrics_does_not_block_a_resume(tiny, tmp_path):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 3, "lo')
  (tmp_path / "windows.jsonl").write_text('5\n{"step": 2}\n{"step": 2, "sums": 5, "since": []}\n{"')
  training.train(tiny, tmp_path, progress=False)
  assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6]


def test_a_refused_network_does_not_claim_the_workdir(tiny, tmp_path):
  deep = tiny.replace(network={"ch_mult": (1, 1, 1, 1, 1)})
  with pytest.raises(ValueError, match="not divisible by 16"):
    training.train(deep, tmp_path / "w", progress=False)
  # 96 + 48 channels meet where the way up takes a skip: seen only when the layers are made.
  odd = tiny.replace(network={"nf": 48, "ch_mult": (1, 2), "num_res_blocks": 2})
  with pytest.raises(ValueError, match="cannot split 144 channels"):
    training.train(odd, tmp_path / "w", progress=False)
  assert not (tmp_path / "w" / "config.json").exists()
  assert not (tmp_path / "w" / training.PRIOR_FILE).exists()


@pytest.mark.slow
def test_the_rate_may_be_lowered_on_the_way(tiny, tmp_path):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  lower = tiny.replace(training={"steps": 4, "learning_rate": 1e-5, "warmup_steps": 0})
  with pytest.raises(ValueError, match=r"differs in training\.warmup_steps"):
    training.train(lower, tmp_path, progress=False)
  lower = tiny.replace(training={"steps": 4, "learning_rate": 1e-5})
  run = training.train(lower, tmp_path, progress=False)
  assert run.step == 4
  assert metrics(tmp_path)[-1]["learning_rate"] <= 1e-5


def test_the_held_out_loss_is_that_of_the_test_split(tiny, tmp_path):
  run = training.train(tiny, tmp_path, progress=False)
  images = data.load("digits", "test").floats()  # 297, less than are looked at
  for name, averaged in (("held_out_loss", False), ("held_out_ema_loss", True)):
    each, t = run.model.held_out(tf.constant(images), averaged)
    last = metrics(tmp_path)[-1]
    assert last[name] == pytest.approx(float(np.mean(each)), rel=1e-4)
    late = np.float64(each)[np.asarray(t) >= 0.9]
    assert last[f"{name}_by_t"][9] == pytest.approx(late.mean(), rel=1e-4)
  assert [x["step"] for x in metrics(tmp_path) if "held_out_loss" in x] == [2, 4, 6]
  rare = tiny.replace(training={"checkpoint_every": 4})
  training.train(rare, tmp_path / "rare", progress=False)
  assert [x["step"] for x in metrics(tmp_path / "rare") if "held_out_loss" in x] == [4, 6]


def test_changed_fields_are_said_and_kept(tiny, tmp_path, capsys):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  other = tiny.replace(training={"steps": 4, "learning_rate": 0.5}, sampling={"steps": 7})
  training.train(other, tmp_path)
  error = capsys.readouterr().out
  assert "training.learning_rate 0.001 → 0.5, training.steps 2 → 4 from step 2 on" in error
  assert "going on from step 2 of 4" in error
  [record] = map(json.loads, (tmp_path / training.HISTORY_FILE).read_text().splitlines())
  assert record["step"] == 2
  assert record["changed"]["training.learning_rate"] == [0.001, 0.5]
  # A run that has ended stays what it was: no step would use what is new.
  before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
  for late in ({"steps": 4, "learning_rate": 0.7}, {"steps": 3}):
    training.train(other.replace(training=late), tmp_path)
  error = capsys.readouterr().out
  assert "at step 4 of 4: nothing is left to do" in error
  assert "left as it was, for no step would have used it: training.learning_rate 0.5 → 0.7" in error
  assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_records_without_a_checkpoint_are_not_written_over(tiny, tmp_path):
  whole = training.train(tiny, tmp_path, progress=False)
  with pytest.raises(ValueError, match="has a checkpoint, of step 6"):
    training.train(tiny, tmp_path, progress=False, anew=True)
  lines = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  with pytest.raises(ValueError, match=r"has records \(metrics\.jsonl\) and no checkpoint: was"):
    training.train(tiny, tmp_path, progress=False)
  assert (tmp_path / "metrics.jsonl").read_bytes() == lines
  again = training.train(tiny, tmp_path, progress=False, anew=True)
  assert (tmp_path / "records-1" / "metrics.jsonl").read_bytes() == lines
  assert len(metrics(tmp_path)) == 3
  for a, b in zip(state(whole), state(again)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["history.jsonl", "windows.jsonl", "sweep/results.jsonl"])
def test_every_file_that_tells_of_steps_is_a_record(name, tmp_path):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / "history.jsonl").write_text('{"step": 0, "changed": {}}\n')
  workdir_of.check_records(tmp_path, None, False)  # of no step
  (tmp_path / name).write_text('{"step": 0}\n{"step": 20}\n')
  with pytest.raises(ValueError, match=rf"has records \({re.escape(name)}\) and no checkpoint"):
    workdir_of.check_records(tmp_path, None, False)
  workdir_of.check_records(tmp_path, None, True)
  workdir_of.check_records(tmp_path, 20, False)


@pytest.mark.slow
def test_a_workdir_that_was_killed_before_its_first_checkpoint_just_begins(tiny, tmp_path):
  training.train(tiny.replace(training={"steps": 2}), tmp_path, progress=False)
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "metrics.jsonl").write_text("")  # as the first process leaves it at step 0
  assert training.train(tiny, tmp_path, progress=False).step == 6


def test_what_lies_ahead_is_said_before_training(tiny, tmp_path, capsys):
  from PIL import Image

  for k in range(3):
    (tmp_path / "in").mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8), 60 * k, np.uint8)).save(tmp_path / "in" / f"{k}.png")
  few = tiny.replace(
    data={"name": f"folder:{tmp_path / 'in'}"}, training={"ema_decay": 0.9999, "steps": 2}
  )
  run = training.train(few, tmp_path / "w")
  error = capsys.readouterr().out
  before, _, _ = error.partition("step 2/2")
  assert "evaluation.samples = 64, and 'train' of folder:" in before
  assert "has 3 images" in before
  assert "set evaluation.samples to at most 3" in before
  assert "no held-out loss: " in before
  assert "the split 'test' is empty" in before
  assert "ema_decay = 0.9999 is long for 2 steps: 100% of the averaged weights are still" in before
  assert "take at most 0.1" in before
  assert "ema_decay = 0.9999 is long for 2 steps" in run.remark
  assert "held_out_loss" not in metrics(tmp_path / "w")[-1]
  raw = training.load(tmp_path / "w", averaged=False)
  assert raw.remark == ""
  denoise = raw.batch_sampler().sampler.denoiser
  x, t = tf.constant(np.full((1, 8, 8, 1), 0.5, np.float32)), tf.constant([0.5])
  np.testing.assert_array_equal(denoise(x, t), raw.model.denoiser(ema=False)(x, t))
  assert np.any(denoise(x, t) != raw.model.denoiser()(x, t))


@pytest.mark.parametrize("part", ["images", "count", "prior", "weights", "step", "config", None])
def test_workers_agree_on_everything_or_not_at_all(tiny, monkeypatch, digits, part):
  """The second worker's sums are added as the strategy would."""
  from soft_diffusion_tf import priors

  class Two:
    num_replicas_in_sync = 2

  def ask(other):
    process, source = tiny.build_diffusion(), data.load("digits")
    prior = priors.fit("colour", digits + (0.001 if other == "prior" else 0.0), process)
    images = source.images ^ 1 if other == "images" else source.images
    images = images[:-1] if other == "count" else images
    model = training.build(tiny, process)
    if other == "weights":
      model.network.variables[0].assign(model.network.variables[0] + 1e-6)
    experiment = tiny.replace(seed=5) if other == "config" else tiny
    source = data.Source("x", images, source.labels)
    workers.check_agreement(Two(), experiment, int(other == "step"), source, prior, model)

  sent = []
  monkeypatch.setattr(workers, "_several_workers", lambda strategy: True)
  monkeypatch.setattr(workers, "_make_total", lambda strategy: lambda v: sent.append(v) or 2 * v)
  ask(part)  # alone, it agrees with itself
  monkeypatch.setattr(workers, "_make_total", lambda strategy: lambda v: v + sent[0])
  if part is None:
    ask(None)
    return
  names = {"images": "data", "count": "images, data"}
  with pytest.raises(ValueError, match=f"differ in their {names.get(part, part)}: this one is"):
    ask(None)


@pytest.mark.parametrize(
  ("changes", "field"),
  [
    ({"training": {"batch_size": 10**9}}, "training.batch_size = 1000000000 takes at least"),
    ({"training": {"batch_size": 10**18}}, "training.batch_size"),
    ({"sampling": {"batch_size": 10**9}}, "sampling.batch_size must be"),
    ({"network": {"nf": 4096, "ch_mult": (64,)}}, "network.nf = 4096 takes at least"),
    (
      {"data": {"image_shape": (8192, 8192, 3)}, "training": {"batch_size": 10**5}},
      "training.batch_size = 100000 takes at least",
    ),
  ],
)
def test_what_cannot_fit_in_memory_is_refused_at_once(tiny, tmp_path, changes, field):
  begin = time.monotonic()
  with pytest.raises(ValueError, match=field):
    training.train(tiny.replace(**changes), tmp_path / "w", progress=False)
  assert time.monotonic() - begin < 5
  assert not (tmp_path / "w").exists()


def test_the_estimate_of_memory(tiny):
  from soft_diffusion_tf import memory

  with pytest.raises(
    ValueError, match=r"takes at least 1\.3 GiB .* there are 0\.9 GiB .*take at most 73,6"
  ):
    memory.check(tiny.replace(training={"batch_size": 100_000}), limit=10**9)
  memory.check(tiny, limit=10**8)
  memory.check(tiny, limit=memory.available())
  wide = tiny.replace(network={"nf": 512})
  with pytest.raises(ValueError, match=r"network\.nf"):
    memory.check(wide, apart=False, limit=2 * 10**8)
  memory.check(wide, apart=True, limit=2 * 10**8)


def test_sigterm_before_the_first_step(tiny, tmp_path, monkeypatch):
  load = data.load

  def slow(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return load(*args)

  monkeypatch.setattr(data, "load", slow)
  with pytest.raises(training.Preempted, match="before the first step"):
    training.train(tiny, tmp_path, progress=False)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_clip_that_decides_for_long_is_said_once():
  said = []
  clipped = watching.Clipped(2.0, said.append)
  record = lambda norm: {"steps": 100, "gradient_norm": norm}
  for norm in (*4 * [300.0], 150.0, *4 * [201.0]):  # 100 times the clip is 200
    clipped.add(record(norm))
  assert not said  # 400 steps, then a rest, then 400 more
  for norm in (250.0, None, 1e6):  # None: not finite
    clipped.add(record(norm))
  assert len(said) == 1
  assert said[0].startswith(
    "warning: for 500 steps the gradient's norm, now 250, has been more than"
  )
  for norm in 9 * [1e3]:
    clipped.add(record(norm))
  assert len(said) == 2  # after a rest, anew


def test_weights_of_a_wide_range_are_said(tiny, tmp_path, capsys):
  """The VE process with a residual: 1/σ² over 0.01 … 50 is 2.5e7; as a score it is silent."""
  ve = tiny.replace(
    corruption=corruptions.Identity(),
    level=schedules.Constant(0.0),
    sigma=schedules.Geometric(0.01, 50.0),
    prior={"kind": "zero"},
    training={"steps": 1, "checkpoint_every": 0},
  )
  training.train(ve, tmp_path / "residual")
  assert "warning: over t the loss weighs what the network gives by 0.0004 to 1e+04" in (
    capsys.readouterr().out
  )
  score = {"prediction": "score", "scale_by_sigma": True}
  training.train(ve.replace(network=score), tmp_path / "score")
  assert "the loss weighs" not in capsys.readouterr().out


def test_a_corruption_that_is_not_linear_goes_from_end_to_end(tiny, tmp_path):
  """Levels by Sinkhorn, training, samples."""
  images = tiny.data.load(progress=False).floats(slice(0, 64))
  path, facts = transport.find(
    corruptions.Gamma(), images, 0.0, 3.0, count=8, nodes=4, method="sinkhorn"
  )
  assert facts["method"] == "sinkhorn"
  assert (path.levels[0], path.levels[-1]) == (0.0, 3.0)
  # Pixels move up and down one axis each, so every image stays with itself: the distance is known.
  gap = images - images**4.0
  straight = np.sqrt(np.mean(np.sum(gap**2, axis=(1, 2, 3))))
  assert path.straight == pytest.approx(straight, rel=0.05)  # of the entropy
  gamma = tiny.replace(
    corruption=corruptions.Gamma(),
    level=schedules.piecewise(path.levels),
    prior={"kind": "subspace"},
  )
  run = training.train(gamma, tmp_path / "w", progress=False)
  assert np.isfinite(run.images(range(4))).all()
  with pytest.raises(ValueError, match=r"'blurred_colour' adds up .* not linear; use 'subsp"):
    training.train(gamma.replace(prior={"kind": "blurred_colour"}), tmp_path / "v", progress=False)
