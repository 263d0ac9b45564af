"""NCSN++, the U-Net of Song et al. 2021 (arXiv:2011.13456, section 4.1 and appendix H)."""

import difflib
import numbers
from collections.abc import Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import memory
from soft_diffusion_tf.networks import blocks, resampling

_MOST = {"num_res_blocks": 128, "num_scales": 1_000_000}  # what can be made within minutes
_CHOICES = {
  "resblock_type": ("biggan", "ddpm"),
  "progressive": ("none", "output_skip", "residual"),
  "progressive_input": ("none", "input_skip", "residual"),
  "progressive_combine": ("sum", "cat"),
  "embedding_type": ("fourier", "positional"),
}


def _tuple(value):
  """A list as a tuple; anything else is left for `_check` to refuse."""
  return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _check(o):
  """Raises ValueError on options that cannot be built or that would be silently meaningless."""
  whole = lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool)
  for key in ("nf", "num_res_blocks", "seed"):
    if not whole(o[key]):
      raise ValueError(f"{key}={o[key]!r} is not a whole number")
  for key in ("image_shape", "ch_mult", "attn_resolutions"):
    if not (isinstance(o[key], Sequence) and all(map(whole, o[key]))):
      raise ValueError(f"{key}={o[key]!r} is not a tuple of whole numbers")
  for key, choices in _CHOICES.items():
    if o[key] not in choices:
      near = (difflib.get_close_matches(str(o[key]).lower(), choices, 1, 0.0) or choices)[0]
      raise ValueError(
        f"{key}={o[key]!r} is not one of {', '.join(choices)}; did you mean {near!r}?"
      )
  if len(o["image_shape"]) != 3 or min(o["image_shape"]) < 1:
    raise ValueError(
      f"image_shape={o['image_shape']} is not (height, width, channels); "
      "give three positive integers without the batch"
    )
  if not o["ch_mult"] or min(o["ch_mult"]) < 1:
    raise ValueError(f"ch_mult={o['ch_mult']} must hold one positive multiplier per resolution")
  factor = 2 ** (len(o["ch_mult"]) - 1)
  height, width, _ = o["image_shape"]
  if height % factor or width % factor:
    raise ValueError(
      f"image_shape={o['image_shape']} is not divisible by {factor}, as the {len(o['ch_mult'])} "
      f"levels of ch_mult={o['ch_mult']} need; pad or resize the images, or use fewer levels"
    )
  for key, least in {"nf": 4, "num_res_blocks": 1, "seed": 0}.items():
    if o[key] < least:
      raise ValueError(f"{key}={o[key]} is too small; the least is {least}")
  for key, most in _MOST.items():
    if (o[key] or 0) > most:
      raise ValueError(f"{key}={o[key]} is too large; the most is {most}")
  memory.check_network(o["nf"], o["ch_mult"], o["num_res_blocks"], o["image_shape"][2])
  if not 0 <= o["dropout"] < 1:
    raise ValueError(f"dropout={o['dropout']} is not a probability below 1; 0 switches it off")
  if o["init_scale"] < 0:
    raise ValueError(f"init_scale={o['init_scale']} is a variance; it must be 0 or more")
  if o["fir"] and (len(o["fir_kernel"]) < 2 or not sum(o["fir_kernel"])):
    raise ValueError(
      f"fir_kernel={o['fir_kernel']} must hold at least two taps with a sum other than 0; "
      "fir=False resamples without a filter"
    )
  if o["scale_by_sigma"] and o["embedding_type"] == "positional":
    low, high, count = o["sigma_min"], o["sigma_max"], o["num_scales"]
    if None in (low, high, count) or not 0 < low <= high or count < 1:
      raise ValueError(
        f"sigma_min={low}, sigma_max={high}, num_scales={count}: scale_by_sigma with a positional "
        "embedding looks sigma up by its label; give 0 < sigma_min <= sigma_max and num_scales >= 1"
      )


@keras.saving.register_keras_serializable("soft_diffusion_tf")
class NCSNpp(keras.Model):
  """NCSN++: (x, cond) → a tensor shaped like x, in float32.

  All weights exist after construction; their initial values are a function of `seed` alone. The
  output starts near zero if `init_scale` is 0.

  Args:
    image_shape: (height, width, channels); height and width divisible by 2^(levels − 1).
    nf: channels of the first convolution; level i has nf · ch_mult[i].
    ch_mult: one multiplier per resolution, from the finest.
    num_res_blocks: residual blocks per level on the way down; one more on the way up.
    attn_resolutions: attention at the levels whose height is listed. The middle always attends.
    dropout: rate between the convolutions of a residual block.
    resamp_with_conv: convolution in the resampling of "ddpm" blocks.
    conditional: whether `cond` reaches the residual blocks.
    fir, fir_kernel: FIR filter for resampling, and its taps (StyleGAN2).
    skip_rescale: sums of residual and shortcut are divided by √2.
    resblock_type: "biggan" (resamples inside of residual blocks) or "ddpm".
    progressive: output pyramid: "none", "output_skip" (the sum over levels is the output) or
      "residual".
    progressive_input: input pyramid: "none", "input_skip" or "residual".
    progressive_combine: "sum" or "cat", for "input_skip".
    embedding_type: "fourier" (cond is σ > 0) or "positional" (cond is a time label).
    fourier_scale: standard deviation of the Fourier frequencies.
    init_scale: initial scale of the last layer of each branch and of the output.
    centered: False if images are in [0, 1], which the network then maps to 2x − 1 itself.
    scale_by_sigma: divides the output by σ: by cond ("fourier"), or by entry ⌊cond⌋ of a geometric
      table of `num_scales` values from `sigma_max` down to `sigma_min` ("positional").
    sigma_min, sigma_max, num_scales: of that table.
    remat: gradient checkpointing: residual blocks and attention are computed again in the backward
      pass instead of keeping their activations.
    seed: of the initial values, an integer ≥ 0.

  Raises:
    ValueError: if the options contradict each other or cannot be built.
  """

  # tf.saved_model.save would otherwise trace a signature with one argument for every tracked
  # Keras model, and this one has two.
  _default_save_signature = None

  def __init__(
    self,
    *,
    image_shape,
    nf=128,
    ch_mult=(1, 2, 2, 2),
    num_res_blocks=4,
    attn_resolutions=(16,),
    dropout=0.1,
    resamp_with_conv=True,
    conditional=True,
    fir=True,
    fir_kernel=(1, 3, 3, 1),
    skip_rescale=True,
    resblock_type="biggan",
    progressive="none",
    progressive_input="none",
    progressive_combine="sum",
    embedding_type="fourier",
    fourier_scale=16.0,
    init_scale=0.0,
    centered=False,
    scale_by_sigma=False,
    sigma_min=None,
    sigma_max=None,
    num_scales=None,
    remat=False,
    seed=0,
    name="ncsnpp",
    **kwargs,
  ):
    options = {
      "image_shape": _tuple(image_shape),
      "nf": nf,
      "ch_mult": _tuple(ch_mult),
      "num_res_blocks": num_res_blocks,
      "attn_resolutions": _tuple(attn_resolutions),
      "dropout": dropout,
      "resamp_with_conv": resamp_with_conv,
      "conditional": conditional,
      "fir": fir,
      "fir_kernel": tuple(fir_kernel),
      "skip_rescale": skip_rescale,
      "resblock_type": resblock_type,
      "progressive": progressive,
      "progressive_input": progressive_input,
      "progressive_combine": progressive_combine,
      "embedding_type": embedding_type,
      "fourier_scale": fourier_scale,
      "init_scale": init_scale,
      "centered": centered,
      "scale_by_sigma": scale_by_sigma,
      "sigma_min": sigma_min,
      "sigma_max": sigma_max,
      "num_scales": num_scales,
      "remat": remat,
      "seed": seed,
    }
    _check(options)
    # No autocast: cond must stay float32; the layers cast what they are given.
    super().__init__(name=name, autocast=False, **kwargs)
    self._options = options
    for key, value in options.items():
      setattr(self, key, value)
    self._make_layers()
    self.built = True

  @staticmethod
  def check(*, image_shape, fir_kernel=(1, 3, 3, 1), **options):
    """Raises the ValueError that the constructor would, and makes nothing.

    But for channels that no group normalisation can split: they show when layers are made.
    """
    _check(options | {"image_shape": image_shape, "fir_kernel": fir_kernel})

  @classmethod
  def shapes(cls, **options):
    """The shapes of its `variables`, in order, without making any: options as of the constructor.

    For a check of sizes before memory is taken.
    """
    with keras.StatelessScope(initialize_variables=False):
      return [tuple(v.shape) for v in cls(**options).variables]

  def _attends(self, level):
    return self.image_shape[0] // 2**level in self.attn_resolutions

  def _make_layers(self):
    """Makes the layers in order of use, which is how published checkpoints number them."""
    layers = []
    channels_image = self.image_shape[2]
    levels = len(self.ch_mult)
    taps = self.fir_kernel if self.fir else None
    embedding = 4 * self.nf if self.conditional else None

    def add(kind, *args, dtype=self.dtype_policy, name, **kwargs):
      seed = (self.seed, len(layers))
      layers.append(kind(*args, seed=seed, dtype=dtype, name=name, **kwargs))

    def residual(channels_in, channels_out, name, direction=None):
      add(
        blocks.ResidualBlock,
        channels_in,
        channels_out,
        embedding=embedding,
        direction=direction,
        taps=taps,
        block=self.resblock_type,
        rate=self.dropout,
        index=len(layers),
        init_scale=self.init_scale,
        skip_rescale=self.skip_rescale,
        name=name,
      )

    def attention(channels, name):
      add(
        blocks.Attention,
        channels,
        init_scale=self.init_scale,
        skip_rescale=self.skip_rescale,
        name=name,
      )

    def resample(channels_in, channels_out, direction, name, with_conv=True):
      add(
        blocks.Resample,
        channels_in,
        channels_out,
        direction=direction,
        with_conv=with_conv,
        taps=taps,
        name=name,
      )

    def head(channels_in, channels_out, scale, name, dtype="float32"):
      """Norm, activation, convolution; float32 where it makes the image."""
      layers.append(blocks.GroupNorm(channels_in, activate=True, name=f"{name}_norm", dtype=dtype))
      add(blocks.Conv2D, channels_in, channels_out, scale=scale, dtype=dtype, name=f"{name}_conv")

    if self.embedding_type == "fourier":
      layers.append(
        blocks.FourierFeatures(
          self.nf, scale=self.fourier_scale, seed=(self.seed, 0), name="fourier"
        )
      )
    if self.conditional:
      features = 2 * self.nf if self.embedding_type == "fourier" else self.nf
      add(blocks.Dense, features, 4 * self.nf, dtype="float32", name="time_0")
      add(blocks.Dense, 4 * self.nf, 4 * self.nf, dtype="float32", name="time_1")

    add(blocks.Conv2D, channels_image, self.nf, name="first_conv")
    channels = self.nf
    skips = [channels]
    channels_pyramid = channels_image
    for level, mult in enumerate(self.ch_mult):
      for block in range(self.num_res_blocks):
        residual(channels, self.nf * mult, f"down_{level}_block_{block}")
        channels = self.nf * mult
        if self._attends(level):
          attention(channels, f"down_{level}_attention_{block}")
        skips.append(channels)
      if level < levels - 1:
        if self.resblock_type == "biggan":
          residual(channels, channels, f"down_{level}_resample", "down")
        else:
          resample(
            channels, channels, "down", f"down_{level}_resample", with_conv=self.resamp_with_conv
          )
        if self.progressive_input == "input_skip":
          add(
            blocks.Combine,
            channels_pyramid,
            channels,
            method=self.progressive_combine,
            name=f"down_{level}_combine",
          )
          channels *= 2 if self.progressive_combine == "cat" else 1
        elif self.progressive_input == "residual":
          resample(channels_pyramid, channels, "down", f"down_{level}_pyramid")
          channels_pyramid = channels
        skips.append(channels)

    residual(channels, channels, "middle_block_0")
    attention(channels, "middle_attention")
    residual(channels, channels, "middle_block_1")

    for level in reversed(range(levels)):
      for block in range(self.num_res_blocks + 1):
        residual(channels + skips.pop(), self.nf * self.ch_mult[level], f"up_{level}_block_{block}")
        channels = self.nf * self.ch_mult[level]
      if self._attends(level):
        attention(channels, f"up_{level}_attention")
      if self.progressive == "output_skip":
        head(channels, channels_image, self.init_scale, f"up_{level}_output")
      elif self.progressive == "residual":
        if level == levels - 1:
          head(channels, channels, 1.0, f"up_{level}_pyramid", dtype=self.dtype_policy)
        else:
          resample(channels_pyramid, channels, "up", f"up_{level}_pyramid")
        channels_pyramid = channels
      if level:
        if self.resblock_type == "biggan":
          residual(channels, channels, f"up_{level}_resample", "up")
        else:
          resample(
            channels, channels, "up", f"up_{level}_resample", with_conv=self.resamp_with_conv
          )
    if self.progressive != "output_skip":
      head(channels, channels_image, self.init_scale, "last")
    # An attribute each: tf.train.Checkpoint does not look into the lists of a Keras model.
    for layer in layers:
      setattr(self, layer.name, layer)

  @property
  def blocks(self):
    """The layers in order of use."""
    return self.layers

  def _sigma(self, cond):
    """What scale_by_sigma divides by, float32 [B]."""
    if self.embedding_type == "fourier":
      return cond
    table = np.geomspace(self.sigma_max, self.sigma_min, self.num_scales)
    return tf.gather(tf.constant(table, tf.float32), tf.cast(cond, tf.int32))

  def call(self, x, cond, training=False, seed=None, first=0):
    """The network's output, float32 [B, H, W, C].

    Args:
      x: images [B, H, W, C].
      cond: [B]; σ ("fourier") or the time label ("positional").
      training: whether to drop out.
      seed: int [2], of dropout; row p's mask depends on (seed, first + p) alone.
      first: the place of row 0 in the global batch.
    """
    if training and self.dropout and seed is None:
      raise ValueError(
        f"training=True with dropout={self.dropout} needs seed, two integers that change with "
        "every step, so that masks are a function of the step and not of hidden state"
      )
    take = iter(self.blocks).__next__

    def run(layer, *args):
      """A residual block or attention, checkpointed if asked for."""
      kwargs = {}
      if isinstance(layer, blocks.ResidualBlock):
        args = args if embedding is None else (*args, embedding)
        kwargs = {"training": training, "seed": seed, "first": first}
      f = lambda *tensors: layer(*tensors, **kwargs)
      return tf.recompute_grad(f)(*args) if self.remat else f(*args)

    def head(h):
      norm, conv = take(), take()
      return conv(norm(h))

    x = tf.ensure_shape(tf.cast(x, tf.float32), [None, *self.image_shape])
    cond = tf.cast(cond, tf.float32)
    levels = len(self.ch_mult)
    taps = self.fir_kernel if self.fir else None

    features = take()(cond) if self.embedding_type == "fourier" else None
    embedding = None
    if self.conditional:
      if features is None:
        features = blocks.positional_features(cond, self.nf)
      # Every residual block activates the embedding; once is enough.
      hidden = tf.nn.silu(take()(features))
      embedding = tf.nn.silu(take()(hidden))

    h = x if self.centered else 2 * x - 1
    pyramid = h
    h = take()(h)
    skips = [h]
    for level in range(levels):
      for _ in range(self.num_res_blocks):
        h = run(take(), h)
        if self._attends(level):
          h = run(take(), h)
        skips.append(h)
      if level < levels - 1:
        layer = take()
        h = run(layer, h) if self.resblock_type == "biggan" else layer(h)
        if self.progressive_input == "input_skip":
          pyramid = resampling.resample(pyramid, "down", taps)
          h = take()(pyramid, h)
        elif self.progressive_input == "residual":
          h = pyramid = blocks.add_skip(take()(pyramid), h, self.skip_rescale)
        skips.append(h)

    for _ in range(3):
      h = run(take(), h)

    for level in reversed(range(levels)):
      for _ in range(self.num_res_blocks + 1):
        h = run(take(), tf.concat([h, skips.pop()], axis=-1))
      if self._attends(level):
        h = run(take(), h)
      if self.progressive == "output_skip":
        image = head(h)
        if level < levels - 1:
          image += resampling.resample(pyramid, "up", taps)
        pyramid = image
      elif self.progressive == "residual":
        if level == levels - 1:
          pyramid = head(h)
        else:
          h = pyramid = blocks.add_skip(take()(pyramid), h, self.skip_rescale)
      if level:
        layer = take()
        h = run(layer, h) if self.resblock_type == "biggan" else layer(h)

    y = pyramid if self.progressive == "output_skip" else head(h)
    y = tf.cast(y, tf.float32)
    if self.scale_by_sigma:
      y /= self._sigma(cond)[:, None, None, None]
    return y

  def get_config(self):
    return {**super().get_config(), **self._options}
