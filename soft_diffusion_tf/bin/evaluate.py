"""How near a model's samples, or a folder of images, are to real images.

soft-diffusion-evaluate --workdir=runs/digits --samples=700       one sampler, one number of steps
soft-diffusion-evaluate --workdir=runs/digits --sweep             the paper's protocol
soft-diffusion-evaluate --workdir=runs/digits --memorisation      nearest training images
soft-diffusion-evaluate --images=FOLDER --reference=folder:REAL   images of any origin
"""

import dataclasses
import hashlib
import json
import pathlib

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_WORKDIR = cli.define_path("workdir", None, "Folder of a training run.")
_IMAGES = cli.define_path("images", None, "Folder of images to evaluate instead of samples.")
_SAMPLES = flags.DEFINE_integer(
  "samples",
  None,
  "Images to evaluate, instead of the config's number; with --images by default all.",
)
_REFERENCE = flags.DEFINE_string(
  "reference",
  None,
  "Real images: a .npz of soft-diffusion-reference-stats, or a data set (TFDS name, digits, "
  "folder:PATH); by default the run's own.",
)
_REFERENCE_SAMPLES = flags.DEFINE_integer(
  "reference_samples",
  None,
  "Real images in the reference; 0 (the default): as many as evaluated, of a folder:PATH all.",
)
_SPLIT = flags.DEFINE_string(
  "split", None, "Split of the real images; by default the training one, of a folder all of it."
)
_FEATURE_NET = flags.DEFINE_string(
  "feature_net",
  None,
  "pixels, pixels:SIDE, classifier, tfgan, tfgan:FOLDER or the FOLDER of a SavedModel, instead of "
  "the config's.",
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Step of a kept checkpoint, or 'best' (of a sweep); by default the newest."
)
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler instead of the config's.")
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps instead of the config's.")
_GRID = flags.DEFINE_string("grid", None, "Time grid instead of the config's (not of a sweep).")
_WEIGHTS = cli.define_weights()
_FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "Image seed of the first sample.", 0)
_SWEEP = flags.DEFINE_bool(
  "sweep", False, "Measure all of --nfe, --samplers, --checkpoints; go on where a sweep was ended."
)
_NFE = flags.DEFINE_string(
  "nfe",
  None,
  "Evaluations of the network in place of --steps; of a sweep FIRST-LAST:STEP or A,B,C (default: "
  "200-920:80, P's ten).",
)
_SAMPLERS = flags.DEFINE_string(
  "samplers", None, "Samplers of a sweep, A,B,C; by default the config's."
)
_CHECKPOINTS = flags.DEFINE_string(
  "checkpoints", "all", "Checkpoints of a sweep: all, kept, newest, or steps A,B,C."
)
_LENGTHS = flags.DEFINE_list(
  "ema_lengths", [], "Lengths of averaged weights of a sweep, A,B,C (see --ema_length)."
)
_MEMORISATION = flags.DEFINE_bool(
  "memorisation", False, "Find the nearest training images of the samples, or of --images."
)
cli.define_trust_code()
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")

# A flag, why others would be ignored beside it, and which.
_ALONE = (
  (
    _SWEEP,
    "--sweep takes --samplers, --nfe and --checkpoints, and the grid of the config",
    (_IMAGES, _MEMORISATION, _CHECKPOINT, _STEPS, _GRID, *_WEIGHTS),
  ),
  (_SAMPLERS, "--samplers are all that a sweep takes", (_SAMPLER,)),
  (
    _MEMORISATION,
    "--memorisation searches the images that the run was trained on",
    (_REFERENCE, _REFERENCE_SAMPLES, _SPLIT),
  ),
  (
    _IMAGES,
    "--images are there already, and nothing is sampled",
    (_CHECKPOINT, _SAMPLER, _STEPS, _NFE, _GRID, _FIRST_SEED, *_WEIGHTS),
  ),
)


class _Job:
  """What the flags ask for: the run's experiment, the network, the real images."""

  def __init__(self):
    from soft_diffusion_tf import data, experiment, rng
    from soft_diffusion_tf.evaluation import features

    self.workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None
    self.experiment = experiment.Experiment.load(self.workdir) if self.workdir else None
    self.options = self.experiment.evaluation if self.experiment else experiment.Evaluation()
    self.images = None
    if _IMAGES.value:
      self.images = data.load(f"folder:{_IMAGES.value}", "all").images
    self.count = _SAMPLES.value
    if self.count is None:
      self.count = self.options.samples if self.images is None else len(self.images)
    asked = _REFERENCE_SAMPLES.value
    if asked is None:
      asked = self.options.reference_samples
    self._asked = asked
    rng.check_seeds(_FIRST_SEED.value, self.count)
    self._source = None
    feature_net = _FEATURE_NET.value or self.options.feature_net
    if not _FEATURE_NET.value:
      features.check_consent(feature_net)
    needs_data = feature_net == "classifier"
    self.network = features.feature_network(feature_net, self.train() if needs_data else None)

  @property
  def reference_count(self):
    """Real images in the reference: of a folder that is compared with another, all."""
    if (
      not self._asked and self.images is not None and (_REFERENCE.value or "").startswith("folder:")
    ):
      return len(self.train())
    return self._asked or self.count

  @property
  def _stored(self):
    return bool(_REFERENCE.value) and _REFERENCE.value.endswith(".npz")

  def _place(self):
    """(data set, split, image shape, crop, data_dir) of the real images."""
    from soft_diffusion_tf import data

    d = self.experiment.data if self.experiment else None
    if d is not None and (self._stored or not _REFERENCE.value):
      data.check_consent(d.name, None if _DATA_DIR.value else d.data_dir)
      return str(d.name), _SPLIT.value or d.train_split, d.image_shape, d.crop, d.data_dir
    name = _REFERENCE.value
    split = _SPLIT.value or ("all" if name.startswith("folder:") else "train")
    shape = d.image_shape if d else self.images.shape[1:]
    return name, split, shape, "auto", ""

  def train(self, split=None):
    """The real images, as a `data.Source`."""
    from soft_diffusion_tf import data

    if self._stored and not self.experiment:
      raise ValueError("the classifier needs images: give --reference=DATASET")
    if split is None and self._source is not None:
      return self._source
    name, own, shape, crop, data_dir = self._place()
    folder = _DATA_DIR.value or data_dir or None
    source = data.load(name, split or own, shape, crop, folder)
    if split is None:
      self._source = source
    return source

  def check_images(self):
    """The images to evaluate, refused if they are too few or of another shape."""
    from soft_diffusion_tf import evaluation

    evaluation.check_count(self.count, len(self.images), _IMAGES.value)
    if self.experiment and self.images.shape[1:] != self.experiment.data.image_shape:
      raise ValueError(
        f"{_IMAGES.value}: images of shape {self.images.shape[1:]}, but the run's are "
        f"{self.experiment.data.image_shape}; evaluate images of one shape"
      )
    return self.images

  def reference(self):
    """The `evaluation.Reference`, from its file, from the workdir's cache, or computed."""
    from soft_diffusion_tf import evaluation

    if self._stored:
      real = evaluation.Reference.load(_REFERENCE.value)
      expected = {"feature_net": self.network.name, "feature_net_sha256": self.network.digest}
      if self.experiment:
        name, split, shape, crop, _ = self._place()
        expected |= {"data": name, "split": split, "image_shape": list(shape), "crop": crop}
      else:
        expected["image_shape"] = list(self.images.shape[1:])
      return real.check(_REFERENCE.value, **expected, count=self.reference_count)
    cli.say("measuring the real images, unless that was done before")
    source = self.train()
    name, split, shape, crop, _ = self._place()
    about = evaluation.conditions_of(self.network, name, split, shape, crop, self.reference_count)
    folder = self.workdir / "references" if self.workdir else None
    return evaluation.reference(
      self.network,
      source.images,
      about,
      self.options.subset,
      self.count,
      folder,
      k=self.options.neighbours,
    )


def _print(result, where):
  about, d = result.conditions, result.distance
  print(f"{where}: {result}")
  print(f"floor (real against real): {result.floor_line()}")
  reference = about["reference"]
  weights = reference["feature_net_sha256"]
  one, two = result.subset, result.real_subset
  sides = f"{one} a side" if one == two else f"{one} images and {two} real ones"
  print(
    f"network {reference['feature_net']}"
    + (f" (sha256 {weights[:12]})" if weights else "")
    + f", {d.dimension} features; reference {reference['count']} of {reference['data']} "
    f"{reference['split']}; KID, precision and recall on {sides}"
  )
  for line in result.warnings():
    print(f"warning: {line}")


def _evaluate(job):
  import numpy as np

  from soft_diffusion_tf import evaluation, training

  if job.images is not None:
    images = job.check_images()
    real = job.reference()
    order = np.random.default_rng(0).permutation(len(images))[: job.count]  # KID wants no order
    statistics = evaluation.measure(
      job.network,
      evaluation.image_batches(images, order),
      job.count,
      job.options.subset,
      "features",
    )
    about = {"images": _IMAGES.value, "samples": job.count, "reference": real.conditions}
    result = evaluation.with_reference(job.network, statistics, real, job.options.neighbours, about)
    if job.options.metrics:
      found = evaluation.by_metrics(job.options, images[order], job.train().images)
      result = dataclasses.replace(result, metrics=found)
    print_as = f"{_IMAGES.value}, N = {job.count}"
    if job.workdir is None:
      _print(result, print_as)
      print(json.dumps(result.record()))
      return
  else:
    evaluation.check_count(job.count, float("inf"))
    run, options = _run(job)
    real = job.reference()
    result = evaluation.evaluate_run(
      run,
      job.network,
      real,
      job.count,
      options,
      first_seed=_FIRST_SEED.value,
      real_images=job.train().images if run.experiment.evaluation.metrics else None,
    )
    evaluation.to_tensorboard(job.workdir, result.record())
    last = _FIRST_SEED.value + job.count - 1
    print_as = (
      f"step {run.step} ({training.spell_weights(result.conditions)}), {options.summary}, "
      f"{_effort(options)}, N = {job.count}, seeds {_FIRST_SEED.value}-{last}"
    )
  files.append_record(job.workdir / "evaluations.jsonl", result.record())
  _print(result, print_as)


def _effort(options):
  if options.evaluations is None:
    return f"tolerance {options.sampler.tolerance:g}"
  return f"{options.evaluations} NFE"


def _run(job):
  """The run at --checkpoint, and its sampling options."""
  from soft_diffusion_tf import samplers, training
  from soft_diffusion_tf.evaluation import sweeps

  sampler, steps, step, nfe = _SAMPLER.value, _STEPS.value, None, None
  weights = cli.asked_weights(*_WEIGHTS)
  if _NFE.value is not None:
    nfe = int(_NFE.value)
  if _CHECKPOINT.value == "best":
    found = sweeps.best(job.workdir)
    step, sampler = found["step"], sampler or found["sampler"]
    if not any(flag.value for flag in _WEIGHTS):
      weights["length"] = found.get("ema_length")
    if steps is None and nfe is None and not samplers.rule_of(sampler).adaptive:
      nfe = found["nfe"]
  elif _CHECKPOINT.value is not None:
    step = int(_CHECKPOINT.value)
  options = job.experiment.sampling.changed(sampler=sampler, steps=steps, nfe=nfe, grid=_GRID.value)
  cli.say(f"loading the run in {job.workdir}")
  return training.load(job.workdir, step, **weights), options


def _lengths():
  from soft_diffusion_tf import averages

  found = []
  for text in _LENGTHS.value:
    try:
      found.append(float(text))
    except ValueError:
      raise ValueError(f"--ema_lengths: {text!r} is no number; give some, as 0.05,0.1") from None
    averages.check_length(found[-1], "--ema_lengths")
  return found or [None]


def _sweep(job):
  from soft_diffusion_tf import evaluation, parts, training
  from soft_diffusion_tf.evaluation import sweeps

  evaluation.check_count(job.count, float("inf"))
  nfes = sweeps.parse_numbers(_NFE.value or sweeps.PAPER_NFE)
  names = [_SAMPLER.value or str(job.experiment.sampling.sampler)]
  if _SAMPLERS.value:
    names = parts.split(_SAMPLERS.value, ",")
  sweeps.check_samplers(names)
  steps = sweeps.checkpoints(job.workdir, _CHECKPOINTS.value)
  cells = sweeps.sweep(
    job.workdir,
    job.network,
    job.reference(),
    job.count,
    names=names,
    nfes=nfes,
    steps=steps,
    lengths=_lengths(),
    first_seed=_FIRST_SEED.value,
  )
  print(sweeps.tables(cells))
  found = sweeps.best_of(cells)
  print(f"floor (real against real): {found['floor']['value'] if found['floor'] else 'none'}")
  for cell in cells:
    if "error" in cell:
      print(f"failed: step {cell['step']}, {cell['sampler']}, {cell['nfe']} NFE: {cell['error']}")
  for line in found["warnings"]:
    print(f"warning: {line}")
  weights = training.spell_weights(found)
  print(
    f"best: step {found['step']}, {weights}, {found['sampler']}, {found['nfe']} NFE: "
    f"{found['label']} {found['value']:.4g}, named in {job.workdir / sweeps.BEST_FILE}; curves in "
    f"{job.workdir / sweeps.FOLDER / sweeps.CURVES}"
  )


def _memorisation(job):
  import numpy as np

  from soft_diffusion_tf import data, evaluation, parts
  from soft_diffusion_tf.evaluation import memorisation

  d = job.experiment.data
  if _SAMPLES.value is None:
    job.count = min(job.count, memorisation.BASE)
  evaluation.check_count(job.count, float("inf"))
  if job.images is not None:
    generated = job.check_images()[: job.count]
    names = [str(f) for f in data.list_images(_IMAGES.value)]
    folder = pathlib.Path(_IMAGES.value).resolve()
    title, about = folder.name, {"images": str(folder), "samples": job.count}
  else:
    run, options = _run(job)
    seeds = np.arange(_FIRST_SEED.value, _FIRST_SEED.value + job.count)
    batches = evaluation.sample_batches(run, seeds, options)(0)
    generated = np.concatenate([np.asarray(b) for b in batches])
    if generated.dtype != np.uint8:
      raise ValueError(
        "some samples are not finite; lower the number of steps or look at the model"
      )
    if run.remark:
      print(f"warning: {run.remark}")
    names = seeds.tolist()
    title = f"step{run.step}_{parts.identifier(options.sampler)}_"
    title += f"{options.evaluations or 'adaptive'}_seeds{seeds[0]}-{seeds[-1]}"
    about = evaluation.run_conditions(
      run.experiment, run.step, options, job.count, _FIRST_SEED.value, run.weights
    )
  train = job.train().images
  held_out = None if d.test_split == d.train_split else job.train(d.test_split).images
  found = memorisation.report(job.network, generated, train, held_out, "nearest images")
  about |= {
    "data": str(d.name),
    "split": d.train_split,
    "held_out": "training images among themselves" if held_out is None else d.test_split,
    "feature_net": job.network.name,
    "feature_net_sha256": job.network.digest,
  }
  # Of all conditions: a report of others never takes the place of this one.
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
  path = job.workdir / "memorisation" / f"{title}_{digest}.json"
  path.parent.mkdir(exist_ok=True)
  content = {**about, "spaces": [n.record(names) for n in found]}
  path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
  memorisation.figure(path.with_suffix(".png"), generated, train, found)
  for nearest in found:
    print(nearest)
  print(f"in {path} and {path.with_suffix('.png').name}")


def _check():
  if not _WORKDIR.value and not (_IMAGES.value and _REFERENCE.value):
    raise ValueError("give --workdir=FOLDER, or --images=FOLDER with --reference=REAL_IMAGES")
  for flag, what in ((_SWEEP, "sweep"), (_MEMORISATION, "memorisation")):
    if flag.value and not _WORKDIR.value:
      raise ValueError(f"--{what} needs --workdir=FOLDER")
  for flag, why, ignored in _ALONE:
    if flag.value:
      cli.refuse(ignored, why)
  if not _SWEEP.value:
    one = "without --sweep one sampler and checkpoint are measured"
    cli.refuse((_SAMPLERS, _CHECKPOINTS, _LENGTHS), one)
    if _NFE.value is not None and not _NFE.value.isdecimal():
      raise ValueError(f"--nfe={_NFE.value}: give one number, or --sweep for several")
    if _CHECKPOINT.value not in (None, "best") and not _CHECKPOINT.value.isdecimal():
      raise ValueError(f"--checkpoint={_CHECKPOINT.value}: give a step or 'best'")


def main():
  from soft_diffusion_tf import evaluation

  if not _MEMORISATION.value:
    evaluation.check_tfgan()
  cli.say("reading images and the feature network")
  job = _Job()
  if _SWEEP.value:
    _sweep(job)
  elif _MEMORISATION.value:
    _memorisation(job)
  else:
    _evaluate(job)


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
