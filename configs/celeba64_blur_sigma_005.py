r"""Ablation of P F.1.1: noise up to 0.05 instead of 0.1.

  soft-diffusion-train --config=configs/celeba64_blur_sigma_005.py \
    --workdir=runs/celeba64_blur_sigma_005

Needs the schedule of celeba64_blur; hardware and time as there.
P: clearly worse samples (Figure 9), no FID given.
"""

import pathlib

from soft_diffusion_tf import experiment, schedules


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "celeba64_blur.py")
    .replace(
      name="celeba64_blur_sigma_005",
      sigma=schedules.Staged(schedules.Geometric(0.01, 0.05), 0.0, 0.2),
    )
    .to_config()
  )
