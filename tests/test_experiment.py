import dataclasses
import json
import typing

import ml_collections
import numpy as np
import pytest

import soft_diffusion_tf
from soft_diffusion_tf import corruptions, experiment, losses, priors, samplers, schedules
from soft_diffusion_tf.experiment import (
  Data,
  Evaluation,
  Experiment,
  Network,
  PriorOptions,
  Sampling,
  Training,
  level_from_file,
)


def test_an_experiment_survives_config_and_json(tiny, tmp_path):
  assert Experiment.from_config(tiny.to_config()) == tiny
  assert Experiment.from_config(json.loads(json.dumps(tiny.to_dict()))) == tiny
  tiny.save(tmp_path)
  assert Experiment.load(tmp_path) == tiny
  assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


def test_overrides_keep_types(tiny):
  config = tiny.to_config()
  assert isinstance(config, ml_collections.ConfigDict)
  config.training.learning_rate = 1  # an int where a float stands
  assert Experiment.from_config(config).training.learning_rate == 1.0
  with pytest.raises(TypeError):
    config.training.batch_size = "many"


def test_the_digest_names_the_content(tiny):
  assert tiny.digest() == tiny.replace().digest()
  other = tiny.replace(training={"steps": 7})
  assert other.digest() != tiny.digest()
  assert tiny.differences(other) == ["training.steps"]
  assert tiny.differences(tiny) == []


def test_the_identity_is_of_what_decides_the_weights(tiny):
  training = {"steps": 10**6, "log_every": 7}
  longer = tiny.replace(name="x", training=training, sampling={"steps": 9}, data={"data_dir": "d"})
  assert longer.identity() == tiny.identity()
  for change in ({"seed": 1}, {"training": {"learning_rate": 1e-5}}, {"network": {"nf": 20}}):
    assert tiny.replace(**change).identity() != tiny.identity()


def test_fields_that_came_later_leave_the_identity_as_it_was(tiny):
  """As this config had it before there were any, so that its folders of samples go on."""
  fields = {k: v for k, v in tiny.flat().items() if not k.startswith(experiment.INCIDENTAL)}
  known = {k: v for k, v in fields.items() if k not in experiment.LATER}
  assert fields.keys() - known.keys() == experiment.LATER.keys()
  assert tiny.identity() == experiment.digest_of(known)
  for change in ({"transparency": "black"}, {"balanced": True}, {"augment": ("shift(pixels=1)",)}):
    assert tiny.replace(data=change).identity() != tiny.identity()


def _changed(tiny, group, name, value):
  content = tiny.to_dict()
  (content[group] if group else content)[name] = value
  return content


@pytest.mark.parametrize(
  ("group", "name", "value", "text"),
  [
    ("training", "batchsize", 3, "no field training.batchsize; did you mean training.batch_size"),
    ("", "trainig", {}, "no field trainig; did you mean training"),
    ("training", "batch_size", "many", "batch_size must be a whole number like 128, got 'many'"),
    ("training", "batch_size", 1.5, "training.batch_size must be a whole number"),
    ("training", "batch_size", True, "training.batch_size must be a whole number"),
    ("training", "batch_size", 0, "training.batch_size must be from 1 to 2,147,483,647, got 0"),
    ("training", "learning_rate", None, "learning_rate must be a number like 0.0002, got None"),
    ("training", "learning_rate", float("nan"), "training.learning_rate must be a finite number"),
    ("training", "learning_rate", float("inf"), "training.learning_rate must be a finite number"),
    ("training", "learning_rate", 10**400, "training.learning_rate must be a number"),
    ("training", "learning_rate", 0, "training.learning_rate must be positive and finite, got 0"),
    ("training", "log_every", -1, "training.log_every must be from 0 to 1,000,000,000,000, got -1"),
    ("sampling", "k", -1.0, "sampling.k must be from 0 on, got -1.0"),
    ("network", "ch_mult", [1.0, 2], r"network.ch_mult\[0\] must be a whole number, got 1.0"),
    ("network", "ch_mult", "12", r"network.ch_mult must be a tuple like \(1, 2, 2, 2\), got '12'"),
    (
      "network",
      "attn_resolutions",
      None,
      r"attn_resolutions must be a tuple like \(16,\), got None",
    ),
    (
      "network",
      "attn_resolutions",
      [None],
      r"network.attn_resolutions\[0\] must be a whole number",
    ),
    ("network", "nf", 100_000, "network.nf must be from 4 to 4,096, got 100000"),
    ("data", "image_shape", [8.5, 8, 1], r"data.image_shape\[0\] must be a whole number, got 8.5"),
    ("data", "image_shape", [0, 0, 1], r"data.image_shape\[0\] must be from 1 to 8,192, got 0"),
    ("data", "image_shape", [8, 8], "data.image_shape takes 3 numbers like"),
    ("data", "flip", 1, "data.flip must be True or False like True, got 1"),
    ("data", "name", None, "data.name must be a text"),
    ("", "seed", 10**20, "seed must be from 0 to 9,223,372,036,854,775,807, got 1000000"),
    ("", "seed", -1, "seed must be from 0"),
    ("", "name", 5, "name must be a text like 'unnamed', got 5"),
    ("training", "weight", "snr", "loss.weight = 'snr' is unknown"),
    ("loss", "weight", "snr", "loss.weight = 'snr' is unknown"),
    ("training", "ema_decay", 1.0, "training.ema_decay must be from 0 below 1, got 1.0"),
    ("training", "look_ahead", 1.5, "loss.look_ahead must be from 0 to 1, got 1.5"),
    ("sampling", "sampler", "momentun", "did you mean 'momentum'"),
    ("sampling", "grid", "log", "sampling.grid"),
    ("prior", "kind", "color", "did you mean 'colour'"),
    ("", "training", 3, "training must be a group"),
    ("", "level", {"kind": "Line"}, "did you mean 'Linear'"),
    ("", "level", {"kind": "Linear", "start": 0.0}, "Linear does not take these fields"),
    ("", "level", "Linear", "level: Linear does not take these fields"),
    ("", "corruption", {"kind": "Blur"}, "did you mean"),
    ("", "corruption", "Blur", "unknown corruption 'Blur'; did you mean"),
    ("", "corruption", 5, "give its kind and fields"),
    ("", "loss", {"kind": "Loss"}, "did you mean 'SoftScoreMatching'"),
    ("sampling", "sampler", "ddim(j=1)", "no field DDIM.j; did you mean DDIM.k"),
    ("sampling", "sampler", "ddim(k=-1)", "DDIM.k must be from 0 on"),
    ("evaluation", "metrics", ["Gap"], "unknown metric 'Gap'"),
    ("sampling", "times", [1.0, 0.5], "must descend from 1 to 0, got 1 … 0.5"),
    ("", "sampling", {"clip": True, "threshold": 99.0}, "threshold = 99 both bound x̂_0"),
    ("prior", "rank", -1, "Subspace.rank must be from 1 to|BlurredColour.rank must be from 1 to"),
    ("training", "epsilon", -1.0, "training.epsilon must be positive"),
    ("network", "cond_min", 0.0, "network.cond_min must be positive and finite, got 0.0"),
    ("network", "cond_min", 50.0, "cond_min = 50 and cond_max = 50 must rise"),
    ("network", "conditioning", "ve_label", "gives labels from 0 on, whose logarithm"),
  ],
)
def test_bad_fields_are_named(tiny, group, name, value, text):
  with pytest.raises(ValueError, match=text):
    Experiment.from_config(_changed(tiny, group, name, value))


GROUPS = {
  "data": Data,
  "prior": priors.Estimator,
  "network": Network,
  "training": Training,
  "loss": losses.SoftScoreMatching,
  "sampling": Sampling,
  "evaluation": Evaluation,
  "": Experiment,
}
FIELDS = [
  (group, field.name) for group, kind in GROUPS.items() for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_every_field_refuses_what_it_cannot_be(tiny, group, name):
  """Numbers that are not finite or beyond their range, and what is of another type."""
  hint = typing.get_type_hints(GROUPS[group], include_extras=True)[name]
  kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else [hint]
  bad = [None, object(), {}] if name not in (*GROUPS, "corruption", "level", "sigma") else [None]
  if kind in (int, float):
    ((low, high, ends),) = rules  # every number has a range
    bad += [float("nan"), float("inf"), -float("inf"), "1e1", True, [1], 10**400]
    bad += [low if ends[0] == "(" else low - 1]
    if high < 1e300:
      bad += [high if ends[1] == ")" else high + 1]
    inside = kind(low if ends[0] == "[" else (low + min(high, 1)) / 2)
    if name not in ("look_ahead", "cond_max", "sigma_max"):  # whose others depend on each other
      Experiment.from_config(_changed(tiny, group, name, inside))
  elif kind is bool:
    bad += [0, 1, "True"]
  elif kind is str:
    bad += [5, True, ["a"]]
  elif typing.get_origin(kind) is tuple:
    bad += [5, "12", ["a"], [None], [float("nan")], [-1], [10**20]]
  for value in bad:
    with pytest.raises(ValueError, match=name.split("_")[0]) as caught:
      Experiment.from_config(_changed(tiny, group, name, value))
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(tiny):
  own = tiny.replace(training={"learning_rate": np.float32(0.5), "steps": np.int64(7)})
  assert json.loads(json.dumps(own.to_dict()))["training"]["steps"] == 7
  assert own == tiny.replace(training={"learning_rate": 0.5, "steps": 7})
  assert type(Training(learning_rate=1).learning_rate) is float


@pytest.mark.parametrize("content", ["null", "5", "[]", '"text"', "[[", "{", "\x00", "NaN"])
def test_a_config_json_that_holds_something_else(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(ValueError, match=r"config\.json: (a config is an object|not JSON)"):
    Experiment.load(tmp_path)
  (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
  with pytest.raises(ValueError, match=r"config\.json: not JSON"):
    Experiment.load(tmp_path)


def test_a_config_of_a_newer_version_is_said_to_be_one(tiny, tmp_path):
  tiny.save(tmp_path)
  assert Experiment.load(tmp_path) == tiny
  path = tmp_path / "config.json"
  content = json.loads(path.read_text())
  assert content["version"] == soft_diffusion_tf.__version__
  path.write_text(json.dumps(content | {"version": "9.1", "shades": 3}))
  with pytest.raises(
    ValueError, match=r"config.json: .* no field shades.* of version 9.1.*upgrade"
  ):
    Experiment.load(tmp_path)
  del content["version"]  # as versions before wrote it
  path.write_text(json.dumps(content))
  assert Experiment.load(tmp_path) == tiny
  path.write_text(json.dumps(content | {"training": {"steps": 0}}))
  with pytest.raises(ValueError, match=r"config.json: training.steps must be from 1") as caught:
    Experiment.load(tmp_path)
  assert "of version" not in str(caught.value)


@pytest.mark.parametrize(("shape", "widths"), [((8, 4, 1), (2,)), ((4, 8, 1), (4,))])
def test_attention_of_version_0_1_stays_at_its_levels(tiny, tmp_path, shape, widths):
  """That version read heights, this one the shorter side: of 8×4, height 4 is width 2."""
  tiny.save(tmp_path)
  path = tmp_path / "config.json"
  content = json.loads(path.read_text())
  content["data"]["image_shape"] = shape
  content["network"] |= {"ch_mult": [1, 2], "attn_resolutions": [4]}
  path.write_text(json.dumps(content))
  assert Experiment.load(tmp_path).network.attn_resolutions == (4,)
  for version in ({"version": "0.1.0"}, {}):  # 0.1.0 itself wrote none
    old = {k: v for k, v in content.items() if k != "version"} | version
    path.write_text(json.dumps(old))
    assert Experiment.load(tmp_path).network.attn_resolutions == widths


def test_a_config_of_an_older_version_that_is_refused_now_names_it(tiny, tmp_path):
  """Version 0.1 took a score network that is told another σ than the process has."""
  tiny.save(tmp_path)
  path = tmp_path / "config.json"
  content = json.loads(path.read_text()) | {"version": "0.1.0"}
  network = content["network"] | {"prediction": "score", "scale_by_sigma": True}
  changes = {"network": network, "corruption": {"kind": "Identity"}, "level": 0.0}
  path.write_text(json.dumps(content | changes))
  with pytest.raises(ValueError, match=r"cond_max = .* of version 0\.1\.0, and this .*train anew"):
    Experiment.load(tmp_path)


SCORE = {"prediction": "score", "scale_by_sigma": True}
LABELS = {"embedding_type": "positional", "conditioning": "ve_label"}


@pytest.mark.parametrize(
  ("network", "sigma", "text"),
  [
    (SCORE | {"cond_max": 4.8}, (0.01, 4.8), ""),
    (SCORE | LABELS | {"sigma_max": 4.8}, (0.01, 4.8), ""),
    (SCORE | LABELS | {"cond_max": 7.0}, (0.01, 50.0), ""),  # a label reads no cond_max
    ({"cond_max": 7.0}, (0.01, 4.8), ""),  # to a residual network the condition is a name for t
    (SCORE, (0.01, 4.8), r"cond_max = 0\.01 … 50 are .* for σ, but σ runs from 0\.01 to 4\.8: g"),
    ({"prediction": "score", "cond_min": 0.1}, (0.01, 50.0), r"cond_max = 0\.1 … 50 are what"),
    (SCORE | LABELS, (0.01, 4.8), r"sigma_max = 0\.01 … 50 are .* but σ runs from 0\.01 to 4\.8"),
    ({"scale_by_sigma": True}, (0.01, 50.0), "scale_by_sigma divides .* no 'residual' of it; use"),
    (LABELS | {"scale_by_sigma": True}, (0.01, 50.0), "scale_by_sigma divides .* no 'residual'"),
    (SCORE | {"embedding_type": "positional"}, (0.01, 50.0), "the σ of a label; use the condit"),
    (SCORE | LABELS | {"conditioning": "vp_label"}, (0.01, 50.0), "'ve_label', not 'vp_label'"),
  ],
)
def test_a_score_network_is_told_the_sigma_of_its_process(tiny, network, sigma, text):
  changes = {"corruption": corruptions.Identity(), "level": schedules.Constant(0.0)}
  changes |= {"sigma": schedules.Geometric(*sigma), "network": network}
  if not text:
    assert tiny.replace(**changes).network.scale_by_sigma == ("scale_by_sigma" in network)
    return
  with pytest.raises(ValueError, match=text) as caught:
    tiny.replace(**changes)
  assert "\n" not in str(caught.value)


def test_a_score_network_is_told_sigma_all_the_way(tiny):
  """The ends are right, and the way between them is not geometric."""
  changes = {"corruption": corruptions.Identity(), "level": schedules.Constant(0.0)}
  changes |= {"sigma": schedules.Linear(0.01, 50.0), "network": SCORE}
  with pytest.raises(ValueError, match=r"give both the same ends and σ the schedule Geometric"):
    tiny.replace(**changes)


def test_a_filter_is_chosen_once(tiny):
  with pytest.raises(ValueError, match=r"look_ahead = 0\.1 chooses the filter.*set one of them"):
    tiny.replace(loss={"look_ahead": 0.1, "filtered": False})


def test_what_version_0_1_wrote_is_what_it_was(tiny):
  with pytest.warns(DeprecationWarning, match="loss=losses.SoftScoreMatching"):
    old = tiny.replace(training=Training(weight="one", look_ahead=0.1, steps=7))
  assert old.loss == losses.SoftScoreMatching("one", look_ahead=0.1)
  assert old.replace(training={"steps": 9}).loss == old.loss
  with pytest.warns(DeprecationWarning, match="sampler='ddim"):
    sampling = Sampling(sampler="ddim", k=0.25, noise=3.0)
  assert str(sampling.sampler) == "ddim(k=0.25)"
  assert dataclasses.replace(sampling, steps=3).sampler == sampling.sampler
  with pytest.warns(DeprecationWarning, match=r"priors\.Colour"):
    assert PriorOptions("colour", rank=3) == priors.Colour(3)
  config = old.to_config()  # as the flags --config.training.look_ahead and --config.sampling.k do
  config.training.look_ahead = 0.2
  config.sampling.sampler, config.sampling.k = "ddim", 0.5
  new = Experiment.from_config(config)
  assert new.loss == losses.SoftScoreMatching("one", look_ahead=0.2)
  assert new.sampling.sampler == samplers.DDIM(0.5)


def test_replace_refuses_unknown_fields(tiny):
  with pytest.raises(ValueError, match=r"did you mean training\.steps"):
    tiny.replace(training={"step": 3})


def test_steps_and_times_take_each_others_place():
  own = Sampling(sampler="heun", times=(1.0, 0.3, 0.0))
  assert own.changed(sampler="momentum").times == (1.0, 0.3, 0.0)
  assert own.evaluations == 3
  for change, evaluations in (({"steps": 5}, 9), ({"nfe": 8}, 7), ({"grid": "level"}, 49)):
    assert own.changed(**change).evaluations == evaluations
  assert own.changed(steps=5).changed(times=(1.0, 0.0)).evaluations == 1
  with pytest.raises(ValueError, match=r"times stand in the place of steps = 5: give one"):
    own.changed(steps=5, times=(1.0, 0.0))


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"k": 0.5}, "k = 0.5 is not read by the sampler two_step"),
    ({"sampler": "momentum", "noise": 2.0}, "noise = 2.0 is not read by the sampler momentum"),
    ({"tolerance": 1e-3}, "tolerance = 0.001 is not read by the sampler two_step"),
    ({"sampler": "dormand_prince", "steps": 9}, "by its tolerance: leave out steps = 9"),
    ({"sampler": "dormand_prince", "nfe": 9}, "by its tolerance: leave out nfe = 9"),
    ({"steps": 5, "nfe": 9}, "nfe = 9 chooses the number of steps: leave out steps"),
  ],
)
def test_what_a_sampler_does_not_read_is_refused(changes, text):
  with pytest.raises(ValueError, match=text):
    Sampling().changed(**changes)
  Sampling().changed(sampler="ddim+momentum", k=0.5)


def test_a_workdir_without_config(tmp_path):
  with pytest.raises(ValueError, match=r"no config\.json in it"):
    Experiment.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="not JSON"):
    Experiment.load(tmp_path)
  for content in (
    "null",
    "5",
    "[]",
    '"text"',
    "[" * 100_000,
    "\xff",
    '{"data": []}',
    '{"seed": 1.5}',
    '{"name": 5}',
    '{"corruption": {"kind": ["Mask"]}}',
    '{"corruption": null}',
    '{"corruption": {"kind": "GaussianBlur", "half_size": 1e9}}',
    '{"corruption": {"kind": "GaussianBlur", "half_size": 1000000000}}',
    '{"level": {"kind": "Linear", "start": "a", "stop": 1}}',
    '{"level": {"kind": "Linear", "start": NaN, "stop": 1}}',
    '{"level": {"kind": "Staged", "inner": [], "begin": 0, "end": 1}}',
    '{"data": {"image_shape": ["8", "8", "1"]}}',
    '{"network": {"ch_mult": [1.5]}}',
    '{"network": {"fourier_scale": NaN}}',
    '{"network": {"nf": 100000000000000000000}}',
  ):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json: ") as raised:
      Experiment.load(tmp_path)
    assert "\n" not in str(raised.value), content
    assert len(str(raised.value)) < 500, content


def test_levels_from_a_file_must_fit(tmp_path):
  blur = corruptions.GaussianBlur(8)
  path = tmp_path / "s.json"
  assert level_from_file(path, blur, 0.01, 6.0) == schedules.Unfound(0.01, 6.0, str(path))
  schedules.save_levels(path, {"corruption": blur.get_config(), "levels": [0.01, 1.0, 6.0]})
  level = level_from_file(path, blur, 0.01, 6.0)
  assert float(level(0.5)) == 1.0
  with pytest.raises(ValueError, match="but the experiment corrupts by"):
    level_from_file(path, corruptions.GaussianBlur(16), 0.01, 6.0)
  with pytest.raises(ValueError, match=r"runs from 0\.01 to 6, not from 0\.01 to 18"):
    level_from_file(path, blur, 0.01, 18.0)


def test_the_network_is_a_function_of_the_seed(tiny):
  one, two, other = (e.build_network() for e in (tiny, tiny, tiny.replace(seed=1)))
  same = [(a == b).all() for a, b in zip(one.get_weights(), two.get_weights())]
  assert all(same)
  assert not all((a == b).all() for a, b in zip(one.get_weights(), other.get_weights()))
