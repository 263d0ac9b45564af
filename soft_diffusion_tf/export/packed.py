"""A model in one .npz file, and models by name."""

import hashlib
import importlib.resources
import json
import pathlib

import numpy as np

import soft_diffusion_tf
from soft_diffusion_tf import (
  arrays,
  files,
  priors,
  training,
  trust,
)
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.export.about import about_run, check_about, check_shapes, make_run
from soft_diffusion_tf.export.card import UNSTATED, card
from soft_diffusion_tf.export.folder import EXTRA, load


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
    files.refuse_to_overwrite(file, force)
  weights = [w.astype(dtype) for w in run.model.ema_network.get_weights()]
  if not all(np.all(np.isfinite(w)) for w in weights):
    raise ValueError(f"a weight is not finite in {dtype}; take float32")
  prior = run.diffusion.prior
  about = about_run(run, dtype, licence) | {"dtype_of": "weights stored in"}
  content = json.loads(json.dumps(about | {"experiment": run.experiment.to_dict()}))
  content["sha256"] = _digest_of_file(content, prior, weights)
  with files.atomic(out) as partial:
    np.savez_compressed(
      partial,
      about=np.array(json.dumps(content)),
      prior_kind=np.array(prior.kind),
      prior_mean=np.float32(prior.mean),
      prior_factors=np.float32(prior.factors),
      **{_weight_name(k): w for k, w in enumerate(weights)},
    )
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
    check_about(about)
  try:
    config = about.get("experiment")
    if isinstance(config, dict):
      config = {**config, "version": about["version"]}
    experiment = Experiment.from_config(config, trust_code)
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
    check_shapes(experiment, shapes)
    stored = [content.array(n, s, ("float16", "float32")) for n, s in zip(names, shapes)]
    if about.get("sha256", digest := _digest_of_file(about, prior, stored)) != digest:
      raise ValueError("its digest is not that of its content")
    return make_run(experiment, prior, [w.astype(np.float32) for w in stored], about)


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
