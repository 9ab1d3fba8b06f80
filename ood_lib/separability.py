"""How well two sets of images separate: AUROC by several scores, centre distance, divergences.

Everything is read from one Gram matrix of the two sets together, so d may be far above n. A score that
is fitted is fitted to some folds and judged on another: at d >> n any two sets, even two halves of one,
separate without error on the images that a classifier was fitted to. Folds share what they are fitted
to, so the scores of equal laws scatter more than independent ones would; the p-values allow for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.stats import norm, rankdata

from ood_lib.gram import Rows, Samples, gram_matrix
from ood_lib.metrics import Interval

__all__ = [
    "SCORES",
    "CentreDistance",
    "Divergence",
    "Report",
    "Separability",
    "auroc",
    "auroc_interval",
    "report",
]

LEAST = 6  # images in a set: two halves of three, the fewest that a covariance is fitted to
RESAMPLES = 2000
COPY = 1e-12  # squared distance of copies, over their squared norms: what rounding leaves
DEAR = 99  # permutations of a score whose every fit costs n^3
C2ST_PENALTY = 0.1  # of the mean eigenvalue of the kernel

Pairs = list[tuple[np.ndarray, np.ndarray]]


def _checked_scores(scores: np.ndarray, what: str) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(
            f"{what} have shape {scores.shape}, {np.isfinite(scores).sum()} of them finite; "
            "give one finite number an image, and one image or more"
        )
    return scores


def _share_ordered(scores: np.ndarray, ood: np.ndarray) -> np.ndarray:
    """Share of pairs in which the OOD image scores higher, for scores (t, B) or (t, 1), labels (t, B)."""
    above = ood.sum(axis=0)
    ranks = np.where(ood, rankdata(scores, axis=0), 0).sum(axis=0)
    return (ranks - above * (above + 1) / 2) / (above * (len(ood) - above))


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Probability that an OOD image scores higher than an in-domain one, ties counted half.

    Parameters
    ----------
    id_scores : ndarray of shape (n,)
        Scores of in-domain images; higher means more OOD.
    ood_scores : ndarray of shape (m,)
        Scores of out-of-domain images.

    Returns
    -------
    float
        1 where all OOD images score higher, 0.5 by chance. With the sets exchanged it is one minus this.

    Raises
    ------
    ValueError
        If a set is empty or a score is not finite.

    Examples
    --------
    >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.875
    """
    below = _checked_scores(id_scores, "id_scores")
    above = _checked_scores(ood_scores, "ood_scores")
    ood = np.repeat([False, True], [len(below), len(above)])
    return float(_share_ordered(np.concatenate([below, above])[:, None], ood[:, None])[0])


def auroc_interval(
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """AUROC with a 95 % bootstrap interval over images, each set resampled on its own.

    Parameters
    ----------
    id_scores : ndarray of shape (n,)
        Scores of in-domain images, fitted without them; higher means more OOD.
    ood_scores : ndarray of shape (m,)
        Scores of out-of-domain images.
    rng : numpy.random.Generator
        Source of the bootstrap.
    resamples : int, default 2000
        Bootstrap samples.

    Returns
    -------
    Interval
        Percentiles. Where the sets separate without error no resample differs; the end is then that of
        Clopper and Pearson for min(n, m) disjoint pairs, all in order.

    Raises
    ------
    ValueError
        If a set is empty or a score is not finite.

    Examples
    --------
    >>> found = auroc_interval(np.arange(20.0), np.arange(20.0) + 30, rng=np.random.default_rng(0))
    >>> found.value, round(found.low, 3)
    (1.0, 0.832)
    """
    value = auroc(id_scores, ood_scores)
    pairs = [(np.asarray(id_scores, np.float64), np.asarray(ood_scores, np.float64))]
    return Interval(value, *_bootstrap(pairs, value, rng, resamples))


def _bootstrap(
    pairs: Pairs, value: float, rng: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """95 % interval of the share of ordered pairs; only scores of one fit are compared."""
    total = np.zeros(resamples)
    for below, above in pairs:
        gaps = above - below[:, None]
        ordered = (gaps > 0) + 0.5 * (gaps == 0)
        drawn = [
            rng.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples) for x in (below, above)
        ]
        total += ((drawn[0] @ ordered) * drawn[1]).sum(axis=1)
    low, high = np.quantile(total / sum(len(b) * len(a) for b, a in pairs), [0.025, 0.975])
    certain = 0.025 ** (1 / sum(min(len(b), len(a)) for b, a in pairs))
    if value in (0, 1):
        return (certain, 1.0) if value else (0.0, 1 - certain)
    return float(low), float(high)


@dataclass(frozen=True)
class Separability:
    """How well one score separates two sets of images.

    Parameters
    ----------
    name : str
        The score.
    auroc : float
        Share of pairs, both scored by one fit, in which the OOD image scores higher.
    low, high : float
        95 % interval: a bootstrap over images with the fits held fixed, stretched by the ratio of the
        spreads of AUROC under permuted labels with and without fitting anew.
    pvalue : float
        Of the permutation test that the two sets follow one law: one-sided for "learned", two-sided else.
        Labels are permuted within folds and the score is fitted anew.
    direction : {"fixed", "from_id", "learned"}
        What higher means before any OOD image is seen: "fixed" by the score itself, so that exchanging the
        sets gives ``1 - auroc``; "from_id": further from the fitted in-domain images, and exchanging the
        sets fits to the other one; "learned" from the labels, and exchanging the sets changes nothing but
        the folds.
    n, m, d : int
        In-domain images, OOD images, numbers of an image.

    Examples
    --------
    >>> Separability("norm", 0.9, 0.8, 1.0, 0.01, "fixed", 20, 20, 5).to_frame().auroc.item()
    0.9
    """

    name: str
    auroc: float
    low: float
    high: float
    pvalue: float
    direction: str
    n: int
    m: int
    d: int

    def to_frame(self) -> pd.DataFrame:
        """Give one row with a column a field."""
        return pd.DataFrame([asdict(self)])

    @classmethod
    def from_scores(
        cls,
        id_scores: np.ndarray,
        ood_scores: np.ndarray,
        *,
        name: str,
        d: int,
        rng: np.random.Generator,
        permutations: int = 999,
    ) -> Separability:
        """Judge scores whose fit saw neither set, so that permuting the labels alone is exact."""
        value, low, high = auroc_interval(id_scores, ood_scores, rng=rng)
        n, m = len(id_scores), len(ood_scores)
        labels = _permuted(
            np.repeat([False, True], [n, m]), np.zeros(n + m, int), permutations, rng
        )
        scores = np.concatenate([id_scores, ood_scores])[:, None]
        p = _pvalue(_share_ordered(scores, labels), "fixed")
        return cls(name, value, low, high, p, "fixed", n, m, d)


def _permuted(
    ood: np.ndarray, fold: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Labels (N, 1 + permutations): as given, then permuted within each fold."""
    labels = np.repeat(ood[:, None], 1 + permutations, axis=1)
    for k in np.unique(fold):
        rows = fold == k
        labels[rows, 1:] = rng.permuted(labels[rows, 1:], axis=0)
    return labels


def _pvalue(found: np.ndarray, direction: str) -> float:
    """Share of labellings, the given one included, that separate at least as well as the given one."""
    size = found if direction == "learned" else np.abs(found - 0.5)
    return float(np.mean(size >= size[0] - 1e-12))


@dataclass(frozen=True)
class _Joint:
    """Inner products of two sets of images, the in-domain ones first, and what is read from them."""

    gram: np.ndarray
    n: int
    d: int

    @property
    def ood(self) -> np.ndarray:
        return np.arange(len(self.gram)) >= self.n

    @cached_property
    def squares(self) -> np.ndarray:
        return np.diag(self.gram).copy()

    @cached_property
    def distances(self) -> np.ndarray:
        """Squared distances (N, N)."""
        return np.clip(self.squares[:, None] + self.squares - 2 * self.gram, 0, None)

    @cached_property
    def kernel(self) -> np.ndarray:
        """Gaussian kernel whose width is the median distance."""
        apart = self.distances[np.triu_indices(len(self.gram), 1)]
        return np.exp(-self.distances / max(np.median(apart), np.finfo(float).tiny))


def _joint(id_samples: Samples, ood_samples: Samples, block: int) -> _Joint:
    """Check two sets and take their inner products."""
    both = Rows((id_samples, ood_samples))
    total, d = both.shape
    n, _ = Rows((id_samples,)).shape
    if min(n, total - n) < LEAST:
        raise ValueError(
            f"{n} in-domain and {total - n} OOD images cannot be cross-fitted; give {LEAST} or more "
            "of each (auroc takes scores of any number)"
        )
    joint = _Joint(gram_matrix(both, block=block), n, d)
    _refuse_copies(joint)
    return joint


def _refuse_copies(joint: _Joint) -> None:
    """Refuse copies: one in a fitted fold gives the other away, and no permutation shows it."""
    size = joint.squares[:, None] + joint.squares
    first, second = np.nonzero(np.triu(joint.distances <= COPY * size, 1))
    if len(first):
        names = [
            f"id[{i}]" if i < joint.n else f"ood[{i - joint.n}]" for i in (first[0], second[0])
        ]
        raise ValueError(
            f"{len(first)} pairs of images are copies, the first {names[0]} and {names[1]}; images must be "
            "drawn independently: keep one of each (np.unique(..., axis=0))"
        )


def _centred(gram: np.ndarray) -> np.ndarray:
    means = gram.mean(axis=0)
    return gram - means - means[:, None] + means.mean()


def _floor(centred: np.ndarray, d: int) -> tuple[float, float]:
    """Shrinkage of Ledoit and Wolf as ``(gain, floor)``: covariance ``gain Y^T Y + floor I``."""
    n, diagonal = len(centred), np.diag(centred)
    scale, squared = diagonal.sum() / (n * d), np.square(centred).sum() / n**2
    spread = squared - d * scale**2
    noise = (np.square(diagonal).mean() - squared) / n
    # else S is spherical already, and the same whatever its shrinkage
    rho = min(1.0, noise / spread) if spread > 1e-12 * squared else 1.0
    if not rho * scale > 0:
        raise ValueError(
            f"a covariance was fitted to {n} images that do not vary in more than one way; give more "
            "images, or fewer folds"
        )
    return (1 - rho) / n, rho * scale


# A score maps (joint, train, test, labels) to (len(test), B) numbers, higher = more OOD: train and test
# are row numbers, and labels (N, B) hold in each column a labelling to fit to. One that is the same for
# all labellings, or too dear to fit to more than the first, gives one column.


def _norm(joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Norm, as if the origin were the centre of the domain."""
    return np.sqrt(joint.squares[test])[:, None]


def _weights(train: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Columns that average over the in-domain images among the fitted ones."""
    own = ~labels[train]
    return own / own.sum(axis=0)


def _distance(joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance to the in-domain mean."""
    w = _weights(train, labels)
    spread = (w * (joint.gram[np.ix_(train, train)] @ w)).sum(axis=0)
    return joint.squares[test, None] - 2 * joint.gram[np.ix_(test, train)] @ w + spread


def _typicality(
    joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Distance of the log-density of N(0, I) from its in-domain mean."""
    mean = joint.squares[train] @ _weights(train, labels)
    return np.abs(joint.squares[test, None] - mean)


def _mahalanobis(
    joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Squared Mahalanobis distance to the in-domain Gaussian."""
    columns = [_mahalanobis_to(joint, train[~column], test) for column in labels[train].T]
    return np.stack(columns, axis=1)


def _mahalanobis_to(joint: _Joint, own: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance to the Gaussian of some rows, by Woodbury's identity."""
    gram, cross = joint.gram[np.ix_(own, own)], joint.gram[np.ix_(own, test)]
    means, centred = gram.mean(axis=0), _centred(gram)
    gain, floor = _floor(centred, joint.d)
    along = cross - cross.mean(axis=0) - means[:, None] + means.mean()
    apart = joint.squares[test] - 2 * cross.mean(axis=0) + means.mean()
    root = cholesky(gain * centred + floor * np.eye(len(own)), lower=True, check_finite=False)
    whitened = solve_triangular(root, along, lower=True, check_finite=False)
    return (apart - gain * np.square(whitened).sum(axis=0)) / floor


def _ridge(
    kernel: np.ndarray, train: np.ndarray, test: np.ndarray, labels: np.ndarray, penalty: float
) -> np.ndarray:
    """Kernel ridge regression of the labels, all labellings at once."""
    cross = kernel[np.ix_(test, train)]
    inner = kernel[np.ix_(train, train)]
    cross = cross - cross.mean(axis=1, keepdims=True) - inner.mean(axis=0) + inner.mean()
    factor = cho_factor(_centred(inner) + penalty * np.eye(len(train)), check_finite=False)
    return cross @ cho_solve(factor, labels[train].astype(float), check_finite=False)


def _linear(joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Linear discriminant with the shrunk covariance of both sets together."""
    gain, floor = _floor(_centred(joint.gram[np.ix_(train, train)]), joint.d)
    penalty = floor / max(gain, np.finfo(float).eps * floor)
    return _ridge(joint.gram, train, test, labels, penalty)


def _c2st(joint: _Joint, train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Least-squares classifier with a Gaussian kernel."""
    inner = _centred(joint.kernel[np.ix_(train, train)])
    return _ridge(joint.kernel, train, test, labels, C2ST_PENALTY * np.trace(inner) / len(train))


Score = Callable[[_Joint, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_SCORES: dict[str, tuple[Score, str]] = {
    "norm": (_norm, "fixed"),
    "distance": (_distance, "from_id"),
    "typicality": (_typicality, "from_id"),
    "mahalanobis": (_mahalanobis, "from_id"),
    "linear": (_linear, "learned"),
    "c2st": (_c2st, "learned"),
}
SCORES = tuple(_SCORES)


def _judge(
    name: str,
    joint: _Joint,
    fold: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
) -> Separability:
    """Cross-fit one score under every labelling; the first is the given one."""
    score, direction = _SCORES[name]
    if direction == "fixed":  # nothing is fitted, so that all pairs can be compared
        fold = np.zeros_like(fold)
    if name == "mahalanobis":
        labels = labels[:, : 1 + DEAR]
    shares, pairs = [], []
    for k in np.unique(fold):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        scores, ood = score(joint, train, test, labels), labels[test]
        pairs.append((scores[~ood[:, 0], 0], scores[ood[:, 0], 0]))
        shares.append(_share_ordered(scores, ood))
    found = np.average(shares, axis=0, weights=[len(below) * len(above) for below, above in pairs])
    value, n = float(found[0]), joint.n
    low, high = _widened(value, *_bootstrap(pairs, value, rng, resamples), found[1:], pairs)
    p = _pvalue(found, direction)
    return Separability(name, value, low, high, p, direction, n, len(fold) - n, joint.d)


def _widened(
    value: float, low: float, high: float, null: np.ndarray, pairs: Pairs
) -> tuple[float, float]:
    """Stretch an interval of fixed fits by what fitting anew adds to the spread under permuted labels."""
    sizes = np.array([(len(below), len(above)) for below, above in pairs])
    products = sizes.prod(axis=1)
    fixed = (products * (sizes.sum(axis=1) + 1)).sum() / 12 / products.sum() ** 2
    factor = max(1.0, float(null.std() / np.sqrt(fixed)))
    return max(0.0, value - factor * (value - low)), min(1.0, value + factor * (high - value))


@dataclass(frozen=True)
class CentreDistance:
    """Squared distance of two mean images, without the bias of finite samples.

    Parameters
    ----------
    squared : float
        Unbiased estimate of ``|mu - nu|^2``; it may be negative where the means agree.
    low, high : float
        95 % jackknife interval of `squared`.
    pvalue : float
        One-sided permutation test that the two sets follow one law.
    plain : float
        Squared distance of the sample means, which is too large by ``tr S / n + tr S' / m``.
    sigma : float
        Standard deviation of a number of an image about its own mean, rms over numbers and sets.
    d : int
        Numbers of an image.

    Examples
    --------
    >>> found = CentreDistance(9.0, 8.0, 10.0, 0.01, 9.5, sigma=2.0, d=16)
    >>> found.distance, found.rule, found.passes
    (3.0, 4.0, False)
    """

    squared: float
    low: float
    high: float
    pvalue: float
    plain: float
    sigma: float
    d: int

    @property
    def distance(self) -> float:
        """Distance of the centres, 0 where the estimate of its square is negative."""
        return float(np.sqrt(max(self.squared, 0)))

    @property
    def rule(self) -> float:
        """The paper's bar ``sigma d^(1/4)``; its code takes sigma = 1."""
        return float(self.sigma * self.d**0.25)

    @property
    def passes(self) -> bool:
        """Whether the distance is above the paper's bar."""
        return self.distance > self.rule


def _centre_distance(joint: _Joint, labels: np.ndarray) -> CentreDistance:
    gram, n, total = joint.gram, joint.n, len(joint.gram)
    m = total - n
    sides = np.stack([~labels, labels]).astype(float)
    sums = np.einsum("sib,tib->stb", sides, np.stack([gram @ side for side in sides]))
    inner = (np.diagonal(sums).T - joint.squares @ sides) / np.array([[n * (n - 1)], [m * (m - 1)]])
    found = inner.sum(axis=0) - 2 * sums[0, 1] / (n * m)
    plain = float(sums[0, 0, 0] / n**2 + sums[1, 1, 0] / m**2 - 2 * sums[0, 1, 0] / (n * m))
    half = float(norm.ppf(0.975)) * _jackknife_error(joint, inner[:, 0])
    own = sums[[0, 1], [0, 1], 0] / [n, m]
    variance = (joint.squares @ sides[:, :, 0].T - own) / [n - 1, m - 1]
    value = float(found[0])
    p = float(np.mean(found >= value - 1e-12 * abs(value)))
    sigma = float(np.sqrt(variance.mean() / joint.d))
    return CentreDistance(value, value - half, value + half, p, plain, sigma, joint.d)


def _jackknife_error(joint: _Joint, inner: np.ndarray) -> float:
    """Take the standard error of the centre distance from its values without each image in turn."""
    variance, ood = 0.0, joint.ood
    for side, mean in zip((~ood, ood), inner, strict=True):
        size = side.sum()
        rows = joint.gram[side]
        others = (rows[:, side].sum(axis=1) - joint.squares[side]) / (size - 1)
        cross = rows[:, ~side].mean(axis=1)
        # leaving out image i moves the two means by these deviations, to the factors of each
        moved = 2 * (others - mean) / (size - 2) - 2 * (cross - cross.mean()) / (size - 1)
        variance += (size - 1) / size * np.square(moved).sum()
    return float(np.sqrt(variance))


@dataclass(frozen=True)
class Divergence:
    """A divergence of the Gaussians fitted to two sets, beside that of two halves of the domain.

    Parameters
    ----------
    name : str
        "kl(ood, id)", "kl(id, ood)" or "bhattacharyya".
    value : float
        Nats between in-domain images and as many OOD images, mean over splits.
    null : float
        The same between those in-domain images and as many other ones.
    spread : float
        Standard deviation of the excess over splits. Splits share images: it is no standard error.
    n : int
        Images that each Gaussian is fitted to.
    splits : int
        Random splits.

    Examples
    --------
    >>> Divergence("bhattacharyya", 20.0, 12.0, 0.5, 128, 8).excess
    8.0
    """

    name: str
    value: float
    null: float
    spread: float
    n: int
    splits: int

    @property
    def excess(self) -> float:
        """Nats above those between halves of one domain; 0 in the mean for equal laws."""
        return self.value - self.null


DIVERGENCES = ("kl(ood, id)", "kl(id, ood)", "bhattacharyya")


def _divergences(joint: _Joint, splits: int, rng: np.random.Generator) -> tuple[Divergence, ...]:
    n, m = joint.n, len(joint.gram) - joint.n
    half = min(n // 2, m)
    found = np.empty((splits, 2, len(DIVERGENCES)))
    for row in found:
        own = rng.permutation(n)[: 2 * half]
        other = n + rng.permutation(m)[:half]
        row[0] = _between(joint, own[:half], other)
        row[1] = _between(joint, own[:half], own[half:])
    value, null = found.mean(axis=0)
    spread = (found[:, 0] - found[:, 1]).std(axis=0, ddof=1 if splits > 1 else 0)
    numbers = zip(DIVERGENCES, value, null, spread, strict=True)
    return tuple(
        Divergence(k, float(a), float(b), float(s), half, splits) for k, a, b, s in numbers
    )


def _between(joint: _Joint, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """KL(b, a), KL(a, b) and Bhattacharyya distance of the Gaussians fitted to two sets of rows."""
    rows, first = np.concatenate([a, b]), np.arange(len(a) + len(b)) < len(a)
    gram = joint.gram[np.ix_(rows, rows)]
    shift = np.where(first, -1 / len(a), 1 / len(b))
    along, apart = gram @ shift, float(shift @ gram @ shift)
    for side in (first, ~first):  # each set about its own mean
        gram[side] -= gram[side].mean(axis=0)
        gram[:, side] -= gram[:, side].mean(axis=1, keepdims=True)
        along[side] -= along[side].mean()
    laws = [_floor(gram[np.ix_(side, side)], joint.d) for side in (first, ~first)]
    gains = np.where(first, laws[0][0], laws[1][0])
    each = [
        _Shrunk(gram[np.ix_(s, s)], along[s], gains[s], law[1], joint.d)
        for s, law in zip((first, ~first), laws, strict=True)
    ]
    both = _Shrunk(gram, along, gains / 2, (laws[0][1] + laws[1][1]) / 2, joint.d)
    cross = gram[np.ix_(first, ~first)]
    forward = each[0].divergence_of(each[1], cross, apart)
    backward = each[1].divergence_of(each[0], cross.T, apart)
    mixed = both.quadratic(apart) / 8 + (both.logdet - (each[0].logdet + each[1].logdet) / 2) / 2
    return forward, backward, mixed


class _Shrunk:
    """A covariance ``Y^T diag(gains) Y + floor I`` of d coordinates, known by ``gram = Y Y^T``.

    `along` is ``Y delta`` for the one vector whose quadratic form is asked for.
    """

    def __init__(
        self, gram: np.ndarray, along: np.ndarray, gains: np.ndarray, floor: float, d: int
    ) -> None:
        roots = np.sqrt(gains)
        self.gram, self.along, self.roots, self.floor, self.d = gram, roots * along, roots, floor, d
        inner = roots[:, None] * gram * roots + floor * np.eye(len(gram))
        self.factor = cho_factor(inner, lower=True, check_finite=False)

    @property
    def logdet(self) -> float:
        diagonal = np.log(np.diag(self.factor[0])).sum()
        return float(2 * diagonal + (self.d - len(self.gram)) * np.log(self.floor))

    @property
    def trace(self) -> float:
        return float(self.roots**2 @ np.diag(self.gram) + self.d * self.floor)

    def quadratic(self, square: float) -> float:
        """``delta^T C^-1 delta`` for a vector of that squared norm."""
        return float((square - self.along @ cho_solve(self.factor, self.along)) / self.floor)

    def divergence_of(self, other: _Shrunk, cross: np.ndarray, apart: float) -> float:
        """KL divergence of the other law from this one; `cross` is ``Y Y'^T``."""
        scaled = self.roots[:, None] * cross * other.roots
        inside = scaled @ scaled.T + other.floor * self.roots[:, None] * self.gram * self.roots
        trace = (other.trace - np.trace(cho_solve(self.factor, inside))) / self.floor
        return (trace + self.quadratic(apart) - self.d + self.logdet - other.logdet) / 2


@dataclass(frozen=True)
class Report:
    """Everything that `report` measures of two sets.

    Parameters
    ----------
    results : tuple of Separability
        One a score.
    centres : CentreDistance
        Distance of the means.
    divergences : tuple of Divergence
        Between the fitted Gaussians.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> found = report(rng.normal(size=(20, 50)), rng.normal(size=(20, 50)) + 1, rng=rng)
    >>> found["linear"].auroc
    1.0
    """

    results: tuple[Separability, ...]
    centres: CentreDistance
    divergences: tuple[Divergence, ...]

    def __getitem__(self, name: str) -> Separability:
        """Give the result of one score."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"no score {name!r}; there are {', '.join(r.name for r in self.results)}")

    def to_frame(self) -> pd.DataFrame:
        """One row a score, with the columns of `Separability`."""
        return pd.DataFrame([asdict(result) for result in self.results])


def report(
    id_samples: Samples,
    ood_samples: Samples,
    *,
    rng: np.random.Generator,
    scores: Sequence[str] = SCORES,
    folds: int = 5,
    permutations: int = 999,
    resamples: int = RESAMPLES,
    splits: int = 8,
    block: int = 8192,
) -> Report:
    """Measure how well in-domain and OOD images separate.

    Parameters
    ----------
    id_samples : samples of shape (n, d)
        In-domain images, latents or features, of any real type: an array, or whatever `gram_matrix` takes.
    ood_samples : samples of shape (m, d)
        Out-of-domain ones.
    rng : numpy.random.Generator
        Source of folds, permutations, bootstrap and splits.
    scores : sequence of str, default SCORES
        ``norm``; ``distance`` to the in-domain mean; ``typicality``, the distance of the squared norm
        from its in-domain mean, on either side; ``mahalanobis``, with the in-domain covariance shrunk by
        Ledoit and Wolf; ``linear``, the discriminant with the covariance of both sets shrunk likewise;
        ``c2st``, a classifier with a Gaussian kernel.
    folds : int, default 5
        Each image is scored by a fit that did not see its fold.
    permutations : int, default 999
        Permutations of the labels; the smallest p-value is one over one more. "mahalanobis" takes the
        first 99, as each of its fits costs n^3.
    resamples : int, default 2000
        Bootstrap samples.
    splits : int, default 8
        Splits of the in-domain images for the divergences.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Report
        AUROC with interval and p-value a score, distance of the centres, divergences.

    Raises
    ------
    ValueError
        If a set has fewer than six images, shapes differ, a number is not finite, two images are copies,
        or an option is wrong.

    Notes
    -----
    Folds hold both sets in equal shares, and the AUROC compares only images scored by one fit. Labels are
    permuted within folds and scores fitted anew, so the p-values are exact whatever n and d are.
    Mahalanobis distance: Lee et al., NeurIPS 2018, arXiv:1807.03888, with one class. Typicality: Nalisnick
    et al., arXiv:1906.02994, with batches of one. C2ST: Lopez-Paz and Oquab, ICLR 2017,
    arXiv:1610.06545, with AUROC in place of accuracy and kernel ridge in place of a network. Shrinkage:
    Ledoit and Wolf, J. Multivariate Anal. 88, 2004. The bar of the centre distance is in the released code
    of Zhu et al., arXiv:2310.09213. KL divergence and Bhattacharyya distance of two Gaussians are large
    for equal laws when n < d, hence the halves. Time grows as n^2 d + n^3.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> same = report(rng.normal(size=(20, 50)), rng.normal(size=(20, 50)), rng=rng)
    >>> bool((same.to_frame().pvalue > 0.01).all())
    True
    """
    unknown = [name for name in scores if name not in SCORES]
    if unknown:
        raise ValueError(f"scores {unknown} are not known; use {', '.join(SCORES)}")
    joint = _joint(id_samples, ood_samples, block)
    smaller = min(joint.n, len(joint.gram) - joint.n)
    for what, value, least, most in (
        ("folds", folds, 2, smaller),
        ("permutations", permutations, 1, np.inf),
        ("resamples", resamples, 1, np.inf),
        ("splits", splits, 1, np.inf),
    ):
        if not least <= value <= most:
            raise ValueError(f"{what} is {value}; use {least} or more, up to {most}")
    sizes = (joint.n, len(joint.gram) - joint.n)
    fold = np.concatenate([rng.permutation(size) % folds for size in sizes])
    labels = _permuted(joint.ood, fold, permutations, rng)
    results = tuple(_judge(name, joint, fold, labels, rng, resamples) for name in scores)
    return Report(results, _centre_distance(joint, labels), _divergences(joint, splits, rng))
