"""Packs: the same batches to the bit as from memory and from a folder, and no damage unseen."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data, files
from soft_diffusion_tf.data import doctor, pack, pictures

SHAPE = (8, 8, 3)


@pytest.fixture
def folder(tmp_path, rng):
  for k in range(23):
    size = rng.integers(8, 20, 2)
    file = tmp_path / "in" / "abc"[k % 3] / f"{k}.{'png' if k % 2 else 'jpg'}"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, [*size, 3]).astype(np.uint8)).save(file)
  return f"folder:{tmp_path / 'in'}"


def packed(out, name, splits=("train", "test"), shape=SHAPE, say=None, **policy):
  policy = data.Policy(**policy)
  load = lambda split, storage: data.load(name, split, shape, policy=policy, storage=storage)
  text = name if isinstance(name, str) else "own"
  pack.write(out, load, text, splits, pack.preparing(shape, "auto", policy), say)
  return f"pack:{out}"


def batches_of(source, options):
  batches = data.batches(source, 8, seed=3, flip=True, labels=True, **options)
  return [(x.numpy(), y.numpy()) for x, y in batches.take(6)]


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_batches_are_the_same_to_the_bit(tmp_path, folder, most):
  name = packed(tmp_path / "pack", folder)
  for split in ("train", "test"):
    one = data.load(folder, split, SHAPE)
    two = data.load(name, split, SHAPE, most=most)
    assert isinstance(two.images, np.memmap) == (not most)
    assert two.label_names == one.label_names == ("a", "b", "c")
    assert one.digest() == two.digest()
    for options in ({}, {"balanced": True}, {"start": 5, "part": (1, 2), "each": 2}):
      for (x, y), (u, v) in zip(batches_of(one, options), batches_of(two, options)):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def test_what_is_too_large_for_memory_goes_into_a_temporary_file(tmp_path, folder, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  said = []
  one = data.load(folder, "train", SHAPE)
  two = data.load(folder, "train", SHAPE, most=one.images.nbytes - 1, say=said.append)
  held = data.load(folder, "train", SHAPE, most=one.images.nbytes * 2, say=said.append)
  assert isinstance(two.images, np.memmap)
  assert not isinstance(held.images, np.memmap)
  assert one.digest() == two.digest() == held.digest()
  assert not list(tmp_path.glob("tmp*"))  # it has no name, so a kill leaves nothing
  assert sum("temporary file" in line and "data pack keeps them" in line for line in said) == 1
  for (x, _), (u, _) in zip(batches_of(one, {}), batches_of(two, {})):
    np.testing.assert_array_equal(x, u)

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(files, "reserve", full)
  with pytest.raises(ValueError, match=r"has no room for them .*TMPDIR.*data\.in_memory") as caught:
    data.load(folder, "train", SHAPE, most=0)
  assert "\n" not in str(caught.value)


def random_folder(folder, rng):
  """Pictures of random sizes, modes and formats, in class folders."""
  for k in range(int(rng.integers(11, 30))):
    image = Image.fromarray(rng.integers(0, 256, [*rng.integers(8, 24, 2), 3]).astype(np.uint8))
    mode = rng.choice(["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"])
    kinds = {"CMYK": ["jpg", "tif"], "RGB": ["png", "jpg", "webp", "bmp"], "L": ["png", "jpg"]}
    if mode == "RGBA":
      image.putalpha(image.convert("L"))
    elif mode == "I;16":
      image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
      image = image.convert(mode)
    file = folder / rng.choice(["a", "b", "c/d"]) / f"{k}.{rng.choice(kinds.get(mode, ['png']))}"
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    image.save(file, **({"exif": exif} if file.suffix == ".jpg" else {}))


@pytest.mark.parametrize("seed", range(3))
def test_random_folders_give_the_same_batches_in_every_way(tmp_path, seed):
  """From memory, archives, arrays and packs; whole, in parts for workers, and from any step on."""
  rng, folder = np.random.default_rng(seed), tmp_path / "in"
  random_folder(folder, rng)
  shape = (int(rng.integers(4, 9)), int(rng.integers(4, 9)), int(rng.choice([1, 3])))
  for kind in ("zip", "tar"):
    shutil.make_archive(str(tmp_path / "in"), kind, folder)
  source = data.load(f"folder:{folder}", "all", shape)
  name = packed(tmp_path / "pack", f"folder:{folder}", ("all",), shape)
  ways = [data.load(f"folder:{tmp_path / 'in'}.{kind}", "all", shape) for kind in ("zip", "tar")]
  ways += [data.load((source.images, source.labels), "all", shape)]
  ways += [data.load(name, "all", shape, most=most) for most in (0, 1 << 30)]
  size, start = 4 * int(rng.integers(1, 4)), int(rng.integers(0, 10**6))
  options = {
    "seed": seed,
    "flip": bool(rng.integers(2)),
    "balanced": bool(rng.integers(2)),
    "augment": [(), (data.Shift(1),), (data.EDM(), data.Shift(1))][seed],
    "labels": True,
  }

  def taken(source, start, count, **part):
    pipeline = data.batches(source, size, start=start, **part, **options)
    return [[x.numpy() for x in batch] for batch in pipeline.take(count)]

  want = taken(source, start, 3)
  for way in ways:
    np.testing.assert_equal(taken(way, start, 3), want)
  np.testing.assert_equal(taken(ways[-2], start + 1, 2), want[1:])  # a run that goes on
  for hosts, each in ((1, 2), (2, 1), (2, 2)):
    parts = [taken(ways[-2], start, 3 * each, part=(h, hosts), each=each) for h in range(hosts)]
    for k, batch in enumerate(want):
      for j, whole in enumerate(batch):
        got = [part[k * each + r][j] for part in parts for r in range(each)]
        np.testing.assert_array_equal(np.concatenate(got), whole)


def test_a_worker_reads_no_rows_but_its_own(tmp_path, folder):
  source = data.load(packed(tmp_path / "pack", folder), "train", SHAPE)
  read = []

  class Seen(np.memmap):
    def __getitem__(self, index):
      read.append(np.array(index))
      return np.asarray(self)[index]

  images = source.images.view(Seen)
  watched = data.Source("x", images, source.labels)
  next(iter(data.batches(watched, 8, part=(1, 2), each=2)))
  assert {len(rows) for rows in read} == {2}  # of 8, for 4 replicas


def test_any_source_is_packed(tmp_path, rng):
  images = rng.random([5, 8, 8, 3])
  for k, source in enumerate(("digits", images, np.rint(255 * images).astype(np.uint8))):
    shape = (8, 8, 1) if k == 0 else SHAPE
    load = lambda split, storage, source=source, shape=shape: data.load(
      source, split, shape, storage=storage
    )
    made = pack.preparing(shape, "auto", data.Policy())
    assert pack.write(tmp_path / str(k), load, "x", ["test"], made) == {"test": (297, 5, 5)[k]}
    want = data.load(source, "test", shape)
    got = data.load(f"pack:{tmp_path / str(k)}", "test", shape)
    np.testing.assert_array_equal(got.images, want.images)


def refused(name, text, split="train", shape=SHAPE, **options):
  with pytest.raises(ValueError, match=text) as caught:
    data.load(name, split, shape, **options)
  assert "\n" not in str(caught.value)


def test_another_preparation_is_refused_by_field(tmp_path, folder):
  name = packed(tmp_path / "pack", folder)
  refused(name, r"packed with data.image_shape = \[8, 8, 3\], and \[4, 4, 3\]", shape=(4, 4, 3))
  refused(name, "data.crop = 'auto', and 'none' is asked for", crop="none")
  refused(name, "data.transparency = 'white'", policy=data.Policy(transparency="black"))
  refused(name, "data.small = 'leave_out'", policy=data.Policy(small="enlarge"))
  refused(name, "no split 'valid'; it has train, test", split="valid")


def test_damage_is_found_and_named(tmp_path, folder):
  out = tmp_path / "pack"
  name = packed(out, folder)
  for file in ("0.images", "0.labels"):
    whole = (out / file).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (bytes(flipped), whole[:-1], b"", whole + b"x"):
      (out / file).write_bytes(content)
      refused(name, file)
    (out / file).unlink()
    refused(name, file)
    (out / file).write_bytes(whole)
  index = json.loads((out / "pack.json").read_text())
  for content in ("", "[]", "{}", json.dumps(index)[:-9]):
    (out / "pack.json").write_text(content)
    refused(name, "is damaged")
  (out / "pack.json").write_text(json.dumps(index | {"format": 99, "version": "9.9"}))
  refused(name, "a pack of version 9.9, and this is")
  refused(f"pack:{tmp_path / 'in'}", "no pack.json in it")


def test_every_flipped_bit_of_an_index_is_found(tmp_path, folder, rng):
  out = tmp_path / "pack"
  name = packed(out, folder, splits=("test",))
  whole = (out / "pack.json").read_bytes()
  for place in rng.choice(len(whole), 150, replace=False):
    flipped = bytearray(whole)
    flipped[place] ^= 1 << int(rng.integers(7))
    (out / "pack.json").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"pack") as caught:
      data.load(name, "test", SHAPE, progress=False)
    assert "\n" not in str(caught.value)
  for change in ({"digests": None}, {"shape": [2, 8.0, 8, 3]}, {"label_names": [1, 2]}):
    index = json.loads(whole)
    index["splits"]["test"] |= change
    index["digest"] = pack._digest_of(index)  # by somebody who means it
    (out / "pack.json").write_text(json.dumps(index))
    refused(name, r"is damaged \(.* of test\)", "test")


def test_a_place_that_is_taken_is_seen_before_and_after(tmp_path, folder):
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="dangling is there already"):
    packed(tmp_path / "dangling", folder)

  def load(split, storage):
    source = data.load(folder, split, SHAPE, storage=storage)
    (tmp_path / "out").mkdir(exist_ok=True)  # somebody else's
    (tmp_path / "out" / "theirs").touch()
    return source

  made = pack.preparing(SHAPE, "auto", data.Policy())
  with pytest.raises(OSError, match="not empty"):
    pack.write(tmp_path / "out", load, folder, ["train"], made)
  assert (tmp_path / ".out.partial" / "0.images").exists()  # what was done is not lost


def test_a_refusal_costs_nothing_of_what_was_read(tmp_path, folder, monkeypatch):
  bad = tmp_path / "in" / "a" / "0.jpg"
  sound = bad.read_bytes()
  bad.write_bytes(sound[:50])
  with pytest.raises(ValueError, match=r"0\.jpg"):
    packed(tmp_path / "pack", folder)
  bad.write_bytes(sound)
  found = reads(monkeypatch)
  name = packed(tmp_path / "pack", folder)
  assert len(found) < 23 + 1
  assert data.load(name, "train", SHAPE).digest() == data.load(folder, "train", SHAPE).digest()


def contents(out):
  return {file.name: file.read_bytes() for file in out.iterdir()}


def reads(monkeypatch):
  """A list that grows with every picture that is read."""
  read, found = pictures.read, []
  monkeypatch.setattr(pictures, "read", lambda *args: found.append(args[0]) or read(*args))
  return found


KILLED = """
import os, signal
from soft_diffusion_tf.data import pack
from tests.test_pack import packed
commit, count, pack._EVERY = pack.PackStorage.commit, [], 4
def dying(storage):
  commit(storage)
  count.append(storage)
  if len(count) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
pack.PackStorage.commit = dying
packed({out!r}, {name!r})
"""


def test_a_packer_that_was_killed_goes_on(tmp_path, folder, monkeypatch):
  packed(tmp_path / "whole", folder)
  out, partial = tmp_path / "pack", tmp_path / ".pack.partial"
  code, root = KILLED.format(out=str(out), name=folder), pathlib.Path(__file__).parents[1]
  ended = subprocess.run(
    [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
  )
  assert ended.returncode == -signal.SIGKILL
  assert partial.is_dir()
  assert not out.exists()
  refused(f"pack:{partial}", "no pack.json in it")
  with open(partial / "0.journal", "a") as file:  # cut off in the middle of a line
    file.write('["mark", "", "pla')
  found, said = reads(monkeypatch), []
  packed(out, folder, say=said.append)
  assert len(found) == 23 - 8
  assert said == ["train: 8 were read by a packing before that was stopped"]
  assert contents(out) == contents(tmp_path / "whole")
  assert not partial.exists()


@pytest.mark.parametrize("commits", [1, 5, 6, 7])  # of 21 and 2 images: also at the end of a split
@pytest.mark.parametrize("change", ["", "file", "policy", "damage"])
def test_what_changed_meanwhile_is_read_again(tmp_path, folder, monkeypatch, commits, change):
  def stopped(storage):
    commit(storage)
    count.append(storage)
    if len(count) == commits:
      raise KeyboardInterrupt

  commit, count = pack.PackStorage.commit, []
  with monkeypatch.context() as patched:
    patched.setattr(pack, "_EVERY", 4)
    patched.setattr(pack.PackStorage, "commit", stopped)
    with pytest.raises(KeyboardInterrupt):
      packed(tmp_path / "pack", folder)
  policy, behind = {}, min(4 * commits, 21) + 2 * (commits == 7)
  if change == "file":  # the third in order is another picture
    files = data.list_images(tmp_path / "in")
    Image.fromarray(np.zeros([9, 9, 3], np.uint8)).save(files[2])
    behind = 2 + 2 * (commits == 7)
  elif change == "policy":
    policy, behind = {"small": "enlarge"}, 0
  elif change == "damage":
    (tmp_path / ".pack.partial" / "0.images").write_bytes(b"x")
    behind = 2 * (commits == 7)
  found = reads(monkeypatch)
  packed(tmp_path / "pack", folder, **policy)
  assert len(found) == 23 - behind
  packed(tmp_path / "whole", folder, **policy)
  assert contents(tmp_path / "pack") == contents(tmp_path / "whole")


def test_images_that_a_program_has_go_on_by_their_digests(tmp_path, rng, monkeypatch):
  images = list(rng.integers(0, 256, [20, 8, 8, 3]).astype(np.uint8))

  class Stopping(list):
    def __getitem__(self, k):
      if k == 12:
        raise KeyboardInterrupt
      return super().__getitem__(k)

  monkeypatch.setattr(pack, "_EVERY", 1)
  monkeypatch.setattr(doctor, "in_parallel", lambda function, items: map(function, items))
  with pytest.raises(KeyboardInterrupt):
    packed(tmp_path / "pack", Stopping(images), ("all",))
  images[10] = images[0]
  said = []
  packed(tmp_path / "pack", images, ("all",), say=said.append)
  assert said == ["all: 10 were read by a packing before that was stopped"]
  np.testing.assert_array_equal(data.load(f"pack:{tmp_path / 'pack'}", "all").images, images)


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync", "truncate"])
def test_a_full_disk_leaves_nothing(tmp_path, folder, monkeypatch, where):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  before = sorted(tmp_path.iterdir())
  monkeypatch.setattr(os, where, full)
  with pytest.raises((ValueError, OSError), match="No space left") as caught:
    packed(tmp_path / "pack", folder)
  assert "\n" not in str(caught.value)
  if where == "posix_fallocate":
    assert "21 images take 0.00 GiB" in str(caught.value)
  assert sorted(tmp_path.iterdir()) == before


def test_a_pack_is_there_when_it_is_whole(tmp_path, folder):
  out, made = tmp_path / "pack", pack.preparing(SHAPE, "auto", data.Policy())

  def bad(split, storage):
    raise ValueError("bad")

  with pytest.raises(ValueError, match="bad"):  # what is refused would be refused again
    pack.write(out, bad, folder, ["train"], made)
  assert [file.name for file in tmp_path.iterdir()] == ["in"]

  def twice(split, storage):
    with pytest.raises(ValueError, match="another process packs into it"):
      packed(out, folder)
    return data.load(folder, split, SHAPE, storage=storage)

  pack.write(out, twice, folder, ["train"], made)
  with pytest.raises(ValueError, match="is there already"):
    packed(out, folder)
