"""Choosing corruption levels by optimal transport (P 3.3, App. C).

Candidate levels are nodes of a graph; an edge joins two corrupted data sets whose Wasserstein
distance is at most ε; the schedule is the shortest path from clean to most corrupted, with ε tuned
so that the path has the wanted number of nodes.

The distance is W₂, the square root of the transport cost: with the cost itself as the edge weight
the square of a sum exceeds the sum of squares, and the path takes every candidate at any ε.

`Distances` is the seam between what a distance is and the search for the path. Its answers:

| method      | weight of an edge                                                               |
|-------------|---------------------------------------------------------------------------------|
| closed_form | W₂ = √E‖(C_i − C_j) x_0‖², where C_i x → C_j x is the optimal map (checked)       |
| sinkhorn    | √<P, C> of the entropic coupling P: W₂ for any operators                         |
| divergence  | the root of the debiased Sinkhorn divergence                                     |
| regularised | <P, C> + ε KL(P ‖ a bᵀ), no root: P as printed                                   |
| bures       | W₂ of the Gaussians with the clouds' means and covariances: a lower bound of W₂  |

docs/scheduling.md derives the closed form and compares the methods.

`sinkhorn` solves entropic transport problems; `operators` has the closed form and the candidates,
`distances` the answers above, `path` the search for a path, `levels` what leads from images to
levels.
"""

from soft_diffusion_tf.transport.distances import (
  NOISES,
  Bures,
  Clouds,
  Distances,
  Journal,
  Known,
  Sinkhorn,
)
from soft_diffusion_tf.transport.levels import (
  METHODS,
  Found,
  find,
  measure,
  mse_matched,
  search,
  shift,
)
from soft_diffusion_tf.transport.operators import (
  CANDIDATES,
  NotClosedForm,
  candidate_levels,
  check_closed_form,
  closed_form_distances,
)
from soft_diffusion_tf.transport.path import Path, find_path, shortest_path

__all__ = [
  "CANDIDATES",
  "METHODS",
  "NOISES",
  "Bures",
  "Clouds",
  "Distances",
  "Found",
  "Journal",
  "Known",
  "NotClosedForm",
  "Path",
  "Sinkhorn",
  "candidate_levels",
  "check_closed_form",
  "closed_form_distances",
  "find",
  "find_path",
  "measure",
  "mse_matched",
  "search",
  "shift",
  "shortest_path",
]
