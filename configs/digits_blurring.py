"""Blurring Diffusion (Hoogeboom and Salimans 2022) on scikit-learn's 8×8 digits.

The process is that of cifar10_blurring up to the blur of digits_blur, the network's kind, its size
and the training are those of digits_ddpmpp.

soft-diffusion-train --config=configs/digits_blurring.py --workdir=runs/digits_blurring
"""

import dataclasses
import pathlib

from soft_diffusion_tf import experiment, schedules

HERE = pathlib.Path(__file__).parent


def get_config():
  rival = experiment.from_file(HERE / "cifar10_blurring.py")
  return (
    experiment.from_file(HERE / "digits_ddpmpp.py")
    .replace(
      name="digits_blurring",
      corruption=dataclasses.replace(rival.corruption, inner_level=schedules.SineSquared(6.0)),
      level=rival.level,
      sigma=rival.sigma,
    )
    .to_config()
  )
