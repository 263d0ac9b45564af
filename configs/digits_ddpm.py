"""DDPM on scikit-learn's 8×8 digits: the VP process with the network of Song et al. (2021).

The process and the network's kind are those of cifar10_ddpm, its size and the training those of
digits_blur.

soft-diffusion-train --config=configs/digits_ddpm.py --workdir=runs/digits_ddpm
"""

import pathlib

from soft_diffusion_tf import experiment

HERE = pathlib.Path(__file__).parent
OPTIONS = (
  "prediction",
  "conditioning",
  "embedding_type",
  "centered",
  "resblock_type",
  "fir",
  "skip_rescale",
  "progressive_input",
)


def get_config():
  rival = experiment.from_file(HERE / "cifar10_ddpm.py")
  return (
    experiment.from_file(HERE / "digits_blur.py")
    .replace(
      name="digits_ddpm",
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
