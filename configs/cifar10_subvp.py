"""NCSN++ on CIFAR-10 with the sub-VP process of Song et al. (2021).

It predicts the noise: with a residual the weight 1/σ² would span twelve powers of ten, for σ is
1 − α², which is 5e-7 at the first t (see cifar10_ddpm).

  soft-diffusion-train --config=configs/cifar10_subvp.py --workdir=runs/cifar10_subvp

Hardware and time as cifar10_blur.
"""

import math
import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_blur.py")
  return base.replace(
    name="cifar10_subvp",
    corruption=corruptions.Scale(),
    level=schedules.VPScale(),
    sigma=schedules.Scaled(schedules.SubVPSigma(), 0.5),  # images in [0, 1], not in [−1, 1]
    prior={"kind": "zero"},
    network={
      "prediction": "noise",
      "conditioning": "vp_label",
      "embedding_type": "positional",
      "centered": True,
    },
    # Their loss is the mean over an image, ours the sum: the same clip is so much larger.
    training={"ema_decay": 0.9999, "clip_norm": float(math.prod(base.data.image_shape))},
    sampling={"sampler": "ancestral", "steps": 1000},
  ).to_config()
