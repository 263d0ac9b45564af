"""P's blur diffusion on CelebA-64, its best model.

  soft-diffusion-schedule --config=configs/celeba64_blur.py \
    --out=configs/schedules/celeba64_blur.json
  soft-diffusion-train --config=configs/celeba64_blur.py --workdir=runs/celeba64_blur

P: 16 TPU v2, 6 steps a second, 1-2 million steps; FID 1.85 with Momentum at 280 steps.
"""

import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules
from soft_diffusion_tf.experiment import level_from_file

HERE = pathlib.Path(__file__).parent
SCHEDULE = HERE / "schedules" / "celeba64_blur.json"


def get_config():
  blur = corruptions.GaussianBlur(half_size=80)
  return (
    experiment.from_file(HERE / "cifar10_blur.py")
    .replace(
      name="celeba64_blur",
      corruption=blur,
      level=schedules.Staged(level_from_file(SCHEDULE, blur, 0.01, 23.0), 0.2, 1.0),
      data={"name": "celeb_a", "image_shape": (64, 64, 3)},
      network={"cond_max": 90.0},
    )
    .to_config()
  )
