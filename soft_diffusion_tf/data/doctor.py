"""The doctor: reads every image of a source once, and tells all that is wrong before it refuses."""

import collections
import concurrent.futures
import hashlib
import math
import os
import tempfile
import typing

import numpy as np
import tqdm

from soft_diffusion_tf import files
from soft_diffusion_tf.data import pictures
from soft_diffusion_tf.data.policy import REMEDIES, SMALL_REMEDY, Unusable, shown

_LISTED = 20  # files of a kind, where a training begins
_FIRST = 256  # images that space is made for where their number is not known
_NAMED = 3  # files of a kind, in the line of an error


class Refused(ValueError):
  """A source that holds more images which cannot be used than the policy leaves out."""


class Facts(typing.NamedTuple):
  """What the doctor keeps of an image: how it was found, and what becomes of it."""

  format: str
  mode: str
  orientation: int
  done: tuple[str, ...]
  size: tuple[int, int]
  digest: bytes  # of its pixels, before they are cut and shrunk
  flat: bool  # one colour all over
  lost: float  # share of its pixels that are cut off
  change: str  # "shrunk", "enlarged" or ""


def examine(picture, where, shape, crop, policy):
  """(prepared pixels, `Facts`) of a picture; raises `Unusable`."""
  pixels = picture.pixels
  prepared = pictures.prepare(pixels, where, shape, crop, policy.small == "enlarge")
  height, width = pixels.shape[:2]
  _, _, h, w = pictures.crop_box(height, width, shape, crop)
  change = ""
  if (h, w) != prepared.shape[:2]:
    change = "shrunk" if h * w > prepared.shape[0] * prepared.shape[1] else "enlarged"
  flat = bool((pixels == pixels[:1, :1]).all())
  lost = 1 - h * w / (height * width)
  return prepared, Facts(
    picture.format,
    picture.mode,
    picture.orientation,
    picture.done,
    (height, width),
    bytes.fromhex(digest(pixels)),
    flat,
    lost,
    change,
  )


def digest(values):
  """A digest of an array, or of bytes: 32 hexadecimal digits."""
  found = hashlib.blake2b(digest_size=16)
  found.update(values if isinstance(values, bytes) else np.ascontiguousarray(values))
  found.update(repr(getattr(values, "shape", ())).encode())
  return found.hexdigest()


class Report:
  """What was found in a source: `lines` is the table, `check` the refusal."""

  def __init__(self, name, split, shape, policy, keep=True, storage=None):
    self.keep, self.storage = keep, storage or Storage()  # the images, and where
    self.name, self.split, self.shape, self.policy = name, split, shape, policy
    self.facts: list[Facts] = []
    self.places: list[str] = []  # of each of the facts
    self.bad: list[Unusable] = []
    self.small: list[Unusable] = []  # left out by the policy
    self.labels: dict[str, int] = {}
    self.remarks: list[tuple[str, str]] = []  # further rows of the table
    self.what = "files"
    self.whole = 0  # images of a pack, which are not looked at
    self.total = 0  # images of all splits, where it is known
    self.whole_split = False  # a folder that is a split as a whole

  @property
  def count(self):
    """Images that were looked at."""
    return self.whole + len(self.facts) + len(self.bad) + len(self.small)

  @property
  def _of_source(self):
    """Images of all splits, as far as they are known."""
    return max(self.total, self.count)

  def add(self, where, facts):
    self.places.append(str(where))
    self.facts.append(facts)

  def leave_out(self, error):
    by_policy = error.kind == "small" and self.policy.small == "leave_out"
    (self.small if by_policy else self.bad).append(error)

  def count_labels(self, labels, names):
    """Counts the labels that were kept."""
    values, counts = np.unique(labels, return_counts=True)
    name = lambda k: names[k] if 0 <= k < len(names) else str(k)
    self.labels = {name(int(k)): int(n) for k, n in zip(values, counts)}

  def packed(self, index, count):
    """Takes what the index of a pack says: its images were looked at when it was made."""
    self.whole = count
    made = ", ".join(f"{k} {v}" for k, v in index["prepared"].items())
    self.remarks += [("packed from", f"{index['source']} by {index['version']}"), ("as", made)]
    others = (f"{k} {v['shape'][0]:,}" for k, v in index["splits"].items())
    self.remarks.append(("splits", ", ".join(others)))

  def duplicates(self):
    """Groups of places whose pixels are equal."""
    groups = collections.defaultdict(list)
    for place, facts in zip(self.places, self.facts):
      groups[facts.digest].append(place)
    return [group for group in groups.values() if len(group) > 1]

  def check(self):
    """Raises one line for all files that cannot be used, if they are more than the policy takes."""
    # Of the whole source: one share serves all of its splits.
    allowed = math.floor(self.policy.skip_bad * self._of_source + 1e-9)
    if len(self.bad) > allowed:
      raise Refused(self._refusal())
    if self.count and not self.facts and not self.whole:
      first = (self.small or self.bad)[0]
      remedy = SMALL_REMEDY if self.small else REMEDIES[first.kind]
      others = f", as are the other {self.count - 1} {self.what}" if self.count > 1 else ""
      raise Refused(f"{shown(first.where)}: {first.text}{others}; {remedy}")

  def _refusal(self):
    share = math.ceil(100 * len(self.bad) / self._of_source) / 100
    remedy = f"; data.skip_bad={share:g} leaves out what cannot be used" if share < 1 else ""
    if len(self.bad) == 1:
      return f"{self.bad[0]}{remedy}"
    groups = []
    for kind, errors in self._kinds():
      named = ", ".join(shown(e.where) for e in errors[:_NAMED])
      more = " …" if len(errors) > _NAMED else ""
      groups.append(f"{len(errors)} {kind}, {errors[0].text} ({named}{more}): {REMEDIES[kind]}")
    return (
      f"{shown(self.name)}: {len(self.bad)} of {self.count} {self.what} cannot be used: "
      f"{'; '.join(groups)}{remedy}"
    )

  def _kinds(self):
    kinds = collections.defaultdict(list)
    for error in self.bad:
      kinds[error.kind].append(error)
    return sorted(kinds.items())

  def lines(self, everything=False):
    """The table, a line each; all files by name, or the first of each kind."""
    most = None if everything and self.what == "files" else _LISTED  # an array may have thousands
    shape = "" if self.shape is None else "×".join(map(str, self.shape))
    rows = [("images", f"{self.whole + len(self.facts):,} of {self.count:,} {self.what}")]
    rows += self._counted() + self.remarks
    if self.storage.remark:
      rows.append(("held", self.storage.remark))
    if self.small:
      rows.append(("left out", f"{len(self.small):,} smaller than {shape} (data.small)"))
      rows += _listed([shown(e.where) for e in self.small], most)
    for kind, errors in self._kinds():
      rows.append(("cannot be used", f"{len(errors):,} {kind}: {REMEDIES[kind]}"))
      where = ", which the check lists" if self.what == "files" else ""
      rows += _listed([f"{shown(e.where)}: {e.text}" for e in errors], most, where)
    groups = self.duplicates()
    if groups:
      again = sum(map(len, groups)) - len(groups)
      rows.append(("duplicates", f"{again:,} {'is' if again == 1 else 'are'} there again"))
      rows += [("", " = ".join(map(shown, group))) for group in groups[: most or len(groups)]]
    if flat := [place for place, facts in zip(self.places, self.facts) if facts.flat]:
      rows.append(
        ("one colour", f"{len(flat):,}: {', '.join(map(shown, flat[: most or len(flat)]))}")
      )
    if shape and self.facts:
      rows.append((f"to {shape}", self._changed()))
    rows.append(("policy", str(self.policy)))
    head = f"{shown(self.name)}, split {shown(self.split)}"
    return [head, *(f"  {name:<16}{text}" for name, text in rows)]

  def _counted(self):
    def row(head, values):
      counted = collections.Counter(values).most_common()
      return (head, ", ".join(f"{value} {n:,}" for value, n in counted))

    classes = ", ".join(f"{shown(k)} {n:,}" for k, n in self.labels.items())
    labels = [("labels", classes)] if len(self.labels) > 1 else []
    if not self.facts:
      return labels
    rows = [row("formats", (f.format for f in self.facts))]
    rows.append(row("modes", (f.mode for f in self.facts)))
    sizes = np.array([f.size for f in self.facts])
    low, middle, high = sizes.min(0), np.median(sizes, axis=0).astype(int), sizes.max(0)
    text = f"{low[0]}×{low[1]}"
    if (low != high).any():
      text += f" to {high[0]}×{high[1]} pixels (height×width), median {middle[0]}×{middle[1]}"
    rows.append(("sizes", text))
    if any(f.orientation != 1 for f in self.facts):
      rows.append(row("orientations", (f.orientation for f in self.facts)))
    rows += labels
    if any(f.done for f in self.facts):
      rows.append(row("converted", (text for f in self.facts for text in f.done)))
    return rows

  def _changed(self):
    cut = [f.lost for f in self.facts if f.lost > 0]
    parts = [f"{len(cut):,} cropped (they lose {np.mean(cut):.0%} of their pixels)"] if cut else []
    for change in ("shrunk", "enlarged"):
      if n := sum(f.change == change for f in self.facts):
        parts.append(f"{n:,} {change}")
    whole = sum(f.lost == 0 and not f.change for f in self.facts)
    return ", ".join([*parts, f"{whole:,} as they are"] if whole else parts)


def _listed(texts, most, where=""):
  """Rows of the first texts of a list, and of how many more there are."""
  more = len(texts) - len(texts[:most])
  return [("", t) for t in texts[:most]] + ([("", f"and {more:,} more{where}")] if more else [])


def collect(one, items, total, report, shape, bar, disable=None, stamp=None):
  """The images of a source, each prepared by `one`, read in parallel; with the places kept.

  Args:
    one: item → (pixels, `Facts`, place), or raises `Unusable`.
    items: of the source, in order.
    total: their number, or None where it is not known.
    stamp: item → a text that is another one when the item is another; by it a packing that was
      killed knows what it has already (see `pack.PackStorage`).

  Returns:
    (images uint8 [n, H, W, C], indices of the items kept); images are None where there are none.
  """
  storage = report.storage if total is not None else Storage()
  going_on = stamp is not None and shape is not None and storage.goes_on

  def guarded(work):
    item, mark, known = work
    if known is not None:
      return mark, known, True
    try:
      return mark, one(item), False
    except Unusable as error:
      return mark, error, False

  def fed():
    for k, item in enumerate(items):
      mark = stamp(item) if going_on else ""
      yield item, mark, storage.known(k, mark) if going_on else None

  rows = _FIRST if total is None else total
  images = storage(report.name, rows, shape) if report.keep and shape is not None else None
  kept: list[int] = []
  first = ""
  bar = tqdm.tqdm(in_parallel(guarded, fed()), bar, total, disable=disable)
  for k, (mark, found, known) in enumerate(bar):
    if not isinstance(found, Unusable):
      pixels, facts, place = found
      if report.keep and images is None:
        images, first = storage(report.name, rows, pixels.shape), place
      if images is not None and not known and pixels.shape != images.shape[1:]:
        other = shown(os.path.basename(str(first)))
        found = Unusable("size", place, f"its size or colour differs from {other}'s")
    if isinstance(found, Unusable):
      report.leave_out(found)
    else:
      if images is not None and not known:
        if len(kept) == len(images):  # more than was known
          images = np.concatenate([images, allocate(report.name, len(images), images.shape[1:])])
        images[len(kept)] = pixels
      kept.append(k)
      report.add(place, facts)
    if going_on and not known:
      storage.note(mark, found)
  return (None if images is None else images[: len(kept)]), kept


class Storage:
  """Where the images of a source go while they are read: into memory, or a temporary file.

  Args:
    most: bytes that are held in memory; more go into a file in `tempfile.gettempdir()` that is
      mapped, and gone with the process. None: any number.
  """

  goes_on = False
  remark = ""  # on where they are, where that may surprise

  def __init__(self, most=None):
    self.most = most

  def __call__(self, name, count, shape):
    """An array uint8 [count, *shape]."""
    size = count * math.prod(shape)
    if self.most is None or size <= self.most:
      return allocate(name, count, shape)
    place = tempfile.gettempdir()
    try:
      with tempfile.TemporaryFile() as file:  # it has no name, and lives while it is mapped
        files.reserve(file, size)
        images = np.memmap(file, np.uint8, "r+", shape=(count, *shape))
    except OSError as error:
      raise ValueError(
        f"{name}: {count:,} images take {size / 2**30:.2f} GiB, more than data.in_memory, and "
        f"{place} has no room for them ({error.strerror}); name another folder by TMPDIR, pack "
        "them on a larger disk by soft-diffusion-data pack, or set data.in_memory higher"
      ) from None
    self.remark = (
      f"{size / 2**30:.2f} GiB in a temporary file in {place}, more than data.in_memory; "
      "soft-diffusion-data pack keeps them for the next time"
    )
    return images

  def known(self, place, mark):
    """What was found of an item before, by its place in the source and its mark; or None."""

  def note(self, mark, found):
    """Takes in what was found of the next item: (pixels, `Facts`, place) or an `Unusable`."""


def in_parallel(function, items, ahead=64):
  """The results of a function over an iterable, in order, a few computed ahead by threads."""
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
  pending: collections.deque = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > ahead:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:  # without waiting for what is read ahead, where the reader was stopped
    pool.shutdown(wait=False, cancel_futures=True)


def allocate(name, count, shape):
  """Memory for the decoded images, which stay in it."""
  try:
    return np.empty([count, *shape], np.uint8)
  except MemoryError:
    size = count * np.prod(shape, dtype=np.int64) / 2**30
    raise ValueError(
      f"{name}: {count} images of {tuple(shape)} take {size:.1f} GiB of memory; "
      "take a part of the split (such as train[:50%]) or smaller images"
    ) from None
