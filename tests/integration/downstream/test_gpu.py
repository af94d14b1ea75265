"""mmcv's operators on a GPU decide and compute what they do on a CPU. Skipped without one."""

import pytest
import torch

pytest.importorskip("mmcv")

from check_ops import cases, differing

from downstream.openmmlab.mmcv_ops import OPERATORS

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # mm's packages have many
]


@pytest.mark.parametrize("name", cases(10, 0, torch.device("cpu")))
def test_an_operator_computes_there_what_it_does_on_a_cpu(accelerator, name):
    here, there = (cases(300, 0, device)[name](OPERATORS) for device in (torch.device("cpu"), accelerator))
    if "equal scores" not in name:  # their order is not defined
        assert differing(there[0], here[0]) == (0, 0)
    torch.testing.assert_close(there[1].cpu(), here[1].cpu(), rtol=1e-3, atol=1e-3)
