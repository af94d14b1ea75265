"""`coma classify test`, `predict` and `check`, by artifact and exports; heads on frozen features."""

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifier_runs import COLOURS, paint, rows, to
from PIL import Image
from short_runs import MODEL

from coma.artifact import (
    LINEAR_HEAD,
    MULTI_LABEL,
    ArtifactConfig,
    library_versions,
    load_artifact,
    load_classifier,
    load_encoder,
    save_artifact,
)
from coma.cli import main
from coma.config import FinetuneConfig
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.models.classifiers import build_classifier
from coma.runtimes.find import RuntimeName, open_model
from downstream.classify import predict as predicting
from downstream.classify.evaluate import evaluate_classifier as measure
from downstream.classify.finetune import finetune
from downstream.classify.inference import classify_images, open_classifier
from downstream.classify.predict import predict_classes

pytestmark = pytest.mark.usefixtures("no_curves")
TAGS = ("dark", "green", "red")


def save_classifier(path: Path, names: tuple[str, ...] = COLOURS, *, multi_label: bool = False) -> Path:
    """A classifier with random weights."""
    torch.manual_seed(3)
    head = LINEAR_HEAD | ({MULTI_LABEL: True} if multi_label else {})
    about = ArtifactConfig(
        "classifier", MODEL, None, 16, (0.5,) * 3, (0.25,) * 3, names, {}, library_versions(), head
    )
    save_artifact(path, tensors=build_classifier(MODEL, len(names)).state_dict(), config=about)
    return path


def tag(folder: Path, counts: dict[str, int]) -> Path:
    """Pictures that are red, green, both or dark, with a CSV file per split."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        lines = ["image,labels"]
        for number in range(count):
            tags = [name for name, bit in zip(TAGS[1:], (1, 2), strict=True) if number & bit] or ["dark"]
            pixels = rng.integers(0, 60, (18, 18, 3))
            pixels[:, :, 0] += 150 * ("red" in tags)
            pixels[:, :, 1] += 150 * ("green" in tags)
            path = folder / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            lines.append(f"{split}/{number}.png,{';'.join(tags)}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def linear(short: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a linear head on frozen features."""
    out = tmp_path_factory.mktemp("linear") / "run"
    finetune(to(short, out, frozen=True))
    return out


@pytest.fixture(scope="module")
def exported(linear: Path) -> Path:
    """The folder of its exports."""
    assert main(["export", str(linear / "artifact"), "--benchmark-seconds", "0", "--verify-images", "4"]) == 0
    return linear / "export"


# a head on frozen features ------------------------------------------------------------------------


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
    ],
)
def test_what_a_frozen_run_ignores_is_refused(place, tmp_path, capsys, flags, message):
    words = [str(place / "artifact"), "--data", str(place / "data"), "--out", str(tmp_path / "run")]
    assert main(["classify", "train", *words, "--frozen", *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# what a run starts from ---------------------------------------------------------------------------


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
    for how in ("none", "balanced"):
        run = finetune(to(config, tmp_path / how, class_weights=how)).config.run.out
        losses.append([row["loss"] for row in rows(run) if "loss" in row])
    assert losses[0] != losses[1]
    assert "class weights: 0.75 (blue) to 3 (red)" in capsys.readouterr().err
    finetune(to(config, tmp_path / "frozen", class_weights="balanced", frozen=True))


# any number of classes per image ------------------------------------------------------------------


def test_any_number_of_classes_from_a_csv_file(short, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    data = tag(tmp_path / "data", {"train": 24, "val": 12, "test": 16})
    recipe = {"steps": 60, "batch_size": 12, "micro_batch": None, "base_lr": 0.3, "ema_decay": 0.8}
    config = to(short, tmp_path / "run", **recipe, rand_augment=0, drop_path=0.0, class_weights="balanced")
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


# test ---------------------------------------------------------------------------------------------


def test_it_is_measured_and_drawn(linear, place, tmp_path, capsys, caplog):
    report = tmp_path / "report"
    words = ["--data", str(place / "data"), "--out", str(report), "--device", "cpu"]
    assert main(["classify", "test", str(linear / "artifact"), *words]) == 0
    shown = capsys.readouterr()
    assert "test split: 9 images of" in shown.out and "balanced accuracy" in shown.out
    assert "classes: matched by name, 3 of 3 have images" in caplog.text
    scores = json.loads((report / "scores.json").read_text())
    assert scores["confusion"] == [[3, 0, 0], [0, 3, 0], [0, 0, 3]] and scores["top5"] is None
    assert {path.name for path in report.iterdir()} == {
        "scores.json",
        "confusion_matrix.png",
        "reliability.png",
    }
    assert measure(linear / "artifact", place / "data", split="val", workers=0)["images"] == 6
    assert measure(linear / "artifact", place / "data" / "val", workers=0)["split"] is None


def test_classes_are_matched_by_name_and_may_be_fewer(place, tmp_path):
    classifier = save_classifier(tmp_path / "c")
    scores = measure(classifier, place / "data", workers=0)
    turned = save_classifier(tmp_path / "t", ("red", "blue", "green"))
    tensors = load_artifact(classifier).tensors
    for name in ("head.weight", "head.bias"):
        tensors[name] = tensors[name][[2, 0, 1]]
    save_artifact(turned, tensors=tensors, config=load_artifact(turned).config)
    again = measure(turned, place / "data", workers=0)
    by_name = {row["name"]: row for row in again["classes"]}
    assert again["top1"] == scores["top1"]
    assert [by_name[row["name"]] for row in scores["classes"]] == scores["classes"]
    fewer = shutil.copytree(place / "data" / "test", tmp_path / "fewer")
    shutil.rmtree(fewer / "red")
    found = measure(classifier, fewer, workers=0)
    assert found["classes"][2] == {
        "name": "red",
        "precision": found["classes"][2]["precision"],
        "recall": None,
        "f1": found["classes"][2]["f1"],
        "support": 0,
    }
    assert len(found["confusion"]) == 3


@pytest.mark.parametrize("case", ["foreign", "one class", "empty class", "unlabelled", "no such split"])
def test_data_that_do_not_fit_are_refused(place, tmp_path, case):
    classifier, data = save_classifier(tmp_path / "c"), tmp_path / "data"
    shutil.copytree(place / "data" / "test", data)
    split, message = None, ""
    if case == "foreign":
        (data / "red").rename(data / "Red")
        message = r"does not have the classes Red; it has blue, green, red \(upper and lower case"
    elif case == "one class":
        shutil.rmtree(data / "red")
        shutil.rmtree(data / "blue")
        message = "has no labels|no labels"
    elif case == "empty class":
        for path in (data / "red").iterdir():
            path.unlink()
        assert measure(classifier, data, workers=0)["classes"][2]["support"] == 0
        return
    elif case == "unlabelled":
        for path in data.glob("*/*.png"):
            path.rename(data / f"{path.parent.name}-{path.name}")
        message = "no labels"
    else:
        split, message = "val", "no split 'val' here"
    with pytest.raises(BadInput, match=message):
        measure(classifier, data, split=split, workers=0)


# predict ------------------------------------------------------------------------------------------


def test_folders_and_files_are_labelled(linear, place, tmp_path, capsys, caplog):
    bad = tmp_path / "photos" / "bad.png"
    shutil.copytree(place / "data", tmp_path / "photos")
    bad.write_bytes(b"no image")
    alone = tmp_path / "alone.png"
    shutil.copy(place / "data" / "test" / "red" / "02.png", alone)
    out = tmp_path / "out"
    words = [str(linear / "artifact"), str(tmp_path / "photos"), str(alone), "--out", str(out)]
    assert main(["classify", "predict", *words, "--top-k", "9", "--device", "cpu", "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "--top-k 9: the classifier has 3 classes, and all of them are given" in caplog.text
    assert caplog.text.count("skipped 1 image that cannot be read: ") == 1 and "bad.png" in caplog.text
    assert "28 images labelled" in shown.out
    lines = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert len(lines) == 28 and lines[-1]["path"] == str(alone) and lines[-1]["class_1"] == "red"
    for line in lines:
        parts = [float(line[f"score_{i}"]) for i in (1, 2, 3)]
        assert parts == sorted(parts, reverse=True) and sum(parts) == pytest.approx(1, abs=1e-5)
    plain = json.loads((out / "predictions.json").read_text())
    assert plain["class_names"] == list(COLOURS) and len(plain["skipped"]) == 1
    assert [each["path"] for each in plain["predictions"]] == [line["path"] for line in lines]
    assert plain["predictions"][-1]["classes"][0]["name"] == "red"
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 176
    assert main(["classify", "predict", *words]) == 2
    assert "is not empty; choose another" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_done(linear, place, tmp_path, monkeypatch, number):
    real = classify_images

    def interrupted(*given: Any, **how: Any) -> Any:
        for count, batch in enumerate(real(*given, **how)):
            if count == 2:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(predicting, "classify_images", interrupted)
    with pytest.raises(
        Interrupted, match=r"interrupted; .*predictions.csv and .json hold the first 4 of 27 images"
    ):
        predict_classes(linear / "artifact", [place / "data"], out=tmp_path / "out", batch_size=2, workers=0)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 5
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.csv",
        "predictions.json",
    ]


def test_images_that_cannot_be_classified(linear, tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no image")
    artifact = linear / "artifact"
    with pytest.raises(BadInput, match=r"none of 1 images could be read; the first: .*bad\.png"):
        predict_classes(artifact, [tmp_path], out=tmp_path / "out", workers=0)
    with pytest.raises(BadInput, match="no such file; give image files"):
        predict_classes(artifact, [tmp_path / "gone.png"], out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no image in this folder"):
        predict_classes(artifact, [tmp_path / "empty"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    paint(tmp_path / "data", 3, seed=0)
    model = open_classifier(artifact, "auto", "cpu")
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: {"logits": torch.full((3, 3), torch.nan)})
    with pytest.raises(CheckFailed, match="the outputs are not finite"):
        predict_classes(artifact, [tmp_path / "data"], out=tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict C --out OUT", "coma classify predict needs IMAGES"),
        ("predict C DATA", "coma classify predict needs --out"),
        ("predict C DATA --out OUT --top-k 0", "--top-k 0 must be at least 1"),
        ("predict C DATA --out OUT --batch-size 0", "--batch-size 0 must be at least 1"),
        ("predict C DATA --out OUT --workers -1", "--workers -1 must be 0 to 4096"),
        ("predict C DATA --out OUT --runtime openvino", "must be auto, pytorch, onnxruntime or tensorrt"),
        ("predict C DATA --out OUT --runtime onnxruntime", "has no manifest.json; run coma export"),
        ("predict B DATA --out OUT", "its kind is 'backbone'; give a classifier"),
        ("predict GONE DATA --out OUT", "no such directory"),
        ("test C", "coma classify test needs --data"),
        ("test C --data DATA --split later", "must be train, val or test"),
        ("test C --data DATA --batch-size 0", "--batch-size 0 must be at least 1"),
        ("test B --data DATA", "its kind is 'backbone'; give a classifier"),
        ("check --data GONE", "no such file or folder"),
        ("label C", "no verb 'label'; choose one of train, test, predict, check"),
    ],
)
def test_the_commands_refuse_with_one_line(place, linear, tmp_path, capsys, words, message):
    places = {"C": tmp_path / "c", "B": place / "artifact", "DATA": place / "data", "OUT": tmp_path / "out"}
    save_classifier(places["C"])
    places["GONE"] = tmp_path / "gone"
    assert main(["classify", *(str(places.get(word, word)) for word in words.split())]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_described(place, tmp_path, capsys):
    assert main(["classify", "check", "--data", str(place / "data")]) == 0
    shown = capsys.readouterr().out
    assert "images of green" in shown and "no errors found" in shown
    data = tag(tmp_path, {"train": 8, "test": 4})
    assert main(["classify", "check", "--data", str(data)]) == 0
    assert "images of dark" in capsys.readouterr().out


# runtimes -----------------------------------------------------------------------------------------


def test_pytorch_and_onnx_runtime_agree(linear, exported, place, tmp_path, capsys):
    file, artifact = exported / "classifier.onnx", linear / "artifact"
    ways: list[tuple[Path, RuntimeName]] = [
        (artifact, "auto"),
        (artifact, "onnxruntime"),
        (file, "auto"),
        (exported, "auto"),
    ]
    found = [
        predict_classes(
            path, [place / "data"], out=tmp_path / str(i), runtime=runtime, device="cpu", workers=0
        )
        for i, (path, runtime) in enumerate(ways)
    ]
    for each in found[1:]:
        assert torch.equal(each.classes, found[0].classes) and each.names == found[0].names
        assert torch.allclose(each.scores, found[0].scores, atol=1e-5)
    about = [json.loads((tmp_path / str(i) / "predictions.json").read_text())["runtime"] for i in (0, 1, 3)]
    assert about[0].startswith("torch ") and about[1] == about[2] and about[1].startswith("ONNX Runtime")
    scores = [measure(path, place / "data", workers=0, device="cpu") for path in (artifact, exported)]
    assert scores[0]["confusion"] == scores[1]["confusion"]
    assert scores[0]["calibration"]["error"] == pytest.approx(scores[1]["calibration"]["error"], abs=1e-5)


def test_a_fixed_batch_is_filled_up(linear, place, tmp_path):
    out = ["--out", str(tmp_path / "fixed"), "--shapes", "4x3x24x24"]
    quick = ["--benchmark-seconds", "0", "--verify-images", "4"]
    assert main(["export", str(linear / "artifact"), *out, *quick]) == 0
    found = predict_classes(tmp_path / "fixed", [place / "data"], out=tmp_path / "p", device="cpu", workers=0)
    assert len(found.indices) == 27 and found.scores.shape == (27, 3)


def test_models_of_other_kinds_and_runtimes_are_refused(linear, exported, place, tmp_path):
    with pytest.raises(BadInput, match=r"--runtime pytorch: .* holds exported files; give the artifact"):
        open_model(exported, "classifier", "pytorch")
    with pytest.raises(BadInput, match=r"--runtime tensorrt: does not run classifier.onnx"):
        open_model(exported / "classifier.onnx", "classifier", "tensorrt")
    with pytest.raises(BadInput, match=r"has no \.engine file of a classifier, only classifier\.onnx"):
        open_model(linear / "artifact", "classifier", "tensorrt")
    with pytest.raises(BadInput, match="is a graph of the classifier, not of the encoder"):
        open_model(exported / "classifier.onnx", "encoder", device="cpu")
    (tmp_path / "x.engine").write_bytes(b"")
    with pytest.raises(BadInput, match=r"--device cpu: .*is an engine, which runs on a GPU"):
        open_model(tmp_path / "x.engine", "classifier", device="cpu")
    other = shutil.copytree(exported, tmp_path / "export")
    save_classifier(tmp_path / "artifact")
    with pytest.raises(BadInput, match=r"has files of another artifact; run coma export"):
        open_model(tmp_path / "artifact", "classifier", "onnxruntime")
    with (other / "classifier.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadInput, match="has changed since its verification"):
        open_model(other, "classifier", device="cpu")
