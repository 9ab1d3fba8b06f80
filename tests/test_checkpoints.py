"""Original checkpoints: parity with plain reference networks, and what is said of damaged files.

Every weight is random and none is zero, so a weight in a wrong place shows in the outputs.
"""

import io
import os
import pickle

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from reference.adm_unet import ADMUNet
from reference.ddpm_unet import DDPMUNet
from safetensors.torch import load_file

from ood_lib.checkpoints import convert, load_checkpoint, state_dict_of, to_unet
from ood_lib.models import load_model

SIDE = 16
TOLERANCE = 1e-5

NETWORKS = {
    "ddpm": (DDPMUNet, {"ch": 32, "mult": (1, 2), "blocks": 1, "attended": (1,)}),
    "ddpm, two blocks": (DDPMUNet, {"ch": 32, "mult": (1, 1, 2), "attended": (1,)}),
    "ddpm, grey, all attended": (
        DDPMUNet,
        {"channels": 1, "outputs": 1, "ch": 32, "mult": (1, 2), "attended": (0, 1)},
    ),
    "adm, two heads": (ADMUNet, {"ch": 32, "mult": (1, 2), "attended": (1,), "head_channels": 32}),
    "adm, two blocks, four heads": (
        ADMUNet,
        {"ch": 32, "mult": (1, 2, 2), "blocks": 2, "attended": (1,), "head_channels": 16},
    ),
    "improved diffusion": (
        ADMUNet,
        {
            "ch": 32,
            "mult": (1, 2),
            "blocks": 2,
            "attended": (0, 1),
            "head_channels": 32,
            "residual": False,
            "scale_shift": False,
            "outputs": 3,
        },
    ),
    "adm, one level": (ADMUNet, {"ch": 64, "mult": (1,), "attended": (0,), "head_channels": 32}),
}


def make(kind):
    """Network with random weights, none of them zero, and outputs of order one."""
    network, options = NETWORKS[kind]
    reference, generator = network(**options).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(generator=generator)
            if weight.ndim > 1:
                weight /= weight[0].numel() ** 0.5
            else:
                weight.mul_(0.3).add_(name.endswith("weight"))
            if name.startswith(("conv_in", "input_blocks.0.0")):
                weight *= 0.03  # so faint that the eps of the first norms matters
    return reference


def head_channels(kind):
    return NETWORKS[kind][1].get("head_channels", 64)


def unet_of(kind, reference):
    return to_unet(reference.state_dict(), head_channels=head_channels(kind), side=SIDE)


def gap(reference, unet):
    """Largest difference of the outputs for noise at an early and a late timestep."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, SIDE, SIDE, generator=generator)
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        return (reference(x, t) - unet(x, t).sample).abs().max().item()


# parity


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_converted_network_agrees_with_the_original(kind):
    reference = make(kind)
    assert all(value.all() for value in reference.state_dict().values())
    unet = unet_of(kind, reference)
    assert gap(reference, unet) < TOLERANCE
    count = [sum(p.numel() for p in net.parameters()) for net in (reference, unet)]
    assert count[0] == count[1]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ddpm, two blocks", {"downsample_padding": 1}),
        ("ddpm, two blocks", {"flip_sin_to_cos": True}),
        ("ddpm, two blocks", {"freq_shift": 0}),
        ("ddpm, two blocks", {"norm_eps": 1e-5}),
        ("ddpm, two blocks", {"attention_head_dim": 16}),
        ("adm, two heads", {"attn_norm_num_groups": None}),
        ("adm, two heads", {"flip_sin_to_cos": False}),
        ("adm, two heads", {"freq_shift": 1}),
        ("adm, two heads", {"norm_eps": 1e-6}),
        ("adm, two heads", {"attention_head_dim": 16}),
        ("improved diffusion", {"downsample_padding": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_any_wrong_detail_breaks_parity(kind, change):
    reference = make(kind)
    unet = unet_of(kind, reference)
    broken = UNet2DModel.from_config({**unet.config, **change}).eval()
    broken.load_state_dict(unet.state_dict(), strict="attn_norm_num_groups" not in change)
    assert gap(reference, unet) < TOLERANCE
    assert gap(reference, broken) > 1000 * TOLERANCE


def test_heads_read_as_one_break_parity():
    """Taking q, k and v as thirds of all channels is right for one head only."""
    reference = make("adm, two heads")
    unet = unet_of("adm, two heads", reference)
    attention, original = unet.mid_block.attentions[0], reference.middle_block[1].qkv
    with torch.no_grad():
        thirds = zip(original.weight[..., 0].chunk(3), original.bias.chunk(3), strict=True)
        for layer, (weight, bias) in zip(
            (attention.to_q, attention.to_k, attention.to_v), thirds, strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    assert gap(reference, unet) > 1000 * TOLERANCE


def test_heads_of_another_width_break_parity():
    reference = make("adm, two heads")
    wrong = to_unet(reference.state_dict(), head_channels=64, side=SIDE)
    assert gap(reference, wrong) > 1000 * TOLERANCE


@pytest.mark.parametrize(("network", "count"), [(DDPMUNet, 113_673_219), (ADMUNet, 93_563_910)])
def test_the_full_networks_have_the_published_number_of_parameters(network, count):
    """The three DDPM models of 256 pixels, and the dog model of P2 weighting."""
    with torch.device("meta"):
        reference = network()
    unet = to_unet(reference.state_dict())
    assert sum(p.numel() for p in reference.parameters()) == count
    assert sum(p.numel() for p in unet.parameters()) == count
    assert unet.config.block_out_channels == (128, 128, 256, 256, 512, 512)
    assert [kind.startswith("Attn") for kind in unet.config.down_block_types] == [0, 0, 0, 0, 1, 0]


# files


def wrappings(state):
    raw = {name: torch.full_like(value, 9.0) for name, value in state.items()}
    parallel = {f"module.{name}": value for name, value in state.items()}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "bare": state,
        "parallel": parallel,
        "ddim list, moving average last": [raw, optimizer, 3, 40, state],
        "dict": {"epoch": 3, "optimizer": optimizer, "state_dict": parallel},
        "moving average": {"model": raw, "ema": state},
        "nested": {"model": {"state_dict": state}},
    }


@pytest.mark.parametrize("kind", ["ddpm", "adm, two heads"])
def test_a_converted_folder_is_a_model(tmp_path, kind):
    reference = make(kind)
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    out = convert(
        tmp_path / "model.pt", tmp_path / "out", head_channels=head_channels(kind), side=SIDE
    )
    model = load_model(str(out))
    learned = kind.startswith("adm")
    assert (model.family, model.sample_shape) == ("iddpm" if learned else "ddpm", (3, SIDE, SIDE))
    scheduler = DDPMScheduler.from_pretrained(out / "scheduler")
    assert scheduler.config.variance_type == ("learned_range" if learned else "fixed_small")
    assert scheduler.betas[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2])
    assert len(model.schedule.alpha_bar) == 1000
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        eps = reference(x, torch.full((2,), 250.0))[:, :3]
    torch.testing.assert_close(model.eps(x, 250), eps, atol=TOLERANCE, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("wrapping", wrappings({}))
def test_the_usual_wrappings_are_opened(tmp_path, wrapping, zipped):
    state = {"conv_in.weight": torch.ones(2, 3), "conv_in.bias": torch.zeros(2)}
    torch.save(wrappings(state)[wrapping], tmp_path / "a", _use_new_zipfile_serialization=zipped)
    found = state_dict_of(load_checkpoint(tmp_path / "a"))
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_half_precision_and_the_cosine_schedule(tmp_path):
    state = {name: value.half() for name, value in make("ddpm").state_dict().items()}
    torch.save(state, tmp_path / "a.ckpt")
    out = convert(tmp_path / "a.ckpt", tmp_path / "out", side=SIDE, schedule="cosine")
    weights = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert load_model(str(out)).schedule.alpha_bar[500] == pytest.approx(0.494, abs=0.01)


def test_weights_that_are_not_finite_are_named_at_load(tmp_path):
    state = make("ddpm").state_dict()
    state["conv_out.bias"][1] = torch.nan
    torch.save(state, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "out", side=SIDE)
    with pytest.raises(ValueError, match=r"not finite: conv_out\.bias"):
        load_model(str(tmp_path / "out"))


# damaged and foreign files


@pytest.mark.parametrize("kind", ["ddpm", "adm, two heads", "improved diffusion"])
def test_a_missing_weight_is_named(kind):
    state = make(kind).state_dict()
    for name in list(state)[::7]:  # weights and biases of every sort, at a seventh of the time
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            to_unet({k: v for k, v in state.items() if k != name}, head_channels=32)


@pytest.mark.parametrize("kind", ["ddpm", "adm, two heads"])
@pytest.mark.parametrize("kept", [1, 2, 10, 50, 100])
def test_a_cut_state_names_a_weight_that_it_lacks(kind, kept):
    whole = make(kind).state_dict()
    part = dict(list(whole.items())[:kept])
    with pytest.raises(ValueError, match="lacks '") as caught:
        to_unet(part, head_channels=32)
    named = str(caught.value).split("'")[1]
    assert named in whole
    assert named not in part


@pytest.mark.parametrize("kind", ["ddpm", "adm, two heads"])
def test_a_weight_left_over_is_named(kind):
    state = make(kind).state_dict() | {"label_emb.weight": torch.ones(4, 2), "other": torch.ones(1)}
    with pytest.raises(ValueError, match=r"2 weights .* first is 'label_emb\.weight'"):
        to_unet(state, head_channels=32)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ddpm", "mid.attn_1.q.weight"),
        ("ddpm", "temb.dense.0.weight"),
        ("adm, two heads", "middle_block.1.qkv.bias"),
        ("adm, two heads", "out.0.weight"),
    ],
)
def test_a_weight_of_another_shape_is_named_with_both(kind, name):
    state = make(kind).state_dict()
    shape = list(state[name].shape)
    state[name] = torch.ones(shape[0] + 1, *shape[1:])
    with pytest.raises(ValueError, match=rf"'{name}' has shape \({shape[0] + 1},.* \({shape[0]},"):
        to_unet(state, head_channels=32)


def test_weights_of_no_known_layout_are_quoted():
    with pytest.raises(ValueError, match=r"down_blocks\.0\.a are of no known layout"):
        to_unet({"down_blocks.0.a": torch.ones(1)})


def test_the_wrong_layout_names_what_it_lacks():
    with pytest.raises(ValueError, match=r"lacks 'input_blocks\.0\.0\.weight'"):
        to_unet(make("ddpm").state_dict(), layout="adm")


@pytest.mark.parametrize("saved", [{"epoch": 3}, [1, 2], 7, {}, {"model": {"lr": 0.1}}])
def test_a_checkpoint_without_a_state_dict_is_refused(saved):
    with pytest.raises(ValueError, match="no state dict in the checkpoint"):
        state_dict_of(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "vae"}, "layout 'vae' is not known; use auto, ddpm, adm"),
        ({"side": 17}, "side 17 cannot be halved 1 times; give a multiple of 2"),
        ({"head_channels": 48}, "attention over 64 channels has no heads of 48"),
        ({"schedule": "sine"}, "schedule 'sine' is not known; use linear, cosine"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    torch.save(make("adm, two heads").state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists; give a new folder"):
        convert(tmp_path / "a.pt", tmp_path)


class Code:
    """Object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path, form):
    saved = {"w": torch.ones(2), "x": Code(tmp_path / "ran")}
    if form == "plain pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(saved["x"], protocol=2))
    else:
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"holds \w+\.mkdir, .* nothing in it was run; save"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.99])
def test_a_cut_file_is_named(tmp_path, zipped, share):
    whole = io.BytesIO()
    torch.save({"w": torch.ones(64, 64)}, whole, _use_new_zipfile_serialization=zipped)
    (tmp_path / "a.pt").write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a checkpoint of torch"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"hello world", b"<!doctype html>", b"\x89PNG"])
def test_a_file_of_another_format_is_named(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a checkpoint of torch"):
        load_checkpoint(tmp_path / "a.pt")
