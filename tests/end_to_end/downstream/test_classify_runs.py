"""Fine-tuning learns, publishes what did best on validation images, and uses the test images once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_runs import COLOURS, paint, publish, rows, to, without_val
from short_runs import MODEL

from coma.artifact import (
    load_artifact,
    load_classifier,
    load_encoder,
)
from coma.config import FinetuneDataConfig, ViTConfig
from coma.data import Source, evaluation_batches, normalize, open_source
from coma.data.image import MinSide
from coma.data.sources.base import EncodedSource
from coma.errors import BadInput
from coma.image_size import ImageSize
from downstream.classify import run_directory
from downstream.classify.finetune import finetune
from downstream.classify.validation import Validation
from pretrain.training.checkpoint import read_state

VIT = ViTConfig(patch=4, dim=16, depth=2, heads=2)


pytestmark = pytest.mark.usefixtures("no_curves")


# learning ---------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_classifier_that_was_validated(short, place, tmp_path):
    paint(tmp_path / "data" / "train", 60, seed=2)
    paint(tmp_path / "data" / "val", 30, seed=5)
    paint(tmp_path / "data" / "test", 45, seed=3)
    config = to(
        short, tmp_path / "run", steps=50, batch_size=12, micro_batch=None, base_lr=0.3, ema_decay=0.8
    )
    config = replace(
        config, data=FinetuneDataConfig(tmp_path / "data", image_size=ImageSize.of(16), workers=0)
    )
    recipe = replace(config.optimizer, rand_augment=0, mixup=0.2, random_erasing=0.25, drop_path=0.0)
    config = replace(config, optimizer=recipe, run=replace(config.run, save_steps=None, log_steps=10))
    result = finetune(config)
    assert result.test.score >= 0.9  # chance is a third
    assert result.best is not None and result.last is not None
    assert result.best.score >= result.last.score >= 0.8
    assert (result.train_images, result.best.images, result.test.images) == (60, 30, 45)
    losses = [row["loss"] for row in rows(config.run.out) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]

    classifier = load_classifier(result.artifact)
    about = classifier.artifact
    assert (about.kind, about.class_names, about.image_size) == ("classifier", COLOURS, (16, 16))
    assert (about.trained["test_top1"], about.trained["val_top1"]) == (result.test.top1, result.best.top1)
    assert about.trained["steps"] == result.test.step == result.best.step
    source, right = open_source(tmp_path / "data", "test"), 0
    assert source.labels is not None
    for batch in evaluation_batches(source, image_size=16, channels=3, batch_size=45, workers=0):
        guess = classifier(normalize(batch.images, about.mean, about.std)).argmax(dim=1)
        right += (guess.numpy() == source.labels[batch.indices.numpy()]).sum()
    assert right / 45 == result.test.top1


def test_it_begins_with_the_artifacts_weights_unless_told_otherwise(short, tmp_path):
    still = {"steps": 1, "base_lr": 1e-30, "weight_decay": 0.0}
    encoder = load_encoder(short.artifact)
    for scratch in (False, True):
        config = replace(to(short, tmp_path / str(scratch), **still), from_scratch=scratch)
        tensors = load_artifact(finetune(config).artifact).tensors
        same = all(
            torch.allclose(tensors[name], tensor, rtol=0, atol=1e-20)
            for name, tensor in encoder.state_dict().items()
        )
        assert same is not scratch
        assert (load_artifact(config.run.out / "artifact").config.trained["pretrained"] is None) is scratch


@pytest.mark.parametrize("model", [replace(MODEL, channels=5), replace(VIT, channels=5)])
def test_images_of_five_channels(short, tmp_path, model):
    rng = np.random.default_rng(0)
    for part, name in (("train", "a"), ("train", "b"), ("test", "b"), ("test", "a")):
        path = tmp_path / "data" / part / name
        path.mkdir(parents=True)
        for number in range(4):
            np.save(path / f"{number}.npy", rng.integers(0, 4000, (18, 18, 5), np.uint16))
    config = to(short, tmp_path / "run", steps=2)
    data = replace(config.data, images=tmp_path / "data")
    finetune(replace(config, artifact=publish(tmp_path / "artifact", model), data=data))
    classifier = load_classifier(tmp_path / "run" / "artifact")
    assert classifier(torch.randn(1, 5, 16, 16)).shape == (1, 2)


def test_packs_are_read_and_numbers_are_names_where_there_are_none(short, place, tmp_path):
    for part in ("train", "val", "test"):
        source = open_source(place / "data", part)
        assert source.labels is not None
        files = [source.read_bytes(i) or b"" for i in range(len(source))]
        offsets = np.cumsum([0, *map(len, files)])
        data = np.frombuffer(b"".join(files), np.uint8)
        np.savez(tmp_path / f"{part}.npz", data=data, offsets=offsets, labels=source.labels)
    config = replace(to(short, tmp_path / "run", steps=1), data=replace(short.data, images=tmp_path))
    assert load_artifact(finetune(config).artifact).config.class_names == ("0", "1", "2")


# the best ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "kept"), [((0.2, 0.9, 0.4), 1), ((0.2, 0.4, 0.4), 1), ((0.9, 0.1, 0.2), 0)]
)
def test_the_best_is_kept_the_earliest_of_several(short, tmp_path, monkeypatch, scores, kept):
    seen: list[dict[str, torch.Tensor]] = []

    def scripted(classifier: Any, source: Source, *_: Any, step: int, **__: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in classifier.state_dict().items()})
        assert source.location.name == ("val" if len(seen) < 4 else "test")  # which is seen once, at the end
        top1 = (*scores, 0.25)[len(seen) - 1]
        return Validation(step, top1, None, 1.0, 9), ()

    monkeypatch.setattr(run_directory, "validate", scripted)
    result = finetune(to(short, tmp_path / "run"))
    assert result.best is not None and result.last is not None
    assert (result.best.top1, result.last.top1, result.test.top1) == (scores[kept], scores[2], 0.25)
    artifact = load_artifact(result.artifact)
    assert artifact.config.trained["steps"] == (3, 6, 7)[kept]
    for number, weights in enumerate(seen):
        equal = all(torch.equal(artifact.tensors[name], weights[name]) for name in weights)
        assert equal is (number in (kept, 3))


def test_the_moving_average_is_what_is_validated(short, tmp_path, monkeypatch):
    shown: list[dict[str, torch.Tensor]] = []
    real = run_directory.validate

    def watched(classifier: Any, *rest: Any, **how: Any) -> Any:
        shown.append({name: tensor.clone() for name, tensor in classifier.state_dict().items()})
        return real(classifier, *rest, **how)

    monkeypatch.setattr(run_directory, "validate", watched)
    finetune(to(short, tmp_path / "run"))
    state = read_state(tmp_path / "run" / "state", warn=pytest.fail)
    assert state is not None
    for name, tensor in shown[2].items():
        assert torch.equal(tensor, state["ema"][f"classifier.{name}"])
    assert not torch.equal(shown[2]["head.weight"], state["model"]["classifier.head.weight"])
    assert [row["step"] for row in rows(tmp_path / "run") if "val_top1" in row] == [3, 6, 7]
    (row,) = [row for row in rows(tmp_path / "run") if "test_top1" in row]
    assert (row["step"], row["chosen_step"]) == (7, state["validation"]["chosen"])


# what chooses the checkpoint ----------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files of every validation, and of the test at the end."""
    shown: list[list[str]] = []
    real = run_directory.validate

    def watch(classifier: Any, source: Source, *rest: Any, **how: Any) -> Any:
        shown.append([source.describe(i) for i in range(len(source))])
        return real(classifier, source, *rest, **how)

    monkeypatch.setattr(run_directory, "validate", watch)
    return shown


def test_a_part_of_every_class_is_held_out_where_there_is_no_val_split(
    short, place, tmp_path, monkeypatch, capsys
):
    shown = watched(monkeypatch)
    read: set[str] = set()
    real = EncodedSource.decode

    def note(source: EncodedSource, i: int, min_side: MinSide = 0) -> Any:
        if callable(min_side):  # as training samples are read
            read.add(source.describe(i))
        return real(source, i, min_side)

    monkeypatch.setattr(EncodedSource, "decode", note)
    result = finetune(without_val(short, place, tmp_path / "run", steps=20, validate=4.0))
    *validated, tested = shown
    assert all(images == validated[0] for images in validated)
    assert sorted(Path(image).parent.name for image in validated[0]) == list(COLOURS)
    assert {Path(image).parents[1].name for image in validated[0]} == {"train"}
    assert len(read) == 9 and not read & set(validated[0])
    assert tested == [str(path) for path in sorted((place / "data" / "test").glob("*/*.png"))]
    assert result.train_images == 9
    told = capsys.readouterr().err
    assert "checkpoint: chosen by top-1 on 3 of the 12 images of" in told
    assert "which are not trained on: 0.1 of every class, at least one of two, drawn with seed 0" in told
    assert "test: 9 images of" in told
    about = load_artifact(result.artifact).config.trained
    assert (about["val"], about["val_held_out_of_training"], about["test"]) == ("train", True, "test")
    assert (about["val_images"], about["test_images"], about["images"]) == (3, 9, 9)


def test_a_share_of_the_labels_is_used(short, place, tmp_path, monkeypatch, capsys):
    """A quarter of four pictures of each colour: one of each; of half, one of each is held out."""
    shown = watched(monkeypatch)
    result = finetune(to(short, tmp_path / "run", steps=1, label_share=0.25))
    assert result.train_images == 3 and len(shown[0]) == 6  # the validation images stay
    assert "labels: 3 of the 12 images of" in capsys.readouterr().err
    half = without_val(short, place, tmp_path / "half", steps=1, label_share=0.5)
    del shown[:]
    assert finetune(half).train_images == 3 and len(shown[0]) == 3
    assert {Path(image).parent.name for image in shown[0]} == set(COLOURS)
    least = without_val(short, place, tmp_path / "least", steps=1, label_share=1e-9)
    with pytest.raises(BadInput, match=r"single image.*, or a larger --label-share"):
        finetune(least)


def test_nothing_need_be_held_out(short, place, tmp_path, monkeypatch, capsys):
    shown = watched(monkeypatch)
    result = finetune(without_val(short, place, tmp_path / "run", hold_out=0.0))
    assert [len(images) for images in shown] == [9]
    assert (result.best, result.train_images, result.test.step) == (None, 12, 7)
    assert "the last step's; nothing chooses it (--hold-out 0)" in capsys.readouterr().err
    about = load_artifact(result.artifact).config.trained
    assert about["test_top1"] == result.test.top1 and "val_top1" not in about


def test_classes_of_one_image_stay_in_training(short, place, tmp_path, capsys):
    paint(tmp_path / "train", 6, seed=0)
    for path in sorted((tmp_path / "train" / "blue").iterdir())[1:]:
        path.unlink()
    config = replace(without_val(short, place, tmp_path / "run", steps=1), data=short.data)
    config = replace(config, data=replace(short.data, images=tmp_path / "train"))
    result = finetune(config)
    assert result.train_images == 3
    assert "chosen by top-1 on 2 of the 5 images" in (told := capsys.readouterr().err)
    assert "1 class with a single image have none" in told
    for path in (tmp_path / "train").glob("*/*.png"):
        if path.name > "02.png":
            path.unlink()
    with pytest.raises(BadInput, match=r"every class has a single image.*--val.*--hold-out 0"):
        finetune(replace(config, run=replace(config.run, out=tmp_path / "other")))


def test_every_parameter_moves_at_its_own_rate(short, tmp_path):
    """One step of Adam moves weights by about their learning rate: the stem less than the head."""
    config = to(
        short, tmp_path / "run", steps=1, ema_decay=0.0, warmup=0.0, weight_decay=0.0, layer_decay=0.5
    )
    tensors = load_artifact(finetune(config).artifact).tensors
    before = load_encoder(short.artifact).state_dict()
    moved = {name: (tensors[name] - before[name]).abs().max().item() for name in before}
    lr = config.optimizer.lr
    assert moved["stem.conv.weight"] == pytest.approx(lr / 32, rel=0.1)
    assert moved["stages.1.merge.linear.weight"] == pytest.approx(lr / 8, rel=0.1)
    assert moved["norm.weight"] == pytest.approx(lr / 2, rel=0.1)


@pytest.mark.parametrize(("model", "last"), [(MODEL, 4), (VIT, 2)])
def test_frozen_stages_keep_their_weights(short, tmp_path, model, last):
    """0: the stem; -1 would freeze nothing, and `last` all but the head."""
    artifact = publish(tmp_path / "artifact", model)
    before = load_encoder(artifact).state_dict()
    blocks = "stages" if last == 4 else "blocks"
    for stages in (0, 1, last):
        config = to(short, tmp_path / str(stages), steps=1, ema_decay=0.0, warmup=0.0, frozen_stages=stages)
        tensors = load_artifact(finetune(replace(config, artifact=artifact)).artifact).tensors
        moved = {name for name in before if not torch.equal(tensors[name], before[name])}
        kept = ("stem", "cls_token", *(f"{blocks}.{i}." for i in range(stages)))
        expected = {name for name in before if not name.startswith(kept) and stages < last}
        idle = {name for name in before if name.endswith("gate.hidden.bias")}  # no gradient in the first step
        assert moved - idle == expected - idle
    with pytest.raises(BadInput, match=rf"--frozen-stages 9: .* has {last} stages"):
        finetune(replace(to(short, tmp_path / "other", frozen_stages=9), artifact=artifact))
