"""Every variant of DM-MSA computes what the reference computes, in outputs and in gradients."""

import pytest
import torch
from short_runs import OBJECTIVE

from coma.config import DyViTConfig
from coma.masking.sampling import group_sizes, partition
from coma.models import attention, build_encoder, window_variants
from coma.models.attention import Consecutive, stage_layout
from coma.models.dyvit import Block
from coma.models.view_sequences import image_sequences
from coma.models.window_variants import (
    VARIANTS,
    Elementwise,
    Flex,
    Products,
    Varlen,
    attention_variant,
    blocks_bias,
    run_length,
)
from coma.models.windows import MASKED
from coma.objectives import build_objective

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # the compiler's own
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

NAMES = [*VARIANTS, "products+varlen", "merged+rotary+pieces"]
STAGES = {8: (4, 8), 4: (2, 4), 2: (2, 6), 1: (3,)}  # side of a unit in tokens: windows, on 3 x 3 units
VIEWS = {"uneven views": 2, "even views": 3, "whole images": 0}


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Traced and differentiated ahead of time, but no code built: that takes minutes on a CPU."""
    window_variants._compiled.cache_clear()
    monkeypatch.setattr(window_variants, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    window_variants._compiled.cache_clear()


def run(name, side, views, windows=None, dtype=torch.float64, grad=True):
    """Outputs of a block with a gate that is awake, and all gradients."""
    torch.manual_seed(0)
    windows = windows or STAGES[side]
    block = Block(32, heads=4, windows=len(windows), mlp_ratio=1, drop_path=0).to(dtype)
    if block.attn.gate is not None:
        torch.nn.init.normal_(block.attn.gate.out.weight)
    group = partition(torch.arange(2), 3, 3, views) if views else None
    sequences = image_sequences(3, 3, group, group_sizes(9, views) if views else None)
    n, s = (2, 9) if sequences.unit_of is None else sequences.unit_of.shape
    x = torch.randn(n, s, side * side, 32, dtype=dtype, requires_grad=grad)
    with attention_variant(name), torch.set_grad_enabled(grad):
        layout = stage_layout(sequences, windows, 8, side, x)
        out = block(x, layout)
    seen = sequences.scatter(out)  # slots without a unit may hold anything
    if not grad:
        return layout, [seen]
    seen.square().mean().backward()
    return layout, [seen.detach(), x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize(
    "side", [pytest.param(each, marks=[pytest.mark.slow] * (each != 2)) for each in STAGES]
)
@pytest.mark.parametrize(
    "views", [pytest.param(each, marks=[pytest.mark.slow] * (each != "uneven views")) for each in VIEWS]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_variant_equals_the_reference(name, side, views):
    grad = "flex" not in name  # FlexAttention has no backward pass on CPUs
    _, expected = run("reference", side, VIEWS[views], grad=grad)
    _, found = run(name, side, VIEWS[views], grad=grad)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "side", "views", "kinds"),
    [
        ("products", 8, 2, [Products, Products]),
        ("products", 2, 2, [Products, Consecutive]),
        ("elementwise", 8, 2, [Elementwise, Consecutive]),
        ("merged", 2, 2, [Consecutive]),
        ("flex", 2, 2, [Flex]),
        ("varlen", 2, 2, [Consecutive, Varlen]),
        ("varlen", 2, 3, [Consecutive, Consecutive]),  # nothing is masked where all views are of one size
        ("products+varlen", 2, 2, [Products, Varlen]),
    ],
)
def test_a_variant_takes_the_windows_that_it_is_for(name, side, views, kinds):
    layout, _ = run(name, side, views, grad=False)
    assert [type(each) for each in layout.windows] == kinds


@pytest.mark.parametrize("name", NAMES)
def test_windows_that_cross_units_are_left_alone(name):
    expected, found = (run(each, 4, 2, windows=(3, 4), grad=False)[1] for each in ("reference", name))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["products", "elementwise", "merged", "varlen", "rotary", "pieces"])
def test_a_training_step_in_16_bits_equals_the_reference_within_them(name):
    config = DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 6), (3,))
    )
    results = []
    for each in ("reference", name):
        torch.manual_seed(0)
        model = build_objective(OBJECTIVE, build_encoder(config))
        images = torch.randn(2, 3, 24, 24)
        with attention_variant(each), torch.autocast("cpu", torch.bfloat16):
            loss = model(images, torch.arange(2)).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, others) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-2, atol=0)
    assert (others - gradients).norm() < 0.03 * gradients.norm()


def test_flex_attention_allows_the_pairs_that_merged_windows_allow():
    """Its gradients are computed on GPUs only; what decides about them here is the mask."""
    for views in (2, 0):
        (flex,), (window,) = (run(name, 2, views, grad=False)[0].windows for name in ("flex", "merged"))
        assert isinstance(flex, Flex) and isinstance(window, Consecutive) and window.bias is not None
        n, heads, m, _ = window.bias.shape
        places = torch.meshgrid(*(torch.arange(size) for size in (n, heads, m, m)), indexing="ij")
        allowed = flex.mask.mask_mod(*places)
        if views:  # the last slot of the second view of each image holds no unit
            allowed, window_bias = allowed[0::2], window.bias[0::2]
        else:
            window_bias = window.bias
        assert torch.equal(allowed, window_bias == 0) and allowed.any(dim=-1).all()


def test_runs_of_merged_windows():
    assert run_length((16, 64), 1600) == 64  # base, first stage: 25 units of 64 tokens
    assert run_length((4, 16), 400) == 80  # second stage
    assert run_length((4, 100), 100) == 100  # third: the whole view
    assert run_length((4, 196), 196) == 196  # the same of a whole image
    assert run_length((4, 4200), 4200) is None  # 800 x 1344 px: a mask of blocks would be nearly empty
    bias = blocks_bias((1, 2), 4, torch.device("cpu"), torch.float32)[0]
    assert torch.equal(bias[0] == 0, torch.eye(4, dtype=torch.bool))
    assert torch.equal(
        bias[1] == 0, torch.eye(2, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert bias.min() == MASKED


def test_the_comparison_notices_a_wrong_mask(monkeypatch):
    monkeypatch.setattr(
        window_variants,
        "blocks_bias",
        lambda lengths, run, device, dtype: torch.zeros(1, 4, run, run, dtype=dtype),
    )
    expected, found = (run(name, 8, 2, grad=False)[1][0] for name in ("reference", "merged"))
    assert (expected - found).abs().max() > 1e-4


def test_the_switch_is_switched_back():
    before = attention._pieces
    with pytest.raises(ValueError, match="stop"), attention_variant("merged"):
        raise ValueError("stop")
    assert attention._pieces is before
