"""Images a second that the input pipeline gives, beside what the training step takes.

python tools/benchmark.py data --config=configs/digits_blur.py
"""

import argparse
import importlib.util
import os
import pathlib
import resource
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import data, training
from soft_diffusion_tf.experiment import from_file
from soft_diffusion_tf.training.loop import make_loop


def _of_train():
  spec = importlib.util.spec_from_file_location("train", pathlib.Path(__file__).parent / "train.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def main(argv):
  parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/digits_blur.py")
  parser.add_argument("--steps", type=int, default=20, help="training steps, after a first one")
  options = parser.parse_args(argv)
  experiment, source = _of_train().stand_in(from_file(options.config))
  size, flip = experiment.training.batch_size, experiment.data.flip

  iterator = iter(data.batches(source, size, flip=flip))
  next(iterator)
  usage, begin, count = resource.getrusage(resource.RUSAGE_SELF), time.monotonic(), 0
  while time.monotonic() - begin < 5:
    next(iterator)
    count += 1
  elapsed = time.monotonic() - begin
  after = resource.getrusage(resource.RUSAGE_SELF)
  cpu = (after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime) / count

  strategy = tf.distribute.get_strategy()
  model = training.build(experiment, experiment.build_diffusion())
  loop = make_loop(model, strategy)
  iterator = iter(data.batches(source, size, flip=flip))
  loop(iterator, tf.constant(1))
  steps, waits = [], []
  for _ in range(options.steps):
    begin = time.monotonic()
    totals, *_ = loop(iterator, tf.constant(1))
    waits.append(float(totals["wait"]))
    steps.append(time.monotonic() - begin)
  step = np.median(steps)
  print(f"{options.config}, batch {size}:")
  print(
    f"pipeline alone   {count * size / elapsed:12.0f} images/s ({cpu * 1e3:.2f} CPU ms a batch)"
  )
  print(f"a training step  {size / step:12.0f} images/s ({step * 1e3:.1f} ms)")
  print(f"share of a step spent waiting for input: {np.sum(waits) / np.sum(steps):.2%}")
  return 0
