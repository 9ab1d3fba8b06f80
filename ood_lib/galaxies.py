"""Physical measures of cut-outs of the sky: flux, size, shape and place of the brightest source.

An image is cleared of its background, sources are what stands out of it, and the brightest is measured as
catalogues do [1]_ [2]_: the flux in an ellipse that grows with the source, the radius that holds half of
it, the axes of the second moments. Sources beside it are masked. Grey levels run from 0 to 1 here.

.. [1] Bertin, Arnouts. SExtractor: Software for source extraction. A&A Supplement 117, 1996.
.. [2] Barbary. SEP: Source Extractor as a library. JOSS 1(6), 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
import torch
from scipy.stats import ks_2samp

__all__ = ["PHYSICAL", "Galaxies", "distances", "measure", "spread"]

THRESHOLD, PIXELS = 3.0, 5  # a source is so many touching pixels above so many times the noise
GREY_LEVEL = 1 / 255  # the least noise: below it 8 bits tell nothing
KRON, WIDEST = 2.5, 6.0  # the ellipse in first moments; where those are taken, in semi-axes
SMALLEST = 8  # side of an image in pixels
PHYSICAL = ("flux", "half_light", "ellipticity")


@dataclass(frozen=True, eq=False)
class Galaxies:
    """Measures of the brightest source of each image; NaN where none was found.

    Parameters
    ----------
    flux : ndarray of shape (n,)
        Light above the background; a pixel of full white counts 1.
    half_light : ndarray of shape (n,)
        Radius that holds half of the flux, in pixels.
    ellipticity : ndarray of shape (n,)
        1 - b / a of the axes; 0 is round.
    offset : ndarray of shape (n,)
        Distance from the centre of the image, in pixels.
    found : ndarray of bool, shape (n,)
        Whether there is a source.

    Examples
    --------
    >>> none = np.full(2, np.nan)
    >>> len(Galaxies(none, none, none, none, np.zeros(2, bool)))
    2
    """

    flux: np.ndarray
    half_light: np.ndarray
    ellipticity: np.ndarray
    offset: np.ndarray
    found: np.ndarray

    def __len__(self) -> int:
        """Count the images."""
        return len(self.found)


def measure(images: torch.Tensor) -> Galaxies:
    """Measure the brightest source of each image.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        In [-1, 1], grey or colour (C = 1 or 3, of which the mean is taken), 8 pixels a side or more.

    Returns
    -------
    Galaxies
        One entry an image, whatever the others are.

    Raises
    ------
    ValueError
        If the shape is another, or a value is not finite or outside [-1, 1].

    Examples
    --------
    >>> y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    >>> light = 0.8 * torch.exp(-((x - 18.5) ** 2 + (y - 15.5) ** 2) / (2 * 2.0**2))
    >>> made = measure((2 * light - 1).view(1, 1, 32, 32))
    >>> made.offset.round(2), made.half_light.round(1)
    (array([3.]), array([2.4]))
    """
    _check(images)
    grey = images.detach().cpu().double().mean(1).add(1).div(2).numpy()
    rows = np.array([_brightest(image) for image in grey]).reshape(len(grey), 4)
    return Galaxies(*rows.T, found=np.isfinite(rows[:, 0]))


def _check(images: torch.Tensor) -> None:
    """Refuse what is not a batch of images."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < SMALLEST:
        raise ValueError(
            f"images have shape {shape}; give (n, C, H, W) with 1 or 3 channels and {SMALLEST} pixels "
            "a side or more"
        )
    if not images.abs().le(1 + 1e-3).all():
        raise ValueError(
            "images have values that are not finite or not in [-1, 1]; clip them first"
        )


def _brightest(image: np.ndarray) -> tuple[float, float, float, float]:
    """Flux, half-light radius, ellipticity and offset of the brightest source of an image (H, W)."""
    height, width = image.shape
    background = sep.Background(np.ascontiguousarray(image), bw=width, bh=height)
    sky = image - background.globalback
    noise = max(float(background.rms().max()), GREY_LEVEL)
    sources, labels = sep.extract(
        sky, THRESHOLD, err=noise, minarea=PIXELS, filter_kernel=None, segmentation_map=True
    )
    if len(sources) == 0:
        return (np.nan,) * 4
    k = int(sources["flux"].argmax())
    alone = np.where((labels == 0) | (labels == k + 1), sky, 0.0)
    x, y, a, b = (float(sources[name][k]) for name in ("x", "y", "a", "b"))
    # single precision rounds angles out of their range
    theta = float(np.clip(sources["theta"][k], -np.pi / 2, np.pi / 2))
    flux, half = _light(alone, x, y, a, b, theta)
    return flux, half, 1 - b / a, float(np.hypot(x - (width - 1) / 2, y - (height - 1) / 2))


def _light(
    sky: np.ndarray, x: float, y: float, a: float, b: float, theta: float
) -> tuple[float, float]:
    """Flux in the ellipse of Kron, and the radius of a circle that holds half of it."""
    moment, _ = sep.kron_radius(sky, [x], [y], [a], [b], [theta], WIDEST)
    scale = KRON * max(float(moment[0]), 1.0)
    flux, _, _ = sep.sum_ellipse(sky, [x], [y], [a], [b], [theta], scale)
    half, _ = sep.flux_radius(sky, [x], [y], [scale * a], 0.5, normflux=flux, subpix=5)
    return float(flux[0]), float(half[0])


def _check_found(galaxies: Galaxies, name: str) -> None:
    """Refuse a set without any source."""
    if not galaxies.found.any():
        raise ValueError(
            f"no source was found in any of the {len(galaxies)} images of {name}; give images that have some"
        )


def distances(made: Galaxies, real: Galaxies) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of the physical measures of two sets of images.

    Parameters
    ----------
    made, real : Galaxies
        From `measure`; images without a source are left out.

    Returns
    -------
    dict of str to float
        Largest difference of the two distribution functions, from 0 to 1, of "flux", "half_light" and
        "ellipticity". Two samples of one law with n and m images are apart by about
        0.87 (1 / n + 1 / m) ** 0.5 in each.

    Raises
    ------
    ValueError
        If no source was found in a set.

    Examples
    --------
    >>> value, all_found = np.arange(3.0), np.ones(3, bool)
    >>> one = Galaxies(value, value, value, value, all_found)
    >>> distances(one, Galaxies(value + 9, value, value + 1, value, all_found))["flux"]
    1.0
    """
    _check_found(made, "made")
    _check_found(real, "real")
    return {
        name: float(
            ks_2samp(getattr(made, name)[made.found], getattr(real, name)[real.found]).statistic
        )
        for name in PHYSICAL
    }


def spread(measured: Galaxies) -> float:
    """Root mean square distance of the brightest sources from the centres of their images.

    Parameters
    ----------
    measured : Galaxies
        From `measure`; images without a source are left out.

    Returns
    -------
    float
        In pixels.

    Raises
    ------
    ValueError
        If no source was found.

    Examples
    --------
    >>> none, offset = np.full(3, np.nan), np.array([3.0, 4.0, np.nan])
    >>> round(spread(Galaxies(none, none, none, offset, np.isfinite(offset))) ** 2, 9)
    12.5
    """
    _check_found(measured, "measured")
    return float(np.sqrt(np.mean(measured.offset[measured.found] ** 2)))
