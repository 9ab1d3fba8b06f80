"""The table of contenders of ``benchmarks/inversion.py``. To add one, write a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loops import (
    Config,
    Latent,
    Network,
    azula_back,
    azula_there,
    azula_version,
    belm_back,
    belm_there,
    ddim_forward,
    ddim_inverse,
    dpm_forward,
    dpm_inverse,
    ours,
    ours_back,
    paper_back,
    paper_there,
)
from torch import Tensor

from ood_lib.models import FrozenModel

OURS, DIFFUSERS, PAPER, AZULA, BELM = "ours", "diffusers", "paper's loop", "azula", "O-BELM"
# our default preset as users get it, and on the contenders' network
DEFAULT, PLAIN_OURS = "ours, converged, default backend", "ours, converged"
STEPS = (20, 100, 200, 500)
POINTS = (12, 16, 24, 32, 48, 80)


@dataclass(frozen=True)
class Contender:
    """One row of the table of contenders.

    Parameters
    ----------
    name : str
        Label in tables and figure.
    group : str
        Whose it is; one colour in the figure.
    ladder : tuple of int
        Numbers of steps or points to try, increasing; 0 where the contender chooses.
    there, back : callable
        ``(images, n) -> Latent`` and ``(Latent, n) -> images``.
    like : str, optional
        Name of a contender with the same latents, whose errors stand for its own: it is only timed.
    timed_images : int, optional
        Time only so many images; all by default.
    """

    name: str
    group: str
    ladder: tuple[int, ...]
    there: Callable[[Tensor, int], Latent]
    back: Callable[[Latent, int], Tensor]
    like: str | None = None
    timed_images: int | None = None


@dataclass(frozen=True)
class Setup:
    """What the contenders work with.

    Parameters
    ----------
    plain : Network
        The network as diffusers calls it.
    default : FrozenModel
        The same model in our default backend.
    same : FrozenModel
        The same model on the plain network.
    scheduler_config : dict
        As saved with the model.
    """

    plain: Network
    default: FrozenModel
    same: FrozenModel
    scheduler_config: Config


def contenders(setup: Setup) -> list[Contender]:
    """Give the table of contenders; those that need azula are left out where it is missing."""
    rows = [*our_rows(setup), *diffusers_rows(setup), *paper_rows(setup.plain)]
    rows += azula_rows(setup.plain) if azula_version() else []
    return [*rows, *belm_rows(setup.plain)]


def our_rows(setup: Setup) -> list[Contender]:
    """Presets in the default backend and on the contenders' network; solvers on the latter."""
    rows = [
        _our_row(f"ours, {preset}{label}", model, (0,), {"preset": preset})
        for label, model in ((", default backend", setup.default), ("", setup.same))
        for preset in ("converged", "exact", "paper")
    ]
    preset = {"preset": "converged"}
    rows.append(_our_row("ours, converged with n points", setup.same, POINTS, preset))
    ladders = {
        "ab2": POINTS,
        "abm2": POINTS,
        "heun": (12, 24, 48),
        "leapfrog": POINTS,
        "ddim": (24, 80, 240),
    }
    for solver, ladder in ladders.items():
        name = f"ours, {solver}, even in log sigma"
        rows.append(_our_row(name, setup.same, ladder, {"solver": solver}))
    return rows


def _our_row(
    name: str, model: FrozenModel, ladder: tuple[int, ...], options: dict[str, Any]
) -> Contender:
    there, back = partial(ours, model, options), partial(ours_back, model, options)
    return Contender(name, OURS, ladder, there, back)


def diffusers_rows(setup: Setup) -> list[Contender]:
    """``DDIMInverseScheduler`` without and with clipping, and the inverse DPM-Solver."""
    net, config = setup.plain, setup.scheduler_config
    rows = [
        Contender(
            f"diffusers, DDIM inverse, {label}",
            DIFFUSERS,
            ladder,
            partial(ddim_inverse, net, config, clip),
            partial(ddim_forward, net, config, clip),
        )
        for label, clip, ladder in (
            ("no clipping", False, (*STEPS, 1000)),
            ("as saved", config["clip_sample"], (20, 1000)),
        )
    ]
    there, back = partial(dpm_inverse, net, config), partial(dpm_forward, net, config)
    return [*rows, Contender("diffusers, DPM-Solver inverse", DIFFUSERS, STEPS, there, back)]


def paper_rows(net: Network) -> list[Contender]:
    """Give the released loop, all at once and one by one; 901 points are all levels up to 900."""
    name, ladder = "paper's loop, batched", (20, 80, 240, 320, 901)
    back = partial(paper_back, net)
    return [
        Contender(name, PAPER, ladder, partial(paper_there, net, None), back),
        Contender(
            "paper's loop, batch 1 (as released)",
            PAPER,
            ladder,
            partial(paper_there, net, 1),
            back,
            like=name,
            timed_images=2,
        ),
    ]


def azula_rows(net: Network) -> list[Contender]:
    """Samplers of azula: Euler, which is DDIM with eta = 0, Heun, and its multistep kinds."""
    rows = []
    for kind, log_sigma, ladder, options in (
        ("Euler", False, (20, 100, 500), {}),
        ("Heun", False, (50, 200), {}),
        ("zAB", False, (50, 200, 500), {"order": 2}),
        ("Heun", True, (12, 24, 48), {}),
        ("zEAB", True, POINTS, {"order": 2}),
        ("zEAB", True, POINTS, {"order": 3}),
        ("xEAB", True, POINTS, {"order": 2}),
    ):
        order = f" {options['order']}" if options else ""
        name = f"azula, {kind}{order}, even in {'log sigma' if log_sigma else 't'}"
        there = partial(azula_there, net, kind, log_sigma, **options)
        back = partial(azula_back, net, kind, log_sigma, **options)
        rows.append(Contender(name, AZULA, ladder, there, back))
    return rows


def belm_rows(net: Network) -> list[Contender]:
    """O-BELM on two grids."""
    return [
        Contender(
            f"O-BELM, even in {'log sigma' if log_sigma else 't'}",
            BELM,
            ladder,
            partial(belm_there, net, log_sigma),
            partial(belm_back, net, log_sigma),
        )
        for log_sigma, ladder in ((False, (20, 50, 100)), (True, (12, 24, 48)))
    ]
