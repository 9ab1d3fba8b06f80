"""Metrics against formulas and other packages, and intervals against their promised coverage."""

import json

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.spatial.distance import pdist
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ood_lib.metrics import (
    PRDC,
    Interval,
    PixelSpace,
    c2st,
    diversity,
    fid,
    jackknife,
    kid,
    median_interval,
    nearest_ratio,
    novelty,
    prdc,
    prdc_intervals,
    psnr,
    ratio_of_shares,
    sample_quality,
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


@pytest.mark.parametrize(
    ("n", "m", "f", "shift"), [(2, 2, 1, 0.0), (20, 35, 3, 1.0), (64, 30, 30, 0.2)]
)
def test_kid_is_the_unbiased_mmd(n, m, f, shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, f)), rng.normal(size=(m, f)) + shift
    assert kid(x, y) == pytest.approx(unbiased_mmd(x, y), rel=1e-9, abs=1e-12)


def test_kid_is_unbiased_for_equal_laws_and_grows_with_a_shift():
    rng = np.random.default_rng(0)
    values = [kid(rng.normal(size=(40, 5)), rng.normal(size=(40, 5))) for _ in range(300)]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    x, y = rng.normal(size=(200, 5)), rng.normal(size=(200, 5))
    assert 0.05 < kid(x, y + 0.5) < kid(x, y + 1)


class Given(nn.Module):
    """Takes features for images, as torchmetrics asks for a module."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, features):
        return features


def by_torchmetrics(metric, x, y):
    metric.update(torch.from_numpy(y), real=True)
    metric.update(torch.from_numpy(x), real=False)
    return metric.compute()


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
@pytest.mark.parametrize(("n", "f", "shift"), [(40, 7, 0.0), (96, 64, 0.3)])
def test_kid_is_that_of_torchmetrics_with_one_subset_of_all(n, f, shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, f)), rng.normal(size=(n, f)) + shift
    metric = KernelInceptionDistance(feature=Given(f), subsets=1, subset_size=n)
    assert kid(x, y) == pytest.approx(float(by_torchmetrics(metric, x, y)[0]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "m", "f", "shift"), [(60, 60, 5, 0.0), (80, 50, 20, 0.4), (30, 40, 96, 1.0)]
)
def test_fid_is_that_of_torchmetrics(n, m, f, shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, f)), 1.5 * rng.normal(size=(m, f)) + shift
    metric = FrechetInceptionDistance(feature=Given(f)).set_dtype(torch.float64)
    # roots of eigenvalues that rounding leaves where f > n keep half the digits of theirs
    assert fid(x, y) == pytest.approx(float(by_torchmetrics(metric, x, y)), rel=1e-6)


def test_fid_of_a_shift_and_of_a_scale_in_closed_form():
    x = np.random.default_rng(0).normal(size=(50, 4))
    scatter = x.var(axis=0, ddof=1).sum()
    shift = np.array([3.0, 0, 4, 0])
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
    assert fid(x + shift, x) == pytest.approx(25)
    wide = x.mean(axis=0) + 3 * (x - x.mean(axis=0))
    assert fid(wide, x) == pytest.approx((3 - 1) ** 2 * scatter)


@pytest.mark.parametrize("measure", [kid, fid, diversity, c2st, prdc_intervals])
def test_features_that_cannot_be_compared_are_refused(measure):
    x = np.random.default_rng(0).normal(size=(30, 3))
    with pytest.raises(ValueError, match="as many features"):
        measure(x, x[:, :2])
    with pytest.raises(ValueError, match="at least 2 images"):
        measure(x[:1], x)
    with pytest.raises(ValueError, match="NaN"):
        measure(x, np.where(x > 2, np.nan, x) if (x > 2).any() else x * np.inf)


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


def coverage(draw_interval, repeats, truth=None):
    """Share of intervals that cover the truth: the mean of the statistic unless it is known."""
    found = np.array([draw_interval() for _ in range(repeats)])
    truth = found[:, 0].mean() if truth is None else truth
    return np.mean((found[:, 1] <= truth) & (truth <= found[:, 2]))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("statistic", [kid, fid, diversity])
def test_jackknife_of_two_sets_of_unequal_size_covers(statistic, shift, scale):
    rng, spread = np.random.default_rng(0), 1 / np.sqrt(1 + np.arange(8))

    def draw():
        x = (scale * rng.normal(size=(48, 8)) + shift) * spread
        y = rng.normal(size=(80, 8)) * spread
        return jackknife(lambda a, b: statistic(x[a], y[b]), 48, 80)

    assert coverage(draw, 200) > 0.9


def test_jackknife_of_two_sets_joins_the_variances_of_both():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=800), 3 * rng.normal(size=400)
    found = jackknife(lambda a, b: x[a].mean() - y[b].mean(), 800, 400, groups=400)
    error = np.sqrt(x.var() / 800 + y.var() / 400)
    assert found.value == pytest.approx(x.mean() - y.mean())
    assert (found.high - found.low) / 2 == pytest.approx(t.ppf(0.975, 399) * error, rel=0.1)


def test_jackknife_refuses_fewer_rows_than_groups():
    with pytest.raises(ValueError, match="7 rows"):
        jackknife(len, 7)
    with pytest.raises(ValueError, match="5 rows"):
        jackknife(lambda a, b: len(a) + len(b), 70, 5)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 0.7), (6.0, 1.0)])
def test_prdc_intervals_cover(shift, scale):
    rng = np.random.default_rng(0)
    found = [
        prdc_intervals(scale * rng.normal(size=(50, 6)) + shift, rng.normal(size=(50, 6)))
        for _ in range(150)
    ]
    for name in ("precision", "recall", "density", "coverage"):
        drawn = iter([each[name] for each in found])
        assert coverage(lambda drawn=drawn: next(drawn), 150) > 0.9, name


def test_prdc_intervals_hold_the_values_and_do_not_shrink_to_nothing():
    x = np.random.default_rng(0).normal(size=(40, 4))
    found = prdc_intervals(x, x)
    assert {name: i.value for name, i in found.items()} == vars(prdc(x, x))
    for name in ("precision", "recall", "coverage"):
        assert found[name].low < 0.95 < 1 == found[name].high, name
    far = prdc_intervals(x + 100, x)
    assert far["coverage"].low == 0 < 0.05 < far["coverage"].high


def test_c2st_is_the_cross_validated_accuracy_of_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(43, 5)) + 0.5, rng.normal(size=(43, 5))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    fold = PredefinedSplit(np.tile(np.arange(43) % 10, 2))
    rows, labels = np.concatenate([x, y]), np.repeat([1, 0], 43)
    scores = cross_val_score(model, rows, labels, cv=fold)
    found = c2st(x, np.concatenate([y, y[:9]]))  # cut to equal numbers
    assert found.value == pytest.approx(scores.mean())
    half = t.ppf(0.975, 9) * scores.std(ddof=1) * np.sqrt(1 / 10 + 1 / 9)
    assert found.high - found.value >= half - 1e-12 or found.high == 1
    assert found.value - found.low >= half - 1e-12


@pytest.mark.parametrize("f", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_c2st_of_equal_laws_is_chance_and_its_interval_covers(f):
    """The Wilson interval of the same hits covers 0.82 to 0.90."""
    rng = np.random.default_rng(0)
    found = [c2st(rng.normal(size=(40, f)), rng.normal(size=(40, f))) for _ in range(100)]
    values = np.array([i.value for i in found])
    assert abs(values.mean() - 0.5) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean([i.low <= 0.5 <= i.high for i in found]) >= 0.9


@pytest.mark.slow
def test_c2st_covers_where_laws_differ():
    rng = np.random.default_rng(0)

    def draw():
        return c2st(rng.normal(size=(40, 4)) + 0.5, rng.normal(size=(40, 4)))

    assert coverage(draw, 80) >= 0.9


def test_c2st_is_one_where_laws_are_apart_and_refuses_folds_that_cannot_be():
    rng = np.random.default_rng(0)
    apart = c2st(rng.normal(size=(40, 4)) + 9, rng.normal(size=(40, 4)))
    assert apart.value == apart.high == 1
    assert 0.9 < apart.low < 1
    for folds in (1, 41):
        with pytest.raises(ValueError, match=f"{folds} folds"):
            c2st(np.eye(40), np.eye(40), folds=folds)


def test_diversity_is_the_ratio_of_mean_distances_of_unit_vectors():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)) + 1, rng.normal(size=(30, 6))
    made, real = (pdist(z / np.linalg.norm(z, axis=1, keepdims=True)).mean() for z in (x, y))
    assert diversity(x, y) == pytest.approx(made / real)
    assert diversity(7 * x, x) == pytest.approx(1)
    with pytest.raises(ValueError, match="copies of one"):
        diversity(x, y[:1].repeat(5, axis=0))


def test_nearest_ratio_is_zero_for_replay_and_about_one_for_the_held_out_law():
    rng = np.random.default_rng(0)
    fit, heldout, fresh = (rng.normal(size=(150, 8)) for _ in range(3))
    assert nearest_ratio(fit[:9], fit, heldout).shape == (9,)
    np.testing.assert_allclose(nearest_ratio(fit, fit, heldout), 0, atol=1e-6)
    assert np.median(nearest_ratio(heldout, fit, heldout)) == pytest.approx(1)
    assert np.median(nearest_ratio(fresh, fit, heldout)) == pytest.approx(1, abs=0.1)
    assert np.median(nearest_ratio(3 * fresh, fit, heldout)) > 1.5
    np.testing.assert_allclose(
        nearest_ratio(50 * fresh, 50 * fit, 50 * heldout), nearest_ratio(fresh, fit, heldout)
    )


def test_nearest_ratio_refuses_held_out_copies_and_empty_sets():
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="copies of fitted"):
        nearest_ratio(x, x, x[::-1])
    with pytest.raises(ValueError, match="20 generated, 0 fitted"):
        nearest_ratio(x, x[:0], x)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_interval_of_the_median_ratio_covers(scale):
    rng = np.random.default_rng(0)
    fit = rng.normal(size=(80, 6))

    def draw():
        x, y = scale * rng.normal(size=(48, 6)), rng.normal(size=(80, 6))
        return jackknife(lambda a, b: np.median(nearest_ratio(x[a], fit, y[b])), 48, 80)

    assert coverage(draw, 200) > 0.9


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


class Judge:
    """Calls an image "bright" or "dark" by its mean, and "none" where it is far from both."""

    classes = ("bright", "dark", "none")

    def is_domain(self, images, domain):
        mean = images.mean((1, 2, 3)).numpy()
        found = np.where(mean > 0.2, 0, np.where(mean < -0.2, 1, 2))
        return found == self.classes.index(domain)

    def share(self, images, domain):
        return ratio_of_shares(self.is_domain(images, domain))


def flat(images):
    return images.flatten(1).numpy()


@pytest.fixture(scope="module")
def bright():
    """Images of one law: fitted, held out, fresh; squares of random brightness on faint noise."""
    rng = torch.Generator().manual_seed(0)

    def draw(n):
        level = 0.4 + 0.2 * torch.rand(n, 1, 2, 2, generator=rng)
        fine = 0.05 * torch.randn(n, 1, 8, 8, generator=rng)
        return level.repeat_interleave(4, 2).repeat_interleave(4, 3) + fine

    return {"fit": draw(60), "heldout": draw(80), "fresh": draw(70)}


def measured(images, bright, **changes):
    given = {"fit": bright["fit"], "heldout": bright["heldout"], "features": flat}
    return sample_quality(
        images, **{**given, "classifier": Judge(), "domain": "bright", "neighbours": 3, **changes}
    )


def test_quality_of_the_true_law_is_that_of_held_out_images(bright):
    found = measured(bright["fresh"], bright)
    assert (found.domain, found.n, found.n_fit, found.n_heldout, found.n_equal) == (
        *("bright", 70, 60, 80),
        40,
    )
    assert found.kid.low < 0 < found.kid.high
    assert found.c2st.low < 0.5 < found.c2st.high
    for one in (found.novelty, found.diversity, found.share_ratio):
        assert one.low < 1 <= one.high
        assert one.value == pytest.approx(1, abs=0.1)
    assert found.nearest_ratio.shape == (70,)
    assert found.novelty.value == pytest.approx(np.median(found.nearest_ratio))
    assert found.fid.low < found.fid_floor.value < found.fid.high
    for name, interval in found.prdc.items():
        assert interval.low <= found.prdc_floor[name].value <= interval.high, name
    assert found.share.value == found.share_floor.value == 1
    assert found.share_none.value == 0


def test_quality_flags_replay_noise_repeats_and_the_wrong_domain(bright):
    replay = measured(bright["fit"], bright)
    assert replay.novelty.high < 0.01
    assert replay.c2st.low < 0.5 < replay.c2st.high  # copies of good images are good images
    noise = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = measured(noise, bright)
    assert found.share_none.value > 0.9
    assert found.share_ratio.high < 0.3
    assert found.c2st.low > 0.9
    assert found.kid.low > found.kid_floor.high
    assert found.fid.low > found.fid_floor.high
    assert found.prdc["coverage"].high < found.prdc_floor["coverage"].low
    one = measured(bright["fresh"][:1].repeat(60, 1, 1, 1), bright)
    assert one.diversity.high < 0.01
    assert one.prdc["coverage"].high < 0.5
    dark = measured(-bright["fresh"], bright)
    assert dark.share.value == 0
    assert dark.novelty.low > 1.5


def test_kid_counts_at_least_what_real_images_get(bright):
    found = measured(bright["heldout"].clone(), bright)  # nearer to the held-out ones than real
    assert found.kid.value < found.kid_floor.value
    assert found.kid_floored == Interval(*np.maximum(found.kid, found.kid_floor).tolist())
    x, h, f = (flat(bright[name]) for name in ("fresh", "heldout", "fit"))
    fresh = measured(bright["fresh"], bright)
    assert fresh.kid.value == pytest.approx(kid(x, h))
    assert fresh.kid_floor.value == pytest.approx(kid(f, h))
    assert fresh.fid.value == pytest.approx(fid(x[:40], h[::2]))
    assert fresh.fid_floor.value == pytest.approx(fid(h[1::2], h[::2]))


def test_quality_becomes_json_and_comes_back(bright):
    found = measured(bright["fresh"], bright)
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["n"] == 70
    assert Interval(**read["kid"]) == found.kid
    assert Interval(**read["prdc"]["density"]) == found.prdc["density"]
    assert read["nearest_ratio"] == found.nearest_ratio.tolist()
    assert measured(bright["fresh"], bright).as_dict() == found.as_dict()  # nothing is drawn


def test_quality_refuses_mixed_up_and_small_sets(bright):
    fresh, heldout = bright["fresh"], bright["heldout"]
    with pytest.raises(ValueError, match="2 held-out images are among the fitted"):
        measured(fresh, bright, fit=torch.cat([bright["fit"], heldout[:2]]))
    with pytest.raises(ValueError, match="generated has shape"):
        measured(fresh[:9], bright)
    with pytest.raises(ValueError, match="heldout has shape"):
        measured(fresh, bright, heldout=heldout[:20])
    with pytest.raises(ValueError, match="fit has shape"):
        measured(fresh, bright, fit=bright["fit"].repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="no hit"):
        measured(fresh, bright, domain="dark")
