"""DDPM++ on scikit-learn's 8×8 digits: VP with the improved network of Song et al. (2021).

The process and the network's kind are those of cifar10_ddpmpp, its size and the training those of
digits_blur.

soft-diffusion-train --config=configs/digits_ddpmpp.py --workdir=runs/digits_ddpmpp
"""

import pathlib

from soft_diffusion_tf import experiment

HERE = pathlib.Path(__file__).parent
OPTIONS = ("prediction", "conditioning", "embedding_type", "centered", "fir", "progressive_input")


def get_config():
  rival = experiment.from_file(HERE / "cifar10_ddpmpp.py")
  return (
    experiment.from_file(HERE / "digits_blur.py")
    .replace(
      name="digits_ddpmpp",
      corruption=rival.corruption,
      level=rival.level,
      sigma=rival.sigma,
      prior=rival.prior,
      loss=rival.loss,
      network={option: getattr(rival.network, option) for option in OPTIONS},
      training={"clip_norm": 64.0},  # of a sum over 8 × 8 numbers; theirs is a mean
      sampling={"sampler": "ancestral", "steps": 100},
    )
    .to_config()
  )
