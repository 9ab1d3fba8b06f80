"""The oracles themselves, against dense linear algebra, autograd and a general ODE solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ood_lib.analytic import GaussianLaw, MixtureLaw, analytic_model

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.standard_normal((5, 2)))[0]
EIGENVALUES, RESIDUAL, MEAN = np.array([2.0, 0.3]), 0.05, RNG.standard_normal(5)
DENSE = BASIS @ np.diag(EIGENVALUES - RESIDUAL) @ BASIS.T + RESIDUAL * np.eye(5)
LAW = GaussianLaw(*(torch.from_numpy(a) for a in (MEAN, BASIS, EIGENVALUES)), RESIDUAL)
MIXTURE = MixtureLaw(
    torch.tensor([[-0.6, 0.2], [0.5, 0.1], [0.0, -0.7]]).double(),
    torch.tensor([0.02, 0.05, 0.01]).double(),
    torch.tensor([0.5, 0.3, 0.2]).double(),
)
X = torch.from_numpy(RNG.standard_normal((4, 5)))


@pytest.mark.parametrize("sigma", [0.01, 0.5, 30.0])
def test_gaussian_eps_is_the_dense_formula(sigma):
    inverse = np.linalg.inv(DENSE + sigma**2 * np.eye(5))
    expected = sigma * (X.numpy() - MEAN) @ inverse
    np.testing.assert_allclose(LAW.eps(X, sigma).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_gaussian_flow_solves_the_ode():
    def slope(sigma, x):
        return sigma * np.linalg.solve(DENSE + sigma**2 * np.eye(5), x - MEAN)

    path = solve_ivp(slope, (0.01, 5), X[0].numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(LAW.flow(X[:1], 0.01, 5)[0], path.y[:, -1], rtol=1e-7)


@settings(deadline=None, max_examples=30)
@given(*[st.floats(0.01, 150)] * 3)
def test_flows_compose_and_invert(a, b, c):
    torch.testing.assert_close(LAW.flow(LAW.flow(X, a, b), b, c), LAW.flow(X, a, c))
    torch.testing.assert_close(LAW.flow(LAW.flow(X, a, b), b, a), X)


def test_fit_recovers_mean_and_covariance_of_fewer_samples_than_coordinates():
    rows = torch.from_numpy(RNG.standard_normal((6, 20)))
    law = GaussianLaw.fit(rows)
    dense = law.basis @ torch.diag(law.eigenvalues) @ law.basis.T
    np.testing.assert_allclose(dense, np.cov(rows.numpy().T), atol=1e-12)
    np.testing.assert_allclose(law.mean, rows.mean(0), atol=1e-14)
    assert (len(law.eigenvalues), law.residual) == (5, 0)


def test_samples_have_the_law():
    draws = LAW.sample(40_000, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), DENSE, atol=0.06)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 20.0])
def test_mixture_eps_is_the_score_of_its_density(sigma):
    x = torch.from_numpy(RNG.uniform(-1, 1, (5, 2))).requires_grad_()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(MIXTURE.means, (MIXTURE.variances + sigma**2).sqrt()[:, None]), 1
    )
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(MIXTURE.weights), parts
    )
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(MIXTURE.eps(x.detach(), sigma), -sigma * score)


def test_a_mixture_of_one_is_a_gaussian():
    one = MixtureLaw(
        torch.from_numpy(MEAN)[None], torch.tensor([0.3]).double(), torch.ones(1).double()
    )
    same = GaussianLaw(
        torch.from_numpy(MEAN), torch.eye(5).double(), torch.full((5,), 0.3).double()
    )
    torch.testing.assert_close(one.eps(X, 0.7), same.eps(X, 0.7))


@pytest.mark.parametrize("t", [0, 500, 999])
def test_analytic_model_predicts_in_the_coordinates_of_x_t(schedule, t):
    ab = schedule.alpha_bar[t]
    inverse = np.linalg.inv(ab * DENSE + (1 - ab) * np.eye(5))
    expected = np.sqrt(1 - ab) * (X.numpy() - np.sqrt(ab) * MEAN) @ inverse
    model = analytic_model(LAW, schedule)
    eps = model.eps(X.view(4, 1, 1, 5), t).flatten(1)
    np.testing.assert_allclose(eps.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_analytic_model_keeps_shape_name_and_refuses_a_wrong_one(schedule):
    model = analytic_model(LAW, schedule, sample_shape=(5, 1, 1), name="toy")
    assert (model.name, model.family, model.sample_shape) == ("toy", "analytic", (5, 1, 1))
    assert model.eps(torch.zeros(3, 5, 1, 1), 4).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(2, 2, 1\) .* 5 numbers"):
        analytic_model(LAW, schedule, sample_shape=(2, 2, 1))
