"""Diffusion models that undo any linear corruption, in TensorFlow 2 and Keras 3.

"P" in docstrings and documents is the paper, Daras, Delbracio, Talebi, Dimakis and Milanfar, "Soft
Diffusion: Score Matching with General Corruptions" (2022): P 3.3 is its section 3.3. README's map
says what each module is.
"""

import os
import sys

# TensorFlow leaves oneDNN's convolutions off on CPUs without AVX-512, where they take a quarter off
# a training step. It reads this when it is first imported, so import this package before it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Keras is TensorFlow's here, whatever the environment or ~/.keras/keras.json asks of others.
if "keras" not in sys.modules:
  os.environ["KERAS_BACKEND"] = "tensorflow"
elif (_backend := sys.modules["keras"].config.backend()) != "tensorflow":
  raise ImportError(
    f"Keras is loaded with the backend {_backend!r}, and soft_diffusion_tf needs 'tensorflow': "
    "import soft_diffusion_tf before keras, or set KERAS_BACKEND=tensorflow"
  )

__version__ = "0.2.0.dev0"

from soft_diffusion_tf import moved

moved.install()
