"""Inverse heat dissipation (IHDM, Rissanen et al. 2022) on scikit-learn's 8×8 digits.

Blur with reflecting borders in 200 steps of even ratio, noise of 0.01 throughout, and a target one
step less blurred than the input: ‖C_s (x̂_0 − x_0)‖² with s a step before t. Sampling blurs x̂_0 by
one step less and adds 1.25 times that noise, over and over, which is Algorithm 1. Their network
gives the less blurred image itself; this one gives x̂_0, of which the loss sees no more than that
image. They start from blurred training images, and this from a Gaussian fitted to those.

soft-diffusion-train --config=configs/digits_ihdm.py --workdir=runs/digits_ihdm
"""

import pathlib

import numpy as np

from soft_diffusion_tf import corruptions, experiment, losses, priors, schedules

STEPS = 200


def get_config():
  blur = experiment.from_file(pathlib.Path(__file__).with_name("digits_blur.py"))
  levels = (0.0, *np.geomspace(0.5, 6.0, STEPS).tolist())
  return blur.replace(
    name="digits_ihdm",
    corruption=corruptions.HeatDissipation(),
    level=schedules.piecewise(levels),
    sigma=schedules.Constant(0.01),
    loss=losses.SoftScoreMatching(weight="one", look_ahead=1 / STEPS),
    prior=priors.Subspace(),
    sampling={"sampler": "naive(size=1.25)", "steps": STEPS},
  ).to_config()
