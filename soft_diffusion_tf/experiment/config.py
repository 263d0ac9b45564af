"""The experiment: all of a run's parts and fields, to and from text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import reprlib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import keras
import ml_collections
import numpy as np

import soft_diffusion_tf
from soft_diffusion_tf import (
  corruptions,
  data,
  diffusion,
  files,
  losses,
  parts,
  priors,
  schedules,
  shipped,
  trust,
)
from soft_diffusion_tf.experiment.groups import Data, Evaluation, Group, Sampling, Training
from soft_diffusion_tf.experiment.versions import OF_LOSS, OF_RULES, attending_by_width, of_now
from soft_diffusion_tf.networks import Architecture, Network
from soft_diffusion_tf.parts import (
  Range,
  UnknownField,
)

CONFIG_FILE = "config.json"
INCIDENTAL = (  # fields, by how their names begin, that do not change the weights at a step
  "name",
  "training.steps",
  "training.steps_per_loop",
  "training.log_every",
  "training.keep",
  "training.checkpoint_every",
  "training.keep_every",
  "training.sample_every",
  "training.average_every",
  "data.data_dir",
  "training.accumulate",
  "data.test_split",
  "data.in_memory",
  "sampling.",
  "evaluation.",
)
# Fields that came later, with the values by which an experiment is what it was before.
LATER = {
  "data.transparency": "white",
  "data.small": "leave_out",
  "data.skip_bad": 0.0,
  "data.balanced": False,
  "data.augment": [],
  "training.ema_warmup": False,
  "training.averages": [],
  "network.augment_dim": 0,
}


@dataclasses.dataclass(frozen=True)
class Experiment(parts.Checked):
  """A run. `level` and `sigma` are the schedules of the corruption's level and of the noise."""

  corruption: corruptions.Corruption = corruptions.GaussianBlur()  # noqa: RUF009
  level: schedules.Schedule = schedules.Constant(0.0)  # noqa: RUF009
  sigma: schedules.Schedule = schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2)  # noqa: RUF009
  name: str = "unnamed"
  seed: Annotated[int, Range(0, 2**63 - 1)] = 0
  data: Data = Data()  # noqa: RUF009
  prior: priors.Estimator = priors.Subspace()  # noqa: RUF009
  network: Architecture = Network()  # noqa: RUF009
  loss: losses.Loss = losses.SoftScoreMatching()  # noqa: RUF009
  training: Training = Training()  # noqa: RUF009
  sampling: Sampling = Sampling()  # noqa: RUF009
  evaluation: Evaluation = Evaluation()  # noqa: RUF009

  _PARTS: ClassVar = {
    "corruption": corruptions.Corruption,
    "level": schedules.Schedule,
    "sigma": schedules.Schedule,
    "prior": priors.Estimator,
    "network": Architecture,
    "loss": losses.Loss,
  }

  def __post_init__(self) -> None:
    super().__post_init__()
    if of_loss := self.training._of_loss:  # type: ignore[attr-defined]
      mine = self.loss if isinstance(self.loss, losses.SoftScoreMatching) else None
      loss = dataclasses.replace(mine or losses.SoftScoreMatching(), **of_loss)
      object.__setattr__(self, "loss", loss)
      object.__setattr__(self, "training", dataclasses.replace(self.training))
    kind = type(self.corruption).__name__
    if self.network.prediction == "score" and not isinstance(self.corruption, corruptions.Identity):
      raise ValueError(
        f"network.prediction = 'score' needs the corruption Identity, not {kind}; use 'residual'"
      )
    if self.network.prediction == "noise":
      own, last = self.corruption.spectrum(self.data.image_shape), schedules.ends(self.level)[1]
      if own is None or not np.min(own.gains(last)) > 0:
        raise ValueError(
          f"network.prediction = 'noise' divides by C, and {kind} at level {last:g} has no known "
          "inverse: take Scale, HeatDissipation with a floor, a Compose of both, or 'residual'"
        )
    told, size = getattr(self.network, "augment_dim", 0), data.label_size(self.data.augment)
    if told not in (0, size):
      raise ValueError(
        f"network.augment_dim = {told}, and the augmentation tells {size} numbers of an image; set "
        f"network.augment_dim to {size}, or to 0 not to tell the network"
      )
    if schedules.is_found(self.sigma):
      self.network.check_sigma(self.sigma)
      self.loss.check_sigma(self.sigma, self.training.t_min)

  # --- Parts --------------------------------------------------------------------------------------

  def build_diffusion(self) -> diffusion.Diffusion:
    """The forward process, without a prior."""
    return diffusion.Diffusion(self.data.image_shape, self.corruption, self.level, self.sigma)

  def weight_range(self) -> tuple[float, float]:
    """The least and the largest weight over t of an error in the network's own numbers.

    That is w(t) of a residual; of a score or a noise, which x̂_0 takes times σ² or σ, w(t) σ⁴ or
    w(t) σ²: 1 at all t for 1/σ², where a score is divided by σ already. (1, 1) of other losses.
    To six digits.
    """
    if not isinstance(self.loss, losses.SoftScoreMatching | losses.Mixture):
      return 1.0, 1.0
    times = np.linspace(self.training.t_min, 1.0, 1001, dtype=np.float32)
    sigma = self.sigma(times)
    power = {"residual": 0, "score": 2, "noise": 1}[self.network.prediction]
    power -= bool(getattr(self.network, "scale_by_sigma", False))
    weights = np.asarray(self.loss.weight(times, sigma), np.float64)
    weights *= np.asarray(sigma, np.float64) ** (2 * power)
    low, high = (float(f"{v:.6g}") for v in (weights.min(), weights.max()))
    return low, high

  def check_network(self) -> None:
    """Raises the ValueError of options that make no network, without making its weights."""
    self.network.check(self.data.image_shape)

  def build_network(self) -> keras.Model:
    """A fresh network; its weights are a function of `seed` alone."""
    return self.network.build(self.data.image_shape, self.seed)

  def network_shapes(self) -> list[tuple[int, ...]]:
    """The shapes of the network's variables, without making them."""
    return self.network.shapes(self.data.image_shape)

  # --- Configs ------------------------------------------------------------------------------------

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {
      name: value.to_dict() if isinstance(value, Group) else parts.plain(value)
      for name, value in fields.items()
    }

  def code(self) -> set[str]:
    """The names "module:name" of the code of its parts (see `parts.code_of`)."""
    named = [self.sampling.sampler, self.data.name, *self.evaluation.metrics]
    texts = [str(part) for part in named if isinstance(part, parts.Part)]
    if self.prior.makes is not priors.Prior:
      texts.append(priors.class_name(self.prior.makes))
    return parts.code_of([getattr(self, name).get_config() for name in self._PARTS] + texts)

  def to_config(self) -> ml_collections.ConfigDict:
    """For a config file's `get_config`: fields keep their types under flag overrides."""
    config = ml_collections.ConfigDict(self.to_dict(), convert_dict=True)
    for group, names in (("training", OF_LOSS), ("sampling", OF_RULES)):  # flags of version 0.1
      for name in names:
        kind = str if name == "weight" else bool if name == "filtered" else float
        config[group][name] = ml_collections.config_dict.placeholder(kind)
    return config

  @classmethod
  def from_config(cls, config: Mapping[str, Any], trust_code: bool = False) -> Experiment:
    """The experiment of a config (or of `to_dict`'s values).

    Args:
      trust_code: import code that the config names (see `trust`): yes for a config file, which is
        a program itself.

    Raises:
      trust.UntrustedCode: it names code, and nobody has consented to run it.
      ValueError: names an unknown field with the nearest valid one, or a value of the wrong type.
    """
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
      raise ValueError(f"a config is an object of fields, not {reprlib.repr(config)}")
    content = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    version = content.pop("version", "")  # of the program that wrote it
    content = of_now(content)
    if str(version).startswith("0.1."):
      content = attending_by_width(content)
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    with trust.trust_code(trust_code):
      for name, value in content.items():
        parts.check_known("", name, fields)
        if name in cls._PARTS:
          value = _part(cls._PARTS[name], name, value)
        elif dataclasses.is_dataclass(hints[name]):
          value = hints[name](**parts.check_fields(hints[name], value, name + "."))
        made[name] = value
    return cls(**made)

  def replace(self, **changes: Any) -> Experiment:
    """A copy with other parts; a dictionary changes only the named fields of a group:
    `replace(name="x", training={"steps": 10})`.
    """
    for name, value in changes.items():
      if isinstance(value, dict) and "kind" in value:
        changes[name] = parts.make(self._PARTS[name], value, name)
      elif isinstance(value, dict):
        group = getattr(self, name)
        old = OF_LOSS if name == "training" else OF_RULES if name == "sampling" else ()
        for field in value.keys() - set(old):
          parts.check_known(name + ".", field, {f.name for f in dataclasses.fields(group)})
        changes[name] = dataclasses.replace(group, **value)
    return dataclasses.replace(self, **changes)

  def save(self, workdir: str | pathlib.Path) -> None:
    """Writes config.json into a workdir."""
    content = {"version": soft_diffusion_tf.__version__, **self.to_dict()}
    files.write_json(pathlib.Path(workdir) / CONFIG_FILE, content)

  @classmethod
  def load(cls, workdir: str | pathlib.Path, trust_code: bool = False) -> Experiment:
    """The experiment of a workdir; a ValueError when there is none. See `from_config`."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
      raise ValueError(f"{workdir}: no {CONFIG_FILE} in it; is it the workdir of a training run?")
    try:
      content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also of other bytes
      raise ValueError(
        f"{path}: not JSON ({error}); restore it or train in a new workdir"
      ) from None
    try:
      stated = {"version": "0.1.0", **content} if isinstance(content, dict) else content
      return cls.from_config(stated, trust_code)  # 0.1.0 itself wrote no version
    except UnknownField as error:
      own = soft_diffusion_tf.__version__
      raise ValueError(
        f"{path}: {error}; it is of version {content.get('version', 'unknown')}, and this is "
        f"{own}: upgrade soft-diffusion-tf if it is of a newer one, else correct the file"
      ) from None
    except (ValueError, RecursionError) as error:
      kind = type(error) if isinstance(error, trust.UntrustedCode) else ValueError
      version = content.get("version") if isinstance(content, dict) else None
      own = soft_diffusion_tf.__version__
      remedy = (
        f"; it is of version {version}, and this is {own}, which may refuse more: use that one "
        "for this folder, or train anew"
        if isinstance(version, str) and version != own
        else ""
      )
      raise kind(f"{path}: {' '.join(str(error).split())}{remedy}") from error

  def flat(self) -> dict[str, Any]:
    """Every field by its dotted name, as plain values."""
    return _flatten(self.to_dict())

  def digest(self) -> str:
    """Twelve hexadecimal digits that name this experiment."""
    return digest_of(self.to_dict())

  def identity(self) -> str:
    """Like `digest`, of what decides the weights at a step alone."""
    new = lambda k, v: k in LATER and v == LATER[k]
    fields = self.flat().items()
    return digest_of({k: v for k, v in fields if not k.startswith(INCIDENTAL) and not new(k, v)})

  def differences(self, other: Experiment) -> list[str]:
    """Dotted names of the fields in which two experiments differ."""
    one, two = self.flat(), other.flat()
    return sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))


def from_file(path: str | pathlib.Path) -> Experiment:
  """The experiment of a config file, so that another config can be a few changes to it.

  Args:
    path: a file, or the name of a config that comes with the package ("digits_blur").
  """
  path = shipped.config(path)
  namespace: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
  source = pathlib.Path(path).read_text(encoding="utf-8")
  exec(compile(source, str(path), "exec"), namespace)
  return Experiment.from_config(namespace["get_config"](), trust_code=True)


def level_from_file(
  path: str | pathlib.Path, corruption: corruptions.Corruption, start: float, stop: float
) -> schedules.Schedule:
  """The level schedule of a file, which must be of the same corruption and run from start to stop.

  Without the file the levels are `schedules.Unfound`: enough to find them, an error to train with.
  """
  if not pathlib.Path(path).exists():
    return schedules.Unfound(start, stop, str(path))
  content = schedules.load_levels(path)
  remedy = "find a schedule for this one with soft-diffusion-schedule"
  found = _plain(content["corruption"])
  want = _plain(corruption.get_config())
  if found != want:
    raise ValueError(f"{path} is for {found}, but the experiment corrupts by {want}; {remedy}")
  levels = content["levels"]
  if abs(levels[0] - start) > 1e-6 or abs(levels[-1] - stop) > 1e-6:
    raise ValueError(
      f"{path} runs from {levels[0]:g} to {levels[-1]:g}, not from {start:g} to {stop:g}; {remedy}"
    )
  return schedules.piecewise(levels, content.get("times"))


def _plain(value: Any) -> Any:
  return json.loads(json.dumps(value))


def digest_of(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = _plain(value)
  return flat


def _part(base: Any, name: str, value: Any) -> Any:
  """The part of an experiment's field, which errors name."""
  try:
    return parts.make(base, value, name)
  except ValueError as error:
    said = str(error)
    group = getattr(base, "_group", "")
    if isinstance(error, trust.UntrustedCode) or said.startswith((name, group or name)):
      raise
    raise type(error)(f"{name}: {error}") from None
