"""A part of one's own for each seam, as a user would write it in a module of theirs."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import corruptions, data, losses, metrics, networks, priors, samplers
from soft_diffusion_tf import schedules as schedules_


@dataclasses.dataclass(frozen=True)
class Fade(corruptions.Corruption):
  """Towards black, at most to `least` of the brightness."""

  least: float = 0.25
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - (1.0 - self.least) * level) * x


@dataclasses.dataclass(frozen=True)
class Cosine(schedules_.Schedule):
  """From `start` to `stop`, slow at both ends."""

  start: float
  stop: float

  def value(self, t):
    return self.start + (self.stop - self.start) * 0.5 * (1.0 - tf.cos(np.pi * t))


@dataclasses.dataclass(frozen=True)
class Absolute(losses.Loss):
  """The absolute error of the corrupted prediction."""

  factor: float = 1.0

  def __call__(self, diffusion, denoiser, x_0, t, eta):
    error = denoiser(diffusion.forward(x_0, t, eta), t) - x_0
    return self.factor * tf.reduce_sum(tf.abs(diffusion.corrupt(error, t)), axis=[1, 2, 3])


@dataclasses.dataclass(frozen=True)
class Bounded(losses.Weight):
  """1/σ², at the most `most`."""

  most: float = 1000.0

  def __call__(self, t, sigma):
    return tf.minimum(1.0 / sigma**2, self.most)


@dataclasses.dataclass(frozen=True)
class UNet(networks.Architecture):
  """A plain U-Net of functional Keras, told of t by a feature map of log σ."""

  width: int = 8
  depth: int = 2

  def build(self, image_shape, seed):
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))

    def conv(x, width, stride=1, activation="swish"):
      start = keras.initializers.GlorotUniform(next(seeds))
      return keras.layers.Conv2D(
        width,
        3,
        stride,
        "same",
        activation=activation,
        kernel_initializer=start,
        dtype=self.policy,
      )(x)

    image, cond = keras.Input(image_shape), keras.Input(())
    height, width, _ = image_shape
    plane = keras.layers.Reshape((1,))(keras.ops.log(cond))
    plane = keras.layers.RepeatVector(height * width)(plane)
    plane = keras.layers.Reshape((height, width, 1))(plane)
    x = keras.layers.Concatenate()([image, plane])
    skips = []
    for level in range(self.depth):
      x = conv(x, self.width << level)
      skips.append(x)
      x = conv(x, self.width << level, 2)
    x = conv(x, self.width << self.depth)
    for level in reversed(range(self.depth)):
      x = keras.layers.UpSampling2D(dtype=self.policy)(x)
      x = conv(keras.layers.Concatenate()([x, skips[level]]), self.width << level)
    return keras.Model([image, cond], conv(x, image_shape[-1], activation=None))


@dataclasses.dataclass(frozen=True)
class Halfway(samplers.Rule):
  """Keeps a share of the noise that DDIM keeps, and draws the rest afresh."""

  share: float = 0.5

  def coefficients(self, step):
    a = self.share * step.sigma_s / step.sigma_t
    return samplers.Update(a, np.sqrt(step.sigma_s**2 - (a * step.sigma_t) ** 2))


@dataclasses.dataclass(frozen=True)
class Median(priors.Estimator):
  """The median of the corrupted images, without variation."""

  def fit(self, images, diffusion):
    mean = np.median(priors.corrupt_all(images, diffusion, 1.0), axis=0)
    return priors.Prior("median", mean.astype(np.float32), np.zeros([0, *mean.shape], np.float32))


class Uniform(priors.Prior):
  """The factors' coordinates uniform instead of normal: another distribution than Gaussian."""

  def draw(self, seeds):
    z = tf.clip_by_value(super().draw(seeds) - self.mean, -0.1, 0.1)
    return self.mean + z


@dataclasses.dataclass(frozen=True)
class Uniformly(priors.Estimator):
  """Fits a `Uniform`."""

  makes = Uniform

  def fit(self, images, diffusion):
    found = priors.Subspace(self.rank).fit(images, diffusion)
    return Uniform(f"{__name__}:Uniform", found.mean, found.factors)


@dataclasses.dataclass(frozen=True)
class Discs(data.Reader):
  """Discs of random places and sizes, drawn anew for each split."""

  count: int = 64
  size: int = 8

  def read(self, split):
    draw = np.random.default_rng({"train": 0, "test": 1}[split])
    y, x = np.mgrid[: self.size, : self.size]
    centre = draw.uniform(2, self.size - 2, [self.count, 2, 1, 1])
    distance = np.hypot(y - centre[:, 0], x - centre[:, 1])
    return np.uint8(255 * (distance < draw.uniform(1, 3, [self.count, 1, 1])))[..., None]


@dataclasses.dataclass(frozen=True)
class Brightness(metrics.Metric):
  """How much brighter samples are than real images, on a scale of `white`."""

  white: float = 255.0

  def __call__(self, images, real):
    return {"gap": (images.mean() - real.mean()) / self.white}
