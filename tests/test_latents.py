"""Latents on disk: made once, whole or not there, refused when they belong to something else."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ood_lib import latents
from ood_lib.domains import ImageRows, load_images
from ood_lib.inversion import PRESETS, generate, invert
from ood_lib.latents import DamagedShard, LatentSpec, path_of
from ood_lib.models import FrozenModel, load_model, random_model, zero_model


@pytest.fixture
def spec(project, picture_folder):
    """Six pictures under the tiny model, five points."""
    return LatentSpec("tiny", str(picture_folder), points=5, t_end=700.0)


class Counted:
    """A model that notes the images of every network call, and may break off at one of them."""

    def __init__(self, model, die_at=None):
        self.batches, self.die_at = [], die_at

        def predict(x_t, t):
            if len(self.batches) == self.die_at:
                raise KeyboardInterrupt
            self.batches.append(len(x_t))
            return model.predict(x_t, t)

        self.model = replace(model, predict=predict)


@pytest.fixture
def counted(tiny):
    """Make the tiny model with a record of its calls."""
    return lambda die_at=None: Counted(tiny, die_at)


def shards_of(spec):
    return sorted(path_of(spec).glob("*.safetensors"))


def the_shard(spec):
    (path,) = shards_of(spec)
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".safetensors"))


# what they are


def test_the_latents_are_those_of_invert(spec, tiny):
    images = load_images(spec.domain, like=tiny)
    expected = invert(tiny, images, points=5, t_end=700)
    made = latents.get(spec)
    assert torch.equal(made.latent, expected.latent.float())
    assert torch.equal(made.images, images)
    assert torch.equal(made.error_estimate, expected.error_estimate.float())
    assert made.timesteps.tolist() == expected.timesteps.tolist()
    assert (made.nfe, made.solver, made.eps_at) == (expected.nfe, expected.solver, expected.eps_at)
    assert (made.spec, made.first_row, made.companion, made.levels) == (spec, 0, None, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_solver_and_grid_where_the_specification_does_not(project, tiny, preset):
    made = latents.get(LatentSpec("tiny", "faces", n=2, preset=preset))
    expected = invert(tiny, load_images("faces", n=2, like=tiny), preset=preset)
    assert (made.solver, made.nfe) == (expected.solver, expected.nfe)
    assert np.array_equal(made.timesteps, expected.timesteps)
    torch.testing.assert_close(made.latent.double(), expected.latent, atol=1e-5, rtol=1e-5)


def test_the_levels_of_the_path_are_kept_and_the_last_one_is_the_latent(spec, tiny):
    images = load_images(spec.domain, like=tiny)
    path = invert(tiny, images, points=5, t_end=700, keep_levels=True).levels
    made = latents.get(replace(spec, levels=True), shard=4, batch_size=3)
    assert made.levels.shape == (5, 6, 1, 8, 8)
    torch.testing.assert_close(made.levels, path.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.levels[-1], made.latent)
    assert torch.equal(made.levels[0], made.images)


def test_an_exact_path_leads_back_from_disk_to_the_very_images(spec, tiny):
    for _ in range(2):
        for made in latents.shards(replace(spec, preset="exact", points=8), shard=4):
            assert (made.latent.dtype, made.companion.dtype) == (torch.float64, torch.float64)
            grid, solver, pair = made.timesteps, made.solver, made.companion
            back = generate(tiny, made.latent, timesteps=grid, solver=solver, companion=pair)
            torch.testing.assert_close(back.images, made.images.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 4},
        {"points": 4},
        {"t_end": 900.0},
        {"solver": "heun"},
        {"preset": "paper"},
        {"start": "sigma0"},
        {"start": "noise"},
        {"seed": 1},
        {"split": "all"},
        {"levels": True},
    ],
    ids=str,
)
def test_every_part_of_a_specification_has_its_own_folder(spec, change):
    assert path_of(replace(spec, **change)) != path_of(spec)


def test_equal_levels_share_a_folder_however_they_are_written():
    whole, fractional = (LatentSpec("tiny", "faces", t_end=t) for t in (999, 999.0))
    assert path_of(whole) == path_of(fractional)


def test_folders_of_one_name_do_not_share_latents(project):
    assert path_of(LatentSpec("tiny", "a/pictures")) != path_of(LatentSpec("tiny", "b/pictures"))
    assert path_of(LatentSpec("a/tiny", "faces")) != path_of(LatentSpec("b/tiny", "faces"))


def test_the_metadata_say_everything_that_a_shard_depends_on(spec):
    made = latents.get(spec, shard=4)
    first, second = map(metadata_of, shards_of(spec))
    assert json.loads(first["spec"]) == asdict(spec)
    grid = json.loads(first["timesteps"])
    assert (len(grid), grid[0], grid[-1], first["nfe"]) == (5, 0, 700, "4")
    assert (first["preset"], first["start"]) == ("converged", "level0")
    assert (first["solver"], first["eps_at"]) == (made.solver, made.eps_at)
    assert [json.loads(part["rows"]) for part in (first, second)] == [[0, 3], [4, 5]]
    assert all(len(first[f"{part}_sha256"]) == 64 for part in ("model", "images"))
    assert first["model_sha256"] == second["model_sha256"]
    assert first["images_sha256"] != second["images_sha256"]
    error = json.loads(first["error_estimate"])
    assert error["median"] == pytest.approx(float(made.error_estimate[:4].median()))
    assert error["max"] == pytest.approx(float(made.error_estimate[:4].max()))
    assert len(first["checksum"]) == 64
    assert (first["backend"], first["network_dtype"]) == ("torch", "torch.float32")
    assert first["state_dtype"] == "torch.float64"


def test_a_shard_holds_its_tensors_and_may_be_read_by_others(spec):
    latents.get(spec)
    stored = load_file(the_shard(spec))
    assert sorted(stored) == ["error_estimate", "latent"]
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert latents.read(the_shard(spec))[0].keys() == stored.keys()
    other = path_of(spec) / "any"
    other.touch()
    assert the_shard(spec).stat().st_mode == other.stat().st_mode


# noise and shards


@pytest.mark.parametrize("start", ["level0", "sigma0", "noise"])
def test_neither_shards_nor_batches_change_the_latents(spec, start):
    spec = replace(spec, start=start)
    whole = latents.get(spec)
    for shard, batch_size in ((2, 64), (4, 3), (1, 1), (100, 5)):
        shutil.rmtree(path_of(spec))
        made = latents.get(spec, shard=shard, batch_size=batch_size)
        assert len(shards_of(spec)) == -(-6 // shard)
        torch.testing.assert_close(made.latent, whole.latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(made.error_estimate, whole.error_estimate, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, -3])
def test_noise_comes_from_the_seed(spec, seed):
    noisy = replace(spec, start="noise", seed=seed)
    first = latents.get(noisy).latent.clone()
    shutil.rmtree(path_of(noisy))
    assert torch.equal(first, latents.get(noisy).latent)
    other = replace(noisy, seed=seed + 1)
    assert not torch.equal(first, latents.get(other).latent)


def test_noise_comes_from_the_row_and_not_from_the_number_of_images(spec):
    few, all_ = (latents.get(replace(spec, start="noise", n=n)).latent for n in (2, None))
    torch.testing.assert_close(few, all_[:2], atol=1e-5, rtol=1e-5)


def test_no_two_images_have_the_same_noise_and_the_noise_is_standard_normal():
    rows = range(3000)
    states = {latents._generator(0, row).initial_seed() % 2**32 for row in rows}
    assert len(states) == 3000
    draws = torch.stack([torch.randn(40, generator=latents._generator(0, row)) for row in rows])
    # the largest of 780 correlations of 3,000 independent pairs stays under 0.09
    assert (torch.corrcoef(draws.T) - torch.eye(40)).abs().max() < 0.09
    assert (torch.corrcoef(draws[:40]) - torch.eye(40)).abs().max() < 0.75
    assert draws.mean().abs() < 0.015
    assert draws.std() == pytest.approx(1, abs=0.015)


def test_shards_are_streamed_one_after_the_other(spec):
    whole = latents.get(spec, shard=4)
    parts = list(latents.shards(spec))
    assert [(p.first_row, len(p.latent)) for p in parts] == [(0, 4), (4, 2)]
    assert torch.equal(torch.cat([p.latent for p in parts]), whole.latent)
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)


def test_the_stream_makes_a_shard_only_when_it_is_asked_for(spec):
    stream = latents.shards(spec, shard=2)
    assert not shards_of(spec)
    next(stream)
    assert len(shards_of(spec)) == 1


def test_images_are_read_shard_by_shard(spec, monkeypatch):
    asked, read = [], ImageRows.read

    def watched(self, first=0, stop=None):
        asked.append((first, stop))
        return read(self, first, stop)

    monkeypatch.setattr(ImageRows, "read", watched)
    for _ in latents.shards(spec, shard=2):
        pass
    assert set(asked) == {(0, 2), (2, 4), (4, 6)}


def test_no_shard_is_held_while_the_next_one_is_made(spec, monkeypatch):
    """So memory does not grow with the number of images, whether shards are made or read."""
    held, read = [], ImageRows.read

    def watched(self, first=0, stop=None):
        assert not any(tensor() is not None for tensor in held)
        return read(self, first, stop)

    monkeypatch.setattr(ImageRows, "read", watched)
    for _ in range(2):
        for part in latents.shards(spec, shard=2):
            held += map(weakref.ref, (part.latent, part.images, part.error_estimate))
            del part
    assert len(held) == 2 * 3 * 3


# going on


def test_a_second_call_reads_what_the_first_wrote(spec, counted):
    first, again = counted(), counted()
    made = latents.get(spec, model=first.model, shard=4)
    read = latents.get(spec, model=again.model, shard=4)
    assert len(first.batches) > 0 == len(again.batches)
    assert torch.equal(made.latent, read.latent)
    assert torch.equal(made.error_estimate, read.error_estimate)
    assert np.array_equal(made.timesteps, read.timesteps)
    assert (made.nfe, made.spec, made.solver) == (read.nfe, read.spec, read.solver)


def test_the_model_may_be_passed_in(spec):
    latents.get(spec)
    before = the_shard(spec).stat().st_mtime_ns
    latents.get(spec, model=load_model("tiny"))
    assert the_shard(spec).stat().st_mtime_ns == before


def test_a_killed_run_goes_on_after_its_last_whole_shard(spec, counted):
    """Four calls a shard: a kill in the third shard costs that shard and nothing else."""
    whole = counted()
    expected = latents.get(spec, model=whole.model, shard=2)
    calls = sum(whole.batches)
    shutil.rmtree(path_of(spec))
    killed, again = counted(die_at=10), counted()
    with pytest.raises(KeyboardInterrupt):
        latents.get(spec, model=killed.model, shard=2)
    assert len(shards_of(spec)) == 2
    made = latents.get(spec, model=again.model, shard=2)
    assert sum(again.batches) == calls // 3
    assert torch.equal(made.latent, expected.latent)


def test_a_run_may_go_on_with_shards_of_another_size(spec, counted):
    killed, again = counted(die_at=6), counted()
    with pytest.raises(KeyboardInterrupt):
        latents.get(spec, model=killed.model, shard=3)
    latents.get(spec, model=again.model, shard=2)
    assert [p.name for p in shards_of(spec)] == [
        "000000-000002.safetensors",
        "000003-000004.safetensors",
        "000005-000005.safetensors",
    ]
    assert sum(again.batches) == 3 * 4


def test_a_lost_shard_is_made_between_those_that_are_there(spec, counted):
    expected = latents.get(spec, shard=2)
    shards_of(spec)[1].unlink()
    again = counted()
    made = latents.get(spec, model=again.model)
    assert sum(again.batches) == 2 * 4
    assert torch.equal(made.latent, expected.latent)


def test_pictures_that_are_added_are_the_only_ones_inverted(spec, counted, picture_folder):
    latents.get(spec)
    Image.fromarray(np.full((12, 12), 7, np.uint8)).save(picture_folder / "9.png")
    again = counted()
    assert len(latents.get(spec, model=again.model).latent) == 7
    assert sum(again.batches) == 4


def test_pictures_that_were_taken_away_are_noticed(spec, picture_folder):
    latents.get(spec)
    (picture_folder / "5.png").unlink()
    with pytest.raises(ValueError, match=r"more images than the 5.*remove it"):
        latents.get(spec)


def test_a_bar_counts_what_is_there_at_once(spec, capfd):
    list(latents.shards(spec, shard=4))
    shards_of(spec)[1].unlink()
    list(latents.shards(spec, progress=True))
    shown = [x for x in re.split(r"[\r\n]", capfd.readouterr().err) if "/6" in x]
    assert "4/6" in shown[0]
    assert "6/6" in shown[-1]
    assert "images/s" in shown[-1]


KILLED = """
import sys, time
from dataclasses import replace
from ood_lib import latents
from ood_lib.models import load_model

model = load_model("tiny")
def slowly(x_t, t):
    time.sleep(0.02)
    return model.predict(x_t, t)
spec = latents.LatentSpec("tiny", sys.argv[1], points=5, t_end=700.0)
latents.get(spec, model=replace(model, predict=slowly), shard=1)
"""


def test_a_kill_by_the_system_leaves_whole_shards_that_a_next_run_keeps(spec, counted):
    run = subprocess.Popen([sys.executable, "-c", KILLED, spec.domain])
    while run.poll() is None and len(shards_of(spec)) < 2:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    there = {p.name: p.read_bytes() for p in shards_of(spec)}
    assert 2 <= len(there) <= 6
    (path_of(spec) / ".tmpleft").write_bytes(b"half")
    (path_of(spec) / "000005-000005.safetensors.part").write_bytes(b"half")
    again = counted()
    made = latents.get(spec, model=again.model, shard=1)
    assert sum(again.batches) == (6 - len(there)) * 4
    assert len(made.latent) == 6
    assert all((path_of(spec) / name).read_bytes() == content for name, content in there.items())
    assert len(there) == 6 or leftovers(path_of(spec)) == [".lock"]


# two at once


def test_two_runs_at_once_make_every_shard_once(spec, counted):
    both = counted()

    def run(_):
        return latents.get(spec, model=both.model, shard=1).latent

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert torch.equal(first, second)
    assert sum(both.batches) == 6 * 4


def test_a_run_waits_while_another_holds_the_folder_and_says_so(spec, tiny, capfd):
    path_of(spec).mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(path_of(spec) / ".lock"):
            run = pool.submit(latents.get, spec, model=tiny, progress=True)
            time.sleep(0.5)
            assert not run.done()
        assert len(run.result().latent) == 6
    assert "waiting for another run" in capfd.readouterr().err


def test_whole_latents_are_read_where_nothing_can_be_written(spec, monkeypatch):
    latents.get(spec)

    def refuse(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(latents, "FileLock", refuse)
    assert len(latents.get(spec).latent) == 6


# damage


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=["full", "full, as safetensors says it", "kill"],
)
def test_a_write_that_fails_keeps_the_shards_before_and_nothing_half(spec, monkeypatch, error):
    def die_half_way(tensors, path, metadata):
        if json.loads(metadata["rows"])[0] >= 4:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "save_file", die_half_way)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
        with pytest.raises(expected) as raised:
            latents.get(spec, shard=2)
    if expected is OSError:
        assert all(s in str(raised.value) for s in ("000004-000005", "No space left", "kept"))
    assert len(shards_of(spec)) == 2
    assert leftovers(path_of(spec)) == [".lock"]
    for path in shards_of(spec):
        latents.read(path)
    assert len(latents.get(spec, shard=2).latent) == 6


def test_a_file_system_that_takes_no_more_is_named(spec):
    """The system itself refuses, not a stand-in: files are limited to fewer bytes than a shard has."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    taken = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"000000-000005.*could not be written"):
            latents.get(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, taken)
    assert leftovers(path_of(spec)) == [".lock"]
    assert not shards_of(spec)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=str)
def test_a_cut_shard_is_named_and_made_again(spec, counted, keep):
    expected = latents.get(spec, shard=2)
    path = shards_of(spec)[1]
    (whole, said), content = latents.read(path), path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DamagedShard, match=path.name):
        latents.read(path)
    again = counted()
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is damaged.*made again"):
        made = latents.get(spec, model=again.model, shard=2)
    assert sum(again.batches) == 2 * 4
    assert torch.equal(made.latent, expected.latent)
    assert latents.read(path)[1] == said
    assert torch.equal(latents.read(path)[0]["latent"], whole["latent"])


def test_a_flipped_bit_anywhere_is_found(spec, tiny):
    """Also in the metadata: the grid and the calls are part of what a latent is."""
    model = zero_model(tiny)
    expected = latents.get(spec, model=model).latent.clone()
    path = the_shard(spec)
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 80).astype(int):
        content = bytearray(whole)
        content[place] ^= 1
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            latents.read(path)
        # a bit of the word "checksum" makes a file of somebody else, every other one a damaged shard
        with warnings.catch_warnings(), suppress(ValueError):
            warnings.simplefilter("ignore", RuntimeWarning)
            assert torch.equal(latents.get(spec, model=model).latent, expected)
            assert path.read_bytes() != bytes(content)


@pytest.mark.parametrize(("key", "value"), [("timesteps", "[0.0, 1.0, 2.0]"), ("nfe", "7")])
def test_a_false_grid_or_count_is_found(spec, key, value):
    expected = latents.get(spec)
    path = the_shard(spec)
    save_file(load_file(path), path, metadata={**metadata_of(path), key: value})
    with pytest.warns(RuntimeWarning, match=path.name):
        made = latents.get(spec)
    assert (made.nfe, made.timesteps.tolist()) == (expected.nfe, expected.timesteps.tolist())


@pytest.mark.parametrize("key", ["timesteps", "nfe", "model_sha256", "spec"])
def test_a_shard_without_some_of_its_metadata_is_made_again(spec, key):
    latents.get(spec)
    path = the_shard(spec)
    rest = {k: v for k, v in metadata_of(path).items() if k != key}
    save_file(load_file(path), path, metadata=rest)
    with pytest.warns(RuntimeWarning, match=path.name):
        latents.get(spec)
    assert key in metadata_of(path)


# what is not ours to overwrite


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["no metadata", "others"])
def test_a_file_of_somebody_else_is_named_and_stays(spec, metadata):
    latents.get(spec)
    path = the_shard(spec)
    save_file(load_file(path), path, metadata=metadata)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path.name} is no shard of latents.*elsewhere"):
        latents.get(spec)
    assert path.read_bytes() == before


def test_a_shard_of_other_weights_is_refused_and_stays(spec, tiny):
    latents.get(spec, shard=2)
    before = [p.read_bytes() for p in shards_of(spec)]
    with pytest.raises(ValueError, match=r"000000-000001.*another model .*, not .*remove it"):
        latents.get(spec, model=random_model(tiny, seed=9))
    assert [p.read_bytes() for p in shards_of(spec)] == before


def test_a_shard_of_another_model_without_weights_is_refused(spec, tiny):
    """The zero model and a model in closed form have no network, but they are not the same model."""
    latents.get(spec, model=zero_model(tiny))
    other = FrozenModel(
        "one", "analytic", tiny.schedule, tiny.sample_shape, lambda x, t: torch.ones_like(x)
    )
    with pytest.raises(ValueError, match="another model"):
        latents.get(spec, model=other)


def test_a_shard_of_other_images_is_refused_by_its_name(spec, picture_folder):
    latents.get(spec, shard=2)
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(picture_folder / "3.png")
    with pytest.raises(ValueError, match=r"000002-000003.*another images"):
        latents.get(spec)


@pytest.mark.parametrize("change", [{"points": 4}, {"start": "noise"}, {"solver": "heun"}], ids=str)
def test_a_shard_of_another_setting_is_refused(spec, change):
    latents.get(spec)
    other = replace(spec, **change)
    shutil.copytree(path_of(spec), path_of(other))
    with pytest.raises(ValueError, match="another spec"):
        latents.get(other)


def test_a_preset_that_means_something_else_now_is_refused(spec, monkeypatch):
    spec = replace(spec, points=None)
    latents.get(spec)
    monkeypatch.setitem(PRESETS, "converged", replace(PRESETS["converged"], points=30))
    with pytest.raises(ValueError, match="another timesteps"):
        latents.get(spec)
    monkeypatch.setitem(PRESETS, "converged", replace(PRESETS["converged"], solver="ddim"))
    with pytest.raises(ValueError, match=r"another solver .ab2, not ddim"):
        latents.get(spec)


def test_a_model_is_the_same_in_every_precision_but_bf16_is_not_taken_for_fp32(spec):
    exact = latents.get(spec).latent.clone()
    assert torch.equal(latents.get(spec, precision="bf16").latent, exact)
    shutil.rmtree(path_of(spec))
    rough = latents.get(spec, precision="bf16", backend="torch")
    assert metadata_of(the_shard(spec))["network_dtype"] == "torch.bfloat16"
    assert torch.equal(latents.get(spec, precision="bf16").latent, rough.latent)
    with pytest.raises(ValueError, match=r"000000-000005.*made in bf16.*remove it"):
        latents.get(spec)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "nope"}, "known are tiny"),
        ({"domain": "nope"}, "known are faces"),
        ({"solver": "euler"}, "ddim, heun, ab2"),
        ({"preset": "fast"}, "converged, exact, paper"),
        ({"start": "zero"}, "level0, sigma0, noise"),
        ({"points": 1}, "n >= 2"),
        ({"t_end": 1000.0}, "999"),
        ({"n": 7}, "7 images"),
        ({"n": 0}, "0 images"),
    ],
    ids=str,
)
def test_a_wrong_specification_is_named_and_leaves_nothing(project, spec, change, text):
    with pytest.raises(ValueError, match=text):
        latents.shards(replace(spec, **change))
    assert not (project / "runs").exists()


@pytest.mark.parametrize(("option", "text"), [("shard", "shard of 0"), ("batch_size", "is 0")])
def test_an_option_out_of_range_is_named_and_leaves_nothing(project, spec, option, text):
    with pytest.raises(ValueError, match=text):
        latents.get(spec, **{option: 0})
    assert not (project / "runs").exists()
