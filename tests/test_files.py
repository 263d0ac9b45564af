"""Files that appear whole or not at all, records and locks."""

import json
import multiprocessing.pool
import os

import pytest

from soft_diffusion_tf import files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
  path = tmp_path / "deep" / "a.json"
  files.write_json(path, [1])

  def fails():
    with files.atomic(path) as partial:
      partial.write_text("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fails()
  assert json.loads(path.read_text()) == [1]
  assert [f.name for f in path.parent.iterdir()] == ["a.json"]


def test_threads_write_the_same_file(tmp_path):
  path = tmp_path / "a.json"
  with multiprocessing.pool.ThreadPool(8) as pool:
    pool.map(lambda k: files.write_json(path, [k] * 200), range(200))
  assert len(set(json.loads(path.read_text()))) == 1
  assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def fill(text):
  return lambda folder: (folder / "mark").write_text(text)


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path):
  out = tmp_path / "k"
  files.write_folder(out, fill("precious"), mark="mark")
  out.rename(tmp_path / ".k.old")  # killed here

  def fails(folder):
    raise RuntimeError

  with pytest.raises(RuntimeError):
    files.write_folder(out, fails, True, "mark")
  assert (out / "mark").read_text() == "precious"
  files.write_folder(out, fill("new"), True, "mark")
  assert (out / "mark").read_text() == "new"
  assert [f.name for f in tmp_path.iterdir()] == ["k"]


def test_a_link_to_a_folder_stays_one(tmp_path):
  files.write_folder(tmp_path / "real", fill("old"), mark="mark")
  (tmp_path / "link").symlink_to(tmp_path / "real")
  for text in ("new", "newer"):
    files.write_folder(tmp_path / "link", fill(text), True, "mark")
    assert (tmp_path / "real" / "mark").read_text() == text
  assert (tmp_path / "link").is_symlink()


def test_records_that_are_torn_are_left_out(tmp_path):
  path = tmp_path / "r.jsonl"
  assert files.read_records(path) == []
  files.append_record(path, {"a": "x\u2028y"})
  with path.open("ab") as file:
    file.write(b'{"a": "\xff' + b"\n" + b"[" * 100_000 + b"\n[1]\n" + b'{"b"')
  files.append_record(path, {"a": 2})
  assert files.read_records(path) == [{"a": "x\u2028y"}, {"a": 2}]


def test_a_folder_is_held_by_one(tmp_path):
  with files.lock(tmp_path / "w"), pytest.raises(ValueError, match="another process is training"):
    files.lock(tmp_path / "w").__enter__()
  (tmp_path / "x" / ".lock").mkdir(parents=True)
  with pytest.raises(IsADirectoryError):
    files.lock(tmp_path / "x").__enter__()


def test_what_is_there_is_replaced_by_consent_alone(tmp_path):
  (tmp_path / "a").write_text("mine")
  (tmp_path / "d").mkdir()
  for path, options, text in (
    ("a", {}, "is there already; give another --out, or --force"),
    ("d", {}, "--out=.* is a folder; give the name of a file"),
    ("d", {"force": True, "mark": "m"}, "is not a folder with m in it"),
  ):
    with pytest.raises(ValueError, match=text):
      files.refuse_to_overwrite(tmp_path / path, **{"force": False, **options})
  files.refuse_to_overwrite(tmp_path / "a", True)
  files.refuse_to_overwrite(tmp_path / "new", False)
  with pytest.raises(ValueError, match="cannot be written"):
    files.check_folder(tmp_path / "a" / "b")
  assert sorted(os.listdir(tmp_path)) == ["a", "d"]
