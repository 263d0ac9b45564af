"""Augmentation: random changes of training images, each a function of (seed, step, place).

A list of parts in `data.augment`, after `data.flip`, in their order: "shift(pixels=2)".
"""

import dataclasses
from typing import Annotated

import tensorflow as tf

from soft_diffusion_tf import parts, rng
from soft_diffusion_tf.parts import Range

_FIRST_STREAM = 0x5EED  # of the seeds (seed, stream): the flip has 1


class Augmentation(parts.Part, role="augmentation"):
  """Changes training images: a part (see `parts`) with one method, `__call__`."""

  def __call__(self, images, seed, first):
    """The images of a batch, float32 [B, H, W, C] in [0, 1], changed.

    Args:
      seed: int64 [2], for `rng`: row p of a draw is a function of it and of first + p alone.
      first: the place of the batch's first image in the endless stream.
    """
    raise NotImplementedError

  def __str__(self):
    return parts.spell(self)


@dataclasses.dataclass(frozen=True)
class Flip(Augmentation, name="flip"):
  """Mirrors left-right with a probability."""

  probability: Annotated[float, Range(0, 1)] = 0.5

  def __call__(self, images, seed, first):
    draw = rng.uniform(seed, first, tf.shape(images)[0], (1, 1, 1))
    return tf.where(draw < self.probability, images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Shift(Augmentation, name="shift"):
  """Moves by up to `pixels` in each direction; the edge mirrors what comes in."""

  pixels: Annotated[int, Range(1, 4096)] = 2

  def __call__(self, images, seed, first):
    count = tf.shape(images)[0]
    draw = rng.uniform(seed, first, count, (2,))
    move = tf.cast(tf.floor(draw * (2 * self.pixels + 1)), tf.int32) - self.pixels
    for axis in (1, 2):
      size = tf.shape(images)[axis]
      place = tf.range(size)[None] + move[:, axis - 1, None]
      last = size - 1
      place = last - tf.abs(last - tf.math.floormod(place, tf.maximum(2 * last, 1)))
      images = tf.gather(images, place, axis=axis, batch_dims=1)
    return images


def augmented(images, augment, seed, first):
  """A batch, changed by each of a list of augmentations in turn."""
  for k, change in enumerate(augment):
    stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(_FIRST_STREAM + k, tf.int64)])
    images = change(images, stream, first)
  return images
