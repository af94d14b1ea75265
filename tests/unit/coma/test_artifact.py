"""The artifact: what is saved loads equal; a kill loses nothing; what does not fit is refused by name."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact_files import DYVIT, MODEL, OBJECTIVE, description, pretrained, same

from coma.artifact import (
    Artifact,
    library_versions,
    load_artifact,
    load_encoder,
    save,
    save_artifact,
)
from coma.errors import BadArtifact
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.load import load_pretrained

# save -> load ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        description(),
        description(kind="backbone", objective=None, model=DYVIT, mean=(0.5,) * 3, std=(0.2,) * 3),
        description(kind="classifier", class_names=("cat", "Straßenhund")),
    ],
)
def test_a_description_survives_the_disk(tmp_path, config):
    save_artifact(tmp_path / "a", tensors={"x": torch.zeros(1)}, config=config)
    assert load_artifact(tmp_path / "a").config == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_survive_the_disk_in_their_type(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    save_artifact(tmp_path / "a", tensors={"x": tensor}, config=description())
    loaded = load_artifact(tmp_path / "a").tensors["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)


def test_shared_sliced_and_transposed_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "same": base, "rows": base[1:], "turned": base.T, "every_other": base[:, ::2]}
    save_artifact(tmp_path / "a", tensors=tensors, config=description())
    assert same(load_artifact(tmp_path / "a").tensors, tensors)
    assert (
        tmp_path / "a" / "model.safetensors"
    ).stat().st_size < 1000  # a slice does not drag its base along


def test_others_may_read_what_the_umask_lets_them(directory):
    modes = [(directory / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")]
    umask = os.umask(0)
    os.umask(umask)
    assert modes == [0o666 & ~umask] * 2


def test_the_tensors_file_says_its_format(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "format_version": "2", "kind": "pretrained"}


def test_equal_artifacts_are_equal_files(tmp_path):
    """safetensors writes its metadata in the order of a hash that every call draws anew."""
    tensors = {"größe": torch.arange(3.0), "b": torch.ones(2, 2)}
    files = set()
    for number in range(8):
        save_artifact(tmp_path / str(number), tensors=tensors, config=description())
        files.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(files) == 1
    assert same(load_artifact(tmp_path / "0").tensors, tensors)


@pytest.mark.parametrize("config", [MODEL, DYVIT])
def test_an_encoder_computes_the_same_after_the_disk(tmp_path, config):
    objective = build_objective(OBJECTIVE, build_encoder(config)).eval()
    stats = {"mean": (0.5,) * config.channels, "std": (0.2,) * config.channels}
    about = description(model=config, **stats)
    save_artifact(tmp_path / "p", tensors=objective.state_dict(), config=about)
    backbone = replace(about, kind="backbone", objective=None)
    save_artifact(tmp_path / "b", tensors=objective.encoder.state_dict(), config=backbone)
    images = torch.randn(2, config.channels, 16, 16)
    with torch.inference_mode():
        expected = objective.encoder.pool(images)
        for kind in ("p", "b"):
            encoder = load_encoder(tmp_path / kind)
            assert not encoder.training
            assert torch.equal(encoder.pool(images), expected)


def test_an_objective_computes_the_same_after_the_disk(directory):
    objective = load_pretrained(directory)
    about = objective.artifact
    assert about == description()
    assert same(objective.state_dict(), pretrained())
    assert not objective.training


def test_half_precision_tensors_load_into_a_float_model(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in pretrained().items()}
    save_artifact(tmp_path / "a", tensors=tensors, config=description())
    objective = load_pretrained(tmp_path / "a")
    assert same(objective.state_dict(), {name: tensor.float() for name, tensor in tensors.items()})


# replacing -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing that handles ordinary errors may run after it."""


@pytest.mark.parametrize("call", range(16))
def test_killed_at_any_moment_one_of_the_two_loads(directory, monkeypatch, call):
    """Every call that touches the disk is in turn the last one that happens."""
    old, new = pretrained(0), pretrained(1)
    calls = []

    def dying(real):
        def step(*args, **kwargs):
            if len(calls) >= call:
                raise Killed
            calls.append(real)
            return real(*args, **kwargs)

        return step

    for name in ("mkdir", "write_text", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(save, "save_file", dying(save.save_file))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(save.shutil, "rmtree", dying(save.shutil.rmtree))
    died = False
    try:
        save_artifact(directory, tensors=new, config=description())
    except Killed:
        died = True
    monkeypatch.undo()
    assert died == (call < 12)
    found = load_artifact(directory).tensors
    assert same(found, new if call >= 8 else old)

    save_artifact(directory, tensors=new, config=description())  # and saving works again
    assert same(load_artifact(directory).tensors, new)
    assert [entry.name for entry in directory.parent.iterdir()] == ["artifact"]


def test_a_full_disk_leaves_the_old_artifact(directory, monkeypatch):
    def full(*_, **__):
        raise save.SafetensorError("No space left on device")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_artifact(directory, tensors=pretrained(1), config=description())
    assert caught.value.errno == errno.EIO
    assert same(load_artifact(directory).tensors, pretrained(0))
    assert [entry.name for entry in directory.parent.iterdir()] == ["artifact"]


def test_notes_beside_an_artifact_are_kept(directory):
    (directory / "notes.txt").write_text("mine")
    (directory / "figures").mkdir()
    save_artifact(directory, tensors=pretrained(1), config=description())
    assert (directory / "notes.txt").read_text() == "mine"
    assert (directory / "figures").is_dir()
    assert same(load_artifact(directory).tensors, pretrained(1))


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(BadArtifact, match="holds other things than an artifact"):
        save_artifact(tmp_path, tensors=pretrained(), config=description())
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"


def test_a_run_directory_is_not_replaced(directory):
    run = directory.parent
    (run / "config.json").write_text("settings of the run")
    with pytest.raises(BadArtifact, match="holds other things than an artifact"):
        save_artifact(run, tensors=pretrained(), config=description())
    assert (run / "config.json").read_text() == "settings of the run"


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(BadArtifact):
        save_artifact(tmp_path / "a", tensors=pretrained(), config=description())
    assert (tmp_path / "a").read_text() == "mine"


def test_an_artifact_behind_a_link_is_replaced_where_it_lies(directory, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(directory)
    save_artifact(link, tensors=pretrained(1), config=description())
    assert link.is_symlink()
    assert same(load_artifact(directory).tensors, pretrained(1))


def test_a_loss_that_is_no_number_is_refused_before_anything_is_replaced(directory):
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(directory, tensors=pretrained(1), config=description(trained={"loss": float("nan")}))
    assert same(load_artifact(directory).tensors, pretrained(0))


def test_versions_are_recorded():
    versions = library_versions()
    assert set(versions) == {"python", "torch", "timm", "coma-dyvit"}
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert isinstance(Artifact(description(versions=versions), {}).config.versions, dict)
