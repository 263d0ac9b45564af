r"""Ablation of P 3.1 and section 4: the loss without C_t, that of Bansal et al. 2022.

  soft-diffusion-train --config=configs/celeba64_blur_unfiltered.py \
    --workdir=runs/celeba64_blur_unfiltered

Needs the schedule of celeba64_blur; hardware and time as there.
P: FID 5.91 instead of 1.85.
"""

import pathlib

from soft_diffusion_tf import experiment


def get_config():
  return (
    experiment.from_file(pathlib.Path(__file__).parent / "celeba64_blur.py")
    .replace(name="celeba64_blur_unfiltered", loss={"filtered": False})
    .to_config()
  )
