"""`benchmarks/gpu.py`: every step works on a CPU at reduced sizes, and no step can end the run."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_wheels
import pytest
import torch
from gpu_expect import step_costs, total
from gpu_steps.report import installed
from gpu_steps.session import Session, Skip
from gpu_steps.steps import STEPS
from train_step import build

from pretrain.training.throughput import training_flops

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler, profilers and mm's packages have many

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
QUICK = ("m", "d", "f")
"""Steps that take seconds; the dry run of everything, which takes minutes, goes through the others."""


@pytest.mark.parametrize("step", [step for step in STEPS if step.key in QUICK], ids=lambda step: step.key)
def test_a_step_works_on_a_cpu(step, tmp_path):
    (tmp_path / "work").mkdir()
    rows = tmp_path / "rows.jsonl"
    session = Session(torch.device("cpu"), 500.0, tmp_path / "work", tmp_path, rows, [])
    session.repeat = 0.05
    module, _, function = step.where.partition(":")
    try:
        getattr(importlib.import_module(f"gpu_steps.{module}"), function)(session)
    except Skip as reason:
        pytest.skip(str(reason))
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert found and len({row["name"] for row in found}) == len(found)
    assert not [row for row in found if row["ok"] is False]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_dry_run_of_everything(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--minutes", "20"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    record = json.loads((tmp_path / "results.json").read_text())
    states = {key: entry["status"] for key, entry in record["steps"].items()}
    assert states.keys() == {step.key for step in STEPS}, done.stdout
    assert all(entry["results"] or entry["status"] == "skipped" for entry in record["steps"].values())
    assert set(states.values()) <= {"done", "skipped"} and done.returncode == 0, done.stdout
    assert "cpu variant" in done.stdout.rpartition("| step |")[2]


# The runner, with steps that go wrong

FAKE_STEPS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Step:
    key: str
    title: str
    where: str
    seconds: float = 1
    dry_seconds: float = 1
    on_cpu: str = "all"
KEYS = ("good", "bad", "hangs", "waits", "crashes", "skips", "last")
STEPS = tuple(Step(key, key, "fakes:" + key) for key in KEYS)
"""
FAKES = """
import os, signal, subprocess, sys, time
from gpu_steps.session import Skip
def good(session):
    session.add("a row", value=1.5)
    with (session.out / "runs").open("a") as file:
        file.write("good ")
def bad(session):
    session.add("before", value=2)
    with session.attempt("caught"):
        raise ValueError("within a step")
    raise ValueError("the end of it")
def hangs(session):
    session.add("before", value=3)
    apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    (session.out / "grandchild").write_text(str(apart.pid))
    time.sleep(1000)
def waits(session):
    session.add("before", value=5)
    time.sleep(1000)
def crashes(session):
    session.add("before", value=4)
    os.kill(os.getpid(), signal.SIGSEGV)
def skips(session):
    raise Skip("a package is missing")
def last(session):
    session.add("wrong at first", ok=(session.out / "last").exists())
    if session.wants("once"):
        with (session.out / "last").open("a") as file:
            file.write("once ")
        session.add("once", value=session.seconds)
"""
FAKE_TORCH = """
class device:
    def __init__(self, type):
        self.type = type
class cuda:
    is_available = staticmethod(lambda: False)
"""


@pytest.fixture
def run(tmp_path):
    """Start a copy of the runner with steps that go wrong, in processes that import no torch."""
    folder = tmp_path / "benchmarks"
    (folder / "gpu_steps").mkdir(parents=True)
    for name in ("gpu.py", "gpu_steps/__init__.py", "gpu_steps/session.py", "gpu_steps/report.py"):
        shutil.copyfile(BENCHMARKS / name, folder / name)
    (folder / "gpu_steps" / "steps.py").write_text(FAKE_STEPS)
    (folder / "gpu_steps" / "fakes.py").write_text(FAKES)
    (folder / "torch.py").write_text(FAKE_TORCH)

    def start(*arguments: str, minutes: float = 0.5) -> subprocess.Popen:
        command = [sys.executable, str(folder / "gpu.py"), "--out", str(tmp_path), "--minutes", str(minutes)]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)

    return start


def steps_of(folder):
    return json.loads((folder / "results.json").read_text())["steps"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_no_step_ends_the_run_and_what_is_missing_can_be_continued(run, tmp_path):
    process = run("--device", "cpu", "--steps", "good,bad,hangs,crashes,skips,last")
    said, _ = process.communicate()
    found = steps_of(tmp_path)
    assert process.returncode == 1
    assert {key: entry["status"] for key, entry in found.items()} == {
        "good": "done",
        "bad": "failed",
        "hangs": "timed out",
        "crashes": "failed",
        "skips": "skipped",
        "last": "wrong",
    }
    assert "ValueError: the end of it" in found["bad"]["error"]
    assert [row["name"] for row in found["bad"]["results"]] == ["before", "caught"]
    assert found["bad"]["results"][1]["note"] == "ValueError: within a step"
    assert found["hangs"]["results"][0]["values"] == {"value": 3}
    assert found["crashes"]["error"] == "killed by SIGSEGV"
    assert found["skips"]["error"] == "a package is missing"
    assert not alive(int((tmp_path / "grandchild").read_text()))
    assert "| good | good | done, cpu variant: all |" in said.rpartition("| step |")[2]
    assert "Traceback" in (tmp_path / "log.txt").read_text()

    process = run("--device", "cpu", "--continue", "--steps", "good,bad,last")
    process.communicate()
    assert (tmp_path / "runs").read_text() == "good "  # it was done
    again = steps_of(tmp_path)
    assert [row["name"] for row in again["bad"]["results"]] == ["before", "caught"]  # replaced
    assert again["hangs"] == found["hangs"]
    assert again["last"]["status"] == "done" and (tmp_path / "last").read_text() == "once "


def test_a_signal_ends_it_with_the_table(run, tmp_path):
    process = run("--device", "cpu", "--steps", "good,hangs,waits,last", minutes=5)
    saved = tmp_path / "results.json"
    orphan = tmp_path / "grandchild"
    while not (saved.exists() and orphan.exists() and {"hangs", "waits"} <= steps_of(tmp_path).keys()):
        time.sleep(0.1)  # then both of the steps that run at a time take for ever
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert {key: entry["status"] for key, entry in steps_of(tmp_path).items()} == {
        "good": "done",
        "hangs": "stopped",
        "waits": "stopped",
    }
    assert "not run" in said.rpartition("| step |")[2]
    assert not alive(int((tmp_path / "grandchild").read_text()))


def test_without_a_gpu_it_says_so(run, tmp_path):
    said, _ = run("--steps", "good").communicate()
    assert "PyTorch finds no GPU here; --device cpu makes a dry run" in said


def test_without_time_nothing_is_begun(run, tmp_path):
    run("--device", "cpu", minutes=0.0).communicate()
    assert steps_of(tmp_path) == {}


def test_results_of_another_folder_are_continued(run, tmp_path):
    run("--device", "cpu", "--steps", "good").communicate()
    (tmp_path / "results.json").rename(tmp_path / "earlier.json")
    run(
        "--device", "cpu", "--steps", "good,skips", "--continue", str(tmp_path / "earlier.json")
    ).communicate()
    assert [entry["status"] for entry in steps_of(tmp_path).values()] == ["done", "skipped"]
    assert (tmp_path / "runs").read_text() == "good "
    said = run("--device", "cpu", "--continue", "nowhere.json", "--steps", "good")
    said.communicate()
    assert said.returncode == 2


def test_an_unknown_step_is_named():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--steps", "a,z"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no step 'z'; there are: m, a, b" in done.stderr


def test_a_source_tree_announces_its_commands(tmp_path, monkeypatch):
    from gpu_steps import report

    def absent(_):
        raise report.PackageNotFoundError

    assert installed(ROOT, tmp_path) == []  # it is installed here
    monkeypatch.setattr(report, "version", absent)
    (folder,) = installed(ROOT, tmp_path)
    code = "from importlib.metadata import distribution, entry_points as e; import sys\n"
    code += "print(sorted({x.name for x in e(group='coma.commands')} ), distribution('coma-dyvit').version)"
    env = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True)
    assert "'benchmark', 'classify', 'compare'" in done.stdout and "0.1.0" in done.stdout


# What is known without a GPU


def test_expected_costs_are_those_that_the_trainer_counts():
    model: Any = build("tiny", "coma", 32)
    costs = step_costs("CoMA DyViT-T", 2, "reference", 32, 1e12, 1e12)
    assert total(costs).flops / 2 == pytest.approx(
        training_flops(model.encoder.config, model.config, 32), rel=0.02
    )
    places, kinds = ({key[axis] for key in costs} for axis in (0, 1))
    assert places >= {"stem", "stage 1", "stage 2", "stage 3", "stage 4", "decoder", "optimizer"}
    assert kinds >= {"attention over 4 tokens", "attention over 16 tokens", "rotary positions", "gates"}
    merged = step_costs("CoMA DyViT-T", 2, "merged", 32, 1e12, 1e12)
    assert total(merged).in_tiles < 0.5 * total(costs).in_tiles
    assert total(merged).kernels < total(costs).kernels


def test_wheels_that_would_not_fit_are_left_out_by_name(tmp_path, monkeypatch, capsys):
    asked = []

    def download(packages, folder, python):
        asked.extend(packages)
        path = folder / f"{packages[0].partition('==')[0]}.whl"
        path.write_bytes(bytes((3 if packages[0].startswith("imagecodecs") else 1) * 2**20))
        return [path]

    monkeypatch.setattr(gpu_wheels, "download", download)
    monkeypatch.setattr(gpu_wheels, "repository_size", lambda: 10.0)
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--out", str(tmp_path / "wheels"), "--limit", "14"])
    assert gpu_wheels.main() == 0
    said = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "wheels").iterdir()} == {"tyro.whl", "mmengine.whl"}
    assert "16-bit PNG files (3.0 MiB)" in said and "CUDA provider (about 244 MiB)" in said
    assert "2.0 MiB of wheels" in said and "12.0 MiB with the repository" in said
    assert any(each.startswith("tyro==") for each in asked) and "onnxruntime-gpu" not in " ".join(asked)
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--out", str(tmp_path / "wheels"), "--limit", "10.5"])
    assert gpu_wheels.main() == 1 and "give a larger --limit" in capsys.readouterr().err
