"""Frozen models: loading, prediction types, controls, and what is said when something is wrong."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ood_lib.domains import load_images
from ood_lib.models import (
    FrozenModel,
    linear_model,
    load_model,
    model_names,
    random_model,
    zero_model,
)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# config.json and scheduler_config.json of google/ddpm-{celebahq,church,bedroom}-256, which stand at the
# top of the repository beside a pickled diffusion_pytorch_model.bin
GOOGLE_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
GOOGLE_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_small",
}
SMALL = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "sample_size": 8,
}


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """Copy of the tiny pipeline that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "copied")


def noisy(model, n=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.sample_shape, generator=generator, dtype=dtype)


# the zoo


def test_the_zoo_is_listed_and_loaded_by_name_and_by_path(root, fashion):
    assert "ddpm-fashion-32" in model_names()
    same = load_model(str(root / "data/zoo/ddpm-fashion-32"))
    x = noisy(fashion)
    assert torch.equal(same.eps(x, 100), fashion.eps(x, 100))
    assert (same.name, same.family, same.sample_shape) == ("ddpm-fashion-32", "ddpm", (1, 32, 32))


def test_the_zoo_model_is_frozen(fashion):
    assert not fashion.network.training
    assert not any(p.requires_grad for p in fashion.network.parameters())
    assert not fashion.eps(noisy(fashion), 5).requires_grad


def test_the_zoo_model_loads_as_a_diffusers_pipeline(root, fashion):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(root / "data/zoo/ddpm-fashion-32")
    x = noisy(fashion)
    with torch.no_grad():
        theirs = pipeline.unet(x, 321).sample
    torch.testing.assert_close(fashion.eps(x, 321), theirs, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(
        fashion.schedule.alpha_bar, pipeline.scheduler.alphas_cumprod.numpy(), rtol=1e-3
    )


def test_the_zoo_model_is_small_and_documented(root):
    folder = root / "data/zoo/ddpm-fashion-32"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 8 * 2**20
    assert {"README.md", "training.json"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("*.bin"))


@pytest.mark.parametrize(("t", "most"), [(100, 0.2), (500, 0.05), (900, 0.02)])
def test_the_zoo_model_knows_its_own_domain(fashion, t, most):
    """Mean squared error of the predicted noise; a model that predicts no noise scores 1."""
    x0 = load_images("fashion", split="heldout", n=32, like=fashion)
    noise = noisy(fashion, 32)
    ab = fashion.schedule.alpha_bar[t]
    x_t = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * noise
    assert (fashion.eps(x_t, t) - noise).square().mean() < most


# prediction types and shapes


@pytest.mark.parametrize("t", [0, 37, 500, 999])
def test_prediction_types_agree_on_what_the_network_meant(factory, tmp_path, t):
    """x_t = a x0 + s eps and v = a eps - s x0 hold for one network read in three ways."""
    unet = factory.unet()
    models = {}
    for kind in ("epsilon", "sample", "v_prediction"):
        folder = factory.pipeline(tmp_path / kind, unet, prediction_type=kind)
        models[kind] = load_model(str(folder))
    x = noisy(models["epsilon"], dtype=torch.float64)
    out = models["epsilon"].eps(x, t)
    ab = models["epsilon"].schedule.alpha_bar[t]
    a, s = np.sqrt(ab), np.sqrt(1 - ab)
    torch.testing.assert_close(a * out + s * models["sample"].eps(x, t), x, atol=1e-6, rtol=1e-6)
    eps = models["v_prediction"].eps(x, t)
    torch.testing.assert_close(a * eps - s * (x - s * eps) / a, out, atol=1e-4, rtol=1e-4)


def test_learned_variances_are_split_off(factory, tmp_path):
    unet = factory.unet(channels=3, out_channels=6)
    model = load_model(str(factory.pipeline(tmp_path / "wide", unet)))
    x = noisy(model)
    with torch.no_grad():
        out = unet(x, 10).sample
    assert (model.family, model.sample_shape) == ("iddpm", (3, 8, 8))
    torch.testing.assert_close(model.eps(x, 10), out[:, :3], atol=1e-6, rtol=1e-5)


def test_a_network_with_other_outputs_is_refused(factory, tmp_path):
    folder = factory.pipeline(tmp_path / "odd", factory.unet(channels=1, out_channels=3))
    with pytest.raises(ValueError, match="1 to 3 channels"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_keeps_the_dtype_of_the_state_and_runs_at_fractional_timesteps(tiny, dtype):
    x = noisy(tiny, dtype=dtype)
    between = tiny.eps(x, 400.5)
    assert between.dtype == dtype
    assert (between - tiny.eps(x, 400)).abs().max() < (
        tiny.eps(x, 300) - tiny.eps(x, 400)
    ).abs().max()


@pytest.mark.parametrize("shape", [(2, 1, 8, 9), (2, 3, 8, 8), (1, 8, 8), (2, 64)])
def test_a_wrong_shape_is_named_with_the_right_one(tiny, shape):
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), not \(" + ", ".join(map(str, shape))):
        tiny.eps(torch.zeros(shape), 3)


# wrong names and damaged folders


@pytest.mark.parametrize("name", ["nope", "a/b/c"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="ddpm-fashion-32"):
        load_model(name)


def test_a_hub_id_without_network_is_named():
    with pytest.raises(ValueError, match="'no-such/model'"):
        load_model("no-such/model")


@pytest.mark.parametrize(
    "part", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]
)
def test_a_missing_file_is_named(copied, part):
    (copied / part).unlink()
    with pytest.raises(ValueError, match=part.split("/")[-1].split(".")[0]):
        load_model(str(copied))


@pytest.mark.parametrize("part", ["scheduler/scheduler_config.json", "unet/config.json", WEIGHTS])
def test_a_cut_file_is_named(copied, part):
    whole = (copied / part).read_bytes()
    (copied / part).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="copied"):
        load_model(str(copied))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copied, value):
    weights = load_file(copied / WEIGHTS)
    weights["conv_out.weight"][0, 0, 0, 0] = value
    save_file(weights, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not finite: conv_out\.weight"):
        load_model(str(copied))


def test_a_lacking_tensor_is_never_filled_with_random_numbers(copied):
    weights = load_file(copied / WEIGHTS)
    del weights["conv_out.weight"]
    save_file(weights, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_out\.weight"):
        load_model(str(copied))


def test_an_unknown_prediction_type_lists_the_known_ones(factory, tmp_path):
    folder = factory.pipeline(tmp_path / "flow", factory.unet())
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"flow"'))
    with pytest.raises(ValueError, match="'flow' is not known; use epsilon, sample, v_prediction"):
        load_model(str(folder))


# other layouts of a folder: all at the top, pickled weights


@pytest.fixture
def flat(tmp_path):
    """Folder as the google models have it, small: all at the top, pickled, attention under old names."""
    from diffusers import UNet2DModel

    folder = tmp_path / "flat"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GOOGLE_UNET | SMALL))
    (folder / "scheduler_config.json").write_text(json.dumps(GOOGLE_SCHEDULER))
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = UNet2DModel.from_config(GOOGLE_UNET | SMALL).state_dict()
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert sum(".proj_attn." in name for name in weights) == 8
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    return folder


def expected_eps(folder, x, t):
    """Output of the network in `folder`, put together by hand."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_config(GOOGLE_UNET | SMALL).eval()
    weights = torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        weights = {name.replace(f".{old}.", f".{new}."): value for name, value in weights.items()}
    unet.load_state_dict(weights)
    with torch.no_grad():
        return unet(x, t).sample


@pytest.mark.parametrize("indexed", [True, False])
def test_a_flat_folder_with_pickled_weights_is_read(flat, indexed):
    if not indexed:
        (flat / "model_index.json").unlink()
    model = load_model(str(flat))
    assert (model.family, model.sample_shape) == ("ddpm", (3, 8, 8))
    x = noisy(model)
    torch.testing.assert_close(model.eps(x, 40), expected_eps(flat, x, 40), atol=1e-5, rtol=1e-4)
    assert model.schedule.alpha_bar[0] == pytest.approx(1 - 1e-4)


def test_the_google_models_have_the_published_number_of_parameters():
    from diffusers import UNet2DModel

    with torch.device("meta"):
        unet = UNet2DModel.from_config(GOOGLE_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 113_673_219


@pytest.mark.parametrize(
    "part", ["config.json", "scheduler_config.json", "diffusion_pytorch_model.bin"]
)
def test_a_flat_folder_names_the_file_that_it_lacks(flat, part):
    (flat / part).unlink()
    with pytest.raises(ValueError, match=f"lacks {part.split('.')[0]}"):
        load_model(str(flat))


def test_safetensors_are_preferred(copied, tiny):
    bad = {name: value * torch.nan for name, value in load_file(copied / WEIGHTS).items()}
    torch.save(bad, (copied / WEIGHTS).with_suffix(".bin"))
    x = noisy(tiny)
    assert torch.equal(load_model(str(copied)).eps(x, 3), tiny.eps(x, 3))


def test_a_pickle_beside_nothing_else_is_read(copied, tiny):
    torch.save(load_file(copied / WEIGHTS), (copied / WEIGHTS).with_suffix(".bin"))
    (copied / WEIGHTS).unlink()
    x = noisy(tiny)
    assert torch.equal(load_model(str(copied)).eps(x, 3), tiny.eps(x, 3))


class Code:
    """Object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_with_code_is_refused_and_nothing_runs(flat, tmp_path):
    torch.save(
        {"w": torch.ones(1), "x": Code(tmp_path / "ran")}, flat / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        ValueError, match=r"holds \w+\.mkdir.* nothing in it was run; .* safetensors"
    ):
        load_model(str(flat))
    assert not (tmp_path / "ran").exists()


def test_a_cut_pickle_is_named(flat):
    weights = flat / "diffusion_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin cannot be read"):
        load_model(str(flat))


@pytest.mark.parametrize("kind", ["UNetUnconditionalModel", "UNet2DConditionModel"])
def test_another_network_is_named(flat, kind):
    """The first is the name under which the google models were first published."""
    (flat / "config.json").write_text(json.dumps(GOOGLE_UNET | SMALL | {"_class_name": kind}))
    with pytest.raises(ValueError, match=f"holds a {kind}; give an unconditional UNet2DModel"):
        load_model(str(flat))


# the hub


@pytest.fixture
def hub(monkeypatch):
    """Stand-in for the hub: fetches by copying what the patterns allow, and keeps the requests."""
    requests = []

    def publish(folder, cache):
        def snapshot_download(name, *, revision, allow_patterns):
            requests.append((name, revision, allow_patterns))
            files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            for path in files:
                if any(path.match(pattern) for pattern in allow_patterns):
                    (cache / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / path, cache / path)
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return requests

    return publish


def test_a_flat_model_is_fetched_and_its_pickle_only_for_want_of_safetensors(hub, flat, tmp_path):
    requests = hub(flat, tmp_path / "cache")
    model = load_model("google/ddpm-church-256", revision="5a1118b")
    assert (model.name, model.sample_shape) == ("ddpm-church-256", (3, 8, 8))
    assert [request[:2] for request in requests] == [("google/ddpm-church-256", "5a1118b")] * 2
    assert [any("bin" in pattern for pattern in request[2]) for request in requests] == [
        False,
        True,
    ]


def test_no_pickle_is_fetched_beside_safetensors(hub, copied, tmp_path):
    shutil.copy(copied / WEIGHTS, (copied / WEIGHTS).with_suffix(".bin"))
    requests = hub(copied, tmp_path / "cache")
    assert load_model("owner/tiny").sample_shape == (1, 8, 8)
    assert len(requests) == 1
    assert requests[0][1] is None
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_no_network_is_said_in_one_sentence():
    """The tests run offline, and the cache is empty."""
    with pytest.raises(
        ValueError, match="'google/no-such-256' is not in the local cache"
    ) as caught:
        load_model("google/no-such-256")
    assert "connect to the network, or give a local folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), RuntimeError("reset"), OSError("disk full")]
)
def test_a_download_that_fails_gives_its_reason(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=rf"'a/b' .* \({type(error).__name__}: {error}\)"):
        load_model("a/b")


@pytest.mark.parametrize("name", ["ddpm-fashion-32", "tiny"])
def test_a_local_folder_has_no_revision(name, tiny_folder):
    where = str(tiny_folder) if name == "tiny" else name
    with pytest.raises(
        ValueError, match=f"{Path(where).name} is a local folder; leave out revision 'v1'"
    ):
        load_model(where, revision="v1")


# controls


def test_random_models_differ_by_seed_and_leave_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    first, again, other = (random_model(tiny, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    x = noisy(tiny)
    assert torch.equal(first.eps(x, 7), again.eps(x, 7))
    assert not torch.allclose(first.eps(x, 7), other.eps(x, 7), atol=1e-3)
    assert not torch.allclose(first.eps(x, 7), tiny.eps(x, 7), atol=1e-3)
    assert first.sample_shape == tiny.sample_shape
    assert np.array_equal(first.schedule.alpha_bar, tiny.schedule.alpha_bar)


def test_a_random_model_needs_a_network(tiny):
    with pytest.raises(ValueError, match="'zero' has no network"):
        random_model(zero_model(tiny), seed=0)


def test_the_zero_model_predicts_zero(tiny):
    model = zero_model(tiny)
    assert (model.name, model.sample_shape) == ("zero", tiny.sample_shape)
    assert model.eps(noisy(tiny), 5).abs().max() == 0


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("n", [6, 40], ids=["n < d", "n > d"])
def test_the_linear_model_is_the_dense_formula(schedule, n, t):
    small = FrozenModel("like", "analytic", schedule, (1, 4, 4), torch.zeros_like)
    images = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (n, 1, 4, 4)))
    model = linear_model(images, small)
    flat, ab = images.flatten(1).numpy(), schedule.alpha_bar[t]
    x = noisy(small, dtype=torch.float64)
    centred = x.flatten(1).numpy() - np.sqrt(ab) * flat.mean(0)
    dense = (
        np.sqrt(1 - ab) * np.linalg.solve(ab * np.cov(flat.T) + (1 - ab) * np.eye(16), centred.T).T
    )
    np.testing.assert_allclose(model.eps(x, t).flatten(1).numpy(), dense, rtol=1e-6, atol=1e-7)
    assert (model.name, model.family) == ("linear", "analytic")


def test_the_linear_model_refuses_images_of_another_shape(tiny):
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\)"):
        linear_model(torch.zeros(4, 1, 9, 9), tiny)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'mouse' is not here"):
        load_model("ddpm-fashion-32", device="mouse")


# backend and precision


def test_a_model_says_what_runs_it(tiny_folder):
    model = load_model(str(tiny_folder), backend="torch", precision="bf16")
    assert (model.backend, model.precision, model.dtype) == ("torch", "bf16", torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    control = random_model(model, seed=0)
    assert (control.backend, control.precision) == ("torch", "bf16")
    assert (zero_model(model).backend, zero_model(model).precision) == ("torch", "fp32")


def test_a_random_model_runs_where_its_model_does(tiny):
    control = random_model(replace(tiny, backend="openvino"), seed=0)
    assert (control.backend, control.network.device) == ("openvino", tiny.network.device)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "onnx"}, "backend 'onnx' is not known; use one of auto, torch, openvino"),
        ({"precision": "fp16"}, "precision 'fp16' is not known; use one of fp32, bf16"),
        ({"backend": "openvino", "device": "meta"}, "runs on the CPU, not on 'meta'"),
    ],
)
def test_a_wrong_backend_or_precision_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        load_model("ddpm-fashion-32", **options)
