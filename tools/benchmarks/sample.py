"""What a sampler's step costs beside the network's forward pass, and images per second.

  python tools/benchmark.py sample --config=small --threads=1

Two measurements in one run, turn by turn, medians: the whole loop against the bare forward pass
(true, but a difference of two large noisy numbers), and the loop around a denoiser that costs
nothing (everything that a step adds: levels, C_s x̂_0, C_t x̂_0, noise, the loop itself). CPU
seconds, unlike wall time, compare on a machine that has other work to do.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import corruptions, diffusion, priors, samplers, schedules
from soft_diffusion_tf.networks import NCSNpp

CONFIGS = {  # (batch, steps a measurement, network options, goal)
  "small": (32, 4, {"nf": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 2}, 0.05),
  "cifar10_blur": (16, 2, {}, 0.02),  # the network of configs/cifar10_blur.py
}


def _timed(call):
  wall, cpu = time.perf_counter(), time.process_time()
  call()
  return time.perf_counter() - wall, time.process_time() - cpu


def _medians(calls, repeats):
  """Name → medians of (wall, CPU) seconds; the calls take turns, after one round to warm up."""
  for call in calls.values():
    call()
  times = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      times[name].append(_timed(call))
  return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in times.items()}


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py sample", description=__doc__.split("\n")[0])
  parser.add_argument("--config", choices=CONFIGS, default="small")
  parser.add_argument("--threads", type=int, default=0, help="0: all of the machine's")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--batch", type=int, help="images per batch, instead of the configuration's")
  parser.add_argument("--sampler", default="momentum")
  args = parser.parse_args(argv)

  tf.config.threading.set_intra_op_parallelism_threads(args.threads)
  tf.config.threading.set_inter_op_parallelism_threads(1 if args.threads == 1 else 0)
  batch, steps, options, goal = CONFIGS[args.config]
  batch = args.batch or batch
  shape = (32, 32, 3)
  # Noise that rises all along, so that every step of a stochastic sampler draws some.
  process = diffusion.Diffusion(
    shape,
    corruptions.GaussianBlur(),
    schedules.Geometric(0.01, 18.0),
    schedules.Geometric(0.01, 0.1),
    priors.zero(shape),
  )
  network = NCSNpp(image_shape=shape, progressive_input="residual", dropout=0.0, **options)

  def denoiser(x_t, t):
    return x_t + network(x_t, tf.exp(-4.6 + 8.5 * t))

  forward = tf.function(denoiser, autograph=False)
  seeds = np.arange(batch)
  x, t = process.draw_prior(seeds), tf.fill([batch], 0.5)
  full = samplers.Sampler(process, denoiser)
  bare = samplers.Sampler(process, lambda x_t, t: x_t)
  table = lambda n: samplers.plan(
    args.sampler, samplers.time_grid(samplers.steps_for(args.sampler, n)), process
  )
  plan, many = table(steps), table(200)
  found = _medians(
    {
      "forward": lambda: [forward(x, t).numpy() for _ in range(plan.shape[0])],
      "sampler": lambda: full(plan, seeds, x).numpy(),
      "step": lambda: bare(many, seeds, x).numpy(),
    },
    args.repeats,
  )
  per = {
    "forward": plan.shape[0],
    "sampler": plan.shape[0],
    "step": many.shape[0],
  }
  each = {name: tuple(v / per[name] for v in pair) for name, pair in found.items()}
  print(
    f"{args.config}: {network.count_params():,} parameters, batch {batch}, {args.sampler}, "
    f"{args.threads or os.cpu_count()} threads, TensorFlow {tf.__version__}"
  )
  for name, (wall, cpu) in each.items():
    print(f"{name:8} {wall * 1e3:9.2f} ms wall  {cpu * 1e3:9.2f} ms CPU  per evaluation")
  for k, kind in enumerate(("wall", "CPU")):
    print(
      f"overhead, {kind}: {each['step'][k] / each['forward'][k]:.2%} by the step alone, "
      f"{each['sampler'][k] / each['forward'][k] - 1:+.2%} by difference (goal: under {goal:.0%})"
    )
  rate = batch / each["sampler"][0]
  print("images/s: " + ", ".join(f"{n} evaluations {rate / n:.3g}" for n in (10, 20, 50, 100, 280)))


if __name__ == "__main__":
  main()
