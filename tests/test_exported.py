"""Exported models: one folder or file that holds everything, and equals the Python sampler."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import export, files, plots, priors, restoration, training
from soft_diffusion_tf.experiment import Sampling
from soft_diffusion_tf.export import graph
from soft_diffusion_tf.export import packed as packed_files

SAMPLERS = {  # by the name that each gets
  "momentum_3": Sampling(sampler="momentum", steps=3, batch_size=5),
  "heun_ddim_4": Sampling(sampler="heun+ddim", steps=4, batch_size=5, clip=True),
}
RESTORING = restoration.DEFAULT.changed(steps=4)
SEEDS = [3, -5, 3, 19, 900, 8, 12]  # twice the same, negative, and several at one place


def make_run(tiny, digits):
  """A network whose output is not zero, as if trained."""
  process = tiny.build_diffusion()
  # A sum over factors: TensorFlow orders it by what it knows of the batch.
  process = process.with_prior(priors.fit("subspace", digits, process))
  changes = {"network": {"init_scale": 1.0}, "prior": {"kind": "subspace"}}
  run = training.Run(tiny.replace(**changes), None, 7)
  run.model = training.build(run.experiment, process)
  for value in run.model.ema_network.variables:  # not the weights under training
    value.assign(value * 1.01)
  return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory, request):
  """(run, folder, manifest), exported once."""
  tiny = request.getfixturevalue("tiny")
  run = make_run(tiny, request.getfixturevalue("digits"))
  folder = tmp_path_factory.mktemp("artefact") / "model"
  own = {"data": "digits", "split": "train", "image_shape": [8, 8, 1], "crop": "auto", "count": 64}
  record = {
    "step": 7,
    "sampler": "momentum",
    "nfe": 3,
    "samples": 64,
    "label": "FD[pixels]",
    "value": 1.25,
    "floor": None,
    "reference": own,
    "sampling": {"sampler": "momentum", "steps": 3, "batch_size": 5, "times": []},
  }
  others = [
    record | {"step": 6, "value": 99.0},
    record | {"reference": own | {"split": "test"}, "value": 99.1},
    record | {"reference": own | {"data": "folder:mine"}, "value": 99.2},
    record | {"images": "x", "value": 99.3, "reference": {}},
    record | {"sampling": record["sampling"] | {"grid": "level", "noise": 2.0}, "value": 1.5},
  ]
  manifest = export.save(
    run,
    folder,
    list(SAMPLERS.values()),
    restoring=RESTORING,
    evaluations=[record, *others, record],
    licence="CC0-1.0",
  )
  return run, folder, manifest


@pytest.fixture(scope="module")
def model(exported):
  return tf.saved_model.load(str(exported[1]))


# --- Bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_equal_the_python_sampler_to_the_bit(name, exported, model):
  run = exported[0]
  drawn = model.signatures[f"draw_{name}"](seeds=tf.constant(SEEDS, tf.int64))
  want = run.images(SEEDS, SAMPLERS[name])
  np.testing.assert_array_equal(drawn["images"], want)
  np.testing.assert_array_equal(drawn["uint8"], plots.to_uint8(want))
  for num, seed in ((1, 4), (13, -6)):
    sampled = model.signatures[f"sample_{name}"](num=num, seed=tf.constant(seed, tf.int64))
    np.testing.assert_array_equal(
      sampled["images"], run.images(range(seed, seed + num), SAMPLERS[name])
    )


def test_a_seed_that_is_asked_for_often_is_drawn_once():
  calls = tf.Variable(0)

  def one(seeds):
    calls.assign_add(1)
    return [tf.cast(seeds, tf.float32)[:, tf.newaxis]]

  seeds = tf.constant([7, -2, 7, 7, 12, 7, -2], tf.int64)  # 7, 12 and −2 have places 2, 2 and 3
  [drawn] = tf.function(lambda s: graph._in_batches(one, [[1]], s, 5))(seeds)
  np.testing.assert_array_equal(drawn[:, 0], seeds)
  assert int(calls) == 2


def test_the_name_of_a_sampler_says_what_it_does():
  times = Sampling(sampler="heun+ddim", times=(1.0, 0.5, 0.2, 0.0))
  assert export.name_of(times) == "heun_ddim_3_times"
  assert export.name_of(SAMPLERS["momentum_3"]) == "momentum_3"


def test_the_first_sampler_is_the_default(exported, model):
  out = model.signatures["sample"](num=2, seed=tf.constant(0, tf.int64))
  np.testing.assert_array_equal(out["images"], exported[0].images([0, 1], SAMPLERS["momentum_3"]))
  assert exported[2]["default_sampler"] == "momentum_3"


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_process_is_the_sampler_seen_on_its_way(name, exported, model):
  run, options = exported[0], SAMPLERS[name]
  seeds = np.arange(5)  # one batch, in place
  out = model.signatures[f"process_{name}"](seeds=tf.constant(seeds, tf.int64))
  times, states, predictions = run.sampler(options).trajectory(
    run.plan(options), seeds, out["times"].shape[0] - 1
  )
  np.testing.assert_allclose(out["times"], times, rtol=1e-6)
  np.testing.assert_array_equal(out["x_t"], states.swapaxes(0, 1))
  np.testing.assert_array_equal(out["x0_hat"], predictions.swapaxes(0, 1))
  assert len(times) == options.steps + 1


def test_denoise_score_and_corrupt(exported, model, digits):
  run, x = exported[0], digits[:4]
  t = tf.constant([0.0, 0.3, 0.5, 1.0])
  seeds = np.arange(9, 13)
  x_t = model.signatures["corrupt"](x_0=x, t=t, seed=tf.constant(9, tf.int64))["x_t"]
  want = restoration.corrupt(run.diffusion, x, t, seeds)
  np.testing.assert_allclose(x_t, want, atol=1e-6)
  x0_hat = model.signatures["denoise"](x_t=x_t, t=t)["x0_hat"]
  # Other kernels run eagerly, and round otherwise; the network's output is of the order of 1.
  np.testing.assert_allclose(x0_hat, run.denoiser()(x_t, t), atol=2e-4)
  score = model.signatures["score"](x_t=x_t, t=t)["score"]
  np.testing.assert_allclose(score, run.diffusion.score(x_t, t, x0_hat), rtol=1e-3, atol=0.1)
  assert np.max(np.abs(score)) > 100  # divided by σ² = 1e-4 at t = 0, hence the 0.1 above
  one = model.signatures["denoise"](x_t=x_t, t=tf.constant([0.5]))["x0_hat"]  # one t for all
  each = model.signatures["denoise"](x_t=x_t, t=tf.fill([4], 0.5))["x0_hat"]
  np.testing.assert_array_equal(one, each)


def test_restorations_equal_the_python_ones(exported, model, digits):
  run = exported[0]
  restorer = restoration.Restorer(run.diffusion, run.denoiser(), RESTORING)
  y = restorer.corrupt(digits[:3], 0.5)
  want = restorer(y, 0.5, count=2, seed=11)
  seed = tf.constant(11, tf.int64)
  out = model.signatures["restore_map"](y=y, t=tf.constant(0.5), seed=seed, num=2)
  np.testing.assert_array_equal(out["samples"], want.samples)
  np.testing.assert_allclose(out["mean"], want.mean, atol=1e-6)
  np.testing.assert_allclose(out["std"], want.uncertainty, atol=1e-5)
  one = model.signatures["restore"](y=y, t=tf.constant(0.501), seed=seed)  # rounds to 128/256
  np.testing.assert_array_equal(one["images"], restorer(y, 0.5, seed=11).samples[:, 0])


# --- Alone ----------------------------------------------------------------------------------------

_ALONE = """
import sys
import numpy as np, tensorflow as tf  # which imports what Keras it has by itself
class Refuse:
  def find_spec(self, name, *_):
    if name.split(".")[0] in ("soft_diffusion_tf", "keras", "tf_keras", "tensorflow_probability"):
      raise ImportError(name)
sys.meta_path.insert(0, Refuse())
for name in [m for m in sys.modules if m.split(".")[0] == "keras"]:
  del sys.modules[name]  # so that whoever asks for it now meets the refusal
model = tf.saved_model.load(sys.argv[1])
out = model.signatures["sample_heun_ddim_4"](num=tf.constant(7), seed=tf.constant(2, tf.int64))
np.save(sys.argv[2], out["images"])
assert not {"soft_diffusion_tf", "keras"} & set(sys.modules)
"""


def test_it_needs_tensorflow_alone(exported, tmp_path):
  run, folder, _ = exported
  moved = shutil.copytree(folder, tmp_path / "moved")
  command = [sys.executable, "-c", _ALONE, moved, tmp_path / "x.npy"]
  result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr[-2000:]
  want = run.images(range(2, 9), SAMPLERS["heun_ddim_4"])
  np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), want)


@pytest.mark.slow
def test_saved_model_cli_runs_it(exported, tmp_path):
  run, folder, _ = exported
  command = [
    sys.executable,
    "-m",
    "tensorflow.python.tools.saved_model_cli",
    "run",
    f"--dir={folder}",
    "--tag_set=serve",
    "--signature_def=sample",
    "--input_exprs=num=3;seed=5",
    f"--outdir={tmp_path}",
  ]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr[-2000:]
  np.testing.assert_array_equal(
    np.load(tmp_path / "images.npy"), run.images([5, 6, 7], SAMPLERS["momentum_3"])
  )


# --- What it says of itself -----------------------------------------------------------------------


def test_manifest_and_card_say_what_it_is(exported):
  run, folder, manifest = exported
  assert export.manifest_of(folder) == json.loads(json.dumps(manifest))
  assert manifest["config"] == run.experiment.digest()
  assert manifest["weights_sha256"] == export.digest_of(run)
  assert manifest["samplers"]["heun_ddim_4"]["evaluations"] == 6  # two for each Heun step
  assert manifest["signatures"]["denoise"]["inputs"]["x_t"] == {
    "shape": [None, 8, 8, 1],
    "dtype": "float32",
  }
  loaded = tf.saved_model.load(str(folder)).signatures
  assert set(loaded) == set(manifest["signatures"])
  card = (folder / "README.md").read_text()
  assert card.count("| FD[pixels] ") == 2  # one evaluation made twice, and one on another grid
  for text in (
    "GaussianBlur",
    "digits, split train",
    run.experiment.digest(),
    export.digest_of(run),
    "CC0-1.0",
    "| momentum | 3 | 64 | FD[pixels] 1.25 | – |",
    "sample_heun_ddim_4",
    "| momentum (grid level) | 3 | 64 | FD[pixels] 1.5 | – |",
  ):
    assert text in card
  # Of another step, another split, another data set.
  assert "99" not in card.split("## Measured")[1].split("##")[0]
  assert "Not evaluated" in export.card(run, manifest)


def test_load_gives_a_model_to_go_on_with(exported, digits):
  run, folder, _ = exported
  back = export.load(folder)
  assert back.experiment == run.experiment
  assert back.step == run.step
  np.testing.assert_array_equal(back.images(SEEDS), run.images(SEEDS))
  before = back.model.network.get_weights()
  for one, other in zip(before, run.model.ema_network.get_weights()):
    np.testing.assert_array_equal(one, other)
  back.model.update(tf.constant(digits[:16]))
  after = back.model.network.get_weights()
  assert max(np.abs(a - b).max() for a, b in zip(before, after)) > 0


@pytest.mark.slow
def test_bfloat16(exported, tmp_path):
  run, _, _ = exported
  export.save(run, tmp_path / "m", [SAMPLERS["momentum_3"]], dtype="bfloat16", restoring=RESTORING)
  model = tf.saved_model.load(str(tmp_path / "m"))
  out = model.signatures["draw"](seeds=tf.constant(SEEDS, tf.int64))["images"]
  back = export.load(tmp_path / "m")
  np.testing.assert_array_equal(out, back.images(SEEDS, SAMPLERS["momentum_3"]))
  single = run.images(SEEDS, SAMPLERS["momentum_3"])
  gap = np.abs(out - single).max()
  assert 0 < gap < 0.05 * np.ptp(single)  # bfloat16 has 8 bits: 0.4 % a product


# --- Bad input ------------------------------------------------------------------------------------


def test_bad_calls_are_refused_by_the_graph(model, digits):
  call, seed = model.signatures, tf.constant(0, tf.int64)
  last = tf.constant(tf.int64.max)
  x = tf.constant(digits[:2])
  for text, do in {
    "num must be at least 1": lambda: call["sample"](num=0, seed=seed),
    "at most 65536": lambda: call["sample"](num=2**31 - 1, seed=seed),
    "at least 1 image": lambda: call["draw"](seeds=tf.zeros([0], tf.int64)),
    "y holds NaN": lambda: call["restore"](y=x * np.nan, t=tf.constant(0.5), seed=seed),
    "t must lie in": lambda: call["restore"](y=x, t=tf.constant(np.nan), seed=seed),
    "t must": lambda: call["denoise"](x_t=x, t=tf.constant([1.5])),
    "x_t holds no image": lambda: call["denoise"](x_t=x[:0], t=tf.constant([0.5])),
    "x_t holds no": lambda: call["score"](x_t=x[:0], t=tf.constant([0.5])),
    "x_0 holds no image": lambda: call["corrupt"](x_0=x[:0], t=tf.constant([0.5]), seed=seed),
    "y holds no image": lambda: call["restore"](y=x[:0], t=tf.constant(0.5), seed=seed),
    "seed is too large": lambda: call["restore"](y=x, t=tf.constant(0.5), seed=last),
    "seed is too": lambda: call["restore_map"](y=x, t=tf.constant(0.5), seed=last - 2, num=2),
    "seed is": lambda: call["sample"](num=2, seed=last),
    "seed": lambda: call["corrupt"](x_0=x, t=tf.constant([0.5]), seed=last),
  }.items():
    with pytest.raises(tf.errors.InvalidArgumentError, match=text):
      do()
  one = call["restore"](y=x[:1], t=tf.constant(0.5), seed=last)  # the last seed of all
  assert np.isfinite(one["images"]).all()


def test_nothing_is_overwritten_unless_forced(exported, tmp_path):
  run = exported[0]
  out = tmp_path / "m.npz"
  out.write_text("mine")
  with pytest.raises(ValueError, match="is there already"):
    export.pack(run, out)
  with pytest.raises(ValueError, match="is there already"):
    export.save(run, out)
  assert out.read_text() == "mine"
  export.pack(run, out, force=True)
  assert export.unpack(out).step == 7
  photos = tmp_path / "photos"
  photos.mkdir()
  (photos / "1.png").write_text("mine")
  for other in (photos, out):
    with pytest.raises(ValueError, match=r"not a folder with assets\.extra/manifest\.json in it"):
      export.save(run, other, force=True)
  assert (photos / "1.png").read_text() == "mine"
  assert export.unpack(out).step == 7


def test_what_is_written_lies_apart_from_what_is_read(tmp_path):
  photos = tmp_path / "a" / "photos"
  photos.mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "a")
  for out in (photos, tmp_path / "a", photos / "x", tmp_path / "link" / "photos"):
    with pytest.raises(ValueError, match=r"--out=.* would mix with .*photos, which is read"):
      files.keep_apart(out, photos)
  files.keep_apart(tmp_path / "a" / "photos2", photos)
  files.keep_apart(photos / "x", photos, inside=True)
  files.keep_apart("digits", "digits")  # the name of a model, and no folder


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "old").write_text("old")

  def broken(folder):
    (folder / "half").write_text("")
    raise OSError("no space")

  with pytest.raises(OSError, match="no space"):
    files.write_folder(out, broken, True, "old")
  write = lambda folder: (folder / "new").write_text("new")
  for given in ((), (True, "new")):
    with pytest.raises(
      ValueError, match=r"is there already|is a folder|is not a folder with new in it"
    ):
      files.write_folder(out, write, *given)
  assert [f.name for f in tmp_path.iterdir()] == ["out"]
  assert (out / "old").read_text() == "old"
  files.write_folder(out, write, True, "old")
  assert [f.name for f in out.iterdir()] == ["new"]
  assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_samplers_that_cannot_be_exported(exported, tmp_path):
  run = exported[0]
  out = tmp_path / "m"
  for text, options in {
    "cannot be exported": [Sampling(sampler="dormand_prince")],
    "would both be called momentum_3": [
      Sampling("momentum", 3),
      Sampling("momentum", 3, clip=True),
    ],
  }.items():
    with pytest.raises(ValueError, match=text):
      export.save(run, out, options)
  with pytest.raises(ValueError, match=r"network\.dtype = .float8. is unknown"):
    export.save(run, out, dtype="float8")
  assert not out.exists()


def test_weights_that_are_not_finite_are_not_handed_on(tiny, digits, tmp_path):
  run = make_run(tiny, digits)
  run.model.ema_network.variables[3].assign(run.model.ema_network.variables[3] * np.nan)
  with pytest.raises(ValueError, match="NaN or infinite"):
    export.save(run, tmp_path / "m")
  with pytest.raises(ValueError, match="not finite in float16"):
    export.pack(run, tmp_path / "m.npz")
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(exported, model, tmp_path):
  folder = shutil.copytree(exported[1], tmp_path / "m")
  with pytest.raises(ValueError, match="did you mean 'sample_momentum_3'"):
    export.signature(model, "sample_momentum3")
  with pytest.raises(ValueError, match="not an exported model"):
    export.load(tmp_path)
  manifest = folder / export.EXTRA / export.MANIFEST
  text = manifest.read_text()
  manifest.write_text(text.replace(export.digest_of(exported[0]), "0" * 64))
  with pytest.raises(ValueError, match="not those of its manifest"):
    export.load(folder)
  manifest.write_text(text.replace('"format": 1', '"format": 2'))
  with pytest.raises(ValueError, match="its format is 2 and this version reads 1"):
    export.load(folder)
  manifest.write_text("{")
  with pytest.raises(ValueError, match="not JSON"):
    export.from_pretrained(folder)
  content = json.loads(text)
  for bad in (
    None,
    5,
    [],
    content | {"step": "7"},
    content | {"step": -1},
    {k: v for k, v in content.items() if k != "weights_sha256"},
    content | {"weights_sha256": 5},
  ):
    manifest.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"manifest\.json: .*; export the model again"):
      export.from_pretrained(folder)
  manifest.write_text(text)
  data = next((folder / "variables").glob("*.data*"))
  data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  with pytest.raises(ValueError, match="weights cannot be read"):
    export.load(folder)


# --- One file -------------------------------------------------------------------------------------


def test_a_packed_model_comes_back(exported, tmp_path):
  run = exported[0]
  export.pack(run, tmp_path / "a.npz", dtype="float32")
  back = export.from_pretrained(tmp_path / "a.npz")
  np.testing.assert_array_equal(back.images(SEEDS), run.images(SEEDS))
  export.pack(run, tmp_path / "b.npz")
  half = export.unpack(tmp_path / "b.npz")
  for one, other in zip(half.model.ema_network.get_weights(), run.model.ema_network.get_weights()):
    np.testing.assert_allclose(one, other, rtol=2**-11, atol=2**-25)  # float16 has 11 bits
  assert (tmp_path / "b.npz").stat().st_size < 0.7 * (tmp_path / "a.npz").stat().st_size
  broken = tmp_path / "c.npz"
  broken.write_bytes((tmp_path / "b.npz").read_bytes()[:5000])
  with pytest.raises(ValueError, match="cannot be read as a packed model"):
    export.from_pretrained(broken)
  with pytest.raises(ValueError, match="no such model comes with the package"):
    export.from_pretrained("digitz")
  with pytest.raises(ValueError, match="name of a model is empty"):
    export.from_pretrained("")


@pytest.fixture(scope="module")
def packed(tmp_path_factory, request):
  """A packed model, and what is in it by name."""
  run = make_run(request.getfixturevalue("tiny"), request.getfixturevalue("digits"))
  path = tmp_path_factory.mktemp("packed") / "good.npz"
  export.pack(run, path)
  with np.load(path) as content:
    return path, dict(content)


def _about(content, change):
  """The entries with another `about`: `change` gets the dictionary and may give another value."""
  about = json.loads(str(content["about"]))
  about = change(about) or about
  return content | {"about": np.array(json.dumps(about))}


def _experiment(group, **fields):
  def change(about):
    about.pop("sha256")
    about["experiment"][group] |= fields

  return change


DAMAGES = {  # name → (what becomes of the entries, what the error says)
  "a flipped bit": (
    lambda c: c | {"weight_0003": np.bitwise_xor(c["weight_0003"].view(np.uint16), 1).view("f2")},
    "digest",
  ),
  "another prior": (lambda c: c | {"prior_mean": c["prior_mean"] + 1}, "digest"),
  "another step": (lambda c: _about(c, lambda a: a | {"step": 8}), "digest"),
  "another seed": (lambda c: _about(c, lambda a: a["experiment"].update(seed=5)), "digest"),
  "a NaN": (lambda c: c | {"weight_0000": c["weight_0000"] * np.float16("nan")}, "NaN"),
  "an infinity": (lambda c: c | {"weight_0001": c["weight_0001"] + np.float16("inf")}, "infinite"),
  "a NaN prior": (lambda c: c | {"prior_factors": c["prior_factors"] * np.nan}, "NaN"),
  "about a list": (lambda c: _about(c, lambda _: [1]), "not an object"),
  "about a number": (lambda c: _about(c, lambda _: 5), "not an object"),
  "about an array": (lambda c: c | {"about": np.zeros(3)}, "about is not a text"),
  "about no JSON": (lambda c: c | {"about": np.array("{")}, "cannot be read"),
  "about deep": (lambda c: c | {"about": np.array("[" * 100_000)}, "cannot be read"),
  "no experiment": (lambda c: _about(c, lambda a: a | {"experiment": None}), "config"),
  "an experiment of lists": (lambda c: _about(c, lambda a: a | {"experiment": []}), "config"),
  "no step": (lambda c: _about(c, lambda a: {k: a[k] for k in a if k != "step"}), "step"),
  "another format": (lambda c: _about(c, lambda a: a | {"format": 9}), "format is 9"),
  "a number as prior": (lambda c: c | {"prior_kind": np.array(5)}, "prior_kind is not a text"),
  "no kind of prior": (
    lambda c: c | {"prior_kind": np.array("a b")},
    "kind of a prior is a name, not 'a b'",
  ),
  "a prior of another shape": (
    lambda c: c | {"prior_mean": np.zeros([4, 4, 1]), "prior_factors": np.zeros([1, 4, 4, 1])},
    r"its prior is of images of shape \(4, 4, 1\)",
  ),
  "a renamed entry": (
    lambda c: {("weight_9" if k == "weight_0002" else k): v for k, v in c.items()},
    "weight_0002",
  ),
  "a missing entry": (lambda c: {k: v for k, v in c.items() if k != "prior_mean"}, "prior_mean"),
  "one entry more": (lambda c: c | {"x": np.zeros(3)}, "'x' is not part of one"),
  "a weight of another shape": (lambda c: c | {"weight_0004": np.zeros([3], "f2")}, "weight 4"),
  "weights of whole numbers": (
    lambda c: c | {"weight_0005": c["weight_0005"].astype(np.int64)},
    "weight_0005 holds int64",
  ),
  "weights of texts": (lambda c: c | {"weight_0000": np.array(["a"])}, "weight 0|weight_0000"),
  "nf": (lambda c: _about(c, _experiment("network", nf=4096)), "weight 0 has the shape"),
  "nf without end": (lambda c: _about(c, _experiment("network", nf=10**30)), "nf must be from"),
  "blocks": (lambda c: _about(c, _experiment("network", num_res_blocks=10**6)), "num_res_blocks"),
  "texts as shape": (
    lambda c: _about(c, _experiment("data", image_shape=["8", "8", "1"])),
    "data.image_shape",
  ),
  "halves as shape": (
    lambda c: _about(c, _experiment("data", image_shape=[8.5, 8, 1])),
    "data.image_shape",
  ),
  "nothing as shape": (lambda c: _about(c, _experiment("data", image_shape=[0, 0, 1])), "image_sh"),
  "two as shape": (lambda c: _about(c, _experiment("data", image_shape=[8, 8])), "image_shape"),
  "a large shape": (
    lambda c: _about(c, _experiment("data", image_shape=[8192, 8192, 1])),
    r"\(8192, 8192",
  ),
  "a level of many digits": (
    lambda c: _about(c, lambda a: a.pop("sha256") and a["experiment"].update(level=10**400)),
    "Constant.number must be a number",
  ),
  "an infinite number": (lambda c: _about(c, _experiment("network", cond_max=1e400)), "cond_max"),
  "steps without end": (lambda c: _about(c, _experiment("sampling", steps=10**12)), "steps must"),
  "a field of two lines": (
    lambda c: _about(c, lambda a: a.pop("sha256") and a["experiment"].update({"z\nz": 1})),
    "z z",
  ),
  "a shape without end": (
    lambda c: _about(c, _experiment("data", image_shape=[10**6, 10**6, 3])),
    "image_shape",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_packed_file_of_unknown_origin_is_checked(damage, packed, tmp_path):
  change, text = DAMAGES[damage]
  np.savez(tmp_path / "bad.npz", **change(packed[1]))
  with pytest.raises(ValueError, match=text) as raised:
    export.from_pretrained(tmp_path / "bad.npz")
  said = str(raised.value)
  assert said.startswith(f"{tmp_path / 'bad.npz'}: ")
  assert "\n" not in said
  assert len(said) < 600


def test_a_packed_file_without_a_digest_is_of_an_older_version(packed, tmp_path):
  content = _about(packed[1], lambda a: {k: a[k] for k in a if k != "sha256"})
  np.savez(tmp_path / "old.npz", **content)
  assert export.unpack(tmp_path / "old.npz").step == export.unpack(packed[0]).step == 7


@pytest.mark.parametrize("name", export.pretrained())
def test_models_that_come_with_the_package(name, digits):
  folder = pathlib.Path(export.__file__).parents[1] / "pretrained"
  assert (folder / f"{name}.npz").stat().st_size < 2_000_000
  run = export.from_pretrained(name)
  card = (folder / f"{name}.md").read_text()
  with np.load(folder / f"{name}.npz") as content:
    about = json.loads(str(content["about"]))
  assert about["config"] in card
  assert about["weights_sha256"] in card
  assert "sha256" in about  # of all arrays: `unpack` refuses a copy of it that was changed
  stored = [w.astype(np.float16) for w in run.model.ema_network.get_weights()]
  for one, other in zip(stored, run.model.ema_network.get_weights()):
    np.testing.assert_array_equal(one, other)  # nothing but float16 is in it
  images = run.images(range(64), run.options(sampler="two_step", steps=10))
  flat, real = (x.reshape(len(x), -1) for x in (images, digits))
  # Of 64 other real digits the mean is 0.5 from that of all; that of noise is far off.
  assert np.linalg.norm(flat.mean(0) - real.mean(0)) < 1.0
  nearest = np.linalg.norm(flat[:, None] - real[None], axis=2).min(1)
  assert np.median(nearest) < 2.0  # two real digits of one class are about 2 apart


def test_a_damaged_model_of_the_package_is_refused(monkeypatch):
  monkeypatch.setattr(packed_files, "pretrained", lambda: {"digits": "0" * 64})
  with pytest.raises(ValueError, match="damaged"):
    export.from_pretrained("digits")


def test_a_run_has_verbs():
  run = export.from_pretrained("digits")
  options = run.options(sampler="two_step", steps=3)
  want = run.images(range(4), options)
  np.testing.assert_array_equal(run.images(range(4), sampler="two_step", steps=3), want)
  np.testing.assert_array_equal(
    run.images(range(4), run.options(steps=3), sampler="two_step"), want
  )
  y = restoration.corrupt(run.diffusion, want, 0.5, range(4)).numpy()
  restorer = restoration.Restorer(
    run.diffusion, run.denoiser(), restoration.DEFAULT.changed(steps=3)
  )
  got, same = run.restore(y, 0.5, count=2, seed=7, steps=3), restorer(y, 0.5, 2, 7)
  np.testing.assert_array_equal(got.samples, same.samples)
  assert got.samples.shape == (4, 2, 8, 8, 1)
  with pytest.warns(DeprecationWarning, match=r"Run\.plan"):
    np.testing.assert_array_equal(run.table(options), run.plan(options))
  with pytest.warns(DeprecationWarning, match=r"Run\.batch_sampler"):
    np.testing.assert_array_equal(run.drawer(options).images(range(4)), want)
