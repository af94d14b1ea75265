"""An artifact that does not fit, is damaged or incomplete is refused by name."""

import json

import pytest
import torch
from artifact_files import description, pretrained, rewrite, same
from safetensors.torch import load_file, save_file
from torch import nn

from coma.artifact import (
    load_artifact,
    load_encoder,
    load_strict,
    save_artifact,
)
from coma.errors import BadArtifact, BadInput
from coma.objectives.load import load_pretrained


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
        ({"std": [0.5, 0.0]}, "std: 0 must be at least 1e-09"),
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
    save_artifact(tmp_path / "b", tensors={}, config=description(kind="backbone"))
    with pytest.raises(BadArtifact, match="its kind 'backbone' has no decoder"):
        load_pretrained(tmp_path / "b")


def test_a_description_is_checked_when_it_is_made():
    with pytest.raises(BadInput, match="for each of 2 channels"):
        description(mean=(0.5, 0.5, 0.5))
