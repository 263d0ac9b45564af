"""soft-diffusion-serve as a user starts it: addresses, signals, one line of error."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.standin import Client, StandIn

pytest.importorskip("uvicorn", reason="serving needs uvicorn (the extra `serve`)")

ROOT = pathlib.Path(__file__).parents[2]
SAMPLE = {"signature_name": "sample_momentum_4", "inputs": {"num": 3, "seed": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("standin") / "model"
  StandIn().export(path)
  return path


def start(*flags):
  return subprocess.Popen(
    [sys.executable, "-m", "soft_diffusion_tf.bin.serve", *map(str, flags)],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
  )


@contextlib.contextmanager
def running(*flags):
  """(process, client, printed lines) of a server that listens."""
  process = start("--port=0", *flags)
  try:
    lines = []
    while not lines or not lines[-1].startswith("at "):
      lines.append(process.stdout.readline())
      assert lines[-1], process.stderr.read()
    yield process, Client(int(re.search(r":(\d+)/v1", lines[-1])[1])), lines
  finally:
    process.kill()
    process.communicate()


def test_it_serves_on_this_machine_alone_until_it_is_stopped(folder):
  with running(f"--model={folder}", "--name=digits") as (process, client, lines):
    assert any("sample_momentum_4" in line for line in lines)
    assert re.search(r"at http://127\.0\.0\.1:\d+/v1/models/digits ", lines[-1])
    status, answer = client.predict(SAMPLE, "digits")
    assert status == 200
    assert len(answer["outputs"]["images"]) == 3
    assert b"<h1>Soft Diffusion</h1>" in client.raw("GET", "/")[2]
    for host, want in (
      ("elsewhere.org", 403),
      (f"localhost:{client.port}", 200),
      (f"elsewhere.org:{client.port}", 403),
    ):
      assert client.raw("GET", "/healthz", None, {"host": host})[0] == want
    listening = pathlib.Path("/proc/net/tcp")
    if listening.exists():  # Linux
      mine = [
        x.split()[1]
        for x in listening.read_text().splitlines()[1:]
        if x.split()[1].endswith(f":{client.port:04X}") and x.split()[3] == "0A"
      ]
      assert mine == [f"0100007F:{client.port:04X}"]
    # SIGTERM while requests are under way: all of them are answered.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      body = {"signature_name": "sample_momentum_4", "inputs": {"num": 64, "seed": 0}}
      futures = [pool.submit(client.predict, body, "digits") for _ in range(8)]
      while b"queue_requests 0" in client.raw("GET", "/metrics")[2] and not all(
        f.done() for f in futures
      ):
        pass
      process.send_signal(signal.SIGTERM)
      out, err = process.communicate(timeout=60)
      assert {f.result()[0] for f in futures} == {200}
    assert process.returncode == 0
    assert "stopped; " in out
    assert "Traceback" not in err


def test_names_that_are_allowed_are_served_and_foreign_ones_are_not(folder):
  flags = ("--host=0.0.0.0", "--allow_host=models.example.org,short:80", "--nowarm")
  with running(f"--model={folder}", *flags) as (_, client, _):
    port = client.port
    for host, want in (
      ("models.example.org", 200),
      (f"models.example.org:{port}", 200),
      ("short:80", 200),
      (f"127.0.0.1:{port}", 200),
      (f"10.1.2.3:{port}", 200),
      (f"{socket.gethostname()}:{port}", 200),
      ("short", 403),
      ("example.org", 403),
      (f"elsewhere.org:{port}", 403),
    ):
      assert client.raw("GET", "/healthz", None, {"host": host})[0] == want, host


@pytest.mark.parametrize(
  "flag", ["--timeout=nan", "--slow_client=inf", "--max_batch=1" + 20 * "0", "--allow_host=a b"]
)
def test_a_flag_that_no_server_can_follow(folder, flag):
  process = start(f"--model={folder}", "--port=0", flag)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2
  assert "Traceback" not in err
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  assert line.startswith(f"error: {flag.partition('=')[0]}=")


def test_a_port_in_use_ends_with_one_line(folder):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    process = start(f"--model={folder}", f"--port={port}")
    _, err = process.communicate(timeout=120)
  assert process.returncode == 2
  assert "Traceback" not in err
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  assert f"cannot listen at 127.0.0.1 port {port}" in line
  assert "give another --host or --port" in line
