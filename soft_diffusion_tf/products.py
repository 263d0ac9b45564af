"""Matrix products that keep float32's precision on every device.

A GPU multiplies float32 matrices in TF32 (10 bits of the mantissa), a TPU in one pass of bfloat16
(7 bits), unless the program says otherwise. A network does not mind; an operator does: a sampler
adds the difference of two corrupted images hundreds of times. So everything that is a matrix by
its meaning (corruptions, their adjoints and decompositions, exact denoisers) is multiplied here,
and networks are not.

Compiled by XLA, the product is a dot of precision HIGHEST. Elsewhere it is taken in float64, which
no switch of TensorFlow touches, and which oneDNN's float32 kernels never see (one of them is wrong:
`two_sided`).
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
  """The product a x bᵀ on the rows and columns of images: what a separable corruption does.

  With oneDNN on, TensorFlow 2.21 multiplies float32 [B, 1, M, K] by [1, 1, K, N], which is how one
  writes this for grey images, wrongly or to the process's end. No such product is made here.

  Args:
    a: a matrix [H, H], or one for each image [B, H, H], for the columns of each channel.
    x: images [B, H, W, C].
    b: [W, W] or [B, W, W], the same for the rows.

  Returns:
    [B, H, W, C] of x's dtype.
  """
  x = tf.convert_to_tensor(x)
  a, b = (tf.cast(m, x.dtype) for m in (a, b))
  a, b = (m if m.shape.rank == 3 else m[tf.newaxis] for m in (a, b))
  n, (h, w, c) = tf.shape(x)[0], x.shape[1:]
  c = tf.shape(x)[3] if c is None else c
  rows = matmul(a, tf.reshape(x, [n, h, w * c]))
  if b.shape[0] == 1 and x.shape[3] is not None and x.shape[3] <= 4:
    # One matrix for the whole batch, as in sampling: a single product with bᵀ ⊗ I.
    right = tf.transpose(b[0])[:, tf.newaxis, :, tf.newaxis] * tf.eye(c, dtype=b.dtype)[:, None]
    rows = matmul(tf.reshape(rows, [-1, w * c]), tf.reshape(right, [w * c, w * c]))
    return tf.reshape(rows, [n, h, w, c])
  columns = tf.reshape(tf.transpose(tf.reshape(rows, [n, h, w, c]), [0, 2, 1, 3]), [n, w, h * c])
  return tf.transpose(tf.reshape(matmul(b, columns), [n, w, h, c]), [0, 2, 1, 3])


def svd(matrix):
  """s [..., N], U and V [..., N, N] with matrix = U diag(s) Vᵀ, all float64, for any rank.

  A matrix that loses rank leaves remainders that shrink like 1e-16, 1e-32, ... where it is all
  alike (an average over blocks), until their squares are 0 and reflections are none any more: in
  float32 TensorFlow then gives vectors that are far from orthonormal. So it is float64, and a noise
  below its rounding keeps remainders from being all alike.
  """
  c = tf.cast(matrix, tf.float64)
  noise = tf.random.stateless_normal(tf.shape(c), [1, 2], dtype=tf.float64, alg="philox")
  scale = tf.reduce_max(tf.abs(c), axis=[-2, -1], keepdims=True)
  return tf.linalg.svd(c + 1e-17 * tf.maximum(scale, 1e-30) * noise)


def operate(operator, x, adjoint=False):
  """A `tf.linalg.LinearOperator`, or its adjoint, times x [B, N, K], with dense parts by `matmul`.

  Kinds without a dense product of their own (diagonal, permutation, circulant, ...), inverses and a
  user's own kinds are left to their own `matmul`.
  """
  kinds = tf.linalg
  if isinstance(operator, kinds.LinearOperatorAdjoint):
    return operate(operator.operator, x, not adjoint)
  # A tridiagonal one of TensorFlow's takes no batch of columns.
  if isinstance(
    operator,
    kinds.LinearOperatorFullMatrix
    | kinds.LinearOperatorLowerTriangular
    | kinds.LinearOperatorTridiag,
  ):
    return matmul(operator.to_dense(), x, transpose_a=adjoint)
  if isinstance(operator, kinds.LinearOperatorComposition):
    for factor in operator.operators if adjoint else operator.operators[::-1]:
      x = operate(factor, x, adjoint)
    return x
  if isinstance(operator, kinds.LinearOperatorKronecker):
    # Each factor multiplies an axis of its own; those before it stand in the batch, those after it
    # among the columns.
    batch, columns = tf.shape(x)[0], tf.shape(x)[2]
    rows = batch
    for factor in operator.operators:
      x = operate(factor, tf.reshape(x, [rows, _size(factor, adjoint), -1]), adjoint)
      rows *= _size(factor, not adjoint)
    return tf.reshape(x, [batch, -1, columns])
  if isinstance(operator, kinds.LinearOperatorBlockDiag):
    parts = tf.split(x, [_size(block, adjoint) for block in operator.operators], axis=1)
    return tf.concat([operate(*pair, adjoint) for pair in zip(operator.operators, parts)], 1)
  if isinstance(operator, kinds.LinearOperatorBlockLowerTriangular):
    blocks = operator.operators
    parts = tf.split(x, [_size(row[-1], adjoint) for row in blocks], axis=1)
    order = range(len(blocks))
    taken = lambda i: [(blocks[j][i], j) for j in order[i:]] if adjoint else zip(blocks[i], order)
    return tf.concat(
      [tf.add_n([operate(block, parts[j], adjoint) for block, j in taken(i)]) for i in order], 1
    )
  if isinstance(operator, kinds.LinearOperatorLowRankUpdate):
    left, right = (operator.v, operator.u) if adjoint else (operator.u, operator.v)
    inner = operator.diag_operator.matmul(matmul(right, x, transpose_a=True), adjoint=adjoint)
    return operate(operator.base_operator, x, adjoint) + matmul(left, inner)
  if isinstance(operator, kinds.LinearOperatorHouseholder):
    axis = tf.math.l2_normalize(operator.reflection_axis)[:, tf.newaxis]
    return x - 2.0 * matmul(axis, matmul(axis, x, transpose_a=True))
  return operator.matmul(x, adjoint=adjoint)


def dense(operator):
  """The matrix [N, N] of a `tf.linalg.LinearOperator`: `operate` on the identity."""
  eye = tf.eye(int(operator.domain_dimension), dtype=operator.dtype)
  return operate(operator, eye[tf.newaxis])[0]


def _size(operator, adjoint):
  return int(operator.range_dimension if adjoint else operator.domain_dimension)


# --- Compiled by XLA ------------------------------------------------------------------------------


def _dot(a, b):
  """a b by XLA's dot, on [M, K], [K, N] or, where both sides differ along the batch, on stacks."""
  if a.shape.rank == 2 and b.shape.rank == 2:
    return _stated(a, b)
  lead = tf.broadcast_dynamic_shape(tf.shape(a)[:-2], tf.shape(b)[:-2])
  m, n = tf.shape(a)[-2], tf.shape(b)[-1]
  if a.shape[:-2].num_elements() == 1:  # one a for all b: they stand side by side
    last = b.shape.rank - 2
    side = tf.transpose(b, [last, *range(last), last + 1])
    y = _stated(tf.reshape(a, [m, -1]), tf.reshape(side, [tf.shape(b)[-2], -1]))
    y = tf.reshape(y, tf.concat([[m], tf.shape(b)[:-2], [n]], 0))
    y = tf.transpose(y, [*range(1, last + 1), 0, last + 1])
  elif b.shape[:-2].num_elements() == 1:  # one b for all a: on top of each other
    y = _stated(tf.reshape(a, [-1, tf.shape(a)[-1]]), tf.reshape(b, [-1, n]))
  else:
    stack = lambda x: tf.reshape(
      tf.broadcast_to(x, tf.concat([lead, tf.shape(x)[-2:]], 0)),
      tf.concat([[-1], tf.shape(x)[-2:]], 0),
    )
    y = _stated(stack(a), stack(b))
  y = tf.reshape(y, tf.concat([lead, [m, n]], 0))
  static = tf.broadcast_static_shape(a.shape[:-2], b.shape[:-2])
  y.set_shape(static + [a.shape[-2], b.shape[-1]])  # forward mode has no tf.ensure_shape
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
    a,
    b,
    dimension_numbers=numbers.SerializeToString(),
    precision_config=precision.SerializeToString(),
    preferred_element_type=a.dtype,
  )
  y.set_shape([*a.shape[:-1], b.shape[-1]])
  return y


def _gradient(op, dy):
  """The gradient of a dot that `_stated` made; TensorFlow 2.21 has none for XlaDotV2."""
  a, b = op.inputs
  t = tf.linalg.matrix_transpose
  return _stated(dy, t(b)), _stated(t(a), dy)


with contextlib.suppress(KeyError):  # a TensorFlow that has one of its own
  tf.RegisterGradient("XlaDotV2")(_gradient)
