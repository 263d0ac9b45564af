"""NCSN++ on scikit-learn's 8×8 digits with the sub-VP process of Song et al. (2021).

The process and the network's kind are those of cifar10_subvp, its size and the training those of
digits_blur.

soft-diffusion-train --config=configs/digits_subvp.py --workdir=runs/digits_subvp
"""

import pathlib

from soft_diffusion_tf import experiment


def get_config():
  here = pathlib.Path(__file__).parent
  sigma = experiment.from_file(here / "cifar10_subvp.py").sigma
  network = {"fir": True, "progressive_input": "residual"}
  base = experiment.from_file(here / "digits_ddpmpp.py")
  return base.replace(name="digits_subvp", sigma=sigma, network=network).to_config()
