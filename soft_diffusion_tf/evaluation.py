"""How near images are to real ones: Fréchet distance, KID, Inception score, precision and recall.

Images stream through a feature network in batches and leave `Statistics` behind: moments in
float64, the features of the first few thousand images, sums for the Inception score. Neither images
nor all features are ever in memory or on disk. Two sides' statistics make a `Result`, which carries
the conditions that its numbers hold under.

Fréchet distance, KID and Inception score are tensorflow_gan's; this is its only importer. A number
from any feature network but TF-GAN's Inception is called FD[name], never FID: only numbers from one
network at one N compare.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
import types

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import arrays, gaussians, neighbours, packages, plots
from soft_diffusion_tf.images import check_range

PARTS = 3  # disjoint parts of one side, for the spread
BLOCK = 1024  # features that are gathered before they enter the moments; also TF-GAN's KID block
FEATURE_BATCH = 100
SUBSET = 10_000


def _classifier_metrics():
  """tensorflow_gan's `classifier_metrics`.

  Its package cannot be imported with TensorFlow 2.16 and later (it needs tf.estimator, which is
  gone), but this module itself needs only TensorFlow and TensorFlow Probability. So the packages
  above it are entered as empty modules that know only where their files are.
  """
  name = "tensorflow_gan.python.eval.classifier_metrics"
  if name in sys.modules:
    return sys.modules[name]
  spec = importlib.util.find_spec("tensorflow_gan")
  if spec is None or not spec.submodule_search_locations:
    with packages.needed("tensorflow-gan==2.1.0", "the distance between images"):
      raise ImportError("it is not installed")
  root = pathlib.Path(spec.submodule_search_locations[0])
  for package, folder in (
    ("tensorflow_gan", root),
    ("tensorflow_gan.python", root / "python"),
    ("tensorflow_gan.python.eval", root / "python" / "eval"),
  ):
    module = types.ModuleType(package)
    module.__path__ = [str(folder)]
    sys.modules.setdefault(package, module)
  try:
    return importlib.import_module(name)
  except Exception as error:  # whatever a later TensorFlow breaks inside it
    for package in [n for n in sys.modules if n.split(".")[0] == "tensorflow_gan"]:
      del sys.modules[package]
    raise ValueError(
      f"tensorflow_gan's classifier_metrics does not load under TensorFlow {tf.__version__} "
      f"({type(error).__name__}: {error}); install the versions of requirements.lock"
    ) from None


# --- One side -----------------------------------------------------------------------------------


class Statistics:
  """What the metrics need of `count` images, gathered in one pass over their features.

  Attributes:
    count: images expected; seen: images so far.
    parts: `gaussians.Moments` of three disjoint parts of the images, in their order.
    rows: the first `subset` features, float32 [·, D].
    score: sums of p and of Σ p log p over the images, for the Inception score; None without logits.
  """

  def __init__(self, count, subset=SUBSET):
    self.count, self.subset, self.seen = count, min(subset, count), 0
    self.parts = [gaussians.Moments() for _ in range(PARTS)]
    self.score = None
    self._rows = None
    self._waiting = []

  @property
  def rows(self):
    return self._rows[: min(self.seen, self.subset)]

  @property
  def dimension(self):
    return self._rows.shape[1]

  @property
  def moments(self):
    """Of all images."""
    return sum(self.parts[1:], self.parts[0])

  def update(self, features, logits=None):
    """Adds features [n, D] and logits [n, K] of the next n images."""
    features = np.asarray(features, np.float32)
    if self.seen + len(features) > self.count:
      raise ValueError(f"{self.seen + len(features)} images given, {self.count} were announced")
    if not np.all(np.isfinite(features)):
      bad = self.seen + int(np.argmin(np.isfinite(features).all(1)))
      raise ValueError(f"the features of image {bad} are not finite; look at that image")
    if self._rows is None:
      self._rows = np.empty([self.subset, features.shape[1]], np.float32)
    kept = features[: max(0, self.subset - self.seen)]
    self._rows[self.seen : self.seen + len(kept)] = kept
    if logits is not None:
      self._add_logits(np.asarray(logits, np.float64))
    self.seen += len(features)
    self._waiting.append(features)
    if self.seen == self.count or sum(map(len, self._waiting)) >= BLOCK:
      self._flush()
    return self

  def _flush(self):
    rows = np.concatenate(self._waiting)
    self._waiting = []
    start = self.seen - len(rows)
    bounds = [self.count * k // PARTS for k in range(PARTS + 1)]
    for part, low, high in zip(self.parts, bounds, bounds[1:]):
      part.update(rows[max(low - start, 0) : max(high - start, 0)])

  def _add_logits(self, logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    sums = np.append(p.sum(axis=0), (p * log_p).sum())
    self.score = sums if self.score is None else self.score + sums

  @property
  def inception_score(self):
    """exp of the mean KL(p(y|x) ‖ p(y)), in one piece as TF-GAN has it; None without logits."""
    if self.score is None:
      return None
    q = self.score[:-1] / self.count
    return float(np.exp(self.score[-1] / self.count - np.sum(q * np.log(np.maximum(q, 1e-300)))))

  def state(self, merged=False):
    """All of it as arrays, for an npz; `merged` joins the three parts, for a third of the space."""
    content = {"sizes": np.array([self.count, self.subset, self.seen])}
    if self._rows is not None:
      content["rows"] = self.rows
      content["waiting"] = np.concatenate([np.empty([0, self.dimension]), *self._waiting])
    if self.score is not None:
      content["score"] = self.score
    for k, part in enumerate([self.moments] if merged else self.parts):
      if part.count:
        content[f"count_{k}"] = np.array(part.count)
        content[f"mean_{k}"], content[f"scatter_{k}"] = part.mean, part.scatter
    return content

  @classmethod
  def from_state(cls, content, whole=False):
    """The statistics that `state` gave, of all their images if `whole`.

    Raises:
      ValueError: arrays that do not belong together.
    """
    count, subset, seen = (int(v) for v in content["sizes"])
    rows, waiting = content.get("rows"), content.get("waiting")
    parts = [k for k in range(PARTS) if f"count_{k}" in content]
    shapes = [np.shape(content[f"scatter_{k}"]) for k in parts]
    shapes += [np.shape(content[f"mean_{k}"]) * 2 for k in parts]
    if rows is not None:  # before room is made for what a file claims
      if np.ndim(rows) != 2 or np.ndim(waiting) != 2:
        raise ValueError("its features are no table")
      shapes += [rows.shape[1:] * 2, waiting.shape[1:] * 2]
    if len(set(shapes)) > 1:
      raise ValueError(f"its moments and features differ in size: {sorted(set(shapes))}")
    inside = (seen == count if whole else 0 <= seen <= count) and 0 <= subset <= count
    counted = sum(int(content[f"count_{k}"]) for k in parts)
    have = (0, 0) if rows is None else (len(rows), len(waiting))
    if not inside or have[0] != min(seen, subset) or counted + have[1] != seen:
      raise ValueError(f"it counts {seen} of {count} images and has {counted} and {have}")
    result = cls(count, subset)
    result.seen = seen
    if rows is not None:
      result._rows = np.empty([result.subset, rows.shape[1]], np.float32)
      result._rows[: len(rows)] = rows
      if len(waiting):
        result._waiting = [np.float32(waiting)]
    if "score" in content:
      result.score = content["score"]
    for k in parts:
      part = result.parts[k]
      part.count = int(content[f"count_{k}"])
      part.mean, part.scatter = content[f"mean_{k}"], content[f"scatter_{k}"]
    return result


def measure(network, batches, count, subset=SUBSET, progress=None, partial=None, every=60.0):
  """`Statistics` of `count` images.

  Args:
    network: a `features.FeatureNetwork`.
    batches: a function start → iterator over batches [B, H, W, C], uint8 or float in [0, 1], of the
      images from number `start` on.
    partial: a file that keeps what is done so far, written every `every` seconds, so that a run
      that dies goes on from there; gone once all is done.

  Raises:
    ValueError: images that are not finite (named), or fewer than `count`.
  """
  statistics = Statistics(count, subset)
  if partial is not None:
    with contextlib.suppress(ValueError):  # none yet, or a torn one
      before, _ = _read(partial)
      if (before.count, before.subset) == (count, min(subset, count)):
        statistics = before
  saved = time.monotonic()
  bar = tqdm.tqdm(
    total=count, initial=statistics.seen, desc=progress or "", unit="image",
    disable=progress is None,
  )  # fmt: skip
  with bar:
    for images in batches(statistics.seen) if statistics.seen < count else ():
      images = images[: count - statistics.seen]
      finite = np.isfinite(images).all((1, 2, 3))
      if not finite.all():
        raise ValueError(
          f"image {statistics.seen + int(np.argmin(finite))} holds NaN or infinite values; a "
          "sampled one: lower the number of steps or look at the checkpoint"
        )
      if np.asarray(images).dtype != np.uint8:
        check_range(images, f"the images from number {statistics.seen} on")
      statistics.update(*network(images))
      bar.update(len(images))
      if statistics.seen == count:
        break
      if partial is not None and time.monotonic() - saved >= every:
        _write_npz(partial, statistics.state())
        saved = time.monotonic()
  if statistics.seen < count:
    raise ValueError(f"{count} images asked for, but there are {statistics.seen}; ask for fewer")
  if partial is not None:
    pathlib.Path(partial).unlink(missing_ok=True)
  return statistics


def _read(path, whole=False):
  """`Statistics` in an npz, of all their images if `whole`, and the text "about" there or None.

  Raises:
    ValueError: one line; the file is missing, torn, or something else.
  """
  remedy = "make them with soft-diffusion-reference-stats"
  with arrays.opened(path, "no reference statistics in it", remedy) as content:
    kinds = ("float32", "float64", "int64")
    about = content.text("about") if "about" in content.names else None
    names = [name for name in content.names if name != "about"]
    state = {name: content.array(name, dtypes=kinds) for name in names}
    return Statistics.from_state(state, whole), about


def _write_npz(path, content):
  """Writes an npz so that a reader finds the old one or the new one, whole."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{os.getpid()}.npz")
  np.savez(partial, **content)
  partial.replace(path)


def image_batches(images, order=None):
  """Batches of images in memory, in an order [N] of indices: for `measure`."""
  order = np.arange(len(images)) if order is None else order

  def batches(start):
    for k in range(start, len(order), FEATURE_BATCH):
      yield images[order[k : k + FEATURE_BATCH]]

  return batches


def sample_batches(run, seeds, options, keep=None):
  """Batches of a run's samples for image seeds [N], as 8-bit images like the real ones.

  Args:
    keep: a list that the batches are also put into, as floats.
  """
  drawer = run.drawer(options)

  def batches(start):
    for k in range(start, len(seeds), options.batch_size):
      images = drawer.images(seeds[k : k + options.batch_size])
      if keep is not None:
        keep.append(images)
      # NaN has no 8-bit value: such a batch stays float, for `measure` to name the image.
      yield plots.to_uint8(images) if np.isfinite(images).all() else images

  return batches


# --- Reference ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
  """Real images' statistics, with all that says what they are of.

  `conditions` are those of `conditions_of` and "content", a digest of the images; `floor` holds the
  numbers of as many other real images against these, or None with the reason in `why_no_floor`.
  """

  statistics: Statistics
  conditions: dict
  floor: dict | None = None
  why_no_floor: str = ""

  def save(self, path):
    content = self.statistics.state(merged=True)
    about = {
      "conditions": self.conditions, "floor": self.floor, "why_no_floor": self.why_no_floor
    }  # fmt: skip
    _write_npz(path, {**content, "about": np.array(json.dumps(about))})

  @classmethod
  def load(cls, path):
    """A stored reference; a ValueError for a file that is none."""
    statistics, about = _read(path, whole=True)
    try:
      fields = json.loads(about or "")
      if not isinstance(fields["conditions"], dict):
        raise ValueError("its conditions are no object")
      return cls(statistics, **fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      raise ValueError(
        f"{path}: no reference statistics in it ({error}); make them with "
        "soft-diffusion-reference-stats"
      ) from None

  def check(self, path, **expected):
    """Raises a ValueError naming the first condition that is not the expected one."""
    for field, want in expected.items():
      found = self.conditions.get(field)
      if found != want:
        raise ValueError(
          f"{path}: its {field} is {found!r}, but {want!r} is evaluated; make the statistics anew "
          "with soft-diffusion-reference-stats"
        )
    return self


def conditions_of(network, data, split, image_shape, crop, count):
  """A reference's conditions, but for its images' content."""
  return {
    "data": data, "split": split, "image_shape": list(image_shape), "crop": crop,
    "feature_net": network.name, "feature_net_sha256": network.digest, "count": int(count),
  }  # fmt: skip


def check_count(count, available, what="the data set"):
  """Raises the ValueError of a number of images that cannot be had."""
  if count < 2:
    raise ValueError(f"a Fréchet distance takes at least 2 samples, {count} were asked for")
  if count > available:
    raise ValueError(
      f"{count} images asked for, but {what} has {available}; lower evaluation.samples or take a "
      "larger split"
    )


def reference(network, images, conditions, subset=SUBSET, floor_count=None, folder=None,
              progress=True, k=3):  # fmt: skip
  """The `Reference` of the first `conditions["count"]` images in a fixed random order.

  Args:
    images: uint8 [M, H, W, C]; the ones after the reference's, as many as `floor_count` (by default
      as many as the reference has), give the floor where there are enough.
    folder: where it is kept and found again.
    k: precision and recall of the floor look at the k-th neighbours.
  """
  count = conditions["count"]
  check_count(count, len(images))
  floor_count = floor_count or count
  content = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
  conditions = {**conditions, "content": content}
  path = None
  if folder is not None:
    text = json.dumps([conditions, subset, floor_count, k], sort_keys=True)
    path = pathlib.Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    with contextlib.suppress(ValueError):  # none, or a damaged one: it is made again
      return Reference.load(path).check(path, **conditions)
  order = np.random.default_rng(0).permutation(len(images))
  say = (lambda text: text) if progress else (lambda text: None)
  statistics = measure(
    network, image_batches(images, order[:count]), count, subset, say("features (real)")
  )
  floor, why = None, ""
  rest = order[count : count + floor_count]
  if len(rest) == floor_count:  # a floor at another N would be another number
    others = measure(
      network, image_batches(images, rest), floor_count, subset, say("features (floor)")
    )
    result = compare(network, others, statistics, k, spread=False)
    floor = {"samples": floor_count, "neighbours": k} | result.numbers()
  else:
    why = f"needs {floor_count} more real images, {len(rest)} are left"
  real = Reference(statistics, conditions, floor, why)
  if path is not None:
    real.save(path)
  return real


# --- Numbers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distance:
  """A Fréchet distance.

  Attributes:
    label: "FID" or "FD[name]".
    value: tensorflow_gan's number.
    exact: the same in float64 without TF-GAN's cut-off of small eigenvalues.
    count: number of images on the smaller side.
    dimension: of the features.
  """

  label: str
  value: float
  exact: float
  count: int
  dimension: int

  @property
  def agrees(self):
    """Whether TF-GAN's number is right to 0.1 %."""
    return abs(self.value - self.exact) <= 1e-3 * abs(self.exact)

  def __str__(self):
    text = f"{self.label} {self.value:.4g}"
    return text if self.agrees else f"{text} (exact {self.exact:.4g})"


def frechet(label, one, two):
  """The `Distance` of two `gaussians.Moments`.

  tensorflow_gan computes it from activations alone; this is its formula with its own
  `trace_sqrt_product`, on moments that were accumulated in float64.
  """
  if min(one.count, two.count) < 2:
    raise ValueError(
      f"a Fréchet distance takes at least 2 images a side, got {min(one.count, two.count)}"
    )
  s_1, s_2 = one.covariance, two.covariance
  root = float(_classifier_metrics().trace_sqrt_product(tf.constant(s_1), tf.constant(s_2)))
  gap = one.mean - two.mean
  value = max(float(gap @ gap + np.trace(s_1) + np.trace(s_2) - 2.0 * root), 0.0)
  exact = gaussians.frechet_distance(one.mean, s_1, two.mean, s_2)
  if abs(value - exact) <= 1e-12 * (np.trace(s_1) + np.trace(s_2)):  # rounding of what is equal
    value = exact
  return Distance(label, value, exact, min(one.count, two.count), len(one.mean))


def kernel_distance(one, two):
  """KID of two sets of rows and its standard error, by tensorflow_gan in float64.

  The value is TF-GAN's at its block size, or at a larger one where that would leave the smaller
  set fewer than 2 rows a block. One block alone has no spread: then the error is that of
  eight blocks, a slight overestimate; it is NaN where these would have fewer than 2 rows.
  """
  kid = _classifier_metrics().kernel_classifier_distance_and_std_from_activations
  one, two = (tf.cast(rows, tf.float64) for rows in (one, two))  # no second copy in NumPy
  larger, smaller = max(len(one), len(two)), min(len(one), len(two))
  block = max(BLOCK, -(-larger // max(smaller // 2, 1)))
  with _quiet():
    value, error = kid(one, two, block)
    if larger <= block:
      error = kid(one, two, -(-larger // 8))[1] if smaller >= 16 else np.nan
  return float(value), float(error)


def kernel_distance_of_all_pairs(one, two, block=2048):
  """KID by all pairs of rows instead of TF-GAN's blocks: the estimator of least variance.

  Source: Gretton et al. 2012, Eq. 3 (unbiased), with the kernel of Bińkowski et al. 2018.
  """

  def total(x, y):
    values = [
      tf.reduce_sum((tf.matmul(a, b, transpose_b=True) / x.shape[1] + 1.0) ** 3)
      for a in _float64(x, block)
      for b in _float64(y, block)
    ]
    return float(sum(values))

  def own(x):  # Σ k(x, x), which the unbiased estimator leaves out
    return sum(float(np.sum((np.sum(a**2, 1) / x.shape[1] + 1.0) ** 3)) for a in _float64(x, block))

  m, n = len(one), len(two)
  within = [(total(x, x) - own(x)) / (len(x) * (len(x) - 1)) for x in (one, two)]
  return sum(within) - 2.0 * total(one, two) / (m * n)


def _float64(rows, block):
  for k in range(0, len(rows), block):
    yield np.asarray(rows[k : k + block], np.float64)


@contextlib.contextmanager
def _quiet():
  """Without TensorFlow's warnings of what TF-GAN calls and a later version deprecates."""
  logger = tf.get_logger()
  before = logger.level
  logger.setLevel("ERROR")
  try:
    yield
  finally:
    logger.setLevel(before)


@dataclasses.dataclass(frozen=True)
class Result:
  """All numbers of one comparison, and the conditions that they hold under.

  Attributes:
    distance: the headline.
    kid, kid_error: TF-GAN's kernel distance and its standard error, on the first `subset` images
      and `real_subset` real ones; kid_all_pairs: the same without its blocks.
    inception_score: None where the network has no logits.
    precision, recall: on the same subsets.
    spread: exact Fréchet distances of three disjoint parts (a third of N each) to the reference; []
      where a part would have no more images than features.
    seconds: of the computation after extraction.
    conditions: whatever the caller adds.
    metrics: what `experiment.Evaluation.metrics` gave: "metric/name" → number.
    floor: the numbers of real images against the reference, or None; `why_no_floor` says why.
  """

  distance: Distance
  kid: float
  kid_error: float
  kid_all_pairs: float
  inception_score: float | None
  precision: float | None
  recall: float | None
  subset: int
  real_subset: int
  spread: list
  seconds: float
  conditions: dict = dataclasses.field(default_factory=dict)
  floor: dict | None = None
  why_no_floor: str = ""
  remark: str = ""  # on the weights
  metrics: dict = dataclasses.field(default_factory=dict)

  def numbers(self):
    """The numbers alone, for JSON: None where there is none."""
    values = {
      **dataclasses.asdict(self.distance),
      "kid": self.kid, "kid_error": self.kid_error, "kid_all_pairs": self.kid_all_pairs,
      "inception_score": self.inception_score, "precision": self.precision,
      "recall": self.recall, "subset": self.subset, "real_subset": self.real_subset,
      "spread": self.spread,
    }  # fmt: skip
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in values.items()}

  def warnings(self):
    """What to keep in mind, a line each."""
    d, lines = self.distance, [self.remark] if self.remark else []
    if d.count <= d.dimension:
      lines.append(
        f"N = {d.count} is not above the {d.dimension} features: the distance is biased upwards"
      )
    if not d.agrees:
      lines.append(
        "TF-GAN leaves eigenvalues below 1e-10 unrooted; the exact value is the one to go by"
      )
    return lines

  def record(self):
    """Everything, ready for JSON."""
    return {
      **self.conditions, **self.numbers(), "floor": self.floor, "why_no_floor": self.why_no_floor,
      "warnings": self.warnings(), "seconds": round(self.seconds, 2), "metrics": self.metrics,
    }  # fmt: skip

  def __str__(self):
    """One line: the headline and the other numbers."""
    parts = [str(self.distance)]
    if self.spread:
      parts.append(
        f"thirds {np.mean(self.spread):.4g} ± {np.std(self.spread, ddof=1):.2g} "
        f"(N = {self.distance.count // PARTS} each)"
      )
    error = "" if np.isnan(self.kid_error) else f" ± {self.kid_error:.2g}"
    parts.append(f"KID {self.kid:.4g}{error}")
    if self.inception_score is not None:
      parts.append(f"IS {self.inception_score:.4g}")
    if self.precision is not None:
      parts.append(f"precision {self.precision:.3f}, recall {self.recall:.3f}")
    parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
    return "; ".join(parts)

  def floor_line(self):
    """The floor in one line."""
    if self.floor is None:
      return self.why_no_floor
    text = f"{self.floor['label']} {self.floor['value']:.4g}; KID {self.floor['kid']:.4g}"
    if self.floor["precision"] is not None:
      text += f"; precision {self.floor['precision']:.3f}, recall {self.floor['recall']:.3f}"
    return text


def compare(network, one, two, k=3, spread=True, conditions=None):
  """The `Result` of images (`Statistics` one) against real ones (two)."""
  start = time.monotonic()
  distance = frechet(network.label, one.moments, two.moments)
  parts = []
  if spread and one.count // PARTS > one.dimension:
    moments = two.moments
    parts = [
      gaussians.frechet_distance(p.mean, p.covariance, moments.mean, moments.covariance)
      for p in one.parts
    ]
  kid, kid_error = kernel_distance(one.rows, two.rows)
  all_pairs = kernel_distance_of_all_pairs(one.rows, two.rows)
  precision = recall = None
  if min(len(one.rows), len(two.rows)) > k:
    precision, recall = neighbours.precision_recall(two.rows, one.rows, k)
  return Result(
    distance, kid, kid_error, all_pairs, one.inception_score, precision, recall,
    len(one.rows), len(two.rows), parts, time.monotonic() - start, conditions or {},
  )  # fmt: skip


def with_reference(network, one, real, k=3, conditions=None):
  """`compare` against a `Reference`, with its floor if that is at the same N and k."""
  result = compare(network, one, real.statistics, k, conditions=conditions)
  floor, why = real.floor, real.why_no_floor
  if floor is not None and floor["samples"] != one.count:
    floor, why = None, f"the reference's floor is at N = {floor['samples']}"
  elif floor is not None and (its := floor.get("neighbours", 3)) != k:  # older files: always 3
    floor, why = None, f"the reference's floor looks at {its} neighbours, not at {k}"
  return dataclasses.replace(result, floor=floor, why_no_floor=why)


def by_metrics(options, images, real):
  """{"metric/name": number} by the metrics of `experiment.Evaluation`, on the first `subset` images
  and real ones, uint8.

  Raises:
    ValueError: a metric gives something else than numbers by name.
  """
  numbers = {}
  for metric in options.metrics:
    found = metric(images[: options.subset], real[: options.subset])
    try:
      numbers |= {f"{metric}/{name}": float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
      raise ValueError(
        f"the metric {metric} must give numbers by name, as {{'gap': 0.1}}, not {found!r}"
      ) from None
  return numbers


# --- A run --------------------------------------------------------------------------------------


def run_conditions(experiment, step, options, count, first_seed=0, averaged=True):
  """What a run's numbers depend on, besides network and reference."""
  decay = experiment.training.ema_decay if averaged else 0.0  # without memory it is no average
  return {
    "experiment": experiment.name, "step": int(step), "ema_decay": decay,
    "sampler": str(options.sampler), "nfe": options.evaluations,
    "sampling": json.loads(json.dumps(options.to_dict())),
    "samples": int(count), "first_seed": int(first_seed),
  }  # fmt: skip


def evaluate_run(run, network, real, count, options=None, *, first_seed=0, keep=None, progress=True,
                 partial=None, every=60.0, real_images=None):  # fmt: skip
  """`count` samples of a run, by its averaged weights, against a `Reference`.

  Args:
    first_seed: samples are of image seeds first_seed … first_seed + count − 1.
    keep: a list that batches of samples are put into; else none outlives its batch.
    partial, every: see `measure`.
    real_images: uint8 [N, H, W, C], for the metrics of the config; by default the training split.
  """
  options = options or run.experiment.sampling
  e = run.experiment.evaluation
  kept = keep if keep is not None or not e.metrics or partial else []
  check_count(count, np.inf)
  seeds = np.arange(first_seed, first_seed + count)
  statistics = measure(
    network, sample_batches(run, seeds, options, kept), count, e.subset,
    "sampling" if progress else None, partial, every,
  )  # fmt: skip
  about = run_conditions(run.experiment, run.step, options, count, first_seed, run.averaged)
  about |= {"reference": real.conditions}
  result = with_reference(network, statistics, real, e.neighbours, about)
  metrics = {}
  if e.metrics:
    if real_images is None:
      real_images = run.experiment.data.load(progress=False).images
    if kept is None:  # a part of the samples may have been drawn by a process before this one
      kept = [run.images(seeds[: e.subset], options)]
    metrics = by_metrics(e, plots.to_uint8(np.concatenate(kept)), real_images)
  return dataclasses.replace(result, remark=run.remark, metrics=metrics)


# --- Records ------------------------------------------------------------------------------------


def append_record(path, record):
  """Adds a line of JSON to a file, after a newline where a killed writer left half a line."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "ab+") as file:
    file.seek(0, os.SEEK_END)
    torn = False
    if file.tell():
      file.seek(-1, os.SEEK_END)
      torn = file.read(1) != b"\n"
    file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read_records(path):
  """The records of such a file; half lines are left out."""
  path = pathlib.Path(path)
  records = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if isinstance(record, dict):
      records.append(record)
  return records


def to_tensorboard(workdir, record):
  """The numbers of a run's record as scalars under the checkpoint's step."""
  writer = tf.summary.create_file_writer(str(pathlib.Path(workdir) / "tensorboard"))
  where = f"evaluation/{record['sampler']}_{record['nfe']}_N{record['samples']}"
  where += "" if record["ema_decay"] else "_raw"
  with writer.as_default():
    tf.summary.scalar(f"{where}/{record['label']}", record["value"], record["step"])
    for name in ("exact", "kid", "inception_score", "precision", "recall"):
      if record[name] is not None:
        tf.summary.scalar(f"{where}/{name}", record[name], record["step"])
    for name, value in record.get("metrics", {}).items():
      tf.summary.scalar(f"{where}/{name}", value, record["step"])
  writer.close()
