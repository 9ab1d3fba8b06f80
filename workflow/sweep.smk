"""A sweep: references -> latents, cell by cell -> draws and their measures -> one table.

    snakemake --snakefile workflow/sweep.smk --profile workflow/profiles/local --config grid=GRID out=OUT

`ood sweep` runs it. A cell is written whole or not at all, and `update` keeps one that is there: without it
Snakemake would delete the file of a job that was killed between writing and saying so, and compute it twice.
"""

import shlex
import sys
from pathlib import Path

from ood_lib.latents import path_of as latents_path
from ood_lib.sweep import arguments_of, path_of, read_grid

FILE, OUT = Path(config["grid"]), Path(config["out"])
GRID = read_grid(FILE)
PYTHON = shlex.quote(sys.executable)
OOD = f"OMP_NUM_THREADS=1 {PYTHON} -m ood_lib.cli"
STAMPS = OUT / "stamps"
JOBS = [(path_of(OUT, GRID, cell).name, GRID.latents(cell)) for cell in GRID.cells()]
CELLS = {name: k for k, (name, _) in enumerate(JOBS)}


def name_of(spec):
    return f"{latents_path(spec).name}.{Path(spec.model).name}"


LATENTS = {name_of(spec): spec for _, spec in JOBS}


localrules:
    table,


rule all:
    input:
        OUT / "table.parquet",


rule latents:
    output:
        touch(STAMPS / "latents" / "{latents}"),
    params:
        arguments=lambda w: shlex.join(arguments_of(LATENTS[w.latents])),
    threads: 1
    resources:
        mem_mb=1500,
        runtime=60,
    shell:
        "{OOD} invert {params.arguments}"


rule cell:
    input:
        lambda w: ancient(STAMPS / "latents" / name_of(JOBS[CELLS[w.cell]][1])),
    output:
        update(OUT / "cells" / "{cell}"),
    params:
        file=shlex.quote(str(FILE)),
        out=shlex.quote(str(OUT)),
        number=lambda w: CELLS[w.cell],
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    shell:
        "{OOD} cell {params.file} {params.number} --out {params.out}"


rule table:
    input:
        [OUT / "cells" / name for name in CELLS],
    output:
        OUT / "table.parquet",
    run:
        from ood_lib.sweep import write_table

        write_table(OUT, GRID)
