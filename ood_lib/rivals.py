"""Frozen, reference-guided samplers that invert nothing: SDEdit, ILVR and additive guidance.

Each turns reference images and a frozen model into new images, at a stated number of network calls. An
image is the state at timestep 0, as in `inversion`, so a reference that gets no noise comes back as it
was. All take one reference an image, in turn; `GuidedSamples.sources` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from ood_lib.inversion import Generators, check_images, generate, noise_like
from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule, graded_log_sigma
from ood_lib.solvers import NetworkCalls

__all__ = ["GuidedSamples", "crdi_like", "ilvr", "low_pass", "sdedit"]


@dataclass(frozen=True)
class GuidedSamples:
    """Images made from references by a frozen model.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        State at timestep 0, float64; not clipped.
    nfe : float
        Network calls an image; calls for a reference are shared among the n images.
    sources : ndarray of shape (n,)
        Row of the reference that guided each image.
    timesteps : ndarray of shape (m,)
        The grid, increasing; it was walked from its end.
    eta : float
        Share of stochasticity of the steps.

    Examples
    --------
    >>> GuidedSamples(torch.zeros(1, 1, 8, 8), 24, np.array([0]), np.array([0.0, 500.0]), 0.0).nfe
    24
    """

    images: torch.Tensor
    nfe: float
    sources: np.ndarray
    timesteps: np.ndarray
    eta: float


def _sources(references: torch.Tensor, n: int | None) -> np.ndarray:
    """Rows of the references in turn, each as often as the others to one image."""
    count = len(references)
    n = count if n is None else n
    if count == 0 or n < 1:
        raise ValueError(f"n = {n} images from {count} references; give one or more of each")
    return np.arange(n) % count


def _noised(
    schedule: NoiseSchedule, images: torch.Tensor, t: float, generator: Generators | None
) -> torch.Tensor:
    """Carry states from timestep 0 to `t` by adding noise."""
    share = float(schedule.alpha_bar_at(t) / schedule.alpha_bar_at(0))
    noise = noise_like(images, generator, "noising a reference")
    return np.sqrt(share) * images + np.sqrt(1 - share) * noise


def sdedit(
    model: FrozenModel,
    references: torch.Tensor,
    *,
    t: float,
    generator: Generators,
    n: int | None = None,
    eta: float = 0.0,
    points: int = 25,
    batch_size: int = 64,
) -> GuidedSamples:
    """Add noise to references up to a level, then denoise them.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    references : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    t : float
        Level of the noise, in [0, T - 1]: 0 gives the references back, T - 1 nearly the model's own
        samples.
    generator : torch.Generator or a list with one an image
        Source of all noise.
    n : int, optional
        Number of images; one a reference by default.
    eta : float, default 0.0
        Share of stochasticity in [0, 1]. At 0 the way down is that of the preset "converged", ``ab2``;
        above 0 it takes DDIM steps, at 1 those of DDPM.
    points : int, default 25
        Points of the grid from 0 to `t`.
    batch_size : int, default 64
        Images a network call.

    Returns
    -------
    GuidedSamples
        ``points - 1`` calls an image, or none at t = 0.

    Raises
    ------
    ValueError
        If shapes, ranges or counts are wrong.

    Notes
    -----
    Meng et al., SDEdit, ICLR 2022, arXiv:2108.01073, algorithm 1 without a mask, for the variance
    preserving process. In a Gaussian model a direction of variance lambda keeps the part
    ``((lambda + sigma_0^2) / (lambda + sigma_t^2))^((1 + eta^2) / 2)`` of the reference's deviation
    from the model's mean, in the limit of many steps.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> noise = torch.Generator().manual_seed(0)
    >>> made = sdedit(model, torch.zeros(2, 1, 32, 32), t=500, n=3, generator=noise)
    >>> made.images.shape, made.nfe, made.sources.tolist()
    (torch.Size([3, 1, 32, 32]), 24, [0, 1, 0])
    """
    x0 = check_images(model, references)
    sources = _sources(x0, n)
    x = _noised(model.schedule, x0[sources], t, generator)
    if t == 0:
        return GuidedSamples(x, 0, sources, np.zeros(1), eta)
    grid = graded_log_sigma(model.schedule, points, t_end=t)
    made = generate(
        model,
        x,
        solver="ab2" if eta == 0 else "ddim",
        timesteps=grid,
        eta=eta,
        generator=generator,
        batch_size=batch_size,
    )
    return GuidedSamples(made.images, made.nfe, sources, grid, eta)


def low_pass(images: torch.Tensor, *, factor: int) -> torch.Tensor:
    """Shrink images by a factor and enlarge them again, both with a bicubic filter.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        The images.
    factor : int
        1 or more, a divisor of H and W; 1 changes nothing.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        What is left of the images: a linear map of them. It is a projection for smooth images only;
        a second pass changes what a first one left of white noise by a quarter.

    Raises
    ------
    ValueError
        If `factor` does not divide the sides.

    Notes
    -----
    The filter phi_N of Choi et al., ILVR, ICCV 2021, arXiv:2108.02938, sec. 3.2.

    Examples
    --------
    >>> low_pass(torch.ones(1, 1, 8, 8), factor=4).sub(1).abs().max().item() < 1e-6
    True
    """
    sides = tuple(images.shape[-2:])
    if factor < 1 or any(side % factor for side in sides):
        raise ValueError(f"factor is {factor}; give a divisor of the sides {sides}")
    if factor == 1:
        return images.clone()
    small = F.interpolate(
        images, [side // factor for side in sides], mode="bicubic", antialias=True
    )
    return F.interpolate(small, sides, mode="bicubic", antialias=True)


def ilvr(
    model: FrozenModel,
    references: torch.Tensor,
    *,
    factor: int,
    generator: Generators,
    t_stop: float = 0.0,
    n: int | None = None,
    eta: float = 1.0,
    points: int = 100,
    batch_size: int = 64,
) -> GuidedSamples:
    """Sample the model while each step takes over the coarse content of a noised reference.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    references : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    factor : int
        What is coarse: `low_pass` keeps 1 / factor^2 of the numbers. 1 gives the references back.
    generator : torch.Generator or a list with one an image
        Source of all noise.
    t_stop : float, default 0
        Levels below it run free. At 0 the images end with the coarse content of their references.
    n : int, optional
        Number of images; one a reference by default.
    eta : float, default 1.0
        Share of stochasticity of the DDIM steps in [0, 1]; 1 is the DDPM of the paper.
    points : int, default 100
        Points of the grid; the paper takes 1,001 or fewer.
    batch_size : int, default 64
        Images a network call.

    Returns
    -------
    GuidedSamples
        ``points - 1`` calls an image.

    Raises
    ------
    ValueError
        If shapes, ranges or counts are wrong.

    Notes
    -----
    Choi et al., ILVR, ICCV 2021, arXiv:2108.02938, algorithm 1: after each step
    ``x <- x + phi(y - x)`` with the reference y noised to the level that was reached, by fresh noise
    each time.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> noise = torch.Generator().manual_seed(0)
    >>> flat = torch.full((1, 1, 32, 32), 0.5)
    >>> made = ilvr(load_model("ddpm-fashion-32"), flat, factor=4, generator=noise, points=10)
    >>> made.nfe, abs(made.images.mean().item() - 0.5) < 0.05
    (9, True)
    """
    x0 = check_images(model, references)
    sources = _sources(x0, n)
    low_pass(x0[:1], factor=factor)  # a wrong factor shows before the first network call
    guides = x0[sources]
    grid = graded_log_sigma(model.schedule, points)
    x = noise_like(guides, generator, "the first state")
    for here, there in pairwise(grid[::-1]):
        step = np.array([there, here])
        x = generate(
            model,
            x,
            solver="ddim",
            timesteps=step,
            eta=eta,
            generator=generator,
            batch_size=batch_size,
        ).images
        if there >= t_stop:
            target = _noised(model.schedule, guides, there, generator)
            x = x + low_pass(target - x, factor=factor)
    return GuidedSamples(x, points - 1, sources, grid, eta)


def crdi_like(
    model: FrozenModel,
    references: torch.Tensor,
    *,
    generator: torch.Generator,
    strength: float = 1.0,
    t_stop: float = 0.0,
    pairs: int = 2,
    n: int | None = None,
    points: int = 25,
    batch_size: int = 64,
) -> GuidedSamples:
    """Sample the model with the guidance added at each level that explains a reference best.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    references : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    generator : torch.Generator
        Source of all noise.
    strength : float, default 1.0
        Factor of the guidance; 0 gives the model's own samples.
    t_stop : float, default 0
        Levels below it run free.
    pairs : int, default 2
        Pairs of opposite noises from which the guidance of a reference is estimated at each level.
    n : int, optional
        Number of images; one a reference by default.
    points : int, default 25
        Points of the grid.
    batch_size : int, default 64
        Images a network call.

    Returns
    -------
    GuidedSamples
        ``nfe`` counts the calls for the guidance, ``2 pairs`` a guided level and reference.

    Raises
    ------
    ValueError
        If shapes, ranges or counts are wrong.

    Notes
    -----
    After Cao and Gong, CRDI, ECCV 2024, arXiv:2407.07249, who find an embedding an image by gradient
    descent and perturb it with annealed noise. Here the embedding is added to eps level by level. It is
    then a least squares problem, ``min_h E |z - eps(x_t) - h|^2`` over the noise z of a reference, whose
    solution is ``h = -E eps(x_t)``, and no gradient is needed. Variety comes from the first state, from
    `strength` below 1 and from `t_stop`; the annealed noise is left out. In a Gaussian model N(m, C)
    the images have the law ``N(m + strength (y - m), C)``.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> noise = torch.Generator().manual_seed(0)
    >>> crdi_like(model, torch.zeros(2, 1, 32, 32), n=8, generator=noise).nfe  # 24 + 24 * 4 * 2 / 8
    48.0
    """
    x0 = check_images(model, references)
    sources = _sources(x0, n)
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; use 1 or more")
    used = x0[: len(set(sources))]
    grid = graded_log_sigma(model.schedule, points)
    x = noise_like(x0[sources], generator, "the first state")
    calls = NetworkCalls(model, batch_size)
    for here, there in pairwise(grid[::-1]):
        step = np.array([there, here])
        x = generate(model, x, solver="ddim", timesteps=step, batch_size=batch_size).images
        if here >= t_stop:
            guidance = strength * _guidance(calls, used, here, pairs, generator)
            gap = np.diff(model.schedule.sigma(step[::-1])).item()
            x = x + np.sqrt(model.schedule.alpha_bar_at(there)) * gap * guidance[sources]
    nfe = points - 1 + calls.nfe * len(used) / len(x)
    return GuidedSamples(x, nfe, sources, grid, 0.0)


def _guidance(
    calls: NetworkCalls, references: torch.Tensor, t: float, pairs: int, generator: torch.Generator
) -> torch.Tensor:
    """Estimate ``-E eps`` over noised references; opposite noises cancel where eps is affine."""
    schedule = calls.model.schedule
    signal = float(np.sqrt(schedule.alpha_bar_at(0)))
    spread = float(np.sqrt(schedule.sigma(t) ** 2 - schedule.sigma(0) ** 2))
    total = torch.zeros_like(references)
    for _ in range(pairs):
        noise = spread * noise_like(references, generator, "the guidance")
        total -= calls(references / signal + noise, t) + calls(references / signal - noise, t)
    return total / (2 * pairs)
