"""A small SavedModel with the signatures of an export, and a server of it in a thread."""

import contextlib
import http.client
import json
import socket
import threading

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import serving

SIDE = 8


class StandIn(tf.Module):
  """Draws soft crosses: a seed decides where. Corruption is a fade to grey with noise."""

  def __init__(self):
    super().__init__()
    self.kernel = tf.Variable(
      np.random.default_rng(0).normal(0, 0.1, (3, 3, 1, 1)).astype(np.float32)
    )

  def _image(self, seed):
    place = tf.random.stateless_uniform([2], tf.stack([seed, 0]), 1.0, SIDE - 2.0)
    line = tf.range(SIDE, dtype=tf.float32)
    bars = [tf.exp(-tf.square(line - place[k])) for k in (0, 1)]
    return tf.maximum(bars[0][:, None], bars[1][None, :])[..., None]

  def _images(self, seeds):
    return tf.map_fn(self._image, seeds, fn_output_signature=tf.float32)

  def _noise(self, seeds):
    one = lambda s: tf.random.stateless_normal([SIDE, SIDE, 1], tf.stack([s, 1]))
    return tf.map_fn(one, seeds, fn_output_signature=tf.float32)

  def sample(self, num, seed):
    tf.debugging.assert_less(seed, tf.constant(1 << 40, tf.int64), "seed is beyond what was drawn")
    seeds = seed + tf.range(tf.cast(num, tf.int64), dtype=tf.int64)
    images = self._images(seeds)
    return {"images": images, "images_uint8": tf.cast(255 * images, tf.uint8)}

  def denoise(self, x_t, t):
    smooth = tf.nn.conv2d(x_t, self.kernel, 1, "SAME")
    return {"x_0": x_t - t[:, None, None, None] * smooth}

  def score(self, x_t, t):
    return {"score": (self.denoise(x_t, t)["x_0"] - x_t) / tf.square(t)[:, None, None, None]}

  def corrupt(self, x_0, t, seed):
    level = t[:, None, None, None]
    return {"x_t": (1 - level) * x_0 + 0.1 * level * self._noise(seed)}

  def restore(self, y, t, seed):
    level = t[:, None, None, None]
    return {"x_0": tf.clip_by_value(y / tf.maximum(1 - level, 0.05), 0, 1)}

  def export(self, path):
    f32, i64 = tf.float32, tf.int64
    spec = lambda dtype, *shape, name: tf.TensorSpec(shape, dtype, name)
    image = lambda name: spec(f32, None, SIDE, SIDE, 1, name=name)
    t, seeds = spec(f32, None, name="t"), spec(i64, None, name="seed")
    sample = (spec(tf.int32, name="num"), spec(i64, name="seed"))
    concrete = lambda f, *specs: tf.function(f).get_concrete_function(*specs)
    tf.saved_model.save(self, str(path), {
      "serving_default": concrete(self.sample, *sample),
      "sample_momentum_4": concrete(self.sample, *sample),
      "denoise": concrete(self.denoise, image("x_t"), t),
      "score": concrete(self.score, image("x_t"), t),
      "corrupt": concrete(self.corrupt, image("x_0"), t, seeds),
      "restore": concrete(self.restore, image("y"), t, seeds),
      "echo": concrete(lambda text: {"text_bytes": text}, spec(tf.string, None, name="text")),
    })  # fmt: skip


class Client:
  """One connection to 127.0.0.1."""

  def __init__(self, port):
    self.port = port

  def raw(self, method, path, body=None, headers=()):
    """(status, headers, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
    with contextlib.closing(connection):
      connection.request(method, path, body, dict(headers))
      answer = connection.getresponse()
      return answer.status, answer.headers, answer.read()

  def get(self, path):
    status, _, body = self.raw("GET", path)
    return status, json.loads(body)

  def predict(self, body, name="model"):
    """(status, parsed body); `body` is bytes, or anything that JSON holds."""
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
    status, _, answer = self.raw("POST", f"/v1/models/{name}:predict", body)
    return status, json.loads(answer)


@contextlib.contextmanager
def served(model, *, max_rows=8, limit=8, fixed=False, connections=64, slow_client=1.0, **limits):
  """A client of a server of `model`, which runs in a thread of this process."""
  batcher = serving.Batcher(max_rows, limit, fixed)
  app = serving.App(model, batcher, **limits)
  server = serving.make_server(app, connections=connections, slow_client=slow_client, grace=20)
  listening = socket.create_server(("127.0.0.1", 0))
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)  # what a deaf client can hide
  client = Client(listening.getsockname()[1])
  client.app, client.batcher, client.server = app, batcher, server
  thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
  thread.start()
  try:
    yield client
  finally:
    server.should_exit = True
    thread.join(30)
    batcher.close()
    listening.close()
