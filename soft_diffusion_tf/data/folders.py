"""Folders of pictures: what lies below one, its splits and its class folders."""

import dataclasses
import pathlib

import numpy as np

from soft_diffusion_tf.data import doctor, pictures
from soft_diffusion_tf.data.policy import shown

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
  keep = held_out(len(found.files), split)
  files = [f for f, kept in zip(found.files, keep) if kept]
  if not files:
    raise ValueError(f"{folder}: the split {split!r} is empty; it takes at least 10 images")
  crop = "centre" if crop == "auto" else crop
  channels = None if shape is None else shape[2]

  def one(path):
    picture = pictures.read(path, report.policy, channels)
    return *doctor.examine(picture, path, shape, crop, report.policy), path

  images, kept = doctor.collect(one, files, len(files), report, shape, "reading images")
  classes, numbers = np.unique(
    [str(f.parent.relative_to(folder)) for f in found.files], return_inverse=True
  )
  _remark(report, folder, found, keep)
  return images, numbers[keep][kept].astype(np.int64), tuple(map(str, classes))


def _remark(report, folder, found, keep):
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
  count, test = len(keep), len(keep) // 10
  report.remarks.append(("split", f"{SPLIT}: {count - test:,} and {test:,}"))
  for name in ("train", "test", "val", "valid"):
    if (folder / name).is_dir():
      field = "train" if name == "train" else "test"
      report.remarks.append(
        ("", f"of folders as splits, give data.{field}_split=folder:{folder / name} and the like")
      )
      break
