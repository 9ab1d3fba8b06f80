"""Physical measures of sources against Gaussian sources whose measures are known."""

import numpy as np
import pytest
import torch

from ood_lib.galaxies import Galaxies, distances, measure, spread

SIDE, CENTRE = 32, 15.5


def source(peak=0.7, width=2.0, axis_ratio=1.0, dx=0.0, dy=0.0, sky=0.0, channels=1):
    """One Gaussian source, offset from the centre; the long axis lies along x."""
    place = torch.arange(SIDE, dtype=torch.float64) - CENTRE
    y, x = torch.meshgrid(place - dy, place - dx, indexing="ij")
    light = sky + peak * torch.exp(-(x**2 + (y / axis_ratio) ** 2) / (2 * width**2))
    return (2 * light - 1).expand(1, channels, SIDE, SIDE)


def noisy(image, scale, seed=0):
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, 2 * scale, image.shape))
    return (image + noise).clamp(-1, 1)


def values(found):
    return np.stack([found.flux, found.half_light, found.ellipticity, found.offset])


@pytest.mark.parametrize("peak", [0.2, 0.8])
@pytest.mark.parametrize("width", [1.2, 2.0, 3.0])
def test_a_round_source_has_its_flux_and_radius(peak, width):
    found = measure(source(peak, width))
    np.testing.assert_allclose(found.flux, 2 * np.pi * peak * width**2, rtol=0.03)
    np.testing.assert_allclose(found.half_light, 1.1774 * width, rtol=0.05)
    np.testing.assert_allclose(found.ellipticity, 0, atol=0.02)
    np.testing.assert_allclose(found.offset, 0, atol=0.02)


@pytest.mark.parametrize("axis_ratio", [0.4, 0.6, 0.8])
def test_an_oval_source_has_its_ellipticity_lying_or_standing(axis_ratio):
    image = source(width=2.5, axis_ratio=axis_ratio)
    found = measure(torch.cat([image, image.mT]))
    np.testing.assert_allclose(found.ellipticity, 1 - axis_ratio, atol=0.02)
    np.testing.assert_allclose(found.flux, 2 * np.pi * 0.7 * 2.5**2 * axis_ratio, rtol=0.03)


@pytest.mark.parametrize(("dx", "dy"), [(3.0, 4.0), (-6.0, 2.0), (0.3, -0.4)])
def test_a_shift_moves_the_offset_alone(dx, dy):
    here, there = measure(source()), measure(source(dx=dx, dy=dy))
    np.testing.assert_allclose(there.offset, np.hypot(dx, dy), atol=0.02)
    np.testing.assert_allclose(values(there)[:2], values(here)[:2], rtol=0.02)
    np.testing.assert_allclose(there.ellipticity, here.ellipticity, atol=0.02)


def test_the_background_does_not_count():
    np.testing.assert_allclose(
        values(measure(source(0.5, sky=0.3))), values(measure(source(0.5))), rtol=0.02, atol=0.02
    )


def test_an_image_is_measured_alone():
    images = torch.cat([source(), source(0.3, 3.0, dx=4.0), source(0.5, 1.5, 0.5)])
    together = values(measure(images))
    alone = np.concatenate([values(measure(image[None])) for image in images], axis=1)
    np.testing.assert_array_equal(together, alone)


def test_the_brightest_source_counts_and_the_other_is_masked():
    pair = source(0.8, 2.0, dx=6.0, dy=6.0) + source(0.3, 1.5, dx=-6.0, dy=-6.0) + 1
    found = measure(pair)
    np.testing.assert_allclose(found.offset, np.hypot(6, 6), atol=0.05)
    np.testing.assert_allclose(found.flux, 2 * np.pi * 0.8 * 2.0**2, rtol=0.05)


def test_a_grey_image_in_three_channels_is_the_same():
    one, three = (measure(source(channels=c)) for c in (1, 3))
    np.testing.assert_allclose(values(one), values(three), rtol=1e-9, atol=1e-9)


def test_nothing_is_found_where_nothing_is():
    found = measure(torch.cat([torch.full((1, 1, SIDE, SIDE), x) for x in (-1.0, 0.2, 1.0)]))
    assert not found.found.any()
    assert np.isnan(values(found)).all()


def test_noise_alone_is_seldom_a_source():
    found = measure(noisy(torch.full((200, 1, SIDE, SIDE), -0.5), 0.03))
    assert found.found.mean() <= 0.05


def test_a_source_in_noise_keeps_its_measures():
    found = measure(noisy(source(0.6, 2.0, 0.7, dx=2.0).repeat(50, 1, 1, 1), 0.02))
    assert found.found.all()
    np.testing.assert_allclose(np.median(found.flux), 2 * np.pi * 0.6 * 4 * 0.7, rtol=0.1)
    np.testing.assert_allclose(np.median(found.ellipticity), 0.3, atol=0.06)
    np.testing.assert_allclose(np.median(found.offset), 2.0, atol=0.1)


def test_an_empty_batch_has_no_measures():
    assert len(measure(torch.zeros(0, 1, SIDE, SIDE))) == 0


def largest(made, real):
    return max(distances(made, real).values())


def population(widths, axis_ratio=1.0):
    return measure(torch.cat([source(0.7, w, axis_ratio) for w in widths]))


def test_the_distance_is_nothing_to_itself_and_all_to_what_is_far():
    small, large = population([1.2, 1.4, 1.6]), population([2.4, 2.6, 2.8])
    assert largest(small, small) == 0
    assert distances(small, large)["flux"] == distances(small, large)["half_light"] == 1
    assert largest(small, large) == largest(large, small) == 1


def test_each_distance_sees_its_own_measure():
    round_, oval = population([2.0, 2.1, 2.2]), population([2.0, 2.1, 2.2], 0.5)
    assert distances(round_, oval)["ellipticity"] == 1


def test_images_without_a_source_are_left_out():
    blank = torch.full((2, 1, SIDE, SIDE), -1.0, dtype=torch.float64)
    images = torch.cat([source(dx=3.0), source(dx=4.0)])
    with_blank, without = measure(torch.cat([images, blank])), measure(images)
    assert largest(with_blank, without) == 0
    np.testing.assert_allclose(spread(with_blank), np.sqrt((9 + 16) / 2), atol=0.02)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(2, 2, SIDE, SIDE), "1 or 3 channels"),
        (torch.zeros(1, SIDE, SIDE), "give \\(n, C, H, W\\)"),
        (torch.zeros(1, 1, 4, SIDE), "8 pixels a side"),
        (torch.full((1, 1, SIDE, SIDE), 255.0), "clip them first"),
        (torch.full((1, 1, SIDE, SIDE), torch.nan), "not finite"),
    ],
)
def test_what_is_not_an_image_is_named(images, told):
    with pytest.raises(ValueError, match=told):
        measure(images)


def test_sets_without_a_source_are_named():
    none = measure(torch.full((2, 1, SIDE, SIDE), -1.0))
    some = measure(source())
    assert isinstance(none, Galaxies)
    with pytest.raises(ValueError, match="images of made"):
        distances(none, some)
    with pytest.raises(ValueError, match="images of real"):
        largest(some, none)
    with pytest.raises(ValueError, match="no source was found"):
        spread(none)
