import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import plots


def content(path):
  return np.asarray(Image.open(path).convert("RGB"))


def test_uint8_rounds_and_clips():
  got = plots.to_uint8(np.array([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0]))
  assert got.tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image(channels, rng):
  images = rng.random([5, 4, 6, channels])
  sheet = plots.grid(images, columns=3)
  assert sheet.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
  for k in range(5):
    top, left = 1 + (k // 3) * 5, 1 + (k % 3) * 7
    want = np.broadcast_to(plots.to_uint8(images[k]), [4, 6, 3])
    np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], want)
  np.testing.assert_array_equal(plots.grid(images, 3, zoom=2)[::2, ::2], sheet)


def test_png_round_trip(tmp_path, rng):
  picture = rng.integers(0, 256, [5, 6, 3]).astype(np.uint8)
  plots.save_png(tmp_path / "deep" / "a.png", picture)
  np.testing.assert_array_equal(content(tmp_path / "deep" / "a.png"), picture)
  plots.save_png(tmp_path / "b.png", picture[..., :1])
  np.testing.assert_array_equal(content(tmp_path / "b.png")[..., 0], picture[..., 0])


def test_figures_are_not_blank_and_deterministic(tmp_path, blur_diffusion, rng):
  frames = rng.random([4, 3, 8, 8, 1])

  def draw(folder):
    plots.side_by_side(folder / "a.png", [("one", frames[0]), ("two", frames[1])])
    plots.schedule(folder / "b.png", blur_diffusion, "std", {"same": blur_diffusion.level})
    plots.process(folder / "c.png", np.linspace(1, 0, 4), frames, frames[1:])
    plots.schedule(folder / "d.png", {"one": blur_diffusion, "two": blur_diffusion})
    lines = {"naive": [(10, 9.0), (20, 7.0)], "momentum": [(10, 5.0), (20, 1.0), (30, 2.0)]}
    plots.curves(folder / "e.png", lines, "NFE", "FD", floor=0.5)
    plots.strips(folder / "f.png", ["a", "b", "c"], [("x", frames[0]), ("y", frames[1])])
    sets = {"one": frames[0, :, 0, 0, 0], "two": frames[1, :, 0, 0, 0]}
    groups = [("first", ["a", "b", "c", "d"], frames.swapaxes(0, 1))]
    plots.neighbours(folder / "g.png", groups, [("pixels", sets, 0.3), ("more", sets, 0.2)])
    return [(folder / f"{name}.png").read_bytes() for name in "abcdefg"]

  assert draw(tmp_path / "1") == draw(tmp_path / "2")
  for name in "abcdefg":
    picture = content(tmp_path / "1" / f"{name}.png")
    assert picture.std() > 10
    assert min(picture.shape[:2]) > 60


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_picture_is_made_of_what_is_not_finite(value):
  images = np.zeros([2, 4, 4, 1], np.float32)
  images[1, 2, 3, 0] = value
  for make in (plots.to_uint8, plots.grid):
    with pytest.raises(ValueError, match="an image holds NaN or infinite values"):
      make(images)


def test_what_is_uint8_already_stays_as_it_is():
  picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(plots.to_uint8(picture), picture)
  np.testing.assert_array_equal(plots.grid(picture, padding=0)[..., 0], picture[0, ..., 0])
