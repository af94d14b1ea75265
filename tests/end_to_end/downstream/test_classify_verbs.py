"""`coma classify test`, `predict` and `check`, by artifact and exports."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from classifier_runs import COLOURS, paint, save_classifier, tag
from PIL import Image

from coma.artifact import (
    load_artifact,
    save_artifact,
)
from coma.cli import main
from coma.errors import BadInput, CheckFailed
from coma.runtimes.find import open_model
from coma.runtimes.names import RuntimeName
from downstream.classify.evaluate import evaluate_classifier as measure
from downstream.classify.inference import open_classifier
from downstream.classify.predict import predict_classes

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def exported(linear: Path) -> Path:
    """The folder of its exports."""
    assert main(["export", str(linear / "artifact"), "--benchmark-seconds", "0", "--verify-images", "4"]) == 0
    return linear / "export"


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
        (
            "predict C DATA --out OUT --runtime coreml",
            "must be auto, pytorch, onnxruntime, openvino, openvino-gpu",
        ),
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
    broken = next(data.rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:60])
    assert main(["classify", "check", "--data", str(data)]) == 1
    shown = capsys.readouterr()
    assert "images of dark" in shown.out and "no errors found" not in shown.out
    assert f"1 image that cannot be decoded: {broken}: " in shown.err


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
        assert each.names == found[0].names
        for one, other in zip(each, found[0], strict=True):
            assert [c["name"] for c in one["classes"]] == [c["name"] for c in other["classes"]]
            scores = [c["score"] for c in other["classes"]]
            assert [c["score"] for c in one["classes"]] == pytest.approx(scores, abs=1e-5)
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
    assert len(found) == 27 and all(len(each["classes"]) == 3 for each in found)


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
