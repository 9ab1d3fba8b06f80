"""Laws to draw new latents from, fitted to the latents of a few images.

All follow scikit-learn: ``fit(Z)`` on (n, d) latents, ``sample(n, rng)``, ``get_params``, and where the law
has a density ``score_samples(X)``. The latents are anything of shape (n, d) with column slices, as in
`ood_lib.gram`. An array is copied as it is, so that later changes to it do no harm; latents on disk stay
there. No d x d matrix is formed: fits go by the Gram matrix where they need more than variances, and draws
are sums of latents, made a block of coordinates at a time. S below is their unbiased covariance, which
divides by n - 1.

A law on finitely many points or on curves has no density with respect to Lebesgue measure; its class has
no ``score_samples``. These are `Recombination`, `LinearCombination`, `NeighbourRecombination`, `Slerp`,
`CentredSlerp`, `NeighbourSlerp`, `Mosaic` and `Replay`. A Gaussian whose covariance is singular says so
when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import logsumexp
from sklearn import mixture, neighbors
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from ood_lib.geometry import slerp
from ood_lib.gram import (
    BLOCK,
    EPS,
    Covariance,
    Samples,
    draw_weights,
    fit_covariance,
    mean,
    pairwise_distances,
)
from ood_lib.mosaic import flow

__all__ = [
    "LADDER",
    "PPCA",
    "PRIORS",
    "CentredSlerp",
    "Diagonal",
    "FullGaussian",
    "Isotropic",
    "IsotropicReleased",
    "KernelDensity",
    "LinearCombination",
    "Mixture",
    "Mosaic",
    "NeighbourRecombination",
    "NeighbourSlerp",
    "Recombination",
    "Replay",
    "ReplayNoise",
    "Slerp",
    "StandardNormal",
    "make_prior",
]


# ------------------------------------------------------------------ latents, blocks and combinations


def _checked(latents: Samples, least: int) -> Samples:
    latents = latents if hasattr(latents, "shape") else np.asarray(latents)
    if len(latents.shape) != 2 or latents.shape[0] < least:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; this prior needs (n, d) with n >= {least}"
        )
    return latents


def _blocks(latents: Samples, centre: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns about a centre in float64, a block of coordinates at a time."""
    for first in range(0, len(centre), BLOCK):
        here = slice(first, first + BLOCK)
        block = np.asarray(latents[:, here], dtype=np.float64) - centre[here]
        if not np.isfinite(block).all():
            raise ValueError("latents hold NaN or infinity; every number must be finite")
        yield here, block


def _combine(weights: np.ndarray | csr_array, latents: Samples, centre: np.ndarray) -> np.ndarray:
    """Draws ``centre + weights @ (latents - centre)``."""
    draws = np.empty((weights.shape[0], len(centre)))
    for here, block in _blocks(latents, centre):
        draws[:, here] = weights @ block + centre[here]
    return draws


def _distinct(n: int, count: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Give `n` rows of `k` distinct numbers below `count`."""
    return rng.permuted(np.tile(np.arange(count), (n, 1)), axis=1)[:, :k]


def _sparse(values: np.ndarray, chosen: np.ndarray, count: int) -> csr_array:
    """Weights (n, count) with the `values` (n, k) in the columns `chosen`, 0 elsewhere."""
    starts = np.arange(len(chosen) + 1) * chosen.shape[1]
    return csr_array((values.ravel(), chosen.ravel(), starts), shape=(len(chosen), count))


def _moments(latents: Samples, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each coordinate, (d,) each."""
    centre, variance = np.empty(d), np.empty(d)
    for here, block in _blocks(latents, np.zeros(d)):
        # about the first latent, a constant coordinate has a variance of exactly 0
        origin = block[0].copy()
        block -= origin
        centre[here] = origin + block.mean(axis=0)
        variance[here] = block.var(axis=0, ddof=1)
    return centre, variance


def _refuse_copies(latents: Samples, d: int) -> None:
    digests = [blake2b() for _ in range(latents.shape[0])]
    for _, block in _blocks(latents, np.zeros(d)):
        # adding 0 makes -0.0 and 0.0 the same bytes
        for digest, row in zip(digests, block + 0.0, strict=True):
            digest.update(row)
    first: dict[bytes, int] = {}
    for j, digest in enumerate(digests):
        i = first.setdefault(digest.digest(), j)
        if i < j:
            raise ValueError(
                f"latents {i} and {j} are copies of each other; remove one: this prior is made of single "
                "latents, and a copy is a neighbour, a partner or a mode that is none"
            )


# ------------------------------------------------------------------------------- what priors share


class _Prior(BaseEstimator):
    """Fit of the mean and the variances; a subclass gives ``_draw(n, rng)`` -> (n, d)."""

    least = 2
    copies = False

    def fit(self, latents: Samples, y: Samples | None = None) -> Self:
        """Estimate the prior.

        Parameters
        ----------
        latents : samples of shape (n, d)
            Latents of n images, of any real dtype.
        y : samples of shape (n, d), optional
            Pictures of the latents, for `Mosaic`; the other priors ignore them.

        Returns
        -------
        Self
            The prior, with ``mean_`` (d,), ``n_features_in_``, ``n_samples_`` and the attributes of its
            class.

        Raises
        ------
        ValueError
            If there are fewer latents than the prior needs, all of them are equal, a number is not finite,
            a parameter does not fit the latents, or, unless the prior is a Gaussian, two latents are copies
            of each other. To a Gaussian, which knows moments only, a copy is a weight.

        Examples
        --------
        >>> Isotropic().fit(np.array([[0.0, 1.0], [2.0, 1.0]])).mean_
        array([1., 1.])
        """
        latents = _checked(latents, self.least)
        self._check(latents.shape[0])
        self._learn(latents)
        return self

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw latents, independently of each other.

        Parameters
        ----------
        n : int
            Draws wanted.
        rng : numpy.random.Generator
            Source of randomness.

        Returns
        -------
        ndarray of shape (n, d)
            float64.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.

        Examples
        --------
        >>> Replay().fit(np.eye(3)).sample(2, np.random.default_rng(0)).shape
        (2, 3)
        """
        check_is_fitted(self)
        return self._draw(n, rng)

    def _check(self, n: int) -> None:
        """Refuse parameters that `n` latents do not allow, before anything is computed."""

    def _learn(self, latents: Samples) -> None:
        n, d = latents.shape
        mean_, variance = _moments(latents, d)
        if not variance.any():
            raise ValueError(f"all {n} latents are equal; a prior needs latents that differ")
        if not self.copies:
            _refuse_copies(latents, d)
        # latents on disk are not read into memory
        self.samples_ = np.array(latents) if type(latents) is np.ndarray else latents
        self.mean_, self.n_samples_, self.n_features_in_ = mean_, n, d
        self._estimate(variance)

    def _estimate(self, variance: np.ndarray) -> None:
        """Estimate what is more than the mean, given the variance of each coordinate (d,)."""

    def _rows(self, chosen: np.ndarray) -> np.ndarray:
        """Fitted latents (n, d) of the given numbers, to the last bit."""
        one_hot = _sparse(np.ones(len(chosen)), chosen[:, None], self.n_samples_)
        return _combine(one_hot, self.samples_, np.zeros(self.n_features_in_))


class _Density(_Prior):
    """Prior with a density on all of R^d; a subclass gives ``_log_density(latents)`` -> (m,)."""

    def score_samples(self, latents: Samples) -> np.ndarray:
        """Log density of latents, as scikit-learn names it.

        Parameters
        ----------
        latents : samples of shape (m, d)
            Latents to judge.

        Returns
        -------
        ndarray of shape (m,)
            In nats, float64.

        Raises
        ------
        ValueError
            If they have another d, a number is not finite, or the fitted law is singular: then it has no
            density on R^d.

        Examples
        --------
        >>> StandardNormal().fit(np.ones((1, 2))).score_samples(np.zeros((1, 2))).round(3)
        array([-1.838])
        """
        check_is_fitted(self)
        latents = _checked(latents, 1)
        if latents.shape[1] != self.n_features_in_:
            raise ValueError(
                f"latents have {latents.shape[1]} coordinates; the prior was fitted to "
                f"{self.n_features_in_}"
            )
        return self._log_density(latents)


# -------------------------------------------------------------------- Gaussians with independent axes


class _White(_Density):
    """N(mean_, diag variance_), the variance one number or d."""

    copies = True

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        draws = rng.standard_normal((n, self.n_features_in_))
        draws *= np.sqrt(self.variance_)
        draws += self.mean_
        return draws

    def _log_density(self, latents: Samples) -> np.ndarray:
        variance = np.broadcast_to(self.variance_, self.n_features_in_)
        if not variance.all():
            raise ValueError(
                f"coordinate {int(variance.argmin())} is the same in all latents, so the law has no "
                "density; remove it, or fit Isotropic"
            )
        squares = np.zeros(latents.shape[0])
        for here, block in _blocks(latents, self.mean_):
            squares += (np.square(block) / variance[here]).sum(axis=1)
        return -0.5 * (np.log(2 * np.pi * variance).sum() + squares)


class StandardNormal(_White):
    """N(0, I): the model's own prior at the last level; of the latents it takes only their size.

    Examples
    --------
    >>> StandardNormal().fit(np.ones((2, 3))).sample(4, np.random.default_rng(0)).shape
    (4, 3)
    """

    least = 1

    def _learn(self, latents: Samples) -> None:
        self.mean_ = np.zeros_like(mean(latents))
        self.variance_ = 1.0
        self.n_features_in_ = len(self.mean_)


class Isotropic(_White):
    """N(mean, s^2 I) with the mean variance about the mean latent, s^2 = tr S / d.

    Notes
    -----
    The prior that Zhu et al., arXiv:2310.09213, describe; for what their code does see
    `IsotropicReleased`.

    Examples
    --------
    >>> prior = Isotropic().fit(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    >>> float(prior.variance_)
    1.0
    """

    def _estimate(self, variance: np.ndarray) -> None:
        self.variance_ = variance.mean()


class IsotropicReleased(_White):
    """N(mean, s^2 I) with the variance of all numbers together, as the released code has it.

    Notes
    -----
    Zhu et al., arXiv:2310.09213, ``discovery.py`` at 27c1223: ``np.var`` of the flattened latents. It adds
    the variance of the coordinates of the mean latent, so draws are too wide, and divides by n d.

    Examples
    --------
    >>> z = np.array([[0.0, 4.0], [2.0, 4.0]])
    >>> float(IsotropicReleased().fit(z).variance_), float(z.var())
    (2.75, 2.75)
    """

    def _estimate(self, variance: np.ndarray) -> None:
        biased = variance.mean() * (self.n_samples_ - 1) / self.n_samples_
        self.variance_ = biased + self.mean_.var()


class Diagonal(_White):
    """N(mean, diag S): one variance a coordinate.

    Examples
    --------
    >>> Diagonal().fit(np.array([[1.0, 0.0], [-1.0, 0.0]])).variance_
    array([2., 0.])
    """

    def _estimate(self, variance: np.ndarray) -> None:
        self.variance_ = variance


# ------------------------------------------------------------------------------ the full covariance


class FullGaussian(_Density):
    """N(mean, Sigma) with ``Sigma = (1 - rho) S + rho (tr S / d) I``, drawn exactly as sums of latents.

    Parameters
    ----------
    shrinkage : {"none", "ledoit_wolf", "oas"} or float, default "none"
        Estimator of rho, as in `ood_lib.gram.shrinkage`, or rho itself in [0, 1]. With "none", rho = 0:
        draws stay in the affine span of the latents, and there is a density only for n > d.

    Examples
    --------
    >>> draws = FullGaussian().fit(np.array([[1.0, 0.0], [-1.0, 0.0]])).sample(5, np.random.default_rng(0))
    >>> bool((draws[:, 1] == 0).all())
    True
    """

    copies = True

    def __init__(self, shrinkage: str | float = "none") -> None:
        self.shrinkage = shrinkage

    def _estimate(self, variance: np.ndarray) -> None:
        self.variance_ = variance.mean()
        # draws without shrinkage need no Gram matrix
        self.law_ = None if self.shrinkage == "none" else self._law()

    def _law(self) -> Covariance:
        return fit_covariance(self.samples_, method=self.shrinkage)

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        rho = self.law_.shrinkage if self.law_ else 0.0
        weights = np.sqrt(1 - rho) * draw_weights(n, self.n_samples_, rng)
        draws = _combine(weights, self.samples_, self.mean_)
        if rho:
            draws += np.sqrt(rho * self.variance_) * rng.standard_normal(draws.shape)
        return draws

    def _log_density(self, latents: Samples) -> np.ndarray:
        n, d = self.n_samples_, self.n_features_in_
        if self.law_ is None and n <= d:
            raise ValueError(
                f"without shrinkage {n} latents of {d} coordinates give a singular covariance, which has no "
                "density; fit with shrinkage='ledoit_wolf' or 'oas'"
            )
        law, factor = self.law_ or self._law(), n / (n - 1)
        constant = d * np.log(2 * np.pi * factor) + law.logdet()
        return -0.5 * (constant + law.mahalanobis(latents) / factor)


# ------------------------------------------------------------ principal components and white noise


class _Principal(_Density):
    """A law of the first `rank` principal components, scaled to variance 1, and noise outside them.

    A subclass gives that law by ``_draw_scores(n, rng)`` -> (n, rank) and ``_log_scores(scores)`` -> (n,).
    ``variances_`` (rank,) are the leading eigenvalues of S, ``noise_variance_`` the mean of the d - rank
    others, ``scores_`` (n, rank) the components of the latents.
    """

    rank: int

    def _estimate(self, variance: np.ndarray) -> None:
        law = fit_covariance(self.samples_, method="none")
        most = int((law.eigenvalues > law.n * EPS * law.eigenvalues[0]).sum())
        if not 1 <= self.rank <= most:
            raise ValueError(
                f"rank = {self.rank}, but {law.n} latents of {law.d} coordinates span {most} "
                f"directions; use 1 <= rank <= {most}"
            )
        roots = law.n / (law.n - 1) * law.eigenvalues[:most]
        self.variances_ = roots[: self.rank]
        self.noise_variance_ = roots[self.rank :].sum() / max(law.d - self.rank, 1)
        self.scores_ = law.vectors[:, : self.rank] * np.sqrt(law.n - 1)
        self._fit_scores()

    def _components(self, latents: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Scaled components (m, rank), and square norms (m,) of what lies outside them."""
        m = latents.shape[0]
        products, squares = np.zeros((m, self.n_samples_)), np.zeros(m)
        fitted = _blocks(self.samples_, self.mean_)
        for (_, left), (_, right) in zip(_blocks(latents, self.mean_), fitted, strict=True):
            products += left @ right.T
            squares += np.square(left).sum(axis=1)
        inside = products @ self.scores_ / ((self.n_samples_ - 1) * self.variances_)
        return inside, np.clip(squares - np.square(inside) @ self.variances_, 0, None)

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        wanted = self._draw_scores(n, rng)
        draws = rng.standard_normal((n, self.n_features_in_))
        draws *= np.sqrt(self.noise_variance_)
        draws += self.mean_
        weights = (wanted - self._components(draws)[0]) @ self.scores_.T / (self.n_samples_ - 1)
        for here, block in _blocks(self.samples_, self.mean_):
            draws[:, here] += weights @ block
        return draws

    def _log_density(self, latents: Samples) -> np.ndarray:
        others = self.n_features_in_ - self.rank
        if others and self.noise_variance_ == 0:
            raise ValueError(
                f"rank = {self.rank} is all that the {self.n_samples_} latents span in "
                f"{self.n_features_in_} coordinates, so the law has no density; use a lower rank"
            )
        inside, outside = self._components(latents)
        logs = self._log_scores(inside) - 0.5 * np.log(self.variances_).sum()
        if others:
            noise = self.noise_variance_
            logs -= 0.5 * (others * np.log(2 * np.pi * noise) + outside / noise)
        return logs

    def _fit_scores(self) -> None:
        """Fit the law of the components."""


class PPCA(_Principal):
    """Probabilistic principal components: S along the first ones, the same variance everywhere else.

    Parameters
    ----------
    rank : int, default 5
        Principal components kept.

    Notes
    -----
    Tipping and Bishop, Journal of the Royal Statistical Society B 61 (1999), eq. (7) and (8), of the
    unbiased S: the noise is the mean of the d - rank other eigenvalues. scikit-learn's PCA takes the mean of
    min(n, d) - rank of them, which is the same for n >= d and far more for n << d.

    Examples
    --------
    >>> prior = PPCA(rank=1).fit(np.array([[3.0, 0, 0], [-3.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]]))
    >>> float(prior.variances_[0].round(6)), float(prior.noise_variance_.round(6))
    (6.0, 0.333333)
    """

    copies = True

    def __init__(self, rank: int = 5) -> None:
        self.rank = rank

    def _draw_scores(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((n, self.rank))

    def _log_scores(self, scores: np.ndarray) -> np.ndarray:
        return -0.5 * (self.rank * np.log(2 * np.pi) + np.square(scores).sum(axis=1))


class Mixture(_Principal):
    """A mixture of Gaussians over the first principal components, white noise outside them.

    Parameters
    ----------
    k : int, default 2
        Gaussians, each with a mean and a covariance of its own.
    rank : int, default 5
        Principal components, each scaled to variance 1. The noise is that of `PPCA`.
    seed : int, default 0
        Seed of the start of the fit.

    Notes
    -----
    ``sklearn.mixture.GaussianMixture``. At least k (rank + 1) latents are asked for: with fewer, a
    covariance of the mixture is singular and its draws lie between a few given latents.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(20, 100))
    >>> Mixture(k=2, rank=3).fit(z).sample(4, np.random.default_rng(0)).shape
    (4, 100)
    """

    def __init__(self, k: int = 2, rank: int = 5, seed: int = 0) -> None:
        self.k = k
        self.rank = rank
        self.seed = seed

    def _check(self, n: int) -> None:
        if not 1 <= self.k <= n / (self.rank + 1):
            raise ValueError(
                f"k = {self.k} Gaussians of rank = {self.rank} need k >= 1 and n >= k (rank + 1) latents; "
                f"n is {n}"
            )

    def _fit_scores(self) -> None:
        self.mixture_ = mixture.GaussianMixture(self.k, max_iter=1000, random_state=self.seed)
        self.mixture_.fit(self.scores_)

    def _draw_scores(self, n: int, rng: np.random.Generator) -> np.ndarray:
        chosen = rng.choice(self.k, size=n, p=self.mixture_.weights_)
        roots = np.linalg.cholesky(self.mixture_.covariances_)[chosen]
        noise = rng.standard_normal((n, self.rank))
        return self.mixture_.means_[chosen] + np.einsum("nij,nj->ni", roots, noise)

    def _log_scores(self, scores: np.ndarray) -> np.ndarray:
        return self.mixture_.score_samples(scores)


class KernelDensity(_Principal):
    """A Gaussian kernel density over the first principal components, white noise outside them.

    Parameters
    ----------
    rank : int, default 5
        Principal components, each scaled to variance 1. The noise is that of `PPCA`.
    bandwidth : float or {"scott", "silverman"}, default "scott"
        Standard deviation of the kernel in the scaled components; "scott" is ``n ** (-1 / (rank + 4))``.

    Notes
    -----
    ``sklearn.neighbors.KernelDensity``. As of every kernel density, the variances are larger than those of
    the latents: (n - 1) / n + bandwidth^2 of them.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(20, 100))
    >>> KernelDensity(rank=3).fit(z).sample(4, np.random.default_rng(0)).shape
    (4, 100)
    """

    def __init__(self, rank: int = 5, bandwidth: float | str = "scott") -> None:
        self.rank = rank
        self.bandwidth = bandwidth

    def _fit_scores(self) -> None:
        self.density_ = neighbors.KernelDensity(bandwidth=self.bandwidth).fit(self.scores_)

    def _draw_scores(self, n: int, rng: np.random.Generator) -> np.ndarray:
        centres = self.scores_[rng.integers(self.n_samples_, size=n)]
        return centres + self.density_.bandwidth_ * rng.standard_normal((n, self.rank))

    def _log_scores(self, scores: np.ndarray) -> np.ndarray:
        return self.density_.score_samples(scores)


# ---------------------------------------------------------------------------- sums of a few latents


class Recombination(_Prior):
    """Sum of `k` distinct centred latents over sqrt(k): keeps their covariance, not their Gaussianity.

    Parameters
    ----------
    k : int, default 2
        Latents a draw, 1 <= k < n.

    Notes
    -----
    Of latents drawn without replacement and centred at their mean, ``sum w_i y_i`` has the covariance
    ``(sum w_i^2 - (sum w_i)^2 / n) S``; it is divided by the root of this factor. For equal weights that
    is (n - k) / n of the sum over sqrt(k).

    Examples
    --------
    >>> Recombination(k=2).fit(np.eye(4)).sample(3, np.random.default_rng(0)).shape
    (3, 4)
    """

    def __init__(self, k: int = 2) -> None:
        self.k = k

    def _check(self, n: int) -> None:
        if not 1 <= self.k < n:
            raise ValueError(f"k = {self.k} latents a draw need 1 <= k < n = {n}")

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        chosen = _distinct(n, self.n_samples_, self.k, rng)
        weights = self._weights(n, rng)
        factor = np.square(weights).sum(axis=1) - np.square(weights.sum(axis=1)) / self.n_samples_
        weights = weights / np.sqrt(factor)[:, None]
        return _combine(_sparse(weights, chosen, self.n_samples_), self.samples_, self.mean_)

    def _weights(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.ones((n, self.k))


class LinearCombination(Recombination):
    """Convex combination of `k` latents with random weights, moved and scaled to their mean and S.

    Parameters
    ----------
    k : int, default 2
        Latents a draw, 1 <= k < n; 2 gives points between two latents.

    Notes
    -----
    Bodin et al., arXiv:2408.08558: of Gaussian latents the combination ``sum w_i z_i``, with ``a = sum w_i``
    and ``b = sum w_i^2``, has the law of one latent as ``(1 - a / sqrt(b)) mean + sum w_i z_i / sqrt(b)``.
    The paper knows the mean; here it is that of the same latents, so b is b - a^2 / n, as in
    `Recombination`. The weights are uniform on the simplex.

    Examples
    --------
    >>> LinearCombination(k=3).fit(np.eye(4)).sample(3, np.random.default_rng(0)).shape
    (3, 4)
    """

    def _weights(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.dirichlet(np.ones(self.k), size=n)


class NeighbourRecombination(_Prior):
    """Recombination of `k` latents within a neighbourhood, about its own mean.

    Parameters
    ----------
    k : int, default 2
        Latents a draw, 1 <= k < neighbours.
    neighbours : int, default 5
        Size m of a neighbourhood: a latent picked at random and the m - 1 nearest to it; at most n.

    Notes
    -----
    The sum of k distinct members about their mean has the covariance ``k (m - k) / (m - 1) C``, with C that
    of the m members, which divides by m; it is scaled to C. So mean and covariance over all draws are those
    of a random member of a random neighbourhood: by the law of total variance, those of `Replay` where
    every latent belongs to equally many neighbourhoods. With C unbiased they would be larger by about 1 / m.

    Examples
    --------
    >>> prior = NeighbourRecombination(k=2, neighbours=3)
    >>> prior.fit(np.eye(5)).sample(3, np.random.default_rng(0)).shape
    (3, 5)
    """

    def __init__(self, k: int = 2, neighbours: int = 5) -> None:
        self.k = k
        self.neighbours = neighbours

    def _check(self, n: int) -> None:
        if not 1 <= self.k < self.neighbours <= n:
            raise ValueError(
                f"k = {self.k} latents of {self.neighbours} neighbours need 1 <= k < neighbours <= n = {n}"
            )

    def _estimate(self, variance: np.ndarray) -> None:
        distances = pairwise_distances(self.samples_, self.samples_)
        self.neighbours_ = np.argsort(distances, axis=1)[:, : self.neighbours]

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        k, m = self.k, self.neighbours
        members = self.neighbours_[rng.integers(self.n_samples_, size=n)]
        scale = np.sqrt((m - 1) / (k * (m - k)))
        weights = np.full((n, m), (1 - scale * k) / m)
        rows = np.arange(n)[:, None]
        weights[rows, _distinct(n, m, k, rng)] += scale
        return _combine(_sparse(weights, members, self.n_samples_), self.samples_, self.mean_)


class Slerp(_Prior):
    """A point of the great circle between two latents, about the origin, as released.

    Parameters
    ----------
    points : int, default 20
        Points of a path, at the shares i / (points + 1); each draw is a random one of a random pair.

    Notes
    -----
    Zhu et al., arXiv:2310.09213, ``discovery.py``: directions follow the circle, norms change linearly. The
    code takes all points of a pair in turn; here draws are independent, of the same law. The mean that
    the ends share is multiplied by up to 1.41: `ood_lib.geometry.slerp`.

    Examples
    --------
    >>> Slerp(points=1).fit(np.eye(2)).sample(1, np.random.default_rng(0)).round(3)
    array([[0.707, 0.707]])
    """

    def __init__(self, points: int = 20) -> None:
        self.points = points

    def _check(self, n: int) -> None:
        if self.points < 1:
            raise ValueError(f"points is {self.points}; a path needs 1 or more")

    def _estimate(self, variance: np.ndarray) -> None:
        self.centre_ = np.zeros_like(self.mean_)

    def _pairs(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return _distinct(n, self.n_samples_, 2, rng)

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        starts, ends = map(self._rows, self._pairs(n, rng).T)
        places = rng.integers(1, self.points + 1, size=n)
        for place in np.unique(places):
            here, share = places == place, place / (self.points + 1)
            starts[here] = slerp(starts[here], ends[here], [share], centre=self.centre_)[:, 0]
        return starts


class CentredSlerp(Slerp):
    """A point of the great circle between two latents about their mean.

    Parameters
    ----------
    points : int, default 20
        Points of a path, at the shares i / (points + 1); each draw is a random one of a random pair.

    Notes
    -----
    As `Slerp`, of the deviations from the mean latent: their directions follow the circle, their norms
    change linearly. Two latents lie opposite each other about their mean, so three are needed.

    Examples
    --------
    >>> prior = CentredSlerp().fit(np.eye(3) + 10)
    >>> draw = prior.sample(1, np.random.default_rng(0))
    >>> float(np.linalg.norm(draw - prior.mean_).round(6)) == round((2 / 3) ** 0.5, 6)
    True
    """

    least = 3

    def _estimate(self, variance: np.ndarray) -> None:
        self.centre_ = self.mean_


class NeighbourSlerp(CentredSlerp):
    """A point of the great circle about the mean, between a latent and one of its nearest neighbours.

    Parameters
    ----------
    neighbours : int, default 5
        The other end is one of so many that are nearest to the first; below n.
    points : int, default 3
        Points of a path, at the shares i / (points + 1).

    Notes
    -----
    A law of latents need not be convex, even about its mean: a mixture of kinds is empty in between.
    Neighbours are of one kind more often than a random pair is, so their path stays where latents are.
    The price is novelty: a point between near neighbours is near to both.

    Examples
    --------
    >>> NeighbourSlerp(neighbours=2).fit(np.eye(4)).sample(3, np.random.default_rng(0)).shape
    (3, 4)
    """

    def __init__(self, neighbours: int = 5, points: int = 3) -> None:
        self.neighbours = neighbours
        self.points = points

    def _check(self, n: int) -> None:
        super()._check(n)
        if not 1 <= self.neighbours < n:
            raise ValueError(f"neighbours is {self.neighbours}; use 1 <= neighbours < n = {n}")

    def _estimate(self, variance: np.ndarray) -> None:
        super()._estimate(variance)
        distances = pairwise_distances(self.samples_, self.samples_)
        np.fill_diagonal(distances, np.inf)
        self.neighbours_ = np.argsort(distances, axis=1)[:, : self.neighbours]

    def _pairs(self, n: int, rng: np.random.Generator) -> np.ndarray:
        starts = rng.integers(self.n_samples_, size=n)
        ends = self.neighbours_[starts, rng.integers(self.neighbours, size=n)]
        return np.stack([starts, ends], axis=1)


class Mosaic(_Prior):
    """Parts of different latents that agree where they meet: the flow of the best local denoiser.

    Parameters
    ----------
    window : float, default 0.8
        Widest window of the denoiser as a share of the longer side of a latent, above 0. The wider, the
        more draws are copies.
    steps : int, default 10
        Heun steps of the flow.
    shape : tuple of int, optional
        (C, H, W) of a latent. By default a square of 1 or 3 channels; if it is none, a line (1, 1, d).

    Notes
    -----
    See `ood_lib.mosaic`. A sum of latents shows all its terms at once, like a double exposure; a mosaic
    shows one at a time, each in its place. Latents are noisy pictures, and noise hides which parts agree; so
    where the images of the latents are given to `fit`, parts are chosen by these.

    Examples
    --------
    >>> prior = Mosaic().fit(np.eye(16))
    >>> prior.sample(2, np.random.default_rng(0)).shape, prior.shape_
    ((2, 16), (1, 4, 4))
    """

    def __init__(
        self, window: float = 0.8, steps: int = 10, shape: tuple[int, int, int] | None = None
    ) -> None:
        self.window = window
        self.steps = steps
        self.shape = shape

    def fit(self, latents: Samples, y: Samples | None = None) -> Self:
        """Keep the latents, and what their parts are chosen by.

        Parameters
        ----------
        latents : samples of shape (n, d)
            Latents of n images.
        y : samples of shape (n, d), optional
            Pictures that tell which parts agree, such as the images of the latents; by default the latents.

        Returns
        -------
        Self
            The prior, with `pictures_`, their `spread_`, and `shape_`.

        Raises
        ------
        ValueError
            As of every prior, or if there is not one picture for each latent.

        Examples
        --------
        >>> latents = np.array([[0.0, 1.0], [5.0, 6.0]])
        >>> draws = Mosaic(shape=(1, 1, 2)).fit(latents, np.eye(2)).sample(1, np.random.default_rng(0))
        >>> bool(draws.min() >= 0 and draws.max() <= 6)
        True
        """
        super().fit(latents)
        self.pictures_ = self.samples_ if y is None else _checked(y, self.least)
        if self.pictures_.shape != self.samples_.shape:
            raise ValueError(
                f"pictures are {self.pictures_.shape}, latents {self.samples_.shape}; give one for each"
            )
        variance = _moments(self.pictures_, self.n_features_in_)[1]
        self.spread_ = float(np.sqrt(variance.mean()))
        return self

    def _check(self, n: int) -> None:
        if not self.window > 0:
            raise ValueError(f"window is {self.window}; use a share of the side above 0, as 0.6")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; the flow needs 1 or more")

    def _estimate(self, variance: np.ndarray) -> None:
        self.shape_ = self.shape or _square(self.n_features_in_)
        if np.prod(self.shape_) != self.n_features_in_:
            raise ValueError(
                f"shape is {self.shape_}; latents have {self.n_features_in_} coordinates"
            )

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        start = rng.standard_normal((n, self.n_features_in_))
        pictures, shown, noise = (
            torch.from_numpy(np.asarray(x[:, :])).reshape(-1, *self.shape_)
            for x in (self.pictures_, self.samples_, start)
        )
        how = {"spread": self.spread_, "window": self.window, "steps": self.steps}
        return flow(pictures, noise, **how, shown=shown).double().flatten(1).numpy()


def _square(d: int) -> tuple[int, int, int]:
    """Find (C, side, side) of d numbers, C in {1, 3}, or a line."""
    for channels in (1, 3):
        side = int(np.sqrt(d // channels))
        if channels * side**2 == d:
            return channels, side, side
    return 1, 1, d


# ------------------------------------------------------------------------------------------ controls


class Replay(_Prior):
    """The fitted latents themselves, picked at random: what every measure of novelty must flag.

    Examples
    --------
    >>> Replay().fit(np.eye(2)).sample(1, np.random.default_rng(0))
    array([[0., 1.]])
    """

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self._rows(rng.integers(self.n_samples_, size=n))


class ReplayNoise(_Density):
    """A fitted latent plus a little white noise: a near-copy.

    Parameters
    ----------
    scale : float, default 0.1
        Standard deviation of the noise, in units of that of `Isotropic`.

    Notes
    -----
    The density is the kernel density of the latents in all d coordinates.

    Examples
    --------
    >>> prior = ReplayNoise(scale=0.5).fit(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    >>> float(prior.variance_)
    0.25
    """

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = scale

    def _check(self, n: int) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; use a number above 0, or Replay for none")

    def _estimate(self, variance: np.ndarray) -> None:
        self.variance_ = self.scale**2 * variance.mean()

    def _draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        draws = self._rows(rng.integers(self.n_samples_, size=n))
        draws += np.sqrt(self.variance_) * rng.standard_normal(draws.shape)
        return draws

    def _log_density(self, latents: Samples) -> np.ndarray:
        squares = np.square(pairwise_distances(latents, self.samples_)) / self.variance_
        constant = self.n_features_in_ * np.log(2 * np.pi * self.variance_)
        return logsumexp(-0.5 * squares, axis=1) - np.log(self.n_samples_) - 0.5 * constant


PRIORS: dict[str, type[_Prior]] = {
    "standard normal": StandardNormal,
    "isotropic": Isotropic,
    "diagonal": Diagonal,
    "full covariance": FullGaussian,
    "recombination": Recombination,
    "isotropic, as released": IsotropicReleased,
    "PPCA": PPCA,
    "mixture": Mixture,
    "kernel density": KernelDensity,
    "neighbour recombination": NeighbourRecombination,
    "linear combination": LinearCombination,
    "slerp": Slerp,
    "slerp about the mean": CentredSlerp,
    "slerp between neighbours": NeighbourSlerp,
    "mosaic": Mosaic,
    "replay": Replay,
    "replay plus noise": ReplayNoise,
}

LADDER = ("standard normal", "isotropic", "diagonal", "full covariance", "recombination")


def make_prior(name: str, **parameters: Any) -> _Prior:
    """Make an unfitted prior by name.

    Parameters
    ----------
    name : str
        A key of `PRIORS`; those of `LADDER` know more of the latents from step to step.
    **parameters
        Parameters of its class.

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
    >>> make_prior("full covariance", shrinkage="oas")
    FullGaussian(shrinkage='oas')
    """
    if name not in PRIORS:
        raise ValueError(f"unknown prior {name!r}; known are {'; '.join(PRIORS)}")
    return PRIORS[name](**parameters)
