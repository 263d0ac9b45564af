"""What the input pipeline gives, takes and holds, beside what the training step takes.

python tools/benchmark.py data --config=configs/cifar10_small.py
python tools/benchmark.py data --images=1000,20000 --ways=memory,pack,folder
python tools/benchmark.py data --images=20000 --ways=pack --side=256

With --images each way and number is measured in a process of its own: memory of the process and CPU
seconds to the first batch, both beyond those of a process that has loaded TensorFlow alone; then
batches of 128, flipped, for five seconds; with --train a further process trains. Memory is the
process's own (RssAnon), now and at most; pages of mapped files, which the system takes back where
others need the space, are apart. The images are generated, and deleted afterwards.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np

WAYS = ("memory", "pack", "folder")
BATCH = 128


def main(argv):
  parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/digits_blur.py")
  parser.add_argument("--steps", type=int, default=20, help="training steps, after a first one")
  parser.add_argument("--images", help="numbers of images, with commas between")
  parser.add_argument("--ways", default=",".join(WAYS), help="ways to hold them")
  parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
  parser.add_argument("--train", type=int, default=0, help="also so many steps of a small network")
  parser.add_argument("--folder", help="where the images are generated; by default for a while")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.one:
    measure = _trained if options.train else _one
    print(json.dumps(measure(options.one, options.side, options.train)))
  elif options.images:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
      _table(options, pathlib.Path(folder))
  else:
    _beside_a_step(options)
  return 0


# --- Memory, time to the first batch, images a second ---------------------------------------------


def _table(options, folder):
  numbers, ways = [int(n) for n in options.images.split(",")], options.ways.split(",")
  heads = f"{'images':>9}  {'way':7}{'to first batch':>15}{'memory':>9}{'at most':>9}{'file':>7}"
  print(f"{heads}  pipeline")
  bare = _measured("none", options.side, 0)
  held = {}
  for n in numbers:
    for way in ways:
      name = _generated(way, n, options.side, folder)
      got = _measured(name, options.side, 0)
      mine = {k: got[k] - bare[k] for k in ("cpu", "anon", "peak")}
      held[way, n] = mine["anon"]
      print(
        f"{n:9,}  {way:7}{mine['cpu']:11.1f} CPU s{mine['anon'] / 2**20:7.0f} M"
        f"{mine['peak'] / 2**20:7.0f} M{got['file'] / 2**20:6.0f}M  {got['rate']:,.0f} images/s, "
        f"{got['each'] * 1e6:.0f} CPU µs each",
        flush=True,
      )
      if options.train:
        got = _measured(name, options.side, options.train)
        print(
          f"{'':11}training: at most {got['peak'] / 2**30:.2f} GiB of its own, TensorFlow with it, "
          f"and {got['file'] / 2**30:.2f} of mapped files",
          flush=True,
        )
  for way in ways:
    if len(numbers) > 1:
      low, high = numbers[-2:]
      grown = (held[way, high] - held[way, low]) / (high - low)
      print(f"{way}: {grown:,.0f} bytes for each further image, of {options.side**2 * 3:,} bytes")
  print(f"TensorFlow alone: {bare['cpu']:.1f} CPU s, {bare['anon'] / 2**20:.0f} M")


def _generated(way, count, side, folder):
  """The name of a data set of smooth random images, generated if need be."""
  shape = (side, side, 3)

  def blocks():
    rng = np.random.default_rng(0)
    for begin in range(0, count, 1000):
      n = min(1000, count - begin)
      coarse = rng.integers(0, 256, [n, 8, 8, 3], np.uint8)
      yield begin, coarse.repeat(side // 8, 1).repeat(side // 8, 2)

  if way == "folder":
    from PIL import Image

    place = folder / f"{count}"
    for begin, images in blocks():
      (place / f"{begin}").mkdir(parents=True)
      for k, image in enumerate(images):
        Image.fromarray(image).save(place / f"{begin}" / f"{k:03}.png", compress_level=1)
    return f"folder:{place}"
  array = folder / f"{count}.npy"
  if not array.exists():
    held = np.lib.format.open_memmap(array, "w+", np.uint8, (count, *shape))
    for begin, images in blocks():
      held[begin : begin + len(images)] = images
    held.flush()
  if way == "memory":
    return f"folder:{array}"
  out = folder / f"{count}.pack"
  if not out.exists():
    code = (
      "import resource; from soft_diffusion_tf import data;"
      "from soft_diffusion_tf.data import pack;"
      f"shape = {shape}; made = pack.preparing(shape, 'auto', data.Policy());"
      f"load = lambda split, storage: data.load('folder:{array}', split, shape, storage=storage);"
      f"pack.write('{out}', load, 'generated', ['all'], made);"
      "u = resource.getrusage(resource.RUSAGE_SELF);"
      "anon = [s for s in open('/proc/self/status') if s.startswith('RssAnon')][0].split()[1];"
      "print(f'packing took {u.ru_utime + u.ru_stime:.0f} CPU s, with TensorFlow, and held '"
      "f'{int(anon) // 1024} M at its end')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
  return f"pack:{out}"


def _measured(name, side, train):
  flags = [f"--one={name}", f"--side={side}", f"--train={train}"]
  script = pathlib.Path(__file__).parents[1] / "benchmark.py"
  done = subprocess.run(
    [sys.executable, str(script), "data", *flags], check=True, capture_output=True, text=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def _memory():
  """Bytes of this process: its own, and of mapped files, now."""
  text = pathlib.Path("/proc/self/status").read_text()
  lines = dict(line.split(":", 1) for line in text.splitlines())
  return [int(lines[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile")]


@contextlib.contextmanager
def _watched():
  """A list of the process's own memory and that of mapped files, each at its most meanwhile."""
  most, done = _memory(), threading.Event()

  def look():
    while not done.wait(0.02):
      most[:] = map(max, most, _memory())

  thread = threading.Thread(target=look)
  thread.start()
  try:
    yield most
  finally:
    done.set()
    thread.join()
    most[:] = map(max, most, _memory())


def _cpu():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def _one(name, side, train):
  """Measures one data set in this process."""
  import tensorflow as tf

  from soft_diffusion_tf import data

  if name == "none":
    next(iter(tf.data.Dataset.range(3).map(lambda x: x + 1)))
    anon, file = _memory()
    return {"cpu": _cpu(), "anon": anon, "file": file, "peak": anon}
  with _watched() as most:
    source = data.load(name, _split(name), (side, side, 3), progress=False, most=1 << 30)
    iterator = iter(data.batches(source, BATCH, flip=True))
    next(iterator)
    cpu, (anon, _) = _cpu(), _memory()
  begin, used, count = time.monotonic(), _cpu(), 0
  while time.monotonic() - begin < 5:
    next(iterator)
    count += BATCH
  rate = count / (time.monotonic() - begin)
  found = {"cpu": cpu, "anon": anon, "peak": most[0], "file": _memory()[1], "rate": rate}
  return found | {"each": (_cpu() - used) / count}


def _split(name):
  """The larger part of a folder of pictures, and all of what has no splits."""
  return "train" if name.startswith("folder:") and not name.endswith(".npy") else "all"


def _trained(name, side, steps):
  """Trains a small network for a few steps in this process."""
  from soft_diffusion_tf import experiment, training

  split = _split(name)
  e = experiment.from_file("cifar10_small")
  e = e.replace(
    data={
      "name": name,
      "image_shape": (side, side, 3),
      "train_split": split,
      "test_split": split,
    },
    network={"nf": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    training={
      "batch_size": 8,
      "steps": steps,
      "checkpoint_every": 0,
      "sample_every": 0,
      "keep_every": 0,
    },
  )
  e, _ = _of_train().stand_in(e)
  with tempfile.TemporaryDirectory() as workdir, _watched() as most:
    training.train(e, workdir, progress=False)
  return {"peak": most[0], "file": most[1]}


# --- Beside a training step -----------------------------------------------------------------------


def _of_train():
  spec = importlib.util.spec_from_file_location("train", pathlib.Path(__file__).parent / "train.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _beside_a_step(options):
  import tensorflow as tf

  from soft_diffusion_tf import data, training
  from soft_diffusion_tf.experiment import from_file
  from soft_diffusion_tf.training.loop import make_loop

  experiment, source = _of_train().stand_in(from_file(options.config))
  size, flip = experiment.training.batch_size, experiment.data.flip

  iterator = iter(data.batches(source, size, flip=flip))
  next(iterator)
  used, begin, count = _cpu(), time.monotonic(), 0
  while time.monotonic() - begin < 5:
    next(iterator)
    count += 1
  elapsed = time.monotonic() - begin
  cpu = (_cpu() - used) / count

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
