"""The d >> n algebra against the dense matrices that it avoids."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS, EmpiricalCovariance, LedoitWolf, ShrunkCovariance

from ood_lib import gram, latents
from ood_lib.gram import (
    Rows,
    draw_weights,
    fit_covariance,
    gram_matrix,
    open_shards,
    pairwise_distances,
    shrinkage,
    spectrum,
)
from ood_lib.priors import PRIORS, make_prior

SHAPES = [(2, 3), (3, 2), (7, 7), (8, 7), (30, 5), (12, 300), (60, 1000), (50, 1)]
SKLEARN = {"ledoit_wolf": LedoitWolf, "oas": OAS}


def sample(n, d, seed=0, offset=0.0):
    return offset + np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.1, 3, d)


@pytest.mark.parametrize("block", [1, 7, 100, 8192])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_block_size_does_not_change_the_gram_matrix(block, dtype):
    a, b = sample(5, 100).astype(dtype), sample(4, 100, seed=1).astype(dtype)
    dense = a.astype(float) @ b.astype(float).T
    np.testing.assert_allclose(gram_matrix(a, b, block=block), dense, rtol=1e-12, atol=1e-12)
    assert gram_matrix(a, b, block=block).dtype == np.float64


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 12), d=st.integers(1, 15), offset=st.sampled_from([0.0, -2.0, 100.0]))
def test_spectrum_is_that_of_the_dense_covariance(n, d, offset):
    x = sample(n, d, seed=17 * n + d, offset=offset)
    dense = np.linalg.eigvalsh(np.atleast_2d(np.cov(x, rowvar=False)))[::-1]
    found = spectrum(x)
    assert found.shape == (min(n - 1, d),)
    np.testing.assert_allclose(found, dense[: len(found)], rtol=1e-7, atol=1e-9)
    assert (np.diff(found) <= 0).all()


def test_spectrum_sums_to_the_total_variance_where_d_is_far_above_n():
    x = sample(10, 20_000)
    assert spectrum(x).sum() == pytest.approx(x.var(axis=0, ddof=1).sum(), rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (4, 7, 3), (6, 5, 9000)])
def test_distances_are_those_of_scipy(n, m, d):
    a, b = sample(n, d), sample(m, d, seed=1, offset=1)
    np.testing.assert_allclose(pairwise_distances(a, b), cdist(a, b), rtol=1e-10)


def test_distances_far_from_the_origin_do_not_cancel():
    a, b = sample(6, 300), sample(5, 300, seed=1)
    np.testing.assert_allclose(pairwise_distances(a + 1e6, b + 1e6), cdist(a, b), rtol=1e-9)


def test_distance_to_itself_is_zero_not_nan():
    a = sample(5, 300, offset=50).astype(np.float32)
    diagonal = np.diag(pairwise_distances(a, a))
    assert np.isfinite(diagonal).all()
    assert (diagonal < 1e-5 * np.linalg.norm(a, axis=1)).all()


def test_weights_are_a_draw_from_the_sample_covariance():
    x = sample(6, 4)
    centred = x - x.mean(0)
    w = draw_weights(200_000, 6, np.random.default_rng(0))
    assert w.var() == pytest.approx(1 / 5, rel=0.01)
    np.testing.assert_allclose(np.cov(w @ centred, rowvar=False), np.cov(x.T), atol=0.06)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gram_matrix(np.ones((2, 3)), np.ones((2, 4))), r"\(2, 3\) and \(2, 4\)"),
        (lambda: gram_matrix(np.ones(3)), r"\(3,\)"),
        (lambda: pairwise_distances(np.ones((2, 3)), np.ones((2, 4))), "shapes"),
        (lambda: spectrum(np.ones((1, 3))), "at least 2 samples, not 1"),
        (lambda: draw_weights(3, 1, np.random.default_rng(0)), "at least 2 samples, not 1"),
        (lambda: fit_covariance(np.ones((1, 3))), "at least 2 samples, not 1"),
        (lambda: shrinkage(np.ones((1, 3)), method="oas"), "at least 2 samples, not 1"),
        (lambda: gram.mean(np.ones((0, 3))), r"shape \(0, 3\)"),
        (lambda: gram.mean(np.ones((3, 0))), r"shape \(3, 0\)"),
        (lambda: gram.mean(np.ones((2, 1, 2, 2))), r"\(2, 1, 2, 2\).*flatten"),
        (lambda: gram.mean(np.ones((2, 3)), block=0), "block is 0"),
        (lambda: gram.mean(np.ones((2, 3), complex)), "complex128"),
        (lambda: gram.mean(np.array([["a"]])), "real numbers"),
        (lambda: fit_covariance(np.ones((3, 2)), method="lasso"), "'lasso'.*ledoit_wolf, oas"),
        (lambda: fit_covariance(np.ones((3, 2)), method=1.5), r"1\.5.*\[0, 1\]"),
        (lambda: fit_covariance(np.ones((3, 2)), method=float("nan")), r"nan.*\[0, 1\]"),
        (lambda: fit_covariance(sample(3, 2)).mahalanobis(np.ones((1, 4))), r"\(1, 4\).*\(3, 2\)"),
        (lambda: Rows(()), r"\[\]"),
        (lambda: Rows((np.ones((1, 2)), np.ones((1, 3)))), r"\(1, 2\), \(1, 3\)"),
        (lambda: Rows((np.ones((3, 2)),))[0], "columns only"),
        (lambda: Rows((np.ones((3, 2)),))[:2, 0:1], "columns only"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "call",
    [
        gram.mean,
        gram_matrix,
        spectrum,
        fit_covariance,
        lambda x: shrinkage(x, method="none"),
        lambda x: pairwise_distances(np.zeros((1, 20)), x),
        lambda x: fit_covariance(sample(5, 20)).mahalanobis(x),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_place(call, wrong):
    x = sample(4, 20)
    x[2, 17] = wrong
    with pytest.raises(ValueError, match="NaN or infinity in coordinates 0 to 19"):
        call(x)


# --------------------------------------------------------------- the shrunk covariance, with sklearn


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("method", SKLEARN)
def test_shrunk_covariance_is_that_of_sklearn(n, d, method):
    x, new = sample(n, d, offset=1), sample(4, d, seed=1)
    law, peer = fit_covariance(x, method=method, block=64), SKLEARN[method]().fit(x)
    assert law.shrinkage == pytest.approx(peer.shrinkage_, rel=1e-8, abs=1e-14)
    assert shrinkage(x, method=method) == pytest.approx(law.shrinkage, rel=1e-10, abs=1e-14)
    close(law.mean, peer.location_)
    if law.shrinkage > 1e-10 or n > d:
        close(law.mahalanobis(np.vstack([x, new])), peer.mahalanobis(np.vstack([x, new])))
        close(law.logdet(), np.linalg.slogdet(peer.covariance_)[1])


@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize(("n", "d"), [(8, 7), (30, 5), (50, 1), (12, 300)])
def test_a_given_shrinkage_is_that_of_sklearn(n, d, rho):
    x, new = sample(n, d), sample(4, d, seed=1, offset=2)
    law = fit_covariance(x, method=rho)
    peer = ShrunkCovariance(shrinkage=rho).fit(x)
    values = np.linalg.eigvalsh(EmpiricalCovariance().fit(x).covariance_)[::-1]
    close(law.eigenvalues, values[: min(n - 1, d)])
    if rho == 0 and n <= d:
        return
    close(law.mahalanobis(new), peer.mahalanobis(new))
    close(law.logdet(), np.linalg.slogdet(peer.covariance_)[1])
    if d < 100:
        close(law.log_density(new), multivariate_normal(law.mean, peer.covariance_).logpdf(new))


def test_the_two_conventions_differ_by_n_minus_1():
    x = sample(6, 40)
    close(fit_covariance(x).eigenvalues * 6 / 5, spectrum(x))
    close(fit_covariance(x).scale, x.var(axis=0).mean())


@pytest.mark.parametrize("d", [5, 400])
def test_a_mean_ten_thousand_times_the_spread_cancels_nothing(d):
    x, new = sample(20, d), sample(3, d, seed=1)
    near, far = fit_covariance(x, method="oas"), fit_covariance(x + 1e4, method="oas")
    close(spectrum(x + 1e4), spectrum(x))
    close(far.eigenvalues, near.eigenvalues)
    close(far.shrinkage, near.shrinkage)
    close(far.mahalanobis(new + 1e4), near.mahalanobis(new))
    close(far.leave_one_out(), near.leave_one_out())


def test_small_eigenvalues_of_a_steep_spectrum_keep_eight_digits():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(2000, 11)))[0].T
    coordinates = rng.normal(size=(12, 11)) * np.logspace(0, -5, 11)
    exact = np.linalg.svd(coordinates - coordinates.mean(0), compute_uv=False) ** 2 / 11
    found, seen = spectrum(coordinates @ directions + 3), exact > 1e-7 * exact[0]
    assert 5 < seen.sum() < 10
    close(found[seen], exact[seen])
    np.testing.assert_allclose(found, exact, atol=12 * 2.3e-16 * exact[0])


# ----------------------------------------------------------------------------------- leave one out


def refits(x, rho):
    """Squared distance of each sample to the law that scikit-learn fits to the others."""
    fit = ShrunkCovariance(shrinkage=rho).fit
    return np.array([fit(np.delete(x, i, 0)).mahalanobis(x[i : i + 1])[0] for i in range(len(x))])


@pytest.mark.parametrize(("n", "d"), [(3, 2), (5, 1), (8, 7), (30, 5), (10, 200), (20, 19)])
@pytest.mark.parametrize("rho", [1e-3, 0.2, 1.0])
def test_leave_one_out_is_n_refits(n, d, rho):
    x = sample(n, d, offset=3)
    close(fit_covariance(x, method=rho, block=16).leave_one_out(), refits(x, rho))


@pytest.mark.parametrize(("n", "d"), [(4, 2), (9, 7), (30, 5), (5, 1)])
def test_leave_one_out_without_shrinkage_is_n_refits(n, d):
    x = sample(n, d)
    close(fit_covariance(x, method="none").leave_one_out(), refits(x, 0.0))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(3, 12), d=st.integers(1, 30), rho=st.floats(0.01, 1), repeat=st.booleans())
def test_leave_one_out_of_any_shape_and_rank_is_n_refits(n, d, rho, repeat):
    x = sample(n, d, seed=31 * n + d)
    if repeat:
        x = np.vstack([x, x[:2]])
    close(fit_covariance(x, method=rho).leave_one_out(), refits(x, rho))


def test_a_sample_scores_less_under_a_law_that_knows_it():
    law = fit_covariance(sample(40, 3000))
    assert (law.mahalanobis(law.samples) < law.leave_one_out()).all()


def test_leave_one_out_scores_a_sample_like_a_new_one():
    rng = np.random.default_rng(0)
    law = fit_covariance(rng.normal(size=(200, 1000)), method=0.3)
    fresh = law.mahalanobis(rng.normal(size=(200, 1000)))
    assert law.leave_one_out().mean() == pytest.approx(fresh.mean(), rel=0.02)
    assert law.mahalanobis(law.samples).mean() < 0.6 * fresh.mean()


@pytest.mark.parametrize(
    ("x", "rho", "match"),
    [
        (sample(2, 4), 0.5, "without sample 0"),
        (sample(6, 5), 0.0, "without sample 0.*other 5 is singular"),
        (np.array([[1.0], [1], [1], [5]]), 0.5, "without sample 3"),
        (np.array([[1.0, 0], [2, 0], [4, 0], [1, 7]]), 0.0, "without sample 3"),
    ],
)
def test_a_covariance_that_is_lost_with_a_sample_is_refused(x, rho, match):
    with pytest.raises(ValueError, match=match):
        fit_covariance(x, method=rho).leave_one_out()


# ------------------------------------------------------------------------------- degenerate samples

JUDGEMENTS = [
    lambda law: law.mahalanobis(law.samples),
    lambda law: law.log_density(law.samples),
    lambda law: law.logdet(),
    lambda law: law.leave_one_out(),
]


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (sample(5, 8), "5 samples of 8 coordinates have rank 4"),
        (sample(5, 5), "5 samples of 5 coordinates have rank 4"),
        (np.c_[sample(20, 3), np.full(20, 0.1)], "20 samples of 4 coordinates have rank 3"),
        (np.repeat(sample(3, 4), 5, axis=0), "15 samples of 4 coordinates have rank 2"),
    ],
)
@pytest.mark.parametrize("call", JUDGEMENTS)
def test_a_singular_covariance_has_no_distances_and_says_to_shrink(x, match, call):
    with pytest.raises(ValueError, match=match + ".*ledoit_wolf"):
        call(fit_covariance(x, method="none"))


@pytest.mark.parametrize(
    "x",
    [
        np.c_[sample(20, 3), np.full(20, 0.1)],
        np.c_[sample(6, 30), np.full((6, 9), 0.1)],
        np.repeat(sample(3, 4), 5, axis=0),
        np.repeat(sample(3, 40), 5, axis=0),
    ],
    ids=["constant coordinate", "constant, d > n", "duplicates", "duplicates, d > n"],
)
def test_a_sample_without_full_rank_is_shrunk_as_in_sklearn(x):
    law, peer = fit_covariance(x), LedoitWolf().fit(x)
    close(law.shrinkage, peer.shrinkage_)
    close(law.mahalanobis(x + 1), peer.mahalanobis(x + 1))
    close(law.logdet(), np.linalg.slogdet(peer.covariance_)[1])


@pytest.mark.parametrize("call", JUDGEMENTS)
@pytest.mark.parametrize("method", ["none", "ledoit_wolf", "oas", 0.5])
def test_equal_samples_have_no_distances_at_any_shrinkage(method, call):
    with pytest.raises(ValueError, match="all 3 samples are equal"):
        call(fit_covariance(np.full((3, 5), 0.1), method=method))


def test_all_draws_of_equal_samples_are_the_mean():
    law = fit_covariance(np.full((3, 5), 0.1))
    np.testing.assert_array_equal(law.eigenvalues, np.zeros(2))
    np.testing.assert_array_equal(law.sample(2, np.random.default_rng(0)), np.full((2, 5), 0.1))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_integers_are_converted(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, (6, 9)).astype(dtype)
    law, same = fit_covariance(x), fit_covariance(x.astype(float))
    assert law.shrinkage == same.shrinkage
    np.testing.assert_array_equal(law.mahalanobis(x), same.mahalanobis(x.astype(float)))


def test_samples_are_left_as_they_were():
    x = sample(5, 30)
    before = x.copy()
    law = fit_covariance(x)
    law.mahalanobis(x), law.sample(2, np.random.default_rng(0)), pairwise_distances(x, x)
    np.testing.assert_array_equal(x, before)


# --------------------------------------------------------------------------------------------- draws


class Basis:
    """In place of random numbers, the rows of an identity: draws become the map from noise."""

    def __init__(self, n, d):
        self.n, self.rows = n, np.eye(n + d)

    def standard_normal(self, shape):
        return (self.rows[:, : self.n] if shape[1] == self.n else self.rows[:, self.n :]).copy()


@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("n", "d"), [(6, 4), (5, 40)])
def test_the_map_from_noise_to_draws_is_a_root_of_sigma(n, d, rho):
    x = sample(n, d, offset=2)
    draws = fit_covariance(x, method=rho, block=7).sample(n + d, Basis(n, d)) - x.mean(0)
    sigma = ShrunkCovariance(shrinkage=rho).fit(x).covariance_
    np.testing.assert_allclose(draws.T @ draws, sigma, rtol=1e-10, atol=1e-12)


def test_many_draws_have_mean_and_covariance_of_the_law():
    x = sample(8, 4, offset=2)
    draws = fit_covariance(x, method="oas").sample(200_000, np.random.default_rng(0))
    sigma = OAS().fit(x).covariance_
    np.testing.assert_allclose(draws.mean(0), x.mean(0), atol=5 * np.sqrt(sigma.max() / 2e5))
    np.testing.assert_allclose(np.cov(draws.T), sigma, atol=0.02 * sigma.max())


def test_block_size_does_not_change_the_draws():
    x = sample(5, 100)
    few, many = (
        fit_covariance(x, block=block).sample(3, np.random.default_rng(1)) for block in (7, 8192)
    )
    np.testing.assert_allclose(few, many, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------- samples on disk


@pytest.fixture
def on_disk(tmp_path):
    """Five samples of 2 x 3 x 4 numbers in two shards, and the same in memory."""
    x = sample(5, 24).astype(np.float32)
    folder = tmp_path / "set"
    folder.mkdir()
    for first, stop in [(0, 3), (3, 5)]:
        part = {"latent": x[first:stop].reshape(-1, 2, 3, 4), "error_estimate": x[first:stop, 0]}
        save_file(part, folder / f"{first:06d}-{stop - 1:06d}.safetensors", metadata={"a": "b"})
    return folder, x


def test_shards_are_one_sample(on_disk):
    folder, x = on_disk
    rows = open_shards(folder)
    assert rows.shape == (5, 24)
    np.testing.assert_array_equal(rows[:, 3:19], x[:, 3:19])
    law, same = fit_covariance(rows, block=5), fit_covariance(x, block=5)
    assert law.shrinkage == same.shrinkage
    np.testing.assert_array_equal(law.mahalanobis(rows), same.mahalanobis(x))
    np.testing.assert_array_equal(pairwise_distances(rows, x), pairwise_distances(x, x))


def test_latents_that_were_inverted_are_read_as_they_are(project, picture_folder):
    spec = latents.LatentSpec("tiny", str(picture_folder), points=4, t_end=700.0)
    made = latents.get(spec, shard=4).latent.flatten(1).numpy()
    rows = open_shards(latents.path_of(spec))
    assert len(rows.parts) > 1
    np.testing.assert_array_equal(rows[:, 0 : made.shape[1]], made)


def test_memmaps_and_safetensors_slices_are_samples(tmp_path):
    x = sample(5, 24).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    save_file({"x": x}, tmp_path / "x.safetensors")
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        for there in (mapped, file.get_slice("x"), Rows((mapped[:2], mapped[2:]))):
            np.testing.assert_array_equal(gram_matrix(there, block=7), gram_matrix(x, block=7))


@pytest.mark.parametrize(
    ("spoil", "tensor", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "latent", "000004.*is damaged"),
        (lambda path: path.write_bytes(b"half a shard"), "latent", "000004.*is damaged"),
        (lambda path: None, "companion", "'companion'; it has error_estimate, latent"),
        (lambda path: save_file({"latent": np.ones((2, 24), "f2")}, path), "latent", "is F16"),
        (lambda path: save_file({"latent": np.ones((2, 9), "f4")}, path), "latent", r"\(2, 9\)"),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(on_disk, spoil, tensor, match):
    folder, _ = on_disk
    spoil(folder / "000003-000004.safetensors")
    with pytest.raises(ValueError, match=match):
        open_shards(folder, tensor=tensor)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no shard"):
        open_shards(tmp_path)


# -------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def wide():
    """Twenty samples of 200,000 coordinates, 32 MB: a d x d matrix would need 320 GB."""
    return np.random.default_rng(0).normal(size=(20, 200_000))


def peak_mb(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_statistics_at_large_d_hold_a_block_at_a_time(wide):
    assert peak_mb(lambda: (spectrum(wide), pairwise_distances(wide, wide))) < 15


@pytest.mark.parametrize("name", PRIORS)
def test_priors_at_large_d_hold_a_few_copies_of_the_samples(wide, name):
    rng = np.random.default_rng(0)
    assert peak_mb(lambda: make_prior(name).fit(wide).sample(4, rng)) < 5 * wide.nbytes / 1e6


@pytest.mark.parametrize("block", [1024, 8192])
def test_a_law_on_disk_holds_a_few_blocks_and_means_at_a_time(tmp_path, wide, block):
    """Two shards of 32 MB; blocks of 20 x 1,024 and 20 x 8,192 float64 take 0.2 and 1.3 MB."""
    for part in range(2):
        save_file({"latent": wide.reshape(20, 1, 400, 500)}, tmp_path / f"{part}.safetensors")
    rows = open_shards(tmp_path)
    copies, means, draws = 5 * rows.shape[0] * block * 8, rows.shape[1] * 8, 2 * rows.shape[1] * 8

    def judge():
        law = fit_covariance(rows, method=0.5, block=block)
        law.mahalanobis(rows), law.leave_one_out(), law.sample(2, np.random.default_rng(0))

    assert peak_mb(judge) < (copies + 2 * means + draws) / 1e6 + 1


def test_twice_the_coordinates_take_no_more_memory_but_for_the_mean(wide):
    half, whole = (peak_mb(lambda x=x: fit_covariance(x)) for x in (wide[:, :100_000], wide))
    assert whole - half < 2 * 100_000 * 8 / 1e6
