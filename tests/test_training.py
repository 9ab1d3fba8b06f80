"""Training: the same weights after a stop, a full record, a folder that diffusers reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from ood_lib import training
from ood_lib.models import load_model, model_names, zero_model
from ood_lib.training import (
    DEFECTS,
    Recipe,
    fast_precision,
    fine_tune,
    forgetting,
    learning_rate,
    train,
    training_batch,
    write_card,
)

TINY = Recipe(
    images_seen=40,
    batch_size=4,
    channels=(8, 8),
    groups=4,
    head_dim=8,
    warmup=3,
    noise_weight=0.0,
)
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def no_card():
    """Samples of the card take longer than these runs; one test below writes one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_card", lambda folder: folder / "README.md")
        yield


def run(folder, recipe=TINY, pixels=PIXELS, **options):
    """Train into a folder, with the checkpoint beside it."""
    return train(pixels, recipe, folder / "model", work=folder / "work", name="toy", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten steps without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def weights(folder):
    return load_file(folder / "model" / WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# resuming


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, whole, stop):
    checkpoint = run(tmp_path, stop_after=stop)
    assert checkpoint == tmp_path / "work" / "checkpoint.pt"
    assert not (tmp_path / "model").exists()
    assert run(tmp_path) == tmp_path / "model"
    assert same(weights(tmp_path), weights(whole))
    early = "work/ema_10_percent.safetensors"
    assert same(load_file(tmp_path / early), load_file(whole / early))
    losses = [
        json.loads((f / "model/training.json").read_text())["loss"] for f in (tmp_path, whole)
    ]
    assert losses[0] == losses[1]


def test_a_run_that_was_killed_between_checkpoints_ends_with_the_same_bits(
    tmp_path, whole, monkeypatch
):
    step = training.TrainingRun.advance

    def killed(self):
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingRun, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, checkpoint_every=3)
    torch.manual_seed(99)  # the state of the process does not matter
    run(tmp_path, checkpoint_every=3)
    assert same(weights(tmp_path), weights(whole))


def test_checkpoints_are_written_in_one_move(tmp_path, monkeypatch):
    run(tmp_path, stop_after=2)
    before = (tmp_path / "work/checkpoint.pt").read_bytes()

    def die_half_way(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training.torch, "save", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=4)
    assert (tmp_path / "work/checkpoint.pt").read_bytes() == before


def test_a_finished_run_is_not_trained_again(tmp_path, whole, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(training.TrainingRun, "advance", None)
    run(tmp_path)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"lr": 1e-3}, {"images_seen": 80}, {"precision": "bf16"}, {"noise_weight": 0.5}],
    ids=str,
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, change):
    run(tmp_path, stop_after=1)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(tmp_path, replace(TINY, **change))


def test_a_checkpoint_of_other_images_is_refused(tmp_path):
    run(tmp_path, stop_after=1)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(tmp_path, pixels=255 - PIXELS)


@pytest.mark.parametrize("damage", ["cut", "lacks a part"])
def test_a_cut_checkpoint_is_named(tmp_path, damage):
    checkpoint = run(tmp_path, stop_after=1)
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    else:
        state = torch.load(checkpoint, weights_only=True)
        del state["data_sha256"]
        torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        run(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the GPU that is not there")
def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="cuda"):
        run(tmp_path, device="cuda")


def test_no_images_are_named(tmp_path):
    with pytest.raises(ValueError, match="image"):
        run(tmp_path, pixels=PIXELS[:0])


def test_seeds_differ_and_the_same_seed_does_not(tmp_path, whole):
    run(tmp_path / "same")
    run(tmp_path / "other", replace(TINY, seed=1))
    assert same(weights(tmp_path / "same"), weights(whole))
    assert not same(weights(tmp_path / "other"), weights(whole))


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    run(tmp_path, stop_after=1)
    assert torch.equal(before, torch.get_rng_state())


# what is saved


def test_the_record_is_complete(whole):
    record = json.loads((whole / "model/training.json").read_text())
    assert (record["domain"], record["training_images"], record["images_seen"]) == ("toy", 10, 40)
    assert record["recipe"] == {**TINY.__dict__, "channels": [8, 8]}
    assert len(record["data_sha256"]) == 64
    assert record["parameters"] == sum(w.numel() for w in weights(whole).values())
    assert record["torch"] == torch.__version__.split("+")[0]
    assert record["wall_seconds"] >= 0
    assert record["loss_step"] == list(range(1, 11))
    assert len(record["loss"]) == 10
    assert all(0 < loss < 5 for loss in record["loss"])


def test_diffusers_and_the_library_load_the_result(whole):
    pipeline = DDPMPipeline.from_pretrained(whole / "model")
    assert pipeline.scheduler.config.beta_schedule == "linear"
    assert (pipeline.scheduler.config.beta_start, pipeline.scheduler.config.beta_end) == (
        1e-4,
        2e-2,
    )
    model = load_model(str(whole / "model"))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        theirs = pipeline.unet(x, 5).sample
    torch.testing.assert_close(model.eps(x, 5), theirs, atol=1e-5, rtol=1e-4)


def test_what_is_saved_is_the_moving_average(whole):
    raw = torch.load(whole / "work/checkpoint.pt", weights_only=True)
    assert not same(raw["net"], weights(whole))
    shadow = raw["ema"]["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(weights_in_order(whole), shadow, strict=True))


def test_a_moving_average_without_memory_is_the_network_itself(tmp_path):
    run(tmp_path, replace(TINY, ema_decay=0.0))
    raw = torch.load(tmp_path / "work/checkpoint.pt", weights_only=True)
    assert same(raw["net"], weights(tmp_path))


def weights_in_order(folder):
    network = load_model(str(folder / "model")).network
    return [p.contiguous() for p in network.parameters()]


@pytest.mark.parametrize("name", model_names())
def test_a_zoo_model_saw_at_least_what_was_asked_for(root, name):
    record = json.loads((root / f"data/zoo/{name}/training.json").read_text())
    assert record["domain"] == name.split("-")[1]
    assert record["recipe"].get("family", "ddpm") == load_model(name).family == name.split("-")[0]
    assert record["images_seen"] >= 400_000
    assert (root / f"data/zoo/{name}" / WEIGHTS).stat().st_size < 8 * 2**20
    assert np.mean(record["loss"][-10:]) < 0.5 * np.mean(record["loss"][:2])


def test_a_card_is_written_from_the_record(whole):
    card = write_card(whole / "model")
    text = card.read_text()
    assert card == whole / "model" / "README.md"
    assert "toy" in text
    assert "40" in text
    assert "{" not in text
    for name in ("samples.png", "loss.png"):
        assert f"({name})" in text
        assert (card.parent / name).stat().st_size > 500


def test_a_card_needs_a_record(tmp_path):
    with pytest.raises(ValueError, match=r"no training\.json"):
        write_card(tmp_path)


# the loss


def test_the_loss_falls_on_a_trivial_data_set(tmp_path):
    """Every image is black: x_t says what the noise is, up to one constant."""
    recipe = replace(TINY, images_seen=1200, batch_size=8, lr=5e-3)
    run(tmp_path, recipe, pixels=np.zeros((8, 8, 8, 1), np.uint8))
    loss = json.loads((tmp_path / "model/training.json").read_text())["loss"]
    assert np.mean(loss[:5]) > 0.6
    assert np.mean(loss[-20:]) < 0.4 * np.mean(loss[:5])


@pytest.mark.parametrize("stop", [1, 6])
def test_a_stopped_run_with_learned_variances_ends_with_the_same_bits(tmp_path, stop):
    learned = replace(TINY, family="iddpm", images_seen=32)
    run(tmp_path / "whole", learned)
    run(tmp_path / "parts", learned, stop_after=stop)
    run(tmp_path / "parts", learned)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_learned_variances_double_the_output_and_bring_the_cosine_schedule(tmp_path):
    run(tmp_path, replace(TINY, family="iddpm", images_seen=8))
    model = load_model(str(tmp_path / "model"))
    assert (model.family, model.sample_shape) == ("iddpm", (1, 8, 8))
    assert model.network.config.out_channels == 2
    assert model.schedule.alpha_bar[500] == pytest.approx(
        np.cos((501 / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        / np.cos(0.008 / 1.008 * np.pi / 2) ** 2,
        rel=1e-4,
    )
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "model").scheduler
    assert scheduler.config.variance_type == "learned_range"


def test_bf16_autocast_trains(tmp_path):
    run(tmp_path, replace(TINY, precision="bf16"))
    record = json.loads((tmp_path / "model/training.json").read_text())
    assert np.isfinite(record["loss"]).all()
    assert weights(tmp_path)["conv_in.weight"].dtype == torch.float32


def test_colour_images_make_a_colour_model(tmp_path):
    run(tmp_path, replace(TINY, images_seen=4), pixels=PIXELS.repeat(3, axis=3))
    assert load_model(str(tmp_path / "model")).sample_shape == (3, 8, 8)


# batches and learning rate


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = training_batch(PIXELS, TINY, 3, 1000)
    torch.manual_seed(5)
    training_batch(PIXELS, TINY, 4, 1000)
    assert all(
        torch.equal(a, b) for a, b in zip(first, training_batch(PIXELS, TINY, 3, 1000), strict=True)
    )
    for other in (
        training_batch(PIXELS, TINY, 2, 1000),
        training_batch(PIXELS, replace(TINY, seed=1), 3, 1000),
    ):
        assert not torch.equal(first[2], other[2])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_every_epoch_shows_every_image_once(batch_size):
    recipe = replace(TINY, batch_size=batch_size)
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    shown = torch.cat([training_batch(pixels, recipe, k, 1000)[0] for k in range(30)])
    rows = ((shown[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    epochs = [rows[i : i + 10] for i in range(0, len(rows) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_timesteps_cover_the_schedule_evenly_and_noise_is_standard():
    recipe = replace(TINY, batch_size=64)
    batches = [training_batch(PIXELS, recipe, k, 1000) for k in range(200)]
    t = torch.cat([b[1] for b in batches])
    assert (t.min(), t.max()) == (0, 999)
    assert torch.histc(t.float(), 10, 0, 1000).sub(1280).abs().max() < 5 * 1280**0.5
    noise = torch.cat([b[2] for b in batches])
    assert noise.mean() == pytest.approx(0, abs=0.005)
    assert noise.std() == pytest.approx(1, abs=0.005)


def test_the_learning_rate_warms_up_and_falls_to_zero_like_half_a_cosine():
    recipe = Recipe(images_seen=64 * 1000, batch_size=64, warmup=100, lr=2.0)
    assert [learning_rate(recipe, k) for k in (0, 1)] == pytest.approx([0.02, 0.04], rel=1e-4)
    assert learning_rate(recipe, 500) == pytest.approx(1.0)
    assert learning_rate(recipe, 750) == pytest.approx(1 - np.cos(np.pi / 4))
    assert learning_rate(recipe, 999) < 1e-4
    rates = [learning_rate(recipe, k) for k in range(1000)]
    assert np.argmax(rates) in (99, 100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"images_seen": 0},
        {"images_seen": -5},
        {"precision": "fp8"},
        {"family": "edm"},
    ],
    ids=str,
)
def test_a_wrong_recipe_is_named(tmp_path, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name}.*{value}|{value}.*{name}"):
        run(tmp_path, replace(TINY, **wrong))
    assert not list(tmp_path.rglob("*.pt"))


def test_fast_precision_is_one_that_a_recipe_takes():
    assert fast_precision() in ("bf16", "fp32")


@pytest.mark.parametrize("family", ["ddpm", "iddpm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_learns(family, precision):
    """A compiled network once trained without a gradient for most weights, and its loss fell."""
    run = training.TrainingRun(PIXELS, replace(TINY, family=family, precision=precision), "cpu")
    before = {name: weight.detach().clone() for name, weight in run.net.named_parameters()}
    for _ in range(2):  # output layers start at zero and pass nothing on in the first step
        run.advance()
    still = [k for k, weight in run.net.named_parameters() if torch.equal(weight, before[k])]
    assert not still


# fine-tuning

REFERENCES = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)).float() / 127.5 - 1
WAYS = ("all", "last", "lora")
ways = pytest.mark.parametrize("parameters", WAYS)


def tuned(model, seed=0, images=REFERENCES, **options):
    options = {"steps": 3, "batch_size": 4} | options
    return fine_tune(model, images, rng=np.random.default_rng(seed), **options)


def moved(model, made):
    """Names of the weights that differ."""
    after = made.model.network.state_dict()
    before = model.network.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@ways
def test_without_an_optimiser_step_no_weight_changes(tiny, parameters):
    """The released code until 2024-07-20; a low-rank update of zero is no update either."""
    made = tuned(tiny, parameters=parameters, defects=["no_step"])
    assert not moved(tiny, made)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.model.eps(x, 400), tiny.eps(x, 400), atol=1e-6, rtol=1e-5)
    assert (made.losses > 0).all()


def test_the_original_stays_as_it_is(tiny):
    before = {name: w.clone() for name, w in tiny.network.state_dict().items()}
    tuned(tiny, lr=0.1)
    assert same(before, tiny.network.state_dict())
    assert not any(w.requires_grad for w in tiny.network.parameters())


def test_what_is_trained_is_what_was_asked_for(tiny):
    layers = {
        f"{name}.weight"
        for name, layer in tiny.network.named_modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    }
    every, last, lora = (moved(tiny, tuned(tiny, parameters=way, lr=0.05)) for way in WAYS)
    assert last == {"conv_out.weight", "conv_out.bias"}
    assert lora == layers
    assert layers | last <= every


def test_an_update_of_low_rank_has_that_rank(tiny):
    made = tuned(tiny, parameters="lora", rank=2, lr=0.05)
    name = "up_blocks.0.resnets.0.conv1.weight"
    gap = made.model.network.state_dict()[name] - tiny.network.state_dict()[name]
    values = torch.linalg.svdvals(gap.flatten(1))
    assert values[1] > 1e-3 * values[0]
    assert values[2] < 1e-5 * values[0]
    shapes = [
        layer.weight.shape
        for layer in tiny.network.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert made.trained_parameters == sum(2 * (s[0] + s[1:].numel()) for s in shapes)


@ways
def test_the_loss_on_the_references_falls(tiny, parameters):
    made = tuned(tiny, steps=40, parameters=parameters, lr=1e-2, noise_weight=0.0)
    assert made.losses[-20:].mean() < 0.8 * made.losses[:5].mean()
    rng = np.random.default_rng(1)
    assert forgetting(tiny, made.model, REFERENCES, rng=rng).ratio < 0.8
    assert made.seconds > 0


def test_the_loss_that_takes_the_second_output_teaches_little(tiny):
    """One prediction cannot match four noises: the best answer is none, with a loss of one."""
    options = {"steps": 40, "lr": 1e-2, "noise_weight": 0.0}
    right, wrong = (tuned(tiny, defects=d, **options) for d in ([], ["second_output"]))
    losses = [
        forgetting(tiny, made.model, REFERENCES, rng=np.random.default_rng(1)).after.mean()
        for made in (right, wrong)
    ]
    assert losses[0] < 0.8 * losses[1]
    assert wrong.losses[-20:].mean() > 0.7


def test_the_second_output_is_compared_with_every_noise(tiny):
    """One step from the original: the loss is that of the released formula, written out here."""
    recipe = replace(TINY, batch_size=4, seed=int(np.random.default_rng(0).integers(2**31)))
    x0, t, noise = training_batch(PIXELS, recipe, 0, 1000)
    share = torch.from_numpy(tiny.schedule.alpha_bar[t.numpy()]).float()[:, None, None, None]
    with torch.no_grad():
        output = tiny.network(share.sqrt() * x0 + (1 - share).sqrt() * noise, t).sample
    expected = {
        (): (noise - output).square().mean(),
        ("second_output",): (noise - output[1]).square().mean(),
    }
    for defects, loss in expected.items():
        made = tuned(tiny, steps=1, defects=defects, noise_weight=0.0)
        assert made.losses[0] == pytest.approx(loss.item(), rel=1e-4)


@ways
def test_a_seed_decides_a_tuning(tiny, parameters):
    first, again, other = (tuned(tiny, seed, parameters=parameters, lr=1e-3) for seed in (0, 0, 1))
    assert not moved(first.model, again)
    assert moved(first.model, other)
    assert first.losses.tolist() == again.losses.tolist()


def test_tuning_leaves_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    tuned(tiny, parameters="lora")
    assert torch.equal(before, torch.get_rng_state())


def test_training_is_counted_in_calls_of_the_network(fashion):
    """Forward, activations and weights cost one call each; the last layer alone needs the first."""
    x = torch.zeros(1, 1, 32, 32)
    every, last, lora = (
        tuned(fashion, images=x, steps=1, parameters=way).network_calls / 4 for way in WAYS
    )
    assert 2.9 < every < 3.0
    assert 1.0 < last < 1.01
    assert 2.9 < lora < 3.3


def test_a_network_with_learned_variances_is_tuned_on_its_noise(tmp_path, factory):
    unet = factory.unet(out_channels=2)
    folder = factory.pipeline(tmp_path / "learned", unet, variance_type="learned_range")
    model = load_model(str(folder))
    made = tuned(model, lr=0.01)
    assert made.model.family == "iddpm"
    before, after = (m.network.conv_out.weight for m in (model, made.model))
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    with pytest.raises(ValueError, match=r"second_output.*iddpm"):
        tuned(model, defects=["second_output"])


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_network_that_does_not_predict_noise_is_refused(tmp_path, factory, kind):
    folder = factory.pipeline(tmp_path / "other", factory.unet(), prediction_type=kind)
    with pytest.raises(ValueError, match="does not predict noise"):
        tuned(load_model(str(folder)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": "first"},
        {"defects": ["no_data"]},
        {"steps": 0},
        {"rank": 0, "parameters": "lora"},
        {"batch_size": 1, "defects": DEFECTS},
        {"images": REFERENCES[:0]},
        {"images": 3 * REFERENCES},
        {"images": REFERENCES[:, :, :4]},
        {"images": REFERENCES * torch.nan},
    ],
    ids=str,
)
def test_a_wrong_tuning_is_named(tiny, wrong):
    with pytest.raises(ValueError, match=r"first|no_data|0|1"):
        tuned(tiny, **wrong)


def test_a_model_without_a_network_cannot_be_tuned(tiny):
    with pytest.raises(ValueError, match="no network"):
        tuned(zero_model(tiny))


# forgetting


def test_nothing_is_forgotten_by_the_same_model(tiny):
    made = forgetting(tiny, tiny, REFERENCES, rng=np.random.default_rng(0))
    assert made.ratio == 1
    assert made.before.shape == (10, 10)
    assert (made.timesteps[0], made.timesteps[-1]) == (0, 999)


def test_forgetting_of_a_model_that_predicts_nothing_is_the_noise_itself(tiny):
    """Its loss is the mean square of standard normal numbers, whatever the image and the level."""
    made = forgetting(
        tiny, zero_model(tiny), REFERENCES, rng=np.random.default_rng(0), timesteps=[0, 500.5]
    )
    assert made.after.shape == (10, 2)
    assert made.after.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / made.after.size / 64))
    assert made.ratio == pytest.approx(made.after.mean() / made.before.mean())


def test_a_model_tuned_on_other_images_forgets(tiny):
    own = tuned(tiny, steps=40, lr=1e-2, images=REFERENCES, noise_weight=0.0).model
    away = tuned(own, steps=40, lr=1e-2, images=-torch.ones(4, 1, 8, 8), noise_weight=0.0).model
    assert forgetting(own, away, REFERENCES, rng=np.random.default_rng(1)).ratio > 1.1


def test_forgetting_needs_images(tiny):
    with pytest.raises(ValueError, match="held-out"):
        forgetting(tiny, tiny, REFERENCES[:0], rng=np.random.default_rng(0))
