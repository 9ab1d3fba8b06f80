"""What a sweep gains from a second worker, and what an audit of many images costs.

    .venv/bin/python benchmarks/batches.py workers   # eight equal jobs, one worker against two
    .venv/bin/python benchmarks/batches.py audit     # 200 images and 2,000: time and memory

Each prints its figures. Nothing else should run beside them. Nothing that an earlier run has left is used.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ood_lib.files import project_root
from ood_lib.sweep import read_grid, run, run_cell

MODEL, DOMAIN = "ddpm-fashion-32", "digits"
JOBS, SIZES, SIDE = 8, (200, 2_000), 32


def workers(scratch: Path) -> None:
    """Time a grid of equal jobs whose latents are there, with one worker and with two."""
    grid = {"models": MODEL, "domains": DOMAIN, "seeds": list(range(JOBS)), "references": 60}
    file = scratch / "grid.yaml"
    file.write_text(yaml.safe_dump(grid | {"draws": 64, "points": 13}))
    whole = read_grid(file)
    run_cell(scratch / "first", whole, whole.cells()[0])
    seconds = {}
    for cores in (1, 2):
        started = time.monotonic()
        run(file, scratch / f"workers-{cores}", cores=cores, progress=False)
        seconds[cores] = time.monotonic() - started
    print({k: f"{v:.0f} s" for k, v in seconds.items()}, f"ratio {seconds[1] / seconds[2]:.2f}")


def rings(folder: Path, n: int) -> None:
    """Write pictures of rings about random places, none like another."""
    folder.mkdir()
    rng, place = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    for k in range(n):
        centre, turns = rng.uniform(-0.2, 0.2, 2), rng.uniform(3, 8)
        radius = np.hypot(*(place - centre[:, None, None]))
        waves = np.cos(2 * np.pi * turns * radius) * np.exp(-6 * radius**2)
        Image.fromarray((127.5 * (1 + waves)).astype(np.uint8)).save(folder / f"{k:05d}.png")


def audits(scratch: Path) -> None:
    """Time audits of folders of different size, each in a process of its own."""
    for n in SIZES:
        folder = scratch / f"rings-{n}-{os.getpid()}"
        rings(folder, n)
        words = ("audit", "--model", MODEL, "--images", str(folder), "--out", str(scratch / f"{n}"))
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "ood_lib.cli", *words])
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        for left in (project_root() / "runs" / "latents" / MODEL).glob(f"{folder.name}-*"):
            shutil.rmtree(left)
        memory = used.ru_maxrss / 1024
        print(f"{n} images: status {status}, {seconds:.0f} s, {memory:.0f} MiB", flush=True)


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["workers", "audit"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"workers": workers, "audit": audits}[args.what](Path(folder))


if __name__ == "__main__":
    main()
