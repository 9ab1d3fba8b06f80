"""Laws to draw new latents from, fitted to the latents of a few images.

All follow scikit-learn: ``fit(Z)`` on an (n, d) array, then ``sample(n, rng)``. None forms a d x d
matrix: draws from the full covariance are random combinations of the centred latents.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from ood_lib.gram import draw_weights

__all__ = [
    "PRIORS",
    "Diagonal",
    "FullGaussian",
    "Isotropic",
    "Recombination",
    "StandardNormal",
    "make_prior",
]


def _checked(latents: np.ndarray, least: int) -> np.ndarray:
    latents = np.asarray(latents)
    if latents.ndim != 2 or len(latents) < least:
        raise ValueError(
            f"latents have shape {latents.shape}; this prior needs (n, d) with n >= {least}"
        )
    if not np.isfinite(latents).all():
        raise ValueError("latents hold NaN or infinity; every number must be finite")
    return latents.astype(np.float64, copy=False)


class _Prior(BaseEstimator):
    """Shared fit: the mean and the number of coordinates."""

    least = 2

    def fit(self, latents: np.ndarray, y: None = None) -> Self:
        """Estimate the prior from latents of shape (n, d)."""
        latents = _checked(latents, self.least)
        self.n_features_in_ = latents.shape[1]
        self.mean_ = latents.mean(axis=0)
        self._fit_spread(latents - self.mean_)
        return self

    def _fit_spread(self, centred: np.ndarray) -> None:
        raise NotImplementedError

    def _noise(self, n: int, rng: np.random.Generator) -> np.ndarray:
        check_is_fitted(self)
        return rng.standard_normal((n, self.n_features_in_))


class StandardNormal(_Prior):
    """N(0, I): the model's own prior at the last level; ignores the latents but for their size.

    Examples
    --------
    >>> StandardNormal().fit(np.ones((2, 3))).sample(4, np.random.default_rng(0)).shape
    (4, 3)
    """

    least = 1

    def _fit_spread(self, centred: np.ndarray) -> None:
        self.mean_ = np.zeros(self.n_features_in_)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `n` latents (n, d)."""
        return self._noise(n, rng)


class Isotropic(_Prior):
    """N(mean, s^2 I): the paper's prior, with s^2 the mean variance about the mean latent.

    Notes
    -----
    Zhu et al., arXiv:2310.09213. Their code took the variance of all numbers, the mean's own spread
    included, which inflates it; here s^2 = tr S / d.

    Examples
    --------
    >>> prior = Isotropic().fit(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    >>> float(prior.variance_)
    1.0
    """

    def _fit_spread(self, centred: np.ndarray) -> None:
        self.variance_ = np.square(centred).sum() / (len(centred) - 1) / self.n_features_in_

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `n` latents (n, d)."""
        noise = self._noise(n, rng)
        return self.mean_ + np.sqrt(self.variance_) * noise


class Diagonal(_Prior):
    """N(mean, diag): one variance a coordinate.

    Examples
    --------
    >>> Diagonal().fit(np.array([[1.0, 0.0], [-1.0, 0.0]])).variance_
    array([2., 0.])
    """

    def _fit_spread(self, centred: np.ndarray) -> None:
        self.variance_ = np.square(centred).sum(axis=0) / (len(centred) - 1)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `n` latents (n, d)."""
        noise = self._noise(n, rng)
        return self.mean_ + np.sqrt(self.variance_) * noise


class FullGaussian(_Prior):
    """N(mean, S) with the full sample covariance, drawn exactly as Gaussian sums of the latents.

    Examples
    --------
    >>> draws = FullGaussian().fit(np.array([[1.0, 0.0], [-1.0, 0.0]])).sample(5, np.random.default_rng(0))
    >>> bool((draws[:, 1] == 0).all())
    True
    """

    def _fit_spread(self, centred: np.ndarray) -> None:
        self.centred_ = centred

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `n` latents (n, d)."""
        check_is_fitted(self)
        return self.mean_ + draw_weights(n, len(self.centred_), rng) @ self.centred_


class Recombination(_Prior):
    """Sum of `k` distinct centred latents over sqrt(k): keeps their covariance, not their Gaussianity.

    Parameters
    ----------
    k : int, default 2
        Latents a draw.

    Notes
    -----
    Drawn without replacement, the sum over sqrt(k) has covariance (n - k) / n S; it is scaled to S.

    Examples
    --------
    >>> Recombination(k=2).fit(np.eye(4)).sample(3, np.random.default_rng(0)).shape
    (3, 4)
    """

    def __init__(self, k: int = 2) -> None:
        self.k = k

    def _fit_spread(self, centred: np.ndarray) -> None:
        if not 1 <= self.k < len(centred):
            raise ValueError(f"k = {self.k} latents a draw need 1 <= k < n = {len(centred)}")
        self.centred_ = centred

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `n` latents (n, d)."""
        check_is_fitted(self)
        count = len(self.centred_)
        chosen = rng.permuted(np.tile(np.arange(count), (n, 1)), axis=1)[:, : self.k]
        scale = np.sqrt(count / (count - self.k) / self.k)
        return self.mean_ + scale * self.centred_[chosen].sum(axis=1)


PRIORS = {
    "standard normal": StandardNormal,
    "isotropic": Isotropic,
    "diagonal": Diagonal,
    "full covariance": FullGaussian,
    "recombination": Recombination,
}


def make_prior(name: str) -> _Prior:
    """Make an unfitted prior by name.

    Parameters
    ----------
    name : str
        A key of `PRIORS`.

    Returns
    -------
    BaseEstimator
        The prior.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> make_prior("isotropic")
    Isotropic()
    """
    if name not in PRIORS:
        raise ValueError(f"unknown prior {name!r}; known are {', '.join(PRIORS)}")
    return PRIORS[name]()
