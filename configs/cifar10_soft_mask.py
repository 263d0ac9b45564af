"""Masking diffusion on CIFAR-10 with soft edges: cifar10_mask with P's binary mask made continuous.

A binary mask jumps where a ring of pixels disappears, and no sampler's error falls with its steps
there (docs/samplers.md). Here each pixel fades over a quarter of the share that is hidden.

  soft-diffusion-schedule --config=configs/cifar10_soft_mask.py \
    --out=configs/schedules/cifar10_soft_mask.json
  soft-diffusion-train --config=configs/cifar10_soft_mask.py --workdir=runs/cifar10_soft_mask

Hardware and time as cifar10_blur.
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules
from soft_diffusion_tf.experiment import level_from_file

HERE = pathlib.Path(__file__).parent
SCHEDULE = HERE / "schedules" / "cifar10_soft_mask.json"


def get_config():
  mask = corruptions.Mask(hidden="border", edge=0.25)
  return (
    experiment.from_file(HERE / "cifar10_mask.py")
    .replace(
      name="cifar10_soft_mask",
      corruption=mask,
      level=schedules.Staged(level_from_file(SCHEDULE, mask, 0.0, 1.0), 0.2, 1.0),
    )
    .to_config()
  )
