"""Train a DDPM or an iDDPM on one domain: resumable, seeded, logged, saved as a diffusers pipeline folder.

Every random choice of step ``k`` comes from a generator seeded by ``(seed, k)``, so a run that was
killed and resumed sees the same batches, timesteps and noise as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ood_lib.files import write_json, write_whole
from ood_lib.inversion import generate
from ood_lib.losses import hybrid_loss, level_weight, simple_loss
from ood_lib.models import FrozenModel, check_device, from_network, load_model
from ood_lib.plotting import error_curves, image_rows, use_style
from ood_lib.schedule import NoiseSchedule, uniform_log_sigma, uniform_t

__all__ = [
    "DEFECTS",
    "FineTuned",
    "Forgetting",
    "Recipe",
    "TrainingRun",
    "fast_precision",
    "fine_tune",
    "forgetting",
    "learning_rate",
    "train",
    "training_batch",
    "write_card",
]

SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2},
    "iddpm": {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"},
}

DEFECTS = ("no_step", "second_output")
LEARNING_RATES = {"all": 3e-4, "last": 3e-3, "lora": 3e-3}


@dataclass(frozen=True)
class Recipe:
    """What a training run is: network, data order, optimiser. Everything that the weights depend on.

    Parameters
    ----------
    images_seen : int
        Length of the run in training images.
    batch_size : int
        Images a step.
    lr : float
        Peak learning rate of AdamW, reached after `warmup` steps, then a half cosine to zero.
    warmup : int
        Steps of linear warm-up.
    ema_decay : float
        Largest decay of the exponential moving average of the weights.
    channels : tuple of int
        Width of each resolution level of the `UNet2DModel`; attention in the last.
    layers : int
        Residual blocks a level.
    groups : int
        Groups of the group norms. A norm takes out the mean of each group, and with it what the
        network knows of the overall colour of a noisy image, unless few groups hold many channels.
    head_dim : int
        Width of an attention head.
    precision : {"fp32", "bf16"}
        Arithmetic of the forward pass; "bf16" runs under autocast. See `fast_precision`.
    seed : int
        Source of the initial weights, data order, timesteps and noise.
    family : {"ddpm", "iddpm"}
        "ddpm": linear betas, the simple loss. "iddpm": cosine schedule, 2C output channels for the
        learned variances, the hybrid loss.
    noise_weight : float
        Power of `losses.level_weight` in the simple loss; 0 is that of the papers.

    Raises
    ------
    ValueError
        If the family or the precision is unknown or a count is under 1.

    Examples
    --------
    >>> Recipe(images_seen=640, batch_size=64).steps
    10
    """

    images_seen: int = 409_600
    batch_size: int = 32
    lr: float = 2.4e-3
    warmup: int = 200
    ema_decay: float = 0.998
    channels: tuple[int, ...] = (24, 48, 104)
    layers: int = 1
    groups: int = 1
    head_dim: int = 52
    precision: str = "fp32"
    seed: int = 0
    family: str = "ddpm"
    noise_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.family not in SCHEDULERS:
            raise ValueError(f"family {self.family!r} is not known; use {', '.join(SCHEDULERS)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is not known; use fp32 or bf16")
        if not 0 <= self.ema_decay < 1 or not self.channels:
            raise ValueError("ema_decay must lie in [0, 1) and channels must name a width a level")
        if any(width < 1 or width % self.groups for width in self.channels):
            raise ValueError(
                f"channels {self.channels} must be multiples of groups = {self.groups}"
            )
        if not 0 <= self.noise_weight <= 1:
            raise ValueError(f"noise_weight is {self.noise_weight}; it must lie in [0, 1]")
        for name in ("images_seen", "batch_size", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return math.ceil(self.images_seen / self.batch_size)


def fast_precision(device: str = "cpu") -> str:
    """Name the faster arithmetic for training here.

    Processors without bf16 matrix units run bf16 convolutions slower than fp32 ones.

    Parameters
    ----------
    device : str, default "cpu"
        A torch device type.

    Returns
    -------
    str
        "bf16" on a GPU that supports it and on a processor with AMX, else "fp32".

    Examples
    --------
    >>> fast_precision() in ("bf16", "fp32")
    True
    """
    native = (
        torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_amx_tile_supported()
    )
    return "bf16" if native else "fp32"


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine to zero.

    Parameters
    ----------
    recipe : Recipe
        Gives the peak, the warm-up and the number of steps.
    step : int
        Step from 0.

    Returns
    -------
    float
        The learning rate.

    Examples
    --------
    >>> learning_rate(Recipe(images_seen=32_000), 1000)
    0.0
    """
    ramp = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def training_batch(
    images: np.ndarray, recipe: Recipe, step: int, num_train_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, timesteps and noise of one step, a function of (seed, step) alone.

    Timesteps come in antithetic pairs ``t, T - 1 - t``, which lowers the variance of the loss.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C)
        uint8 training images.
    recipe : Recipe
        Gives seed and batch size.
    step : int
        Step from 0.
    num_train_timesteps : int
        T.

    Returns
    -------
    tuple of Tensor
        ``x0`` (B, C, H, W) in [-1, 1], ``timesteps`` (B,) and ``noise`` (B, C, H, W).

    Examples
    --------
    >>> x0, t, _ = training_batch(np.zeros((9, 8, 8, 1), np.uint8), Recipe(batch_size=4), 0, 1000)
    >>> x0.shape, bool((t + t.flip(0) == 999).all())
    (torch.Size([4, 1, 8, 8]), True)
    """
    rows = _rows(len(images), recipe, step)
    x0 = (
        torch.from_numpy(np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2))).float() / 127.5
        - 1
    )
    return x0, *_levels_and_noise(x0.shape, recipe, step, num_train_timesteps)


def _rows(count: int, recipe: Recipe, step: int) -> np.ndarray:
    """Rows of the images of one step; every epoch shows each of them once."""
    size, first = recipe.batch_size, step * recipe.batch_size
    positions = np.arange(first, first + size)
    rows = np.empty(size, int)
    for epoch in np.unique(positions // count):
        order = np.random.default_rng((recipe.seed, int(epoch))).permutation(count)
        here = positions // count == epoch
        rows[here] = order[positions[here] % count]
    return rows


def _levels_and_noise(
    shape: torch.Size, recipe: Recipe, step: int, num_train_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    half = torch.randint(num_train_timesteps, ((shape[0] + 1) // 2,), generator=rng)
    timesteps = torch.cat([half, num_train_timesteps - 1 - half.flip(0)])[: shape[0]]
    return timesteps, torch.randn(shape, generator=rng)


def _network(recipe: Recipe, image_shape: tuple[int, ...]) -> UNet2DModel:
    side, _, channels = image_shape
    levels = len(recipe.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels * (2 if recipe.family == "iddpm" else 1),
            layers_per_block=recipe.layers,
            block_out_channels=recipe.channels,
            norm_num_groups=recipe.groups,
            attention_head_dim=recipe.head_dim,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        )
    return _with_plain_attention(network)


def _with_plain_attention(network: UNet2DModel) -> UNet2DModel:
    """Take the fused attention out: at 64 tokens it trains slower, and its work is not counted."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return network


def _data_sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


class TrainingRun:
    """The state of a training run: network, optimiser, moving average, step, loss log.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C)
        uint8 training images.
    recipe : Recipe
        The run.
    device : str
        A torch device.

    Raises
    ------
    ValueError
        If there are no images or no such device.

    Examples
    --------
    >>> tiny = Recipe(images_seen=8, batch_size=4, channels=(8, 8), groups=4, head_dim=8)
    >>> run = TrainingRun(np.zeros((8, 8, 8, 1), np.uint8), tiny, "cpu")
    >>> run.advance() > 0, run.step
    (True, 1)
    """

    def __init__(self, images: np.ndarray, recipe: Recipe, device: str) -> None:
        if len(images) == 0:
            raise ValueError("there are no training images; give at least one")
        self.images, self.recipe, self.device = images, recipe, check_device(device)
        self.data_sha256 = _data_sha256(images)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, **SCHEDULERS[recipe.family])
        self.net = _network(recipe, images.shape[1:]).to(self.device).train()
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True
        )
        self.ema = EMAModel(
            self.net.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, power=0.75
        )
        self.step, self.seconds, self.losses = 0, 0.0, []

    def advance(self) -> float:
        """Take one optimiser step and return its loss."""
        x0, t, noise = (
            a.to(self.device)
            for a in training_batch(
                self.images, self.recipe, self.step, self.scheduler.config.num_train_timesteps
            )
        )
        x_t = self.scheduler.add_noise(x0, noise, t)
        with torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
        ):
            out = self.net(x_t, t).sample.float()
        weight = level_weight(t, self.scheduler, self.recipe.noise_weight)
        if self.recipe.family == "iddpm":
            loss = hybrid_loss(out, noise, x0, t, self.scheduler, weight=weight)
        else:
            loss = simple_loss(out, noise, weight=weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.ema.step(self.net.parameters())
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "recipe": asdict(self.recipe),
            "data_sha256": self.data_sha256,
            "net": self.net.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe and images."""
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read as a checkpoint; remove it") from error
        if not isinstance(saved, dict) or saved.keys() != self.state().keys():
            raise ValueError(f"{path} is not a checkpoint of this version; remove it")
        if {**saved["recipe"], "channels": tuple(saved["recipe"]["channels"])} != asdict(
            self.recipe
        ):
            raise ValueError(
                f"{path} holds a run with recipe {saved['recipe']}; remove it or use that recipe"
            )
        if saved["data_sha256"] != self.data_sha256:
            raise ValueError(f"{path} holds a run on other images; remove it or use those")
        self.net.load_state_dict(saved["net"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.ema.load_state_dict(saved["ema"])
        self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved["losses"]

    def ema_network(self) -> UNet2DModel:
        """Copy the network with the averaged weights."""
        copy = _network(self.recipe, self.images.shape[1:])
        self.ema.copy_to(copy.parameters())
        return copy.eval()


def train(
    images: np.ndarray,
    recipe: Recipe,
    out: Path,
    *,
    work: Path,
    name: str,
    device: str = "cpu",
    checkpoint_every: int = 200,
    stop_after: int | None = None,
) -> Path:
    """Train a DDPM or an iDDPM and save the averaged weights as a diffusers pipeline folder.

    Parameters
    ----------
    images : ndarray of shape (N, H, W, C)
        uint8 training images.
    recipe : Recipe
        The run.
    out : Path
        Folder for the pipeline and ``training.json``, the training record.
    work : Path
        Folder for the checkpoint; a run found there is resumed.
    name : str
        Name of the data in the training record.
    device : str, default "cpu"
        A torch device type.
    checkpoint_every : int, default 200
        Steps between checkpoints.
    stop_after : int, optional
        Stop at this step, as a kill would; for tests and short trials.

    Returns
    -------
    Path
        `out`, or the checkpoint if the run was stopped before its end.

    Raises
    ------
    ValueError
        If the checkpoint in `work` belongs to another recipe.

    Notes
    -----
    DDPM: Ho, Jain and Abbeel, NeurIPS 2020, arXiv:2006.11239, linear betas from 1e-4 to 2e-2. iDDPM:
    Nichol and Dhariwal, ICML 2021, arXiv:2102.09672, cosine schedule. T = 1000 in both; the losses
    are in `losses`. The averaged weights at 10 % of the run are kept in `work` as
    ``ema_10_percent.safetensors``.

    Examples
    --------
    >>> import tempfile
    >>> pixels = np.zeros((8, 8, 8, 1), np.uint8)
    >>> tiny = Recipe(images_seen=8, batch_size=4, channels=(8, 8), groups=4, head_dim=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(pixels, tiny, Path(folder, "model"), work=Path(folder), name="black").name
    'model'
    """
    run = TrainingRun(images, recipe, device)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        run.restore(checkpoint)
    end = min(recipe.steps, stop_after or recipe.steps)
    tenth = max(1, recipe.steps // 10)
    started, before = time.perf_counter(), run.seconds
    bar = tqdm(
        total=end * recipe.batch_size,
        initial=run.step * recipe.batch_size,
        unit="img",
        mininterval=5,
    )
    while run.step < end:
        run.losses.append(run.advance())
        run.seconds = before + time.perf_counter() - started
        bar.update(recipe.batch_size)
        bar.set_postfix(loss=f"{np.mean(run.losses[-100:]):.4f}", refresh=False)
        if run.step == tenth:
            weights = {k: v.contiguous() for k, v in run.ema_network().state_dict().items()}
            write_whole(work / "ema_10_percent.safetensors", lambda p: save_file(weights, p))  # noqa: B023
        if run.step % checkpoint_every == 0 or run.step == end:
            write_whole(checkpoint, lambda p: torch.save(run.state(), p))
    bar.close()
    if end < recipe.steps:
        return checkpoint
    _save(run, out, name)
    write_card(out)
    return out


@dataclass(frozen=True)
class FineTuned:
    """A model tuned on new images, and what that took.

    Parameters
    ----------
    model : FrozenModel
        The tuned model.
    losses : ndarray of shape (steps,)
        Training loss of each step.
    seconds : float
        Wall time of the steps.
    network_calls : float
        Floating-point operations of the steps in units of one call, one image forward: the currency
        in which a sampler's ``nfe`` times its images is counted.
    trained_parameters : int
        Numbers that the optimiser may change.

    Examples
    --------
    >>> import inspect
    >>> list(inspect.signature(FineTuned).parameters)
    ['model', 'losses', 'seconds', 'network_calls', 'trained_parameters']
    """

    model: FrozenModel
    losses: np.ndarray
    seconds: float
    network_calls: float
    trained_parameters: int


def fine_tune(
    model: FrozenModel,
    images: torch.Tensor,
    *,
    steps: int,
    rng: np.random.Generator,
    parameters: str = "all",
    rank: int = 4,
    lr: float | None = None,
    batch_size: int = 16,
    noise_weight: float = 0.5,
    defects: Sequence[str] = (),
) -> FineTuned:
    """Train a frozen model on for some steps on reference images; the model itself stays as it is.

    Parameters
    ----------
    model : FrozenModel
        A model with a network that predicts noise.
    images : Tensor of shape (N, C, H, W)
        References in [-1, 1].
    steps : int
        Optimiser steps.
    rng : numpy Generator
        Source of data order, timesteps, noise and first low-rank factors.
    parameters : {"all", "last", "lora"}, default "all"
        What is trained: every weight; the last convolution; or an update of low rank for the weight of
        every convolution and linear layer, attention included, which begins at zero and is added to
        the weights in the end.
    rank : int, default 4
        Rank of the updates of "lora".
    lr : float, optional
        Peak learning rate, reached in 5 % of the steps, then half a cosine to zero; `LEARNING_RATES` by
        default.
    batch_size : int, default 16
        Images a step; the released code has 4.
    noise_weight : float, default 0.5
        Power of `losses.level_weight`, as in `Recipe`; 0 is that of the released code.
    defects : sequence of {"no_step", "second_output"}, default ()
        Faults of the released code to repeat. "no_step": no optimiser step is taken. "second_output":
        the noise of every image is compared with the prediction for the second image of the batch.

    Returns
    -------
    FineTuned
        ``model``, ``losses``, ``seconds``, ``network_calls``, ``trained_parameters``.

    Raises
    ------
    ValueError
        If the model has no network or does not predict noise, or an option is wrong.

    Notes
    -----
    Adam without weight decay, antithetic timesteps, the simple loss on eps; learned variances are not
    trained, since the samplers here do not use them. There is no dropout. LoRA: Hu et al., ICLR 2022,
    arXiv:2106.09685. The faults are those of the code of Zhu et al. (arXiv:2310.09213): no optimiser
    step until 2024-07-20, and ``output[1]`` in the loss for networks without learned variances.

    Examples
    --------
    >>> model, black = load_model("ddpm-fashion-32"), torch.full((4, 1, 32, 32), -1.0)
    >>> made = fine_tune(model, black, steps=2, rng=np.random.default_rng(0), parameters="last")
    >>> made.losses.shape, made.trained_parameters, round(made.network_calls / 32)
    ((2,), 217, 1)
    """
    _check_tuning(model, images, parameters, batch_size, defects)
    recipe = Recipe(
        images_seen=steps * batch_size,
        batch_size=batch_size,
        lr=LEARNING_RATES[parameters] if lr is None else lr,
        warmup=max(1, steps // 20),
        noise_weight=noise_weight,
        family=model.family,
        seed=int(rng.integers(2**31)),
    )
    network = _with_plain_attention(copy.deepcopy(model.network).float())
    call = _operations(lambda: network(images[:1].float().to(network.device), 0))
    trained = _to_train(network, parameters, rank, recipe.seed)
    optimiser = torch.optim.Adam(trained, lr=recipe.lr, fused=True)
    loss = partial(
        _tuning_loss, network, images, recipe, _scheduler(model.schedule), frozenset(defects)
    )
    work = _operations(lambda: loss(0).backward())
    optimiser.zero_grad()
    losses, started = [], time.perf_counter()
    for step in range(recipe.steps):
        value = loss(step)
        value.backward()
        losses.append(value.item())
        _step(optimiser, learning_rate(recipe, step), frozenset(defects))
    seconds = time.perf_counter() - started
    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return FineTuned(
        from_network(
            f"{model.name}-tuned",
            network,
            "epsilon",
            model.schedule,
            backend=model.backend,
            precision=model.precision,
        ),
        np.array(losses),
        seconds,
        recipe.steps * work / call,
        sum(weight.numel() for weight in trained),
    )


def _check_tuning(
    model: FrozenModel,
    images: torch.Tensor,
    parameters: str,
    batch_size: int,
    defects: Sequence[str],
) -> None:
    if model.network is None:
        raise ValueError(f"model {model.name!r} has no network to tune; give a trained one")
    model.check(images)
    if len(images) == 0 or not images.abs().max() <= 1 + 1e-3:
        raise ValueError("images must be one or more, finite, and lie in [-1, 1]")
    if parameters not in LEARNING_RATES:
        raise ValueError(f"parameters {parameters!r} is not one of {', '.join(LEARNING_RATES)}")
    unknown = set(defects) - set(DEFECTS)
    if unknown:
        raise ValueError(f"defects {sorted(unknown)} are not known; use {', '.join(DEFECTS)}")
    if "second_output" in defects and (batch_size < 2 or model.family == "iddpm"):
        raise ValueError(
            "defect 'second_output' needs a batch of two or more and a network without learned "
            f"variances, not batch_size = {batch_size} and family {model.family!r}"
        )
    x_t = images[:1].to(model.network.device)
    t = (model.schedule.num_train_timesteps - 1) // 2
    with torch.inference_mode():
        out = model.network(x_t.to(model.dtype), t).sample[:, : x_t.shape[1]].to(x_t.dtype)
    if (out - model.eps(x_t, t)).norm() > 0.1 * out.norm():
        raise ValueError(
            f"the network of {model.name!r} does not predict noise; give one that does"
        )


def _operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _LowRank(nn.Module):
    """A weight plus an update of low rank, which is zero at first."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(rank, weight[0].numel(), generator=generator)
        self.down = nn.Parameter((down / weight[0].numel() ** 0.5).to(weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def _to_train(network: UNet2DModel, parameters: str, rank: int, seed: int) -> list[nn.Parameter]:
    """Give the weights that are trained a gradient, and no others."""
    network.requires_grad_(parameters == "all")
    if parameters == "last":
        network.conv_out.requires_grad_(True)
    if parameters == "lora":
        if rank < 1:
            raise ValueError(f"rank is {rank}; use 1 or more")
        generator = torch.Generator().manual_seed(seed)
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            update = _LowRank(layer.weight, rank, generator)
            parametrize.register_parametrization(layer, "weight", update)
    return [weight for weight in network.parameters() if weight.requires_grad]


def _scheduler(schedule: NoiseSchedule) -> DDPMScheduler:
    """Write a schedule as the diffusers scheduler that losses read."""
    ratios = schedule.alpha_bar / np.append(1.0, schedule.alpha_bar[:-1])
    return DDPMScheduler(len(ratios), trained_betas=1 - ratios)


def _tuning_loss(
    network: UNet2DModel,
    images: torch.Tensor,
    recipe: Recipe,
    scheduler: DDPMScheduler,
    defects: frozenset[str],
    step: int,
) -> torch.Tensor:
    x0 = images[_rows(len(images), recipe, step)].float()
    t, noise = _levels_and_noise(x0.shape, recipe, step, len(scheduler.betas))
    x0, t, noise = (a.to(network.device) for a in (x0, t, noise))
    eps = network(scheduler.add_noise(x0, noise, t), t).sample[:, : x0.shape[1]]
    if "second_output" in defects:
        eps = eps[1].expand_as(noise)
    return simple_loss(eps, noise, weight=level_weight(t, scheduler, recipe.noise_weight))


def _step(optimiser: torch.optim.Optimizer, lr: float, defects: frozenset[str]) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    if "no_step" not in defects:
        optimiser.step()
    optimiser.zero_grad()


@dataclass(frozen=True)
class Forgetting:
    """Losses of a model on images of its own domain, before and after it was tuned on others.

    Parameters
    ----------
    before : ndarray of shape (N, L)
        Mean squared error of the predicted noise of the original, of each image at each level.
    after : ndarray of shape (N, L)
        The same of the tuned model, with the same noise.
    timesteps : ndarray of shape (L,)
        The levels.

    Examples
    --------
    >>> Forgetting(np.full((2, 1), 0.1), np.full((2, 1), 0.15), np.array([500.0])).ratio.round(3)
    np.float64(1.5)
    """

    before: np.ndarray
    after: np.ndarray
    timesteps: np.ndarray

    @property
    def ratio(self) -> float:
        """Mean loss after, over mean loss before; 1 is nothing forgotten."""
        return self.after.mean() / self.before.mean()


def forgetting(
    model: FrozenModel,
    tuned: FrozenModel,
    images: torch.Tensor,
    *,
    rng: np.random.Generator,
    timesteps: np.ndarray | None = None,
) -> Forgetting:
    """Compare the losses of a model and its tuned copy on held-out images of its own domain.

    Parameters
    ----------
    model, tuned : FrozenModel
        The original and the tuned model.
    images : Tensor of shape (N, C, H, W)
        Held-out images in [-1, 1].
    rng : numpy Generator
        Source of the noise, which is the same for both models.
    timesteps : array of shape (L,), optional
        Levels; ten even ones by default, as the simple loss draws them.

    Returns
    -------
    Forgetting
        ``before`` and ``after``, (N, L), and their ``ratio``.

    Raises
    ------
    ValueError
        If there are no images or they do not have the models' shape.

    Examples
    --------
    >>> model, black = load_model("ddpm-fashion-32"), torch.full((2, 1, 32, 32), -1.0)
    >>> forgetting(model, model, black, rng=np.random.default_rng(0)).ratio
    np.float64(1.0)
    """
    if len(images) == 0:
        raise ValueError("there are no held-out images; give at least one")
    levels = uniform_t(model.schedule, 10) if timesteps is None else np.asarray(timesteps)
    shares = model.schedule.alpha_bar_at(levels)
    losses = np.empty((2, len(images), len(levels)))
    for k, (t, share) in enumerate(zip(levels, shares, strict=True)):
        noise = torch.from_numpy(rng.standard_normal(images.shape)).to(images)
        x_t = images * share**0.5 + noise * (1 - share) ** 0.5
        for row, one in zip(losses, (model, tuned), strict=True):
            row[:, k] = (one.eps(x_t, t) - noise).square().flatten(1).mean(1).cpu()
    return Forgetting(*losses, levels)


def _save(run: TrainingRun, out: Path, name: str) -> None:
    DDPMPipeline(unet=run.ema_network(), scheduler=run.scheduler).save_pretrained(out)
    curve = np.array(run.losses)
    edges = np.unique(np.linspace(0, len(curve), 101).astype(int))
    record = {
        "domain": name,
        "training_images": len(run.images),
        "data_sha256": run.data_sha256,
        "images_seen": run.step * run.recipe.batch_size,
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "recipe": asdict(run.recipe),
        "wall_seconds": round(run.seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "loss_step": edges[1:].tolist(),
        "loss": [round(float(curve[a:b].mean()), 5) for a, b in pairwise(edges)],
    }
    write_json(out / "training.json", record)


CARD = """---
license: mit
library_name: diffusers
tags: [unconditional-image-generation, {family}]
---

# {name}

A denoising diffusion model of **{domain}** images, {side}x{side} pixels, {channels} channel(s), trained
from scratch and then frozen. Read it with `DDPMPipeline.from_pretrained` or
`ood_lib.load_model("{name}")`.

![Uncurated samples](samples.png)

*The first 32 samples of seed 0: deterministic, Heun, 40 points evenly spaced in log sigma, 78 calls.*

![Training loss](loss.png)

| | |
|---|---|
| network | UNet2DModel, widths {widths}, {layers} residual block a level, attention in the last |
| parameters | {parameters:,} |
| schedule and loss | {method} |
| training images | {training_images:,} of {domain}, sha256 `{data_sha256:.16}...` |
| training images seen | {images_seen:,} |
| optimiser | AdamW, peak rate {lr:g} with warm-up and half a cosine, batch {batch_size} |
| weight of a level in the loss | alpha_bar to the power of -{noise_weight:g} |
| weights | exponential moving average, decay up to {ema_decay} |
| precision, seed | {precision}, {seed} |
| wall time | {minutes:.0f} minutes on {threads} CPU thread(s), shared with other work |
| torch | {torch} |

The record of the run is `training.json`, that of the quality `quality.json`; `ood card {name}` makes
this page from them.

## Quality

{quality}

**Use.** Study of frozen models: inversion, latents, sampling of domains that the model never saw.
**Limits.** A small network and a short training at low resolution: samples are recognisable, not
photographic. It knows nothing but {domain}.
"""


LINES = {
    "model": "samples of the model",
    "early": "the same run at a tenth of its training",
    "gaussian": "Gaussian fitted to the training pixels",
    "train": "training images",
}

METHODS = {
    "ddpm": "linear betas from 1e-4 to 2e-2, T = 1000, noise prediction, simple loss",
    "iddpm": "cosine, T = 1000, noise prediction and learned variances, L_simple + 0.001 L_vlb",
}


def write_card(folder: Path) -> Path:
    """Write the model card of a trained folder: ``README.md``, ``samples.png``, ``loss.png``.

    Parameters
    ----------
    folder : Path
        A folder written by `train`.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    ValueError
        If the folder holds no training record.

    Examples
    --------
    >>> write_card(Path("no-such-model"))
    Traceback (most recent call last):
    ValueError: no-such-model has no training.json; give a folder written by ood train
    """
    if not (folder / "training.json").is_file():
        raise ValueError(f"{folder} has no training.json; give a folder written by ood train")
    record = json.loads((folder / "training.json").read_text())
    model = load_model(str(folder))
    noise = torch.randn((32, *model.sample_shape), generator=torch.Generator().manual_seed(0))
    grid = uniform_log_sigma(model.schedule, 40)
    samples = generate(model, noise, timesteps=grid, solver="heun").images.float()
    use_style()
    image_rows({"uncurated samples": samples}, lines=2).savefig(folder / "samples.png")
    curve = {"mean over 1 % of the run": record["loss"]}
    error_curves(record["loss_step"], curve, xlabel="step", ylabel="loss").savefig(
        folder / "loss.png"
    )
    channels, side, _ = model.sample_shape
    recipe = asdict(Recipe(**record["recipe"]))
    text = CARD.format_map(
        recipe
        | record
        | {"name": folder.name, "side": side, "minutes": record["wall_seconds"] / 60}
        | {"widths": ", ".join(map(str, recipe["channels"])), "channels": channels}
        | {"method": METHODS[recipe["family"]], "quality": _quality_section(folder)}
    )
    (folder / "README.md").write_text(text)
    return folder / "README.md"


def _quality_section(folder: Path) -> str:
    """Table of ``quality.json``, in the features that suit the domain."""
    if not (folder / "quality.json").is_file():
        return f"Not measured yet: `ood quality {folder.name}`."
    record = json.loads((folder / "quality.json").read_text())
    shares = ("precision", "recall", "density", "coverage")
    rows = [
        [LINES[line], f"{measured[space]['kid'][0]:.4f}"]
        + [f"{measured[space][share]:.2f}" for share in shares]
        + [f"{measured['share']:.2f}"]
        for space in [record["space"]]
        for line, measured in ((line, record["lines"][line]) for line in LINES)
    ]
    header = ["", "KID", *shares, "share"]
    table = [header, ["---"] * len(header), *rows]
    kind = "an ImageNet network" if record["space"] == "imagenet" else "the domain classifier"
    return (
        f"{record['n']} images a line against as many held-out images, in features of {kind}; *share* "
        "is the part that the domain classifier calls the model's own domain "
        f"({record['held_out_share']:.2f} of the held-out images). Measured by "
        f"`ood quality {folder.name}`.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table)
    )
