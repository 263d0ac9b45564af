"""NCSN++ against the published network, and as a citizen of Keras."""

import itertools
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import score_sde as import_score_sde
from soft_diffusion_tf.networks import NCSNpp, blocks

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ncsnpp"
FILES = {
  # Fourier phases of hundreds of radians round at 1e-5 of the output; labels do not.
  "a_ve_biggan_fir_input_residual": 2e-5,
  "b_output_skip_input_skip_sum": 2e-5,
  "c_ddpm_block_nofir_positional": 5e-6,
}
SEED = tf.constant([5, 6])
TINY = {
  "image_shape": (8, 8, 1),
  "nf": 8,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (4,),
}


def load(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    golden = dict(file)
  return golden, import_score_sde.import_score_sde(golden, str(golden["config_json"]))


@pytest.fixture(scope="module")
def published():
  return load("a_ve_biggan_fir_input_residual")


def redrawn(seed=0, **options):
  """A small network in which every path contributes: no kernel is nearly zero."""
  network = NCSNpp(**TINY | options)
  draw = np.random.default_rng(seed)
  for v in network.trainable_variables:
    fan = max(1, np.prod(v.shape[:-1]))
    value = draw.normal(size=v.shape) / np.sqrt(fan if len(v.shape) > 1 else 25)
    v.assign(1 + value if v.name == "gamma" else value)
  return network


def inputs(batch=3, shape=(8, 8, 1), seed=1):
  draw = np.random.default_rng(seed)
  return (
    tf.constant(draw.uniform(size=(batch, *shape)), tf.float32),
    tf.constant(draw.uniform(0.5, 5, size=batch), tf.float32),
  )


def error(got, want):
  """The largest difference of a sample, relative to the sample's largest value."""
  got, want = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (got, want))
  return (np.abs(got - want).max(1) / np.abs(want).max(1)).max()


# --- The published network ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "graph"), [*((name, False) for name in FILES), (next(iter(FILES)), True)]
)
def test_published_output(name, graph):
  golden, network = load(name)
  call = tf.function(network) if graph else network
  y = call(tf.constant(golden["x"]), tf.constant(golden["time_cond"]))
  assert y.dtype == tf.float32
  assert error(y, golden["y"]) < FILES[name]


def test_published_activations(published):
  golden, network = published
  seen = {}
  for layer in network.blocks:
    call = layer.call

    def record(x, *args, layer=layer, call=call, **kwargs):
      seen[f"{layer.name}/in"], seen[layer.name] = x, call(x, *args, **kwargs)
      return seen[layer.name]

    layer.call = record
  try:
    y = network(golden["x"], golden["time_cond"])
  finally:
    for layer in network.blocks:
      del layer.call
  down, up = "after_each_down_block/", "after_each_up_block/"
  places = {
    "fourier_features": "fourier",
    "temb": "time_1",
    "after_first_conv": "first_conv",
    f"{down}level0_block0": "down_0_block_0",
    f"{down}level0_down": "down_0_resample",
    f"{down}level0_input_pyramid_conv": "down_0_pyramid",
    f"{down}level0_merged": "down_1_block_0/in",
    f"{down}level1_block0": "down_1_block_0",
    f"{down}level1_block0_attn": "down_1_attention_0",
    "mid/block0": "middle_block_0",
    "mid/attn": "middle_attention",
    "bottleneck": "middle_block_1",
    f"{up}level1_block0": "up_1_block_0",
    f"{up}level1_block1": "up_1_block_1",
    f"{up}level1_attn": "up_1_attention",
    f"{up}level1_up": "up_1_resample",
    f"{up}level0_block0": "up_0_block_0",
    f"{up}level0_block1": "up_0_block_1",
    "before_sigma_division": "last_conv",
  }
  stored = {key for key in golden if "/" in key and not key.startswith(("param/", "grad/"))}
  assert stored <= set(places)
  for key, place in places.items():
    # The same bound as for the output, which has the longest way to collect rounding.
    assert error(seen[place], golden[key]) < 2e-5, key
  assert error(y, golden["y"]) < 2e-5


def test_published_gradients(published):
  golden, network = published
  x = tf.constant(golden["x"])
  tensors = [t for t in import_score_sde._tensors(network) if t[1].trainable]
  assert {f"grad/{t[0]}" for t in tensors} == {key for key in golden if key.startswith("grad/")}
  with tf.GradientTape() as tape:
    tape.watch(x)
    loss = tf.reduce_sum(network(x, golden["time_cond"]) * golden["v"])
  gradient_x, *gradients = tape.gradient(loss, [x, *(t[1].value for t in tensors)])
  # Two published implementations differ by 7e-6, float64 from float32 by 2.5e-5.
  assert np.abs(gradient_x - golden["grad_x"]).max() < 1e-4 * np.abs(golden["grad_x"]).max()
  for (name, _, layout, _), gradient in zip(tensors, gradients):
    want = golden[f"grad/{name}"]
    # The softmax does not see the keys' bias: its gradient is 0, stored is rounding noise.
    scale = 1 if name.endswith("NIN_1.b") else np.abs(want).max()
    assert np.abs(layout[1](gradient.numpy()) - want).max() < 1e-4 * scale, name


VE_CIFAR10 = {
  "image_shape": (32, 32, 3),
  "progressive_input": "residual",
  "scale_by_sigma": True,
  "sigma_min": 0.01,
  "sigma_max": 50.0,
  "num_scales": 1000,
}
CELEBA_HQ = VE_CIFAR10 | {
  "image_shape": (256, 256, 3),
  "ch_mult": (1, 1, 2, 2, 2, 2, 2),
  "num_res_blocks": 2,
  "progressive": "output_skip",
  "progressive_input": "input_skip",
}
VP = {"embedding_type": "positional", "centered": True, "scale_by_sigma": False}
COUNTS = {
  "ve/cifar10_ncsnpp_continuous": (VE_CIFAR10, 62_758_787, 62_758_915, 571),
  "ve/cifar10_ncsnpp_deep_continuous": (
    VE_CIFAR10 | {"num_res_blocks": 8},
    107_586_947,
    107_587_075,
    963,
  ),
  "ve/celeba_ncsnpp": (
    VE_CIFAR10 | {"image_shape": (64, 64, 3), "embedding_type": "positional"},
    62_693_251,
    62_693_251,
    570,
  ),
  "ve/cifar10_ddpm": (
    VE_CIFAR10
    | {
      "num_res_blocks": 2,
      "resblock_type": "ddpm",
      "fir": False,
      "skip_rescale": False,
      "embedding_type": "positional",
      "progressive_input": "none",
    },
    35_218_947,
    35_218_947,
    308,
  ),
  "ve/celebahq_256_ncsnpp_continuous": (CELEBA_HQ, 65_574_421, 65_574_549, 645),
  "ve/celebahq_ncsnpp_continuous": (
    CELEBA_HQ
    | {
      "image_shape": (1024, 1024, 3),
      "nf": 16,
      "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
      "num_res_blocks": 1,
    },
    105_785_880,
    105_785_896,
    553,
  ),
  "vp/cifar10_ncsnpp_continuous": (VE_CIFAR10 | VP, 62_693_251, 62_693_251, 570),
  "vp/cifar10_ddpmpp_continuous": (
    VE_CIFAR10 | VP | {"fir": False, "progressive_input": "none"},
    61_804_419,
    61_804_419,
    564,
  ),
}


SAME_CODE = (
  "ve/cifar10_ncsnpp_deep_continuous",
  "ve/celebahq_256_ncsnpp_continuous",
  "vp/cifar10_ncsnpp_continuous",
)


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in SAME_CODE else n for n in COUNTS]
)
def test_published_parameter_counts(name):
  options, trainable, total, tensors = COUNTS[name]
  with keras.StatelessScope():  # shapes alone: the values would take up to 430 MB
    network = NCSNpp(**options)
  assert sum(np.prod(v.shape) for v in network.trainable_variables) == trainable
  assert sum(np.prod(v.shape) for v in network.variables) == total
  assert len(network.variables) == tensors


# --- Initialisation -----------------------------------------------------------------------------


def test_initial_values_by_kind():
  """Deviation times √fan of every kernel: 1, √0.1 or 1e-5, as published."""
  network = NCSNpp(
    image_shape=(8, 8, 3),
    nf=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resblock_type="ddpm",
    progressive="output_skip",
    progressive_input="input_skip",
  )
  kinds = {1.0: 0, 0.1: 0, 1e-10: 0}
  for v in network.trainable_variables:
    if v.name != "kernel":
      want = 1 if v.name == "gamma" else 0
      np.testing.assert_array_equal(v.numpy(), want, err_msg=v.path)
      continue
    path = v.path
    if any(part in path for part in ("_conv_1/", "_out/", "_output_conv/")):
      scale = 1e-10
    elif "attention" in path or "shortcut" in path:
      scale = 0.1
    else:
      scale = 1.0
    kinds[scale] += 1
    fan = np.prod(v.shape[:-2]) * sum(v.shape[-2:]) / 2
    # Five deviations of the sample variance of a uniform variable, √(0.8/n).
    variance = np.var(v.numpy().astype(np.float64)) * fan / scale
    assert abs(variance - 1) < 5 * np.sqrt(0.8 / v.numpy().size), path
  assert all(kinds.values())


def test_initial_values_are_a_function_of_the_seed():
  first, same, other = (NCSNpp(**TINY, seed=s).get_weights() for s in (0, 0, 1))
  kernels = [i for i, w in enumerate(first) if w.ndim > 1]
  assert all((a == b).all() for a, b in zip(first, same))
  assert all((first[i] != other[i]).any() for i in kernels)
  # No two layers of one shape share a draw.
  for i, j in itertools.combinations(kernels, 2):
    assert first[i].shape != first[j].shape or (first[i] != first[j]).any()


@pytest.mark.parametrize("progressive", ["none", "output_skip"])
def test_the_output_starts_near_zero(progressive):
  y = NCSNpp(**TINY, progressive=progressive)(*inputs()).numpy()
  # The last kernel's deviation is 1e-5/√fan and it sees values of order 1 at `fan` places.
  assert 0 < np.abs(y).max() < 1e-3
  assert abs(y.mean()) < 1e-4


# --- Options ------------------------------------------------------------------------------------

PAIRS = [
  {"resblock_type": r, "fir": f, "progressive": p, "progressive_input": i, "progressive_combine": c}
  for r, f, p, (i, c) in itertools.product(
    ("biggan", "ddpm"),
    (True, False),
    ("none", "output_skip", "residual"),
    (("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")),
  )
]
EXTRAS = [
  {"embedding_type": "positional"},
  {"embedding_type": "positional", "nf": 5, "ch_mult": (1,), "attn_resolutions": (8,)},
  {
    "embedding_type": "positional",
    "scale_by_sigma": True,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
    "num_scales": 10,
  },
  {"scale_by_sigma": True},
  {"conditional": False},
  {"conditional": False, "embedding_type": "positional"},
  {"skip_rescale": False, "centered": True, "progressive": "residual"},
  {"resblock_type": "ddpm", "resamp_with_conv": False},
  {"resblock_type": "ddpm", "resamp_with_conv": False, "fir": False},
  {"image_shape": (8, 12, 3), "attn_resolutions": (8, 4)},
  {"image_shape": (4, 4, 2), "ch_mult": (1,), "attn_resolutions": ()},
  {"fir_kernel": (1, 2, 1)},
]


@pytest.mark.parametrize("options", PAIRS + EXTRAS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_runs_and_every_variable_matters(options):
  network = redrawn(**options)
  x, cond = inputs(2, network.image_shape)
  with tf.GradientTape() as tape:
    y = network(x, cond)
    loss = tf.reduce_sum(y * inputs(2, network.image_shape, seed=2)[0])
  assert y.shape == x.shape
  assert np.isfinite(y).all()
  variables = network.trainable_variables
  for v, g in zip(variables, tape.gradient(loss, [v.value for v in variables])):
    # The softmax does not see the keys' bias.
    assert "_key/bias" in v.path or (g is not None and np.abs(g).max() > 0), v.path


def test_time_and_image_matter():
  network = redrawn()
  x, cond = inputs()
  y = network(x, cond).numpy()
  assert np.abs(y - network(x, cond * 1.1).numpy()).max() > 1e-3
  assert np.abs(y - network(x * 1.1, cond).numpy()).max() > 1e-3
  free = redrawn(conditional=False)
  np.testing.assert_array_equal(free(x, cond), free(x, cond * 2))


def test_centred_images_differ_by_the_map_alone():
  x, cond = inputs()
  want = redrawn(centered=True)(2 * x - 1, cond)
  np.testing.assert_array_equal(redrawn()(x, cond), want)


def test_scale_by_sigma_divides():
  x, _ = inputs(2)
  plain, sigma = redrawn(), tf.constant([0.5, 40.0])
  # Division and multiplication each round once.
  np.testing.assert_allclose(
    redrawn(scale_by_sigma=True)(x, sigma) * sigma[:, None, None, None], plain(x, sigma), rtol=1e-6
  )
  table = {"sigma_min": 0.01, "sigma_max": 50.0, "num_scales": 10}
  label = tf.constant([0.9, 9.0])  # truncated: the first and last entries
  positional = {"embedding_type": "positional"}
  got = redrawn(**positional, **table, scale_by_sigma=True)(x, label)
  want = redrawn(**positional)(x, label) / np.reshape([50, 0.01], (2, 1, 1, 1))
  np.testing.assert_allclose(got, want, rtol=1e-6)  # rounding of 0.01 and of the division


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"image_shape": (10, 8, 1), "ch_mult": (1, 1, 1)},
      "not divisible by 4.* 8×8 and 12×8; .*fewer levels",
    ),
    ({"image_shape": (8, 8)}, "height, width, channels"),
    ({"ch_mult": ()}, "one positive multiplier per resolution"),
    ({"resblock_type": "bigan"}, "did you mean 'biggan'"),
    ({"progressive": "skip"}, "did you mean 'output_skip'"),
    ({"embedding_type": "fourrier"}, "did you mean 'fourier'"),
    ({"dropout": 1.0}, "network.dropout must be from 0 below 1, got 1.0"),
    ({"nf": 2}, "network.nf must be from 4 to 4,096, got 2"),
    ({"nf": 36, "ch_mult": (4, 1)}, "144 channels"),
    ({"fir_kernel": (1,)}, "at least two taps"),
    ({"init_scale": -1.0}, "init_scale"),
    ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min = 2 and sigma_max = 1 must rise"),
    ({"nff": 8}, "nff"),
    ({"nf": 10**6}, "network.nf must be from 4 to 4,096, got 1000000"),
    ({"nf": 4096, "ch_mult": (64, 64)}, "GiB of memory"),
    ({"image_shape": (8, 8, 10**10)}, "GiB of memory"),
    ({"nf": "8"}, "network.nf must be a whole number"),
    ({"nf": 8.5}, "network.nf must be a whole number"),
    ({"num_res_blocks": None}, "network.num_res_blocks must be a whole number"),
    ({"ch_mult": 2}, "network.ch_mult must be a tuple"),
    ({"ch_mult": (1.5,)}, "network.ch_mult.0. must be a whole number"),
    ({"attn_resolutions": None}, "network.attn_resolutions must be a tuple"),
    ({"image_shape": "8x8"}, "image_shape='8x8'"),
  ],
)
def test_bad_options_are_refused_in_one_line(options, message):
  with pytest.raises(ValueError, match=message) as caught:
    NCSNpp(**TINY | options)
  assert "\n" not in str(caught.value)


# --- Randomness and batches ---------------------------------------------------------------------


def test_an_image_does_not_see_its_neighbours():
  network = redrawn()
  x, cond = inputs(4)
  whole = network(x, cond)
  # Kernels of another batch size may sum in another order.
  assert error(network(x[2:3], cond[2:3]), whole[2:3]) < 1e-5
  changed = tf.concat([x[:2] + 1, x[2:]], axis=0)
  assert error(network(changed, cond)[2:], whole[2:]) < 1e-6


def test_dropout_is_a_function_of_seed_and_place():
  network = redrawn(dropout=0.3)
  x, cond = inputs(6)
  call = lambda x, cond, first, seed=SEED: network(x, cond, training=True, seed=seed, first=first)
  whole = call(x, cond, 4)
  # The masks are equal; kernels of another batch size may sum in another order.
  assert error(call(x[:2], cond[:2], 4), whole[:2]) < 1e-5
  assert error(call(x[2:], cond[2:], tf.constant(6)), whole[2:]) < 1e-5
  assert error(call(x, cond, 5), whole) > 1e-2
  assert error(call(x, cond, 4, SEED + 1), whole) > 1e-2
  assert error(network(x, cond), whole) > 1e-2
  np.testing.assert_array_equal(network(x, cond), network(x, cond, seed=SEED))
  wide = call(x, cond, tf.constant(4, tf.int64), tf.cast(SEED, tf.int64))
  np.testing.assert_array_equal(wide, whole)


def test_dropout_without_a_seed_is_refused():
  network = NCSNpp(**TINY)
  with pytest.raises(ValueError, match="needs seed"):
    network(*inputs(), training=True)
  NCSNpp(**TINY | {"dropout": 0.0})(*inputs(), training=True)


def test_blocks_drop_different_values():
  network = NCSNpp(**TINY)
  numbers = [b.index for b in network.blocks if isinstance(b, blocks.ResidualBlock)]
  assert len(numbers) > 2
  assert len(set(numbers)) == len(numbers)


# --- Keras, XLA, precision ----------------------------------------------------------------------


def test_config_round_trip():
  network = redrawn(
    progressive_input="residual", dropout=0.2, scale_by_sigma=True, attn_resolutions=(8, 4)
  )
  config = json.loads(json.dumps(network.get_config()))  # lists in place of tuples
  twin = NCSNpp.from_config(config)
  assert twin.get_config() == network.get_config()
  twin.set_weights(network.get_weights())
  np.testing.assert_array_equal(twin(*inputs()), network(*inputs()))
  assert [v.path for v in twin.variables] == [v.path for v in network.variables]
  assert len({v.path for v in network.variables}) == len(network.variables)


@pytest.mark.parametrize(
  "options", [{}, {"progressive": "output_skip"}, {"dtype": "mixed_bfloat16"}]
)
def test_saved_alone_as_keras_file(tmp_path, options):
  network = redrawn(progressive_input="input_skip", **options)
  network.save(tmp_path / "network.keras")
  loaded = keras.saving.load_model(tmp_path / "network.keras")
  assert isinstance(loaded, NCSNpp)
  assert loaded.dtype_policy.name == network.dtype_policy.name
  for a, b in zip(loaded.variables, network.variables, strict=True):
    np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)  # the frequencies too
  np.testing.assert_array_equal(loaded(*inputs()), network(*inputs()))


def test_summary_lists_every_layer():
  network, lines = NCSNpp(**TINY), []
  network.summary(print_fn=lambda line, **_: lines.append(line), line_length=120)
  text = "\n".join(lines)
  assert f"{network.count_params():,}" in text
  assert all(layer.name in text for layer in network.blocks)


def test_checkpoint_round_trip(tmp_path):
  network = redrawn()
  path = tf.train.Checkpoint(network=network).save(tmp_path / "ckpt")
  twin = NCSNpp(**TINY)
  tf.train.Checkpoint(network=twin).restore(path).assert_consumed()
  assert len(tf.train.list_variables(path)) >= len(network.variables)
  np.testing.assert_array_equal(twin(*inputs()), network(*inputs()))


def test_saved_model_of_a_module_that_tracks_the_network(tmp_path):
  class Module(tf.Module):
    def __init__(self, network):
      super().__init__()
      self.network = network

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1]), tf.TensorSpec([None])])
    def __call__(self, x, cond):
      return self.network(x, cond)

  network = redrawn()
  tf.saved_model.save(Module(network), str(tmp_path))
  loaded = tf.saved_model.load(str(tmp_path))
  # A graph may fuse what eager execution rounds in between.
  assert error(loaded(*inputs()), network(*inputs())) < 1e-5


def training_gradients(network, **options):
  x, cond = inputs()
  with tf.GradientTape() as tape:
    y = network(x, cond, training=True, seed=SEED)
    loss = tf.reduce_mean(tf.square(y - x))
  return y, tape.gradient(loss, [v.value for v in network.trainable_variables])


def assert_same_gradients(got, want, tolerance):
  for a, b in zip(got, want):
    scale = max(np.abs(w).max() for w in want) * 1e-3 + np.abs(b).max()
    assert np.abs(a - b).max() < tolerance * scale


PEAK = """
import resource, sys
from tools.benchmarks import network
net = network.NCSNpp(image_shape=(32, 32, 3), nf=32, ch_mult=(1, 2, 2), num_res_blocks=2,
                     remat=sys.argv[1] == "True")
step = network.make_steps(net, 96)[1]
step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_remat_cuts_peak_memory():
  """The peak of a whole process, so each in its own."""
  root = pathlib.Path(__file__).parents[2]
  peaks = []
  for remat in (False, True):
    command = [sys.executable, "-c", PEAK, str(remat)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    peaks.append(int(result.stdout))
  # Measured 0.67 (2.7 and 1.8 GiB), of which 0.7 GiB are TensorFlow and weights in both.
  assert peaks[1] < 0.8 * peaks[0]


@pytest.fixture(scope="module")
def eager():
  """A network with dropout, its output and its gradients, by eager execution."""
  network = redrawn(progressive_input="residual", dropout=0.3)
  return network, *training_gradients(network)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graph_xla_and_remat_equal_eager(eager, jit, remat):
  """Also the dropout masks, which recomputation must draw a second time."""
  network, want, want_gradients = eager
  if remat:
    network = redrawn(progressive_input="residual", dropout=0.3, remat=True)
  y, gradients = tf.function(training_gradients, jit_compile=jit)(network)
  # The order of float32 sums; phases of tens of radians round at 1e-5.
  assert error(y, want) < 1e-4
  assert_same_gradients(gradients, want_gradients, 1e-3)


def test_xla_equals_eager():
  network = redrawn(dropout=0.3)
  call = lambda *args: network(*args, training=True, seed=SEED)
  # As above.
  assert error(tf.function(call, jit_compile=True)(*inputs()), call(*inputs())) < 1e-4


def test_bfloat16_follows_float32():
  options = {"progressive_input": "residual", "dropout": 0.0}
  full, mixed = redrawn(**options), redrawn(**options, dtype="mixed_bfloat16")
  assert all(v.dtype == "float32" for v in mixed.variables)
  y, gradients = training_gradients(mixed)
  want, want_gradients = training_gradients(full)
  assert y.dtype == tf.float32
  # Ten blocks, each rounding at 2^-9 = 0.2 %; a network that computed in float32 after all would
  # stay below 1e-5.
  assert 1e-5 < error(y, want) < 0.1
  norm = tf.linalg.global_norm(want_gradients)
  difference = tf.linalg.global_norm([a - b for a, b in zip(gradients, want_gradients)])
  assert difference < 0.1 * norm  # as for the output
  assert mixed.blocks[0].compute_dtype == "float32"


def test_bfloat16_keeps_the_condition_in_float32():
  """σ in bfloat16 would turn a Fourier phase by whole radians."""
  mixed = redrawn(dtype="mixed_bfloat16")
  full = redrawn()
  _, cond = inputs()
  features = [network.blocks[0](cond) for network in (full, mixed)]
  np.testing.assert_array_equal(*features)


def test_global_policy_is_followed():
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("mixed_bfloat16")
  try:
    network = NCSNpp(**TINY)
  finally:
    keras.config.set_dtype_policy(before)
  assert all(
    layer.compute_dtype == "bfloat16"
    for layer in network.blocks
    if isinstance(layer, blocks.ResidualBlock | blocks.Attention)
  )


TWO_REPLICAS = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from soft_diffusion_tf.networks import NCSNpp
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
options = dict(image_shape=(8, 8, 1), nf=8, ch_mult=(1, 2), num_res_blocks=1,
               attn_resolutions=(4,), dropout=0.3, init_scale=1.0)
network = NCSNpp(**options)
with strategy.scope():
  mirrored = NCSNpp(**options)
x, cond = tf.random.stateless_uniform([4, 8, 8, 1], [0, 1]), tf.constant([0.5, 1.0, 2.0, 4.0])
call = lambda network, x, cond, first: network(x, cond, training=True, seed=[5, 6], first=first)

@tf.function
def step():
  def replica():
    first = 2 * tf.distribute.get_replica_context().replica_id_in_sync_group
    return call(mirrored, x[first : first + 2], cond[first : first + 2], first)
  return strategy.experimental_local_results(strategy.run(replica))

want, got = call(network, x, cond, 0), tf.concat(step(), axis=0)
print(float(tf.reduce_max(tf.abs(got - want)) / tf.reduce_max(tf.abs(want))))
"""


def test_two_replicas_compute_what_one_device_does():
  """Half a batch each, with dropout by the place in the whole; needs a process of its own."""
  root = pathlib.Path(__file__).parents[2]
  command = [sys.executable, "-c", TWO_REPLICAS]
  result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  # Kernels of another batch size may sum in another order; another mask would differ by 0.1.
  assert float(result.stdout) < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_attention_is_at_the_same_levels_in_both_orientations(channels):
  options = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
  wide, high = (NCSNpp(image_shape=(*size, channels), **options) for size in ((8, 16), (16, 8)))
  assert [v.path for v in wide.variables] == [v.path for v in high.variables]
  assert any("down_0_attention" in v.path for v in wide.variables)
