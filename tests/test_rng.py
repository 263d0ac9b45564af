import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import rng

SEED = tf.constant([3, 4], tf.int64)


@pytest.mark.parametrize("shape", [(), (3,), (5, 5, 3), (8, 8, 1)])
@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_a_row_does_not_depend_on_the_rows_beside_it(draw, shape):
  whole = draw(SEED, 0, 64, shape).numpy()
  for first, rows in ((0, 1), (5, 3), (31, 33), (63, 1)):
    part = draw(SEED, first, rows, shape).numpy()
    np.testing.assert_array_equal(part, whole[first : first + rows])


def test_moments_and_range():
  u = rng.uniform(SEED, 0, 1000, (64,)).numpy()
  z = rng.normal(SEED, 0, 1000, (64,)).numpy()
  assert u.min() > 0
  assert u.max() < 1
  # 64,000 draws: standard errors 0.004 (mean) and 0.003 (std) of a normal; five of them.
  assert abs(z.mean()) < 0.02
  assert abs(z.std() - 1) < 0.015
  assert abs((z**4).mean() - 3) < 0.2
  assert abs(u.mean() - 0.5) < 0.006
  halves = z[:, :32].ravel(), z[:, 32:].ravel()  # the cosines and the sines of Box-Muller
  assert abs(np.corrcoef(*halves)[0, 1]) < 0.03


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_xla_draws_the_same_numbers(draw):
  compiled = tf.function(lambda seed, first: draw(seed, first, 10, (5, 3)), jit_compile=True)
  # 2e-6: XLA's logarithm and cosine round differently; other words would differ by about 1.
  np.testing.assert_allclose(compiled(SEED, 7), draw(SEED, 7, 10, (5, 3)), atol=2e-6)


@pytest.mark.parametrize("seed", [[-5, 3], [2**31 + 7, -1], [7, 2**40 + 2**31]])
def test_xla_takes_the_same_key_from_any_seed(seed):
  seed = tf.constant(seed, tf.int64)
  compiled = tf.function(lambda s: rng.bits(s, 2, 3, 8), jit_compile=True)
  np.testing.assert_array_equal(compiled(seed), rng.bits(seed, 2, 3, 8))
  deep = tf.function(lambda s: rng.normal(rng.fold_in(s, 1, 2), 0, 4, (9,)), jit_compile=True)
  np.testing.assert_allclose(deep(seed), rng.normal(rng.fold_in(seed, 1, 2), 0, 4, (9,)), atol=2e-6)


def test_an_image_depends_on_its_seed_and_the_salt_alone():
  seeds = rng.image_seeds([5, 7, 2**40, 9])
  together = rng.normal_per_image(seeds, 3, (5, 5, 1)).numpy()
  for k in range(4):
    alone = rng.normal_per_image(seeds[k : k + 1], 3, (5, 5, 1)).numpy()
    np.testing.assert_array_equal(alone[0], together[k])
  other = rng.normal_per_image(seeds, 4, (5, 5, 1)).numpy()
  flat = np.concatenate([together, other]).reshape(8, -1)
  assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.9  # 25 numbers each: no copies
  assert len(np.unique(flat)) == flat.size


def test_per_image_noise_under_xla():
  seeds = rng.image_seeds([5, 7])
  compiled = tf.function(lambda s, k: rng.normal_per_image(s, k, (4, 4, 1)), jit_compile=True)
  np.testing.assert_allclose(
    compiled(seeds, 3), rng.normal_per_image(seeds, 3, (4, 4, 1)), atol=2e-6
  )


@pytest.mark.parametrize("size", [1, 33, 400])
def test_per_image_words_under_xla_are_those_of_tensorflow(size):
  """Another route than TensorFlow's operation, with the same bits for any seed and salt."""
  seeds = tf.constant([0, 1, 7, 2**31, 2**32 + 5, 2**62 + 3, -1, -(2**40)], tf.int64)
  for salt in (0, 3, -2, 2**33):
    salt = tf.constant(salt, tf.int64)
    draw = lambda seeds, salt: rng.normal_per_image(seeds, salt, (size,))
    want = tf.function(draw, autograph=False)(seeds, salt)
    got = tf.function(draw, autograph=False, jit_compile=True)(seeds, salt)
    # 2e-6: XLA's logarithm and cosine round differently; another word would differ by about 1.
    np.testing.assert_allclose(got, want, atol=2e-6)
    key, _ = rng._key_counter(tf.stack([salt, tf.zeros_like(salt)]))
    words = rng._philox(key, tf.cast(seeds, tf.uint64), 64)
    for row, seed in zip(words, seeds):
      counter = tf.cast(tf.stack([tf.zeros_like(seed), seed]), tf.uint64)
      one = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[64], key=key, counter=counter, alg=1, dtype=tf.uint32
      )
      np.testing.assert_array_equal(row, one)


def test_fold_in_separates_streams():
  streams = [rng.fold_in(SEED), rng.fold_in(SEED, 0), rng.fold_in(SEED, 1), rng.fold_in(SEED, 0, 1)]
  draws = np.stack([rng.uniform(s, 0, 8).numpy() for s in streams])
  assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("seeds", [[0.5], 3, [[1]]])
def test_image_seeds_must_be_a_list_of_integers(seeds):
  with pytest.raises(ValueError, match="one per image"):
    rng.image_seeds(seeds)


def test_image_seeds_are_integers_of_64_bits():
  for seeds in ([2**63], [2**70], [0.5], ["a"], [[1]]):
    with pytest.raises(ValueError, match="seeds"):
      rng.image_seeds(seeds)
  rng.check_seeds(0, 2**63)
  rng.check_seeds(2**63 - 1, 1)
  for first, count in ((-1, 1), (2**63 - 1, 2), (2**63, 1), (1, 2**63)):
    with pytest.raises(ValueError, match=f"image seeds from {first} to"):
      rng.check_seeds(first, count)
