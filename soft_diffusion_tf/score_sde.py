"""Networks of the published score_sde, in both directions, and its configurations.

`load_arrays` reads a PyTorch checkpoint of github.com/yang-song/score_sde_pytorch (Song et al.
2021, arXiv:2011.13456) or an `.npz` with the same tensor names, `convert` makes a workdir of one.
The configuration is JSON with the published option names under "model", "data" and "training", or
a Python file with `get_config()`, or, for an `.npz`, its own `config_json`. The networks "ncsnpp"
(VE, VP and sub-VP) and "ddpm" can be imported; they differ by options alone.
"""

import collections.abc
import dataclasses
import json
import pathlib
import pickle
import runpy
import zipfile
import zlib

import numpy as np

from soft_diffusion_tf import corruptions, packages, priors, schedules, training
from soft_diffusion_tf.experiment import Data, Experiment, Network, Sampling, Training
from soft_diffusion_tf.networks import NCSNpp, blocks

_FIR = (1, 3, 3, 1)  # the filter of the published networks
_PREFIX = "param/"  # of tensors in an .npz that holds other arrays, too
_PARALLEL = "module."  # put before every name by torch's DataParallel

# A layout is a pair of functions: published → ours, ours → published.
_SAME = (lambda a: a, lambda a: a)
_TRANSPOSED = (np.transpose, np.transpose)  # [out, in] ↔ [in, out]
_CONV = (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
_CONV_1X1 = (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])


def _plain(config):
  if isinstance(config, str):
    config = json.loads(config)
  if hasattr(config, "to_dict"):  # ml_collections
    config = config.to_dict()
  if not isinstance(config, collections.abc.Mapping):
    raise ValueError(f"config must be a mapping or JSON text, not {type(config).__name__}")
  return config


def network_options(config):
  """The constructor arguments of `NCSNpp` for a published configuration.

  Args:
    config: mapping, ConfigDict or JSON text with "model", "data" and "training".

  Raises:
    ValueError: an option is missing, or asks for something that `NCSNpp` does not do.
  """
  config = _plain(config)

  def get(section, key):
    try:
      return config[section][key]
    except KeyError:
      raise ValueError(
        f"the configuration has no {section}.{key}; is it the one the checkpoint was trained with?"
      ) from None

  model = config.get("model", {})
  kind = model.get("name", "ncsnpp")
  if kind not in ("ncsnpp", "ddpm"):
    raise ValueError(f"model.name={kind!r} cannot be imported; only 'ncsnpp' and 'ddpm' can")
  if str(model.get("nonlinearity", "swish")).lower() != "swish":
    raise ValueError(
      f"model.nonlinearity={model['nonlinearity']!r} cannot be imported; only 'swish' can"
    )
  size = get("data", "image_size")
  options = {
    "image_shape": (size, size, get("data", "num_channels")),
    "centered": bool(get("data", "centered")),
    "scale_by_sigma": bool(get("model", "scale_by_sigma")),
    "init_scale": float(model.get("init_scale", 0.0)),
    **{key: tuple(get("model", key)) for key in ("ch_mult", "attn_resolutions")},
    **{
      key: get("model", key)
      for key in ("nf", "num_res_blocks", "dropout", "resamp_with_conv", "conditional")
    },
    **{key: model[key] for key in ("sigma_min", "sigma_max", "num_scales") if key in model},
  }
  if kind == "ddpm":
    if options["nf"] < 128:
      raise ValueError(
        f"model.nf={options['nf']} cannot be imported for 'ddpm', whose normalisation always has "
        "32 groups; from 128 channels up NCSN++ has as many"
      )
    options |= {
      "resblock_type": "ddpm",
      "fir": False,
      "skip_rescale": False,
      "progressive_input": "none",
      "embedding_type": "positional",
    }
    return options
  options |= {
    **{key: bool(get("model", key)) for key in ("fir", "skip_rescale")},
    **{
      key: str(get("model", key)).lower()
      for key in ("resblock_type", "progressive", "progressive_input", "embedding_type")
    },
    "fir_kernel": tuple(model.get("fir_kernel", _FIR)),
    "progressive_combine": str(model.get("progressive_combine", "sum")).lower(),
    "fourier_scale": float(model.get("fourier_scale", 16.0)),
  }
  if options["embedding_type"] == "fourier" and not get("training", "continuous"):
    raise ValueError(
      "model.embedding_type='fourier' takes noise levels, but training.continuous is false; "
      "the published network refuses this, too"
    )
  return options


def _table(options):
  """The published buffer `sigmas`, or None if the options do not say."""
  values = [options.get(key) for key in ("sigma_max", "sigma_min", "num_scales")]
  return None if None in values else np.geomspace(*values)


def _tensors(network):
  """Yields (published name, variable or None, layout, published shape) in the published order.

  None stands for the time projections of a network without conditioning, which the published one
  has all the same, and never reads.
  """

  def variable(name, value, layout=_SAME):
    shape = layout[1](np.empty(value.shape, np.bool_)).shape
    return name, value, layout, shape

  def weight_and_bias(name, layer, layout):
    yield variable(f"{name}.weight", layer.kernel, layout)
    yield variable(f"{name}.bias", layer.bias)

  def nin(name, layer):
    yield variable(f"{name}.W", layer.kernel)
    yield variable(f"{name}.b", layer.bias)

  def norm(name, layer):
    yield variable(f"{name}.weight", layer.gamma)
    yield variable(f"{name}.bias", layer.beta)

  for number, layer in enumerate(network.blocks):
    name = f"all_modules.{number}"
    if isinstance(layer, blocks.ResidualBlock):
      yield from norm(f"{name}.GroupNorm_0", layer.norm_0)
      yield from weight_and_bias(f"{name}.Conv_0", layer.conv_0, _CONV)
      if layer.time is None:
        channels = layer.conv_0.bias.shape[0]
        yield f"{name}.Dense_0.weight", None, _SAME, (channels, 4 * network.nf)
        yield f"{name}.Dense_0.bias", None, _SAME, (channels,)
      else:
        yield from weight_and_bias(f"{name}.Dense_0", layer.time, _TRANSPOSED)
      yield from norm(f"{name}.GroupNorm_1", layer.norm_1)
      yield from weight_and_bias(f"{name}.Conv_1", layer.conv_1, _CONV)
      if layer.shortcut is not None and network.resblock_type == "ddpm":
        yield from nin(f"{name}.NIN_0", layer.shortcut)
      elif layer.shortcut is not None:
        yield from weight_and_bias(f"{name}.Conv_2", layer.shortcut, _CONV_1X1)
    elif isinstance(layer, blocks.Attention):
      yield from norm(f"{name}.GroupNorm_0", layer.norm)
      for i, part in enumerate((layer.query, layer.key, layer.value, layer.out)):
        yield from nin(f"{name}.NIN_{i}", part)
    elif isinstance(layer, blocks.Resample):
      if layer.conv is not None:
        part = "Conv2d_0" if layer.taps else "Conv_0"
        yield from weight_and_bias(f"{name}.{part}", layer.conv, _CONV)
    elif isinstance(layer, blocks.Combine):
      yield from weight_and_bias(f"{name}.Conv_0", layer.conv, _CONV_1X1)
    elif isinstance(layer, blocks.GroupNorm):
      yield from norm(name, layer)
    elif isinstance(layer, blocks.Conv2D):
      yield from weight_and_bias(name, layer, _CONV)
    elif isinstance(layer, blocks.Dense):
      yield from weight_and_bias(name, layer, _TRANSPOSED)
    elif isinstance(layer, blocks.FourierFeatures):
      yield variable(f"{name}.W", layer.frequencies)
    else:
      raise TypeError(f"no published name for a {type(layer).__name__}")


def _named(arrays):
  """The tensors of `arrays` by their bare names."""
  if any(key.startswith(_PREFIX) for key in arrays):
    arrays = {key.removeprefix(_PREFIX): arrays[key] for key in arrays if key.startswith(_PREFIX)}
  return {key.removeprefix(_PARALLEL): np.asarray(arrays[key]) for key in arrays}


def import_score_sde(arrays, config):
  """An `NCSNpp` with published weights.

  Args:
    arrays: mapping from tensor names, `all_modules.N...`, to arrays in PyTorch's layouts. If some
      names start with "param/", only those are taken.
    config: as for `network_options`.

  Returns:
    The network; its condition is σ for Fourier embeddings, else the published time label.

  Raises:
    ValueError: with every missing, extra and mis-shaped tensor, or for a bad configuration.
  """
  arrays = _named(arrays)
  options = network_options(config)
  network = NCSNpp(**options)
  tensors = list(_tensors(network))
  shapes = {name: tuple(shape) for name, _, _, shape in tensors}
  table = _table(options)
  sigmas = arrays.pop("sigmas", None)  # a buffer, which follows from the configuration
  faults = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in arrays]
  faults += [f"extra: {name} {a.shape}" for name, a in arrays.items() if name not in shapes]
  faults += [
    f"shape: {name} is {arrays[name].shape}, the configuration says {shape}"
    for name, shape in shapes.items()
    if name in arrays and arrays[name].shape != shape
  ]
  # The table may have been kept in float32, at 1e-7; another range differs by percents.
  if (
    sigmas is not None
    and table is not None
    and (sigmas.shape != table.shape or not np.allclose(sigmas, table, rtol=1e-4))
  ):
    faults.append(
      f"value: sigmas is {sigmas.shape} from {sigmas.flat[0]:g} to {sigmas.flat[-1]:g}, the "
      f"configuration says {table.shape} from {table[0]:g} to {table[-1]:g}"
    )
  if faults:
    raise ValueError(
      f"checkpoint and configuration disagree in {len(faults)} tensors:\n  " + "\n  ".join(faults)
    )
  for name, variable, layout, _ in tensors:
    if variable is not None:
      variable.assign(layout[0](arrays[name]))
  return network


def export_score_sde(network):
  """The reverse of `import_score_sde`: published names → float32 arrays in PyTorch's layouts."""
  table = _table(network.get_config())
  arrays = {} if table is None else {"sigmas": table.astype(np.float32)}
  for name, variable, layout, shape in _tensors(network):
    value = np.zeros(shape) if variable is None else layout[1](variable.numpy())
    arrays[name] = np.ascontiguousarray(value, np.float32)
  return arrays


def _ema(state):
  """The averaged weights: the published list has trainable parameters in order, without names."""
  model = state["model"]
  frozen = [name for name in model if name.endswith(("sigmas", "all_modules.0.W"))]
  names = [name for name in model if name not in frozen]
  averages = state.get("ema", {}).get("shadow_params")
  if averages is None:
    raise ValueError(
      "the checkpoint has no averages (ema.shadow_params); --noema imports the last weights instead"
    )
  if len(averages) != len(names):
    raise ValueError(
      f"the checkpoint has {len(names)} trainable tensors, but averages of {len(averages)}; "
      "--noema imports the last weights instead"
    )
  return {**{name: model[name] for name in frozen}, **dict(zip(names, averages))}


def load_arrays(path, ema=True):
  """Reads `.pth` or `.npz` → (arrays by published name, configuration or None, step)."""
  path = pathlib.Path(path)
  if path.suffix == ".npz":
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(f"{path}: cannot be read as .npz ({error}); copy it anew") from None
    config = arrays.pop("config_json", None)
    return arrays, None if config is None else json.loads(str(config)), 0
  npz = "save its tensors as .npz with the same names elsewhere"
  with packages.needed("soft-diffusion-tf[import]", f"reading {path.name} by PyTorch", npz):
    import torch
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
    raise ValueError(f"{path}: cannot be read as .pth ({error}); copy it anew") from None
  if "model" not in state:
    raise ValueError(f"{path.name} has no 'model' entry; is it a score_sde checkpoint?")
  tensors = _ema(state) if ema else state["model"]
  arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
  return arrays, None, int(state.get("step", 0))


def load_config(path):
  """Reads a configuration: JSON, or a Python file with `get_config()`."""
  path = pathlib.Path(path)
  if path.suffix == ".py":
    try:
      return _plain(runpy.run_path(str(path))["get_config"]())
    except Exception as error:  # it is someone else's program
      raise ValueError(
        f"{path}: running it ended with {type(error).__name__}: {error}; run this where its "
        "imports can be found, or give the configuration as JSON"
      ) from None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:  # ValueError: also of bytes that are no text
    raise ValueError(f"{path}: not JSON ({error}); give a configuration of score_sde") from None


def experiment(config):
  """The `Experiment` of a published configuration: its process, network and hyper-parameters.

  VE, VP and sub-VP as in Song et al. 2021. VP and sub-VP networks are made for images in [−1, 1];
  here images are in [0, 1], which is the same process with half the noise. Each is sampled by 1,000
  steps of its own predictor: VE by reverse diffusion ("momentum"), VP and sub-VP by "ancestral".

  Raises:
    ValueError: an unknown process, or data whose range does not fit it.
  """
  config = _plain(config)
  options = network_options(config)
  shape = options.pop("image_shape")
  sde = str(config.get("training", {}).get("sde", "vesde")).lower()
  model, data = config.get("model", {}), config.get("data", {})
  if sde not in ("vesde", "vpsde", "subvpsde"):
    raise ValueError(f"training.sde={sde!r} is unknown; it is vesde, vpsde or subvpsde")
  if options["centered"] != (sde != "vesde"):
    raise ValueError(
      f"training.sde={sde!r} with data.centered={options['centered']} is none of the published "
      "configurations: VE networks take images in [0, 1], VP and sub-VP in [−1, 1]"
    )
  # A set without a name here keeps its own, which data.load refuses until another is given.
  dataset = str(data.get("dataset", "unknown")).lower()
  name = {"celeba": "celeb_a"}.get(dataset, dataset)
  if sde == "vesde" and not {"sigma_min", "sigma_max"} <= set(model):
    raise ValueError(
      "the configuration has no model.sigma_min and model.sigma_max; a VE one has both"
    )
  if sde == "vesde":
    low, high = model["sigma_min"], model["sigma_max"]
    process = {
      "corruption": corruptions.Identity(),
      "level": schedules.Constant(0.0),
      "sigma": schedules.Geometric(low, high),
    }
    positional = options["embedding_type"] == "positional"
    sampler = "momentum"
    told = {
      "prediction": "score",
      "conditioning": "ve_label" if positional else "log_linear",
      "cond_min": float(low),
      "cond_max": float(high),
    }
  else:
    beta = {
      key: float(model.get(key, value)) for key, value in (("beta_min", 0.1), ("beta_max", 20.0))
    }
    kind = schedules.VPSigma if sde == "vpsde" else schedules.SubVPSigma
    process = {
      "corruption": corruptions.Scale(),
      "level": schedules.VPScale(**beta),
      "sigma": schedules.Scaled(kind(**beta), 0.5),
    }
    sampler = "ancestral"
    told = {"prediction": "noise", "conditioning": "vp_label"}
  if tuple(options.get("fir_kernel", _FIR)) != _FIR:
    raise ValueError(
      f"model.fir_kernel={options['fir_kernel']}: the network of a workdir has {_FIR} alone"
    )
  network = {
    key: value
    for key, value in options.items()
    if key in {field.name for field in dataclasses.fields(Network)}
  } | told
  return Experiment(
    name=f"score_sde_{sde}",
    data=Data(name=name, image_shape=shape),
    prior=priors.Zero(),
    network=Network(**network),
    training=Training(ema_decay=float(model.get("ema_rate", 0.999))),
    sampling=Sampling(sampler=sampler, steps=1000),
    **process,
  )


def write(network, averages, config, out, step=0):
  """Writes a workdir: config.json, prior.npz and a checkpoint of `network` and its averages."""
  e = experiment(config)
  process = e.build_diffusion()
  # Noise around the image of mean 0 in [−1, 1], which is ½ here, at the scale of t = 1.
  mean = 0.5 * float(process.level(1.0)) if e.network.prediction == "noise" else 0.0
  zero = priors.zero(e.data.image_shape)
  process = process.with_prior(dataclasses.replace(zero, mean=zero.mean + np.float32(mean)))
  model = training.build(e, process)
  model.network.set_weights(network.get_weights())
  model.ema_network.set_weights(averages.get_weights())
  model.optimizer.iterations.assign(step)
  training.write(training.Run(e, model, step), out)


def convert(checkpoint, config, out, ema=True):
  """Imports the file `checkpoint` with the configuration file `config` (or its own) into `out`."""
  if (pathlib.Path(out) / "config.json").exists():
    raise ValueError(f"{out} holds a run already; give another --out")
  last, own, step = load_arrays(checkpoint, ema=False)
  if config is None and own is None:
    raise ValueError("--config is needed: this checkpoint does not hold its configuration")
  named = checkpoint if config is None else config
  config = own if config is None else load_config(config)
  try:
    experiment(config)
  except ValueError as error:
    raise ValueError(f"{named}: {error}") from None
  except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
    raise ValueError(
      f"{named}: not a configuration of score_sde ({type(error).__name__}: {error}); give the one "
      "that the checkpoint was trained with"
    ) from None
  network = import_score_sde(last, config)
  averages = import_score_sde(load_arrays(checkpoint)[0], config) if ema else network
  write(network, averages, config, out, step)
  return network
