"""Runs that test files of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from classifier_runs import fill, seven_steps
from downstream_data import SMALL, artifact, coco

from coma.config import FinetuneConfig
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
