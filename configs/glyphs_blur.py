"""Blur diffusion on 20,000 letters of 32×32 pixels: a second model for hours on a CPU.

soft-diffusion-train --config=configs/glyphs_blur.py --workdir=runs/glyphs
"""

import pathlib

from soft_diffusion_tf import corruptions, losses, priors, schedules
from soft_diffusion_tf.experiment import (
  Data,
  Evaluation,
  Experiment,
  Network,
  Sampling,
  Training,
  level_from_file,
)

SCHEDULE = pathlib.Path(__file__).parent / "schedules" / "glyphs_blur.json"


def get_config():
  blur = corruptions.GaussianBlur(half_size=40)
  return Experiment(
    name="glyphs_blur",
    corruption=blur,
    level=schedules.Staged(level_from_file(SCHEDULE, blur, 0.01, 18.0), 0.2, 1.0),
    sigma=schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
    data=Data(name="glyphs", image_shape=(32, 32, 1), flip=False),
    prior=priors.Subspace(),
    loss=losses.SoftScoreMatching(weight="one", look_ahead=0.1),
    network=Network(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0),
    training=Training(
      batch_size=64,
      steps=10_000,
      learning_rate=1e-3,
      warmup_steps=500,
      ema_decay=0.999,
      ema_warmup=True,
      averages=(0.05, 0.1),
      average_every=250,
      log_every=50,
      checkpoint_every=250,
      keep_every=0,
      sample_every=2500,
    ),
    sampling=Sampling(sampler="two_step", steps=25, batch_size=64),
    evaluation=Evaluation(feature_net="pixels", samples=2000),
  ).to_config()
