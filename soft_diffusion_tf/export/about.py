"""What an exported model says of itself, and the checks of one that somebody hands over."""

import hashlib
import reprlib

import numpy as np

import soft_diffusion_tf
from soft_diffusion_tf import averages, training

FORMAT = 1


def make_run(experiment, prior, weights, about):
  """A `training.Run` of given weights, which stand for the averaged ones and for those trained.

  Args:
    about: what `about_run` gave. Averages of other lengths stayed in the workdir.
  """
  experiment = experiment.replace(training={"averages": ()})
  model = training.build(experiment, experiment.build_diffusion().with_prior(prior))
  for network in (model.network, model.ema_network):
    for variable, value in zip(network.variables, weights, strict=True):
      variable.assign(value)
  model.optimizer.iterations.assign(about["step"])
  return training.Run(experiment, model, about["step"], length=about.get("ema_length"))


def digest_of(run):
  """SHA-256 of the averaged weights, in hexadecimal."""
  total = hashlib.sha256()
  for value in run.model.ema_network.get_weights():
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def about_run(run, dtype, licence):
  """Where a model comes from; ready for JSON."""
  e = run.experiment
  return {
    "format": FORMAT,
    "name": e.name,
    "version": soft_diffusion_tf.__version__,
    "step": run.step,
    "config": e.digest(),
    "weights_sha256": digest_of(run),
    "parameters": int(run.model.ema_network.count_params()),
    "dtype": dtype,
    "licence": licence,
    **({"ema_length": run.length} if run.length is not None else {}),
    "data": {"name": str(e.data.name), "split": e.data.train_split},
  }


# Where a model comes from: fields of a manifest and of a packed file's `about`, and their types.
_ABOUT = {
  "step": int,
  "name": str,
  "version": str,
  "config": str,
  "weights_sha256": str,
  "parameters": int,
  "dtype": str,
  "licence": str,
  "data": dict,
}


def check_about(about):
  """Raises the ValueError of what is not what `about_run` gives, or of another format."""
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
  if about.get("ema_length") is not None:
    averages.check_length(about["ema_length"], "its ema_length")
  if not 0 <= about["step"] < 2**63:
    raise ValueError(f"its step is {about['step']}, which no training reaches")


def check_shapes(experiment, shapes):
  """Raises the ValueError of weights that are not those of the experiment's network.

  Before the network is made: a config of unknown origin may ask for more memory than there is.
  """
  if experiment.network.least_variables > len(shapes):  # to count them all would take minutes
    raise ValueError(
      f"the file holds {len(shapes)} weight arrays, too few for the network in its config"
    )
  experiment.check_network()
  want = experiment.network_shapes()
  if len(shapes) != len(want):
    raise ValueError(
      f"the file holds {len(shapes)} weight arrays, and the network in its config needs {len(want)}"
    )
  for k, (given, wanted) in enumerate(zip(shapes, want)):
    if tuple(given) != wanted:
      raise ValueError(f"weight {k} has the shape {tuple(given)}, and its network's {wanted}")


def check_finite(weights):
  """Raises the ValueError of NaN or infinite weights: all that they give is NaN."""
  if not all(np.isfinite(w).all() for w in weights):
    raise ValueError("the weights hold NaN or infinite values; take another checkpoint")
