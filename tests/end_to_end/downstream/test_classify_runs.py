"""Fine-tuning runs: they learn, keep what did best on validation images, test it once, go on to the very same
numbers, and refuse with one line.
"""

import errno
import importlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from short_runs import MODEL, Killed, assert_same, killed_in, rows, stop_during

from coma import cli
from coma.artifact import (
    ArtifactConfig,
    library_versions,
    load_artifact,
    load_classifier,
    load_encoder,
    save_artifact,
)
from coma.config import DataConfig, FinetuneConfig, FinetuneRecipe, RunConfig, ViTConfig
from coma.config.serialization import read_config
from coma.data import Source, evaluation_batches, normalize, open_source
from coma.data.image import MinSide
from coma.data.sources.base import EncodedSource
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.models import build_encoder
from downstream.classify import plan, validation
from downstream.classify.finetune import finetune
from downstream.classify.validation import Validation
from pretrain.training import run_directory
from pretrain.training.checkpoint import read_state

COLOURS = ("blue", "green", "red")
VIT = ViTConfig(patch=4, dim=16, depth=2, heads=2)


def paint(folder: Path, count: int, seed: int) -> None:
    """Noisy pictures in class folders, each a little brighter in the colour of its class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        colour = number % 3
        pixels = rng.integers(0, 200, (20, 20, 3))
        pixels[:, :, 2 - colour] += 55
        path = folder / COLOURS[colour] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def publish(path: Path, model: Any = MODEL, kind: Any = "backbone") -> Path:
    """An artifact with an encoder that has learned nothing."""
    torch.manual_seed(3)
    c = model.channels
    about = ArtifactConfig(kind, model, None, 16, (0.5,) * c, (0.25,) * c, None, {}, library_versions())
    save_artifact(path, tensors=build_encoder(model).state_dict(), config=about)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` (12, 6 and 9 pictures of three colours) and `artifact`."""
    folder = tmp_path_factory.mktemp("place")
    paint(folder / "data" / "train", 12, seed=0)
    paint(folder / "data" / "val", 6, seed=4)
    paint(folder / "data" / "test", 9, seed=1)
    publish(folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def short(place: Path) -> FinetuneConfig:
    """Seven steps with everything that a resumed run has to restore; validated after 3, 6 and 7."""
    return FinetuneConfig(
        artifact=place / "artifact",
        data=DataConfig(place / "data", image_size=16, workers=0),
        optimizer=FinetuneRecipe(
            steps=7,
            batch_size=4,
            micro_batch=2,
            base_lr=0.1,
            ema_decay=0.5,
            drop_path=0.3,
            random_erasing=0.5,
        ),
        run=RunConfig(device="cpu", save_steps=2, log_steps=3, reconstruction_every=0),
    )


def to(config: FinetuneConfig, out: Path, **recipe: Any) -> FinetuneConfig:
    return replace(config, run=replace(config.run, out=out), optimizer=replace(config.optimizer, **recipe))


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Drawing takes longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.training.run_directory.loss_curve", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def whole(short: FinetuneConfig, no_curves: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, never interrupted."""
    config = to(short, tmp_path_factory.mktemp("whole") / "run")
    finetune(config)
    return config.run.out


pytestmark = pytest.mark.usefixtures("no_curves")

# learning ---------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_classifier_that_was_validated(short, place, tmp_path):
    paint(tmp_path / "data" / "train", 60, seed=2)
    paint(tmp_path / "data" / "val", 30, seed=5)
    paint(tmp_path / "data" / "test", 45, seed=3)
    config = to(
        short, tmp_path / "run", steps=50, batch_size=12, micro_batch=None, base_lr=0.3, ema_decay=0.8
    )
    config = replace(config, data=DataConfig(tmp_path / "data", image_size=16, workers=0))
    recipe = replace(config.optimizer, rand_augment=0, mixup=0.2, random_erasing=0.25, drop_path=0.0)
    config = replace(config, optimizer=recipe, run=replace(config.run, save_steps=None, log_steps=10))
    result = finetune(config)
    assert result.test.top1 >= 0.9  # chance is a third
    assert result.best is not None and result.last is not None
    assert result.best.top1 >= result.last.top1 >= 0.8
    assert (result.train_images, result.best.images, result.test.images) == (60, 30, 45)
    losses = [row["loss"] for row in rows(config.run.out) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]

    classifier = load_classifier(result.artifact)
    about = classifier.artifact
    assert (about.kind, about.class_names, about.image_size) == ("classifier", COLOURS, 16)
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

    monkeypatch.setattr(validation, "validate", scripted)
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
    real = validation.validate

    def watched(classifier: Any, *rest: Any, **how: Any) -> Any:
        shown.append({name: tensor.clone() for name, tensor in classifier.state_dict().items()})
        return real(classifier, *rest, **how)

    monkeypatch.setattr(validation, "validate", watched)
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
    real = validation.validate

    def watch(classifier: Any, source: Source, *rest: Any, **how: Any) -> Any:
        shown.append([source.describe(i) for i in range(len(source))])
        return real(classifier, source, *rest, **how)

    monkeypatch.setattr(validation, "validate", watch)
    return shown


def without_val(short: FinetuneConfig, place: Path, out: Path, **recipe: Any) -> FinetuneConfig:
    config = to(short, out, **recipe)
    data = replace(config.data, images=place / "data" / "train")
    return replace(config, data=data, test=place / "data" / "test")


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
    assert "which are not trained on: 0.1 of every class, at least one of two, drawn by seed 0" in told
    assert "test: 9 images of" in told
    about = load_artifact(result.artifact).config.trained
    assert (about["val"], about["val_held_out_of_training"], about["test"]) == ("train", True, "test")
    assert (about["val_images"], about["test_images"], about["images"]) == (3, 9, 9)


def test_held_out_images_are_the_same_when_the_run_goes_on(short, place, tmp_path, monkeypatch):
    config = without_val(short, place, tmp_path / "run")
    finetune(without_val(short, place, tmp_path / "whole"))
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 4, signal.SIGTERM)
        finetune(config)
    monkeypatch.setattr(plan, "hold_out", lambda labels, *_: torch.arange(len(labels)) % 4 == 0)
    with pytest.raises(BadInput, match=r"the validation images have changed: 1 removed \(green/04"):
        finetune(config, resume=True)
    monkeypatch.undo()
    finetune(config, resume=True)
    assert_same(config.run.out, tmp_path / "whole")


def test_nothing_need_be_held_out(short, place, tmp_path, monkeypatch, capsys):
    shown = watched(monkeypatch)
    result = finetune(without_val(short, place, tmp_path / "run", hold_out=0.0))
    assert [len(images) for images in shown] == [9]
    assert (result.best, result.train_images, result.test.step) == (None, 12, 7)
    assert "that of the last step (--hold-out 0)" in capsys.readouterr().err
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
    assert "1 class with a single image have none there" in told
    for path in (tmp_path / "train").glob("*/*.png"):
        if path.name > "02.png":
            path.unlink()
    with pytest.raises(BadInput, match=r"every class has a single image.*--val.*--hold-out 0"):
        finetune(replace(config, run=replace(config.run, out=tmp_path / "other")))


def test_a_run_of_an_earlier_version_is_refused(short, whole, tmp_path, monkeypatch):
    read = run_directory.read_state

    def earlier(*given: Any) -> Any:
        state = read(*given)
        return state and state | {"validation": {"test_images": 9, "best": None, "last": None, "weights": {}}}

    monkeypatch.setattr(run_directory, "read_state", earlier)
    with pytest.raises(
        BadInput, match=r"earlier version, which chose the checkpoint on the test images.*--run"
    ):
        finetune(to(short, whole), resume=True)


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


# going on ---------------------------------------------------------------------------------------


def test_interrupted_and_resumed_is_uninterrupted(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    for step, number in ((1, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGTERM)):  # 2: when validated
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(Interrupted, match="coma evaluate --resume"),
        ):
            stop_during(patch, step, number)
            finetune(config, resume=step > 1)
        validated = [row["step"] for row in rows(config.run.out) if "val_top1" in row]
        assert validated == ([3] if step > 2 else [])  # who stops does not wait; it is made up for
        torch.rand(3)  # numbers drawn by anybody else change nothing
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_a_run_that_is_killed_after_a_validation_repeats_no_row(short, whole, tmp_path):
    """Stopped at a step that a validation is due at, validated when resumed, killed before the next save."""
    config = to(short, tmp_path / "run")
    for resume, end, step in ((False, stop_during, 2), (True, killed_in, 3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, Interrupted)):
            end(patch, step)
            finetune(config, resume=resume)
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_the_comparison_notices_another_seed(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    finetune(replace(config, run=replace(config.run, seed=1)))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


def test_worker_processes_change_nothing(short, whole, tmp_path):
    config = to(short, tmp_path / "run")
    finetune(replace(config, data=replace(config.data, workers=1)))
    assert_same(config.run.out, whole)


class Dead(BaseException):
    """Stands for kill -9: from here on the process writes nothing."""


SITES = [
    "training.run_directory.write_state",
    "training.run_directory.save_artifact",
    "finetune.validation.validate",
]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("when", [1, 2])
def test_killed_at_any_point_of_a_save(short, whole, tmp_path, site, when):
    config, calls = to(short, tmp_path / "run"), 0

    def die(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > when:
            raise Dead
        return real(*_, **__)

    module, _, name = site.rpartition(".")
    real = getattr(importlib.import_module(f"pretrain.{module}"), name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(f"pretrain.{site}", die)
        finetune(config)
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


@pytest.mark.parametrize(("site", "what"), [("write_state", "state"), ("save_artifact", "artifact")])
def test_a_full_disk_loses_nothing(short, whole, tmp_path, capsys, site, what):
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = to(short, tmp_path / "run")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=rf"written: {what} \(No space"),
    ):
        patch.setattr(f"pretrain.training.run_directory.{site}", no_room)
        finetune(config)
    assert "coma evaluate --resume" not in capsys.readouterr().out
    finetune(config, resume=True)
    assert_same(config.run.out, whole)


def test_a_run_that_is_over_is_not_done_again(short, whole, monkeypatch):
    before = (whole / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(validation, "validate", lambda *_, **__: pytest.fail("validated again"))
    result = finetune(to(short, whole), resume=True)
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert result.last is not None and result.last.step == 7


def test_what_may_not_change(short, place, whole, tmp_path):
    with pytest.raises(BadInput, match=r"optimizer.mixup 0.8 -> 0.1"):
        finetune(to(short, whole, mixup=0.1), resume=True)
    with pytest.raises(
        BadInput, match=r"is not empty; continue its run with `coma evaluate --resume .*another --run"
    ):
        finetune(to(short, whole))
    with pytest.raises(BadInput, match="is of a run of `coma evaluate --protocol finetune`"):
        read_config(whole)
    paint(tmp_path / "test", 12, seed=1)
    moved = replace(to(short, whole), data=replace(short.data, images=place / "data" / "train"))
    with pytest.raises(BadInput, match=r"the test images have changed: 3 added"):
        finetune(replace(moved, test=tmp_path / "test"), resume=True)


def test_a_loss_that_is_no_number_stops_the_run(short, place, tmp_path):
    encoder = load_encoder(place / "artifact")
    about = encoder.artifact
    with torch.no_grad():
        encoder.norm.bias.fill_(float("nan"))
    save_artifact(tmp_path / "damaged", tensors=encoder.state_dict(), config=about)
    config = replace(to(short, tmp_path / "run"), artifact=tmp_path / "damaged")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CheckFailed, match=r"loss nan.* are in"),
    ):
        patch.setattr("torch.optim.AdamW.step", lambda *_: pytest.fail("the weights were touched"))
        finetune(config)
    written = load_file(tmp_path / "run" / "nonfinite" / "step-000001.safetensors")
    assert written["labels"].shape == written["seeds"].shape == (4,)
    assert not (tmp_path / "run" / "artifact").exists()


# the command ------------------------------------------------------------------------------------


def coma(*argv: object) -> int:
    return cli.main(["evaluate", *map(str, argv)])


SMALL = ["--steps", "4", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--log-steps", "2"]


def test_the_command_from_beginning_to_end(place, tmp_path, capsys, monkeypatch):
    run, out, flags = tmp_path / "run", tmp_path / "scores.json", ("--protocol", "knn", "finetune", "--k", 3)
    with pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 2)
        assert coma(place / "artifact", "--data", place / "data", *flags, "--run", run, *SMALL) == 130
    told = capsys.readouterr()
    assert f"resume with: coma evaluate --resume {run}" in told.err
    assert read_config(run, FinetuneConfig).data.crop_scale == (0.08, 1.0)

    drawn: list[Path] = []
    monkeypatch.setattr("pretrain.training.run_directory.loss_curve", lambda _, path: drawn.append(path))
    assert coma("--resume", run, "--out", out) == 0
    shown = capsys.readouterr()
    assert "resuming at step 3 of 4" in shown.err
    assert "finetune" in shown.out
    assert f"{run / 'artifact'} (of that step)" in shown.out
    assert "chosen on 6 validation images" in shown.out
    assert "on 9 test images, used once, at the end" in shown.out
    assert drawn == [run / "loss_curve.png"]
    (score,) = json.loads(out.read_text())["scores"]
    assert (score["protocol"], score["train_images"], score["test_images"]) == ("finetune", 12, 9)
    assert score["encoder"] == str(place / "artifact")
    assert score["top1"] == load_artifact(run / "artifact").config.trained["test_top1"]
    assert score["settings"].keys() == {"step", "last_step", "val_top1", "last_val_top1", "val_images"}

    scratch = ("--train", place / "data" / "train", "--test", place / "data" / "test", "--from-scratch")
    assert (
        coma(place / "artifact", *scratch, "--protocol", "finetune", "--run", tmp_path / "other", *SMALL) == 0
    )
    assert "random," in capsys.readouterr().out


def test_resuming_takes_the_settings_of_the_run(short, place, tmp_path):
    from pretrain.commands.evaluate import _finetune_config, parse

    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        stop_during(patch, 1)
        finetune(to(short, tmp_path / "run", mixup=0.3, layer_decay=0.5))
    saved = read_config(tmp_path / "run", FinetuneConfig)
    again = _finetune_config(parse(["--resume", str(tmp_path / "run")]))
    assert again.optimizer == saved.optimizer
    assert again.run == saved.run
    assert (again.artifact, again.test, again.from_scratch) == (
        saved.artifact,
        saved.test,
        saved.from_scratch,
    )
    longer = _finetune_config(parse(["--resume", str(tmp_path / "run"), "--steps", "9"]))
    assert longer.optimizer == replace(saved.optimizer, steps=9)


@pytest.fixture(scope="module")
def refused(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the flags below may point at, right or wrong."""
    folder = tmp_path_factory.mktemp("refused")
    paint(folder / "more" / "red-and-others", 3, seed=0)
    flat, single, wide = folder / "flat", folder / "single", folder / "wide"
    for part in ("train", "test"):
        for name, target in (("x", flat / part), ("y", single / part / "only")):
            target.mkdir(parents=True)
            Image.new("RGB", (20, 20), (9, 9, 9)).save(target / f"{name}.png")
        for name in COLOURS:
            (wide / part / name).mkdir(parents=True)
            for number in range(2):
                np.save(wide / part / name / f"{number}.npy", np.zeros((20, 20, 5), np.uint8))
    (folder / "foreign").mkdir()
    for name in ("red", "violet"):
        (folder / "foreign" / name).mkdir()
        Image.new("RGB", (20, 20)).save(folder / "foreign" / name / "0.png")
    classifier = publish(folder / "classifier", kind="classifier")
    places = {path.name: path for path in (flat, single, wide, folder / "foreign", classifier)}
    return places | {
        "DATA": place / "data",
        "ARTIFACT": place / "artifact",
        "TRAIN": place / "data" / "train",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "ARTIFACT --data flat",
            "flat/train: has no labels; give a folder with one folder of",
        ),
        ("ARTIFACT --data single", "has no labels"),
        ("ARTIFACT --train TRAIN --test foreign", "has no image: violet; it has blue, green, red"),
        ("ARTIFACT --data wide", "5 channels, but the model takes 3"),
        ("classifier --data DATA", "its kind is 'classifier'; give a 'backbone' or 'pretrained' artifact"),
        ("ARTIFACT --data DATA --image-size 20", "--image-size 20: must be a multiple of the 8 px mask unit"),
        ("ARTIFACT --data DATA --batch-size 5", "5 images per pass: mixup and CutMix pair them"),
        ("ARTIFACT --data DATA --micro-batch 3", "--batch-size 4 cannot be shared out"),
        ("ARTIFACT --data DATA --log-steps 0", "--log-steps 0 must be at least 1"),
        ("ARTIFACT --data DATA --steps 0", "--steps 0 must be at least 1"),
        ("ARTIFACT --data DATA --layer-decay 7", "--layer-decay 7 must be more than 0"),
        ("ARTIFACT ARTIFACT --data DATA", "takes one artifact at a time"),
        ("ARTIFACT", "give --data, or both --train and --test"),
        ("--resume ARTIFACT", "config.json: is of an artifact, not of a run; give a run directory"),
    ],
)
def test_the_command_refuses_with_one_line(refused, tmp_path, capsys, argv, message):
    words = [str(refused.get(word, word)) for word in argv.split()]
    flags = [*SMALL[:4], *words, "--run", str(tmp_path / "run"), "--protocol", "finetune"]
    assert coma(*(words if words[0] == "--resume" else flags)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_place_and_one_process(place, whole, capsys, monkeypatch):
    given = (place / "artifact", "--data", place / "data", "--protocol", "finetune")
    assert coma(*given) == 2
    assert "needs a directory for its run, for example --run" in capsys.readouterr().err
    assert coma("--resume", whole, "--run", "elsewhere") == 2
    assert "do not go with --resume" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert coma(*given, "--run", "nowhere") == 2
    assert "start it without torchrun" in capsys.readouterr().err
