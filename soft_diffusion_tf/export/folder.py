"""A SavedModel folder: written, and read again."""

import json
import pathlib

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import (
  files,
  parts,
  priors,
  restoration,
  samplers,
)
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.export.about import (
  about_run,
  check_about,
  check_finite,
  check_shapes,
  digest_of,
  make_run,
)
from soft_diffusion_tf.export.card import UNSTATED, card
from soft_diffusion_tf.export.graph import MOST_IMAGES, RESTORING_TIMES, Exported

EXTRA = "assets.extra"
MANIFEST, CONFIG, CARD = "manifest.json", "config.json", "README.md"
MANIFEST_PATH = f"{EXTRA}/{MANIFEST}"  # by which an exported folder is known
SHOWN_TIMES = np.linspace(0, 1, 33, dtype=np.float32)  # at which the manifest lists level and σ


def name_of(options):
  """What a sampler's signatures are called by: "momentum_280"; its steps count, not its NFE.

  One that goes by times of its own says so: "momentum_280_times".
  """
  steps = f"{len(options.times) - 1}_times" if options.times else options.steps
  return f"{parts.identifier(options.sampler)}_{steps}"


def save(
  run,
  out,
  options=None,
  *,
  dtype="float32",
  restoring=restoration.DEFAULT,
  evaluations=(),
  licence=UNSTATED,
  force=False,
):
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
  files.refuse_to_overwrite(out, force, mark=MANIFEST_PATH)
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
  check_finite(run.model.ema_network.get_weights())
  if dtype != run.experiment.network.dtype:
    run = _with_dtype(run, dtype)
  exported = Exported(run, by_name, restoring)
  manifest = _manifest(run, by_name, exported, dtype, restoring, licence)

  def fill(folder):
    tf.saved_model.save(exported, str(folder), signatures=exported.functions)
    extra = folder / EXTRA
    extra.mkdir()
    run.experiment.save(extra)
    run.diffusion.prior.save(extra / "prior.npz")
    (extra / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(run, manifest, evaluations), encoding="utf-8")

  files.write_folder(out, fill, force, MANIFEST_PATH)
  return manifest


def usual_options(sampling, **changes):
  """The samplers of an export that names none: the run's own and a fast one."""
  return [sampling.changed(**changes), sampling.changed(sampler="two_step", steps=25, **changes)]


def _with_dtype(run, dtype):
  weights = run.model.ema_network.get_weights()
  experiment = run.experiment.replace(network={"dtype": dtype})
  about = {"step": run.step, "ema_length": run.length}
  return make_run(experiment, run.diffusion.prior, weights, about)


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
    **about_run(run, dtype, licence),
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
    "restoring": {**restoring.to_dict(), "lattice": RESTORING_TIMES},
    "most_images": MOST_IMAGES,
    "signatures": signatures,
  }


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
    check_about(manifest)
  except ValueError as error:
    raise ValueError(f"{file}: {error}; export the model again") from None
  return manifest


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
    check_shapes(experiment, [shapes[name] for name in names])
    weights = [reader.get_tensor(name) for name in names]
    check_finite(weights)
    run = make_run(experiment, prior, weights, manifest)
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
