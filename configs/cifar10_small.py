"""A reduced NCSN++ on CIFAR-10 for one GPU and minutes: 10 million parameters, in bfloat16.

soft-diffusion-train --config=configs/cifar10_small.py --workdir=runs/cifar10_small
"""

import pathlib

from soft_diffusion_tf import corruptions, schedules
from soft_diffusion_tf.experiment import (
  Data,
  Experiment,
  Network,
  PriorOptions,
  Sampling,
  Training,
  level_from_file,
)

SCHEDULE = pathlib.Path(__file__).parent / "schedules" / "cifar10_blur.json"


def get_config():
  blur = corruptions.GaussianBlur(half_size=32)
  return Experiment(
    name="cifar10_small",
    corruption=blur,
    level=schedules.Staged(level_from_file(SCHEDULE, blur, 0.01, 18.0), 0.2, 1.0),
    sigma=schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
    data=Data(name="cifar10", image_shape=(32, 32, 3)),
    prior=PriorOptions(kind="subspace"),
    network=Network(nf=64, num_res_blocks=2, dropout=0.0, dtype="bfloat16"),
    training=Training(
      batch_size=256,
      steps=20_000,
      learning_rate=1e-3,
      warmup_steps=1000,
      ema_decay=0.9995,
      checkpoint_every=1000,
    ),
    sampling=Sampling(sampler="two_step", steps=25),
  ).to_config()
