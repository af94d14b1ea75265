"""Runs of a few steps, and what must come out of them alike whatever happens on the way."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coma.artifact import load_artifact
from coma.config import CoMAConfig, DecoderConfig, DyViTConfig, InitConfig, PretrainConfig
from coma.errors import Interrupted
from pretrain.training import pretrain
from pretrain.training.checkpoint import read_state
from pretrain.training.train_step import TrainStep

MODEL = DyViTConfig(
    patch=1, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8), (4,), (4,), (0,))
)
OBJECTIVE = CoMAConfig(decoder=DecoderConfig(8, 1, 2))
ROWS = ["images", "crops", "model", "FLOPs", "steps", "learning rate", "device", "writes"]
"""Titles of the lines that open a run."""


def at(config: PretrainConfig, out: Path, **changes: Any) -> PretrainConfig:
    return replace(config, run=replace(config.run, out=out, **changes))


def rows(run: Path) -> list[dict[str, Any]]:
    """What a run logged, a row for every log point."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(text: str) -> dict[str, str]:
    """The lines that open a run, or that a dry run prints, by their titles."""
    found = [re.fullmatch(r"(\S.{0,13}?) {2,}(.+)", line) for line in text.splitlines()]
    return {match[1]: match[2] for match in found if match}


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def learned(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What must not depend on interruptions: metrics without timings, published weights."""
    logged = rows(run)
    for row in logged:
        for name in ("images_per_s", "data_wait", "memory_gib", "cpu_s", "probe_seconds"):
            row.pop(name, None)
    return logged, load_artifact(run / "artifact").tensors


def assert_same(run: Path, other: Path) -> None:
    (logged, weights), (other_logged, other_weights) = learned(run), learned(other)
    assert logged == other_logged
    assert list(weights) == list(other_weights)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    state, other_state = (read_state(folder / "state", warn=pytest.fail) for folder in (run, other))
    assert same(state, other_state)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def stop_during(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    take = TrainStep.__call__

    def step_and_signal(self: TrainStep, n: int, *rest: Any) -> Any:
        if n == step:
            os.kill(os.getpid(), number)
        return take(self, n, *rest)

    patch.setattr(TrainStep, "__call__", step_and_signal)


def interrupted(config: PretrainConfig, step: int) -> None:
    """Run until a signal in the middle of a step ends it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_during(patch, step)
        pretrain(config)


class Killed(BaseException):
    """What ends a run at once, as SIGKILL would: nothing is saved."""


def killed_in(patch: pytest.MonkeyPatch, step: int) -> None:
    """End the run in the middle of a step."""
    take = TrainStep.__call__

    def step_or_end(self: TrainStep, n: int, *rest: Any) -> Any:
        if n == step:
            raise Killed
        return take(self, n, *rest)

    patch.setattr(TrainStep, "__call__", step_or_end)


def starting(config: PretrainConfig, weights: Path | str, **settings: Any) -> PretrainConfig:
    """Returns the settings of a run that starts from these weights."""
    return replace(config, init=InitConfig(str(weights), **settings))
