"""The page in a real browser, served by a small SavedModel: pixels, DOM, console."""

import os

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import serving
from tests import webdriver
from tests.standin import FRAMES, SIDE, StandIn, served

pytest.importorskip("uvicorn", reason="serving needs uvicorn (the extra `serve`)")
pytestmark = [
  pytest.mark.skipif(not (webdriver.CHROMIUM and webdriver.DRIVER), reason=webdriver.MISSING)
]

PIXELS = """
  const canvas = document.querySelector(arguments[0]);
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
"""
IDLE = 'return document.getElementById("status").textContent === ""'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("standin") / "model"
  StandIn().export(path)
  return serving.Model(path)


@pytest.fixture(scope="module")
def client(model):
  with served(model, max_rows=64, slow_client=20) as client:
    yield client


@pytest.fixture(scope="module")
def window(tmp_path_factory):
  with webdriver.browser(tmp_path_factory.mktemp("profile")) as window:
    yield window


@pytest.fixture
def page(window, client):
  window.go(f"http://127.0.0.1:{client.port}/")
  window.until('return document.body.dataset.ready === "yes"')
  yield window
  assert [x for x in window.logs() if x["level"] in ("SEVERE", "WARNING")] == []


def pixels(page, selector):
  """A canvas as grey levels [H, W]; it must be opaque and grey."""
  rgba = np.reshape(page.run(PIXELS, selector), (SIDE, SIDE, 4))
  assert (rgba[..., 3] == 255).all()
  assert (rgba[..., :1] == rgba[..., :3]).all()
  return rgba[..., 0]


def levels(image):
  """What a canvas makes of floats: clamped and rounded."""
  return np.rint(255 * np.clip(np.asarray(image, np.float64)[..., 0], 0, 1)).astype(int)


def draw(page, count, seed):
  page.type("#count", str(count), clear=True)
  page.type("#seed", str(seed), clear=True)
  page.click("#draw")
  page.until(f'return document.querySelectorAll("#grid canvas").length === {count}')
  page.until(IDLE)


def test_samplers_and_steps_are_those_exported(page):
  options = 'return [...document.querySelectorAll("#sampler option")].map((o) => o.value)'
  assert page.run(options) == ["momentum", "two_step"]
  assert page.run('return document.getElementById("steps").value') == "momentum_4"
  page.type("#sampler", "two")
  page.until('return document.getElementById("steps").value === "two_step_2"')
  assert "8 × 8 pixels, grey" in page.run('return document.getElementById("about").textContent')


def test_samples_are_the_server_s_pixels(page, client):
  draw(page, 5, 40)
  _, answer = client.predict(
    {"signature_name": "sample_momentum_4", "inputs": {"num": 5, "seed": 40}}
  )
  for k, image in enumerate(answer["outputs"]["images"]):
    shown = pixels(page, f"#grid button:nth-child({k + 1}) canvas")
    np.testing.assert_array_equal(shown, levels(image))
    assert shown.std() > 10
  labels = 'return [...document.querySelectorAll("#grid button")].map((b) => b.ariaLabel)'
  assert page.run(labels) == [f"Sample of seed {s}" for s in range(40, 45)]


def test_the_slider_walks_through_the_process(page, client):
  draw(page, 3, 7)
  page.click("#grid button:nth-child(2)")
  page.until('return !document.getElementById("process").hidden')
  page.until(IDLE)
  assert (
    page.run('return document.querySelector("[aria-pressed=true]").ariaLabel') == "Sample of seed 8"
  )
  _, answer = client.predict({"signature_name": "process_momentum_4", "inputs": {"seeds": [8]}})
  states = answer["outputs"]["x_t"][0]
  first = pixels(page, "#x-t")
  spread = np.ptp(states[0])
  low, high = (np.min(states[0]), np.max(states[0])) if spread > 2 else (0, 1)
  want = (np.asarray(states[0]) - low) / (high - low)
  np.testing.assert_array_equal(first, levels(want))
  assert page.run('return document.getElementById("time").textContent') == "1.00"
  page.type("#frame", "\ue014" * FRAMES)  # the right arrow key
  page.until('return document.getElementById("time").textContent === "0.00"')
  np.testing.assert_array_equal(pixels(page, "#x-t"), levels(states[FRAMES]))
  np.testing.assert_array_equal(
    pixels(page, "#x-t"), pixels(page, "#grid button:nth-child(2) canvas")
  )
  assert np.abs(pixels(page, "#x-t") - first).max() > 50


def picture(path):
  """A wide picture, white in the left half of its middle square."""
  image = np.zeros((160, 320), np.uint8)
  image[:, 80:160] = 255
  Image.fromarray(image).save(path)
  return path


def set_level(page, t):
  page.run(
    'const e = document.getElementById("level"); e.value = arguments[0];'
    'e.dispatchEvent(new Event("input"))',
    t,
  )


def test_a_file_is_corrupted_and_restored(page, client, tmp_path):
  assert page.run('return document.getElementById("corrupt").disabled')
  page.type("#file", str(picture(tmp_path / "half.png")))
  page.until('return document.querySelector("#original canvas, canvas#original")')
  original = pixels(page, "#original")
  half = np.zeros((SIDE, SIDE))
  half[:, : SIDE // 2] = 255
  assert np.abs(original - half).mean() < 8  # the browser's shrinking may soften one edge
  set_level(page, "0.8")
  shown = page.run('return document.getElementById("level-text").textContent')
  assert shown == "0.80 (level 3.40, noise 0.10)"
  page.click("#corrupt")
  page.until('return document.getElementById("corrupted")')
  page.until(IDLE)
  corrupted = pixels(page, "#corrupted")
  image = (original / 255.0)[..., None]
  _, answer = client.predict(
    {
      "signature_name": "corrupt",
      "inputs": {"x_0": [image.tolist()], "t": [0.8], "seed": 0},
    }
  )
  # Grey is made of red, green and blue in the page, which costs a rounding.
  assert np.abs(corrupted - levels(answer["outputs"][0])).max() <= 1
  page.click("#restore")
  page.until('return document.querySelectorAll("#restored canvas").length === 8')
  page.until(IDLE)
  captions = page.run(
    'return [...document.querySelectorAll("#restored figcaption")].map((c) => c.textContent)'
  )
  assert captions[:3] == ["half.png", "Corrupted, t = 0.80", "Restored, sample 1"]
  assert captions[-1].startswith("Uncertainty, at most 0.")
  before, after = (np.abs(pixels(page, s) - original).mean() for s in ("#corrupted", "#mean"))
  assert after < before / 2
  assert pixels(page, "#std").max() == 255
  assert (pixels(page, "#restored-0") != pixels(page, "#restored-1")).any()
  if os.environ.get("PAGE_SCREENSHOT"):
    with open(os.environ["PAGE_SCREENSHOT"], "wb") as file:
      file.write(page.screenshot())


DROP = """
  const bytes = Uint8Array.from(arguments[2]);
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], arguments[1], { type: arguments[3] }));
  document.querySelector(arguments[0]).dispatchEvent(
    new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
"""


def test_an_image_can_be_dropped_and_what_is_none_is_refused(page, tmp_path):
  content = picture(tmp_path / "a.png").read_bytes()
  page.run(DROP, "#drop", "dropped.png", list(content), "image/png")
  page.until('return document.getElementById("original")')
  assert pixels(page, "#original").std() > 50
  for name, kind, message in (
    ("notes.txt", "text/plain", "notes.txt is not an image."),
    ("torn.png", "image/png", "torn.png cannot be read as an image."),
  ):
    page.run(DROP, "#drop", name, list(b"no picture"), kind)
    page.until('return document.getElementById("status").textContent === arguments[0]', message)
    assert page.run('return document.getElementById("original").ariaLabel') == "dropped.png"
  page.run(DROP, "footer", "beside.png", list(content), "image/png")  # nothing happens
  assert page.run("return location.pathname") == "/"


def test_what_the_server_refuses_is_shown(page, client, model, monkeypatch):
  monkeypatch.setattr(client.batcher, "max_rows", 2)
  page.type("#count", "3", clear=True)
  page.click("#draw")
  page.until('return document.getElementById("status").textContent.startsWith("3 results of one")')
  assert not page.run('return document.getElementById("draw").disabled')
  assert all("400" in x["message"] for x in page.logs())  # Chromium notes every 4xx


def test_bounds_of_the_fields_hold(page):
  page.type("#count", "1000", clear=True)
  page.click("#draw")
  assert page.run('return document.querySelectorAll("#grid canvas").length') == 0
  assert not page.run('return document.getElementById("count").checkValidity()')


def test_it_can_be_used_without_eyes_mouse_or_internet(page, client):
  unnamed = page.run("""
    const named = (e) => e.labels?.length || e.ariaLabel || e.textContent.trim();
    return [...document.querySelectorAll("input, select, button, canvas")]
      .filter((e) => !named(e) && !e.closest("button")).map((e) => e.outerHTML);
  """)
  assert unnamed == []
  assert page.run('return document.querySelectorAll("h1").length') == 1
  assert page.run("return document.documentElement.lang") == "en"
  assert page.run('return document.getElementById("status").ariaLive') == "polite"
  loaded = page.run('return performance.getEntriesByType("resource").map((e) => e.name)')
  assert loaded
  assert all(name.startswith(f"http://127.0.0.1:{client.port}/") for name in loaded)
  # The smallest contrast that readers with weak eyes are promised (WCAG 2.1 AA) is 4.5.
  assert page.run(CONTRAST) >= 4.5


CONTRAST = """
  const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const light = (c) => rgb(c).reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (e) => {
    while (e && getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
    return getComputedStyle(e || document.body).backgroundColor;
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const texts = [...document.querySelectorAll("h1, h2, p, label, a, button:enabled, figcaption")];
  return Math.min(...texts.filter((e) => e.textContent.trim() && e.offsetParent).map(ratio));
"""


def test_a_narrow_window_does_not_scroll_sideways(page):
  page._ask("POST", "/window/rect", {"width": 500, "height": 900})
  draw(page, 4, 0)
  assert page.run("return document.documentElement.scrollWidth <= innerWidth")
  page._ask("POST", "/window/rect", {"width": 1000, "height": 1400})
