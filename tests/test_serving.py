"""Codec, batching and HTTP over a small SavedModel: answers, bounded waiting, hostile input."""

import base64
import concurrent.futures
import json
import socket
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import serving
from soft_diffusion_tf.serving import app as app_module
from soft_diffusion_tf.serving import codec
from tests.standin import SIDE, StandIn, served

pytest.importorskip("uvicorn", reason="serving needs uvicorn (the extra `serve`)")

SAMPLE = {"signature_name": "sample_momentum_4", "inputs": {"num": 3, "seed": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("standin") / "model"
  StandIn().export(path)
  return path


@pytest.fixture(scope="module")
def model(folder):
  return serving.Model(folder)


@pytest.fixture(scope="module")
def client(model):
  with served(model, max_body=1 << 20) as client:
    yield client


@pytest.fixture
def images(rng):
  return rng.uniform(0, 1, (6, SIDE, SIDE, 1)).astype(np.float32)


class Gate:
  """A signature that waits for `open` before it answers, and tells how it was called."""

  def __init__(self, signature):
    self.__dict__.update(vars(signature))
    self.signature, self.open, self.entered = signature, threading.Event(), threading.Event()
    self.calls = []

  def __call__(self, inputs):
    self.calls.append({k: np.copy(v) for k, v in inputs.items()})
    self.entered.set()
    assert self.open.wait(30)
    return self.signature(inputs)


@pytest.fixture
def gate(model, monkeypatch):
  gate = Gate(model.signatures["denoise"])
  monkeypatch.setitem(model.signatures, "denoise", gate)
  yield gate
  gate.open.set()


def rows_of(images, times):
  return [{"x_t": x.tolist(), "t": float(t)} for x, t in zip(images, times)]


def denoise(images, times):
  return {"signature_name": "denoise", "instances": rows_of(images, times)}


# What TensorFlow Serving's users know.


def test_columns_are_answered_bit_equal_to_a_direct_call(client, folder):
  direct = tf.saved_model.load(str(folder)).signatures["sample_momentum_4"]
  want = direct(num=tf.constant(3), seed=tf.constant(5, tf.int64))
  status, answer = client.predict(SAMPLE)
  assert status == 200
  assert list(answer) == ["outputs"]
  got = np.asarray(answer["outputs"]["images"], np.float32)
  np.testing.assert_array_equal(got, want["images"].numpy())
  np.testing.assert_array_equal(answer["outputs"]["uint8"], want["uint8"].numpy())
  assert got.std() > 0.1


def test_rows_and_columns_agree(client, images):
  times = [0.2, 0.4, 0.9]
  status, by_rows = client.predict(denoise(images[:3], times))
  assert status == 200
  columns = {"x_t": images[:3].tolist(), "t": times}
  _, by_columns = client.predict({"signature_name": "denoise", "inputs": columns})
  assert by_rows["predictions"] == by_columns["outputs"]  # a single output goes without its name
  want = StandIn().denoise(images[:3], tf.constant(times))["x0_hat"].numpy()
  # The stand-in made anew runs eagerly; convolutions may add up in another order.
  np.testing.assert_allclose(by_rows["predictions"], want, atol=1e-6)


def test_a_single_input_goes_without_its_name_and_bytes_as_base64(client):
  raw = bytes([0, 255, 128])
  given = ["text", {"b64": base64.b64encode(raw).decode()}]
  for body in ({"instances": given}, {"inputs": given}, {"inputs": {"text": given}}):
    status, answer = client.predict({"signature_name": "echo", **body})
    assert status == 200, answer
    (values,) = answer.values()
    assert [base64.b64decode(v["b64"]) for v in values] == [b"text", raw]


def test_the_default_signature(client):
  _, named = client.predict(SAMPLE)
  _, default = client.predict({"inputs": SAMPLE["inputs"]})
  assert named == default


def test_status_metadata_and_versions(client, model):
  state = {
    "version": "1",
    "state": "AVAILABLE",
    "status": {"error_code": "OK", "error_message": ""},
  }
  assert client.get("/v1/models/model") == (200, {"model_version_status": [state]})
  assert client.get("/v1/models/model/versions/1")[0] == 200
  assert client.get("/v1/models/model/versions/2")[0] == 404
  status, answer = client.get("/v1/models/model/metadata")
  assert status == 200
  assert answer["model_spec"]["name"] == "model"
  signatures = answer["metadata"]["signature_def"]["signature_def"]
  assert set(signatures) == set(model.signatures)
  x_t = signatures["denoise"]["inputs"]["x_t"]
  assert x_t["dtype"] == "DT_FLOAT"
  assert [d["size"] for d in x_t["tensor_shape"]["dim"]] == ["-1", "8", "8", "1"]
  assert signatures["denoise"]["method_name"] == "tensorflow/serving/predict"


def test_the_highest_of_numbered_versions_is_served(folder, tmp_path):
  for version in ("9", "10"):
    (tmp_path / version).symlink_to(folder)
  assert serving.Model(tmp_path).version == "10"


def test_what_is_no_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no SavedModel .*give the folder of an export"):
    serving.Model(tmp_path)
  (tmp_path / "saved_model.pb").write_bytes(b"not a protocol buffer")
  with pytest.raises(ValueError, match="cannot be loaded"):
    serving.Model(tmp_path)
  with pytest.raises(ValueError, match="--name=a/b"):
    serving.Model(tmp_path, "a/b")


def test_without_uvicorn_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  with pytest.raises(ValueError, match=r"pip install 'soft-diffusion-tf\[serve\]'"):
    serving.make_server(None)


def test_health_and_metrics_count(client):
  assert client.get("/healthz") == (200, {"status": "ok"})
  name = 'soft_diffusion_requests_total{code="200",signature="sample_momentum_4"}'

  def value():
    lines = client.raw("GET", "/metrics")[2].decode().splitlines()
    return next((float(x.split()[-1]) for x in lines if x.startswith(name)), 0.0), lines

  before, _ = value()
  client.predict(SAMPLE)
  after, lines = value()
  assert after == before + 1
  buckets = [x for x in lines if "request_seconds_bucket" in x and 'sample_momentum_4"' in x]
  counts = [float(x.split()[-1]) for x in buckets]
  assert counts == sorted(counts)
  assert counts[-1] >= after


# Batching.


def test_what_waits_shares_the_next_call(model, gate, images):
  with served(model) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    first = pool.submit(client.predict, denoise(images[:1], [0.5]))
    assert gate.entered.wait(10)
    others = [
      pool.submit(client.predict, denoise(images[k : k + 1], [0.1 * k])) for k in range(1, 5)
    ]
    wait_until(lambda: client.batcher.waiting == 4)
    gate.open.set()
    answers = [f.result(30) for f in (first, *others)]
    assert [len(call["t"]) for call in gate.calls] == [1, 4]
    for k, (status, answer) in enumerate(answers):
      assert status == 200
      t = 0.1 * k if k else 0.5
      want = StandIn().denoise(images[k : k + 1], tf.constant([t]))["x0_hat"]
      np.testing.assert_allclose(answer["predictions"], want, atol=1e-6)  # everyone its own


def test_a_call_takes_no_more_rows_than_allowed_and_no_other_signature(model, gate, images):
  with served(model, max_rows=4) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    ask = lambda body: pool.submit(client.predict, body)
    futures = [ask(denoise(images[:1], [0.5]))]
    assert gate.entered.wait(10)
    for count, body in enumerate(
      (denoise(images[:3], [0.5] * 3), SAMPLE, denoise(images[:2], [0.5] * 2)), 1
    ):
      futures.append(ask(body))
      wait_until(lambda n=count: client.batcher.waiting == n)
    gate.open.set()
    assert [f.result(30)[0] for f in futures] == [200] * 4
    assert [len(call["t"]) for call in gate.calls] == [1, 3, 2]


def test_padded_batches_give_the_same_bits_in_any_company(model, images):
  batcher = serving.Batcher(max_rows=8, fixed=True)
  signature = model.signatures["denoise"]
  request = lambda k, n: serving.Request(
    signature, {"x_t": images[k : k + n], "t": np.full(n, 0.3, np.float32)}, n, True
  )
  alone = batcher.submit(request(0, 1)).result(30)["x0_hat"]
  answers = batcher._call([request(3, 2), request(0, 1), request(1, 4)])
  batcher.close()
  assert [len(a["x0_hat"]) for a in answers] == [2, 1, 4]
  np.testing.assert_array_equal(answers[1]["x0_hat"], alone)


def test_one_bad_row_does_not_spoil_its_company(images):
  class Fussy:
    name, row_wise = "fussy", True

    def __call__(self, inputs):
      if (inputs["x"] < 0).any():
        raise tf.errors.InvalidArgumentError(None, None, "negative")
      return {"y": inputs["x"] + 1}

  fussy, hold = Fussy(), threading.Event()
  batcher = serving.Batcher()
  block = lambda: None
  block.name, block.row_wise = "block", False
  blocker = type(
    "Block", (), {"name": "b", "row_wise": False, "__call__": lambda self, x: hold.wait(10) and {}}
  )()
  blocked = batcher.submit(serving.Request(blocker, {}, None, False))
  futures = [
    batcher.submit(serving.Request(fussy, {"x": np.array([v])}, 1, True)) for v in (1, -1, 2)
  ]
  hold.set()
  assert blocked.result(10) == {}
  assert futures[0].result(10)["y"] == [2]
  assert futures[2].result(10)["y"] == [3]
  with pytest.raises(tf.errors.InvalidArgumentError):
    futures[1].result(10)
  batcher.close()


def test_samples_of_several_clients_share_a_call_and_keep_their_bits(model, images, monkeypatch):
  gate = Gate(model.signatures["draw_momentum_4"])
  monkeypatch.setitem(model.signatures, "draw_momentum_4", gate)
  with served(model) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    ask = lambda num, seed: {
      "signature_name": "sample_momentum_4",
      "inputs": {"num": num, "seed": seed},
    }
    first = pool.submit(client.predict, ask(1, 0))
    assert gate.entered.wait(10)
    others = {(n, s): pool.submit(client.predict, ask(n, s)) for n, s in ((2, 7), (3, 90), (1, 2))}
    wait_until(lambda: client.batcher.waiting == 3)
    gate.open.set()
    assert first.result(30)[0] == 200
    answers = {key: f.result(30) for key, f in others.items()}
    assert [len(call["seeds"]) for call in gate.calls] == [1, 6]
    for (num, seed), (status, answer) in answers.items():
      assert status == 200
      want = model.signatures["sample_momentum_4"]({"num": num, "seed": seed})
      np.testing.assert_array_equal(np.float32(answer["outputs"]["images"]), want["images"])
    metrics = client.raw("GET", "/metrics")[2].decode()
    assert 'requests_total{code="200",signature="sample_momentum_4"} 4' in metrics


def test_one_time_for_many_images(client, images):
  one = {"x_t": images.tolist(), "t": [0.5]}
  status, answer = client.predict({"signature_name": "denoise", "inputs": one})
  _, many = client.predict({"signature_name": "denoise", "inputs": {**one, "t": [0.5] * 6}})
  assert status == 200
  np.testing.assert_allclose(answer["outputs"], many["outputs"], atol=1e-6)


def test_what_only_looked_row_wise_is_called_alone(folder):
  model = serving.Model(folder)
  assert model.signatures["odd"].row_wise
  assert not model.signatures["process"].row_wise  # its times have a fixed length
  with served(model) as client:
    ask = lambda *x: client.predict({"signature_name": "odd", "inputs": x})
    assert ask(1, 2, 3, 4) == (200, {"outputs": {"half": [1.0, 2.0], "x": [1.0, 2.0, 3.0, 4.0]}})
    assert not model.signatures["odd"].row_wise
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      answers = list(pool.map(lambda k: ask(k, k + 1), range(4)))
    assert [a[1]["outputs"]["half"] for a in answers] == [[0.0], [1.0], [2.0], [3.0]]


def test_an_answer_has_a_size_limit(client, monkeypatch):
  monkeypatch.setattr(codec, "MOST_VALUES", 100)
  status, answer = client.predict(SAMPLE)
  assert (status, answer["error"]) == (400, "the answer has 384 numbers; ask for at most 100")


def test_files_of_the_export(client):
  assert client.get("/manifest.json")[1]["default_sampler"] == "momentum_4"
  assert client.raw("GET", "/README.md")[2] == b"# A stand-in\n"


# Bounds.


def wait_until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not come to pass"
    time.sleep(0.005)


def test_a_full_queue_says_when_to_come_back(model, gate, images):
  with served(model, limit=2) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    body = json.dumps(denoise(images[:1], [0.5])).encode()
    futures = [pool.submit(client.predict, body)]
    assert gate.entered.wait(10)
    futures += [pool.submit(client.predict, body) for _ in range(2)]
    wait_until(lambda: client.batcher.waiting == 2)
    status, headers, answer = client.raw("POST", "/v1/models/model:predict", body)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert "2 requests are waiting" in json.loads(answer)["error"]
    assert client.get("/healthz")[0] == 200  # it is alive all the while
    gate.open.set()
    assert [f.result(30)[0] for f in futures] == [200] * 3
    assert client.predict(body)[0] == 200


def test_who_waits_too_long_is_told_and_leaves_the_queue(model, gate, images):
  with served(model, timeout=0.3) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    body = denoise(images[:1], [0.5])
    answers = list(pool.map(client.predict, [body] * 3))
    assert [a[0] for a in answers] == [504] * 3
    assert "no answer within 0.3 s" in answers[0][1]["error"]
    assert client.batcher.waiting == 0
    gate.open.set()
    assert client.predict(body)[0] == 200
    assert len(gate.calls) == 2  # nobody computed for those who had left


def test_who_hangs_up_is_not_computed_for(model, gate, images):
  with served(model) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    body = json.dumps(denoise(images[:1], [0.5])).encode()
    first = pool.submit(client.predict, body)
    assert gate.entered.wait(10)
    leaver = socket.create_connection(("127.0.0.1", client.port))
    leaver.sendall(head(len(body)) + body)
    wait_until(lambda: client.batcher.waiting == 1)
    leaver.close()
    wait_until(lambda: client.batcher.waiting == 0)
    gate.open.set()
    assert first.result(30)[0] == 200
    assert client.predict(body)[0] == 200
    assert len(gate.calls) == 2


def test_a_stop_answers_what_was_taken(model, gate, images):
  with served(model) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
    body = denoise(images[:1], [0.5])
    futures = [pool.submit(client.predict, body)]
    assert gate.entered.wait(10)
    futures += [pool.submit(client.predict, body) for _ in range(3)]
    wait_until(lambda: client.batcher.waiting == 3)
    client.server.should_exit = True
    wait_until(lambda: refuses(client.port))
    gate.open.set()
    assert [f.result(30)[0] for f in futures] == [200] * 4


def refuses(port):
  try:
    socket.create_connection(("127.0.0.1", port), 1).close()
  except OSError:
    return True
  return False


def head(length, extra=b""):
  return b"POST /v1/models/model:predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%s\r\n" % (
    length,
    extra,
  )


# Hostile requests: 4xx with one line, and the next good answer has the same bits.

X = [[[0.0]] * SIDE] * SIDE
ONE = {"x_t": X, "t": 0.5}

BAD = {
  "no json": (b"{", "not JSON"),
  "empty": (b"", "not JSON"),
  "not utf-8": (b"\xff\xfe{}", "not UTF-8"),
  "deep": (b"[" * 200_000, "nested too deeply"),
  "deep numbers": (
    b'{"signature_name":"denoise","inputs":{"t":%s,"x_t":1}}' % (b"[" * 200 + b"]" * 200),
    "",
  ),
  "a list": ([1], "must be a JSON object"),
  "both": ({"inputs": 1, "instances": [1]}, "either"),
  "neither": ({}, "either"),
  "unknown field": ({"inputs": {}, "signatur_name": "x"}, "signatur_name"),
  "unknown signature": ({"signature_name": "nope", "inputs": {}}, "draw, draw_momentum_4"),
  "signature of another type": ({"signature_name": {"a": 1}, "inputs": {}}, "no signature"),
  "NaN": (b'{"inputs": {"num": NaN, "seed": 1}}', "NaN is not JSON"),
  "Infinity": (b'{"inputs": {"num": -Infinity, "seed": 1}}', "Infinity"),
  "number of a million digits": (b'{"inputs": {"num": %s, "seed": 1}}' % (b"9" * 500_000), ""),
  "huge num": ({"inputs": {"num": 10**9, "seed": 1}}, "1000000000 results of one request"),
  "num beyond int32": ({"inputs": {"num": 10**12, "seed": 1}}, "not 1000000000000"),
  "num beyond int64": ({"inputs": {"num": 10**30, "seed": 1}}, "numbers of that size"),
  "no num": ({"inputs": {"num": 0, "seed": 1}}, "num is 0"),
  "negative num": ({"inputs": {"num": -5, "seed": 1}}, "num is -5"),
  "num with a point": ({"inputs": {"num": 2.5, "seed": 1}}, "decimal point"),
  "num as text": ({"inputs": {"num": "3", "seed": 1}}, "not text"),
  "num as list": ({"inputs": {"num": [3], "seed": 1}}, "not of shape [1]"),
  "num null": ({"inputs": {"num": None, "seed": 1}}, "not null"),
  "num true": ({"inputs": {"num": True, "seed": 1}}, "true or false"),
  "missing input": ({"inputs": {"num": 3}}, 'lacks "seed"'),
  "extra input": ({"inputs": {"num": 3, "seed": 1, "steps": 9}}, 'unknown "steps"'),
  "refused by the model": ({"inputs": {"num": 3, "seed": 1 << 50}}, "seed is beyond"),
  "rows for a scalar": ({"instances": [{"num": 3, "seed": 1}]}, 'give "inputs" in place'),
  "no rows": ({"signature_name": "denoise", "instances": []}, "at least one row"),
  "rows of nothing": ({"signature_name": "denoise", "instances": 7}, "at least one row"),
  "bare rows": ({"signature_name": "denoise", "instances": [1, 2]}, "row 0 must be an object"),
  "too many rows": ({"signature_name": "denoise", "instances": [ONE] * 9}, "at most 8"),
  "too many rows in columns": (
    {"signature_name": "denoise", "inputs": {"x_t": [X] * 9, "t": [0.5] * 9}},
    "at most 8",
  ),
  "uneven columns": (
    {"signature_name": "denoise", "inputs": {"x_t": [X] * 3, "t": [0.5] * 2}},
    "number of rows",
  ),
  "rows times samples": (
    {"signature_name": "restore_map", "inputs": {"y": [X] * 3, "t": 0.5, "seed": 1, "num": 4}},
    "12 results of one request",
  ),
  "seed at the end of int64": ({"inputs": {"num": 3, "seed": 2**63 - 2}}, "too large for 3"),
  "rows of what has none": ({"signature_name": "odd", "instances": [1.0, 2.0]}, "not work by rows"),
  "ragged": ({"signature_name": "denoise", "instances": [{**ONE, "x_t": [[0], [0, 1]]}]}, "ragged"),
  "wrong shape": ({"signature_name": "denoise", "instances": [{**ONE, "x_t": [1.0]}]}, "of shape"),
  "image of text": ({"signature_name": "denoise", "instances": [{**ONE, "x_t": "abc"}]}, "text"),
  "image of objects": ({"signature_name": "denoise", "instances": [{**ONE, "x_t": {}}]}, "object"),
  "empty image": ({"signature_name": "denoise", "instances": [{**ONE, "x_t": []}]}, "empty"),
  "float overflow": (
    b'{"signature_name":"denoise","instances":[{"x_t":%s,"t":1e999}]}' % json.dumps(X).encode(),
    "infinite",
  ),
  "float32 overflow": (
    {"signature_name": "denoise", "instances": [{**ONE, "t": 1e39}]},
    "infinite or too large",
  ),
  "not finite out": ({"signature_name": "score", "instances": [{**ONE, "t": 0}]}, "not finite"),
  "bad base64": ({"signature_name": "echo", "instances": [{"b64": "?"}]}, "base64"),
  "number for text": ({"signature_name": "echo", "instances": [5]}, "strings"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_by_one_line(client, case):
  body, message = BAD[case]
  status, answer = client.predict(body)
  assert status == 400, answer
  assert list(answer) == ["error"]
  assert message in answer["error"]
  assert "\n" not in answer["error"]
  assert len(answer["error"]) < 400


def test_bad_requests_leave_the_bits_of_good_ones_alone(client):
  status, before = client.predict(SAMPLE)
  assert status == 200
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    hostile = [pool.submit(client.predict, body) for body, _ in BAD.values()]
    between = [pool.submit(client.predict, SAMPLE) for _ in range(4)]
    assert {f.result(30)[0] for f in hostile} <= {400, 429}
    assert all(f.result(30)[1] == before for f in between if f.result()[0] != 429)
  assert client.predict(SAMPLE) == (200, before)
  assert client.app._held == 0


@pytest.mark.parametrize(
  ("method", "path", "status"),
  [
    ("GET", "/v1/models/other", 404),
    ("POST", "/v1/models/other:predict", 404),
    ("POST", "/v1/models/model/versions/7:predict", 404),
    ("POST", "/v1/models/model:regress", 400),
    ("GET", "/v1/models/model:predict", 405),
    ("POST", "/healthz", 405),
    ("DELETE", "/", 405),
    ("GET", "/../setup.py", 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ("GET", "/page/%00", 404),
    ("BREW", "/metrics", 405),
  ],
)
def test_paths_and_methods(client, method, path, status):
  got, _, body = client.raw(method, path)
  assert got == status
  assert "error" in json.loads(body)


def test_a_large_body_is_refused_before_and_while_it_comes(client):
  body = b'{"inputs": "' + b"x" * (2 << 20) + b'"}'
  assert client.raw("POST", "/v1/models/model:predict", body)[0] == 413
  chunks = iter([body[:100_000]] * 20)
  assert client.raw("POST", "/v1/models/model:predict", chunks)[0] == 413
  for lie in (b"-1", b"9" * 30, b"abc"):
    with socket.create_connection(("127.0.0.1", client.port), 10) as s:
      s.sendall(
        b"POST /v1/models/model:predict HTTP/1.1\r\nhost: x\r\ncontent-length: %s\r\n\r\n" % lie
      )
      assert s.recv(100).split()[1] in (b"400", b"413")
  assert client.predict(SAMPLE)[0] == 200


def test_compressed_bodies_and_foreign_pages_are_refused(client):
  path, body = "/v1/models/model:predict", json.dumps(SAMPLE).encode()
  assert client.raw("POST", path, body, {"content-encoding": "gzip"})[0] == 415
  for site, status in (
    ("cross-site", 403),
    ("same-site", 403),
    ("else", 403),
    ("same-origin", 200),
    ("none", 200),
  ):
    assert client.raw("POST", path, body, {"sec-fetch-site": site})[0] == status
    assert client.raw("GET", "/v1/models", None, {"sec-fetch-site": site})[0] == status
  linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
  assert client.raw("GET", "/", None, linked)[0] == 200  # somebody followed a link to the page
  assert client.raw("POST", path, body, linked)[0] == 403
  # As a browser asks without TLS.
  own = f"127.0.0.1:{client.port}"
  assert client.raw("POST", path, body, {"origin": "http://elsewhere.org"})[0] == 403
  assert client.raw("POST", path, body, {"origin": "null"})[0] == 403
  assert client.raw("POST", path, body, {"origin": f"http://{own}", "host": own})[0] == 200


def test_only_hosts_that_are_served_are_answered(model):
  own = ["localhost:8501", "127.0.0.1:8501", "[::1]:8501", "example.org"]
  path, body = "/v1/models/model:predict", json.dumps(SAMPLE).encode()
  good = ("localhost:8501", "LOCALHOST:8501", "[::1]:8501", "example.org", "example.org:99")
  bad = (
    "evil.com",
    "evil.com:8501",
    "localhost",
    "localhost:85",
    "[::1]",
    "x",
    "127.0.0.1:8501.evil.com",
    "example.org.evil.com",
    "[::1",
    ":8501",
    "\xff",
  )
  numeric = ("10.1.2.3:8501", "10.1.2.3", "[fe80::1]:8501", "0x7f.1:8501")
  with served(model, hosts=own) as client:
    for host in good:
      assert client.raw("POST", path, body, {"host": host})[0] == 200, host
    for host in bad + numeric:
      for method, where in (
        ("POST", path),
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
      ):
        status, _, answer = client.raw(method, where, body, {"host": host})
        assert status == 403, host
        assert "--allow_host" in json.loads(answer)["error"]
  with served(model, hosts=own, addresses=True) as client:
    for host in numeric[:3]:
      assert client.raw("GET", "/healthz", None, {"host": host})[0] == 200, host
    for host in ("evil.com", numeric[3], "1.2.3.4.evil.com:8501"):
      assert client.raw("GET", "/healthz", None, {"host": host})[0] == 403, host


@pytest.mark.parametrize(
  ("text", "said"),
  [
    (
      "assertion failed: [t must lie in [0, 1], got] [1.5 2]\n\t [[{{node Assert}}]] [Op:x]",
      "t must lie in [0, 1], got 1.5 2",
    ),
    (
      "Graph execution error:\n\nassertion failed: [ask for [1, 2]] [Condition x < y did not hold "
      "element-wise:] [x (seeds:0) = ] [7]\n\t [[{{node a}}]]",
      "ask for [1, 2]",
    ),
    (
      "2 root error(s) found.\n  (0) INVALID_ARGUMENT: assertion failed: [no]\n\t [[{{node a}}]]\n"
      "  (1) INVALID_ARGUMENT: assertion failed: [no]\n0 successful operations.",
      "no",
    ),
    (
      "x_t holds NaN : Tensor had NaN values\n\t [[{{node a}}]]",
      "x_t holds NaN : Tensor had NaN values",
    ),
    ("", ""),
  ],
)
def test_the_cause_is_said_whole(text, said):
  assert app_module._cause(tf.errors.InvalidArgumentError(None, None, text)) == said


def test_a_seed_does_not_wrap(client):
  last = 2**63 - 1
  for inputs in (
    {"signature_name": "restore_map", "inputs": {"y": [X], "t": 0.5, "seed": last, "num": 2}},
    {"signature_name": "restore", "inputs": {"y": [X] * 2, "t": 0.5, "seed": last}},
    {"signature_name": "corrupt", "inputs": {"x_0": [X] * 2, "t": [0.5] * 2, "seed": last}},
  ):
    status, answer = client.predict(inputs)
    assert status == 400
    assert answer["error"] == f"seed {last} is too large for 2 images"
  one = {"signature_name": "restore", "inputs": {"y": [X], "t": 0.5, "seed": last}}
  assert client.predict(one)[0] == 200


def test_clients_that_stand_still_are_cut(model, rng):
  with served(model, slow_client=0.4, body_timeout=0.4) as client:
    half_head = socket.create_connection(("127.0.0.1", client.port), 10)
    half_head.sendall(head(10)[:30])
    silent = socket.create_connection(("127.0.0.1", client.port), 10)
    half_body = socket.create_connection(("127.0.0.1", client.port), 10)
    half_body.sendall(head(10) + b"{")
    answer = half_body.recv(4096)
    assert answer.split()[1] == b"408"
    assert client.predict(SAMPLE)[0] == 200
    for s in (half_head, silent):
      assert ended(s)
    wait_until(lambda: not client.server.server_state.connections)


def asking(client, body):
  """A socket that has sent a request and holds little of an answer."""
  one = socket.socket()
  one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
  one.connect(("127.0.0.1", client.port))
  one.sendall(head(len(body)) + body)
  return one


def test_who_does_not_read_is_cut(model):
  with served(model, slow_client=0.4, max_rows=256) as client:
    body = json.dumps({"inputs": {"num": 256, "seed": 1}}).encode()
    deaf = asking(client, body)
    wait_until(lambda: client.server.server_state.connections)
    wait_until(lambda: not client.server.server_state.connections)
    deaf.close()
    assert client.predict(SAMPLE)[0] == 200


def test_who_reads_slowly_gets_the_whole_answer(model):
  with served(model, slow_client=0.4, max_rows=256) as client:
    body = json.dumps({"inputs": {"num": 256, "seed": 1}}).encode()
    slow = asking(client, body)
    begin, answer = time.monotonic(), b""
    while b"]]]" not in answer[-20:]:
      part = slow.recv(16 << 10)
      assert part, f"cut after {len(answer)} bytes"
      answer += part
      time.sleep(0.02)
    assert time.monotonic() - begin > 4 * 0.4  # longer than any client may stand still
    slow.close()


def ended(s):
  try:
    return s.recv(4096) == b""
  except ConnectionError:
    return True


def test_garbage_on_the_wire(client):
  long_head = b"POST / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000
  for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", long_head):
    with socket.create_connection(("127.0.0.1", client.port), 10) as s:
      s.sendall(garbage + b"\r\n\r\n")
      try:
        answer = s.recv(4096)
      except ConnectionError:
        answer = b""
      assert not answer or answer.split()[1] in (b"400", b"405", b"431"), answer
  assert client.predict(SAMPLE)[0] == 200


def test_what_fails_in_the_server_says_so_and_no_more(client, model, monkeypatch):
  def broken(inputs):
    raise RuntimeError("secret path")

  gate = Gate(model.signatures["denoise"])
  monkeypatch.setattr(Gate, "__call__", lambda self, inputs: broken(inputs))
  monkeypatch.setitem(model.signatures, "denoise", gate)
  status, answer = client.predict({"signature_name": "denoise", "instances": [ONE]})
  assert (status, answer) == (500, {"error": "the server failed; its log says how"})
  assert client.predict(SAMPLE)[0] == 200


def test_too_many_connections(model, gate, images):
  with served(model, connections=4, slow_client=20) as client:
    body = {"signature_name": "denoise", "inputs": {"x_t": images.tolist(), "t": [0.5] * 6}}
    asked, there = [], client.server.server_state.connections
    for k in range(3):
      asked.append(asking(client, json.dumps(body).encode()))
      wait_until(lambda: len(client.batcher._waiting) + len(gate.calls) > k)  # noqa: B023
    assert len(there) == 3
    assert client.raw("GET", "/healthz")[0] == 503  # all are being answered: none makes room
    for s in asked:
      s.close()
    gate.open.set()
    wait_until(lambda: not client.server.server_state.connections)
    assert client.get("/healthz")[0] == 200


@pytest.mark.parametrize(
  "sent", [b"", b"GET / HT", head(100), head(100, b"Expect: 100-continue\r\n")]
)
def test_one_client_cannot_use_up_the_connections(model, sent):
  """It has more of them open than there are, and stands still; others are answered all the same."""
  with served(model, connections=8, slow_client=60) as client:
    held = []
    for _ in range(12):
      held.append(socket.create_connection(("127.0.0.1", client.port), 5))
      held[-1].sendall(sent)
    for own in ("127.0.0.1", "127.0.0.2"):  # from the same address, too
      with socket.create_connection(("127.0.0.1", client.port), 5, (own, 0)) as s:
        s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert s.recv(100).split()[1] == b"200"
    with socket.create_connection(("127.0.0.1", client.port), 5, ("127.0.0.2", 0)) as other:
      for _ in range(12):  # and who has few keeps them
        held.append(socket.create_connection(("127.0.0.1", client.port), 5))
      other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
      assert other.recv(100).split()[1] == b"200"
    for s in held:
      s.close()
