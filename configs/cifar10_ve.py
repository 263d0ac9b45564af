"""The baseline: NCSN++ with the VE process on CIFAR-10, as Song et al. (2021) have it: C = I.

The network gives the score and divides it by the σ that it is told, from 0.01 to 50: its own
numbers are of size 1 at every σ. As a residual they would have to be as large as σ.

  soft-diffusion-train --config=configs/cifar10_ve.py --workdir=runs/cifar10_ve

Hardware and time as cifar10_blur. P Table 2: FID 4.79 (reverse SDE), 10.54 (probability flow).
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_blur.py")
  return base.replace(
    name="cifar10_ve",
    corruption=corruptions.Identity(),
    level=schedules.Constant(0.0),
    sigma=schedules.Geometric(0.01, 50.0),
    prior={"kind": "zero"},
    network={"prediction": "score", "scale_by_sigma": True, "cond_min": 0.01, "cond_max": 50.0},
    sampling={"steps": 1000},
  ).to_config()
