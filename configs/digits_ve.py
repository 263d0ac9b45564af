"""The VE baseline of Song et al. (2021) on scikit-learn's 8×8 digits, as C = I (see cifar10_ve).

σ rises to 4.8, the largest distance between two digits (Song and Ermon 2020).

soft-diffusion-train --config=configs/digits_ve.py --workdir=runs/digits_ve
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, losses, schedules


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).with_name("digits_blur.py"))
    .replace(
      name="digits_ve",
      corruption=corruptions.Identity(),
      level=schedules.Constant(0.0),
      sigma=schedules.Geometric(0.01, 4.8),
      prior={"kind": "zero"},
      loss=losses.SoftScoreMatching(weight="inverse_variance"),
      network={"prediction": "score", "scale_by_sigma": True, "cond_min": 0.01, "cond_max": 4.8},
    )
    .to_config()
  )
