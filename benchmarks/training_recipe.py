"""Train the relief network briefly in several settings and print what it has learned of each level.

    .venv/bin/python benchmarks/training_recipe.py [SETTING ...]

Every setting sees the same 25,600 images, about four minutes on one thread. Printed are the error of
eps on 64 held-out images at some timesteps and, in units of pixels in [-1, 1], the error of the overall
colour that it implies; the colours of the images themselves spread by 0.47.
"""

import sys
import time

import torch

from ood_lib.domains import load_images
from ood_lib.sources import train_images
from ood_lib.training import Recipe, TrainingRun, fast_precision

BASE = {"images_seen": 25_600, "precision": fast_precision()}
SETTINGS = {
    "batch 64, rate 0.0006, simple loss": {
        "batch_size": 64,
        "lr": 6e-4,
        "groups": 8,
        "noise_weight": 0.0,
    },
    "batch 64, rate 0.0006": {"batch_size": 64, "lr": 6e-4, "groups": 8},
    "batch 32, rate 0.0006": {"lr": 6e-4, "groups": 8},
    "batch 32, rate 0.0012": {"lr": 1.2e-3, "groups": 8},
    "batch 32, rate 0.0024": {"groups": 8},
    "batch 32, rate 0.0024, one group": {},
}
TIMESTEPS = (50, 300, 700, 900)


def errors(run: TrainingRun, held_out: torch.Tensor, t: int) -> tuple[float, float]:
    """Mean squared error of eps at a timestep, and rms error of the overall colour."""
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(t))
    at = torch.full((len(held_out),), t)
    x_t = run.scheduler.add_noise(held_out, noise, at)
    with torch.inference_mode():
        gap = run.ema_network()(x_t, at).sample - noise
    alpha_bar = run.scheduler.alphas_cumprod[t]
    colour = ((1 - alpha_bar) / alpha_bar).sqrt() * gap.mean((2, 3))
    return gap.square().mean().item(), colour.square().mean().sqrt().item()


def main() -> None:
    """Train and measure the settings named on the command line, or all."""
    images, held_out = train_images("relief"), load_images("relief", n=64, split="heldout")
    for name in sys.argv[1:] or SETTINGS:
        run = TrainingRun(images, Recipe(**BASE, **SETTINGS[name]), "cpu")
        started = time.perf_counter()
        while run.step < run.recipe.steps:
            run.advance()
        rate = run.recipe.images_seen / (time.perf_counter() - started)
        print(f"{name}: {rate:.0f} images/s")
        for t in TIMESTEPS:
            eps, colour = errors(run, held_out, t)
            print(f"  t = {t:3d}  error of eps {eps:.4f}  of the colour {colour:.3f}", flush=True)


if __name__ == "__main__":
    main()
