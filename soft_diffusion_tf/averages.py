"""Averages of weights whose length is chosen after training (Karras et al. 2024, "EDM2", § 3).

At step t a power-function average of exponent γ weighs the weights of step τ by p(τ) = (γ + 1) τ^γ
/ t^(γ + 1), so it forgets the random start by itself. Its length is the standard deviation of p as
a share of t (the paper's σ_rel), (γ + 1)^½ / ((γ + 2) (γ + 3)^½). Averages of two lengths, kept at
several steps, add up to nearly the average of any other length.
"""

import numpy as np
import scipy.optimize
import tensorflow as tf

LONGEST = 0.288  # of γ = 0.0, which weighs all steps alike, 12^-½ is the length
SHORTEST = 1e-4


def check_length(length, what="the length"):
  """Raises the ValueError of what is no length of an average."""
  number = isinstance(length, int | float) and not isinstance(length, bool)
  if not (number and SHORTEST <= length <= LONGEST):
    raise ValueError(
      f"{what} = {length!r} is no length of an average; give a share of the training from "
      f"{SHORTEST:g} to {LONGEST:g}, such as 0.05"
    )


def exponent(length):
  """γ of an average of this length; from `SHORTEST` to `LONGEST`."""
  check_length(length)
  gap = lambda g: np.sqrt((g + 1) / (g + 3)) / (g + 2) - length
  return float(scipy.optimize.brentq(gap, 0.0, 2.0 / SHORTEST, xtol=1e-12))


def share(exponent, step):
  """What step t ≥ 1 adds of its weights: 1 − (1 − 1/t)^(γ + 1), float32."""
  step = tf.cast(step, tf.float32)
  return -tf.math.expm1((exponent + 1.0) * tf.math.log1p(-1.0 / step))


def products(steps, exponents, others, other_exponents):
  """∫ p_i p_j dτ of profiles i by j: float64 [len(steps), len(others)]."""
  t, g = (np.asarray(v, np.float64)[:, None] for v in (steps, exponents))
  u, h = (np.asarray(v, np.float64)[None, :] for v in (others, other_exponents))
  low = np.minimum(t, u)
  both = (g + 1) * (h + 1) / (g + h + 1)
  return both * (low / t) ** g * (low / u) ** h * low / (t * u)


def combination(steps, exponents, step, wanted):
  """How kept averages add up to the one of another exponent (EDM2, Algorithm 3).

  The factors add up to 1, as EDM2's nearly do, so that a weight that never moved keeps its value.

  Args:
    steps, exponents: of the kept averages [K].
    step, wanted: of the average to make.

  Returns:
    (factors float64 [K], the error: the root of the squared distance of the profiles as a share of
    the wanted one's).
  """
  steps, exponents = np.asarray(steps, np.float64), np.asarray(exponents, np.float64)
  a = products(steps, exponents, steps, exponents)
  b = products(steps, exponents, [step], [wanted])[:, 0]
  own = products([step], [wanted], [step], [wanted])[0, 0]
  scale = 1.0 / np.sqrt(np.diag(a))  # profiles of the same height: early ones are short and high
  # The least squares under a constraint, by its Lagrange multiplier.
  system = np.block(
    [[a * np.outer(scale, scale), scale[:, None]], [scale[None, :], np.zeros((1, 1))]]
  )
  found = np.linalg.lstsq(system, np.append(b * scale, 1.0), rcond=1e-13)[0]
  factors = scale * found[:-1]
  error = (own - 2 * factors @ b + factors @ a @ factors) / own
  return factors, float(np.sqrt(max(error, 0.0)))
