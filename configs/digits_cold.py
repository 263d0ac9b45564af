"""Cold Diffusion (Bansal et al. 2022) with the blur of digits_blur, on scikit-learn's 8×8 digits.

No noise at all, the absolute error of x̂_0 without a filter, and their Algorithm 2 as sampler, which
is DDIM at σ = 0. The blur sets in at t = 0, for there is no stage of noise before it.

soft-diffusion-train --config=configs/digits_cold.py --workdir=runs/digits_cold
"""

import pathlib

from soft_diffusion_tf import experiment, losses, priors, schedules


def get_config():
  blur = experiment.from_file(pathlib.Path(__file__).with_name("digits_blur.py"))
  return blur.replace(
    name="digits_cold",
    level=blur.level.inner,
    sigma=schedules.Constant(0.0),
    loss=losses.AbsoluteError(),
    prior=priors.Subspace(),
    sampling={"sampler": "ddim", "steps": 20},
  ).to_config()
