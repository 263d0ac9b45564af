"""Averages of weights that a run keeps, from which one of any length is made (see `averages`).

A workdir's averages/STEP.npz has, for each of `training.averages`, the arrays "K/PLACE": those of
the network's weights that are trained, in their order.
"""

import pathlib
import re

import numpy as np

from soft_diffusion_tf import arrays, averages, files

FOLDER = "averages"
_FILE = re.compile(r"([0-9]{9,18})\.npz")


def steps_in(workdir):
  """The steps whose averages a workdir keeps, rising."""
  found = (_FILE.fullmatch(f.name) for f in (pathlib.Path(workdir) / FOLDER).glob("*.npz"))
  return sorted(int(match[1]) for match in found if match)


def _path(workdir, step):
  return pathlib.Path(workdir) / FOLDER / f"{step:09d}.npz"


def save(workdir, model, step):
  """Keeps the model's averages of this step."""
  content = {
    f"{k}/{place:05d}": average.numpy()
    for k, (_, pairs) in enumerate(model.profiles)
    for place, (average, _) in enumerate(pairs)
  }
  with files.atomic(_path(workdir, step)) as partial:
    np.savez(partial, **content)


def drop_after(workdir, step):
  """Removes averages of later steps than the one that a run goes on from."""
  for later in steps_in(workdir):
    if later > step:
      _path(workdir, later).unlink()


def restore(workdir, model, step, length):
  """Gives the model's averaged weights those of an average of this length at its step.

  Returns:
    The error of the average (see `averages.combination`).

  Raises:
    ValueError: the run keeps no averages, or a file of them is damaged.
  """
  exponents = [exponent for exponent, _ in model.profiles]
  if not exponents:
    raise ValueError(
      f"{workdir} was trained without training.averages, so no average of length {length:g} can be "
      "made; train with --config.training.averages=(0.05,0.1)"
    )
  steps = [s for s in steps_in(workdir) if s < step]
  wanted = averages.exponent(length)
  # Those of the step itself are in the checkpoint, and in the model.
  factors, error = averages.combination(
    np.repeat([*steps, step], len(exponents)), exponents * (len(steps) + 1), step, wanted
  )
  factors = factors.reshape(-1, len(exponents))
  variables = [[average for average, _ in pairs] for _, pairs in model.profiles]
  total = [
    sum(f * np.asarray(v.numpy(), np.float64) for f, v in zip(factors[-1], each))
    for each in zip(*variables)
  ]
  for each, kept in zip(factors, steps):
    path, remedy = _path(workdir, kept), "remove the file: the others may do without it"
    with arrays.opened(path, "no averages of this run", remedy) as content:
      for k, factor in enumerate(each):
        for place, sums in enumerate(total):
          sums += factor * content.array(f"{k}/{place:05d}", sums.shape)
  for (average, _), value in zip(model._averaged, total, strict=True):
    average.assign(value.astype(np.float32))
  return error
