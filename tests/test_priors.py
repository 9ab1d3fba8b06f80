"""Latent priors: the law each one promises, the span it stays in, the maps it commutes with."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from ood_lib.priors import PRIORS, FullGaussian, Isotropic, Recombination, make_prior

DRAWS = 100_000


@pytest.fixture(scope="module")
def latents():
    """Correlated latents (12, 5) away from the origin."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(12, 5)) @ rng.normal(size=(5, 5)) + [3, -2, 0, 1, 5]


def promised(name, z):
    """Mean and covariance as the docstrings define them, in dense numpy."""
    mean, s, d = z.mean(0), np.cov(z, rowvar=False), z.shape[1]
    return {
        "standard normal": (np.zeros(d), np.eye(d)),
        "isotropic": (mean, np.trace(s) / d * np.eye(d)),
        "diagonal": (mean, np.diag(np.diag(s))),
        "full covariance": (mean, s),
        "recombination": (mean, s),
    }[name]


@pytest.mark.parametrize("name", PRIORS)
def test_draws_converge_to_the_promised_mean_and_covariance(latents, name):
    mean, cov = promised(name, latents)
    draws = make_prior(name).fit(latents).sample(DRAWS, np.random.default_rng(0))
    scale = np.sqrt(np.diag(cov))
    # five standard errors of a mean; of a covariance with kurtosis at most Gaussian
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / scale, 5 / np.sqrt(DRAWS))
    gap = np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)
    assert gap.max() < 5 * np.sqrt(2 / DRAWS)


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_recombination_has_covariance_s_for_every_k(latents, k):
    draws = Recombination(k=k).fit(latents).sample(DRAWS, np.random.default_rng(1))
    cov = np.cov(latents, rowvar=False)
    scale = np.sqrt(np.diag(cov))
    assert (np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)).max() < 0.03


def test_recombination_of_n_minus_one_is_a_mirror_of_the_one_left_out():
    z = np.random.default_rng(0).normal(size=(4, 6))
    draws = Recombination(k=3).fit(z).sample(50, np.random.default_rng(0)) - z.mean(0)
    rays = z.mean(0) - z  # the sum of the others about the mean is minus the one left out
    unit = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    cosines = draws @ unit.T / np.linalg.norm(draws, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-12)


def test_isotropic_leaves_the_mean_out_of_the_variance():
    """The released estimator takes the variance of all numbers, which the mean inflates (g5)."""
    z = 100 * np.arange(50.0) + np.random.default_rng(0).normal(size=(400, 50))
    assert Isotropic().fit(z).variance_ == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("prior", [FullGaussian(), Recombination(), Recombination(k=3)])
def test_draws_lie_in_the_affine_span_of_the_latents(prior):
    z = np.random.default_rng(0).normal(size=(6, 500)) + 2
    draws = prior.fit(z).sample(20, np.random.default_rng(1)) - z.mean(0)
    basis = np.linalg.qr((z - z.mean(0))[:-1].T)[0]
    np.testing.assert_allclose(draws @ basis @ basis.T, draws, atol=1e-10)


@pytest.mark.parametrize("name", ["isotropic", "diagonal"])
def test_other_priors_leave_the_span(name):
    z = np.random.default_rng(0).normal(size=(6, 500))
    draws = make_prior(name).fit(z).sample(20, np.random.default_rng(1)) - z.mean(0)
    basis = np.linalg.qr((z - z.mean(0))[:-1].T)[0]
    assert np.linalg.norm(draws @ basis) < 0.3 * np.linalg.norm(draws)


@pytest.mark.parametrize("prior", [FullGaussian(), Recombination(), Recombination(k=4)])
def test_full_and_recombination_commute_with_an_affine_map(latents, prior):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=7)
    before = clone(prior).fit(latents).sample(30, np.random.default_rng(2)) @ a + b
    after = clone(prior).fit(latents @ a + b).sample(30, np.random.default_rng(2))
    np.testing.assert_allclose(after, before, atol=1e-10)


@pytest.mark.parametrize("name", ["isotropic", "diagonal"])
def test_isotropic_and_diagonal_do_not_commute(latents, name):
    a = np.random.default_rng(5).normal(size=(5, 5))
    before = make_prior(name).fit(latents).sample(30, np.random.default_rng(2)) @ a
    after = make_prior(name).fit(latents @ a).sample(30, np.random.default_rng(2))
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("name", PRIORS)
def test_priors_are_scikit_learn_estimators(latents, name):
    prior = make_prior(name)
    assert clone(prior).get_params() == prior.get_params()
    assert prior.fit(latents.astype(np.float32)) is prior
    assert prior.n_features_in_ == 5
    draws = [prior.sample(3, np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    assert draws[0].shape == (3, 5)
    assert draws[0].dtype == np.float64


def test_fit_does_not_change_or_follow_the_callers_array(latents):
    z = latents.copy()
    prior = FullGaussian().fit(z)
    np.testing.assert_array_equal(z, latents)
    before = prior.sample(3, np.random.default_rng(0))
    z *= 0
    np.testing.assert_array_equal(prior.sample(3, np.random.default_rng(0)), before)


def test_parameters_survive_clone_and_set_params():
    assert clone(Recombination(k=3)).k == 3
    assert Recombination().set_params(k=5).get_params() == {"k": 5}


@pytest.mark.parametrize(
    ("prior", "z", "match"),
    [
        ("full covariance", np.ones((1, 3)), "n >= 2"),
        ("isotropic", np.ones(3), r"\(3,\)"),
        ("diagonal", np.ones((4, 1, 2, 2)), r"\(4, 1, 2, 2\)"),
        ("full covariance", np.array([[1.0, np.nan], [0, 1]]), "NaN"),
        ("standard normal", np.array([[np.inf]]), "infinity"),
        ("recombination", np.ones((2, 3)), "k = 2"),
        ("gaussian", np.ones((2, 3)), "known are standard normal, isotropic"),
    ],
)
def test_bad_input_is_named(prior, z, match):
    with pytest.raises(ValueError, match=match):
        make_prior(prior).fit(z)


@pytest.mark.parametrize("k", [0, -1, 12])
def test_recombination_refuses_an_impossible_k(latents, k):
    with pytest.raises(ValueError, match=f"k = {k} "):
        Recombination(k=k).fit(latents)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_that_is_not_fitted_says_so(name):
    with pytest.raises(NotFittedError):
        make_prior(name).sample(2, np.random.default_rng(0))
