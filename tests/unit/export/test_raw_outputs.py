"""Raw outputs of detectors: rows that nothing uses do not count, all others do."""

import pytest
import torch

from export.verify.errors import OutputErrors
from export.verify.parity import add_steps


def steps() -> dict[str, torch.Tensor]:
    """Returns the steps of one image: two proposals in three places, and one detection in two."""
    torch.manual_seed(0)
    return {
        "proposals": torch.tensor([[0.0, 0, 8, 8], [2, 2, 9, 9], [0, 0, 0, 0]]),
        "proposal_odds": torch.tensor([2.0, 1.0, 0.0]),
        "logits/0": torch.randn(3, 4),
        "deltas/0": torch.randn(3, 3, 4),
        "boxes": torch.tensor([[0.0, 0, 8, 8], [0, 0, 0, 0]]),
        "scores": torch.tensor([0.9, 0.0]),
        "labels": torch.tensor([1, -1]),
        "mask_logits/0": torch.randn(2, 3, 7, 7),
    }


@pytest.mark.parametrize(("name", "filled"), [("logits/0", 2), ("deltas/0", 2), ("mask_logits/0", 1)])
def test_rows_of_empty_places_do_not_count(name, filled):
    wanted = steps()
    rows = len(wanted[name])
    for row in range(rows):
        found, errors = steps(), OutputErrors()
        found[name][row] = float("nan")
        add_steps(errors, wanted, found)
        error = errors.outputs[f"raw {name.partition('/')[0]}"]
        assert error.finite == (row >= filled) and (error.relative == 0) == (row >= filled)
