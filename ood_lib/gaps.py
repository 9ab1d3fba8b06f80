"""How far an unseen domain lies from what a frozen model knows: in features, spectra, and to its network."""

from __future__ import annotations

import numpy as np
import torch

from ood_lib.features import imagenet
from ood_lib.metrics import fid
from ood_lib.models import FrozenModel
from ood_lib.sampling import level_of

__all__ = ["denoising_gap", "feature_gap", "power_spectrum", "spectrum_gap"]


def feature_gap(known: torch.Tensor, unseen: torch.Tensor) -> float:
    """Frechet distance of two sets of images in the features of an ImageNet network.

    Parameters
    ----------
    known, unseen : Tensor of shape (n, C, H, W)
        Images in [-1, 1]. The distance falls with n: compare only sets of equal size.

    Returns
    -------
    float
        Not negative up to rounding; `ood_lib.metrics.fid` of `ood_lib.features.imagenet`.

    Examples
    --------
    >>> images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> abs(feature_gap(images, images)) < 1e-3
    True
    """
    return fid(imagenet(known), imagenet(unseen))


def power_spectrum(images: torch.Tensor) -> np.ndarray:
    """Mean power of images about their mean, by spatial frequency.

    Parameters
    ----------
    images : Tensor of shape (n, C, side, side)
        Two or more square images.

    Returns
    -------
    ndarray of shape (side // 2,)
        Power at 1, 2, ... periods a side, averaged over images, channels and directions. White noise of
        variance 1 has 1 everywhere.

    Examples
    --------
    >>> noise = torch.randn(500, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> bool((np.abs(power_spectrum(noise) - 1) < 0.05).all())
    True
    """
    side = images.shape[-1]
    waves = torch.fft.fft2(images.double() - images.double().mean(0), norm="ortho")
    # the mean takes away one of n degrees of freedom
    power = waves.abs().square().sum(0).mean(0).numpy() / (len(images) - 1)
    steps = np.fft.fftfreq(side, 1 / side)
    ring = np.hypot(steps[:, None], steps).round().astype(int)
    return np.array([power[ring == k].mean() for k in range(1, side // 2 + 1)])


def spectrum_gap(known: torch.Tensor, unseen: torch.Tensor) -> float:
    r"""Root mean square of the log ratio of two power spectra.

    Parameters
    ----------
    known, unseen : Tensor of shape (n, C, side, side)
        Images of the same side.

    Returns
    -------
    float
        0 for equal spectra, log 2 where one has twice the power of the other everywhere.

    Notes
    -----
    For a model that knows a Gaussian of covariance C, latents of images of covariance C' have the covariance
    :math:`C^{-1/2} C' C^{-1/2}` in the limit (chapter 01). Where both are stationary this is the ratio of the
    spectra, and 1 at every frequency where the unseen domain looks like the known one.

    Examples
    --------
    >>> images = torch.randn(9, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> float(round(spectrum_gap(images, 2 * images) / np.log(4), 6))
    1.0
    """
    ratio = np.log(power_spectrum(unseen) / power_spectrum(known))
    return float(np.sqrt(np.square(ratio).mean()))


def denoising_gap(
    model: FrozenModel,
    known: torch.Tensor,
    unseen: torch.Tensor,
    *,
    sigma: float,
    generator: torch.Generator,
) -> float:
    """Log ratio of the network's mean squared errors on noisy unseen and known images.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    known, unseen : Tensor of shape (n, C, H, W)
        As many images of each, as the model takes them; both get the same noise.
    sigma : float
        Noise over signal.
    generator : torch.Generator
        Source of the noise.

    Returns
    -------
    float
        0 where the network removes noise from both equally well.

    Raises
    ------
    ValueError
        If the two have different shapes, or the schedule has no such level.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> zero, images = zero_model(load_model("ddpm-fashion-32")), torch.zeros(2, 1, 32, 32)
    >>> denoising_gap(zero, images, images, sigma=0.1, generator=torch.Generator().manual_seed(0))
    0.0
    """
    if known.shape != unseen.shape:
        raise ValueError(
            f"known images have shape {tuple(known.shape)}, unseen ones {tuple(unseen.shape)}; give as "
            "many of each"
        )
    t = level_of(model, sigma)
    signal = float(model.schedule.alpha_bar_at(t))
    noise = torch.randn(known.shape, generator=generator)

    def error(images: torch.Tensor) -> float:
        noisy = signal**0.5 * images + (1 - signal) ** 0.5 * noise
        return float((model.eps(noisy, t) - noise).double().square().mean())

    return float(np.log(error(unseen) / error(known)))
