"""soft-diffusion-evaluate as a user starts it: real processes, exit codes, one line of error."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data, plots, training

ROOT = pathlib.Path(__file__).parents[2]


def start(*flags):
  return subprocess.Popen(
    [sys.executable, "-m", "soft_diffusion_tf.bin.evaluate", *map(str, flags)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )


def evaluate(*flags):
  process = start(*flags)
  out, err = process.communicate()
  return process.returncode, out, err


def error_of(*flags):
  code, _, err = evaluate(*flags)
  assert code == 2, err
  assert "Traceback" not in err, err
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  return line


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  options = {"feature_net": "pixels", "neighbours": 5}
  training.train(tiny.replace(evaluation=options), folder, progress=False)
  return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two folders of digits as PNG files."""
  digits = data.load("digits", "train").images
  root = tmp_path_factory.mktemp("images")
  for name, part in (("one", digits[:60]), ("two", digits[60:200])):
    for k, image in enumerate(part):
      plots.save_png(root / name / f"{k:03d}.png", image)
  return root


def test_every_number_comes_with_its_conditions(workdir):
  code, out, err = evaluate(
    f"--workdir={workdir}", "--samples=70", "--first_seed=5", "--steps=2", "--sampler=heun"
  )
  assert code == 0, err
  assert "FID" not in out
  first, floor, conditions, *rest = out[out.index("step 6 (") :].splitlines()
  assert first.startswith("step 6 (EMA 0.999), heun, 3 NFE, N = 70, seeds 5-74: FD[pixels] ")
  assert floor.startswith("floor (real against real): FD[pixels] ")
  assert "reference 70 of digits train" in conditions
  # 70 images are more than 64 features; after 6 steps the average holds its random start.
  assert [line.split(" = ")[0] for line in rest] == ["warning: training.ema_decay"]
  (line,) = (workdir / "evaluations.jsonl").read_text().splitlines()
  record = json.loads(line)
  for name, value in (("samples", 70), ("first_seed", 5), ("nfe", 3), ("step", 6)):
    assert record[name] == value
  assert (record["floor"]["count"], record["floor"]["neighbours"]) == (70, 5)
  assert list((workdir / "references").glob("*.npz"))


def test_another_time_grid_is_said_and_makes_other_samples(workdir):
  flags = (f"--workdir={workdir}", "--samples=70", "--sampler=two_step", "--steps=3")
  code, out, err = evaluate(*flags, "--grid=quadratic")
  assert code == 0, err
  assert "\nstep 6 (EMA 0.999), two_step (grid quadratic), 3 NFE" in out
  code, uniform, err = evaluate(*flags)
  assert code == 0, err
  assert out.split("FD")[1] != uniform.split("FD")[1]
  assert "did you mean 'level'" in error_of(*flags, "--grid=levels")
  assert "leave --grid=level out" in error_of(f"--workdir={workdir}", "--sweep", "--grid=level")


_REFUSALS = """
import sys
from absl import flags
from soft_diffusion_tf.bin import evaluate
for line in sys.argv[1:]:
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["evaluate", "--workdir=no/such/run", *line.split()])
  try:
    evaluate._check()  # before TensorFlow is loaded
  except ValueError as error:
    print(error)
"""


def test_flags_that_would_be_ignored_are_refused():
  """What is asked for, and after the bar the flag that it does not take."""
  cases = (
    "--sweep | --images=x",
    "--sweep | --memorisation",
    "--sweep | --checkpoint=6",
    "--sweep | --steps=3",
    "--sweep | --grid=level",
    "--sweep --samplers=naive | --sampler=heun",
    "--memorisation | --split=test",
    "--memorisation | --reference=digits",
    "--memorisation --images=x | --reference_samples=9",
    "--memorisation | --samplers=naive",
    "--images=x | --checkpoint=6",
    "--images=x | --sampler=heun",
    "--images=x | --steps=3",
    "--images=x | --nfe=3",
    "--images=x | --grid=level",
    "--images=x | --first_seed=0",
    "--images=x --memorisation | --steps=3",
    "--steps=3 | --samplers=naive",
    "--nosweep | --checkpoints=newest",
  )
  done = subprocess.run(
    [sys.executable, "-c", _REFUSALS, *(case.replace("|", "") for case in cases)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(cases)
  for line, case in zip(lines, cases):
    assert line.endswith(f"; leave {case.split('| ')[1]} out"), case


def test_a_folder_of_images_against_another(folders):
  code, out, err = evaluate(
    f"--images={folders}/one",
    f"--reference=folder:{folders}/two",
    "--feature_net=pixels:4",
    "--reference_samples=80",
  )
  assert code == 0, err
  record = json.loads(out.splitlines()[-1])
  assert (record["samples"], record["reference"]["count"]) == (60, 80)
  assert record["floor"]["count"] == 60  # the other 60 real images
  assert "KID, precision and recall on 60 images and 80 real ones" in out
  one, two = (data.load(f"folder:{folders}/{n}", "all").images for n in ("one", "two"))
  from soft_diffusion_tf import gaussians
  from soft_diffusion_tf.evaluation import features

  net = features.feature_network("pixels:4")
  order = np.random.default_rng(0).permutation(140)[:80]
  want = gaussians.frechet_between(net(one)[0], net(two[order])[0])
  assert record["exact"] == pytest.approx(want, rel=1e-6)


def test_all_of_a_folder_is_the_reference_of_another(folders):
  flags = (f"--images={folders}/two", f"--reference=folder:{folders}/one", "--feature_net=pixels:4")
  code, out, err = evaluate(*flags)
  assert code == 0, err
  record = json.loads(out.splitlines()[-1])
  assert (record["samples"], record["reference"]["count"]) == (140, 60)
  assert record["floor"] is None
  assert record["why_no_floor"] == "needs 140 more real images, 0 are left"


def test_bad_input_is_one_line(workdir, folders, tmp_path):
  reference = f"--reference=folder:{folders}/two"
  assert "give --workdir=FOLDER, or --images" in error_of(f"--images={folders}/one")
  (tmp_path / "empty").mkdir()
  assert "no image files in it" in error_of(f"--images={tmp_path}/empty", reference)
  plots.save_png(tmp_path / "mixed" / "a.png", np.zeros([8, 8, 1], np.uint8))
  plots.save_png(tmp_path / "mixed" / "b.png", np.zeros([8, 9, 1], np.uint8))
  assert "its size or colour differs" in error_of(f"--images={tmp_path}/mixed", reference)
  assert "61 images asked for, but" in error_of(
    f"--images={folders}/one", reference, "--samples=61", "--feature_net=pixels"
  )
  before = (workdir / "evaluations.jsonl").read_text()
  assert "did you mean 'momentum'" in error_of(
    f"--workdir={workdir}", "--sweep", "--samplers=momentun", "--nfe=2"
  )
  assert error_of(f"--workdir={workdir}", "--nfe=2,3") == (
    "error: --nfe=2,3: give one number, or --sweep for several"
  )
  assert (workdir / "evaluations.jsonl").read_text() == before
  assert not (workdir / "best.json").exists()


@pytest.mark.slow
def test_memorisation(workdir):
  flags = (f"--workdir={workdir}", "--memorisation", "--samples=20", "--steps=2")
  code, out, err = evaluate(*flags, "--feature_net=pixels:4")
  assert code == 0, err
  assert "pixels: " in out
  assert "pixels:4: " in out
  [path] = (workdir / "memorisation").glob("step6_momentum_2_seeds0-19_*.json")
  before = path.read_bytes()
  report = json.loads(before)
  assert (report["held_out"], report["split"], report["first_seed"]) == ("test", "train", 0)
  assert [s["space"] for s in report["spaces"]] == ["pixels", "pixels:4"]
  picture = Image.open(path.with_suffix(".png"))
  assert np.asarray(picture.convert("RGB")).std() > 10
  code, _, err = evaluate(*flags, "--feature_net=pixels:2", "--grid=quadratic")
  assert code == 0, err
  assert len(list(path.parent.glob("*.json"))) == 2
  assert path.read_bytes() == before


@pytest.mark.slow
def test_a_killed_sweep_goes_on(workdir):
  flags = (
    f"--workdir={workdir}",
    "--sweep",
    "--samples=70",
    "--nfe=2,3,4",
    "--samplers=naive,momentum",
    "--checkpoints=newest",
    "--first_seed=100",
  )
  results = workdir / "sweep" / "results.jsonl"
  process = start(*flags)
  while process.poll() is None and not (results.exists() and results.read_text().count("\n") >= 2):
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  before = results.read_text().splitlines()
  assert 2 <= len(before) < 6, "killed too late to show anything"
  code, out, err = evaluate(*flags)
  assert code == 0, err
  after = results.read_text().splitlines()
  assert after[: len(before)] == before
  assert len(after) == 6
  assert "best: step 6" in out
  results.unlink()
  code, _, err = evaluate(*flags)
  assert code == 0, err
  fresh = [json.loads(line)["value"] for line in results.read_text().splitlines()]
  assert fresh == [json.loads(line)["value"] for line in after]
  code, out, err = evaluate(
    f"--workdir={workdir}", "--checkpoint=best", "--samples=70", "--first_seed=100"
  )
  best = json.loads((workdir / "best.json").read_text())
  assert f"{best['label']} {best['value']:.4g}" in out
