"""Which boxes a graph keeps: suppression as in torchvision, in ONNX Runtime, of unlikely ones; the best."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.custom_ops import nms_keep, translations
from export.graphs.detection_ops import likeliest, odds_of, probability_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself


def random_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    """Corners `[*shape, 4]`, many of which overlap."""
    corner, sides = torch.rand(2, *shape, 2, generator=generator).unbind()
    return torch.cat((corner * 60, corner * 60 + sides * 40), -1)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    classes=st.integers(1, 3),
    count=st.integers(1, 60),
    iou=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    least=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_nms_keep_is_batched_nms(seed, batch, classes, count, iou, least):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, batch, count)
    scores = torch.rand(batch, classes, count, generator=generator)
    keep = nms_keep(boxes, scores, iou, least, count)
    labels = torch.arange(classes)[:, None].expand(-1, count).flatten()
    for i in range(batch):
        index = (scores[i].flatten() > least).nonzero()[:, 0]
        all_boxes = boxes[i].repeat(classes, 1)
        stays = torchvision.ops.batched_nms(all_boxes[index], scores[i].flatten()[index], labels[index], iou)
        assert keep[i].flatten().nonzero()[:, 0].tolist() == sorted(index[stays].tolist())
    for limit in (1, count // 2 + 1):
        fewer = nms_keep(boxes, scores, iou, least, limit)
        best = torch.where(keep, scores, -1).topk(limit, 2).values[..., -1:]
        assert torch.equal(fewer, keep & (scores >= best))


class Keep(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return nms_keep(boxes, scores, 0.4, 0.3, 20)


def test_nms_keep_in_onnx(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = random_boxes(generator, 2, 50), torch.rand(2, 3, 50, generator=generator)
    torch.library.opcheck(nms_keep, (*inputs, 0.4, 0.3, 20))
    axes = ({0: "batch"}, {0: "batch"})
    program = torch.onnx.export(Keep(), inputs, dynamo=True, dynamic_shapes=axes, opset_version=18,
                                custom_translation_table=translations(), verbose=False)  # fmt: skip
    assert program is not None
    program.save(str(tmp_path / "keep.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "keep.onnx", providers=["CPUExecutionProvider"])
    for batch, most in ((1, 1.0), (3, 1.0), (2, 0.2)):  # and with nothing likely enough
        boxes = random_boxes(generator, batch, 50)
        scores = most * torch.rand(batch, 3, 50, generator=generator)
        feed = dict(
            zip((each.name for each in session.get_inputs()), (boxes.numpy(), scores.numpy()), strict=True)
        )
        keep = Keep()(boxes, scores)
        assert keep.equal(torch.tensor(session.run(None, feed)[0])) and keep.any() == (most == 1)


class Suppress(nn.Module):
    """Proposals as a dense head's logits would have them, in the order of odds or of probabilities."""

    def __init__(self, rank: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, boxes: Tensor, logits: Tensor) -> Tensor:
        return nms_keep(boxes, self.rank(logits), 0.5, 0.0, 400)


def misjudged(rank: Callable[[Tensor], Tensor], path: Path) -> int:
    """Unlikely boxes that ONNX Runtime keeps or drops otherwise than PyTorch."""
    generator = torch.Generator().manual_seed(0)
    inputs = random_boxes(generator, 2, 400), -torch.rand(2, 1, 400, generator=generator) * 12 - 10
    module = Suppress(rank)
    program = torch.onnx.export(module, inputs, dynamo=True, opset_version=18,
                                custom_translation_table=translations(), verbose=False)  # fmt: skip
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = dict(
        zip((each.name for each in session.get_inputs()), (each.numpy() for each in inputs), strict=True)
    )
    return int((torch.tensor(session.run(None, feed)[0]) != module(*inputs)).sum())


def test_unlikely_boxes_suppress_each_other_in_one_order_everywhere(tmp_path):
    assert misjudged(odds_of, tmp_path / "odds.onnx") == 0
    assert misjudged(torch.sigmoid, tmp_path / "sigmoid.onnx") > 0  # whence the odds


def test_odds_are_probabilities_again():
    logits = torch.tensor([-1e4, -90.0, -20.0, 0.0, 3.0, 90.0])
    assert odds_of(logits)[0] == 0 and odds_of(logits)[1] > 0
    torch.testing.assert_close(probability_of(odds_of(logits)), logits.sigmoid())


def test_equal_values_keep_their_order():
    values = torch.randint(0, 5, (3, 4000), generator=torch.Generator().manual_seed(0)).float()
    found, index = likeliest(values, 1500, -1.0)
    assert torch.equal(found, values.topk(1500).values) and torch.equal(values.gather(1, index), found)
    for row, places in zip(found, index, strict=True):
        assert all((places[row == value].diff() > 0).all() for value in row.unique())
    assert not torch.equal(values.topk(1500).indices, index)  # torch's own does not


def test_the_likeliest_of_few_are_filled_up():
    values, index = likeliest(torch.tensor([[0.1, 0.5, 0.0]]), 5, 0.0)
    assert values.tolist() == [[0.5, pytest.approx(0.1), 0, 0, 0]] and index.tolist() == [[1, 0, 0, 0, 0]]
