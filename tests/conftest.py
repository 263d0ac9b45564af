"""Shared pieces: small diffusions, a tiny experiment, images."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import pytest

from soft_diffusion_tf import corruptions, data, diffusion, priors, schedules
from soft_diffusion_tf.experiment import (
  Data,
  Evaluation,
  Experiment,
  Network,
  Sampling,
  Training,
)


@pytest.fixture(scope="module", autouse=True)
def _memory():
  """Gives back what a module's models and graphs hold, or a worker would keep it to the end."""
  yield
  import keras  # after soft_diffusion_tf, which sets what TensorFlow reads as it is loaded

  keras.utils.clear_session()
  gc.collect()


@pytest.fixture(scope="session")
def digits():
  """All 1,797 digits, float32 [N, 8, 8, 1]."""
  return data.load("digits", "all").floats()


@pytest.fixture(scope="session")
def blur_diffusion(digits):
  """P's two-stage blur process on 8×8 images, with the default prior."""
  process = diffusion.Diffusion(
    (8, 8, 1),
    corruptions.GaussianBlur(),
    schedules.Staged(schedules.Geometric(0.01, 6.0), 0.2, 1.0),
    schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
  )
  return process.with_prior(priors.fit("blurred_colour", digits, process))


@pytest.fixture(scope="session")
def ve_diffusion():
  """The VE process of Song et al. on 8×8 images."""
  process = diffusion.Diffusion(
    (8, 8, 1), corruptions.Identity(), schedules.Constant(0.0), schedules.Geometric(0.01, 50.0)
  )
  return process.with_prior(priors.zero((8, 8, 1)))


@pytest.fixture(scope="session")
def tiny():
  """An experiment that trains a few steps in seconds."""
  return Experiment(
    name="tiny",
    corruption=corruptions.GaussianBlur(half_size=8),
    level=schedules.Staged(schedules.Geometric(0.01, 6.0), 0.2, 1.0),
    data=Data("digits", "train", "test", (8, 8, 1), flip=False),
    prior=priors.BlurredColour(),
    network=Network(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.1),
    training=Training(
      batch_size=16,
      steps=6,
      learning_rate=1e-3,
      warmup_steps=2,
      log_every=2,
      checkpoint_every=2,
      sample_every=0,
      steps_per_loop=2,
    ),
    sampling=Sampling(sampler="momentum", steps=4, batch_size=16),
    evaluation=Evaluation(samples=64),
  )


@pytest.fixture
def rng():
  return np.random.default_rng(0)
