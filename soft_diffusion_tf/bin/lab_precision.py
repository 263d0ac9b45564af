"""What rounded operators cost: samples drawn with them, graded exactly."""

import json

from soft_diffusion_tf import files
from soft_diffusion_tf.bin.lab_common import table

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
        with files.atomic(path) as partial:
          np.save(partial, images)


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
        rows.append(
          {
            "nfe": nfe,
            "rule": rule,
            "kind": kind,
            "n": len(images),
            "frechet": study.frechet(images),
            "rms": study.rms(difference),
            "bias": study.rms(difference.mean(0, keepdims=True)),
          }
        )
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
    }
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
    blurs = "; ".join(
      f"{k}: RMS {v[0]:.2g}, one pixel {v[1]:.2g}" for k, v in found["one_blur"].items()
    )
    title = (
      f"**{name}** ({facts['images']} images, spread {facts['std']}, blur to {facts['last']:g} "
      f"pixels with half size {facts['half_size']}; N = {counts}; fresh draws get {floors}; the "
      f"worst single blur, {blurs})"
    )
    cell = lambda key, read, rows=rows: read(rows[key]) if key in rows else ""
    distances = [
      [rule, kind, *(cell((rule, kind, n), lambda r: f"{r['frechet']:.5g}") for n in nfes)]
      for rule in STUDY_RULES
      for kind in laboratory.PRECISIONS
    ]
    apart = [
      [rule, kind, nfe, *(f"{v:.2g}" for v in rows[rule, kind, nfe]["rms"])]
      for rule in STUDY_RULES
      for kind in laboratory.PRECISIONS[1:]
      for nfe in nfes
      if (rule, kind, nfe) in rows
    ]
    parts += [
      title,
      "Squared Fréchet distance:",
      table(["sampler", "operators", *nfes], [r for r in distances if any(r[2:])]),
      "RMS difference from exact operators' images, by frequency (shares of the highest); the "
      f"data's own RMS there: {', '.join(f'{v:.2g}' for v in found['data_rms'])}:",
      table(["sampler", "operators", "evaluations", *bands], apart),
    ]
  return "\n\n".join(parts)
