"""Packs: prepared images in a file that is mapped into memory, for data sets of any size.

A pack is a folder. pack.json says what is in it: source, splits, labels' names, how the images were
prepared, and a digest of each block. A split's images lie one after the other, uint8 [N, H, W, C],
in one file, so the place of an image is its number times its size: a read is one copy out of the
system's cache. Of 5,000 images of 64×64×3 in batches of 128, drawn at random and in the cache, that
took 2.0 µs of a CPU for an image. ArrayRecord 0.8.6, without compression and in groups of one, took
33 µs, and as much space.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import tqdm

import soft_diffusion_tf
from soft_diffusion_tf.data.policy import Policy

PREFIX = "pack:"  # before the path of a pack
FORMAT = 1
INDEX = "pack.json"
_BLOCK = 1 << 24  # bytes of a digest
_AGAIN = "pack it again with soft-diffusion-data pack"


def preparing(shape, crop, policy):
  """How images are prepared, as plain values by the names of the config's fields."""
  return {
    "data.image_shape": None if shape is None else list(shape), "data.crop": crop,
    "data.transparency": policy.transparency, "data.small": policy.small,
  }  # fmt: skip


class Room:
  """A file for the images of a split, while they are read: what `doctor.allocate` is in memory."""

  def __init__(self, path):
    self.path, self.made = path, None

  def __call__(self, name, count, shape):
    """An array uint8 [count, *shape] on the disk, whose space is taken at once."""
    with open(self.path, "wb") as file:
      os.posix_fallocate(file.fileno(), 0, max(1, count * int(np.prod(shape))))
    self.made = np.memmap(self.path, np.uint8, "r+", shape=(count, *shape))
    return self.made


@contextlib.contextmanager
def _alone(out):
  """Holds a folder for one packer, and clears what a packer before left unfinished."""
  partial = out.with_name(f".{out.name}.partial")
  partial.mkdir(parents=True, exist_ok=True)
  with open(partial / ".lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(
        f"{out}: another process packs into it; wait or give another --out"
      ) from None
    for file in partial.iterdir():
      if file.name != ".lock":
        file.unlink()
    try:
      yield partial
    except BaseException:  # what is not whole is of no use
      shutil.rmtree(partial, ignore_errors=True)
      raise


def write(out, load, name, splits, prepared):
  """Writes a pack: at its place when it is whole, not before.

  Args:
    load: (split, room) → `Source` whose images are in the room, a function by which images are
      allocated.
    prepared: see `preparing`.

  Returns:
    {split: number of images}
  """
  out = pathlib.Path(out)
  if out.exists():
    raise ValueError(f"{out} is there already; give another --out or remove it")
  with _alone(out) as partial:
    content = {"format": FORMAT, "version": soft_diffusion_tf.__version__, "source": name,
               "prepared": prepared, "splits": {}}  # fmt: skip
    for k, split in enumerate(splits):
      room = Room(partial / f"{k}.images")
      source = load(split, room)
      images = source.images
      if room.made is None or not np.may_share_memory(images, room.made):  # it was there already
        held, images = images, room(name, len(images), images.shape[1:])
        images[:] = held
      images.flush()
      shape, labels = list(images.shape), np.ascontiguousarray(source.labels, "<i8")
      os.truncate(room.path, int(np.prod(shape)))
      (partial / f"{k}.labels").write_bytes(labels.tobytes())
      content["splits"][split] = {
        "shape": shape, "label_names": list(source.label_names),
        "images": f"{k}.images", "labels": f"{k}.labels",
        "digests": _digests(room.path), "labels_digest": _digests(partial / f"{k}.labels")[0],
      }  # fmt: skip
      del images, source
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (partial / INDEX).write_text(text, encoding="utf-8")
    for file in partial.iterdir():
      with open(file, "rb") as written:
        os.fsync(written.fileno())
    (partial / ".lock").unlink()
    partial.rename(out)
  return {split: about["shape"][0] for split, about in content["splits"].items()}


def _digests(path):
  found = []
  with open(path, "rb") as file:
    while block := file.read(_BLOCK):
      found.append(hashlib.sha256(block).hexdigest())
  return found or [hashlib.sha256().hexdigest()]


def about(path):
  """What a pack's index says; a ValueError of what is none, or of a newer version."""
  path = pathlib.Path(path)
  try:
    content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    if content["format"] > FORMAT:
      raise ValueError(
        f"{path} is a pack of version {content['version']}, and this is "
        f"{soft_diffusion_tf.__version__}: upgrade soft-diffusion-tf, or {_AGAIN}"
      )
    for split in content["splits"].values():
      if len(split["shape"]) != 4 or {split["images"], split["labels"]} & {"", ".", ".."}:
        raise KeyError("shape")
      if os.sep in split["images"] + split["labels"]:
        raise KeyError("images")
  except FileNotFoundError:
    raise ValueError(f"{path}: no {INDEX} in it; is it a pack of soft-diffusion-data?") from None
  except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path / INDEX} is damaged ({error}); {_AGAIN}") from None
  return content


def read(path, split, shape, crop, policy, most=0, progress=True):
  """(images uint8 [N, H, W, C], labels, their names, the index) of a split of a pack.

  Args:
    shape, crop, policy: how the images are to be prepared: as they were, or a ValueError names the
      field. A shape of None takes what is there.
    most: bytes of images that are read into memory; more stay in the file, which is mapped.
  """
  path = pathlib.Path(path)
  content = about(path)
  if split not in content["splits"]:
    raise ValueError(
      f"{path} has no split {split!r}; it has {', '.join(content['splits'])}: {_AGAIN}"
    )
  wanted, made = preparing(shape, crop, policy or Policy()), content["prepared"]
  for field, value in wanted.items():
    if value != made.get(field) and not (field == "data.image_shape" and value is None):
      raise ValueError(
        f"{path} was packed with {field} = {made.get(field)!r}, and {value!r} is asked for: set "
        f"{field} to that, or {_AGAIN}"
      )
  part = content["splits"][split]
  for file, digests in (("images", part["digests"]), ("labels", [part["labels_digest"]])):
    _check(path / part[file], digests, progress)
  images = np.memmap(path / part["images"], np.uint8, "r", shape=tuple(part["shape"]))
  if images.nbytes <= most:
    images = np.array(images)
  labels = np.fromfile(path / part["labels"], "<i8").astype(np.int64)
  if len(labels) != len(images):
    raise ValueError(f"{path}: {len(images)} images and {len(labels)} labels; {_AGAIN}")
  return images, labels, tuple(part["label_names"]), content


def _check(path, digests, progress):
  """Raises the ValueError of a file that is not what was packed."""
  try:
    size = path.stat().st_size
    with open(path, "rb") as file:
      blocks = tqdm.tqdm(digests, f"checking {path.name}", disable=None if progress else True)
      for k, digest in enumerate(blocks):
        if hashlib.sha256(file.read(_BLOCK)).hexdigest() != digest:
          raise ValueError(
            f"{path} is damaged or cut short in its bytes from {k * _BLOCK:,} on, of {size:,}; "
            f"copy it again, or {_AGAIN}"
          )
      if file.read(1):
        raise ValueError(f"{path} is longer than what was packed; copy it again, or {_AGAIN}")
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from None
