"""A hook of mkdocs: a page of reference for every module of the package, made as the site is built.

A new module needs no file and no entry in mkdocs.yml.
"""

import pathlib

from mkdocs.structure.files import File

PACKAGE = "soft_diffusion_tf"
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE


def modules():
  """The dotted names of the package's modules, without the programs of `bin`."""
  names = []
  for file in sorted(ROOT.rglob("*.py")):
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if parts and parts[0] != "bin":
      names.append(".".join(parts))
  return sorted(names)


def on_config(config):
  """Adds the pages to the navigation."""
  config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in modules()]})
  return config


def on_files(files, config):
  """Adds the pages themselves."""
  for name in modules():
    text = f"# `{name}`\n\n::: {PACKAGE}.{name}\n"
    files.append(File.generated(config, f"reference/{name}.md", content=text))
  return files
