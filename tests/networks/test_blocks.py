"""The layers of NCSN++, each against a plain formula."""

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf.networks import blocks

SEED = tf.constant([3, 4])


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def printed_group_norm(x, groups, gamma, beta, activate):
  """Wu and He 2018, Eq. 1-6, in float64."""
  b, h, w, c = x.shape
  g = x.astype(np.float64).reshape(b, h * w, groups, c // groups)
  g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-6)
  y = g.reshape(x.shape) * gamma + beta
  return y / (1 + np.exp(-y)) if activate else y


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (48, 12), (256, 32), (384, 32)])
@pytest.mark.parametrize("activate", [False, True])
def test_group_norm(channels, groups, activate):
  layer = blocks.GroupNorm(channels, activate=activate)
  layer.gamma.assign(normals(channels, seed=1))
  layer.beta.assign(normals(channels, seed=2))
  x, shift = 3 + normals(2, 5, 3, channels), normals(2, channels, seed=3)
  want = printed_group_norm(
    x + shift[:, None, None], groups, layer.gamma.numpy(), layer.beta.numpy(), activate
  )
  # float32 against float64, with a mean of three deviations.
  np.testing.assert_allclose(layer(x, shift), want, atol=2e-5)


def test_group_norm_survives_a_large_mean():
  """E[x²] − E[x]² would leave nothing of a deviation of 1 beside a mean of 3000."""
  x = 3000 + normals(2, 8, 8, 8)
  y = blocks.GroupNorm(8, activate=False)(x).numpy()
  want = printed_group_norm(x, 2, 1, 0, False)
  np.testing.assert_allclose(y, want, atol=2e-3)  # spacing of float32 at 3000: 2.4e-4


@pytest.mark.parametrize("activate", [False, True])
def test_group_norm_gradient_is_that_of_the_formula(activate):
  """The hand-written gradient against automatic differentiation in float64."""
  c, groups = 16, 4
  parts = [normals(2, 3, 4, c), normals(2, c, seed=1), normals(c, seed=2), normals(c, seed=3)]
  v = normals(2, 3, 4, c, seed=4)

  def formula(x, shift, gamma, beta):
    g = tf.reshape(x + shift[:, None, None], [2, 12, groups, c // groups])
    mean, variance = tf.nn.moments(g, [1, 3], keepdims=True)
    y = tf.reshape((g - mean) / tf.sqrt(variance + 1e-6), x.shape) * gamma + beta
    return y * tf.sigmoid(y) if activate else y

  layer = blocks.GroupNorm(c, activate=activate)
  layer.gamma.assign(parts[2])
  layer.beta.assign(parts[3])
  x, shift = tf.constant(parts[0]), tf.constant(parts[1])
  with tf.GradientTape() as tape:
    tape.watch([x, shift])
    loss = tf.reduce_sum(layer(x, shift) * v)
  got = tape.gradient(loss, [x, shift, layer.gamma.value, layer.beta.value])
  wide = [tf.constant(p, tf.float64) for p in parts]
  with tf.GradientTape() as tape:
    tape.watch(wide)
    loss = tf.reduce_sum(formula(*wide) * v)
  for g, want in zip(got, tape.gradient(loss, wide)):
    np.testing.assert_allclose(g, want, atol=1e-5 * np.abs(want).max())  # float32 sums of 100 terms


def test_group_norm_refuses_indivisible_channels():
  with pytest.raises(ValueError, match="144 channels into 32 groups"):
    blocks.GroupNorm(144, activate=False)
  with pytest.raises(ValueError, match="2 channels"):
    blocks.GroupNorm(2, activate=False)


def test_attention_is_the_printed_formula():
  """softmax(q kᵀ / √C) v over pixels (Vaswani et al. 2017, Eq. 1), one head."""
  layer = blocks.Attention(8, init_scale=1.0)
  for i, variable in enumerate(layer.variables):
    variable.assign(normals(*variable.shape, seed=i))
  x = normals(2, 3, 4, 8)
  h = printed_group_norm(x, 2, layer.norm.gamma.numpy(), layer.norm.beta.numpy(), False)
  h = h.reshape(2, 12, 8)
  q, k, v = (h @ p.kernel.numpy() + p.bias.numpy() for p in (layer.query, layer.key, layer.value))
  logits = q @ k.transpose(0, 2, 1) / np.sqrt(8)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = (weights @ v @ layer.out.kernel.numpy() + layer.out.bias.numpy()).reshape(x.shape)
  # float32 against float64; logits of tens amplify rounding through the softmax.
  np.testing.assert_allclose(layer(x), (x + out) / np.sqrt(2), atol=1e-4 * np.abs(out).max())


@pytest.mark.parametrize(
  ("block", "direction"), [("biggan", None), ("biggan", "up"), ("biggan", "down"), ("ddpm", None)]
)
def test_time_reaches_the_block_between_the_convolutions(block, direction):
  """Adding the projection to conv_0's bias is the same as conditioning on it."""
  layer = blocks.ResidualBlock(
    8, 16, embedding=4, direction=direction, block=block, init_scale=1.0, skip_rescale=False
  )
  x, embedding = normals(1, 4, 4, 8), normals(1, 4, seed=1)
  want = layer(x, embedding)
  layer.conv_0.bias.assign_add(layer.time(embedding)[0])
  layer.time.kernel.assign(np.zeros(layer.time.kernel.shape))
  layer.time.bias.assign(np.zeros(16))
  # Order of float32 additions before a normalisation.
  np.testing.assert_allclose(layer(x, embedding), want, atol=1e-5)
  factor = {None: 4, "up": 8, "down": 2}[direction]
  assert want.shape == (1, factor, factor, 16)


def test_a_zero_branch_leaves_the_shortcut():
  x = normals(1, 4, 4, 8)
  layer = blocks.ResidualBlock(8, 8, embedding=None)
  # conv_1 starts with deviation 1e-5/√fan; x/√2 is left.
  np.testing.assert_allclose(layer(x), x / np.sqrt(2), atol=1e-4)
  assert layer.shortcut is None
  assert blocks.ResidualBlock(8, 8, embedding=None, direction="up").shortcut is not None


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_rate_and_the_mean(rate):
  x = tf.ones([64, 16, 16, 4])
  y = blocks.dropout(x, rate, SEED, 0).numpy()
  n = y.size
  # Binomial: five standard deviations.
  assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
  assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / n)
  assert len(np.unique(y)) == 2
  np.testing.assert_allclose(y.max(), 1 / (1 - rate), rtol=1e-4)  # the rate in 1/65536ths


def test_dropout_of_a_row_depends_on_its_place_alone():
  x = tf.ones([6, 5, 3, 2])  # 30 values per row: not a whole number of random words
  whole = blocks.dropout(x, 0.3, SEED, 10).numpy()
  np.testing.assert_array_equal(blocks.dropout(x[:2], 0.3, SEED, 10), whole[:2])
  np.testing.assert_array_equal(blocks.dropout(x[2:], 0.3, SEED, tf.constant(12)), whole[2:])
  assert (whole[0] != whole[1]).any()
  assert (whole != blocks.dropout(x, 0.3, SEED + 1, 10).numpy()).any()


@pytest.mark.parametrize("seed", [(3, 4), (-180254357, 5)])
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_dropout_under_xla_drops_the_same(seed, dtype):
  seed = tf.constant(seed, dtype)
  drop = lambda seed: blocks.dropout(tf.ones([6, 5, 3, 2]), 0.3, seed, 10)
  np.testing.assert_array_equal(tf.function(drop, jit_compile=True)(seed), drop(seed))


def test_positional_features_are_the_printed_ones():
  label = np.array([0.0, 3.0, 250.5], np.float32)
  got = blocks.positional_features(tf.constant(label), 9).numpy()
  frequencies = 10000.0 ** (-np.arange(4) / 3)
  want = np.concatenate(
    [f(label[:, None] * frequencies) for f in (np.sin, np.cos)] + [np.zeros((3, 1))], 1
  )
  np.testing.assert_allclose(got, want, atol=5e-5)  # float32 spacing of a phase of 250: 1.5e-5


def test_fourier_features_have_the_published_phase():
  layer = blocks.FourierFeatures(64, scale=16.0, seed=(1, 2))
  w = layer.frequencies.numpy().astype(np.float64)
  assert not layer.trainable_variables
  assert abs(w.std() - 16) < 5 * 16 / np.sqrt(2 * 64)  # five deviations of a sample deviation
  phase = 2 * np.pi * np.log(2.0) * w
  want = np.concatenate([np.sin(phase), np.cos(phase)])
  # Phases up to ~200 rad: a few float32 spacings of 1.5e-5.
  np.testing.assert_allclose(layer(tf.constant([2.0]))[0], want, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_initialiser_statistics(scale):
  shape = (3, 3, 24, 40)
  draw = blocks.FanAverageUniform(scale, (0, 1))(shape).numpy().astype(np.float64)
  variance = (scale or 1e-10) / (9 * (24 + 40) / 2)
  assert np.abs(draw).max() <= np.sqrt(3 * variance) * (1 + 1e-6)  # rounding to float32
  # A uniform variable's fourth moment makes the deviation of a sample variance √(0.8/n).
  assert abs(draw.var() / variance - 1) < 5 * np.sqrt(0.8 / draw.size)
  assert abs(draw.mean()) < 5 * np.sqrt(variance / draw.size)
