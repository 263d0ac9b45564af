"""What a start costs, in CPU seconds of fresh processes: help, a mistake, an import, an image.

  python tools/benchmark.py start
  python tools/benchmark.py start --peer=../other_checkout --repeats=5

Medians, each of processes of their own that take turns, also with those of another checkout. A
first sample is `from_pretrained("digits").images([0])` with all its imports; its parts are printed
below it. CPU seconds of other versions are comparable within one run alone.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
MODULE = ("-m", "soft_diffusion_tf.bin.sample")
_IMAGE = """
import time
def lap(name, since=[0.0]):
  now = time.process_time()
  print(f"{name}={now - since[0]}")
  since[0] = now
import soft_diffusion_tf
import tensorflow
lap("TensorFlow")
from soft_diffusion_tf import export
lap("the package")
run = export.from_pretrained("digits")
lap("opening the model")
run.images([0])
lap("the first image, traced")
run.images([1])
lap("the next image (not in the sum)")
"""
STARTS = {
  "--help": (*MODULE, "--help"),
  "a flag that does not exist": (*MODULE, "--no_such_flag"),
  "a mistake in --seeds": (*MODULE, "--workdir=none", "--out=none.png", "--seeds=9-3"),
  "import soft_diffusion_tf": ("-c", "import soft_diffusion_tf"),
}


def processor():
  """The processor's name."""
  lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def spent(root, arguments):
  """CPU seconds of a process of a checkout, and what it printed."""
  environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "-1"}
  with subprocess.Popen(
    [sys.executable, *arguments],
    cwd=root,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  ) as process:
    text = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
  return usage.ru_utime + usage.ru_stime, text


def _first_sample(root):
  """{part: CPU seconds} of a first sample."""
  _, text = spent(root, ("-c", _IMAGE))
  return {name: float(value) for name, value in (x.split("=") for x in text.splitlines())}


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--peer", help="another checkout to take turns with")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args(argv)
  roots = [pathlib.Path(p).resolve() for p in (args.peer, ROOT) if p]
  print(f"{processor()}, {os.cpu_count()} processors; CPU seconds, medians of {args.repeats}")
  print(f"{'':34}" + "".join(f"{root.name:>16}" for root in roots))
  for name, arguments in STARTS.items():
    rows = [[spent(root, arguments)[0] for root in roots] for _ in range(args.repeats)]
    print(f"{name:34}" + "".join(f"{statistics.median(c):16.2f}" for c in zip(*rows)), flush=True)
  rows = [[_first_sample(root) for root in roots] for _ in range(args.repeats)]
  last = list(rows[0][0])[-1]
  total = lambda parts: sum(value for name, value in parts.items() if name != last)
  columns = list(zip(*rows))
  print(
    f"{'the first sample':34}"
    + "".join(f"{statistics.median(map(total, c)):16.2f}" for c in columns)
  )
  for part in rows[0][0]:
    values = [statistics.median(parts[part] for parts in c) for c in columns]
    print(f"  {part:32}" + "".join(f"{value:16.2f}" for value in values))
  return 0
