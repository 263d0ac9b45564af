"""A headless Chromium by the W3C WebDriver protocol, with the standard library alone."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "the page's tests need chromium and chromedriver (Debian: chromium, chromium-driver)"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
  """One session of one browser."""

  def __init__(self, port, folder, width=1000, height=1400):
    self._port, self._session = port, ""
    arguments = [
      "--headless=new",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-dev-shm-usage",
      "--no-first-run",
      "--force-color-profile=srgb",
      f"--user-data-dir={folder}",
      f"--window-size={width},{height}",
      "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    capabilities = {
      "browserName": "chrome",
      "goog:loggingPrefs": {"browser": "ALL"},
      "goog:chromeOptions": {"args": arguments, "binary": CHROMIUM},
    }
    answer = self._ask("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
    self._session = "/" + answer["sessionId"]

  def _ask(self, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
    with contextlib.closing(connection):
      text = None if method != "POST" else json.dumps(body or {})
      connection.request(method, f"/session{self._session}{path}", text)
      value = json.loads(connection.getresponse().read())["value"]
    if isinstance(value, dict) and "error" in value:
      raise RuntimeError(f"{path}: {value['error']}: {value['message'].splitlines()[0]}")
    return value

  def go(self, url):
    self._ask("POST", "/url", {"url": url})

  def run(self, script, *args):
    """The value of a script's `return`."""
    return self._ask("POST", "/execute/sync", {"script": script, "args": args})

  def until(self, script, *args, seconds=60):
    """Waits for a script to return something true, and gives it."""
    end = time.monotonic() + seconds
    while not (value := self.run(script, *args)):
      assert time.monotonic() < end, f"not within {seconds} s: {script}; {self.logs()}"
      time.sleep(0.05)
    return value

  def _find(self, selector):
    found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
    return found[_ELEMENT]

  def click(self, selector):
    self._ask("POST", f"/element/{self._find(selector)}/click")

  def type(self, selector, text, clear=False):
    """Keys, or for a file field the path of a file."""
    element = self._find(selector)
    if clear:
      self._ask("POST", f"/element/{element}/clear")
    self._ask("POST", f"/element/{element}/value", {"text": text})

  def logs(self):
    """What the console said since the last call."""
    return self._ask("POST", "/se/log", {"type": "browser"})

  def screenshot(self):
    """The window as PNG bytes."""
    return base64.b64decode(self._ask("GET", "/screenshot"))

  def close(self):
    self._ask("DELETE", "")


@contextlib.contextmanager
def browser(folder, **size):
  """A Browser whose profile lives in a folder."""
  with socket.create_server(("127.0.0.1", 0)) as s:
    port = s.getsockname()[1]
  driver = subprocess.Popen(
    [DRIVER, f"--port={port}"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=os.environ | {"HOME": str(folder)},
  )
  try:
    end = time.monotonic() + 60
    while True:
      try:
        session = Browser(port, folder, **size)
        break
      except ConnectionError:
        assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.1)
    yield session
    session.close()
  finally:
    driver.terminate()
    driver.wait(30)
