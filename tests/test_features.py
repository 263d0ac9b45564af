import hashlib
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf.evaluation import features

SPEC = tf.TensorSpec([None, None, None, 3], tf.float32)


def network(spec, function, folder):
  """Saves function as a SavedModel that takes spec; gives the folder's name."""

  class Module(tf.Module):
    @tf.function(input_signature=[spec])
    def __call__(self, images):
      return function(images)

  tf.saved_model.save(Module(), str(folder))
  return str(folder)


def flat(images):
  """In TF-GAN's format: image means by channel and position."""
  small = tf.reshape(tf.image.resize(images, [2, 2]), [-1, 12])
  return {"pool_3": small[:, None, None], "logits": small[:, :5]}


def test_a_saved_model_in_tfgans_format(tmp_path, rng):
  net = features.feature_network(network(SPEC, flat, tmp_path / "flat"))
  assert net.label == "FD[flat]"
  assert len(net.digest) == 64
  images = rng.random([7, 4, 4, 3], np.float32)
  got, logits = net(images)
  want = tf.reshape(tf.image.resize(2 * images - 1, [2, 2]), [7, 12])
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(logits, want[:, :5], atol=1e-6)
  grey = rng.integers(0, 256, [7, 4, 4, 1]).astype(np.uint8)
  np.testing.assert_array_equal(net(grey)[0], net(np.repeat(grey, 3, 3))[0])


@pytest.mark.parametrize("name", ["tfgan", "pixels", "classifier", "pixels:4"])
def test_a_saved_model_does_not_pass_for_what_is_built_in(name, tmp_path):
  net = features.feature_network(network(SPEC, flat, tmp_path / name))
  assert net.name == f"./{name}"
  assert net.label == f"FD[./{name}]"


def test_the_digest_is_of_what_computes(tmp_path):
  folder = network(SPEC, flat, tmp_path / "flat")
  before = features.feature_network(folder).digest
  (tmp_path / "flat" / "README.md").write_text("changed")
  assert features.feature_network(folder).digest == before
  other = network(SPEC, lambda x: {"pool_3": flat(x)["pool_3"] * 2}, tmp_path / "other")
  assert features.feature_network(other).digest != before


def test_a_fixed_size_is_reached_by_antialiased_bilinear_interpolation(tmp_path, rng):
  spec = tf.TensorSpec([None, 5, 6, 3], tf.float32)
  net = features.feature_network(
    network(spec, lambda x: {"pool_3": tf.reshape(x, [-1, 90])}, tmp_path / "n")
  )
  for shape in ([3, 16, 16, 3], [3, 4, 4, 3], [3, 5, 6, 3]):
    images = rng.random(shape, np.float32)
    want = 2 * tf.image.resize(images, [5, 6], antialias=True) - 1
    np.testing.assert_allclose(net(images)[0], tf.reshape(want, [3, 90]), atol=1e-6)


def test_uint8_input_and_one_channel(tmp_path, rng):
  spec = tf.TensorSpec([None, None, None, 1], tf.uint8)
  net = features.feature_network(
    network(
      spec,
      lambda x: {"pool_3": tf.cast(tf.reshape(x[:, :2, :2], [-1, 4]), tf.float32)},
      tmp_path / "n",
    )
  )
  grey = rng.integers(0, 256, [5, 4, 4, 1]).astype(np.uint8)
  np.testing.assert_array_equal(net(grey)[0], grey[:, :2, :2].reshape(5, 4))
  assert net(np.repeat(grey, 3, 3))[0].shape == (5, 4)


def test_another_output_by_name(tmp_path):
  folder = network(SPEC, lambda x: {"f": tf.reduce_mean(x, [1, 2])}, tmp_path / "n")
  with pytest.raises(ValueError, match=r"gives \['f'\], not 'pool_3'.*--feature_net=.*n#f"):
    features.feature_network(folder)
  net = features.feature_network(folder + "#f")
  assert net.label == "FD[n#f]"
  assert net(np.zeros([2, 4, 4, 3], np.float32))[0].shape == (2, 3)


@pytest.mark.parametrize(
  ("spec", "function", "text"),
  [
    (tf.TensorSpec([None, 10], tf.float32), lambda x: {"pool_3": x}, "not images float32"),
    (tf.TensorSpec([None, 4, 4, 3], tf.int32), lambda x: {"pool_3": x}, "not images float32"),
    (SPEC, lambda x: {"pool_3": tf.reduce_mean(x, [0, 1, 2])}, r"shape \(3,\) for 2 images"),
    (SPEC, lambda x: {"pool_3": tf.reshape(x, [1, 7])}, "fails on a black image"),
  ],
)
def test_a_network_that_does_not_fit(spec, function, text, tmp_path):
  with pytest.raises(ValueError, match=text):
    features.feature_network(network(spec, function, tmp_path / "n"))


def test_folders_that_are_none(tmp_path):
  with pytest.raises(ValueError, match="not a SavedModel folder"):
    features.feature_network(str(tmp_path))
  (tmp_path / "saved_model.pb").write_bytes(b"no model")
  with pytest.raises(ValueError, match=r"cannot be loaded .*; copy the SavedModel anew"):
    features.feature_network(str(tmp_path))


def test_fid_is_tfgans_inceptions_alone(tmp_path, monkeypatch):
  folder = network(SPEC, flat, tmp_path / "flat")
  with pytest.raises(
    ValueError, match="not TF-GAN's Inception, which gives 2048 features and 1008"
  ):
    features.feature_network(f"tfgan:{folder}")

  def inception(x):
    assert x.shape[1:3] in ((299, 299), (None, None))
    mean = tf.reduce_mean(x, [1, 2])
    return {"pool_3": tf.tile(mean, [1, 683])[:, :2048], "logits": tf.tile(mean, [1, 336])}

  local = network(SPEC, inception, tmp_path / "inception")
  net = features.feature_network(f"tfgan:{local}")
  assert net.label == "FID"
  assert net(np.zeros([2, 8, 8, 3], np.float32))[0].shape == (2, 2048)
  # Fetched: an archive as tfhub.dev sends it, kept for the next time.
  asked = []

  def answer(address, timeout):
    asked.append(address)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
      archive.add(local, ".")
    content.seek(0)
    return content

  monkeypatch.setattr(features.urllib.request, "urlopen", answer)
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
  for _ in range(2):
    assert features.feature_network("tfgan").digest == net.digest
  assert asked == [f"{features.TFGAN_HANDLE}?tf-hub-format=compressed"]
  (kept,) = (tmp_path / "cache").iterdir()  # by the name that tensorflow_hub gives it
  assert kept.name == hashlib.sha1(features.TFGAN_HANDLE.encode()).hexdigest()


def _unreachable(address, timeout):
  raise OSError("no network")


def _torn(address, timeout):
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w:gz") as archive:
    model = tarfile.TarInfo("saved_model.pb")
    model.size = 100_000
    archive.addfile(model, io.BytesIO(np.random.default_rng(0).bytes(model.size)))
  return io.BytesIO(content.getvalue()[:50_000])


def _climbing(address, timeout):
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w:gz") as archive:
    archive.addfile(tarfile.TarInfo("../outside"))
  content.seek(0)
  return content


@pytest.mark.parametrize(
  "answer",
  [_unreachable, _torn, _climbing, lambda address, timeout: io.BytesIO(b"<html>moved</html>")],
)
def test_tfgan_that_cannot_be_fetched(answer, monkeypatch, tmp_path):
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr(features.urllib.request, "urlopen", answer)
  with pytest.raises(ValueError) as error:
    features.feature_network("tfgan")
  text = str(error.value)
  assert text.startswith(f"cannot fetch {features.TFGAN_HANDLE} (")
  assert "--feature_net=tfgan:FOLDER" in text
  assert "\n" not in text
  assert not list((tmp_path / "cache").iterdir())  # nor a half of it
  assert [f.name for f in tmp_path.iterdir()] == ["cache"]


def test_pixels(rng):
  images = rng.integers(0, 256, [4, 8, 8, 1]).astype(np.uint8)
  got, logits = features.feature_network("pixels")(images)
  np.testing.assert_allclose(got, images.reshape(4, 64) / 255.0, atol=1e-7)
  assert logits is None
  small = features.feature_network("pixels:2")
  assert small.label == "FD[pixels:2]"
  want = tf.image.resize(images / 255.0, [2, 2], antialias=True)
  np.testing.assert_allclose(small(images)[0], tf.reshape(want, [4, 4]), atol=1e-6)
  with pytest.raises(ValueError, match="give pixels or pixels:SIDE"):
    features.feature_network("pixels:x")
  with pytest.raises(ValueError, match=r"12288 features an image.*pixels:32"):
    features.feature_network("pixels")(np.zeros([1, 64, 64, 3], np.uint8))


def test_the_classifier_needs_data():
  with pytest.raises(ValueError, match="needs a data set with labels"):
    features.feature_network("classifier")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception_v3_nsfwjs"])
def test_pretrained_networks(name, rng):
  folder = pathlib.Path(os.environ.get("SOFT_DIFFUSION_FEATURE_NETS", "")) / name
  if not (folder / "saved_model.pb").exists():
    pytest.skip(f"no {name}: set SOFT_DIFFUSION_FEATURE_NETS to the folder that holds it")
  net = features.feature_network(str(folder))
  images = rng.integers(0, 256, [3, 32, 32, 3]).astype(np.uint8)
  got, logits = net(images)
  module = tf.saved_model.load(str(folder))
  want = module(tf.constant(images / 127.5 - 1, tf.float32))
  # The same graph inside another function: rounding of float32 sums alone.
  scale = np.abs(want["pool_3"]).max()
  np.testing.assert_allclose(got, want["pool_3"], atol=1e-4 * scale)
  assert logits.shape == want["logits"].shape
  assert net.label == f"FD[{name}]"
