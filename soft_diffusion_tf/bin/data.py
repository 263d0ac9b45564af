"""Tells what is in a data set, and what is wrong with it, before a training finds out.

  soft-diffusion-data check photos --config=cifar10_blur
  soft-diffusion-data check folder:photos
  soft-diffusion-data check cifar10 --split=test

SOURCE is a folder, or what a config's data.name takes; left out, it is the config's. Every image is
read once. The table counts formats, modes, sizes, orientations and labels, and names every file
that cannot be used as the config asks, with the remedy; also duplicates and images of one colour.
Without --config nothing is asked of the sizes. The exit code is 2 where a training would refuse.
"""

import os

from absl import flags

from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_SPLIT = flags.DEFINE_string("split", None, "Split to read; by default all images.")
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")

_COMMANDS = ("check",)


def _check():
  command, source = (*cli.words(), None, None)[:2]
  if command not in _COMMANDS:
    got = f", not {command!r}" if command else ""
    raise ValueError(f"give a command{got}: soft-diffusion-data check SOURCE [--config=FILE]")
  if source is None:
    cli.require_config()


def main():
  from soft_diffusion_tf import data, experiment

  source = cli.words()[1] if len(cli.words()) > 1 else None
  d = cli.experiment_of(_CONFIG.value).data if _CONFIG.value else experiment.Data()
  shape = d.image_shape if _CONFIG.value else None
  name = d.name if source is None else source
  if isinstance(name, str) and os.path.isdir(os.path.expanduser(name)):
    name = f"{data.FOLDER}{name}"
  split = _SPLIT.value or (d.train_split if isinstance(name, data.Reader) else "all")
  report = data.survey(
    name, split, shape, d.crop, _DATA_DIR.value or d.data_dir or None, policy=d.policy
  )
  print("\n".join(report.lines(everything=True)))
  report.check()


def run():
  cli.run(main, check=_check, most_words=2)


if __name__ == "__main__":
  run()
