"""How near images are to real ones: Fréchet distance, KID, Inception score, precision and recall.

Images stream through a feature network in batches and leave `Statistics` behind: moments in
float64, the features of the first few thousand images, sums for the Inception score. Neither images
nor all features are ever in memory or on disk. Two sides' statistics make a `Result`, which carries
the conditions that its numbers hold under.

Fréchet distance, KID and Inception score are TF-GAN's, which `distances` alone imports. A number
from any feature network but TF-GAN's Inception is called FD[name], never FID: only numbers from one
network at one N compare.
"""

from soft_diffusion_tf import moved
from soft_diffusion_tf.evaluation.distances import (
  Distance,
  Result,
  by_metrics,
  check_tfgan,
  compare,
  frechet,
  kernel_distance,
  kernel_distance_of_all_pairs,
  with_reference,
)
from soft_diffusion_tf.evaluation.references import Reference, check_count, conditions_of, reference
from soft_diffusion_tf.evaluation.runs import evaluate_run, run_conditions, to_tensorboard
from soft_diffusion_tf.evaluation.statistics import (
  Statistics,
  image_batches,
  measure,
  sample_batches,
)

__all__ = [
  "Distance",
  "Reference",
  "Result",
  "Statistics",
  "by_metrics",
  "check_count",
  "check_tfgan",
  "compare",
  "conditions_of",
  "evaluate_run",
  "frechet",
  "image_batches",
  "kernel_distance",
  "kernel_distance_of_all_pairs",
  "measure",
  "reference",
  "run_conditions",
  "sample_batches",
  "to_tensorboard",
  "with_reference",
]

__getattr__ = moved.getter(__name__)
