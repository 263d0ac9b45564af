"""FIR resampling: published values, and second routes for the rest."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf.networks import resampling

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "fir"
OPS = {
  "upsample2d": resampling.fir_upsample,
  "downsample2d": resampling.fir_downsample,
  "conv_up": resampling.fir_conv_upsample,
  "conv_down": resampling.fir_conv_downsample,
}
CASES = ("even_8x8", "odd_7x7", "rect_6x9", "asym_8x7", "k121_8x8", "k2d_7x8")
TAPS = (1, 3, 3, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_published_values(op, case):
  with np.load(GOLDEN / f"{op}.npz") as data:
    golden = {key.split("/")[1]: data[key] for key in data if key.startswith(f"{case}/")}
  weights = [golden["w_hwio"]] if "w_hwio" in golden else []
  y = OPS[op](tf.constant(golden["x"]), *weights, golden["kernel"], int(golden["factor"]))
  assert y.shape == golden["y"].shape
  # Two independent implementations agree to 2.5e-7: float32 sums of a few dozen products.
  assert np.abs(y - golden["y"]).max() < 1e-6 * np.abs(golden["y"]).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_xla_filters_by_another_route_to_the_same_values(op, case):
  """Values and gradients: XLA sums shifted images where TensorFlow convolves."""
  with np.load(GOLDEN / f"{op}.npz") as data:
    golden = {key.split("/")[1]: data[key] for key in data if key.startswith(f"{case}/")}
  weights = [tf.constant(golden["w_hwio"])] if "w_hwio" in golden else []

  def run(x, *weights):
    with tf.GradientTape() as tape:
      tape.watch([x, *weights])
      y = OPS[op](x, *weights, golden["kernel"], int(golden["factor"]))
      total = tf.reduce_sum(y**2)
    return [y, *tape.gradient(total, [x, *weights])]

  x = tf.constant(golden["x"])
  plain = tf.function(run, autograph=False)(x, *weights)
  compiled = tf.function(run, autograph=False, jit_compile=True)(x, *weights)
  for one, two in zip(compiled, plain):
    # float32 sums of up to a few hundred products, in another order
    assert np.abs(one - two).max() < 1e-5 * np.abs(two).max()


def test_xla_gets_no_grouped_convolution():
  lowered = tf.function(
    lambda x: resampling.resample(resampling.resample(x, "up", TAPS), "down", TAPS),
    autograph=False,
    jit_compile=True,
  ).experimental_get_compiler_ir(tf.TensorSpec([2, 8, 8, 4]))(stage="stablehlo")
  assert "convolution" not in lowered


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("taps", [None, TAPS])
def test_a_constant_image_keeps_its_value_inside(direction, taps):
  y = resampling.resample(tf.ones([1, 8, 12, 2]), direction, taps).numpy()
  # The filter sums to 1 in float32; its zero padding reaches two pixels inwards at most.
  np.testing.assert_allclose(y[:, 2:-2, 2:-2], 1, atol=1e-6)


def test_the_filter_alone_darkens_the_border():
  ones = tf.ones([1, 8, 8, 1])
  assert resampling.fir_downsample(ones, TAPS).numpy()[0, 0, 0, 0] < 0.9
  assert resampling.mean_downsample(ones).numpy()[0, 0, 0, 0] == 1


def test_up_is_four_times_the_adjoint_of_down():
  """For symmetric taps <down(x), y> = <x, up(y)> / 4, a property of the filter bank."""
  x = tf.random.stateless_normal([2, 8, 6, 3], [1, 2])
  y = tf.random.stateless_normal([2, 4, 3, 3], [3, 4])
  left = tf.reduce_sum(resampling.fir_downsample(x, TAPS) * y)
  right = tf.reduce_sum(x * resampling.fir_upsample(y, TAPS)) / 4
  np.testing.assert_allclose(left, right, rtol=1e-5)  # sums of 72 float32 products


def test_nearest_and_mean_are_repeat_and_its_inverse():
  x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
  up = resampling.nearest_upsample(tf.constant(x))
  np.testing.assert_array_equal(up, x.repeat(2, axis=1).repeat(2, axis=2))
  # The mean of four equal floats is exact.
  np.testing.assert_array_equal(resampling.mean_downsample(up), x)


def test_bfloat16_filters_in_float32():
  """One rounding, of the result: the filter's own arithmetic adds nothing."""
  x = tf.cast(tf.random.stateless_normal([1, 8, 8, 4], [0, 1]), tf.bfloat16)
  y = resampling.fir_downsample(x, TAPS)
  exact = resampling.fir_downsample(tf.cast(x, tf.float32), TAPS)
  assert y.dtype == tf.bfloat16
  np.testing.assert_array_equal(tf.cast(y, tf.float32), tf.cast(tf.cast(exact, y.dtype), "float32"))


def test_taps_that_sum_to_zero_are_refused():
  with pytest.raises(ValueError, match="sum other than 0"):
    resampling.fir_downsample(tf.ones([1, 4, 4, 1]), (1, -1))
