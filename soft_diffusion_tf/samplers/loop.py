"""The loop of a sampler over its plan, from noise to images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import packages, rng
from soft_diffusion_tf.corruptions import Spectrum
from soft_diffusion_tf.diffusion import Denoiser, Diffusion
from soft_diffusion_tf.samplers.rules import COLUMNS, CORRECTOR, Array, spectrum_of

_LEAST_ROWS = 1024  # compiled by XLA, plans are filled up to a power of two of at least this


def clipped(denoiser: Denoiser) -> Denoiser:
  """The denoiser with x̂_0 clipped to [0, 1]."""
  return lambda x_t, t: tf.clip_by_value(denoiser(x_t, t), 0.0, 1.0)


def thresholded(denoiser: Denoiser, percentile: float) -> Denoiser:
  """The denoiser with dynamic thresholding (Saharia et al. 2022, 2.3), around mid-grey.

  Where the given percentile of an image's |2 x̂_0 − 1| exceeds 1, values beyond it are clipped and
  the rest is scaled back into [0, 1]: bright and dark pixels do not saturate together.
  """
  if not 0 < percentile <= 100:
    raise ValueError(f"the threshold is a percentile in (0, 100], got {percentile:g}")

  def bounded(x_t: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    y = 2.0 * denoiser(x_t, t) - 1.0
    size = np.prod(y.shape[1:])
    rank = min(int(np.ceil(size * percentile / 100)), size) - 1
    bound = tf.sort(tf.reshape(tf.abs(y), [-1, size]), axis=1)[:, rank]
    bound = tf.reshape(tf.maximum(bound, 1.0), [-1, 1, 1, 1])
    return 0.5 + 0.5 * tf.clip_by_value(y, -bound, bound) / bound

  return bounded


def bounded(denoiser: Denoiser, clip: bool, threshold: float) -> Denoiser:
  """The denoiser as the options of those names in `experiment.Sampling` bound it, or not."""
  if threshold:
    return thresholded(denoiser, threshold)
  return clipped(denoiser) if clip else denoiser


class State(NamedTuple):
  """What one row hands to the next, each float32 [B, H, W, C]."""

  x: tf.Tensor
  x0_hat: tf.Tensor  # of the last row: what γ extrapolates from
  before: tf.Tensor  # x where the last row's step started: what a corrector goes back to


def sample(
  diffusion: Diffusion,
  denoiser: Denoiser,
  plan: tf.Tensor,
  seeds: tf.Tensor,
  x: tf.Tensor,
  x0_previous: tf.Tensor | None = None,
  first_row: Any = 0,
  before: tf.Tensor | None = None,
) -> State:
  """Runs a plan from x at its first t; image i's noise depends on seeds[i] and the row alone.

  One `tf.while_loop`: memory does not grow with the number of rows, and neither their number nor
  the sampler is part of the graph.

  Args:
    plan: [N, 6], of `plan`. No step starts at t = 0, so rows with t = 0 at its end are filling.
    seeds: int64 [B].
    x: x_t at the first row's t, float32 [B, H, W, C].
    x0_previous: x̂_0 of the row before, for plans whose first γ is not 0.
    first_row: int, the number of the first row in the whole run: the salt of its noise.
    before: x where the first row's step started, for plans that begin with a corrector.

  Returns:
    The `State` after the last row: its x is x at the last row's s.
  """
  plan = tf.cast(plan, tf.float32)
  seeds = tf.cast(seeds, tf.int64)
  image = [None, *diffusion.image_shape]
  x = tf.ensure_shape(tf.cast(x, tf.float32), image)
  first = State(
    x,
    *(tf.zeros_like(x) if v is None else tf.ensure_shape(v, image) for v in (x0_previous, before)),
  )

  own = spectrum_of(diffusion)

  def step(n: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
    t, s, a, b, gamma, kind = tf.unstack(plan[n])
    corrects = kind > 0  # not ==, with which an exported graph rounds otherwise than this one
    here, start = tf.where(corrects, s, t), tf.where(corrects, state.before, state.x)
    x0_hat = denoiser(state.x, tf.fill(tf.shape(seeds), here))
    ahead = x0_hat + gamma * (x0_hat - state.x0_hat)
    made, r = diffusion.corrupt(ahead, s), start - diffusion.corrupt(ahead, t)
    salt = tf.cast(first_row, tf.int64) + tf.cast(n, tf.int64)

    def normal() -> tf.Tensor:
      return rng.normal_per_image(seeds, salt, diffusion.image_shape)

    def scalar() -> tf.Tensor:
      x_s = made + a * r
      return tf.cond(b > 0, lambda: x_s + b * normal(), lambda: x_s)

    def filtered(own: Spectrum) -> tf.Tensor:
      gain = tf.math.divide_no_nan(*(own.gains(diffusion.level(time)) for time in (t, s)))
      gone = tf.maximum(1.0 - gain**2, 0.0)  # of the noise that is kept
      size = tf.sqrt(b**2 + (a * diffusion.sigma(t)) ** 2 * gone)
      size = tf.where(s > 0, size, 0.0)
      return made + own.back(a * gain * own.to(r) + size * own.to(normal()))

    if own is None:
      x_s = scalar()
    else:
      x_s = tf.cond(kind < 0, functools.partial(filtered, own), scalar)
    after = State(x_s, x0_hat, start)
    return n + 1, State(*(tf.ensure_shape(new, x.shape) for new in after))

  count = tf.reduce_sum(tf.cast(plan[:, 0] > 0, tf.int32))
  return tf.while_loop(lambda n, _: n < count, step, (tf.constant(0), first))[1]


def velocity(diffusion: Diffusion, denoiser: Denoiser, x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
  """dx/dt of the probability flow (P Eq. 19): Ċ_t x̂_0 + (σ̇_t / σ_t)(x − C_t x̂_0), t scalar.

  Without noise it is Ċ_t x̂_0 alone (P Eq. 18).
  """
  x0_hat = denoiser(x, tf.fill([tf.shape(x)[0]], t))
  c_x, c_dot = _with_rate(lambda t: diffusion.corrupt(x0_hat, t), t)
  sigma, sigma_dot = _with_rate(diffusion.sigma, t)
  return c_dot + tf.math.divide_no_nan(sigma_dot, sigma) * (x - c_x)


def _with_rate(function: Callable[[tf.Tensor], tf.Tensor], t: tf.Tensor) -> tuple[tf.Tensor, ...]:
  """A function of t and its derivative by t."""
  with tf.autodiff.ForwardAccumulator(t, tf.ones_like(t)) as forward:
    value = function(t)
  return value, forward.jvp(value, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def check_smooth(diffusion: Diffusion) -> None:
  """Refuses corruptions that jump: their derivative does not add up to their change."""
  times = tf.constant((np.arange(1024) + 0.5) / 1024, tf.float32)
  probe = np.random.default_rng(0).random([1, *diffusion.image_shape], np.float32)
  many = tf.constant(np.repeat(probe, len(times), axis=0))
  _, rate = _with_rate(lambda t: diffusion.corrupt(many, t), times)
  change = (diffusion.corrupt(probe, 1.0) - diffusion.corrupt(probe, 0.0)).numpy()[0]
  gap = np.linalg.norm(rate.numpy().mean(0) - change)
  if not gap <= 0.05 * np.linalg.norm(change) + 1e-6:  # the midpoint rule's own error is far below
    raise ValueError(
      f"{type(diffusion.corruption).__name__} jumps with t (or has no derivative by its level), "
      "and dormand_prince needs one that is smooth; take another sampler or a mask with a soft edge"
    )


class Sampler:
  """`sample` as one tf.function, from the prior: traced once, for any plan and batch size.

  Example:
    sampler = Sampler(diffusion, denoiser)
    steps = plan("momentum", time_grid(100), diffusion)
    images = sampler(steps, seeds=range(16))  # float32 [16, H, W, C]

  Args:
    jit_compile: by XLA, which compiles once per batch size, not once per plan.
  """

  def __init__(self, diffusion: Diffusion, denoiser: Denoiser, jit_compile: bool = False) -> None:
    self.diffusion = diffusion
    self.denoiser = denoiser
    self.jit_compile = jit_compile
    image = tf.TensorSpec([None, *diffusion.image_shape], tf.float32)

    def run(plan: Any, seeds: Any, x: Any, x0_hat: Any, before: Any, first: Any) -> Any:
      return sample(diffusion, denoiser, plan, seeds, x, x0_hat, first, before)

    self._run = tf.function(
      run,
      autograph=False,
      jit_compile=jit_compile,
      input_signature=[
        tf.TensorSpec([None, COLUMNS], tf.float32),
        tf.TensorSpec([None], tf.int64),
        image,
        image,
        image,
        tf.TensorSpec([], tf.int64),
      ],
    )
    self._start = tf.function(
      diffusion.draw_prior, autograph=False, input_signature=[tf.TensorSpec([None], tf.int64)]
    )
    self._solve: Any = None

  def run(self, plan: tf.Tensor, seeds: Any, state: State, first_row: int = 0) -> State:
    """Goes on from a state through a further plan."""
    plan = tf.cast(plan, tf.float32)
    if self.jit_compile:
      size = _LEAST_ROWS
      while size < plan.shape[0]:
        size *= 2
      plan = tf.pad(plan, [[0, size - plan.shape[0]], [0, 0]])
    return self._run(plan, seeds, *state, tf.constant(first_row, tf.int64))

  def start(self, plan: tf.Tensor, seeds: tf.Tensor, x: Any = None) -> State:
    """The state before the first row: x, or a draw of the prior."""
    if x is None:
      if float(plan[0, 0]) < 1:
        raise ValueError(
          f"the plan starts at t = {float(plan[0, 0]):g}, and the prior is that of t = 1; "
          "give x, the images at that t (Diffusion.forward makes them)"
        )
      x = self._start(seeds)
    x = tf.cast(x, tf.float32)
    return State(x, tf.zeros_like(x), x)

  def __call__(self, plan: tf.Tensor, seeds: Any, x: Any = None) -> tf.Tensor:
    """Images float32 [B, H, W, C] for image seeds [B]; x is x_t to start from, else the prior."""
    seeds = rng.image_seeds(seeds)
    return self.run(plan, seeds, self.start(plan, seeds, x)).x

  def trajectory(self, plan: tf.Tensor, seeds: Any, frames: int) -> tuple[Array, Array, Array]:
    """The same run, seen at `frames` moments.

    Returns:
      times [frames + 1], x_t [frames + 1, B, H, W, C] and x̂_0 [frames, B, H, W, C] (the
      prediction made on arriving at each moment), as NumPy arrays.
    """
    seeds = rng.image_seeds(seeds)
    state = self.start(plan, seeds)
    # A cut between a step and its corrector would show the step undone.
    following = np.append(np.asarray(plan)[1:, 5], 0.0)
    ends = np.flatnonzero(following != CORRECTOR) + 1
    picked = np.linspace(0, len(ends), frames + 1).round().astype(int)[1:]
    cuts = [0, *np.unique(ends[picked[picked > 0] - 1])]
    times, states, predictions = [float(plan[0, 0])], [state.x.numpy()], []
    for begin, end in itertools.pairwise(cuts):
      state = self.run(plan[begin:end], seeds, state, begin)
      times.append(float(plan[end - 1, 1]))
      states.append(state.x.numpy())
      predictions.append(state.x0_hat.numpy())
    return np.array(times), np.stack(states), np.stack(predictions)

  def adaptive(
    self,
    seeds: Any,
    x: Any = None,
    *,
    start: float = 1.0,
    end: float = 1e-3,
    rtol: float = 1e-3,
    atol: float = 1e-3,
  ) -> tuple[tf.Tensor, int]:
    """Images by the probability flow with steps that keep an error (Dormand-Prince, `tfp.math`).

    The step size comes from the whole batch, so here an image depends on its batch, to within the
    tolerances; `drawing` keeps batches fixed. From `end` the last evaluation gives x̂_0 itself.

    Returns:
      Images float32 [B, H, W, C] and the number of evaluations of the denoiser.
    """
    seeds = rng.image_seeds(seeds)
    if not 0 < end < start <= 1:
      raise ValueError(f"the times must satisfy 0 < end < start ≤ 1, got {start:g} and {end:g}")
    state = self.start(tf.constant([[start]]), seeds, x)
    if self._solve is None:
      check_smooth(self.diffusion)
      self._solve = self._make_solver()
    times = (1.0 - np.array([start, end])).astype(np.float32)
    x, evaluations = self._solve(state.x, *times, np.float32(rtol), np.float32(atol))
    final = self.run(tf.constant([[end, 0, 0, 0, 0, 0]]), seeds, State(x, x, x)).x
    return final, int(evaluations) + 1

  def _make_solver(self) -> Any:
    with packages.needed("tensorflow-probability", "the sampler dormand_prince"):
      from tensorflow_probability import math as tfp_math  # needs tf-keras beside Keras 3

    image = tf.TensorSpec([None, *self.diffusion.image_shape], tf.float32)
    scalar = tf.TensorSpec([], tf.float32)

    # A function of its own, so that the solver's many calls share one trace of the network.
    @tf.function(autograph=False, input_signature=[scalar, image])
    def backwards(u: Any, x: Any) -> Any:
      return -velocity(self.diffusion, self.denoiser, x, 1.0 - u)

    def solve(x: Any, first: Any, last: Any, rtol: Any, atol: Any) -> tuple[Any, Any]:
      # In u = 1 − t: the solver gives NaN, without a word, for times that descend.
      result = tfp_math.ode.DormandPrince(rtol=rtol, atol=atol).solve(
        lambda u, x: tf.ensure_shape(backwards(u, x), x.shape), first, x, solution_times=[last]
      )
      return result.states[0], result.diagnostics.num_ode_fn_evaluations

    return tf.function(solve, autograph=False, input_signature=[image] + 4 * [scalar])
