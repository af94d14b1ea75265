"""Every numeric flag of every command, found from the commands themselves, with numbers of no sense."""

import inspect
import io
import re
from contextlib import redirect_stdout
from functools import cache

import pytest
from command_settings import (
    STOPS,
    VARIANTS,
    arguments,
    dataclasses_in,
    flags_of,
    invocations,
    numeric_fields,
    settings_of,
    words,
)

from coma import cli
from coma.config import FinetuneConfig, PretrainConfig

NUMBERS = {
    float: ("nan", "inf", "-inf", "-1", "0", "1e30"),
    int: ("nan", "inf", "-1", "0", "1e30", str(2**70)),
}


@pytest.fixture(autouse=True, scope="module")
def read_sources_once():
    """tyro looks for help texts in the sources, each time anew: that would be half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", cache(inspect.getsource))
        yield


def test_every_number_of_every_command_declares_its_range():
    kinds = {kind for name in invocations() for kind in settings_of(name)}
    kinds |= {*dataclasses_in(PretrainConfig), *dataclasses_in(FinetuneConfig)}
    assert len(kinds) > 20
    without = [
        f"{kind.__qualname__}.{name}"
        for kind in kinds
        for name, (_, allowed) in numeric_fields(kind).items()
        if allowed is None
    ]
    assert not without


@pytest.mark.parametrize("invocation", invocations())
def test_the_walk_knows_every_flag_that_takes_a_number(invocation, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # wider, boxes stand side by side
    known = {flag for flag, (hint, *_) in flags_of(invocation).items() if "Fixed" not in str(hint)}
    shown: set[str] = set()
    for variant in VARIANTS.get(invocation, [[]]):
        with redirect_stdout(io.StringIO()) as text:
            cli.main([*invocation.split(), *variant, "--help-all"])
        rows = re.findall(
            r"^(?:│ |  )(--[a-z][\w.-]*) (?:N|X|R G B|MIN MAX|BETA1 BETA2)\b", text.getvalue(), re.MULTILINE
        )
        shown |= {re.sub(r"\.\d$", "", flag) for flag in rows}
    assert shown <= known


QUICK = ("pack", "benchmark")


@pytest.mark.parametrize(
    "invocation",
    [pytest.param(each, marks=[pytest.mark.slow] * (each not in QUICK)) for each in invocations()],
)
def test_numbers_that_make_no_sense_are_one_line(invocation, tmp_path, capsys):
    """The command gets every number that the range of a flag allows, and one that the range refuses."""
    for flag, (hint, allowed, variant) in flags_of(invocation).items():
        if "Fixed" in str(hint):
            continue
        numbers = NUMBERS[float if "float" in str(hint) else int]
        fitting = [number for number in numbers if allowed is not None and _inside(number, hint, allowed)]
        for number in [next(each for each in numbers if each not in fitting), *fitting]:
            given = [flag, *words(hint, number)]
            if "windows" in flag:
                given = [f"{flag}.0", number, number]
            code = cli.main([*arguments(invocation, tmp_path), *variant, *given])
            message = capsys.readouterr().err
            told = f"coma {invocation} {' '.join(given)}: {message}"
            assert code == 2, told
            assert message.startswith("error: ") and message.count("\n") == 1, told
            assert "Traceback" not in message and "None" not in message, told
            if number in fitting:
                assert flag in message or any(stop in message for stop in STOPS), told
            else:
                assert message.startswith(f"error: {flag}"), told
    assert not list(tmp_path.iterdir())


def _inside(number, hint, allowed) -> bool:
    try:
        return (float if "float" in str(hint) else int)(number) in allowed
    except ValueError:
        return False
