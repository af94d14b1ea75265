"""`benchmarks/gpu.py`: every step works at reduced sizes on a CPU, and nothing that a step does ends the run."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other by their names

from gpu_steps import session as sessions  # noqa: E402
from gpu_steps.session import Session, Skip  # noqa: E402
from gpu_steps.steps import STEPS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler, mm's packages and profilers have many
KEYS = [step.key for step in STEPS]


@pytest.fixture
def session(tmp_path, monkeypatch) -> Session:
    monkeypatch.setattr(sessions.torch, "set_num_threads", lambda count: None)
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    return Session(
        torch.device("cpu"), 30.0, tmp_path / "work", tmp_path / "out", tmp_path / "rows.jsonl", []
    )


def action(key):
    import importlib

    module, _, function = next(step.where for step in STEPS if step.key == key).partition(":")
    return getattr(importlib.import_module(f"gpu_steps.{module}"), function)


@pytest.mark.parametrize("key", KEYS)
def test_a_step_works_on_a_cpu(key, session):
    session.seconds = 30.0
    try:
        action(key)(session)
    except Skip as reason:
        pytest.skip(str(reason))
    rows = [json.loads(line) for line in (session.out.parent / "rows.jsonl").read_text().splitlines()]
    assert rows and len({row["name"] for row in rows}) == len(rows)
    allowed = {"flex, eager"}  # it has no backward pass on CPUs
    assert not [row for row in rows if row["ok"] is False and row["name"] not in allowed]
