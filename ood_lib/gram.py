"""Linear algebra for n samples of d coordinates, d >> n, without any d x d matrix.

A centred sample ``Y`` (n, d) has the covariance ``S = Y^T Y / (n - 1)``. Its spectrum and everything
else that depends on S is read from the n x n Gram matrix ``Y Y^T``, summed over blocks of coordinates.
"""

from __future__ import annotations

import numpy as np

__all__ = ["draw_weights", "gram_matrix", "pairwise_distances", "spectrum"]

BLOCK = 8192


def gram_matrix(a: np.ndarray, b: np.ndarray | None = None, *, block: int = BLOCK) -> np.ndarray:
    """Inner products of the rows of `a` and `b`, streamed over blocks of coordinates.

    Parameters
    ----------
    a : ndarray of shape (n, d)
        Samples, any float dtype.
    b : ndarray of shape (m, d), optional
        Other samples; `a` by default.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (n, m)
        float64.

    Raises
    ------
    ValueError
        If `a` and `b` differ in d.

    Examples
    --------
    >>> gram_matrix(np.eye(2, 5), np.ones((1, 5)))
    array([[1.],
           [1.]])
    """
    b = a if b is None else b
    if block < 1:
        raise ValueError(f"block is {block}; use 1 or more coordinates")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"samples have shapes {a.shape} and {b.shape}; both must be (n, d) with one d"
        )
    out = np.zeros((len(a), len(b)))
    for first in range(0, a.shape[1], block):
        here = slice(first, first + block)
        out += a[:, here].astype(np.float64) @ b[:, here].astype(np.float64).T
    return out


def spectrum(samples: np.ndarray) -> np.ndarray:
    """Non-zero eigenvalues of the sample covariance, largest first.

    Parameters
    ----------
    samples : ndarray of shape (n, d)
        Samples.

    Returns
    -------
    ndarray of shape (min(n - 1, d),)
        Eigenvalues of S.

    Raises
    ------
    ValueError
        If there are fewer than two samples.

    Examples
    --------
    >>> spectrum(np.array([[1.0, 0, 0], [-1.0, 0, 0]]))
    array([2.])
    """
    gram = gram_matrix(samples)
    n, d = samples.shape
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {n}")
    means = gram.mean(0)
    centred = gram - means - means[:, None] + gram.mean()
    values = np.linalg.eigvalsh(centred)[::-1] / (n - 1)
    return np.clip(values[: min(n - 1, d)], 0, None)


def pairwise_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between the rows of `a` and `b`, from Gram blocks.

    Parameters
    ----------
    a : ndarray of shape (n, d)
        Samples.
    b : ndarray of shape (m, d)
        Samples.

    Returns
    -------
    ndarray of shape (n, m)
        Distances.

    Raises
    ------
    ValueError
        If `a` and `b` differ in d.

    Examples
    --------
    >>> pairwise_distances(np.zeros((1, 4)), np.ones((2, 4)))
    array([[2., 2.]])
    """
    squares = (np.einsum("ij,ij->i", x, x, dtype=np.float64) for x in (a, b))
    left, right = squares
    return np.sqrt(np.clip(left[:, None] + right - 2 * gram_matrix(a, b), 0, None))


def draw_weights(n_draws: int, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Weights W for which ``mean + W @ (samples - mean)`` is an exact draw from N(mean, S).

    Parameters
    ----------
    n_draws : int
        Draws wanted.
    n_samples : int
        Samples n that S was estimated from.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of shape (n_draws, n_samples)
        Independent N(0, 1 / (n - 1)) numbers: ``W Y`` has covariance ``Y^T Y / (n - 1)``.

    Raises
    ------
    ValueError
        If there are fewer than two samples.

    Examples
    --------
    >>> draw_weights(3, 5, np.random.default_rng(0)).shape
    (3, 5)
    """
    if n_samples < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {n_samples}")
    return rng.standard_normal((n_draws, n_samples)) / np.sqrt(n_samples - 1)
