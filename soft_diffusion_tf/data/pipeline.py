"""The pipeline: float32 batches in [0, 1], each a function of (seed, step) alone."""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng
from soft_diffusion_tf.data.augment import augmented


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
  draw = rng.uniform(stream, first, tf.shape(index)[0], (1, 1, 1))
  return tf.where(draw < 0.5, batch[:, :, ::-1], batch)


def _rows(images, index):
  """The images at an index; of a pack in a file these alone are read."""
  if not isinstance(images, np.memmap):
    return tf.gather(images, index)
  rows = tf.numpy_function(lambda k: np.asarray(images[k]), [index], tf.uint8, stateful=False)
  return tf.ensure_shape(rows, [*index.shape, *images.shape[1:]])


def batches(
  source, batch_size, *, seed=0, start=0, flip=False, replicas=(1, 1), labels=False,
  balanced=False, augment=(),
):  # fmt: skip
  """An endless tf.data pipeline of float32 [batch_size, H, W, C] in [0, 1].

  Batch k of the pipeline is batch start + k of the run: a function of (seed, start + k) alone.

  Args:
    flip: mirror left-right with probability ½.
    replicas: (H, R) of `strategies.replicas_by_host`, for a pipeline that is to be distributed.
      TensorFlow cuts a batch into H·R parts and gives the hosts every H-th of them: they are put
      into the order in which replica r gets the r-th H·R-th of the batch.
    labels: give pairs, of the images and their labels int64 [batch_size].
    balanced: every class equally often (see `balanced_order`).
    augment: `augment.Augmentation`s, which change the images in turn.
  """
  hosts, each = replicas
  if len(source) < 1 or batch_size < 1:
    raise ValueError(f"cannot batch {len(source)} images by {batch_size}")
  with tf.device("CPU:0"):  # a GPU's memory is for the network
    images = source.images
    if not isinstance(images, np.memmap):
      images = tf.constant(images)
    names = tf.constant(source.labels, tf.int64)

  def arranged(values):
    """A part of a batch, in the order of the replicas that get it."""
    if hosts > 1 < each:
      parts = tf.reshape(values, [hosts, each, -1, *values.shape[1:]])
      turned = tf.transpose(parts, [1, 0, *range(2, len(parts.shape))])
      values = tf.reshape(turned, tf.shape(values))
    return tf.ensure_shape(values, [batch_size, *values.shape[1:]])

  def make(step):
    first = step * batch_size
    position = first + tf.range(batch_size, dtype=tf.int64)
    if balanced:
      index = balanced_order(position, source.labels, seed)
    else:
      index = order(position, len(source), seed)
    batch = examples(images, index, first, seed, flip)
    batch = arranged(augmented(batch, augment, seed, first))
    return (batch, arranged(tf.gather(names, index))) if labels else batch

  steps = tf.data.Dataset.range(start, np.iinfo(np.int64).max)
  sharding = tf.data.Options()  # several workers take their parts of the same global batch
  sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
  steps = steps.with_options(sharding)
  return steps.map(make, tf.data.AUTOTUNE, deterministic=True).prefetch(4)
