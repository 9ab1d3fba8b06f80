"""What runs a network: torch or OpenVINO, in fp32 or bf16, in batches that fit into memory.

Both backends give the same noise in fp32, to 1e-5 of its size (rms), and the same latents, to 1e-4. In
bf16 the noise is within 2 % (0.4 % was seen), but the path to a latent magnifies that: images came
back with an error 3 to 10 % larger, while the latents in between were 14 to 24 % off.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ood_lib.files import project_root, write_whole

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "batched",
    "choose_backend",
    "compile_cached",
    "forward_of",
    "import_openvino",
]

BACKENDS = ("auto", "torch", "openvino")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Images of 32x32 in a call on a processor, whose caches hold few. On one thread of an AVX2 processor
# torch took 32 images 11 to 17 % faster than 64, and 3 to 7 % faster than 16. OpenVINO was as fast
# with 4, 8 and 16; it pads what is left over, so it takes few.
CHUNKS = {"torch": 32, "openvino": 8}
# what torch says when memory runs out, besides raising torch.OutOfMemoryError
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED")

Forward = Callable[[torch.Tensor, float], torch.Tensor]


def import_openvino() -> ModuleType | None:
    """Import OpenVINO without its telemetry.

    Its plain import reports to a web service unless the user has opted out. It does without where the
    package that reports cannot be imported, so that package is barred from this process first.

    Returns
    -------
    module or None
        None where OpenVINO is not installed.

    Examples
    --------
    >>> import_openvino() is import_openvino()
    True
    """
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError:
        return None
    return openvino


def choose_backend(name: str, *, device: str = "cpu", precision: str = "fp32") -> str:
    """Choose what runs a network, or say why it cannot.

    Parameters
    ----------
    name : {"auto", "torch", "openvino"}
        "auto" is OpenVINO where it is installed and the faster one, else torch.
    device : str, default "cpu"
        A torch device.
    precision : {"fp32", "bf16"}, default "fp32"
        Precision in which the network runs.

    Returns
    -------
    {"torch", "openvino"}
        The backend.

    Raises
    ------
    ValueError
        If a name is not known, or OpenVINO is asked for where it cannot do what is asked.

    Examples
    --------
    >>> choose_backend("torch", precision="bf16")
    'torch'
    """
    for what, value, known in (("backend", name, BACKENDS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not known; use one of {', '.join(known)}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        return "openvino" if on_cpu and _openvino_wins(precision) else "torch"
    if name == "openvino":
        _check_openvino(device if not on_cpu else None, precision)
    return name


def _openvino_wins(precision: str) -> bool:
    """Tell whether OpenVINO is there and faster than torch.

    That takes AVX-512, which every processor with AMX has. With AVX2 OpenVINO took 133 to 152 images a
    second and torch 137 to 148, which does not pay for compiling.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or import_openvino() is None:
        return False
    return precision == "fp32" or _openvino_has_bf16()


def _openvino_has_bf16() -> bool:
    """Tell whether OpenVINO computes in bf16 here; where it cannot it would take fp32 unasked."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _check_openvino(other_device: str | None, precision: str) -> None:
    if other_device is not None:
        raise ValueError(
            f"backend 'openvino' runs on the CPU, not on {other_device!r}; use device='cpu', or "
            "backend='torch'"
        )
    if import_openvino() is None:
        raise ValueError(
            "backend 'openvino' is not installed: pip install 'ood_lib[fast]', or use backend='torch'"
        )
    if precision == "bf16" and not _openvino_has_bf16():
        raise ValueError(
            "backend 'openvino' has no precision 'bf16' on this processor; use precision='fp32', or "
            "backend='torch'"
        )


def forward_of(network: UNet2DModel, *, backend: str = "torch", precision: str = "fp32") -> Forward:
    """Make the function that runs a network on a batch at one timestep.

    Parameters
    ----------
    network : UNet2DModel
        The network, in evaluation mode; for torch it is put into `precision` in place.
    backend : {"torch", "openvino"}, default "torch"
        What runs it. OpenVINO compiles it at the first call.
    precision : {"fp32", "bf16"}, default "fp32"
        Precision in which it runs.

    Returns
    -------
    callable
        ``(x_t, t) -> output`` for `x_t` (N, C, H, W) of any float type; the output is in `precision`
        with torch and float32 with OpenVINO. It follows weights that are changed later by
        ``load_state_dict`` or in place, but with OpenVINO not through ``.data``.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> network = load_model("ddpm-fashion-32", backend="torch").network
    >>> with torch.inference_mode():
    ...     forward_of(network)(torch.zeros(2, 1, 32, 32), 10.5).shape
    torch.Size([2, 1, 32, 32])
    """
    if backend == "openvino":
        return _OpenVinoForward(network, precision)
    dtype = PRECISIONS[precision]
    # not by network.to, which would log that the network has no part to be kept in float32
    nn.Module.to(network, dtype=dtype, memory_format=torch.channels_last)

    def forward(x_t: torch.Tensor, t: float) -> torch.Tensor:
        size = _chunk("torch", x_t) if x_t.device.type == "cpu" else max(1, len(x_t))
        with _no_tf32():
            return torch.cat([_call(network, part.to(dtype), t) for part in x_t.split(size)])

    return forward


def _call(network: UNet2DModel, x_t: torch.Tensor, t: float) -> torch.Tensor:
    batch = x_t.contiguous(memory_format=torch.channels_last)
    return network(batch, torch.full((len(batch),), float(t), device=batch.device)).sample


def _chunk(backend: str, x_t: torch.Tensor) -> int:
    """Images in a call on a processor: of larger images fewer, as the caches hold no more."""
    pixels = max(32 * 32, x_t.shape[-2] * x_t.shape[-1])
    return max(1, CHUNKS[backend] * 32 * 32 // pixels)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Keep cuDNN from its default, which rounds the factors of fp32 convolutions to 10 bits."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


class _Sample(nn.Module):
    """A network that returns a tensor, as OpenVINO wants it."""

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.network(x_t, timesteps).sample


class _OpenVinoForward:
    """Runs chunks of one size; a network with other weights, or other threads, is compiled anew."""

    def __init__(self, network: UNet2DModel, precision: str) -> None:
        self.network, self.precision = network, precision
        self.made_for: Any = None
        self.compiled: Any = None

    def __call__(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        size = _chunk("openvino", x_t)
        run, times = self._current(size, x_t.shape[1:]), np.full(size, t, dtype=np.float32)
        parts = []
        for part in x_t.float().split(size):
            padded = np.zeros((size, *x_t.shape[1:]), dtype=np.float32)
            padded[: len(part)] = part.numpy()
            parts.append(torch.from_numpy(run((padded, times))[0])[: len(part)])
        return torch.cat(parts)

    def _current(self, size: int, shape: Sequence[int]) -> Any:
        # torch counts the changes of a tensor in _version
        tensors = chain(self.network.parameters(), self.network.buffers())
        state = (
            size,
            *shape,
            torch.get_num_threads(),
            *((x.data_ptr(), x._version) for x in tensors),
        )
        if state != self.made_for:
            example = (torch.zeros(size, *shape), torch.zeros(size))
            self.compiled = compile_cached(
                _Sample(self.network), example, identity=self._identity(), precision=self.precision
            )
            self.made_for = state
        return self.compiled

    def _identity(self) -> str:
        config = {k: v for k, v in self.network.config.items() if not k.startswith("_")}
        said = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(self.network.state_dict().items()):
            said.update(f"{name} {tuple(value.shape)}".encode())
            said.update(value.float().contiguous().numpy())
        return f"UNet2DModel of diffusers {version('diffusers')}, {said.hexdigest()}"


def compile_cached(
    network: nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    identity: str,
    precision: str = "fp32",
    fixed: bool = True,
) -> Any:
    """Compile a network by OpenVINO, or take it from ``runs/openvino``.

    Parameters
    ----------
    network : Module
        The network; it returns one tensor.
    example : tuple of Tensor
        Its arguments.
    identity : str
        Everything that the result depends on: architecture, weights, recipe.
    precision : {"fp32", "bf16"}, default "fp32"
        Precision of the computation.
    fixed : bool, default True
        Compile for the shapes of `example` alone, which is faster than for any.

    Returns
    -------
    openvino.CompiledModel
        Takes arrays as `example` has them; the result is at [0].

    Examples
    --------
    >>> relu = compile_cached(nn.ReLU(), (torch.zeros(3),), identity="ReLU")
    >>> relu((np.array([-1, 0, 1], dtype=np.float32),))[0].tolist()
    [0.0, 0.0, 1.0]
    """
    core = import_openvino().Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        # where it is left out some processors take bf16, which was off by 5 % in another network
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # pinned, the threads of every process would share the same cores, and idle ones stay idle
        "ENABLE_CPU_PINNING": False,
    }
    processor = core.get_property("CPU", "FULL_DEVICE_NAME")
    shapes = [tuple(x.shape) for x in example] if fixed else "any shape"
    key = f"{identity}; {shapes}; {options}; {processor}; openvino {version('openvino')}"
    name = hashlib.sha256(key.encode()).hexdigest()
    path = project_root() / "runs" / "openvino" / f"{name}.blob"
    blob = _read_blob(path)
    if blob is not None:
        with suppress(RuntimeError):  # exported by another kind of machine
            return core.import_model(blob, "CPU", options)
    compiled = core.compile_model(_convert(network, example, fixed), "CPU", options)
    blob = compiled.export_model().getvalue()
    write_whole(path, lambda partial: partial.write_bytes(hashlib.sha256(blob).digest() + blob))
    return compiled


def _convert(network: nn.Module, example: tuple[torch.Tensor, ...], fixed: bool) -> Any:
    openvino = import_openvino()
    shapes = [openvino.PartialShape(list(x.shape)) for x in example] if fixed else None
    with warnings.catch_warnings():
        # OpenVINO still traces by torch.jit; what depends on the shape may, as the shape is fixed
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return openvino.convert_model(network, example_input=example, input=shapes)


def _read_blob(path: Path) -> bytes | None:
    """Read what was exported; None where the file is missing or its checksum is not its own."""
    with suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    return None


def batched(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, int]:
    """Apply a function batch by batch; a batch for which memory runs out is halved and tried again.

    Parameters
    ----------
    function : callable
        Maps a batch of n rows to n rows, each on its own.
    x : Tensor of shape (N, ...)
        The rows.
    batch_size : int
        Rows in a batch, 1 or more.

    Returns
    -------
    result : Tensor of shape (N, ...)
        The results in order.
    batch_size : int
        The size that fitted, to begin with the next time.

    Warns
    -----
    RuntimeWarning
        Once, if batches had to be made smaller.

    Raises
    ------
    RuntimeError
        What `function` raised, if memory runs out for a single row.

    Examples
    --------
    >>> batched(lambda batch: 2 * batch, torch.arange(5), 2)
    (tensor([0, 2, 4, 6, 8]), 2)
    """
    parts, start, size = [], 0, batch_size
    while start < len(x) or not parts:
        part = _unless_memory_ends(function, x[start : start + size])
        if part is None:
            size = min(size, len(x) - start) // 2
            continue
        parts.append(part)
        start += len(part)
    if size < batch_size:
        warnings.warn(
            f"memory ran out for a batch of {batch_size} images; {size} at once were taken instead, "
            "with the same result; a smaller batch_size saves the attempt",
            RuntimeWarning,
            stacklevel=2,
        )
    return torch.cat(parts), size


def _unless_memory_ends(
    function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
) -> torch.Tensor | None:
    """Give None where memory runs out; the caller tries again when what the error held is free."""
    try:
        return function(batch)
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if len(batch) < 2 or not (known or any(text in str(error) for text in NO_MEMORY)):
            raise
    torch.cuda.empty_cache()
    return None
