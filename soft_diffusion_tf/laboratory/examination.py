"""Whether a corruption of one's own is well-posed, and which schedule it wants."""

import dataclasses

import numpy as np

from soft_diffusion_tf import (
  corruptions,
  priors,
  samplers,
  schedules,
)
from soft_diffusion_tf.laboratory.grades import NFES, Laboratory, grade_prior
from soft_diffusion_tf.laboratory.processes import level_schedule, strongest, two_stage


@dataclasses.dataclass(frozen=True)
class Trial:
  """What one schedule asks of each sampler: rule → evaluations needed (None: not reached)."""

  schedule: str
  note: str
  floor: float
  bound: float
  needed: dict[str, int | None]
  best: dict[str, float]  # the smallest distance seen


@dataclasses.dataclass(frozen=True)
class Examination:
  """The verdict on a corruption, before any training.

  Attributes:
    verdict: `corruptions.Verdict`.
    smooth: None, or why it is not differentiable in t.
    kept: share of the data's variance that C_1 lets through.
    prior_gaps: prior → its squared Fréchet distance to q_1, and "floor".
    prior: the simplest one within twice the floor, else the best.
    trials: a `Trial` for each schedule.
  """

  verdict: corruptions.Verdict
  smooth: str | None
  kept: float
  prior_gaps: dict[str, float]
  prior: str
  trials: list[Trial]

  @property
  def well_posed(self):
    return self.verdict.ok and any(
      n is not None for trial in self.trials for n in trial.needed.values()
    )

  def __str__(self):
    lines = [str(self.verdict)]
    if not self.verdict.ok:
      return "\n".join([*lines, "not well-posed: mend this first; nothing was sampled"])
    lines.append(f"in t: {self.smooth or 'smooth'}")
    gaps = ", ".join(f"{k} {v:.3g}" for k, v in self.prior_gaps.items())
    lines.append(
      f"C_1 lets {self.kept:.2%} of the variance through; priors, distance to q_1: "
      f"{gaps}; taken: {self.prior}"
    )
    for trial in self.trials:
      lines.append(f"schedule {trial.schedule} ({trial.note}), floor {trial.floor:.3g}:")
      for rule, nfe in trial.needed.items():
        said = f"{nfe} evaluations" if nfe else f"not reached (best {trial.best[rule]:.3g})"
        lines.append(f"  {rule}: {said}")
    if not self.well_posed:
      lines.append("not well-posed: no sampler comes to the data within the evaluations tried")
      return "\n".join(lines)
    nfe, rule, schedule = min(
      (n, rule, trial.schedule) for trial in self.trials for rule, n in trial.needed.items() if n
    )
    lines.append(f"well-posed; take {rule} with {nfe} evaluations and the schedule {schedule}")
    return "\n".join(lines)


def examine(
  corruption,
  images,
  mixture,
  *,
  kinds=("transport", "linear"),
  rules=("momentum", "ddim", "two_step", "stochastic_two_step"),
  nfes=NFES[:13],
  count=1000,
):
  """Whether a corruption is well-posed, which schedule it wants and how many steps: `Examination`.

  Under P's two stages: noise 0.01 → 0.1, then the corruption.
  """
  shape = images.shape[1:]
  first, last = corruption.level_range[0], strongest(corruption, shape[0])
  verdict = corruptions.check_corruption(
    corruption,
    shape if images[0].size <= 256 else (6, 4, shape[2]),
    first + (last - first) * np.array([0.0, 0.05, 0.3, 0.7, 1.0]),
  )
  if not verdict.ok:
    return Examination(verdict, None, float("nan"), {}, "", [])
  linear = two_stage(corruption, schedules.Linear(first, last), shape)
  try:
    samplers.check_smooth(linear)
    smooth = None
  except ValueError:
    smooth = "jumps: no flow carries the data across a jump, so samplers may end elsewhere"
  clean = images.reshape(len(images), -1)
  gone = priors.corrupt_all(images, linear, 1.0).reshape(clean.shape)
  kept = float(gone.var(axis=0).sum() / clean.var(axis=0).sum())
  gaps = {}
  for kind in priors.KINDS:
    result = grade_prior(linear.with_prior(priors.fit(kind, images, linear, 32)), images)
    gaps[kind] = result["frechet"]
    gaps["floor"] = result["frechet_floor"]
  simple = [k for k in ("zero", "blurred_colour", "subspace") if gaps[k] < 2 * gaps["floor"]]
  prior = simple[0] if simple else min(priors.KINDS, key=gaps.get)
  trials = []
  for kind in kinds:
    if kind == "geometric" and not (first > 0 and last > 0):
      continue
    level, note = level_schedule(kind, corruption, first, last, images)
    lab = Laboratory(mixture, two_stage(corruption, level, shape), images, prior, count=count)
    runs = {rule: lab.needed(rule, nfes) for rule in rules}
    trials.append(
      Trial(
        kind,
        note,
        lab.floor.frechet,
        lab.bound(),
        {rule: nfe for rule, (nfe, _) in runs.items()},
        {rule: min(g.frechet for g in grades) for rule, (_, grades) in runs.items()},
      )
    )
  return Examination(verdict, smooth, kept, gaps, prior, trials)
