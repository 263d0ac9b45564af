"""Pictures: image grids as PNG, and the plots of a run. Deterministic; no display needed."""

import itertools
import pathlib

import numpy as np
from PIL import Image

from soft_diffusion_tf import files, packages

_METADATA = {"Software": None}  # keeps Matplotlib's version out of the file


def to_uint8(images):
  """Float images in [0, 1] (others are clipped) → uint8, rounded to nearest; uint8 stays as it is.

  Raises:
    ValueError: NaN or infinite values, which no picture shows.
  """
  if not np.isfinite(images).all():
    raise ValueError(
      "an image holds NaN or infinite values, and no picture is made of it; try more steps, "
      "another sampler or another checkpoint"
    )
  if np.asarray(images).dtype == np.uint8:
    return np.asarray(images)
  return np.rint(np.clip(np.asarray(images, np.float64), 0, 1) * 255).astype(np.uint8)


def grid(images, columns=None, padding=1, zoom=1):
  """Images [N, H, W, C] → one uint8 picture [·, ·, 3], white lines between.

  Of more channels than three the first three are shown, of two the first.
  """
  images = to_uint8(images)
  n, h, w, c = images.shape
  columns = columns or int(np.ceil(np.sqrt(n)))
  rows = -(-n // columns)
  sheet = np.full(
    [rows * (h + padding) + padding, columns * (w + padding) + padding, 3], 255, np.uint8
  )
  for k, image in enumerate(images):
    top = padding + (k // columns) * (h + padding)
    left = padding + (k % columns) * (w + padding)
    sheet[top : top + h, left : left + w] = image[..., :3] if c >= 3 else image[..., :1]
  return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_png(path, picture):
  """Writes a uint8 picture [H, W, 3] or [H, W, 1], whole or not at all."""
  with files.atomic(path) as partial:
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(partial, "PNG")


def zoom_for(images, target=64):
  """How many times to enlarge images [N, H, W, C] so that each is about `target` pixels high."""
  return max(1, round(target / images.shape[1]))


def _figure(**options):
  with packages.needed("matplotlib", "a plot"):
    from matplotlib import figure  # not pyplot: the caller's backend stays as it is
  return figure.Figure(**options)


def _show(axis, picture, title):
  axis.imshow(picture, interpolation="nearest")
  axis.set_title(title, fontsize=11)
  axis.axis("off")


def _save(figure, path):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110, bbox_inches="tight", metadata=_METADATA)


def side_by_side(path, pairs, columns=10):
  """Grids beside each other: pairs of (title, images [N, H, W, C])."""
  figure = _figure(figsize=(5.2 * len(pairs), 5.6))
  axes = figure.subplots(1, len(pairs))
  for axis, (title, images) in zip(np.atleast_1d(axes), pairs):
    _show(axis, grid(images, columns, zoom=zoom_for(images)), title)
  _save(figure, path)


def schedule(path, diffusion, level_name="level", curves=None):
  """Level and σ against t (P Figure 8).

  Args:
    diffusion: one process, or {name: process} to compare.
    curves: more {name: level schedule} for the left side.
  """
  t = np.linspace(0, 1, 401, dtype=np.float32)
  processes = diffusion if isinstance(diffusion, dict) else {"this run": diffusion}
  figure = _figure(figsize=(10, 3.8))
  left, right = figure.subplots(1, 2)
  levels = {name: process.level for name, process in processes.items()} | (curves or {})
  for name, level in levels.items():
    left.plot(t, level(t).numpy(), label=name)
  left.set(xlabel="t", ylabel=level_name, title="corruption level")
  one = len(processes) == 1
  for k, (name, process) in enumerate(processes.items()):
    color = "tab:red" if one else f"C{k}"
    right.plot(t, process.sigma(t).numpy(), color=color, label=name)
  right.set(xlabel="t", ylabel="σ", title="noise", yscale="log")
  for axis, several in ((left, len(levels) > 1), (right, not one)):
    axis.grid(alpha=0.3)
    if several:
      axis.legend()
  _save(figure, path)


def curves(path, lines, xlabel, ylabel, title="", floor=None):
  """Lines through points, {name: [(x, y), ...]}, the lowest point of each marked (P Figure 3).

  Args:
    floor: a level to draw as a dashed line, what real images have.
  """
  figure = _figure(figsize=(6.4, 4.2))
  axis = figure.subplots()
  values = [y for points in lines.values() for _, y in points]
  for k, (name, points) in enumerate(lines.items()):
    x, y = np.array(points, float).T
    low = int(np.argmin(y))
    axis.plot(
      x,
      y,
      marker="o",
      markersize=3,
      color=f"C{k}",
      label=f"{name} (best {y[low]:.3g} at {x[low]:g})",
    )
    axis.plot(x[low], y[low], marker="*", markersize=11, color=f"C{k}")
  if floor is not None:
    axis.axhline(
      floor, color="0.4", linestyle="--", linewidth=1, label=f"real images ({floor:.3g})"
    )
  if min(values) > 0 and max(values) > 5 * min(values):
    axis.set_yscale("log")
  axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
  axis.grid(alpha=0.3, which="both")
  axis.legend()
  _save(figure, path)


def strips(path, columns, rows):
  """Rows of images with a label at the left: columns are titles [T], rows (label, [T, H, W, C])."""
  count, (height, width) = len(columns), rows[0][1].shape[1:3]
  zoom = zoom_for(rows[0][1])
  sheet = grid(np.concatenate([images for _, images in rows]), count, zoom=zoom)
  figure = _figure(figsize=(0.9 * count + 1.2, 0.9 * len(rows) + 0.4))
  axis = figure.subplots()
  axis.imshow(sheet, interpolation="nearest")
  axis.set_xticks((np.arange(count) + 0.5) * (width + 1) * zoom, columns)
  axis.set_yticks((np.arange(len(rows)) + 0.5) * (height + 1) * zoom, [label for label, _ in rows])
  axis.xaxis.tick_top()
  axis.tick_params(length=0)
  for side in axis.spines.values():
    side.set_visible(False)
  _save(figure, path)


def neighbours(path, groups, histograms):
  """Images beside their nearest training images, and the distances' distributions (P Figure 12).

  Args:
    groups: (title, row labels, images [K, R, H, W, C]): K columns of R rows each.
    histograms: (space, {name: distances}, threshold) for each axis below.
  """
  figure = _figure(figsize=(11, 2.3 * len(groups) + 3.4), layout="constrained")
  cells = figure.add_gridspec(
    len(groups) + 1, len(histograms), height_ratios=[2.3] * len(groups) + [3.0]
  )
  for k, (title, labels, images) in enumerate(groups):
    axis = figure.add_subplot(cells[k, :])
    count, rows, height = images.shape[:3]
    zoom = zoom_for(images[:, 0])
    flat = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
    axis.imshow(grid(flat, count, zoom=zoom), interpolation="nearest")
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks((np.arange(rows) + 0.5) * (height + 1) * zoom, labels)
    axis.tick_params(length=0)
    for side in axis.spines.values():
      side.set_visible(False)
  for k, (space, sets, threshold) in enumerate(histograms):
    axis = figure.add_subplot(cells[len(groups), k])
    bins = np.linspace(0, 1.02 * max(v.max() for v in sets.values()) or 1.0, 41)
    for name, values in sets.items():
      weights = np.full(len(values), 1 / len(values))
      axis.hist(values, bins, weights=weights, alpha=0.55, label=name)
    axis.axvline(threshold, color="tab:red", linestyle="--", linewidth=1, label="flagged below")
    axis.set(
      xlabel=f"distance to the nearest training image ({space})", ylabel="share of the images"
    )
    axis.legend(fontsize=8)
  _save(figure, path)


def process(path, times, states, predictions=None):
  """The reverse process, a row per time: x_t on the left, x̂_0 of the same images on the right.

  Args:
    times: [N]; states: [N, B, H, W, C]; predictions: [N − 1, B, H, W, C] made on the way to
      times[1:], or None.
  """
  count, height = states.shape[1:3]
  groups = [("x_t", states)]
  if predictions is not None:
    blank = np.ones_like(predictions[:1])  # nothing was predicted before the first row
    groups.append(("x̂_0 on the way there", np.concatenate([blank, predictions])))
  figure = _figure(figsize=(0.62 * count * len(groups) + 1, 0.62 * len(times) + 0.6))
  axes = figure.subplots(1, len(groups), squeeze=False)
  zoom = zoom_for(states[0])
  for axis, (title, frames) in zip(axes[0], groups):
    _show(axis, grid(frames.reshape(-1, *frames.shape[2:]), count, zoom=zoom), title)
  rows = (np.arange(len(times)) + 0.5) * (height + 1) * zoom
  left = axes[0, 0]
  left.axis("on")
  left.set_yticks(rows, [f"t = {t:.2f}" for t in times])
  left.set_xticks([])
  left.tick_params(length=0)
  for side in left.spines.values():
    side.set_visible(False)
  figure.tight_layout()
  _save(figure, path)


def save_gif(path, states, seconds=4.0):
  """An animation of grids of images, the last of which stays for a while.

  Args:
    states: [N, B, H, W, C].
    seconds: from the first to the last.
  """
  zoom = zoom_for(states[0])
  frames = [Image.fromarray(grid(images, zoom=zoom)) for images in states]
  each = round(1000 * seconds / max(1, len(frames) - 1))
  with files.atomic(path) as partial:
    frames[0].save(
      partial,
      format="GIF",
      save_all=True,
      append_images=frames[1:],
      duration=[each] * (len(frames) - 1) + [2000],
      loop=0,
    )


def compare_levels(path, curves):
  """Corruption levels against t (P Figure 8): curves {name: (times, levels)}.

  Levels of different kinds do not compare, so each is drawn from 0 (clean) to 1 (most corrupted),
  unless all end alike.
  """
  ends = {tuple(np.round([levels[0], levels[-1]], 6)) for _, levels in curves.values()}
  figure = _figure(figsize=(5.6, 4.2))
  axis = figure.subplots()
  for (name, (times, levels)), style in zip(
    curves.items(), itertools.cycle(["-", "--", "-.", ":"])
  ):
    levels = np.asarray(levels, float)
    if len(ends) > 1:
      levels = (levels - levels[0]) / (levels[-1] - levels[0])
    axis.plot(times, levels, style, label=name)
  axis.set(xlabel="t", ylabel="level" if len(ends) == 1 else "share of the largest level")
  axis.legend()
  axis.grid(alpha=0.3)
  _save(figure, path)


def schedule_search(path, candidates, distances, chosen, levels, times, sigmas=None):
  """A found schedule: its levels against t, and the path through the candidates.

  Args:
    candidates: [L], or [L, 2] with σ (a grid of levels and σ).
    distances: [L, L], NaN where none was computed.
    chosen: indices of the candidates on the path; levels, times, sigmas: the schedule.
  """
  figure = _figure(figsize=(11, 4.4))
  left, right = figure.subplots(1, 2)
  left.plot(times, levels, ".-", label="level")
  left.set(xlabel="t", ylabel="level", title="levels of the schedule")
  left.grid(alpha=0.3)
  chosen = list(chosen)
  if sigmas is not None:
    noise = left.twinx()
    noise.plot(times, sigmas, ".-", color="tab:red")
    noise.set_ylabel("σ", color="tab:red")
    right.plot(*np.asarray(candidates).T, ",", color="0.6")
    right.plot(levels, sigmas, ".-")
    right.set(xlabel="level", ylabel="σ", title="path through the grid of candidates")
    _save(figure, path)
    return
  shown = right.imshow(np.ma.masked_invalid(distances), origin="lower", interpolation="nearest")
  shown.cmap.set_bad("0.9")
  figure.colorbar(shown, ax=right, label="distance")
  # A step goes up from the diagonal to its edge and back to the diagonal.
  x = np.repeat(chosen[:-1], 2).tolist() + [chosen[-1]]
  y = [chosen[0]] + np.repeat(chosen[1:], 2).tolist()
  right.plot(x, y, color="tab:red", linewidth=1)
  ticks = np.linspace(0, len(candidates) - 1, 6).round().astype(int)
  names = [f"{candidates[k]:.3g}" for k in ticks]
  right.set_xticks(ticks, names)
  right.set_yticks(ticks, names)
  right.set(xlabel="level", ylabel="level", title="distances (grey: not needed) and the path")
  figure.tight_layout()
  _save(figure, path)
