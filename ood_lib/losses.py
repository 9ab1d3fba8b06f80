"""Training losses: the simple loss of DDPM, the hybrid loss of iDDPM with learned variances."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from ood_lib.schedule import SIGMA_END

__all__ = [
    "LevelTerms",
    "hybrid_loss",
    "level_terms",
    "level_weight",
    "simple_loss",
    "variational_terms",
]

HALF_BIN = 1 / 255  # half the distance of two neighbouring pixel values in [-1, 1]
VLB_WEIGHT = 1e-3


class LevelTerms(NamedTuple):
    """What one step of the reverse chain is made of, for a batch of timesteps; each (B, 1, 1, 1).

    `mean_gap` is the factor from an error in eps to an error in the mean of the step; `log_beta` and
    `log_posterior` are the two bounds of its log variance.
    """

    mean_gap: torch.Tensor
    log_beta: torch.Tensor
    log_posterior: torch.Tensor


def level_terms(t: torch.Tensor, scheduler: DDPMScheduler) -> LevelTerms:
    """Read the terms of the reverse steps ``t -> t - 1`` off a noise schedule.

    Parameters
    ----------
    t : Tensor of shape (B,)
        Integer timesteps.
    scheduler : DDPMScheduler
        Gives the betas.

    Returns
    -------
    LevelTerms
        At t = 0 the posterior variance is that of t = 1, since its own is zero.

    Notes
    -----
    Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021,
    arXiv:2102.09672, eq. 9 to 11 and 15.

    Examples
    --------
    >>> terms = level_terms(torch.tensor([0, 500]), DDPMScheduler())
    >>> bool((terms.log_posterior <= terms.log_beta).all())
    True
    """
    betas = scheduler.betas.double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
    posterior = betas * (1 - previous) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    gap = betas / ((1 - betas) * (1 - alpha_bar)).sqrt()
    terms = (table[t.cpu()].float().to(t.device) for table in (gap, betas.log(), posterior.log()))
    return LevelTerms(*(term[:, None, None, None] for term in terms))


def level_weight(t: torch.Tensor, scheduler: DDPMScheduler, power: float) -> torch.Tensor:
    """Weigh the levels of noise: ``alpha_bar_t ** -power``.

    Parameters
    ----------
    t : Tensor of shape (B,)
        Integer timesteps.
    scheduler : DDPMScheduler
        Gives the betas.
    power : float
        0 weighs all levels alike; 1 turns the error of eps into that of v; 0.5 lies between.

    Returns
    -------
    Tensor of shape (B, 1, 1, 1)
        Weights from 1 up. Levels beyond sigma = 160, which no sampler here visits, weigh as that one.

    Notes
    -----
    An error of eps is multiplied by sigma in the image that it implies, so the colour and the layout of
    an image hang on levels that the simple loss hardly sees. For v see Salimans and Ho, Progressive
    Distillation, ICLR 2022, arXiv:2202.00512, sec. 4 and appendix D: ``|v - v'|^2 = |eps - eps'|^2 /
    alpha_bar``.

    Examples
    --------
    >>> level_weight(torch.tensor([0, 999]), DDPMScheduler(), 0.5).flatten().round().tolist()
    [1.0, 157.0]
    """
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0).clamp_min(1 / (1 + SIGMA_END**2))
    return (alpha_bar**-power)[t.cpu()].float().to(t.device)[:, None, None, None]


def simple_loss(
    out: torch.Tensor, noise: torch.Tensor, *, weight: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Mean squared error of the predicted noise.

    Parameters
    ----------
    out : Tensor of shape (B, C, H, W)
        Predicted noise.
    noise : Tensor of shape (B, C, H, W)
        The noise that was added.
    weight : Tensor of shape (B, 1, 1, 1) or float, default 1.0
        Weight of each image, for example from `level_weight`.

    Returns
    -------
    Tensor
        A scalar.

    Notes
    -----
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv:2006.11239,
    eq. 14 with weight 1.

    Examples
    --------
    >>> simple_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), weight=2.0).item()
    2.0
    """
    return (weight * (out - noise).square()).mean()


def _decoder_bits(x0: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Bits of the pixels under a Gaussian cut into 256 bins, the outer two open."""
    scale = torch.exp(-0.5 * log_var)
    upper = torch.special.ndtr((x0 + HALF_BIN - mean) * scale)
    lower = torch.special.ndtr((x0 - HALF_BIN - mean) * scale)
    upper = torch.where(x0 > 1 - HALF_BIN, 1.0, upper)
    lower = torch.where(x0 < -1 + HALF_BIN, 0.0, lower)
    return -(upper - lower).clamp_min(1e-12).log2()


def variational_terms(
    eps: torch.Tensor,
    v: torch.Tensor,
    noise: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    scheduler: DDPMScheduler,
) -> torch.Tensor:
    """Compute the terms ``L_t`` of the variational bound, in bits per dimension.

    Parameters
    ----------
    eps : Tensor of shape (B, C, H, W)
        Predicted noise.
    v : Tensor of shape (B, C, H, W)
        Predicted place of the log variance between its bounds, -1 for the lower, 1 for the upper.
    noise : Tensor of shape (B, C, H, W)
        The noise that was added.
    x0 : Tensor of shape (B, C, H, W)
        The images, in [-1, 1].
    t : Tensor of shape (B,)
        Integer timesteps.
    scheduler : DDPMScheduler
        Gives the betas.

    Returns
    -------
    Tensor of shape (B,)
        The divergence of the model's reverse step from the posterior; at t = 0 the cost of the
        pixels. Means of the two differ by `mean_gap` times the error in eps.

    Notes
    -----
    Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 4 to 7 and 15.

    Examples
    --------
    >>> x = torch.zeros(1, 1, 8, 8)
    >>> variational_terms(x, x - 1, x, x, torch.tensor([500]), DDPMScheduler()).item()
    0.0
    """
    terms = level_terms(t, scheduler)
    log_var = terms.log_posterior + (v + 1) / 2 * (terms.log_beta - terms.log_posterior)
    error = terms.mean_gap * (noise - eps)
    ratio = terms.log_posterior - log_var
    kl = 0.5 * (ratio.exp() - 1 - ratio + error.square() * (-log_var).exp()) / math.log(2)
    # At t = 0 the mean with the true noise is x0 itself, so the model's own is x0 + error.
    bits = _decoder_bits(x0, x0 + error, log_var)
    return torch.where((t == 0)[:, None, None, None], bits, kl).flatten(1).mean(1)


def hybrid_loss(
    out: torch.Tensor,
    noise: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    scheduler: DDPMScheduler,
    *,
    weight: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Add 0.001 times the variational bound to the simple loss; the bound trains only the variances.

    Parameters
    ----------
    out : Tensor of shape (B, 2C, H, W)
        Predicted noise, then the place of the log variance between its bounds.
    noise : Tensor of shape (B, C, H, W)
        The noise that was added.
    x0 : Tensor of shape (B, C, H, W)
        The images, in [-1, 1].
    t : Tensor of shape (B,)
        Integer timesteps, drawn uniformly.
    scheduler : DDPMScheduler
        Gives the betas and T.
    weight : Tensor of shape (B, 1, 1, 1) or float, default 1.0
        Weight of each image in the simple loss; the bound keeps its own.

    Returns
    -------
    Tensor
        A scalar.

    Notes
    -----
    Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16; the bound is estimated by T times the mean
    of ``L_t``, with the gradient stopped at eps.

    Examples
    --------
    >>> x = torch.zeros(2, 1, 8, 8)
    >>> hybrid_loss(torch.cat([x, x - 1], 1), x, x, torch.tensor([5, 500]), DDPMScheduler()).item()
    0.0
    """
    eps, v = out.chunk(2, dim=1)
    bound = variational_terms(eps.detach(), v, noise, x0, t, scheduler).mean() * len(
        scheduler.betas
    )
    return simple_loss(eps, noise, weight=weight) + VLB_WEIGHT * bound
