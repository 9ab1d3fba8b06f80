"""Chapters: their sources, their freshness by content, and their execution."""

import ast
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from ood_lib import chapters
from ood_lib.chapters import ChapterFailed, run_chapter, source_hash, stale_chapters
from ood_lib.files import project_root
from ood_lib.results import LEDGER, SCORECARD, load_claims, read_verdicts

SLUG = "01_tiny"
CLAIMS = """
claims:
  - {id: X1, statement: It holds., source: A1, chapter: "01", status: tested, criteria: [
      {id: X1.high, metric: share, direction: ">=", threshold: 0.8, unit: share, text: less}]}
  - {id: X2, statement: Other., source: A1, chapter: "02", status: open}
"""
PARAMETERS = """\
n: int = 8  # images
eta: float = 0.5
domain: str = "digits"
trained: bool = True
levels: list[int] = [1, 2]
limit: int | None = None
results_dir: str = "data/results"
"""
RUN = """\
import sys
import numpy as np
from near import tell
from ood_lib.results import Control, glue_values, judge, write_verdicts
print("a warning that a reader must see", file=sys.stderr)
control = {"ok": Control(0.0, 1.0, "<=")}
share = judge("X1.high", value=0.9, n=n, seeds=[0], controls=control)
write_verdicts("01", [share], params={"n": n}, results_dir=results_dir)
glue_values({"n_images": np.int64(n)})
print(tell(n))
"""
PACKAGE = {
    "__init__": '"""A library."""\nfrom near_lib.far import carry\n',
    "near": '"""Near."""\nfrom typing import TYPE_CHECKING\n'
    "if TYPE_CHECKING:\n    from near_lib.typed import T\n"
    'def tell(n):\n    """Tell."""\n    from near_lib.deep import go\n    return go(n)\n',
    "deep": "def go(n):\n    return n + 1\n",
    "far": "from . import near\ndef carry():\n    return 1\n",
    "typed": "T = int\n",
    "unused": "Y = 1\n",
}


def write_notebook(root, *, run="from near_lib.near import tell\ntell(1)", slug=SLUG, extra=()):
    """Write a chapter of a title, its parameters, one cell, and more cells."""
    cells = [
        new_markdown_cell("# Tiny", id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(run, id="run"),
        *extra,
    ]
    ood = {"data": ["data/points.txt", "data/set"], "latents": [{"model": "m", "domain": "d"}]}
    notebook = new_notebook(cells=cells, metadata={"ood": ood})
    path = root / "notebooks" / f"{slug}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Make a project of one chapter and a library of its own."""
    root = tmp_path / "project"
    (root / "data" / "set").mkdir(parents=True)
    (root / "data" / "claims.yaml").write_text(CLAIMS)
    (root / "data" / "points.txt").write_text("1 2 3")
    (root / "data" / "set" / "a.bin").write_bytes(b"a")
    (root / "_config.yml").touch()
    (root / "near_lib").mkdir()
    for name, text in PACKAGE.items():
        (root / "near_lib" / f"{name}.py").write_text(text)
    monkeypatch.setenv("OOD_ROOT", str(root))
    monkeypatch.setattr(chapters, "PACKAGE", root / "near_lib")
    write_notebook(root)
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ------------------------------------------------------------------------------------ freshness


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("near_lib/near.py", '"""Near."""', '"""Nearer, in more words."""'),
        ("near_lib/near.py", '    """Tell."""\n', ""),
        ("near_lib/deep.py", "return n + 1", "return (n + 1)  # one more"),
        ("near_lib/typed.py", "T = int", "T = float"),
        ("near_lib/unused.py", "Y = 1", "Y = 2"),
        ("near_lib/far.py", "return 1", "return 2"),
        ("data/claims.yaml", "Other.", "Another."),
        ("data/claims.yaml", "claims:", "# A comment.\nclaims:"),
    ],
)
def test_the_hash_ignores_words_and_what_is_not_used(project, file, old, new):
    before = source_hash(SLUG)
    edit(project / file, old, new)
    assert source_hash(SLUG) == before


def test_the_hash_ignores_outputs_and_times(project):
    before = source_hash(SLUG)
    path = project / "notebooks" / f"{SLUG}.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[2].execution_count = 3
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    notebook.cells[2].metadata["execution"] = {"iopub.status.busy": "2020-01-01"}
    nbformat.write(notebook, path)
    (project / "data" / "set" / ".hidden").touch()
    for file in project.rglob("*.*"):
        os.utime(file, (1, 1))
    assert source_hash(SLUG) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("near_lib/near.py", "return go(n)", "return go(n + 1)"),
        ("near_lib/deep.py", "n + 1", "n + 2"),
        ("data/points.txt", "3", "4"),
        ("data/set/a.bin", "a", "b"),
        ("data/claims.yaml", "threshold: 0.8", "threshold: 0.7"),
        ("notebooks/01_tiny.ipynb", "tell(1)", "tell(2)"),
        ("notebooks/01_tiny.ipynb", "# Tiny", "# Tinier"),
        ("notebooks/01_tiny.ipynb", "n: int = 8", "n: int = 9"),
        ("notebooks/01_tiny.ipynb", '"model": "m"', '"model": "other"'),
    ],
)
def test_the_hash_changes_with_code_data_parameters_and_thresholds(project, file, old, new):
    before = source_hash(SLUG)
    edit(project / file, old, new)
    assert source_hash(SLUG) != before


def test_the_hash_counts_names_of_files_tags_and_captions(project):
    seen = {source_hash(SLUG)}
    (project / "data" / "set" / "a.bin").rename(project / "data" / "set" / "b.bin")
    seen.add(source_hash(SLUG))
    path = project / "notebooks" / f"{SLUG}.ipynb"
    for metadata in ({"tags": ["hide-input"]}, {"mystnb": {"figure": {"caption": "A line."}}}):
        notebook = nbformat.read(path, 4)
        notebook.cells[2].metadata = nbformat.from_dict(metadata)
        nbformat.write(notebook, path)
        seen.add(source_hash(SLUG))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("statement", "changes"),
    [
        ("from near_lib import carry", "far"),
        ("from near_lib import deep", "deep"),
        ("import near_lib.deep", "deep"),
        ("import near_lib", "far"),
        ("def f():\n    from near_lib import far", "near"),
        ("import near_library", None),
    ],
)
def test_every_way_to_import_is_followed(project, statement, changes):
    write_notebook(project, run=statement)
    for name in PACKAGE:
        before = source_hash(SLUG)
        (project / "near_lib" / f"{name}.py").write_text(f"{PACKAGE[name]}\nNEW = 1\n")
        if name == changes:
            assert source_hash(SLUG) != before
        if changes is None:
            assert source_hash(SLUG) == before


def test_the_hash_is_the_same_on_every_python(project):
    tree = ast.parse(
        "def f(a, /, b: int = 1, *c, d=None, **e) -> None:\n    'words'\n    return b'x', -1j, ..."
    )
    assert chapters._sha(json.dumps(chapters._tree(tree)))[:12] == "7b1bb1f86485"


def test_a_missing_data_file_is_named(project):
    (project / "data" / "points.txt").unlink()
    with pytest.raises(ValueError, match=r"points\.txt is missing or empty"):
        source_hash(SLUG)


def test_latents_and_data_are_those_of_the_metadata(project):
    assert chapters.latents_of(SLUG) == [{"model": "m", "domain": "d"}]
    assert chapters.data_of(SLUG) == ["data/points.txt", "data/set"]


def test_latents_change_with_code_and_entry(project):
    (project / "near_lib" / "latents.py").write_text("from near_lib.deep import go\n")
    entry = {"model": "m", "domain": "d", "n": 4}
    seen = {chapters.latents_hash(entry), chapters.latents_hash({**entry, "n": 5})}
    edit(project / "near_lib" / "deep.py", "n + 1", "n + 2")
    seen.add(chapters.latents_hash(entry))
    (project / "data" / "zoo" / "m" / "unet").mkdir(parents=True)
    (project / "data" / "zoo" / "m" / "unet" / "weights").write_text("1")
    seen.add(chapters.latents_hash(entry))
    assert len(seen) == 4


# ----------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "params",
    [
        {"n": 4, "eta": 1, "trained": False},
        {"levels": [3], "limit": None},
        {"limit": 5},
        {"eta": 0.1},
    ],
)
def test_right_parameters_pass(project, params):
    chapters.check_parameters(SLUG, params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"domian": "faces"}, "has no parameter 'domian'; did you mean 'domain'\\?"),
        ({"zzz": 1}, "has no parameter 'zzz'; known are n, eta, domain, trained"),
        ({"n": 4.5}, r"'n' of chapter 01_tiny is 4.5 \(float\); give int, such as 8"),
        ({"n": True}, r"is True \(bool\); give int"),
        ({"eta": "0.5"}, r"is '0.5' \(str\); give float"),
        ({"trained": 1}, "give bool"),
        ({"levels": [1, "2"]}, r"give list\[int\], such as \[1, 2\]"),
        ({"limit": "5"}, r"give int \| None"),
    ],
)
def test_wrong_parameters_are_refused_in_one_sentence(project, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_chapter(SLUG, params=params)
    assert "\n" not in str(caught.value)
    assert not (project / "runs").exists()


def test_texts_of_the_command_line_become_values(project):
    pairs = ["n=4", "eta=1e-4", "domain=7", "trained=False", "levels=[3, 4]", "limit=None"]
    assert chapters.parse_parameters(SLUG, pairs) == {
        "n": 4,
        "eta": 1e-4,
        "domain": "7",
        "trained": False,
        "levels": [3, 4],
        "limit": None,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("n", "write name=value"),
        ("n=many", r"'many' \(str\); give int"),
        ("m=1", "no parameter 'm'"),
    ],
)
def test_texts_that_are_no_values_are_refused(project, pair, message):
    with pytest.raises(ValueError, match=message):
        chapters.parse_parameters(SLUG, [pair])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("n = len('x')", "is no literal"),
        ("import os", "write 'name: type = literal'"),
        ("n: Path = 1", "has type 'Path'; use int"),
    ],
)
def test_a_parameters_cell_holds_literals_only(project, cell, message):
    path = write_notebook(project)
    notebook = nbformat.read(path, 4)
    notebook.cells[1].source = cell
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match=message):
        chapters.parameters_of(SLUG)


def test_there_is_one_parameters_cell(project):
    write_notebook(project, extra=[new_code_cell("m = 1", metadata={"tags": ["parameters"]})])
    with pytest.raises(ValueError, match="has 2 cells tagged 'parameters'; tag exactly one"):
        chapters.parameters_of(SLUG)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not a notebook"), ("", "is not a notebook")],
)
def test_a_file_that_is_no_notebook_is_named(project, text, message):
    (project / "notebooks" / f"{SLUG}.ipynb").write_text(text)
    with pytest.raises(ValueError, match=message):
        source_hash(SLUG)


def test_unknown_chapters_and_scales_are_named(project):
    with pytest.raises(ValueError, match=r"unknown chapter '01_tini'; did you mean '01_tiny'\?"):
        run_chapter("01_tini")
    (project / "workflow" / "scales").mkdir(parents=True)
    (project / "workflow" / "scales" / "quick.yaml").write_text("02_other:\n  n: 2\n")
    with pytest.raises(ValueError, match="unknown scale 'huge'; known are book, quick"):
        run_chapter(SLUG, scale="huge")
    with pytest.raises(ValueError, match=r"quick\.yaml has no entry '01_tiny'"):
        run_chapter(SLUG, scale="quick")


# ------------------------------------------------------------------------------------ execution


@pytest.fixture
def runnable(project, monkeypatch):
    """Let the notebook import its small library and judge through the real one."""
    (project / "near.py").write_text("def tell(n):\n    return n + 1\n")
    write_notebook(project, run=RUN)
    return project


def contents(root):
    names = [f"book/chapters/{SLUG}.ipynb", "data/results/01.json", LEDGER, SCORECARD]
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def test_a_chapter_is_published_stays_fresh_and_survives_a_failure(runnable, capfd):
    assert stale_chapters() == [SLUG]
    path = run_chapter(SLUG)
    assert path == runnable / "book" / "chapters" / f"{SLUG}.ipynb"
    assert stale_chapters() == []
    assert "a warning that a reader must see" in capfd.readouterr().err
    check_published(path, slug=SLUG)
    before = contents(runnable)
    assert len(before) == 4

    late = 'from ood_lib.files import write_text\nraise ValueError("the sky fell")'
    write_notebook(runnable, run=RUN.replace("value=0.9", "value=0.1"), extra=[new_code_cell(late)])
    with pytest.raises(ChapterFailed, match="failed in cell 4: ValueError: the sky fell"):
        run_chapter(SLUG)
    assert contents(runnable) == before
    assert stale_chapters() == [SLUG]
    assert (runnable / "runs" / "failed" / f"{SLUG}.ipynb").is_file()
    assert not list(runnable.glob("book/chapters/.*"))


def test_a_run_with_parameters_is_not_published(runnable):
    path = run_chapter(SLUG, params={"n": 5})
    assert path.parent == runnable / "runs" / "chapters" / SLUG
    record = read_verdicts(path.with_suffix(".json"))
    assert record["params"] == {"n": 5}
    assert "injected-parameters" in path.read_text()
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".json"] == [f"{path.stem}.json"]
    assert contents(runnable) == {}


def test_a_quick_run_is_labelled_and_inconclusive(runnable):
    (runnable / "workflow" / "scales").mkdir(parents=True)
    (runnable / "workflow" / "scales" / "quick.yaml").write_text(f"{SLUG}:\n  n: 2\n")
    path = run_chapter(SLUG, scale="quick")
    assert path.name == "quick.ipynb"
    verdict = read_verdicts(path.with_suffix(".json"))["verdicts"][0]
    assert (verdict["scale"], verdict["verdict"], verdict["n"]) == ("quick", "inconclusive", 2)
    assert "OOD_SCALE" not in os.environ


def test_a_chapter_that_gives_no_verdict_is_not_published(project):
    write_notebook(project, run="1 + 1")
    with pytest.raises(ChapterFailed, match="let it call write_verdicts"):
        run_chapter(SLUG)
    assert contents(project) == {}


@pytest.fixture
def published(runnable):
    """Publish by hand, without a kernel."""
    executed = nbformat.read(runnable / "notebooks" / f"{SLUG}.ipynb", 4)
    verdicts = runnable / "data" / "results" / "01.json"
    verdicts.parent.mkdir()
    verdicts.write_text("{}")
    executed.metadata.ood["hash"] = source_hash(SLUG)
    executed.metadata.ood["verdicts"] = chapters._sha("{}")
    (runnable / "book" / "chapters").mkdir(parents=True)
    nbformat.write(executed, chapters.published_path(SLUG))
    assert stale_chapters() == []
    return runnable


@pytest.mark.parametrize("name", [f"book/chapters/{SLUG}.ipynb", "data/results/01.json"])
@pytest.mark.parametrize("damage", ["remove", "empty", "other"])
def test_a_damaged_or_missing_result_is_stale(published, name, damage):
    path = published / name
    path.unlink() if damage == "remove" else path.write_text("" if damage == "empty" else "{ }")
    assert stale_chapters() == [SLUG]


# What an output may not hold; the notebook is built by hand, because a kernel adds nothing here.


def executed(*outputs):
    cell = new_code_cell("1", outputs=list(outputs), metadata={"tags": [], "papermill": {"a": 1}})
    cell.metadata["execution"] = {"iopub.status.busy": "2020-01-01"}
    language = {"name": "python", "version": "3.11.7"}
    return new_notebook(
        cells=[cell], metadata={"papermill": {}, "widgets": {}, "language_info": language}
    )


def test_what_differs_from_run_to_run_is_stripped(project, capsys):
    noise = nbformat.v4.new_output("stream", name="stderr", text=" 10%\r 100%\nmind this\n")
    widget = nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    )
    shown = nbformat.v4.new_output("stream", name="stdout", text="42\n")
    stored = json.loads(chapters._storable(SLUG, executed(noise, widget, shown)))
    assert stored["cells"][0]["metadata"] == {}
    assert [o["text"] for o in stored["cells"][0]["outputs"]] == [["42\n"]]
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    assert "version" not in stored["metadata"]["language_info"]
    assert capsys.readouterr().err == " 100%\nmind this\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{root}/data", "shows the path"),
        ("{home}/pictures", "shows the path"),
        ("[<Line2D at 0x7f51dafc63e0>]", "memory address"),
        ("x" * chapters.MAX_BYTES, "draw fewer or smaller figures"),
    ],
)
def test_what_belongs_to_one_machine_is_refused(project, text, message):
    text = text.format(root=project, home=Path.home())
    output = nbformat.v4.new_output("execute_result", {"text/plain": text})
    with pytest.raises(ChapterFailed, match=message):
        chapters._storable(SLUG, executed(output))


def test_pixels_are_not_searched_for_paths(project, monkeypatch):
    monkeypatch.setenv("HOME", "/abc")  # base64 has slashes, so it can spell a path by chance
    output = nbformat.v4.new_output("display_data", {"image/jpeg": "AAAA/abc"})
    assert "AAAA/abc" in chapters._storable(SLUG, executed(output))


# ----------------------------------------------------------------------- chapters of this project


SLUGS = chapters.chapter_slugs()
each_chapter = pytest.mark.parametrize("slug", SLUGS)


def check_published(path, *, slug):
    """Check what holds for every published notebook."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    text = path.read_text()
    assert len(text.encode()) <= chapters.MAX_BYTES
    for absent in ("injected-parameters", '"execution":', '"papermill":', '"name": "stderr"'):
        assert absent not in text
    source = nbformat.read(chapters.notebook_path(slug), 4)
    assert [c.source for c in notebook.cells] == [c.source for c in source.cells]


def test_there_are_chapters():
    assert SLUGS


@each_chapter
def test_sources_have_no_outputs(slug):
    for cell in nbformat.read(chapters.notebook_path(slug), 4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each_chapter
def test_sources_tell_and_do_not_compute(slug):
    cells = nbformat.read(chapters.notebook_path(slug), 4).cells
    for cell in (c for c in cells if c.cell_type == "code"):
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source)))
        assert len(cell.source.splitlines()) <= 15, cell.source


@each_chapter
def test_parameters_are_typed_and_explained(slug):
    cells = nbformat.read(chapters.notebook_path(slug), 4).cells
    lines = next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])).splitlines()
    assert all(": " in line and "  # " in line for line in lines if line.strip())
    assert chapters.parameters_of(slug)["results_dir"].default == "data/results"


@each_chapter
def test_the_quick_scale_fits_the_parameters(slug):
    chapters.check_parameters(slug, chapters.scale_parameters(slug, "quick"))


@each_chapter
def test_published_chapters_are_fresh_and_clean(slug):
    check_published(chapters.published_path(slug), slug=slug)
    assert slug not in stale_chapters(), "run make book"


@each_chapter
def test_published_verdicts_are_those_of_the_defaults_and_the_listed_thresholds(slug):
    if not chapters.expects_verdicts(slug):
        return
    record = read_verdicts(chapters.verdict_path(slug))
    defaults = {name: p.default for name, p in chapters.parameters_of(slug).items()}
    assert {k: defaults[k] for k in record["params"]} == record["params"]
    own = [c for c in load_claims().values() if c.chapter == slug[:2] and c.status == "tested"]
    listed = {k.id: (k.direction, k.threshold) for c in own for k in c.criteria}
    told = {v["criterion"]: (v["direction"], v["threshold"]) for v in record["verdicts"]}
    assert told == listed
    assert {v["scale"] for v in record["verdicts"]} <= {"book", "study"}


def test_nothing_is_published_without_a_source():
    root = project_root()
    assert {p.stem for p in (root / "book" / "chapters").glob("*.ipynb")} <= set(SLUGS)
    numbers = {slug[:2] for slug in SLUGS}
    assert {p.stem for p in (root / "data" / "results").glob("[0-9][0-9].json")} <= numbers


@pytest.mark.parametrize(("vivid", "colours"), [(True, 256), (False, 32)])
def test_pictures_keep_their_colours_and_drawings_are_small(vivid, colours):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if not vivid:
        pixels[:] = pixels[..., :1]
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    small = chapters._small_png(base64.b64encode(stored.getvalue()).decode())
    with Image.open(io.BytesIO(base64.b64decode(small))) as figure:
        assert len(figure.getcolors()) == colours


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_every_profile_can_plan_the_chapters(profile):
    words = ("-n", "quick", "--profile", f"workflow/profiles/{profile}")
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", *words]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = done.stdout + done.stderr
    assert all(f"quick_{slug}" in planned for slug in chapters.chapter_slugs())
