"""Soft Diffusion: Score Matching with General Corruptions (Daras et al. 2022)."""

import os

# TensorFlow leaves oneDNN's convolutions off on CPUs without AVX-512, where they take a quarter off
# a training step. It reads this when it is first imported, so import this package before it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__version__ = "0.1.0"
