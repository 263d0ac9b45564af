import json

import ml_collections
import pytest

from soft_diffusion_tf import corruptions, schedules
from soft_diffusion_tf.experiment import Experiment, Sampling, level_from_file


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


def _changed(tiny, group, name, value):
  content = tiny.to_dict()
  (content[group] if group else content)[name] = value
  return content


@pytest.mark.parametrize(
  ("group", "name", "value", "text"),
  [
    ("training", "batchsize", 3, "no field training.batchsize; did you mean training.batch_size"),
    ("", "trainig", {}, "no field trainig; did you mean training"),
    (
      "training",
      "batch_size",
      "many",
      "training.batch_size must be int like 16, got 'many'|must be int",
    ),
    ("training", "batch_size", 1.5, "must be int"),
    ("training", "batch_size", True, "must be int"),
    ("training", "batch_size", 0, "training.batch_size must be positive, got 0"),
    ("training", "steps_per_loop", 0, "training.steps_per_loop must be positive"),
    ("training", "learning_rate", float("nan"), "training.learning_rate must be positive, got nan"),
    ("training", "log_every", -1, "training.log_every must not be negative"),
    ("sampling", "k", -1.0, "sampling.k must not be negative"),
    ("training", "weight", "snr", "training.weight = 'snr' is unknown"),
    ("training", "ema_decay", 1.0, r"must be in \[0, 1\)"),
    ("training", "look_ahead", 1.5, "training.look_ahead is a time from 0 to 1, got 1.5"),
    ("sampling", "sampler", "momentun", "did you mean 'momentum'"),
    ("sampling", "grid", "log", "sampling.grid"),
    ("prior", "kind", "color", "did you mean 'colour'"),
    ("", "training", 3, "training must be a group"),
    ("", "level", {"kind": "Line"}, "did you mean 'Linear'"),
    ("", "level", {"kind": "Linear", "start": 0.0}, "Linear does not take these fields"),
    ("", "level", "Linear", "a schedule is a number or a kind with its fields, got 'Linear'"),
    ("", "corruption", {"kind": "Blur"}, "did you mean"),
    ("", "corruption", "Blur", "give its kind and fields"),
    ("sampling", "times", [1.0, 0.5], "must descend from 1 to 0, got 1 … 0.5"),
    ("", "sampling", {"clip": True, "threshold": 99.0}, "threshold = 99 both bound x̂_0"),
    ("prior", "rank", -1, "at least 1 dimension, got -1"),
    ("training", "beta_1", 1.0, r"training.beta_1 must be in \[0, 1\), got 1.0"),
    ("training", "epsilon", -1.0, "training.epsilon must be positive"),
    ("network", "cond_min", 0.0, "cond_min = 0 and cond_max = 50 must be positive and rise"),
    ("network", "conditioning", "ve_label", "gives labels from 0 on, whose logarithm"),
  ],
)
def test_bad_fields_are_named(tiny, group, name, value, text):
  with pytest.raises(ValueError, match=text):
    Experiment.from_config(_changed(tiny, group, name, value))


def test_the_sigma_of_a_label_needs_a_label(tiny):
  positional = {"embedding_type": "positional", "scale_by_sigma": True}
  tiny.replace(network=positional | {"conditioning": "ve_label"})
  with pytest.raises(ValueError, match="divides by the σ of a label; use the condit"):
    tiny.replace(network=positional)


def test_a_filter_is_chosen_once(tiny):
  with pytest.raises(ValueError, match=r"look_ahead = 0\.1 chooses the filter.*set one of them"):
    tiny.replace(training={"look_ahead": 0.1, "filtered": False})


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
    ({"k": 0.5}, "k = 0.5 is for the sampler ddim; two_step does not read it"),
    ({"sampler": "momentum", "noise": 2.0}, "noise = 2 is for the sampler stochastic_two_step"),
    ({"tolerance": 1e-3}, "tolerance = 0.001 is for the sampler dormand_prince"),
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
  for content in ("null", "5", "[]", '"text"', "[" * 100_000, "\xff", '{"data": []}',
                  '{"seed": 1.5}', '{"name": 5}', '{"corruption": {"kind": ["Mask"]}}',
                  '{"corruption": null}',
                  '{"corruption": {"kind": "GaussianBlur", "half_size": 1e9}}',
                  '{"corruption": {"kind": "GaussianBlur", "half_size": 1000000000}}',
                  '{"level": {"kind": "Linear", "start": "a", "stop": 1}}',
                  '{"level": {"kind": "Linear", "start": NaN, "stop": 1}}',
                  '{"level": {"kind": "Staged", "inner": 5, "begin": 0, "end": 1}}',
                  '{"data": {"image_shape": ["8", "8", "1"]}}', '{"network": {"ch_mult": [1.5]}}',
                  '{"network": {"fourier_scale": NaN}}',
                  '{"network": {"nf": 100000000000000000000}}'):  # fmt: skip
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
