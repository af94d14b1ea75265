"""`coma`: found commands, exit codes, messages, a fast start, and a surface that changes only on purpose.

The texts in `tests/golden` are renewed by `pytest --renew-golden`.
"""

import errno
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

import coma
from coma import cli
from coma.atomic_io import write_text

GOLDEN = Path(__file__).parents[2] / "golden"
OURS = sorted(name for name, entry in cli.find_commands().items() if entry.module.startswith("pretrain."))

NOT_UTF8 = os.fsdecode(b"o\xff")

ROOM = '''"""Says hello.

More about it.
"""
from coma import errors


def run(argv):
    print("hello", *argv)
    match argv:
        case ["input"]:
            raise errors.BadImage("cat.jpg: no pixels; leave it out")
        case ["check"]:
            raise errors.CheckFailed("loss is not finite")
        case ["stop"]:
            raise errors.Interrupted("saved at step 3")
        case ["ctrl-c"]:
            raise KeyboardInterrupt
        case ["exit", code]:
            raise SystemExit(int(code) if code.isdigit() else code or None)
        case ["bug"]:
            raise RuntimeError("a bug")
        case ["os", number]:
            raise OSError(int(number), "No room", "out.bin")
        case ["memory"]:
            raise MemoryError
        case ["gpu"]:
            import torch

            needed = "CUDA out of memory. Tried to allocate 2.00 GiB."
            raise torch.OutOfMemoryError(f"{needed} Of the allocated memory 1.00 GiB is PyTorch's.")
        case ["cublas"]:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        case ["import", name]:
            __import__(name)
'''


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A room called `annex` with the commands `greet` and, needing the extra `annex`, `salute`."""
    (tmp_path / "annex.py").write_text(ROOM)
    monkeypatch.syspath_prepend(tmp_path)
    commands = {
        name: EntryPoint(name, value, cli.GROUP)
        for name, value in {"greet": "annex:run", "salute": "annex:run [annex,gpu]"}.items()
    }
    monkeypatch.setattr(cli, "find_commands", lambda: commands)
    yield commands
    sys.modules.pop("annex", None)


@pytest.fixture(autouse=True)
def quiet_logging():
    """Leave the logging of the test process as it was."""
    root = logging.getLogger()
    handlers, levels = (
        root.handlers[:],
        {name: logging.getLogger(name).level for name in ("", "pretrain", "annex")},
    )
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


# exit codes and messages -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 0, ""),
        (["input"], 2, "error: cat.jpg: no pixels; leave it out\n"),
        (["check"], 1, "error: loss is not finite\n"),
        (["stop"], 130, "saved at step 3\n"),
        (["ctrl-c"], 130, "interrupted\n"),
        (["exit", "2"], 2, ""),
        (["exit", ""], 0, ""),
        (["exit", "why"], 1, "error: why\n"),
        (["os", str(errno.ENOSPC)], 1, "error: out.bin: No room\n"),
        (["os", str(errno.ELOOP)], 2, "error: out.bin: No room\n"),
        (["os", str(errno.ENAMETOOLONG)], 2, "error: out.bin: No room\n"),
        (["memory"], 2, "error: not enough memory; try a smaller --batch-size, --image-size or model\n"),
    ],
)
def test_errors_become_exit_codes_and_one_line(room, capsys, argv, code, message):
    assert cli.main(["greet", *argv]) == code
    shown = capsys.readouterr()
    assert shown.out == " ".join(["hello", *argv]) + "\n"
    assert shown.err == message


def test_arguments_come_from_the_process_by_default(room, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coma", "greet", "you"])
    assert cli.main() == 0
    assert capsys.readouterr().out == "hello you\n"


@pytest.mark.parametrize(
    ("argv", "summary"),
    [
        (["bug"], "RuntimeError: a bug"),
        (["os", str(errno.EBADF)], f"OSError: [Errno {errno.EBADF}] No room: 'out.bin'"),
        (
            ["import", "annex.hall"],
            "ModuleNotFoundError: No module named 'annex.hall'; 'annex' is not a package",
        ),
    ],
)
def test_a_bug_is_one_line_and_its_traceback_is_kept(room, capsys, tmp_path, monkeypatch, argv, summary):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    assert cli.main(["greet", *argv]) == 1
    (kept,) = (tmp_path / "kept").iterdir()
    assert (
        capsys.readouterr().err
        == f"error: this is a fault of coma ({summary}); please report it with {kept}\n"
    )
    assert "Traceback" in kept.read_text() and "annex.py" in kept.read_text()
    assert cli.main(["--traceback", "greet", *argv]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_on_a_full_disk_shows_its_traceback(room, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert cli.main(["greet", "bug"]) == 1
    assert "annex.py" in capsys.readouterr().err


def test_traceback_shows_where_a_users_error_came_from(room, capsys):
    assert cli.main(["--traceback", "greet", "input"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "annex.py" in shown
    assert shown.endswith("error: cat.jpg: no pixels; leave it out\n")


def test_a_full_gpu_is_no_bug(room, capsys):
    assert cli.main(["greet", "gpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Try a smaller --batch-")
    assert shown.count("\n") == 1
    assert cli.main(["greet", "cublas"]) == 2
    assert "when calling `cublasCreate(handle)`. Try a smaller --batch-" in capsys.readouterr().err
    assert cli.main(["--traceback", "greet", "gpu"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_command_suggests_a_near_one(room, capsys):
    assert cli.main(["great"]) == 2
    assert capsys.readouterr().err == "error: no command 'great'; did you mean greet?\n"
    assert cli.main(["zzz"]) == 2
    assert capsys.readouterr().err == "error: no command 'zzz'; there are: greet, salute\n"


def test_without_any_command_it_says_how_to_install(capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_commands", dict)
    assert cli.main(["pretrain"]) == 2
    assert "pip install -e ." in capsys.readouterr().err


def test_no_arguments_print_the_usage_as_an_error(room, capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: coma")


def test_a_missing_extra_says_what_to_install(room, capsys):
    assert cli.main(["salute", "import", "sunrise"]) == 2
    expected = "error: coma salute needs sunrise; install it with: pip install 'coma-dyvit[annex,gpu]'\n"
    assert capsys.readouterr().err == expected


def test_a_missing_dependency_and_one_of_two_that_share_a_name_say_what_to_install(room, capsys):
    assert cli.main(["greet", "import", "sunrise"]) == 2
    assert (
        capsys.readouterr().err
        == "error: coma greet needs sunrise; install it with: pip install coma-dyvit\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for package, extra in {"mmcv": "mmcv-lite", "onnxruntime": "onnxruntime"}.items():
            patch.setitem(sys.modules, package, None)
            assert cli.main(["salute", "import", package]) == 2
            assert f"pip install 'coma-dyvit[annex,gpu,{extra}]'" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "coma", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")


# help ------------------------------------------------------------------------------------------


def test_help_shows_the_first_line_of_each_module_without_running_it(room, capsys):
    assert cli.main(["--help"]) == 0
    assert "\n  greet   Says hello.\n  salute  Says hello.\n" in capsys.readouterr().out
    assert "annex" not in sys.modules


def test_help_survives_a_command_that_is_gone(capsys, monkeypatch):
    gone = {"ghost": EntryPoint("ghost", "nowhere.at.all:run", cli.GROUP)}
    monkeypatch.setattr(cli, "find_commands", lambda: gone)
    assert cli.main(["--help"]) == 0
    assert "  ghost  (not installed)\n" in capsys.readouterr().out


def test_version_names_the_libraries(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(
        r"coma-dyvit \d+\.\d+\.\d+ \(torch \S+, timm \S+, Python 3\S+\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_soon_sleep_unless_asked_otherwise(capsys, monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_python_m_is_the_same_program(capsys):
    cli.main(["--version"])
    result = python("-m", "coma", "--version")
    assert (result.returncode, result.stdout) == (0, capsys.readouterr().out)
    assert python("-m", "coma", "nonsense").returncode == 2


@pytest.mark.parametrize(
    "code",
    [
        "import pretrain",
        "from coma import cli; cli.main(['--help'])",
        "from coma import cli; cli.main(['--version'])",
        *(f"from coma import cli; cli.main([{name!r}, '--help'])" for name in OURS),
    ],
)
def test_nothing_heavy_is_imported_to_answer(code):
    heavy = "{'torch', 'torchvision', 'timm', 'matplotlib', 'skimage', 'tensorboard', 'safetensors'}"
    result = python(
        "-c", f"import sys; {code}\nassert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_only_the_command_line_configures_logging():
    root = Path(coma.__file__).parent
    assert [path.name for path in root.rglob("*.py") if "basicConfig" in path.read_text()] == ["cli.py"]


def test_messages_of_the_running_room_are_shown(room, capsys):
    logging.getLogger().handlers.clear()
    cli.main(["greet"])
    logging.getLogger("annex").info("from the room")
    logging.getLogger("coma.data").info("from a library of ours")
    logging.getLogger("elsewhere").info("from another library")
    logging.getLogger("annex").warning("cat.jpg: skipped")
    with redirect_stderr(io.StringIO()) as bar:
        logging.getLogger("annex").info("while a progress bar has the terminal")
    assert capsys.readouterr().err == "from the room\nfrom a library of ours\nwarning: cat.jpg: skipped\n"
    assert bar.getvalue() == "while a progress bar has the terminal\n"


# the public surface ----------------------------------------------------------------------------


def test_public_names_are_there_and_others_are_not():
    for name in coma.__all__:
        assert getattr(coma, name).__name__.rpartition(".")[2] == name
    assert set(coma.__all__) <= set(dir(coma))
    assert re.match(r"\d+\.\d+", coma.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = coma.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def surface() -> dict[str, str]:
    """What a user's scripts rely on: the text of `coma --help`, and the flags of every command."""
    pages = {"coma-help.txt": _output("--help")}
    for name in OURS:
        rows = re.findall(
            r"^(?:│ |  )(--[a-z][^\s,]*(?:, --[^\s,]+)*)", _output(name, "--help-all"), flags=re.MULTILINE
        )
        flags = sorted({flag for row in rows for flag in row.split(", ")})
        pages[f"flags-{name}.txt"] = "".join(f"{flag}\n" for flag in flags)
    return pages


def _output(*argv: str) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"  # wider, tyro sets boxes side by side
    try:
        with redirect_stdout(io.StringIO()) as text:
            assert cli.main(argv) == 0
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return text.getvalue()


def test_help_is_wrapped_where_the_terminal_ends_not_where_our_lines_do():
    command = [sys.executable, "-m", "coma", "pretrain", "--help-all"]  # tyro keeps texts it has read
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    lines = [line.strip(" │") for line in done.stdout.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("--aug-repeats N")) + 1
    text = lines[first : next(i for i, line in enumerate(lines) if line.startswith("--on-bad-image"))]
    assert len(text) > 3 and min(map(len, text[:-1])) > 50 - 12  # of 50, less a long word
    assert " ".join(text).endswith("(1 to 1024; default: 1)")


def test_the_command_line_is_as_it_was(request):
    if request.config.getoption("--renew-golden"):
        for name, text in surface().items():
            (GOLDEN / name).write_text(text, encoding="utf-8")
    stored = {path.name: path.read_text(encoding="utf-8") for path in GOLDEN.glob("*.txt")}
    assert surface() == stored, "if you meant to change it: pytest -k command_line_is --renew-golden"


def test_a_changed_flag_would_be_noticed(monkeypatch):
    usual = surface()
    monkeypatch.setattr(cli, "USAGE", cli.USAGE.replace("--traceback", "--trace"))
    assert surface() != usual
    assert "--protocols\n" in usual["flags-evaluate.txt"]
    assert "--no-random-baseline\n" in usual["flags-evaluate.txt"]


def test_names_that_are_not_utf8_are_printed_and_written_as_escapes(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", errors="strict"))
    out = tmp_path / NOT_UTF8
    assert cli.main(["pack", str(tmp_path / "in"), "--out", str(out), "--workers", "0"]) == 0
    assert rf"next: coma pretrain '{tmp_path}/o\udcff'" in printed.getvalue().decode()
    write_text(out / "results.md", f"{out}\n")
    assert (out / "results.md").read_text() == f"{tmp_path}/o\\udcff\n"
