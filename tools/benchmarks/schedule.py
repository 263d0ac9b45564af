"""CPU time of finding a schedule, stage by stage, and what each of four means saves.

Run as `tools/benchmark.py schedule [--config=configs/cifar10_blur.py --data_dir=DIR --slice=0.1]`.
The means: the closed form, edges computed only where the search needs them, potentials to start
from, and a reduced basis. Sinkhorn without the last two is timed on a few edges of the path found,
evenly chosen, and multiplied; everything else runs in full. CPU seconds of the whole process, so
that other work on the machine does not count.

With --laboratory it grades schedules instead: the digits as a mixture of Gaussians have an exact
denoiser, so what samples lack is the fault of schedule, sampler and number of steps alone.
"""

import argparse
import pathlib
import resource
import sys

import numpy as np


def _cpu():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


class _Stages:
  """Name → CPU seconds."""

  def __init__(self):
    self.seconds = {}

  def __call__(self, name, function):
    start = _cpu()
    result = function()
    self.seconds[name] = _cpu() - start
    return result


def _human(seconds):
  return f"{seconds:10.1f} s" if seconds < 7200 else f"{seconds / 3600:10.1f} h"


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py schedule", description=__doc__)
  default = pathlib.Path(__file__).parents[2] / "configs" / "digits_blur.py"
  parser.add_argument("--config", default=str(default), help="config file of the experiment")
  parser.add_argument("--data_dir", default=None, help="where TFDS keeps its data sets")
  parser.add_argument("--slice", type=float, default=1.0, help="share of the data; P uses 0.1")
  parser.add_argument("--levels", type=int, default=256, help="candidate levels")
  parser.add_argument("--nodes", type=int, default=32, help="levels of the schedule")
  parser.add_argument("--pairs", type=int, default=5, help="edges timed without the last two means")
  parser.add_argument("--laboratory", action="store_true", help="grade schedules of the digits")
  parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40], help="of samplers")
  parser.add_argument("--samples", type=int, default=2000, help="drawn for every grade")
  args = parser.parse_args(argv)
  if args.laboratory:
    return laboratory(args.steps, args.samples)

  from soft_diffusion_tf import data, experiment, schedules, transport

  stage = _Stages()
  e = experiment.from_file(args.config)
  source = stage(
    "decode the data",
    lambda: data.load(
      e.data.name, e.data.train_split, e.data.image_shape, e.data.crop, args.data_dir
    ),
  )
  count = max(2, round(args.slice * len(source)))
  images = source.floats(np.sort(np.random.default_rng(e.seed).permutation(len(source))[:count]))
  first, last = schedules.ends(e.level)
  levels = stage(
    "candidate levels",
    lambda: transport.candidate_levels(e.corruption, first, last, args.levels, "transport", images),
  )
  stage(
    "check of the closed form", lambda: transport.check_closed_form(e.corruption, levels, images)
  )
  matrix = stage(
    "closed form, all pairs", lambda: transport.closed_form_distances(e.corruption, levels, images)
  )
  nodes = min(args.nodes, len(levels))
  path = stage("path and ε", lambda: transport.find_path(levels, matrix, nodes))
  closed = stage.seconds["closed form, all pairs"] + stage.seconds["path and ε"]

  sinkhorn, _ = transport.measure("sinkhorn", e.corruption, levels, images, nodes=nodes)
  found = stage(
    "Sinkhorn search, all four means", lambda: transport.find_path(levels, sinkhorn, nodes)
  )
  edges = len(sinkhorn.known)
  chosen = np.unique(np.linspace(0, len(path.indices) - 2, args.pairs).astype(int))
  pairs = [(path.indices[k], path.indices[k + 1]) for k in chosen]
  pixels = transport.Clouds(e.corruption, levels, 0 * levels, images)
  for name, warm in (("cold", False), ("warm", True)):
    solver = transport.Sinkhorn(
      pixels, matrix, epsilon=sinkhorn.epsilon, warm=warm, threshold=sinkhorn.threshold
    )
    solver.pairs(pairs[:1])  # compilation
    solver.known.clear()
    stage(name, lambda solver=solver: solver.pairs(pairs))
    stage.seconds[name] /= len(pairs)

  shape = "×".join(map(str, images.shape[1:]))
  print(f"{len(images):,} images of {shape}, {len(levels)} candidates, {len(path.levels)} nodes")
  print("CPU time of a stage:")
  for name, seconds in stage.seconds.items():
    if name not in ("cold", "warm"):
      print(f"  {name:34}{_human(seconds)}")
  cold, warm = stage.seconds["cold"], stage.seconds["warm"]
  whole = len(levels) * (len(levels) - 1) // 2
  means = (
    (f"Sinkhorn, {whole:,} edges, cold, in pixels", cold * whole),
    (f"+ lazy: {edges} edges", cold * edges),
    ("+ warm starts", warm * edges),
    ("+ reduced basis", stage.seconds["Sinkhorn search, all four means"]),
    ("closed form instead", closed),
  )
  print(f"What each means saves (the first three from {len(pairs)} edges):")
  before = None
  for name, seconds in means:
    gain = "" if before is None else f"{before / seconds:10.1f} ×"
    print(f"  {name:44}{_human(seconds)}{gain}")
    before = seconds
  shift = transport.shift(path.levels, found.levels, path.levels)
  print(f"closed form and Sinkhorn differ by at most {shift:.2g} steps")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"peak memory {peak:.2f} GiB")
  return 0


def laboratory(counts, samples, rules=("momentum", "ddim", "two_step")):
  """Squared Fréchet distance, in pixels, of samples to fresh draws, by schedule and sampler."""
  import tensorflow as tf

  from soft_diffusion_tf import (
    corruptions,
    data,
    diffusion,
    gaussians,
    oracles,
    priors,
    samplers,
    schedules,
    transport,
  )

  images = data.load("digits", "all").floats()
  mixture = oracles.GaussianMixture(images, std=0.05)
  fresh, more = (mixture.draw(samples, seed) for seed in (1, 2))
  blur, ends, noises = corruptions.GaussianBlur(16), (0.01, 6.0), (0.01, 0.1)
  staged = schedules.Staged(schedules.Geometric(*noises), 0.0, 0.2)

  def two_stage(levels):
    return schedules.Staged(schedules.piecewise(levels), 0.2, 1.0), staged

  def joint(method, steps):
    path = transport.search(
      blur, images, *ends, count=48, sigmas=(*noises, 16), nodes=steps + 1, method=method
    ).path
    return schedules.piecewise(path.levels.tolist()), schedules.piecewise(path.sigmas.tolist())

  found = two_stage(transport.find(blur, images, *ends)[0].levels.tolist())
  ve = schedules.Geometric(0.01, 50.0)
  matched = two_stage(transport.mse_matched(blur, images, *ends, staged, ve).tolist())
  kinds = {
    "two stages, found path (P)": lambda steps: found,
    "two stages, geometric": lambda steps: (
      schedules.Staged(schedules.Geometric(*ends), 0.2, 1.0),
      staged,
    ),
    "two stages, MSE as VE's (Eq. 55)": lambda steps: matched,
    "joint path, a node per step": lambda steps: joint("closed_form", steps),
    "joint path of Gaussians": lambda steps: joint("bures", steps),
  }
  print(f"{samples:,} samples; floor {gaussians.frechet_between(fresh, more):.4f}")
  print(f"{'steps':>5}  {'schedule':34}" + "".join(f"{rule:>12}" for rule in rules))
  for steps in counts:
    for name, make in kinds.items():
      level, sigma = make(steps)
      process = diffusion.Diffusion(images.shape[1:], blur, level, sigma)
      process = process.with_prior(priors.fit("subspace", images, process))
      sampler = samplers.Sampler(process, oracles.denoiser(mixture, process))
      grades = []
      for rule in rules:
        plan = samplers.plan(rule, samplers.time_grid(steps), process)
        drawn = sampler(plan, tf.range(samples, dtype=tf.int64)).numpy()
        grades.append(gaussians.frechet_between(drawn, fresh))
      line = "".join(f"{grade:12.4f}" for grade in grades)
      print(f"{steps:5}  {name:34}{line}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
