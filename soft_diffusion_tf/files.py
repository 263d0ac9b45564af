"""Files that appear whole or not at all, files of records, locks, and what may be overwritten.

A reader, and a program that goes on after a kill, find the old file or the new one, never half of
one.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import tempfile

_COUNT = itertools.count()  # of the files that this process has begun


# --- Whole or not at all --------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
  """Writes a file atomically: gives a path to write to, which becomes `path` at the end.

  The folder is made where there is none. After an error `path` is what it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  own = f"{os.getpid()}-{next(_COUNT)}"  # several threads may write the same file
  partial = path.with_name(f".{path.stem[:150]}.{own}.partial{path.suffix}")
  try:
    yield partial
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_text(path, text):
  """Writes a text (UTF-8), whole or not at all."""
  with atomic(path) as partial:
    partial.write_text(text, encoding="utf-8")


def write_json(path, content, **options):
  """Writes a value as JSON, whole or not at all; `options` are those of `json.dumps`."""
  write_text(path, json.dumps(content, **({"indent": 1} | options)) + "\n")


def write_folder(out, fill, force=False, mark=None):
  """Makes a folder by `fill(folder)`; it appears whole or not at all.

  Args:
    force, mark: see `refuse_to_overwrite`.
  """
  out = pathlib.Path(out)
  if out.is_symlink():
    out = out.resolve()
  old = out.with_name(f".{out.name}.old")
  if old.exists() and not out.exists():  # a kill came between the two renames below
    old.rename(out)
  partial = out.with_name(f".{out.name}.{os.getpid()}-{next(_COUNT)}.partial")
  partial.mkdir(parents=True)
  try:
    fill(partial)
    refuse_to_overwrite(out, force, mark=mark)  # what came meanwhile, too
    shutil.rmtree(old, ignore_errors=True)
    replaced = out.exists()
    if replaced:
      out.rename(old)
    try:
      partial.rename(out)
    except OSError:
      if replaced and not out.exists():
        old.rename(out)
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


def reserve(file, size):
  """Makes an open file `size` bytes long, its space taken at once where the system can do that.

  Raises:
    OSError: the disk has no room for it.
  """
  os.truncate(file.fileno(), size)
  if hasattr(os, "posix_fallocate"):  # macOS has none: there a full disk is found while writing
    os.posix_fallocate(file.fileno(), 0, size)


# --- Records --------------------------------------------------------------------------------------


def append_record(path, record):
  """Adds a line of JSON to a file, after a newline where a killed writer left half a line."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "ab+") as file:
    file.seek(0, os.SEEK_END)
    torn = False
    if file.tell():
      file.seek(-1, os.SEEK_END)
      torn = file.read(1) != b"\n"
    file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read_records(path):
  """The records of such a file; half lines are left out."""
  path = pathlib.Path(path)
  records = []
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  for line in text.split("\n"):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(record, dict):
      records.append(record)
  return records


# --- Locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(
  folder,
  busy="another process is training in it; wait for it or take another workdir",
  wait=False,
  name=None,
):
  """Holds a folder for one process; the second waits, or gets a ValueError with the text `busy`.

  Args:
    name: what the error calls the folder, instead of its path.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      raise ValueError(f"{name or folder}: {busy}") from None
    yield


# --- What may be overwritten ----------------------------------------------------------------------


def refuse_to_overwrite(path, force, flag="out", mark=None):
  """Raises the ValueError of a file or folder that is there already, unless `force` may replace it.

  Args:
    force: replaces what its own kind has written: a file, or a folder with `mark` in it.
    flag: the name of the flag that gave the path.
    mark: the path of a file in every such folder; None where `path` is a file.
  """
  path = pathlib.Path(path)
  if not os.path.exists(path):
    return
  if mark is None and os.path.isdir(path):
    raise ValueError(f"--{flag}={path} is a folder; give the name of a file")
  if not force:
    raise ValueError(f"{path} is there already; give another --{flag}, or --force to replace it")
  if mark is not None and not (path / mark).is_file():
    raise ValueError(
      f"{path} is not a folder with {mark} in it, and --force replaces nothing else; give another "
      f"--{flag}"
    )


def check_folder(folder, flag="out", path=None):
  """Raises the ValueError of a folder, named by `flag`, that is none, or cannot be written to.

  Before any work is done. Nothing is left there, and no folder is made.
  """
  place = pathlib.Path(folder)
  try:
    pathlib.Path(path or folder).exists()  # raises for a name that is too long
    while not place.exists():
      place = place.parent
    with tempfile.TemporaryFile(dir=place):
      pass
  except OSError as error:
    why = f"{place} is a file" if place.is_file() else error.strerror or error
    raise ValueError(
      f"--{flag}={path or folder}: cannot be written ({why}); give another --{flag}"
    ) from None


def check_file(path, force, flag="out"):
  """Raises the ValueError of a file, named by `flag`, that is there already, unless `force`, or
  that cannot be written. Before any work is done.
  """
  refuse_to_overwrite(path, force, flag)
  check_folder(pathlib.Path(path).parent, flag, path)


def keep_apart(out, source, inside=False):
  """Raises the ValueError of an `out` that is, holds or, if not `inside`, lies in what is read."""
  to, read = pathlib.Path(out).resolve(), pathlib.Path(source).resolve()
  if read.exists() and (read.is_relative_to(to) or (to.is_relative_to(read) and not inside)):
    raise ValueError(f"--out={out} would mix with {source}, which is read; give another --out")
