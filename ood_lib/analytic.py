"""Models whose noise prediction, flow and latents are known exactly: the oracle of the tests.

With ``xbar = x_t / sqrt(alpha_bar_t)`` the deterministic path is ``d xbar / d sigma = eps``. For
Gaussian data N(m, C) it is affine along each eigenvector of C:
``xbar - m`` scales as ``sqrt(lambda + sigma^2)``. Fresh noise on the way back (eta > 0) multiplies the
whitened deviation by ``r`` and fills the rest up with noise of the data's own covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule

__all__ = [
    "EtaResponse",
    "GaussianLaw",
    "MixtureLaw",
    "analytic_model",
    "eta_mse",
    "eta_response",
    "euler_gain",
    "exact_latent",
    "forward_law",
    "latent_law",
    "rms_size",
    "wasserstein",
]


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
    def fit(cls, samples: torch.Tensor, *, heldout: torch.Tensor | None = None) -> GaussianLaw:
        """Mean and covariance of ``(n, d)`` samples, through a thin SVD.

        The variances are those of the samples, and 0 outside their span. With ``(m, d)`` held-out
        samples they are those of the held-out ones along the same directions, and outside the span
        their mean variance: fewer samples than coordinates overrate the former and hide the latter.
        """
        flat = samples.double()
        mean = flat.mean(0)
        _, s, v = torch.linalg.svd(flat - mean, full_matrices=False)
        keep = s > s[0] * 1e-9
        law = cls(mean, v[keep].T.contiguous(), s[keep] ** 2 / (len(flat) - 1))
        return law if heldout is None else cls(mean, law.basis, *law._second_moments(heldout))

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return len(self.mean)

    def _second_moments(self, samples: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Mean square of rows about the mean: along each column of the basis, and of one other direction."""
        along, rest = self._squares(samples)
        others = self.dim - self.basis.shape[1]
        return along.mean(0), float(rest.mean()) / others if others else 0.0

    def _squares(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared deviations of rows (N, d): along the basis (N, r), and all the rest together (N,)."""
        y = rows.double() - self.mean
        along = (y @ self.basis).square()
        return along, (y.square().sum(1) - along.sum(1)).clamp(min=0)

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


@dataclass(frozen=True)
class EtaResponse:
    """What a stochastic way back leaves of an image, direction by direction.

    Parameters
    ----------
    factor : ndarray of shape (k,)
        The part r of the image's deviation from the mean that returns; 1 is all of it.
    variance : ndarray of shape (k,)
        Variance of the noise beside it.

    Examples
    --------
    >>> EtaResponse(np.array([0.9]), np.array([0.1])).factor
    array([0.9])
    """

    factor: np.ndarray
    variance: np.ndarray


def _levels(
    schedule: NoiseSchedule, t0: float | None, t_start: float, timesteps: np.ndarray | None
) -> np.ndarray:
    """Timesteps from the image to the latent: the two ends, or a whole grid."""
    if (t0 is None) == (timesteps is None):
        raise ValueError(
            f"t0 is {t0} and timesteps are {'not ' if timesteps is None else ''}given; give t0 for the "
            "limit of many steps, or timesteps for the steps of a grid"
        )
    levels = np.array([t_start, t0] if timesteps is None else timesteps, dtype=np.float64)
    if levels.ndim != 1 or len(levels) < 2 or (np.diff(levels) <= 0).any():
        raise ValueError(
            f"the levels {levels} do not rise from the image to the latent; put lower levels first"
        )
    return levels


def eta_response(
    eigenvalues: np.ndarray,
    schedule: NoiseSchedule,
    *,
    eta: float,
    t0: float | None = None,
    t_start: float = 0.0,
    timesteps: np.ndarray | None = None,
) -> EtaResponse:
    """Tell what returns of an image, and how much noise, when DDIM walks back with `eta`.

    The model knows a Gaussian law; the walk begins at the exact latent of the image.

    Parameters
    ----------
    eigenvalues : array of shape (k,)
        Variances of the law, one a direction; 0 is allowed.
    schedule : NoiseSchedule
        The noise schedule.
    eta : float
        Share of stochasticity in [0, 1].
    t0 : float, optional
        Level of the latent, for the limit of many steps.
    t_start : float, default 0
        Level of the image, beside `t0`.
    timesteps : array of shape (n,), optional
        Increasing grid from the image to the latent, for its own n - 1 steps.

    Returns
    -------
    EtaResponse
        ``factor`` and ``variance``, in the units of the image.

    Raises
    ------
    ValueError
        If `eta` or a variance is out of range, or not exactly one of `t0` and `timesteps` is given.

    Notes
    -----
    In the limit of many steps the whitened deviation ``w = (xbar - m) / sqrt(lambda + sigma^2)`` is an
    Ornstein-Uhlenbeck process in the time ``eta^2 log(lambda + sigma^2) / 2``, so from level tau to
    level sigma ``r = ((lambda + sigma^2) / (lambda + tau^2))^(eta^2 / 2)`` and the noise has variance
    ``(lambda + sigma^2) (1 - r^2)``: together they keep the law. On a grid, each step of eq. 12 and 16
    of Song et al. (arXiv:2010.02502) from sigma_a to sigma_b multiplies the deviation by
    ``(lambda + sigma_a sqrt(sigma_b^2 - f^2)) / (lambda + sigma_a^2)`` and adds noise of variance
    ``f^2 = eta^2 sigma_b^2 (1 - sigma_b^2 / sigma_a^2)``. Both know the schedule by its noise levels
    alone.

    Examples
    --------
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> eta_response([0.01], schedule, eta=0.1, t0=500).factor.round(3)
    array([0.965])
    >>> from ood_lib.schedule import paper_grid
    >>> eta_response([0.01], schedule, eta=0.1, timesteps=paper_grid(500, 40)).factor.round(3)
    array([0.837])
    """
    lam = np.asarray(eigenvalues, dtype=np.float64)
    if not 0 <= eta <= 1 or (lam < 0).any():
        raise ValueError(
            f"eta is {eta}, the smallest variance {lam.min()}; use 0 <= eta <= 1, >= 0"
        )
    levels = _levels(schedule, t0, t_start, timesteps)
    noise = schedule.sigma(levels) ** 2
    end, start = lam + noise[0], lam + noise[-1]
    if timesteps is None:
        factor = (end / start) ** (eta**2 / 2)
        variance = end * (1 - factor**2)
    else:
        factor, variance = _walk_back(lam, noise[::-1], eta)
        factor = factor * np.sqrt(start / end)  # the exact latent of a deviation of one
    return EtaResponse(factor, variance * float(schedule.alpha_bar_at(levels[0])))


def _walk_back(lam: np.ndarray, noise: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Multiply a deviation of one, and add up noise, over squared noise levels that fall."""
    factor, variance = np.ones_like(lam), np.zeros_like(lam)
    for here, there in pairwise(noise):
        fresh = eta**2 * there * (1 - there / here)
        gain = (lam + np.sqrt(here * (there - fresh))) / (lam + here)
        factor, variance = gain * factor, gain**2 * variance + fresh
    return factor, variance


def eta_mse(
    law: GaussianLaw,
    images: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    eta: float,
    t0: float | None = None,
    t_start: float = 0.0,
    timesteps: np.ndarray | None = None,
) -> torch.Tensor:
    """Predict the squared error of each image when it returns from its exact latent with `eta`.

    Parameters
    ----------
    law : GaussianLaw
        The law that the model knows.
    images : Tensor of shape (N, C, H, W)
        Images of any law.
    schedule, eta, t0, t_start, timesteps
        As in `eta_response`.

    Returns
    -------
    Tensor of shape (N,)
        Expected squared error, mean over the numbers of an image.

    Notes
    -----
    ``sum_i (1 - r_i)^2 y_i^2 + v_i`` over d, with the deviations y_i of the image from the mean and
    `eta_response`'s r_i and v_i: what is lost of the image, and the noise that comes instead.

    Examples
    --------
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> eta_mse(law, torch.ones(1, 1, 1, 4), schedule, eta=0.0, t0=500)
    tensor([0.], dtype=torch.float64)
    """
    levels = _levels(schedule, t0, t_start, timesteps)
    spectrum = np.append(law.eigenvalues.numpy(), law.residual)
    response = eta_response(
        spectrum, schedule, eta=eta, t0=t0, t_start=t_start, timesteps=timesteps
    )
    lost = torch.from_numpy((1 - response.factor) ** 2)
    noise = torch.from_numpy(response.variance)
    signal = float(np.sqrt(schedule.alpha_bar_at(levels[0])))
    along, rest = law._squares(images.double().flatten(1) / signal)
    gone = signal**2 * (along @ lost[:-1] + rest * lost[-1])
    others = law.dim - len(law.eigenvalues)
    return (gone + noise[:-1].sum() + others * noise[-1]) / law.dim


# --------------------------------------------------------------------- laws of the latents of a domain


def latent_law(
    law: GaussianLaw,
    data: GaussianLaw,
    schedule: NoiseSchedule,
    *,
    t_start: float = 0.0,
    t_end: float | None = None,
) -> GaussianLaw:
    """Give the exact law of the latents of Gaussian images, without drawing any.

    Parameters
    ----------
    law : GaussianLaw
        The law that the model knows.
    data : GaussianLaw
        The law of the images, which may be another one.
    schedule : NoiseSchedule
        The noise schedule.
    t_start, t_end : float
        As in `exact_latent`.

    Returns
    -------
    GaussianLaw
        Law of the states at `t_end`, with at most r + r' directions of their own for the r and r' of
        the two laws.

    Raises
    ------
    ValueError
        If a timestep lies outside [0, T - 1], or the laws differ in dimension.

    Notes
    -----
    The path is affine, ``xbar -> m + A (xbar - m)`` with
    ``A = (C + sigma_end^2)^(1/2) (C + sigma_start^2)^(-1/2)``, so images N(m', C') become
    ``N(m + A (m' - m), A C' A^T)`` in the variable xbar.

    Examples
    --------
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> wide = GaussianLaw(law.mean + 1, law.basis, 4 * law.eigenvalues)
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> latent_law(law, wide, schedule).eigenvalues.numpy().round(3)
    array([4., 4., 4., 4.])
    """
    _check_dimensions(law, data)
    end = schedule.num_train_timesteps - 1 if t_end is None else t_end
    levels = np.array([t_start, end])
    sigma, signal = schedule.sigma(levels).tolist(), np.sqrt(schedule.alpha_bar_at(levels)).tolist()
    shrink = signal[1] / signal[0]
    grown = shrink**2 * (law.eigenvalues + sigma[1] ** 2) / (law.eigenvalues + sigma[0] ** 2)
    rest = shrink**2 * (law.residual + sigma[1] ** 2) / (law.residual + sigma[0] ** 2)
    carried = law._scale(data.basis.T, grown.sqrt(), rest**0.5).T
    columns = torch.cat([carried, law.basis], dim=1)
    weights = torch.cat([data.eigenvalues - data.residual, data.residual * (grown - rest)])
    mean = signal[1] * law.flow(data.mean[None] / signal[0], *sigma)[0]
    return _from_columns(mean, columns, weights, data.residual * rest)


def _check_dimensions(a: GaussianLaw, b: GaussianLaw) -> None:
    if a.dim != b.dim:
        raise ValueError(
            f"the laws have {a.dim} and {b.dim} dimensions; give two laws of one dimension"
        )


def _from_columns(
    mean: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor, residual: float
) -> GaussianLaw:
    """Make the law with covariance ``columns diag(weights) columns^T + residual I``."""
    q, r = torch.linalg.qr(columns)
    values, vectors = torch.linalg.eigh((r * weights) @ r.T)
    return GaussianLaw(mean, q @ vectors, (values + residual).clamp(min=0), residual)


def forward_law(data: GaussianLaw, schedule: NoiseSchedule, t: float) -> GaussianLaw:
    """Give the law of Gaussian images with the noise of a level added: no model takes part.

    Parameters
    ----------
    data : GaussianLaw
        The law of the images.
    schedule : NoiseSchedule
        The noise schedule.
    t : float
        The level.

    Returns
    -------
    GaussianLaw
        ``N(a m, a^2 C + s^2 I)`` with ``a^2 = alpha_bar`` and ``s^2 = 1 - alpha_bar``.

    Notes
    -----
    The average over the images of ``N(a x_0, s^2 I)``, which every sigma of Song et al.
    (arXiv:2010.02502, Lemma 1) shares.

    Examples
    --------
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.ones, torch.eye, torch.ones)))
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> forward_law(law, schedule, 999).eigenvalues.numpy().round(6)
    array([1., 1., 1., 1.])
    """
    share = float(schedule.alpha_bar_at(t))
    variances = share * data.eigenvalues + 1 - share
    return GaussianLaw(
        share**0.5 * data.mean, data.basis, variances, share * data.residual + 1 - share
    )


def rms_size(law: GaussianLaw) -> float:
    """Root mean square norm of draws of a law.

    Parameters
    ----------
    law : GaussianLaw
        The law.

    Returns
    -------
    float
        Square root of ``|m|^2 + tr C``.

    Examples
    --------
    >>> rms_size(GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones))))
    2.0
    """
    others = law.dim - len(law.eigenvalues)
    square = law.mean.square().sum() + law.eigenvalues.sum() + others * law.residual
    return float(square.sqrt())


def wasserstein(a: GaussianLaw, b: GaussianLaw) -> float:
    """2-Wasserstein distance of two Gaussian laws, in the units of their draws.

    Parameters
    ----------
    a, b : GaussianLaw
        Laws of equal dimension d, with r and r' directions of their own.

    Returns
    -------
    float
        The least root mean square distance at which draws of one can be paired with draws of the
        other.

    Raises
    ------
    ValueError
        If the laws differ in dimension.

    Notes
    -----
    ``|m - m'|^2 + tr(C + C' - 2 (C^(1/2) C' C^(1/2))^(1/2))``, Dowson and Landau, J. Multivariate
    Analysis 12, 1982. Only the joint span of both bases is formed, at most (r + r') squared; outside
    it both covariances are multiples of the identity.

    Examples
    --------
    >>> a = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> round(wasserstein(a, GaussianLaw(a.mean, a.basis, 4 * a.eigenvalues)), 6)
    2.0
    """
    if a.dim != b.dim:
        raise ValueError(
            f"the laws have {a.dim} and {b.dim} dimensions; compare laws of equal ones"
        )
    span = torch.linalg.qr(torch.cat([a.basis, b.basis], dim=1)).Q
    roots = [_root_within(law, span) for law in (a, b)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    inside = sum(root.square().sum() for root in roots) - 2 * overlap
    outside = (a.dim - span.shape[1]) * (a.residual**0.5 - b.residual**0.5) ** 2
    return float(((a.mean - b.mean).square().sum() + inside.clamp(min=0) + outside).sqrt())


def _root_within(law: GaussianLaw, span: torch.Tensor) -> torch.Tensor:
    """Symmetric root of a covariance, in the coordinates of a span that holds the law's basis."""
    own = span.T @ law.basis
    rest = law.residual**0.5
    return (own * (law.eigenvalues.sqrt() - rest)) @ own.T + rest * torch.eye(len(own)).double()


def euler_gain(
    eigenvalues: np.ndarray, schedule: NoiseSchedule, *, timesteps: np.ndarray
) -> np.ndarray:
    """Tell what DDIM inversion on a grid leaves of each deviation, relative to the exact latent.

    Parameters
    ----------
    eigenvalues : array of shape (k,)
        Variances of the law that the model knows, one a direction; 0 is allowed.
    schedule : NoiseSchedule
        The noise schedule.
    timesteps : array of shape (n,)
        Increasing grid from the image to the latent.

    Returns
    -------
    ndarray of shape (k,)
        Gain G in (0, 1]: 1 is the exact latent. The way back on the same grid multiplies by G again,
        so a round trip returns ``G^2`` of the deviation.

    Raises
    ------
    ValueError
        If a variance is negative or the grid does not rise.

    Notes
    -----
    A step from sigma_a to sigma_b, in either direction, multiplies the deviation by
    ``(lambda + sigma_a sigma_b) / (lambda + sigma_a^2)``; the path by
    ``sqrt((lambda + sigma_b^2) / (lambda + sigma_a^2))``. Their ratio is the same both ways: the cosine
    of the angle that ``arctan(sigma / sqrt(lambda))`` turns by.

    Examples
    --------
    >>> from ood_lib.schedule import paper_grid
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> euler_gain([1e-4, 1e-2, 1.0], schedule, timesteps=paper_grid()).round(3)
    array([0.828, 0.876, 0.979])
    """
    lam = np.asarray(eigenvalues, dtype=np.float64)
    if (lam < 0).any():
        raise ValueError(f"the smallest variance is {lam.min()}; a variance is 0 or more")
    sigma = schedule.sigma(_levels(schedule, None, 0.0, timesteps))
    angles = np.arctan2(sigma, np.sqrt(lam)[:, None])
    return np.cos(np.diff(angles, axis=1)).prod(axis=1)
