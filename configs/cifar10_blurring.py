"""Blurring Diffusion (Hoogeboom and Salimans 2022) on CIFAR-10.

A VP process on a cosine schedule whose image is blurred on the way, with reflecting borders: one
α for each frequency, of which a thousandth always stays, and one σ for all. The network of
cifar10_ddpmpp gives the noise and is trained by ‖ε̂ − ε‖²; the ancestral sampler has a coefficient
for each frequency. At t = 1 x̂_0 = C_1⁻¹ (x_1 − σ_1 ε̂) is of size 10⁵, so do not clip it.

soft-diffusion-train --config=configs/cifar10_blurring.py --workdir=runs/cifar10_blurring

Hardware and time as cifar10_blur. Their FID is 3.17 (P 5), with another network.
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  vp = experiment.from_file(pathlib.Path(__file__).with_name("cifar10_ddpmpp.py"))
  return vp.replace(
    name="cifar10_blurring",
    corruption=corruptions.Compose(
      corruptions.HeatDissipation(floor=0.001),
      corruptions.Scale(),
      schedules.SineSquared(20.0),
      schedules.CosineScale(),
    ),
    level=schedules.Linear(0.0, 1.0),
    sigma=schedules.Scaled(schedules.CosineSigma(), 0.5),  # images in [0, 1], not in [−1, 1]
  ).to_config()
