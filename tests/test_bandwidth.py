"""Bandwidth: measured against the closed form, and the statistics of chapter 12 against made-up cases."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kruskal, spearmanr

from ood_lib import bandwidth as bw
from ood_lib.analytic import GaussianLaw, analytic_model, exact_latent
from ood_lib.metrics import Interval
from ood_lib.results import judge, load_claims
from ood_lib.schedule import NoiseSchedule, from_diffusers, uniform_log_sigma

D = 64
SHAPE = (1, 8, 8)
ETAS = [0.0, 0.15, 0.4, 1.0]


@pytest.fixture(scope="module")
def law():
    rng = np.random.default_rng(0)
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((D, 20)))[0])
    return GaussianLaw(torch.zeros(D).double(), basis, torch.logspace(1, -2, 20).double(), 1e-3)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (24, *SHAPE)))


@pytest.fixture(scope="module")
def grid(schedule):
    return uniform_log_sigma(schedule, 31, t_end=500)


@pytest.fixture(scope="module")
def cosine():
    """Schedule of the iDDPM models."""
    return from_diffusers(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def measured(law, schedule, images, grid, **options):
    model = analytic_model(law, schedule, sample_shape=SHAPE)
    options = {"etas": ETAS, "generator": noise(), **options}
    return bw.eta_curve(model, images, timesteps=grid, **options)


def psnr_curve(psnr, etas=ETAS):
    """Curve of given PSNR (k, N), without images."""
    return bw.EtaCurve(np.array(etas), 4 * 10 ** (-np.array(psnr) / 10), np.array([0.0, 9.0]), 0)


# ----------------------------------------------------------------------------------------- curves


def test_the_measured_curve_is_the_closed_form(law, schedule, images, grid):
    curve = measured(law, schedule, images, grid)
    expected = bw.closed_curve(law, images, schedule, etas=ETAS, timesteps=grid)
    np.testing.assert_allclose(curve.mse.mean(1), expected.mse.mean(1), rtol=0.05)
    assert (curve.nfe, expected.nfe) == (4 * 30, 0)
    assert curve.images.shape == (4, 24, *SHAPE)


@pytest.mark.parametrize("bar", bw.BARS)
def test_the_measured_bandwidth_is_that_of_the_closed_form(law, schedule, images, grid, bar):
    curve = measured(law, schedule, images, grid)
    closed = bw.closed_curve(law, images, schedule, etas=ETAS, timesteps=grid)
    first, second = (bw.bandwidth(c, bar).values for c in (curve, closed))
    assert np.median(first) == pytest.approx(np.median(second), rel=0.1)


@pytest.mark.parametrize("first", [0.0, 30.0])
def test_without_latents_images_are_inverted_from_the_first_level(law, schedule, images, first):
    levels = np.exp(np.linspace(*np.log(schedule.sigma([first, 500])), 31))
    grid = schedule.t_of_log_sigma(np.log(levels))
    grid[0], grid[-1] = first, 500
    exact = exact_latent(law, schedule, images, t_start=first, t_end=500)
    one, other = (measured(law, schedule, images, grid, latent=z) for z in (None, exact))
    np.testing.assert_allclose(one.mse[1:].mean(1), other.mse[1:].mean(1), rtol=0.02)


def test_all_etas_meet_the_same_noise_and_another_seed_another(law, schedule, images, grid):
    first, again = (measured(law, schedule, images[:2], grid, generator=noise()) for _ in range(2))
    np.testing.assert_array_equal(first.mse, again.mse)
    alone = measured(law, schedule, images[:2], grid, etas=[0, 0.4])
    np.testing.assert_array_equal(alone.mse[1], first.mse[2])
    other = measured(law, schedule, images[:2], grid, generator=noise(1))
    assert (first.mse[0] == other.mse[0]).all()
    assert (first.mse[1:] != other.mse[1:]).all()


def test_no_noise_returns_and_all_the_noise_loses(law, schedule, images):
    grid = uniform_log_sigma(schedule, 31, t_end=900)
    curve = measured(law, schedule, images, grid, etas=[0, 1])
    assert np.median(curve.psnr[0]) > bw.BARS[0]
    assert np.median(curve.psnr[1]) < bw.BARS[1]


def test_rows_are_kept_together(law, schedule, images, grid):
    curve = measured(law, schedule, images[:4], grid)
    some = curve.of(np.array([True, False, False, True]))
    np.testing.assert_array_equal(some.mse, curve.mse[:, [0, 3]])
    assert torch.equal(some.images, curve.images[:, [0, 3]])
    assert bw.closed_curve(law, images, schedule, etas=ETAS, timesteps=grid).of(
        np.array([1])
    ).mse.shape == (4, 1)


@pytest.mark.parametrize("etas", [[0.1, 0.2], [0.0], [0.0, 0.3, 0.2], [0.0, 1.1]])
def test_etas_that_do_not_rise_from_zero_are_refused(law, schedule, images, grid, etas):
    with pytest.raises(ValueError, match="rise from 0 to at most 1"):
        measured(law, schedule, images, grid, etas=etas)
    with pytest.raises(ValueError, match="rise from 0 to at most 1"):
        bw.closed_curve(law, images, schedule, etas=etas, timesteps=grid)


# -------------------------------------------------------------------------------------- schedules


def test_two_schedules_meet_at_their_noise_levels(schedule, cosine, grid):
    there = bw.same_levels(cosine, schedule, grid)
    np.testing.assert_allclose(cosine.sigma(there), schedule.sigma(grid), rtol=1e-9)
    with pytest.raises(ValueError, match="use levels inside both"):
        bw.same_levels(schedule, cosine, np.array([0.0, 500]))


def test_at_equal_noise_a_gaussian_model_knows_no_schedule(law, schedule, cosine, images, grid):
    there = bw.same_levels(cosine, schedule, grid)
    curves = [
        bw.closed_curve(law, images, s, etas=ETAS, timesteps=g)
        for s, g in ((schedule, grid), (cosine, there))
    ]
    np.testing.assert_allclose(curves[0].mse, curves[1].mse, rtol=1e-6)
    at_500 = uniform_log_sigma(cosine, 31, t_end=500)
    other = bw.closed_curve(law, images, cosine, etas=ETAS, timesteps=at_500)
    assert (other.mse[2] < 0.9 * curves[0].mse[2]).all()  # less noise at the same timestep


# -------------------------------------------------------------------------------------- bandwidth


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 0.7), st.floats(15, 30))
def test_a_quadratic_error_is_inverted_exactly(width, bar):
    etas = np.array(ETAS)[:, None]
    curve = bw.EtaCurve(
        etas.ravel(), 4 * 10 ** (-bar / 10) * (etas / width) ** 2, np.array([0.0, 9.0]), 0
    )
    found = bw.bandwidth(curve, bar)
    assert found.values.item() == pytest.approx(width, rel=1e-6)
    assert found.known == 1


def test_censored_images_are_marked():
    curve = psnr_curve([[20, 40, 40], [15, 39, 20], [12, 35, 15], [10, 30, 10]])
    found = bw.bandwidth(curve, 26.4)
    assert found.below.tolist() == [True, False, False]
    assert found.above.tolist() == [False, True, False]
    assert found.values[:2].tolist() == [0, 1]
    assert 0 < found.values[2] < 0.15
    assert found.known == pytest.approx(1 / 3)


def test_an_image_on_the_bar_still_returns():
    curve = bw.EtaCurve(np.array([0.0, 0.5, 1.0]), np.array([[0.0], [0.04], [1.0]]), np.zeros(2), 0)
    assert bw.bandwidth(curve, 20.0).values.item() == pytest.approx(0.5)


def test_what_is_lost_once_stays_lost():
    curve = psnr_curve([[40], [20], [30], [10]])
    assert bw.bandwidth(curve, 26.4).values.item() < 0.15


def test_a_higher_bar_leaves_less(law, schedule, images, grid):
    curve = bw.closed_curve(law, images, schedule, etas=ETAS, timesteps=grid)
    strict, lenient = (bw.bandwidth(curve, bar).values for bar in bw.BARS)
    assert (strict < lenient).all()


def test_interpolation_is_close_to_the_exact_crossing(law, schedule, images, grid):
    fine = np.linspace(0, 1, 201)
    exact = bw.closed_curve(law, images, schedule, etas=fine, timesteps=grid)
    coarse = bw.EtaCurve(np.array(ETAS), exact.mse[[0, 30, 80, 200]], grid, 0)
    for bar in bw.BARS:
        found, true = (bw.bandwidth(c, bar).values for c in (coarse, exact))
        np.testing.assert_allclose(found, true, rtol=0.1)


# ------------------------------------------------------------------------------------- statistics


def lognormal(median, n=8, width=0.2, seed=0):
    return median * np.exp(width * np.random.default_rng(seed).standard_normal(n))


def test_an_image_that_never_returns_has_a_factor():
    found = bw.factor(np.array([0, 0.1, 0]), np.array([0.2, 0.001, 0]))
    np.testing.assert_allclose(found, [20, 10, 1])
    lost = np.stack([np.full(4, 0.2), np.zeros(4), np.full(4, 0.1)])
    assert bw.log_ratio(lost) == pytest.approx(np.log(20) / np.log(2))
    assert np.isfinite(bw.schedule_share(lost))


def test_the_share_between_equal_groups_is_zero_in_expectation():
    rng = np.random.default_rng(0)
    drawn = [bw.between_share(*rng.standard_normal((5, 8))) for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0, abs=0.02)
    assert np.quantile(drawn, 0.99) < 0.3
    assert bw.between_share(np.ones(3), np.ones(3)) == 0


def test_ranks_are_those_of_scipy():
    """With ties, which censored images bring."""
    groups = [np.round(lognormal(0.3, 9, 0.5, seed), 1) for seed in range(3)]
    h = kruskal(*groups).statistic
    assert bw.between_share(*groups) == pytest.approx((h - 2) / (27 - 3))
    rho = spearmanr(groups[0], groups[1]).statistic
    assert bw.unexplained(np.stack(groups[:2])) == pytest.approx(1 - rho**2)


def test_constant_numbers_explain_nothing():
    assert bw.unexplained(np.array([[0.1, 0.2], [1.0, 1.0]])) == 1


def test_chance_explains_more_where_images_differ_more():
    rng = np.random.default_rng(0)
    narrow, wide = (bw.null_factor(lognormal(0.2, 200, w), rng=rng) for w in (0.2, 0.6))
    # log of a median of n has standard error 1.2533 w / sqrt(n); two of them, two-sided 95 %
    assert narrow == pytest.approx(
        np.exp(1.96 * np.sqrt(2) * 1.2533 * 0.2 / np.sqrt(200)), rel=0.05
    )
    assert narrow < wide


def test_images_keep_their_numbers_when_resampled():
    pairs = np.stack([np.arange(1.0, 9), 2 * np.arange(1.0, 9)])
    found = bw.resample(bw.median_factor, [pairs], rng=np.random.default_rng(0))
    assert found == Interval(2, 2, 2)
    with pytest.raises(ValueError, match="needs 2 of them"):
        bw.resample(bw.median_factor, [pairs[:, :1]], rng=np.random.default_rng(0))


def test_the_bootstrap_covers_a_median_factor():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        group = np.stack([np.full(16, 0.2), lognormal(0.3, 16, 0.3, seed)])
        found = bw.resample(lambda x: np.median(x[1] / x[0]), [group], rng=rng, n_resamples=300)
        hits += found.low <= 1.5 <= found.high
    assert hits >= 88


# --------------------------------------------------------- verdicts: one that supports, one against


def apart(factor, *, n=8, width=0.2):
    """Bandwidths of images of three pairs whose medians stand `factor` apart."""
    return [lognormal(0.1 * factor**i, n, width, seed=i) for i in range(3)]


def beside(group, other, seed=9):
    """Stack bandwidths with `other` times them, give or take 5 % an image."""
    scales = [1.0, *np.atleast_1d(other)]
    rng = np.random.default_rng(seed)
    return np.stack([s * group * np.exp(0.05 * rng.standard_normal(len(group))) for s in scales])


def explained(yes):
    """Bandwidths beside a number that tells them, or does not."""
    groups, rng = apart(1, n=40), np.random.default_rng(5)
    return [np.stack([g, 1 / g if yes else rng.permutation(g)]) for g in groups]


MADE_UP = {
    "E4.pair": (bw.between_share, apart(3), apart(1)),
    "E4.domain": (bw.spread, apart(2), apart(1, width=0.1)),
    "E4.model": (bw.median_factor, [beside(lognormal(0.2), 2)], [beside(lognormal(0.2), 1.1)]),
    "E4.seed": (
        bw.log_ratio,
        [beside(lognormal(0.2), [2, 1.15])],
        [beside(lognormal(0.2), [1.5, 1.5])],
    ),
    "E4.closed": (bw.median_factor, [beside(lognormal(0.2), 1.1)], [beside(lognormal(0.2), 2)]),
    "Q4a.order": (
        bw.same_order,
        [beside(g, 2.5) for g in apart(3)],
        [beside(g, s) for g, s in zip(apart(3), (9, 3, 0.5), strict=True)],
    ),
    "Q4b.error": (bw.unexplained, explained(False), explained(True)),
    "Q4b.gaussian": (bw.unexplained, explained(False), explained(True)),
    "Q4c.left": (
        bw.schedule_share,
        [beside(lognormal(0.2), [1.05, 2])],
        [beside(lognormal(0.2), [2, 2.1])],
    ),
}


@pytest.mark.parametrize("criterion", MADE_UP)
@pytest.mark.parametrize("side", ["supported", "not supported"])
def test_the_statistics_support_and_refute(criterion, side):
    statistic, for_it, against = MADE_UP[criterion]
    groups = for_it if side == "supported" else against
    found = bw.resample(statistic, groups, rng=np.random.default_rng(0))
    options = {"n": 24, "seeds": [0], "controls": {}, "scale": "book"}
    assert judge(criterion, value=found.value, ci=found[1:], **options).verdict == side


@pytest.mark.parametrize(("width", "side"), [(0.15, "supported"), (0.6, "not supported")])
def test_significance_is_supported_and_refuted(width, side):
    value = bw.null_factor(lognormal(0.2, 8, width), rng=np.random.default_rng(0))
    options = {"n": 8, "seeds": [0], "controls": {}, "scale": "book"}
    assert judge("Q4a.interval", value=value, **options).verdict == side


def test_every_criterion_of_the_chapter_has_a_made_up_case():
    own = [c for c in load_claims().values() if c.chapter == "12" and c.status == "tested"]
    assert {k.id for c in own for k in c.criteria} == {*MADE_UP, "Q4a.interval"}


def test_the_less_favourable_bar_counts():
    low, high = Interval(0.2, 0.1, 0.9), Interval(0.6, 0.5, 0.7)
    assert bw.less_favourable("E4.pair", [high, low]) == low
    assert bw.less_favourable("E4.closed", [low, high]) == high
    with pytest.raises(ValueError, match="write it there first"):
        bw.less_favourable("E4.new", [low])


def test_the_bars_are_those_of_the_claims():
    note = load_claims()["E4"].note
    assert all(f"{bar:g} dB" in note for bar in bw.BARS)
    assert load_claims()["E1"].criteria[0].threshold == bw.BARS[0]


def test_a_law_of_a_domain_is_fitted_on_two_sets():
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(300, *SHAPE, generator=rng)
    law = bw.fitted_law(images[:20], images[20:])
    assert law.residual == pytest.approx(1, rel=0.1)
    assert law.eigenvalues.mean().item() == pytest.approx(1, rel=0.15)


def test_levels_of_a_schedule_that_starts_later_are_refused():
    early = NoiseSchedule(np.array([0.99, 0.5, 0.1]))
    with pytest.raises(ValueError, match="use levels inside both"):
        bw.same_levels(NoiseSchedule(np.array([0.9, 0.5, 0.1])), early, np.array([0, 2]))
