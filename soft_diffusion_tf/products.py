"""Matrix products that keep float32's precision on every device.

A GPU multiplies float32 matrices in TF32 (10 bits of the mantissa), a TPU in one pass of bfloat16
(7 bits), unless the program says otherwise. A network does not mind; an operator does: a sampler
adds the difference of two corrupted images hundreds of times. So everything that is a matrix by
its meaning (corruptions, their adjoints and decompositions, exact denoisers, transport costs,
kernels of a metric) is multiplied here, and networks are not.

Compiled by XLA, the product is a dot of precision HIGHEST. Elsewhere it is taken in float64, which
no switch of TensorFlow touches (and which oneDNN's float32 kernels never see).
"""

import contextlib

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.python.ops import control_flow_util


def compiled():
  """Whether what is being traced is for XLA (`jit_compile=True`, a TPU), not for TensorFlow."""
  return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def matmul(a, b, transpose_a=False, transpose_b=False):
  """The matrix product a b with float32's precision or better: [..., M, K], [..., K, N].

  Args:
    a, b: float32 or float64, both alike. Leading axes broadcast, as in `tf.matmul`.
    transpose_a, transpose_b: swap the last two axes first.

  Returns:
    [..., M, N] of the same dtype; gradients of any order and forward mode are those of the product.
  """
  a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
  if transpose_a:
    a = tf.linalg.matrix_transpose(a)
  if transpose_b:
    b = tf.linalg.matrix_transpose(b)
  if compiled():
    return _dot(a, b)
  return tf.cast(tf.matmul(tf.cast(a, tf.float64), tf.cast(b, tf.float64)), a.dtype)


def two_sided(a, x, b):
  """The product a x bᵀ on the rows and columns of images, for matrices that act on both axes.

  Args:
    a: [B or 1, H, H] or [H, H], multiplies the columns of each channel (along the height).
    x: images [B, H, W, C].
    b: [B or 1, W, W] or [W, W], the same along the width.

  Returns:
    [B, H, W, C].
  """
  a, b = (m if m.shape.rank == 3 else m[tf.newaxis] for m in map(tf.convert_to_tensor, (a, b)))
  n, h, w, c = tf.unstack(tf.shape(x))
  rows = matmul(a, tf.reshape(x, [n, h, w * c]))
  if b.shape[0] == 1 and x.shape[3] is not None and x.shape[3] <= 4:
    # One matrix for the whole batch, as in sampling: a single product with bᵀ ⊗ I.
    eye = tf.eye(x.shape[3], dtype=b.dtype)
    right = tf.transpose(b[0])[:, tf.newaxis, :, tf.newaxis] * eye[:, tf.newaxis, :]
    rows = matmul(tf.reshape(rows, [-1, w * c]), tf.reshape(right, [w * c, w * c]))
    return tf.reshape(rows, [n, h, w, c])
  columns = tf.reshape(tf.transpose(tf.reshape(rows, [n, h, w, c]), [0, 2, 1, 3]), [n, w, h * c])
  return tf.transpose(tf.reshape(matmul(b, columns), [n, w, h, c]), [0, 2, 1, 3])


# --- Compiled by XLA ------------------------------------------------------------------------------


def _dot(a, b):
  """a b by XLA's dot, on [M, K], [K, N] or, where both sides differ along the batch, on stacks."""
  if a.shape.rank == 2 and b.shape.rank == 2:
    return _stated(a, b)
  lead = tf.broadcast_static_shape(a.shape[:-2], b.shape[:-2])
  dynamic = tf.broadcast_dynamic_shape(tf.shape(a)[:-2], tf.shape(b)[:-2])
  m, n = tf.shape(a)[-2], tf.shape(b)[-1]
  if a.shape[:-2].num_elements() == 1:  # one a for all b: they stand side by side
    last = b.shape.rank - 2
    side = tf.transpose(b, [last, *range(last), last + 1])
    y = _stated(tf.reshape(a, [m, -1]), tf.reshape(side, [tf.shape(b)[-2], -1]))
    y = tf.reshape(y, tf.concat([[m], tf.shape(b)[:-2], [n]], 0))
    y = tf.transpose(y, [*range(1, last + 1), 0, last + 1])
  elif b.shape[:-2].num_elements() == 1:
    y = _stated(tf.reshape(a, [-1, tf.shape(a)[-1]]), tf.reshape(b, [-1, n]))
  else:
    stack = lambda x: tf.reshape(
      tf.broadcast_to(x, tf.concat([dynamic, tf.shape(x)[-2:]], 0)),
      tf.concat([[-1], tf.shape(x)[-2:]], 0),
    )
    y = _stated(stack(a), stack(b))
  y = tf.reshape(y, tf.concat([dynamic, [m, n]], 0))
  y.set_shape(lead + [a.shape[-2], b.shape[-1]])  # forward mode has no tf.ensure_shape
  return y


def _stated(a, b):
  """XLA's dot with the precision HIGHEST: [M, K], [K, N] or [B, M, K], [B, K, N]."""
  batch = range(a.shape.rank - 2)
  numbers = xla_data_pb2.DotDimensionNumbers(
    lhs_contracting_dimensions=[a.shape.rank - 1],
    rhs_contracting_dimensions=[b.shape.rank - 2],
    lhs_batch_dimensions=batch,
    rhs_batch_dimensions=batch,
  )
  highest = xla_data_pb2.PrecisionConfig.HIGHEST
  precision = xla_data_pb2.PrecisionConfig(operand_precision=[highest, highest])
  y = gen_xla_ops.xla_dot_v2(
    a, b,
    dimension_numbers=numbers.SerializeToString(),
    precision_config=precision.SerializeToString(),
    preferred_element_type=a.dtype,
  )  # fmt: skip
  y.set_shape([*a.shape[:-1], b.shape[-1]])
  return y


def _gradient(op, dy):
  """The gradient of a dot that `_stated` made; TensorFlow 2.21 has none for XlaDotV2."""
  a, b = op.inputs
  t = tf.linalg.matrix_transpose
  return _stated(dy, t(b)), _stated(t(a), dy)


with contextlib.suppress(KeyError):  # a TensorFlow that has one of its own
  tf.RegisterGradient("XlaDotV2")(_gradient)
