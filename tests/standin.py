"""A small SavedModel with the signatures of an export, and a server of it in a thread."""

import contextlib
import http.client
import json
import pathlib
import socket
import threading

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import serving

SIDE = 8
FRAMES = 6


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
    return self.draw(seed + tf.range(tf.cast(num, tf.int64), dtype=tf.int64))

  def draw(self, seeds):
    tf.debugging.assert_less(seeds, tf.constant(1 << 40, tf.int64), "seed is beyond what was drawn")
    images = self._images(seeds)
    return {"images": images, "uint8": tf.cast(255 * images, tf.uint8)}

  def process(self, seeds):
    times = tf.linspace(1.0, 0.0, FRAMES + 1)
    x_0, noise = self._images(seeds)[:, None], self._noise(seeds)[:, None]
    t = times[None, :, None, None, None]
    return {
      "times": times,
      "x_t": (1 - t) * x_0 + t * noise,
      "x0_hat": tf.tile(x_0, [1, FRAMES, 1, 1, 1]),
    }

  def denoise(self, x_t, t):
    smooth = tf.nn.conv2d(x_t, self.kernel, 1, "SAME")
    return {"x0_hat": x_t - t[:, None, None, None] * smooth}

  def score(self, x_t, t):
    return {"score": (self.denoise(x_t, t)["x0_hat"] - x_t) / tf.square(t)[:, None, None, None]}

  def corrupt(self, x_0, t, seed):
    level = t[:, None, None, None]
    noise = self._noise(seed + tf.range(tf.shape(x_0, out_type=tf.int64)[0]))
    return {"x_t": (1 - level) * x_0 + 0.1 * level * noise}

  def restore(self, y, t, seed):
    noise = self._noise(seed + tf.range(tf.shape(y, out_type=tf.int64)[0]))
    images = y / tf.maximum(1 - t, 0.05) + 0.02 * noise
    return {"images": images, "uint8": tf.cast(255 * tf.clip_by_value(images, 0, 1), tf.uint8)}

  def restore_map(self, y, t, seed, num):
    one = lambda k: self.restore(y, t, seed + 1000 * tf.cast(k, tf.int64))["images"]
    samples = tf.map_fn(one, tf.range(num), fn_output_signature=tf.float32)
    return {
      "samples": tf.transpose(samples, [1, 0, 2, 3, 4]),
      "mean": tf.reduce_mean(samples, 0),
      "std": tf.math.reduce_std(samples, 0),
    }

  def export(self, path):
    """Writes the SavedModel, its card and its manifest."""
    f32, i32, i64 = tf.float32, tf.int32, tf.int64
    spec = lambda dtype, *shape, name: tf.TensorSpec(shape, dtype, name)
    image = lambda name: spec(f32, None, SIDE, SIDE, 1, name=name)
    t, seed, num = spec(f32, None, name="t"), spec(i64, name="seed"), spec(i32, name="num")
    level, seeds = spec(f32, name="t"), spec(i64, None, name="seeds")
    concrete = lambda f, *specs: tf.function(f).get_concrete_function(*specs)
    sample = concrete(self.sample, num, seed)
    draw, process = concrete(self.draw, seeds), concrete(self.process, seeds)
    names = ("", "_momentum_4", "_two_step_2")
    tf.saved_model.save(
      self,
      str(path),
      {
        "serving_default": sample,
        **{f"sample{n}": sample for n in names},
        **{f"draw{n}": draw for n in names},
        **{f"process{n}": process for n in names},
        "denoise": concrete(self.denoise, image("x_t"), t),
        "score": concrete(self.score, image("x_t"), t),
        "corrupt": concrete(self.corrupt, image("x_0"), t, seed),
        "restore": concrete(self.restore, image("y"), level, seed),
        "restore_map": concrete(self.restore_map, image("y"), level, seed, num),
        "echo": concrete(lambda text: {"text_bytes": text}, spec(tf.string, None, name="text")),
        "odd": concrete(
          lambda x: {"x": x, "half": x[: tf.shape(x)[0] // 2]}, spec(f32, None, name="x")
        ),
      },
    )
    extra = pathlib.Path(path, "assets.extra")
    extra.mkdir()
    samplers = {
      name: {"evaluations": n, "sampler": name.rpartition("_")[0]}
      for name, n in (("momentum_4", 4), ("two_step_2", 2))
    }
    manifest = {
      "name": "stand-in",
      "image_shape": [SIDE, SIDE, 1],
      "samplers": samplers,
      "default_sampler": "momentum_4",
      "times": [0.0, 0.5, 1.0],
      "level": [0.0, 1.0, 5.0],
      "sigma": [0.0, 0.1, 0.1],
    }
    (extra / "manifest.json").write_text(json.dumps(manifest))
    pathlib.Path(path, "README.md").write_text("# A stand-in\n")


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
