"""What stands beside the code: versions, dates and Pythons that several files name are the same."""

import ast
import pathlib
import re

import pytest
import yaml

import soft_diffusion_tf
from tools import build

ROOT = pathlib.Path(__file__).parents[1]


def read(name):
  return (ROOT / name).read_text(encoding="utf-8")


def setup_arguments():
  """The literal arguments of setup.py's call."""
  calls = [n for n in ast.walk(ast.parse(read("setup.py"))) if isinstance(n, ast.Call)]
  call = next(c for c in calls if getattr(c.func, "attr", None) == "setup")
  return {k.arg: ast.literal_eval(k.value) for k in call.keywords if _literal(k.value)}


def _literal(node):
  try:
    ast.literal_eval(node)
  except ValueError:
    return False
  return True


def test_one_version():
  version = soft_diffusion_tf.__version__
  assert setup_arguments().get("version", version) == version  # or read from the package
  headings = re.findall(r"^## (\S+?),? ?(\d{4}-\d\d-\d\d)?$", read("CHANGELOG.md"), re.M)
  assert headings[0] == ("Unreleased", "")
  release = headings[1][0]
  assert yaml.safe_load(read("CITATION.cff"))["version"] == release
  assert version == release or version.endswith(".dev0")  # on the way to the next one
  number = lambda text: tuple(map(int, re.findall(r"\d+", text.removesuffix(".dev0"))))
  assert number(version) >= number(release)
  assert all(date for _, date in headings[1:])


def test_the_workflow_tests_every_python_that_is_claimed():
  jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
  matrix = jobs["test"]["strategy"]["matrix"]
  claimed = re.findall(r"Python :: (\d\.\d+)", str(setup_arguments()["classifiers"]))
  assert matrix["python"] == claimed
  assert matrix["dependencies"] == ["locked", "newest"]
  assert jobs["prereleases"]["continue-on-error"] is True


def test_hooks_and_make_lint_run_the_same_checks():
  hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
  lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
  for hook in hooks:
    words = hook["entry"].replace("--force-exclude", "").split()
    assert f"$(BIN)/{pathlib.Path(words[0]).name} {' '.join(words[1:])}".strip() in lint


def test_the_package_says_that_it_is_typed():
  assert (ROOT / "soft_diffusion_tf" / "py.typed").is_file()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md", "SECURITY.md"])
def test_links_lead_to_files(page):
  for target in re.findall(r"\]\(([^)#\s]+)", read(page)):
    assert "://" in target or (ROOT / target).exists(), f"{page}: no {target}"


def test_the_formatter_has_the_last_word():
  for file in map(ROOT.joinpath, build.sources()):
    text = file.read_text("utf-8")
    for comment in ("fmt" + ": skip", "fmt" + ": off"):
      assert comment not in text, f"{file}: {comment}"
