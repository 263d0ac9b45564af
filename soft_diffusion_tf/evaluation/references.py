"""Real images to compare with: their statistics, kept in files."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from soft_diffusion_tf import files
from soft_diffusion_tf.evaluation.distances import compare
from soft_diffusion_tf.evaluation.statistics import (
  SUBSET,
  Statistics,
  image_batches,
  measure,
  read_statistics,
)


@dataclasses.dataclass(frozen=True)
class Reference:
  """Real images' statistics, with all that says what they are of.

  `conditions` are those of `conditions_of` and "content", a digest of the images; `floor` holds the
  numbers of as many other real images against these, or None with the reason in `why_no_floor`.
  """

  statistics: Statistics
  conditions: dict
  floor: dict | None = None
  why_no_floor: str = ""

  def save(self, path):
    content = self.statistics.state(merged=True)
    about = {"conditions": self.conditions, "floor": self.floor, "why_no_floor": self.why_no_floor}
    with files.atomic(path) as partial:
      np.savez(partial, **content, about=np.array(json.dumps(about)))

  @classmethod
  def load(cls, path):
    """A stored reference; a ValueError for a file that is none."""
    statistics, about = read_statistics(path, whole=True)
    try:
      fields = json.loads(about or "")
      if not isinstance(fields["conditions"], dict):
        raise ValueError("its conditions are no object")
      return cls(statistics, **fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      raise ValueError(
        f"{path}: no reference statistics in it ({error}); make them with "
        "soft-diffusion-reference-stats"
      ) from None

  def check(self, path, **expected):
    """Raises a ValueError naming the first condition that is not the expected one."""
    for field, want in expected.items():
      found = self.conditions.get(field)
      if found != want:
        raise ValueError(
          f"{path}: its {field} is {found!r}, but {want!r} is evaluated; make the statistics anew "
          "with soft-diffusion-reference-stats"
        )
    return self


def conditions_of(network, data, split, image_shape, crop, count):
  """The settings under which a reference's numbers hold, without the digest of its images."""
  return {
    "data": data,
    "split": split,
    "image_shape": list(image_shape),
    "crop": crop,
    "feature_net": network.name,
    "feature_net_sha256": network.digest,
    "count": int(count),
  }


def check_count(count, available, what="the data set"):
  """Raises the ValueError of a number of images that cannot be had."""
  if count < 2:
    raise ValueError(f"a Fréchet distance takes at least 2 samples, {count} were asked for")
  if count > available:
    raise ValueError(
      f"{count} images asked for, but {what} has {available}; lower evaluation.samples or take a "
      "larger split"
    )


def reference(
  network, images, conditions, subset=SUBSET, floor_count=None, folder=None, progress=True, k=3
):
  """The `Reference` of the first `conditions["count"]` images in a fixed random order.

  Args:
    images: uint8 [M, H, W, C]; the ones after the reference's, as many as `floor_count` (by default
      as many as the reference has), give the floor where there are enough.
    folder: where it is kept and found again.
    k: precision and recall of the floor look at the k-th neighbours.
  """
  count = conditions["count"]
  check_count(count, len(images))
  floor_count = floor_count or count
  content = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
  conditions = {**conditions, "content": content}
  path = None
  if folder is not None:
    text = json.dumps([conditions, subset, floor_count, k], sort_keys=True)
    path = pathlib.Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    with contextlib.suppress(ValueError):  # none, or a damaged one: it is made again
      return Reference.load(path).check(path, **conditions)
  order = np.random.default_rng(0).permutation(len(images))
  say = (lambda text: text) if progress else (lambda text: None)
  statistics = measure(
    network, image_batches(images, order[:count]), count, subset, say("features (real)")
  )
  floor, why = None, ""
  rest = order[count : count + floor_count]
  if len(rest) == floor_count:  # a floor at another N would be another number
    others = measure(
      network, image_batches(images, rest), floor_count, subset, say("features (floor)")
    )
    result = compare(network, others, statistics, k, spread=False)
    floor = {"samples": floor_count, "neighbours": k} | result.numbers()
  else:
    why = f"needs {floor_count} more real images, {len(rest)} are left"
  real = Reference(statistics, conditions, floor, why)
  if path is not None:
    real.save(path)
  return real
