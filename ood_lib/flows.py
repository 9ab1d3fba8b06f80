"""What a flow keeps and what it changes: numerical flow maps, divergences, folding, Gaussian laws.

With ``xbar = x_t / sqrt(alpha_bar_t)`` the deterministic path is ``d xbar / d sigma = eps(xbar, sigma)``.
Walked exactly it is a diffeomorphism f, so a density moves as ``log p(f(x)) = log p(x) - log|det J_f(x)|``
and a ratio of two densities does not move at all. Walked in Euler steps it can fold. Everything here is
for laws of few coordinates, whose densities are known: Jacobians of d x d are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ood_lib.analytic import GaussianLaw, MixtureLaw
from ood_lib.separability import auroc

__all__ = [
    "PRIOR_LAWS",
    "EulerWalk",
    "FlowMap",
    "RootGaussian",
    "Separation",
    "add_noise",
    "draw",
    "euler_walk",
    "flow",
    "flow_map",
    "frechet_distance",
    "gaussian_pair",
    "log_density",
    "prior_law",
    "product_law",
    "quantile_map",
    "separation",
    "shares_latent",
    "simple_scores",
]

Law = GaussianLaw | MixtureLaw


# ---------------------------------------------------------------------------------------- mixtures


def _log_parts(law: MixtureLaw, xbar: torch.Tensor, sigma: float) -> torch.Tensor:
    """Log of weight times density of each component, (N, K)."""
    spread = law.variances + sigma**2
    squares = (xbar[:, None, :] - law.means).square().sum(-1) / spread
    return law.weights.log() - 0.5 * (law.dim * (2 * torch.pi * spread).log() + squares)


def log_density(law: Law, xbar: torch.Tensor, sigma: float = 0.0) -> torch.Tensor:
    """Log density of a law with noise of size `sigma` added.

    Parameters
    ----------
    law : GaussianLaw or MixtureLaw
        The law without noise; a GaussianLaw of any number of coordinates.
    xbar : Tensor of shape (N, d)
        Where, in units of the data.
    sigma : float, default 0
        Noise over signal; above 0 for a GaussianLaw, whose covariance may be singular without.

    Returns
    -------
    Tensor of shape (N,)
        Natural logarithms; ``-sigma`` times the gradient is ``law.eps``.

    Raises
    ------
    ValueError
        If `sigma` is not above 0 for a GaussianLaw.

    Examples
    --------
    >>> law = MixtureLaw(torch.zeros(1, 1).double(), torch.ones(1).double(), torch.ones(1).double())
    >>> round(log_density(law, torch.zeros(1, 1).double()).item(), 4)
    -0.9189
    """
    if isinstance(law, MixtureLaw):
        return torch.logsumexp(_log_parts(law, xbar, sigma), dim=1)
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; the density of a GaussianLaw needs sigma > 0")
    others = law.dim - len(law.eigenvalues)
    log_det = (law.eigenvalues + sigma**2).log().sum() + others * np.log(law.residual + sigma**2)
    squares = ((xbar - law.mean) * law.eps(xbar, sigma)).sum(1) / sigma
    return -0.5 * (squares + log_det + law.dim * np.log(2 * np.pi))


def draw(law: MixtureLaw, n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw from a mixture.

    Parameters
    ----------
    law : MixtureLaw
        The law.
    n : int
        Number of draws.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (n, d)
        float64.

    Examples
    --------
    >>> law = MixtureLaw(torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1).double())
    >>> draw(law, 3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    """
    chosen = torch.multinomial(law.weights, n, replacement=True, generator=generator)
    return add_noise(law.means[chosen], law.variances[chosen, None].sqrt(), generator)


def add_noise(
    xbar: torch.Tensor, sigma: float | torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Walk the stochastic forward process in one step: ``xbar + sigma * noise``.

    Parameters
    ----------
    xbar : Tensor of shape (N, d)
        Data.
    sigma : float or Tensor of shape (N, 1)
        Noise over signal.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (N, d)
        Draws of the kernel N(xbar, sigma^2 I), that is, of N(a x_0, s^2 I) over a.

    Notes
    -----
    Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv:2006.11239, eq. 4.

    Examples
    --------
    >>> add_noise(torch.ones(1, 2), 0.0, torch.Generator())
    tensor([[1., 1.]])
    """
    return xbar + sigma * torch.randn(xbar.shape, generator=generator, dtype=xbar.dtype)


def product_law(factors: Sequence[MixtureLaw]) -> MixtureLaw:
    """Make the law of independent coordinates from the law of each.

    Parameters
    ----------
    factors : sequence of MixtureLaw
        Laws of one coordinate; every component of every factor has the same variance.

    Returns
    -------
    MixtureLaw
        Of ``len(factors)`` coordinates, with a component for each choice of one from every factor.

    Raises
    ------
    ValueError
        If a factor has more coordinates than one, or the variances differ.

    Examples
    --------
    >>> two = MixtureLaw(torch.tensor([[-1.0], [1.0]]).double(), torch.full((2,), 0.01).double(),
    ...                  torch.full((2,), 0.5).double())
    >>> product_law([two, two, two]).means.shape
    torch.Size([8, 3])
    """
    variances = torch.cat([law.variances for law in factors])
    if any(law.dim != 1 for law in factors) or variances.unique().numel() != 1:
        raise ValueError(
            f"the factors have {[law.dim for law in factors]} coordinates and variances "
            f"{variances.unique().tolist()}; use laws of one coordinate that share one variance"
        )
    means, weights = (
        torch.from_numpy(np.array(list(product(*(numbers.double().numpy() for numbers in each)))))
        for each in ([law.means[:, 0] for law in factors], [law.weights for law in factors])
    )
    return MixtureLaw(means, variances[:1].expand(len(means)), weights.prod(1))


# ------------------------------------------------------------------------------------------- flows


@dataclass(frozen=True)
class FlowMap:
    """Where a numerical flow carries points, and how it changes volumes there.

    Parameters
    ----------
    xbar : Tensor of shape (N, d)
        Ends of the paths.
    log_det : Tensor of shape (N,)
        ``log|det J|`` of the numerical map at the starts.

    Examples
    --------
    >>> FlowMap(torch.zeros(1, 2), torch.zeros(1)).log_det
    tensor([0.])
    """

    xbar: torch.Tensor
    log_det: torch.Tensor


def _check_levels(sigmas: np.ndarray) -> np.ndarray:
    levels = np.asarray(sigmas, dtype=np.float64)
    steps = np.diff(levels)
    if levels.ndim != 1 or len(levels) < 2 or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"the noise levels are {levels}; give two or more that rise, or that fall")
    if levels.min() <= 0:
        raise ValueError(f"the smallest noise level is {levels.min()}; use levels above 0")
    return levels


def _rk4(law: Law, x: torch.Tensor, here: float, there: float) -> torch.Tensor:
    """Make one step of the classical Runge-Kutta scheme in the variable log sigma."""
    middle, step = np.sqrt(here * there), np.log(there / here)
    k1 = here * law.eps(x, here)
    k2 = middle * law.eps(x + step / 2 * k1, middle)
    k3 = middle * law.eps(x + step / 2 * k2, middle)
    k4 = there * law.eps(x + step * k3, there)
    return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _euler(law: Law, x: torch.Tensor, here: float, there: float) -> torch.Tensor:
    """Make one DDIM step: Euler in sigma, with eps where the state stands."""
    return x + (there - here) * law.eps(x, here)


SOLVERS = {"rk4": _rk4, "euler": _euler}


def _solver(name: str) -> Callable[..., torch.Tensor]:
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; use {' or '.join(SOLVERS)}")
    return SOLVERS[name]


def flow(law: Law, xbar: torch.Tensor, sigmas: np.ndarray, *, solver: str = "rk4") -> torch.Tensor:
    """Carry points along the deterministic path of a law, step by step.

    Parameters
    ----------
    law : GaussianLaw or MixtureLaw
        The law that the model knows; only ``law.eps`` is called.
    xbar : Tensor of shape (N, d)
        Points at the first level, of any law.
    sigmas : array of shape (n,)
        Noise levels above 0: rising to invert, falling to generate.
    solver : {"rk4", "euler"}, default "rk4"
        "rk4" is of fourth order in log sigma; "euler" is the DDIM step of the paper's loop.

    Returns
    -------
    Tensor of shape (N, d)
        Points at the last level.

    Raises
    ------
    ValueError
        If the levels do not rise or fall, or the solver is unknown.

    Notes
    -----
    The probability-flow path of Song et al., arXiv:2011.13456, in the variables of DDIM
    (arXiv:2010.02502).

    Examples
    --------
    >>> law = MixtureLaw(torch.zeros(1, 1).double(), torch.ones(1).double(), torch.ones(1).double())
    >>> end = flow(law, torch.ones(1, 1).double(), np.geomspace(0.01, 10, 200))
    >>> round(end.item(), 5), round(((1 + 10**2) / (1 + 0.01**2)) ** 0.5, 5)
    (10.04937, 10.04937)
    """
    step = _solver(solver)
    for here, there in pairwise(_check_levels(sigmas).tolist()):
        xbar = step(law, xbar, here=here, there=there)
    return xbar


def _jacobian(
    f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (N, d) and Jacobians (N, d, d) of a map that acts on each row by itself."""
    x = x.detach().requires_grad_()
    y = f(x)
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in y.T]
    return y.detach(), torch.stack(rows, dim=1)


def flow_map(law: Law, xbar: torch.Tensor, sigmas: np.ndarray, *, solver: str = "rk4") -> FlowMap:
    """Carry points as `flow` does, and differentiate the numerical map itself.

    Parameters
    ----------
    law, xbar, sigmas, solver
        As in `flow`.

    Returns
    -------
    FlowMap
        ``xbar`` and ``log_det``: the sum over the steps, each differentiated automatically.

    Raises
    ------
    ValueError
        As in `flow`.

    Examples
    --------
    >>> law = MixtureLaw(torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1).double())
    >>> there = flow_map(law, torch.ones(1, 2).double(), np.geomspace(0.01, 10, 200))
    >>> round(there.log_det.item(), 5), round(float(np.log((1 + 10**2) / (1 + 0.01**2))), 5)
    (4.61502, 4.61502)
    """
    step, total = _solver(solver), torch.zeros(len(xbar), dtype=xbar.dtype)
    for here, there in pairwise(_check_levels(sigmas).tolist()):
        xbar, jacobian = _jacobian(partial(step, law, here=here, there=there), xbar)
        total = total + torch.linalg.slogdet(jacobian).logabsdet
    return FlowMap(xbar, total)


def quantile_map(
    law: MixtureLaw, x: torch.Tensor, sigma_from: float, sigma_to: float
) -> torch.Tensor:
    """Carry points along the path of a law of one coordinate, in closed form.

    Parameters
    ----------
    law : MixtureLaw
        A law of one coordinate.
    x : Tensor of shape (N,)
        Points at `sigma_from`.
    sigma_from, sigma_to : float
        Noise levels.

    Returns
    -------
    Tensor of shape (N,)
        ``F_to^-1(F_from(x))`` with the distribution functions of the noisy laws, found by bisection in
        the logarithm of the smaller tail, to rounding.

    Raises
    ------
    ValueError
        If the law has more coordinates than one.

    Notes
    -----
    In one dimension the flow is increasing and carries one law to the other; there is one such map.
    Where a gap between modes holds less than rounding of the mass the place in it is lost: walk there.

    Examples
    --------
    >>> law = MixtureLaw(torch.zeros(1, 1).double(), torch.ones(1).double(), torch.ones(1).double())
    >>> quantile_map(law, torch.ones(1).double(), 0.0, 3**0.5).round(decimals=9)
    tensor([2.], dtype=torch.float64)
    """
    if law.dim != 1:
        raise ValueError(f"the law has {law.dim} coordinates; a quantile map needs 1")
    both = torch.stack([_log_tail(law, x, sigma_from, side) for side in (1, -1)])
    wanted, place = both.min(dim=0)
    side = 1.0 - 2.0 * place
    grow = ((law.variances + sigma_to**2) / (law.variances + sigma_from**2)).sqrt().max()
    reach = 1 + (x[:, None] - law.means[:, 0]).abs().max() * max(float(grow), 1.0)
    low, high = (torch.full_like(x, float(law.means.mean() + s * 2 * reach)) for s in (-1, 1))
    for _ in range(100):
        middle = (low + high) / 2
        below = side * (_log_tail(law, middle, sigma_to, side) - wanted) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _log_tail(
    law: MixtureLaw, x: torch.Tensor, sigma: float, side: float | torch.Tensor
) -> torch.Tensor:
    """Log probability of less than x (side 1) or of more (side -1), (N,)."""
    side = torch.as_tensor(side, dtype=x.dtype).expand_as(x)
    z = (x[:, None] - law.means[:, 0]) / (law.variances + sigma**2).sqrt()
    parts = torch.special.log_ndtr(side[:, None] * z)
    return torch.logsumexp(law.weights.log() + parts, dim=1)


# ----------------------------------------------------------------------------------------- folding


@dataclass(frozen=True)
class EulerWalk:
    """An Euler path of points, and whether its steps keep space unfolded.

    Parameters
    ----------
    xbar : Tensor of shape (N, d)
        Ends of the paths.
    margin : Tensor of shape (N,)
        Smallest over the steps of ``1 + h lambda``, with the eigenvalues lambda of d eps / d xbar where
        the path stands. A step of inversion is one to one if it is positive everywhere, and is not if it
        is negative anywhere.
    orientation : Tensor of shape (N,)
        Sign of the determinant of the whole map, 1 or -1; -1 where space is turned inside out.

    Examples
    --------
    >>> EulerWalk(torch.zeros(1, 1), torch.ones(1), torch.ones(1)).margin
    tensor([1.])
    """

    xbar: torch.Tensor
    margin: torch.Tensor
    orientation: torch.Tensor


def euler_walk(law: Law, xbar: torch.Tensor, sigmas: np.ndarray) -> EulerWalk:
    """Walk Euler steps and watch their Jacobians.

    Parameters
    ----------
    law, xbar, sigmas
        As in `flow`.

    Returns
    -------
    EulerWalk
        Ends, smallest margin and orientation of each path.

    Raises
    ------
    ValueError
        As in `flow`.

    Notes
    -----
    A step ``x + h eps(x)`` has the Jacobian ``I + h d eps / d xbar``, which is symmetric because eps is
    ``-sigma`` times a gradient. The sign is taken step by step: the product itself falls below what
    floating point can tell from 0 where the flow contracts.

    Examples
    --------
    >>> law = MixtureLaw(torch.tensor([[-0.6], [0.6]]).double(), torch.full((2,), 0.0025).double(),
    ...                  torch.full((2,), 0.5).double())
    >>> walk = euler_walk(law, torch.zeros(1, 1).double(), np.array([0.01, 0.015]))
    >>> walk.margin.item() < 0, walk.orientation.item()
    (True, -1.0)
    """
    margin = torch.full((len(xbar),), torch.inf, dtype=xbar.dtype)
    orientation = torch.ones_like(margin)
    for here, there in pairwise(_check_levels(sigmas).tolist()):
        eps, slopes = _jacobian(partial(law.eps, sigma=here), xbar)
        factors = 1 + (there - here) * torch.linalg.eigvalsh(slopes)
        margin = torch.minimum(margin, factors.amin(1))
        orientation = orientation * factors.sign().prod(1)
        xbar = xbar + (there - here) * eps
    return EulerWalk(xbar, margin, orientation)


def shares_latent(
    law: Law, points: torch.Tensor, sigmas: np.ndarray, *, tolerance: float = 1e-9
) -> torch.Tensor:
    """Tell which points of a line get, by Euler steps, a latent that other points get too.

    Parameters
    ----------
    law : GaussianLaw or MixtureLaw
        A law of one coordinate.
    points : Tensor of shape (N, 1)
        Increasing and dense: what happens between two of them is not seen.
    sigmas : array of shape (n,)
        As in `flow`.
    tolerance : float, default 1e-9
        Smallest overlap that counts, against rounding.

    Returns
    -------
    Tensor of shape (N,)
        Booleans.

    Raises
    ------
    ValueError
        If the points do not increase along one coordinate, or as in `flow`.

    Notes
    -----
    A continuous map of the line that grows at both ends gives y = f(x) more than once exactly if some
    point to the left lies above y or some point to the right below it. Points that met at one step stay
    together for ever, so every step is asked; at the last one rounding would hide what the flow has
    contracted.

    Examples
    --------
    >>> law = MixtureLaw(torch.tensor([[-0.6], [0.6]]).double(), torch.full((2,), 0.0025).double(),
    ...                  torch.full((2,), 0.5).double())
    >>> line = torch.linspace(-1, 1, 201).double()[:, None]
    >>> shares_latent(law, line, np.array([0.01, 0.0101])).any().item()
    False
    >>> shares_latent(law, line, np.array([0.01, 0.015])).any().item()
    True
    """
    if points.ndim != 2 or points.shape[1] != 1 or (points.diff(dim=0) <= 0).any():
        raise ValueError(
            f"points have shape {tuple(points.shape)}; give (N, 1) that increase along the line"
        )
    shared = torch.zeros(len(points), dtype=torch.bool)
    for here, there in pairwise(_check_levels(sigmas).tolist()):
        points = _euler(law, points, here, there)
        y = points[:, 0]
        left, right = y.cummax(0).values, y.flip(0).cummin(0).values.flip(0)
        shared |= (left > y + tolerance) | (right < y - tolerance)
    return shared


# --------------------------------------------------------------------------------- how far two laws are


@dataclass(frozen=True)
class Separation:
    """How far two laws are apart, from their exact log density ratio.

    Parameters
    ----------
    kl : float
        Kullback-Leibler divergence of the out-of-domain law from the in-domain law, in nats.
    total_variation : float
        In [0, 1].
    bayes_error : float
        Smallest error of any classifier where both laws are equally frequent, in [0, 0.5].
    auroc : float
        Area under the curve of the best classifier, the log ratio itself.

    Examples
    --------
    >>> Separation(0.0, 0.0, 0.5, 0.5).bayes_error
    0.5
    """

    kl: float
    total_variation: float
    bayes_error: float
    auroc: float


def separation(id_ratio: torch.Tensor, ood_ratio: torch.Tensor) -> Separation:
    """Estimate divergences from the log ratio of two densities at draws of both.

    Parameters
    ----------
    id_ratio, ood_ratio : Tensor of shape (n,), (m,)
        Log of out-of-domain over in-domain density, at draws of the in-domain law and of the other.

    Returns
    -------
    Separation
        Monte Carlo estimates; the total variation from draws of both laws in equal parts.

    Notes
    -----
    ``KL = E_q log(q/p)``; ``TV = E |p - q| / (p + q) = E |tanh(log(q/p) / 2)|`` over the half-and-half
    mixture of p and q; the Bayes error is ``(1 - TV) / 2``.

    Examples
    --------
    >>> separation(torch.full((4,), -50.0), torch.full((4,), 50.0))
    Separation(kl=50.0, total_variation=1.0, bayes_error=0.0, auroc=1.0)
    """
    both = (id_ratio, ood_ratio)
    variation = float(sum((r / 2).tanh().abs().mean() for r in both) / 2)
    area = auroc(id_ratio.numpy(), ood_ratio.numpy())
    return Separation(float(ood_ratio.mean()), variation, (1 - variation) / 2, area)


def simple_scores(
    fit: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of three classifiers that know no density; higher means more out of domain.

    Parameters
    ----------
    fit : tuple of ndarray of shape (n, d), (m, d)
        In-domain and out-of-domain draws that each classifier is fitted to, its direction included.
    test : tuple of ndarray of shape (k, d), (l, d)
        Draws to score.

    Returns
    -------
    dict of str to tuple of ndarray of shape (k,), (l,)
        "norm": distance to the origin; "mean": distance to the in-domain mean; "linear": the linear
        discriminant of Fisher.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> draws = [rng.normal(size=(2, 200, 3)) + [[[0]], [[2]]] for _ in range(2)]
    >>> auroc(*simple_scores(*draws)["linear"]) > 0.95
    True
    """
    labels = np.repeat([0, 1], [len(part) for part in fit])
    linear = LinearDiscriminantAnalysis().fit(np.concatenate(fit), labels)
    centre = fit[0].mean(axis=0)
    scores = {
        "norm": lambda x: np.linalg.norm(x, axis=1),
        "mean": lambda x: np.linalg.norm(x - centre, axis=1),
        "linear": linear.decision_function,
    }
    signs = {name: 1 if auroc(*map(score, fit)) >= 0.5 else -1 for name, score in scores.items()}
    return {name: tuple(signs[name] * score(x) for x in test) for name, score in scores.items()}


# ------------------------------------------------------------------ Gaussian laws and their priors


@dataclass(frozen=True)
class RootGaussian:
    """A Gaussian by its mean and a root of its covariance ``root.T @ root``, which is never formed.

    Parameters
    ----------
    mean : Tensor of shape (d,)
        float64.
    root : Tensor of shape (k, d)
        float64; for n samples, the centred samples over sqrt(n - 1).

    Examples
    --------
    >>> unit = RootGaussian(torch.zeros(2).double(), torch.eye(2).double())
    >>> unit.through(lambda x: 2 * x + 1).root
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """

    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def fit(cls, samples: torch.Tensor) -> RootGaussian:
        """Mean and unbiased covariance of ``(n, d)`` samples, n >= 2."""
        if samples.ndim != 2 or len(samples) < 2:
            raise ValueError(f"samples have shape {tuple(samples.shape)}; give (n, d) with n >= 2")
        mean = samples.double().mean(0)
        return cls(mean, (samples.double() - mean) / np.sqrt(len(samples) - 1))

    @property
    def variances(self) -> torch.Tensor:
        """Variance of each coordinate, (d,)."""
        return self.root.square().sum(0)

    def normalised(self) -> RootGaussian:
        """Return the law with mean 0 and a covariance of trace 1: its shape alone."""
        return RootGaussian(torch.zeros_like(self.mean), self.root / self.root.norm())

    def through(self, affine: Callable[[torch.Tensor], torch.Tensor]) -> RootGaussian:
        """Law of the image under an affine map of rows, such as the flow of a Gaussian model."""
        moved = affine(torch.cat([self.mean[None], self.mean + self.root]))
        return RootGaussian(moved[0], moved[1:] - moved[0])

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n` rows (n, d)."""
        noise = torch.randn(n, len(self.root), generator=generator, dtype=torch.float64)
        return self.mean + noise @ self.root


def frechet_distance(a: RootGaussian, b: RootGaussian) -> float:
    """Frechet distance of two Gaussians, squared, as the FID reports it.

    Parameters
    ----------
    a, b : RootGaussian
        Laws of the same number of coordinates.

    Returns
    -------
    float
        ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))``.

    Notes
    -----
    Dowson and Landau, Journal of Multivariate Analysis 12 (1982). With roots R and R' the last trace is
    the sum of the singular values of ``R R'^T``, a matrix of the sizes of the samples, not of d.

    Examples
    --------
    >>> a = RootGaussian(torch.zeros(1).double(), torch.ones(1, 1).double())
    >>> b = RootGaussian(torch.ones(1).double(), 3 * torch.ones(1, 1).double())
    >>> frechet_distance(a, b)  # 1 apart, deviations 1 and 3
    5.0
    """
    shift = (a.mean - b.mean).square().sum()
    overlap = torch.linalg.svdvals(a.root @ b.root.T).sum()
    return float(shift + a.root.square().sum() + b.root.square().sum() - 2 * overlap)


def _white(law: RootGaussian, mean: torch.Tensor, variance: torch.Tensor) -> RootGaussian:
    return RootGaussian(mean, torch.diag(variance.sqrt().expand(len(law.mean))))


PRIOR_LAWS: dict[str, Callable[[RootGaussian], RootGaussian]] = {
    "standard normal": lambda z: _white(z, torch.zeros_like(z.mean), torch.ones(1).double()),
    "isotropic, as released": lambda z: _white(
        z, z.mean, z.variances.mean() + z.mean.var(correction=0)
    ),
    "isotropic": lambda z: _white(z, z.mean, z.variances.mean()),
    "diagonal": lambda z: _white(z, z.mean, z.variances),
    "full covariance": lambda z: z,
}


def prior_law(name: str, latents: RootGaussian) -> RootGaussian:
    """Give the law that a prior of `ood_lib.priors` draws from, once it knows the law of the latents.

    Parameters
    ----------
    name : str
        A key of `PRIOR_LAWS`.
    latents : RootGaussian
        The law of the latents, or mean and covariance of a sample of them.

    Returns
    -------
    RootGaussian
        The prior. "isotropic, as released" takes the variance of all numbers together, the spread of
        the mean latent included, as the published code does; "recombination" has the two moments of
        the full covariance.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> z = RootGaussian(torch.tensor([1.0, -1.0]).double(), torch.eye(2).double())
    >>> [round(prior_law(x, z).variances.mean().item()) for x in ("isotropic", "isotropic, as released")]
    [1, 2]
    """
    if name not in PRIOR_LAWS:
        raise ValueError(f"unknown prior {name!r}; known are {'; '.join(PRIOR_LAWS)}")
    return PRIOR_LAWS[name](latents)


def gaussian_pair(
    dim: int,
    rng: np.random.Generator,
    *,
    decay: float = 1.0,
    mismatch: float = 1.0,
    shift: float = 1.0,
) -> tuple[GaussianLaw, RootGaussian]:
    """Make an in-domain and an out-of-domain Gaussian with power-law spectra along random axes.

    Parameters
    ----------
    dim : int
        Number of coordinates d, small: d x d matrices are formed.
    rng : numpy.random.Generator
        Source of the axes and of the direction of the shift.
    decay : float, default 1
        The k-th variance of either law is ``k ** -decay``.
    mismatch : float, default 1
        0: the out-of-domain covariance is the in-domain one; 1: its axes are drawn anew; between, the
        logarithms of the two covariances are mixed in this proportion.
    shift : float, default 1
        Distance of the means, in units of the root of the total in-domain variance.

    Returns
    -------
    tuple of GaussianLaw, RootGaussian
        The law that a model knows, with mean 0, and the law of the images that it never saw.

    Examples
    --------
    >>> known, unseen = gaussian_pair(3, np.random.default_rng(0), mismatch=0.0)
    >>> same = RootGaussian(unseen.mean, known.basis.T * known.eigenvalues.sqrt()[:, None])
    >>> abs(frechet_distance(unseen, same)) < 1e-12
    True
    """
    spectrum = np.arange(1, dim + 1) ** -float(decay)
    axes = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(2)]
    first, second = ((u * np.log(spectrum)) @ u.T for u in axes)
    logs, u = np.linalg.eigh((1 - mismatch) * first + mismatch * second)
    towards = rng.standard_normal(dim)
    mean = shift * np.sqrt(spectrum.sum()) * towards / np.linalg.norm(towards)
    known = GaussianLaw(torch.zeros(dim).double(), *map(torch.from_numpy, (axes[0], spectrum)))
    root = np.exp(logs / 2)[:, None] * u.T
    return known, RootGaussian(torch.from_numpy(mean), torch.from_numpy(root))
