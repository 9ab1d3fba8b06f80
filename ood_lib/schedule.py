"""Noise schedules and the grids of timesteps that solvers walk on.

Notation: ``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`` and
``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)``. A timestep may be fractional: the logarithm of
sigma is interpolated linearly between two integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "NoiseSchedule",
    "from_diffusers",
    "graded_log_sigma",
    "paper_grid",
    "uniform_log_sigma",
    "uniform_t",
]

SIGMA_END = 160.0
# Points a unit of log sigma of `graded_log_sigma`, up to a factor, at some sigma.
GRADED = {0.01: 1.0, 0.1: 1.0, 0.3: 1.3, 1.5: 1.3, 5.0: 0.7, 160.0: 0.5}


@dataclass(frozen=True)
class NoiseSchedule:
    """The cumulative signal share of a diffusion process.

    Parameters
    ----------
    alpha_bar : ndarray of shape (T,)
        float64, strictly decreasing, inside (0, 1). Cumulative product of ``1 - beta``; the DDIM paper
        calls it alpha.

    Raises
    ------
    ValueError
        If `alpha_bar` is not such a sequence.

    Examples
    --------
    >>> schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> round(float(schedule.sigma(999)), 1)
    157.4
    """

    alpha_bar: np.ndarray

    def __post_init__(self) -> None:
        values = np.asarray(self.alpha_bar, dtype=np.float64)
        object.__setattr__(self, "alpha_bar", values)
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(
                f"alpha_bar has shape {values.shape}; give two or more finite numbers in one row"
            )
        if values.min() <= 0 or values.max() >= 1 or (np.diff(values) >= 0).any():
            raise ValueError("alpha_bar must fall strictly and stay inside (0, 1)")

    @property
    def num_train_timesteps(self) -> int:
        """Number of levels T."""
        return len(self.alpha_bar)

    @property
    def t_end(self) -> float:
        """Last timestep with sigma at most 160, where latents end and sampling starts.

        T - 1 of the linear schedule. A cosine schedule jumps to sigma = 20,291 in its last step, over
        which no solver can be accurate.
        """
        return float(np.searchsorted(self._log_sigmas(), np.log(SIGMA_END), side="right") - 1)

    def log_sigma(self, t: Any) -> np.ndarray:
        """Logarithm of sigma at timesteps `t`, integer or fractional, in [0, T - 1]."""
        t = np.asarray(t, dtype=np.float64)
        last = self.num_train_timesteps - 1
        if not (np.isfinite(t).all() and (t >= 0).all() and (t <= last).all()):
            raise ValueError(
                f"timesteps run from {t.min()} to {t.max()}; they must lie in [0, {last}]"
            )
        return np.interp(t, np.arange(last + 1), self._log_sigmas())

    def _log_sigmas(self) -> np.ndarray:
        return 0.5 * (np.log1p(-self.alpha_bar) - np.log(self.alpha_bar))

    def sigma(self, t: Any) -> np.ndarray:
        """Noise-to-signal ratio ``sqrt((1 - alpha_bar) / alpha_bar)`` at timesteps `t`."""
        return np.exp(self.log_sigma(t))

    def alpha_bar_at(self, t: Any) -> np.ndarray:
        """Share of signal at timesteps `t`; equals ``alpha_bar[t]`` at the integers."""
        return 1 / (1 + self.sigma(t) ** 2)

    def t_of_log_sigma(self, log_sigma: Any) -> np.ndarray:
        """Timestep, usually fractional, at which sigma has the given logarithm."""
        return np.interp(log_sigma, self._log_sigmas(), np.arange(self.num_train_timesteps))


def from_diffusers(scheduler: Any) -> NoiseSchedule:
    """Read the schedule of any diffusers scheduler that has ``alphas_cumprod``.

    Parameters
    ----------
    scheduler : diffusers scheduler
        For example a `DDPMScheduler` or a `DDIMScheduler`.

    Returns
    -------
    NoiseSchedule
        ``alpha_bar`` recomputed in float64 from the scheduler's betas.

    Raises
    ------
    ValueError
        If the scheduler has no betas.

    Examples
    --------
    >>> from diffusers import DDPMScheduler
    >>> from_diffusers(DDPMScheduler()).num_train_timesteps
    1000
    """
    if getattr(scheduler, "betas", None) is None:
        raise ValueError(f"{type(scheduler).__name__} has no betas; give a DDPM or DDIM scheduler")
    return NoiseSchedule(np.cumprod(1 - scheduler.betas.double().numpy()))


def _last(schedule: NoiseSchedule, n: int, t_end: float | None) -> float:
    last = schedule.num_train_timesteps - 1
    end = schedule.t_end if t_end is None else t_end
    if n < 2 or not 0 < end <= last:
        raise ValueError(
            f"a grid of {n} points up to t = {end} was asked for; use n >= 2 and 0 < t_end <= {last}"
        )
    return float(end)


def uniform_t(schedule: NoiseSchedule, n: int, *, t_end: float | None = None) -> np.ndarray:
    """`n` integer timesteps from 0 to `t_end`, as even as integers can be.

    Parameters
    ----------
    schedule : NoiseSchedule
        Gives T.
    n : int
        Number of points, both ends included.
    t_end : float, optional
        Last timestep; `NoiseSchedule.t_end` by default.

    Returns
    -------
    ndarray of shape (n,)
        Increasing float64 timesteps with integer values.

    Raises
    ------
    ValueError
        If fewer than two points or more than there are integers are asked for.

    Examples
    --------
    >>> uniform_t(NoiseSchedule(np.linspace(0.9, 0.1, 10)), 4)
    array([0., 3., 6., 9.])
    """
    end = _last(schedule, n, t_end)
    if n > end + 1:
        raise ValueError(
            f"{n} integer timesteps do not fit between 0 and {end:g}; use n <= {int(end) + 1}"
        )
    return np.round(np.linspace(0, end, n))


def _at_levels(
    schedule: NoiseSchedule, log_sigma: np.ndarray, first: float, end: float
) -> np.ndarray:
    """Timesteps of rising levels, whose ends are hit exactly."""
    grid = schedule.t_of_log_sigma(log_sigma)
    grid[0], grid[-1] = first, end
    return grid


def uniform_log_sigma(
    schedule: NoiseSchedule, n: int, *, t_start: float = 0.0, t_end: float | None = None
) -> np.ndarray:
    """`n` timesteps from `t_start` to `t_end`, evenly spaced in log sigma, fractional where needed.

    Parameters
    ----------
    schedule : NoiseSchedule
        Gives sigma.
    n : int
        Number of points, both ends included.
    t_start : float, default 0
        First timestep.
    t_end : float, optional
        Last timestep; `NoiseSchedule.t_end` by default.

    Returns
    -------
    ndarray of shape (n,)
        Increasing float64 timesteps.

    Raises
    ------
    ValueError
        If `n` is under 2, `t_end` is outside (0, T - 1] or `t_start` outside [0, t_end).

    Examples
    --------
    >>> s = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> np.diff(s.log_sigma(uniform_log_sigma(s, 5))).round(6)
    array([2.415989, 2.415989, 2.415989, 2.415989])
    """
    end = _last(schedule, n, t_end)
    if not 0 <= t_start < end:
        raise ValueError(f"t_start is {t_start}; a grid up to t = {end:g} starts in [0, {end:g})")
    levels = np.linspace(schedule.log_sigma(t_start), schedule.log_sigma(end), n)
    return _at_levels(schedule, levels, t_start, end)


def graded_log_sigma(schedule: NoiseSchedule, n: int, *, t_end: float | None = None) -> np.ndarray:
    """`n` timesteps from 0 to `t_end`, denser in log sigma where images take shape, fewer above.

    Parameters
    ----------
    schedule : NoiseSchedule
        Gives sigma.
    n : int
        Number of points, both ends included.
    t_end : float, optional
        Last timestep; `NoiseSchedule.t_end` by default.

    Returns
    -------
    ndarray of shape (n,)
        Increasing float64 timesteps.

    Raises
    ------
    ValueError
        If `n` is under 2 or `t_end` is outside (0, T - 1].

    Notes
    -----
    The density is piecewise linear in log sigma: 1 up to sigma = 0.1, 1.3 from 0.3 to 1.5, 0.7 at 5, 0.5
    at 160. It was chosen on networks that are rough between 0.4 and 1.5 for images unlike their own.

    Examples
    --------
    >>> s = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
    >>> np.diff(s.log_sigma(graded_log_sigma(s, 25)))[[0, 12, -1]].round(2)
    array([0.37, 0.29, 0.71])
    """
    end = _last(schedule, n, t_end)
    fine = np.linspace(schedule.log_sigma(0), schedule.log_sigma(end), 4096)
    density = np.interp(fine, np.log(list(GRADED)), list(GRADED.values()))
    count = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    levels = np.interp(np.linspace(0, count[-1], n), count, fine)
    return _at_levels(schedule, levels, 0.0, end)


def paper_grid(t0: int = 900, n: int = 80) -> np.ndarray:
    """Make the released grid: ``s_k = int(t0 k / (n - 1))`` for k = 0 ... n - 1.

    Parameters
    ----------
    t0 : int, default 900
        Last timestep.
    n : int, default 80
        Number of points.

    Returns
    -------
    ndarray of shape (n,)
        Increasing float64 timesteps with integer values.

    Raises
    ------
    ValueError
        If two points would coincide.

    Notes
    -----
    Zhu et al., arXiv:2310.09213, released code; the command of its README uses t0 = 900, n = 80.

    Examples
    --------
    >>> paper_grid()[:4], paper_grid()[-1]
    (array([ 0., 11., 22., 34.]), np.float64(900.0))
    """
    if not 2 <= n <= t0 + 1:
        raise ValueError(f"the paper's grid needs 2 <= n <= t0 + 1, not n = {n}, t0 = {t0}")
    return np.floor(t0 * np.arange(n) / (n - 1) + 1e-9)
