"""Files that visitors download have short names with letters of every script."""

import pytest

from demo.session import slug


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A_b.C", "a-b-c"),
        ("Кошка 猫", "кошка-猫"),
        ("e\u0301te\u0301", "été"),
        ("…", "picture"),
        ("猫" * 99, "猫" * 33),
    ],
)
def test_names_of_results_keep_letters_of_all_scripts_and_are_short(text, name):
    assert slug(text) == name
