"""BUILD is the architecture: every source has one target, imports are declared and point down."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "soft_diffusion_tf"
FOLDERS = (PACKAGE, "configs", "tests", "tools")

# From the bottom up: a module may import only what stands above it in this list.
LAYERS = [
  "packages", "shipped", "trust", "arrays", "products", "faults", "rng", "gaussians", "neighbours",
  "images", "schedules", "sinkhorn", "corruptions",
  "networks.resampling", "networks.blocks", "networks.ncsnpp", "networks",
  "priors", "diffusion", "losses", "samplers", "oracles", "scheduling", "data", "laboratory",
  "strategies", "experiment", "memory", "model", "checkpoints", "plots", "monitoring", "bulk",
  "training", "score_sde",
  "classifier", "features", "memorisation", "evaluation", "sweeps", "restoration", "callbacks",
  "artefact", "serving",
  "bin", "bin.cli", "bin.train", "bin.sample", "bin.evaluate", "bin.export", "bin.restore",
  "bin.serve", "bin.schedule", "bin.reference_stats", "bin.lab", "bin.import_score_sde",
]  # fmt: skip

# What a room must never know of (besides what LAYERS rules out).
FORBIDDEN = {
  "losses": {"keras"},
  "samplers": {"keras", "pathlib", "soft_diffusion_tf.networks"},
  "networks": {"ml_collections", "soft_diffusion_tf.schedules", "soft_diffusion_tf.corruptions"},
  "sinkhorn": {"keras", "soft_diffusion_tf.corruptions"},
  "data": {"soft_diffusion_tf.diffusion", "soft_diffusion_tf.corruptions"},
}


def sources():
  files = [ROOT / "setup.py"]
  for folder in FOLDERS:
    files += (ROOT / folder).rglob("*.py")
  return sorted(f.relative_to(ROOT).as_posix() for f in files)


def targets():
  """BUILD's targets: name → (rule, srcs, deps)."""
  found = {}
  for node in ast.parse((ROOT / "BUILD").read_text(encoding="utf-8")).body:
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call) or not call.func.id.startswith("py_"):
      continue
    fields = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert fields["name"] not in found, f"BUILD names {fields['name']} twice"
    found[fields["name"]] = (call.func.id, fields.get("srcs", []), fields.get("deps", []))
  return found


def modules():
  """Dotted name → source, for everything of the project that can be imported."""
  result = {}
  for source in sources():
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    result[name] = source
  return result


def imports(source):
  """Dotted names that a source imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      names.add(node.module)
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def project_imports(source, known):
  found = {known[name] for name in imports(source) if name in known}
  # `from package import module` names the package too: the module is what is used, unless the
  # package's own file defines the name.
  used = {s for s in found if not s.endswith("__init__.py")}
  bare = set()
  for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module in known:
      path = known[node.module]
      if path.endswith("__init__.py") and any(
        f"{node.module}.{a.name}" not in known for a in node.names
      ):
        bare.add(path)
  return (used | bare) - {source}


def test_every_source_has_one_target():
  owners = {}
  for name, (_, srcs, _) in targets().items():
    for source in srcs:
      owners.setdefault(source, []).append(name)
  missing = [s for s in sources() if s not in owners]
  assert not missing, f"add to BUILD: {missing}"
  assert not [s for s in owners if s not in sources()], "BUILD names sources that do not exist"
  assert {s: o for s, o in owners.items() if len(o) > 1} == {}


def test_rules_fit_their_sources():
  for name, (rule, srcs, _) in targets().items():
    for source in srcs:
      test = pathlib.Path(source).name.startswith("test_")
      program = (
        'if __name__ == "__main__"' in (ROOT / source).read_text(encoding="utf-8") and not test
      )
      want = "py_test" if test else "py_binary" if program else "py_library"
      assert rule == want, f"{name}: {source} belongs in a {want}"


def test_every_import_is_declared_and_every_dependency_used():
  known, build = modules(), targets()
  owner = {source: name for name, (_, srcs, _) in build.items() for source in srcs}
  for name, (_, srcs, deps) in build.items():
    used = {owner[i] for source in srcs for i in project_imports(source, known)} - {name}
    declared = {d.removeprefix(":") for d in deps}
    assert used == declared, f"{name}: BUILD deps should be {sorted(':' + u for u in used)}"


def test_every_module_has_its_layer():
  names = {m.removeprefix(PACKAGE + ".") for m in modules() if m.startswith(PACKAGE + ".")}
  assert names == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer):
  known = modules()
  for source in project_imports(known[f"{PACKAGE}.{layer}"], known):
    if source == f"{PACKAGE}/__init__.py":
      continue
    other = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert LAYERS.index(other.removeprefix(PACKAGE + ".")) < LAYERS.index(layer), (
      f"{layer} must not import {other}"
    )


def test_rooms_do_not_know_what_they_must_not():
  known = modules()
  for room, forbidden in FORBIDDEN.items():
    for module, source in known.items():
      if module == f"{PACKAGE}.{room}" or module.startswith(f"{PACKAGE}.{room}."):
        assert not imports(source) & forbidden, f"{module} imports {imports(source) & forbidden}"


def test_one_importer_of_tensorflow_gan():
  named = [
    m for m, s in modules().items()
    if m.startswith(PACKAGE) and "tensorflow_gan" in (ROOT / s).read_text(encoding="utf-8")
  ]  # fmt: skip
  assert named == [f"{PACKAGE}.evaluation"]


def test_the_library_does_not_import_the_programs():
  known = modules()
  for module, source in known.items():
    if module.startswith(PACKAGE) and not module.startswith(f"{PACKAGE}.bin"):
      assert not any(i.startswith(f"{PACKAGE}.bin") for i in imports(source)), module
