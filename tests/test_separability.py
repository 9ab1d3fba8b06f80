"""Separability against closed forms, dense algebra, scikit-learn and simulated laws."""

import tracemalloc
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, binomtest, norm
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import KernelCenterer

from ood_lib import separability
from ood_lib.separability import (
    SCORES,
    Separability,
    auroc,
    auroc_interval,
    report,
)

FAST = {"permutations": 19, "resamples": 50, "splits": 1}


def rng_of(seed=0):
    return np.random.default_rng(seed)


def gaussian(n, d, seed=0, *, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, d))


def frame(a, b, seed=0, **options):
    return report(a, b, rng=rng_of(seed), **FAST | options).to_frame().set_index("name")


scores = arrays(float, st.integers(1, 12), elements=st.integers(-3, 3).map(float))


@settings(deadline=None, max_examples=50)
@given(a=scores, b=scores)
def test_auroc_is_that_of_sklearn_and_turns_round_with_the_sets(a, b):
    truth = roc_auc_score(np.repeat([0, 1], [len(a), len(b)]), np.concatenate([a, b]))
    assert auroc(a, b) == pytest.approx(truth)
    assert auroc(b, a) == pytest.approx(1 - truth)
    assert auroc(np.exp(a), np.exp(b)) == pytest.approx(truth)


@pytest.mark.parametrize("delta", [0.0, 1.0, 2.0])
def test_interval_covers_the_closed_form_of_two_gaussians(delta):
    rng, truth, n, hits = rng_of(), norm.cdf(delta / np.sqrt(2)), 60, 0
    for _ in range(300):
        a, b = rng.normal(size=n), rng.normal(size=n) + delta
        found = auroc_interval(a, b, rng=rng, resamples=400)
        hits += found.low <= truth <= found.high
    assert binom.ppf(0.001, 300, 0.93) <= hits <= binom.ppf(0.999, 300, 0.97)


def test_interval_of_a_perfect_separation_is_not_a_point():
    found = auroc_interval(np.arange(30.0), np.arange(40.0) + 99, rng=rng_of())
    exact = binomtest(30, 30).proportion_ci(0.95, method="exact")
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(exact.low)
    turned = auroc_interval(np.arange(40.0) + 99, np.arange(30.0), rng=rng_of())
    assert turned.high == pytest.approx(1 - found.low)


def joint_of(a, b):
    return separability._joint(a, b, 64)


@pytest.fixture(params=[(40, 8), (15, 90)], ids=["n > d", "d > n"])
def split(request):
    """Two sets, their inner products, and rows to fit to and to judge."""
    n, d = request.param
    law = np.linspace(0.3, 2, d)
    a, b = gaussian(n, d) * law, gaussian(n, d, 1, shift=0.3) * law
    test = np.arange(0, 2 * n, 4)
    train = np.setdiff1d(np.arange(2 * n), test)
    return np.concatenate([a, b]), joint_of(a, b), train, test


def score_of(name, joint, train, test):
    return separability._SCORES[name][0](joint, train, test, joint.ood[:, None])[:, 0]


def test_mahalanobis_is_that_of_sklearn(split):
    x, joint, train, test = split
    dense = LedoitWolf().fit(x[train[~joint.ood[train]]])
    np.testing.assert_allclose(
        score_of("mahalanobis", joint, train, test), dense.mahalanobis(x[test]), rtol=1e-8
    )


def test_distance_and_typicality_are_those_of_the_fitted_images(split):
    x, joint, train, test = split
    own = x[train[~joint.ood[train]]]
    far = np.square(x[test] - own.mean(0)).sum(1)
    np.testing.assert_allclose(score_of("distance", joint, train, test), far, rtol=1e-9)
    odd = np.abs(np.square(x[test]).sum(1) - np.square(own).sum(1).mean())
    np.testing.assert_allclose(score_of("typicality", joint, train, test), odd, atol=1e-9)


def test_linear_is_the_discriminant_of_the_shrunk_total_covariance(split):
    x, joint, train, test = split
    y, total = joint.ood[train], LedoitWolf().fit(x[train])
    gap = x[train[y]].mean(0) - x[train[~y]].mean(0)
    dense = (x[test] - x[train].mean(0)) @ np.linalg.solve(total.covariance_, gap)
    found = score_of("linear", joint, train, test)
    assert np.corrcoef(found, dense)[0, 1] == pytest.approx(1, abs=1e-9)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=total.shrinkage_)
    usual = lda.fit(x[train], y).decision_function(x[test])
    assert np.corrcoef(found, usual)[0, 1] > 0.95


def test_c2st_is_kernel_ridge_of_sklearn(split):
    _, joint, train, test = split
    centre = KernelCenterer()
    inner = centre.fit_transform(joint.kernel[np.ix_(train, train)])
    ridge = KernelRidge(alpha=0.1 * np.trace(inner) / len(train), kernel="precomputed")
    ridge.fit(inner, joint.ood[train].astype(float))
    dense = ridge.predict(centre.transform(joint.kernel[np.ix_(test, train)]))
    np.testing.assert_allclose(score_of("c2st", joint, train, test), dense, atol=1e-9)


def test_norm_is_compared_over_all_pairs():
    a, b = gaussian(20, 30), gaussian(25, 30, 1, scale=1.1)
    norms = [np.linalg.norm(x, axis=1) for x in (a, b)]
    found, turned = frame(a, b).loc["norm"], frame(b, a).loc["norm"]
    assert found.auroc == pytest.approx(auroc(*norms))
    assert turned.auroc == pytest.approx(1 - found.auroc)
    assert found.direction == "fixed"


def test_exchanging_the_sets_keeps_what_is_learned_from_labels():
    a, b = gaussian(60, 300), gaussian(60, 300, 1, shift=0.2)
    found, turned = frame(a, b), frame(b, a)
    learned = found.direction == "learned"
    assert set(found.index[learned]) == {"linear", "c2st"}
    np.testing.assert_allclose(found.auroc[learned], turned.auroc[learned], atol=0.1)
    assert (found.auroc[learned] > 0.75).all()


@pytest.mark.parametrize(
    ("options", "sees", "blind"),
    [
        ({"shift": 0.25}, ["linear", "c2st"], ["typicality"]),
        ({"scale": 1.2}, ["norm", "distance", "typicality", "mahalanobis", "c2st"], ["linear"]),
    ],
)
def test_scores_see_what_they_are_made_for(options, sees, blind):
    found = frame(gaussian(60, 400), gaussian(60, 400, 1, **options), permutations=199)
    assert (found.auroc[sees] > 0.85).all()
    assert (found.pvalue[sees] <= 0.05).all()
    assert (found.auroc[blind].sub(0.5).abs() < 0.2).all()


def test_a_smaller_domain_is_inside_for_distances_but_atypical():
    found = frame(gaussian(60, 400), gaussian(60, 400, 1, scale=0.8), permutations=199)
    assert (found.auroc[["norm", "distance", "mahalanobis"]] < 0.15).all()
    assert found.auroc["typicality"] > 0.85
    assert (found.pvalue[["norm", "distance", "mahalanobis", "typicality"]] <= 0.05).all()


def test_pvalues_of_equal_laws_have_their_size():
    """Few images of many numbers, with a spectrum: where naive tests of cross-validated scores fail."""
    rng, runs, law = rng_of(), 150, 3 / np.sqrt(np.arange(1, 101))
    rejected = np.zeros(len(SCORES) + 1)
    for _ in range(runs):
        a, b = (rng.normal(size=(12, 100)) * law for _ in range(2))
        found = report(a, b, rng=rng, folds=3, **FAST)
        rejected += np.append(found.to_frame().pvalue <= 0.05, found.centres.pvalue <= 0.05)
    assert (rejected <= binom.ppf(0.999, runs, 0.05)).all()
    assert (rejected >= binom.ppf(0.001, runs, 0.05)).all()


@pytest.mark.parametrize("name", ["mahalanobis", "linear", "c2st"])
def test_intervals_of_cross_fitted_scores_cover_chance_for_equal_laws(name):
    """Folds share their fits: with the fits held fixed 0.8 of the intervals would."""
    rng, runs, law, hits = rng_of(), 40, 1 / np.sqrt(np.arange(1, 201)), 0
    for _ in range(runs):
        a, b = (rng.normal(size=(30, 200)) * law for _ in range(2))
        options = FAST | {"permutations": 60, "resamples": 200}
        found = report(a, b, rng=rng, scores=[name], **options)[name]
        hits += found.low <= 0.5 <= found.high
    assert hits >= binom.ppf(0.001, runs, 0.93)


def test_two_halves_of_one_law_do_not_separate_at_large_d():
    found = frame(gaussian(50, 3000), gaussian(50, 3000, 1), permutations=199)
    assert (found.pvalue > 0.01).all()
    assert found.auroc.between(0.3, 0.7).all()


def test_centre_distance_is_the_u_statistic():
    a, b = gaussian(7, 30), gaussian(9, 30, 1, shift=0.4, scale=2)
    found = report(a, b, rng=rng_of(), **FAST).centres
    inner = [[x @ y for j, y in enumerate(s) for i, x in enumerate(s) if i != j] for s in (a, b)]
    dense = np.mean(inner[0]) + np.mean(inner[1]) - 2 * np.mean(a @ b.T)
    assert found.squared == pytest.approx(dense)
    traces = [x.var(axis=0, ddof=1).sum() for x in (a, b)]
    assert found.plain == pytest.approx(np.square(a.mean(0) - b.mean(0)).sum())
    assert found.plain - found.squared == pytest.approx(traces[0] / 7 + traces[1] / 9)
    assert found.sigma == pytest.approx(np.sqrt(np.mean(traces) / 30))
    assert found.rule == pytest.approx(found.sigma * 30**0.25)


def test_interval_of_the_centre_distance_is_the_jackknife():
    a, b = gaussian(8, 30), gaussian(9, 30, 1, shift=0.4)

    def squared(x, y):
        return separability._centre_distance(joint_of(x, y), joint_of(x, y).ood[:, None])

    left = [[squared(np.delete(a, i, 0), b).squared for i in range(8)]]
    left += [[squared(a, np.delete(b, i, 0)).squared for i in range(9)]]
    error = np.sqrt(sum((len(x) - 1) * np.var(x) for x in left))
    found = squared(a, b)
    assert found.high - found.low == pytest.approx(2 * norm.ppf(0.975) * error)


def test_centre_distance_is_unbiased_and_covered_where_the_plain_one_is_not():
    rng, law, runs = rng_of(), np.linspace(0.2, 2, 200), 200
    shift = 0.2 * law
    truth, hits, values, plain = float(shift @ shift), 0, [], []
    for _ in range(runs):
        joint = joint_of(rng.normal(size=(30, 200)) * law, shift + rng.normal(size=(40, 200)) * law)
        found = separability._centre_distance(joint, joint.ood[:, None])
        hits += found.low <= truth <= found.high
        values.append(found.squared)
        plain.append(found.plain)
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(runs))
    assert np.mean(plain) > 2 * truth
    assert hits >= binom.ppf(0.001, runs, 0.93)


def dense_divergences(a, b):
    (m, s), (n, t) = [(x.mean(0), LedoitWolf().fit(x).covariance_) for x in (a, b)]
    gap, d = n - m, len(m)
    logdet = [np.linalg.slogdet(c)[1] for c in (s, t, (s + t) / 2)]

    def kl(p, q, difference):
        return (
            np.trace(np.linalg.solve(q, p)) + gap @ np.linalg.solve(q, gap) - d + difference
        ) / 2

    mixed = gap @ np.linalg.solve((s + t) / 2, gap) / 8 + (logdet[2] - sum(logdet[:2]) / 2) / 2
    return kl(t, s, logdet[0] - logdet[1]), kl(s, t, logdet[1] - logdet[0]), mixed


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 6), (12, 20, 70)])
def test_divergences_are_those_of_the_dense_gaussians(n, m, d):
    law = np.linspace(0.3, 2, d)
    a, b = gaussian(n, d) * law, gaussian(m, d, 1, shift=0.2) * law[::-1]
    rows = np.arange(n + m)
    found = separability._between(joint_of(a, b), rows[:n], rows[n:])
    np.testing.assert_allclose(found, dense_divergences(a, b), rtol=1e-8)


def test_excess_is_zero_for_equal_laws_whose_divergence_is_large():
    rng, law = rng_of(), 10 / np.sqrt(np.arange(1, 301))
    runs = [
        report(*(rng.normal(size=(40, 300)) * law for _ in range(2)), rng=rng, scores=(), **FAST)
        for _ in range(40)
    ]
    for k in range(3):
        excess = np.array([run.divergences[k].excess for run in runs])
        assert np.mean([run.divergences[k].value for run in runs]) > 1
        assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(len(runs))
    far = report(gaussian(40, 300), gaussian(40, 300, 1, scale=2), rng=rng, scores=(), **FAST)
    assert all(divergence.excess > 10 for divergence in far.divergences)


@pytest.mark.parametrize("convert", [np.float32, np.float16, "memmap", "fortran"])
def test_type_and_storage_do_not_change_the_result(convert, tmp_path):
    a, b = (np.round(gaussian(10, 40, seed), 2).astype(np.float16) for seed in (0, 1))
    plain = report(a.astype(float), b.astype(float), rng=rng_of(), **FAST)
    if convert == "memmap":
        np.save(tmp_path / "a.npy", a)
        a = np.load(tmp_path / "a.npy", mmap_mode="r")
    elif convert == "fortran":
        a, b = np.asfortranarray(a), np.asfortranarray(b)
    else:
        a, b = a.astype(convert), b.astype(convert)
    found = report(a, b, rng=rng_of(), block=7, **FAST)
    assert found.to_frame().equals(plain.to_frame())
    assert found.centres.squared == pytest.approx(plain.centres.squared)


def test_integer_images_are_those_numbers():
    pixels = [rng_of(seed).integers(0, 256, (10, 40), dtype=np.uint8) for seed in (0, 1)]
    found = frame(*pixels)
    assert found.equals(frame(*(x.astype(float) for x in pixels)))


def test_images_far_from_the_origin_separate_as_near_it():
    a, b = gaussian(20, 50), gaussian(20, 50, 1, shift=0.5)
    near, far = frame(a, b), frame(a + 1000, b + 1000)
    same = ["distance", "mahalanobis", "linear", "c2st"]
    np.testing.assert_allclose(near.auroc[same], far.auroc[same], atol=1e-6)


def test_the_same_generator_gives_the_same_report():
    a, b = gaussian(10, 20), gaussian(12, 20, 1)
    assert frame(a, b, seed=3).equals(frame(a, b, seed=3))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_images_are_refused(n):
    with pytest.raises(ValueError, match=f"{n} in-domain and 9 OOD images"):
        report(gaussian(n, 4), gaussian(9, 4, 1), rng=rng_of())
    with pytest.raises(ValueError, match=f"9 in-domain and {n} OOD images"):
        report(gaussian(9, 4), gaussian(n, 4, 1), rng=rng_of())


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 40)])
def test_the_fewest_images_are_enough(n, m):
    found = frame(gaussian(n, 50), gaussian(m, 50, 1))
    assert np.isfinite(found[["auroc", "low", "high", "pvalue"]].astype(float)).all(axis=None)
    assert (found.n == n).all()
    assert (found.m == m).all()
    assert (found.d == 50).all()


def with_nan(x):
    x = x.copy()
    x[2, 3] = np.nan
    return x


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, b: report(a, b[:, :3], rng=rng_of()), "one d"),
        (lambda a, b: report(a[0], b, rng=rng_of()), r"\(n, d\)"),
        (lambda a, b: report(with_nan(a), b, rng=rng_of()), "NaN"),
        (lambda a, b: report(a, with_nan(b), rng=rng_of()), "NaN"),
        (lambda a, b: report(a, b.astype(complex), rng=rng_of()), "complex"),
        (lambda a, b: report(a, b, rng=rng_of(), scores=["svm"]), "svm"),
        (lambda a, b: report(a, b, rng=rng_of(), folds=1), "folds is 1"),
        (lambda a, b: report(a, b, rng=rng_of(), folds=11), "folds is 11"),
        (lambda a, b: report(a, b, rng=rng_of(), permutations=0), "permutations is 0"),
        (lambda a, b: report(a, np.r_[b, b[:1]], rng=rng_of()), r"ood\[0\] and ood\[10\]"),
        (lambda a, b: report(a, np.r_[b, a[3:4]], rng=rng_of()), r"id\[3\] and ood\[10\]"),
        (lambda a, b: report(np.zeros_like(a), b, rng=rng_of()), "45 pairs of images are copies"),
        (lambda a, b: auroc(a[0], np.array([])), "ood_scores"),
        (lambda a, b: auroc(a, b[0]), r"id_scores have shape \(10, 6\)"),
        (lambda a, b: auroc(with_nan(a)[2], b[0]), "5 of them finite"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(gaussian(10, 6), gaussian(10, 6, 1))


def test_images_on_one_line_have_no_covariance():
    line = np.outer([-3.0, -2, -1, 1, 2, 3], np.arange(1, 5))
    with pytest.raises(ValueError, match="do not vary in more than one way"):
        separability._floor(separability._centred(line[[2, 3]] @ line[[2, 3]].T), 4)


def test_results_are_frozen_and_named():
    found = report(gaussian(8, 20), gaussian(8, 20, 1), rng=rng_of(), **FAST)
    with pytest.raises(FrozenInstanceError):
        found["norm"].auroc = 1.0
    with pytest.raises(KeyError, match="svm"):
        found["svm"]
    assert found.to_frame().name.tolist() == list(SCORES)
    assert found["linear"].to_frame().columns.tolist() == found.to_frame().columns.tolist()
    chosen = report(gaussian(8, 20), gaussian(8, 20, 1), rng=rng_of(), scores=("c2st",), **FAST)
    assert chosen.to_frame().name.tolist() == ["c2st"]


def test_scores_of_a_fitted_detector_have_the_p_value_of_mann_and_whitney():
    a, b = rng_of().normal(size=40), rng_of(1).normal(size=50) + 0.5
    found = Separability.from_scores(a, b, name="s", d=1, rng=rng_of(), permutations=4000)
    z = (auroc(a, b) - 0.5) / np.sqrt((40 + 50 + 1) / (12 * 40 * 50))
    assert found.pvalue == pytest.approx(2 * norm.sf(z), abs=0.01)
    assert found.auroc == auroc(a, b)


def test_many_numbers_an_image_need_no_matrix_of_that_size():
    a, b = gaussian(12, 100_000), gaussian(12, 100_000, 1)
    tracemalloc.start()
    try:
        report(a, b, rng=rng_of(), **FAST)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6
