"""What a run takes of memory, at the least, and what there is: asked before anything is made."""

import os
import pathlib

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


def of_weights(nf, ch_mult, num_res_blocks, channels):
  """Bytes of a network's weights, at the least: one convolution a residual block, and two ends."""
  blocks = 2 * num_res_blocks + 1
  return 4 * 9 * (blocks * sum((nf * mult) ** 2 for mult in ch_mult) + 2 * nf * channels)


def check_network(nf, ch_mult, num_res_blocks, channels, limit=None):
  """Raises the ValueError of a network whose weights alone do not fit, before they are made."""
  limit = available() if limit is None else limit
  needed = of_weights(nf, ch_mult, num_res_blocks, channels)
  if needed > limit:
    widest = f"nf = {nf}, ch_mult = {ch_mult}, {num_res_blocks} blocks and {channels} channels"
    raise ValueError(f"a network of {widest} {_too_much(needed, limit)}; take a smaller one")


def check(experiment, hosts=1, replicas=1, apart=False, limit=None):
  """Raises a ValueError for sizes that cannot fit, which names the field and what would fit.

  The estimate is a bound from below, so what it refuses would fail: of activations it counts two
  tensors for a residual block, of weights one convolution. What a GPU or TPU has is not asked: with
  one, only what stays on the host is counted.

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
  blocks = 2 * n.num_res_blocks + 1
  wide = [(n.nf * mult, height >> level, width >> level) for level, mult in enumerate(n.ch_mult)]
  weights = of_weights(n.nf, n.ch_mult, n.num_res_blocks, channels)
  features = (2 if n.dtype == "bfloat16" else 4) * blocks * sum(c * h * w for c, h, w in wide)
  states = weights * (_STATES if apart else 2 * _STATES + 1)
  if states > limit:
    _refuse("network.nf", n.nf, states, limit, "take a smaller network")
  parts = o.accumulate * hosts
  step = 0 if apart else features * (1 if n.remat else 2) // parts
  each = _BATCHES * image + step
  _check_batch("training.batch_size", o.batch_size, each, states, limit)
  drawn = replicas * (3 * image + (0 if apart else features // blocks))
  _check_batch("sampling.batch_size", experiment.sampling.batch_size, drawn, states, limit)


def _check_batch(field, size, each, states, limit):
  if states + size * each > limit:
    fitting = max(1, (limit - states) // each)
    _refuse(field, size, states + size * each, limit,
            f"take at most {fitting:,}, or fewer, for this counts the least")  # fmt: skip


def _refuse(field, value, needed, limit, remedy):
  raise ValueError(f"{field} = {value} {_too_much(needed, limit)}; {remedy}")


def _too_much(needed, limit):
  return (
    f"takes at least {needed / 2**30:,.1f} GiB of memory, and there are "
    f"{limit / 2**30:,.1f} GiB here"
  )
