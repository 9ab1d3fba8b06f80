"""Time inversion against other software on one machine, with one frozen model and the same images.

    make bench                                        # the whole run, about 20 minutes on two cores
    .venv/bin/python benchmarks/inversion.py --quick  # a smoke run

The contenders stand in ``contenders.py``. Each is judged at its own last level against a reference that
begins at its own start: Heun with 240 points even in log sigma, float64 state, plain float32 network. So
nobody is charged for another start or end. A contender climbs its ladder until its median error over
the images is under `ENOUGH`. Then all are timed in turn, repeatedly, at the rung that decides, or, where that
has more than `TIMED_CALLS` network calls, at the last rung that has not; the median time of a call times
the calls gives the seconds of every rung. ``seconds_once`` is the one run of that rung from start to end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from contenders import Contender, Setup, contenders
from diffusers import DDPMScheduler
from loops import Latent, Reference, azula_version, plain_network
from report import GOAL, compare, decisive, draw, print_tables
from throughput import native_bf16
from torch import Tensor

from ood_lib.domains import load_images
from ood_lib.models import load_model, pipeline_folder

HERE = Path(__file__).parent
ENOUGH = 0.01
TIMED_CALLS = 60
ROUND_TRIPS = 4  # images that are also carried back
QUICK = {"points": 4, "images": 1, "repeats": 1, "reference_points": 12}  # in place of options
PACKAGES = ("torch", "diffusers", "openvino", "azula", "numpy")


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image."""
    return x.double().flatten(1).square().mean(1).sqrt()


def make_setup(name: str) -> Setup:
    """Load a model once for all contenders."""
    default = load_model(name)
    plain = plain_network(default)
    same = replace(default, predict=plain.eps, backend="torch")
    folder = pipeline_folder(name)
    saved = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    return Setup(plain, default, same, dict(DDPMScheduler.from_pretrained(saved).config))


def load_domains(setup: Setup, domains: list[str], images: int) -> Tensor:
    """Give `images` of the first domain, and as many of the others together."""
    others = len(domains) - 1
    counts = [images, *(images // others + (k < images % others) for k in range(others))]
    return torch.cat(
        [
            load_images(domain, n=n, split="heldout", like=setup.default)
            for domain, n in zip(domains, counts, strict=True)
            if n
        ]
    )


class Judge:
    """Hold the images and the references, and measure single runs.

    Parameters
    ----------
    setup : Setup
        The networks.
    images : Tensor of shape (N, C, H, W)
        The images that every contender carries.
    points : int
        Points of a reference.
    """

    def __init__(self, setup: Setup, images: Tensor, points: int) -> None:
        self.net, self.images, self.points = setup.plain, images, points
        self.references = [Reference(self.net, images, points)]

    def reference(self, start: Tensor) -> Reference:
        """Find or make the reference that begins at `start`."""
        for known in self.references:
            if torch.allclose(known.start, start.double(), atol=1e-6):
                return known
        self.references.append(Reference(self.net, start, self.points))
        return self.references[-1]

    def reference_error(self) -> float:
        """Error of the reference at its end: a third of its distance to one of half the points."""
        t = self.net.schedule.num_train_timesteps - 1
        coarse = Reference(self.net, self.images, (self.points + 1) // 2)
        return rms(coarse.at(t) - self.references[0].at(t)).median().item() / 3

    def rung(self, contender: Contender, n: int) -> dict[str, Any]:
        """Run a contender once and judge where it arrives and, with a few images, what it gives back."""
        started = time.perf_counter()
        made = contender.there(self.images, n)
        taken = time.perf_counter() - started
        exact = self.reference(self.images if made.start is None else made.start).at(made.t_end)
        error = rms(made.value - exact)
        return {
            "contender": contender.name,
            "group": contender.group,
            "points": n if n else len(made.grid),
            "rung": n,
            "calls": made.calls,
            "t_end": made.t_end,
            "latent_rmse": error.median().item(),
            "relative_rmse": (error / rms(exact)).median().item(),
            "roundtrip_rmse": self._roundtrip(contender, made, n),
            "seconds_once": taken,
        }

    def _roundtrip(self, contender: Contender, made: Latent, n: int) -> float:
        few = np.linspace(0, len(self.images) - 1, min(ROUND_TRIPS, len(self.images))).astype(int)
        companion = None if made.companion is None else made.companion[few]
        part = replace(made, value=made.value[few], companion=companion)
        return rms(contender.back(part, n) - self.images[few]).median().item()

    def climb(self, contender: Contender) -> list[dict[str, Any]]:
        """Climb the ladder until the error is small enough."""
        rows: list[dict[str, Any]] = []
        for n in contender.ladder:
            rows.append(self.rung(contender, n))
            if rows[-1]["latent_rmse"] <= ENOUGH:
                break
        return rows

    def seconds(self, contender: Contender, n: int) -> float:
        """Time one run; the time of a few images is scaled to all."""
        images = self.images[: contender.timed_images]
        started = time.perf_counter()
        contender.there(images, n)
        return (time.perf_counter() - started) * len(self.images) / len(images)


def sweep(judge: Judge, table: list[Contender]) -> pd.DataFrame:
    """Judge every rung; a contender that is like another takes over its errors."""
    rows: list[dict[str, Any]] = []
    for contender in table:
        if contender.like is None:
            rows += judge.climb(contender)
        else:
            same = [row for row in rows if row["contender"] == contender.like]
            own = {"contender": contender.name, "seconds_once": math.nan}
            rows += [row | own for row in same]
        print(f"{contender.name}: {rows[-1]['latent_rmse']:.3g}", file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def timed_rung(rows: pd.DataFrame) -> pd.Series:
    """Choose the rung to time: the decisive one, or the last below it that is short enough."""
    best = decisive(rows)
    short = rows[rows.calls <= min(TIMED_CALLS, best.calls)]
    return short.iloc[-1] if len(short) else rows.iloc[0]


def add_seconds(
    judge: Judge, table: list[Contender], rows: pd.DataFrame, repeats: int
) -> pd.DataFrame:
    """Time the contenders in turn, and give every rung the seconds that follow."""
    rungs = {name: timed_rung(part) for name, part in rows.groupby("contender")}
    times: dict[str, list[float]] = {contender.name: [] for contender in table}
    for _ in range(repeats):
        for contender in table:
            taken = judge.seconds(contender, int(rungs[contender.name].rung))
            times[contender.name].append(taken / rungs[contender.name].calls)
    per_call = rows.contender.map({name: float(np.median(t)) for name, t in times.items()})
    timed = rows.contender.map({name: int(row.points) for name, row in rungs.items()})
    seconds = per_call * rows.calls
    rate = len(judge.images) / seconds
    return rows.assign(seconds=seconds, images_per_s=rate, timed_points=timed).drop(columns="rung")


def network_calls(name: str, quick: bool) -> list[dict[str, Any]]:
    """Measure single network calls in a process of their own for each number of threads."""
    made = []
    for threads in (1,) if quick else (torch.get_num_threads(), 1):
        command = [sys.executable, str(HERE / "throughput.py"), "--model", name]
        command += ["--threads", str(threads)]
        command += ["--batch", "2", "--repeats", "1", "--quick"] if quick else []
        quiet = os.environ | {"KINETO_LOG_LEVEL": "99"}  # the profiler tells of its start and stop
        done = subprocess.run(command, env=quiet, check=True, stdout=subprocess.PIPE, text=True)
        made.append(json.loads(done.stdout.splitlines()[-1]))
    return made


def machine() -> dict[str, Any]:
    """Describe processor and software; the name of the machine is nobody's business."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if "model name" in line]
        if (info.is_file())
        else []
    )
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_bf16": native_bf16(),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def finite(value: Any) -> Any:
    """Replace what JSON has no number for by null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ddpm-fashion-32")
    parser.add_argument(
        "--domains",
        nargs="+",
        default=["fashion", "digits", "faces"],
        help="the model's own, then one or more that it never saw",
    )
    parser.add_argument(
        "--images", type=int, default=6, help="of the own domain, and of the others"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few points, few images")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for JSON and figure")
    parser.set_defaults(points=None, reference_points=240)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if len(args.domains) < 2 or args.images < 1 or args.repeats < 1:
        parser.error("give two or more domains, one or more images and repeats")
    return args


def settings(args: argparse.Namespace, setup: Setup, judge: Judge) -> dict[str, Any]:
    """Say how it was measured."""
    missing = "azula could not be imported: its samplers did not run"
    return {
        "model": args.model,
        "domains": args.domains,
        "images": len(judge.images),
        "repeats": args.repeats,
        "quick": args.quick,
        "goal": GOAL,
        "enough": ENOUGH,
        "timed_calls": TIMED_CALLS,
        "round_trip_images": min(ROUND_TRIPS, len(judge.images)),
        "reference_points": args.reference_points,
        "reference_error": judge.reference_error(),
        "default_backend": f"{setup.default.backend} {setup.default.precision}",
        "clip_sample_as_saved": setup.scheduler_config["clip_sample"],
        "missing": [] if azula_version() else [missing],
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], pd.DataFrame]:
    """Run everything."""
    described, setup = machine(), make_setup(args.model)
    images = load_domains(setup, args.domains, args.images)
    judge, table = Judge(setup, images, args.reference_points), contenders(setup)
    if args.points:
        table = [replace(contender, ladder=(args.points,)) for contender in table]
    rows = add_seconds(judge, table, sweep(judge, table), args.repeats)
    made = {"machine": described, "settings": settings(args, setup, judge)}
    return made | {"network_calls": network_calls(args.model, args.quick)}, rows


def main() -> None:
    """Measure, write ``inversion.json`` and ``inversion.png``, print the tables."""
    args = parse()
    made, rows = measure(args)
    best = compare(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {"rows": rows.to_dict("records"), "comparison": best.to_dict("records")}
    text = json.dumps(finite(made | tables), indent=1, allow_nan=False)
    (args.out / "inversion.json").write_text(text + "\n")
    draw(rows).savefig(args.out / "inversion.png")
    calls = [row | {"threads": m["threads"]} for m in made["network_calls"] for row in m["rows"]]
    print_tables(rows, best, pd.DataFrame(calls))
    print("\n".join(made["settings"]["missing"]))


if __name__ == "__main__":
    main()
