"""Which averages of its weights a run can draw by, and a model by one of them.

soft-diffusion-ema --workdir=runs/mine                                  what was kept
soft-diffusion-ema --workdir=runs/mine --length=0.08 --out=model.npz    a packed model

The run was trained with training.averages. Which length draws the samples that are nearest to real
images, soft-diffusion-evaluate --sweep --ema_lengths=0.03,0.05,0.1 finds. Sampling, evaluation and
export take --ema_length.
"""

import pathlib

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_WORKDIR = cli.define_path("workdir", None, "Folder of a training run.", required=True)
_LENGTH = flags.DEFINE_float("length", None, "Of the average, as a share of the training.")
_OUT = cli.define_path("out", None, "File.npz of the packed model.")
_STEP = flags.DEFINE_integer("step", None, "Step of a kept checkpoint; by default the newest.", 0)
_FORCE = flags.DEFINE_bool("force", False, "Replace --out.")
cli.define_trust_code()

_SHOWN = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)


def _check():
  if (_LENGTH.value is None) != (_OUT.value is None):
    raise ValueError("--length and --out make a model together; give both, or none for the table")
  if _OUT.value is not None:
    if not _OUT.value.endswith(".npz"):
      raise ValueError(f"--out={_OUT.value} is the name of a packed model; let it end in .npz")
    files.check_file(_OUT.value, _FORCE.value)


def main():
  from soft_diffusion_tf import averages, export, training
  from soft_diffusion_tf.experiment import Experiment
  from soft_diffusion_tf.training import snapshots

  workdir = pathlib.Path(_WORKDIR.value)
  if _LENGTH.value is None:
    kept = Experiment.load(workdir).training.averages
    steps = snapshots.steps_in(workdir)
    if not kept or not steps:
      raise ValueError(
        f"{workdir} keeps no averages; train with --config.training.averages=(0.05,0.1)"
      )
    print(f"averages of length {', '.join(f'{n:g}' for n in kept)}, kept at {len(steps)} steps")
    print(f"{'length':>7} {'made up to':>11}")
    exponents = [averages.exponent(n) for n in kept] * len(steps)
    for length in _SHOWN:
      wanted = averages.exponent(length)
      every = [s for s in steps for _ in kept]
      _, error = averages.combination(every, exponents, steps[-1], wanted)
      print(f"{length:7g} {error:11.1%}")
    print(
      f"next: soft-diffusion-evaluate --workdir={workdir} --sweep --nfe=25 --ema_lengths="
      f"{','.join(f'{n:g}' for n in kept)}"
    )
    return
  out = pathlib.Path(_OUT.value)
  files.keep_apart(out, workdir, inside=True)
  cli.say(f"loading the run in {workdir}")
  run = training.load(workdir, _STEP.value, length=_LENGTH.value)
  if run.remark:
    print(f"warning: {run.remark}")
  records = files.read_records(workdir / "evaluations.jsonl")
  export.pack(run, out, evaluations=records, force=_FORCE.value)
  print(
    f"{run.experiment.name} at step {run.step}, {training.spell_weights(run.weights)}, in {out}"
  )
  print(f'next: export.from_pretrained("{out}").images(range(16))')


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
