"""The best local denoiser of a few pictures, and the flow that it drives: new pictures from patches of old.

A denoiser that sees the whole picture and knows a finite set has one law to offer, the set itself: its flow
hands back copies. One that sees a window about each pixel only must choose anew in every place, and choices
of neighbouring windows have to agree where they overlap; so its flow ends at mosaics, each part of which is
near to a part of some picture. The wider the window, the nearer to a copy.

Nothing is trained and no network is called. "Pictures" are arrays (n, C, H, W): images, or latents of any
level.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

__all__ = ["flow", "local_mean", "window_side"]

NARROWEST = 3  # pixels
NARROW_AT, WIDE_AT = 0.4, 6.0  # noise over the spread of the pictures where windows stop to change
FIRST, LAST = 20.0, 0.04  # noise over spread, first and last of the flow
LONG = 512  # pixels; sides up to here are summed by a matrix of side x side, which is quicker
AT_ONCE = 2**18  # numbers in a block of draws x pictures x pixels; more leave the cache


def window_side(noise: float, *, side: int, window: float) -> int:
    """Side of the window at a noise level.

    Parameters
    ----------
    noise : float
        Standard deviation of the noise over that of the pictures.
    side : int
        Longer side of the pictures, in pixels.
    window : float
        Widest window as a share of `side`.

    Returns
    -------
    int
        Odd; `window` times `side` from 6 times the spread on, 3 pixels below 0.4 times, geometric between.

    Examples
    --------
    >>> [window_side(x, side=32, window=0.6) for x in (0.1, 1.5, 20.0)]
    [3, 7, 19]
    """
    widest = max(window * side, NARROWEST)
    place = np.log(noise / NARROW_AT) / np.log(WIDE_AT / NARROW_AT)
    wanted = NARROWEST * (widest / NARROWEST) ** np.clip(place, 0, 1)
    return 2 * int(wanted / 2) + 1


@lru_cache(maxsize=32)  # a flow asks for the same few for every block of draws
def _band(length: int, width: int) -> torch.Tensor:
    """Matrix (length, length) that sums over windows of an odd width."""
    place = torch.arange(length)
    return ((place[:, None] - place).abs() <= width // 2).float()


def _running(values: torch.Tensor, width: int, axis: int) -> torch.Tensor:
    """Sum over windows of an odd width along an axis, without a matrix."""
    length, half = values.shape[axis], width // 2
    # float64: the sum of a window is a small difference of sums from the start
    until = values.cumsum(axis, dtype=torch.float64)
    ends = (torch.arange(length) + half).clamp(max=length - 1)
    sums = until.index_select(axis, ends)
    kept = max(length - half - 1, 0)
    sums.narrow(axis, length - kept, kept).sub_(until.narrow(axis, 0, kept))
    return sums.float()


def _window_sums(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sum over the square window about each pixel (..., H, W), as far as the picture goes."""
    down, across = values.shape[-2:]
    if max(down, across) > LONG:
        return _running(_running(values, width, -1), width, -2)
    return _band(down, width) @ (values @ _band(across, width))


def local_mean(
    noisy: torch.Tensor,
    pictures: torch.Tensor,
    *,
    noise: float,
    width: int,
    shown: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Mean of the pictures at each pixel, given the window about it of a noisy one.

    Parameters
    ----------
    noisy : Tensor of shape (n, C, H, W)
        A picture plus white noise each, float32.
    pictures : Tensor of shape (m, C, H, W)
        The known pictures, float32.
    noise : float
        Standard deviation of the noise.
    width : int
        Side of the window in pixels, odd; it ends at the border of the picture.
    shown : Tensor of shape (m, C, H, W), optional
        What the mean is taken of, one for each picture; the pictures themselves by default.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        At each pixel a mean of what is shown there, with weights that sum to 1.

    Notes
    -----
    With :math:`x_{W(p)}` the window about pixel p, the weights are
    :math:`w_i(p) \propto \exp(-|x_{W(p)} - z_{i, W(p)}|^2 / 2 \sigma^2)`: the posterior mean of a denoiser
    that sees no more than the window and knows its place, the local score machine of Kamb and Ganguli,
    arXiv:2412.20292. With a window that covers everything it is the exact denoiser of the set.

    Examples
    --------
    >>> known = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    >>> local_mean(known, known, noise=0.1, width=3)[:, 0, 0, 0]
    tensor([0., 1.])
    """
    halves, shown = pictures.square().sum(1) / 2, pictures if shown is None else shown
    out = torch.empty_like(noisy)
    step = max(1, AT_ONCE // halves.numel())
    for first in range(0, len(noisy), step):
        here = noisy[first : first + step, None]
        # |x|^2 is the same for all pictures, so it leaves the weights as they are
        scores = (here * pictures).sum(2) - halves
        weights = _window_sums(scores, width).div_(noise**2).softmax(dim=1)
        out[first : first + step] = (weights[:, :, None] * shown).sum(1)
    return out


def flow(
    pictures: torch.Tensor,
    start: torch.Tensor,
    *,
    spread: float,
    window: float,
    steps: int,
    shown: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Walk from noise to mosaics of the pictures.

    Parameters
    ----------
    pictures : Tensor of shape (m, C, H, W)
        The known pictures.
    start : Tensor of shape (n, C, H, W)
        White noise of variance 1.
    spread : float
        Standard deviation of the pictures about their mean.
    window : float
        Widest window as a share of the longer side.
    steps : int
        Heun steps, even in the log of the noise from 20 times the spread to 0.04 times.
    shown : Tensor of shape (m, C, H, W), optional
        One for each picture, such as its latent: the mosaic shows these in the places of the pictures.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        float32; at each pixel within the range of what is shown.

    Notes
    -----
    Solves :math:`dx / d\sigma = (x - D(x, \sigma)) / \sigma` (Karras et al., arXiv:2206.00364, eq. 1) with
    `local_mean` for D, and ends with D.

    Examples
    --------
    >>> known = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    >>> noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> made = flow(known, noise, spread=0.7, window=1.0, steps=8)
    >>> bool((made.min() >= 0) & (made.max() <= 1))
    True
    """
    # about the mean, float32 keeps more digits of the scores
    centre = pictures.mean(0)
    known, side = (pictures - centre).float().contiguous(), max(pictures.shape[2:])

    def denoised(
        state: torch.Tensor, noise: float, shown: torch.Tensor | None = None
    ) -> torch.Tensor:
        width = window_side(noise, side=side, window=window)
        return local_mean(state, known, noise=noise * spread, width=width, shown=shown)

    levels = np.geomspace(FIRST, LAST, steps + 1)
    state = levels[0] * spread * start.float()
    for noise, lower in pairwise(levels):
        slope = (state - denoised(state, noise)) / noise
        ahead = state + (lower - noise) * slope
        state = state + (lower - noise) / 2 * (slope + (ahead - denoised(ahead, lower)) / lower)
    return denoised(state, levels[-1], (pictures if shown is None else shown).float())
