"""The documents: every example runs, every command names what exists, the site builds."""

import ast
import doctest
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest

from soft_diffusion_tf import corruptions

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
  [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *DOCS.rglob("*.md")]
)
PROGRAMS = {  # a command's name → the file that defines its flags
  name: ROOT / f"{module.replace('.', '/')}.py"
  for name, module in re.findall(
    r'"(soft-diffusion-[\w-]+)=([\w.]+):run"', (ROOT / "setup.py").read_text(encoding="utf-8")
  )
} | {f"tools/{f.name}": f for f in (ROOT / "tools").glob("*.py")}
for tool, file in PROGRAMS.items():  # an entrance to an installed program has that one's flags
  if entered := re.search(
    r"^from soft_diffusion_tf\.bin\.(\w+) import run$", file.read_text(encoding="utf-8"), re.M
  ):
    PROGRAMS[tool] = ROOT / "soft_diffusion_tf" / "bin" / f"{entered[1]}.py"


def blocks(page):
  """(language, text) of each fenced block of a page."""
  return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def with_examples():
  return [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


def name_of(page):
  return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", with_examples(), ids=name_of)
def test_the_examples_run(page):
  result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
  assert result.attempted == page.read_text(encoding="utf-8").count("\n>>> ")
  assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_kind_that_is_tested(page):
  assert {language for language, _ in blocks(page)} <= {"", "python", "bash"}
  for language, text in blocks(page):
    assert language != "python" or ">>> " in text
    assert language != "bash" or page.name == "tutorial.md"


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
  """All its commands, in order, as one would type them, with less training."""
  # A server that a failure leaves behind would hold the pipe, and the test would wait for it.
  script = "set -eo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + "\n".join(
    t for n, t in blocks(DOCS / "tutorial.md") if n == "bash"
  )
  port = 18501 + os.getpid() % 1000
  assert script.count("8501") == 3
  script = script.replace("8501", str(port)).replace("--retry 60", "--retry 300")
  (tmp_path / "tools").symlink_to(ROOT / "tools")
  (tmp_path / "mine").mkdir()
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  result = subprocess.run(
    ["bash", "-c", script],
    cwd=tmp_path / "mine",
    env=os.environ | {"PATH": path, "STEPS": "6"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
  mine = tmp_path / "mine"
  for made in ("levels.json", "samples.png", "fewer.png", "model/saved_model.pb"):
    assert (mine / made).is_file()
  assert "FD[pixels]" in result.stdout
  assert len(json.loads((mine / "answer.json").read_text())["outputs"]["images"]) == 2


def flags_of(file):
  """The names of a program's absl flags, and whether it takes a config's fields."""
  names, takes_config = {"debug", "help"}, False
  text = file.read_text(encoding="utf-8")
  for call in ast.walk(ast.parse(text)):
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
      continue
    if call.func.attr.startswith(("DEFINE_", "define_path")) and call.args:
      names.add(ast.literal_eval(call.args[0]))
  if "define_trust_code()" in text:
    names.add("trust_code")
  if "define_config()" in text:
    names, takes_config = names | {"config"}, True
  return names, takes_config


def commands():
  for page in PAGES:
    for language, text in blocks(page):
      if language == "python":
        continue
      for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
        for k, word in enumerate(words):
          if word.removeprefix("../") in PROGRAMS:
            yield name_of(page), word.removeprefix("../"), words[k + 1 :]


def test_every_command_names_flags_and_files_that_exist():
  seen = 0
  for page, program, words in commands():
    if program == "tools/benchmark.py":  # argparse, by subcommand
      continue
    known, takes_config = flags_of(PROGRAMS[program])
    if PROGRAMS[program].name == "lab.py":  # it writes, and only where it is told
      assert any(w.startswith(("--out=", "--report=")) for w in words), f"{page}: lab.py, no --out"
    for word in words:
      if match := re.match(r"--(?:no)?([a-z_]+)(\.[\w.]+)?(=(.*))?$", word):
        name = match[1] if match[1] in known else word[2:].split("=")[0]
        assert name in known or (takes_config and match[2]), f"{page}: {program} has no {word}"
        if word.startswith("--config=configs/") and "$" not in word:
          assert (ROOT / match[4]).is_file(), f"{page}: no {match[4]}"
        seen += 1
  assert seen > 60


def test_every_result_file_is_described():
  """docs/results/README.md has a line for each file, and pictures and results lie in one folder."""
  listed = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
  for entry in (DOCS / "results").iterdir():
    name = f"`{entry.name}/`" if entry.is_dir() else f"`{entry.name}`"
    assert entry.name == "README.md" or f"| {name} |" in listed, f"no line on {entry.name}"
  assert {f.parent.name for f in DOCS.rglob("*.png")} == {"img"}
  assert {f.relative_to(DOCS).parts[0] for f in DOCS.rglob("*.json*")} == {"results"}


def test_every_picture_is_shown():
  shown = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
  for file in (DOCS / "img").iterdir():
    assert f"img/{file.name})" in shown, f"no page shows {file.name}"


def test_names_and_files_that_they_mention_exist():
  tests = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").rglob("test_*.py"))
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(test_\w+)`", text)):
      assert f"def {name}(" in tests, f"{name_of(page)} names {name}, which is not a test"
    for path in set(re.findall(r"(?:configs|tools|docs|tests)/[\w/]+\.(?:py|md|png)", text)):
      assert (ROOT / path).is_file(), f"{name_of(page)} names {path}, which does not exist"


def test_the_site_builds_without_warnings(tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "mkdocs",
      "build",
      "--strict",  # --quiet would not count warnings
      "--config-file",
      str(ROOT / "tools" / "mkdocs.yml"),
      "--site-dir",
      str(tmp_path / "site"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  reference = tmp_path / "site" / "reference"
  page = (reference / "samplers.html").read_text(encoding="utf-8")
  assert "soft_diffusion_tf.samplers.time_grid" in page  # the reference is not empty
  home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
  package = ROOT / "soft_diffusion_tf"
  for file in package.glob("[a-z]*.py"):  # every module has a page, and the navigation names it
    assert (reference / f"{file.stem}.html").is_file()
    assert f"reference/{file.stem}.html" in home


def test_the_whole_paper_on_one_page_runs():
  page = DOCS / "examples" / "soft_diffusion.py"
  assert len(page.read_text(encoding="utf-8").splitlines()) <= 100
  train_and_sample = runpy.run_path(str(page))["train_and_sample"]
  samples, loss, real = train_and_sample(steps=3, batch=8, nfe=4, count=5)
  assert samples.shape == (5, *real.shape[1:])
  assert np.all(np.isfinite(samples))
  # Hardly trained, the network gives back x_t. So a sample is brighter than the strongest blur,
  # which loses light over the borders, and darker than a digit.
  blurred = np.asarray(corruptions.GaussianBlur()(real, 6.0))
  assert blurred.mean() + 0.02 < samples.mean() < real.mean() - 0.02
  assert loss > 0


def test_the_notebook_runs(tmp_path):
  notebook = nbformat.read(DOCS / "digits.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)  # stored without its output
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  pictures = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if "image/png" in output.get("data", {})
  ]
  assert len(pictures) == 8
