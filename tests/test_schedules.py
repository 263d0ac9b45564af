import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from soft_diffusion_tf import schedules as s
from soft_diffusion_tf import trust

EXAMPLES = [
  s.Constant(0.3),
  s.Linear(0.1, 2.0),
  s.Geometric(0.01, 50.0),
  s.PiecewiseLinear((0.0, 1.0, 5.0), (0.0, 0.25, 1.0)),
  s.Staged(s.Geometric(0.01, 0.1), 0.0, 0.2),
  s.Scaled(s.Linear(1.0, 2.0), 0.5),
  s.SubVPSigma(),
  s.VPScale(),
  s.CosineScale(),
  s.CosineSigma(),
  s.SineSquared(6.0),
  s.VPSigma(),
]
T = np.linspace(0, 1, 101, dtype=np.float32)


def test_every_schedule_has_an_example():
  assert {type(e).__name__ for e in EXAMPLES} | {"Unfound"} == set(s.__all__)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda e: type(e).__name__)
def test_shape_dtype_finite_gradient_and_config(schedule):
  t = tf.constant(T)
  with tf.GradientTape() as tape:
    tape.watch(t)
    value = schedule(t)
  assert value.shape == t.shape
  assert value.dtype == tf.float32
  assert np.all(np.isfinite(value))
  gradient = tape.gradient(value, t)
  # VP's σ is a square root: its slope at t = 0 alone is infinite, as it is on paper.
  assert gradient is None or np.all(np.isfinite(gradient[1:]))
  assert schedule(tf.reshape(t[:4], [2, 2])).shape == (2, 2)
  again = s.from_config(json.loads(json.dumps(schedule.get_config())))
  assert again == schedule
  np.testing.assert_array_equal(tf.function(schedule)(t), value)


@dataclasses.dataclass(frozen=True)
class Elsewhere(s.Constant):
  """A schedule of one's own."""


def test_what_travels_in_a_config():
  assert s.from_config(0.5) == s.Constant(0.5)
  config = Elsewhere(0.5).get_config()
  assert config == {"kind": f"{__name__}:Elsewhere", "number": 0.5}
  assert s.from_config(config, trust_code=True) == Elsewhere(0.5)
  with pytest.raises(trust.UntrustedCode):
    s.from_config(config)


def test_values():
  np.testing.assert_allclose(s.Geometric(0.01, 50.0)(T), 0.01 * 5000.0**T, rtol=1e-5)
  np.testing.assert_allclose(
    s.PiecewiseLinear((0.0, 1.0, 5.0), (0.0, 0.25, 1.0))(T),
    np.interp(T, [0, 0.25, 1], [0, 1, 5]),
    atol=1e-6,
  )
  staged = s.Staged(s.Geometric(0.01, 0.1), 0.0, 0.2)(T).numpy()
  np.testing.assert_allclose(staged[T >= 0.2], 0.1, rtol=1e-6)
  np.testing.assert_allclose(staged[10], 0.01 * 10**0.5, rtol=1e-5)  # half way: t = 0.1


def test_the_cosine_schedule_has_its_ratio():
  alpha, sigma = s.CosineScale(-8.0, 12.0)(T).numpy(), s.CosineSigma(-8.0, 12.0)(T).numpy()
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
  np.testing.assert_allclose(np.log(alpha / sigma)[[0, -1]], [6.0, -4.0], rtol=1e-5)  # ½ of it


def test_vp_preserves_variance_and_sub_vp_is_its_square():
  alpha, vp, sub = s.VPScale()(T).numpy(), s.VPSigma()(T).numpy(), s.SubVPSigma()(T).numpy()
  np.testing.assert_allclose(alpha**2 + vp**2, 1, rtol=1e-5)
  np.testing.assert_allclose(sub, vp**2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (lambda: s.Geometric(0.0, 1.0), "positive ends"),
    (lambda: s.PiecewiseLinear((1.0,)), "at least 2"),
    (lambda: s.PiecewiseLinear((1.0, 2.0), (0.0, 0.5)), "rise strictly from 0 to 1"),
    (lambda: s.Staged(s.Constant(1.0), 0.5, 0.2), "begin < end"),
    (
      lambda: s.from_config({"kind": "Geometrik", "start": 1, "stop": 2}),
      "did you mean 'Geometric'",
    ),
    (lambda: s.from_config({"kind": "Linear", "start": 1, "end": 2}), "no field Linear.end"),
    (lambda: s.Unfound(0.0, 1.0, "x.json")(T), "soft-diffusion-schedule"),
  ],
)
def test_bad_schedules_say_what_is_wrong(make, text):
  with pytest.raises(ValueError, match=text):
    make()


def test_ends():
  assert s.ends(s.Staged(s.Unfound(0.01, 6.0, "x"), 0.2, 1.0)) == (0.01, 6.0)
  assert s.ends(s.Linear(1.0, 0.0)) == (1.0, 0.0)


def _file(tmp_path, **changes):
  content = {"schema": 1, "corruption": {"kind": "Mask"}, "levels": [0.0, 0.5, 1.0]}
  content.update(changes)
  path = tmp_path / "s.json"
  path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
  return path


def test_levels_on_disk_round_trip(tmp_path):
  path = tmp_path / "deep" / "s.json"
  s.save_levels(path, {"corruption": {"kind": "Mask"}, "levels": [0.0, 0.5, 1.0]})
  assert s.load_levels(path)["levels"] == [0.0, 0.5, 1.0]
  assert [f.name for f in path.parent.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"levels": None}, "key 'levels' is missing"),
    ({"corruption": None}, "key 'corruption' is missing"),
    ({"levels": [0.0, 0.6, 0.5, 1.0]}, "out of order at number 3 .0.6 is followed by 0.5"),
    ({"levels": [0.0]}, "at least 2"),
    ({"levels": [0.0, "a"]}, "finite numbers"),
    ({"schema": 2}, "schema 2"),
    ({"corruption": "Mask"}, "corruption must be the config"),
    ({"levels": [0.0, True, 1.0]}, "finite numbers"),
    ({"levels": [0.0, float("nan"), 1.0]}, "finite numbers"),
    ({"levels": [0.5, 0.5]}, "out of order"),
    ({"times": [0.0, 1.0]}, "times must be 3 finite numbers beside 3 levels"),
    ({"times": [0.0, 0.7, 0.6]}, "rise strictly from 0 to 1"),
    ({"times": [0.1, 0.7, 1.0]}, "rise strictly from 0 to 1"),
    ({"sigmas": [0.1]}, "sigmas must be 3 finite numbers"),
    ({"sigmas": [0.1, 0.05, 0.2]}, "sigmas must not fall"),
    ({"sigmas": [-0.1, 0.05, 0.2]}, "sigmas must not fall, nor be negative"),
    ({"steps": [1.0, 1.0, 1.0]}, "steps must be 2 finite numbers"),
  ],
)
def test_bad_schedule_files_are_named_with_the_remedy(tmp_path, changes, text):
  path = _file(tmp_path, **changes)
  with pytest.raises(ValueError, match=text) as caught:
    s.load_levels(path)
  assert str(path) in str(caught.value)


def test_missing_and_broken_schedule_files(tmp_path):
  with pytest.raises(ValueError, match="no such schedule file"):
    s.load_levels(tmp_path / "none.json")
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(ValueError, match="not JSON"):
    s.load_levels(tmp_path / "x.json")


def test_a_joint_file_gives_level_and_sigma(tmp_path):
  level, sigma = s.joint(_file(tmp_path, sigmas=[0.01, 0.05, 0.1], times=[0.0, 0.2, 1.0]))
  np.testing.assert_allclose(level([0.0, 0.2, 1.0]), [0.0, 0.5, 1.0])
  np.testing.assert_allclose(sigma([0.0, 0.2, 0.6, 1.0]), [0.01, 0.05, 0.075, 0.1], rtol=1e-6)
  with pytest.raises(ValueError, match="not a joint schedule"):
    s.joint(_file(tmp_path))
