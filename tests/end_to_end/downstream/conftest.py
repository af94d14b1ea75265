"""Runs that test files of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import export_files
import numpy as np
import pytest
from classifier_runs import fill, seven_steps, to
from downstream_data import SMALL, artifact, coco
from embedding_runs import BROKEN, COUNT, embed
from PIL import Image

from coma.config import FinetuneConfig
from downstream.classify.finetune import finetune
from downstream.commands.detect import run


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set in COCO's format."""
    return coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """An artifact with a backbone."""
    return artifact(tmp_path_factory.mktemp("backbone") / "artifact")


@pytest.fixture(scope="session")
def trained(data, backbone, tmp_path_factory) -> Path:
    """A detector's run of four steps, validated twice."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data", str(data), "--out", str(out), "--steps", "4", "--validations", "2", *SMALL]
    run(["train", str(backbone), *options])
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled images and an encoder's artifact."""
    return fill(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def short(place: Path) -> FinetuneConfig:
    """Settings of a classifier's run of seven steps."""
    return seven_steps(place)


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Drawing takes longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.training.run_directory.loss_curve", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def linear(short: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a linear head on frozen features."""
    out = tmp_path_factory.mktemp("linear") / "run"
    finetune(to(short, out, frozen=True))
    return out


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
    """The artifact whose features are computed."""
    return export_files.backbone(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture(scope="module")
def reference(model, pictures, tmp_path_factory) -> Path:
    """The features of an undisturbed run."""
    path = tmp_path_factory.mktemp("reference") / "features.parquet"
    assert embed(model, pictures, path) == 0
    return path
