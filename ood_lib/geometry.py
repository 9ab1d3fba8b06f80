"""Distances and angles of latents: what they are, what they should be, and the paper's acceptance rules.

Notation: samples z have mean mu and covariance S; t = tr S and q = tr S^2. The effective rank t^2 / q
is d where S is isotropic and 1 where all variance lies along one direction. Everything is read from
inner products of samples, streamed over coordinates about the mean, so that a large mean costs no digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm, t

from ood_lib.gram import BLOCK

__all__ = [
    "RELEASED",
    "RULES",
    "Acceptance",
    "ClosedForm",
    "Geometry",
    "Statistic",
    "Targets",
    "accept",
    "law_of_cosines",
    "measure",
    "slerp",
    "vertex_angles",
]

RULES = ("distance", "origin angle", "vertex angle")
SAME = 1e-12  # squared distance over squared norms below which two float64 samples are equal


@dataclass(frozen=True)
class Statistic:
    """A mean over images, pairs or triangles, with a 95 % interval over images.

    Parameters
    ----------
    value : float
        The estimate.
    low, high : float
        Ends of the interval.
    n, d : int
        Samples, and coordinates of a sample.
    expected : float, optional
        What a Gaussian with the measured mu^2, tr S and tr S^2 would give, up to what vanishes as the
        effective rank grows; None where the statistic is one of these moments itself.

    Examples
    --------
    >>> Statistic(0.5, 0.4, 0.6, 10, 99).degrees().value
    60.0
    """

    value: float
    low: float
    high: float
    n: int
    d: int
    expected: float | None = None

    def degrees(self) -> Statistic:
        """Turn a cosine into the angle that has it; the ends of the interval change places."""
        turned = (None if c is None else _angle(c) for c in (self.value, self.expected))
        value, expected = turned
        return Statistic(value, _angle(self.high), _angle(self.low), self.n, self.d, expected)


@dataclass(frozen=True)
class ClosedForm:
    """What distances and angles are for samples of N(mu, S), from four moments.

    Parameters
    ----------
    mean_square : float
        Squared norm of mu; an unbiased estimate of it may be negative.
    trace : float
        t = tr S.
    trace_square : float
        q = tr S^2.
    d : int
        Coordinates.
    mean_variance : float, default 0
        mu^T S mu, the variance of mu^T z.

    Notes
    -----
    ``norm^2 = mu^2 + t`` and ``distance^2 = 2 t`` hold for the mean squares of any law. The cosine of
    two samples at the origin is ``mu^2 / (mu^2 + t)`` and that at a third one 1/2, up to what vanishes
    as the effective rank grows. Spreads are of first order in ``sqrt(q) / t``.

    Examples
    --------
    >>> law = ClosedForm.isotropic(0.975, 82.2, 196608)
    >>> round(law.distance, 1), round(law.origin_angle, 1), law.vertex_angle
    (611.4, 88.0, 60.0)
    """

    mean_square: float
    trace: float
    trace_square: float
    d: int
    mean_variance: float = 0.0

    @classmethod
    def isotropic(cls, sigma: float, mean_norm: float, d: int) -> ClosedForm:
        """Moments of N(mu, sigma^2 I) in d dimensions."""
        variance = sigma**2
        return cls(mean_norm**2, variance * d, variance**2 * d, d, variance * mean_norm**2)

    @classmethod
    def fitting(cls, targets: Targets) -> ClosedForm:
        """Moments of the isotropic Gaussian whose distance and origin angle are the targets."""
        trace = targets.distance**2 / 2
        cosine = np.cos(np.radians(targets.origin_angle))
        mean_square = max(trace * cosine / (1 - cosine), 0.0)
        return cls.isotropic(
            float(np.sqrt(trace / targets.d)), float(np.sqrt(mean_square)), targets.d
        )

    @property
    def sigma(self) -> float:
        """Root mean variance of a coordinate."""
        return float(np.sqrt(self.trace / self.d))

    @property
    def norm(self) -> float:
        """Root mean square norm."""
        return float(np.sqrt(self.mean_square + self.trace))

    @property
    def distance(self) -> float:
        """Root mean square distance of two samples."""
        return float(np.sqrt(2 * self.trace))

    @property
    def origin_cos(self) -> float:
        """Cosine of the angle of two samples at the origin."""
        return self.mean_square / (self.mean_square + self.trace)

    @property
    def origin_angle(self) -> float:
        """Angle of two samples at the origin, in degrees."""
        return _angle(self.origin_cos)

    @property
    def vertex_angle(self) -> float:
        """Mean angle of two samples at a third one, in degrees: 60 for every law."""
        return 60.0

    @property
    def effective_rank(self) -> float:
        """Effective rank t^2 / q, between 1 and d."""
        return self.trace**2 / self.trace_square

    @property
    def vertex_cos(self) -> float:
        """Mean cosine at a third sample, ``1/2 - 3 / (16 r)`` with the effective rank r."""
        return 0.5 - 3 / 16 / self.effective_rank

    def rule_spread(self, n_references: int = 10) -> np.ndarray:
        """Give the standard deviations, over samples, of the three means that the rules test.

        Parameters
        ----------
        n_references : int, default 10
            References that each mean is taken over; 1 gives the spread of single values.

        Returns
        -------
        ndarray of shape (3,)
            Distance, origin angle and vertex angle; angles in degrees.

        Notes
        -----
        Each is a part of the candidate, which no number of references averages out, and a part of
        each reference: ``(q/t) (1/4 + 3/4k)`` for the distance, ``(1/8 + 7/16k) / r`` for the
        vertex cosine, with k references. For one reference the former is q/t, the latter 9/16r.

        Examples
        --------
        >>> ClosedForm.isotropic(0.975, 82.2, 196608).rule_spread().round(3)
        array([0.556, 0.046, 0.061])
        """
        k, whole = n_references, self.mean_square + self.trace
        ratio = self.trace_square / self.trace
        own = (1 - self.origin_cos) ** 2 * self.mean_variance
        own += self.origin_cos**2 * self.trace_square / 2
        variances = np.array(
            [
                ratio * (1 / 4 + 3 / 4 / k),
                (own * (1 + 1 / k) + self.trace_square / k) / whole**2 / (1 - self.origin_cos**2),
                (1 / 8 + 7 / 16 / k) / self.effective_rank / 0.75,
            ]
        )
        return np.sqrt(variances) * [1, np.degrees(1), np.degrees(1)]

    def pass_rates(self, targets: Targets, *, n_references: int = 10) -> np.ndarray:
        """Predict the share of fresh draws that pass each rule, when the references are draws too.

        Parameters
        ----------
        targets : Targets
            The rules.
        n_references : int, default 10
            References that each mean is taken over.

        Returns
        -------
        ndarray of shape (3,)
            Shares in [0, 1], from normal approximations to the three means.

        Examples
        --------
        >>> law = ClosedForm.fitting(RELEASED["CODE-F"])
        >>> law.pass_rates(RELEASED["CODE-F"]).round(2)
        array([0.41, 0.97, 0.9 ])
        """
        middles = np.array([self.distance, self.origin_angle, self.vertex_angle])
        gaps, spread = targets.centres - middles, self.rule_spread(n_references)
        ends = [(gaps + side * targets.tolerances) / spread for side in (-1, 1)]
        return norm.cdf(ends[1]) - norm.cdf(ends[0])


@dataclass(frozen=True)
class Geometry:
    """Norms, distances, angles and effective rank of a sample; made by `measure`.

    Parameters
    ----------
    norm : Statistic
        Mean norm.
    distance : Statistic
        Mean distance of two samples.
    origin_cos : Statistic
        Mean cosine of two samples seen from the origin.
    vertex_cos : Statistic
        Mean cosine of two samples seen from a third, over all triangles.
    effective_rank : Statistic
        (tr S)^2 / tr S^2, both parts estimated without bias.
    moments : ClosedForm
        Unbiased estimates of mu^2, tr S and tr S^2; without mu^T S mu.

    Examples
    --------
    >>> z = 3 + np.random.default_rng(0).normal(size=(50, 2000))
    >>> found = measure(z)
    >>> round(found.distance.value), round(found.origin_cos.degrees().value)
    (63, 26)
    """

    norm: Statistic
    distance: Statistic
    origin_cos: Statistic
    vertex_cos: Statistic
    effective_rank: Statistic
    moments: ClosedForm


@dataclass(frozen=True)
class Targets:
    """The three acceptance rules: what each mean must be, and by how much it may miss.

    Parameters
    ----------
    distance : float
        Mean distance of a candidate to its references.
    origin_angle : float
        Mean angle of candidate and reference at the origin, in degrees.
    vertex_angle : float
        Mean angle of two references at the candidate, in degrees.
    distance_tolerance, origin_tolerance, vertex_tolerance : float
        Largest gaps that pass, in the same units.
    d : int
        Coordinates of the latents that the rules are for.

    Raises
    ------
    ValueError
        If a number is not finite or a tolerance not positive.

    Examples
    --------
    >>> RELEASED["CODE-F"].scaled(3072).distance
    76.425
    """

    distance: float
    origin_angle: float
    vertex_angle: float
    distance_tolerance: float
    origin_tolerance: float
    vertex_tolerance: float
    d: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.centres).all() and (self.tolerances > 0).all() and self.d >= 1):
            raise ValueError(
                f"targets are {self.centres}, tolerances {self.tolerances}, d = {self.d}; use finite "
                "targets, tolerances above 0 and 1 or more coordinates"
            )

    @property
    def centres(self) -> np.ndarray:
        """The three targets, in the order of `RULES`."""
        return np.array([self.distance, self.origin_angle, self.vertex_angle])

    @property
    def tolerances(self) -> np.ndarray:
        """The three tolerances, in the order of `RULES`."""
        return np.array([self.distance_tolerance, self.origin_tolerance, self.vertex_tolerance])

    def scaled(self, d: int, *, tolerances: bool = True) -> Targets:
        """Carry the rules to latents of another size with the same law of a coordinate.

        Parameters
        ----------
        d : int
            Coordinates.
        tolerances : bool, default True
            Scale those of the angles, too. False keeps the numbers of the larger latents, which are
            too narrow for smaller ones.

        Returns
        -------
        Targets
            A distance grows with sqrt(d) and its spread does not; the spread of an angle falls with
            sqrt(d) and the angle does not.
        """
        factor = np.sqrt(d / self.d)
        turn = 1 / factor if tolerances else 1.0
        return replace(
            self,
            distance=float(self.distance * factor),
            origin_tolerance=float(self.origin_tolerance * turn),
            vertex_tolerance=float(self.vertex_tolerance * turn),
            d=d,
        )

    @classmethod
    def from_reference(
        cls,
        references: np.ndarray,
        *,
        width: float = 2.0,
        n_references: int = 10,
        rng: np.random.Generator,
        block: int = BLOCK,
    ) -> Targets:
        """Take the rules from latents: each is tested against the others, as a candidate would be.

        Parameters
        ----------
        references : array of shape (n, d)
            Latents of the domain, three or more.
        width : float, default 2
            Tolerance in standard deviations over the references; 2 lets about 95 % of them pass each
            rule.
        n_references : int, default 10
            References that each mean is taken over, as in `accept`.
        rng : numpy.random.Generator
            Source of the references drawn.
        block : int, default 8192
            Coordinates held in float64 at a time.

        Returns
        -------
        Targets
            Means over the references, and their spread times `width`.

        Raises
        ------
        ValueError
            As in `accept`, or if `width` is not positive or no spread is left to scale.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> found = Targets.from_reference(rng.normal(size=(99, 5000)), rng=rng)
        >>> [round(x) for x in found.centres.tolist()]
        [100, 90, 60]
        """
        itself = np.arange(references.shape[0])
        means = _three_means(references, references, itself, n_references, rng, block)
        spread = width * means.std(axis=0, ddof=1)
        return cls(*means.mean(axis=0).tolist(), *spread.tolist(), d=references.shape[1])


RELEASED = {
    # the distance rule of the first version asks two references one by one, not the mean of ten
    "CODE-V1": Targets(577.0, 90.0, 60.0, 5.0, 2.0, 2.0, d=196_608),
    "CODE-F": Targets(611.4, 88.0, 60.0, 0.3, 0.1, 0.1, d=196_608),
}


@dataclass(frozen=True)
class Acceptance:
    """What the three rules say of each candidate; columns in the order of `RULES`.

    Parameters
    ----------
    means : ndarray of shape (m, 3)
        Mean distance, origin angle and vertex angle; angles in degrees.
    passed : ndarray of shape (m, 3)
        Whether each mean is within its tolerance.

    Examples
    --------
    >>> Acceptance(np.zeros((2, 3)), np.array([[True, True, True], [True, False, True]])).rate
    0.5
    """

    means: np.ndarray
    passed: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """Whether each candidate passes all three rules, (m,) booleans."""
        return self.passed.all(axis=1)

    @property
    def rate(self) -> float:
        """Share of the candidates that pass all three rules."""
        return float(self.accepted.mean())


def _angle(cosine: float) -> float:
    # rounded: cos 60 degrees has no exact float
    return round(float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), 12)


@dataclass(frozen=True)
class _Pairs:
    """Norms (m,) and (n,) of two samples, their squared distances and their inner products (m, n)."""

    norms: tuple[np.ndarray, np.ndarray]
    squares: np.ndarray
    inner: np.ndarray

    @property
    def cosines(self) -> np.ndarray:
        """Cosines at the origin."""
        if min(x.min() for x in self.norms) == 0:
            raise ValueError(
                "a sample is zero everywhere and has no angle at the origin; leave it out"
            )
        return np.clip(self.inner / (self.norms[0][:, None] * self.norms[1]), -1, 1)


def _pairs(a: np.ndarray, b: np.ndarray, block: int) -> _Pairs:
    if block < 1:
        raise ValueError(f"block is {block}; use 1 or more coordinates")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"samples have shapes {a.shape} and {b.shape}; both must be (n, d) with one d"
        )
    about, shift = np.zeros((a.shape[0], b.shape[0])), 0.0
    square_a, along_a, whole_a = np.zeros((3, a.shape[0]))
    square_b, along_b, whole_b = np.zeros((3, b.shape[0]))
    for first in range(0, a.shape[1], block):
        x, y = (np.asarray(s[:, first : first + block], dtype=np.float64) for s in (a, b))
        whole_a, whole_b = whole_a + _row_squares(x), whole_b + _row_squares(y)
        middle = y.mean(axis=0)
        x, y = x - middle, y - middle
        about += x @ y.T
        square_a, square_b = square_a + _row_squares(x), square_b + _row_squares(y)
        along_a, along_b = along_a + x @ middle, along_b + y @ middle
        shift += middle @ middle
    if not (np.isfinite(about).all() and np.isfinite(shift)):
        raise ValueError(
            "samples hold NaN, infinity or numbers too large to square; every number must be finite"
        )
    size = square_a[:, None] + square_b
    squares = size - 2 * about
    squares[squares <= SAME * size] = 0
    inner = about + along_a[:, None] + along_b + shift
    return _Pairs((np.sqrt(whole_a), np.sqrt(whole_b)), squares, inner)


def _row_squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", rows, rows)


def _interval(value: float, variance: float, n: int, d: int, expected: float) -> Statistic:
    half = float(t.ppf(0.975, n - 1) * np.sqrt(variance))
    value = float(value)
    return Statistic(value, value - half, value + half, n, d, expected)


def _pair_mean(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of a symmetric (n, n) table over pairs, its unbiased variance, and a floor of the latter.

    With distinct i, j, k, l the mean of ``h_ij h_kl`` estimates the squared expectation, so the mean's
    square less this is its variance without bias, dependence between pairs included (Wang and Lindsay,
    Statistica Sinica 2014). The jackknife would count the part of pairs twice, which for a zero mean
    is all of it. The floor is what independent pairs would have.
    """
    n = len(values)
    pairs = n * (n - 1)
    mean = (values.sum() - np.trace(values)) / pairs
    centred = values - mean
    np.fill_diagonal(centred, 0)
    square = np.square(centred).sum()
    rows = np.square(centred.sum(axis=1)).sum()
    return mean, (4 * rows - 2 * square) / (pairs * (n - 2) * (n - 3)), 2 * square / pairs**2


def _over_pairs(values: np.ndarray, d: int, expected: float) -> Statistic:
    mean, variance, floor = _pair_mean(values)
    return _interval(mean, max(variance, floor), len(values), d, expected)


def _centred(squares: np.ndarray) -> np.ndarray:
    """Inner products of centred samples without the bias of the sample mean; rows sum to zero.

    U-centring: Szekely and Rizzo, Annals of Statistics 42, 2014, of -1/2 times squared distances.
    """
    n = len(squares)
    rows = squares.sum(axis=1) / (n - 2)
    inner = (rows[:, None] + rows - squares - rows.sum() / (n - 1)) / 2
    np.fill_diagonal(inner, 0)
    return inner


def _effective_rank(squares: np.ndarray, d: int) -> tuple[Statistic, float]:
    """Effective rank with an interval on its logarithm, and tr S^2."""
    n = len(squares)
    trace, variance, _ = _pair_mean(squares / 2)
    products = np.square(_centred(squares))
    trace_square = products.sum() / (n * (n - 3))
    value = (trace**2 - variance) / trace_square
    # the logarithm to first order, as one number a pair
    influence = squares / trace - products * (n - 1) / (n - 3) / trace_square
    _, spread, floor = _pair_mean(influence)
    factor = np.exp(t.ppf(0.975, n - 1) * np.sqrt(max(spread, floor)))
    return Statistic(float(value), float(value / factor), float(value * factor), n, d), trace_square


def _vertex_cos(squares: np.ndarray, d: int, expected: float) -> Statistic:
    """Mean cosine over all triangles, from one product of n x n matrices, with a jackknife over samples.

    By the law of cosines the sum at vertex j over ordered pairs of other samples is
    ``s_j p_j - (W D W)_jj / 2 - (n - 1)``, with D the squared distances, W the inverse distances, s and
    p the row sums of W and of the distances.
    """
    n = len(squares)
    lengths = np.sqrt(squares)
    inverse = 1 / (lengths + np.eye(n)) - np.eye(n)
    weights, sums, through = inverse.sum(axis=1), lengths.sum(axis=1), inverse @ squares
    at_vertex = weights * sums - (through * inverse).sum(axis=1) / 2 - (n - 1)
    at_ends = inverse @ sums + lengths @ weights - (through * inverse).sum(axis=0) - 2 * (n - 1)
    total, triples = at_vertex.sum(), n * (n - 1) * (n - 2)
    left_out = (total - at_vertex - at_ends) / (triples * (n - 3) / n)
    variance = (n - 1) / n * np.square(left_out - left_out.mean()).sum()
    return _interval(total / triples, variance, n, d, expected)


def measure(samples: np.ndarray, *, block: int = BLOCK) -> Geometry:
    """Measure norms, distances, angles and effective rank, with intervals over the samples.

    Parameters
    ----------
    samples : array of shape (n, d)
        Four or more latents, no two of them equal and none zero; integers are taken as float64. Any
        object with a shape whose column slices ``samples[:, a:b]`` are arrays will do.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Geometry
        Each statistic with its interval and the closed form of N(mu, S) beside it.

    Raises
    ------
    ValueError
        If there are fewer than four samples, a number is not finite, two samples are equal, or one is
        zero.

    Notes
    -----
    Pairs that share an image depend on each other, so a bootstrap over pairs is far too narrow, and
    one over images repeats images and meets distances of zero. The intervals here are t intervals from
    the unbiased variance of a mean over pairs, and from the jackknife over images for triangles; the
    interval of the effective rank is one of its logarithm. The mean *angle* of all triangles is 60
    degrees for any samples, as the angles of each sum to 180; the mean cosine is below 1/2 by what the
    triangles lack of being equilateral. tr S^2 is estimated as by Zhou and Guo, Statistics and
    Probability Letters 129, 2017. Cost: n^2 d + n^3 operations, n^2 numbers and one block of memory.

    Examples
    --------
    >>> found = measure(np.random.default_rng(0).normal(size=(40, 1000)))
    >>> found.effective_rank.low < 1000 < found.effective_rank.high
    True
    >>> found.vertex_cos.degrees().value.__round__(1)
    60.0
    """
    n, d = samples.shape if len(samples.shape) == 2 else (0, 0)
    if n < 4:
        raise ValueError(
            f"samples have shape {samples.shape}; intervals over pairs need (n, d) with n >= 4"
        )
    pairs = _pairs(samples, samples, block)
    squares = (pairs.squares + pairs.squares.T) / 2
    np.fill_diagonal(squares, 0)
    _check_distinct(squares)
    rank, trace_square = _effective_rank(squares, d)
    trace = float(squares.sum() / (n * (n - 1)) / 2)
    norms = pairs.norms[0]
    mean_square = float(np.square(norms).mean()) - trace
    law = ClosedForm(mean_square, trace, trace_square, d)
    return Geometry(
        _interval(norms.mean(), norms.var(ddof=1) / n, n, d, law.norm),
        _over_pairs(np.sqrt(squares), d, law.distance),
        _over_pairs(pairs.cosines, d, law.origin_cos),
        _vertex_cos(squares, d, law.vertex_cos),
        rank,
        law,
    )


def _check_distinct(squares: np.ndarray) -> None:
    first, second = np.nonzero(np.triu(squares == 0, 1))
    if len(first):
        raise ValueError(
            f"samples {first[0]} and {second[0]} are equal ({len(first)} such pairs); a triangle needs "
            "distinct samples, so keep one of each"
        )


def vertex_angles(samples: np.ndarray, *, block: int = BLOCK) -> np.ndarray:
    """Angles of all triangles of samples, by vertex.

    Parameters
    ----------
    samples : array of shape (n, d)
        Three or more latents, no two of them equal.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (n, (n - 1) * (n - 2) / 2)
        Degrees, one row a vertex. The mean over all is 60 for any samples whatever.

    Raises
    ------
    ValueError
        If there are fewer than three samples, two are equal, or a number is not finite.

    Examples
    --------
    >>> vertex_angles(np.array([[3.0, 0], [0, 3.0], [3.0, 3.0]])).ravel().round(6)
    array([45., 45., 90.])
    """
    n = samples.shape[0]
    if n < 3:
        raise ValueError(f"a triangle needs 3 samples, not {n}")
    squares = _pairs(samples, samples, block).squares
    np.fill_diagonal(squares, 0)
    _check_distinct(squares)
    others = np.array([np.delete(np.arange(n), j) for j in range(n)])
    i, k = (others[:, ends] for ends in np.triu_indices(n - 1, 1))
    j = np.arange(n)[:, None]
    return np.degrees(np.arccos(law_of_cosines(squares[j, i], squares[j, k], squares[i, k])))


def law_of_cosines(left: np.ndarray, right: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Cosine of the angle between two sides of triangles.

    Parameters
    ----------
    left, right : ndarray
        Squared lengths of the sides at the vertex.
    across : ndarray
        Squared length of the side across; all three of one shape, or of shapes that broadcast.

    Returns
    -------
    ndarray
        In [-1, 1]; NaN where a side at the vertex has no length.

    Examples
    --------
    >>> law_of_cosines(np.array([9.0, 0.0]), np.array([16.0, 1.0]), np.array([25.0, 1.0]))
    array([ 0., nan])
    """
    sides = 2 * np.sqrt(left * right)
    unknown = np.full(np.broadcast(left, right, across).shape, np.nan)
    cosines = np.divide(left + right - across, sides, out=unknown, where=sides > 0)
    return np.clip(cosines, -1, 1)


def _three_means(
    candidates: np.ndarray,
    references: np.ndarray,
    own: np.ndarray | None,
    n_references: int,
    rng: np.random.Generator,
    block: int,
) -> np.ndarray:
    """Mean distance, origin angle and vertex angle of each candidate, (m, 3)."""
    m, n = candidates.shape[0], references.shape[0]
    left = n - (own is not None)
    if left < 2 or n_references < 1:
        raise ValueError(
            f"{n_references} draws from {left} references; use one draw or more, from two references "
            "or more beside the candidate itself"
        )
    if own is not None and (own.shape != (m,) or not ((own >= 0) & (own < n)).all()):
        raise ValueError(
            f"own has shape {own.shape}; give a row of the {n} references for each of {m}"
        )
    pairs = _pairs(candidates, references, block)
    among = _pairs(references, references, block).squares
    first = rng.integers(left, size=(m, n_references))
    second = (first + 1) % left
    if own is not None:  # the rows behind one's own move up
        first, second = (i + (i >= own[:, None]) for i in (first, second))
    row = np.arange(m)[:, None]
    ends = pairs.squares[row, first], pairs.squares[row, second], among[first, second]
    angles = (pairs.cosines[row, first], law_of_cosines(*ends))
    values = [np.sqrt(ends[0]), *(np.degrees(np.arccos(c)) for c in angles)]
    return np.stack([v.mean(axis=1) for v in values], axis=1)


def accept(
    candidates: np.ndarray,
    references: np.ndarray,
    targets: Targets,
    *,
    n_references: int = 10,
    own: np.ndarray | None = None,
    rng: np.random.Generator,
    block: int = BLOCK,
) -> Acceptance:
    """Test candidates by the three released rules.

    Parameters
    ----------
    candidates : array of shape (m, d)
        Latents to accept or reject.
    references : array of shape (n, d)
        Latents of the domain, two or more.
    targets : Targets
        The rules, for latents of this d.
    n_references : int, default 10
        References drawn for each candidate, with replacement.
    own : ndarray of shape (m,), optional
        Row of `references` that each candidate is, which is then left out of its draws.
    rng : numpy.random.Generator
        Source of the references drawn.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Acceptance
        The three means of each candidate, and which are within tolerance.

    Raises
    ------
    ValueError
        If the latents and the targets differ in d, a number is not finite, a latent is zero, there are
        fewer than two references, or `n_references` is below one.

    Notes
    -----
    As in the final code of Zhu et al., arXiv:2310.09213: each mean is taken over ten references i at
    random, the vertex angle lies at the candidate between references i and i + 1, and all three must
    be within tolerance. There i + 1 can run out of range; here the first reference follows the last. A
    candidate that equals a reference it is compared with has no vertex angle and fails.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(300, 3072))
    >>> rules = Targets.from_reference(z[:100], rng=rng)
    >>> found = accept(z[100:], z[:100], rules, rng=rng)
    >>> found.rate > 0.7, accept(1.1 * z[100:], z[:100], rules, rng=rng).rate
    (True, 0.0)
    """
    if candidates.shape[1:] != (targets.d,):
        raise ValueError(
            f"candidates have shape {candidates.shape}, the targets are for d = {targets.d}; use (m, d) "
            "latents, and `targets.scaled(d)` for those of another size"
        )
    means = _three_means(candidates, references, own, n_references, rng, block)
    return Acceptance(means, np.abs(means - targets.centres) <= targets.tolerances)


def slerp(
    start: np.ndarray,
    end: np.ndarray,
    shares: Sequence[float],
    *,
    centre: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Interpolate latents on the sphere, as the released sampler does.

    Parameters
    ----------
    start, end : ndarray of shape (m, d)
        Ends of m paths.
    shares : sequence of float, length k
        Places on each path, in [0, 1]; the code uses ``i / (k + 1)``.
    centre : ndarray of shape (d,) or float, default 0
        Centre of the sphere: the origin in the code; the mean latent keeps a path in the law of its ends.

    Returns
    -------
    ndarray of shape (m, k, d)
        Points, path by path, in the float type of the ends.

    Raises
    ------
    ValueError
        If the ends differ in shape, a share leaves [0, 1], or the ends of a path are opposite each other,
        at the centre, or not finite.

    Notes
    -----
    Directions follow the great circle (Shoemake, SIGGRAPH 1985), norms change linearly. For ends of
    norm one at an angle a the weights ``sin((1 - s) a) / sin a`` and ``sin(s a) / sin a`` sum to
    ``cos((1/2 - s) a) / cos(a / 2)``, so the mean that the ends share is multiplied by up to 1.41.

    Examples
    --------
    >>> slerp(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), [0.5]).round(3)
    array([[[0.707, 0.707]]])
    """
    share = np.asarray(shares, dtype=np.float64)
    if start.shape != end.shape or start.ndim != 2 or ((share < 0) | (share > 1)).any():
        raise ValueError(
            f"ends have shapes {start.shape} and {end.shape}, shares are {share}; use ends of one shape "
            "(m, d) and shares from 0 to 1"
        )
    a, b = start - centre, end - centre
    long_a, long_b = (np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64)) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):  # a zero end is refused below
        cosine = np.einsum("ij,ij->i", a, b, dtype=np.float64) / (long_a * long_b)
    if not (np.isfinite(cosine) & (cosine > -1 + 1e-12)).all():
        raise ValueError(
            "ends are opposite, at the centre, or not finite; the path between is unknown"
        )
    angle = np.arccos(np.clip(cosine, -1, 1))[:, None]
    # sinc keeps ends in one direction finite: there the path is a straight line
    ratio = [s * np.sinc(s * angle / np.pi) / np.sinc(angle / np.pi) for s in (1 - share, share)]
    length = (1 - share) * long_a[:, None] + share * long_b[:, None]
    weights = [r * length / x[:, None] for r, x in zip(ratio, (long_a, long_b), strict=True)]
    kind = np.result_type(start, end, np.float32)
    left, right = (w[..., None].astype(kind) for w in weights)
    points = left * a.astype(kind)[:, None]
    points += right * b.astype(kind)[:, None]
    points += np.asarray(centre, kind)
    return points
