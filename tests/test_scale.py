"""The paper's scale: counted work against closed forms, measured memory, plans, and exact commands."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from reference.adm_unet import ADMUNet
from reference.ddpm_unet import DDPMUNet
from torch.utils.flop_counter import FlopCounterMode

from ood_lib import scale
from ood_lib.checkpoints import to_unet
from ood_lib.cli import app
from ood_lib.files import project_root
from ood_lib.models import load_model
from ood_lib.scale import (
    ARCHITECTURES,
    build,
    cost_of,
    count_flops,
    example,
    memory_needed,
    plan,
    real_runs,
)

REFERENCES = {"ddpm-256": DDPMUNet, "adm-256": ADMUNet}
COST = scale.Cost("any", 1000, 2_000_000, 4000, 768, 6144, 3072)
SLUG = "20_at_the_papers_scale"


def meta(*shape):
    return torch.empty(shape, device="meta")


def attention_flops(name):
    """Products of queries and keys, and of weights and values: two matrix products a layer."""
    layers, tokens, width = {"ddpm-256": 5, "adm-256": 3}[name], 16**2, 512
    return 4 * width * (layers * tokens**2 + (tokens // 4) ** 2)  # and one in the middle at 8x8


# ------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_what_the_loader_derives_from_a_checkpoint(name):
    with torch.device("meta"):
        wanted = to_unet(REFERENCES[name]().state_dict())
    made = build(name)
    assert {k: v for k, v in made.config.items() if k[0] != "_"} == {
        k: v for k, v in wanted.config.items() if k[0] != "_"
    }
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in wanted.state_dict().items()
    }


def test_random_weights_follow_the_seed_and_leave_the_global_state(monkeypatch):
    small = ARCHITECTURES["ddpm-256"] | {"block_out_channels": (32,) * 6, "layers_per_block": 1}
    monkeypatch.setitem(ARCHITECTURES, "small", small)
    before = torch.get_rng_state()
    one, same, other = (build("small", seed=s).conv_in.weight for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --------------------------------------------------------------------------------------------- work


@given(
    batch=st.integers(1, 4),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    side=st.sampled_from([4, 8]),
)
def test_a_convolution_is_counted_as_by_hand(batch, inputs, outputs, side):
    layer = torch.nn.Conv2d(inputs, outputs, 3, padding=1, device="meta")
    by_hand = 2 * batch * side**2 * outputs * inputs * 9
    assert count_flops(layer, meta(batch, inputs, side, side)) == by_hand


@given(rows=st.integers(1, 9), inputs=st.integers(1, 9), outputs=st.integers(1, 9))
def test_a_linear_layer_is_counted_as_by_hand(rows, inputs, outputs):
    layer = torch.nn.Linear(inputs, outputs, device="meta")
    assert count_flops(layer, meta(rows, inputs)) == 2 * rows * inputs * outputs


class Attention(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_is_counted_as_by_hand():
    heads, tokens, width = 2, 64, 16
    assert count_flops(Attention(), meta(1, heads, tokens, width)) == 4 * heads * tokens**2 * width


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_work_is_that_of_a_network_written_apart(name):
    """The reference networks share no code with diffusers; their attention is two plain products."""
    with torch.device("meta"):
        reference = REFERENCES[name]()
        counted = count_flops(reference, *example(build(name)))
    assert counted == cost_of(name).flops


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_attention_of_the_networks_is_counted(name):
    network = build(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*example(network))
    counted = counter.get_flop_counts()["Global"]
    products = [n for op, n in counted.items() if re.search("bmm|scaled_dot_product", str(op))]
    assert sum(products) == attention_flops(name)


def test_the_work_is_the_published_one():
    """DeepCache, arXiv:2312.00858, table 2: 248.7 GMACs for LSUN church and bedroom."""
    assert cost_of("ddpm-256").flops / 2e9 == pytest.approx(248.7, rel=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [2, 5])
def test_work_is_linear_in_the_batch(name, batch):
    network = build(name)
    assert count_flops(network, *example(network, batch=batch)) == batch * cost_of(name).flops


def test_bytes_follow_from_counts():
    cost = cost_of("ddpm-256")
    assert cost.dimension == 3 * 256 * 256
    assert (cost.weight_bytes, cost.latent_bytes) == (4 * 113_673_219, 4 * 196_608)
    assert cost.state_bytes == 2 * cost.latent_bytes


# ------------------------------------------------------------------------------------- measurements


@pytest.fixture
def small(monkeypatch):
    """Make the pass of a small network measurable here, in this process."""
    options = ARCHITECTURES["adm-256"] | {"block_out_channels": (32, 64), "sample_size": 64}
    options["down_block_types"] = ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
    options["up_block_types"] = ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
    monkeypatch.setitem(ARCHITECTURES, "small", options)
    return "small"


def test_a_pass_gives_time_and_memory(small):
    seconds, before, peak = scale._run_pass(small, 2, 0)
    assert seconds > 0
    assert peak >= before > 50e6  # a process with PyTorch holds more than this


def test_figures_of_a_pass_follow_from_what_the_process_reports(small, monkeypatch):
    def run(command, **options):
        assert command[1:] == ["-m", "ood_lib.scale", small, "3", "0"]
        return subprocess.CompletedProcess(command, 0, "a warning\n[2.0, 1000, 1600]\n")

    monkeypatch.setattr(subprocess, "run", run)
    measured = scale.measure_pass(small, batch=3)
    assert measured.activation_bytes == 200
    assert measured.peak_bytes == 1600
    assert measured.flops_per_second == pytest.approx(3 * cost_of(small).flops / 2)


HELD = """
import numpy as np, torch
from ood_lib.inversion import invert
from ood_lib.models import FrozenModel
from ood_lib.scale import _resident_bytes
from ood_lib.schedule import NoiseSchedule
torch.set_num_threads(1)
schedule = NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))
images = torch.rand(96, 3, 256, 256)
model = FrozenModel("zero", "analytic", schedule, (3, 256, 256), lambda x, t: torch.zeros_like(x))
before = _resident_bytes()[0]
invert(model, images, timesteps=np.array([0, 10, 100, 500, 999.0]))
print((_resident_bytes()[1] - before + images.nbytes) / (2 * images.nbytes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tells glibc to give memory back at once")
def test_an_inversion_holds_as_many_states_as_a_plan_says():
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", HELD], env=settings, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) == pytest.approx(scale.HELD_STATES, abs=0.1)


# -------------------------------------------------------------------------------------------- plans


def make(**options):
    wanted = {"images": 80, "calls": 23, "flops_per_second": 1e9, "memory": 1e6} | options
    return plan(COST, 10_000, **wanted)


@given(images=st.integers(1, 500), calls=st.integers(1, 99), devices=st.integers(1, 9))
def test_time_follows_work_and_devices(images, calls, devices):
    one = make(images=images * devices, calls=calls)
    many = make(images=images * devices, calls=calls, devices=devices)
    assert one.hours == pytest.approx(images * devices * calls * COST.flops / 1e9 / 3600)
    assert many.hours == pytest.approx(one.hours / devices)
    assert many.latent_bytes == one.latent_bytes == images * devices * COST.latent_bytes


def test_two_devices_take_half_the_time_and_a_faster_one_less():
    assert make(devices=2).hours == pytest.approx(make().hours / 2)
    assert make(flops_per_second=4e9).hours == pytest.approx(make().hours / 4)
    assert make(images=81, devices=2).hours > make(images=80, devices=2).hours  # one waits


@given(memory=st.floats(0.1e6, 9e6), batch=st.integers(1, 99))
def test_a_plan_fits_into_the_memory_and_fills_it(memory, batch):
    made = make(memory=memory, batch=batch)
    assert 1 <= made.batch <= batch
    fits = scale.USABLE * memory
    if made.folder >= made.batch:
        assert memory_needed(COST, 10_000, images=made.folder, batch=made.batch) <= fits
        assert memory_needed(COST, 10_000, images=made.folder + 1, batch=made.batch) > fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images is 0; give 1 or more"),
        ({"calls": 0}, "calls is 0"),
        ({"devices": 0}, "devices is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"flops_per_second": 0}, "flops_per_second is 0 .* give the positive figures"),
        ({"memory": 1e4}, r"1e-05 GB hold no image; give 2\.7e-05 GB or more"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_least_memory_that_is_named_is_enough():
    with pytest.raises(ValueError, match="hold no image") as caught:
        make(memory=1e4)
    least = float(re.search(r"give ([\d.e-]+) GB", str(caught.value))[1])
    assert make(memory=1.01 * least * 1e9).batch == 1


def test_a_real_run_says_what_was_planned_for_it():
    model = load_model("ddpm-fashion-32")
    small, large = real_runs(model, torch.zeros(32, 1, 32, 32), [8, 32], batch=8)
    assert (small.calls, large.calls) == (24, 24)
    assert large.planned == pytest.approx(4 * small.planned)
    assert large.latent_bytes == 32 * 32 * 32 * 4
    assert 0.4 < large.seconds / large.planned < 2.5
    with pytest.raises(ValueError, match="there are 4 images; 8 are needed"):
        real_runs(model, torch.zeros(4, 1, 32, 32), [4, 8], batch=2)


def test_unknown_architectures_are_named():
    with pytest.raises(ValueError, match="architecture 'ddpm' is not known; use ddpm-256, adm-256"):
        build("ddpm")


def test_results_cannot_be_changed():
    with pytest.raises(AttributeError):
        make().batch = 1
    assert replace(make(), batch=1).batch == 1


# ----------------------------------------------------------------------------------------- commands


def commands():
    """Lines of the chapter that call `ood`, one word a part."""
    cells = nbformat.read(project_root() / "notebooks" / f"{SLUG}.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = [re.search(r"\bood (.*)", line.partition("#")[0]) for line in lines.splitlines()]
    return [shlex.split(match[1].rstrip("& ")) for match in found if match]


def test_the_chapter_gives_commands():
    assert {words[0] for words in commands()} >= {"convert", "invert"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_chapter_exists(words):
    command = typer.main.get_command(app).commands[words[0]]
    command.make_context(words[0], words[1:])  # parses, runs nothing
