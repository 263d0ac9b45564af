"""The paper's figures from trained runs.

  python tools/figures.py --workdir=runs/digits --out=figures
  python tools/figures.py --workdir=runs/a,runs/b --figures=2,8,9 --out=figures

  1   forward and reverse process                8   schedules of every run
  2   samples of every run                       9   samples by the size of the noise, every run
  3   distance against NFE, every run, as        11  samples of every run by one sampler at one
      P Figure 10 (needs a sweep)                    number of evaluations: --sampler and --nfe
  6   Naive against Momentum, the same seeds     12  nearest training images
  7   E[x_0|x_t] at several times

Figures 1, 6, 7 and 12 are of the first run. A figure is a function of the run and the flags alone.
"""

import pathlib

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

FIGURES = ("1", "2", "3", "6", "7", "8", "9", "11", "12")

_WORKDIR = cli.define_paths("workdir", None, "Folders of training runs.", required=True)
_OUT = cli.define_path("out", None, "Folder for figure_2.png, …", required=True)
_FIGURES = flags.DEFINE_list(
  "figures", None, f"Which ones: {', '.join(FIGURES)}; by default all that the runs can give."
)
_COUNT = flags.DEFINE_integer("count", 64, "Samples in a grid.", 1, cli.MOST_SHOWN)
_NEIGHBOURS = flags.DEFINE_integer(
  "neighbours", 256, "Samples whose neighbours Figure 12 shows.", 1, cli.MOST_SHOWN
)
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps instead of the configs'.")
_SAMPLER = flags.DEFINE_string("sampler", "probability_flow", "Of Figure 11.")
_NFE = flags.DEFINE_integer("nfe", 200, "Evaluations of the network of Figure 11.", 1)
_FEATURE_NET = flags.DEFINE_string(
  "feature_net", None, "Feature network of Figure 12, instead of the config's."
)
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")
cli.define_trust_code()
_FORCE = flags.DEFINE_bool("force", False, "Overwrite figures that are there.")


class _Runs:
  """The runs of the flags, loaded once, and what figures share of them."""

  def __init__(self, workdirs):
    from soft_diffusion_tf import training

    self.workdirs = [pathlib.Path(w) for w in workdirs]
    names = [w.name for w in self.workdirs]
    for name in names:  # by which figures tell the runs apart
      if names.count(name) > 1:
        raise ValueError(
          f"--workdir: {names.count(name)} of the folders are called {name!r}; rename one of them"
        )
    self.all = {w.name: training.load(w) for w in self.workdirs}
    self.first = next(iter(self.all.values()))
    self._samples = {}

  def samples(self, name, sampler=None, nfe=None):
    """Samples of seeds 0, 1, … of a run, [N, H, W, C]."""
    import numpy as np

    steps = _STEPS.value if nfe is None else None
    options = self.all[name].options(sampler=sampler, steps=steps, nfe=nfe)
    key = name, options
    if key not in self._samples:
      seeds = np.arange(_COUNT.value)
      self._samples[key] = self.all[name].images(seeds, options, f"{name}, {options.sampler}")
    return self._samples[key], options

  def source(self, split):
    from soft_diffusion_tf import data

    d = self.first.experiment.data
    data.check_consent(d.name, None if _DATA_DIR.value else d.data_dir)
    return d.load(split, _DATA_DIR.value)


def figure_1(runs, path):
  import numpy as np

  from soft_diffusion_tf import plots, rng

  run, shown = runs.first, 2
  times, states, _ = run.sampler().trajectory(run.plan(), np.arange(shown), 9)
  real = runs.source(run.experiment.data.train_split)
  x_0 = real.floats(np.random.default_rng(0).permutation(len(real))[:shown])
  eta = rng.normal_per_image(rng.image_seeds(np.arange(shown)), 0, run.diffusion.image_shape)
  forward = [run.diffusion.forward(x_0, np.float32(t), eta).numpy() for t in times[::-1]]
  rows = [("forward →", np.stack([x[k] for x in forward])) for k in range(shown)]
  rows += [("← reverse", states[::-1, k]) for k in range(shown)]
  plots.strips(path, [f"t = {t:.2f}" for t in times[::-1]], rows)


def figure_2(runs, path):
  from soft_diffusion_tf import plots

  pairs = []
  for name in runs.all:
    images, options = runs.samples(name)
    pairs.append((f"{name}: {options.sampler}, {options.evaluations} NFE", images))
  plots.side_by_side(path, pairs, 8)


def figure_3(runs, path):
  from soft_diffusion_tf.evaluation import sweeps

  sweeps.plot(path, *(sweeps.last_sweep(w) for w in runs.workdirs), names=list(runs.all))


def figure_6(runs, path):
  from soft_diffusion_tf import plots

  name, pairs = runs.workdirs[0].name, []
  for sampler, title in (("naive", "Naive Sampler"), ("momentum", "Momentum Sampler")):
    images, options = runs.samples(name, sampler)
    pairs.append((f"{title}, {options.evaluations} NFE", images))
  plots.side_by_side(path, pairs, 8)


def figure_7(runs, path):
  import numpy as np
  import tensorflow as tf

  from soft_diffusion_tf import plots, rng

  run, times, shown = runs.first, np.linspace(0.1, 1.0, 10, dtype=np.float32), 3
  real = runs.source(run.experiment.data.train_split)
  picked = np.random.default_rng(0).permutation(len(real))[:shown]
  x_0 = tf.constant(real.floats(picked))
  seeds = rng.image_seeds(np.arange(shown))
  denoise = tf.function(run.denoiser(), autograph=False)
  states, predictions = [], []
  for k, time in enumerate(times):
    t = tf.fill([shown], tf.constant(time))
    eta = rng.normal_per_image(seeds, tf.constant(k, tf.int64), run.diffusion.image_shape)
    x_t = run.diffusion.forward(x_0, t, eta)
    states.append(x_t.numpy())
    predictions.append(denoise(x_t, t).numpy())
  rows = []
  for k in range(shown):
    rows.append(("x_t", np.stack([x_0[k].numpy(), *(s[k] for s in states)])))
    rows.append(("E[x_0|x_t]", np.stack([x_0[k].numpy(), *(p[k] for p in predictions)])))
  plots.strips(path, ["x_0", *(f"t = {time:.1f}" for time in times)], rows)


def figure_8(runs, path):
  from soft_diffusion_tf import plots

  kinds = sorted({type(run.experiment.corruption).__name__ for run in runs.all.values()})
  level = "blur std (pixels)" if kinds == ["GaussianBlur"] else f"level of {', '.join(kinds)}"
  plots.schedule(path, {name: run.diffusion for name, run in runs.all.items()}, level)


def figure_9(runs, path):
  from soft_diffusion_tf import plots

  pairs = []
  for name, run in runs.all.items():
    sigma = float(run.diffusion.sigma(1.0))
    pairs.append((sigma, f"σ_max = {sigma:.3g} ({name})", runs.samples(name)[0]))
  plots.side_by_side(path, [pair[1:] for pair in sorted(pairs, key=lambda p: -p[0])], 8)


def figure_11(runs, path):
  from soft_diffusion_tf import plots

  pairs = []
  for name in runs.all:
    images, options = runs.samples(name, _SAMPLER.value, _NFE.value)
    pairs.append((f"{name}: {options.sampler}, {options.evaluations} NFE", images))
  plots.side_by_side(path, pairs, 8)


def figure_12(runs, path):
  import numpy as np

  from soft_diffusion_tf import plots
  from soft_diffusion_tf.evaluation import features, memorisation

  e = runs.first.experiment
  train = runs.source(e.data.train_split)
  held_out = None
  if e.data.test_split != e.data.train_split:
    held_out = runs.source(e.data.test_split).images
  if not _FEATURE_NET.value:
    features.check_consent(e.evaluation.feature_net)
  network = features.feature_network(_FEATURE_NET.value or e.evaluation.feature_net, train)
  options = runs.first.options(steps=_STEPS.value)
  images = runs.first.images(np.arange(_NEIGHBOURS.value), options, "figure 12")
  generated = plots.to_uint8(images)
  found = memorisation.report(network, generated, train.images, held_out, "nearest images")
  memorisation.figure(path, generated, train.images, found)


def main():
  wanted = _FIGURES.value or list(FIGURES)
  for name in wanted:
    if name not in FIGURES:
      raise ValueError(f"--figures={name}: there are {', '.join(FIGURES)}")
  from soft_diffusion_tf.evaluation import sweeps

  swept = all((pathlib.Path(w) / sweeps.BEST_FILE).exists() for w in _WORKDIR.value)
  if not _FIGURES.value and not swept:
    wanted.remove("3")
    print("figure 3 is left out: it needs evaluate --sweep first")
  out = pathlib.Path(_OUT.value)
  paths = {name: out / f"figure_{name}.png" for name in wanted}
  for path in paths.values():
    files.check_file(path, _FORCE.value)
  runs = _Runs(_WORKDIR.value)
  for name, path in paths.items():
    globals()[f"figure_{name}"](runs, path)
    print(path, flush=True)


if __name__ == "__main__":
  cli.run(main)
