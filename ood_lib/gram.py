"""Linear algebra for n samples of d coordinates, d >> n, without any d x d matrix.

A centred sample ``Y`` (n, d) has the covariance ``S = Y^T Y / n``. Its spectrum, its shrinkage towards
a multiple of the identity, Mahalanobis distances, log-determinant, leave-one-out distances and draws are
all read from the n x n Gram matrix ``Y Y^T``, summed over blocks of coordinates: time grows as n^2 d,
memory as n^2 + n x block. A sample is anything of shape (n, d) whose column slices ``samples[:, a:b]``
give an array: an ndarray, a memmap, a slice of a safetensors file, or `Rows` over several of them. Blocks
are converted to float64 (integers too), because float32 products leave errors of 1e-8 and more in small
eigenvalues, and centred before they are multiplied, so that a large mean cancels nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

__all__ = [
    "Covariance",
    "Rows",
    "Samples",
    "draw_weights",
    "fit_covariance",
    "gram_matrix",
    "mean",
    "open_shards",
    "pairwise_distances",
    "shrinkage",
    "spectrum",
]

BLOCK = 8192
EPS = np.finfo(np.float64).eps


# ------------------------------------------------------------------------- samples and their columns


class Samples(Protocol):
    """Anything of shape (n, d) whose column slices give an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of samples and of coordinates; a safetensors slice says ``get_shape()`` instead."""

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """Columns ``[:, a:b]`` as an array of real numbers, of any dtype."""


def _shape(samples: Samples) -> tuple[int, int]:
    shape = tuple(samples.shape if hasattr(samples, "shape") else samples.get_shape())
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"samples have shape {shape}; they must be (n, d), at least one sample of at least one "
            "coordinate: flatten images, and open shards of latents with open_shards"
        )
    return shape


def _same_d(a: Samples, b: Samples) -> tuple[int, int, int]:
    """Numbers of samples of `a` and `b`, and their number of coordinates."""
    (n, d), (m, other) = _shape(a), _shape(b)
    if d != other:
        raise ValueError(
            f"samples have shapes {(n, d)} and {(m, other)}; both must be (n, d) with one d"
        )
    return n, m, d


def _slices(d: int, block: int) -> list[slice]:
    if block < 1:
        raise ValueError(f"block is {block}; use 1 or more coordinates")
    return [slice(first, min(first + block, d)) for first in range(0, d, block)]


def _columns(samples: Samples, here: slice) -> np.ndarray:
    """Columns as a float64 array of their own, which may be changed in place."""
    block = np.asarray(samples[:, here])
    if block.dtype.kind not in "biuf":
        raise ValueError(
            f"samples are {block.dtype}; they must be real numbers: convert them first"
        )
    block = np.array(block, dtype=np.float64)
    if not np.isfinite(block).all():
        raise ValueError(
            f"samples hold NaN or infinity in coordinates {here.start} to {here.stop - 1}; every "
            "number must be finite: remove those samples"
        )
    return block


def _about(samples: Samples, here: slice, centre: np.ndarray) -> np.ndarray:
    """Columns as float64, about a centre."""
    block = _columns(samples, here)
    block -= centre
    return block


@dataclass(frozen=True)
class Rows:
    """Several samples of one d, one below the other, without copying them.

    Parameters
    ----------
    parts : tuple of samples of shape (n_i, d)
        Arrays, memmaps, or anything with column slices.

    Raises
    ------
    ValueError
        If there are no parts or they differ in d, or if anything but ``[:, a:b]`` is asked for.

    Examples
    --------
    >>> rows = Rows((np.zeros((2, 3)), np.ones((1, 3))))
    >>> rows.shape
    (3, 3)
    >>> rows[:, 1:2]
    array([[0.],
           [0.],
           [1.]])
    """

    parts: tuple[Samples, ...] = field(repr=False)

    def __post_init__(self) -> None:
        shapes = [_shape(part) for part in self.parts]
        if len({d for _, d in shapes}) != 1:
            raise ValueError(f"parts have shapes {shapes}; give one or more (n, d) with one d")

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of samples and of coordinates."""
        shapes = [_shape(part) for part in self.parts]
        return sum(n for n, _ in shapes), shapes[0][1]

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """Columns of all parts; only these are read."""
        if not (isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None)):
            raise ValueError(f"rows give columns only, as rows[:, a:b], not {key!r}")
        return np.concatenate([np.asarray(part[key]) for part in self.parts])


def open_shards(folder: Path, *, tensor: str = "latent") -> Rows:
    """Present the shards of a folder of latents as one sample on disk.

    Parameters
    ----------
    folder : Path
        Folder of safetensors files, as `ood_lib.latents.path_of` names it; read in the order of their
        names, which is that of the images.
    tensor : str, default "latent"
        Tensor of shape (n, ...) and dtype float32 or float64.

    Returns
    -------
    Rows
        Of shape (n, d). Columns are read from disk when they are asked for. Checksums are not verified;
        `ood_lib.latents.shards` does that.

    Raises
    ------
    ValueError
        If there is no shard, a shard is damaged, or it has no such tensor.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.numpy import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"latent": np.ones((3, 1, 2, 2), "f4")}, Path(folder) / "000000-000002.safetensors")
    ...     open_shards(Path(folder)).shape
    (3, 4)
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no shard (*.safetensors); make the latents first")
    return Rows(tuple(_map_tensor(path, tensor) for path in paths))


def _map_tensor(path: Path, tensor: str) -> np.memmap:
    """Map one tensor of a safetensors file, one flattened sample a row."""
    try:
        safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and make it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    names = sorted(header.keys() - {"__metadata__"})
    if tensor not in names:
        raise ValueError(f"{path} holds no tensor {tensor!r}; it has {', '.join(names)}")
    entry = header[tensor]
    kinds = {"F32": "<f4", "F64": "<f8"}
    if entry["dtype"] not in kinds:
        raise ValueError(f"{tensor!r} of {path} is {entry['dtype']}; it must be F32 or F64")
    n, *event = entry["shape"]
    first = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, kinds[entry["dtype"]], "r", offset=first, shape=(n, math.prod(event)))


# ------------------------------------------------------------------ means, Gram matrices and spectra


def mean(samples: Samples, *, block: int = BLOCK) -> np.ndarray:
    """Mean of the samples, streamed over blocks of coordinates.

    Parameters
    ----------
    samples : samples of shape (n, d)
        Samples.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (d,)
        float64.

    Raises
    ------
    ValueError
        If a number is not finite.

    Examples
    --------
    >>> mean(np.array([[1, 2], [3, 6]]))
    array([2., 4.])
    """
    _, d = _shape(samples)
    return np.concatenate([_columns(samples, here).mean(axis=0) for here in _slices(d, block)])


def gram_matrix(a: Samples, b: Samples | None = None, *, block: int = BLOCK) -> np.ndarray:
    """Inner products of the rows of `a` and `b`, streamed over blocks of coordinates.

    Parameters
    ----------
    a : samples of shape (n, d)
        Samples.
    b : samples of shape (m, d), optional
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
        If `a` and `b` differ in d, or a number is not finite.

    Examples
    --------
    >>> gram_matrix(np.eye(2, 5), np.ones((1, 5)))
    array([[1.],
           [1.]])
    """
    alone = b is None or b is a
    n, m, d = _same_d(a, a if alone else b)
    out = np.zeros((n, m))
    for here in _slices(d, block):
        left = _columns(a, here)
        # a product with its own transpose takes half the operations
        out += left @ (left if alone else _columns(b, here)).T
    return out


def _centred_gram(samples: Samples, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of the samples about their mean, and the mean, in one pass."""
    n, d = _shape(samples)
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {n}")
    gram, centre = np.zeros((n, n)), np.empty(d)
    for here in _slices(d, block):
        columns = _columns(samples, here)
        # from the first sample on, a coordinate that is constant has a variance of exactly 0
        origin = columns[0].copy()
        columns -= origin
        shift = columns.mean(axis=0)
        columns -= shift
        centre[here] = origin + shift
        gram += columns @ columns.T
    return gram, centre


def spectrum(samples: Samples, *, block: int = BLOCK) -> np.ndarray:
    """Non-zero eigenvalues of the unbiased sample covariance, largest first.

    Parameters
    ----------
    samples : samples of shape (n, d)
        Samples.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (min(n - 1, d),)
        Eigenvalues of ``Y^T Y / (n - 1)``; those of `Covariance` divide by n.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or a number is not finite.

    Notes
    -----
    As of any covariance in float64, the error is n x 1e-16 of the largest eigenvalue: eight digits are
    kept down to 1e-7 of it.

    Examples
    --------
    >>> spectrum(np.array([[1.0, 0, 0], [-1.0, 0, 0]]))
    array([2.])
    """
    gram, centre = _centred_gram(samples, block)
    n, d = len(gram), len(centre)
    values = np.linalg.eigvalsh(gram)[::-1] / (n - 1)
    return np.clip(values[: min(n - 1, d)], 0, None)


def pairwise_distances(a: Samples, b: Samples, *, block: int = BLOCK) -> np.ndarray:
    """Euclidean distances between the rows of `a` and `b`, streamed over blocks of coordinates.

    Parameters
    ----------
    a : samples of shape (n, d)
        Samples.
    b : samples of shape (m, d)
        Samples.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    ndarray of shape (n, m)
        Distances. The distance of a sample to its copy is 0 up to 1e-8 of its norm about the mean of
        `b`, from which all is measured.

    Raises
    ------
    ValueError
        If `a` and `b` differ in d, or a number is not finite.

    Examples
    --------
    >>> pairwise_distances(np.zeros((1, 4)), np.ones((2, 4)))
    array([[2., 2.]])
    """
    n, m, d = _same_d(a, b)
    squares = np.zeros((n, m))
    for here in _slices(d, block):
        right = _columns(b, here)
        centre = right.mean(axis=0)
        right -= centre
        left = _about(a, here, centre)
        squares += _square_norms(left)[:, None] + _square_norms(right) - 2 * left @ right.T
    return np.sqrt(np.clip(squares, 0, None))


def _square_norms(rows: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", rows, rows)


def draw_weights(n_draws: int, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Weights W for which ``mean + W @ (samples - mean)`` is an exact draw from N(mean, S).

    Parameters
    ----------
    n_draws : int
        Draws wanted.
    n_samples : int
        Samples n that the unbiased S was estimated from.
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


# ---------------------------------------------------------------------------------------- shrinkage


def _no_shrinkage(gram: np.ndarray, d: int) -> float:
    return 0.0


def _ledoit_wolf(gram: np.ndarray, d: int) -> float:
    n = len(gram)
    square = np.square(gram).sum() / n**2
    noise = (np.square(gram.diagonal()).sum() / n - square) / n
    signal = square - (gram.trace() / n) ** 2 / d
    return float(np.clip(noise / signal, 0, 1)) if signal > 0 else 0.0


def _oas(gram: np.ndarray, d: int) -> float:
    n = len(gram)
    square, total = np.square(gram).sum() / n**2, (gram.trace() / n) ** 2
    signal = (n + 1) * (square - total / d)
    return float(min((square + total) / signal, 1)) if signal > 0 else 1.0


METHODS: dict[str, Callable[[np.ndarray, int], float]] = {
    "none": _no_shrinkage,
    "ledoit_wolf": _ledoit_wolf,
    "oas": _oas,
}


def _intensity(gram: np.ndarray, d: int, method: str | float) -> float:
    if isinstance(method, Real) and 0 <= method <= 1:
        return float(method)
    if method not in METHODS:
        raise ValueError(
            f"method is {method!r}; use one of {', '.join(METHODS)}, or a shrinkage in [0, 1]"
        )
    # one variance is the same whatever its shrinkage; scikit-learn says 0
    return METHODS[method](gram, d) if d > 1 else 0.0


def shrinkage(samples: Samples, *, method: str, block: int = BLOCK) -> float:
    """Shrinkage intensity of the covariance, as scikit-learn estimates it, from the Gram matrix.

    Parameters
    ----------
    samples : samples of shape (n, d)
        Samples.
    method : {"none", "ledoit_wolf", "oas"}
        Estimator; "none" is 0.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    float
        The weight rho of ``(tr S / d) I``, in [0, 1]; 0 for d = 1.

    Raises
    ------
    ValueError
        If the method is unknown, there are fewer than two samples, or a number is not finite.

    Notes
    -----
    Both need only ``tr S^2 = |K|_F^2 / n^2`` and ``tr S = tr K / n`` of the centred Gram matrix K, and
    Ledoit and Wolf [1]_ (section 3) its diagonal. "oas" is eq. (23) of Chen et al. [2]_ without
    its terms in 2 / d, as in scikit-learn.

    References
    ----------
    .. [1] Ledoit, Wolf. A well-conditioned estimator for large-dimensional covariance matrices. Journal
       of Multivariate Analysis 88 (2004) 365-411.
    .. [2] Chen, Wiesel, Eldar, Hero. Shrinkage algorithms for MMSE covariance estimation. IEEE
       Transactions on Signal Processing 58 (2010) 5016-5029. arXiv:0907.4698

    Examples
    --------
    >>> shrinkage(np.eye(4), method="oas")
    1.0
    """
    gram, centre = _centred_gram(samples, block)
    return _intensity(gram, len(centre), method)


# --------------------------------------------------------------------------------------- covariance


@dataclass(frozen=True)
class Covariance:
    """Gaussian law of a sample, ``Sigma = (1 - rho) S + rho (tr S / d) I``, never formed.

    Parameters
    ----------
    samples : samples of shape (n, d)
        The samples it was fitted to; they are read again when distances or draws are asked for.
    mean : ndarray of shape (d,)
        Their mean.
    eigenvalues : ndarray of shape (min(n - 1, d),)
        Of ``S = Y^T Y / n``, largest first; all others are 0. scikit-learn divides by n too.
    shrinkage : float
        The weight rho, in [0, 1].
    scale : float
        Mean variance ``tr S / d``.
    vectors : ndarray of shape (n, n - 1)
        Eigenvectors of the centred Gram matrix in the same order, orthogonal to the ones.
    block : int, default 8192
        Coordinates held in float64 at a time.

    Examples
    --------
    >>> law = fit_covariance(np.array([[1.0, 0.0], [-1.0, 0.0]]), method=0.5)
    >>> law.eigenvalues, law.scale
    (array([1.]), 0.5)
    >>> law.mahalanobis(np.array([[0.0, 1.0]]))
    array([4.])
    """

    samples: Samples = field(repr=False)
    mean: np.ndarray = field(repr=False)
    eigenvalues: np.ndarray = field(repr=False)
    shrinkage: float
    scale: float
    vectors: np.ndarray = field(repr=False)
    block: int = BLOCK

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.vectors)

    @property
    def d(self) -> int:
        """Number of coordinates."""
        return len(self.mean)

    @property
    def _floor(self) -> float:
        """Variance of Sigma in every direction that the samples do not span."""
        return self.shrinkage * self.scale

    @property
    def _variances(self) -> np.ndarray:
        """Eigenvalues of Sigma in the directions that the samples span."""
        return (1 - self.shrinkage) * self.eigenvalues + self._floor

    @property
    def _spanned(self) -> np.ndarray:
        """Which eigenvalues of S are above rounding."""
        return self.eigenvalues > self.n * EPS * self.eigenvalues[0]

    def _refuse_singular(self) -> None:
        if self.scale == 0:
            raise ValueError(
                f"all {self.n} samples are equal, so their covariance is 0 at any shrinkage; give "
                "samples that differ"
            )
        rank = int(self._spanned.sum())
        if self._floor == 0 and rank < self.d:
            raise ValueError(
                f"the covariance is singular: {self.n} samples of {self.d} coordinates have rank {rank} "
                f"and shrinkage {self.shrinkage:g}; fit with method='ledoit_wolf' or a shrinkage above 0"
            )

    def mahalanobis(self, x: Samples) -> np.ndarray:
        """Squared Mahalanobis distances ``(x - mean)^T Sigma^-1 (x - mean)``.

        Parameters
        ----------
        x : samples of shape (m, d)
            Samples to judge.

        Returns
        -------
        ndarray of shape (m,)
            Squared distances, as scikit-learn gives them.

        Raises
        ------
        ValueError
            If Sigma is singular, `x` has another d, or a number is not finite.

        Notes
        -----
        The part of x in the span of the samples counts by the eigenvalues of Sigma, the square norm of
        the rest by 1 / (rho tr S / d). That rest is a difference. For x inside the span, as the samples
        themselves, it leaves a relative error of about 3e-15 d / (n rho); for others it is harmless.

        Examples
        --------
        >>> x = np.random.default_rng(0).normal(size=(5, 100))
        >>> fit_covariance(x).mahalanobis(x).shape
        (5,)
        """
        self._refuse_singular()
        products, squares = self._against_samples(x)
        spanned = self._spanned
        lengths = np.sqrt(self.n * self.eigenvalues[spanned])
        inside = products @ self.vectors[:, : len(spanned)][:, spanned] / lengths
        distances = (np.square(inside) / self._variances[spanned]).sum(axis=1)
        if spanned.sum() == self.d:
            return distances
        outside = np.clip(squares - _square_norms(inside), 0, None)
        return distances + outside / self._floor

    def _against_samples(self, x: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of `x` with the samples, (m, n), and its square norms (m,), about the mean."""
        m, n, d = _same_d(x, self.samples)
        products, squares = np.zeros((m, n)), np.zeros(m)
        for here in _slices(d, self.block):
            left = _about(x, here, self.mean[here])
            products += left @ _about(self.samples, here, self.mean[here]).T
            squares += _square_norms(left)
        return products, squares

    def leave_one_out(self) -> np.ndarray:
        """Squared Mahalanobis distance of each sample to the law fitted without it.

        Returns
        -------
        ndarray of shape (n,)
            Each under the mean, S and tr S / d of the other n - 1 samples and the same rho: what a new
            sample of the same law would score, where `mahalanobis` of a sample is far too small.

        Raises
        ------
        ValueError
            If there are fewer than three samples, or a covariance without one of them is singular.

        Notes
        -----
        Without sample i, ``(n - 1) S_i = Y^T Y - t y_i y_i^T`` with ``t = n / (n - 1)``, and its distance
        from their mean is ``t y_i``. By the formula of Sherman and Morrison [1]_, with the eigenvalues k_j
        and vectors U of the Gram matrix, ``c_i = rho tr S_i / d``, ``s_ij = (1 - rho) k_j / (n - 1) + c_i``:
        ``t sum_j (U_ij^2 k_j / s_ij) / sum_j (U_ij^2 c_i / s_ij)``, in which all terms are positive.

        References
        ----------
        .. [1] Sherman, Morrison. Adjustment of an inverse matrix corresponding to a change in one element
           of a given matrix. Annals of Mathematical Statistics 21 (1950) 124-127.

        Examples
        --------
        >>> fit_covariance(np.array([[0.0], [1.0], [3.0]])).leave_one_out().round(2)
        array([ 4.  ,  0.11, 25.  ])
        """
        self._refuse_singular()
        ratio, weights = self.n / (self.n - 1), np.square(self.vectors)
        roots = self.n * self.eigenvalues
        spanned, rest = np.split(weights, [len(roots)], axis=1)
        scales = (roots.sum() - ratio * (spanned @ roots)) / (self.n - 1) / self.d
        self._refuse_lost(scales <= self.n * EPS * self.scale)
        floors = self.shrinkage * scales[:, None]
        shares = spanned / ((1 - self.shrinkage) * roots / (self.n - 1) + floors)
        # a direction without variance has c / s = 1, also in the limit c = 0
        left = (shares * floors).sum(axis=1) + rest.sum(axis=1)
        self._refuse_lost(left <= (0 if self.shrinkage else self.n * EPS))
        return ratio * (shares @ roots) / left

    def _refuse_lost(self, singular: np.ndarray) -> None:
        if singular.any():
            i = int(singular.argmax())
            raise ValueError(
                f"without sample {i} the covariance of the other {self.n - 1} is singular at shrinkage "
                f"{self.shrinkage:g}; give more samples that differ, or fit with a shrinkage above 0"
            )

    def logdet(self) -> float:
        """Logarithm of the determinant of Sigma.

        Returns
        -------
        float
            In nats.

        Raises
        ------
        ValueError
            If Sigma is singular.

        Examples
        --------
        >>> law = fit_covariance(np.array([[1.0, 0.0], [-1.0, 0.0]]), method=1.0)
        >>> round(float(np.exp(law.logdet())), 6)
        0.25
        """
        self._refuse_singular()
        unspanned = self.d - len(self.eigenvalues)
        rest = unspanned * np.log(self._floor) if unspanned else 0.0
        return float(np.log(self._variances).sum() + rest)

    def log_density(self, x: Samples) -> np.ndarray:
        """Log density of N(mean, Sigma).

        Parameters
        ----------
        x : samples of shape (m, d)
            Samples to judge.

        Returns
        -------
        ndarray of shape (m,)
            In nats.

        Raises
        ------
        ValueError
            As in `mahalanobis`.

        Examples
        --------
        >>> fit_covariance(np.array([[1.0], [-1.0]])).log_density(np.zeros((1, 1))).round(3)
        array([-0.919])
        """
        return -0.5 * (self.d * np.log(2 * np.pi) + self.logdet() + self.mahalanobis(x))

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw from N(mean, Sigma), exactly.

        Parameters
        ----------
        n : int
            Draws wanted.
        rng : numpy.random.Generator
            Source of randomness; the draws do not depend on `block` beyond rounding.

        Returns
        -------
        ndarray of shape (n, d)
            float64: weights of variance (1 - rho) / n times the centred samples, plus white noise of
            variance rho tr S / d. A singular Sigma is no obstacle.

        Examples
        --------
        >>> law = fit_covariance(np.array([[1.0, 0.0], [-1.0, 0.0]]), method="none")
        >>> law.sample(3, np.random.default_rng(0))[:, 1]
        array([0., 0., 0.])
        """
        ratio = (1 - self.shrinkage) * (self.n - 1) / self.n
        weights = np.sqrt(ratio) * draw_weights(n, self.n, rng)
        draws = rng.standard_normal((n, self.d))
        draws *= np.sqrt(self._floor)
        draws += self.mean
        for here in _slices(self.d, self.block):
            draws[:, here] += weights @ _about(self.samples, here, self.mean[here])
        return draws


def fit_covariance(
    samples: Samples, *, method: str | float = "ledoit_wolf", block: int = BLOCK
) -> Covariance:
    """Fit a Gaussian law with a shrunk covariance, in one pass over the samples.

    Parameters
    ----------
    samples : samples of shape (n, d)
        Samples.
    method : {"ledoit_wolf", "oas", "none"} or float, default "ledoit_wolf"
        Estimator of the shrinkage, as in `shrinkage`, or the shrinkage itself in [0, 1].
    block : int, default 8192
        Coordinates held in float64 at a time.

    Returns
    -------
    Covariance
        The law. A singular one (rho = 0 and n <= d) has a spectrum and draws, but no distances.

    Raises
    ------
    ValueError
        If there are fewer than two samples, a number is not finite, or the method is unknown.

    Examples
    --------
    >>> law = fit_covariance(np.random.default_rng(0).normal(size=(20, 1000)))
    >>> law.n, law.d, law.shrinkage > 0.8
    (20, 1000, True)
    """
    gram, centre = _centred_gram(samples, block)
    n, d = len(gram), len(centre)
    total = gram.trace()
    # the ones are a null vector of the Gram matrix: moved below 0, they leave the others orthogonal
    values, vectors = np.linalg.eigh(gram - total / n**2)
    eigenvalues = np.clip(values[:0:-1][: min(n - 1, d)], 0, None) / n
    return Covariance(
        samples,
        centre,
        eigenvalues,
        _intensity(gram, d, method),
        float(total / n / d),
        vectors[:, :0:-1],
        block,
    )
