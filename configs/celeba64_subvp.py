"""NCSN++ on CelebA-64 with the sub-VP process of Song et al. (2021).

As cifar10_subvp, with the network that celeba64_blur has.

  soft-diffusion-train --config=configs/celeba64_subvp.py --workdir=runs/celeba64_subvp

Hardware and time as celeba64_blur. P Table 1: FID 3.95.
"""

import math
import pathlib

from soft_diffusion_tf import experiment

SHAPE = (64, 64, 3)


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "cifar10_subvp.py")
    .replace(
      name="celeba64_subvp",
      data={"name": "celeb_a", "image_shape": SHAPE},
      training={"clip_norm": float(math.prod(SHAPE))},
    )
    .to_config()
  )
