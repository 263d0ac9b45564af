"""A SavedModel over HTTP, in the JSON of TensorFlow Serving's REST API, and a page to look at it.

From the bottom up: `Model` (signatures as they are in the file: nothing here knows samplers or
networks), `decode` and `encode` (JSON ↔ arrays, every mistake a `Refused` with one clear line),
`Batcher` (a bounded queue before one thread that calls the model), `App` (ASGI) and `make_server`
(uvicorn, with the time limits that it lacks).

Contract: https://www.tensorflow.org/tfx/serving/api_rest, except that JSON is strict: NaN and
Infinity are neither taken nor given.
"""

from soft_diffusion_tf.serving.app import App, make_server, uvicorn_module
from soft_diffusion_tf.serving.batcher import Batcher, Metrics
from soft_diffusion_tf.serving.codec import decode, encode
from soft_diffusion_tf.serving.model import Model, Refused, Request, Signature

__all__ = [
  "App",
  "Batcher",
  "Metrics",
  "Model",
  "Refused",
  "Request",
  "Signature",
  "decode",
  "encode",
  "make_server",
  "uvicorn_module",
]
