"""P's masking diffusion on CIFAR-10: a window that shrinks, and little noise.

  soft-diffusion-train --config=configs/cifar10_mask.py --workdir=runs/cifar10_mask

Hardware and time as cifar10_blur.
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules
from soft_diffusion_tf.experiment import level_from_file

HERE = pathlib.Path(__file__).parent
SCHEDULE = HERE / "schedules" / "cifar10_mask.json"


def get_config():
  mask = corruptions.Mask(hidden="border")
  return (
    experiment.from_file(HERE / "cifar10_blur.py")
    .replace(
      name="cifar10_mask",
      corruption=mask,
      level=schedules.Staged(level_from_file(SCHEDULE, mask, 0.0, 1.0), 0.2, 1.0),
      prior={"kind": "zero"},
      sampling={"sampler": "probability_flow", "steps": 1024},
    )
    .to_config()
  )
