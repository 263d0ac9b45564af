"""Sampling in bulk: images that depend on their seeds alone, and folders of them.

Noise is a pure function of an image's seed (`rng`), but kernels round by the size of a batch, and
for some sizes by an image's place in it: the rows that are left over when a kernel has taken its
blocks go another way. So batches have one size, `experiment.Sampling.batch_size`, which is part of
what an image is like the sampler is; and the image of seed i always stands at place
i mod batch_size. What stands beside it does not matter, except to an adaptive sampler, which takes
its steps from the whole batch: there the batch of seed i is all the seeds with i's quotient.
"""

import copy
import functools
import json
import pathlib
import queue
import threading

import numpy as np
import tensorflow as tf
import tqdm
from PIL import Image, PngImagePlugin

import soft_diffusion_tf
from soft_diffusion_tf import arrays, files, plots, rng, samplers
from soft_diffusion_tf.experiment import Sampling

SETTINGS_FILE = "samples.json"
FORMATS = ("npz", "png")
_BATCHES_PER_FILE = 8  # an .npz file holds this many batches: what a kill may cost
_PILOT = ("two_step", 20)  # the images that a grid in transport length measures by


def batches(seeds, size, whole_blocks=False):
  """Distinct seeds, packed so that seed i stands at place i mod size.

  Args:
    seeds: integers [N].
    whole_blocks: a batch holds all the seeds of one quotient i // size, and no other.

  Returns:
    Seeds to draw [batches, size], and for each the index in `seeds` that asked for it, or −1.
  """
  seeds = np.asarray(seeds, np.int64)
  place = seeds % size
  if whole_blocks:
    blocks, batch = np.unique(seeds // size, return_inverse=True)
    drawn = blocks[:, None] * size + np.arange(size)
  else:
    order = np.argsort(place, kind="stable")
    begin = np.searchsorted(place[order], np.arange(size))
    batch = np.empty(len(seeds), int)
    batch[order] = np.arange(len(seeds)) - begin[place[order]]
    drawn = np.tile(np.arange(size), (batch.max() + 1, 1))
    drawn[batch, place] = seeds
  wanted = np.full(drawn.shape, -1)
  wanted[batch, place] = np.arange(len(seeds))
  return drawn, wanted


class BatchSampler:
  """A sampler with its options, on one device or several: image seeds → images.

  Args:
    diffusion: with a prior.
    denoiser: (x_t, t [B]) → x̂_0.
    options: `experiment.Sampling`.
    strategy: every replica draws batches of its own; the denoiser's variables must live in its
      scope. By default the current one, on which nothing is distributed.
  """

  def __init__(self, diffusion, denoiser, options: Sampling, strategy=None):
    self.options = options
    self.strategy = strategy
    self.diffusion = diffusion
    denoiser = samplers.bounded(denoiser, options.clip, options.threshold)
    self.sampler = samplers.Sampler(diffusion, denoiser)
    self.evaluations = None  # of the denoiser, for the last images
    self._replicas = strategy.num_replicas_in_sync if strategy else 1
    self._traced: dict = {}  # shared by the copies that `with_options` makes

  def with_options(self, options):
    """The same with another sampler; what is traced is shared. Bounds of x̂_0 must stay."""
    mine = self.options
    if (options.clip, options.threshold) != (mine.clip, mine.threshold):
      raise ValueError(
        f"clip = {options.clip}, threshold = {options.threshold:g}, and this BatchSampler was made "
        f"with {mine.clip}, {mine.threshold:g}; make another BatchSampler"
      )
    if options == mine:
      return self
    other = copy.copy(self)
    other.__dict__.pop("plan", None)
    other.options = options
    return other

  def refresh(self):
    """Says that the denoiser's weights have changed: a grid that images measure is found anew."""
    self.__dict__.pop("plan", None)

  @property
  def adaptive(self):
    """Whether the sampler chooses its own steps and has no plan."""
    return self.options.sampler.adaptive

  @functools.cached_property
  def plan(self):
    """The sampler's plan; a ValueError for the adaptive one, which has none."""
    o = self.options
    if o.times:
      times = o.times
    else:
      measured = o.grid in ("transport", "relative")
      times = samplers.time_grid(
        o.steps, o.grid, self.diffusion, images=self._pilot() if measured else None
      )
    return samplers.plan(o.sampler, times, self.diffusion, denoise=o.denoise)

  def _pilot(self):
    name, steps = _PILOT
    plan = samplers.plan(name, samplers.time_grid(steps), self.diffusion)
    return self.sampler(plan, np.arange(self.options.batch_size)).numpy()

  def _on_all(self, seeds):
    """Images of one batch of seeds per replica: int64 [replicas, size] → per-replica float32.

    Where TensorFlow knows a batch's size beforehand it takes other kernels and sums in another
    order, which rounds another way. So the size is hidden from it, as it is in `samplers.Sampler`
    and in an exported model; only a TPU's compiler has to know it.
    """
    size = seeds.shape[1] if isinstance(self.strategy, tf.distribute.TPUStrategy) else None
    if size not in self._traced:
      self._traced[size] = tf.function(
        self._every,
        autograph=False,
        input_signature=[
          tf.TensorSpec([self._replicas, size], tf.int64),
          tf.TensorSpec([None, samplers.COLUMNS], tf.float32),
        ],
      )
    return self._traced[size](seeds, self.plan)

  def _every(self, seeds, plan):
    if self._replicas == 1:
      return self._one(seeds[0], plan)
    mine = lambda: tf.distribute.get_replica_context().replica_id_in_sync_group
    return self.strategy.run(lambda: self._one(seeds[mine()], plan))

  def _one(self, seeds, plan):
    x = self.diffusion.draw_prior(seeds)
    return samplers.sample(self.diffusion, self.sampler.denoiser, plan, seeds, x).x

  def _draw(self, drawn):
    """Images of up to as many batches [n, size] as there are replicas: [n, size, H, W, C]."""
    if self.adaptive:
      error = self.options.sampler.tolerance
      parts = [self.sampler.adaptive(d, rtol=error, atol=error) for d in drawn]
      self.evaluations = max(n for _, n in parts)
      return np.stack([x.numpy() for x, _ in parts])
    self.evaluations = int(self.plan.shape[0])
    images = self._on_all(np.resize(drawn, (self._replicas, drawn.shape[1])))
    parts = self.strategy.experimental_local_results(images) if self.strategy else [images]
    return np.stack([part.numpy() for part in parts[: len(drawn)]])

  def parts(self, seeds):
    """Draws distinct seeds [N] part by part: yields (indices into seeds, images)."""
    drawn, wanted = batches(seeds, self.options.batch_size, whole_blocks=self.adaptive)
    for k in range(0, len(drawn), self._replicas):
      images = self._draw(drawn[k : k + self._replicas])
      index = wanted[k : k + self._replicas]
      yield index[index >= 0], images[index >= 0]

  def images(self, seeds, progress=None):
    """Images float32 [N, H, W, C] for image seeds [N]; `progress` is the text of a bar."""
    if not len(seeds):
      raise ValueError("there are no seeds to draw images for")
    distinct, back = np.unique(rng.image_seeds(seeds).numpy(), return_inverse=True)
    images = np.empty([len(distinct), *self.diffusion.image_shape], np.float32)
    with tqdm.tqdm(total=len(distinct), desc=progress, disable=progress is None) as bar:
      for index, part in self.parts(distinct):
        images[index] = part
        bar.update(len(index))
    return images[back]


# --- Folders of samples ---------------------------------------------------------------------------


class _Writer:
  """Does one job after the other in a thread of its own; the first error comes out of `put`."""

  def __init__(self):
    self._jobs = queue.Queue(maxsize=4)
    self._error = None
    self._thread = threading.Thread(target=self._work, daemon=True)

  def _work(self):
    while (job := self._jobs.get()) is not None:
      if self._error is None:
        try:
          job()
        except Exception as error:  # handed over to the drawing thread
          self._error = error

  def put(self, function, *args):
    self._raise()
    self._jobs.put(functools.partial(function, *args))

  def _raise(self):
    if self._error is not None:
      raise self._error

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, kind, *_):
    self._jobs.put(None)
    self._thread.join()
    if kind is None:
      self._raise()


def _save_npz(path, images, seeds, settings):
  """Adds images (uint8) to an .npz file, in the order of their seeds."""
  have = _read_npz(path)
  if have is not None:
    images, seeds = np.concatenate([have[0], images]), np.concatenate([have[1], seeds])
  order = np.argsort(seeds)
  metadata = json.dumps({**settings, "seeds": [int(seeds.min()), int(seeds.max())]})
  with files.atomic(path) as partial:
    np.savez(partial, images=images[order], seeds=seeds[order], metadata=np.array(metadata))


def _read_npz(path):
  """Images and seeds of a file of samples; None when there is none, or none that can be read."""
  try:
    with arrays.opened(path, "not a file of samples", "remove it") as content:
      seeds = content.array("seeds", dtypes=("int64",))
      images = content.array("images", dtypes=("uint8",))
      if seeds.ndim != 1 or images.ndim != 4 or len(seeds) != len(images):
        raise ValueError(f"{len(images)} images for {seeds.shape} seeds")
      return images, seeds
  except ValueError:
    return None


def _save_png(folder, images, seeds, settings):
  for image, seed in zip(images, seeds):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("soft_diffusion_tf", json.dumps({**settings, "seed": int(seed)}))
    picture = image if image.shape[-1] == 3 else plots.grid(image[None], padding=0)
    picture = image[..., 0] if image.shape[-1] == 1 else picture
    with files.atomic(folder / _png_name(seed)) as partial:
      Image.fromarray(picture).save(partial, format="PNG", pnginfo=notes)


def _png_name(seed):
  return f"{seed:06d}.png"


def settings_of(experiment, step, options, nfe):
  """What decides the images of a folder, besides their seeds; ready for JSON."""
  return {
    "config": experiment.identity(),
    "name": experiment.name,
    "checkpoint": step,
    "sampler": str(options.sampler),
    "nfe": nfe,
    "sampling": options.to_dict(),
    "version": soft_diffusion_tf.__version__,
  }


def check_out(out):
  """Raises the ValueError of a folder that holds other files than samples."""
  # What begins with a dot is another shard's half file, or what a kill left of one.
  if (
    out.exists()
    and not (out / SETTINGS_FILE).exists()
    and any(f.name[0] != "." for f in out.iterdir())
  ):
    raise ValueError(f"{out} holds other files than samples; give a new folder as --out")


def _claim(out, settings, force):
  """Makes a folder of samples of these settings, or checks that it is one."""
  path = out / SETTINGS_FILE
  mine = json.loads(json.dumps(settings))
  theirs = None
  check_out(out)
  if path.exists():
    try:
      theirs = json.loads(path.read_text())
    except ValueError:
      theirs = {}
    if not isinstance(theirs, dict):
      theirs = {}
  if theirs not in (None, mine) and not force:
    changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    raise ValueError(
      f"{out} holds samples that differ in {', '.join(changed)}; give another --out, "
      "or --force to replace them"
    )
  if theirs not in (None, mine):
    for old in (*out.glob("samples-*.npz"), *out.glob("[0-9]*.png")):
      old.unlink(missing_ok=True)  # another shard may do the same
  out.mkdir(parents=True, exist_ok=True)
  if theirs != mine:
    files.write_json(path, mine)


def write(
  batch_sampler, seeds, out, settings, *, form="npz", shard=(1, 1), force=False, progress=True
):
  """Draws seeds into a folder, going on where an earlier call was stopped, even by kill -9.

  Files appear whole or not at all; those that are there are kept and not drawn again. Drawing and
  writing run side by side. Several processes (machines) share the work by `shard`.

  Args:
    seeds: distinct integers, not negative.
    out: "png": a file per seed. "npz": files of up to 8 batches with `images` uint8 [n, H, W, C],
      `seeds` int64 [n] and `metadata`, JSON of the settings and the range of seeds.
    settings: see `settings_of`; written to samples.json and into every file.
    shard: (k, n): this is the k-th of n processes, 1 ≤ k ≤ n.
    force: replace samples of other settings.

  Returns:
    How many images this process was to draw, and how many of them were there already.

  Raises:
    ValueError: the folder holds something else, or a file cannot be written.
  """
  k, n = shard
  if not 1 <= k <= n:
    raise ValueError(f"shard {k}/{n}: give k/n with k from 1 to n, such as 1/{max(n, 1)}")
  if form not in FORMATS:
    raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
  out = pathlib.Path(out)
  seeds = np.unique(np.asarray(seeds, np.int64))
  _claim(out, {**settings, "format": form}, force)
  size = batch_sampler.options.batch_size * _BATCHES_PER_FILE
  files = np.unique(seeds // size)
  mine = {file: seeds[seeds // size == file] for file in files[k - 1 :: n]}
  path_of = lambda file: out / f"samples-{file * size:06d}-{(file + 1) * size - 1:06d}.npz"
  missing = {}
  for file, wanted in mine.items():
    if form == "png":
      missing[file] = np.array([s for s in wanted if not (out / _png_name(s)).exists()], np.int64)
    else:
      have = _read_npz(path_of(file))
      missing[file] = wanted if have is None else np.setdiff1d(wanted, have[1])
  total, left = (sum(map(len, part.values())) for part in (mine, missing))
  bar = tqdm.tqdm(
    total=total, initial=total - left, desc="sampling", unit="image", disable=not progress
  )
  try:
    with bar, _Writer() as writer:
      for file, wanted in missing.items():
        done, drawn = [], []
        for index, images in batch_sampler.parts(wanted) if len(wanted) else ():
          done.append(wanted[index])
          drawn.append(plots.to_uint8(images))
          note = {**settings, "nfe": batch_sampler.evaluations}
          if form == "png":
            writer.put(_save_png, out, drawn.pop(), done.pop(), note)
          bar.update(len(index))
        if drawn:
          writer.put(_save_npz, path_of(file), np.concatenate(drawn), np.concatenate(done), note)
  except OSError as error:
    raise ValueError(
      f"{out}: cannot write ({error}); what is there is whole: free some space and start again"
    ) from None
  return total, total - left
