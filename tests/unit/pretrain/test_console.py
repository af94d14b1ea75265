"""What a run says while it goes on, how fast it finds itself, and how it hears that it should stop."""

import os
import signal
import threading
import time
from io import StringIO

import pytest
import torch
from rich.console import Console

from coma.config import (
    DataConfig,
    DecoderConfig,
    MAEConfig,
    OptimizerConfig,
    PretrainConfig,
    ViTConfig,
)
from coma.image_size import ImageSize
from coma.signals import StopNow, StopRequest
from pretrain.training.console import PATIENCE, TrainingConsole
from pretrain.training.distributed import Processes
from pretrain.training.throughput import Meter, peak_flops, training_flops


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, width=160, _environ={"TERM": "xterm"})


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


ROW = {
    "step": 20,
    "epoch": 1.5,
    "loss": 0.25,
    "lr": 1e-4,
    "images_per_s": 321.0,
    "data_wait": 0.04,
    "skipped": 2,
}


def test_a_terminal_gets_a_live_bar():
    console = terminal()
    bar = TrainingConsole(console=console)
    bar.start(10, 40)
    bar.advance(20, 0.25, 1.0, 0.0)
    bar.row(ROW | {"mfu": 0.31})
    bar.warn("mind the gap")
    bar.close()
    text = shown(console)
    for part in ("loss 0.2500", "20/40", "321 images/s", "data wait 4%", "MFU 31%", "2 files skipped"):
        assert part in text
    assert "warning: " in text
    assert text.endswith("\x1b[?25h")  # the cursor is shown again


def test_a_file_gets_lines():
    console = Console(file=StringIO(), width=40)
    lines = TrainingConsole(console=console)
    lines.start(10, 40)
    lines.advance(20, 0.25, 1.5, 0.0)
    lines.row(ROW)
    assert shown(console) == (
        "step 20/40  epoch 1.50  loss 0.2500  lr 0.0001  321 images/s  data wait 4%  2 files skipped  "
        "0:00:30 left\n"
    )


def test_other_processes_are_quiet(capsys):
    silent = TrainingConsole(quiet=True)
    silent.start(0, 10)
    silent.advance(1, 0.5, 100.0, 99.0)
    silent.row(ROW)
    silent.warn("psst")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("waited", "hints"), [(0.15, 1), (0.05, 0)])
def test_waiting_for_data_is_mentioned_once(waited, hints):
    console = Console(file=StringIO(), width=400)
    watch = TrainingConsole(console=console)
    for step in range(200):
        watch.advance(step, 0.5, PATIENCE / 100, waited * PATIENCE / 100)
    assert (
        shown(console).count("raise --workers if cores are free, shrink the files once with `coma pack`")
        == hints
    )


def test_flops_are_those_of_the_matrix_products():
    """A ViT's, by hand: 2 FLOPs per weight and token forward, twice that backward, attention besides."""
    model = ViTConfig(patch=4, dim=16, depth=2, heads=2, mlp_ratio=2.0)
    objective = MAEConfig(mask_ratio=0.5, decoder=DecoderConfig(8, 1, 2))
    state = torch.get_rng_state()
    flops = training_flops(model, objective, 16)
    assert torch.equal(torch.get_rng_state(), state)

    def block(dim: int, ratio: float, tokens: int) -> float:
        return tokens * 2 * dim * dim * (4 + 2 * ratio) + 2 * 2 * tokens * tokens * dim

    pixels, units, seen = 48, 16, 8
    stem = units * 2 * pixels * 16
    encoder = 2 * block(16, 2.0, seen + 1)
    decoder = units * 2 * 16 * 8 + block(8, 4.0, units) + units * 2 * 8 * pixels
    assert flops == pytest.approx(3 * (stem + encoder + decoder) - stem, rel=1e-3)  # none for the images


def test_mfu_is_flops_over_peak(monkeypatch):
    settings = PretrainConfig(
        data=DataConfig(image_size=ImageSize.of(16)),
        model=ViTConfig(patch=4, dim=16, depth=2, heads=2),
        optimizer=OptimizerConfig(batch_size=4),
    )
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10G") is None
    assert peak_flops("Tesla V100-SXM2-16GB") == 125e12
    flops = training_flops(settings.model, settings.objective, 16)
    monkeypatch.setattr("pretrain.training.throughput.device_peak", lambda *_: 1e9)
    meter = Meter(settings, Processes(torch.device("cpu")), "bf16", pytest.fail)
    meter.add(seconds=0.5, waited=0.1, computed=0.4)
    meter.add(seconds=0.3, waited=0.1, computed=0.2)
    values = meter.take()
    assert values["images_per_s"] == 10.0
    assert values["data_wait"] == 0.25
    assert values["mfu"] == pytest.approx(10 * flops / 1e9, abs=1e-4)


# signals ----------------------------------------------------------------------------------------


def test_signals_ask_once_and_abort_the_second_time(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err == "\nstopping after this step; Ctrl-C again stops at once\n"


def test_what_may_be_left_is_left_at_once(capfd):
    alarm = signal.getsignal(signal.SIGALRM)
    with StopRequest() as stop, pytest.raises(StopNow), stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert capfd.readouterr().err == "\nstopping now\n"
    assert signal.getsignal(signal.SIGALRM) == alarm


def test_what_is_better_finished_is_left_when_it_hangs(monkeypatch):
    monkeypatch.setattr("coma.signals._SOON", 0.1)
    alarm = signal.getsignal(signal.SIGALRM)
    with StopRequest(quiet=True) as stop:
        with stop.at_once(grace=60):  # finished in time
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopNow), stop.at_once():  # begun after it was asked for
            time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) == alarm
    with StopRequest(quiet=True) as stop, pytest.raises(StopNow), stop.at_once(grace=0.1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
