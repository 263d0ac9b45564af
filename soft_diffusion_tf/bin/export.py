"""Writes a trained model as one thing to hand on: a SavedModel, or one small file.

soft-diffusion-export --workdir=runs/digits --samplers=momentum:280,two_step:25 --out=model
soft-diffusion-export --workdir=runs/digits --out=model.npz

The folder loads with TensorFlow alone (`saved_model_cli run --dir=model --tag_set=serve ...`); its
README.md is the model card. The .npz holds config and float16 weights, for from_pretrained.
"""

import pathlib

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_WORKDIR = cli.define_path("workdir", None, "Folder of a training run.", required=True)
_WEIGHTS = cli.define_weights(raw=False)
_OUT = cli.define_path(
  "out", None, "A new folder for a SavedModel, or a file that ends in .npz.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "The checkpoint of this step instead of the newest.")
_SAMPLERS = flags.DEFINE_string(
  "samplers",
  None,
  "SAMPLER:STEPS,... to export side by side, the first as the default; without "
  "it the config's own and two_step:25.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Images that are computed side by side, instead of the config's: part of "
  "what an image is, and the price of a single one.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "What a SavedModel computes in (float32 or bfloat16), or what an .npz stores (float16 or "
  "float32); by default float32 and float16.",
)
_LICENCE = flags.DEFINE_string("licence", None, "Licence of the weights, for the model card.")
cli.define_trust_code()
_FORCE = flags.DEFINE_bool("force", False, "Replace the export at --out.")


def parse_samplers(text):
  """ "momentum:280,two_step:25" → [("momentum", 280), ("two_step", 25)]."""
  from soft_diffusion_tf import parts

  pairs = []
  for part in parts.split(text, ","):
    name, colon, steps = part.rpartition(":")
    if not (name and colon and steps.isdecimal()):
      raise ValueError(
        f"--samplers={text}: {part!r} is not SAMPLER:STEPS; give a list such as momentum:280"
      )
    pairs.append((name, int(steps)))
  return pairs


def _settings():
  """(out, whether it is a packed file, the samplers' pairs, dtype) of the flags, checked."""
  out = pathlib.Path(_OUT.value)
  pairs = parse_samplers(_SAMPLERS.value) if _SAMPLERS.value else None
  packed = out.suffix == ".npz"
  known = ("float16", "float32") if packed else ("float32", "bfloat16")
  dtype = _DTYPE.value or known[0]
  if dtype not in known:
    raise ValueError(f"--dtype={dtype} does not go with --out={out}; take {' or '.join(known)}")
  if packed and (pairs or _BATCH_SIZE.value):
    raise ValueError("--samplers and --batch_size belong to a SavedModel, not to an .npz")
  if packed:
    files.check_folder(out.parent, path=out)
  else:
    files.check_folder(out)
  return out, packed, pairs, dtype


def main():
  from soft_diffusion_tf import export, training
  from soft_diffusion_tf.experiment import Experiment

  out, packed, pairs, dtype = _settings()
  files.keep_apart(out, _WORKDIR.value, inside=True)
  files.refuse_to_overwrite(out, _FORCE.value, mark=None if packed else export.MANIFEST_PATH)
  together = _BATCH_SIZE.value
  sampling = Experiment.load(_WORKDIR.value).sampling
  if pairs is None:
    asked = export.usual_options(sampling, batch_size=together)
  else:
    asked = [sampling.changed(sampler=s, steps=n, batch_size=together) for s, n in pairs]
  cli.say(f"loading the run in {_WORKDIR.value}")
  run = training.load(_WORKDIR.value, _STEP.value, **cli.asked_weights(*_WEIGHTS))
  options = {
    "evaluations": files.read_records(pathlib.Path(_WORKDIR.value) / "evaluations.jsonl"),
    "force": _FORCE.value,
    "dtype": dtype,
    "licence": _LICENCE.value or export.UNSTATED,
  }
  if packed:
    export.pack(run, out, **options)
    print(f"{run.experiment.name} at step {run.step} in {out} ({out.stat().st_size / 1e6:.2f} MB)")
    print(f'next: export.from_pretrained("{out}").images(range(16))')
    return
  cli.say(f"tracing {len(asked)} samplers and writing the SavedModel")
  manifest = export.save(run, out, asked, **options)
  size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
  print(f"{run.experiment.name} at step {run.step} in {out} ({size:.1f} MB)")
  print(f"signatures: {', '.join(sorted(manifest['signatures']))}")
  print(
    f"next: saved_model_cli run --dir={out} --tag_set=serve --signature_def=sample "
    "--input_exprs='num=4;seed=0' --outdir=."
  )


def run():
  cli.run(main, check=_settings)


if __name__ == "__main__":
  run()
