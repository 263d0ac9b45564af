"""An experiment: everything a run is made of, typed and frozen, and its passage through configs.

A config file's `get_config` returns `Experiment(...).to_config()`; flags override its fields;
`from_config` makes the experiment again and checks it; `save` and `load` carry it in a workdir.
The defaults are the paper's, but for the prior and the sampler, where better ones are measured
(docs/reproduction.md); the configs that are named after its experiments say what it took.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import pathlib
import reprlib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from soft_diffusion_tf import corruptions, diffusion, losses, priors, samplers, schedules, trust
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


@dataclasses.dataclass(frozen=True)
class Data:
  """See `data.load`; `flip` mirrors training images at random."""

  name: str = "cifar10"
  train_split: str = "train"
  test_split: str = "test"
  image_shape: tuple[int, int, int] = (32, 32, 3)
  crop: str = "auto"
  flip: bool = True
  data_dir: str = ""


@dataclasses.dataclass(frozen=True)
class PriorOptions:
  """See `priors.fit`."""

  kind: str = "subspace"
  rank: int = 16


@dataclasses.dataclass(frozen=True)
class Network:
  """NCSN++ options (see `networks.ncsnpp.NCSNpp`); the image shape comes from the data.

  `prediction` says what the network gives and `conditioning` what it is told of t (see
  `model.SoftDiffusionModel`): the defaults are P's, the others those of published VE and VP models.
  `cond_min` and `cond_max` are the ends of the log-linear conditioning value: what the VE network
  of the same data set sees as σ. With `dtype` "bfloat16" the network computes in it, as TPUs like;
  weights, images, σ and the loss stay in float32.
  """

  nf: int = 128
  ch_mult: tuple[int, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.1
  fir: bool = True
  skip_rescale: bool = True
  resblock_type: str = "biggan"
  progressive: str = "none"
  progressive_input: str = "residual"
  progressive_combine: str = "sum"
  embedding_type: str = "fourier"
  fourier_scale: float = 16.0
  resamp_with_conv: bool = True
  conditional: bool = True
  init_scale: float = 0.0
  centered: bool = False
  remat: bool = False
  scale_by_sigma: bool = False
  sigma_min: float = 0.01
  sigma_max: float = 50.0
  num_scales: int = 1000
  prediction: str = "residual"
  conditioning: str = "log_linear"
  cond_min: float = 0.01
  cond_max: float = 50.0
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Training:
  """Optimisation (P App. D), and what is written how often (in steps; 0 means never).

  A batch is taken in `accumulate` parts, one after the other, where it does not fit in memory: the
  step is the same. `weight`, `filtered` and `look_ahead` are those of the loss
  (`losses.soft_score_matching`). `t_min` is the smallest t drawn; `low_variance_t` draws one
  stratified sample of t per batch instead of independent ones; `steps_per_loop` steps run in one
  call of the compiled loop; the `keep` newest checkpoints stay, and one every `keep_every` steps.
  """

  batch_size: int = 128
  accumulate: int = 1
  steps: int = 1_000_000
  learning_rate: float = 2e-4
  warmup_steps: int = 5000
  beta_1: float = 0.9
  beta_2: float = 0.999
  epsilon: float = 1e-8
  clip_norm: float = 1.0
  ema_decay: float = 0.999
  weight: str = "inverse_variance"
  filtered: bool = True
  look_ahead: float = 0.0
  t_min: float = 1e-5
  low_variance_t: bool = False
  steps_per_loop: int = 10
  log_every: int = 100
  checkpoint_every: int = 2000
  keep: int = 3
  keep_every: int = 10_000
  sample_every: int = 10_000


_MOST_SAMPLING = 1 << 20  # steps, and images in a batch
_READ_BY = {"k": "ddim", "noise": "stochastic_two_step", "tolerance": samplers.ADAPTIVE}


@dataclasses.dataclass(frozen=True)
class Sampling:
  """See `samplers.table` and `samplers.time_grid`.

  `sampler` is one of `samplers.SAMPLERS`, a pair such as "ddim+momentum", or `samplers.ADAPTIVE`,
  whose relative and absolute error per step is `tolerance`. `times`, when given, are the grid, from
  1 down to 0, in place of `steps` and `grid`. `clip` bounds x̂_0 to [0, 1] in every step;
  `threshold` does so dynamically, by that percentile (0: not). `batch_size` images are computed
  side by side, always: kernels round by it, so it is part of what an image is (`bulk`).
  """

  sampler: str = "two_step"
  steps: int = 25
  grid: str = "uniform"
  times: tuple[float, ...] = ()
  k: float = 0.0
  noise: float = 1.0
  denoise: bool = True
  clip: bool = False
  threshold: float = 0.0
  tolerance: float = 1e-4
  batch_size: int = 64

  def __post_init__(self) -> None:
    samplers.check(self.sampler)
    _choice("sampling.grid", self.grid, samplers.GRIDS)
    if self.steps < 1:
      raise ValueError(f"sampling.steps: sampling takes at least 1 step, got {self.steps}")
    for field in ("steps", "batch_size"):
      if getattr(self, field) > _MOST_SAMPLING:
        raise ValueError(
          f"sampling.{field} = {getattr(self, field)} is too large; the most is {_MOST_SAMPLING}"
        )
    for field in ("batch_size", "tolerance"):
      if not getattr(self, field) > 0:  # NaN as well
        raise ValueError(f"sampling.{field} must be positive, got {getattr(self, field)}")
    for field in ("k", "noise"):
      if not getattr(self, field) >= 0:
        raise ValueError(f"sampling.{field} must not be negative, got {getattr(self, field)}")
    if not 0 <= self.threshold <= 100:
      raise ValueError(f"sampling.threshold is a percentile up to 100, got {self.threshold}")
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
class Evaluation:
  """What `evaluation` measures with.

  `feature_net` names a feature network (see `features`); `samples` is the number of images on each
  side, and `reference_samples` another number of real ones (0: the same); KID and precision/recall
  look at the first `subset` images of each side, the latter at their `neighbours`-th neighbours.
  """

  feature_net: str = "tfgan"
  samples: int = 50_000
  reference_samples: int = 0
  subset: int = 10_000
  neighbours: int = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A run. `level` and `sigma` are the schedules of the corruption's level and of the noise."""

  corruption: corruptions.Corruption = corruptions.GaussianBlur()  # noqa: RUF009
  level: schedules.Schedule = schedules.Constant(0.0)  # noqa: RUF009
  sigma: schedules.Schedule = schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2)  # noqa: RUF009
  name: str = "unnamed"
  seed: int = 0
  data: Data = Data()
  prior: PriorOptions = PriorOptions()
  network: Network = Network()
  training: Training = Training()
  sampling: Sampling = Sampling()
  evaluation: Evaluation = Evaluation()

  def __post_init__(self) -> None:
    t = self.training
    positive = {
      "training.batch_size": t.batch_size, "training.steps": t.steps,
      "training.learning_rate": t.learning_rate, "evaluation.samples": self.evaluation.samples,
      "training.clip_norm": t.clip_norm, "training.keep": t.keep, "training.epsilon": t.epsilon,
      "training.steps_per_loop": t.steps_per_loop, "training.accumulate": t.accumulate,
      "evaluation.subset": self.evaluation.subset,
      "evaluation.neighbours": self.evaluation.neighbours,
    }  # fmt: skip
    for field, value in positive.items():
      if not value > 0:  # NaN as well
        raise ValueError(f"{field} must be positive, got {value}")
    counts = {
      "training.warmup_steps": t.warmup_steps, "training.log_every": t.log_every,
      "training.checkpoint_every": t.checkpoint_every, "training.keep_every": t.keep_every,
      "training.sample_every": t.sample_every,
      "evaluation.reference_samples": self.evaluation.reference_samples,
    }  # fmt: skip
    for field, value in counts.items():
      if not value >= 0:
        raise ValueError(f"{field} must not be negative, got {value}")
    for field in ("ema_decay", "t_min", "beta_1", "beta_2"):
      if not 0 <= getattr(t, field) < 1:
        raise ValueError(f"training.{field} must be in [0, 1), got {getattr(t, field)}")
    if not 0 <= t.look_ahead <= 1:
      raise ValueError(f"training.look_ahead is a time from 0 to 1, got {t.look_ahead}")
    if t.look_ahead and not t.filtered:
      raise ValueError(
        f"training.look_ahead = {t.look_ahead} chooses the filter of the loss, and "
        "training.filtered = False takes it away; set one of them only"
      )
    _choice("training.weight", t.weight, losses.WEIGHTS)
    _choice("network.prediction", self.network.prediction, PREDICTIONS)
    _choice("network.conditioning", self.network.conditioning, CONDITIONINGS)
    _choice("network.dtype", self.network.dtype, DTYPES)
    for prediction, kind in (("score", corruptions.Identity), ("noise", corruptions.Scale)):
      if self.network.prediction == prediction and not isinstance(self.corruption, kind):
        raise ValueError(
          f"network.prediction = {prediction!r} needs the corruption {kind.__name__}, not "
          f"{type(self.corruption).__name__}; use 'residual'"
        )
    _choice("prior.kind", self.prior.kind, priors.KINDS)
    if self.prior.rank < 1:
      raise ValueError(f"prior.rank: a subspace has at least 1 dimension, got {self.prior.rank}")
    self._check_conditioning()
    for group in (self.network, t, self.sampling):
      for name, number in vars(group).items():
        if number != number or (group is self.network and number in (math.inf, -math.inf)):
          raise ValueError(f"{type(group).__name__.lower()}.{name} must be a number, got {number}")

  def _check_conditioning(self) -> None:
    n = self.network
    if not 0 < n.cond_min < n.cond_max:
      raise ValueError(
        f"network.cond_min = {n.cond_min:g} and cond_max = {n.cond_max:g} must be positive and rise"
      )
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
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parts: dict[str, Any] = {}
    for name, value in content.items():
      _known("", name, fields)
      if name == "corruption":
        value = corruptions.from_config(value, trust_code)
      elif name in ("level", "sigma"):
        value = schedules.from_config(value)
      elif dataclasses.is_dataclass(hints[name]):
        value = _typed(hints[name], value, name + ".")
      elif not schedules.fits(value, hints[name]):
        want = hints[name].__name__
        raise ValueError(f"{name} must be {want} of at most 64 bits, got {reprlib.repr(value)}")
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
    partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
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
  """The experiment of a config file, so that another config can be a few changes to it."""
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
  remedy = "find a schedule for this one with tools/find_schedule.py"
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


def _known(prefix: str, name: str, fields: set[str]) -> None:
  if name not in fields:
    near = difflib.get_close_matches(name, sorted(fields), 1, cutoff=0)[0]
    raise ValueError(f"the config has no field {prefix}{name!s}; did you mean {prefix}{near}?")


def options_from_config(kind: Any, values: Mapping[str, Any]) -> Any:
  """One of the option classes above (`Training`, …) from plain values, checked."""
  return _typed(kind, values, f"{kind.__name__.lower()}.")


def _typed(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
  """A dataclass from a mapping, every field checked against the default's type."""
  if not isinstance(values, Mapping):
    raise ValueError(f"{prefix[:-1]} must be a group of fields, got {values!r}")
  defaults, hints = kind(), typing.get_type_hints(kind)
  checked: dict[str, Any] = {}
  for name, value in values.items():
    _known(prefix, name, {f.name for f in dataclasses.fields(kind)})
    default = getattr(defaults, name)
    want = type(default)
    if isinstance(value, list):
      value = tuple(value)
    if isinstance(value, int) and not schedules.fits(int(value), int):
      raise ValueError(f"{prefix}{name} = {reprlib.repr(value)} has more than 64 bits")
    if want is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    fit = isinstance(value, want) and (want is not tuple or schedules.fits(value, hints[name]))
    if not fit or (want is int and isinstance(value, bool)):
      raise ValueError(
        f"{prefix}{name} must be {want.__name__} like {default!r}, got {reprlib.repr(value)}"
      )
    checked[name] = value
  return kind(**checked)
