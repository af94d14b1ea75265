"""Heads of classifiers: on frozen features, kept, with weights, for any number of classes."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classifier_runs import COLOURS, TAGS, paint_one, rows, save_classifier, tag, to
from short_runs import Killed, assert_same, killed_in

from coma.artifact import (
    LINEAR_HEAD,
    MULTI_LABEL,
    load_artifact,
    load_classifier,
    load_encoder,
    save_artifact,
)
from coma.cli import main
from coma.errors import BadInput
from downstream.classify.evaluate import evaluate_classifier as measure
from downstream.classify.finetune import finetune
from downstream.classify.predict import predict_classes

pytestmark = pytest.mark.usefixtures("no_curves")


def test_a_linear_head_learns_and_leaves_the_encoder(linear, short, place):
    classifier = load_classifier(linear / "artifact")
    before = load_encoder(short.artifact).state_dict()
    assert all(torch.equal(classifier.state_dict()[name], tensor) for name, tensor in before.items())
    trained = classifier.artifact.trained
    assert (trained["method"], trained["images"], trained["test_images"]) == ("linear", 12, 9)
    assert trained["test_top1"] == 1.0 and 0 < trained["penalty"] <= 10
    (row,) = rows(linear)
    assert (row["val_top1"], row["test_top1"]) == (trained["val_top1"], 1.0)
    assert measure(linear / "artifact", place / "data", workers=0)["top1"] == 1.0


def test_a_head_is_fitted_again_by_resume(linear, tmp_path, capsys):
    shutil.copytree(linear, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifact")
    assert main(["classify", "train", "--resume", str(tmp_path / "run")]) == 0
    tensors, again = (load_artifact(run / "artifact").tensors for run in (linear, tmp_path / "run"))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert "linear head on frozen features; validation: top-1" in capsys.readouterr().out


def test_random_features_are_the_baseline_of_a_head(short, tmp_path):
    config = replace(to(short, tmp_path / "run", frozen=True, hold_out=0.0), from_scratch=True)
    result = finetune(config)
    before = load_encoder(short.artifact).state_dict()
    assert not torch.equal(
        load_artifact(result.artifact).tensors["stem.conv.weight"], before["stem.conv.weight"]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 3", "--epochs: no effect with --frozen"),
        ("--mixup 0 --no-flip", "--flip, --mixup: no effect with --frozen"),
        ("--frozen-stages 1", "--frozen freezes the whole encoder; leave --frozen-stages out"),
        ("--class-balance sampling", "uses all images at once; give --class-balance weights"),
    ],
)
def test_what_a_frozen_run_ignores_is_refused(place, tmp_path, capsys, flags, message):
    words = [str(place / "artifact"), "--data", str(place / "data"), "--out", str(tmp_path / "run")]
    assert main(["classify", "train", *words, "--frozen", *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_the_same_classes_keeps_its_head(short, place, tmp_path, capsys):
    still = {"steps": 1, "base_lr": 1e-30, "weight_decay": 0.0, "ema_decay": 0.0}
    turned = save_classifier(tmp_path / "turned", ("red", "blue", "green"))
    tensors = load_artifact(turned).tensors
    result = finetune(replace(to(short, tmp_path / "a", **still), artifact=turned))
    kept = load_artifact(result.artifact)
    assert kept.config.class_names == COLOURS
    for name in ("head.weight", "head.bias"):
        assert torch.allclose(kept.tensors[name], tensors[name][[1, 2, 0]], rtol=0, atol=1e-20)
    assert "encoder and head (its classes, sorted as those of these images)" in capsys.readouterr().err
    for names, multi_label, why in (
        (("cat", "dog", "red"), False, "since its classes are cat, dog, red; these images: blue, green, red"),
        (COLOURS, True, "since that one is for any number of classes per image"),
    ):
        other = save_classifier(tmp_path / why[:9], names, multi_label=multi_label)
        result = finetune(replace(to(short, tmp_path / f"run{multi_label}", **still), artifact=other))
        shown = capsys.readouterr().err
        assert f"the head is new, {why}" in shown
        assert not torch.allclose(
            load_artifact(result.artifact).tensors["head.weight"], tensors["head.weight"]
        )


def test_a_detector_gives_its_encoder(short, tmp_path, capsys):
    tensors = {f"backbone.encoder.{name}": t for name, t in load_encoder(short.artifact).state_dict().items()}
    about = replace(load_artifact(short.artifact).config, kind="detector", head={"library": "mmdet"})
    save_artifact(tmp_path / "d", tensors=tensors | {"rpn_head.w": torch.zeros(1)}, config=about)
    finetune(replace(to(short, tmp_path / "run", frozen=True), artifact=tmp_path / "d"))
    assert "starts from the encoder of the detector" in capsys.readouterr().err


def test_balanced_class_weights_reach_the_loss(short, tmp_path, capsys):
    data = Path(shutil.copytree(short.data.images, tmp_path / "data"))
    for path in sorted((data / "train" / "red").iterdir())[1:]:
        path.unlink()
    config = replace(short, data=replace(short.data, images=data))
    losses = []
    for how in ("none", "weights"):
        run = finetune(to(config, tmp_path / how, class_balance=how)).config.run.out
        losses.append([row["loss"] for row in rows(run) if "loss" in row])
    assert losses[0] != losses[1]
    assert "class weights: 0.75 (blue) to 3 (red)" in capsys.readouterr().err
    finetune(to(config, tmp_path / "frozen", class_balance="weights", frozen=True))


def test_a_class_of_one_in_a_hundred_is_learned_by_balanced_sampling(short, tmp_path, capsys):
    for split, counts in {"train": {"blue": 200, "red": 2}, "test": {"blue": 20, "red": 20}}.items():
        for colour, count in counts.items():
            paint_one(tmp_path / "data" / split / colour, colour, count)
    recipe = {"steps": 24, "batch_size": 8, "micro_batch": None, "base_lr": 0.3, "ema_decay": 0.8}
    quiet = {"rand_augment": 0, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0}
    config = replace(to(short, tmp_path), data=replace(short.data, images=tmp_path / "data", image_size=16))
    top1 = {}
    for how in ("none", "sampling"):
        run = to(config, tmp_path / how, **recipe, **quiet, class_balance=how, hold_out=0.0)
        result = finetune(replace(run, run=replace(run.run, save_steps=None)))
        top1[how] = result.test.top1
    assert top1["none"] == 0.5 and top1["sampling"] >= 0.9  # without it, everything is blue
    assert (
        "balanced sampling: an epoch of 202 samples shows each of 2 classes 101 times: an image of the "
        "rarest 50.5 times, one of the most frequent 0.505 times\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("many", [False, True])
def test_a_run_with_balanced_sampling_resumes_to_the_same_weights(short, tmp_path, capsys, many):
    data = tag(tmp_path / "data", {"train": 12, "val": 6, "test": 8}) if many else short.data.images
    config = replace(short, data=replace(short.data, images=data, image_size=16))
    whole = to(config, tmp_path / "whole", class_balance="sampling")
    finetune(whole)
    assert ("images of several classes have the turns of each" in capsys.readouterr().err) is many
    cut = to(config, tmp_path / "cut", class_balance="sampling")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, 5)
        finetune(cut)
    with pytest.raises(BadInput, match="class_balance sampling -> none"):
        finetune(to(cut, cut.run.out, class_balance="none"), resume=True)
    finetune(cut, resume=True)
    assert_same(whole.run.out, cut.run.out)


def test_any_number_of_classes_from_a_csv_file(short, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    data = tag(tmp_path / "data", {"train": 24, "val": 12, "test": 16})
    recipe = {"steps": 60, "batch_size": 12, "micro_batch": None, "base_lr": 0.3, "ema_decay": 0.8}
    config = to(short, tmp_path / "run", **recipe, rand_augment=0, drop_path=0.0, class_balance="weights")
    config = replace(config, data=replace(short.data, images=data, image_size=16))
    result = finetune(replace(config, run=replace(config.run, save_steps=None)))
    assert result.best is not None and result.test.top1 is None
    assert result.test.mean_ap is not None and result.test.mean_ap > 0.9  # chance is about 0.4
    shown = capsys.readouterr().err
    assert "checkpoint: chosen by mAP on 12 images" in shown and "validation: mAP" in shown
    assert "24 images, 3 classes, 1.2 per image" in caplog.text
    about = load_artifact(result.artifact).config
    assert about.class_names == TAGS and about.head == LINEAR_HEAD | {MULTI_LABEL: True}
    assert about.trained["test_mean_ap"] == result.test.mean_ap and "test_top1" not in about.trained

    scores = measure(result.artifact, data, out=tmp_path / "report", workers=0)
    assert scores["mean_ap"] == pytest.approx(result.test.mean_ap)
    assert scores["split"] == "test" and [row["name"] for row in scores["classes"]] == list(TAGS)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"scores.json", "reliability.png"}

    predict_classes(result.artifact, [data / "test"], out=tmp_path / "p", top_k=1, workers=0)
    lines = list(csv.DictReader((tmp_path / "p" / "predictions.csv").read_text().splitlines()))
    assert lines[0].keys() == {"path", "labels", "class_1", "score_1"}
    assert {line["labels"] for line in lines} > {"green;red"} or {"red;green"} <= {x["labels"] for x in lines}
    plain = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert plain["multi_label"] and all(len(each["classes"]) == 1 for each in plain["predictions"])


def test_a_frozen_head_for_any_number_of_classes(short, tmp_path):
    data = tag(tmp_path / "data", {"train": 24, "test": 16})
    config = replace(short, data=replace(short.data, images=data, image_size=16))
    result = finetune(to(config, tmp_path / "run", frozen=True))
    assert result.best is not None and result.best.images == 2  # held out
    assert result.test.mean_ap is not None and result.test.mean_ap > 0.9


def test_the_two_forms_of_labels_are_not_mixed(place, tmp_path):
    data = tag(tmp_path / "data", {"train": 4, "test": 4})
    one, any_number = save_classifier(tmp_path / "a"), save_classifier(tmp_path / "b", multi_label=True)
    with pytest.raises(BadInput, match=r"its images have any number of classes, but .* is for one"):
        measure(one, data, workers=0)
    with pytest.raises(BadInput, match=r"have one class, but those of .* any number of classes; give a CSV"):
        measure(any_number, place / "data", workers=0)
    (data / "test.csv").write_text("image,labels\ntest/0.png,\ntest/1.png,purple\n")
    with pytest.raises(BadInput, match=r"does not have the classes purple \(first in .*test.csv:3\)"):
        measure(any_number, data, workers=0)
    (data / "test.csv").write_text("image,dark\ntest/0.png,0\n")
    with pytest.raises(BadInput, match="no image has a class"):
        measure(save_classifier(tmp_path / "c", TAGS, multi_label=True), data, workers=0)
