"""Soft Score Matching (P Eq. 12) and the baseline that P compares it with."""

from __future__ import annotations

import tensorflow as tf

from soft_diffusion_tf.diffusion import Denoiser, Diffusion

WEIGHTS = ("inverse_variance", "one")


def soft_score_matching(
  diffusion: Diffusion,
  denoiser: Denoiser,
  x_0: tf.Tensor,
  t: tf.Tensor,
  eta: tf.Tensor,
  *,
  weight: str = "inverse_variance",
  filtered: bool = True,
  look_ahead: float = 0.0,
) -> tf.Tensor:
  """w(t) ‖C_t (x̂_0 − x_0)‖² for each example, with x̂_0 = denoiser(x_t, t) (P Eq. 12).

  The squared norm is the sum over the image's numbers, not their mean. With C_t = I and
  w = 1/σ_t² this is the VE loss of Song et al. 2021 (which has a factor ½ in front).

  Args:
    x_0: clean images, float32 [B, H, W, C].
    t: times [B].
    eta: standard normal noise like x_0.
    weight: w(t), "inverse_variance" (1/σ_t²: P's choice) or "one".
    filtered: False leaves C_t out of the loss: the objective of Bansal et al. 2022 (P 3.1).
    look_ahead: δ, which puts C at t − δ (at least 0) in the place of C_t. From t a sampler makes
      C_s x̂_0 with s < t, and so uses detail that C_t would hide from the loss (docs/theory.md).
      0 is Eq. 12 as printed, 1 leaves the loss unfiltered; E[x_0|x_t] minimises each of them.

  Returns:
    float32 [B].
  """
  if weight not in WEIGHTS:
    raise ValueError(f"unknown weight {weight!r}; choose one of {', '.join(WEIGHTS)}")
  x_0 = tf.cast(x_0, tf.float32)
  error = tf.cast(denoiser(diffusion.forward(x_0, t, eta), t), tf.float32) - x_0
  if filtered:
    error = diffusion.corrupt(error, tf.maximum(t - look_ahead, 0.0))
  loss = tf.reduce_sum(error**2, axis=[1, 2, 3])
  return loss / diffusion.sigma(t) ** 2 if weight == "inverse_variance" else loss
