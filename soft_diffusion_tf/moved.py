"""Names of version 0.1 that have moved: they work, with a DeprecationWarning, until 0.3."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

_PACKAGE = __name__.rpartition(".")[0]
MODULES = {  # old module → the one that has its names now
  "artefact": "export",
  "bulk": "drawing",
  "checkpoints": "training.checkpoints",
  "classifier": "evaluation.classifier",
  "features": "evaluation.features",
  "memorisation": "evaluation.memorisation",
  "monitoring": "training.monitoring",
  "scheduling": "transport",
  "sinkhorn": "transport.sinkhorn",
  "strategies": "training.strategies",
  "sweeps": "evaluation.sweeps",
}
NAMES = {  # "module.name" as it was → as it is
  "artefact.export": "export.save",
  "bulk.Drawer": "drawing.BatchSampler",
  "artefact.keep_apart": "files.keep_apart",
  "artefact.refuse_to_overwrite": "files.refuse_to_overwrite",
  "artefact.write_whole": "files.write_folder",
  "artefact.CARD": "export.folder.CARD",
  "artefact.CONFIG": "export.folder.CONFIG",
  "artefact.MARK": "export.folder.MANIFEST_PATH",
  "evaluation.PARTS": "evaluation.statistics.PARTS",
  "evaluation.SUBSET": "evaluation.statistics.SUBSET",
  "evaluation.append_record": "files.append_record",
  "evaluation.read_records": "files.read_records",
  "priors.grade": "laboratory.grade_prior",
  "restoration.rows": "restoration.plan",
  "training.NonFiniteLoss": "model.NonFiniteLoss",
  "training.lock": "files.lock",
}


def _find(name):
  """What "module.name" is now."""
  module, _, attribute = name.rpartition(".")
  return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), attribute)


def getter(module):
  """The `__getattr__` of a module that some names of `NAMES` have left."""
  module = module.removeprefix(f"{_PACKAGE}.")

  def get(name):
    new = NAMES.get(f"{module}.{name}")
    if new is None:
      raise AttributeError(f"module {_PACKAGE}.{module} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is {new} now", DeprecationWarning, stacklevel=2)
    return _find(new)

  return get


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Makes the old modules, whose names are those of the new ones."""

  def find_spec(self, fullname, path, target=None):
    if fullname.removeprefix(f"{_PACKAGE}.") in MODULES and fullname.startswith(_PACKAGE):
      return importlib.machinery.ModuleSpec(fullname, self)
    return None

  def exec_module(self, module):
    old = module.__name__.removeprefix(f"{_PACKAGE}.")
    new = MODULES[old]
    warnings.warn(f"{_PACKAGE}.{old} is {_PACKAGE}.{new} now", DeprecationWarning, stacklevel=2)
    module.__getattr__ = lambda name: _find(NAMES.get(f"{old}.{name}", f"{new}.{name}"))


def install():
  """Lets the old modules be imported."""
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
