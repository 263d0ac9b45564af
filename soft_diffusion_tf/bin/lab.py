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

from soft_diffusion_tf.bin import cli

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
_STD = flags.DEFINE_float("std", 0.05, "Standard deviation of a component, in [0, 1] pixels.", 1e-4,
                         10.0)  # fmt: skip
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
  _CORRUPTION, _EXAMINE, _DATA, _IMAGES, _COMPONENTS, _STD, *_OF_GRADES, _COUNT, _OUT
)  # fmt: skip

PAPER = ("momentum", "probability_flow", "ddim", "predictor_corrector")
LADDER = (5, 7, 10, 14, 20, 28, 40, 57, 80)
SHOWN = (5, 10, 20, 40, 80)
REPORT = {"images": 100, "count": 500}  # of the report: what a shared CPU does in minutes
COLOURS = {
  "naive": "tab:gray", "momentum": "tab:red", "probability_flow": "tab:orange",
  "ddim": "tab:green", "predictor_corrector": "tab:olive", "ancestral": "tab:pink",
  "two_step": "tab:blue", "stochastic_two_step": "tab:purple", "heun": "tab:brown",
  "langevin": "tab:cyan",
}  # fmt: skip


# --- Pieces ---------------------------------------------------------------------------------------


def corruption_of(name):
  """The corruption of --corruption=name."""
  from soft_diffusion_tf import corruptions

  if ":" in name:
    return corruptions.from_config({"kind": name}, trust_code=True)
  kinds = {
    "blur": corruptions.GaussianBlur(), "heat": corruptions.HeatDissipation(),
    "mask": corruptions.Mask(),
    "soft_mask": corruptions.Mask(edge=1.0), "ve": corruptions.Identity(),
  }  # fmt: skip
  if name not in kinds:
    raise ValueError(
      f"unknown corruption {name!r}; choose one of {', '.join(kinds)} or module:Class"
    )
  return kinds[name]


def make_lab(name, images, labels, *, schedule="transport", prior="", components="image", std=0.05,
             count=1000, error=None):  # fmt: skip
  """A `Laboratory` of one of the project's processes on images."""
  from soft_diffusion_tf import diffusion, laboratory, schedules

  shape, corruption = images.shape[1:], corruption_of(name)
  if name == "ve":
    process = diffusion.Diffusion(
      shape, corruption, schedules.Constant(0.0), schedules.Geometric(0.01, 50.0)
    )
  else:
    first = 0.01 if name in ("blur", "heat") else corruption.level_range[0]
    last = laboratory.strongest(corruption, shape[0])
    level, _ = laboratory.level_schedule(schedule, corruption, first, last, images)
    process = laboratory.two_stage(corruption, level, shape)
  prior = prior or ("subspace" if name in ("blur", "heat") else "zero")
  mixture = laboratory.mixture_of(images, labels, components, std)
  return laboratory.Laboratory(mixture, process, images, prior, count=count, error=error)


def table(header, rows):
  """A Markdown table."""
  lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
  return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def number(value):
  if value is None:
    return "–"
  return f"{value:.3g}" if abs(value) < 1000 else f"{value:.1e}"


def curves(axis, lines, floor=None, title="", ylabel=""):
  """Distance against evaluations, log-log: {name: [(nfe, value)]}."""
  for name, points in lines.items():
    dashed = name == "naive"
    axis.plot(*zip(*points), marker="o", markersize=3, linewidth=1.3, color=COLOURS.get(name),
              label=name.replace("_", " "), linestyle="--" if dashed else "-")  # fmt: skip
  if floor:
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=":", label="floor")
  axis.set(xscale="log", yscale="log", xlabel="evaluations of the denoiser", title=title)
  axis.set_ylabel(ylabel)
  ticks = sorted({x for points in lines.values() for x, _ in points if x % 5 == 0})
  axis.set_xticks(ticks, [str(x) for x in ticks])
  axis.minorticks_off()
  axis.grid(alpha=0.3, linewidth=0.4)


def save(figure, path):
  import matplotlib.pyplot as plt

  figure.tight_layout()
  figure.savefig(path, dpi=85, metadata={"Software": None})
  plt.close(figure)


# --- One setting ----------------------------------------------------------------------------------


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
    _CORRUPTION.value, images, labels, schedule=_SCHEDULE.value, prior=_PRIOR.value,
    components=_COMPONENTS.value, std=_STD.value, count=_COUNT.value,
    error=parse_error(_ERROR.value),
  )  # fmt: skip
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
  facts = {f.name: f.value for f in (_CORRUPTION, _DATA, _IMAGES, _COMPONENTS, _STD, _SCHEDULE,
                                     _PRIOR, _GRID, _K, _NOISE, _ERROR, _COUNT)}  # fmt: skip
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


# --- The report -----------------------------------------------------------------------------------


class Book:
  """Results by name in a JSON file, so that a report that was stopped goes on."""

  def __init__(self, path, facts):
    self.path = path
    try:
      self.pages = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
      self.pages = None
    if not isinstance(self.pages, dict):
      raise ValueError(f"{path}: not a record of this report; delete it to measure anew")
    if self.pages.get("facts") != facts:  # numbers of other conditions
      self.pages = {"facts": facts}

  def get(self, name, make):
    if name not in self.pages:
      print(name, file=sys.stderr, flush=True)
      self.pages[name] = make()
      partial = self.path.with_suffix(".partial")
      partial.write_text(json.dumps(self.pages, indent=0, sort_keys=True) + "\n")
      partial.replace(self.path)
    return self.pages[name]


class Labs:
  """Laboratories by name, made when first asked for."""

  def __init__(self, images, labels):
    self.images, self.labels, self.made = images, labels, {}

  def __call__(self, name, **options):
    key = (name, tuple(sorted(options.items())))
    if key not in self.made:
      self.made[key] = make_lab(name, self.images, self.labels, count=REPORT["count"], **options)
    return self.made[key]


def grades_of(book, labs, setting, rule, nfes, **options):
  """[(nfe, Fréchet)] of a sampler in a setting (name, options of `make_lab`), through the book."""
  name, made = setting
  result = []
  for nfe in nfes:
    key = json.dumps([name, made, rule, nfe, options], sort_keys=True)

    def make(nfe=nfe):
      grade = labs(name, **made).grade(rule, nfe, **options)
      return [grade.nfe, grade.frechet]

    result.append(tuple(book.get(key, make)))
  return result


def needed_of(book, labs, setting, rule, bound, **options):
  """As `Laboratory.needed`, through the book: a number or None."""
  first = None
  for nfe in LADDER:
    ((spent, value),) = grades_of(book, labs, setting, rule, [nfe], **options)
    if value <= bound and first is not None:
      return first
    first = spent if value <= bound else None
  return first


def floor_of(book, labs, setting):
  name, made = setting
  made = {k: v for k, v in made.items() if k != "error"}
  lab = lambda: labs(name, **made)
  return book.get(json.dumps(["floor", name, made], sort_keys=True),
                  lambda: [lab().floor.frechet, lab().bound()])  # fmt: skip


def section_convergence(book, labs, img):
  import matplotlib.pyplot as plt

  settings = {"blur": "blur", "soft mask": "soft_mask", "VE": "ve", "hard mask": "mask"}
  rules = ("naive", *PAPER, "two_step", "stochastic_two_step", "heun")
  figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.4))
  texts, needs = [], []
  for axis, (title, name) in zip(axes.ravel(), settings.items()):
    setting = (name, {})
    floor, bound = floor_of(book, labs, setting)
    lines = {rule: grades_of(book, labs, setting, rule, SHOWN) for rule in rules}
    curves(axis, {k: v for k, v in lines.items() if k != "predictor_corrector"}, floor, title,
           "squared Fréchet distance")  # fmt: skip
    rows = [[rule, *(number(v) for _, v in line)] for rule, line in lines.items()]
    texts.append(f"**{title}** (floor {floor:.3g})\n\n" + table(["evaluations", *SHOWN], rows))
    wanted = {rule: (rule, {}) for rule in rules}
    for grid in ("relative", "transport"):
      wanted[f"two_step, {grid} grid"] = ("two_step", {"grid": grid})
    for what, limit in (("1.1 floors", 1.1 * floor), (f"{bound / floor:.2f} floors", bound)):
      row = {
        column: needed_of(book, labs, setting, rule, limit, **options)
        for column, (rule, options) in wanted.items()
      }
      needs.append((f"{title}, {what}", row))
  axes[0, 0].legend(fontsize=7)
  save(figure, img / "samplers_convergence.png")
  return "\n\n".join(texts), needs


def section_order(book, img):
  """Errors of deterministic samplers against a fine solution, where everything is smooth."""
  import matplotlib.pyplot as plt
  import numpy as np

  from soft_diffusion_tf import corruptions, diffusion, oracles, priors, samplers, schedules

  steps = (10, 20, 40, 80, 160)
  rules = ("probability_flow", "ddim", "predictor_corrector", "two_step", "heun")

  def measure(corruption, level, sigma):
    process = diffusion.Diffusion((8, 8, 1), corruption, level, sigma)
    process = process.with_prior(priors.zero((8, 8, 1)))
    means = np.random.default_rng(0).random([8, 8, 8, 1])
    mixture = oracles.GaussianMixture(means, 0.3)
    sampler = samplers.Sampler(process, oracles.denoiser(mixture, process))

    def end(rule, n):  # away from t = 0, where the last step returns x̂_0
      times = 0.2 + 0.8 * samplers.time_grid(n)
      rows = samplers.plan(rule, times, process)
      return sampler(rows, range(16)).numpy().astype(np.float64)

    truth = end("heun", 640)
    return {
      rule: [float(np.sqrt(np.mean((end(rule, n) - truth) ** 2))) for n in steps] for rule in rules
    }

  blur = schedules.Geometric(0.05, 3.0)
  found = {
    "blur and noise": book.get("order blur", lambda: measure(
      corruptions.GaussianBlur(), blur, schedules.Geometric(0.05, 0.5))),
    "VE": book.get("order ve", lambda: measure(
      corruptions.Identity(), schedules.Constant(0.0), schedules.Geometric(0.05, 5.0))),
    "soft mask": book.get("order mask", lambda: measure(
      corruptions.Mask(edge=1.0), schedules.Linear(0.0, 0.7), schedules.Geometric(0.1, 0.5))),
  }  # fmt: skip
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
  rows = []
  for axis, (title, errors) in zip(axes, found.items()):
    for rule, values in errors.items():
      axis.plot(steps, values, marker="o", markersize=3, color=COLOURS[rule],
                label=rule.replace("_", " "))  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="steps", title=title)
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.minorticks_off()
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    slopes = {}
    for rule, values in errors.items():
      inside = np.array(values) > 3e-6  # below, float32 rounding is what is seen
      x, y = np.log2(np.array(steps)[inside][-4:]), np.log2(np.array(values)[inside][-4:])
      slopes[rule] = -np.polyfit(x, y, 1)[0]
    rows.append([title, *(f"{slopes[rule]:.2f}" for rule in rules)])
  axes[0].set_ylabel("RMS error at t = 0.2")
  axes[0].legend(fontsize=7)
  save(figure, img / "samplers_order.png")
  return table(["order", *rules], rows)


def section_errors(book, labs, img):
  import matplotlib.pyplot as plt

  nfes = (10, 20, 40, 80, 160)
  errors = {"exact x̂_0": None, "5 % of detail missing": ("smooth", 0.05),
            "rough error 0.03": ("rough", 0.03)}  # fmt: skip
  rules = ("momentum", "ddim")
  figure, axes = plt.subplots(2, 3, figsize=(11, 6.6))
  rows, valleys = [], []
  for line, (title, name) in enumerate({"blur": "blur", "VE": "ve"}.items()):
    for axis, (what, error) in zip(axes[line], errors.items()):
      setting = (name, {} if error is None else {"error": error})
      floor, _ = floor_of(book, labs, setting)
      found = {rule: grades_of(book, labs, setting, rule, nfes) for rule in rules}
      curves(axis, found, floor, f"{title}: {what}",
             "squared Fréchet distance" if error is None else "")  # fmt: skip
      for rule in rules:
        values = [v for _, v in found[rule]]
        rows.append([title, what, rule, *map(number, values)])
        best = min(values)
        valleys.append((title, what, rule, nfes[values.index(best)], values[-1] / best))
  axes[0, 0].legend(fontsize=7)
  save(figure, img / "samplers_errors.png")
  return table(["process", "x̂_0", "sampler", *nfes], rows), valleys


def section_drift(book, labs, img):
  import matplotlib.pyplot as plt

  cases = [("blur", "naive"), ("blur", "momentum"), ("blur", "two_step"), ("soft_mask", "two_step"),
           ("mask", "two_step"), ("ve", "momentum")]  # fmt: skip
  figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), sharey=True)
  for axis, (name, rule) in zip(axes.ravel(), cases):
    path = book.get(f"drift {name} {rule}", lambda n=name, r=rule: labs(n).drift(r, 40, frames=20))
    t, got, floor = zip(*path)
    axis.plot(t, got, color=COLOURS[rule], marker="o", markersize=3, label="x_t to q_t")
    axis.plot(t, floor, color="black", linewidth=0.8, linestyle=":", label="floor")
    axis.set(yscale="log", xlabel="t", title=f"{name.replace('_', ' ')}: {rule.replace('_', ' ')}")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
  axes[0, 0].legend(fontsize=8)
  axes[0, 0].set_ylabel("squared Fréchet distance")
  axes[1, 0].set_ylabel("squared Fréchet distance")
  save(figure, img / "samplers_drift.png")


def section_priors(book, labs):
  rows = []
  for prior in ("colour", "zero", "blurred_colour", "subspace"):
    setting = ("blur", {"prior": prior})
    floor, _ = floor_of(book, labs, setting)
    two = grades_of(book, labs, setting, "two_step", (20, 80))
    stochastic = grades_of(book, labs, setting, "momentum", (80,))
    more = grades_of(book, labs, setting, "stochastic_two_step", (80,), noise=4.0)
    rows.append([prior, *(number(v) for _, v in [*two, *stochastic, *more])])
  header = ["prior", "two_step 20", "two_step 80", "momentum 80", "stochastic two_step 80, noise 4"]
  return table(header, rows) + f"\n\nFloor: {floor:.3g}."


def section_grids(book, labs, img):
  import matplotlib.pyplot as plt

  from soft_diffusion_tf import samplers

  settings = {
    "blur, found levels": ("blur", {}),
    "blur, geometric levels": ("blur", {"schedule": "geometric"}),
    "soft mask": ("soft_mask", {}),
    "VE": ("ve", {}),
  }
  nfes = (5, 10, 20)
  figure, axes = plt.subplots(1, 4, figsize=(14, 3.8))
  rows = []
  for axis, (title, setting) in zip(axes, settings.items()):
    floor, _ = floor_of(book, labs, setting)
    for grid in samplers.GRIDS:
      if grid == "level" and setting[0] == "ve":
        continue  # no level: the uniform grid
      line = grades_of(book, labs, setting, "two_step", nfes, grid=grid)
      axis.plot(*zip(*line), marker="o", markersize=3, label=grid,
                color=f"C{samplers.GRIDS.index(grid)}")  # fmt: skip
      rows.append([title, grid, *(number(v) for _, v in line)])
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", title=title, xlabel="evaluations")
    axis.set_xticks(nfes, nfes)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  axes[0].legend(fontsize=7)
  axes[0].set_ylabel("squared Fréchet distance")
  save(figure, img / "samplers_grids.png")
  return table(["two_step", "grid", *nfes], rows)


def section_adaptive(book, labs):
  rows = []
  for name in ("blur", "soft_mask", "ve"):
    floor, _ = floor_of(book, labs, (name, {}))
    line = [grades_of(book, labs, (name, {}), "dormand_prince", [0], tolerance=tolerance)[0]
            for tolerance in (1e-2, 1e-3, 1e-4)]  # fmt: skip
    rows.append([name, number(floor), *(f"{number(v)} ({n})" for n, v in line)])
  return table(["process", "floor", "tolerance 1e-2", "1e-3", "1e-4"], rows)


def section_patches(book, data_dir, images):
  """The blur on patches of real colour images; "" where CIFAR-10 is not at hand."""
  from soft_diffusion_tf import laboratory

  rules = ("naive", "momentum", "ddim", "two_step", "stochastic_two_step")
  nfes = (10, 20)
  made = {}

  def lab():
    if not made:
      made["lab"] = make_lab(
        "blur", *laboratory.load("patches8", images, data_dir), count=REPORT["count"]
      )
    return made["lab"]

  if "patches floor" not in book.pages:
    try:
      lab()
    except ValueError as error:
      print(f"patches are left out: {error}", file=sys.stderr)
      return ""
  floor = book.get("patches floor", lambda: lab().floor.frechet)
  rows = []
  for rule in rules:
    values = book.get(f"patches {rule}", lambda r=rule: [lab().grade(r, n).frechet for n in nfes])
    rows.append([rule, *map(number, values)])
  return table(["evaluations", *nfes], rows) + f"\n\nFloor: {floor:.3g}."


def write_report(out, data_dir):
  """Writes samplers.md, img/ and results/; goes on from results/samplers.json unless --force."""
  from soft_diffusion_tf import laboratory

  img, results = out / "img", out / "results"
  if _FORCE.value:
    (results / "samplers.json").unlink(missing_ok=True)
  book = Book(results / "samplers.json", REPORT)  # a damaged one is refused before anything is made
  for folder in (img, results):
    folder.mkdir(parents=True, exist_ok=True)
  labs = Labs(*laboratory.load("digits", REPORT["images"]))
  convergence, needs = section_convergence(book, labs, img)
  errors, valleys = section_errors(book, labs, img)
  section_drift(book, labs, img)
  columns = list(needs[0][1])
  parts = {
    "CONVERGENCE": convergence,
    "NEEDED": table(["process", *(c.replace("_", " ") for c in columns)],
                    [[title, *(row[c] or "–" for c in columns)] for title, row in needs]),
    "ORDER": section_order(book, img),
    "ERRORS": errors,
    "VALLEYS": table(["process", "x̂_0", "sampler", "best at", "last / best"],
                     [[*v[:4], f"{v[4]:.2f}"] for v in valleys]),
    "PRIORS": section_priors(book, labs),
    "GRIDS": section_grids(book, labs, img),
    "ADAPTIVE": section_adaptive(book, labs),
    "PRECISION": section_precision(results),
    "PATCHES": section_patches(book, data_dir, REPORT["images"]) or "(CIFAR-10 was not at hand.)",
  }  # fmt: skip
  text = (pathlib.Path(__file__).parent / "lab_report.md").read_text()
  for name, part in parts.items():
    text = text.replace("{{" + name + "}}", part)
  (out / "samplers.md").write_text(text)
  print(f"{out / 'samplers.md'}, its figures (img) and numbers (results/samplers.json) are written")


# --- The study of rounded operators ---------------------------------------------------------------

STUDY = {  # data: images, spread of a component, half size of the blur, its last level, samples of
  # a block, blocks at the most
  "crops64": (100, 0.02, 80, 23.0, 50, 20),
  "digits": (100, 0.05, 32, 6.0, 2000, 1),
}
STUDY_NFES = (10, 30, 100, 280, 1000)
STUDY_RECORD = "samplers_precision.json"
STUDY_RULES = ("momentum", "ddim", "two_step")


def study_of(name):
  """The `laboratory.PrecisionStudy` of one of `STUDY`."""
  from soft_diffusion_tf import corruptions, laboratory, priors

  count, std, half_size, last = STUDY[name][:4]
  images, labels = laboratory.load(name, count)
  blur = corruptions.GaussianBlur(half_size)
  level, _ = laboratory.level_schedule("transport", blur, 0.01, last, images)
  process = laboratory.two_stage(blur, level, images.shape[1:])
  process = process.with_prior(priors.fit("subspace", images, process, 32))
  mixture = laboratory.mixture_of(images, labels, "image", std)
  return laboratory.PrecisionStudy(mixture, process)


def draw_study(out, minutes, names=tuple(STUDY)):
  """Draws block after block of samples into `out`, where they stay for the next call."""
  import itertools
  import time

  import numpy as np

  from soft_diffusion_tf import laboratory

  out.mkdir(parents=True, exist_ok=True)
  studies = {name: study_of(name) for name in names}
  end = time.monotonic() + 60 * minutes
  for block in range(max(STUDY[name][5] for name in names)):
    for nfe, name in itertools.product(STUDY_NFES, names):
      size, blocks = STUDY[name][4:]
      if block >= blocks:
        continue
      for rule, kind in itertools.product(STUDY_RULES, laboratory.PRECISIONS):
        path = out / f"{name}-{rule}-{nfe}-{kind}-{block}.npy"
        if path.exists():
          continue
        if time.monotonic() > end:
          return
        seeds = range(block * size, (block + 1) * size)
        images = studies[name].sample(kind, rule, nfe, seeds)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
          np.save(file, images)
        partial.replace(path)


def grade_study(out, names=tuple(STUDY)):
  """What the blocks in `out` say, {data: {...}}: a row for what stands beside exact operators."""
  import numpy as np

  from soft_diffusion_tf import laboratory

  record = {}
  for name in names:
    study, rows = study_of(name), []
    for nfe, rule in ((nfe, rule) for nfe in STUDY_NFES for rule in STUDY_RULES):
      paths = {
        kind: [out / f"{name}-{rule}-{nfe}-{kind}-{block}.npy" for block in range(STUDY[name][5])]
        for kind in laboratory.PRECISIONS
      }
      blocks = {kind: sum(path.exists() for path in there) for kind, there in paths.items()}
      blocks = {kind: count for kind, count in blocks.items() if count}
      if len(blocks) < 2 or "exact" not in blocks:
        continue
      count = min(blocks.values())
      drawn = {k: np.concatenate([np.load(path) for path in paths[k][:count]]) for k in blocks}
      for kind, images in drawn.items():
        difference = images - drawn["exact"]
        rows.append({
          "nfe": nfe, "rule": rule, "kind": kind, "n": len(images),
          "frechet": study.frechet(images), "rms": study.rms(difference),
          "bias": study.rms(difference.mean(0, keepdims=True)),
        })  # fmt: skip
    if not rows:
      continue
    sizes = sorted({row["n"] for row in rows})
    fresh = {n: [study.frechet(study.mixture.draw(n, seed=s)) for s in range(2, 6)] for n in sizes}
    clean = study.mixture.draw(64, seed=9)
    record[name] = {
      "facts": dict(zip(("images", "std", "half_size", "last"), STUDY[name])),
      "rows": rows,
      "floors": {str(n): [float(np.mean(v)), float(np.std(v, ddof=1))] for n, v in fresh.items()},
      "one_blur": {  # RMS and largest error over the times
        kind: np.max([study.one_blur(clean, kind, t) for t in np.linspace(0.2, 1, 17)], 0).tolist()
        for kind in laboratory.PRECISIONS[1:]
      },
      "data_rms": study.rms(clean),
    }  # fmt: skip
  return record


def section_precision(results):
  """The study's tables, from `samplers_precision.json` in the report's results."""
  from soft_diffusion_tf import laboratory

  path = results / STUDY_RECORD
  if not path.exists():
    return "(The study has not been run.)"
  parts = []
  bands = laboratory.PrecisionStudy.BANDS
  for name, found in json.loads(path.read_text()).items():
    facts, rows = found["facts"], {(r["rule"], r["kind"], r["nfe"]): r for r in found["rows"]}
    nfes = sorted({nfe for _, _, nfe in rows})
    counts = ", ".join(sorted({str(r["n"]) for r in rows.values()}, key=int))
    floors = "; ".join(f"{v[0]:.4g} ± {v[1]:.2g}" for v in found["floors"].values())
    blurs = "; ".join(f"{k}: RMS {v[0]:.2g}, one pixel {v[1]:.2g}" for k, v in
                      found["one_blur"].items())  # fmt: skip
    title = (
      f"**{name}** ({facts['images']} images, spread {facts['std']}, blur to {facts['last']:g} "
      f"pixels with half size {facts['half_size']}; N = {counts}; fresh draws get {floors}; the "
      f"worst single blur, {blurs})"
    )
    cell = lambda key, read, rows=rows: read(rows[key]) if key in rows else ""
    distances = [
      [rule, kind, *(cell((rule, kind, n), lambda r: f"{r['frechet']:.5g}") for n in nfes)]
      for rule in STUDY_RULES for kind in laboratory.PRECISIONS
    ]  # fmt: skip
    apart = [
      [rule, kind, nfe, *(f"{v:.2g}" for v in rows[rule, kind, nfe]["rms"])]
      for rule in STUDY_RULES for kind in laboratory.PRECISIONS[1:] for nfe in nfes
      if (rule, kind, nfe) in rows
    ]  # fmt: skip
    parts += [
      title,
      "Squared Fréchet distance:",
      table(["sampler", "operators", *nfes], [r for r in distances if any(r[2:])]),
      "RMS difference from exact operators' images, by frequency (shares of the highest); the "
      f"data's own RMS there: {', '.join(f'{v:.2g}' for v in found['data_rms'])}:",
      table(["sampler", "operators", "evaluations", *bands], apart),
    ]
  return "\n\n".join(parts)


def _examined():
  return _EXAMINE.value or ":" in _CORRUPTION.value


def _check():
  cli.check_folder(_REPORT.value or _OUT.value or ".", "report" if _REPORT.value else "out")
  if _REPORT.value:
    cli.refuse(_OF_LAB, "the report has settings of its own")
  elif _OUT.value is None:
    raise ValueError("give --out=DIR, or --report=docs")
  elif _STUDY.value:
    cli.refuse([f for f in _OF_LAB if f is not _OUT], "the study has settings of its own")
  else:
    cli.refuse_to_overwrite(pathlib.Path(_OUT.value) / "lab.json", _FORCE.value)
    if _examined():
      cli.refuse(_OF_GRADES, "an examination tries samplers and schedules by itself")
    numbers(_NFE.value, "nfe")
    parse_error(_ERROR.value)


def main():
  from soft_diffusion_tf import laboratory

  if _REPORT.value:
    write_report(pathlib.Path(_REPORT.value), _DATA_DIR.value)
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
