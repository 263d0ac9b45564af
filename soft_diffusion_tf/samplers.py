"""Every sampler is one update, and a sampler is a rule for its coefficients.

With s < t the next time, x̂_0 the denoiser's prediction, and r = x_t − C_t x̂_0 (an estimate of
σ_t η),

    x_s = C_s x̂_0 + a r + b η.

A rule gives (a, b) from (σ_t, σ_s); a table holds a row (t, s, a, b, γ) for every step; `sample`
runs the table. γ replaces x̂_0 by the extrapolation x̂_0 + γ (x̂_0 − x̂_0 of the step before).

A new sampler is a rule of three lines, and any callable of that form can be given to `table`:

    def halfway(sigma_t, sigma_s):
      a = 0.5 * (sigma_s / sigma_t)
      return a, np.sqrt(sigma_s**2 - (a * sigma_t) ** 2)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import rng
from soft_diffusion_tf.diffusion import Denoiser, Diffusion

Array = np.ndarray
Rule = Callable[[Array, Array], tuple[Array, Array]]

__all__ = ["ddim", "momentum", "naive", "probability_flow", "two_step"]
SAMPLERS = ("naive", "momentum", "probability_flow", "ddim", "two_step", "predictor_corrector")
GRIDS = ("uniform", "quadratic", "level")


# --- Rules: (σ_t, σ_s) → (a, b), float64 arrays over the steps -----------------------------------


def naive(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """Algorithm 1: corrupt the prediction again, with fresh noise."""
  return np.zeros_like(sigma_t), sigma_s


def momentum(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """Algorithm 2 (P Eq. 17): Euler-Maruyama on the reverse SDE."""
  return (sigma_s / sigma_t) ** 2, np.sqrt(sigma_t**2 - sigma_s**2)


def probability_flow(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """P Eq. 51: Euler on the probability-flow ODE."""
  return 0.5 * (1.0 + (sigma_s / sigma_t) ** 2), np.zeros_like(sigma_t)


def ddim(sigma_t: Array, sigma_s: Array, k: float = 0.0) -> tuple[Array, Array]:
  """P Eq. 52: keep the estimated noise, exchange a part of size k for fresh noise."""
  k_s = np.minimum(k, sigma_s)
  return np.sqrt(sigma_s**2 - k_s**2) / sigma_t, k_s


def two_step(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """DDIM's coefficients; `table` adds γ = ½ h/h_prev, which makes the step second order.

  The flow's exact step with x̂_0 held fixed is DDIM's; taking x̂_0 at the middle of the step by
  extrapolation from the step before removes the error's leading term (Adams-Bashforth in x̂_0).
  """
  return ddim(sigma_t, sigma_s)


# --- Tables -------------------------------------------------------------------------------------


def time_grid(steps: int, kind: str = "uniform", diffusion: Diffusion | None = None,
              start: float = 1.0) -> Array:  # fmt: skip
  """Times from `start` down to 0 for `steps` steps, float64 [steps + 1].

  Args:
    kind: "uniform" in t (P); "quadratic" (t²: short steps near 0); "level" (even steps of the
      corruption's level; needs `diffusion`, and a level that changes all along or is mixed with
      uniform where it stands still).
    start: the time to start from.
  """
  if steps < 1:
    raise ValueError(f"sampling takes at least 1 step, got {steps}")
  if not 0 < start <= 1:
    raise ValueError(f"the start time must be in (0, 1], got {start}")
  if kind not in GRIDS:
    raise ValueError(f"unknown time grid {kind!r}; did you mean {_nearest(kind, GRIDS)!r}?")
  line = np.linspace(1.0, 0.0, steps + 1)
  if kind == "uniform":
    return start * line
  if kind == "quadratic":
    return start * line**2
  if diffusion is None:
    raise ValueError("a grid that is even in level needs the diffusion")
  fine = np.linspace(0.0, start, 4097)
  level = diffusion.level(fine.astype(np.float32)).numpy().astype(np.float64)
  path = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(level)))])
  if path[-1] == 0:  # only the noise changes
    return start * line
  path /= path[-1]
  # Where only noise changes the level stands still; a tenth of the steps is spread evenly.
  return np.interp(line, 0.9 * path + 0.1 * fine / start, fine)


def table(rule: str | Rule, times: Sequence[float] | Array, diffusion: Diffusion, *,
          k: float = 0.0, denoise: bool = True) -> tf.Tensor:  # fmt: skip
  """The rows (t, s, a, b, γ) of a sampler, float32 [N, 5].

  Args:
    rule: one of `SAMPLERS`, or a callable (σ_t, σ_s) → (a, b). "predictor_corrector" alternates
      DDIM and probability-flow steps (P F.3).
    times: from the start down to 0 (or to an earlier stop), N + 1 numbers.
    k: the fresh noise of "ddim" (P Eq. 52), at the most σ_s.
    denoise: the last step returns x̂_0 itself, so no noise of size σ_0 stays in the image. False
      keeps the rule's a. Either way the step into t = 0 adds no fresh noise.

  Raises:
    ValueError: times that do not descend in [0, 1], σ that rises in a reverse step, unknown rule.
  """
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"times must be at least two numbers, got {times.tolist()}")
  if np.any(np.diff(times) >= 0) or times[0] > 1 or times[-1] < 0:
    raise ValueError(
      f"times must descend within [0, 1], got {times[0]:g} … {times[-1]:g}; are they ascending?"
    )
  t, s = times[:-1], times[1:]
  sigma = diffusion.sigma(times.astype(np.float32)).numpy().astype(np.float64)
  sigma_t, sigma_s = sigma[:-1], sigma[1:]
  if np.any(sigma_s > sigma_t * (1 + 1e-6)):
    place = int(np.argmax(sigma_s > sigma_t * (1 + 1e-6)))
    raise ValueError(
      f"the reverse step from t = {t[place]:g} raises the noise from {sigma_t[place]:g} to "
      f"{sigma_s[place]:g}; the noise schedule must not fall with t"
    )
  if np.any(sigma_t <= 0):
    raise ValueError(f"σ is 0 at t = {t[np.argmax(sigma_t <= 0)]:g}; no step can start there")
  sigma_s = np.minimum(sigma_s, sigma_t)
  gamma = np.zeros_like(t)
  if rule == "predictor_corrector":
    pairs = np.stack([ddim(sigma_t, sigma_s, k), probability_flow(sigma_t, sigma_s)])
    pick = np.arange(len(t)) % 2
    a, b = (np.where(pick, pairs[1, j], pairs[0, j]) for j in range(2))
  elif rule == "ddim":
    a, b = ddim(sigma_t, sigma_s, k)
  else:
    a, b = resolve(rule)(sigma_t, sigma_s)
  if rule in ("two_step", two_step):
    gamma[1:] = 0.5 * (t - s)[1:] / (t - s)[:-1]
  a, b = (np.broadcast_to(v, t.shape).copy() for v in (a, b))
  if s[-1] == 0:
    b[-1] = 0.0
    if denoise:
      a[-1] = 0.0
      gamma[-1] = 0.0
  return tf.constant(np.stack([t, s, a, b, gamma], axis=1), tf.float32)


def resolve(rule: str | Rule) -> Rule:
  """The rule that a name stands for; a callable stands for itself."""
  if callable(rule):
    return rule
  if rule not in __all__:
    raise ValueError(
      f"unknown sampler {rule!r}; did you mean {_nearest(rule, SAMPLERS)!r}? "
      f"There are {', '.join(SAMPLERS)}"
    )
  return globals()[rule]


def _nearest(name: str, names: Sequence[str]) -> str:
  return difflib.get_close_matches(str(name), names, 1, cutoff=0)[0]


# --- The loop -----------------------------------------------------------------------------------


def sample(
  diffusion: Diffusion,
  denoiser: Denoiser,
  rows: tf.Tensor,
  seeds: tf.Tensor,
  x: tf.Tensor,
  x0_previous: tf.Tensor,
  first_step: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Runs a table from x at its first t; image i's noise depends on seeds[i] and the step alone.

  One `tf.while_loop`: memory does not grow with the number of steps, and neither the number of
  steps nor the sampler is part of the graph.

  Args:
    rows: a table [N, 5].
    seeds: int64 [B].
    x: x_t at the first row's t, float32 [B, H, W, C].
    x0_previous: x̂_0 of the step before (anything like x where the first γ is 0).
    first_step: int, the number of the first row in the whole run: the salt of its noise.

  Returns:
    x at the last row's s, and the last x̂_0 (which two-step runs continue from).
  """
  rows = tf.cast(rows, tf.float32)
  seeds = tf.cast(seeds, tf.int64)

  def step(n: tf.Tensor, x: tf.Tensor, previous: tf.Tensor) -> tuple[tf.Tensor, ...]:
    t, s, a, b, gamma = tf.unstack(rows[n])
    x0_hat = denoiser(x, tf.fill(tf.shape(seeds), t))
    ahead = x0_hat + gamma * (x0_hat - previous)
    x_s = diffusion.corrupt(ahead, s) + a * (x - diffusion.corrupt(ahead, t))
    salt = tf.cast(first_step, tf.int64) + tf.cast(n, tf.int64)
    x_s = tf.cond(
      b > 0,
      lambda: x_s + b * rng.normal_per_image(seeds, salt, diffusion.image_shape),
      lambda: x_s,
    )
    return n + 1, tf.ensure_shape(x_s, x.shape), tf.ensure_shape(x0_hat, x.shape)

  _, x, x0_hat = tf.while_loop(
    lambda n, *_: n < tf.shape(rows)[0],
    step,
    (tf.constant(0), tf.ensure_shape(x, [None, *diffusion.image_shape]),
     tf.ensure_shape(x0_previous, [None, *diffusion.image_shape])),
  )  # fmt: skip
  return x, x0_hat


class Sampler:
  """`sample` as one tf.function, from the prior: traced once, for any table and batch size.

  Example:
    sampler = Sampler(diffusion, denoiser)
    rows = table("momentum", time_grid(100), diffusion)
    images = sampler(rows, seeds=range(16))  # float32 [16, H, W, C]
  """

  def __init__(self, diffusion: Diffusion, denoiser: Denoiser) -> None:
    self.diffusion = diffusion
    image = [None, *diffusion.image_shape]

    def run(rows: Any, seeds: Any, x: Any, previous: Any, first: Any) -> Any:
      return sample(diffusion, denoiser, rows, seeds, x, previous, first)

    self.run = tf.function(
      run,
      autograph=False,
      input_signature=[
        tf.TensorSpec([None, 5], tf.float32),
        tf.TensorSpec([None], tf.int64),
        tf.TensorSpec(image, tf.float32),
        tf.TensorSpec(image, tf.float32),
        tf.TensorSpec([], tf.int64),
      ],
    )
    self._start = tf.function(
      diffusion.draw_prior, autograph=False, input_signature=[tf.TensorSpec([None], tf.int64)]
    )

  def __call__(self, rows: tf.Tensor, seeds: Any, x: tf.Tensor | None = None) -> tf.Tensor:
    """Images float32 [B, H, W, C] for image seeds [B]; x is x_t to start from, else the prior."""
    seeds = rng.image_seeds(seeds)
    x = self._start(seeds) if x is None else x
    zero = tf.constant(0, tf.int64)
    return self.run(tf.cast(rows, tf.float32), seeds, x, tf.zeros_like(x), zero)[0]

  def trajectory(self, rows: tf.Tensor, seeds: Any, frames: int) -> tuple[Array, Array, Array]:
    """The same run, seen at `frames` moments.

    Returns:
      times [frames + 1], x_t [frames + 1, B, H, W, C] and x̂_0 [frames, B, H, W, C] (the
      prediction made on arriving at each moment), as NumPy arrays.
    """
    seeds = rng.image_seeds(seeds)
    x = self._start(seeds)
    previous = tf.zeros_like(x)
    cuts = np.unique(np.linspace(0, rows.shape[0], frames + 1).round().astype(int))
    times, states, predictions = [float(rows[0, 0])], [x.numpy()], []
    for begin, end in itertools.pairwise(cuts):
      x, previous = self.run(rows[begin:end], seeds, x, previous, tf.constant(begin, tf.int64))
      times.append(float(rows[end - 1, 1]))
      states.append(x.numpy())
      predictions.append(previous.numpy())
    return np.array(times), np.stack(states), np.stack(predictions)
