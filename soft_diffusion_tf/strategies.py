"""Distribution strategies by name: where a program's replicas are."""

from __future__ import annotations

import difflib
import json
import os
import socket
import time

import tensorflow as tf

STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")


def make_strategy(name: str = "auto", tpu: str = "", peer_timeout: float = 300.0,
                  alone: bool = False) -> tf.distribute.Strategy:  # fmt: skip
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
  if name not in STRATEGIES:
    near = difflib.get_close_matches(str(name), STRATEGIES, 1, cutoff=0)[0]
    raise ValueError(f"strategy = {name!r} is unknown; did you mean {near!r}?")
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
    text = os.environ.get("TF_CONFIG", "")
    try:
      content = json.loads(text)
      workers, index = content["cluster"]["worker"], content["task"]["index"]
      assert content["cluster"].keys() == {"worker"}  # the first of them is the chief
      assert content["task"].get("type", "worker") == "worker"
      assert 0 <= index < len(workers)
    except (ValueError, KeyError, TypeError, AssertionError):
      raise ValueError(
        f"TF_CONFIG = {text!r} is not a cluster of workers alone; give JSON such as "
        '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
      ) from None
    _meet(workers, index, peer_timeout)
    return tf.distribute.MultiWorkerMirroredStrategy()
  try:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
  except Exception as error:  # resolver, network and missing kernels each raise their own
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(
      f"TPU {tpu!r} cannot be used ({text}); is its name right, and is tensorflow-tpu installed?"
    ) from None
  return tf.distribute.TPUStrategy(resolver)


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

  TensorFlow's own wait has no end and cannot be interrupted. Who has met all others goes on to it,
  where the same port listens again, so those who come later find it too.
  """

  def answers(peer: str) -> bool:
    host, _, port = peer.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
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
