"""Entropic optimal transport between weighted point clouds, on any device, in bounded memory.

Minimises <P, C> + ε KL(P ‖ a bᵀ) over the couplings P of the weights a and b (Cuturi 2013; Peyré &
Cuturi 2019, ch. 4). The solution is P_ij = exp((f_i + g_j − C_ij) / ε), so it is carried by two
vectors, the potentials f and g, and the matrix need never exist.

How it is fast and still safe:

- Sinkhorn's iteration is a map g → T(g) whose fixed point is sought. Anderson's mixing of the last
  few iterates takes a third to a tenth of the iterations. The L1 error of the marginals never
  grows under T itself, so a mixed iterate that makes it grow is dropped for the plain T(g): the
  convergence guarantee is Sinkhorn's own.
- If the matrix fits in memory, the iteration runs on scalings: two matrix-vector products with a
  kernel K whose rows sum to 1 at reference potentials. Once the scalings leave the range that the
  number format bears, they are absorbed in the potentials and K is made anew in the log domain
  (Schmitzer 2019). If it does not fit, chunks of rows of the cost are made, used and forgotten.
- Vectors are float64 throughout: they cost nothing, and ε-sized changes of large potentials count.

Inside, potentials F and G belong to the weighted form P = a_i b_j exp((F_i + G_j − C_ij) / ε),
which stays finite for points of weight zero; outside, f = F + ε log a and g = G + ε log b.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Bytes of cost and kernel together that chunk=None keeps in memory.
_STORE_LIMIT = 2**30
# Numbers per chunk of rows: of a stored matrix, so few that what is made of them stays in a
# processor's cache; of a streamed one, enough for an efficient product.
_CACHED = 2**20
_STREAMED = 2**24
# Differences that the mixing remembers: hard problems take twice the steps with 5, as many with 20.
_MEMORY = 10
# Ridge of the mixing's least squares, relative to the trace.
_RIDGE = 1e-13
# Marginal error at which ε-scaling goes on to the next ε.
_STAGE_THRESHOLD = 0.1
# Largest tolerated rounding error of the exponents C / ε.
_ROUNDING = 0.05
# How far weights may sum from 1 before they are taken for a mistake.
_MASS = 1e-3


class SinkhornResult(NamedTuple):
  """The solution of one problem; scalars are tensors of rank 0.

  Attributes:
    f: potentials of x, [n], in units of the cost; P_ij = exp((f_i + g_j − C_ij) / ε). Unique up to
      a constant that moves from f to g; −∞ where the weight is 0.
    g: potentials of y, [m].
    epsilon: ε, in units of the cost.
    reg_ot_cost: <P, C> + ε KL(P ‖ a bᵀ), by its dual, from below; it is off by at most `error`
      times the error of g, so by the second order.
      Differentiable in points, weights and cost matrix, with ε held fixed.
    transport_cost: <P, C>; its error is of first order in `error`. Not differentiable.
    missed_cost: <g, b − Pᵀ1>, the missed marginals at their dual prices: added to transport_cost
      it leaves an error of second order in `error`, and one of first order that is ε times small.
    error: L1 distance of P's marginals from a and b.
    iterations: Sinkhorn iterations made, int32.
    converged: whether `error` is below the threshold.
  """

  f: tf.Tensor
  g: tf.Tensor
  epsilon: tf.Tensor
  reg_ot_cost: tf.Tensor
  transport_cost: tf.Tensor
  missed_cost: tf.Tensor
  error: tf.Tensor
  iterations: tf.Tensor
  converged: tf.Tensor


class SinkhornDivergence(NamedTuple):
  """The debiased divergence and the three problems it is made of.

  Attributes:
    divergence: reg(x, y) − ½ reg(x, x) − ½ reg(y, y), rank 0, differentiable.
    converged: whether all three problems have converged.
    xy, xx, yy: their `SinkhornResult`s, all with the ε of xy.
  """

  divergence: tf.Tensor
  converged: tf.Tensor
  xy: SinkhornResult
  xx: SinkhornResult
  yy: SinkhornResult


# ---------------------------------------------------------------------------------------------
# The solver. `source` is (cost,) when the matrix is stored and (left, right), whose product it is,
# when it is streamed; C_ij is read through `_rows` alone.


def _source_spec(dtype, product):
  return (tf.TensorSpec([None, None], dtype),) * (2 if product else 1)


def _rows(source, start, count):
  """Rows start … start + count of the cost matrix, [≤ count, m]."""
  part = source[0][start : start + count]
  if len(source) == 1:
    return part
  return tf.maximum(tf.matmul(part, source[1], transpose_b=True), 0)


def _over_rows(source, chunk, body, state):
  """Folds body(start, costs, *state) over all chunks of rows; one chunk is alive at a time."""
  size = tf.shape(source[0])[0]

  def step(start, *state):
    return (start + chunk, *body(start, _rows(source, start, chunk), *state))

  return tf.while_loop(
    lambda start, *_: start < size, step, (tf.constant(0), *state), parallel_iterations=1
  )[1:]


def _rows_array(dtype, shape):
  """A TensorArray of chunks, to be joined along their rows."""
  return tf.TensorArray(dtype, 0, dynamic_size=True, infer_shape=False, element_shape=shape)


def _sweep(source, chunk, a, b, g, epsilon, keep):
  """One log-domain pass over the cost: everything that follows from the column potentials.

  Args:
    keep: whether to return the kernel.

  Returns:
    F: float64 [n], the potentials that make the row sums of P exact given G.
    mass: float64 [m], the column sums of that P.
    transport: float64, <P, C>.
    kernel: [n, m], rows P_i· / a_i, which sum to 1 (only with keep, else empty).
  """
  dtype = source[0].dtype
  columns = tf.cast(g / epsilon + tf.math.log(b), dtype)
  inverse = tf.cast(1 / epsilon, dtype)

  def body(start, cost, number, f, kernel, mass, transport):
    weights = a[start : start + chunk]
    exponent = columns - cost * inverse
    top = tf.reduce_max(exponent, axis=1, keepdims=True)
    plan = tf.exp(exponent - top)
    total = tf.reduce_sum(plan, axis=1, keepdims=True)
    plan /= total
    f = f.write(number, -epsilon * tf.cast((top + tf.math.log(total))[:, 0], tf.float64))
    row_weights = tf.cast(weights, dtype)
    mass += tf.cast(tf.linalg.matvec(plan, row_weights, transpose_a=True), tf.float64)
    if keep:
      kernel = kernel.write(number, plan)
    else:
      row_costs = tf.cast(tf.reduce_sum(plan * cost, axis=1), tf.float64)
      transport += tf.reduce_sum(weights * row_costs)
    return number + 1, f, kernel, mass, transport

  state = (
    tf.constant(0),
    _rows_array(tf.float64, [None]),
    _rows_array(dtype, [None, None]),
    tf.zeros_like(b),
    tf.constant(0, tf.float64),
  )
  _, f, kernel, mass, transport = _over_rows(source, chunk, body, state)
  return f.concat(), mass, transport, kernel.concat() if keep else tf.zeros([0, 0], dtype)


def _column_potentials(source, chunk, a, f, epsilon):
  """The G that makes the column sums exact given F, float64 [m], without underflow."""
  dtype = source[0].dtype
  rows = tf.cast(f / epsilon + tf.math.log(a), dtype)
  inverse = tf.cast(1 / epsilon, dtype)

  def body(start, cost, top, total):
    exponent = rows[start : start + chunk, None] - cost * inverse
    new_top = tf.maximum(top, tf.reduce_max(exponent, axis=0))
    total *= tf.exp(top - new_top)
    return new_top, total + tf.reduce_sum(tf.exp(exponent - new_top), axis=0)

  columns = tf.shape(source[-1])[0 if len(source) == 2 else 1]
  top = tf.fill([columns], dtype.min)
  top, total = _over_rows(source, chunk, body, (top, tf.zeros_like(top)))
  return -epsilon * tf.cast(top + tf.math.log(total), tf.float64)


def _ratio(target, value):
  """target / value, and 1 where the target is 0 (points without weight)."""
  empty = tf.cast(tf.equal(target, 0), target.dtype)
  return (target + empty) / (value + empty)


def _anderson(step, size, threshold, budget, limit):
  """Seeks the fixed point of a map T on vectors h, from h = 0, by safeguarded Anderson mixing.

  Args:
    step: h → (T(h), error of h). T may not increase the error.
    size: length of h.
    threshold: error below which h is good enough.
    budget: largest number of steps.
    limit: largest |h_i| that step bears; mixing never leaves it, T may, and then the loop ends.

  Returns:
    h, the number of steps, and whether the error of h is below the threshold.
  """
  ridge = _RIDGE * tf.eye(_MEMORY, dtype=tf.float64)

  def remember(history, new, fresh):
    """Appends; a fresh history is all copies of the new vector, whose differences vanish."""
    return tf.where(fresh, new[None], tf.concat([history[1:], new[None]], axis=0))

  def body(count, h, error, plain, points, residuals, fresh, _done, _inside):
    image, new_error = step(h)
    done = new_error < threshold
    rejected = ~(new_error <= error)  # also for NaN
    points = remember(points, h, fresh)
    residuals = remember(residuals, image - h, fresh)
    d_residuals = residuals[1:] - residuals[:-1]
    d_images = points[1:] - points[:-1] + d_residuals
    gram = tf.matmul(d_residuals, d_residuals, transpose_b=True)
    gram += ridge * (tf.linalg.trace(gram) + 1e-280)  # solvable also when fresh, with weights 0
    weights = tf.linalg.solve(gram, tf.linalg.matvec(d_residuals, image - h)[:, None])
    mixed = image - tf.reduce_sum(weights * d_images, axis=0)
    plain = tf.where(rejected, plain, image)
    good = tf.logical_and(~rejected, tf.reduce_max(tf.abs(mixed)) <= limit)
    proposal = tf.where(good, mixed, plain)
    inside = tf.reduce_max(tf.abs(proposal)) <= limit
    error = tf.where(rejected, tf.constant(np.inf, tf.float64), new_error)
    h = tf.where(done, h, proposal)
    return count + 1, h, error, plain, points, residuals, rejected, done, inside

  zeros = tf.zeros([size], tf.float64)
  history = tf.zeros([_MEMORY + 1, size], tf.float64)
  state = (
    tf.constant(0),
    zeros,
    tf.constant(np.inf, tf.float64),
    zeros,
    history,
    history,
    tf.constant(True),
    tf.constant(False),
    tf.constant(True),
  )
  count, h, _, plain, _, _, _, done, _ = tf.while_loop(
    lambda count, *state: (count < budget) & ~state[-2] & state[-1], body, state
  )
  # Out of budget, h may be a mixed iterate that nobody has tried yet; the plain one is safe.
  return tf.where(done, h, plain), count, done


@functools.cache
def _solver(dtype, product, stored, symmetric):
  """One tf.function per kind of problem, with shapes left open: new values never retrace it.

  Args:
    product: whether the source is (left, right) rather than (cost,).
    stored: whether the kernel may be kept in memory.
    symmetric: whether y is x and b is a: averaged updates of one potential (Feydy et al. 2019).
  """
  limit = 30.0 if dtype == tf.float32 else 200.0  # of log scalings: products of two stay finite
  vector = tf.TensorSpec([None], tf.float64)
  scalar = tf.TensorSpec([], tf.float64)
  integer = tf.TensorSpec([], tf.int32)
  signature = [_source_spec(dtype, product), vector, vector, vector]
  signature += [tf.TensorSpec([], tf.bool)] + [scalar] * 4 + [integer] * 2

  @tf.function(input_signature=signature)
  def solve(source, a, b, g, cold, epsilon, first_epsilon, scaling, threshold, budget, chunk):
    sweep = functools.partial(_sweep, source, chunk, a, b)

    def underflows(mass):
      return tf.reduce_any(mass < np.exp(-limit) * b)

    def streamed_round(g, epsilon, target, left):
      """From column potentials towards better ones, reading the cost once per iteration."""

      def step(h):
        f, mass, _, _ = sweep(g + epsilon * h, epsilon, keep=False)
        if symmetric:
          gap = h + (g - f) / epsilon
          return h - gap / 2, tf.reduce_sum(a * tf.abs(tf.math.expm1(gap)))
        image = tf.cond(
          underflows(mass),
          lambda: (_column_potentials(source, chunk, a, f, epsilon) - g) / epsilon,
          lambda: h + tf.math.log(_ratio(b, mass)),
        )
        return image, tf.reduce_sum(tf.abs(mass - b))

      h, count, done = _anderson(step, tf.size(g), target, left, np.inf)
      return g + epsilon * h, count, done

    def stored_round(g, epsilon, target, left):
      """The same on scalings of a kernel, until the scalings need absorbing."""
      f, mass, _, kernel = sweep(g, epsilon, keep=True)

      def step(h):
        row_sums = tf.cast(tf.linalg.matvec(kernel, tf.cast(tf.exp(h), dtype)), tf.float64)
        if symmetric:
          gap = h + (g - f) / epsilon + tf.math.log(row_sums)
          return h - gap / 2, tf.reduce_sum(a * tf.abs(tf.math.expm1(gap)))
        rows = tf.cast(a / row_sums, dtype)
        sums = tf.cast(tf.linalg.matvec(kernel, rows, transpose_a=True), tf.float64)
        return tf.math.log(_ratio(b, sums)), tf.reduce_sum(tf.abs(tf.exp(h) * sums - b))

      def on_scalings():
        h, count, done = _anderson(step, tf.size(g), target, left, limit)
        return g + epsilon * h, count, done

      def in_log_domain():
        return _column_potentials(source, chunk, a, f, epsilon), tf.constant(1), tf.constant(False)

      return on_scalings() if symmetric else tf.cond(underflows(mass), in_log_domain, on_scalings)

    one_round = stored_round if stored else streamed_round

    def body(g, now, count, _stop):
      last = now <= epsilon
      # Slightly below the threshold, so that the rounding of potentials doesn't lift it above.
      target = tf.where(last, 0.8 * threshold, tf.maximum(threshold, _STAGE_THRESHOLD))
      g, more, done = one_round(g, now, target, budget - count)
      following = tf.where(done, tf.maximum(epsilon, scaling * now), now)
      return g, following, count + more, last & done

    first_epsilon = tf.maximum(epsilon, first_epsilon)
    if not symmetric:  # a cold start is F = 0 and the G that follows, as everywhere else: where the
      # kernel underflows, potentials keep the memory of their start, and comparisons want the same
      zeros = tf.zeros_like(a)
      first = lambda: _column_potentials(source, chunk, a, zeros, first_epsilon)
      g = tf.cond(cold, first, lambda: g)
    g, _, count, _ = tf.while_loop(
      lambda g, now, count, stop: ~stop & (count < budget),
      body,
      (g, first_epsilon, tf.constant(0), tf.constant(False)),
    )
    f, mass, transport, _ = sweep(g, epsilon, keep=False)
    value = tf.reduce_sum(a * f) + tf.reduce_sum(b * g)
    missed = tf.reduce_sum(tf.where(b > 0, g * (b - mass), 0))
    if symmetric:
      error = tf.reduce_sum(a * tf.abs(tf.math.expm1((g - f) / epsilon)))
      f = g = (f + g) / 2
    else:
      error = tf.reduce_sum(tf.abs(mass - b))
    return f, g, value, transport, missed, error, count

  return solve.get_concrete_function()


# ---------------------------------------------------------------------------------------------
# Cost matrices and their gradients.


def _factors(x, y):
  """left [n, d + 2] and right [m, d + 2] with left rightᵀ = squared distances: one product."""
  centre = (tf.reduce_mean(x, axis=0) + tf.reduce_mean(y, axis=0)) / 2  # large offsets cancel here
  x, y = x - centre, y - centre
  x_norms = tf.einsum("ij,ij->i", x, x)[:, None]  # without the copy that x * x would be
  y_norms = tf.einsum("ij,ij->i", y, y)[:, None]
  left = tf.concat([-2 * x, x_norms, tf.ones_like(x_norms)], axis=1)
  return left, tf.concat([y, tf.ones_like(y_norms), y_norms], axis=1)


@functools.cache
def _statistics(dtype, product):
  """tf.function: source, chunk → mean, standard deviation and largest magnitude of the cost."""

  @tf.function(input_signature=[_source_spec(dtype, product), tf.TensorSpec([], tf.int32)])
  def statistics(source, chunk):
    shift = tf.reduce_mean(_rows(source, 0, 1))  # near the mean, so that squares don't cancel

    def body(_start, cost, number, total, squares, largest):
      shifted = cost - shift
      total += tf.cast(tf.reduce_sum(shifted), tf.float64)
      squares += tf.cast(tf.reduce_sum(shifted * shifted), tf.float64)
      number += tf.cast(tf.size(cost), tf.float64)
      return number, total, squares, tf.maximum(largest, tf.reduce_max(tf.abs(cost)))

    zero = tf.constant(0, tf.float64)
    state = (zero, zero, zero, tf.constant(0, dtype))
    number, total, squares, largest = _over_rows(source, chunk, body, state)
    mean = total / number
    std = tf.sqrt(tf.maximum(squares / number - mean**2, 0))
    return mean + tf.cast(shift, tf.float64), std, tf.cast(largest, tf.float64)

  return statistics.get_concrete_function()


@functools.cache
def _point_gradients(dtype, product):
  """tf.function: gradients of <P, C> at fixed P_ij = exp(r_i + c_j − C_ij / ε) in x and y.

  In x_i it is 2 Σ_j P_ij (x_i − y_j), and alike in y_j.
  """
  matrix = tf.TensorSpec([None, None], dtype)
  vector = tf.TensorSpec([None], dtype)
  signature = [_source_spec(dtype, product), tf.TensorSpec([], tf.int32), matrix, matrix]
  signature += [vector, vector, tf.TensorSpec([], dtype)]

  @tf.function(input_signature=signature)
  def gradients(source, chunk, x, y, log_rows, log_columns, epsilon):
    def body(start, cost, number, x_part, y_part, column_sums):
      plan = tf.exp(log_rows[start : start + chunk, None] + log_columns - cost / epsilon)
      points = x[start : start + chunk]
      row_sums = tf.reduce_sum(plan, axis=1, keepdims=True)
      x_part = x_part.write(number, row_sums * points - tf.matmul(plan, y))
      y_part -= tf.matmul(plan, points, transpose_a=True)
      return number + 1, x_part, y_part, column_sums + tf.reduce_sum(plan, axis=0)

    x_part = _rows_array(dtype, [None, None])
    state = (tf.constant(0), x_part, tf.zeros_like(y), tf.zeros_like(log_columns))
    _, x_part, y_part, column_sums = _over_rows(source, chunk, body, state)
    return 2 * x_part.concat(), 2 * (column_sums[:, None] * y + y_part)

  return gradients.get_concrete_function()


def _differentiable(value, inputs, gradients):
  """`value` with given gradients in the inputs: gradients() is called only if a tape asks."""

  @tf.custom_gradient
  def attach(*_):
    def scaled(upstream):
      return [tf.cast(upstream, part.dtype) * part for part in gradients()]

    return tf.identity(value), scaled

  return attach(*inputs)


# ---------------------------------------------------------------------------------------------
# The public edge: everything is checked here and nowhere else. Values (not shapes) can be looked at
# in eager mode only; inside a tf.function these checks are left to the caller.


def _matrix(value, name, dtype):
  value = tf.cast(value, dtype)
  if value.shape.rank != 2 or None in value.shape or 0 in value.shape:
    raise ValueError(
      f"{name} must be a matrix of known, positive size, not {value.shape}: flatten each point to "
      "one row"
    )
  if tf.executing_eagerly():
    # NaN and infinity survive a sum, and a product with ones reads the matrix without a copy.
    sums = tf.linalg.matvec(value, tf.ones(value.shape[1], dtype)).numpy()
    bad = np.flatnonzero(~np.isfinite(sums))
    if bad.size:
      raise ValueError(
        f"{name} holds NaN, infinity or overflowing values in {bad.size} of {sums.size} rows, "
        f"first in row {bad[0]}: remove or repair them"
      )
  return value


def _weights(value, name, size):
  """Weights as float64 that sum to 1 exactly; uniform if None."""
  if value is None:
    return tf.fill([size], tf.constant(1 / size, tf.float64))
  value = tf.cast(value, tf.float64)
  if value.shape != (size,):
    raise ValueError(f"{name} has shape {value.shape}: pass one weight per point, shape ({size},)")
  if tf.executing_eagerly():
    lowest, total = float(tf.reduce_min(value)), float(tf.reduce_sum(value))
    if not (lowest >= 0 and abs(total - 1) <= _MASS):
      raise ValueError(
        f"{name} has the sum {total:.6g} and the smallest weight {lowest:.6g}: weights must be "
        f"non-negative and sum to 1; divide by their sum"
      )
  return value / tf.reduce_sum(value)


def _scalar(value):
  return tf.cast(value, tf.float64) if tf.is_tensor(value) else tf.constant(value, tf.float64)


def _check_options(epsilon, relative_epsilon, threshold, max_iterations, scaling, chunk):
  if epsilon is None and relative_epsilon not in ("std", "mean"):
    raise ValueError(
      f"relative_epsilon={relative_epsilon!r} without epsilon: pass 'std', 'mean' or an epsilon"
    )
  if scaling is not None and not 0 < scaling < 1:
    raise ValueError(f"scaling={scaling} must lie between 0 and 1 (try 0.25), or be None")
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk} must be a positive number of rows, or None")
  if not tf.is_tensor(threshold) and not threshold > 0:
    raise ValueError(f"threshold={threshold} must be positive: it bounds the marginals' L1 error")
  if not tf.is_tensor(max_iterations) and max_iterations < 1:
    raise ValueError(f"max_iterations={max_iterations} must be at least 1")


def _check_epsilon(epsilon, largest, dtype, relative):
  if not tf.executing_eagerly():
    return
  epsilon, largest = float(epsilon), float(largest)
  if not (epsilon > 0 and np.isfinite(epsilon)):
    cause = f" (0.05 times the {relative} of the costs)" if relative else ""
    raise ValueError(f"epsilon={epsilon:.6g}{cause} must be positive and finite: pass epsilon=")
  rounding = largest * np.finfo(dtype.as_numpy_dtype).eps
  if rounding > _ROUNDING * epsilon:
    other = "dtype=tf.float64 or " if dtype == tf.float32 else ""
    raise ValueError(
      f"epsilon={epsilon:.6g} is too small for {dtype.name}: costs up to {largest:.6g} are rounded "
      f"by {rounding:.2g}; use {other}epsilon of at least {rounding / _ROUNDING:.2g}"
    )


def _working_dtype(dtype, *values):
  if dtype is None:
    given = [getattr(value, "dtype", None) for value in values if value is not None]
    dtype = tf.float64 if any(d is not None and d == tf.float64 for d in given) else tf.float32
  dtype = tf.as_dtype(dtype)
  if dtype not in (tf.float32, tf.float64):
    raise ValueError(f"dtype={dtype.name} is not precise enough: use float32 or float64")
  return dtype


def _inside(dtype):
  """The dtype to work in for a result of `dtype`: a GPU's float32 products are not float32's."""
  return tf.float64 if tf.config.get_visible_devices("GPU") else dtype


def sinkhorn(
  x=None,
  y=None,
  a=None,
  b=None,
  *,
  epsilon=None,
  relative_epsilon="std",
  cost=None,
  init=None,
  threshold=1e-3,
  max_iterations=2000,
  scaling=None,
  chunk=None,
  dtype=None,
):
  """Solves the entropic transport problem min over P of <P, C> + ε KL(P ‖ a bᵀ).

  Args:
    x: points [n, d]. Left out if `cost` is given.
    y: points [m, d]; C_ij is the squared Euclidean distance ‖x_i − y_j‖². None transports x to
      itself, with b = a, by a faster solver for the symmetric problem.
    a: weights of x, [n], non-negative with sum 1; None for uniform. float64 inside.
    b: weights of y, [m].
    epsilon: ε in units of the cost; None takes it relative to the costs.
    relative_epsilon: "std" (0.05 times the unweighted standard deviation of C's entries, the
      default of ott-jax) or "mean" (0.05 times their mean); without effect if epsilon is given.
    cost: the matrix C, [n, m], instead of points.
    init: potentials (f, g) to start from, of a similar problem or of `identity_potentials`. Only g
      is needed (f follows from it), so f may be None.
    threshold: L1 error of the marginals at which the iteration ends.
    max_iterations: largest number of iterations; see `converged` of the result.
    scaling: factor in (0, 1) by which ε falls from the largest cost to its value (ε-scaling), for
      an ε far below the costs and no good start; None starts at ε.
    chunk: rows of C that are in memory at a time: they are made anew in every iteration. None
      stores C if C and one matrix of its size take at most 1 GiB, and else picks a chunk. Memory
      in use is about 5 chunks.
    dtype: tf.float32 or tf.float64, of the matrices and the result; None for float64 if x, y or
      cost are, else float32. Where TensorFlow sees a GPU the matrices are float64 in any case: it
      would multiply float32 ones in TF32, whose 10 bits no cost survives.

  Returns:
    A `SinkhornResult`.

  Raises:
    ValueError: for NaN or infinity in the input, weights that don't sum to 1, shapes that don't
      match, or an ε that the dtype cannot resolve next to the costs.

  Sources: Cuturi 2013; Peyré & Cuturi 2019, ch. 4; Feydy et al. 2019 (symmetric update); Anderson
  1965; Schmitzer 2019 (absorption, ε-scaling).
  """
  _check_options(epsilon, relative_epsilon, threshold, max_iterations, scaling, chunk)
  dtype_out = _working_dtype(dtype, x, y, cost)
  dtype = _inside(dtype_out)
  symmetric = y is None and cost is None
  if (x is None) == (cost is None) or (cost is not None and y is not None):
    raise ValueError("pass either the points x and y, or cost (and neither x nor y)")
  if cost is not None:
    cost = _matrix(cost, "cost", dtype)
    n, m = cost.shape
  else:
    x = _matrix(x, "x", dtype)
    y = x if symmetric else _matrix(y, "y", dtype)
    n, m = x.shape[0], y.shape[0]
    if x.shape[1] != y.shape[1]:
      raise ValueError(f"x has {x.shape[1]} numbers per point and y has {y.shape[1]}: must agree")
  a = _weights(a, "a", n)
  if symmetric and b is not None:
    raise ValueError("b is given without y: pass y=x to transport x to itself with other weights")
  b = a if symmetric else _weights(b, "b", m)

  stored = chunk is None and 2 * n * m * dtype.size <= _STORE_LIMIT
  if chunk is None:
    rows = (_CACHED if stored or cost is not None else _STREAMED) // m
    chunk = max(16, rows // 16 * 16)  # whole cache lines, so that a slice of rows needs no copy
  fixed = [None if t is None else tf.stop_gradient(t) for t in (x, y, a, b, cost)]
  x_fixed, y_fixed, a_fixed, b_fixed, source = fixed
  if cost is None:
    source = _factors(x_fixed, y_fixed)
    if stored:
      source = (_rows(source, 0, n),)
  else:
    source = (source,)
  product = len(source) == 2

  if epsilon is None or not product:
    mean, std, largest = _statistics(dtype, product)(source, tf.constant(chunk))
  else:  # |x − y|² ≤ 2 (|x|² + |y|²), without a pass over the costs
    left, right = source
    largest = 2 * (tf.reduce_max(left[:, -2]) + tf.reduce_max(right[:, -1]))
    largest = tf.cast(largest, tf.float64)
  relative = relative_epsilon if epsilon is None else None
  if epsilon is None:
    epsilon = 0.05 * (std if relative == "std" else mean)
  epsilon = tf.stop_gradient(_scalar(epsilon))
  _check_epsilon(epsilon, largest, dtype, relative)

  start = tf.zeros_like(b_fixed)
  if init is not None:
    g = tf.cast(init[1], tf.float64)
    if g.shape != (m,):
      raise ValueError(f"init's g has shape {g.shape}: pass one potential per column, ({m},)")
    start = tf.stop_gradient(tf.where(b_fixed > 0, g - epsilon * tf.math.log(b_fixed), 0))
    if tf.executing_eagerly() and not np.isfinite(start).all():
      raise ValueError("init's g holds NaN or infinity where b > 0: leave init out to start anew")

  f, g, value, transport, missed, error, iterations = _solver(dtype, product, stored, symmetric)(
    source,
    a_fixed,
    b_fixed,
    start,
    tf.constant(init is None),
    epsilon,
    epsilon if scaling is None else largest,
    _scalar(1.0 if scaling is None else scaling),
    _scalar(threshold),
    tf.constant(max_iterations),
    tf.constant(chunk),
  )

  def weight_gradients():  # a and b are normalised, so that only changes along the simplex count
    return [f - tf.reduce_sum(a_fixed * f), g - tf.reduce_sum(b_fixed * g)]

  log_rows = tf.cast(f / epsilon + tf.math.log(a_fixed), dtype)
  log_columns = tf.cast(g / epsilon + tf.math.log(b_fixed), dtype)
  small = tf.cast(epsilon, dtype)
  if cost is not None:

    def gradients():
      plan = tf.exp(log_rows[:, None] + log_columns - source[0] / small)
      return [plan, *weight_gradients()]

    value = _differentiable(tf.cast(value, dtype), (cost, a, b), gradients)
  else:

    def gradients():
      arguments = (source, tf.constant(chunk), x_fixed, y_fixed, log_rows, log_columns, small)
      return [*_point_gradients(dtype, product)(*arguments), *weight_gradients()]

    value = _differentiable(tf.cast(value, dtype), (x, y, a, b), gradients)

  as_asked = lambda value: tf.cast(value, dtype_out)
  return SinkhornResult(
    f=as_asked(f + epsilon * tf.math.log(a_fixed)),
    g=as_asked(g + epsilon * tf.math.log(b_fixed)),
    epsilon=as_asked(epsilon),
    reg_ot_cost=as_asked(value),
    transport_cost=as_asked(transport),
    missed_cost=as_asked(missed),
    error=as_asked(error),
    iterations=iterations,
    converged=error < _scalar(threshold),
  )


def sinkhorn_divergence(
  x, y, a=None, b=None, *, epsilon=None, relative_epsilon="std", init=None, **options
):
  """reg(x, y) − ½ reg(x, x) − ½ reg(y, y): entropic transport without its bias (Feydy et al. 2019).

  Non-negative, zero for equal weighted clouds only, and differentiable. Its error is the sum of
  three errors of second order in the threshold, so a small divergence of large costs wants a small
  threshold (or float64).

  Args:
    x, y, a, b: two weighted clouds, as in `sinkhorn`.
    epsilon, relative_epsilon: as in `sinkhorn`; relative to the costs between x and y.
    init: an earlier `SinkhornDivergence` of similar clouds of the same sizes, to start from; or
      potentials (f, g) for the problem between x and y alone.
    **options: further options of `sinkhorn`, for each of the three problems.

  Returns:
    A `SinkhornDivergence`.
  """
  if isinstance(init, SinkhornDivergence):
    starts = [result[:2] for result in init[2:]]
  else:
    starts = [init, None, None]
  dtype = _working_dtype(options.pop("dtype", None), x, y)
  xy = sinkhorn(
    x,
    y,
    a,
    b,
    epsilon=epsilon,
    relative_epsilon=relative_epsilon,
    init=starts[0],
    dtype=dtype,
    **options,
  )
  options |= {"epsilon": xy.epsilon, "dtype": dtype}
  xx = sinkhorn(x, a=a, init=starts[1], **options)
  yy = sinkhorn(y, a=b, init=starts[2], **options)
  return SinkhornDivergence(
    divergence=xy.reg_ot_cost - (xx.reg_ot_cost + yy.reg_ot_cost) / 2,
    converged=xy.converged & xx.converged & yy.converged,
    xy=xy,
    xx=xx,
    yy=yy,
  )


def identity_potentials(x=None, y=None, *, epsilon=0.0, cost=None):
  """Potentials to start from when x_i is expected to go to y_i (uniform weights, n = m).

  If y_i = M x_i with a symmetric, positive semi-definite M (blurring, masking, scaling), the
  identity is the optimal coupling (Brenier 1991) and f_i = ‖x_i‖² − x_i·y_i, g_i = ‖y_i‖² − x_i·y_i
  are exactly its dual potentials at ε = 0. For a cost matrix, ½ diag C on both sides is the guess.

  Args:
    x: points [n, d].
    y: points [n, d], y_i the expected partner of x_i.
    epsilon: ε of the problem; its part −½ ε log n is but a constant, so 0 gives as good a start.
    cost: cost matrix [n, n] instead of points.

  Returns:
    (f, g), [n] each, for `init` of `sinkhorn`.

  Raises:
    ValueError: if there are not as many x as y.
  """
  dtype_out = _working_dtype(None, x, y, cost)
  dtype = _inside(dtype_out) if cost is None else dtype_out
  if cost is None:
    x, y = _matrix(x, "x", dtype), _matrix(y, "y", dtype)
    if x.shape != y.shape:
      raise ValueError(f"x {x.shape} and y {y.shape} must have one shape: x_i is paired with y_i")
    centre = tf.reduce_mean(y, axis=0)
    x, y = x - centre, y - centre
    inner = tf.einsum("ij,ij->i", x, y)
    f, g = tf.einsum("ij,ij->i", x, x) - inner, tf.einsum("ij,ij->i", y, y) - inner
    f, g = tf.cast(f, dtype_out), tf.cast(g, dtype_out)
  else:
    cost = _matrix(cost, "cost", dtype)
    if cost.shape[0] != cost.shape[1]:
      raise ValueError(f"cost {cost.shape} must be square: x_i is paired with y_i")
    f = g = tf.linalg.diag_part(cost) / 2
  shift = tf.cast(_scalar(epsilon), f.dtype) * np.log(f.shape[0]) / 2
  return f - shift, g - shift
