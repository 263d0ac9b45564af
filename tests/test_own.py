"""Images that a program hands over: arrays, tf.data, objects like lists, and classes by name."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import data


@pytest.fixture
def images(rng):
  return rng.integers(0, 256, [12, 6, 5, 3]).astype(np.uint8)


class Listed:
  def __init__(self, images, labels=None):
    self.images, self.labels = images, labels

  def __len__(self):
    return len(self.images)

  def __getitem__(self, k):
    return self.images[k] if self.labels is None else (self.images[k], self.labels[k])


def test_every_way_to_hand_images_over_gives_the_same(images):
  labels = np.arange(12) % 3
  floats, deep = (images / 255).astype(np.float32), images.astype(np.uint16) * 257
  pairs = tf.data.Dataset.from_tensor_slices((images, labels))
  ways = [
    images,
    (images, labels),
    floats,
    deep,
    (floats, labels),
    Listed(images),
    Listed(floats, labels),
    list(images),
    pairs,
    pairs.batch(5),
    pairs.map(lambda x, y: {"image": x, "label": y}),
    tf.constant(images),
    data.Source("mine", images, labels),
  ]
  for way in ways:
    source = data.load(way)
    np.testing.assert_array_equal(source.images, images)
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() in ([0] * 12, labels.tolist())
  assert data.load(images).name == data.load(floats).name != data.load(images[1:]).name


def test_a_file_of_arrays_is_a_data_set(tmp_path, images):
  labels = np.arange(12)
  np.save(tmp_path / "a.npy", images)
  np.savez(tmp_path / "b.npz", images=images, labels=labels)
  for name in ("a.npy", "b.npz"):
    for split, keep in (("all", labels >= 0), ("train", labels != 9), ("test", labels == 9)):
      source = data.load(f"folder:{tmp_path / name}", split)
      np.testing.assert_array_equal(source.images, images[keep])
      assert (
        source.labels.tolist() == (labels[keep] if name == "b.npz" else 0 * labels[keep]).tolist()
      )
  for k, content in enumerate((b"", b"\x93NUMPY", b"PK\3\4")):
    (tmp_path / f"{k}.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{k}.npy: cannot be read .*give images"):
      data.load(f"folder:{tmp_path / f'{k}.npy'}")
  np.save(tmp_path / "c.npy", images[0])
  with pytest.raises(ValueError, match="is no set of images"):
    data.load(f"folder:{tmp_path / 'c.npy'}")


def test_texts_are_labels(images):
  source = data.load(Listed(images[:3], ["b", "a", "b"]))
  assert source.labels.tolist() == [1, 0, 1]
  assert source.label_names == ("a", "b")


def test_sizes_are_brought_to_one(rng):
  sizes = [(8, 8), (9, 12), (16, 8)]
  found = [rng.random([*size, 1]).astype(np.float32) for size in sizes]
  assert data.load(found, image_shape=(8, 8, 1)).images.shape == (3, 8, 8, 1)
  with pytest.raises(ValueError, match="2 of 3 images cannot be used: 2 size"):
    data.load(found)


@pytest.mark.parametrize(
  ("source", "text"),
  [
    (np.zeros([3, 4, 4, 1], np.float32) + 2, "float32 values from 2 to 2, not in"),
    (np.full([1, 4, 4, 1], np.nan), "float64 values from nan"),
    (np.zeros([3, 4], np.uint8), r"not an array \[3, 4\]"),
    ((np.zeros([3, 4, 4, 1]), np.zeros([2])), "3 images and labels of shape"),
    (tf.data.Dataset.from_tensors(np.zeros([4, 4, 1])).repeat(), "is endless"),
    ([], "holds no images"),
    (object(), "is no data set"),
    ([np.array([["a"]])], "is no number of an image"),
  ],
)
def test_what_holds_no_images_is_one_line(source, text):
  with pytest.raises(ValueError, match=text) as caught:
    data.load(source)
  assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Steps(data.Reader):
  """Images of one grey each."""

  count: int = 20

  def __len__(self):
    return self.count

  def __getitem__(self, k):
    return np.full([4, 4, 1], k, np.uint8), k % 2


def test_a_class_like_a_list_is_a_data_set():
  train, test = (data.load(Steps(), split) for split in ("train", "test"))
  assert test.images[:, 0, 0, 0].tolist() == [9, 19]
  assert test.labels.tolist() == [1, 1]
  assert len(train) == 18


def test_a_name_of_images_that_are_gone_is_one_line(images):
  with pytest.raises(ValueError, match=r"handed to training\.train by a program"):
    data.load(data.load(images).name)


@pytest.mark.parametrize("labels", [3, [1, 2], np.full(12, 2**63, np.uint64)])
def test_labels_in_a_file_that_are_none(tmp_path, rng, labels):
  np.savez(tmp_path / "a.npz", images=rng.random([12, 8, 8, 1]), labels=labels)
  with pytest.raises(ValueError, match=r"12 images and labels of the shape|labels must be one"):
    data.load(f"folder:{tmp_path / 'a.npz'}", "all")


def test_channels_that_come_first_are_said(tmp_path, rng):
  images = rng.random([12, 3, 8, 8])
  np.save(tmp_path / "a.npy", images)
  for source in (images, f"folder:{tmp_path / 'a.npy'}"):
    with pytest.raises(ValueError, match=r"channels first.*\[12, 8, 8, 3\], by np\.moveaxis"):
      data.load(source, "all", (8, 8, 3))
  assert data.load(images, "all", (3, 8, 8)).images.shape == (12, 3, 8, 8)  # as asked
