"""What is advised when a loss is not finite depends on what the batch and the weights hold."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coma.config import DataConfig, PretrainConfig
from coma.data import ArraySource, Batch, normalize
from pretrain.training.nonfinite_replay import advice, save_nonfinite
from pretrain.training.train_step import NotFinite

GOOD = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"a": torch.ones(2), "b": torch.ones(3)}


def batches_of(first: torch.Tensor, second: torch.Tensor) -> list[Batch]:
    return [
        Batch(first, torch.zeros(2), torch.tensor([3, 1])),
        Batch(second, torch.zeros(2), torch.tensor([4, 8])),
    ]


def advised(
    images: torch.Tensor | list[Batch], weights: dict[str, torch.Tensor] = WEIGHTS, std: float = 0.25
) -> str:
    source = ArraySource([np.zeros((8, 8, 3), np.uint8)] * 9)
    plan: Any = SimpleNamespace(source=source, statistics=((0.5,) * 3, (std,) * 3))
    batches = batches_of(*images.split(2)) if isinstance(images, torch.Tensor) else images
    return advice(plan, batches, weights)


def changed(image: int, value: float) -> torch.Tensor:
    images = GOOD.clone()
    images[image, 1, 2, 3] = value
    return images


def test_ordinary_images_leave_the_learning_rate():
    assert (
        advised(GOOD) == "try a lower --base-lr, a longer --warmup, a smaller --clip-grad or --precision fp32"
    )
    assert advised((GOOD * 255).to(torch.uint8)).startswith("try a lower --base-lr")
    one_blank = GOOD.clone()
    one_blank[0] = 0.5
    assert advised(one_blank).startswith("try a lower --base-lr")


def test_8_bit_and_float_passes_are_saved_at_one_scale(tmp_path):
    batches = batches_of((GOOD[:2] * 255).to(torch.uint8), GOOD[2:])
    assert advised(batches).startswith("try a lower --base-lr")
    config = PretrainConfig(data=DataConfig(images=tmp_path))
    path = save_nonfinite(tmp_path, 1, NotFinite(1.0, 1.0), config, "fp32", batches, WEIGHTS, ["a"] * 4)
    mean, std = (0.5,) * 3, (0.25,) * 3
    alone = torch.cat([normalize(batch.images, mean, std) for batch in batches])
    assert torch.equal(normalize(load_file(path)["images"], mean, std), alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_is_not_finite_is_named(value):
    text = "array[4] holds values that are NaN or infinite: mend it or take it out"
    assert advised(changed(2, value)) == text


@pytest.mark.parametrize("value", [-9999, -3.4e38, 3e5])
def test_an_image_of_huge_values_is_named(value):
    text = advised(changed(1, value))
    assert text.startswith("array[1] holds values that are ")
    assert "missing values that are not declared as nodata" in text


def test_a_tiny_deviation_is_named():
    assert "the mean (0.5 0.5 0.5) and standard deviation (1e-06 1e-06 1e-06)" in advised(GOOD, std=1e-6)


def test_images_of_one_colour_are_named():
    assert advised(torch.full((4, 3, 8, 8), 0.5)) == (
        "all 4 images of the batch are of one colour each, such as array[3]: look at them"
    )
    assert "all 4 images" in advised(torch.tensor([0.1, 0.5, 0.9])[:, None, None].expand(4, 3, 8, 8))


def test_weights_that_were_not_finite_before_are_named():
    text = advised(changed(2, float("nan")), {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    assert text.startswith(
        "the weights were not finite any more before this step (b): go back to an older state"
    )
