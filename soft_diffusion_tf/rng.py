"""Randomness as a pure function: of (seed, row) in training, of an image's seed in sampling.

Every draw starts from the 32-bit words of TensorFlow's stateless Philox generator, which are the
same on every device and under XLA. The ready-made `tf.random.stateless_normal` and
`stateless_uniform` are not used: with a seed that is not a constant, XLA gives other numbers than
the plain CPU kernels, even with `alg="philox"` (TF 2.21: only the integer words agree). So the
floats are made here, by Box-Muller, and eager, graph and XLA agree up to rounding.

A *row* is one example. Row p of a draw depends on the seed and on p alone: a replica that holds
rows 32-63 of a global batch draws exactly what one device would have drawn for these rows.
"""

import math

import tensorflow as tf

from soft_diffusion_tf import products

_PHILOX = 1  # the integer that raw ops take for alg="philox"
MOST_SEEDS = 2**63
_WORDS = 4  # words per Philox counter
_PACKET = 32  # words per row are padded to this, so that both halves of Box-Muller fill whole SIMD
# packets: the remainder of a packet loop rounds differently, and rows would depend on their number


def fold_in(seed, *data):
  """The seed of a sub-stream: `seed` (int [2]) mixed with each integer of `data` in turn."""
  for value in data:
    seed = tf.random.experimental.stateless_fold_in(seed, value, alg="philox")
  return seed


def _key_counter(seed):
  """Philox key and counter of a seed [2], from the lower 31 bits of its words.

  XLA and the plain kernels agree on a seed only while its words are not negative as 32-bit
  integers (TF 2.21), and `fold_in` gives such words half of the time.
  """
  seed = tf.bitwise.bitwise_and(seed, tf.constant(0x7FFFFFFF, seed.dtype))
  return tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)


def _padded(size):
  return -(-size // _PACKET) * _PACKET


def bits(seed, first, rows, size):
  """Random words, uint32 [rows, size up to the next 32]; row p depends on (seed, first + p)."""
  blocks = _padded(size) // _WORDS
  key, counter = _key_counter(tf.convert_to_tensor(seed))
  offset = tf.cast(tf.cast(first, tf.int64) * blocks, tf.uint64)
  words = tf.raw_ops.StatelessRandomUniformFullIntV2(
    shape=tf.stack([tf.cast(rows, tf.int32) * blocks * _WORDS]),
    key=key,
    counter=counter + tf.stack([offset, tf.zeros_like(offset)]),
    alg=_PHILOX,
    dtype=tf.uint32,
  )
  return tf.reshape(words, [-1, blocks * _WORDS])


def _open_unit(words):
  """uint32 → float32 strictly inside (0, 1): 23 bits and a half, so that neither end rounds."""
  high = tf.cast(tf.bitwise.right_shift(words, tf.constant(9, tf.uint32)), tf.int32)
  return (tf.cast(high, tf.float32) + 0.5) * (2.0**-23)


def _box_muller(words, shape):
  """uint32 [rows, 32k] → standard normals float32 [rows, *shape]."""
  u, v = tf.split(_open_unit(words), 2, axis=1)
  radius = tf.sqrt(-2.0 * tf.math.log(u))
  angle = (2.0 * math.pi) * v
  draws = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)
  return tf.reshape(draws[:, : math.prod(shape)], [-1, *shape])


def uniform(seed, first, rows, shape=()):
  """U(0, 1), float32 [rows, *shape]; row p depends on (seed, first + p) alone."""
  size = math.prod(shape)
  return tf.reshape(_open_unit(bits(seed, first, rows, size))[:, :size], [-1, *shape])


def normal(seed, first, rows, shape):
  """N(0, 1), float32 [rows, *shape]; row p depends on (seed, first + p) alone."""
  return _box_muller(bits(seed, first, rows, math.prod(shape)), shape)


def check_seeds(first, count):
  """Raises the ValueError of image seeds first … first + count − 1 that are not from 0 to 2⁶³ − 1.

  int64 would take others for seeds that they are not.
  """
  last = first + max(count, 1) - 1
  if not 0 <= first <= last < MOST_SEEDS:
    raise ValueError(
      f"image seeds from {first} to {last} are asked for; there are those from 0 to "
      f"{MOST_SEEDS - 1}"
    )


def image_seeds(seeds):
  """Image seeds, any integers [B], as int64; one integer names one image for good."""
  try:
    seeds = tf.convert_to_tensor(seeds)
  except (OverflowError, ValueError, TypeError) as error:
    raise ValueError(f"image seeds are integers of 64 bits, one per image ({error})") from None
  if not seeds.dtype.is_integer or seeds.shape.rank != 1:
    raise ValueError(
      f"seeds must be a list of integers, one per image, not {seeds.dtype.name} {seeds.shape}"
    )
  return tf.cast(seeds, tf.int64)


def normal_per_image(seeds, salt, shape):
  """N(0, 1), float32 [B, *shape]; entry i depends on (seeds[i], salt) alone.

  The salt picks the Philox key and the image's seed the upper half of the counter, so images never
  share a word and the loop over images holds a single operation.

  Args:
    seeds: int64 [B], one per image.
    salt: integer scalar that tells the draws of one image apart (the step's index).
  """
  words = _padded(math.prod(shape))
  salt = tf.cast(salt, tf.int64)
  key, _ = _key_counter(tf.stack([salt, tf.zeros_like(salt)]))
  if products.compiled():  # a loop over images would be a loop of tiny kernels on a GPU
    return _box_muller(_philox(key, tf.cast(seeds, tf.uint64), words), shape)
  counters = tf.cast(tf.stack([tf.zeros_like(seeds), seeds], axis=1), tf.uint64)

  def one(counter):
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
      shape=[words], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
    )

  drawn = tf.map_fn(one, counters, fn_output_signature=tf.TensorSpec([words], tf.uint32))
  return _box_muller(drawn, shape)


def _philox(key, high, words):
  """Philox4x32-10 for many counters at once, [B, words]: the words of TensorFlow's operation.

  Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

  Args:
    key: uint64 [1].
    high: uint64 [B], the upper half of each counter; the lower half counts the blocks from 0.
    words: a multiple of 4.
  """
  halves = lambda x: (tf.bitwise.bitwise_and(x, mask), tf.bitwise.right_shift(x, shift))
  mask, shift = tf.constant(0xFFFFFFFF, tf.uint64), tf.constant(32, tf.uint64)
  multipliers = [tf.constant(m, tf.uint64) for m in (0xD2511F53, 0xCD9E8D57)]
  steps = [tf.constant(w, tf.uint64) for w in (0x9E3779B9, 0xBB67AE85)]
  block = tf.cast(tf.range(words // 4), tf.uint64)[tf.newaxis]
  zero = tf.zeros_like(high)[:, tf.newaxis] * block
  x0, x1 = zero + block, zero
  x2, x3 = (zero + half[:, tf.newaxis] for half in halves(high))
  keys = halves(key[0])
  for _ in range(10):
    (low_0, high_0), (low_1, high_1) = halves(multipliers[0] * x0), halves(multipliers[1] * x2)
    xor = tf.bitwise.bitwise_xor
    x0, x1, x2, x3 = xor(xor(high_1, x1), keys[0]), low_1, xor(xor(high_0, x3), keys[1]), low_0
    keys = [tf.bitwise.bitwise_and(k + w, mask) for k, w in zip(keys, steps)]
  drawn = tf.stack([x0, x1, x2, x3], axis=2)
  return tf.cast(tf.reshape(drawn, [-1, words]), tf.uint32)
