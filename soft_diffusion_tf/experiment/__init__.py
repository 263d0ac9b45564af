"""An experiment: everything a run is made of, typed and frozen, and its passage through configs.

A config file's `get_config` returns `Experiment(...).to_config()`; flags override its fields;
`from_config` makes the experiment again and checks it; `save` and `load` carry it in a workdir.
The defaults are the paper's, but for the prior and the sampler, where better ones are measured
(docs/reproduction.md); the configs that are named after its experiments say what it took.
"""

from soft_diffusion_tf.experiment.config import (
  CONFIG_FILE,
  INCIDENTAL,
  LATER,
  Experiment,
  digest_of,
  from_file,
  level_from_file,
)
from soft_diffusion_tf.experiment.groups import Data, Evaluation, Group, Sampling, Training
from soft_diffusion_tf.experiment.versions import PriorOptions, loss_of, options_from_config
from soft_diffusion_tf.networks import Network
from soft_diffusion_tf.parts import UnknownField

__all__ = [
  "CONFIG_FILE",
  "INCIDENTAL",
  "LATER",
  "Data",
  "Evaluation",
  "Experiment",
  "Group",
  "Network",
  "PriorOptions",
  "Sampling",
  "Training",
  "UnknownField",
  "digest_of",
  "from_file",
  "level_from_file",
  "loss_of",
  "options_from_config",
]
