"""Metrics against formulas written out again, and intervals against their promised coverage."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc

from ood_lib.metrics import (
    PRDC,
    PixelSpace,
    jackknife,
    kid,
    median_interval,
    novelty,
    prdc,
    psnr,
    ratio_of_shares,
)


def unbiased_mmd(x, y):
    """Unbiased squared MMD, k(a, b) = (a.b / f + 1)^3, Binkowski et al. 2018, by explicit sums."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = sum(
        kernel(z, z)[~np.eye(len(z), dtype=bool)].sum() / (len(z) * (len(z) - 1)) for z in (x, y)
    )
    return own - 2 * kernel(x, y).sum() / (n * m)


@pytest.mark.parametrize(("n", "f", "shift"), [(2, 1, 0.0), (20, 3, 1.0), (64, 30, 0.2)])
def test_kid_is_the_unbiased_mmd(n, f, shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, f)), rng.normal(size=(n, f)) + shift
    assert kid(x, y) == pytest.approx(unbiased_mmd(x, y), rel=1e-9, abs=1e-12)


def test_kid_is_unbiased_for_equal_laws_and_grows_with_a_shift():
    rng = np.random.default_rng(0)
    values = [kid(rng.normal(size=(40, 5)), rng.normal(size=(40, 5))) for _ in range(300)]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    x, y = rng.normal(size=(200, 5)), rng.normal(size=(200, 5))
    assert 0.05 < kid(x, y + 0.5) < kid(x, y + 1)


def test_kid_against_a_larger_reference_is_the_mean_over_its_blocks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 4)), rng.normal(size=(35, 4)) + 0.3
    blocks = [unbiased_mmd(x, y[i : i + 10]) for i in (0, 10, 20)]
    assert kid(x, y) == pytest.approx(np.mean(blocks))


@pytest.mark.parametrize("sizes", [(1, 50), (50, 1), (0, 0)])
def test_kid_refuses_less_than_a_pair(sizes):
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(*(np.ones((size, 3)) for size in sizes))


@pytest.mark.parametrize(
    ("n", "m", "f", "k", "shift"),
    [(50, 50, 8, 5, 0.0), (40, 60, 3, 3, 0.7), (60, 40, 1280, 1, 0.1), (8, 9, 2, 6, 2.0)],
)
def test_prdc_is_that_of_the_authors(n, m, f, k, shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, f)) + shift, rng.normal(size=(m, f))
    found = prdc(x, y, neighbours=k)
    for name, value in compute_prdc(y, x, k).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name


def test_prdc_by_hand():
    real, made = (np.array(x)[:, None] for x in ([0.0, 1.0, 2.0, 3.0], [0.5, 10.0, 10.4, 11.0]))
    assert prdc(made, real, neighbours=1) == PRDC(0.25, 1.0, 0.5, 0.5)


def test_prdc_of_equal_and_of_disjoint_sets():
    x = np.random.default_rng(0).normal(size=(30, 4))
    assert prdc(x, x) == PRDC(1.0, 1.0, 1.0, 1.0)
    assert prdc(x + 100, x) == PRDC(0.0, 0.0, 0.0, 0.0)


def test_prdc_tells_copies_of_one_image_and_an_outlier():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 4))
    copies = prdc(np.repeat(real[:1], 200, axis=0), real)
    assert copies.precision == 1
    assert copies.recall < 0.05
    assert copies.coverage < 0.1
    stray = np.concatenate([real, [[30.0, 0, 0, 0]]])  # its reach swallows whatever lies around
    far = rng.normal(size=(200, 4)) + np.array([20.0, 0, 0, 0])
    found = prdc(far, stray)
    assert found.precision == 1
    assert found.density < 0.3
    assert found.coverage < 0.02


@pytest.mark.parametrize(("n", "m", "k"), [(5, 50, 5), (50, 5, 5), (10, 10, 0), (0, 0, 1)])
def test_prdc_refuses_too_few_images(n, m, k):
    with pytest.raises(ValueError, match=f"{k} neighbours"):
        prdc(np.ones((n, 3)), np.ones((m, 3)), neighbours=k)


@pytest.mark.parametrize(("gap", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0)])
def test_psnr_of_a_constant_gap(gap, decibels):
    reference = torch.full((3, 1, 4, 4), -1.0, dtype=torch.float64)
    found = psnr(reference + gap, reference)
    np.testing.assert_allclose(found, [decibels] * 3, atol=1e-9)


def test_psnr_is_per_image_and_clips_what_a_viewer_clips():
    images = torch.zeros(2, 1, 2, 2)
    images[1] = 3.0
    found = psnr(images, torch.stack([torch.full((1, 2, 2), 0.2), torch.ones(1, 2, 2)]))
    assert found[0] == pytest.approx(20, abs=1e-4)
    assert torch.isinf(found[1])


def blobs(n, centre, seed, side=8):
    """Noisy images with one bright square on the left (-1) or the right (+1)."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.randn(n, 1, side, side, generator=generator) - 0.5
    half = slice(0, side // 2) if centre < 0 else slice(side // 2, side)
    images[..., half] += 1.0
    return images


def test_pixel_space_separates_two_obvious_sets():
    space = PixelSpace.fit(blobs(40, -1, 0), blobs(60, 1, 1), components=10)
    assert space.is_target(blobs(30, -1, 2)).all()
    assert not space.is_target(blobs(30, 1, 3)).any()
    left, right, again = (space.features(blobs(30, c, s)) for c, s in ((-1, 4), (1, 5), (-1, 6)))
    assert left.shape == (30, 10)
    assert kid(left, right) > 20 * abs(kid(left, again))


def test_pixel_space_of_two_equal_sets_tells_nothing():
    space = PixelSpace.fit(blobs(200, 1, 0), blobs(200, 1, 1), components=10)
    assert 0.35 < space.is_target(blobs(300, 1, 2)).mean() < 0.65


def test_pixel_features_have_mean_variance_one_on_what_they_were_fitted_to():
    target, own = blobs(50, -1, 0), blobs(50, 1, 1)
    features = PixelSpace.fit(target, own, components=12).features(torch.cat([target, own]))
    assert features.var(axis=0, ddof=1).mean() == pytest.approx(1)


@pytest.mark.parametrize(("p", "n"), [(0.5, 30), (0.9, 100), (0.05, 60)])
def test_share_interval_covers(p, n):
    rng = np.random.default_rng(0)
    found = [ratio_of_shares(rng.random(n) < p) for _ in range(1000)]
    assert np.mean([i.low <= p <= i.high for i in found]) > 0.92


def test_ratio_interval_covers_at_least_as_promised():
    rng = np.random.default_rng(0)
    found = [ratio_of_shares(rng.random(60) < 0.4, rng.random(80) < 0.8) for _ in range(1000)]
    assert np.mean([i.low <= 0.5 <= i.high for i in found]) >= 0.95
    assert np.median([i.value for i in found]) == pytest.approx(0.5, abs=0.03)


def test_share_at_the_ends_keeps_an_interval():
    none, every = ratio_of_shares(np.zeros(20, bool)), ratio_of_shares(np.ones(20, bool))
    assert none.value == none.low == pytest.approx(0, abs=1e-12)
    assert 0.1 < none.high < 0.3
    assert every.value == every.high == pytest.approx(1)
    with pytest.raises(ValueError, match="baseline has no hit"):
        ratio_of_shares(np.ones(5, bool), np.zeros(5, bool))


@pytest.mark.parametrize("groups", [4, 8, 40])
def test_jackknife_of_a_mean_is_the_standard_error_of_group_means(groups):
    x = np.random.default_rng(0).normal(size=40)
    found = jackknife(lambda rows: x[rows].mean(), 40, groups=groups)
    means = x.reshape(-1, groups).mean(axis=0)  # groups of equal size, every groups-th row
    from scipy.stats import t

    half = t.ppf(0.975, groups - 1) * means.std(ddof=1) / np.sqrt(groups)
    np.testing.assert_allclose(found, [x.mean(), x.mean() - half, x.mean() + half])


def test_jackknife_of_kid_covers_where_two_laws_differ():
    """The naive bootstrap covers 0 % here (h9)."""
    rng = np.random.default_rng(0)
    f, n, shift = 4, 48, 0.4
    far = rng.normal(size=(2, 4000, f)) + np.array([0, shift])[:, None, None]
    truth = np.mean([unbiased_mmd(a, b) for a, b in zip(*far.reshape(2, 20, 200, f), strict=True)])
    hits = []
    for _ in range(200):
        x, y = rng.normal(size=(n, f)), rng.normal(size=(n, f)) + shift
        found = jackknife(lambda rows, x=x, y=y: kid(x[rows], y[rows]), n)
        hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) > 0.88


def test_jackknife_refuses_fewer_rows_than_groups():
    with pytest.raises(ValueError, match="7 rows"):
        jackknife(len, 7)


def test_median_interval_covers_the_median_of_a_skewed_law():
    rng = np.random.default_rng(0)
    found = [median_interval(rng.exponential(size=40), rng=rng) for _ in range(150)]
    assert np.mean([i.low <= np.log(2) <= i.high for i in found]) > 0.88


def test_median_interval_of_a_ratio_is_taken_image_by_image():
    over = np.array([1.0, 10.0, 100.0])
    found = median_interval(np.array([2.0, 20.0, 200.0]), over, rng=np.random.default_rng(0))
    assert tuple(found) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least 2"):
        median_interval(np.ones(1), rng=np.random.default_rng(0))


def test_novelty_is_zero_for_copies_and_one_for_held_out():
    generator = torch.Generator().manual_seed(0)
    fit, heldout, fresh = (torch.rand(60, 1, 8, 8, generator=generator) for _ in range(3))
    assert novelty(fit[:20], fit, heldout) == pytest.approx(0, abs=1e-5)
    assert novelty(fresh, fit, heldout) == pytest.approx(1, abs=0.05)
    near = fit + 0.01 * torch.randn(fit.shape, generator=generator)
    assert 0 < novelty(near, fit, heldout) < 0.1
