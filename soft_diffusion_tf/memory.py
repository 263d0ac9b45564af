"""What a run takes of memory, at the least, and what there is: asked before anything is made."""

import os
import pathlib

from soft_diffusion_tf import parts

_BATCHES = 5  # of the pipeline: four are made ahead
_STATES = 4  # network, averages and Adam's two slots; a checkpoint copies all of them
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def available():
  """Bytes that this process may use: the machine's memory, or a container's share of it."""
  total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for file in map(pathlib.Path, _LIMITS):
    try:
      total = min(total, int(file.read_text()))
    except (OSError, ValueError):  # no such file, or no limit ("max")
      continue
  return total


def check_network(architecture, image_shape, limit=None):
  """Raises the ValueError of a network whose weights alone do not fit, before they are made."""
  limit = available() if limit is None else limit
  needed = architecture.footprint(image_shape)[0]
  if needed > limit:
    raise ValueError(
      f"{parts.spell(architecture)} for images of {tuple(image_shape)} {_too_much(needed, limit)}; "
      "take a smaller network"
    )


def check(experiment, hosts=1, replicas=1, apart=False, limit=None):
  """Raises a ValueError for sizes that cannot fit, which names the field and what would fit.

  The estimate is a bound from below (`Architecture.footprint`), so what it refuses would fail. What
  a GPU or TPU has is not asked: with one, only what stays on the host is counted.

  Args:
    hosts: processes that share the batch; each of them makes all of it.
    replicas: of this process.
    apart: the replicas have memory of their own.
    limit: bytes; by default `available()`.
  """
  limit = available() if limit is None else limit
  o, n = experiment.training, experiment.network
  if len(experiment.data.image_shape) != 3:
    return  # refused by others
  height, width, channels = experiment.data.image_shape
  image = 4 * height * width * channels
  weights, features, drawing = n.footprint(experiment.data.image_shape)
  kept = _STATES + len(o.averages)
  states = weights * (kept if apart else 2 * kept + 1)
  if states > limit:
    field, value = ("network.nf", n.nf) if hasattr(n, "nf") else ("network", parts.kind_of(n))
    _refuse(field, value, states, limit, "take a smaller network")
  shares = o.accumulate * hosts
  step = 0 if apart else features // shares
  each = _BATCHES * image + step
  _check_batch("training.batch_size", o.batch_size, each, states, limit)
  drawn = replicas * (3 * image + (0 if apart else drawing))
  _check_batch("sampling.batch_size", experiment.sampling.batch_size, drawn, states, limit)


def _check_batch(field, size, each, states, limit):
  if states + size * each > limit:
    fitting = max(1, (limit - states) // each)
    _refuse(
      field,
      size,
      states + size * each,
      limit,
      f"take at most {fitting:,}, or fewer, for this counts the least",
    )


def _refuse(field, value, needed, limit, remedy):
  raise ValueError(f"{field} = {value} {_too_much(needed, limit)}; {remedy}")


def _too_much(needed, limit):
  return (
    f"takes at least {needed / 2**30:,.1f} GiB of memory, and there are "
    f"{limit / 2**30:,.1f} GiB here"
  )
