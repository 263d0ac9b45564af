"""The pipeline: float32 batches in [0, 1], each a function of (seed, step) alone."""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng
from soft_diffusion_tf.data.augment import augmented, label_size, mirrored


def order(position, count, seed, stream=0):
  """Which image stands at each position of the endless stream: int64 [n] → int64 [n].

  Position p belongs to epoch p // count; every epoch is a permutation of its own, computed at the
  place that is asked for, so that any position can be had without the ones before it.

  Args:
    count: of images; one number, or one for each position.
    stream: tells permutations of one seed apart; one number, or one for each position.
  """
  count, stream = (tf.cast(v, tf.int64) + tf.zeros_like(position) for v in (count, stream))
  epoch, place = position // count, position % count
  key = tf.stack([tf.fill(tf.shape(epoch), tf.cast(seed, tf.int64)), epoch, stream], 1)
  return tf.raw_ops.RandomIndexShuffle(index=place, seed=key, max_index=count - 1, rounds=4)


def balanced_order(position, labels, seed):
  """Like `order`, with every class equally often: int64 [n] → int64 [n].

  Of K classes each block of K positions holds each once, in an order of its own, and each class
  goes through its images like `order`. A small class comes round more often.

  Args:
    labels: int64 [N], an array.
  """
  _, counts = np.unique(labels, return_counts=True)
  members = tf.constant(np.argsort(labels, kind="stable"), tf.int64)  # class after class
  begins = tf.constant(np.cumsum(counts) - counts, tf.int64)
  block = position // len(counts)
  which = order(position, len(counts), seed, stream=1)
  size = tf.gather(tf.constant(counts, tf.int64), which)
  place = order(block, size, seed, stream=2 + which)
  return tf.gather(members, tf.gather(begins, which) + place)


def examples(images, index, first, seed=0, flip=False):
  """The images at an index, as a batch float32 [B, H, W, C] in [0, 1].

  Args:
    images: uint8 [N, H, W, C].
    index: int [B].
    first: the position in the endless stream of the batch's first image: it decides the flips.
    flip: mirror left-right with probability ½.
  """
  batch = tf.cast(_rows(images, index), tf.float32) / 255.0
  if not flip:
    return batch
  stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(1, tf.int64)])
  return mirrored(batch, rng.uniform(stream, first, tf.shape(index)[0]) < 0.5)


def _rows(images, index):
  """The images at an index: of an array where it lies, be it a mapped file; TensorFlow's constants
  would be a second copy of all.
  """
  if not isinstance(images, np.ndarray):
    return tf.gather(images, index)
  rows = tf.numpy_function(lambda k: np.asarray(images[k]), [index], tf.uint8, stateful=False)
  return tf.ensure_shape(rows, [*index.shape, *images.shape[1:]])


def batches(
  source,
  batch_size,
  *,
  seed=0,
  start=0,
  flip=False,
  part=(0, 1),
  each=1,
  labels=False,
  balanced=False,
  augment=(),
  told=False,
):
  """An endless tf.data pipeline of float32 [batch_size, H, W, C] in [0, 1].

  Batch k of the pipeline is batch start + k of the run: a function of (seed, start + k) alone.

  Args:
    flip: mirror left-right with probability ½.
    part, each: (h, H) and R, for worker h of H that feeds R replicas: it gets R pieces of every
      batch one after the other, [batch_size / (H·R), H, W, C], and reads no other images.
    labels: give pairs, of the images and their labels int64 [batch_size].
    told: give also what augmentation did, float32 [batch_size, `augment.label_size`], at the end.
    balanced: every class equally often (see `balanced_order`).
    augment: `augment.Augmentation`s, which change the images in turn.
  """
  host, hosts = part
  pieces = hosts * each
  if len(source) < 1 or batch_size < 1:
    raise ValueError(
      f"{len(source)} images cannot be batched by {batch_size}: give at least 1 image, and "
      "batch_size of at least 1"
    )
  if batch_size % pieces:
    raise ValueError(
      f"batch_size = {batch_size} is no multiple of {pieces}, workers times replicas; take one "
      "that is"
    )
  size = batch_size // pieces
  with tf.device("CPU:0"):  # a GPU's memory is for the network
    names = tf.constant(source.labels, tf.int64)

  def make(k):
    step, piece = start + k // each, host * each + k % each
    first = step * batch_size + piece * size
    position = first + tf.range(size, dtype=tf.int64)
    if balanced:
      index = balanced_order(position, source.labels, seed)
    else:
      index = order(position, len(source), seed)
    batch = examples(source.images, index, first, seed, flip)
    changed, done = augmented(batch, augment, seed, first)
    changed = tf.ensure_shape(changed, [size, *batch.shape[1:]])
    done = tf.ensure_shape(done, [size, label_size(augment)])
    batch = (changed, *[tf.gather(names, index)] * labels, *[done] * told)
    return batch if len(batch) > 1 else changed

  steps = tf.data.Dataset.range(np.iinfo(np.int64).max)
  return steps.map(make, tf.data.AUTOTUNE, deterministic=True).prefetch(4)
