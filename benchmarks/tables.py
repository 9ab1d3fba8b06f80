"""Tables that grow row by row, so that a run that was stopped goes on."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from ood_lib import load_model
from ood_lib.models import FrozenModel
from ood_lib.study import unseen_domains


def append(
    path: Path,
    rows: Sequence[dict[str, object]],
    columns: Sequence[str] | None = None,
    *,
    digits: int = 4,
) -> None:
    """Add rows to a table, which may not exist yet; what a row lacks stays empty.

    The columns are those of the first row by default.
    """
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(
            {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}
            for row in rows
        )


def done(path: Path, *columns: str) -> set[tuple[object, ...]]:
    """Read what a table has already."""
    if not path.is_file():
        return set()
    return set(pd.read_csv(path)[list(columns)].itertuples(index=False, name=None))


def missing_pairs(path: Path, models: Sequence[str]) -> Iterator[tuple[FrozenModel, str]]:
    """Yield the models and their unseen domains that a table lacks, and name each when it is done."""
    there = done(path, "model", "domain")
    for name in models:
        model = load_model(name)
        for domain in unseen_domains(model):
            if (name, domain) not in there:
                yield model, domain
                print(name, domain, flush=True)
