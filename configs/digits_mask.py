"""Masking diffusion on scikit-learn's 8×8 digits: a window that shrinks with soft edges.

soft-diffusion-train --config=configs/digits_mask.py --workdir=runs/digits_mask
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules
from soft_diffusion_tf.experiment import level_from_file

HERE = pathlib.Path(__file__).parent
SCHEDULE = HERE / "schedules" / "digits_mask.json"


def get_config():
  mask = corruptions.Mask(hidden="border", edge=0.25)  # a hard mask has but five states on 8×8
  return (
    experiment.from_file(HERE / "digits_blur.py")
    .replace(
      name="digits_mask",
      corruption=mask,
      level=schedules.Staged(level_from_file(SCHEDULE, mask, 0.0, 1.0), 0.2, 1.0),
      prior={"kind": "zero"},
      loss={"weight": "inverse_variance"},
      sampling={"sampler": "probability_flow", "steps": 60},
    )
    .to_config()
  )
