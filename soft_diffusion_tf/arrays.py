"""Arrays in .npz files of unknown origin: sizes are known and checked before memory is taken.

NumPy's own reader allocates whatever a header claims, and a zip file of some megabytes may unpack
to terabytes. Here the caller says which shape it takes, and what is not that is refused unread.
"""

import contextlib
import math
import reprlib
import zipfile

import numpy as np

FLOATS = ("float16", "float32", "float64")
_MOST_TEXT = 1 << 28  # bytes of a text
_EXPANSION, _LARGE = (
  100,
  1 << 28,
)  # no array of weights packs so small; nor is checked below so many
_CHUNK = 1 << 20


class _File:
  """An open .npz; `shape`, `array` and `text` read one entry, by its name without ".npy"."""

  def __init__(self, archive, size):
    self._archive = archive
    self._entries = {}
    for info in archive.infolist():
      name = info.filename.removesuffix(".npy")
      if name in self._entries or name == info.filename:
        raise ValueError(f"it holds {info.filename!r}, which is no array of its own")
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ValueError(f"{name} is packed or encrypted in a way that NumPy does not write")
      self._entries[name] = info
    total = sum(info.file_size for info in self._entries.values())
    if total > max(_LARGE, _EXPANSION * size):
      raise ValueError(f"its {size:,} bytes would unpack to {total:,}, and no model's do")

  @property
  def names(self):
    """The names of what is in it, sorted."""
    return sorted(self._entries)

  def _open(self, name):
    """(stream at the data, shape, Fortran order, dtype), the header checked against the size."""
    if name not in self._entries:
      raise ValueError(f"{name} is missing in it")
    info = self._entries[name]
    stream = self._archive.open(info)
    if np.lib.format.read_magic(stream) != (1, 0):
      raise ValueError(f"{name} has a header that NumPy does not write for an array of numbers")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or dtype.names or dtype.subdtype:
      raise ValueError(f"{name} holds {dtype}, not numbers")
    if any(isinstance(n, bool) or n < 0 for n in shape):
      raise ValueError(f"{name} has the shape {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size != info.file_size - stream.tell():
      raise ValueError(
        f"{name} claims the shape {reprlib.repr(shape)} of {dtype} and has {info.file_size:,} bytes"
      )
    return stream, shape, fortran, dtype

  def shape(self, name):
    """The shape of an entry, from its header."""
    stream, shape, _, _ = self._open(name)
    stream.close()
    return shape

  def _read(self, name, check):
    stream, shape, fortran, dtype = self._open(name)
    with stream:
      check(shape, dtype)
      size = math.prod(shape) * dtype.itemsize
      data = bytearray()
      # Piece by piece: a stream that goes on beyond its size is not unpacked to its end.
      while len(data) < size:
        if not (piece := stream.read(min(_CHUNK, size - len(data)))):
          raise ValueError(f"{name} ends early")
        data += piece
      stream.read(1)  # to its end, where the checksum is compared
    return np.frombuffer(bytes(data), dtype).reshape(shape, order="F" if fortran else "C")

  def array(self, name, shape=None, dtypes=FLOATS, finite=True):
    """An array of this shape (of any without one) and of one of these dtypes; NaN and infinite
    values are refused.
    """

    def check(given, dtype):
      if shape is not None and given != tuple(shape):
        raise ValueError(f"{name} has the shape {reprlib.repr(given)}, not {tuple(shape)}")
      if dtype.name not in dtypes:
        raise ValueError(f"{name} holds {dtype}, not {' or '.join(dtypes)}")

    values = self._read(name, check)
    if finite and not np.isfinite(values).all():
      raise ValueError(f"{name} holds NaN or infinite values")
    return values

  def text(self, name):
    """A text, stored as an array without dimensions."""

    def check(shape, dtype):
      if shape != () or dtype.kind != "U" or dtype.itemsize > _MOST_TEXT:
        raise ValueError(f"{name} is not a text ({dtype} of the shape {reprlib.repr(shape)})")

    return str(self._read(name, check)[()])


@contextlib.contextmanager
def opened(path, wrong, remedy):
  """The .npz at `path`, open for reading.

  Raises:
    ValueError: one line that names the file, what is `wrong` with it, the cause that was found here
      or within the block, and the remedy.
  """
  try:
    with open(path, "rb") as file:
      size = file.seek(0, 2)
      with zipfile.ZipFile(file) as archive:
        yield _File(archive, size)
  except Exception as error:  # zipfile, zlib, struct and NumPy's parser raise many kinds
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise ValueError(f"{path}: {wrong} ({' '.join(text.split())}); {remedy}") from error
