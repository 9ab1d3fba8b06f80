"""How fast one network call is in each backend, and how close it comes to what the machine can do.

    .venv/bin/python benchmarks/throughput.py --threads 2

Every backend works on the same batch, in turn and repeatedly; the medians are compared with the network
as diffusers calls it: plain PyTorch, float32. The process is bound to as many cores as it has threads.

The limit of a call is the time of its convolutions and matrix products at the best rate that a large
product of the same precision reaches here, plus the time to move, once, what the other operations of
eager PyTorch read and write. Copying a tensor as large as the largest of them gives the bandwidth. A
backend that fuses operations moves less, so it is held to the first part alone as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from loops import plain_module, plain_network
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ood_lib.models import FrozenModel, load_model
from ood_lib.scale import count_flops

PLAIN = "torch fp32 as in diffusers"
BACKENDS = (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"))
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear")
LEVEL = 500.0


def bind(threads: int) -> None:
    """Keep this process on as many cores as it may have threads; other backends see only those."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def load_backends(name: str) -> tuple[dict[str, FrozenModel], dict[str, str]]:
    """Load a model in every backend and precision; where one is refused, keep the reason."""
    models, refused = {}, {}
    for backend, precision in BACKENDS:
        label = f"{backend} {precision}"
        try:
            models[label] = load_model(name, backend=backend, precision=precision)
        except (ValueError, ImportError) as error:
            refused[label] = str(error)
    return models, refused


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest time of a call: what the machine can do, not what it usually does."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time calls in turn, so that a noisy moment hits all of them; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            taken = seconds(call, 1)
            if round_:
                times[name].append(taken)
    return times


class Traffic(TorchDispatchMode):
    """Count what operations read and write that are neither matrix products nor mere views.

    `bytes` counts every tensor once as it goes in and once as it comes out; `largest` is the largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count its tensors."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith("empty"):
            self._count(name, torch.utils._pytree.tree_leaves((args, kwargs, out)))
        return out

    def _count(self, name: str, leaves: list[Any]) -> None:
        sizes = [x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        if not any(product in name for product in PRODUCTS):
            self.bytes += sum(sizes)


def count_traffic(network: torch.nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """Give the bytes that a call moves outside of its products, and the size of its largest tensor."""
    with torch.no_grad(), Traffic() as traffic:
        network(*inputs)
    return traffic.bytes, traffic.largest


def product_share(network: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Share of a call's time in convolutions and matrix products, by PyTorch's profiler."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof:
        network(*inputs)
    own = {event.key: event.self_cpu_time_total for event in prof.key_averages()}
    spent = sum(t for key, t in own.items() if any(p in key for p in (*PRODUCTS, "attention")))
    return spent / sum(own.values())


def peak_rate(dtype: torch.dtype, side: int, repeats: int) -> float:
    """Operations a second of a large square product: the better of matmul and oneDNN's convolution."""
    a, b = torch.randn(2, side, side, dtype=dtype)
    image = torch.randn(1, side, side // 32, 32, dtype=dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(side, side, 1, 1, dtype=dtype)
    with torch.inference_mode():
        product = seconds(lambda: a @ b, repeats)
        convolution = seconds(lambda: torch.nn.functional.conv2d(image, kernel), repeats)
    return 2 * side**3 / min(product, convolution)


def bandwidth(size: int, repeats: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes."""
    source = torch.zeros(max(size // 4, 1))
    target = torch.ones_like(source)
    return 2 * 4 * len(source) / seconds(lambda: target.copy_(source), repeats)


def native_bf16() -> bool:
    """Whether the processor multiplies in bf16 itself."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def machine_limit(model: FrozenModel, batch: int, quick: bool) -> dict[str, Any]:
    """Work and traffic of a call, the machine's best rates, and the least time that follows."""
    network = plain_module(model)
    inputs = torch.randn(batch, *model.sample_shape), torch.full((batch,), LEVEL)
    side, repeats = (256, 2) if quick else (2048, 10)
    moved, largest = count_traffic(network, *inputs)
    flops, rate = count_flops(network, *inputs), bandwidth(largest, 20 * repeats)
    peaks = {"fp32": peak_rate(torch.float32, side, repeats)}
    if native_bf16():
        peaks["bf16"] = peak_rate(torch.bfloat16, side, repeats)
    return {
        "flops_per_call": flops,
        "bytes_outside_products": moved,
        "largest_tensor_bytes": largest,
        "copy_bytes_per_s": rate,
        "peak_flops_per_s": peaks,
        "limit_s": {kind: flops / peak + moved / rate for kind, peak in peaks.items()},
        "product_share_of_eager_time": product_share(network, *inputs),
    }


def compare(
    name: str, batch: int, repeats: int, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """Measure every backend and the machine's limit; the refused backends come last."""
    models, refused = load_backends(name)
    eps = {PLAIN: plain_network(models["torch fp32"]).eps} | {k: m.eps for k, m in models.items()}
    x = torch.randn(batch, *models["torch fp32"].sample_shape, generator=torch.manual_seed(0))
    limit = machine_limit(models["torch fp32"], batch, quick)
    answers = {label: call(x, LEVEL) for label, call in eps.items()}
    times = interleaved({k: (lambda f=f: f(x, LEVEL)) for k, f in eps.items()}, repeats)
    rows = [
        _row(label, float(np.median(taken)), float(np.median(times[PLAIN])), batch, limit)
        | {"eps_rms_difference": float((answers[label] - answers[PLAIN]).square().mean().sqrt())}
        for label, taken in times.items()
    ]
    return rows, limit, refused


def _row(
    label: str, taken: float, plain: float, batch: int, limit: dict[str, Any]
) -> dict[str, Any]:
    precision = "bf16" if "bf16" in label and "bf16" in limit["limit_s"] else "fp32"
    rate = limit["flops_per_call"] / taken
    return {
        "backend": label,
        "seconds_per_call": taken,
        "images_per_s": batch / taken,
        "times_plain": plain / taken,
        "gflops_per_s": rate / 1e9,
        "share_of_peak": rate / limit["peak_flops_per_s"][precision],
        "share_of_limit": limit["limit_s"][precision] / taken,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ddpm-fashion-32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    bind(args.threads)
    rows, limit, refused = compare(args.model, args.batch, args.repeats, args.quick)
    made = {"threads": args.threads, "batch": args.batch, "repeats": args.repeats}
    print(json.dumps(made | {"rows": rows, "limit": limit, "refused": refused}))


if __name__ == "__main__":
    main()
