"""What the measurements of ``benchmarks/inversion.py`` say: time to the goal, ratios, tables, figure."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from contenders import AZULA, BELM, DEFAULT, DIFFUSERS, OURS, PAPER, PLAIN_OURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ood_lib.plotting import use_style

GOAL = 0.05
COLOURS = sns.color_palette("colorblind")
GROUPS = {  # line and colour
    OURS: ("-", COLOURS[0]),
    DIFFUSERS: ("--", COLOURS[1]),
    PAPER: ("-.", COLOURS[2]),
    AZULA: (":", COLOURS[4]),
    BELM: ((0, (5, 1, 1, 1, 1, 1)), COLOURS[7]),
}
TARGETS = {
    "diffusers, DDIM inverse, no clipping": 30,
    "paper's loop, batched": 10,
    "paper's loop, batch 1 (as released)": 100,
}
WORST_SHOWN = 3.0


def decisive(rows: pd.DataFrame, goal: float = GOAL) -> pd.Series:
    """Pick the first rung that reaches the goal, or else the one with the smallest error.

    Parameters
    ----------
    rows : DataFrame
        Rungs of one contender in the order of its ladder, with `latent_rmse`.
    goal : float, default 0.05
        Largest error that will do; nothing is interpolated.

    Returns
    -------
    Series
        The rung, and whether it `reached` the goal.
    """
    good = rows[rows.latent_rmse <= goal]
    error = rows.latent_rmse.fillna(np.inf).to_numpy()
    chosen = good.iloc[0] if len(good) else rows.iloc[int(error.argmin())]
    return pd.concat([chosen, pd.Series({"reached": bool(len(good))})])


def compare(rows: pd.DataFrame, goal: float = GOAL) -> pd.DataFrame:
    """Give every contender's decisive rung, and its time over ours.

    A ratio stands only where ours is at least as accurate as the goal, or as the contender's best where
    that never reached the goal. `times_ours` is over our default preset as users get it,
    `times_ours_same_net` over the preset on the contenders' own network, which is the share of the
    method alone, and `times_ours_quickest` over whatever of ours reaches the goal first.

    Parameters
    ----------
    rows : DataFrame
        All rungs of all contenders, with `contender`, `group`, `latent_rmse` and `seconds`.
    goal : float, default 0.05
        Largest error that will do.

    Returns
    -------
    DataFrame
        One row a contender.
    """
    picked = [decisive(part, goal) for _, part in rows.groupby("contender", sort=False)]
    best = pd.DataFrame(picked).reset_index(drop=True)
    best["times_ours"] = _ratios(best, best[best.contender == DEFAULT], goal)
    best["times_ours_same_net"] = _ratios(best, best[best.contender == PLAIN_OURS], goal)
    quickest = best[(best.group == OURS) & best.reached].sort_values("seconds").head(1)
    best["times_ours_quickest"] = _ratios(best, quickest, goal)
    best["target"] = best.contender.map(TARGETS)
    met = np.where(best.times_ours >= best.target, "yes", "no")
    best["met"] = np.where(best.target.notna(), met, "")
    return best


def _ratios(best: pd.DataFrame, ours: pd.DataFrame, goal: float) -> pd.Series:
    if not len(ours):
        return pd.Series(np.nan, index=best.index)
    allowed = np.maximum(best.latent_rmse, goal)
    return (best.seconds / ours.seconds.item()).where(ours.latent_rmse.item() <= allowed)


def print_tables(rows: pd.DataFrame, best: pd.DataFrame, calls: pd.DataFrame) -> None:
    """Print every rung, the decisive ones, and the network calls."""
    columns = ["contender", "points", "calls", "latent_rmse", "seconds"]
    extra = ["t_end", "relative_rmse", "roundtrip_rmse", "images_per_s", "seconds_once"]
    times = ["times_ours", "times_ours_same_net", "times_ours_quickest"]
    ratios = ["reached", *times, "target", "met"]
    titles = {
        "Every rung": rows[columns + extra],
        f"Time to a latent error of {GOAL:g} (or at the best error)": best[columns + ratios],
        "One network call": calls,
    }
    for title, table in titles.items():
        print(
            f"\n{title}\n{table.to_string(index=False, na_rep='-', float_format='{:.3g}'.format)}"
        )


def draw(rows: pd.DataFrame, goal: float = GOAL) -> Figure:
    """Draw latent error against seconds: colour and line for whose it is, marker for which.

    Parameters
    ----------
    rows : DataFrame
        All rungs of all contenders.
    goal : float, default 0.05
        Height of the dashed line.

    Returns
    -------
    Figure
        The figure, closed for pyplot.
    """
    use_style()
    fig, ax = plt.subplots(figsize=(11, 6.5), layout="constrained")
    shown = rows[rows.latent_rmse <= WORST_SHOWN]
    markers = cycle("osD^vP*Xp<>hd")
    for name, part in shown.groupby("contender", sort=False):
        style, colour = GROUPS[part.group.iloc[0]]
        ax.loglog(
            part.seconds, part.latent_rmse, marker=next(markers), ms=10 if len(part) == 1 else 6,
            ls=style, lw=1.3, color=colour, mec="black", mew=0.4, label=name,
        )  # fmt: skip
    _finish(ax, goal, sorted(set(rows.contender) - set(shown.contender)))
    plt.close(fig)
    return fig


def _finish(ax: Axes, goal: float, missing: list[str]) -> None:
    ax.axhline(goal, color="0.2", ls="--", lw=1.2)
    ax.annotate(f"an error of {goal:g}", (0.01, goal), xytext=(0, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)  # fmt: skip
    left_out = f"; never under {WORST_SHOWN:g}: {', '.join(missing)}" if missing else ""
    ax.set_xlabel(f"seconds for all images, one way{left_out}")
    ax.set_ylabel("latent error (rms, median over images)")
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
