"""Operators as a device multiplies that nobody told otherwise."""

import copy
import dataclasses
import functools

import numpy as np
import scipy.cluster.vq
import scipy.fft
import tensorflow as tf

from soft_diffusion_tf import (
  corruptions,
  gaussians,
  oracles,
  samplers,
)

PRECISIONS = ("exact", "tf32", "bfloat16")


def rounded(x, kind):
  """float32 values as a device's product sees them: "tf32" (a GPU's) or "bfloat16" (a TPU's)."""
  x = tf.convert_to_tensor(x, tf.float32)
  if kind == "bfloat16":
    return tf.cast(tf.cast(x, tf.bfloat16), tf.float32)
  if kind != "tf32":
    raise ValueError(f"unknown precision {kind!r}; choose tf32 or bfloat16")
  bits = tf.bitcast(x, tf.int32)  # 13 of the 23 bits of the mantissa go, to the nearest even one
  odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 13), 1)
  bits = tf.bitwise.bitwise_and(bits + odd + (2**12 - 1), -(2**13))
  return tf.bitcast(bits, tf.float32)


@dataclasses.dataclass(frozen=True)
class Rounded(corruptions.Corruption):
  """A blur whose products round their operands to `kind` and add in float32, as a device does."""

  blur: corruptions.GaussianBlur
  kind: str

  def apply(self, x, level):
    n, (h, w, c) = tf.shape(x)[0], x.shape[1:]
    a, b = self.blur.matrices(tf.reshape(level, [-1]), h, w)
    cut = lambda v: rounded(v, self.kind)
    rows = tf.matmul(cut(a), tf.reshape(cut(x), [n, h, w * c]))
    turned = tf.reshape(tf.transpose(tf.reshape(rows, [n, h, w, c]), [0, 2, 1, 3]), [n, w, h * c])
    y = tf.reshape(tf.matmul(cut(b), cut(turned)), [n, w, h, c])
    return tf.transpose(y, [0, 2, 1, 3])


class PrecisionStudy:
  """Samples by exact and by rounded operators of a blur, from the same seeds and the same noise.

  The denoiser is the exact one of the exact process for all: what a network loses is not asked.

  Args:
    mixture: `oracles.GaussianMixture` of small components (covariances None).
    process: a `Diffusion` with a `GaussianBlur` and a prior.
  """

  def __init__(self, mixture, process):
    self.mixture, self.process = mixture, process
    denoiser = oracles.denoiser(mixture, process)
    self._samplers = {"exact": samplers.Sampler(process, denoiser)}
    for kind in PRECISIONS[1:]:
      changed = copy.copy(process)
      # Not dataclasses.replace, which would refuse it: a rounded C_0 is no identity.
      object.__setattr__(changed, "corruption", Rounded(process.corruption, kind))
      self._samplers[kind] = samplers.Sampler(changed, denoiser)
    h, w = process.image_shape[:2]
    fastest = np.maximum(np.arange(h)[:, None] / h, np.arange(w)[None] / w)  # of the two axes
    self._band = np.clip(np.ceil(np.log2(np.maximum(fastest, 2.0**-9))).astype(int), -3, 0) + 3

  BANDS = ("up to 1/8", "1/8 to 1/4", "1/4 to 1/2", "1/2 to 1")  # of the highest frequency

  def sample(self, kind, rule, nfe, seeds):
    """Images float32 [N, H, W, C] by a rule with that many evaluations."""
    times = samplers.time_grid(samplers.steps_for(rule, nfe))
    x = self.process.draw_prior(seeds)
    return self._samplers[kind](samplers.plan(rule, times, self.process), seeds, x).numpy()

  def one_blur(self, images, kind, t):
    """RMS and largest error of a single rounded C_t."""
    wrong = self._samplers[kind].diffusion.corrupt(images, t) - self.process.corrupt(images, t)
    return float(np.sqrt(np.mean(wrong**2))), float(np.max(np.abs(wrong)))

  def rms(self, difference):
    """RMS in each of `BANDS` of images [N, H, W, C], by cosine transform; a pixel's share each."""
    power = scipy.fft.dctn(np.float64(difference), axes=(1, 2), norm="ortho") ** 2
    return [float(np.sqrt(power[:, self._band == k].mean())) for k in range(len(self.BANDS))]

  @functools.cached_property
  def _moments(self):
    return oracles.moments(self.mixture)

  def frechet(self, images):
    """Squared Fréchet distance in pixels to the exact moments of the data."""
    return gaussians.frechet_of_rows(images, *self._moments)
