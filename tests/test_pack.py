"""Packs: the same batches to the bit as from memory and from a folder, and no damage unseen."""

import json

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data
from soft_diffusion_tf.data import pack

SHAPE = (8, 8, 3)


@pytest.fixture
def folder(tmp_path, rng):
  for k in range(23):
    size = rng.integers(8, 20, 2)
    file = tmp_path / "in" / "abc"[k % 3] / f"{k}.{'png' if k % 2 else 'jpg'}"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, [*size, 3]).astype(np.uint8)).save(file)
  return f"folder:{tmp_path / 'in'}"


def packed(out, name, splits=("train", "test"), shape=SHAPE, **policy):
  policy = data.Policy(**policy)
  load = lambda split, room: data.load(name, split, shape, policy=policy, room=room)
  pack.write(out, load, name, splits, pack.preparing(shape, "auto", policy))
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
    for options in ({}, {"balanced": True}, {"start": 5, "replicas": (2, 2)}):
      for (x, y), (u, v) in zip(batches_of(one, options), batches_of(two, options)):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def test_any_source_is_packed(tmp_path, rng):
  images = rng.random([5, 8, 8, 3])
  for k, source in enumerate(("digits", images, np.rint(255 * images).astype(np.uint8))):
    shape = (8, 8, 1) if k == 0 else SHAPE
    load = lambda split, room, source=source, shape=shape: data.load(
      source, split, shape, room=room
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


def test_a_pack_is_there_when_it_is_whole(tmp_path, folder):
  out = tmp_path / "pack"

  def killed(split, room):
    if split == "test":
      raise KeyboardInterrupt
    return data.load(folder, split, SHAPE, room=room)

  made = pack.preparing(SHAPE, "auto", data.Policy())
  with pytest.raises(KeyboardInterrupt):
    pack.write(out, killed, folder, ["train", "test"], made)
  assert [file.name for file in tmp_path.iterdir()] == ["in"]

  def twice(split, room):
    with pytest.raises(ValueError, match="another process packs into it"):
      packed(out, folder)
    return data.load(folder, split, SHAPE, room=room)

  pack.write(out, twice, folder, ["train"], made)
  with pytest.raises(ValueError, match="is there already"):
    packed(out, folder)
