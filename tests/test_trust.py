"""Data that names code: nothing of it runs without consent, by whichever way it is opened."""

import json
import sys

import keras
import numpy as np
import pytest

from soft_diffusion_tf import corruptions, data, export, parts, priors, training, trust
from soft_diffusion_tf.diffusion import Diffusion
from soft_diffusion_tf.evaluation import features
from soft_diffusion_tf.experiment import Experiment
from soft_diffusion_tf.model import SoftDiffusionModel
from soft_diffusion_tf.training import workdir

_MODULE = """
import dataclasses, pathlib
from soft_diffusion_tf import corruptions
pathlib.Path(__file__).with_name("ran").touch()

@dataclasses.dataclass(frozen=True)
class Fade(corruptions.Corruption):
  level_range = (0.0, 10.0)
  def apply(self, x, level):
    return (1.0 - level / 20.0) * x

def family(level):
  pathlib.Path(__file__).with_name("ran").touch()
  import tensorflow as tf
  return (1.0 - level / 20.0) * tf.eye(64)

number = 5
"""

CLASS = {"kind": "foreign_module:Fade"}
FUNCTION = {"kind": "Family", "family": "foreign_module:family", "low": 0.0, "high": 10.0}
BLUR = {"kind": "GaussianBlur"}
LEVELS = {"inner_level": (0.0, 1.0), "outer_level": (0.0, 1.0)}
NAMED = {
  "class": CLASS,
  "function": FUNCTION,
  "inner": {"kind": "Compose", "inner": CLASS, "outer": BLUR, **LEVELS},
  "outer": {"kind": "Compose", "inner": BLUR, "outer": FUNCTION, **LEVELS},
  "deep": {
    "kind": "Compose",
    "outer": BLUR,
    **LEVELS,
    "inner": {"kind": "Compose", "inner": BLUR, "outer": CLASS, **LEVELS},
  },
}


@pytest.fixture
def ran(tmp_path, monkeypatch):
  """The file that somebody's module leaves when any of its code runs."""
  folder = tmp_path / "somebody"
  folder.mkdir()
  (folder / "foreign_module.py").write_text(_MODULE)
  monkeypatch.syspath_prepend(folder)
  monkeypatch.delitem(sys.modules, "foreign_module", raising=False)
  return folder / "ran"


@pytest.fixture(scope="module")
def run(request):
  tiny = request.getfixturevalue("tiny")
  process = tiny.build_diffusion()
  process = process.with_prior(
    priors.fit("blurred_colour", request.getfixturevalue("digits"), process)
  )
  return training.Run(tiny, training.build(tiny, process), 0)


def _in_json(path, change):
  content = json.loads(path.read_text())
  path.write_text(json.dumps(change(content) or content))


@pytest.fixture(params=["packed", "workdir", "experiment", "diffusion", "model"])
def open_(request, run, tmp_path):
  """A function of a corruption's config: opens a model whose file names it."""
  kind = request.param
  if kind == "packed":
    export.pack(run, tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
      content = dict(file)

    def opens(config, **consent):
      about = json.loads(str(content["about"]))
      about.pop("sha256")
      about["experiment"]["corruption"] = config
      np.savez(tmp_path / "m.npz", **content | {"about": np.array(json.dumps(about))})
      return export.from_pretrained(tmp_path / "m.npz", **consent)

  elif kind == "workdir":
    training.write(run, tmp_path / "w")

    def opens(config, **consent):
      _in_json(tmp_path / "w" / "config.json", lambda c: c | {"corruption": config})
      return export.from_pretrained(tmp_path / "w", **consent)

  elif kind == "experiment":
    content = run.experiment.to_dict()

    def opens(config, **consent):
      return Experiment.from_config(content | {"corruption": config}, **consent).build_diffusion()

  elif kind == "diffusion":
    content = run.diffusion.get_config()

    def opens(config, **consent):
      return Diffusion.from_config(content | {"corruption": config}, **consent)

  else:
    content = run.model.get_config()

    def opens(config, **consent):
      changed = content["diffusion"] | {"corruption": config}
      return SoftDiffusionModel.from_config(content | {"diffusion": changed}, **consent)

  return opens


@pytest.mark.parametrize("named", NAMED)
def test_no_code_that_a_file_names_runs_without_consent(named, open_, ran):
  with pytest.raises(trust.UntrustedCode, match="foreign_module:") as raised:
    open_(NAMED[named])
  assert "trust_code=True" in str(raised.value)
  assert "--trust_code" in str(raised.value)
  assert "\n" not in str(raised.value)
  assert "foreign_module" not in sys.modules
  assert not ran.exists()


def test_with_consent_it_opens(open_, ran, blur_diffusion):
  open_(CLASS, trust_code=True)
  assert ran.exists()
  with trust.trust_code():
    open_(FUNCTION)
  with trust.trust_code([FUNCTION["family"]]):
    open_(FUNCTION)
    with pytest.raises(trust.UntrustedCode, match="foreign_module:Fade"):
      open_(CLASS)
  with pytest.raises(trust.UntrustedCode):  # consent ends with its block
    open_(CLASS)


@pytest.mark.parametrize(
  "name", ["this:s", "os:system", "soft_diffusion_tf.export.folder:shutil.rmtree"]
)
def test_nor_does_code_that_is_at_hand_already(name):
  for config in ({"kind": name}, {"kind": "Family", "family": name, "low": 0, "high": 10}):
    with pytest.raises(trust.UntrustedCode, match=name):
      corruptions.from_config(config)
  assert "this" not in sys.modules


def test_what_is_imported_must_be_what_is_asked_for(ran):
  for config, text in {
    "foreign_module:number": "not a class derived from Corruption",
    "foreign_module:none": "cannot import 'foreign_module:none'",
    "foreign_module:": "cannot import",
    ":x": "cannot import",
    "..:x": "cannot import",
    "no_such_module:x": "PYTHONPATH",
  }.items():
    with pytest.raises(ValueError, match=text):
      corruptions.from_config({"kind": config}, trust_code=True)
  with pytest.raises(ValueError, match="not a function of the level"):
    corruptions.from_config(FUNCTION | {"family": "foreign_module:number"}, trust_code=True)
  (ran.parent / "broken_module.py").write_text("import sys; sys.exit(3)")
  with pytest.raises(ValueError, match=r"cannot import 'broken_module:x' \(SystemExit"):
    corruptions.from_config({"kind": "broken_module:x"}, trust_code=True)


def test_a_keras_file(run, ran, tmp_path):
  process = run.diffusion
  from_config = lambda config: corruptions.from_config(config, trust_code=True)
  own = Diffusion(
    process.image_shape, from_config(CLASS), process.level, process.sigma_schedule, process.prior
  )
  model = SoftDiffusionModel(
    run.experiment.build_network(),
    own,
    training=run.experiment.training,
    options=run.experiment.network,
  )
  model.compile()
  model.save(tmp_path / "m.keras")
  del sys.modules["foreign_module"]
  ran.unlink()
  with pytest.raises(ValueError, match="foreign_module:Fade"):
    keras.models.load_model(tmp_path / "m.keras")
  assert not ran.exists()
  with trust.trust_code():
    back = keras.models.load_model(tmp_path / "m.keras")
  assert type(back.diffusion.corruption).__name__ == "Fade"


KERAS_DAMAGES = {  # what becomes of a field of the network's config → what the error says
  "nf": (10**6, "network.nf must be from 4 to"),
  "ch_mult": ([10**6], "ch_mult.0. must be from"),
  "num_res_blocks": (10**7, "num_res_blocks must be from"),
  "image_shape": ([16, 16, 1], "make both for one size"),
  "attn_resolutions": (None, "attn_resolutions must be a tuple"),
}


@pytest.mark.parametrize("field", KERAS_DAMAGES)
def test_a_keras_file_that_asks_for_another_network_is_refused_before_it_is_made(
  field, run, tmp_path
):
  value, text = KERAS_DAMAGES[field]
  config = run.model.get_config()
  config["network"]["config"][field] = value
  with pytest.raises(ValueError, match=text):
    SoftDiffusionModel.from_config(json.loads(json.dumps(config)))


@pytest.mark.parametrize("network", [None, "x", [], 5, {}, {"class_name": "Fade"}])
def test_nor_is_a_network_of_another_kind(network, run, ran):
  config = run.model.get_config()
  with pytest.raises(ValueError, match="network of this model"):
    SoftDiffusionModel.from_config(config | {"network": network})
  of_another = config["network"] | {"module": "foreign_module", "class_name": "Fade"}
  for name in (None, "Fade", "foreign_module>Fade"):
    with pytest.raises(ValueError, match="network of this model cannot be made"):
      SoftDiffusionModel.from_config(config | {"network": of_another | {"registered_name": name}})
  assert not ran.exists()
  with pytest.raises(ValueError, match="the seed of this model is -1"):
    SoftDiffusionModel.from_config(config | {"seed": -1})


def test_a_run_goes_on_with_the_code_that_its_config_names_and_no_other(run, ran, tmp_path):
  e = run.experiment
  fade = corruptions.from_config(CLASS, trust_code=True)
  own = e.replace(corruption=fade)
  own.save(tmp_path)
  assert workdir.changed_fields(tmp_path, own) == {}
  ran.unlink()
  del sys.modules["foreign_module"]
  with pytest.raises(ValueError, match="another config"):
    workdir.changed_fields(tmp_path, e)
  assert not ran.exists()
  nested = corruptions.Compose(corruptions.GaussianBlur(), fade)
  assert parts.code_of(nested.get_config()) == {"foreign_module:Fade"}
  assert parts.code_of(FUNCTION) == {"foreign_module:family"}
  assert parts.code_of(corruptions.GaussianBlur().get_config()) == set()


def test_a_config_may_name_a_data_set_that_runs_code_only_by_consent(tmp_path):
  for name in ("digits", "folder:a:b", "cifar10", "cifar10:3.0.2", "imagenet_resized/64x64:0.*.*"):
    data.check_consent(name)
  risky = ("huggingface:x", "kaggle:a/b", "a/data_dir=x", "a/b,c=d", "", "gs://x", "a:b:1.0.0")
  for name in risky:
    with pytest.raises(trust.UntrustedCode, match="--trust_code"):
      data.check_consent(name)
    with trust.trust_code():
      data.check_consent(name)
  with pytest.raises(trust.UntrustedCode, match="no local folder"):
    data.check_consent("own", "gs://bucket")
  file = tmp_path / "own" / "1.0.0" / "features.json"
  file.parent.mkdir(parents=True)
  good = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"}
  file.write_text(json.dumps({"featuresDict": {"features": {"image": good}}, **good}))
  data.check_consent("own", tmp_path)
  for bad in (
    '{"a": {"\\u0070ythonClassName": "foreign_module.x"}}',
    '{"type": "foreign_module.x"}',
    '[{"python_class_name": "foreign_module.x", "python_class_name": "y"}]',
  ):
    file.write_text(bad)
    with pytest.raises(trust.UntrustedCode, match="foreign_module"):
      data.check_consent("own", tmp_path)
  file.write_text("{")
  with pytest.raises(ValueError, match=r"features\.json: not JSON"):
    data.check_consent("own", tmp_path)


def test_a_config_may_name_a_saved_model_only_by_consent():
  for name in ("pixels", "pixels:8", "classifier", "tfgan"):
    features.check_consent(name)
  for name in ("tfgan:FOLDER", "runs/x/model", "model#pool", ""):
    with pytest.raises(trust.UntrustedCode, match="SavedModel"):
      features.check_consent(name)
    with trust.trust_code():
      features.check_consent(name)
