"""Pages of what a command measured: a notebook that is run on a folder, and HTML beside it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import yaml
from nbformat import write as write_notebook

from ood_lib.chapters import execute_notebook
from ood_lib.files import write_text, write_whole

__all__ = ["build_page", "check_renderer", "render"]

TEMPLATES = Path(__file__).resolve().parent.parent / "notebooks"
LEFT_OUT = ["_build", "samples", "cells", "references"]  # folders that hold no pages


def check_renderer() -> None:
    """Refuse before anything is measured what could not be rendered in the end.

    Raises
    ------
    ValueError
        If packages are missing.

    Examples
    --------
    >>> check_renderer()
    """
    missing = [name for name in ("papermill", "jupyter_book") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the page needs {', '.join(missing)}: pip install 'ood_lib[book]'")


def render(template: str, folder: Path, *, progress: bool = False) -> Path:
    """Run a template on a folder, and build a page of it.

    Parameters
    ----------
    template : str
        A notebook of ``notebooks`` without its ending, with the parameter `results_dir`.
    folder : Path
        What it reads; ``report.ipynb`` is written there, and can be run again.
    progress : bool, default False
        Show a bar of the cells.

    Returns
    -------
    Path
        ``_build/html/report.html`` in the folder.

    Raises
    ------
    ValueError
        If packages are missing, or the page could not be built.
    ChapterFailed
        If the notebook fails.
    """
    check_renderer()
    folder = folder.resolve()
    source, target = TEMPLATES / f"{template}.ipynb", folder / "report.ipynb"
    report = execute_notebook(source, target, {"results_dir": "."}, cwd=folder, progress=progress)
    for cell in report.cells:  # a page shows no parameters of one machine
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
    write_whole(target, lambda partial: write_notebook(report, partial))
    return build_page(folder, title=template.capitalize())


def build_page(folder: Path, *, title: str) -> Path:
    """Build the HTML of ``report.ipynb``; nothing is executed.

    Parameters
    ----------
    folder : Path
        Holds the notebook.
    title : str
        Title of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        If it could not be built; the tables stay as they are.
    """
    config = {
        "title": title,
        "only_build_toc_files": True,
        "exclude_patterns": LEFT_OUT,
        "execute": {"execute_notebooks": "off"},
        "html": {"use_issues_button": False, "use_repository_button": False},
    }
    for name, content in (("_config", config), ("_toc", {"format": "jb-book", "root": "report"})):
        write_text(folder / f"{name}.yml", yaml.safe_dump(content, sort_keys=False))
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "--all", "-q"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    page = folder / "_build" / "html" / "report.html"
    if made.returncode or not page.is_file():
        raise ValueError(
            f"the page could not be built ({made.stderr.strip()[-300:]}); the tables are in {folder}"
        )
    return page
