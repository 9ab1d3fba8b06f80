"""Frozen models: one interface, ``eps(x_t, t)``, for trained networks and for their controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError

from ood_lib.backends import PRECISIONS, choose_backend, forward_of
from ood_lib.checkpoints import load_checkpoint
from ood_lib.files import project_root
from ood_lib.schedule import NoiseSchedule, from_diffusers

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

__all__ = [
    "FrozenModel",
    "check_device",
    "from_network",
    "linear_model",
    "load_model",
    "model_names",
    "pipeline_folder",
    "random_model",
    "zero_model",
]

# a pickle is read only where there is no safetensors
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class FrozenModel:
    """A noise predictor that is only ever evaluated.

    Parameters
    ----------
    name : str
        Name in the zoo, folder or hub id.
    family : {"ddpm", "iddpm", "analytic"}
        Trained with the simple loss, with learned variances, or known in closed form.
    schedule : NoiseSchedule
        The noise schedule it was trained with.
    sample_shape : tuple of int
        (C, H, W) of one image.
    predict : callable
        ``(x_t, t) -> eps`` for a batch and one timestep.
    network : UNet2DModel, optional
        The network behind `predict`, where there is one.
    dtype : torch.dtype, default float32
        Type of the numbers in which the network runs.
    backend : {"torch", "openvino"}, default "torch"
        What runs the network.

    Examples
    --------
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> model.eps(torch.ones(1, 1, 32, 32), 10).abs().max().item()
    0.0
    """

    name: str
    family: str
    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    predict: Callable[[torch.Tensor, float], torch.Tensor]
    network: UNet2DModel | None = None
    dtype: torch.dtype = torch.float32
    backend: str = "torch"

    @property
    def precision(self) -> str:
        """Name of `dtype` as `load_model` takes it: "fp32" or "bf16"."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    def eps(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """Predicted noise in `x_t`, without gradients.

        Parameters
        ----------
        x_t : Tensor of shape (N, C, H, W)
            Noisy images at level `t`.
        t : float
            One timestep in [0, T - 1]; it may be fractional.

        Returns
        -------
        Tensor of shape (N, C, H, W)
            The noise, in the dtype of `x_t`.

        Raises
        ------
        ValueError
            If the shape of `x_t` is not the model's.
        """
        self.check(x_t)
        with torch.inference_mode():
            return self.predict(x_t, t).to(x_t.dtype)

    def check(self, images: torch.Tensor) -> None:
        """Raise ValueError unless `images` is a batch of the model's shape."""
        if not isinstance(images, torch.Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}; give a torch Tensor (N, C, H, W)"
            )
        if images.ndim != 4 or tuple(images.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"model {self.name!r} takes (N, {', '.join(map(str, self.sample_shape))}), not "
                f"{tuple(images.shape)}; load_images(..., like=model) converts size and channels"
            )


def model_names(root: Path | None = None) -> list[str]:
    """Names of the models in ``data/zoo``, sorted.

    Parameters
    ----------
    root : Path, optional
        Project folder; found by `project_root` by default.

    Returns
    -------
    list of str
        One name for each folder with a ``model_index.json``.

    Examples
    --------
    >>> "ddpm-fashion-32" in model_names()
    True
    """
    zoo = (root or project_root()) / "data" / "zoo"
    return sorted(path.parent.name for path in zoo.glob("*/model_index.json"))


def pipeline_folder(name: str, *, revision: str | None = None) -> Path:
    """Find the diffusers folder of a model.

    Parameters
    ----------
    name : str
        A name of ``data/zoo``, a diffusers pipeline folder, or a hub id ``owner/model``.
    revision : str, optional
        Branch, tag or commit of a hub id; its newest state by default.

    Returns
    -------
    Path
        The folder; that of a hub id is fetched first.

    Raises
    ------
    ValueError
        If there is no such model, it cannot be fetched, or a revision of a local folder is asked for.

    Examples
    --------
    >>> pipeline_folder("ddpm-fashion-32").name
    'ddpm-fashion-32'
    """
    zoo = project_root() / "data" / "zoo" / name
    for folder in (zoo, Path(name)):
        # a hub repository may hold the network at its top, with or without an index
        if any((folder / part).is_file() for part in ("model_index.json", "config.json")):
            if revision is not None:
                raise ValueError(f"{folder} is a local folder; leave out revision {revision!r}")
            return folder
    if Path(name).is_dir():
        raise ValueError(
            f"{name} has neither model_index.json nor config.json; give a diffusers pipeline folder"
        )
    if name.count("/") != 1:
        known = ", ".join(model_names())
        raise ValueError(
            f"unknown model {name!r}; known are {known}, or give a diffusers folder or owner/model"
        )
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    """Fetch the files of one network; what is in the cache already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        for weights in WEIGHTS:
            patterns = ["*.json", weights, f"unet/{weights}"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            if (folder / weights).is_file() or (folder / "unet" / weights).is_file():
                break
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model {name!r} is not in the local cache and the hub cannot be reached; connect to the "
            "network, or give a local folder"
        ) from error
    except Exception as error:  # the errors of the HTTP client have no common type
        raise ValueError(
            f"model {name!r} could not be fetched from the hub ({type(error).__name__}: {error}); "
            "check name and revision; a download that broke off goes on when run again"
        ) from error
    return folder


def check_device(name: str) -> str:
    """Give a torch device its full name, or say that it is not there.

    Parameters
    ----------
    name : str
        For example "cpu", "cuda" or "cuda:1".

    Returns
    -------
    str
        The name as torch writes it.

    Raises
    ------
    ValueError
        If there is no such device here.

    Examples
    --------
    >>> check_device("cpu")
    'cpu'
    """
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not here; use cpu, or cuda where there is a GPU"
        ) from error


def load_model(
    name: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    backend: str = "auto",
    precision: str = "fp32",
) -> FrozenModel:
    """Load a frozen model.

    Parameters
    ----------
    name : str
        A name of ``data/zoo``, a diffusers pipeline folder, or a hub id ``owner/model``.
    device : str, default "cpu"
        A torch device.
    revision : str, optional
        Branch, tag or commit of a hub id; its newest state by default.
    backend : {"auto", "torch", "openvino"}, default "auto"
        What runs the network; "auto" is OpenVINO where it is installed and the faster one (on
        processors with AVX-512), else torch. OpenVINO compiles at the first call, which takes seconds,
        and keeps the outcome in ``runs/openvino``.
    precision : {"fp32", "bf16"}, default "fp32"
        Precision in which the network runs. The noise of both backends agrees to 1e-5 of its size in
        fp32. In bf16 it is that of fp32 to 2 %, which is not enough for latents: the path to them
        magnifies the difference. Processors without bf16 run it many times slower than fp32.

    Returns
    -------
    FrozenModel
        The model in evaluation mode, gradients off.

    Raises
    ------
    ValueError
        If the name is unknown, a file is missing or holds code, a weight is not finite, or the backend
        cannot do what is asked here.

    Notes
    -----
    The models ``google/ddpm-{celebahq,church,bedroom}-256`` are those of Ho et al. (arXiv:2006.11239).
    `ood_lib.checkpoints.convert` makes a folder of an original checkpoint.

    Examples
    --------
    >>> load_model("ddpm-fashion-32").sample_shape
    (1, 32, 32)
    """
    device = check_device(device)
    backend = choose_backend(backend, device=device, precision=precision)
    folder = pipeline_folder(name, revision=revision)
    scheduler, network = _read_parts(folder)
    bad = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"model {name!r} has weights that are not finite: {', '.join(bad[:3])}")
    return from_network(
        Path(name).name,
        network.to(device),
        scheduler.config.prediction_type,
        from_diffusers(scheduler),
        backend=backend,
        precision=precision,
    )


def _read_parts(folder: Path) -> tuple[DDPMScheduler, UNet2DModel]:
    """Read scheduler and network; a part that is missing, cut or incomplete is named."""
    from diffusers import DDPMScheduler, UNet2DModel

    schedule, config, weights = _parts(folder)
    try:
        if weights.suffix == ".bin":
            load_checkpoint(weights)  # diffusers refuses code as well, but does not say why
        kind = UNet2DModel.load_config(config.parent).get("_class_name", "UNet2DModel")
        if kind != "UNet2DModel":
            raise ValueError(f"it holds a {kind}; give an unconditional UNet2DModel")
        scheduler = DDPMScheduler.from_pretrained(schedule.parent)
        network, info = UNet2DModel.from_pretrained(
            weights.parent,
            output_loading_info=True,
            use_safetensors=weights.suffix == ".safetensors",
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a model ({error})") from error
    if info["missing_keys"]:
        raise ValueError(f"{weights} lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    return scheduler, network


def _parts(folder: Path) -> tuple[Path, Path, Path]:
    """Find scheduler, configuration and weights: in folders of their own, or all at the top."""
    flat = not any((folder / part).is_dir() for part in ("unet", "scheduler"))
    unet, scheduler = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    weights = next((unet / name for name in WEIGHTS if (unet / name).is_file()), unet / WEIGHTS[0])
    parts = (scheduler / "scheduler_config.json", unet / "config.json", weights)
    for part in parts:
        if not part.is_file():
            raise ValueError(
                f"{folder} lacks {part.relative_to(folder)}; give a whole diffusers pipeline folder"
            )
    return parts


def from_network(
    name: str,
    network: UNet2DModel,
    prediction_type: str,
    schedule: NoiseSchedule,
    *,
    backend: str,
    precision: str,
) -> FrozenModel:
    """Freeze a network.

    Parameters
    ----------
    name : str
        What the model is called.
    network : UNet2DModel
        Maps C channels to C, or to 2C with learned variances; put into evaluation.
    prediction_type : {"epsilon", "sample", "v_prediction"}
        What it predicts.
    schedule : NoiseSchedule
        Its noise schedule.
    backend, precision : str
        As in `load_model`, chosen already.

    Returns
    -------
    FrozenModel
        The model.

    Raises
    ------
    ValueError
        If the network's channels or its prediction are of another kind.

    Examples
    --------
    >>> like = load_model("ddpm-fashion-32", backend="torch")
    >>> options = {"backend": "torch", "precision": "fp32"}
    >>> from_network("again", like.network, "epsilon", like.schedule, **options).sample_shape
    (1, 32, 32)
    """
    network = network.eval().requires_grad_(False)
    channels, side = network.config.in_channels, network.config.sample_size
    if network.config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{name!r} maps {channels} to {network.config.out_channels} channels; C to C or 2C is known"
        )
    to_eps = _converter(prediction_type)
    forward = forward_of(network, backend=backend, precision=precision)

    def predict(x_t: torch.Tensor, t: float) -> torch.Tensor:
        out = forward(x_t, t)[:, :channels]  # the rest is the learned variance
        return to_eps(out.to(x_t.dtype), x_t, float(schedule.alpha_bar_at(t)))

    return FrozenModel(
        name=name,
        family="iddpm" if network.config.out_channels == 2 * channels else "ddpm",
        schedule=schedule,
        sample_shape=(channels, *((side, side) if isinstance(side, int) else side)),
        predict=predict,
        network=network,
        dtype=PRECISIONS[precision],
        backend=backend,
    )


def _converter(prediction_type: str) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """Turn a prediction into eps with the alpha_bar of the level that was queried."""
    converters: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
        "epsilon": lambda out, x_t, ab: out,
        "sample": lambda out, x_t, ab: (x_t - np.sqrt(ab) * out) / np.sqrt(1 - ab),
        "v_prediction": lambda out, x_t, ab: np.sqrt(ab) * out + np.sqrt(1 - ab) * x_t,
    }
    if prediction_type not in converters:
        raise ValueError(
            f"prediction_type {prediction_type!r} is not known; use {', '.join(converters)}"
        )
    return converters[prediction_type]


def zero_model(like: FrozenModel) -> FrozenModel:
    """Control that predicts no noise: its latents are the scaled images.

    Parameters
    ----------
    like : FrozenModel
        Gives schedule and shape.

    Returns
    -------
    FrozenModel
        ``eps`` is zero everywhere.

    Examples
    --------
    >>> zero_model(load_model("ddpm-fashion-32")).name
    'zero'
    """
    return FrozenModel(
        "zero", "analytic", like.schedule, like.sample_shape, lambda x_t, t: torch.zeros_like(x_t)
    )


def random_model(like: FrozenModel, *, seed: int) -> FrozenModel:
    """Control with the architecture of `like` and fresh weights.

    Parameters
    ----------
    like : FrozenModel
        A model with a network; device, backend and precision are taken from it as well.
    seed : int
        Source of the weights.

    Returns
    -------
    FrozenModel
        The untrained model.

    Raises
    ------
    ValueError
        If `like` has no network.

    Examples
    --------
    >>> random_model(load_model("ddpm-fashion-32"), seed=3).name
    'random-3'
    """
    if like.network is None:
        raise ValueError(f"model {like.name!r} has no network to draw fresh weights for")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = type(like.network).from_config(like.network.config)
    return from_network(
        f"random-{seed}",
        network.to(like.network.device),
        "epsilon",
        like.schedule,
        backend=like.backend,
        precision=like.precision,
    )


def linear_model(images: torch.Tensor, like: FrozenModel) -> FrozenModel:
    """Control that knows only mean and covariance: the optimal eps of the Gaussian fitted to images.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        Training images in [-1, 1].
    like : FrozenModel
        Gives schedule and shape.

    Returns
    -------
    FrozenModel
        The model in closed form, family "analytic".

    Raises
    ------
    ValueError
        If the images do not have the model's shape.

    Examples
    --------
    >>> from ood_lib.domains import load_images
    >>> model = load_model("ddpm-fashion-32")
    >>> linear_model(load_images("fashion", split="train", like=model), model).name
    'linear'
    """
    from ood_lib.analytic import GaussianLaw, analytic_model

    like.check(images)
    law = GaussianLaw.fit(images.flatten(1))
    return analytic_model(law, like.schedule, sample_shape=like.sample_shape, name="linear")
