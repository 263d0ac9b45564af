"""A training run in a workdir: the loop over `model.update` under any strategy.

A workdir holds everything: config.json, prior.npz, checkpoints/, metrics.jsonl (a line per
`log_every` steps), history.jsonl (fields that changed on the way, and from which step on),
tensorboard/, schedule.png, labels.json (the names of the labels), averages/ (of weights, of a run
with `training.averages`). Starting again with the same workdir goes on where it stopped, equal to
the bit to a run that never did.
"""

from soft_diffusion_tf import moved
from soft_diffusion_tf.training.loop import PRIOR_IMAGES, train
from soft_diffusion_tf.training.run import (
  CHECKPOINTS,
  PRIOR_FILE,
  Run,
  build,
  load,
  spell_weights,
  weights_of,
  write,
)
from soft_diffusion_tf.training.watching import BUCKETS
from soft_diffusion_tf.training.workdir import HISTORY_FILE, LABELS_FILE
from soft_diffusion_tf.training.workers import Preempted, WorkerLost

__all__ = [
  "BUCKETS",
  "CHECKPOINTS",
  "HISTORY_FILE",
  "LABELS_FILE",
  "PRIOR_FILE",
  "PRIOR_IMAGES",
  "Preempted",
  "Run",
  "WorkerLost",
  "build",
  "load",
  "spell_weights",
  "train",
  "weights_of",
  "write",
]

__getattr__ = moved.getter(__name__)
