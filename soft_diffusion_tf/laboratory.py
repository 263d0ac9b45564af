"""The exact laboratory: samplers, schedules, priors and corruptions graded without training.

Data is a mixture of Gaussians around real images, so E[x_0|x_t] is known (`oracles`) and so are the
moments of the data and of every q_t. What is left of a sampler's error is its own: discretisation,
the prior, or an error put into x̂_0 on purpose.
"""

import copy
import dataclasses
import functools

import numpy as np
import scipy.cluster.vq
import scipy.fft
import tensorflow as tf

from soft_diffusion_tf import (
  corruptions,
  data,
  gaussians,
  oracles,
  packages,
  priors,
  rng,
  samplers,
  schedules,
  transport,
)
from soft_diffusion_tf.diffusion import Diffusion
from soft_diffusion_tf.images import check_range
from soft_diffusion_tf.transport import sinkhorn

DATA = ("digits", "patches8", "patches16", "crops64")
PRECISIONS = ("exact", "tf32", "bfloat16")
COMPONENTS = ("image", "class")
SCHEDULES = ("transport", "linear", "geometric")
NFES = (5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 226, 320, 453, 640, 1000)
_FLOORS = 8  # fresh draws behind a floor


# --- Data -----------------------------------------------------------------------------------------


def load(name, count=450, data_dir=None):
  """Images float32 [N, H, W, C] in [0, 1] and labels [N] to build a mixture around.

  Args:
    name: "digits" (8×8×1), "patches8" or "patches16" (random patches of CIFAR-10), or "crops64"
      (64×64×1, cut at random from the two photographs of scikit-learn, at half their size).
    count: how many; evenly spaced digits, or one patch of each of as many images.
  """
  if name not in DATA:
    raise ValueError(f"unknown data {name!r}; choose one of {', '.join(DATA)}")
  if count < 2:
    raise ValueError(f"a laboratory takes at least 2 images, got {count}")
  if name == "crops64":
    return _crops(64, count), np.zeros(count, np.int64)
  source = data.load(*(("digits", "all") if name == "digits" else ("cifar10", "train")),
                     data_dir=data_dir, progress=False)  # fmt: skip
  picked = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
  images = source.floats(picked)
  if name != "digits":
    size = int(name.removeprefix("patches"))
    corners = np.random.default_rng(0).integers(0, images.shape[1] - size + 1, [len(images), 2])
    images = np.stack([i[y : y + size, x : x + size] for i, (y, x) in zip(images, corners)])
  return images, source.labels[picked]


def _crops(size, count):
  with packages.needed("scikit-learn", "the photographs of --data=patches"):
    from sklearn import datasets
  photographs = [
    (p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2] / 255.0) @ np.array([0.299, 0.587, 0.114])
    for p in datasets.load_sample_images().images
  ]
  halves = [p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in photographs]
  draw = np.random.default_rng(0)
  crops = []
  for k in range(count):
    half = halves[k % len(halves)]
    y, x = (draw.integers(0, n - size + 1) for n in half.shape)
    crops.append(half[y : y + size, x : x + size, None])
  return np.stack(crops).astype(np.float32)


def mixture_of(images, labels, components="image", std=0.05):
  """A mixture around images: a narrow Gaussian on each, or one full Gaussian a class.

  Patches cut at random have no class that shows in them, so clusters (10, by k-means) stand for
  classes wherever a label has fewer images than twice the dimension.
  """
  if components not in COMPONENTS:
    raise ValueError(f"unknown components {components!r}; choose one of {', '.join(COMPONENTS)}")
  if components == "image":
    return oracles.GaussianMixture(images, std)
  if np.bincount(labels).min() < 2 * images[0].size:
    rows = images.reshape(len(images), -1).astype(np.float64)
    wanted = max(1, min(10, len(images) // 4))
    labels = scipy.cluster.vq.kmeans2(rows, wanted, seed=0, minit="++")[1]
    members = np.bincount(labels)
    labels = np.where(members[labels] > 1, labels, members.argmax())  # one image has no covariance
  return oracles.GaussianMixture.per_class(images, labels, ridge=std**2)


# --- Processes ------------------------------------------------------------------------------------


def strongest(corruption, size):
  """A finite last level: the range's end, or for an endless one ¾ of the image's side."""
  stop = corruption.level_range[1]
  return stop if np.isfinite(stop) else 0.75 * size


def level_schedule(kind, corruption, first, last, images, nodes=32):
  """A level schedule: "linear", "geometric", or "transport", P's: the shortest path in W₂.

  Where the closed form of W₂ does not hold, "transport" takes levels evenly spaced in the length of
  the path, which is what the shortest path would come to.

  Returns:
    The schedule and a note on how it was found.
  """
  if kind == "linear":
    return schedules.Linear(first, last), "linear in t"
  if kind == "geometric":
    return schedules.Geometric(first, last), "geometric in t"
  if kind != "transport":
    raise ValueError(f"unknown schedule {kind!r}; choose one of {', '.join(SCHEDULES)}")
  try:
    path, _ = transport.find(corruption, images, first, last, count=128, nodes=nodes)
    levels, note = path.levels, f"shortest path in W₂, {len(path.levels)} levels"
  except transport.NotClosedForm:
    levels = transport.candidate_levels(corruption, first, last, nodes, "transport", images)
    note = f"{len(levels)} levels even in transport length (no closed form of W₂)"
  return schedules.piecewise(levels), note


def two_stage(corruption, level, image_shape):
  """P's process: noise from 0.01 to 0.1 while t < 0.2, then the corruption (P App. D)."""
  return Diffusion(
    image_shape, corruption, schedules.Staged(level, 0.2, 1.0),
    schedules.Staged(schedules.Geometric(0.01, 0.1), 0.0, 0.2),
  )  # fmt: skip


# --- Operators as a device multiplies that nobody told otherwise ----------------------------------


def rounded(x, kind):
  """float32 values as a device's product sees them: "tf32" (a GPU's) or "bfloat16" (a TPU's)."""
  x = tf.convert_to_tensor(x, tf.float32)
  if kind == "bfloat16":
    return tf.cast(tf.cast(x, tf.bfloat16), tf.float32)
  if kind != "tf32":
    raise ValueError(f"unknown precision {kind!r}; choose tf32 or bfloat16")
  bits = tf.bitcast(x, tf.int32)  # 13 of the 23 bits of the mantissa go, to the nearest even one
  odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 13), 1)
  bits = tf.bitwise.bitwise_and(bits + odd + (2**12 - 1), -(2**13))
  return tf.bitcast(bits, tf.float32)


@dataclasses.dataclass(frozen=True)
class Rounded(corruptions.Corruption):
  """A blur whose products round their operands to `kind` and add in float32, as a device does."""

  blur: corruptions.GaussianBlur
  kind: str

  def apply(self, x, level):
    n, (h, w, c) = tf.shape(x)[0], x.shape[1:]
    a, b = self.blur.matrices(tf.reshape(level, [-1]), h, w)
    cut = lambda v: rounded(v, self.kind)
    rows = tf.matmul(cut(a), tf.reshape(cut(x), [n, h, w * c]))
    turned = tf.reshape(tf.transpose(tf.reshape(rows, [n, h, w, c]), [0, 2, 1, 3]), [n, w, h * c])
    y = tf.reshape(tf.matmul(cut(b), cut(turned)), [n, w, h, c])
    return tf.transpose(y, [0, 2, 1, 3])


class PrecisionStudy:
  """Samples by exact and by rounded operators of a blur, from the same seeds and the same noise.

  The denoiser is the exact one of the exact process for all: what a network loses is not asked.

  Args:
    mixture: `oracles.GaussianMixture` of small components (covariances None).
    process: a `Diffusion` with a `GaussianBlur` and a prior.
  """

  def __init__(self, mixture, process):
    self.mixture, self.process = mixture, process
    denoiser = oracles.denoiser(mixture, process)
    self._samplers = {"exact": samplers.Sampler(process, denoiser)}
    for kind in PRECISIONS[1:]:
      changed = copy.copy(process)
      # Not dataclasses.replace, which would refuse it: a rounded C_0 is no identity.
      object.__setattr__(changed, "corruption", Rounded(process.corruption, kind))
      self._samplers[kind] = samplers.Sampler(changed, denoiser)
    h, w = process.image_shape[:2]
    fastest = np.maximum(np.arange(h)[:, None] / h, np.arange(w)[None] / w)  # of the two axes
    self._band = np.clip(np.ceil(np.log2(np.maximum(fastest, 2.0**-9))).astype(int), -3, 0) + 3

  BANDS = ("up to 1/8", "1/8 to 1/4", "1/4 to 1/2", "1/2 to 1")  # of the highest frequency

  def sample(self, kind, rule, nfe, seeds):
    """Images float32 [N, H, W, C] by a rule with that many evaluations."""
    times = samplers.time_grid(samplers.steps_for(rule, nfe))
    x = self.process.draw_prior(seeds)
    return self._samplers[kind](samplers.plan(rule, times, self.process), seeds, x).numpy()

  def one_blur(self, images, kind, t):
    """RMS and largest error of a single rounded C_t."""
    wrong = self._samplers[kind].diffusion.corrupt(images, t) - self.process.corrupt(images, t)
    return float(np.sqrt(np.mean(wrong**2))), float(np.max(np.abs(wrong)))

  def rms(self, difference):
    """RMS in each of `BANDS` of images [N, H, W, C], by cosine transform; a pixel's share each."""
    power = scipy.fft.dctn(np.float64(difference), axes=(1, 2), norm="ortho") ** 2
    return [float(np.sqrt(power[:, self._band == k].mean())) for k in range(len(self.BANDS))]

  @functools.cached_property
  def _moments(self):
    return oracles.moments(self.mixture)

  def frechet(self, images):
    """Squared Fréchet distance in pixels to the exact moments of the data."""
    return gaussians.frechet_of_rows(images, *self._moments)


# --- Grades ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grade:
  """How far a set of samples is from the data.

  Attributes:
    nfe: evaluations of the denoiser.
    frechet: squared Fréchet distance in pixels to the exact moments of the data.
    sliced: squared W₂ to fresh draws, mean over 64 directions.
    frequency: RMS over 2-D cosine frequencies of (variance / exact variance − 1).
    sinkhorn: Sinkhorn divergence to fresh draws; None when not asked for.
  """

  nfe: int
  frechet: float
  sliced: float
  frequency: float
  sinkhorn: float | None = None


class Laboratory:
  """A mixture under a process, ready to grade samplers.

  Args:
    mixture: `oracles.GaussianMixture`.
    diffusion: its process; a prior of `prior` is fitted to `images`.
    images: clean images that the prior and the grids in transport length are fitted to.
    prior, rank: see `priors.fit`.
    count: samples per grade.
    error: (kind, size) of an error put into x̂_0 (`oracles.noisy`).
  """

  def __init__(self, mixture, diffusion, images, prior="subspace", rank=32, count=2000,
               error=None):  # fmt: skip
    if count < 2:
      raise ValueError(f"a grade takes at least 2 samples, got {count}")
    self.mixture, self.images, self.count = mixture, images, count
    self.diffusion = diffusion.with_prior(priors.fit(prior, images, diffusion, rank))
    denoiser = oracles.denoiser(mixture, self.diffusion)
    if error is not None:
      denoiser = oracles.noisy(denoiser, self.diffusion, error[1], kind=error[0])
    self.sampler = samplers.Sampler(self.diffusion, denoiser)
    self.mean, self.covariance = oracles.moments(mixture)
    size = int(np.prod(diffusion.image_shape))
    directions = np.random.default_rng(2).standard_normal([size, 64])
    self._directions = directions / np.linalg.norm(directions, axis=0)
    basis = np.eye(size).reshape(-1, *diffusion.image_shape)
    dct = scipy.fft.dctn(basis, axes=(1, 2), norm="ortho").reshape(size, size)
    self._dct = dct
    self._variance = np.einsum("ij,ik,kj->j", dct, self.covariance, dct)

  def draw(self, seed):
    """Fresh draws of the data, float64 [count, D]."""
    return self.mixture.draw(self.count, seed=seed).reshape(self.count, -1).astype(np.float64)

  @functools.cached_property
  def _fresh(self):
    return self.draw(1)

  def grade_images(self, images, nfe=0, full=False):
    """The `Grade` of a set of images [count, ...]."""
    rows = np.asarray(images, np.float64).reshape(len(images), -1)
    if not np.all(np.isfinite(rows)):
      return Grade(nfe, *3 * [float("inf")])
    own = gaussians.Moments().update(rows)
    sorted_1, sorted_2 = (np.sort(v @ self._directions, axis=0) for v in (rows, self._fresh))
    cosines = np.var(rows @ self._dct, axis=0, ddof=1)
    divergence = None
    if full:
      one, two = (v[:1000].astype(np.float32) for v in (rows, self._fresh))
      divergence = float(sinkhorn.sinkhorn_divergence(one, two).divergence)
    return Grade(
      nfe,
      gaussians.frechet_distance(own.mean, own.covariance, self.mean, self.covariance),
      float(np.mean((sorted_1 - sorted_2) ** 2)),
      float(np.sqrt(np.mean((cosines / self._variance - 1) ** 2))),
      divergence,
    )

  @functools.cached_property
  def floors(self):
    """Grades of fresh draws: what `count` perfect samples get."""
    return [self.grade_images(self.draw(seed), full=seed == 2) for seed in range(2, 2 + _FLOORS)]

  @functools.cached_property
  def floor(self):
    """The mean of `floors`."""
    mean = lambda name: float(np.mean([getattr(g, name) for g in self.floors]))
    return Grade(0, mean("frechet"), mean("sliced"), mean("frequency"), self.floors[0].sinkhorn)

  def bound(self, share=0.1):
    """The Fréchet distance that counts as converged: the floor and `share` of it, and two standard
    deviations of one fresh draw's distance.
    """
    spread = np.std([g.frechet for g in self.floors], ddof=1)
    return (1 + share) * self.floor.frechet + 2 * float(spread)

  def plan(self, rule, nfe, grid="uniform", denoise=True, **fields):
    """The plan of a sampler for at most `nfe` evaluations; `fields` are the rule's."""
    rule = samplers.with_fields(rule, fields)
    times = samplers.time_grid(
      samplers.steps_for(rule, nfe), grid, self.diffusion, images=self.images
    )
    return samplers.plan(rule, times, self.diffusion, denoise=denoise)

  def grade(self, rule, nfe, grid="uniform", full=False, **options):
    """The `Grade` of a sampler; `options` are those of `plan`. For the adaptive one its tolerance
    decides, and nfe does not count.
    """
    seeds, rule = np.arange(self.count), samplers.with_fields(rule, options)
    if rule.adaptive:
      images, nfe = self.sampler.adaptive(seeds, rtol=rule.tolerance, atol=rule.tolerance)
      return self.grade_images(images, nfe, full)
    plan = self.plan(rule, nfe, grid, **options)
    return self.grade_images(self.sampler(plan, seeds), int(plan.shape[0]), full)

  def drift(self, rule, nfe, frames=10, grid="uniform", **options):
    """Where an error arises: (t, squared Fréchet distance of the sampler's x_t to q_t, its floor).

    Against the exact moments of q_t; the floor is that of forward draws of the same number.
    """
    plan = self.plan(rule, nfe, grid, **options)
    times, states, _ = self.sampler.trajectory(plan, np.arange(self.count), frames)
    clean = self._fresh.reshape(states[0].shape)
    result = []
    for k, (t, x) in enumerate(zip(times, states)):
      if t == 0:  # the finished image is x̂_0: without the noise σ_0
        grade = self.grade_images(x)
        result.append((0.0, grade.frechet, self.floor.frechet))
        continue
      q_t = oracles.corrupted_moments(self.mixture, self.diffusion, t)
      eta = rng.normal(tf.constant([k, 9]), 0, self.count, self.diffusion.image_shape)
      forward = self.diffusion.forward(clean, np.float32(t), eta).numpy()
      own, fresh = (gaussians.Moments().update(v) for v in (x, forward))
      result.append((float(t), gaussians.frechet_distance(own.mean, own.covariance, *q_t),
                     gaussians.frechet_distance(fresh.mean, fresh.covariance, *q_t)))  # fmt: skip
    return result

  def needed(self, rule, nfes=NFES, share=0.1, grid="uniform", grade=None, **options):
    """The fewest evaluations from which on a sampler's distance stays within `bound`.

    Goes up the ladder `nfes` until two rungs in a row are within it.

    Returns:
      The number or None, and the grades on the way.
    """
    grade = grade or self.grade
    grades, first = [], None
    for nfe in nfes:
      grades.append(grade(rule, nfe, grid=grid, **options))
      inside = grades[-1].frechet <= self.bound(share)
      if inside and first is not None:
        return first, grades
      first = grades[-1].nfe if inside else None
    return first, grades


# --- A corruption of one's own --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
  """What one schedule asks of each sampler: rule → evaluations needed (None: not reached)."""

  schedule: str
  note: str
  floor: float
  bound: float
  needed: dict[str, int | None]
  best: dict[str, float]  # the smallest distance seen


@dataclasses.dataclass(frozen=True)
class Examination:
  """The verdict on a corruption, before any training.

  Attributes:
    verdict: `corruptions.Verdict`.
    smooth: None, or why it is not differentiable in t.
    kept: share of the data's variance that C_1 lets through.
    prior_gaps: prior → its squared Fréchet distance to q_1, and "floor".
    prior: the simplest one within twice the floor, else the best.
    trials: a `Trial` for each schedule.
  """

  verdict: corruptions.Verdict
  smooth: str | None
  kept: float
  prior_gaps: dict[str, float]
  prior: str
  trials: list[Trial]

  @property
  def well_posed(self):
    return self.verdict.ok and any(
      n is not None for trial in self.trials for n in trial.needed.values()
    )

  def __str__(self):
    lines = [str(self.verdict)]
    if not self.verdict.ok:
      return "\n".join([*lines, "not well-posed: mend this first; nothing was sampled"])
    lines.append(f"in t: {self.smooth or 'smooth'}")
    gaps = ", ".join(f"{k} {v:.3g}" for k, v in self.prior_gaps.items())
    lines.append(f"C_1 lets {self.kept:.2%} of the variance through; priors, distance to q_1: "
                 f"{gaps}; taken: {self.prior}")  # fmt: skip
    for trial in self.trials:
      lines.append(f"schedule {trial.schedule} ({trial.note}), floor {trial.floor:.3g}:")
      for rule, nfe in trial.needed.items():
        said = f"{nfe} evaluations" if nfe else f"not reached (best {trial.best[rule]:.3g})"
        lines.append(f"  {rule}: {said}")
    if not self.well_posed:
      lines.append("not well-posed: no sampler comes to the data within the evaluations tried")
      return "\n".join(lines)
    nfe, rule, schedule = min(
      (n, rule, trial.schedule)
      for trial in self.trials for rule, n in trial.needed.items() if n
    )  # fmt: skip
    lines.append(f"well-posed; take {rule} with {nfe} evaluations and the schedule {schedule}")
    return "\n".join(lines)


def examine(corruption, images, mixture, *, kinds=("transport", "linear"),
            rules=("momentum", "ddim", "two_step", "stochastic_two_step"), nfes=NFES[:13],
            count=1000):  # fmt: skip
  """Whether a corruption is well-posed, which schedule it wants and how many steps: `Examination`.

  Under P's two stages: noise 0.01 → 0.1, then the corruption.
  """
  shape = images.shape[1:]
  first, last = corruption.level_range[0], strongest(corruption, shape[0])
  verdict = corruptions.check_corruption(
    corruption, shape if images[0].size <= 256 else (6, 4, shape[2]),
    first + (last - first) * np.array([0.0, 0.05, 0.3, 0.7, 1.0]),
  )  # fmt: skip
  if not verdict.ok:
    return Examination(verdict, None, float("nan"), {}, "", [])
  linear = two_stage(corruption, schedules.Linear(first, last), shape)
  try:
    samplers.check_smooth(linear)
    smooth = None
  except ValueError:
    smooth = "jumps: no flow carries the data across a jump, so samplers may end elsewhere"
  clean = images.reshape(len(images), -1)
  gone = priors.corrupt_all(images, linear, 1.0).reshape(clean.shape)
  kept = float(gone.var(axis=0).sum() / clean.var(axis=0).sum())
  gaps = {}
  for kind in priors.KINDS:
    result = grade_prior(linear.with_prior(priors.fit(kind, images, linear, 32)), images)
    gaps[kind] = result["frechet"]
    gaps["floor"] = result["frechet_floor"]
  simple = [k for k in ("zero", "blurred_colour", "subspace") if gaps[k] < 2 * gaps["floor"]]
  prior = simple[0] if simple else min(priors.KINDS, key=gaps.get)
  trials = []
  for kind in kinds:
    if kind == "geometric" and not (first > 0 and last > 0):
      continue
    level, note = level_schedule(kind, corruption, first, last, images)
    lab = Laboratory(mixture, two_stage(corruption, level, shape), images, prior, count=count)
    runs = {rule: lab.needed(rule, nfes) for rule in rules}
    trials.append(
      Trial(
        kind, note, lab.floor.frechet, lab.bound(),
        {rule: nfe for rule, (nfe, _) in runs.items()},
        {rule: min(g.frechet for g in grades) for rule, (_, grades) in runs.items()},
      )
    )  # fmt: skip
  return Examination(verdict, smooth, kept, gaps, prior, trials)


def grade_prior(diffusion, images, seed=0, count=1000):
  """How far prior samples are from corrupted data: the start of sampling against the truth.

  Both sides carry the noise σ_1, drawn independently. The floors are the same distances between two
  disjoint halves of the data: what sampling alone gives.

  Returns:
    A dictionary: "frechet" (squared Fréchet distance in pixels), "frechet_floor", "sinkhorn" (the
    debiased divergence, also a squared distance), "sinkhorn_floor" and "rms_mean" (root mean square
    difference of the two means).
  """
  images = np.asarray(images, np.float32)
  check_range(images, "the images to grade a prior by")
  n = min(count, len(images) // 2)
  if n < 2:
    raise ValueError(f"grading a prior takes at least 4 images, got {len(images)}")
  order = np.random.default_rng(seed).permutation(len(images))
  corrupted = priors.corrupt_all(images[order[: 2 * n]], diffusion, 1.0)
  eta = rng.normal(tf.constant([seed, 0]), 0, 2 * n, diffusion.image_shape).numpy()
  corrupted = (corrupted + float(diffusion.sigma(1.0)) * eta).reshape(2, n, -1)
  drawn = diffusion.draw_prior(tf.range(n, dtype=tf.int64)).numpy().reshape(n, -1)

  def divergence(x, y):
    return float(sinkhorn.sinkhorn_divergence(x, y, relative_epsilon="std").divergence)

  return {
    "frechet": gaussians.frechet_between(drawn, corrupted[0]),
    "frechet_floor": gaussians.frechet_between(corrupted[1], corrupted[0]),
    "sinkhorn": divergence(drawn, corrupted[0]),
    "sinkhorn_floor": divergence(corrupted[1], corrupted[0]),
    "rms_mean": float(np.sqrt(np.mean((drawn.mean(0) - corrupted[0].mean(0)) ** 2))),
  }
