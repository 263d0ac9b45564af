"""Every metric against a second route in float64 NumPy or SciPy, and against tensorflow_gan."""

import json
import os
import pathlib
import re
import sys
import zipfile

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import tensorflow as tf

from soft_diffusion_tf import (
  data,
  evaluation,
  files,
  gaussians,
  neighbours,
  plots,
  priors,
  training,
)
from soft_diffusion_tf.evaluation import distances, features, references

PIXELS = features.feature_network("pixels")


# --- The second routes --------------------------------------------------------------------------


def frechet_by_scipy(one, two):
  one, two = one.astype(float), two.astype(float)
  s_1, s_2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
  root = scipy.linalg.sqrtm(s_1 @ s_2).real
  gap = one.mean(0) - two.mean(0)
  return gap @ gap + np.trace(s_1 + s_2 - 2 * root)


def kid_by_numpy(one, two, blocks):
  """Bińkowski et al. 2018: the unbiased estimator with k(x, y) = (xᵀy/d + 1)³, over blocks."""
  values = []
  for x, y in zip(np.array_split(one.astype(float), blocks), np.array_split(two, blocks)):
    y = y.astype(float)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    m, n = len(x), len(y)
    k_xx, k_yy = kernel(x, x), kernel(y, y)
    within = (k_xx.sum() - np.trace(k_xx)) / (m * (m - 1))
    within += (k_yy.sum() - np.trace(k_yy)) / (n * (n - 1))
    values.append(within - 2 * kernel(x, y).mean())
  return np.mean(values), np.std(values, ddof=1) / np.sqrt(blocks) if blocks > 1 else np.nan


def inception_score_by_scipy(logits):
  p = scipy.special.softmax(logits.astype(float), axis=1)
  kl = scipy.special.rel_entr(p, p.mean(0, keepdims=True)).sum(1)
  return np.exp(kl.mean())


def statistics(rows, logits=None, batch=37, **options):
  result = evaluation.Statistics(len(rows), **options)
  for k in range(0, len(rows), batch):
    result.update(rows[k : k + batch], None if logits is None else logits[k : k + batch])
  return result


def features_like(rng, count, dimension, scale=1.0):
  mix = rng.standard_normal([dimension, dimension])
  rows = np.maximum(rng.standard_normal([count, dimension]) @ mix, 0)
  return (scale * rows).astype(np.float32)


# --- Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 100, 1024, 5000])
def test_statistics_do_not_depend_on_batches(batch, rng):
  rows, logits = features_like(rng, 2500, 6), rng.standard_normal([2500, 4])
  got = statistics(rows, logits, batch, subset=700)
  assert got.seen == 2500
  np.testing.assert_array_equal(got.rows, rows[:700])
  np.testing.assert_allclose(
    got.moments.covariance, np.cov(rows.astype(float), rowvar=False), rtol=1e-9, atol=1e-9
  )
  for k, part in enumerate(got.parts):
    third = rows[2500 * k // 3 : 2500 * (k + 1) // 3].astype(float)
    assert part.count == len(third)
    np.testing.assert_allclose(part.mean, third.mean(0), rtol=1e-12)
  assert got.inception_score == pytest.approx(inception_score_by_scipy(logits), rel=1e-12)


def test_statistics_go_on_bit_equal_from_their_state(tmp_path, rng):
  rows, logits = features_like(rng, 3000, 5), rng.standard_normal([3000, 4])
  whole = statistics(rows, logits, 100)
  half = evaluation.Statistics(3000)
  for k in range(0, 1300, 100):  # not a border of the blocks that enter the moments
    half.update(rows[k : k + 100], logits[k : k + 100])
  np.savez(tmp_path / "half.npz", **half.state())
  with np.load(tmp_path / "half.npz") as content:
    again = evaluation.Statistics.from_state(dict(content))
  for k in range(1300, 3000, 100):
    again.update(rows[k : k + 100], logits[k : k + 100])
  one, two = whole.state(), again.state()
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], name)


def test_statistics_refuse_what_is_wrong(rng):
  one = evaluation.Statistics(10)
  bad = rng.random([6, 2])
  bad[4, 1] = np.nan
  with pytest.raises(ValueError, match="features of image 4 are not finite"):
    one.update(bad)
  with pytest.raises(ValueError, match="12 images given, 10 were announced"):
    one.update(rng.random([12, 2]))


# --- Numbers ------------------------------------------------------------------------------------


def test_the_frechet_distance_three_ways(rng):
  one, two = features_like(rng, 900, 20), features_like(rng, 800, 20) + 0.1
  got = evaluation.frechet("FD", statistics(one).moments, statistics(two).moments)
  metrics = distances._classifier_metrics()
  tfgan = metrics.frechet_classifier_distance_from_activations(
    tf.constant(one, tf.float64), tf.constant(two, tf.float64)
  )
  assert got.value == pytest.approx(float(tfgan), rel=1e-6)
  assert got.exact == pytest.approx(frechet_by_scipy(one, two), rel=1e-6)
  assert got.value == pytest.approx(got.exact, rel=1e-6)
  assert got.exact == pytest.approx(gaussians.frechet_between(one, two), rel=1e-9)
  assert got.agrees
  assert "exact" not in str(got)
  assert (got.count, got.dimension) == (800, 20)


def test_small_features_show_both_values(rng):
  # Products of variances fall below TF-GAN's 1e-10: its own value from activations is as far off.
  one, two = features_like(rng, 400, 8, 1e-3), features_like(rng, 300, 8, 1e-3)
  got = evaluation.frechet("FD", statistics(one).moments, statistics(two).moments)
  metrics = distances._classifier_metrics()
  tfgan = metrics.frechet_classifier_distance_from_activations(
    tf.constant(one, tf.float64), tf.constant(two, tf.float64)
  )
  assert got.value == pytest.approx(float(tfgan), rel=1e-6)
  assert got.exact == pytest.approx(frechet_by_scipy(one, two), rel=1e-6)
  assert abs(got.value - got.exact) > 1e-3 * got.exact
  assert "(exact " in str(got)
  result = evaluation.compare(PIXELS, statistics(one), statistics(two))
  assert any("1e-10" in line for line in result.warnings())


@pytest.mark.parametrize(("count", "blocks"), [(300, 1), (2500, 3)])
def test_kid_and_its_error(count, blocks, rng):
  one, two = features_like(rng, count, 12, 0.3), features_like(rng, count, 12, 0.3) + 0.05
  value, error = evaluation.kernel_distance(one, two)
  # array_split gives the larger parts first, TF-GAN last: equal up to one row's place.
  want, spread = kid_by_numpy(one[::-1], two[::-1], blocks)
  assert value == pytest.approx(want, rel=1e-9)
  if blocks == 1:
    spread = kid_by_numpy(one[::-1], two[::-1], 8)[1]
  assert error == pytest.approx(spread, rel=1e-9)
  all_pairs = evaluation.kernel_distance_of_all_pairs(one, two, block=130)
  assert all_pairs == pytest.approx(kid_by_numpy(one, two, 1)[0], rel=1e-9)


def test_kid_of_few_rows_has_no_error(rng):
  value, error = evaluation.kernel_distance(rng.random([12, 3]), rng.random([12, 3]))
  assert np.isfinite(value)
  assert np.isnan(error)


def test_kid_of_few_rows_against_many_is_a_number(rng):
  few, many = rng.random([16, 3]), rng.random([10_000, 3])
  value, _ = evaluation.kernel_distance(few, many)
  want = kid_by_numpy(few[::-1], many[::-1], 8)[0]  # two of the few in each block
  assert value == pytest.approx(want, rel=1e-9)


def test_the_inception_score_is_tfgans(rng):
  logits = (5 * rng.standard_normal([700, 9])).astype(np.float32)
  got = statistics(rng.random([700, 2]), logits).inception_score
  want = distances._classifier_metrics().classifier_score_from_logits(tf.constant(logits))
  assert got == pytest.approx(float(want), rel=1e-5)  # TF-GAN casts its result to float32
  # A certain classifier that uses K classes evenly scores K; one that is blind scores 1.
  sure = 1e3 * np.eye(4)[np.arange(400) % 4]
  assert statistics(rng.random([400, 2]), sure).inception_score == pytest.approx(4)
  assert statistics(rng.random([400, 2]), 0 * sure).inception_score == pytest.approx(1)


def test_all_numbers_of_one_comparison(rng):
  one, two = features_like(rng, 600, 7), features_like(rng, 500, 7) + 0.3
  logits = rng.standard_normal([600, 5])
  result = evaluation.compare(PIXELS, statistics(one, logits), statistics(two), k=2)
  want = [frechet_by_scipy(one[k : k + 200], two) for k in (0, 200, 400)]
  assert result.spread == pytest.approx(want, rel=1e-6)
  assert result.inception_score == pytest.approx(inception_score_by_scipy(logits))
  assert 0 < result.precision < 1
  text = str(result)
  for part in ("FD[pixels] ", "thirds ", "(N = 166 each)", "KID ", "IS ", "precision ", "recall "):
    assert part in text
  assert "FID" not in text
  assert result.warnings() == []
  record = json.loads(json.dumps(result.record()))
  assert record["value"] == result.distance.value
  assert (record["subset"], record["real_subset"]) == (600, 500)


def test_few_images_are_warned_of(rng):
  result = evaluation.compare(PIXELS, *(statistics(rng.random([9, 9])) for _ in range(2)))
  assert result.warnings()[0].startswith("N = 9 is not above the 9 features")
  assert result.spread == []
  record = json.dumps(result.record(), allow_nan=False)  # no error bar: null, not NaN
  assert json.loads(record)["kid_error"] is None
  with pytest.raises(ValueError, match="at least 2 images a side, got 1"):
    evaluation.compare(PIXELS, statistics(rng.random([9, 9])), statistics(rng.random([1, 9])))


def test_a_tfgan_that_does_not_load(monkeypatch):
  for name in [n for n in sys.modules if n.split(".")[0] == "tensorflow_gan"]:
    monkeypatch.delitem(sys.modules, name)

  def broken(module):
    raise AttributeError("gone in this version")

  monkeypatch.setattr(distances.importlib, "import_module", broken)
  with pytest.raises(ValueError, match=r"does not load under TensorFlow .*gone in this version"):
    distances._classifier_metrics()
  with pytest.raises(ValueError, match="gone in this version"):  # and it says so every time
    distances._classifier_metrics()


# --- Streams ------------------------------------------------------------------------------------


def test_measuring_images_in_memory(rng):
  images = rng.integers(0, 256, [250, 4, 4, 1]).astype(np.uint8)
  order = rng.permutation(250)
  got = evaluation.measure(PIXELS, evaluation.image_batches(images, order), 230)
  np.testing.assert_allclose(got.rows, images[order[:230]].reshape(230, 16) / 255.0, atol=1e-7)
  with pytest.raises(ValueError, match="300 images asked for, but there are 250"):
    evaluation.measure(PIXELS, evaluation.image_batches(images), 300)


def test_nan_images_are_named():
  images = np.zeros([205, 4, 4, 1], np.float32)
  images[153, 0, 0] = np.nan
  with pytest.raises(ValueError, match="image 153 holds NaN"):
    evaluation.measure(PIXELS, evaluation.image_batches(images), 205)


def test_a_stream_that_dies_goes_on(tmp_path, rng):
  images = rng.random([500, 4, 4, 1], np.float32)
  partial = tmp_path / "partial.npz"
  asked = []

  def batches(start, stop=500):
    asked.append(start)
    for k in range(start, 500, 50):
      if k == stop:
        raise KeyboardInterrupt
      yield images[k : k + 50]

  whole = evaluation.measure(PIXELS, batches, 500)
  with pytest.raises(KeyboardInterrupt):
    evaluation.measure(PIXELS, lambda s: batches(s, 300), 500, partial=partial, every=0.0)
  again = evaluation.measure(PIXELS, batches, 500, partial=partial, every=0.0)
  assert asked == [0, 0, 300]
  assert not partial.exists()
  for name, value in whole.state().items():
    np.testing.assert_array_equal(value, again.state()[name], name)
  partial.write_bytes(b"torn")
  evaluation.measure(PIXELS, batches, 500, partial=partial)
  assert asked[-1] == 0


# --- References ---------------------------------------------------------------------------------


def conditions(count, **changes):
  about = evaluation.conditions_of(PIXELS, "digits", "train", (8, 8, 1), "auto", count)
  return about | changes


@pytest.fixture(scope="module")
def images():
  return data.load("digits", "all").images


def test_a_reference_and_its_floor(images):
  real = evaluation.reference(PIXELS, images, conditions(600), progress=False)
  order = np.random.default_rng(0).permutation(len(images))
  flat = images.reshape(len(images), -1) / 255.0
  want = frechet_by_scipy(flat[order[600:1200]], flat[order[:600]])
  assert real.floor["exact"] == pytest.approx(want, rel=1e-5)  # features are float32
  assert real.floor["count"] == 600
  few = evaluation.reference(PIXELS, images, conditions(1000), progress=False)
  assert few.floor is None
  assert few.why_no_floor == "needs 1000 more real images, 797 are left"
  with pytest.raises(ValueError, match="5000 images asked for, but the data set has 1797"):
    evaluation.reference(PIXELS, images, conditions(5000), progress=False)


def test_the_floor_looks_at_the_same_neighbours_as_the_samples(images, tmp_path):
  make = lambda k: evaluation.reference(
    PIXELS, images, conditions(200), folder=tmp_path, progress=False, k=k
  )
  three, five = make(3), make(5)
  flat = images.reshape(len(images), -1)[np.random.default_rng(0).permutation(len(images))] / 255.0
  for real, k in ((three, 3), (five, 5), (make(3), 3)):
    want = neighbours.precision_recall(flat[:200], flat[200:400], k)
    assert (real.floor["precision"], real.floor["recall"]) == pytest.approx(want)
  assert three.floor["precision"] != five.floor["precision"]
  result = evaluation.with_reference(PIXELS, statistics(flat[400:600]), five, k=3)
  assert result.floor is None
  assert result.why_no_floor == "the reference's floor looks at 5 neighbours, not at 3"


def test_a_reference_is_stored_once(images, tmp_path, monkeypatch):
  first = evaluation.reference(PIXELS, images, conditions(50), folder=tmp_path, progress=False)
  before = references.measure
  monkeypatch.setattr(references, "measure", None)  # whoever measures now fails
  again = evaluation.reference(PIXELS, images, conditions(50), folder=tmp_path, progress=False)
  one = evaluation.compare(PIXELS, first.statistics, again.statistics)
  # Rooting eigenvalues of 1e-16, which singular covariances have, leaves 1e-8 each.
  assert one.distance.exact == pytest.approx(0, abs=1e-6)
  assert again.floor == first.floor
  monkeypatch.setattr(references, "measure", before)
  for changed in ({"count": 51}, {"split": "test"}, {"crop": "none"}):
    evaluation.reference(PIXELS, images, conditions(50) | changed, folder=tmp_path, progress=False)
  evaluation.reference(PIXELS, images ^ 1, conditions(50), folder=tmp_path, progress=False)
  assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("data", "cifar10"),
    ("split", "test"),
    ("image_shape", [32, 32, 3]),
    ("crop", "none"),
    ("feature_net", "tfgan"),
    ("feature_net_sha256", "12ab"),
    ("count", 70),
  ],
)
def test_a_reference_of_something_else_names_the_field(field, value, images, tmp_path):
  evaluation.reference(PIXELS, images, conditions(50), progress=False).save(tmp_path / "r.npz")
  real = evaluation.Reference.load(tmp_path / "r.npz")
  real.check("r.npz", **conditions(50))
  with pytest.raises(ValueError, match=rf"r\.npz: its {field} is .*{re.escape(str(value))}"):
    real.check("r.npz", **(conditions(50) | {field: value}))


def test_a_file_that_is_no_reference(tmp_path):
  (tmp_path / "a.npz").write_bytes(b"torn")
  np.savez(tmp_path / "b.npz", x=1)
  for name in ("a.npz", "b.npz", "none.npz"):
    with pytest.raises(ValueError, match=rf"{name}: no reference statistics in it"):
      evaluation.Reference.load(tmp_path / name)


REFERENCE_DAMAGES = {  # name → (what becomes of the entries, what the error says)
  "a NaN": (lambda c: c | {"mean_0": c["mean_0"] * np.nan}, "mean_0 holds NaN"),
  "texts": (lambda c: c | {"rows": c["rows"].astype("U8")}, "rows holds <U8"),
  "objects": (lambda c: c | {"rows": c["rows"].astype(object)}, "rows holds object"),
  "a subset without end": (lambda c: c | {"sizes": np.array([10**12, 10**12, 50])}, "it counts 50"),
  "a count below 0": (lambda c: c | {"sizes": np.array([50, 50, -1])}, "it counts -1"),
  "other features": (lambda c: c | {"rows": c["rows"][:, :3]}, "differ in size"),
  "a scatter of another size": (lambda c: c | {"scatter_0": np.zeros([2, 2])}, "differ in size"),
  "moments of no images": (lambda c: c | {"count_0": np.array(3)}, "it counts 50"),
  "about a list": (lambda c: c | {"about": np.array("[]")}, "list indices"),
  "about a field more": (lambda c: c | {"about": np.array('{"conditions": {}, "x": 1}')}, "'x'"),
  "no sizes": (lambda c: {k: v for k, v in c.items() if k != "sizes"}, "sizes"),
}


@pytest.mark.parametrize("damage", REFERENCE_DAMAGES)
def test_a_reference_of_unknown_origin_is_checked(damage, images, tmp_path):
  evaluation.reference(PIXELS, images, conditions(50), progress=False).save(tmp_path / "r.npz")
  with np.load(tmp_path / "r.npz") as file:
    content = dict(file)
  change, text = REFERENCE_DAMAGES[damage]
  np.savez(tmp_path / "bad.npz", **change(content))
  with pytest.raises(ValueError, match=rf"bad\.npz: no reference statistics in it \(.*{text}") as e:
    evaluation.Reference.load(tmp_path / "bad.npz")
  assert "\n" not in str(e.value)


def test_a_reference_that_unpacks_without_end_costs_no_memory(tmp_path):
  pack = zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED)
  with pack as archive, archive.open("rows.npy", "w") as entry:
    header = {"descr": "<f4", "fortran_order": False, "shape": (75 << 20,)}
    np.lib.format.write_array_header_1_0(entry, header)
    for _ in range(300):
      entry.write(bytes(1 << 20))
  with pytest.raises(ValueError, match=r"bomb\.npz: .*would unpack to 314,5"):
    evaluation.Reference.load(tmp_path / "bomb.npz")


# --- A run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny, digits):
  process = tiny.build_diffusion()
  process = process.with_prior(priors.fit("blurred_colour", digits, process))
  return training.Run(tiny, training.build(tiny, process), 0)


def test_evaluating_a_run(run, images, tmp_path):
  real = evaluation.reference(PIXELS, images, conditions(100), progress=False)
  kept = []
  result = evaluation.evaluate_run(run, PIXELS, real, 100, keep=kept, progress=False)
  samples = np.concatenate(kept)
  assert samples.shape == (100, 8, 8, 1)
  np.testing.assert_array_equal(run.images(range(20))[:16], samples[:16])
  # An untrained network is no match for real images.
  assert 0 < result.floor["value"] < result.distance.value
  order = np.random.default_rng(0).permutation(len(images))[:100]
  flat = plots.to_uint8(samples).reshape(100, 64) / 255.0
  want = frechet_by_scipy(flat, images[order].reshape(100, 64) / 255.0)
  assert result.distance.exact == pytest.approx(want, rel=1e-4)  # sqrtm of singular matrices
  record = result.record()
  for name, value in {
    "step": 0,
    "sampler": "momentum",
    "nfe": 4,
    "samples": 100,
    "first_seed": 0,
    "ema_decay": 0.999,
  }.items():
    assert record[name] == value
  assert record["reference"]["count"] == 100
  other = evaluation.evaluate_run(run, PIXELS, real, 100, first_seed=100, progress=False)
  assert other.distance.value != result.distance.value
  evaluation.to_tensorboard(tmp_path, record)
  (file,) = (tmp_path / "tensorboard").iterdir()
  tags = {
    value.tag: tf.make_ndarray(value.tensor)
    for event in tf.compat.v1.train.summary_iterator(str(file))
    for value in event.summary.value
  }
  assert tags["evaluation/momentum_4_N100/FD[pixels]"] == pytest.approx(result.distance.value)
  assert "evaluation/momentum_4_N100/kid" in tags


def test_the_floor_of_another_count_is_left_out(run, images):
  real = evaluation.reference(PIXELS, images, conditions(100), progress=False)
  result = evaluation.evaluate_run(run, PIXELS, real, 40, progress=False)
  assert result.floor is None
  assert result.why_no_floor == "the reference's floor is at N = 100"
  with pytest.raises(ValueError, match="at least 2 samples, 1 were asked for"):
    evaluation.evaluate_run(run, PIXELS, real, 1, progress=False)


def test_a_sample_that_is_not_finite_is_named(run, images, monkeypatch):
  real = evaluation.reference(PIXELS, images, conditions(50), progress=False)

  class Broken:
    def images(self, seeds):
      return np.where(np.reshape(seeds, [-1, 1, 1, 1]) == 37, np.nan, np.zeros([1, 8, 8, 1]))

  monkeypatch.setattr(run, "batch_sampler", lambda options: Broken(), raising=False)
  with pytest.raises(ValueError, match="image 37 holds NaN"):
    evaluation.evaluate_run(run, PIXELS, real, 50, progress=False)


def test_records_survive_torn_lines(tmp_path):
  path = tmp_path / "deep" / "r.jsonl"
  assert files.read_records(path) == []
  files.append_record(path, {"a": 1})
  with open(path, "a") as file:
    file.write('{"a": 2, "b"')
  files.append_record(path, {"a": 3})
  assert files.read_records(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.slow
def test_real_images_in_a_real_network(rng):
  """CIFAR-10 test images blurred or not, by a pretrained network: two routes to every number."""
  nets, sets = (os.environ.get(f"SOFT_DIFFUSION_{n}", "") for n in ("FEATURE_NETS", "TFDS"))
  folder = pathlib.Path(nets) / "efficientnet_lite0"
  if not folder.exists() or not sets:
    pytest.skip(
      "set SOFT_DIFFUSION_FEATURE_NETS to a folder with efficientnet_lite0 and SOFT_DIFFUSION_TFDS "
      "to a TFDS folder with cifar10"
    )
  images = data.load("cifar10", "test[:400]", data_dir=sets).images
  net = features.feature_network(str(folder))
  one, two = (
    evaluation.measure(net, evaluation.image_batches(part), 200)
    for part in (images[:200], images[200:])
  )
  result = evaluation.compare(net, one, two)
  rows = [s.rows.astype(float) for s in (one, two)]
  assert result.distance.exact == pytest.approx(frechet_by_scipy(*rows), rel=1e-3)
  assert result.kid == pytest.approx(kid_by_numpy(*rows, 1)[0], rel=1e-6)


@pytest.mark.parametrize("count", [3, 40, 64, 640])
def test_equal_sides_have_no_negative_distance_and_no_worse_advice(count, rng):
  """At 64 rows of 64 values TF-GAN's cut-off leaves 1e-5 of a distance that is 0."""
  rows = rng.random((count, 64))
  moments, other = (gaussians.Moments().update(r) for r in (rows, rng.permutation(rows)))
  shuffled = evaluation.frechet("FD[x]", moments, other)
  assert min(shuffled.value, shuffled.exact) >= 0
  distance = evaluation.frechet("FD[x]", moments, moments)
  assert 0 <= distance.exact < 1e-12
  assert distance.value >= 0
  assert distance.agrees == (abs(distance.value - distance.exact) < 1e-12)
  assert str(distance).startswith("FD[x] ")
