"""The benchmark of data runs, and its figures are of the size that they can be."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow  # seven processes that load TensorFlow
def test_memory_and_time_of_every_way_to_hold_images():
  flags = ["--images=100,200", "--ways=memory,pack,folder", "--side=16"]
  done = subprocess.run(
    [sys.executable, "tools/benchmark.py", "data", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=590,
  )
  assert not done.returncode, done.stderr[-3000:]
  rows = re.findall(r"^ +(\d+)  (\w+) .*?([\d,]+) images/s", done.stdout, re.MULTILINE)
  ways = ("memory", "pack", "folder")
  assert [row[:2] for row in rows] == [(n, way) for n in ("100", "200") for way in ways]
  assert all(float(rate.replace(",", "")) > 100 for *_, rate in rows)
  assert len(re.findall(r"bytes for each further image, of 768 bytes", done.stdout)) == 3
