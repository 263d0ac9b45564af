"""What a GPU (TF32) or a TPU (one bfloat16 pass) makes of float32 products, on a CPU."""

import contextlib

import tensorflow as tf
from tensorflow.python.ops import gen_linalg_ops, gen_math_ops, gen_nn_ops

from soft_diffusion_tf import laboratory

_PRODUCTS = (  # (module, function, its number of leading operands or None where they are a list)
  (gen_math_ops, "mat_mul", 2),
  (gen_math_ops, "batch_mat_mul", 2),
  (gen_math_ops, "batch_mat_mul_v2", 2),
  (gen_math_ops, "batch_mat_mul_v3", 2),
  (gen_linalg_ops, "einsum", None),
  (gen_nn_ops, "conv2d", 2),
)


@contextlib.contextmanager
def products(kind):
  """Inside, the float32 operands of every product that is made or traced are rounded to `kind`."""

  def short(value):
    value = tf.convert_to_tensor(value)
    if value.dtype != tf.float32:
      return value
    # A device rounds what it multiplies and knows no derivative of that. The difference is exact.
    return value + tf.stop_gradient(laboratory.rounded(value, kind) - value)

  def emulated(function, count):
    def product(*args, **kwargs):
      if count is None:
        inputs = kwargs.pop("inputs", None)
        inputs, args = (args[0], args[1:]) if inputs is None else (inputs, args)
        return function([short(v) for v in inputs], *args, **kwargs)
      return function(*map(short, args[:count]), *args[count:], **kwargs)

    return product

  before = [(module, name, getattr(module, name)) for module, name, _ in _PRODUCTS]
  for (module, name, count), (_, _, function) in zip(_PRODUCTS, before):
    setattr(module, name, emulated(function, count))
  try:
    yield
  finally:
    for module, name, function in before:
      setattr(module, name, function)
