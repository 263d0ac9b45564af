"""TIFF files of any number of bands, which Pillow does not read: multispectral images."""

import zlib

import numpy as np

_MARKS = (b"II*\0", b"MM\0*")
_KINDS = {1: "u", 2: "i", 3: "f"}  # of the tag SampleFormat


def read_bands(file, bands=None):
  """The samples [h, w, bands] of an open TIFF file that has so many, or any; None for all others.

  Strips without compression or by zlib, of samples one type; the file is left at its beginning.
  """
  from PIL import TiffImagePlugin

  head = file.read(8)
  file.seek(0)
  if head[:4] not in _MARKS:
    return None
  tags = TiffImagePlugin.ImageFileDirectory_v2(head)
  file.seek(tags.next)
  tags.load(file)
  file.seek(0)
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
  strips = []
  for offset, count in zip(tags[273], tags[279]):
    file.seek(offset)
    strip = file.read(count)
    strips.append(strip if packed == 1 else zlib.decompress(strip))
  order = "<" if head[:2] == b"II" else ">"
  values = np.frombuffer(b"".join(strips), np.dtype(f"{order}{_KINDS[kinds[0]]}{bits[0] // 8}"))
  file.seek(0)
  if values.size < width * height * bands:
    raise ValueError("it is cut off")
  values = values[: width * height * bands].astype(values.dtype.newbyteorder("="))
  if tags.get(262) == 0:  # it says that 0 is white
    values = (1 if kinds[0] == 3 else (1 << bits[0]) - 1) - values
  if apart:
    return np.ascontiguousarray(np.moveaxis(values.reshape(bands, height, width), 0, 2))
  return values.reshape(height, width, bands)
