"""What comes with the package by name, and what is said of a package that is missing."""

import pathlib
import sys

import pytest

from soft_diffusion_tf import data, experiment, packages, plots, shipped
from soft_diffusion_tf.evaluation import distances

ROOT = pathlib.Path(__file__).parents[1]


def test_every_config_has_its_files_name():
  known = shipped.configs()
  assert {name: pathlib.Path(file) for name, file in known.items()} == {
    file.stem: file for file in (ROOT / "configs").glob("*.py")
  }
  assert experiment.from_file("digits_blur") == experiment.from_file(known["digits_blur"])


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert shipped.config("digits_blur") == str(ROOT / "configs" / "digits_blur.py")
  (tmp_path / "digits_blur").write_text("mine")
  assert shipped.config("digits_blur") == "digits_blur"


@pytest.mark.parametrize(
  ("name", "near"),
  [
    ("digit_blur", "digits_blur"),
    ("cifar10_blurr", "cifar10_blur"),
    ("celeba64ve", "celeba64_ve"),
    ("configs/digits_mask.py", "digits_mask"),
    ("", ""),
    ("no/such/folder/cifar10.py", "cifar10_"),
  ],
)
def test_an_unknown_name_names_the_nearest(name, near, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=rf"^no such config file.*; did you mean {near}\w*\?$"):
    shipped.config(name)


@pytest.mark.parametrize(
  ("module", "work", "package"),
  [
    ("sklearn.datasets", lambda: data.load("digits", "train"), "scikit-learn"),
    ("tensorflow_datasets", lambda: data.load("cifar10", "train"), "tensorflow-datasets"),
    ("matplotlib", lambda: plots._figure(), "matplotlib"),
    ("tensorflow_gan", distances._classifier_metrics, "tensorflow-gan==2.1.0"),
  ],
)
def test_a_missing_package_is_one_line(module, work, package, monkeypatch):
  for name in [n for n in sys.modules if n == module or n.startswith(module + ".")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError) as error:
    work()
  text = str(error.value)
  assert f"needs {package} (" in text
  assert text.endswith(f"; pip install '{package}'")
  assert "\n" not in text


def test_what_else_goes_wrong_within_is_not_a_missing_package():
  with pytest.raises(ZeroDivisionError), packages.needed("numpy", "a test"):
    print(1 / 0)
