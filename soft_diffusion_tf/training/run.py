"""A trained model: what every program draws by, and its workdir."""

import dataclasses
import math
import pathlib
import warnings

from soft_diffusion_tf import drawing, priors, restoration, trust
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.model import SoftDiffusionModel
from soft_diffusion_tf.training.checkpoints import Checkpoints

PRIOR_FILE = "prior.npz"
CHECKPOINTS = "checkpoints"


def ema_remark(experiment, step):
  """What to say of averages that still hold much of the random start at a step, or ""."""
  decay = experiment.training.ema_decay
  share = decay**step
  if step < 1 or share < 0.01:
    return ""
  return (
    f"training.ema_decay = {decay:g} is long for {step:,} steps: {share:.0%} of the averaged "
    "weights are still the random ones of the start"
  )


def build(experiment, diffusion):
  """A model with an optimizer, fresh: network, averaged weights and Adam's slots exist."""
  model = SoftDiffusionModel(
    experiment.build_network(),
    diffusion,
    training=experiment.training,
    options=experiment.network,
    loss=experiment.loss,
    seed=experiment.seed,
  )
  model.compile(optimizer=model.make_optimizer())
  model.optimizer.build(model.network.trainable_variables)
  return model


@dataclasses.dataclass
class Run:
  """A trained model, as a workdir holds it; `averaged`: it draws by the averaged weights.

  `images` draws samples, `restore` restores images, `denoiser` is the network as E[x_0|x_t].
  """

  experiment: Experiment
  model: SoftDiffusionModel
  step: int
  averaged: bool = True
  _made: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def diffusion(self):
    return self.model.diffusion

  @property
  def remark(self):
    """A warning about what it draws by, or ""."""
    text = ema_remark(self.experiment, self.step) if self.averaged else ""
    return text and f"{text}; --raw_weights draws without them"

  def options(self, **changes):
    """The experiment's `Sampling` with other values for what is not None (`Sampling.changed`)."""
    return self.experiment.sampling.changed(**changes)

  def denoiser(self):
    """E[x_0|x_t] by the weights that the run draws by: (x_t [B, H, W, C], t [B]) → x̂_0."""
    return self.model.denoiser(self.averaged)

  def batch_sampler(self, options=None, strategy=None):
    """A `drawing.BatchSampler`, by the experiment's sampler or other options."""
    options = options or self.experiment.sampling
    key = (options.clip, options.threshold, id(strategy))
    if key not in self._made:
      self._made[key] = drawing.BatchSampler(self.diffusion, self.denoiser(), options, strategy)
    return self._made[key].with_options(options)

  def images(self, seeds, options=None, progress=None, **changes):
    """Samples float32 [N, H, W, C] for image seeds [N]; see `drawing`.

    Args:
      options: `experiment.Sampling`; by default the experiment's.
      progress: the text of a bar.
      changes: other values in the options, such as sampler="two_step", steps=10.
    """
    options = options or self.experiment.sampling
    return self.batch_sampler(options.changed(**changes)).images(seeds, progress)

  def restore(self, y, t, count=1, seed=0, explain=False, progress=None, **changes):
    """`count` samples of the clean image of each y, float [B, H, W, C], corrupted to the time t.

    Images may be larger than the network's. For many calls keep a `restoration.Restorer`.

    Args:
      seed: sample k of image b has the image seed seed + b · count + k.
      explain: hold the predictions to y (`restoration.consistent`).
      changes: other values in `restoration.DEFAULT`, the sampler's options.

    Returns:
      `restoration.Restored`: its `mean`, `samples` and `uncertainty`.
    """
    options = restoration.DEFAULT.changed(**changes)
    restorer = restoration.Restorer(self.diffusion, self.denoiser(), options, explain)
    return restorer(y, t, count, seed, progress)

  def sampler(self, options=None):
    """The `samplers.Sampler` of `batch_sampler`."""
    return self.batch_sampler(options).sampler

  def plan(self, options=None):
    """The plan of the experiment's sampler, or of other `experiment.Sampling` options."""
    return self.batch_sampler(options).plan

  def table(self, options=None):
    """Deprecated: `plan`."""
    warnings.warn("Run.table is Run.plan now", DeprecationWarning, stacklevel=2)
    return self.plan(options)

  def drawer(self, options=None, strategy=None):
    """Deprecated: `batch_sampler`."""
    warnings.warn("Run.drawer is Run.batch_sampler now", DeprecationWarning, stacklevel=2)
    return self.batch_sampler(options, strategy)


def load(workdir, step=None, trust_code=False, averaged=True):
  """A run, ready to sample from: its newest state, or the checkpoint kept at a step.

  Args:
    trust_code: import code that its config.json names (see `trust`).
    averaged: draw by the averaged weights, else by those under training.

  Raises:
    ValueError: the workdir holds no such checkpoint, or none that can be read.
  """
  workdir = pathlib.Path(workdir)
  with trust.trust_code(trust_code):
    experiment = Experiment.load(workdir)
    prior = priors.Prior.load(workdir / PRIOR_FILE)
  _check_size(workdir, experiment)
  model = build(experiment, experiment.build_diffusion().with_prior(prior))
  if Checkpoints(workdir / CHECKPOINTS, model).restore(step) is None:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  return Run(experiment, model, int(model.optimizer.iterations.numpy()), averaged)


def _check_size(workdir, experiment):
  """Raises the ValueError of a config whose network no checkpoint of the workdir can hold.

  Before the network is made: a config of unknown origin may ask for more memory than there is.
  """
  files = [f for f in (workdir / CHECKPOINTS).rglob("ckpt-*.data*") if f.is_file()]
  if not files:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  experiment.check_network()
  weights = sum(math.prod(shape) for shape in experiment.network_shapes())
  if 4 * weights > max(f.stat().st_size for f in files):
    raise ValueError(
      f"{workdir}: its config.json describes a network of {weights:,} weights, and no checkpoint "
      "in it has so many; restore the config.json that it was trained with"
    )


def write(run, workdir):
  """Writes a model that was not trained here as a workdir, to sample from or to train on."""
  workdir = pathlib.Path(workdir)
  if (workdir / "config.json").exists():
    raise ValueError(f"{workdir} holds a run already; take another folder")
  workdir.mkdir(parents=True, exist_ok=True)
  run.diffusion.prior.save(workdir / PRIOR_FILE)
  Checkpoints(workdir / CHECKPOINTS, run.model).save(wait=True)
  run.experiment.save(workdir)
