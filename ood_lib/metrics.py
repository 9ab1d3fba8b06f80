"""How good and how new images are: pixel features, shares of a domain, KID, PRDC, novelty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, t
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.image.kid import poly_mmd

from ood_lib.gram import pairwise_distances

__all__ = [
    "PRDC",
    "Interval",
    "PixelSpace",
    "jackknife",
    "kid",
    "median_interval",
    "novelty",
    "prdc",
    "psnr",
    "ratio_of_shares",
]


class Interval(NamedTuple):
    """An estimate with a 95 % interval.

    Examples
    --------
    >>> Interval(0.5, 0.4, 0.6).value
    0.5
    """

    value: float
    low: float
    high: float


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, for images scaled to [0, 1].

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        In [-1, 1]; values outside are clipped, as a viewer would.
    reference : Tensor of shape (N, C, H, W)
        In [-1, 1].

    Returns
    -------
    Tensor of shape (N,)
        Decibels.

    Examples
    --------
    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2)).round().item()
    20.0
    """
    gap = (images.clamp(-1, 1) - reference) / 2
    return -10 * torch.log10(gap.square().flatten(1).mean(1))


@dataclass(frozen=True)
class PixelSpace:
    """Leading principal components of the pixels of two domains, with a neighbour classifier in them.

    A first yardstick, not a judge of quality: it knows nothing but pixels.

    Parameters
    ----------
    pca : PCA
        Fitted to the references of both domains in equal number.
    classifier : KNeighborsClassifier
        True for the target domain.

    Examples
    --------
    >>> rng = torch.Generator().manual_seed(0)
    >>> own = torch.rand(20, 1, 8, 8, generator=rng)
    >>> space = PixelSpace.fit(-own, own, components=4)
    >>> space.is_target(-own).mean()
    np.float64(1.0)
    """

    pca: PCA
    classifier: KNeighborsClassifier

    @classmethod
    def fit(
        cls, target: torch.Tensor, own: torch.Tensor, *, components: int = 64, neighbours: int = 5
    ) -> PixelSpace:
        """Fit to references of the target domain and of the model's own, cut to equal numbers."""
        n = min(len(target), len(own))
        pixels = np.concatenate([_flat(target[:n]), _flat(own[:n])])
        pca = PCA(min(components, len(pixels) - 1), svd_solver="full").fit(pixels)
        labels = np.repeat([True, False], n)
        return cls(pca, KNeighborsClassifier(neighbours).fit(pca.transform(pixels), labels))

    def features(self, images: torch.Tensor) -> np.ndarray:
        """Principal components of images, (N, components), scaled to a mean variance of one."""
        scale = np.sqrt(self.pca.explained_variance_.mean())
        return self.pca.transform(_flat(images)) / scale

    def is_target(self, images: torch.Tensor) -> np.ndarray:
        """Whether most neighbours of each image are of the target domain, (N,) booleans."""
        return self.classifier.predict(self.pca.transform(_flat(images)))


def _flat(images: torch.Tensor) -> np.ndarray:
    return images.clamp(-1, 1).flatten(1).double().numpy()


def _share(hits: np.ndarray) -> Interval:
    test = binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(method="wilson")
    return Interval(float(hits.mean()), float(low), float(high))


def ratio_of_shares(hits: np.ndarray, baseline: np.ndarray | None = None) -> Interval:
    """Share of hits, or its ratio to the share in a baseline, with a Wilson interval.

    Parameters
    ----------
    hits : ndarray of shape (n,)
        Booleans.
    baseline : ndarray of shape (m,), optional
        Booleans of the group to compare with.

    Returns
    -------
    Interval
        With a baseline the interval joins the ends of both Wilson intervals, so it covers at least
        95 %.

    Raises
    ------
    ValueError
        If the baseline has no hit.

    Examples
    --------
    >>> ratio_of_shares(np.array([True, False])).value
    0.5
    """
    top = _share(np.asarray(hits))
    if baseline is None:
        return top
    base = _share(np.asarray(baseline))
    if base.value == 0:
        raise ValueError("the baseline has no hit, so no ratio to it exists")
    return Interval(top.value / base.value, top.low / base.high, top.high / base.low)


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel inception distance: unbiased squared MMD with the cubic polynomial kernel.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images; of m > n, the mean over blocks of n rows is taken.

    Returns
    -------
    float
        The distance; it may be slightly negative where the two laws agree.

    Raises
    ------
    ValueError
        If either set has fewer than two rows.

    Notes
    -----
    Binkowski et al., Demystifying MMD GANs, ICLR 2018, arXiv:1801.01401; computed by torchmetrics.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kid(rng.normal(size=(200, 3)), rng.normal(size=(200, 3)) + 1) > 0.5
    True
    """
    n = min(len(features), len(reference))
    if n < 2:
        raise ValueError(
            f"KID needs at least 2 images on each side, not {len(features)} and {len(reference)}"
        )
    a, b = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (features, reference))
    blocks = [b[i : i + n] for i in range(0, len(b) - n + 1, n)]
    return float(np.mean([float(poly_mmd(a[:n], block)) for block in blocks]))


@dataclass(frozen=True)
class PRDC:
    """How well generated images lie on the real ones, and the real ones on them.

    Parameters
    ----------
    precision : float
        Share of generated images within reach of a real one: are they good?
    recall : float
        Share of real images within reach of a generated one: is any kind missing?
    density : float
        How many real images have a generated one within reach, over the number expected of a real
        one; may exceed 1. An outlier among the real images moves it less than precision.
    coverage : float
        Share of real images that have a generated one within reach. An outlier among the generated
        images moves it less than recall.

    Examples
    --------
    >>> PRDC(1.0, 0.5, 1.2, 0.9).recall
    0.5
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _reach(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row."""
    return np.partition(pairwise_distances(features, features), neighbours, axis=1)[:, neighbours]


def prdc(features: np.ndarray, reference: np.ndarray, *, neighbours: int = 5) -> PRDC:
    """Precision, recall, density and coverage of generated images against real ones.

    An image is within reach of another if it is nearer to it than that one's k-th neighbour in its own
    set. All four depend on the number of images: compare only sets of equal size.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images.
    neighbours : int, default 5
        k.

    Returns
    -------
    PRDC
        All near 1 where both sets follow one law, but precision and recall fall short of it by what
        k and the number of images leave out: measure real images against real ones beside it.

    Raises
    ------
    ValueError
        If a set has not more than `neighbours` rows, or the two differ in f.

    Notes
    -----
    Precision and recall: Kynkaanniemi et al., Improved precision and recall metric for assessing
    generative models, NeurIPS 2019, arXiv:1904.06991. Density and coverage: Naeem et al., Reliable
    fidelity and diversity metrics for generative models, ICML 2020, arXiv:2002.09797, whose code
    compares by "nearer", not "nearer or as near", as here.

    Examples
    --------
    >>> real = np.random.default_rng(0).normal(size=(20, 3))
    >>> prdc(real, real), prdc(real + 100, real).coverage
    (PRDC(precision=1.0, recall=1.0, density=1.0, coverage=1.0), 0.0)
    """
    if not 1 <= neighbours < min(len(features), len(reference)):
        raise ValueError(
            f"{neighbours} neighbours cannot be found in sets of {len(features)} and "
            f"{len(reference)} images; use 1 or more, and more images than that on each side"
        )
    distances = pairwise_distances(reference, features)
    reach = _reach(reference, neighbours)
    near = distances < reach[:, None]
    return PRDC(
        precision=float(near.any(axis=0).mean()),
        recall=float((distances < _reach(features, neighbours)).any(axis=1).mean()),
        density=float(near.sum(axis=0).mean() / neighbours),
        coverage=float(near.any(axis=1).mean()),
    )


def jackknife(statistic: Callable[[np.ndarray], float], n: int, *, groups: int = 8) -> Interval:
    """Delete-a-group jackknife interval of a statistic of n exchangeable images.

    The naive bootstrap repeats images, and a statistic of pairs such as KID sees those repeats; the
    jackknife does not.

    Parameters
    ----------
    statistic : callable
        Maps an array of row numbers to a float.
    n : int
        Number of rows.
    groups : int, default 8
        Groups left out in turn.

    Returns
    -------
    Interval
        Estimate on all rows, plus and minus t(groups - 1) standard errors.

    Raises
    ------
    ValueError
        If there are fewer rows than groups.

    Examples
    --------
    >>> x = np.arange(80.0)
    >>> jackknife(lambda rows: x[rows].mean(), 80).value
    39.5
    """
    if not 2 <= groups <= n:
        raise ValueError(f"{n} rows cannot be cut into {groups} groups; use 2 to {n} groups")
    rows = np.arange(n)
    left_out = np.array([statistic(rows[rows % groups != g]) for g in range(groups)])
    value = float(statistic(rows))
    spread = np.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum())
    half = float(t.ppf(0.975, groups - 1) * spread)
    return Interval(value, value - half, value + half)


def novelty(images: torch.Tensor, fit: torch.Tensor, heldout: torch.Tensor) -> float:
    """Median distance to the nearest fitted image, in units of that of held-out images.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        Generated images.
    fit : Tensor of shape (M, C, H, W)
        Images that the sampler was fitted to.
    heldout : Tensor of shape (K, C, H, W)
        Images of the same domain that it never saw.

    Returns
    -------
    float
        Near 0 for copies, near 1 for images as new as held-out ones.

    Examples
    --------
    >>> rng = torch.Generator().manual_seed(0)
    >>> real = torch.rand(9, 1, 8, 8, generator=rng)
    >>> round(novelty(real[:4], real[:4], real[4:]), 6)
    0.0
    """
    reference = _flat(fit)
    nearest = [
        np.median(pairwise_distances(_flat(x), reference).min(axis=1)) for x in (images, heldout)
    ]
    return float(nearest[0] / nearest[1])


def median_interval(
    values: np.ndarray, over: np.ndarray | None = None, *, rng: np.random.Generator
) -> Interval:
    """Median of a value an image, or of its ratio to another value of the same image.

    Parameters
    ----------
    values : ndarray of shape (n,)
        One number an image.
    over : ndarray of shape (n,), optional
        Divide by these first, image by image.
    rng : numpy.random.Generator
        Source of the bootstrap.

    Returns
    -------
    Interval
        Percentile bootstrap over images, 2,000 resamples.

    Raises
    ------
    ValueError
        If there are fewer than two images.

    Examples
    --------
    >>> median_interval(np.arange(1.0, 10), rng=np.random.default_rng(0)).value
    5.0
    """
    numbers = (
        np.asarray(values, float) if over is None else np.asarray(values, float) / np.asarray(over)
    )
    if len(numbers) < 2:
        raise ValueError(f"a bootstrap over images needs at least 2 of them, not {len(numbers)}")
    drawn = bootstrap((numbers,), np.median, n_resamples=2000, method="percentile", rng=rng)
    low, high = drawn.confidence_interval
    return Interval(float(np.median(numbers)), float(low), float(high))
