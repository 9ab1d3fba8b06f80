"""The d >> n algebra against the dense matrices that it avoids."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ood_lib.gram import draw_weights, gram_matrix, pairwise_distances, spectrum
from ood_lib.priors import PRIORS, make_prior


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
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


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
