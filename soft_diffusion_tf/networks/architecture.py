"""The seam of a network: a frozen dataclass of its options, which builds the Keras model.

Any Keras model (images, condition) → images can be one, here a functional model:

    @dataclasses.dataclass(frozen=True)
    class UNet(networks.Architecture):
      width: int = 32

      def build(self, image_shape, seed):
        x, cond = keras.Input(image_shape), keras.Input(())
        ...
        return keras.Model([x, cond], y)

A config names it with its options: `network = UNet(width=64)`, or in JSON
{"kind": "my_module:UNet", "width": 64}.
"""

import dataclasses
from typing import Annotated

import keras
import numpy as np

from soft_diffusion_tf import parts
from soft_diffusion_tf.parts import Choice, Positive, Range

PREDICTIONS = ("residual", "score", "noise")
CONDITIONINGS = ("log_linear", "vp_label", "ve_label")
DTYPES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # what Keras calls them


@dataclasses.dataclass(frozen=True)
class Architecture(parts.Part, role="network"):
  """What a network gives and is told, and how it is built: a part (see `parts`).

  Attributes:
    prediction: what it gives (see `model.SoftDiffusionModel`): "residual" (P's), "score" or
      "noise" as published VE and VP models do.
    conditioning: what it is told of t: "log_linear" in t from `cond_min` to `cond_max`, "vp_label"
      or "ve_label".
    cond_min, cond_max: the ends of the log-linear condition: what the VE network of the same data
      set sees as σ. Where the prediction is "score" they are the ends of σ itself.
    num_scales: the number of labels of "ve_label".
    dtype: what the network computes in. With "bfloat16", as TPUs like it, weights, images, σ and
      the loss stay in float32.
  """

  _group = "network."

  prediction: Annotated[str, Choice(PREDICTIONS)] = "residual"
  conditioning: Annotated[str, Choice(CONDITIONINGS)] = "log_linear"
  cond_min: Positive = 0.01
  cond_max: Positive = 50.0
  num_scales: Annotated[int, Range(1, 1_000_000)] = 1000
  dtype: Annotated[str, Choice(tuple(DTYPES))] = "float32"

  def __post_init__(self):
    super().__post_init__()
    if not self.cond_min < self.cond_max:
      raise ValueError(
        f"network.cond_min = {self.cond_min:g} and cond_max = {self.cond_max:g} must rise"
      )

  @property
  def sigma_range(self):
    """The ends of the geometric σ that the network takes its process to have, or None."""
    told = self.prediction == "score" and self.conditioning == "log_linear"
    return (self.cond_min, self.cond_max) if told else None

  def check_sigma(self, sigma):
    """Raises the ValueError of a process whose noise is another than the network is told.

    Args:
      sigma: σ by t.
    """
    if self.sigma_range is None:
      return
    low, high = self.sigma_range
    times = np.linspace(0.0, 1.0, 17, dtype=np.float32)
    told, own = low * (high / low) ** times, np.asarray(sigma(times))
    if not np.allclose(told, own, rtol=1e-3, atol=0.0):
      names = "sigma_min, sigma_max" if self.conditioning == "ve_label" else "cond_min, cond_max"
      raise ValueError(
        f"network.{names} = {low:g} … {high:g} are what a network with prediction = 'score' takes "
        f"for σ, but σ runs from {own[0]:g} to {own[-1]:g}: give both the same ends and σ the "
        "schedule Geometric"
      )

  @classmethod
  def coerce(cls, config):
    """Options without a kind are NCSN++'s, as in version 0.1."""
    if hasattr(config, "keys") and "kind" not in config:
      return {"kind": "NCSNpp", **config}
    return config

  @property
  def policy(self):
    """Keras' name of `dtype`, for the `dtype` of its layers."""
    return DTYPES[self.dtype]

  def build(self, image_shape, seed):
    """A fresh Keras model for images (height, width, channels).

    Its weights should be a function of `seed` alone, for a run that can be repeated.
    """
    raise NotImplementedError

  def apply(self, network, x, cond, *, training=False, seed=None, first=0):
    """The network's output for images x [B, H, W, C] and conditions cond [B].

    Args:
      seed: int [2], of dropout: it changes with every step.
      first: the place of row 0 in the global batch.
    """
    return network([x, cond], training=training)

  def check(self, image_shape):
    """Raises the ValueError of options that make no network, without making its weights."""

  @property
  def least_variables(self):
    """A number that the network's variables cannot be fewer than, known without counting them."""
    return 0

  def footprint(self, image_shape):
    """Bytes, bounds from below: of the weights, and of the features of an image in a training step
    and in an evaluation.
    """
    return 0, 0, 0

  def shapes(self, image_shape):
    """The shapes of the network's variables, in order, without making any: for checks of sizes."""
    with keras.StatelessScope(initialize_variables=False):
      return [tuple(v.shape) for v in self.build(image_shape, 0).variables]
