"""Draws samples of a trained model, as one picture or as a folder of PNG files.

soft-diffusion-sample --workdir=runs/digits --seeds=0-63 --out=samples.png
"""

import pathlib
import re

from absl import flags

from soft_diffusion_tf.bin import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
_OUT = flags.DEFINE_string(
  "out", None, "A .png file for one grid, or a folder for one PNG per seed.", required=True
)
_SEEDS = flags.DEFINE_string(
  "seeds", "0-63", "Image seeds: a range A-B (B included) or a list A,B,C."
)
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler instead of the config's.")
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps instead of the config's.")
_FORCE = flags.DEFINE_bool("force", False, "Overwrite what is at --out.")


def parse_seeds(text):
  """ "0-3" → [0, 1, 2, 3]; "5,7" → [5, 7]."""
  bounds = re.fullmatch(r"(\d+)-(\d+)", text)
  if bounds and int(bounds[1]) <= int(bounds[2]):
    return list(range(int(bounds[1]), int(bounds[2]) + 1))
  if re.fullmatch(r"\d+(,\d+)*", text):
    return [int(part) for part in text.split(",")]
  raise ValueError(f"--seeds={text}: give a rising range such as 0-63 or a list such as 1,5,9")


def main():
  import numpy as np

  from soft_diffusion_tf import plots, training

  seeds = np.array(parse_seeds(_SEEDS.value))
  out = pathlib.Path(_OUT.value)
  if out.exists() and not _FORCE.value and (out.suffix == ".png" or any(out.iterdir())):
    raise ValueError(f"{out} is there already; give another --out or --force")
  run = training.load(_WORKDIR.value)
  options = run.options(sampler=_SAMPLER.value, steps=_STEPS.value)
  images = run.images(seeds, options, "sampling")
  if out.suffix == ".png":
    plots.save_png(out, plots.grid(images, zoom=plots.zoom_for(images)))
  else:
    out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, plots.to_uint8(images)):
      plots.save_png(out / f"{seed:06d}.png", image)
  print(f"{len(images)} samples ({options.sampler}, {options.steps} steps) in {out}")
  print(f"next: soft-diffusion-evaluate --workdir={_WORKDIR.value}")


def run():
  cli.run(main)


if __name__ == "__main__":
  run()
