"""Schemes that walk the deterministic path of a frozen model, and the error they make on the way.

In the variables ``xbar = x_t / sqrt(alpha_bar_t)`` and ``sigma_t`` the path is
``d xbar / d sigma = eps(x_t, t)``, or ``d xbar / d lambda = exp(lambda) eps`` in ``lambda = log sigma``.
A scheme is a generator: it yields the state at each point of the grid, with the noise that the network
predicts there. It knows no direction; the order of the grid tells inversion from generation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ood_lib.backends import batched
from ood_lib.models import FrozenModel

__all__ = ["SOLVERS", "NetworkCalls", "Walk", "quadrature_weights", "walk"]

FIXED_POINT_CALLS = 30  # an implicit step gives up after so many
FIXED_POINT_TOLERANCE = 1e-7  # of the state, rms, in units of the noise at its level
# A sum of two multiples of this below 2**14 is exact in float64, so leapfrog steps lose nothing. The
# trick is that of Levesque and Verlet, J. Stat. Phys. 72, 1993, for molecular dynamics.
LATTICE = 2.0**-39
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)

State = torch.Tensor
Steps = Iterator[tuple[State, State | None]]


class NetworkCalls:
    """Batched noise prediction in the variables (xbar, t), with a count of the calls an image.

    Parameters
    ----------
    model : FrozenModel
        The noise predictor.
    batch_size : int
        Images a call; halved, with a warning, where the memory does not hold them.

    Raises
    ------
    ValueError
        If `batch_size` is under 1.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> calls = NetworkCalls(zero_model(load_model("ddpm-fashion-32")), 64)
    >>> calls(torch.ones(2, 1, 32, 32), 10.0).abs().max().item(), calls.nfe
    (0.0, 1)
    """

    def __init__(self, model: FrozenModel, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more")
        self.model, self.batch_size, self.nfe = model, batch_size, 0

    def __call__(self, xbar: State, t: float, *, level: float | None = None) -> State:
        """Predict the noise in the state of `level`, told to the network as level `t`."""
        self.nfe += 1
        level = t if level is None else level
        x_t = xbar * float(np.sqrt(self.model.schedule.alpha_bar_at(level)))
        eps, self.batch_size = batched(lambda x: self.model.eps(x, t), x_t, self.batch_size)
        return eps


def quadrature_weights(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Weights that integrate ``exp(lambda) f(lambda)`` from values of f at the nodes.

    Parameters
    ----------
    nodes : array of shape (m,)
        Values of lambda = log sigma, all different.
    start, end : float
        Limits of the integral.

    Returns
    -------
    ndarray of shape (m,)
        The weights: exact where f is a polynomial in lambda of degree below m.

    Notes
    -----
    The exponential Adams weights of Hochbruck and Ostermann, Exponential integrators, Acta Numerica
    2010, sec. 2.4, for the linear part that is already taken out by xbar; with m = 1 this is DDIM.

    Examples
    --------
    >>> bool(np.isclose(quadrature_weights([0.3], 0.0, 1.0)[0], np.e - 1))
    True
    """
    nodes = np.asarray(nodes, dtype=np.float64)
    half = 0.5 * (end - start)
    points = start + half * (1 + NODES)
    others = ~np.eye(len(nodes), dtype=bool)
    basis = [
        np.prod([(points - b) / (a - b) for b in nodes[mask]], axis=0)
        for a, mask in zip(nodes, others, strict=True)
    ]
    return np.array([half * np.sum(WEIGHTS * np.exp(points) * values) for values in basis])


class Walk:
    """A walk on a grid: its levels, the network calls, and what the schemes share.

    Parameters
    ----------
    calls : NetworkCalls
        The network.
    grid : ndarray of shape (n,)
        Timesteps in the order of the walk.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> Walk(NetworkCalls(model, 64), np.array([0.0, 999.0])).sigma.round(2).tolist()
    [0.01, 157.41]
    """

    def __init__(self, calls: NetworkCalls, grid: np.ndarray) -> None:
        self.calls, self.grid = calls, grid
        self.log_sigma = calls.model.schedule.log_sigma(grid)
        self.sigma = np.exp(self.log_sigma)

    def eps(self, xbar: State, k: int) -> State:
        """Predict the noise in the state at the k-th level."""
        return self.calls(xbar, self.grid[k])

    def integral(
        self, values: Sequence[State], levels: Sequence[int], start: int, end: int | None = None
    ) -> State:
        """Integrate eps from one level to another, the next by default, through some of its values."""
        here, there = self.log_sigma[start], self.log_sigma[start + 1 if end is None else end]
        weights = quadrature_weights(self.log_sigma[list(levels)], here, there)
        return sum(float(w) * value for w, value in zip(weights, values, strict=True))

    @property
    def last(self) -> int:
        """Index of the last level."""
        return len(self.grid) - 1


def _ddim(walk: Walk, xbar: State) -> Steps:
    """Euler: eps where the step begins."""
    for k in range(walk.last):
        eps = walk.eps(xbar, k)
        yield xbar, eps
        xbar = xbar + (walk.sigma[k + 1] - walk.sigma[k]) * eps
    yield xbar, None


def _ddim_target(walk: Walk, xbar: State) -> Steps:
    """Euler as in diffusers' inverse scheduler: this level's state, told to be of the next level."""
    for k in range(walk.last):
        yield xbar, None
        eps = walk.calls(xbar, walk.grid[k + 1], level=walk.grid[k])
        xbar = xbar + (walk.sigma[k + 1] - walk.sigma[k]) * eps
    yield xbar, None


def _heun(walk: Walk, xbar: State) -> Steps:
    """Euler, corrected by the trapezoidal rule in sigma at the price of a second call."""
    for k in range(walk.last):
        gap, here = walk.sigma[k + 1] - walk.sigma[k], walk.eps(xbar, k)
        yield xbar, here
        there = walk.eps(xbar + gap * here, k + 1)
        xbar = xbar + 0.5 * gap * (here + there)
    yield xbar, None


def _predictor(walk: Walk, k: int, here: State, before: State | None) -> State:
    """Two-step Adams-Bashforth increment from level k, in log sigma; Euler at the first level."""
    if before is None:
        return walk.integral([here], [k], k)
    return walk.integral([here, before], [k, k - 1], k)


def _ab2(walk: Walk, xbar: State) -> Steps:
    """Two-step Adams-Bashforth in log sigma: eps is extrapolated linearly."""
    before = None
    for k in range(walk.last):
        here = walk.eps(xbar, k)
        yield xbar, here
        xbar = xbar + _predictor(walk, k, here, before)
        before = here
    yield xbar, None


def _abm2(walk: Walk, xbar: State) -> Steps:
    """Predict as `_ab2`, then correct each step with the value that the next one needs anyway."""
    before, origin = None, xbar
    for k in range(walk.last):
        here = walk.eps(xbar, k)
        if before is not None:
            xbar = origin + walk.integral([before, here], [k - 1, k], k - 1)
        yield xbar, here
        origin, xbar = xbar, xbar + _predictor(walk, k, here, before)
        before = here
    yield xbar, None


def _on_lattice(xbar: State) -> State:
    return torch.round(xbar / LATTICE) * LATTICE


def _leapfrog(walk: Walk, xbar: State, companion: State | None = None) -> Steps:
    """Stride over two levels with eps of the one between; read backwards, the same formula undoes it.

    All states are multiples of one small number, so that no sum is rounded: see `LATTICE`.
    """
    xbar, eps = _on_lattice(xbar), None
    if companion is None:
        eps, gap = walk.eps(xbar, 0), walk.sigma[1] - walk.sigma[0]
        companion = xbar + 0.5 * gap * (eps + walk.eps(xbar + gap * eps, 1))
    yield xbar, eps
    before, xbar = xbar, _on_lattice(companion)
    for k in range(1, walk.last):
        eps = walk.eps(xbar, k)
        yield xbar, eps
        stride = _on_lattice((walk.sigma[k + 1] - walk.sigma[k - 1]) * eps)
        before, xbar = xbar, before + stride
    yield xbar, None


def _fixed_point(walk: Walk, xbar: State) -> Steps:
    """Implicit Euler, solved by iteration: its inverse is an explicit DDIM step."""
    eps = walk.eps(xbar, 0)
    for k in range(walk.last):
        yield xbar, eps
        gap = walk.sigma[k + 1] - walk.sigma[k]
        guess = xbar + gap * eps
        for _ in range(FIXED_POINT_CALLS):
            eps = walk.eps(guess, k + 1)
            moved = xbar + gap * eps
            residual = float((moved - guess).square().mean().sqrt()) / walk.sigma[k + 1]
            guess = moved
            if residual <= FIXED_POINT_TOLERANCE:
                break
        else:
            _warn_unsolved(walk.grid[k + 1], residual)
        xbar = guess
    yield xbar, eps


def _warn_unsolved(t: float, residual: float) -> None:
    warnings.warn(
        f"fixed point: at t = {t:g} the residual is {residual:.1e} after {FIXED_POINT_CALLS} calls; "
        "use more points",
        RuntimeWarning,
        stacklevel=2,
    )


class _Scheme(NamedTuple):
    """A scheme, and how its error is judged: over how many levels, and what part of the sum counts."""

    steps: Callable[..., Steps]
    stride: int = 1
    counts: float = 1.0


SCHEMES = {
    "ddim": _Scheme(_ddim),
    "heun": _Scheme(_heun),
    # Its deviations change sign and are damped: on analytic models and on networks their sum was 2.7 to
    # 12 times the error. Those of the other schemes add up.
    "ab2": _Scheme(_ab2, counts=0.4),
    "abm2": _Scheme(_abm2),
    "leapfrog": _Scheme(_leapfrog, stride=2),
    "fixed_point": _Scheme(_fixed_point),
}
SOLVERS = tuple(SCHEMES)


class _ErrorMeter:
    """Bound the error of a walk from values that it has computed anyway.

    The increment over each step is compared with the integral of a parabola through three values of
    eps. Its rms counts in full, as if all such deviations added up, and grows like sigma up to the
    last level, as a deviation at most does in a Gaussian model; on the way down it does not grow.
    """

    def __init__(self, walk: Walk, stride: int) -> None:
        self.walk, self.stride = walk, stride
        self.states: list[State] = []
        self.values: list[tuple[int, State]] = []
        self.estimate: torch.Tensor | None = None  # an image, in units of xbar at the last level

    def add(self, k: int, xbar: State, eps: State | None) -> None:
        """Take the state and the predicted noise at level k."""
        waiting = len(self.values) < 3
        self.states = [*self.states[-2:], xbar]
        if eps is not None:
            self.values = [*self.values[-2:], (k, eps)]
        if len(self.values) == 3:
            oldest = k + 1 - len(self.states)
            for end in range(max(oldest + self.stride, k - 1) if waiting else k, k + 1):
                self._judge(end, self.states[end - k - 1 - self.stride], self.states[end - k - 1])

    def _judge(self, end: int, before: State, after: State) -> None:
        sigma = self.walk.sigma
        levels, values = zip(*self.values, strict=True)
        finer = self.walk.integral(values, levels, end - self.stride, end)
        gap = (after - before - finer).flatten(1).square().mean(1).sqrt() / self.stride
        grown = gap * max(1.0, sigma[-1] / sigma[end])
        self.estimate = grown if self.estimate is None else self.estimate + grown


def walk(
    calls: NetworkCalls,
    x: State,
    grid: np.ndarray,
    solver: str,
    *,
    eps_at: str = "current",
    companion: State | None = None,
    levels: list[State] | None = None,
    estimate: bool = False,
    progress: bool = False,
) -> tuple[State, torch.Tensor | None, State]:
    """Carry the state at ``grid[0]`` to ``grid[-1]``, in whichever direction the grid runs.

    Parameters
    ----------
    calls : NetworkCalls
        The network.
    x : Tensor of shape (N, C, H, W)
        States at ``grid[0]``.
    grid : ndarray of shape (n,)
        Timesteps in the order of the walk.
    solver : str
        One of `SOLVERS`.
    eps_at : {"current", "target"}, default "current"
        For "ddim".
    companion : Tensor of shape (N, C, H, W), optional
        State at ``grid[1]``, for "leapfrog" to retrace a walk.
    levels : list, optional
        Is given the float32 state at every level.
    estimate : bool, default False
        Bound the error, which holds some states more.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    tuple
        The state at the last level, the bound on its error an image (None where there is none or none was
        asked for), and the state at the last level but one.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> calls = NetworkCalls(zero_model(load_model("ddpm-fashion-32")), 64)
    >>> grid = np.array([0.0, 9.0, 99.0, 999.0])
    >>> walk(calls, torch.ones(1, 1, 32, 32), grid, "abm2", estimate=True)[1].item()
    0.0
    """
    signal = [float(a) for a in np.sqrt(calls.model.schedule.alpha_bar_at(grid))]
    scheme = _Scheme(_ddim_target) if eps_at == "target" else SCHEMES[solver]
    there = Walk(calls, grid)
    meter = _ErrorMeter(there, scheme.stride) if estimate else None
    options = {"companion": companion / signal[1]} if companion is not None else {}
    before = state = x / signal[0]
    steps = scheme.steps(there, state, **options)
    bar = tqdm(steps, total=len(grid), disable=not progress, desc=solver, unit="level")
    for k, (xbar, eps) in enumerate(bar):
        if meter is not None:
            meter.add(k, xbar, eps)
        before, state = state, xbar
        if levels is not None:
            levels.append((xbar * signal[k]).float())
    error = None if meter is None else meter.estimate
    if error is not None:
        error = error * signal[-1] * scheme.counts
    return state * signal[-1], error, before * signal[-2]
