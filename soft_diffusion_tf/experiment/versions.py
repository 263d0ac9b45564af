"""Configs of version 0.1, as this version has them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from soft_diffusion_tf import (
  parts,
  priors,
  samplers,
)
from soft_diffusion_tf.networks import Network

OF_LOSS = ("weight", "filtered", "look_ahead")
OF_RULES = ("k", "noise", "tolerance")


def of_now(content: dict[str, Any]) -> dict[str, Any]:
  """A config of version 0.1 as this one has it, the loss and the rules with fields of their own."""

  def take(group: str, names: tuple[str, ...]) -> dict[str, Any]:
    values = content.get(group)
    if not isinstance(values, Mapping):
      return {}
    content[group] = {k: v for k, v in values.items() if k not in names}
    return {k: values[k] for k in names if values.get(k) is not None}

  if old := take("training", OF_LOSS):
    loss = content.get("loss", {"kind": "SoftScoreMatching"})
    content["loss"] = {**loss, **old} if isinstance(loss, Mapping) else loss
  if old := take("sampling", OF_RULES):
    content["sampling"]["sampler"] = _of_rule(content["sampling"].get("sampler", "two_step"), old)
  return content


def attending_by_width(content: dict[str, Any]) -> dict[str, Any]:
  """A config of version 0.1, whose attn_resolutions are heights also where the width is less."""
  network, images = content.get("network", {}), content.get("data", {})
  shape: Any = images.get("image_shape") if isinstance(images, Mapping) else None
  if not isinstance(network, Mapping) or network.get("kind", "NCSNpp") != "NCSNpp":
    return content
  default = Network()
  levels = network.get("ch_mult", default.ch_mult)
  heights = network.get("attn_resolutions", default.attn_resolutions)
  for sizes in (shape, levels, heights):
    if not isinstance(sizes, list | tuple) or not all(type(n) is int for n in sizes):
      return content  # the fields' own checks say what is wrong
  if len(shape) != 3 or shape[0] <= shape[1]:
    return content
  widths = [shape[1] >> k for k in range(len(levels)) if shape[0] >> k in heights]
  return {**content, "network": {**network, "attn_resolutions": widths}}


def _of_rule(sampler: Any, values: Mapping[str, Any]) -> samplers.Rule:
  """The rule of a config of version 0.1; each value must be one that its rule takes."""
  for name, kind in zip(
    OF_RULES, (samplers.DDIM, samplers.StochasticTwoStep, samplers.DormandPrince)
  ):
    if name in values:
      parts.check_fields(kind, {name: values[name]}, "sampling.")
  return samplers.with_fields(parts.make(samplers.Rule, sampler, "sampling.sampler"), values)


def loss_of(training: Mapping[str, Any]) -> Any:
  """The config of the loss that options of `Training` of version 0.1 describe."""
  return of_now({"training": training}).get("loss", {"kind": "SoftScoreMatching"})


def options_from_config(kind: Any, values: Mapping[str, Any]) -> Any:
  """One of the groups above (`Training`, …) from plain values, checked."""
  name = kind._group[:-1]
  return kind(**parts.check_fields(kind, of_now({name: values})[name], kind._group))


def PriorOptions(kind: str = "subspace", rank: int = 16) -> priors.Estimator:
  """Deprecated: an estimator of `priors`, as version 0.1 named it."""
  estimator = parts.make(priors.Estimator, kind, "prior.kind")
  warnings.warn(
    f"PriorOptions is deprecated; use priors.{type(estimator).__name__}()",
    DeprecationWarning,
    stacklevel=2,
  )
  return dataclasses.replace(estimator, rank=rank)
