import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import losses, optimizer, priors, rng
from soft_diffusion_tf.model import NonFiniteLoss, SoftDiffusionModel
from soft_diffusion_tf.optimizer import PreReducedAdam, WarmUp
from soft_diffusion_tf.training import build


@pytest.fixture
def model(tiny, digits):
  process = tiny.build_diffusion()
  process = process.with_prior(priors.fit("blurred_colour", digits, process))
  tiny = tiny.replace(network={"dropout": 0.0}, training={"warmup_steps": 0})
  return build(tiny, process)


def test_the_prediction_is_the_residual(model, digits):
  x, t = tf.constant(digits[:3]), tf.constant([0.0, 0.5, 1.0])
  cond = 0.01 * 5000.0 ** t.numpy()
  np.testing.assert_allclose(model.cond(t), cond, rtol=1e-5)
  want = x + model.network(x, tf.constant(cond, tf.float32))
  np.testing.assert_allclose(model(x, t), want, atol=1e-6)
  np.testing.assert_allclose(model.denoiser(ema=False)(x, t), want, atol=1e-6)
  np.testing.assert_array_equal(model.denoiser()(x, t), model(x, t))  # equal before training


def test_one_update_by_hand(model, digits):
  """Loss, gradient, clip, Adam and EMA of the first step, redone with plain operations."""
  x_0 = tf.constant(digits[:16])
  names = [v.path for v in model.network.trainable_variables]
  before = [v.numpy() for v in model.network.trainable_variables]
  seed = tf.constant([model.seed, 0], tf.int64)
  t = 1e-5 + (1 - 1e-5) * rng.uniform(rng.fold_in(seed, 0), 0, 16)
  eta = rng.normal(rng.fold_in(seed, 1), 0, 16, (8, 8, 1))
  with tf.GradientTape() as tape:
    each = losses.SoftScoreMatching()(model.diffusion, model, x_0, t, eta)
    loss = tf.reduce_mean(each)
  gradients = tape.gradient(loss, [v.value for v in model.network.trainable_variables])
  norm = tf.linalg.global_norm(gradients)
  out = model.update(x_0)
  np.testing.assert_allclose(out["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(out["t"], t)
  np.testing.assert_allclose(out["losses"], each, rtol=1e-4)
  np.testing.assert_allclose(out["gradient_norm"], norm, rtol=1e-4)
  assert norm > 1  # so the clip is at work
  rate = model.training_options.learning_rate
  for name, old, gradient, new, average in zip(
    names,
    before,
    gradients,
    model.network.trainable_variables,
    [a for a, _ in model._averaged],
  ):
    g = gradient.numpy() / float(norm)
    # Adam's first step: m̂ = g, v̂ = g². Tiny gradients are at the mercy of rounding.
    want = old - rate * g / (np.abs(g) + 1e-8)
    sure = np.abs(g) > 1e-5
    np.testing.assert_allclose(new.numpy()[sure], want[sure], atol=0.02 * rate, err_msg=name)
    decay = model.training_options.ema_decay
    np.testing.assert_allclose(average, decay * old + (1 - decay) * new.numpy(), atol=1e-6)
  assert int(model.optimizer.iterations) == 1


def test_each_step_draws_its_own_noise_and_a_step_is_repeatable(tiny, digits):
  process = tiny.build_diffusion()
  x_0 = tf.constant(digits[:16])
  runs = []
  for _ in range(2):
    model = build(tiny, process)
    runs.append([model.update(x_0) for _ in range(2)])
  for one, two in zip(*runs):
    np.testing.assert_array_equal(one["t"], two["t"])
    np.testing.assert_array_equal(one["loss"], two["loss"])
  assert np.abs(runs[0][0]["t"] - runs[0][1]["t"]).max() > 0.01


def test_stratified_times(tiny, digits):
  model = build(tiny.replace(training={"low_variance_t": True}), tiny.build_diffusion())
  t = np.sort(model.update(tf.constant(digits[:16]))["t"])
  np.testing.assert_allclose(np.diff(t), 1 / 16, atol=1e-4)


def test_frozen_fourier_features_stay_and_all_else_moves(model, digits):
  frozen = [v for v in model.network.variables if not v.trainable]
  assert frozen
  before = [v.numpy() for v in frozen]
  start = [v.numpy() for v in model.network.trainable_variables]
  for _ in range(3):
    model.update(tf.constant(digits[:16]))
  for old, v in zip(before, frozen):
    np.testing.assert_array_equal(old, v)
  moved = [
    np.abs(old - v.numpy()).max() > 0 for old, v in zip(start, model.network.trainable_variables)
  ]
  assert all(moved)


def test_training_learns(model, digits):
  step = tf.function(model.update, autograph=False)
  x_0 = tf.constant(digits[:16])
  losses_ = [float(step(x_0)["loss"]) for _ in range(300)]
  # Losses of single steps differ with t by a factor of ten; fifty of them average well enough.
  assert np.mean(losses_[-50:]) < 0.7 * np.mean(losses_[:20])


def test_fit_is_the_same_step(tiny, digits):
  process = tiny.build_diffusion()
  one, two = build(tiny, process), build(tiny, process)
  batches = [digits[k : k + 16] for k in (0, 16, 32)]
  one.fit(tf.data.Dataset.from_tensor_slices(np.stack(batches)), epochs=1, verbose=0)
  step = tf.function(two.update, autograph=False)
  for batch in batches:
    step(tf.constant(batch))
  for a, b in zip(one.network.get_weights(), two.network.get_weights()):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_warm_up():
  rate = WarmUp(0.5, 4)
  assert [float(rate(k)) for k in (0, 1, 4, 9)] == [0.0, 0.125, 0.5, 0.5]
  assert float(WarmUp(0.5, 0)(0)) == 0.5
  again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(rate))
  assert float(again(1)) == 0.125


def test_the_optimizer_does_not_sum_again(monkeypatch):
  pairs = [(1, 2)]
  assert PreReducedAdam(0.1)._all_reduce_sum_gradients(pairs) is pairs
  monkeypatch.setattr(optimizer, "_HOOK", "_of_another_keras")
  with pytest.raises(RuntimeError, match=r"has no optimizers\.Adam\._of_another_keras.*keras<3.16"):
    PreReducedAdam(0.1)


def test_a_batch_in_parts_is_the_same_step(tiny, digits):
  """With ε = 1 Adam's update follows the gradient, so weights show how well the sums agree."""
  results = {}
  for parts in (1, 4):
    options = {"warmup_steps": 0, "epsilon": 1.0, "accumulate": parts, "learning_rate": 1.0}
    experiment = tiny.replace(training=options)
    model = build(experiment, experiment.build_diffusion())
    out = tf.function(model.update, autograph=False)(tf.constant(digits[:16]))
    weights = [v.numpy() for v in model.network.trainable_variables]
    results[parts] = out, weights
  (whole, one), (parts, two) = results[1], results[4]
  np.testing.assert_array_equal(whole["t"], parts["t"])
  np.testing.assert_allclose(whole["losses"], parts["losses"], rtol=1e-4)
  np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-5)
  np.testing.assert_allclose(whole["gradient_norm"], parts["gradient_norm"], rtol=1e-5)
  for a, b in zip(one, two):
    np.testing.assert_allclose(a, b, atol=1e-6)
  with pytest.raises(tf.errors.InvalidArgumentError, match="accumulate = 4 parts must share"):
    model.update(tf.constant(digits[:10]))


def test_the_fused_update_is_that_of_keras(rng):
  start = rng.standard_normal((5, 7)).astype(np.float32)
  ends = []
  for kind in (PreReducedAdam, keras.optimizers.Adam):
    optimizer, variable = kind(WarmUp(0.1, 3)), keras.Variable(start)
    for k in range(6):
      optimizer.apply([tf.constant(np.cos(start * (k + 1)))], [variable])
    assert int(optimizer.iterations) == 6
    ends.append([v.numpy() for v in (variable, *optimizer.variables)])
  for a, b in zip(*ends):  # 1 − 0.999^t in float32 is good to 6e-5; a step is 0.1 · its root
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_leaves_images_and_times_in_float32(tiny, digits):
  """Keras would cast the arguments of the model itself: t = 0.123456 would become 0.1235."""
  model = build(tiny.replace(network={"dtype": "bfloat16"}), tiny.build_diffusion())
  assert model.network.dtype_policy.compute_dtype == "bfloat16"
  assert model.ema_network.dtype_policy.compute_dtype == "bfloat16"
  assert {v.dtype for v in model.network.trainable_variables} == {"float32"}
  seen, call = [], model.network.call
  model.network.call = lambda *args, **options: seen.append(args) or call(*args, **options)
  x, t = tf.constant(digits[:2]) * 0.987654, tf.constant([0.123456, 0.654321])
  model(x, t)
  np.testing.assert_array_equal(seen[0][0], x)
  np.testing.assert_array_equal(seen[0][1], model.cond(t))


def state(model):
  """Weights, averages and the optimizer's slots."""
  counted = ("iteration", "learning_rate")
  slots = [v for v in model.optimizer.variables if v.name not in counted]
  return [v.numpy() for v in (*model.network.variables, *model.ema_network.variables, *slots)]


def assert_same(one, two):
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny, digits, parts, value):
  tiny = tiny.replace(training={"accumulate": parts, "warmup_steps": 0})
  model = build(tiny, tiny.build_diffusion())
  step = tf.function(model.update, autograph=False)
  step(tf.constant(digits[:16]))
  before, bad = state(model), digits[:16].copy()
  bad[7, 3, 3, 0] = value
  assert not np.isfinite(step(tf.constant(bad))["gradient_norm"])
  assert_same(before, state(model))
  assert int(model.optimizer.iterations) == 2
  assert np.isfinite(step(tf.constant(digits[:16]))["gradient_norm"])  # and it goes on
  assert any(np.any(a != b) for a, b in zip(before, state(model)))


@pytest.mark.parametrize(
  "make",
  [
    lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    lambda: keras.optimizers.AdamW(1e-3),
    lambda: PreReducedAdam(1e-3, weight_decay=0.1, use_ema=True),
    lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
  ],
)
def test_nor_does_it_with_another_optimizer(tiny, digits, make):
  model = build(tiny, tiny.build_diffusion())
  model.compile(make())
  model.update(tf.constant(digits[:16]))
  before = state(model)
  model.update(tf.constant(digits[:16] * np.nan))
  assert_same(before, state(model))


_REPLICAS = """
import json, sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from soft_diffusion_tf import data, training
from soft_diffusion_tf.experiment import Experiment
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
e = Experiment.from_config(json.loads(sys.stdin.read()))
with strategy.scope():
  model = training.build(e, e.build_diffusion())
held = [*model.network.variables, *model.ema_network.variables, *model.optimizer.variables[2:]]
copies = [v.value.values for v in held]  # of every replica
state = lambda: [c.numpy() for each in copies for c in each]
step = tf.function(lambda x: strategy.run(model.update, args=(x,)), autograph=False)
x = data.load("digits").floats()[:16]
bad = x.copy()
bad[12] = np.nan  # of the second replica
def take(images):
  parts = [images[:8], images[8:]]
  return step(strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(parts[context.replica_id_in_sync_group])))
take(x)
before = state()
take(bad)
same = all(np.array_equal(a, b) for a, b in zip(before, state()))
take(x)
print("RESULT", len(copies[0]), same, any(np.any(a != b) for a, b in zip(before, state())))
"""


def test_nor_does_it_in_any_replica(tiny):
  done = subprocess.run(
    [sys.executable, "-c", _REPLICAS],
    input=json.dumps(tiny.to_dict()),
    capture_output=True,
    text=True,
    check=False,
  )
  assert "RESULT 2 True True" in done.stdout, done.stderr[-2000:]


def test_the_clip_is_that_of_tensorflow(model, rng):
  for scale in (1e-3, 1.0, 1e3, 0.0):
    gradients = [tf.constant(rng.normal(0, scale, shape), tf.float32) for shape in ((5, 7), (3,))]
    want, norm = tf.clip_by_global_norm(gradients, model.training_options.clip_norm)
    got, mine, finite = model._clip(gradients)
    assert bool(finite)
    assert_same([norm, *want], [mine, *got])


def test_held_out_losses_are_fixed_and_those_of_the_definition(model, digits):
  x = tf.constant(digits[:20])
  each, t = model.held_out(x, averaged=False)
  again, _ = model.held_out(x, averaged=True)
  np.testing.assert_array_equal(each, again)  # both sets of weights are equal before training
  two = [model.held_out(x[k : k + 10], False, k) for k in (0, 10)]
  np.testing.assert_array_equal(t, np.concatenate([part[1] for part in two]))
  np.testing.assert_allclose(each, np.concatenate([part[0] for part in two]), rtol=1e-4)
  # Fibonacci's numbers cut the interval best: 21 places lie nowhere nearer than 1/21 to 1/φ of it.
  assert np.diff(np.sort(t)).max() < 2.0 / 21
  assert np.diff(np.sort(t)).min() > 0.5 / 21
  model.update(x[:16])
  model.update(x[:16])
  assert np.any(model.held_out(x, False)[0] != model.held_out(x, True)[0])
  np.testing.assert_array_equal(model.held_out(x, True)[1], t)


def test_the_rate_of_a_fixed_optimizer_is_not_set_in_vain(model):
  with pytest.raises(ValueError, match="fixed when it is made"):
    model.optimizer.learning_rate = 0.1
  assert issubclass(NonFiniteLoss, RuntimeError)


def test_corrupted_images_of_whole_numbers_are_refused(model, digits):
  times = np.full(4, 0.5, np.float32)
  for dtype in (np.uint8, np.int64, bool):
    x_t = (255 * digits[:4]).astype(dtype)
    for denoise in (model, model.denoiser(), lambda x, t: model.predict([x, t], verbose=0)):
      with pytest.raises(ValueError, match=r"the corrupted images are \w+, and .* divide by 255"):
        denoise(x_t, times)


def test_network_and_process_are_of_one_size(tiny, blur_diffusion):
  network = tiny.replace(data={"image_shape": (16, 16, 1)}).build_network()
  with pytest.raises(ValueError, match=r"\(16, 16, 1\), and the process for \(8, 8, 1\)"):
    SoftDiffusionModel(network, blur_diffusion, training=tiny.training, options=tiny.network)
