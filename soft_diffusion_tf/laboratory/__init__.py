"""The exact laboratory: samplers, schedules, priors and corruptions graded without training.

Data is a mixture of Gaussians around real images, so E[x_0|x_t] is known (`oracles`) and so are the
moments of the data and of every q_t. What is left of a sampler's error is its own: discretisation,
the prior, or an error put into x̂_0 on purpose.
"""

from soft_diffusion_tf.laboratory.examination import Examination, Trial, examine
from soft_diffusion_tf.laboratory.grades import NFES, Grade, Laboratory, grade_prior
from soft_diffusion_tf.laboratory.precision import PRECISIONS, PrecisionStudy, Rounded, rounded
from soft_diffusion_tf.laboratory.processes import (
  COMPONENTS,
  DATA,
  SCHEDULES,
  level_schedule,
  load,
  mixture_of,
  strongest,
  two_stage,
)

__all__ = [
  "COMPONENTS",
  "DATA",
  "NFES",
  "PRECISIONS",
  "SCHEDULES",
  "Examination",
  "Grade",
  "Laboratory",
  "PrecisionStudy",
  "Rounded",
  "Trial",
  "examine",
  "grade_prior",
  "level_schedule",
  "load",
  "mixture_of",
  "rounded",
  "strongest",
  "two_stage",
]
