"""Folders and zip files of pictures: what lies in one, its splits and its class folders."""

import dataclasses
import io
import pathlib
import zipfile

import numpy as np

from soft_diffusion_tf.data import celeba, doctor, pictures
from soft_diffusion_tf.data.policy import shown

_LARGEST = 1 << 30  # bytes of a file in a zip file
PREFIX = "folder:"  # before the path of a folder of images
SPLIT = 'every tenth file, in the order of the paths, is "test", the others "train"'


@dataclasses.dataclass(frozen=True)
class Found:
  """What lies below a folder: `files` in order, and how much of what else was passed over."""

  files: list[pathlib.Path]
  hidden: int = 0
  other: tuple[str, ...] = ()  # names of files that are no pictures by name or content
  links: tuple[str, ...] = ()  # to folders that are read under another name


def scan(folder):
  """The pictures below a folder, by `Found`; a ValueError for what is no folder.

  A file is a picture by its name or its content. What begins with "." is hidden. A link to a folder
  is followed, but every folder is read once.
  """
  folder = pathlib.Path(folder)
  if folder.is_file() and zipfile.is_zipfile(folder):
    return _scan_zip(folder)
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
  return Found(sorted(files), hidden, tuple(other), tuple(links))


def list_images(folder):
  """Image files below a folder, sorted; a ValueError when there are none."""
  if not (files := scan(folder).files):
    raise ValueError(f"{folder}: no image files in it or below; is the path right?")
  return files


def _is_candidate(entry):
  """Whether a file is a picture by its name, or else by its content; a broken link by its name."""
  named = entry.suffix.lower() in pictures.suffixes()
  return (named and entry.is_symlink()) or (
    entry.is_file() and (named or pictures.is_picture(entry))
  )


@dataclasses.dataclass(frozen=True, order=True)
class Member:
  """A file in a zip file, with as much of a `pathlib.Path` as is asked of one here."""

  inside: pathlib.PurePosixPath
  archive: zipfile.ZipFile = dataclasses.field(compare=False)

  @property
  def name(self):
    return self.inside.name

  def open(self, mode="rb"):
    if self.archive.getinfo(str(self.inside)).file_size > _LARGEST:
      raise MemoryError("it is larger unpacked than a picture may be")
    return io.BytesIO(self.archive.read(str(self.inside)))

  def __fspath__(self):
    return f"{self.archive.filename}/{self.inside}"

  __str__ = __fspath__


def _scan_zip(path):
  try:
    archive = zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
    raise ValueError(f"{path}: cannot be read as a zip file ({error}); copy it again") from None
  files, other, hidden = [], [], 0
  for info in archive.infolist():
    member = Member(pathlib.PurePosixPath(info.filename), archive)
    if info.is_dir():
      continue
    if any(part.startswith((".", "__MACOSX")) for part in member.inside.parts):
      hidden += 1
    elif member.inside.suffix.lower() in pictures.suffixes() or pictures.is_picture(member):
      files.append(member)
    else:
      other.append(member.name)
  return Found(sorted(files), hidden, tuple(other))


def _class_of(file, folder):
  """The folder that a file lies in, below the one that was asked for."""
  return str(file.inside.parent if isinstance(file, Member) else file.parent.relative_to(folder))


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

  An image's label is the folder that it lies in.
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
  channels = None if shape is None else shape[2]
  if crop == "auto":
    aligned = parts is not None and _size_of(files[0]) == celeba.SHAPE
    crop = "celeb_a_140" if aligned else "centre"

  def one(path):
    picture = pictures.read(path, report.policy, channels)
    return *doctor.examine(picture, path, shape, crop, report.policy), path

  images, kept = doctor.collect(one, files, len(files), report, shape, "reading images")
  classes, numbers = np.unique([_class_of(f, folder) for f in found.files], return_inverse=True)
  _remark(report, folder, found, parts)
  return images, numbers[keep][kept].astype(np.int64), tuple(map(str, classes))


def _size_of(path):
  try:
    return pictures.read(path).pixels.shape[:2]
  except ValueError:  # which the doctor will name
    return ()


def _remark(report, folder, found, parts):
  passed = []
  if found.hidden:
    passed.append(f"{found.hidden:,} hidden files or folders")
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
  count, test = len(found.files), len(found.files) // 10
  report.remarks.append(("split", f"{SPLIT}: {count - test:,} and {test:,}"))
  for name in ("train", "test", "val", "valid"):
    if (folder / name).is_dir():
      field = "train" if name == "train" else "test"
      report.remarks.append(
        ("", f"of folders as splits, give data.{field}_split=folder:{folder / name} and the like")
      )
      break
