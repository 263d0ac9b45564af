"""Restoration of held-out images by a trained model, beside baselines; writes JSON and a figure.

python tools/measure_restoration.py --workdir=runs/heldout --times=0.4,0.6,0.8 --out=DIR

Images of the config's test split are corrupted at each t and restored. The baselines know the
operator and the noise as well, and each gets the strength, of a few, that gives the best PSNR on
the first training images: Wiener (scikit-image's, with its Laplacian as the spectrum), total
variation (gradient steps on the data term, scikit-image's Chambolle in between), and bicubic (down
by a factor and up again). Needs scikit-image:
pip install soft-diffusion-tf[restoration].
"""

import json
import pathlib

import numpy as np
from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

if __name__ == "__main__":  # tests import this file, and a flag can be defined but once
  _WORKDIR = cli.define_path("workdir", None, "Folder of a training run.", required=True)
  _TIMES = flags.DEFINE_list("times", ["0.4", "0.6", "0.8"], "Times t to corrupt to.")
  _IMAGES = flags.DEFINE_integer("images", 297, "Test images, at most.", 1)
  _SAMPLES = flags.DEFINE_integer("samples", 8, "Samples of each clean image.", 2, 10_000)
  _FEATURE_NET = flags.DEFINE_string("feature_net", "pixels", "What the distances are taken in.")
  _REFERENCE = flags.DEFINE_integer(
    "reference", 10_000, "Training images to compare with, at most.", 2
  )
  cli.define_trust_code()
  _OUT = cli.define_path("out", None, "A new folder for the results.", required=True)

_TUNING = 40  # training images by which the baselines' strengths are chosen
_SHOWN = 8


def psnr(x, clean):
  return float(-10 * np.log10(np.mean((np.clip(x, 0, 1) - clean) ** 2)))


def wiener(y, kernel, strength):
  from skimage import restoration as skimage

  return np.stack(
    [
      np.stack([skimage.wiener(c, kernel, strength, clip=False) for c in np.moveaxis(x, -1, 0)], -1)
      for x in y
    ]
  )


def total_variation(y, apply, adjoint, weight, steps=40):
  """min ½ ‖C x − y‖² + weight · TV(x), by proximal gradient steps (‖C‖ ≤ 1, so the step is 1)."""
  from skimage import restoration as skimage

  x = y.copy()
  for _ in range(steps):
    x = x - adjoint(apply(x) - y)
    x = np.stack([skimage.denoise_tv_chambolle(i, weight, channel_axis=-1) for i in x])
  return x


def bicubic(y, factor):
  from skimage import transform

  h, w = y.shape[1:3]
  small = (max(1, round(h / factor)), max(1, round(w / factor)))
  return np.stack(
    [
      transform.resize(transform.resize(x, small, order=3, anti_aliasing=True), (h, w), order=3)
      for x in y
    ]
  )


def best(candidates, method, clean):
  """The candidate whose result has the best PSNR."""
  return max(candidates, key=lambda value: psnr(method(value), clean))


def parse_times(texts):
  """["0.4", "0.6"] → [0.4, 0.6]."""
  try:
    times = [float(text) for text in texts]
  except ValueError:
    times = []
  if not times or not all(0 < t <= 1 for t in times):
    raise ValueError(f"--times={','.join(texts)}: give times from 0 to 1, such as 0.4,0.6")
  return times


def main():
  from soft_diffusion_tf import corruptions, data, evaluation, plots, restoration, training
  from soft_diffusion_tf.evaluation import features

  times = parse_times(_TIMES.value)
  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise ValueError(f"{out} is there already; give another --out")
  files.check_folder(out)
  run = training.load(_WORKDIR.value)
  e, diffusion = run.experiment, run.diffusion
  data.check_consent(e.data.name, e.data.data_dir)
  part = e.data.load
  clean = part(e.data.test_split).floats(slice(0, _IMAGES.value))
  training_set = part(e.data.train_split)
  tuning = training_set.floats(slice(0, _TUNING))
  reference = training_set.images[: _REFERENCE.value]
  network = features.feature_network(_FEATURE_NET.value, training_set)

  def moments(images):
    batches = evaluation.image_batches(images)
    return evaluation.measure(network, batches, len(images), subset=0).moments

  real = moments(reference)
  distance = lambda x: evaluation.frechet(network.label, moments(plots.to_uint8(x)), real).exact
  results = {
    "run": e.name,
    "step": run.step,
    "images": len(clean),
    "samples": _SAMPLES.value,
    "judge": network.label,
    "reference": len(reference),
    "clean": {"distance": distance(clean)},
    "times": [],
  }
  out.mkdir(parents=True)
  sheets = []
  for t in times:
    sigma, level = float(diffusion.sigma(t)), float(diffusion.level(t))
    apply = lambda x, t=t: diffusion.corrupt(x.astype(np.float32), np.float32(t)).numpy()
    adjoint = lambda x, t=t: diffusion.adjoint(x.astype(np.float32), np.float32(t)).numpy()
    noisy = restoration.Restorer(diffusion, run.denoiser())
    y, y_tuning = noisy.corrupt(clean, t), noisy.corrupt(tuning, t, seed=10**6)
    rows, shown = {}, {"y": y}

    def record(name, x, sample=None, t=t, y=y, apply=apply, rows=rows, **more):
      sample = x if sample is None else sample
      gap = np.sqrt(np.mean((apply(sample) - y) ** 2))
      rows[name] = {
        "psnr": psnr(x, clean),
        "distance": distance(sample),
        "consistency": float(gap),
        **more,
      }
      print(f"t = {t:g} {name}: {rows[name]}", flush=True)

    record("corrupted", y)
    if isinstance(e.corruption, corruptions.GaussianBlur):  # else no convolution
      point = np.zeros([1, *diffusion.image_shape], np.float32)
      h, w = diffusion.image_shape[:2]
      point[0, h // 2, w // 2] = 1
      kernel = apply(point)[0, ..., 0]
      kernel = kernel / kernel.sum()
      strength = best(
        10.0 ** np.arange(-4, 2.1, 0.5), lambda v, y=y_tuning, k=kernel: wiener(y, k, v), tuning
      )
      shown["Wiener"] = wiener(y, kernel, strength)
      record("wiener", shown["Wiener"], strength=float(strength))
    weight = best(
      (0.001, 0.003, 0.01, 0.03, 0.1),
      lambda v, y=y_tuning, a=apply, b=adjoint: total_variation(y, a, b, v),
      tuning,
    )
    shown["TV"] = total_variation(y, apply, adjoint, weight)
    record("total_variation", shown["TV"], weight=weight)
    factor = best((1.0, 1.5, 2.0, 3.0, 4.0), lambda v, y=y_tuning: bicubic(y, v), tuning)
    shown["bicubic"] = bicubic(y, factor)
    record("bicubic", shown["bicubic"], factor=factor)
    for name, explain in (("model", False), ("model, held to y", True)):
      options = restoration.DEFAULT.changed(batch_size=256)
      restorer = restoration.Restorer(diffusion, run.denoiser(), options, explain)
      result = restorer(y, t, _SAMPLES.value)
      error = np.abs(result.mean - clean).ravel()
      record(
        name,
        result.mean,
        result.samples[:, 0],
        psnr_expected=psnr(result.expected, clean),
        psnr_sample=psnr(result.samples[:, 0], clean),
        spread=float(np.sqrt(np.mean(result.uncertainty**2))),
        error=float(np.sqrt(np.mean((result.mean - clean) ** 2))),
        correlation=float(np.corrcoef(result.uncertainty.ravel(), error)[0, 1]),
      )
      if not explain:
        shown["E[x|y]"], shown["mean"] = result.expected, result.mean
        shown["3 × spread"] = 3 * result.uncertainty
        shown |= {f"sample {k + 1}": result.samples[:, k] for k in range(min(3, _SAMPLES.value))}
    shown["clean"] = clean
    results["times"].append({"t": t, "level": level, "sigma": sigma, "methods": rows})
    sheets.append((t, level, shown))
    (out / "restoration.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(out / "restoration.png", sheets, plots)
  print(f"measured in {out / 'restoration.json'}, seen in {out / 'restoration.png'}")


def figure(path, sheets, plots):
  """A block for each t; a row for each image, a column for each method."""
  import matplotlib.pyplot as plt

  names = list(sheets[0][2])
  count = min(_SHOWN // len(sheets) + 1, len(sheets[0][2]["y"]))
  fig, axes = plt.subplots(
    len(sheets), 1, figsize=(0.92 * len(names), 0.95 * count * len(sheets)), squeeze=False
  )
  for axis, (t, level, shown) in zip(axes[:, 0], sheets):
    images = np.stack([shown[name][k] for k in range(count) for name in names])
    zoom = plots.zoom_for(images)
    axis.imshow(plots.grid(images, len(names), zoom=zoom), interpolation="nearest")
    middle = (np.arange(len(names)) + 0.5) * (images.shape[2] + 1) * zoom
    axis.set_xticks(middle, names, fontsize=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.set_ylabel(f"t = {t:g}, level {level:.2g}")
    for side in axis.spines.values():
      side.set_visible(False)
  fig.tight_layout()
  fig.savefig(path, dpi=90, metadata={"Software": None})
  plt.close(fig)


if __name__ == "__main__":
  cli.run(main)
