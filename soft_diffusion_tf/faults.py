"""Whether TensorFlow multiplies a function's float32 matrices rightly on this machine.

With oneDNN on, TensorFlow 2.21 on processors with AVX-512 multiplies float32 [B, 1, M, K] by
[1, 1, K, N] wrongly, as NaN, or to the end of the process. So a traced function is tried in a
process of its own, beside the same function with every float32 made a float64; a crash there is an
answer.

Run as a program, `faults.py FOLDER` is that process. It needs TensorFlow alone, and none of the
user's code: it is given graphs.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf

# What the math libraries multiply: by the start of an op's name.
_PRODUCTS = ("MatMul", "BatchMatMul", "Einsum", "Conv2D", "Conv3D", "DepthwiseConv2d")
_SECONDS = 300


def _nodes(graph):
  """Nodes of a graph and of the functions in it."""
  yield from graph.node
  for function in graph.library.function:
    yield from function.node_def


def multiplies(concrete):
  """Whether a concrete function holds a float32 product."""
  return any(
    node.op.startswith(_PRODUCTS) and node.attr["T"].type == tf.float32.as_datatype_enum
    for node in _nodes(concrete.graph.as_graph_def())
  )


def wrong_products(cases):
  """What is wrong with functions when TensorFlow runs them here: texts, one per fault.

  Args:
    cases: (name, concrete function of tensors with one result, its arguments) each.
  """
  with tempfile.TemporaryDirectory() as folder:
    for k, (_, concrete, arguments) in enumerate(cases):
      graph = concrete.graph
      (pathlib.Path(folder) / f"{k}.pb").write_bytes(graph.as_graph_def().SerializeToString())
      values = [*arguments, *concrete.captured_inputs]
      names = [tensor.name for tensor in concrete.inputs]
      np.savez(
        pathlib.Path(folder) / f"{k}.npz",
        names=names,
        result=concrete.outputs[0].name,
        **{f"value_{i}": np.asarray(v) for i, v in enumerate(values)},
      )
    done = _run(sys.executable, "-P", __file__, folder)
  errors = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  faults = []
  for (name, _, _), found in zip(cases, errors):
    if not found["error"] <= 1e-4 * max(1.0, found["scale"]):  # NaN as well
      faults.append(f"{name}: TensorFlow's float32 product is off by {found['error']:.3g}")
  if done.returncode:
    faults.append(f"{cases[len(errors)][0]}: TensorFlow's float32 product {_ended(done)}")
  return faults


def _run(*command):
  try:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
  except subprocess.TimeoutExpired as end:
    text = (end.stdout or b"").decode()
    return subprocess.CompletedProcess(command, 1, text, f"no end within {_SECONDS} s")


def _ended(done):
  if done.returncode < 0:
    return f"ends the process ({signal.Signals(-done.returncode).name})"
  return f"fails ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"


# --- The process of its own -----------------------------------------------------------------------


def doubled(graph):
  """The graph with float64 in place of float32, everywhere."""
  graph = tf.compat.v1.GraphDef.FromString(graph.SerializeToString())
  single, double = tf.float32.as_datatype_enum, tf.float64.as_datatype_enum

  def double_shape(attribute):
    if attribute.type == single:
      attribute.type = double
    for k, kind in enumerate(attribute.list.type):
      if kind == single:
        attribute.list.type[k] = double
    if attribute.HasField("tensor") and attribute.tensor.dtype == single:
      value = tf.make_ndarray(attribute.tensor).astype(np.float64)
      attribute.tensor.CopyFrom(tf.make_tensor_proto(value))

  for node in _nodes(graph):
    for attribute in node.attr.values():
      double_shape(attribute)
  for function in graph.library.function:
    for argument in (*function.signature.input_arg, *function.signature.output_arg):
      if argument.type == single:
        argument.type = double
  return graph


def _result(graph, feeds, name):
  with tf.Graph().as_default() as made:
    tf.graph_util.import_graph_def(graph, name="")
    with tf.compat.v1.Session(graph=made) as session:
      return session.run(name, feeds)


def _compare(folder):
  for k in range(len(list(folder.glob("*.pb")))):
    graph = tf.compat.v1.GraphDef.FromString((folder / f"{k}.pb").read_bytes())
    with np.load(folder / f"{k}.npz", allow_pickle=False) as content:
      values = {str(n): content[f"value_{i}"] for i, n in enumerate(content["names"])}
      result = str(content["result"])
    wide = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in values.items()}
    want = _result(doubled(graph), wide, result)  # first: what follows may be the end
    error = np.max(np.abs(_result(graph, values, result) - want))
    scale = np.max(np.abs(want))
    print(json.dumps({"error": float(error), "scale": float(scale)}), flush=True)


if __name__ == "__main__":
  _compare(pathlib.Path(sys.argv[1]))
