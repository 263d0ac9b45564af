import json

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import evaluation, gaussians, priors, training


class Flat(tf.Module):
  """A feature network in TF-GAN's format: image means by channel and position."""

  @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
  def __call__(self, images):
    return {
      "pool_3": tf.reshape(tf.image.resize(images, [2, 2]), [-1, 12]),
      "logits": images[:, 0, 0],
    }


class Other(tf.Module):
  @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
  def __call__(self, images):
    return {"features": images}


PIXELS = evaluation.feature_network("pixels")


def test_tfgan_and_the_exact_value_agree_where_its_cut_off_does_not_bite(rng):
  one = rng.standard_normal([400, 6]) @ rng.standard_normal([6, 6])
  two = rng.standard_normal([300, 6]) + 0.5
  got = evaluation.distance(PIXELS, one, two)
  assert got.value == pytest.approx(got.exact, rel=1e-6)
  assert got.exact == pytest.approx(gaussians.frechet_between(one, two))
  assert "exact" not in str(got)
  assert got.count == 300
  assert got.dimension == 6


def test_small_features_show_both_values(rng):
  one, two = 1e-4 * rng.standard_normal([2, 100, 3])  # products of variances fall below 1e-10
  got = evaluation.distance(PIXELS, one, two)
  assert abs(got.value - got.exact) > 1e-3 * got.exact
  assert "exact" in str(got)


def test_names_and_warnings(rng):
  assert PIXELS.label == "FD[pixels]"
  assert evaluation.FeatureNetwork("tfgan", None).label == "FID"
  few = evaluation.distance(PIXELS, *rng.standard_normal([2, 5, 9]))
  assert "N = 5 is not above the 9 features" in str(few)


def test_a_saved_model_as_feature_network(tmp_path, rng):
  tf.saved_model.save(Flat(), str(tmp_path / "flat"))
  network = evaluation.feature_network(str(tmp_path / "flat"))
  assert network.label == "FD[flat]"
  assert len(network.digest) == 16
  images = rng.random([7, 4, 4, 3], np.float32)
  features = evaluation.extract(network, images, batch=3)
  np.testing.assert_allclose(
    features, tf.reshape(tf.image.resize(2 * images - 1, [2, 2]), [7, 12]), atol=1e-6
  )
  grey = rng.integers(0, 256, [7, 4, 4, 1]).astype(np.uint8)
  assert evaluation.extract(network, grey).shape == (7, 12)


def test_bad_feature_networks(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="not a SavedModel folder"):
    evaluation.feature_network(str(tmp_path))
  tf.saved_model.save(Other(), str(tmp_path / "other"))
  network = evaluation.feature_network(str(tmp_path / "other"))
  with pytest.raises(ValueError, match=r"gives \['features'\], not 'pool_3'"):
    evaluation.extract(network, np.zeros([2, 4, 4, 3], np.float32))
  import tensorflow_hub

  def unreachable(handle):
    raise OSError("no network")

  monkeypatch.setattr(tensorflow_hub, "load", unreachable)
  with pytest.raises(ValueError, match=r"cannot fetch https://tfhub\.dev/.*give its folder"):
    evaluation.feature_network("tfgan")


def test_nan_images_are_named():
  images = np.zeros([5, 4, 4, 1], np.float32)
  images[3, 0, 0] = np.nan
  with pytest.raises(ValueError, match="image 3 holds NaN"):
    evaluation.extract(PIXELS, images)


def test_evaluating_a_run(tiny, digits):
  process = tiny.build_diffusion()
  process = process.with_prior(priors.fit("blurred_colour", digits, process))
  run = training.Run(tiny, training.build(tiny, process), 0)
  images = (digits[:200] * 255).astype(np.uint8)
  result = evaluation.evaluate(run, images, 100, PIXELS, progress=False)
  assert result["samples"].shape == (100, 8, 8, 1)
  assert 0 < result["floor"].value < result["distance"].value  # an untrained network is no match
  json.dumps(result["distance"].value)
  again = run.images(range(20))
  np.testing.assert_array_equal(again[:16], result["samples"][:16])
  with pytest.raises(ValueError, match="500 images asked for, but the data set has 200"):
    evaluation.evaluate(run, images, 500, PIXELS, progress=False)
