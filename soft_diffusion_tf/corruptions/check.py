"""The contract of a corruption, checked."""

import dataclasses
import json
import math

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import faults, products, trust
from soft_diffusion_tf.corruptions.base import verified


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What `check_corruption` found: property → what is wrong with it; empty means sound."""

  corruption: str
  failures: dict[str, str]

  @property
  def ok(self):
    return not self.failures

  def __str__(self):
    if self.ok:
      return f"{self.corruption}: sound"
    return "\n".join(f"{self.corruption}: {k}: {v}" for k, v in self.failures.items())


def check_corruption(corruption, image_shape=(6, 4, 2), levels=None) -> Verdict:
  """Tests what the theory asks of a corruption, on small random images.

  The properties: "product" (what the class multiplies in float32 itself is right on this machine:
  tried in a process of its own, see `faults`), "linear", "identity" (C = I at the clean end),
  "matrix" (equals its own matrix, channels alike), "adjoint" (⟨Cx, y⟩ = ⟨x, Cᵀy⟩), "svd",
  "gradients" (finite in x and level), "broadcast" (one level per image equals one image at a time),
  "graph" (the same when compiled for any number of images), "float32" (also from bfloat16),
  "finite" and "config" (get_config and from_config give the same operator). Of one that says that
  it is not linear, "linear", "matrix", "adjoint" and "svd" are not asked.

  Args:
    corruption: a `Corruption`.
    image_shape: (H, W, C), small: matrices of (H·W)² are built.
    levels: the levels to try; by default five over `level_range`, or up to 8 past its start.
  """
  start, stop = corruption.level_range
  if levels is None:
    far = stop if math.isfinite(stop) else start + 8.0
    levels = start + (far - start) * np.array([0.0, 0.05, 0.3, 0.7, 1.0])
  levels = np.asarray(levels, np.float32)
  draw = np.random.default_rng(0)
  n = len(levels)
  x, y = (draw.standard_normal([n, *image_shape]).astype(np.float32) for _ in range(2))
  failures: dict[str, str] = {}

  def same(name, got, want, what):
    # float32 rounding over sums of a few hundred terms, with room for a user's own arithmetic
    error = float(np.max(np.abs(np.asarray(got) - np.asarray(want))))
    scale = max(1.0, float(np.max(np.abs(np.asarray(want)))))
    if not error <= 1e-4 * scale and name not in failures:
      failures[name] = f"{what} (off by {error:.3g})"

  def attempt(name, check):
    try:
      check()
    except Exception as error:  # the verdict is for the user's code: any fault is its finding
      failures.setdefault(name, f"raises {type(error).__name__}: {error}")

  def linear():
    combined = corruption(2.0 * x - 3.0 * y, levels)
    same(
      "linear",
      combined,
      2.0 * corruption(x, levels) - 3.0 * corruption(y, levels),
      "C(2x − 3y) is not 2Cx − 3Cy",
    )

  def identity():
    same("identity", corruption(x, start), x, f"C is not I at level {start:g}")

  def finite():
    if not np.all(np.isfinite(corruption(x, levels))):
      failures["finite"] = "Cx is not finite"

  def matrix():
    for k, level in enumerate(levels):
      operator = corruption.operator(level, image_shape)
      per_channel = int(operator.domain_dimension) == image_shape[0] * image_shape[1]
      flat = x[k].reshape(-1, image_shape[2] if per_channel else 1)
      want = np.reshape(np.float64(products.dense(operator)) @ flat, image_shape)
      same(
        "matrix",
        corruption(x[k : k + 1], level)[0],
        want,
        f"C at level {level:g} is not its own matrix",
      )

  def adjoint():
    left = np.sum(corruption(x, levels) * y, axis=(1, 2, 3))
    right = np.sum(x * corruption.adjoint(y, levels), axis=(1, 2, 3))
    same("adjoint", left, right, "⟨Cx, y⟩ is not ⟨x, Cᵀy⟩")

  def svd():
    for level in levels:  # rank is lost at some
      if int(corruption.operator(level, image_shape).domain_dimension) != x[0, :, :, 0].size:
        return  # an operator that mixes channels has no decomposition of one channel
      try:
        verified(corruption, corruption.svd(level, image_shape), level, image_shape)
      except ValueError as error:
        failures.setdefault("svd", str(error))

  def gradients():
    tensor, level = tf.constant(x), tf.constant(levels)
    with tf.GradientTape() as tape:
      tape.watch([tensor, level])
      total = tf.reduce_sum(corruption(tensor, level) ** 2)
    for part in tape.gradient(total, [tensor, level]):
      if part is not None and not np.all(np.isfinite(part)):
        failures["gradients"] = "not finite"

  def broadcast():
    together = corruption(x, levels)
    alone = tf.concat([corruption(x[k : k + 1], levels[k]) for k in range(n)], 0)
    same("broadcast", together, alone, "one level per image differs from one image at a time")

  def graph():
    images, one = tf.TensorSpec([None, *image_shape]), tf.TensorSpec([])
    for level, spec in ((levels, tf.TensorSpec([None])), (levels[n // 2], one)):
      compiled = tf.function(
        lambda x, level: corruption(x, level), input_signature=[images, spec], autograph=False
      )
      same("graph", compiled(x, level), corruption(x, level), "differs when compiled")

  def float32():
    result = corruption(tf.cast(x, tf.bfloat16), levels)
    if result.dtype != tf.float32:
      failures["float32"] = f"gives {result.dtype.name} for bfloat16 images"

  def config():
    # Through JSON, but by the class at hand: one defined in a notebook cannot be imported by name.
    with trust.trust_code():  # the user's own code, at hand and in use
      again = type(corruption).from_config(json.loads(json.dumps(corruption.get_config())))
    same("config", again(x, levels), corruption(x, levels), "from_config(get_config()) differs")

  def product():
    h, w = image_shape[:2]
    cases = []
    for shape in dict.fromkeys([tuple(image_shape), (h, w, 1), (28, 28, 1)]):
      images = tf.TensorSpec([None, *shape])
      function = tf.function(
        lambda x, level: corruption(x, level),
        autograph=False,
        input_signature=[images, tf.TensorSpec([None])],
      )
      try:
        concrete = function.get_concrete_function()
      except Exception:  # whatever it says of a shape: "graph" says it of the one asked for
        continue
      if faults.multiplies(concrete):
        batch = draw.random([n, *shape], np.float32)
        cases.append((f"on {shape}", concrete, (batch, levels)))
    if cases:
      found = faults.wrong_products(cases)
      if found:
        failures["product"] = (
          f"{'; '.join(found)}; multiply with soft_diffusion_tf.products.two_sided or matmul"
        )

  attempt("product", product)
  if "product" in failures:
    return Verdict(type(corruption).__name__, failures)  # the rest could end this process
  of_linear = (linear, matrix, adjoint, svd) if corruption.linear else ()
  for check in (*of_linear, identity, finite, gradients, broadcast, graph, float32, config):
    attempt(check.__name__, check)
  return Verdict(type(corruption).__name__, failures)
