"""Two processes are one process with the same global batch; what goes wrong on one ends all."""

import json
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from remote_files import serve
from short_runs import rows
from torch import nn

from coma.artifact import load_artifact
from coma.config import (
    BeyondConfig,
    CMTConfig,
    CoMAConfig,
    DataConfig,
    DecoderConfig,
    DyViTConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TeacherConfig,
)
from coma.config.serialization import to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.locks import lock_run
from coma.models import build_encoder
from coma.objectives import build_objective
from pretrain.training import pretrain, replay_nonfinite
from pretrain.training.distributed import innermost_blocks, processes

ROOT = Path(__file__).resolve().parents[3]

PAIR = """
import os, signal, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
import torch.distributed.fsdp
from coma.config.serialization import read_config
from coma.data import open_source
from coma.errors import ComaError
from coma.paths import Address
from pretrain.training import pretrain
from pretrain.training import run_directory
from pretrain.training import run_plan
from pretrain.training.distributed import AGREED
from pretrain.training.train_step import TrainStep

torch.set_num_threads(1)
run_directory.reconstruction_sheet = run_directory.loss_curve = lambda *_, **__: None
folder = Path(sys.argv[1])
take = TrainStep.__call__

def at_step(number, action):
    def step(self, n, *rest):
        if n == number:
            action(self)
        return take(self, n, *rest)
    TrainStep.__call__ = step

def poison(train_step):
    with torch.no_grad():
        train_step.objective.decoder.head.bias[0] = float("nan")

def scenario(name, rank):
    method = folder / f"{name.partition('-')[0]}.json"
    config = read_config(method if method.exists() else folder / "config.json")
    resume, run, data = False, config.run, config.data
    if name in ("ddp", "fsdp"):
        run = replace(run, parallel=name)
    elif name == "fsdp-then-one" and rank == 1:
        at_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    elif name == "one-then-fsdp":
        resume = True
    elif name == "bug" and rank == 1:
        at_step(1, lambda _: sys.exit(3))
    elif name == "unreadable":
        data = replace(data, on_bad_image="stop")
        run_plan.open_source = lambda path: open_source(folder / "bad" if rank else path)
    elif name == "other-data":
        run_plan.open_source = lambda path: open_source(folder / "fewer" if rank else path)
    elif name == "remote":
        data = replace(data, images=Address((folder / "shard").read_text()))
    elif name == "nonfinite":
        at_step(2, poison)
    elif name.startswith("compiled"):
        torch.compile, run = partial(torch.compile, backend="aot_eager"), replace(run, compile=True)
    if "fsdp" in name:
        run = replace(run, parallel="fsdp")
    config = replace(config, data=data, run=replace(run, out=folder / name))
    pretrain(config, resume=resume, dry_run=name == "dry")
    assert not run.compile or torch._dynamo.utils.counters["frames"]["ok"]

def member(name, rank, port):
    log = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        scenario(name, rank)
    except ComaError as error:
        agreed = AGREED in getattr(error, "__notes__", ())
        print("agreed" if agreed else "alone", type(error).__name__, error)
        sys.exit(error.exit_code)
    sys.exit(0)

for line in sys.stdin:
    (name, port), children = line.split(), []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            member(name, rank, port)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*codes, flush=True)
"""

METHODS = ("cmt", "cmt-fsdp", "zoom", "muon", "muon-fsdp")
COMPILED = ("compiled-ddp", "compiled-fsdp")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """Four images per step, two by two, whether on one process or on two."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for place, count in (("photos", 10), ("fewer", 9), ("bad", 10)):
        (folder / place).mkdir()
        for number in range(count):
            path = folder / place / f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
            if place == "bad" and number > 1:
                path.write_bytes(b"not a picture")
    return PretrainConfig(
        data=DataConfig(
            images=folder / "photos", image_size=ImageSize.of(16), workers=0, mean=(0.5,) * 3, std=(0.3,) * 3
        ),
        model=DyViTConfig(
            patch=1,
            dim=8,
            depths=(1, 1, 1, 1),
            heads=(2, 2, 2, 2),
            windows=((4, 8), (4,), (4,), (0,)),
            drop_path=0.3,
        ),
        objective=CoMAConfig(decoder=DecoderConfig(8, 1, 2)),
        optimizer=OptimizerConfig(steps=5, batch_size=4, micro_batch=2, base_lr=0.05, ema_decay=0.8),
        run=RunConfig(out=folder / "one", log_steps=1, save_steps=2, reconstruction_every=0, device="cpu"),
    )


@pytest.fixture(scope="module")
def folder(settings: PretrainConfig) -> Path:
    return settings.run.out.parent


@pytest.fixture(scope="module")
def one(settings: PretrainConfig) -> Path:
    return pretrain(settings)


@pytest.fixture(scope="module")
def methods(settings: PretrainConfig, folder: Path, one: Path) -> dict[str, Path]:
    """Runs of other methods than the first one's, which teaches one of them, and one with Muon."""
    decoder = settings.objective.decoder
    found = {}
    for name, objective in (
        (
            "cmt",
            CMTConfig(TeacherConfig(str(one / "artifact")), random_share=0.4, ema_decay=0.9, decoder=decoder),
        ),
        ("zoom", BeyondConfig("zoom-in+coma", decoder=decoder)),
        ("muon", settings.objective),
    ):
        run = replace(settings.run, out=folder / f"one-{name}")
        optimizer = replace(settings.optimizer, optimizer="muon" if name == "muon" else "adamw")
        config = replace(settings, objective=objective, run=run, optimizer=optimizer)
        (folder / f"{name}.json").write_text(json.dumps(to_plain(config)))
        found[name] = pretrain(config)
    return found


class Pairs(dict[str, tuple[int, int]]):
    """Exit codes of both processes of a scenario, which runs when it is first asked for."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        super().__init__()
        self.folder, self.server = folder, server

    def __missing__(self, name: str) -> tuple[int, int]:
        assert self.server.stdin and self.server.stdout
        print(name, free_port(), file=self.server.stdin, flush=True)
        first, second = self.server.stdout.readline().split()
        self[name] = int(first), int(second)
        return self[name]

    def said(self, name: str) -> list[str]:
        """What each process said."""
        _ = self[name]
        return [(self.folder / f"{name}-{rank}.log").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def codes(settings: PretrainConfig, folder: Path) -> Iterator[Pairs]:
    """One process imports everything, and forks the two of every scenario."""
    (folder / "config.json").write_text(json.dumps(to_plain(settings)))
    command = [sys.executable, "-c", PAIR, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Pairs(folder, server)


def dying(patch: pytest.MonkeyPatch, step: int) -> None:
    from pretrain.training.train_step import TrainStep

    take = TrainStep.__call__
    patch.setattr(TrainStep, "__call__", lambda self, n, *rest: take(self, n, *rest) if n < step else 1 / 0)


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


def assert_close(run: Path, other: Path, rel: float = 1e-5) -> None:
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(other)] == [1, 2, 3, 4, 5]
    own = {"explained_variance", "loss_teacher", "loss_student", "loss_pixels"} & rows(other)[0].keys()
    for key in ("loss", "grad_norm", "lr", "images_seen", *own):
        ours, theirs = ([row[key] for row in rows(folder)] for folder in (run, other))
        assert ours == pytest.approx(theirs, rel=rel), key
    weights, expected = (load_artifact(folder / "artifact").tensors for folder in (run, other))
    assert list(weights) == list(expected)
    for name in weights:
        one, two = (without_key_bias(name, tensors[name]) for tensors in (weights, expected))
        torch.testing.assert_close(one, two, rtol=10 * rel, atol=rel, msg=lambda m, n=name: f"{n}: {m}")


def without_key_bias(name: str, weight: torch.Tensor) -> torch.Tensor:
    """No softmax sees what all keys share: its gradient is rounding alone, of which AdamW makes a step."""
    if not (name.startswith("decoder.") and name.endswith("qkv.bias")):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


def test_the_first_of_two_processes_says_what_the_run_is_going_to_do(codes, folder):
    first, second = codes.said("dry")
    assert codes["dry"] == (0, 0), (first, second)
    assert "steps          5 of 4 images (2 processes), which are 2 epochs" in first
    assert "device         cpu, fp32, ddp" in first and "mean of 2 steps after the first" in first
    assert second == "" and not (folder / "dry").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(codes, folder, one, parallel):
    assert codes[parallel] == (0, 0), codes.said(parallel)
    assert_close(folder / parallel, one)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", COMPILED)
def test_two_compiled_processes_are_one(codes, folder, one, parallel):
    assert codes[parallel] == (0, 0), codes.said(parallel)
    assert_close(folder / parallel, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_whatever_the_method(codes, folder, methods, name):
    assert codes[name] == (0, 0), codes.said(name)
    rel = 1e-4 if name == "muon-fsdp" else 1e-5  # Muon rounds to bf16, which enlarges the last bits of sums
    assert_close(folder / name, methods[name.partition("-")[0]], rel)


def test_one_process_goes_on_where_two_were_stopped(codes, folder, settings, one):
    assert codes["fsdp-then-one"] == (130, 130), codes.said("fsdp-then-one")
    run = folder / "fsdp-then-one"
    assert len(rows(run)) == 3
    pretrain(replace(settings, run=replace(settings.run, out=run)), resume=True)
    assert_close(run, one)


def test_two_processes_go_on_where_one_was_killed(codes, folder, settings, one):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        dying(patch, 3)
        pretrain(replace(settings, run=replace(settings.run, out=folder / "one-then-fsdp")))
    assert codes["one-then-fsdp"] == (0, 0), codes.said("one-then-fsdp")
    assert_close(folder / "one-then-fsdp", one)


def test_two_processes_read_a_remote_shard_and_one_its_headers(codes, folder, one):
    (folder / "served").mkdir()
    with tarfile.open(folder / "served" / "photos.tar", "w") as tar:
        for path in sorted((folder / "photos").iterdir()):
            tar.add(path, path.name)
    with serve(folder / "served") as server:
        (folder / "shard").write_text(f"{server.url}/photos.tar")
        assert codes["remote"] == (0, 0), codes.said("remote")
        assert server.requests.count("/index.json") == 1
    assert_close(folder / "remote", one)


def test_only_process_0_speaks(codes, folder):
    first, second = codes.said("ddp")
    assert "step 5/5" in first
    assert second == ""


def test_what_one_process_finds_ends_both_with_one_message(codes, folder):
    assert codes["other-data"] == (2, 2)
    first, second = codes.said("other-data")
    assert first == second
    assert "agreed BadInput" in first
    assert "different numbers of images, [10, 9]" in first


def test_a_run_that_others_train_is_refused_on_both(codes, folder, settings):
    with lock_run(folder / "locked"):
        assert codes["locked"] == (2, 2)
    first, second = codes.said("locked")
    assert all(f"agreed BadInput another process is training in {folder}" in text for text in (first, second))


def test_a_bad_image_on_one_process_ends_both(codes, folder):
    """The one says what it met; the other says that it is not to blame."""
    first, second = codes.said("unreadable")
    assert codes["unreadable"] == (1, 2), (first, second)
    assert re.search(r"alone BadImage process 1 of 2 on \S+: \S+/bad/\d.png: ", second)
    assert "alone ComaError process 0 of 2: another process stopped; its own message says why" in first


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_other(codes, folder):
    first, _ = codes.said("bug")
    assert codes["bug"] == (1, 3)
    assert "alone ComaError process 0 of 2: another process stopped" in first


def test_a_loss_that_is_not_finite_is_written_down_whole(codes, folder, settings):
    first, _ = codes.said("nonfinite")
    assert codes["nonfinite"] == (1, 1), first
    assert "agreed CheckFailed step 3: loss nan" in first
    replay = replay_nonfinite(folder / "nonfinite" / "nonfinite" / "step-000003.safetensors")
    assert not np.isfinite(replay.loss)


def test_blocks_are_found_whatever_the_model():
    objective = build_objective(
        CoMAConfig(decoder=DecoderConfig(8, 3, 2)), build_encoder(DyViTConfig(dim=24))
    )
    blocks = innermost_blocks(objective)
    assert len(blocks) == sum(DyViTConfig.depths) + 3
    assert not any(isinstance(block, nn.ModuleList) for block in blocks)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(BadInput, match="has 2 GPUs; start torchrun with --nproc-per-node 2"),
        processes("auto"),
    ):
        pass
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadInput, match="--device cuda: not available here"), processes("cuda"):
        pass
