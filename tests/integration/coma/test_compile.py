"""`--compile`: what torch.compile makes of the models computes what they compute without it.

Whole training graphs are traced and differentiated ahead of time; code is generated and built for one block
only, since that takes minutes for a whole model on a CPU (`benchmarks/LOG.md` has those figures).
"""

import shutil
from dataclasses import replace

import pytest
import torch
from short_runs import MODEL, OBJECTIVE
from small_models import DECODER, ENCODERS, pictures
from taught_models import METHODS
from taught_models import objective as objective_of

from coma.config import BeyondConfig, DecoderConfig, MAEConfig, ViTConfig
from coma.masking.sampling import group_sizes, partition
from coma.models import build_encoder
from coma.models.attention import Consecutive, stage_layout
from coma.models.dyvit import Block
from coma.models.view_sequences import image_sequences
from coma.objectives import build_objective

DYVIT = replace(MODEL, windows=((4, 8), (2, 4), (2, 6), (2,)))  # inside units, across them, all of the map
VIT = ViTConfig(patch=8, dim=16, depth=2, heads=2)
MAE = MAEConfig(decoder=DecoderConfig(8, 1, 2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, images, seeds):
    loss = model(images, seeds).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "encoder", [pytest.param(DYVIT, id="dyvit", marks=pytest.mark.slow), pytest.param(VIT, id="vit")]
)
@pytest.mark.parametrize(
    "objective", [pytest.param(OBJECTIVE, id="coma"), pytest.param(MAE, id="mae", marks=pytest.mark.slow)]
)
def test_traced_training_graphs_equal_eager(encoder, objective):
    images, seeds = torch.randn(2, 3, 24, 24), torch.arange(2)  # 9 units: views of 5 and 4
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_objective(objective, build_encoder(encoder))
        if compiled:
            model.compile(backend="aot_eager", dynamic=False)
        results.append(loss_and_gradients(model, images, seeds))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", ["cmt", "coma-balanced", "zoom-in+coma"])
def test_steps_that_ask_a_teacher_or_zoom_in_equal_eager(encoder, method):
    """What attention is asked for stays out of the graphs."""
    images, seeds = pictures(2, 40), torch.arange(2)
    results = []
    for compiled in (False, True):
        if method in METHODS:
            model = objective_of(encoder, method)
        else:
            torch.manual_seed(0)
            model = build_objective(BeyondConfig(method, decoder=DECODER), build_encoder(ENCODERS[encoder]))
        if compiled:
            model.compile(backend="aot_eager", dynamic=False)
        results.append(loss_and_gradients(model, images, seeds))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_generated_code_of_a_block_equals_eager():
    group = partition(torch.arange(2), 3, 3, 2)
    sequences = image_sequences(3, 3, group, group_sizes(9, 2))
    block = Block(16, heads=4, windows=2, mlp_ratio=2, drop_path=0)
    tokens = torch.randn(4, 5, 4, 16)
    layout = stage_layout(sequences, (2, 6), 4, 2, tokens)
    assert all(isinstance(window, Consecutive) for window in layout.windows)
    results = []
    for run in (block, torch.compile(block, dynamic=False)):
        x = tokens.clone().requires_grad_()
        block.zero_grad()
        out = run(x, layout)
        out.square().mean().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in block.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
