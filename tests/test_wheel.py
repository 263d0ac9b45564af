"""The wheel alone does README's whole job: built, installed beside nothing of the checkout, run.

Its environment sees the third-party packages of this one, but not this checkout: their folder is on
its path by a .pth file, whose own .pth files are not read, so that no editable install is found.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = re.findall(r'"(soft-diffusion-[\w-]+)=', (ROOT / "setup.py").read_text())
CONFIGS = sorted(f.stem for f in (ROOT / "configs").glob("*.py"))
TINY = (
  "--config=digits_blur",
  "--config.network.nf=8",
  "--config.network.ch_mult=(1,)",
  "--config.network.num_res_blocks=1",
  "--config.network.attn_resolutions=()",
  "--config.training.batch_size=16",
  "--config.training.steps=4",
  "--config.sampling.steps=3",
  "--config.training.sample_every=0",
  "--config.sampling.batch_size=8",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel of a copy of the sources: building leaves folders behind."""
  place = tmp_path_factory.mktemp("wheel")
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, place)
  for name in ("soft_diffusion_tf", "configs"):
    shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
  build = (
    sys.executable,
    "-m",
    "pip",
    "wheel",
    ".",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--quiet",
    "--wheel-dir=out",
  )
  done = subprocess.run(build, cwd=place, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  (file,) = (place / "out").glob("*.whl")
  return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder of the programs in an environment where the wheel is installed."""
  place = tmp_path_factory.mktemp("installed") / "env"
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
  install = (
    sys.executable,
    "-m",
    "pip",
    "--python",
    place / "bin" / "python",
    "install",
    "--no-deps",
    "--no-index",
    "--quiet",
    wheel,
  )
  done = subprocess.run(install, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (site,) = place.glob("lib/python*/site-packages")
  (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return place / "bin"


def run(program, *arguments, cwd):
  """Runs an installed program as a user would, from a folder that is not the checkout's."""
  own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
  done = subprocess.run(
    [program, *map(str, arguments)],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
    env=own | {"CUDA_VISIBLE_DEVICES": "-1"},
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


def succeed(program, *arguments, cwd):
  done = run(program, *arguments, cwd=cwd)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_what_is_in_the_wheel(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  own = {n.removeprefix("soft_diffusion_tf/") for n in names if n.startswith("soft_diffusion_tf/")}
  package, configs = ROOT / "soft_diffusion_tf", ROOT / "configs"
  there = [f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
  expected = {f.relative_to(package).as_posix() for f in there}
  expected |= {f"configs/{f.name}" for f in configs.glob("*.py")}
  expected |= {f"configs/schedules/{f.name}" for f in configs.glob("schedules/*.json")}
  assert own == expected
  others = {n.split("/")[0] for n in names} - {"soft_diffusion_tf"}
  assert len(others) == 1, others  # the metadata: no folder of the checkout's beside the package
  assert others.pop().endswith(".dist-info")


def test_the_programs_answer(installed, tmp_path):
  assert len(SCRIPTS) >= 10
  for script in SCRIPTS:
    text = succeed(installed / script, "--help", cwd=tmp_path)
    assert script in text
    assert "tools/" not in text  # a wheel has none
    assert "configs/" not in text


def test_nothing_is_the_checkouts(installed, tmp_path):
  code = (
    "import json, soft_diffusion_tf; from soft_diffusion_tf import shipped; "
    "print(json.dumps([soft_diffusion_tf.__file__, shipped.configs()], default=str))"
  )
  file, configs = json.loads(succeed(installed / "python", "-c", code, cwd=tmp_path))
  assert sorted(configs) == CONFIGS
  for path in (file, *configs.values()):
    assert pathlib.Path(path).is_relative_to(installed.parent)


def test_a_name_that_is_not_shipped(installed, tmp_path):
  flags = ("--config=cifar_blur", "--workdir=w")
  done = run(installed / "soft-diffusion-train", *flags, cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert "--config=cifar_blur: no such config file" in done.stderr
  assert "did you mean cifar10_blur?" in done.stderr


@pytest.mark.slow
def test_from_a_schedule_to_a_served_image(installed, tmp_path):
  call = lambda name, *flags: succeed(installed / f"soft-diffusion-{name}", *flags, cwd=tmp_path)
  search = ("--slice=0.1", "--levels=16", "--nodes=4", "--out=levels.json")
  assert "4 levels, ε =" in call("schedule", TINY[0], *search)
  assert "trained to step 4" in call("train", *TINY, "--workdir=run")
  assert "4 samples" in call("sample", "--workdir=run", "--seeds=0-3", "--out=samples.png")
  stats = (TINY[0], "--feature_net=pixels", "--samples=40", "--out=real.npz")
  assert "40 images of digits" in call("reference-stats", *stats)
  judged = call("evaluate", "--workdir=run", "--samples=40", "--reference=real.npz")
  assert "FD[pixels]" in judged
  call("export", "--workdir=run", "--samplers=two_step:2", "--out=model")
  call(
    "lab",
    "--images=10",
    "--count=20",
    "--nfe=2",
    "--samplers=naive",
    "--schedule=linear",
    "--out=lab",
  )
  for made in ("levels.json", "levels.png", "samples.png", "model/saved_model.pb", "lab/lab.md"):
    assert (tmp_path / made).is_file()
  served = subprocess.Popen(
    [installed / "soft-diffusion-serve", "--model=model", "--port=0", "--nowarm"],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    text=True,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
  )
  try:
    begin = time.monotonic()
    for line in served.stdout:
      if found := re.search(r"at (http://\S+/v1/models/model) ", line):
        break
      assert time.monotonic() - begin < 300
    request = urllib.request.Request(
      f"{found[1]}:predict",
      b'{"signature_name": "sample", "inputs": {"num": 2, "seed": 0}}',
      {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
      assert len(json.load(answer)["outputs"]["images"]) == 2
  finally:
    served.terminate()
    served.wait()


@pytest.mark.slow
def test_every_shipped_config_is_read(installed, tmp_path):
  code = (
    "from soft_diffusion_tf import experiment, shipped; "
    "print(*[experiment.from_file(name).name for name in shipped.configs()])"
  )
  said = succeed(installed / "python", "-c", code, cwd=tmp_path).splitlines()[-1]
  assert said.split() == CONFIGS
