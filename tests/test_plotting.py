"""Figures show what they were given: the pixels, the order, the intervals, the labels."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from ood_lib.metrics import Interval
from ood_lib.plotting import error_curves, image_rows, interval_bars, use_style


@pytest.fixture(autouse=True)
def style():
    """Use the book's style, and leave no figure and no setting behind."""
    with plt.rc_context():
        use_style()
        yield
    assert not plt.get_fignums(), "a figure stayed open"


def test_rows_show_the_first_images_in_order_with_their_labels():
    images = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 1, 8, 8)
    fig = image_rows({"up": images, "down": images.flip(0)}, columns=5, lines=2)
    assert [text.get_text() for text in fig.texts] == ["up", "down"]
    for axes, expected in zip(fig.axes, (images, images.flip(0)), strict=True):
        shown = axes.images[0].get_array()
        assert shown.shape == (20, 50)
        found = shown.reshape(2, 10, 5, 10)[:, 5, :, 5].ravel()
        np.testing.assert_allclose(found, (expected[:10, 0, 0, 0] + 1) / 2, atol=1e-6)


def test_rows_fill_a_short_strip_with_white_and_clip_what_overflows():
    fig = image_rows({"few": torch.full((2, 3, 8, 8), -7.0)}, columns=4)
    shown = fig.axes[0].images[0].get_array()
    assert shown.shape == (10, 40, 3)
    assert (shown[1:9, 1:9] == 0).all()
    assert (shown[:, 20:] == 1).all()


@pytest.mark.parametrize("zoom", [1, 2, 3])
def test_a_pixel_is_drawn_as_a_whole_number_of_pixels(zoom):
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 8, 8, generator=rng).round() * 2 - 1
    file = io.BytesIO()
    fig = image_rows({"a": images, "b": images}, columns=3, zoom=zoom)
    fig.savefig(file, dpi=fig.dpi)
    drawn = np.asarray(Image.open(file).convert("L"))
    expected = np.asarray(fig.axes[0].images[0].get_array()) * 255
    expected = expected.repeat(zoom, 0).repeat(zoom, 1)
    height, width = expected.shape
    corner = drawn[:height, 190 : 190 + width]
    assert np.abs(corner - expected).max() <= 1


def test_error_curves_draw_every_curve_its_guides_and_threshold():
    x, curves = [1, 2, 4], {"a": [1.0, 0.5, 0.25], "b": [1.0, 0.25, 0.0625]}
    fig = error_curves(x, curves, xlabel="calls", ylabel="error", slopes=(1, 2), threshold=0.1)
    axes = fig.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["a", "b", "order 1", "order 2", "threshold 0.1"]
    for label, slope in (("order 1", curves["a"]), ("order 2", curves["b"])):
        guide = np.array(lines[label])
        np.testing.assert_allclose(guide / guide[0], slope)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_legend().texts] == list(lines)
    fig.canvas.draw()


def test_bars_show_each_interval_where_it_belongs():
    groups = {
        "first": {"a": Interval(0.5, 0.4, 0.7), "b": Interval(0.1, 0.0, 0.3)},
        "second": {"b": Interval(0.9, 0.8, 1.0)},
    }
    fig = interval_bars(groups, ylabel="share", threshold=0.6)
    axes = fig.axes[0]
    ends = {
        c.get_label(): [segment[:, 1].tolist() for segment in c.lines[2][0].get_segments()]
        for c in axes.containers
    }
    np.testing.assert_allclose(ends["a"], [[0.4, 0.7]])
    np.testing.assert_allclose(ends["b"], [[0.0, 0.3], [0.8, 1.0]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(groups)
    fig.canvas.draw()
