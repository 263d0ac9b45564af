"""The model in the hands of Keras: fit, callbacks, .keras files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from soft_diffusion_tf import callbacks, data, priors, rng
from soft_diffusion_tf.experiment import Sampling
from soft_diffusion_tf.model import SoftDiffusionModel

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
    "epoch-0002.png", "epoch-0004.png",
  ]  # fmt: skip
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
  from soft_diffusion_tf import bulk, gaussians, plots

  images = bulk.Drawer(model.diffusion, model.denoiser(), OPTIONS).images(range(70))
  one, other = (
    np.float64(x.reshape(len(x), -1)) for x in (plots.to_uint8(images) / 255, digits[:80])
  )
  assert value == pytest.approx(gaussians.frechet_between(one, other), rel=1e-3)
  with pytest.raises(ValueError, match="at least 1"):
    callbacks.SampleGrid("x", count=0)
