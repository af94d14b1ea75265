"""The contact sheet of predicted classes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coma.data import ArraySource
from downstream.classify.predict import _cell


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_in_a_unit_of_their_own_are_neither_black_nor_white(channels):
    ramp = np.linspace(-1000, 3000, 300 * 400, dtype=np.float32).reshape(300, 400, 1)
    entry = {"index": 0, "path": "a/scan.tif", "classes": [{"name": "lung", "score": 0.9}]}
    source = ArraySource([ramp.repeat(channels, axis=2)])
    parts: Any = SimpleNamespace(source=source, size=1, entries=lambda _: iter([entry]))
    cell = _cell(parts, 0)
    assert cell.picture is not None and cell.picture.size == (256, 192)
    assert len(np.unique(np.asarray(cell.picture))) > 200
    assert cell.caption == "scan.tif\nlung 90.0%"
