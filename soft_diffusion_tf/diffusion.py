"""The forward process x_t = C_t x_0 + σ_t η (P Eq. 4) and what follows from it.

This is the only place where a time t becomes a level, a σ, and something that broadcasts against
images. Times are scalars or [B], images float32 [B, H, W, C].
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import corruptions, rng, schedules
from soft_diffusion_tf.corruptions import Corruption
from soft_diffusion_tf.priors import Prior
from soft_diffusion_tf.schedules import Schedule

Denoiser = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (x_t, t [B]) → x̂_0, an E[x_0 | x_t]

_CHECKED_TIMES = np.linspace(0, 1, 257, dtype=np.float32)
_MOST_SIDE, _MOST_NUMBERS = 1 << 13, 1 << 26  # of an image; beyond, no computer has the memory
_PRIOR_NOISE = -2  # salt of the noise on the prior; the sampler's steps are salted 0, 1, 2, …


def check_image_shape(shape: Any) -> None:
  """Raises the ValueError of what is not (height, width, channels) of an image."""
  whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in shape)
  if not (
    whole
    and len(shape) == 3
    and min(shape) >= 1
    and max(shape) <= _MOST_SIDE
    and math.prod(map(int, shape)) <= _MOST_NUMBERS
  ):
    raise ValueError(
      f"image_shape = {reprlib.repr(shape)} is not (height, width, channels): give three whole "
      f"numbers from 1 to {_MOST_SIDE:,}, of at most {_MOST_NUMBERS:,} pixels and channels together"
    )


@functools.lru_cache(maxsize=64)
def _check_hashable(corruption: Corruption, image_shape: Any, levels: Any) -> None:
  corruption.check_images(image_shape, levels)


def _check_once(corruption: Corruption, image_shape: Any, levels: Any) -> None:
  """`check_images`, which copies of a process (`with_prior`) need not pay for again."""
  try:
    hash(corruption)
  except TypeError:  # it holds arrays
    corruption.check_images(image_shape, levels)
  else:
    _check_hashable(corruption, image_shape, levels)


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """A corruption, its level over time, the noise over time, and the prior at t = 1.

  Attributes:
    image_shape: (H, W, C).
    corruption: C, by level.
    level: t → level.
    sigma_schedule: t → σ_t, not falling; finite and not negative.
    prior: the noise-free part of p_1; None until fitted.

  Raises:
    ValueError: a level out of the corruption's range, C_0 ≠ I, a C that changes the size of images
      or is not linear unsaid, or σ that falls or is not finite.
  """

  image_shape: tuple[int, int, int]
  corruption: Corruption
  level: Schedule
  sigma_schedule: Schedule
  prior: Prior | None = None

  def __post_init__(self) -> None:
    check_image_shape(self.image_shape)
    if self.prior is not None and self.prior.mean.shape != tuple(self.image_shape):
      raise ValueError(
        f"the prior is of images of shape {self.prior.mean.shape}, and image_shape is "
        f"{tuple(self.image_shape)}; fit another"
      )
    kind = type(self.corruption).__name__
    levels = self.level(_CHECKED_TIMES).numpy()
    low, high = sorted(self.corruption.level_range)
    outside = ~((levels >= low) & (levels <= high))
    if outside.any():
      k = int(np.argmax(outside))
      raise ValueError(
        f"the schedule gives level {levels[k]:g} at t = {_CHECKED_TIMES[k]:g}, outside "
        f"[{low:g}, {high:g}], the range of {kind}; correct the schedule"
      )
    sigmas = self.sigma(_CHECKED_TIMES).numpy()
    if not (np.all(np.isfinite(sigmas)) and np.all(sigmas >= 0)):
      raise ValueError(
        f"σ must be finite and not negative, got {sigmas.min():g} … {sigmas.max():g}"
      )
    steps = np.diff(sigmas)
    if np.any(steps < -1e-6 * sigmas.max()):
      k = int(np.argmin(steps))
      raise ValueError(
        f"σ falls from {sigmas[k]:g} to {sigmas[k + 1]:g} at t = {_CHECKED_TIMES[k]:g}; "
        "P Eq. 4 needs noise that never falls with t: swap the ends of the noise schedule"
      )
    tried = (levels[len(levels) // 2], levels[-1])  # each costs seconds on large images
    _check_once(self.corruption, tuple(self.image_shape), tried)
    probe = np.random.default_rng(0).random([1, *self.image_shape], np.float32)
    gap = float(np.max(np.abs(self.corruption(probe, levels[0]).numpy() - probe)))
    if not gap <= 1e-3:  # NaN as well
      raise ValueError(
        f"C_0 is not the identity: {kind} at level {levels[0]:g} changes an image by {gap:.2g}; "
        f"start the schedule at {self.corruption.level_range[0]:g}"
      )

  def sigma(self, t: Any) -> tf.Tensor:
    """σ_t, float32 of t's shape."""
    return self.sigma_schedule(t)

  def _images(self, values: tf.Tensor) -> tf.Tensor:
    return tf.reshape(values, [-1, 1, 1, 1])

  def _check_time(self, t: Any) -> tf.Tensor:
    t = tf.cast(t, tf.float32)
    if tf.executing_eagerly():
      outside = ~((t.numpy() >= 0) & (t.numpy() <= 1))
      if outside.any():
        raise ValueError(f"t = {t.numpy()[outside].ravel()[0]:g} is outside [0, 1]")
    return t

  def corrupt(self, x_0: Any, t: Any) -> tf.Tensor:
    """C_t x_0, without noise."""
    return self.corruption(x_0, self.level(self._check_time(t)))

  def adjoint(self, y: Any, t: Any) -> tf.Tensor:
    """C_tᵀ y."""
    return self.corruption.adjoint(y, self.level(self._check_time(t)))

  def forward(self, x_0: Any, t: Any, eta: Any) -> tf.Tensor:
    """x_t = C_t x_0 + σ_t η (P Eq. 4)."""
    return self.corrupt(x_0, t) + self._images(self.sigma(t)) * tf.cast(eta, tf.float32)

  def score(self, x_t: Any, t: Any, x0_hat: Any) -> tf.Tensor:
    """∇ log q_t(x_t) = (C_t E[x_0|x_t] − x_t) / σ_t² (Tweedie, P Eq. 16); 0 where σ_t = 0."""
    gap = self.corrupt(x0_hat, t) - tf.cast(x_t, tf.float32)
    return tf.math.divide_no_nan(gap, self._images(self.sigma(t)) ** 2)

  def corrupted_mean(self, x_t: Any, t: Any, score: Any) -> tf.Tensor:
    """C_t E[x_0|x_t] = x_t + σ_t² ∇ log q_t(x_t) (P Eq. 16, the other way)."""
    variance = self._images(self.sigma(t)) ** 2
    return tf.cast(x_t, tf.float32) + variance * tf.cast(score, tf.float32)

  def draw_prior(self, seeds: Any) -> tf.Tensor:
    """x_1 ~ p_1 for image seeds [B]: the prior's image plus σ_1 η; image i is seeds[i]'s alone."""
    if self.prior is None:
      raise ValueError("this diffusion has no prior yet; fit one with priors.fit")
    seeds = rng.image_seeds(seeds)
    eta = rng.normal_per_image(seeds, _PRIOR_NOISE, self.image_shape)
    return self.prior.draw(seeds) + self.sigma(1.0) * eta

  def get_config(self) -> dict[str, Any]:
    """Everything that it is made of, ready for JSON."""
    return {
      "image_shape": list(self.image_shape),
      "corruption": self.corruption.get_config(),
      "level": self.level.get_config(),
      "sigma": self.sigma_schedule.get_config(),
      "prior": None if self.prior is None else self.prior.get_config(),
    }

  @classmethod
  def from_config(cls, config: Mapping[str, Any], trust_code: bool = False) -> Diffusion:
    """The process that `get_config` described; `trust_code`: see `corruptions.from_config`."""
    parts = {"image_shape", "corruption", "level", "sigma", "prior"}
    if not isinstance(config, Mapping) or not parts <= config.keys():
      raise ValueError(f"the config of a diffusion has {', '.join(sorted(parts))}, not {config!r}")
    prior = config["prior"]
    if not isinstance(config["image_shape"], list | tuple):
      raise ValueError(f"image_shape = {config['image_shape']!r}: give [height, width, channels]")
    return cls(
      tuple(config["image_shape"]),
      corruptions.from_config(config["corruption"], trust_code),
      schedules.from_config(config["level"]),
      schedules.from_config(config["sigma"]),
      None if prior is None else Prior.from_config(prior),
    )

  def with_prior(self, prior: Prior) -> Diffusion:
    """The same process starting its samples from `prior`."""
    return dataclasses.replace(self, prior=prior)
