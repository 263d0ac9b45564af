"""Feature networks: images in, features and logits out, whatever is inside.

A network is named by one string (`feature_net` in configs and flags):

  pixels              the pixels themselves
  pixels:SIDE         the same of images brought to SIDE×SIDE
  classifier          a small classifier of the data set's labels, trained here (`classifier`)
  tfgan               TF-GAN's Inception module, fetched from tfhub.dev, kept in TFHUB_CACHE_DIR
  tfgan:FOLDER        the same from a local copy
  FOLDER[#OUTPUT]     any SavedModel that takes images and gives OUTPUT, by default "pool_3"

A SavedModel takes RGB float32 in [−1, 1] as TF-GAN's does, or uint8 in 0 … 255; it gives a
dictionary with OUTPUT [B, ...] and perhaps "logits" [B, K]. Where its signature fixes a height and
a width, images are brought to them by antialiased bilinear interpolation
(`tf.image.resize(..., antialias=True)`), real and generated ones alike; where it leaves them open,
it gets images as they are and resizes as it likes. TF-GAN's module gets 299×299.

Numbers are called by the name; a SavedModel's by its folder's, "./pixels" where that is taken.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts, trust
from soft_diffusion_tf.evaluation import classifier

TFGAN_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
TFGAN_SIZE, TFGAN_FEATURES, TFGAN_CLASSES = 299, 2048, 1008
TIMEOUT = 30  # seconds without an answer from the network
OUTPUT = "pool_3"
MAX_DIMENSION = 4096  # the largest covariance whose eigenvalues come in minutes
_BUILT_IN = ("pixels", "classifier", "tfgan")


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
  """Calling it: images uint8 or float in [0, 1], [B, H, W, C] → features float32 [B, D], logits.

  Attributes:
    name: what its numbers are called by.
    function: the network on float32 images in [0, 1] → (features, logits or None).
    digest: SHA-256 of its weights ("" where it has none).
    note: a remark on its quality, or "".
    fid: whether it is TF-GAN's Inception, whose Fréchet distance alone is an FID.
  """

  name: str
  function: Callable
  digest: str = ""
  note: str = ""
  fid: bool = False

  @property
  def label(self):
    """What a Fréchet distance by this network is called."""
    return "FID" if self.fid else f"FD[{self.name}]"

  def __call__(self, images):
    images = np.asarray(images)
    images = images.astype(np.float32) / 255.0 if images.dtype == np.uint8 else np.float32(images)
    features, logits = self.function(tf.constant(images))
    features = np.asarray(features, np.float32)
    if features.shape[1] > MAX_DIMENSION:
      raise ValueError(
        f"{self.name} gives {features.shape[1]} features an image, more than the {MAX_DIMENSION} "
        "that can be compared; take another feature_net, such as pixels:32"
      )
    return features, None if logits is None else np.asarray(logits, np.float32)


def feature_network(name, source=None, progress=True, folder=None):
  """A feature network by name (see the module's text).

  Args:
    source: a `data.Source` with labels, which "classifier" is trained on.
    folder: where "classifier" is kept, instead of the user's cache.

  Raises:
    ValueError: one line that names what cannot be loaded or does not fit, and the remedy.
  """
  kind, _, rest = name.partition(":")
  if kind == "pixels":
    return _pixels(name, rest)
  if name == "classifier":
    if source is None:
      raise ValueError("feature_net = 'classifier' needs a data set with labels to be trained on")
    own = classifier.get(source, folder=folder, progress=progress)
    spec = tf.TensorSpec([None, *source.images.shape[1:]], tf.float32)
    call = tf.function(own.network, autograph=False, input_signature=[spec])
    note = f"right on {own.accuracy:.1%} of held-out images"
    return FeatureNetwork("classifier", call, own.digest, note)
  if kind == "tfgan":
    return _tfgan(rest or _fetch())
  folder, _, output = name.partition("#")
  call, digest, _ = _saved_model(pathlib.Path(folder), output or OUTPUT)
  own = pathlib.Path(folder).resolve().name
  if own.partition(":")[0] in _BUILT_IN:  # must not pass for one
    own = f"./{own}"
  return FeatureNetwork(own + name[len(folder) :], call, digest)


def check_consent(name):
  """Raises the `trust.UntrustedCode` of a network that a config names and that is a program.

  A SavedModel is one: TensorFlow runs whatever graph is in it, and graphs read and write files.
  """
  if name not in ("classifier", "tfgan") and name.partition(":")[0] != "pixels":
    trust.check(name, "a SavedModel as feature network")


def resize(images, height, width):
  """Antialiased bilinear interpolation: the one way in which images are resized for features."""
  if images.shape[1:3] == (height, width):
    return images
  return tf.image.resize(images, [height, width], method="bilinear", antialias=True)


def _pixels(name, side):
  if side and not (side.isdigit() and int(side) > 0):
    raise ValueError(f"feature_net = {name!r}: give pixels or pixels:SIDE, such as pixels:32")

  def function(images):
    images = resize(images, int(side), int(side)) if side else images
    return tf.reshape(images, [tf.shape(images)[0], -1]), None

  return FeatureNetwork(name, function)


def _cached():
  """Where TF-GAN's Inception is kept: the folder that tensorflow_hub would use, too."""
  cache = os.environ.get("TFHUB_CACHE_DIR") or pathlib.Path.home() / ".cache" / "tfhub_modules"
  return pathlib.Path(cache) / hashlib.sha1(TFGAN_HANDLE.encode()).hexdigest()


def _fetch():
  """The folder of TF-GAN's Inception, fetched unless that was done before."""
  folder = _cached()
  if (folder / "saved_model.pb").is_file():
    return folder
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
      address = f"{TFGAN_HANDLE}?tf-hub-format=compressed"
      with (
        urllib.request.urlopen(address, timeout=TIMEOUT) as answer,
        tarfile.open(fileobj=answer, mode="r|gz") as archive,
      ):
        archive.extractall(f"{partial}/model", filter="data")
      if not pathlib.Path(partial, "model", "saved_model.pb").is_file():
        raise OSError("there is no SavedModel in the answer")
      shutil.rmtree(folder, ignore_errors=True)  # what a broken fetch of other software left
      os.rename(f"{partial}/model", folder)
    return folder
  except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
    text = parts.first_line(error)
    raise ValueError(
      f"cannot fetch {TFGAN_HANDLE} ({text}); download {TFGAN_HANDLE}?tf-hub-format=compressed on "
      "a machine with network, unpack it, and give its folder by --feature_net=tfgan:FOLDER"
    ) from None


def _tfgan(folder):
  call, digest, sizes = _saved_model(pathlib.Path(folder), OUTPUT, TFGAN_SIZE)
  if sizes != (TFGAN_FEATURES, TFGAN_CLASSES):
    raise ValueError(
      f"{folder}: not TF-GAN's Inception, which gives {TFGAN_FEATURES} features and "
      f"{TFGAN_CLASSES} logits, not {sizes[0]} and {sizes[1]}; give it as --feature_net={folder}"
    )
  return FeatureNetwork("tfgan", call, digest, fid=True)


def _entry(module, folder):
  """The function that takes the images, and the TensorSpec of its one input."""
  found = []
  if callable(module):
    for f in getattr(module.__call__, "concrete_functions", ()):
      found.append((module, *f.structured_input_signature))
  for name, f in getattr(module, "signatures", {}).items():
    if name == "serving_default" or len(module.signatures) == 1:
      found.append((f, *f.structured_input_signature))
  for function, args, kwargs in found:
    specs = tf.nest.flatten((args, kwargs))
    if len(specs) == 1 and isinstance(specs[0], tf.TensorSpec):
      spec = specs[0]
      takes_images = spec.shape.rank == 4 and spec.shape[3] in (1, 3, None)
      if takes_images and spec.dtype in (tf.float32, tf.uint8):
        return function, spec
  inputs = "; ".join(str(tf.nest.flatten((a, k))) for _, a, k in found) or "nothing callable"
  raise ValueError(
    f"{folder}: takes {inputs}, not images float32 [B, H, W, 3]; take another feature network"
  )


def _saved_model(folder, output, size=None):
  """(function, digest, (D, K)) of a SavedModel; K is None without logits."""
  if not (folder / "saved_model.pb").is_file():
    raise ValueError(
      f"{folder}: not a SavedModel folder; feature_net is pixels, classifier, tfgan, tfgan:FOLDER "
      "or FOLDER"
    )
  try:
    module = tf.saved_model.load(str(folder))
  except Exception as error:  # damaged files raise many kinds
    text = parts.first_line(error)
    raise ValueError(f"{folder}: cannot be loaded ({text}); copy the SavedModel anew") from None
  entry, spec = _entry(module, folder)
  height, width = spec.shape[1] or size, spec.shape[2] or size
  channels = spec.shape[3] or 3

  def fit(images):
    if channels == 3 and images.shape[-1] == 1:
      images = tf.image.grayscale_to_rgb(images)
    elif channels == 1 and images.shape[-1] == 3:
      images = tf.image.rgb_to_grayscale(images)
    return resize(images, height, width) if height and width else images

  @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, height, width, channels])])
  def outputs(images):
    if spec.dtype == tf.uint8:
      out = entry(tf.cast(tf.round(255.0 * images), tf.uint8))
    else:
      out = entry(2.0 * images - 1.0)
    return out if isinstance(out, dict) else {OUTPUT: out} if tf.is_tensor(out) else {}

  try:
    probe = outputs(tf.zeros([2, height or 32, width or 32, channels]))
  except Exception as error:  # whatever the network's own operations raise
    text = parts.first_line(error)
    raise ValueError(f"{folder}: fails on a black image ({text}); is it whole?") from None
  if output not in probe:
    names = sorted(probe)
    other = names[0] if names else "NAME"
    raise ValueError(
      f"{folder}: gives {names}, not {output!r}; name its output by --feature_net={folder}#{other}"
    )
  if probe[output].shape.rank < 2 or probe[output].shape[0] != 2:
    raise ValueError(
      f"{folder}: its {output!r} has shape {tuple(probe[output].shape)} for 2 images, not [2, D]; "
      "take another output"
    )

  def function(images):
    out = outputs(fit(images))
    return tf.reshape(out[output], [len(images), -1]), out.get("logits")

  logits = probe.get("logits")
  sizes = int(np.prod(probe[output].shape[1:])), None if logits is None else logits.shape[-1]
  return function, _digest(folder), sizes


def _digest(folder):
  """SHA-256 over the names and bytes of what a SavedModel computes with."""
  total = hashlib.sha256()
  files = [folder / "saved_model.pb"]
  for part in ("variables", "assets"):
    files += [f for f in sorted((folder / part).rglob("*")) if f.is_file()]
  for file in files:
    total.update(file.relative_to(folder).as_posix().encode())
    with contextlib.closing(file.open("rb")) as content:
      while block := content.read(1 << 20):
        total.update(block)
  return total.hexdigest()
