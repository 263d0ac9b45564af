"""A small classifier of a data set's own labels, as a feature network that needs no download.

It is trained once per data set in seconds to minutes, seeded, and kept in the user's cache
(`$XDG_CACHE_HOME` or ~/.cache). Its features judge small sets such as the digits well; its
distances compare with no others.
"""

import dataclasses
import hashlib
import os
import pathlib

import keras
import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import arrays, data, files

RECIPE = 1  # raise it when the network or its training changes: it is part of the cache's key
STEPS, BATCH, RATE = 1000, 64, 2e-3
HELD_OUT = 10  # every tenth image is kept back to measure the accuracy


@dataclasses.dataclass(frozen=True)
class Classifier:
  """network: images float32 [B, H, W, C] in [0, 1] → features [B, D] and logits [B, K].

  Features are scaled to a mean square of 1 over the data set. `accuracy` is the share of held-out
  images that it classifies right; `digest` is the SHA-256 of its weights.
  """

  network: keras.Model
  accuracy: float
  digest: str


class Scale(keras.layers.Layer):
  """Multiplies by one number, which is set after training."""

  def build(self, input_shape):
    self.factor = self.add_weight(shape=(), initializer="ones", trainable=False, name="factor")

  def call(self, x):
    return self.factor * x


def build(shape, classes, seed=0):
  """Convolutions that halve the image down to about 4×4, averaged over space; weights by seed."""
  images = keras.Input(shape)
  x, channels, layer = 2.0 * images - 1.0, 32, 0

  def convolve(x, channels, stride):
    nonlocal layer
    layer += 1
    initial = keras.initializers.HeNormal(seed=seed * 100 + layer)
    conv = keras.layers.Conv2D(
      channels, 3, stride, padding="same", activation="relu", kernel_initializer=initial
    )
    return conv(x)

  x = convolve(x, channels, 1)
  while min(x.shape[1:3]) > 4:
    channels = min(2 * channels, 128)
    x = convolve(x, channels, 2)
  x = convolve(x, channels, 1)
  features = keras.layers.GlobalAveragePooling2D()(x)
  scaled = Scale(name="scale")(features)
  initial = keras.initializers.GlorotUniform(seed=seed * 100)
  logits = keras.layers.Dense(classes, kernel_initializer=initial)(features)
  return keras.Model(images, [scaled, logits])


def _train(source, seed, progress):
  held = np.arange(len(source)) % HELD_OUT == HELD_OUT - 1
  labels = np.unique(source.labels, return_inverse=True)[1].astype(np.int64)
  network = build(source.images.shape[1:], int(labels.max()) + 1, seed)
  rate = keras.optimizers.schedules.CosineDecay(RATE, STEPS)
  optimizer = keras.optimizers.Adam(rate)
  optimizer.build(network.trainable_variables)
  images, targets = tf.constant(source.images[~held]), tf.constant(labels[~held])
  order = data.order(tf.range(STEPS * BATCH, dtype=tf.int64), len(images), seed)

  @tf.function
  def step(index):
    x = tf.cast(tf.gather(images, index), tf.float32) / 255.0
    with tf.GradientTape() as tape:
      logits = network(x, training=True)[1]
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(targets, index), logits)
      loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, network.trainable_variables)
    optimizer.apply(gradients, network.trainable_variables)

  for k in tqdm.trange(STEPS, desc="training the classifier", disable=not progress):
    step(order[k * BATCH : (k + 1) * BATCH])
  parts = np.array_split(np.flatnonzero(~held), -(-len(images) // 500))
  squares = [np.square(network(source.floats(part))[0]).mean(1) for part in parts]
  network.get_layer("scale").factor.assign(1 / np.sqrt(np.concatenate(squares).mean()))
  right = [
    np.argmax(network(source.floats(part))[1], 1) == labels[part]
    for part in np.array_split(np.flatnonzero(held), max(1, held.sum() // 500))
  ]
  return network, float(np.concatenate(right).mean())


def _key(source, seed):
  total = hashlib.sha256(f"{RECIPE} {seed} {source.images.shape}".encode())
  total.update(np.ascontiguousarray(source.images))
  total.update(np.ascontiguousarray(source.labels))
  return total.hexdigest()[:16]


def cache_folder():
  """Where classifiers are kept."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "soft_diffusion_tf"


def get(source, seed=0, folder=None, progress=True):
  """The `Classifier` of a data set, from the cache if it is there, else trained and put there.

  Raises:
    ValueError: the data set has no labels, or too few images.
  """
  count = len(np.unique(source.labels))
  if count < 2 or len(source) < 2 * HELD_OUT:
    raise ValueError(
      f"{source.name}: a classifier needs at least 2 classes and {2 * HELD_OUT} images, got "
      f"{count} and {len(source)}; take another feature_net, or one folder per class"
    )
  path = (
    pathlib.Path(folder) if folder else cache_folder()
  ) / f"classifier-{_key(source, seed)}.npz"
  network = build(source.images.shape[1:], count, seed)
  try:
    with arrays.opened(path, "not a kept classifier", "remove it") as content:
      accuracy = float(content.array("accuracy", []))
      shapes = [w.shape for w in network.get_weights()]
      weights = [content.array(f"w{k}", shape) for k, shape in enumerate(shapes)]
    network.set_weights(weights)
  except ValueError:  # none yet, or a torn file
    network, accuracy = _train(source, seed, progress)
    weights = network.get_weights()
    try:
      with files.atomic(path) as partial:
        np.savez(partial, accuracy=accuracy, **{f"w{k}": w for k, w in enumerate(weights)})
    except OSError as error:  # a home that cannot be written: it serves this process
      tqdm.tqdm.write(f"the classifier is not kept ({error}); set XDG_CACHE_HOME to a folder")
  network.trainable = False
  digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
  return Classifier(network, accuracy, digest)
