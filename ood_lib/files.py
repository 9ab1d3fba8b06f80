"""Files of the project: its root, and writing so that no reader ever meets half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["from_root", "project_root", "write_json", "write_text", "write_whole"]


def project_root() -> Path:
    """Folder that holds ``_config.yml``, ``data`` and ``runs``.

    Returns
    -------
    Path
        ``$OOD_ROOT`` if set, else the nearest parent of the working folder or of this file that
        holds ``_config.yml``.

    Raises
    ------
    ValueError
        If no such folder is found.

    Examples
    --------
    >>> (project_root() / "data").is_dir()
    True
    """
    if "OOD_ROOT" in os.environ:
        return Path(os.environ["OOD_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_config.yml").is_file() and (folder / "data").is_dir():
                return folder
    raise ValueError(
        "no project folder found from here; set OOD_ROOT to the folder with _config.yml"
    )


def from_root(path: Path) -> str:
    """Write a path so that it holds wherever the project lies.

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    str
        Relative to the root of the project where it lies in it, with slashes; else as a full path.

    Examples
    --------
    >>> from_root(project_root() / "data" / "claims.yaml")
    'data/claims.yaml'
    """
    path, root = path.resolve(), project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name first, so that a reader never meets half a file.

    Parameters
    ----------
    path : Path
        The file; its folder is made where it is missing. It stays as it was if the writing fails.
    write : callable
        Writes the content to the path that it is given.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "new" / "file", lambda path: path.write_text("whole"))
    ...     (Path(folder) / "new" / "file").read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, whole or not at all.

    Parameters
    ----------
    path : Path
        The file; its folder is made where it is missing.
    text : str
        The whole content, written as UTF-8.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "file", "whole")
    ...     (Path(folder) / "file").read_text()
    'whole'
    """
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, record: Mapping[str, Any], *, indent: int = 1) -> None:
    r"""Replace a file by a record as JSON, whole or not at all.

    Parameters
    ----------
    path : Path
        The file; its folder is made where it is missing.
    record : mapping
        What JSON can hold.
    indent : int, default 1
        Spaces a level.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "file", {"n": 2})
    ...     (Path(folder) / "file").read_text()
    '{\n "n": 2\n}\n'
    """
    write_text(path, json.dumps(record, indent=indent) + "\n")
