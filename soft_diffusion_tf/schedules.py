"""Schedules: functions of time t in [0, 1] that give a corruption level or a noise σ.

Each is a part (see `parts`): a frozen dataclass, callable on a tensor of any shape and returning
float32 of that shape.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import files, parts

__all__ = [
  "Constant",
  "CosineScale",
  "CosineSigma",
  "Geometric",
  "Linear",
  "PiecewiseLinear",
  "Scaled",
  "SineSquared",
  "Staged",
  "SubVPSigma",
  "Unfound",
  "VPScale",
  "VPSigma",
]


class Schedule(parts.Part, role="schedule"):
  """t → number. Subclasses implement `value` on float32 tensors."""

  def __call__(self, t: Any) -> tf.Tensor:
    return self.value(tf.cast(t, tf.float32))

  def value(self, t: tf.Tensor) -> tf.Tensor:
    raise NotImplementedError

  @classmethod
  def coerce(cls, config: Any) -> Any:
    """A lone number means Constant."""
    number = isinstance(config, int | float) and not isinstance(config, bool)
    return Constant(config) if number else config


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
  """The same number at every t."""

  number: float

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return tf.fill(tf.shape(t), tf.constant(self.number, tf.float32))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """start at t = 0, stop at t = 1, a straight line between."""

  start: float
  stop: float

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return self.start * (1.0 - t) + self.stop * t


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
  """start^(1−t) · stop^t: the VE schedule of Song et al. 2021, and P's for the noise."""

  start: float
  stop: float

  def __post_init__(self) -> None:
    super().__post_init__()
    if not (self.start > 0 and self.stop > 0):
      raise ValueError(
        f"a geometric schedule needs two positive ends, got {self.start} and {self.stop}; "
        "use Linear to start at 0"
      )

  def value(self, t: tf.Tensor) -> tf.Tensor:
    log_start, log_stop = np.log(self.start), np.log(self.stop)
    return tf.exp(log_start + (log_stop - log_start) * t)


@dataclasses.dataclass(frozen=True)
class PiecewiseLinear(Schedule):
  """Linear interpolation through `values` at `times` (evenly spaced when none are given).

  P App. C extends the levels found by the shortest path to continuous time this way.
  """

  values: tuple[float, ...]
  times: tuple[float, ...] | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    values = self.values
    times = self.times
    times = tuple(np.linspace(0, 1, len(values)).tolist()) if times is None else tuple(times)
    if len(values) < 2 or len(times) != len(values):
      raise ValueError(
        f"a piecewise linear schedule needs at least 2 values and as many times, "
        f"got {len(values)} and {len(times)}"
      )
    if times[0] != 0 or times[-1] != 1 or np.any(np.diff(times) <= 0):
      raise ValueError(
        f"times must rise strictly from 0 to 1, got {times[0]} … {times[-1]}; sort them"
      )
    object.__setattr__(self, "values", values)
    object.__setattr__(self, "times", times)

  def value(self, t: tf.Tensor) -> tf.Tensor:
    times = tf.constant(self.times, tf.float32)
    values = tf.constant(self.values, tf.float32)
    flat = tf.reshape(t, [-1])
    left = tf.searchsorted(times, flat, side="right") - 1
    left = tf.clip_by_value(left, 0, len(self.values) - 2)
    t_0, t_1 = tf.gather(times, left), tf.gather(times, left + 1)
    w = tf.clip_by_value((flat - t_0) / (t_1 - t_0), 0.0, 1.0)
    result = (1.0 - w) * tf.gather(values, left) + w * tf.gather(values, left + 1)
    return tf.reshape(result, tf.shape(t))


@dataclasses.dataclass(frozen=True)
class Staged(Schedule):
  """`inner` run over [begin, end] instead of [0, 1], held at its ends outside.

  P's blur diffusion is two of these: noise rises over [0, 0.2], blur over [0.2, 1].
  """

  inner: Schedule
  begin: float
  end: float

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.begin < self.end <= 1:
      raise ValueError(
        f"a stage must lie in [0, 1] and have begin < end, got [{self.begin}, {self.end}]"
      )

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return self.inner(tf.clip_by_value((t - self.begin) / (self.end - self.begin), 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Scaled(Schedule):
  """factor · inner."""

  inner: Schedule
  factor: float

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return self.factor * self.inner(t)


def _beta_integral(t: tf.Tensor, beta_min: float, beta_max: float) -> tf.Tensor:
  """∫₀ᵗ β with β linear from beta_min to beta_max (Song et al. 2021, App. C)."""
  return beta_min * t + 0.5 * (beta_max - beta_min) * t * t


@dataclasses.dataclass(frozen=True)
class VPScale(Schedule):
  """α_t = exp(−½ ∫β), the scale of VP and sub-VP."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return tf.exp(-0.5 * _beta_integral(t, self.beta_min, self.beta_max))


@dataclasses.dataclass(frozen=True)
class VPSigma(Schedule):
  """σ_t with σ_t² = 1 − α_t² (VP)."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(-tf.math.expm1(-_beta_integral(t, self.beta_min, self.beta_max)))


@dataclasses.dataclass(frozen=True)
class SubVPSigma(Schedule):
  """σ_t = 1 − α_t² (sub-VP)."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return -tf.math.expm1(-_beta_integral(t, self.beta_min, self.beta_max))


@dataclasses.dataclass(frozen=True)
class _Cosine(Schedule):
  log_snr_min: float = -10.0
  log_snr_max: float = 10.0

  def angle(self, t: tf.Tensor) -> tf.Tensor:
    first, last = (np.arctan(np.exp(-0.5 * v)) for v in (self.log_snr_max, self.log_snr_min))
    return first * (1.0 - t) + last * t


@dataclasses.dataclass(frozen=True)
class CosineScale(_Cosine):
  """α_t = cos θ_t of a VP process, whose angle θ rises evenly (Nichol and Dhariwal 2021).

  With σ_t = sin θ_t (`CosineSigma`) log(α²/σ²) = −2 log tan θ falls from `log_snr_max` to
  `log_snr_min`, as Hoogeboom and Salimans (2022) have it.
  """

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return tf.cos(self.angle(t))


@dataclasses.dataclass(frozen=True)
class CosineSigma(_Cosine):
  """σ_t = sin θ_t of a VP process, see `CosineScale`."""

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return tf.sin(self.angle(t))


@dataclasses.dataclass(frozen=True)
class SineSquared(Schedule):
  """stop · sin²(½ π t), from 0 to stop: slow at both ends (Hoogeboom and Salimans 2022)."""

  stop: float

  def value(self, t: tf.Tensor) -> tf.Tensor:
    return self.stop * tf.square(tf.sin(0.5 * np.pi * t))


@dataclasses.dataclass(frozen=True)
class Unfound(Schedule):
  """A schedule still to be found: only its ends are known. Asking it for a value is an error."""

  start: float
  stop: float
  path: str

  def value(self, t: tf.Tensor) -> tf.Tensor:
    raise ValueError(
      f"{self.path} is not there yet: the levels between {self.start:g} and {self.stop:g} depend "
      f"on the data; find them with soft-diffusion-schedule --config=CONFIG --out={self.path}"
    )


def ends(schedule: Schedule) -> tuple[float, float]:
  """The first and the last value of a schedule, also of one that is still to be found."""
  while isinstance(schedule, Staged):
    schedule = schedule.inner
  if isinstance(schedule, Unfound):
    return schedule.start, schedule.stop
  first, last = schedule([0.0, 1.0]).numpy()
  return float(first), float(last)


def is_found(schedule: Schedule) -> bool:
  """Whether a schedule has values: that it is no `Unfound`, nor a stage of one."""
  while isinstance(schedule, Staged | Scaled):
    schedule = schedule.inner
  return not isinstance(schedule, Unfound)


def from_config(config: Mapping[str, Any] | float, trust_code: Any = False) -> Schedule:
  """The schedule that `get_config` described; a lone number means Constant. See `parts.make`."""
  return parts.make(Schedule, config, trust_code=trust_code)


# --- Levels on disk -----------------------------------------------------------------------------

_REQUIRED = ("schema", "corruption", "levels")


def load_levels(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads and checks a schedule file, as `soft-diffusion-schedule` writes it.

  JSON, schema 1. Needed are `schema`, `corruption` (its config) and `levels` (from clean to most
  corrupted). Levels are evenly spaced in time unless `times` are given (rising from 0 to 1). A
  joint schedule has `sigmas`, the σ at each level, not falling. The rest is provenance:

  - where from: `data`, `split`, `crop`, `image_shape`, `slice`, `images` (their number), `seed`,
    `version` of the package;
  - how: `method`, `candidates` and `candidate_levels` (their kind and number), `noise`, `sigma`,
    `sinkhorn_epsilon`, `cut` (by the reduced basis), `closed_form_defects`;
  - what was found: `steps` (distance from each level to the next), `epsilon` (the longest edge
    allowed), `straight` (distance from first to last), `edges` (distances computed), `deviation`
    (relative, of the estimates of the others), `nearest` (feasible numbers of levels, when the
    wanted one was not), `sensitivity` (largest difference between the schedules of two halves of
    the images, in steps).

  Raises:
    ValueError: one line that names the file, what is wrong and the remedy.
  """
  path = pathlib.Path(path)
  remedy = "write it again with soft-diffusion-schedule"
  if not path.is_file():
    raise ValueError(f"{path}: no such schedule file; {remedy}")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
  missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
  if missing:
    raise ValueError(f"{path}: key {missing[0]!r} is missing; {remedy}")
  if content["schema"] != 1:
    raise ValueError(f"{path}: schema {content['schema']!r} is not 1; {remedy}")
  if not isinstance(content["corruption"], dict) or "kind" not in content["corruption"]:
    raise ValueError(f"{path}: corruption must be the config of one, with its kind; {remedy}")
  levels = content["levels"]
  if not _numbers(levels) or len(levels) < 2:
    raise ValueError(f"{path}: levels must be at least 2 finite numbers; {remedy}")
  steps = np.diff(levels)
  if not (np.all(steps >= 0) or np.all(steps <= 0)) or levels[0] == levels[-1]:
    place = int(np.argmax(steps * np.sign(levels[-1] - levels[0]) < 0))
    raise ValueError(
      f"{path}: levels are out of order at number {place + 2} "
      f"({levels[place]} is followed by {levels[place + 1]}); sort them from clean to corrupted"
    )
  for key, count in (("times", len(levels)), ("sigmas", len(levels)), ("steps", len(levels) - 1)):
    values = content.get(key)
    if values is not None and not (_numbers(values) and len(values) == count):
      raise ValueError(
        f"{path}: {key} must be {count} finite numbers beside {len(levels)} levels; {remedy}"
      )
  times, sigmas = content.get("times"), content.get("sigmas")
  if times is not None and (times[0] != 0 or times[-1] != 1 or np.any(np.diff(times) <= 0)):
    raise ValueError(f"{path}: times must rise strictly from 0 to 1; sort them with their levels")
  if sigmas is not None and (sigmas[0] < 0 or np.any(np.diff(sigmas) < 0)):
    raise ValueError(f"{path}: sigmas must not fall, nor be negative; {remedy}")
  return content


def _numbers(values: Any) -> bool:
  return (
    isinstance(values, list)
    and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    and bool(np.all(np.isfinite(values)))
  )


def save_levels(path: str | pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a schedule file whole or not at all."""
  with files.atomic(path) as partial:
    files.write_json(partial, {"schema": 1, **content})
    load_levels(partial)


def piecewise(levels: Sequence[float], times: Sequence[float] | None = None) -> PiecewiseLinear:
  """The continuous schedule through found levels (P App. C)."""
  return PiecewiseLinear(tuple(levels), None if times is None else tuple(times))


def joint(path: str | pathlib.Path) -> tuple[PiecewiseLinear, PiecewiseLinear]:
  """The level and σ of a joint schedule's file; a ValueError when it has no `sigmas`.

  The nodes of the file are the times of a sampler with a uniform grid of one step less.
  """
  content = load_levels(path)
  if "sigmas" not in content:
    raise ValueError(f"{path}: not a joint schedule; find one with soft-diffusion-schedule --joint")
  times = content.get("times")
  return piecewise(content["levels"], times), piecewise(content["sigmas"], times)
