"""Draws samples of a trained model: one picture, or a folder of any size.

soft-diffusion-sample --workdir=runs/digits --seeds=0-63 --out=samples.png
soft-diffusion-sample --workdir=runs/cifar10 --seeds=0-49999 --out=DIR --shard=1/2
soft-diffusion-sample --workdir=runs/digits --process=way.gif

The image of a seed depends on the checkpoint, the sampler and the seed alone. A folder that was
not finished is gone on with by the same command; several processes share it by --shard.
"""

import pathlib
import re
import sys

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_WORKDIR = cli.define_path("workdir", None, "Folder of a training run.", required=True)
_OUT = cli.define_path(
  "out", None, "A .png file for one grid, or a folder for samples by --format."
)
_PROCESS = cli.define_path(
  "process", None, "In place of --out: a .gif or .png file for the way from noise to the samples."
)
_SEEDS = flags.DEFINE_string(
  "seeds",
  None,
  "Image seeds: a range A-B (B included) or a list A,B,C. By default 0-63, for --process 0-7.",
)
_STEP = flags.DEFINE_integer("step", None, "The checkpoint of this step instead of the newest.")
_SAMPLER = flags.DEFINE_string(
  "sampler", None, "Sampler instead of the config's, or a pair such as ddim+momentum."
)
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps instead of the config's.")
_NFE = flags.DEFINE_integer("nfe", None, "Evaluations of the network, in place of --steps.")
_GRID = flags.DEFINE_string(
  "grid", None, "Time grid: uniform, quadratic, level, transport or relative."
)
_TIMES = flags.DEFINE_string("times", None, "Your own times 1,…,0 in place of --steps and --grid.")
_K = flags.DEFINE_float("k", None, "Fresh noise of a ddim step (P Eq. 52).")
_NOISE = flags.DEFINE_float("noise", None, "How much noise stochastic_two_step exchanges.")
_CLIP = flags.DEFINE_bool("clip", None, "Bound the predicted image to [0, 1] in every step.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "The same dynamically, by this percentile.")
_TOLERANCE = flags.DEFINE_float("tolerance", None, "Error per step of dormand_prince.")
_FORMAT = flags.DEFINE_enum("format", "png", ["png", "npz"], "What a folder is filled with.")
_SHARD = flags.DEFINE_string("shard", "1/1", "k/n: this is the k-th of n processes.")
_STRATEGY = flags.DEFINE_enum(
  "strategy", "auto", ["auto", "one_device", "mirrored"], "The devices of this process."
)
cli.define_trust_code()
_WEIGHTS = cli.define_weights()
_FORCE = flags.DEFINE_bool("force", False, "Replace the picture or the samples at --out.")

_MOMENTS = {".png": 8, ".gif": 32}  # of the way that is shown
_SEED = r"\d{1,19}"
_MOST = 10_000_000  # images in one call


def parse_seeds(text):
  """ "0-3" → [0, 1, 2, 3]; "5,7" → [5, 7]."""
  bounds = re.fullmatch(rf"({_SEED})-({_SEED})", text, re.ASCII)
  seeds, last = [], -1
  if bounds:
    last = int(bounds[2])
    seeds = range(int(bounds[1]), last + 1)
  elif re.fullmatch(rf"{_SEED}(,{_SEED})*", text, re.ASCII):
    seeds = [int(part) for part in text.split(",")]
    last = max(seeds)
  if not seeds or last >= 2**63:
    raise ValueError(
      f"--seeds={text}: give a rising range such as 0-63 or a list such as 1,5,9, of numbers up to "
      f"{2**63 - 1}"
    )
  return seeds


def parse_shard(text):
  """ "2/8" → (2, 8)."""
  if not re.fullmatch(r"\d+/\d+", text):
    raise ValueError(f"--shard={text}: give k/n with k from 1 to n, such as 1/4")
  return tuple(int(part) for part in text.split("/"))


def _check_count(seeds, picture):
  """Raises the ValueError of more images than one picture shows or one call draws."""
  # A range may be longer than len can say.
  count = seeds.stop - seeds.start if isinstance(seeds, range) else len(seeds)
  if picture and count > cli.MOST_SHOWN:
    raise ValueError(
      f"--seeds={_SEEDS.value} asks for {count:,} images, and one picture shows {cli.MOST_SHOWN:,} "
      "at most; give a folder as --out"
    )
  if count > _MOST:
    raise ValueError(
      f"--seeds={_SEEDS.value} asks for {count:,} images; draw at most {_MOST:,} in one call, and "
      "the next ones into the same folder"
    )


def parse_times(text):
  """ "1,0.5,0" → (1.0, 0.5, 0.0); None → None."""
  try:
    return None if text is None else tuple(float(part) for part in text.split(","))
  except ValueError:
    raise ValueError(f"--times={text}: give descending numbers such as 1,0.5,0") from None


def _is_picture():
  return _PROCESS.value is not None or pathlib.Path(_OUT.value).suffix == ".png"


def _seeds():
  return parse_seeds(_SEEDS.value or ("0-63" if _PROCESS.value is None else "0-7"))


def _check():
  if (_OUT.value is None) == (_PROCESS.value is None):
    raise ValueError(
      "give --out=FILE.png or --out=FOLDER for samples, or --process=FILE.gif for the way to them"
    )
  parse_shard(_SHARD.value)
  parse_times(_TIMES.value)
  seeds = _seeds()
  flag = _OUT if _PROCESS.value is None else _PROCESS
  if flag is _PROCESS and pathlib.Path(flag.value).suffix not in _MOMENTS:
    raise ValueError(f"--process={flag.value} ends neither in .gif nor in .png; give one")
  if _is_picture():
    cli.refuse((_SHARD, _FORMAT), "one picture is drawn whole")
    files.check_file(flag.value, _FORCE.value, flag.name)
  else:
    files.check_folder(_OUT.value)
  _check_count(seeds, _is_picture())


def main():
  from soft_diffusion_tf import drawing, plots, training
  from soft_diffusion_tf.experiment import Experiment
  from soft_diffusion_tf.training import strategies

  shard = parse_shard(_SHARD.value)
  times = parse_times(_TIMES.value)
  seeds, picture = _seeds(), _is_picture()
  out = pathlib.Path(_PROCESS.value or _OUT.value)
  if not picture:
    drawing.check_out(out)
  sampling = Experiment.load(_WORKDIR.value).sampling
  options = sampling.changed(
    sampler=_SAMPLER.value,
    steps=_STEPS.value,
    nfe=_NFE.value,
    grid=_GRID.value,
    times=times,
    k=_K.value,
    noise=_NOISE.value,
    clip=_CLIP.value,
    threshold=_THRESHOLD.value,
    tolerance=_TOLERANCE.value,
  )
  if _PROCESS.value is not None and options.sampler.adaptive:
    raise ValueError(
      f"{options.sampler} chooses its own steps, and the way is shown by those of a plan; give "
      "another --sampler"
    )
  cli.say(f"loading the run in {_WORKDIR.value}")
  strategy = strategies.make_strategy(_STRATEGY.value, alone=True)
  with strategy.scope():
    run = training.load(_WORKDIR.value, _STEP.value, **cli.asked_weights(*_WEIGHTS))
  batch_sampler = run.batch_sampler(options, strategy)
  if run.remark:
    print(f"warning: {run.remark}", file=sys.stderr)
  if _PROCESS.value is not None:
    moments = _MOMENTS[out.suffix]
    times, states, predictions = run.sampler(options).trajectory(run.plan(options), seeds, moments)
    if out.suffix == ".png":
      plots.process(out, times, states, predictions)
    else:
      plots.save_gif(out, states)
    print(f"the way of {len(seeds)} samples ({options.sampler}) in {out}")
  elif picture:
    images = batch_sampler.images(seeds, "sampling")
    plots.save_png(out, plots.grid(images, zoom=plots.zoom_for(images)))
    print(
      f"{len(images)} samples ({options.sampler}, {batch_sampler.evaluations} evaluations) in {out}"
    )
  else:
    nfe = None if batch_sampler.adaptive else int(batch_sampler.plan.shape[0])
    settings = drawing.settings_of(run.experiment, run.step, options, nfe)
    if any(flag.value for flag in _WEIGHTS):
      settings |= run.weights
    total, there = drawing.write(
      batch_sampler, seeds, out, settings, form=_FORMAT.value, shard=shard, force=_FORCE.value
    )
    count = batch_sampler.evaluations or nfe  # None: of an adaptive sampler that had nothing to do
    how = f"{options.sampler}, {count} evaluations" if count else options.sampler
    print(f"{total} samples ({how}) in {out}; {there} were there already")
  print(f"next: soft-diffusion-evaluate --workdir={_WORKDIR.value}")


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
