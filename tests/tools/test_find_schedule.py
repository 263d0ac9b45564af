"""tools/find_schedule.py as a user runs it."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from soft_diffusion_tf import experiment, schedules

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = "--config=configs/digits_blur.py"
SMALL = (DIGITS, "--slice=0.15", "--levels=40", "--nodes=8")


def command(*flags):
  return [sys.executable, "tools/find_schedule.py", *map(str, flags)]


def run(*flags):
  environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    command(*flags), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )


def error_of(result):
  # A progress bar may stand on the same line of the terminal.
  lines = re.findall(r"(?:^|\])(error: .*)", result.stderr, re.MULTILINE)
  assert result.returncode == 2, result.stderr
  assert len(lines) == 1, result.stderr
  return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Schedules by two methods, as the tool leaves them."""
  where = tmp_path_factory.mktemp("schedules")
  for method in ("closed_form", "sinkhorn"):
    result = run(*SMALL, f"--method={method}", f"--out={where / method}.json")
    assert result.returncode == 0, result.stderr
    (where / f"{method}.txt").write_text(result.stdout)
  return where


def test_what_is_printed_and_left(folder):
  for method in ("closed_form", "sinkhorn"):
    content = schedules.load_levels(folder / f"{method}.json")
    text = (folder / f"{method}.txt").read_text()
    lines = text.splitlines()
    header = next(k for k, line in enumerate(lines) if line.split()[:1] == ["level"])
    rows = [line.split() for line in lines[header + 1 : header + 9]]
    assert [float(row[0]) for row in rows] == pytest.approx(content["levels"], abs=1e-4)
    assert [float(row[1]) for row in rows[:-1]] == pytest.approx(content["steps"], abs=1e-4)
    assert "8 levels, ε =" in text
    assert "two halves of the slice differ" in text
    for key in (
      "corruption",
      "data",
      "crop",
      "image_shape",
      "method",
      "epsilon",
      "seed",
      "version",
      "sensitivity",
      "straight",
    ):
      assert key in content, key
    assert content["method"] == method
    assert (folder / f"{method}.png").stat().st_size > 1000
  assert "sinkhorn_epsilon" in content
  assert "of 780 distances computed" in text
  assert not list(folder.glob("*.edges"))
  assert not list(folder.glob("*.partial"))


def test_compare(folder):
  files = [folder / "closed_form.json", folder / "sinkhorn.json"]
  result = run("--compare", *files, f"--plot={folder}/both.png")
  assert result.returncode == 0, result.stderr
  assert "closed_form" in result.stdout
  assert (folder / "both.png").stat().st_size > 1000
  assert "say where by --plot" in error_of(run("--compare", *files))
  before = (folder / "both.png").read_bytes()
  for flags in (("--compare", *files), (*SMALL, f"--out={folder}/new.json")):
    assert "both.png is there already" in error_of(run(*flags, f"--plot={folder}/both.png"))
  (folder / "new.png").write_bytes(before)  # the picture that is drawn where --plot says nothing
  assert "new.png is there already" in error_of(run(*SMALL, f"--out={folder}/new.json"))
  assert (folder / "both.png").read_bytes() == (folder / "new.png").read_bytes() == before
  assert not (folder / "new.json").exists()
  broken = folder / "broken.json"
  content = json.loads(files[0].read_text())
  broken.write_text(json.dumps({**content, "levels": [0.01, 1.0, 2.0, 1.5]}))
  assert "out of order at number 4" in error_of(run("--compare", broken, f"--plot={folder}/x.png"))
  assert not (folder / "x.png").exists()


def test_a_schedule_of_another_operator_is_refused(folder):
  digits = experiment.from_file(ROOT / "configs" / "digits_mask.py")
  with pytest.raises(ValueError, match=r"is for .*GaussianBlur.*find a schedule for this one"):
    experiment.level_from_file(folder / "sinkhorn.json", digits.corruption, 0.0, 1.0)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(folder, tmp_path):
  """kill -9 while distances are written; the same command ends with the same schedule."""
  out = tmp_path / "s.json"
  edges = out.with_suffix(".edges")
  flags = (*SMALL, "--method=sinkhorn", f"--out={out}", "--plot=none")
  environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    command(*flags), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  deadline = time.monotonic() + 300
  while not (edges.exists() and edges.read_bytes().count(b"\n") >= 4):
    assert process.poll() is None, "it ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not out.exists()
  # Other settings do not take these distances for theirs.
  other = run(*flags, "--sinkhorn_epsilon=0.1")
  assert "another search" in error_of(other)
  result = run(*flags)
  assert result.returncode == 0, result.stderr
  assert "going on from the distances in" in result.stdout
  got, want = (json.loads(path.read_text()) for path in (out, folder / "sinkhorn.json"))
  assert got.keys() == want.keys()
  # Up to the rounding of sums, which threads order differently every time.
  assert got["levels"] == pytest.approx(want["levels"], rel=1e-4)
  assert got["steps"] == pytest.approx(want["steps"], rel=1e-3)
  assert not edges.exists()


def test_a_schedule_for_a_number_of_evaluations(tmp_path):
  out = tmp_path / "joint.json"
  result = run(
    DIGITS, "--slice=0.15", "--levels=24", "--sigma_levels=6", "--nfe=10", f"--out={out}"
  )
  assert result.returncode == 0, result.stderr
  level, sigma = schedules.joint(out)
  assert len(level.values) == len(sigma.values) == 11
  assert schedules.ends(sigma) == pytest.approx((0.01, 0.1))
  assert schedules.ends(level) == pytest.approx((0.01, 6.0))


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    ((DIGITS, "--out=x.json", "--slice=0"), "a share of the data"),
    ((DIGITS, "--out=x.json", "--slice=0.0006"), "images leaves 1"),
    ((DIGITS, "--out=x.json", "--method=mse", "--joint"), "no joint schedule"),
    ((DIGITS,), "give --out"),
    (("--out=x.json",), "give --config"),
    (
      (*SMALL, "--method=sinkhorn", "--sinkhorn_epsilon=1e-9", "--out={}/x.json"),
      "too small for float32",
    ),
  ],
)
def test_mistakes_end_with_one_line(flags, text, tmp_path):
  assert text in error_of(run(*[flag.format(tmp_path) for flag in flags]))
  assert not (ROOT / "x.json").exists()
