"""TIFF files of any number of bands, which Pillow does not read: multispectral images."""

import zlib

import numpy as np

_MARKS = (b"II*\0", b"MM\0*")
_KINDS = {1: "u", 2: "i", 3: "f"}  # of the tag SampleFormat


def read_bands(file, bands=None):
  """(samples [h, w, bands], orientation) of an open TIFF file that has so many bands, or any.

  Strips without compression or by zlib, of samples one type; the file is left at its beginning.
  None of a file that is no TIFF, has other bands, or is a picture with transparency or in CMYK,
  where any number of bands is not asked for.
  """
  head, tags = _tags(file)
  if tags is None:
    return None
  picture = tags.get(262) == 5 or set(tags.get(338, ())) & {1, 2}
  if bands in (2, 4) and picture:
    return None
  if bands is None:
    bands = tags.get(277, 1)
  if tags.get(277, 1) != bands:
    return None
  if 256 not in tags or 257 not in tags:
    raise ValueError("it is cut off")
  width, height, bits = tags[256], tags[257], tags.get(258, (1,))
  kinds, packed, apart = tags.get(339, (1,)), tags.get(259, 1), tags.get(284, 1) == 2
  whole = len(set(bits)) == 1 == len(set(kinds)) and bits[0] in (8, 16, 32, 64)
  if not whole or kinds[0] not in _KINDS or packed not in (1, 8, 32946) or tags.get(317, 1) != 1:
    raise ValueError(
      f"of its {bands} bands the bits {tuple(bits)}, compression {packed} and predictor "
      f"{tags.get(317, 1)} are not read together: save it without compression, or as .npy"
    )
  if 273 not in tags or 279 not in tags:
    raise ValueError("it is stored in tiles: save it in strips, or as .npy")
  strips, left = [], width * height * bands * bits[0] // 8
  for offset, count in zip(tags[273], tags[279]):
    file.seek(offset)
    strip = file.read(min(count, left) if packed == 1 else count)
    if packed != 1:  # no more than there can be
      strip = zlib.decompressobj().decompress(strip, max(1, left))
    strips.append(strip)
    left -= len(strip)
  order = "<" if head[:2] == b"II" else ">"
  values = np.frombuffer(b"".join(strips), np.dtype(f"{order}{_KINDS[kinds[0]]}{bits[0] // 8}"))
  file.seek(0)
  if values.size < width * height * bands:
    raise ValueError("it is cut off")
  values = values[: width * height * bands].astype(values.dtype.newbyteorder("="))
  if tags.get(262) == 0:  # it says that 0 is white
    values = (1 if kinds[0] == 3 else (1 << bits[0]) - 1) - values
  orientation = tags.get(274, 1)
  if apart:
    values = np.ascontiguousarray(np.moveaxis(values.reshape(bands, height, width), 0, 2))
    return values, orientation
  return values.reshape(height, width, bands), orientation


def _tags(file):
  """(the first bytes, the tags) of an open TIFF file; None of another. It is left at its start."""
  from PIL import TiffImagePlugin

  head = file.read(8)
  file.seek(0)
  if head[:4] not in _MARKS:
    return head, None
  tags = TiffImagePlugin.ImageFileDirectory_v2(head)
  file.seek(tags.next)
  tags.load(file)
  file.seek(0)
  return head, tags


def check_planes(file):
  """Whether Pillow misreads an open TIFF file, so that `read_bands` has to: 16 bits in planes.

  Raises:
    ValueError: a file in planes that neither reads: with transparency.
  """
  _, tags = _tags(file)
  if tags is None or tags.get(284, 1) != 2 or tags.get(277, 1) == 1:
    return False
  deep = set(tags.get(258, (1,))) == {16}
  if (deep or tags.get(277) == 2) and tags.get(338):
    raise ValueError(
      "its planes lie one after the other, with transparency in one of them: save it with its "
      "samples interleaved"
    )
  return deep
