"""Speed of NCSN++: forward pass and full training step, and where their time goes.

  python tools/benchmark.py network --config=small --threads=1

A training step is loss, backward pass, clipping, Adam and averaging of the weights. Floating-point
operations are those of convolutions and matrix products, counted from the graph; the peak is that
of one large matrix product on the same threads. CPU seconds, unlike wall time, compare on a machine
that has other work to do.
"""

import argparse
import collections
import glob
import os
import resource
import tempfile
import time

# Convolutions by oneDNN, 1.3 times as fast as TensorFlow's own on CPUs where it is off by default.
# TensorFlow reads this when it is first imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import tensorflow as tf

from soft_diffusion_tf.networks import NCSNpp

CONFIGS = {  # (batch, options)
  "small": (32, {"nf": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 2}),
  "cifar10_blur": (8, {}),  # the network of configs/cifar10_blur.py
}
_KINDS = ("conv", "attention", "norm", "resampling", "rest")


def _operations(function):
  """Floating-point operations of the products in a concrete function: (convolutions, all)."""
  conv = total = 0
  for op in function.graph.get_operations():
    shapes = [tuple(t.shape) if t.shape.rank is not None else () for t in op.inputs]
    out = op.outputs[0].shape if op.outputs else ()
    count = 0
    if op.type == "Conv2D":
      kh, kw, c_in, _ = shapes[1]
      count = out.num_elements() * kh * kw * c_in
    elif op.type == "Conv2DBackpropInput":
      kh, kw, c_in, _ = shapes[1]
      count = tf.TensorShape(shapes[2]).num_elements() * kh * kw * c_in
    elif op.type == "Conv2DBackpropFilter":
      kh, kw, c_in, _ = out
      count = tf.TensorShape(shapes[2]).num_elements() * kh * kw * c_in
    elif op.type in ("MatMul", "BatchMatMulV2"):
      transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
      count = out.num_elements() * shapes[0][-2 if transposed else -1]
    conv += 2 * count * op.type.startswith("Conv2D")
    total += 2 * count
  return conv, total


def _kind(name, op):
  if "attention" in name:
    return "attention"
  if "norm" in name:
    return "norm"
  if "Depthwise" in op or op in ("Pad", "Slice", "AvgPool", "AvgPoolGrad"):
    return "resampling"
  if "Conv2D" in op or "_shortcut" in name or "_combine" in name:
    return "conv"
  return "rest"


def _shares(call, steps=3):
  """Milliseconds per call by kind of operation, from TensorFlow's profiler."""
  from tensorflow.tsl.profiler.protobuf import xplane_pb2

  with tempfile.TemporaryDirectory() as log:
    with tf.profiler.experimental.Profile(log):
      for _ in range(steps):
        call()
    space = xplane_pb2.XSpace()
    with open(glob.glob(f"{log}/**/*.xplane.pb", recursive=True)[0], "rb") as file:
      space.ParseFromString(file.read())
  spent = collections.Counter(dict.fromkeys(_KINDS, 0.0))
  for plane in space.planes:
    for line in plane.lines:
      for event in line.events:
        name, _, op = plane.event_metadata[event.metadata_id].name.rpartition(":")
        if name and op.replace("_", "").isalnum() and not name.endswith((":", "Execute")):
          spent[_kind(name, op)] += event.duration_ps / 1e9 / steps
  return spent


def _time(call, repeats):
  """Medians of wall and CPU seconds per call."""
  call()
  call()
  wall, cpu = [], []
  for _ in range(repeats):
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
  return sorted(wall)[repeats // 2], sorted(cpu)[repeats // 2]


def _peak(repeats, size=2048):
  """Floating-point operations per second of one large matrix product."""
  a = tf.random.stateless_normal([size, size], [0, 0])
  # The result must be looked at, or a graph would not compute it.
  product = tf.function(lambda: tf.matmul(a, a)[0, 0], autograph=False)
  return 2 * size**3 / _time(lambda: product().numpy(), repeats)[0]


def make_steps(network, batch, training=True):
  """(forward, step), two tf.functions without arguments; the step has all of a training step."""
  draw = lambda k, shape: tf.random.stateless_normal(shape, [k, 0])
  x, noise = (tf.Variable(draw(k, [batch, *network.image_shape])) for k in (0, 1))
  sigma = tf.Variable(tf.exp(draw(2, [batch])))
  weights = [v.value for v in network.trainable_variables]
  averages = [tf.Variable(w, trainable=False) for w in weights]
  optimizer = keras.optimizers.Adam(2e-4)
  optimizer.build(network.trainable_variables)
  seed = tf.Variable([1, 2])

  @tf.function
  def forward():
    return network(x, sigma)

  @tf.function
  def step():
    seed.assign_add([1, 0])
    with tf.GradientTape() as tape:
      y = network(x + sigma[:, None, None, None] * noise, sigma, training=training, seed=seed)
      loss = tf.reduce_mean(0.5 * tf.reduce_sum(tf.square(y - x), [1, 2, 3]))
    gradients = tape.gradient(loss, weights)
    gradients, _ = tf.clip_by_global_norm(gradients, 1.0)
    optimizer.apply(gradients, network.trainable_variables)
    for average, weight in zip(averages, weights):
      average.assign_sub(1e-3 * (average - weight))
    return loss

  return forward, step


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py network", description=__doc__.split("\n")[0])
  parser.add_argument("--config", choices=CONFIGS, default="small")
  parser.add_argument("--threads", type=int, default=0, help="0: all of the machine's")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--batch", type=int, help="images per step, instead of the configuration's")
  parser.add_argument("--dtype", default="float32", help="or mixed_bfloat16")
  parser.add_argument("--dropout", type=float, default=0.1)
  parser.add_argument("--remat", action="store_true", help="gradient checkpointing")
  args = parser.parse_args(argv)

  tf.config.threading.set_intra_op_parallelism_threads(args.threads)
  tf.config.threading.set_inter_op_parallelism_threads(1 if args.threads == 1 else 0)
  batch, options = CONFIGS[args.config]
  batch = args.batch or batch
  network = NCSNpp(
    image_shape=(32, 32, 3),
    progressive_input="residual",
    dropout=args.dropout,
    remat=args.remat,
    dtype=args.dtype,
    **options,
  )
  print(
    f"{args.config}: {network.count_params():,} parameters, batch {batch}, {args.dtype}, "
    f"{args.threads or os.cpu_count()} threads, TensorFlow {tf.__version__}"
  )
  peak = _peak(args.repeats)
  print(f"matrix product: {peak / 1e9:.0f} GFLOP/s")
  for name, function in zip(("forward", "train step"), make_steps(network, batch)):
    conv, total = _operations(function.get_concrete_function())
    call = lambda function=function: tf.nest.map_structure(lambda t: t.numpy(), function())
    wall, cpu = _time(call, args.repeats)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
      f"{name}: {wall:.3f} s wall, {cpu:.3f} s CPU, {batch / wall:.1f} images/s, "
      f"{total / wall / 1e9:.0f} GFLOP/s ({total / wall / peak:.0%} of the matrix product), "
      f"peak memory {memory:.2f} GiB"
    )
    spent = _shares(call)
    everything = sum(spent.values())
    print("  " + ", ".join(f"{kind} {spent[kind] / everything:.0%}" for kind in _KINDS))
    # Profiled times of operations that ran side by side add up; one thread alone tells.
    rate = conv / (spent["conv"] / 1e3)
    print(f"  convolutions: {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the matrix product")


if __name__ == "__main__":
  main()
