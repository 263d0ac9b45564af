"""Runs an exported training step and sampler where there is JAX and no TensorFlow.

`portable.py export` puts this file into the folder that it writes, so that the folder is all that
another machine needs:

  python FOLDER/run.py --out=RESULTS --seconds=600      # train for ten minutes, then draw
  python FOLDER/run.py --out=RESULTS --steps=20         # or so many steps
  python FOLDER/run.py --time=100                       # how fast a step is here, and how exact
  python FOLDER/run.py --check=h100                     # compile for an H100 without one

It imports JAX and NumPy alone (and Pillow, where the images travel as JPEG files), prints a line a
stage, keeps its own clock and saves as it goes. `portable.py import` makes a workdir of RESULTS.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import pathlib
import struct
import sys
import threading
import time
import zlib

FORMAT = 1  # of the folder; `portable.py` writes it
JAX = "0.11.2"  # the conversion below calls functions that JAX does not promise to keep
PART = 15 * 2**20  # bytes of a file of results, at the most
BUCKETS = 10  # of t, for the held-out loss
RESERVE = 1.15  # of the time that drawing is expected to take

# XLA's GpuTargetConfigProto: what its compiler asks of a GPU that is not there. Facts of NVIDIA's
# H100 SXM; cuDNN 9.12 and CUDA 13.0 are those of JAX's plugin.
TARGETS = {
  "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}

_START = time.monotonic()


def say(text):
  """A line with the seconds since the start."""
  print(f"[{time.monotonic() - _START:7.1f} s] {text}", flush=True)


@contextlib.contextmanager
def stage(text, every=30.0):
  """Says every so often that a stage is still at work, so that a slow one is seen as such."""
  ended = threading.Event()
  begin = time.monotonic()

  def remind():
    while not ended.wait(every):
      say(f"... {text}, for {time.monotonic() - begin:.0f} s now")

  threading.Thread(target=remind, daemon=True).start()
  try:
    yield
  finally:
    ended.set()


class Refused(Exception):
  """Bad input: one line that names the cause and the remedy."""


# --- The folder -----------------------------------------------------------------------------------


def digest_of_manifest(manifest):
  """The digest of all that a manifest says, and so of every file that it names: one export."""
  rest = {k: v for k, v in manifest.items() if k != "digest"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder):
  """The manifest of an exported folder, every file in it checked against its digest."""
  path = folder / "manifest.json"
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    version = manifest["format"]
  except FileNotFoundError:
    raise Refused(f"{folder}: no manifest.json in it; is it a folder that export wrote?") from None
  except (OSError, ValueError, KeyError, TypeError):
    raise Refused(f"{path}: not a manifest; export again") from None
  if version != FORMAT:
    raise Refused(f"{path}: of format {version}, and this run.py reads {FORMAT}; export again")
  if manifest.get("digest") != digest_of_manifest(manifest):
    raise Refused(f"{path} is damaged; copy the folder again")
  for name, digest in manifest["files"].items():
    try:
      content = (folder / name).read_bytes()
    except OSError:
      raise Refused(f"{folder / name} is missing; copy the whole folder again") from None
    if hashlib.sha256(content).hexdigest() != digest:
      raise Refused(f"{folder / name} is damaged; copy the folder again")
  return manifest


def read_images(folder, name):
  """Images uint8 [N, H, W, C]: an .npy, or JPEG files one after the other (.npz)."""
  import numpy as np

  path = folder / name
  if path.suffix == ".npy":
    return np.load(path, allow_pickle=False)
  try:
    from PIL import Image
  except ImportError:
    raise Refused("the images are JPEG files; install pillow, or export without --jpeg") from None

  with np.load(path, allow_pickle=False) as content:
    data, sizes = content["data"].tobytes(), content["sizes"]
    digest = content["digest"].item().decode()
  ends = np.cumsum(sizes)

  def one(k):
    file = io.BytesIO(data[ends[k] - sizes[k] : ends[k]])
    return np.asarray(Image.open(file).convert("RGB"))

  with concurrent.futures.ThreadPoolExecutor() as pool:
    images = np.stack(list(pool.map(one, range(len(sizes)), chunksize=256)))
  if hashlib.sha256(images.tobytes()).hexdigest() != digest:
    say("note: this machine's JPEG decoder rounds otherwise than the exporter's")
  return images


def initial_state(manifest, folder):
  """Every variable by name, as NumPy arrays: stored, filled, or drawn again from its seed."""
  import numpy as np

  with np.load(folder / "state.npz", allow_pickle=False) as content:
    stored = dict(content)
  state = {}
  for name, recipe in manifest["state"].items():
    shape, kind = tuple(recipe["shape"]), recipe["kind"]
    if kind == "stored":
      state[name] = stored[name]
    elif kind == "fill":
      state[name] = np.full(shape, recipe["value"], recipe["dtype"])
    elif kind == "uniform":
      limit = recipe["limit"]
      draw = np.random.default_rng(recipe["seed"]).uniform(-limit, limit, shape)
      state[name] = draw.astype(np.float32)
  for name, recipe in manifest["state"].items():
    if recipe["kind"] == "same":
      state[name] = state[recipe["as"]].copy()
  if digest_of(state) != manifest["state_digest"]:
    raise Refused(
      "the initial state is not the exporter's: NumPy draws other numbers here; export with --store"
    )
  return state


def digest_of(state):
  """A digest of arrays by name."""
  total = hashlib.sha256()
  for name in sorted(state):
    total.update(name.encode() + state[name].tobytes())
  return total.hexdigest()


# --- Programs -------------------------------------------------------------------------------------


def check_jax():
  """JAX, or the Refused of one that is missing, of another version, or without its device."""
  try:
    import jax
  except ImportError:
    raise Refused(f"JAX is not installed; pip install jax=={JAX} (Python 3.12 or later)") from None
  except Exception as error:  # whatever a broken installation raises
    raise Refused(f"JAX cannot be imported ({first_line(error)}); install it again") from None
  version = getattr(jax, "__version__", "of no version")
  if version != JAX:
    raise Refused(f"JAX {version} is installed, not {JAX}; pip install jax=={JAX}")
  jax.config.update("jax_enable_x64", True)  # seeds and steps are int64
  return jax


def device_of(jax):
  """(device, platform as `jax.export` calls it, steps in one call)."""
  try:
    device, platform = jax.devices()[0], jax.default_backend()
  except RuntimeError as error:
    raise Refused(
      f"JAX finds no device ({first_line(error)}); mend its installation, or set JAX_PLATFORMS=cpu"
    ) from None
  return device, {"gpu": "cuda"}.get(platform, platform), 1 if platform == "cpu" else 20


def first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def exported(folder, manifest, name, platform, precision="default"):
  """A program of the folder as a `jax.export.Exported` for a platform.

  JAX exports a stand-in of the same arguments and results, whose code is then replaced.

  Args:
    precision: "highest" computes the network's products in full float32 too.
  """
  import jax
  import jax.numpy as jnp
  from jax import export
  from jax._src.interpreters import mlir
  from jax._src.lib import _jax
  from jax._src.lib.mlir import ir
  from jaxlib.mlir.dialects import stablehlo

  program = manifest["programs"][name]
  text = gzip.decompress((folder / program["file"]).read_bytes()).decode()
  with mlir.make_ir_context():
    module = ir.Module.parse(text)
    for attribute in [a if isinstance(a, str) else a.name for a in module.operation.attributes]:
      if attribute.startswith("mhlo."):
        del module.operation.attributes[attribute]
    if precision == "highest":
      both = ir.ArrayAttr.get([stablehlo.PrecisionAttr.get("HIGHEST")] * 2)

      def state_it(operation):
        if operation.name in ("stablehlo.dot_general", "stablehlo.convolution"):
          operation.attributes["precision_config"] = both
        return ir.WalkResult.ADVANCE

      module.operation.walk(state_it)
    code = bytes(_jax.mlir.serialize_portable_artifact(module, stablehlo.get_current_version()))
  spec = lambda shape, dtype: jax.ShapeDtypeStruct(tuple(shape), dtype)
  variables = manifest["state"]
  given = [spec(*a) for a in program["arguments"]]
  given += [spec(variables[v]["shape"], variables[v]["dtype"]) for v in program["variables"]]
  results = [spec(*r) for r in program["results"]]
  results += [spec(variables[v]["shape"], variables[v]["dtype"]) for v in program["updated"]]

  def stand_in(*arguments):
    seen = sum(a.reshape(-1)[0].astype(jnp.float32) for a in arguments)  # none may be dropped
    return [jnp.zeros(r.shape, r.dtype) + seen.astype(r.dtype) for r in results]

  frame = export.export(jax.jit(stand_in), platforms=[platform])(*given)
  return dataclasses.replace(frame, mlir_module_serialized=code, fun_name=name)


class Programs:
  """The step, the sampler and the held-out loss of a folder, compiled for one device.

  Args:
    device: a JAX device, or None with `target`: a topology's device, to compile for alone.
    inside: training steps in one call.
  """

  def __init__(self, folder, manifest, device, platform, inside=1, precision="default"):
    import jax

    self._jax, self.manifest, self.device, self.inside = jax, manifest, device, inside
    self._sharding = jax.sharding.SingleDeviceSharding(device)
    self._frames = {
      name: exported(folder, manifest, name, platform, precision) for name in manifest["programs"]
    }
    self.compiled, self.flops = {}, {}

  def _spec(self, shape, dtype):
    return self._jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._sharding)

  def _state_specs(self, names):
    variables = self.manifest["state"]
    return {v: self._spec(variables[v]["shape"], variables[v]["dtype"]) for v in names}

  def compile(self, name):
    """Compiles "train", "sample" or "evaluate"; returns seconds."""
    jax = self._jax
    begin = time.monotonic()
    program, call = self.manifest["programs"][name], self._frames[name].call
    updated = program["updated"]
    fixed = [v for v in program["variables"] if v not in updated]
    arguments = [self._spec(*a) for a in program["arguments"]]

    if name == "train":
      images, index = arguments
      index = self._spec((self.inside, *index.shape), index.dtype)

      def function(state, fixed, images, index):
        def step(state, index):
          both = state | fixed
          loss, norm, *new = call(images, index, *(both[v] for v in program["variables"]))
          return dict(zip(updated, new)), (loss, norm)

        if self.inside == 1:
          state, (loss, norm) = step(state, index[0])
          return state, (loss[None], norm[None])
        return jax.lax.scan(step, state, index)

      specs = (self._state_specs(updated), self._state_specs(fixed), images, index)
      jitted = jax.jit(function, donate_argnums=0)
    else:

      def function(fixed, *given):
        return call(*given, *(fixed[v] for v in program["variables"]))

      specs = (self._state_specs(fixed), *arguments)
      jitted = jax.jit(function)
    try:
      lowered = jitted.lower(*specs)
      self.compiled[name] = lowered.compile()
    except Exception as error:  # of jaxlib's own class
      raise refused(f"compiling {name!r}", error) from error
    return time.monotonic() - begin

  def operations(self):
    """Floating-point operations of a training step, as XLA counts them before it optimises."""
    program = self.manifest["programs"]["train"]
    given = [self._spec(*a) for a in program["arguments"]]
    given += list(self._state_specs(program["variables"]).values())
    cost = self._jax.jit(self._frames["train"].call).lower(*given).cost_analysis() or {}
    return cost.get("flops", math.nan)

  def memory(self, name):
    """Bytes on the device while a program runs, by what they are for."""
    stats = self.compiled[name].memory_analysis()
    parts = {
      "arguments": stats.argument_size_in_bytes,
      "temporaries": stats.temp_size_in_bytes,
      "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    }
    return parts | {"together": sum(parts.values())}


def refused(doing, error):
  """The Refused of a fault of JAX's: its first line, and for want of memory the remedy."""
  if "RESOURCE_EXHAUSTED" in str(error):
    return Refused(
      f"{doing}: the device's memory does not suffice ({first_line(error)}); export with a smaller "
      "--config.training.batch_size or --sample_batch"
    )
  return Refused(f"{doing}: {first_line(error)}")


# --- Results --------------------------------------------------------------------------------------


def write(path, content):
  """Writes a file whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  partial.replace(path)


def save_state(out, prefix, arrays, dtype=None):
  """Arrays by name in new files PREFIX-0.npz, … of at most PART bytes: {file: digest}.

  Files that are there are left alone: whoever reads them goes by the record that names them.
  """
  import numpy as np

  parts, size = [{}], 0
  for name, value in arrays.items():
    value = np.asarray(value)
    if dtype and value.dtype == np.float32:
      value = value.astype(dtype)
    if parts[-1] and size + value.nbytes > PART - 2**19:
      parts.append({})
      size = 0
    parts[-1][name] = value
    size += value.nbytes
  files = {}
  for k, part in enumerate(parts):
    content = io.BytesIO()
    np.savez(content, **part)
    write(out / f"{prefix}-{k}.npz", content.getvalue())
    files[f"{prefix}-{k}.npz"] = hashlib.sha256(content.getvalue()).hexdigest()
  return files


def png(image):
  """A picture uint8 [H, W, 1 or 3] as the bytes of a PNG file."""
  height, width, channels = image.shape
  rows = b"".join(b"\0" + row.tobytes() for row in image)
  chunk = lambda kind, data: (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
  body = zlib.compress(rows, 6)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def sheet(images, columns):
  """Images uint8 [N, H, W, C] side by side, row by row; black where there is none."""
  import numpy as np

  n, h, w, c = images.shape
  rows = -(-n // columns)
  filled = np.zeros([rows * columns, h, w, c], np.uint8)
  filled[:n] = images
  filled = filled.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
  return filled.reshape(rows * h, columns * w, c)


def save_samples(out, plan, images):
  """Samples uint8 [N, H, W, C] in seed order: sheets of 100 columns as PNG, or an .npy."""
  import numpy as np

  name = plan.replace(":", "_").replace("+", "_")
  each = max(100, PART // images[0].nbytes // 100 * 100)
  for k in range(0, len(images), each):
    part, first = images[k : k + each], f"samples-{name}-{k:06d}"
    if images.shape[-1] in (1, 3):
      write(out / f"{first}.png", png(sheet(part, 100)))
    else:
      content = io.BytesIO()
      np.save(content, part)
      write(out / f"{first}.npy", content.getvalue())


class Record:
  """result.json: what was done, rewritten whole at each change."""

  def __init__(self, out, **facts):
    self._out, self.facts = out, facts

  def add(self, **facts):
    self.facts |= facts
    write(self._out / "result.json", (json.dumps(self.facts, indent=1) + "\n").encode())


# --- Running --------------------------------------------------------------------------------------


class Session:
  """A state on a device, with the programs that change it and draw from it."""

  def __init__(self, folder, manifest, programs, images, held_out, order):
    import jax
    import numpy as np

    self._jax, self._np, self._programs = jax, np, programs
    self.manifest, self.order = manifest, order
    put = lambda x: jax.device_put(x, programs.device)
    self.state = {name: put(v) for name, v in initial_state(manifest, folder).items()}
    self._images, self._held_out = put(images), put(held_out)
    self.step = manifest["step"]
    with np.load(folder / "plans.npz", allow_pickle=False) as content:
      self.plans = dict(content)

  def train(self):
    """One call of the compiled step: `inside` steps; returns losses and gradient norms."""
    inside = self._programs.inside
    done = self.step - self.manifest["step"]
    # A run by the clock may outlast the order that was exported, and then begins it anew.
    index = self.order[(done + self._np.arange(inside)) % len(self.order)].astype(self._np.int32)
    program = self.manifest["programs"]["train"]
    state = {v: self.state[v] for v in program["updated"]}
    fixed = {v: self.state[v] for v in program["variables"] if v not in state}
    index = self._jax.device_put(index, self._programs.device)
    new, (loss, norm) = self._programs.compiled["train"](state, fixed, self._images, index)
    self.state |= new
    self.step += inside
    return loss, norm

  def _averages(self, name):
    return {v: self.state[v] for v in self.manifest["programs"][name]["variables"]}

  def held_out(self):
    """The held-out loss of the averaged weights: the mean, and the means by t."""
    np = self._np
    batch = self.manifest["programs"]["evaluate"]["arguments"][1][0][0]
    losses, times = [], []
    for first in range(0, len(self._held_out) - batch + 1, batch):
      index = np.arange(first, first + batch, dtype=np.int32)
      one, t = self._programs.compiled["evaluate"](
        self._averages("evaluate"), self._held_out, index
      )
      losses.append(np.asarray(one))
      times.append(np.asarray(t))
    losses, times = np.concatenate(losses), np.concatenate(times)
    bucket = np.minimum((times * BUCKETS).astype(int), BUCKETS - 1)
    by_t = [float(losses[bucket == k].mean()) for k in range(BUCKETS) if (bucket == k).any()]
    return float(losses.mean()), by_t

  def draw(self, plan, first, count):
    """Images float32 [count, H, W, C] of the seeds from `first` on, by one of the plans."""
    np = self._np
    size = self.manifest["programs"]["sample"]["arguments"][1][0][0]
    parts = []
    for k in range(first, first + count, size):
      seeds = np.arange(k, k + size, dtype=np.int64)
      (x,) = self._programs.compiled["sample"](self._averages("sample"), self.plans[plan], seeds)
      parts.append(np.asarray(x))
    return np.concatenate(parts)[:count]

  def wait(self):
    self._jax.block_until_ready(self.state)


def to_uint8(x):
  import numpy as np

  return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def compare(reference, state, samples):
  """Largest differences to the state and samples of another run of the same export."""
  import numpy as np

  worst, moved = {}, {}
  with np.load(reference, allow_pickle=False) as content:
    for name in content.files:
      if name.startswith("samples/"):
        want, got = content[name], samples.get(name.removeprefix("samples/"))
        if got is not None:
          got = got[: len(want)]
          gap = np.abs(np.clip(got, 0, 1) - np.clip(want, 0, 1))
          same = float((to_uint8(got) == to_uint8(want)).mean())
          say(
            f"  {name}: largest difference {gap.max():.2e}, RMS {np.sqrt((gap**2).mean()):.2e}, "
            f"{same:.2%} of the 8-bit values equal"
          )
        continue
      group = name.split("/")[0]
      gap = np.abs(content[name].astype(np.float64) - np.asarray(state[name], np.float64))
      worst[group] = max(worst.get(group, 0.0), float(gap.max()))
      moved[group] = math.hypot(moved.get(group, 0.0), float(np.sqrt((gap**2).sum())))
  for group, value in worst.items():
    say(f"  {group}: largest difference {value:.2e}, all together {moved[group]:.2e} (L2)")
  return worst


def peak_memory(device):
  stats = device.memory_stats() or {}
  return stats.get("peak_bytes_in_use", 0) / 2**30


def keep_compiled(a, jax):
  """Lets JAX keep what it compiles in --cache."""
  if a.cache:
    pathlib.Path(a.cache).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", a.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


LEAST = {  # of each number that a flag takes
  "steps": 1,
  "seconds": 1,
  "inside": 1,
  "time": 1,
  "threads": 1,
  "log_every": 1,
  "save_every": 1,
  "samples": 0,
  "limit": 0,
}


def go(a):
  """What the flags ask for; everything that can be refused is refused before JAX starts."""
  if (a.steps is None) == (a.seconds is None) and not a.check and not a.time:
    raise Refused("give --steps=N or --seconds=S (or --time=N, or --check=h100)")
  for name, least in LEAST.items():
    value = getattr(a, name)
    if value is not None and not (math.isfinite(value) and value >= least):
      raise Refused(f"--{name}={value:g} must be a number from {least} on")
  folders = [pathlib.Path(f) for f in a.folder.split(",")]
  if len(folders) > 1 and not a.time:
    raise Refused(f"--folder={a.folder}: several go with --time alone; give one")
  manifests = [read_manifest(folder) for folder in folders]
  out, manifest = pathlib.Path(a.out), manifests[0]
  if a.check:
    return check(a, folders[0], manifest)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise Refused(f"{out} holds files already; give another --out")
  if not a.time:
    unknown = [p for p in a.plans.split(",") if p and p not in manifest["plans"]]
    if unknown:
      raise Refused(f"--plans={unknown[0]}: exported were {', '.join(manifest['plans'])}")
    if a.samples and not manifest["plans"]:
      raise Refused(f"--samples={a.samples}: no plan was exported; export with --plans")
    size = saved_bytes(a, manifest) / 2**20
    if size > a.limit:
      raise Refused(
        f"--limit={a.limit:g}: {a.save} takes {size:.1f} MiB; raise it, or take --save=averages "
        "in float16"
      )
    if a.reference and not os.access(a.reference, os.R_OK):
      raise Refused(f"--reference={a.reference}: no such file, or it cannot be read")
  jax = check_jax()
  device_of(jax)
  keep_compiled(a, jax)
  out.mkdir(parents=True, exist_ok=True)
  if a.time:
    return measure(a, list(zip(folders, manifests)), jax)
  return train_and_draw(a, folders[0], manifest, out, jax)


def train_and_draw(a, folder, manifest, out, jax):
  import numpy as np

  deadline = math.inf if a.seconds is None else a.seconds
  left = lambda: deadline - (time.monotonic() - _START)
  device, platform, inside = device_of(jax)
  inside = a.inside or inside
  say(f"JAX {jax.__version__}, NumPy {np.__version__}, {device.device_kind}, {inside} steps a call")
  order = np.load(folder / "order.npy", mmap_mode="r")
  steps = math.inf if a.steps is None else a.steps
  if a.steps and steps > len(order):
    raise Refused(f"--steps={steps}: the order of {len(order)} steps was exported")
  if a.steps and steps < inside:
    raise Refused(f"--steps={steps}: {inside} run in one call; take more, or --inside={steps}")
  if a.steps and steps % inside:
    steps -= steps % inside
    say(f"note: {steps} steps, a multiple of {inside}")
  images = read_images(folder, manifest["images"])
  held_out = read_images(folder, manifest["held_out"])
  say(f"{len(images)} training images, {len(held_out)} held out, {images.shape[1:]}")

  programs = Programs(folder, manifest, device, platform, inside, a.precision)
  names = ["train", *(["sample"] if a.samples else []), *(["evaluate"] if len(held_out) else [])]
  with concurrent.futures.ThreadPoolExecutor() as pool, stage("compiling"):
    for name, seconds in zip(names, pool.map(programs.compile, names)):
      memory = programs.memory(name)["together"] / 2**30
      say(f"compiled {name} in {seconds:.1f} s; it takes {memory:.2f} GiB")
  try:
    session = Session(folder, manifest, programs, images, held_out, order)
  except Exception as error:
    if isinstance(error, Refused):
      raise
    raise refused("putting the state on the device", error) from error
  parameters = sum(v.size for n, v in session.state.items() if n.startswith("network/"))
  record = Record(
    out,
    export=manifest["digest"],
    config=manifest["config"]["name"],
    device=device.device_kind,
    jax=jax.__version__,
    precision=a.precision,
    parameters=int(parameters),
    first=session.step,
  )

  plans = [p for p in a.plans.split(",") if p] or list(manifest["plans"])
  reserve = 0.0
  if a.samples and steps:
    # By two rows of a plan: a whole one can take minutes where something is slow.
    size = manifest["programs"]["sample"]["arguments"][1][0][0]
    rows = session.plans[plans[0]].copy()
    rows[2:] = 0
    session.plans["two rows"] = rows
    with stage("drawing two evaluations"):
      session.draw("two rows", 0, 1)
      begin = time.monotonic()
      session.draw("two rows", 0, 1)
    each = (time.monotonic() - begin) / 2
    count = lambda plan: int((session.plans[plan][:, 0] > 0).sum())
    cost = lambda: RESERVE * each * sum(map(count, plans)) * math.ceil(a.samples / size) + 10
    while plans and cost() > 0.5 * deadline:
      longest = max(plans, key=count)
      plans = [plan for plan in plans if plan != longest]
      say(f"note: half of the time does not suffice to draw {longest} as well: left out")
    reserve = cost() if plans else 0.0
    say(f"drawing takes {1e3 * each:.1f} ms an evaluation of {size} images: {reserve:.0f} s kept")

  batch = manifest["programs"]["train"]["arguments"][1][0][0]
  history, saved, logged = [], time.monotonic(), session.step
  begin, since = None, session.step
  final = session.step + steps
  if left() <= reserve:
    raise Refused(
      f"--seconds={deadline:g}: {deadline - left():.0f} s have gone into compiling and "
      f"{reserve:.0f} s are needed to draw, so that none are left to train; give more, or --cache"
    )
  while session.step < final and left() > reserve:
    with stage(f"training from step {session.step}"):
      loss, norm = session.train()
      if begin is None:
        session.wait()
    history.append((session.step, loss, norm))
    if len(history) > 1:  # JAX runs ahead of the device: no further than a call, for the clock
      history[-2][1].block_until_ready()
    if begin is None:  # the first call is a warm-up
      begin, since = time.monotonic(), session.step
    if session.step - logged >= a.log_every or session.step >= final:
      loss, norm = float(np.mean(loss)), float(np.mean(norm))  # waits for the device
      if not math.isfinite(loss + norm):
        raise Refused(
          f"loss {loss:g}, gradient norm {norm:g} at step {session.step}: training has "
          "failed; lower training.learning_rate and export again"
        )
      seconds = time.monotonic() - begin
      if session.step > since:
        rate = (session.step - since) / seconds
        text = f"{1e3 / rate:.2f} ms a step, {rate * batch:.0f} images/s, "
      else:
        text = ""
      say(
        f"step {session.step}: loss {loss:.4f}, gradient norm {norm:.3g}, {text}"
        f"peak {peak_memory(device):.2f} GiB"
      )
      logged = session.step
    if time.monotonic() - saved > a.save_every:
      if "evaluate" in names:
        report_held_out(session, record)
      save(a, out, session, record, final=False)
      saved = time.monotonic()
  session.wait()
  trained = session.step - manifest["step"]
  if trained > len(order):
    say(f"note: the order of {len(order)} steps was begun anew: from there on it is not training's")
  if begin is not None and session.step > since:
    seconds = (time.monotonic() - begin) / (session.step - since)
    record.add(seconds_per_step=seconds, images_per_second=batch / seconds)
  losses = [(s, float(np.mean(x)), float(np.mean(y))) for s, x, y in history]
  record.add(
    step=session.step,
    trained=trained,
    history=losses[:: max(1, len(losses) // 2000)],
    peak_gib=peak_memory(device),
  )
  if "evaluate" in names:
    report_held_out(session, record)
  save(a, out, session, record, final=True)

  drawn = {}
  if a.samples:
    size = manifest["programs"]["sample"]["arguments"][1][0][0]
    for plan in plans:
      begin, parts = time.monotonic(), []
      for first in range(0, a.samples, size):
        with stage(f"drawing by {plan}"):
          parts.append(session.draw(plan, first, min(size, a.samples - first)))
        if left() < 3:
          break
      drawn[plan] = np.concatenate(parts)
      save_samples(out, plan, to_uint8(drawn[plan]))
      seconds = time.monotonic() - begin
      say(f"{len(drawn[plan])} samples by {plan} in {seconds:.1f} s")
      record.facts.setdefault("samples", {})[plan] = [len(drawn[plan]), seconds]
      record.add()
      if left() < 3:
        say("the time is used up")
        break
  if a.reference:
    say(f"against {a.reference}:")
    record.add(against=compare(a.reference, session.state, drawn))
  record.add(complete=True)
  say(f"done: {out}")


def report_held_out(session, record):
  """Prints and records the held-out loss."""
  total, by_t = session.held_out()
  parts = " ".join(f"{v:.3g}" for v in by_t)
  say(f"step {session.step}: held-out loss {total:.4f}, by t {parts}")
  record.facts.setdefault("held_out", []).append([session.step, total, by_t])


def saved_bytes(a, manifest):
  """How much --save and --save_dtype come to."""
  sizes = {n: math.prod(v["shape"]) for n, v in manifest["state"].items()}
  if a.save == "state":
    return 4 * sum(sizes.values())
  each = 2 if a.save_dtype == "float16" else 4
  return each * sum(size for name, size in sizes.items() if name.startswith("ema/"))


def save(a, out, session, record, final):
  """Saves what --save names. The record changes hands last: a kill leaves the save before it."""
  import numpy as np

  whole = a.save == "state"
  wanted = {n: np.asarray(v) for n, v in session.state.items() if whole or n.startswith("ema/")}
  dtype = None if whole or a.save_dtype == "float32" else a.save_dtype
  files = save_state(out, f"{a.save}-{session.step:08d}", wanted, dtype)
  before = record.facts.get("files", {})
  record.add(saved=a.save, files=files, step=session.step)
  for name in before.keys() - files.keys():
    (out / name).unlink(missing_ok=True)
  if final:
    total = sum((out / name).stat().st_size for name in files)
    say(f"saved {a.save}: {total / 2**20:.1f} MiB")


def measure(a, exports, jax):
  """Times the training step of each folder in each precision, beside the device's own peak."""
  import jax.numpy as jnp
  import numpy as np

  left = lambda: (a.seconds or math.inf) - (time.monotonic() - _START)
  device, platform, inside = device_of(jax)
  inside = a.inside or inside
  say(f"JAX {jax.__version__}, NumPy {np.__version__}, {device.device_kind}")

  # Are operators exact here? A blur of 64 pixels, as programs state it and as the device would.
  s = np.exp(-0.5 * (np.subtract.outer(np.arange(64), np.arange(64)) / 5.0) ** 2)
  s, x = s / s.sum(1, keepdims=True), np.random.default_rng(0).random([64, 4096])
  for precision in ("highest", "default"):
    y = jnp.matmul(jnp.float32(s), jnp.float32(x), precision=precision)
    error = np.abs(
      np.asarray(y, np.float64)
      - s.astype(np.float32).astype(np.float64) @ x.astype(np.float32).astype(np.float64)
    ).max()
    say(f"a blur at precision {precision}: largest error {error:.1e}")

  peaks = {}
  size = 8192 if platform == "cuda" else 1024
  for name, dtype, precision in (
    ("highest", jnp.float32, "highest"),
    ("default", jnp.float32, "default"),
    ("bfloat16", jnp.bfloat16, "default"),
  ):
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    multiply = jax.jit(lambda v, w, p=precision: jnp.matmul(v, w, precision=p))
    multiply(square, square).block_until_ready()
    times = []
    for _ in range(5):
      begin = time.monotonic()
      for _ in range(4):
        y = multiply(square, square)
      y.block_until_ready()
      times.append((time.monotonic() - begin) / 4)
    peaks[name] = 2 * size**3 / sorted(times)[2] / 1e12
  say(
    f"matrix product of {size}²: "
    + ", ".join(f"{k} {v:.1f}" for k, v in peaks.items())
    + " TFLOP/s"
  )

  jobs = []
  for folder, manifest in exports:
    low = manifest["config"]["network"]["dtype"] == "bfloat16"
    for precision in ("default",) if low else ("highest", "default"):
      jobs.append((folder, manifest, precision, "bfloat16" if low else precision))

  def prepare(job):
    folder, manifest, precision, _ = job
    programs = Programs(folder, manifest, device, platform, inside, precision)
    names = ["train"] if a.time_only else list(manifest["programs"])
    seconds = {name: programs.compile(name) for name in names}
    return programs, seconds

  rows = []
  with concurrent.futures.ThreadPoolExecutor(a.threads) as pool:
    futures = [pool.submit(prepare, job) for job in jobs]
    for (folder, manifest, precision, peak), future in zip(jobs, futures):
      if left() < 20:
        say(f"{folder.name}, {precision}: the time is used up")
        future.cancel()
        continue
      try:
        programs, seconds = future.result()
        flops = programs.operations()
        empty = np.zeros([0, *manifest["programs"]["train"]["arguments"][0][0][1:]], np.uint8)
        images = np.random.default_rng(0).integers(
          0, 256, manifest["programs"]["train"]["arguments"][0][0], np.uint8
        )
        session = Session(folder, manifest, programs, images, empty, None)
        batch = manifest["programs"]["train"]["arguments"][1][0][0]
        session.order = np.random.default_rng(1).integers(
          0, len(images), [a.time + 2 * inside, batch]
        )
        session.train()
        session.wait()
        times, done = [], 0
        while done < a.time:
          begin = time.monotonic()
          session.train()
          session.wait()
          times.append((time.monotonic() - begin) / inside)
          done += inside
        each = sorted(times)[len(times) // 2]
        memory = programs.memory("train")["together"] / 2**30
        name = f"{manifest['config']['name']}, nf {manifest['config']['network']['nf']}"
        share = flops / each / 1e12 / peaks[peak]
        rows.append(
          [
            name,
            batch,
            peak,
            1e3 * each,
            batch / each,
            flops / 1e12,
            share,
            memory,
            seconds["train"],
          ]
        )
        say(
          f"{name}, batch {batch}, {peak}: {1e3 * each:.2f} ms a step, "
          f"{batch / each:.0f} images/s, {flops / 1e12:.3g} TFLOP a step = {share:.1%} of the "
          f"peak, {memory:.2f} GiB; "
          f"compiled in {', '.join(f'{k} {v:.0f} s' for k, v in seconds.items())}"
        )
        del session, programs
      except Exception as error:  # the next one may fit
        say(f"{folder.name}, {precision}: {refused('timing', error)}")
  facts = {
    "device": device.device_kind,
    "jax": jax.__version__,
    "peaks_tflops": peaks,
    "rows": rows,
  }
  write(pathlib.Path(a.out) / "device.json", (json.dumps(facts, indent=1) + "\n").encode())


def check(a, folder, manifest):
  """Compiles every program for a GPU that is not there."""
  if a.check not in TARGETS:
    raise Refused(f"--check={a.check}: there is {', '.join(TARGETS)}")
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  # Without a GPU nothing can be tried out, and the compiler has no table for some Triton products.
  flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
  check_jax()
  from jax.experimental import topologies

  try:
    topology = topologies.get_topology_desc(
      platform="cuda", topology_name="", target_config=TARGETS[a.check], topology="1x1x1"
    )
  except Exception as error:
    raise Refused(
      f"no compiler for CUDA ({str(error).splitlines()[0][:200]}); "
      f"pip install --no-deps jax-cuda13-plugin=={JAX} jax-cuda13-pjrt=={JAX}"
    ) from None
  device = topology.devices[0]
  programs = Programs(folder, manifest, device, "cuda", a.inside or 1, a.precision)
  for name in manifest["programs"]:
    seconds = programs.compile(name)
    memory = programs.memory(name)
    parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in memory.items())
    text = programs.compiled[name].as_text()
    calls = {
      target: text.count(f'custom_call_target="{target}"')
      for target in (
        "__cudnn$convForward",
        "__cudnn$convBiasActivationForward",
        "__cudnn$convBackwardInput",
        "__cudnn$convBackwardFilter",
        "__cublas$gemm",
        "__cublas$lt$matmul",
      )
    }
    calls = ", ".join(f"{k.strip('_')} {v}" for k, v in calls.items() if v)
    say(f"{name} compiles for {device.device_kind} in {seconds:.0f} s; GiB: {parts}; {calls}")


class Flags(argparse.ArgumentParser):
  """Flags whose mistakes are one line."""

  def error(self, message):
    raise Refused(f"{message}; run.py --help lists the flags")


def flags():
  """The flags of this program."""
  here = pathlib.Path(__file__).parent
  f = Flags(
    description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  f.add_argument("--folder", default=str(here), help="What export wrote (default: of this file).")
  f.add_argument("--out", default="results", help="A new folder for what comes out.")
  f.add_argument("--steps", type=int, help="Train so many steps.")
  f.add_argument("--seconds", type=float, help="Or until the whole run has taken so long.")
  f.add_argument("--inside", type=int, help="Training steps in one call (a GPU: 20, a CPU: 1).")
  f.add_argument("--samples", type=int, default=0, help="Images to draw by each plan.")
  f.add_argument("--plans", default="", help="Of those exported, with commas (default: all).")
  f.add_argument("--save", choices=["averages", "state"], default="averages", help="What to save.")
  f.add_argument(
    "--save_dtype", choices=["float16", "float32"], default="float16", help="Of the averages."
  )
  f.add_argument("--limit", type=float, default=64, help="MiB that may be saved.")
  f.add_argument("--save_every", type=float, default=60, help="Seconds between saves.")
  f.add_argument("--log_every", type=int, default=100, help="Steps between lines.")
  f.add_argument(
    "--precision",
    choices=["default", "highest"],
    default="default",
    help="Of the network's products; operators always have the highest.",
  )
  f.add_argument("--reference", help="An .npz of another run's state to compare with.")
  f.add_argument("--cache", help="A folder that keeps compiled programs.")
  f.add_argument("--time", type=int, help="Only time so many steps; --folder takes several.")
  f.add_argument("--time_only", action="store_true", help="With --time: compile the step alone.")
  f.add_argument("--threads", type=int, default=8, help="With --time: compile so many at a time.")
  f.add_argument("--check", metavar="TARGET", help="Only compile for a GPU that is not here: h100.")
  return f


def main(arguments=None):
  """Runs; a Refused ends with one line and the exit code 2."""
  try:
    go(flags().parse_args(arguments))
  except Refused as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except OSError as error:
    print(f"error: {error}; give a place that can be written", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
