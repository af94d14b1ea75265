"""Progress of long work: bars on a terminal, lines elsewhere, nothing where it is to be quiet."""

from io import StringIO

import pytest
from rich.console import Console

from coma.progress import Progress, clock


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_bars():
    console = Console(file=StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(console=console) as progress:
        bar = progress.bar("step", 40, 10)
        bar.update(20, "loss 0.25")
        progress.bar("work done", 2.0).update(0.5)
        part = progress.bar("[bold]validating", 8)
        part.advance(3)
        progress.say("[red] stays as it is")
    text = text_of(console)
    for shown in ("step", "20/40", "loss 0.25", "25 %", "[bold]validating", "3/8", "[red] stays as it is"):
        assert shown in text
    assert text.endswith("\x1b[?25h")  # the cursor is shown again


def test_a_file_gets_as_many_lines_as_asked_for():
    console = Console(file=StringIO(), width=40)
    with Progress(console=console) as progress:
        bar = progress.bar("step", 40, lines=4)
        silent = progress.bar("validating", 40)
        for done in range(1, 41):
            bar.update(done, f"loss {done}")
            silent.advance()
        progress.warn("mind the gap")
    *lines, last = text_of(console).splitlines()
    assert [line.rpartition("  ")[0] for line in lines] == [
        f"step {n}/40  loss {n}" for n in (10, 20, 30, 40)
    ]
    assert all(line.endswith(" left") for line in lines)
    assert last == "warning: mind the gap"


def test_work_with_changing_titles_has_one_bar():
    console = Console(file=StringIO(), width=40)
    with Progress(console=console) as progress:
        for done in range(3):
            progress.step("reading", done, 3)
        progress.step("writing")
        assert len(progress.rich.tasks) == 1
    assert text_of(console) == "reading\nwriting\n"


def test_time_left_is_the_share_of_the_time_taken(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("coma.progress.time.monotonic", lambda: now[0])
    bar = Progress(console=Console(file=StringIO())).bar("work", 10, done=4)
    assert bar.seconds_left is None
    now[0] += 60
    bar.update(6)
    assert bar.seconds_left == pytest.approx(120)
    assert clock(3723) == "1:02:03"


def test_other_processes_are_quiet(capsys):
    with Progress(quiet=True) as progress:
        progress.bar("step", 2, lines=2).update(1)
        progress.step("reading")
        progress.say("psst")
        progress.warn("psst")
    assert capsys.readouterr() == ("", "")
