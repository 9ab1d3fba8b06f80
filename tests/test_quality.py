"""Quality records: complete, belonging to the weights on disk, and measured as they say."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ood_lib import quality
from ood_lib.metrics import kid, prdc
from ood_lib.models import load_model, model_names
from ood_lib.quality import draw_samples, kid_ratio, measure_quality, quality_of

LINES = {"model", "early", "gaussian", "train"}


@pytest.mark.parametrize("name", model_names())
def test_the_record_of_a_zoo_model_belongs_to_what_is_on_disk(root, name):
    record = quality_of(name)
    folder = root / "data/zoo" / name
    assert set(record["lines"]) == LINES
    current = quality._settings(folder, record["n"], record["seed"])
    assert {key: record[key] for key in current} == current
    assert record["n"] >= 372
    assert f"`ood quality {name}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", model_names())
def test_real_images_are_nearer_to_held_out_ones_than_a_gaussian(name):
    record = quality_of(name)
    line = {k: v[record["space"]] for k, v in record["lines"].items()}
    assert line["train"]["kid"][2] < line["gaussian"]["kid"][1]
    assert line["train"]["coverage"] > line["gaussian"]["coverage"]


def pixels(images):
    return images.flatten(1).double().numpy()


@pytest.fixture
def measured(project, tiny, monkeypatch):
    """A model of 8x8 pixels, judged by its pixels alone."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    judge = SimpleNamespace(features=pixels, is_domain=lambda x, d: np.arange(len(x)) % 2 == 0)
    monkeypatch.setattr(quality, "imagenet", pixels)
    monkeypatch.setattr(quality, "load_classifier", lambda: judge)
    monkeypatch.setattr(quality, "train_images", lambda name, source: stored)
    monkeypatch.setattr(quality, "GAUSSIAN_FIT", 50)
    zoo = project / "data/zoo/own"
    zoo.mkdir()
    for part in ("unet", "scheduler", "model_index.json"):
        (zoo / part).symlink_to(project / "data/zoo/tiny" / part)
    run = {"domain": "faces", "data_sha256": hashlib.sha256(stored.tobytes()).hexdigest()}
    (zoo / "training.json").write_text(json.dumps(run))
    (project / "data/classifier").mkdir()
    (project / "data/classifier/classifier.safetensors").write_bytes(b"judge")
    early = project / "early.safetensors"
    state = load_model("own").network.state_dict()
    save_file({k: v.contiguous() * 0.5 for k, v in state.items()}, early)
    return SimpleNamespace(early=early, path=zoo / "quality.json", stored=stored)


def test_a_record_says_what_was_measured(measured):
    assert measure_quality("own", n=40, early=measured.early) == measured.path
    record = quality_of("own")
    assert set(record["lines"]) == LINES
    assert record["space"] == "domains"
    model = load_model("own")
    held_out = pixels(quality.load_images("faces", n=40, split="heldout", like=model))
    drawn = pixels(draw_samples(model, 40, points=40))
    line = record["lines"]["model"]["domains"]
    assert line["kid"][0] == pytest.approx(kid(drawn, held_out), rel=1e-3)
    assert line["recall"] == pytest.approx(prdc(drawn, held_out).recall, abs=1e-4)
    assert record["lines"]["model"]["share"] == record["held_out_share"] == 0.5
    assert record["lines"]["early"] != record["lines"]["model"]


def test_measuring_twice_gives_the_same_record(measured):
    first = measure_quality("own", n=20, early=measured.early).read_text()
    assert measure_quality("own", n=20, early=measured.early).read_text() == first


def test_the_early_line_is_kept_where_its_weights_are_gone(measured):
    first = measure_quality("own", n=20, early=measured.early).read_text()
    measured.early.unlink()
    assert json.loads(measure_quality("own", n=20).read_text()) == json.loads(first)
    with pytest.raises(ValueError, match="train the model again"):
        measure_quality("own", n=21)


def test_more_images_than_are_held_out_are_refused(measured):
    with pytest.raises(ValueError, match="50"):
        measure_quality("own", n=51, early=measured.early)


def test_a_model_without_a_record_is_named(project):
    with pytest.raises(
        ValueError, match=r"quality\.json is not there; make it with: ood quality tiny"
    ):
        quality_of("tiny")


def test_samples_are_what_an_8_bit_file_holds(tiny):
    drawn = draw_samples(tiny, 3, seed=4, points=3)
    levels = (drawn + 1) * 127.5
    assert -1 <= drawn.min() <= drawn.max() <= 1
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert torch.equal(drawn, draw_samples(tiny, 3, seed=4, points=3))
    assert not torch.equal(drawn, draw_samples(tiny, 3, seed=5, points=3))


def record_of(model, other):
    return {"space": "s", "lines": {"model": {"s": {"kid": model}}, "early": {"s": {"kid": other}}}}


def test_a_ratio_of_kids_covers_both_intervals():
    ratio = kid_ratio(record_of([0.2, 0.1, 0.3], [1.0, 0.5, 2.0]), "early")
    assert ratio == pytest.approx((0.2, 0.05, 0.6))
    assert kid_ratio(record_of([-0.2, -0.3, 0.1], [1.0, 0.5, 2.0]), "early")[:2] == (0, 0)
    open_end = kid_ratio(record_of([0.2, 0.1, 0.3], [1.0, -0.5, 2.0]), "early")
    assert open_end.low == pytest.approx(0.05)
    assert 1e4 < open_end.high < np.inf


def test_other_training_images_than_those_of_the_model_are_refused(measured, monkeypatch):
    other = measured.stored[::-1]
    monkeypatch.setattr(quality, "train_images", lambda name, source: other)
    with pytest.raises(ValueError, match="are not those of 'own'"):
        measure_quality("own", n=20, early=measured.early)


def test_a_model_is_summed_up_in_a_line(measured, project):
    assert quality.summary_of("own") == "not measured: ood quality own"
    measure_quality("own", n=20, early=measured.early)
    assert "called faces 0.50" in quality.summary_of("own")
