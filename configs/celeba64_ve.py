"""The baseline: NCSN++ with the VE process on CelebA-64, as Song et al. (2021) have it: C = I.

The network gives the score, divided by the σ that it is told (see cifar10_ve).

  soft-diffusion-train --config=configs/celeba64_ve.py --workdir=runs/celeba64_ve

Hardware and time as celeba64_blur. P Table 1: FID 3.25.
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "celeba64_blur.py")
    .replace(
      name="celeba64_ve",
      corruption=corruptions.Identity(),
      level=schedules.Constant(0.0),
      sigma=schedules.Geometric(0.01, 90.0),
      prior={"kind": "zero"},
      network={"prediction": "score", "scale_by_sigma": True, "cond_min": 0.01, "cond_max": 90.0},
      sampling={"steps": 1000},
    )
    .to_config()
  )
