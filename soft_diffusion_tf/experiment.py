"""An experiment: everything a run is made of, typed and frozen, and its passage through configs.

A config file's `get_config` returns `Experiment(...).to_config()`; flags override its fields;
`from_config` makes the experiment again and checks it; `save` and `load` carry it in a workdir.
The defaults are the paper's, but for the prior and the sampler, where better ones are measured
(docs/reproduction.md); the configs that are named after its experiments say what it took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import numbers
import pathlib
import reprlib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import ml_collections

import soft_diffusion_tf
from soft_diffusion_tf import (
  corruptions,
  diffusion,
  losses,
  priors,
  samplers,
  schedules,
  shipped,
  trust,
)
from soft_diffusion_tf.networks.ncsnpp import NCSNpp

CONFIG_FILE = "config.json"
PREDICTIONS = ("residual", "score", "noise")
CONDITIONINGS = ("log_linear", "vp_label", "ve_label")
INCIDENTAL = (  # fields, by how their names begin, that do not change the weights at a step
  "name", "training.steps", "training.steps_per_loop", "training.log_every", "training.keep",
  "training.checkpoint_every", "training.keep_every", "training.sample_every", "data.data_dir",
  "training.accumulate", "data.test_split", "sampling.", "evaluation.",
)  # fmt: skip
DTYPES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # what Keras calls them


def _choice(field: str, value: str, choices: Iterable[str]) -> None:
  if value not in choices:
    near = difflib.get_close_matches(str(value), list(choices), 1, cutoff=0)[0]
    raise ValueError(f"{field} = {value!r} is unknown; did you mean {near!r}?")


# --- What a field may be --------------------------------------------------------------------------


class Range(typing.NamedTuple):
  """The numbers that a field takes: from `low` to `high`, or without the ends that `ends` opens."""

  low: float
  high: float
  ends: str = "[]"

  def check(self, where: str, value: Any) -> None:
    """Raises the ValueError of a number outside; `where` names it."""
    above = value > self.low if self.ends[0] == "(" else value >= self.low
    below = value < self.high if self.ends[1] == ")" else value <= self.high
    if not (above and below):  # NaN as well
      raise ValueError(f"{where} must be {self}, got {value}")

  def __str__(self) -> str:
    words = {"(": "above", "[": "from", ")": "below", "]": "to"}
    if (self.low, self.ends[0], self.high) == (0, "(", _ANY):
      return "positive and finite"
    last = "on" if self.high == _ANY else f"{words[self.ends[1]]} {self.high:,}"
    return f"{words[self.ends[0]]} {self.low:,} {last}"


class Choice(typing.NamedTuple):
  """The texts that a field takes."""

  choices: tuple[str, ...]

  def check(self, where: str, value: Any) -> None:
    """Raises the ValueError of another text, with the nearest one; `where` names it."""
    _choice(where, value, self.choices)


_ANY = 1.7e308  # what is above is not finite
_MOST = 10**12  # of anything that is counted in steps
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}

Positive = Annotated[float, Range(0, _ANY, "(]")]
NotNegative = Annotated[float, Range(0, _ANY)]
Share = Annotated[float, Range(0, 1, "[)")]  # of a whole that is never reached
Count = Annotated[int, Range(1, 2**31 - 1)]
Steps = Annotated[int, Range(1, _MOST)]
Every = Annotated[int, Range(0, _MOST)]  # so many steps; 0: never
Side = Annotated[int, Range(1, 8192)]  # of an image, in pixels


def _checked(where: str, value: Any, hint: Any, like: Any = None) -> Any:
  """A value as its field's type has it: a list for a tuple and an int for a float are taken.

  Raises:
    ValueError: it is of another type, or not in the field's `Range` or `Choice`; `where` names it.
  """
  rules: tuple[Any, ...] = ()
  if typing.get_origin(hint) is Annotated:
    hint, *rules = typing.get_args(hint)  # type: ignore[assignment]
  kind = _KINDS.get(hint, "a " + getattr(hint, "__name__", "tuple"))
  such = "" if like is None else f" like {like!r}"
  wrong = f"{where} must be {kind}{such}, got {reprlib.repr(value)}"
  if typing.get_origin(hint) is tuple:
    inner = typing.get_args(hint)
    if not isinstance(value, list | tuple):
      raise ValueError(wrong)
    if inner[-1] is ...:
      inner = inner[:1] * len(value)
    if len(inner) != len(value):
      raise ValueError(f"{where} takes {len(inner)} numbers like {like!r}, got {value!r}")
    return tuple(_checked(f"{where}[{k}]", v, h) for k, (v, h) in enumerate(zip(value, inner)))
  if not isinstance(value, bool):
    if hint is int and isinstance(value, numbers.Integral):
      value = int(value)
    elif hint is float and isinstance(value, numbers.Real):
      with contextlib.suppress(OverflowError):  # of an int
        value = float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ValueError(wrong)
  if hint is float and not math.isfinite(value):
    raise ValueError(f"{where} must be a finite number, got {value}")
  for rule in rules:
    rule.check(where, value)
  return value


class _Options:
  """A frozen dataclass whose fields are what their annotations say, whoever makes it."""

  def __post_init__(self) -> None:
    hints = typing.get_type_hints(type(self), include_extras=True)
    group = type(self).__name__.lower().removesuffix("options")
    prefix = "" if group == "experiment" else f"{group}."
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      name = field.name
      value = _checked(prefix + name, getattr(self, name), hints[name], field.default)
      object.__setattr__(self, name, value)


# --- The parts ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data(_Options):
  """See `data.load`; `flip` mirrors training images at random."""

  name: str = "cifar10"
  train_split: str = "train"
  test_split: str = "test"
  image_shape: tuple[Side, Side, Annotated[int, Range(1, 1024)]] = (32, 32, 3)
  crop: str = "auto"
  flip: bool = True
  data_dir: str = ""


@dataclasses.dataclass(frozen=True)
class PriorOptions(_Options):
  """See `priors.fit`."""

  kind: Annotated[str, Choice(tuple(priors.KINDS))] = "subspace"
  rank: Count = 16


@dataclasses.dataclass(frozen=True)
class Network(_Options):
  """NCSN++ options (see `networks.ncsnpp.NCSNpp`); the image shape comes from the data.

  `prediction` says what the network gives and `conditioning` what it is told of t (see
  `model.SoftDiffusionModel`): the defaults are P's, the others those of published VE and VP models.
  `cond_min` and `cond_max` are the ends of the log-linear conditioning value: what the VE network
  of the same data set sees as σ. With `dtype` "bfloat16" the network computes in it, as TPUs like;
  weights, images, σ and the loss stay in float32.
  """

  nf: Annotated[int, Range(4, 4096)] = 128
  ch_mult: tuple[Annotated[int, Range(1, 64)], ...] = (1, 2, 2, 2)
  num_res_blocks: Annotated[int, Range(1, 128)] = 4
  attn_resolutions: tuple[Side, ...] = (16,)
  dropout: Share = 0.1
  fir: bool = True
  skip_rescale: bool = True
  resblock_type: str = "biggan"
  progressive: str = "none"
  progressive_input: str = "residual"
  progressive_combine: str = "sum"
  embedding_type: str = "fourier"
  fourier_scale: Positive = 16.0
  resamp_with_conv: bool = True
  conditional: bool = True
  init_scale: NotNegative = 0.0
  centered: bool = False
  remat: bool = False
  scale_by_sigma: bool = False
  sigma_min: Positive = 0.01
  sigma_max: Positive = 50.0
  num_scales: Annotated[int, Range(1, 1_000_000)] = 1000
  prediction: Annotated[str, Choice(PREDICTIONS)] = "residual"
  conditioning: Annotated[str, Choice(CONDITIONINGS)] = "log_linear"
  cond_min: Positive = 0.01
  cond_max: Positive = 50.0
  dtype: Annotated[str, Choice(tuple(DTYPES))] = "float32"


@dataclasses.dataclass(frozen=True)
class Training(_Options):
  """Optimisation (P App. D), and what is written how often (in steps; 0 means never).

  A batch is taken in `accumulate` parts, one after the other, where it does not fit in memory: the
  step is the same. `weight`, `filtered` and `look_ahead` are those of the loss
  (`losses.soft_score_matching`). `t_min` is the smallest t drawn; `low_variance_t` draws one
  stratified sample of t per batch instead of independent ones; `steps_per_loop` steps run in one
  call of the compiled loop; the `keep` newest checkpoints stay, and one every `keep_every` steps.
  """

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
  weight: Annotated[str, Choice(tuple(losses.WEIGHTS))] = "inverse_variance"
  filtered: bool = True
  look_ahead: Annotated[float, Range(0, 1)] = 0.0
  t_min: Share = 1e-5
  low_variance_t: bool = False
  steps_per_loop: Count = 10
  log_every: Every = 100
  checkpoint_every: Every = 2000
  keep: Count = 3
  keep_every: Every = 10_000
  sample_every: Every = 10_000


_READ_BY = {"k": "ddim", "noise": "stochastic_two_step", "tolerance": samplers.ADAPTIVE}


@dataclasses.dataclass(frozen=True)
class Sampling(_Options):
  """See `samplers.table` and `samplers.time_grid`.

  `sampler` is one of `samplers.SAMPLERS`, a pair such as "ddim+momentum", or `samplers.ADAPTIVE`,
  whose relative and absolute error per step is `tolerance`. `times`, when given, are the grid, from
  1 down to 0, in place of `steps` and `grid`. `clip` bounds x̂_0 to [0, 1] in every step;
  `threshold` does so dynamically, by that percentile (0: not). `batch_size` images are computed
  side by side, always: kernels round by it, so it is part of what an image is (`bulk`).
  """

  sampler: str = "two_step"
  steps: Annotated[int, Range(1, 1_000_000)] = 25
  grid: Annotated[str, Choice(tuple(samplers.GRIDS))] = "uniform"
  times: tuple[Annotated[float, Range(0, 1)], ...] = ()
  k: NotNegative = 0.0
  noise: NotNegative = 1.0
  denoise: bool = True
  clip: bool = False
  threshold: Annotated[float, Range(0, 100)] = 0.0
  tolerance: Positive = 1e-4
  batch_size: Annotated[int, Range(1, 1_000_000)] = 64

  def __post_init__(self) -> None:
    super().__post_init__()
    samplers.check(self.sampler)
    if self.clip and self.threshold:
      raise ValueError(
        f"sampling.clip and sampling.threshold = {self.threshold:g} both bound x̂_0; set one of them"
      )
    if self.times and not (
      len(self.times) > 1 and self.times[0] == 1 and self.times[-1] == 0
      and all(s < t for t, s in itertools.pairwise(self.times))
    ):  # fmt: skip
      raise ValueError(
        f"sampling.times must descend from 1 to 0, got {self.times[0]:g} … {self.times[-1]:g}; "
        "are they ascending?"
      )

  @property
  def evaluations(self) -> int | None:
    """Of the network, for one image; None where the sampler chooses its own steps."""
    if self.sampler == samplers.ADAPTIVE:
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
    return f"{self.sampler} ({', '.join(other)})" if other else self.sampler

  def changed(self, nfe: int | None = None, **changes: Any) -> Sampling:
    """The options with other values for what is not None; `nfe` picks the steps that take as many
    evaluations of the network. A number of steps or a grid takes the place of `times`, and `times`
    that of both.

    Raises:
      ValueError: two of them at once.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    chosen = [name for name in ("steps", "grid") if name in given]
    if chosen and given.get("times"):
      raise ValueError(
        f"times stand in the place of {chosen[0]} = {given[chosen[0]]}: give one of them"
      )
    if chosen:
      given["times"] = ()
    options = dataclasses.replace(self, **given)
    options._check_read(given if nfe is None else given | {"nfe": nfe})
    if nfe is None:
      return options
    if given.get("steps") or given.get("times"):
      raise ValueError(f"nfe = {nfe} chooses the number of steps: leave out steps and times")
    return dataclasses.replace(options, steps=samplers.steps_for(options.sampler, nfe), times=())

  def _check_read(self, given: Mapping[str, Any]) -> None:
    """Raises the ValueError of a value that was asked for and that the sampler does not read."""
    adaptive = self.sampler == samplers.ADAPTIVE
    turns = (self.sampler,) if adaptive else samplers.parts(self.sampler)
    for field, reader in _READ_BY.items():
      if given.get(field) and reader not in turns:
        raise ValueError(
          f"{field} = {given[field]:g} is for the sampler {reader}; {self.sampler} does not read "
          "it, so leave it out"
        )
    for field in ("steps", "nfe", "grid", "times"):
      if given.get(field) and adaptive:
        raise ValueError(
          f"{self.sampler} chooses its own steps by its tolerance: leave out {field} = "
          f"{given[field]}"
        )


@dataclasses.dataclass(frozen=True)
class Evaluation(_Options):
  """What `evaluation` measures with.

  `feature_net` names a feature network (see `features`); `samples` is the number of images on each
  side, and `reference_samples` another number of real ones (0: the same); KID and precision/recall
  look at the first `subset` images of each side, the latter at their `neighbours`-th neighbours.
  """

  feature_net: str = "tfgan"
  samples: Count = 50_000
  reference_samples: Annotated[int, Range(0, 2**31 - 1)] = 0
  subset: Count = 10_000
  neighbours: Count = 3


@dataclasses.dataclass(frozen=True)
class Experiment(_Options):
  """A run. `level` and `sigma` are the schedules of the corruption's level and of the noise."""

  corruption: corruptions.Corruption = corruptions.GaussianBlur()  # noqa: RUF009
  level: schedules.Schedule = schedules.Constant(0.0)  # noqa: RUF009
  sigma: schedules.Schedule = schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2)  # noqa: RUF009
  name: str = "unnamed"
  seed: Annotated[int, Range(0, 2**63 - 1)] = 0
  data: Data = Data()
  prior: PriorOptions = PriorOptions()
  network: Network = Network()
  training: Training = Training()
  sampling: Sampling = Sampling()
  evaluation: Evaluation = Evaluation()

  def __post_init__(self) -> None:
    super().__post_init__()
    t = self.training
    if t.look_ahead and not t.filtered:
      raise ValueError(
        f"training.look_ahead = {t.look_ahead} chooses the filter of the loss, and "
        "training.filtered = False takes it away; set one of them only"
      )
    for prediction, kind in (("score", corruptions.Identity), ("noise", corruptions.Scale)):
      if self.network.prediction == prediction and not isinstance(self.corruption, kind):
        raise ValueError(
          f"network.prediction = {prediction!r} needs the corruption {kind.__name__}, not "
          f"{type(self.corruption).__name__}; use 'residual'"
        )
    self._check_conditioning()

  def _check_conditioning(self) -> None:
    n = self.network
    if not n.cond_min < n.cond_max:
      raise ValueError(f"network.cond_min = {n.cond_min:g} and cond_max = {n.cond_max:g} must rise")
    labels = n.conditioning != "log_linear"
    if labels and n.embedding_type == "fourier":
      raise ValueError(
        f"network.conditioning = {n.conditioning!r} gives labels from 0 on, whose logarithm "
        "embedding_type = 'fourier' takes; use 'positional', or the conditioning 'log_linear'"
      )
    if n.scale_by_sigma and n.embedding_type == "positional" and not labels:
      raise ValueError(
        "network.scale_by_sigma with embedding_type = 'positional' divides by the σ of a label; "
        f"use the conditioning {' or '.join(CONDITIONINGS[1:])}, not {n.conditioning!r}"
      )

  # --- Parts --------------------------------------------------------------------------------------

  def build_diffusion(self) -> diffusion.Diffusion:
    """The forward process, without a prior."""
    return diffusion.Diffusion(self.data.image_shape, self.corruption, self.level, self.sigma)

  def check_network(self) -> None:
    """Raises the ValueError of options that make no network, without making its weights."""
    NCSNpp.check(image_shape=self.data.image_shape, seed=self.seed, **self._network_options())

  def build_network(self) -> NCSNpp:
    """A fresh network; its weights are a function of `seed` alone."""
    return NCSNpp(image_shape=self.data.image_shape, seed=self.seed, **self._network_options())

  def network_shapes(self) -> list[tuple[int, ...]]:
    """The shapes of the network's variables, without making them."""
    return NCSNpp.shapes(
      image_shape=self.data.image_shape, seed=self.seed, **self._network_options()
    )

  def _network_options(self) -> dict[str, Any]:
    options = dataclasses.asdict(self.network)
    for name in ("prediction", "conditioning", "cond_min", "cond_max"):
      del options[name]
    options["dtype"] = DTYPES[self.network.dtype]
    return options

  # --- Configs ------------------------------------------------------------------------------------

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if hasattr(value, "get_config"):
        value = value.get_config()
      elif dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)  # type: ignore[arg-type]
      result[field.name] = value
    return result

  def to_config(self) -> ml_collections.ConfigDict:
    """For a config file's `get_config`: fields keep their types under flag overrides."""
    return ml_collections.ConfigDict(self.to_dict(), convert_dict=True)

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
    content.pop("version", None)  # of the program that wrote it
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parts: dict[str, Any] = {}
    for name, value in content.items():
      _known("", name, fields)
      if name == "corruption":
        value = corruptions.from_config(value, trust_code)
      elif name in ("level", "sigma"):
        try:
          value = schedules.from_config(value)
        except ValueError as error:
          raise ValueError(f"{name}: {error}") from None
      elif dataclasses.is_dataclass(hints[name]):
        value = _typed(hints[name], value, name + ".")
      parts[name] = value
    return cls(**parts)

  def replace(self, **changes: Any) -> Experiment:
    """A copy with other parts; a dictionary changes only the named fields of a group:
    `replace(name="x", training={"steps": 10})`.
    """
    for name, value in changes.items():
      if isinstance(value, dict):
        group = getattr(self, name)
        for field in value:
          _known(name + ".", field, {f.name for f in dataclasses.fields(group)})
        changes[name] = dataclasses.replace(group, **value)
    return dataclasses.replace(self, **changes)

  def save(self, workdir: str | pathlib.Path) -> None:
    """Writes config.json into a workdir."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    partial = path.with_suffix(".partial")
    content = {"version": soft_diffusion_tf.__version__, **self.to_dict()}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)

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
      raise kind(f"{path}: {' '.join(str(error).split())}") from error

  def flat(self) -> dict[str, Any]:
    """Every field by its dotted name, as plain values."""
    return _flatten(self.to_dict())

  def digest(self) -> str:
    """Twelve hexadecimal digits that name this experiment."""
    return _digest(self.to_dict())

  def identity(self) -> str:
    """Like `digest`, of what decides the weights at a step alone."""
    return _digest({k: v for k, v in self.flat().items() if not k.startswith(INCIDENTAL)})

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


class UnknownField(ValueError):
  """A config has a field that this version does not know."""


def _known(prefix: str, name: Any, fields: set[str]) -> None:
  if name not in fields:
    near = difflib.get_close_matches(str(name), sorted(fields), 1, cutoff=0)[0]
    raise UnknownField(f"the config has no field {prefix}{name!s}; did you mean {prefix}{near}?")


def options_from_config(kind: Any, values: Mapping[str, Any]) -> Any:
  """One of the option classes above (`Training`, …) from plain values, checked."""
  return _typed(kind, values, f"{kind.__name__.lower()}.")


def _typed(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
  """A dataclass from a mapping; every field is checked."""
  if not isinstance(values, Mapping):
    raise ValueError(f"{prefix[:-1]} must be a group of fields, got {reprlib.repr(values)}")
  for name in values:
    _known(prefix, name, {f.name for f in dataclasses.fields(kind)})
  return kind(**values)
