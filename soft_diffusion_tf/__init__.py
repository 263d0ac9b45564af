"""Soft Diffusion: Score Matching with General Corruptions (Daras et al. 2022)."""

__version__ = "0.1.0"
