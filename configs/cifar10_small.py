"""A reduced NCSN++ on CIFAR-10 for one GPU and minutes: 10 million parameters, in bfloat16.

soft-diffusion-train --config=configs/cifar10_small.py --workdir=runs/cifar10_small
"""

import pathlib

from soft_diffusion_tf import priors
from soft_diffusion_tf.experiment import Sampling, from_file


def get_config():
  e = from_file(pathlib.Path(__file__).with_name("cifar10_blur.py"))
  return e.replace(
    name="cifar10_small",
    prior=priors.Subspace(),
    network={"nf": 64, "num_res_blocks": 2, "dropout": 0.0, "dtype": "bfloat16"},
    training={
      "batch_size": 256,
      "steps": 20_000,
      "learning_rate": 1e-3,
      "warmup_steps": 1000,
      "ema_decay": 0.9995,
      "checkpoint_every": 1000,
    },
    sampling=Sampling(sampler="two_step", steps=25),
  ).to_config()
