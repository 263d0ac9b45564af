"""Finds the corruption levels of an experiment's data by optimal transport (P 3.3).

soft-diffusion-schedule --config=digits_blur --out=digits_blur.json
soft-diffusion-schedule --compare a.json b.json --plot=levels.png

It prints the path and writes it with all that it was found from, and a picture beside it. A search
that was killed goes on with the same command: its distances are in a file beside --out, which is
removed at the end. docs/scheduling.md says how the methods differ.
"""

import pathlib
import sys

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_OUT = cli.define_path("out", None, "The .json file to write.")
_LEVELS = flags.DEFINE_integer("levels", 256, "Candidate levels.", 2, 16_384)
_NODES = flags.DEFINE_integer("nodes", 32, "Levels of the schedule.", 2, 16_384)
_CANDIDATES = flags.DEFINE_enum(
  "candidates", "transport", ["transport", "linear", "geometric"], "How candidates are spaced."
)
_METHOD = flags.DEFINE_enum(
  "method",
  "closed_form",
  ["closed_form", "sinkhorn", "divergence", "regularised", "bures", "mse"],
  "Distance between corrupted data sets; mse is P's natural baseline (Eq. 55) instead of a path.",
)
_SLICE = flags.DEFINE_float("slice", 0.1, "Share of the data to use; P uses 0.1.")
_NOISE = flags.DEFINE_enum(
  "noise",
  "none",
  ["none", "same", "independent"],
  "Noise on the images that are compared, of the config's σ at t = 1.",
)
_EPSILON = flags.DEFINE_float(
  "sinkhorn_epsilon",
  None,
  "ε of the entropic problem, in squared distance; 2 % of the squared mean step if not given.",
)
_JOINT = flags.DEFINE_bool("joint", False, "Choose σ with the level, on a grid of both.")
_SIGMA_LEVELS = flags.DEFINE_integer("sigma_levels", 24, "Candidate σ with --joint.", 2, 1024)
_NFE = flags.DEFINE_integer(
  "nfe",
  None,
  "A joint schedule whose nodes are the times of a sampler with so many steps.",
  1,
  16_383,
)
_HALVES = flags.DEFINE_bool("halves", True, "Find how far two halves of the slice disagree.")
_COMPARE = cli.define_paths("compare", [], "Schedule files to draw together, instead of a search.")
_PLOT = cli.define_path("plot", None, "The picture; beside --out if not given, or none.")
_FORCE = flags.DEFINE_bool("force", False, "Overwrite the file and the picture.")


_ENTROPIC = ("sinkhorn", "divergence", "regularised")


def _is_joint():
  return _JOINT.value or _NFE.value is not None


def _refuse_ignored():
  """A ValueError for a flag that what is asked for does not read."""
  method, joint = _METHOD.value, _is_joint()
  if _COMPARE.value:
    cli.refuse(
      (
        _OUT,
        _LEVELS,
        _NODES,
        _CANDIDATES,
        _METHOD,
        _SLICE,
        _NOISE,
        _EPSILON,
        _JOINT,
        _SIGMA_LEVELS,
        _NFE,
        _HALVES,
      ),
      "--compare searches nothing",
    )
  if method not in _ENTROPIC:
    cli.refuse([_EPSILON], f"--method={method} has no ε")
  if method == "mse":
    cli.refuse((_LEVELS, _CANDIDATES, _NOISE, _HALVES), "--method=mse searches no path")
  if _NFE.value is not None:
    cli.refuse([_NODES], "--nfe says how many levels")
  if not joint:
    cli.refuse([_SIGMA_LEVELS], "without --joint σ is not chosen")
    return
  cli.refuse([_HALVES], "a joint schedule is not sought in halves")
  if _NOISE.present and _NOISE.value == "none":
    raise ValueError("a joint schedule compares noisy images; leave --noise=none out")


class _Bars:
  """A progress bar with the time left for each stage."""

  def __init__(self):
    self._what, self._bar = None, None

  def __call__(self, what, done, total):
    import tqdm

    if what != self._what or done < self._bar.n:
      self.close()
      self._what, self._bar = what, tqdm.tqdm(desc=what, initial=done, total=total, unit="")
    self._bar.total = total
    self._bar.update(done - self._bar.n)

  def close(self):
    if self._bar is not None:
      self._bar.close()


def _times(content):
  import numpy as np

  return content.get("times") or np.linspace(0, 1, len(content["levels"])).tolist()


def _compare():
  cli.refuse([_CONFIG], "--compare searches nothing")
  from soft_diffusion_tf import plots, schedules

  files = {path: schedules.load_levels(path) for path in _COMPARE.value}
  names = {path: pathlib.Path(path).stem for path in files}
  if len(set(names.values())) < len(names):
    names = {path: path for path in files}
  plots.compare_levels(
    _PLOT.value, {names[path]: (_times(c), c["levels"]) for path, c in files.items()}
  )
  width = max(len(name) for name in names.values())
  for path, c in files.items():
    length = f"length {sum(c['steps']):8.4g}" if c.get("steps") else ""
    print(
      f"{names[path]:{width}}  {len(c['levels']):4} levels  {c.get('method', ''):12} "
      f"{c.get('data', ''):10} {length}"
    )
  print(f"in {_PLOT.value}")


def _print_path(content):
  levels, sigmas, steps = content["levels"], content.get("sigmas"), content["steps"]
  print("level     " + ("σ         " if sigmas else "") + "distance to the next")
  for k, level in enumerate(levels):
    sigma = f"  {sigmas[k]:8.4f}" if sigmas else ""
    step = f"  {steps[k]:8.4f}" if k < len(steps) else ""
    print(f"{level:8.4f}{sigma}{step}")


def _mse(e, images, first, last):
  """The natural baseline, with the lengths of its steps in transport distance."""
  import numpy as np

  from soft_diffusion_tf import __version__, schedules, transport

  ve = schedules.Geometric(e.network.cond_min, e.network.cond_max)
  levels = transport.mse_matched(e.corruption, images, first, last, e.sigma, ve, _NODES.value)
  distances = transport.closed_form_distances(e.corruption, levels, images)
  steps = np.diagonal(distances, 1)
  content = {
    "corruption": e.corruption.get_config(),
    "images": len(images),
    "method": "mse",
    "seed": e.seed,
    "version": __version__,
    "levels": levels.tolist(),
    "steps": steps.tolist(),
    "epsilon": float(steps.max()),
    "straight": float(distances[0, -1]),
  }
  return content, distances, tuple(range(len(levels)))


def _check():
  _refuse_ignored()
  if _COMPARE.value:
    if _PLOT.value is None:
      raise ValueError("--compare draws a picture; say where by --plot=FILE.png")
    files.check_file(_PLOT.value, _FORCE.value, "plot")
    return
  if _OUT.value is None:
    raise ValueError("give --out=FILE.json to write to, or --compare FILES")
  files.check_file(_OUT.value, _FORCE.value)
  if (picture := _picture()) != "none":
    files.check_file(picture, _FORCE.value, "plot")
  cli.require_config()
  if _is_joint() and _METHOD.value == "mse":
    raise ValueError("--method=mse matches levels to VE's noise and has no joint schedule")
  if not 0 < _SLICE.value <= 1:
    raise ValueError(f"--slice={_SLICE.value:g} is a share of the data, in (0, 1]")


def _picture():
  return _PLOT.value or pathlib.Path(_OUT.value).with_suffix(".png")


def main():
  import numpy as np

  from soft_diffusion_tf import plots, schedules, transport

  if _COMPARE.value:
    _compare()
    return
  out, picture, joint = pathlib.Path(_OUT.value), _picture(), _is_joint()
  e = cli.experiment_of(_CONFIG.value)
  cli.say(f"reading {e.data.name}")
  source = e.data.load()
  count = round(_SLICE.value * len(source))
  if count < 2:
    raise ValueError(f"--slice={_SLICE.value:g} of {len(source)} images leaves {count}; take more")
  picked = np.sort(np.random.default_rng(e.seed).permutation(len(source))[:count])
  images = source.floats(picked)
  first, last = schedules.ends(e.level)
  provenance = {
    "data": str(e.data.name),
    "split": e.data.train_split,
    "image_shape": list(e.data.image_shape),
    "crop": e.data.crop,
    "slice": _SLICE.value,
  }
  journal = out.with_suffix(".edges")
  if _METHOD.value == "mse":
    content, matrix, indices = _mse(e, images, first, last)
    grid, nearest = np.array(content["levels"]), ()
  else:
    bars = _Bars()
    sigmas = (*schedules.ends(e.sigma), _SIGMA_LEVELS.value) if joint else None
    if journal.exists():
      print(f"going on from the distances in {journal}", flush=True)
    path, facts, grid, distances = transport.search(
      e.corruption,
      images,
      first,
      last,
      count=_LEVELS.value,
      nodes=_NODES.value if _NFE.value is None else _NFE.value + 1,
      candidates=_CANDIDATES.value,
      method=_METHOD.value,
      noise=_NOISE.value,
      sigma=schedules.ends(e.sigma)[1],
      sigmas=sigmas,
      epsilon=_EPSILON.value,
      seed=e.seed,
      halves=_HALVES.value and count >= 4,
      journal=journal,
      progress=bars,
    )
    bars.close()
    content = {**facts, **path.to_dict()}
    matrix, indices, nearest = distances.matrix(), path.indices, path.nearest
  schedules.save_levels(out, {**provenance, **content})
  journal.unlink(missing_ok=True)
  _print_path(content)
  length = sum(content["steps"])
  print(
    f"{len(content['levels'])} levels, ε = {content['epsilon']:.4g}, length {length:.4g} "
    f"(straight line {content['straight']:.4g}, ratio {length / content['straight']:.3f}), in {out}"
  )
  if nearest:
    print(f"no ε gives the wanted number of levels; the nearest counts are {nearest}")
  if "edges" in content and content["method"] != "closed_form":
    print(
      f"{content['edges']} of {len(grid) * (len(grid) - 1) // 2} distances computed; estimates of "
      f"the others are right to {content['deviation']:.2g} of their value"
    )
  if "sensitivity" in content:
    print(f"two halves of the slice differ by at most {content['sensitivity']:.2g} steps")
  if picture != "none":
    plots.schedule_search(
      picture, grid, matrix, indices, content["levels"], _times(content), content.get("sigmas")
    )
    print(f"picture in {picture}")


def _joined(argv):
  """`--compare a b` as the one flag `--compare=a,b`."""
  if "--compare" not in argv:
    return argv
  begin = argv.index("--compare")
  end = next((k for k in range(begin + 1, len(argv)) if argv[k].startswith("-")), len(argv))
  files = argv[begin + 1 : end]
  return [*argv[:begin], "--compare=" + ",".join(files), *argv[end:]]


def run():
  sys.argv = _joined(sys.argv)
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
