"""Grades samplers, schedules, priors and corruptions exactly, without training anything.

  soft-diffusion-lab --corruption=blur --samplers=momentum,two_step --nfe=10,20,40 --out=DIR
  soft-diffusion-lab --corruption=my_module:MyCorruption --out=DIR
  soft-diffusion-lab --report=docs --force
  soft-diffusion-lab --study=precision --minutes=40 --out=DIR

The first grades samplers; the second says whether a corruption of your own is well-posed, which
schedule it wants and how many steps; the third writes docs/samplers.md again, with its figures; the
fourth samples with operators as a GPU or a TPU multiplies that nobody told otherwise.
Data is a mixture of Gaussians around real images, whose denoiser is known in closed form.
"""

import json
import os
import pathlib
import sys

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli
from soft_diffusion_tf.bin.lab_common import corruption_of, curves, make_lab, number, save, table
from soft_diffusion_tf.bin.lab_precision import STUDY_RECORD, draw_study, grade_study
from soft_diffusion_tf.bin.lab_report import write_report

_CORRUPTION = flags.DEFINE_string(
  "corruption", "blur", "blur, heat, mask, soft_mask, ve, or module:Class of your own (examined)."
)
_EXAMINE = flags.DEFINE_bool("examine", False, "Examine a corruption of the project, too.")
_DATA = flags.DEFINE_string("data", "digits", "digits, patches8 or patches16 (of CIFAR-10).")
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps CIFAR-10, for patches.")
_IMAGES = flags.DEFINE_integer(
  "images", 450, "Images that the mixture is built around.", 2, 100_000
)
_COMPONENTS = flags.DEFINE_string("components", "image", "A Gaussian per image, or per class.")
_STD = flags.DEFINE_float(
  "std", 0.05, "Standard deviation of a component, in [0, 1] pixels.", 1e-4, 10.0
)
_SCHEDULE = flags.DEFINE_string("schedule", "transport", "transport, linear or geometric levels.")
_PRIOR = flags.DEFINE_string(
  "prior", "", "Prior; by default subspace for blur and heat, else zero."
)
_SAMPLERS = flags.DEFINE_string(
  "samplers", "naive,momentum,probability_flow,ddim,two_step", "Samplers, pairs as ddim+momentum."
)
_NFE = flags.DEFINE_string("nfe", "5,10,20,40,80,160", "Evaluations of the denoiser.")
_GRID = flags.DEFINE_string("grid", "uniform", "Time grid; see samplers.time_grid.")
_K = flags.DEFINE_float("k", 0.0, "Fresh noise of a ddim step (P Eq. 52).", 0.0)
_NOISE = flags.DEFINE_float("noise", 1.0, "How much noise stochastic_two_step exchanges.", 0.0)
_ERROR = flags.DEFINE_string("error", "", "kind:size of an error in x̂_0; see oracles.noisy.")
_COUNT = flags.DEFINE_integer("count", 1000, "Samples per grade.", 2, 1_000_000)
_OUT = cli.define_path("out", None, "Folder for lab.md, lab.json and lab.png.")
_REPORT = cli.define_path("report", None, "Folder to write samplers.md, img/ and results/ into.")
_STUDY = flags.DEFINE_enum(
  "study", None, ["precision"], "Rather measure what rounded operators cost; goes on in --out."
)
_MINUTES = flags.DEFINE_float("minutes", 40.0, "How long a study draws samples.", 0.0, 1e6)
_FORCE = flags.DEFINE_bool("force", False, "Replace what is at --out; measure a report anew.")
_OF_GRADES = (_SCHEDULE, _PRIOR, _SAMPLERS, _NFE, _GRID, _K, _NOISE, _ERROR)  # not of --examine
_OF_LAB = (  # nor are these of --report
  _CORRUPTION,
  _EXAMINE,
  _DATA,
  _IMAGES,
  _COMPONENTS,
  _STD,
  *_OF_GRADES,
  _COUNT,
  _OUT,
)


def numbers(text, name):
  try:
    values = [int(part) for part in text.split(",")]
  except ValueError:
    values = [0]
  if min(values) < 1:
    raise ValueError(f"--{name}={text}: give positive whole numbers such as 10,20,40")
  return values


def parse_error(text):
  """ "smooth:0.05" → ("smooth", 0.05); "" → None."""
  if not text:
    return None
  kind, _, size = text.partition(":")
  try:
    return kind, float(size)
  except ValueError:
    raise ValueError(f"--error={text}: give kind:size such as smooth:0.05") from None


def grade_samplers(images, labels):
  import dataclasses

  import matplotlib.pyplot as plt

  from soft_diffusion_tf import samplers
  from soft_diffusion_tf.parts import kind_of, split

  names = split(_SAMPLERS.value, ",")
  rules = {name: samplers.rule_of(name) for name in names}
  nfes = numbers(_NFE.value, "nfe")
  if _CORRUPTION.value == "ve":
    cli.refuse([_SCHEDULE], "VE has no levels to schedule")
  turns = {kind_of(turn) for rule in rules.values() for turn in rule.turns}
  if "ddim" not in turns:
    cli.refuse([_K], "k is of ddim alone")
  if "stochastic_two_step" not in turns:
    cli.refuse([_NOISE], "--noise is of stochastic_two_step alone")
  lab = make_lab(
    _CORRUPTION.value,
    images,
    labels,
    schedule=_SCHEDULE.value,
    prior=_PRIOR.value,
    components=_COMPONENTS.value,
    std=_STD.value,
    count=_COUNT.value,
    error=parse_error(_ERROR.value),
  )
  rows, record, lines = [], [], {}
  floor = lab.floor
  options = {"k": _K.value, "noise": _NOISE.value}
  for name in names:
    for nfe in nfes[:1] if rules[name].adaptive else nfes:
      grade = lab.grade(name, nfe, _GRID.value, full=True, **options)
      record.append({"sampler": name, **dataclasses.asdict(grade)})
      lines.setdefault(name, []).append((grade.nfe, grade.frechet))
      rows.append([name, grade.nfe, *map(number, dataclasses.astuple(grade)[1:])])
  rows.append(["floor", "", *map(number, dataclasses.astuple(floor)[1:])])
  header = ["sampler", "evaluations", "Fréchet", "sliced W₂²", "frequency error", "Sinkhorn"]
  last = "two_step" if rules[names[-1]].adaptive else names[-1]
  drift = lab.drift(last, nfes[-1], grid=_GRID.value, **options)
  text = (
    f"# {_CORRUPTION.value} on {_DATA.value}\n\n{table(header, rows)}\n\n"
    f"Drift of {last} at {nfes[-1]} evaluations, Fréchet distance of x_t to q_t:\n\n"
    + table(["t", "x_t", "floor"], [[f"{t:.2f}", number(d), number(f)] for t, d, f in drift])
  )
  figure, axis = plt.subplots(figsize=(6, 4.2))
  curves(axis, lines, floor.frechet, _CORRUPTION.value, "squared Fréchet distance")
  axis.legend(fontsize=8)
  facts = {
    f.name: f.value
    for f in (
      _CORRUPTION,
      _DATA,
      _IMAGES,
      _COMPONENTS,
      _STD,
      _SCHEDULE,
      _PRIOR,
      _GRID,
      _K,
      _NOISE,
      _ERROR,
      _COUNT,
    )
  }
  return (
    text,
    {**facts, "grades": record, "floor": dataclasses.asdict(floor), "drift": drift},
    figure,
  )


def examine(images, labels):
  import dataclasses

  import matplotlib.pyplot as plt

  from soft_diffusion_tf import laboratory

  name = _CORRUPTION.value
  corruption = corruption_of(name)
  mixture = laboratory.mixture_of(images, labels, _COMPONENTS.value, _STD.value)
  result = laboratory.examine(corruption, images, mixture, count=_COUNT.value)
  record = {
    **{k: getattr(result, k) for k in ("smooth", "kept", "prior_gaps", "prior", "well_posed")},
    "failures": result.verdict.failures,
    "trials": [dataclasses.asdict(trial) for trial in result.trials],
  }
  figure, axis = plt.subplots(figsize=(6, 3.2))
  labels = [f"{rule}\n{trial.schedule}" for trial in result.trials for rule in trial.needed]
  heights = [n or 0 for trial in result.trials for n in trial.needed.values()]
  axis.bar(range(len(labels)), heights, color="tab:blue")
  axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
  axis.set(ylabel="evaluations needed", title=f"{name} (no bar: not reached)")
  return f"# {name}\n\n```\n{result}\n```", record, figure


def _examined():
  return _EXAMINE.value or ":" in _CORRUPTION.value


def _check():
  files.check_folder(_REPORT.value or _OUT.value or ".", "report" if _REPORT.value else "out")
  if _REPORT.value:
    cli.refuse(_OF_LAB, "the report has settings of its own")
  elif _OUT.value is None:
    raise ValueError("give --out=DIR, or --report=docs")
  elif _STUDY.value:
    cli.refuse([f for f in _OF_LAB if f is not _OUT], "the study has settings of its own")
  else:
    files.check_file(pathlib.Path(_OUT.value) / "lab.json", _FORCE.value)
    if _examined():
      cli.refuse(_OF_GRADES, "an examination tries samplers and schedules by itself")
    numbers(_NFE.value, "nfe")
    parse_error(_ERROR.value)


def main():
  from soft_diffusion_tf import laboratory

  if _REPORT.value:
    write_report(pathlib.Path(_REPORT.value), _DATA_DIR.value, _FORCE.value)
    return
  out = pathlib.Path(_OUT.value)
  if _STUDY.value:
    draw_study(out, _MINUTES.value)
    (out / STUDY_RECORD).write_text(json.dumps(grade_study(out), indent=0) + "\n")
    print(f"{out / STUDY_RECORD} is written; --report=FOLDER reads it in FOLDER/results")
    return
  sys.path.insert(0, os.getcwd())  # a user's module lies where he stands
  images, labels = laboratory.load(_DATA.value, _IMAGES.value, _DATA_DIR.value)
  text, record, figure = (examine if _examined() else grade_samplers)(images, labels)
  out.mkdir(parents=True, exist_ok=True)
  (out / "lab.md").write_text(text + "\n\n![distances](lab.png)\n")
  (out / "lab.json").write_text(json.dumps(record, indent=1) + "\n")
  save(figure, out / "lab.png")
  print(text)


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
