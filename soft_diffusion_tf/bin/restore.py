"""Restores corrupted images by a trained model: samples of the clean image, and their spread.

soft-diffusion-restore --workdir=runs/digits --images=photos/ --level=2.0 --out=restored
soft-diffusion-restore --workdir=runs/digits --images=photos/ --corrupt_level=2.0 --out=restored

With --t or --level the images are corrupted already, by so much; with --corrupt_level they are
clean and corrupted first; with none of the three t is estimated for each image. Images larger than
the network's are restored in overlapping tiles. For every image --out gets NAME-input.png,
NAME-expected.png (the least mean square error), NAME-sample-K.png, their NAME-mean.png and
NAME-uncertainty.png, and all in restored.npz; picture.png shows the first ones.
"""

import json
import pathlib
import sys

import numpy as np
from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_WORKDIR = cli.define_path(
  "workdir",
  None,
  "Folder of a training run or an exported model, a packed file, or 'digits'.",
  required=True,
)
_IMAGES = cli.define_path("images", None, "An image file, or a folder of them.", required=True)
_OUT = cli.define_path("out", None, "A new folder for the results.", required=True)
_LEVEL = flags.DEFINE_float("level", None, "The level at which the images are corrupted.")
_T = flags.DEFINE_float("t", None, "The same as a time of the process, in (0, 1].")
_CORRUPT_LEVEL = flags.DEFINE_float(
  "corrupt_level", None, "The images are clean: corrupt them to this level first."
)
_SAMPLES = flags.DEFINE_integer("samples", 8, "Samples of each clean image.", 1, 10_000)
_SEED = flags.DEFINE_integer("seed", 0, "Image seed of the first sample.", 0)
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler instead of the default.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps from t to 0, instead of the default.")
_NOISE = flags.DEFINE_float("noise", None, "How much noise stochastic_two_step exchanges.")
_EXPLAIN = flags.DEFINE_bool(
  "explain", False, "Hold the samples to the image given: ‖C x − y‖ ≲ σ √n."
)
cli.define_trust_code()
_FORCE = flags.DEFINE_bool("force", False, "Replace the results at --out.")

_ARRAYS = "restored.npz"  # every folder of results has it
_REFERENCE = 512  # samples of the model that t is estimated by
_SHOWN = 8  # images in the picture


def list_files(path):
  """The file, or the images of the folder; a ValueError names a path that is neither."""
  from soft_diffusion_tf import data

  path = pathlib.Path(path)
  return [path] if path.is_file() else data.list_images(path)


def read(path, channels):
  """Images below a path as float32 [H, W, C], by name; a ValueError names one that does not fit."""
  from soft_diffusion_tf import data

  path = pathlib.Path(path)
  images = {}
  for file in list_files(path):
    image = data.read_image(file, data.Policy(transparency="refuse"))
    if image.shape[2] != channels:
      kinds = {1: "grey", 3: "RGB"}
      raise ValueError(
        f"{file}: {kinds[image.shape[2]]}, but the model was trained on "
        f"{kinds.get(channels, channels)} images; convert the file"
      )
    name = file.stem if path.is_file() else "-".join(file.relative_to(path).with_suffix("").parts)
    if name in images:
      raise ValueError(f"{file}: another file is called {name} too; rename one of them")
    images[name] = image.astype(np.float32) / 255.0
  return images


def _check():
  given = [f for f in (_LEVEL, _T, _CORRUPT_LEVEL) if f.value is not None]
  if len(given) > 1:
    raise ValueError(
      f"--{given[0].name} and --{given[1].name} both say how corrupted the images are; give one"
    )
  if _T.value is not None and not 0 < _T.value <= 1:
    raise ValueError(f"--t={_T.value:g} is outside of (0, 1], the times of the process")
  files.check_folder(_OUT.value)


def main():
  from soft_diffusion_tf import export, plots, restoration, rng

  out = pathlib.Path(_OUT.value)
  files.keep_apart(out, _IMAGES.value)
  files.keep_apart(out, _WORKDIR.value, inside=True)
  files.refuse_to_overwrite(out, _FORCE.value, mark=_ARRAYS)
  options = restoration.DEFAULT.changed(
    sampler=_SAMPLER.value, steps=_STEPS.value, noise=_NOISE.value
  )
  rng.check_seeds(_SEED.value, len(list_files(_IMAGES.value)) * _SAMPLES.value)
  cli.say(f"loading the model {_WORKDIR.value}")
  model = export.from_pretrained(_WORKDIR.value)
  if remark := model.remark.partition(";")[0]:
    print(f"warning: {remark}", file=sys.stderr)
  diffusion = model.diffusion
  images = read(_IMAGES.value, diffusion.image_shape[2])
  restorer = restoration.Restorer(diffusion, model.denoiser(), options, explain=_EXPLAIN.value)
  names = list(images)
  for name in names:  # before anything is computed
    restorer.check_shape(images[name].shape, name)
  if _CORRUPT_LEVEL.value is not None or _LEVEL.value is not None:
    level = _LEVEL.value if _CORRUPT_LEVEL.value is None else _CORRUPT_LEVEL.value
    times = np.full(len(names), restoration.time_of_level(diffusion, level))
  elif _T.value is not None:
    times = np.full(len(names), _T.value)
  else:
    for name in names:
      if images[name].shape != tuple(diffusion.image_shape):
        raise ValueError(
          f"{name}: t is estimated only for images of the network's size, "
          f"{tuple(diffusion.image_shape)}; give --t or --level"
        )
    clean = model.images(range(_REFERENCE), progress="samples to estimate t by")
    times = restoration.estimate_times(diffusion, np.stack([images[n] for n in names]), clean)
  results = {}
  for k, name in enumerate(names):
    y = images[name][np.newaxis]
    if _CORRUPT_LEVEL.value is not None:
      y = restorer.corrupt(y, times[k], seed=_SEED.value + k)
    first = _SEED.value + k * _SAMPLES.value
    results[name] = y[0], restorer(y, float(times[k]), _SAMPLES.value, first, progress=name)
  _write(out, results, dict(zip(names, map(float, times))), plots)
  print(f"{len(names)} images, {_SAMPLES.value} samples each ({options.sampler}), in {out}")
  print(f"t from {min(times):.3f} to {max(times):.3f}; look at {out / 'picture.png'}")


def _write(out, results, times, plots):

  def fill(folder):
    arrays = {}
    for name, (y, restored) in results.items():
      spread = restored.uncertainty[0] if restored.samples.shape[1] > 1 else None
      pictures = {"input": y, "mean": restored.mean[0], "expected": restored.expected[0]}
      if spread is not None:
        pictures["uncertainty"] = spread / max(float(spread.max()), 1e-6)
        arrays[f"{name}/uncertainty"] = spread
      pictures |= {f"sample-{k}": x for k, x in enumerate(restored.samples[0])}
      for kind, picture in pictures.items():
        plots.save_png(folder / f"{name}-{kind}.png", plots.to_uint8(picture))
      arrays |= {
        f"{name}/input": y,
        f"{name}/samples": restored.samples[0],
        f"{name}/expected": restored.expected[0],
      }
    np.savez(folder / _ARRAYS, **arrays)
    (folder / "times.json").write_text(json.dumps(times, indent=1) + "\n")
    _picture(folder / "picture.png", list(results.values())[:_SHOWN], plots)

  files.write_folder(out, fill, _FORCE.value, _ARRAYS)


def _picture(path, results, plots):
  """A row for each image: what was given, the mean, the spread, and up to 4 samples."""
  rows = []
  shape = results[0][0].shape
  for y, restored in results:
    if y.shape != shape:
      continue  # a sheet has room for one size
    spread = restored.samples[0].std(axis=0)
    rows += [y, restored.mean[0], spread / max(float(spread.max()), 1e-6), *restored.samples[0, :4]]
  columns = 3 + min(4, results[0][1].samples.shape[1])
  rows = np.stack(rows)
  plots.save_png(path, plots.grid(rows, columns, zoom=plots.zoom_for(rows)))


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
