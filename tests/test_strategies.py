import concurrent.futures
import contextlib
import json
import socket
import time

import pytest

from soft_diffusion_tf.training.strategies import _meet, make_strategy


def test_strategies_by_name(monkeypatch):
  monkeypatch.delenv("TF_CONFIG", raising=False)
  assert make_strategy().num_replicas_in_sync == 1
  assert make_strategy("one_device").num_replicas_in_sync == 1
  with pytest.raises(ValueError, match="did you mean 'mirrored'"):
    make_strategy("miror")
  for text in (
    "",
    "{",
    '{"cluster": {}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}',  # TensorFlow takes no default type
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 3}}',
    '{"cluster": {"worker": ["a:1"], "chief": ["b:1"]}, "task": {"type": "chief", "index": 0}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}',
  ):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="is not a cluster of workers alone; give JSON"):
      make_strategy("multi_worker")
    assert make_strategy(alone=True).num_replicas_in_sync == 1
  with pytest.raises(ValueError, match="TPU 'none' cannot be used"):
    make_strategy("tpu", "none")


CLUSTER = '{"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": INDEX}}'


@pytest.mark.parametrize(
  ("workers", "index", "cause"),
  [
    ('["a:1", "b:1", "a:1"]', "0", "workers 0 and 2 have one address, a:1"),
    ('["127.0.0.1:77", "localhost:77"]', "1", "workers 0 and 1 have one address, localhost:77, wh"),
    ('["127.0.0.1:77", "127.0.0.9:77"]', "1", "workers 0 and 1 have one address"),
    ('["[::1]:77", "[0:0::1]:77"]', "0", "workers 0 and 1 have one address"),
    ('["a.b:1", "A.B:1"]', "0", "workers 0 and 1 have one address"),
    ('["127.0.0.1:65536"]', "0", "'127.0.0.1:65536' has no port from 1 to 65535"),
    ('["127.0.0.1:0"]', "0", "has no port"),
    ('["127.0.0.1:-1"]', "0", "has no port"),
    ('["127.0.0.1:8_0"]', "0", "has no port"),
    ('["127.0.0.1"]', "0", "has no port"),
    ('["127.0.0.1:"]', "0", "has no port"),
    ('["127.0.0.1:1e3"]', "0", "has no port"),
    ('[""]', "0", "has no port"),
    ('[":2222"]', "0", "has no host"),
    ('["http://a:2222"]', "0", "has no host"),
    ('["a b:2222"]', "0", "has no host"),
    ('["a..b:2222"]', "0", "has no host"),
    ('["a\\u0000:2222"]', "0", "has no host"),
    (f'["{"a" * 64}:2222"]', "0", "has no host"),
    ('["::1:2222"]', "0", "has no host"),
    ("[5]", "0", "is not a cluster of workers alone"),
    ("[null]", "0", "is not a cluster of workers alone"),
    ('{"0": "a:1"}', "0", "is not a cluster of workers alone"),
    ('"a:1"', "0", "is not a cluster of workers alone"),
    ("[]", "0", "is not a cluster of workers alone"),
    ('["a:1", "b:1"]', "true", "is not a cluster of workers alone"),
    ('["a:1", "b:1"]', "1.0", "is not a cluster of workers alone"),
    ('["a:1", "b:1"]', '"0"', "is not a cluster of workers alone"),
    ('["a:1", "b:1"]', "-1", "is not a cluster of workers alone"),
    ('["a:1", "b:1"]', "NaN", "is not a cluster of workers alone"),
    ("[" * 100_000, "0", "is not a cluster of workers alone"),
  ],
)
def test_a_tf_config_that_would_hang_or_crash_is_refused_at_once(
  monkeypatch, workers, index, cause
):
  monkeypatch.setenv("TF_CONFIG", CLUSTER.replace("WORKERS", workers).replace("INDEX", index))
  begin = time.monotonic()
  with pytest.raises(ValueError, match="TF_CONFIG") as error:
    make_strategy("multi_worker", peer_timeout=30)
  assert time.monotonic() - begin < 5  # names that nobody knows are looked up
  assert cause in str(error.value)
  assert len(str(error.value).splitlines()) == 1
  assert len(str(error.value)) < 700


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"cluster": [], "task": []}', "{}"])
def test_a_tf_config_of_another_shape(monkeypatch, text):
  monkeypatch.setenv("TF_CONFIG", text)
  with pytest.raises(ValueError, match="is not a cluster of workers alone"):
    make_strategy("multi_worker")


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_time_out_that_never_comes_is_refused(monkeypatch, seconds):
  _tf_config(monkeypatch, [9, 10], 0)
  with pytest.raises(ValueError, match=r"--peer_timeout=.*give a number of seconds"):
    make_strategy("multi_worker", peer_timeout=seconds)


def _tf_config(monkeypatch, ports, index):
  workers = [f"127.0.0.1:{p}" for p in ports]
  content = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(content))


def test_a_peer_that_does_not_come_up_is_named(monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
    ports = [s.getsockname()[1] for s in (one, two)]
    two.close()
    free = ports[1]
    _tf_config(monkeypatch, [free, ports[0], 9], 0)  # the second answers, the third does not
    with pytest.raises(ValueError, match=r"no answer from 127\.0\.0\.1:9 within 0\.5 s; start all"):
      make_strategy("multi_worker", peer_timeout=0.5)
    _tf_config(monkeypatch, [ports[0], 9], 0)
    with pytest.raises(ValueError, match=r"cannot listen at .*is the port free"):
      make_strategy("multi_worker", peer_timeout=0.5)


def test_workers_that_come_up_one_after_the_other_meet():
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
    workers = [f"127.0.0.1:{s.getsockname()[1]}" for s in servers]
  after = []  # what listens in TensorFlow's place once a worker has met the others

  def come(index):
    time.sleep(0.2 * index)
    _meet(workers, index, 20)
    after.append(socket.create_server(("127.0.0.1", int(workers[index].split(":")[1]))))

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    list(pool.map(come, range(3)))
  assert len(after) == 3
  for server in after:
    server.close()
