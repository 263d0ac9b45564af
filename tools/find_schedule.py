"""Finds the corruption levels of an experiment's data by optimal transport (P 3.3).

  python tools/find_schedule.py --config=configs/digits_blur.py \
    --out=configs/schedules/digits_blur.json
"""

import pathlib

from absl import flags

from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "The .json file to write.", required=True)
_LEVELS = flags.DEFINE_integer("levels", 256, "Candidate levels.")
_NODES = flags.DEFINE_integer("nodes", 32, "Levels of the schedule.")
_CANDIDATES = flags.DEFINE_enum(
  "candidates", "transport", ["transport", "linear", "geometric"], "How candidates are spaced."
)
_METHOD = flags.DEFINE_enum(
  "method",
  "closed_form",
  ["closed_form", "mse"],
  "closed_form: shortest path in Wasserstein distance (P 3.3); mse: P's natural baseline (Eq. 55).",
)
_SLICE = flags.DEFINE_float("slice", 0.1, "Share of the data to use; P uses 0.1.")
_FORCE = flags.DEFINE_bool("force", False, "Overwrite what is at --out.")


def main():
  import numpy as np
  import tqdm

  from soft_diffusion_tf import data, schedules, scheduling
  from soft_diffusion_tf.experiment import Experiment

  out = pathlib.Path(_OUT.value)
  if out.exists() and not _FORCE.value:
    raise ValueError(f"{out} is there already; give another --out or --force")
  if _CONFIG.value is None:
    raise ValueError("give --config=FILE")
  e = Experiment.from_config(_CONFIG.value)
  source = data.load(
    e.data.name, e.data.train_split, e.data.image_shape, e.data.crop, e.data.data_dir or None
  )
  count = round(_SLICE.value * len(source))
  if count < 2:
    raise ValueError(f"--slice={_SLICE.value:g} of {len(source)} images leaves {count}; take more")
  picked = np.random.default_rng(e.seed).permutation(len(source))[:count]
  first, last = schedules.ends(e.level)
  provenance = {
    "data": e.data.name,
    "split": e.data.train_split,
    "image_shape": list(e.data.image_shape),
    "seed": e.seed,
  }
  if _METHOD.value == "mse":
    ve = schedules.Geometric(e.network.cond_min, e.network.cond_max)
    levels = scheduling.mse_matched(
      e.corruption, source.floats(np.sort(picked)), first, last, e.sigma, ve, _NODES.value
    )
    facts = {"corruption": e.corruption.get_config(), "images": count, "method": "mse"}
    schedules.save_levels(out, {**provenance, **facts, "levels": levels.tolist()})
    print(f"{len(levels)} levels whose MSE decays as VE's, in {out}")
    return
  bar = tqdm.tqdm(desc="distances", unit="batch")

  def progress(_, done, total):
    bar.total = total
    bar.update(done - bar.n)

  path, facts = scheduling.find(
    e.corruption, source.floats(np.sort(picked)), first, last,
    count=_LEVELS.value, nodes=_NODES.value, candidates=_CANDIDATES.value, progress=progress,
  )  # fmt: skip
  bar.close()
  schedules.save_levels(out, {**provenance, **facts, **path.to_dict()})
  print("level     distance to the next")
  for level, step in zip(path.levels, [*path.steps, float("nan")]):
    print(f"{level:8.4f}  {step:8.4f}" if step == step else f"{level:8.4f}")
  print(
    f"{len(path.levels)} levels, ε = {path.epsilon:.4g}, length {path.steps.sum():.4g} "
    f"(straight line {path.straight:.4g}), in {out}"
  )
  if path.nearest:
    print(f"no ε gives {_NODES.value} levels; the nearest counts are {path.nearest}")


if __name__ == "__main__":
  cli.run(main)
