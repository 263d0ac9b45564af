"""Blur as two matrix products against convolution and FFT, and its share of a training step."""

import argparse
import statistics
import time


def seconds(function, repeats, warm=2):
  """Median wall time of a call, in seconds."""
  for _ in range(warm):
    function()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py corruption", description=__doc__)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--steps", type=int, default=40, help="training steps timed")
  options = parser.parse_args(argv)
  blur(options.repeats)
  share(options.steps)
  return 0


def blur(repeats):
  """One level for the batch, as the convolution needs; the product takes one per image as well."""
  import numpy as np
  import tensorflow as tf

  from soft_diffusion_tf import corruptions

  batch, size, half, std = 128, 64, 80, 5.0
  x = tf.random.stateless_uniform([batch, size, size, 3], [0, 0])
  taps = np.arange(-half, half + 1)
  line = np.exp(-(taps**2) / (2 * std**2))
  kernel = np.outer(line, line) / line.sum() ** 2
  depthwise = tf.constant(kernel[:, :, None, None].repeat(3, 2), tf.float32)
  operator = corruptions.GaussianBlur(half)
  levels = tf.fill([batch], std)
  full = size + 2 * half  # linear convolution as a circular one

  @tf.function
  def product(x):
    return operator(x, levels)

  @tf.function
  def convolution(x):
    padded = tf.pad(x, [[0, 0], [half, half], [half, half], [0, 0]])
    return tf.nn.depthwise_conv2d(padded, depthwise, [1, 1, 1, 1], "VALID")

  spectrum = tf.signal.rfft2d(tf.constant(kernel, tf.float32), [full, full])

  @tf.function
  def fourier(x):
    planes = tf.transpose(x, [0, 3, 1, 2])
    out = tf.signal.irfft2d(tf.signal.rfft2d(planes, [full, full]) * spectrum, [full, full])
    return tf.transpose(out[:, :, half : half + size, half : half + size], [0, 2, 3, 1])

  want = product(x)
  for other in (convolution, fourier):
    gap = float(tf.reduce_max(tf.abs(other(x) - want)))
    assert gap < 1e-4, f"{other} computes something else: {gap}"
  times = {
    "T x Tᵀ, a level per image": seconds(lambda: product(x), repeats),
    "FFT": seconds(lambda: fourier(x), repeats),
    "depthwise convolution 161×161": seconds(lambda: convolution(x), min(repeats, 3), warm=0),
  }
  base = times["T x Tᵀ, a level per image"]
  print(f"blur of [{batch}, {size}, {size}, 3], kernel {2 * half + 1}×{2 * half + 1}")
  for name, value in times.items():
    print(f"  {name:32} {1e3 * value:10.1f} ms {value / base:9.1f} ×")


def share(steps):
  """Bare forward and backward of the network against the same with corruption, noise and loss."""
  import tensorflow as tf

  from soft_diffusion_tf import corruptions, losses, rng, schedules
  from soft_diffusion_tf.diffusion import Diffusion
  from soft_diffusion_tf.networks import NCSNpp

  batch, shape = 32, (32, 32, 3)
  network = NCSNpp(
    image_shape=shape,
    nf=32,
    ch_mult=(1, 2, 2),
    num_res_blocks=2,
    dropout=0.0,
    progressive_input="residual",
  )
  process = Diffusion(
    shape,
    corruptions.GaussianBlur(),
    schedules.Geometric(0.01, 18.0),
    schedules.Geometric(0.01, 0.1),
  )
  variables = [v.value for v in network.trainable_variables]
  x_0 = tf.random.stateless_uniform([batch, *shape], [0, 0])
  cond = tf.fill([batch], 0.5)

  @tf.function(autograph=False)
  def bare(_):
    with tf.GradientTape() as tape:
      loss = tf.reduce_sum(network(x_0, cond))
    return tape.gradient(loss, variables)

  @tf.function(autograph=False)
  def around(step):
    """Everything but the network: draw, corrupt, filter the error, loss and its gradient."""
    seed = tf.stack([tf.constant(0, tf.int64), step])
    t = rng.uniform(rng.fold_in(seed, 0), 0, batch)
    eta = rng.normal(rng.fold_in(seed, 1), 0, batch, shape)
    with tf.GradientTape() as tape:
      guess = tf.zeros_like(x_0)
      tape.watch(guess)
      loss = losses.soft_score_matching(process, lambda x_t, t: x_t + guess, x_0, t, eta)
    return tape.gradient(loss, guess)

  inner = seconds(lambda: bare(tf.constant(0, tf.int64))[0].numpy(), steps // 2)
  outer = seconds(lambda: around(tf.constant(1, tf.int64)).numpy(), steps)
  print(f"training step, small network (nf 32, 1-2-2, 2 blocks, 32×32, batch {batch})")
  part = 100 * outer / (inner + outer)
  print(f"  network forward and backward     {1e3 * inner:10.1f} ms")
  print(f"  noise, corruption, loss and back {1e3 * outer:10.1f} ms {part:8.1f} %")


if __name__ == "__main__":
  main()
