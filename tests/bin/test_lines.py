"""Whatever a flag or a config field is given, a program succeeds or ends with exactly one line.

Every program, every flag and every field of its config, each with values of all kinds. The programs
run as processes of their own (`tests.forks`); a few of them from the start, TensorFlow and all.
"""

import pathlib
import random
import re
import tempfile

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import experiment
from tests import forks, standin

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "digits_blur.py"
TINY = (
  f"--config={CONFIG}",
  "--config.network.nf=8",
  "--config.network.ch_mult=(1,)",
  "--config.network.num_res_blocks=1",
  "--config.network.attn_resolutions=()",
  "--config.training.batch_size=16",
  "--config.training.steps=2",
  "--config.training.sample_every=0",
  "--config.evaluation.samples=20",
)
LIMIT = 300.0  # seconds; generous, since a machine of two busy cores is not to fail it
# What TensorFlow logs in a fork, where it is loaded already; the programs keep it to themselves.
LOG = re.compile(r"[IWE]\d{4} \d\d:|WARNING: All log messages before|\s*$")

# Program → its flags for a short run; {name} stands for one of the `place`'s paths, and {new} for a
# path where nothing is. A program in MISTAKEN has no short run: its flags are one mistake already.
BIN = "soft_diffusion_tf.bin."
PROGRAMS = {
  f"{BIN}train": (*TINY, "--workdir={run}"),
  f"{BIN}sample": ("--workdir={run}", "--out={new}.png", "--seeds=0-1", "--steps=1"),
  f"{BIN}evaluate": ("--workdir={run}", "--samples=8", "--steps=1"),
  f"{BIN}export": ("--workdir={run}", "--out={new}.npz"),
  f"{BIN}restore": (
    "--workdir={run}",
    "--images={images}",
    "--out={new}",
    "--t=0.5",
    "--samples=1",
    "--steps=1",
  ),
  f"{BIN}serve": ("--model={model}", "--port=0"),
  f"{BIN}schedule": (
    *TINY,
    "--out={new}.json",
    "--slice=0.02",
    "--levels=8",
    "--nodes=3",
    "--plot=none",
  ),
  f"{BIN}lab": (
    "--out={new}",
    "--images=10",
    "--count=20",
    "--nfe=2",
    "--samplers=naive",
    "--schedule=linear",
  ),
  f"{BIN}data": (*TINY, "check", "digits"),
  f"{BIN}reference_stats": (*TINY, "--out={new}.npz", "--samples=20", "--feature_net=pixels"),
  "tools/figures.py": ("--workdir={run}", "--out={new}", "--figures=8"),
  "tools/study.py": ("--out={new}", "--report"),
  "tools/quickstart.py": ("--workdir={images}", "--fresh", *TINY, "--config.training.keep=-1"),
  f"{BIN}import_score_sde": ("--checkpoint={broken}.npz", "--out={new}"),
  "tools/measure_restoration.py": ("--workdir={run}", "--out={images}"),
  "tools/tpu_compile_check.py": (*TINY, "--env={images}"),
}
MISTAKEN = {
  "tools/study.py",
  "tools/quickstart.py",
  f"{BIN}import_score_sde",
  "tools/measure_restoration.py",
  "tools/tpu_compile_check.py",
}
VALUES = (
  "",
  "0",
  "-1",
  "1",
  "nan",
  "inf",
  "1e1",
  "None",
  "1" + 20 * "0",
  "(1,)",
  "word",
  "no/such",
  "naïve ß漢",
  "a\nb",
  "{images}",
  "{broken}",
  "~",
  "/proc/nothing/here",
  "x" * 300,
)


def flags_of(program):
  """The flags of a program, from the help that it prints."""
  path = program.replace(".", "/") + ".py" if program.startswith(BIN) else program
  text = (ROOT / path).read_text(encoding="utf-8")
  return re.findall(r'(?:DEFINE_\w+|define_paths?)\(\s*"(\w+)"', text)


FLAGS = [(program, flag) for program in PROGRAMS for flag in flags_of(program)]
FIELDS = sorted(experiment.from_file(CONFIG).flat())


def cases(count, seed):
  """(program, flag, value): so many, of which as many as can be differ in program and flag."""
  draw = random.Random(seed)
  pairs = [*FLAGS, *((f"{BIN}train", f"config.{field}") for field in FIELDS)]
  every = [[(*pair, value) for value in draw.sample(VALUES, len(VALUES))] for pair in pairs]
  draw.shuffle(every)
  turns = [case for turn in zip(*every) for case in turn]
  return turns[:count]


@pytest.fixture(scope="module")
def fork():
  return forks.shared()


@pytest.fixture(scope="module")
def place(tmp_path_factory, fork, digits):
  """Paths by name: a run, images, a SavedModel, a file that holds nonsense."""
  folder = tmp_path_factory.mktemp("place")
  names = {name: folder / name for name in ("run", "images", "model", "broken")}
  names["images"].mkdir()
  for k in range(12):
    Image.fromarray(np.uint8(255 * digits[k, :, :, 0])).save(names["images"] / f"{k}.png")
  for suffix in ("", ".npz"):
    pathlib.Path(f"{names['broken']}{suffix}").write_bytes(bytes(range(256)))
  standin.StandIn().export(names["model"])
  result = fork.run(f"{BIN}train", *TINY, f"--workdir={names['run']}", limit=2 * LIMIT)
  assert result.returncode == 0, result.stderr
  return names


def state(place):
  """What is in the place: a change of anything that is there is a change of this."""
  folder = place["run"].parent
  return {
    f: (f.stat().st_size, f.stat().st_mtime_ns)
    for f in folder.rglob("*")
    if f.is_file() and f.name != ".lock"
  }


def check(fork, place, tmp_path, program, flag, value):
  """Runs a program with a flag of this value, its others as in PROGRAMS; returns its exit code."""
  elsewhere = pathlib.Path(tempfile.mkdtemp(dir=tmp_path))  # where a relative path leads
  names = {**place, "new": elsewhere / "new"}
  fill = lambda text: re.sub(r"\{(\w+)\}", lambda m: str(names[m[1]]), text)
  given = [fill(f) for f in PROGRAMS[program] if not f.startswith(f"--{flag}=")]
  before = state(place)
  until = "serving" if program.endswith("serve") else None
  result = fork.run(
    program, *given, f"--{flag}={fill(value)}", limit=LIMIT, until=until, folder=elsewhere
  )
  said = [line for line in result.stderr.splitlines() if not LOG.match(line)]
  told = f"{program} --{flag}={value!r}: code {result.returncode} in {result.seconds:.0f} s, {said}"
  assert result.returncode in (0, 2), told
  assert "Traceback" not in result.stdout + result.stderr, told
  if result.returncode == 2:
    assert len(said) == 1, told
    assert said[0].startswith("error: "), told
    after = state(place)
    assert {f: after.get(f) for f in before} == before, told
    assert not names["new"].exists(), told
  return result.returncode


def test_flags_of_every_program_are_found():
  assert {program for program, _ in FLAGS} == PROGRAMS.keys()
  assert (f"{BIN}sample", "seeds") in FLAGS
  assert len(FLAGS) > 120
  assert "training.learning_rate" in FIELDS


def sweep(fork, place, tmp_path, count, seed):
  faults, codes = [], {0: 0, 2: 0}
  for case in cases(count, seed):
    try:
      codes[check(fork, place, tmp_path, *case)] += 1
    except AssertionError as fault:
      faults.append(str(fault).splitlines()[0])
  print(f"{count} tried: {codes[0]} succeeded, {codes[2]} ended with one line")
  assert not faults, "\n".join(faults)
  assert codes[2] > count // 3


def test_a_sample_of_all_flags_and_fields(fork, place, tmp_path):
  sweep(fork, place, tmp_path, 24, 0)


@pytest.mark.slow
def test_every_flag_and_field_with_values_of_all_kinds(fork, place, tmp_path):
  sweep(fork, place, tmp_path, 3 * (len(FLAGS) + len(FIELDS)), 1)
