import functools
import json

import numpy as np
import pytest
from PIL import Image

from soft_diffusion_tf import data, evaluation, files, training
from soft_diffusion_tf.evaluation import features, runs, sweeps

PIXELS = features.feature_network("pixels")
GRID = {"names": ["naive", "momentum"], "nfes": [2, 3], "progress": False}


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
  """Trained for 6 steps; its checkpoints 2, 4 and 6 are kept."""
  folder = tmp_path_factory.mktemp("run")
  training.train(tiny.replace(training={"keep": 9}), folder, progress=False)
  return folder


@pytest.fixture(scope="module")
def real():
  images = data.load("digits", "train").images
  about = evaluation.conditions_of(PIXELS, "digits", "train", (8, 8, 1), "auto", 40)
  return evaluation.reference(PIXELS, images, about, progress=False)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
  """Loading and tracing take seconds: one run per step, whatever sweep asks for it."""
  with pytest.MonkeyPatch.context() as patch:
    before = training.load

    @functools.cache
    def load(workdir, step, length=None):
      run = before(workdir, step, length=length)
      run.sampler = functools.cache(run.sampler)
      return run

    patch.setattr(training, "load", load)
    yield


@pytest.fixture
def forget(workdir):
  """Takes away what sweeps wrote."""
  yield
  for file in [*(workdir / "sweep").glob("*"), workdir / "best.json"]:
    file.unlink(missing_ok=True)


def test_numbers():
  assert sweeps.parse_numbers("200-1000:80") == list(range(200, 1001, 80))
  # "10 runs with different NFEs, ranging from 200 to 1000 with a step size of 80" (P Table 2)
  assert sweeps.parse_numbers(sweeps.PAPER_NFE) == list(range(200, 1000, 80))
  assert len(sweeps.parse_numbers(sweeps.PAPER_NFE)) == 10
  assert sweeps.parse_numbers("50,25,50") == [50, 25]
  for text in ("", "x", "1000-200:80", "1-5", "0,3", "5-9:0"):
    with pytest.raises(ValueError, match="give positive numbers as a list"):
      sweeps.parse_numbers(text)


def test_checkpoints(workdir, tmp_path):
  assert sweeps.checkpoints(workdir) == [2, 4, 6]
  assert sweeps.checkpoints(workdir, "newest") == [6]
  assert sweeps.checkpoints(workdir, "4,2") == [4, 2]
  with pytest.raises(ValueError, match=r"no checkpoint of step 5; it keeps \[0, 2, 4, 6\]"):
    sweeps.checkpoints(workdir, "5")
  with pytest.raises(ValueError, match="give all, kept, newest or steps"):
    sweeps.checkpoints(workdir, "last")
  with pytest.raises(ValueError, match="train first"):
    sweeps.checkpoints(tmp_path)


def test_a_sweep(workdir, real, forget):
  cells = sweeps.sweep(workdir, PIXELS, real, 40, steps=[2, 6], **GRID)
  assert [(c["step"], c["sampler"], c["nfe"]) for c in cells] == [
    (s, n, k) for s in (2, 6) for n in GRID["names"] for k in GRID["nfes"]
  ]
  # A cell is what evaluate_run gives for the same conditions.
  run = training.load(workdir, 2)
  alone = evaluation.evaluate_run(
    run, PIXELS, real, 40, run.options(sampler="naive", steps=3), progress=False
  )
  assert cells[1]["value"] == alone.distance.value
  found = sweeps.best(workdir)
  assert found["value"] == min(c["value"] for c in cells)
  again = [c for c in cells if all(c[n] == found[n] for n in ("step", "sampler", "nfe"))]
  assert again[0]["value"] == found["value"]
  assert len(sweeps.last_sweep(workdir)) == 8
  picture = np.asarray(Image.open(workdir / "sweep" / sweeps.CURVES).convert("RGB"))
  assert picture.std() > 10
  text = sweeps.tables(cells)
  for cell in cells:
    assert format(cell["value"], ".4g") in text
  assert "FD[pixels]" in text
  assert "step 6:" in text


def test_an_interrupted_sweep_goes_on_without_computing_again(workdir, real, forget, monkeypatch):
  whole = sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  results = workdir / "sweep" / sweeps.RESULTS
  lines = results.read_text().splitlines(keepends=True)
  # Killed while it wrote the third line.
  results.write_text(lines[0] + lines[1] + lines[2][: len(lines[2]) // 2])
  measured = []
  before = evaluation.evaluate_run

  def counted(run, network, real, count, options, **rest):
    measured.append((str(options.sampler), options.steps))
    return before(run, network, real, count, options, **rest)

  monkeypatch.setattr(evaluation, "evaluate_run", counted)
  again = sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  assert measured == [("momentum", 2), ("momentum", 3)]
  assert [c["value"] for c in again] == [c["value"] for c in whole]
  assert results.read_text().startswith(lines[0] + lines[1])
  sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  assert len(measured) == 2
  # Other conditions are other cells.
  few = {"names": ["naive"], "nfes": [2], "progress": False}
  sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], first_seed=40, **few)
  sweeps.sweep(workdir, PIXELS, real, 30, steps=[6], **few)
  assert len(measured) == 4
  assert len(sweeps.last_sweep(workdir)) == 1  # of N = 30: others do not compare with it


def test_a_cell_goes_on_from_its_partial_state(workdir, real, forget, monkeypatch):
  few = {"names": ["momentum"], "nfes": [3], "progress": False, "steps": [6]}
  whole = sweeps.sweep(workdir, PIXELS, real, 40, **few)
  (workdir / "sweep" / sweeps.RESULTS).unlink()
  drawn = []
  before = evaluation.sample_batches

  def dying(*args):
    inner = before(*args)

    def batches(start):
      for images in inner(start):
        if len(drawn) == 2:
          drawn.append("died")
          raise KeyboardInterrupt
        drawn.append(start)
        yield images

    return batches

  monkeypatch.setattr(runs, "sample_batches", dying)
  with pytest.raises(KeyboardInterrupt):
    sweeps.sweep(workdir, PIXELS, real, 40, every=0.0, **few)
  assert list((workdir / "sweep").glob("partial-*.npz"))
  again = sweeps.sweep(workdir, PIXELS, real, 40, every=0.0, **few)
  assert drawn == [0, 0, "died", 32]  # 40 samples in batches of 16: two were kept
  assert again[0]["value"] == whole[0]["value"]
  assert not list((workdir / "sweep").glob("partial-*.npz"))


def test_a_cell_that_fails_does_not_stop_the_others(workdir, real, forget, monkeypatch):
  before = evaluation.evaluate_run

  def failing(run, network, real, count, options, **rest):
    if str(options.sampler) == "naive":
      raise ValueError("image 3 holds NaN")
    return before(run, network, real, count, options, **rest)

  monkeypatch.setattr(evaluation, "evaluate_run", failing)
  cells = sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  assert [("error" in c) for c in cells] == [True, True, False, False]
  assert sweeps.best(workdir)["sampler"] == "momentum"
  assert "failed" in sweeps.tables(cells)
  assert (workdir / "sweep" / sweeps.RESULTS).read_text().count("\n") == 2
  with pytest.raises(ValueError, match=r"no cell .* could be measured: image 3 holds NaN"):
    sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID | {"names": ["naive"]})


def test_refusals(workdir, real, tmp_path):
  with pytest.raises(ValueError, match="did you mean 'momentum'"):
    sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID | {"names": ["momentun"]})
  with pytest.raises(ValueError, match=r"no best\.json in it.* make one by evaluate --sweep"):
    sweeps.best(tmp_path)
  for damaged in ("{", "5", "[]", '{"step": 6}'):
    (tmp_path / "best.json").write_text(damaged)
    with pytest.raises(ValueError, match="or a damaged one; make one by evaluate --sweep"):
      sweeps.best(tmp_path)
  with (
    files.lock(workdir / "sweep"),
    pytest.raises(ValueError, match="another sweep is at work in it"),
  ):
    sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  assert not (workdir / "sweep" / sweeps.RESULTS).exists()


def test_best_json_is_whole(workdir, real, forget):
  sweeps.sweep(workdir, PIXELS, real, 40, steps=[6], **GRID)
  content = json.loads((workdir / "best.json").read_text())
  assert content["step"] == 6
  assert content["label"] == "FD[pixels]"
  assert content["samples"] == 40


def test_a_range_of_more_numbers_than_can_be_is_refused():
  assert sweeps.parse_numbers("1-10000:1")[-1] == 10_000
  with pytest.raises(ValueError, match="names 99,999,999,999 numbers; give at most 10,000"):
    sweeps.parse_numbers("1-99999999999:1")
