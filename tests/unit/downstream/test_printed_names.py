"""Names of files and classes are printed as they are, whatever they hold."""

import pytest

from downstream.commands.shared import print_check, print_classes, warn
from downstream.label_check import ClassRow

NAMES = ["[unused]", "photos[/old].jpg", "[red]x", ":car:", "a[1]"]


@pytest.mark.parametrize("name", NAMES)
def test_warnings_and_tables_print_names_as_they_are(name, capsys):
    warn([f"skipped {name}"])
    assert capsys.readouterr().err == f"warning: skipped {name}\n"
    print_classes([name], {"train": [ClassRow("1", "2", "3", "4")]}, "objects")
    print_check([(name, [f"of {name}"])], ["train"])
    said = capsys.readouterr().out
    assert said.count(name) == 3
