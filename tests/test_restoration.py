"""Restoration, graded by exact denoisers: no network here."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, diffusion, oracles, restoration, schedules
from soft_diffusion_tf.experiment import Sampling

OPTIONS = restoration.DEFAULT.changed(steps=20)


@pytest.fixture(scope="module")
def mixture(digits):
  return oracles.GaussianMixture(digits[:200], std=0.05)


@pytest.fixture(scope="module")
def denoiser(mixture, blur_diffusion):
  return oracles.denoiser(mixture, blur_diffusion)


@pytest.fixture(scope="module")
def clean(digits):
  """Draws of the mixture."""
  noise = np.random.default_rng(1).standard_normal([24, 8, 8, 1])
  return (digits[:24] + 0.05 * noise).astype(np.float32)


def rms(x, **kwargs):
  return np.sqrt(np.mean(np.square(x), **kwargs))


# --- Which t --------------------------------------------------------------------------------------


def test_a_level_tells_its_time(blur_diffusion):
  for t in (0.21, 0.5, 0.83, 1.0):
    level = float(blur_diffusion.level(t))
    assert restoration.time_of_level(blur_diffusion, level) == pytest.approx(t, abs=1e-3)
  assert restoration.time_of_level(blur_diffusion, 0.01) == pytest.approx(0.2, abs=1e-3)
  fading = diffusion.Diffusion(  # a level that falls
    (8, 8, 1), corruptions.Scale(), schedules.Linear(1.0, 0.2), schedules.Geometric(0.01, 0.1)
  )
  assert restoration.time_of_level(fading, 0.6) == pytest.approx(0.5, abs=1e-3)
  assert restoration.time_of_level(fading, 0.2) == 1.0  # though float32(0.2) is above 0.2


def test_levels_that_tell_no_time(blur_diffusion, ve_diffusion):
  with pytest.raises(ValueError, match=r"level 7 is outside of 0.01 … 6"):
    restoration.time_of_level(blur_diffusion, 7.0)
  with pytest.raises(ValueError, match="tells no t"):
    restoration.time_of_level(ve_diffusion, 0.0)


def test_an_estimated_time_is_near(blur_diffusion, digits):
  for t in (0.05, 0.75, 0.9):  # between 0.2 and 0.6 the blur is below half a pixel: no blur at all
    y = restoration.corrupt(blur_diffusion, digits[:24], t, np.arange(24)).numpy()
    found = restoration.estimate_times(blur_diffusion, y, digits[200:712])
    assert np.median(np.abs(found - t)) < 0.06
  with pytest.raises(ValueError, match="at least 16"):
    restoration.estimate_times(blur_diffusion, y, digits[:3])


# --- Consistency ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "corruption", [corruptions.GaussianBlur(), corruptions.Mask(), corruptions.BlockAverage()]
)
def test_predictions_are_moved_no_further_than_they_must(corruption, digits):
  high = {"Mask": 0.9}.get(type(corruption).__name__, 3.0)
  process = diffusion.Diffusion(
    (8, 8, 1),
    corruption,
    schedules.Linear(corruption.level_range[0], high),
    schedules.Constant(0.1),
  )
  t = tf.constant(0.6)
  y = restoration.corrupt(process, digits[:6], t, np.arange(6))
  wrong = tf.constant(1.0 - digits[:6])
  explained = restoration.consistent(lambda x_t, t: wrong, process, y, t)(y, tf.fill([6], t))
  gap = rms(process.corrupt(explained, t) - y, axis=(1, 2, 3))
  before = rms(process.corrupt(wrong, t) - y, axis=(1, 2, 3))
  assert np.all(before > 0.15)
  # The noise in what C_t does not see cannot be explained, so it may stay a little above the bound.
  assert np.all(gap < 0.13)
  bound = 0.1 * np.sqrt(1 + 2 * np.sqrt(2 / 64))
  near = np.abs(gap - bound) < 1e-3  # those that reach the bound stop there
  # The step is −λ Cᵀ(C x − y): the gradient of the constraint, so no shorter one does.
  step = (explained - wrong).numpy().reshape(6, -1)
  pull = process.adjoint(y - process.corrupt(explained, t), t).numpy().reshape(6, -1)
  cosine = np.sum(step * pull, 1) / np.linalg.norm(step, axis=1) / np.linalg.norm(pull, axis=1)
  np.testing.assert_allclose(cosine, 1.0, atol=1e-3)
  assert near.any() or isinstance(corruption, corruptions.BlockAverage | corruptions.Mask)


def test_what_explains_y_already_is_left_alone(blur_diffusion, digits):
  x, t = tf.constant(digits[:4]), tf.constant(0.6)
  y = blur_diffusion.corrupt(x, t) + 0.05
  explained = restoration.consistent(lambda x_t, t: x, blur_diffusion, y, t)(y, tf.fill([4], t))
  np.testing.assert_array_equal(explained, x)


# --- Tiles ----------------------------------------------------------------------------------------


def test_tiles_of_a_local_denoiser_leave_no_trace(digits):
  def local(x_t, t):
    assert x_t.shape[1:] == (8, 8, 1)
    return 0.5 * x_t + tf.reshape(t, [-1, 1, 1, 1])

  x = tf.constant(np.random.default_rng(0).random([2, 19, 13, 1], np.float32))
  t = tf.constant([0.25, 0.75])
  for overlap in (0.0, 0.5, 0.9):
    out = restoration.tiled(local, (8, 8, 1), (19, 13, 1), overlap)(x, t)
    np.testing.assert_allclose(out, 0.5 * x + t[:, None, None, None], atol=1e-6)
  assert restoration.tiled(local, (8, 8, 1), (8, 8, 1)) is local


def test_tiles_beside_each_other_are_images_of_their_own(mixture, blur_diffusion, denoiser, clean):
  masked = dataclasses.replace(  # a corruption that does not reach over an edge
    blur_diffusion, corruption=corruptions.Identity(), level=schedules.Constant(0.0)
  )
  alone = oracles.denoiser(mixture, masked)
  y = restoration.corrupt(masked, clean[:4], 0.9, np.arange(4)).numpy()
  sheet = np.concatenate([np.concatenate(y[:2], 1), np.concatenate(y[2:], 1)], 0)[None]
  restorer = restoration.Restorer(
    masked, alone, OPTIONS.changed(sampler="two_step"), overlap=0.0, explain=False
  )
  whole = restorer(sheet, 0.9).samples[0, 0]
  parts = restorer(y, 0.9).samples[:, 0]
  for k, (i, j) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
    np.testing.assert_allclose(whole[i : i + 8, j : j + 8], parts[k], atol=1e-4)


# --- Restoring ------------------------------------------------------------------------------------


def test_restorations_of_an_exact_denoiser(blur_diffusion, denoiser, clean):
  t = 0.75  # level 0.81
  restorer = restoration.Restorer(blur_diffusion, denoiser, OPTIONS)
  y = restorer.corrupt(clean, t)
  out = restorer(y, t, count=6, seed=3)
  error = rms(out.expected - clean)
  assert error < 0.6 * rms(y - clean)
  # For exact samples of the posterior an error squared is twice that of E[x_0|y].
  assert 1.1 < rms(out.samples[:, 0] - clean) / error < 1.7
  assert rms(out.mean - clean) < 1.2 * error
  # The spread says how wrong the mean is, within what 20 steps of a sampler allow.
  assert 0.6 < rms(out.uncertainty) / error < 1.3
  gap = rms(blur_diffusion.corrupt(out.samples[:, 0], t) - y)
  assert 0.8 * 0.1 < gap < 1.2 * 0.1  # ‖C x − y‖/√n against σ


def test_images_depend_on_their_seeds(blur_diffusion, denoiser, clean):
  restorer = restoration.Restorer(blur_diffusion, denoiser, OPTIONS)
  y = restorer.corrupt(clean[:2], 0.5)
  many = restorer(y, 0.5, count=3, seed=7).samples
  np.testing.assert_allclose(restorer(y[1:], 0.5, seed=7 + 3).samples[0, 0], many[1, 0], atol=1e-5)
  assert rms(many[0, 0] - many[0, 1]) > 0.01
  with pytest.raises(ValueError, match="at least 2 samples"):
    _ = restorer(y, 0.5).uncertainty


@pytest.mark.parametrize(
  ("text", "change"),
  [
    (r"\(0, 1\]", {"t": 0.0}),
    ("at least 1 sample", {"count": 0}),
    ("NaN", {"y": np.full([1, 8, 8, 1], np.nan)}),
    (r"must be \[B, H, W, C\]", {"y": np.zeros([8, 8, 1])}),
    ("cannot be cut", {"y": np.zeros([1, 7, 9, 1])}),
    ("cannot be cut", {"y": np.zeros([1, 8, 8, 3])}),
  ],
)
def test_bad_input_is_named(text, change, blur_diffusion, denoiser):
  arguments = {"y": np.zeros([1, 8, 8, 1]), "t": 0.5} | change
  with pytest.raises(ValueError, match=text):
    restoration.Restorer(blur_diffusion, denoiser, OPTIONS)(**arguments)


def test_samplers_that_cannot_restore(blur_diffusion):
  for options in (
    Sampling(sampler="dormand_prince"),
    Sampling(grid="transport"),
    Sampling(times=(1.0, 0.0)),
  ):
    with pytest.raises(ValueError, match="take another sampler"):
      restoration.plan(blur_diffusion, 0.5, options)
