"""A float32 product that TensorFlow gets wrong is a verdict, and not the end of this process."""

import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import corruptions, faults, products


@dataclasses.dataclass(frozen=True)
class Own(corruptions.Corruption):
  """A user's blur towards the mean, multiplied as one first writes it: in NCHW, by one matrix."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    w = x.shape[2]
    matrix = tf.fill([1, 1, w, w], 1.0 / w)
    y = tf.transpose(tf.matmul(tf.transpose(x, [0, 3, 1, 2]), matrix), [0, 2, 3, 1])
    return x + level * (y - x)


@dataclasses.dataclass(frozen=True)
class Helped(corruptions.Corruption):
  """The same by the package's product."""

  level_range = (0.0, 1.0)

  def apply(self, x, level):
    h, w = x.shape[1:3]
    y = products.two_sided(tf.eye(h), x, tf.fill([w, w], 1.0 / w))
    return x + level * (y - x)


def concrete(function, *arguments):
  return tf.function(function, autograph=False).get_concrete_function(*map(tf.constant, arguments))


A = np.random.default_rng(0).random([3, 4, 4], np.float32)


@pytest.mark.parametrize(
  ("function", "expected"),
  [
    (lambda a, b: tf.matmul(a, b), True),
    (lambda a, b: tf.einsum("nij,njk->nik", a, b), True),
    (lambda a, b: tf.map_fn(lambda v: tf.matmul(v, v), a) + b, True),  # in a function of the graph
    (lambda a, b: tf.nn.conv2d(a[..., None], b[:, :, :1, None], 1, "SAME"), True),
    (lambda a, b: products.matmul(a, b), False),
    (lambda a, b: a * b + tf.reduce_sum(a), False),
  ],
)
def test_float32_products_are_found(function, expected):
  assert faults.multiplies(concrete(function, A, A)) == expected


def test_right_products_are_right_and_wrong_ones_have_their_size():
  """A float32 that depends on being one stands for a faulty kernel: 1 + 2⁻³⁰ − 1."""
  kept = tf.constant(A)  # captured, so that it travels too

  def right(a, b):
    return tf.map_fn(lambda pair: tf.matmul(*pair), (a, b), fn_output_signature=tf.float32) + kept

  def wrong(a, b):
    lost = (tf.reduce_sum(a) * 0.0 + 1.0 + 2.0**-30) - 1.0
    return tf.matmul(a, b) + tf.cast(lost > 0, a.dtype)

  found = faults.wrong_products(
    [("one", concrete(right, A, A), (A, A)), ("two", concrete(wrong, A, A), (A, A))]
  )
  assert found == ["two: TensorFlow's float32 product is off by 1"]


@pytest.mark.parametrize(
  ("end", "text"),
  [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends the process (SIGSEGV)"),
    ("raise SystemExit('no such kernel')", "fails (no such kernel)"),
    ("import time; time.sleep(60)", "fails (no end within 2 s)"),
  ],
)
def test_the_end_of_the_other_process_is_a_verdict(monkeypatch, end, text):
  run = subprocess.run

  def stand_in(command, **options):
    # A real process, which answers the first of three graphs, and then ends in its own way.
    script = f'print(\'{{"error": 0.0, "scale": 1.0}}\', flush=True); {end}'
    return run([sys.executable, "-c", script], **options)

  monkeypatch.setattr(faults.subprocess, "run", stand_in)
  monkeypatch.setattr(faults, "_SECONDS", 2)
  verdict = corruptions.check_corruption(Own())
  assert list(verdict.failures) == ["product"]  # nothing else was tried in this process
  assert verdict.failures["product"].startswith(
    f"on (6, 4, 1): TensorFlow's float32 product {text}"
  )
  assert "products.two_sided" in verdict.failures["product"]


def test_a_class_without_float32_products_starts_no_process(monkeypatch):
  def forbidden(*_, **__):
    raise AssertionError("a process was started")

  monkeypatch.setattr(faults.subprocess, "run", forbidden)
  for corruption in (Helped(), corruptions.GaussianBlur(), corruptions.BlockAverage()):
    assert corruptions.check_corruption(corruption).ok


CANARY = """
import os
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
import numpy as np, tensorflow as tf
draw = np.random.default_rng(0)
worst = 0.0
for _ in range(40):
  b, m, k, n = draw.integers(1, 33, 4)
  x, y = draw.random([b, 1, m, k], np.float32), draw.random([1, 1, k, n], np.float32)
  error = np.max(np.abs(tf.matmul(x, y).numpy() - x.astype(float) @ y))
  worst = max(worst, float(error) if np.isfinite(error) else np.inf)
print("wrong" if worst > 1e-3 else "right", flush=True)
"""


def test_canary_of_the_grey_broadcast(rng):
  """Says whether the installed TensorFlow has the fault on this processor; never fails for it."""
  done = subprocess.run(
    [sys.executable, "-c", CANARY], capture_output=True, text=True, check=False, timeout=300
  )
  said = done.stdout.split()[-1:] or ["ends the process"]
  assert said[0] in ("right", "wrong", "ends the process"), done.stderr[-500:]
  assert said != ["ends the process"] or done.returncode < 0, done.stderr[-500:]
  warnings.warn(
    f"TensorFlow {tf.__version__} with oneDNN, float32 [b, 1, m, k] x [1, 1, k, n]: {said[0]}",
    stacklevel=1,
  )
  # The package's own product is right in either case, in this process.
  x, a, b = (rng.random(s).astype(np.float32) for s in ([5, 9, 7, 1], [9, 9], [7, 7]))
  want = np.einsum("hk,nkvc,wv->nhwc", *(v.astype(float) for v in (a, x, b)))
  np.testing.assert_allclose(products.two_sided(a, x, b), want, atol=1e-5)
