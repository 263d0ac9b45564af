"""The report of the laboratory: docs/samplers.md with its figures and numbers."""

import json
import pathlib
import sys

from soft_diffusion_tf import files
from soft_diffusion_tf.bin.lab_common import COLOURS, curves, make_lab, number, save, table
from soft_diffusion_tf.bin.lab_precision import section_precision

PAPER = ("momentum", "probability_flow", "ddim", "predictor_corrector")
LADDER = (5, 7, 10, 14, 20, 28, 40, 57, 80)
SHOWN = (5, 10, 20, 40, 80)
REPORT = {"images": 100, "count": 500}  # of the report: what a shared CPU does in minutes


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
      files.write_json(self.path, self.pages, indent=0, sort_keys=True)
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
  return book.get(
    json.dumps(["floor", name, made], sort_keys=True), lambda: [lab().floor.frechet, lab().bound()]
  )


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
    curves(
      axis,
      {k: v for k, v in lines.items() if k != "predictor_corrector"},
      floor,
      title,
      "squared Fréchet distance",
    )
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
      plan = samplers.plan(rule, times, process)
      return sampler(plan, range(16)).numpy().astype(np.float64)

    truth = end("heun", 640)
    return {
      rule: [float(np.sqrt(np.mean((end(rule, n) - truth) ** 2))) for n in steps] for rule in rules
    }

  blur = schedules.Geometric(0.05, 3.0)
  found = {
    "blur and noise": book.get(
      "order blur",
      lambda: measure(corruptions.GaussianBlur(), blur, schedules.Geometric(0.05, 0.5)),
    ),
    "VE": book.get(
      "order ve",
      lambda: measure(
        corruptions.Identity(), schedules.Constant(0.0), schedules.Geometric(0.05, 5.0)
      ),
    ),
    "soft mask": book.get(
      "order mask",
      lambda: measure(
        corruptions.Mask(edge=1.0), schedules.Linear(0.0, 0.7), schedules.Geometric(0.1, 0.5)
      ),
    ),
  }
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
  rows = []
  for axis, (title, errors) in zip(axes, found.items()):
    for rule, values in errors.items():
      axis.plot(
        steps, values, marker="o", markersize=3, color=COLOURS[rule], label=rule.replace("_", " ")
      )
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
  errors = {
    "exact x̂_0": None,
    "5 % of detail missing": ("smooth", 0.05),
    "rough error 0.03": ("rough", 0.03),
  }
  rules = ("momentum", "ddim")
  figure, axes = plt.subplots(2, 3, figsize=(11, 6.6))
  rows, valleys = [], []
  for line, (title, name) in enumerate({"blur": "blur", "VE": "ve"}.items()):
    for axis, (what, error) in zip(axes[line], errors.items()):
      setting = (name, {} if error is None else {"error": error})
      floor, _ = floor_of(book, labs, setting)
      found = {rule: grades_of(book, labs, setting, rule, nfes) for rule in rules}
      curves(
        axis, found, floor, f"{title}: {what}", "squared Fréchet distance" if error is None else ""
      )
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

  cases = [
    ("blur", "naive"),
    ("blur", "momentum"),
    ("blur", "two_step"),
    ("soft_mask", "two_step"),
    ("mask", "two_step"),
    ("ve", "momentum"),
  ]
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
      axis.plot(
        *zip(*line), marker="o", markersize=3, label=grid, color=f"C{samplers.GRIDS.index(grid)}"
      )
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
    line = [
      grades_of(book, labs, (name, {}), "dormand_prince", [0], tolerance=tolerance)[0]
      for tolerance in (1e-2, 1e-3, 1e-4)
    ]
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


def write_report(out, data_dir, anew=False):
  """Writes samplers.md, img/ and results/; goes on from results/samplers.json unless `anew`."""
  from soft_diffusion_tf import laboratory

  img, results = out / "img", out / "results"
  if anew:
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
    "NEEDED": table(
      ["process", *(c.replace("_", " ") for c in columns)],
      [[title, *(row[c] or "–" for c in columns)] for title, row in needs],
    ),
    "ORDER": section_order(book, img),
    "ERRORS": errors,
    "VALLEYS": table(
      ["process", "x̂_0", "sampler", "best at", "last / best"],
      [[*v[:4], f"{v[4]:.2f}"] for v in valleys],
    ),
    "PRIORS": section_priors(book, labs),
    "GRIDS": section_grids(book, labs, img),
    "ADAPTIVE": section_adaptive(book, labs),
    "PRECISION": section_precision(results),
    "PATCHES": section_patches(book, data_dir, REPORT["images"]) or "(CIFAR-10 was not at hand.)",
  }
  text = (pathlib.Path(__file__).parent / "lab_report.md").read_text()
  for name, part in parts.items():
    text = text.replace("{{" + name + "}}", part)
  (out / "samplers.md").write_text(text)
  print(f"{out / 'samplers.md'}, its figures (img) and numbers (results/samplers.json) are written")
