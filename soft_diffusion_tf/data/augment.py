"""Augmentation: random changes of training images, each a function of (seed, step, place).

A list of parts in `data.augment`, after `data.flip`, in their order: "shift(pixels=2)". A part may
say in numbers what it did to each image, its label, which a network can be told.
"""

import dataclasses
import math
from typing import Annotated

import tensorflow as tf

from soft_diffusion_tf import parts, rng
from soft_diffusion_tf.parts import Range

_FIRST_STREAM = 0x5EED  # of the seeds (seed, stream): the flip has 1
Chance = Annotated[float, Range(0, 1)]


class Augmentation(parts.Part, role="augmentation"):
  """Changes training images: a part (see `parts`) with one method, `__call__`.

  Or with `labelled` and `label_size`, where it says in numbers what it did.
  """

  @property
  def label_size(self):
    """Numbers that say what was done to an image; zeros say that nothing was."""
    return 0

  def labelled(self, images, seed, first):
    """Like `__call__`, with the labels float32 [B, label_size]."""
    return self(images, seed, first), tf.zeros([tf.shape(images)[0], 0])

  def check(self, image_shape):
    """Raises the ValueError of images [H, W, C] that it cannot change."""

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

  probability: Chance = 0.5

  def __call__(self, images, seed, first):
    return mirrored(images, rng.uniform(seed, first, tf.shape(images)[0]) < self.probability)


def mirrored(images, which, axis=2):
  """Images [B, H, W, C] of which those are mirrored that `which`, bool [B], says.

  By operations that take a fifth of the time of images[:, :, ::-1] and `tf.where`.
  """
  return tf.raw_ops.Select(condition=which, x=tf.reverse(images, [axis]), y=images)


@dataclasses.dataclass(frozen=True)
class Shift(Augmentation, name="shift"):
  """Moves by up to `pixels` in each direction; the edge mirrors what comes in."""

  pixels: Annotated[int, Range(1, 4096)] = 2

  def __call__(self, images, seed, first):
    draw = rng.uniform(seed, first, tf.shape(images)[0], (2,))
    return _moved(images, tf.cast(tf.floor(draw * (2 * self.pixels + 1)), tf.int32) - self.pixels)


def _moved(images, move):
  """Images moved up and to the left by whole pixels, int32 [B, 2]; the edge is a mirror."""
  for axis in (1, 2):
    last = tf.shape(images)[axis] - 1
    place = tf.range(last + 1)[None] + move[:, axis - 1, None]
    place = last - tf.abs(last - tf.math.floormod(place, tf.maximum(2 * last, 1)))
    images = tf.gather(images, place, axis=axis, batch_dims=1)
  return images


@dataclasses.dataclass(frozen=True)
class EDM(Augmentation, name="edm"):
  """The non-leaking augmentation of Karras et al. 2022 (arXiv:2206.00364, appendix F.2).

  Each field is the probability that its change is drawn for an image; by default they are the
  paper's. What was drawn is the image's label, the parameters in the order of the fields that are
  not 0. A network that is told it (`network.augment_dim`) draws images that nothing was done to.

  Attributes:
    x_flip, y_flip: mirrors one time in two.
    quarter_turns: turns by 0, 90, 180 or 270 degrees; of images that are not square by 0 or 180.
    shift: moves by whole pixels, up to an eighth of the side.
    scale: by 2 to the power of a normal number of std 0.2.
    rotate: by any angle.
    stretch: along any axis by a factor as of `scale`, and across it by its inverse.
    move: by normal numbers of std an eighth of the side, not whole pixels.
    brightness, contrast, invert, hue, saturation: of the colours: added, about the middle,
      mirrored in brightness, turned, and away from grey.
  """

  x_flip: Chance = 1.0
  y_flip: Chance = 0.12
  quarter_turns: Chance = 0.0
  shift: Chance = 0.0
  scale: Chance = 0.12
  rotate: Chance = 0.12
  stretch: Chance = 0.12
  move: Chance = 0.12
  brightness: Chance = 0.0
  contrast: Chance = 0.0
  invert: Chance = 0.0
  hue: Chance = 0.0
  saturation: Chance = 0.0

  @property
  def label_size(self):
    return sum(_SIZES[name] for name in _SIZES if getattr(self, name))

  def check(self, image_shape):
    channels = image_shape[2]
    for name, most in (("hue", channels == 3), ("saturation", channels > 1)):
      if getattr(self, name) and not most:
        raise ValueError(
          f"data.augment: edm({name}={getattr(self, name):g}) changes colours, and an image of "
          f"{channels} channels has none; leave it out"
        )

  def __call__(self, images, seed, first):
    return self.labelled(images, seed, first)[0]

  def labelled(self, images, seed, first):
    count, square = tf.shape(images)[0], images.shape[1] == images.shape[2]
    # Sines and powers of the remainder of a packet of the processor round differently, and a row
    # would depend on their number: so all are computed for whole packets, and cut off then.
    whole = -(-count // _PACKET) * _PACKET
    all_drawn = {name: value * on for name, value, on in self._draw(seed, first, whole, square)}
    drawn = {name: value[:count] for name, value in all_drawn.items()}
    did = lambda *names: any(getattr(self, name) for name in names)
    for axis, name in ((2, "x_flip"), (1, "y_flip")):
      if did(name):
        images = mirrored(images, drawn[name][:, 0] > 0, axis)
    if did("quarter_turns"):
      images = _turned(images, drawn["quarter_turns"][:, 0], square)
    if did("shift"):
      reach = tf.cast(tf.shape(images)[1:3], tf.float32) * _REACH
      pixels = tf.round(all_drawn["shift"] * reach)
      all_drawn["shift"] = pixels / reach
      images = _moved(images, tf.cast(pixels[:count], tf.int32))
    if did(*_GEOMETRIC):
      changed = tf.reduce_any(tf.concat([drawn[n] != 0 for n in _GEOMETRIC], 1), 1)
      images = _where(changed, images, _warped, _matrix(all_drawn, images)[:count])
    if did(*_COLOURS):
      changed = tf.reduce_any(tf.concat([drawn[n] != 0 for n in _COLOURS], 1), 1)
      images = _where(
        changed, images, _recoloured, _colour_matrix(all_drawn, images.shape[3])[:count]
      )
    label = [_told(name, all_drawn[name]) for name in _SIZES if did(name)]
    return images, tf.concat([*label, tf.zeros([whole, 0])], 1)[:count]

  def _draw(self, seed, first, count, square):
    """(name, numbers float32 [B, n], 1 or 0 float32 [B, 1]) of each change.

    Every change has draws of its own, so that none depends on the probability of another.
    """
    streams = [rng.fold_in(seed, k) for k in range(3)]
    gate = rng.uniform(streams[0], first, count, (len(_SIZES),))
    even = rng.uniform(streams[1], first, count, (8,))
    normal = rng.normal(streams[2], first, count, (7,))
    coin = lambda k: tf.cast(even[:, k : k + 1] < 0.5, tf.float32)
    angle = lambda k: (2 * even[:, k : k + 1] - 1) * math.pi
    turns = tf.floor(4 * even[:, 2:3]) if square else 2 * coin(2)
    axis = normal[:, 1:2] * tf.concat([tf.cos(angle(5)), tf.sin(angle(5))], 1)
    values = {
      "x_flip": coin(0),
      "y_flip": coin(1),
      "quarter_turns": turns,
      "shift": 2 * even[:, 3:5] - 1,
      "scale": normal[:, 0:1],
      "rotate": angle(6),
      "stretch": axis,
      "move": normal[:, 2:4],
      "brightness": normal[:, 4:5],
      "contrast": normal[:, 5:6],
      "invert": tf.cast(gate[:, 10:11] < self.invert / 2, tf.float32),
      "hue": angle(7),
      "saturation": normal[:, 6:7],
    }
    for k, (name, value) in enumerate(values.items()):
      yield name, value, tf.cast(gate[:, k : k + 1] < getattr(self, name), tf.float32)


_SIZES = {  # change → numbers of its label
  "x_flip": 1,
  "y_flip": 1,
  "quarter_turns": 2,
  "shift": 2,
  "scale": 1,
  "rotate": 2,
  "stretch": 2,
  "move": 2,
  "brightness": 1,
  "contrast": 1,
  "invert": 1,
  "hue": 2,
  "saturation": 1,
}
_GEOMETRIC = ("scale", "rotate", "stretch", "move")
_COLOURS = ("brightness", "contrast", "invert", "hue", "saturation")
_POWER, _REACH = 0.2, 1 / 8  # of 2, in scale and stretch; of the side, in shift and move
_PACKET = 32  # more than any processor's numbers in a packet
_BRIGHTER, _CONTRAST = 0.2, 0.5  # of colours in [−1, 1]


def _told(name, value):
  """The label of a change; an angle is told as a point on the circle, less that of no angle."""
  if name not in ("quarter_turns", "rotate", "hue"):
    return value
  angle = value * (math.pi / 2) if name == "quarter_turns" else value
  return tf.concat([tf.cos(angle) - 1, tf.sin(angle)], 1)


def _turned(images, turns, square):
  """Images turned by quarters; of those that are not square by halves."""
  half = images[:, ::-1, ::-1]
  if not square:
    return tf.where(turns[:, None, None, None] == 2, half, images)
  quarter = tf.transpose(images, [0, 2, 1, 3])[:, ::-1]
  found = images
  for k, turned in ((1, quarter), (2, half), (3, quarter[:, ::-1, ::-1])):
    found = tf.where(turns[:, None, None, None] == k, turned, found)
  return found


def _where(changed, images, change, numbers):
  """Images of which some are changed; the others keep their bits, and cost nothing."""
  rows = tf.cast(tf.where(changed)[:, 0], tf.int32)
  new = change(tf.gather(images, rows), tf.gather(numbers, rows))
  return tf.tensor_scatter_nd_update(images, rows[:, None], tf.clip_by_value(new, 0.0, 1.0))


def _matrix(drawn, images):
  """What brings a place (x, y, 1) of the changed image to its place before, float32 [B, 3, 3].

  Places are measured in pixels from the image's centre.
  """
  one, nought = tf.ones_like(drawn["scale"][:, 0]), tf.zeros_like(drawn["scale"][:, 0])

  def matrix(a, b, c, d, x=nought, y=nought):
    rows = [tf.stack(r, 1) for r in ((a, b, x), (c, d, y), (nought, nought, one))]
    return tf.stack(rows, 1)

  turned = lambda angle: matrix(tf.cos(angle), -tf.sin(angle), tf.sin(angle), tf.cos(angle))
  height, width = (tf.cast(tf.shape(images)[k], tf.float32) * _REACH for k in (1, 2))
  along = tf.atan2(drawn["stretch"][:, 1], drawn["stretch"][:, 0])
  by = tf.pow(2.0, _POWER * tf.norm(drawn["stretch"], axis=1))
  size = tf.pow(2.0, -_POWER * drawn["scale"][:, 0])
  there = matrix(
    one, nought, nought, one, -width * drawn["move"][:, 0], -height * drawn["move"][:, 1]
  )
  stretched = turned(along) @ matrix(1 / by, nought, nought, by) @ turned(-along)
  back = matrix(size, nought, nought, size) @ turned(-drawn["rotate"][:, 0])
  return back @ stretched @ there


def _warped(images, matrix):
  """Images of which place p shows what was at the place matrix · p; the edge is a mirror.

  At twice the size, so that interpolation between pixels costs no detail.
  """
  height, width = (images.shape[k] for k in (1, 2))
  large = tf.image.resize(images, [2 * height, 2 * width], "lanczos3")
  middle = tf.constant([width - 0.5, height - 0.5])  # of places numbered from 0
  linear, offset = matrix[:, :2, :2], 2 * matrix[:, :2, 2]
  # Not by a matrix product, which rounds otherwise where there is one image.
  offset += middle - (linear[:, :, 0] * middle[0] + linear[:, :, 1] * middle[1])
  rows = tf.concat([linear, offset[:, :, None]], 2)
  transforms = tf.concat([tf.reshape(rows, [-1, 6]), tf.zeros([tf.shape(rows)[0], 2])], 1)
  large = tf.raw_ops.ImageProjectiveTransformV3(
    images=large,
    transforms=transforms,
    output_shape=[2 * height, 2 * width],
    fill_value=0.0,
    interpolation="BILINEAR",
    fill_mode="REFLECT",
  )
  return tf.image.resize(large, [height, width], "lanczos3", antialias=True)


def _colour_matrix(drawn, channels):
  """What changes a colour (in [−1, 1], with a 1 behind it), float32 [B, C, C + 1]."""
  grey = tf.fill([channels, channels], 1.0 / channels)  # onto the axis from black to white
  alone = tf.eye(channels) - grey
  each = lambda name: drawn[name][:, :, None]
  mixed = tf.eye(channels) * tf.pow(2.0, _CONTRAST * each("contrast"))
  mixed = (tf.eye(channels) - 2.0 * each("invert") * grey) @ mixed
  if channels == 3:
    across = tf.constant([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    angle = each("hue")
    mixed = (grey + tf.cos(angle) * alone + tf.sin(angle) * across) @ mixed
  mixed = (grey + tf.pow(2.0, each("saturation")) * alone) @ mixed
  brighter = tf.fill([1, channels, 1], _BRIGHTER) * each("brightness")
  # Added first of all, so that what comes after it acts on it as well.
  return tf.concat([mixed, mixed @ brighter], 2)


def _recoloured(images, matrix):
  channels = images.shape[3]
  flat = tf.reshape(2.0 * images - 1.0, [tf.shape(images)[0], -1, channels])
  each = [flat[:, :, c : c + 1] * matrix[:, None, :, c] for c in range(channels)]
  flat = sum(each, start=matrix[:, None, :, channels])  # see `_warped`
  return tf.reshape((flat + 1.0) / 2.0, tf.shape(images))


def label_size(augment):
  """Numbers of the labels of a list of augmentations."""
  return sum(change.label_size for change in augment)


def augmented(images, augment, seed, first):
  """A batch, changed by each of a list of augmentations in turn, and the labels of all of them."""
  labels = [tf.zeros([tf.shape(images)[0], 0])]
  for k, change in enumerate(augment):
    stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(_FIRST_STREAM + k, tf.int64)])
    images, label = change.labelled(images, stream, first)
    labels.append(label)
  return images, tf.concat(labels, 1)
