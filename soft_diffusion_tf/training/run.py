"""A trained model: what every program draws by, and its workdir."""

import dataclasses
import math
import pathlib
import warnings

from soft_diffusion_tf import averages, drawing, priors, restoration, trust
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.model import SoftDiffusionModel
from soft_diffusion_tf.training import snapshots
from soft_diffusion_tf.training.checkpoints import Checkpoints

PRIOR_FILE = "prior.npz"
CHECKPOINTS = "checkpoints"
_FAR = 0.05  # error of an average that is worth a warning


def ema_remark(experiment, step):
  """What to say of averages that still hold much of the random start at a step, or ""."""
  decay = experiment.training.ema_decay
  share = decay**step
  if step < 1 or share < 0.01 or experiment.training.ema_warmup:
    return ""
  return (
    f"training.ema_decay = {decay:g} is long for {step:,} steps: {share:.0%} of the averaged "
    "weights are still the random ones of the start"
  )


def weights_of(experiment, averaged=True, length=None):
  """What records say of weights: `Run.weights` of a run that was loaded with these arguments."""
  if length is not None:
    return {"ema_decay": None, "ema_length": length}
  return {"ema_decay": experiment.training.ema_decay if averaged else 0.0}  # 0: without memory


def spell_weights(record):
  """Which weights a record's numbers are of (`Run.weights`), in words."""
  if record.get("ema_length"):
    return f"average of length {record['ema_length']:g}"
  return f"EMA {record['ema_decay']:g}" if "ema_decay" in record else "EMA"  # of an old record


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
  """A trained model, as a workdir holds it.

  It draws by the averaged weights, or by those under training if `averaged` is False. If `length`
  is given, the averaged weights are those of that length, met up to `error` (see `averages`).

  `images` draws samples, `restore` restores images, `denoiser` is the network as E[x_0|x_t].
  """

  experiment: Experiment
  model: SoftDiffusionModel
  step: int
  averaged: bool = True
  length: float | None = None
  error: float = 0.0
  _made: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def diffusion(self):
    return self.model.diffusion

  @property
  def remark(self):
    """A warning about what it draws by, or ""."""
    if self.length is not None:
      return (
        f"from what was kept an average of length {self.length:g} can be made up to "
        f"{self.error:.0%} only; take a length nearer to training.averages, or keep them more often"
        if self.error > _FAR
        else ""
      )
    text = ema_remark(self.experiment, self.step) if self.averaged else ""
    return text and f"{text}; --raw_weights draws without them"

  @property
  def weights(self):
    """Which weights it draws by, for records: "ema_decay", and "ema_length" if one was chosen."""
    return weights_of(self.experiment, self.averaged, self.length)

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


def load(workdir, step=None, trust_code=False, averaged=True, length=None):
  """A run, ready to sample from: its newest state, or the checkpoint kept at a step.

  Args:
    trust_code: import code that its config.json names (see `trust`).
    averaged: draw by the averaged weights, else by those under training.
    length: of the average to draw by, of a run with `training.averages` (see `averages`).

  Raises:
    ValueError: the workdir holds no such checkpoint, or none that can be read, or an average of
      this length cannot be made.
  """
  workdir = pathlib.Path(workdir)
  if length is not None:
    averages.check_length(length)
    if not averaged:
      raise ValueError(f"an average of length {length:g} is no raw weights; give one of the two")
  with trust.trust_code(trust_code):
    experiment = Experiment.load(workdir)
    prior = priors.Prior.load(workdir / PRIOR_FILE)
  _check_size(workdir, experiment)
  model = build(experiment, experiment.build_diffusion().with_prior(prior))
  if Checkpoints(workdir / CHECKPOINTS, model).restore(step) is None:
    raise ValueError(f"{workdir}: no readable checkpoint in it; train first")
  step = int(model.optimizer.iterations.numpy())
  error = 0.0 if length is None else snapshots.restore(workdir, model, step, length)
  return Run(experiment, model, step, averaged, length, error)


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
