"""Fréchet distances between images and a reference, by tensorflow_gan's own functions.

This is the only importer of tensorflow_gan. A number from any feature network but TF-GAN's
Inception is called FD[name], never FID: only numbers from one network at one N compare.
"""

import dataclasses
import hashlib
import importlib
import pathlib
import sys
import types

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import gaussians, plots

TFGAN_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"


def _classifier_metrics():
  """tensorflow_gan's `classifier_metrics`.

  Its package cannot be imported with TensorFlow 2.16 and later (it needs tf.estimator, which is
  gone), but this module itself needs only TensorFlow and TensorFlow Probability. So the packages
  above it are entered as empty modules that know only where their files are.
  """
  name = "tensorflow_gan.python.eval.classifier_metrics"
  if name in sys.modules:
    return sys.modules[name]
  spec = importlib.util.find_spec("tensorflow_gan")
  if spec is None or not spec.submodule_search_locations:
    raise ValueError("tensorflow_gan is not installed; install tensorflow-gan==2.1.0")
  root = pathlib.Path(spec.submodule_search_locations[0])
  for package, folder in (
    ("tensorflow_gan", root),
    ("tensorflow_gan.python", root / "python"),
    ("tensorflow_gan.python.eval", root / "python" / "eval"),
  ):
    module = types.ModuleType(package)
    module.__path__ = [str(folder)]
    sys.modules.setdefault(package, module)
  try:
    return importlib.import_module(name)
  except Exception as error:  # whatever a later TensorFlow breaks inside it
    raise ValueError(
      f"tensorflow_gan's classifier_metrics does not load under TensorFlow {tf.__version__} "
      f"({type(error).__name__}: {error}); install the versions of requirements.lock"
    ) from None


# --- Features -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
  """Images float [B, H, W, C] in [0, 1] → features float32 [B, D]; `digest` names the weights."""

  name: str
  features: object
  digest: str = ""

  @property
  def label(self):
    """What a Fréchet distance by this network is called."""
    return "FID" if self.name == "tfgan" else f"FD[{self.name}]"


def feature_network(name):
  """A feature network by name.

  Args:
    name: "pixels"; "tfgan" (TF-GAN's Inception by its hub handle); or the folder of a SavedModel
      that takes RGB images in [−1, 1] and gives "pool_3", such as a local copy of TF-GAN's module.

  Raises:
    ValueError: one line that names what cannot be loaded and the remedy.
  """
  if name == "pixels":
    return FeatureNetwork("pixels", lambda images: tf.reshape(images, [tf.shape(images)[0], -1]))
  path = pathlib.Path(name)
  if name == "tfgan":
    import tensorflow_hub

    try:
      module = tensorflow_hub.load(TFGAN_HANDLE)
    except Exception as error:  # hub, urllib and TensorFlow each raise their own
      text = str(error).strip().splitlines()[0]
      raise ValueError(
        f"cannot fetch {TFGAN_HANDLE} ({text}); download it on a machine with network, unpack it, "
        "and give its folder: --config.evaluation.feature_net=FOLDER"
      ) from None
    return FeatureNetwork("tfgan", _saved_model(module, name))
  if not (path / "saved_model.pb").is_file():
    raise ValueError(
      f"{name}: not a SavedModel folder; feature_net is 'pixels', 'tfgan' or such a folder"
    )
  module = tf.saved_model.load(str(path))
  return FeatureNetwork(path.resolve().name, _saved_model(module, name), _digest(path))


def _saved_model(module, name):
  @tf.function
  def features(images):
    images = tf.cast(images, tf.float32)
    if images.shape[-1] == 1:
      images = tf.image.grayscale_to_rgb(images)
    images = 2.0 * images - 1.0
    out = module(images) if callable(module) else module.signatures["serving_default"](images)
    if "pool_3" not in out:
      raise ValueError(f"{name}: gives {sorted(out)}, not 'pool_3'; take another feature network")
    return tf.reshape(out["pool_3"], [tf.shape(images)[0], -1])

  return features


def _digest(folder):
  total = hashlib.sha256()
  for file in sorted(folder.rglob("*")):
    if file.is_file():
      total.update(file.read_bytes())
  return total.hexdigest()[:16]


def extract(network, images, batch=100, progress=None):
  """Features float32 [N, D] of images uint8 or float in [0, 1], [N, H, W, C]."""
  parts = []
  starts = range(0, len(images), batch)
  for k in tqdm.tqdm(starts, progress or "", disable=progress is None):
    part = images[k : k + batch]
    part = part.astype(np.float32) / 255.0 if part.dtype == np.uint8 else np.float32(part)
    if not np.all(np.isfinite(part)):
      raise ValueError(f"image {k + int(np.argmin(np.isfinite(part).all((1, 2, 3))))} holds NaN")
    parts.append(np.asarray(network.features(tf.constant(part))))
  return np.concatenate(parts)


# --- Distance -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distance:
  """A Fréchet distance with its conditions.

  Attributes:
    label: "FID" or "FD[name]".
    value: tensorflow_gan's number.
    exact: the same in float64 without TF-GAN's cut-off of small eigenvalues.
    count: number of images on the smaller side.
    dimension: of the features.
  """

  label: str
  value: float
  exact: float
  count: int
  dimension: int

  def __str__(self):
    text = f"{self.label} {self.value:.4g}"
    if abs(self.value - self.exact) > 1e-3 * abs(self.exact):
      text += f" (exact {self.exact:.4g})"
    if self.count <= self.dimension:
      text += f" [N = {self.count} is not above the {self.dimension} features: biased]"
    return text


def distance(network, one, two):
  """The `Distance` between two sets of features [N, D] and [M, D] of one network."""
  if min(len(one), len(two)) < 2:
    raise ValueError(
      f"a Fréchet distance takes at least 2 images a side, got {min(len(one), len(two))}"
    )
  metrics = _classifier_metrics()
  value = metrics.frechet_classifier_distance_from_activations(
    tf.constant(one, tf.float64), tf.constant(two, tf.float64)
  )
  return Distance(
    network.label, float(value), gaussians.frechet_between(one, two),
    min(len(one), len(two)), one.shape[1],
  )  # fmt: skip


def evaluate(run, source_images, count, network, options=None, progress=True):
  """Fréchet distance of `count` samples to real images, and its floor at the same N.

  Args:
    source_images: uint8 [M, H, W, C], shuffled with a fixed seed; the first `count` are the
      reference and the next ones, as many as there are, the floor's other side.

  Returns:
    A dictionary: "samples" (float images), "distance" and "floor" (`Distance`; the floor is None
    when fewer than `count` real images are left over).
  """
  if count < 2:
    raise ValueError(f"a Fréchet distance takes at least 2 samples, {count} were asked for")
  if count > len(source_images):
    raise ValueError(
      f"{count} images asked for, but the data set has {len(source_images)}; lower "
      "evaluation.samples or take a larger split"
    )
  order = np.random.default_rng(0).permutation(len(source_images))
  say = (lambda text: text) if progress else (lambda text: None)
  reference = extract(network, source_images[order[:count]], progress=say("features (real)"))
  samples = run.images(np.arange(count), options, say("sampling"))
  # As 8-bit images, like the real ones and like every published number.
  features = extract(network, plots.to_uint8(samples), progress=say("features (samples)"))
  floor = None
  rest = source_images[order[count : 2 * count]]
  if len(rest) == count:  # a floor at another N would be another number
    floor = distance(network, extract(network, rest), reference)
  return {"samples": samples, "distance": distance(network, features, reference), "floor": floor}
