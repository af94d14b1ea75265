"""Comparisons: budgets, runs that are killed, fail or go on, and a table that says what the runs say."""

import csv
import errno
import fcntl
import io
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparisons import SMALL, asked

from coma import cli
from coma.errors import BadInput, Interrupted
from pretrain.sweep import compare, process_pool, sweep

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]


def in_another_process(scenario: str, *arguments: Path) -> None:
    """Forks of this one could not train: torch's autograd has run in it, and does not survive that."""
    code = (
        "import sys, pytest, torch, test_sweep as t\n"
        "from pathlib import Path; from comparisons import light\n"
        "torch.set_num_threads(1); light(pytest.MonkeyPatch())\n"
        f"t.{scenario}(*map(Path, sys.argv[1:]))"
    )
    places = os.pathsep.join(map(str, (HERE, TESTS / "helpers", TESTS.parent)))
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# from end to end --------------------------------------------------------------------------------


def starts(out: Path) -> list[str]:
    """Every command that was started, over all lives of a comparison."""
    logs = (out / "logs").glob("*.log")
    return sorted(line for log in logs for line in log.read_text().splitlines() if line.startswith("$ coma"))


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_nothing_and_the_table_says_what_the_runs_say(labelled, tmp_path):
    in_another_process("killed", labelled, tmp_path)


def killed(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison = asked(labelled, out)
    child = os.fork()
    if not child:
        try:
            compare(comparison)
        finally:
            os._exit(0)
    until(lambda: len(list((out / "scores").glob("*/results.json"))) >= 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = sorted(path.parent.name for path in (out / "scores").glob("*/results.json"))
    began = starts(out)
    compared = compare(comparison)
    assert not compared.failures and finished
    after = starts(out)
    for name in finished:
        run = name.removesuffix("-knn-linear")
        assert [line for line in after if run in line] == [line for line in began if run in line]
    again = compare(comparison)
    assert starts(out) == after and again.results == compared.results

    # the table by hand
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        *(("mae", "0"), ("mae", "1"), ("coma", "0"), ("coma", "1"), ("random", "0"), ("random", "1"))
    ]
    line = next(line for line in (out / "compare.md").read_text().splitlines() if line.startswith("| coma"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["coma", "small"] and cells[3:5] == ["24", "48"]  # two views of every image
    seconds, accuracy = {}, []
    for method in ("mae", "coma"):
        seconds[method] = 0.0
        for seed in (0, 1):
            run = out / "runs" / f"{method}-small-{seed}"
            logged = [json.loads(each) for each in (run / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in logged if "probe_knn" in row] == [0, 3, 6]
            seconds[method] += sum(
                2 * row["cpu_s"] for row in logged if "loss" in row
            )  # a log point in two steps
            results = out / "scores" / f"{method}-small-{seed}-knn-linear" / "results.json"
            scores = json.loads(results.read_text())["scores"]
            if method == "coma":
                accuracy.append(100 * next(s["top1"] for s in scores if s["protocol"] == "knn"))
            assert scores[1]["top1"] == pytest.approx(
                next(row["probe_linear"] for row in reversed(logged) if "probe_linear" in row)
            )
    assert cells[7] == f"{seconds['coma'] / seconds['mae']:.2f}"
    assert cells[8] == f"{statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f} (n = 2)"
    assert "24 images seen in training" in (out / "compare.md").read_text()


@pytest.mark.parametrize("lock", ["one", "slot-0"])
def test_a_process_of_a_killed_comparison_is_waited_for(tmp_path, lock):
    """Who holds the lock still works; nobody starts the same beside it, nor anything in its place."""
    marker = tmp_path / "done"
    (tmp_path / "locks").mkdir()
    child = os.fork()
    if not child:
        import fcntl

        handle = os.open(tmp_path / "locks" / f"{lock}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(handle, fcntl.LOCK_EX)
        (tmp_path / "held").touch()
        time.sleep(0.3)
        marker.touch()
        os._exit(0)
    until((tmp_path / "held").exists)
    told: list[str | None] = []
    runner = process_pool.ProcessPool(
        tmp_path, [{}], lambda line, _: told.append(line), process_pool.StopRequest()
    )
    runner.run([process_pool.Job("one", lambda: pytest.fail("started beside it"), marker.exists)])
    os.waitpid(child, 0)
    assert not runner.failures
    assert [line for line in told if line] == [
        "waiting for a run that another process of this comparison started"
    ]


def test_a_process_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(process_pool, "_PATIENCE", 0.2)
    deaf = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); open('on', 'w'); time.sleep(60)"
    told: list[str | None] = []
    popen, stop = subprocess.Popen, process_pool.StopRequest()

    def started(_: object, **options: Any) -> subprocess.Popen:
        return popen([sys.executable, "-c", deaf], cwd=tmp_path, **options)

    def progress() -> float:
        stop.asked = (tmp_path / "on").exists()
        return 0.0

    monkeypatch.setattr(process_pool.subprocess, "Popen", started)
    job = process_pool.Job("one", tuple, lambda: False, progress=progress)
    monkeypatch.setattr(process_pool, "_SHOW", 0.0)
    with pytest.raises(Interrupted):
        process_pool.ProcessPool(tmp_path, [{}], lambda line, _: told.append(line), stop).run([job])
    assert "one does not stop; killing it" in told


def test_another_comparison_of_changed_images_is_refused(tmp_path, monkeypatch, caplog):
    photos = tmp_path / "photos"
    for split in ("train", "test"):
        for number in (1, 2):
            (photos / split / str(number)).mkdir(parents=True)
            (photos / split / str(number) / "a.png").write_bytes(b"1")
    out = tmp_path / "out"
    comparison: Any = SimpleNamespace(images=photos, test=photos, out=out, allow_changed_data=False)
    sweep._check_data(comparison)
    (out / "settings").mkdir()
    (out / "settings" / "one.json").touch()
    sweep._check_data(comparison)
    (photos / "test" / "1" / "a.png").rename(photos / "test" / "2" / "b.png")
    with pytest.raises(BadInput, match=r"the test images have changed: 1 removed \(1/a\.png\), 1 added"):
        sweep._check_data(comparison)
    comparison.allow_changed_data = True
    sweep._check_data(comparison)
    assert "the test images have changed" in caplog.text
    comparison.allow_changed_data = False
    sweep._check_data(comparison)


def test_progress_is_asked_for_now_and_then(tmp_path, monkeypatch):
    """It is read from files: not at every look at the processes."""
    looks, asked = [None] * 40 + [0], []
    process = SimpleNamespace(poll=lambda: looks.pop(0), wait=lambda: None)
    monkeypatch.setattr(process_pool.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(process_pool, "_POLL", 0.001)
    job = process_pool.Job("one", tuple, lambda: not looks, progress=lambda: asked.append(1) or 0.5)
    told: list[float] = []
    process_pool.ProcessPool(
        tmp_path, [{}], lambda _, done: told.append(done), process_pool.StopRequest()
    ).run([job])
    assert 0 < len(asked) < 10 and told[0] == 0.5 and told[-1] == 1


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog):
    """Its processes are not waited for in vain, and no more of them run at a time than there are slots."""
    running: list[str] = []

    def started(command: list[str], **_: Any) -> SimpleNamespace:
        running.append(command[-1])
        assert len(running) == 1
        return SimpleNamespace(poll=lambda: done.add(running.pop()) or 0)

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    done: set[str] = set()
    monkeypatch.setattr(process_pool.subprocess, "Popen", started)
    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(process_pool, "_POLL", 0.001)
    stop = process_pool.StopRequest()
    turns = iter(range(100))
    monkeypatch.setattr(process_pool.time, "sleep", lambda _: next(turns))
    jobs = [process_pool.Job(name, partial(tuple, name), partial(done.__contains__, name)) for name in "ab"]
    process_pool.ProcessPool(tmp_path, [{}], lambda *_: None, stop).run(jobs)
    assert done == {"a", "b"}
    assert "cannot be locked (No locks available); run only one comparison there at a time" in caplog.text


def test_the_reason_is_the_last_process_s_own(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n$ coma pretrain a\nerror: the disk is full\n\n$ coma pretrain --resume a\nstep 3\n")
    assert process_pool._reason(-9, log) == "killed by SIGKILL, step 3"
    log.write_text(log.read_text() + "\n$ coma evaluate\n")
    assert process_pool._reason(1, log) == "exit code 1"


@pytest.mark.slow
def test_a_failing_run_is_named_and_the_others_are_in_the_table(labelled, tmp_path):
    in_another_process("failing", labelled, tmp_path)


def failing(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mae, coma = (replace(each, seeds=(0,)) for each in asked(labelled, out).entries)
    diverging = replace(
        coma.config.optimizer, base_lr=1e4, weight_decay=1e4
    )  # weights overflow in a few steps
    bad = replace(coma.config, optimizer=diverging)
    compared = compare(
        asked(labelled, out, entries=(mae, replace(coma, config=bad)), probes=0, random_baseline=False)
    )
    assert [failure.partition(":")[0] for failure in compared.failures] == [
        "coma-small-0",
        "coma-small-0-evaluate",
    ]
    assert "exit code 1" in compared.failures[0] and "coma-small-0.log" in compared.failures[0]
    assert [result.method for result in compared.results] == ["mae"]
    text = (out / "compare.md").read_text()
    assert "| mae |" in text and "**Missing:** coma-small-0: exit code 1" in text


@pytest.mark.slow
def test_every_method_gets_the_rate_whose_loss_ends_lowest(labelled, tmp_path):
    in_another_process("searched", labelled, tmp_path)


def searched(labelled: Path, tmp_path: Path) -> None:
    """The trials count, and a rate at which the weights overflow is left out."""
    out = tmp_path / "out"
    flags = """--methods mae coma --models "small: tiny" --seeds 3 4 --no-random-baseline --protocols knn
        --device cpu --budget images 240 --lr-search 1e-3 1 1e4"""
    argv = ["compare", str(labelled / "train"), *shlex.split(flags), "--test", str(labelled)]
    argv += ["--out", str(out), "--", *SMALL, "--weight-decay", "100"]
    with redirect_stdout(io.StringIO()) as text, redirect_stderr(io.StringIO()) as told:
        assert cli.main(argv) == 0, told.getvalue()
    shown = text.getvalue()
    assert "of 0.001, 1, 10000 per 256 images" in shown and "runs had the other 70%" in shown
    for method in ("mae", "coma"):
        last = {}
        for rate in ("0.001", "1"):
            trial = out / "trials" / f"lr-{method}-small-{rate}"
            rows = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]  # a tenth of 60 steps
            assert json.loads((trial / "config.json").read_text())["run"]["seed"] == 3
            last[float(rate)] = rows[-1]["loss"]
        for seed in (3, 4):
            settings = json.loads((out / "settings" / f"{method}-small-{seed}.json").read_text())
            optimizer = settings["optimizer"]
            assert optimizer["base_lr"] == min(last, key=last.__getitem__)
            assert optimizer["steps"] == 42  # seven tenths
        assert f"lr-{method}-small-10000: exit code 1" in told.getvalue()
    before = starts(out)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert cli.main(argv) == 0
    assert starts(out) == before
    with redirect_stderr(io.StringIO()) as told:
        assert cli.main([each for each in argv if each != "1e4"]) == 2
    assert "other settings: lr_search" in told.getvalue()


@pytest.mark.slow
def test_seconds_are_timed_first_and_stopping_is_safe(labelled, tmp_path):
    in_another_process("timed", labelled, tmp_path)


def timed(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = """--methods mae --models "small: tiny" --seeds 0 --no-random-baseline --protocols knn
        finetune finetune-10 --finetune "--epochs 1 --batch-size 12 --ema-decay 0" --device cpu
        --budget seconds 0.2"""
    argv = ["compare", str(labelled / "train"), *shlex.split(flags), "--test", str(labelled)]
    argv += ["--out", str(out), "--", *SMALL]
    child = os.fork()
    if not child:
        os._exit(cli.main(argv))
    until(lambda: (out / "runs" / "mae-small-0" / "config.json").exists())
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    steps = json.loads((out / "settings" / "mae-small-0.json").read_text())["optimizer"]["steps"]
    with redirect_stdout(io.StringIO()) as text:
        assert cli.main(argv) == 0
    shown = text.getvalue()
    assert "0.2 seconds of training steps (CPU clock" in shown and "fine-tuned top-1 %" in shown
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert int(rows[0]["steps"]) == steps
    assert 0 <= float(rows[0]["finetune"]) <= 100 and 0 <= float(rows[0]["finetune_validation"]) <= 100
    assert 0 <= float(rows[0]["finetune-10"]) <= 100
    argv[argv.index("seconds") + 1] = "0.3"
    with redirect_stderr(io.StringIO()) as text:
        assert cli.main(argv) == 2
    assert "holds a comparison with other settings: budget ['seconds', 0.2] -> " in text.getvalue()
