"""The seam of a metric: what `evaluate` measures beside the Fréchet distance.

    @dataclasses.dataclass(frozen=True)
    class Brightness(metrics.Metric):
      def __call__(self, images, real):
        return {"gap": float(images.mean() - real.mean())}

A config names it in `evaluation.metrics`; its numbers stand in the record of every evaluation.
"""

from soft_diffusion_tf import parts


class Metric(parts.Part, role="metric"):
  """Compares samples with real images: a part (see `parts`) with one method, `__call__`."""

  def __call__(self, images, real):
    """Numbers by name, for samples and real images, both uint8 [N, H, W, C].

    There are `evaluation.subset` images on each side, or as many as there are.
    """
    raise NotImplementedError

  def __str__(self):
    return parts.spell(self)
