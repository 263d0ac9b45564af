"""Folders and archives of pictures: what lies in one, its splits and its class folders."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import tarfile
import tempfile
import threading
import typing
import zipfile

import numpy as np

from soft_diffusion_tf.data import celeba, doctor, pictures
from soft_diffusion_tf.data.labels import numbered
from soft_diffusion_tf.data.policy import shown

_LARGEST = 1 << 30  # bytes of a file in an archive
LABELS = "dataset.json"  # labels of pictures, as the tools of StyleGAN and EDM write them
PREFIX = "folder:"  # before the path of a folder of images
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz")
SPLIT = 'every tenth {} is "test", the others "train"'


@dataclasses.dataclass(frozen=True)
class Found:
  """What lies below a folder: `files` in order, and how much of what else was passed over."""

  files: list[pathlib.Path]
  hidden: int = 0
  other: tuple[str, ...] = ()  # names of files that are no pictures by name or content
  links: tuple[str, ...] = ()  # to folders that are read under another name
  listed: typing.Any = None  # a path or member: the list of labels, `LABELS`


def scan(folder):
  """The pictures below a folder, by `Found`; a ValueError for what is no folder.

  A file is a picture by its name or its content. What begins with "." is hidden. A link to a folder
  is followed, but every folder is read once.
  """
  folder = pathlib.Path(folder)
  if folder.is_file() and (folder.suffix.lower() in _ARCHIVES or _is_archive(folder)):
    return _scan_archive(folder)
  if folder.is_file():
    raise ValueError(f"{folder} is a file; give the folder that holds the images")
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder of images; is the path right?")
  files, other, links, waiting = [], [], [], [folder]
  hidden, seen = 0, {folder.resolve()}
  while waiting:
    linked = []
    while waiting:  # the folders that are no links first, under their own names
      try:
        entries = sorted(waiting.pop().iterdir())
      except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from None
      for entry in entries:
        if entry.name.startswith("."):
          hidden += 1
        elif entry.is_dir():
          if entry.is_symlink():
            linked.append(entry)
          elif (place := entry.resolve()) not in seen:
            seen.add(place)
            waiting.append(entry)
        elif _is_candidate(entry):
          files.append(entry)
        else:
          other.append(entry.name)
    for entry in sorted(linked):
      if (place := entry.resolve()) in seen:
        links.append(str(entry.relative_to(folder)))
      else:
        seen.add(place)
        waiting.append(entry)
  listed = folder / LABELS
  return Found(
    sorted(files), hidden, tuple(other), tuple(links), listed if listed.is_file() else None
  )


def list_images(folder):
  """Image files below a folder, sorted; a ValueError when there are none."""
  if not (files := scan(folder).files):
    raise ValueError(f"{folder}: no image files in it or below; is the path right?")
  return files


def _is_candidate(entry):
  """Whether a file is a picture by its name, or else by its content; a broken link by its name."""
  named = entry.suffix.lower() in pictures.suffixes()
  if not entry.exists():
    return named and entry.is_symlink()
  return entry.is_file() and (named or pictures.is_picture(entry))  # no pipe, no device


@dataclasses.dataclass(frozen=True, order=True)
class Member:
  """A file in an archive, with as much of a `pathlib.Path` as is asked of one here."""

  inside: pathlib.PurePosixPath
  archive: str = dataclasses.field(compare=False)  # the path of the archive
  size: int = dataclasses.field(compare=False)
  stamp: str = dataclasses.field(compare=False)  # another for another content
  read: typing.Callable = dataclasses.field(compare=False, repr=False)  # () → the content

  @property
  def name(self):
    return self.inside.name

  def open(self, mode="rb"):
    if self.size > _LARGEST:
      raise MemoryError("it is larger unpacked than a picture may be")
    return io.BytesIO(self.read())

  def __fspath__(self):
    return f"{self.archive}/{self.inside}"

  __str__ = __fspath__


def _is_archive(path):
  """Whether a file begins like an archive, sound or not."""
  try:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
  except Exception:  # of a compressed one that is damaged
    return True


def _scan_archive(path):
  """What lies in a zip or tar file; of two files of one name the last, as when it is unpacked."""
  try:
    members = _of_zip(path) if zipfile.is_zipfile(path) else _of_tar(path)
  except _NoTemporary as error:
    raise ValueError(
      f"{path}: it is unpacked into a temporary file, and there is no room for it ({error}); name "
      "another folder by TMPDIR, or unpack it yourself"
    ) from None
  except Exception as error:  # both modules raise many kinds for what is damaged
    text = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{path}: cannot be read as an archive ({text}); copy it again") from None
  files, other, hidden, listed = [], [], 0, None
  for member in {member.inside: member for member in members}.values():
    if any(part.startswith((".", "__MACOSX")) for part in member.inside.parts):
      hidden += 1
    elif member.inside.suffix.lower() in pictures.suffixes() or pictures.is_picture(member):
      files.append(member)
    else:
      other.append(member.name)
      listed = member if str(member.inside) == LABELS else listed
  return Found(sorted(files), hidden, tuple(other), listed=listed)


def _of_zip(path):
  archive = zipfile.ZipFile(path)
  return [
    Member(
      pathlib.PurePosixPath(info.filename),
      str(path),
      info.file_size,
      f"{info.CRC:08x}",
      functools.partial(archive.read, info),
    )
    for info in archive.infolist()
    if not info.is_dir()
  ]


class _NoTemporary(Exception):
  """A temporary file cannot be made, or the disk is full."""


def _unpacked(stream):
  """A temporary file of all that a stream gives, at its beginning."""
  try:
    plain = tempfile.TemporaryFile()  # noqa: SIM115
  except OSError as error:
    raise _NoTemporary(error.strerror) from None
  while block := stream.read(1 << 20):
    try:
      plain.write(block)
      plain.flush()
    except OSError as error:
      raise _NoTemporary(error.strerror) from None
  plain.seek(0)
  return plain


def _of_tar(path):
  """Of a tar file; one that is compressed is unpacked into a file without a name, to jump in it."""
  with open(path, "rb") as file, contextlib.closing(tarfile.open(fileobj=file)) as packed:
    compressed = not isinstance(packed.fileobj, io.BufferedReader)
    if compressed:
      packed.fileobj.seek(0)
      plain = _unpacked(packed.fileobj)
    else:
      plain = open(path, "rb")  # noqa: SIM115
  archive, alone = tarfile.open(fileobj=plain), threading.Lock()  # noqa: SIM115

  def content(info):
    try:
      with alone, archive.extractfile(info) as file:
        return file.read()
    except (KeyError, TypeError, RecursionError):  # to nothing; to a folder; to itself
      raise OSError(f"a link to {info.linkname}, which is no file in the archive") from None

  members = archive.getmembers()  # it ends without a word where a header is damaged or missing
  plain.seek(archive.offset)
  if plain.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
    raise ValueError("it is cut off or damaged: no end is marked")

  return [
    Member(
      pathlib.PurePosixPath(info.name),
      str(path),
      info.size,
      f"{info.mtime:.6f}",
      functools.partial(content, info),
    )
    for info in members
    if info.isfile() or info.islnk() or info.issym()
  ]


def stamp(file):
  """A text that tells whether a picture is still the same: its place, its size, when it changed."""
  if isinstance(file, Member):
    return f"{file.inside} {file.size} {file.stamp}"
  try:
    about = os.stat(file)
  except OSError:  # a broken link
    return f"{file} -"
  return f"{file} {about.st_size} {about.st_mtime_ns}"


def _class_of(file, folder):
  """The folder that a file lies in, below the one that was asked for."""
  parent = file.inside.parent if isinstance(file, Member) else file.parent.relative_to(folder)
  return os.fsencode(parent).decode("utf-8", "backslashreplace")  # a name that is no text


def _labels_of(folder, found):
  """(int64 [N], names) of the labels of all files: by the list that lies there, or by folders."""
  if found.listed is not None:
    place = lambda f: str(f.inside) if isinstance(f, Member) else f.relative_to(folder).as_posix()
    try:
      with pictures.opened(found.listed) as file:
        given = json.load(file)["labels"]
      known = None if given is None else {str(name): label for name, label in given}
      texts = [] if known is None else [known[place(f)] for f in found.files]
      numbers, names = numbered(texts) if texts else (np.zeros([len(found.files)], np.int64), ())
    except KeyError as error:
      raise ValueError(
        f"{found.listed}: it has no {error}; mend it, or take it away for labels by folders"
      ) from None
    except Exception as error:  # whatever a file of that name may hold
      raise ValueError(
        f"{found.listed}: no list of labels ({error}); mend it, or take it away"
      ) from None
    if numbers is None:
      raise ValueError(f"{found.listed}: labels must be one whole number or text for each picture")
    return numbers, names
  classes, numbers = np.unique([_class_of(f, folder) for f in found.files], return_inverse=True)
  return numbers.astype(np.int64), tuple(map(str, classes))


def held_out(count, split, what="a folder"):
  """Which of so many images in order belong to a split, bool [count]: every tenth to "test"."""
  tenth = np.arange(count) % 10 == 9
  keep = {"all": tenth | True, "train": ~tenth, "test": tenth}.get(split)
  if keep is None:
    raise ValueError(
      f"{what} has no split {split!r}; choose one of all, train, test, or {PREFIX}PATH of another "
      "folder"
    )
  return keep


def read(folder, split, shape, crop, report):
  """(images, labels, names of the labels) of a split of a folder, prepared.

  An image's label is the folder that it lies in, or what dataset.json says.
  """
  found = scan(folder)
  if not found.files:
    raise ValueError(f"{folder}: no image files in it or below; is the path right?")
  parts = celeba.parts_of(folder, [f.name for f in found.files])
  keep = held_out(len(found.files), split) if parts is None else celeba.held_out(parts, split)
  files = [f for f, kept in zip(found.files, keep) if kept]
  if not files:
    needs = "it takes at least 10 images" if parts is None else f"by {celeba.SAID}"
    raise ValueError(f"{folder}: the split {split!r} is empty; {needs}")
  numbers, names = _labels_of(folder, found)
  channels = None if shape is None else shape[2]
  if crop == "auto":
    aligned = parts is not None and _size_of(files[0]) == celeba.SHAPE
    crop = "celeb_a_140" if aligned else "centre"

  def one(path):
    picture = pictures.read(path, report.policy, channels)
    return *doctor.examine(picture, path, shape, crop, report.policy), path

  images, kept = doctor.collect(
    one, files, len(files), report, shape, "reading images", stamp=stamp
  )
  report.total = len(found.files)
  _remark(report, folder, found, parts)
  return images, numbers[keep][kept], names


def remark_split(report, count, what="file, in the order of the paths,"):
  """Says how many of so many images are held out, where that is the split's rule."""
  if report.whole_split:
    return
  text = SPLIT.format(what)
  report.remarks.append(("split", f"{text}: {count - count // 10:,} and {count // 10:,}"))


def _size_of(path):
  try:
    return pictures.read(path).pixels.shape[:2]
  except ValueError:  # which the doctor will name
    return ()


def _remark(report, folder, found, parts):
  passed = []
  if found.hidden:
    passed.append(f"{found.hidden:,} hidden files or folders")
  if found.listed is not None:
    report.remarks.append(("labels by", str(found.listed)))
  if found.other:
    named = ", ".join(map(shown, found.other[:3])) + (" …" if len(found.other) > 3 else "")
    passed.append(f"{len(found.other):,} that are no pictures ({named})")
  if found.links:
    passed.append(f"links to folders that are read anyway: {', '.join(map(shown, found.links))}")
  if passed:
    report.remarks.append(("passed over", "; ".join(passed)))
  if parts is not None:
    counts = ", ".join(f"{k} {parts.count(v):,}" for k, v in celeba.SPLITS.items() if k != "valid")
    lost = f"; {n:,} images are not in it, and only in all" if (n := parts.count("")) else ""
    report.remarks.append(("split", f"{celeba.SAID}: {counts}{lost}"))
    return
  if report.whole_split:
    return
  remark_split(report, len(found.files))
  for name in ("train", "test", "val", "valid"):
    if (folder / name).is_dir():
      field = "train" if name == "train" else "test"
      report.remarks.append(
        ("", f"of folders as splits, give data.{field}_split=folder:{folder / name} and the like")
      )
      break
