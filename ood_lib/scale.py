"""What the paper's models cost: work and memory of a network call, and plans for many images.

The two architectures stand here as data; no weights are fetched. Work is counted by PyTorch on
tensors without content (device "meta"), memory and time are measured on networks with random weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ood_lib.inversion import invert
from ood_lib.models import FrozenModel

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = [
    "ARCHITECTURES",
    "HELD_STATES",
    "Cost",
    "Pass",
    "Plan",
    "Run",
    "about",
    "build",
    "cost_of",
    "count_flops",
    "duration",
    "example",
    "measure_pass",
    "memory_needed",
    "plan",
    "real_runs",
    "rounded",
]

# Arguments of diffusers' UNet2DModel: what `ood_lib.checkpoints.to_unet` derives from a checkpoint.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # google/ddpm-celebahq-256, google/ddpm-church-256, google/ddpm-bedroom-256
    "ddpm-256": {
        "sample_size": 256,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    # afhqdog_p2.pt: outputs noise and variance
    "adm-256": {
        "sample_size": 256,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (
            *("ResnetDownsampleBlock2D",) * 4,
            "AttnDownBlock2D",
            "ResnetDownsampleBlock2D",
        ),
        "up_block_types": (
            "ResnetUpsampleBlock2D",
            "AttnUpBlock2D",
            *("ResnetUpsampleBlock2D",) * 4,
        ),
        "layers_per_block": 1,
        "attention_head_dim": 64,
        "attn_norm_num_groups": 32,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
    },
}
# What `invert` holds of each image with solver ab2: 11 float64 states, and the image in float32.
HELD_STATES = 11.5
TIMED_CALLS = 5
USABLE = 0.9  # share of a device's memory that a plan fills
UNITS = (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Cost:
    """What one architecture costs, whatever the device.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    parameters : int
        Numbers in the weights.
    flops : int
        Floating-point operations of one network call for one image.
    weight_bytes : int
        Weights in float32.
    dimension : int
        Numbers in one image, and so in one latent.
    state_bytes : int
        One image on its way, in float64.
    latent_bytes : int
        One latent on disk, in float32.
    """

    name: str
    parameters: int
    flops: int
    weight_bytes: int
    dimension: int
    state_bytes: int
    latent_bytes: int


@dataclass(frozen=True)
class Pass:
    """One network call that really ran: float32, random weights, one thread.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    batch : int
        Images in the call.
    seconds : float
        Processor time: what else runs on the machine does not count.
    flops_per_second : float
        Operations of the call over `seconds`.
    peak_bytes : int
        Largest resident memory of the whole process.
    activation_bytes : float
        What the call added to the process with its weights, over `batch`.
    """

    name: str
    batch: int
    seconds: float
    flops_per_second: float
    peak_bytes: int
    activation_bytes: float


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run over many images.

    Parameters
    ----------
    images : int
        Images of the run.
    calls : int
        Network calls an image.
    devices : int
        Devices that share the images; each holds the whole network.
    batch : int
        Images in a network call.
    folder : int
        Images whose states fit into a device beside such a call: the most that one `invert` takes.
    seconds_per_image : float
        On one device.
    hours : float
        Of the whole run.
    latent_bytes : int
        Latents on disk.
    """

    images: int
    calls: int
    devices: int
    batch: int
    folder: int
    seconds_per_image: float
    hours: float
    latent_bytes: int


def build(name: str, *, seed: int | None = None) -> UNet2DModel:
    """Build a network of the paper's scale.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    seed : int, optional
        Source of random weights. Without it the network lies on torch's device "meta": shapes
        without content, which take no memory.

    Returns
    -------
    UNet2DModel
        The network in float32, evaluation mode.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> sum(p.numel() for p in build("ddpm-256").parameters())
    113673219
    """
    from diffusers import UNet2DModel

    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not known; use {', '.join(ARCHITECTURES)}")
    if seed is None:
        with torch.device("meta"):
            return UNet2DModel(**ARCHITECTURES[name]).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**ARCHITECTURES[name]).eval()


def example(
    network: UNet2DModel, *, batch: int = 1, side: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make inputs of a network: noise at the middle of the path.

    Parameters
    ----------
    network : UNet2DModel
        The network; the inputs lie on its device.
    batch : int, default 1
        Number of images.
    side : int, optional
        Height and width in pixels; that of the network by default.

    Returns
    -------
    tuple
        Images (batch, C, side, side) and timesteps (batch,).

    Examples
    --------
    >>> [tuple(x.shape) for x in example(build("adm-256"), batch=2)]
    [(2, 3, 256, 256), (2,)]
    """
    side = side or network.config.sample_size
    generator = None if network.device.type == "meta" else torch.Generator().manual_seed(0)
    shape = (batch, network.config.in_channels, side, side)
    images = torch.randn(shape, device=network.device, generator=generator)
    return images, torch.full((batch,), 500.0, device=network.device)


def count_flops(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Count the floating-point operations of one forward pass.

    Parameters
    ----------
    network : Module
        A network, best on the device "meta", where nothing is computed.
    *inputs : Tensor
        What it is called with, on the same device.

    Returns
    -------
    int
        Operations; a multiplication and an addition are two.

    Notes
    -----
    PyTorch's counter knows matrix products, convolutions and attention. What works on single numbers
    is not counted: norms, activations, softmax, additions, resampling.

    Examples
    --------
    >>> layer = torch.nn.Linear(10, 20, device="meta")
    >>> count_flops(layer, torch.empty(3, 10, device="meta")) == 2 * 3 * 10 * 20
    True
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


def cost_of(name: str) -> Cost:
    """Count what an architecture costs, without weights.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.

    Returns
    -------
    Cost
        Parameters, operations and bytes for one image.

    Examples
    --------
    >>> cost = cost_of("adm-256")
    >>> cost.parameters, cost.dimension
    (93563910, 196608)
    """
    network = build(name)
    inputs = example(network)
    parameters, dimension = sum(p.numel() for p in network.parameters()), inputs[0].numel()
    return Cost(
        name=name,
        parameters=parameters,
        flops=count_flops(network, *inputs),
        weight_bytes=4 * parameters,
        dimension=dimension,
        state_bytes=8 * dimension,
        latent_bytes=4 * dimension,
    )


def measure_pass(name: str, *, batch: int = 1, seed: int = 0) -> Pass:
    """Run one network call in a process of its own and measure it.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    batch : int, default 1
        Images in the call.
    seed : int, default 0
        Source of the weights.

    Returns
    -------
    Pass
        Time and memory.

    Raises
    ------
    ValueError
        If the name is unknown or the batch is empty.

    Notes
    -----
    Memory is the resident set that the system reports of the process. On Linux glibc is told to give
    freed tensors back at once; elsewhere the figure holds some that are free. Weights and inputs
    are there before the call and are not counted. As in `load_model`, weights and images lie channels last.

    Examples
    --------
    >>> measure_pass("ddpm-256", batch=0)
    Traceback (most recent call last):
    ValueError: batch is 0; give 1 or more images
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; give 1 or more images")
    cost = cost_of(name)
    command = [sys.executable, "-m", __name__, name, str(batch), str(seed)]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True
    )
    seconds, before, peak = json.loads(done.stdout.splitlines()[-1])
    return Pass(
        name=name,
        batch=batch,
        seconds=seconds,
        flops_per_second=batch * cost.flops / seconds,
        peak_bytes=peak,
        activation_bytes=(peak - before) / batch,
    )


def _run_pass(name: str, batch: int, seed: int) -> tuple[float, int, int]:
    """Give processor seconds of a call, memory before it, and the peak after it."""
    torch.set_num_threads(1)
    network = build(name, seed=seed).to(memory_format=torch.channels_last)
    images, timesteps = example(network, batch=batch)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(*example(network, side=128))  # loads code and kernels, which are no part of a pass
        before, start = _resident_bytes()[0], time.process_time()
        network(images, timesteps)
        return time.process_time() - start, before, _resident_bytes()[1]


def _resident_bytes() -> tuple[int, int]:
    """Memory of this process now, and at its peak.

    Linux lets a process inherit the peak that ``getrusage`` tells, so there it is not asked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        told = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
        return 1024 * int(told["VmRSS"]), 1024 * int(told["VmHWM"])
    from resource import RUSAGE_SELF, getrusage

    peak = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def memory_needed(cost: Cost, activation_bytes: float, *, images: int, batch: int = 64) -> float:
    """Bytes that `invert` needs on its device for a set of images.

    Parameters
    ----------
    cost : Cost
        Of the architecture.
    activation_bytes : float
        What a network call needs an image, measured by `measure_pass`.
    images : int
        Images inverted together: their states stay in memory until the end.
    batch : int, default 64
        Images in a network call.

    Returns
    -------
    float
        Weights, one network call and the states.

    Examples
    --------
    >>> round(memory_needed(cost_of("ddpm-256"), 340e6, images=64) / 1e9)
    23
    """
    call = min(batch, images) * activation_bytes
    return cost.weight_bytes + call + images * HELD_STATES * cost.state_bytes


def plan(
    cost: Cost,
    activation_bytes: float,
    *,
    images: int,
    calls: int,
    flops_per_second: float,
    devices: int = 1,
    memory: float = 80e9,
    batch: int = 64,
) -> Plan:
    """Plan a run over many images.

    Parameters
    ----------
    cost : Cost
        Of the architecture.
    activation_bytes : float
        What a network call needs an image, measured by `measure_pass`.
    images : int
        Images to invert or to generate.
    calls : int
        Network calls an image: one less than the points of the grid for ddim and ab2.
    flops_per_second : float
        What one device sustains; an assumption, unless it was measured there.
    devices : int, default 1
        Devices that share the images evenly.
    memory : float, default 80e9
        Bytes of one device, a tenth of which stays free.
    batch : int, default 64
        Images in a network call, fewer if they would fill more than half of what is free; 64 is the
        default of `invert`.

    Returns
    -------
    Plan
        Batch, images that fit, time and disk.

    Raises
    ------
    ValueError
        If a count is below 1, a rate is not positive, or a device cannot hold one image.

    Examples
    --------
    >>> plan(cost_of("ddpm-256"), 340e6, images=100, calls=79, flops_per_second=1e13).batch
    64
    """
    counts = {"images": images, "calls": calls, "devices": devices, "batch": batch}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; give 1 or more")
    if flops_per_second <= 0 or activation_bytes <= 0:
        raise ValueError(
            f"flops_per_second is {flops_per_second:g} and activation_bytes {activation_bytes:g}; "
            "give the positive figures of measure_pass"
        )
    free = USABLE * memory - cost.weight_bytes
    batch = min(batch, int(free / 2 / activation_bytes))
    if batch < 1:
        least = (2 * activation_bytes + cost.weight_bytes) / USABLE
        raise ValueError(f"{memory / 1e9:g} GB hold no image; give {least / 1e9:.2g} GB or more")
    seconds = calls * cost.flops / flops_per_second
    return Plan(
        images=images,
        calls=calls,
        devices=devices,
        batch=batch,
        folder=int((free - batch * activation_bytes) / (HELD_STATES * cost.state_bytes)),
        seconds_per_image=seconds,
        hours=math.ceil(images / devices) * seconds / 3600,
        latent_bytes=images * cost.latent_bytes,
    )


@dataclass(frozen=True)
class Run:
    """A run that was really made, beside its plan.

    Parameters
    ----------
    images : int
        Images that were inverted.
    calls : int
        Network calls an image.
    seconds : float
        Processor time.
    planned : float
        Images times calls times the processor time of an image in one call.
    latent_bytes : int
        Latents in float32.
    """

    images: int
    calls: int
    seconds: float
    planned: float
    latent_bytes: int


def real_runs(
    model: FrozenModel, images: torch.Tensor, sizes: Sequence[int], *, batch: int = 16
) -> list[Run]:
    """Invert sets of several sizes, and hold their times against what one network call promises.

    Parameters
    ----------
    model : FrozenModel
        A small model; a call of it must not take long.
    images : Tensor of shape (N, C, H, W)
        As many images as the largest size, at least `batch`.
    sizes : sequence of int
        Images of each run.
    batch : int, default 16
        Images in a network call.

    Returns
    -------
    list of Run
        One a size.

    Raises
    ------
    ValueError
        If there are fewer images than a run or a call needs.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> [run.images for run in real_runs(model, torch.zeros(2, 1, 32, 32), [1, 2], batch=2)]
    [1, 2]
    """
    if len(images) < max(*sizes, batch):
        raise ValueError(f"there are {len(images)} images; {max(*sizes, batch)} are needed")
    model.eps(images[:batch], 1.0)  # the first call sets up
    started = time.process_time()
    for _ in range(TIMED_CALLS):
        model.eps(images[:batch], 1.0)
    call = (time.process_time() - started) / TIMED_CALLS / batch
    runs = []
    for n in sizes:
        started = time.process_time()
        made = invert(model, images[:n], batch_size=batch)
        seconds = time.process_time() - started
        planned = n * made.nfe * call
        runs.append(Run(n, made.nfe, seconds, planned, 4 * made.latent.numel()))
    return runs


def rounded(value: float, digits: int = 1) -> float:
    """Round to significant digits; one is all that a clock deserves.

    Parameters
    ----------
    value : float
        Any number.
    digits : int, default 1
        Significant digits.

    Returns
    -------
    float
        The rounded number.

    Examples
    --------
    >>> rounded(126.3), rounded(335_872_000, 2)
    (100.0, 340000000.0)
    """
    return float(f"{value:.{digits}g}")


def about(value: float, digits: int = 1) -> str:
    """Write a number with few significant digits and without an exponent.

    Parameters
    ----------
    value : float
        Any number.
    digits : int, default 1
        Significant digits.

    Returns
    -------
    str
        For people.

    Examples
    --------
    >>> about(1263.0), about(0.0126)
    ('1,000', '0.01')
    """
    short = rounded(value, digits)
    return f"{short:,.0f}" if abs(short) >= 10 else f"{short:g}"


def duration(seconds: float) -> str:
    """Write a time with one significant digit, in the largest unit of which there are two or more.

    Parameters
    ----------
    seconds : float
        The time.

    Returns
    -------
    str
        For people.

    Examples
    --------
    >>> duration(5716), duration(99_000), duration(0.4)
    ('2 h', '30 h', '0.4 s')
    """
    unit, size = next((u for u in UNITS if seconds / u[1] >= 1.5), UNITS[-1])
    return f"{about(seconds / size)} {unit}"


if __name__ == "__main__":
    print(json.dumps(_run_pass(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
