"""Fine-tuning, part by part: rates of layers, augmentation, mixing, the classifier and its artifact."""

import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import MODEL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import coma
from coma.artifact import (
    LINEAR_HEAD,
    ArtifactConfig,
    library_versions,
    load_classifier,
    load_encoder,
    save_artifact,
)
from coma.config import (
    DataConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRecipe,
    FinetuneRunConfig,
    ViTConfig,
    encoder_preset,
)
from coma.config.serialization import from_plain, to_plain
from coma.data import ArraySource, BatchLayout, labelled_batches, training_batches
from coma.data.augment import rand_augment
from coma.errors import BadArtifact, BadInput
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.objectives.classification import Classification, balanced_weights
from pretrain.training.optimizer import build_optimizer, layer_groups
from pretrain.training.throughput import finetuning_flops
from pretrain.training.train_step import seed_generators

PLAIN = ViTConfig(patch=4, dim=16, depth=2, heads=2)
OFF = FinetuneRecipe(mixup=0.0, cutmix=0.0, random_erasing=0.0, label_smoothing=0.0, rand_augment=0)

# layers -----------------------------------------------------------------------------------------


def rates(model, recipe: FinetuneRecipe) -> dict[str, tuple[float, float]]:
    """Learning rate's share and weight decay of every parameter."""
    classifier = build_classifier(model, 3)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    groups = layer_groups(classifier, recipe)
    found = {
        names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert found.keys() == set(names.values())
    return found


def test_rates_of_a_dyvit_by_hand():
    """Layers: stem, then a block in each of four stages with the merge before it, then the head."""
    found = rates(MODEL, FinetuneRecipe(layer_decay=0.5, weight_decay=0.2))
    by_hand = {
        "stem.conv.weight": (1 / 32, 0.2),
        "stem.norm.bias": (1 / 32, 0.0),
        "stages.0.blocks.0.attn.qkv.weight": (1 / 16, 0.2),
        "stages.0.blocks.0.attn.qkv.bias": (1 / 16, 0.0),
        "stages.1.merge.linear.weight": (1 / 8, 0.2),
        "stages.1.blocks.0.mlp.fc1.weight": (1 / 8, 0.2),
        "stages.2.merge.norm.weight": (1 / 4, 0.0),
        "stages.3.blocks.0.norm1.weight": (1 / 2, 0.0),
        "norm.weight": (1 / 2, 0.0),
        "head.weight": (1.0, 0.2),
        "head.bias": (1.0, 0.0),
    }
    assert {name: found[name] for name in by_hand} == by_hand


def test_rates_of_a_plain_vit_by_hand():
    found = rates(PLAIN, FinetuneRecipe(layer_decay=0.1))
    by_hand = {
        "cls_token": (1e-3, 0.0),
        "stem.weight": (1e-3, 0.05),
        "blocks.0.attn.qkv.weight": (1e-2, 0.05),
        "blocks.1.mlp.fc2.bias": (1e-1, 0.0),
        "norm.weight": (1e-1, 0.0),
        "head.weight": (1.0, 0.05),
    }
    assert {name: found[name] for name in by_hand} == {
        name: (pytest.approx(rate), decay) for name, (rate, decay) in by_hand.items()
    }


@pytest.mark.parametrize(
    ("preset", "decay"), [("tiny", 0.75), ("base", 0.65), ("vit-small", 0.75), ("vit-base", 0.65)]
)
def test_the_default_decay_is_gentler_on_small_encoders(preset, decay):
    with torch.device("meta"):
        found = rates(encoder_preset(preset, 224), FinetuneRecipe())
    assert (
        found["stages.3.blocks.1.mlp.fc1.weight" if preset in ("tiny", "base") else "norm.weight"][0] == decay
    )


def test_the_optimizer_takes_the_layers():
    objective = Classification(OFF, build_classifier(PLAIN, 3), 3)
    scales = {group["lr_scale"] for group in build_optimizer(objective, OFF).param_groups}
    assert scales == {0.75**i for i in range(4)}
    grouped = [p for group in build_optimizer(objective, OFF).param_groups for p in group["params"]]
    assert len(grouped) == len(list(objective.parameters()))


# samples ----------------------------------------------------------------------------------------


def tiles(n: int = 12, channels: int = 3, dtype: type = np.uint8) -> ArraySource:
    """Pictures of noise, of three classes."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (24, 20, channels)) for _ in range(n)]
    pictures = [(picture / 255 if dtype is np.float32 else picture).astype(dtype) for picture in noise]
    return ArraySource(pictures, np.arange(n) % 3)


def first(source: ArraySource, strength: int, seed: int = 0, channels: int = 3):
    data = DataConfig(image_size=ImageSize.of(16), workers=0, mean=(0.5,) * channels, std=(0.2,) * channels)
    labels = torch.from_numpy(source.labels)
    how = {"channels": channels, "seed": seed, "batch": BatchLayout(8, 8)}
    return (
        next(labelled_batches(source, data, labels, rand_augment=strength, **how)),
        next(training_batches(source, data, **how)),
    )


def test_labels_go_with_their_images():
    source = tiles()
    source._images = [*source._images[:3], np.zeros((0, 5, 3), np.uint8), *source._images[4:]]
    seen = []
    for seed in range(3):
        batch, plain = first(source, 9, seed)
        assert batch.labels is not None and batch.labels.tolist() == (batch.indices % 3).tolist()
        assert batch.indices.tolist() == plain.indices.tolist()  # the same stream as without labels
        assert 3 not in batch.indices
        seen += batch.failures
    assert seen  # another image took the place of the bad one, with its own label


def drawn() -> tuple:
    """Where Python's and numpy's generators are."""
    return random.getstate(), pickle.dumps(np.random.get_state())


def test_augmentation_is_part_of_the_stream():
    random.seed(1)
    np.random.seed(1)
    before = drawn()
    (one, plain), (again, _), (off, _) = (first(tiles(), strength) for strength in (9, 9, 0))
    assert torch.equal(one.images, again.images)
    assert torch.equal(off.images, plain.images)
    changed = (one.images != plain.images).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.5
    assert drawn() == before


def test_augmentation_follows_its_seed_and_strength():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8))
    mean = (0.5, 0.5, 0.5)
    results = [rand_augment(image, 9, seed, mean) for seed in range(-20, 20)]  # seeds are signed
    assert all(result.shape == image.shape and result.dtype == torch.uint8 for result in results)
    assert len({result.numpy().tobytes() for result in results}) > 20
    gentle, strong = (
        torch.stack([rand_augment(image, m, s, mean).float() for s in range(40)]) for m in (1, 10)
    )
    assert (strong - image).abs().mean() > (gentle - image).abs().mean()


@pytest.mark.parametrize(
    ("channels", "dtype"), [(5, np.uint8), (1, np.uint8), (3, np.float32), (3, np.uint16)]
)
def test_other_images_are_only_cropped_and_flipped(channels, dtype):
    batch, plain = first(tiles(8, channels, dtype), 9, channels=channels)
    assert torch.equal(batch.images, plain.images)
    assert batch.labels is not None


# mixing -----------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images of which every pixel differs, and labels."""
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(8, 2, 16, 16, generator=generator), torch.arange(8) % 3


def mixed(batch, seed: int = 0, **recipe: float):
    images, labels = batch
    untouched = images.clone()
    seed_generators(seed, 0)
    learner = Classification(replace(OFF, **recipe), build_classifier(replace(PLAIN, channels=2), 3), 3)
    seed_generators(seed, 0)
    result = learner.mix(images, labels)
    assert torch.equal(images, untouched)
    assert torch.allclose(result[1].sum(dim=1), torch.ones(8))
    return result


def test_nothing_is_mixed_unless_asked_for(batch):
    images, targets = mixed(batch)
    assert torch.equal(images, batch[0])
    assert torch.equal(targets, torch.eye(3)[batch[1]])
    _, smooth = mixed(batch, label_smoothing=0.3)
    torch.testing.assert_close(smooth, torch.eye(3)[batch[1]] * 0.7 + 0.1)


def test_mixup_blends_pixels_as_labels(batch):
    images, targets = mixed(batch, mixup=0.8)
    share = targets[0, 0].item()  # of image 0, class 0; its partner, image 7, is of class 1
    assert 0 < share < 1
    torch.testing.assert_close(images, share * batch[0] + (1 - share) * batch[0].flip(0))
    assert not torch.equal(mixed(batch, seed=1, mixup=0.8)[0], images)
    assert torch.equal(mixed(batch, mixup=0.8)[0], images)


def test_cutmix_pastes_a_box_and_counts_its_pixels(batch):
    for seed in range(5):
        images, targets = mixed(batch, seed, cutmix=1.0)
        pasted = images != batch[0]
        assert torch.equal(images[pasted], batch[0].flip(0)[pasted])
        assert targets[0, 0].item() == pytest.approx(1 - pasted[0].float().mean().item())


def test_erasing_draws_noise_into_some_images(batch):
    changed = torch.stack(
        [(mixed(batch, seed, random_erasing=0.25)[0] != batch[0]).flatten(1).any(1) for seed in range(25)]
    )
    assert 0.15 < changed.float().mean() < 0.35  # 200 images
    assert (mixed(batch, random_erasing=1.0)[0] != batch[0]).flatten(1).any(1).all()


def test_the_loss_is_cross_entropy_with_these_targets(batch):
    images, labels = batch
    torch.manual_seed(0)
    learner = Classification(OFF, build_classifier(replace(PLAIN, channels=2), 3), 3)
    expected = nn.functional.cross_entropy(learner.classifier(images), labels)
    torch.testing.assert_close(learner(images, labels).loss, expected)


# the classifier and its artifact ----------------------------------------------------------------


def description(model=PLAIN, **changes) -> ArtifactConfig:
    about = ArtifactConfig(
        "classifier", model, None, ImageSize.of(16), (0.5,) * 3, (0.2,) * 3, ("a", "b", "c"), {},
        library_versions(), head=dict(LINEAR_HEAD),
    )  # fmt: skip
    return replace(about, **changes)


@pytest.mark.parametrize("model", [MODEL, PLAIN])
def test_an_artifact_gives_the_same_logits(tmp_path, model):
    classifier = build_classifier(model, 3).eval()
    save_artifact(tmp_path / "artifact", tensors=classifier.state_dict(), config=description(model))
    loaded = load_classifier(tmp_path / "artifact")
    about = loaded.artifact
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(loaded(images), classifier(images))
    assert about == description(model)
    assert not loaded.training
    assert coma.load_classifier is load_classifier
    encoder = build_encoder(model).eval()
    tensors = {name: t for name, t in classifier.state_dict().items() if not name.startswith("head.")}
    encoder.load_state_dict(tensors)  # the encoder's names are its own
    weight, bias = (classifier.state_dict()[f"head.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(encoder.pool(images) @ weight.T + bias, loaded(images))


def test_only_a_whole_classifier_is_loaded(tmp_path):
    tensors = build_classifier(PLAIN, 3).state_dict()
    cases = {
        "kind": (
            tensors,
            description(kind="backbone"),
            "its kind is 'backbone'; give a 'classifier' artifact",
        ),
        "head": (tensors, description(head={"type": "mlp"}), "its head is {'type': 'mlp'}"),
        "names": (tensors, description(class_names=None), "classes None"),
        "classes": (
            tensors,
            description(class_names=("a", "b")),
            r"head.weight is \[3, 16\], the model has \[2",
        ),
        "headless": (build_encoder(PLAIN).state_dict(), description(), r"2 missing: head.weight"),
    }
    for name, (held, about, message) in cases.items():
        save_artifact(tmp_path / name, tensors=held, config=about)
        with pytest.raises(BadArtifact, match=message):
            load_classifier(tmp_path / name)
    save_artifact(tmp_path / "whole", tensors=tensors, config=description())
    encoder = load_encoder(tmp_path / "whole")  # without its head
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())


def test_labels_of_any_number_are_mixed_like_the_images():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 10
    labels = torch.eye(4)[:, :3]
    recipe = replace(OFF, mixup=0.8)
    torch.manual_seed(0)
    np.random.seed(0)
    mixed, targets = Classification(recipe, build_classifier(PLAIN, 3), 3).mix(images, labels)
    share = 1 - mixed[0, 0, 0, 0].item() / 30  # of image 0, mixed with image 3
    assert 0 < share < 1
    expected = share * labels + (1 - share) * labels.flip(0)
    torch.testing.assert_close(targets, expected)
    smooth = Classification(replace(OFF, label_smoothing=0.3), build_classifier(PLAIN, 3), 3)
    torch.testing.assert_close(smooth.mix(images, labels)[1][0], torch.tensor([0.8, 0.1, 0.1]))


@pytest.mark.parametrize("any_number", [False, True])
def test_balanced_weights_make_classes_equal(any_number):
    labels = torch.tensor([0, 0, 0, 1])
    if any_number:
        multi_hot = torch.nn.functional.one_hot(labels, 2).float()
        assert balanced_weights(multi_hot, 2).tolist() == pytest.approx([1 / 3, 3])
        return
    weights = balanced_weights(labels, 2)
    assert weights.tolist() == pytest.approx([4 / 6, 2])
    classifier = build_classifier(PLAIN, 2).eval()
    images = torch.randn(4, 3, 16, 16)
    losses = torch.nn.functional.cross_entropy(classifier(images), labels, reduction="none")
    found = Classification(OFF, classifier, 2, weights)(images, labels).loss
    expected = (losses[:3].mean() + losses[3]) / 2
    torch.testing.assert_close(found, expected)


def test_flops_are_counted():
    """By hand: 2 per weight and token forward, twice that backward but for the images; attention besides."""
    tokens, dim = 17, 16
    block = tokens * 2 * dim * dim * 12 + 4 * tokens * tokens * dim
    stem = 16 * 2 * 48 * dim
    flops = 3 * (stem + 2 * block + 2 * dim * 3) - stem
    assert finetuning_flops(PLAIN, 3, 16) == pytest.approx(flops, rel=1e-3)


def test_flops_of_a_dyvit_are_those_of_a_step_on_numbers():
    classifier, images = build_classifier(MODEL, 3), torch.zeros(1, 3, 16, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        classifier(images).sum().backward()
    assert finetuning_flops(MODEL, 3, 16) == counter.get_total_flops()


# settings ---------------------------------------------------------------------------------------


def test_settings_survive_json():
    config = FinetuneConfig(
        Path("run/artifact"),
        FinetuneDataConfig(Path("data")),
        FinetuneRunConfig(Path("run")),
        model=MODEL,
        class_names=("a", "b"),
    )
    assert from_plain(json.loads(json.dumps(to_plain(config))), FinetuneConfig, source="x") == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layer_decay": 0.0}, "--layer-decay 0 must be more than 0"),
        ({"rand_augment": 11}, "--rand-augment 11 must be 0 to 10"),
        ({"drop_path": 1.0}, "--drop-path 1 must be"),
        ({"label_smoothing": -0.1}, "--label-smoothing -0.1 must be"),
        ({"random_erasing": 2.0}, "--random-erasing 2 must be 0 to 1"),
        ({"mixup": -1.0}, "--mixup -1 must be 0 to 1000"),
        ({"validate": 0.0}, "--validate 0 must be"),
    ],
)
def test_impossible_recipes_are_refused(setting, message):
    with pytest.raises(BadInput, match=message):
        FinetuneRecipe(**setting)
