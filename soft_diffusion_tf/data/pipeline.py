"""The pipeline: float32 batches in [0, 1], each a function of (seed, step) alone."""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng


def order(position, count, seed):
  """Which image stands at each position of the endless stream: int64 [n] → int64 [n].

  Position p belongs to epoch p // count; every epoch is a permutation of its own, computed at the
  place that is asked for, so that any position can be had without the ones before it.
  """
  epoch, place = position // count, position % count
  key = tf.stack(
    [tf.fill(tf.shape(epoch), tf.cast(seed, tf.int64)), epoch, tf.zeros_like(epoch)], 1
  )
  last = tf.fill(tf.shape(place), tf.cast(count - 1, tf.int64))
  return tf.raw_ops.RandomIndexShuffle(index=place, seed=key, max_index=last, rounds=4)


def examples(images, index, first, seed=0, flip=False):
  """The images at an index, as a batch float32 [B, H, W, C] in [0, 1].

  Args:
    images: uint8 [N, H, W, C].
    index: int [B].
    first: the position in the endless stream of the batch's first image: it decides the flips.
    flip: mirror left-right with probability ½.
  """
  batch = tf.cast(tf.gather(images, index), tf.float32) / 255.0
  if not flip:
    return batch
  stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(1, tf.int64)])
  draw = rng.uniform(stream, first, tf.shape(index)[0], (1, 1, 1))
  return tf.where(draw < 0.5, batch[:, :, ::-1], batch)


def batches(source, batch_size, *, seed=0, start=0, flip=False, replicas=(1, 1)):
  """An endless tf.data pipeline of float32 [batch_size, H, W, C] in [0, 1].

  Batch k of the pipeline is batch start + k of the run: a function of (seed, start + k) alone.

  Args:
    flip: mirror left-right with probability ½.
    replicas: (H, R) of `strategies.replicas_by_host`, for a pipeline that is to be distributed.
      TensorFlow cuts a batch into H·R parts and gives the hosts every H-th of them: they are put
      into the order in which replica r gets the r-th H·R-th of the batch.
  """
  hosts, each = replicas
  if len(source) < 1 or batch_size < 1:
    raise ValueError(f"cannot batch {len(source)} images by {batch_size}")
  with tf.device("CPU:0"):  # a GPU's memory is for the network
    images = tf.constant(source.images)

  def make(step):
    first = step * batch_size
    position = first + tf.range(batch_size, dtype=tf.int64)
    batch = examples(images, order(position, len(source), seed), first, seed, flip)
    if hosts > 1 < each:
      parts = tf.reshape(batch, [hosts, each, -1, *source.images.shape[1:]])
      batch = tf.reshape(tf.transpose(parts, [1, 0, 2, 3, 4, 5]), tf.shape(batch))
    return tf.ensure_shape(batch, [batch_size, *source.images.shape[1:]])

  steps = tf.data.Dataset.range(start, np.iinfo(np.int64).max)
  sharding = tf.data.Options()  # several workers take their parts of the same global batch
  sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
  steps = steps.with_options(sharding)
  return steps.map(make, tf.data.AUTOTUNE, deterministic=True).prefetch(4)
