import dataclasses

import numpy as np
import pytest

from soft_diffusion_tf import laboratory, priors, trust


def test_a_colour_is_constant_and_fits_the_means(blur_diffusion, digits):
  prior = priors.fit("colour", digits, blur_diffusion)
  drawn = prior.draw(np.arange(4000)).numpy()
  assert np.ptp(drawn, axis=(1, 2)).max() < 1e-6
  colours = digits.mean(axis=(1, 2))
  # standard error of a mean of 4,000 is 0.016 standard deviations
  assert abs(drawn[:, 0, 0].mean() - colours.mean()) < 0.1 * colours.std()
  assert abs(drawn[:, 0, 0].std() / colours.std() - 1) < 0.06


def test_channels_are_independent(rng):
  from soft_diffusion_tf import corruptions, diffusion, schedules

  process = diffusion.Diffusion(
    (8, 8, 3), corruptions.GaussianBlur(), schedules.Linear(0.0, 6.0), schedules.Constant(0.1)
  )
  images = rng.random([50, 1, 1, 3]) * np.float32([1, 0.5, 0.1]) + np.zeros([1, 8, 8, 1])
  drawn = priors.fit("colour", images, process).draw(np.arange(3000)).numpy()[:, 0, 0]
  assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.1
  np.testing.assert_allclose(drawn.std(0), images[:, 0, 0].std(0), rtol=0.1)


def test_better_priors_are_closer_to_corrupted_data(blur_diffusion, digits):
  grades = {
    kind: laboratory.grade_prior(
      blur_diffusion.with_prior(priors.fit(kind, digits, blur_diffusion)), digits
    )
    for kind in priors.KINDS
  }
  # Zero padding darkens the corners, which the printed prior does not know (theory: the gap is
  # many times the noise); the two that do know are at the floor.
  # A Sinkhorn floor of 1,000 points in 64 dimensions is high, so the factor there is smaller.
  for distance, factor in (("frechet", 20), ("sinkhorn", 4)):
    floor = grades["zero"][distance + "_floor"]
    assert grades["colour"][distance] > factor * floor
    for kind in ("blurred_colour", "subspace"):
      assert grades[kind][distance] < 1.3 * floor
  assert grades["zero"]["rms_mean"] > 5 * grades["subspace"]["rms_mean"]


def test_a_full_subspace_has_the_datas_covariance(blur_diffusion, digits):
  images = digits[:40]  # fewer images than pixels, and more: both ways of finding components
  for count in (40, 300):
    images = digits[:count]
    prior = priors.fit("subspace", images, blur_diffusion, rank=64)
    rows = blur_diffusion.corrupt(images, 1.0).numpy().reshape(count, -1)
    factors = prior.factors.reshape(len(prior.factors), -1)
    np.testing.assert_allclose(factors.T @ factors, np.cov(rows, rowvar=False), atol=1e-5)


def test_images_are_corrupted_few_at_a_time(blur_diffusion, digits, monkeypatch):
  images = digits[:7]
  whole = priors.corrupt_all(images, blur_diffusion, 0.7)
  np.testing.assert_allclose(whole, blur_diffusion.corrupt(images, 0.7), atol=1e-6)  # float32
  for size in (1, 3 * 4 * 64):  # bytes: one image at a time; three
    monkeypatch.setattr(priors, "_BATCH_BYTES", size)
    np.testing.assert_allclose(priors.corrupt_all(images, blur_diffusion, 0.7), whole, atol=1e-6)


def test_save_and_load(tmp_path, blur_diffusion, digits):
  prior = priors.fit("subspace", digits, blur_diffusion)
  prior.save(tmp_path / "p.npz")
  again = priors.Prior.load(tmp_path / "p.npz")
  np.testing.assert_array_equal(prior.draw(np.arange(3)), again.draw(np.arange(3)))
  assert [f.name for f in tmp_path.iterdir()] == ["p.npz"]


def test_bad_requests(tmp_path, blur_diffusion, digits):
  with pytest.raises(ValueError, match="unknown prior 'gauss'"):
    priors.fit("gauss", digits, blur_diffusion)
  with pytest.raises(ValueError, match="at least 2 images"):
    priors.fit("colour", digits[:1], blur_diffusion)
  for bad in (np.uint8(255 * digits), 2 * digits - 1, digits + np.nan):
    with pytest.raises(ValueError, match=r"the images to fit a prior to (run from|hold NaN)"):
      priors.fit("colour", bad, blur_diffusion)
  with pytest.raises(ValueError, match=r"none\.npz: not a saved prior"):
    priors.Prior.load(tmp_path / "none.npz")
  (tmp_path / "bad.npz").write_bytes(b"PK nothing")
  with pytest.raises(ValueError, match=r"bad\.npz: not a saved prior"):
    priors.Prior.load(tmp_path / "bad.npz")


MEAN, FACTORS = np.zeros([4, 4, 1]), np.zeros([2, 4, 4, 1])


@pytest.mark.parametrize(
  ("kind", "mean", "factors", "text"),
  [
    (5, MEAN, FACTORS, "a name, not 5"),
    ("zero", MEAN, FACTORS, "up to 0 factors"),
    ("colour", MEAN, FACTORS[:, :3], r"got shapes \(4, 4, 1\) and \(2, 3, 4, 1\)"),
    ("colour", MEAN[..., 0], FACTORS[..., 0], "has a mean"),
    ("colour", MEAN, np.zeros([17, 4, 4, 1]), "up to 16 factors"),
    ("colour", MEAN + np.nan, FACTORS, "NaN or infinite"),
    ("colour", MEAN, FACTORS + np.inf, "NaN or infinite"),
  ],
)
def test_what_is_no_gaussian_over_images(kind, mean, factors, text):
  with pytest.raises(ValueError, match=text):
    priors.Prior(kind, mean, factors)


@pytest.mark.parametrize(
  "change",
  [
    {"mean": "?"},
    {"mean": 5},
    {"factors": "AAAA"},
    {"shape": 8},
    {"shape": ["a"]},
    {"kind": None},
    {"shape": [10**30, 1, 1]},
  ],
)
def test_a_damaged_config_of_a_prior(change):
  config = priors.Prior("colour", MEAN, FACTORS).get_config()
  with pytest.raises(ValueError, match=r"damaged|kind of a prior"):
    priors.Prior.from_config(config | change)
  with pytest.raises(ValueError, match="a prior's config has"):
    priors.Prior.from_config(5)


class Flat(priors.Prior):
  """Draws its mean alone."""


def test_an_estimator_says_what_it_makes(digits, blur_diffusion):
  """Or a saved prior would be read as another class, and draw something else without a word."""

  @dataclasses.dataclass(frozen=True)
  class Undeclared(priors.Estimator):
    kind: str = f"{__name__}:Flat"

    def fit(self, images, diffusion):
      mean = images.mean(0)
      return Flat(self.kind, mean, np.zeros([0, *mean.shape], np.float32))

  @dataclasses.dataclass(frozen=True)
  class Declared(Undeclared):
    makes = Flat

  with pytest.raises(ValueError, match="say so in Undeclared, by makes"):
    priors.fit(Undeclared(), digits[:9], blur_diffusion)
  with pytest.raises(ValueError, match=r"kind of a Flat is '.*test_priors:Flat', not 'flat'"):
    priors.fit(Declared(kind="flat"), digits[:9], blur_diffusion)
  prior = priors.fit(Declared(), digits[:9], blur_diffusion)
  with trust.trust_code():
    assert type(priors.Prior.from_config(prior.get_config())) is Flat
  with pytest.raises(trust.UntrustedCode):
    priors.Prior.from_config(prior.get_config())
