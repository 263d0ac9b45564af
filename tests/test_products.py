"""Products by their meaning keep float32's precision, whatever a device does to others."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import (
  corruptions,
  diffusion,
  laboratory,
  oracles,
  priors,
  products,
  samplers,
  schedules,
)
from soft_diffusion_tf.experiment import from_file
from soft_diffusion_tf.networks import ncsnpp
from tests import emulation
from tools import tpu_compile_check as check

KINDS = ("tf32", "bfloat16")
EXECUTIONS = ("eager", "graph", "xla")


def executed(function, how):
  if how == "eager":
    return function
  return tf.function(function, autograph=False, jit_compile=how == "xla")


# --- One product ----------------------------------------------------------------------------------

SHAPES = [  # one pixel, rectangular, rank 2 to 4, one or many on either side
  ((1, 1), (1, 1)),
  ((3, 5), (5, 2)),
  ((4, 4), (7, 4, 3)),
  ((1, 4, 4), (7, 4, 3)),
  ((7, 3, 5), (5, 2)),
  ((7, 3, 5), (1, 5, 2)),
  ((7, 3, 5), (7, 5, 2)),
  ((6, 1, 3, 5), (1, 1, 5, 2)),
  ((1, 1, 3, 5), (6, 1, 5, 2)),
  ((6, 1, 3, 5), (1, 4, 5, 2)),
  ((2, 3, 1, 1), (3, 1, 1)),
]


def derivatives(a, b, da, db, turned):
  """The product, the first and second derivatives of Σ (a b)³, and the change along (da, db)."""
  product = lambda a, b: products.matmul(a, b, transpose_a=turned, transpose_b=turned)
  with tf.GradientTape() as outer:
    outer.watch([a, b])
    with tf.GradientTape() as tape:
      tape.watch([a, b])
      y = product(a, b)
      cubic = tf.reduce_sum(y**3)
    first = tape.gradient(cubic, [a, b])
    along = tf.reduce_sum(first[0] * da) + tf.reduce_sum(first[1] * db)
  second = outer.gradient(along, [a, b])
  with tf.autodiff.ForwardAccumulator([a, b], [da, db]) as forward:
    z = product(a, b)
  return y, *first, *second, forward.jvp(z)


def derivatives_by_hand(a, b, da, db):
  def sum_to(value, shape):  # of what was broadcast
    value = value.sum(tuple(range(value.ndim - len(shape))))
    wide = tuple(k for k, n in enumerate(shape) if n == 1 and value.shape[k] != 1)
    return value.sum(wide, keepdims=True)

  swap = lambda v: np.swapaxes(v, -1, -2)
  y, dy = a @ b, da @ b + a @ db
  g, dg = 3 * y**2, 6 * y * dy
  parts = (g @ swap(b), swap(a) @ g, dg @ swap(b) + g @ swap(db), swap(a) @ dg + swap(da) @ g)
  return y, *(sum_to(v, m.shape) for v, m in zip(parts, (a, b, a, b))), dy


@pytest.mark.parametrize("how", EXECUTIONS)
def test_a_product_and_its_derivatives(rng, how):
  cases = [(shapes, turned) for shapes in SHAPES for turned in (False, True)]
  exact, given = [], []
  for shapes, turned in cases:
    t = (lambda v: np.swapaxes(v, -1, -2)) if turned else (lambda v: v)
    values = [rng.standard_normal(shape) for shape in (*shapes, *shapes)]
    y, *inner, dy = derivatives_by_hand(*values)
    exact.append((y, *map(t, inner), dy))
    given.append([tf.constant(t(v), tf.float32) for v in values])
  every = lambda given: [derivatives(*v, turned) for v, (_, turned) in zip(given, cases)]
  for case, got, want in zip(cases, executed(every, how)(given), exact):
    for one, other in zip(got, want):
      scale = max(1.0, np.abs(other).max())  # some float32 roundings of numbers of that size
      np.testing.assert_allclose(one, other, atol=2e-6 * scale, err_msg=str(case))


@pytest.mark.parametrize("how", ["graph", "xla"])
def test_a_batch_of_any_size(rng, how):
  x, a = rng.standard_normal([5, 6, 4, 3]), rng.standard_normal([5, 6, 6])
  b = rng.standard_normal([4, 4])
  function = tf.function(
    products.two_sided,
    autograph=False,
    jit_compile=how == "xla",
    input_signature=[
      tf.TensorSpec([None, 6, 6]),
      tf.TensorSpec([None, 6, 4, 3]),
      tf.TensorSpec([4, 4]),
    ],
  )
  assert function.get_concrete_function().structured_outputs.shape.as_list() == [None, 6, 4, 3]
  for n in (5, 1):
    got = function(*(tf.constant(v, tf.float32) for v in (a[:n], x[:n], b)))
    np.testing.assert_allclose(got, np.einsum("nhk,nkvc,wv->nhwc", a[:n], x[:n], b), atol=2e-5)


@pytest.mark.parametrize("how", EXECUTIONS)
def test_two_sided(rng, how):
  leads, sizes = ([1], [5], []), ((1, 1), (6, 4), (1, 5))
  cases = [(c, s, lead) for c in (1, 3, 4, 7) for s in sizes for lead in leads]
  given, exact = [], []
  for channels, (h, w), lead in cases:
    x = rng.standard_normal([5, h, w, channels])
    a, b = rng.standard_normal([*lead, h, h]), rng.standard_normal([*lead, w, w])
    full = [np.broadcast_to(v, [5, *v.shape[-2:]]) for v in (a, b)]
    exact.append(np.einsum("nhk,nkvc,nwv->nhwc", full[0], x, full[1]))
    given.append((tf.constant(a), tf.constant(x, tf.float32), tf.constant(b)))  # a user's float64
  every = lambda given: [products.two_sided(*v) for v in given]
  for case, got, want in zip(cases, executed(every, how)(given), exact):
    assert got.dtype == tf.float32
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(case))


# --- Under emulated TF32 and bfloat16 -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_is_that_of_the_format(rng, kind):
  bits = {"tf32": 10, "bfloat16": 7}[kind]
  x = rng.standard_normal(10_000).astype(np.float32) * 10.0 ** rng.integers(-5, 5, 10_000)
  x = x.astype(np.float32)
  got = laboratory.rounded(x, kind).numpy()
  mantissa, exponent = np.frexp(x.astype(np.float64))
  want = np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1)  # half to even
  np.testing.assert_array_equal(got, want)
  halves = np.float32([1 + 2.0 ** -(bits + 1), 1 + 3 * 2.0 ** -(bits + 1)])
  np.testing.assert_array_equal(
    laboratory.rounded(halves, kind), np.float32([1, 1 + 4 * 2.0 ** -(bits + 1)])
  )


@pytest.mark.parametrize("kind", KINDS)
def test_the_emulation_hurts_a_product_that_states_nothing(rng, kind):
  """What follows can fail: each way of multiplying in TensorFlow is caught, in float32 alone."""
  a, b = (rng.random([3, 16, 16], np.float32) for _ in range(2))
  want = a.astype(np.float64) @ b
  ways = {
    "matmul": lambda a, b: tf.matmul(a, b),
    "one by one": lambda a, b: tf.stack(
      [tf.matmul(p, q) for p, q in zip(tf.unstack(a), tf.unstack(b))]
    ),
    "matvec": lambda a, b: tf.stack([tf.linalg.matvec(a, b[:, :, k]) for k in range(16)], 2),
    "einsum": lambda a, b: tf.einsum("nij,njk->nik", a, b),
    "operator": lambda a, b: tf.linalg.LinearOperatorFullMatrix(a).matmul(b),
    "gradient": lambda a, b: _by_gradient(a, b),
  }
  least = {"tf32": 1e-4, "bfloat16": 1e-3}[kind]
  for name, way in ways.items():
    assert np.abs(way(a, b) - want).max() < 5e-6, name
    with emulation.products(kind):
      for how in ("eager", "graph"):
        error = np.abs(executed(way, how)(tf.constant(a), tf.constant(b)) - want).max()
        assert least < error < 100 * least, (name, how, error)
      assert np.abs(products.matmul(a, b) - want).max() < 1e-6 * 16  # half a unit of float32
      double = tf.matmul(tf.constant(a, tf.float64), tf.constant(b, tf.float64))
      np.testing.assert_allclose(double, want, rtol=1e-13)


def _by_gradient(a, b):
  """a b as the derivative of ‖·‖ products: what an adjoint by `GradientTape` multiplies."""
  x = tf.zeros_like(b)
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = tf.matmul(a, x, transpose_a=True)
  return tape.gradient(y, x, output_gradients=b)


# Operators of every kind that TensorFlow has, 24 × 24: 6·4 pixels.


def _matrix(n, seed, m=None):
  """n × m, its rows' sums about 1, so that images in [0, 1] stay there."""
  return np.random.default_rng(seed).random([n, m or n], np.float32) / (m or n) * 2


def _kinds():
  k = tf.linalg
  full = lambda n, seed=0, m=None: k.LinearOperatorFullMatrix(_matrix(n, seed, m))
  lower = lambda n, seed=0: k.LinearOperatorLowerTriangular(
    tf.linalg.band_part(_matrix(n, seed), -1, 0)
  )
  row = np.float32([0.5, 0.25, 0.05] + 21 * [0.0])
  spectrum = lambda *shape: np.fft.fftn(np.random.default_rng(1).random(shape) / 24)
  circulant = {"input_output_dtype": tf.float32}
  update = k.LinearOperatorLowRankUpdate(
    full(24), _matrix(24, 1, 3), np.float32([0.3, 0.2, 0.1]), _matrix(24, 2, 3)
  )
  return {
    "FullMatrix": full(24),
    "LowerTriangular": lower(24),
    "Adjoint": k.LinearOperatorAdjoint(update),
    "Composition": k.LinearOperatorComposition([lower(24), full(24, 1), full(24, 2)]),
    "Composition of rectangles": k.LinearOperatorComposition([full(24, 1, 10), full(10, 2, 24)]),
    "Kronecker": k.LinearOperatorKronecker([full(2), lower(3, 1), full(4, 2)]),
    "Kronecker of rectangles": k.LinearOperatorKronecker([full(6, 1, 4), full(4, 2, 6)]),
    "BlockDiag": k.LinearOperatorBlockDiag([full(10), lower(6), full(8)]),
    "BlockLowerTriangular": k.LinearOperatorBlockLowerTriangular(
      [[full(10)], [full(6, 1, 10), lower(6)], [full(8, 2, 10), full(8, 3, 6), full(8, 4)]]
    ),
    "LowRankUpdate": update,
    "Householder": k.LinearOperatorHouseholder(np.ones(24, np.float32)),
    "Diag": k.LinearOperatorDiag(np.linspace(0, 1, 24, dtype=np.float32)),
    "Identity": k.LinearOperatorIdentity(24),
    "ScaledIdentity": k.LinearOperatorScaledIdentity(24, np.float32(0.3)),
    "Zeros": k.LinearOperatorZeros(24),
    "Permutation": k.LinearOperatorPermutation(np.roll(np.arange(24, dtype=np.int32), 3)),
    "Toeplitz": k.LinearOperatorToeplitz(row, row),
    "Tridiag": k.LinearOperatorTridiag(
      np.full([3, 24], 0.3, np.float32), diagonals_format="compact"
    ),
    "Circulant": k.LinearOperatorCirculant(tf.constant(spectrum(24), tf.complex64), **circulant),
    "Circulant2D": k.LinearOperatorCirculant2D(
      tf.constant(spectrum(6, 4), tf.complex64), **circulant
    ),
    "Circulant3D": k.LinearOperatorCirculant3D(
      tf.constant(spectrum(2, 3, 4), tf.complex64), **circulant
    ),
    "Inversion": k.LinearOperatorInversion(
      k.LinearOperatorDiag(np.linspace(1, 2, 24, dtype=np.float32))
    ),
  }


def test_the_kinds_are_all():
  there = {n.removeprefix("LinearOperator") for n in dir(tf.linalg) if "LinearOperator" in n} - {""}
  assert there == {name.split(" ")[0] for name in _kinds()}


def _exact(operator):
  """The matrix in float64, without a float32 product: blocks and factors put together by NumPy."""
  kind = type(operator).__name__.removeprefix("LinearOperator")
  exact = lambda parts: [_exact(part) for part in parts]
  if kind == "Adjoint":
    return _exact(operator.operator).T
  if kind == "Composition":
    return np.linalg.multi_dot([np.eye(24), *exact(operator.operators)])
  if kind == "Kronecker":
    result = np.eye(1)
    for part in exact(operator.operators):
      result = np.kron(result, part)
    return result
  if kind == "LowRankUpdate":
    diagonal = np.diag(np.float64(operator.diag_update))
    u, v = np.float64(operator.u), np.float64(operator.v)
    return _exact(operator.base_operator) + u @ diagonal @ v.T
  if kind == "Householder":
    axis = np.float64(operator.reflection_axis)
    return np.eye(24) - 2 * np.outer(axis, axis) / (axis @ axis)
  if kind in ("BlockDiag", "BlockLowerTriangular"):
    rows = operator.operators
    if kind == "BlockDiag":
      rows = [[None] * i + [block] for i, block in enumerate(rows)]
    size = [int(row[-1].domain_dimension) for row in rows]
    return np.block(
      [
        [
          np.zeros([size[i], size[j]]) if j > i or row[j] is None else _exact(row[j])
          for j in range(len(rows))
        ]
        for i, row in enumerate(rows)
      ]
    )
  return np.float64(operator.to_dense())


def plain(matrix, x):
  """A plain float32 product of the same sums: the yardstick."""
  return np.float32(matrix) @ np.float32(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", _kinds())
def test_families_of_every_kind_of_operator(rng, kind, name):
  operator = _kinds()[name]
  exact = _exact(operator)
  x = rng.random([5, 6, 4, 2], np.float32)
  flat = x.astype(np.float64).reshape(5, 24, 2)
  family = corruptions.Family(lambda level: operator)
  # FFTs are not products; their rounding is their own.
  bound = 1e-6 if "Circulant" not in name and name != "Toeplitz" else 2e-6
  with emulation.products(kind):
    for matrix, function in ((exact, family), (exact.T, family.adjoint)):
      want = (matrix @ flat).reshape(x.shape)
      allowed = max(bound, 2 * np.abs((plain(matrix, flat)).reshape(x.shape) - want).max())
      assert np.abs(function(x, 0.5) - want).max() < allowed
      levels = np.full(5, 0.5, np.float32)
      call = lambda x, level, function=function: function(x, level)
      assert np.abs(executed(call, "graph")(x, levels) - want).max() < allowed
    np.testing.assert_allclose(products.dense(operator), exact, atol=bound)


def _corruptions():
  c = corruptions
  return [
    (c.GaussianBlur(), 0.7),
    (c.GaussianBlur(3), 4.0),
    (c.BlockAverage(), 1.4),
    (c.Mask(), 0.4),
    (c.Mask("centre", 0.5), 0.6),
    (c.Identity(), 3.0),
    (c.Scale(), 0.3),
    (c.Matrix(_matrix(96, 0)), 0.6),
    (c.Compose(c.GaussianBlur(), c.Mask(edge=0.5), (0, 3), (0, 1)), 0.5),
    (c.Compose(c.BlockAverage(), c.GaussianBlur(), (0, 2), (0, 2)), 0.8),
  ]


def float64_of(corruption, level, h, w):
  """The matrix [HW, HW] of a corruption in float64 from its float32 factors, put together here."""
  c = corruptions
  if isinstance(corruption, c.GaussianBlur):
    a, b = (np.float64(m[0]) for m in corruption.matrices(tf.constant([level], tf.float32), h, w))
    return np.kron(a, b)
  if isinstance(corruption, c.BlockAverage):
    below = np.floor(level)
    stage = lambda k: np.kron(*(np.float64(corruption._stage([k], n)[0]) for n in (h, w)))
    return (1 - (level - below)) * stage(below) + (level - below) * stage(below + 1)
  if isinstance(corruption, c.Compose):
    inner = float64_of(corruption.inner, float(corruption.inner_level(level)), h, w)
    return float64_of(corruption.outer, float(corruption.outer_level(level)), h, w) @ inner
  if isinstance(corruption, c.Matrix):
    return (1 - level) * np.eye(h * w) + level * np.float64(corruption.matrix)
  gains = np.broadcast_to(corruption.spectrum((h, w, 1)).gains(level), [1, h, w, 1])
  return np.diag(np.float64(gains).ravel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corruption", _corruptions(), ids=lambda v: type(v[0]).__name__)
def test_corruptions_lose_nothing(rng, kind, corruption):
  """At most twice a plain float32 product's error, and below 1e-6 on images in [0, 1]."""
  corruption, level = corruption
  level = float(np.float32(level))
  h, w = 12, 8
  exact = float64_of(corruption, level, h, w)
  x = rng.random([6, h, w, 3], np.float32)
  flat = x.astype(np.float64).reshape(6, h * w, 3)
  levels = np.full(6, level, np.float32)
  with emulation.products(kind):
    for matrix, function in ((exact, corruption), (exact.T, corruption.adjoint)):
      want = (matrix @ flat).reshape(x.shape)
      yardstick = np.abs(plain(matrix, flat).reshape(x.shape) - want).max()
      # The adjoint of what loses brightness may exceed 1: its rounding then grows with it.
      for form in (level, levels):
        error = np.abs(function(x, form) - want).max()
        assert error <= max(2 * yardstick, 2.5e-7 * max(1.0, np.abs(want).max())), error
        assert error < 1e-6
        compiled = executed(function, "graph")(tf.constant(x), tf.constant(form))
        assert np.abs(compiled - want).max() < 1e-6
    if not isinstance(corruption, corruptions.Family):
      np.testing.assert_allclose(
        products.dense(corruption.operator(level, (h, w, 3))), exact, atol=1e-6
      )
    parts = corruption.svd(level, (h, w, 3))
    back = parts.from_left(parts.values * parts.to_right(x))
    assert np.abs(back - (exact @ flat).reshape(x.shape)).max() < 1.5e-6  # three products
    for there, again in ((parts.to_left, parts.from_left), (parts.to_right, parts.from_right)):
      assert np.abs(again(there(x)) - x).max() < 1.5e-6


def _process(corruption=None, top=6.0):
  return diffusion.Diffusion(
    (8, 8, 1),
    corruptions.GaussianBlur() if corruption is None else corruption,
    schedules.Staged(schedules.Geometric(0.01, top), 0.2, 1.0),
    schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
  )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_on_operators_loses_nothing(digits, kind):
  """Priors, exact denoisers, velocities and a whole sampler, under emulation and without it."""

  def everything():
    process = _process()
    prior = priors.fit("subspace", digits[:200], process, 8)
    signs = np.sign(prior.factors.reshape(8, -1)[:, :1, None, None])
    process = process.with_prior(dataclasses.replace(prior, factors=signs * prior.factors))
    x = process.draw_prior(range(6))
    mixture = oracles.GaussianMixture(digits[:50], 0.1)
    denoise = oracles.denoiser(mixture, process)
    roots = np.random.default_rng(0).standard_normal([3, 64, 64]) * 0.03
    full = oracles.GaussianMixture(
      digits[:3], covariances=roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(64)
    )
    half = np.full(6, 0.5, np.float32)
    sampler = samplers.Sampler(process, denoise)
    speed = tf.function(
      lambda x: samplers.velocity(process, denoise, x, tf.constant(0.5)), autograph=False
    )
    return {
      "prior": process.prior.mean,
      "factors": process.prior.factors,
      "draws": x,
      "denoised": denoise(x, half),
      "by covariances": oracles.denoiser(full, process)(x, half),
      "with an error": oracles.noisy(denoise, process, 0.1)(x, half),
      "velocity": speed(x),
      "samples": sampler(samplers.plan("two_step", samplers.time_grid(10), process), range(6)),
      "score": process.score(x, 0.9, denoise(x, np.full(6, 0.9))),
    }

  want = everything()
  with emulation.products(kind):
    got = everything()
  for name, value in want.items():
    scale = max(1.0, np.abs(value).max())
    np.testing.assert_allclose(got[name], value, atol=1e-6 * scale, err_msg=name)


# --- The text that XLA gets -----------------------------------------------------------------------


def dots(text):
  """(precision, types) of each product and convolution of a StableHLO text."""
  found = []
  for line in text.splitlines():
    if re.search(r"stablehlo\.(dot|dot_general|convolution)\b", line):
      named = set(re.findall(r"HIGHEST|HIGH|DEFAULT", line)) or {"DEFAULT"}
      assert len(named) == 1, line
      found.append((named.pop(), re.search(r": (\(tensor.*?) loc|$", line).group(1)))
  return found


def elementwise(self, x, cond, training=False, seed=None, first=0):
  """In place of the network: every weight counts, and nothing is multiplied as a matrix."""
  weights = tf.add_n([tf.reduce_sum(tf.cast(v.value, tf.float32)) for v in self.variables])
  return tf.cast(x, tf.float32) * (1.0 + weights) + tf.reshape(cond, [-1, 1, 1, 1])


@pytest.mark.parametrize(
  ("what", "shape", "dtype"),
  [
    ("train", (8, 8, 1), "bfloat16"),
    ("sample", (12, 8, 3), "float32"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        ("train", (8, 8, 1), "float32"),
        ("train", (12, 8, 3), "float32"),
        ("sample", (8, 8, 1), "float32"),
        ("sample", (8, 8, 1), "bfloat16"),
      ]
    ),
  ],
  ids=str,
)
def test_the_lowered_programs_state_highest_for_operators_alone(what, shape, dtype, monkeypatch):
  """Which dots are operators' is found without the network, where they are the only ones."""
  config = pathlib.Path(__file__).parents[1] / "configs" / "digits_blur.py"
  experiment, _ = check.with_levels(
    from_file(config).replace(
      data={"image_shape": shape},
      network={"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (8,)},
    )
  )

  def lowered():
    return dots(check.stablehlo(*check.program(experiment, what, 5, dtype=dtype)[:2]))

  whole = lowered()
  monkeypatch.setattr(ncsnpp.NCSNpp, "call", elementwise)
  operators = lowered()
  # C_t x_0 for x_t, C_t x̂_0 and C_t x_0 in the loss, and the adjoint for its gradient, two
  # products each; in a sampler C_s and C_t, and both once more where XLA has unrolled a step.
  assert len(operators) >= (8 if what == "train" else 4)
  assert {precision for precision, _ in operators} == {"HIGHEST"}
  assert sorted(d for d in whole if d[0] == "HIGHEST") == sorted(operators)
  rest = [d for d in whole if d[0] != "HIGHEST"]
  assert len(rest) > 10
  assert {precision for precision, _ in rest} == {"DEFAULT"}
  assert any("bf16" in types for _, types in rest) == (dtype == "bfloat16")


def test_a_plain_product_is_seen_in_the_text():
  """The test above can fail: a product that states nothing is DEFAULT."""
  a = tf.TensorSpec([4, 4], tf.float32)

  def stated(product):
    compiled = tf.function(lambda a, b: product(a, b), jit_compile=True, autograph=False)
    text = compiled.experimental_get_compiler_ir(a, a)(stage="stablehlo")
    return [precision for precision, _ in dots(text)]

  assert stated(tf.matmul) == ["DEFAULT"]
  assert stated(products.matmul) == ["HIGHEST"]
