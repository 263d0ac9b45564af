import doctest
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_examples_run():
  result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
  assert result.attempted > 10
  assert result.failed == 0


def test_the_page_on_restoration_runs():
  page = str(ROOT / "docs" / "restoration.md")
  result = doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS)
  assert result.attempted > 5
  assert result.failed == 0


def test_names_and_files_that_it_mentions_exist():
  text = README.read_text(encoding="utf-8")
  tests = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").rglob("test_*.py"))
  for name in set(re.findall(r"`(test_\w+)`", text)):
    assert f"def {name}(" in tests, f"README names {name}, which is not a test"
  for path in set(re.findall(r"(?:configs|tools|docs|tests)/[\w/]+\.(?:py|md|png)", text)):
    assert (ROOT / path).is_file(), f"README names {path}, which does not exist"
