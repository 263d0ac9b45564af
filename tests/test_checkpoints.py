import threading

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import training
from soft_diffusion_tf.training.checkpoints import Checkpoints


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


def _names(folder):
  return sorted(f.name for f in folder.iterdir())


def test_what_kills_and_full_disks_leave_is_removed(model, tmp_path, monkeypatch):
  first = Checkpoints(tmp_path, model, keep=3)
  for step in (1, 2, 3):
    change(model, step)
    first.save(wait=True)
  # TensorFlow knows of the last alone, as after a kill between a save and what it removes.
  (tmp_path / "checkpoint").write_text(
    'model_checkpoint_path: "ckpt-3"\nall_model_checkpoint_paths: "ckpt-3"\n'
  )
  (tmp_path / "ckpt-2_temp").mkdir()
  (tmp_path / "ckpt-2_temp" / "part-00000-of-00001.data").write_bytes(b"half")
  (tmp_path / "ckpt-3.index.tempstate123").write_bytes(b"half")
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "ckpt-2.data-00000-of-00001").write_bytes(b"half")
  (tmp_path / "ckpt-abc.index").write_bytes(b"not ours")
  (tmp_path / "ckpt-9.index").write_bytes(b"of a later step, and damaged")
  second = Checkpoints(tmp_path, model, keep=2)
  assert second.restore() == 3
  change(model, 4)
  second.save(wait=True)
  kept = [
    "checkpoint",
    "ckpt-3.data-00000-of-00001",
    "ckpt-3.index",
    "ckpt-4.data-00000-of-00001",
    "ckpt-4.index",
    "ckpt-9.index",
    "ckpt-abc.index",
    "kept",
  ]
  assert _names(tmp_path) == kept
  assert _names(tmp_path / "kept") == []

  def full(*args, **kwargs):
    (tmp_path / "ckpt-5_temp").mkdir()
    (tmp_path / "ckpt-5.data-00000-of-00001").write_bytes(b"half")
    raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

  monkeypatch.setattr(tf.train.CheckpointManager, "save", full)
  change(model, 5)
  with pytest.raises(ValueError, match="cannot save step 5"):
    second.save(wait=True)
  assert _names(tmp_path) == kept


def test_a_checkpoint_without_its_index_is_said_to_be_passed_over(model, tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path, model, keep=3)
  for step in (1, 2):
    change(model, step)
    checkpoints.save(wait=True)
  (tmp_path / "ckpt-2.index").unlink()
  (tmp_path / "ckpt-abc.index").write_bytes(b"")
  (tmp_path / "ckpt-3.index.bak").write_bytes(b"")
  assert Checkpoints(tmp_path, model).restore() == 1
  assert "ckpt-2 has lost its .index file and cannot be read" in capsys.readouterr().out
  from soft_diffusion_tf.evaluation import sweeps

  (tmp_path / "w").mkdir()
  tmp_path.joinpath("ckpt-1.index").rename(tmp_path / "w" / "kept.index")
  with pytest.raises(ValueError, match="no checkpoint in it"):
    sweeps.checkpoints(tmp_path / "w")


def test_damaged_checkpoints_of_later_steps_do_not_push_out_new_ones(model, tmp_path):
  checkpoints = Checkpoints(tmp_path, model, keep=1)
  change(model, 8)
  checkpoints.save(wait=True)
  (tmp_path / "ckpt-8.data-00000-of-00001").write_bytes(b"damaged")
  again = Checkpoints(tmp_path, model, keep=1)
  for step in (3, 4):
    change(model, step)
    again.save(wait=True)
  assert Checkpoints(tmp_path, model).restore() == 4
