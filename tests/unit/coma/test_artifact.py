"""The artifact: what is saved loads equal; a kill loses nothing; what does not fit is refused by name."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coma.artifact import (
    Artifact,
    ArtifactConfig,
    library_versions,
    load_artifact,
    load_encoder,
    load_strict,
    save,
    save_artifact,
)
from coma.config import DecoderConfig, DyViTConfig, MAEConfig, ViTConfig
from coma.errors import BadArtifact, BadInput
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.load import load_pretrained

MODEL = ViTConfig(channels=2, patch=4, dim=8, depth=1, heads=2)
DYVIT = DyViTConfig(patch=1, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8),) * 4)
OBJECTIVE = MAEConfig(decoder=DecoderConfig(dim=8, depth=1, heads=2))


def description(**changes) -> ArtifactConfig:
    plain = ArtifactConfig(
        kind="pretrained",
        model=MODEL,
        objective=OBJECTIVE,
        image_size=16,
        mean=(0.5, 0.4),
        std=(0.2, 0.1),
        class_names=None,
        trained={"method": "mae", "steps": 3, "loss": 0.5, "ema": None},
        versions=library_versions(),
    )
    return replace(plain, **changes)


def pretrained(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_objective(OBJECTIVE, build_encoder(MODEL)).state_dict()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", tensors=pretrained(), config=description())
    return tmp_path / "artifact"


def rewrite(directory: Path, **changes) -> None:
    """Change the description, as somebody who knows what they do."""
    plain = json.loads((directory / "config.json").read_text())
    plain.pop("checksums", None)
    (directory / "config.json").write_text(json.dumps({**plain, **changes}))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


# refusing --------------------------------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_listed_with_both_shapes():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    tensors = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2).long(), "extra": torch.zeros(7)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadArtifact) as caught:
        load_strict(model, tensors, source="somewhere")
    text = str(caught.value)
    assert text.startswith("somewhere: not of this Sequential")
    assert "2 missing: 1.weight [2, 2], 1.bias [2]" in text
    assert "1 unexpected: extra [7]" in text
    assert "0.weight is [2, 4], the model has [2, 3]" in text
    assert "0.bias is [2] int64, the model has [2]" in text
    assert same(model.state_dict(), before)


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(BadArtifact, match=r"23 unexpected: .*extra9 .* and 13 more"):
        load_strict(nn.Identity(), {f"extra{i}": torch.zeros(1) for i in range(23)}, source="x")


def test_one_missing_tensor_is_one_too_many(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("encoder."))
    del tensors[name]
    save_file(tensors, path)
    rewrite(directory)
    with pytest.raises(BadArtifact, match=f"1 missing: {name.removeprefix('encoder.')}"):
        load_encoder(directory)


def test_tensors_of_neither_encoder_nor_decoder_are_refused(directory):
    tensors = pretrained() | {"projector.weight": torch.zeros(1)}
    save_artifact(directory, tensors=tensors, config=description())
    for load in (load_encoder, load_pretrained):
        with pytest.raises(BadArtifact, match=r"1 unexpected: projector\.weight"):
            load(directory)


def test_tensors_of_another_model_are_refused(directory, tmp_path):
    rewrite(directory, model={**json.loads((directory / "config.json").read_text())["model"], "dim": 16})
    with pytest.raises(
        BadArtifact, match=r"model\.safetensors: not of this ViT.* is \[8.*the model has \[16"
    ):
        load_encoder(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"format_version": 3}, "format 3, newest known here 2; upgrade"),
        ({"format_version": None}, "no format_version"),
        ({"format_version": True}, "no format_version"),
        ({"kind": "poem"}, "poem"),
        ({"mean": [0.5]}, "for each of 2 channels"),
        ({"std": [0.5, 0.0]}, "std: 0 must be more than 0"),
        ({"mean": [0.5, float("nan")]}, "mean: nan must be a number"),
        ({"image_size": 3}, "smaller than a mask unit of 4 px"),
        ({"image_size": "large"}, "image_size"),
        ({"class_names": []}, "at least one name"),
        ({"objective": None}, "needs its objective"),
        ({"model": {"architecture": "vit", "chanels": 2}}, "chanels"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(directory, changes, message):
    rewrite(directory, **changes)
    with pytest.raises(BadArtifact, match=message) as caught:
        load_artifact(directory)
    assert str(directory / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_a_broken_description_is_refused(directory, text):
    (directory / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadArtifact, match=r"config\.json"):
        load_artifact(directory)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:4], lambda b: b"", lambda b: b"\x93" + b[1:]]
)
def test_damaged_tensors_are_refused(directory, damage):
    path = directory / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadArtifact, match=r"model\.safetensors: truncated or damaged"):
        load_artifact(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_changed_byte_is_noticed(directory, name):
    """Letters, digits and weights; only what changes no meaning (an indent, say) is free."""
    path = directory / name
    good = path.read_bytes()
    for at in range(0, len(good), len(good) // 97):
        flipped = bytearray(good)
        flipped[at] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(BadArtifact):
            load_artifact(directory)
    path.write_bytes(good)
    load_artifact(directory)


def test_an_artifact_without_checksums_loads_with_a_note(directory, caplog):
    rewrite(directory)
    load_artifact(directory)
    load_artifact(directory)
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory}: has no checksums (an older version wrote it): damage goes unnoticed"
    ]


def test_tensors_of_the_same_model_from_elsewhere_are_refused(directory, tmp_path):
    save_artifact(tmp_path / "other", tensors=pretrained(seed=1), config=description())
    (tmp_path / "other" / "model.safetensors").replace(directory / "model.safetensors")
    with pytest.raises(BadArtifact, match=r"model\.safetensors: damaged or replaced, its checksum does"):
        load_artifact(directory)


def test_a_pickle_is_refused_unopened(directory):
    torch.save(pretrained(), directory / "model.safetensors")
    with pytest.raises(BadArtifact, match="truncated or damaged"):
        load_artifact(directory)


def test_tensors_of_another_format_are_refused(directory):
    save_file(pretrained(), directory / "model.safetensors", metadata={"format_version": "3"})
    with pytest.raises(BadArtifact, match="written in format 3"):
        load_artifact(directory)


def test_a_wrong_path_is_named_with_the_right_one(directory, tmp_path):
    cases = {
        tmp_path / "nothing": "no such directory",
        tmp_path: f"no config.json and no model.safetensors; did you mean {directory}",
        directory / "config.json": f"give its directory, {directory}",
    }
    for path, message in cases.items():
        with pytest.raises(BadArtifact, match=message):
            load_artifact(path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadArtifact, match=r"has no model\.safetensors"):
        load_artifact(directory)


def test_kinds_without_what_is_asked_for_are_refused(tmp_path):
    save_artifact(tmp_path / "c", tensors={}, config=description(kind="classifier"))
    save_artifact(tmp_path / "b", tensors={}, config=description(kind="backbone"))
    with pytest.raises(BadArtifact, match="its kind is 'classifier'"):
        load_encoder(tmp_path / "c")
    with pytest.raises(BadArtifact, match="its kind 'backbone' has no decoder"):
        load_pretrained(tmp_path / "b")


def test_a_description_is_checked_when_it_is_made():
    with pytest.raises(BadInput, match="for each of 2 channels"):
        description(mean=(0.5, 0.5, 0.5))


def test_versions_are_recorded():
    versions = library_versions()
    assert set(versions) == {"python", "torch", "timm", "coma-dyvit"}
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert isinstance(Artifact(description(versions=versions), {}).config.versions, dict)
