"""Are these latents Gaussian? Tests that keep their level at d >> n, each against a named null law.

Four nested families of null laws: F0 is N(0, I), or a law that is given; F1 N(mu, s^2 I); F2 N(mu, D)
with D diagonal; F3 N(mu, S) with any S. A result names the widest family in which its p-value holds;
it holds in the narrower ones too. Everything comes from blocks of coordinates and from n x n Gram
matrices. A test that does not reject is no evidence for a Gaussian: read its effect and its power.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import log_ndtr
from scipy.stats import chi2, false_discovery_control, kstest, norm
from statsmodels.stats.multitest import multipletests

from ood_lib import nulls
from ood_lib.analytic import GaussianLaw
from ood_lib.schedule import NoiseSchedule

__all__ = [
    "FAMILIES",
    "Combined",
    "Report",
    "Result",
    "anderson_darling",
    "law_at",
    "report",
    "shapiro_wilk",
]

FAMILIES = ("F0", "F1", "F2", "F3")
BLOCK = 8192
FEWEST = 8  # samples below which not even one coordinate can be judged
PROJECTIONS = 64
COMPONENTS = 10  # of more the kurtosis would drown in noise
ROWS = 1000  # the Gram matrix's part costs n^3 for every draw of its null law
BOOTSTRAP = 999
BOOTSTRAP_OF_MANY = 399  # beyond MANY rows, where a draw costs rows^3
MANY = 500
FDR = 0.05
PATCH = 8
FEW_COLUMNS = 64
PATCHES = 48
PATCH_IMAGES = 200
NO_JOINT_TEST = (
    "no joint test of all coordinates with S free: at n <= d + 1 every affine-invariant statistic is "
    "constant, and held-out latents against a Gaussian fitted to the others reject true Gaussians"
)
LARGER = ("sphericity", "largest_eigenvalue", "energy", "skewness")  # only large values are odd


Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Result:
    """One test.

    Parameters
    ----------
    name : str
        What is tested.
    statistic : float
        Value of the statistic.
    pvalue : float
        Two-sided, or one-sided where only large values are odd; NaN where it cannot be tested.
    effect : float
        Size of the departure, in the unit that the test's docstring names.
    n : int
        Samples that were used.
    d : int
        Coordinates.
    null : str
        The widest family in which the p-value holds.
    reason : str, default ""
        Why it cannot be tested, or what the null law rests on.

    Examples
    --------
    >>> Result("norms", 0.03, 0.4, 1.0, 100, 3072, "F0").testable
    True
    """

    name: str
    statistic: float
    pvalue: float
    effect: float
    n: int
    d: int
    null: str
    reason: str = ""

    @property
    def testable(self) -> bool:
        """Whether there is a p-value."""
        return bool(np.isfinite(self.pvalue))


@dataclass(frozen=True)
class Combined:
    """All tests of a family together, by Holm's rule.

    Parameters
    ----------
    family : str
        The null law, "F0" to "F3".
    pvalue : float
        Of the family: the smallest adjusted one; NaN if nothing was testable.
    adjusted : dict of str to float
        Adjusted p-values under names such as ``"F1.energy"``.

    Examples
    --------
    >>> Combined("F3", 0.04, {"F3.dispersion": 0.04}).pvalue
    0.04
    """

    family: str
    pvalue: float
    adjusted: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Results of all tests.

    Parameters
    ----------
    results : tuple of Result
        In the order of the families.

    Examples
    --------
    >>> Report((Result("norms", 0.03, 0.4, 1.0, 100, 3072, "F0"),)).combined("F0").pvalue
    0.4
    """

    results: tuple[Result, ...]

    def __getitem__(self, key: str) -> Result:
        """Return the result under a name such as ``"F1.energy"``."""
        for result in self.results:
            if f"{result.null}.{result.name}" == key:
                return result
        known = ", ".join(f"{x.null}.{x.name}" for x in self.results)
        raise ValueError(f"there is no result {key!r}; there are {known}")

    def combined(self, family: str) -> Combined:
        """Combine all tests whose p-values hold in a family: its own and those of wider ones.

        Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
        """
        if family not in FAMILIES:
            raise ValueError(f"family is {family!r}; use one of {', '.join(FAMILIES)}")
        wider = FAMILIES[FAMILIES.index(family) :]
        held = [x for x in self.results if x.null in wider and x.testable]
        if not held:
            return Combined(family, float("nan"), {})
        adjusted = multipletests([x.pvalue for x in held], method="holm")[1]
        names = [f"{x.null}.{x.name}" for x in held]
        return Combined(
            family, float(adjusted.min()), dict(zip(names, map(float, adjusted), strict=True))
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each result."""
        return pd.DataFrame([asdict(x) for x in self.results])


# ------------------------------------------------------------------------------------ the own law


def law_at(law: GaussianLaw, schedule: NoiseSchedule, t: float) -> GaussianLaw:
    """Law of in-domain latents at a level: the null there is not N(0, I).

    Parameters
    ----------
    law : GaussianLaw
        Law N(m, C) of the images.
    schedule : NoiseSchedule
        The noise schedule.
    t : float
        The level.

    Returns
    -------
    GaussianLaw
        ``N(a m, a^2 C + s^2 I)`` with ``a^2 = alpha_bar(t) = 1 - s^2``.

    Examples
    --------
    >>> import torch
    >>> law = GaussianLaw(torch.ones(2).double(), torch.eye(2).double(), torch.zeros(2).double())
    >>> law_at(law, NoiseSchedule(np.array([0.99, 0.25])), 1).eigenvalues
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    signal = float(schedule.alpha_bar_at(t))
    return GaussianLaw(
        law.mean * signal**0.5,
        law.basis,
        law.eigenvalues * signal + (1 - signal),
        law.residual * signal + (1 - signal),
    )


class _Whitened:
    """Samples carried to the scale on which a given law is N(0, I), a block of columns at a time."""

    def __init__(self, samples: Any, law: GaussianLaw) -> None:
        if law.dim != samples.shape[1]:
            raise ValueError(f"the law has {law.dim} coordinates, the latents {samples.shape[1]}")
        if law.basis.shape[1] < law.dim and not law.residual > 0:
            raise ValueError(
                "the law has no variance outside its basis; give it a residual, as at a level t > 0"
            )
        self.samples, self.shape = samples, samples.shape
        self.mean, self.basis = law.mean.numpy(), law.basis.numpy()
        self.rest = law.residual**-0.5 if law.residual > 0 else 1.0
        self.gain = law.eigenvalues.numpy() ** -0.5 - self.rest
        self.along = sum(self._deviations(here) @ self.basis[here] for here in _blocks(self.shape))

    def _deviations(self, here: slice) -> np.ndarray:
        return np.asarray(self.samples[:, here], dtype=np.float64) - self.mean[here]

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        here = key[1]
        moved = (self.along * self.gain) @ self.basis[here].T
        return (self.rest * self._deviations(here) + moved)[key[0]]


# ------------------------------------------------------------------------------------- one reading


@dataclass(frozen=True)
class _Reading:
    """What one pass over the coordinates leaves.

    `raw`, `plain` and `even` are Gram matrices of the chosen rows: as they are, centred, and with
    standardised coordinates.
    """

    n: int
    d: int
    mean: np.ndarray
    deviation: np.ndarray
    raw: np.ndarray
    plain: np.ndarray
    even: np.ndarray
    norms: np.ndarray
    projections: np.ndarray
    pvalues: list[np.ndarray]


@dataclass(frozen=True)
class _Strip:
    """Some rows of one channel (n, rows, W); these and the row below; the same of the next channel."""

    here: np.ndarray
    below: np.ndarray
    beside: np.ndarray | None


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    return (slice(a, min(a + BLOCK, shape[1])) for a in range(0, shape[1], BLOCK))


def _read(
    samples: Any, rows: np.ndarray, families: Sequence[str], rng: np.random.Generator
) -> _Reading:
    """Read the samples once, a block of coordinates at a time; leave out what no family asks for."""
    n, d = samples.shape
    plain, even = np.zeros((2, len(rows), len(rows)))
    norms, along, projections, columns = np.zeros(n), 0.0, np.zeros((n, PROJECTIONS)), []
    for here in _blocks(samples.shape):
        x = _block(samples, here)
        norms += np.square(x).sum(1)
        mean, deviation = x.mean(0), x.std(0, ddof=1)
        columns.append([mean, deviation])
        x -= mean
        if "F3" in families:
            projections += x @ rng.standard_normal((x.shape[1], PROJECTIONS))
            columns[-1] += _normality(x)
        part = x[rows]
        shift = part.mean(0)
        part -= shift
        plain += part @ part.T
        along += part @ (shift + mean) + np.square(shift + mean).sum() / 2
        if "F2" in families:
            part /= part.std(0, ddof=1)
            even += part @ part.T
    mean, deviation, *pvalues = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    raw = plain + along + along[:, None]
    return _Reading(n, d, mean, deviation, raw, plain, even, norms, projections, pvalues)


def _block(samples: Any, here: slice) -> np.ndarray:
    """Read a block of coordinates in float64, and refuse what no Gaussian can give."""
    found = np.asarray(samples[:, here])
    if found.dtype.kind != "f":
        raise ValueError(
            f"latents have the type {found.dtype}; a Gaussian is continuous: give floating-point numbers"
        )
    x = found.astype(np.float64)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(
            f"latent {row} has {x[row, column]} at coordinate {here.start + column}; "
            "leave such latents out"
        )
    constant = np.flatnonzero(x.max(0) == x.min(0))
    if len(constant):
        raise ValueError(
            f"coordinate {here.start + constant[0]} (and {len(constant) - 1} more in its block) is the "
            "same in all latents; leave constant coordinates out"
        )
    return x


def anderson_darling(ordered: np.ndarray) -> np.ndarray:
    """p-values of Anderson and Darling's test of normality, mean and variance fitted.

    Parameters
    ----------
    ordered : ndarray of shape (n, d)
        Samples of d variables, each sorted, with mean 0 and variance 1 (over n - 1).

    Returns
    -------
    ndarray of shape (d,)
        p-values.

    Notes
    -----
    The approximation of D'Agostino and Stephens, Goodness-of-fit techniques, 1986, table 4.9, as in
    ``statsmodels.stats.diagnostic.normal_ad``, which overflows beyond 8 standard deviations.

    Examples
    --------
    >>> x = np.sort(np.random.default_rng(0).standard_t(1, (100, 1)), axis=0)
    >>> bool(anderson_darling((x - x.mean()) / x.std(ddof=1)) < 1e-6)
    True
    """
    n = len(ordered)
    weights = (2 * np.arange(1, n + 1) - 1) / n
    a = -n - weights @ (log_ndtr(ordered) + log_ndtr(-ordered[::-1]))
    a = np.clip(a * (1 + 0.75 / n + 2.25 / n**2), 0, 100)  # beyond, the parabola rises again
    return np.select(
        [a <= 0.2, a <= 0.34, a <= 0.6],
        [
            1 - np.exp(-13.436 + 101.14 * a - 223.73 * a**2),
            1 - np.exp(-8.318 + 42.796 * a - 59.938 * a**2),
            np.exp(0.9177 - 4.279 * a - 1.38 * a**2),
        ],
        np.exp(1.2937 - 5.709 * a + 0.0186 * a**2),
    )


def shapiro_wilk(ordered: np.ndarray) -> np.ndarray:
    """p-values of Shapiro and Wilk's test of normality, for many variables at once.

    Parameters
    ----------
    ordered : ndarray of shape (n, d)
        Samples of d variables, each sorted, with mean 0 and variance 1 (over n - 1); n from 8 to 5,000.

    Returns
    -------
    ndarray of shape (d,)
        p-values, those of ``scipy.stats.shapiro``, which takes the variables one by one.

    Notes
    -----
    Royston, Remark AS R94, Appl. Statist. 44, 1995.

    Examples
    --------
    >>> x = np.sort(np.random.default_rng(0).standard_t(1, (100, 1)), axis=0)
    >>> bool(shapiro_wilk((x - x.mean()) / x.std(ddof=1)) < 1e-6)
    True
    """
    n = len(ordered)
    lost = np.log(np.maximum(1 - np.square(_royston_weights(n) @ ordered) / (n - 1), 1e-300))
    if n < 12:
        lost = -np.log(np.maximum(0.459 * n - 2.273 - lost, 1e-300))
        centre = np.polyval([-6.714e-4, 0.025054, -0.39978, 0.5440], n)
        spread = np.exp(np.polyval([-0.0020322, 0.062767, -0.77857, 1.3822], n))
    else:
        centre = np.polyval([0.0038915, -0.083751, -0.31082, -1.5861], np.log(n))
        spread = np.exp(np.polyval([0.0030302, -0.082676, -0.4803], np.log(n)))
    return norm.sf((lost - centre) / spread)


def _royston_weights(n: int) -> np.ndarray:
    """Weights of the ordered sample, sum of squares one."""
    expected = norm.ppf((np.arange(1, n + 1) - 0.375) / (n + 0.25))
    total, u = expected @ expected, n**-0.5
    last = np.polyval([-2.706056, 4.434685, -2.071190, -0.147981, 0.221157, 0], u)
    before = np.polyval([-3.582633, 5.682633, -1.752461, -0.293762, 0.042981, 0], u)
    ends = np.array([before, last]) + expected[-2:] / np.sqrt(total)
    inner = (total - 2 * np.square(expected[-2:]).sum()) / (1 - 2 * np.square(ends).sum())
    weights = expected / np.sqrt(inner)
    weights[-2:], weights[:2] = ends, -ends[::-1]
    return weights


def _normality(x: np.ndarray) -> list[np.ndarray]:
    """p-values of both tests for each column."""
    ordered = np.sort(x, axis=0)
    ordered -= ordered.mean(0)
    ordered /= ordered.std(0, ddof=1)
    return [shapiro_wilk(ordered), anderson_darling(ordered)]


# ----------------------------------------------------------------------------------- the families


def _many(name: str, pvalues: np.ndarray, n: int, d: int, reason: str = "") -> Result:
    """Many tests of normality, family F3: Simes' p-value; the effect is the share rejected by FDR."""
    adjusted = false_discovery_control(pvalues)
    share = float((adjusted <= FDR).mean())
    return Result(name, float(pvalues.min()), float(adjusted.min()), share, n, d, "F3", reason)


def _against(
    name: str, value: float, draws: np.ndarray, n: int, d: int, null: str, reason: str = ""
) -> Result:
    """Compare a statistic with draws of its null law; the effect is its ratio to their median."""
    tail = "upper" if name in LARGER else "both"
    p = nulls.pvalue(value, draws, tail=tail)
    return Result(name, value, p, float(value / np.median(draws)), n, d, null, reason)


def _given(reading: _Reading, tables: dict[str, np.ndarray]) -> Iterator[Result]:
    """F0: nothing is fitted."""
    n, d, squares = reading.n, reading.d, reading.norms
    test = kstest(squares, chi2(d).cdf)
    yield Result(
        "norms", float(test.statistic), float(test.pvalue), float(squares.mean() / d), n, d, "F0"
    )
    energy = float(n * np.square(reading.mean).sum())
    yield _chi2("mean", energy, d, energy / d, reading)
    yield _chi2("scale", float(squares.sum()), n * d, float(squares.mean() / d), reading)
    for name, value in nulls.known_statistics(reading.raw, d).items():
        yield _against(name, value, tables[f"F0.{name}"], len(reading.raw), d, "F0")


def _chi2(name: str, value: float, freedom: int, effect: float, reading: _Reading) -> Result:
    p = 2 * min(chi2.sf(value, freedom), chi2.cdf(value, freedom))
    return Result(name, value, float(min(p, 1)), effect, reading.n, reading.d, "F0")


def _fitted(reading: _Reading, tables: dict[str, np.ndarray], null: str) -> Iterator[Result]:
    """F1 and F2: statistics of the Gram matrix, centred or of standardised coordinates."""
    gram = reading.plain if null == "F1" else reading.even
    if reading.d == 1:
        for name in ("dispersion", "energy"):
            yield _untestable(name, reading, null, "one coordinate: its own tests are in F3")
        return
    for name, value in nulls.gram_statistics(gram, reading.d).items():
        yield _against(name, value, tables[f"{null}.{name}"], len(gram), reading.d, null)


def _untestable(name: str, reading: _Reading, null: str, reason: str) -> Result:
    nan = float("nan")
    return Result(name, nan, nan, nan, reading.n, reading.d, null, reason)


def _free(
    reading: _Reading, rng: np.random.Generator, bootstrap: int, draws: int
) -> Iterator[Result]:
    """F3: coordinates, projections, split-half components, spread of sizes."""
    n, d = reading.n, reading.d
    for name, pvalues in zip(("shapiro", "anderson"), reading.pvalues, strict=True):
        yield _many(name, pvalues, n, d)
    yield _many("projections", _normality(reading.projections)[0], n, d)
    yield from _components(reading, rng, draws)
    yield from _sizes(reading, rng, bootstrap)
    rows = len(reading.plain)
    if rows > d + 1:
        value = nulls.affine_energy(reading.plain, d)["energy"]
        drawn = nulls.null_table("affine", rows, d, draws=draws)["energy"]
        yield _against("energy", value, drawn, rows, d, "F3")
    else:
        yield _untestable("energy", reading, "F3", NO_JOINT_TEST)


def _components(reading: _Reading, rng: np.random.Generator, draws: int) -> Iterator[Result]:
    """Principal components learnt on one half of the samples, tested on the other, and in turn."""
    n, d = len(reading.plain), reading.d
    k = min(COMPONENTS, n // 10, d)
    if n < 2 * FEWEST or d < 2:
        for name in ("components", "skewness", "kurtosis"):
            yield _untestable(name, reading, "F3", "split halves need 16 latents and 2 coordinates")
        return
    order = rng.permutation(n)
    halves = order[: n // 2], order[n // 2 :]
    scores = [nulls.split_scores(reading.plain, *pair, k) for pair in (halves, halves[::-1])]
    yield _many("components", np.concatenate([_normality(x)[0] for x in scores]), n, d)
    measured = [(nulls.mardia(x), len(x)) for x in scores]
    for name in ("skewness", "kurtosis"):
        both = [
            _against(
                name,
                found[name],
                nulls.null_table("mardia", rows, k, draws=draws)[name],
                n,
                d,
                "F3",
            )
            for found, rows in measured
        ]
        least = min(both, key=lambda r: r.pvalue)
        p = false_discovery_control([r.pvalue for r in both]).min()
        yield Result(name, least.statistic, float(p), least.effect, n, d, "F3")


def _sizes(reading: _Reading, rng: np.random.Generator, bootstrap: int) -> Iterator[Result]:
    """Spread of norms and distances against draws of a Gaussian with the spectrum of the samples."""
    n, d = len(reading.plain), reading.d
    order = rng.permutation(n)
    gram = reading.plain[np.ix_(order, order)]
    spectrum = nulls.spiked_spectrum(gram, d)
    rank = len(spectrum.spikes)
    found = nulls.free_statistics(gram, d, rank)
    drawn = [
        nulls.free_statistics(nulls.draw_gram(spectrum, n, rng), d, rank) for _ in range(bootstrap)
    ]
    for name, value in found.items():
        if not bootstrap:
            yield _untestable(name, reading, "F3", "no bootstrap was asked for")
            continue
        draws = np.array([x[name] for x in drawn])
        yield _against(name, value, draws, n, d, "F3", f"bootstrap from {rank} spikes")


# --------------------------------------------------------------------------------- the image plane


def _spatial(
    samples: Any, reading: _Reading, shape: Shape, rng: np.random.Generator, draws: int
) -> Iterator[Result]:
    """F2: correlation of neighbours, of channels, within patches; a classifier on patches."""
    sums = sum(_strip_sums(strip) for strip in _strips(samples, reading, shape))
    m = reading.n - 1
    names = ("horizontal_neighbours", "vertical_neighbours", "channels")
    for name, total, pairs in zip(names, sums[:3], sums[3:6], strict=True):
        if not pairs:
            yield _untestable(name, reading, "F2", f"images of shape {shape} have no such pairs")
            continue
        z = total / pairs * np.sqrt(m * pairs)
        p = float(2 * norm.sf(abs(z)))
        yield Result(name, float(z), p, float(total / pairs), reading.n, reading.d, "F2")
    yield _patch_correlation(reading, *sums[6:])
    yield _patch_classifier(samples, reading, shape, rng, draws)


def _patch_correlation(reading: _Reading, squared: float, absolute: float, pairs: float) -> Result:
    """Squared correlations within patches; for independent pairs their mean and variance are known."""
    if not pairs:
        return _untestable("patch_correlation", reading, "F2", "images smaller than a patch")
    m = reading.n - 1
    z = (squared / pairs - 1 / m) / np.sqrt((2 * m - 2) / (m**2 * (m + 2) * pairs))
    effect, p = float(absolute / pairs), float(norm.sf(z))
    return Result("patch_correlation", float(z), p, effect, reading.n, reading.d, "F2")


def _strips(samples: Any, reading: _Reading, shape: Shape) -> Iterator[_Strip]:
    """Rows of the images, as many at a time as a patch has, with the row below and the next channel."""
    channels, height, width = shape
    plane, deep = height * width, min(PATCH, height)

    def take(first: int, rows: int) -> np.ndarray:
        here = slice(first, first + rows * width)
        x = np.asarray(samples[:, here], dtype=np.float64)
        return ((x - reading.mean[here]) / reading.deviation[here]).reshape(-1, rows, width)

    for c in range(channels):
        for top in range(0, height, deep):
            first, rows = c * plane + top * width, min(deep, height - top)
            below = take(first, min(rows + 1, height - top))
            beside = take(first + plane, rows) if c + 1 < channels else None
            yield _Strip(below[:, :rows], below, beside)


def _strip_sums(strip: _Strip) -> np.ndarray:
    """Sum correlations over pairs of coordinates, and count the pairs."""
    here, below, beside = strip.here, strip.below, strip.beside
    m = len(here) - 1
    across = np.vdot(here[:, :, 1:], here[:, :, :-1]) / m
    down = np.vdot(below[:, 1:], below[:, :-1]) / m
    other = 0.0 if beside is None else np.vdot(here, beside) / m
    _, rows, width = here.shape
    counts = (
        rows * (width - 1),
        (below.shape[1] - 1) * width,
        0 if beside is None else rows * width,
    )
    return np.array([across, down, other, *counts, *_patch_sums(here)])


def _patch_sums(strip: np.ndarray) -> tuple[float, float, int]:
    """Squared and absolute correlations of the pairs within the patches of a strip, and their number."""
    n, rows, width = strip.shape
    side = min(PATCH, width)
    if rows < side or side < 2:
        return 0.0, 0.0, 0
    count, size = width // side, side * rows
    cut = strip[:, :, : count * side].reshape(n, rows, count, side)
    patches = cut.transpose(2, 0, 1, 3).reshape(count, n, size)
    found = patches.transpose(0, 2, 1) @ patches / (n - 1)
    off = np.abs(found[:, ~np.eye(size, dtype=bool)])
    return float(np.square(off).sum() / 2), float(off.sum() / 2), count * size * (size - 1) // 2


def _patch_classifier(
    samples: Any, reading: _Reading, shape: Shape, rng: np.random.Generator, draws: int
) -> Result:
    """Classifier two-sample test of standardised patches against noise; the unit is the image."""
    name, corners, side = "patch_classifier", _corners(shape), min(PATCH, *shape[1:])
    rows = np.sort(rng.permutation(reading.n)[:PATCH_IMAGES])
    if side < 2 or len(rows) < 20:
        return _untestable(name, reading, "F2", "needs 20 latents with patches of 2 x 2 or more")
    inside = np.add.outer(np.arange(side) * shape[2], np.arange(side)).ravel()
    patches = np.stack([_even(samples, first, inside, rows) for first in corners], axis=1)
    value = nulls.patch_auroc(patches, rng)
    drawn = nulls.null_table("patch", *patches.shape, draws=draws)["auroc"]
    p = nulls.pvalue(value, drawn, tail="upper")
    return Result(name, value, p, value, len(rows), reading.d, "F2")


def _corners(shape: Shape) -> np.ndarray:
    """First coordinates of at most 48 patches, evenly spread."""
    channels, height, width = shape
    side = min(PATCH, height, width)
    tops = np.arange(height // side) * side * width
    lefts = np.arange(width // side) * side
    planes = np.arange(channels) * height * width
    first = np.add.outer(np.add.outer(planes, tops), lefts).ravel()
    return first[np.linspace(0, len(first) - 1, min(PATCHES, len(first))).round().astype(int)]


def _even(samples: Any, first: int, inside: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Standardised coordinates of a patch in some rows (rows, side^2)."""
    span = np.asarray(samples[:, first : first + inside[-1] + 1], dtype=np.float64)
    patch = span[rows][:, inside]
    return (patch - patch.mean(0)) / patch.std(0, ddof=1)


# ----------------------------------------------------------------------------------------- the report


def _flat(latents: Any, shape: Shape | None) -> tuple[Any, Shape | None]:
    """Return samples (n, d), and the shape of an image if it is known."""
    if hasattr(latents, "detach"):
        latents = latents.detach().cpu().numpy()
    elif not hasattr(latents, "shape"):
        latents = np.asarray(latents)
    if len(latents.shape) == 4:
        shape = shape or tuple(latents.shape[1:])
        latents = latents.reshape(len(latents), -1)
    if len(latents.shape) != 2:
        raise ValueError(
            f"latents have the shape {tuple(latents.shape)}; give (n, d) or (n, C, H, W)"
        )
    n, d = latents.shape
    if n < FEWEST:
        raise ValueError(f"{n} latents say nothing about a law; give {FEWEST} or more")
    if shape is not None and (len(shape) != 3 or int(np.prod(shape)) != d):
        raise ValueError(f"shape {shape} does not hold the {d} coordinates; give (C, H, W)")
    return latents, shape


def _refuse_duplicates(samples: Any) -> None:
    """Refuse equal latents; a single coordinate in float32 may repeat by rounding."""
    n, d = samples.shape
    labels = np.zeros(n, dtype=int)
    for first in range(0, d, FEW_COLUMNS):  # almost always the first few columns tell them apart
        columns = np.column_stack([labels, samples[:, first : first + FEW_COLUMNS]])
        _, labels = np.unique(columns, axis=0, return_inverse=True)
        if d == 1 or labels.max() == n - 1:
            return
    twice = np.flatnonzero(labels == np.bincount(labels).argmax())
    raise ValueError(
        f"latents {twice[0]} and {twice[1]} are equal; a repeated latent is no independent draw: "
        "leave repetitions out"
    )


def report(
    latents: Any,
    *,
    rng: np.random.Generator,
    null: str | Sequence[str] = FAMILIES,
    shape: Shape | None = None,
    law: GaussianLaw | None = None,
    rows: int = ROWS,
    draws: int = nulls.DRAWS,
    bootstrap: int | None = None,
) -> Report:
    """Test latents against the Gaussian laws of one or more families.

    Parameters
    ----------
    latents : array or Tensor of shape (n, d) or (n, C, H, W)
        Floating-point numbers, n >= 8; anything with a shape and column slices will do. Rows are
        independent draws.
    rng : numpy.random.Generator
        Source of the projections, the halves and the bootstrap.
    null : str or sequence of str, default all
        "F0" N(0, I), "F1" N(mu, s^2 I), "F2" N(mu, D) with D diagonal, "F3" N(mu, S) with any S.
    shape : tuple of int, optional
        (C, H, W), for the tests in the image plane; taken from latents of four axes.
    law : GaussianLaw, optional
        Latents are first carried to the scale on which this law is N(0, I): then F0 is the law, and
        F1 to F3 are families around it. At a level t < T in-domain latents follow `law_at`, not
        N(0, I).
    rows : int, default 1000
        Latents that the Gram matrices hold at most, drawn at random: a null law costs rows^3 a draw.
    draws : int, default 1999
        Draws of the null laws, simulated and kept where (n, d) is new.
    bootstrap : int, optional
        Draws of the sizes in F3: 999 by default, 399 beyond 500 rows; 0 leaves them out. Holm's rule over
        nine tests multiplies the smallest p-value by nine: 999 draws reach .018, 399 reach .045.

    Returns
    -------
    Report
        Results; see Notes for their names and effects.

    Raises
    ------
    ValueError
        If latents are fewer than 8, not finite, not floating-point, equal to each other, or constant in
        a coordinate; if `shape` does not fit or `null` is unknown.

    Notes
    -----
    F0. ``norms``: squared norms against the chi square law (Kolmogorov and Smirnov). ``mean``, ``scale``:
    of all numbers, exact chi square laws. ``inner_products``, ``energy``: pairs, table.

    F1, F2 (table for each (n, d)). ``dispersion`` of the norms, spread of ``distances``, ``cosines``,
    ``sphericity`` and ``largest_eigenvalue`` of the sample covariance (whiteness, not Gaussianity),
    ``nearest_neighbour``, ``energy`` against the fitted Gaussian. In F2 each coordinate is standardised
    first. Effect: the statistic over its median under the null.

    F2, with a shape. Mean correlation of ``horizontal_neighbours``, ``vertical_neighbours``, ``channels``
    (effect: the correlation); ``patch_correlation`` (effect: mean |r| within patches of 8 x 8, which is
    sqrt(2 / (pi (n - 1))) for noise; the 0.382 for a 32 x 32 ADM and 0.039 for noise of Staniszewski et
    al., arXiv:2410.23530, average the 20 largest |r| of each patch, another statistic);
    ``patch_classifier`` (effect: AUROC on held-out images).

    F3. ``shapiro``, ``anderson``: coordinates; ``projections`` on random directions, which look normal
    almost always (Diaconis and Freedman, Ann. Statist. 12, 1984); ``components``: principal components
    learnt on one half and tested on the other. Their p-value is Simes', their effect the share rejected
    at a false discovery rate of 5 %. ``skewness``, ``kurtosis``: Mardia's, of those components.
    ``dispersion``, ``residual_dispersion``, ``mahalanobis``: spread of norms, of norms outside the leading
    components and of leave-one-out Mahalanobis distances, over what a Gaussian of any covariance has,
    against a bootstrap. ``energy`` against the fitted Gaussian, at n > d + 1 only.

    One p-value a test holds its level; to judge a family, use `Report.combined`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> found = report(rng.standard_normal((40, 300)), rng=rng, null=("F0", "F3"), bootstrap=99)
    >>> found["F0.norms"].pvalue > 0.01, found["F3.energy"].testable
    (True, False)
    """
    families = (null,) if isinstance(null, str) else tuple(null)
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"null names {sorted(unknown)}; use {', '.join(FAMILIES)}")
    samples, shape = _flat(latents, shape)
    if rows < FEWEST:
        raise ValueError(f"rows is {rows}; the Gram matrices need {FEWEST} latents or more")
    _refuse_duplicates(samples)
    samples = samples if law is None else _Whitened(samples, law)
    n, d = samples.shape
    chosen = np.arange(n) if n <= rows else np.sort(rng.permutation(n)[:rows])
    reading = _read(samples, chosen, families, rng)
    tables = {} if families == ("F3",) else nulls.null_table("gram", len(chosen), d, draws=draws)
    results: list[Result] = []
    if "F0" in families:
        results += _given(reading, tables)
    for family in {"F1", "F2"} & set(families):
        results += _fitted(reading, tables, family)
    if "F2" in families and shape is not None:
        results += _spatial(samples, reading, shape, rng, draws)
    if "F3" in families:
        if bootstrap is None:
            bootstrap = BOOTSTRAP if len(chosen) <= MANY else BOOTSTRAP_OF_MANY
        results += _free(reading, rng, bootstrap, draws)
    return Report(tuple(sorted(results, key=lambda r: r.null)))
