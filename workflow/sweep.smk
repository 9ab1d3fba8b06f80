"""A sweep: references -> latents, cell by cell -> draws and their measures -> one table.

    snakemake --snakefile workflow/sweep.smk --profile workflow/profiles/local --config grid=GRID out=OUT

`ood sweep` runs it. A file is written whole or not at all, and `update` keeps one that is there: without it
Snakemake would delete the file of a job that was killed between writing and saying so, and compute it twice.
"""

import shlex
import sys
from pathlib import Path

from ood_lib.sweep import path_of, read_grid, references_path

FILE, OUT = Path(config["grid"]), Path(config["out"])
GRID = read_grid(FILE)
PYTHON = shlex.quote(sys.executable)
OOD = f"OMP_NUM_THREADS=1 {PYTHON} -m ood_lib.cli"
WHERE = f"--out {shlex.quote(str(OUT))}"
JOBS = [(path_of(OUT, GRID, x).name, references_path(OUT, GRID, x).name) for x in GRID.cells()]
CELLS = {cell: k for k, (cell, _) in enumerate(JOBS)}
REFERENCES = {references: k for k, (_, references) in enumerate(JOBS)}


localrules:
    table,


rule all:
    input:
        OUT / "table.parquet",


# Measured at 32x32 with 100 references: 45 s and .7 GB to settle, 12 s and .8 GB for a cell, on one core. The
# blocks leave room for larger networks; a profile or --set-resources may say otherwise.
rule settle:
    output:
        update(OUT / "references" / "{references}"),
    params:
        file=shlex.quote(str(FILE)),
        number=lambda w: REFERENCES[w.references],
        where=WHERE,
    threads: 1
    resources:
        mem_mb=1500,
        runtime=60,
    shell:
        "{OOD} settle {params.file} {params.number} {params.where}"


rule cell:
    input:
        lambda w: ancient(OUT / "references" / JOBS[CELLS[w.cell]][1]),
    output:
        update(OUT / "cells" / "{cell}"),
    params:
        file=shlex.quote(str(FILE)),
        number=lambda w: CELLS[w.cell],
        where=WHERE,
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    shell:
        "{OOD} cell {params.file} {params.number} {params.where}"


rule table:
    input:
        [OUT / "cells" / name for name in CELLS],
    output:
        OUT / "table.parquet",
    run:
        from ood_lib.sweep import write_table

        write_table(OUT, GRID)
