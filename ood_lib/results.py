"""Verdicts: a measured value against a threshold fixed in advance, as JSON, ledger and table.

The thresholds stand in ``data/claims.yaml`` and nowhere else. `judge` takes the id of a criterion
and refuses one that is not listed, so that no chapter can move its own bar.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ood_lib.files import project_root, write_text

__all__ = [
    "VERDICTS",
    "Claim",
    "Control",
    "ControlFailed",
    "Criterion",
    "Verdict",
    "glue_values",
    "glue_verdicts",
    "judge",
    "ledger",
    "ledger_files",
    "ledger_is_fresh",
    "load_claims",
    "read_verdicts",
    "scorecard_table",
    "write_ledger",
    "write_verdicts",
]

VERDICTS = (
    "supported",
    "not supported",
    "supported only under a stated condition",
    "inconclusive",
    "not tested here",
)
SCOPE = "at 32x32"
RESULTS_DIR = "data/results"
LEDGER = "data/results/ledger.csv"
SCORECARD = "book/_generated/scorecard_table.md"
WANTED = {">=": "at least", "<=": "at most"}
LEDGER_COLUMNS = (
    "chapter",
    "claim",
    "criterion",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "direction",
    "threshold",
    "unit",
    "n",
    "seeds",
    "nfe",
    "scale",
    "scope",
    "verdict",
    "condition",
    "note",
)

_NUMBER = {"type": "number"}
_MAYBE = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_DIRECTION = {"enum": list(WANTED)}
_PARAMS = {"type": "object", "additionalProperties": {"not": {"type": "object"}}}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """Describe an object that has exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_CONTROL_SCHEMA = _closed(
    {"value": _NUMBER, "threshold": _NUMBER, "direction": _DIRECTION, "passed": {"const": True}}
)
_VERDICT_SCHEMA = _closed(
    {
        "claim": _TEXT,
        "criterion": {"type": "string", "pattern": r"^[A-Z]\w*\.\w+$"},
        "metric": _TEXT,
        "direction": _DIRECTION,
        "threshold": _NUMBER,
        "unit": _TEXT,
        "value": _NUMBER,
        "ci_low": _MAYBE,
        "ci_high": _MAYBE,
        "n": {"type": "integer", "minimum": 1},
        "seeds": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        "controls": {"type": "object", "additionalProperties": _CONTROL_SCHEMA},
        "params": _PARAMS,
        "nfe": {"type": "integer", "minimum": 0},
        "device": _TEXT,
        "dtype": _TEXT,
        "note": _TEXT,
        "condition": _TEXT,
        "scale": _TEXT,
        "scope": {"const": SCOPE},
        "verdict": {"enum": list(VERDICTS)},
    }
)
SCHEMA = _closed(
    {
        "chapter": {"type": "string", "pattern": r"^\d\d$"},
        "params": _PARAMS,
        "versions": _closed({"torch": _TEXT, "diffusers": _TEXT}),
        "verdicts": {"type": "array", "items": _VERDICT_SCHEMA, "minItems": 1},
    }
)


class ControlFailed(RuntimeError):
    """A control did not behave as it must: a bug in the experiment, never a finding."""


@dataclass(frozen=True)
class Criterion:
    """One threshold of a claim.

    Parameters
    ----------
    id : str
        Claim and name, such as ``"E1.reconstruction"``.
    metric : str
        What is measured.
    direction : {">=", "<="}
        Side of the threshold that supports the claim.
    threshold : float
        The bar, in `unit`.
    unit : str
        Unit of the value and of the threshold.
    text : str
        What counts against the claim.
    """

    id: str
    metric: str
    direction: str
    threshold: float
    unit: str
    text: str

    def __post_init__(self) -> None:
        if self.direction not in WANTED:
            raise ValueError(f"{self.id} has direction {self.direction!r}; use '>=' or '<='")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper or question of its reviewers, as ``data/claims.yaml`` has it."""

    id: str
    statement: str
    source: str
    chapter: str
    status: str
    why: str = ""
    planned: str = ""
    note: str = ""
    answered_by: tuple[str, ...] = ()
    criteria: tuple[Criterion, ...] = ()


@dataclass(frozen=True)
class Control:
    """A value that must fall on one side of a threshold, whatever the paper claims.

    Parameters
    ----------
    value : float
        What was measured.
    threshold : float
        The bar, fixed in the notebook before the run.
    direction : {">=", "<="}
        Side on which the value must fall.

    Examples
    --------
    >>> Control(0.49, 0.55, "<=").passed
    True
    """

    value: float
    threshold: float
    direction: str

    def __post_init__(self) -> None:
        if self.direction not in WANTED:
            raise ValueError(f"a control has direction {self.direction!r}; use '>=' or '<='")

    @property
    def passed(self) -> bool:
        """Whether the value is on the required side."""
        return _on_side(self.value, self.direction, self.threshold)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one criterion; made by `judge`, which fills `verdict`.

    Parameters
    ----------
    criterion : Criterion
        The threshold, from ``data/claims.yaml``.
    value : float
        What was measured, in the unit of the criterion.
    verdict : str
        One of `VERDICTS`.
    ci_low, ci_high : float, optional
        Confidence interval of the value.
    n : int
        How many images or draws the value rests on.
    seeds : tuple of int
        Seeds of the run.
    controls : dict of str to Control
        Controls by name; all have passed.
    params : dict
        Settings of this criterion beyond the parameters of the chapter.
    nfe : int
        Network calls for each image, 0 where no network is called.
    device, dtype, note : str
        Where and in what precision it ran, and what a reader must know.
    condition : str
        The condition under which the claim holds, if it holds only under one.
    scale : str
        Scale of the run: "quick", "book", "study" or "paper".
    scope : str
        The resolution that the verdict speaks of.
    """

    criterion: Criterion
    value: float
    verdict: str
    ci_low: float | None
    ci_high: float | None
    n: int
    seeds: tuple[int, ...]
    controls: Mapping[str, Control] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    nfe: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    note: str = ""
    condition: str = ""
    scale: str = "book"
    scope: str = SCOPE

    @property
    def criterion_id(self) -> str:
        """Id of the criterion."""
        return self.criterion.id

    @property
    def threshold(self) -> float:
        """Threshold of the criterion."""
        return self.criterion.threshold

    @property
    def claim(self) -> str:
        """Id of the claim that the criterion belongs to."""
        return self.criterion.id.partition(".")[0]

    def __str__(self) -> str:
        """One sentence: value, interval, bar, verdict, scope."""
        return f"{self.criterion.id}: {_measured(self.as_dict())}, {self.verdict}, {self.scope}"

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values, floats rounded to six significant digits."""
        own = {k: v for k, v in asdict(self).items() if k not in ("criterion", "controls")}
        bar = asdict(self.criterion)
        controls = {k: {**asdict(c), "passed": c.passed} for k, c in self.controls.items()}
        named = {k: bar[k] for k in ("metric", "direction", "threshold", "unit")}
        return _plain(
            {**own, **named, "claim": self.claim, "criterion": bar["id"], "controls": controls}
        )


def load_claims(path: Path | None = None) -> dict[str, Claim]:
    """Read the claims and their thresholds.

    Parameters
    ----------
    path : Path, optional
        The YAML file; ``data/claims.yaml`` by default.

    Returns
    -------
    dict of str to Claim
        In the order of the file.

    Raises
    ------
    ValueError
        If an id of a claim or of a criterion occurs twice.

    Examples
    --------
    >>> load_claims()["E1"].chapter
    '08'
    """
    entries = yaml.safe_load((path or project_root() / "data" / "claims.yaml").read_text("utf-8"))
    claims = [_claim(entry) for entry in entries["claims"]]
    ids = [c.id for c in claims] + [k.id for c in claims for k in c.criteria]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(
            f"claims.yaml lists {', '.join(twice)} more than once; give each its own id"
        )
    return {claim.id: claim for claim in claims}


def _claim(entry: dict[str, Any]) -> Claim:
    criteria = tuple(Criterion(**criterion) for criterion in entry.get("criteria", ()))
    answered = tuple(entry.get("answered_by", ()))
    return Claim(**{**entry, "criteria": criteria, "answered_by": answered})


def _criterion(criterion_id: str) -> Criterion:
    known = {k.id: k for claim in load_claims().values() for k in claim.criteria}
    if criterion_id not in known:
        raise ValueError(
            f"criterion {criterion_id!r} is not in data/claims.yaml; known are "
            f"{', '.join(known)}; write its threshold there before the run"
        )
    return known[criterion_id]


def _on_side(value: float, direction: str, threshold: float) -> bool:
    return value >= threshold if direction == ">=" else value <= threshold


def _outcome(criterion: Criterion, low: float, high: float) -> str:
    """Place the interval [low, high]: on the right side, on the wrong side, or across."""
    sides = [_on_side(x, criterion.direction, criterion.threshold) for x in (low, high)]
    if all(sides):
        return "supported"
    return "inconclusive" if any(sides) else "not supported"


def _check_numbers(criterion_id: str, low: float, value: float, high: float) -> None:
    if not all(map(math.isfinite, (low, value, high))):
        raise ValueError(
            f"{criterion_id}: value {value}, interval [{low}, {high}]; give finite numbers"
        )
    if low > high:
        raise ValueError(f"{criterion_id}: interval [{low}, {high}] is reversed; give (low, high)")


def judge(
    criterion_id: str,
    *,
    value: float,
    ci: tuple[float, float] | None = None,
    n: int,
    seeds: Sequence[int],
    controls: Mapping[str, Control],
    params: Mapping[str, Any] | None = None,
    nfe: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    note: str = "",
    condition: str = "",
    scale: str | None = None,
) -> Verdict:
    """Judge one value against the threshold that ``data/claims.yaml`` holds for it.

    Parameters
    ----------
    criterion_id : str
        Id of the criterion, such as ``"E1.reconstruction"``.
    value : float
        What was measured, in the unit of the criterion.
    ci : tuple of float, optional
        Interval ``(low, high)``. It decides where it is given; else the value does.
    n : int
        How many images or draws the value rests on.
    seeds : sequence of int
        Seeds of the run.
    controls : mapping of str to Control
        Controls by name; one that fails stops the chapter.
    params : mapping, optional
        Settings of this criterion beyond the parameters of the chapter.
    nfe : int, default 0
        Network calls for each image.
    device, dtype, note : str
        Where and in what precision it ran, and what a reader must know.
    condition : str, optional
        The condition under which the claim holds; turns "supported" into "supported only under a
        stated condition".
    scale : str, optional
        Scale of the run; ``$OOD_SCALE``, which the runner sets, or "book" by default. A "quick" run
        is always inconclusive.

    Returns
    -------
    Verdict
        With threshold, direction and outcome filled in.

    Raises
    ------
    ControlFailed
        If a control fails.
    ValueError
        If the criterion is unknown, a number is not finite, or the interval is reversed.

    Examples
    --------
    >>> judge("E1.reconstruction", value=30.0, ci=(29, 31), n=64, seeds=[0], controls={}).verdict
    'supported'
    """
    criterion = _criterion(criterion_id)
    low, high = ci if ci is not None else (value, value)
    _check_numbers(criterion_id, low, value, high)
    failed = [
        f"{name} ({c.value:.6g}, {_bar(asdict(c))} wanted)"
        for name, c in controls.items()
        if not c.passed
    ]
    if failed:
        raise ControlFailed(
            f"{criterion_id}: control failed: {'; '.join(failed)}; mend the experiment"
        )
    scale = scale or os.environ.get("OOD_SCALE", "book")
    outcome = "inconclusive" if scale == "quick" else _outcome(criterion, low, high)
    if condition and outcome == "supported":
        outcome = "supported only under a stated condition"
    return Verdict(
        criterion,
        float(value),
        outcome,
        None if ci is None else float(low),
        None if ci is None else float(high),
        n=int(n),
        seeds=tuple(map(int, seeds)),
        controls=dict(controls),
        params=dict(params or {}),
        nfe=int(nfe),
        device=device,
        dtype=dtype,
        note=note,
        condition=condition,
        scale=scale,
    )


def _scalar(value: Any) -> Any:
    """Turn a numpy or torch scalar, or an array of one element, into a Python number."""
    one = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if one else value


def _plain(value: Any) -> Any:
    """Turn a value into JSON types; numpy and torch scalars become Python numbers."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    value = _scalar(value)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(
        f"{value!r} is a {type(value).__name__}; record numbers, texts, lists or mappings"
    )


def _check_complete(chapter: str, verdicts: Sequence[Verdict]) -> None:
    """Refuse a chapter that leaves a criterion out, judges one twice, or one of another."""
    given = [v.criterion.id for v in verdicts]
    own = [c for c in load_claims().values() if c.chapter == chapter]
    wanted = {k.id for c in own for k in c.criteria if c.status == "tested"}
    faults = {
        "missing": sorted(wanted - set(given)),
        "not of this chapter": sorted(set(given) - {k.id for c in own for k in c.criteria}),
        "judged twice": sorted({i for i in given if given.count(i) > 1}),
    }
    told = [f"{fault}: {', '.join(ids)}" for fault, ids in faults.items() if ids]
    if told or not given:
        raise ValueError(
            f"chapter {chapter} must give one verdict for each criterion that data/claims.yaml "
            f"lists for it; {'; '.join(told) or 'there are none'}"
        )


def write_verdicts(
    chapter: str,
    verdicts: Sequence[Verdict],
    *,
    params: Mapping[str, Any] | None = None,
    results_dir: str | Path = RESULTS_DIR,
) -> Path:
    """Write the verdicts of a chapter as JSON; published ones renew the ledger and the scorecard.

    Parameters
    ----------
    chapter : str
        Two digits, such as ``"08"``.
    verdicts : sequence of Verdict
        One for each criterion that ``data/claims.yaml`` lists for the chapter.
    params : mapping, optional
        Parameters of the run. ``results_dir`` is left out: a path is no setting.
    results_dir : str or Path, default "data/results"
        Folder, relative to the project.

    Returns
    -------
    Path
        The file written, ``NN.json``. Same verdicts, same text: no times, no paths.

    Raises
    ------
    ValueError
        If a criterion is missing, judged twice or of another chapter, if the record breaks the
        schema, or if a quick run would be published.
    """
    _check_complete(chapter, verdicts)
    folder = (project_root() / results_dir).resolve()
    published = folder == (project_root() / RESULTS_DIR).resolve()
    if published and any(v.scale == "quick" for v in verdicts):
        raise ValueError(
            f"a quick run is not published; give a results_dir other than {RESULTS_DIR}"
        )
    record = {
        "chapter": chapter,
        "params": _plain({k: v for k, v in (params or {}).items() if k != "results_dir"}),
        "versions": {name: version(name).partition("+")[0] for name in ("torch", "diffusers")},
        "verdicts": [v.as_dict() for v in sorted(verdicts, key=lambda v: v.criterion.id)],
    }
    path = folder / f"{chapter}.json"
    _validate(record, str(path))
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")
    if published:
        write_ledger()
    return path


def _validate(record: Any, name: str) -> None:
    try:
        jsonschema.validate(record, SCHEMA)
    except jsonschema.ValidationError as error:
        raise ValueError(
            f"{name}: {error.json_path}: {error.message}; run its chapter again"
        ) from error


def read_verdicts(path: Path) -> dict[str, Any]:
    """Read and check one verdict file.

    Parameters
    ----------
    path : Path
        A file that `write_verdicts` wrote.

    Returns
    -------
    dict
        The record: chapter, params, versions, verdicts.

    Raises
    ------
    ValueError
        If the file is not JSON or breaks the schema.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); run its chapter again") from error
    _validate(record, str(path))
    return record


def ledger(results_dir: Path | None = None) -> list[dict[str, Any]]:
    """Collect every published verdict.

    Parameters
    ----------
    results_dir : Path, optional
        Folder of the ``NN.json`` files; ``data/results`` by default.

    Returns
    -------
    list of dict
        One row for each criterion, ordered by chapter and criterion, with `LEDGER_COLUMNS` as keys.
    """
    folder = results_dir or project_root() / RESULTS_DIR
    rows = []
    for path in sorted(folder.glob("[0-9][0-9].json")):
        record = read_verdicts(path)
        rows += [_ledger_row(record["chapter"], verdict) for verdict in record["verdicts"]]
    return rows


def _ledger_row(chapter: str, verdict: dict[str, Any]) -> dict[str, Any]:
    row = {**verdict, "chapter": chapter, "seeds": " ".join(map(str, verdict["seeds"]))}
    return {column: row[column] for column in LEDGER_COLUMNS}


def write_ledger() -> None:
    """Write ``data/results/ledger.csv`` and the scorecard's table from the verdict files."""
    for name, text in ledger_files(ledger()).items():
        write_text(project_root() / name, text)


def ledger_is_fresh() -> bool:
    """Tell whether the ledger and the table of the scorecard say what the verdict files say.

    Returns
    -------
    bool
        False if one of the two is missing, too.
    """
    paths = {project_root() / name: text for name, text in ledger_files(ledger()).items()}
    return all(path.is_file() and path.read_text("utf-8") == text for path, text in paths.items())


def ledger_files(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Render what is derived from the verdict files.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of `ledger`.

    Returns
    -------
    dict of str to str
        Text by file name, relative to the project: the CSV ledger and the table of the scorecard.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, LEDGER_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {LEDGER: stream.getvalue(), SCORECARD: scorecard_table(rows)}


def _bar(row: Mapping[str, Any]) -> str:
    """Write a threshold in words: "at least 26.4 dB"."""
    return f"{WANTED[row['direction']]} {row['threshold']:.6g} {row.get('unit', '')}".rstrip()


def _measured(row: Mapping[str, Any]) -> str:
    """Write value, interval and bar: "27.1 dB [26.8, 27.4], at least 26.4 dB wanted"."""
    return f"{_value(row)}, {_bar(row)} wanted"


def _value(row: Mapping[str, Any]) -> str:
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
    return f"{row['value']:.4g} {row['unit']}{interval}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Render a Markdown table; a bar inside a cell would end the cell, so it is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


def _chapter_link(chapter: str) -> str:
    """Link to the page of a chapter where it has one, else its number alone."""
    pages = sorted((project_root() / "notebooks").glob(f"{chapter}_*.ipynb"))
    return f"{{doc}}`{chapter} </book/chapters/{pages[0].stem}>`" if pages else chapter


def scorecard_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render the scorecard: every verdict, then every claim and question that has none.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of `ledger`.

    Returns
    -------
    str
        Two Markdown tables.

    Examples
    --------
    >>> scorecard_table([]).splitlines()[0]
    '| Criterion | What is measured | Wanted | Found | Verdict | Chapter |'
    """
    judged = [
        [r["criterion"], r["metric"], _bar(r), _value(r), _told(r), _chapter_link(r["chapter"])]
        for r in rows
    ]
    header = ["Criterion", "What is measured", "Wanted", "Found", "Verdict", "Chapter"]
    open_claims = [c for c in load_claims().values() if c.id not in {r["claim"] for r in rows}]
    others = [[c.id, c.statement, _state(c)] for c in open_claims]
    lines = [
        *_table(header, judged),
        "",
        f"Every verdict is {SCOPE}. The claims and questions without a verdict of their own:",
        "",
        *_table(["Id", "Claim or question", "State"], others),
    ]
    return "\n".join(lines) + "\n"


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['verdict']}: {row['condition']}" if row["condition"] else row["verdict"]


def _state(claim: Claim) -> str:
    if claim.status == "not tested here":
        return f"not tested here: {claim.why}"
    if claim.answered_by:
        return f"answered by {', '.join(claim.answered_by)}"
    return f"open, chapter {claim.chapter}"


def glue_values(values: Mapping[str, Any]) -> None:
    """Store numbers of a notebook under names that the prose can quote.

    Parameters
    ----------
    values : mapping
        Numbers or texts by name. NumPy and torch scalars become Python numbers first: MyST-NB
        prints them as ``np.float64(...)`` otherwise.

    Raises
    ------
    ValueError
        If a value is not one number or text.

    Examples
    --------
    >>> glue_values({"curve": [1, 2]})
    Traceback (most recent call last):
    ...
    ValueError: glue value 'curve' is a list; give one number or text
    """
    from myst_nb import glue

    for name, value in values.items():
        plain = _scalar(value)
        if not isinstance(plain, int | float | str):
            raise ValueError(
                f"glue value {name!r} is a {type(value).__name__}; give one number or text"
            )
        glue(name, plain, display=False)


def glue_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Store value, bar and verdict of each criterion under names that the prose can quote.

    Parameters
    ----------
    verdicts : sequence of Verdict
        Criterion ``X.y`` gives ``X.y.value`` (three significant digits), ``X.y.bar`` and
        ``X.y.verdict``.

    Examples
    --------
    >>> glue_verdicts([])
    """
    for verdict in verdicts:
        name = verdict.criterion.id
        glue_values({f"{name}.value": f"{verdict.value:.3g}", f"{name}.verdict": verdict.verdict})
        glue_values({f"{name}.bar": f"{verdict.criterion.threshold:g}"})
