"""The command `ood`: a wrong word is one sentence and exit status 2, and nothing is left behind."""

import errno
import json
import shutil
import sys
from inspect import signature

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ood_lib import cli, latents, sources
from ood_lib.latents import get


@pytest.fixture
def ood(monkeypatch, capsys):
    """Run the command; returns exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ood", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# what works


def test_models_and_domains_are_listed(project, ood):
    status, out, _ = ood("models")
    assert status == 0
    assert out.startswith("tiny  ddpm  1x8x8  ")
    assert ood("domains", "list")[:2] == (0, "faces\n")


def test_a_folder_of_pictures_is_inverted_and_kept(project, picture_folder, ood):
    words = ("invert", "tiny", picture_folder, "--points", 3, "--t-end", 900)
    status, out, _ = ood(*words)
    assert status == 0
    assert "6 latents, 2 network calls an image" in out
    assert out.count("\n") == 1
    (made,) = (project / "runs" / "latents" / "tiny").iterdir()
    assert out.strip().endswith(str(made))
    (shard,) = made.glob("*.safetensors")
    assert load_file(shard)["latent"].shape == (6, 1, 8, 8)
    before = shard.stat().st_mtime_ns
    assert ood(*words)[:2] == (0, out)
    assert shard.stat().st_mtime_ns == before


def test_every_option_of_invert_arrives(project, ood, monkeypatch):
    asked = []

    def shards(spec, **options):
        asked.append((spec, options))
        return iter(())

    monkeypatch.setattr(latents, "shards", shards)
    words = (
        "invert tiny faces --split heldout --n 3 --preset paper --points 4 --solver heun --t-end 900 "
        "--start noise --seed 7 --levels --revision main --backend torch --precision bf16 "
        "--device meta --batch-size 5 --shard 6"
    )
    status, out, _ = ood(*words.split())
    ((spec, options),) = asked
    assert (status, "0 latents" in out, "error estimate unknown" in out) == (0, True, True)
    assert spec == latents.LatentSpec(
        "tiny",
        "faces",
        split="heldout",
        n=3,
        preset="paper",
        points=4,
        solver="heun",
        t_end=900,
        start="noise",
        seed=7,
        levels=True,
        revision="main",
    )
    assert options == {
        "backend": "torch",
        "precision": "bf16",
        "device": "meta",
        "batch_size": 5,
        "shard": 6,
        "progress": True,
    }


def test_the_options_left_out_are_those_of_the_library(project, ood, monkeypatch):
    asked = []
    monkeypatch.setattr(
        latents, "shards", lambda spec, **options: asked.append((spec, options)) or ()
    )
    ood("invert", "tiny", "faces")
    ((spec, options),) = asked
    defaults = signature(get).parameters
    assert spec == latents.LatentSpec("tiny", "faces")
    assert {k: v for k, v in options.items() if k != "progress"} == {
        k: defaults[k].default for k in ("backend", "precision", "device", "batch_size", "shard")
    }


def test_latents_are_made_in_shards_with_a_bar_and_one_closing_line(project, ood):
    words = (
        "invert tiny faces --split heldout --n 5 --points 5 --solver heun --start noise --shard 2"
    )
    status, out, err = ood(*words.split())
    assert (status, out.count("\n")) == (0, 1)
    assert "5 latents, 8 network calls an image, median error estimate " in out
    assert float(out.split("estimate ")[1].split(":")[0]) > 0
    assert "images/s" in err
    assert "5/5" in err
    (made,) = (project / "runs" / "latents" / "tiny").iterdir()
    assert len(list(made.glob("*.safetensors"))) == 3


def test_a_model_folder_may_be_named_instead_of_a_zoo_model(project, tiny_folder, ood):
    assert ood("invert", tiny_folder, "faces", "--n", 2, "--points", 2)[0] == 0


def test_a_model_is_trained_from_the_command_line(project, ood, tmp_path):
    source = tmp_path / "source"  # not there: what was read from it before is enough
    kept = sources._train_cache("fashion", source)
    kept.parent.mkdir(parents=True)
    np.save(kept, np.zeros((4, 8, 8, 1), np.uint8))
    out = tmp_path / "made"
    status, text, _ = ood(
        "train",
        "fashion",
        "--source",
        source,
        "--out",
        out,
        "--images-seen",
        2,
        "--batch-size",
        2,
        "--precision",
        "fp32",
    )
    assert status == 0
    assert str(out) in text
    assert {"model_index.json", "training.json", "README.md", "unet", "scheduler"} <= set(
        files(out)
    )


def test_an_unseen_folder_is_sampled_and_measured(project, ood, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for k, pixels in enumerate(rng.integers(0, 255, (150, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k:03d}.png")
    words = ("sample", "tiny", tmp_path / "pictures", "-n", 16, "--references", 20, "--out")
    status, out, _ = ood(*words, tmp_path / "out")
    assert status == 0
    assert out.startswith("16 images, KID ")
    assert len(list((tmp_path / "out").glob("0*.png"))) == 16
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [record[x] for x in ("n", "n_fit", "n_heldout", "share")] == [16, 20, 30, None]
    assert record["kid"]["low"] < record["kid"]["value"]


def test_too_few_pictures_to_judge_by_are_one_sentence(project, picture_folder, ood, tmp_path):
    words = ("sample", "tiny", picture_folder, "-n", 16, "--out", tmp_path / "out")
    status, _, err = ood(*words)
    assert status == 2
    assert err.strip().splitlines()[-1].startswith("ood: ")
    assert not (tmp_path / "out").exists()


def test_help_is_shown(ood):
    status, out, _ = ood("--help")
    assert status == 0
    assert all(word in out for word in ("train", "invert", "models", "domains", "chapter"))


# what does not


WRONG = {
    "model": ("invert nope faces", ["'nope'", "tiny"]),
    "domain": ("invert tiny nope", ["'nope'", "faces"]),
    "split": ("invert tiny faces --split train", ["'train'", "fit, heldout, all"]),
    "solver": ("invert tiny faces --solver euler", ["'euler'", "ddim, heun, ab2"]),
    "start": ("invert tiny faces --start zero", ["'zero'", "level0, sigma0, noise"]),
    "too many": ("invert tiny faces --n 51", ["51", "50"]),
    "none": ("invert tiny faces --n 0", ["0 images", "1 to 50"]),
    "points": ("invert tiny faces --points 1", ["1 points", "n >= 2"]),
    "level": ("invert tiny faces --t-end 1000", ["1000", "999"]),
    "preset": ("invert tiny faces --preset fast", ["'fast'", "converged, exact, paper"]),
    "backend": ("invert tiny faces --backend abacus", ["'abacus'", "torch, openvino"]),
    "number format": ("invert tiny faces --precision fp8", ["'fp8'", "fp32, bf16"]),
    "device of latents": ("invert tiny faces --device abacus", ["abacus"]),
    "shard": ("invert tiny faces --shard 0", ["shard of 0 images", "1 or more"]),
    "batch": ("invert tiny faces --batch-size 0", ["batch_size is 0"]),
    "level that is no number": ("invert tiny faces --t-end nan", ["nan", "999"]),
    "training domain": ("train faces --out OUT", ["'faces'", "fashion", "digits"]),
    "unknown training domain": ("train moon --out OUT", ["'moon'"]),
    "builder": ("domains build moon", ["'moon'", "digits, earth, emoji, faces, fashion"]),
    "source": ("domains build fashion --source nowhere", ["nowhere"]),
    "precision": ("train fashion --out OUT --precision fp8", ["fp8", "fp32", "bf16"]),
    "batch size": ("train fashion --out OUT --batch-size 0", ["batch_size", "0"]),
    "learning weight": ("train fashion --out OUT --noise-weight 2", ["noise_weight", "2"]),
    "width": ("train fashion --out OUT --channels 24 --groups 5", ["(24,)", "multiples", "5"]),
    "length": ("train fashion --out OUT --images-seen 0", ["images_seen", "0"]),
    "device": ("train fashion --out OUT --device abacus", ["abacus"]),
    "card": ("card nope", ["nope", "tiny"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_one_sentence_and_leaves_nothing_behind(project, ood, tmp_path, case):
    words, named = WRONG[case]
    before = files(tmp_path)
    status, out, err = ood(*words.replace("OUT", str(tmp_path / "out")).split())
    assert (status, out) == (2, "")
    assert err.startswith("ood: ")
    assert err.count("\n") == 1
    assert all(word in err for word in named)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("empty", "holds no images"),
        ("text", "notes.txt is not an image file"),
        ("corrupt", "cut.png is not a readable image"),
        ("small", "5x5 pixels"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(project, ood, tmp_path, damage, named):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if damage != "empty":
        Image.new("L", (12, 12)).save(folder / "good.png")
    if damage == "text":
        (folder / "notes.txt").write_text("hello")
    elif damage == "corrupt":
        (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:40])
    elif damage == "small":
        Image.new("L", (5, 5)).save(folder / "small.png")
    before = files(tmp_path)
    status, out, err = ood("invert", "tiny", folder)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ood: ")
    assert named in err
    assert files(tmp_path) == before


def test_a_damaged_model_is_one_sentence(project, ood, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    status, _, err = ood("invert", folder, "faces")
    assert (status, err.count("\n")) == (2, 1)
    assert "broken lacks" in err


def test_damaged_latents_are_named_and_made_again(project, ood):
    words = ("invert", "tiny", "faces", "--n", 2, "--points", 5)
    _, first, _ = ood(*words)
    (made,) = (project / "runs" / "latents" / "tiny").glob("*/*.safetensors")
    whole = load_file(made)["latent"].clone()  # what it maps is about to change
    made.write_bytes(b"half")
    status, out, err = ood(*words)
    assert (status, out) == (0, first)
    (said,) = (line for line in err.replace("\r", "\n").splitlines() if line.startswith("ood: "))
    assert made.name in said
    assert "made again" in said
    assert torch.equal(load_file(made)["latent"], whole)


def last_line(err):
    return err.replace("\r", "\n").strip().splitlines()[-1]


def test_latents_of_another_model_are_one_sentence_and_stay(project, factory, ood, tmp_path):
    folder = factory.pipeline(tmp_path / "mine", factory.unet(seed=1))
    words = ("invert", folder, "faces", "--n", 2, "--points", 5)
    ood(*words)
    (made,) = (project / "runs" / "latents").rglob("*.safetensors")
    before = made.read_bytes()
    factory.pipeline(folder, factory.unet(seed=2))
    status, out, err = ood(*words)
    assert (status, out) == (2, "")
    assert last_line(err).startswith("ood: ")
    assert all(word in last_line(err) for word in (made.name, "another model", "remove it"))
    assert made.read_bytes() == before


def test_a_full_disk_is_one_sentence_and_costs_one_shard(project, ood, monkeypatch):
    def full(tensors, path, metadata):
        if "000002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(latents, "save_file", full)
    status, out, err = ood("invert", "tiny", "faces", "--n", 4, "--points", 5, "--shard", 2)
    assert (status, out) == (2, "")
    assert last_line(err).startswith("ood: ")
    assert all(word in last_line(err) for word in ("000002-000003", "No space left", "run again"))
    (made,) = (project / "runs" / "latents" / "tiny").iterdir()
    assert [p.name for p in made.iterdir() if p.name != ".lock"] == ["000000-000001.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        "invert tiny",
        "invert tiny faces --points many",
        "invert tiny faces --stepz 3",
        "fly",
        "train fashion",
    ],
)
def test_a_wrong_call_is_explained_and_ends_with_status_two(project, ood, words):
    status, _, err = ood(*words.split())
    assert status == 2
    assert "Traceback" not in err
    assert "Usage" in err


CHAPTER = "01_an_invertible_map"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (f"chapter run {CHAPTER} -p n_image=3", ["'n_image'", "'n_images'"]),
        (f"chapter run {CHAPTER} -p zzz=3", ["'zzz'", "n_images"]),
        (f"chapter run {CHAPTER} -p n_images=many", ["'n_images'", "'many'", "int"]),
        (f"chapter run {CHAPTER} -p n_images=2.5", ["'n_images'", "2.5", "int"]),
        (f"chapter run {CHAPTER} -p n_images", ["'n_images'", "name=value"]),
        (f"chapter run {CHAPTER} --scale huge", ["'huge'", "book"]),
        ("chapter run 99_nothing", ["99_nothing"]),
    ],
)
def test_a_wrong_chapter_or_parameter_is_one_sentence(project, root, ood, tmp_path, words, named):
    (project / "notebooks").mkdir()
    shutil.copy(root / "notebooks" / f"{CHAPTER}.ipynb", project / "notebooks")
    before = files(tmp_path)
    status, out, err = ood(*words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in named)
    assert files(tmp_path) == before
