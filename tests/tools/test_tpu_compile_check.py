"""The TPU compile check: what it lowers, how it reads the compiler, how it refuses."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import experiment, schedules, training
from tools import tpu_compile_check as check

ROOT = pathlib.Path(__file__).parents[2]
ENV = pathlib.Path(os.environ.get("TPU_ENV", ROOT / ".tpu_env"))
TINY = (
  "--config=configs/digits_blur.py",
  "--config.network.nf=8",
  "--config.network.ch_mult=(1,)",
  "--config.network.num_res_blocks=1",
  "--config.network.attn_resolutions=()",
)

# As libtpu 0.0.52 and 0.0.24 word them.
REFUSALS = {
  "new": "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
  "required for HLO temporaries (2.00P) exceeds available HBM (15.75G). HLO module: main.\nSee ...",
  "old": "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
  "hbm. Used 86.60G of 15.75G hbm. Exceeded hbm capacity by 70.85G.",
}

RECORD = {
  "config": "cifar10_blur",
  "what": "train",
  "dtype": "bfloat16",
  "batch": 128,
  "replicas": 8,
  "remat": False,
  "topology": "v5e:2x4",
  "kind": "TPU v5 lite",
  "limit_bytes": 16 * 2**30,
  "parameters": 62_700_000,
  "versions": {"libtpu": "0.0.52"},
  "lower_seconds": 60.2,
  "compile_seconds": 300.0,
  "all_reduces_lowered": 404,
  "all_reduces": 2,
  "peak_bytes": 4 * 2**30,
  "argument_bytes": 2**30,
  "output_bytes": 2**30,
  "alias_bytes": 2**29,
  "code_bytes": 0,
  "temporary_bytes": 3 * 2**30,
  "flops": 2.5e12,
}


def program(*flags):
  return subprocess.run(
    [sys.executable, "tools/tpu_compile_check.py", *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
  )


def error_of(result):
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  return line


@pytest.fixture
def stand_in_env(tmp_path):
  """An environment whose Python gives prepared answers: on the topology, then on the module."""

  def make(description, *answers):
    (tmp_path / "bin").mkdir()
    (tmp_path / "pins.txt").write_text("\n".join(check.PINS))
    (tmp_path / "answers.json").write_text(json.dumps([description, *answers]))
    python = tmp_path / "bin" / "python"
    python.write_text(
      f"#!{sys.executable}\n"
      "import json, pathlib, shutil, sys\n"
      "here = pathlib.Path(__file__).parents[1]\n"
      "answers = json.loads((here / 'answers.json').read_text())\n"
      "(here / 'answers.json').write_text(json.dumps(answers[1:]))\n"
      "if len(sys.argv) > 3: shutil.copy(sys.argv[3], here / 'module.mlir')\n"
      "print(json.dumps(answers[0]))\n"
    )
    python.chmod(0o755)
    return tmp_path

  return make


def description(devices=4):
  return {
    "devices": devices,
    "kind": "TPU v5 lite",
    "versions": {"libtpu": "0.0.52"},
    "refusal": REFUSALS["new"],
  }


# --- Lowering -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
  e = experiment.from_file(ROOT / "configs" / "digits_blur.py")
  return e.replace(
    network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
    sampling={"steps": 7},
  )


def test_the_training_step_of_four_chips(small):
  function, arguments, model = check.program(small, "train", batch=6, replicas=4, dtype="bfloat16")
  text = check.stablehlo(function, arguments)
  trainable = model.network.trainable_variables
  # Every gradient is summed, over all four, and nothing else is.
  assert check.all_reduces(text) == len(trainable)
  groups = re.findall(r"replica_groups = dense<(.*?)> : tensor<1x4xi64>", text)
  assert groups == ["[[0, 1, 2, 3]]"] * len(trainable)
  assert "stablehlo.replica_id" in text  # rows of the global batch: noise of their own
  assert check.custom_calls(text) == []
  assert "mhlo.copy" not in text
  # Convolutions in bfloat16; weights and their update in float32.
  assert "bf16" in re.findall(r"stablehlo\.convolution.*-> tensor<[\dx]*(\w+)>", text)
  for shape in {tuple(v.shape) for v in trainable}:
    assert f"tensor<{'x'.join(map(str, shape))}xf32>" in text
  # Network, average and both slots of Adam take the place of what was given.
  assert text.count("may_alias") >= 4 * len(trainable)


def test_the_sampler(small):
  text = check.stablehlo(*check.program(small, "sample", batch=5)[:2])
  assert "tensor<7x6xf32>" in text  # the table is an argument, with a row for every step
  assert "stablehlo.while" in text
  assert "tensor<5x8x8x1xf32>" in text
  assert "bf16" not in text
  assert check.all_reduces(text) == 0
  assert check.custom_calls(text) == []


def test_levels_not_found_get_a_stand_in():
  e = experiment.from_file(ROOT / "configs" / "celeba64_mask.py")
  if not isinstance(e.level.inner, schedules.Unfound):
    e = e.replace(level=schedules.Staged(schedules.Unfound(0.0, 1.0, "x.json"), 0.2, 1.0))
  filled, stand_in = check.with_levels(e)
  assert stand_in
  assert schedules.ends(filled.level) == (0.0, 1.0)
  filled.build_diffusion()  # whose checks ask for values
  same, stand_in = check.with_levels(filled)
  assert same == filled
  assert not stand_in


# --- Reading the compiler -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "want"),
  [
    (REFUSALS["new"], (2 * 2**50, 15.75 * 2**30)),
    (REFUSALS["old"], (86.6 * 2**30, 15.75 * 2**30)),
    ("INVALID_ARGUMENT: Used 86.60G of 15.75G hbm", None),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
  ],
)
def test_out_of_memory_messages(text, want):
  assert check.hbm(text) == (want and pytest.approx(want))


def test_all_reduces_are_counted_once():
  hlo = """
    %ar = (f32[8]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add
    %start = f32[8]{0} all-reduce-start(%a), to_apply=%add
    %done = f32[8]{0} all-reduce-done(%start)
    %fusion = f32[8]{0} fusion(%ar), calls=%all-reduce-scatter.1
  """
  assert check.all_reduces(hlo) == 2


def test_the_report():
  lines = check.report(RECORD).splitlines()
  assert "cifar10_blur: training step, bfloat16, batch 128 = 8 × 16" in lines[0]
  assert "62.7 M parameters" in lines[0]
  assert "compiled in 300 s by libtpu 0.0.52" in lines[1]
  assert "peak 4.00 GiB of 16.00 GiB per chip (25.0%)" in lines[2]
  assert "2.5 TFLOP per step" in lines[3]
  assert "all-reduces: 404, 2 as compiled" in lines[3]


@pytest.mark.parametrize("remat", [False, True])
def test_a_refusal_names_sizes_and_remedy(remat):
  text = check.refusal(RECORD | {"error": REFUSALS["old"], "remat": remat})
  assert "does not fit: 86.60 GiB needed of the 15.75 GiB" in text
  assert "--batch" in text
  assert ("remat" in text) is not remat


def test_the_table():
  refused = RECORD | {"error": REFUSALS["old"], "batch": 4096, "replicas": 1}
  lines = check.table([RECORD, refused]).splitlines()
  assert len({line.count("|") for line in lines}) == 1
  assert (
    "| 8 × 16 | 4.00 GiB of 16.00 GiB | 25.0% | 1.00 GiB + 3.00 GiB | 2.5 | 404 / 2 | 300 s |"
    in lines[2]
  )
  assert "| 1 × 4096 | refused: 86.60 GiB |" in lines[3]


def test_another_fault_is_passed_on():
  text = check.refusal(RECORD | {"error": "UNIMPLEMENTED: no\nsuch op"})
  assert text.endswith("does not compile for v5e:2x4: UNIMPLEMENTED: no such op")


# --- The program ----------------------------------------------------------------------------------


def test_without_the_environment_the_flag_is_named(tmp_path):
  line = error_of(program(*TINY, f"--env={tmp_path}"))
  assert "--make_env" in line
  assert str(tmp_path) in line


def test_an_environment_of_other_versions_is_refused(tmp_path):
  (tmp_path / "pins.txt").write_text("jax==0.1\n")
  with pytest.raises(ValueError, match=r"made for other versions.*libtpu==.*--make_env"):
    check.env_python(tmp_path)


def test_make_env_leaves_a_foreign_folder_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="no virtual environment; give another --env"):
    check.make_env(tmp_path)
  assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_installation_does_not_pass_for_an_environment(tmp_path, monkeypatch):
  monkeypatch.setattr(check, "PINS", (str(tmp_path / "no_such_package.whl"),))
  with pytest.raises(ValueError, match="could not be made"):
    check.make_env(tmp_path / "env")
  with pytest.raises(ValueError, match="--make_env"):
    check.env_python(tmp_path / "env")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--batch=10"], "a batch of 10 cannot be shared by 4 chips"),
    (["--replicas=5"], "--replicas=5: v5e:2x2 has 4 chips"),
  ],
  ids=["batch", "replicas"],
)
def test_arguments_that_do_not_fit_together(stand_in_env, flags, message):
  env = stand_in_env(description())
  assert message in error_of(program(*TINY, f"--env={env}", *flags))


def test_an_unknown_topology(stand_in_env):
  env = stand_in_env({"error": "INVALID_ARGUMENT: Invalid TPU external name: TPU v9"})
  line = error_of(program(*TINY, f"--env={env}", "--topology=v9:2x2"))
  assert "--topology=v9:2x2: INVALID_ARGUMENT: Invalid TPU external name" in line
  assert "v5e:2x4" in line


def test_what_does_not_fit_ends_with_one_line(stand_in_env, tmp_path):
  env = stand_in_env(description(), {"error": REFUSALS["old"], "compile_seconds": 1.0})
  records = tmp_path / "records.jsonl"
  flags = ("--what=sample", "--batch=8", f"--json={records}", f"--env={env}")
  result = program(*TINY, *flags)
  assert "the sampler of digits_blur does not fit: 86.60 GiB needed" in error_of(result)
  record = json.loads(records.read_text())
  assert record == json.loads(result.stdout.splitlines()[-1])
  assert record["error"] == REFUSALS["old"]
  assert (record["batch"], record["replicas"]) == (8, 4)
  assert "tensor<2x8x8x1xf32>" in (env / "module.mlir").read_text()


# --- With the environment -------------------------------------------------------------------------


@pytest.fixture
def python():
  try:
    return check.env_python(ENV)
  except ValueError as error:
    pytest.skip(f"{error} (or set TPU_ENV to a folder that --make_env made)")


# Runs a module by XLA for CPU: the first argument split over the devices, the others on each.
RUN = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir

jax.config.update("jax_enable_x64", True)
module, given, out = sys.argv[1:]
devices = jax.devices("cpu")
options = xla_client.CompileOptions()
options.num_replicas, options.num_partitions = len(devices), 1
with mlir.make_ir_context():
  executable = devices[0].client.compile_and_load(
    ir.Module.parse(open(module).read()),
    executable_devices=xla_client.DeviceList(tuple(devices)), compile_options=options,
  )
mesh = Mesh(np.array(devices), ("replica",))
given = np.load(given)
arguments = [
  jax.device_put(given[name], NamedSharding(mesh, PartitionSpec(*["replica"][:name == "0"])))
  for name in sorted(given.files, key=int)
]
results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
np.savez(out, **{str(k): np.stack(result) for k, result in enumerate(results)})
"""


def run_on_cpu(python, folder, model, function, specs, arguments, devices):
  """Outputs [devices, ...] of a lowered function, and the variables with their new values."""
  text = check.stablehlo(function, specs)
  concrete = function.get_concrete_function(*specs)
  keras_variables = [*model.network.variables, *model.ema_network.variables]
  keras_variables += model.optimizer.variables
  # The graph's own list lacks those that only a fused operation's handle names.
  variables = {id(v.value.handle): v.value for v in keras_variables}
  variables |= {id(v.handle): v for v in concrete.graph.variables}
  given = [*arguments, *(variables[id(h)].numpy() for h in concrete.captured_inputs)]
  (folder / "module.mlir").write_text(text)
  np.savez(folder / "given.npz", **{str(k): v for k, v in enumerate(given)})
  flag = f"--xla_force_host_platform_device_count={devices}"
  subprocess.run(
    [python, "-c", RUN, *(folder / name for name in ("module.mlir", "given.npz", "out.npz"))],
    check=True,
    env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
  )
  with np.load(folder / "out.npz") as file:
    out = dict(file)
  aliases = re.findall(r"parameter_number = (\d+) : i64\}, output_index = array<i64: (\d+)>", text)
  updated = [
    (variables[id(concrete.captured_inputs[int(given) - len(arguments)])], out[output])
    for given, output in aliases
  ]
  return out, updated


@pytest.mark.slow
def test_the_program_of_two_chips_is_the_step_of_one(python, small, digits, tmp_path):
  """The StableHLO, run on two CPU devices, against TensorFlow's own step at the whole batch."""
  small = small.replace(training={"warmup_steps": 0}, network={"dropout": 0.1})
  function, specs, model = check.program(small, "train", batch=6, replicas=2)
  x_0 = digits[:12]
  out, updated = run_on_cpu(python, tmp_path, model, function, specs, [x_0], devices=2)
  before = [v.numpy() for v in model.network.trainable_variables]
  want = model.update(tf.constant(x_0))
  assert want["gradient_norm"] > model.training_options.clip_norm  # so the clip is at work
  # Results in the order of their names; rounding alone may differ.
  np.testing.assert_allclose(out["0"], np.full(2, want["gradient_norm"]), rtol=1e-5)
  np.testing.assert_allclose(out["1"].sum(), want["loss"], rtol=1e-5)
  np.testing.assert_allclose(np.concatenate(out["2"]), want["losses"], rtol=1e-5)
  np.testing.assert_allclose(np.concatenate(out["3"]), want["t"], atol=1e-7)
  assert len(updated) == 4 * len(before) + 1
  for variable, (one, other) in updated:
    np.testing.assert_array_equal(one, other)
    # Adam's first step is the learning rate, 2e-3, in size.
    np.testing.assert_allclose(one, variable, rtol=1e-5, atol=1e-6, err_msg=variable.name)
  moved = [np.abs(v - old).max() for v, old in zip(model.network.trainable_variables, before)]
  assert max(moved) > 1e-3


@pytest.mark.slow
def test_the_samplers_program_gives_the_samples(python, small, tmp_path):
  function, specs, model = check.program(small, "sample", batch=4)
  run = training.Run(small, model, 0)
  seeds = np.arange(4)
  draw = np.random.default_rng(0)
  for weight in model.ema_network.variables:  # a fresh network gives almost zero
    weight.assign(weight + 0.02 * draw.normal(size=weight.shape))
  plan = run.plan().numpy()
  out, _ = run_on_cpu(python, tmp_path, model, function, specs, [plan, seeds], devices=1)
  want = run.sampler()(plan, seeds).numpy()
  assert want.std() > 0.05
  # Seven steps of float32 in another order of operations.
  np.testing.assert_allclose(out["0"][0], want, atol=1e-4)


@pytest.mark.slow
def test_libtpu_compiles_and_refuses(python, tmp_path):
  records = tmp_path / "records.jsonl"
  flags = (f"--env={ENV}", f"--json={records}", "--topology=v5e:2x2")
  result = program(*TINY, *flags)
  assert result.returncode == 0, result.stderr
  line = error_of(program(*TINY, *flags, "--what=train", f"--batch={2**23}", "--replicas=1"))
  assert re.search(r"does not fit: [\d.]+ GiB needed of the 15\.75 GiB", line)
  step, sampler, refused = map(json.loads, records.read_text().splitlines())
  assert step["all_reduces_lowered"] > step["all_reduces"] > 0
  assert 0 < step["peak_bytes"] < step["limit_bytes"]
  # All but the returned losses takes the place of what it replaces.
  assert step["alias_bytes"] > 0.9 * step["output_bytes"]
  assert sampler["all_reduces"] == 0
  assert "error" in refused
