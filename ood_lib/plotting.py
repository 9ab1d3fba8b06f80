"""Figures from data: no statistics are computed here, and nothing is shown or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.figure import Figure

from ood_lib.metrics import Interval

__all__ = ["error_curves", "image_rows", "interval_bars", "use_style"]


def use_style() -> None:
    """Set fonts, colour-blind-safe colours, a white background and the resolution of the book.

    Examples
    --------
    >>> use_style()
    >>> plt.rcParams["figure.dpi"]
    120.0
    """
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 120, "savefig.dpi": 120, "figure.facecolor": "white"})


def _strip(images: torch.Tensor, columns: int, lines: int) -> np.ndarray:
    """Lay images out on white, row by row, framed by one pixel: (lines * (H + 2), ..., channels)."""
    shown = images[: columns * lines].clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()
    blank = np.ones((columns * lines - len(shown), *shown.shape[1:]))
    framed = np.pad(
        np.concatenate([shown, blank]), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0
    )
    _, height, width, channels = framed.shape
    grid = framed.reshape(lines, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(lines * height, columns * width, channels)


def image_rows(
    rows: Mapping[str, torch.Tensor], *, columns: int = 16, lines: int = 1, zoom: int = 2
) -> Figure:
    """Draw one labelled strip of images for each entry, in the order given: never picked by eye.

    Parameters
    ----------
    rows : mapping of str to Tensor of shape (N, C, H, W)
        Label and images in [-1, 1]; the first ``columns * lines`` are drawn.
    columns : int, default 16
        Images a line.
    lines : int, default 1
        Lines of images a label.
    zoom : int, default 2
        Screen pixels a pixel; whole, so that no pixel is drawn wider than its neighbour.

    Returns
    -------
    Figure
        The figure, closed for pyplot.

    Examples
    --------
    >>> fig = image_rows({"noise": torch.rand(4, 1, 8, 8)}, columns=4)
    >>> len(fig.axes)
    1
    """
    strips = {label: _strip(images, columns, lines) for label, images in rows.items()}
    dpi, gap, margin = plt.rcParams["figure.dpi"], 6, 190
    widest = max(strip.shape[1] for strip in strips.values()) * zoom + margin
    tallest = sum(strip.shape[0] * zoom + gap for strip in strips.values())
    fig = plt.figure(figsize=(widest / dpi, tallest / dpi))
    top = tallest
    for label, strip in strips.items():
        height, width = strip.shape[0] * zoom, strip.shape[1] * zoom
        place = (margin / widest, (top - height) / tallest, width / widest, height / tallest)
        ax = fig.add_axes(place)
        pixels = strip[..., 0] if strip.shape[-1] == 1 else strip
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        middle = (top - height / 2) / tallest
        fig.text((margin - 10) / widest, middle, label, ha="right", va="center", fontsize=10)
        top -= height + gap
    plt.close(fig)
    return fig


def error_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    slopes: Sequence[int] = (),
    threshold: float | None = None,
) -> Figure:
    """Draw errors against cost on logarithmic axes, one line and one marker an entry.

    Parameters
    ----------
    x : sequence of float
        Cost, shared by all curves.
    curves : mapping of str to sequence of float
        Label and errors.
    xlabel, ylabel : str
        Labels of the axes, with units.
    slopes : sequence of int, optional
        Orders of convergence to draw as grey guides.
    threshold : float, optional
        Height of a dashed line.

    Returns
    -------
    Figure
        The figure, closed for pyplot.

    Examples
    --------
    >>> error_curves([1, 2], {"a": [1.0, 0.5]}, xlabel="calls", ylabel="error").axes[0].get_xscale()
    'log'
    """
    fig, ax = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    x = np.asarray(x, dtype=float)
    for (label, y), marker in zip(curves.items(), "osD^vP*Xph<>" * 4, strict=False):
        ax.loglog(x, y, marker=marker, label=label)
    top = max(max(y) for y in curves.values())
    for order in slopes:
        style = {1: ":", 2: "--"}.get(order, "-.")
        guide = 0.6 * top * (x / x[0]) ** -order
        ax.loglog(x, guide, color="0.35", ls=style, lw=1.2, label=f"order {order}")
    if threshold is not None:
        ax.axhline(threshold, color="0.3", ls="--", lw=1, label=f"threshold {threshold:g}")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(x) <= 12:
        ax.set_xticks(x, [f"{v:g}" for v in x])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(fig)
    return fig


def interval_bars(
    groups: Mapping[str, Mapping[str, Interval]],
    *,
    ylabel: str,
    threshold: float | None = None,
    line: str = "threshold",
) -> Figure:
    """Draw estimates with their intervals: one colour an entry, one cluster a group.

    Parameters
    ----------
    groups : mapping of str to mapping of str to Interval
        Group on the horizontal axis, then label and estimate.
    ylabel : str
        Label of the vertical axis, with the unit.
    threshold : float, optional
        Height of a dashed line.
    line : str, default "threshold"
        What the dashed line is.

    Returns
    -------
    Figure
        The figure, closed for pyplot.

    Examples
    --------
    >>> fig = interval_bars({"t = 1": {"a": Interval(0.5, 0.4, 0.6)}}, ylabel="share")
    >>> fig.axes[0].get_ylabel()
    'share'
    """
    fig, ax = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    width = 0.8 / len(labels)
    for j, (label, marker) in enumerate(zip(labels, "osD^vP*Xph" * 3, strict=False)):
        here = [(i, group[label]) for i, group in enumerate(groups.values()) if label in group]
        x = [i + (j - (len(labels) - 1) / 2) * width for i, _ in here]
        y = np.array([e.value for _, e in here])
        err = np.abs([[e.value - e.low for _, e in here], [e.high - e.value for _, e in here]])
        ax.errorbar(x, y, err, fmt=marker, capsize=3, label=label)
    if threshold is not None:
        ax.axhline(threshold, color="0.3", ls="--", lw=1, label=f"{line} {threshold:g}")
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_ylabel(ylabel)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(fig)
    return fig
