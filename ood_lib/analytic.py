"""Models whose noise prediction, flow and latents are known exactly: the oracle of the tests.

With ``xbar = x_t / sqrt(alpha_bar_t)`` the deterministic path is ``d xbar / d sigma = eps``. For
Gaussian data N(m, C) it is affine along each eigenvector of C:
``xbar - m`` scales as ``sqrt(lambda + sigma^2)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule

__all__ = ["GaussianLaw", "MixtureLaw", "analytic_model", "exact_latent"]


@dataclass(frozen=True)
class GaussianLaw:
    """A Gaussian over images with a low-rank-plus-isotropic covariance.

    The covariance is ``U diag(eigenvalues) U^T + residual (I - U U^T)``; it is never formed.

    Parameters
    ----------
    mean : Tensor of shape (d,)
        float64.
    basis : Tensor of shape (d, r)
        Orthonormal columns U, float64.
    eigenvalues : Tensor of shape (r,)
        Variances along the columns, float64.
    residual : float, default 0.0
        Variance of every other direction.

    Examples
    --------
    >>> law = GaussianLaw(torch.zeros(2).double(), torch.eye(2).double(), torch.tensor([1.0, 4.0]).double())
    >>> law.dim
    2
    """

    mean: torch.Tensor
    basis: torch.Tensor
    eigenvalues: torch.Tensor
    residual: float = 0.0

    @classmethod
    def fit(cls, samples: torch.Tensor) -> GaussianLaw:
        """Mean and empirical covariance of ``(n, d)`` samples, through a thin SVD."""
        flat = samples.double()
        mean = flat.mean(0)
        _, s, v = torch.linalg.svd(flat - mean, full_matrices=False)
        keep = s > s[0] * 1e-9
        return cls(mean, v[keep].T.contiguous(), s[keep] ** 2 / (len(flat) - 1))

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return len(self.mean)

    def _scale(self, y: torch.Tensor, along: torch.Tensor, rest: float) -> torch.Tensor:
        """Multiply centred rows by `along` in the basis and by `rest` outside it."""
        return rest * y + ((y @ self.basis) * (along - rest)) @ self.basis.T

    def eps(self, xbar: torch.Tensor, sigma: float) -> torch.Tensor:
        """Optimal noise prediction ``sigma (C + sigma^2)^-1 (xbar - m)`` for rows (N, d)."""
        along = sigma / (self.eigenvalues + sigma**2)
        return self._scale(xbar - self.mean, along, sigma / (self.residual + sigma**2))

    def flow(self, xbar: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
        """Exact deterministic path of rows (N, d) from one noise level to another."""
        along = torch.sqrt((self.eigenvalues + sigma_to**2) / (self.eigenvalues + sigma_from**2))
        rest = float(np.sqrt((self.residual + sigma_to**2) / (self.residual + sigma_from**2)))
        return self.mean + self._scale(xbar - self.mean, along, rest)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n` rows (n, d)."""
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.mean + self._scale(z, self.eigenvalues.sqrt(), float(np.sqrt(self.residual)))


@dataclass(frozen=True)
class MixtureLaw:
    """A mixture of isotropic Gaussians: data whose exact flow is not affine.

    Parameters
    ----------
    means : Tensor of shape (K, d)
        Centres, float64.
    variances : Tensor of shape (K,)
        Variance of every coordinate in each component, float64.
    weights : Tensor of shape (K,)
        Probabilities, float64.

    Examples
    --------
    >>> two = MixtureLaw(torch.tensor([[-1.0], [1.0]]).double(), torch.full((2,), 0.01).double(),
    ...                  torch.full((2,), 0.5).double())
    >>> two.eps(torch.zeros(1, 1).double(), 0.5).item()
    0.0
    """

    means: torch.Tensor
    variances: torch.Tensor
    weights: torch.Tensor

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return self.means.shape[1]

    def eps(self, xbar: torch.Tensor, sigma: float) -> torch.Tensor:
        """Optimal noise prediction ``-sigma grad log p_sigma(xbar)`` for rows (N, d)."""
        spread = self.variances + sigma**2
        gaps = xbar[:, None, :] - self.means
        logits = (
            self.weights.log()
            - 0.5 * self.dim * spread.log()
            - 0.5 * gaps.square().sum(-1) / spread
        )
        share = torch.softmax(logits, dim=1)
        return sigma * ((share / spread)[..., None] * gaps).sum(1)


def analytic_model(
    law: GaussianLaw | MixtureLaw,
    schedule: NoiseSchedule,
    *,
    sample_shape: tuple[int, int, int] | None = None,
    name: str = "analytic",
) -> FrozenModel:
    """Wrap a law as a model that every function of the library takes.

    Parameters
    ----------
    law : GaussianLaw or MixtureLaw
        The law of the data.
    schedule : NoiseSchedule
        The noise schedule.
    sample_shape : tuple of int, optional
        (C, H, W) with C * H * W = d; (1, 1, d) by default.
    name : str, default "analytic"
        Name of the model.

    Returns
    -------
    FrozenModel
        Family "analytic"; its ``eps`` is exact, in float64.

    Raises
    ------
    ValueError
        If `sample_shape` does not hold d numbers.

    Examples
    --------
    >>> law = GaussianLaw(torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double())
    >>> model = analytic_model(law, NoiseSchedule(np.linspace(0.99, 0.01, 100)))
    >>> model.eps(torch.ones(2, 1, 1, 4), 50).shape
    torch.Size([2, 1, 1, 4])
    """
    shape = sample_shape or (1, 1, law.dim)
    if int(np.prod(shape)) != law.dim:
        raise ValueError(f"sample_shape {shape} does not hold the law's {law.dim} numbers")

    def predict(x_t: torch.Tensor, t: float) -> torch.Tensor:
        sigma, signal = float(schedule.sigma(t)), float(np.sqrt(schedule.alpha_bar_at(t)))
        return law.eps(x_t.double().flatten(1) / signal, sigma).view_as(x_t)

    return FrozenModel(name, "analytic", schedule, shape, predict)


def exact_latent(
    law: GaussianLaw,
    schedule: NoiseSchedule,
    images: torch.Tensor,
    *,
    t_start: float = 0.0,
    t_end: float | None = None,
) -> torch.Tensor:
    """Carry images along the exact path of a Gaussian law, from one timestep to another.

    Parameters
    ----------
    law : GaussianLaw
        The law that the model knows.
    schedule : NoiseSchedule
        The noise schedule.
    images : Tensor of shape (N, C, H, W)
        States at `t_start`, of any law.
    t_start : float, default 0
        Where the images stand; level 0, as in the paper.
    t_end : float, optional
        Level of the latents; T - 1 by default.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        float64 latents, without any error of a solver.

    Raises
    ------
    ValueError
        If a timestep lies outside [0, T - 1].

    Examples
    --------
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> latent = exact_latent(law, schedule, torch.ones(1, 1, 1, 4))
    >>> bool((latent - 1).abs().max() < 1e-4)
    True
    """
    end = schedule.num_train_timesteps - 1 if t_end is None else t_end
    levels = np.array([t_start, end])
    sigma, signal = schedule.sigma(levels), np.sqrt(schedule.alpha_bar_at(levels))
    there = law.flow(images.double().flatten(1) / signal[0], float(sigma[0]), float(sigma[1]))
    return (there * signal[1]).view_as(images)
