"""Distribution strategies by name: where a program's replicas are."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time

import tensorflow as tf

from soft_diffusion_tf import parts

STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")


def make_strategy(
  name: str = "auto", tpu: str = "", peer_timeout: float = 300.0, alone: bool = False
) -> tf.distribute.Strategy:
  """A distribution strategy by name; call it before anything else touches a device.

  Args:
    name: "one_device"; "mirrored" (all GPUs of this machine, else its logical CPUs);
      "multi_worker" (this process is one of those that TF_CONFIG lists); "tpu"; "auto" is
      "multi_worker" where TF_CONFIG is set, "mirrored" where there are several GPUs, else
      "one_device".
    tpu: the TPU's name, or "local".
    peer_timeout: seconds to wait for the other workers to come up.
    alone: this process has no peers, so that "auto" does not look at TF_CONFIG.

  Raises:
    ValueError: an unknown name, a TF_CONFIG that is none, a worker that does not come up, or a TPU
      that cannot be had.
  """
  parts.check_choice("strategy =", name, STRATEGIES)
  if name == "auto":
    name = "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "one_device"
    if os.environ.get("TF_CONFIG") and not alone:
      name = "multi_worker"
  if name == "one_device":
    return tf.distribute.get_strategy()
  if name == "mirrored":
    gpus = tf.config.list_logical_devices("GPU")
    devices = [d.name for d in gpus or tf.config.list_logical_devices("CPU")]
    return tf.distribute.MirroredStrategy(devices)
  if name == "multi_worker":
    workers, index = _cluster(os.environ.get("TF_CONFIG", ""))
    if not 0 <= peer_timeout < math.inf:
      raise ValueError(f"--peer_timeout={peer_timeout:g}: give a number of seconds, such as 300")
    _meet(workers, index, peer_timeout)
    return tf.distribute.MultiWorkerMirroredStrategy()
  try:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
  except Exception as error:  # resolver, network and missing kernels each raise their own
    text = parts.first_line(error)
    raise ValueError(
      f"TPU {tpu!r} cannot be used ({text}); is its name right, and is tensorflow-tpu installed?"
    ) from None
  return tf.distribute.TPUStrategy(resolver)


def _cluster(text: str) -> tuple[list[str], int]:
  """The workers' addresses of a TF_CONFIG, all sound, and this one's place; or a ValueError."""
  brief = repr(text) if len(text) <= 300 else f"{text[:300]!r}…"
  try:
    content = json.loads(text)
    workers, task = content["cluster"]["worker"], content["task"]
    index = task["index"]
    assert content["cluster"].keys() == {"worker"}  # the first of them is the chief
    assert task["type"] == "worker"  # TensorFlow takes no default
    assert content.get("rpc_layer", "grpc") == "grpc"
    assert isinstance(workers, list)
    assert all(isinstance(worker, str) for worker in workers)
    assert type(index) is int
    assert 0 <= index < len(workers)
  except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
    raise ValueError(
      f"TF_CONFIG = {brief} is not a cluster of workers alone; give JSON such as "
      '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    ) from None
  places: dict[tuple[str, int], int] = {}
  for k, worker in enumerate(workers):
    for place in _places(worker):
      other = places.setdefault(place, k)
      if other != k:
        same = "" if worker == workers[other] else f", which is {workers[other]}"
        raise ValueError(
          f"TF_CONFIG: workers {other} and {k} have one address, {worker}{same}; give every worker "
          "a host or a port of its own"
        )
  return workers, index


def _places(worker: str) -> set[tuple[str, int]]:
  """What a worker's "host:port" stands for: its port at every IP address of its host."""
  host, _, text = worker.rpartition(":")
  number = re.fullmatch(r"[0-9]{1,5}", text)
  port = int(text) if number else 0
  if not 1 <= port <= 65535:
    raise ValueError(
      f"TF_CONFIG: worker {worker[:300]!r} has no port from 1 to 65535; give it as host:port"
    )
  if not re.fullmatch(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9A-Fa-f:.]+\]", host):
    raise ValueError(
      f"TF_CONFIG: worker {worker[:300]!r} has no host that is a name or an address; give it as "
      "host:port, or [address]:port for IPv6"
    )
  host = host.strip("[]").lower()
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError):  # not known here (yet): the meeting will tell
    return {(host, port)}
  # One machine has several addresses, and only one port of a number.
  return {("here" if _is_here(address[4]) else str(address[4][0]), port) for address in found}


def _is_here(address: tuple) -> bool:
  """Whether an IP address is one of this machine's."""
  family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
  try:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
      probe.bind((address[0], 0, *address[2:]))
  except OSError:
    return False
  return True


def replicas_by_host(strategy):
  """(H, R): how many processes feed a strategy's replicas, and how many replicas each."""
  hosts = 1
  if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
    hosts = strategy.cluster_resolver.cluster_spec().num_tasks("worker")
  elif isinstance(strategy, tf.distribute.TPUStrategy):
    hosts = strategy.extended.num_hosts
  return hosts, strategy.num_replicas_in_sync // hosts


def _meet(workers: list[str], index: int, seconds: float) -> None:
  """Returns when every other worker has been seen to listen at its port.

  TensorFlow's own wait has no end and cannot be interrupted, so this one comes first. A worker that
  has met all others starts TensorFlow's, which listens at the same port: workers that come later
  still find it.
  """

  def answers(peer: str) -> bool:
    host, _, port = peer.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, UnicodeError):
      return False
    return True

  try:
    ports = [int(worker.rpartition(":")[2]) for worker in workers]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    listener = socket.create_server(("", ports[index]), family=family, dualstack_ipv6=both)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"TF_CONFIG: cannot listen at {workers[index]} ({error}); is the address host:port, and is "
      "the port free?"
    ) from None
  missing = [worker for k, worker in enumerate(workers) if k != index]
  end = time.monotonic() + seconds
  with listener:
    while missing := [peer for peer in missing if not answers(peer)]:
      if time.monotonic() > end:
        raise ValueError(
          f"TF_CONFIG: no answer from {', '.join(missing)} within {seconds:g} s; start all "
          "workers, and check addresses, firewall and --peer_timeout"
        )
      time.sleep(0.2)
