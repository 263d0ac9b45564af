"""Tells what is in a data set, and what is wrong with it; packs it for training from the disk.

  soft-diffusion-data check photos --config=cifar10_blur
  soft-diffusion-data check folder:photos
  soft-diffusion-data check cifar10 --split=test
  soft-diffusion-data pack photos --config=cifar10_blur --out=packed

SOURCE is a folder, or what a config's data.name takes; left out, it is the config's. Every image is
read once. The table counts formats, modes, sizes, orientations and labels, and names every file
that cannot be used as the config asks, with the remedy; also duplicates and images of one colour.
Without --config nothing is asked of the sizes. The exit code is 2 where a training would refuse.

`pack` writes the images of the config's two splits, prepared as it says, into a folder; train on it
by --config.data.name=pack:FOLDER. Neither takes more memory for more images.
"""

import dataclasses
import os

from absl import flags

from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_SPLIT = flags.DEFINE_string(
  "split", None, "Split to read; by default all images, and to pack both splits of the config."
)
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")
_OUT = cli.define_path("out", None, "Folder of the pack to write, which must not be there.")

_COMMANDS = ("check", "pack")


def _check():
  command, source = (*cli.words(), None, None)[:2]
  if command not in _COMMANDS:
    got = f", not {command!r}" if command else ""
    raise ValueError(f"give a command{got}: soft-diffusion-data check SOURCE [--config=FILE]")
  if source is None or command == "pack":
    cli.require_config()
  if command == "check":
    cli.refuse([flags.FLAGS["out"]], "check writes nothing")
  elif _OUT.value is None:
    raise ValueError("give --out=FOLDER, where the pack is written")
  elif os.path.exists(_OUT.value):
    raise ValueError(f"--out={_OUT.value} is there already; give another --out or remove it")
  else:
    cli.check_folder(os.path.dirname(os.path.abspath(_OUT.value)), "out", _OUT.value)


def main():
  from soft_diffusion_tf import data, experiment
  from soft_diffusion_tf.data import pack

  source = cli.words()[1] if len(cli.words()) > 1 else None
  d = cli.experiment_of(_CONFIG.value).data if _CONFIG.value else experiment.Data()
  shape = d.image_shape if _CONFIG.value else None
  name = d.name if source is None else source
  if isinstance(name, str) and os.path.exists(os.path.expanduser(name)):
    is_pack = os.path.exists(os.path.join(os.path.expanduser(name), pack.INDEX))
    name = f"{pack.PREFIX if is_pack else data.FOLDER}{name}"
  if cli.words()[0] == "pack":
    _pack(dataclasses.replace(d, name=name))
    return
  whole = isinstance(name, str) and not name.startswith(pack.PREFIX)
  split = _SPLIT.value or ("all" if whole else d.train_split)
  report = data.survey(
    name, split, shape, d.crop, _DATA_DIR.value or d.data_dir or None, policy=d.policy
  )
  print("\n".join(report.lines(everything=True)))
  report.check()


def _pack(d):
  from soft_diffusion_tf.data import pack

  splits = [_SPLIT.value] if _SPLIT.value else list(dict.fromkeys([d.train_split, d.test_split]))
  counts = pack.write(
    _OUT.value, lambda split, room: d.load(split, _DATA_DIR.value, say=cli.say, room=room),
    str(d.name), splits, pack.preparing(d.image_shape, d.crop, d.policy), cli.say,
  )  # fmt: skip
  print(f"packed {', '.join(f'{n:,} images as {split}' for split, n in counts.items())}")
  print(f"next: soft-diffusion-train --config=… --config.data.name=pack:{_OUT.value}")


def run():
  cli.run(main, check=_check, most_words=2)


if __name__ == "__main__":
  run()
