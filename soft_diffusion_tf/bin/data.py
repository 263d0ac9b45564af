"""Tells what is in a data set, and what is wrong with it; packs it for training from the disk.

  soft-diffusion-data check photos --config=cifar10_blur
  soft-diffusion-data check folder:photos
  soft-diffusion-data check cifar10 --split=test
  soft-diffusion-data pack photos --config=cifar10_blur --out=packed

SOURCE is a folder, a zip or tar file, a pack, or any name that data.name takes in a config. Without
SOURCE the config's own data set is read.

`check` reads every image once. Its table counts formats, modes, sizes, orientations and labels. It
names every file that the config cannot use, and says what helps. It also names pictures that are
there twice, and pictures of one colour. Without --config no size is asked for. The exit code is 2
if a training would refuse the data set.

`pack` prepares the images of both splits as the config says, and writes them into a folder. A
training with --config.data.name=pack:FOLDER reads them from there, in the same memory for any
number of images. If packing is interrupted, the same command goes on where it stopped.
"""

import dataclasses
import os

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_SPLIT = flags.DEFINE_string(
  "split", None, "Split to read. By default check reads all images, and pack both of the config's."
)
_DATA_DIR = cli.define_path("data_dir", None, "Folder where TFDS keeps its data sets.")
_OUT = cli.define_path("out", None, "Folder to write the pack into. It must not exist yet.")

_COMMANDS = ("check", "pack")


def _check():
  command, source = (*cli.positional_arguments(), None, None)[:2]
  if command not in _COMMANDS:
    got = f", not {command!r}" if command else ""
    raise ValueError(
      f"give a command{got}: soft-diffusion-data check SOURCE [--config=FILE], or pack SOURCE "
      "--config=FILE --out=FOLDER"
    )
  if source is None or command == "pack":
    cli.require_config()
  if command == "check":
    cli.refuse([flags.FLAGS["out"]], "check writes no files")
  elif _OUT.value is None:
    raise ValueError("give --out=FOLDER, a new folder for the pack")
  elif os.path.lexists(_OUT.value):
    raise ValueError(f"--out={_OUT.value} exists already; give another --out or remove it")
  else:
    files.check_folder(os.path.dirname(os.path.abspath(_OUT.value)), "out", _OUT.value)


def main():
  from soft_diffusion_tf import trust

  with trust.trust_code(True):  # a class of a source is one that the user names here
    _run()


def _run():
  from soft_diffusion_tf import data, experiment
  from soft_diffusion_tf.data import pack

  source = cli.positional_arguments()[1] if len(cli.positional_arguments()) > 1 else None
  d = cli.experiment_of(_CONFIG.value).data if _CONFIG.value else experiment.Data()
  shape = d.image_shape if _CONFIG.value else None
  name = d.name if source is None else source
  if isinstance(name, str) and os.path.exists(os.path.expanduser(name)):
    is_pack = os.path.exists(os.path.join(os.path.expanduser(name), pack.INDEX))
    name = f"{pack.PREFIX if is_pack else data.FOLDER}{name}"
  if cli.positional_arguments()[0] == "pack":
    _pack(dataclasses.replace(d, name=name))
    return
  whole = isinstance(name, str) and not name.startswith(pack.PREFIX)
  splits = dict.fromkeys([d.train_split, d.test_split])
  if _SPLIT.value:
    splits = [_SPLIT.value]
  elif not any(split.startswith(data.FOLDER) for split in splits):
    splits = ["all" if whole else d.train_split]
  reports = []
  for split in splits:
    folder = _DATA_DIR.value or d.data_dir or None
    reports.append(data.survey(name, split, shape, d.crop, folder, policy=d.policy))
    print("\n".join(reports[-1].lines(everything=True)))
  for report in reports:  # when all is known
    report.check()


def _pack(d):
  from soft_diffusion_tf.data import pack

  splits = [_SPLIT.value] if _SPLIT.value else list(dict.fromkeys([d.train_split, d.test_split]))
  counts = pack.write(
    _OUT.value,
    lambda split, storage: d.load(split, _DATA_DIR.value, say=cli.say, storage=storage),
    str(d.name),
    splits,
    pack.preparing(d.image_shape, d.crop, d.policy),
    cli.say,
  )
  each = ", ".join(f"{n:,} images of the split {split}" for split, n in counts.items())
  print(f"{_OUT.value} holds {each}")
  print(f"train on it with --config.data.name=pack:{_OUT.value}")


def run():
  cli.run(main, check=_check, most_words=2)


if __name__ == "__main__":
  run()
