"""`coma embed`: features of every kind of model, and nothing lost or there twice, however it is stopped."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_files import DYVIT, VIT, backbone, classifier, export, pretrained
from PIL import Image

from coma.artifact import load_artifact, load_encoder
from coma.artifact.load import artifact_hash
from coma.cli import CHILD, main
from coma.data import evaluation_batches, normalize, open_source
from downstream.features.files import FeaturesFile
from downstream.features.parts import Parts

COUNT = 23
BROKEN = ("07.png", "19.png")
QUICK = ("--device", "cpu", "--workers", "0", "--batch-size", "4", "--part-images", "6")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Noise with a colour of its own in every picture; two files are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        colour = rng.integers(0, 200, 3)
        noise = (colour + rng.integers(0, 56, (60, 70, 3))).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
    for name in BROKEN:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return backbone(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture(scope="module")
def reference(model, pictures, tmp_path_factory) -> Path:
    """The features of an undisturbed run."""
    path = tmp_path_factory.mktemp("reference") / "features.parquet"
    assert embed(model, pictures, path) == 0
    return path


def embed(model, images, out, *more) -> int:
    return main(["embed", str(model), str(images), "--out", str(out), *QUICK, *more])


def content(path: Path) -> tuple[list[str], np.ndarray]:
    groups = list(FeaturesFile(path).groups())
    return [name for rows in groups for name in rows.paths], np.concatenate([rows.values for rows in groups])


def same(one: Path, other: Path) -> bool:
    (names, values), (others, wanted) = content(one), content(other)
    return names == others and np.allclose(values, wanted, atol=1e-5)


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


# stopping and resuming


def test_a_stopped_command_continues(model, pictures, reference, tmp_path, monkeypatch, capsys, caplog):
    out, computed = tmp_path / "f.parquet", []
    write = Parts.write

    def stop_after_two(self, number, content):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(number)
        write(self, number, content)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", stop_after_two)
        assert embed(model, pictures, out) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not out.exists() and computed == [0, 1]
    parts = sorted((tmp_path / "f.parquet.parts").iterdir())
    before = {path: path.stat().st_mtime_ns for path in parts}
    (tmp_path / "f.parquet.parts" / ".part-000002.parquet.part").write_bytes(b"half")  # of a kill -9

    def keep(self, number, content):
        computed.append(number)
        write(self, number, content)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", keep)
        assert embed(model, pictures, out) == 0
    assert computed == [0, 1, 2, 3]
    assert "12 images of 23 are done already" in caplog.text
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))
    written = out.read_bytes()
    assert embed(model, pictures, out) == 0  # there is nothing left to do
    assert "is complete already" in caplog.text and out.read_bytes() == written


def test_a_kill_while_parts_are_merged_loses_nothing(model, pictures, reference, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"

    def killed(*_):
        raise KeyboardInterrupt

    for target in ("downstream.features.parts.write_features", "downstream.features.parts.shutil.rmtree"):
        with monkeypatch.context() as patch:
            patch.setattr(target, killed)
            assert embed(model, pictures, out) == 130
        assert list(tmp_path.glob("*.parts"))
    assert embed(model, pictures, out) == 0
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))


def test_a_full_disk_keeps_finished_parts(model, pictures, reference, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "f.parquet", os.write
    left = [12_000]

    def nearly_full(number, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        assert embed(model, pictures, out) == 1
    said = capsys.readouterr().err
    assert "No space left on device; " in said and "finished part" in said and "same command again" in said
    assert embed(model, pictures, out) == 0 and same(out, reference)


@pytest.fixture
def one_thread(monkeypatch):
    """Processes side by side are slow where each has a thread for every core."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_kill_9_loses_nothing_and_writes_nothing_twice(model, pictures, reference, tmp_path):
    out = tmp_path / "f.parquet"
    command = [*CHILD, "embed", str(model), str(pictures), "--out", str(out), *QUICK, "--part-images", "1"]
    for more in (1, 8, 15):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while len(list(tmp_path.glob("f.parquet.parts/part-*"))) < more and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_torchrun_shares_the_work(model, pictures, reference, tmp_path):
    out = tmp_path / "f.parquet"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "coma", "embed", str(model), str(pictures), "--out", str(out), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))
    assert done.stdout.count("features of 21 images") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_ray_cluster_that_loses_a_machine_loses_nothing(model, pictures, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    command = [str(model), str(pictures), "--out", str(tmp_path / "f.parquet"), *QUICK, "--part-images", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *command], capture_output=True, text=True, timeout=580, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost a machine after" in done.stdout
    assert same(tmp_path / "f.parquet", reference) and not list(tmp_path.glob("*.parts"))


CLUSTER = """
import subprocess, sys, time
from pathlib import Path
from typing import Any
from ray.cluster_utils import Cluster

out = Path(sys.argv[sys.argv.index("--out") + 1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
try:
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = [sys.executable, "-P", "-m", "coma", "embed", *sys.argv[1:], "--ray", cluster.address]
    process = subprocess.Popen(command)
    parts = out.with_name(out.name + ".parts")
    while len(list(parts.glob("part-*"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    done = len(list(parts.glob("part-*")))
    cluster.remove_node(workers[0], allow_graceful=False)
    print("lost a machine after", done, "parts", flush=True)
    assert 0 < done < 23, done
    code = process.wait(400)
finally:
    cluster.shutdown()
sys.exit(code)
"""


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
