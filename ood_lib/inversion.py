"""Walk the deterministic path of a frozen model: images to latents, latents to images.

A latent is a tuple (model, start, solver, grid). `invert` without options gives the converged latent:
that of a fine solver, to a stated error. There is no clipping: a clipped step has no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ood_lib.models import FrozenModel
from ood_lib.schedule import NoiseSchedule, graded_log_sigma, paper_grid, uniform_log_sigma
from ood_lib.solvers import SOLVERS, NetworkCalls, walk

__all__ = [
    "PRESETS",
    "SOLVERS",
    "STARTS",
    "Generation",
    "Inversion",
    "Preset",
    "RoundTrip",
    "check_images",
    "generate",
    "invert",
    "noise_like",
    "roundtrip",
]

STARTS = ("level0", "sigma0", "noise")
ENDS = ("level0", "sigma0")
LARGEST_ERROR = 0.05  # of a latent that statistics take
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Preset:
    """A named setting of solver and grid.

    Parameters
    ----------
    solver : str
        One of `SOLVERS`.
    points : int
        Points of the grid.
    spacing : {"log_sigma", "graded", "paper"}
        `uniform_log_sigma`, `graded_log_sigma`, or the released grid `paper_grid`.
    end : {"level0", "sigma0"}
        Where generation ends.

    Examples
    --------
    >>> PRESETS["paper"].solver
    'ddim'
    """

    solver: str
    points: int
    spacing: str = "log_sigma"
    end: str = "level0"

    def grid(self, schedule: NoiseSchedule, points: int | None, t_end: float | None) -> np.ndarray:
        """Timesteps from 0 to `t_end`; the preset's own number of points and end by default."""
        points = self.points if points is None else points
        if self.spacing != "paper":
            spaced = graded_log_sigma if self.spacing == "graded" else uniform_log_sigma
            return spaced(schedule, points, t_end=t_end)
        t0 = 900 if t_end is None else t_end
        if t0 != int(t0):
            raise ValueError(f"t_end is {t0}; the paper's grid ends at an integer timestep")
        return paper_grid(int(t0), points)


PRESETS = {
    "converged": Preset("ab2", 25, "graded"),
    "exact": Preset("leapfrog", 64),
    "paper": Preset("ddim", 80, "paper", "sigma0"),
}


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
    eps_at : str
        Level at which ``ddim`` asks the network.
    error_estimate : Tensor of shape (N,), optional
        Bound on the rms error of each latent against the path that begins at the same start; None
        where the scheme gives none for free (``eps_at="target"``, or fewer than four points).
    companion : Tensor of shape (N, C, H, W), optional
        State at the last timestep but one, which ``leapfrog`` needs to go back exactly.
    levels : Tensor of shape (n, N, C, H, W), optional
        float32 states at every timestep, if they were asked for.
    """

    latent: torch.Tensor
    nfe: int
    timesteps: np.ndarray
    solver: str
    start: str
    eps_at: str = "current"
    error_estimate: torch.Tensor | None = None
    companion: torch.Tensor | None = None
    levels: torch.Tensor | None = None

    def require_converged(self, limit: float = LARGEST_ERROR) -> torch.Tensor:
        """Give the latents if their median error is known to be at most `limit`.

        An exact round trip is no proof of a right latent, so whatever makes statements about latents
        asks here first.

        Parameters
        ----------
        limit : float, default 0.05
            Largest median of `error_estimate`, in latent units.

        Returns
        -------
        Tensor of shape (N, C, H, W)
            `latent`.

        Raises
        ------
        ValueError
            If the estimate is larger or there is none.
        """
        if self.error_estimate is None:
            raise ValueError(
                f"solver {self.solver!r} on this grid estimates no error; use a preset"
            )
        error = float(self.error_estimate.median()) if len(self.latent) else 0.0
        if not error <= limit:
            raise ValueError(
                f"the latents of solver {self.solver!r} with {len(self.timesteps)} points are about "
                f"{error:.2g} off, more than {limit:g}; use preset='converged' or more points"
            )
        return self.latent


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


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")


def _check_state(model: FrozenModel, x: torch.Tensor, what: str) -> torch.Tensor:
    model.check(x)
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or infinity; every number must be finite")
    return x.double()


def check_images(model: FrozenModel, images: torch.Tensor) -> torch.Tensor:
    """Refuse what is no set of images for a model.

    Parameters
    ----------
    model : FrozenModel
        Gives the shape.
    images : Tensor of shape (N, C, H, W)
        To be looked at.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        The images in float64.

    Raises
    ------
    ValueError
        If the shape is not the model's, or a number is not finite or outside [-1, 1].

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> check_images(load_model("ddpm-fashion-32"), torch.full((1, 1, 32, 32), 2.0))
    Traceback (most recent call last):
    ValueError: images reach 2 in size; they must lie in [-1, 1]
    """
    x0 = _check_state(model, images, "images")
    if x0.numel() and x0.abs().max() > 1 + 1e-3:
        raise ValueError(f"images reach {x0.abs().max():.3g} in size; they must lie in [-1, 1]")
    return x0


def _check_grid(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    grid = np.asarray(timesteps, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"timesteps must be two or more, each larger than the one before; got {grid[:6]} ..."
        )
    schedule.log_sigma(grid)  # raises where a timestep lies outside [0, T - 1]
    return grid


def _choose(
    model: FrozenModel,
    preset: str,
    solver: str | None,
    timesteps: np.ndarray | None,
    points: int | None,
    t_end: float | None,
) -> tuple[Preset, str, np.ndarray]:
    """Solver and grid: what was asked for, and the preset's where nothing was."""
    _check_choice("preset", preset, list(PRESETS))
    chosen = PRESETS[preset]
    solver = chosen.solver if solver is None else solver
    _check_choice("solver", solver, SOLVERS)
    if timesteps is None:
        return chosen, solver, chosen.grid(model.schedule, points, t_end)
    if points is not None or t_end is not None:
        raise ValueError("timesteps is a whole grid; leave out points and t_end, or timesteps")
    return chosen, solver, _check_grid(model.schedule, timesteps)


def noise_like(x: torch.Tensor, generator: Generators | None, why: str) -> torch.Tensor:
    """Draw standard normal noise, from one generator or from one for each row.

    Parameters
    ----------
    x : Tensor of shape (N, ...)
        Gives shape, dtype and device.
    generator : torch.Generator or a list with one a row, or None
        Source of the noise, on the CPU.
    why : str
        What draws noise, for the message where there is no generator.

    Returns
    -------
    Tensor of shape (N, ...)
        The noise.

    Raises
    ------
    ValueError
        If there is no generator, or not one for each row.

    Examples
    --------
    >>> noise_like(torch.zeros(2, 3), torch.Generator().manual_seed(0), "a test").shape
    torch.Size([2, 3])
    """
    if generator is None:
        raise ValueError(f"{why} draws noise; pass generator=torch.Generator().manual_seed(...)")
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} images; pass one, or one each")
    rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generator]
    return torch.stack(rows).to(x.device) if rows else torch.empty_like(x)


def _start(
    calls: NetworkCalls, images: torch.Tensor, t: float, start: str, generator: Generators | None
) -> torch.Tensor:
    """Place images on the path at timestep `t`."""
    schedule = calls.model.schedule
    signal, sigma = float(np.sqrt(schedule.alpha_bar_at(t))), float(schedule.sigma(t))
    if start == "level0":
        return images
    if start == "sigma0":
        return signal * (images + sigma * calls(images, t))
    return signal * (images + sigma * noise_like(images, generator, "start='noise'"))


def invert(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    preset: str = "converged",
    solver: str | None = None,
    timesteps: np.ndarray | None = None,
    points: int | None = None,
    t_end: float | None = None,
    eps_at: str = "current",
    start: str = "level0",
    generator: Generators | None = None,
    keep_levels: bool = False,
    batch_size: int = 64,
    progress: bool = False,
    eta: float = 0.0,
    clip_sample: bool = False,
) -> Inversion:
    """Carry images to latents along the deterministic path.

    Parameters
    ----------
    model : FrozenModel
        The frozen noise predictor.
    images : Tensor of shape (N, C, H, W)
        Images in [-1, 1].
    preset : {"converged", "exact", "paper"}, default "converged"
        Solver and grid where they are not given. "converged": the right latent, to a median error of
        at most 0.05, in 24 calls. "exact": gives the image back exactly, with `companion`. "paper": the
        released loop, 79 calls up to t = 900, which is neither.
    solver : str, optional
        ``ddim`` is Euler in sigma (order 1), ``heun`` its corrected form (order 2, two calls a step),
        ``ab2`` a two-step scheme in log sigma (order 2), ``abm2`` the same with a corrector that costs
        no call (order 2; about half the error, but more where a network is rough), ``leapfrog`` an
        exactly reversible one (order 2), ``fixed_point`` implicit Euler, whose inverse is DDIM
        (order 1, several calls a step).
    timesteps : array of shape (n,), optional
        Strictly increasing, in [0, T - 1], fractional or not; the latent is the state at the last.
    points : int, optional
        Points of the preset's grid, in place of its own number.
    t_end : float, optional
        Last timestep of the preset's grid; by default the last level with sigma up to 160, or 900 for
        "paper".
    eps_at : {"current", "target"}, default "current"
        Level at which ``ddim`` evaluates the network: "current" is the paper's choice, "target"
        that of diffusers' inverse scheduler, which hands the state of the current level to the
        network under the timestep of the next.
    start : {"level0", "sigma0", "noise"}, default "level0"
        The image is the state at the first timestep (the paper); or is carried there from sigma = 0
        by one Euler step; or by adding noise of that level's size.
    generator : torch.Generator or a list with one an image, optional
        Source of the noise of ``start="noise"``. With one an image, an image's noise does not depend
        on the others.
    keep_levels : bool, default False
        Keep the states at all timesteps.
    batch_size : int, default 64
        Images a network call; it does not change the result beyond rounding.
    progress : bool, default False
        Show a progress bar.
    eta, clip_sample
        Refused unless zero and False: a step with fresh noise or with clipping has no inverse. The
        ``clip_sample`` that a model folder states serves diffusers' own pipeline and is ignored here.

    Returns
    -------
    Inversion
        ``latent`` in float64, ``error_estimate`` an image, ``nfe``, ``timesteps``, ``solver``.

    Raises
    ------
    ValueError
        If shapes, ranges, the grid or an option are wrong.

    Notes
    -----
    DDIM: Song, Meng, Ermon, ICLR 2021, arXiv:2010.02502, eq. 13, read towards higher noise. ``ab2`` is
    the two-step multistep form of the exponential integrator of Lu et al., DPM-Solver, NeurIPS 2022,
    arXiv:2206.00927, sec. 3; the corrector of ``abm2`` is that of Zhao et al., UniPC, NeurIPS 2023,
    arXiv:2302.04867, in its lowest order. The state is float64, the network runs in its own dtype.

    Examples
    --------
    >>> from ood_lib.analytic import GaussianLaw, analytic_model
    >>> law = GaussianLaw(torch.zeros(4).double(), torch.eye(4).double(), torch.ones(4).double())
    >>> model = analytic_model(law, NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))))
    >>> made = invert(model, torch.full((1, 1, 1, 4), 0.5))
    >>> made.nfe, made.error_estimate.item() < 0.05
    (24, True)
    """
    _check_choice("start", start, STARTS)
    _check_choice("eps_at", eps_at, ("current", "target"))
    if eta != 0 or clip_sample:
        raise ValueError(
            f"eta = {eta}, clip_sample = {clip_sample}: noise and clipping have no inverse; leave both "
            "out of invert (eta belongs to generate)"
        )
    _, solver, grid = _choose(model, preset, solver, timesteps, points, t_end)
    if eps_at == "target" and solver != "ddim":
        raise ValueError(f"eps_at='target' belongs to solver='ddim'; {solver!r} has its own levels")
    x0 = check_images(model, images)
    calls, levels = NetworkCalls(model, batch_size), [] if keep_levels else None
    x = _start(calls, x0, grid[0], start, generator)
    latent, error, before = walk(
        calls, x, grid, solver, eps_at=eps_at, levels=levels, estimate=True, progress=progress
    )
    return Inversion(
        latent,
        calls.nfe,
        grid,
        solver,
        start,
        eps_at=eps_at,
        error_estimate=error,
        companion=before if solver == "leapfrog" else None,
        levels=torch.stack(levels) if keep_levels else None,
    )


def generate(
    model: FrozenModel,
    latent: torch.Tensor,
    *,
    preset: str = "converged",
    solver: str | None = None,
    timesteps: np.ndarray | None = None,
    points: int | None = None,
    t_end: float | None = None,
    end: str | None = None,
    companion: torch.Tensor | None = None,
    eta: float = 0.0,
    generator: Generators | None = None,
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
    preset, solver, timesteps, points, t_end
        As in `invert`; the grid is walked from its end to its start. ``fixed_point`` goes back by the
        explicit DDIM steps that it inverts.
    end : {"level0", "sigma0"}, optional
        The image is the state at the first timestep, or is carried to sigma = 0 by one Euler step
        more. As the preset says by default: "sigma0" for "paper", "level0" for the others.
    companion : Tensor of shape (N, C, H, W), optional
        For ``leapfrog``: the state at the last timestep but one that `invert` returned.
    eta : float, default 0.0
        Share of stochasticity in [0, 1]; above 0 only with ``solver="ddim"``.
    generator : torch.Generator or a list with one an image, optional
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
    chosen, solver, grid = _choose(model, preset, solver, timesteps, points, t_end)
    end = chosen.end if end is None else end
    _check_choice("end", end, ENDS)
    if companion is not None and solver != "leapfrog":
        raise ValueError(f"companion belongs to solver='leapfrog', not {solver!r}")
    x = _check_state(model, latent, "latents")
    calls = NetworkCalls(model, batch_size)
    if eta != 0:
        _check_eta(eta, solver, generator)
        x = _walk_stochastic(calls, x, grid[::-1], eta, generator, progress)
    else:
        scheme = "ddim" if solver == "fixed_point" else solver
        pair = None if companion is None else _check_state(model, companion, "companions")
        x, _, _ = walk(calls, x, grid[::-1], scheme, companion=pair, progress=progress)
    if end == "sigma0":
        x = _to_sigma0(calls, x, grid[0])
    return Generation(x, calls.nfe, grid, solver, eta)


def _to_sigma0(calls: NetworkCalls, x: torch.Tensor, t: float) -> torch.Tensor:
    """Carry the state at timestep `t` to sigma = 0: the image that it implies."""
    schedule = calls.model.schedule
    xbar = x / float(np.sqrt(schedule.alpha_bar_at(t)))
    return xbar - float(schedule.sigma(t)) * calls(xbar, t)


def _check_eta(eta: float, solver: str, generator: Generators | None) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    if solver != "ddim":
        raise ValueError(f"eta > 0 needs solver='ddim', not {solver!r}")
    if generator is None:
        raise ValueError("eta > 0 draws noise; pass generator=torch.Generator().manual_seed(...)")


def _walk_stochastic(
    calls: NetworkCalls,
    x: torch.Tensor,
    grid: np.ndarray,
    eta: float,
    generator: Generators,
    progress: bool,
) -> torch.Tensor:
    """Walk a decreasing grid with DDIM steps that add fresh noise (arXiv:2010.02502, eq. 16)."""
    alpha_bar = calls.model.schedule.alpha_bar_at(grid)
    for k in tqdm(range(len(grid) - 1), disable=not progress, desc=f"eta {eta:g}", unit="step"):
        here, there = alpha_bar[k], alpha_bar[k + 1]
        noise = calls(x / np.sqrt(here), grid[k])
        x0_hat = (x - np.sqrt(1 - here) * noise) / np.sqrt(here)
        fresh = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
        x = np.sqrt(there) * x0_hat + np.sqrt(1 - there - fresh**2) * noise
        x = x + fresh * noise_like(x, generator, "eta > 0")
    return x


def roundtrip(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    preset: str = "converged",
    solver: str | None = None,
    timesteps: np.ndarray | None = None,
    points: int | None = None,
    t_end: float | None = None,
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
    preset, solver, timesteps, points, t_end, eps_at, batch_size, progress
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
    >>> roundtrip(model, torch.full((1, 1, 1, 4), 0.5), preset="exact").rmse.item() < 1e-12
    True
    """
    shared = {"preset": preset, "batch_size": batch_size, "progress": progress}
    there = invert(
        model,
        images,
        solver=solver,
        timesteps=timesteps,
        points=points,
        t_end=t_end,
        eps_at=eps_at,
        **shared,
    )
    back = generate(
        model,
        there.latent,
        solver=there.solver,
        timesteps=there.timesteps,
        companion=there.companion,
        **shared,
    )
    rmse = (back.images - images).square().flatten(1).mean(1).sqrt()
    return RoundTrip(back.images, there.latent, rmse, there.nfe + back.nfe)
