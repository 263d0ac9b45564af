"""The statistics of one side of a comparison, gathered image by image."""

import contextlib
import pathlib
import time

import numpy as np
import tqdm

from soft_diffusion_tf import arrays, files, gaussians, plots
from soft_diffusion_tf.images import check_range

PARTS = 3  # disjoint parts of one side, for the spread
BLOCK = 1024  # features that are gathered before they enter the moments; also TF-GAN's KID block
FEATURE_BATCH = 100
SUBSET = 10_000


class Statistics:
  """What the metrics need of `count` images, gathered in one pass over their features.

  Attributes:
    count: images expected; seen: images so far.
    parts: `gaussians.Moments` of three disjoint parts of the images, in their order.
    rows: the first `subset` features, float32 [·, D].
    score: sums of p and of Σ p log p over the images, for the Inception score; None without logits.
  """

  def __init__(self, count, subset=SUBSET):
    self.count, self.subset, self.seen = count, min(subset, count), 0
    self.parts = [gaussians.Moments() for _ in range(PARTS)]
    self.score = None
    self._rows = None
    self._waiting = []

  @property
  def rows(self):
    return self._rows[: min(self.seen, self.subset)]

  @property
  def dimension(self):
    return self._rows.shape[1]

  @property
  def moments(self):
    """Of all images."""
    return sum(self.parts[1:], self.parts[0])

  def update(self, features, logits=None):
    """Adds features [n, D] and logits [n, K] of the next n images."""
    features = np.asarray(features, np.float32)
    if self.seen + len(features) > self.count:
      raise ValueError(f"{self.seen + len(features)} images given, {self.count} were announced")
    if not np.all(np.isfinite(features)):
      bad = self.seen + int(np.argmin(np.isfinite(features).all(1)))
      raise ValueError(f"the features of image {bad} are not finite; look at that image")
    if self._rows is None:
      self._rows = np.empty([self.subset, features.shape[1]], np.float32)
    kept = features[: max(0, self.subset - self.seen)]
    self._rows[self.seen : self.seen + len(kept)] = kept
    if logits is not None:
      self._add_logits(np.asarray(logits, np.float64))
    self.seen += len(features)
    self._waiting.append(features)
    if self.seen == self.count or sum(map(len, self._waiting)) >= BLOCK:
      self._flush()
    return self

  def _flush(self):
    rows = np.concatenate(self._waiting)
    self._waiting = []
    start = self.seen - len(rows)
    bounds = [self.count * k // PARTS for k in range(PARTS + 1)]
    for part, low, high in zip(self.parts, bounds, bounds[1:]):
      part.update(rows[max(low - start, 0) : max(high - start, 0)])

  def _add_logits(self, logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    sums = np.append(p.sum(axis=0), (p * log_p).sum())
    self.score = sums if self.score is None else self.score + sums

  @property
  def inception_score(self):
    """exp of the mean KL(p(y|x) ‖ p(y)), in one piece as TF-GAN has it; None without logits."""
    if self.score is None:
      return None
    q = self.score[:-1] / self.count
    return float(np.exp(self.score[-1] / self.count - np.sum(q * np.log(np.maximum(q, 1e-300)))))

  def state(self, merged=False):
    """All of it as arrays, for an npz; `merged` joins the three parts, for a third of the space."""
    content = {"sizes": np.array([self.count, self.subset, self.seen])}
    if self._rows is not None:
      content["rows"] = self.rows
      content["waiting"] = np.concatenate([np.empty([0, self.dimension]), *self._waiting])
    if self.score is not None:
      content["score"] = self.score
    for k, part in enumerate([self.moments] if merged else self.parts):
      if part.count:
        content[f"count_{k}"] = np.array(part.count)
        content[f"mean_{k}"], content[f"scatter_{k}"] = part.mean, part.scatter
    return content

  @classmethod
  def from_state(cls, content, whole=False):
    """The statistics that `state` gave, of all their images if `whole`.

    Raises:
      ValueError: arrays that do not belong together.
    """
    count, subset, seen = (int(v) for v in content["sizes"])
    rows, waiting = content.get("rows"), content.get("waiting")
    parts = [k for k in range(PARTS) if f"count_{k}" in content]
    shapes = [np.shape(content[f"scatter_{k}"]) for k in parts]
    shapes += [np.shape(content[f"mean_{k}"]) * 2 for k in parts]
    if rows is not None:  # before room is made for what a file claims
      if np.ndim(rows) != 2 or np.ndim(waiting) != 2:
        raise ValueError("its features are no table")
      shapes += [rows.shape[1:] * 2, waiting.shape[1:] * 2]
    if len(set(shapes)) > 1:
      raise ValueError(f"its moments and features differ in size: {sorted(set(shapes))}")
    inside = (seen == count if whole else 0 <= seen <= count) and 0 <= subset <= count
    counted = sum(int(content[f"count_{k}"]) for k in parts)
    have = (0, 0) if rows is None else (len(rows), len(waiting))
    if not inside or have[0] != min(seen, subset) or counted + have[1] != seen:
      raise ValueError(
        f"it counts {seen} of {count} images, and its parts do not add up to that: {counted} and "
        f"{have}"
      )
    result = cls(count, subset)
    result.seen = seen
    if rows is not None:
      result._rows = np.empty([result.subset, rows.shape[1]], np.float32)
      result._rows[: len(rows)] = rows
      if len(waiting):
        result._waiting = [np.float32(waiting)]
    if "score" in content:
      result.score = content["score"]
    for k in parts:
      part = result.parts[k]
      part.count = int(content[f"count_{k}"])
      part.mean, part.scatter = content[f"mean_{k}"], content[f"scatter_{k}"]
    return result


def measure(network, batches, count, subset=SUBSET, progress=None, partial=None, every=60.0):
  """`Statistics` of `count` images.

  Args:
    network: an `evaluation.features.FeatureNetwork`.
    batches: a function start → iterator over batches [B, H, W, C], uint8 or float in [0, 1], of the
      images from number `start` on.
    partial: a file that keeps what is done so far, written every `every` seconds, so that a run
      that dies goes on from there; gone once all is done.

  Raises:
    ValueError: images that are not finite (named), or fewer than `count`.
  """
  statistics = Statistics(count, subset)
  if partial is not None:
    with contextlib.suppress(ValueError):  # none yet, or a torn one
      before, _ = read_statistics(partial)
      if (before.count, before.subset) == (count, min(subset, count)):
        statistics = before
  saved = time.monotonic()
  bar = tqdm.tqdm(
    total=count,
    initial=statistics.seen,
    desc=progress or "",
    unit="image",
    disable=progress is None,
  )
  with bar:
    for images in batches(statistics.seen) if statistics.seen < count else ():
      images = images[: count - statistics.seen]
      finite = np.isfinite(images).all((1, 2, 3))
      if not finite.all():
        raise ValueError(
          f"image {statistics.seen + int(np.argmin(finite))} holds NaN or infinite values; a "
          "sampled one: lower the number of steps or look at the checkpoint"
        )
      if np.asarray(images).dtype != np.uint8:
        check_range(images, f"the images from number {statistics.seen} on")
      statistics.update(*network(images))
      bar.update(len(images))
      if statistics.seen == count:
        break
      if partial is not None and time.monotonic() - saved >= every:
        with files.atomic(partial) as file:
          np.savez(file, **statistics.state())
        saved = time.monotonic()
  if statistics.seen < count:
    raise ValueError(f"{count} images asked for, but there are {statistics.seen}; ask for fewer")
  if partial is not None:
    pathlib.Path(partial).unlink(missing_ok=True)
  return statistics


def read_statistics(path, whole=False):
  """`Statistics` in an npz, of all their images if `whole`, and the text "about" there or None.

  Raises:
    ValueError: one line; the file is missing, torn, or something else.
  """
  remedy = "make them with soft-diffusion-reference-stats"
  with arrays.opened(path, "no reference statistics in it", remedy) as content:
    kinds = ("float32", "float64", "int64")
    about = content.text("about") if "about" in content.names else None
    names = [name for name in content.names if name != "about"]
    state = {name: content.array(name, dtypes=kinds) for name in names}
    return Statistics.from_state(state, whole), about


def image_batches(images, order=None):
  """Batches of images in memory, in an order [N] of indices: for `measure`."""
  order = np.arange(len(images)) if order is None else order

  def batches(start):
    for k in range(start, len(order), FEATURE_BATCH):
      yield images[order[k : k + FEATURE_BATCH]]

  return batches


def sample_batches(run, seeds, options, keep=None):
  """Batches of a run's samples for image seeds [N], as 8-bit images like the real ones.

  Args:
    keep: a list that the batches are also put into, as floats.
  """
  batch_sampler = run.batch_sampler(options)

  def batches(start):
    for k in range(start, len(seeds), options.batch_size):
      images = batch_sampler.images(seeds[k : k + options.batch_size])
      if keep is not None:
        keep.append(images)
      # NaN has no 8-bit value: such a batch stays float, for `measure` to name the image.
      yield plots.to_uint8(images) if np.isfinite(images).all() else images

  return batches
