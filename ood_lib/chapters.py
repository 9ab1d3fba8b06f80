"""Chapters: parameterised notebooks, their freshness by content, and their execution.

``notebooks/NN_slug.ipynb`` is the source, without outputs. `run_chapter` executes it into
``book/chapters/NN_slug.ipynb`` and the notebook writes its verdicts to ``data/results/NN.json``.
A chapter is stale when the hash in its published notebook is not that of what it was made from;
no modification time is ever asked, because a clone has none that mean anything.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import numpy as np
import yaml
from nbformat import NotebookNode
from PIL import Image

from ood_lib.domains import did_you_mean
from ood_lib.files import from_root, project_root, write_text
from ood_lib.results import LEDGER, RESULTS_DIR, SCORECARD, load_claims

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = [
    "ChapterFailed",
    "Parameter",
    "book_hash",
    "build_html",
    "chapter_slugs",
    "check_parameters",
    "data_of",
    "execute_notebook",
    "expects_verdicts",
    "figure_of",
    "html_is_fresh",
    "latents_hash",
    "latents_of",
    "notebook_path",
    "parameters_of",
    "parse_parameters",
    "published_path",
    "run_chapter",
    "scale_parameters",
    "source_hash",
    "stale_chapters",
    "verdict_path",
]

PACKAGE = Path(__file__).resolve().parent
MAX_BYTES = 300_000
README_FIGURE = (
    "13_sampling_the_unseen_domain",
    "fig-13-grid-474",
    "book/_static/readme_figure.png",
)
HTML_STAMP = "_build/html.sha256"
KINDS = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "tuple": (tuple, list),
    "dict": (dict,),
    "None": (type(None),),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


class ChapterFailed(RuntimeError):
    """A notebook did not run to its end, or ran and gave what must not be published."""


@dataclass(frozen=True)
class Parameter:
    """One name of a parameters cell.

    Parameters
    ----------
    name : str
        The name.
    default : object
        The published value, a literal.
    kind : str
        The annotation, such as ``"int"`` or ``"list[int]"``; the type of the default without one.
    """

    name: str
    default: Any
    kind: str


# ------------------------------------------------------------------------------- where things are


def chapter_slugs() -> list[str]:
    """Names of all chapters, in order.

    Returns
    -------
    list of str
        One ``NN_slug`` for each ``notebooks/NN_slug.ipynb``.
    """
    return sorted(p.stem for p in (project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def notebook_path(slug: str) -> Path:
    """Return the source of a chapter.

    Parameters
    ----------
    slug : str
        Name of the chapter, ``NN_slug``.

    Returns
    -------
    Path
        ``notebooks/NN_slug.ipynb``.

    Raises
    ------
    ValueError
        If there is no such chapter.
    """
    known = chapter_slugs()
    if slug not in known:
        raise ValueError(f"unknown chapter {slug!r}{did_you_mean(slug, known)}")
    return project_root() / "notebooks" / f"{slug}.ipynb"


def published_path(slug: str) -> Path:
    """Return where the executed chapter is published.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    Path
        ``book/chapters/NN_slug.ipynb``.
    """
    return project_root() / "book" / "chapters" / f"{slug}.ipynb"


def verdict_path(slug: str) -> Path:
    """Return where the verdicts of a chapter are published.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    Path
        ``data/results/NN.json``.
    """
    return project_root() / RESULTS_DIR / f"{slug[:2]}.json"


def expects_verdicts(slug: str) -> bool:
    """Tell whether ``data/claims.yaml`` lists a criterion that this chapter must judge.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    bool
        False for a chapter that only explains.
    """
    own = [c for c in load_claims().values() if c.chapter == slug[:2]]
    return any(c.criteria and c.status == "tested" for c in own)


def _read(slug: str) -> NotebookNode:
    path = notebook_path(slug)
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path.name} is not a notebook: {reason}") from error


def _ood(notebook: NotebookNode) -> dict[str, Any]:
    return dict(notebook.metadata.get("ood", {}))


def latents_of(slug: str) -> list[dict[str, Any]]:
    """List the latents that a chapter reads, from its notebook metadata.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    list of dict
        Keyword arguments of `ood_lib.latents.LatentSpec`.
    """
    return [dict(entry) for entry in _ood(_read(slug)).get("latents", [])]


def data_of(slug: str) -> list[str]:
    """List the data files and folders that a chapter reads, from its notebook metadata.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    list of str
        Paths relative to the project.
    """
    return list(_ood(_read(slug)).get("data", []))


# ------------------------------------------------------------------------------------- parameters


def parameters_of(slug: str) -> dict[str, Parameter]:
    """Read the parameters cell of a chapter.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    dict of str to Parameter
        By name, in the order of the cell.

    Raises
    ------
    ValueError
        If there is not exactly one cell tagged ``parameters``, or it holds more than literals.
    """
    cells = [c for c in _read(slug).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{slug} has {len(cells)} cells tagged 'parameters'; tag exactly one")
    read = [_parameter(slug, statement) for statement in ast.parse(cells[0].source).body]
    return {parameter.name: parameter for parameter in read}


def _parameter(slug: str, statement: ast.stmt) -> Parameter:
    text = ast.unparse(statement)
    match statement:
        case ast.AnnAssign(
            target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value
        ):
            kind = ast.unparse(annotation)
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            kind = ""
        case _:
            raise ValueError(
                f"{slug}: parameters cell holds {text!r}; write 'name: type = literal'"
            )
    try:
        default = ast.literal_eval(value)
    except ValueError as error:
        raise ValueError(f"{slug}: parameter {text!r} is no literal; give a plain value") from error
    kind = kind or type(default).__name__
    if any(base not in KINDS for base in re.findall(r"\w+", kind)):
        raise ValueError(f"{slug}: parameter {name!r} has type {kind!r}; use {', '.join(KINDS)}")
    return Parameter(name, default, kind)


def _fits(value: Any, kind: str) -> bool:
    """Tell whether a value is of an annotated type; True is no int here, and an int is a float."""
    for option in kind.split("|"):
        base, _, inner = option.strip().partition("[")
        right = isinstance(value, KINDS[base]) and (base == "bool" or not isinstance(value, bool))
        if right and inner and base in ("list", "tuple"):
            right = all(_fits(item, inner.rstrip("]").partition(",")[0]) for item in value)
        if right:
            return True
    return False


def check_parameters(slug: str, params: Mapping[str, Any]) -> None:
    """Refuse parameters that the chapter does not have, or of another type than it declares.

    Parameters
    ----------
    slug : str
        Name of the chapter.
    params : mapping
        Values by name.

    Raises
    ------
    ValueError
        If a name is unknown (the nearest one is named) or a value has the wrong type.
    """
    known = parameters_of(slug)
    for name, value in params.items():
        if name not in known:
            raise ValueError(f"chapter {slug} has no parameter {name!r}{did_you_mean(name, known)}")
        if not _fits(value, known[name].kind):
            raise ValueError(
                f"parameter {name!r} of chapter {slug} is {value!r} ({type(value).__name__}); "
                f"give {known[name].kind}, such as {known[name].default!r}"
            )


def parse_parameters(slug: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Turn ``name=value`` texts of a command line into checked parameters.

    Parameters
    ----------
    slug : str
        Name of the chapter.
    pairs : iterable of str
        Such as ``["n=64", "domain=faces"]``.

    Returns
    -------
    dict
        Values by name.

    Raises
    ------
    ValueError
        If a text has no ``=``, a name is unknown or a value has the wrong type.
    """
    known, params = parameters_of(slug), {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"parameter {pair!r} has no value; write name=value")
        params[name] = text
        if name in known and "str" not in known[name].kind:
            with contextlib.suppress(ValueError, SyntaxError):
                params[name] = ast.literal_eval(text)
    check_parameters(slug, params)
    return params


def scale_parameters(slug: str, scale: str) -> dict[str, Any]:
    """Parameters of a chapter at a scale.

    Parameters
    ----------
    slug : str
        Name of the chapter.
    scale : str
        "book", where the defaults of the notebook hold, or a file name in ``workflow/scales``.

    Returns
    -------
    dict
        Values by name; empty at the scale "book".

    Raises
    ------
    ValueError
        If the scale is unknown or has no entry for the chapter.
    """
    if scale == "book":
        return {}
    folder = project_root() / "workflow" / "scales"
    known = sorted({"book", *(p.stem for p in folder.glob("*.yaml"))})
    if scale not in known:
        raise ValueError(f"unknown scale {scale!r}{did_you_mean(scale, known)}")
    entries = yaml.safe_load((folder / f"{scale}.yaml").read_text("utf-8")) or {}
    if slug not in entries:
        raise ValueError(
            f"workflow/scales/{scale}.yaml has no entry {slug!r}; add its parameters there"
        )
    return dict(entries[slug] or {})


# -------------------------------------------------------------------------------------- freshness


def source_hash(slug: str) -> str:
    """Hash everything that a chapter is made from.

    That is: its cells with their tags and captions, its metadata, the content of its data files,
    its claims, and the syntax trees without docstrings of the `ood_lib` modules that it imports,
    transitively. Comments and docstrings of the library do not count, nor do modification times.

    Parameters
    ----------
    slug : str
        Name of the chapter.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    ValueError
        If a data file is missing or a cell is not Python.
    """
    notebook = _read(slug)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    claims = [asdict(c) for c in load_claims().values() if c.chapter == slug[:2]]
    record = {
        "cells": [_cell_record(cell) for cell in notebook.cells],
        "ood": _ood(notebook),
        "data": {name: _content_hash(project_root() / name) for name in data_of(slug)},
        "claims": claims,
        "code": _code(set().union(*(_imports(_parse(slug, cell)) for cell in code))),
    }
    return _sha(json.dumps(record, sort_keys=True))


def latents_hash(entry: Mapping[str, Any]) -> str:
    """Hash what latents are made from: their entry, the code that inverts, model and images.

    Parameters
    ----------
    entry : mapping
        An element of `latents_of`.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    data, model = project_root() / "data", entry["model"]
    parts = [data / "zoo" / model / part for part in ("unet", "scheduler")]
    shipped = [*parts, data / "domains" / f"{entry['domain']}.npz"]
    content = [_content_hash(path) for path in shipped if path.exists()]
    return _sha(json.dumps([dict(entry), _code({"latents"}), content], sort_keys=True))


def _sha(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _cell_record(cell: NotebookNode) -> dict[str, Any]:
    shown = {key: cell.metadata[key] for key in ("tags", "mystnb") if cell.metadata.get(key)}
    return {"type": cell.cell_type, "source": cell.source, "metadata": shown}


def _files(path: Path) -> list[Path]:
    """List the files under a folder by name, hidden ones left out; a file stands for itself."""
    if path.is_file():
        return [path]
    inside = [p for p in path.rglob("*") if p.is_file()]
    return sorted(
        p for p in inside if not any(x.startswith(".") for x in p.relative_to(path).parts)
    )


def _content_hash(path: Path) -> str:
    files = _files(path)
    if not files:
        raise ValueError(f"{path} is missing or empty; build it, or take it off the chapter's list")
    named = [[p.relative_to(path.parent).as_posix(), _sha(p.read_bytes())] for p in files]
    return _sha(json.dumps(named))


def _code(modules: set[str]) -> dict[str, str]:
    """Hash the syntax trees of modules of `ood_lib` and of those that they import, transitively."""
    hashes: dict[str, str] = {}
    waiting = set(modules)
    while waiting:
        name = waiting.pop()
        tree = ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))
        hashes[name] = _sha(json.dumps(_tree(tree)))
        waiting |= _imports(tree) - set(hashes)
    return hashes


def _parse(slug: str, cell: NotebookNode) -> ast.Module:
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        raise ValueError(
            f"{slug}: a cell is not plain Python ({error}): {cell.source[:60]!r}"
        ) from error


def _imports(node: ast.AST) -> set[str]:
    """Find the modules of `ood_lib` that a tree imports, inside functions too."""
    if isinstance(node, ast.Import):
        inside = [a.name.partition(".") for a in node.names]
        return {name or "__init__" for package, _, name in inside if package == PACKAGE.name}
    if isinstance(node, ast.ImportFrom):
        return _imported_from(node)
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse  # what only a type checker reads cannot change a result
    return set().union(*map(_imports, children))


def _imported_from(node: ast.ImportFrom) -> set[str]:
    package, _, module = (node.module or "").partition(".")
    if node.level:
        package, module = PACKAGE.name, node.module or ""
    if package != PACKAGE.name:
        return set()
    return {module} if module else {_home(alias.name) for alias in node.names}


def _home(name: str) -> str:
    """Find the module behind a name imported from the package, through its re-exports."""
    if (PACKAGE / f"{name}.py").is_file():
        return name
    for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            return (node.module or name).removeprefix(f"{PACKAGE.name}.")
    return "__init__"


def _tree(value: Any) -> Any:
    """Turn a syntax tree into plain lists, docstrings left out.

    `ast.dump` differs between versions of Python, which would make every chapter stale on another
    one; empty fields are what they disagree on, so those are left out.
    """
    if isinstance(value, list):
        return [_tree(item) for item in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = dict(ast.iter_fields(value))
    if isinstance(value, _DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    kept = {
        name: _tree(field) for name, field in fields.items() if field is not None and field != []
    }
    return [type(value).__name__, kept]


def stale_chapters() -> list[str]:
    """Chapters that must be executed again.

    Returns
    -------
    list of str
        Those whose published notebook or verdicts are missing, were made from something else than
        what stands in the project now, or do not belong together.
    """
    return [slug for slug in chapter_slugs() if _is_stale(slug)]


def _is_stale(slug: str) -> bool:
    path = published_path(slug)
    if not path.is_file():
        return True
    try:
        recorded = _ood(nbformat.read(path, as_version=4))
    except (nbformat.reader.NotJSONError, nbformat.ValidationError):
        return True
    made_from = recorded.get("hash") != source_hash(slug)
    return made_from or recorded.get("verdicts") != _verdicts_hash(slug, verdict_path(slug))


def _verdicts_hash(slug: str, path: Path) -> str | None:
    if not expects_verdicts(slug):
        return None
    return _sha(path.read_bytes()) if path.is_file() else "missing"


# -------------------------------------------------------------------------------------- execution


def run_chapter(
    slug: str,
    out: Path | None = None,
    params: Mapping[str, Any] | None = None,
    *,
    scale: str = "book",
    progress: bool = False,
) -> Path:
    """Execute a chapter, and publish it if it runs as it stands.

    Parameters
    ----------
    slug : str
        Name of the chapter.
    out : Path, optional
        Where the executed notebook goes; its verdicts go beside it, with the suffix ``.json``.
        ``book/chapters`` by default for a run without parameters at the scale "book", else
        ``runs/chapters/NN_slug``.
    params : mapping, optional
        Values that replace those of the parameters cell.
    scale : str, default "book"
        A file of ``workflow/scales`` whose parameters hold, `params` before them.
    progress : bool, default False
        Show a bar of the cells.

    Returns
    -------
    Path
        The executed notebook.

    Raises
    ------
    ValueError
        If the chapter, the scale or a parameter is unknown, or a value has the wrong type.
    ChapterFailed
        If the notebook raises, or gives what must not be published. What was published before
        stays as it was.
    """
    params = {**scale_parameters(slug, scale), **(params or {})}
    check_parameters(slug, params)
    published = out is None and not params and scale == "book"
    target = out or (published_path(slug) if published else _run_path(slug, scale, params))
    folder = project_root() / RESULTS_DIR if published else Path(target).resolve().parent
    written = folder / f"{slug[:2]}.json"
    if not published:
        params = {**params, "results_dir": from_root(folder)}
    derived = [project_root() / LEDGER, project_root() / SCORECARD] if published else []
    # One kernel at a time: two that start together can take the same port (papermill issue 511).
    with _lock("chapter"), _restored_on_failure([written, *derived]):
        notebook = _execute(slug, params, scale, progress)
        if expects_verdicts(slug) and not written.is_file():
            raise ChapterFailed(f"chapter {slug} wrote no {written}; let it call write_verdicts")
        notebook.metadata.setdefault("ood", {})["hash"] = source_hash(slug)
        if expects_verdicts(slug):
            notebook.metadata.ood["verdicts"] = _verdicts_hash(slug, written)
        write_text(Path(target), _storable(slug, notebook))
        if published and slug == README_FIGURE[0]:
            (project_root() / README_FIGURE[2]).write_bytes(figure_of(slug, README_FIGURE[1]))
        if expects_verdicts(slug) and not published:
            written.replace(Path(target).with_suffix(".json"))
    return Path(target)


def figure_of(slug: str, name: str) -> bytes:
    """Read a figure out of a published chapter.

    Parameters
    ----------
    slug : str
        Name of the chapter.
    name : str
        Name of the figure, as in its ``mystnb`` metadata.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    ValueError
        If the chapter has no such figure.
    """
    for cell in nbformat.read(published_path(slug), as_version=4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            pictures = [
                o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})
            ]
            if pictures:
                return b64decode(pictures[0])
    raise ValueError(f"chapter {slug} has no figure {name!r}")


def _lock(name: str) -> FileLock:
    """Make a lock between processes, which the system frees when its holder dies."""
    from filelock import FileLock

    path = project_root() / "runs" / f".{name}.lock"
    path.parent.mkdir(exist_ok=True)
    return FileLock(path)


def _run_path(slug: str, scale: str, params: Mapping[str, Any]) -> Path:
    """Name a run that is not published by its scale, and by a hash of what it changes."""
    given = {k: v for k, v in params.items() if scale_parameters(slug, scale).get(k) != v}
    name = f"{scale}-{_sha(json.dumps(given, sort_keys=True))[:8]}" if given else scale
    return project_root() / "runs" / "chapters" / slug / f"{name}.ipynb"


@contextlib.contextmanager
def _restored_on_failure(paths: Iterable[Path]) -> Iterator[None]:
    """Put files back as they were if the block raises; the first is taken away for the run.

    An old verdict file that stayed in place would hide that the notebook wrote none.
    """
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    next(iter(before)).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        for path, content in before.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        raise


@contextlib.contextmanager
def _kernel_environment(scale: str) -> Iterator[None]:
    """Set what the kernel inherits.

    A MPLBACKEND of the shell would leave the book without figures, and an order of sets that
    changes from run to run would change its outputs. Widgets are not installed, because a page
    without a kernel cannot show them, so the hint to install them is left out.
    """
    wanted = {
        "OOD_ROOT": str(project_root()),
        "OOD_SCALE": scale,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _execute(slug: str, params: Mapping[str, Any], scale: str, progress: bool) -> NotebookNode:
    """Run a chapter in a fresh kernel; one that fails is kept under ``runs/failed``."""
    kept = project_root() / "runs" / "failed" / f"{slug}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": project_root(), "scale": scale, "progress": progress}
    notebook = execute_notebook(notebook_path(slug), kept, params, **options)
    kept.unlink()
    return notebook


def execute_notebook(
    source: Path,
    target: Path,
    params: Mapping[str, Any],
    *,
    cwd: Path,
    scale: str = "book",
    progress: bool = False,
) -> NotebookNode:
    """Run a notebook in a fresh kernel, with the environment of the book.

    Parameters
    ----------
    source : Path
        The notebook.
    target : Path
        Where it is written as it runs.
    params : mapping
        Values that replace those of its parameters cell; they are not checked.
    cwd : Path
        Working folder of the kernel.
    scale : str, default "book"
        What the notebook is told in ``OOD_SCALE``.
    progress : bool, default False
        Show a bar of the cells.

    Returns
    -------
    NotebookNode
        The executed notebook.

    Raises
    ------
    ChapterFailed
        If a cell raises or the kernel dies.
    """
    import papermill
    import zmq
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # Encrypted where it can be: on a shared machine others could read the plain channel.
    encryption = {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}
    options = {
        "kernel_name": "python3",
        "language": "python",
        "cwd": cwd,
        "progress_bar": progress,
        "config": Config({"KernelManager": encryption}),
    }
    try:
        with _kernel_environment(scale):
            return papermill.execute_notebook(source, target, dict(params), **options)
    except papermill.PapermillExecutionError as error:
        raise ChapterFailed(
            f"chapter {source.stem} failed in cell {error.cell_index + 1}: {error.ename}: "
            f"{error.evalue} (the notebook with its traceback is {from_root(target)})"
        ) from error
    except DeadKernelError as error:
        raise ChapterFailed(
            f"chapter {source.stem}: the kernel died, often for want of memory"
        ) from error


def _storable(slug: str, notebook: NotebookNode) -> str:
    """Strip what differs from run to run, check what is left, and return the text to store."""
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata.kernelspec = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook.cells:
        _strip(cell)
    for text in _texts(notebook):
        _check_text(slug, text)
    stored = nbformat.writes(notebook).rstrip("\n") + "\n"
    if len(stored.encode()) > MAX_BYTES:
        raise ChapterFailed(
            f"chapter {slug} is {len(stored.encode())} bytes when executed, over {MAX_BYTES}; "
            "draw fewer or smaller figures"
        )
    return stored


def _strip(cell: NotebookNode) -> None:
    """Take times, empty tags, widgets and the error stream out of a cell."""
    for key in ("papermill", "execution"):
        cell.metadata.pop(key, None)
    if not cell.metadata.get("tags", True):
        cell.metadata.pop("tags")
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _small_png(output.data["image/png"])


def _small_png(encoded: str) -> str:
    """Store a figure with a palette: a quarter of the bytes, the same to the eye.

    Few colours serve a grey drawing; where there are hues, fewer than 256 let thin lines of two run together.
    """
    with Image.open(BytesIO(b64decode(encoded))) as figure:
        flat = Image.alpha_composite(
            Image.new("RGBA", figure.size, "white"), figure.convert("RGBA")
        )
    small, colours = BytesIO(), flat.convert("RGB")
    vivid = np.ptp(np.asarray(colours).astype(int), axis=-1) > 40
    colours = colours.quantize(256 if vivid.any() else 32, dither=Image.Dither.NONE)
    colours.save(small, "PNG", optimize=True)
    return b64encode(small.getvalue()).decode()


def _is_noise(output: NotebookNode) -> bool:
    """Tell what is not stored; warnings are passed on to the terminal, so that they are seen."""
    if output.output_type == "stream" and output.name == "stderr":
        lines = [line.rpartition("\r")[2] for line in output.text.splitlines(keepends=True)]
        sys.stderr.write("".join(lines))
        return True
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _texts(notebook: NotebookNode) -> Iterator[str]:
    """Yield every text that the outputs show; pixels of images are none."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield str(output.get("text", ""))
            data = output.get("data", {})
            yield from (str(v) for k, v in data.items() if k not in ("image/png", "image/jpeg"))


def _check_text(slug: str, text: str) -> None:
    """Refuse what belongs to one machine or one run."""
    for place in {str(project_root()), str(Path.home())} - {"/"}:
        if place in text:
            raise ChapterFailed(
                f"an output of chapter {slug} shows the path {place}; print names only"
            )
    if address := _ADDRESS.search(text):
        line = next(line for line in text.splitlines() if address.group() in line)
        raise ChapterFailed(f"an output of chapter {slug} shows a memory address: {line.strip()!r}")


# ------------------------------------------------------------------------------------------- html


def book_hash() -> str:
    """Hash everything that the HTML is built from: the two configuration files and ``book``.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    root = project_root()
    files = [root / "_config.yml", root / "_toc.yml", *_files(root / "book")]
    named = [[p.relative_to(root).as_posix(), _sha(p.read_bytes())] for p in files if p.is_file()]
    return _sha(json.dumps(named))


def html_is_fresh() -> bool:
    """Tell whether ``_build/html`` was built from what stands in the project now.

    Returns
    -------
    bool
        False if it is missing, too.
    """
    stamp = project_root() / HTML_STAMP
    index = project_root() / "_build" / "html" / "index.html"
    return index.is_file() and stamp.is_file() and stamp.read_text() == book_hash()


def build_html(out: Path | None = None) -> Path:
    """Build the book; every warning of Sphinx is an error.

    Everything is built anew: a second, incremental build would not repeat the warnings of the
    first, and would pass.

    Parameters
    ----------
    out : Path, optional
        Folder that gets ``_build``; the project by default.

    Returns
    -------
    Path
        ``index.html``.

    Raises
    ------
    subprocess.CalledProcessError
        If the build fails.
    """
    root, made_from = project_root(), book_hash()
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(root), "--all"]
    command += ["-W", "-n", "--keep-going", "-q", "--path-output", str(out or root)]
    stamp = (out or root) / HTML_STAMP
    with _lock("html"):
        stamp.unlink(missing_ok=True)
        subprocess.run(command, check=True, cwd=root)
        write_text(stamp, made_from)
    return stamp.parent / "html" / "index.html"
