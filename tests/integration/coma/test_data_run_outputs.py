"""What this toolkit writes is recognised by its content, and is never data."""

import pytest
from image_folders import TINY, found, said, save

from coma.cli import main
from coma.data import open_source
from coma.data.run_outputs import enclosing_run_output
from coma.data.sources.image_folder import list_folders
from coma.errors import BadInput


def test_runs_among_the_photographs_are_never_data(tmp_path, monkeypatch, caplog, capsys):
    """`cd photos; coma pretrain .` writes run/ among the photographs, pictures and all."""
    for number in range(4):
        save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", ".", "--steps", "1", *TINY]) == 0
    assert list((tmp_path / "run").rglob("*.png"))
    assert said(caplog) == [".: 4 images (4 .png)"]
    assert main(["pretrain", "--resume", "run", "--steps", "2"]) == 0
    assert said(caplog) == [
        f"{tmp_path}: 4 images (4 .png); skipped: 1 folder written by coma (run/ is a run of coma pretrain)"
    ]
    capsys.readouterr()
    (tmp_path / "run").rename(tmp_path / "holiday")  # whatever it is called
    assert found(tmp_path) == ["0.png", "1.png", "2.png", "3.png"]
    lies_in = f"lies in {tmp_path}/holiday, which is"
    for inside, where in (("holiday", "is"), ("holiday/reconstructions", lies_in)):
        assert main(["pretrain", inside, "--out", "other"]) == 2
        assert capsys.readouterr().err == (
            f"error: {inside}: {where} a run of coma pretrain, and its pictures are results; give the folder "
            "of the images themselves\n"
        )


PRODUCTS = {
    "a run of coma pretrain": {
        "config.json": '{"data":1,"model":1,"objective":1,"optimizer":1,"run":1}',
        "metrics.jsonl": "",
    },
    "a run of coma classify": {
        "config.json": '{"artifact":1,"data":1,"optimizer":1,"run":1}',
        "metrics.jsonl": "",
    },
    "an artifact": {
        "config.json": '{"kind":1,"model":1,"image_size":1,"mean":1,"std":1}',
        "model.safetensors": "",
    },
    "a comparison of coma compare": {"compare.json": '{"budget":1,"test":1,"device":1}'},
    "an export of coma export": {"manifest.json": '{"format_version":2,"artifact":1,"files":[]}'},
    "a run of coma detect or segment": {"config.py": "", "last_checkpoint": "iter_2.pth"},
    "predictions of coma detect": {"detections.json": "[]", "images.json": "{}", "pictures/a.png": ""},
    "predictions of coma segment": {"labels/a.png": "", "pictures/a.png": ""},
    "a folder of coma quickstart": {
        "pictures/a.png": "",
        "run/config.json": '{"data":1,"model":1,"objective":1,"optimizer":1,"run":1}',
        "run/metrics.jsonl": "",
    },
}


@pytest.mark.parametrize("what", PRODUCTS)
def test_products_are_recognised_by_their_content(tmp_path, what):
    save(tmp_path / "cat" / "1.png")
    save(tmp_path / "dog" / "2.png")
    save(tmp_path / "result" / "curves.png")
    for name, text in PRODUCTS[what].items():
        path = tmp_path / "result" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert found(tmp_path) == ["cat/1.png", "dog/2.png"]
    assert list_folders(tmp_path) == ["cat", "dog"]
    assert f"1 folder written by coma (result/ is {what})" in open_source(tmp_path).summary()
    with pytest.raises(BadInput, match=f"result: is {what}, and its pictures are results"):
        open_source(tmp_path / "result")


def test_folders_of_others_are_data_whatever_they_hold(tmp_path):
    for name, text in {
        "config.json": '{"name": "camera"}',
        "manifest.json": '{"short_name": "app"}',
        "compare.json": "[1]",
        "config.py": "x = 1",
        "detections.json": "{",
    }.items():
        (tmp_path / name).write_text(text)
    save(tmp_path / "pictures" / "a.png")
    save(tmp_path / "labels" / "b.png")
    assert found(tmp_path) == ["labels/b.png", "pictures/a.png"]


def test_the_pictures_of_a_quickstart_are_data(tmp_path):
    save(tmp_path / "pictures" / "a.png")
    (tmp_path / "run").mkdir()
    for name, text in PRODUCTS["a run of coma pretrain"].items():
        (tmp_path / "run" / name).write_text(text)
    assert found(tmp_path / "pictures") == ["a.png"]
    assert enclosing_run_output(tmp_path) == (tmp_path, "a folder of coma quickstart")
