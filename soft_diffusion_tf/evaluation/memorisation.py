"""Does a model repeat its training images? Nearest neighbours, beside those of held-out images.

Every generated image's nearest training image is found in pixels and in features (P Figure 12). How
near is too near is told by real images that were not trained on: an image is flagged when it lies
nearer to a training image than all but 1 % of those do, so an honest model has about 1 % flagged.
"""

import dataclasses

import numpy as np
import tqdm

from soft_diffusion_tf import neighbours, plots

QUANTILE = 0.01
BASE = 1000  # held-out images, at the most
_SAME = 1e-4  # in pixels, below any difference of 8-bit images: the distance of a copy
_CHUNK = 2048  # training images whose features are in memory at once


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Nearest training images in one space ("pixels" or a feature network's name).

  Attributes:
    distances, indices: of the generated images [N]: Euclidean, and the training images' numbers.
    base: the same distances of real images that are not among the training images searched [B].
  """

  space: str
  distances: np.ndarray
  indices: np.ndarray
  base: np.ndarray
  held_out: bool = True  # False: base is of training images, each among the others

  @property
  def threshold(self):
    return float(np.quantile(self.base, QUANTILE))

  @property
  def flagged(self):
    """Whether each generated image is nearer than 99 % of the held-out ones: bool [N]."""
    return self.distances <= self.threshold

  def __str__(self):
    return (
      f"{self.space}: {self.flagged.sum()} of {len(self.distances)} generated images "
      f"({self.flagged.mean():.1%}; expected {QUANTILE:.0%}) lie within {self.threshold:.4g} of a "
      f"training image; median distance {np.median(self.distances):.4g}, of "
      f"{'held-out' if self.held_out else 'training'} images {np.median(self.base):.4g}"
    )

  def record(self, names):
    """For JSON; `names` [N] are the generated images' seeds or files."""
    levels = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    order = np.argsort(self.distances, kind="stable")
    return {
      "space": self.space,
      "threshold": self.threshold,
      "flagged": int(self.flagged.sum()),
      "share": float(self.flagged.mean()),
      "expected": QUANTILE,
      "quantile_levels": list(levels),
      "generated": np.quantile(self.distances, levels).tolist(),
      "held_out": np.quantile(self.base, levels).tolist(),
      "held_out_images": len(self.base),
      "flagged_images": [
        {"image": names[i], "train": int(self.indices[i]), "distance": float(self.distances[i])}
        for i in order
        if self.flagged[i]
      ],
    }


def report(network, generated, training, held_out=None, progress=None):
  """A `Nearest` in pixels and one in the network's features.

  Args:
    generated: uint8 [N, H, W, C]; training: uint8 [M, H, W, C].
    held_out: uint8 [·, H, W, C], real images that were not trained on; without them training images
      stand in, each searched among the others.
  """
  if len(training) < 2 or not len(generated):
    raise ValueError(
      f"nearest neighbours take at least 1 generated and 2 training images, got {len(generated)} "
      f"and {len(training)}"
    )
  pool = training if held_out is None else held_out
  picked = np.sort(np.random.default_rng(0).permutation(len(pool))[:BASE])
  queries = np.concatenate([generated, pool[picked]])
  own = np.full(len(queries), -1)
  if held_out is None:
    own[len(generated) :] = picked
  result = []
  for space, rows in (("pixels", _pixels), (network.name, _features(network))):
    distances, indices = _search(rows, queries, training, own, progress and f"{progress} ({space})")
    n = len(generated)
    base = distances[n:]
    found = Nearest(space, distances[:n], indices[:n], base, held_out is not None)
    if found.held_out and space == "pixels" and found.threshold < _SAME:
      raise ValueError(
        f"{(base < _SAME).mean():.0%} of the held-out images are training images; take as "
        "data.test_split a split that shares none with data.train_split"
      )
    result.append(found)
  return result


def _pixels(images):
  return images.reshape(len(images), -1).astype(np.float32) / 255.0


def _features(network):
  def rows(images):
    return np.concatenate([network(images[k : k + 100])[0] for k in range(0, len(images), 100)])

  return rows


def _search(rows, queries, points, own, progress):
  """Distances and indices of the nearest points, without `own`, chunk by chunk of the points."""
  wanted = rows(queries)
  best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
  starts = range(0, len(points), _CHUNK)
  for start in tqdm.tqdm(starts, progress or "", disable=progress is None):
    chunk = rows(points[start : start + _CHUNK])
    distances, places = neighbours.nearest(wanted, chunk, min(2, len(chunk)))
    distances = np.where(places + start == own[:, None], np.inf, distances)
    column = distances.argmin(axis=1)[:, None]
    here = np.take_along_axis(distances, column, 1)[:, 0]
    nearer = here < best
    best = np.where(nearer, here, best)
    index = np.where(nearer, np.take_along_axis(places, column, 1)[:, 0] + start, index)
  return best, index


def figure(path, generated, training, found, show=10):
  """A report's picture (P Figure 12): the first images, the most suspicious ones, distances."""
  spaces = [n.space for n in found]
  labels = ["generated", *(f"nearest in {space}" for space in spaces)]

  def group(title, index):
    columns = [generated[index], *(training[n.indices[index]] for n in found)]
    return title, labels, np.stack(columns, 1) / 255.0

  base = "held-out images" if found[0].held_out else "training images among themselves"
  first = np.arange(min(show, len(generated)))
  nearest = np.argsort(found[0].distances, kind="stable")[:show]
  plots.neighbours(
    path,
    [group("the first images", first), group("the ones nearest to training images", nearest)],
    [(n.space, {base: n.base, "generated images": n.distances}, n.threshold) for n in found],
  )
