"""What a training step costs over a bare forward and backward pass, and what adds to it.

  python tools/benchmark.py train --config=configs/digits_blur.py

Each line adds one thing to the line above; the calls take turns, so that a busy machine slows all
of them alike, and the medians of wall time are compared. The costs of a record and of a checkpoint
are measured by themselves and spread over the steps between two of them.
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import data, schedules, training
from soft_diffusion_tf.experiment import from_file
from soft_diffusion_tf.training import watching
from soft_diffusion_tf.training.checkpoints import Checkpoints
from soft_diffusion_tf.training.loop import make_loop
from soft_diffusion_tf.training.monitoring import Monitor


def stand_in(experiment):
  """The experiment with random images of its shape, and levels if those are yet to be found."""
  level = experiment.level
  if isinstance(getattr(level, "inner", level), schedules.Unfound):
    start, stop = schedules.ends(level)
    experiment = experiment.replace(level=schedules.Geometric(max(start, 1e-3), stop))
  shape = experiment.data.image_shape
  images = np.random.default_rng(0).integers(0, 256, [512, *shape], np.uint8)
  return experiment, data.Source("random", images, np.zeros([512], np.int64))


def interleaved(calls, seconds, rounds=5):
  """Medians of wall and of CPU seconds per call, {name: (wall, cpu)}; every round times all."""
  for call in calls.values():
    call()
  begin, found = time.monotonic(), {name: [] for name in calls}
  while True:
    for name, call in calls.items():
      usage, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
      call()
      after = resource.getrusage(resource.RUSAGE_SELF)
      cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
      found[name].append((time.monotonic() - start, cpu))
    if len(found[name]) >= rounds and time.monotonic() - begin > seconds:
      return {name: np.median(values, axis=0) for name, values in found.items()}


def _timed(function):
  start = time.monotonic()
  function()
  return time.monotonic() - start


def main(argv):
  parser = argparse.ArgumentParser(prog="benchmark.py train", description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/digits_blur.py")
  parser.add_argument("--batch", type=int, help="batch size instead of the config's")
  parser.add_argument("--threads", type=int, default=0, help="threads of an operation; 0: all")
  parser.add_argument("--seconds", type=float, default=60, help="at least this long")
  options = parser.parse_args(argv)
  tf.config.threading.set_intra_op_parallelism_threads(options.threads)
  if options.threads == 1:
    tf.config.threading.set_inter_op_parallelism_threads(1)
  cpu = tf.config.list_physical_devices("CPU")[0]
  tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
  experiment, source = stand_in(from_file(options.config))
  if options.batch:
    experiment = experiment.replace(training={"batch_size": options.batch})
  t = experiment.training
  model = training.build(experiment, experiment.build_diffusion())
  variables = [v.value for v in model.network.trainable_variables]
  x = tf.constant(source.floats(slice(0, t.batch_size)))
  cond = tf.exp(tf.linspace(0.0, 3.0, t.batch_size))

  @tf.function(autograph=False)
  def bare():
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(variables)
      seed = tf.constant([0, 0], tf.int64)
      out = model.network(x, cond, training=True, seed=seed, first=tf.constant(0))
      loss = tf.reduce_sum(tf.cast(out, tf.float32) ** 2)
    gradients = tape.gradient(loss, variables)
    return tf.add_n([tf.reduce_sum(g) for g in gradients if g is not None])

  @tf.function(autograph=False)
  def loss_too():
    gradients, *_ = model.gradients(x)
    return tf.add_n([tf.reduce_sum(g) for g in gradients])

  update = tf.function(lambda: model.update(x)["loss"], autograph=False)

  def looped(strategy, model):
    batches = data.batches(source, t.batch_size, flip=experiment.data.flip)
    iterator = iter(strategy.experimental_distribute_dataset(batches))
    loop = make_loop(model, strategy)
    return lambda: loop(iterator, tf.constant(1))[0]["loss"].numpy()

  two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
  with two.scope():
    both = training.build(experiment, experiment.build_diffusion())
  calls = {
    "forward and backward, bare": lambda: bare().numpy(),
    "+ process, loss, random numbers": lambda: loss_too().numpy(),
    "+ clip, Adam, averaged weights": lambda: update().numpy(),
    "+ input pipeline": looped(tf.distribute.get_strategy(), model),
  }
  devices = "the same batch on 2 logical devices"
  if t.batch_size % 2 == 0:
    calls[devices] = looped(two, both)
  found = interleaved(calls, options.seconds)

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    monitor = Monitor(folder, 0, 100, t.batch_size, progress=False)
    norms = watching.make_norms(model)
    buckets = np.ones(training.BUCKETS)
    totals = {"loss": 1.0, "norm": 1.0, "wait": 0.0, "sums": buckets, "counts": buckets}

    def record(step):
      monitor.advance(step, totals)
      monitor.record(step, learning_rate=model.optimizer.learning_rate, **norms())

    record(1)
    record_cost = np.median([_timed(lambda k=k: record(k)) for k in range(2, 12)])
    checkpoints = Checkpoints(folder / "checkpoints", model)
    checkpoints.save(wait=True)
    stalls, writes = zip(
      *[(_timed(checkpoints.save), _timed(checkpoints.wait)) for _ in range(5)], strict=True
    )
  stall, write = np.median(stalls), np.median(writes)

  names = [name for name in calls if name != devices]
  base = found[names[0]]
  print(f"{options.config}, batch {t.batch_size}, threads {options.threads or 'all'}:")
  print(f"{'':36}{'ms':>9}{'CPU ms':>9}{'images/s':>10}{'over bare':>11}{'(CPU)':>8}")
  for name in names:
    wall, used = found[name]
    print(
      f"{name:36}{wall * 1e3:9.1f}{used * 1e3:9.1f}{t.batch_size / wall:10.1f}"
      f"{wall / base[0] - 1:11.1%}{used / base[1] - 1:8.1%}"
    )
  step = found[names[-1]][0]
  extra = record_cost / t.log_every if t.log_every else 0
  if t.checkpoint_every:
    extra += stall / t.checkpoint_every
  whole = step + extra
  print(
    f"{'+ records and checkpoints':36}{whole * 1e3:9.1f}{'':9}{t.batch_size / whole:10.1f}"
    f"{whole / base[0] - 1:11.1%}"
  )
  print(
    f"a record takes {record_cost * 1e3:.1f} ms, one every {t.log_every} steps: "
    f"{record_cost / t.log_every / step if t.log_every else 0:.2%} of a step"
  )
  print(
    f"a checkpoint stalls training for {stall * 1e3:.0f} ms ({stall / step:.2f} steps); a "
    f"thread writes it in {write * 1e3:.0f} ms"
  )
  if devices in found:
    print(f"{devices}: {found[devices][0] / step:.2f} times the wall time of one device")
  return 0
