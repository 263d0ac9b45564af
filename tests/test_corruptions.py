import dataclasses
import importlib.util
import itertools
import json
import sys

import keras
import numpy as np
import pytest
import scipy.fft
import scipy.signal
import tensorflow as tf

from soft_diffusion_tf import corruptions as c
from soft_diffusion_tf import parts, products


def fade_family(level):
  """A user's family: every pixel times 1 − level."""
  return tf.linalg.LinearOperatorScaledIdentity(24, 1.0 - level)


def mixing_family(level):
  """A user's family on all numbers of a 6×4×2 image: it rotates the two channels."""
  angle = 0.7 * level
  block = tf.stack([[tf.cos(angle), -tf.sin(angle)], [tf.sin(angle), tf.cos(angle)]])
  return tf.linalg.LinearOperatorKronecker(
    [tf.linalg.LinearOperatorIdentity(24), tf.linalg.LinearOperatorFullMatrix(block)]
  )


A_BLUR = c.GaussianBlur(5)
MATRIX = np.random.default_rng(0).standard_normal([24, 24]) / 5
EXAMPLES = {
  "BlockAverage": [c.BlockAverage()],
  "Compose": [
    c.Compose(c.GaussianBlur(), c.Mask(), (0.0, 3.0), (0.0, 1.0)),
    c.Compose(c.GaussianBlur(2), c.Matrix(np.eye(48)[::-1])),
    c.Compose(c.BlockAverage(), c.GaussianBlur(), (0.0, 2.0), (0.0, 2.0)),
    c.Compose(c.HeatDissipation(0.001), c.Scale(), (0.0, 4.0), (1.0, 0.1)),
  ],
  "Family": [c.Family(fade_family), c.Family(mixing_family)],
  "Gamma": [c.Gamma()],
  "GaussianBlur": [c.GaussianBlur(), c.GaussianBlur(half_size=2)],
  "HeatDissipation": [c.HeatDissipation(), c.HeatDissipation(0.1)],
  "Identity": [c.Identity()],
  "Mask": [c.Mask(h, e) for h in ("centre", "border") for e in (0.0, 0.3)],
  "Matrix": [c.Matrix(MATRIX)],
  "Scale": [c.Scale()],
}
ALL = [example for name in parts.members(c.Corruption) for example in EXAMPLES[name]]


@pytest.mark.parametrize("corruption", ALL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_contract(corruption, policy):
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy(policy)
  try:
    verdict = c.check_corruption(corruption)
  finally:
    keras.config.set_dtype_policy(before)
  # A function of a test module cannot be imported by name again; all else must hold.
  allowed = (
    {"config"}
    if isinstance(corruption, c.Family) and not isinstance(corruption, c.Matrix)
    else set()
  )
  assert set(verdict.failures) <= allowed, str(verdict)


# --- Planted faults are found by name ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Squares(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return x + level * x**2


@dataclasses.dataclass(frozen=True)
class NotIdentity(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (0.9 - 0.5 * level) * x


@dataclasses.dataclass(frozen=True)
class WrongAdjoint(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return x + level * tf.roll(x, 1, axis=1)

  def adjoint(self, y, level):
    return self(y, level)


@dataclasses.dataclass(frozen=True)
class WrongMatrix(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - 0.5 * level) * x

  def operator(self, level, image_shape):
    return tf.linalg.LinearOperatorIdentity(image_shape[0] * image_shape[1])


@dataclasses.dataclass(frozen=True)
class FirstLevelOnly(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - 0.5 * level[:1]) * x


@dataclasses.dataclass(frozen=True)
class BadSlope(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - 0.5 * tf.sqrt(level)) * x  # infinite slope at the clean end


@dataclasses.dataclass(frozen=True)
class EagerOnly(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return tf.concat([(1.0 - 0.5 * level[k % len(level)]) * x[k : k + 1] for k in range(len(x))], 0)


@dataclasses.dataclass(frozen=True)
class Breaks(c.Corruption):
  level_range = (0.0, 1.0)

  def apply(self, x, level):
    raise RuntimeError("no")


@dataclasses.dataclass(frozen=True)
class WrongSvd(c.Scale):
  """The product is C, but what is to be its inverse in the middle is not."""

  def svd(self, level, image_shape):
    return super().svd(level, image_shape)._replace(to_left=lambda x: -x)


class Undecorated(c.Corruption):
  level_range = (0.0, 1.0)

  def __init__(self, strength=1.0):
    self.strength = strength

  def apply(self, x, level):
    return (1.0 - 0.1 * self.strength * level) * x


@dataclasses.dataclass(frozen=True)
class Kernel(c.Corruption):
  level_range = (0.0, 1.0)
  kernel: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(3))

  def apply(self, x, level):
    return (1.0 - 0.5 * level) * x


@dataclasses.dataclass(frozen=True)
class Grey(c.Corruption):
  """A class that mixes channels, known by `apply` alone."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    return (1.0 - level) * x + level * tf.reduce_mean(x, -1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Weighted(Grey):
  """The same for three channels alone."""

  def apply(self, x, level):
    mean = tf.reduce_sum(x * tf.constant([0.5, 0.3, 0.2]), -1, keepdims=True)
    return (1.0 - level) * x + level * mean


@pytest.mark.parametrize("corruption", [Grey(), Weighted()], ids=["grey", "weighted"])
def test_a_class_that_mixes_channels(corruption):
  assert c.check_corruption(corruption, (4, 3, 3)).ok
  assert corruption.mixes_channels((4, 3, 3))
  assert not c.GaussianBlur().mixes_channels((4, 3, 3))
  matrix = corruption.operator(0.4, (4, 3, 3)).to_dense()
  assert matrix.shape == (36, 36)
  compiled = tf.function(lambda level: corruption.operator(level, (4, 3, 3)).to_dense())
  np.testing.assert_allclose(compiled(tf.constant(0.4)), matrix, atol=1e-6)
  with pytest.raises(ValueError, match="mixes channels"):
    corruption.svd(0.4, (4, 3, 3))


@pytest.mark.parametrize(
  ("corruption", "fault"),
  [
    (WrongSvd(), "svd"),
    (Undecorated(), "config"),
    (Kernel(), "config"),
    (Squares(), "linear"),
    (NotIdentity(), "identity"),
    (WrongAdjoint(), "adjoint"),
    (WrongMatrix(), "matrix"),
    (FirstLevelOnly(), "broadcast"),
    (BadSlope(), "gradients"),
    (EagerOnly(), "graph"),
    (Breaks(), "linear"),
  ],
  ids=lambda v: v if isinstance(v, str) else "",
)
def test_planted_faults_are_named(corruption, fault):
  verdict = c.check_corruption(corruption)
  assert not verdict.ok
  assert fault in verdict.failures
  assert fault in str(verdict)


# --- Each against a second route -----------------------------------------------------------------


def _printed_kernel(std, half_size):
  """The kernel of P App. G, as printed there."""
  v = np.arange(-half_size, half_size + 1)
  x, y = np.meshgrid(v, v)
  kernel = np.exp(-(x**2 + y**2) / (2 * std**2))
  return kernel / kernel.sum()


def heat(x, level):
  """The heat equation's solution by SciPy's DCT, in float64."""
  h, w = x.shape[1:3]
  rate = (np.pi * np.arange(h) / h)[:, None] ** 2 + (np.pi * np.arange(w) / w) ** 2
  spectrum = scipy.fft.dctn(np.float64(x), axes=(1, 2), norm="ortho")
  return scipy.fft.idctn(
    spectrum * np.exp(-0.5 * level**2 * rate)[..., None], axes=(1, 2), norm="ortho"
  )


@pytest.mark.parametrize("level", [0.0, 0.3, 2.0, 30.0])
def test_heat_is_dissipated_as_its_equation_says(rng, level):
  x = rng.random([2, 6, 9, 2], np.float32)
  operator = c.HeatDissipation()
  got = operator(x, level).numpy()
  np.testing.assert_allclose(got, heat(x, level), atol=2e-6)
  # No light is lost, and nothing is left in the end but the mean colour.
  np.testing.assert_allclose(got.mean(axis=(1, 2)), x.mean(axis=(1, 2)), atol=1e-6)
  constant = np.full([1, 6, 9, 2], 0.7, np.float32)
  np.testing.assert_allclose(operator(constant, level), constant, atol=1e-6)
  if level == 30.0:
    np.testing.assert_allclose(
      got, np.broadcast_to(got.mean((1, 2), keepdims=True), got.shape), atol=1e-6
    )
  # Two blurs in a row are one.
  twice = operator(operator(x, 0.6 * level), 0.8 * level)
  np.testing.assert_allclose(twice, got, atol=2e-6)


def test_heat_far_from_the_borders_is_a_gaussian_blur(rng):
  """One bright pixel in the middle, and a border 16 pixels away: 8 standard deviations."""
  x = np.zeros([1, 33, 33, 1], np.float32)
  x[0, 16, 16] = 1.0
  got = c.HeatDissipation()(x, 2.0).numpy()
  want = c.GaussianBlur(half_size=32)(x, 2.0).numpy()
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(("half_size", "stds"), [(32, [0.01, 0.5, 3, 18]), (3, [1.0, 4.0])])
def test_blur_is_the_printed_convolution(rng, half_size, stds):
  x = rng.random([len(stds), 12, 9, 2], np.float32)
  got = c.GaussianBlur(half_size)(x, np.float32(stds)).numpy()
  for k, std in enumerate(stds):
    for channel in range(2):
      want = scipy.signal.convolve2d(
        x[k, :, :, channel].astype(np.float64), _printed_kernel(std, half_size), mode="same"
      )
      np.testing.assert_allclose(got[k, :, :, channel], want, atol=2e-6)  # float32 sums of 108


def test_blur_at_level_0_is_the_identity_to_the_bit(rng):
  x = rng.random([2, 8, 8, 3], np.float32)
  for level in (0.0, 0.01):
    np.testing.assert_array_equal(c.GaussianBlur()(x, level), x)


@pytest.mark.parametrize("hidden", ["centre", "border"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (32, 32), (6, 10)])
def test_mask_hides_its_share_from_the_right_side(hidden, size):
  ones = np.ones([1, *size, 1], np.float32)
  levels = np.linspace(0, 1, 41, dtype=np.float32)
  kept = [c.Mask(hidden)(ones, v).numpy()[0, :, :, 0] for v in levels]
  assert kept[0].all()
  assert not kept[-1].any()
  ring = 2 * (size[0] + size[1]) / (size[0] * size[1])  # the largest ring's share
  for level, mask in zip(levels, kept):
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert abs((1 - mask.mean()) - level) <= ring
    np.testing.assert_array_equal(mask, mask[::-1, ::-1])
  half = kept[20]
  centre, corner = half[size[0] // 2, size[1] // 2], half[0, 0]
  assert (centre, corner) == ((0, 1) if hidden == "centre" else (1, 0))
  assert all(np.all(a >= b) for a, b in itertools.pairwise(kept))  # nothing comes back


def test_soft_mask_changes_continuously():
  ones = np.ones([1, 16, 16, 1], np.float32)
  levels = np.linspace(0, 1, 1001, dtype=np.float32)
  gains = np.concatenate([c.Mask("border", edge=0.2)(ones, v).numpy() for v in levels])
  # The front moves by 1.2/1000 per level over an edge of 0.2: at most 0.006 a step.
  assert np.abs(np.diff(gains, axis=0)).max() < 0.0061


def test_block_average_is_a_projection_at_whole_levels(rng):
  x = rng.random([1, 8, 8, 1], np.float32)
  for level in (1.0, 2.0, 3.0):
    size = int(2**level)
    once = c.BlockAverage()(x, level).numpy()
    np.testing.assert_allclose(c.BlockAverage()(once, level), once, atol=1e-6)
    want = (
      x.reshape(8 // size, size, 8 // size, size).mean(axis=(1, 3)).repeat(size, 0).repeat(size, 1)
    )
    np.testing.assert_allclose(once[0, :, :, 0], want, atol=1e-6)


def test_compose_applies_inner_first(rng):
  x = rng.random([2, 8, 8, 1], np.float32)
  composed = c.Compose(c.GaussianBlur(), c.Mask(), (0.0, 2.0), (0.0, 1.0))
  want = c.Mask()(c.GaussianBlur()(x, 1.0), 0.5)
  np.testing.assert_allclose(composed(x, 0.5), want, atol=1e-7)
  fading = c.Family(fade_family, high=0.1)  # no float32 is 0.1: its ends are, as it rounds them
  assert c.Compose(c.GaussianBlur(), fading, (0.0, 2.0), (0.0, 0.1)).outer is fading


def test_a_user_matrix_and_family(rng):
  x = rng.random([3, 6, 4, 2], np.float32)
  got = c.Matrix(MATRIX)(x, np.float32([0, 0.5, 1])).numpy()
  for k, level in enumerate((0, 0.5, 1)):
    matrix = (1 - level) * np.eye(24) + level * MATRIX
    np.testing.assert_allclose(got[k].reshape(24, 2), matrix @ x[k].reshape(24, 2), atol=1e-5)
  np.testing.assert_allclose(c.Family(fade_family)(x, 0.25), 0.75 * x, atol=1e-6)


# --- Singular values where rank is lost -----------------------------------------------------------


def halving_family(level):
  """A user's projection: both halves of the pixels go towards their mean, 120 × 120."""
  half = tf.fill([60, 60], 1.0 / 60)
  block = tf.linalg.LinearOperatorFullMatrix(half)
  mean = tf.linalg.LinearOperatorBlockDiag([block, block]).to_dense()
  return (1.0 - level) * tf.eye(120) + level * mean


RANKS = [  # (corruption, levels, shapes): square and rectangular, one pixel, four channels
  (c.BlockAverage(), (0, 1, 1.5, 2, 3, 4, 5), ((12, 12, 1), (12, 10, 3), (16, 16, 1), (5, 9, 4))),
  (c.BlockAverage(), (0, 1, 3), ((1, 1, 1), (1, 7, 2))),
  (c.GaussianBlur(3), (0, 0.05, 0.2, 1, 6, 100), ((12, 10, 4), (1, 9, 1), (1, 1, 3))),
  (c.GaussianBlur(80), (0.01, 4, 23), ((64, 1, 1),)),
  (c.Mask(), (0, 0.4, 1), ((6, 10, 3), (1, 1, 1))),
  (c.Compose(c.BlockAverage(), c.GaussianBlur(), (0, 4), (0, 3)), (0, 0.5, 1), ((12, 10, 1),)),
  (c.Compose(c.GaussianBlur(), c.Mask(), (0, 3), (0, 1)), (0.3, 1), ((12, 12, 2),)),
  (c.Compose(c.BlockAverage(), c.Mask("centre"), (0, 4), (0, 1)), (0.5, 1), ((12, 12, 1),)),
  (c.Family(halving_family), (0, 0.5, 1), ((12, 10, 1), (10, 12, 4))),
  (c.Matrix(np.ones([120, 120]) / 120), (0, 0.5, 1), ((12, 10, 1),)),
  (c.Matrix(np.eye(120, k=1)), (0, 1), ((12, 10, 2),)),
  (c.Matrix(np.zeros([120, 120])), (0, 1), ((12, 10, 1),)),
]


@pytest.mark.parametrize("case", RANKS, ids=lambda v: type(v[0]).__name__)
def test_singular_values_where_rank_is_lost(rng, case):
  corruption, levels, shapes = case
  for shape, level in itertools.product(shapes, levels):
    h, w, channels = shape
    if isinstance(corruption, c.Matrix):
      matrix = (1 - level) * np.eye(h * w) + level * corruption.matrix.astype(float)
    else:
      basis = np.eye(h * w, dtype=np.float32).reshape(-1, h, w, 1)
      matrix = np.asarray(corruption(basis, level), np.float64).reshape(h * w, h * w).T
    want = np.linalg.svd(matrix, compute_uv=False)
    parts = corruption.svd(level, shape)
    values = np.broadcast_to(parts.values, [h, w, 1]).ravel()
    where = f"{shape} at {level}"
    np.testing.assert_allclose(np.sort(values)[::-1], want, atol=2e-6, err_msg=where)
    x = rng.random([3, *shape], np.float32)
    flat = x.astype(np.float64).reshape(3, h * w, channels)
    for got, exact in (
      (parts.to_left(parts.from_left(x)), x),
      (parts.from_left(parts.to_left(x)), x),
      (parts.to_right(parts.from_right(x)), x),
      (parts.from_right(parts.to_right(x)), x),
      (parts.from_left(parts.values * parts.to_right(x)), (matrix @ flat).reshape(x.shape)),
    ):
      np.testing.assert_allclose(got, exact, atol=3e-6, err_msg=where)  # float32, two to three sums


def test_singular_values_in_graphs(rng):
  """As in samplers and exports, where the level is a tensor."""
  corruption, shape = c.BlockAverage(), (12, 10, 1)
  x = tf.constant(rng.random([2, *shape], np.float32))

  @tf.function(input_signature=[tf.TensorSpec([])])
  def through(level):
    parts = corruption.svd(level, shape)
    return parts.from_left(parts.values * parts.to_right(x)), parts.to_left(parts.from_left(x))

  for level in (0.0, 1.5, 3.0, 5.0):
    product, same = through(level)
    np.testing.assert_allclose(product, corruption(x, level), atol=3e-6)
    np.testing.assert_allclose(same, x, atol=3e-6)


def test_a_wrong_decomposition_is_not_handed_out(monkeypatch):
  right = products.svd

  def wrong(matrix):
    s, u, v = right(matrix)
    return s, 1.01 * u, v

  monkeypatch.setattr(products, "svd", wrong)
  for corruption in (c.BlockAverage(), c.GaussianBlur()):
    with pytest.raises(
      ValueError, match=r"at level 2 on \(4, 4, 1\): its singular values are wrong"
    ):
      corruption.svd(2.0, (4, 4, 1))


def test_configs_survive_json():
  for corruption in ALL:
    config = json.loads(json.dumps(corruption.get_config()))
    if type(corruption) is c.Family:
      assert config["family"].endswith("_family")
    else:
      assert c.from_config(config, trust_code=True) == corruption
  assert Squares().get_config()["kind"].endswith(":Squares")


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (lambda: c.Mask("corner"), "Mask.hidden = 'corner' is unknown; did you mean"),
    (lambda: c.Mask(edge=2.0), "edge"),
    (lambda: c.Mask()(np.zeros([1, 4, 4, 1]), 1.5), r"level 1.5 is outside \[0, 1\]"),
    (lambda: c.GaussianBlur()(np.zeros([1, 4, 4, 1]), -1.0), "level -1 is outside"),
    (lambda: c.GaussianBlur()(np.zeros([1, 4, 4, 1]), np.nan), "level nan is outside"),
    (lambda: c.GaussianBlur()(np.zeros([4, 4, 1]), 1.0), r"\[B, H, W, C\]"),
    (lambda: c.GaussianBlur()(np.zeros([1, 4, 4, 1]), [[1.0]]), "one per image"),
    (lambda: c.from_config({"kind": "GausianBlur"}), "did you mean 'GaussianBlur'"),
    (lambda: c.from_config({"kind": "Mask", "shape": 3}), "no field Mask.shape"),
    (lambda: c.from_config(["Mask"]), r"corruption = \['Mask'\]: give its kind and fields"),
    (lambda: c.Family(mixing_family).svd(0.5, (6, 4, 2)), "Family mixes channels"),
    (lambda: c.from_config({"kind": "no_such:Thing"}, trust_code=True), "cannot import"),
    (lambda: c.Matrix(np.zeros([2, 3])), "square"),
    (lambda: c.GaussianBlur(-1), "half_size"),
    (
      lambda: c.Compose(c.GaussianBlur(), c.Mask(), (0, 1), (0, 2)),
      "levels of Mask run from 0 to 2",
    ),
    (lambda: c.Family(fade_family)(np.zeros([1, 5, 5, 1]), 0.1), "acts on 24 numbers"),
    (lambda: c.Family(lambda v: v).get_config(), "cannot be imported again"),
    (lambda: Undecorated(3.0).get_config(), "Undecorated: strength would be lost in a config"),
    (lambda: Kernel().get_config(), "Kernel.kernel is a ndarray, which JSON does not hold"),
    (lambda: c.from_config({"kind": f"{__name__}:fade_family"}, True), "not a class derived from"),
    (lambda: c.from_config({"kind": f"{__name__}:A_BLUR"}, True), "not a class derived from"),
    (lambda: parts.check_importable({"kind": "__main__:Fade"}), "put it into a module"),
    (
      lambda: parts.check_importable({"kind": "Compose", "inner": {"kind": "m:f.<locals>.Fade"}}),
      "put it into a module",
    ),
    (lambda: parts.check_importable(c.Family("__main__:f").get_config()), "put it into a module"),
  ],
)
def test_bad_input_says_what_is_wrong(make, text):
  with pytest.raises(ValueError, match=text):
    make()


def test_a_class_in_a_file_that_is_not_on_the_path_could_not_be_opened_again(tmp_path, monkeypatch):
  """A config file is loaded so, and what is trained with its class would be lost."""
  file = tmp_path / "some_config.py"
  file.write_text(
    "from soft_diffusion_tf import corruptions\n"
    "class Fade(corruptions.Scale):\n  pass\n"
    "def family(level):\n  return level\n"
  )
  spec = importlib.util.spec_from_file_location("some_config", file)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "some_config", module)
  spec.loader.exec_module(module)
  blur = c.GaussianBlur()
  both = c.Compose(blur, module.Fade(), outer_level=(1.0, 0.0))
  for corruption in (module.Fade(), both, c.Family("some_config:family")):
    with pytest.raises(ValueError, match=r"some_config:\w+ cannot be imported again"):
      parts.check_importable(corruption.get_config())
  with pytest.raises(ValueError, match="cannot be imported again"):
    c.Family(module.family).get_config()
  monkeypatch.syspath_prepend(tmp_path)
  parts.check_importable(module.Fade().get_config())
  assert c.Family(module.family).get_config()["family"] == "some_config:family"


@pytest.mark.parametrize("level", [3.0, 7.5, 31.0, 1e9, 1e30, 3e38])
def test_blocks_as_large_as_the_image_average_it(level, rng):
  x = rng.random([2, 8, 8, 1]).astype(np.float32)
  want = np.broadcast_to(x.mean((1, 2, 3), keepdims=True), x.shape)
  np.testing.assert_allclose(c.BlockAverage()(x, level), want, atol=1e-6)


def test_what_is_not_linear_has_no_matrix():
  gamma = c.Gamma()
  x = np.float32([0.0, 0.25, 1.0, -0.25]).reshape(1, 2, 2, 1)
  want = np.float32([0.0, 0.0625, 1.0, -0.0625]).reshape(x.shape)
  np.testing.assert_allclose(gamma(x, 1.0), want, atol=1e-7)
  for ask in (
    lambda: gamma.adjoint(x, 1.0),
    lambda: gamma.operator(1.0, (2, 2, 1)),
    lambda: gamma.svd(1.0, (2, 2, 1)),
    lambda: c.Compose(c.GaussianBlur(), gamma).adjoint(x, 1.0),
  ):
    with pytest.raises(ValueError, match="has linear = False, so it has no"):
      ask()
