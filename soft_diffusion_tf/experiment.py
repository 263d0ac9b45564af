"""An experiment: everything a run is made of, typed and frozen, and its passage through configs.

A config file's `get_config` returns `Experiment(...).to_config()`; flags override its fields;
`from_config` makes the experiment again and checks it; `save` and `load` carry it in a workdir.
The defaults are the paper's, but for the prior and the sampler, where better ones are measured
(docs/reproduction.md); the configs that are named after its experiments say what it took.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import reprlib
import typing
import warnings
from collections.abc import Callable, Mapping
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
  metrics,
  parts,
  priors,
  samplers,
  schedules,
  shipped,
  trust,
)
from soft_diffusion_tf.networks import Architecture, Network
from soft_diffusion_tf.parts import (
  Choice,
  Count,
  Every,
  Positive,
  Range,
  Share,
  Side,
  Steps,
  UnknownField,
)

CONFIG_FILE = "config.json"
INCIDENTAL = (  # fields, by how their names begin, that do not change the weights at a step
  "name", "training.steps", "training.steps_per_loop", "training.log_every", "training.keep",
  "training.checkpoint_every", "training.keep_every", "training.sample_every", "data.data_dir",
  "training.accumulate", "data.test_split", "data.in_memory", "sampling.", "evaluation.",
)  # fmt: skip


# Fields that came later, with the values by which an experiment is what it was before.
_LATER = {
  "data.transparency": "white", "data.small": "leave_out", "data.skip_bad": 0.0,
  "data.balanced": False, "data.augment": [], "network.augment_dim": 0,
}  # fmt: skip


# --- Groups of fields -----------------------------------------------------------------------------


class Group(parts.Checked):
  """Fields of an experiment that belong together. A part among them is a text in a config."""

  def to_dict(self) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    fields = dataclasses.fields(self)  # type: ignore[arg-type]
    return {field.name: _text(getattr(self, field.name)) for field in fields}


def _text(value: Any) -> Any:
  if isinstance(value, tuple):
    return tuple(map(_text, value))
  return str(value) if isinstance(value, parts.Part) else value


@dataclasses.dataclass(frozen=True)
class Data(Group):
  """A data set and its images (see `data.load`); `flip` mirrors training images at random.

  `name` is "digits", "folder:PATH", a TFDS name, or a `data.Reader`. A split is one of the data
  set's, or "folder:PATH" of a folder of its own. `transparency`, `small` and `skip_bad` say what
  happens to images that cannot be taken as they are (see `data.Policy`). `balanced` draws every
  class of the labels equally often. Of a pack ("pack:PATH") up to `in_memory` GiB are read into
  memory; more stay in its file. `augment` changes training images further: each a
  `data.Augmentation`, or a text such as "shift(pixels=2)". The network is told what "edm" does to
  an image if `network.augment_dim` says so.
  """

  _group = "data."

  name: str | data.Reader = "cifar10"
  train_split: str = "train"
  test_split: str = "test"
  image_shape: tuple[Side, Side, Annotated[int, Range(1, 1024)]] = (32, 32, 3)
  crop: str = "auto"
  flip: bool = True
  data_dir: str = ""
  transparency: str = "white"
  small: Annotated[str, Choice(data.SMALL)] = "leave_out"
  skip_bad: Share = 0.0
  balanced: bool = False
  in_memory: Annotated[float, Range(0, 1e6)] = 1.0
  augment: tuple[data.Augmentation, ...] = ()

  def __post_init__(self) -> None:
    super().__post_init__()
    object.__setattr__(self, "name", data.reader_of(self.name))
    self.policy  # noqa: B018  it raises for a text that is no colour
    for change in self.augment:
      change.check(self.image_shape)

  @property
  def policy(self) -> data.Policy:
    """What happens to images that cannot be taken as they are."""
    return data.Policy(self.transparency, self.small, self.skip_bad)

  def load(self, split: str = "", data_dir: str | None = None, progress: bool = True,
           say: Callable[[str], None] | None = None, room: Any = None) -> Any:  # fmt: skip
    """The `data.Source` of a split, by default of the training split, decoded.

    Args:
      say: gets the lines of the doctor's table.
      room: where the images go instead of memory (see `data.load`).
    """
    return data.load(
      self.name, split or self.train_split, self.image_shape, self.crop,
      data_dir or self.data_dir or None, progress, self.policy, say, room,
      int(self.in_memory * 2**30),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training(Group):
  """Optimisation (P App. D), and what is written how often (in steps; 0 means never).

  A batch is taken in `accumulate` parts, one after the other, where it does not fit in memory: the
  step is the same. `t_min` is the smallest t drawn; `low_variance_t` draws one
  stratified sample of t per batch instead of independent ones; `steps_per_loop` steps run in one
  call of the compiled loop; the `keep` newest checkpoints stay, and one every `keep_every` steps.

  `weight`, `filtered` and `look_ahead` are deprecated: fields of `losses.SoftScoreMatching` now.
  """

  _group = "training."

  batch_size: Count = 128
  accumulate: Count = 1
  steps: Steps = 1_000_000
  learning_rate: Positive = 2e-4
  warmup_steps: Every = 5000
  beta_1: Share = 0.9
  beta_2: Share = 0.999
  epsilon: Positive = 1e-8
  clip_norm: Positive = 1.0
  ema_decay: Share = 0.999
  t_min: Share = 1e-5
  low_variance_t: bool = False
  steps_per_loop: Count = 10
  log_every: Every = 100
  checkpoint_every: Every = 2000
  keep: Count = 3
  keep_every: Every = 10_000
  sample_every: Every = 10_000
  weight: dataclasses.InitVar[str | None] = None
  filtered: dataclasses.InitVar[bool | None] = None
  look_ahead: dataclasses.InitVar[float | None] = None

  def __post_init__(self, *of_loss: Any) -> None:
    super().__post_init__()
    given = {k: v for k, v in zip(_OF_LOSS, of_loss) if v is not None}
    if given:
      warnings.warn(
        f"Training({', '.join(given)}) is deprecated; give Experiment(loss=losses."
        "SoftScoreMatching(...))",
        DeprecationWarning, stacklevel=3,
      )  # fmt: skip
    object.__setattr__(self, "_of_loss", given)  # until `Experiment` has taken it


_OF_LOSS = ("weight", "filtered", "look_ahead")
_OF_RULES = ("k", "noise", "tolerance")


@dataclasses.dataclass(frozen=True)
class Sampling(Group):
  """See `samplers.plan` and `samplers.time_grid`.

  `sampler` is a `samplers.Rule` or a text that names one: "two_step", "ddim(k=0.1)", a pair such as
  "ddim+momentum", "my_module:MyRule(size=2)". `times`, when given, are the grid, from 1 down to 0,
  in place of `steps` and `grid`. `clip` bounds x̂_0 to [0, 1] in every step; `threshold` does so
  dynamically, by that percentile (0: not). `batch_size` images are computed side by side, always:
  kernels round by it, so it is part of what an image is (`drawing`).

  `k`, `noise` and `tolerance` are deprecated: fields of the rules "ddim", "stochastic_two_step" and
  "dormand_prince" now.
  """

  _group = "sampling."

  sampler: samplers.Rule = samplers.TwoStep()  # noqa: RUF009
  steps: Annotated[int, Range(1, 1_000_000)] = 25
  grid: Annotated[str, Choice(tuple(samplers.GRIDS))] = "uniform"
  times: tuple[Annotated[float, Range(0, 1)], ...] = ()
  denoise: bool = True
  clip: bool = False
  threshold: Annotated[float, Range(0, 100)] = 0.0
  batch_size: Annotated[int, Range(1, 1_000_000)] = 64
  k: dataclasses.InitVar[float | None] = None
  noise: dataclasses.InitVar[float | None] = None
  tolerance: dataclasses.InitVar[float | None] = None

  def __post_init__(self, *of_rule: Any) -> None:
    super().__post_init__()
    given = {k: v for k, v in zip(_OF_RULES, of_rule) if v is not None}
    if given:
      warnings.warn(
        f"Sampling({', '.join(given)}) is deprecated; give sampler='ddim(k=0.1)' and the like",
        DeprecationWarning, stacklevel=3,
      )  # fmt: skip
      object.__setattr__(self, "sampler", samplers.with_fields(self.sampler, given))
    if self.clip and self.threshold:
      raise ValueError(
        f"sampling.clip and sampling.threshold = {self.threshold:g} both bound x̂_0; set one of them"
      )
    if self.times and not (
      len(self.times) > 1 and self.times[0] == 1 and self.times[-1] == 0
    ):  # fmt: skip
      raise ValueError(
        f"sampling.times must descend from 1 to 0, got {self.times[0]:g} … {self.times[-1]:g}; "
        "give them from 1 to 0, both included"
      )
    for t, s in itertools.pairwise(self.times):
      if not s < t:
        raise ValueError(
          f"sampling.times must descend from 1 to 0, and {s:g} comes after {t:g}; give each time "
          "once, the largest first"
        )

  @property
  def evaluations(self) -> int | None:
    """Of the network, for one image; None where the sampler chooses its own steps."""
    if self.sampler.adaptive:
      return None
    return samplers.evaluations(self.sampler, len(self.times) - 1 if self.times else self.steps)

  @property
  def summary(self) -> str:
    """The sampler and whatever else is not the default, as "two_step (grid level)".

    Without steps, which the evaluations say, and the batch size.
    """
    said = ("sampler", "steps", "batch_size")
    other = [
      f"{field.name} {value}" for field in dataclasses.fields(self)
      if field.name not in said and (value := getattr(self, field.name)) != field.default
    ]  # fmt: skip
    return f"{self.sampler} ({', '.join(other)})" if other else str(self.sampler)

  def changed(self, nfe: int | None = None, **changes: Any) -> Sampling:
    """The options with other values for what is not None; `nfe` picks the steps that take as many
    evaluations of the network. A number of steps or a grid takes the place of `times`, and `times`
    that of both. What is no field here is one of the sampler's: `k` of "ddim".

    Raises:
      ValueError: two of them at once, or one that the sampler does not read.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    names = {field.name for field in dataclasses.fields(self)}
    of_rule = {k: given.pop(k) for k in list(given) if k not in names}
    chosen = [name for name in ("steps", "grid") if name in given]
    if chosen and given.get("times"):
      raise ValueError(
        f"times stand in the place of {chosen[0]} = {given[chosen[0]]}: give one of them"
      )
    if chosen:
      given["times"] = ()
    options = dataclasses.replace(self, **given)
    if of_rule:
      rule = samplers.with_fields(options.sampler, of_rule, strict=True)
      options = dataclasses.replace(options, sampler=rule)
    if options.sampler.adaptive:
      for field in ("steps", "nfe", "grid", "times"):
        if value := (given | {"nfe": nfe}).get(field):
          raise ValueError(
            f"{options.sampler} chooses its own steps by its tolerance: leave out {field} = {value}"
          )
    if nfe is None:
      return options
    if given.get("steps") or given.get("times"):
      raise ValueError(f"nfe = {nfe} chooses the number of steps: leave out steps and times")
    return dataclasses.replace(options, steps=samplers.steps_for(options.sampler, nfe), times=())


@dataclasses.dataclass(frozen=True)
class Evaluation(Group):
  """What `evaluation` measures with.

  `feature_net` names a feature network (see `features`); `samples` is the number of images on each
  side, and `reference_samples` another number of real ones (0: the same); KID and precision/recall
  look at the first `subset` images of each side, the latter at their `neighbours`-th neighbours.
  `metrics` are measured beside them, on as many images: each a `metrics.Metric`, or its name.
  """

  _group = "evaluation."

  feature_net: str = "tfgan"
  samples: Count = 50_000
  reference_samples: Annotated[int, Range(0, 2**31 - 1)] = 0
  subset: Count = 10_000
  neighbours: Count = 3
  metrics: tuple[metrics.Metric, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment(parts.Checked):
  """A run. `level` and `sigma` are the schedules of the corruption's level and of the noise."""

  corruption: corruptions.Corruption = corruptions.GaussianBlur()  # noqa: RUF009
  level: schedules.Schedule = schedules.Constant(0.0)  # noqa: RUF009
  sigma: schedules.Schedule = schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2)  # noqa: RUF009
  name: str = "unnamed"
  seed: Annotated[int, Range(0, 2**63 - 1)] = 0
  data: Data = Data()
  prior: priors.Estimator = priors.Subspace()  # noqa: RUF009
  network: Architecture = Network()  # noqa: RUF009
  loss: losses.Loss = losses.SoftScoreMatching()  # noqa: RUF009
  training: Training = Training()
  sampling: Sampling = Sampling()
  evaluation: Evaluation = Evaluation()

  _PARTS: ClassVar = {
    "corruption": corruptions.Corruption, "level": schedules.Schedule, "sigma": schedules.Schedule,
    "prior": priors.Estimator, "network": Architecture, "loss": losses.Loss,
  }  # fmt: skip

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
    for group, names in (("training", _OF_LOSS), ("sampling", _OF_RULES)):  # flags of version 0.1
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
    content = _of_now(content)
    if str(version).startswith("0.1."):
      content = _attending_by_width(content)
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
        old = _OF_LOSS if name == "training" else _OF_RULES if name == "sampling" else ()
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
      return cls.from_config(content, trust_code)
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
        "for this folder, or train anew" if isinstance(version, str) and version != own else ""
      )  # fmt: skip
      raise kind(f"{path}: {' '.join(str(error).split())}{remedy}") from error

  def flat(self) -> dict[str, Any]:
    """Every field by its dotted name, as plain values."""
    return _flatten(self.to_dict())

  def digest(self) -> str:
    """Twelve hexadecimal digits that name this experiment."""
    return _digest(self.to_dict())

  def identity(self) -> str:
    """Like `digest`, of what decides the weights at a step alone."""
    new = lambda k, v: k in _LATER and v == _LATER[k]
    fields = self.flat().items()
    return _digest({k: v for k, v in fields if not k.startswith(INCIDENTAL) and not new(k, v)})

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


def level_from_file(path: str | pathlib.Path, corruption: corruptions.Corruption,
                    start: float, stop: float) -> schedules.Schedule:  # fmt: skip
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


def _digest(content: Mapping[str, Any]) -> str:
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


def _of_now(content: dict[str, Any]) -> dict[str, Any]:
  """A config of version 0.1 as this one has it, the loss and the rules with fields of their own."""

  def take(group: str, names: tuple[str, ...]) -> dict[str, Any]:
    values = content.get(group)
    if not isinstance(values, Mapping):
      return {}
    content[group] = {k: v for k, v in values.items() if k not in names}
    return {k: values[k] for k in names if values.get(k) is not None}

  if old := take("training", _OF_LOSS):
    loss = content.get("loss", {"kind": "SoftScoreMatching"})
    content["loss"] = {**loss, **old} if isinstance(loss, Mapping) else loss
  if old := take("sampling", _OF_RULES):
    content["sampling"]["sampler"] = _of_rule(content["sampling"].get("sampler", "two_step"), old)
  return content


def _attending_by_width(content: dict[str, Any]) -> dict[str, Any]:
  """A config of version 0.1, whose attn_resolutions are heights also where the width is less."""
  network, images = content.get("network", {}), content.get("data", {})
  shape: Any = images.get("image_shape") if isinstance(images, Mapping) else None
  if not isinstance(network, Mapping) or network.get("kind", "NCSNpp") != "NCSNpp":
    return content
  default = Network()
  levels = network.get("ch_mult", default.ch_mult)
  heights = network.get("attn_resolutions", default.attn_resolutions)
  for sizes in (shape, levels, heights):
    if not isinstance(sizes, list | tuple) or not all(type(n) is int for n in sizes):
      return content  # the fields' own checks say what is wrong
  if len(shape) != 3 or shape[0] <= shape[1]:
    return content
  widths = [shape[1] >> k for k in range(len(levels)) if shape[0] >> k in heights]
  return {**content, "network": {**network, "attn_resolutions": widths}}


def _of_rule(sampler: Any, values: Mapping[str, Any]) -> samplers.Rule:
  """The rule of a config of version 0.1; each value must be one that its rule takes."""
  for name, kind in zip(_OF_RULES, (samplers.DDIM, samplers.StochasticTwoStep,
                                    samplers.DormandPrince)):  # fmt: skip
    if name in values:
      parts.check_fields(kind, {name: values[name]}, "sampling.")
  return samplers.with_fields(parts.make(samplers.Rule, sampler, "sampling.sampler"), values)


def loss_of(training: Mapping[str, Any]) -> Any:
  """The config of the loss that options of `Training` of version 0.1 describe."""
  return _of_now({"training": training}).get("loss", {"kind": "SoftScoreMatching"})


def options_from_config(kind: Any, values: Mapping[str, Any]) -> Any:
  """One of the groups above (`Training`, …) from plain values, checked."""
  name = kind._group[:-1]
  return kind(**parts.check_fields(kind, _of_now({name: values})[name], kind._group))


def PriorOptions(kind: str = "subspace", rank: int = 16) -> priors.Estimator:
  """Deprecated: an estimator of `priors`, as version 0.1 named it."""
  estimator = parts.make(priors.Estimator, kind, "prior.kind")
  warnings.warn(
    f"PriorOptions is deprecated; use priors.{type(estimator).__name__}()",
    DeprecationWarning, stacklevel=2,
  )  # fmt: skip
  return dataclasses.replace(estimator, rank=rank)
