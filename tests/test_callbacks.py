"""The model in the hands of Keras: fit, callbacks, .keras files."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from soft_diffusion_tf import callbacks, data, priors, rng
from soft_diffusion_tf.experiment import Sampling
from soft_diffusion_tf.model import NonFiniteLoss, SoftDiffusionModel

OPTIONS = Sampling(sampler="momentum", steps=3, batch_size=16)


@pytest.fixture
def model(tiny, digits):
  process = tiny.build_diffusion()
  process = process.with_prior(priors.fit("blurred_colour", digits, process))
  model = SoftDiffusionModel(
    tiny.build_network(), process, training=tiny.training, options=tiny.network
  )
  model.compile()
  return model


@pytest.fixture
def pipeline():
  return data.batches(data.load("digits", "train"), 16)


def test_fit_takes_the_steps_of_update(model, pipeline, tiny, digits):
  other = SoftDiffusionModel.from_config(model.get_config())
  other.compile()
  for (_, value), (_, same) in zip(other._averaged, model._averaged):
    np.testing.assert_array_equal(value.numpy(), same.numpy())
  history = model.fit(pipeline, steps_per_epoch=3, epochs=1, verbose=0).history
  for batch in pipeline.take(3):
    out = other.update(batch)
  assert np.isfinite(history["loss"][0])
  assert history["gradient_norm"][0] > 0
  assert float(out["loss"]) > 0
  for value, same in zip(model.network.get_weights(), other.network.get_weights()):
    np.testing.assert_allclose(value, same, atol=2e-5)  # compiled and eager kernels round apart


def test_a_keras_file_holds_everything(model, pipeline, tmp_path):
  model.fit(pipeline, steps_per_epoch=2, epochs=1, verbose=0)
  model.save(tmp_path / "m.keras")
  back = keras.models.load_model(tmp_path / "m.keras")
  assert isinstance(back, SoftDiffusionModel)
  assert back.get_config() == model.get_config()
  x, t = tf.constant(next(iter(pipeline))), tf.fill([16], 0.4)
  for ema in (True, False):
    np.testing.assert_array_equal(back.denoiser(ema)(x, t), model.denoiser(ema)(x, t))
  seeds = tf.range(3, dtype=tf.int64)
  np.testing.assert_array_equal(back.diffusion.draw_prior(seeds), model.diffusion.draw_prior(seeds))
  assert int(back.optimizer.iterations) == 2
  state = [v.numpy() for v in model.optimizer.variables]
  assert any(np.any(v != 0) for v in state[2:])
  for one, other in zip(state, back.optimizer.variables):
    np.testing.assert_array_equal(one, other.numpy())
  one, other = (m.update(x)["losses"] for m in (model, back))  # and it goes on alike
  np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_process_without_prior_has_a_config_too(ve_diffusion, tiny):
  from soft_diffusion_tf.diffusion import Diffusion

  for process in (ve_diffusion, tiny.build_diffusion()):
    back = Diffusion.from_config(process.get_config())
    assert back.get_config() == process.get_config()
    eta = rng.normal(tf.constant([0, 0]), 0, 2, process.image_shape)
    np.testing.assert_array_equal(back.forward(eta, 0.7, eta), process.forward(eta, 0.7, eta))


def test_sample_grids(model, pipeline, tmp_path):
  grids = callbacks.SampleGrid(tmp_path / "g", count=4, options=OPTIONS, every=2)
  model.fit(pipeline, steps_per_epoch=1, epochs=4, verbose=0, callbacks=[grids])
  assert [f.name for f in sorted((tmp_path / "g").iterdir())] == [
    "epoch-0002.png",
    "epoch-0004.png",
  ]
  one, other = (np.asarray(Image.open(f)) for f in sorted((tmp_path / "g").iterdir()))
  assert one.shape == (2 * 9 * 8 + 8, 2 * 9 * 8 + 8, 3)
  assert np.any(one != other)  # the weights have changed, and the grid saw it


def test_one_callback_for_two_models(model, tmp_path):
  """Two models of one process, as where two losses are compared: each draws its own samples."""
  other = SoftDiffusionModel.from_config(model.get_config())
  other.diffusion = model.diffusion
  for variable in other.ema_network.variables:
    variable.assign(0.5 * variable + 0.1)
  grid, fresh = (callbacks.SampleGrid(tmp_path, count=4, options=OPTIONS) for _ in range(2))
  grid.set_model(model)
  first = grid.images()
  grid.set_model(other)
  fresh.set_model(other)
  np.testing.assert_array_equal(grid.images(), fresh.images())
  assert np.any(first != fresh.images())


def test_the_frechet_distance_is_logged(model, pipeline, digits):
  distance = callbacks.FrechetDistance(digits[:80], count=70, options=OPTIONS, every=2)
  history = model.fit(pipeline, steps_per_epoch=1, epochs=2, verbose=0, callbacks=[distance])
  [value] = history.history["FD[pixels]"]
  from soft_diffusion_tf import drawing, gaussians, plots

  images = drawing.BatchSampler(model.diffusion, model.denoiser(), OPTIONS).images(range(70))
  one, other = (
    np.float64(x.reshape(len(x), -1)) for x in (plots.to_uint8(images) / 255, digits[:80])
  )
  assert value == pytest.approx(gaussians.frechet_between(one, other), rel=1e-3)
  with pytest.raises(ValueError, match="at least 1"):
    callbacks.SampleGrid("x", count=0)


# --- What Keras users try -------------------------------------------------------------------------


def _state(model):
  return [*model.network.get_weights(), *model.ema_network.get_weights()]


@pytest.mark.parametrize(
  ("spoil", "text"),
  [
    (lambda x: np.uint8(255 * x), r"from 0 to 255, .* divide by 255"),
    (lambda x: 2 * x - 1, r"from -1 to 1, .*take \(x \+ 1\) / 2"),
    pytest.param(lambda x: 1.05 * x, r"from 0 to 1\.05, .*clip", marks=pytest.mark.slow),
    pytest.param(
      lambda x: np.where(np.arange(8) == 5, np.nan, x.T).T,
      "hold NaN or infinity",
      marks=pytest.mark.slow,
    ),
    (lambda x: np.tile(x, (1, 2, 2, 1)), r"\(8, 16, 16, 1\), but this model is made for \[N, 8, 8"),
    (lambda x: x[..., 0], r"\(8, 8, 8\), but this model"),
    (lambda x: {"image": x, "label": x[:, 0, 0, 0]}, "a dictionary of image, label; map the data"),
    (lambda x: [x, x], "not several arrays"),
  ],
)
def test_bad_images_are_refused_and_nothing_is_learnt_from_them(model, digits, spoil, text):
  bad, before = spoil(digits[:8]), _state(model)
  for call in (
    lambda: model.fit(bad, batch_size=8, verbose=0),
    lambda: model.evaluate(bad, batch_size=8, verbose=0),
    lambda: model.train_on_batch(bad) if isinstance(bad, np.ndarray) else model.fit(bad, verbose=0),
  ):
    with pytest.raises(ValueError, match=text) as error:
      call()
    assert len(str(error.value).splitlines()) == 1
  for one, other in zip(before, _state(model)):
    np.testing.assert_array_equal(one, other)


def test_fit_stops_where_the_loss_is_not_finite(tiny, digits):
  training = tiny.replace(training={"learning_rate": 1e6, "warmup_steps": 0}).training
  process = tiny.build_diffusion()
  model = SoftDiffusionModel(tiny.build_network(), process, training=training, options=tiny.network)
  model.compile(steps_per_execution=2)
  with pytest.raises(NonFiniteLoss, match=r"is not finite at step \d+, and no update was made"):
    model.fit(digits[:160], batch_size=16, epochs=30, verbose=0)
  assert all(np.isfinite(w).all() for w in _state(model))


def test_held_out_loss_in_fit_and_evaluate(model, digits):
  losses = model.evaluate(digits[100:150], batch_size=25, verbose=0, return_dict=True)
  each = [float(np.mean(model.held_out(digits[k : k + 25], True)[0])) for k in (100, 125)]
  assert losses["ema_loss"] == pytest.approx(np.mean(each), rel=1e-4)
  history = model.fit(
    digits[:32], batch_size=16, epochs=2, verbose=0, validation_data=digits[100:150]
  ).history
  assert {len(v) for v in history.values()} == {2}
  assert history.keys() == {"loss", "gradient_norm", "val_loss", "val_ema_loss"}
  again = model.evaluate(digits[100:150], batch_size=25, verbose=0, return_dict=True)
  assert again == model.evaluate(digits[100:150], batch_size=25, verbose=0, return_dict=True)
  assert again["loss"] != losses["loss"]


@pytest.mark.slow
def test_the_loss_of_an_epoch_is_the_mean_of_its_images(model, digits):
  other = SoftDiffusionModel.from_config(model.get_config())
  other.compile()
  x = np.concatenate([digits[:16], digits[:4]])
  history = model.fit(x, batch_size=16, shuffle=False, verbose=0).history
  each = [other.update(tf.constant(part))["losses"].numpy() for part in (x[:16], x[16:])]
  assert history["loss"][0] == pytest.approx(np.mean(np.concatenate(each)), rel=1e-4)


def test_every_epoch_has_losses_of_its_own(model, digits):
  other = SoftDiffusionModel.from_config(model.get_config())
  other.compile()
  held_out = digits[32:48]
  history = model.fit(
    digits[:32], batch_size=16, shuffle=False, epochs=2, validation_data=(held_out,), verbose=0
  ).history
  parts = 2 * [digits[:16], digits[16:32]]
  each = [np.mean(other.update(tf.constant(part))["losses"]) for part in parts]
  assert history["loss"] == pytest.approx([np.mean(each[:2]), np.mean(each[2:])], rel=1e-4)
  last = np.mean(other.held_out(held_out, averaged=False)[0])
  assert history["val_loss"][1] == pytest.approx(last, rel=1e-4)
  with pytest.raises(ValueError, match="divide by 255"):
    model.train_on_batch(255 * held_out)
  assert np.isfinite(model.train_on_batch(held_out)).all()  # nothing of the bad batch is left


def test_predict_takes_pairs(model, digits):
  t = np.full(20, 0.3, np.float32)
  got = model.predict([digits[:20], t], batch_size=8, verbose=0)
  np.testing.assert_allclose(got, model.denoiser()(digits[:20], t), atol=1e-5)
  with pytest.raises(ValueError, match=r"model\.predict\(\[x_t, t\]\)"):
    model.predict(digits[:8], verbose=0)
  for call in (model, model.denoiser()):
    with pytest.raises(ValueError, match=r"made for \[N, 8, 8, 1\]: crop or resize") as error:
      call(np.zeros((1, 16, 16, 1), np.float32), np.float32([0.5]))
    assert len(str(error.value).splitlines()) == 1


def test_what_would_be_ignored_is_refused(model, digits, tmp_path):
  for options in (
    {"loss": "mae"},
    {"metrics": ["mae"]},
    {"loss_weights": [1.0]},
    {"weighted_metrics": ["mae"]},
  ):
    with pytest.raises(ValueError, match=f"compile.{next(iter(options))}=.*leave that argument"):
      model.compile(**options)
  with pytest.raises(ValueError, match="does not scale its loss"):
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
  for extra in ({"sample_weight": np.ones(16)}, {"y": np.zeros(16), "class_weight": {0: 2.0}}):
    with pytest.raises(ValueError, match="sample_weight and class_weight have no use"):
      model.fit(digits[:16], verbose=0, **extra)
  for name in ("m.h5", "m", "m.keras.h5"):
    with pytest.raises(ValueError, match=r"a file that ends in \.keras"):
      model.save(tmp_path / name)
  assert not list(tmp_path.iterdir())


def test_callbacks_can_set_the_rate(model, digits, tmp_path):
  plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1e9)
  history = model.fit(digits[:32], batch_size=16, epochs=3, verbose=0, callbacks=[plateau]).history
  one, two, three = history["learning_rate"]  # the warm-up of two steps ends with the first epoch
  assert (two, three) == (pytest.approx(one), pytest.approx(one / 2))
  model.save(tmp_path / "m.keras")
  back = keras.models.load_model(tmp_path / "m.keras")
  assert float(back.optimizer.learning_rate) == pytest.approx(float(model.optimizer.learning_rate))
  before = _state(back)
  none = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0)
  back.fit(digits[:32], batch_size=16, verbose=0, callbacks=[none])
  for a, b in zip(before[: len(before) // 2], _state(back)):  # a rate of 0 moves no weight
    np.testing.assert_array_equal(a, b)


def test_the_distance_of_images_out_of_range_is_refused(digits):
  with pytest.raises(ValueError, match=r"from -1 to 1, and images here are floats in \[0, 1\]"):
    callbacks.FrechetDistance(2 * digits[:80] - 1)


@pytest.mark.parametrize(
  ("before", "error"),
  [
    ("", ""),
    (
      "import types; keras = sys.modules['keras'] = types.ModuleType('keras'); "
      "keras.config = types.SimpleNamespace(backend=lambda: 'torch')",
      "ImportError: Keras is loaded with the backend 'torch'",
    ),
  ],
)
def test_another_backend_of_keras(before, error):
  """Named in the environment it is passed over; one that is at work already is refused."""
  code = f"import sys\n{before}\nimport soft_diffusion_tf\nfrom soft_diffusion_tf import model"
  environment = os.environ | {"KERAS_BACKEND": "torch"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
  )
  assert (done.returncode != 0) == bool(error), done.stderr
  assert error in done.stderr
