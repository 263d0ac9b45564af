"""The groups of an experiment's fields: data, training, sampling, evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Annotated, Any

from soft_diffusion_tf import (
  averages,
  data,
  metrics,
  parts,
  samplers,
)
from soft_diffusion_tf.experiment.versions import OF_LOSS, OF_RULES
from soft_diffusion_tf.parts import (
  Choice,
  Count,
  Every,
  Positive,
  Range,
  Share,
  Side,
  Steps,
)


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
  class of the labels equally often. Up to `in_memory` GiB of images are held in memory; more stay
  in the file of a pack ("pack:PATH"), or go into a temporary one. `augment` changes training images
  further: each a `data.Augmentation`, or a text such as "shift(pixels=2)". The network is told what
  "edm" does to an image if `network.augment_dim` says so.
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

  def load(
    self,
    split: str = "",
    data_dir: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    storage: Any = None,
  ) -> Any:
    """The `data.Source` of a split, by default of the training split, decoded.

    Args:
      say: gets the lines of the doctor's table.
      storage: where the images go (see `data.load`).
    """
    return data.load(
      self.name,
      split or self.train_split,
      self.image_shape,
      self.crop,
      data_dir or self.data_dir or None,
      progress,
      self.policy,
      say,
      storage,
      int(self.in_memory * 2**30),
    )


@dataclasses.dataclass(frozen=True)
class Training(Group):
  """Optimisation (P App. D), and what is written how often (in steps; 0 means never).

  A batch is taken in `accumulate` parts, one after the other, where it does not fit in memory: the
  step is the same. `t_min` is the smallest t drawn; `low_variance_t` draws one
  stratified sample of t per batch instead of independent ones; `steps_per_loop` steps run in one
  call of the compiled loop; the `keep` newest checkpoints stay, and one every `keep_every` steps.
  `ema_decay` is reached by (1 + step) / (10 + step) with `ema_warmup`, for short runs. `averages`
  are lengths of further averages that are kept every `average_every` steps, so that one of any
  length can be made afterwards (see `averages`); two, (0.05, 0.1), are enough.

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
  ema_warmup: bool = False
  averages: tuple[Annotated[float, Range(averages.SHORTEST, averages.LONGEST)], ...] = ()
  average_every: Every = 1000
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
    given = {k: v for k, v in zip(OF_LOSS, of_loss) if v is not None}
    if given:
      warnings.warn(
        f"Training({', '.join(given)}) is deprecated; give Experiment(loss=losses."
        "SoftScoreMatching(...))",
        DeprecationWarning,
        stacklevel=3,
      )
    object.__setattr__(self, "_of_loss", given)  # until `Experiment` has taken it


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
    given = {k: v for k, v in zip(OF_RULES, of_rule) if v is not None}
    if given:
      warnings.warn(
        f"Sampling({', '.join(given)}) is deprecated; give sampler='ddim(k=0.1)' and the like",
        DeprecationWarning,
        stacklevel=3,
      )
      object.__setattr__(self, "sampler", samplers.with_fields(self.sampler, given))
    if self.clip and self.threshold:
      raise ValueError(
        f"sampling.clip and sampling.threshold = {self.threshold:g} both bound x̂_0; set one of them"
      )
    if self.times and not (len(self.times) > 1 and self.times[0] == 1 and self.times[-1] == 0):
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
      f"{field.name} {value}"
      for field in dataclasses.fields(self)
      if field.name not in said and (value := getattr(self, field.name)) != field.default
    ]
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
    rule = samplers.rule_of(given.get("sampler", self.sampler))
    for name in of_rule:
      parts.check_known("sampling.", name, names | samplers.fields_of(rule))
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

  `feature_net` names a feature network (see `evaluation.features`); `samples` is the number of
  images on each side, and `reference_samples` another number of real ones (0: the same); KID and
  precision/recall look at the first `subset` images of each side, the latter at their
  `neighbours`-th neighbours. `metrics` are measured beside them, on as many images: each a
  `metrics.Metric`, or its name.
  """

  _group = "evaluation."

  feature_net: str = "tfgan"
  samples: Count = 50_000
  reference_samples: Annotated[int, Range(0, 2**31 - 1)] = 0
  subset: Count = 10_000
  neighbours: Count = 3
  metrics: tuple[metrics.Metric, ...] = ()
