"""DDPM++ on CelebA-64: the VP process and the improved network of Song et al. (2021).

As cifar10_ddpmpp, with the network that celeba64_blur has.

  soft-diffusion-train --config=configs/celeba64_ddpmpp.py --workdir=runs/celeba64_ddpmpp

Hardware and time as celeba64_blur. P Table 1: FID 1.90 (of Kim et al. 2022, who train and sample
it further than this).
"""

import math
import pathlib

from soft_diffusion_tf import experiment

SHAPE = (64, 64, 3)


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "cifar10_ddpmpp.py")
    .replace(
      name="celeba64_ddpmpp",
      data={"name": "celeb_a", "image_shape": SHAPE},
      training={"clip_norm": float(math.prod(SHAPE))},
    )
    .to_config()
  )
