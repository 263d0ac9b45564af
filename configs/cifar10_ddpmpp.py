"""DDPM++ on CIFAR-10: the VP process and the improved network of Song et al. (2021).

It predicts the noise and is sampled by the ancestral sampler (see cifar10_ddpm).

  soft-diffusion-train --config=configs/cifar10_ddpmpp.py --workdir=runs/cifar10_ddpmpp

Hardware and time as cifar10_blur.
"""

import math
import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_blur.py")
  return base.replace(
    name="cifar10_ddpmpp",
    corruption=corruptions.Scale(),
    level=schedules.VPScale(),
    sigma=schedules.Scaled(schedules.VPSigma(), 0.5),  # images in [0, 1], not in [−1, 1]
    prior={"kind": "zero"},
    network={
      "prediction": "noise",
      "conditioning": "vp_label",
      "embedding_type": "positional",
      "centered": True,
      "fir": False,
      "progressive_input": "none",
    },
    # Their loss is the mean over an image, ours the sum: the same clip is so much larger.
    training={"ema_decay": 0.9999, "clip_norm": float(math.prod(base.data.image_shape))},
    sampling={"sampler": "ancestral", "steps": 1000},
  ).to_config()
