"""DDPM++ on scikit-learn's 8×8 digits: VP with the improved network of Song et al. (2021).

The process and the network's kind are those of cifar10_ddpmpp, its size and the training those of
digits_blur.

soft-diffusion-train --config=configs/digits_ddpmpp.py --workdir=runs/digits_ddpmpp
"""

import pathlib

from soft_diffusion_tf import experiment


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "digits_ddpm.py")
  network = {"resblock_type": "biggan", "skip_rescale": True}
  return base.replace(name="digits_ddpmpp", network=network).to_config()
