"""Null laws of statistics of n Gaussian samples at d >> n, simulated through their Gram matrix.

The Gram matrix of n draws of N(0, I_d) is a Wishart matrix: Bartlett's decomposition draws it from
n^2 / 2 numbers, whatever d. Statistics that do not see location and scale have one null law for each
(n, d), which is simulated once and kept: in ``data/nulls`` for the sizes that are shipped, in
``runs/nulls`` for all others. Where the covariance is free (F3) the Gram matrix is drawn from the
spectrum of the sample, freed of its bias.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.linalg import eigh, inv
from scipy.special import gammaln, hyp1f1
from scipy.stats import rankdata
from tqdm import tqdm

from ood_lib.files import project_root

__all__ = [
    "DRAWS",
    "Spectrum",
    "affine_energy",
    "centre",
    "draw_gram",
    "even_scale",
    "expected_distance",
    "free_statistics",
    "gram_statistics",
    "held_out_distances",
    "known_statistics",
    "mardia",
    "null_table",
    "oas_shrinkage",
    "patch_auroc",
    "pvalue",
    "spiked_spectrum",
    "split_scores",
    "table_name",
    "wishart_gram",
]

DRAWS = 1999
SERIES = 100  # coordinates from which a mean distance is taken from its cumulants
EXACT = 2**20  # numbers in a sample up to which the draws of F2 are made coordinate by coordinate


# ------------------------------------------------------------------------------------ Gram matrices


def wishart_gram(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Gram matrix of n draws of N(0, I_d), without the draws.

    Parameters
    ----------
    n : int
        Samples.
    d : int
        Coordinates.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of shape (n, n)
        A Wishart matrix with d degrees of freedom.

    Notes
    -----
    Bartlett, On the theory of statistical regression, Proc. R. Soc. Edinb. 53, 1933: ``L L^T`` with
    normal numbers below the diagonal of L and chi numbers on it. At d < n the draws are made.

    Examples
    --------
    >>> gram = wishart_gram(2, 100_000, np.random.default_rng(0))
    >>> np.abs(gram / 100_000 - np.eye(2)).max() < 0.05
    np.True_
    """
    if d < n:
        draws = rng.standard_normal((n, d))
        return draws @ draws.T
    lower = np.tril(rng.standard_normal((n, n)), -1)
    np.fill_diagonal(lower, np.sqrt(rng.chisquare(d - np.arange(n))))
    return lower @ lower.T


def centre(gram: np.ndarray) -> np.ndarray:
    """Gram matrix of the same samples about their mean.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the rows.

    Returns
    -------
    ndarray of shape (n, n)
        Its rows sum to zero.

    Examples
    --------
    >>> centre(np.array([[4.0, 0], [0, 0]]))
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    means = gram.mean(0)
    return gram - means - means[:, None] + means.mean()


def even_scale(n: int, d: int, trace: float) -> tuple[float, float]:
    """Turn a centred Wishart matrix into the Gram matrix of coordinates of mean 0 and variance 1.

    A standardised Gaussian coordinate is a point of a sphere. The matrix of d such points is an
    isotropic Wishart matrix whose trace is fixed and whose scatter about d is smaller by
    ``sqrt(m / (m + 2))``, m = n - 1: means and covariances of all entries are exact, third moments
    to 1 / m.

    Parameters
    ----------
    n : int
        Samples.
    d : int
        Coordinates.
    trace : float
        Trace of the Wishart matrix.

    Returns
    -------
    shift, factor : float
        ``factor`` times the matrix, plus ``shift`` in every direction but that of equal entries.

    Examples
    --------
    >>> shift, factor = even_scale(5, 90, 400.0)
    >>> round(factor * 400 + 4 * shift, 9)  # the trace is (n - 1) d
    360.0
    """
    m = n - 1
    shrink = np.sqrt(m / (m + 2))
    return float(d * (1 - shrink)), float(shrink * m * d / trace)


# --------------------------------------------------------------------------------------- statistics


def expected_distance(squares: np.ndarray, d: int) -> np.ndarray:
    """Mean distance of a draw of N(0, I_d) to points at given squared distances from the origin.

    Parameters
    ----------
    squares : ndarray
        Squared norms of the points.
    d : int
        Coordinates.

    Returns
    -------
    ndarray
        ``E |z - Y|``, the mean of a noncentral chi law; above 100 coordinates, where the confluent
        hypergeometric function overflows, by its cumulants, to six digits.

    Examples
    --------
    >>> expected_distance(np.array([0.0]), 1).round(6)  # sqrt(2 / pi)
    array([0.797885])
    """
    if d < SERIES:
        start = np.sqrt(2) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2))
        return start * hyp1f1(-0.5, d / 2, -squares / 2)
    mean, second, third, fourth = (
        c * (d + r * squares) for r, c in ((1, 1), (2, 2), (3, 8), (4, 48))
    )
    u, v, w = second / mean**2, third / mean**3, fourth / mean**4
    return np.sqrt(mean) * (1 - u / 8 + v / 16 - 5 * (w + 3 * u**2) / 128 + 35 * u * v / 128)


def _energy(gram: np.ndarray, distances: np.ndarray, d: int) -> float:
    """Energy statistic of rows against N(0, I_d), over the mean distance of two draws."""
    n = len(gram)
    apart = expected_distance(np.zeros(1), d)[0] * np.sqrt(2)
    to_draws = expected_distance(np.diag(gram), d).mean()
    return float(n * (2 * to_draws - apart - distances.sum() / n**2) / apart)


def _squared_distances(gram: np.ndarray) -> np.ndarray:
    squares = np.diag(gram)
    return np.clip(squares[:, None] + squares - 2 * gram, 0, None)


def known_statistics(gram: np.ndarray, d: int) -> dict[str, float]:
    """Statistics of pairs of samples against N(0, I_d), nothing fitted.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the rows, not centred.
    d : int
        Coordinates.

    Returns
    -------
    dict of str to float
        ``inner_products``: their mean square over d, 1 under the null. ``energy``: the energy
        statistic (Szekely and Rizzo, J. Multivar. Anal. 93, 2005) over the mean distance of two draws.

    Examples
    --------
    >>> known_statistics(wishart_gram(50, 900, np.random.default_rng(0)), 900)["inner_products"] < 1.2
    True
    """
    n = len(gram)
    squares = np.square(gram).sum() - np.square(np.diag(gram)).sum()
    return {
        "inner_products": float(squares / (n * (n - 1) * d)),
        "energy": _energy(gram, np.sqrt(_squared_distances(gram)), d),
    }


def gram_statistics(
    gram: np.ndarray, d: int, eigenvalues: np.ndarray | None = None
) -> dict[str, float]:
    """Statistics of samples that see neither their mean nor their scale: families F1 and F2.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows; for F2 of rows whose coordinates are standardised.
    d : int
        Coordinates.
    eigenvalues : ndarray of shape (n,), optional
        Those of `gram`, if they are known, increasing.

    Returns
    -------
    dict of str to float
        All but the energy are 1, or near it, under the null. ``dispersion``: variance of the squared
        norms over 2 d. ``distances``: variance of the squared distances over 8 d. ``cosines``: mean
        squared cosine of two rows times d. ``sphericity``: d tr S^2 / (tr S)^2, both without bias
        (John, Biometrika 59, 1972). ``largest_eigenvalue``: over the edge of the law of Marchenko and
        Pastur. ``nearest_neighbour``: mean squared distance to the nearest row over that to all.
        ``energy``: against the fitted Gaussian.

    Examples
    --------
    >>> found = gram_statistics(centre(wishart_gram(50, 900, np.random.default_rng(0))), 900)
    >>> round(found["sphericity"], 1)
    1.0
    """
    n = len(gram)
    m, pairs = n - 1, n * (n - 1)
    values = np.linalg.eigvalsh(gram) if eigenvalues is None else eigenvalues
    scale = np.trace(gram) / (m * d)
    gram = gram / scale
    squares = np.diag(gram)
    apart = _squared_distances(gram)
    mean_apart = apart.sum() / pairs
    cosines = np.square(gram / np.sqrt(np.outer(squares, squares))).sum() - n
    statistics = {
        "dispersion": np.var(squares, ddof=1) / (2 * d),
        "distances": (np.square(apart).sum() / pairs - mean_apart**2) / (8 * d),
        "cosines": cosines / pairs * d,
        "sphericity": _second_moment(values.sum(), np.square(values).sum(), n)
        * d
        / (values.sum() / m) ** 2,
        "largest_eigenvalue": values[-1] / scale / (np.sqrt(m) + np.sqrt(d)) ** 2,
        "energy": _energy(gram, np.sqrt(apart), d),
    }
    np.fill_diagonal(apart, np.inf)
    statistics["nearest_neighbour"] = apart.min(1).mean() / mean_apart
    return {name: float(value) for name, value in statistics.items()}


def _second_moment(trace: float, squared: float, n: int) -> float:
    """Estimate tr S^2 of any Gaussian without bias (Srivastava, J. Japan Statist. Soc. 35, 2005).

    From the trace of the centred Gram matrix and the sum of its squared entries.
    """
    m = n - 1
    return float((squared - trace**2 / m) / ((m - 1) * (m + 2)))


def oas_shrinkage(gram: np.ndarray, d: int) -> float:
    """Shrinkage intensity of the oracle approximating estimator, from the centred Gram matrix.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows.
    d : int
        Coordinates.

    Returns
    -------
    float
        From 0 to 1, that of ``sklearn.covariance.oas``.

    Notes
    -----
    Chen et al., Shrinkage algorithms for MMSE covariance estimation, IEEE Trans. Signal Process. 58,
    2010, arXiv:0907.4698, eq. 23.

    Examples
    --------
    >>> oas_shrinkage(centre(wishart_gram(20, 400, np.random.default_rng(0))), 400) > 0.9
    True
    """
    n = len(gram)
    squared_mean = (np.trace(gram) / (n * d)) ** 2
    mean_square = np.square(gram).sum() / (n * d) ** 2
    spread = mean_square - squared_mean / d
    if spread <= 1e-12 * mean_square:  # isotropic already, as one coordinate always is
        return 1.0
    return float(min(1.0, (mean_square + squared_mean) / ((n + 1) * spread)))


def held_out_distances(gram: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Mahalanobis products of rows with mean and shrunk covariance of the others.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows.
    d : int
        Coordinates.

    Returns
    -------
    distances : ndarray of shape (n,)
        Squared distance of each row, the row left out of the fit.
    products : ndarray of shape (n, n)
        Inner product of each pair of rows, both left out; the diagonal means nothing.

    Notes
    -----
    Shrinkage (`oas_shrinkage`) and target are those of all rows; the formula of Sherman, Morrison and
    Woodbury takes one row or two out of the rest.

    Examples
    --------
    >>> gram = centre(wishart_gram(9, 400, np.random.default_rng(0)))
    >>> held_out_distances(gram, 400)[0].shape
    (9,)
    """
    n = len(gram)
    rho = oas_shrinkage(gram, d)
    ridge, weight = rho * np.trace(gram) / (n * d), (1 - rho) / (n - 1)
    inside = gram / ridge  # H = Y B^-1 Y^T, B the shrunk covariance of all rows
    if weight > 0:
        inverse = inv(weight * gram + ridge * np.eye(n), assume_a="pos")
        inside = (np.eye(n) - ridge * inverse) / weight
    own = np.diag(inside).copy()
    np.fill_diagonal(inside, 0)  # a row is no pair with itself
    distances = (n / (n - 1)) ** 2 * own / (1 - weight * n / (n - 1) * own)
    # Without rows i and j, of whose H this is 2 x 2: M (H^-1 - w M)^-1 M, with M = I + 1 1^T / (n - 2)
    off, weighted = 1 / (n - 2), weight * (np.outer(own, own) - inside**2)
    on = 1 + off
    both = np.add.outer(own, own)
    products = on * off * (both - 2 * on * weighted) + (on**2 + off**2) * (inside + off * weighted)
    left = 1 - weight * (on * both + 2 * off * inside - (on**2 - off**2) * weighted)
    return distances, products / left


def split_scores(gram: np.ndarray, fit: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """Coordinates of some samples along principal components learnt from others, by the Gram matrix.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred samples.
    fit, test : ndarray of int
        Rows that the components are learnt from, and rows to be scored.
    k : int
        Components, below the number of rows to learn from.

    Returns
    -------
    ndarray of shape (len(test), k)
        Given the first rows, these are linear functions of the others: Gaussian, whatever their
        covariance, if the samples are. The last column is along the leading component.

    Examples
    --------
    >>> gram = centre(wishart_gram(20, 90, np.random.default_rng(0)))
    >>> split_scores(gram, np.arange(10), np.arange(10, 20), 2).shape
    (10, 2)
    """
    own = centre(gram[np.ix_(fit, fit)])
    values, vectors = eigh(own, subset_by_index=[len(fit) - k, len(fit) - 1])
    return gram[np.ix_(test, fit)] @ (vectors - vectors.mean(0)) / np.sqrt(values)


def free_statistics(gram: np.ndarray, d: int, rank: int) -> dict[str, float]:
    """Spread of the samples' sizes where the covariance is free: family F3.

    Each is the variance of squared sizes over twice the mean squared product of two samples. That ratio
    is 1 for a Gaussian of any covariance, but for what the fits take away.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows, in random order.
    d : int
        Coordinates.
    rank : int
        Leading principal components that the residual is without.

    Returns
    -------
    dict of str to float
        ``dispersion``: of the norms. ``residual_dispersion``: of the norms outside the leading
        components, learnt on one half and taken from the other, and in turn. ``mahalanobis``: of the
        held-out Mahalanobis distances.

    Examples
    --------
    >>> gram = centre(wishart_gram(200, 900, np.random.default_rng(0)))
    >>> 0.7 < free_statistics(gram, 900, 2)["dispersion"] < 1.3
    True
    """
    n = len(gram)
    halves = np.arange(n // 2), np.arange(n // 2, n)
    rest = [_residual(gram, *pair, min(rank, n // 2 - 1)) for pair in (halves, halves[::-1])]
    far, products = held_out_distances(gram, d)
    np.fill_diagonal(products, 0)
    return {
        "dispersion": _dispersion(gram),
        "residual_dispersion": float(np.mean([_dispersion(x) for x in rest])),
        "mahalanobis": float(np.var(far, ddof=1) / (2 * np.square(products).sum() / (n * (n - 1)))),
    }


def _residual(gram: np.ndarray, fit: np.ndarray, test: np.ndarray, rank: int) -> np.ndarray:
    """Centred Gram matrix of the test rows without the leading components of the others."""
    left = gram[np.ix_(test, test)]
    if rank:
        scores = split_scores(gram, fit, test, rank)
        left = left - scores @ scores.T
    return centre(left)


def _dispersion(gram: np.ndarray) -> float:
    squares = np.diag(gram)
    total = _second_moment(squares.sum(), np.square(gram).sum(), len(gram))
    return float(np.var(squares, ddof=1) / (2 * total))


def affine_energy(gram: np.ndarray, d: int) -> dict[str, float]:
    """Energy statistic of whitened samples against N(0, I_d), for n > d + 1.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows, of rank d.
    d : int
        Coordinates, at most n - 2.

    Returns
    -------
    dict of str to float
        ``energy``; it sees neither mean nor covariance (Szekely and Rizzo, J. Multivar. Anal. 93, 2005).

    Raises
    ------
    ValueError
        If n <= d + 1: whitened samples are then the corners of a simplex, whatever their law.

    Examples
    --------
    >>> gram = centre(wishart_gram(50, 2, np.random.default_rng(0)))
    >>> 0 < affine_energy(gram, 2)["energy"] < 2
    True
    """
    n = len(gram)
    if n <= d + 1:
        raise ValueError(f"{n} samples of {d} coordinates cannot be whitened; d + 2 or more can")
    basis = eigh(gram, subset_by_index=[n - d, n - 1])[1]
    white = (n - 1) * basis @ basis.T
    return {"energy": _energy(white, np.sqrt(_squared_distances(white)), d)}


def mardia(scores: np.ndarray) -> dict[str, float]:
    """Mardia's skewness and kurtosis of n samples of k coordinates, n >> k.

    Parameters
    ----------
    scores : ndarray of shape (n, k)
        Samples.

    Returns
    -------
    dict of str to float
        ``skewness``: 0 for a Gaussian in the limit of many samples; ``kurtosis``: k (k + 2).

    Notes
    -----
    Mardia, Measures of multivariate skewness and kurtosis with applications, Biometrika 57, 1970.

    Examples
    --------
    >>> round(mardia(np.random.default_rng(0).standard_normal((9000, 2)))["kurtosis"])
    8
    """
    basis = np.linalg.qr(scores - scores.mean(0))[0]
    products = len(scores) * basis @ basis.T
    return {
        "skewness": float((products * products * products).mean()),
        "kurtosis": float(np.square(np.diag(products)).mean()),
    }


def patch_auroc(patches: np.ndarray, rng: np.random.Generator) -> float:
    """How well a classifier tells images from noise by their patches; the unit is the image.

    Half of the images train Fisher's linear discriminant on patches; the other half are ranked by the mean
    score of their patches, among as many images of noise.

    Parameters
    ----------
    patches : ndarray of shape (n, count, size)
        `count` square patches of `size` pixels an image, each pixel standardised over the images.
    rng : numpy.random.Generator
        Source of the noise and of the halves.

    Returns
    -------
    float
        Area under the ROC curve; near 0.5 where nothing tells them apart.

    Notes
    -----
    A classifier two-sample test: Lopez-Paz and Oquab, ICLR 2017, arXiv:1610.06545. The discriminant
    sees the sorted pixels, which hold the scale and the marginal law, their mean square, and the mean
    products of neighbours. The standardised halves are not independent: the null law is simulated.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> 0.2 < patch_auroc(rng.standard_normal((60, 4, 16)), rng) < 0.8
    True
    """
    n, count, size = patches.shape
    noise = _standardise(rng.standard_normal((n, count * size)))
    features = [_patch_features(x.reshape(n, count, size)) for x in (patches, noise)]
    train = rng.permutation(n) < n // 2
    fit = [x[train].reshape(-1, x.shape[-1]) for x in features]
    within = sum(np.cov(x, rowvar=False) for x in fit)
    ridge = 1e-3 * np.trace(within) / len(within) * np.eye(len(within))
    direction = np.linalg.solve(within + ridge, fit[0].mean(0) - fit[1].mean(0))
    ours, theirs = (x[~train].mean(1) @ direction for x in features)
    ranks = rankdata(np.concatenate([ours, theirs]))[: len(ours)]
    return float((ranks.mean() - (len(ours) + 1) / 2) / len(theirs))


def _patch_features(patches: np.ndarray) -> np.ndarray:
    n, count, size = patches.shape
    square = patches.reshape(n, count, int(size**0.5), -1)
    across = (square[..., 1:] * square[..., :-1]).mean((-1, -2))
    down = (square[..., 1:, :] * square[..., :-1, :]).mean((-1, -2))
    means = np.stack([np.square(patches).mean(-1), across, down], axis=-1)
    return np.concatenate([np.sort(patches, axis=-1), means], axis=-1)


# ------------------------------------------------------------------------------- the free covariance


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a covariance: some large ones, and one value for all others.

    Parameters
    ----------
    spikes : ndarray of shape (r,)
        The large ones, decreasing.
    rest : float
        The value of the other d - r.
    d : int
        Coordinates.

    Examples
    --------
    >>> Spectrum(np.array([9.0]), 1.0, 10).spikes
    array([9.])
    """

    spikes: np.ndarray
    rest: float
    d: int


def spiked_spectrum(gram: np.ndarray, d: int) -> Spectrum:
    """Spectrum of the covariance behind a sample, freed of the bias of d >> n.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the centred rows.
    d : int
        Coordinates.

    Returns
    -------
    Spectrum
        Sample eigenvalues beyond the edge of the law of Marchenko and Pastur count as spikes; the
        trace is kept.

    Notes
    -----
    A spike l on unit noise appears at ``l (1 + (d / n) / (l - 1))`` in the sample (Baik and
    Silverstein, J. Multivar. Anal. 97, 2006); this is solved for l.

    Examples
    --------
    >>> law = Spectrum(np.array([99.0]), 1.0, 1000)
    >>> spiked_spectrum(draw_gram(law, 400, np.random.default_rng(0)), 1000).spikes.round(-2)
    array([100.])
    """
    m = len(gram) - 1
    values = np.linalg.eigvalsh(gram)[::-1][: min(m, d)] / m
    total, ratio = float(values.sum()), d / m
    spikes: list[float] = []
    for value in values[: min(m, d) - 1]:
        noise = max(total - sum(spikes), 0) / (d - len(spikes))
        if value <= noise * (1 + np.sqrt(ratio)) ** 2:
            break
        middle = value + noise * (1 - ratio)
        spikes.append(float(middle + np.sqrt(max(middle**2 - 4 * value * noise, 0))) / 2)
    kept = np.array(spikes)
    return Spectrum(kept, max(total - kept.sum(), 0) / (d - len(kept)), d)


def draw_gram(spectrum: Spectrum, n: int, rng: np.random.Generator) -> np.ndarray:
    """Centred Gram matrix of n draws of a Gaussian with a given spectrum.

    Parameters
    ----------
    spectrum : Spectrum
        Eigenvalues of the covariance; the Gram matrix does not see its eigenvectors.
    n : int
        Samples.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of shape (n, n)
        Its rows sum to zero.

    Examples
    --------
    >>> spectrum = Spectrum(np.array([9.0]), 1.0, 1000)
    >>> round(float(np.trace(draw_gram(spectrum, 200, np.random.default_rng(0)))) / 199, -2)
    1000.0
    """
    r = len(spectrum.spikes)
    leading = rng.standard_normal((n, r))
    gram = (leading * spectrum.spikes) @ leading.T
    return centre(gram + spectrum.rest * wishart_gram(n, spectrum.d - r, rng))


# ------------------------------------------------------------------------------------------- tables


def pvalue(value: float, draws: np.ndarray, *, tail: str = "both") -> float:
    """p-value of a statistic among draws of its null law.

    Parameters
    ----------
    value : float
        The statistic.
    draws : ndarray of shape (b,)
        Its draws under the null.
    tail : {"both", "upper"}
        Which values count as extreme.

    Returns
    -------
    float
        Exact for a continuous statistic; at least 1 / (b + 1), twice that for both tails.

    Raises
    ------
    ValueError
        If `tail` is another word.

    Examples
    --------
    >>> pvalue(5.0, np.arange(9.0), tail="upper")
    0.5
    """
    if tail not in ("both", "upper"):
        raise ValueError(f"tail is {tail!r}; use 'both' or 'upper'")
    b = len(draws)
    upper = (1 + np.count_nonzero(draws >= value)) / (b + 1)
    if tail == "upper":
        return float(upper)
    lower = (1 + np.count_nonzero(draws <= value)) / (b + 1)
    return float(min(1.0, 2 * min(upper, lower)))


def null_table(kind: str, *sizes: int, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Draws of statistics under their null law, read from disk or simulated and kept.

    Parameters
    ----------
    kind : str
        ``"gram"`` (n, d): `known_statistics` under F0, `gram_statistics` under F1 and F2, with keys such
        as ``"F1.energy"``. ``"mardia"`` (n, k): `mardia`. ``"affine"`` (n, d): `affine_energy`.
        ``"patch"`` (n, count, size): `patch_auroc`, as ``"auroc"``.
    *sizes : int
        Sizes of the sample. With the kind and the number of draws they also fix the random numbers.
    draws : int, default 1999
        How many.

    Returns
    -------
    dict of str to ndarray of shape (draws,)
        Sorted, float32.

    Raises
    ------
    ValueError
        If the kind is unknown, or if fewer than 39 draws are asked for: no two-sided p-value could
        reach 5 %.

    Examples
    --------
    >>> null_table("mardia", 20, 2, draws=99)["kurtosis"].shape
    (99,)
    """
    if kind not in _DRAW:
        raise ValueError(f"there is no table {kind!r}; use {', '.join(_DRAW)}")
    if draws < 39:
        raise ValueError(f"{draws} draws cannot give a p-value of 5 %; ask for 39 or more")
    name = table_name(kind, *sizes, draws=draws)
    shipped, own = (project_root() / where / "nulls" / name for where in ("data", "runs"))
    for path in (shipped, own):
        if path.is_file():
            with np.load(path) as stored:
                return dict(stored)
    return _write(own, _simulate(name, kind, sizes, draws))


def table_name(kind: str, *sizes: int, draws: int = DRAWS) -> str:
    """Name of the file of a table.

    Parameters
    ----------
    kind : str
        As in `null_table`.
    *sizes : int
        Sizes of the sample.
    draws : int, default 1999
        Draws.

    Returns
    -------
    str
        The name, without a folder.

    Examples
    --------
    >>> table_name("gram", 100, 3072)
    'gram_100_3072_1999.npz'
    """
    return "_".join(map(str, (kind, *sizes, draws))) + ".npz"


def _simulate(name: str, kind: str, sizes: tuple[int, ...], draws: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(list(name.encode()))
    bar = tqdm(range(draws), desc=f"null law {name}", delay=5, leave=False, disable=None)
    rows = [_DRAW[kind](*sizes, rng) for _ in bar]
    return {key: np.sort([row[key] for row in rows]).astype(np.float32) for key in rows[0]}


def _write(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Write a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    np.savez_compressed(part, allow_pickle=False, **columns)
    part.replace(path)
    return columns


def _draw_families(n: int, d: int, rng: np.random.Generator) -> dict[str, float]:
    """Statistics under F0, F1 and F2; the three share one Wishart matrix where F2 need not be exact."""
    raw = wishart_gram(n, d, rng)
    plain = centre(raw)
    values = np.linalg.eigvalsh(plain)
    if n * d <= EXACT:
        even, even_values = _even_gram(n, d, rng), None
    else:
        shift, factor = even_scale(n, d, values.sum())
        even = factor * plain + shift * (np.eye(n) - 1 / n)
        even_values = np.r_[0.0, factor * values[1:] + shift]
    found = {
        "F0": known_statistics(raw, d),
        "F1": gram_statistics(plain, d, values),
        "F2": gram_statistics(even, d, even_values),
    }
    return {f"{family}.{name}": value for family, of in found.items() for name, value in of.items()}


def _even_gram(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    draws = _standardise(rng.standard_normal((n, d)))
    return draws @ draws.T


def _standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0, ddof=1)


def _draw_mardia(n: int, k: int, rng: np.random.Generator) -> dict[str, float]:
    return mardia(rng.standard_normal((n, k)))


def _draw_affine(n: int, d: int, rng: np.random.Generator) -> dict[str, float]:
    return affine_energy(centre(wishart_gram(n, d, rng)), d)


def _draw_patches(n: int, count: int, size: int, rng: np.random.Generator) -> dict[str, float]:
    pixels = _standardise(rng.standard_normal((n, count * size)))
    return {"auroc": patch_auroc(pixels.reshape(n, count, size), rng)}


_DRAW: dict[str, Callable[..., dict[str, float]]] = {
    "gram": _draw_families,
    "mardia": _draw_mardia,
    "affine": _draw_affine,
    "patch": _draw_patches,
}
