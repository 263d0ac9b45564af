"""P's protocol: distances over numbers of steps, samplers and kept checkpoints; the best is named.

P takes the best of ten numbers of steps (App. D, Table 2), which a sweep does where none are given.

A workdir's `sweep/results.jsonl` has a line for every cell, with all its conditions, which are also
its key: a cell that is there is not computed again, one that was cut short goes on where its last
partial state was written. `best.json` in the workdir names the best cell of the last sweep.
"""

import hashlib
import itertools
import json
import pathlib
import re

from soft_diffusion_tf import evaluation, files, plots, samplers, training
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.training.checkpoints import steps_in

FOLDER, RESULTS, CURVES, BEST_FILE = "sweep", "results.jsonl", "distance_by_nfe.png", "best.json"
PAPER_NFE = "200-920:80"  # P's ten, "from 200 to 1000 with a step size of 80": with 1,000, 11
_MOST = 10_000  # numbers in one flag
_BUSY = "another sweep is at work in it; wait for it or end it, nothing will be lost"
# Of a cell's conditions, what makes it another cell; the rest follows from these.
_KEY = (
  "step",
  "sampler",
  "nfe",
  "sampling",
  "samples",
  "first_seed",
  "ema_decay",
  "ema_length",
  "reference",
  "subset_asked",
  "neighbours",
)


def parse_numbers(text):
  """ "200-1000:80" → 200, 280, … ≤ 1000; "25,50" → 25, 50."""
  span = re.fullmatch(r"(\d{1,18})-(\d{1,18}):(\d{1,18})", text)
  if span:
    first, last, step = map(int, span.groups())
    numbers = range(first, last + 1, step) if step else []
    if len(numbers) > _MOST:
      raise ValueError(f"{text!r} names {len(numbers):,} numbers; give at most {_MOST:,}")
  else:
    numbers = [int(n) for n in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
  if not numbers or min(numbers) < 1:
    raise ValueError(
      f"{text!r}: give positive numbers as a list (25,50,100) or as a range FIRST-LAST:STEP, such "
      f"as {PAPER_NFE}"
    )
  return list(dict.fromkeys(numbers))


def checkpoints(workdir, which="all"):
  """Steps whose checkpoints a workdir keeps, rising.

  Args:
    which: "all", "kept" (those of `training.keep_every`), "newest", or numbers for
      `parse_numbers`. Step 0 is left out unless it is all there is or named.
  """
  folder = pathlib.Path(workdir) / "checkpoints"
  found = {part.name: steps_in(part) for part in (folder, folder / "kept")}
  steps = sorted({*found["checkpoints"], *found["kept"]})
  if not steps:
    raise ValueError(f"{workdir}: no checkpoint in it; train first")
  if which == "newest":
    return steps[-1:]
  if which in ("all", "kept"):
    steps = [s for s in (steps if which == "all" else found["kept"]) if s] or steps[-1:]
    return steps
  if not which[:1].isdigit():
    raise ValueError(f"checkpoints = {which!r}: give all, kept, newest or steps such as 600,1200")
  wanted = parse_numbers(which)
  missing = [s for s in wanted if s not in steps]
  if missing:
    raise ValueError(f"{workdir}: no checkpoint of step {missing[0]}; it keeps {steps}")
  return wanted


def check_samplers(names):
  """Raises the ValueError of a name that is no sampler's."""
  for name in names:
    if samplers.rule_of(name).adaptive:
      raise ValueError(f"{name} chooses its own steps, and a sweep goes by their number")


def _key(record):
  return json.dumps({name: record.get(name) for name in _KEY}, sort_keys=True)


def sweep(
  workdir,
  network,
  real,
  count,
  *,
  names,
  nfes,
  steps,
  lengths=(None,),
  first_seed=0,
  progress=True,
  every=60.0,
):
  """Measures every (checkpoint, average, sampler, NFE) that has not been measured yet.

  Args:
    workdir: of a training run.
    real: an `evaluation.Reference`.
    count: samples for every cell.
    names: samplers; nfes: evaluations of the network; steps: checkpoints.
    lengths: of averages of the weights (see `training.load`); None is that of `training.ema_decay`.
    every: seconds between writes of a cell's partial state.

  Returns:
    The records of all cells of this sweep, measured now or before. A cell that failed (samples that
    are not finite) has "error" in place of numbers, and is tried again the next time.
  """
  workdir = pathlib.Path(workdir)
  folder = workdir / FOLDER
  experiment = Experiment.load(workdir)
  evaluation.check_count(count, float("inf"))
  check_samplers(names)
  with files.lock(folder, _BUSY):
    done = {_key(r): r for r in files.read_records(folder / RESULTS)}
    run, cells = None, []
    asked = list(itertools.product(steps, lengths, names, nfes))
    for step, length, name, nfe in asked:
      options = experiment.sampling.changed(sampler=name, nfe=nfe)
      weights = training.weights_of(experiment, length=length)
      about = {
        **evaluation.run_conditions(experiment, step, options, count, first_seed, weights),
        "reference": real.conditions,
        "subset_asked": experiment.evaluation.subset,
        "neighbours": experiment.evaluation.neighbours,
      }
      key = _key(about)
      if key not in done:
        if run is None or (run.step, run.length) != (step, length):
          run = training.load(workdir, step, length=length)
        if progress:
          what = f"step {step}, {training.spell_weights(about)}, {name}, {nfe} NFE"
          print(f"cell {len(cells) + 1} of {len(asked)}: {what}", flush=True)
        partial = folder / f"partial-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        record = _cell(
          run,
          network,
          real,
          count,
          options,
          about,
          first_seed=first_seed,
          progress=progress,
          partial=partial,
          every=every,
        )
        done[key] = record
        if "error" not in record:  # a cell that failed is tried again the next time
          files.append_record(folder / RESULTS, record)
          evaluation.to_tensorboard(workdir, record)
      cells.append(done[key])
    _finish(workdir, cells)
  return cells


def _cell(run, network, real, count, options, about, **rest):
  try:
    result = evaluation.evaluate_run(run, network, real, count, options, **rest)
  except ValueError as error:  # one cell's samples are not finite: the others may be
    return {**about, "error": str(error)}
  return {**result.record(), **about}


def _finish(workdir, cells):
  """best.json and the curves."""
  found = best_of(cells)
  if found is None:
    raise ValueError(f"no cell of the sweep could be measured: {cells[0]['error']}")
  names = (
    "step",
    "sampler",
    "nfe",
    "label",
    "value",
    "exact",
    "samples",
    "first_seed",
    "reference",
  )
  content = {n: found[n] for n in names}
  if found.get("ema_length"):
    content["ema_length"] = found["ema_length"]
  files.write_json(workdir / BEST_FILE, content)
  plot(workdir / FOLDER / CURVES, cells)


def best_of(cells):
  """The cell of the smallest distance; None if none was measured."""
  return min((c for c in cells if "error" not in c), key=lambda c: c["value"], default=None)


def best(workdir):
  """The content of a workdir's best.json."""
  path = pathlib.Path(workdir) / BEST_FILE
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    found["step"], found["sampler"], found["nfe"]
  except (OSError, ValueError, TypeError, KeyError):
    raise ValueError(
      f"{workdir}: no {BEST_FILE} in it, or a damaged one; make one by evaluate --sweep"
    ) from None
  return found


def last_sweep(workdir):
  """All cells that compare with the workdir's best: same N, seeds and reference."""
  found = best(workdir)
  return [
    r
    for r in files.read_records(pathlib.Path(workdir) / FOLDER / RESULTS)
    if all(r.get(n) == found[n] for n in ("samples", "first_seed", "reference"))
  ]


def plot(path, *runs, names=()):
  """Distance against NFE for each sampler (P Figures 3 and 10), at the best cell's checkpoint.

  Args:
    runs: the cells of one run, or of several, whose distances must compare.
    names: of the runs.

  Raises:
    ValueError: runs with another measure, number of samples or reference.
  """
  lines, steps = {}, []
  bests = [best_of(cells) for cells in runs]
  found = bests[0]
  for k, (best, cells) in enumerate(zip(bests, runs)):
    for field in ("label", "samples", "reference"):
      if best[field] != found[field]:
        raise ValueError(
          f"{names[k]} is measured with {field} = {best[field]!r} and {names[0]} with "
          f"{found[field]!r}, so that their distances do not compare: sweep them alike"
        )
    steps.append(str(best["step"]))
    for c in sorted(cells, key=lambda c: c["nfe"]):
      if _model(c) == _model(best) and "error" not in c:
        name = f"{names[k]}, {c['sampler']}" if len(runs) > 1 else c["sampler"]
        lines.setdefault(name, []).append((c["nfe"], c["value"]))
  floor = found["floor"]["value"] if found["floor"] else None
  title = f"step {', '.join(dict.fromkeys(steps))}, N = {found['samples']}"
  plots.curves(path, lines, "function evaluations (NFE)", found["label"], title, floor)


def _model(cell):
  """(step, which weights) of a cell."""
  return cell["step"], training.spell_weights(cell)


def tables(cells):
  """The rows of P's Tables 2 (best of every sampler) and 3-5 (by NFE), as text."""
  found = best_of(cells)
  names = list(dict.fromkeys(c["sampler"] for c in cells))
  label, width = found["label"], max(12, len(found["label"]))
  lines = [f"best of every sampler (as P Table 2), N = {found['samples']}:"]
  lines.append(f"  {'sampler':<20} {label:>{width}} {'NFE':>6} {'step':>9}")
  for name in names:
    c = best_of([c for c in cells if c["sampler"] == name])
    row = f"{c['value']:>{width}.4g} {c['nfe']:>6} {c['step']:>9}" if c else f"{'failed':>{width}}"
    lines.append(f"  {name:<20} {row}")
  groups = dict.fromkeys(map(_model, cells))
  for step, weights in groups:
    by = f", {weights}" if len({w for _, w in groups}) > 1 else ""
    lines.append(f"{label} by NFE (as P Tables 3-5), step {step}{by}:")
    lines.append(f"  {'NFE':>6} " + " ".join(f"{n:>{max(12, len(n))}}" for n in names))
    mine = [c for c in cells if _model(c) == (step, weights)]
    table = {(c["nfe"], c["sampler"]): c.get("value") for c in mine}
    for nfe in sorted({n for n, _ in table}):
      row = [table.get((nfe, n)) for n in names]
      row = [
        f"{'-' if v is None else format(v, '.4g'):>{max(12, len(n))}}" for v, n in zip(row, names)
      ]
      lines.append(f"  {nfe:>6} " + " ".join(row))
  return "\n".join(lines)
