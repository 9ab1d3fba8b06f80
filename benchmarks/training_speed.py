"""Time training steps in several settings, in turn and repeatedly, and print ratios to the first.

    .venv/bin/python benchmarks/training_speed.py

Nothing else should run beside it. It takes about a minute on two cores.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from ood_lib.training import Recipe, TrainingRun

ROUNDS, STEPS = 5, 4
PLAIN, LAST = torch.contiguous_format, torch.channels_last
SETTINGS = {  # name: precision, threads, memory layout
    "fp32, 2 threads": ("fp32", 2, PLAIN),
    "fp32, 1 thread": ("fp32", 1, PLAIN),
    "bf16, 2 threads": ("bf16", 2, PLAIN),
    "bf16, 1 thread": ("bf16", 1, PLAIN),
    "bf16, 1 thread, channels-last": ("bf16", 1, LAST),
}


def seconds(run: TrainingRun, threads: int) -> float:
    """Time `STEPS` steps."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for _ in range(STEPS):
        run.advance()
    return time.perf_counter() - started


def start(pixels: np.ndarray, precision: str, layout: torch.memory_format) -> TrainingRun:
    """Begin a run whose network has the given precision and layout."""
    run = TrainingRun(pixels, replace(Recipe(), precision=precision), "cpu")
    run.net.to(memory_format=layout)
    return run


def main() -> None:
    """Interleave the settings, so that a noisy moment hits all of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 1), dtype=np.uint8)
    runs = {
        name: (start(pixels, precision, layout), threads)
        for name, (precision, threads, layout) in SETTINGS.items()
    }
    for run, threads in runs.values():
        seconds(run, threads)
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, threads) in runs.items():
            times[name].append(seconds(run, threads))
    first = np.median(next(iter(times.values())))
    for name, taken in times.items():
        rate = STEPS * Recipe().batch_size / np.median(taken)
        print(f"{name:28s} {rate:6.0f} images/s   {first / np.median(taken):5.2f} x")


if __name__ == "__main__":
    main()
