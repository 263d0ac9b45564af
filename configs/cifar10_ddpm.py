"""DDPM on CIFAR-10: the VP process and the network that Song et al. (2021) trained it with.

It predicts the noise (with w = 1/σ² the loss is ‖ε̂ − ε‖², as Ho et al. 2020 have it) and is sampled
by the ancestral sampler; DDIM is the same model with --config.sampling.sampler=ddim.

  soft-diffusion-train --config=configs/cifar10_ddpm.py --workdir=runs/cifar10_ddpm

Hardware and time as cifar10_blur. P Table 2: FID 3.17 (of Ho et al. 2020).
"""

import math
import pathlib

from soft_diffusion_tf import corruptions, experiment, schedules


def get_config():
  base = experiment.from_file(pathlib.Path(__file__).parent / "cifar10_blur.py")
  return base.replace(
    name="cifar10_ddpm",
    corruption=corruptions.Scale(),
    level=schedules.VPScale(),
    sigma=schedules.Scaled(schedules.VPSigma(), 0.5),  # images in [0, 1], not in [−1, 1]
    prior={"kind": "zero"},
    network={
      "prediction": "noise",
      "conditioning": "vp_label",
      "embedding_type": "positional",
      "centered": True,
      "num_res_blocks": 2,
      "resblock_type": "ddpm",
      "fir": False,
      "skip_rescale": False,
      "progressive_input": "none",
    },
    # Their loss is the mean over an image, ours the sum: the same clip is so much larger.
    training={"ema_decay": 0.9999, "clip_norm": float(math.prod(base.data.image_shape))},
    sampling={"sampler": "ancestral", "steps": 1000},
  ).to_config()
