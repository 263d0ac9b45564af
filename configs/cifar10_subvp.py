"""NCSN++ on CIFAR-10 with the sub-VP process of Song et al. (2021).

It predicts the noise: with a residual the weight 1/σ² would span twelve powers of ten, for σ is
1 − α², which is 5e-7 at the first t (see cifar10_ddpm).

  soft-diffusion-train --config=configs/cifar10_subvp.py --workdir=runs/cifar10_subvp

Hardware and time as cifar10_blur.
"""

import pathlib

from soft_diffusion_tf import experiment, schedules


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_ddpmpp.py")
  return base.replace(
    name="cifar10_subvp",
    sigma=schedules.Scaled(schedules.SubVPSigma(), 0.5),  # images in [0, 1], not in [−1, 1]
    network={"fir": True, "progressive_input": "residual"},
  ).to_config()
