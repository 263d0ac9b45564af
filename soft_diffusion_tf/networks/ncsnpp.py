"""NCSN++, the U-Net of Song et al. 2021 (arXiv:2011.13456, section 4.1 and appendix H)."""

import dataclasses
import math
from typing import Annotated

import keras
import numpy as np
import tensorflow as tf

from soft_diffusion_tf import memory
from soft_diffusion_tf.networks import blocks, resampling
from soft_diffusion_tf.networks.architecture import Architecture
from soft_diffusion_tf.parts import Choice, NotNegative, Positive, Range, Share, Side


@dataclasses.dataclass(frozen=True)
class Network(Architecture, name="NCSNpp"):
  """NCSN++ and its options, the one place where they are listed; `NCSNpp` is the Keras model.

  Attributes:
    nf: channels of the first convolution; level i has nf · ch_mult[i].
    ch_mult: one multiplier per resolution, from the finest.
    num_res_blocks: residual blocks per level on the way down; one more on the way up.
    attn_resolutions: attention at the levels whose shorter side is listed, and in the middle.
    dropout: rate between the convolutions of a residual block.
    fir, fir_kernel: FIR filter for resampling, and its taps (StyleGAN2).
    skip_rescale: sums of residual and shortcut are divided by √2.
    resblock_type: "biggan" (resamples inside of residual blocks) or "ddpm".
    progressive: output pyramid: "none", "output_skip" (the sum over levels is the output) or
      "residual".
    progressive_input: input pyramid: "none", "input_skip" or "residual".
    progressive_combine: "sum" or "cat", for "input_skip".
    embedding_type: "fourier" (cond is σ > 0) or "positional" (cond is a time label).
    fourier_scale: standard deviation of the Fourier frequencies.
    resamp_with_conv: convolution in the resampling of "ddpm" blocks.
    conditional: whether `cond` reaches the residual blocks.
    init_scale: initial scale of the last layer of each branch and of the output.
    centered: False if images are in [0, 1], which the network then maps to 2x − 1 itself.
    remat: gradient checkpointing: residual blocks and attention are computed again in the backward
      pass instead of keeping their activations.
    scale_by_sigma: divides the output by σ, as a score needs it: by cond ("fourier"), or by entry
      ⌊cond⌋ of a geometric table of `num_scales` values from `sigma_max` down to `sigma_min`
      ("positional"). With it the network's own numbers are of size 1 at every σ.
    sigma_min, sigma_max: of that table.
    augment_dim: numbers that the network is told in training of what augmentation did to an image
      (the label of `data.EDM`); 0: it is not told. A dense layer adds them to the features of
      `cond`. Samples are drawn with zeros, as images that nothing was done to.
  """

  nf: Annotated[int, Range(4, 4096)] = 128
  ch_mult: tuple[Annotated[int, Range(1, 64)], ...] = (1, 2, 2, 2)
  num_res_blocks: Annotated[int, Range(1, 128)] = 4
  attn_resolutions: tuple[Side, ...] = (16,)
  dropout: Share = 0.1
  fir: bool = True
  fir_kernel: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
  skip_rescale: bool = True
  resblock_type: Annotated[str, Choice(("biggan", "ddpm"))] = "biggan"
  progressive: Annotated[str, Choice(("none", "output_skip", "residual"))] = "none"
  progressive_input: Annotated[str, Choice(("none", "input_skip", "residual"))] = "residual"
  progressive_combine: Annotated[str, Choice(("sum", "cat"))] = "sum"
  embedding_type: Annotated[str, Choice(("fourier", "positional"))] = "fourier"
  fourier_scale: Positive = 16.0
  resamp_with_conv: bool = True
  conditional: bool = True
  init_scale: NotNegative = 0.0
  centered: bool = False
  remat: bool = False
  scale_by_sigma: bool = False
  sigma_min: Positive = 0.01
  sigma_max: Positive = 50.0
  augment_dim: Annotated[int, Range(0, 4096)] = 0

  def __post_init__(self):
    super().__post_init__()
    labels = self.conditioning != "log_linear"
    if labels and self.embedding_type == "fourier":
      raise ValueError(
        f"network.conditioning = {self.conditioning!r} gives labels from 0 on, whose logarithm "
        "embedding_type = 'fourier' takes; use 'positional', or the conditioning 'log_linear'"
      )
    if self.scale_by_sigma and self.prediction != "score":
      raise ValueError(
        f"network.scale_by_sigma divides the output by σ, which makes no {self.prediction!r} of "
        "it; use prediction = 'score', or scale_by_sigma = False"
      )
    if (
      self.scale_by_sigma
      and self.embedding_type == "positional"
      and (self.conditioning != "ve_label")
    ):
      raise ValueError(
        "network.scale_by_sigma with embedding_type = 'positional' divides by the σ of a label; "
        f"use the conditioning 've_label', not {self.conditioning!r}"
      )
    if self.augment_dim and not self.conditional:
      raise ValueError(
        f"network.augment_dim = {self.augment_dim} numbers reach the network where cond does; set "
        "network.conditional = True, or augment_dim = 0"
      )
    if not self.ch_mult:
      raise ValueError("network.ch_mult = () must hold one positive multiplier per resolution")
    if self.fir and (len(self.fir_kernel) < 2 or not sum(self.fir_kernel)):
      raise ValueError(
        f"network.fir_kernel = {self.fir_kernel} must hold at least two taps with a sum other than "
        "0; network.fir = False resamples without a filter"
      )
    if not self.sigma_min <= self.sigma_max:
      raise ValueError(
        f"network.sigma_min = {self.sigma_min:g} and sigma_max = {self.sigma_max:g} must rise"
      )

  @property
  def sigma_range(self):
    if self.prediction == "score" and self.conditioning == "ve_label" and self.scale_by_sigma:
      return self.sigma_min, self.sigma_max
    return super().sigma_range

  def build(self, image_shape, seed):
    return NCSNpp(image_shape=image_shape, seed=seed, dtype=self.policy, **self.of_keras())

  def of_keras(self):
    """The options that the Keras model takes."""
    return {name: getattr(self, name) for name in OPTIONS}

  def apply(self, network, x, cond, **options):
    return network(x, cond, **options)

  @property
  def least_variables(self):
    return 2 * self.num_res_blocks

  def footprint(self, image_shape):
    """Counts two tensors a residual block (one with `remat`), and the weights of one convolution in
    each of them and at both ends.
    """
    height, width, channels = image_shape
    blocks_each = 2 * self.num_res_blocks + 1
    wide = [
      (self.nf * mult, height >> level, width >> level) for level, mult in enumerate(self.ch_mult)
    ]
    ends = 2 * self.nf * channels
    weights = 4 * 9 * (blocks_each * sum(c * c for c, _, _ in wide) + ends)
    once = (2 if self.dtype == "bfloat16" else 4) * sum(c * h * w for c, h, w in wide)
    return weights, once * blocks_each * (1 if self.remat else 2), once

  def check(self, image_shape):
    """Raises the ValueError of images that this network cannot take.

    But for channels that no group normalisation can split: they show when layers are made.
    """
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in image_shape)
    if not whole or len(image_shape) != 3 or min(image_shape) < 1:
      raise ValueError(
        f"image_shape={image_shape!r} is not (height, width, channels); "
        "give three positive integers without the batch"
      )
    factor = 2 ** (len(self.ch_mult) - 1)
    height, width, _ = image_shape
    if height % factor or width % factor:
      raise ValueError(
        f"image_shape={image_shape} is not divisible by {factor}, as the {len(self.ch_mult)} "
        f"levels of ch_mult={self.ch_mult} need; the nearest sizes that are: "
        f"{_nearest_sizes(height, width, factor)}; pad or resize the images, or use fewer levels"
      )
    memory.check_network(self, image_shape)


def _nearest_sizes(height, width, factor):
  """The sizes divisible by a factor next to height × width, below and above."""
  below, above = [
    [max(factor, step(n / factor) * factor) for n in (height, width)]
    for step in (math.floor, math.ceil)
  ]
  return " and ".join(f"{h}×{w}" for h, w in dict.fromkeys([tuple(below), tuple(above)]))


_OF_ALL = {field.name for field in dataclasses.fields(Architecture)} - {"num_scales"}
OPTIONS = tuple(f.name for f in dataclasses.fields(Network) if f.name not in _OF_ALL)


@keras.saving.register_keras_serializable("soft_diffusion_tf")
class NCSNpp(keras.Model):
  """NCSN++: (x, cond) → a tensor shaped like x, in float32.

  All weights exist after construction; their initial values are a function of `seed` alone. The
  output starts near zero if `init_scale` is 0.

  Args:
    image_shape: (height, width, channels); height and width divisible by 2^(levels − 1).
    seed: of the initial values, an integer ≥ 0.
    options: those of `Network` that are named in `OPTIONS`, with its defaults.

  Raises:
    ValueError: if the options contradict each other or cannot be built.
  """

  # tf.saved_model.save would otherwise trace a signature with one argument for every tracked
  # Keras model, and this one has two.
  _default_save_signature = None

  def __init__(self, *, image_shape, seed=0, name="ncsnpp", **options):
    of_keras = {k: v for k, v in options.items() if k not in OPTIONS}
    options = {k: v for k, v in options.items() if k in OPTIONS}
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
      raise ValueError(f"seed={seed!r} is not a whole number from 0 on")
    labels = options.get("embedding_type") == "positional"
    # What cond is and what the output means is the caller's choice: any that fits the options does.
    network = Network(
      conditioning="ve_label" if labels else "log_linear",
      prediction="score" if options.get("scale_by_sigma") else "residual",
      **options,
    )
    network.check(image_shape)
    # No autocast: cond must stay float32; the layers cast what they are given.
    super().__init__(name=name, autocast=False, **of_keras)
    self._options = {"image_shape": tuple(image_shape), **network.of_keras(), "seed": seed}
    for key, value in self._options.items():
      setattr(self, key, value)
    self._make_layers()
    self.built = True

  def _attends(self, level):
    return min(self.image_shape[:2]) // 2**level in self.attn_resolutions

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
    if self.augment_dim:  # behind all others, whose numbers and first values stay as they are
      add(blocks.Dense, self.augment_dim, features, dtype="float32", name="augment")
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

  def call(self, x, cond, training=False, seed=None, first=0, done=None):
    """The network's output, float32 [B, H, W, C].

    Args:
      x: images [B, H, W, C].
      cond: [B]; σ ("fourier") or the time label ("positional").
      training: whether to drop out.
      seed: int [2], of dropout; row p's mask depends on (seed, first + p) alone.
      first: the place of row 0 in the global batch.
      done: what augmentation did to the images, [B, augment_dim]; by default nothing.
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
      if self.augment_dim:
        nothing = tf.zeros([tf.shape(x)[0], self.augment_dim])
        features += self.augment(nothing if done is None else tf.cast(done, tf.float32))
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
