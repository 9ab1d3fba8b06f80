"""How good and how new images are: shares of a domain, KID, FID, PRDC, C2ST, novelty, diversity.

Images are always judged against held-out ones, never against those that a sampler was fitted to; only
novelty looks at the latter. Intervals of a comparison cover the draw of both sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import binomtest, bootstrap, t
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.image.kid import poly_kernel

from ood_lib.gram import pairwise_distances

if TYPE_CHECKING:  # the classifier takes its intervals from here
    from ood_lib.classifier import DomainClassifier

__all__ = [
    "PRDC",
    "Interval",
    "PixelSpace",
    "SampleQuality",
    "c2st",
    "diversity",
    "fid",
    "jackknife",
    "kid",
    "median_interval",
    "nearest_ratio",
    "novelty",
    "prdc",
    "prdc_intervals",
    "psnr",
    "ratio_of_shares",
    "sample_quality",
]


GROUPS = 8  # left out in turn by the jackknife
FOLDS = 10  # of the classifier two-sample test
COPY = 1e-6  # distance of copies, over the largest feature: what rounding leaves
INVERSE_PENALTY = 0.1  # its C in scikit-learn, on standardised features


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


def _jackknife(statistic: Callable[..., Any], sizes: tuple[int, ...], groups: int) -> np.ndarray:
    """Value, lower and upper end of each number of a statistic, (3, ...)."""
    if not 2 <= groups <= min(sizes):
        raise ValueError(
            f"{min(sizes)} rows cannot be cut into {groups} groups; use 2 to {min(sizes)} groups"
        )
    rows = [np.arange(n) for n in sizes]
    left_out = np.array([statistic(*(r[r % groups != g] for r in rows)) for g in range(groups)])
    value = np.asarray(statistic(*rows), dtype=np.float64)
    spread = np.sqrt(
        (groups - 1) / groups * np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    )
    half = t.ppf(0.975, groups - 1) * spread
    return np.stack([value, value - half, value + half])


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


def _pair(features: np.ndarray, reference: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64, each of two rows or more, with as many finite features."""
    x, y = (np.asarray(z, dtype=np.float64) for z in (features, reference))
    if x.ndim != 2 or y.ndim != 2 or min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{what} needs at least 2 images on each side and as many features, (n, f) and (m, f), "
            f"not {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features hold NaN or infinity; every number must be finite")
    return x, y


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel inception distance: unbiased squared MMD with the cubic polynomial kernel.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images.

    Returns
    -------
    float
        The distance over all pairs; it may be slightly negative where the two laws agree. Its mean
        does not depend on the numbers of images.

    Raises
    ------
    ValueError
        If either set has fewer than two rows, the two differ in f, or a number is not finite.

    Notes
    -----
    Binkowski et al., Demystifying MMD GANs, ICLR 2018, arXiv:1801.01401, equation 4. torchmetrics
    draws subsets of equal size from both sets; where one subset is all of both, the two agree.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kid(rng.normal(size=(200, 3)), rng.normal(size=(100, 3)) + 1) > 0.5
    True
    """
    x, y = (torch.from_numpy(z) for z in _pair(features, reference, "KID"))
    within = 0.0
    for z in (x, y):
        kernel = poly_kernel(z, z)
        within += float(kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))
    return within - 2 * float(poly_kernel(x, y).mean())


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet inception distance: that of the Gaussians fitted to two sets of features.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images.

    Returns
    -------
    float
        Not negative up to rounding. It is biased upwards, the more the fewer images there are: compare
        only distances between sets of equal size.

    Raises
    ------
    ValueError
        If either set has fewer than two rows, the two differ in f, or a number is not finite.

    Notes
    -----
    Heusel et al., GANs trained by a two time-scale update rule, NeurIPS 2017, arXiv:1706.08500,
    equation 6. With centred X and Y, tr (S_X S_Y)^(1/2) is the sum of the singular values of X Y^T over
    sqrt((n - 1) (m - 1)), so no f x f matrix is formed.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(fid(x + 2, x), 9)
    12.0
    """
    x, y = _pair(features, reference, "FID")
    gap = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    x, y = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(gap + np.square(x).sum() + np.square(y).sum() - 2 * shared)


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


def jackknife(statistic: Callable[..., float], *sizes: int, groups: int = GROUPS) -> Interval:
    """Delete-a-group jackknife interval of a statistic of one or more sets of exchangeable images.

    The naive bootstrap repeats images, and a statistic of pairs such as KID sees those repeats; the
    jackknife does not.

    Parameters
    ----------
    statistic : callable
        Maps an array of row numbers for each set to a float.
    *sizes : int
        Number of rows of each set. Sets are independent; of each the same share is left out at once.
    groups : int, default 8
        Groups left out in turn.

    Returns
    -------
    Interval
        Estimate on all rows, plus and minus t(groups - 1) standard errors. It covers the mean of the
        statistic at these numbers of rows, with the bias that the statistic has there.

    Raises
    ------
    ValueError
        If a set has fewer rows than groups.

    Notes
    -----
    Shao and Wu, A general theory for jackknife variance estimation, Annals of Statistics 17, 1989.

    Examples
    --------
    >>> x = np.arange(80.0)
    >>> jackknife(lambda rows: x[rows].mean(), 80).value
    39.5
    """
    return Interval(*_jackknife(statistic, sizes, groups).tolist())


def _nearest(features: np.ndarray, fit: np.ndarray) -> np.ndarray:
    return pairwise_distances(features, fit).min(axis=1)


def nearest_ratio(features: np.ndarray, fit: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """Distance of each image to the nearest fitted one, over the median of that of held-out images.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    fit : ndarray of shape (m, f)
        Features of the images that the sampler was fitted to.
    heldout : ndarray of shape (k, f)
        Features of images of the same domain that it never saw.

    Returns
    -------
    ndarray of shape (n,)
        0 for copies, about 1 for images as new as held-out ones.

    Raises
    ------
    ValueError
        If at least half of the held-out images are copies of fitted ones, or a set is empty.

    Examples
    --------
    >>> fit, heldout = np.zeros((1, 2)), np.ones((3, 2))
    >>> nearest_ratio(np.array([[0.0, 0], [2, 2]]), fit, heldout).round(9)
    array([0., 2.])
    """
    if not min(len(features), len(fit), len(heldout)):
        raise ValueError(
            f"novelty needs an image in each set, not {len(features)} generated, {len(fit)} fitted, "
            f"{len(heldout)} held out"
        )
    usual = np.median(_nearest(heldout, fit))
    if usual <= COPY * np.abs(fit).max():
        raise ValueError(
            "half of the held-out images or more are copies of fitted ones, so no distance can be "
            "compared with theirs; hold out images that are not among the fitted ones"
        )
    return _nearest(features, fit) / usual


def prdc_intervals(
    features: np.ndarray, reference: np.ndarray, *, neighbours: int = 5, groups: int = GROUPS
) -> dict[str, Interval]:
    """Precision, recall, density and coverage as by `prdc`, each with its interval.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images.
    neighbours : int, default 5
        k.
    groups : int, default 8
        Groups that the jackknife leaves out in turn.

    Returns
    -------
    dict of str to Interval
        By the jackknife; that of a share is widened to the Wilson interval, which does not shrink to
        nothing where no image or every image is a hit, and kept in [0, 1].

    Raises
    ------
    ValueError
        If a set has not more than `neighbours` rows when a group is left out, or the two differ in f.

    Examples
    --------
    >>> real = np.random.default_rng(0).normal(size=(40, 3))
    >>> prdc_intervals(real, real)["coverage"].high
    1.0
    """
    x, y = _pair(features, reference, "PRDC")
    found = _jackknife(
        lambda a, b: astuple(prdc(x[a], y[b], neighbours=neighbours)), (len(x), len(y)), groups
    )
    names = [field.name for field in fields(PRDC)]
    intervals = {name: Interval(*row) for name, row in zip(names, found.T.tolist(), strict=True)}
    counts = {"precision": len(x), "recall": len(y), "coverage": len(y)}
    return intervals | {name: _widened(intervals[name], n) for name, n in counts.items()}


def _widened(interval: Interval, n: int) -> Interval:
    """Widen the interval of a share of n images to that of Wilson; keep it in [0, 1]."""
    low, high = binomtest(round(interval.value * n), n).proportion_ci(method="wilson")
    return Interval(
        interval.value, max(0.0, min(interval.low, low)), min(1.0, max(interval.high, high))
    )


def c2st(features: np.ndarray, reference: np.ndarray, *, folds: int = FOLDS) -> Interval:
    """Classifier two-sample test: accuracy of a logistic regression that tells the sets apart.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of real images; both sets are cut to equal numbers.
    folds : int, default 10
        Every fold is judged by a regression fitted to the others.

    Returns
    -------
    Interval
        0.5 where the laws are equal, 1 where every image is told right. Folds share what they are
        fitted to, so the Wilson interval is too narrow; this one widens the spread of the folds.

    Raises
    ------
    ValueError
        If there are fewer images than folds, fewer than two folds, or the sets differ in f.

    Notes
    -----
    Lopez-Paz and Oquab, Revisiting classifier two-sample tests, ICLR 2017, arXiv:1610.06545. Interval:
    Nadeau and Bengio, Inference for the generalization error, Machine Learning 52, 2003, section 3.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(40, 3))
    >>> c2st(x + 9, x).value
    1.0
    """
    x, y = _pair(features, reference, "C2ST")
    n = min(len(x), len(y))
    if not 2 <= folds <= n:
        raise ValueError(f"{n} images a set cannot be cut into {folds} folds; use 2 to {n} folds")
    rows, labels = np.concatenate([x[:n], y[:n]]), np.repeat([True, False], n)
    fold = np.tile(np.arange(n) % folds, 2)
    scores = []
    for test in (fold == k for k in range(folds)):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
        )
        scores.append(model.fit(rows[~test], labels[~test]).score(rows[test], labels[test]))
    value = float(np.mean(scores))
    spread = np.std(scores, ddof=1) * np.sqrt(1 / folds + 1 / (folds - 1))
    half = float(t.ppf(0.975, folds - 1) * spread)
    return _widened(Interval(value, value - half, value + half), 2 * n)


def diversity(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean distance of two generated images over that of two held-out ones, features normalised.

    Parameters
    ----------
    features : ndarray of shape (n, f)
        Features of generated images.
    reference : ndarray of shape (m, f)
        Features of held-out images.

    Returns
    -------
    float
        0 where all images are one, 1 where they differ from each other as held-out ones do.

    Raises
    ------
    ValueError
        If either set has fewer than two rows, the two differ in f, or all held-out images are one.

    Notes
    -----
    As in LPIPS (Zhang et al., CVPR 2018, arXiv:1801.03924, equation 1), features are scaled to norm one
    before they are compared; here they are those of a whole image.

    Examples
    --------
    >>> x = np.eye(3)
    >>> round(diversity(x, 5 * x), 9), diversity(x[:1].repeat(3, axis=0), x)
    (1.0, 0.0)
    """
    made, real = (_mean_distance(x) for x in _pair(features, reference, "diversity"))
    if real <= COPY:
        raise ValueError("all held-out images are copies of one; give different ones")
    return made / real


def _mean_distance(features: np.ndarray) -> float:
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-300)
    return float(pdist(unit).mean())


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
    return float(np.median(nearest_ratio(_flat(images), _flat(fit), _flat(heldout))))


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


@dataclass(frozen=True, eq=False)
class SampleQuality:
    """How good, how varied and how new generated images are, against held-out images of their domain.

    A field that ends in ``_floor`` holds what real images get by the same measure. FID and PRDC depend
    on the number of images, so both they and their floors are taken over `n_equal` images a side: the
    held-out images at even rows are the reference, those at odd rows the real images.

    Parameters
    ----------
    domain : str or None
        Class of the target domain; None where no classifier knows it.
    n, n_fit, n_heldout, n_equal : int
        Images generated, fitted to, held out, and on each side of FID and PRDC.
    kid, kid_floor : Interval
        KID to all held-out images, of the generated and of the fitted images.
    kid_floored : Interval
        The larger of the two, end by end: no sampler is credited with being nearer to the held-out
        images than real ones are.
    fid, fid_floor : Interval
        FID over `n_equal` images a side.
    prdc, prdc_floor : dict of str to Interval
        Precision, recall, density and coverage over `n_equal` images a side.
    c2st : Interval
        Accuracy with which generated and held-out images are told apart; 0.5 is chance.
    novelty : Interval
        Median of `nearest_ratio`; the fitted images count as given.
    nearest_ratio : ndarray of shape (n,)
        Distance of each generated image to the nearest fitted one, over the median of held-out images.
    diversity : Interval
        Mean distance of two generated images over that of two held-out ones.
    share, share_floor : Interval or None
        Share called `domain` by the classifier, of the generated and of the held-out images.
    share_ratio : Interval or None
        The first over the second.
    share_none : Interval or None
        Share of the generated images called none of the domains.

    Examples
    --------
    >>> sorted(field.name for field in fields(SampleQuality) if field.name.endswith("_floor"))
    ['fid_floor', 'kid_floor', 'prdc_floor', 'share_floor']
    """

    domain: str | None
    n: int
    n_fit: int
    n_heldout: int
    n_equal: int
    kid: Interval
    kid_floor: Interval
    kid_floored: Interval
    fid: Interval
    fid_floor: Interval
    prdc: dict[str, Interval]
    prdc_floor: dict[str, Interval]
    c2st: Interval
    novelty: Interval
    nearest_ratio: np.ndarray
    diversity: Interval
    share: Interval | None
    share_floor: Interval | None
    share_ratio: Interval | None
    share_none: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON; an interval becomes a dict of value, low and high."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def sample_quality(
    generated: torch.Tensor,
    *,
    fit: torch.Tensor,
    heldout: torch.Tensor,
    features: Callable[[torch.Tensor], np.ndarray],
    classifier: DomainClassifier | None = None,
    domain: str | None = None,
    neighbours: int = 5,
) -> SampleQuality:
    """Measure generated images of a domain by everything that there is here.

    Parameters
    ----------
    generated : Tensor of shape (N, C, H, W)
        Images of a sampler, in [-1, 1].
    fit : Tensor of shape (M, C, H, W)
        Images that the sampler was fitted to.
    heldout : Tensor of shape (K, C, H, W)
        Images of the same domain that it never saw.
    features : callable
        Maps images to features (N, f): `ood_lib.features.imagenet`, or `features` of the classifier.
    classifier : DomainClassifier, optional
        Tells the domains apart, and from what is none of them; without it there are no shares.
    domain : str, optional
        The target domain; a class of the classifier, needed with it.
    neighbours : int, default 5
        Of precision, recall, density and coverage.

    Returns
    -------
    SampleQuality
        Every measure with its 95 % interval. No random number is drawn: rows are taken in their order,
        so shuffle images that come sorted.

    Raises
    ------
    ValueError
        If a set has too few images, a held-out image is among the fitted ones, the classifier calls no
        held-out image `domain`, or the domain is not known to it.

    Notes
    -----
    With `kid`, `fid`, `prdc_intervals`, `c2st`, `nearest_ratio`, `diversity` and `ratio_of_shares`,
    which name their sources.

    Examples
    --------
    >>> from ood_lib.classifier import load_classifier
    >>> from ood_lib.domains import load_images
    >>> judge = load_classifier()
    >>> fit, heldout = (load_images("digits", split=x, n=40) for x in ("fit", "heldout"))
    >>> replay = sample_quality(
    ...     fit, fit=fit, heldout=heldout, features=judge.features, classifier=judge, domain="digits"
    ... )
    >>> replay.n, round(replay.novelty.value, 3)
    (40, 0.0)
    """
    size = _check_sets(generated, fit, heldout, neighbours)
    x, known, real = (features(images) for images in (generated, fit, heldout))
    even, odd = real[::2][:size], real[1::2][:size]
    distance, floor_distance = (_between(kid, z, real, least=-np.inf) for z in (x, known))
    return SampleQuality(
        domain=domain,
        n=len(x),
        n_fit=len(known),
        n_heldout=len(real),
        n_equal=size,
        kid=distance,
        kid_floor=floor_distance,
        kid_floored=Interval(*np.maximum(distance, floor_distance).tolist()),
        fid=_between(fid, x[:size], even),
        fid_floor=_between(fid, odd, even),
        prdc=prdc_intervals(x[:size], even, neighbours=neighbours),
        prdc_floor=prdc_intervals(odd, even, neighbours=neighbours),
        c2st=c2st(x, real),
        novelty=_between(lambda a, b: float(np.median(nearest_ratio(a, known, b))), x, real),
        nearest_ratio=nearest_ratio(x, known, real),
        diversity=_between(diversity, x, real),
        **_shares(generated, heldout, classifier, domain),
    )


def _shares(
    generated: torch.Tensor,
    heldout: torch.Tensor,
    classifier: DomainClassifier | None,
    domain: str | None,
) -> dict[str, Interval | None]:
    """Shares of the domain and of none of them, as fields of `SampleQuality`."""
    if classifier is None:
        return dict.fromkeys(("share", "share_floor", "share_ratio", "share_none"))
    if domain is None:
        raise ValueError("a classifier was given and no domain; name the class to count")
    hits, floor = (classifier.is_domain(images, domain) for images in (generated, heldout))
    return {
        "share": ratio_of_shares(hits),
        "share_floor": ratio_of_shares(floor),
        "share_ratio": ratio_of_shares(hits, floor),
        "share_none": classifier.share(generated, classifier.classes[-1]),
    }


def _between(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    x: np.ndarray,
    y: np.ndarray,
    *,
    least: float = 0.0,
) -> Interval:
    """Jackknife interval of a statistic of the rows of two sets that is never under `least`."""
    value, low, high = jackknife(lambda a, b: statistic(x[a], y[b]), len(x), len(y))
    return Interval(value, max(low, least), high)


def _check_sets(
    generated: torch.Tensor, fit: torch.Tensor, heldout: torch.Tensor, neighbours: int
) -> int:
    """Refuse sets that are too small or mixed up; return the number of images on a side of FID, PRDC."""
    least = neighbours + 1 + GROUPS  # more than `neighbours` are left with any group left out
    needed = {
        "generated": (generated, least),
        "fit": (fit, GROUPS),
        "heldout": (heldout, 2 * least),
    }
    for name, (images, number) in needed.items():
        if images.ndim != 4 or len(images) < number or images.shape[1:] != heldout.shape[1:]:
            raise ValueError(
                f"{name} has shape {tuple(images.shape)}; it needs {number} images or more, of the "
                f"shape of those held out, {tuple(heldout.shape[1:])}"
            )
    both = _contents(fit) & _contents(heldout)
    if both:
        raise ValueError(
            f"{len(both)} held-out images are among the fitted ones; hold out images that the sampler "
            "never saw"
        )
    return min(len(generated), len(heldout) // 2)


def _contents(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.detach().cpu().float()}
