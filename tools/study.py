"""The paper's claims as orderings, at a size that one machine can carry.

  python tools/study.py --study=digits --out=runs/study_digits

A study trains every model of a claim with several seeds, samples each with several samplers and
numbers of network evaluations (NFE), and writes a scoreboard: a row per claim with the values of
every seed and a verdict. All models share one set of hyper-parameters; only what the claim is about
differs. What is done is on disk, model by model and value by value: the same command goes on after
a kill. Results are in OUT/results/*.jsonl, tables in OUT/report.md, plots beside it. The folders of
docs/results hold the models and results of our own runs: a copy of one as OUT goes on from there.
"""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import typing
import zlib

import numpy as np
import scipy.stats
from absl import flags

from soft_diffusion_tf import corruptions, files, losses, priors, samplers, schedules
from soft_diffusion_tf.bin import cli
from soft_diffusion_tf.experiment import (
  Data,
  Experiment,
  Network,
  Training,
  from_file,
)

ROOT = pathlib.Path(__file__).parents[1]
MAIN = "blur"
PRINTED = "printed_loss"
STRATIFIED = "stratified_t"
UNWEIGHTED = "unweighted"
VE = "ve_score"
RETIRED = {"ve": "ve (as a residual)"}  # models of older records, not in their authors' form
MODELS_FILE = "models.json"
PRIORS = ("blurred_colour", "subspace", "colour")

if __name__ == "__main__":  # tests import this file, and a flag can be defined but once
  _STUDY = flags.DEFINE_string("study", "digits", "Which one: digits, cifar, defaults or mixtures.")
  _OUT = cli.define_path("out", None, "Folder of the study.", required=True)
  _WORKERS = flags.DEFINE_integer("workers", 2, "Processes at once, of one thread each.", 1, 1024)
  _DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")
  _FEATURE_NET = flags.DEFINE_string("feature_net", "", "Feature network instead of the study's.")
  _JOB = flags.DEFINE_string("job", None, "Do this one job only (what a worker does).")
  _REPORT = flags.DEFINE_bool("report", False, "Only write the report of what is done so far.")


# --- What is studied ------------------------------------------------------------------------------


class Draw(typing.NamedTuple):
  """How samples are made: the prior is the experiment's own or of another kind of `PRIORS`, the
  grid one of `samplers.GRIDS`.
  """

  sampler: str = "momentum"
  prior: str = "own"
  grid: str = "uniform"


@dataclasses.dataclass(frozen=True)
class Study:
  """Models by name, what each is sampled with, what judges the samples, and what is claimed.

  Attributes:
    models: name → `Experiment`; the training seed comes from `seeds`.
    sweeps: name → {`Draw`: NFEs}.
    splits: real images to compare with; the first is the one that claims are judged by.
    samples: images per value, the same for all; `batch` of them side by side.
    once: models that are trained with the first seed alone.
  """

  name: str
  models: dict
  sweeps: dict
  seeds: tuple
  samples: int
  feature_net: str
  splits: tuple = ("train",)
  batch: int = 128
  claims: tuple = ()
  once: frozenset = frozenset()


def open_study(name, out):
  """The study by name; its models are worked out once and then read from OUT/models.json.

  Raises:
    ValueError: an unknown name, or a folder that holds another study.
  """
  if name not in STUDIES:
    raise ValueError(f"unknown study {name!r}; choose one of {', '.join(STUDIES)}")
  path = out / MODELS_FILE
  if path.exists():
    try:
      content = json.loads(path.read_text(encoding="utf-8"))
      theirs, models = content["study"], dict(content["models"])
    except (ValueError, KeyError, TypeError, RecursionError):
      raise ValueError(
        f"{path}: not a record of a study; delete it or give another --out"
      ) from None
    if theirs != name:
      raise ValueError(f"{out} holds the study {theirs!r}; give another --out")
    models = {k: Experiment.from_config(v) for k, v in models.items()}
    return STUDIES[name](models)
  study = STUDIES[name]()
  write_models(study, out)
  return study


def write_models(study, out):
  """Writes OUT/models.json: what is trained, those that an older record lacks too."""
  content = {"study": study.name, "models": {k: e.to_dict() for k, e in study.models.items()}}
  out.mkdir(parents=True, exist_ok=True)
  path = out / MODELS_FILE
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
  partial.replace(path)


def _ve(base, stop):
  """Song et al.'s VE model: the network gives the score, and is told σ, by which it divides."""
  return base.replace(
    corruption=corruptions.Identity(),
    level=schedules.Constant(0.0),
    sigma=schedules.Geometric(0.01, stop),
    prior=priors.Zero(),
    network={"prediction": "score", "scale_by_sigma": True, "cond_min": 0.01, "cond_max": stop},
  )


def _vp(base, sigma, **network):
  """A VP model: the network gives the noise; images in [0, 1] have half of the published σ."""
  told = {"prediction": "noise", "conditioning": "vp_label", "embedding_type": "positional"}
  return base.replace(
    corruption=corruptions.Scale(),
    level=schedules.VPScale(),
    sigma=schedules.Scaled(sigma, 0.5),
    prior=priors.Zero(),
    loss={"kind": "SoftScoreMatching"},
    network=told | {"centered": True} | network,
  )


def _ihdm(base, steps=200):
  """Inverse heat dissipation as in configs/digits_ihdm.py, up to the blur of `base`."""
  levels = (0.0, *np.geomspace(0.5, schedules.ends(base.level)[1], steps).tolist())
  return base.replace(
    corruption=corruptions.HeatDissipation(),
    level=schedules.piecewise(levels),
    sigma=schedules.Constant(0.01),
    loss={"kind": "SoftScoreMatching", "weight": "one", "look_ahead": 1 / steps},
  )


def _blurring(base):
  """Blurring Diffusion as in configs/digits_blurring.py, up to the blur of `base`."""
  corruption = corruptions.Compose(
    corruptions.HeatDissipation(floor=0.001),
    corruptions.Scale(),
    schedules.SineSquared(schedules.ends(base.level)[1]),
    schedules.CosineScale(),
  )
  vp = _vp(base, schedules.CosineSigma(), fir=False, progressive_input="none")
  return vp.replace(corruption=corruption, level=schedules.Linear(0.0, 1.0))


OWN_SAMPLERS = {  # that a rival's authors draw by
  VE: ("langevin",),
  "ddpmpp": ("ancestral", "ddim"),
  "subvp": ("ancestral", "ddim"),
  "ihdm": ("naive(size=1.25)",),
  "blurring": ("ancestral", "ddim"),
}


def _with_rivals(models):
  """Models read from a record, and those of this study that it lacks, made from what it has."""
  base = models[MAIN]
  lacking = {
    "ddpmpp": _vp(base, schedules.VPSigma(), fir=False, progressive_input="none"),
    "subvp": _vp(base, schedules.SubVPSigma()),
    "cold": base.replace(
      level=base.level.inner, sigma=schedules.Constant(0.0), loss={"kind": "AbsoluteError"}
    ),
    "ihdm": _ihdm(base),
    "blurring": _blurring(base),
  }
  if VE not in models:
    lacking = {VE: _ve(base, schedules.ends(models["ve"].sigma)[1])} | lacking
  return models | {name: e for name, e in lacking.items() if name not in models}


def _sigma(start, stop):
  return schedules.Staged(schedules.Geometric(start, stop), 0.0, 0.2)


def _unweighted(base):
  return base.replace(loss={"weight": "one"})


def variants(base, mse_levels, ve_stop):
  """The models of the claims, as changes of one experiment with P's blur process.

  The experiment's loss looks ahead; that of P as printed and the unfiltered one are models too.
  """
  last = schedules.ends(base.sigma)[1]
  return {
    MAIN: base,
    PRINTED: base.replace(loss={"look_ahead": 0.0}),
    "unfiltered": base.replace(loss={"look_ahead": 0.0, "filtered": False}),
    "mse": base.replace(level=schedules.Staged(mse_levels, 0.2, 1.0)),
    VE: _ve(base, ve_stop),
    "sigma_005": base.replace(sigma=_sigma(0.01, last / 2)),
    "sigma_0025": base.replace(sigma=_sigma(0.01, last / 4)),
    "noise_throughout": base.replace(sigma=schedules.Geometric(0.01, last)),
  }


def _digits_base(name):
  quick = from_file(ROOT / "configs" / "digits_blur.py")
  return quick.replace(
    name=name,
    network={"nf": 16, "num_res_blocks": 1},
    loss={"weight": "inverse_variance"},
    training={
      "steps": 6000,
      "ema_decay": 0.999,
      "sample_every": 0,
      "checkpoint_every": 1000,
      "keep": 1,
      "log_every": 100,
    },
    prior=priors.BlurredColour(),
  )


def digits(models=None):
  """8×8 digits, every claim, three training seeds; some hours on two cores."""
  if models is None:
    base = _digits_base("study_digits")
    masked = from_file(ROOT / "configs" / "digits_mask.py")
    models = variants(base, _mse_levels(base), _largest_distance(base))
    models["mask"] = base.replace(corruption=masked.corruption, level=masked.level)
  models = _with_rivals(models)
  sweeps = _sweeps(models, LADDER, LADDER[:4], (600, 1000))
  return Study(
    "digits", models, sweeps, (0, 1, 2), 1792, "classifier", ("all",), claims=PAPER_CLAIMS
  )


LADDER = (10, 25, 50, 100, 200, 400)  # numbers of evaluations


def _sweeps(models, ladder, few, beyond=()):
  """One ladder of evaluations, the same samplers and the same priors for every model.

  Retired models are measured no further. Beside them rivals have their authors' samplers, and the
  main model has P's others.

  Args:
    ladder: for P's samplers.
    few: for `two_step`, which is done sooner.
    beyond: further rungs, to look for an optimum of the main model's samplers.
  """
  same = {
    Draw(): ladder,
    Draw("two_step"): few,
    Draw("two_step", prior="subspace"): few,
  }
  sweeps = {name: {} if name in RETIRED else dict(same) for name in models}
  for name, own in OWN_SAMPLERS.items():
    sweeps[name] |= {Draw(sampler): ladder for sampler in own}
  sweeps[PRINTED] |= {Draw("naive"): ladder}
  sweeps[MAIN] |= {
    Draw(): (*ladder, *beyond),
    Draw("naive"): ladder,
    Draw("probability_flow"): (*ladder, *beyond),
    Draw("ddim"): (*ladder, *beyond),
    Draw("predictor_corrector"): ladder,
    Draw("two_step", grid="level"): few,
    Draw(prior="subspace"): ladder,
    Draw(prior="colour"): (50,),
  }
  return sweeps


def defaults(models=None):
  """What P leaves open: how t is drawn, the loss's weight, the sampler's time grid; on digits."""
  if models is None:
    base = _digits_base("study_defaults")
    models = {
      MAIN: base,
      STRATIFIED: base.replace(training={"low_variance_t": True}),
      UNWEIGHTED: _unweighted(base),
    }
  sweeps = {name: {Draw(): (50, 100), Draw("two_step"): (20,)} for name in models}
  for grid in samplers.GRIDS:
    sweeps[MAIN] |= {Draw(grid=grid): (25, 50, 100), Draw("two_step", grid=grid): (10, 20)}
  return Study(
    "defaults", models, sweeps, (0, 1, 2), 1792, "classifier", ("all",), claims=OPEN_CLAIMS
  )


MIXTURES = {"look_ahead_03": {"look_ahead": 0.3}} | {
  f"mixture_{share:.2g}".replace(".", ""): {"kind": "Mixture", "share": share}
  for share in (0.03, 0.1, 0.3)
}  # losses beside those of the paper


def mixtures(models=None):
  """Which loss is as good as the better of the filtered and the unfiltered one; on digits."""
  if models is None:
    base = _digits_base("study_mixtures")
    models = {
      MAIN: base,
      PRINTED: base.replace(loss={"look_ahead": 0.0}),
      "unfiltered": base.replace(loss={"look_ahead": 0.0, "filtered": False}),
    } | {name: base.replace(loss=loss) for name, loss in MIXTURES.items()}
  same = {Draw(): LADDER[1:4], Draw("two_step", prior="subspace"): LADDER[:3]}
  return Study(
    "mixtures",
    models,
    {name: dict(same) for name in models},
    (0, 1, 2),
    1792,
    "classifier",
    ("all",),
    claims=MIXTURE_CLAIMS,
  )


def cifar(models=None):
  """Real CIFAR-10 at 16×16 with a reduced NCSN++; hours.

  At 32×32 the same network costs four times as much: eight models of equal training would have a
  quarter of the steps, and none of them would be good enough for its ordering to mean anything.
  """
  blur = corruptions.GaussianBlur(half_size=32)
  base = Experiment(
    name="study_cifar",
    corruption=blur,
    level=schedules.Staged(schedules.Geometric(0.01, 9.0), 0.2, 1.0),
    sigma=_sigma(0.01, 0.1),
    data=Data(name="cifar10", image_shape=(16, 16, 3)),
    prior=priors.BlurredColour(),
    network=Network(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,)),
    loss=losses.SoftScoreMatching(look_ahead=0.1),
    training=Training(
      batch_size=64,
      steps=8000,
      learning_rate=1e-3,
      warmup_steps=500,
      ema_decay=0.999,
      log_every=100,
      checkpoint_every=500,
      keep=1,
      keep_every=0,
      sample_every=0,
    ),
  )
  if models is None:
    mse = _mse_levels(base)
    base = base.replace(level=schedules.Staged(_transport_levels(base), 0.2, 1.0))
    models = variants(base, mse, _largest_distance(base))
    models[UNWEIGHTED] = _unweighted(base)
  models = _with_rivals(models)
  sweeps = _sweeps(models, LADDER[:5], LADDER[:3])
  # Rows 1 to 4 rest on these.
  often = {MAIN, PRINTED, "unfiltered", "mse", VE}
  return Study(
    "cifar",
    models,
    sweeps,
    (0, 1, 2),
    5000,
    "efficientnet_lite0",
    ("train", "test"),
    250,
    (*PAPER_CLAIMS, WEIGHT_CLAIM),
    once=frozenset(models) - often,
  )


def _images(experiment, count=2000):

  d = experiment.data
  source = d.load(progress=False)
  return source.floats(slice(0, count))


def _largest_distance(experiment):
  """σ_max of the VE process: the largest distance between two images (Song and Ermon 2020)."""
  images = _images(experiment)[:1000].reshape(-1, math.prod(experiment.data.image_shape))
  squares = np.sum(images**2, axis=1)
  gaps = squares[:, None] + squares[None, :] - 2 * images @ images.T
  return float(np.round(np.sqrt(gaps.max()), 1))


def _transport_levels(experiment, nodes=32):
  from soft_diffusion_tf import transport

  first, last = schedules.ends(experiment.level)
  path, _ = transport.find(
    experiment.corruption, _images(experiment), first, last, count=128, nodes=nodes
  )
  return schedules.piecewise(path.levels)


def _mse_levels(experiment, nodes=32):
  """Levels of Eq. 55: the blur's MSE decays like the VE process's."""
  from soft_diffusion_tf import transport

  first, last = schedules.ends(experiment.level)
  ve = schedules.Geometric(0.01, _largest_distance(experiment))
  levels = transport.mse_matched(
    experiment.corruption, _images(experiment), first, last, experiment.sigma, ve, nodes
  )
  return schedules.piecewise(levels)


# --- One job: a model and a seed ------------------------------------------------------------------


def job(study, name, seed, out):
  """Trains the model with the seed and measures what is not yet measured."""

  with files.lock(out / "locks" / f"{name}-{seed}", wait=True):  # of a killed study's worker
    _job(study, name, seed, out)


def _job(study, name, seed, out):
  from soft_diffusion_tf import evaluation, plots, priors, training
  from soft_diffusion_tf.evaluation import features

  path, done = out / "results" / f"{name}-{seed}.jsonl", out / "done" / f"{name}-{seed}"
  records = all_records(out)
  mine = [r for r in records if (r["model"], r["seed"]) == (name, seed)]
  measured = {(draw_of(r), r["nfe"]) for r in mine}
  todo = [
    (draw, nfe)
    for draw, nfes in study.sweeps[name].items()
    for nfe in nfes
    if (draw, nfe) not in measured
  ]
  todo.sort(key=lambda one: one[1])  # the cheap ones first: a table is of use early
  if not todo:  # as where results came without their checkpoints
    _mark(done)
    return
  workdir = out / "models" / f"{name}-{seed}"
  experiment = study.models[name].replace(seed=seed, name=f"{study.name}_{name}")
  d = experiment.data

  def load(split):
    return d.load(split, progress=False)

  source = load(d.train_split)
  judge = out / "judge"  # kept with the results: a classifier trained elsewhere is another one
  with files.lock(judge, wait=True):
    network = features.feature_network(study.feature_net, source, progress=False, folder=judge)
  check_judge([*records, {"judge": network.label, "judge_sha256": network.digest}])
  run = training.train(experiment, workdir, progress=False)
  real = {}
  for split in study.splits:
    about = evaluation.conditions_of(network, d.name, split, d.image_shape, d.crop, study.samples)
    images = source.images if split == d.train_split else load(split).images
    real[split] = evaluation.reference(
      network, images, about, folder=out / "references", progress=False
    )
  own = run.diffusion
  processes = {"own": own}
  clean = source.floats(slice(0, training.PRIOR_IMAGES))
  for kind in PRIORS:
    processes[kind] = own.with_prior(priors.fit(kind, clean, own, 16))
  sampler = samplers.Sampler(own, run.denoiser())
  # Other seeds than any other model's: the samples of two models are then independent, and a new
  # model changes nothing for those that are there.
  first = 1_000_000 * (1 + seed) + 10_000_000 * zlib.crc32(name.encode())
  for draw, nfe in todo:
    begin = time.process_time()
    times = samplers.time_grid(samplers.steps_for(draw.sampler, nfe), draw.grid, own, images=clean)
    plan = samplers.plan(draw.sampler, times, own)

    def batches(start, plan=plan, process=processes[draw.prior]):
      for k in range(start, study.samples, study.batch):
        seeds = np.arange(first + k, first + k + study.batch)
        images = sampler(plan, seeds, process.draw_prior(seeds)).numpy()
        # As 8-bit images, like the real ones; NaN stays, for `measure` to name.
        yield plots.to_uint8(images) if np.isfinite(images).all() else images

    found = evaluation.measure(network, batches, study.samples)
    values = {
      split: evaluation.frechet(network.label, found.moments, reference.statistics.moments).exact
      for split, reference in real.items()
    }
    record = {
      "model": name,
      "seed": seed,
      **draw._asdict(),
      "nfe": nfe,
      "fd": values,
      "floor": {s: (r.floor or {}).get("exact") for s, r in real.items()},
      "step": run.step,
      "samples": study.samples,
      "judge": network.label,
      "judge_sha256": network.digest,
      "cpu_seconds": round(time.process_time() - begin, 1),
    }
    files.append_record(path, record)
  _mark(done)


def _mark(path):
  path.parent.mkdir(exist_ok=True)
  path.touch()


def draw_of(record):
  return Draw(record["sampler"], record["prior"], record.get("grid", Draw().grid))


# --- All jobs -------------------------------------------------------------------------------------


def jobs_of(study):
  """A model and a seed each; a retired model has none."""
  return [
    f"{name}-{seed}"
    for seed in study.seeds
    for name in study.models
    if study.sweeps.get(name) != {} and (seed == study.seeds[0] or name not in study.once)
  ]


def work(study, out, workers, passed):
  """Runs every job that is not done in processes of their own, the main model's first.

  SIGTERM ends the workers too, in good order. A worker that outlives a killed study does its job to
  the end, and the next study's worker for the job waits for it.
  """
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  jobs = jobs_of(study)
  todo = [j for j in jobs if not (out / "done" / j).exists()]
  begin, finished, running = time.monotonic(), 0, {}
  (out / "logs").mkdir(parents=True, exist_ok=True)
  try:
    while todo or running:
      while todo and len(running) < workers:
        name = todo.pop(0)
        with open(out / "logs" / f"{name}.txt", "a") as log:
          command = [sys.executable, __file__, *passed, f"--job={name}"]
          running[name] = subprocess.Popen(command, stdout=log, stderr=log)
      time.sleep(0.2)
      for name, process in list(running.items()):
        if process.poll() is None:
          continue
        del running[name]
        if process.returncode:
          tail = (out / "logs" / f"{name}.txt").read_text().strip().splitlines()[-1:]
          raise ValueError(
            f"{name} ended with code {process.returncode} ({' '.join(tail)}); its log is in "
            f"{out / 'logs'}: start the same command again to go on"
          )
        finished += 1
        spent = time.monotonic() - begin
        left = spent / finished * (len(todo) + len(running))
        print(
          f"{name} done; {len(todo) + len(running)} of {len(jobs)} jobs left, "
          f"{spent / 60:.0f} min so far, about {left / 60:.0f} min to go",
          flush=True,
        )
  finally:
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.wait()  # it saves what it has


# --- Claims ---------------------------------------------------------------------------------------


class Results:
  """Fréchet distances by model, seed, `Draw` and NFE, on the study's first split."""

  def __init__(self, records, split):
    self._values = {}
    for r in records:
      key = (r["model"], r["seed"], draw_of(r))
      self._values.setdefault(key, {})[r["nfe"]] = r["fd"][split]
    self.seeds = sorted({r["seed"] for r in records})

  def curve(self, seed, model=MAIN, *draw):
    """{NFE: distance}, in rising NFE; `draw` are the fields of a `Draw`."""
    return dict(sorted(self._values.get((model, seed, Draw(*draw)), {}).items()))

  def lowest(self, seed, *curves):
    """{NFE: the least distance of several curves there}, where every one of them is measured."""
    found = [self.curve(seed, *which) for which in curves]
    common = set.intersection(*map(set, found))
    return {nfe: min(curve[nfe] for curve in found) for nfe in common}

  def best(self, seed, *which):
    """(distance, NFE) at the best number of evaluations."""
    return min((value, nfe) for nfe, value in self.curve(seed, *which).items())

  def nfe_for(self, seed, quality, *which):
    """The smallest NFE at which the distance is at most `quality`, or infinity.

    Raises:
      KeyError: nothing of that is measured.
    """
    curve = self.curve(seed, *which)
    if not curve:
      raise KeyError(which)
    return min((n for n, v in curve.items() if v <= quality), default=math.inf)


@dataclasses.dataclass(frozen=True)
class Claim:
  """ "left is smaller than right": `sides` gives both for a seed, or None if not measured."""

  name: str
  paper: str
  sides: object

  def row(self, results):
    """A `Row`, of one pair for each seed that has been measured."""
    pairs = []
    for seed in results.seeds:
      try:
        pairs.append(self.sides(results, seed))
      except (KeyError, ValueError, IndexError):
        continue
    return Row(self, "", pairs, verdict(pairs) if pairs else "not measured")


@dataclasses.dataclass(frozen=True)
class Equal:
  """ "The distance on the left is smaller than that on the right", at equal evaluations.

  The row is that of the most evaluations which both sides have, for as many seeds as any number of
  evaluations; `elsewhere` has the verdicts at fewer, and at the optimum where one was seen.

  Attributes:
    left, right: (model, fields of a `Draw`); several of them are their best at each number that all
      of them have.
  """

  name: str
  paper: str
  left: tuple
  right: tuple

  def row(self, results):
    pairs = {}  # by evaluations
    optima, seen = [], True
    for seed in results.seeds:
      left, right = (results.lowest(seed, *side) for side in (self.left, self.right))
      common = sorted(left.keys() & right.keys())
      if not common:
        continue
      for nfe in common:
        pairs.setdefault(nfe, []).append((left[nfe], right[nfe]))
      best = [min(common, key=side.__getitem__) for side in (left, right)]
      optima.append((left[best[0]], right[best[1]]))
      seen = seen and max(best) < common[-1]
    if not pairs:
      return Row(self, "", [], "not measured")
    most = max(map(len, pairs.values()))
    *fewer, last = sorted(n for n, found in pairs.items() if len(found) == most)
    said = [f"{n}: {verdict(pairs[n])}" for n in fewer]
    said += [f"optimum: {verdict(optima)}"] if seen else []
    return Row(self, str(last), pairs[last], verdict(pairs[last]), ", ".join(said))


class Row(typing.NamedTuple):
  """A claim's line: evaluations, pairs (left, right) by seed, what they say, and other budgets."""

  claim: Claim | Equal
  at: str
  pairs: list
  verdict: str
  elsewhere: str = ""


def _of(model=MAIN, *draw):
  return ((model, *draw),)


def _common(r, seed, *curves):
  """Curves at the evaluations that all of them have.

  Raises:
    KeyError: there are none.
  """
  found = [r.curve(seed, *which) for which in curves]
  both = set.intersection(*(set(curve) for curve in found))
  if not both:
    raise KeyError(curves)
  return [{n: v for n, v in curve.items() if n in both} for curve in found]


def _first(curve, quality):
  """The fewest evaluations with which a curve is at most `quality`, or infinity."""
  return min((n for n, v in curve.items() if v <= quality), default=math.inf)


def _same_quality(slow, fast=MAIN, slack=1.1):
  """NFE of both models for the quality that the worse of the two can reach, of the same NFEs."""

  def sides(r, seed):
    one, two = _common(r, seed, (fast,), (slow,))
    quality = slack * max(min(one.values()), min(two.values()))
    return _first(one, quality), _first(two, quality)

  return sides


def _near_own_best(model, other):
  """The NFE from which on a model is within a tenth of its best, of the NFEs that both have."""

  def sides(r, seed):
    return tuple(_first(c, 1.1 * min(c.values())) for c in _common(r, seed, (model,), (other,)))

  return sides


def _at(nfe, *draw):
  return lambda r, seed: r.curve(seed, MAIN, *draw)[nfe]


def _less(left, right):
  return lambda r, seed: (left(r, seed), right(r, seed))


def _rises(left, right):
  """How much worse than its best each sampler is with the most evaluations that both have."""

  def sides(r, seed):
    curves = _common(r, seed, (MAIN, left), (MAIN, right))
    return tuple(curve[max(curve)] / min(curve.values()) for curve in curves)

  return sides


def _half(*draw):
  """Twice the NFE at which a sampler is as good as the best of P's, against that one's NFE."""

  def sides(r, seed):
    quality, nfe = min(
      r.best(seed, MAIN, s) for s in ("momentum", "probability_flow", "ddim", "predictor_corrector")
    )
    return 2 * r.nfe_for(seed, 1.05 * quality, MAIN, *draw), nfe

  return sides


def _between(r, seed):
  """The larger of the two defects of lying between the parts, over the common NFE; 1 is none."""
  both, *parts = _common(
    r, seed, *((MAIN, s) for s in ("predictor_corrector", "ddim", "probability_flow"))
  )
  return max(v / max(p[n] for p in parts) for n, v in both.items()), 1.0


_OURS = _of(MAIN, "two_step", "subspace")
_RIVALS = tuple(
  (model, *draw)
  for model in (PRINTED, "unfiltered", VE, "ddpmpp", "subvp", "cold", "ihdm", "blurring")
  for draw in (
    (),
    ("two_step",),
    ("two_step", "subspace"),
    *((s,) for s in OWN_SAMPLERS.get(model, ())),
  )
)

PAPER_CLAIMS = (
  Equal(
    "1a. Momentum is better than Naive, trained with the printed loss",
    "1.85 < 27.82",
    _of(PRINTED),
    _of(PRINTED, "naive"),
  ),
  Equal("1b. … trained with the look-ahead loss", "–", _of(), _of(MAIN, "naive")),
  Equal(
    "2a. The printed loss is better than the unfiltered one",
    "1.85 < 5.91",
    _of(PRINTED),
    _of("unfiltered"),
  ),
  Equal(
    "2b. The look-ahead loss is better than the unfiltered one", "ours", _of(), _of("unfiltered")
  ),
  Equal("2c. The look-ahead loss is better than the printed one", "ours", _of(), _of(PRINTED)),
  Equal("3a. Transport levels are better than MSE-matched ones", "1.85 < 8.35", _of(), _of("mse")),
  Claim("3b. … and need fewer evaluations for the same quality", "yes", _same_quality("mse")),
  Claim("4a. Blur needs fewer evaluations than VE for the same quality", "yes", _same_quality(VE)),
  Equal("4b. Blur is better than VE", "yes", _of(), _of(VE)),
  Equal(
    "4c. … both by two-step from the subspace prior", "–", _OURS, _of(VE, "two_step", "subspace")
  ),
  *(
    Equal(f"{row}. Blur (Momentum) is better than {name}", "–", _of(), _of(model, sampler))
    for row, name, model, sampler in (
      ("4d", "VE with Langevin steps", VE, "langevin"),
      ("4e", "DDPM++ (VP)", "ddpmpp", "ancestral"),
      ("4f", "sub-VP", "subvp", "ancestral"),
      ("4g", "Cold Diffusion", "cold", "momentum"),
      ("4h", "IHDM", "ihdm", "naive(size=1.25)"),
      ("4i", "Blurring Diffusion", "blurring", "ancestral"),
    )
  ),
  Claim(
    "5a. DDIM is better than Momentum at 25 evaluations",
    "yes",
    _less(_at(25, "ddim"), _at(25, "momentum")),
  ),
  Equal("5b. Momentum is better than DDIM at many evaluations", "yes", _of(), _of(MAIN, "ddim")),
  Claim(
    "5c. Momentum gets worse again after its optimum, more than DDIM",
    "yes",
    _rises("ddim", "momentum"),
  ),
  Equal(
    "6a. Momentum is better than probability flow at many evaluations",
    "yes",
    _of(),
    _of(MAIN, "probability_flow"),
  ),
  Claim(
    "6b. Probability flow is flatter beyond its optimum",
    "yes",
    _rises("probability_flow", "momentum"),
  ),
  Claim("7. Predictor-corrector is no worse than the worse of its parts", "yes", _between),
  Equal("8a. σ_max 0.1 is better than 0.05", "yes", _of(), _of("sigma_005")),
  Equal("8b. σ_max 0.05 is better than 0.025", "yes", _of("sigma_005"), _of("sigma_0025")),
  Equal(
    "8c. Noise that stops early is better than noise throughout",
    "1.85 < 4.31",
    _of(),
    _of("noise_throughout"),
  ),
  Claim(
    "9. Masking needs more evaluations than blur to come near its own best",
    "yes",
    _near_own_best(MAIN, "mask"),
  ),
  Claim(
    "10a. Two-step reaches P's best quality with half of its evaluations", "ours", _half("two_step")
  ),
  Claim("10b. … on the grid of even levels", "ours", _half("two_step", "own", "level")),
  Claim(
    "11a. The C₁·colour prior is better than the colour prior",
    "ours",
    _less(_at(50), _at(50, "momentum", "colour")),
  ),
  Claim(
    "11b. The subspace prior is better than the colour prior",
    "ours",
    _less(_at(50, "momentum", "subspace"), _at(50, "momentum", "colour")),
  ),
  Equal(
    "11c. The subspace prior is better than the C₁·colour prior",
    "ours",
    _of(MAIN, "momentum", "subspace"),
    _of(),
  ),
  Equal(
    "12. Ours (look-ahead, two-step, subspace prior) is better than the best rival",
    "ours",
    _OURS,
    _RIVALS,
  ),
)


WEIGHT_CLAIM = Equal("The weight 1/σ² is better than 1", "–", _of(), _of(UNWEIGHTED))
OPEN_CLAIMS = (
  Equal("A stratified draw of t is better than independent ones", "–", _of(STRATIFIED), _of()),
  WEIGHT_CLAIM,
  *(
    Claim(
      f"The time grid {grid!r} is better than 'uniform': {sampler} at {nfe}",
      "–",
      _less(_at(nfe, sampler, "own", grid), _at(nfe, sampler)),
    )
    for sampler, nfe in (("momentum", 50), ("two_step", 10), ("two_step", 20))
    for grid in samplers.GRIDS[1:]
  ),
)


MIXTURE_CLAIMS = tuple(
  Equal(f"{name} is better than the {than} loss", "–", _of(name), _of(other))
  for name in (MAIN, *MIXTURES)
  for than, other in (("printed", PRINTED), ("unfiltered", "unfiltered"))
)


def verdict(pairs):
  """What seeds' pairs (left, right) say of left < right.

  With several seeds: decided if all of them agree, and the mean of log(left/right) is beyond 0 by
  Student's t at the level of 5 %, one-sided; with one, only a gap of 10 % decides.
  """
  pairs = [(a, b) for a, b in pairs if not (math.isinf(a) and math.isinf(b))]
  if not pairs:
    return "undecided"
  logs = np.array(
    [
      math.copysign(math.inf, a - b) if math.isinf(a) or math.isinf(b) else math.log(a / b)
      for a, b in pairs
    ]
  )
  if np.all(logs == 0):
    return "undecided"
  if not np.all(np.isfinite(logs)):
    sure = np.all(logs < 0) or np.all(logs > 0)
  elif len(logs) == 1:
    sure = abs(logs[0]) > math.log(1.1)
  else:
    error = logs.std(ddof=1) / math.sqrt(len(logs))
    sure = (np.all(logs < 0) or np.all(logs > 0)) and abs(logs.mean()) > error * float(
      scipy.stats.t.ppf(0.95, len(logs) - 1)
    )
  if not sure:
    return "undecided"
  return "reproduced" if logs[0] < 0 else "not reproduced"


def scoreboard(claims, results):
  """A `Row` for each claim; its pairs are empty where something is not measured."""
  return [claim.row(results) for claim in claims]


# --- Report ---------------------------------------------------------------------------------------


def _number(value):
  return "never" if math.isinf(value) else f"{value:.3g}"


def all_records(out):

  paths = sorted((out / "results").glob("*.jsonl"))
  return [r for path in paths for r in files.read_records(path)]


def check_judge(records):
  """Raises the ValueError of records whose distances are not of one feature network."""
  judges = {(r["judge"], r["judge_sha256"]) for r in records}
  if len(judges) > 1:
    named = " and ".join(f"{label} ({digest[:8]})" for label, digest in sorted(judges))
    raise ValueError(
      f"distances by {named} do not compare: give the study its first --feature_net, or another "
      "--out with its models.json alone"
    )


def tables(study, records):
  """Scoreboard and means, as lines of Markdown."""
  split, judge = study.splits[0], records[0]["judge"]
  results = Results(records, split)
  floor = records[0]["floor"][split]
  lines = [
    f"{judge} at N = {records[0]['samples']} against the {split} images, floor (real against real) "
    f"{'not to be had' if floor is None else f'{floor:.3g}'}; training seeds "
    f"{', '.join(map(str, results.seeds))}; {records[0]['step']} steps.",
    "",
    "| claim | paper | evaluations | left (per seed) | right (per seed) | verdict | elsewhere |",
    "|---|---|---|---|---|---|---|",
  ]
  for claim, at, pairs, word, elsewhere in scoreboard(study.claims, results):
    left, right = (", ".join(_number(p[k]) for p in pairs) or "–" for k in range(2))
    cells = claim.name, claim.paper, at or "–", left, right, word, elsewhere or "–"
    lines.append(f"| {' | '.join(cells)} |")
  lines += ["", "Means over the seeds (standard deviation in brackets):", ""]
  nfes = sorted({r["nfe"] for r in records})
  for one in study.splits:
    lines += [
      f"| {one}: model, sampler, prior, grid | " + " | ".join(map(str, nfes)) + " |",
      "|---|" + "---|" * len(nfes),
    ]
    for model, draw in sorted({(r["model"], draw_of(r)) for r in records}):
      cells = []
      for nfe in nfes:
        values = [
          r["fd"][one] for r in records if (r["model"], draw_of(r), r["nfe"]) == (model, draw, nfe)
        ]
        spread = f" ({np.std(values, ddof=1):.2g})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
      lines.append(
        f"| {', '.join((RETIRED.get(model, model), *draw))} | " + " | ".join(cells) + " |"
      )
    lines.append("")
  return lines


def report(study, out):
  """Writes OUT/report.md and OUT/fd_against_nfe.png from what is measured so far."""
  records = all_records(out)
  if not records:
    raise ValueError(f"{out}: nothing is measured yet; run the study without --report first")
  check_judge(records)
  text = "\n".join(tables(study, records))
  (out / "report.md").write_text(text, encoding="utf-8")
  _plot(records, study.splits[0], out / "fd_against_nfe.png")
  return text


def _plot(records, split, path):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
  uniform = ("naive", "momentum", "probability_flow", "ddim", "predictor_corrector", "two_step")
  samplers_drawn = [(name, MAIN, Draw(name)) for name in uniform]
  samplers_drawn += [
    ("two_step, grid level", MAIN, Draw("two_step", grid="level")),
    ("two_step, prior subspace", MAIN, Draw("two_step", prior="subspace")),
  ]
  models_drawn = [
    (RETIRED.get(name, name), name, Draw()) for name in sorted({r["model"] for r in records})
  ]
  groups = {
    left: ("samplers, model blur", samplers_drawn),
    right: ("models, Momentum", models_drawn),
  }
  for axis, (title, curves) in groups.items():
    for label, model, draw in curves:
      points = {}
      for r in records:
        if (r["model"], draw_of(r)) == (model, draw):
          points.setdefault(r["nfe"], []).append(r["fd"][split])
      if points:
        nfes = sorted(points)
        means = [np.mean(points[n]) for n in nfes]
        spans = [np.ptp(points[n]) / 2 for n in nfes]
        axis.errorbar(nfes, means, spans, marker="o", ms=3, capsize=2, label=label)
    floor = records[0]["floor"][split]
    if floor is not None:
      axis.axhline(floor, color="grey", ls=":", label="floor")
    axis.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, framealpha=0.6)
  left.set_ylabel(records[0]["judge"])
  figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
  plt.close(figure)


STUDIES = {"digits": digits, "cifar": cifar, "defaults": defaults, "mixtures": mixtures}


def main():
  out = pathlib.Path(_OUT.value)
  files.check_folder(out)
  if _JOB.value is not None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
  if _DATA_DIR.value:
    os.environ["TFDS_DATA_DIR"] = _DATA_DIR.value
  if _REPORT.value and not (out / MODELS_FILE).exists():
    raise ValueError(f"{out} holds no study: there is nothing to report; is --out right?")
  study = open_study(_STUDY.value, out)
  if _FEATURE_NET.value:
    study = dataclasses.replace(study, feature_net=_FEATURE_NET.value)
  if _JOB.value is not None:
    if _JOB.value not in jobs_of(study):
      raise ValueError(
        f"--job={_JOB.value}: no such job; choose one of {', '.join(jobs_of(study))}"
      )
    name, seed = _JOB.value.rsplit("-", 1)
    job(study, name, int(seed), out)
    return
  if not _REPORT.value:
    write_models(study, out)
    work(study, out, _WORKERS.value, sys.argv[1:])
  print(report(study, out))
  print(f"written: {out / 'report.md'}, {out / 'fd_against_nfe.png'}")


if __name__ == "__main__":
  cli.run(main)
