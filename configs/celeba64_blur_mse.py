r"""Ablation of P F.1.2: blur whose MSE decays as VE's (Eq. 55) instead of the found schedule.

  soft-diffusion-schedule --config=configs/celeba64_blur_mse.py --method=mse \
    --out=configs/schedules/celeba64_blur_mse.json
  soft-diffusion-train --config=configs/celeba64_blur_mse.py --workdir=runs/celeba64_blur_mse

Hardware and time as celeba64_blur. P: FID 8.35 instead of 1.85, at 2,000 steps instead of 280.
"""

import pathlib

from soft_diffusion_tf import experiment
from soft_diffusion_tf.experiment import level_from_file

HERE = pathlib.Path(__file__).parent
SCHEDULE = HERE / "schedules" / "celeba64_blur_mse.json"


def get_config():
  base = experiment.from_file(HERE / "celeba64_blur.py")
  return base.replace(
    name="celeba64_blur_mse",
    level=level_from_file(SCHEDULE, base.corruption, 0.01, 23.0),
    sampling={"steps": 2000},
  ).to_config()
