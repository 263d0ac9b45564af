"""The noise-free part of p_1, from which sampling starts (P App. D, "Final distribution").

Every `Prior` here is one thing, a Gaussian of low rank: mean + Σ_k z_k · factor_k with z ~ N(0, I).
They differ in the `Estimator` that fits them, a part (see `parts`) that a config names:

- "colour": a constant image in one colour per image, its channels independent Gaussians fitted to
  the images' mean colours: P as printed.
- "blurred_colour": the same, then C_1. With zero padding C_1 does not keep a constant image
  constant, so this is closer to C_1 x_0 (on CIFAR-10 at std 18: RMS 0.009 instead of 0.31).
- "subspace": the leading principal components of C_1 x_0.
- "zero": the zero image (masks hide everything; VE and VP start from noise alone).

A prior of one's own is an estimator that fits a mean and factors, and where another distribution
than the Gaussian is wanted a class derived from `Prior` with a `draw` of its own.
"""

import base64
import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import arrays, files, moved, parts, rng, trust
from soft_diffusion_tf.images import check_range

_FACTORS = -1  # salt of the draw of z
# Of images corrupted at once: oneDNN keeps memory of the size of the largest product.
_BATCH_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
  """A Gaussian of low rank over images.

  Attributes:
    kind: the estimator that fitted it, or "module:Class" of a class derived from this one.
    mean: float32 [H, W, C].
    factors: float32 [rank, H, W, C], each scaled by its standard deviation; none of "zero", and
      no more than an image has numbers.

  Raises:
    ValueError: another kind, shapes that do not fit, or values that are not finite.
  """

  kind: str
  mean: np.ndarray
  factors: np.ndarray

  def __post_init__(self):
    if not isinstance(self.kind, str) or not re.fullmatch(r"[\w.]+(:[\w.]+)?", self.kind):
      raise ValueError(f"the kind of a prior is a name, not {reprlib.repr(self.kind)}")
    mean, factors = np.shape(self.mean), np.shape(self.factors)
    most = 0 if self.kind == "zero" else np.size(self.mean)
    if len(mean) != 3 or factors[1:] != mean or factors[0] > most:
      raise ValueError(
        f"a prior of kind {self.kind} has a mean [H, W, C] and up to {most} factors of its shape, "
        f"got shapes {mean} and {factors}"
      )
    if not (np.isfinite(self.mean).all() and np.isfinite(self.factors).all()):
      raise ValueError("the prior holds NaN or infinite values; fit it again")

  def draw(self, seeds):
    """Noise-free images float32 [B, H, W, C]; image i depends on seeds[i] (int64 [B]) alone."""
    shape = self.mean.shape
    rank = len(self.factors)
    mean = tf.constant(self.mean, tf.float32)
    if rank == 0:
      return tf.broadcast_to(mean, tf.concat([tf.shape(seeds), shape], 0))
    z = rng.normal_per_image(seeds, _FACTORS, (rank,))
    # One multiply-add per factor, not a matrix product: a product may round an image differently
    # according to how many images stand beside it.
    image = tf.zeros_like(z[:, 0, tf.newaxis, tf.newaxis, tf.newaxis]) + mean
    for k in range(rank):
      image += z[:, k, tf.newaxis, tf.newaxis, tf.newaxis] * tf.constant(self.factors[k])
    return image

  def save(self, path):
    """Writes an .npz, whole or not at all."""
    with files.atomic(path) as partial:
      np.savez(partial, kind=np.array(self.kind), mean=self.mean, factors=self.factors)

  def get_config(self):
    """The same as text, ready for JSON: float32 arrays in base64."""
    encode = lambda a: base64.b64encode(np.asarray(a, "<f4").tobytes()).decode()
    return {
      "kind": self.kind,
      "shape": list(self.mean.shape),
      "mean": encode(self.mean),
      "factors": encode(self.factors),
    }

  @classmethod
  def from_config(cls, config):
    """The prior that `get_config` described; a ValueError of one that is damaged."""
    if not isinstance(config, Mapping):
      raise ValueError(f"a prior's config has kind, shape, mean and factors, not {config!r}")
    decode = lambda text: np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
    try:
      shape = tuple(config["shape"])
      mean, factors = (decode(config[name]) for name in ("mean", "factors"))
      mean, factors = mean.reshape(shape), factors.reshape(-1, *shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
      raise ValueError(f"the prior's config is damaged ({error}); fit the prior again") from None
    return _class_of(config.get("kind"))(config.get("kind"), mean, factors)

  @classmethod
  def load(cls, path):
    """Reads what `save` wrote; a ValueError names a file that is missing or unreadable."""
    remedy = "fit it again by training in a new workdir"
    with arrays.opened(path, "not a saved prior", remedy) as content:
      return cls.read(content)

  @classmethod
  def read(cls, content, prefix=""):
    """The prior in an open file of `arrays`, its entries named by a prefix."""
    kind = content.text(f"{prefix}kind")
    shape = content.shape(f"{prefix}mean")
    count = content.shape(f"{prefix}factors")[:1]
    mean = content.array(f"{prefix}mean", shape)
    if not count or count[0] > mean.size:
      raise ValueError(f"{prefix}factors are more than an image has numbers, or no list")
    factors = content.array(f"{prefix}factors", (*count, *shape))
    with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
      return _class_of(kind)(kind, np.float32(mean), np.float32(factors))


def class_name(kind):
  """The "module:Class" of a class derived from `Prior`, which is the `kind` of its priors."""
  return f"{kind.__module__}:{kind.__qualname__}"


def _class_of(kind):
  """The class of a saved prior: `Prior`, or the one that "module:Class" names, by consent."""
  if not isinstance(kind, str) or ":" not in kind:
    return Prior
  found = trust.load(kind)
  if not (isinstance(found, type) and issubclass(found, Prior)):
    raise ValueError(f"{kind} is not a class derived from Prior; name one")
  return found


def zero(image_shape):
  """The prior that is the zero image."""
  return Prior("zero", np.zeros(image_shape, np.float32), np.zeros([0, *image_shape], np.float32))


# --- Estimators -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimator(parts.Part, role="prior"):
  """Fits a `Prior` to images: a part (see `parts`) with one method, `fit`.

  Attributes:
    rank: the number of components to keep, at the most; "subspace" alone has more than it needs.

  `makes` is the class of what it fits, `Prior` or one derived from it.
  """

  makes: ClassVar[type] = Prior

  rank: parts.Count = 16

  def fit(self, images, diffusion):
    """The `Prior` of clean images float32 [N, H, W, C] in [0, 1], N ≥ 2, under a diffusion."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Colour(Estimator, name="colour"):
  """A constant image in one colour, fitted to the images' mean colours: P as printed."""

  def fit(self, images, diffusion):
    constant = _constants(images)
    return Prior("colour", constant[0], constant[1:])


@dataclasses.dataclass(frozen=True)
class BlurredColour(Estimator, name="blurred_colour"):
  """C_1 of a constant image in one colour, fitted to the images' mean colours."""

  def fit(self, images, diffusion):
    if not diffusion.corruption.linear:
      raise ValueError(
        "the prior 'blurred_colour' adds up corrupted colours, and the corruption "
        f"{type(diffusion.corruption).__name__} is not linear; use 'subspace'"
      )
    constant = diffusion.corrupt(_constants(images), 1.0).numpy()
    return Prior("blurred_colour", constant[0], constant[1:])


@dataclasses.dataclass(frozen=True)
class Subspace(Estimator, name="subspace"):
  """The leading principal components of C_1 x_0."""

  def fit(self, images, diffusion):
    rows = corrupt_all(images, diffusion, 1.0).reshape(len(images), -1).astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    # The eigenvectors of the smaller of the two Gram matrices give the components.
    if rows.shape[0] < rows.shape[1]:
      values, left = np.linalg.eigh(rows @ rows.T)
      order = np.argsort(values)[::-1][: self.rank]
      factors = (rows.T @ left[:, order]).T  # already scaled by the singular values
    else:
      values, right = np.linalg.eigh(rows.T @ rows)
      order = np.argsort(values)[::-1][: self.rank]
      factors = right[:, order].T * np.sqrt(np.maximum(values[order], 0))[:, None]
    factors /= np.sqrt(len(rows) - 1)
    shape = images.shape[1:]
    return Prior(
      "subspace",
      mean.reshape(shape).astype(np.float32),
      factors.reshape(-1, *shape).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Zero(Estimator, name="zero"):
  """The zero image; nothing is fitted."""

  def fit(self, images, diffusion):
    return zero(tuple(diffusion.image_shape))


KINDS = tuple(parts.members(Estimator))


def _constants(images):
  """The mean colour as a constant image, then one constant image a channel, of its deviation."""
  shape = images.shape[1:]
  colours = images.mean(axis=(1, 2), dtype=np.float64)
  channels = np.arange(shape[2])
  constant = np.zeros([shape[2] + 1, *shape], np.float32)
  constant[0] = colours.mean(axis=0)
  constant[channels + 1, :, :, channels] = colours.std(axis=0, ddof=1)[:, None, None]
  return constant


def fit(kind, images, diffusion, rank=16):
  """Fits a prior to clean images.

  Args:
    kind: an `Estimator`, or what `parts.make` makes one of: "subspace", "subspace(rank=32)".
    images: float [N, H, W, C] in [0, 1]; not used by "zero".
    diffusion: gives C_1 and the image shape.
    rank: of a kind that is given by its name.

  Raises:
    ValueError: an unknown kind, images of another shape or range, or a prior of another shape.
  """
  estimator = parts.make(Estimator, kind)
  if kind in parts.members(Estimator):
    estimator = dataclasses.replace(estimator, rank=rank)
  shape = tuple(diffusion.image_shape)
  if isinstance(estimator, Zero):
    return zero(shape)
  images = np.asarray(images, np.float32)
  if images.ndim != 4 or images.shape[1:] != shape or len(images) < 2:
    raise ValueError(
      f"fitting a prior takes at least 2 images of {shape}, got an array of {images.shape}"
    )
  check_range(images, "the images to fit a prior to")
  prior = estimator.fit(images, diffusion)
  makes, name = estimator.makes, type(estimator).__name__
  if type(prior) is not makes or prior.mean.shape != shape:
    raise ValueError(
      f"{name}.fit must give a {makes.__name__} of images of {shape}, got {reprlib.repr(prior)}; "
      f"of a class of your own say so in {name}, by makes = its class"
    )
  if makes is not Prior and prior.kind != class_name(makes):  # it would be read as another class
    raise ValueError(f"the kind of a {makes.__name__} is {class_name(makes)!r}, not {prior.kind!r}")
  return prior


def corrupt_all(images, diffusion, t):
  """C_t of many images in batches: float32 [N, H, W, C], as a NumPy array."""
  corrupted = np.empty(images.shape, np.float32)
  batch = max(1, min(500, _BATCH_BYTES // (4 * math.prod(images.shape[1:]))))
  for k in range(0, len(images), batch):
    corrupted[k : k + batch] = diffusion.corrupt(images[k : k + batch], t)
  return corrupted


__getattr__ = moved.getter(__name__)
