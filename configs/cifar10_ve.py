"""The baseline: NCSN++ with the VE process on CIFAR-10 (Song et al. 2021), as C = I.

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
    sampling={"steps": 1000},
  ).to_config()
