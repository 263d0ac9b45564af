"""Distances between two sides, and the result of a comparison."""

import contextlib
import dataclasses
import importlib
import importlib.util
import pathlib
import sys
import time
import types

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import gaussians, neighbours, packages
from soft_diffusion_tf.evaluation.statistics import BLOCK, PARTS


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


def check_tfgan():
  """Raises the ValueError of a TF-GAN that is missing or does not load, before any long work."""
  _classifier_metrics()


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
      "kid": self.kid,
      "kid_error": self.kid_error,
      "kid_all_pairs": self.kid_all_pairs,
      "inception_score": self.inception_score,
      "precision": self.precision,
      "recall": self.recall,
      "subset": self.subset,
      "real_subset": self.real_subset,
      "spread": self.spread,
    }
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
      **self.conditions,
      **self.numbers(),
      "floor": self.floor,
      "why_no_floor": self.why_no_floor,
      "warnings": self.warnings(),
      "seconds": round(self.seconds, 2),
      "metrics": self.metrics,
    }

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
    distance,
    kid,
    kid_error,
    all_pairs,
    one.inception_score,
    precision,
    recall,
    len(one.rows),
    len(two.rows),
    parts,
    time.monotonic() - start,
    conditions or {},
  )


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
