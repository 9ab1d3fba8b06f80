"""How the contenders of ``benchmarks/inversion.py`` carry images to latents and back.

All but ours call the network as diffusers does: plain PyTorch, float32. What each does differently:

- diffusers' ``DDIMInverseScheduler`` begins at sigma = 0: its first step leads to level 0, and that
  state is its start here. It hands the state of one level to the network under the timestep of the
  next, and ends at level (n - 1) * (1000 // n), 950 for 20 steps and 999 for 1000.
- The paper's loop takes the image as the state of level 0, evaluates the network at the level where
  the state is, and ends at level 900. Its way back ends at sigma = 0, with one more call.
- azula walks its samplers from time 0 to time 1. Its grids are even in its time, so the choice of what
  time means is a choice of grid: the level, as in diffusers, or the logarithm of sigma, as in its
  ``VESchedule``.
- O-BELM needs two states to walk on. The first step is one of Euler, as in its paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from ood_lib.inversion import generate, invert
from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule, paper_grid, uniform_log_sigma, uniform_t

Config = dict[str, Any]  # of a scheduler, as saved with the model


def azula_version() -> str | None:
    """Version of azula, or nothing where it cannot be imported."""
    try:
        import azula
    except ImportError:
        return None
    return azula.__version__


class Network:
    """A noise predictor as the contenders call it, with a count of the images that it has seen.

    Parameters
    ----------
    eps : callable
        ``(x_t, t) -> eps``, in the dtype of ``x_t``.
    schedule : NoiseSchedule
        The levels of the model.
    """

    def __init__(self, eps: Callable[[Tensor, Any], Tensor], schedule: NoiseSchedule) -> None:
        self.eps, self.schedule, self.seen = eps, schedule, 0

    def __call__(self, x_t: Tensor, t: Any) -> Tensor:
        """Predict the noise in `x_t`, told to be of timestep `t`."""
        self.seen += len(x_t)
        return self.eps(x_t, t)

    def scales(self, grid: np.ndarray) -> tuple[list[float], list[float]]:
        """Square root of alpha_bar, and sigma, at the points of a grid."""
        signal = np.sqrt(self.schedule.alpha_bar_at(grid))
        return signal.tolist(), self.schedule.sigma(grid).tolist()


def plain_module(model: FrozenModel) -> torch.nn.Module:
    """Copy a model's network as diffusers loads it: float32, default memory layout."""
    return copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)


def plain_network(model: FrozenModel) -> Network:
    """Give a model's network as diffusers calls it."""
    network, channels = plain_module(model), model.sample_shape[0]

    def eps(x_t: Tensor, t: Any) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor(float(t))  # diffusers cuts the fraction off any other number
        with torch.no_grad():
            return network(x_t.float(), t).sample[:, :channels].to(x_t.dtype)

    return Network(eps, model.schedule)


@dataclass(frozen=True)
class Latent:
    """Where a contender arrived.

    Parameters
    ----------
    value : Tensor of shape (N, C, H, W)
        State at level `t_end`.
    t_end : float
        Level.
    calls : float
        Network calls an image.
    start : Tensor of shape (N, C, H, W), optional
        Its state at level 0; the image itself by default.
    companion : Tensor of shape (N, C, H, W), optional
        What its way back needs beside the latent.
    grid : ndarray, optional
        Timesteps that it chose by itself.
    """

    value: Tensor
    t_end: float
    calls: float
    start: Tensor | None = None
    companion: Tensor | None = None
    grid: np.ndarray | None = None


# ours


def with_points(model: FrozenModel, options: dict[str, Any], n: int) -> dict[str, Any]:
    """Ask for `n` points: of a preset's own grid, or for a solver even in log sigma; 0 asks nothing."""
    if not n:
        return options
    if "solver" in options:
        return options | {"timesteps": uniform_log_sigma(model.schedule, n)}
    return options | {"points": n}


def ours(model: FrozenModel, options: dict[str, Any], images: Tensor, n: int) -> Latent:
    """Invert with our library, by a preset or a solver."""
    made = invert(model, images, **with_points(model, options, n))
    t_end = float(made.timesteps[-1])
    return Latent(made.latent, t_end, made.nfe, companion=made.companion, grid=made.timesteps)


def ours_back(model: FrozenModel, options: dict[str, Any], latent: Latent, n: int) -> Tensor:
    """Generate with our library, on the grid of the way there."""
    options = with_points(model, options, n) | {"companion": latent.companion}
    return generate(model, latent.value, **options).images


# diffusers


def inverse_scheduler(net: Network, scheduler: Any, x: Tensor, n: int, t_end: float) -> Latent:
    """Run the documented loop of an inverse scheduler; `t_end` is the level after its last step."""
    scheduler.set_timesteps(n)
    seen, states = net.seen, []
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
        states.append(x)
    start = states[0] if isinstance(scheduler, DDIMInverseScheduler) else None
    return Latent(x, t_end, (net.seen - seen) / len(x), start=start)


def forward_scheduler(net: Network, scheduler: Any, latent: Latent, n: int) -> Tensor:
    """Run the documented loop of a sampling scheduler."""
    scheduler.set_timesteps(n)
    x = latent.value
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    return x


def ddim_inverse(net: Network, config: Config, clip: bool, images: Tensor, n: int) -> Latent:
    """Invert with ``DDIMInverseScheduler``, its defaults otherwise."""
    scheduler = DDIMInverseScheduler.from_config(config, clip_sample=clip)
    levels = scheduler.config.num_train_timesteps
    return inverse_scheduler(net, scheduler, images, n, float((n - 1) * (levels // n)))


def ddim_forward(net: Network, config: Config, clip: bool, latent: Latent, n: int) -> Tensor:
    """Sample with ``DDIMScheduler``, its defaults otherwise."""
    scheduler = DDIMScheduler.from_config(config, clip_sample=clip)
    return forward_scheduler(net, scheduler, latent, n)


def dpm_inverse(net: Network, config: Config, images: Tensor, n: int) -> Latent:
    """Invert with ``DPMSolverMultistepInverseScheduler`` and its default spacing."""
    scheduler = DPMSolverMultistepInverseScheduler.from_config(config, timestep_spacing="linspace")
    t_end = float(scheduler.config.num_train_timesteps - 1)
    return inverse_scheduler(net, scheduler, images, n, t_end)


def dpm_forward(net: Network, config: Config, latent: Latent, n: int) -> Tensor:
    """Sample with ``DPMSolverMultistepScheduler`` down to level 0, where its inverse begins."""
    scheduler = DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    return forward_scheduler(net, scheduler, latent, n)


# the paper


def ddim_step(net: Network, x: Tensor, t: float, here: float, there: float) -> Tensor:
    """Step between two values of alpha_bar with eps at the first, as the paper's code writes it."""
    eps = net(x, t)
    x0_hat = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
    return math.sqrt(there) * x0_hat + math.sqrt(1 - there) * eps


def paper_there(net: Network, batch: int | None, images: Tensor, n: int, t0: int = 900) -> Latent:
    """Invert with the released loop, `batch` images at a time."""
    grid, done, seen = paper_grid(t0, n), [], net.seen
    alpha_bar = net.schedule.alpha_bar_at(grid).tolist()
    for x in images.split(batch or len(images)):
        for k in range(n - 1):
            x = ddim_step(net, x, int(grid[k]), *alpha_bar[k : k + 2])
        done.append(x)
    return Latent(torch.cat(done), float(t0), (net.seen - seen) / len(images))


def paper_back(net: Network, latent: Latent, n: int) -> Tensor:
    """Sample with the released loop; the last step leads to sigma = 0."""
    grid, x = paper_grid(int(latent.t_end), n)[::-1], latent.value
    alpha_bar = [*net.schedule.alpha_bar_at(grid).tolist(), 1.0]
    for k in range(n):
        x = ddim_step(net, x, int(grid[k]), *alpha_bar[k : k + 2])
    return x


# azula


class AzulaDenoiser:
    """A network as azula's samplers see a denoiser: a schedule over [0, 1] and a posterior mean.

    Parameters
    ----------
    net : Network
        Predicts the noise.
    log_sigma : bool
        Time is even in the logarithm of sigma; else in the level.
    """

    def __init__(self, net: Network, log_sigma: bool) -> None:
        self.net, self.log_sigma = net, log_sigma
        self.last = net.schedule.num_train_timesteps - 1

    def level(self, time: Tensor) -> np.ndarray:
        """Timesteps of the model at azula's time."""
        schedule, share = self.net.schedule, time.double().numpy().clip(0, 1)
        if not self.log_sigma:
            return self.last * share
        low, high = schedule.log_sigma([0, self.last])
        return schedule.t_of_log_sigma(low + share * (high - low))

    def schedule(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of signal and noise at azula's time."""
        alpha_bar = torch.as_tensor(self.net.schedule.alpha_bar_at(self.level(time)))
        return alpha_bar.sqrt().to(time), (1 - alpha_bar).sqrt().to(time)

    def __call__(self, x_t: Tensor, time: Tensor) -> SimpleNamespace:
        """Give the posterior of the clean image."""
        alpha, sigma = self.schedule(time)
        eps = self.net(x_t, float(self.level(time)))
        return SimpleNamespace(mean=(x_t - sigma * eps) / alpha)


def azula_sampler(
    net: Network, kind: str, log_sigma: bool, steps: int, ends: tuple[float, float], **options: int
) -> Any:
    """Make one of azula's samplers, to walk from the first to the second of two times."""
    import azula.sample

    start, stop = ends
    return getattr(azula.sample, f"{kind}Sampler")(
        AzulaDenoiser(net, log_sigma), start=start, stop=stop, steps=steps, silent=True, **options
    )


def azula_there(
    net: Network, kind: str, log_sigma: bool, images: Tensor, n: int, **options: int
) -> Latent:
    """Invert with a sampler of azula that is run backwards."""
    seen, sampler = net.seen, azula_sampler(net, kind, log_sigma, n, (0.0, 1.0), **options)
    x = sampler(images)
    last = net.schedule.num_train_timesteps - 1
    return Latent(x, float(last), (net.seen - seen) / len(images))


def azula_back(
    net: Network, kind: str, log_sigma: bool, latent: Latent, n: int, **options: int
) -> Tensor:
    """Sample with azula."""
    return azula_sampler(net, kind, log_sigma, n, (1.0, 0.0), **options)(latent.value)


# O-BELM


def two_step(net: Network, before: Tensor, here: Tensor, grid: np.ndarray) -> tuple[Tensor, Tensor]:
    """Carry the states of ``grid[0]`` and ``grid[1]``, over sqrt(alpha_bar), to the last two points.

    Wang et al., arXiv:2410.07273; the same formula serves both directions.
    """
    signal, sigma = net.scales(grid)
    for k in range(1, len(grid) - 1):
        last, gap = sigma[k] - sigma[k - 1], sigma[k + 1] - sigma[k]
        share = (gap / last) ** 2
        eps = net(here * signal[k], float(grid[k]))
        slope = gap * (1 + gap / last) * eps
        before, here = here, share * before + (1 - share) * here + slope
    return before, here


def belm_grid(schedule: NoiseSchedule, log_sigma: bool, n: int) -> np.ndarray:
    """Make the grid: `n` points even in log sigma, or in the level as in its code."""
    return (uniform_log_sigma if log_sigma else uniform_t)(schedule, n)


def belm_there(net: Network, log_sigma: bool, images: Tensor, n: int) -> Latent:
    """Invert with O-BELM."""
    grid, seen = belm_grid(net.schedule, log_sigma, n), net.seen
    signal, sigma = net.scales(grid)
    first = images.double() / signal[0]
    second = first + (sigma[1] - sigma[0]) * net(images.double(), float(grid[0]))
    before, last = two_step(net, first, second, grid)
    calls = (net.seen - seen) / len(images)
    return Latent(last * signal[-1], float(grid[-1]), calls, companion=before)


def belm_back(net: Network, log_sigma: bool, latent: Latent, n: int) -> Tensor:
    """Undo `belm_there` exactly."""
    grid = belm_grid(net.schedule, log_sigma, n)[::-1]
    signal, _ = net.scales(grid)
    _, first = two_step(net, latent.value / signal[0], latent.companion, grid)
    return first * signal[-1]


# the reference


class Reference:
    """Heun's path from a state at level 0, fine enough to judge the others: float64 state.

    Parameters
    ----------
    net : Network
        The plain network.
    start : Tensor of shape (N, C, H, W)
        States at level 0.
    points : int
        Points even in log sigma up to the last level.
    """

    def __init__(self, net: Network, start: Tensor, points: int) -> None:
        self.net, self.start = net, start.double()
        self.grid = uniform_log_sigma(net.schedule, points, t_end=len(net.schedule.alpha_bar) - 1)
        signal, _ = net.scales(self.grid)
        self.path = [self.start / signal[0]]
        for here, there in pairwise(self.grid.tolist()):
            self.path.append(self._step(self.path[-1], here, there))

    def _step(self, xbar: Tensor, here: float, there: float) -> Tensor:
        signal, sigma = self.net.scales(np.array([here, there]))
        gap = sigma[1] - sigma[0]
        first = self.net(xbar * signal[0], here)
        second = self.net((xbar + gap * first) * signal[1], there)
        return xbar + gap / 2 * (first + second)

    def at(self, t: float) -> Tensor:
        """State at level `t`: the last point below it, and one Heun step that is not longer."""
        k = int(np.searchsorted(self.grid, t, side="right")) - 1
        xbar = self.path[k]
        if t > self.grid[k]:
            xbar = self._step(xbar, float(self.grid[k]), t)
        return xbar * math.sqrt(self.net.schedule.alpha_bar_at(t))
