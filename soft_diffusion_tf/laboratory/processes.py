"""Data and processes of the laboratory: mixtures around real images, levels."""

import numpy as np
import scipy.cluster.vq
import scipy.fft

from soft_diffusion_tf import (
  data,
  oracles,
  packages,
  schedules,
  transport,
)
from soft_diffusion_tf.diffusion import Diffusion

DATA = ("digits", "patches8", "patches16", "crops64")
COMPONENTS = ("image", "class")
SCHEDULES = ("transport", "linear", "geometric")


def load(name, count=450, data_dir=None):
  """Images float32 [N, H, W, C] in [0, 1] and labels [N] to build a mixture around.

  Args:
    name: "digits" (8×8×1), "patches8" or "patches16" (random patches of CIFAR-10), or "crops64"
      (64×64×1, cut at random from the two photographs of scikit-learn, at half their size).
    count: how many; evenly spaced digits, or one patch of each of as many images.
  """
  if name not in DATA:
    raise ValueError(f"unknown data {name!r}; choose one of {', '.join(DATA)}")
  if count < 2:
    raise ValueError(f"a laboratory takes at least 2 images, got {count}")
  if name == "crops64":
    return _crops(64, count), np.zeros(count, np.int64)
  source = data.load(
    *(("digits", "all") if name == "digits" else ("cifar10", "train")),
    data_dir=data_dir,
    progress=False,
  )
  picked = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
  images = source.floats(picked)
  if name != "digits":
    size = int(name.removeprefix("patches"))
    corners = np.random.default_rng(0).integers(0, images.shape[1] - size + 1, [len(images), 2])
    images = np.stack([i[y : y + size, x : x + size] for i, (y, x) in zip(images, corners)])
  return images, source.labels[picked]


def _crops(size, count):
  with packages.needed("scikit-learn", "the photographs of --data=patches"):
    from sklearn import datasets
  photographs = [
    (p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2] / 255.0) @ np.array([0.299, 0.587, 0.114])
    for p in datasets.load_sample_images().images
  ]
  halves = [p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in photographs]
  draw = np.random.default_rng(0)
  crops = []
  for k in range(count):
    half = halves[k % len(halves)]
    y, x = (draw.integers(0, n - size + 1) for n in half.shape)
    crops.append(half[y : y + size, x : x + size, None])
  return np.stack(crops).astype(np.float32)


def mixture_of(images, labels, components="image", std=0.05):
  """A mixture around images: a narrow Gaussian on each, or one full Gaussian a class.

  Patches cut at random have no class that shows in them, so clusters (10, by k-means) stand for
  classes wherever a label has fewer images than twice the dimension.
  """
  if components not in COMPONENTS:
    raise ValueError(f"unknown components {components!r}; choose one of {', '.join(COMPONENTS)}")
  if components == "image":
    return oracles.GaussianMixture(images, std)
  if np.bincount(labels).min() < 2 * images[0].size:
    rows = images.reshape(len(images), -1).astype(np.float64)
    wanted = max(1, min(10, len(images) // 4))
    labels = scipy.cluster.vq.kmeans2(rows, wanted, seed=0, minit="++")[1]
    members = np.bincount(labels)
    labels = np.where(members[labels] > 1, labels, members.argmax())  # one image has no covariance
  return oracles.GaussianMixture.per_class(images, labels, ridge=std**2)


def strongest(corruption, size):
  """A finite last level: the range's end, or for an endless one ¾ of the image's side."""
  stop = corruption.level_range[1]
  return stop if np.isfinite(stop) else 0.75 * size


def level_schedule(kind, corruption, first, last, images, nodes=32):
  """A level schedule: "linear", "geometric", or "transport", P's: the shortest path in W₂.

  Where the closed form of W₂ does not hold, "transport" takes levels evenly spaced in the length of
  the path, which is what the shortest path would come to.

  Returns:
    The schedule and a note on how it was found.
  """
  if kind == "linear":
    return schedules.Linear(first, last), "linear in t"
  if kind == "geometric":
    return schedules.Geometric(first, last), "geometric in t"
  if kind != "transport":
    raise ValueError(f"unknown schedule {kind!r}; choose one of {', '.join(SCHEDULES)}")
  try:
    path, _ = transport.find(corruption, images, first, last, count=128, nodes=nodes)
    levels, note = path.levels, f"shortest path in W₂, {len(path.levels)} levels"
  except transport.NotClosedForm:
    levels = transport.candidate_levels(corruption, first, last, nodes, "transport", images)
    note = f"{len(levels)} levels even in transport length (no closed form of W₂)"
  return schedules.piecewise(levels), note


def two_stage(corruption, level, image_shape):
  """P's process: noise from 0.01 to 0.1 while t < 0.2, then the corruption (P App. D)."""
  return Diffusion(
    image_shape,
    corruption,
    schedules.Staged(level, 0.2, 1.0),
    schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
  )
