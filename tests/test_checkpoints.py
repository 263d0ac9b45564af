import threading

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import training
from soft_diffusion_tf.checkpoints import Checkpoints


@pytest.fixture
def model(tiny):
  return training.build(tiny, tiny.build_diffusion())


def weights(model):
  return [v.numpy() for v in (*model.network.variables, *model.optimizer.variables)]


def change(model, step):
  for v in model.network.trainable_variables:
    v.assign(v + 1.0)
  model.optimizer.iterations.assign(step)


def test_a_save_is_of_its_moment_although_training_goes_on(model, tmp_path, monkeypatch):
  """The writer is held back until the weights have changed."""
  go, original = threading.Event(), tf.train.CheckpointManager.save

  def late(*args, **kwargs):
    assert go.wait(60)
    return original(*args, **kwargs)

  monkeypatch.setattr(tf.train.CheckpointManager, "save", late)
  checkpoints = Checkpoints(tmp_path, model)
  change(model, 3)
  before = weights(model)
  checkpoints.save()
  assert not checkpoints.paths()  # nothing is on disk yet, and nobody waited
  change(model, 4)
  go.set()
  checkpoints.wait()
  assert Checkpoints(tmp_path, model).restore() == 3
  for a, b in zip(before, weights(model)):
    np.testing.assert_array_equal(a, b)
  change(model, 5)  # and the copy is taken anew
  before = weights(model)
  checkpoints.save(wait=True)
  change(model, 6)
  assert Checkpoints(tmp_path, model).restore() == 5
  for a, b in zip(before, weights(model)):
    np.testing.assert_array_equal(a, b)


def test_which_ones_stay(model, tmp_path):
  checkpoints = Checkpoints(tmp_path, model, keep=2)
  for step in range(1, 7):
    change(model, step)
    checkpoints.save(for_good=step == 2)
  checkpoints.wait()
  assert [p.name for p in checkpoints.paths()] == ["ckpt-6", "ckpt-5", "ckpt-2"]
  assert checkpoints.restore(2) == 2
  with pytest.raises(ValueError, match="no checkpoint of step 3 is kept, but of 2, 5, 6"):
    checkpoints.restore(3)


def test_another_network_is_refused(model, tiny, tmp_path):
  Checkpoints(tmp_path, model).save(wait=True)
  wide = tiny.replace(network={"nf": 16})
  other = training.build(wide, wide.build_diffusion())
  with pytest.raises(ValueError, match="none of its 1 checkpoints can be read"):
    Checkpoints(tmp_path, other).restore()


def test_the_names_in_a_checkpoint_do_not_depend_on_the_process(model, tiny, tmp_path):
  """Keras numbers its objects as they are made: a second optimizer has another name."""
  Checkpoints(tmp_path, model).save(wait=True)
  again = training.build(tiny.replace(seed=1), tiny.build_diffusion())
  assert Checkpoints(tmp_path, again).restore() == 0
  for a, b in zip(weights(model), weights(again)):
    np.testing.assert_array_equal(a, b)
