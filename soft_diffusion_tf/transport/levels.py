"""From images to a schedule of levels."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from soft_diffusion_tf import __version__
from soft_diffusion_tf.corruptions import Corruption
from soft_diffusion_tf.transport.distances import Bures, Clouds, Distances, Journal, Known, Sinkhorn
from soft_diffusion_tf.transport.operators import (
  Array,
  NotClosedForm,
  Progress,
  candidate_levels,
  check_closed_form,
  check_images,
  closed_form_distances,
  roots_of,
  weight_of,
)
from soft_diffusion_tf.transport.path import Path, find_path

METHODS = ("closed_form", "sinkhorn", "divergence", "regularised", "bures")
# What a reduced basis may cut from the images of a level, as a share of the mean step (root mean
# square r). Both sides of a pair are projected alike, so W₂² is low by at most (2r)² (`Clouds`).
_CUT = 0.015
# Default ε of the entropic problem, as a share of the squared mean step.
_ENTROPIC = 0.02


def shift(one: Array, two: Array, levels: Array) -> float:
  """The largest difference of two schedules at equal times, counted in steps of `levels`."""
  t = np.linspace(0, 1, 1001)
  sign = np.sign(levels[-1] - levels[0])  # np.interp wants rising abscissae
  step = np.arange(len(levels))

  def steps(path: Array) -> Array:
    values = np.interp(t, np.linspace(0, 1, len(path)), path)
    return np.interp(sign * values, sign * levels, step)

  return float(np.max(np.abs(steps(one) - steps(two))))


def measure(
  method: str,
  corruption: Corruption,
  levels: Array,
  images: Array,
  *,
  sigmas: Array | None = None,
  noise: str = "none",
  nodes: int = 32,
  seed: int = 0,
  epsilon: float | None = None,
  progress: Progress | None = None,
) -> tuple[Distances, dict[str, Any]]:
  """Distances of a method between corrupted data sets, and what a schedule file says of them.

  Args:
    method: one of `METHODS`.
    levels, sigmas: the candidates: a level and the σ of the noise on it (by `noise`, see `Clouds`).
      The closed form pairs each image with itself.
    nodes: of the schedule that is sought: sets the scale of what may be cut, and of ε.
    epsilon: of the entropic problem; None for 2 % of the squared mean step of a straight path of
      `nodes` nodes, or what float32 resolves if that is more.

  Raises:
    NotClosedForm: method "closed_form" for a corruption for which it does not hold.
    ValueError: unknown method or noise, NaN in images, fewer than 2 images.
  """
  if method not in METHODS:
    raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
  images = check_images(images)
  facts: dict[str, Any] = {"method": method, "images": len(images), "noise": noise}
  line, row = np.unique(levels, return_inverse=True)  # a grid has every level many times
  if levels[-1] < levels[0]:
    line, row = line[::-1], len(line) - 1 - row
  commute = True
  try:
    facts["closed_form_defects"] = check_closed_form(corruption, line, images)
  except NotClosedForm:
    if method == "closed_form":
      raise
    commute = False
  by_level = closed_form_distances(corruption, line, images, progress)[np.ix_(row, row)]
  clouds = Clouds(
    corruption, levels, np.zeros(len(levels)) if sigmas is None else sigmas, images, noise, seed
  )
  paired = clouds.paired(by_level)
  if method == "closed_form":
    return Known(paired), facts
  step = float(paired[0, -1]) / max(1, nodes - 1)
  clouds.cut = _CUT * step
  facts["cut"] = clouds.cut
  if method == "bures":
    return Bures(clouds, paired), facts
  if epsilon is None:
    centred = images.reshape(len(images), -1) - images.reshape(len(images), -1).mean(axis=0)
    largest = 4 * float(np.max(np.einsum("ij,ij->i", centred, centred)))
    largest += 4 * clouds.dimension * 1.5 * float(np.max(clouds.sigmas)) ** 2
    epsilon = max(_ENTROPIC * step**2, 25 * largest * float(np.finfo(np.float32).eps))
  facts["sinkhorn_epsilon"] = epsilon
  return Sinkhorn(clouds, paired, method, epsilon=epsilon, neighbours=not commute), facts


class Found(NamedTuple):
  """Everything that a search gives: `facts` are what a schedule file says of how it was found."""

  path: Path
  facts: dict[str, Any]
  candidates: Array  # [L], or [L, 2] with σ
  distances: Distances


def search(
  corruption: Corruption,
  images: Array,
  first: float,
  last: float,
  *,
  count: int = 256,
  nodes: int = 32,
  candidates: str = "transport",
  method: str = "closed_form",
  noise: str = "none",
  sigma: float = 0.0,
  sigmas: tuple[float, float, int] | None = None,
  epsilon: float | None = None,
  seed: int = 0,
  halves: bool = False,
  journal: str | pathlib.Path | None = None,
  progress: Progress | None = None,
) -> Found:
  """Finds the schedule of a corruption for a data set (P's setting by default).

  Args:
    images: float [N, H, W, C] in [0, 1].
    first, last: the levels of clean and of most corrupted images.
    count: candidate levels; nodes: levels of the schedule; candidates: see `candidate_levels`.
    method: one of `METHODS`.
    noise: see `Clouds`; sigma: its σ at all levels.
    sigmas: (first, last, count) of σ for a joint schedule: candidates are a grid of levels and σ
      (even in σ, which is even in transport length), and the path runs from (first, σ first) to
      (last, σ last), with both rising. Noise is then "same" unless said otherwise.
    epsilon: see `measure`. seed: of the noise.
    halves: also find the schedule on either half of the images, and report how far the two are
      apart: "sensitivity", the largest difference at equal times, in steps of the schedule.
    journal: file of distances to go on from, and to write to (not for the closed form).
    progress: called with (what, done, total).

  Raises:
    NotClosedForm: method "closed_form" for a corruption for which it does not hold.
  """
  images = check_images(images)
  if halves and len(images) < 4:
    raise ValueError(f"two halves need at least 4 images, got {len(images)}; take a larger slice")
  line = candidate_levels(corruption, first, last, count, candidates, images)
  log: Journal | None = None
  if journal is not None and method != "closed_form":
    # Sums of many threads differ in their last digits from run to run, so a search that goes on
    # keeps the candidates, and the ε, that it began with.
    log = Journal(
      journal,
      {
        "version": __version__,
        "corruption": corruption.get_config(),
        "method": method,
        "noise": noise,
        "sigma": sigma,
        "sigmas": sigmas,
        "seed": seed,
        "nodes": nodes,
        "epsilon": epsilon,
        "candidates": line.tolist(),
        "images": hashlib.sha256(images.tobytes()).hexdigest()[:16],
      },
    )
    line = np.array(log.header["candidates"])
    epsilon = log.epsilon if log.epsilon is not None else epsilon
  grid = line
  levels, noises = line, np.full(len(line), sigma)
  places = np.arange(len(line))[:, None]
  if sigmas is not None:
    noise = "same" if noise == "none" else noise
    noises = np.linspace(*sigmas)
    places = np.argwhere(np.ones([len(line), len(noises)], bool))
    levels, noises = line[places[:, 0]], noises[places[:, 1]]
    grid = np.stack([levels, noises], axis=1)
  wanted = min(nodes, len(levels))

  def distances_of(part: str, chosen: Array) -> tuple[Distances, dict[str, Any]]:
    found, facts = measure(
      method,
      corruption,
      levels,
      chosen,
      sigmas=noises,
      noise=noise,
      nodes=nodes,
      seed=seed,
      epsilon=epsilon,
      progress=progress,
    )
    found.places = places
    if log is not None:
      log.epsilon = facts.get("sinkhorn_epsilon")
      found.keep_in(log, part)
    return found, facts

  distances, facts = distances_of("all", images)
  path = find_path(levels, distances, wanted, progress)
  if wanted < nodes and not path.nearest:
    path = dataclasses.replace(path, nearest=(len(path.levels),))
  if sigmas is not None:
    path = dataclasses.replace(path, sigmas=noises[list(path.indices)])
  facts = {
    "corruption": corruption.get_config(),
    "candidates": candidates,
    "candidate_levels": len(line),
    "seed": seed,
    "version": __version__,
    **facts,
  }
  if noise != "none" and sigmas is None:
    facts["sigma"] = sigma
  if sigmas is not None:
    facts["candidate_sigmas"] = sigmas[2]
  if halves and sigmas is None:
    epsilon = facts.get("sinkhorn_epsilon")
    one, two = (
      find_path(levels, distances_of(f"half {k}", images[k::2])[0], wanted, progress).levels
      for k in range(2)
    )
    facts["sensitivity"] = shift(one, two, path.levels)
  return Found(path, facts, grid, distances)


def find(
  corruption: Corruption, images: Array, first: float, last: float, **options: Any
) -> tuple[Path, dict[str, Any]]:
  """The path that `search` finds with the same arguments, and what a schedule file says of it."""
  return search(corruption, images, first, last, **options)[:2]


def mse_matched(
  corruption: Corruption,
  images: Array,
  first: float,
  last: float,
  sigma: Callable[[Array], Any],
  ve_sigma: Callable[[Array], Any],
  nodes: int = 32,
) -> Array:
  """P's natural baseline (Eq. 55): levels whose MSE to the clean image decays as the VE process's.

  With noise, E‖x_0 − x_t‖² = E‖(I − C_t) x_0‖² + d σ_t²; the level at t is where its share of the
  value at t = 1 equals VE's σ_t² / σ_1².

  Args:
    sigma: the noise schedule of the corrupted process; ve_sigma: that of the VE process.

  Returns:
    Levels at `nodes` evenly spaced times, float64.
  """
  images = check_images(images)
  fine = candidate_levels(corruption, first, last, 512, "transport", images)
  roots, _ = roots_of(corruption, images)
  gaps = (np.asarray(corruption(roots, float(level))).ravel() - roots.ravel() for level in fine)
  mse = np.array([float(gap @ gap) for gap in gaps]) * weight_of(corruption, images)
  mse = np.maximum.accumulate(mse)  # a blur's error grows with its level; rounding need not
  t = np.linspace(0, 1, nodes).astype(np.float32)
  noise = images[0].size * np.asarray(sigma(t), np.float64) ** 2
  ve = np.asarray(ve_sigma(t), np.float64)
  share = (ve / ve[-1]) ** 2
  wanted = share * (mse[-1] + noise[-1]) - noise
  levels = np.interp(np.clip(wanted, mse[0], mse[-1]), mse, fine)
  levels[0], levels[-1] = first, last
  return levels
