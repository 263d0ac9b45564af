"""Pictures of every mode, format and orientation as a viewer shows them, and the doctor's table."""

import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from soft_diffusion_tf import data
from soft_diffusion_tf.data import folders


@pytest.fixture
def photo(rng):
  """RGB uint8 [24, 32, 3], smooth, as a photograph is."""
  small = Image.fromarray(rng.integers(0, 256, [3, 4, 3]).astype(np.uint8))
  return np.asarray(small.resize((32, 24), Image.Resampling.BICUBIC))


@pytest.fixture
def grey(photo):
  return np.asarray(Image.fromarray(photo).convert("L"))


def saved(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
  return path


def same(path, expected, tolerance=0, **options):
  got = data.read_image(path, **options)
  expected = expected.reshape(*expected.shape[:2], -1)
  assert got.shape == expected.shape
  assert got.dtype == np.uint8
  assert np.abs(got.astype(int) - expected).max() <= tolerance


# --- Modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, rng, suffix):
  values = rng.integers(0, 65536, [9, 7]).astype(np.uint16)
  values[0, :2] = 0, 65535
  same(saved(tmp_path / f"a.{suffix}", values), np.rint(values / 257))


def test_a_16_bit_pgm_is_scaled(tmp_path):
  (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([257, 65535], ">u2").tobytes())
  same(tmp_path / "a.pgm", np.array([[1, 255]]))


def test_floats_in_0_to_1_are_scaled_and_others_refused(tmp_path, grey):
  same(saved(tmp_path / "a.tif", grey.astype(np.float32) / 255), grey)
  saved(tmp_path / "b.tif", grey.astype(np.float32))
  with pytest.raises(ValueError, match=r"b.tif: float32 values from .*, not in \[0, 1\]; scale"):
    data.read_image(tmp_path / "b.tif")
  saved(tmp_path / "c.tif", grey.astype(np.int32))
  with pytest.raises(ValueError, match=r"c.tif: 32-bit whole numbers"):
    data.read_image(tmp_path / "c.tif")


def test_palette_and_single_bits(tmp_path, photo, grey):
  palette = Image.fromarray(photo).quantize(32)
  same(saved(tmp_path / "a.png", palette), np.asarray(palette.convert("RGB")))
  bits = Image.fromarray(grey).convert("1")
  same(saved(tmp_path / "b.png", bits), np.asarray(bits.convert("L")))


def test_cmyk_takes_the_usual_conversion(tmp_path):
  inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [100, 50, 0, 51]]], np.uint8)
  c, m, y, k = (inks[..., i] / 255.0 for i in range(4))
  expected = np.stack([255 * (1 - ink) * (1 - k) for ink in (c, m, y)], -1)
  same(saved(tmp_path / "a.tif", Image.fromarray(inks, "CMYK")), expected, 1)
  flat = np.broadcast_to(inks[:, 3:], [16, 16, 4])
  path = saved(tmp_path / "b.jpg", Image.fromarray(np.array(flat), "CMYK"), quality=100)
  same(path, np.broadcast_to(expected[:, 3:], [16, 16, 3]), 3)  # JPEG rounds


def test_transparency_lies_on_the_colour(tmp_path, photo, grey, rng):
  alpha = rng.integers(0, 256, photo.shape[:2]).astype(np.uint8)
  share = alpha[..., None] / 255.0
  path = saved(tmp_path / "a.png", np.dstack([photo, alpha]))
  same(path, share * photo + (1 - share) * 255, 0.5 + 1e-4)
  red = data.Policy(transparency="#ff0000")
  same(path, share * photo + (1 - share) * [255, 0, 0], 0.5 + 1e-4, policy=red)
  same(path, np.dstack([photo, alpha]), channels=4)
  with pytest.raises(ValueError, match=r"a.png: it has transparent pixels; name the colour"):
    data.read_image(path, data.Policy(transparency="refuse"))
  path = saved(tmp_path / "b.png", np.dstack([grey, alpha]))
  share = share[..., 0]
  same(path, share * grey + (1 - share) * 255, 0.5 + 1e-4)
  same(path, np.dstack([grey, alpha]), channels=2)
  opaque = saved(tmp_path / "c.png", np.dstack([photo, np.full_like(grey, 255)]))
  same(opaque, photo, policy=data.Policy(transparency="refuse"))


def test_a_transparent_colour_of_a_png(tmp_path):
  row = np.array([[0, 100, 255]], np.uint8)
  palette = Image.fromarray(row, "P")
  palette.putpalette([10, 20, 30] * 100 + [1, 2, 3] * 156)
  path = saved(tmp_path / "p.png", palette, transparency=0)
  same(path, np.array([[[255, 255, 255], [1, 2, 3], [1, 2, 3]]]))
  same(saved(tmp_path / "l.png", row, transparency=100), np.array([[0, 255, 255]]))
  colours = np.array([[[9, 9, 9], [7, 8, 9]]], np.uint8)
  path = saved(tmp_path / "rgb.png", colours, transparency=(7, 8, 9))
  same(path, np.array([[[9, 9, 9], [255, 255, 255]]]))


def test_a_colour_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"data.transparency = 'wite' is no colour"):
    data.Policy(transparency="wite")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_number_of_channels_from_npy(tmp_path, rng, dtype):
  share = rng.integers(0, 256, [6, 5, 7]) / 255
  values = {np.uint8: 255 * share, np.uint16: 65535 * share}.get(dtype, share)
  np.save(tmp_path / "a.npy", (values if dtype == np.float32 else np.rint(values)).astype(dtype))
  source = data.load(f"folder:{tmp_path}", "all", (6, 5, 7))
  np.testing.assert_array_equal(source.images[0], np.rint(255 * share))
  with pytest.raises(ValueError, match=r"a.npy: 7 channels; .* where 4 are asked for"):
    data.load(f"folder:{tmp_path}", "all", (6, 5, 4))


def tiff_of(values, order, apart, packed, **further_tags):
  """The bytes of a TIFF file of any number of bands [h, w, c], in two strips for each plane."""
  h, w, c = values.shape
  planes = [values[..., k] for k in range(c)] if apart else [values]
  strips = [
    p[rows].astype(values.dtype.newbyteorder(order)).tobytes()
    for p in planes
    for rows in (slice(0, 2), slice(2, None))
  ]
  strips = [zlib.compress(s) for s in strips] if packed else strips
  kind = 3 if values.dtype.kind == "f" else 1
  tags = {
    256: [w],
    257: [h],
    258: [8 * values.itemsize] * c,
    259: [8 if packed else 1],
    262: [1],
    273: np.cumsum([0, *map(len, strips)])[:-1] + 8,
    277: [c],
    278: [2],
    279: list(map(len, strips)),
    284: [2 if apart else 1],
    339: [kind] * c,
    **{int(k[1:]): v for k, v in further_tags.items()},
  }
  tags = dict(sorted(tags.items()))
  place = 8 + sum(map(len, strips))
  entries, further = struct.pack(order + "H", len(tags)), b""
  for tag, numbers in tags.items():
    content = struct.pack(f"{order}{len(numbers)}I", *numbers)
    if len(numbers) > 1:
      at = struct.pack(order + "I", place + 2 + 12 * len(tags) + 4 + len(further))
      further, content = further + content, at
    entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + content
  head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, place)
  return head + b"".join(strips) + entries + bytes(4) + further


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_channels_from_tiff(tmp_path, rng, order, apart, packed):
  values = rng.integers(0, 65536, [5, 4, 6]).astype(np.uint16)
  (tmp_path / "a.tif").write_bytes(whole := tiff_of(values, order, apart, packed))
  same(tmp_path / "a.tif", np.rint(values / 257), channels=6)
  (tmp_path / "a.tif").write_bytes(whole[:20])
  with pytest.raises(ValueError, match=r"a.tif: cannot be read"):
    data.read_image(tmp_path / "a.tif", channels=6)


@pytest.mark.parametrize("channels", [None, 3, 5])
def test_a_tiff_file_of_bands_is_upright(tmp_path, rng, channels):
  """Of floats or five bands, which Pillow does not read."""
  values = rng.random([5, 4, channels or 3]).astype(np.float32)
  shown = np.rint(values * 255)
  for orientation, turned in ((1, shown), (3, shown[::-1, ::-1]), (6, np.rot90(shown, -1))):
    whole = tiff_of(values, "<", False, True, _274=[orientation])
    (tmp_path / "a.tif").write_bytes(whole)
    same(tmp_path / "a.tif", turned, channels=channels)


@pytest.mark.parametrize("order", "<>")
def test_planes_of_16_bits_which_pillow_takes_for_others(tmp_path, rng, order):
  values = rng.integers(0, 65536, [5, 4, 3]).astype(np.uint16)
  (tmp_path / "a.tif").write_bytes(tiff_of(values, order, True, False, _262=[2]))
  same(tmp_path / "a.tif", np.rint(values / 257))
  for c in (2, 4):  # grey or colour, and transparency
    values = rng.integers(0, 65536, [5, 4, c]).astype(np.uint16)
    whole = tiff_of(values, order, True, False, _262=[1 if c == 2 else 2], _338=[2])
    (tmp_path / "b.tif").write_bytes(whole)
    with pytest.raises(ValueError, match=r"b\.tif: .*samples interleaved"):
      data.read_image(tmp_path / "b.tif")


def test_transparency_and_orientation_of_four_channels_are_those_of_a_picture(tmp_path, rng):
  pixels = rng.integers(0, 256, [5, 4, 4]).astype(np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={274: 6})
  same(tmp_path / "a.tif", np.rot90(pixels, -1), channels=4)
  near_infrared = tiff_of(pixels, "<", False, False, _262=[2])  # a fourth band, and no alpha
  (tmp_path / "b.tif").write_bytes(near_infrared)
  same(tmp_path / "b.tif", pixels, channels=4)


def test_a_strip_holds_no_more_than_its_rows(tmp_path, monkeypatch):
  values = np.zeros([5, 4, 5], np.uint8)
  bomb = tiff_of(values, "<", False, True).replace(
    zlib.compress(values[:2].tobytes()), zlib.compress(bytes(40)) + b"", 1
  )
  (tmp_path / "a.tif").write_bytes(bomb)
  most = []
  real = zlib.decompressobj

  class Watched:
    def __init__(self):
      self._object = real()

    def decompress(self, strip, limit):
      most.append(limit)
      return self._object.decompress(strip, limit)

  monkeypatch.setattr(zlib, "decompressobj", Watched)
  same(tmp_path / "a.tif", values, channels=5)
  assert most == [100, 60]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits(tmp_path, bits):
  most = 2**bits - 1
  values = np.arange(16).reshape(2, 8) % (most + 1)
  rows = b"".join(
    b"\0" + np.packbits(np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, -bits:]).tobytes()
    for row in values
  )
  chunk = lambda kind, body: (
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
  )
  (tmp_path / "a.png").write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0))
    + chunk(b"tRNS", struct.pack(">H", 1))
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )
  same(tmp_path / "a.png", np.where(values == 1, 255, values * (255 // most)))


def plain_tiff(path, values, **tags):
  """A TIFF file of one band [h, w], with further tags by number."""
  content, (h, w) = values.tobytes(), values.shape
  bits = 8 * values.itemsize
  entries = {256: w, 257: h, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: h, 279: len(content)}
  entries |= {int(k[1:]): v for k, v in tags.items()}
  text = b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(entries))
  text += b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in sorted(entries.items()))
  path.write_bytes(text + bytes(4))
  return path


def test_a_tiff_file_whose_white_is_0(tmp_path, grey):
  for values, kind in ((grey, 1), (grey.astype("<u2") * 257, 1), (grey.astype("<f4") / 255, 3)):
    same(plain_tiff(tmp_path / "a.tif", values, _262=0, _339=kind), 255 - grey)
    same(plain_tiff(tmp_path / "a.tif", values, _262=1, _339=kind), grey)


def test_a_tiff_file_of_12_bits(tmp_path):
  packed = np.array([[0xFF, 0xF8, 0x00]], np.uint8)  # 4095 and 2048
  same(plain_tiff(tmp_path / "a.tif", packed, _256=2, _258=12), np.array([[255, 128]]))


def test_tiff_files_that_pillow_does_not_read(tmp_path, grey):
  same(plain_tiff(tmp_path / "a.tif", grey / 255.0, _339=3), grey)  # float64
  values = np.dstack([grey, grey.T[:24, :24].repeat(2, 1)[:, :32], grey]).astype("<f4") / 255
  (tmp_path / "b.tif").write_bytes(tiff_of(values, "<", False, True))
  same(tmp_path / "b.tif", np.rint(values * 255))
  plain_tiff(tmp_path / "c.tif", grey.astype(np.int8), _339=2)
  with pytest.raises(ValueError, match=r"c.tif: signed whole numbers, whose white is not known"):
    data.read_image(tmp_path / "c.tif")


def test_a_transparent_colour_of_16_bits(tmp_path):
  values = np.array([[0x1234, 0xFFFF, 0x8000, 0x0102, 0x0304, 0x0506]], ">u2")

  def chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc

  head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
  rest = chunk(b"IDAT", zlib.compress(b"\0" + values.tobytes())) + chunk(b"IEND", b"")
  for clear, first in ((b"", [0x12, 0xFF, 0x80]), (values[0, :3].tobytes(), [255, 255, 255])):
    note = chunk(b"tRNS", clear) if clear else b""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + note + rest)
    same(tmp_path / "a.png", np.array([[first, [1, 3, 5]]]))


def test_arrays_of_the_other_byte_order(tmp_path, grey):
  for values in (grey.astype(">u2") * 257, (grey / 255).astype(">f4"), (grey / 255).astype(">f8")):
    np.save(tmp_path / "a.npy", values)
    same(tmp_path / "a.npy", grey)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif"])
def test_one_pixel_and_the_first_frame(tmp_path, suffix):
  from PIL import features

  if suffix == "avif" and not features.check("avif"):
    pytest.skip("this Pillow is built without AVIF")
  colour = np.array([[[10, 20, 30]]], np.uint8)
  same(saved(tmp_path / f"a.{suffix}", colour), colour, 1)  # WebP and AVIF round
  frames = [Image.fromarray(np.full([8, 8, 3], v, np.uint8)) for v in (50, 200)]
  frames[0].save(tmp_path / f"b.{suffix}", save_all=True, append_images=frames[1:])
  same(tmp_path / f"b.{suffix}", np.full([8, 8, 3], 50))


# --- Colour profiles ------------------------------------------------------------------------------


def profile(primaries, gamma):
  """An ICC profile (version 2) of an RGB space by its primaries in XYZ (D50) and its gamma."""
  number = lambda v: round(v * 65536).to_bytes(4, "big", signed=True)
  xyz = lambda v: b"XYZ \0\0\0\0" + b"".join(map(number, v))
  curve = b"curv\0\0\0\0\0\0\0\1" + int(gamma * 256).to_bytes(2, "big") + b"\0\0"
  text = b"desc\0\0\0\0\0\0\0\5test\0" + bytes(79)
  text += bytes(-len(text) % 4)
  tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}
  tags |= {name: xyz(v) for name, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
  tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
  place, table, content = 128 + 4 + 12 * len(tags), b"", b""
  for name, value in tags.items():
    table += name + (place + len(content)).to_bytes(4, "big") + len(value).to_bytes(4, "big")
    content += value
  body = len(tags).to_bytes(4, "big") + table + content
  head = bytearray(128)
  head[0:4] = (128 + len(body)).to_bytes(4, "big")
  head[8:12], head[12:24] = b"\2\x40\0\0", b"mntrRGB XYZ "
  head[36:40], head[68:80] = b"acsp", b"".join(map(number, (0.9642, 1.0, 0.8249)))
  return bytes(head) + body


# Display P3's primaries in XYZ under D50.
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def test_display_p3_is_followed_to_srgb(tmp_path):
  """By the matrices of both spaces, and sRGB's curve."""
  srgb = np.array(
    [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]]
  ).T
  colours = np.array([[[180, 120, 100], [60, 160, 90], [90, 90, 90], [200, 180, 150]]], np.uint8)
  light = (colours / 255.0) ** 2.2
  linear = light @ np.array(P3) @ np.linalg.inv(srgb).T
  linear = np.clip(linear, 0, 1)
  curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  path = saved(tmp_path / "a.png", colours, icc_profile=profile(P3, 2.2))
  expected = np.rint(255 * curve)
  same(path, expected, 2)  # LittleCMS computes with 16 bits, and gamma has 8 behind the point
  assert np.abs(expected - colours).max() > 10  # else this would show nothing


def test_pictures_in_srgb_keep_their_bits(tmp_path, photo):
  srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  same(saved(tmp_path / "a.png", photo, icc_profile=srgb), photo)
  same(saved(tmp_path / "b.png", photo, icc_profile=b"damaged"), photo)


# --- Files and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF"])
def test_a_format_is_told_by_content(tmp_path, grey, kind):
  from PIL import features

  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow is built without AVIF")
  saved(tmp_path / "a.dat", grey, format=kind)
  (tmp_path / "notes.txt").write_text("no picture")
  assert [f.name for f in data.list_images(tmp_path)] == ["a.dat"]
  options = {} if kind in ("JPEG", "WEBP", "AVIF") else {"tolerance": 0}
  got = data.read_image(tmp_path / "a.dat")[..., 0].astype(int)
  assert np.abs(got - grey).mean() <= options.get("tolerance", 8)  # lossy by default


def test_the_first_frame_of_an_animation(tmp_path, grey):
  frames = [Image.fromarray(np.full([8, 8], v, np.uint8)) for v in (50, 200)]
  frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
  same(tmp_path / "a.gif", np.full([8, 8, data.read_image(tmp_path / "a.gif").shape[2]], 50))
  report = data.load(f"folder:{tmp_path}", "all").report
  assert "first frame of several 1" in "\n".join(report)


def test_hidden_files_links_and_loops(tmp_path, photo):
  saved(tmp_path / "in" / "a" / "1.png", photo)
  saved(tmp_path / "in" / ".ipynb_checkpoints" / "x.png", photo)
  (tmp_path / "in" / "._1.jpg").write_bytes(b"\0\5\x16\7")
  saved(tmp_path / "elsewhere" / "2.png", photo)
  os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "b")
  os.symlink("a", tmp_path / "in" / "0_again")
  os.symlink("..", tmp_path / "in" / "a" / "loop")
  os.mkfifo(tmp_path / "in" / "pipe.png")
  found = folders.scan(tmp_path / "in")
  assert [str(f.relative_to(tmp_path / "in")) for f in found.files] == ["a/1.png", "b/2.png"]
  assert found.hidden == 2
  assert sorted(found.links) == ["0_again", "a/loop"]
  os.symlink(tmp_path / "in", tmp_path / "whole")
  assert len(data.list_images(tmp_path / "whole")) == 2


def mixed(folder, photo):
  """Two good pictures, a duplicate, a flat one, a small one, and three that cannot be used."""
  saved(folder / "cats" / "1.png", photo)
  saved(folder / "dogs" / "2.jpg", photo[::-1], quality=95)
  saved(folder / "dogs" / "twin.png", photo)
  saved(folder / "dogs" / "black.png", np.zeros([20, 20, 3], np.uint8))
  saved(folder / "dogs" / "tiny.png", photo[:5, :5])
  (folder / "cats" / "empty.png").write_bytes(b"")
  (folder / "cats" / "line\nbreak.png").write_text("no picture")
  saved(folder / "dogs" / "float.tif", photo[..., 0].astype(np.float32))


def test_nothing_is_refused_before_all_is_known(tmp_path, photo):
  mixed(tmp_path, photo)
  said = []
  with pytest.raises(ValueError, match=r"3 of 8 files cannot be used: 2 unreadable.*1 val") as e:
    data.load(f"folder:{tmp_path}", "all", (16, 16, 3), say=said.append)
  assert "\n" not in str(e.value)
  assert "data.skip_bad=0.38 leaves" in str(e.value)
  table = "\n".join(said)
  for text in (
    "empty.png",
    r"line\nbreak.png",
    "float.tif",
    "1 smaller than 16×16×3",
    "cats/1.png",
    "twin.png",
    "black.png",
    "cats 1, dogs 3",
    "JPEG 1",
  ):
    assert text in table
  assert all("\n" not in line for line in said)


def test_a_stated_share_is_left_out(tmp_path, photo):
  mixed(tmp_path, photo)
  source = data.load(f"folder:{tmp_path}", "all", (16, 16, 3), policy=data.Policy(skip_bad=0.38))
  assert source.images.shape == (4, 16, 16, 3)
  assert source.labels.tolist() == [0, 1, 1, 1]
  assert source.label_names == ("cats", "dogs")
  enlarged = data.Policy(small="enlarge", skip_bad=0.5)
  assert len(data.load(f"folder:{tmp_path}", "all", (16, 16, 3), policy=enlarged)) == 5


def test_a_split_may_be_a_folder(tmp_path, photo):
  saved(tmp_path / "a" / "1.png", photo)
  saved(tmp_path / "b" / "2.png", photo)
  assert len(data.load("digits", f"folder:{tmp_path / 'b'}", (16, 16, 3))) == 1


def zipped(path, folder):
  with zipfile.ZipFile(path, "w") as archive:
    for file in sorted(folder.rglob("*")):
      archive.write(file, file.relative_to(folder))
  return path


def test_a_zip_file_is_read_like_its_folder(tmp_path, photo):
  mixed(tmp_path / "in", photo)
  saved(tmp_path / "in" / "__MACOSX" / "x.png", photo)
  archive = zipped(tmp_path / "in.zip", tmp_path / "in")
  options = {"policy": data.Policy(skip_bad=0.5)}
  source = data.load(f"folder:{archive}", "all", (16, 16, 3), **options)
  shutil.rmtree(tmp_path / "in" / "__MACOSX")
  folder = data.load(f"folder:{tmp_path / 'in'}", "all", (16, 16, 3), **options)
  np.testing.assert_array_equal(source.images, folder.images)
  assert source.labels.tolist() == folder.labels.tolist()
  assert source.label_names == folder.label_names
  assert "1 hidden" in "\n".join(source.report)


@pytest.mark.parametrize("listed", ["txt", "csv"])
def test_celeb_a_by_its_own_names(tmp_path, listed):
  """The official split, and the crop of the face: of each image only its centre has its number."""
  folder, space = tmp_path / "img_align_celeba", " " if listed == "txt" else ","
  rows = ["image_id,partition"] if listed == "csv" else []
  for k in range(6):
    image = np.full([218, 178, 3], 255, np.uint8)
    image[39:179, 19:159] = k
    saved(folder / f"{k:06}.png", image)
    rows.append(f"{k:06}.png{space}{k % 3}")
  (tmp_path / f"list_eval_partition.{listed}").write_text("\n".join(rows) + "\n")
  for name in (folder, zipped(tmp_path / "img_align_celeba.zip", tmp_path / "img_align_celeba")):
    for part, split in enumerate(("train", "validation", "test")):
      source = data.load(f"folder:{name}", split, (140, 140, 3))
      assert [np.unique(x).tolist() for x in source.images] == [[part], [part + 3]]
  other = data.load(f"folder:{folder}", "test", (128, 128, 3), "celeb_a_128")
  assert other.images[0, 0, 0, 0] == 2
  with pytest.raises(ValueError, match=r"CelebA has no split 'tset'"):
    data.load(f"folder:{folder}", "tset")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_file_is_read_like_its_folder(tmp_path, photo, mode):
  mixed(tmp_path / "in", photo)
  os.link(tmp_path / "in" / "cats" / "1.png", tmp_path / "in" / "dogs" / "hard.png")
  os.symlink("../cats/1.png", tmp_path / "in" / "dogs" / "soft.png")
  os.symlink("nowhere.png", tmp_path / "in" / "dogs" / "broken.png")
  (tmp_path / "in" / ".hidden.png").write_bytes(b"")
  (tmp_path / "in" / "notes.txt").write_text("no picture")
  with tarfile.open(tmp_path / "in.tar", mode) as archive:
    archive.add(tmp_path / "in" / "dogs" / "2.jpg", "./cats/1.png")  # which the next one replaces
    archive.add(tmp_path / "in", ".")
  options = {"policy": data.Policy(skip_bad=0.5)}
  shape = (16, 16, 3)
  source = data.load(f"folder:{tmp_path / 'in.tar'}", "all", shape, **options)
  folder = data.load(f"folder:{tmp_path / 'in'}", "all", shape, **options)
  assert source.digest() == folder.digest()
  assert source.label_names == folder.label_names
  table = "\n".join(source.report)
  for text in ("1 hidden", "1 that are no pictures (notes.txt)", "a link to nowhere.png"):
    assert text in table
  for k, content in enumerate(((tmp_path / "in.tar").read_bytes()[:700], b"no archive")):
    (tmp_path / f"{k}.tar").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{k}.tar.*(as an archive|give the folder)") as caught:
      data.load(f"folder:{tmp_path / f'{k}.tar'}", "all", shape)
    assert "\n" not in str(caught.value)


def test_a_tar_file_that_is_cut_off_is_no_smaller_data_set(tmp_path, photo):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    for k in range(12):
      Image.fromarray(photo).save(tmp_path / f"{k}.png")
      archive.add(tmp_path / f"{k}.png", f"{k}.png")
  whole = (tmp_path / "a.tar").read_bytes()
  assert len(data.load(f"folder:{tmp_path / 'a.tar'}", "all")) == 12
  damaged = [whole[: len(whole) * k // 9] for k in range(1, 8)]
  flipped = bytearray(whole)
  flipped[whole.index(b"5.png") + 120] ^= 1  # in a header
  for content in (*damaged, bytes(flipped)):
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.tar: .*copy it again") as caught:
      data.load(f"folder:{tmp_path / 'b.tar'}", "all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_damaged_archive_is_called_one(tmp_path, suffix):
  (tmp_path / f"a{suffix}").write_bytes(b"PK")
  with pytest.raises(ValueError, match="cannot be read as an archive"):
    data.load(f"folder:{tmp_path}/a{suffix}", "all")


def test_an_archive_is_unpacked_where_there_is_room(tmp_path, photo, monkeypatch):
  Image.fromarray(photo).save(tmp_path / "0.png")
  with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
    archive.add(tmp_path / "0.png", "0.png")
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
  for name, options in (
    (f"folder:{tmp_path / 'a.tar.gz'}", {}),
    (f"folder:{tmp_path}", {"most": 0}),
  ):
    with pytest.raises(ValueError, match=r"TMPDIR") as caught:
      data.load(name, "all", **options)
    assert "\n" not in str(caught.value)


def test_a_link_to_a_pipe_is_no_picture(tmp_path, photo):
  Image.fromarray(photo).save(tmp_path / "0.png")
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
  assert len(data.load(f"folder:{tmp_path}", "all")) == 1


def test_one_share_of_bad_files_serves_all_splits(tmp_path, photo):
  for k in range(40):
    Image.fromarray(photo).save(tmp_path / f"{k:02}.png")
  (tmp_path / "09.png").write_bytes(b"no picture, in the split test")
  load = lambda split, share: data.load(
    f"folder:{tmp_path}", split, policy=data.Policy(skip_bad=share)
  )
  with pytest.raises(data.Refused, match=r"data\.skip_bad=0\.03"):
    load("test", 0.02)
  assert [len(load(s, 0.03)) for s in ("all", "train", "test")] == [39, 36, 3]


def test_pictures_that_are_all_too_small_are_not_told_to_be_left_out(tmp_path, grey):
  for k in range(3):
    Image.fromarray(grey[:5, :5]).save(tmp_path / f"{k}.png")
  with pytest.raises(ValueError, match=r"as are the other 2 files; ask for .*enlarge\)$"):
    data.load(f"folder:{tmp_path}", "all", (8, 8, 1))


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (1, 1)])
def test_the_thinnest_picture_is_enlarged(tmp_path, size):
  Image.new("L", size, 77).save(tmp_path / "a.png")
  enlarging = data.Policy(small="enlarge")
  for shape in ((8, 128, 1), (128, 8, 1)):
    got = data.load(f"folder:{tmp_path}", "all", shape, policy=enlarging)
    np.testing.assert_array_equal(got.images, np.full([1, *shape], 77))


@pytest.mark.parametrize("name", ["folder:~nosuchuser/x", "pack:~nosuchuser/x", "pack:", "folder:"])
def test_a_path_that_leads_nowhere(name):
  with pytest.raises(ValueError, match=r"no such user|names no folder"):
    data.load(name, "all")


@pytest.mark.parametrize("shape", [(0, 8, 3), (8.5, 8, 3), ("8", 8, 3), (-8, 8, 3), (8, 8)])
def test_what_is_no_shape(shape):
  with pytest.raises(ValueError, match=r"an image shape is \(height, width, channels\)"):
    data.load("digits", "all", shape)


def test_names_in_a_zip_file_may_be_odd(tmp_path, photo):
  saved(tmp_path / "a.png", photo)
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
    for name in ("./x//1.png", "../2.png", "x/\nü\u2028.png", "x" * 300 + ".png"):
      archive.write(tmp_path / "a.png", name)
  source = data.load(f"folder:{tmp_path / 'a.zip'}", "all", (16, 16, 3))
  assert len(source) == 3  # what lies above the archive is hidden
  assert "1 hidden" in "\n".join(source.report)


@pytest.mark.parametrize("archive", [False, True])
def test_labels_as_edm_lists_them(tmp_path, photo, archive):
  folder = tmp_path / "in"
  for k in range(3):
    saved(folder / "00000" / f"img{k:08}.png", photo)

  def labels(content):
    (folder / "dataset.json").write_text(content)
    name = zipped(tmp_path / "in.zip", folder) if archive else folder
    source = data.load(f"folder:{name}", "all", (16, 16, 3))
    return source.labels.tolist(), source.label_names, "\n".join(source.report)

  pairs = [[f"00000/img{k:08}.png", label] for k, label in enumerate((7, 3, 7))]
  found, names, table = labels(json.dumps({"labels": pairs}))
  assert (found, names) == ([7, 3, 7], ())
  assert "dataset.json" in table
  assert labels('{"labels": null}')[0] == [0, 0, 0]
  for content, text in (
    (json.dumps({"labels": pairs[:2]}), "has no '00000/img00000002.png'"),
    ("{}", "has no 'labels'"),
    ("[", "no list of labels"),
    (json.dumps({"labels": [[pairs[0][0], [0]]] * 3}), "has no"),
  ):
    with pytest.raises(ValueError, match=rf"dataset.json: .*{text}") as caught:
      labels(content)
    assert "\n" not in str(caught.value)


# --- TFDS -----------------------------------------------------------------------------------------


def stored(folder, feature, images, **labels):
  tfds = pytest.importorskip("tensorflow_datasets")
  features = {"image": feature} | {k: kind for k, (kind, _) in labels.items()}
  rows = [
    (k, {"image": image} | {name: values[k] for name, (_, values) in labels.items()})
    for k, image in enumerate(images)
  ]
  tfds.dataset_builders.store_as_tfds_dataset(
    name="own",
    version="1.0.0",
    data_dir=folder,
    disable_shuffling=True,
    features=tfds.features.FeaturesDict(features),
    split_datasets={"train": rows},
  )
  return lambda **options: data.load(
    "own", "train", data_dir=str(folder), progress=False, **options
  )


def test_tfds_images_of_16_bits_and_of_floats_are_scaled(tmp_path, rng):
  tfds = pytest.importorskip("tensorflow_datasets")
  values = rng.integers(0, 65536, [3, 8, 8, 1]).astype(np.uint16)
  feature = tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png")
  np.testing.assert_array_equal(
    stored(tmp_path / "a", feature, values)().images, np.rint(values / 257)
  )
  feature = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32)
  floats = (values / 65535).astype(np.float32)
  np.testing.assert_array_equal(
    stored(tmp_path / "b", feature, floats)().images, np.rint(255 * floats)
  )
  with pytest.raises(ValueError, match=r"3 of 3 examples cannot be used: 3 values, float32 val"):
    stored(tmp_path / "c", feature, floats * 2 - 1)()


def test_tfds_labels_of_other_kinds(tmp_path, rng):
  tfds = pytest.importorskip("tensorflow_datasets")
  images = rng.integers(0, 256, [3, 4, 4, 3]).astype(np.uint8)
  feature = tfds.features.Image(shape=(4, 4, 3))
  texts = (tfds.features.Text(), ["tree", "cat", "tree"])
  source = stored(tmp_path / "a", feature, images, label=texts)()
  assert source.labels.tolist() == [1, 0, 1]
  assert source.label_names == ("cat", "tree")
  hot = (tfds.features.Tensor(shape=(2,), dtype=np.int64), np.eye(3, 2, dtype=np.int64))
  source = stored(tmp_path / "b", feature, images, label=hot)()
  assert source.labels.tolist() == [0, 0, 0]
  assert "not one class" in "\n".join(source.report)
