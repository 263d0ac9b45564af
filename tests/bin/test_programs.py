"""The programs as a user starts them: real processes, exit codes, one line of error."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]

TINY = (
  "--config=configs/digits_blur.py",
  "--config.network.nf=8",
  "--config.network.ch_mult=(1,)",
  "--config.network.num_res_blocks=1",
  "--config.network.attn_resolutions=()",
  "--config.training.batch_size=16",
  "--config.training.steps=4",
  "--config.training.sample_every=0",
  "--config.sampling.steps=3",
  "--config.evaluation.samples=80",
)


def program(name, *flags, module=True):
  command = [sys.executable, "-m", f"soft_diffusion_tf.bin.{name}"]
  if not module:
    command = [str(ROOT / name)] if "/" not in name else [sys.executable, str(ROOT / name)]
  return subprocess.run(
    [*command, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )  # fmt: skip


def error_of(result):
  """The one line that a refused program prints."""
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, result.stderr
  return lines[0]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir trained by the program itself, from the command line alone."""
  folder = tmp_path_factory.mktemp("run") / "w"
  result = program("train", *TINY, f"--workdir={folder}")
  assert result.returncode == 0, result.stderr
  assert "trained to step 4" in result.stdout
  assert "next: soft-diffusion-sample" in result.stdout
  return folder


def test_sample_one_picture_and_a_folder(workdir, tmp_path):
  out = tmp_path / "a.png"
  result = program("sample", f"--workdir={workdir}", "--seeds=0-3", f"--out={out}")
  assert result.returncode == 0, result.stderr
  assert np.asarray(Image.open(out)).std() > 1
  folder = tmp_path / "many"
  args = (
    f"--workdir={workdir}",
    "--seeds=5,2",
    f"--out={folder}",
    "--sampler=two_step",
    "--steps=2",
  )
  assert program("sample", *args).returncode == 0
  assert sorted(f.name for f in folder.iterdir()) == [
    "000002.png", "000005.png", "samples.json"
  ]  # fmt: skip
  before = (folder / "000002.png").read_bytes()
  assert "2 were there already" in program("sample", *args).stdout
  assert "differ in" in error_of(program("sample", *args, "--sampler=ddim"))
  assert (folder / "000002.png").read_bytes() == before


def test_evaluate(workdir):
  result = program("evaluate", f"--workdir={workdir}")
  assert result.returncode == 0, result.stderr
  assert "FD[pixels]" in result.stdout
  assert "floor (real against real)" in result.stdout
  assert "FID" not in result.stdout
  assert (workdir / "evaluations.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
@pytest.mark.parametrize("installed", [False, True], ids=["module", "script"])
def test_help_explains_every_flag(name, installed):
  if installed:
    script = pathlib.Path(sys.executable).parent / f"soft-diffusion-{name}"
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
  else:
    result = program(name, "--help")
  assert result.returncode == 0
  assert "--workdir" in result.stdout
  assert "--debug" in result.stdout
  assert ("--config:" in result.stdout) == (name == "train")
  flags = [x for x in result.stdout.splitlines() if x.strip().startswith("--")]
  for flag in flags:
    assert ":" in flag
    assert flag.split(":", 1)[1].strip(), f"{flag} is not explained"


@pytest.mark.parametrize(
  ("flag", "text"),
  [
    ("--config.training.batchsize=3", "did you mean training.batch_size"),
    ("--config.trainig.steps=3", "did you mean training"),
    ("--config.corruption.half=3", "did you mean corruption.half_size"),
    ("--config.training.weight=snr", "training.weight"),
    ("--config.level.inner.start=x", "level"),
    ("--config.corruption.kind=Blur", "did you mean"),
    ("--config.data.name=folder:/no/such", "no such folder"),
    ("--config.data.image_shape=(10,10,1)", "smaller than the 10×10"),
    ("--config.data.image_shape=(9,9,1)", "not divisible by 2"),
  ],
)
def test_bad_fields_end_with_one_line(flag, text, tmp_path):
  folder = tmp_path / "w"
  assert text in error_of(program("train", TINY[0], flag, f"--workdir={folder}"))
  assert not (folder / "config.json").exists()


def test_an_ill_typed_value_names_the_field(tmp_path):
  result = program("train", *TINY, "--config.training.batch_size=many", f"--workdir={tmp_path}/w")
  assert result.returncode != 0
  assert "config.training.batch_size" in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
  ("code", "text"),
  [
    ("import a_module_that_is_not", "ModuleNotFoundError: No module named 'a_module_that_is_not'"),
    ("def get_config(:", "SyntaxError: invalid syntax"),
    ("def get_config():\n  return nothing", "NameError: name 'nothing' is not defined"),
    ("x = 1", "KeyError: 'get_config'"),
    ("assert False", "AssertionError"),  # an error without a text
  ],
)
def test_what_a_config_file_raises_is_one_line(code, text, tmp_path):
  (tmp_path / "mine.py").write_text(code)
  error = error_of(program("train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/w"))
  assert "mine.py" in error
  assert text in error


def test_other_mistakes_on_the_command_line(workdir, tmp_path):
  assert "give --config" in error_of(program("train", f"--workdir={tmp_path}/w"))
  assert "no such config file" in error_of(
    program("train", "--config=none.py", f"--workdir={tmp_path}/w")
  )
  spaced = ("--config", "configs/digits_blur.py", "--config.training.batch_sizee=3")
  assert "did you mean training.batch_size" in error_of(
    program("train", *spaced, f"--workdir={tmp_path}/w")
  )
  assert "at least 2 samples" in error_of(
    program("evaluate", f"--workdir={workdir}", "--samples=0")
  )
  assert "another config" in error_of(
    program("train", *TINY, "--config.seed=3", f"--workdir={workdir}")
  )
  assert "no config.json" in error_of(
    program("sample", f"--workdir={tmp_path}", f"--out={tmp_path}/x.png")
  )
  out = f"--out={tmp_path}/x.png"
  assert "did you mean 'momentum'" in error_of(
    program("sample", f"--workdir={workdir}", out, "--sampler=momentun")
  )
  assert "at least 1 step" in error_of(program("sample", f"--workdir={workdir}", out, "--steps=0"))
  assert "rising range" in error_of(program("sample", f"--workdir={workdir}", out, "--seeds=9-3"))
  assert "2000 images asked for" in error_of(
    program("evaluate", f"--workdir={workdir}", "--samples=2000")
  )
  assert "unexpected argument 'now'" in error_of(
    program("sample", f"--workdir={workdir}", out, "now")
  )


def test_a_picture_is_not_shared(tmp_path):
  flags = ("--workdir=w", f"--out={tmp_path}/x.png", "--shard=2/4")
  assert "one picture is drawn whole; leave --shard=2/4 out" in error_of(program("sample", *flags))


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (("--sinkhorn_epsilon=0.1",), "--method=closed_form has no ε; leave --sinkhorn_epsilon=0.1"),
    (("--method=mse", "--levels=9"), "--method=mse searches no path; leave --levels=9 out"),
    (("--nfe=10", "--nodes=9"), "--nfe says how many levels; leave --nodes=9 out"),
    (("--sigma_levels=9",), "without --joint σ is not chosen; leave --sigma_levels=9 out"),
    (("--joint", "--halves"), "a joint schedule is not sought in halves; leave --halves out"),
    (("--joint", "--noise=none"), "a joint schedule compares noisy images; leave --noise=none out"),
    (("--compare=a.json", "--nodes=9"), "--compare searches nothing; leave"),
  ],
)
def test_flags_that_a_schedule_search_would_ignore_are_refused(flags, text, tmp_path):
  given = () if "--compare=a.json" in flags else (TINY[0], f"--out={tmp_path}/s.json")
  assert text in error_of(program("tools/find_schedule.py", *given, *flags, module=False))
  assert not list(tmp_path.iterdir())


def test_quickstart_deletes_nothing_before_it_is_sure(tmp_path):
  (tmp_path / "precious").write_text("x")
  flags = (f"--workdir={tmp_path}", "--fresh")
  none = program("tools/quickstart.py", *flags, module=False)
  assert "give --config=FILE" in error_of(none)
  other = program("tools/quickstart.py", *flags, TINY[0], module=False)
  assert "is not the workdir of a run; --fresh does not delete it" in error_of(other)
  assert [f.name for f in tmp_path.iterdir()] == ["precious"]


def test_finding_a_schedule(tmp_path):
  out = tmp_path / "s.json"
  flags = (TINY[0], f"--out={out}", "--slice=0.2", "--levels=64", "--nodes=9")
  result = program("tools/find_schedule.py", *flags, module=False)
  assert result.returncode == 0, result.stderr
  assert "9 levels, ε =" in result.stdout
  assert out.exists()
  assert "is there already" in error_of(program("tools/find_schedule.py", *flags, module=False))
  few = program("tools/find_schedule.py", TINY[0], f"--out={tmp_path}/t.json", "--slice=0.0001",
                module=False)  # fmt: skip
  assert "images leaves 0" in error_of(few)
