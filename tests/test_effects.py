"""Mixed-effects summaries: the closed form of balanced tables, and intervals that cover."""

import numpy as np
import pandas as pd
import pytest

from ood_lib.effects import crossed_effects


def table_of(rng, *, models=7, domains=7, spread=(0.5, 1.0, 0.7), slope=0.0):
    rows = pd.DataFrame(
        [(f"m{i}", f"d{j}") for i in range(models) for j in range(domains)],
        columns=["model", "domain"],
    )
    rows["gap"] = rng.standard_normal(len(rows))
    by_model, by_domain = (
        s * rng.standard_normal(n) for s, n in zip(spread, (models, domains), strict=False)
    )
    rows["y"] = (
        slope * (rows.gap - rows.gap.mean()) / rows.gap.std()
        + np.repeat(by_model, domains)
        + np.tile(by_domain, models)
        + spread[2] * rng.standard_normal(len(rows))
    )
    return rows


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_shares_are_those_of_the_analysis_of_variance(seed):
    """Searle, Casella and McCulloch, Variance Components (1992), 4.3: balanced REML is ANOVA."""
    table = table_of(np.random.default_rng(seed))
    cells = table.pivot_table(index="model", columns="domain", values="y").to_numpy()
    rows, columns = (cells.mean(axis=k) - cells.mean() for k in (1, 0))
    left = np.square(cells - cells.mean() - rows[:, None] - columns).sum() / 36
    model, domain = (np.square(x).sum() / 6 - left / 7 for x in (rows, columns))
    assert min(model, domain) > 0  # else the two differ
    expected = np.array([model, domain, left]) / (model + domain + left)
    found = crossed_effects(table, "y", resamples=2, rng=np.random.default_rng(0))
    assert [found.shares[k].value for k in ("model", "domain", "left")] == pytest.approx(
        expected, abs=2e-3
    )
    assert found.n == 49


def test_a_slope_is_found_and_holds_per_standard_deviation():
    table = table_of(np.random.default_rng(5), slope=2.0)
    found, scaled = (
        crossed_effects(t, "y", predictors=["gap"], resamples=19, rng=np.random.default_rng(0))
        for t in (table, table.assign(gap=100 * table.gap + 7))
    )
    slope = found.slopes["gap"]
    assert slope.low < 2 < slope.high
    assert slope.value == pytest.approx(2, abs=0.4)
    assert scaled.slopes["gap"].value == pytest.approx(slope.value, abs=1e-3)


@pytest.mark.slow
def test_intervals_of_slopes_cover():
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = table_of(rng, slope=0.3)
        slope = crossed_effects(table, "y", predictors=["gap"], resamples=99, rng=rng).slopes["gap"]
        inside += slope.low <= 0.3 <= slope.high
    assert inside >= 51  # 57 are expected; 2.5 % of runs have fewer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.nan}, "49 rows lack y, gap"),
        ({"model": "one"}, "model has one level"),
        ({"gap": 1.0}, "gap is the same in all rows"),
    ],
)
def test_tables_that_cannot_be_fitted_are_refused(change, message):
    table = table_of(np.random.default_rng(0)).assign(**change)
    with pytest.raises(ValueError, match=message):
        crossed_effects(table, "y", predictors=["gap"], rng=np.random.default_rng(0))
