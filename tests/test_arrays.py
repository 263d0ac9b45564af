"""Arrays of unknown origin: what is refused, and that it costs no memory."""

import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from soft_diffusion_tf import arrays


def opened(path):
  return arrays.opened(path, "cannot be read as a test", "write it again")


def npy(shape, dtype="<f4", data=b"", version=(1, 0)):
  """The bytes of an array as NumPy writes it, of any header and data."""
  text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
  return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def write(path, **entries):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in entries.items():
      archive.writestr(f"{name}.npy", content)
  return path


def test_what_numpy_writes_is_read(tmp_path, rng):
  a = rng.random([3, 4, 5])
  b = np.asfortranarray(a.astype("f2"))
  np.savez_compressed(tmp_path / "a.npz", a=a, b=b, c=np.array("né"), d=np.zeros([0, 3], ">f4"))
  with opened(tmp_path / "a.npz") as content:
    assert content.names == ["a", "b", "c", "d"]
    assert content.shape("b") == (3, 4, 5)
    np.testing.assert_array_equal(content.array("a", a.shape), a)
    np.testing.assert_array_equal(content.array("b", a.shape, ("float16",)), a.astype("f2"))
    assert content.text("c") == "né"
    assert content.array("d", [0, 3]).shape == (0, 3)


def test_what_is_not_asked_for_is_refused(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.zeros([3, 4]), nan=np.array([np.nan]), text=np.array("x"))
  for ask, text in {
    lambda c: c.array("a", [4, 3]): r"a has the shape \(3, 4\), not \(4, 3\)",
    lambda c: c.array("a", [3, 4], ("float32",)): "a holds float64, not float32",
    lambda c: c.array("nan", [1]): "nan holds NaN or infinite",
    lambda c: c.array("text", []): "text holds <U1",
    lambda c: c.array("b", [1]): "b is missing",
    lambda c: c.text("a"): "a is not a text",
  }.items():
    with pytest.raises(ValueError, match=rf"a\.npz: cannot be read as a test \({text}"):  # noqa: SIM117
      with opened(path) as content:
        ask(content)


@pytest.mark.parametrize(
  ("entry", "text"),
  [
    (npy((1 << 40,)), "claims the shape"),  # 4 TiB that are not there
    (npy((2, 2), data=bytes(12)), "bytes"),
    (npy((-1,), data=bytes(4)), "shape"),
    (npy((True,), data=bytes(4)), "shape"),
    (npy((1,), "|O", b"\x80\x04K\x05."), "not numbers"),
    (npy((1,), data=bytes(4), version=(2, 0)), "header"),
    (npy("(" * 5000, data=bytes(4)), "cannot be read"),
    (b"PK", "cannot be read"),
    (b"", "cannot be read"),
  ],
)
def test_headers_that_lie(tmp_path, entry, text):
  with pytest.raises(ValueError, match=text) as raised:  # noqa: SIM117
    with opened(write(tmp_path / "a.npz", a=entry)) as content:
      content.array("a", content.shape("a"))
  assert "\n" not in str(raised.value)


def test_archives_that_are_none(tmp_path, rng):
  path = tmp_path / "a.npz"
  good = npy((1,), data=bytes(4))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", good)
  with pytest.raises(ValueError, match="no array"), opened(path):
    pass
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", good)
    with pytest.warns(UserWarning, match="Duplicate"):
      archive.writestr("a.npy", good)
  with pytest.raises(ValueError, match="no array"), opened(path):
    pass
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
    archive.writestr("a.npy", good)
  with pytest.raises(ValueError, match="in a way that NumPy does not write"), opened(path):
    pass
  write(path, a=npy((1000,), data=rng.bytes(4000)))
  whole = path.read_bytes()
  for damaged in (whole[:2000], whole[:500] + b"\0" + whole[501:], b""):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read"), opened(path) as content:
      content.array("a", [1000], finite=False)
  for other in (tmp_path, tmp_path / "none.npz"):
    with pytest.raises(ValueError, match="cannot be read"), opened(other):
      pass


_MEASURE = """
import resource, sys
from soft_diffusion_tf import arrays
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  with arrays.opened(sys.argv[1], "a test", "") as content:
    content.array("a", content.shape("a"))
except ValueError as error:
  print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_bomb_costs_no_memory(tmp_path):
  size = 1 << 30  # of zeros, a megabyte of them packed
  path = tmp_path / "bomb.npz"
  with (
    zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    archive.open("a.npy", "w", force_zip64=True) as stream,
  ):
    stream.write(npy((size // 4,)))
    for _ in range(64):
      stream.write(bytes(size // 64))
  command = [sys.executable, "-c", _MEASURE, path]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
  assert "would unpack to" in out[0]
  assert int(out[1]) < 64  # MiB
