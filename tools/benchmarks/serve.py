"""Load test of soft-diffusion-serve on 127.0.0.1, beside direct calls of the same SavedModel.

python tools/benchmark.py serve --model=DIR [--sampler=two_step_25] [--seconds=10]

Every client asks for one image after another, each over one connection. Then hostile clients join
in, and a good answer must keep its bits. Exit code 1 if it does not, or if there is any 5xx.
"""

import argparse
import collections
import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
PATH = "/v1/models/model:predict"


def _percentile(values, share):
  values = sorted(values)
  return values[min(len(values) - 1, int(share * len(values)))]


def _row(name, seconds, images, elapsed, note=""):
  p = [f"{1e3 * _percentile(seconds, q):9.0f}" for q in (0.5, 0.95, 0.99)]
  print(f"{name:34} {images / elapsed:9.1f} {' '.join(p)}  {note}", flush=True)


def _body(sampler, num, seed):
  inputs = {"num": num, "seed": seed}
  return json.dumps({"signature_name": f"sample_{sampler}", "inputs": inputs}).encode()


def direct(model, sampler, num, duration):
  """Calls of the SavedModel in this process, one after another."""
  import tensorflow as tf

  function = tf.saved_model.load(str(model)).signatures[f"sample_{sampler}"]
  call = lambda k: function(num=tf.constant(num), seed=tf.constant(k * num, tf.int64))
  call(0)["images"].numpy()
  seconds, begin = [], time.monotonic()
  while time.monotonic() - begin < duration:
    start = time.monotonic()
    call(len(seconds) + 1)["images"].numpy()
    seconds.append(time.monotonic() - start)
  _row(f"direct, {num} per call", seconds, num * len(seconds), time.monotonic() - begin)


def _post(connection, body):
  connection.request("POST", PATH, body)
  answer = connection.getresponse()
  return answer.status, answer.read()


def served(port, sampler, clients, duration, seeds, num=1, name=""):
  """`clients` threads ask until time is over; seeds(client, k) is the seed of its k-th request."""
  end = time.monotonic() + duration

  def client(index):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    seconds, codes = [], collections.Counter()
    while time.monotonic() < end:
      start = time.monotonic()
      status, _ = _post(connection, _body(sampler, num, seeds(index, len(seconds))))
      codes[status] += 1
      if status == 200:
        seconds.append(time.monotonic() - start)
      else:
        time.sleep(0.05)
    connection.close()
    return seconds, codes

  before, begin = _calls(port), time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    parts = list(pool.map(client, range(clients)))
  elapsed = time.monotonic() - begin
  seconds = [s for part, _ in parts for s in part]
  codes = sum((c for _, c in parts), collections.Counter())
  calls = max(_calls(port) - before, 1)
  others = {k: v for k, v in sorted(codes.items()) if k != 200}
  note = f"{num * len(seconds) / calls:.1f} images a call" + (f", {others}" if others else "")
  _row(name or f"served, clients: {clients}", seconds, num * len(seconds), elapsed, note)
  return codes


def _calls(port):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request("GET", "/metrics")
  text = connection.getresponse().read().decode()
  connection.close()
  return sum(float(x.split()[-1]) for x in text.splitlines() if "_model_calls_total{" in x)


def _hostile(port, sampler, end):
  """Bad requests of every kind until time is over: Counter of status codes."""
  name = f"sample_{sampler}"
  bodies = [
    b"{",
    b"",
    b"\xff",
    b"[" * 100_000,
    b'{"inputs":{"num":NaN,"seed":0}}',
    b"null",
    _body(sampler, 10**9, 0),
    _body(sampler, -1, 0),
    _body(sampler, 1, 2**70),
    _body("of_no_kind", 1, 0),
    json.dumps({"signature_name": name, "inputs": {"num": "1"}}).encode(),
    json.dumps({"signature_name": name, "instances": [{"num": 1, "seed": 1}]}).encode(),
    json.dumps({"signature_name": "denoise", "inputs": {"x_t": [[1]], "t": [1e300]}}).encode(),
    b'{"inputs":[' + b"1," * 500_000 + b"1]}",
    b" " * (9 << 20),
  ]
  codes, k = collections.Counter(), 0
  while time.monotonic() < end:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
      codes[_post(connection, bodies[k % len(bodies)])[0]] += 1
    except OSError:
      codes["cut"] += 1
    connection.close()
    k += 1
  return codes


def attack(port, sampler, clients, duration):
  """Good clients beside hostile and standing ones: (codes of the good, codes of the hostile)."""
  idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
  for k, connection in enumerate(idle):  # half a head, or half a body
    connection.sendall(
      b"POST "
      + PATH.encode()
      + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n"
      + (b"\r\n{" if k % 2 else b"a: ")
    )
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    end = time.monotonic() + duration
    enemies = [pool.submit(_hostile, port, sampler, end) for _ in range(4)]
    good = served(
      port,
      sampler,
      clients,
      duration,
      lambda c, k: c + clients * k,
      name=f"the same beside hostile clients: {clients}",
    )
    bad = sum((e.result() for e in enemies), collections.Counter())
  for connection in idle:
    connection.close()
  return good, bad


def main(argv=None):
  parser = argparse.ArgumentParser(prog="benchmark.py serve", description=__doc__.split("\n")[0])
  parser.add_argument("--model", required=True, help="folder of an exported SavedModel")
  parser.add_argument("--sampler", help="such as two_step_25; by default the export's own")
  parser.add_argument("--seconds", type=float, default=10, help="of every measurement")
  parser.add_argument("--clients", default="1,4,16,32")
  options = parser.parse_args(argv)
  manifest = json.loads(pathlib.Path(options.model, "assets.extra/manifest.json").read_text())
  sampler = options.sampler or manifest["default_sampler"]
  duration = options.seconds
  print(
    f"{sampler}, batches of {manifest['samplers'][sampler].get('batch_size')}; "
    f"load {os.getloadavg()[0]:.1f}"
  )
  print(f"{'':34} {'images/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
  for num in (1, 16):
    direct(options.model, sampler, num, duration)
  server = subprocess.Popen(
    [sys.executable, "-m", "soft_diffusion_tf.bin.serve", f"--model={options.model}", "--port=0"],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
  )
  try:
    while not (line := server.stdout.readline()).startswith("at "):
      if not line:
        return 1
    port = int(re.search(r":(\d+)/v1", line)[1])
    probe = lambda: _post(http.client.HTTPConnection("127.0.0.1", port), _body(sampler, 3, 11))
    before = probe()
    for clients in map(int, options.clients.split(",")):
      served(port, sampler, clients, duration, lambda c, k, n=clients: c + n * k)
    draw = random.Random(0)
    served(
      port,
      sampler,
      16,
      duration,
      lambda c, k: draw.randrange(2**40),
      name="served, clients: 16, random seeds",
    )
    served(
      port,
      sampler,
      4,
      duration,
      lambda c, k: 16 * (c + 4 * k),
      num=16,
      name="served, clients: 4, 16 per request",
    )
    good, bad = attack(port, sampler, 16, duration)
    served(
      port,
      sampler,
      200,
      duration,
      lambda c, k: c + 200 * k,
      name="more clients than the queue: 200",
    )
    after = probe()
    print(f"hostile requests: {dict(sorted(bad.items(), key=str))}")
    print(f"a good answer kept its bits: {before == after and before[0] == 200}")
    server.send_signal(signal.SIGTERM)
    print(f"{server.communicate(timeout=120)[0].strip()}; exit code {server.returncode}")
    failed = any(isinstance(k, int) and k >= 500 for k in (*good, *bad))
    return int(failed or before != after or server.returncode != 0)
  finally:
    server.kill()


if __name__ == "__main__":
  sys.exit(main())
