import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions as c
from soft_diffusion_tf import diffusion, schedules

BLUR = c.GaussianBlur()
NOISE = schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2)


def test_forward_is_equation_4(blur_diffusion, rng):
  x, eta = (rng.standard_normal([3, 8, 8, 1]).astype(np.float32) for _ in range(2))
  t = np.float32([0.05, 0.5, 1.0])
  got = blur_diffusion.forward(x, t, eta).numpy()
  for k in range(3):
    level, sigma = float(blur_diffusion.level(t[k])), float(blur_diffusion.sigma(t[k]))
    want = BLUR(x[k : k + 1], level)[0] + sigma * eta[k]
    np.testing.assert_allclose(got[k], want, atol=1e-6)


def test_one_time_for_all_equals_one_each(blur_diffusion, rng):
  x = rng.random([4, 8, 8, 1], np.float32)
  one = blur_diffusion.corrupt(x, 0.6)
  np.testing.assert_allclose(one, blur_diffusion.corrupt(x, np.full(4, 0.6)), atol=1e-6)


def test_tweedie_both_ways(blur_diffusion, rng):
  x_t, x_0 = (rng.random([3, 8, 8, 1], np.float32) for _ in range(2))
  t = np.float32([0.01, 0.4, 1.0])
  score = blur_diffusion.score(x_t, t, x_0)
  back = blur_diffusion.corrupted_mean(x_t, t, score)
  np.testing.assert_allclose(back, blur_diffusion.corrupt(x_0, t), atol=2e-6)


def test_the_score_of_a_gaussian(ve_diffusion, rng):
  # x_0 ~ N(0, s²): E[x_0|x] = s² x/(s²+σ²), and the score is −x/(s²+σ²).
  x = rng.standard_normal([2, 8, 8, 1]).astype(np.float32)
  t, s2 = np.float32([0.3, 0.9]), 0.25
  sigma2 = (ve_diffusion.sigma(t).numpy() ** 2).reshape(-1, 1, 1, 1)
  score = ve_diffusion.score(x, t, s2 * x / (s2 + sigma2))
  np.testing.assert_allclose(score, -x / (s2 + sigma2), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("sigma", [NOISE, schedules.VPSigma(), schedules.Linear(0.0, 1.0)])
def test_nothing_is_nan_at_either_end(sigma, rng):
  process = diffusion.Diffusion((8, 8, 1), BLUR, schedules.Linear(0.0, 6.0), sigma)
  x = rng.random([2, 8, 8, 1], np.float32)
  for t in (0.0, 1.0, np.float32([0.0, 1.0])):
    x_t = process.forward(x, t, np.ones_like(x))
    score = process.score(x_t, t, x)
    for value in (x_t, score, process.corrupted_mean(x_t, t, score), process.adjoint(x, t)):
      assert np.all(np.isfinite(value))


def test_adjoint(blur_diffusion, rng):
  x, y = (rng.standard_normal([2, 8, 8, 1]).astype(np.float32) for _ in range(2))
  left = np.sum(blur_diffusion.corrupt(x, 0.7) * y)
  np.testing.assert_allclose(left, np.sum(x * blur_diffusion.adjoint(y, 0.7)), rtol=1e-4)


def test_prior_draws_depend_on_their_seed_alone(blur_diffusion):
  together = blur_diffusion.draw_prior([3, 1, 4]).numpy()
  for k, seed in enumerate([3, 1, 4]):
    np.testing.assert_array_equal(blur_diffusion.draw_prior([seed])[0], together[k])


def test_float32_whatever_comes_in(blur_diffusion):
  x = tf.ones([1, 8, 8, 1], tf.bfloat16)
  assert blur_diffusion.forward(x, tf.constant(0.5, tf.bfloat16), x).dtype == tf.float32
  assert blur_diffusion.score(x, 0.5, x).dtype == tf.float32


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (
      {"corruption": c.Mask(), "level": schedules.Linear(0.0, 1.5)},
      "outside .0, 1., the range of Mask",
    ),
    ({"sigma_schedule": schedules.Linear(0.1, 0.01)}, "σ falls from 0.09"),
    ({"sigma_schedule": schedules.Constant(-1.0)}, "not negative"),
    ({"level": schedules.Linear(1.0, 6.0)}, "C_0 is not the identity"),
    ({"level": schedules.Linear(-1.0, 6.0)}, "outside"),
  ],
)
def test_unsound_processes_are_refused(blur_diffusion, changes, text):
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(blur_diffusion, **changes)


@dataclasses.dataclass(frozen=True)
class Saturate(c.Corruption):
  """Linear at small levels alone, which it does not say."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return tf.where(level > 0.6, tf.tanh(level * x) / tf.maximum(level, 0.1), x)


@dataclasses.dataclass(frozen=True)
class Shrink(c.Corruption):
  """Half of the size, at its last level alone."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return x[:, ::2, ::2] if float(tf.reduce_max(level)) == 1.0 else x


@pytest.mark.parametrize(
  ("corruption", "text"),
  [
    (
      Saturate(),
      r"Saturate at level [0-9.]+ is not linear: C\(2x − 3y\) is off by .*linear = False",
    ),
    (
      Shrink(),
      r"Shrink at level 1 turns images of \(8, 8, 1\) into \(4, 4, 1\); C must",
    ),
  ],
)
def test_what_is_no_operator_on_images_is_refused_where_a_process_is_built(corruption, text):
  with pytest.raises(ValueError, match=text) as caught:
    diffusion.Diffusion((8, 8, 1), corruption, schedules.Linear(0.0, 1.0), NOISE)
  assert "\n" not in str(caught.value)


def test_one_that_says_that_it_is_not_linear_is_a_process(rng):
  process = diffusion.Diffusion((8, 8, 1), c.Gamma(), schedules.Linear(0.0, 2.0), NOISE)
  x = rng.random([2, 8, 8, 1], np.float32)
  np.testing.assert_allclose(process.corrupt(x, 0.5), x**2, atol=1e-6)
  again = diffusion.Diffusion.from_config(process.get_config())
  np.testing.assert_array_equal(again.corrupt(x, 0.5), process.corrupt(x, 0.5))


def test_bad_times_and_missing_prior(blur_diffusion):
  x = np.zeros([1, 8, 8, 1])
  with pytest.raises(ValueError, match=r"t = 1.2 is outside \[0, 1\]"):
    blur_diffusion.corrupt(x, 1.2)
  with pytest.raises(ValueError, match="t = nan"):
    blur_diffusion.corrupt(x, np.nan)
  with pytest.raises(ValueError, match="no prior yet"):
    dataclasses.replace(blur_diffusion, prior=None).draw_prior([0])
