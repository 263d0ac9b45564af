"""Blur diffusion on scikit-learn's 8×8 digits whose level and noise come from one found path.

P lets the noise rise first and the blur after it, and leaves choosing both at once open (F.1.1).

  soft-diffusion-schedule --config=digits_blur --joint --slice=1 --levels=96 \
    --out=configs/schedules/digits_joint.json
  soft-diffusion-train --config=configs/digits_joint.py --workdir=runs/digits_joint
"""

import pathlib

from soft_diffusion_tf import experiment, schedules

HERE = pathlib.Path(__file__).parent


def get_config():
  level, sigma = schedules.joint(HERE / "schedules" / "digits_joint.json")
  return (
    experiment.from_file(HERE / "digits_blur.py")
    .replace(name="digits_joint", level=level, sigma=sigma)
    .to_config()
  )
