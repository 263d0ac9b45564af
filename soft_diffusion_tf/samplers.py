"""Every sampler is one update, and a sampler's rule chooses its coefficients.

With s < t the next time, x̂_0 the denoiser's prediction, and r = x_t − C_t x̂_0 (an estimate of
σ_t η),

    x_s = C_s x̂_0 + a r + b η.

A rule sees all steps of a run and gives a, b and γ for each; a plan holds a row (t, s, a, b, γ,
kind) for every evaluation of the denoiser; `sample` runs the plan. γ replaces x̂_0 by the
extrapolation x̂_0 + γ (x̂_0 − x̂_0 of the evaluation before). The kind is 0, or

- 1, a corrector: the row takes the step of the row before once more, from where that step started,
  with an x̂_0 predicted where it ended;
- 2, a step whose coefficients are operators, in the basis that all C share (`Corruption.spectrum`):
  the noise that is kept goes through G = C_t C_s⁻¹ as the image does on its way from s to t, and
  what G takes from it is drawn afresh: A = a G, B² = b² I + a² σ_t² (I − G²).

A new sampler is a class of a few lines:

    @dataclasses.dataclass(frozen=True)
    class Halfway(samplers.Rule):
      share: float = 0.5

      def coefficients(self, step):
        a = self.share * step.sigma_s / step.sigma_t
        return samplers.Update(a, np.sqrt(step.sigma_s**2 - (a * step.sigma_t) ** 2))

`plan(Halfway(0.3), …)` takes it, and a config by name: `sampling.sampler =
"my_module:Halfway(share=0.3)"`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import packages, parts, rng
from soft_diffusion_tf.corruptions import Identity, Scale, Spectrum
from soft_diffusion_tf.diffusion import Denoiser, Diffusion
from soft_diffusion_tf.parts import NotNegative, Positive, Range

Array = np.ndarray

GRIDS = ("uniform", "quadratic", "level", "transport", "relative")
COLUMNS = 6  # t, s, a, b, γ, kind
CORRECTOR, FILTERED = 1.0, 2.0  # kinds of rows

_FINE = 256  # cells in which a grid measures a schedule's length
_LEAST_ROWS = 1024  # compiled by XLA, plans are filled up to a power of two of at least this


# --- Rules --------------------------------------------------------------------------------------


class Step(NamedTuple):
  """All steps of a run, from t down to s: float64 arrays with an entry for each step."""

  t: Array
  s: Array
  sigma_t: Array
  sigma_s: Array
  level_t: Array
  level_s: Array
  diffusion: Diffusion

  def over(self, sizes: Array) -> Array:
    """Sizes of noise at s over σ_t, and 1 where there is no noise at all: there it stands still."""
    return np.divide(sizes, self.sigma_t, out=np.ones_like(self.sigma_t), where=self.sigma_t > 0)

  @property
  def ratio(self) -> Array:
    """σ_s/σ_t, and 1 where there is no noise at all."""
    return self.over(self.sigma_s)


def _spectrum(diffusion: Diffusion) -> Spectrum | None:
  """The basis of a C that is no multiple of the identity, whose gains are one number."""
  corruption = diffusion.corruption
  known = isinstance(corruption, Scale | Identity)
  return None if known else corruption.spectrum(diffusion.image_shape)


class Update(NamedTuple):
  """What a rule gives for each step: numbers, or arrays with an entry for each step.

  `corrector`, where it is not None, is the γ of a second evaluation, by which the step is taken
  again: −½ averages the predictions at both of its ends. `stay`, where it is not None, is (a, b) of
  a second evaluation at s, which moves x there without a change of time. `filtered` makes operators
  of a and b: the noise that is kept goes through C_t C_s⁻¹.
  """

  a: Array | float
  b: Array | float
  gamma: Array | float = 0.0
  corrector: float | None = None
  stay: tuple[Array | float, Array | float] | None = None
  filtered: bool = False


class Rule(parts.Part, role="sampler"):
  """A sampler: gives the coefficients of its steps. A part (see `parts`).

  `evaluations` is how often a step evaluates the denoiser: 2 with a corrector. `adaptive` rules
  choose their own steps, by their `tolerance`, and have no plan.
  """

  evaluations: ClassVar[int] = 1
  adaptive: ClassVar[bool] = False

  def coefficients(self, step: Step) -> Update:
    """The `Update` of all steps of a run. A step into t = 0 draws no noise, whatever b is."""
    raise NotImplementedError

  @property
  def turns(self) -> tuple[Rule, ...]:
    """The rules that take turns, step by step: this one alone."""
    return (self,)

  @classmethod
  def coerce(cls, config: Any) -> Any:
    """Rules joined by "+" take turns."""
    if isinstance(config, str) and len(each := parts.split(config, "+")) > 1:
      return Turns(tuple(parts.make(Rule, text) for text in each))
    return config

  def __str__(self) -> str:
    return parts.spell(self)


@dataclasses.dataclass(frozen=True)
class Naive(Rule, name="naive"):
  """Algorithm 1: corrupt the prediction again, with fresh noise.

  Attributes:
    size: of the fresh noise, in σ_s; 1 is P's. IHDM (Rissanen et al. 2022) draws 1.25 times the
      noise that it is trained with.
  """

  size: NotNegative = 1.0

  def coefficients(self, step: Step) -> Update:
    return Update(0.0, self.size * step.sigma_s)


@dataclasses.dataclass(frozen=True)
class Momentum(Rule, name="momentum"):
  """Algorithm 2 (P Eq. 17): Euler-Maruyama on the reverse SDE."""

  def coefficients(self, step: Step) -> Update:
    return Update(step.ratio**2, np.sqrt(step.sigma_t**2 - step.sigma_s**2))


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow(Rule, name="probability_flow"):
  """P Eq. 51: Euler on the probability-flow ODE."""

  def coefficients(self, step: Step) -> Update:
    return Update(0.5 * (1.0 + step.ratio**2), 0.0)


def _ddim(step: Step, k: float | Array) -> Update:
  k = np.minimum(k, step.sigma_s)
  return Update(step.over(np.sqrt(step.sigma_s**2 - k**2)), k)


@dataclasses.dataclass(frozen=True)
class DDIM(Rule, name="ddim"):
  """P Eq. 52: keep the estimated noise, exchange a part of size k for fresh noise.

  With k = 0 and without noise (σ = 0) it is Algorithm 2 of Cold Diffusion (Bansal et al. 2022).

  Attributes:
    k: the fresh noise of a step, at the most σ_s.
  """

  k: NotNegative = 0.0

  def coefficients(self, step: Step) -> Update:
    return _ddim(step, self.k)


@dataclasses.dataclass(frozen=True)
class Ancestral(Rule, name="ancestral"):
  """DDIM with the k that makes the step a draw from q(x_s | x_t, x_0 = x̂_0).

  The chain is that of DDPM, x_t = C_t C_s⁻¹ x_s + noise. For C = α I (VP, α = 1: VE) the step is
  Song et al. 2021a, Eq. 12 with their η = 1: k² = σ_s² (1 − ρ_s²/ρ_t²) with ρ = σ/α. Where C has
  a basis of its own (`Corruption.spectrum`) α and k are one number for each frequency, as
  Hoogeboom and Salimans (2022) have it. For other corruptions the noise alone counts (α = 1), so
  no noise is exchanged where σ stands still.
  """

  def coefficients(self, step: Step) -> Update:
    ratio = step.ratio
    if isinstance(step.diffusion.corruption, Scale):
      ratio = ratio * step.level_t / step.level_s
    update = _ddim(step, step.sigma_s * np.sqrt(1.0 - np.minimum(ratio, 1.0) ** 2))
    return update._replace(filtered=_spectrum(step.diffusion) is not None)


@dataclasses.dataclass(frozen=True)
class Langevin(Rule, name="langevin"):
  """The predictor-corrector of Song et al. 2021: after each step one of Langevin's at its end.

  The predictor is "momentum" (their reverse diffusion), or "ancestral" for C = α I (VP). The
  corrector is x + ε s + √(2ε) z with s the score and ε = 2 (snr ‖z‖/‖s‖)². They take the norms of
  the batch at hand; here both are what they are on average, ‖s‖ = ‖z‖/σ, so that an image does not
  depend on its neighbours: ε = 2 (snr σ)². Their VP scales ε by 1 − β/1000, which is left out.

  Attributes:
    snr: their signal-to-noise ratio, by default that of their CIFAR-10 models. 0 leaves the
      predictor, evaluated twice a step.
  """

  evaluations: ClassVar[int] = 2

  snr: Annotated[float, Range(0, 0.5)] = 0.16

  def coefficients(self, step: Step) -> Update:
    scaled = isinstance(step.diffusion.corruption, Scale)
    update = (Ancestral() if scaled else Momentum()).coefficients(step)
    # x + ε s = C x̂_0 + (1 − ε/σ²) r.
    kept = np.where(step.sigma_s > 0, 1.0 - 2.0 * self.snr**2, 1.0)  # no noise: ε = 0
    return update._replace(stay=(kept, 2.0 * self.snr * step.sigma_s))


def _half_of_the_step_before(step: Step) -> Array:
  """γ = ½ h/h_before: x̂_0 at the middle of a step, extrapolated from the step before."""
  length = step.t - step.s
  return np.concatenate([[0.0], 0.5 * length[1:] / length[:-1]])


@dataclasses.dataclass(frozen=True)
class TwoStep(Rule, name="two_step"):
  """DDIM with x̂_0 extrapolated to the middle of the step, which makes it second order.

  The flow's exact step with x̂_0 held fixed is DDIM's; taking x̂_0 at the middle of the step by
  extrapolation from the step before removes the error's leading term (Adams-Bashforth in x̂_0).
  """

  def coefficients(self, step: Step) -> Update:
    return _ddim(step, 0.0)._replace(gamma=_half_of_the_step_before(step))


@dataclasses.dataclass(frozen=True)
class StochasticTwoStep(Rule, name="stochastic_two_step"):
  """Two-step that exchanges noise at a steady rate.

  Attributes:
    noise: a step of length h keeps the share exp(−noise·h) of the noise that it finds and draws
      the rest afresh; 0 is "two_step".
  """

  noise: NotNegative = 1.0

  def coefficients(self, step: Step) -> Update:
    kept = np.exp(-self.noise * (step.t - step.s))
    a, b = step.over(kept * step.sigma_s), step.sigma_s * np.sqrt(1.0 - kept**2)
    return Update(a, b, _half_of_the_step_before(step))


@dataclasses.dataclass(frozen=True)
class Heun(Rule, name="heun"):
  """DDIM's step, taken again with the mean of both ends' x̂_0.

  The trapezoidal rule where two-step extrapolates: second order, two evaluations a step.
  """

  evaluations: ClassVar[int] = 2

  def coefficients(self, step: Step) -> Update:
    return _ddim(step, 0.0)._replace(corrector=-0.5)


@dataclasses.dataclass(frozen=True)
class Turns(Rule, name="turns"):
  """Rules that take turns step by step: a predictor and a corrector (P F.3), "ddim+momentum"."""

  rules: tuple[Rule, ...] = ()

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.rules or any(rule.adaptive for rule in self.rules):
      raise ValueError(f"rules that have a plan can take turns, not {self}")

  @property
  def turns(self) -> tuple[Rule, ...]:
    return tuple(inner for rule in self.rules for inner in rule.turns)

  def coefficients(self, step: Step) -> Update:
    raise TypeError("a plan asks each of the rules that take turns")

  def __str__(self) -> str:
    return "+".join(map(str, self.rules))


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Rule, name="predictor_corrector"):
  """P's pair "ddim+probability_flow"."""

  @property
  def turns(self) -> tuple[Rule, ...]:
    return (DDIM(), ProbabilityFlow())


@dataclasses.dataclass(frozen=True)
class DormandPrince(Rule, name="dormand_prince"):
  """The probability flow with steps that keep an error: `Sampler.adaptive`.

  Attributes:
    tolerance: the relative and the absolute error of a step.
  """

  adaptive: ClassVar[bool] = True

  tolerance: Positive = 1e-4


del Rule._members["turns"]  # a config joins names by "+"
SAMPLERS = tuple(name for name, rule in parts.members(Rule).items() if not rule.adaptive)  # type: ignore[attr-defined]


def rule_of(value: Any) -> Rule:
  """The rule that a name, a text with fields, or several joined by "+" stand for.

  A function (σ_t, σ_s) → (a, b), as version 0.1 took, still works, with a DeprecationWarning.

  Raises:
    ValueError: an unknown name, with the nearest known one.
  """
  if callable(value) and not isinstance(value, Rule):
    warnings.warn(
      "a function (σ_t, σ_s) → (a, b) as sampler is deprecated; derive a class from samplers.Rule",
      DeprecationWarning, stacklevel=3,
    )  # fmt: skip
    return _Function(value)
  if isinstance(value, Sequence) and not isinstance(value, str):
    return Turns(tuple(map(rule_of, value)))
  return parts.make(Rule, value)


def with_fields(rule: Any, values: Mapping[str, Any], strict: bool = False) -> Rule:
  """A rule with other values for its fields, in those that take turns too.

  Args:
    strict: a ValueError of a value that no rule reads; else it is passed over, as in the configs of
      version 0.1, which had all of them for every sampler.
  """
  rule = rule_of(rule)
  read: set[str] = set()
  turns = []
  for turn in rule.turns:
    mine = {f.name for f in dataclasses.fields(turn)} & values.keys()  # type: ignore[arg-type]
    read |= mine
    turns.append(dataclasses.replace(turn, **{k: values[k] for k in mine}) if mine else turn)  # type: ignore[type-var]
  for name in sorted(values.keys() - read) if strict else ():
    raise ValueError(f"{name} = {values[name]} is not read by the sampler {rule}, so leave it out")
  if not read:
    return rule
  return turns[0] if len(turns) == 1 else Turns(tuple(turns))


@dataclasses.dataclass(frozen=True)
class _Function(Rule):
  function: Callable[[Array, Array], tuple[Array, Array]]

  def coefficients(self, step: Step) -> Update:
    return Update(*self.function(step.sigma_t, step.sigma_s))


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
  parts.check_choice("the time grid", kind, GRIDS)
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
  the noise is small beside the data (`transport`), an upper bound of W₂ always. `relative` divides
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


# --- Plans --------------------------------------------------------------------------------------


def plan(rule: Any, times: Sequence[float] | Array, diffusion: Diffusion, *,
         denoise: bool = True) -> tf.Tensor:  # fmt: skip
  """The rows (t, s, a, b, γ, kind) of a sampler, float32 [N, 6]; N is the number of evaluations.

  Args:
    rule: a `Rule`, or what `rule_of` takes: "ddim", "ddim(k=0.1)", "ddim+momentum", a sequence.
    times: from the start down to 0 (or to an earlier stop).
    denoise: the last step returns x̂_0 itself, so no noise of size σ_0 stays in the image. False
      keeps the rule's a. Either way the step into t = 0 adds no fresh noise.

  Raises:
    ValueError: times that do not descend in [0, 1], σ that rises in a reverse step, unknown rule,
      coefficients that are not finite.
  """
  rule = rule_of(rule)
  if rule.adaptive:
    raise ValueError(f"{rule} chooses its own steps and has no plan; use Sampler.adaptive")
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"times must be at least two numbers, got {times.tolist()}")
  if not (np.all(np.diff(times) < 0) and times[0] <= 1 and times[-1] >= 0):
    raise ValueError(
      f"times must descend within [0, 1], got {times[0]:g} … {times[-1]:g}; are they ascending?"
    )
  t, s = times[:-1], times[1:]
  sigma, level = _at(diffusion.sigma, times), _at(diffusion.level, times)
  sigma_t, sigma_s = sigma[:-1], sigma[1:]
  if np.any(sigma_s > sigma_t * (1 + 1e-6)):
    place = int(np.argmax(sigma_s > sigma_t * (1 + 1e-6)))
    raise ValueError(
      f"the reverse step from t = {t[place]:g} raises the noise from {sigma_t[place]:g} to "
      f"{sigma_s[place]:g}; the noise schedule must not fall with t"
    )
  step = Step(t, s, sigma_t, np.minimum(sigma_s, sigma_t), level[:-1], level[1:], diffusion)
  turns = rule.turns
  updates = []
  for each in turns:
    update = each.coefficients(step)
    if (update.corrector is not None) + (update.stay is not None) != each.evaluations - 1:
      raise ValueError(f"{each}: a rule with a corrector, and no other, has evaluations = 2")
    if update.filtered and (_spectrum(diffusion) is None or update.corrector is not None):
      raise ValueError(
        f"{each}: filtered steps need a corruption with a spectrum, unlike "
        f"{type(diffusion.corruption).__name__}, and no corrector"
      )
    columns = [np.broadcast_to(v, t.shape) for v in (update.a, update.b, update.gamma)]
    stay = update.stay and [np.broadcast_to(v, t.shape) for v in update.stay]
    kind = FILTERED if update.filtered else 0.0
    updates.append((*columns, kind, update.corrector, stay))
  rows = []
  for n in range(len(t)):
    *columns, kind, corrector, stay = updates[n % len(turns)]
    a, b, gamma = (column[n] for column in columns)
    final = s[n] == 0
    if final:
      b = 0.0
      if denoise:
        a = gamma = 0.0
    rows.append((t[n], s[n], a, b, gamma, kind))
    if corrector is not None and not final:
      rows.append((t[n], s[n], a, b, corrector, CORRECTOR))
    if stay is not None and not final:
      rows.append((s[n], s[n], stay[0][n], stay[1][n], 0.0, 0.0))
  with np.errstate(over="ignore"):
    content = np.array(rows, np.float32)
  if not (finite := np.isfinite(content).all(axis=1)).all():  # a rule's, or beyond float32
    worst = rows[int(np.argmin(finite))]
    raise ValueError(
      f"the step from t = {worst[0]:g} to {worst[1]:g} has a = {worst[2]:g} and b = {worst[3]:g}, "
      f"which are not finite numbers of float32; correct the sampler {rule}"
    )
  return tf.constant(content)


def table(rule: Any, times: Sequence[float] | Array, diffusion: Diffusion, *, k: float = 0.0,
          noise: float = 1.0, denoise: bool = True) -> tf.Tensor:  # fmt: skip
  """Deprecated: `plan`, as version 0.1 named it. `k` and `noise` are fields of the rules now."""
  warnings.warn("samplers.table is deprecated; use samplers.plan", DeprecationWarning, stacklevel=2)
  return plan(with_fields(rule, {"k": k, "noise": noise}), times, diffusion, denoise=denoise)


def steps_for(rule: Any, nfe: int) -> int:
  """The largest number of steps into t = 0 that take at most `nfe` evaluations of the denoiser.

  "heun" and "langevin" take two a step and one on the last; every other sampler of this package one
  a step.
  """
  if nfe < 1:
    raise ValueError(f"sampling takes at least 1 evaluation of the denoiser, got nfe = {nfe}")
  each = [turn.evaluations for turn in rule_of(rule).turns]
  whole, left = divmod(nfe - 1, sum(each))
  steps = whole * len(each)
  for count in each:
    left -= count
    if left < 0:
      break
    steps += 1
  return steps + 1


def evaluations(rule: Any, steps: int) -> int:
  """How many evaluations of the denoiser that many steps into t = 0 take: the rows of `plan`."""
  each = [turn.evaluations for turn in rule_of(rule).turns]
  # The last step takes one, whatever the rule.
  return sum(each[n % len(each)] for n in range(steps - 1)) + 1


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
  """Runs a plan from x at its first t; image i's noise depends on seeds[i] and the row alone.

  One `tf.while_loop`: memory does not grow with the number of rows, and neither their number nor
  the sampler is part of the graph.

  Args:
    rows: a plan [N, 6]. No step starts at t = 0, so rows with t = 0 at its end are filling.
    seeds: int64 [B].
    x: x_t at the first row's t, float32 [B, H, W, C].
    x0_previous: x̂_0 of the row before, for plans whose first γ is not 0.
    first_row: int, the number of the first row in the whole run: the salt of its noise.
    before: x where the first row's step started, for plans that begin with a corrector.

  Returns:
    The `State` after the last row: its x is x at the last row's s.
  """
  rows = tf.cast(rows, tf.float32)
  seeds = tf.cast(seeds, tf.int64)
  image = [None, *diffusion.image_shape]
  x = tf.ensure_shape(tf.cast(x, tf.float32), image)
  first = State(x, *(tf.zeros_like(x) if v is None else tf.ensure_shape(v, image)
                     for v in (x0_previous, before)))  # fmt: skip

  own = _spectrum(diffusion)

  def step(n: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
    t, s, a, b, gamma, kind = tf.unstack(rows[n])
    corrects = kind == CORRECTOR
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
      x_s = tf.cond(kind == FILTERED, functools.partial(filtered, own), scalar)
    after = State(x_s, x0_hat, start)
    return n + 1, State(*(tf.ensure_shape(new, x.shape) for new in after))

  count = tf.reduce_sum(tf.cast(rows[:, 0] > 0, tf.int32))
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
    rows = plan("momentum", time_grid(100), diffusion)
    images = sampler(rows, seeds=range(16))  # float32 [16, H, W, C]

  Args:
    jit_compile: by XLA, which compiles once per batch size, not once per plan.
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
          f"the plan starts at t = {float(rows[0, 0]):g}, and the prior is that of t = 1; "
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
    following = np.append(np.asarray(rows)[1:, 5], 0.0)
    ends = np.flatnonzero(following != CORRECTOR) + 1
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
