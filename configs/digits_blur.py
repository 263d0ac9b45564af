"""Blur diffusion on scikit-learn's 8×8 digits: what `make quickstart` trains, in minutes on a CPU.

soft-diffusion-train --config=configs/digits_blur.py --workdir=runs/digits
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

SCHEDULE = pathlib.Path(__file__).parent / "schedules" / "digits_blur.json"


def get_config():
  blur = corruptions.GaussianBlur(half_size=16)
  return Experiment(
    name="digits_blur",
    corruption=blur,
    level=schedules.Staged(level_from_file(SCHEDULE, blur, 0.01, 6.0), 0.2, 1.0),
    sigma=schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
    data=Data(
      name="digits", train_split="all", test_split="all", image_shape=(8, 8, 1), flip=False
    ),
    prior=priors.Subspace(),
    loss=losses.SoftScoreMatching(weight="one", look_ahead=0.1),
    network=Network(nf=32, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(4,), dropout=0.0),
    training=Training(
      batch_size=64,
      steps=2400,
      learning_rate=2e-3,
      warmup_steps=200,
      ema_decay=0.995,
      log_every=50,
      checkpoint_every=600,
      keep_every=0,
      sample_every=800,
    ),
    sampling=Sampling(sampler="two_step", steps=20, batch_size=128),
    evaluation=Evaluation(feature_net="pixels", samples=640),
  ).to_config()
