"""The targets of BUILD, written from the imports of the sources.

  python tools/build.py            writes BUILD
  python tools/build.py --check    exits with 1 if BUILD is not what the sources say

Nobody writes BUILD by hand: a new file, a moved one and a new import are found here. What imports
may point where is stated in tests/test_architecture.py.
"""

import argparse
import ast
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "soft_diffusion_tf"
FOLDERS = (PACKAGE, "configs", "docs", "tests", "tools")

# Distributions that are not named like what is imported from them.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl_py",
  "google": "protobuf",
  "skimage": "scikit_image",
  "sklearn": "scikit_learn",
  "yaml": "pyyaml",
}
# Distributions that another one needs and does not declare.
BESIDE = {
  "tensorflow_datasets": ["importlib_resources"],
  "tensorflow_probability": ["tf_keras"],
}
# Imported only where they are installed, so no target depends on them.
OPTIONAL = {"jax", "jaxlib", "ot", "ott", "torch"}

HEAD = '''"""Build targets. tools/build.py writes this file from the imports of the sources."""

load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

# What is no Python: a test that reads files of the project, or starts its programs, takes them all.
filegroup(
  name="tree",
  srcs=glob(
    ["*", "configs/**", "docs/**", "soft_diffusion_tf/**", "tests/**", "tools/**"],
    exclude=["**/__pycache__/**"],
  ),
)
'''
# Bazel would lay an empty __init__.py into configs/, tests/ and tools/, which are no packages.
NO_INIT = "  legacy_create_init=0,"


class Unknown(Exception):
  """An import that is neither the project's nor locked."""


@functools.cache
def sources():
  """The paths of all Python files of the project, from its root."""
  files = [ROOT / "setup.py"]
  for folder in FOLDERS:
    files += (ROOT / folder).rglob("*.py")
  return tuple(sorted(f.relative_to(ROOT).as_posix() for f in files))


@functools.cache
def modules():
  """What can be imported of the project: dotted name → path."""
  dotted = lambda source: source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
  return {dotted(source): source for source in sources()}


@functools.cache
def _tree(source):
  return ast.parse((ROOT / source).read_text(encoding="utf-8"))


@functools.cache
def imports(source):
  """The dotted names that a file imports, anywhere in it, also by importlib."""
  names = set()
  for node in ast.walk(_tree(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      # `from package import module` imports the module; `from package import name` the package.
      members = {f"{node.module}.{alias.name}" for alias in node.names}
      names |= members & modules().keys()
      if not members <= modules().keys():
        names.add(node.module)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      finds = node.func.attr in ("find_spec", "import_module", "importorskip")
      if finds and node.args and isinstance(node.args[0], ast.Constant):
        names.add(node.args[0].value)
  return frozenset(names)


def packages_of(source):
  """The `__init__.py` files that Python runs when it imports a file."""
  above = pathlib.PurePosixPath(source).parents
  files = {f"{folder}/__init__.py" for folder in above if str(folder) != "."}
  return (files & set(sources())) - {source}


@functools.cache
def project_imports(source):
  """The files of the project that a file imports, without its own packages."""
  found = {modules()[name] for name in imports(source) if name in modules()}
  # A program that runs as a file finds what lies beside it.
  beside = {f"{pathlib.PurePosixPath(source).parent}/{name}.py" for name in imports(source)}
  return frozenset((found | (beside & set(sources()))) - {source})


@functools.cache
def locked():
  """The distributions in requirements.lock."""
  lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
  return {re.sub(r"[-.]+", "_", line.split("==")[0]).lower() for line in lines if "==" in line}


@functools.cache
def requirements(source):
  """The distributions that a file imports from."""
  found = set()
  for name in imports(source):
    top = name.split(".")[0]
    beside = f"{pathlib.PurePosixPath(source).parent}/{top}.py"
    if top in {*sys.stdlib_module_names, *OPTIONAL, *FOLDERS} or beside in sources():
      continue
    distribution = DISTRIBUTIONS.get(top, top)
    if distribution not in locked():
      raise Unknown(
        f"{source} imports {name!r}, which requirements.lock does not have: lock it, or name its "
        "distribution in DISTRIBUTIONS or OPTIONAL of tools/build.py"
      )
    found |= {distribution, *BESIDE.get(distribution, [])}
  return frozenset(found)


def _needs(source):
  """All that has to be there when a file is imported."""
  return project_imports(source) | packages_of(source)


@functools.cache
def groups():
  """The files of each target.

  A file is a target of its own. A package whose `__init__.py` imports its own modules is one target
  with them, for each of them needs the package and the package needs them.
  """
  together = {source: {source} for source in sources()}
  for package in sources():
    if not package.endswith("/__init__.py"):
      continue
    reached, todo = set(), [package]
    while todo:
      new = _needs(todo.pop()) - reached
      reached |= new
      todo += new
    inside = {s for s in reached if package in packages_of(s)}
    if inside:
      for source in inside | {package}:
        together[source] = inside | {package}
  return {tuple(sorted(group)) for group in together.values()}


def name_of(group):
  """The name of a target."""
  first = min(group, key=lambda s: (s.count("/"), not s.endswith("__init__.py"), s))
  path = first.removesuffix(".py").removesuffix("/__init__").removeprefix(f"{PACKAGE}/")
  return path.replace("/", "_")


def programs(group):
  """The files that run as programs."""
  return [s for s in group if 'if __name__ == "__main__"' in (ROOT / s).read_text("utf-8")]


def _rule(group):
  if any(pathlib.PurePosixPath(s).name.startswith("test_") for s in group):
    return "py_test"
  return "py_binary" if programs(group) else "py_library"


def _reads_files(group):
  """Whether a test looks beyond what it imports: at files, or at programs that it starts."""
  looks = {"subprocess", "runpy", "tests.forks", "tests.standin"}
  named = lambda s: any(isinstance(n, ast.Name) and n.id == "__file__" for n in ast.walk(_tree(s)))
  return any(imports(s) & looks or named(s) for s in group)


def _listed(key, values):
  if len(values) < 2:
    return [f'  {key}=["{v}"],' for v in values]
  return [f"  {key}=[", *(f'    "{v}",' for v in values), "  ],"]


def targets():
  """Name → (rule, sources, targets that it needs, distributions that it needs)."""
  owner = {source: name_of(group) for group in groups() for source in group}
  if len(set(owner.values())) != len(groups()):
    names = [name_of(group) for group in groups()]
    twice = sorted({n for n in names if names.count(n) > 1})
    raise Unknown(f"two targets are called {twice[0]!r}: rename one of the files")
  found = {}
  for group in groups():
    rule = _rule(group)
    needs = {owner[n] for source in group for n in _needs(source)} - {name_of(group)}
    outside = set().union(*(requirements(source) for source in group))
    if rule == "py_test":
      needs |= {owner["tests/conftest.py"]}
      outside |= {"pytest"}
    found[name_of(group)] = (rule, list(group), sorted(needs), sorted(outside))
  return found


def text():
  """What BUILD should hold."""
  parts = [HEAD]
  for name, (rule, group, needs, outside) in sorted(targets().items()):
    lines = [f"{rule}(", f'  name="{name}",']
    if rule == "py_test":
      # pytest runs the file: run by itself it would define its tests and end well.
      lines += ['  size="large",', *_listed("srcs", [*group, "tests/run.py"])]
      lines += ['  main="tests/run.py",', *_listed("args", group)]
      lines += [NO_INIT]
      data = [":tree"] if _reads_files(group) else ["pyproject.toml"]
      lines += _listed("data", data)
    else:
      lines += _listed("srcs", group)
      if rule == "py_binary":
        lines += [f'  main="{programs(group)[0]}",', NO_INIT]
      if name == PACKAGE:  # models, the page and the like, which lie in the package's folders
        lines += [f'  data=glob(["{PACKAGE}/**"], exclude=["**/*.py", "**/__pycache__/**"]),']
    needs = [f":{n}" for n in needs] + [f"@pypi//{d}" for d in outside]
    lines += _listed("deps", needs)
    parts.append("\n".join([*lines, ")\n"]))
  return "\n".join(parts)


def main():
  parser = argparse.ArgumentParser(description="Writes BUILD from the imports of the sources.")
  parser.add_argument("--check", action="store_true", help="only say whether BUILD is up to date")
  check = parser.parse_args().check
  try:
    new = text()
  except Unknown as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  file = ROOT / "BUILD"
  if not check:
    file.write_text(new, encoding="utf-8")
  elif not file.is_file() or file.read_text(encoding="utf-8") != new:
    print("error: BUILD is not what the sources say: run `python tools/build.py`", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
