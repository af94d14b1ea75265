"""Detectors and segmentors that start from the artifact of another one, and what is said about it."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from downstream_data import SMALL, artifact, coco, labelled
from safetensors.torch import save_file

from coma.artifact import load_artifact
from coma.errors import BadArtifact, BadInput
from downstream.commands import detect, segment

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other

STILL = ["--steps", "1", "--lr", "1e-12", "--batch-size", "2", "--workers", "0"]
"""A step that changes nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of classes square and disc, and a Faster R-CNN that was trained on them."""
    folder = tmp_path_factory.mktemp("transfer")
    coco(folder / "coco", train=2, val=1, masks=False)
    encoder = artifact(folder / "encoder")
    detect.run(["train", str(encoder), "--data", str(folder / "coco"), "--out", str(folder / "run"),
                "--steps", "1", *SMALL])  # fmt: skip
    return folder


def renamed(folder: Path, names: dict[str, str], out: Path) -> Path:
    """The same data with other names of classes."""
    shutil.copytree(folder / "coco", out)
    for path in (out / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["name"] = names.get(category["name"], category["name"])
        path.write_text(json.dumps(content))
    return out


def loaded(caplog) -> logging.LogRecord:
    (record,) = [each for each in caplog.records if ".safetensors: loaded " in each.getMessage()]
    return record


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_artifact(folder / "artifact").tensors


def test_a_detector_of_the_same_classes_keeps_everything(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    detect.run(["train", str(folder / "run" / "artifact"), "--data", str(folder / "coco"), *STILL,
                "--short-side", "64", "--out", str(tmp_path / "run")])  # fmt: skip
    before, after = tensors(folder / "run"), tensors(tmp_path / "run")
    assert before.keys() == after.keys()  # 32 channels, as there
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())
    said = loaded(caplog)
    assert said.levelname == "INFO" and said.getMessage().count(f"{len(before)}") >= 2
    assert said.getMessage().endswith(")")


def test_other_classes_of_the_same_number_get_new_layers(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    data = renamed(folder, {"square": "box"}, tmp_path / "data")
    detect.run(["train", str(folder / "run" / "artifact"), "--data", str(data), *STILL, "--short-side", "64",
                "--out", str(tmp_path / "run")])  # fmt: skip
    before, after = tensors(folder / "run"), tensors(tmp_path / "run")
    new = {name for name, tensor in before.items() if not torch.allclose(after[name], tensor, atol=1e-6)}
    last = ("cls.weight", "cls.bias", "reg.weight", "reg.bias")
    assert new == {f"roi_head.bbox_head.fc_{which}" for which in last}
    said = loaded(caplog)
    assert said.levelname == "INFO"
    count = len(before)
    assert f"loaded {count - 4} of the model's {count} tensors (backbone " in said.getMessage()
    assert "new, since the classes are others: roi_head.bbox_head.fc_cls.weight, " in said.getMessage()


@pytest.mark.slow
def test_another_architecture_takes_the_parts_that_fit(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    detect.run(["train", str(folder / "run" / "artifact"), "--data", str(folder / "coco"), *STILL,
                "--model", "retinanet", "--head-channels", "32", "--short-side", "64",
                "--out", str(tmp_path / "run")])  # fmt: skip
    said = loaded(caplog)
    assert said.levelname == "WARNING" and "heads 0 of" in said.getMessage()


@pytest.mark.slow
def test_a_segmentor_goes_on_from_a_segmentor_and_from_the_encoder_of_a_detector(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    data = ["--data", str(labelled(tmp_path / "scenes", train=2, val=1)), *STILL]
    small = ["--image-size", "64", "--head-channels", "32"]
    first, second = tmp_path / "first", tmp_path / "second"
    segment.run(["train", str(folder / "run" / "artifact"), *data, *small, "--out", str(first)])
    assert "starts from the encoder of the detector" in caplog.text and "the rest is new" in caplog.text
    segment.run(["train", str(first / "artifact"), *data, "--image-size", "64", "--out", str(second)])
    before, after = tensors(first), tensors(second)
    learned = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in learned)


def test_a_mask_head_needs_masks(folder, tmp_path):
    masked = tmp_path / "masked"
    shutil.copytree(folder / "run" / "artifact", masked)
    content = json.loads((masked / "config.json").read_text())
    content.pop("checksums")
    content["head"]["model"]["roi_head"]["mask_head"] = {"type": "FCNMaskHead"}
    (masked / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"masked: needs a mask for every object; .* use --model faster-rcnn"):
        detect.run(["train", str(masked), "--data", str(folder / "coco"), "--out", str(tmp_path / "run")])


def test_an_artifact_that_names_other_code_is_refused_before_training(folder, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder / "run" / "artifact", spoilt)
    content = json.loads((spoilt / "config.json").read_text())
    content.pop("checksums")
    content["head"]["model"]["neck"] = {"type": "os.mkdir", "path": str(tmp_path / "mark")}
    (spoilt / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadArtifact, match=r"names 'os\.mkdir'"):
        detect.run(["train", str(spoilt), "--data", str(folder / "coco"), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "mark").exists()


def test_files_of_safetensors_are_checkpoints(folder, tmp_path):
    from mmengine.runner import CheckpointLoader

    found = CheckpointLoader.load_checkpoint(str(folder / "run" / "artifact" / "model.safetensors"), "cpu")
    assert found["meta"]["dataset_meta"]["classes"] == ("square", "disc")
    assert found["state_dict"].keys() == tensors(folder / "run").keys()
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    plain = CheckpointLoader.load_checkpoint(str(tmp_path / "plain.safetensors"), "cpu")
    assert torch.equal(plain["state_dict"]["a"], torch.ones(2))
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(BadInput, match=r"bad\.safetensors: cannot be read"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "bad.safetensors"), "cpu")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "run" / "artifact", damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(BadArtifact, match="damaged or replaced"):
        CheckpointLoader.load_checkpoint(str(damaged / "model.safetensors"), "cpu")


def test_a_model_that_cannot_be_built_with_another_class_is_told_of(caplog):
    from downstream.openmmlab.transfer import class_tensors

    assert class_tensors({"type": "NoSuchModel", "num_classes": 2}) == set()
    assert (
        "all layers that fit are loaded, also those of other classes: 'NoSuchModel is not in" in caplog.text
    )


def test_two_flags_for_one_size_are_refused(folder, tmp_path):
    options = ["--data", str(folder / "coco"), "--image-size", "64", "--short-side", "64"]
    with pytest.raises(BadInput, match="--image-size, --short-side: both say"):
        detect.run(["train", str(folder / "encoder"), *options, "--out", str(tmp_path / "run")])
