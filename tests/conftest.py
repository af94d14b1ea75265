"""What tests share: one thread each, so that results depend on no machine, a few pictures, a short run."""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from class_folders import class_folders
from filelock import FileLock
from PIL import Image
from short_runs import MODEL, OBJECTIVE, at
from taught_models import timm_weights

from coma.config import DataConfig, OptimizerConfig, PretrainConfig, RunConfig
from coma.image_size import ImageSize
from pretrain.training import pretrain

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which programs in the background may ignore
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup() -> None:
    """Random numbers of torch do not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_scope_of_mmengine() -> None:
    """Every test begins without a default scope of mmengine, even after another test has set one."""
    if registry := sys.modules.get("mmengine.registry"):
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def logs_of_mmengine_are_closed() -> Iterator[None]:
    """No test leaves a log of mmengine open.

    Whenever another test initialises a model, mmengine writes to it, and fails where a server that
    configured its own logging has closed it.
    """
    yield
    mmengine = sys.modules.get("mmengine.logging")
    loggers = mmengine.MMLogger._instance_dict.values() if mmengine else ()
    handlers = [handler for logger in loggers for handler in logger.handlers]
    opened = [each.baseFilename for each in handlers if isinstance(each, logging.FileHandler)]
    assert not opened, f"end the run in downstream.openmmlab.runner.closed_log: {opened}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accelerator",
        default="cuda",
        choices=["cuda", "cpu"],
        help="device of the tests marked gpu; cpu shows that they themselves work",
    )
    parser.addoption(
        "--renew-golden",
        action="store_true",
        help="write tests/golden anew, in place of comparing with what is there",
    )


@pytest.fixture
def golden_curve(request: pytest.FixtureRequest) -> Callable[[str, str, list[float]], None]:
    """Compares a loss curve with the one of this name in a file of `tests/golden`."""

    def compare(file: str, name: str, curve: list[float]) -> None:
        path = Path(__file__).parent / "golden" / file
        curves = json.loads(path.read_text())
        if request.config.getoption("--renew-golden"):
            curves[name] = [round(loss, 5) for loss in curve]
            path.write_text(json.dumps(curves, indent=0) + "\n")
        assert curve == pytest.approx(curves[name], rel=0.01)
        assert curve[-1] < 0.9 * curve[0]

    return compare


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test marked gpu, which is skipped where there is none."""
    name = str(request.config.getoption("--accelerator"))
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here")
    return torch.device(name)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes that run the tests, so that a file is written once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a folder that a function fills, in the first of all processes that asks; to be read alone."""

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten small pictures of noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise in train and test folders."""
    return class_folders(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of timm's smallest vision transformer."""
    return timm_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def settings(photos: Path, tmp_path: Path) -> PretrainConfig:
    """Five steps of a very small model."""
    return PretrainConfig(
        data=DataConfig(images=photos, image_size=ImageSize.of(16), workers=0),
        model=MODEL,
        objective=OBJECTIVE,
        optimizer=OptimizerConfig(steps=5, batch_size=4),
        run=RunConfig(out=tmp_path / "run", log_steps=2, save_steps=2, reconstruction_every=3, device="cpu"),
    )


@pytest.fixture(scope="module")
def resumable(photos: Path) -> PretrainConfig:
    """Seven steps that use whatever a resumed run has to restore: accumulation, drop path, moving average."""
    return PretrainConfig(
        data=DataConfig(images=photos, image_size=ImageSize.of(16), workers=0),
        model=replace(MODEL, drop_path=0.3),
        objective=OBJECTIVE,
        optimizer=OptimizerConfig(steps=7, batch_size=4, micro_batch=2, base_lr=0.1, ema_decay=0.9),
        run=RunConfig(log_steps=3, save_steps=2, reconstruction_every=0, device="cpu"),
    )


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Drawing takes longer than these runs do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reconstruction_sheet", "loss_curve"):
            patch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def whole(resumable: PretrainConfig, no_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains the run of `resumable` without an interruption; returns its folder."""
    return pretrain(at(resumable, tmp_path_factory.mktemp("whole") / "run"))
