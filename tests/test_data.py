import dataclasses
import io
import os
import pathlib
import struct
import time
import types
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from soft_diffusion_tf import corruptions, data, experiment, schedules, training
from soft_diffusion_tf.data import pictures

TFDS = pathlib.Path(
  os.environ.get("TFDS_DATA_DIR", pathlib.Path(__file__).parents[2] / "shared/tfds")
)


def write(path, array, mode=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(array, np.uint8), mode).save(path)
  return path


@pytest.fixture
def folder(tmp_path, rng):
  for k in range(12):
    write(
      tmp_path / ("cats" if k % 2 else "dogs") / f"{k:02}.png", rng.integers(0, 256, [20, 30, 3])
    )
  return tmp_path


def test_digits():
  source = data.load("digits", "train")
  assert source.images.shape == (1500, 8, 8, 1)
  assert source.images.dtype == np.uint8
  assert len(data.load("digits", "test")) == 297
  assert len(data.load("digits", "all")) == 1797
  floats = source.floats()
  assert floats.dtype == np.float32
  assert floats.min() == 0
  assert floats.max() == 1
  assert set(source.labels) == set(range(10))


def test_glyphs():
  everything = data.load("glyphs", "all")
  train, test = (data.load("glyphs", split) for split in ("train", "test"))
  assert everything.images.shape[1:] == (32, 32, 1)
  assert len(everything) > 15_000
  assert len(train) + len(test) == len(everything)
  assert len(test) == len(everything) // 10
  assert len({image.tobytes() for image in everything.images}) == len(everything)
  ink = everything.images < 128
  assert not ink[:, [0, -1]].any()  # nothing is cut off
  assert not ink[:, :, [0, -1]].any()
  assert ink.any((1, 2, 3)).all()
  names = everything.label_names
  assert names == ("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew")
  assert np.bincount(everything.labels).min() > 200
  again = data.load("glyphs", "all")
  assert again.digest() == everything.digest()


def test_a_folder_with_labels_and_a_held_out_part(folder):
  source = data.load(f"folder:{folder}", "all", (10, 10, 3))
  assert source.images.shape == (12, 10, 10, 3)
  assert source.labels.tolist() == [0] * 6 + [1] * 6
  train, test = (data.load(f"folder:{folder}", k, (10, 10, 3)) for k in ("train", "test"))
  assert len(train) == 11
  assert len(test) == 1
  np.testing.assert_array_equal(test.images[0], source.images[9])


def test_resizing_is_an_antialiased_average(tmp_path):
  board = np.indices([32, 32]).sum(0) % 2 * 255
  write(tmp_path / "a.png", board)
  image = data.load(f"folder:{tmp_path}", "all", (8, 8, 1)).images[0]
  assert np.abs(image[1:-1, 1:-1].astype(int) - 127).max() <= 3  # no aliasing: grey, not stripes


# What is stored when an upright image is written with an EXIF orientation: of "row 0 is the right
# side, column 0 the top" (6), say, stored[r, c] is upright[c, W − 1 − r].
STORED = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.T,
  6: lambda a: a[:, ::-1].T,
  7: lambda a: a[::-1, ::-1].T,
  8: lambda a: a[::-1].T,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_upright_whatever_its_orientation(tmp_path, kind, orientation):
  upright = np.kron([[10, 60, 110], [160, 200, 240]], np.ones([8, 8])).astype(np.uint8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
  image = Image.fromarray(STORED[orientation](upright))
  path = tmp_path / "a.jpg"  # a name does not say what is in a file
  image.convert("RGB" if kind == "WEBP" else "L").save(path, kind, exif=exif, **options)
  got = data.load(f"folder:{tmp_path}", "all", (16, 24, 1)).images[0, ..., 0]
  assert np.abs(got.astype(int) - upright).max() <= 2  # JPEG rounds


def test_a_damaged_or_odd_orientation_is_ignored(tmp_path, rng):
  pixels = rng.integers(0, 256, [8, 12, 3]).astype(np.uint8)
  for k, note in enumerate((b"Exif\0\0MM", b"Exif\0\0" + bytes(40), b"\xff" * 30)):
    Image.fromarray(pixels).save(tmp_path / f"{k}.png", exif=note)
  exif = Image.Exif()
  exif[0x0112] = 9
  Image.fromarray(pixels).save(tmp_path / "9.png", exif=exif)
  for file in data.list_images(tmp_path):
    np.testing.assert_array_equal(data.read_image(file), pixels)


def chunk(kind, content):
  """A chunk of a PNG file."""
  return (
    struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
  )


@pytest.mark.parametrize(
  "notes",
  [
    chunk(b"zTXt", b"notes\0\0" + zlib.compress(b"x" * (2 << 20))),
    chunk(b"iTXt", b"notes\0\1\0\0\0" + zlib.compress(b"x" * (2 << 20))),
    chunk(b"tEXt", b"notes\0" + b"x" * 1000) * 100_000,  # more than Pillow takes together
    chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * (2 << 20))),
    chunk(b"tEXt", b"notes\0damaged")[:-1] + b"?",  # its checksum
  ],
  ids=["zTXt", "iTXt", "tEXt", "iCCP", "checksum"],
)
def test_notes_do_not_make_pixels_unreadable(tmp_path, rng, notes):
  pixels = rng.integers(0, 256, [8, 12, 3]).astype(np.uint8)
  path = write(tmp_path / "a.png", pixels)
  whole = path.read_bytes()
  path.write_bytes(whole[:33] + notes + whole[33:])  # behind the mark and the header
  np.testing.assert_array_equal(data.read_image(path), pixels)
  path.write_bytes(whole[:33] + notes + whole[33:60])  # and damaged pixels stay damaged
  with pytest.raises(ValueError, match="cannot be read as an image"):
    data.read_image(path)


def test_crops_keep_the_centre_and_the_shape(tmp_path):
  image = np.zeros([20, 40, 3], np.uint8)
  image[:, 10:30] = 200
  write(tmp_path / "a.png", image)
  assert (data.load(f"folder:{tmp_path}", "all", (10, 10, 3)).images == 200).all()
  wide = data.load(f"folder:{tmp_path}", "all", (5, 10, 3)).images
  assert wide.shape == (1, 5, 10, 3)
  assert wide.min() == 0


def test_celeb_a_crops():
  height, width = 218, 178
  image = np.zeros([height, width, 3], np.uint8)
  image[39 : 39 + 140, 19 : 19 + 140] = 100  # the centred 140 square
  out = data.prepare(image, "x", (64, 64, 3), "celeb_a_140")
  assert out.shape == (64, 64, 3)
  assert (out == 100).all()
  image = np.zeros([height, width, 3], np.uint8)
  image[57:185, 25:153] = 50
  assert (data.prepare(image, "x", (64, 64, 3), "celeb_a_128") == 50).all()


def test_grey_and_colour(tmp_path):
  write(tmp_path / "a.png", np.full([8, 8], 90))
  assert (data.load(f"folder:{tmp_path}", "all", (8, 8, 3)).images == 90).all()
  write(tmp_path / "a.png", np.full([8, 8, 3], [255, 0, 0]))
  grey = data.load(f"folder:{tmp_path}", "all", (8, 8, 1)).images
  assert (grey == 76).all()  # 0.299 · 255


def test_the_pipeline_starts_anywhere(digits):
  source = data.load("digits", "train")
  take = lambda start, n: [
    b.numpy() for b in data.batches(source, 100, seed=3, start=start, flip=True).take(n)
  ]
  whole, later = take(0, 40), take(25, 15)
  for k in range(15):
    np.testing.assert_array_equal(later[k], whole[25 + k])
  assert whole[0].dtype == np.float32
  assert 0 <= whole[0].min() <= whole[0].max() <= 1


def test_every_epoch_is_another_permutation():
  n = 97
  first = data.order(tf.range(n, dtype=tf.int64), n, 5).numpy()
  second = data.order(tf.range(n, 2 * n, dtype=tf.int64), n, 5).numpy()
  other = data.order(tf.range(n, dtype=tf.int64), n, 6).numpy()
  for permutation in (first, second, other):
    assert sorted(permutation) == list(range(n))
  assert (first != second).mean() > 0.9
  assert (first != other).mean() > 0.9
  assert np.abs(np.corrcoef(np.arange(n), first)[0, 1]) < 0.4


def test_labels_travel_with_their_images():
  source = data.load("digits", "train")
  plain = next(iter(data.batches(source, 50, seed=2)))
  images, labels = next(iter(data.batches(source, 50, seed=2, labels=True)))
  np.testing.assert_array_equal(images, plain)
  assert labels.dtype == tf.int64
  at = data.order(tf.range(50, dtype=tf.int64), len(source), 2).numpy()
  np.testing.assert_array_equal(labels, source.labels[at])


def test_balanced_batches_hold_every_class_equally_often_and_start_anywhere(rng):
  labels = np.repeat([7, 3, 5], [2, 40, 9])
  images = np.arange(51, dtype=np.uint8).reshape(-1, 1, 1, 1)
  source = data.Source("x", images, rng.permuted(labels))
  take = lambda start, n: [
    (np.rint(255 * x.numpy()).astype(int).ravel(), y.numpy())
    for x, y in data.batches(source, 6, start=start, labels=True, balanced=True).take(n)
  ]
  whole, later = take(0, 40), take(33, 7)
  for k in range(7):
    np.testing.assert_array_equal(later[k], whole[33 + k])
  for index, label in whole:
    np.testing.assert_array_equal(source.labels[index], label)
    assert [list(label).count(k) for k in (3, 5, 7)] == [2, 2, 2]
  seen = np.concatenate([index for index, _ in whole])
  of_three = seen[source.labels[seen] == 3]
  assert len(set(of_three[:40])) == 40  # an epoch of a class is a permutation of it


def test_flips_are_half_and_exact(rng):
  images = rng.integers(0, 256, [50, 4, 4, 1]).astype(np.uint8)
  source = data.Source("x", images, np.zeros(50, np.int64))
  plain = np.concatenate([b.numpy() for b in data.batches(source, 50, flip=False).take(20)])
  flipped = np.concatenate([b.numpy() for b in data.batches(source, 50, flip=True).take(20)])
  same = (plain == flipped).all(axis=(1, 2, 3))
  mirrored = (plain[:, :, ::-1] == flipped).all(axis=(1, 2, 3))
  assert (same | mirrored).all()
  assert 0.4 < same.mean() < 0.6


def test_shifts_move_by_whole_pixels_and_mirror_the_edge(rng):
  """Each image is a cut of what NumPy's reflecting padding gives, and all cuts come."""
  image = rng.integers(0, 256, [1, 5, 7, 2]).astype(np.uint8)
  source = data.Source("x", np.repeat(image, 40, axis=0), np.zeros(40, np.int64))
  shift = data.Shift(pixels=2)
  take = lambda start, n: [
    x.numpy() for x in data.batches(source, 40, start=start, augment=(shift,)).take(n)
  ]
  padded = np.pad(image[0], [(2, 2), (2, 2), (0, 0)], mode="reflect").astype(np.float32) / 255
  cuts = {padded[y : y + 5, x : x + 7].tobytes(): (y, x) for y in range(5) for x in range(5)}
  whole = take(0, 8)
  assert {cuts[x.tobytes()] for x in np.concatenate(whole)} == set(cuts.values())
  np.testing.assert_array_equal(take(5, 1)[0], whole[5])


def test_augmentations_follow_each_other_with_draws_of_their_own(rng):
  images = rng.integers(0, 256, [200, 4, 4, 1]).astype(np.uint8)
  source = data.Source("x", images, np.zeros(200, np.int64))
  twice = (data.Flip(probability=1.0), data.Flip(probability=1.0))
  plain, same = (next(iter(data.batches(source, 200, augment=a))).numpy() for a in ((), twice))
  np.testing.assert_array_equal(plain, same)
  some = next(iter(data.batches(source, 200, augment=(data.Flip(), data.Flip())))).numpy()
  unchanged = (some == plain).all(axis=(1, 2, 3)).mean()  # flipped twice, or not at all
  assert 0.4 < unchanged < 0.6


# --- The augmentation of Karras et al. 2022 -------------------------------------------------------

NOTHING = dict.fromkeys(("x_flip", "y_flip", "scale", "rotate", "stretch", "move"), 0.0)


def changed(images, **fields):
  """Images float32 in [0, 1] as `data.EDM` changes them by the fields given, and the labels."""
  change = data.EDM(**{**NOTHING, **fields})
  done, label = change.labelled(tf.constant(images, tf.float32), tf.constant([3, 4], tf.int64), 0)
  assert label.shape == (len(images), change.label_size)
  return done.numpy(), label.numpy()


def test_where_the_label_is_0_an_image_keeps_its_bits(rng):
  images = rng.random([200, 8, 8, 3]).astype(np.float32)
  assert data.EDM().label_size == 9  # as published
  every = dict.fromkeys([f.name for f in dataclasses.fields(data.EDM)], 0.05)
  for fields in (every, {}):
    done, label = changed(images, **fields)
    same = (done == images).all((1, 2, 3))
    np.testing.assert_array_equal(same, (label == 0).all(1))
    assert same.all() == (not fields)
    assert done.min() >= 0
    assert done.max() <= 1
  for name in every:  # each is drawn as often as its field says, and for itself
    some, all_of = changed(images, **{name: 0.3})[1], changed(images, **{name: 1.0})[1]
    drawn = (some != 0).any(1)
    assert 0.3 / 2 - 0.15 < drawn.mean() < 0.3 + 0.12  # of a coin or of turns by 0 half is seen
    np.testing.assert_array_equal(some[drawn], all_of[drawn])


def test_mirrors_turns_and_whole_pixels_are_exact(rng):
  images = rng.random([64, 16, 16, 3]).astype(np.float32)
  for name, mirrored in (("x_flip", images[:, :, ::-1]), ("y_flip", images[:, ::-1])):
    done, label = changed(images, **{name: 1.0})
    assert set(label[:, 0]) == {0, 1}
    np.testing.assert_array_equal(done, np.where(label[:, :, None, None] == 1, mirrored, images))
  done, label = changed(images, quarter_turns=1.0)
  turns = np.rint(np.arctan2(label[:, 1], label[:, 0] + 1) / (np.pi / 2)).astype(int) % 4
  assert set(turns) == {0, 1, 2, 3}
  for x, y, k in zip(images, done, turns):
    np.testing.assert_array_equal(y, np.rot90(x, k))
  done, label = changed(images[:, :, :10], quarter_turns=1.0)  # not square
  assert {tuple(row) for row in np.rint(label)} == {(0, 0), (-2, 0)}
  done, label = changed(images, shift=1.0)
  for x, y, (down, right) in zip(images, done, np.rint(label * 16 / 8).astype(int)):
    np.testing.assert_array_equal(y[2:-2, 2:-2], np.roll(x, (-down, -right), (0, 1))[2:-2, 2:-2])


def test_the_label_says_where_a_spot_goes_and_what_becomes_of_its_shape():
  """Of a small spot beside the centre: its centre and covariance, by the matrix of the label."""
  side, n = 64, 40
  y, x = np.mgrid[:side, :side] - (side - 1) / 2
  start, wide = np.array([4.0, -3.0]), np.diag([4.0, 9.0])
  spot = np.exp(-0.5 * ((x - start[0]) ** 2 / wide[0, 0] + (y - start[1]) ** 2 / wide[1, 1]))
  images = np.repeat(spot[None, :, :, None], n, 0)
  for fields in ("scale", "rotate", "stretch", "move", "scale rotate stretch move"):
    done, label = changed(images, **dict.fromkeys(fields.split(), 1.0))
    whole, column = np.zeros([n, 7]), 0
    for name, begin, size in (("scale", 0, 1), ("rotate", 1, 2), ("stretch", 3, 2), ("move", 5, 2)):
      if name in fields:
        whole[:, begin : begin + size] = label[:, column : column + size]
        column += size
    seen = 0
    for image, (s, cos, sin, a, b, right, down) in zip(done[..., 0].astype(float), whole):
      turn = np.array([[cos + 1, -sin], [sin, cos + 1]])
      length, along = np.hypot(a, b), np.arctan2(b, a)
      axes = np.array([[np.cos(along), -np.sin(along)], [np.sin(along), np.cos(along)]])
      stretched = axes @ np.diag([2 ** (0.2 * length), 2 ** (-0.2 * length)]) @ axes.T
      matrix = stretched @ turn * 2 ** (0.2 * s)
      place = matrix @ start + side / 8 * np.array([right, down])
      if np.abs(place).max() > 14:  # the edge would be seen
        continue
      seen += 1
      near = np.hypot(x - place[0], y - place[1]) < 16  # beyond may be its image in the edge
      image = np.where((image > 1e-3) & near, image, 0)
      mean = np.array([(image * x).sum(), (image * y).sum()]) / image.sum()
      off = np.stack([x - mean[0], y - mean[1]])
      covariance = np.einsum("ihw,jhw,hw->ij", off, off, image) / image.sum()
      np.testing.assert_allclose(mean, place, atol=0.05)
      # Filters and the cut at 1e-3 move variances, of 4 to 9 pixels², by less.
      np.testing.assert_allclose(covariance, matrix @ wide @ matrix.T, atol=0.4)
    assert seen > n / 4


def test_colours_are_what_the_label_says(rng):
  images = rng.uniform(0.4, 0.6, [30, 4, 4, 3]).astype(np.float32)
  centred, grey = images - 0.5, images.mean(3, keepdims=True)
  number = lambda label: label[:, :1, None, None]
  inside = lambda done: ((done > 0) & (done < 1)).all((1, 2, 3))  # else it is cut off

  def check(fields, want, atol=1e-5):
    done, label = changed(images, **fields)
    keep = inside(done)
    assert keep.sum() > 9
    np.testing.assert_allclose(done[keep], want(number(label), label)[keep], atol=atol)

  check({"brightness": 1.0}, lambda n, _: images + 0.1 * n)
  check({"contrast": 1.0}, lambda n, _: 0.5 + centred * 2 ** (0.5 * n))
  check({"invert": 1.0}, lambda n, _: images - 2 * n * (grey - 0.5))
  check({"saturation": 1.0}, lambda n, _: grey + (images - grey) * 2**n)
  done, label = changed(images, hue=1.0)
  np.testing.assert_allclose(done.mean(3), images.mean(3), atol=1e-5)
  before, after = images - grey, done - done.mean(3, keepdims=True)
  cosine = (before * after).sum((1, 2, 3)) / (before**2).sum((1, 2, 3))
  np.testing.assert_allclose(cosine, label[:, 0] + 1, atol=1e-4)
  with pytest.raises(ValueError, match=r"edm\(hue=1\) changes colours, and an image of 1 channels"):
    experiment.Data(image_shape=(8, 8, 1), augment=("edm(hue=1)",))


def test_the_network_is_told_and_samples_as_if_nothing_was_done():
  """An old network keeps its bits; a network that is told learns from the label."""
  tell = {"augment": ("edm(y_flip=1)",), "flip": False}
  plain = experiment.Experiment(
    data=experiment.Data(name="digits", image_shape=(8, 8, 1), **tell),
    network=experiment.Network(nf=8, ch_mult=(1,), num_res_blocks=1, init_scale=1.0),
    training=experiment.Training(batch_size=8),
    level=schedules.Constant(0.0),
    corruption=corruptions.Identity(),
  )
  with pytest.raises(ValueError, match=r"augment_dim = 7, and the augmentation tells 9 numbers"):
    plain.replace(network={"augment_dim": 7})
  told = plain.replace(network={"augment_dim": 9})
  assert told.identity() != plain.identity()
  one, two = (training.build(e, e.build_diffusion()) for e in (plain, told))
  for a, b in zip(one.network.weights, two.network.weights):  # the layer of the label is the last
    np.testing.assert_array_equal(a.numpy(), b.numpy())
  assert len(two.network.weights) == len(one.network.weights) + 2
  source = data.load("digits")
  images, done = next(iter(data.batches(source, 8, augment=told.data.augment, told=True)))
  same = lambda x, y: np.testing.assert_array_equal(x, y)
  for a, b in zip(one.gradients(images)[0], two.gradients(images)[0]):
    same(a.numpy(), b.numpy())  # without a label it is the old network
  same(*(m.denoiser()(images, tf.fill([8], 0.5)).numpy() for m in (one, two)))
  kernel = [v.path for v in two.network.trainable_variables].index(two.network.augment.kernel.path)
  assert not two.gradients(images)[0][kernel].numpy().any()
  noticed = two.gradients(images, done)[0][kernel].numpy()
  same(noticed.any(1), done.numpy().any(0))
  parts = training.build(e := told.replace(training={"accumulate": 2}), e.build_diffusion())
  np.testing.assert_allclose(parts.gradients(images, done)[0][kernel], noticed, rtol=1e-3)


def test_a_worker_reads_its_own_part_of_a_batch_alone():
  source, size = data.load("digits", "train"), 24
  augment = (data.Shift(), data.EDM())
  options = {"seed": 3, "flip": True, "start": 60, "augment": augment, "labels": True, "told": True}
  plain = [[x.numpy() for x in b] for b in data.batches(source, size, **options).take(4)]
  for hosts, each in ((1, 4), (4, 1), (2, 2), (2, 3), (3, 2)):
    parts = []
    for host in range(hosts):
      pipeline = data.batches(source, size, part=(host, hosts), each=each, **options)
      assert pipeline.element_spec[0].shape[0] == size // (hosts * each)
      parts.append([[x.numpy() for x in b] for b in pipeline.take(4 * each)])
    for k, batch in enumerate(plain):
      for j, whole in enumerate(batch):
        got = [part[k * each + r][j] for part in parts for r in range(each)]
        np.testing.assert_array_equal(np.concatenate(got), whole)


def test_a_damaged_tfds_data_set_ends_with_one_line(monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets")

  class Builder:
    def __init__(self):
      split = types.SimpleNamespace(num_examples=9)
      self.info = types.SimpleNamespace(splits={"train": split}, features={"image": 0})

    def is_prepared(self):
      return True

    def as_dataset(self, **_):
      records = tf.data.Dataset.range(9)
      check = lambda k: tf.debugging.check_numerics(1.0 / tf.cast(4 - k, tf.float32), "truncated")
      return records.map(lambda k: {"image": tf.zeros([8, 8, 1], tf.uint8), "ok": check(k)})

  monkeypatch.setattr(tfds, "builder", lambda name, data_dir=None: Builder())
  with pytest.raises(ValueError, match=r"'mine', split 'train': .*copy or prepare it again"):
    data.load("mine", "train", (8, 8, 1), progress=False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_of_tfds_are_upright_too(kind, tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  upright = np.kron([[10, 60, 110], [160, 200, 240]], np.ones([8, 8])).astype(np.uint8)

  def encoded(orientation):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {}
    Image.fromarray(STORED[orientation](upright)).save(content, kind, exif=exif, **options)
    return content.getvalue()

  feature = tfds.features.Image(shape=(None, None, 1), encoding_format=kind.lower())
  tfds.dataset_builders.store_as_tfds_dataset(
    name="photos",
    version="1.0.0",
    data_dir=tmp_path,
    disable_shuffling=True,
    features=tfds.features.FeaturesDict({"image": feature}),
    split_datasets={"train": [(k, {"image": io.BytesIO(encoded(k))}) for k in STORED]},
  )
  images = data.load("photos", "train", data_dir=str(tmp_path), progress=False).images
  assert images.shape == (8, 16, 24, 1)
  assert np.abs(images[..., 0].astype(int) - upright).max() <= 2  # JPEG rounds


def test_cifar10_from_tfds():
  if not (TFDS / "cifar10").is_dir():
    pytest.skip(f"no CIFAR-10 in TFDS form in {TFDS} (set TFDS_DATA_DIR)")
  source = data.load("cifar10", "test[:500]", (32, 32, 3), data_dir=str(TFDS))
  assert source.images.shape == (500, 32, 32, 3)
  assert set(source.labels) == set(range(10))
  assert 0.3 < source.floats().mean() < 0.6
  small = data.load("cifar10", "test[:20]", (16, 16, 1), data_dir=str(TFDS))
  assert small.images.shape == (20, 16, 16, 1)
  with pytest.raises(ValueError, match="Unknown split 'tset'"):
    data.load("cifar10", "tset", data_dir=str(TFDS))


# --- Bad input ------------------------------------------------------------------------------------


def refused(folder, text, shape=(8, 8, 3)):
  with pytest.raises(ValueError, match=text) as caught:
    data.load(f"folder:{folder}", "all", shape)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_missing_and_empty_folders(tmp_path):
  refused(tmp_path / "none", "no such folder")
  refused(tmp_path, "no image files in it")
  (tmp_path / "a.png").touch()
  refused(tmp_path / "a.png", "is a file; give the folder")
  with pytest.raises(ValueError, match="names no folder"):
    data.load("folder:")


def test_a_path_is_told_from_a_name(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path / "pics" / "a.png", np.zeros([8, 8, 3]))
  assert len(data.load("folder:~/pics", "all")) == 1
  for name in (str(tmp_path), "~/pics", "./pics", "../pics"):
    with pytest.raises(ValueError, match=f"write folder:{name},"):
      data.load(name)
  for name in ("", " ", "a\nb"):
    with pytest.raises(ValueError, match="is no name"):
      data.load(name)


def test_a_corrupt_file_is_named(folder):
  (folder / "cats" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
  assert "bad.png" in refused(folder, "cannot be read as an image")


def test_a_truncated_jpeg_is_named(folder, rng):
  path = write(folder / "half.jpg", rng.integers(0, 256, [64, 64, 3]))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert "half.jpg" in refused(folder, "cannot be read as an image")


def bomb(path, side):
  """A valid PNG file of side × side zeros."""
  packer, row = zlib.compressobj(9), bytes(1 + side)
  pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
  header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
  path.write_bytes(
    pictures._PNG_MARK + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
  )


def test_an_image_too_large_to_read_is_named(tmp_path):
  bomb(tmp_path / "huge.png", 14_000)
  line = refused(tmp_path, "make it smaller")
  assert "huge.png" in line
  assert "196000000 pixels" in line


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "PPM", "EPS"])
def test_damaged_files_under_another_name_are_named(tmp_path, rng, kind):
  from PIL import features

  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow is built without AVIF")
  pixels = rng.integers(0, 256, [32, 32, 3]).astype(np.uint8)
  path = tmp_path / "damaged.png"
  Image.fromarray(pixels).save(path, kind)
  content = path.read_bytes()
  for cut in (len(content) // 3, 200, 60, 20, 4):
    path.write_bytes(content[:cut])
    assert "damaged.png" in refused(tmp_path, "cannot be read as an image")
  noise = rng.integers(0, 256, len(content), np.uint8).tobytes()
  for keep in (12, 64):  # the mark of the format, and then noise
    path.write_bytes(content[:keep] + noise)
    message = "damaged.png"
    try:
      assert data.read_image(path).shape[2] in (1, 3)
    except ValueError as error:
      message = str(error)
    assert "damaged.png" in message
    assert "\n" not in message


def test_no_other_program_is_started_for_a_file(tmp_path, rng, monkeypatch):
  path = tmp_path / "a.png"
  Image.fromarray(rng.integers(0, 256, [8, 8, 3]).astype(np.uint8)).save(path, "EPS")
  monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program is started"))
  refused(tmp_path, "cannot be read as an image")


def test_a_small_image_is_named(folder):
  write(folder / "small.png", np.zeros([6, 9, 3]))
  with pytest.raises(ValueError, match=r"small.png: .*smaller than the 8×8 asked for"):
    data.load(f"folder:{folder}", "all", (8, 8, 3), policy=data.Policy(small="refuse"))


def test_mixed_sizes_need_a_shape(folder):
  write(folder / "zz.png", np.zeros([10, 10, 3]))
  assert "zz.png" in refused(folder, "bring the files to one, or set data.image_shape", shape=None)


def test_other_channel_counts(folder):
  refused(folder, "12 of 12 files cannot be used: 12 channels, 3 channels cannot give 2", (8, 8, 2))


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (("digits", "valid"), "no split 'valid'"),
    (("digits", "all", (8, 8)), "height, width, channels"),
    (("digits", "all", (9, 9, 1)), "digit 0: 8×8 pixels"),
    (("digits", "all", None, "centr"), "did you mean 'centre'"),
  ],
)
def test_bad_requests(arguments, text):
  with pytest.raises(ValueError, match=text):
    data.load(*arguments)


def test_an_unknown_data_set_is_one_line(tmp_path):
  with pytest.raises(ValueError, match="no_such_set") as caught:
    data.load("no_such_set", data_dir=str(tmp_path))
  assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_given_up_in_seconds(tmp_path, monkeypatch):
  """Whichever it is that fails: the name (no network), or the connection."""
  pytest.importorskip("tensorflow_datasets")
  monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens at the discard port
  begin = time.monotonic()
  with pytest.raises(ValueError, match=r"TFDS data set 'celeb_a'.*check the name and the") as e:
    data.load("celeb_a", data_dir=str(tmp_path))
  assert "\n" not in str(e.value)
  assert time.monotonic() - begin < 20


def test_split_of_a_small_folder(tmp_path):
  write(tmp_path / "a.png", np.zeros([8, 8, 3]))
  with pytest.raises(ValueError, match="at least 10 images"):
    data.load(f"folder:{tmp_path}", "test", (8, 8, 3))
