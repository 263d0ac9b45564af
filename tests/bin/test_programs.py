"""The programs as a user starts them: processes, exit codes, one line of error.

Most of them run as forks (`tests.forks`), those from the start to whom the start matters.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import forks

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
  return forks.shared().run(f"soft_diffusion_tf.bin.{name}" if module else name, *flags, limit=600)


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
  assert sorted(f.name for f in folder.iterdir()) == ["000002.png", "000005.png", "samples.json"]
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
    ("--config.loss.weight=snr", "loss.weight"),
    ("--config.training.weight=snr", "loss.weight"),
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
    ("x = 1", "has no function get_config"),
    ("import sys\nsys.exit('stop')", "ends the program by sys.exit(stop)"),
    ("def get_config():\n  return None", "get_config() gives NoneType, not a ConfigDict"),
    ("open('/no/such/file')", "OSError: [Errno 2] No such file or directory: '/no/such/file'"),
    ("raise ValueError('a good message\\nof two lines')", "mine.py: a good message of two lines"),
    ("\0", "null bytes"),
    ("assert False", "AssertionError"),  # an error without a text
    ("class E(Exception):\n  __str__ = None\nraise E", "mine.py: E; mend"),  # whose text fails
  ],
)
def test_what_a_config_file_raises_is_one_line(code, text, tmp_path):
  (tmp_path / "mine.py").write_text(code)
  error = error_of(program("train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/w"))
  assert "mine.py" in error
  assert text in error


def test_a_fault_of_the_config_names_its_file_and_one_of_an_override_the_field(tmp_path):
  text = (
    "import runpy\n\n"
    f"whole = runpy.run_path({str(ROOT / 'configs' / 'digits_blur.py')!r})['get_config']\n\n"
    "def get_config():\n  config = whole()\n  config.corruption.kind = 'Msk'\n  return config\n"
  )
  (tmp_path / "mine.py").write_text(text)
  flags = (f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/w")
  error = error_of(program("train", *flags))
  assert re.search(r"mine\.py: .*unknown corruption 'Msk'; did you mean", error)
  error = error_of(program("train", *flags, "--config.corruption.kind=Blr"))
  assert "mine.py" not in error
  assert "unknown corruption 'Blr'" in error


def test_the_last_of_several_overrides_of_a_field_holds(tmp_path):
  """Also of a tuple, whose values ml_collections would join: (1, 2) and (0,) to (1, 2, 0)."""
  flags = ("--config.network.ch_mult=(1,2)", "--config.network.ch_mult=(0,)")
  error = error_of(program("train", *TINY, *flags, f"--workdir={tmp_path}/w"))
  assert "network.ch_mult[0] must be from 1" in error


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
  assert "sampling.steps must be from 1 to 1,000,000, got 0" in error_of(
    program("sample", f"--workdir={workdir}", out, "--steps=0")
  )
  assert "rising range" in error_of(program("sample", f"--workdir={workdir}", out, "--seeds=9-3"))
  assert "2000 images asked for" in error_of(
    program("evaluate", f"--workdir={workdir}", "--samples=2000")
  )
  assert "unexpected argument 'now'" in error_of(
    program("sample", f"--workdir={workdir}", out, "now")
  )


def test_a_damaged_schedule_file_is_one_line(tmp_path):
  (tmp_path / "schedules").mkdir()
  for name in ("digits_blur.py", "schedules/digits_blur.json"):
    content = (ROOT / "configs" / name).read_text()
    (tmp_path / name).write_text(content[:700] if name.endswith("json") else content)
  flags = (f"--config={tmp_path}/digits_blur.py", f"--workdir={tmp_path}/w")
  line = error_of(program("train", *flags))
  assert "digits_blur.json: not JSON" in line
  assert "write it again with soft-diffusion-schedule" in line
  assert not (tmp_path / "w").exists()


def test_a_quiet_start(workdir, tmp_path):
  """What is printed is the program's own: no log of TensorFlow, and Keras is TensorFlow's."""
  out = tmp_path / "a.png"
  flags = (f"--workdir={workdir}", "--seeds=0-1", "--steps=1", f"--out={out}")
  command = [sys.executable, "-m", "soft_diffusion_tf.bin.sample", *flags]
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "CUDA"))}
  environment["KERAS_BACKEND"] = "torch"
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
  assert result.returncode == 0, result.stderr
  lines = [line for line in result.stderr.splitlines() if line and "sampling:" not in line]
  # The workdir's few steps leave the averages at their start, which is said.
  assert [line.split(" = ")[0] for line in lines] == ["warning: training.ema_decay"]
  said = result.stdout.splitlines()
  assert said[0] == "loading TensorFlow"
  assert said[1] == f"loading the run in {workdir}"


def test_keras_with_another_backend_is_refused():
  # A stand-in for Keras, whose other backends are not installed.
  code = (
    "import sys, types; keras = types.ModuleType('keras'); sys.modules['keras'] = keras; "
    "keras.config = types.SimpleNamespace(backend=lambda: 'torch'); import soft_diffusion_tf"
  )
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 1
  assert "ImportError: Keras is loaded with the backend 'torch'" in result.stderr
  assert "import soft_diffusion_tf before keras" in result.stderr


def test_a_program_says_at_once_what_it_does(tmp_path):
  """Before two seconds of the processor's time are spent; others may use the processor, too."""
  command = [sys.executable, "-m", "soft_diffusion_tf.bin.train", *TINY, f"--workdir={tmp_path}/w"]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "loading TensorFlow\n"
    spent = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    assert sum(map(int, spent)) / os.sysconf("SC_CLK_TCK") < 2
  finally:
    process.kill()
    process.wait()


def test_a_run_says_its_stages_and_where_it_goes_on(workdir, tmp_path):
  folder = tmp_path / "w"
  first = program("train", *TINY, f"--workdir={folder}")
  for text in (
    "reading digits",
    "fitting the prior",
    "building the network",
    "starting at step 0",
    "compiling the training step",
  ):
    assert text in first.stdout
  more = program("train", *TINY, "--config.training.steps=6", f"--workdir={folder}")
  assert "going on from step 4 of 6\n" in more.stdout
  again = program("train", *TINY, "--config.training.steps=6", f"--workdir={folder}")
  assert "at step 6 of 6: nothing is left to do" in again.stdout


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_signals_from_the_first_line_of_a_program_on(number, code):
  raised = f"import signal\nsignal.raise_signal(signal.{number})"
  heard = lambda: signal.signal(getattr(signal, number), signal.SIG_DFL)  # nohup would ignore it
  run = lambda text: subprocess.run(
    [sys.executable, "-c", text],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    preexec_fn=heard,
  )
  done = run(f"import soft_diffusion_tf.bin\n{raised}")  # before absl is imported
  assert done.returncode == code
  assert len(done.stderr.splitlines()) == 1
  # What imports a program without running it keeps its own handlers.
  done = run(f"import soft_diffusion_tf.bin.train\n{raised}")
  assert done.returncode in (-15, -2)


def test_ctrl_c_while_tensorflow_loads(tmp_path):
  """One of the modules that are imported would swallow a KeyboardInterrupt, and the run go on."""
  command = [sys.executable, "-m", "soft_diffusion_tf.bin.train", *TINY, f"--workdir={tmp_path}/w"]
  usual = lambda: signal.signal(
    signal.SIGINT, signal.default_int_handler
  )  # not of a background job
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=usual
  )
  assert process.stdout.readline() == "loading TensorFlow\n"
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 130
  assert stderr == "interrupted; start again with the same command to go on\n"
  assert not (tmp_path / "w").exists()


def test_sigterm_while_tensorflow_loads(tmp_path):
  command = [sys.executable, "-m", "soft_diffusion_tf.bin.train", *TINY, f"--workdir={tmp_path}/w"]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "loading TensorFlow\n"
  process.terminate()
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 75
  assert stderr == "asked to end before anything was done; start again to go on\n"
  assert not (tmp_path / "w").exists()


def test_paths_are_never_empty(workdir, tmp_path):
  """An unset shell variable must not stand for the current folder."""
  for flags in (
    ("train", TINY[0], "--workdir="),
    ("sample", f"--workdir={workdir}", "--out="),
    ("train", "--config=", f"--workdir={tmp_path}/w"),
    ("sample", "--workdir= ", "--out=x.png"),
    ("evaluate", f"--workdir={workdir}", "--reference="),
  ):
    line = error_of(program(*flags))
    assert "is a shell variable unset?" in line or "no such config file" in line
  for tool in ("find_schedule", "lab", "reference_stats", "study", "import_score_sde"):
    line = error_of(program(f"tools/{tool}.py", "--out=", module=False))
    assert line == "error: --out=: no path is given; is a shell variable unset?"
  assert "no path is given" in error_of(
    program("tools/figures.py", f"--workdir={workdir},,", f"--out={tmp_path}/x", module=False)
  )


def test_outputs_that_cannot_be_written_are_refused_before_work(workdir, tmp_path):
  file, folder = tmp_path / "file", tmp_path / "folder"
  file.write_text("mine")
  folder.mkdir()
  for flags, text in (
    (("sample", f"--workdir={workdir}", f"--out={file}/a.png"), "file is a file"),
    (("sample", f"--workdir={workdir}", f"--out={file}"), "file is a file"),
    (("sample", f"--workdir={workdir}", "--out=/proc/x.png"), "cannot be written"),
    (("sample", f"--workdir={workdir}", f"--out={'x' * 300}.png"), "File name too long"),
    (("export", f"--workdir={workdir}", "--out=/proc/x.npz"), "cannot be written"),
    (("restore", "--workdir=digits", f"--images={file}", "--out=/proc/x"), "cannot be written"),
    (("train", *TINY, f"--workdir={file}"), "file is a file"),
  ):
    line = error_of(program(*flags))
    assert text in line
    assert "--out=" in line or "--workdir=" in line
  for tool, flags in (
    ("find_schedule", (TINY[0], f"--out={folder}", "--force")),
    ("study", (f"--out={file}",)),
    ("lab", (f"--out={file}",)),
  ):
    line = error_of(program(f"tools/{tool}.py", *flags, module=False))
    assert "is a file" in line or "is a folder" in line
  assert file.read_text() == "mine"
  assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_one_line_that_says_where(workdir, tmp_path):
  """A limit on the size of files stands for the disk: the same error, without a name in it."""
  out = tmp_path / "a.png"
  flags = (f"--workdir={workdir}", f"--out={out}", "--seeds=0-63", "--steps=1")
  command = f"ulimit -f 1; exec {sys.executable} -m soft_diffusion_tf.bin.sample {' '.join(flags)}"
  result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
  line = error_of(result)
  assert "File too large" in line
  assert str(out) in line
  assert "free space" in line


def test_more_images_than_can_be_are_refused_before_work(workdir, tmp_path):
  for name, flag, text in (
    ("sample", "--seeds=0-99999999999", "one picture shows 10,000 at most; give a folder"),
    ("sample", "--seeds=0-9223372036854775807", "one picture shows 10,000 at most"),
    ("sample", "--seeds=0-99999999999999999999", "give a rising range"),
    ("sample", "--seeds=9223372036854775808", "give a rising range"),
    ("restore", "--samples=1000000000", "give an integer in the range [1, 10000]"),
    ("restore", "--seed=9223372036854775807", "image seeds from 9223372036854775807 to"),
  ):
    out = tmp_path / ("x.png" if name == "sample" else "x")
    flags = [f"--workdir={workdir}", flag, f"--out={out}"]
    if name == "restore":
      picture = tmp_path / "image.png"
      Image.fromarray(np.zeros([8, 8], np.uint8)).save(picture)
      flags += [f"--images={picture}", "--t=0.5"]
    assert text in error_of(program(name, *flags))
    assert not out.exists()
  many = program(
    "sample", f"--workdir={workdir}", "--seeds=0-99999999999", f"--out={tmp_path}/many"
  )
  assert "draw at most 10,000,000 in one call" in error_of(many)


def test_images_that_are_no_folder_of_one_size(workdir, tmp_path, rng):
  pixels = rng.integers(0, 256, [9, 9]).astype(np.uint8)
  for name, size in (("a/1.png", 8), ("a/2.png", 9), ("b/1.png", 9), ("b/2.png", 9)):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels[:size, :size]).save(tmp_path / name)
  real = f"--reference=folder:{tmp_path}/b"
  file = program("evaluate", f"--images={tmp_path}/a/1.png", real, "--feature_net=pixels")
  assert "a/1.png is a file; give the folder" in error_of(file)
  mixed = program("evaluate", f"--images={tmp_path}/a", real, "--feature_net=pixels")
  assert "2.png: its size or colour differs from 1.png's; bring the files to one" in error_of(mixed)


def test_a_configuration_of_another_kind_is_not_imported(tmp_path):
  np.savez(tmp_path / "w.npz", a=np.zeros(3))
  for content in (
    "null",
    "5",
    "[]",
    "{",
    '{"model": 5}',
    '{"model": {"name": 3}}',
    '{"model": {}, "data": null}',
    '{"data": {"image_size": "x"}}',
    "\0",
  ):
    (tmp_path / "c.json").write_text(content)
    flags = (f"--checkpoint={tmp_path}/w.npz", f"--config={tmp_path}/c.json", f"--out={tmp_path}/o")
    line = error_of(program("tools/import_score_sde.py", *flags, module=False))
    assert "c.json: " in line
    assert not (tmp_path / "o").exists()


def test_a_floor_of_no_images_is_refused(tmp_path):
  flags = (TINY[0], f"--out={tmp_path}/r.npz", "--floor_samples=-3")
  line = error_of(program("tools/reference_stats.py", *flags, module=False))
  assert line.startswith("error: --floor_samples=-3: give an integer")


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
  few = program(
    "tools/find_schedule.py", TINY[0], f"--out={tmp_path}/t.json", "--slice=0.0001", module=False
  )
  assert "images leaves 0" in error_of(few)
