"""The optimizer of the training step, and the rate of its first steps."""

import keras
import tensorflow as tf

_HOOK = "_all_reduce_sum_gradients"  # where Keras sums gradients over the replicas


def check_hook():
  """Raises the RuntimeError of a Keras that sums gradients where `PreReducedAdam` does not look."""
  if not hasattr(keras.optimizers.Adam, _HOOK):
    raise RuntimeError(
      f"Keras {keras.__version__} has no optimizers.Adam.{_HOOK}, by which several replicas would "
      "sum their gradients twice: install keras<3.16 (setup.py has the range), or find where Keras "
      "sums now and override that in PreReducedAdam"
    )


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class PreReducedAdam(keras.optimizers.Adam):
  """Adam whose gradients are already summed over the replicas, by TensorFlow's fused operation.

  Keras sums gradients inside `apply`, after any clipping; a clip by global norm must come after
  the sum, so the step sums and clips itself and this optimizer must not sum again. That method is
  private to Keras: its version is pinned, and `check_hook` refuses one that has it no more.

  The fused update has Keras' formula, and takes half of the time of its ten operations a variable.
  """

  _wanted = None  # a scalar bool inside `apply_if`

  def __init__(self, *args, **options):
    check_hook()
    super().__init__(*args, **options)

  def apply_if(self, wanted, gradients, variables):
    """`apply`, which changes neither variables nor slots where the scalar `wanted` is False.

    The step is counted all the same. Gradients must be finite, wanted or not.
    """
    self._wanted = wanted
    try:
      self.apply(gradients, variables)
    finally:
      self._wanted = None

  @property
  def learning_rate(self):
    """The rate now. It can be set, as callbacks do, but not one that `WarmUp` holds as a number."""
    return self._get_current_learning_rate()

  @learning_rate.setter
  def learning_rate(self, rate):
    if not isinstance(self._learning_rate, WarmUp):
      keras.optimizers.Adam.learning_rate.fset(self, rate)
    elif isinstance(self._learning_rate.rate, keras.Variable):
      self._learning_rate.rate.assign(rate)
    else:
      raise ValueError(
        "this optimizer's rate is fixed when it is made; for a callback that sets it call "
        "model.compile() without an optimizer, or with one of a plain rate"
      )

  def _all_reduce_sum_gradients(self, grads_and_vars):
    return grads_and_vars

  def update_step(self, gradient, variable, learning_rate):
    k = self._get_variable_index(variable)
    step = tf.cast(self.iterations + 1, tf.float32)
    var = variable.value if isinstance(variable, keras.Variable) else variable
    rate, beta_1, beta_2 = tf.cast(learning_rate, tf.float32), self.beta_1, self.beta_2
    if self._wanted is not None:  # at rate 0 and with β = 1 nothing moves, to the bit
      rate = tf.where(self._wanted, rate, 0.0)
      beta_1, beta_2 = (tf.where(self._wanted, beta, 1.0) for beta in (beta_1, beta_2))
    tf.raw_ops.ResourceApplyAdam(
      var=var.handle,
      m=self._momentums[k].value.handle,
      v=self._velocities[k].value.handle,
      beta1_power=tf.constant(self.beta_1) ** step,
      beta2_power=tf.constant(self.beta_2) ** step,
      lr=rate,
      beta1=beta_1,
      beta2=beta_2,
      epsilon=self.epsilon,
      grad=tf.cast(gradient, tf.float32),
    )


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
  """rate · min(step / steps, 1): the first update has rate 0, as in Song et al. 2021.

  A rate that is a Keras variable can be changed on the way.
  """

  def __init__(self, rate, steps):
    self.rate, self.steps = rate, steps

  def __call__(self, step):
    share = tf.cast(step, tf.float32) / max(self.steps, 1)
    return self.rate * (tf.minimum(share, 1.0) if self.steps else 1.0)

  def get_config(self):
    return {"rate": float(self.rate), "steps": self.steps}
