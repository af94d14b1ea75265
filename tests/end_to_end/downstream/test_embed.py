"""`coma embed`: features of every kind of model, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_runs import BROKEN, COUNT, QUICK, content, embed, same
from export_files import DYVIT, VIT, backbone, classifier, export, pretrained
from PIL import Image

from coma.artifact import load_artifact, load_encoder
from coma.artifact.load import artifact_hash
from coma.cli import main
from coma.data import evaluation_batches, normalize, open_source
from downstream.features.files import FeaturesFile


def by_hand(artifact: Path, images: Path) -> tuple[torch.Tensor, ...]:
    encoder, about = load_encoder(artifact), load_artifact(artifact).config
    source = open_source(images)
    (batch,) = evaluation_batches(source, image_size=about.image_size, channels=3, batch_size=64, workers=0)
    with torch.inference_mode():
        return tuple(encoder(normalize(batch.images, about.mean, about.std)))


def test_features_are_those_of_the_encoder(model, pictures, reference, capsys):
    names, values = content(reference)
    assert names == [f"{i:02d}.png" for i in range(COUNT) if f"{i:02d}.png" not in BROKEN]
    pyramid = by_hand(model, pictures)
    assert np.allclose(values, pyramid[-1].mean(dim=(2, 3)).numpy(), atol=1e-5)
    file = FeaturesFile(reference)
    assert file.info.spec.sha256 == artifact_hash(model) and file.info.spec.model == str(model)
    assert file.info.location == str(pictures) and file.info.spec.image_size == (48, 48)
    assert len(file.info.skipped) == 2 and BROKEN[0] in file.info.skipped[0]
    assert not list(reference.parent.glob("*.parts"))


def test_stages_and_maps_are_those_of_the_encoder(model, pictures, tmp_path):
    pyramid = by_hand(model, pictures)
    assert embed(model, pictures, tmp_path / "stage.npz", "--stage", "2") == 0
    assert np.allclose(content(tmp_path / "stage.npz")[1], pyramid[1].mean(dim=(2, 3)).numpy(), atol=1e-5)
    assert embed(model, pictures, tmp_path / "map.parquet", "--stage", "3", "--pooling", "none") == 0
    assert np.allclose(content(tmp_path / "map.parquet")[1], pyramid[2].numpy(), atol=1e-5)
    assert embed(model, pictures, tmp_path / "last.npz", "--pooling", "none") == 0
    assert np.allclose(content(tmp_path / "last.npz")[1], pyramid[-1].numpy(), atol=1e-5)
    assert embed(model, pictures, tmp_path / "large.npz", "--image-size", "64") == 0
    assert FeaturesFile(tmp_path / "large.npz").info.spec.image_size == (64, 64)


def test_a_runtime_that_takes_fewer_images_gets_fewer(model, pictures, reference, tmp_path, monkeypatch):
    from coma.runtimes.pytorch import TorchRuntime

    def engine(runtime: TorchRuntime, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert len(images) <= 3
        return forward(runtime, images)

    forward = TorchRuntime.__call__
    monkeypatch.setattr(TorchRuntime, "largest_batch", 3, raising=False)
    monkeypatch.setattr(TorchRuntime, "__call__", engine)
    assert embed(model, pictures, tmp_path / "f.npz") == 0
    assert np.allclose(content(tmp_path / "f.npz")[1], content(reference)[1], atol=1e-5)


@pytest.mark.parametrize(("kind", "encoder"), [(pretrained, DYVIT), (classifier, DYVIT), (classifier, VIT)])
def test_every_kind_of_artifact_has_an_encoder(kind, encoder, pictures, tmp_path):
    artifact = kind(tmp_path / "artifact", encoder)
    assert embed(artifact, pictures, tmp_path / "f.npz") == 0
    assert np.allclose(
        content(tmp_path / "f.npz")[1], by_hand(artifact, pictures)[-1].mean(dim=(2, 3)).numpy(), atol=1e-5
    )


@pytest.mark.openmmlab
@pytest.mark.filterwarnings("ignore")  # mm's packages warn of each other
def test_the_encoder_of_a_segmentor(pictures, tmp_path):
    from export_files import segmentor

    artifact = segmentor(tmp_path / "artifact")
    assert embed(artifact, pictures, tmp_path / "f.npz") == 0
    assert np.allclose(
        content(tmp_path / "f.npz")[1], by_hand(artifact, pictures)[-1].mean(dim=(2, 3)).numpy(), atol=1e-4
    )


@pytest.mark.slow
def test_exported_files_are_the_same_model(model, pictures, reference, tmp_path, capsys):
    exports = model.parent / "export"
    assert export(model, "--out", str(exports)) == 0
    file = next(exports.glob("*.onnx"))
    for name, given in {"folder": exports, "file": file}.items():
        assert embed(given, pictures, tmp_path / f"{name}.parquet") == 0
        assert same(tmp_path / f"{name}.parquet", reference)
    assert embed(model, pictures, tmp_path / "beside.parquet", "--runtime", "onnxruntime") == 0
    beside = FeaturesFile(tmp_path / "beside.parquet").info
    assert beside.spec.sha256 == artifact_hash(model) and "ONNX Runtime" in beside.runtime
    assert embed(file, pictures, tmp_path / "no.npz", "--image-size", "64") == 2
    assert "this file takes 48 x 48 px only" in capsys.readouterr().err


def test_timm_models_are_found_in_the_cache(pictures, tmp_path, monkeypatch, capsys):
    import timm
    import timm.data
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name = "test_vit.r160_in1k"
    assert embed(f"timm:{name}", pictures, tmp_path / "f.parquet") == 2
    assert "--download" in capsys.readouterr().err
    torch.manual_seed(0)
    net: Any = timm.create_model(name).eval()
    snapshot = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, snapshot / "model.safetensors")
    assert embed(f"timm:{name}", pictures, tmp_path / "f.parquet") == 0, capsys.readouterr().err
    names, values = content(tmp_path / "f.parquet")
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    images = torch.stack([transform(Image.open(pictures / each)) for each in names])
    with torch.inference_mode():
        wanted = net.forward_head(net.forward_features(images), pre_logits=True)
    assert np.allclose(values, wanted.numpy(), atol=1e-5)
    assert embed(f"timm:{name}", pictures, tmp_path / "block.npz", "--stage", "2", "--pooling", "none") == 0
    with torch.inference_mode():
        (block,) = net.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert np.allclose(content(tmp_path / "block.npz")[1], block.numpy(), atol=1e-5)
    assert embed(f"timm:{name}", pictures, tmp_path / "no.npz", "--stage", "99") == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    backbone(Path(f"timm:{name}"))
    assert embed(f"timm:{name}", pictures, tmp_path / "path.npz") == 0  # a path comes before a name
    assert FeaturesFile(tmp_path / "path.npz").info.spec.image_size == (48, 48)


def test_shards_and_packs_are_read_too(model, pictures, tmp_path):
    shards = tmp_path / "shards"
    assert main(["pack", str(pictures), "--out", str(shards), "--workers", "0"]) == 0
    assert embed(model, shards, tmp_path / "shards.parquet") == 0
    assert content(tmp_path / "shards.parquet")[0][0].startswith("shard-000000.tar/")
    assert len(content(tmp_path / "shards.parquet")[0]) == COUNT - len(BROKEN)


# what cannot be used


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--stage", "9"], "--stage 9: .* has 4 stages; give 1 to 4"),
        (["--stage", "0"], "--stage 0 must be 1 to 1000"),
        (["--image-size", "8"], "--image-size 8 must be at least the mask unit of 16 px"),
        (["--out", "features.csv"], "give a name that ends in .parquet or .npz"),
        (["--out", "features"], "give a name that ends in .parquet or .npz"),
        (["--ray", " "], "--ray: give the address"),
        (["--ray", "127.0.0.1:1"], "--ray .*:1: the cluster cannot be reached"),
        (["--runtime", "onnxruntime"], "run coma export .* first"),
        (["--split", "test"], "no split 'test'"),
        (["--device", "tpu"], "--device 'tpu' must be auto, cuda or cpu"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(change, message, pictures, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    artifact = backbone(tmp_path / "alone" / "artifact")
    capsys.readouterr()
    assert main(["embed", str(artifact), str(pictures), "--out", "f.parquet", *QUICK, *change]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert error.startswith("error: ")


def test_models_that_are_none_are_refused(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(b"x")
    for name, message in {
        "gone": "no such",
        "weights.pth": "file of weights",
        "timm:no_such_model": "has no such model",
        "hf-hub:a/b": "give timm:NAME",
        "": "names no file",
    }.items():
        assert embed(name, pictures, "f.parquet") == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error


def test_folders_without_a_readable_image_are_refused(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert embed(model, tmp_path / "empty", tmp_path / "f.parquet") == 2
    assert "the folder is empty" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert embed(model, tmp_path / "broken", tmp_path / "f.parquet") == 2
    assert "no image could be read; the first: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty"]


def test_a_file_of_other_features_is_not_overwritten(model, pictures, reference, tmp_path, capsys):
    before = reference.read_bytes()
    assert embed(model, pictures, reference, "--stage", "1") == 2
    error = capsys.readouterr().err
    assert "is of another request" in error and "stage None there, 1 now" in error
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (60, 60)).save(other / "a.png")
    assert embed(model, other, reference) == 2
    (tmp_path / "notes.parquet").write_text("mine")
    assert embed(model, pictures, tmp_path / "notes.parquet") == 2
    (tmp_path / "f.parquet.parts").mkdir()
    (tmp_path / "f.parquet.parts" / "mine.txt").write_text("mine")
    assert embed(model, pictures, tmp_path / "f.parquet") == 2
    assert "has other files" in capsys.readouterr().err
    assert reference.read_bytes() == before
    assert (tmp_path / "notes.parquet").read_text() == "mine"


def test_damaged_weights_are_said(pictures, tmp_path, capsys):
    from export_files import about, awake

    from coma.artifact import save_artifact
    from coma.models import build_encoder

    tensors = awake(build_encoder(DYVIT)).state_dict()
    tensors["norm.weight"].fill_(float("nan"))
    save_artifact(tmp_path / "artifact", tensors=tensors, config=about("backbone"))
    assert embed(tmp_path / "artifact", pictures, tmp_path / "f.npz") == 1
    assert "not finite; its weights are damaged" in capsys.readouterr().err
