"""One training step and sampler for every device: exported, run by JAX alone, imported back.

  python tools/portable.py export --config=configs/cifar10_blur.py --out=portable
  python portable/run.py --out=results --seconds=600     # on any machine with JAX (run.py --help)
  python tools/portable.py import --folder=portable --results=results --workdir=runs/back

`export` writes a folder with the programs (StableHLO of the project's own step, sampler and
held-out loss), the initial state or its seeds, the order of the data, and the images. Its run.py
needs JAX and NumPy and nothing else; `python tools/portable.py run …` is the same program. `import`
makes a workdir of what came back, which all programs read. docs/portable.md says more.
"""

import gzip
import hashlib
import io
import json
import pathlib
import shutil
import sys
import tempfile

from soft_diffusion_tf import files

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # of a program in tools/, which imports another
RUNNER = pathlib.Path(__file__).with_name("portable_runner.py")
VERBS = ("export", "run", "import")
_ORIENTATION = 0x0112  # the EXIF tag


# --- Export ---------------------------------------------------------------------------------------


def check_new(path, flag):
  """Raises the ValueError of a folder that is not a new one."""
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path} holds files already; give another --{flag}")


def check_exportable(experiment):
  """Raises the ValueError of a config whose step XLA cannot take, or whose files stay elsewhere."""
  if experiment.training.averages:
    raise ValueError(
      "training.averages are kept in a workdir, and an exported program has none; set it to ()"
    )
  parts = experiment.training.accumulate
  if parts > 1:
    raise ValueError(
      f"training.accumulate = {parts}: a step in parts is not exported; set it to 1, and a "
      "training.batch_size that fits"
    )


def programs(run, images, held_out, plans, sample_batch):
  """The functions to export: name → (function, specifications of its arguments, result names)."""
  import tensorflow as tf

  from soft_diffusion_tf import data, samplers

  e, model = run.experiment, run.model
  batch = e.training.batch_size
  pictures = lambda x: tf.TensorSpec(x.shape, tf.uint8)

  def train(images, index):
    first = tf.cast(model.optimizer.iterations, tf.int64) * batch
    x_0 = data.examples(images, index, first, e.seed, e.data.flip)
    out = model.update(tf.ensure_shape(x_0, [batch, *e.data.image_shape]))
    return out["loss"], out["gradient_norm"]

  denoiser = run.sampler().denoiser

  def sample(plan, seeds):
    x = model.diffusion.draw_prior(seeds)
    return samplers.sample(model.diffusion, denoiser, plan, seeds, x).x

  def evaluate(images, index):
    return model.held_out(data.examples(images, index, 0), True, index[0])

  found = {"train": (train, [pictures(images), tf.TensorSpec([batch], tf.int32)])}
  if plans:
    plan = next(iter(plans.values()))
    found["sample"] = (
      sample,
      [tf.TensorSpec(plan.shape, tf.float32), tf.TensorSpec([sample_batch], tf.int64)],
    )
  if len(held_out):
    size = min(batch, len(held_out))
    found["evaluate"] = (evaluate, [pictures(held_out), tf.TensorSpec([size], tf.int32)])
  return found


def plans_of(run, text):
  """Sampler tables by name ("two_step:10"), filled up to one number of rows with rows of zeros."""
  import numpy as np

  tables = {}
  for item in filter(None, text.split(",")):
    name, _, nfe = item.rpartition(":")
    if not name or not nfe.isdigit():
      raise ValueError(f"--plans={item}: give SAMPLER:EVALUATIONS, such as two_step:25")
    options = run.options(sampler=name, nfe=int(nfe))
    if options.grid in ("transport", "relative"):
      raise ValueError(f"--plans={item}: the grid {options.grid} measures samples; export another")
    tables[item] = run.plan(options).numpy()
  longest = max(map(len, tables.values()), default=0)
  return {k: np.pad(v, [[0, longest - len(v)], [0, 0]]) for k, v in tables.items()}


def recipes(model, store=False):
  """How each variable is made again: (name → recipe, the arrays that are stored).

  A kernel that still holds what its initialiser drew travels as its seed, an array of one value as
  that value, averages that equal their weights as the weights' name.
  """
  import numpy as np

  from soft_diffusion_tf.training import checkpoints
  from tools.portable_runner import digest_of

  initialisers = {
    f"network/{v.path}": v.initialiser for v in model.network.variables if hasattr(v, "initialiser")
  }
  values = {k: v.numpy() for k, v in checkpoints.named_variables(model).items()}
  found, stored = {}, {}
  for name, value in values.items():
    recipe = {"shape": list(value.shape), "dtype": value.dtype.name}
    first = value.ravel()[0] if value.size else 0
    twin = name.replace("ema/", "network/", 1)
    if store:
      recipe["kind"] = "stored"
    elif np.all(value == first) and np.isfinite(first):
      recipe |= {"kind": "fill", "value": first.item()}
    elif name in initialisers and np.array_equal(initialisers[name](value.shape).numpy(), value):
      of = initialisers[name]
      recipe |= {"kind": "uniform", "limit": of.limit(value.shape), "seed": list(of.seed)}
    elif twin != name and twin in values and np.array_equal(value, values[twin]):
      recipe |= {"kind": "same", "as": twin}
    else:
      recipe["kind"] = "stored"
    if recipe["kind"] == "stored":
      stored[name] = value
    found[name] = recipe
  return found, stored, digest_of(values)


def jpeg_files(experiment, split):
  """The JPEG files of a TFDS split as they are: (bytes, images as Pillow decodes them)."""
  import numpy as np
  import tensorflow_datasets as tfds
  from PIL import Image

  d = experiment.data
  try:
    builder = tfds.builder(d.name, data_dir=d.data_dir or None)
    dataset = builder.as_dataset(
      split=split,
      shuffle_files=False,
      decoders={"image": tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
  except Exception as error:  # TFDS raises of its own kinds
    raise ValueError(f"--jpeg takes a TFDS data set ({str(error).splitlines()[0]})") from None
  files = [record["image"] for record in tfds.as_numpy(dataset)]
  if not all(f.startswith(b"\xff\xd8") for f in files):
    raise ValueError(f"--jpeg: {d.name} is not stored as JPEG files; leave the flag out")
  decoded = [Image.open(io.BytesIO(f)) for f in files]
  if any(image.getexif().get(_ORIENTATION, 1) != 1 for image in decoded):
    raise ValueError(
      "--jpeg: files of it lie on their side and say so (EXIF orientation); leave the flag out, so "
      "that they are turned here"
    )
  images = np.stack([np.asarray(image.convert("RGB")) for image in decoded])
  if images.shape[1:] != tuple(d.image_shape):
    raise ValueError(
      f"--jpeg: the files are {images.shape[1:]}, and data.image_shape {tuple(d.image_shape)}; "
      "leave the flag out, so that they are resized here"
    )
  return files, images


def load_images(experiment, split, jpeg, count=None):
  """(name, bytes of the file to write, images uint8) of a split, at most `count`."""
  import numpy as np

  d, content = experiment.data, io.BytesIO()
  if jpeg:
    files, images = jpeg_files(experiment, split)
    files, images = files[:count], images[:count]
    np.savez(
      content,
      data=np.frombuffer(b"".join(files), np.uint8),
      sizes=np.array(list(map(len, files)), np.int64),
      digest=np.array(hashlib.sha256(images.tobytes()).hexdigest().encode()),
    )
    return "npz", content.getvalue(), images
  images = d.load(split).images[:count]
  np.save(content, images)
  return "npy", content.getvalue(), images


def export(
  run, out, training_images, *, steps, plans, sample_batch, held_out, jpeg=False, store=False
):
  """Writes the folder; see the module's text.

  Args:
    run: `training.Run`: a fresh one or one in the middle.
    training_images: of `load_images`.
    steps: how many steps of the data's order to write.
    plans: text, see `plans_of`.
    sample_batch: images drawn side by side.
    held_out: how many images of the test split travel.
    jpeg: let the images travel as the JPEG files that a TFDS set stores.
    store: store every array of the state.
  """
  import numpy as np
  import tensorflow as tf

  from soft_diffusion_tf import data
  from tools import lowering
  from tools.portable_runner import FORMAT, digest_of_manifest

  e = run.experiment
  out = pathlib.Path(out)
  check_new(out, "out")
  check_exportable(e)
  tables = plans_of(run, plans)
  name, content, images = training_images
  files = {f"images.{name}": content}
  held_name, content, rest = load_images(e, e.data.test_split, jpeg, held_out)
  files[f"held_out.{held_name}"] = content
  batch, count = e.training.batch_size, len(images)
  if count < 1:
    raise ValueError(f"the split {e.data.train_split!r} is empty; nothing can be trained on")
  small = np.uint16 if count <= 2**16 else np.uint32
  position = (run.step + np.arange(steps))[:, None] * batch + np.arange(batch)
  order = data.order(tf.constant(position.ravel()), count, e.seed).numpy().reshape(position.shape)
  files["order.npy"] = _npy(order.astype(small))
  described = {}
  for what, (function, arguments) in programs(run, images, rest, tables, sample_batch).items():
    compiled = tf.function(function, autograph=False, jit_compile=True)
    concrete = compiled.get_concrete_function(*arguments)
    low = lowering.lower(compiled, arguments, run.model)
    targets = lowering.custom_calls(low.text)
    if targets:
      raise ValueError(
        f"the program {what!r} calls {', '.join(targets)}, which one device has only"
      )
    results = [(list(t.shape), t.dtype.name) for t in tf.nest.flatten(concrete.structured_outputs)]
    files[f"{what}.mlir.gz"] = gzip.compress(low.text.encode(), 9, mtime=0)
    described[what] = {
      "file": f"{what}.mlir.gz",
      "arguments": low.arguments,
      "results": results,
      "variables": low.variables,
      "updated": low.updated,
    }
    print(f"{what}: {len(low.text) / 2**20:.1f} MB of StableHLO", flush=True)
  state, stored, digest = recipes(run.model, store)
  files["state.npz"], files["plans.npz"] = _npz(stored), _npz(tables)
  prior = run.diffusion.prior
  files["prior.npz"] = _npz(
    {"kind": np.array(prior.kind), "mean": prior.mean, "factors": prior.factors}
  )
  files["run.py"] = RUNNER.read_bytes()
  manifest = {
    "format": FORMAT,
    "step": run.step,
    "config": e.to_dict(),
    "programs": described,
    "state": state,
    "state_digest": digest,
    "plans": list(tables),
    "images": f"images.{name}",
    "held_out": f"held_out.{held_name}",
    "files": {k: hashlib.sha256(v).hexdigest() for k, v in files.items()},
  }
  manifest["digest"] = digest_of_manifest(manifest)
  files["manifest.json"] = (json.dumps(manifest) + "\n").encode()
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
  try:
    for name, content in files.items():
      (partial / name).write_bytes(content)
    partial.chmod(0o755)
    if out.exists():
      out.rmdir()  # empty, as was checked
    partial.replace(out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return {name: len(content) for name, content in files.items()}


def _npy(array):
  import numpy as np

  content = io.BytesIO()
  np.save(content, array)
  return content.getvalue()


def _npz(arrays):
  import numpy as np

  content = io.BytesIO()
  np.savez(content, **arrays)
  return content.getvalue()


# --- Import ---------------------------------------------------------------------------------------


def read_results(results):
  """(result.json, the arrays by name) of a folder that run.py wrote, every file checked."""
  import zipfile

  import numpy as np

  results = pathlib.Path(results)
  path = results / "result.json"
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
    files, step = result["files"], result["step"]
    if result["saved"] not in ("state", "averages") or type(step) is not int or step < 0:
      raise ValueError
  except FileNotFoundError:
    raise ValueError(f"{results}: no result.json in it; is it what run.py --out wrote?") from None
  except KeyError:
    raise ValueError(f"{path}: no weights were saved there; run longer") from None
  except (OSError, ValueError, TypeError):
    raise ValueError(f"{path}: not a record of run.py; copy the folder again") from None
  arrays = {}
  for name, digest in files.items():
    try:
      content = (results / name).read_bytes()
    except OSError as error:
      raise ValueError(f"{results / name} cannot be read ({error}); copy it again") from None
    if hashlib.sha256(content).hexdigest() != digest:
      raise ValueError(f"{results / name} is damaged; copy it again")
    try:
      with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays |= dict(archive)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
      raise ValueError(f"{results / name} cannot be read ({error}); copy it again") from None
  return result, arrays


def bring_back(folder, results, workdir):
  """Makes a workdir of an exported folder and what run.py made of it; returns the `Run`.

  With the whole state the run goes on from there. With the averaged weights alone they stand for
  the network too and Adam starts anew, which the workdir's text says.
  """
  import numpy as np

  from soft_diffusion_tf import priors, training
  from soft_diffusion_tf.experiment import Experiment
  from soft_diffusion_tf.training import checkpoints
  from tools.portable_runner import Refused, read_manifest

  folder, workdir = pathlib.Path(folder), pathlib.Path(workdir)
  check_new(workdir, "workdir")
  try:
    manifest = read_manifest(folder)
  except Refused as error:
    raise ValueError(str(error)) from None
  result, arrays = read_results(results)
  if result.get("export") != manifest["digest"]:
    raise ValueError(
      f"{results} is of another export than {folder}; give the --folder that it was run from"
    )
  e = Experiment.from_config(manifest["config"])
  prior = priors.Prior.load(folder / "prior.npz")
  model = training.build(e, e.build_diffusion().with_prior(prior))
  whole = result["saved"] == "state"
  for name, variable in checkpoints.named_variables(model).items():
    source = name if whole else name.replace("network/", "ema/", 1)
    if source.startswith("optimizer/") and not whole:
      if name == "optimizer/iteration":
        variable.assign(result["step"])
      continue
    if source not in arrays:
      raise ValueError(f"{results}: {source} is missing; copy every file of it again")
    value = arrays[source]
    if value.dtype.kind not in "fi" or value.shape != tuple(variable.shape):
      raise ValueError(
        f"{results}: {source} is {value.dtype} {value.shape}, and the config makes it "
        f"{tuple(variable.shape)}"
      )
    if not np.all(np.isfinite(value)):
      raise ValueError(f"{results}: {source} holds values that are not finite; training has failed")
    variable.assign(value.astype(variable.dtype.as_numpy_dtype))
  if int(model.optimizer.iterations) != result["step"]:
    raise ValueError(
      f"{results}: its state is of step {int(model.optimizer.iterations)} and its record of step "
      f"{result['step']}; copy every file of it again"
    )
  run = training.Run(e, model, result["step"])
  training.write(run, workdir)
  about = {k: v for k, v in result.items() if k != "history"} | {"whole_state": whole}
  (workdir / "portable.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
  return run


# --- The program ----------------------------------------------------------------------------------


def _define(verb):
  """The flags of a verb; absl reads them when the program runs."""
  from absl import flags

  from soft_diffusion_tf.bin import cli

  number = flags.DEFINE_integer
  if verb == "export":
    return {
      "config": cli.define_config(),
      "workdir": cli.define_path("workdir", None, "Export the run of a workdir."),
      "trust_code": cli.define_trust_code(),
      "out": cli.define_path("out", None, "A new folder.", required=True),
      "steps": number("steps", 10_000, "Steps of the data's order to write.", 1, 10**8),
      "plans": flags.DEFINE_string("plans", "two_step:25", "SAMPLER:EVALUATIONS, with commas."),
      "sample_batch": number("sample_batch", None, "Images drawn side by side.", 1, 10**6),
      "held_out": number("held_out", 1000, "Images of the test split that travel.", 0, 10**8),
      "train_count": number("train_count", None, "Only the first training images.", 1, 10**9),
      "jpeg": flags.DEFINE_bool("jpeg", False, "Images travel as the JPEG files of a TFDS set."),
      "store": flags.DEFINE_bool("store", False, "Store the whole state, not its seeds."),
    }
  return {
    "folder": cli.define_path("folder", None, "What export wrote.", required=True),
    "results": cli.define_path("results", None, "What run.py wrote.", required=True),
    "workdir": cli.define_path("workdir", None, "A new workdir.", required=True),
  }


def fresh(experiment, images):
  """A run that has not begun, its prior fitted to images uint8 as `training.train` does."""
  import numpy as np

  from soft_diffusion_tf import priors, training

  diffusion = experiment.build_diffusion()
  experiment.check_network()
  picked = np.random.default_rng(experiment.seed).permutation(len(images))[: training.PRIOR_IMAGES]
  floats = images[np.sort(picked)].astype(np.float32) / 255.0
  prior = priors.fit(experiment.prior, floats, diffusion)
  return training.Run(experiment, training.build(experiment, diffusion.with_prior(prior)), 0)


def _export():
  from soft_diffusion_tf import training
  from soft_diffusion_tf.experiment import Experiment

  value = {name: flag.value for name, flag in _FLAGS.items()}
  if (value["config"] is None) == (value["workdir"] is None):
    raise ValueError("give --config=FILE for a fresh run, or --workdir=DIR for one that has begun")
  files.check_folder(value["out"])
  check_new(value["out"], "out")
  if value["workdir"]:
    run = training.load(value["workdir"], trust_code=value["trust_code"])
    experiment = run.experiment
  else:
    experiment = Experiment.from_config(value["config"], trust_code=True)
  check_exportable(experiment)
  split = experiment.data.train_split
  images = load_images(experiment, split, value["jpeg"], value["train_count"])
  if not value["workdir"]:
    run = fresh(experiment, images[2])
  sizes = export(
    run,
    value["out"],
    images,
    steps=value["steps"],
    plans=value["plans"],
    sample_batch=value["sample_batch"] or experiment.sampling.batch_size,
    held_out=value["held_out"],
    jpeg=value["jpeg"],
    store=value["store"],
  )
  for name, size in sizes.items():
    print(f"  {name}: {size / 2**20:.2f} MiB")
  print(
    f"{value['out']}: {sum(sizes.values()) / 2**20:.1f} MiB; run it by python "
    f"{value['out']}/run.py --seconds=600 --samples=100 --out=results"
  )


def _import():
  files.check_folder(_FLAGS["workdir"].value, "workdir")
  run = bring_back(*(_FLAGS[name].value for name in ("folder", "results", "workdir")))
  whole = json.loads((pathlib.Path(_FLAGS["workdir"].value) / "portable.json").read_text())
  note = "" if whole["whole_state"] else " (averaged weights alone: Adam's state did not travel)"
  print(f"{_FLAGS['workdir'].value}: step {run.step}{note}")


if __name__ == "__main__":
  verb = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
  if verb == "run":
    sys.path.insert(0, str(RUNNER.parent))
    import portable_runner

    portable_runner.main()
    sys.exit()
  if verb not in VERBS:
    print(__doc__.strip())
    if verb is None and {"--help", "-h"} & set(sys.argv):
      sys.exit()
    print(f"error: {verb!r} is no verb; give export, run or import", file=sys.stderr)
    sys.exit(2)
  from soft_diffusion_tf.bin import cli

  _FLAGS = _define(verb)
  globals().update({f"_flag_{name}": flag for name, flag in _FLAGS.items()})  # for --help
  cli.run(_export if verb == "export" else _import)
