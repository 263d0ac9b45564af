import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from soft_diffusion_tf import experiment, files, losses, schedules
from tools import study

ROOT = pathlib.Path(__file__).parents[2]


def record(model, seed, sampler, nfe, value, prior="own"):
  return {
    "model": model,
    "seed": seed,
    "sampler": sampler,
    "prior": prior,
    "nfe": nfe,
    "fd": {"train": value},
    "floor": {"train": 0.5},
    "step": 10,
    "samples": 64,
    "judge": "FD[pixels]",
    "judge_sha256": "0" * 64,
  }


def test_verdicts():
  assert study.verdict([(1.0, 2.0), (1.1, 2.1), (0.9, 2.2)]) == "reproduced"
  assert study.verdict([(2.0, 1.0), (2.1, 1.1), (2.2, 0.9)]) == "not reproduced"
  assert study.verdict([(1.0, 2.0), (2.0, 1.0), (0.9, 2.2)]) == "undecided"  # seeds disagree
  assert study.verdict([(1.0, 1.01), (1.0, 2.0), (1.0, 1.02)]) == "undecided"  # within the spread
  assert study.verdict([(1.0, 1.05), (1.0, 1.2), (1.0, 1.3)]) == "undecided"  # t = 2.7 of 2.92
  assert study.verdict([(1.0, 1.15), (1.0, 1.2), (1.0, 1.25)]) == "reproduced"
  assert study.verdict([(1.0, 1.05)]) == "undecided"  # one seed, a small gap
  assert study.verdict([(1.0, 1.5)]) == "reproduced"
  assert study.verdict([(10.0, math.inf), (25.0, math.inf)]) == "reproduced"  # never reached
  assert study.verdict([(math.inf, 10.0)]) == "not reproduced"
  assert study.verdict([(math.inf, math.inf)]) == "undecided"
  assert study.verdict([(25, 25), (50, 50)]) == "undecided"


@pytest.fixture
def records():
  """Made-up distances in which the claims' truth is known."""
  rows = []
  curves = {
    ("blur", "momentum"): {10: 5.0, 25: 2.0, 50: 1.0, 100: 1.2},
    ("blur", "naive"): {50: 9.0, 100: 9.5},
    ("blur", "ddim"): {10: 3.0, 25: 1.5, 50: 1.4, 100: 1.4},
    ("blur", "probability_flow"): {10: 4.0, 25: 1.6, 50: 1.1, 100: 1.1},
    ("blur", "predictor_corrector"): {50: 1.2, 100: 1.0},
    ("blur", "two_step"): {10: 1.3, 25: 1.0, 50: 1.0},
    ("ve_score", "momentum"): {25: 8.0, 50: 4.0, 100: 1.0},
    ("ve", "momentum"): {25: 0.1, 50: 0.1, 100: 0.1},  # an older record's: no claim reads it
    ("mask", "momentum"): {25: 8.0, 50: 4.0, 100: 2.0},
    ("unfiltered", "momentum"): {50: 0.8, 100: 0.7},
    ("printed_loss", "momentum"): {50: 1.5, 100: 1.4},
    ("printed_loss", "naive"): {50: 1.3, 100: 1.2},
  }
  for seed in (0, 1):
    for (model, sampler), curve in curves.items():
      rows += [record(model, seed, sampler, n, v * (1 + 0.01 * seed)) for n, v in curve.items()]
  return rows


def test_the_scoreboard_says_what_the_values_say(records):
  board = study.scoreboard(study.PAPER_CLAIMS, study.Results(records, "train"))
  words = {row.claim.name.split()[0]: row.verdict for row in board}
  assert words["1a."] == "not reproduced"
  assert words["1b."] == "reproduced"
  assert words["2a."] == words["2b."] == "not reproduced"
  assert words["2c."] == "reproduced"
  assert words["3a."] == "not measured"
  assert words["4a."] == "reproduced"  # 50 against 100 evaluations
  assert words["4b."] == "not reproduced"
  assert words["4c."] == "not measured"
  assert words["5a."] == words["5b."] == words["5c."] == "reproduced"
  assert words["6a."] == "not reproduced"  # 1.2 against 1.1 at 100, whatever each has at its best
  assert words["6b."] == "reproduced"
  assert words["7."] == "reproduced"
  assert words["9."] == "reproduced"
  assert words["10a."] == "undecided"  # exactly half of 50: neither side is smaller
  assert words["10b."] == "not measured"
  assert words["11a."] == "not measured"


def test_distances_are_compared_at_equal_evaluations(records):
  """Blur has more rungs than each of its rivals, and its best beyond them decides nothing."""
  curves = {("blur", "momentum"): {400: 0.01}, ("unfiltered", "momentum"): {10: 9.0}}
  for (model, sampler), curve in curves.items():
    records += [record(model, seed, sampler, n, v) for n, v in curve.items() for seed in (0, 1)]
  rows = {
    row.claim.name.split()[0]: row
    for row in study.scoreboard(study.PAPER_CLAIMS, study.Results(records, "train"))
  }
  assert rows["2b."].at == "100"
  assert rows["2b."].pairs[0] == (1.2, 0.7)
  assert rows["2b."].elsewhere == "10: reproduced, 50: not reproduced"  # no optimum: 100 is best
  assert rows["4b."].elsewhere == "25: reproduced, 50: reproduced"
  assert rows["4a."].pairs[0] == (50, 100)  # 0.01 at 400 does not set the quality


def test_an_optimum_is_one_that_was_seen_on_both_sides(records):
  claim = next(c for c in study.PAPER_CLAIMS if c.name.startswith("5b"))

  def elsewhere(*more):
    return claim.row(study.Results([*records, *more], "train")).elsewhere

  assert elsewhere().endswith("optimum: reproduced")  # 1.0 and 1.4 at 50 of 100
  at_200 = lambda sampler, value: [record("blur", seed, sampler, 200, value) for seed in (0, 1)]
  assert elsewhere(*at_200("momentum", 0.9)).endswith("optimum: reproduced")  # DDIM ends at 100
  assert "optimum" not in elsewhere(*at_200("momentum", 0.9), *at_200("ddim", 1.5))
  third = [record("blur", 2, sampler, 100, 1.0) for sampler in ("momentum", "ddim")]
  assert "optimum" not in elsewhere(*third)  # with one of its seeds none was seen


def test_several_curves_are_their_best_at_each_number(records):
  row = study.Equal("x", "–", study._of(), study._of("mask") + study._of("ve_score")).row(
    study.Results(records, "train")
  )
  assert row.at == "100"
  assert row.pairs[0] == (1.2, 1.0)
  missing = study._of("mask") + study._of("ve_score", "two_step")  # a rival that is not measured
  row = study.Equal("x", "–", study._of(), missing).row(study.Results(records, "train"))
  assert row.verdict == "not measured"  # is not passed over


def test_a_study_of_an_older_record_goes_on_with_what_that_lacks(tmp_path):
  """The VE model in its authors' form is trained; the older one is shown, and measured no more."""
  shutil.copytree(ROOT / "docs" / "results" / "digits", tmp_path / "out")
  digits = study.open_study("digits", tmp_path / "out")
  jobs = study.jobs_of(digits)
  assert "ve_score-0" in jobs
  assert not [j for j in jobs if j.startswith("ve-")]
  for name in ("ddpmpp", "subvp", "blurring"):  # what the network gives has one weight at all t
    assert digits.models[name].weight_range() == (1.0, 1.0)
  for name in ("ddpmpp", "subvp", "cold", "ihdm", "blurring"):
    config = experiment.from_file(ROOT / "configs" / f"digits_{name}.py")
    model = digits.models[name]
    assert type(model.corruption) is type(config.corruption)
    assert (model.loss, model.sigma) == (config.loss, config.sigma)
    assert model.network.prediction == config.network.prediction
  old, new = digits.models["ve"], digits.models["ve_score"]
  assert set(old.differences(new)) == {
    "network.prediction",
    "network.scale_by_sigma",
    "network.cond_max",
  }
  assert new.network.cond_max == schedules.ends(new.sigma)[1]
  study.write_models(digits, tmp_path / "out")
  assert study.open_study("digits", tmp_path / "out").models == digits.models


@pytest.mark.parametrize("name", ["digits", "cifar"])
def test_every_model_of_a_study_has_the_same_ladder(name):
  some = study.open_study(name, ROOT / "docs" / "results" / name)
  main, beyond = some.sweeps["blur"], {600, 1000}  # where the main model's optimum is looked for
  for model, sweep in some.sweeps.items():
    for draw, nfes in sweep.items():
      own = draw.sampler in study.OWN_SAMPLERS.get(model, ())
      assert set(nfes) <= set(main[study.Draw() if own else draw]), (model, draw)
    if model not in study.RETIRED:
      for draw in (study.Draw(), study.Draw("two_step"), study.Draw("two_step", "subspace")):
        assert set(main[draw]) - beyond == set(sweep[draw]) - beyond, (model, draw)


def test_results_know_best_and_reach(records):
  results = study.Results(records, "train")
  assert results.best(0) == (1.0, 50)
  assert results.nfe_for(0, 2.0) == 25
  assert results.nfe_for(0, 0.5) == math.inf
  assert results.curve(0, "blur", "naive") == {50: 9.0, 100: 9.5}


def test_the_report_has_every_claim_and_a_plot(records, tmp_path):
  for row in records:
    files.append_record(tmp_path / "results" / f"{row['model']}-{row['seed']}.jsonl", row)
  with open(tmp_path / "results" / "blur-0.jsonl", "a") as file:
    file.write('{"model": "blur", "se')  # a kill while writing
  claims = study.PAPER_CLAIMS
  some = study.Study("digits", {}, {}, (0, 1), 64, "pixels", claims=claims)
  text = study.report(some, tmp_path)
  assert all(claim.name in text for claim in claims)
  assert "| blur, momentum, own, uniform | 5.03 (0.035) | 2.01 (0.014) |" in text
  from PIL import Image

  assert np.asarray(Image.open(tmp_path / "fd_against_nfe.png").convert("L")).std() > 10
  with pytest.raises(ValueError, match="nothing is measured yet"):
    study.report(some, tmp_path / "other")
  stranger = records[0] | {"model": "ve", "judge_sha256": "f" * 64}
  files.append_record(tmp_path / "results" / "ve-0.jsonl", stranger)
  with pytest.raises(ValueError, match=r"distances by .*ffffffff.* do not compare: give the study"):
    study.report(some, tmp_path)


@pytest.mark.parametrize("name", sorted(set(study.STUDIES) - {"mixtures"}))  # not measured yet
def test_the_page_says_what_the_records_say(name):
  kept = ROOT / "docs" / "results" / name
  page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").splitlines()
  some = study.open_study(name, kept)
  rows = [r for r in study.tables(some, study.all_records(kept)) if r.startswith("| ")]
  assert len(rows) > len(some.claims)
  assert [r for r in rows if r not in page] == []


def test_the_digits_study_differs_in_what_a_claim_is_about_alone(tmp_path):
  digits = study.open_study("digits", tmp_path)
  base = digits.models["blur"]
  assert set(digits.sweeps) == set(digits.models)
  assert len(digits.seeds) >= 3
  for name, groups in {
    "printed_loss": {"loss"},
    "unfiltered": {"loss"},
    "mse": {"level"},
    "sigma_005": {"sigma"},
    "sigma_0025": {"sigma"},
    "noise_throughout": {"sigma"},
    "mask": {"corruption", "level"},
    "ve_score": {"corruption", "level", "sigma", "prior", "network"},
    "ddpmpp": {"corruption", "level", "sigma", "prior", "network", "loss"},
    "subvp": {"corruption", "level", "sigma", "prior", "network", "loss"},
    "cold": {"level", "sigma", "loss"},
    "ihdm": {"corruption", "level", "sigma", "loss"},
    "blurring": {"corruption", "level", "sigma", "prior", "network", "loss"},
  }.items():
    differs = {d.split(".")[0] for d in base.differences(digits.models[name])}
    assert differs == groups, name
  for name in ("printed_loss", "unfiltered"):
    loss = digits.models[name].loss
    assert loss.look_ahead == 0.0
    assert loss.filtered == (name == "printed_loss")
    assert dataclasses.replace(loss, look_ahead=0.1, filtered=True) == base.loss
  again = study.open_study("digits", tmp_path)  # read, not worked out again
  assert again.models == digits.models
  with pytest.raises(ValueError, match="holds the study 'digits'"):
    study.open_study("cifar", tmp_path)
  with pytest.raises(ValueError, match="unknown study 'x'; choose one of digits, cifar, default"):
    study.open_study("x", tmp_path)


def test_the_study_of_mixtures_differs_in_the_loss_alone(tmp_path):
  some = study.open_study("mixtures", tmp_path)
  base = some.models["blur"]
  for name, e in some.models.items():
    assert {d.split(".")[0] for d in base.differences(e)} <= {"loss"}, name
    assert e.loss.weight == base.loss.weight
  assert [some.models[f"mixture_{s}"].loss.share for s in ("003", "01", "03")] == [0.03, 0.1, 0.3]
  assert len({str(e.loss) for e in some.models.values()}) == len(some.models) == 7


def test_a_damaged_record_of_a_study_is_refused(tmp_path):
  for damaged in ("{", "5", "[]", "{}", '{"study": "digits", "models": 5}'):
    (tmp_path / study.MODELS_FILE).write_text(damaged)
    with pytest.raises(ValueError, match="not a record of a study; delete it"):
      study.open_study("digits", tmp_path)


def test_the_open_choices_are_judged_by_their_own_models_and_grids(tmp_path):
  defaults = study.open_study("defaults", tmp_path)
  base = defaults.models["blur"]
  differences = {name: list(base.differences(e)) for name, e in defaults.models.items()}
  assert differences["blur"] == []
  assert len(differences["stratified_t"]) == len(differences["unweighted"]) == 1
  assert defaults.models["stratified_t"].training.low_variance_t
  assert defaults.models["unweighted"].loss.weight == losses.One()

  def value(model, draw, nfe):
    worse = {"stratified_t": 0.8, "unweighted": 3.0}.get(model, 1.0)
    return worse * (1 + 10 / nfe) * (0.5 if draw.grid == "transport" else 1.0)

  rows = [
    record(name, seed, draw.sampler, nfe, value(name, draw, nfe), draw.prior) | {"grid": draw.grid}
    for name, draws in defaults.sweeps.items()
    for draw, nfes in draws.items()
    for nfe in nfes
    for seed in defaults.seeds
  ]
  board = study.scoreboard(defaults.claims, study.Results(rows, "train"))
  assert all(len(row.pairs) == len(defaults.seeds) for row in board)
  for row in board:
    same = "time grid" in row.claim.name and "transport" not in row.claim.name
    assert row.verdict == ("undecided" if same else "reproduced"), row.claim.name


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (("--workers=0",), "workers"),
    (("--report",), "holds no study: there is nothing to report"),
    (("--job=blurr-0",), "--job=blurr-0: no such job; choose one of blur-0"),
  ],
)
def test_mistakes_end_with_one_line(flags, text, tmp_path):
  if "--report" not in flags:
    shutil.copytree(ROOT / "docs" / "results" / "digits", tmp_path / "out")
  result = subprocess.run(
    [sys.executable, ROOT / "tools" / "study.py", f"--out={tmp_path}/out", *flags],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
  )
  assert result.returncode, result.stdout
  assert "Traceback" not in result.stderr
  assert text in result.stderr


def test_sigterm_ends_the_workers_and_a_job_waits_for_its_lock(tmp_path):
  """The worker is a stand-in that says how it ended."""
  code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
out = pathlib.Path({str(tmp_path)!r})
if any(a.startswith("--job") for a in sys.argv):
  import signal
  def stop(*_):
    time.sleep(0.5)  # saving
    (out / "saved").touch()
    sys.exit(143)
  signal.signal(signal.SIGTERM, stop)
  (out / "begun").touch()
  time.sleep(60)
else:
  from tools import study
  study.__file__ = __file__
  some = study.Study("tiny", {{"blur": None}}, {{}}, (0,), 64, "pixels")
  study.work(some, out, 1, ["--workers", "1"])
"""
  script = tmp_path / "program.py"
  script.write_text(code)
  process = subprocess.Popen([sys.executable, script])
  for _ in range(600):
    if (tmp_path / "begun").exists():
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 143
  assert (tmp_path / "saved").exists()  # before the study itself ended

  with files.lock(tmp_path / "locks" / "blur-0"):
    some = study.Study("tiny", {"blur": None}, {"blur": {}}, (0,), 64, "pixels")
    waiting = threading.Thread(target=study.job, args=(some, "blur", 0, tmp_path))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
  waiting.join(10)
  assert (tmp_path / "done" / "blur-0").exists()


@pytest.mark.slow
def test_a_job_resumes_value_by_value(tiny, tmp_path):
  draws = {study.Draw(): (2, 4), study.Draw("two_step", "colour", "level"): (2,)}
  some = study.Study("tiny", {"blur": tiny}, {"blur": draws}, (0,), 64, "pixels", ("train",), 32)
  study.job(some, "blur", 0, tmp_path)
  path = tmp_path / "results" / "blur-0.jsonl"
  whole = files.read_records(path)
  assert [(study.draw_of(r), r["nfe"]) for r in whole] == [
    (study.Draw(), 2),
    (study.Draw("two_step", "colour", "level"), 2),
    (study.Draw(), 4),
  ]
  assert all(r["fd"]["train"] > 0 for r in whole)
  path.write_text(json.dumps(whole[0]) + "\n")
  study.job(some, "blur", 0, tmp_path)
  again = files.read_records(path)
  assert [r["fd"] for r in again] == [r["fd"] for r in whole]
  assert (tmp_path / "done" / "blur-0").exists()
  shutil.rmtree(tmp_path / "models")
  shutil.rmtree(tmp_path / "done")
  study.job(some, "blur", 0, tmp_path)  # all is measured: nothing is trained
  assert (tmp_path / "done" / "blur-0").exists()
  assert not (tmp_path / "models").exists()
