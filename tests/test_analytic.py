"""The oracles themselves, against dense linear algebra, autograd and a general ODE solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ood_lib.analytic import (
    GaussianLaw,
    MixtureLaw,
    analytic_model,
    eta_mse,
    eta_response,
    exact_latent,
)
from ood_lib.inversion import generate
from ood_lib.schedule import NoiseSchedule, paper_grid

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


# ---------------------------------------------------------- the stochastic way back in closed form

ETAS = [0.0, 0.1, 0.3, 1.0]
LAM = np.array([0.0, 1e-4, 1e-2, 0.1, 1.0])
AXES = GaussianLaw(
    torch.linspace(-0.3, 0.4, 5).double(), torch.eye(5).double(), torch.from_numpy(LAM)
)


def walk_back(law, schedule, images, grid, *, eta, seed=0):
    """Return images from their exact latents, by the library's own loop."""
    model = analytic_model(law, schedule, sample_shape=tuple(images.shape[1:]))
    latent = exact_latent(law, schedule, images, t_start=grid[0], t_end=grid[-1])
    noise = torch.Generator().manual_seed(seed)
    return generate(model, latent, timesteps=grid, solver="ddim", eta=eta, generator=noise).images


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("grid", [paper_grid(500, 40), np.array([2.5, 9, 33.3, 800])])
def test_the_factor_of_a_grid_is_that_of_generate(schedule, eta, grid):
    """Two images under the same noise: their difference is free of sampling error."""
    images = torch.zeros(1, 1, 1, 5).double(), torch.ones(1, 1, 1, 5).double()
    first, second = (walk_back(AXES, schedule, x, grid, eta=eta) for x in images)
    factor = eta_response(LAM, schedule, eta=eta, timesteps=grid).factor
    np.testing.assert_allclose((second - first).numpy().ravel(), factor, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
def test_the_noise_of_a_grid_is_that_of_generate(schedule, eta):
    grid = paper_grid(500, 40)
    images = torch.zeros(20_000, 1, 1, 5).double()
    left = walk_back(AXES, schedule, images, grid, eta=eta).var(0).numpy().ravel()
    variance = eta_response(LAM, schedule, eta=eta, timesteps=grid).variance
    np.testing.assert_allclose(left, variance, rtol=0.05)  # 5 standard errors


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("t_start", [0.0, 40.0])
def test_many_steps_lead_to_the_closed_form(schedule, eta, t_start):
    closed = eta_response(LAM, schedule, eta=eta, t0=900, t_start=t_start)
    ends = schedule.log_sigma([t_start, 900])
    gaps = []
    for n in (1_000, 2_000):
        grid = schedule.t_of_log_sigma(np.linspace(*ends, n))
        grid[0], grid[-1] = t_start, 900
        here = eta_response(LAM, schedule, eta=eta, timesteps=grid)
        gaps.append([np.abs(here.factor - closed.factor), np.abs(here.variance - closed.variance)])
    assert np.max(gaps[1]) < 6e-3
    np.testing.assert_array_less(gaps[1], 0.6 * np.array(gaps[0]) + 1e-9)  # first order


def test_the_closed_form_is_the_ornstein_uhlenbeck_process(schedule):
    """As h of the derivation: r = (lambda / (lambda + tau^2))^(eta^2 / 2) where the end is noiseless."""
    tau = float(schedule.sigma(500))
    r = eta_response([0.1], schedule, eta=0.3, t0=500)
    assert r.factor.item() == pytest.approx((0.1 / (0.1 + tau**2)) ** 0.045, rel=1e-4)
    assert r.variance.item() == pytest.approx(0.1 * (1 - r.factor.item() ** 2), rel=2e-3)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 2), st.floats(0, 1), st.floats(0, 1), st.floats(100, 900))
def test_more_noise_keeps_less_and_noise_takes_its_place(lam, a, b, t0):
    schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    low, high = (eta_response([lam], schedule, eta=e, t0=t0) for e in sorted((a, b)))
    later = eta_response([lam], schedule, eta=max(a, b), t0=999)
    assert 0 <= later.factor <= high.factor + 1e-12
    assert high.factor <= low.factor + 1e-12 <= 1 + 2e-12
    assert low.variance <= high.variance + 1e-12
    whole = schedule.alpha_bar[0] * (lam + schedule.sigma(0) ** 2)  # the law itself
    assert high.factor**2 * whole + high.variance == pytest.approx(whole)


@pytest.mark.parametrize("timesteps", [None, np.array([0.0, 50, 200, 500])])
def test_the_schedule_is_known_by_its_noise_levels_alone(schedule, timesteps):
    other = NoiseSchedule(schedule.alpha_bar[np.r_[0:200:2, 200:1000:5]])
    levels = np.array([0.0, 500]) if timesteps is None else timesteps
    there = other.t_of_log_sigma(schedule.log_sigma(levels))
    ways = [{"timesteps": x} if timesteps is not None else {"t0": x[-1]} for x in (levels, there)]
    first, second = (
        eta_response(LAM, s, eta=0.3, **way) for s, way in zip((schedule, other), ways, strict=True)
    )
    np.testing.assert_allclose(first.factor, second.factor, rtol=1e-9)
    np.testing.assert_allclose(first.variance, second.variance, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_predicted_error_is_that_of_generate(schedule, eta):
    """A law with a basis of two and a residual; averages over 4,000 walks of each image."""
    grid, images = paper_grid(500, 40), torch.from_numpy(RNG.uniform(-1, 1, (3, 1, 1, 5)))
    many = images.repeat_interleave(4_000, dim=0)
    back = walk_back(LAW, schedule, many, grid, eta=eta)
    errors = (back - many).square().mean((1, 2, 3)).view(3, -1)
    predicted = eta_mse(LAW, images, schedule, eta=eta, timesteps=grid)
    allowed = 4 * errors.std(1) / np.sqrt(4_000) + 1e-12
    assert ((errors.mean(1) - predicted).abs() <= allowed).all()


def test_no_noise_loses_nothing_in_the_limit(schedule):
    images = torch.from_numpy(RNG.uniform(-1, 1, (3, 1, 1, 5)))
    assert eta_mse(LAW, images, schedule, eta=0, t0=500).abs().max() == 0


def test_heldout_samples_correct_the_spectrum_of_few():
    true = torch.diag(torch.linspace(1, 0.05, 40).double().sqrt())
    draws = torch.from_numpy(RNG.standard_normal((1_020, 40))) @ true
    few, law = GaussianLaw.fit(draws[:20]), GaussianLaw.fit(draws[:20], heldout=draws[20:])
    assert few.residual == 0
    assert few.eigenvalues[0] > 1.5 * law.eigenvalues[0]  # 20 samples overrate the first
    total = law.eigenvalues.sum() + (40 - len(law.eigenvalues)) * law.residual
    assert total.item() == pytest.approx(true.square().sum().item(), rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.1, "t0": 500}, r"eta is 1\.1"),
        ({"eta": 0.1}, "give t0 for the limit"),
        ({"eta": 0.1, "t0": 500, "timesteps": [0, 500]}, "give t0 for the limit"),
        ({"eta": 0.1, "timesteps": [500, 0]}, "put lower levels first"),
        ({"eta": 0.1, "t0": 5, "t_start": 5}, "put lower levels first"),
        ({"eta": 0.1, "t0": 5_000}, r"must lie in \[0, 999\]"),
    ],
)
def test_wrong_levels_and_etas_are_named(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        eta_response([0.1], schedule, **options)


def test_a_negative_variance_is_refused(schedule):
    with pytest.raises(ValueError, match="smallest variance -1"):
        eta_response([-1.0, 1.0], schedule, eta=0.1, t0=500)
