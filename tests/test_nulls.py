"""Statistics from Gram matrices against their definitions, and simulated null laws against real draws."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.spatial.distance import pdist
from scipy.stats import chi2, ks_2samp, kstest, ncx2, rankdata
from sklearn.covariance import oas
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from ood_lib import nulls


def sample(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.3, 3, d) + 5


def gram_of(x):
    y = x - x.mean(0)
    return y @ y.T


# ------------------------------------------------------------------------------------ Gram matrices


@pytest.mark.parametrize("d", [3, 60])
def test_wishart_gram_is_that_of_normal_draws(d):
    rng = np.random.default_rng(0)
    drawn = [nulls.wishart_gram(8, d, rng) for _ in range(400)]
    assert kstest([np.trace(g) for g in drawn], chi2(8 * d).cdf).pvalue > 0.01
    real = [x @ x.T for x in rng.standard_normal((400, 8, d))]
    for of in (lambda g: np.linalg.eigvalsh(g)[-1], lambda g: g[6, 7], lambda g: g[0, 0]):
        assert ks_2samp([of(g) for g in drawn], [of(g) for g in real]).pvalue > 0.01


def test_centring_the_gram_matrix_centres_the_samples():
    x = sample(7, 30)
    np.testing.assert_allclose(nulls.centre(x @ x.T), gram_of(x), atol=1e-9)


def test_short_cut_for_standardised_coordinates_has_the_law_of_the_long_way(monkeypatch):
    rng = np.random.default_rng(1)
    exact = [nulls._draw_families(60, 240, rng) for _ in range(400)]
    monkeypatch.setattr(nulls, "EXACT", 0)
    short = [nulls._draw_families(60, 240, rng) for _ in range(400)]
    for key in exact[0]:
        assert ks_2samp([x[key] for x in exact], [x[key] for x in short]).pvalue > 1e-3, key


def test_eigenvalues_of_the_short_cut_are_those_of_its_matrix(monkeypatch):
    monkeypatch.setattr(nulls, "EXACT", 0)
    seen = []

    def spy(gram, d, eigenvalues=None):
        seen.append((np.linalg.eigvalsh(gram), eigenvalues))
        return {}

    monkeypatch.setattr(nulls, "gram_statistics", spy)
    nulls._draw_families(9, 40, np.random.default_rng(0))
    for found, given in seen:
        np.testing.assert_allclose(given, found, atol=1e-9)


def test_draws_of_a_spectrum_have_it():
    rng = np.random.default_rng(0)
    law = nulls.Spectrum(np.array([30.0, 10.0]), 0.5, 500)
    grams = [nulls.draw_gram(law, 30, rng) for _ in range(200)]
    assert np.mean([np.trace(g) for g in grams]) / 29 == pytest.approx(40 + 249, rel=0.02)
    squares = [nulls._second_moment(np.trace(g), np.square(g).sum(), 30) for g in grams]
    assert np.mean(squares) == pytest.approx(900 + 100 + 498 / 4, rel=0.1)
    assert np.abs(grams[0].sum(0)).max() < 1e-9


def test_spectrum_is_freed_of_its_bias():
    rng = np.random.default_rng(0)
    law = nulls.Spectrum(np.array([400.0, 200.0]), 1.0, 2000)
    found = [nulls.spiked_spectrum(nulls.draw_gram(law, 100, rng), 2000) for _ in range(40)]
    assert all(2 <= len(x.spikes) <= 4 for x in found)  # the edge itself scatters
    leading = np.mean([x.spikes[:2] for x in found], axis=0)
    np.testing.assert_allclose(leading, law.spikes, rtol=0.06)
    assert np.mean([x.rest for x in found]) == pytest.approx(1, abs=0.01)


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("d", [1, 3, 99, 100, 500])
def test_expected_distance_is_an_integral_over_the_noncentral_chi_law(d):
    for far in (0.5 * d, 3.0 * d):
        law = ncx2(d, far)
        low, high = law.ppf([1e-12, 1 - 1e-12])
        exact = quad(lambda x, law=law: np.sqrt(x) * law.pdf(x), low, high, limit=200)[0]
        assert nulls.expected_distance(np.array([far]), d)[0] == pytest.approx(exact, rel=1e-5)


def test_energy_is_the_statistic_of_its_definition():
    x = np.random.default_rng(0).standard_normal((6, 4))
    draws = np.random.default_rng(1).standard_normal((200_000, 4))
    between = np.mean([np.linalg.norm(draws - row, axis=1).mean() for row in x])
    within = np.linalg.norm(draws[::2] - draws[1::2], axis=1).mean()
    direct = 6 * (2 * between - within - 2 * pdist(x).sum() / 36) / within
    assert nulls.known_statistics(x @ x.T, 4)["energy"] == pytest.approx(direct, abs=0.02)


def test_gram_statistics_are_those_of_their_definitions():
    x, (n, d) = sample(9, 40), (9, 40)
    found = nulls.gram_statistics(gram_of(x), d)
    y = x - x.mean(0)
    scale = np.square(y).sum() / (8 * d)
    squares, apart = np.square(y).sum(1) / scale, pdist(x, "sqeuclidean") / scale
    assert found["dispersion"] == pytest.approx(squares.var(ddof=1) / (2 * d))
    assert found["distances"] == pytest.approx(apart.var() / (8 * d))
    cosines = 1 - pdist(y, "cosine")
    assert found["cosines"] == pytest.approx(np.square(cosines).mean() * d)
    leading = PCA().fit(x).explained_variance_[0] * (n - 1)
    assert found["largest_eigenvalue"] == pytest.approx(leading / scale / (8**0.5 + d**0.5) ** 2)
    square = np.full((n, n), np.inf)
    square[np.triu_indices(n, 1)] = apart
    nearest = np.minimum(square, square.T).min(1).mean()
    assert found["nearest_neighbour"] == pytest.approx(nearest / apart.mean())


def test_sphericity_is_one_on_average_only_where_all_variances_are_equal():
    rng = np.random.default_rng(0)
    even, odd = (
        np.mean([nulls.gram_statistics(gram_of(rng.standard_normal((20, 60)) * s), 60)["sphericity"]
                 for _ in range(300)])
        for s in (np.ones(60), np.r_[np.full(6, 3.0), np.ones(54)])
    )  # fmt: skip
    assert even == pytest.approx(1, abs=0.02)
    variances = np.r_[np.full(6, 9.0), np.ones(54)]
    assert odd == pytest.approx(60 * np.square(variances).sum() / variances.sum() ** 2, rel=0.1)


def test_fitted_statistics_see_neither_mean_nor_scale_nor_rotation():
    x = sample(8, 30)
    turned = np.linalg.qr(np.random.default_rng(2).normal(size=(30, 30)))[0]
    moved = 7 * x @ turned - 3
    for of in (lambda g: nulls.gram_statistics(g, 30), lambda g: nulls.free_statistics(g, 30, 2)):
        one, other = of(gram_of(x)), of(gram_of(moved))
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(6, 40), (30, 5), (12, 12)])
def test_shrinkage_is_that_of_scikit_learn(n, d):
    x = sample(n, d)
    assert nulls.oas_shrinkage(gram_of(x), d) == pytest.approx(oas(x)[1], rel=1e-9)


def test_one_coordinate_needs_no_shrinkage_target():
    assert nulls.oas_shrinkage(gram_of(sample(9, 1)), 1) == 1


@pytest.mark.parametrize(("n", "d"), [(10, 30), (20, 6)])
def test_held_out_distances_are_those_of_fits_without_the_rows(n, d):
    x = sample(n, d)
    rho, target = nulls.oas_shrinkage(gram_of(x), d), np.square(x - x.mean(0)).sum() / (n * d)
    distances, products = nulls.held_out_distances(gram_of(x), d)

    def refitted(i, j):
        rest = np.delete(x, [i, j], axis=0)
        y = rest - rest.mean(0)
        shrunk = (1 - rho) * y.T @ y / (n - 1) + rho * target * np.eye(d)
        return (x[i] - rest.mean(0)) @ np.linalg.solve(shrunk, x[j] - rest.mean(0))

    for i, j in ((0, 1), (3, 7), (9, 2)):
        assert distances[i] == pytest.approx(refitted(i, i), rel=1e-8)
        assert products[i, j] == pytest.approx(refitted(i, j), rel=1e-7)


def test_held_out_distances_without_any_covariance_are_plain_ones(monkeypatch):
    monkeypatch.setattr(nulls, "oas_shrinkage", lambda gram, d: 1.0)
    x = sample(7, 20)
    distances, products = nulls.held_out_distances(gram_of(x), 20)
    target = np.square(x - x.mean(0)).sum() / (7 * 20)
    others = np.array([np.delete(x, i, axis=0).mean(0) for i in range(7)])
    np.testing.assert_allclose(distances, np.square(x - others).sum(1) / target, rtol=1e-9)
    assert np.isfinite(products).all()


def test_dispersions_are_one_for_a_gaussian_of_any_covariance():
    rng = np.random.default_rng(0)
    for values in (np.ones(400), 1 / np.arange(1, 401), np.r_[np.full(20, 30.0), np.ones(380)]):
        draws = [
            nulls.free_statistics(gram_of(rng.standard_normal((80, 400)) * values**0.5), 400, 8)
            for _ in range(60)
        ]
        for name in ("dispersion", "residual_dispersion"):
            assert np.mean([x[name] for x in draws]) == pytest.approx(1, abs=0.12), name


def test_split_scores_are_those_of_components_of_the_first_rows():
    x = sample(24, 40)
    fit, test = np.arange(14), np.arange(14, 24)
    found = nulls.split_scores(gram_of(x), fit, test, 3)
    pca = PCA(3, svd_solver="full").fit(x[fit])
    wanted = pca.transform(x[test])[:, ::-1]
    difference = found - found.mean(0), wanted - wanted.mean(0)
    np.testing.assert_allclose(*map(np.abs, difference), rtol=1e-6, atol=1e-9)


def test_mardia_is_that_of_its_definition():
    x = sample(30, 3)
    y = x - x.mean(0)
    products = y @ np.linalg.solve(y.T @ y / 30, y.T)
    found = nulls.mardia(x)
    assert found["skewness"] == pytest.approx((products**3).mean())
    assert found["kurtosis"] == pytest.approx(np.square(np.diag(products)).mean())


def test_energy_of_whitened_samples_sees_no_affine_map():
    x = sample(30, 4)
    moved = x @ np.random.default_rng(1).normal(size=(4, 4)) + 9
    one, other = (nulls.affine_energy(gram_of(z), 4)["energy"] for z in (x, moved))
    assert one == pytest.approx(other, rel=1e-6)
    skewed = np.exp((x - 5) / np.linspace(0.3, 3, 4))
    assert nulls.affine_energy(gram_of(skewed), 4)["energy"] > 2 * one


def test_patch_classifier_tells_a_scale_mixture_from_noise_and_is_an_auroc():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((100, 6, 16))
    mixture = nulls._standardise(noise * rng.choice([0.6, 1.4], (100, 1, 1)))
    assert abs(nulls.patch_auroc(nulls._standardise(noise), rng) - 0.5) < 0.2
    assert nulls.patch_auroc(mixture, rng) > 0.6
    labels, scores = rng.integers(0, 2, 50), rng.normal(size=50)
    ranks = rankdata(scores)[labels == 1]
    ones = labels.sum()
    by_hand = (ranks.mean() - (ones + 1) / 2) / (50 - ones)
    assert by_hand == pytest.approx(roc_auc_score(labels, scores))


# ------------------------------------------------------------------------------------------- tables


def test_pvalues_are_uniform_under_the_null():
    rng = np.random.default_rng(0)
    for tail in ("both", "upper"):
        found = [nulls.pvalue(rng.normal(), rng.normal(size=99), tail=tail) for _ in range(2000)]
        assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.015)
    assert nulls.pvalue(9.0, rng.normal(size=99)) == pytest.approx(0.02)
    assert nulls.pvalue(-9.0, rng.normal(size=99), tail="upper") == 1


def test_tables_are_kept_and_made_anew_the_same(project):
    first = nulls.null_table("gram", 9, 30, draws=50)
    file = project / "runs" / "nulls" / nulls.table_name("gram", 9, 30, draws=50)
    assert file.is_file()
    assert [x.name for x in file.parent.iterdir()] == [file.name]
    again = nulls.null_table("gram", 9, 30, draws=50)
    file.unlink()
    anew = nulls.null_table("gram", 9, 30, draws=50)
    for key, values in first.items():
        np.testing.assert_array_equal(values, again[key])
        np.testing.assert_allclose(values, anew[key], rtol=1e-5)
        assert (np.diff(values) >= 0).all()


def test_a_shipped_table_is_the_one_that_this_code_makes(root):
    name = nulls.table_name("mardia", 50, 10)
    with np.load(root / "data" / "nulls" / name) as shipped:
        made = nulls._simulate(name, "mardia", (50, 10), nulls.DRAWS)
        for key in made:
            np.testing.assert_allclose(shipped[key], made[key], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: nulls.null_table("norms", 9), "no table 'norms'.*gram"),
        (lambda: nulls.null_table("gram", 9, 30, draws=20), "20 draws.*39 or more"),
        (lambda: nulls.pvalue(0.0, np.zeros(9), tail="lower"), "'lower'; use 'both'"),
        (lambda: nulls.affine_energy(np.eye(5), 4), "5 samples of 4 coordinates"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
