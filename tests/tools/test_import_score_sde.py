"""Import of published checkpoints: round trips, faults by name, file formats."""

import copy
import json
import pathlib
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

from soft_diffusion_tf import samplers, training
from soft_diffusion_tf import score_sde as import_score_sde
from soft_diffusion_tf.networks import NCSNpp

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "ncsnpp"
NAMES = sorted(path.name for path in GOLDEN.glob("*.npz"))
CONFIG = {
  "model": {
    "name": "ncsnpp",
    "nf": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "resamp_with_conv": True,
    "conditional": True,
    "fir": True,
    "fir_kernel": [1, 3, 3, 1],
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "fourier",
    "fourier_scale": 16,
    "init_scale": 0.0,
    "scale_by_sigma": True,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
    "num_scales": 20,
    "nonlinearity": "swish",
  },
  "data": {"image_size": 8, "num_channels": 3, "centered": False},
  "training": {"continuous": True},
}


def config(section="model", **changes):
  result = copy.deepcopy(CONFIG)
  result[section].update(changes)
  return result


def golden(name):
  with np.load(GOLDEN / name, allow_pickle=False) as file:
    return dict(file)


@pytest.fixture(scope="module")
def arrays():
  network = NCSNpp(**import_score_sde.network_options(CONFIG))
  draw = np.random.default_rng(0)
  network.set_weights([draw.normal(size=w.shape) for w in network.get_weights()])
  return import_score_sde.export_score_sde(network)


@pytest.mark.parametrize("name", NAMES)
def test_published_tensors_come_back(name):
  data = golden(name)
  network = import_score_sde.import_score_sde(data, str(data["config_json"]))
  back = import_score_sde.export_score_sde(network)
  assert {f"param/{key}" for key in back} == {key for key in data if key.startswith("param/")}
  for key, value in back.items():
    if key == "sigmas":  # made again from its two ends: one rounding to float32 apart
      np.testing.assert_allclose(value, data["param/sigmas"], rtol=1e-6)
    else:
      np.testing.assert_array_equal(value, data[f"param/{key}"], err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_published_order(name):
  """The averaged weights of a checkpoint have no names, only this order."""
  data = golden(name)
  network = import_score_sde.import_score_sde(data, str(data["config_json"]))
  published = [key.removeprefix("param/") for key in data if key.startswith("param/")]
  assert list(import_score_sde.export_score_sde(network)) == published


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"progressive": "output_skip", "progressive_input": "input_skip"},
    {"progressive": "output_skip", "progressive_input": "input_skip", "progressive_combine": "cat"},
    {"progressive": "residual", "fir": False},
    {"progressive": "residual"},
    {"resblock_type": "ddpm"},
    {"resblock_type": "ddpm", "fir": False, "progressive_input": "none"},
    {"resblock_type": "ddpm", "resamp_with_conv": False},
    {"embedding_type": "positional"},
    {"conditional": False},
    {"conditional": False, "embedding_type": "positional", "scale_by_sigma": False},
  ],
  ids=lambda c: "-".join(map(str, c.values())),
)
def test_network_round_trip(changes):
  options = import_score_sde.network_options(config(**changes))
  network = NCSNpp(**options)
  draw = np.random.default_rng(0)
  network.set_weights([draw.normal(size=w.shape) for w in network.get_weights()])
  tensors = import_score_sde.export_score_sde(network)
  twin = import_score_sde.import_score_sde(tensors, config(**changes))
  assert twin.get_config() == network.get_config()
  for a, b in zip(twin.variables, network.variables, strict=True):
    np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_unused_time_projections_of_the_published_network_are_expected(arrays):
  """Without conditioning the published blocks keep their Dense_0; the imported ones have none."""
  change = config(conditional=False)
  tensors = import_score_sde.export_score_sde(NCSNpp(**import_score_sde.network_options(change)))
  unused = [key for key in tensors if "Dense_0" in key]
  assert unused
  network = import_score_sde.import_score_sde(tensors, change)
  assert not any("time" in v.path for v in network.variables)
  del tensors[unused[0]]
  with pytest.raises(ValueError, match=rf"missing: {unused[0]}"):
    import_score_sde.import_score_sde(tensors, change)


def test_every_fault_is_listed(arrays):
  broken = dict(arrays)
  missing = [key for key in broken if key.endswith("Conv_1.bias")][:2]
  for key in missing:
    del broken[key]
  broken["all_modules.99.weight"] = np.zeros([3])
  first = next(key for key in broken if key.endswith("Conv_0.weight"))
  broken[first] = broken[first].transpose(2, 3, 1, 0)
  broken["sigmas"] = broken["sigmas"] * 2
  with pytest.raises(ValueError) as caught:
    import_score_sde.import_score_sde(broken, CONFIG)
  text = str(caught.value)
  assert "5 tensors" in text
  for line in (*(f"missing: {key} (" for key in missing), "extra: all_modules.99.weight (3,)"):
    assert line in text
  assert f"shape: {first} is (3, 3," in text
  assert "value: sigmas is (20,) from 100 to 0.02" in text


def test_names_of_data_parallel_and_bare_arrays(arrays):
  prefixed = {f"module.{key}": value for key, value in arrays.items()}
  network = import_score_sde.import_score_sde(prefixed, json.dumps(CONFIG))
  back = import_score_sde.export_score_sde(network)
  assert all((back[key] == arrays[key]).all() for key in arrays)


@pytest.mark.parametrize(
  ("section", "changes", "message"),
  [
    ("model", {"name": "ncsnv2_64"}, "ncsnv2_64.*only 'ncsnpp' and 'ddpm'"),
    ("model", {"nonlinearity": "elu"}, "elu.*only 'swish'"),
    ("training", {"continuous": False}, "training.continuous is false"),
    ("model", {"name": "ddpm", "nf": 64}, "32 groups"),
  ],
)
def test_what_cannot_be_imported_is_said(section, changes, message):
  with pytest.raises(ValueError, match=message):
    import_score_sde.network_options(config(section, **changes))


def test_a_missing_option_is_named():
  broken = copy.deepcopy(CONFIG)
  del broken["model"]["num_res_blocks"]
  with pytest.raises(ValueError, match=r"no model\.num_res_blocks"):
    import_score_sde.network_options(broken)


def test_ddpm_is_a_set_of_options():
  published = {
    "model": {
      "name": "ddpm",
      "nf": 128,
      "ch_mult": (1, 2, 2, 2),
      "num_res_blocks": 2,
      "dropout": 0.1,
      "attn_resolutions": (16,),
      "resamp_with_conv": True,
      "conditional": True,
      "scale_by_sigma": True,
      "sigma_min": 0.01,
      "sigma_max": 50,
      "num_scales": 1000,
      "embedding_type": "fourier",
      "nonlinearity": "swish",
    },
    "data": {"image_size": 32, "num_channels": 3, "centered": False},
  }
  with keras.StatelessScope():
    network = NCSNpp(**import_score_sde.network_options(published))
  assert sum(np.prod(v.shape) for v in network.variables) == 35_218_947  # as published


def test_averaged_weights_are_matched_by_order(arrays):
  """A .pth holds names for the last weights and a bare list for the averages."""
  model = {f"module.{key}": value for key, value in arrays.items()}
  trainable = [key for key in model if not key.endswith(("sigmas", "all_modules.0.W"))]
  state = {"model": model, "ema": {"shadow_params": [model[key] + 1 for key in trainable]}}
  averages = import_score_sde._named(import_score_sde._ema(state))
  for key, value in arrays.items():
    frozen = key in ("sigmas", "all_modules.0.W")
    np.testing.assert_array_equal(averages[key], value if frozen else value + 1)
  state["ema"]["shadow_params"].pop()
  for broken in (state, {"model": model}, {"model": model, "ema": {}}):
    with pytest.raises(ValueError, match="--noema"):
      import_score_sde._ema(broken)


def test_a_torn_file_is_named(tmp_path, arrays, monkeypatch):
  path = tmp_path / "torn.npz"
  np.savez(path, **arrays)
  whole = path.read_bytes()
  for part in (whole[: len(whole) // 2], whole[:2], b""):
    path.write_bytes(part)
    with pytest.raises(ValueError, match=r"torn\.npz: cannot be read as \.npz .*; copy it anew"):
      import_score_sde.load_arrays(path)

  def load(*args, **options):  # as PyTorch has it, which need not be here
    raise RuntimeError("failed finding central directory")

  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
  with pytest.raises(ValueError, match=r"torn\.pth: cannot be read .*central directory"):
    import_score_sde.load_arrays(tmp_path / "torn.pth")


def test_pth_without_torch_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match=r"pip install 'soft-diffusion-tf\[import\]'"):
    import_score_sde.load_arrays(tmp_path / "checkpoint.pth")


def test_pth_with_torch(tmp_path, arrays):
  torch = pytest.importorskip("torch")
  model = {f"module.{key}": torch.tensor(value) for key, value in arrays.items()}
  trainable = [key for key in model if not key.endswith(("sigmas", "all_modules.0.W"))]
  averages = [model[key] + 1 for key in trainable]
  state = {"model": model, "ema": {"decay": 0.999, "shadow_params": averages}, "step": 3}
  torch.save(state, tmp_path / "checkpoint.pth")
  for ema in (False, True):
    loaded, _, step = import_score_sde.load_arrays(tmp_path / "checkpoint.pth", ema=ema)
    assert step == 3
    network = import_score_sde.import_score_sde(loaded, CONFIG)
    back = import_score_sde.export_score_sde(network)
    for key in arrays:
      frozen = key in ("sigmas", "all_modules.0.W")
      np.testing.assert_array_equal(back[key], arrays[key] + (ema and not frozen))


def test_configuration_files(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "config.py").write_text(
    f"import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({CONFIG!r})\n"
  )
  want = import_score_sde.network_options(CONFIG)
  for name in ("config.json", "config.py"):
    config_read = import_score_sde.load_config(tmp_path / name)
    assert import_score_sde.network_options(config_read) == want
  (tmp_path / "alone.py").write_text("from configs.not_here import get_default_configs\n")
  with pytest.raises(ValueError, match="running it ended with ModuleNotFoundError"):
    import_score_sde.load_config(tmp_path / "alone.py")


def test_a_converted_file_is_a_workdir(tmp_path):
  """Config, prior and checkpoint: it can be sampled from, and its denoiser is Tweedie's."""
  import_score_sde.convert(GOLDEN / NAMES[0], None, tmp_path / "w")
  run = training.load(tmp_path / "w")
  data = golden(NAMES[0])
  y = run.model.ema_network(data["x"], data["time_cond"]).numpy()
  assert np.abs(y - data["y"]).max() < 2e-5 * np.abs(data["y"]).max()  # as for the golden output
  t = np.float32([0.4, 0.6])
  sigma = run.diffusion.sigma(t).numpy()
  np.testing.assert_allclose(run.model.cond(t), sigma, rtol=1e-5)  # a VE network is told σ
  score = run.model.ema_network(data["x"], sigma).numpy()
  x_0 = run.denoiser()(data["x"], t).numpy()
  np.testing.assert_allclose(
    run.diffusion.score(data["x"], t, x_0), score, rtol=1e-3, atol=1e-3 * np.abs(score).max()
  )
  plan = samplers.plan("ddim", samplers.time_grid(3), run.diffusion)
  assert np.isfinite(run.sampler()(plan, range(2))).all()
  with pytest.raises(ValueError, match="holds a run already"):
    import_score_sde.convert(GOLDEN / NAMES[0], None, tmp_path / "w")


@pytest.mark.parametrize("sde", ["vpsde", "subvpsde"])
def test_vp_networks_see_images_from_minus_one_to_one(sde):
  """x̂_0 by hand in the published range [−1, 1]: (x' − σ' ε)/α, then to [0, 1]."""
  published = config("data", centered=True)
  published["model"] |= {"embedding_type": "positional", "scale_by_sigma": False}
  published["model"] |= {"beta_min": 0.1, "beta_max": 20.0}
  published["training"]["sde"] = sde
  e = import_score_sde.experiment(published)
  assert str(e.sampling.sampler) == "ancestral"
  model = training.build(e, e.build_diffusion())
  draw = np.random.default_rng(0)
  model.network.set_weights([0.2 * draw.normal(size=w.shape) for w in model.network.get_weights()])
  t = np.float32([0.2, 0.5])
  alpha = np.exp(-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1).reshape(-1, 1, 1, 1)
  sigma = np.sqrt(1 - alpha**2) if sde == "vpsde" else 1 - alpha**2
  x_0 = draw.uniform(size=(2, 8, 8, 3)).astype(np.float32)
  z = draw.normal(size=x_0.shape).astype(np.float32)
  wide = alpha * (2 * x_0 - 1) + sigma * z  # the published forward process
  x_t = model.diffusion.forward(x_0, t, z).numpy()
  np.testing.assert_allclose(2 * x_t - alpha, wide, atol=1e-5)
  noise = model.network(wide, 999 * t).numpy()
  want = ((wide - sigma * noise) / alpha + 1) / 2
  np.testing.assert_allclose(model(x_t, t), want, rtol=1e-3, atol=1e-3)


def test_processes_that_do_not_fit():
  with pytest.raises(ValueError, match="none of the published"):
    import_score_sde.experiment(config("data", centered=True))
  odd = copy.deepcopy(CONFIG)
  odd["training"]["sde"] = "edm"
  with pytest.raises(ValueError, match="'edm' is unknown"):
    import_score_sde.experiment(odd)


def test_the_command_fails_in_one_message(tmp_path, arrays):
  np.savez(tmp_path / "bare.npz", **arrays)
  command = [sys.executable, "-m", "tools.import_score_sde"]
  command += [f"--checkpoint={tmp_path / 'bare.npz'}", f"--out={tmp_path / 'out'}"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 2
  assert "error: --config is needed" in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "out").exists()
