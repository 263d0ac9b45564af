"""Every sampler is one update, and a sampler's rule chooses its coefficients.

With s < t the next time, x̂_0 the denoiser's prediction, and r = x_t − C_t x̂_0 (an estimate of
σ_t η),

    x_s = C_s x̂_0 + a r + b η.

A rule sees all steps of a run and gives a, b and γ for each; a plan holds a row (t, s, a, b, γ,
kind) for every evaluation of the denoiser; `sample` runs the plan. γ replaces x̂_0 by the
extrapolation x̂_0 + γ (x̂_0 − x̂_0 of the evaluation before). The kind is 0, or

- 1, a corrector: the row takes the step of the row before once more, from where that step started,
  with an x̂_0 predicted where it ended;
- −1, a step whose coefficients are operators, in the basis of all C (`Corruption.spectrum`):
  the noise that is kept goes through G = C_t C_s⁻¹ as the image does on its way from s to t, and
  what G takes from it is drawn afresh: A = a G, B² = b² I + a² σ_t² (I − G²).

A new sampler is a class of a few lines:

    @dataclasses.dataclass(frozen=True)
    class Halfway(samplers.Rule):
      share: float = 0.5

      def coefficients(self, step):
        a = self.share * step.sigma_s / step.sigma_t
        return samplers.Update(a, np.sqrt(step.sigma_s**2 - (a * step.sigma_t) ** 2))

`plan(Halfway(0.3), …)` takes it, and a config by name: `sampling.sampler =
"my_module:Halfway(share=0.3)"`.
"""

from soft_diffusion_tf.samplers.loop import (
  Sampler,
  State,
  bounded,
  check_smooth,
  clipped,
  sample,
  thresholded,
  velocity,
)
from soft_diffusion_tf.samplers.plans import (
  GRIDS,
  evaluations,
  path_length,
  plan,
  steps_for,
  table,
  time_grid,
)
from soft_diffusion_tf.samplers.rules import (
  COLUMNS,
  CORRECTOR,
  DDIM,
  FILTERED,
  SAMPLERS,
  Ancestral,
  DormandPrince,
  Heun,
  Langevin,
  Momentum,
  Naive,
  PredictorCorrector,
  ProbabilityFlow,
  Rule,
  Step,
  StochasticTwoStep,
  Turns,
  TwoStep,
  Update,
  fields_of,
  rule_of,
  with_fields,
)

__all__ = [
  "COLUMNS",
  "CORRECTOR",
  "DDIM",
  "FILTERED",
  "GRIDS",
  "SAMPLERS",
  "Ancestral",
  "DormandPrince",
  "Heun",
  "Langevin",
  "Momentum",
  "Naive",
  "PredictorCorrector",
  "ProbabilityFlow",
  "Rule",
  "Sampler",
  "State",
  "Step",
  "StochasticTwoStep",
  "Turns",
  "TwoStep",
  "Update",
  "bounded",
  "check_smooth",
  "clipped",
  "evaluations",
  "fields_of",
  "path_length",
  "plan",
  "rule_of",
  "sample",
  "steps_for",
  "table",
  "thresholded",
  "time_grid",
  "velocity",
  "with_fields",
]
