"""Evaluation: labels, features, the command, and every refusal."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coma import cli
from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.config import ViTConfig
from coma.data import ArraySource
from coma.errors import BadInput, CheckFailed
from coma.image_size import ImageSize
from pretrain.evaluate import (
    Features,
    align_labels,
    evaluate,
    extract_features,
    random_encoder,
)

MODEL = ViTConfig(patch=4, dim=16, depth=1, heads=2)


def description(model: ViTConfig = MODEL) -> ArtifactConfig:
    channels = model.channels
    return ArtifactConfig(
        "backbone",
        model,
        None,
        ImageSize.of(16),
        (0.5,) * channels,
        (0.25,) * channels,
        None,
        {},
        library_versions(),
    )


def bands(n: int, size: int = 20, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Noisy pictures whose brighter half is at the top, bottom or left, and which it is."""
    rng = np.random.default_rng(seed)
    pictures, labels = [], np.arange(n) % 3
    for label in labels:
        picture = rng.integers(0, 120, (size, size, 3))
        half = [np.s_[: size // 2], np.s_[size // 2 :], np.s_[:, : size // 2]][label]
        picture[half] += 100
        pictures.append(picture.astype(np.uint8))
    return pictures, labels


def source(n: int = 60, seed: int = 0, names=("top", "bottom", "left")) -> ArraySource:
    pictures, labels = bands(n, seed=seed)
    return ArraySource(pictures, labels, names, location=Path(f"bands{seed}"))


# labels ----------------------------------------------------------------------------------------


def array(labels, names=None, where="set") -> ArraySource:
    pictures = [np.zeros((8, 8, 3), np.uint8)] * (3 if labels is None else len(labels))
    return ArraySource(pictures, None if labels is None else np.array(labels), names, location=Path(where))


def test_names_decide_when_the_sets_count_their_classes_differently():
    train, test = array([0, 1, 2, 1], ("ant", "bee", "cat")), array([0, 1, 0], ("cat", "ant"))
    known, asked, classes = align_labels(train, test)
    assert (known.tolist(), asked.tolist(), classes) == ([0, 1, 2, 1], [2, 0, 2], ("ant", "bee", "cat"))


def test_numbers_decide_where_there_are_no_names():
    known, asked, classes = align_labels(array([0, 3, 1]), array([3, 0], ("a", "b", "c", "d")))
    assert (known.tolist(), asked.tolist(), classes) == ([0, 2, 1], [2, 0], ("0", "1", "3"))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (array(None, where="photos"), array([0, 1]), "photos: has no labels; give a folder"),
        (array([0, 1]), array(None, where="photos"), "photos: has no labels; give a folder"),
        (
            array([0, 1], ("a", "b")),
            array([0, 1], ("a", "c"), "exam"),
            "exam: set does not have the classes c; it has a, b",
        ),
        (array([0, 0], ("a", "b")), array([1], ("a", "b")), "does not have the classes b; it has a"),
        (array([0, 1]), array([2, 7]), "does not have the classes 2, 7; it has 0, 1"),
        (array([1, 1]), array([1, 1]), "of one class"),
    ],
)
def test_labels_that_do_not_fit_are_refused(train, test, message):
    with pytest.raises(BadInput, match=message):
        align_labels(train, test)


# features --------------------------------------------------------------------------------------


def features(data, encoder=None, about=None, **options) -> Features:
    about = about or description()
    encoder = encoder or random_encoder(about)
    return extract_features(encoder, about, data, labels=torch.from_numpy(data.labels), workers=0, **options)


def test_features_are_the_encoders_pooled_map_of_normalised_images():
    flat = np.full((20, 24, 3), 100, np.uint8)
    data = ArraySource([flat, flat + 50], np.array([0, 1]))
    encoder = random_encoder(description())
    images = torch.stack([torch.full((3, 16, 16), value / 255) for value in (100, 150)])
    with torch.inference_mode():
        expected = encoder.pool((images - 0.5) / 0.25)
    torch.testing.assert_close(features(data, encoder).values, expected)


def test_features_are_computed_in_the_precision_of_training(monkeypatch):
    encoder, types = random_encoder(description()), []
    pool = encoder.pool
    monkeypatch.setattr(encoder, "pool", lambda x: types.append(torch.mm(x[0, 0], x[0, 0]).dtype) or pool(x))
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr("pretrain.evaluate.features.choose_precision", lambda *_, p=precision: p)
        assert features(source(3), encoder).values.dtype == torch.float32
    assert types == [torch.float32, torch.bfloat16]


def test_features_do_not_depend_on_the_batch_and_repeat_exactly():
    data = source(10)
    one, again, split = (features(data, batch_size=size) for size in (10, 10, 3))
    assert torch.equal(one.values, again.values)
    torch.testing.assert_close(one.values, split.values)
    assert torch.equal(one.labels, torch.arange(10) % 3)


def test_the_encoder_keeps_its_training_mode():
    encoder = random_encoder(description())
    for training in (True, False):
        features(source(4), encoder.train(training))
        assert encoder.training is training


def test_images_may_be_shown_at_another_size():
    assert not torch.allclose(features(source(4)).values, features(source(4), image_size=24).values)
    with pytest.raises(BadInput, match="image size 3 px is smaller than the encoder's mask unit of 4 px"):
        features(source(4), image_size=3)


def test_bad_images_are_left_out_with_their_labels(caplog):
    pictures, labels = bands(6)
    pictures[2] = np.zeros((0, 5, 3), np.uint8)
    found = features(ArraySource(pictures, labels))
    assert found.labels.tolist() == [0, 1, 0, 1, 2]
    assert len(found.failures) == 1
    assert "left out 1 images" in caplog.text


def test_images_of_which_none_fits_are_refused():
    with pytest.raises(BadInput, match=r"no image could be read; the first: .*channels"):
        pictures = [np.zeros((20, 20, 5), np.uint8)] * 4  # five channels for an encoder of three
        features(ArraySource(pictures, np.array([0, 1, 0, 1])))


def test_features_that_are_not_finite_are_caught():
    encoder = random_encoder(description())
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(CheckFailed, match="not finite"):
        features(source(4), encoder)


def test_a_random_encoder_is_drawn_from_its_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = random_encoder(description(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = random_encoder(description(), seed=3), random_encoder(description(), seed=4)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


# end to end ------------------------------------------------------------------------------------


def test_an_encoder_is_evaluated_with_features_computed_once():
    encoder, shown = random_encoder(description()), []
    encoder.register_forward_pre_hook(lambda *_: shown.append(1))
    results = evaluate(encoder, description(), source(90), source(30, seed=1), workers=0, k=5)
    assert [result.protocol for result in results] == ["knn", "linear"]
    assert all(result.top1 > 0.6 for result in results)  # chance is a third
    linear = evaluate(encoder, description(), source(90), source(30, seed=1), ["linear"], workers=0)
    assert linear[0].top1 == results[1].top1


def test_too_many_neighbours_are_refused_before_anything_is_computed():
    encoder = random_encoder(description())
    encoder.pool = lambda *_: pytest.fail("features were computed")  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="1 to 9"):
        evaluate(encoder, description(), source(9), source(9), k=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with train/ and test/, and an artifact beside them."""
    for part, n, seed in (("train", 60, 0), ("test", 30, 1)):
        pictures, labels = bands(n, seed=seed)
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            path = tmp_path / "data" / part / ("top", "bottom", "left")[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    save_artifact(
        tmp_path / "artifact", tensors=random_encoder(description(), 5).state_dict(), config=description()
    )
    return tmp_path


def coma(*argv: object) -> int:
    return cli.main(["evaluate", *map(str, argv)])


def test_the_command_prints_a_table_and_writes_json(folder, capsys):
    out = folder / "evaluation"
    assert coma(folder / "artifact", "--data", folder / "data", "--workers", 0, "--k", 5, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "top-1 %" in shown
    assert "random, like" in shown
    results = json.loads((out / "results.json").read_text())
    assert Path(results["train"]) == folder / "data" / "train"
    rows = [(row["encoder"].startswith("random"), row["protocol"]) for row in results["scores"]]
    assert rows == [(False, "knn"), (False, "linear"), (True, "knn"), (True, "linear")]
    assert all(
        row["top1"] > 0.5 and row["top5"] is None and row["test_images"] == 30 for row in results["scores"]
    )
    head, _, first, *_ = (out / "results.md").read_text().splitlines()
    assert head.startswith("| encoder | protocol | test top-1 % |")
    assert first.startswith(f"| {folder / 'artifact'} | knn | {100 * results['scores'][0]['top1']:.2f} |")


def test_the_command_takes_several_artifacts_and_one_protocol(folder, capsys):
    artifact, data, out = folder / "artifact", folder / "data", folder / "evaluation"
    pair = ("--train", data / "train", "--test", data / "test")
    shutil.copytree(artifact, folder / "other")
    argv = (artifact, folder / "other", *pair, "--protocols", "knn", "--workers", 0, "--out", out)
    assert coma(*argv, "--no-random-baseline") == 0
    scores = json.loads((out / "results.json").read_text())["scores"]
    assert len(scores) == 2
    assert scores[0]["top1"] == scores[1]["top1"]
    assert coma(folder / "data" / ".." / "other", *argv[1:]) == 2
    assert "other: was given twice; leave one out" in capsys.readouterr().err


def test_rows_are_told_apart_and_one_baseline_serves_an_architecture(folder, capsys, monkeypatch):
    """Three runs deep down: other statistics and drop path make no other architecture, another size does."""
    about, same = description(), "deep/experiments/of/the/second/quarter/with/many/settings"
    others = {
        "a": replace(about, mean=(0.4, 0.5, 0.6)),
        "b": replace(about, model=replace(about.model, drop_path=0.2)),
        "c": replace(about, image_size=2 * about.image_size.height),
    }
    paths = [Path(same) / name / "artifact" for name in others]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    for path, each in zip(paths, others.values(), strict=True):
        save_artifact(path, tensors=random_encoder(each, 5).state_dict(), config=each)
    argv = ("--data", "data", "--protocols", "knn", "--k", 3, "--workers", 0, "--out", "evaluation")
    assert coma(*paths, *argv) == 0
    table = capsys.readouterr().out.split("┏")[1]
    assert "…" not in table and "..." not in table
    cells = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert "".join(cells).startswith("".join(map(str, paths)))
    assert max(map(len, table.splitlines())) <= 80
    names = [
        row["encoder"] for row in json.loads((folder / "evaluation" / "results.json").read_text())["scores"]
    ]
    assert names == [*map(str, paths), f"random, like {paths[0]} and 1 more", f"random, like {paths[2]}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "DATA"), "give at least one artifact"),
        (("ARTIFACT",), "give --data, or both --train and --test"),
        (("ARTIFACT", "--train", "DATA"), "give --data, or both --train and --test"),
        (("ARTIFACT", "--data", "DATA", "--out", "FILE"), "is a file; give a folder"),
        (("ARTIFACT", "--data", "nowhere"), "nowhere"),
        (("nothing", "--data", "DATA"), "nothing: no such directory"),
        (("ARTIFACT", "--data", "DATA", "--k", "999"), "1 to 60"),
        (("ARTIFACT", "--data", "DATA", "--image-size", "2"), "image size 2 px"),
        (("ARTIFACT", "--data", "DATA", "--protocols"), "at least one of --protocols"),
        (
            ("ARTIFACT", "--data", "TAGS", "--protocols", "linear"),
            "any number of classes, but top-1",
        ),
    ],
)
def test_the_command_refuses_with_one_line(folder, capsys, argv, message):
    (folder / "file").touch()
    (folder / "tags").mkdir()
    picture = next(path.relative_to(folder) for path in (folder / "data").rglob("*.png"))
    for split in ("train", "test"):
        (folder / "tags" / f"{split}.csv").write_text(f"image,tags\n../{picture},a;b\n")
    places = {"DATA": folder / "data", "ARTIFACT": folder / "artifact", "FILE": folder / "file"}
    places["TAGS"] = folder / "tags"
    assert coma(*(places.get(word, word) for word in argv)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_an_unknown_protocol_is_refused():
    with pytest.raises(BadInput, match="no protocol 'svm'"):
        evaluate(random_encoder(description()), description(), source(), source(), ["svm"])  # type: ignore[list-item]
