"""Backends: the same noise from torch and OpenVINO, compiled once, and batches that fit into memory."""

import hashlib
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ood_lib import backends
from ood_lib.backends import batched, choose_backend, compile_cached, forward_of, import_openvino
from ood_lib.domains import load_images
from ood_lib.inversion import invert
from ood_lib.models import load_model, random_model

FP32, BF16 = 1e-5, 2e-2  # rms difference of the noise, relative to its size
LATENT = 1e-4  # the same of latents, at the end of a path
needs_openvino = pytest.mark.skipif(import_openvino() is None, reason="openvino is not installed")


def difference(found, expected):
    """Root mean square difference, relative to the size of what is expected."""
    gap = (found.double() - expected.double()).square().mean()
    return float((gap / expected.double().square().mean()).sqrt())


def noisy(model, n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *model.sample_shape, generator=generator, dtype=dtype)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """Folder that the tests of this module share, so that few networks are compiled."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def compiled_here(module_folder, monkeypatch):
    """Keep what is compiled out of the real project folder."""
    monkeypatch.setenv("OOD_ROOT", str(module_folder))


@pytest.fixture
def pair(compiled_here, tiny_folder):
    """The tiny model on torch and on OpenVINO."""
    return [load_model(str(tiny_folder), backend=name) for name in ("torch", "openvino")]


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """Folder of compiled networks of one test, empty at first."""
    monkeypatch.setenv("OOD_ROOT", str(tmp_path))
    return tmp_path / "runs" / "openvino"


@pytest.fixture
def conversions(monkeypatch):
    """List that grows by one with each conversion of a network."""
    made, convert = [], import_openvino().convert_model

    def counted(*args, **kwargs):
        made.append(1)
        return convert(*args, **kwargs)

    monkeypatch.setattr(import_openvino(), "convert_model", counted)
    return made


# the same noise everywhere


@needs_openvino
@pytest.mark.parametrize("n", [1, 8, 19], ids=["padded", "one chunk", "chunks and a rest"])
@pytest.mark.parametrize("t", [0, 400.5, 999])
def test_both_backends_give_the_same_noise(pair, n, t):
    slow, fast = pair
    x = noisy(slow, n)
    assert difference(fast.eps(x, t), slow.eps(x, t)) < FP32


@needs_openvino
def test_a_fractional_timestep_is_not_rounded(pair):
    x = noisy(pair[1], 2)
    assert difference(pair[1].eps(x, 400.5), pair[1].eps(x, 400)) > 10 * FP32


@needs_openvino
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_has_the_type_of_the_state(pair, dtype):
    assert {model.eps(noisy(model, 3, dtype), 5).dtype for model in pair} == {dtype}


@needs_openvino
@pytest.mark.parametrize("name", ["ddpm-fashion-32", "iddpm-fashion-32"])
def test_zoo_models_give_the_same_noise(root, compiled_here, name):
    """The second one also predicts variances, which are split off first."""
    where = str(root / "data/zoo" / name)
    slow, fast = (load_model(where, backend=backend) for backend in ("torch", "openvino"))
    for t in (10, 500.25):
        x = noisy(slow, 3)
        assert fast.eps(x, t).shape == (3, 1, 32, 32)
        assert difference(fast.eps(x, t), slow.eps(x, t)) < FP32


@needs_openvino
def test_latents_agree(root, compiled_here, digits):
    where = str(root / "data/zoo/ddpm-fashion-32")
    slow, fast = (
        invert(load_model(where, backend=name), digits[:3]).latent for name in ("torch", "openvino")
    )
    assert difference(fast, slow) < LATENT


@needs_openvino
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_learned_variances_and_prediction_types_are_treated_alike(
    factory, tmp_path, compiled_here, kind
):
    unet = factory.unet(channels=3, out_channels=6)
    folder = str(factory.pipeline(tmp_path / kind, unet, prediction_type=kind))
    slow, fast = (load_model(folder, backend=backend) for backend in ("torch", "openvino"))
    x = noisy(slow, 3)
    assert difference(fast.eps(x, 300), slow.eps(x, 300)) < FP32


@needs_openvino
def test_images_may_go_one_by_one(pair, monkeypatch):
    """As those do that are larger than the chunks are meant for."""
    monkeypatch.setitem(backends.CHUNKS, "openvino", 1)
    x = noisy(pair[0], 2)
    assert difference(pair[1].eps(x, 300), pair[0].eps(x, 300)) < FP32


@pytest.mark.parametrize(("side", "most"), [(8, 32), (32, 32), (64, 8), (128, 2), (256, 1)])
def test_chunks_hold_fewer_images_the_larger_they_are(side, most):
    assert backends._chunk("torch", torch.zeros(1, 3, side, side)) == most


def test_a_state_beyond_one_chunk_is_cut_and_joined(factory):
    network, sizes = factory.unet(), []
    network.register_forward_hook(lambda _, inputs, out: sizes.append(len(inputs[0])))
    x = torch.randn(70, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = forward_of(network)(x, 3)
        assert sizes == [32, 32, 6]
        assert difference(found, network(x, 3).sample) < FP32


def test_bf16_is_close_to_fp32(tiny_folder, capfd):
    for name in (str(tiny_folder), "ddpm-fashion-32"):
        whole, half = (
            load_model(name, backend="torch", precision=precision) for precision in ("fp32", "bf16")
        )
        x = noisy(whole, 3)
        found = half.eps(x, 500)
        assert found.dtype == x.dtype
        assert "kept in float32" not in "".join(capfd.readouterr())  # a remark of diffusers
        assert 1e-4 < difference(found, whole.eps(x, 500)) < BF16


@needs_openvino
def test_openvino_in_bf16_is_close_to_fp32_or_refused(pair, tiny_folder):
    """A processor without bf16 would compute in fp32 and not say so."""
    if backends._openvino_has_bf16():
        half = load_model(str(tiny_folder), backend="openvino", precision="bf16")
        x = noisy(half, 3)
        assert 1e-4 < difference(half.eps(x, 500), pair[0].eps(x, 500)) < BF16
    else:
        with pytest.raises(ValueError, match="no precision 'bf16' on this processor"):
            load_model(str(tiny_folder), backend="openvino", precision="bf16")


@needs_openvino
def test_a_batch_is_its_images_one_by_one(pair):
    for model in pair:
        x = noisy(model, 19)
        single = torch.cat([model.eps(image[None], 250) for image in x])
        assert difference(model.eps(x, 250), single) < FP32


def test_fp32_is_never_tf32(factory):
    """Without a GPU only the switch can be seen."""
    network, seen = factory.unet(), []
    convolutions = torch.backends.cudnn.conv
    network.register_forward_hook(lambda *_: seen.append(convolutions.fp32_precision))
    before = convolutions.fp32_precision
    forward_of(network)(torch.zeros(1, 1, 8, 8), 3)
    assert (seen, convolutions.fp32_precision) == (["ieee"], before)


# compiled once


@needs_openvino
def test_loading_compiles_nothing_and_the_second_load_finds_it_compiled(
    blobs, tiny_folder, conversions
):
    model = load_model(str(tiny_folder), backend="openvino")
    assert not blobs.exists()
    x = noisy(model, 2)
    first = model.eps(x, 7)
    model.eps(noisy(model, 9), 8)
    again = load_model(str(tiny_folder), backend="openvino").eps(x, 7)
    assert (len(conversions), len(list(blobs.iterdir()))) == (1, 1)
    assert torch.equal(again, first)


@needs_openvino
def test_other_weights_are_other_networks(blobs, tiny, conversions):
    like = replace(tiny, backend="openvino")
    models = [random_model(like, seed=seed) for seed in (1, 2)]
    x = noisy(models[0], 2)
    first, second = (model.eps(x, 7) for model in models)
    assert difference(first, second) > 0.1
    assert (len(conversions), len(list(blobs.iterdir()))) == (2, 2)


@needs_openvino
@pytest.mark.parametrize("how", ["load_state_dict", "in place"])
def test_changed_weights_are_never_stale(pair, factory, how):
    slow, fast = pair
    x = noisy(slow, 2)
    before = fast.eps(x, 7)
    for model in (slow, fast):
        if how == "load_state_dict":
            model.network.load_state_dict(factory.unet(seed=1).state_dict())
        else:
            model.network.conv_out.weight.mul_(0.5)
    assert difference(fast.eps(x, 7), before) > 0.1
    assert difference(fast.eps(x, 7), slow.eps(x, 7)) < FP32


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def sealed_junk(content):
    """Content that no import accepts, under a checksum that holds."""
    return hashlib.sha256(b"junk").digest() + b"junk"


@needs_openvino
@pytest.mark.parametrize(
    "spoil", [flip_a_bit, sealed_junk, lambda content: content[:200], lambda content: b""]
)
def test_a_broken_blob_is_made_again(blobs, conversions, spoil):
    network, example = torch.nn.ReLU(), (torch.zeros(3),)
    compile_cached(network, example, identity="ReLU")
    (path,) = blobs.iterdir()
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    again = compile_cached(network, example, identity="ReLU")
    assert again((np.array([-1, 0, 1], dtype=np.float32),))[0].tolist() == [0, 0, 1]
    assert len(conversions) == 2
    assert [len(p.read_bytes()) for p in blobs.iterdir()] == [len(whole)]
    compile_cached(network, example, identity="ReLU")
    assert len(conversions) == 2


@needs_openvino
def test_shapes_identity_and_threads_are_part_of_the_key(blobs, conversions, monkeypatch):
    for size, identity in ((3, "a"), (4, "a"), (3, "b"), (3, "a")):
        compile_cached(torch.nn.ReLU(), (torch.zeros(size),), identity=identity)
    compile_cached(torch.nn.ReLU(), (torch.zeros(3),), identity="a", fixed=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    compile_cached(torch.nn.ReLU(), (torch.zeros(3),), identity="a")
    assert (len(conversions), len(list(blobs.iterdir()))) == (5, 5)


@needs_openvino
def test_openvino_reports_to_nobody(tmp_path):
    home = {k: v for k, v in os.environ.items() if k != "CI"} | {"HOME": str(tmp_path)}
    code = "from ood_lib.backends import import_openvino as get; print(get().__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert not (tmp_path / "intel").exists()  # where it keeps the number it reports under


# which one runs


@pytest.fixture
def processor(monkeypatch):
    """Return a function that gives torch a processor of another kind, and OpenVINO bf16 or none."""

    def pretend(capability, *, bf16=False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(backends, "_openvino_has_bf16", lambda: bf16)

    return pretend


@needs_openvino
@pytest.mark.parametrize(
    ("capability", "device", "precision", "chosen"),
    [
        ("AVX512", "cpu", "fp32", "openvino"),
        ("AVX512", "cuda", "fp32", "torch"),
        ("AVX512", "cpu", "bf16", "torch"),
        ("AVX2", "cpu", "fp32", "torch"),
        ("SVE256", "cpu", "fp32", "torch"),
    ],
)
def test_auto_takes_what_is_fastest(processor, capability, device, precision, chosen):
    processor(capability)
    assert choose_backend("auto", device=device, precision=precision) == chosen


@needs_openvino
def test_auto_takes_openvino_in_bf16_where_it_has_it(processor):
    processor("AVX512", bf16=True)
    assert choose_backend("auto", precision="bf16") == "openvino"


def test_auto_does_without_openvino(processor, monkeypatch):
    processor("AVX512")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_backend("auto") == "torch"
    with pytest.raises(ValueError, match=r"ood_lib\[fast\].*backend='torch'"):
        choose_backend("openvino")


@needs_openvino
def test_openvino_is_not_for_gpus():
    with pytest.raises(ValueError, match="not on 'cuda:1'; use device='cpu', or backend='torch'"):
        choose_backend("openvino", device="cuda:1")


@needs_openvino
@pytest.mark.parametrize("capability", [False, True])
def test_bf16_is_asked_of_the_processor(processor, capability):
    processor("AVX512", bf16=capability)
    if capability:
        assert choose_backend("openvino", precision="bf16") == "openvino"
    else:
        with pytest.raises(ValueError, match="use precision='fp32', or backend='torch'"):
            choose_backend("openvino", precision="bf16")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="backend 'onnx' is not known; use one of auto, torch, op"):
        choose_backend("onnx")
    with pytest.raises(ValueError, match="precision 'fp16' is not known; use one of fp32, bf16"):
        choose_backend("auto", precision="fp16")


# memory


class Memory:
    """Function of a batch that fails above a number of rows, as torch does where memory runs out."""

    def __init__(self, rows, error=None):
        self.rows, self.error, self.tried = rows, error, []

    def __call__(self, batch):
        self.tried.append(len(batch))
        if len(batch) > self.rows:
            if self.error is None:
                torch.empty(10**15)  # no machine has it: the allocator's own words
            raise self.error
        return 2 * batch


ERRORS = [
    None,
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_with_one_warning(error):
    memory, x = Memory(3, error), torch.arange(20)
    with pytest.warns(RuntimeWarning, match="a batch of 16 images; 2 at once") as warned:
        result, size = batched(memory, x, 16)
    assert (len(warned), size) == (1, 2)
    assert torch.equal(result, 2 * x)
    assert memory.tried == [16, 8, 4] + 10 * [2]


def test_a_single_image_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="tried"):
        batched(Memory(0, torch.OutOfMemoryError("tried")), torch.arange(5), 4)


def test_other_errors_are_not_tried_again():
    memory = Memory(2, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        batched(memory, torch.arange(8), 8)
    assert memory.tried == [8]


@given(n=st.integers(0, 40), size=st.integers(1, 50), rows=st.integers(1, 50))
def test_whatever_fits_the_result_is_the_same(n, size, rows):
    x = torch.arange(n)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result, used = batched(Memory(rows, MemoryError()), x, size)
    assert torch.equal(result, 2 * x)
    assert (used < size) == (len(warned) == 1) == (min(n, size) > rows)
    assert used == size or used <= rows


def test_inversion_goes_on_with_the_size_that_fits(tiny):
    """The warning comes once, the latents are those of a machine with enough memory."""
    images = load_images("digits", n=6, like=tiny)
    expected = invert(tiny, images).latent
    memory, predict = Memory(2, MemoryError()), tiny.predict

    def limited(x_t, t):
        memory(x_t)
        return predict(x_t, t)

    small = replace(tiny, predict=limited)
    with pytest.warns(RuntimeWarning, match="a batch of 4 images; 2 at once") as warned:
        found = invert(small, images, batch_size=4).latent
    assert len(warned) == 1
    assert difference(found, expected) < FP32
