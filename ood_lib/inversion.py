"""Walk the deterministic path of a frozen model: images to latents, latents to images.

In the variables ``xbar = x_t / sqrt(alpha_bar_t)`` and ``sigma_t`` the path is
``d xbar / d sigma = eps(x_t, t)``. A DDIM step is its Euler step, so one function walks both ways and
only the order of the timesteps tells inversion from generation. There is no clipping: a clipped step
has no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule, uniform_log_sigma

__all__ = [
    "SOLVERS",
    "STARTS",
    "Generation",
    "Inversion",
    "RoundTrip",
    "generate",
    "invert",
    "roundtrip",
]

SOLVERS = ("ddim", "heun", "ab2")
STARTS = ("level0", "sigma0", "noise")
DEFAULT_POINTS = 24


@dataclass(frozen=True)
class Inversion:
    """Latents of images, and how they were made.

    Parameters
    ----------
    latent : Tensor of shape (N, C, H, W)
        State at the last timestep.
    nfe : int
        Network calls an image.
    timesteps : ndarray of shape (n,)
        The grid, increasing.
    solver : str
        One of `SOLVERS`.
    start : str
        One of `STARTS`.
    """

    latent: torch.Tensor
    nfe: int
    timesteps: np.ndarray
    solver: str
    start: str


@dataclass(frozen=True)
class Generation:
    """Images made from latents, and how.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        State at the first timestep; not clipped.
    nfe : int
        Network calls an image.
    timesteps : ndarray of shape (n,)
        The grid, increasing; it was walked from its end.
    solver : str
        One of `SOLVERS`.
    eta : float
        Share of stochasticity, 0 for the deterministic path.
    """

    images: torch.Tensor
    nfe: int
    timesteps: np.ndarray
    solver: str
    eta: float


@dataclass(frozen=True)
class RoundTrip:
    """Images, their latents and what the latents give back.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        The reconstructions.
    latent : Tensor of shape (N, C, H, W)
        The latents.
    rmse : Tensor of shape (N,)
        Root mean square difference of image and reconstruction, in units of [-1, 1] pixels.
    nfe : int
        Network calls an image, both ways together.
    """

    images: torch.Tensor
    latent: torch.Tensor
    rmse: torch.Tensor
    nfe: int


class _Network:
    """Batched noise prediction in the variables (xbar, sigma), with a count of the calls."""

    def __init__(self, model: FrozenModel, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more")
        self.model, self.batch_size, self.nfe = model, batch_size, 0

    def __call__(self, xbar: torch.Tensor, t: float, *, level: float | None = None) -> torch.Tensor:
        """Predict the noise in the state of `level`, told to the network as level `t`."""
        self.nfe += 1
        level = t if level is None else level
        x_t = xbar * float(np.sqrt(self.model.schedule.alpha_bar_at(level)))
        return torch.cat([self.model.eps(batch, t) for batch in x_t.split(self.batch_size)])


def _ddim(eps: _Network, grid: np.ndarray, sigma: np.ndarray, target: bool) -> Callable:
    def step(xbar: torch.Tensor, k: int) -> torch.Tensor:
        noise = eps(xbar, grid[k + 1] if target else grid[k], level=grid[k])
        return xbar + (sigma[k + 1] - sigma[k]) * noise

    return step


def _heun(eps: _Network, grid: np.ndarray, sigma: np.ndarray) -> Callable:
    def step(xbar: torch.Tensor, k: int) -> torch.Tensor:
        gap = sigma[k + 1] - sigma[k]
        here = eps(xbar, grid[k])
        there = eps(xbar + gap * here, grid[k + 1])
        return xbar + 0.5 * gap * (here + there)

    return step


def _ab2(eps: _Network, grid: np.ndarray, sigma: np.ndarray) -> Callable:
    """Two-step scheme in log sigma: eps is extrapolated linearly there, the rest is exact."""
    before: dict[str, torch.Tensor] = {}
    log_sigma = np.log(sigma)

    def step(xbar: torch.Tensor, k: int) -> torch.Tensor:
        here, gap = eps(xbar, grid[k]), log_sigma[k + 1] - log_sigma[k]
        out = xbar + (sigma[k + 1] - sigma[k]) * here
        if k:
            slope = (here - before["eps"]) / (log_sigma[k] - log_sigma[k - 1])
            out = out + (sigma[k + 1] * (gap - 1) + sigma[k]) * slope
        before["eps"] = here
        return out

    return step


def _walk(
    eps: _Network, x: torch.Tensor, grid: np.ndarray, solver: str, eps_at: str, progress: bool
) -> torch.Tensor:
    """Carry the state `x` at ``grid[0]`` to ``grid[-1]``, in whichever direction the grid runs."""
    schedule = eps.model.schedule
    sigma = schedule.sigma(grid)
    step = {
        "ddim": lambda: _ddim(eps, grid, sigma, eps_at == "target"),
        "heun": lambda: _heun(eps, grid, sigma),
        "ab2": lambda: _ab2(eps, grid, sigma),
    }[solver]()
    xbar = x / float(np.sqrt(schedule.alpha_bar_at(grid[0])))
    for k in tqdm(range(len(grid) - 1), disable=not progress, desc=solver, unit="step"):
        xbar = step(xbar, k)
    return xbar * float(np.sqrt(schedule.alpha_bar_at(grid[-1])))


def _check_grid(schedule: NoiseSchedule, timesteps: np.ndarray | None) -> np.ndarray:
    if timesteps is None:
        return uniform_log_sigma(schedule, DEFAULT_POINTS)
    grid = np.asarray(timesteps, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"timesteps must be two or more, each larger than the one before; got {grid[:6]} ..."
        )
    schedule.log_sigma(grid)  # raises where a timestep lies outside [0, T - 1]
    return grid


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")


def _check_state(model: FrozenModel, x: torch.Tensor, what: str) -> torch.Tensor:
    model.check(x)
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or infinity; every number must be finite")
    return x.double()


def _start(
    eps: _Network, images: torch.Tensor, t: float, start: str, generator: torch.Generator | None
) -> torch.Tensor:
    """Place images on the path at timestep `t`."""
    schedule = eps.model.schedule
    signal, sigma = float(np.sqrt(schedule.alpha_bar_at(t))), float(schedule.sigma(t))
    if start == "level0":
        return images
    if start == "sigma0":
        return signal * (images + sigma * eps(images, t))
    if generator is None:
        raise ValueError(
            "start='noise' draws noise; pass generator=torch.Generator().manual_seed(...)"
        )
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return signal * (images + sigma * noise)


def invert(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    timesteps: np.ndarray | None = None,
    solver: str = "ab2",
    eps_at: str = "current",
    start: str = "level0",
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Inversion:
    """Carry images to latents along the deterministic path.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    images : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    timesteps : array of shape (n,), optional
        Strictly increasing, in [0, T - 1], fractional or not; the latent is the state at the last.
        24 points uniform in log sigma up to T - 1 by default.
    solver : {"ab2", "ddim", "heun"}, default "ab2"
        ``ddim`` is Euler in sigma (order 1, one call a step), ``heun`` its corrected form (order 2,
        two calls), ``ab2`` a two-step scheme in log sigma (order 2, one call).
    eps_at : {"current", "target"}, default "current"
        Level at which ``ddim`` evaluates the network: "current" is the paper's choice, "target"
        that of diffusers' inverse scheduler, which hands the state of the current level to the
        network under the timestep of the next.
    start : {"level0", "sigma0", "noise"}, default "level0"
        The image is the state at the first timestep (the paper); or is carried there from sigma = 0
        by one Euler step; or by adding noise of that level's size.
    generator : torch.Generator, optional
        Source of the noise of ``start="noise"``.
    batch_size : int, default 64
        Images a network call; it does not change the result beyond rounding.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    Inversion
        ``latent`` in float64, ``nfe``, ``timesteps``, ``solver``, ``start``.

    Raises
    ------
    ValueError
        If shapes, ranges, the grid or an option are wrong.

    Notes
    -----
    Song, Meng, Ermon, Denoising Diffusion Implicit Models, ICLR 2021, arXiv:2010.02502, eq. 13, read
    towards higher noise; ``ab2`` is the two-step multistep form of the exponential integrator of Lu et
    al., DPM-Solver, NeurIPS 2022, arXiv:2206.00927, sec. 3. The state is float64, the network runs in
    its own dtype.

    Examples
    --------
    >>> from ood_lib.analytic import GaussianLaw, analytic_model
    >>> law = GaussianLaw(torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double())
    >>> model = analytic_model(law, NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))))
    >>> invert(model, torch.full((1, 1, 1, 4), 0.5)).nfe
    23
    """
    for name, value, known in (("solver", solver, SOLVERS), ("start", start, STARTS)):
        _check_choice(name, value, known)
    _check_choice("eps_at", eps_at, ("current", "target"))
    if eps_at == "target" and solver != "ddim":
        raise ValueError(f"eps_at='target' belongs to solver='ddim'; {solver!r} has its own levels")
    grid = _check_grid(model.schedule, timesteps)
    x0 = _check_state(model, images, "images")
    if x0.numel() and x0.abs().max() > 1 + 1e-3:
        raise ValueError(f"images reach {x0.abs().max():.3g} in size; they must lie in [-1, 1]")
    eps = _Network(model, batch_size)
    x = _start(eps, x0, grid[0], start, generator)
    return Inversion(_walk(eps, x, grid, solver, eps_at, progress), eps.nfe, grid, solver, start)


def generate(
    model: FrozenModel,
    latent: torch.Tensor,
    *,
    timesteps: np.ndarray | None = None,
    solver: str = "ab2",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Generation:
    """Carry latents back to images.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    latent : Tensor of shape (N, C, H, W)
        States at the last timestep of the grid.
    timesteps : array of shape (n,), optional
        Strictly increasing; walked from its end to its start. As in `invert` by default.
    solver : {"ab2", "ddim", "heun"}, default "ab2"
        As in `invert`. DDIM evaluates the network where it stands.
    eta : float, default 0.0
        Share of stochasticity in [0, 1]; above 0 only with ``solver="ddim"``.
    generator : torch.Generator, optional
        Source of the noise when ``eta > 0``.
    batch_size : int, default 64
        Latents a network call.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    Generation
        ``images`` in float64, not clipped, ``nfe``, ``timesteps``, ``solver``, ``eta``.

    Raises
    ------
    ValueError
        If shapes, the grid or an option are wrong.

    Notes
    -----
    arXiv:2010.02502, eq. 12 and 16: eta = 0 is the deterministic path, eta = 1 the DDPM posterior.

    Examples
    --------
    >>> from ood_lib.analytic import GaussianLaw, analytic_model
    >>> law = GaussianLaw(torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double())
    >>> model = analytic_model(law, NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))))
    >>> generate(model, torch.ones(2, 1, 1, 4)).images.shape
    torch.Size([2, 1, 1, 4])
    """
    _check_choice("solver", solver, SOLVERS)
    grid = _check_grid(model.schedule, timesteps)
    x = _check_state(model, latent, "latents")
    eps = _Network(model, batch_size)
    if eta == 0:
        x = _walk(eps, x, grid[::-1], solver, "current", progress)
    else:
        _check_eta(eta, solver, generator)
        x = _walk_stochastic(eps, x, grid[::-1], eta, generator, progress)
    return Generation(x, eps.nfe, grid, solver, eta)


def _check_eta(eta: float, solver: str, generator: torch.Generator | None) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    if solver != "ddim":
        raise ValueError(f"eta > 0 needs solver='ddim', not {solver!r}")
    if generator is None:
        raise ValueError("eta > 0 draws noise; pass generator=torch.Generator().manual_seed(...)")


def _walk_stochastic(
    eps: _Network,
    x: torch.Tensor,
    grid: np.ndarray,
    eta: float,
    generator: torch.Generator,
    progress: bool,
) -> torch.Tensor:
    """Walk a decreasing grid with DDIM steps that add fresh noise (arXiv:2010.02502, eq. 16)."""
    alpha_bar = eps.model.schedule.alpha_bar_at(grid)
    for k in tqdm(range(len(grid) - 1), disable=not progress, desc=f"eta {eta:g}", unit="step"):
        here, there = alpha_bar[k], alpha_bar[k + 1]
        noise = eps(x / np.sqrt(here), grid[k])
        x0_hat = (x - np.sqrt(1 - here) * noise) / np.sqrt(here)
        fresh = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
        x = np.sqrt(there) * x0_hat + np.sqrt(1 - there - fresh**2) * noise
        x = x + fresh * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


def roundtrip(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    timesteps: np.ndarray | None = None,
    solver: str = "ab2",
    eps_at: str = "current",
    batch_size: int = 64,
    progress: bool = False,
) -> RoundTrip:
    """Invert images and generate from their latents on the same grid.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    images : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    timesteps, solver, eps_at, batch_size, progress
        As in `invert`.

    Returns
    -------
    RoundTrip
        ``images``, ``latent``, ``rmse`` an image, ``nfe`` of both ways.

    Raises
    ------
    ValueError
        As in `invert`.

    Examples
    --------
    >>> from ood_lib.analytic import GaussianLaw, analytic_model
    >>> law = GaussianLaw(torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double())
    >>> model = analytic_model(law, NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))))
    >>> roundtrip(model, torch.full((1, 1, 1, 4), 0.5)).rmse.item() < 0.05
    True
    """
    there = invert(
        model,
        images,
        timesteps=timesteps,
        solver=solver,
        eps_at=eps_at,
        batch_size=batch_size,
        progress=progress,
    )
    back = generate(
        model,
        there.latent,
        timesteps=there.timesteps,
        solver=solver,
        batch_size=batch_size,
        progress=progress,
    )
    rmse = (back.images - images).square().flatten(1).mean(1).sqrt()
    return RoundTrip(back.images, there.latent, rmse, there.nfe + back.nfe)
