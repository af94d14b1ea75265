"""`coma classify predict` is stopped, killed and resumed: nothing is lost, nothing is there twice."""

import csv
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_runs import save_classifier
from export_files import open_as_int8
from PIL import Image
from short_runs import Killed, everything_in

from coma.cli import main
from coma.errors import BadInput, ComaError, Interrupted
from downstream.classify import predict as predicting
from downstream.classify.inference import classify_images
from downstream.classify.predict import predict_classes
from downstream.classify.predictions import PredictionParts

QUICK: dict[str, Any] = {"device": "cpu", "workers": 0, "batch_size": 2, "part_images": 4}
RESULTS = ["contact_sheet.png", "predictions.csv", "predictions.json"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("c") / "artifact", multi_label=True)


@pytest.fixture(scope="module")
def photos(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 images and one broken file."""
    folder = shutil.copytree(place / "data", tmp_path_factory.mktemp("photos") / "photos")
    (folder / "test" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(classifier: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    found = predict_classes(classifier, [photos], out=out, **{**QUICK, "batch_size": 64, "part_images": 64})
    assert len(found) == 27 and len(found.skipped) == 1
    return out


def same(out: Path, other: Path) -> bool:
    """Whether the files say the same, with scores equal to what batches of other sizes give."""
    rows, others = (list(csv.reader((each / RESULTS[1]).read_text().splitlines())) for each in (out, other))
    plain, plain_other = (json.loads((each / RESULTS[2]).read_text()) for each in (out, other))
    entries, other_entries = plain.pop("predictions"), plain_other.pop("predictions")
    assert [row[0] for row in rows[1:]] == [entry["path"] for entry in entries]
    for row, entry in zip(rows[1:], entries, strict=True):
        assert row[1] == ";".join(entry["labels"])
        assert row[2::2] == [each["name"] for each in entry["classes"]]
    for entry, other_entry in zip(entries, other_entries, strict=True):
        assert (entry["path"], entry["labels"]) == (other_entry["path"], other_entry["labels"])
        for one, two in zip(entry["classes"], other_entry["classes"], strict=True):
            assert one["name"] == two["name"] and one["score"] == pytest.approx(two["score"], abs=2e-6)
    return len(rows) == len(others) and plain == plain_other and rows[0] == others[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_continues(classifier, photos, undisturbed, tmp_path, monkeypatch, caplog, number):
    caplog.set_level("INFO")
    out, real, seen = tmp_path / "out", classify_images, []

    def interrupted(*given: Any, **how: Any) -> Any:
        for count, batch in enumerate(real(*given, **how)):
            if count == 5:
                signal.raise_signal(number)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(predicting, "classify_images", interrupted)
        with pytest.raises(Interrupted, match=r"predictions\.parts keeps its finished parts; run the same"):
            predict_classes(classifier, [photos], out=out, **QUICK)
    assert sorted(path.name for path in out.iterdir()) == ["predictions.parts"]
    assert len(list((out / "predictions.parts").glob("part-*.jsonl"))) == 2  # of 4 images each

    def watched(*given: Any, **how: Any) -> Any:
        for batch in real(*given, **how):
            seen.extend(batch.indices)
            yield batch

    monkeypatch.setattr(predicting, "classify_images", watched)
    predict_classes(classifier, [photos], out=out, **QUICK)
    assert "8 images of 28 are done already" in caplog.text
    assert min(seen) == 8 and len(seen) == len(set(seen))
    assert same(out, undisturbed) and sorted(path.name for path in out.iterdir()) == RESULTS


@pytest.mark.parametrize("what", ["write", "write_results", "remove"])
def test_a_kill_loses_nothing(classifier, photos, undisturbed, tmp_path, monkeypatch, what):
    out, real, calls = tmp_path / "out", getattr(PredictionParts, what), []

    def killed(self: Any, *given: Any) -> None:
        calls.append(what)
        if len(calls) == 3 or what != "write":
            (self.folder / ".part-000002.jsonl.part").write_bytes(b"half")
            raise Killed
        real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PredictionParts, what, killed)
        predict_classes(classifier, [photos], out=out, **QUICK)
    kept = everything_in(out / "predictions.parts")
    assert sum(path.suffix == ".jsonl" for path in kept) == (2 if what == "write" else 7)
    words = [str(classifier), str(photos), "--out", str(out), "--device", "cpu", "--workers", "0"]
    assert main(["classify", "predict", *words]) == 2  # with parts of 256 images
    predict_classes(classifier, [photos], out=out, **QUICK)
    assert same(out, undisturbed) and sorted(path.name for path in out.iterdir()) == RESULTS
    with Image.open(out / "contact_sheet.png") as one, Image.open(undisturbed / "contact_sheet.png") as two:
        assert one.size == two.size


def test_parts_of_another_request_are_refused(classifier, photos, tmp_path, monkeypatch):
    out, own = tmp_path / "out", shutil.copytree(photos, tmp_path / "photos")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PredictionParts, "write_results", lambda *_: (_ for _ in ()).throw(Killed()))
        predict_classes(classifier, [own], out=out, **QUICK)
    with pytest.raises(BadInput, match=r"another request \(top_k 3 there, 1 now\); remove this folder"):
        predict_classes(classifier, [own], out=out, top_k=1, **QUICK)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"\(precision fp32 there, int8 now\)"):
        patch.setattr("downstream.classify.inference.open_model", open_as_int8)
        predict_classes(classifier, [own], out=out, **QUICK)
    torch.manual_seed(9)
    other = save_classifier(tmp_path / "other", ("a", "b", "c"), multi_label=False)
    with pytest.raises(BadInput, match=r"predictions\.parts: is of another request \(model "):
        predict_classes(other, [own], out=out, **QUICK)
    (own / "test" / "bad.png").write_bytes(b"no image either")
    with pytest.raises(BadInput, match="names or sizes of the images have changed since"):
        predict_classes(classifier, [own], out=out, **QUICK)


def test_damaged_parts_and_a_full_disk_say_what_to_do(classifier, photos, undisturbed, tmp_path, monkeypatch):
    out, left, write = tmp_path / "out", [2_500], os.write

    def nearly_full(number: int, data: Any) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, data)

    with monkeypatch.context() as patch, pytest.raises(ComaError, match=r"No space left.* finished part"):
        patch.setattr(os, "write", nearly_full)
        predict_classes(classifier, [photos], out=out, **QUICK)
    part = out / "predictions.parts" / "part-000000.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ComaError, match=r"part-000000\.jsonl: damaged .*; remove it, and run the same"):
        predict_classes(classifier, [photos], out=out, **QUICK)
    part.unlink()
    predict_classes(classifier, [photos], out=out, **QUICK)
    assert same(out, undisturbed)


def test_a_part_of_broken_images_is_a_part(classifier, photos, tmp_path):
    own = tmp_path / "photos"
    own.mkdir()
    for number in range(9):
        (own / f"{number}.png").write_bytes(b"no image")
    shutil.copy(photos / "test" / "red" / "02.png", own / "9.png")
    found = predict_classes(classifier, [own], out=tmp_path / "out", **QUICK)
    assert len(found) == 1 and len(found.skipped) == 9
    assert [Path(each["path"]).name for each in found] == ["9.png"]
