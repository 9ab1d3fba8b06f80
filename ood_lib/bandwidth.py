"""Bandwidth: how much noise on the way back an inverted image survives.

An image is inverted to a level, then walked back by DDIM with `eta` from 0 to 1; its bandwidth is the
largest eta up to which it still returns as well as a stated bar. Errors are those of the state, not
clipped: clipping would forgive the noise on black and white pixels. The statistics of a chapter are
functions of groups, one array a pair of model and domain, with the images along the last axis, so that
`resample` can give each an interval over images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.stats import rankdata

from ood_lib.analytic import GaussianLaw, eta_mse
from ood_lib.inversion import generate, invert
from ood_lib.metrics import Interval
from ood_lib.models import FrozenModel
from ood_lib.results import load_claims
from ood_lib.schedule import NoiseSchedule, uniform_log_sigma

__all__ = [
    "BARS",
    "Bandwidth",
    "EtaCurve",
    "bandwidth",
    "between_share",
    "closed_curve",
    "eta_curve",
    "factor",
    "fitted_law",
    "less_favourable",
    "log_ratio",
    "median_factor",
    "null_factor",
    "resample",
    "same_levels",
    "same_order",
    "schedule_share",
    "spread",
    "unexplained",
]

# dB. Song et al., arXiv:2010.02502, table 2: squared errors .0023 and .014 on [0, 1], at S = 50 and 10
BARS = (26.4, 18.5)
POINTS = 48  # of the grid on which images are inverted here: without noise even small errors show
FLOOR = 0.01  # a smaller bandwidth counts as this in a factor, which is then a lower bound


@dataclass(frozen=True)
class EtaCurve:
    """Reconstruction error of each image against eta.

    Parameters
    ----------
    etas : ndarray of shape (k,)
        Shares of stochasticity, increasing from 0.
    mse : ndarray of shape (k, N)
        Squared error, mean over the numbers of an image, in units of [-1, 1] pixels.
    timesteps : ndarray of shape (n,)
        The grid of the way back, increasing.
    nfe : int
        Network calls an image for the ways back, all etas together; 0 in closed form.
    images : Tensor of shape (k, N, C, H, W), optional
        float32 images that came back, not clipped.

    Examples
    --------
    >>> curve = EtaCurve(np.array([0.0, 1.0]), np.array([[0.0004], [0.04]]), np.array([0.0, 9.0]), 0)
    >>> curve.psnr.ravel().round(1)
    array([40., 20.])
    """

    etas: np.ndarray
    mse: np.ndarray
    timesteps: np.ndarray
    nfe: int
    images: torch.Tensor | None = None

    @property
    def psnr(self) -> np.ndarray:
        """Peak signal-to-noise ratio (k, N) in dB, for images scaled to [0, 1] and not clipped."""
        with np.errstate(divide="ignore"):  # a perfect return has infinite dB
            return -10 * np.log10(self.mse / 4)

    def of(self, rows: np.ndarray) -> EtaCurve:
        """Keep some images: row numbers or booleans."""
        images = None if self.images is None else self.images[:, torch.from_numpy(rows)]
        return EtaCurve(self.etas, self.mse[:, rows], self.timesteps, self.nfe, images)


@dataclass(frozen=True)
class Bandwidth:
    """Bandwidth of each image, and where it is only known to lie beyond the etas that were tried.

    Parameters
    ----------
    values : ndarray of shape (N,)
        0 where even eta = 0 misses the bar, the largest eta where none does.
    below : ndarray of shape (N,)
        Censored from the left: eta = 0 misses the bar.
    above : ndarray of shape (N,)
        Censored from the right: the true value may be larger.

    Examples
    --------
    >>> no = np.array([False])
    >>> Bandwidth(np.array([0.2]), no, no).known
    1.0
    """

    values: np.ndarray
    below: np.ndarray
    above: np.ndarray

    @property
    def known(self) -> float:
        """Share of images that are not censored."""
        return float(1 - (self.below | self.above).mean())


def same_levels(schedule: NoiseSchedule, like: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """Timesteps at which a schedule has the noise levels of another one's timesteps.

    Parameters
    ----------
    schedule : NoiseSchedule
        The schedule to walk on.
    like : NoiseSchedule
        The schedule that `timesteps` belong to.
    timesteps : array of shape (n,)
        Increasing timesteps.

    Returns
    -------
    ndarray of shape (n,)
        Timesteps of `schedule`, usually fractional.

    Raises
    ------
    ValueError
        If `schedule` lacks one of the levels.

    Examples
    --------
    >>> slow = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> fast = NoiseSchedule(slow.alpha_bar[::2])
    >>> same_levels(fast, slow, np.array([0, 500])).round(6)
    array([  0., 250.])
    """
    wanted = like.log_sigma(timesteps)
    found = schedule.t_of_log_sigma(wanted)
    if not np.allclose(schedule.log_sigma(found), wanted, rtol=0, atol=1e-9):
        lowest, highest = schedule.sigma([0, schedule.num_train_timesteps - 1])
        raise ValueError(
            f"the levels run from sigma = {np.exp(wanted[0]):.4g} to {np.exp(wanted[-1]):.4g}; this "
            f"schedule has {lowest:.4g} to {highest:.4g}; use levels inside both"
        )
    return found


def _check_etas(etas: Sequence[float]) -> np.ndarray:
    values = np.asarray(etas, dtype=np.float64)
    if len(values) < 2 or values[0] != 0 or values[-1] > 1 or (np.diff(values) <= 0).any():
        raise ValueError(
            f"etas are {values.tolist()}; give two or more that rise from 0 to at most 1"
        )
    return values


def eta_curve(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    etas: Sequence[float],
    timesteps: np.ndarray,
    generator: torch.Generator,
    latent: torch.Tensor | None = None,
) -> EtaCurve:
    """Measure how images return from their latents under more and more noise.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    images : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    etas : sequence of float
        Increasing from 0 to at most 1.
    timesteps : array of shape (n,)
        Grid of the way back; its first is the level of the images, its last that of the latents.
    generator : torch.Generator
        Source of the noise. Every eta meets the same draws, so that the curve of an image is smooth.
    latent : Tensor of shape (N, C, H, W), optional
        Converged latents at the last timestep; inverted on 48 points uniform in log sigma by default.

    Returns
    -------
    EtaCurve
        Errors and the images that came back.

    Raises
    ------
    ValueError
        If `etas` do not rise from 0, or as in `invert` and `generate`.

    Examples
    --------
    >>> from ood_lib.analytic import analytic_model
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> model = analytic_model(law, NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))))
    >>> noise = torch.Generator().manual_seed(0)
    >>> grid = uniform_log_sigma(model.schedule, 21, t_end=500)
    >>> x = torch.full((1, 1, 1, 4), 0.5)
    >>> curve = eta_curve(model, x, etas=[0, 1], timesteps=grid, generator=noise)
    >>> curve.psnr[0] > curve.psnr[1] + 20
    array([ True])
    """
    values = _check_etas(etas)
    if latent is None:
        first, last = float(timesteps[0]), float(timesteps[-1])
        fine = uniform_log_sigma(model.schedule, POINTS, t_start=first, t_end=last)
        latent = invert(model, images, solver="abm2", timesteps=fine).latent
    start = generator.get_state()
    returned, nfe = [], 0
    for eta in values.tolist():
        generator.set_state(start)
        back = generate(
            model, latent, timesteps=timesteps, solver="ddim", eta=eta, generator=generator
        )
        returned.append(back.images)
        nfe += back.nfe
    there = torch.stack(returned)
    mse = (there - images).square().flatten(2).mean(2).numpy()
    return EtaCurve(values, mse, np.asarray(timesteps, dtype=float), nfe, there.float())


def fitted_law(samples: torch.Tensor, heldout: torch.Tensor) -> GaussianLaw:
    """Gaussian law of a domain: directions from one set of images, variances from another.

    Parameters
    ----------
    samples, heldout : Tensor of shape (n, C, H, W), (m, C, H, W)
        Images of the domain, as `GaussianLaw.fit` takes them.

    Returns
    -------
    GaussianLaw
        The law.

    Examples
    --------
    >>> rng = torch.Generator().manual_seed(0)
    >>> images = torch.rand(9, 1, 4, 4, generator=rng)
    >>> fitted_law(images[:4], images[4:]).dim
    16
    """
    return GaussianLaw.fit(samples.flatten(1), heldout=heldout.flatten(1))


def closed_curve(
    law: GaussianLaw,
    images: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    etas: Sequence[float],
    timesteps: np.ndarray,
) -> EtaCurve:
    """Predict the curve of each image for a model that knows a Gaussian law, without any network.

    Parameters
    ----------
    law : GaussianLaw
        What the model knows.
    images : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    schedule : NoiseSchedule
        The noise schedule.
    etas, timesteps
        As in `eta_curve`; the prediction holds for the steps of this grid.

    Returns
    -------
    EtaCurve
        Expected errors.

    Examples
    --------
    >>> law = GaussianLaw(*(f(4).double() for f in (torch.zeros, torch.eye, torch.ones)))
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> grid = uniform_log_sigma(schedule, 21, t_end=500)
    >>> closed_curve(law, torch.ones(2, 1, 1, 4), schedule, etas=[0, 1], timesteps=grid).mse.shape
    (2, 2)
    """
    values = _check_etas(etas)
    mse = [
        eta_mse(law, images, schedule, eta=eta, timesteps=timesteps).numpy()
        for eta in values.tolist()
    ]
    return EtaCurve(values, np.stack(mse), np.asarray(timesteps, dtype=float), 0)


def bandwidth(curve: EtaCurve, bar: float) -> Bandwidth:
    """Largest eta up to which each image returns at or above a bar.

    Parameters
    ----------
    curve : EtaCurve
        Errors of the images.
    bar : float
        PSNR in dB.

    Returns
    -------
    Bandwidth
        One value an image, with what is censored.

    Notes
    -----
    The error is interpolated in eta^2 by a monotone cubic, because noise of share eta adds an error of
    order eta^2; on closed forms with etas 0, .15, .4 and 1 that is within 10 % of the exact crossing. The
    first crossing counts: an image that comes back by chance at a larger eta has been lost before.

    Examples
    --------
    >>> etas = np.linspace(0, 1, 5)
    >>> curve = EtaCurve(etas, 0.04 * etas[:, None] ** 2, np.array([0.0, 9.0]), 0)
    >>> bandwidth(curve, 26.0).values.round(2)
    array([0.5])
    """
    limit = 4 * 10 ** (-bar / 10)
    below, above = curve.mse[0] > limit, (curve.mse <= limit).all(axis=0)
    values = np.where(above, curve.etas[-1], 0.0)
    for i in np.flatnonzero(~(below | above)):
        path = PchipInterpolator(curve.etas**2, curve.mse[:, i])
        first = int(np.flatnonzero(curve.mse[:, i] > limit)[0])
        crossings = path.solve(limit, extrapolate=False)
        inside = crossings[crossings >= curve.etas[first - 1] ** 2]
        values[i] = np.sqrt(inside.min())
    return Bandwidth(values, below, above)


# ------------------------------------------------------------------- statistics of groups of images


def factor(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Larger over smaller bandwidth, at least 1.

    Parameters
    ----------
    a, b : ndarray
        Bandwidths. One below 0.01 counts as 0.01, so that an image that never returns has a factor too:
        a lower bound.

    Returns
    -------
    ndarray
        Factors.

    Examples
    --------
    >>> factor(np.array([0.2, 0.0]), np.array([0.3, 0.0]))
    array([1.5, 1. ])
    """
    a, b = np.maximum(a, FLOOR), np.maximum(b, FLOOR)
    return np.maximum(a, b) / np.minimum(a, b)


def resample(
    statistic: Callable[..., float],
    groups: Sequence[np.ndarray],
    *,
    rng: np.random.Generator,
    n_resamples: int = 500,
) -> Interval:
    """Give a statistic of groups a percentile bootstrap interval over the images of each group.

    Parameters
    ----------
    statistic : callable
        Maps the groups, one argument each, to a float.
    groups : sequence of ndarray of shape (..., n)
        Images along the last axis; an image keeps all its numbers.
    rng : numpy.random.Generator
        Source of the bootstrap.
    n_resamples : int, default 500
        Number of resamples.

    Returns
    -------
    Interval
        Estimate and 95 % interval.

    Raises
    ------
    ValueError
        If a group has fewer than two images.

    Examples
    --------
    >>> resample(spread, [np.full(5, 0.1), np.full(5, 0.2)], rng=np.random.default_rng(0))
    Interval(value=2.0, low=2.0, high=2.0)
    """
    smallest = min(group.shape[-1] for group in groups)
    if smallest < 2:
        raise ValueError(f"a bootstrap over images needs 2 of them in each group, not {smallest}")
    drawn = [
        statistic(*(g[..., rng.integers(g.shape[-1], size=g.shape[-1])] for g in groups))
        for _ in range(n_resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(*groups)), float(low), float(high))


def between_share(*groups: np.ndarray) -> float:
    """Share of the rank variance that lies between groups.

    Parameters
    ----------
    *groups : ndarray of shape (n,)
        Bandwidths of the images of each group.

    Returns
    -------
    float
        Epsilon squared of Kruskal and Wallis, adjusted: 0 in expectation for equal groups, 1 where the
        groups do not overlap and each is constant.

    Notes
    -----
    ``(H - k + 1) / (n - k)`` for k groups of n images in all, with the statistic H of Kruskal and Wallis,
    which is n - 1 times the share of the variance of ranks between groups, not adjusted.

    Examples
    --------
    >>> round(between_share(np.full(4, 0.1), np.full(4, 0.2)), 6)
    1.0
    """
    sizes = [len(group) for group in groups]
    n, k = sum(sizes), len(groups)
    ranks = rankdata(np.concatenate(groups))
    whole = np.square(ranks - ranks.mean()).sum()
    if whole == 0:
        return 0.0
    means = [part.mean() for part in np.split(ranks, np.cumsum(sizes)[:-1])]
    h = (n - 1) * np.dot(sizes, np.square(means - ranks.mean())) / whole
    return float((h - k + 1) / (n - k))


def spread(*groups: np.ndarray) -> float:
    """Factor between the largest and the smallest median of groups.

    Parameters
    ----------
    *groups : ndarray of shape (n,)
        Bandwidths of the images of each group.

    Returns
    -------
    float
        At least 1.

    Examples
    --------
    >>> spread(np.array([0.25, 0.25]), np.array([0.25, 0.75]))
    2.0
    """
    medians = np.array([np.median(group) for group in groups])
    return float(factor(medians.max(), medians.min()))


def median_factor(*groups: np.ndarray) -> float:
    """Median over all images of the factor between two bandwidths of one image.

    Parameters
    ----------
    *groups : ndarray of shape (2, n)
        Two bandwidths of each image.

    Returns
    -------
    float
        At least 1.

    Examples
    --------
    >>> median_factor(np.array([[0.2, 0.2, 0.1], [0.1, 0.4, 0.1]]))
    2.0
    """
    first, second = np.concatenate(groups, axis=1)
    return float(np.median(factor(first, second)))


def log_ratio(*groups: np.ndarray) -> float:
    """How much more one change of the model matters than another, in logarithms of median factors.

    Parameters
    ----------
    *groups : ndarray of shape (3, n)
        Bandwidths of each image: as it is, under the change of interest, under the one to compare with.

    Returns
    -------
    float
        Ratio of the logarithms.

    Examples
    --------
    >>> round(log_ratio(np.array([[0.1, 0.1], [0.4, 0.4], [0.2, 0.2]])), 6)
    2.0
    """
    base, change, other = np.concatenate(groups, axis=1)
    top, bottom = (np.log(np.median(factor(base, x))) for x in (change, other))
    return float(top / bottom) if bottom > 0 else float(np.inf)


def schedule_share(*groups: np.ndarray) -> float:
    """Part of a difference between two models that is left when they start from the same noise.

    Parameters
    ----------
    *groups : ndarray of shape (3, n)
        Bandwidths of each image: through one model; through the other at the same noise levels; through
        the other at the same timestep.

    Returns
    -------
    float
        ``|median log ratio|`` at the same noise over that at the same timestep.

    Examples
    --------
    >>> round(schedule_share(np.array([[0.1, 0.1], [0.1, 0.1], [0.2, 0.2]])), 6)
    0.0
    """
    base, noise, timestep = np.log(np.maximum(np.concatenate(groups, axis=1), FLOOR))
    left, whole = (abs(float(np.median(x - base))) for x in (noise, timestep))
    return left / whole if whole > 0 else float(np.inf)


def same_order(*groups: np.ndarray) -> float:
    """Share of the comparisons of two groups that come out alike at two bars.

    Parameters
    ----------
    *groups : ndarray of shape (2, n)
        Bandwidths of the images of each group, at one bar and at the other.

    Returns
    -------
    float
        1 if every two medians come in the same order at both bars.

    Examples
    --------
    >>> a, b = np.full((2, 3), 0.1), np.array([[0.2] * 3, [0.3] * 3])
    >>> same_order(a, b)
    1.0
    """
    medians = np.array([np.median(group, axis=1) for group in groups])
    signs = [np.sign(b - a) for a, b in combinations(medians, 2)]
    return float(np.mean([first == second for first, second in signs]))


def unexplained(*groups: np.ndarray) -> float:
    """Share of the rank variance of one number an image that is left when another is known.

    Parameters
    ----------
    *groups : ndarray of shape (2, n)
        Bandwidth of each image, and what may explain it, in either direction.

    Returns
    -------
    float
        1 minus the square of Spearman's rho over all images; 1 if either is constant.

    Examples
    --------
    >>> round(unexplained(np.array([[0.1, 0.2, 0.3], [9.0, 8.0, 1.0]])), 6)
    0.0
    """
    values, known = np.concatenate(groups, axis=1)
    if np.ptp(values) == 0 or np.ptp(known) == 0:
        return 1.0
    return float(1 - np.corrcoef(rankdata(values), rankdata(known))[0, 1] ** 2)


def null_factor(values: np.ndarray, *, rng: np.random.Generator, n_resamples: int = 2000) -> float:
    """Largest factor between two medians that chance alone explains, at 95 %.

    Parameters
    ----------
    values : ndarray of shape (n,)
        Bandwidths of the images of one pair.
    rng : numpy.random.Generator
        Source of the bootstrap.
    n_resamples : int, default 2000
        Number of comparisons.

    Returns
    -------
    float
        95 % of comparisons of two sets of n images drawn from `values` show a smaller factor.

    Examples
    --------
    >>> null_factor(np.full(8, 0.2), rng=np.random.default_rng(0))
    1.0
    """
    drawn = rng.choice(values, size=(2, n_resamples, len(values)))
    return float(np.quantile(factor(*np.median(drawn, axis=2)), 0.95))


def less_favourable(criterion: str, found: Sequence[Interval]) -> Interval:
    """Choose among the values of a criterion, one a bar, the one that supports its claim least.

    Parameters
    ----------
    criterion : str
        Id of a criterion in ``data/claims.yaml``, which knows the direction.
    found : sequence of Interval
        Estimates.

    Returns
    -------
    Interval
        The smallest where much is wanted, the largest where little is.

    Raises
    ------
    ValueError
        If the criterion is not listed.

    Examples
    --------
    >>> less_favourable("E4.pair", [Interval(0.9, 0.8, 1.0), Interval(0.6, 0.4, 0.7)]).value
    0.6
    """
    directions = {k.id: k.direction for c in load_claims().values() for k in c.criteria}
    if criterion not in directions:
        raise ValueError(
            f"criterion {criterion!r} is not in data/claims.yaml; write it there first"
        )
    return (min if directions[criterion] == ">=" else max)(found)
