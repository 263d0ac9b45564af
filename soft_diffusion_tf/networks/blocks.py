"""The layers of NCSN++ (Song et al. 2021, arXiv:2011.13456, appendix H).

Each layer is told its channel counts and makes its variables in the constructor, so a network has
all its weights as soon as it exists. `seed` is a tuple of integers ≥ 0: a layer's initial values
are a function of it alone, on any device. Kernels are [in, out] or [kh, kw, in, out]; images are
[B, H, W, C]. Convolutions and attention compute in the layer's compute dtype; statistics, softmax
and FIR filters in float32.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng
from soft_diffusion_tf.networks import resampling

_EPSILON = 1e-6  # of group normalisation; part of the published network, as are the two below
_MAX_GROUPS = 32
_CHANNELS_PER_GROUP = 4
_SMALL = 0.1  # initial scale of attention's projections and of the DDPM block's shortcut
_RSQRT2 = math.sqrt(0.5)


class FanAverageUniform:
  """Initialiser: uniform with variance scale / mean(fan_in, fan_out); a scale of 0 means 1e-10.

  The draw is NumPy's, so it is the same on every device, with or without XLA, and where there is no
  TensorFlow: `np.random.default_rng(seed).uniform(−limit, limit, shape)`, rounded to float32.
  """

  def __init__(self, scale, seed):
    self.scale, self.seed = scale or 1e-10, seed

  def limit(self, shape):
    receptive = math.prod(shape[:-2])
    return math.sqrt(3 * self.scale / (receptive * (shape[-2] + shape[-1]) / 2))

  def __call__(self, shape, dtype=None):
    limit = self.limit(shape)
    draw = np.random.default_rng(self.seed).uniform(-limit, limit, shape)
    return tf.constant(draw, dtype or tf.float32)


class Layer(keras.layers.Layer):
  """A layer whose variables exist from construction on."""

  def __init__(self, **kwargs):
    super().__init__(**kwargs)
    self.built = True

  def add_kernel(self, shape, scale, seed, name="kernel"):
    initialiser = FanAverageUniform(scale, seed)
    kernel = self.add_weight(shape=shape, initializer=initialiser, name=name)
    kernel.initialiser = initialiser  # what draws the same values elsewhere
    return kernel

  def add_vector(self, size, initializer="zeros", name="bias", **kwargs):
    return self.add_weight(shape=(size,), initializer=initializer, name=name, **kwargs)


class Dense(Layer):
  """[..., C_in] → [..., C_out]; on images the same at every pixel (a 1 × 1 convolution)."""

  def __init__(self, channels_in, channels_out, *, scale=1.0, seed, **kwargs):
    super().__init__(**kwargs)
    self.kernel = self.add_kernel((channels_in, channels_out), scale, seed)
    self.bias = self.add_vector(channels_out)

  def call(self, x):
    # One large product: TensorFlow would batch it over the leading axes.
    y = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), self.kernel)
    y = tf.nn.bias_add(y, tf.convert_to_tensor(self.bias))
    return tf.reshape(y, [-1, *x.shape[1:-1], y.shape[-1]])


class Conv2D(Layer):
  """3 × 3 convolution, [B, H, W, C_in] → [B, H/stride, W/stride, C_out].

  Stride 1 pads with one zero on each side, stride 2 with one below and one to the right.
  """

  def __init__(self, channels_in, channels_out, *, stride=1, scale=1.0, seed, **kwargs):
    super().__init__(**kwargs)
    self.stride = stride
    self.kernel = self.add_kernel((3, 3, channels_in, channels_out), scale, seed)
    self.bias = self.add_vector(channels_out)

  def call(self, x):
    y = tf.nn.conv2d(x, tf.convert_to_tensor(self.kernel), self.stride, "SAME")
    return tf.nn.bias_add(y, tf.convert_to_tensor(self.bias))


def _normalise(x, shift, gamma, beta, groups, activate):
  """Group normalisation of x + shift, then swish if `activate`; see GroupNorm.

  Written as one affine map per image and channel, x·a + b, whose coefficients come from the two
  moments of each image's channel: `shift` and the groups then cost nothing at the size of x. The
  gradient is by hand for the same reason; it keeps x alone and recomputes the rest.

  Args:
    x: float32 [B, P, C], P pixels.
    shift: float32 [B, 1, C].
    gamma, beta: float32 [C].
  """
  pixels, channels = x.shape[1:]
  size = pixels * channels // groups  # of a group

  def group_mean(v):  # [B, 1, C] → the mean over each group's channels, at each channel
    v = tf.reshape(v, [-1, groups, channels // groups])
    v = tf.reduce_mean(v, axis=2, keepdims=True)
    return tf.reshape(tf.tile(v, [1, 1, channels // groups]), [-1, 1, channels])

  @tf.custom_gradient
  def op(x, shift, gamma, beta):
    mean, variance = tf.nn.moments(x, [1], keepdims=True)
    centre = group_mean(mean + shift)
    variance = group_mean(variance + tf.square(mean + shift - centre))
    scale = tf.math.rsqrt(variance + _EPSILON)
    a = gamma * scale
    b = (shift - centre) * a + beta

    def gradient(dy):
      with tf.name_scope("norm_gradient"):
        return backward(dy)

    def backward(dy):
      if activate:
        u = x * a + b
        s = tf.sigmoid(u)
        du = dy * (s * (1 + u * (1 - s)))
      else:
        du = dy
      sum_du = tf.reduce_sum(du, axis=1, keepdims=True)
      sum_du_x = tf.reduce_sum(du * x, axis=1, keepdims=True)
      sum_du_normed = scale * (sum_du_x + (shift - centre) * sum_du)
      # d/dx: a·du, less the parts that the group's own mean and deviation take back.
      share = (channels // groups) / size
      k1 = -tf.square(scale) * group_mean(gamma * sum_du_normed) * share
      k0 = (shift - centre) * k1 - scale * group_mean(gamma * sum_du) * share
      dx = du * a + (x * k1 + k0)
      dshift = a * sum_du + pixels * (k1 * mean + k0)
      return dx, dshift, tf.reduce_sum(sum_du_normed, [0, 1]), tf.reduce_sum(sum_du, [0, 1])

    y = x * a + b
    return (tf.nn.silu(y) if activate else y), gradient

  return op(x, shift, gamma, beta)


class GroupNorm(Layer):
  """Group normalisation, then swish if `activate`: [B, H, W, C] → the same.

  min(C // 4, 32) groups of neighbouring channels, epsilon 1e-6, statistics in float32.
  """

  def __init__(self, channels, *, activate, **kwargs):
    super().__init__(**kwargs)
    self.groups = min(channels // _CHANNELS_PER_GROUP, _MAX_GROUPS)
    if self.groups == 0 or channels % self.groups:
      raise ValueError(
        f"group normalisation cannot split {channels} channels into {max(self.groups, 1)} groups; "
        "choose nf and ch_mult so that all channel counts, also those of concatenated skips, are "
        "multiples of 4, and of 32 from 128 up"
      )
    self.activate = activate
    self.gamma = self.add_vector(channels, "ones", "gamma", autocast=False)
    self.beta = self.add_vector(channels, "zeros", "beta", autocast=False)

  def call(self, x, shift=None):
    """`shift` [B, C], if given, is first added to every pixel of the image."""
    _, height, width, channels = x.shape
    pixels = tf.cast(tf.reshape(x, [-1, height * width, channels]), tf.float32)
    if shift is None:
      shift = tf.zeros([1, channels], tf.float32)
    shift = tf.broadcast_to(tf.cast(shift, tf.float32), [tf.shape(x)[0], channels])
    y = _normalise(
      pixels,
      shift[:, None, :],
      tf.convert_to_tensor(self.gamma),
      tf.convert_to_tensor(self.beta),
      self.groups,
      self.activate,
    )
    return tf.cast(tf.reshape(y, [-1, height, width, channels]), x.dtype)


def dropout(x, rate, seed, first):
  """Inverted dropout of x [B, ...]; the mask of row p depends on (seed, first + p) alone.

  16 random bits decide about one value: the rate is met to 1e-5, and the rescaling allows for that.
  """
  shape = x.shape[1:].as_list()
  size = math.prod(shape)
  words = rng.bits(seed, first, tf.shape(x)[0], -(-size // 2))
  halves = tf.reshape(tf.bitcast(words, tf.uint16), [-1, 2 * words.shape[-1]])
  dropped = round(rate * 2**16)
  keep = halves[:, :size] >= tf.constant(dropped, tf.uint16)
  scale = tf.constant(2**16 / (2**16 - dropped), x.dtype)
  return tf.where(tf.reshape(keep, [-1, *shape]), x * scale, tf.zeros([], x.dtype))


class ResidualBlock(Layer):
  """Two 3 × 3 convolutions around a shortcut: [B, H, W, C_in] → [B, H', W', C_out].

  The BigGAN block (Brock et al. 2019) may resample by two, after its first activation, and has a
  1 × 1 convolution in its shortcut where the channels change or it resamples; the DDPM block (Ho
  et al. 2020) only where the channels change, and starts it small. The time embedding is added
  between the convolutions.

  Args:
    channels_in, channels_out: of the images.
    embedding: size of the time embedding, or None without one.
    direction: "up", "down" or None.
    taps: FIR filter of the resampling, or None for nearest neighbours and 2 × 2 means.
    block: "biggan" or "ddpm".
    rate: of dropout.
    index: the number of this block, which tells its dropout from that of others.
    init_scale: initial scale of the second convolution.
  """

  def __init__(
    self,
    channels_in,
    channels_out,
    *,
    embedding,
    direction=None,
    taps=None,
    block="biggan",
    rate=0.0,
    index=0,
    init_scale=0.0,
    skip_rescale=True,
    seed=(0,),
    name="residual_block",
    **kwargs,
  ):
    super().__init__(name=name, **kwargs)
    policy = self.dtype_policy

    def options(part, number):
      return {"seed": (*seed, number), "name": f"{name}_{part}", "dtype": policy}

    self.direction = direction
    self.taps = taps
    self.rate = rate
    self.index = index
    self.skip_rescale = skip_rescale
    self.norm_0 = GroupNorm(channels_in, activate=True, name=f"{name}_norm_0", dtype=policy)
    self.conv_0 = Conv2D(channels_in, channels_out, **options("conv_0", 0))
    self.time = Dense(embedding, channels_out, **options("time", 1)) if embedding else None
    self.norm_1 = GroupNorm(channels_out, activate=True, name=f"{name}_norm_1", dtype=policy)
    self.conv_1 = Conv2D(channels_out, channels_out, scale=init_scale, **options("conv_1", 2))
    self.shortcut = None
    if channels_in != channels_out or direction:
      scale = _SMALL if block == "ddpm" else 1.0
      self.shortcut = Dense(channels_in, channels_out, scale=scale, **options("shortcut", 3))

  def call(self, x, embedding=None, training=False, seed=None, first=0):
    """`embedding` [B, size], already activated; `seed`, `first`: see `dropout`."""
    h = self.norm_0(x)
    if self.direction:
      h, x = (resampling.resample(v, self.direction, self.taps) for v in (h, x))
    h = self.conv_0(h)
    h = self.norm_1(h, None if self.time is None else self.time(embedding))
    if training and self.rate:
      h = dropout(h, self.rate, rng.fold_in(seed, self.index), first)
    h = self.conv_1(h)
    if self.shortcut is not None:
      x = self.shortcut(x)
    return add_skip(x, h, self.skip_rescale)


def add_skip(x, h, rescale):
  """x + h, divided by √2 if `rescale`, which keeps the variance of independent summands."""
  return (x + h) * tf.constant(_RSQRT2, h.dtype) if rescale else x + h


class Attention(Layer):
  """Self-attention with one head over all pixels, around a shortcut: [B, H, W, C] → the same."""

  def __init__(
    self, channels, *, init_scale=0.0, skip_rescale=True, seed=(0,), name="attention", **kwargs
  ):
    super().__init__(name=name, **kwargs)
    self.skip_rescale = skip_rescale
    policy = self.dtype_policy
    self.norm = GroupNorm(channels, activate=False, name=f"{name}_norm", dtype=policy)
    self.query, self.key, self.value, self.out = (
      Dense(
        channels,
        channels,
        scale=init_scale if part == "out" else _SMALL,
        seed=(*seed, number),
        name=f"{name}_{part}",
        dtype=policy,
      )
      for number, part in enumerate(("query", "key", "value", "out"))
    )

  def call(self, x):
    _, height, width, channels = x.shape
    h = tf.reshape(self.norm(x), [-1, channels])
    parts = (self.query, self.key, self.value)
    # One product for all three; variables stay apart, as in the published network.
    kernel = tf.concat([tf.convert_to_tensor(p.kernel) for p in parts], axis=1)
    bias = tf.concat([tf.convert_to_tensor(p.bias) for p in parts], axis=0)
    h = tf.nn.bias_add(tf.matmul(h, tf.cast(kernel, h.dtype)), tf.cast(bias, h.dtype))
    q, k, v = tf.split(tf.reshape(h, [-1, height * width, 3 * channels]), 3, axis=2)
    logits = tf.matmul(q * tf.constant(channels**-0.5, q.dtype), k, transpose_b=True)
    weights = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), v.dtype)
    h = self.out(tf.reshape(tf.matmul(weights, v), [-1, height, width, channels]))
    return add_skip(x, h, self.skip_rescale)


class Resample(Layer):
  """Resampling by two outside of residual blocks: [B, H, W, C_in] → [B, H', W', C_out].

  Args:
    direction: "up" or "down".
    with_conv: adds a 3 × 3 convolution, fused with the filter; without it C_out is C_in.
    taps: FIR filter, or None.
  """

  def __init__(
    self,
    channels_in,
    channels_out,
    *,
    direction,
    with_conv,
    taps=None,
    seed=(0,),
    name="resample",
    **kwargs,
  ):
    super().__init__(name=name, **kwargs)
    self.direction = direction
    self.taps = taps
    self.conv = None
    if with_conv:
      stride = 2 if direction == "down" and not taps else 1
      self.conv = Conv2D(
        channels_in,
        channels_out,
        stride=stride,
        seed=(*seed, 0),
        name=f"{name}_conv",
        dtype=self.dtype_policy,
      )

  def call(self, x):
    if self.conv is None:
      return resampling.resample(x, self.direction, self.taps)
    up = self.direction == "up"
    if self.taps:
      op = resampling.fir_conv_upsample if up else resampling.fir_conv_downsample
      y = op(x, tf.convert_to_tensor(self.conv.kernel), self.taps)
      return tf.nn.bias_add(y, tf.cast(tf.convert_to_tensor(self.conv.bias), y.dtype))
    return self.conv(resampling.nearest_upsample(x) if up else x)


class Combine(Layer):
  """Merges the input pyramid into the features, by sum or by concatenation ("cat")."""

  def __init__(self, channels_pyramid, channels, *, method, seed=(0,), name="combine", **kwargs):
    super().__init__(name=name, **kwargs)
    self.method = method
    self.conv = Dense(
      channels_pyramid, channels, seed=(*seed, 0), name=f"{name}_conv", dtype=self.dtype_policy
    )

  def call(self, pyramid, h):
    pyramid = self.conv(pyramid)
    return pyramid + h if self.method == "sum" else tf.concat([pyramid, h], axis=-1)


class FourierFeatures(Layer):
  """log σ → [sin p, cos p] of random phases p = 2π·log(σ)·W, W ~ scale·N(0, 1): [B] → [B, 2n].

  W is drawn once and not trained, but saved. Always float32: the phases reach hundreds of radians,
  so that also the order of the products is kept as published.
  """

  def __init__(self, size, *, scale, seed=(0,), **kwargs):
    super().__init__(dtype="float32", **kwargs)

    def initialise(shape, dtype=None):
      return tf.constant(scale * np.random.default_rng(seed).standard_normal(shape), tf.float32)

    self.frequencies = self.add_vector(size, initialise, "frequencies", trainable=False)

  def call(self, sigma):
    phase = tf.math.log(sigma)[:, None] * tf.convert_to_tensor(self.frequencies)[None, :]
    phase = phase * 2 * math.pi
    return tf.concat([tf.sin(phase), tf.cos(phase)], axis=1)


def positional_features(label, size):
  """Sinusoidal embedding of a time label (Vaswani et al. 2017): [B] → float32 [B, size].

  Frequencies fall from 1 to 1/10000, both included; an odd size ends with a column of zeros.
  """
  half = size // 2
  step = np.float32(math.log(10000) / (half - 1))
  frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
  phase = label[:, None] * frequencies[None, :]
  features = tf.concat([tf.sin(phase), tf.cos(phase)], axis=1)
  return tf.pad(features, [[0, 0], [0, size % 2]])
