"""The architecture: which rooms there are, what each may import, and that BUILD says the same."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

from tools import build

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "soft_diffusion_tf"

# From the ground up: a room may import only from itself and from the rooms above it in this table.
# A name is a module of the package or a folder of them. README's map shows the same rooms.
ROOMS = {
  "Ground": "moved averages packages shipped trust parts arrays files products faults rng "
  "gaussians neighbours images plots memory",
  "Process": "schedules corruptions priors diffusion",
  "Network and loss": "networks losses",
  "Samplers": "samplers oracles",
  "Levels": "transport",
  "Data": "data metrics",
  "Grading without training": "laboratory",
  "Experiment": "experiment",
  "Drawing and restoring": "drawing restoration",
  "Training": "optimizer model training score_sde",
  "Evaluation": "evaluation",
  "Use of a model": "callbacks export serving",
  "Programs": "bin",
}

# What a module or a folder must never know of, besides what ROOMS rules out.
FORBIDDEN = {
  "losses": {"keras"},
  "samplers": {"keras", "pathlib", f"{PACKAGE}.networks"},
  "networks": {"ml_collections", f"{PACKAGE}.schedules", f"{PACKAGE}.corruptions"},
  "serving": {f"{PACKAGE}.samplers", f"{PACKAGE}.networks", f"{PACKAGE}.training"},
  "data": {f"{PACKAGE}.diffusion", f"{PACKAGE}.corruptions"},
}
GAN = "evaluation.distances"  # the one module that imports TensorFlow GAN


def library():
  """The package's modules: dotted name → path."""
  return {m: s for m, s in build.modules().items() if m.startswith(f"{PACKAGE}.")}


def top_of(module):
  """The module or folder, directly in the package, that a dotted name belongs to."""
  return module.split(".")[1]


def room_of(module):
  """The place of a module's room in ROOMS."""
  return [top_of(module) in names.split() for names in ROOMS.values()].index(True)


def test_build_says_what_the_sources_say():
  done = subprocess.run(
    [sys.executable, "tools/build.py", "--check"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_every_target_of_a_test_runs_its_file_by_pytest(tmp_path):
  """A test file by itself ends well whatever it asserts; tests/run.py does not."""
  tests = []
  for call in ast.walk(ast.parse((ROOT / "BUILD").read_text("utf-8"))):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "py_test":
      given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg != "data"}
      assert given["main"] == "tests/run.py"
      assert given["srcs"] == [*given["args"], "tests/run.py"]
      tests += given["args"]
  assert sorted(tests) == sorted(s for s in build.sources() if "/test_" in s)
  broken = tmp_path / "test_broken.py"
  broken.write_text("def test_nothing():\n  assert 1 + 1 == 3\n")
  sound = tmp_path / "test_sound.py"
  sound.write_text("def test_something():\n  assert 1 + 1 == 2\n")
  for file, code in ((broken, 1), (sound, 0)):
    done = subprocess.run(
      [sys.executable, "tests/run.py", "--noconftest", str(file)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == code


def test_every_module_is_in_one_room():
  named = [name for names in ROOMS.values() for name in names.split()]
  assert sorted(named) == sorted({top_of(m) for m in library()})


def test_readme_has_the_same_map():
  text = (ROOT / "README.md").read_text("utf-8")
  table = {}
  for line in text[text.index("## Map") :].splitlines():
    if line.startswith("| ") and not line.startswith("| Room "):
      room, names = line.strip("| ").split(" | ")
      table[room] = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", names))
  assert {room: sorted(names) for room, names in table.items()} == {
    room: sorted(names.split()) for room, names in ROOMS.items()
  }
  assert list(table) == list(ROOMS)


@pytest.mark.parametrize("module", sorted(library()))
def test_imports_point_upwards_in_the_table(module):
  other_name = {source: name for name, source in library().items()}
  for source in build.project_imports(library()[module]):
    if source == f"{PACKAGE}/__init__.py":
      continue
    other = other_name.get(source, source)
    assert source in other_name, f"{module} must not import {source}"
    assert room_of(other) <= room_of(module), f"{module} must not import {other}"


def test_imports_make_no_circle():
  graph = {s: build.project_imports(s) for s in build.sources()}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_do_not_know_what_they_must_not():
  for module, source in library().items():
    for forbidden in FORBIDDEN.get(top_of(module), ()):
      known = [i for i in build.imports(source) if f"{i}.".startswith(f"{forbidden}.")]
      assert not known, f"{module} imports {known}"


def test_one_importer_of_tensorflow_gan():
  named = [m for m, s in library().items() if "tensorflow_gan" in (ROOT / s).read_text("utf-8")]
  assert named == [f"{PACKAGE}.{GAN}"]


def test_git_holds_every_module():
  """A name in .gitignore must not hide a folder of the package from a commit."""
  if not (ROOT / ".git").exists():
    pytest.skip("no git repository here, so nothing to compare with")
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
  missing = set(build.sources()) - set(listed.stdout.split())
  assert not missing, f"git does not hold {sorted(missing)}: git add them, and look at .gitignore"
