"""The rules of the samplers: what each gives for a step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from soft_diffusion_tf import parts
from soft_diffusion_tf.corruptions import Identity, Scale, Spectrum
from soft_diffusion_tf.diffusion import Diffusion
from soft_diffusion_tf.parts import NotNegative, Positive, Range

Array = np.ndarray
COLUMNS = 6  # t, s, a, b, γ, kind
CORRECTOR, FILTERED = 1.0, -1.0  # kinds of rows


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


def spectrum_of(diffusion: Diffusion) -> Spectrum | None:
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
    return update._replace(filtered=spectrum_of(step.diffusion) is not None)


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
      raise ValueError(
        f"{self}: rules that are joined by '+' take turns; give at least one, and only such with "
        "fixed steps, which dormand_prince has not"
      )

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
      DeprecationWarning,
      stacklevel=3,
    )
    return _Function(value)
  if isinstance(value, Sequence) and not isinstance(value, str):
    return Turns(tuple(map(rule_of, value)))
  return parts.make(Rule, value)


def fields_of(rule: Rule) -> set[str]:
  """The names of all fields that a rule of the package has, or one of those in this rule."""
  kinds = [*parts.members(Rule).values(), *map(type, rule.turns)]
  return {field.name for kind in kinds for field in dataclasses.fields(kind)}


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
