"""`coma search`: what it finds, writes and draws, and what it refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_files import backbone, classifier
from feature_files import SPEC, features, vectors
from PIL import Image

from coma.cli import main
from downstream.features.files import FeaturesFile


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twenty pictures of colours, of which 3 and 4 are alike, and 11 to 13."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for i in range(20):
        blocks = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((70, 60), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    for copy, original in ((4, 3), (12, 11), (13, 11)):
        (folder / f"{copy:02d}.png").write_bytes((folder / f"{original:02d}.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    """A folder of the model and the features of the pictures."""
    folder = tmp_path_factory.mktemp("made")
    backbone(folder / "artifact")
    out = folder / "features.parquet"
    assert main(["embed", str(folder / "artifact"), str(pictures), "--out", str(out), "--workers", "0"]) == 0
    return folder


def search(file: Path | str, *more: str | Path) -> int:
    return main(["search", str(file), *map(str, more)])


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    plain = json.loads((folder / f"{name}.json").read_text())["rows"]
    assert [each["path"] for each in plain] == [each["path"] for each in found]
    return found


def error(capsys) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_the_nearest_images_of_a_row(made, pictures, tmp_path, capsys):
    file = made / "features.parquet"
    for query in ("11.png", str(pictures / "11.png")):
        assert search(file, query, "--top-k", "5", "--out", tmp_path) == 0
        found = rows(tmp_path, "nearest")
        assert [row["path"] for row in found[:2]] == ["12.png", "13.png"] and len(found) == 5
        assert float(found[0]["similarity"]) == pytest.approx(1, abs=1e-5)
        assert "11.png" not in [row["path"] for row in found]
        assert "12.png" in capsys.readouterr().out
        with Image.open(tmp_path / "nearest.png") as sheet:
            assert sheet.width > 500


def test_a_picture_of_elsewhere_is_computed_by_the_model(made, pictures, tmp_path, monkeypatch):
    query = tmp_path / "query.png"
    query.write_bytes((pictures / "03.png").read_bytes())
    file = made / "features.parquet"
    monkeypatch.setattr("coma.devices.pick_device", lambda *_: __import__("torch").device("cpu"))
    for more in ((), ("--model", made / "artifact")):
        assert search(file, query, "--top-k", "2", "--out", tmp_path, *more) == 0
        found = rows(tmp_path, "nearest")
        assert {row["path"] for row in found} == {"03.png", "04.png"}
        assert min(float(row["similarity"]) for row in found) == pytest.approx(1, abs=1e-4)


def test_the_weights_of_the_package_are_found_again_by_their_name(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = tmp_path / "few"
    few.mkdir()
    for name in ("03.png", "11.png"):
        (few / name).write_bytes((pictures / name).read_bytes())
    (tmp_path / "query.png").write_bytes((pictures / "03.png").read_bytes())
    options = ("--device", "cpu", "--workers", "0")
    assert main(["embed", "tiny-64", "few", "--out", "few.parquet", *options]) == 0
    monkeypatch.chdir(few)
    assert search("../few.parquet", "../query.png", "--device", "cpu", "--out", tmp_path) == 0
    assert rows(tmp_path, "nearest")[0]["path"] == "03.png"


def test_near_duplicates_outliers_and_a_map(made, tmp_path, capsys):
    file = made / "features.parquet"
    assert search(file, "--duplicates", "0.9999", "--outliers", "3", "--map", "--out", tmp_path) == 0
    found = [(row["group"], row["path"]) for row in rows(tmp_path, "duplicates")]
    groups = {number: {path for each, path in found if each == number} for number, _ in found}
    assert sorted(map(sorted, groups.values())) == [["03.png", "04.png"], ["11.png", "12.png", "13.png"]]
    assert "5 images in 2 groups" in capsys.readouterr().out.replace("\n", " ")
    outliers = rows(tmp_path, "outliers")
    values = np.concatenate([each.values for each in FeaturesFile(file).groups()])
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    similarity = np.sort(values @ values.T, axis=1)[:, -11:-1]
    wanted = np.argsort(-(1 - similarity.mean(axis=1)))[:3]
    assert [row["path"] for row in outliers] == [f"{i:02d}.png" for i in wanted]
    places = {row["path"]: (float(row["x"]), float(row["y"])) for row in rows(tmp_path, "map")}
    assert len(places) == 20 and np.hypot(*np.subtract(places["03.png"], places["04.png"])) < 0.1
    for name in ("duplicates", "outliers", "map"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.getextrema() != ((255, 255),) * 3


def test_results_are_the_same_every_time(made, tmp_path):
    for name in ("a", "b"):
        out = tmp_path / name
        assert search(made / "features.parquet", "--outliers", "--map", "--out", out) == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_nothing_alike_is_a_result_too(made, tmp_path, capsys):
    values = np.eye(8, dtype=np.float32)
    file = features(tmp_path / "f.npz", values)
    assert search(file, "--duplicates", "0.5", "--out", tmp_path / "out") == 0
    assert "0 images in 0 groups" in capsys.readouterr().out
    assert (tmp_path / "out" / "duplicates.csv").read_text() == ""
    assert not (tmp_path / "out" / "duplicates.png").exists()


def test_several_files_are_searched_together(made, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "same.png").write_bytes((pictures / "00.png").read_bytes())
    second = tmp_path / "second.npz"
    assert main(["embed", str(made / "artifact"), str(other), "--out", str(second), "--workers", "0"]) == 0
    file = made / "features.parquet"
    assert search(file, "00.png", "--also", second, "--top-k", "1", "--out", tmp_path / "out") == 0
    (found,) = rows(tmp_path / "out", "nearest")
    assert (found["path"], found["features"]) == ("same.png", str(second))


def test_images_that_are_gone_are_left_blank_and_named(made, pictures, tmp_path, caplog):
    file = tmp_path / "f.parquet"
    values = np.concatenate([each.values for each in FeaturesFile(made / "features.parquet").groups()])
    names = [f"{i:02d}.png" for i in range(18)] + ["gone.png", "../../../etc/passwd"]
    info = FeaturesFile(made / "features.parquet").info
    changes = {"spec": info.spec, "images": str(pictures)}
    features(file, values, names, **changes)
    assert search(file, "--outliers", "20", "--out", tmp_path / "out") == 0
    assert "left blank 2 pictures: " in caplog.text and "gone.png: no longer exists" in caplog.text
    assert "passwd: does not lie in the folder" in caplog.text
    moved = tmp_path / "moved"
    pictures_there = [(moved / path.name, path) for path in pictures.iterdir()]
    moved.mkdir()
    for to, path in pictures_there:
        to.write_bytes(path.read_bytes())
    features(tmp_path / "g.parquet", values, **{**changes, "images": "/nowhere"})
    caplog.clear()
    assert search(tmp_path / "g.parquet", "--map", "--out", tmp_path / "out", "--images", moved) == 0
    assert "0.png: no longer exists" in caplog.text and "--images names the folder" in caplog.text


def test_images_in_shards_are_drawn(made, pictures, tmp_path, caplog):
    shards, file = tmp_path / "shards", tmp_path / "f.parquet"
    assert main(["pack", str(pictures), "--out", str(shards), "--workers", "0"]) == 0
    assert main(["embed", str(made / "artifact"), str(shards), "--out", str(file), "--workers", "0"]) == 0
    assert search(file, FeaturesFile(file).paths()[3], "--out", tmp_path / "out") == 0
    assert "left blank" not in caplog.text
    assert rows(tmp_path / "out", "nearest")[0]["path"].endswith("-04.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a QUERY, --duplicates 0.98, --outliers or --map"),
        (["--duplicates", "2"], "--duplicates 2 must be more than 0 and at most 1"),
        (["--duplicates", "nan"], "--duplicates nan must be"),
        (["--outliers", "0"], "--outliers: 0 must be at least 1"),
        (["--outliers", "3", "4"], "--outliers: give one number, not 2"),
        (["00.png", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["--outliers", "--k", "0"], "--k 0 must be 1 to 1000"),
        (["--map"], "--map: draws a picture; give a folder for it with --out FOLDER"),
        (["gone.png"], "gone.png: is neither an image file nor the path of an image"),
        (["notes.txt"], "notes.txt: is not an image"),
        (["cut.png"], "cut.png: "),
        (["."], ".: is not a regular file"),
        (["pipe"], "pipe: is not a regular file"),
        ([""], ": is neither an image file nor the path"),
        (["00.png", "--also", "features.parquet"], "features.parquet: was given twice"),
        (["00.png", "--images", "a", "b"], "--images: give one place for each of 1 file"),
        (["new.png", "--model", "nowhere"], "the query needs the model of features.parquet: nowhere: "),
        (["new.png", "--model", "other"], "--model other: features.parquet holds features of another model"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, message, made, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("features.parquet").write_bytes((made / "features.parquet").read_bytes())
    Path("notes.txt").write_text("no image at all, but longer than thirty-two bytes")
    Path("cut.png").write_bytes((pictures / "01.png").read_bytes()[:100])
    Image.new("RGB", (64, 64), (9, 99, 199)).save("new.png")
    __import__("os").mkfifo("pipe")
    classifier(Path("other"))
    capsys.readouterr()
    assert search("features.parquet", *arguments) == 2
    assert message in error(capsys)


def test_features_of_different_models_are_not_mixed(made, tmp_path, capsys):
    other = features(tmp_path / "other.npz", vectors(3, 64), spec=replace(SPEC, shape=(64,)))
    assert search(made / "features.parquet", "00.png", "--also", other) == 2
    assert "features of another model" in error(capsys)


def test_a_set_of_one_image(tmp_path, capsys):
    file = features(tmp_path / "f.npz", vectors(1))
    assert search(file, "--outliers") == 2
    assert "has one image" in error(capsys)
    assert search(file, "0.png") == 0
    assert search(file, "--map", "--out", tmp_path / "out") == 0
