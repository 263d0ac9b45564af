"""Serves a SavedModel over HTTP, in TensorFlow Serving's REST contract, with a page to look at it.

soft-diffusion-serve --model=DIR

Then open http://127.0.0.1:8501/ or POST to /v1/models/model:predict. Metrics are at /metrics.
SIGTERM or Ctrl-C stops: what was asked is answered first.
"""

import ipaddress
import pathlib
import re
import signal
import socket

from absl import flags

from soft_diffusion_tf.bin import cli

_MODEL = cli.define_path(
  "model", None, "Folder of a SavedModel, or of numbered versions.", required=True
)
_NAME = flags.DEFINE_string("name", "model", "The model's name in URLs.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
_PORT = flags.DEFINE_integer("port", 8501, "Port; 0 takes a free one.", 0, 65535)
_MAX_BATCH = flags.DEFINE_integer(
  "max_batch", 64, "Rows of one call, and of one request.", 1, 1 << 20
)
_REPRODUCIBLE = flags.DEFINE_bool(
  "reproducible",
  False,
  "Pad every batch to --max_batch: an answer does not depend on the others; slower.",
)
_QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; more are answered 429.", 1)
_TIMEOUT = flags.DEFINE_float(
  "timeout", 60.0, "Seconds until a request is answered 504.", 0.001, 1e6
)
_SLOW = flags.DEFINE_float("slow_client", 10.0, "Seconds to stand still, or for a body.", 0.1, 1e6)
_MAX_BODY = flags.DEFINE_integer("max_body", 8 << 20, "Bytes of a request's body.", 1024)
_CONNECTIONS = flags.DEFINE_integer(
  "connections", 512, "Open connections; beyond, idle ones are cut, or new ones get 503.", 2
)
_ALLOW_HOST = flags.DEFINE_list(
  "allow_host", [], "More names NAME or NAME:PORT by which clients may ask for this server."
)
_WARM = flags.DEFINE_bool("warm", True, "Call every signature once before listening.")


def _bind(host, port):
  """A socket that does not listen yet: clients are refused until the model is there."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound
  except OSError as error:
    raise ValueError(
      f"cannot listen at {host} port {port} ({error.strerror or error}); "
      "give another --host or --port"
    ) from None


def _check_numbers():
  """Raises the ValueError of a number that no flag's lower bound stops: NaN, or far too large."""
  for flag, most in (
    (_TIMEOUT, 86_400),
    (_SLOW, 86_400),
    (_MAX_BATCH, 1 << 16),
    (_QUEUE, 1 << 20),
    (_MAX_BODY, 1 << 30),
    (_CONNECTIONS, 1 << 16),
  ):
    if not flag.value <= most:
      raise ValueError(f"--{flag.name}={flag.value}: give a number up to {most}")


def _hosts(bound_to, port):
  """What a request's Host may be, and whether it may be any IP address."""
  for name in _ALLOW_HOST.value:
    if not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?", name):
      raise ValueError(f"--allow_host={name}: give names such as example.org or example.org:8501")
  names = ["localhost", "127.0.0.1", "[::1]", f"[{bound_to}]" if ":" in bound_to else bound_to]
  local = _is_local(bound_to)
  if not local:
    names += [_HOST.value, socket.gethostname()]
  own = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
  return own | set(_ALLOW_HOST.value), not local


def _is_local(host):
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _check():
  _check_numbers()
  _hosts("", 0)
  if not _HOST.value.strip():
    raise ValueError("--host= is empty; give an address, such as 127.0.0.1")
  if not pathlib.Path(_MODEL.value).is_dir():
    raise ValueError(f"--model={_MODEL.value}: no such folder; give the folder of an export")


def main():
  from soft_diffusion_tf import serving

  serving.uvicorn_module()  # before a model is loaded and warmed, which may take minutes
  with _bind(_HOST.value, _PORT.value) as listening:
    host, port = listening.getsockname()[:2]
    hosts, addresses = _hosts(host, port)
    cli.say(f"loading {_MODEL.value}")
    model = serving.Model(_MODEL.value, _NAME.value)
    if _WARM.value:
      cli.say("warming up: every signature is called once")
      model.warm()
    batcher = serving.Batcher(_MAX_BATCH.value, _QUEUE.value, _REPRODUCIBLE.value)
    app = serving.App(
      model,
      batcher,
      timeout=_TIMEOUT.value,
      body_timeout=_SLOW.value,
      max_body=_MAX_BODY.value,
      hosts=hosts,
      addresses=addresses,
    )
    server = serving.make_server(
      app,
      connections=_CONNECTIONS.value,
      slow_client=_SLOW.value,
      grace=round(_TIMEOUT.value + _SLOW.value) + 1,
    )
    # uvicorn stops in good order at the first signal, and raises it again at the end.
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    listening.listen(512)  # from now on clients may come, as the lines below promise
    print(f"serving {', '.join(model.signatures)}", flush=True)
    if not _is_local(host):
      print(f"{host} is open to other machines: without TLS or passwords; put a proxy before it")
    address = f"[{host}]" if ":" in host else host
    print(
      f"at http://{address}:{port}/v1/models/{model.name} (page: http://{address}:{port}/)",
      flush=True,
    )
    server.run(sockets=[listening])
    batcher.close()
  print(f"stopped; {server.server_state.total_requests} requests were answered")


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
