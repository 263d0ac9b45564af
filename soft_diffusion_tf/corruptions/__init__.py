"""Corruptions C: families of linear operators on images, indexed by a level (P Eq. 4, App. G).

Images are float32 [B, H, W, C] in [0, 1]; a level is a number, the same for the batch ([]) or one
per image ([B]). A new corruption is a frozen dataclass with one method:

    @dataclasses.dataclass(frozen=True)
    class Fade(Corruption):
      level_range = (0.0, 1.0)

      def apply(self, x, level):
        return (1.0 - level) * x

`check_corruption(Fade())` says whether it keeps what the theory asks of it. Everything else
(adjoint, matrix, singular values) follows from `apply` and is overridden only to be faster.
"""

from soft_diffusion_tf.corruptions.base import Corruption, Spectrum, Svd, as_channels, from_config
from soft_diffusion_tf.corruptions.check import Verdict, check_corruption
from soft_diffusion_tf.corruptions.composed import Compose, Family, Matrix
from soft_diffusion_tf.corruptions.operators import (
  BlockAverage,
  Gamma,
  GaussianBlur,
  HeatDissipation,
  Identity,
  Mask,
  Scale,
)

__all__ = [
  "BlockAverage",
  "Compose",
  "Corruption",
  "Family",
  "Gamma",
  "GaussianBlur",
  "HeatDissipation",
  "Identity",
  "Mask",
  "Matrix",
  "Scale",
  "Spectrum",
  "Svd",
  "Verdict",
  "as_channels",
  "check_corruption",
  "from_config",
]
