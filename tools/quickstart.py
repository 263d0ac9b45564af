"""From nothing to digits: schedule, training, samples, distance, pictures. `make quickstart`."""

import pathlib
import shutil
import time

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", "runs/quickstart", "Where everything is left.")
_FRESH = flags.DEFINE_bool("fresh", False, "Start over, deleting the workdir of an earlier run.")


def main():
  import numpy as np

  from soft_diffusion_tf import evaluation, plots, schedules, training, transport
  from soft_diffusion_tf.evaluation import features

  started = time.monotonic()
  workdir = pathlib.Path(_WORKDIR.value)
  files.check_folder(workdir, "workdir")
  if _CONFIG.value is None:
    raise ValueError("give --config=FILE, such as configs/digits_blur.py")
  experiment = cli.experiment_of(_CONFIG.value)
  d = experiment.data
  source = d.load()
  if _FRESH.value and workdir.exists():
    if not (workdir / "config.json").exists():
      raise ValueError(f"{workdir} is not the workdir of a run; --fresh does not delete it")
    shutil.rmtree(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  print(f"1/4  blur schedule: shortest path between {len(source)} blurred digits", flush=True)
  first, last = schedules.ends(experiment.level)
  path, facts = transport.find(experiment.corruption, source.floats(), first, last)
  schedules.save_levels(workdir / "schedule.json", {"data": d.name, **facts, **path.to_dict()})
  experiment = experiment.replace(
    level=schedules.Staged(schedules.piecewise(path.levels.tolist()), 0.2, 1.0)
  )
  levels = " ".join(f"{v:.2f}" for v in path.levels)
  print(f"     {len(path.levels)} levels of blur (std in pixels): {levels}", flush=True)

  print("2/4  training a small NCSN++ with Soft Score Matching", flush=True)
  run = training.train(experiment, workdir)
  plots.schedule(workdir / "schedule.png", run.diffusion, "blur std (pixels)")

  how = f"{experiment.sampling.sampler}, {experiment.sampling.evaluations} evaluations"
  print(f"3/4  sampling ({how}), Fréchet distances", flush=True)
  network = features.feature_network(experiment.evaluation.feature_net, source)
  count = min(experiment.evaluation.samples, len(source) // 2)
  about = evaluation.conditions_of(network, d.name, d.train_split, d.image_shape, d.crop, count)
  reference = evaluation.reference(
    network, source.images, about, progress=False, k=experiment.evaluation.neighbours
  )
  samples = []
  trained = evaluation.evaluate_run(run, network, reference, count, keep=samples)
  fresh = training.Run(experiment, training.build(experiment, run.diffusion), 0)
  untrained = evaluation.evaluate_run(fresh, network, reference, count)

  print("4/4  pictures", flush=True)
  real = source.floats(np.random.default_rng(0).permutation(len(source))[:100])
  plots.side_by_side(
    workdir / "samples.png",
    [("real digits", real), (f"samples ({how})", np.concatenate(samples)[:100])],
  )
  plan = run.plan()
  times, states, predictions = run.sampler().trajectory(plan, np.arange(10), 10)
  plots.process(workdir / "reverse_process.png", times, states, predictions)

  print()
  for name, what in (
    ("samples.png", "real digits beside samples"),
    ("schedule.png", "blur and noise against time"),
    ("reverse_process.png", "from noise and blur to digits, a row per time"),
    ("schedule.json", "the blur levels found"),
    ("config.json", "the resolved config"),
    ("checkpoints/", "the trained model"),
    ("tensorboard/", f"loss, loss by time, samples: tensorboard --logdir={workdir}/tensorboard"),
  ):
    print(f"  {workdir}/{name:22} {what}")
  print()
  print(f"Distances in {network.name}, N = {count}:")
  print(f"  samples            {trained}")
  print(f"  real against real  {trained.floor_line()}   (the floor)")
  print(f"  untrained network  {untrained}")
  print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes. Next, another sampler:")
  print(
    f"  .venv/bin/soft-diffusion-sample --workdir={workdir} --sampler=momentum --steps=60 "
    f"--out={workdir}/momentum.png"
  )


if __name__ == "__main__":
  cli.run(main)
