import json

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data
from soft_diffusion_tf.evaluation import features, memorisation

NET = features.feature_network("pixels:4")


@pytest.fixture(scope="module")
def digits():
  return data.load("digits", "train").images, data.load("digits", "test").images


def test_a_planted_training_image_is_flagged(digits, monkeypatch):
  monkeypatch.setattr(memorisation, "_CHUNK", 400)  # the neighbours lie in several chunks
  train, held_out = digits
  generated = np.concatenate([held_out[200:260], train[[7, 1490]]])
  for nearest in memorisation.report(NET, generated, train, held_out[:200]):
    assert nearest.flagged[-2:].all()
    assert nearest.indices[-2:].tolist() == [7, 1490]
    assert nearest.distances[-2:].max() < 1e-6  # rounding of float64 products, rooted
    assert nearest.flagged[:-2].mean() < 0.1  # real images that were not trained on: about 1 %
    record = json.loads(json.dumps(nearest.record(list(range(62)))))
    planted = {(f["image"], f["train"]) for f in record["flagged_images"][:2]}
    assert planted == {(60, 7), (61, 1490)}
    assert record["held_out_images"] == 200


def test_held_out_images_that_were_trained_on_are_refused(digits):
  train, held_out = digits
  mixed = np.concatenate([held_out[:95], train[:5]])
  with pytest.raises(ValueError, match=r"5% of the held-out images are training images; take as"):
    memorisation.report(NET, held_out[200:210], train, mixed)


def test_nearest_images_are_the_nearest(digits):
  train, held_out = digits
  pixels, small = memorisation.report(NET, held_out[:20], train, held_out[20:])
  flat = lambda images: images.reshape(len(images), -1) / 255.0
  gaps = np.linalg.norm(flat(held_out[:20])[:, None] - flat(train)[None], axis=2)
  np.testing.assert_array_equal(pixels.indices, gaps.argmin(1))
  np.testing.assert_allclose(pixels.distances, gaps.min(1), rtol=1e-5)  # pixels are float32
  base = np.linalg.norm(flat(held_out[20:])[:, None] - flat(train)[None], axis=2).min(1)
  np.testing.assert_allclose(np.sort(pixels.base), np.sort(base), rtol=1e-5)
  rows = [NET(images)[0] for images in (held_out[:20], train)]
  want = np.linalg.norm(rows[0][:, None] - rows[1][None], axis=2)
  np.testing.assert_array_equal(small.indices, want.argmin(1))


def test_without_held_out_images_the_training_images_are_told_apart(digits, monkeypatch):
  monkeypatch.setattr(memorisation, "_CHUNK", 70)
  train = digits[0][:200].copy()
  train[150] = train[3]
  pixels, _ = memorisation.report(NET, train[:5], train)
  flat = train.reshape(200, -1) / 255.0
  gaps = np.linalg.norm(flat[:, None] - flat[None], axis=2)
  np.fill_diagonal(gaps, np.inf)
  np.testing.assert_allclose(pixels.base, gaps.min(1), rtol=1e-5, atol=1e-6)
  assert pixels.flagged.all()  # copies of training images
  assert not pixels.held_out


def test_the_picture(digits, tmp_path):
  train, held_out = digits
  generated = held_out[:12]

  def draw(name):
    found = memorisation.report(NET, generated, train, held_out[12:])
    memorisation.figure(tmp_path / name, generated, train, found)
    return (tmp_path / name).read_bytes()

  assert draw("a.png") == draw("b.png")
  picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
  assert picture.std() > 10
  with pytest.raises(
    ValueError, match="at least 1 generated and 2 training images, got 0 and 1500"
  ):
    memorisation.report(NET, generated[:0], train)
