"""The Keras model: a network that predicts the residual, and the training step of P Eq. 12."""

import math
import pathlib

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import averages, experiment, images, losses, parts, rng, trust
from soft_diffusion_tf import diffusion as diffusions
from soft_diffusion_tf.networks import Architecture
from soft_diffusion_tf.optimizer import PreReducedAdam, WarmUp

_TIME, _NOISE, _DROPOUT = 0, 1, 2  # sub-streams of a step's randomness
_HELD_OUT = -1  # the stream of held-out noise: no step has that number


def _average_of(network):
  """A network for the averages of another's weights, and (average, weight) of those in training."""
  average = type(network).from_config(network.get_config())
  average.set_weights(network.get_weights())
  pairs = [  # frozen ones stay as they are, to the bit
    (mean, value) for mean, value in zip(average.variables, network.variables) if value.trainable
  ]
  average.trainable = False
  return average, pairs


class NonFiniteLoss(RuntimeError):
  """The loss or the gradient is not finite; the message says where."""


@keras.saving.register_keras_serializable(package="soft_diffusion_tf")
class SoftDiffusionModel(keras.Model):
  """Soft Score Matching around a network φ: x̂_0 = φ(x_t, cond(t)) + x_t (P Eq. 10).

  `update` is one training step, for any strategy; `train_step` gives it to `fit`, on one device,
  `test_step` the loss of held-out images to `evaluate`, by the weights under training ("loss") and
  by the averaged ones ("ema_loss"), and `predict` takes pairs [x_t, t]. The averaged weights live
  in a second network, so exactly what is sampled from can be saved and called. `save` and
  `keras.models.load_model` carry all of it, the optimizer's state included.

  Args:
    network: (x_t [B, H, W, C], cond [B]) → [B, H, W, C], as `options.build` makes it.
    diffusion: the forward process.
    training: `experiment.Training`: options of the update.
    options: a `networks.Architecture`: what the network gives and is told. `prediction`:
      "residual" (P Eq. 10);
      "score" of a VE network (C = I): x̂_0 = x_t + σ_t² s;
      "noise" of a VP or sub-VP network (C = α I) made for images in [−1, 1]: it sees 2 x_t − α_t,
      and x̂_0 = (x_t − σ_t ε) / α_t, with σ half of the published one as [0, 1] is half as wide; of
      any C with an inverse in a basis of its own, 2 x_t − C_t 1 and x̂_0 = C_t⁻¹ (x_t − σ_t ε).
      `conditioning`: "log_linear" in t from `cond_min` to `cond_max`, which for a VE network is σ;
      "vp_label", 999 t; "ve_label", round((1 − t)(num_scales − 1)).
    loss: a `losses.Loss`; by default that of the paper.
    seed: of t, noise and dropout; everything drawn in step k is a function of (seed, k, position
      in the global batch).
  """

  # Keras would trace a call with one argument when this model is inside a SavedModel.
  _default_save_signature = None

  def __init__(self, network, diffusion, *, training, options, loss=None, seed=0):
    # No autocast: under mixed_bfloat16 Keras would round x_t and t before `call` sees them, and
    # with them the noise, σ_t and the conditioning. The network casts what it may.
    super().__init__(name="soft_diffusion", autocast=False)
    made_for = tuple(getattr(network, "image_shape", diffusion.image_shape))
    if made_for != tuple(diffusion.image_shape):
      raise ValueError(
        f"the network is made for images of {made_for}, and the process for "
        f"{tuple(diffusion.image_shape)}; make both for one size"
      )
    options.check_sigma(diffusion.sigma)
    self.network = network
    self.ema_network, self._averaged = _average_of(network)
    kept = [_average_of(network) for _ in training.averages]
    self.average_networks = [average for average, _ in kept]
    self.profiles = [
      (averages.exponent(length), pairs) for length, (_, pairs) in zip(training.averages, kept)
    ]
    self.diffusion = diffusion
    self.training_options = training
    self.network_options = options
    self.loss_function = loss or losses.SoftScoreMatching(**training._of_loss)
    self.seed = seed
    self.built = True
    self._means = {}  # what `fit` and `evaluate` show, by name: made by `compile`

  def build(self, input_shape=None):
    self.built = True

  def get_config(self):
    """Everything that the constructor takes, ready for JSON."""
    return {
      "network": keras.saving.serialize_keras_object(self.network),
      "diffusion": self.diffusion.get_config(),
      "training": self.training_options.to_dict(),
      "options": self.network_options.get_config(),
      "loss": self.loss_function.get_config(),
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
    seed, training = config["seed"], config["training"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
      raise ValueError(f"the seed of this model is {seed!r}, no number from 0 on of 63 bits")
    try:
      network = keras.saving.deserialize_keras_object(
        config["network"], custom_objects=custom_objects
      )
    except (TypeError, AttributeError, KeyError, ImportError) as error:  # Keras: many lines
      text = " ".join(str(error).split())[:200] or type(error).__name__
      raise ValueError(
        f"the network of this model cannot be made ({text}); of a class of your own, import its "
        "module and give custom_objects"
      ) from None
    if not isinstance(network, keras.Layer):
      raise ValueError(f"the network of this model is a {type(network).__name__}, no Keras model")
    with trust.trust_code(trust_code):
      return cls(
        network,
        diffusions.Diffusion.from_config(config["diffusion"]),
        training=experiment.options_from_config(experiment.Training, training),
        options=parts.make(Architecture, config["options"], "options"),
        loss=parts.make(losses.Loss, config.get("loss") or experiment.loss_of(training), "loss"),
        seed=seed,
      )

  def compile(self, optimizer=None, loss=None, *, jit_compile=False, **kwargs):
    """Makes the model ready for `fit`; by default with the paper's optimizer and without XLA."""
    ignored = {"loss": loss, "metrics": kwargs.get("metrics")}
    ignored |= {name: kwargs.get(name) for name in ("loss_weights", "weighted_metrics")}
    for name, value in ignored.items():
      if value is not None:
        raise ValueError(
          f"compile({name}={value!r}): this model's loss is given when it is made "
          "(loss=losses.SoftScoreMatching(...)), and fit and evaluate report it; leave that "
          "argument out"
        )
    if optimizer is None:
      optimizer = self._settable(self.make_optimizer())
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
      raise ValueError(
        "this model does not scale its loss (bfloat16 needs no scaling); give the inner optimizer"
      )
    if tf.distribute.get_strategy().num_replicas_in_sync > 1 and not isinstance(
      optimizer, PreReducedAdam
    ):
      raise ValueError(
        f"{type(optimizer).__name__} would sum the gradients of several replicas twice; on several "
        "devices compile with model.PreReducedAdam, or without an optimizer"
      )
    super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
    for name in ("loss", "gradient_norm", "ema_loss"):
      self._means.setdefault(name, keras.metrics.Mean(name=name))

  def fit(self, x=None, y=None, **kwargs):
    """Trains for epochs of images; see `keras.Model.fit`. There are no labels and no weights."""
    self._refuse_weights(kwargs)
    return super().fit(x, y, **kwargs)

  def evaluate(self, x=None, y=None, **kwargs):
    """The held-out loss of images, by both sets of weights; see `keras.Model.evaluate`."""
    self._refuse_weights(kwargs)
    return super().evaluate(x, y, **kwargs)

  @staticmethod
  def _refuse_weights(options):
    """Raises the ValueError of weights; Keras drops them without a word where there is no y."""
    if any(options.get(name) is not None for name in ("sample_weight", "class_weight")):
      raise ValueError("sample_weight and class_weight have no use here; leave them out")

  @staticmethod
  def _settable(optimizer):
    """An optimizer whose warmed-up rate callbacks can change; a number would be in the graph."""
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, WarmUp) and not isinstance(rate.rate, keras.Variable):
      rate.rate = keras.Variable(float(rate.rate), trainable=False, name="rate")
    return optimizer

  def compile_from_config(self, config):
    """Compiles a loaded model as it was, with room for the optimizer's state."""
    optimizer = self._settable(keras.saving.deserialize_keras_object(config["optimizer"]))
    self.compile(optimizer=optimizer, jit_compile=config.get("jit_compile", False))
    self.optimizer.build(self.network.trainable_variables)

  def save(self, filepath, *args, **kwargs):
    """Writes a .keras file with all of it; see `keras.Model.save`."""
    if pathlib.Path(filepath).suffix != ".keras":
      raise ValueError(
        f"{filepath}: this model is saved as a file that ends in .keras; save_weights writes "
        "NAME.weights.h5, and export.save a SavedModel"
      )
    super().save(filepath, *args, **kwargs)

  def cond(self, t):
    """The network's conditioning value at times t."""
    o, t = self.network_options, tf.cast(t, tf.float32)
    if o.conditioning == "vp_label":
      return 999.0 * t
    if o.conditioning == "ve_label":
      return tf.round((1.0 - t) * (o.num_scales - 1))
    low, high = math.log(o.cond_min), math.log(o.cond_max)
    return tf.exp(low + (high - low) * t)

  def _check_shape(self, images):
    """Raises the ValueError of images [B, H, W, C] of another size, where that is known."""
    shape, mine = tf.TensorShape(images.shape), list(self.diffusion.image_shape)
    if not shape.is_compatible_with([None, *mine]):
      raise ValueError(
        f"images of shape {shape}, but this model is made for [N, {', '.join(map(str, mine))}]: "
        "crop or resize them, or make a model for their size"
      )

  def __call__(self, x_t, *args, **kwargs):
    self._check_shape(x_t if hasattr(x_t, "shape") else np.asarray(x_t))  # before Keras, in a line
    return super().__call__(x_t, *args, **kwargs)

  def call(self, x_t, t, training=False, seed=None, first=0, done=None):
    """x̂_0 for x_t [B, H, W, C] at times t [B], float32, by the weights under training."""
    told = {} if done is None else {"done": done}
    return self._predict(self.network, x_t, t, training=training, seed=seed, first=first, **told)

  def _predict(self, network, x_t, t, **options):
    x_t = tf.convert_to_tensor(x_t)
    if not x_t.dtype.is_floating:
      images.check_floats(x_t.dtype.as_numpy_dtype, "the corrupted images")
    x_t = tf.cast(x_t, tf.float32)
    self._check_shape(x_t)
    sigma = tf.reshape(self.diffusion.sigma(t), [-1, 1, 1, 1])
    prediction, seen = self.network_options.prediction, x_t
    if prediction == "noise":  # of C (2 x_0 − 1) + 2 σ η
      seen = 2.0 * x_t - self.diffusion.corrupt(tf.ones_like(x_t[..., :1]), t)
    out = self.network_options.apply(network, seen, self.cond(t), **options)
    out = tf.cast(out, tf.float32)
    if prediction == "score":
      return x_t + sigma**2 * out
    if prediction == "noise":
      own = self.diffusion.corruption.spectrum(self.diffusion.image_shape)
      return own.back(own.to(x_t - sigma * out) / own.gains(self.diffusion.level(t)))
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

  def gradients(self, x_0, done=None):
    """The gradients of this replica's share of the loss, float32, of the trainable variables.

    Args:
      x_0: float32 [B, H, W, C] in [0, 1]; replica r holds rows r·B … (r+1)·B − 1.
      done: what augmentation did to them, float32 [B, n], for a network that is told; else nothing.

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
    if not getattr(self.network_options, "augment_dim", 0):
      done = None

    def of_rows(x_0, done, first):
      rows = tf.shape(x_0)[0]
      t = self._draw_times(rng.fold_in(seed, _TIME), first, rows, batch)
      eta = rng.normal(rng.fold_in(seed, _NOISE), first, rows, self.diffusion.image_shape)
      dropout = rng.fold_in(seed, _DROPOUT)

      def denoiser(x_t, t):
        return self(x_t, t, training=True, seed=dropout, first=first, done=done)

      with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([v.value for v in variables])
        each = self.loss_function(self.diffusion, denoiser, x_0, t, eta)
        loss = tf.reduce_sum(each) / tf.cast(batch, tf.float32)
      return tape.gradient(loss, [v.value for v in variables]), each, t

    if options.accumulate == 1:
      return of_rows(x_0, done, first)
    tf.debugging.assert_equal(
      rows % options.accumulate,
      0,
      f"training.accumulate = {options.accumulate} parts must share a replica's batch evenly",
    )
    size = rows // options.accumulate

    def body(k, total, each, t):
      begin = k * size
      rows = slice(begin, begin + size)
      part = of_rows(x_0[rows], None if done is None else done[rows], first + begin)
      total = [a + b for a, b in zip(total, part[0])]
      return k + 1, total, each.write(k, part[1]), t.write(k, part[2])

    zeros = [tf.zeros_like(v.value) for v in variables]
    arrays = [tf.TensorArray(tf.float32, options.accumulate) for _ in range(2)]
    _, total, each, t = tf.while_loop(
      lambda k, *_: k < options.accumulate,
      body,
      (tf.constant(0), zeros, *arrays),
      parallel_iterations=1,  # one part at a time is the point of it
    )
    return total, each.concat(), t.concat()

  def update(self, x_0, done=None):
    """One optimisation step on this replica's part of the global batch.

    Where the gradient of the whole batch is not finite, weights, averages and the optimizer's state
    stay as they are, on every replica; only the step is counted.

    Args:
      x_0, done: see `gradients`.

    Returns:
      A dictionary: "loss" (this replica's share: the sum over replicas is the batch's mean),
      "losses" and "t" [B], "gradient_norm" (global, before the clip).
    """
    context = tf.distribute.get_replica_context()
    step = tf.cast(self.optimizer.iterations, tf.float32) + 1.0
    gradients, each, t = self.gradients(x_0, done)
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    gradients, norm, finite = self._clip(gradients)
    self._apply_if(finite, gradients)
    for share, pairs in self._shares(step):
      share = tf.where(finite, share, 0.0)
      for average, value in pairs:
        average.value.assign_sub(share * (average.value - value.value), read_value=False)
    batch = tf.shape(x_0)[0] * context.num_replicas_in_sync
    loss = tf.reduce_sum(each) / tf.cast(batch, tf.float32)
    return {"loss": loss, "losses": each, "t": t, "gradient_norm": norm}

  def _shares(self, step):
    """(what step 1, 2, … adds of its weights, pairs of variables) of each average."""
    options = self.training_options
    share = 1.0 - options.ema_decay
    if options.ema_warmup:  # as in tf.train.ExponentialMovingAverage with num_updates
      share = tf.maximum(share, 9.0 / (9.0 + step))
    yield share, self._averaged
    for exponent, pairs in self.profiles:
      yield averages.share(exponent, step), pairs

  def _clip(self, gradients):
    """`tf.clip_by_global_norm` to the bit, but zeros where the norm is not finite; and if it is."""
    norm, most = tf.linalg.global_norm(gradients), self.training_options.clip_norm
    finite = tf.math.is_finite(norm)
    scale = 1.0 if math.isinf(most) else most * tf.minimum(1.0 / norm, tf.constant(1.0) / most)
    scale = tf.where(finite, scale, 0.0)
    return [tf.math.multiply_no_nan(g, scale) for g in gradients], norm, finite

  def _apply_if(self, finite, gradients):
    """The optimizer's update, or none."""
    optimizer, variables = self.optimizer, self.network.trainable_variables
    extras = ("weight_decay", "use_ema", "gradient_accumulation_steps")
    if isinstance(optimizer, PreReducedAdam) and not any(getattr(optimizer, e) for e in extras):
      optimizer.apply_if(finite, gradients, variables)
      return
    if not optimizer.built:
      optimizer.build(variables)
    held = [v for v in optimizer.variables if v is not optimizer.iterations] + variables
    before = [tf.identity(v.value) for v in held]
    optimizer.apply(gradients, variables)
    for variable, value in zip(held, before):
      variable.value.assign(tf.where(finite, variable.value, value))

  def held_out(self, x_0, averaged, first=0):
    """The loss of images that are not trained on, at times and noise that are always the same.

    Args:
      x_0: float32 [B, H, W, C] in [0, 1].
      averaged: by the averaged weights, else by those under training; without dropout.
      first: the number of the first image: image k has its own time, from all of (0, 1), and noise.

    Returns:
      The losses [B] and the times [B].
    """
    options, rows = self.training_options, tf.shape(x_0)[0]
    place = tf.cast(first + tf.range(rows), tf.float64)
    # The golden ratio spreads any number of neighbours evenly, in an order of no other meaning.
    spread = tf.math.floormod(0.5 + place * ((math.sqrt(5.0) - 1.0) / 2.0), 1.0)
    t = options.t_min + (1.0 - options.t_min) * tf.cast(spread, tf.float32)
    seed = rng.fold_in(tf.constant([self.seed, _HELD_OUT], tf.int64), _NOISE)
    eta = rng.normal(seed, first, rows, self.diffusion.image_shape)
    return self.loss_function(self.diffusion, self.denoiser(averaged), x_0, t, eta), t

  # --- What Keras calls ---------------------------------------------------------------------------

  @property
  def metrics(self):
    """What Keras resets before every epoch."""
    return [*super().metrics, *self._means.values()]

  def _batch(self, data):
    """The images of a Keras batch, and the ends of their range; NaN if that is not [0, 1].

    NaN instead of images gives a gradient that is not finite, so nothing is learnt from them.
    """
    x_0, _, weights = keras.utils.unpack_x_y_sample_weight(data)
    self._refuse_weights({"sample_weight": weights})
    if isinstance(x_0, (dict, list, tuple)):
      what = f"a dictionary of {', '.join(x_0)}" if isinstance(x_0, dict) else "several arrays"
      raise ValueError(f"a batch must be images [N, H, W, C], not {what}; map the data to images")
    self._check_shape(x_0)
    x_0 = tf.cast(x_0, tf.float32)
    ends = tf.stack([tf.reduce_min(x_0), tf.reduce_max(x_0)])
    ends = tf.where(tf.reduce_all(tf.math.is_finite(x_0)), ends, np.nan)
    sound = (ends[0] >= -images.SLACK) & (ends[1] <= 1.0 + images.SLACK)
    return tf.where(sound, x_0, np.nan), ends

  def _report(self, ends, **values):
    """The means over an epoch, and the range for `_checked`."""
    for name, value in values.items():
      self._means[name].update_state(value)
    return {name: self._means[name].result() for name in values} | {"range": ends}

  def train_step(self, data):
    x_0, ends = self._batch(data)
    result = self.update(x_0)
    return self._report(ends, loss=result["losses"], gradient_norm=result["gradient_norm"])

  def test_step(self, data):
    x_0, ends = self._batch(data)
    loss, ema_loss = (self.held_out(x_0, averaged)[0] for averaged in (False, True))
    return self._report(ends, loss=loss, ema_loss=ema_loss)

  def predict_step(self, data):
    """E[x_0|x_t] by the averaged weights, of a pair [x_t, t]."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if not isinstance(x, (list, tuple)) or len(x) != 2:
      raise ValueError(
        "predict takes a pair: model.predict([x_t, t]) of corrupted images [N, H, W, C] and their "
        "times [N] gives E[x_0|x_t]; callbacks.SampleGrid and drawing.BatchSampler draw samples"
      )
    return self._predict(self.ema_network, *x)

  def make_train_function(self, force=False):
    """Keras' own, which then ends with one line at a loss that is not finite."""
    made = self.train_function is not None and not force
    super().make_train_function(force)
    if not made:
      self.train_function = self._checked(self.train_function, "training")

  def make_test_function(self, force=False):
    made = self.test_function is not None and not force
    super().make_test_function(force)
    if not made:
      self.test_function = self._checked(self.test_function, "held-out")

  def _checked(self, function, what):
    def checked(iterator):
      logs = dict(function(iterator))
      try:
        return check(logs)
      except (ValueError, NonFiniteLoss):
        self.reset_metrics()  # or the means would stay NaN
        raise

    def check(logs):
      images.check_range(logs.pop("range"), f"the {what} images")
      if not all(np.isfinite(float(value)) for value in logs.values()):
        of = "loss" if not np.isfinite(float(logs["loss"])) else "gradient"
        step = int(self.optimizer.iterations.numpy()) - (what == "training")
        raise NonFiniteLoss(
          f"the {what} {of} is not finite at step {step}, and no update was made from it; lower "
          "the learning rate or look at the data"
        )
      return logs

    return checked
