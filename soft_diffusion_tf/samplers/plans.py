"""Time grids, and the plan of a sampler: a row of coefficients for each evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import parts
from soft_diffusion_tf.diffusion import Diffusion
from soft_diffusion_tf.samplers.rules import (
  CORRECTOR,
  FILTERED,
  Array,
  Step,
  rule_of,
  spectrum_of,
  with_fields,
)

GRIDS = ("uniform", "quadratic", "level", "transport", "relative")
_FINE = 256  # cells in which a grid measures a schedule's length


def time_grid(
  steps: int,
  kind: str = "uniform",
  diffusion: Diffusion | None = None,
  start: float = 1.0,
  images: Any = None,
) -> Array:
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


def plan(
  rule: Any, times: Sequence[float] | Array, diffusion: Diffusion, *, denoise: bool = True
) -> tf.Tensor:
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
    extra = (update.corrector is not None) + (update.stay is not None)
    if extra != each.evaluations - 1:
      raise ValueError(
        f"{each}: evaluations = {each.evaluations}, and its Update has {extra} beside the first (a "
        f"corrector, or stay); set the rule's evaluations to {extra + 1}"
      )
    if update.filtered and spectrum_of(diffusion) is None:
      raise ValueError(
        f"{each}: filtered steps need a corruption with a spectrum, unlike "
        f"{type(diffusion.corruption).__name__}; take another corruption or sampler"
      )
    if update.filtered and update.corrector is not None:
      raise ValueError(f"{each}: a filtered step has no corrector; leave one of them out")
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


def table(
  rule: Any,
  times: Sequence[float] | Array,
  diffusion: Diffusion,
  *,
  k: float = 0.0,
  noise: float = 1.0,
  denoise: bool = True,
) -> tf.Tensor:
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
