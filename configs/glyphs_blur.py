"""Blur diffusion on 20,000 letters of 32×32 pixels: a second model for hours on a CPU.

soft-diffusion-train --config=configs/glyphs_blur.py --workdir=runs/glyphs
"""

import pathlib

from soft_diffusion_tf import corruptions, schedules
from soft_diffusion_tf.experiment import Data, Evaluation, from_file, level_from_file

SCHEDULE = pathlib.Path(__file__).parent / "schedules" / "glyphs_blur.json"


def get_config():
  blur = corruptions.GaussianBlur(half_size=40)
  e = from_file(pathlib.Path(__file__).with_name("digits_blur.py"))
  return e.replace(
    name="glyphs_blur",
    corruption=blur,
    level=schedules.Staged(level_from_file(SCHEDULE, blur, 0.01, 18.0), 0.2, 1.0),
    data=Data(name="glyphs", image_shape=(32, 32, 1), flip=False),
    network={"ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (8,)},
    training={
      "steps": 10_000,
      "learning_rate": 1e-3,
      "warmup_steps": 500,
      "ema_decay": 0.999,
      "ema_warmup": True,
      "averages": (0.05, 0.1),
      "average_every": 250,
      "checkpoint_every": 250,
      "sample_every": 2500,
    },
    sampling={"steps": 25, "batch_size": 64},
    evaluation=Evaluation(feature_net="pixels", samples=2000),
  ).to_config()
