"""Classifiers, features and searches read images from remote storage; secrets are kept nowhere."""

import csv
import json
import tarfile
from pathlib import Path

import pytest
from classifier_runs import paint, save_classifier
from export_files import backbone
from remote_files import FileServer, impatient, server  # noqa: F401 (fixtures)

from coma.cli import main

QUICK = ["--device", "cpu", "--workers", "0"]
SECRET = "token=hush"


@pytest.fixture
def photos(server: FileServer, tmp_path: Path) -> Path:  # noqa: F811
    """Twelve pictures of three classes, and their shard on the server; every fifth request fails."""
    folder = tmp_path / "photos"
    paint(folder, 12, seed=0)
    with tarfile.open(server.folder / "photos.tar", "w") as tar:
        for number, path in enumerate(sorted(folder.rglob("*.png"))):
            (folder / f"{number}.cls").write_text(str(("blue", "green", "red").index(path.parent.name)))
            tar.add(path, f"{number}.png")
            tar.add(folder / f"{number}.cls", f"{number}.cls")
            (folder / f"{number}.cls").unlink()
    server.fails_every = 5
    return folder


def everything_written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_classifier_tests_and_labels_remote_images(photos, server, tmp_path, capsys):  # noqa: F811
    address = f"{server.url}/photos.tar?{SECRET}"
    classifier = str(save_classifier(tmp_path / "c", ("0", "1", "2")))
    scores = []
    for name, data in (("remote", address), ("local", str(server.folder / "photos.tar"))):
        report = ["--out", str(tmp_path / name)]
        assert main(["classify", "test", classifier, "--data", data, *report, *QUICK]) == 0
        scores.append(json.loads((tmp_path / name / "scores.json").read_text()))
        out = tmp_path / f"{name}-predictions"
        assert main(["classify", "predict", classifier, data, "--out", str(out), *QUICK]) == 0
    assert scores[0]["confusion"] == scores[1]["confusion"] and scores[0]["images"] == 12
    assert scores[0]["data"] == f"{server.url}/photos.tar?***"
    rows = [
        list(csv.DictReader((tmp_path / f"{name}-predictions" / "predictions.csv").read_text().splitlines()))
        for name in ("remote", "local")
    ]
    assert [row["score_1"] for row in rows[0]] == [row["score_1"] for row in rows[1]]
    assert main(["classify", "check", "--data", address]) == 2  # a classifier needs a test split
    told = capsys.readouterr()
    assert "hush" not in told.out + told.err
    assert b"hush" not in everything_written(tmp_path)


def test_remote_images_are_embedded_and_searched(photos, server, tmp_path, capsys, caplog):  # noqa: F811
    address, file = f"{server.url}/photos.tar?{SECRET}", str(tmp_path / "f.npz")
    model = str(backbone(tmp_path / "artifact"))
    assert main(["embed", model, address, "--out", file, *QUICK]) == 0
    query = next(iter(sorted(photos.rglob("*.png"))))
    (server.folder / "query.png").write_bytes(query.read_bytes())
    (server.folder / "query.txt").write_text("no image")
    capsys.readouterr()
    assert main(["search", file, f"{server.url}/query.png?{SECRET}", "--top-k", "1"]) == 0
    shown = capsys.readouterr()
    assert "1.000" in shown.out and "0.png" in shown.out and "hush" not in shown.out + shown.err
    before = len(server.requests)
    assert main(["search", file, "--outliers", "2", "--out", str(tmp_path / "blank")]) == 0
    assert len(server.requests) == before  # a file of features does not choose what is read
    assert "its images are remote; give --images" in caplog.text
    caplog.clear()
    words = ["--outliers", "2", "--out", str(tmp_path / "shown"), "--images", address]
    assert main(["search", file, *words]) == 0
    assert "left blank" not in caplog.text and len(server.requests) > before
    for name, message in (("query.txt", "is not an image"), ("gone.png", "there is no such file")):
        assert main(["search", file, f"{server.url}/{name}?{SECRET}"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and "hush" not in line
    assert b"hush" not in everything_written(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict C https://host/a.tar PHOTOS", "https://host/a.tar: give an address alone"),
        ("predict C file:///a.tar", "addresses of local files are not read"),
        ("test C --data zip://a::https://h/b", "addresses inside addresses"),
    ],
)
def test_addresses_that_cannot_be_used(tmp_path, capsys, words, message):
    save_classifier(tmp_path / "c")
    paint(tmp_path / "photos", 3, seed=0)
    places = {"C": str(tmp_path / "c"), "PHOTOS": str(tmp_path / "photos")}
    more = ["--out", str(tmp_path / "out")] if words.startswith("predict") else []
    assert main(["classify", *[str(places.get(word, word)) for word in words.split()], *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
