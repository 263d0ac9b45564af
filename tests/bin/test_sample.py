"""`soft-diffusion-sample` as a user starts it, on a workdir with a small untrained network."""

import json

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data, plots, priors, training
from soft_diffusion_tf.bin.sample import parse_seeds, parse_shard, parse_times
from tests import forks


@pytest.fixture
def workdir(tiny, tmp_path):
  process = tiny.build_diffusion()
  prior = priors.fit("blurred_colour", data.load("digits", "all").floats(), process)
  model = training.build(tiny, process.with_prior(prior))
  training.write(training.Run(tiny, model, 0), tmp_path / "run")
  return tmp_path / "run"


def sample(workdir, out, *flags):
  flags = (f"--workdir={workdir}", f"--out={out}", *flags)
  return forks.shared().run("soft_diffusion_tf.bin.sample", *flags, limit=600)


def test_a_folder_in_shards_that_is_gone_on_with(tiny, workdir, tmp_path):
  out = tmp_path / "many"
  flags = ("--format=npz", "--sampler=heun", "--nfe=6")  # heun: 5 evaluations are the most that fit
  first = sample(workdir, out, "--seeds=0-199", "--shard=2/2", *flags)
  assert first.returncode == 0, first.stderr
  assert "72 samples (heun, 5 evaluations)" in first.stdout  # seeds 128-199: the second file's
  assert "sampling: 100%" in first.stderr
  second = sample(workdir, out, "--seeds=0-199", *flags)
  assert "200 samples" in second.stdout
  assert "72 were there already" in second.stdout
  names = sorted(f.name for f in out.iterdir())
  assert names == ["samples-000000-000127.npz", "samples-000128-000255.npz", "samples.json"]
  with np.load(out / names[0]) as file:
    np.testing.assert_array_equal(file["seeds"], np.arange(128))
    notes = json.loads(str(file["metadata"]))
  assert notes["config"] == tiny.identity()
  assert (notes["checkpoint"], notes["sampler"], notes["nfe"]) == (0, "heun", 5)
  assert notes["seeds"] == [0, 127]
  assert notes["version"]
  other = sample(workdir, out, "--seeds=0-199", "--format=npz", "--sampler=ddim")
  assert other.returncode == 2
  assert "holds samples that differ in" in other.stderr


def test_flags_reach_the_sampler(workdir, tmp_path):
  out = tmp_path / "a.png"
  flags = ("--times=1,0.7,0.2,0", "--sampler=ddim+momentum", "--clip", "--seeds=0-3")
  result = sample(workdir, out, *flags)
  assert result.returncode == 0, result.stderr
  assert "4 samples (ddim+momentum, 3 evaluations)" in result.stdout


def test_the_way_to_the_samples(workdir, tmp_path):
  for name in ("way.gif", "way.png"):
    flags = (f"--workdir={workdir}", f"--process={tmp_path / name}", "--seeds=3-6", "--steps=5")
    result = forks.shared().run("soft_diffusion_tf.bin.sample", *flags, limit=600)
    assert result.returncode == 0, result.stderr
    assert f"the way of 4 samples (momentum) in {tmp_path / name}" in result.stdout
  run = training.load(workdir)
  with Image.open(tmp_path / "way.gif") as gif:
    shown = 0
    for k in range(gif.n_frames):  # noise, and five steps; equal ones are one frame
      gif.seek(k)
      shown += gif.info["duration"]
    last = np.asarray(gif.convert("RGB"), int)
  assert shown == 4000 + 2000  # milliseconds
  want = plots.grid(run.images(range(3, 7), steps=5), zoom=8).astype(int)
  assert np.abs(last - want).max() <= 8  # a palette of 256 greys, and a batch of another size
  with Image.open(tmp_path / "way.png") as png:
    assert png.width > 100


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (["--process=a.jpg"], "ends neither in .gif nor in .png"),
    (["--process=a.gif", "--out=b"], "give --out=FILE.png or --out=FOLDER for samples, or"),
    ([], "give --out=FILE.png or --out=FOLDER for samples, or"),
    (["--process=a.gif", "--sampler=dormand_prince"], "chooses its own steps"),
    (["--process=a.gif", "--shard=1/2"], "one picture is drawn whole"),
  ],
)
def test_what_is_no_way(workdir, tmp_path, flags, text):
  flags = [f.replace("--process=", f"--process={tmp_path}/") for f in flags]
  flags = (f"--workdir={workdir}", *flags)
  result = forks.shared().run("soft_diffusion_tf.bin.sample", *flags, limit=600)
  assert result.returncode == 2
  [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert text in line


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (("--sampler=momentun",), "did you mean 'momentum'"),
    (("--times=0,0.5,1",), "give them from 1 to 0"),
    (("--times=1,0.5,0.5,0",), "0.5 comes after 0.5; give each time once"),
    (("--nfe=0",), "at least 1 evaluation"),
    (("--nfe=5", "--steps=5"), "leave out steps"),
    (("--shard=3/2",), "give k/n"),
    (("--step=9",), "no checkpoint of step 9"),
  ],
)
def test_mistakes_end_with_one_line(workdir, tmp_path, flags, text):
  result = sample(workdir, tmp_path / "x", "--seeds=0-1", *flags)
  assert result.returncode == 2, result.stderr
  assert text in next(x for x in result.stderr.splitlines() if x.startswith("error: "))
  assert not (tmp_path / "x").exists()


def test_options_are_refused_before_the_weights_are_read(tiny, tmp_path):
  """A workdir of a config alone is enough to say that a flag is wrong."""
  run = tmp_path / "run"
  run.mkdir()
  tiny.save(run)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "note.txt").write_text("mine")
  for name, flags, text in (
    ("sample", ("--steps=0",), "sampling.steps must be from 1"),
    ("sample", ("--sampler=momentun",), "did you mean 'momentum'"),
    ("sample", (f"--out={tmp_path}/mine",), "holds other files than samples"),
    ("evaluate", ("--steps=0", "--samples=9", "--feature_net=pixels"), "steps must be from 1"),
    ("export", ("--samplers=momentun:3",), "did you mean 'momentum'"),
  ):
    out = () if name == "evaluate" else (f"--out={tmp_path / 'x'}",)
    program = f"soft_diffusion_tf.bin.{name}"
    result = forks.shared().run(program, f"--workdir={run}", *out, *flags, limit=600)
    assert result.returncode == 2, result.stderr
    assert text in result.stderr
    assert "loading the run" not in result.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("parse", "good", "want", "bad"),
  [
    (parse_seeds, "3-5", range(3, 6), "5-3"),
    (parse_seeds, f"0-{2**63 - 1}", range(2**63), f"0-{2**63}"),
    (parse_seeds, f"{2**63 - 1}", [2**63 - 1], "٣"),
    (parse_seeds, "7,2", [7, 2], "7;2"),
    (parse_shard, "2/8", (2, 8), "2-8"),
    (parse_times, "1,0.5,0", (1.0, 0.5, 0.0), "1,x"),
  ],
)
def test_parsing(parse, good, want, bad):
  assert parse(good) == want
  with pytest.raises(ValueError, match="give"):
    parse(bad)
