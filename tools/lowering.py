"""Lowers an experiment's training step, sampler and held-out loss to StableHLO, by TensorFlow.

What `tpu_compile_check.py` compiles and `portable.py` hands to other devices. The step is the
project's own (`SoftDiffusionModel.update`), and so is the sampler (`samplers.sample`, from the
prior, on the averaged weights). TensorFlow's variables become parameters of the program, after its
arguments.
"""

import contextlib
import dataclasses
import re


def with_levels(experiment):
  """The experiment with stand-ins for levels that are not found yet, and whether it has any.

  A program does not depend on its levels' values, so an interpolation through as many levels as
  `find_schedule.py` gives compiles alike.
  """
  import numpy as np

  from soft_diffusion_tf import schedules

  def found(schedule):
    if isinstance(schedule, schedules.Unfound):
      line = np.geomspace if schedule.start > 0 else np.linspace
      return schedules.piecewise(line(schedule.start, schedule.stop, 32).tolist())
    if hasattr(schedule, "inner"):
      return dataclasses.replace(schedule, inner=found(schedule.inner))
    return schedule

  level = found(experiment.level)
  return experiment.replace(level=level), level != experiment.level


@contextlib.contextmanager
def _replica(replicas):
  """Inside, TensorFlow takes the code for one of so many replicas of an XLA program.

  It stands where `TPUStrategy` puts its own: number and sum of the replicas become XLA's
  replica-id and all-reduce.
  """
  import tensorflow as tf
  from tensorflow.compiler.tf2xla.ops import gen_xla_ops

  class Replica(tf.distribute.ReplicaContext):
    @property
    def num_replicas_in_sync(self):
      return replicas

    def all_reduce(self, reduce_op, value, options=None):
      assert reduce_op == tf.distribute.ReduceOp.SUM, reduce_op
      group = tf.constant([list(range(replicas))])
      return tf.nest.map_structure(
        lambda v: gen_xla_ops.xla_all_reduce(v, group, "Add", "CrossReplica"), value
      )

  if replicas == 1:
    yield
    return
  with Replica(tf.distribute.get_strategy(), gen_xla_ops.xla_replica_id()):
    yield


def program(experiment, what, batch, replicas=1, dtype="float32"):
  """What one chip runs, as a tf.function for XLA.

  Args:
    experiment: with levels (see `with_levels`).
    what: "train" or "sample".
    batch: images of this chip.
    replicas: chips that share the gradient; a sampler does not talk to others.
    dtype: "float32" or "bfloat16".

  Returns:
    The function, the specifications of its arguments (images, or the sampler's table and the
    images' seeds), and the model whose variables it uses.
  """
  import numpy as np
  import tensorflow as tf

  from soft_diffusion_tf import priors, samplers, training

  experiment = experiment.replace(network={"dtype": dtype})
  diffusion = experiment.build_diffusion()
  shape = experiment.data.image_shape
  # Any images: the prior's numbers change nothing, only its rank does.
  images = np.random.default_rng(0).random([2 * experiment.prior.rank, *shape], np.float32)
  prior = priors.fit(experiment.prior, images, diffusion)
  model = training.build(experiment, diffusion.with_prior(prior))

  if what == "train":

    def run(x_0):
      with _replica(replicas):
        return model.update(x_0)

    arguments = [tf.TensorSpec([batch, *shape], tf.float32)]
  else:
    held = training.Run(experiment, model, 0)
    denoiser, table = held.sampler().denoiser, held.plan()

    def run(plan, seeds):
      x = model.diffusion.draw_prior(seeds)
      return samplers.sample(model.diffusion, denoiser, plan, seeds, x).x

    arguments = [
      tf.TensorSpec(table.shape, tf.float32),
      tf.TensorSpec([batch], tf.int64),
    ]
  return tf.function(run, autograph=False, jit_compile=True), arguments, model


def stablehlo(function, arguments):
  """The StableHLO text of a tf.function; its variables follow the arguments as parameters."""
  text = function.experimental_get_compiler_ir(*arguments)(stage="stablehlo")
  # A no-op of TensorFlow's own dialect, which other readers of StableHLO do not know.
  return re.sub(
    r"mhlo\.copy (%[\w#:]+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", text
  )


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A program without TensorFlow.

  Attributes:
    text: StableHLO. Parameters: the arguments, then `variables`; results: what the function gives,
      then the variables in `updated`, each in the place of the parameter of that name.
    arguments: (shape, dtype) of each argument.
    results: how many results the function has itself.
    variables, updated: names, as `training.checkpoints.named_variables` has them.
  """

  text: str
  arguments: list
  results: int
  variables: list
  updated: list


def lower(function, arguments, model):
  """Lowers a tf.function over a model's variables; arguments are specifications: `Lowered`."""
  import tensorflow as tf

  from soft_diffusion_tf.training import checkpoints

  concrete = function.get_concrete_function(*arguments)
  text = stablehlo(function, arguments)
  names = {id(v.handle): name for name, v in checkpoints.named_variables(model).items()}
  unknown = [h for h in concrete.captured_inputs if id(h) not in names]
  if unknown:
    raise ValueError(
      f"the program reads {len(unknown)} tensors that are no variables of the model "
      f"({unknown[0].dtype.name} {unknown[0].shape}); make them constants"
    )
  variables = [names[id(h)] for h in concrete.captured_inputs]
  results = len(tf.nest.flatten(concrete.structured_outputs))
  pairs = re.findall(r"parameter_number = (\d+) : i64\}, output_index = array<i64: (\d+)>", text)
  place = {int(output): variables[int(parameter) - len(arguments)] for parameter, output in pairs}
  return Lowered(
    text,
    [(list(spec.shape), spec.dtype.name) for spec in arguments],
    results,
    variables,
    [place[k] for k in range(results, results + len(place))],
  )


def custom_calls(text):
  """The targets of a StableHLO text's custom calls, each once."""
  return sorted(set(re.findall(r"stablehlo\.custom_call\"? ?@(\w+)", text)))
