"""Names of version 0.1 that have moved go on to work, and say where they are."""

import importlib

import pytest

from soft_diffusion_tf import moved

PUBLIC = {  # some names of each module, as version 0.1 had them
  "artefact": "export load pack unpack from_pretrained pretrained card UNSTATED",
  "bulk": "BatchSampler write settings_of SETTINGS_FILE",
  "checkpoints": "Checkpoints",
  "classifier": "get build Classifier",
  "features": "feature_network FeatureNetwork",
  "memorisation": "",
  "monitoring": "Monitor METRICS_FILE",
  "scheduling": "find search measure shortest_path Distances Clouds Sinkhorn closed_form_distances "
  "candidate_levels check_closed_form NotClosedForm mse_matched METHODS",
  "sinkhorn": "sinkhorn sinkhorn_divergence identity_potentials",
  "strategies": "make_strategy replicas_by_host",
  "sweeps": "",
}


@pytest.mark.parametrize("old", moved.MODULES)
def test_a_module_is_found_by_its_old_name(old, monkeypatch):
  monkeypatch.delitem(importlib.sys.modules, f"soft_diffusion_tf.{old}", raising=False)
  with pytest.warns(
    DeprecationWarning, match=f"tf.{old} is soft_diffusion_tf.{moved.MODULES[old]} "
  ):
    module = importlib.import_module(f"soft_diffusion_tf.{old}")
  new = importlib.import_module(f"soft_diffusion_tf.{moved.MODULES[old]}")
  for name in PUBLIC[old].split():
    assert getattr(module, name) is getattr(new, name, None) or f"{old}.{name}" in moved.NAMES
  with pytest.raises(AttributeError):
    module.nonsense  # noqa: B018


@pytest.mark.parametrize("old", moved.NAMES)
def test_a_name_is_found_where_it_was(old):
  module, _, name = old.rpartition(".")
  new, _, new_name = moved.NAMES[old].rpartition(".")
  found = importlib.import_module(f"soft_diffusion_tf.{new}")
  before = importlib.import_module(f"soft_diffusion_tf.{module}")
  assert getattr(before, name) is getattr(found, new_name)
  with pytest.raises(AttributeError):
    before.nonsense  # noqa: B018


def test_a_from_import_of_an_old_module():
  from soft_diffusion_tf import scheduling, transport

  assert scheduling.find is transport.find
