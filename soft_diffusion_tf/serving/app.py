"""The ASGI application and its server."""

import asyncio
import collections
import concurrent.futures
import importlib.resources
import ipaddress
import json
import logging
import math
import re
import socket
import time

import tensorflow as tf

from soft_diffusion_tf.serving.batcher import Gone, Metrics
from soft_diffusion_tf.serving.codec import decode, encode
from soft_diffusion_tf.serving.model import Refused, quote

_log = logging.getLogger(__name__)
_UNSENT = 128 << 10  # bytes of an answer that the kernel may hold back
_PAGE = {
  "/": ("index.html", "text/html; charset=utf-8"),
  "/page.css": ("page.css", "text/css; charset=utf-8"),
  "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = (
  (
    b"content-security-policy",
    b"default-src 'self'; img-src 'self' data: blob:; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
  ),
  (b"cache-control", b"no-cache"),
)


class App:
  """The ASGI application: TensorFlow Serving's REST paths, /healthz, /metrics and the page.

  Args:
    model, batcher: what answers.
    timeout: seconds from a request's last byte to its answer, after which it is given up (504).
    body_timeout: seconds that a client may take to send a body (408).
    max_body: bytes of a body (413).
    hosts: what a request's Host may be, "name:port" or "name" at any port; None: anything. A page
      of another site that has its name point here (DNS rebinding) is refused by it.
    addresses: whether an IP address at any port may be the Host too: no site has one as its name.
  """

  _BODIES = 16  # bodies of full size that may be held at once

  def __init__(
    self,
    model,
    batcher,
    *,
    timeout=60.0,
    body_timeout=10.0,
    max_body=8 << 20,
    hosts=None,
    addresses=False,
  ):
    self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
    self.addresses = addresses
    self.model, self.batcher, self.metrics = model, batcher, batcher.metrics
    self.timeout, self.body_timeout, self.max_body = timeout, body_timeout, max_body
    self._held = 0
    self._codec = concurrent.futures.ThreadPoolExecutor(1, "codec")  # JSON holds the GIL anyway
    folder = importlib.resources.files("soft_diffusion_tf.serving") / "page"
    self._page = {p: ((folder / f).read_bytes(), kind) for p, (f, kind) in _PAGE.items()}
    self._of_model = re.compile(
      r"/v1/models/([^/:]+)(?:/versions/([^/:]+))?(|/metadata|:[A-Za-z]+)"
    )

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return
    begin, what = time.monotonic(), {"signature": ""}
    headers, kind = (), "application/json"
    try:
      status, body, kind, headers = await self._respond(scope, receive, what)
    except Refused as refused:
      status, headers = refused.status, refused.headers
      body = json.dumps({"error": str(refused)}).encode()
    except Gone:
      status, body = 499, b""
    except asyncio.CancelledError:  # the server stops and waits no longer
      status, body = 503, b'{"error":"the server is stopping"}'
    except Exception:
      _log.exception("%s %s", scope["method"], scope["path"])
      status, body = 500, b'{"error":"the server failed; its log says how"}'
    self.metrics.count("requests_total", code=status, **what)
    if what["signature"]:
      self.metrics.observe("request_seconds", time.monotonic() - begin, Metrics.LATENCIES, **what)
    if status == 499:
      return
    await send(
      {
        "type": "http.response.start",
        "status": status,
        "headers": [
          (b"content-type", kind.encode()),
          (b"content-length", str(len(body)).encode()),
          (b"x-content-type-options", b"nosniff"),
          *headers,
        ],
      }
    )
    await send({"type": "http.response.body", "body": body})

  def _check_origin(self, scope):
    """Refuses what a page of another site asks for, by whatever name it found this server."""
    headers, method = dict(scope["headers"]), scope["method"]
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if self.hosts is not None and host and not self._serves(host):
      raise Refused(
        403,
        f"Host {quote(host)} is not served here; start the server with --allow_host=NAME if "
        "it should be",
      )
    site = headers.get(b"sec-fetch-site")
    if site is None and b"origin" in headers:  # as browsers ask where there is no TLS
      own = headers[b"origin"].rpartition(b"//")[2].lower() == host.encode("latin-1")
      site = b"same-origin" if own else b"cross-site"
    link = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"  # somebody clicked
    if site not in (None, b"same-origin", b"none") and not link:
      raise Refused(403, "a page of another site may not use this server")

  def _serves(self, host):
    name, colon, port = host.rpartition(":")
    if not (colon and port.isdecimal()):
      name = host
    if host in self.hosts or name in self.hosts:
      return True
    try:
      return self.addresses and bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
      return False

  async def _respond(self, scope, receive, what):
    path, method = scope["path"], scope["method"]
    self._check_origin(scope)
    if path in self._page:
      self._allow(method, "GET")
      return 200, *self._page[path], _PAGE_HEADERS
    if path == "/healthz":
      self._allow(method, "GET")
      good = self.batcher.alive
      return _json({"status": "ok" if good else "failed"}, 200 if good else 503)
    if path == "/metrics":
      self._allow(method, "GET")
      gauges = {
        "queue_requests": self.batcher.waiting,
        "queue_limit": self.batcher.limit,
        "body_bytes_held": self._held,
      }
      return 200, self.metrics.text(gauges).encode(), "text/plain; version=0.0.4", ()
    if path in self.model.files:
      self._allow(method, "GET")
      try:
        content = self.model.files[path].read_bytes()
      except OSError:
        raise Refused(404, f"this model has no {path[1:]}") from None
      return 200, content, ("application/json" if path.endswith("json") else _TEXT), ()
    if path == "/v1/models":
      self._allow(method, "GET")
      return _json({"models": [{"name": self.model.name, "version": self.model.version}]})
    match = self._of_model.fullmatch(path)
    if not match:
      raise Refused(404, f"nothing is at {quote(path)}")
    name, version, verb = match.groups()
    if name != self.model.name or version not in (None, self.model.version):
      raise Refused(
        404,
        f"no model {quote(name)}{f' of version {quote(version)}' if version else ''}; "
        f"this is {self.model.name}, version {self.model.version}",
      )
    if verb == ":predict":
      self._allow(method, "POST")
      return await self._predict(scope, receive, what)
    if verb.startswith(":"):
      raise Refused(400, f"no verb {quote(verb[1:])}; this server knows :predict")
    self._allow(method, "GET")
    return _json(self.model.metadata() if verb else self.model.status())

  def _allow(self, method, allowed):
    if method != allowed and (method, allowed) != ("HEAD", "GET"):
      raise Refused(405, f"this path takes {allowed}", [(b"allow", allowed.encode())])

  async def _predict(self, scope, receive, what):
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity") != b"identity":
      raise Refused(415, "send the body without a content-encoding")
    loop = asyncio.get_running_loop()
    body = await self._read(headers, receive)
    try:
      request = await loop.run_in_executor(
        self._codec, decode, self.model, body, self.batcher.max_rows
      )
    finally:
      self._held -= len(body)
    what["signature"] = request.name or request.signature.name
    outputs = await self._outputs(request, receive)
    return 200, await loop.run_in_executor(self._codec, encode, request, outputs), *_JSON

  async def _read(self, headers, receive):
    """The body of a request. The caller subtracts its length from _held."""
    too_large = Refused(413, f"the body is larger than {self.max_body} bytes")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18 or int(length) > self.max_body:
      raise too_large
    body, more = bytearray(), True
    try:
      async with asyncio.timeout(self.body_timeout):
        while more:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise Gone
          body += message["body"]
          self._held += len(message["body"])
          more = message.get("more_body", False)
          if len(body) > self.max_body:
            raise too_large
          if self._held > self._BODIES * self.max_body:
            raise Refused(429, "too many bodies at once; try again", [(b"retry-after", b"1")])
    except BaseException as error:
      self._held -= len(body)
      if isinstance(error, TimeoutError):
        raise Refused(
          408, f"the body took longer than {self.body_timeout:g} s", [(b"connection", b"close")]
        ) from None
      raise
    return bytes(body)

  async def _outputs(self, request, receive):
    """What the model answers; gives up, and leaves the queue, when time is over or nobody waits."""
    future = self.batcher.submit(request)
    answer = asyncio.wrap_future(future)
    left = asyncio.ensure_future(_until_gone(receive))
    try:
      await asyncio.wait({answer, left}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
      if answer.done():
        return answer.result()
      if left.done():
        raise Gone
      raise Refused(504, f"no answer within {self.timeout:g} s")
    except (
      tf.errors.InvalidArgumentError,
      tf.errors.OutOfRangeError,
      tf.errors.FailedPreconditionError,
    ) as error:
      raise Refused(400, f"the model refuses these inputs: {_cause(error)}") from None
    except tf.errors.ResourceExhaustedError:
      raise Refused(503, "out of memory; ask for less at once", [(b"retry-after", b"5")]) from None
    finally:
      left.cancel()
      future.cancel()  # at once; by way of `answer` it would wait for the loop's next turn
      answer.cancel()


def _cause(error):
  """What a check in the graph says, without TensorFlow's list of nodes."""
  _, found, text = " ".join(str(error.message).split()).partition("assertion failed: [")
  if found:
    # "[the message] [a value] [Condition …] …", each in brackets, and then nodes or further errors.
    text = re.split(r"\](?: \[\[| \(\d+\) | \d+ successful| Detected at|$)", text)[0]
    said, *more = text.split("] [")
    condition = next((k for k, part in enumerate(more) if part.startswith("Condition ")), len(more))
    return " ".join([said, *more[:condition]])[:200]
  lines = [x.strip() for x in str(error.message).splitlines()]
  lines = [
    x for x in lines if x and not x.startswith(("Graph execution", "Detected at", "[[", "("))
  ]
  return re.sub(r"\[\[.*$", "", lines[-1] if lines else "").strip()[:200]


async def _until_gone(receive):
  while (await receive())["type"] != "http.disconnect":
    pass


_JSON = ("application/json", ())
_TEXT = "text/plain; charset=utf-8"


def _json(content, status=200):
  return status, json.dumps(content).encode(), *_JSON


def _guarded(seconds):
  """uvicorn's protocol, which by itself waits for ever for a request's head and for a slow reader.

  A connection that has stood still for `seconds`, in the middle of a head or with bytes that the
  client does not fetch, is cut; so is one that goes on sending a body that was refused. Where there
  is no room, a connection that waits for its client is cut, of the client that has most of them: no
  client can keep the others out.
  """
  import h11
  from uvicorn.protocols.http.h11_impl import H11Protocol

  class Guarded(H11Protocol):
    _stuck = _timer = None

    def connection_made(self, transport):
      super().connection_made(transport)
      # A small buffer in the kernel, so that ours falls for a client that reads, if slowly.
      transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
      self._timer = self.loop.call_later(seconds, self._look)
      self._begin = self.loop.time()
      there = [c for c in self.connections if not c.transport.is_closing()]
      if self.limit_concurrency is not None and len(there) >= self.limit_concurrency:
        self._make_room(there)

    def _make_room(self, there):
      address = lambda c: c.client[0] if c.client else ""
      held = collections.Counter(map(address, there))
      waits = lambda c: c.cycle is None or c.cycle.response_complete
      idle = lambda c: waits(c) and not c.transport.get_write_buffer_size()
      free = [
        c for c in there if c is not self and (waits(c) or c.conn.their_state is h11.SEND_BODY)
      ]
      if free:
        max(free, key=lambda c: (held[address(c)], idle(c), -c._begin)).transport.abort()

    def connection_lost(self, exc):
      self._timer.cancel()
      super().connection_lost(exc)

    def _look(self):
      begun = self.cycle is None or bool(self.conn.trailing_data[0])
      head = self.conn.their_state is h11.IDLE and begun
      refused = self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete
      unsent = self.transport.get_write_buffer_size()
      stuck = (self.cycle, head, refused, unsent) if head or refused or unsent else None
      if stuck and stuck == self._stuck:
        self.transport.abort()
        return
      self._stuck = stuck
      self._timer = self.loop.call_later(seconds, self._look)

  return Guarded


def uvicorn_module():
  """uvicorn, which comes with an extra; a ValueError says how to install it."""
  try:
    import uvicorn
  except ImportError:
    raise ValueError(
      "serving needs uvicorn; install it by: pip install 'soft-diffusion-tf[serve]'"
    ) from None
  return uvicorn


def make_server(app, *, connections=512, slow_client=10.0, grace=None):
  """A uvicorn.Server, to be run with sockets=[…]. On SIGTERM it answers what it took, then ends.

  Args:
    app: an ASGI application.
    connections: above so many, those that wait for their client are cut, of the client that has
      most; where there are none of these, requests are answered 503.
    slow_client: seconds (up to twice that) after which a client that stands still is cut.
    grace: seconds that the stop may take; requests that are left then are answered 503.

  Raises:
    ValueError: uvicorn is missing.
  """
  uvicorn = uvicorn_module()
  return uvicorn.Server(
    uvicorn.Config(
      app,
      http=_guarded(slow_client),
      ws="none",
      loop="asyncio",
      lifespan="off",
      log_config=None,
      access_log=False,
      server_header=False,
      proxy_headers=False,
      limit_concurrency=connections,
      timeout_keep_alive=math.ceil(slow_client),
      timeout_graceful_shutdown=grace,
      h11_max_incomplete_event_size=16 << 10,
    )
  )
