"""Detectors of out-of-domain images: statistics of inverted latents, and what they are compared with.

All follow scikit-learn's outlier detectors: ``fit`` on in-domain images, then ``predict`` gives +1 for
an image of the domain and -1 for an outlier, and ``score_samples`` is higher for the domain.
``ood_score`` has the opposite sign. A score depends on the image and the seed alone, not on the images
that it is scored with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import pandas as pd
import torch
from scipy.integrate import simpson
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from ood_lib.gram import fit_covariance
from ood_lib.inversion import generate, invert
from ood_lib.models import FrozenModel
from ood_lib.schedule import uniform_log_sigma, uniform_t
from ood_lib.separability import Separability
from ood_lib.solvers import NetworkCalls

__all__ = [
    "STATISTICS",
    "NegativeLogLikelihood",
    "OODDetector",
    "PathStatistics",
    "Reconstruction",
    "compare",
]

_Trace = Callable[[FrozenModel, torch.Tensor, float, torch.Tensor], torch.Tensor]

LEAST = 3  # images to fit to: what is left without one of them must still have a spread
STEP = 0.05  # of finite differences, in units of the noise at their level


def _check(model: FrozenModel, images: torch.Tensor) -> None:
    model.check(images)
    if images.numel() and not images.abs().max() <= 1 + 1e-3:
        raise ValueError(
            f"images reach {images.abs().max():.3g} in size; they must be numbers in [-1, 1]"
        )


class _Detector(OutlierMixin, BaseEstimator):
    """What all detectors share; each gives `_features`, `_learn`, `_own_scores` and `_scores`."""

    def fit(self, images: torch.Tensor, y: None = None) -> Self:
        """Fit to in-domain images (N, C, H, W), three or more, and set the threshold ``offset_``."""
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination is {self.contamination}; it must lie in (0, 0.5]")
        _check(self.model, images)
        if len(images) < LEAST:
            raise ValueError(f"a detector is fitted to {LEAST} or more images, not {len(images)}")
        features = self._features(images)
        self._learn(features)
        # as if each fitted image were new, or too few new ones would pass
        self.offset_ = -float(np.quantile(self._own_scores(features), 1 - self.contamination))
        return self

    def ood_score(self, images: torch.Tensor) -> np.ndarray:
        """Score images (N, C, H, W): one number each, higher = more OOD."""
        check_is_fitted(self, "offset_")
        _check(self.model, images)
        return self._scores(self._features(images))

    def score(self, images: torch.Tensor, y: None = None) -> np.ndarray:
        """Give `ood_score`."""
        return self.ood_score(images)

    def score_samples(self, images: torch.Tensor) -> np.ndarray:
        """Score images (N, C, H, W) with the opposite sign: higher = more in-domain."""
        return -self.ood_score(images)

    def decision_function(self, images: torch.Tensor) -> np.ndarray:
        """Give `score_samples` above the threshold ``offset_``: negative for outliers."""
        return self.score_samples(images) - self.offset_

    def predict(self, images: torch.Tensor) -> np.ndarray:
        """Give +1 for each image of the domain and -1 for each outlier, (N,)."""
        return np.where(self.decision_function(images) >= 0, 1, -1)

    def _features(self, images: torch.Tensor) -> np.ndarray:
        raise NotImplementedError

    def _learn(self, features: np.ndarray) -> None:
        pass

    def _own_scores(self, features: np.ndarray) -> np.ndarray:
        """Scores of the fitted images, each under a fit without it."""
        return self._scores(features)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        raise NotImplementedError


STATISTICS = ("norm", "distance", "typicality", "mahalanobis")


class OODDetector(_Detector):
    """Detector by a statistic of the inverted latent.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    statistic : {"norm", "distance", "typicality", "mahalanobis"}, default "mahalanobis"
        Norm of the latent; its distance to the mean of in-domain latents; the distance of its squared norm
        from the mean of theirs; its squared Mahalanobis distance to them, with the covariance shrunk by
        Ledoit and Wolf.
    contamination : float, default 0.05
        Share of new in-domain images that may be called outliers, in (0, 0.5].
    preset, start, batch_size
        As in `invert`.
    seed : int, optional
        Of the noise of ``start="noise"``, the same for every image.

    Notes
    -----
    The statistics are those of `separability.report`, which takes whole sets of latents.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> detector = OODDetector(model, statistic="distance").fit(load_images("fashion", n=8, like=model))
    >>> detector.ood_score(load_images("digits", n=2, like=model)).shape
    (2,)
    """

    def __init__(
        self,
        model: FrozenModel,
        *,
        statistic: str = "mahalanobis",
        contamination: float = 0.05,
        preset: str = "converged",
        start: str = "level0",
        seed: int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.statistic = statistic
        self.contamination = contamination
        self.preset = preset
        self.start = start
        self.seed = seed
        self.batch_size = batch_size

    def _features(self, images: torch.Tensor) -> np.ndarray:
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"statistic {self.statistic!r} is not known; use {', '.join(STATISTICS)}"
            )
        if (self.seed is None) == (self.start == "noise"):
            raise ValueError(
                f"seed is {self.seed} for start={self.start!r}; only 'noise' has a seed"
            )
        noise = None
        if self.start == "noise":
            noise = [torch.Generator().manual_seed(self.seed) for _ in images]
        made = invert(
            self.model,
            images,
            preset=self.preset,
            start=self.start,
            generator=noise,
            batch_size=self.batch_size,
        )
        return made.latent.flatten(1).cpu().numpy()

    def _learn(self, features: np.ndarray) -> None:
        self.mean_ = features.mean(axis=0)
        self.square_ = float(np.square(features).sum(axis=1).mean())
        if self.statistic == "mahalanobis":
            self.covariance_ = fit_covariance(features)

    def _own_scores(self, features: np.ndarray) -> np.ndarray:
        if self.statistic == "mahalanobis":
            return self.covariance_.leave_one_out()
        # the mean of the others is further from each by this factor
        factor = 1 if self.statistic == "norm" else len(features) / (len(features) - 1)
        return factor * self._scores(features)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        if self.statistic == "mahalanobis":
            return self.covariance_.mahalanobis(features)
        if self.statistic == "distance":
            return np.linalg.norm(features - self.mean_, axis=1)
        norms = np.linalg.norm(features, axis=1)
        return norms if self.statistic == "norm" else np.abs(norms**2 - self.square_)


def _probe(model: FrozenModel, n: int, seed: int, *, signs: bool = False) -> torch.Tensor:
    """Draw (n, C, H, W) numbers for all images in common, from N(0, 1) or of random sign."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, *model.sample_shape, generator=generator, dtype=torch.float64)
    return drawn.sign() if signs else drawn


class Reconstruction(_Detector):
    """Detector by the error with which noisy versions of an image are denoised.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    seed : int
        Of the noise, the same for every image.
    starts : int, default 6
        Levels from which the image is reconstructed, evenly spaced in t, the ends left out.
    points : int, default 8
        Points of the grid from each level down, one network call each but the last.
    contamination : float, default 0.05
        Share of new in-domain images that may be called outliers, in (0, 0.5].
    batch_size : int, default 64
        Images a network call.

    Notes
    -----
    Graham et al., Denoising diffusion models for out-of-distribution detection, CVPR workshops 2023,
    arXiv:2211.07740: squared errors, standardised level by level by those of in-domain images, and their
    mean. Theirs adds a perceptual error, and takes 350 calls with PLMS.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> detector = Reconstruction(model, seed=0).fit(load_images("fashion", n=4, like=model))
    >>> detector.ood_score(load_images("digits", n=2, like=model)).shape
    (2,)
    """

    def __init__(
        self,
        model: FrozenModel,
        *,
        seed: int,
        starts: int = 6,
        points: int = 8,
        contamination: float = 0.05,
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.seed = seed
        self.starts = starts
        self.points = points
        self.contamination = contamination
        self.batch_size = batch_size

    def _features(self, images: torch.Tensor) -> np.ndarray:
        if self.starts < 1:
            raise ValueError(f"starts is {self.starts}; use 1 or more levels")
        last = self.model.schedule.num_train_timesteps - 1
        levels = np.linspace(0, last, self.starts + 2)[1:-1]
        noise = _probe(self.model, self.starts, self.seed).to(images.device)
        errors = [self._error(images, float(t), z) for t, z in zip(levels, noise, strict=True)]
        return np.stack(errors, axis=1)

    def _error(self, images: torch.Tensor, t: float, noise: torch.Tensor) -> np.ndarray:
        schedule, x0 = self.model.schedule, images.double()
        signal, sigma = float(np.sqrt(schedule.alpha_bar_at(t))), float(schedule.sigma(t))
        grid = uniform_log_sigma(schedule, self.points, t_end=t)
        back = generate(
            self.model, signal * (x0 + sigma * noise), timesteps=grid, batch_size=self.batch_size
        )
        return (back.images - x0).square().flatten(1).mean(1).cpu().numpy()

    def _learn(self, features: np.ndarray) -> None:
        self.mean_, self.spread_ = features.mean(axis=0), features.std(axis=0, ddof=1)
        if not (self.spread_ > 0).all():
            raise ValueError("all fitted images have the same error; fit to images that differ")

    def _own_scores(self, features: np.ndarray) -> np.ndarray:
        n, gaps = len(features), features - self.mean_
        squares = (n - 1) * self.spread_**2 - n / (n - 1) * gaps**2
        spread = np.sqrt(np.clip(squares, np.finfo(float).tiny, None) / (n - 2))
        return (n / (n - 1) * gaps / spread).mean(axis=1)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean_) / self.spread_).mean(axis=1)


class NegativeLogLikelihood(_Detector):
    """Detector by the density that the model gives to an image; `ood_score` is in nats.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    seed : int
        Of the probes of the trace, the same for every image.
    probes : int, default 1
        Probes of random signs; each costs one gradient, or two network calls, a level.
    points : int, default 25
        Points of the grid of `invert`. An error of the latent counts: half its squared norm is in the
        score.
    derivative : {"auto", "gradient", "difference"}, default "auto"
        How the network is differentiated; "auto" is by gradients where torch runs it, and by central
        differences else.
    contamination : float, default 0.05
        Share of new in-domain images that may be called outliers, in (0, 0.5].
    batch_size : int, default 64
        Images a network call.

    Notes
    -----
    Song et al., Score-based generative modeling through stochastic differential equations, ICLR 2021,
    arXiv:2011.13456, eq. 39 and 40, in the variables of `invert`: with ``d xbar / d sigma = eps`` the
    density falls along the path by the integral of the divergence of eps, and the latent is N(0, I). The
    image is the state at level 0, which has noise of sigma = 0.01 for the schedules of the book; no
    dequantisation. The integral is Simpson's rule in log sigma on that grid.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> detector = NegativeLogLikelihood(model, seed=0).fit(load_images("fashion", n=4, like=model))
    >>> detector.ood_score(load_images("digits", n=2, like=model)).shape
    (2,)
    """

    def __init__(
        self,
        model: FrozenModel,
        *,
        seed: int,
        probes: int = 1,
        points: int = 25,
        derivative: str = "auto",
        contamination: float = 0.05,
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.seed = seed
        self.probes = probes
        self.points = points
        self.derivative = derivative
        self.contamination = contamination
        self.batch_size = batch_size

    def _features(self, images: torch.Tensor) -> np.ndarray:
        if self.probes < 1:
            raise ValueError(f"probes is {self.probes}; use 1 or more")
        trace = self._derivative()
        probes = _probe(self.model, self.probes, self.seed, signs=True).to(images.device)
        made = invert(
            self.model, images, points=self.points, keep_levels=True, batch_size=self.batch_size
        )
        schedule = self.model.schedule
        signal, d = np.sqrt(schedule.alpha_bar_at(made.timesteps)), made.latent[0].numel()
        slopes = [
            a * self._traces(trace, x, float(t), probes)
            for a, x, t in zip(signal, made.levels, made.timesteps, strict=True)
        ]
        levels = schedule.log_sigma(made.timesteps)
        grown = simpson(np.exp(levels)[:, None] * np.stack(slopes), x=levels, axis=0)
        normal = 0.5 * (
            made.latent.square().flatten(1).sum(1).cpu().numpy() + d * np.log(2 * np.pi)
        )
        return normal - grown - d * np.log(signal[-1] / signal[0])

    def _derivative(self) -> _Trace:
        known = {"gradient": _by_gradient, "difference": _by_difference}
        differentiable = self.model.backend == "torch"
        if self.derivative == "auto":
            return _by_gradient if differentiable else _by_difference
        if self.derivative not in known:
            raise ValueError(
                f"derivative {self.derivative!r} is not known; use auto, {', '.join(known)}"
            )
        if self.derivative == "gradient" and not differentiable:
            raise ValueError(
                f"backend {self.model.backend!r} has no gradients; use derivative='difference', or load "
                "the model with backend='torch'"
            )
        return known[self.derivative]

    def _traces(
        self, trace: _Trace, x_t: torch.Tensor, t: float, probes: torch.Tensor
    ) -> np.ndarray:
        """Hutchinson's estimate of the trace of ``d eps / d x_t``, an image."""
        parts = [
            torch.stack([trace(self.model, part, t, probe) for probe in probes]).mean(0)
            for part in x_t.double().split(self.batch_size)
        ]
        return torch.cat(parts).cpu().numpy()

    def _scores(self, features: np.ndarray) -> np.ndarray:
        return features


def _by_gradient(
    model: FrozenModel, x_t: torch.Tensor, t: float, probe: torch.Tensor
) -> torch.Tensor:
    """Product ``probe^T (d eps / d x_t) probe`` of each image, by one gradient."""
    with torch.enable_grad():
        x = x_t.clone().requires_grad_()
        eps = model.predict(x, t)
        if not eps.requires_grad:  # a constant, as of the model that predicts no noise
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        (along,) = torch.autograd.grad((eps * probe).sum(), x)
    return (along * probe).flatten(1).sum(1)


def _by_difference(
    model: FrozenModel, x_t: torch.Tensor, t: float, probe: torch.Tensor
) -> torch.Tensor:
    """Product ``probe^T (d eps / d x_t) probe`` of each image, by a central difference."""
    step = STEP * float(np.sqrt(1 - model.schedule.alpha_bar_at(t)))
    gap = model.eps(x_t + step * probe, t) - model.eps(x_t - step * probe, t)
    return (gap * probe).flatten(1).sum(1) / (2 * step)


class PathStatistics(_Detector):
    """Detector by six sums along the deterministic path: of the noise, and of its rate of change.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    points : int, default 11
        Points of the grid, evenly spaced in t; one network call each but the last.
    contamination : float, default 0.05
        Share of new in-domain images that may be called outliers, in (0, 0.5].
    batch_size : int, default 64
        Images a network call.

    Notes
    -----
    Heng, Thiery, Soh, Out-of-distribution detection with a single unconditional diffusion model,
    NeurIPS 2024, arXiv:2405.11881: sums over steps and numbers of eps, its square and cube, and the same of
    d eps / dt, on a DDIM inversion of 10 steps. They fit a mixture of 50 or 100 Gaussians to tens of
    thousands of images; here it is a Gaussian kernel density, with Scott's width, of the standardised sums.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> from ood_lib.models import linear_model, load_model
    >>> own = load_images("fashion", n=8, like=load_model("ddpm-fashion-32"))
    >>> model = linear_model(own, load_model("ddpm-fashion-32"))
    >>> PathStatistics(model).fit(own).predict(own).shape
    (8,)
    """

    def __init__(
        self,
        model: FrozenModel,
        *,
        points: int = 11,
        contamination: float = 0.05,
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.points = points
        self.contamination = contamination
        self.batch_size = batch_size

    def _features(self, images: torch.Tensor) -> np.ndarray:
        if self.points < 3:
            raise ValueError(f"points is {self.points}; a rate of change needs 3 or more")
        grid = uniform_t(self.model.schedule, self.points)
        noise = torch.stack(self._noises(images, grid)).cpu()
        gaps = torch.from_numpy(np.diff(grid)[1:] / grid[-1]).view(-1, 1, 1, 1, 1)
        return np.concatenate([_power_sums(noise), _power_sums(noise.diff(dim=0) / gaps)], axis=1)

    def _noises(self, images: torch.Tensor, grid: np.ndarray) -> list[torch.Tensor]:
        """Noise predicted at each step of a DDIM inversion."""
        schedule, calls = self.model.schedule, NetworkCalls(self.model, self.batch_size)
        xbar, noises = images.double() / float(np.sqrt(schedule.alpha_bar_at(grid[0]))), []
        for t, gap in zip(grid, np.diff(schedule.sigma(grid)), strict=False):
            noises.append(calls(xbar, float(t)))
            xbar = xbar + float(gap) * noises[-1]
        return noises

    def _learn(self, features: np.ndarray) -> None:
        self.mean_, self.spread_ = features.mean(axis=0), features.std(axis=0)
        if not (self.spread_ > 0).all():
            raise ValueError(
                "all fitted images have the same path statistics; fit to images that differ, under a "
                "model that predicts noise"
            )
        self.fitted_ = (features - self.mean_) / self.spread_
        self.width_ = len(features) ** (-1 / (features.shape[1] + 4))

    def _own_scores(self, features: np.ndarray) -> np.ndarray:
        nearness = self._nearness(features)
        np.fill_diagonal(nearness, -np.inf)
        return -self._log_mean(nearness, len(features) - 1)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        return -self._log_mean(self._nearness(features), len(self.fitted_))

    def _nearness(self, features: np.ndarray) -> np.ndarray:
        here = (features - self.mean_) / self.spread_
        return -0.5 * cdist(here, self.fitted_, "sqeuclidean") / self.width_**2

    def _log_mean(self, nearness: np.ndarray, n: int) -> np.ndarray:
        """Log-density of the standardised sums."""
        k = self.fitted_.shape[1]
        return (
            logsumexp(nearness, axis=1) - np.log(n) - 0.5 * k * np.log(2 * np.pi * self.width_**2)
        )


def _power_sums(values: torch.Tensor) -> np.ndarray:
    """Sum first, second and third powers over steps and numbers: (n, N, C, H, W) to (N, 3)."""
    return torch.stack([(values**p).sum(dim=(0, 2, 3, 4)) for p in (1, 2, 3)], dim=1).numpy()


def compare(
    detectors: Mapping[str, _Detector],
    id_images: torch.Tensor,
    ood_images: torch.Tensor,
    *,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Compare fitted detectors on the same images.

    Parameters
    ----------
    detectors : mapping of str to detector
        Fitted to other images of the domain than `id_images`.
    id_images : Tensor of shape (N, C, H, W)
        New images of the domain.
    ood_images : Tensor of shape (M, C, H, W)
        Images of another domain, brought to their size in the same way: unequal resizing alone separates.
    rng : numpy.random.Generator
        Source of bootstrap and permutations.

    Returns
    -------
    DataFrame
        One row a detector with the columns of `Separability`: AUROC, its 95 % interval, a p-value.

    Raises
    ------
    ValueError
        If a detector is not fitted or the images do not have its model's shape.

    Notes
    -----
    Controls: the same detectors of an untrained network (`random_model`), and in-domain images in place of
    the others, which must give 0.5. Published figures for such detectors, without intervals: Heng et al.,
    arXiv:2405.11881, table 3; the effect of unequal resizing, table 7.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> own, other = (load_images(name, n=16, like=model) for name in ("fashion", "digits"))
    >>> fitted = {"norm": OODDetector(model, statistic="norm").fit(own[:8])}
    >>> compare(fitted, own[8:], other, rng=np.random.default_rng(0)).columns.tolist()
    ['name', 'auroc', 'low', 'high', 'pvalue', 'direction', 'n', 'm', 'd']
    """
    d = id_images[0].numel()
    rows = [
        Separability.from_scores(
            detector.ood_score(id_images), detector.ood_score(ood_images), name=name, d=d, rng=rng
        ).to_frame()
        for name, detector in detectors.items()
    ]
    return pd.concat(rows, ignore_index=True)
