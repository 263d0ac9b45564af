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

from soft_diffusion_tf import data
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
  1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
  5: lambda a: a.T, 6: lambda a: a[:, ::-1].T, 7: lambda a: a[::-1, ::-1].T,
  8: lambda a: a[::-1].T,
}  # fmt: skip


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
  return struct.pack(">I", len(content)) + kind + content + struct.pack(
    ">I", zlib.crc32(kind + content)
  )  # fmt: skip


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


def test_replica_r_gets_the_rth_part_of_a_batch():
  """With the functions by which TensorFlow shares a data set between hosts, and then replicas."""
  from tensorflow.python.data.experimental.ops import distribute
  from tensorflow.python.distribute import input_ops

  source, size = data.load("digits", "train"), 24
  plain = next(iter(data.batches(source, size, seed=3))).numpy()
  for hosts, each in ((1, 4), (4, 1), (2, 2), (2, 3), (3, 2)):
    batches = data.batches(source, size, seed=3, replicas=(hosts, each))
    got = []
    for host in range(hosts):
      parts = batches.rebatch(distribute.batch_sizes_for_worker(size, hosts, each, host))
      parts = iter(input_ops.auto_shard_dataset(parts, hosts, host, hosts * each))
      got += [next(parts).numpy() for _ in range(each)]
    np.testing.assert_array_equal(np.concatenate(got), plain)


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
    name="photos", version="1.0.0", data_dir=tmp_path, disable_shuffling=True,
    features=tfds.features.FeaturesDict({"image": feature}),
    split_datasets={"train": [(k, {"image": io.BytesIO(encoded(k))}) for k in STORED]},
  )  # fmt: skip
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
