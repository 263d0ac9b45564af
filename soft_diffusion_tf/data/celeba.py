"""CelebA's official split, for a folder or zip file of its aligned images (178×218 pixels)."""

import pathlib

import numpy as np

LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
SPLITS = {"train": "0", "valid": "1", "validation": "1", "test": "2"}
SHAPE = (218, 178)  # of an aligned image
SAID = "CelebA's own (list_eval_partition)"


def find_list(folder):
  """The list of the parts of CelebA in or beside a folder or zip file; None where there is none."""
  folder = pathlib.Path(folder).absolute()
  for place in (folder, folder.parent, folder.parent.parent):
    for name in LISTS:
      for file in (place / name, place / "Eval" / name, place / "Anno" / name):
        if file.is_file():
          return file
  return None


def parts_of(folder, names):
  """The part of each image, a text of `SPLITS` or ""; None for a folder of other images.

  Raises:
    ValueError: the list cannot be read.
  """
  file = find_list(folder)
  if file is None:
    return None
  try:
    rows = [row.replace(",", " ").split() for row in file.read_text("utf-8").splitlines()]
    known = {row[0]: row[1] for row in rows if row and row[0] != "image_id"}
  except (OSError, ValueError, IndexError) as error:
    raise ValueError(
      f"{file}: no list of the parts of CelebA ({error}); put the original there"
    ) from None
  found = [known.get(name, "") for name in names]
  return found if any(found) else None


def held_out(parts, split):
  """Which images belong to a split of the list, bool [N]."""
  if split == "all":
    return np.ones([len(parts)], bool)
  if split not in SPLITS:
    raise ValueError(f"CelebA has no split {split!r}; choose one of all, {', '.join(SPLITS)}")
  return np.array(parts) == SPLITS[split]
