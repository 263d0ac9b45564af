"""DDPM on CelebA-64: the VP process and the network that Song et al. (2021) trained it with.

As cifar10_ddpm, with the network that celeba64_blur has.

  soft-diffusion-train --config=configs/celeba64_ddpm.py --workdir=runs/celeba64_ddpm

Hardware and time as celeba64_blur. P Table 1: FID 3.26; DDIM 3.51.
"""

import math
import pathlib

from soft_diffusion_tf import experiment

SHAPE = (64, 64, 3)


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "cifar10_ddpm.py")
    .replace(
      name="celeba64_ddpm",
      data={"name": "celeb_a", "image_shape": SHAPE},
      training={"clip_norm": float(math.prod(SHAPE))},
    )
    .to_config()
  )
