"""Checkpoints of the original DDPM and ADM code, turned into diffusers folders.

Both networks are the same U-Net up to names and six details, so one table of names for each layout
and one configuration for each say all there is to say; diffusers holds the network.

====================  ===========================  =================================
detail                ddpm (PyTorch port)          adm (improved and guided diffusion)
====================  ===========================  =================================
timestep embedding    sin, cos; over half - 1      cos, sin; over half
group norm            eps 1e-6                     eps 1e-5
timestep in a block   added                        scale and shift, or added
downsampling          conv, padded right and down  residual block or conv, padded all round
attention             one head; q, k, v apart      heads of 64 channels; q, k, v in one
outputs               noise                        noise and variance, or noise
====================  ===========================  =================================
"""

from __future__ import annotations

import math
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["convert", "load_checkpoint", "state_dict_of", "to_unet"]

State = Mapping[str, torch.Tensor]

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
FIRST_KEYS = {"ddpm": ("temb.", "down."), "adm": ("time_embed.", "input_blocks.")}
# a moving average is what the papers sample from, so it comes before the raw weights
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model")

# (diffusers, original), applied in this order
DDPM_NAMES = (
    ("time_embedding.linear_1", "temb.dense.0"),
    ("time_embedding.linear_2", "temb.dense.1"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("resnets", "block"),
    ("attentions", "attn"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("time_emb_proj", "temb_proj"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("conv_norm_out", "norm_out"),
)
ADM_NAMES = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
    ("group_norm", "norm"),
    ("to_q", "qkv"),
    ("to_k", "qkv"),
    ("to_v", "qkv"),
    ("to_out.0", "proj_out"),
    ("downsamplers.0.conv.", "downsamplers.0.op."),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("conv_in", "input_blocks.0.0"),
)


def convert(
    path: Path,
    out: Path,
    *,
    layout: str = "auto",
    head_channels: int = 64,
    side: int = 256,
    schedule: str = "linear",
) -> Path:
    """Convert an original checkpoint to a diffusers pipeline folder.

    Parameters
    ----------
    path : Path
        A ``.ckpt`` of the PyTorch port of DDPM [1]_ or a ``.pt`` of improved or guided diffusion
        [2]_, [3]_: a bare state dict, or a dict or list that holds one.
    out : Path
        Folder to write; it must not exist.
    layout : {"auto", "ddpm", "adm"}, default "auto"
        Names of the weights; "auto" reads it from the keys.
    head_channels : int, default 64
        Channels of one attention head; adm only, the weights do not tell.
    side : int, default 256
        Height and width of the images in pixels; the weights do not tell.
    schedule : {"linear", "cosine"}, default "linear"
        Betas over 1000 steps: linear from 1e-4 to 2e-2, or the cosine of [2]_.

    Returns
    -------
    Path
        `out`, which `load_model` reads.

    Raises
    ------
    ValueError
        If the file cannot be read or holds code, if a weight is missing, left over or of another
        shape, if an option is unknown or does not fit, or if `out` exists.

    References
    ----------
    .. [1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. arXiv:2006.11239
    .. [2] Nichol, Dhariwal. Improved Denoising Diffusion Probabilistic Models. arXiv:2102.09672
    .. [3] Dhariwal, Nichol. Diffusion Models Beat GANs on Image Synthesis. arXiv:2105.05233

    Examples
    --------
    >>> convert(Path("no.ckpt"), Path("model"))
    Traceback (most recent call last):
    ValueError: no.ckpt is not a file; give a .ckpt or .pt checkpoint
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    path, out = Path(path), Path(out)
    if schedule not in BETAS:
        raise ValueError(f"schedule {schedule!r} is not known; use {', '.join(BETAS)}")
    if out.exists():
        raise ValueError(f"{out} exists; give a new folder or remove it first")
    state = state_dict_of(load_checkpoint(path))
    network = to_unet(state, layout=layout, head_channels=head_channels, side=side)
    learned = network.config.out_channels == 2 * network.config.in_channels
    scheduler = DDPMScheduler(
        beta_schedule=BETAS[schedule], variance_type="learned_range" if learned else "fixed_small"
    )
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    DDPMPipeline(network, scheduler).save_pretrained(partial)
    return partial.replace(out)


def load_checkpoint(path: Path) -> Any:
    """Read a file of torch without running any code in it.

    Parameters
    ----------
    path : Path
        A file written by `torch.save`, in the zip or the older format.

    Returns
    -------
    object
        What was saved: tensors in plain containers. Those of a zip file stay on the disk until used.

    Raises
    ------
    ValueError
        If the file holds other objects than these, is cut, or is no checkpoint.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     torch.save({"w": torch.ones(2)}, Path(folder) / "model.pt")
    ...     load_checkpoint(Path(folder) / "model.pt")
    {'w': tensor([1., 1.])}
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .ckpt or .pt checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        if found and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds {found[1]}, which is not a tensor; it is refused and nothing in it was "
                "run; save its state dict alone, or take a safetensors file"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint of torch ({type(error).__name__}); it is cut or "
            "of another format; fetch it again"
        ) from error


def state_dict_of(saved: Any) -> dict[str, torch.Tensor]:
    """Find the state dict in what a training script saved.

    Parameters
    ----------
    saved : object
        A state dict, or a dict or sequence that holds one. Moving averages are preferred: in a dict
        the key ``ema``, in a sequence the last state dict.

    Returns
    -------
    dict of str to Tensor
        Weights by name, without the ``module.`` of parallel training.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> state_dict_of({"step": 7, "state_dict": {"module.w": torch.ones(1)}})
    {'w': tensor([1.])}
    """
    found = _find_state(saved)
    if found is None:
        held = ", ".join(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(
            f"no state dict in the checkpoint, which holds {held or 'nothing'}; "
            f"expected weights by name, or these under {', '.join(WRAPPERS)}"
        )
    return {name.removeprefix("module."): value for name, value in found.items()}


def _find_state(saved: Any) -> Mapping[str, torch.Tensor] | None:
    if isinstance(saved, Mapping):
        if saved and all(isinstance(value, torch.Tensor) for value in saved.values()):
            return saved
        inner = [saved[name] for name in WRAPPERS if name in saved]
    else:
        inner = list(reversed(saved)) if isinstance(saved, list | tuple) else []
    return next((state for state in map(_find_state, inner) if state is not None), None)


def to_unet(
    state: State, *, layout: str = "auto", head_channels: int = 64, side: int = 256
) -> UNet2DModel:
    """Build the diffusers network of an original state dict; every weight is used.

    Parameters
    ----------
    state : mapping of str to Tensor
        Weights under their original names.
    layout : {"auto", "ddpm", "adm"}, default "auto"
        Names of the weights; "auto" reads it from the keys.
    head_channels : int, default 64
        Channels of one attention head; adm only, the weights do not tell.
    side : int, default 256
        Height and width of the images in pixels; the weights do not tell.

    Returns
    -------
    UNet2DModel
        The network in float32.

    Raises
    ------
    ValueError
        If a weight is missing, left over or of another shape, or an option does not fit.

    Examples
    --------
    >>> to_unet({"conv_in.weight": torch.ones(32, 3, 3, 3)}, layout="ddpm")
    Traceback (most recent call last):
    ValueError: the checkpoint lacks 'conv_out.weight'; it is cut or of another layout
    """
    from diffusers import UNet2DModel

    if layout == "auto":
        layout = _layout_of(state)
    if layout not in FIRST_KEYS:
        raise ValueError(f"layout {layout!r} is not known; use auto, {', '.join(FIRST_KEYS)}")
    config = _ddpm_config(state) if layout == "ddpm" else _adm_config(state, head_channels)
    levels = len(config["block_out_channels"])
    if side < 1 or side % 2 ** (levels - 1):
        raise ValueError(
            f"side {side} cannot be halved {levels - 1} times; give a multiple of {2 ** (levels - 1)}"
        )
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        network = UNet2DModel(**config, sample_size=side)
    names = {name: _original_name(name, config) for name in network.state_dict()}
    weights = {
        name: _weight(state, names[name], name, wanted.shape, head_channels)
        for name, wanted in network.state_dict().items()
    }
    used = set(names.values())
    left = [name for name in state if name not in used]
    if left:
        raise ValueError(
            f"{len(left)} weights have no place in the {layout} network, the first is {left[0]!r}; "
            "classes, other resampling and further networks are not supported"
        )
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _ddpm_config(state: State) -> dict[str, Any]:
    """Read the arguments of `UNet2DModel` from the shapes of a DDPM."""
    channels, outputs = _shape(state, "conv_in.weight")[1], _shape(state, "conv_out.weight")[0]
    levels = 1 + max(_indices(state, r"(?:down|up)\.(\d+)\."), default=0)
    layers = max(_indices(state, r"up\.\d+\.block\.(\d+)\."), default=0)  # one more than down
    widths = [_shape(state, f"down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    attended = _indices(state, r"(?:down|up)\.(\d+)\.attn\.")
    return _blocks(widths, attended, "DownBlock2D", "UpBlock2D") | {
        "in_channels": channels,
        "out_channels": outputs,
        "layers_per_block": layers,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def _adm_config(state: State, head_channels: int) -> dict[str, Any]:
    """Read the arguments of `UNet2DModel` from the shapes of an improved or guided diffusion model."""
    channels, outputs = (
        _shape(state, "input_blocks.0.0.weight")[1],
        _shape(state, "out.2.weight")[0],
    )
    last = max(_indices(state, r"(?:in|out)put_blocks\.(\d+)\."))
    # a level takes layers + 1 blocks on either side; its last output block also upsamples
    layers = min(_indices(state, r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.") or {last})
    first = range(1, max(last, 1) + 1, layers + 1)
    widths = [_shape(state, f"input_blocks.{i}.0.in_layers.2.weight")[0] for i in first]
    attended = {(i - 1) // (layers + 1) for i in _indices(state, r"input_blocks\.(\d+)\.1\.")}
    for width in {widths[-1], *(widths[level] for level in attended)}:
        if head_channels < 1 or width % head_channels:
            raise ValueError(
                f"attention over {width} channels has no heads of {head_channels}; give head_channels"
            )
    residual = not _indices(state, r"input_blocks\.(\d+)\.0\.op\.")
    down, up = "DownBlock2D", "UpBlock2D"
    if residual:
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    added = _shape(state, "input_blocks.1.0.emb_layers.1.weight")[0] == widths[0]
    return _blocks(widths, attended, down, up) | {
        "in_channels": channels,
        "out_channels": outputs,
        "layers_per_block": layers,
        "attention_head_dim": head_channels,
        "attn_norm_num_groups": 32,  # else diffusers drops the norm in the middle
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "default" if added else "scale_shift",
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
    }


def _blocks(widths: list[int], attended: set[int], down: str, up: str) -> dict[str, Any]:
    """Name the blocks of each level; the way up starts at the deepest."""
    levels = range(len(widths))
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("AttnDownBlock2D" if i in attended else down for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in attended else up for i in levels[::-1]),
    }


def _layout_of(state: State) -> str:
    for layout, prefixes in FIRST_KEYS.items():
        if any(name.startswith(prefixes) for name in state):
            return layout
    raise ValueError(
        f"weights named {', '.join(list(state)[:3])} are of no known layout; "
        "ddpm has down.0.block.0.conv1.weight, adm has input_blocks.0.0.weight"
    )


def _original_name(name: str, config: dict[str, Any]) -> str:
    """Name that a weight of diffusers has in the original layout."""
    adm = config["flip_sin_to_cos"]
    for theirs, original in ADM_NAMES if adm else DDPM_NAMES:
        name = name.replace(theirs, original)
    place = re.match(r"(down|up)_blocks\.(\d+)\.(?:(\w+)\.(\d+))?", name)
    if not place:
        return name
    way, level = place[1], int(place[2])
    if not adm:
        depth = level if way == "down" else len(config["block_out_channels"]) - 1 - level
        return name.replace(f"{way}_blocks.{level}", f"{way}.{depth}")
    kind, i, layers = place[3], int(place[4]), config["layers_per_block"]
    attended = config[f"{way}_block_types"][level].startswith("Attn")
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attended}[kind]
    block = level * (layers + 1) + (layers if kind.endswith("samplers") else i)
    end = name[place.end() :]
    if way == "down":  # input block 0 is the first convolution
        return f"input_blocks.{block + 1}.{slot}{end}"
    return f"output_blocks.{block}.{slot}{end}"


def _weight(
    state: State, original: str, name: str, wanted: torch.Size, head_channels: int
) -> torch.Tensor:
    """Take one weight in the shape that diffusers wants."""
    shape = _shape(state, original)
    third = re.search(r"\.to_([qkv])\.", name) if ".qkv." in original else None
    full = (3 * wanted[0], *wanted[1:]) if third else tuple(wanted)
    # 1x1 convolutions became linear layers: trailing ones go
    if shape[: len(full)] != full or math.prod(shape) != math.prod(full):
        raise ValueError(f"{original!r} has shape {shape}; the rest of the network needs {full}")
    value = state[original].float().reshape(full)
    if third:  # each head holds its own q, k and v
        heads = value.reshape(-1, 3, head_channels, *wanted[1:])
        value = heads[:, "qkv".index(third[1])].reshape(wanted)
    return value.contiguous()


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"the checkpoint lacks {name!r}; it is cut or of another layout")
    return tuple(state[name].shape)


def _indices(state: State, pattern: str) -> set[int]:
    return {int(found[1]) for name in state if (found := re.match(pattern, name))}
