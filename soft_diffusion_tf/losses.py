"""Losses: Soft Score Matching (P Eq. 12) and the baseline that P compares it with."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts
from soft_diffusion_tf.diffusion import Denoiser, Diffusion
from soft_diffusion_tf.schedules import Schedule


class Weight(parts.Part, role="weight"):
  """w(t) of a loss: a part (see `parts`) with one method, `__call__`. A text in a config.

      @dataclasses.dataclass(frozen=True)
      class Bounded(losses.Weight):
        most: float = 1000.0

        def __call__(self, t, sigma):
          return tf.minimum(1.0 / sigma**2, self.most)

  `SoftScoreMatching(weight=Bounded())` takes it, and `--config.loss.weight="my_module:Bounded()"`.
  """

  _as_text = True

  def __call__(self, t: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """The weights of times t [B] with noise σ_t [B]: finite, not negative, float32 [B]."""
    raise NotImplementedError

  def check_sigma(self, sigma: Schedule, t_min: float) -> None:
    """Raises the ValueError of a weight that is no weight at some time from t_min to 1."""
    times = np.linspace(t_min, 1.0, 257, dtype=np.float32)
    values = np.asarray(self(tf.constant(times), sigma(times)))
    if values.shape != times.shape:
      raise ValueError(
        f"loss.weight = {str(self)!r} gives an array of {values.shape} for {times.shape} times; "
        "give a number for each"
      )
    sound = np.isfinite(values) & (values >= 0)
    if not sound.all():
      worst = int(np.argmin(sound))
      raise ValueError(
        f"loss.weight = {str(self)!r} is {values[worst]:g} at t = {times[worst]:g}; give weights "
        "that are finite and not negative"
      )

  @classmethod
  def coerce(cls, config: Any) -> Any:
    """Names of this package's weights are checked here, for a message with the field's name."""
    if isinstance(config, str) and config.isidentifier():
      parts.check_choice("loss.weight =", config, tuple(parts.members(cls)))
    return config

  def __str__(self) -> str:
    return parts.spell(self)


@dataclasses.dataclass(frozen=True)
class InverseVariance(Weight, name="inverse_variance"):
  """1/σ_t², P's choice."""

  def __call__(self, t: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    return 1.0 / sigma**2

  def check_sigma(self, sigma: Schedule, t_min: float) -> None:
    times = np.linspace(t_min, 1.0, 257, dtype=np.float32)
    none = sigma(times).numpy() <= 0
    if none.any():
      raise ValueError(
        f"loss.weight = 'inverse_variance' is 1/σ², and σ is 0 at t = {times[none.argmax()]:g}; "
        "use loss.weight = 'one' to train without noise, or a larger training.t_min"
      )


@dataclasses.dataclass(frozen=True)
class One(Weight, name="one"):
  """The same at all times."""

  def __call__(self, t: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(sigma)


class Loss(parts.Part, role="loss"):
  """What a training step minimises: a part (see `parts`) with one method, `__call__`."""

  def __call__(
    self, diffusion: Diffusion, denoiser: Denoiser, x_0: tf.Tensor, t: tf.Tensor, eta: tf.Tensor
  ) -> tf.Tensor:
    """The loss of each example, float32 [B]; the step minimises their mean.

    Args:
      denoiser: (x_t, t [B]) → x̂_0 by the weights under training.
      x_0: clean images, float32 [B, H, W, C].
      t: times [B].
      eta: standard normal noise like x_0.
    """
    raise NotImplementedError

  def check_sigma(self, sigma: Schedule, t_min: float) -> None:
    """Raises the ValueError of noise that this loss cannot be trained with, from t_min to 1."""


@dataclasses.dataclass(frozen=True)
class SoftScoreMatching(Loss):
  """w(t) ‖C_t (x̂_0 − x_0)‖² for each example, with x̂_0 = denoiser(x_t, t) (P Eq. 12).

  The squared norm is the sum over the image's numbers, not their mean. With C_t = I and
  w = 1/σ_t² this is the VE loss of Song et al. 2021 (which has a factor ½ in front). Of a C that is
  not linear it is w(t) ‖C_t(x̂_0) − C_t(x_0)‖².

  Attributes:
    weight: w(t), "inverse_variance" (1/σ_t²: P's choice), "one", or a `Weight` of one's own.
    filtered: False leaves C_t out of the loss: the objective of Bansal et al. 2022 (P 3.1).
    look_ahead: δ, which puts C at t − δ (at least 0) in the place of C_t. From t a sampler makes
      C_s x̂_0 with s < t, and so uses detail that C_t would hide from the loss (docs/theory.md).
      0 is Eq. 12 as printed, 1 leaves the loss unfiltered; E[x_0|x_t] minimises each of them.
  """

  _group = "loss."

  weight: Weight = InverseVariance()
  filtered: bool = True
  look_ahead: Annotated[float, parts.Range(0, 1)] = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.look_ahead and not self.filtered:
      raise ValueError(
        f"loss.look_ahead = {self.look_ahead} chooses the filter of the loss, and "
        "loss.filtered = False takes it away; set one of them only"
      )

  def check_sigma(self, sigma: Schedule, t_min: float) -> None:
    self.weight.check_sigma(sigma, t_min)

  def __call__(
    self, diffusion: Diffusion, denoiser: Denoiser, x_0: tf.Tensor, t: tf.Tensor, eta: tf.Tensor
  ) -> tf.Tensor:
    x_0 = tf.cast(x_0, tf.float32)
    x0_hat = tf.cast(denoiser(diffusion.forward(x_0, t, eta), t), tf.float32)
    error, earlier = x0_hat - x_0, tf.maximum(t - self.look_ahead, 0.0)
    if self.filtered and diffusion.corruption.linear:
      error = diffusion.corrupt(error, earlier)
    elif self.filtered:
      error = diffusion.corrupt(x0_hat, earlier) - diffusion.corrupt(x_0, earlier)
    return self.weight(t, diffusion.sigma(t)) * tf.reduce_sum(error**2, axis=[1, 2, 3])


@dataclasses.dataclass(frozen=True)
class Mixture(Loss):
  """A share of the unfiltered loss beside Soft Score Matching, for each example:

  w(t) ((1 − share) ‖C_t (x̂_0 − x_0)‖² + share ‖x̂_0 − x_0‖²).

  The first part gives what is seen at t its weight, the second one teaches the detail that C_t
  hides and the sampler's next steps show. E[x_0|x_t] minimises both, and so every mixture.

  Attributes:
    share: 0 is Eq. 12 as printed, 1 the unfiltered loss.
    weight: w(t), as of `SoftScoreMatching`.
  """

  _group = "loss."

  share: Annotated[float, parts.Range(0, 1)] = 0.1
  weight: Weight = InverseVariance()

  @property
  def _parts(self) -> tuple[SoftScoreMatching, SoftScoreMatching]:
    return SoftScoreMatching(self.weight), SoftScoreMatching(self.weight, filtered=False)

  def check_sigma(self, sigma: Schedule, t_min: float) -> None:
    self._parts[0].check_sigma(sigma, t_min)

  def __call__(
    self, diffusion: Diffusion, denoiser: Denoiser, x_0: tf.Tensor, t: tf.Tensor, eta: tf.Tensor
  ) -> tf.Tensor:
    x0_hat = denoiser(diffusion.forward(x_0, t, eta), t)  # once for both
    filtered, plain = (part(diffusion, lambda *_: x0_hat, x_0, t, eta) for part in self._parts)
    return (1.0 - self.share) * filtered + self.share * plain


@dataclasses.dataclass(frozen=True)
class AbsoluteError(Loss):
  """‖x̂_0 − x_0‖₁ for each example, without weight or filter: Cold Diffusion (Bansal et al. 2022).

  Its minimiser is the median of x_0 given x_t, number by number, and not the mean: x̂_0 gives no
  score. Cold Diffusion has no noise, so it needs none.
  """

  def __call__(
    self, diffusion: Diffusion, denoiser: Denoiser, x_0: tf.Tensor, t: tf.Tensor, eta: tf.Tensor
  ) -> tf.Tensor:
    x_0 = tf.cast(x_0, tf.float32)
    error = tf.cast(denoiser(diffusion.forward(x_0, t, eta), t), tf.float32) - x_0
    return tf.reduce_sum(tf.abs(error), axis=[1, 2, 3])


def soft_score_matching(
  diffusion: Diffusion,
  denoiser: Denoiser,
  x_0: tf.Tensor,
  t: tf.Tensor,
  eta: tf.Tensor,
  **options: Any,
) -> tf.Tensor:
  """Deprecated: `SoftScoreMatching`, as version 0.1 named it."""
  warnings.warn(
    "losses.soft_score_matching is deprecated; use losses.SoftScoreMatching(...)",
    DeprecationWarning,
    stacklevel=2,
  )
  return SoftScoreMatching(**options)(diffusion, denoiser, x_0, t, eta)
