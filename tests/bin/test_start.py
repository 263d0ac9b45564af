"""A start is quick: help, and every mistake that shows without config or model, in under 1 s.

Processes of their own, from another folder. TensorFlow alone takes several CPU seconds to import.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 1.0  # CPU seconds; 0.3 of them are taken on the slowest machine tried
HEAVY = ("tensorflow", "keras", "tf_keras", "scipy", "sklearn", "matplotlib", "ml_dtypes")
PROGRAMS = dict(
  re.findall(r'"soft-diffusion-([\w-]+)=([\w.]+):run"', (ROOT / "setup.py").read_text())
)
RUN = ("--workdir=w", "--out=x.png")
CONFIG = ("--config=digits_blur", "--workdir=w")
MISTAKES = [
  ("sample", (*RUN, "--seeds=9-3"), "rising range"),
  ("sample", (*RUN, "--shard=x"), "give k/n"),
  ("sample", (*RUN, "--shard=2/3"), "drawn whole"),
  ("sample", (*RUN, "--times=1,x"), "descending numbers"),
  ("sample", (*RUN, "--steps=many"), "give an integer"),
  ("sample", (*RUN, "--k=nan"), "not a finite number"),
  ("sample", (*RUN, "now"), "unexpected argument 'now'"),
  ("sample", ("--workdir=w", "--out=/proc/x.png"), "cannot be written"),
  ("sample", ("--workdir=", "--out=x.png"), "no path is given"),
  ("train", ("--workdir=w",), "give --config="),
  ("train", ("--config=digits_blurr", "--workdir=w"), "did you mean digits_blur?"),
  ("train", ("--config=digits_blur",), "give --workdir="),  # before the config is read
  ("train", ("--config", "digits_blur", "--config.seed", "3"), "give --workdir="),
  ("train", (*CONFIG, "--no_such_flag"), "no_such_flag"),
  ("train", (*CONFIG, "--peer_timeout=soon"), "give a number"),
  ("train", ("--config=digits_blur", "--workdir=/proc/w"), "cannot be written"),
  ("train", ("--config.seed=3", "--workdir=w"), "give --config=FILE before its overrides"),
  ("evaluate", (), "give --workdir=FOLDER"),
  ("evaluate", ("--workdir=w", "--samplers=ddim"), "without --sweep"),
  ("evaluate", ("--workdir=w", "--checkpoint=last"), "give a step or 'best'"),
  ("export", ("--workdir=w", "--out=x.npz", "--samplers=ddim"), "not SAMPLER:STEPS"),
  ("export", ("--workdir=w", "--out=x.npz", "--dtype=bfloat16"), "does not go with"),
  ("ema", ("--workdir=w", "--length=0.1"), "give both"),
  ("ema", ("--workdir=w", "--length=0.1", "--out=x"), "let it end in .npz"),
  ("restore", ("--workdir=w", "--images=i", "--out=o", "--t=0.5", "--level=1"), "give one"),
  ("serve", ("--model=none",), "no such folder"),
  ("serve", ("--model=.", "--timeout=1e5"), "a number up to 86400"),
  ("schedule", ("--config=digits_blur",), "give --out=FILE.json"),
  ("schedule", ("--out=x.json",), "give --config="),
  ("schedule", ("--config=digits_blur", "--out=x.json", "--nfe=3", "--nodes=3"), "leave --nodes=3"),
  ("schedule", ("--config=digits_blur", "--out=x.json", "--slice=2"), "a share of the data"),
  ("reference-stats", ("--config=digits_blur", "--out=x.json"), "the name of a .npz file"),
  ("lab", (), "give --out=DIR"),
  ("lab", ("--out=o", "--nfe=few"), "positive whole numbers"),
  ("data", (), "give a command"),
  ("data", ("chekc", "digits"), "not 'chekc'"),
  ("data", ("check",), "give --config="),
  ("data", ("check", "digits", "--out=x"), "check writes no files; leave --out=x out"),
  ("data", ("pack", "digits", "--out=x"), "give --config="),
  ("data", ("pack", "digits", "--config=digits_blur"), "give --out=FOLDER"),
  ("data", ("pack", "digits", "--config=digits_blur", "--out=/proc/x"), "cannot be written"),
  ("data", ("check", "digits", "now"), "unexpected argument 'now'"),
  ("import", ("--checkpoint=c.pth",), "give --out="),
]


def start(program, flags, folder):
  """(exit code, stdout, the program's own stderr, modules that were imported, CPU seconds)."""
  with subprocess.Popen(
    [sys.executable, "-X", "importtime", "-m", PROGRAMS[program], *flags],
    cwd=folder,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  ) as process:
    said = process.stderr.read()
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  lines = said.splitlines()
  imported = {x.split("|")[2].strip() for x in lines if x.startswith("import time:") and "|" in x}
  own = [x for x in lines if not x.startswith("import time:")]
  return process.returncode, out, own, imported, usage.ru_utime + usage.ru_stime


def check_quick(imported, seconds):
  assert "soft_diffusion_tf.bin.cli" in imported
  loaded = sorted(m for m in imported if m.split(".")[0] in HEAVY)
  assert not loaded, f"imported for nothing: {loaded[:5]}"
  assert seconds < LIMIT


def test_there_are_programs():
  assert {"train", "sample", "evaluate", "export", "serve", "restore", "schedule"} <= set(PROGRAMS)
  assert {p for p, *_ in MISTAKES} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_flag_that_does_not_exist(program, tmp_path):
  code, out, said, *cost = start(program, ("--help",), tmp_path)
  assert (code, said) == (0, [])
  assert f"soft-diffusion-{program}" in out
  check_quick(*cost)
  code, _, said, *cost = start(program, ("--no_such_flag=3",), tmp_path)
  assert code == 2
  assert len(said) == 1, said
  assert "no_such_flag" in said[0]
  check_quick(*cost)


@pytest.mark.parametrize(("program", "flags", "text"), MISTAKES)
def test_a_mistake(program, flags, text, tmp_path):
  code, _, said, *cost = start(program, flags, tmp_path)
  assert code == 2, said
  assert len(said) == 1, said
  assert said[0].startswith("error: ")
  assert text in said[0]
  check_quick(*cost)
  assert not list(tmp_path.iterdir())
