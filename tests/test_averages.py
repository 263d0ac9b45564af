"""Averages of weights by power functions: the profile, and those of a length chosen afterwards."""

import math
import shutil

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import averages, evaluation, export, training
from soft_diffusion_tf.evaluation import features, references, sweeps
from soft_diffusion_tf.training import snapshots
from soft_diffusion_tf.training.checkpoints import Checkpoints
from tests import conftest
from tests.bin.test_programs import error_of, program


def profile(exponent, steps):
  """The weight of each step by running the recursion on unit vectors."""
  weights = np.zeros(steps)
  for t in range(1, steps + 1):
    share = float(averages.share(exponent, tf.constant(t)))
    weights *= 1 - share
    weights[t - 1] += share
  return weights


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, averages.LONGEST])
def test_a_length_is_the_standard_deviation_of_the_profile(length):
  gamma = averages.exponent(length)
  weights, steps = profile(gamma, 2000), np.arange(1, 2001)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)  # nothing is left of the start
  mean = weights @ steps
  got = np.sqrt(weights @ (steps - mean) ** 2) / 2000
  np.testing.assert_allclose(got, length, rtol=0.02)  # of 2,000 steps, not of a continuum


def test_known_exponents():
  """Of EDM2 (Karras et al. 2024, section 3.1): lengths 0.05 and 0.10 have γ = 16.97 and 6.94."""
  assert round(averages.exponent(0.05), 2) == 16.97
  assert round(averages.exponent(0.1), 2) == 6.94


def test_products_are_integrals():
  t = (np.arange(200_000) + 0.5) / 200_000 * 50
  p = lambda end, g: np.where(t <= end, (g + 1) * t**g / end ** (g + 1), 0.0)
  got = averages.products([50, 30], [2.0, 6.5], [40, 30], [0.0, 6.5])
  want = [
    [np.mean(p(50, 2.0) * p(e, g)) * 50 for e, g in ((40, 0.0), (30, 6.5))],
    [np.mean(p(30, 6.5) * p(e, g)) * 50 for e, g in ((40, 0.0), (30, 6.5))],
  ]
  np.testing.assert_allclose(got, want, rtol=1e-3)  # of the midpoint rule at the profiles' ends


def test_a_length_that_was_kept_is_made_exactly_and_more_are_made_better():
  both = [averages.exponent(0.05), averages.exponent(0.1)]
  factors, error = averages.combination([80, 80, 100, 100], both * 2, 100, both[1])
  np.testing.assert_allclose(factors, [0, 0, 0, 1], atol=1e-6)
  assert error < 1e-6
  errors = []
  for count in (2, 8, 32):
    steps = np.repeat(np.linspace(1000 / count, 1000, count), 2)
    errors.append(averages.combination(steps, both * count, 1000, averages.exponent(0.15))[1])
  assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("length", [0, -0.1, 0.3, math.nan, "0.1", True, None])
def test_what_is_no_length(length):
  with pytest.raises(ValueError, match=r"is no length of an average; give a share"):
    averages.check_length(length)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """An experiment with averages, the folder of its run, and the weights after each step."""
  folder = tmp_path_factory.mktemp("averages")
  e = conftest.tiny.__wrapped__()
  e = e.replace(
    name="kept",
    training={
      "steps": 12,
      "averages": (0.05, 0.1),
      "average_every": 3,
      "checkpoint_every": 12,
      "steps_per_loop": 1,
      "keep_every": 1,
      "log_every": 0,
    },
  )
  training.train(e, folder / "w", progress=False)
  return e, folder / "w"


def weights_by_step(e, workdir):
  model = training.build(e, e.build_diffusion())
  checkpoints = Checkpoints(workdir / "checkpoints", model)
  for step in range(1, e.training.steps + 1):
    checkpoints.restore(step)
    yield [v.numpy() for v in model.network.trainable_variables]


def test_an_average_is_that_of_the_weights_of_all_steps(kept):
  e, workdir = kept
  history = list(weights_by_step(e, workdir))
  assert snapshots.steps_in(workdir) == [3, 6, 9, 12]
  for length, tolerance in ((0.05, 1e-6), (0.1, 1e-6), (0.08, 2e-3)):
    run = training.load(workdir, length=length)
    profile_of = profile(averages.exponent(length), 12)
    moved = max(np.max(np.abs(b - a)) for a, b in zip(history[0], history[-1]))
    for got, *each in zip((a for a, _ in run.model._averaged), *history):
      want = sum(w * v for w, v in zip(profile_of, each))
      # What was not kept is made up to a part of what the weights moved on the way.
      np.testing.assert_allclose(got.numpy(), want, atol=1e-6 + tolerance * moved, rtol=1e-6)
    assert run.weights == {"ema_decay": None, "ema_length": length}
    assert (run.error < 1e-6) == (length != 0.08)


def test_what_cannot_be_made_well_is_said(kept):
  _, workdir = kept
  text = training.load(workdir, length=0.25).remark
  assert "an average of length 0.25 can be made up to" in text
  assert training.load(workdir, length=0.1).remark == ""
  with pytest.raises(ValueError, match="no raw weights"):
    training.load(workdir, length=0.1, averaged=False)


def test_a_run_that_was_stopped_keeps_the_same_averages(kept, tmp_path):
  e, whole = kept
  training.train(e.replace(training={"steps": 4}), tmp_path / "w", progress=False)
  (tmp_path / "w" / "averages" / "000000015.npz").write_bytes(b"of steps that were lost")
  training.train(e.replace(training={"steps": 8}), tmp_path / "w", progress=False)
  assert snapshots.steps_in(tmp_path / "w") == [3, 6]
  for step in (3, 6):
    one, two = (np.load(f / "averages" / f"{step:09d}.npz") for f in (whole, tmp_path / "w"))
    assert one.files == two.files
    for name in one.files:
      np.testing.assert_array_equal(one[name], two[name])


def test_damage_is_one_line(kept, tmp_path):
  _, workdir = kept
  shutil.copytree(workdir, tmp_path / "w")
  file = tmp_path / "w" / "averages" / "000000006.npz"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"000000006\.npz: no averages of this run \(.*remove") as e:
    training.load(tmp_path / "w", length=0.07)
  assert "\n" not in str(e.value)
  file.unlink()
  assert training.load(tmp_path / "w", length=0.07).error < 0.1


def test_a_run_without_averages_says_how_to_have_them(tmp_path):
  training.write(export.from_pretrained("digits"), tmp_path / "w")
  with pytest.raises(ValueError, match=r"without training\.averages.*--config\.training\.averages"):
    training.load(tmp_path / "w", length=0.1)
  assert not (tmp_path / "w" / "averages").exists()


def test_a_warm_up_forgets_the_start(tiny, digits):
  """(1 + n) / (10 + n) after n steps, until that is the decay."""
  e = tiny.replace(training={"ema_warmup": True, "ema_decay": 0.5})
  model = training.build(e, e.build_diffusion())
  average, value = model._averaged[0]
  want = value.numpy()
  for step in range(12):
    model.update(tf.constant(digits[:16]))
    decay = min(0.5, (1 + step) / (10 + step))
    want = decay * want + (1 - decay) * value.numpy()
    np.testing.assert_allclose(average.numpy(), want, atol=1e-6)


def test_the_length_travels_through_a_sweep_and_a_packed_model(kept, tmp_path):
  _, original = kept
  workdir = tmp_path / "w"
  shutil.copytree(original, workdir)
  network = features.feature_network("pixels")
  images = training.load(workdir).experiment.data.load(progress=False).images[:64]
  about = references.conditions_of(network, "digits", "train", (8, 8, 1), "auto", 64)
  real = evaluation.reference(network, images, about, 64, 40, None)
  cells = sweeps.sweep(
    workdir,
    network,
    real,
    40,
    names=["momentum"],
    nfes=[3],
    steps=[12],
    lengths=[None, 0.05, 0.1],
    progress=False,
  )
  assert [c.get("ema_length") for c in cells] == [None, 0.05, 0.1]
  assert len({c["value"] for c in cells}) == 3
  assert "average of length 0.05" in sweeps.tables(cells)
  best = min(cells, key=lambda c: c["value"])
  assert sweeps.best(workdir).get("ema_length") == best.get("ema_length")

  run = training.load(workdir, length=0.1)
  export.pack(run, tmp_path / "m.npz", dtype="float32", evaluations=cells)
  card = (tmp_path / "m.md").read_text()
  assert "averaged weights (average of length 0.1)" in card
  assert f"{cells[2]['value']:.4g}" in card
  assert f"{cells[1]['value']:.4g}" not in card
  back = export.from_pretrained(tmp_path / "m.npz")
  assert back.weights == run.weights
  np.testing.assert_array_equal(back.images([3], steps=3), run.images([3], steps=3))


def test_the_program(kept, tmp_path):
  _, workdir = kept
  table = program("ema", f"--workdir={workdir}")
  assert table.returncode == 0, table.stderr
  assert "averages of length 0.05, 0.1, kept at 4 steps" in table.stdout
  made = program("ema", f"--workdir={workdir}", "--length=0.07", f"--out={tmp_path / 'm.npz'}")
  assert made.returncode == 0, made.stderr
  want = training.load(workdir, length=0.07).images([1], steps=2)
  # float16 in the file: three digits of a weight
  np.testing.assert_allclose(
    export.from_pretrained(tmp_path / "m.npz").images([1], steps=2), want, atol=0.02
  )
  bad = (
    (["--length=0.07"], "give both"),
    (["--length=0.5", f"--out={tmp_path / 'n.npz'}"], "the length = 0.5 is no length"),
    (["--length=0.07", f"--out={tmp_path / 'm.npz'}"], "force"),
  )
  for flags, text in bad:
    assert text in error_of(program("ema", f"--workdir={workdir}", *flags))
