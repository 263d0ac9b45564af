r"""Ablation of P F.1.1: noise that grows over the whole diffusion.

  soft-diffusion-train --config=configs/celeba64_blur_noise_throughout.py \
    --workdir=runs/celeba64_blur_noise_throughout

Needs the schedule of celeba64_blur; hardware and time as there.
P: FID 4.31 instead of 1.85.
"""

import pathlib

from soft_diffusion_tf import experiment, schedules


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "celeba64_blur.py")
    .replace(name="celeba64_blur_noise_throughout", sigma=schedules.Geometric(0.01, 0.1))
    .to_config()
  )
