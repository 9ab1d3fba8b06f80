"""What a grid of models and domains says as a whole: slopes, and the share of the variance of each factor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from ood_lib.metrics import Interval

__all__ = ["CrossedEffects", "crossed_effects"]

LEVEL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class CrossedEffects:
    """A mixed-effects summary of a table.

    Parameters
    ----------
    mean : Interval
        The outcome of a new cell, at the mean of the predictors, with a 95 % interval of this mean.
    slopes : dict of str to Interval
        For each predictor, the change of the outcome per standard deviation of it, with a 95 % interval.
    shares : dict of str to Interval
        For each factor, and for "left", the share of the variance that the predictors do not explain.
    n : int
        Rows.

    Examples
    --------
    >>> one = Interval(1.0, 1.0, 1.0)
    >>> CrossedEffects(one, {}, {"left": one}, 9).n
    9
    """

    mean: Interval
    slopes: dict[str, Interval]
    shares: dict[str, Interval]
    n: int


def crossed_effects(
    table: pd.DataFrame,
    outcome: str,
    *,
    predictors: Sequence[str] = (),
    factors: Sequence[str] = ("model", "domain"),
    resamples: int = 199,
    rng: np.random.Generator,
) -> CrossedEffects:
    r"""Fit a linear mixed model with crossed random intercepts.

    Parameters
    ----------
    table : DataFrame
        One row a cell.
    outcome : str
        Column to explain.
    predictors : sequence of str
        Columns with fixed slopes; they are standardised.
    factors : sequence of str, default ("model", "domain")
        Columns whose levels have random intercepts.
    resamples : int, default 199
        Parametric bootstrap samples for the intervals.
    rng : numpy.random.Generator
        Source of these samples.

    Returns
    -------
    CrossedEffects
        Mean, slopes and shares of variance with 95 % intervals.

    Raises
    ------
    ValueError
        If a value is missing or not finite, a factor has fewer than two levels, or a predictor is constant.

    Notes
    -----
    :math:`y_{ij} = \mu + \beta^\top x_{ij} + a_i + b_j + e_{ij}` with Gaussian :math:`a, b, e`, fitted by
    restricted maximum likelihood (statsmodels ``MixedLM``, variance components). What is left, e, holds the
    interaction of the factors and noise. For intervals the fitted law is sampled and fitted again, and their
    ends are percentiles of the refitted values.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> table = pd.DataFrame([(m, d) for m in "abcd" for d in "efgh"], columns=["model", "domain"])
    >>> table["y"] = 5.0 * table.domain.map(ord) + rng.normal(size=16)
    >>> found = crossed_effects(table, "y", resamples=9, rng=rng)
    >>> found.shares["domain"].value > 0.9
    True
    """
    _check(table, outcome, predictors, factors)
    x = table[[*predictors]]
    data = pd.concat([table[[*factors]], (x - x.mean()) / x.std()], axis=1).reset_index(drop=True)
    data["outcome"] = table[outcome].to_numpy(float)
    slopes, variances = _fit(data, predictors, factors)
    refits = [
        _fit(data.assign(outcome=_draw(data, slopes, variances, factors, rng)), predictors, factors)
        for _ in range(resamples)
    ]
    fixed = {
        name: _interval(slopes[name], [other[name] for other, _ in refits]) for name in slopes.index
    }
    return CrossedEffects(
        fixed.pop("mean"),
        fixed,
        {
            name: _interval(
                variances[name] / variances.sum(), [v[name] / v.sum() for _, v in refits]
            )
            for name in variances.index
        },
        len(data),
    )


def _check(
    table: pd.DataFrame, outcome: str, predictors: Sequence[str], factors: Sequence[str]
) -> None:
    numbers = table[[outcome, *predictors]].to_numpy(float)
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{(~np.isfinite(numbers)).any(1).sum()} rows lack {', '.join([outcome, *predictors])}; "
            "leave them out"
        )
    for name in factors:
        if table[name].nunique() < 2:
            raise ValueError(f"{name} has one level; a factor needs two or more")
    for name in predictors:
        if not table[name].std() > 0:
            raise ValueError(f"{name} is the same in all rows; leave it out")


def _fit(
    data: pd.DataFrame, predictors: Sequence[str], factors: Sequence[str]
) -> tuple[pd.Series, pd.Series]:
    """Estimate the fixed effects, and the variance of each factor and of what is left."""
    model = smf.mixedlm(
        " + ".join(["outcome ~ 1", *(f"Q('{name}')" for name in predictors)]),
        data,
        groups=np.ones(len(data)),
        vc_formula={name: f"0 + C(Q('{name}'))" for name in factors},
    )
    with warnings.catch_warnings():
        # a factor without variance lies at the edge of what is allowed, which is no failure
        for kind in (ConvergenceWarning, SingularMatrixWarning):
            warnings.simplefilter("ignore", kind)
        fitted = model.fit(reml=True, method=["lbfgs", "powell"])
    found = dict(zip(model.exog_vc.names, fitted.vcomp, strict=True)) | {"left": fitted.scale}
    slopes = pd.Series(fitted.fe_params.to_numpy(), index=["mean", *predictors])
    return slopes, pd.Series(found)[[*factors, "left"]]


def _draw(
    data: pd.DataFrame,
    slopes: pd.Series,
    variances: pd.Series,
    factors: Sequence[str],
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw an outcome from the fitted law."""
    made = slopes["mean"] + data[[*slopes.index[1:]]].to_numpy() @ slopes.iloc[1:].to_numpy()
    made = made + variances["left"] ** 0.5 * rng.standard_normal(len(data))
    for name in factors:
        codes, levels = pd.factorize(data[name])
        made = made + (variances[name] ** 0.5 * rng.standard_normal(len(levels)))[codes]
    return made


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    return Interval(float(value), *(float(x) for x in np.percentile(drawn, LEVEL)))
