import dataclasses

import numpy as np
import pytest

from soft_diffusion_tf import (
  corruptions,
  diffusion,
  losses,
  oracles,
  parts,
  schedules,
  training,
  trust,
)


@pytest.fixture
def batch(rng):
  x_0 = rng.random([5, 8, 8, 1], np.float32)
  eta = rng.standard_normal(x_0.shape).astype(np.float32)
  return x_0, np.float32([0.02, 0.1, 0.3, 0.7, 1.0]), eta


def denoiser(x_t, t):
  return 0.5 * x_t + 0.1


def test_without_corruption_it_is_the_ve_loss(ve_diffusion, batch):
  # Song et al. 2021: ½ Σ (σ s + z)² with x_t = x_0 + σ z; here the score is that of our x̂_0.
  x_0, t, z = batch
  sigma = (0.01 * 5000.0**t).reshape(-1, 1, 1, 1)
  x_t = x_0 + sigma * z
  score = (denoiser(x_t, t) - x_t) / sigma**2
  want = 0.5 * np.sum((sigma * score + z) ** 2, axis=(1, 2, 3))
  got = losses.SoftScoreMatching()(ve_diffusion, denoiser, x_0, t, z)
  # float32: x̂_0 − x_0 cancels σ z to a few units in the last place of x_t
  np.testing.assert_allclose(0.5 * got.numpy(), want, rtol=3e-4)


def test_equation_12_by_hand(blur_diffusion, batch):
  x_0, t, eta = batch
  x_t = blur_diffusion.forward(x_0, t, eta)
  error = blur_diffusion.corrupt(denoiser(x_t, t) - x_0, t).numpy()
  norm = np.sum(error**2, axis=(1, 2, 3))
  sigma = blur_diffusion.sigma(t).numpy()
  args = (blur_diffusion, denoiser, x_0, t, eta)
  np.testing.assert_allclose(losses.SoftScoreMatching()(*args), norm / sigma**2, rtol=1e-5)
  np.testing.assert_allclose(losses.SoftScoreMatching(weight="one")(*args), norm, rtol=1e-5)


def test_the_filtered_loss_is_bounded_by_the_unfiltered(blur_diffusion, batch):
  # ‖C (x̂_0 − x_0)‖ ≤ ‖C‖ ‖x̂_0 − x_0‖ with ‖C‖ ≤ 1 for a normalised blur (P 3.1).
  x_0, t, eta = batch
  args = (blur_diffusion, denoiser, x_0, t, eta)
  filtered = losses.SoftScoreMatching(weight="one")(*args).numpy()
  plain = losses.SoftScoreMatching(weight="one", filtered=False)(*args).numpy()
  assert np.all(filtered <= plain * (1 + 1e-5))
  assert plain[-1] > 2 * filtered[-1]  # at full blur they are far apart
  want = np.sum((denoiser(blur_diffusion.forward(x_0, t, eta), t) - x_0) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(plain, want, rtol=1e-5)


def test_the_look_ahead_filter_by_hand(blur_diffusion, batch):
  x_0, t, eta = batch
  error = denoiser(blur_diffusion.forward(x_0, t, eta), t) - x_0
  earlier = np.float32([0.0, 0.0, 0.2, 0.6, 0.9])  # t − 0.1, but not before the clean image
  norm = np.sum(blur_diffusion.corrupt(error, earlier).numpy() ** 2, axis=(1, 2, 3))
  want = norm / blur_diffusion.sigma(t).numpy() ** 2  # w(t) is still that of t
  args = (blur_diffusion, denoiser, x_0, t, eta)
  np.testing.assert_allclose(losses.SoftScoreMatching(look_ahead=0.1)(*args), want, rtol=1e-5)


def test_the_look_ahead_filter_lies_between_the_papers_and_none(blur_diffusion, batch):
  x_0, t, eta = batch
  args = (blur_diffusion, denoiser, x_0, t, eta)
  loss = lambda **options: losses.SoftScoreMatching(**options)(*args).numpy()
  np.testing.assert_array_equal(loss(look_ahead=0.0), loss())
  # At t = 0 the blur's standard deviation is 0.01 pixels: its neighbours weigh exp(−5000) = 0.
  np.testing.assert_allclose(loss(look_ahead=1.0), loss(filtered=False), rtol=1e-6)
  rows = [loss(look_ahead=ahead)[2:] for ahead in (0.0, 0.1, 0.3, 1.0)]
  assert np.all(np.diff(rows, axis=0) >= 0)
  assert np.all(rows[-1][1:] > rows[0][1:])  # at t = 0.3 the blur has hardly begun


@pytest.mark.parametrize("look_ahead", [0.0, 0.1, 1.0])
def test_the_expectation_minimises_every_filter(blur_diffusion, digits, look_ahead):
  # Along any direction v(x_t) the mean loss has slope 0 at E[x_0|x_t]; its estimate from n draws is
  # normal with the standard error of the mean, so 4 of them are passed once in 16,000 times.
  mixture = oracles.GaussianMixture(digits[:50], 0.1)
  exact = oracles.denoiser(mixture, blur_diffusion)
  x_0 = mixture.draw(4000, seed=3)
  eta = np.random.default_rng(4).standard_normal(x_0.shape).astype(np.float32)
  t = np.full(len(x_0), 0.6, np.float32)

  def slopes(centre):
    def loss(h):
      estimate = lambda x_t, t: centre(x_t, t) + h * x_t
      options = {"weight": "one", "look_ahead": look_ahead}
      return losses.SoftScoreMatching(**options)(blur_diffusion, estimate, x_0, t, eta).numpy()

    each = loss(0.5) - loss(-0.5)
    return abs(each.mean()) / (each.std() / np.sqrt(len(each)))

  assert slopes(exact) < 4
  assert slopes(lambda x_t, t: x_t) > 40  # the corrupted image itself is not the minimiser


def test_the_loss_of_a_corruption_that_is_not_linear(batch):
  """‖C(x̂) − C(x_0)‖², which C(x̂ − x_0) is not; and for a linear C both are one."""
  x_0, t, eta = batch
  process = diffusion.Diffusion(
    (8, 8, 1), corruptions.Gamma(), schedules.Linear(0.0, 2.0), schedules.Geometric(0.01, 0.1)
  )
  power = (1.0 + 2.0 * t).reshape(-1, 1, 1, 1)
  gamma = lambda x: np.sign(x) * np.abs(x) ** power
  x_t = gamma(x_0) + process.sigma(t).numpy().reshape(-1, 1, 1, 1) * eta
  x0_hat = denoiser(x_t, t)
  want = np.sum((gamma(x0_hat) - gamma(x_0)) ** 2, axis=(1, 2, 3))
  got = losses.SoftScoreMatching(weight="one")(process, denoiser, x_0, t, eta).numpy()
  np.testing.assert_allclose(got, want, rtol=1e-4)
  other = np.sum(gamma(x0_hat - x_0) ** 2, axis=(1, 2, 3))
  assert np.all(np.abs(other - want)[1:] > 0.1 * want[1:])


def test_a_mixture_lies_between_its_parts(blur_diffusion, batch):
  x_0, t, eta = batch
  calls = []

  def counted(x_t, t):
    calls.append(t)
    return denoiser(x_t, t)

  loss = lambda part: part(blur_diffusion, counted, x_0, t, eta).numpy()
  printed = loss(losses.SoftScoreMatching())
  plain = loss(losses.SoftScoreMatching(filtered=False))
  del calls[:]
  np.testing.assert_allclose(loss(losses.Mixture(0.0)), printed, rtol=1e-6)
  np.testing.assert_allclose(loss(losses.Mixture(1.0)), plain, rtol=1e-6)
  np.testing.assert_allclose(loss(losses.Mixture(0.3)), 0.7 * printed + 0.3 * plain, rtol=1e-5)
  one = losses.Mixture(0.3, "one")(blur_diffusion, denoiser, x_0, t, eta)
  sigma = blur_diffusion.sigma(t).numpy()
  np.testing.assert_allclose(one / sigma**2, loss(losses.Mixture(0.3)), rtol=1e-5)
  assert len(calls) == 4  # the network is asked once a step


def test_weights_that_cannot_be_are_refused(tiny):
  """1/σ² of σ = 0, wherever a time can be drawn."""
  for sigma in (0.0, schedules.Staged(schedules.Linear(0.0, 0.1), 0.5, 1.0)):
    with pytest.raises(
      ValueError, match=r"1/σ², and σ is 0 at t = .*use loss\.weight = 'one'"
    ) as got:
      tiny.replace(sigma=parts.make(schedules.Schedule, sigma))
    assert "\n" not in str(got.value)
  quiet = tiny.replace(sigma=schedules.Constant(0.0), loss={"weight": "one"})
  assert quiet.weight_range() == (1.0, 1.0)
  rising = {"sigma": schedules.Linear(0.0, 0.1)}
  tiny.replace(**rising)  # t is drawn from 1e-5 on
  with pytest.raises(ValueError, match=r"at t = 0; use .*or a larger training\.t_min"):
    tiny.replace(**rising, training={"t_min": 0.0})


def test_the_range_of_weights(tiny):
  """Of what the network gives: a residual of VE is weighed by 1/σ², its score by 1."""
  low, high = tiny.weight_range()
  assert (low, high) == pytest.approx((1 / 0.1**2, 1 / 0.01**2), rel=1e-3)
  ve = tiny.replace(
    corruption=corruptions.Identity(),
    level=schedules.Constant(0.0),
    sigma=schedules.Geometric(0.01, 50.0),
  )
  low, high = ve.weight_range()
  assert high / low == pytest.approx(5000.0**2, rel=1e-2)
  score = ve.replace(network={"prediction": "score", "scale_by_sigma": True})
  assert score.weight_range() == (1.0, 1.0)
  low, high = ve.replace(network={"prediction": "score"}).weight_range()
  assert high / low == pytest.approx(5000.0**2, rel=1e-2)
  sub_vp = tiny.replace(
    corruption=corruptions.Scale(), level=schedules.VPScale(), sigma=schedules.SubVPSigma()
  )
  assert sub_vp.weight_range()[1] > 1e11
  assert sub_vp.replace(network={"prediction": "noise"}).weight_range() == (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Rising(losses.Weight):
  power: float = 1.0

  def __call__(self, t, sigma):
    return t**self.power


def test_a_weight_of_ones_own(tiny, blur_diffusion, batch):
  """By hand, in both losses; it travels as a text, and training takes it and warns by it."""
  x_0, t, eta = batch
  args = (blur_diffusion, denoiser, x_0, t, eta)
  for kind in (losses.SoftScoreMatching, losses.Mixture):
    plain = kind(weight="one")(*args).numpy()
    np.testing.assert_allclose(kind(weight=Rising(2.0))(*args), t**2 * plain, rtol=1e-5)
    loss = kind(weight=Rising(2.0))
    assert loss.get_config()["weight"] == f"{__name__}:Rising(power=2.0)"
    with pytest.raises(trust.UntrustedCode, match="Rising"):
      parts.make(losses.Loss, loss.get_config())
    assert parts.make(losses.Loss, loss.get_config(), trust_code=True) == loss
    assert kind().get_config()["weight"] == "inverse_variance"  # as configs have had it
  e = tiny.replace(loss=losses.SoftScoreMatching(Rising()))
  assert e.code() == {f"{__name__}:Rising"}
  assert e.weight_range() == pytest.approx((1e-5, 1.0), rel=1e-5)  # from t_min on
  with pytest.raises(trust.UntrustedCode):
    type(e).from_config(e.to_dict())
  config = e.to_config()
  config.loss.weight = "one"  # a flag's text in the place of another
  assert type(e).from_config(config).loss.weight == losses.One()
  model = training.build(e, e.build_diffusion())
  found = model.update(x_0)
  other = training.build(tiny.replace(loss={"weight": "one"}), e.build_diffusion()).update(x_0)
  np.testing.assert_allclose(found["losses"], found["t"] * other["losses"], rtol=1e-4)
  for bad, text in ((Rising(-1.0), r"Rising\(power=-1.0\)' is inf at t = 0"), ("snr", "unknown")):
    with pytest.raises(ValueError, match=text):
      tiny.replace(loss={"weight": bad}, training={"t_min": 0.0})


def test_a_perfect_denoiser_has_no_loss(blur_diffusion, batch):
  x_0, t, eta = batch
  loss = losses.SoftScoreMatching()(blur_diffusion, lambda x_t, t: x_0, x_0, t, eta)
  np.testing.assert_array_equal(loss, np.zeros(5))


def test_what_the_blur_removes_costs_nothing(blur_diffusion, batch):
  # A checkerboard is in the near null space of a blur of std 6: the soft loss must not see it.
  x_0, _, eta = batch
  board = (np.indices([8, 8]).sum(0) % 2 - 0.5).astype(np.float32)[None, :, :, None]
  t = np.ones(5, np.float32)
  wrong = lambda x_t, t: x_0 + board
  args = (blur_diffusion, wrong, x_0, t, eta)
  soft = losses.SoftScoreMatching(weight="one")(*args).numpy()
  plain = losses.SoftScoreMatching(weight="one", filtered=False)(*args).numpy()
  assert np.all(soft < 1e-2 * plain)


def test_unknown_weight(blur_diffusion, batch):
  with pytest.raises(ValueError, match=r"loss\.weight = 'snr' is unknown"):
    losses.SoftScoreMatching(weight="snr")
  with pytest.warns(DeprecationWarning, match=r"losses\.SoftScoreMatching"):
    old = losses.soft_score_matching(blur_diffusion, denoiser, *batch, weight="one")
  new = losses.SoftScoreMatching(weight="one")(blur_diffusion, denoiser, *batch)
  np.testing.assert_array_equal(old, new)
