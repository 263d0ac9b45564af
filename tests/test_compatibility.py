"""A workdir, a SavedModel and a packed model of version 0.1.0 are read, and draw what they drew.

tests/golden/v010 was made by version 0.1.0: 60 steps of a network of 8 channels on digits, and the
images of eight seeds by every sampler. Kernels of another processor round otherwise, so images are
compared to 1e-4; on the processor that made them they are equal to the bit.
"""

import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import export, training

V010 = pathlib.Path(__file__).parent / "golden" / "v010"
TOLERANCE = 1e-4  # float32 rounding through at most 15 evaluations of the network; seen here: 0
SAMPLERS = (
  "two_step",
  "momentum",
  "ddim",
  "heun",
  "ancestral",
  "stochastic_two_step",
  "predictor_corrector",
  "naive",
  "probability_flow",
)


@pytest.fixture(scope="module")
def images():
  with np.load(V010 / "images.npz") as content:
    return dict(content)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return shutil.copytree(V010 / "workdir", tmp_path_factory.mktemp("v010") / "workdir")


@pytest.fixture(scope="module")
def run(workdir):
  return training.load(workdir)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("v010") / "savedmodel"
  with zipfile.ZipFile(V010 / "savedmodel.zip") as archive:
    archive.extractall(folder)
  return folder


def close(actual, wanted):
  np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_workdir_draws_the_same_images_by_every_sampler(run, images, sampler):
  close(run.images(images["seeds"], run.options(sampler=sampler)), images[f"workdir_{sampler}"])


def test_a_sampler_reads_its_own_numbers_as_before(run, images):
  close(run.images(images["seeds"], run.options(sampler="ddim", k=0.05)), images["ddim_k"])
  noisy = run.options(sampler="stochastic_two_step", noise=0.5)
  close(run.images(images["seeds"], noisy), images["stochastic_noise"])


def test_a_workdir_goes_on(workdir):
  experiment = training.load(workdir).experiment.replace(training={"steps": 62})
  gone_on = training.train(experiment, shutil.copytree(workdir, workdir / "copy"), progress=False)
  assert gone_on.step == 62


def test_a_savedmodel_draws_the_same_images(exported, images):
  loaded = export.load(exported)
  drawn = loaded.images(images["seeds"], loaded.options(sampler="ddim"))
  close(drawn, images["savedmodel_run_ddim"])
  signature = tf.saved_model.load(str(exported)).signatures["draw"]
  drawn = signature(seeds=tf.constant(images["seeds"], tf.int64))
  close(drawn["images"], images["savedmodel_draw_images"])


def test_a_packed_model_draws_the_same_images(images):
  packed = export.from_pretrained(str(V010 / "packed.npz"))
  close(packed.images(images["seeds"]), images["packed_two_step"])
