"""Packs: prepared images in a file that is mapped into memory, for data sets of any size.

A pack is a folder. pack.json says what is in it: source, splits, labels' names, how the images were
prepared, and a digest of each block. A split's images lie one after the other, uint8 [N, H, W, C],
in one file, so the place of an image is its number times its size: a read is one copy out of the
system's cache. Of 5,000 images of 64×64×3 in batches of 128, drawn at random and in the cache, that
took 2.0 µs of a CPU for an image. ArrayRecord 0.8.6, without compression and in groups of one, took
33 µs, and as much space.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import time

import numpy as np
import tqdm

import soft_diffusion_tf
from soft_diffusion_tf import files
from soft_diffusion_tf.data import doctor
from soft_diffusion_tf.data.policy import Policy, Unusable

PREFIX = "pack:"  # before the path of a pack
FORMAT = 1
INDEX = "pack.json"
_BLOCK = 1 << 24  # bytes of a digest
_PLAN = "plan.json"  # what an unfinished pack is to be
_EVERY, _SECONDS = 4096, 5.0  # images, or time, after which a packer that is killed loses no more
_AGAIN = "pack it again with soft-diffusion-data pack"


def preparing(shape, crop, policy):
  """How images are prepared, as plain values by the names of the config's fields."""
  return {
    "data.image_shape": None if shape is None else list(shape),
    "data.crop": crop,
    "data.transparency": policy.transparency,
    "data.small": policy.small,
  }


class _NoSpace(ValueError):
  """The images do not fit on the disk."""


class PackStorage(doctor.Storage):
  """A file for the images of a split while they are read, and a journal of what was found.

  The journal has a line for each item of the source: its mark, and what the doctor found. A line is
  written when the image is on the disk. So a packer that was killed goes on behind the last line,
  as long as the items have the marks that they had.
  """

  goes_on = True

  def __init__(self, path):
    self.path, self.made = path, None
    self._journal = path.with_suffix(".journal")
    self._found: list[tuple] = []  # (mark, what was found) of a packer before
    self._lines: list[str] = []  # that are not written yet
    self._written = time.monotonic()

  def __call__(self, name, count, shape):
    """An array uint8 [count, *shape] on the disk, whose space is taken at once."""
    row = int(np.prod(shape))
    self._found = _journalled(self._journal)
    whole = sum(not isinstance(found, Unusable) for _, found in self._found)
    if not self.path.exists() or self.path.stat().st_size < whole * row:
      self._found = []
      self._journal.unlink(missing_ok=True)
    with open(self.path, "ab") as file:
      try:
        files.reserve(file, max(1, count * row))
      except OSError as error:
        free = shutil.disk_usage(self.path.parent).free
        raise _NoSpace(
          f"{self.path.parent.parent}: {count:,} images take {count * row / 2**30:.2f} GiB, and "
          f"{free / 2**30:.2f} GiB are free ({error.strerror}); make room or give another --out"
        ) from None
    self.made = np.memmap(self.path, np.uint8, "r+", shape=(count, *shape))
    return self.made

  @property
  def before(self):
    """Items of which a packer before has found what there is."""
    return len(self._found)

  def known(self, place, mark):
    if place < len(self._found) and self._found[place][0] != mark:
      self._found = self._found[:place]  # what comes behind may lie at another place now
      text = "".join(_line(*each) for each in self._found)
      _put(self._journal, text.encode())
    return self._found[place][1] if place < len(self._found) else None

  def note(self, mark, found):
    self._lines.append(_line(mark, found))
    if len(self._lines) >= _EVERY or time.monotonic() - self._written > _SECONDS:
      self.commit()

  def commit(self):
    """Puts images and journal on the disk, in this order."""
    if self._lines:
      self.made.flush()
      with open(self._journal, "a", encoding="utf-8") as file:
        file.write("".join(self._lines))
        file.flush()
        os.fsync(file.fileno())
    self._lines, self._written = [], time.monotonic()


def _line(mark, found):
  """A line of the journal."""
  if isinstance(found, Unusable):
    content = [mark, found.kind, str(found.where), found.text]
  else:
    _, facts, place = found
    content = [mark, "", str(place), facts._replace(digest=facts.digest.hex())]
  return json.dumps(content) + "\n"


def _journalled(path):
  """[(mark, what was found)] of a journal, as far as its lines are whole."""
  found: list[tuple] = []
  if not path.exists():
    return found
  for line in path.read_text("utf-8", "replace").splitlines(keepends=True):
    try:
      mark, kind, where, content = json.loads(line)
      if kind:
        one = Unusable(kind, where, content)
      else:
        facts = doctor.Facts(*content)
        one = (
          None,
          facts._replace(
            done=tuple(facts.done), size=tuple(facts.size), digest=bytes.fromhex(facts.digest)
          ),
          where,
        )
    except (ValueError, TypeError, KeyError):
      break
    if not line.endswith("\n"):
      break
    found.append((mark, one))
  text = "".join(_line(*each) for each in found)  # what is written next begins a line
  _put(path, text.encode())
  return found


def _put(path, content):
  """Writes a file at once: it is never there by half."""
  other = path.with_name(f"{path.name}.new")
  with open(other, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(other, path)


@contextlib.contextmanager
def _alone(out, plan):
  """Holds the folder of an unfinished pack for one packer; what another plan left is cleared."""
  partial = out.with_name(f".{out.name}.partial")
  with files.lock(partial, "another process packs into it; wait or give another --out", name=out):
    text = json.dumps(plan, indent=1).encode()
    try:
      if not (partial / _PLAN).exists() or (partial / _PLAN).read_bytes() != text:
        for file in partial.iterdir():
          if file.name != ".lock":
            file.unlink()
        _put(partial / _PLAN, text)
      yield partial
    except Exception as error:
      full = isinstance(error, _NoSpace) or getattr(error, "errno", None) == errno.ENOSPC
      if full or not any(f.stat().st_size for f in partial.glob("*.journal")):
        shutil.rmtree(partial, ignore_errors=True)  # nothing in it is worth going on from
      raise


def write(out, load, name, splits, prepared, say=None):
  """Writes a pack: at its place when it is whole, not before.

  What a packer that was killed has done stays beside the place, in ".NAME.partial": the same call
  goes on from there. The pack is the same to the bit.

  Args:
    load: (split, storage) → `Source` whose images are in the storage, where the images go.
    prepared: see `preparing`.
    say: a function that gets a line where it goes on.

  Returns:
    {split: number of images}
  """
  out = pathlib.Path(out)
  _refuse_what_is_there(out)
  content = {
    "format": FORMAT,
    "version": soft_diffusion_tf.__version__,
    "source": name,
    "prepared": prepared,
    "splits": {},
  }
  with _alone(out, {**content, "splits": splits}) as partial:
    _refuse_what_is_there(out)  # another packer may have ended meanwhile
    for k, split in enumerate(splits):
      storage = PackStorage(partial / f"{k}.images")
      source = load(split, storage)
      if storage.before and say:
        say(f"{split}: {storage.before:,} were read by a packing before that was stopped")
      images = source.images
      written = storage.made is not None and np.may_share_memory(images, storage.made)
      if not written:  # a program had them already
        held, images = images, storage(name, len(images), images.shape[1:])
        images[:] = held
      storage.commit()
      storage.made.flush()
      shape, labels = list(images.shape), np.ascontiguousarray(source.labels, "<i8")
      os.truncate(storage.path, int(np.prod(shape)))
      (partial / f"{k}.labels").write_bytes(labels.tobytes())
      content["splits"][split] = {
        "shape": shape,
        "found": list(source.report),
        "label_names": list(source.label_names),
        "images": f"{k}.images",
        "labels": f"{k}.labels",
        "digests": _digests(storage.path),
        "labels_digest": _digests(partial / f"{k}.labels")[0],
      }
      del images, source
    content["digest"] = _digest_of(content)
    (partial / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    extra = [".lock", _PLAN, *(f.name for f in partial.glob("*.journal"))]
    for file in partial.iterdir():
      if file.name not in extra:
        with open(file, "rb") as whole:
          os.fsync(whole.fileno())
    partial.rename(out)
    for name in extra:  # only now: a packer that could not rename goes on from them
      (out / name).unlink(missing_ok=True)
  return {split: about["shape"][0] for split, about in content["splits"].items()}


def _refuse_what_is_there(out):
  if os.path.lexists(out):
    raise ValueError(f"{out} is there already; give another --out or remove it")


def _digest_of(content):
  """A digest of all else that an index says."""
  rest = {k: v for k, v in content.items() if k != "digest"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
    _check_index(content)
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(f"{path}: no {INDEX} in it; is it a pack of soft-diffusion-data?") from None
  except OSError as error:
    raise ValueError(f"{path / INDEX} cannot be read ({error.strerror}); {_AGAIN}") from None
  except _UNSOUND as error:
    raise ValueError(f"{path / INDEX} is damaged ({error}); {_AGAIN}") from None
  return content


class _Damaged(Exception):
  """An index says what none says that was written here."""


# What a damaged index raises where it is read and checked.
_UNSOUND = (
  _Damaged,
  KeyError,
  TypeError,
  AttributeError,
  RecursionError,
  UnicodeDecodeError,
  json.JSONDecodeError,
)


def _check_index(content):
  """Raises an error of an index that is not whole."""

  def demand(sound, what):
    if not sound:
      raise _Damaged(what)

  texts = lambda values: isinstance(values, list) and all(isinstance(v, str) for v in values)
  demand(content["digest"] == _digest_of(content), "its digest is of another content")
  demand(texts([content["source"], content["version"]]), "source and version")
  demand(isinstance(content["prepared"], dict), "prepared")
  shape = content["prepared"]["data.image_shape"]
  for name, split in content["splits"].items():
    whole = [isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in split["shape"]]
    demand(whole == [True] * 4 and shape in (None, split["shape"][1:]), f"the shape of {name}")
    for file in (split["images"], split["labels"]):
      named = isinstance(file, str) and file not in ("", ".", "..")
      demand(named and not {os.sep, "\0"} & set(file), f"the files of {name}")
    demand(texts([split["labels_digest"]]) and texts(split["digests"]), f"the digests of {name}")
    demand(texts(split["label_names"]), f"the names of the labels of {name}")


def read(path, split, shape, crop, policy, most=None, progress=True):
  """(images uint8 [N, H, W, C], labels, their names, the index) of a split of a pack.

  Args:
    shape, crop, policy: how the images are to be prepared: as they were, or a ValueError names the
      field. A shape of None takes what is there.
    most: bytes of images that are read into memory; more stay in the file, which is mapped, and so
      do all of them where it is None.
  """
  path = pathlib.Path(path)
  content = about(path)
  if split not in content["splits"]:
    raise ValueError(
      f"{path} has no split {split!r}; it has {', '.join(content['splits'])}: set data.train_split "
      f"and data.test_split to these, or {_AGAIN}"
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
  if (path / part["images"]).stat().st_size != np.prod(part["shape"], dtype=np.int64):
    raise ValueError(f"{path / part['images']} has not the size of its images; {_AGAIN}")
  images = np.memmap(path / part["images"], np.uint8, "r", shape=tuple(part["shape"]))
  if most is not None and images.nbytes <= most:
    images = np.array(images)
  labels = np.fromfile(path / part["labels"], "<i8").astype(np.int64)
  if len(labels) != len(images):
    raise ValueError(f"{path}: {len(images)} images and {len(labels)} labels; {_AGAIN}")
  names = tuple(part["label_names"])
  if names and not (labels.min() >= 0 and labels.max() < len(names)):
    raise ValueError(f"{path}: labels that have no name; {_AGAIN}")
  return images, labels, names, content


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
