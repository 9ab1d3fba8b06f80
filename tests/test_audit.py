"""The audit: all images in their order, whatever the chunk; what is left out is said; nothing leaves OUT."""

import ast
import json
import sys
from functools import partial
from inspect import signature

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

from ood_lib import audit, cli, reports
from ood_lib.audit import measure, render
from ood_lib.detectors import STATISTICS, OODDetector
from ood_lib.domains import load_images
from ood_lib.inversion import invert
from ood_lib.latents import LatentSet, LatentSpec
from ood_lib.models import load_model

SCORES = [*STATISTICS, "squared_norm"]
SMALL = {
    "BOOTSTRAP": 39,
    "PERMUTATIONS": 19,
    "RESAMPLES": 50,
    "REFERENCES": 16,
    "POINTS": 6,
    "ROUND_TRIPS": 6,
    "OWN_ROUND_TRIPS": 2,
    "DRAWN": 4,
}
PARTS = ("reconstruction", "gaussianity", "separability", "geometry", "ood", "latents")


def pictures(folder, n, *, seed=0, middle=128, contrast=127):
    """Write noisy grey pictures of 8 x 8, the first two in a folder below."""
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(n):
        pixels = (middle + contrast * rng.uniform(-1, 1, (8, 8))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if k < 2 else "") / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twenty pictures, and sixteen of another kind."""
    place = tmp_path_factory.mktemp("pictures")
    return pictures(place / "mine", 20), pictures(place / "own", 16, seed=1, middle=64, contrast=10)


@pytest.fixture(scope="module", autouse=True)
def project_folder(tmp_path_factory, tiny_folder):
    """Project with one tiny model for all tests of this module; what costs most is made small."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data" / "zoo").mkdir(parents=True)
    (folder / "data" / "domains").mkdir()
    (folder / "_config.yml").touch()
    (folder / "data" / "zoo" / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OOD_ROOT", str(folder))
        for name, value in SMALL.items():
            patch.setattr(audit, name, value)
        patch.setattr(audit.gaussianity, "report", partial(audit.gaussianity.report, draws=99))
        yield folder


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """The audit of twenty pictures against sixteen."""
    mine, own = folders
    return measure("tiny", mine, tmp_path_factory.mktemp("made") / "out", reference=own)


def rows_of(found):
    return pd.read_csv(found.out / "images.csv")


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------- what it tells


def test_every_image_has_a_row_in_the_order_of_the_names(made, folders):
    table = rows_of(made)
    assert table.columns[0] == "file"
    assert table["file"].tolist() == names(folders[0])
    assert np.isfinite(table[[*SCORES, "error_estimate"]]).all(axis=None)
    assert np.isfinite(table["psnr"]).sum() == audit.ROUND_TRIPS


def test_the_scores_are_those_of_the_detectors(made, folders, monkeypatch):
    model = load_model("tiny")
    own = load_images(str(folders[1]), like=model)
    mine = load_images(str(folders[0]), like=model)
    monkeypatch.setattr(
        "ood_lib.detectors.invert",
        lambda *args, preset, **more: invert(
            *args, points=audit.POINTS, solver=audit.SOLVER, **more
        ),
    )
    table = rows_of(made)
    for name in STATISTICS:
        detector = OODDetector(model, statistic=name).fit(own)
        np.testing.assert_allclose(table[name], detector.ood_score(mine), rtol=1e-4, atol=1e-4)
        if name == "mahalanobis":
            assert table["outlier"].tolist() == (detector.predict(mine) == -1).tolist()


def test_the_summary_has_every_part_with_an_interval_and_a_meaning(made):
    table = pd.read_csv(made.out / "summary.csv")
    assert table.columns.tolist() == ["measure", "value", "ci_low", "ci_high", "n", "meaning"]
    assert table["measure"].is_unique
    assert {name.partition(".")[0] for name in table["measure"]} == set(PARTS)
    spanned = table.dropna(subset="ci_low")
    assert (spanned["ci_low"] <= spanned["value"]).all()
    assert (spanned["value"] <= spanned["ci_high"]).all()
    assert table["meaning"].str.endswith(".").all()
    assert [x.measure for x in made.summary] == table["measure"].tolist()


def test_other_contrast_separates_and_the_controls_do_not(made):
    value = {x.measure: x for x in made.summary}
    assert value["separability.distance"].ci_low > 0.5
    control = value["separability.linear.control"]
    assert control.ci_low <= 0.5 <= control.ci_high
    assert value["gaussianity.F1.noise"].value > 0.01


def test_what_is_left_out_is_said_and_twenty_images_get_the_rest(made):
    left, rough = made.left_out
    assert "20 images; 56 or more" in left.reason
    assert "converged" in rough.part  # an untrained network bends its paths
    assert len(list((made.out / "samples").glob("0*.png"))) == audit.DRAWN
    record = json.loads((made.out / "audit.json").read_text())
    assert record["left_out"] == [vars(left), vars(rough)]
    assert record["reference"] == "16 images of own"


def test_enough_images_have_their_samples_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "DRAWN", 14)
    # the ImageNet network takes longer to compile than all the rest
    monkeypatch.setattr("ood_lib.sampling.imagenet", lambda x: x.flatten(1)[:, :8].double().numpy())
    found = measure("tiny", pictures(tmp_path / "many", 141), tmp_path / "out")
    told = {x.measure for x in found.summary}
    assert [x.part for x in found.left_out] == ["a proof that the latents converged"]
    assert {"samples.kid", "samples.kid.real", "samples.kid.twin", "samples.novelty"} <= told
    assert "the model itself made of noise" in found.reference
    assert rows_of(found)["psnr"].notna().sum() == audit.ROUND_TRIPS


# ------------------------------------------------------------- it does not matter how it was computed


def test_chunk_and_batch_change_nothing(made, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("OOD_ROOT", str(other_project(tmp_path)))
    mine, own = folders
    found = measure("tiny", mine, tmp_path / "out", reference=own, shard=3, batch_size=2)
    a, b = rows_of(made), rows_of(found)
    assert a["file"].tolist() == b["file"].tolist()
    for column in (*SCORES, "psnr"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-4)
    for x, y in zip(made.summary, found.summary, strict=True):
        assert x.measure == y.measure
        np.testing.assert_allclose(x.value, y.value, rtol=1e-3, atol=1e-3)


def other_project(tmp_path):
    """Copy of the project without the latents that others have left."""
    folder = tmp_path / "again"
    (folder / "data").mkdir(parents=True)
    (folder / "_config.yml").touch()
    for part in ("zoo", "domains"):
        (folder / "data" / part).symlink_to(
            audit.open_images.__globals__["project_root"]() / "data" / part
        )
    return folder


def test_a_second_run_gives_the_same_files(made, folders, tmp_path):
    again = measure("tiny", folders[0], tmp_path / "out", reference=folders[1])
    for name in (
        "images.csv",
        "reference.csv",
        "summary.csv",
        "gaussianity.csv",
        "separability.csv",
    ):
        assert (again.out / name).read_bytes() == (made.out / name).read_bytes(), name


def test_memory_holds_one_shard_and_the_chosen_latents(tmp_path):
    """A pass over shards that exist only while they are looked at."""
    model, rng = load_model("tiny"), np.random.default_rng(0)
    own = torch.from_numpy(rng.standard_normal((16, 1, 8, 8)))
    known = audit._Reference("noise", own.float().clamp(-1, 1), own, None)
    alive, most = [0], [0]

    class Counted(LatentSet):
        def __del__(self):
            alive[0] -= 1

    def parts():
        for first in range(0, 400, 10):
            drawn = torch.from_numpy(rng.standard_normal((10, 1, 8, 8))).float()
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            spec = LatentSpec("tiny", "x")
            yield Counted(
                drawn, drawn.clamp(-1, 1), spec, np.arange(2.0), 1, "ab2", "", first_row=first
            )

    tmp_path.joinpath("out").mkdir()
    run = audit._Run(
        model, tmp_path, tmp_path / "out", 0, 64, known, [f"{k:03d}" for k in range(400)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "JOINT", 30)
        patch.setattr(audit, "ROUND_TRIPS", 4)
        kept = run.score(parts())
    assert len(kept.rows) == 30
    assert sum(map(len, kept.latents)) == 30
    assert most[0] <= 2
    assert len(pd.read_csv(tmp_path / "out" / "images.csv")) == 400


def test_copies_are_scored_and_left_out_of_what_is_measured_together(folders, tmp_path):
    mine = pictures(tmp_path / "mine", 20)
    for k in range(3):
        (mine / f"copy{k}.png").write_bytes((mine / "005.png").read_bytes())
    (mine / "theirs.png").write_bytes((folders[1] / "005.png").read_bytes())
    found = measure("tiny", mine, tmp_path / "out", reference=folders[1])
    assert found.n == len(rows_of(found)) == 24
    assert any("4 copies" in x.reason for x in found.left_out)
    assert next(x.n for x in found.summary if x.measure == "geometry.norm") == 20


def test_a_handful_of_images_still_has_scores(folders, tmp_path):
    out = tmp_path / "out"
    measure("tiny", folders[0], out, reference=folders[1])
    found = measure("tiny", pictures(tmp_path / "few", 3), out, reference=folders[1])
    assert not (out / "gaussianity.csv").exists()  # nothing stays of the audit before
    assert len(rows_of(found)) == 3
    left = {x.part for x in found.left_out}
    assert {"gaussianity", "separability", "geometry"} <= left
    assert all(x.reason for x in found.left_out)


def test_medians_of_many_images_are_those_of_some_and_rough_latents_are_named(monkeypatch):
    table = pd.DataFrame({"squared_norm": np.arange(50.0), "outlier": False, "error_estimate": 0.2})
    monkeypatch.setattr(audit, "MEDIANS", 20)
    norm, *_ = audit._image_measures(table, table, np.random.default_rng(0))
    assert (norm.n, norm.ci_low <= norm.value <= norm.ci_high) == (20, True)
    run = audit._Run(None, None, None, 0, 1, None, [])
    run._doubt(table)
    assert "0.2, above 0.05" in run.left[0].reason


def test_a_network_elsewhere_is_called_from_the_cpu():
    model = load_model("tiny")
    moved = audit._called_from_cpu(model, "cpu:0")
    x = torch.zeros(2, 1, 8, 8)
    assert torch.equal(moved.eps(x, 5.0), model.eps(x, 5.0))


# ------------------------------------------------------------------------------------------ the page


def test_the_page_opens_by_itself_and_describes_its_figures(made):
    page = render(made.out)
    article = BeautifulSoup(page.read_text("utf-8"), "html.parser").find("article")
    text = article.get_text(" ")
    assert "20 images; 56 or more are needed" in text
    assert all(x.measure in text for x in made.summary)
    for absent in ("Traceback", "np.float64(", "<seaborn", "tensor(", str(made.out)):
        assert absent not in text
    figures = article.find_all("img")
    assert len(figures) == 4
    assert all(len(x["alt"]) > 20 and (page.parent / x["src"]).is_file() for x in figures)
    nbformat.validate(nbformat.read(made.out / "report.ipynb", 4))


def test_the_page_of_a_handful_says_what_it_lacks(folders, tmp_path, monkeypatch):
    found = measure("tiny", pictures(tmp_path / "few", 3), tmp_path / "out", reference=folders[1])
    monkeypatch.setattr(reports, "build_page", lambda folder, title: folder / "report.ipynb")
    text = render(found.out).read_text("utf-8")
    assert "This part was left out" in text
    assert all(x.reason[:40] in text for x in found.left_out)


@pytest.mark.parametrize("name", ["audit", "sweep"])
def test_a_template_tells_and_does_not_compute(name):
    for cell in nbformat.read(reports.TEMPLATES / f"{name}.ipynb", 4).cells:
        assert not cell.get("outputs")
        if cell.cell_type == "code":
            tree = ast.walk(ast.parse(cell.source))
            assert not any(isinstance(x, ast.FunctionDef | ast.ClassDef) for x in tree)
            assert len(cell.source.splitlines()) <= 15, cell.source


# ------------------------------------------------------------------------------------------ bad input


WRONG = {
    "no folder": ({"images": "nowhere"}, "images '.*nowhere' is no folder"),
    "empty": ({"images": "empty"}, "holds no images"),
    "no image": ({"images": "text"}, "notes.txt is not an image file"),
    "broken": ({"images": "broken"}, "cut.png is not a readable image"),
    "no reference": ({"reference": "nowhere"}, "reference '.*nowhere' is no folder"),
    "small reference": ({"reference": "three"}, "has 3 images that differ; give 12 or more"),
    "model": ({"model": "nope"}, "unknown model 'nope'; known are tiny"),
    "out among the images": ({"out": "mine/out"}, "whose files are the images"),
    "out is somebody's": ({"out": "text"}, "holds files that no audit made"),
    "out is a file": ({"out": "file"}, "is a file; give a folder"),
    "device": ({"device": "abacus"}, "abacus"),
    "shard": ({"shard": 0}, "shard of 0 images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_and_leaves_nothing(folders, tmp_path, case):
    given, message = WRONG[case]
    pictures(tmp_path / "mine", 4)
    pictures(tmp_path / "three", 3)
    for name in ("empty", "text", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "notes.txt").touch()
    (tmp_path / "broken" / "cut.png").write_bytes(b"\x89PNG")
    (tmp_path / "file").touch()
    before = names(tmp_path)
    chosen = {"model": "tiny", "images": "mine", "out": "out", "reference": folders[1], **given}
    for key in ("images", "out", "reference"):
        chosen[key] = tmp_path / chosen[key]
    with pytest.raises(ValueError, match=message):
        measure(**chosen)
    assert names(tmp_path) == before


def test_nothing_is_written_outside_out_and_runs(folders, project_folder, tmp_path, monkeypatch):
    """Whatever the words look like: no name of a file is made from them."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    mine = pictures(tmp_path / "a" / "mine", 12)
    (tmp_path / "a" / "model").symlink_to((project_folder / "data" / "zoo" / "tiny").resolve())
    before, project = set(names(tmp_path)), set(names(project_folder))
    measure("../b/../model", "../mine", "out", reference=str(folders[1]))
    fresh = set(names(tmp_path)) - before
    assert fresh
    assert all(x.startswith("a/b/out/") for x in fresh)
    assert all(x.startswith("runs/") for x in set(names(project_folder)) - project)
    assert names(mine)


# ---------------------------------------------------------------------------------------- the command


def test_every_option_of_the_command_arrives(monkeypatch, capsys, tmp_path):
    asked = {}

    def fake(model, images, out, **options):
        asked.update(model=model, images=images, out=out, **options)
        part = audit.LeftOut("samples", "too few")
        return audit.Audit(tmp_path, 3, "", (), (part,)), tmp_path / "report.html"

    monkeypatch.setattr(audit, "audit", fake)
    words = (
        "audit --model m --images i --out o --reference r --seed 3 --revision v --backend torch "
        "--device meta --batch-size 5 --shard 6"
    )
    monkeypatch.setattr(sys, "argv", ["ood", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert not end.value.code
    assert set(asked) == set(signature(measure).parameters)
    assert (asked["seed"], asked["shard"], str(asked["reference"])) == (3, 6, "r")
    assert "left out: samples (too few)" in err
    assert out.strip().endswith("report.html")


def test_a_wrong_word_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", f"ood audit --model tiny --images nowhere --out {tmp_path / 'out'}".split()
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert (
        err
        == "ood: images 'nowhere' is no folder; give a folder that holds nothing but image files\n"
    )
    assert not (tmp_path / "out").exists()
