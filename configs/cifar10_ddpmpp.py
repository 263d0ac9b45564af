"""DDPM++ on CIFAR-10: the VP process and the improved network of Song et al. (2021).

It predicts the noise and is sampled by the ancestral sampler (see cifar10_ddpm).

  soft-diffusion-train --config=configs/cifar10_ddpmpp.py --workdir=runs/cifar10_ddpmpp

Hardware and time as cifar10_blur.
"""

import pathlib

from soft_diffusion_tf import experiment


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_ddpm.py")
  network = {"num_res_blocks": 4, "resblock_type": "biggan", "skip_rescale": True}
  return base.replace(name="cifar10_ddpmpp", network=network).to_config()
