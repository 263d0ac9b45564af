"""Computes real images' statistics once, for every evaluation against them.

  soft-diffusion-reference-stats --config=cifar10_blur --feature_net=FOLDER --samples=10000 \
    --out=cifar10_train_10000.npz
  soft-diffusion-evaluate --workdir=runs/cifar10 --samples=10000 --feature_net=FOLDER \
    --reference=cifar10_train_10000.npz

The file says what it is of: data set, split, crop, image shape, feature network with its SHA-256,
number of images, a digest of the images, and the distances of as many other real images (the
floor). An evaluation that differs in any of these is refused.
"""

import pathlib

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_OUT = cli.define_path("out", None, "The .npz file to write.", required=True)
_SAMPLES = flags.DEFINE_integer("samples", None, "Real images, instead of the config's number.", 2)
_FLOOR_SAMPLES = flags.DEFINE_integer(
  "floor_samples", None, "Other real images for the floor, by default as many.", 2
)
_SPLIT = flags.DEFINE_string("split", None, "Split of the data; by default the training one.")
_FEATURE_NET = flags.DEFINE_string(
  "feature_net",
  None,
  "pixels, pixels:SIDE, classifier, tfgan, tfgan:FOLDER or the FOLDER of a SavedModel, instead of "
  "the config's.",
)
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")
_FORCE = flags.DEFINE_bool("force", False, "Overwrite what is at --out.")


def _check():
  out = pathlib.Path(_OUT.value)
  if out.suffix != ".npz":
    raise ValueError(f"--out={out}: give the name of a .npz file")
  files.check_file(out, _FORCE.value)
  cli.require_config()


def main():
  from soft_diffusion_tf import evaluation
  from soft_diffusion_tf.evaluation import features

  out = _OUT.value
  e = cli.experiment_of(_CONFIG.value)
  d, split = e.data, _SPLIT.value or e.data.train_split
  count = e.evaluation.samples if _SAMPLES.value is None else _SAMPLES.value

  def load(part):
    return d.load(part, _DATA_DIR.value)

  name = _FEATURE_NET.value or e.evaluation.feature_net
  network = features.feature_network(name, load(d.train_split) if name == "classifier" else None)
  cli.say(f"measuring {count} images of {d.name}")
  about = evaluation.conditions_of(network, d.name, split, d.image_shape, d.crop, count)
  real = evaluation.reference(
    network,
    load(split).images,
    about,
    e.evaluation.subset,
    _FLOOR_SAMPLES.value,
    k=e.evaluation.neighbours,
  )
  real.save(out)
  floor = f"{network.label} {real.floor['value']:.4g}" if real.floor else real.why_no_floor
  print(f"{count} images of {d.name} {split} in {network.name}: {out}")
  print(f"floor (real against real): {floor}")


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
