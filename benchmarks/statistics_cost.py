"""Time the statistics and their memory, from a few latents of 32x32 to a thousand of 256x256.

    .venv/bin/python benchmarks/statistics_cost.py

Every measurement has a process of its own, with float32 noise in memory; `extra_mib` is the largest
resident size beyond that input. Null tables come from ``data/nulls``, so the report runs where one is
shipped. The table is ``data/results/statistics_cost.csv``. Keep the machine quiet: ten minutes.
"""

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd

from ood_lib import gaussianity, geometry, gram, separability
from ood_lib.files import project_root

TABLE = project_root() / "data" / "results" / "statistics_cost.csv"
SHAPES = {3072: (3, 32, 32), 24576: (6, 64, 64), 196608: (3, 256, 256)}
ALL = tuple((n, d) for n in (100, 256, 1000) for d in SHAPES)
WITH_NULLS = ((100, 3072), (256, 3072), (1000, 3072), (100, 196608), (1000, 196608))
HELD = (1000, 196608)


def _report(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> object:
    return gaussianity.report(a, rng=rng, shape=SHAPES[a.shape[1]])


def _separability(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> object:
    return separability.report(a, b, rng=rng)


def _measure(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> object:
    return geometry.measure(a)


def _fit(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> object:
    return gram.fit_covariance(a).sample(10, rng)


TASKS: dict[str, tuple[Callable[..., object], tuple[tuple[int, int], ...]]] = {
    "gram.fit_covariance": (_fit, ALL),
    "geometry.measure": (_measure, ALL),
    "separability.report": (_separability, ALL),
    "gaussianity.report": (_report, WITH_NULLS),
}


def _peak() -> float:
    """Largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(task: str, n: int, d: int) -> dict[str, object]:
    """Run one task once."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, d), dtype=np.float32)
    b = rng.standard_normal((n, d), dtype=np.float32) if task.startswith("sep") else a
    before, wall, cpu = _peak(), time.perf_counter(), time.process_time()
    TASKS[task][0](a, b, rng)
    return {
        "task": task,
        "n": n,
        "d": d,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "extra_mib": round(_peak() - before),
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Measure all tasks, one after the other."""
    rows = []
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        for task, (_, sizes) in TASKS.items():
            for n, d in sizes:
                rows.append(pool.submit(one, task, n, d).result())
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(TABLE, index=False, lineterminator="\n")
    largest = table[(table.n == HELD[0]) & (table.d == HELD[1])]
    print(largest[["task", "seconds", "extra_mib"]].to_string(index=False))


if __name__ == "__main__":
    main()
