"""Verdicts: judged from thresholds fixed in advance, written deterministically."""

import csv
import json
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch

from ood_lib import results
from ood_lib.files import project_root
from ood_lib.results import Control, ControlFailed, glue_values, judge, load_claims, write_verdicts

CLAIMS = """
claims:
  - id: X1
    statement: Latents are near.
    source: A1
    chapter: "01"
    status: tested
    criteria:
      - {id: X1.high, metric: "share | of draws", direction: ">=", threshold: 0.8, unit: share, text: less}
      - {id: X1.low, metric: error, direction: "<=", threshold: 0.1, unit: pixel, text: more}
  - id: X2
    statement: Latents are far.
    source: A1
    chapter: "02"
    status: open
    criteria:
      - {id: X2.far, metric: distance, direction: ">=", threshold: 5, unit: pixel, text: less}
  - id: X3
    statement: Is it known?
    source: R24-1
    chapter: none
    status: not tested here
    why: nobody can
  - id: X4
    statement: Is it near?
    source: R24-1
    chapter: "01"
    status: tested
    answered_by: [X1.high, X1.low]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setenv("OOD_ROOT", str(tmp_path))
    monkeypatch.delenv("OOD_SCALE", raising=False)
    return tmp_path


def verdict(criterion="X1.high", value=0.9, **options):
    return judge(criterion, value=value, **{"n": 64, "seeds": [0], "controls": {}, **options})


def both():
    return [verdict(), verdict("X1.low", np.float32(0.05), ci=(0.04, 0.123456789))]


# ------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("criterion", "value", "ci", "expected"),
    [
        ("X1.high", 0.9, (0.85, 0.95), "supported"),
        ("X1.high", 0.7, (0.6, 0.75), "not supported"),
        ("X1.high", 0.85, (0.7, 0.9), "inconclusive"),
        ("X1.high", 0.8, None, "supported"),
        ("X1.high", 0.79, None, "not supported"),
        ("X1.low", 0.05, (0.01, 0.09), "supported"),
        ("X1.low", 0.2, (0.15, 0.3), "not supported"),
        ("X1.low", 0.05, (0.01, 0.2), "inconclusive"),
        ("X1.low", 0.1, (0.1, 0.1), "supported"),
    ],
)
def test_the_interval_decides_and_without_one_the_value(project, criterion, value, ci, expected):
    assert verdict(criterion, value, ci=ci).verdict == expected


@pytest.mark.parametrize("value", [0.5, 0.9])
def test_the_other_direction_gives_the_other_verdict(project, monkeypatch, value):
    turned = {"X1.high": replace(load_claims()["X1"].criteria[0], direction="<=")}
    as_listed = verdict(value=value).verdict
    monkeypatch.setattr(results, "_criterion", turned.__getitem__)
    assert {as_listed, verdict(value=value).verdict} == {"supported", "not supported"}


def test_a_criterion_that_is_not_listed_is_refused(project):
    with pytest.raises(
        ValueError, match=r"'X1\.new' is not in data/claims\.yaml; known are X1\.high"
    ):
        verdict("X1.new")


def test_a_failed_control_stops_the_chapter(project):
    controls = {"noise": Control(0.5, 0.1, "<="), "power": Control(0.99, 0.9, ">=")}
    with pytest.raises(
        ControlFailed, match=r"X1\.high: control failed: noise \(0\.5, at most 0\.1"
    ):
        verdict(controls=controls)


def test_a_passed_control_is_recorded(project):
    record = verdict(controls={"power": Control(0.99, 0.9, ">=")}).as_dict()
    assert record["controls"]["power"] == {
        "value": 0.99,
        "threshold": 0.9,
        "direction": ">=",
        "passed": True,
    }


@pytest.mark.parametrize("value", [0.1, 0.9])
def test_a_quick_run_is_inconclusive(project, monkeypatch, value):
    assert verdict(value=value, scale="quick").verdict == "inconclusive"
    monkeypatch.setenv("OOD_SCALE", "quick")
    assert verdict(value=value).scale == "quick"
    assert verdict(value=value).verdict == "inconclusive"


def test_a_condition_limits_support_and_nothing_else(project):
    expected = "supported only under a stated condition"
    assert verdict(condition="at 100 steps").verdict == expected
    assert verdict(value=0.1, condition="at 100 steps").verdict == "not supported"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": float("nan")}, "give finite numbers"),
        ({"ci": (0.1, float("inf"))}, "give finite numbers"),
        ({"ci": (0.9, 0.1)}, r"reversed; give \(low, high\)"),
    ],
)
def test_numbers_that_cannot_be_judged_are_refused(project, options, message):
    with pytest.raises(ValueError, match=message):
        verdict(**options)


def test_every_verdict_names_its_scope_and_reads_as_a_sentence(project):
    given = verdict(ci=(0.85, 0.95))
    assert given.scope == "at 32x32"
    assert str(given) == (
        "X1.high: 0.9 share [0.85, 0.95], at least 0.8 share wanted, supported, at 32x32"
    )


@pytest.mark.parametrize("direction", ["<", ">", "=="])
def test_a_direction_is_one_of_two(direction):
    with pytest.raises(ValueError, match="use '>=' or '<='"):
        Control(0.5, 0.1, direction)


# ------------------------------------------------------------------------------------- writing


def test_the_file_is_valid_rounded_and_without_times_or_paths(project):
    path = write_verdicts("01", both(), params={"n": 64, "results_dir": str(project)})
    text = path.read_text()
    record = json.loads(text)
    jsonschema.validate(record, results.SCHEMA)
    assert path == project / "data" / "results" / "01.json"
    assert record["verdicts"][1]["ci_high"] == 0.123457
    assert record["params"] == {"n": 64}
    assert str(project) not in text
    assert not re.search(r"\d\d:\d\d|20\d\d-\d\d", text)


def test_the_same_verdicts_give_the_same_bytes(project):
    first = write_verdicts("01", both()).read_bytes()
    derived = [(project / name).read_bytes() for name in (results.LEDGER, results.SCORECARD)]
    assert write_verdicts("01", both()[::-1]).read_bytes() == first
    again = [(project / name).read_bytes() for name in (results.LEDGER, results.SCORECARD)]
    assert again == derived
    assert results.ledger_is_fresh()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([0], r"missing: X1\.low"),
        ([0, 1, 1], r"judged twice: X1\.low"),
        ([], r"missing: X1\.high, X1\.low"),
    ],
)
def test_no_criterion_is_left_out_or_judged_twice(project, chosen, message):
    with pytest.raises(ValueError, match=message):
        write_verdicts("01", [both()[i] for i in chosen])
    assert not (project / "data" / "results").exists()


def test_a_criterion_of_another_chapter_is_refused(project):
    with pytest.raises(ValueError, match=r"not of this chapter: X2\.far"):
        write_verdicts("01", [*both(), verdict("X2.far", 6)])


def test_a_quick_run_is_not_published(project):
    quick = [replace(v, scale="quick") for v in both()]
    with pytest.raises(ValueError, match="a quick run is not published"):
        write_verdicts("01", quick)
    assert write_verdicts("01", quick, results_dir="runs/here") == project / "runs/here/01.json"
    assert not (project / results.LEDGER).exists()


def test_a_value_that_is_no_json_is_refused(project):
    with pytest.raises(ValueError, match="record numbers, texts, lists or mappings"):
        write_verdicts("01", both(), params={"images": torch.zeros(3)})


@pytest.mark.parametrize("damage", ['{"chapter": "01"}', "{"])
def test_a_damaged_file_is_named(project, damage):
    path = write_verdicts("01", both())
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"01\.json.*run its chapter again"):
        results.ledger()


def test_the_ledger_has_one_row_for_each_criterion(project):
    write_verdicts("01", both())
    with (project / results.LEDGER).open() as file:
        rows = list(csv.DictReader(file))
    assert [r["criterion"] for r in rows] == ["X1.high", "X1.low"]
    assert tuple(rows[0]) == results.LEDGER_COLUMNS
    assert rows[1]["ci_high"] == "0.123457"


def test_the_scorecard_tells_every_verdict_and_every_claim_without_one(project):
    write_verdicts("01", both())
    table = (project / results.SCORECARD).read_text()
    assert (
        r"| X1.high | share \| of draws | at least 0.8 share | 0.9 share | supported | 01 |"
        in table
    )
    assert "| 0.05 pixel [0.04, 0.1235] | inconclusive |" in table
    assert "| X2 | Latents are far. | open, chapter 02 |" in table
    assert "| X3 | Is it known? | not tested here: nobody can |" in table
    assert "| X4 | Is it near? | answered by X1.high, X1.low |" in table


def test_a_scorecard_that_differs_from_the_verdicts_is_noticed(project):
    write_verdicts("01", both())
    (project / results.SCORECARD).write_text("edited by hand")
    assert not results.ledger_is_fresh()


def test_ids_must_differ(project):
    (project / "data" / "claims.yaml").write_text(CLAIMS.replace("X1.low", "X1.high"))
    with pytest.raises(ValueError, match=r"lists X1\.high, X1\.low|lists X1\.high more than once"):
        load_claims()


# ---------------------------------------------------------------------------------------- glue


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (np.float64(0.97), 0.97),
        (np.int64(7), 7),
        (torch.tensor([2.5]), 2.5),
        (np.array(3.0), 3.0),
        ("text", "text"),
        (1, 1),
    ],
)
def test_glue_stores_python_values(monkeypatch, given, stored):
    seen = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: seen.update({name: value}))
    glue_values({"it": given})
    assert seen["it"] == stored
    assert type(seen["it"]) is type(stored)


@pytest.mark.parametrize("value", [np.zeros(2), None, torch.zeros(0)])
def test_glue_refuses_what_is_not_one_value(value):
    with pytest.raises(ValueError, match="give one number or text"):
        glue_values({"it": value})


# --------------------------------------------------------------------- the claims of this project


def test_every_claim_of_the_paper_is_listed():
    wanted = {f"T{i}" for i in range(1, 9)} | {f"E{i}" for i in range(1, 14)}
    assert wanted <= set(load_claims())


def test_every_claim_is_tested_open_or_explained():
    claims = load_claims()
    criteria = {k.id for c in claims.values() for k in c.criteria}
    for claim in claims.values():
        assert claim.status in ("tested", "open", "not tested here"), claim.id
        assert claim.status != "tested" or claim.criteria or claim.answered_by, claim.id
        assert claim.status != "not tested here" or claim.why, claim.id
        assert claim.status != "open" or re.fullmatch(r"\d\d", claim.chapter), claim.id
        assert set(claim.answered_by) <= criteria, claim.id
        assert all(k.id.startswith(f"{claim.id}.") for k in claim.criteria), claim.id


def test_the_published_ledger_and_scorecard_equal_the_verdicts():
    assert results.ledger_is_fresh(), "run make book"


def test_published_thresholds_are_those_of_the_claims():
    listed = {k.id: k for c in load_claims().values() for k in c.criteria}
    for row in results.ledger():
        bar = listed[row["criterion"]]
        told = (row["metric"], row["direction"], row["threshold"], row["unit"])
        assert told == (bar.metric, bar.direction, bar.threshold, bar.unit)


def test_published_verdicts_follow_from_their_numbers():
    for path in sorted((project_root() / results.RESULTS_DIR).glob("[0-9][0-9].json")):
        for row in results.read_verdicts(path)["verdicts"]:
            ends = [row["value"]] if row["ci_low"] is None else [row["ci_low"], row["ci_high"]]
            sides = {
                x >= row["threshold"] if row["direction"] == ">=" else x <= row["threshold"]
                for x in ends
            }
            plain = {(True,): "supported", (False,): "not supported"}.get(
                tuple(sides), "inconclusive"
            )
            assert row["verdict"].startswith(plain), row["criterion"]


@pytest.mark.parametrize(
    "criterion",
    [c for claim in results.load_claims().values() for c in claim.criteria],
    ids=lambda c: c.id,
)
def test_every_criterion_can_be_supported_and_refuted(criterion):
    sign = 1 if criterion.direction == ">=" else -1
    for side, verdict in ((1, "supported"), (-1, "not supported")):
        value = criterion.threshold + side * sign * 0.5 * abs(criterion.threshold)
        judged = results.judge(
            criterion.id, value=value, n=64, seeds=[0], controls={}, scale="book"
        )
        assert judged.verdict == verdict
