"""Laws of latents, finite steps and bandwidth in closed form: against dense algebra and the walks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import kstest, zscore

from ood_lib import bandwidth as bw
from ood_lib.analytic import (
    GaussianLaw,
    analytic_model,
    eta_mse,
    eta_response,
    euler_gain,
    exact_latent,
    forward_law,
    latent_law,
    rms_size,
    wasserstein,
)
from ood_lib.inversion import generate, invert
from ood_lib.metrics import Interval
from ood_lib.results import judge, load_claims
from ood_lib.schedule import NoiseSchedule, paper_grid, uniform_log_sigma

LAM = np.array([0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0])


def random_law(seed, *, dim=7, rank=3, residual=0.05):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, rank)))[0]
    parts = rng.standard_normal(dim), basis, rng.uniform(0.1, 2, rank)
    return GaussianLaw(*(torch.from_numpy(x) for x in parts), residual)


def covariance(law):
    u, rest = law.basis.numpy(), law.residual * np.eye(law.dim)
    return u @ np.diag(law.eigenvalues.numpy() - law.residual) @ u.T + rest


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


# ------------------------------------------------------------------------------- laws of the latents


@pytest.mark.parametrize("rank", [2, 5, 7])
@pytest.mark.parametrize("residual", [0.0, 0.2])
@pytest.mark.parametrize(("t_start", "t_end"), [(0, 500), (40, 900.5)])
def test_the_law_of_latents_is_the_dense_one(schedule, rank, residual, t_start, t_end):
    law, data = random_law(0), random_law(1, rank=rank, residual=residual)
    found = latent_law(law, data, schedule, t_start=t_start, t_end=t_end)
    (s0, s1), (a0, a1) = schedule.sigma([t_start, t_end]), schedule.alpha_bar_at([t_start, t_end])
    wide, narrow = (covariance(law) + s**2 * np.eye(7) for s in (s1, s0))
    a = np.sqrt(a1 / a0) * root(wide) @ np.linalg.inv(root(narrow))
    np.testing.assert_allclose(covariance(found), a @ covariance(data) @ a.T, rtol=1e-9, atol=1e-9)
    own, other = law.mean.numpy(), data.mean.numpy()
    expected = np.sqrt(a1) * own + a @ (other - np.sqrt(a0) * own)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-9)
    assert found.eigenvalues.min() >= 0


def test_the_law_of_latents_is_that_of_inverted_draws(schedule):
    law, data = random_law(0), random_law(1)
    draws = data.sample(40_000, torch.Generator().manual_seed(0)).view(-1, 1, 1, 7)
    fitted = GaussianLaw.fit(exact_latent(law, schedule, draws, t_end=500).flatten(1))
    exact = latent_law(law, data, schedule, t_end=500)
    assert wasserstein(fitted, exact) < 0.02 * rms_size(exact)


@pytest.mark.parametrize("t", [100, 500, 999])
def test_own_images_with_the_noise_of_level_0_have_the_law_of_added_noise(schedule, t):
    law = random_law(0)
    found = latent_law(law, forward_law(law, schedule, 0), schedule, t_end=t)
    expected = forward_law(law, schedule, t)
    share = schedule.alpha_bar_at(t)
    np.testing.assert_allclose(
        covariance(expected), share * covariance(law) + (1 - share) * np.eye(7), atol=1e-12
    )
    assert wasserstein(found, expected) < 1e-6
    assert wasserstein(expected, forward_law(law, schedule, 0)) > 0.01


def test_the_law_of_latents_needs_levels_of_the_schedule(schedule):
    with pytest.raises(ValueError, match=r"must lie in \[0, 999\]"):
        latent_law(random_law(0), random_law(1), schedule, t_end=1_000)


def test_many_dimensions_cost_what_the_ranks_cost(schedule):
    """At d = 200,000 a covariance would hold 320 GB."""
    law, data = (random_law(s, dim=200_000, rank=4) for s in (0, 1))
    found = latent_law(law, data, schedule, t_end=900)
    assert found.basis.shape == (200_000, 8)
    assert 0 < wasserstein(found, forward_law(data, schedule, 900)) < rms_size(found)


@pytest.mark.parametrize("t_end", [500, 900])
def test_a_projection_of_the_latents_is_one_of_the_images(schedule, t_end):
    """The direction that reads an axis of the images in their latents, for any images."""
    law, rng = random_law(0), np.random.default_rng(2)
    images, axis = (torch.from_numpy(rng.uniform(-1, 1, (n, 7))) for n in (50, 1))
    latents = exact_latent(law, schedule, images.view(-1, 1, 1, 7), t_end=t_end).flatten(1)
    direction = law.flow(law.mean + axis, *schedule.sigma([t_end, 0]).tolist())[0] - law.mean
    shares = zscore(latents @ direction), zscore(images @ axis[0])
    np.testing.assert_allclose(*shares, atol=1e-9)


# ---------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("ranks", [(3, 3), (2, 7), (6, 5)])
@pytest.mark.parametrize("residuals", [(0.05, 0.3), (0.0, 0.3), (0.0, 0.0)])
def test_the_distance_is_the_dense_formula(ranks, residuals):
    a, b = (
        random_law(s, rank=r, residual=x)
        for s, (r, x) in enumerate(zip(ranks, residuals, strict=True))
    )
    half = root(covariance(a))
    cross = root(half @ covariance(b) @ half)
    square = (a.mean - b.mean).square().sum().item()
    square += np.trace(covariance(a) + covariance(b) - 2 * cross)
    assert wasserstein(a, b) == pytest.approx(np.sqrt(square), rel=1e-6)
    assert wasserstein(b, a) == pytest.approx(wasserstein(a, b), rel=1e-9)


def test_the_distance_agrees_with_scipys_matrix_root():
    a, b = random_law(0), random_law(1)
    cross = np.trace(np.real(sqrtm(covariance(a) @ covariance(b))))
    square = np.trace(covariance(a) + covariance(b)) - 2 * cross
    square += float((a.mean - b.mean).square().sum())
    assert wasserstein(a, b) == pytest.approx(np.sqrt(square), rel=1e-8)


@settings(deadline=None, max_examples=25)
@given(*[st.integers(0, 1_000)] * 3)
def test_the_distance_is_a_metric_that_pairings_bound(i, j, k):
    a, b, c = (random_law(s) for s in (i, j, k))
    assert wasserstein(a, a) < 1e-6
    assert wasserstein(a, c) <= wasserstein(a, b) + wasserstein(b, c) + 1e-6
    z = torch.randn(500, 7, generator=torch.Generator().manual_seed(i)).double()
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T, correction=0)).T)
    paired = [x.mean + z @ torch.from_numpy(root(covariance(x))) for x in (a, b)]
    assert wasserstein(a, b) <= (paired[0] - paired[1]).square().sum(1).mean().sqrt() + 1e-6


def test_a_shift_is_as_far_as_it_is_long_and_size_is_the_distance_to_nothing():
    a = random_law(0)
    moved = GaussianLaw(a.mean + 3, a.basis, a.eigenvalues, a.residual)
    assert wasserstein(a, moved) == pytest.approx(3 * np.sqrt(7))
    point = GaussianLaw(torch.zeros(7).double(), a.basis, 0 * a.eigenvalues)
    assert wasserstein(a, point) == pytest.approx(rms_size(a))


def test_laws_of_different_dimension_are_refused(schedule):
    pair = random_law(0), random_law(0, dim=8)
    with pytest.raises(ValueError, match="7 and 8 dimensions"):
        wasserstein(*pair)
    with pytest.raises(ValueError, match="7 and 8 dimensions"):
        latent_law(*pair, schedule)


# ---------------------------------------------------------------------------------- finite steps

AXES = GaussianLaw(torch.zeros(6).double(), torch.eye(6).double(), torch.from_numpy(LAM))


@pytest.mark.parametrize(
    "options", [{}, {"t_end": 500, "points": 40}, {"timesteps": np.array([2.5, 9, 33.3, 800])}]
)
def test_the_gain_is_that_of_the_loop_in_both_directions(schedule, options):
    model, x = analytic_model(AXES, schedule), torch.full((1, 1, 1, 6), 0.5).double()
    there = invert(model, x, preset="paper", **options)
    back = generate(model, there.latent, preset="paper", end="level0", **options).images
    grid = there.timesteps
    exact = exact_latent(AXES, schedule, x, t_start=grid[0], t_end=grid[-1])
    gain = euler_gain(LAM, schedule, timesteps=grid)
    np.testing.assert_allclose((there.latent / exact).ravel(), gain, rtol=1e-10)
    np.testing.assert_allclose((back / x).ravel(), gain**2, rtol=1e-10)


def test_the_gain_is_that_of_the_way_back_without_noise(schedule):
    grid = paper_grid(500, 40)
    back = eta_response(LAM, schedule, eta=0, timesteps=grid).factor
    np.testing.assert_allclose(euler_gain(LAM, schedule, timesteps=grid), back, rtol=1e-10)


def test_the_figures_of_the_papers_loop(schedule):
    gain = euler_gain(LAM[1:], schedule, timesteps=paper_grid())
    np.testing.assert_allclose(gain, [0.828, 0.741, 0.876, 0.954, 0.979], atol=6e-4)
    np.testing.assert_allclose(gain**2, [0.686, 0.548, 0.767, 0.911, 0.959], atol=6e-4)


def test_more_steps_keep_more_and_a_known_image_loses_nothing(schedule):
    coarse, fine = (uniform_log_sigma(schedule, n, t_end=900) for n in (80, 159))
    lost = [1 - euler_gain(LAM, schedule, timesteps=g) for g in (coarse, fine)]
    assert lost[0][0] == lost[1][0] == 0  # variance 0: the network tells the noise exactly
    np.testing.assert_allclose(lost[1][1:], lost[0][1:] / 2, rtol=0.05)  # first order


def test_a_negative_variance_or_a_falling_grid_has_no_gain(schedule):
    with pytest.raises(ValueError, match="smallest variance is -1"):
        euler_gain([-1.0, 1.0], schedule, timesteps=paper_grid())
    with pytest.raises(ValueError, match="put lower levels first"):
        euler_gain([1.0], schedule, timesteps=np.array([500, 0]))


# ------------------------------------------------------------------- the error at a small share of noise


def leading_terms(schedule, t0):
    ends = [LAM + schedule.sigma(t) ** 2 for t in (0, t0)]
    return ends[0], np.log(ends[1] / ends[0])


@pytest.mark.parametrize("t0", [500, 900])
def test_the_error_of_little_noise_knows_no_image(schedule, t0):
    v, length = leading_terms(schedule, t0)
    images = torch.tensor([[0.0] * 6, [0.9] * 6]).double().view(2, 1, 1, 6)
    errors = eta_mse(AXES, images, schedule, eta=1e-4, t0=t0).numpy() / 1e-8
    np.testing.assert_allclose(errors, schedule.alpha_bar[0] * np.mean(v * length), rtol=1e-4)


def test_the_next_term_is_what_the_image_adds(schedule):
    v, length = leading_terms(schedule, 500)
    y = np.random.default_rng(0).uniform(-1, 1, 6)
    image = np.sqrt(schedule.alpha_bar[0]) * torch.from_numpy(y).view(1, 1, 1, 6)
    eta = 0.05
    error = eta_mse(AXES, image, schedule, eta=eta, t0=500).item() / schedule.alpha_bar[0]
    first = eta**2 * np.mean(v * length)
    second = eta**4 / 4 * np.mean(length**2 * (y**2 - 2 * v))
    assert error - first == pytest.approx(second, rel=0.03)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1))
def test_an_image_of_the_expected_size_errs_less_than_the_leading_term(eta):
    schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    v, length = leading_terms(schedule, 500)
    image = torch.from_numpy(np.sqrt(schedule.alpha_bar[0] * v)).view(1, 1, 1, 6)
    error = eta_mse(AXES, image, schedule, eta=eta, t0=500).item()
    assert error <= eta**2 * np.mean(v * length) + 1e-12


# --------------------------------------------------------- verdicts: one that supports, one against

CHAPTERS = ("02", "05")


def verdict(criterion, value, ci=None):
    return judge(criterion, value=value, ci=ci, n=100, seeds=[0], controls={}, scale="book").verdict


def distance_to_normal(clusters):
    """Kolmogorov distance with its interval, of a normal or of two clusters."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000) + clusters * 5 * rng.choice([-1, 1], 10_000)
    found, room = kstest(zscore(values), "norm").statistic, np.sqrt(np.log(40) / 20_000)
    return found, (max(0.0, found - room), found + room)


@pytest.mark.parametrize("criterion", ["T2.gaussian", "T2.any"])
@pytest.mark.parametrize(("clusters", "side"), [(0, "supported"), (1, "not supported")])
def test_a_normal_supports_and_clusters_refute(criterion, clusters, side):
    value, ci = distance_to_normal(clusters)
    assert verdict(criterion, value, ci) == side


def test_latents_support_the_lemma_for_own_images_and_refute_it_for_others(schedule):
    law = random_law(0)
    for data, side in (
        (forward_law(law, schedule, 0), "supported"),
        (random_law(1), "not supported"),
    ):
        found = latent_law(law, data, schedule, t_end=900)
        value = wasserstein(found, forward_law(data, schedule, 900)) / rms_size(found)
        assert verdict("T2.lemma", value) == side


def test_equal_models_support_independence_of_parameters_and_others_refute_it(schedule):
    first, data = random_law(0), random_law(1)
    for other, side in ((random_law(0), "supported"), (random_law(2), "not supported")):
        a, b = (latent_law(law, data, schedule, t_end=900) for law in (first, other))
        assert verdict("T2.parameters", wasserstein(a, b) / rms_size(a)) == side


@pytest.mark.parametrize(("points", "side"), [(901, "supported"), (80, "not supported")])
def test_every_level_supports_the_loop_and_few_levels_refute_it(schedule, points, side):
    gain = euler_gain(LAM[1:], schedule, timesteps=paper_grid(900, points))
    assert verdict("T2.loop", gain.min()) == side


@pytest.mark.parametrize(("points", "side"), [(1001, "supported"), (21, "not supported")])
def test_walks_of_many_steps_support_the_closed_form_and_of_few_refute_it(schedule, points, side):
    grid = uniform_log_sigma(schedule, points, t_end=500)
    walked = eta_response(LAM, schedule, eta=0.3, timesteps=grid).factor
    gap = np.abs(walked - eta_response(LAM, schedule, eta=0.3, t0=500).factor).max()
    assert verdict("T4.closed", gap, (gap, gap + 0.005)) == side


def bandwidths(factor):
    rng = np.random.default_rng(0)
    first = 0.2 * np.exp(0.1 * rng.standard_normal(32))
    return first, factor * first * np.exp(0.02 * rng.standard_normal(32))


@pytest.mark.parametrize("criterion", ["T4.level", "T4.bar", "T4.steps", "T4.domain"])
@pytest.mark.parametrize("factor", [1.1, 2.5])
def test_equal_bandwidths_and_different_ones_fall_on_opposite_sides(criterion, factor):
    rng, groups = np.random.default_rng(1), bandwidths(factor)
    differ = criterion == "T4.domain"
    statistic, groups = (bw.spread, groups) if differ else (bw.median_factor, [np.stack(groups)])
    found = bw.resample(statistic, groups, rng=rng)
    side = "supported" if differ == (factor > 1.5) else "not supported"
    assert verdict(criterion, found.value, found[1:]) == side


@pytest.mark.parametrize(("criterion", "counts"), [("T4.level", 2.0), ("T4.domain", 1.2)])
def test_the_less_favourable_bar_counts(criterion, counts):
    bars = [Interval(x, x, x) for x in (1.2, 2.0)]
    assert bw.less_favourable(criterion, bars).value == counts


def test_every_criterion_of_the_two_chapters_is_listed_and_tested():
    own = [c for c in load_claims().values() if c.chapter in CHAPTERS and c.status == "tested"]
    named = {"gaussian", "any", "lemma", "parameters", "loop"}
    expected = {f"T2.{x}" for x in named}
    expected |= {f"T4.{x}" for x in ("closed", "domain", "level", "bar", "steps")}
    assert {k.id for c in own for k in c.criteria} == expected
