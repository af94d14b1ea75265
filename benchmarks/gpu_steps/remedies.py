"""What helps: other kernels for small windows, CUDA graphs, compiled blocks, each timed and checked.

Every row is a whole training step of CoMA on DyViT-B under a variant of `coma.models.window_variants`,
compared in loss and gradients with the reference before it is timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from train_step import Step

from coma.amp import autocast, choose_precision
from coma.models import window_variants
from coma.models.window_variants import attention_variant
from gpu_steps.correctness import error, loss_and_gradients
from gpu_steps.session import Session, free, median_seconds
from pretrain.training.distributed import innermost_blocks

EAGER, GRAPH, BLOCKS, BOTH = "eager", "CUDA graph", "compiled blocks", "compiled blocks, CUDA graph"
WAYS = (  # the likeliest first
    *(("reference", EAGER), ("merged", EAGER), ("products", EAGER), ("merged+rotary", EAGER)),
    *(("reference", GRAPH), ("merged+rotary", GRAPH), ("reference", BLOCKS), ("merged", BLOCKS)),
    *(("merged", BOTH), ("products+varlen", EAGER), ("varlen", EAGER), ("merged+pieces", EAGER)),
    *(("merged+pieces", GRAPH), ("elementwise+varlen", BLOCKS), ("flex", BLOCKS), ("flex", EAGER)),
    *(("pieces", EAGER), ("elementwise", EAGER)),
)
ON_CPU = (("reference", EAGER), ("products+varlen", GRAPH), ("merged", BOTH))  # each kind of way once
SECONDS = {EAGER: 3.0, GRAPH: 4.0, BLOCKS: 15.0, BOTH: 15.0}
LIMIT = 5e-2
"""Tolerance of the relative difference of all gradients in bf16."""


def run(session: Session) -> None:
    """Every way of `WAYS` for which there is time."""
    device, small = session.device, session.small
    name, batch = ("CoMA DyViT-T", 2) if small else ("CoMA DyViT-B", 256)
    step = Step(name, device, choose_precision("auto", device), 32 if small else 224)
    start = {key: value.clone() for key, value in step.model.state_dict().items()}
    images, seeds = torch.randn(4, 3, step.size, step.size), torch.arange(4)
    expected = loss_and_gradients(step.model, images, seeds, step.precision)
    blocks = innermost_blocks(step.model)
    for variant, mode in ON_CPU if small else WAYS:
        label = f"{variant}, {mode}"
        if not session.wants(label, 0.0 if small else SECONDS[mode]):
            continue
        step.model.load_state_dict(start)
        graph = GraphOf(step, batch)
        with session.attempt(label), attention_variant(variant):
            compile_blocks(blocks if mode in (BLOCKS, BOTH) else [], small)
            found = loss_and_gradients(step.model, images, seeds, step.precision)
            together, _, tensor = error(found, expected)
            action = graph if mode in (GRAPH, BOTH) else partial(step, batch)
            time = median_seconds(action, device, warm=1 if small else 3, seconds=session.repeat / 2)
            before = session.results.get("reference, eager")
            reference = float(before.values["ms"]) / 1e3 if before and "ms" in before.values else None
            values = {
                "batch": batch,
                "ms": 1e3 * time,
                "images/s": batch / time,
                "speed": reference / time if reference else 1.0,
                "gradient difference": together,
            }
            right = together < LIMIT
            session.add(label, values, ok=right, note="" if right else f"worst: {tensor}")
        step.optimizer.zero_grad(set_to_none=True)
        del graph
        free(device)


def compile_blocks(blocks: list[nn.Module], small: bool) -> None:
    """Compile every transformer block for itself: blocks of one shape share their code."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    window_variants._compiled.cache_clear()
    window_variants.BACKEND = "aot_eager" if small else "inductor"
    for block in blocks:
        block.compile(dynamic=False, backend="aot_eager" if small else "inductor")


class GraphOf:
    """A training step that is recorded at the first call and replayed from then on; on a CPU run as it is."""

    def __init__(self, step: Step, batch: int) -> None:
        self._step, self._batch = step, batch
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """One step."""
        if self._step.device.type != "cuda":
            return self._one(*self._inputs())
        if self._graph is None:
            self._record()
        else:
            self._graph.replay()

    def _inputs(self) -> tuple[Tensor, Tensor]:
        size, device = self._step.size, self._step.device
        return (
            torch.randn(self._batch, 3, size, size, device=device),
            torch.arange(self._batch, device=device),
        )

    def _one(self, images: Tensor, seeds: Tensor) -> None:
        context = autocast(self._step.precision, self._step.device)
        context._cache_enabled = False  # weights are cast anew in every replay
        self._optimizer.zero_grad(set_to_none=True)
        with context:
            loss = self._step.model(images, seeds).loss
        loss.backward()
        self._optimizer.step()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        for group in self._step.optimizer.param_groups:
            group["capturable"] = self._step.device.type == "cuda"
        return self._step.optimizer

    def _record(self) -> None:
        images, seeds = self._inputs()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._one(images, seeds)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._one(images, seeds)
