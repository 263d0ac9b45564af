"""Compiles a StableHLO module ahead of time for a TPU topology: tpu_compile_check.py's other half.

It runs in the environment that holds jax and libtpu (never in the project's), imports nothing of
the project, and prints one JSON object as its last line:

  python tools/tpu_compiler.py v5e:2x2                      # what the topology is
  python tools/tpu_compiler.py v5e:2x2 MODULE.mlir REPLICAS # what compiling for it gives
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time

# libtpu must neither look for a TPU nor ask a cloud's metadata server about one; and as none is
# used, another process of its kind is no obstacle.
os.environ.update(
  TPU_SKIP_MDS_QUERY="1",
  JAX_PLATFORMS="cpu",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  TPU_WORKER_HOSTNAMES="localhost",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

# A petabyte: no chip holds it, and the refusal names what the chip has.
_IMPOSSIBLE = """
func.func @main(%a: tensor<1048576x1048576x256xf32>) -> tensor<1048576x1048576x256xf32> {
  %b = stablehlo.add %a, %a : tensor<1048576x1048576x256xf32>
  return %b : tensor<1048576x1048576x256xf32>
}
"""


def _compile(devices, text):
  """The executable of a module, one replica on each device."""
  import numpy as np
  from jax._src.interpreters import mlir
  from jax._src.lib import xla_client
  from jax._src.lib.mlir import ir

  options = xla_client.CompileOptions()
  options.num_replicas, options.num_partitions = len(devices), 1
  options.device_assignment = xla_client.DeviceAssignment.create(
    np.array([[device.id] for device in devices])
  )
  with mlir.make_ir_context():
    return devices[0].client.compile(
      ir.Module.parse(text),
      executable_devices=xla_client.DeviceList(tuple(devices)),
      compile_options=options,
    )


def describe(devices):
  """Number and kind of a topology's devices, and the refusal of a program that none can hold."""
  facts = {
    "devices": len(devices),
    "kind": devices[0].device_kind,
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
  }
  try:
    _compile(devices[:1], _IMPOSSIBLE)
  except Exception as error:  # jaxlib's own class, which is not public
    return facts | {"refusal": str(error)}
  return facts | {"refusal": ""}


def measure(devices, text):
  """Time, memory and cost of compiling a module for all of the devices."""
  start = time.monotonic()
  try:
    executable = _compile(devices, text)
  except Exception as error:
    return {"error": str(error), "compile_seconds": time.monotonic() - start}
  seconds = time.monotonic() - start
  memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
  if isinstance(cost, list):
    cost = cost[0]
  return {
    "compile_seconds": seconds,
    "peak_bytes": memory.peak_memory_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "alias_bytes": memory.alias_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "code_bytes": memory.generated_code_size_in_bytes,
    "flops": cost["flops"],
    "hlo": executable.hlo_modules()[0].to_string(),
  }


def main(topology, module=None, replicas="1"):
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:
    return {"error": str(error)}
  if module is None:
    return describe(devices)
  return measure(devices[: int(replicas)], pathlib.Path(module).read_text(encoding="utf-8"))


if __name__ == "__main__":
  print(json.dumps(main(*sys.argv[1:])))
