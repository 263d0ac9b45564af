"""Soft Diffusion (Daras et al. 2022) in one page, on scikit-learn's 8×8 digits.

  python docs/examples/soft_diffusion.py            # some minutes on a CPU; writes digits.png

A clean image x_0 is corrupted to x_t = C_t x_0 + σ_t η (Eq. 4): here C_t is a Gaussian blur that
grows with t. A network h learns to predict x_0 from x_t; the Momentum Sampler (Algorithm 2) turns
that into images. "Eq." and "Algorithm" are the paper's. The library's own training loop, samplers
and priors do the same faster and on several devices; nothing here is needed to use them.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import corruptions, data, plots, schedules, transport
from soft_diffusion_tf.networks import NCSNpp


def train_and_sample(steps=2000, batch=64, nfe=60, count=32):
  images = data.load("digits").floats()  # [1500, 8, 8, 1] in [0, 1]

  # 1. The process. The blur's levels are the shortest path, in transport distance, from clean to
  #    fully blurred digits (3.3): a step from one level to the next is always about as far.
  blur = corruptions.GaussianBlur()
  path, _ = transport.find(blur, images, first=0.01, last=6.0)
  # First a little noise (t < 0.2), then the blur (App. D).
  level = schedules.Staged(schedules.piecewise(path.levels.tolist()), begin=0.2, end=1.0)
  sigma = schedules.Staged(schedules.Geometric(0.01, 0.1), begin=0.0, end=0.2)
  column = lambda v: tf.reshape(v, [-1, 1, 1, 1])

  def corrupt(x, t):  # C_t x
    return blur(x, level(t))

  # 2. The network: h(x_t, t) = φ(x_t, t) + x_t, a prediction of the clean image (Eq. 10).
  network = NCSNpp(
    image_shape=(8, 8, 1), nf=32, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(4,),
    dropout=0.0,
  )
  average = NCSNpp.from_config(network.get_config())  # what is sampled from: averaged weights

  def predict(net, x_t, t):
    return net(x_t, tf.exp(np.log(0.01) + (np.log(50.0) - np.log(0.01)) * t)) + x_t

  # 3. Soft Score Matching (Eq. 12): the error of the prediction counts after the corruption, as
  #    ‖C_t (h(x_t, t) − x_0)‖², since what C_t hides cannot be known and need not be.
  optimizer = keras.optimizers.Adam(2e-3, global_clipnorm=1.0)

  @tf.function
  def step(x_0):
    t = tf.random.uniform([batch])
    x_t = corrupt(x_0, t) + column(sigma(t)) * tf.random.normal(x_0.shape)
    with tf.GradientTape() as tape:
      error = corrupt(predict(network, x_t, t) - x_0, t)
      loss = tf.reduce_mean(tf.reduce_sum(error**2, [1, 2, 3]))
    optimizer.apply(tape.gradient(loss, network.trainable_variables), network.trainable_variables)
    for slow, fast in zip(average.variables, network.variables):
      slow.assign_sub(0.005 * (slow - fast))
    return loss

  average.set_weights(network.get_weights())
  draw = np.random.default_rng(0)
  for k in range(steps):
    loss = step(tf.constant(images[draw.integers(0, len(images), batch)]))
    if k % 200 == 0:
      print(f"step {k}: loss {loss:.3f}", flush=True)

  # 4. The Momentum Sampler (Algorithm 2). It starts from what the strongest blur leaves: a
  #    Gaussian fitted to the blurred digits, which have only a few numbers left, and noise.
  blurred = corrupt(images, 1.0).numpy().reshape(len(images), -1)
  flat = draw.multivariate_normal(blurred.mean(0), np.cov(blurred.T), count)
  x = tf.constant(flat.reshape(count, 8, 8, 1), tf.float32)
  x += sigma(1.0) * tf.random.normal(x.shape)

  @tf.function
  def reverse(x, t, s):  # x_t → x_s with s < t
    x_0 = predict(average, x, tf.fill([count], t))
    y_t, y_s = corrupt(x_0, t), corrupt(x_0, s)
    ratio = (sigma(s) / sigma(t)) ** 2
    z = x + (1.0 - ratio) * (y_t - x)  # towards less noise, by the score (y_t − x) / σ_t² (Eq. 16)
    z += tf.sqrt(tf.maximum(sigma(t) ** 2 - sigma(s) ** 2, 0.0)) * tf.random.normal(x.shape)
    return z + (y_s - y_t)  # towards less blur: the momentum

  times = np.linspace(1.0, 0.0, nfe + 1).astype(np.float32)
  for t, s in zip(times[:-2], times[1:-1]):
    x = reverse(x, tf.constant(t), tf.constant(s))
  return predict(average, x, tf.fill([count], times[-2])).numpy(), float(loss), images


if __name__ == "__main__":
  samples, _, real = train_and_sample(*map(int, sys.argv[1:2]))
  plots.save_png("digits.png", plots.grid(np.concatenate([real[:32], samples]), zoom=4))
  print("digits.png: real digits above, samples below")
