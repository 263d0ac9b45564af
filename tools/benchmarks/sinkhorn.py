"""Time of entropic transport between clouds of images, against ott-jax and POT if they are given.

Run as `tools/benchmark.py sinkhorn [--peers=PYTHON]`, where PYTHON is the interpreter of another
environment that has ott-jax or POT or both. All solvers get the same float32 arrays, the same ε
(0.05 std of the costs) and the same goal: marginals within `--threshold` in L1. They take turns in
every round, so that a shared machine's moods hit all alike, and medians are compared. Times go from
arrays in memory to potentials, the cost matrix included; compilation is left out.

POT stops by another norm. Its fastest combination of float32 or float64 and a tolerance that
reaches the goal is found first and that one is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

_PEER = """
import json, sys, time, warnings
import numpy as np
warnings.simplefilter("ignore")
path, threshold = sys.argv[1], float(sys.argv[2])
data = np.load(path)
x, y, epsilon = data["x"], data["y"], float(data["epsilon"])
n, m = len(x), len(y)
solvers = {}
try:
  import jax, jax.numpy as jnp
  from ott.geometry import pointcloud
  from ott.problems.linear import linear_problem
  from ott.solvers.linear import sinkhorn
  solve = sinkhorn.Sinkhorn(threshold=threshold)
  run = jax.jit(lambda x, y: solve(linear_problem.LinearProblem(
    pointcloud.PointCloud(x, y, epsilon=epsilon))))
  def ott():
    out = run(jnp.asarray(x), jnp.asarray(y))
    out.f.block_until_ready()
    return lambda: {"cost": float(out.reg_ot_cost), "iterations": int(out.n_iters),
                    "converged": bool(out.converged)}
  solvers["ott-jax"] = ott
except ImportError:
  pass
try:
  import ot
  def make(dtype, tolerance):
    def pot():
      xs, ys = x.astype(dtype), y.astype(dtype)
      costs = ot.dist(xs, ys)
      a, b = np.full(n, 1 / n, dtype), np.full(m, 1 / m, dtype)
      plan, log = ot.sinkhorn(a, b, costs, epsilon, stopThr=tolerance, numItermax=5000, log=True)
      def summary():
        p = plan.astype("f8")
        error = abs(p.sum(0) - 1 / m).sum() + abs(p.sum(1) - 1 / n).sum()
        entropy = (p * np.log(np.maximum(p, 1e-300) * n * m)).sum()
        return {"cost": float((p * costs).sum() + epsilon * entropy), "iterations": log["niter"],
                "converged": bool(error <= threshold), "kind": f"{dtype}, stopThr={tolerance}"}
      return summary
    return pot
  best = np.inf
  for dtype in ("float32", "float64"):
    for tolerance in (1e-4, 3e-5, 1e-5, 3e-6, 1e-6):
      candidate = make(dtype, tolerance)
      start = time.perf_counter()
      summary = candidate()
      spent = time.perf_counter() - start
      if summary()["converged"]:
        if spent < best:
          best, solvers["POT"] = spent, candidate
        break
except ImportError:
  pass
for solver in solvers.values():
  solver()
print(json.dumps(list(solvers)), flush=True)
for line in sys.stdin:
  start = time.perf_counter()
  summary = solvers[line.strip()]()
  spent = time.perf_counter() - start
  print(json.dumps({"seconds": spent, **summary()}), flush=True)
"""


def _images(rng, n):
  """Random images, float32 [n, 3072], with the spectrum and the uneven contrast of natural ones.

  Mean and spread of their distances are near CIFAR-10's, so a solver has as much to do as there.
  """
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
  gain = 1 / np.maximum(frequency, 1 / 32) ** 1.5
  noise = np.fft.fft2(rng.normal(size=(n, 1, 32, 32)) + 0.3 * rng.normal(size=(n, 3, 32, 32)))
  images = np.fft.ifft2(noise * gain).real
  contrast = np.exp(0.3 * rng.normal(size=(n, 1, 1, 1)))
  return (0.5 * images / images.std() * contrast).reshape(n, 3072).astype(np.float32)


def _blurred(images, std):
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
  gain = np.exp(-2 * (np.pi * std * frequency) ** 2)
  spectrum = np.fft.fft2(images.reshape(-1, 3, 32, 32)) * gain
  return np.fft.ifft2(spectrum).real.reshape(images.shape).astype(np.float32)


def _cases(n):
  """name → (x, y)."""
  rng = np.random.default_rng(0)
  x, other = _images(rng, n), _images(rng, n)
  noise = 0.1 * rng.normal(size=x.shape).astype(np.float32)
  return {
    "blurred, same noise": (x + noise, _blurred(x, 6.0) + noise),
    "disjoint images": (x + noise, _blurred(other, 3.0) + noise[::-1]),
  }


class _Peers:
  """The peers' process: answers one request per line."""

  def __init__(self, python, path, threshold):
    self._process = subprocess.Popen(
      [python, "-c", _PEER, path, str(threshold)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.names = json.loads(self._answer())

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("the peers' process ended: see its message above")
    return line

  def run(self, name):
    self._process.stdin.write(name + "\n")
    self._process.stdin.flush()
    return json.loads(self._answer())

  def close(self):
    self._process.stdin.close()
    self._process.wait()


def _benchmark(x, y, args):
  """name of solver → list of runs; the reference cost."""
  import tensorflow as tf

  from soft_diffusion_tf.transport.sinkhorn import sinkhorn

  def ours():
    start = time.perf_counter()
    result = sinkhorn(x, y, epsilon=epsilon, threshold=args.threshold)
    result.error.numpy()
    return {
      "seconds": time.perf_counter() - start,
      "cost": float(result.reg_ot_cost),
      "iterations": int(result.iterations),
      "converged": bool(result.converged),
    }

  reference = sinkhorn(x, y, dtype=tf.float64, threshold=1e-6)
  epsilon = float(reference.epsilon)
  ours()
  runs = {"soft_diffusion_tf": []}
  with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    peers = None
    if args.peers:
      np.savez(file, x=x, y=y, epsilon=epsilon)
      file.flush()
      peers = _Peers(args.peers, file.name, args.threshold)
      runs |= {name: [] for name in peers.names}
    for _ in range(args.repeats):
      for name in runs:
        runs[name].append(ours() if name == "soft_diffusion_tf" else peers.run(name))
    if peers:
      peers.close()
  return runs, float(reference.reg_ot_cost)


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py sinkhorn", description=__doc__)
  parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 5000], help="points per cloud")
  parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
  parser.add_argument("--threshold", type=float, default=1e-3, help="L1 error of the marginals")
  parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has ott-jax, POT or both")
  args = parser.parse_args(argv)

  for n in args.sizes:
    for case, (x, y) in _cases(n).items():
      runs, reference = _benchmark(x, y, args)
      print(f"\n{case}: n = {n:,}, d = {x.shape[1]:,}, marginals within {args.threshold:g}")
      print(f"{'':18}{'median s':>10}{'ratio':>8}{'iterations':>12}{'cost error':>12}")
      own = statistics.median(run["seconds"] for run in runs["soft_diffusion_tf"])
      for name, results in runs.items():
        median = statistics.median(run["seconds"] for run in results)
        last = results[-1]
        note = "" if last["converged"] else "  NOT CONVERGED"
        note += f"  ({last['kind']})" if "kind" in last else ""
        print(
          f"{name:18}{median:10.3f}{median / own:8.1f}{last['iterations']:12}"
          f"{abs(last['cost'] / reference - 1):12.1e}{note}",
          flush=True,
        )
  return 0


if __name__ == "__main__":
  sys.exit(main())
