"""The variational bound against torch.distributions, diffusers and sums over all pixel values."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from ood_lib.losses import hybrid_loss, level_terms, level_weight, simple_loss, variational_terms

LEARNED = {"variance_type": "learned_range"}
SCHEDULERS = [
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", **LEARNED),
    DDPMScheduler(beta_schedule="linear", **LEARNED),
]
IDS = ["cosine", "linear"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=IDS)
@pytest.mark.parametrize("t", [1, 20, 500, 900])
def test_a_term_is_the_divergence_of_two_gaussians(scheduler, t):
    """Means and variances are written out from eq. 7 to 10 of the DDPM paper, in float64."""
    betas = scheduler.betas.double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    x0, noise, eps, v = (draw(2, 1, 4, 4, seed=s).double() for s in range(4))
    x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * noise
    to_x0 = alpha_bar[t - 1].sqrt() * betas[t] / (1 - alpha_bar[t])
    to_x_t = (1 - betas[t]).sqrt() * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    posterior = betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    predicted = (x_t - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
    log_var = (v + 1) / 2 * betas[t].log() + (1 - v) / 2 * posterior.log()
    true = Normal(to_x0 * x0 + to_x_t * x_t, posterior.sqrt())
    model = Normal(to_x0 * predicted + to_x_t * x_t, (log_var / 2).exp())
    expected = kl_divergence(true, model).flatten(1).mean(1) / math.log(2)
    ours = variational_terms(eps, v, noise, x0, torch.full((2,), t), scheduler)
    np.testing.assert_allclose(ours, expected, rtol=2e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=IDS)
@pytest.mark.parametrize("t", [1, 300, 998])
def test_the_variance_is_the_one_diffusers_samples_with(scheduler, t):
    v = torch.linspace(-1, 1, 5)
    terms = level_terms(torch.tensor([t]), scheduler)
    ours = (
        terms.log_posterior.squeeze()
        + (v + 1) / 2 * (terms.log_beta - terms.log_posterior).squeeze()
    )
    theirs = scheduler._get_variance(t, predicted_variance=v, variance_type="learned_range")
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_pixels_of_level_zero_share_out_one():
    scheduler, values = SCHEDULERS[0], torch.arange(256) / 127.5 - 1
    x0 = values.view(-1, 1, 1, 1)
    mean = 0.3  # one model mean for every pixel value: x0 + gap * (noise - eps)
    gap = level_terms(torch.zeros(256, dtype=torch.long), scheduler).mean_gap
    eps = (x0 - mean) / gap
    bits = variational_terms(
        eps,
        torch.ones_like(x0),
        torch.zeros_like(x0),
        x0,
        torch.zeros(256, dtype=torch.long),
        scheduler,
    )
    assert 2 ** (-bits.double()) @ torch.ones(256).double() == pytest.approx(1, abs=1e-4)
    assert abs(float(values[bits.argmin()]) - mean) < 1 / 127.5


def test_perfect_noise_and_the_posterior_variance_cost_nothing():
    x = draw(3, 1, 4, 4)
    terms = variational_terms(x, x * 0 - 1, x, x, torch.tensor([1, 400, 999]), SCHEDULERS[0])
    assert terms.abs().max() < 1e-6


def test_the_bound_trains_the_variances_only():
    noise, x0, t = draw(2, 1, 4, 4, seed=1), draw(2, 1, 4, 4, seed=2), torch.tensor([30, 700])
    out = torch.cat([draw(2, 1, 4, 4, seed=3), draw(2, 1, 4, 4, seed=4)], 1).requires_grad_()
    hybrid_loss(out, noise, x0, t, SCHEDULERS[0]).backward()
    eps = out.detach()[:, :1].requires_grad_()
    simple_loss(eps, noise).backward()
    assert torch.equal(out.grad[:, :1], eps.grad)
    assert (out.grad[:, 1:] != 0).all()


def test_the_hybrid_loss_adds_a_thousandth_of_the_bound():
    noise, x0, t = draw(2, 1, 4, 4, seed=1), draw(2, 1, 4, 4, seed=2), torch.tensor([30, 700])
    eps, v = draw(2, 1, 4, 4, seed=3), draw(2, 1, 4, 4, seed=4)
    whole = hybrid_loss(torch.cat([eps, v], 1), noise, x0, t, SCHEDULERS[0])
    bound = 1000 * variational_terms(eps, v, noise, x0, t, SCHEDULERS[0]).mean()
    assert whole.item() == pytest.approx((simple_loss(eps, noise) + 0.001 * bound).item(), rel=1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=IDS)
def test_weight_one_is_the_error_of_v(scheduler):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, written out (arXiv:2202.00512)."""
    t = torch.tensor([0, 300, 990])
    x0, noise, eps = (draw(3, 1, 4, 4, seed=s).double() for s in range(3))
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def v_of(e):
        return (
            alpha_bar.sqrt() * e
            - (1 - alpha_bar).sqrt() * (x_t - (1 - alpha_bar).sqrt() * e) / alpha_bar.sqrt()
        )

    expected = (v_of(eps) - v_of(noise)).square().flatten(1).mean(1)
    weight = level_weight(t, scheduler, 1.0)
    ours = [simple_loss(eps[k], noise[k], weight=weight[k]) for k in range(3)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_weights_are_one_at_power_zero_and_stop_growing_at_the_last_level_sampled():
    t = torch.arange(1000)
    assert (level_weight(t, SCHEDULERS[0], 0.0) == 1).all()
    weights = level_weight(t, SCHEDULERS[0], 0.5).flatten()
    assert weights[0] == pytest.approx(1, abs=1e-4)
    assert (weights.diff() >= 0).all()
    assert weights[-1] == pytest.approx(160, rel=1e-4)


def test_the_weight_scales_the_simple_loss_and_leaves_the_bound_alone():
    t = torch.tensor([10, 700])
    x0, noise, eps, v = (draw(2, 1, 4, 4, seed=s) for s in range(4))
    out = torch.cat([eps, v], 1)
    plain, doubled = (
        hybrid_loss(out, noise, x0, t, SCHEDULERS[0], weight=w).item() for w in (1.0, 2.0)
    )
    assert doubled - plain == pytest.approx(simple_loss(eps, noise).item(), rel=1e-4)
