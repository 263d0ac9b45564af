"""A trained model as one thing to hand on: a SavedModel that needs TensorFlow alone, or one file.

`export` writes a folder: the SavedModel with the averaged weights in it, README.md (the model
card), and in `assets.extra/`, where TensorFlow leaves room for such things, config.json, prior.npz
and manifest.json (what `Manifest` of this module's `FORMAT` says). `load` makes of that folder a
`training.Run` again. `pack` writes a single .npz of float16 weights, such as those that come with
this package; `from_pretrained` opens any of these by path, and the latter by name.

Signatures of the SavedModel (B, N: any number; images are float32 in [0, 1] where not said):

| signature | inputs | outputs |
|---|---|---|
| sample_NAME, sample | num int32 [], seed int64 [] | images [num, H, W, C], uint8 |
| draw_NAME, draw | seeds int64 [N] | images [N, H, W, C], uint8 (the same in 8 bits) |
| process_NAME, process | seeds int64 [N] | times [F + 1], x_t [N, F + 1, …], x0_hat [N, F, …] |
| denoise | x_t [B, H, W, C], t [B] or [1] | x0_hat: E[x_0 given x_t] |
| score | x_t, t [B] or [1] | score: ∇ log q_t(x_t) |
| corrupt | x_0, t [B] or [1], seed int64 [] | x_t |
| restore | y [B, H, W, C], t [], seed int64 [] | images, uint8: one sample of each clean image |
| restore_map | y, t [], seed, num int32 [] | samples [B, num, H, W, C], mean, std |

Image i of `sample` is that of the image seed seed + i, and `draw` takes image seeds themselves: to
the bit what `training.Run.images` draws by the same options. `corrupt` gives image b the noise of
seed + b; sample k of image b in `restore_map` has the image seed seed + b · num + k (`restore`:
num = 1), and t is rounded to a whole multiple of 1/`LATTICE` there.
"""

import hashlib
import importlib.resources
import json
import pathlib
import reprlib
import shutil

import numpy as np
import tensorflow as tf

import soft_diffusion_tf
from soft_diffusion_tf import arrays, bulk, parts, priors, restoration, samplers, training, trust
from soft_diffusion_tf.experiment import Experiment, Sampling, options_from_config

FORMAT = 1
LATTICE = 256  # times at which a restoration may start
MOST = 65_536  # images in one call
FRAMES = 24  # of a reverse process, at most
EXTRA = "assets.extra"
MANIFEST, CONFIG, CARD = "manifest.json", "config.json", "README.md"
MARK = f"{EXTRA}/{MANIFEST}"  # by which an exported folder is known
SHOWN_TIMES = np.linspace(0, 1, 33, dtype=np.float32)  # at which the manifest lists level and σ
UNSTATED = "not stated; the terms of the training data apply"


# --- The graph ------------------------------------------------------------------------------------


def _in_batches(one, shapes, seeds, size):
  """A function of `size` image seeds for any seeds [N], as `bulk.batches` lays them out.

  Args:
    one: int64 [size] → float32 tensors [size, *shape], one for each of `shapes`.

  Returns:
    What `one` gives, with N as the first axis.
  """
  # TensorFlow picks other kernels where it knows the size of a batch beforehand, and they round
  # otherwise: so batches are cut in a way that hides it, as it is hidden in `samplers.Sampler`.
  seeds, back = tf.unique(seeds)  # a seed that is asked for twice is drawn once
  place = tf.cast(tf.math.floormod(seeds, size), tf.int32)
  order = tf.argsort(place, stable=True)
  sorted_place = tf.gather(place, order)
  begin = tf.searchsorted(sorted_place, tf.range(size))
  rank = tf.range(tf.size(seeds)) - tf.gather(begin, sorted_place)
  batch = tf.scatter_nd(order[:, tf.newaxis], rank, tf.shape(seeds))
  # Without seeds a batch is drawn all the same: only the check of their number may fail then.
  count = tf.maximum(tf.reduce_max(batch), 0) + 1
  index = batch * size + place
  filling = tf.tile(tf.range(size, dtype=tf.int64), [count])
  drawn = tf.tensor_scatter_nd_update(filling, index[:, tf.newaxis], seeds)
  arrays = [tf.TensorArray(tf.float32, count, element_shape=[None, *s]) for s in shapes]

  def body(k, arrays):
    parts = one(drawn[k * size : (k + 1) * size])
    return k + 1, [array.write(k, part) for array, part in zip(arrays, parts)]

  arrays = tf.while_loop(
    lambda k, _: k < count, body, (tf.constant(0), arrays), parallel_iterations=1
  )[1]
  return [tf.gather(array.concat(), tf.gather(index, back)) for array in arrays]


def _uint8(images):
  """`plots.to_uint8`, as graph operations."""
  scaled = tf.clip_by_value(tf.cast(images, tf.float64), 0.0, 1.0) * 255.0
  return tf.cast(tf.round(scaled), tf.uint8)


def _both(images):
  return {"images": images, "uint8": _uint8(images)}


def _cuts(rows):
  """Where a table is cut to show its process: up to FRAMES + 1 row numbers, from 0 to its end.

  A cut between a step and its corrector would show the step undone.
  """
  following = np.append(np.asarray(rows)[1:, 5], 0.0)
  ends = np.flatnonzero(following != samplers.CORRECTOR) + 1
  picked = np.linspace(0, len(ends), min(FRAMES, len(ends)) + 1).round().astype(int)[1:]
  return np.concatenate([[0], ends[picked - 1]]).astype(np.int32)


def _check_images(images, what):
  tf.debugging.assert_positive(tf.size(images), f"{what} holds no image; give at least 1")
  tf.debugging.assert_all_finite(images, f"{what} holds NaN or infinite values")


def _check_seeds(seeds):
  count = tf.size(seeds)
  tf.debugging.assert_positive(count, "ask for at least 1 image")
  tf.debugging.assert_less_equal(count, MOST, f"ask for at most {MOST} images in one call")


def _seeds_from(seed, count):
  """Image seeds seed, seed + 1, …, int64 [count]; they must not wrap around."""
  count = tf.cast(count, tf.int64)
  last = tf.int64.max - tf.maximum(count, 1) + 1
  tf.debugging.assert_less_equal(seed, last, "seed is too large for so many images")
  return seed + tf.range(count)


def _check_num(num):
  """num, checked, and bounded: what runs beside the check must neither fail nor be large."""
  tf.debugging.assert_positive(num, "num must be at least 1")
  tf.debugging.assert_less_equal(num, MOST, f"num must be at most {MOST}")
  return tf.clip_by_value(num, 1, MOST)


def _check_time(t, least=0.0):
  inside = tf.reduce_all((t >= least) & (t <= 1.0))
  tf.debugging.Assert(inside, ["t must lie in [0, 1], got", t])


class _Exported(tf.Module):
  """Everything that the SavedModel computes; `functions` has them by signature."""

  def __init__(self, run, options, restoring):
    super().__init__(name="soft_diffusion")
    self.ema = [v.value for v in run.model.ema_network.variables]
    self.functions = {}
    shape = tuple(run.diffusion.image_shape)
    denoiser, diffusion = run.model.denoiser(), run.diffusion
    image = lambda name: tf.TensorSpec([None, *shape], tf.float32, name)
    times = tf.TensorSpec([None], tf.float32, "t")
    time = tf.TensorSpec([], tf.float32, "t")
    seed = tf.TensorSpec([], tf.int64, "seed")
    num = tf.TensorSpec([], tf.int32, "num")

    # One trace of the network, which every signature calls.
    @tf.function(autograph=False, input_signature=[image("x_t"), times])
    def predict(x_t, t):
      return tf.ensure_shape(denoiser(x_t, t), x_t.shape)

    def per_image(t, x):
      _check_time(t)
      return t + tf.zeros_like(x[:, 0, 0, 0])

    def denoise(x_t, t):
      _check_images(x_t, "x_t")
      return {"x0_hat": predict(x_t, per_image(t, x_t))}

    def score(x_t, t):
      _check_images(x_t, "x_t")
      t = per_image(t, x_t)
      return {"score": diffusion.score(x_t, t, predict(x_t, t))}

    def corrupt(x_0, t, seed):
      _check_images(x_0, "x_0")
      seeds = _seeds_from(seed, tf.shape(x_0)[0])
      return {"x_t": restoration.corrupt(diffusion, x_0, per_image(t, x_0), seeds)}

    self._add("denoise", denoise, [image("x_t"), times])
    self._add("score", score, [image("x_t"), times])
    self._add("corrupt", corrupt, [image("x_0"), times, seed])
    self.evaluations = {}
    seeds = tf.TensorSpec([None], tf.int64, "seeds")
    for k, (name, o) in enumerate(options.items()):
      drawer = bulk.Drawer(diffusion, predict, o)
      self.evaluations[name] = int(drawer.rows.shape[0])
      sample, draw, process = _drawing(drawer)
      for kind, function, specs in (
        ("sample", sample, [num, seed]), ("draw", draw, [seeds]), ("process", process, [seeds]),
      ):  # fmt: skip
        self._add([f"{kind}_{name}"] + ([kind] if k == 0 else []), function, specs)
    restore, restore_map = _restoring(diffusion, predict, restoring)
    self._add("restore", restore, [image("y"), time, seed])
    self._add("restore_map", restore_map, [image("y"), time, seed, num])

  def _add(self, names, function, specs):
    function = tf.function(function, autograph=False, input_signature=specs)
    for name in [names] if isinstance(names, str) else names:
      self.functions[name] = function


def _drawing(drawer):
  """The functions of one sampler: of a number and a seed, of seeds, and the process of seeds."""
  diffusion, denoiser = drawer.diffusion, drawer.sampler.denoiser
  rows, size, shape = drawer.rows, drawer.options.batch_size, diffusion.image_shape

  def images_of(seeds):
    x = diffusion.draw_prior(seeds)
    return [samplers.sample(diffusion, denoiser, rows, seeds, x).x]

  cuts = _cuts(rows)
  times = np.append(np.asarray(rows)[cuts[:-1], 0], np.asarray(rows)[-1, 1]).astype(np.float32)
  frames = len(cuts) - 1

  def frames_of(seeds):
    x = diffusion.draw_prior(seeds)
    arrays = [tf.TensorArray(tf.float32, frames, element_shape=x.shape) for _ in range(2)]

    def body(k, state, states, predictions):
      begin, end = tf.gather(cuts, k), tf.gather(cuts, k + 1)
      state = samplers.sample(
        diffusion, denoiser, rows[begin:end], seeds, state.x, state.x0_hat, begin, state.before
      )
      return k + 1, state, states.write(k, state.x), predictions.write(k, state.x0_hat)

    first = samplers.State(x, tf.zeros_like(x), x)
    _, _, states, predictions = tf.while_loop(
      lambda k, *_: k < frames, body, (tf.constant(0), first, *arrays)
    )
    order = [1, 0, 2, 3, 4]
    x_t = tf.concat([x[tf.newaxis], states.stack()], 0)
    return [tf.transpose(x_t, order), tf.transpose(predictions.stack(), order)]

  def sample(num, seed):
    num = _check_num(num)
    return draw(_seeds_from(seed, num))

  def draw(seeds):
    _check_seeds(seeds)
    return _both(_in_batches(images_of, [shape], seeds, size)[0])

  def process(seeds):
    _check_seeds(seeds)
    shapes = [(frames + 1, *shape), (frames, *shape)]
    x_t, x0_hat = _in_batches(frames_of, shapes, seeds, size)
    return {"times": tf.constant(times), "x_t": x_t, "x0_hat": x0_hat}

  return sample, draw, process


def _restoring(diffusion, predict, options):
  """The functions that restore: one sample an image, and several with their spread."""
  tables = [restoration.rows(diffusion, k / LATTICE, options) for k in range(1, LATTICE + 1)]
  tables = np.stack(tables)  # as many rows in each: the number of steps is fixed

  def several(y, t, seed, num):
    _check_images(y, "y")
    _check_time(t)
    num = _check_num(num)
    start = tf.clip_by_value(tf.cast(tf.round(t * LATTICE), tf.int32), 1, LATTICE)
    many = tf.repeat(y, num, axis=0)
    seeds = _seeds_from(seed, tf.shape(many)[0])
    images = restoration.restore(diffusion, predict, tf.gather(tables, start - 1), seeds, many)
    return tf.reshape(images, tf.concat([tf.shape(y)[:1], [num], tf.shape(y)[1:]], 0))

  def restore(y, t, seed):
    return _both(several(y, t, seed, tf.constant(1))[:, 0])

  def restore_map(y, t, seed, num):
    samples = several(y, t, seed, num)
    mean = tf.reduce_mean(samples, axis=1)
    count = tf.cast(tf.maximum(num - 1, 1), tf.float32)
    variance = tf.reduce_sum((samples - mean[:, tf.newaxis]) ** 2, axis=1) / count
    return {"samples": samples, "mean": mean, "std": tf.sqrt(variance)}

  return restore, restore_map


# --- The folder ---------------------------------------------------------------------------------


def name_of(options):
  """What a sampler's signatures are called by: "momentum_280"; its steps count, not its NFE.

  One that goes by times of its own says so: "momentum_280_times".
  """
  steps = f"{len(options.times) - 1}_times" if options.times else options.steps
  return f"{parts.identifier(options.sampler)}_{steps}"


def export(run, out, options=None, *, dtype="float32", restoring=restoration.DEFAULT,
           evaluations=(), licence=UNSTATED, force=False):  # fmt: skip
  """Writes a trained model as a SavedModel; see the module's text for what is in it.

  Args:
    run: a `training.Run`.
    out: the folder; it appears whole or not at all.
    options: list of `experiment.Sampling`, one for each sampler to export; the first is what
      `sample` without a name runs. By default the experiment's own, and two_step in 25 steps.
    dtype: "float32", or "bfloat16" for the network's products (weights and images stay float32).
    restoring: `experiment.Sampling` of `restore`.
    evaluations: records of `evaluations.jsonl`, for the model card.
    licence: of the weights, for the model card.
    force: replace the exported model at `out`.

  Returns:
    The manifest.

  Raises:
    ValueError: `out` is there already, a sampler cannot be exported, or a weight is not finite.
  """
  out = pathlib.Path(out)
  refuse_to_overwrite(out, force, MARK)
  if options is None:
    options = usual_options(run.experiment.sampling)
  by_name = {}
  for o in options:
    if o.sampler.adaptive:
      raise ValueError(
        f"{o.sampler} chooses its steps by the batch and cannot be exported; take another "
        f"sampler, such as {samplers.SAMPLERS[1]}"
      )
    if by_name.setdefault(name_of(o), o) != o:
      raise ValueError(f"two of the samplers to export would both be called {name_of(o)}")
  _check_finite(run.model.ema_network.get_weights())
  if dtype != run.experiment.network.dtype:
    run = _with_dtype(run, dtype)
  exported = _Exported(run, by_name, restoring)
  manifest = _manifest(run, by_name, exported, dtype, restoring, licence)

  def fill(folder):
    tf.saved_model.save(exported, str(folder), signatures=exported.functions)
    extra = folder / EXTRA
    extra.mkdir()
    run.experiment.save(extra)
    run.diffusion.prior.save(extra / "prior.npz")
    (extra / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(run, manifest, evaluations), encoding="utf-8")

  write_whole(out, fill, force, MARK)
  return manifest


def usual_options(sampling, **changes):
  """The samplers of an export that names none: the run's own and a fast one."""
  return [sampling.changed(**changes), sampling.changed(sampler="two_step", steps=25, **changes)]


def keep_apart(out, source, inside=False):
  """Raises the ValueError of an `out` that is, holds or, if not `inside`, lies in what is read."""
  to, read = pathlib.Path(out).resolve(), pathlib.Path(source).resolve()
  if read.exists() and (read.is_relative_to(to) or (to.is_relative_to(read) and not inside)):
    raise ValueError(f"--out={out} would mix with {source}, which is read; give another --out")


def refuse_to_overwrite(out, force, mark=None):
  """Raises the ValueError of an `out` that is there already, unless `force` may replace it.

  Args:
    force: replaces what its own kind has written: a file, or a folder with `mark` in it.
    mark: the path of a file in every such folder; None where `out` is a file.
  """
  out = pathlib.Path(out)
  if not out.exists():
    return
  if not force:
    raise ValueError(f"{out} is there already; give another --out, or --force to replace it")
  if not (out.is_file() if mark is None else (out / mark).is_file()):
    own = "a file" if mark is None else f"a folder with {mark} in it"
    raise ValueError(f"{out} is not {own}, and --force replaces nothing else; give another --out")


def write_whole(out, fill, force=False, mark=None):
  """Makes a folder by `fill(folder)`; it appears whole or not at all.

  Args:
    force, mark: see `refuse_to_overwrite`.
  """
  out = pathlib.Path(out)
  partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
  for left in (partial, old):
    shutil.rmtree(left, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    fill(partial)
    refuse_to_overwrite(out, force, mark)  # what came meanwhile, too
    if out.exists():
      out.rename(old)
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


def _make(experiment, prior, weights, step):
  """A `training.Run` of given weights, which stand for the averaged ones and for those trained."""
  model = training.build(experiment, experiment.build_diffusion().with_prior(prior))
  for network in (model.network, model.ema_network):
    for variable, value in zip(network.variables, weights, strict=True):
      variable.assign(value)
  model.optimizer.iterations.assign(step)
  return training.Run(experiment, model, step)


def _with_dtype(run, dtype):
  weights = run.model.ema_network.get_weights()
  experiment = run.experiment.replace(network={"dtype": dtype})
  return _make(experiment, run.diffusion.prior, weights, run.step)


def digest_of(run):
  """SHA-256 of the averaged weights, in hexadecimal."""
  total = hashlib.sha256()
  for value in run.model.ema_network.get_weights():
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def _about(run, dtype, licence):
  """Where a model comes from; ready for JSON."""
  e = run.experiment
  return {
    "format": FORMAT, "name": e.name, "version": soft_diffusion_tf.__version__, "step": run.step,
    "config": e.digest(), "weights_sha256": digest_of(run),
    "parameters": int(run.model.ema_network.count_params()), "dtype": dtype, "licence": licence,
    "data": {"name": str(e.data.name), "split": e.data.train_split},
  }  # fmt: skip


def _manifest(run, by_name, exported, dtype, restoring, licence):
  describe = lambda spec: {"shape": list(spec.shape), "dtype": spec.dtype.name}
  signatures = {}
  for name, function in exported.functions.items():
    concrete = function.get_concrete_function()
    signatures[name] = {
      "inputs": {spec.name: describe(spec) for spec in function.input_signature},
      "outputs": {k: describe(v) for k, v in concrete.structured_outputs.items()},
    }
  return {
    **_about(run, dtype, licence),
    "tensorflow": tf.__version__,
    "image_shape": list(run.diffusion.image_shape),
    "times": [float(t) for t in SHOWN_TIMES],
    "level": [float(v) for v in run.diffusion.level(SHOWN_TIMES).numpy()],
    "sigma": [float(v) for v in run.diffusion.sigma(SHOWN_TIMES).numpy()],
    "samplers": {
      name: {"evaluations": exported.evaluations[name], **o.to_dict()}
      for name, o in by_name.items()
    },
    "default_sampler": next(iter(by_name)),
    "restoring": {**restoring.to_dict(), "lattice": LATTICE},
    "most_images": MOST,
    "signatures": signatures,
  }


# --- The model card -----------------------------------------------------------------------------


def card(run, manifest, evaluations=()):
  """The model card, Markdown: what the model is, how it was made, what was measured."""
  e, d = run.experiment, run.diffusion
  level, sigma = (
    "{:.4g} to {:.4g}".format(*schedule([0.0, 1.0]).numpy()) for schedule in (d.level, d.sigma)
  )
  size = " × ".join(map(str, d.image_shape))
  lines = [
    f"# {e.name}", "",
    f"A Soft Diffusion model (Daras et al. 2022) of {size} images, made by soft-diffusion-tf "
    f"{manifest['version']}.", "",
    "| | |", "|---|---|",
    f"| corruption | {type(e.corruption).__name__}, level {level} |",
    f"| noise σ | {sigma} |",
    f"| prior at t = 1 | {d.prior.kind} |",
    f"| network | NCSN++, {manifest['parameters']:,} parameters, averaged weights (EMA "
    f"{e.training.ema_decay:g}) |",
    f"| trained on | {e.data.name}, split {e.data.train_split}, {manifest['step']:,} steps of "
    f"{e.training.batch_size} images, seed {e.seed} |",
    f"| config digest | {manifest['config']} |",
    f"| weights, SHA-256 | {manifest['weights_sha256']} |",
    f"| {manifest.get('dtype_of', 'computes in')} | {manifest['dtype']} |",
    f"| licence of the weights | {manifest['licence']} |", "",
    "## Measured", "",
  ]  # fmt: skip
  train = {
    "data": str(e.data.name), "split": e.data.train_split, "crop": e.data.crop,
    "image_shape": list(e.data.image_shape),
  }  # fmt: skip
  records = [
    r for r in evaluations
    if r.get("step") == manifest["step"] and train.items() <= r.get("reference", {}).items()
    and r.get("ema_decay", e.training.ema_decay) == e.training.ema_decay  # not by --raw_weights
  ]  # fmt: skip
  if records:
    lines += [
      "Fréchet distance of samples to training images; the floor is the same between two sets of "
      "real images.", "",
      "| sampler | NFE | images | distance | floor |", "|---|---|---|---|---|",
    ]  # fmt: skip
    rows = []
    for r in records:
      floor = "–" if r.get("floor") is None else f"{r['floor']['value']:.4g}"
      rows.append(
        f"| {_summary(r)} | {r['nfe']} | {r['samples']} | {r['label']} {r['value']:.4g} | {floor} |"
      )
    lines += dict.fromkeys(rows)  # the same evaluation made twice is one row
  else:
    lines.append("Not evaluated against its training images.")
  lines += ["", "## Use and limits", "", _LIMITS.format(data=e.data.name), ""]
  if run.remark:
    lines += [f"Of the weights: {run.remark.partition(';')[0]}.", ""]
  if manifest.get("signatures"):
    lines += ["## Signatures", "", "| signature | inputs | outputs |", "|---|---|---|"]
    for name, s in sorted(manifest["signatures"].items()):
      lines.append(f"| {name} | {_spell(s['inputs'])} | {_spell(s['outputs'])} |")
    lines.append("")
  return "\n".join(lines)


_LIMITS = (
  "For study of diffusion with general corruptions. Samples and restorations look like the "
  "training data ({data}) and carry its gaps and biases: what a restoration adds is plausible, not "
  "evidence. Not for decisions about people."
)


def _spell(specs):
  return ", ".join(
    f"{name} {s['dtype']} [{', '.join('N' if n is None else str(n) for n in s['shape'])}]"
    for name, s in specs.items()
  )


# --- Reading ------------------------------------------------------------------------------------


# Where a model comes from: fields of a manifest and of a packed file's `about`, and their types.
_ABOUT = {
  "step": int, "name": str, "version": str, "config": str, "weights_sha256": str,
  "parameters": int, "dtype": str, "licence": str, "data": dict,
}  # fmt: skip


def _check_about(about):
  """Raises the ValueError of what is not what `_about` gives, or of another format."""
  if not isinstance(about, dict):
    raise ValueError(f"it says {reprlib.repr(about)} of itself, not an object of fields")
  if about.get("format") != FORMAT:
    raise ValueError(
      f"its format is {reprlib.repr(about.get('format'))} and this version reads {FORMAT}; export "
      f"the model again with soft-diffusion-tf {soft_diffusion_tf.__version__}, or read it with "
      "the version that wrote it"
    )
  for name, kind in _ABOUT.items():
    if name not in about:
      raise ValueError(f"it lacks {name!r}")
    if not isinstance(about[name], kind) or isinstance(about[name], bool):
      got = reprlib.repr(about[name])
      raise ValueError(f"its {name} is {got}, which is not of the type {kind.__name__}")
  if not 0 <= about["step"] < 2**63:
    raise ValueError(f"its step is {about['step']}, which no training reaches")


def manifest_of(path):
  """The manifest of an exported folder, checked; a ValueError says what else the folder is."""
  path = pathlib.Path(path)
  file = path / EXTRA / MANIFEST
  if not file.is_file():
    raise ValueError(f"{path}: not an exported model; write one with soft-diffusion-export")
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:  # ValueError: also of other bytes
    raise ValueError(f"{file}: not JSON ({error}); export the model again") from None
  try:
    _check_about(manifest)
  except ValueError as error:
    raise ValueError(f"{file}: {error}; export the model again") from None
  return manifest


def _summary(record):
  """What an evaluation sampled by; the sampler alone where its code is not trusted."""
  try:
    return options_from_config(Sampling, record["sampling"]).summary
  except trust.UntrustedCode:
    return record["sampler"]


def _check_shapes(experiment, shapes):
  """Raises the ValueError of weights that are not those of the experiment's network.

  Before the network is made: a config of unknown origin may ask for more memory than there is.
  """
  if experiment.network.least_variables > len(shapes):  # to count them all would take minutes
    raise ValueError(f"it has {len(shapes)} weights, too few for its network")
  experiment.check_network()
  want = experiment.network_shapes()
  if len(shapes) != len(want):
    raise ValueError(f"it has {len(shapes)} weights, and its network {len(want)}")
  for k, (given, wanted) in enumerate(zip(shapes, want)):
    if tuple(given) != wanted:
      raise ValueError(f"weight {k} has the shape {tuple(given)}, and its network's {wanted}")


def _check_finite(weights):
  """Raises the ValueError of NaN or infinite weights: all that they give is NaN."""
  if not all(np.isfinite(w).all() for w in weights):
    raise ValueError("the weights hold NaN or infinite values; take another checkpoint")


def load(path, trust_code=False):
  """A `training.Run` of an exported folder: network, diffusion and samplers, to go on with.

  The weights trained and their averages both start as the averages; the optimizer is fresh. Only
  config, prior and weights are read, which are data; the SavedModel's graph is not run.

  Args:
    trust_code: import code that its config.json names (see `trust`).

  Raises:
    ValueError: not an exported folder, one of another format, or a damaged one.
  """
  path = pathlib.Path(path)
  manifest = manifest_of(path)
  experiment = Experiment.load(path / EXTRA, trust_code)
  prior = priors.Prior.load(path / EXTRA / "prior.npz")
  try:
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    shapes = reader.get_variable_to_shape_map()
    count = sum(name.startswith("ema/") for name in shapes)
    names = [f"ema/{k}/.ATTRIBUTES/VARIABLE_VALUE" for k in range(count)]
    _check_shapes(experiment, [shapes[name] for name in names])
    weights = [reader.get_tensor(name) for name in names]
    _check_finite(weights)
    run = _make(experiment, prior, weights, manifest["step"])
  except Exception as error:  # damaged files raise many kinds
    text = parts.first_line(error)
    raise ValueError(f"{path}: its weights cannot be read ({text}); export it again") from error
  if digest_of(run) != manifest["weights_sha256"]:
    raise ValueError(f"{path}: its weights are not those of its manifest; export it again")
  return run


def signature(model, name):
  """A signature of a loaded SavedModel; a ValueError with the nearest name when there is none."""
  parts.check_choice("the signature", name, sorted(model.signatures))
  return model.signatures[name]


# --- One file -------------------------------------------------------------------------------------


def pack(run, out, *, dtype="float16", evaluations=(), licence=UNSTATED, force=False):
  """Writes config, prior and averaged weights as one .npz, in float16 or float32.

  Beside NAME.npz stands NAME.md, the model card (see `export` for `evaluations` and `licence`).

  Raises:
    ValueError: `out` is there already, or a weight is beyond float16.
  """
  out = pathlib.Path(out)
  if out.suffix != ".npz":
    raise ValueError(f"{out}: a packed model is a file that ends in .npz")
  for file in (out, out.with_suffix(".md")):
    refuse_to_overwrite(file, force)
  weights = [w.astype(dtype) for w in run.model.ema_network.get_weights()]
  if not all(np.all(np.isfinite(w)) for w in weights):
    raise ValueError(f"a weight is not finite in {dtype}; take float32")
  prior = run.diffusion.prior
  about = _about(run, dtype, licence) | {"dtype_of": "weights stored in"}
  content = json.loads(json.dumps(about | {"experiment": run.experiment.to_dict()}))
  content["sha256"] = _digest_of_file(content, prior, weights)
  partial = out.with_name(f".{out.name}.partial.npz")
  partial.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    partial, about=np.array(json.dumps(content)), prior_kind=np.array(prior.kind),
    prior_mean=np.float32(prior.mean), prior_factors=np.float32(prior.factors),
    **{_weight_name(k): w for k, w in enumerate(weights)},
  )  # fmt: skip
  partial.replace(out)
  out.with_suffix(".md").write_text(card(run, about, evaluations), encoding="utf-8")


def _weight_name(k):
  return f"weight_{k:04d}"


def _digest_of_file(about, prior, weights):
  """SHA-256 of all that a packed file holds, in hexadecimal: `about` but for itself, and arrays."""
  said = {k: v for k, v in about.items() if k != "sha256"} | {"prior": prior.kind}
  total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
  for value in (np.float32(prior.mean), np.float32(prior.factors), *weights):
    total.update(f"{value.dtype.str} {value.shape}".encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def unpack(path, trust_code=False):
  """The `training.Run` of a file that `pack` wrote.

  The file is data of unknown origin: sizes follow from its config and are checked before memory is
  taken, as are the digest over all of it, kinds and shapes, and that every number is finite.

  Args:
    trust_code: import code that its config names (see `trust`).

  Raises:
    trust.UntrustedCode: it names code, and nobody has consented.
    ValueError: it is something else, or damaged.
  """
  wrong, remedy = "cannot be read as a packed model", "get it anew, or export the model again"
  with arrays.opened(path, wrong, remedy) as content:
    about = json.loads(content.text("about"))
    _check_about(about)
  try:
    experiment = Experiment.from_config(about.get("experiment"), trust_code)
  except trust.UntrustedCode as error:
    raise trust.UntrustedCode(f"{path}: {error}") from None
  except (ValueError, RecursionError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"{path}: its config is not one ({text}); {remedy}") from error
  with arrays.opened(path, wrong, remedy) as content:
    kept = ("about", "prior_kind", "prior_mean", "prior_factors")
    count = sum(name.startswith("weight_") for name in content.names)
    names = [_weight_name(k) for k in range(count)]
    for name in sorted({*names, *kept}.symmetric_difference(content.names)):
      raise ValueError(f"{name!r} is {'not part of one' if name in content.names else 'missing'}")
    with trust.trust_code(trust_code):
      prior = priors.Prior.read(content, "prior_")
    if prior.mean.shape != experiment.data.image_shape:  # before anything of that size is made
      raise ValueError(
        f"its prior is of images of shape {prior.mean.shape}, and its data.image_shape is "
        f"{experiment.data.image_shape}"
      )
    shapes = [content.shape(name) for name in names]
    _check_shapes(experiment, shapes)
    stored = [content.array(n, s, ("float16", "float32")) for n, s in zip(names, shapes)]
    if about.get("sha256", digest := _digest_of_file(about, prior, stored)) != digest:
      raise ValueError("its digest is not that of its content")
    return _make(experiment, prior, [w.astype(np.float32) for w in stored], about["step"])


def pretrained():
  """The names of the models that come with the package, and the SHA-256 of each one's file."""
  folder = importlib.resources.files(soft_diffusion_tf) / "pretrained"
  lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").split("\n")
  pairs = [line.split() for line in lines if line]
  return {name.removesuffix(".npz"): digest for digest, name in pairs}


def from_pretrained(name, trust_code=False):
  """A `training.Run` by name or path, ready to sample from and to train on.

  Args:
    name: a model that comes with the package ("digits"; a folder of that name is "./digits"); an
      exported folder; a packed .npz file; or the workdir of a training run.
    trust_code: import code that its config names, such as somebody's own corruption. Without it
      nothing but this package's own code runs, whoever made the file (see `trust`).

  Raises:
    trust.UntrustedCode: its config names code, and nobody has consented.
    ValueError: none of these, or damaged.
  """
  known = pretrained()
  if str(name) in known:
    file = importlib.resources.files(soft_diffusion_tf) / "pretrained" / f"{name}.npz"
    with importlib.resources.as_file(file) as path:
      if hashlib.sha256(path.read_bytes()).hexdigest() != known[str(name)]:
        raise ValueError(f"{path}: damaged (its SHA-256 is another); install the package again")
      return unpack(path)
  if not str(name).strip():  # as of a variable that is not set; a path would be this folder
    raise ValueError("the name of a model is empty; give one, a file or a folder")
  path = pathlib.Path(name)
  if (path / EXTRA).is_dir():
    return load(path, trust_code)
  if path.is_dir():
    return training.load(path, trust_code=trust_code)
  if path.is_file():
    return unpack(path, trust_code)
  raise ValueError(
    f"{name}: no such model comes with the package, and no such file or folder is there; "
    f"the package has {', '.join(sorted(known))}"
  )
