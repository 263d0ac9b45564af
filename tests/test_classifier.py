import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import data
from soft_diffusion_tf.evaluation import classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def own(folder):
  return classifier.get(data.load("digits", "train"), folder=folder, progress=False)


def test_it_learns_the_digits(own):
  test = data.load("digits", "test")
  right = np.argmax(own.network(test.floats())[1], 1) == test.labels
  assert right.mean() > 0.9  # digits of other writers; chance is 0.1, a linear model has 0.9
  assert own.accuracy > 0.95


def test_features_have_a_mean_square_of_one(own):
  features = own.network(data.load("digits", "train").floats())[0].numpy()
  assert np.square(features).mean() == pytest.approx(1, rel=0.05)  # held-out tenth included


def test_the_cache_gives_the_same_network(own, folder, monkeypatch):
  monkeypatch.setattr(classifier, "_train", None)  # whoever trains now fails
  again = classifier.get(data.load("digits", "train"), folder=folder, progress=False)
  assert again.digest == own.digest
  assert again.accuracy == own.accuracy
  images = data.load("digits", "test").floats()[:9]
  np.testing.assert_array_equal(again.network(images)[0], own.network(images)[0])


def test_other_data_is_another_classifier_and_a_torn_file_is_made_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(classifier, "STEPS", 3)
  source = data.load("digits", "test")
  first = classifier.get(source, folder=tmp_path, progress=False)
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:100])
  again = classifier.get(source, folder=tmp_path, progress=False)
  assert again.digest == first.digest  # training is a function of data and seed
  classifier.get(source, seed=1, folder=tmp_path, progress=False)
  changed = data.Source(source.name, source.images ^ 1, source.labels)
  classifier.get(changed, folder=tmp_path, progress=False)
  assert len(list(tmp_path.iterdir())) == 3


def test_a_kept_file_of_unknown_origin_is_made_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(classifier, "STEPS", 3)
  source = data.load("digits", "test")
  first = classifier.get(source, folder=tmp_path, progress=False)
  (file,) = tmp_path.iterdir()
  with np.load(file) as content:
    kept = dict(content)
  for change in (
    {"w0": kept["w0"] * np.nan},
    {"w0": kept["w0"].astype(object)},
    {"w1": kept["w1"][:3]},
    {"accuracy": np.array([0.5, 0.5])},
    {"accuracy": np.array("1")},
  ):
    np.savez(file, **(kept | change))
    again = classifier.get(source, folder=tmp_path, progress=False)
    assert (again.digest, again.accuracy) == (first.digest, first.accuracy)


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(classifier, "STEPS", 3)
  (tmp_path / "file").touch()
  own = classifier.get(data.load("digits", "test"), folder=tmp_path / "file", progress=False)
  assert own.network(data.load("digits", "test").floats()[:2])[0].shape[0] == 2
  assert "the classifier is not kept" in capsys.readouterr().out


def test_larger_images_come_down_to_four_by_four():
  network = classifier.build((32, 48, 3), 5)
  features, logits = network(tf.zeros([2, 32, 48, 3]))
  assert features.shape == (2, 128)
  assert logits.shape == (2, 5)


def test_without_labels():
  source = data.Source("x", np.zeros([30, 8, 8, 1], np.uint8), np.zeros(30, np.int64))
  with pytest.raises(ValueError, match="x: a classifier needs at least 2 classes"):
    classifier.get(source)
