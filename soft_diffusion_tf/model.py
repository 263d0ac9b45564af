"""The Keras model: a network that predicts the residual, and the training step of P Eq. 12."""

import dataclasses
import math

import keras
import tensorflow as tf

from soft_diffusion_tf import diffusion as diffusions
from soft_diffusion_tf import experiment, losses, rng

_TIME, _NOISE, _DROPOUT = 0, 1, 2  # sub-streams of a step's randomness


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class PreReducedAdam(keras.optimizers.Adam):
  """Adam whose gradients are already summed over the replicas, by TensorFlow's fused operation.

  Keras sums gradients inside `apply`, after any clipping; a clip by global norm must come after
  the sum, so the step sums and clips itself and this optimizer must not sum again. That method is
  private to Keras: its version is pinned and a test holds the behaviour.

  The fused update has Keras' formula, and takes half of the time of its ten operations a variable.
  """

  def _all_reduce_sum_gradients(self, grads_and_vars):
    return grads_and_vars

  def update_step(self, gradient, variable, learning_rate):
    k = self._get_variable_index(variable)
    step = tf.cast(self.iterations + 1, tf.float32)
    var = variable.value if isinstance(variable, keras.Variable) else variable
    tf.raw_ops.ResourceApplyAdam(
      var=var.handle,
      m=self._momentums[k].value.handle,
      v=self._velocities[k].value.handle,
      beta1_power=tf.constant(self.beta_1) ** step,
      beta2_power=tf.constant(self.beta_2) ** step,
      lr=tf.cast(learning_rate, tf.float32),
      beta1=self.beta_1,
      beta2=self.beta_2,
      epsilon=self.epsilon,
      grad=tf.cast(gradient, tf.float32),
    )


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
  """rate · min(step / steps, 1): the first update has rate 0, as in Song et al. 2021."""

  def __init__(self, rate, steps):
    self.rate, self.steps = rate, steps

  def __call__(self, step):
    share = tf.cast(step, tf.float32) / max(self.steps, 1)
    return self.rate * (tf.minimum(share, 1.0) if self.steps else 1.0)

  def get_config(self):
    return {"rate": self.rate, "steps": self.steps}


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class SoftDiffusionModel(keras.Model):
  """Soft Score Matching around a network φ: x̂_0 = φ(x_t, cond(t)) + x_t (P Eq. 10).

  `update` is one training step, for any strategy; `train_step` gives it to `fit`, on one device.
  The averaged weights live in a second network, so exactly what is sampled from can be saved and
  called. `save` and `keras.models.load_model` carry all of it, the optimizer's state included.

  Args:
    network: (x_t [B, H, W, C], cond [B]) → [B, H, W, C].
    diffusion: the forward process.
    training: `experiment.Training`: options of the loss and of the update.
    options: `experiment.Network`: what the network gives and is told. `prediction`:
      "residual" (P Eq. 10);
      "score" of a VE network (C = I): x̂_0 = x_t + σ_t² s;
      "noise" of a VP or sub-VP network (C = α I) made for images in [−1, 1]: it sees 2 x_t − α_t,
      and x̂_0 = (x_t − σ_t ε) / α_t, with σ half of the published one as [0, 1] is half as wide.
      `conditioning`: "log_linear" in t from `cond_min` to `cond_max`, which for a VE network is σ;
      "vp_label", 999 t; "ve_label", round((1 − t)(num_scales − 1)).
    seed: of t, noise and dropout; everything drawn in step k is a function of (seed, k, position
      in the global batch).
  """

  # Keras would trace a call with one argument when this model is inside a SavedModel.
  _default_save_signature = None

  def __init__(self, network, diffusion, *, training, options, seed=0):
    # No autocast: under mixed_bfloat16 Keras would round x_t and t before `call` sees them, and
    # with them the noise, σ_t and the conditioning. The network casts what it may.
    super().__init__(name="soft_diffusion", autocast=False)
    self.network = network
    self.ema_network = type(network).from_config(network.get_config())
    self.ema_network.set_weights(network.get_weights())
    self._averaged = [
      (average, value)
      for average, value in zip(self.ema_network.variables, network.variables)
      if value.trainable  # frozen ones stay as they are, to the bit
    ]
    self.ema_network.trainable = False
    self.diffusion = diffusion
    self.training_options = training
    self.network_options = options
    self.seed = seed
    self.built = True

  def build(self, input_shape=None):
    self.built = True

  def get_config(self):
    """Everything that the constructor takes, ready for JSON."""
    return {
      "network": keras.saving.serialize_keras_object(self.network),
      "diffusion": self.diffusion.get_config(),
      "training": dataclasses.asdict(self.training_options),
      "options": dataclasses.asdict(self.network_options),
      "seed": self.seed,
    }

  @classmethod
  def from_config(cls, config, custom_objects=None, trust_code=False):
    """The model that `get_config` described, its weights fresh.

    Args:
      custom_objects: classes of the network by name, as of `keras.models.load_model`.
      trust_code: import code that the config names. `keras.models.load_model` cannot hand it on:
        call it within `trust.trust_code()`.
    """
    lost = {"network", "diffusion", "training", "options", "seed"} - config.keys()
    if lost:
      raise ValueError(f"the config of this model lacks {min(lost)}; save the model again")
    return cls(
      keras.saving.deserialize_keras_object(config["network"], custom_objects=custom_objects),
      diffusions.Diffusion.from_config(config["diffusion"], trust_code),
      training=experiment.options_from_config(experiment.Training, config["training"]),
      options=experiment.options_from_config(experiment.Network, config["options"]),
      seed=config["seed"],
    )

  def compile(self, optimizer=None, jit_compile=False, **kwargs):
    """Makes the model ready for `fit`; by default with the paper's optimizer and without XLA."""
    super().compile(
      optimizer=self.make_optimizer() if optimizer is None else optimizer,
      jit_compile=jit_compile, **kwargs,
    )  # fmt: skip

  def compile_from_config(self, config):
    """Compiles a loaded model as it was, with room for the optimizer's state."""
    optimizer = keras.saving.deserialize_keras_object(config["optimizer"])
    self.compile(optimizer=optimizer, jit_compile=config.get("jit_compile", False))
    self.optimizer.build(self.network.trainable_variables)

  def cond(self, t):
    """The network's conditioning value at times t."""
    o, t = self.network_options, tf.cast(t, tf.float32)
    if o.conditioning == "vp_label":
      return 999.0 * t
    if o.conditioning == "ve_label":
      return tf.round((1.0 - t) * (o.num_scales - 1))
    low, high = math.log(o.cond_min), math.log(o.cond_max)
    return tf.exp(low + (high - low) * t)

  def call(self, x_t, t, training=False, seed=None, first=0):
    """x̂_0 for x_t [B, H, W, C] at times t [B], float32, by the weights under training."""
    return self._predict(self.network, x_t, t, training=training, seed=seed, first=first)

  def _predict(self, network, x_t, t, **options):
    x_t = tf.cast(x_t, tf.float32)
    sigma, level = (
      tf.reshape(schedule(t), [-1, 1, 1, 1])
      for schedule in (self.diffusion.sigma, self.diffusion.level)
    )
    prediction = self.network_options.prediction
    seen = 2.0 * x_t - level if prediction == "noise" else x_t
    out = tf.cast(network(seen, self.cond(t), **options), tf.float32)
    if prediction == "score":
      return x_t + sigma**2 * out
    if prediction == "noise":
      return (x_t - sigma * out) / level
    return x_t + out

  def denoiser(self, ema=True):
    """E[x_0|x_t] as a function (x_t, t [B]) → x̂_0, by the averaged weights unless ema is False."""
    network = self.ema_network if ema else self.network

    def denoise(x_t, t):
      return self._predict(network, x_t, t)

    return denoise

  def make_optimizer(self):
    """Adam as the paper has it (App. D), its rate warmed up linearly."""
    o = self.training_options
    rate = WarmUp(o.learning_rate, o.warmup_steps)
    return PreReducedAdam(rate, beta_1=o.beta_1, beta_2=o.beta_2, epsilon=o.epsilon)

  def _draw_times(self, seed, first, rows, batch):
    t_min = self.training_options.t_min
    if self.training_options.low_variance_t:
      shift = rng.uniform(seed, 0, 1)
      position = tf.cast(first + tf.range(rows), tf.float32)
      u = tf.math.floormod((position + shift) / tf.cast(batch, tf.float32), 1.0)
    else:
      u = rng.uniform(seed, first, rows)
    return t_min + (1.0 - t_min) * u

  def gradients(self, x_0):
    """The gradients of this replica's share of the loss, float32, of the trainable variables.

    Args:
      x_0: float32 [B, H, W, C] in [0, 1]; replica r holds rows r·B … (r+1)·B − 1.

    Returns:
      gradients (to be summed over the replicas), the losses [B] and the times t [B].
    """
    context = tf.distribute.get_replica_context()
    options = self.training_options
    rows = tf.shape(x_0)[0]
    batch = rows * context.num_replicas_in_sync
    first = tf.cast(context.replica_id_in_sync_group, tf.int32) * rows
    step = tf.cast(self.optimizer.iterations, tf.int64)
    seed = tf.stack([tf.constant(self.seed, tf.int64), step])
    variables = self.network.trainable_variables

    def of_rows(x_0, first):
      rows = tf.shape(x_0)[0]
      t = self._draw_times(rng.fold_in(seed, _TIME), first, rows, batch)
      eta = rng.normal(rng.fold_in(seed, _NOISE), first, rows, self.diffusion.image_shape)
      dropout = rng.fold_in(seed, _DROPOUT)

      def denoiser(x_t, t):
        return self(x_t, t, training=True, seed=dropout, first=first)

      with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([v.value for v in variables])
        each = losses.soft_score_matching(
          self.diffusion, denoiser, x_0, t, eta, weight=options.weight, filtered=options.filtered,
          look_ahead=options.look_ahead,
        )  # fmt: skip
        loss = tf.reduce_sum(each) / tf.cast(batch, tf.float32)
      return tape.gradient(loss, [v.value for v in variables]), each, t

    if options.accumulate == 1:
      return of_rows(x_0, first)
    tf.debugging.assert_equal(
      rows % options.accumulate, 0,
      f"training.accumulate = {options.accumulate} parts must share a replica's batch evenly",
    )  # fmt: skip
    size = rows // options.accumulate

    def body(k, total, each, t):
      begin = k * size
      part = of_rows(x_0[begin : begin + size], first + begin)
      total = [a + b for a, b in zip(total, part[0])]
      return k + 1, total, each.write(k, part[1]), t.write(k, part[2])

    zeros = [tf.zeros_like(v.value) for v in variables]
    arrays = [tf.TensorArray(tf.float32, options.accumulate) for _ in range(2)]
    _, total, each, t = tf.while_loop(
      lambda k, *_: k < options.accumulate, body, (tf.constant(0), zeros, *arrays),
      parallel_iterations=1,  # one part at a time is the point of it
    )  # fmt: skip
    return total, each.concat(), t.concat()

  def update(self, x_0):
    """One optimisation step on this replica's part of the global batch.

    Args:
      x_0: see `gradients`.

    Returns:
      A dictionary: "loss" (this replica's share: the sum over replicas is the batch's mean),
      "losses" and "t" [B], "gradient_norm" (global, before the clip).
    """
    context = tf.distribute.get_replica_context()
    gradients, each, t = self.gradients(x_0)
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    gradients, norm = tf.clip_by_global_norm(gradients, self.training_options.clip_norm)
    self.optimizer.apply(gradients, self.network.trainable_variables)
    decay = self.training_options.ema_decay
    for average, value in self._averaged:
      average.value.assign_sub((1.0 - decay) * (average.value - value.value), read_value=False)
    batch = tf.shape(x_0)[0] * context.num_replicas_in_sync
    loss = tf.reduce_sum(each) / tf.cast(batch, tf.float32)
    return {"loss": loss, "losses": each, "t": t, "gradient_norm": norm}

  def train_step(self, data):
    x_0 = data[0] if isinstance(data, tuple) else data
    result = self.update(x_0)
    return {"loss": result["loss"], "gradient_norm": result["gradient_norm"]}
