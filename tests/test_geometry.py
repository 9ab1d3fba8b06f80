"""Distances and angles against brute force, closed forms, scipy and their own coverage."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.special import gammaln
from scipy.stats import norm

from ood_lib.geometry import (
    RELEASED,
    RULES,
    Acceptance,
    ClosedForm,
    Targets,
    accept,
    measure,
    slerp,
    vertex_angles,
)

NAMES = ("norm", "distance", "origin_cos", "vertex_cos", "effective_rank")


def sample(n, d, seed=0, offset=0.0):
    return offset + np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.1, 3, d)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def brute_vertex_cos(z):
    triples = permutations(range(len(z)), 3)
    return np.mean([cosine(z[i] - z[j], z[k] - z[j]) for i, j, k in triples])


# --------------------------------------------------------------------- measure, value by value


def test_means_are_those_of_brute_force():
    z = sample(9, 30, offset=1.0)
    found = measure(z)
    assert found.norm.value == pytest.approx(np.linalg.norm(z, axis=1).mean())
    assert found.distance.value == pytest.approx(pdist(z).mean())
    assert found.origin_cos.value == pytest.approx(1 - pdist(z, "cosine").mean())
    assert found.vertex_cos.value == pytest.approx(brute_vertex_cos(z))
    assert (found.norm.n, found.norm.d) == (9, 30)


def test_the_vertex_interval_is_the_jackknife_of_brute_force():
    z = sample(8, 20)
    left_out = [brute_vertex_cos(np.delete(z, k, 0)) for k in range(8)]
    spread = np.sqrt(7 * np.var(left_out))
    found = measure(z).vertex_cos
    assert (found.high - found.low) / 2 == pytest.approx(2.364624 * spread, rel=1e-6)


def test_the_variance_of_a_mean_over_pairs_is_that_of_all_distinct_quadruples():
    z = sample(7, 12)
    distances = cdist(z, z)
    quadruples = np.array(list(permutations(range(7), 4))).T
    squared_mean = (
        distances[quadruples[0], quadruples[1]] * distances[quadruples[2], quadruples[3]]
    ).mean()
    variance = pdist(z).mean() ** 2 - squared_mean
    found = measure(z).distance
    assert (found.high - found.low) / 2 == pytest.approx(2.446912 * np.sqrt(variance), rel=1e-5)


def test_moments_are_u_statistics_over_distinct_samples():
    z = sample(7, 5, offset=0.5)
    i, j, k, m = np.array(list(permutations(range(7), 4))).T
    products = np.einsum("ab,ab->a", z[i] - z[j], z[k] - z[m])
    squares = np.square(z[i] - z[j]).sum(1) * np.square(z[k] - z[m]).sum(1)
    found = measure(z)
    assert found.moments.trace_square == pytest.approx(np.square(products).mean() / 4)
    assert found.moments.trace == pytest.approx(z.var(axis=0, ddof=1).sum())
    assert found.moments.mean_square == pytest.approx(np.einsum("ab,ab->a", z[i], z[j]).mean())
    assert found.effective_rank.value == pytest.approx(squares.mean() / np.square(products).mean())


def test_moments_are_unbiased():
    rng, variances, mean = np.random.default_rng(0), np.linspace(0.2, 2, 12), 0.3
    found = np.array(
        [
            (m.mean_square, m.trace, m.trace_square)
            for m in (
                measure(mean + rng.normal(size=(6, 12)) * np.sqrt(variances)).moments
                for _ in range(1500)
            )
        ]
    )
    truth = [12 * mean**2, variances.sum(), np.square(variances).sum()]
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - truth) < 3.5 * error).all()


def test_a_gaussian_has_the_expected_values():
    law = ClosedForm.isotropic(0.975, 12.0, 20_000)
    z = 12 / np.sqrt(20_000) + 0.975 * np.random.default_rng(0).normal(size=(60, 20_000))
    found = measure(z)
    for name in ("norm", "distance", "origin_cos", "vertex_cos"):
        one = getattr(found, name)
        assert one.value == pytest.approx(getattr(law, name), rel=0.03)
        assert one.value == pytest.approx(one.expected, rel=1e-3)
    assert found.effective_rank.expected is None


def test_degrees_turn_a_cosine_and_its_interval():
    one = measure(sample(20, 300, offset=1.0)).origin_cos
    turned = one.degrees()
    assert turned.low < turned.value < turned.high
    assert np.cos(np.radians(turned.low)) == pytest.approx(one.high)


def test_a_mean_distance_is_that_of_the_chi_law():
    z = np.random.default_rng(0).normal(size=(400, 20))
    exact = 2 * np.exp(gammaln(10.5) - gammaln(10))
    found = measure(z).distance
    assert found.low < exact < found.high


@pytest.mark.parametrize("block", [1, 7, 8192])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_neither_blocks_nor_types_change_anything(block, dtype):
    z = (10 * sample(6, 40)).astype(dtype)
    plain, other = measure(z.astype(float)), measure(z, block=block)
    for name in NAMES:
        assert getattr(other, name).value == pytest.approx(getattr(plain, name).value, rel=1e-9)


def test_a_large_mean_costs_no_digits():
    z = sample(12, 300)
    near, far = measure(z), measure(z + 1e6)
    for name in ("distance", "vertex_cos", "effective_rank"):
        assert getattr(far, name).value == pytest.approx(getattr(near, name).value, rel=1e-7)
        assert getattr(far, name).high == pytest.approx(getattr(near, name).high, rel=1e-6)


def test_memory_is_a_block_and_the_gram_matrix():
    z = np.random.default_rng(0).normal(size=(40, 200_000)).astype(np.float32)
    tracemalloc.start()
    measure(z, block=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


# --------------------------------------------------------------------- intervals


def spectrum_of(kind, d):
    lam = np.ones(d) if kind == "isotropic" else np.arange(1, d + 1) ** -0.7
    return lam * d / lam.sum()


def coverage(kind, mean, *, n=100, d=300, repeats=500):
    """Share of intervals that hold the truth; the truth is exact, or from 120 times as many samples."""
    lam, rng = spectrum_of(kind, d), np.random.default_rng(1)
    draw = lambda n: mean + rng.standard_normal((n, d)) * np.sqrt(lam)  # noqa: E731
    large = [measure(draw(1000)) for _ in range(12)]
    truth = {name: np.mean([getattr(g, name).value for g in large]) for name in NAMES}
    truth["effective_rank"] = lam.sum() ** 2 / np.square(lam).sum()
    found = [measure(draw(n)) for _ in range(repeats)]
    held = lambda one, name: one.low <= truth[name] <= one.high  # noqa: E731
    return {name: np.mean([held(getattr(g, name), name) for g in found]) for name in NAMES}


@pytest.mark.parametrize(
    ("kind", "mean"), [("isotropic", 0.0), ("isotropic", 0.2), ("spiked", 0.5)]
)
def test_intervals_cover_what_they_promise(kind, mean):
    shares = coverage(kind, mean)
    assert all(0.90 <= share <= 0.98 for share in shares.values()), shares


def test_a_zero_mean_with_few_directions_is_covered_too_often_not_too_seldom():
    assert coverage("spiked", 0.0)["origin_cos"] >= 0.95


def test_pairs_taken_as_independent_would_not_cover():
    rng, held = np.random.default_rng(0), 0
    for _ in range(100):
        distances = pdist(rng.normal(size=(100, 300)))
        half = 1.96 * distances.std() / np.sqrt(len(distances))
        held += abs(distances.mean() - np.sqrt(600) * (1 - 1 / 1200)) < half
    assert held < 60


# --------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("kind", ["isotropic", "spiked"])
def test_spreads_of_single_values_are_the_closed_ones(kind):
    d, rng = 3000, np.random.default_rng(0)
    lam, mean = spectrum_of(kind, d), np.full(d, 0.2)
    draw = lambda n: mean + rng.standard_normal((n, d)) * np.sqrt(lam)  # noqa: E731
    law = ClosedForm(mean @ mean, lam.sum(), lam @ lam, d, mean @ (lam * mean))
    assert pdist(draw(300)).std() == pytest.approx(np.sqrt(lam @ lam / lam.sum()), rel=0.05)
    for k in (1, 10):
        means = rule_means(draw(3000), draw(600), rng, k)
        np.testing.assert_allclose(means.std(axis=0), law.rule_spread(k), rtol=0.08)


def rule_means(candidates, references, rng, n_references=10):
    rules = Targets(1, 90, 60, 1, 1, 1, d=candidates.shape[1])
    return accept(candidates, references, rules, n_references=n_references, rng=rng).means


def test_the_vertex_cosine_falls_short_of_one_half_by_the_effective_rank():
    lam = spectrum_of("spiked", 300)
    z = np.random.default_rng(0).normal(size=(1000, 300)) * np.sqrt(lam)
    law = ClosedForm(0, lam.sum(), lam @ lam, 300)
    assert 0.5 - measure(z).vertex_cos.value == pytest.approx(0.5 - law.vertex_cos, rel=0.1)


@pytest.mark.parametrize("d", [1, 2, 50])
def test_the_mean_angle_of_all_triangles_is_sixty_degrees_for_any_samples(d):
    z = np.random.default_rng(0).standard_cauchy(size=(12, d))
    angles = vertex_angles(z)
    assert angles.shape == (12, 55)
    assert angles.mean() == pytest.approx(60, abs=1e-6)


def test_vertex_angles_are_those_of_brute_force():
    z = sample(5, 4, offset=3.0)
    found = vertex_angles(z)[1]
    others = [(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)]
    exact = [np.degrees(np.arccos(cosine(z[i] - z[1], z[k] - z[1]))) for i, k in others]
    np.testing.assert_allclose(found, exact)


@pytest.mark.parametrize(
    ("name", "sigma", "mean_norm"), [("CODE-F", 0.9750, 82.21), ("CODE-V1", 0.9202, 0.0)]
)
def test_the_fitting_law_gives_the_released_targets_back(name, sigma, mean_norm):
    targets = RELEASED[name]
    law = ClosedForm.fitting(targets)
    assert (law.distance, law.origin_angle) == pytest.approx(targets.centres[:2])
    assert law.sigma == pytest.approx(sigma, abs=1e-4)
    assert np.sqrt(law.mean_square) == pytest.approx(mean_norm, abs=0.01)


# --------------------------------------------------------------------- the rules


def isotropic(law, n, rng, mean=None):
    mean = np.full(law.d, np.sqrt(law.mean_square / law.d)) if mean is None else mean
    return mean + law.sigma * rng.standard_normal((n, law.d))


@pytest.fixture(scope="module")
def small():
    """The released rules for 32x32 colour images, their law and 200 latents of it."""
    targets = RELEASED["CODE-F"].scaled(3072)
    law = ClosedForm.fitting(targets)
    return targets, law, isotropic(law, 200, np.random.default_rng(0))


def test_fresh_draws_pass_as_the_closed_form_says(small):
    targets, law, references = small
    rng = np.random.default_rng(1)
    found = accept(isotropic(law, 2000, rng), references, targets, rng=rng)
    np.testing.assert_allclose(found.passed.mean(axis=0), law.pass_rates(targets), atol=0.04)
    assert 0.3 < found.rate < 0.45
    np.testing.assert_array_equal(found.accepted, found.passed.all(axis=1))
    assert len(RULES) == found.means.shape[1]


def test_noise_of_another_variance_is_rejected(small):
    targets, _, references = small
    rng = np.random.default_rng(1)
    assert accept(rng.normal(size=(500, 3072)), references, targets, rng=rng).rate <= 0.01


def test_the_three_means_are_those_of_brute_force():
    references, z = sample(6, 10, offset=0.3), sample(3, 10, seed=1)
    means = rule_means(z, references, np.random.default_rng(5), 4)
    chosen = np.random.default_rng(5).integers(6, size=(3, 4))
    for row, i, found in zip(z, chosen, means, strict=True):
        a, b = references[i], references[(i + 1) % 6]
        angles = [(cosine(row, x), cosine(x - row, y - row)) for x, y in zip(a, b, strict=True)]
        exact = [cdist([row], a).mean(), *np.degrees(np.arccos(angles)).mean(axis=0)]
        np.testing.assert_allclose(found, exact)


def test_a_reference_is_not_compared_with_itself():
    z = sample(3, 50)
    rules = Targets(1, 90, 60, 1, 1, 1, d=50)
    rng = np.random.default_rng(0)
    means = accept(z, z, rules, own=np.arange(3), n_references=50, rng=rng).means
    distances = cdist(z, z)
    assert (means[:, 0] > [np.delete(row, i).min() for i, row in enumerate(distances)]).all()
    np.testing.assert_allclose(means[:, 2].sum(), 180)


def test_a_copy_of_a_reference_has_no_vertex_angle_and_fails():
    z = sample(4, 50)
    rules = Targets(10, 90, 60, 1e3, 180, 180, d=50)
    found = accept(z[:1], z, rules, n_references=100, rng=np.random.default_rng(0))
    assert np.isnan(found.means[0, 2])
    assert found.passed.tolist() == [[True, True, False]]


def test_rules_from_references_let_their_own_domain_pass_and_no_other():
    rng = np.random.default_rng(0)
    draw = lambda n: 0.1 + rng.standard_normal((n, 2000))  # noqa: E731
    references = draw(150)
    rules = Targets.from_reference(references, rng=rng)
    law = ClosedForm.isotropic(1, 0.1 * np.sqrt(2000), 2000)
    np.testing.assert_allclose(rules.tolerances / 2, law.rule_spread(), rtol=0.25)
    inside = accept(draw(500), references, rules, rng=rng).passed.mean(axis=0)
    assert (np.abs(inside - 0.954) < 0.05).all()
    assert accept(1.2 * draw(100), references, rules, rng=rng).rate == 0


def test_targets_scale_there_and_back():
    there = RELEASED["CODE-F"].scaled(3072)
    assert (there.origin_tolerance, there.distance_tolerance) == pytest.approx((0.8, 0.3))
    assert RELEASED["CODE-F"].scaled(3072, tolerances=False).origin_tolerance == 0.1
    back = there.scaled(196_608)
    np.testing.assert_allclose(back.centres, RELEASED["CODE-F"].centres)
    np.testing.assert_allclose(back.tolerances, RELEASED["CODE-F"].tolerances)


def test_the_rate_is_the_share_that_passes_all():
    passed = np.array([[True] * 3, [True, True, False], [False] * 3, [True] * 3])
    assert Acceptance(np.zeros((4, 3)), passed).rate == 0.5


# --------------------------------------------------------------------- spherical paths


def test_slerp_keeps_the_ends_the_angle_and_the_norms():
    a, b = sample(3, 40), sample(3, 40, seed=1)
    path = slerp(a, b, [0, 0.25, 1])
    np.testing.assert_allclose(path[:, 0], a, atol=1e-12)
    np.testing.assert_allclose(path[:, 2], b, atol=1e-12)
    lengths = [np.linalg.norm(x, axis=1) for x in (a, path[:, 1], b)]
    np.testing.assert_allclose(lengths[1], 0.75 * lengths[0] + 0.25 * lengths[2])
    turn = [np.arccos([cosine(x, y) for x, y in zip(a, c, strict=True)]) for c in (path[:, 1], b)]
    np.testing.assert_allclose(turn[0], turn[1] / 4)


def test_slerp_overshoots_a_shared_mean_unless_it_is_the_centre():
    rng, mean = np.random.default_rng(0), np.full(4000, 0.5)
    a, b = (mean + rng.standard_normal((200, 4000)) for _ in range(2))
    angle = np.radians(measure(a).origin_cos.degrees().value)
    for share in (0.1, 0.5):
        factor = np.cos((0.5 - share) * angle) / np.cos(angle / 2)
        assert slerp(a, b, [share]).mean() == pytest.approx(0.5 * factor, rel=5e-3)
        assert slerp(a, b, [share], centre=mean).mean() == pytest.approx(0.5, rel=5e-3)


def test_slerp_between_equal_ends_stays_there_and_keeps_the_type():
    a = sample(2, 5).astype(np.float32)
    path = slerp(a, a, [0.3])
    assert path.dtype == np.float32
    np.testing.assert_allclose(path[:, 0], a, rtol=1e-6)


# --------------------------------------------------------------------- bad input


def nan(shape):
    z = sample(*shape)
    z[1, 2] = np.nan
    return z


RNG = np.random.default_rng(0)
UNIT = Targets(1, 90, 60, 1, 1, 1, d=3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: measure(sample(1, 9)), r"\(1, 9\); .* n >= 4"),
        (lambda: measure(sample(2, 9)), r"\(2, 9\); .* n >= 4"),
        (lambda: measure(np.ones(3)), r"\(3,\)"),
        (lambda: measure(nan((5, 9))), "NaN"),
        (lambda: measure(sample(5, 9)[[0, 1, 2, 3, 1]]), r"samples 1 and 4 are equal \(1 such"),
        (lambda: measure(np.ones((5, 9))), r"10 such pairs"),
        (lambda: measure(np.vstack([np.zeros(9), sample(5, 9)])), "zero everywhere"),
        (lambda: measure(sample(5, 9), block=0), "block is 0"),
        (lambda: vertex_angles(sample(2, 9)), "3 samples, not 2"),
        (lambda: vertex_angles(sample(3, 9)[[0, 1, 0]]), "0 and 2 are equal"),
        (lambda: accept(sample(2, 4), sample(5, 4), UNIT, rng=RNG), r"\(2, 4\).* d = 3"),
        (lambda: accept(sample(2, 3), sample(5, 4), UNIT, rng=RNG), r"\(2, 3\) and \(5, 4\)"),
        (lambda: accept(sample(2, 3), sample(1, 3), UNIT, rng=RNG), "from 1 references"),
        (lambda: accept(nan((2, 3)), sample(5, 3), UNIT, rng=RNG), "NaN"),
        (lambda: accept(sample(2, 3), sample(5, 3), UNIT, n_references=0, rng=RNG), "0 draws"),
        (lambda: accept(np.zeros((1, 3)), sample(5, 3), UNIT, rng=RNG), "zero everywhere"),
        (lambda: accept(sample(2, 3), sample(5, 3), UNIT, own=np.array([0]), rng=RNG), "own"),
        (lambda: accept(sample(1, 3), sample(5, 3), UNIT, own=np.array([5]), rng=RNG), "own"),
        (lambda: Targets(1, 90, 60, 1, 0, 1, d=3), "tolerances above 0"),
        (lambda: Targets(np.nan, 90, 60, 1, 1, 1, d=3), "finite"),
        (lambda: Targets.from_reference(sample(2, 3), rng=RNG), "from 1 references"),
        (lambda: slerp(sample(2, 3), sample(3, 3), [0.5]), r"\(2, 3\) and \(3, 3\)"),
        (lambda: slerp(sample(2, 3), sample(2, 3), [1.5]), "shares"),
        (lambda: slerp(sample(2, 3), -sample(2, 3), [0.5]), "opposite"),
        (lambda: slerp(np.zeros((2, 3)), sample(2, 3), [0.5]), "centre"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_constant_coordinates_and_more_samples_than_coordinates_are_no_trouble():
    z = sample(30, 6, offset=1.0)
    z[:, 2] = 4.0
    found = measure(z)
    assert 1 <= found.effective_rank.value <= 6
    assert found.vertex_cos.value < 0.5


def test_one_coordinate_has_only_flat_triangles():
    found = measure(np.random.default_rng(0).normal(size=(500, 1)))
    assert found.effective_rank.low < 1 < found.effective_rank.high
    assert found.vertex_cos.value == pytest.approx(1 / 3)
    assert found.vertex_cos.low == pytest.approx(found.vertex_cos.high)


def test_pass_rates_are_normal_shares():
    law = ClosedForm.isotropic(1.0, 0.0, 1000)
    rules = Targets(law.distance, 90, 60, law.rule_spread()[0], 100, 100, d=1000)
    np.testing.assert_allclose(law.pass_rates(rules), [norm.cdf(1) - norm.cdf(-1), 1, 1])
