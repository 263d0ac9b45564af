"""Speed of feature extraction alone against the whole evaluation, and of the distance at full size.

Run as `tools/benchmark.py evaluate --feature_net=FOLDER [--data=cifar10 --data_dir=DIR]`.
Extraction alone is the network called on batches that lie ready in memory; the whole pipeline takes
8-bit images to features, moments, sums and kept rows. Both take turns over the same images, and
medians are compared, so that a shared machine's moods hit both alike. The last part streams
`--count` × `--dimension` random features through the statistics of two sides, in a process of its
own, and gives time and peak memory of all numbers.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np


def _clock():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return time.perf_counter(), usage.ru_utime + usage.ru_stime


def _timed(call):
  """(wall seconds, CPU seconds, result)."""
  wall, cpu = _clock()
  result = call()
  now, used = _clock()
  return now - wall, used - cpu, result


def _extraction(args):
  from soft_diffusion_tf import data, evaluation
  from soft_diffusion_tf.evaluation import features

  source = data.load(args.data, args.split, None, "auto", args.data_dir)
  count = min(args.images, len(source) // 2)
  network = features.feature_network(args.feature_net, source)
  images, other = source.images[:count], source.images[count : 2 * count]
  batches = evaluation.image_batches(images)
  ready = [b.astype(np.float32) / 255.0 for b in batches(0)]
  network(ready[0])
  network(ready[-1])

  def alone():
    for batch in ready:
      network(batch)

  def whole():
    return evaluation.measure(network, batches, count)

  runs = {"alone": [], "whole": []}
  for _ in range(args.repeats):
    runs["alone"].append(_timed(alone))
    runs["whole"].append(_timed(whole))
  real = evaluation.measure(network, evaluation.image_batches(other), count)
  last = runs["whole"][-1][2]
  wall, cpu, result = _timed(lambda: evaluation.compare(network, last, real))
  print(f"{network.name}, {count} images {images.shape[1:]} of {args.data}: {result}")
  print(f"  {wall:.1f} s ({cpu:.1f} CPU s) from the statistics to all numbers")
  print(f"{'':22}{'images/s':>10}{'CPU s/image':>13}{'cores busy':>12}")
  medians = {}
  for name, rows in runs.items():
    wall, cpu = (statistics.median(r[k] for r in rows) for k in (0, 1))
    medians[name] = wall, cpu
    print(f"{'extraction ' + name:22}{count / wall:10.1f}{cpu / count:13.4f}{cpu / wall:12.2f}")
  wall, cpu = (medians["whole"][k] / medians["alone"][k] - 1 for k in (0, 1))
  print(f"overhead of the pipeline: {wall:.1%} of the time, {cpu:.1%} of the CPU seconds")


_FULL = """
import json, re, sys, time
import numpy as np
import soft_diffusion_tf
import tensorflow as tf
from soft_diffusion_tf import evaluation, features
count, d = int(sys.argv[1]), int(sys.argv[2])
def peak():  # not ru_maxrss, which begins with the parent's
  return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**20
def cpu():
  return time.process_time()
evaluation._classifier_metrics()
empty = peak()
mix = np.random.default_rng(0).standard_normal([d, d], np.float32) / np.sqrt(d)
def stream(seed):
  spent = [0.0, 0.0]
  one = evaluation.Statistics(count)
  rng = np.random.default_rng(seed)
  for start in range(0, count, 100):
    rows = rng.standard_normal([min(100, count - start), d], np.float32) @ mix
    begin = time.perf_counter(), cpu()
    one.update(rows)
    spent = [spent[0] + time.perf_counter() - begin[0], spent[1] + cpu() - begin[1]]
  return one, spent
(one, a), (two, b) = stream(1), stream(2)
begin = time.perf_counter(), cpu()
distance = evaluation.frechet("FD", one.moments, two.moments)
frechet = time.perf_counter() - begin[0], cpu() - begin[1]
begin = time.perf_counter(), cpu()
result = evaluation.compare(features.FeatureNetwork("random", None), one, two)
print(json.dumps({"empty": empty, "peak": peak(), "moments": [a[0] + b[0], a[1] + b[1]],
  "frechet": frechet, "all": [time.perf_counter() - begin[0], cpu() - begin[1]],
  "value": distance.value, "exact": distance.exact}))
"""


def _full(args):
  command = [sys.executable, "-c", _FULL, str(args.count), str(args.dimension)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError(done.stderr)
  out = json.loads(done.stdout.splitlines()[-1])
  print(f"two sides of {args.count:,} x {args.dimension:,} features (wall s / CPU s):")
  for name, what in (
    ("moments", "moments of both sides"),
    ("frechet", "Fréchet distance, TF-GAN's and exact"),
    ("all", "all numbers (with spread, KID, precision, recall)"),
  ):
    print(f"  {what:52}{out[name][0]:7.1f} /{out[name][1]:7.1f}")
  print(f"  distance {out['value']:.6f}, exact {out['exact']:.6f}")
  print(
    f"  peak memory {out['peak']:.2f} GiB, of which {out['empty']:.2f} before the first feature"
  )


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py evaluate", description=__doc__)
  parser.add_argument(
    "--feature_net", default="classifier", help="see soft_diffusion_tf/evaluation/features.py"
  )
  parser.add_argument("--data", default="digits", help="data set of the images")
  parser.add_argument("--split", default="train", help="its split")
  parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
  parser.add_argument("--images", type=int, default=1000, help="images in a round")
  parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are shown")
  parser.add_argument(
    "--count", type=int, default=50_000, help="features a side; 0: skip this part"
  )
  parser.add_argument("--dimension", type=int, default=2048, help="numbers in a feature")
  args = parser.parse_args(argv)
  _extraction(args)
  if args.count:
    _full(args)
  return 0


if __name__ == "__main__":
  sys.exit(main())
