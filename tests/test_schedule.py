"""Schedules and grids against closed forms and diffusers."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_lib.schedule import NoiseSchedule, from_diffusers, paper_grid, uniform_log_sigma, uniform_t

LINEAR = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
quick = settings(deadline=None, max_examples=50)


@pytest.mark.parametrize(
    ("t", "alpha_bar", "sigma_squared"),
    [(500, 0.0778, 11.85), (900, 2.70e-4, 3699), (999, 4.04e-5, 24780)],
)
def test_the_linear_schedule_has_its_known_values(t, alpha_bar, sigma_squared):
    assert LINEAR.alpha_bar_at(t) == pytest.approx(alpha_bar, rel=2e-3)
    assert LINEAR.sigma(t) ** 2 == pytest.approx(sigma_squared, rel=2e-3)


def test_integers_are_not_interpolated():
    t = np.arange(1000)
    np.testing.assert_allclose(LINEAR.alpha_bar_at(t), LINEAR.alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(LINEAR.sigma(t) ** 2, 1 / LINEAR.alpha_bar - 1, rtol=1e-10)


@quick
@given(st.integers(0, 998), st.floats(0, 1))
def test_log_sigma_is_linear_between_integers(k, part):
    left, right = np.log(LINEAR.sigma([k, k + 1]))
    assert LINEAR.log_sigma(k + part) == pytest.approx((1 - part) * left + part * right, abs=1e-12)


@quick
@given(st.floats(0, 999))
def test_timestep_of_a_noise_level_inverts_it(t):
    assert LINEAR.t_of_log_sigma(LINEAR.log_sigma(t)) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_from_diffusers_keeps_the_levels(scheduler, kind):
    theirs = scheduler(beta_schedule=kind)
    ours = from_diffusers(theirs)
    assert ours.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=1e-3)


@pytest.mark.parametrize(
    "alpha_bar",
    [
        [0.5],
        [0.5, 0.5],
        [0.4, 0.5],
        [1.0, 0.5],
        [0.5, 0.0],
        [0.5, -0.1],
        [0.5, np.nan],
        [[0.9, 0.5]],
    ],
)
def test_a_wrong_schedule_is_refused(alpha_bar):
    with pytest.raises(ValueError, match="alpha_bar"):
        NoiseSchedule(np.array(alpha_bar))


def test_a_schedule_that_ends_in_pure_noise_is_refused():
    with pytest.raises(ValueError, match="alpha_bar"):
        from_diffusers(DDPMScheduler(rescale_betas_zero_snr=True))


def test_an_object_without_betas_is_refused_by_type():
    with pytest.raises(ValueError, match="dict has no betas"):
        from_diffusers({})


@pytest.mark.parametrize("t", [-1, 999.5, 1000, np.nan, np.inf, [3, -0.1]])
def test_timesteps_outside_are_refused(t):
    with pytest.raises(ValueError, match=r"\[0, 999\]"):
        LINEAR.sigma(t)


@pytest.mark.parametrize(("t0", "n"), [(900, 80), (500, 40), (500, 60), (900, 901), (999, 2)])
def test_paper_grid_is_the_released_formula(t0, n):
    assert paper_grid(t0, n).tolist() == [t0 * k // (n - 1) for k in range(n)]


@quick
@given(st.integers(1, 999), st.integers(2, 1000))
def test_uniform_t_is_integer_even_and_strictly_increasing(t_end, n):
    n = min(n, t_end + 1)
    grid = uniform_t(LINEAR, n, t_end=t_end)
    assert (len(grid), grid[0], grid[-1]) == (n, 0, t_end)
    assert (grid == np.round(grid)).all()
    steps = np.diff(grid)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


@quick
@given(st.floats(0.5, 999), st.integers(2, 200))
def test_uniform_log_sigma_has_equal_ratios(t_end, n):
    grid = uniform_log_sigma(LINEAR, n, t_end=t_end)
    assert (len(grid), grid[0], grid[-1]) == (n, 0, t_end)
    assert (np.diff(grid) > 0).all()
    ratios = np.diff(np.log(LINEAR.sigma(grid)))
    np.testing.assert_allclose(ratios, ratios.mean(), rtol=1e-6)


def test_grids_end_at_the_last_level_by_default():
    assert uniform_t(LINEAR, 7)[-1] == uniform_log_sigma(LINEAR, 7)[-1] == 999


@pytest.mark.parametrize("grid", [uniform_t, uniform_log_sigma])
@pytest.mark.parametrize(
    ("n", "t_end"), [(1, None), (0, None), (5, 1000), (5, 0), (5, -3), (5, np.nan)]
)
def test_a_wrong_grid_is_refused(grid, n, t_end):
    with pytest.raises(ValueError, match="999"):
        grid(LINEAR, n, t_end=t_end)


def test_more_integers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="n <= 11"):
        uniform_t(LINEAR, 12, t_end=10)
    with pytest.raises(ValueError, match="n = 80, t0 = 50"):
        paper_grid(50, 80)


def test_grids_end_at_the_last_level_with_sigma_up_to_160():
    cosine = from_diffusers(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    assert LINEAR.t_end == 999
    assert cosine.sigma(cosine.t_end) <= 160 < cosine.sigma(cosine.t_end + 1)
    assert cosine.sigma(999) == pytest.approx(20_291, rel=1e-2)
    assert uniform_log_sigma(cosine, 5)[-1] == uniform_t(cosine, 5)[-1] == cosine.t_end
    assert uniform_t(cosine, 5, t_end=999)[-1] == 999
