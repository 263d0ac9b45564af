"""Compiles an experiment's training step and sampler for a TPU, on a machine that has none.

  python tools/tpu_compile_check.py --make_env     # once: jax and libtpu in a folder of their own
  python tools/tpu_compile_check.py --config=configs/cifar10_blur.py --topology=v5e:2x4

The step is the project's own (`SoftDiffusionModel.update`: corruption, network, loss, gradient,
sum over the chips, clip, Adam, averaging), and so is the sampler (`samplers.sample`: prior and
loop, on the averaged weights). TensorFlow lowers them to StableHLO, and libtpu's compiler compiles
that for the topology: what does not compile, or exceeds a chip's memory, fails here and now.
What this proves, and what it does not, stands in docs/tpu.md.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from absl import flags

from soft_diffusion_tf.bin import cli

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # of a program in tools/, which imports another
from tools.lowering import custom_calls, program, stablehlo, with_levels  # noqa: E402

COMPILER = pathlib.Path(__file__).with_name("tpu_compiler.py")
# The compiler is called through functions that jaxlib does not promise to keep.
PINS = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.52", "numpy==2.4.6")
NAMES = {"train": "training step", "sample": "sampler"}

if __name__ == "__main__":  # tests import this file, and a flag can be defined but once
  _CONFIG = cli.define_config()
  _TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:2x2", "TPU and its shape, such as v5e:2x4 or v3:2x2."
  )
  _BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "Global batch; by default the config's (training.batch_size, sampling.batch_size).",
    1,
  )
  _REPLICAS = flags.DEFINE_integer(
    "replicas", None, "Chips that share the batch; by default all of the topology.", 1
  )
  _DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["float32", "bfloat16"],
    "The network's precision; weights, σ and loss are float32.",
  )
  _WHAT = flags.DEFINE_enum("what", "both", ["train", "sample", "both"], "What to compile.")
  _JSON = cli.define_path("json", None, "File to add the records to, one line of JSON each.")
  _TABLE = cli.define_path("table", None, "Only print such a file's records as a table.")
  _ENV = cli.define_path("env", str(ROOT / ".tpu_env"), "The folder with jax and libtpu.")
  _MAKE_ENV = flags.DEFINE_bool("make_env", False, "Make that folder first, by pip (1.1 GB).")


# --- The environment of the compiler --------------------------------------------------------------


def make_env(folder):
  """Makes the compiler's virtual environment; a folder that holds anything else is refused."""
  folder = pathlib.Path(folder)
  if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
    raise ValueError(f"{folder} is there and no virtual environment; give another --env")
  python = folder / "bin" / "python"
  commands = [
    [sys.executable, "-m", "venv", str(folder)],
    [str(python), "-m", "pip", "install", "--quiet", *PINS],
  ]
  for command in commands:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      text = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
      raise ValueError(f"{folder} could not be made ({text[-1]}); mend that and run it again")
  # Written last: what was interrupted before this line does not pass for an environment.
  (folder / "pins.txt").write_text("\n".join(PINS) + "\n", encoding="utf-8")


def env_python(folder):
  """The environment's Python; a ValueError names the flag that makes it."""
  pins = pathlib.Path(folder) / "pins.txt"
  if not pins.is_file():
    raise ValueError(f"{folder} holds no jax and libtpu yet; run with --make_env to install them")
  if pins.read_text(encoding="utf-8").split() != list(PINS):
    raise ValueError(
      f"{folder} was made for other versions than {', '.join(PINS)}; delete it and run with "
      "--make_env"
    )
  return str(pathlib.Path(folder) / "bin" / "python")


def _ask(python, *arguments):
  """What tpu_compiler.py answers."""
  command = [python, str(COMPILER), *map(str, arguments)]
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  try:
    return json.loads(done.stdout.strip().splitlines()[-1])
  except (IndexError, json.JSONDecodeError):
    text = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise ValueError(
      f"the compiler stopped without an answer ({text[-1]}); if the machine ran out of memory, "
      "close other programs"
    ) from None


# --- Reports --------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


def hbm(refusal):
  """(needed, available) bytes that an out-of-memory message of the compiler names, or None."""
  if "RESOURCE_EXHAUSTED" not in refusal:
    return None
  number = r"([\d.]+)([KMGTP]?)"
  for pattern in (
    rf"\({number}\) exceeds available HBM \({number}\)",
    rf"Used {number} of {number} hbm",
  ):
    found = re.search(pattern, refusal)
    if found:
      needed, unit, available, available_unit = found.groups()
      return float(needed) * _UNITS[unit], float(available) * _UNITS[available_unit]
  return None


def all_reduces(text):
  """How many all-reduces a text holds, StableHLO or HLO (which may split one: start and done)."""
  return len(re.findall(r"stablehlo\.all_reduce\"|\ball-reduce(?:-start)?\(", text))


def size(count):
  """Bytes as text."""
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def report(record):
  """The record of one compilation as lines of text."""
  chips = record["replicas"]
  batch = f"batch {record['batch']}"
  if chips > 1:
    batch += f" = {chips} × {record['batch'] // chips}"
  lines = [
    f"{record['config']}: {NAMES[record['what']]}, {record['dtype']}, {batch}, on {chips} of "
    f"{record['topology']} ({record['kind']}), {record['parameters'] / 1e6:.1f} M parameters",
    f"  lowered in {record['lower_seconds']:.0f} s; "
    f"{'refused' if 'error' in record else 'compiled'} in {record['compile_seconds']:.0f} s by "
    f"libtpu {record['versions']['libtpu']}",
  ]
  if "peak_bytes" not in record:
    return "\n".join(lines)
  share = record["peak_bytes"] / record["limit_bytes"]
  lines += [
    f"  peak {size(record['peak_bytes'])} of {size(record['limit_bytes'])} per chip ({share:.1%}): "
    f"arguments {size(record['argument_bytes'])}, temporaries {size(record['temporary_bytes'])}; "
    f"of {size(record['output_bytes'])} returned, {size(record['alias_bytes'])} are in place",
    f"  {record['flops'] / 1e12:.3g} TFLOP per step and chip; "
    f"all-reduces: {record['all_reduces_lowered']}, {record['all_reduces']} as compiled",
  ]
  return "\n".join(lines)


def refusal(record):
  """One line on why a program was refused, with the remedy."""
  name = f"the {NAMES[record['what']]} of {record['config']}"
  sizes = hbm(record["error"])
  if sizes is None:
    text = " ".join(record["error"].split())[:400]
    return f"{name} does not compile for {record['topology']}: {text}"
  needed, available = sizes
  remedy = "take a smaller --batch or more --replicas"
  if record["what"] == "train" and not record["remat"]:
    remedy += ", or --config.network.remat=True"
  return (
    f"{name} does not fit: {size(needed)} needed of the {size(available)} that a chip of "
    f"{record['topology']} has; {remedy}"
  )


def table(records):
  """Records as the rows of a Markdown table."""
  lines = [
    "| config | program | precision | topology | chips × images | peak HBM per chip | share | "
    "arguments + temporaries | TFLOP | all-reduces: lowered / compiled | compiled in |",
    "|---" * 11 + "|",
  ]
  for r in records:
    if "error" in r:
      sizes = hbm(r["error"])
      memory = "does not compile" if sizes is None else f"refused: {size(sizes[0])}"
      measured = (memory, "", "", "", f"{r['all_reduces_lowered']}")
    else:
      measured = (
        f"{size(r['peak_bytes'])} of {size(r['limit_bytes'])}",
        f"{r['peak_bytes'] / r['limit_bytes']:.1%}",
        f"{size(r['argument_bytes'])} + {size(r['temporary_bytes'])}",
        f"{r['flops'] / 1e12:.3g}",
        f"{r['all_reduces_lowered']} / {r['all_reduces']}",
      )
    remat = ", remat" if r["remat"] else ""
    chips = f"{r['replicas']} × {r['batch'] // r['replicas']}"
    cells = (
      f"`{r['config']}`",
      NAMES[r["what"]] + remat,
      r["dtype"],
      r["topology"],
      chips,
      *measured,
      f"{r['compile_seconds']:.0f} s",
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


# --- The program ----------------------------------------------------------------------------------


def check(experiment, what, batch, topology, replicas, dtype, python, device):
  """Lowers and compiles one program; returns its record, with "error" if it was refused."""
  start = time.monotonic()
  function, arguments, model = program(experiment, what, batch // replicas, replicas, dtype)
  text = stablehlo(function, arguments)
  record = {
    "config": experiment.name,
    "what": what,
    "dtype": dtype,
    "batch": batch,
    "replicas": replicas,
    "remat": experiment.network.remat,
    "topology": topology,
    "kind": device["kind"],
    "limit_bytes": device["limit_bytes"],
    "parameters": sum(math.prod(v.shape) for v in model.network.trainable_variables),
    "versions": device["versions"],
    "lower_seconds": time.monotonic() - start,
    "all_reduces_lowered": all_reduces(text),
    "custom_calls": custom_calls(text),
  }
  with tempfile.TemporaryDirectory() as folder:
    module = pathlib.Path(folder) / "module.mlir"
    module.write_text(text, encoding="utf-8")
    answer = _ask(python, topology, module, replicas)
  record["all_reduces"] = all_reduces(answer.pop("hlo", ""))
  return record | answer


def main():
  import tensorflow as tf

  if _TABLE.value:
    lines = pathlib.Path(_TABLE.value).read_text(encoding="utf-8").splitlines()
    print(table(map(json.loads, lines)))
    return
  if _MAKE_ENV.value:
    make_env(_ENV.value)
    print(f"{', '.join(PINS)} in {_ENV.value}")
    if _CONFIG.value is None:
      return
  if _CONFIG.value is None:
    raise ValueError("give --config=FILE, such as configs/cifar10_blur.py")
  experiment, stand_in = with_levels(cli.experiment_of(_CONFIG.value))
  experiment.check_network()
  python = env_python(_ENV.value)
  device = _ask(python, _TOPOLOGY.value)
  if "error" in device:
    text = " ".join(device["error"].split())
    if "INVALID_ARGUMENT" in text:
      text += "; there are v5e:2x2, v5e:2x4, v3:2x2, v4:2x2x1, v6e:2x2, ..."
    raise ValueError(f"--topology={_TOPOLOGY.value}: {text}")
  sizes = hbm(device["refusal"])
  if sizes is None:
    raise ValueError(
      f"the compiler does not say how much memory a chip has: {device['refusal'][:200]!r}"
    )
  device["limit_bytes"] = sizes[1]
  device["versions"]["tensorflow"] = tf.__version__
  replicas = device["devices"] if _REPLICAS.value is None else _REPLICAS.value
  if not 1 <= replicas <= device["devices"]:
    raise ValueError(
      f"--replicas={replicas}: {_TOPOLOGY.value} has {device['devices']} chips (or cores)"
    )
  if stand_in:
    print("the levels are not found yet: 32 stand-ins, whose values do not matter for compiling")
  refused = []
  for what in ("train", "sample") if _WHAT.value == "both" else (_WHAT.value,):
    group = experiment.training if what == "train" else experiment.sampling
    batch = group.batch_size if _BATCH.value is None else _BATCH.value
    if batch < 1 or batch % replicas:
      raise ValueError(
        f"a batch of {batch} cannot be shared by {replicas} chips; "
        f"give a --batch that is a multiple of {replicas}"
      )
    record = check(experiment, what, batch, _TOPOLOGY.value, replicas, _DTYPE.value, python, device)
    print(report(record))
    line = json.dumps(record)
    if _JSON.value:
      with open(_JSON.value, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)
    if "error" in record:
      refused.append(refusal(record))
  if refused:
    raise ValueError("; ".join(refused))


if __name__ == "__main__":
  cli.run(main)
