"""Every sampler is one update, and a sampler is a rule for its coefficients.

With s < t the next time, x̂_0 the denoiser's prediction, and r = x_t − C_t x̂_0 (an estimate of
σ_t η),

    x_s = C_s x̂_0 + a r + b η.

A rule gives (a, b) from (σ_t, σ_s); a table holds a row (t, s, a, b, γ, back) for every evaluation
of the denoiser; `sample` runs the table. γ replaces x̂_0 by the extrapolation
x̂_0 + γ (x̂_0 − x̂_0 of the row before). back = 1 makes a corrector of the row: it takes the step of
the row before once more, from where that one started, with an x̂_0 predicted where it ended.

A new sampler is a rule of three lines, and any callable of that form can be given to `table`:

    def halfway(sigma_t, sigma_s):
      a = 0.5 * (sigma_s / sigma_t)
      return a, np.sqrt(sigma_s**2 - (a * sigma_t) ** 2)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import packages, rng
from soft_diffusion_tf.corruptions import Scale
from soft_diffusion_tf.diffusion import Denoiser, Diffusion

Array = np.ndarray
Rule = Callable[[Array, Array], tuple[Array, Array]]

__all__ = ["ddim", "heun", "momentum", "naive", "probability_flow", "two_step"]
SAMPLERS = (
  "naive", "momentum", "probability_flow", "ddim", "ancestral", "two_step", "stochastic_two_step",
  "heun", "predictor_corrector",
)  # fmt: skip
ADAPTIVE = "dormand_prince"  # chooses its own steps, so it has no table: `Sampler.adaptive`
GRIDS = ("uniform", "quadratic", "level", "transport", "relative")
COLUMNS = 6  # t, s, a, b, γ, back

_EXTRAPOLATES = ("two_step", "stochastic_two_step")
_FINE = 256  # cells in which a grid measures a schedule's length
_LEAST_ROWS = 1024  # compiled by XLA, tables are filled up to a power of two of at least this


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


def ddim(sigma_t: Array, sigma_s: Array, k: float | Array = 0.0) -> tuple[Array, Array]:
  """P Eq. 52: keep the estimated noise, exchange a part of size k for fresh noise."""
  k_s = np.minimum(k, sigma_s)
  return np.sqrt(sigma_s**2 - k_s**2) / sigma_t, k_s


def two_step(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """DDIM's coefficients; `table` adds γ = ½ h/h_prev, which makes the step second order.

  The flow's exact step with x̂_0 held fixed is DDIM's; taking x̂_0 at the middle of the step by
  extrapolation from the step before removes the error's leading term (Adams-Bashforth in x̂_0).
  """
  return ddim(sigma_t, sigma_s)


def heun(sigma_t: Array, sigma_s: Array) -> tuple[Array, Array]:
  """DDIM's coefficients; `table` adds a corrector row with the mean of both ends' x̂_0.

  The trapezoidal rule where two-step extrapolates: second order, two evaluations a step.
  """
  return ddim(sigma_t, sigma_s)


def _ancestral(t: Array, s: Array, diffusion: Diffusion) -> tuple[Array, Array]:
  """DDIM with the k that makes the step a draw from q(x_s | x_t, x_0 = x̂_0).

  For C = α I (VP, α = 1: VE) that is the ancestral sampler of DDPM (Song et al. 2021a, Eq. 12 with
  their η = 1): k² = σ_s² (1 − ρ_s²/ρ_t²) with ρ = σ/α. For other corruptions the noise alone counts
  (α = 1), so no noise is exchanged where σ stands still.
  """
  sigma_t, sigma_s = (_at(diffusion.sigma, v) for v in (t, s))
  ratio = sigma_s / sigma_t
  if isinstance(diffusion.corruption, Scale):
    ratio = ratio * _at(diffusion.level, t) / _at(diffusion.level, s)
  return ddim(sigma_t, sigma_s, sigma_s * np.sqrt(1.0 - np.minimum(ratio, 1.0) ** 2))


# --- Times --------------------------------------------------------------------------------------


def time_grid(steps: int, kind: str = "uniform", diffusion: Diffusion | None = None,
              start: float = 1.0, images: Any = None) -> Array:  # fmt: skip
  """Times from `start` down to 0 for `steps` steps, float64 [steps + 1].

  Args:
    kind: "uniform" in t (P); "quadratic" (t²: short steps near 0); "level" (even steps of the
      corruption's level); "transport" (even steps of Wasserstein length, see `path_length`);
      "relative" (the same length in units of σ_t). The last three need `diffusion`; where what they
      measure stands still a tenth of the steps is spread evenly.
    start: the time to start from.
    images: clean images [N, H, W, C] whose second moments "transport" and "relative" measure by.
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
    raise ValueError(f"the time grid {kind!r} needs the diffusion")
  fine = np.linspace(0.0, start, 16 * _FINE + 1 if kind == "level" else _FINE + 1)
  if kind == "level":
    path = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(_at(diffusion.level, fine))))])
  elif images is None:
    raise ValueError(f"the time grid {kind!r} measures images; give some clean ones")
  else:
    path = path_length(diffusion, images, fine, relative=kind == "relative")
  if path[-1] == 0:
    return start * line
  path /= path[-1]
  return np.interp(line, 0.9 * path + 0.1 * fine / start, fine)


def path_length(diffusion: Diffusion, images: Any, times: Array, relative: bool = False) -> Array:
  """Wasserstein length of the forward process from times[0] to each time, float64 [N].

  A step's length is √(E‖(C_t − C_s) x_0‖² + d (σ_t − σ_s)²): W₂ when the corruptions commute and
  the noise is small beside the data (`scheduling`), an upper bound of W₂ always. `relative` divides
  a step by σ_t: how far it is in standard deviations of the noise.

  Args:
    images: clean images [N, H, W, C]; the first 128 are used.
    times: rising, [N].
  """
  x = np.asarray(images[:128], np.float32)
  if x.ndim != 4 or not len(x):
    raise ValueError(f"images must be [N, H, W, C] with N > 0, got shape {x.shape}")
  sigma = _at(diffusion.sigma, times)
  steps, before = [0.0], diffusion.corrupt(x, np.float32(times[0])).numpy()
  for k in range(1, len(times)):
    after = diffusion.corrupt(x, np.float32(times[k])).numpy()
    square = np.sum((after - before) ** 2, dtype=np.float64) / len(x)
    square += x[0].size * (sigma[k] - sigma[k - 1]) ** 2
    steps.append(np.sqrt(square) / (sigma[k] if relative else 1.0))
    before = after
  return np.cumsum(steps)


def _at(schedule: Callable[[Any], Any], times: Array) -> Array:
  """A schedule's values in float64 (of float32 times)."""
  return schedule(np.asarray(times, np.float32)).numpy().astype(np.float64)


# --- Tables -------------------------------------------------------------------------------------


def table(rule: str | Rule | Sequence[str | Rule], times: Sequence[float] | Array,
          diffusion: Diffusion, *, k: float = 0.0, noise: float = 1.0,
          denoise: bool = True) -> tf.Tensor:  # fmt: skip
  """The rows (t, s, a, b, γ, back) of a sampler, float32 [N, 6]; N is the number of evaluations.

  Args:
    rule: one of `SAMPLERS`, a callable (σ_t, σ_s) → (a, b), or several of either that take turns
      step by step, as a sequence or as "ddim+momentum": a predictor and a corrector (P F.3).
      "predictor_corrector" is P's pair "ddim+probability_flow".
    times: from the start down to 0 (or to an earlier stop).
    k: the fresh noise of "ddim" (P Eq. 52), at the most σ_s.
    noise: how much noise "stochastic_two_step" exchanges: a step of length h keeps the share
      exp(−noise·h) of the noise that it finds and draws the rest afresh; 0 is "two_step".
    denoise: the last step returns x̂_0 itself, so no noise of size σ_0 stays in the image. False
      keeps the rule's a. Either way the step into t = 0 adds no fresh noise.

  Raises:
    ValueError: times that do not descend in [0, 1], σ that rises in a reverse step, unknown rule.
  """
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"times must be at least two numbers, got {times.tolist()}")
  if not (np.all(np.diff(times) < 0) and times[0] <= 1 and times[-1] >= 0):
    raise ValueError(
      f"times must descend within [0, 1], got {times[0]:g} … {times[-1]:g}; are they ascending?"
    )
  if not (k >= 0 and noise >= 0):
    raise ValueError(f"the amount of fresh noise must not be negative, got {k=:g}, {noise=:g}")
  t, s = times[:-1], times[1:]
  sigma = _at(diffusion.sigma, times)
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
  half = np.concatenate([[0.0], 0.5 * (t - s)[1:] / (t - s)[:-1]])

  def steps_of(rule: str | Rule) -> tuple[Array, Array, Array]:
    if rule == "ancestral":
      a, b = _ancestral(t, s, diffusion)
    elif rule == "ddim":
      a, b = ddim(sigma_t, sigma_s, k)
    elif rule == "stochastic_two_step":
      kept = np.exp(-noise * (t - s))
      a, b = kept * sigma_s / sigma_t, sigma_s * np.sqrt(1.0 - kept**2)
    else:
      a, b = resolve(rule)(sigma_t, sigma_s)
    a, b = (np.broadcast_to(v, t.shape) for v in (a, b))
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", "")
    return a, b, half if name in _EXTRAPOLATES else np.zeros_like(t)

  turns = parts(rule)
  coefficients = [steps_of(turn) for turn in turns]
  rows = []
  for n in range(len(t)):
    turn = n % len(turns)
    a, b, gamma = (column[n] for column in coefficients[turn])
    final = s[n] == 0
    if final:
      b = 0.0
      if denoise:
        a = gamma = 0.0
    rows.append((t[n], s[n], a, b, gamma, 0.0))
    if turns[turn] in ("heun", heun) and not final:
      rows.append((t[n], s[n], a, b, -0.5, 1.0))
  return tf.constant(np.array(rows), tf.float32)


def parts(rule: str | Rule | Sequence[str | Rule]) -> tuple[str | Rule, ...]:
  """The rules that take turns in a sampler: ("ddim", "momentum") of "ddim+momentum".

  Raises:
    ValueError: an unknown name, with the nearest known one.
  """
  if rule == "predictor_corrector":
    rule = "ddim+probability_flow"
  if isinstance(rule, str):
    rule = rule.split("+")
  turns = tuple(rule) if isinstance(rule, Sequence) else (rule,)
  known = [name for name in SAMPLERS if name != "predictor_corrector"]
  for turn in turns:
    if callable(turn):
      continue
    if turn == ADAPTIVE:
      raise ValueError(f"{ADAPTIVE} chooses its own steps and has no table; use Sampler.adaptive")
    if turn not in known:
      names = (*SAMPLERS, ADAPTIVE)
      raise ValueError(
        f"unknown sampler {turn!r}; did you mean {_nearest(str(turn), names)!r}? "
        f"There are {', '.join(names)}, and pairs such as ddim+momentum"
      )
  return turns


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


def check(rule: str) -> None:
  """Raises the ValueError of a name that is no sampler, adaptive ones included."""
  if rule != ADAPTIVE:
    parts(rule)


def steps_for(rule: str | Rule | Sequence[str | Rule], nfe: int) -> int:
  """The largest number of steps into t = 0 that take at most `nfe` evaluations of the denoiser.

  "heun" takes two a step and one on the last; every other sampler one a step.
  """
  if nfe < 1:
    raise ValueError(f"sampling takes at least 1 evaluation of the denoiser, got nfe = {nfe}")
  steps = 1
  while evaluations(rule, steps + 1) <= nfe:
    steps += 1
  return steps


def evaluations(rule: str | Rule | Sequence[str | Rule], steps: int) -> int:
  """How many evaluations of the denoiser that many steps into t = 0 take: the rows of `table`."""
  turns = parts(rule)
  each = [2 if turn in ("heun", heun) else 1 for turn in turns]
  # The last step takes one, whatever the rule.
  return sum(each[n % len(turns)] for n in range(steps - 1)) + 1


def _nearest(name: str, names: Sequence[str]) -> str:
  return difflib.get_close_matches(str(name), names, 1, cutoff=0)[0]


# --- Denoisers with bounds ------------------------------------------------------------------------


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


# --- The loop -----------------------------------------------------------------------------------


class State(NamedTuple):
  """What one row hands to the next, each float32 [B, H, W, C]."""

  x: tf.Tensor
  x0_hat: tf.Tensor  # of the last row: what γ extrapolates from
  before: tf.Tensor  # x where the last row's step started: what a corrector goes back to


def sample(
  diffusion: Diffusion,
  denoiser: Denoiser,
  rows: tf.Tensor,
  seeds: tf.Tensor,
  x: tf.Tensor,
  x0_previous: tf.Tensor | None = None,
  first_row: Any = 0,
  before: tf.Tensor | None = None,
) -> State:
  """Runs a table from x at its first t; image i's noise depends on seeds[i] and the row alone.

  One `tf.while_loop`: memory does not grow with the number of rows, and neither their number nor
  the sampler is part of the graph.

  Args:
    rows: a table [N, 6]. No step starts at t = 0, so rows with t = 0 at its end are filling.
    seeds: int64 [B].
    x: x_t at the first row's t, float32 [B, H, W, C].
    x0_previous: x̂_0 of the row before, for tables whose first γ is not 0.
    first_row: int, the number of the first row in the whole run: the salt of its noise.
    before: x before the row before, for tables that begin with a corrector.

  Returns:
    The `State` after the last row: its x is x at the last row's s.
  """
  rows = tf.cast(rows, tf.float32)
  seeds = tf.cast(seeds, tf.int64)
  image = [None, *diffusion.image_shape]
  x = tf.ensure_shape(tf.cast(x, tf.float32), image)
  first = State(x, *(tf.zeros_like(x) if v is None else tf.ensure_shape(v, image)
                     for v in (x0_previous, before)))  # fmt: skip

  def step(n: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
    t, s, a, b, gamma, back = tf.unstack(rows[n])
    here, start = tf.where(back > 0, s, t), tf.where(back > 0, state.before, state.x)
    x0_hat = denoiser(state.x, tf.fill(tf.shape(seeds), here))
    ahead = x0_hat + gamma * (x0_hat - state.x0_hat)
    x_s = diffusion.corrupt(ahead, s) + a * (start - diffusion.corrupt(ahead, t))
    salt = tf.cast(first_row, tf.int64) + tf.cast(n, tf.int64)
    x_s = tf.cond(
      b > 0,
      lambda: x_s + b * rng.normal_per_image(seeds, salt, diffusion.image_shape),
      lambda: x_s,
    )
    after = State(x_s, x0_hat, start)
    return n + 1, State(*(tf.ensure_shape(new, x.shape) for new in after))

  count = tf.reduce_sum(tf.cast(rows[:, 0] > 0, tf.int32))
  return tf.while_loop(lambda n, _: n < count, step, (tf.constant(0), first))[1]


def velocity(diffusion: Diffusion, denoiser: Denoiser, x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
  """dx/dt of the probability flow (P Eq. 19): Ċ_t x̂_0 + (σ̇_t / σ_t)(x − C_t x̂_0), t scalar."""
  x0_hat = denoiser(x, tf.fill([tf.shape(x)[0]], t))
  c_x, c_dot = _with_rate(lambda t: diffusion.corrupt(x0_hat, t), t)
  sigma, sigma_dot = _with_rate(diffusion.sigma, t)
  return c_dot + sigma_dot / sigma * (x - c_x)


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
      f"and {ADAPTIVE} needs one that is smooth; take another sampler, or a mask with a soft edge"
    )


class Sampler:
  """`sample` as one tf.function, from the prior: traced once, for any table and batch size.

  Example:
    sampler = Sampler(diffusion, denoiser)
    rows = table("momentum", time_grid(100), diffusion)
    images = sampler(rows, seeds=range(16))  # float32 [16, H, W, C]

  Args:
    jit_compile: by XLA, which compiles once per batch size, not once per table.
  """

  def __init__(self, diffusion: Diffusion, denoiser: Denoiser, jit_compile: bool = False) -> None:
    self.diffusion = diffusion
    self.denoiser = denoiser
    self.jit_compile = jit_compile
    image = tf.TensorSpec([None, *diffusion.image_shape], tf.float32)

    def run(rows: Any, seeds: Any, x: Any, x0_hat: Any, before: Any, first: Any) -> Any:
      return sample(diffusion, denoiser, rows, seeds, x, x0_hat, first, before)

    self._run = tf.function(
      run,
      autograph=False,
      jit_compile=jit_compile,
      input_signature=[
        tf.TensorSpec([None, COLUMNS], tf.float32), tf.TensorSpec([None], tf.int64),
        image, image, image, tf.TensorSpec([], tf.int64),
      ],
    )  # fmt: skip
    self._start = tf.function(
      diffusion.draw_prior, autograph=False, input_signature=[tf.TensorSpec([None], tf.int64)]
    )
    self._solve: Any = None

  def run(self, rows: tf.Tensor, seeds: Any, state: State, first_row: int = 0) -> State:
    """Goes on from a state through more rows."""
    rows = tf.cast(rows, tf.float32)
    if self.jit_compile:
      size = _LEAST_ROWS
      while size < rows.shape[0]:
        size *= 2
      rows = tf.pad(rows, [[0, size - rows.shape[0]], [0, 0]])
    return self._run(rows, seeds, *state, tf.constant(first_row, tf.int64))

  def start(self, rows: tf.Tensor, seeds: tf.Tensor, x: Any = None) -> State:
    """The state before the first row: x, or a draw of the prior."""
    if x is None:
      if float(rows[0, 0]) < 1:
        raise ValueError(
          f"the table starts at t = {float(rows[0, 0]):g}, and the prior is that of t = 1; "
          "give x, the images at that t (Diffusion.forward makes them)"
        )
      x = self._start(seeds)
    x = tf.cast(x, tf.float32)
    return State(x, tf.zeros_like(x), x)

  def __call__(self, rows: tf.Tensor, seeds: Any, x: Any = None) -> tf.Tensor:
    """Images float32 [B, H, W, C] for image seeds [B]; x is x_t to start from, else the prior."""
    seeds = rng.image_seeds(seeds)
    return self.run(rows, seeds, self.start(rows, seeds, x)).x

  def trajectory(self, rows: tf.Tensor, seeds: Any, frames: int) -> tuple[Array, Array, Array]:
    """The same run, seen at `frames` moments.

    Returns:
      times [frames + 1], x_t [frames + 1, B, H, W, C] and x̂_0 [frames, B, H, W, C] (the
      prediction made on arriving at each moment), as NumPy arrays.
    """
    seeds = rng.image_seeds(seeds)
    state = self.start(rows, seeds)
    # A cut between a step and its corrector would show the step undone.
    back = np.append(np.asarray(rows)[1:, 5], 0.0)
    ends = np.flatnonzero(back == 0) + 1
    picked = np.linspace(0, len(ends), frames + 1).round().astype(int)[1:]
    cuts = [0, *np.unique(ends[picked[picked > 0] - 1])]
    times, states, predictions = [float(rows[0, 0])], [state.x.numpy()], []
    for begin, end in itertools.pairwise(cuts):
      state = self.run(rows[begin:end], seeds, state, begin)
      times.append(float(rows[end - 1, 1]))
      states.append(state.x.numpy())
      predictions.append(state.x0_hat.numpy())
    return np.array(times), np.stack(states), np.stack(predictions)

  def adaptive(self, seeds: Any, x: Any = None, *, start: float = 1.0, end: float = 1e-3,
               rtol: float = 1e-3, atol: float = 1e-3) -> tuple[tf.Tensor, int]:  # fmt: skip
    """Images by the probability flow with steps that keep an error (Dormand-Prince, `tfp.math`).

    The step size comes from the whole batch, so here an image depends on its batch, to within the
    tolerances; `bulk` keeps batches fixed. From `end` the last evaluation gives x̂_0 itself.

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
    with packages.needed("tensorflow-probability", f"the sampler {ADAPTIVE}"):
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
