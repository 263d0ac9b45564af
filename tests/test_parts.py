"""Parts travel by name, and one of one's own goes everywhere that a part of the package goes."""

import json

import numpy as np
import pytest

from soft_diffusion_tf import (
  corruptions,
  evaluation,
  export,
  laboratory,
  losses,
  parts,
  samplers,
  schedules,
  training,
  trust,
)
from soft_diffusion_tf.evaluation import features, sweeps
from soft_diffusion_tf.experiment import Evaluation, Experiment, Sampling
from tests import seams

SEEDS = np.arange(5)
CHANGES = {  # of the experiment `tiny`, one for each seam
  "corruption": {"corruption": seams.Fade(0.5), "level": schedules.Linear(0.0, 1.0)},
  "level": {"level": seams.Cosine(0.01, 6.0)},
  "loss": {"loss": seams.Absolute(2.0)},
  "weight": {"loss": losses.SoftScoreMatching(seams.Bounded(500.0))},
  "network": {"network": seams.UNet(width=4, depth=1)},
  "sampler": {"sampling": {"sampler": seams.Halfway(0.25)}},
  "prior": {"prior": seams.Uniformly(rank=3)},
  "data": {"data": {"name": seams.Discs(count=96)}},
  "metric": {"evaluation": {"metrics": (seams.Brightness(1.0),)}},
}


def test_parts_of_ones_own_for_all_seams_at_once(tiny, tmp_path):
  changes = {name: value for change in CHANGES.values() for name, value in change.items()}
  goes_everywhere(
    tiny, tmp_path, changes | {"level": seams.Cosine(0.0, 1.0), "loss": seams.Absolute(2.0)}
  )


@pytest.mark.slow
@pytest.mark.parametrize("seam", CHANGES)
def test_a_part_of_ones_own_goes_everywhere(tiny, tmp_path, seam):
  goes_everywhere(tiny, tmp_path, CHANGES[seam])


def goes_everywhere(tiny, tmp_path, changes):
  """Train → load → sample → evaluate in a sweep → export → load → pack → load, with consent."""
  experiment = tiny.replace(
    training={"steps": 2, "sample_every": 0, "checkpoint_every": 0, "log_every": 1},
    sampling={"steps": 3, "batch_size": 8},
    evaluation={"feature_net": "pixels:2", "samples": 24, "subset": 16},
  ).replace(**changes)
  workdir = tmp_path / "workdir"
  trained = training.train(experiment, workdir, progress=False)
  written = json.loads((workdir / "config.json").read_text())
  assert "tests.seams:" in json.dumps(written)
  with pytest.raises(trust.UntrustedCode, match=r"tests\.seams:.*--trust_code"):
    training.load(workdir)
  again = training.train(experiment, workdir, progress=False)  # who trains has named the code
  np.testing.assert_array_equal(again.images(SEEDS), trained.images(SEEDS))
  with trust.trust_code():
    run = training.load(workdir)
    assert run.experiment == experiment
    images = run.images(SEEDS)
    np.testing.assert_array_equal(images, trained.images(SEEDS))

    real = evaluation.reference(
      features.feature_network("pixels:2"),
      experiment.data.load(progress=False).images,
      {"data": "here", "count": 24},
      16,
      24,
      k=3,
    )
    cells = sweeps.sweep(
      workdir,
      features.feature_network("pixels:2"),
      real,
      24,
      names=[str(experiment.sampling.sampler)],
      nfes=[2],
      steps=[2],
      progress=False,
    )
    assert np.isfinite(cells[0]["value"])
    assert set(cells[0]["metrics"]) == (
      {"tests.seams:Brightness(white=1.0)/gap"} if experiment.evaluation.metrics else set()
    )

    export.save(run, tmp_path / "export", [experiment.sampling])
    again = export.load(tmp_path / "export")
    assert again.experiment == experiment
    np.testing.assert_array_equal(again.images(SEEDS), images)
    export.pack(run, tmp_path / "model.npz", dtype="float32")
    np.testing.assert_array_equal(export.unpack(tmp_path / "model.npz").images(SEEDS), images)


def test_a_text_and_a_mapping_are_the_same_part():
  for text, config in (
    ("ddim", {"kind": "ddim"}),
    ("ddim(k=0.1)", {"kind": "ddim", "k": 0.1}),
    (" stochastic_two_step ( noise = 2 ) ", {"kind": "stochastic_two_step", "noise": 2}),
  ):
    assert parts.make(samplers.Rule, text) == parts.make(samplers.Rule, config)
  rule = samplers.rule_of("ddim(k=0.1)+momentum")
  assert rule.turns == (samplers.DDIM(0.1), samplers.Momentum())
  assert samplers.rule_of(str(rule)) == rule


@pytest.mark.parametrize(
  "part",
  [
    corruptions.GaussianBlur(3),
    corruptions.Mask("centre", 0.2),
    corruptions.Matrix([[1, 2], [3, 4]]),
    corruptions.Compose(corruptions.GaussianBlur(2), corruptions.Mask(), (0, 1), (0, 0.5)),
    schedules.Staged(schedules.Geometric(0.01, 6), 0.2, 1.0),
    samplers.StochasticTwoStep(3.0),
    seams.UNet(width=3, dtype="bfloat16"),
    seams.Discs(5),
  ],
)
def test_a_config_makes_the_part_again(part):
  base = parts.family(type(part))
  config = json.loads(json.dumps(part.get_config()))
  assert parts.make(base, config, trust_code=True) == part


def test_short_names_do_not_depend_on_what_is_loaded():
  assert issubclass(laboratory.Rounded, corruptions.Corruption)
  assert "Rounded" not in parts.members(corruptions.Corruption)
  assert parts.kind_of(laboratory.Rounded(corruptions.GaussianBlur(2), "tf32")).endswith(":Rounded")
  assert set(parts.members(corruptions.Corruption)) <= set(corruptions.__all__)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("GaussianBlurr", "did you mean 'GaussianBlur'"),
    ("GaussianBlur(16)", "write it like"),
    ("GaussianBlur(half_size=2**9)", "write it like"),
    ("GaussianBlur(half_size=__import__('os'))", "write it like"),
    ({"kind": "GaussianBlur", "half": 3}, "did you mean GaussianBlur.half_size"),
    ({"kind": "GaussianBlur", "half_size": True}, "half_size must be a whole number"),
    ({"kind": "GaussianBlur", "half_size": -1}, "half_size must be from 0 to 65,536"),
    ({"kind": "Mask", "edge": float("nan")}, "edge must be a finite number, got nan"),
    ({"kind": "Family"}, "does not take these fields"),
    ({"kind": ["Mask"]}, "unknown corruption"),
    (5, "give its kind and fields"),
    (None, "give its kind and fields"),
  ],
)
def test_what_is_no_part_is_refused_in_one_line(config, message):
  with pytest.raises(ValueError, match=message) as error:
    parts.make(corruptions.Corruption, config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["os:system(command='true')", "json:loads", "tests.seams:Halfway"])
def test_consent_does_not_make_code_a_part(text):
  with pytest.raises(ValueError, match="not a class derived from Corruption"):
    parts.make(corruptions.Corruption, text, trust_code=True)
  with pytest.raises(trust.UntrustedCode):
    parts.make(corruptions.Corruption, text)


def test_every_dataclass_checks_itself():
  for make, message in (
    (lambda: seams.Fade("dark"), "Fade.least must be a number like 0.25, got 'dark'"),
    (lambda: samplers.DDIM(-1), "DDIM.k must be from 0 on, got -1"),
    (lambda: seams.UNet(prediction="nonsense"), "network.prediction = 'nonsense' is unknown"),
    (lambda: Evaluation(metrics=(3,)), "give its kind and fields"),
    (lambda: schedules.Constant(float("inf")), "Constant.number must be a finite number"),
  ):
    with pytest.raises(ValueError, match=message):
      make()


def test_the_names_of_code_in_a_config():
  experiment = Experiment(
    corruption=seams.Fade(),
    level=schedules.Linear(0.0, 1.0),
    sampling=Sampling(samplers.Turns((seams.Halfway(), samplers.DDIM()))),
  )
  names = {"tests.seams:Fade", "tests.seams:Halfway"}
  assert parts.code_of(json.loads(json.dumps(experiment.to_dict()))) == names
  assert experiment.replace(name="os:path").code() == names  # a name of a run is no code
  assert parts.code_of({"name": "folder:pics", "version": "celeb_a:2.0.1"}) == set()
