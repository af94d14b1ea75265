"""Which part of a model an operator belongs to, forwards and backwards.

Parts are pushed on a stack while a model runs: stages and decoder by hooks, the pieces of DM-MSA (windows,
rotary positions, gates) by wrapping them. Every part remembers which autograd nodes were made inside it, by
their sequence numbers: an operator of the backward pass belongs to the part that made its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from coma.models import attention
from coma.models.attention import Consecutive, Windows
from coma.models.view_sequences import ViewSequences

PREFIX = "part: "
"""Begins the names of the ranges that a profile shows."""


class Parts:
    """The parts of a model: `with parts.named(model): ...` around a step, then `of_node`."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self._ranges: list[tuple[int, int, tuple[str, ...]]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the part `name`."""
        self.stack.append(name)
        start = _next_node()
        try:
            with record_function(PREFIX + name):
                yield
        finally:
            self._ranges.append((start, _next_node(), tuple(self.stack)))
            self.stack.pop()

    def of_node(self, number: int) -> tuple[str, ...]:
        """The stack inside which the autograd node with this sequence number was made."""
        inside = [each for each in self._ranges if each[0] <= number < each[1]]
        return min(inside, key=lambda each: each[1] - each[0])[2] if inside else ()

    def here(self) -> tuple[str, ...]:
        """The stack of what runs now, forwards or backwards."""
        node = torch._C._current_autograd_node()
        return self.of_node(node._sequence_nr()) if node is not None else tuple(self.stack)

    @contextmanager
    def named(self, model: nn.Module) -> Iterator[None]:
        """Name the parts of an objective or encoder while inside."""
        with ExitStack() as stack:
            for name, module in _modules(model):
                stack.enter_context(self._around(name, module))
            stack.enter_context(self._pieces())
            yield

    @contextmanager
    def _around(self, name: str, module: nn.Module) -> Iterator[None]:
        open_parts: list[Any] = []

        def enter(*_: Any) -> None:
            open_parts.append(self.part(name))
            open_parts[-1].__enter__()

        def leave(*_: Any) -> None:
            open_parts.pop().__exit__(None, None, None)

        handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _pieces(self) -> Iterator[None]:
        before = attention._pieces
        gather, scatter = ViewSequences.gather, ViewSequences.scatter

        def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                with self.part(name):
                    return function(*args, **options)

            return call

        def arrange(windows: tuple[Windows, ...], like: Tensor, heads: int) -> tuple[Windows, ...]:
            return tuple(Named(each, self) for each in before.arrange(windows, like, heads))

        attention._pieces = replace(
            before,
            arrange=arrange,
            turn=within("rotary positions", before.turn),
            join=within("gates", before.join),
        )
        ViewSequences.gather, ViewSequences.scatter = within("gathers", gather), within("gathers", scatter)
        try:
            yield
        finally:
            attention._pieces = before
            ViewSequences.gather, ViewSequences.scatter = gather, scatter


@dataclass(frozen=True)
class Named:
    """Windows whose attention is a part of its own."""

    windows: Windows
    parts: Parts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
        """As the windows do."""
        length = self.windows.length if isinstance(self.windows, Consecutive) else q.shape[1] * q.shape[2]
        with self.parts.part(f"attention over {length} tokens"):
            return self.windows.attend(q, k, v, fused=fused)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    encoder: Any = getattr(model, "encoder", model)
    stem, *rest = encoder.parts()
    for module in stem if isinstance(stem, nn.ModuleList) else [stem]:  # with tokens, which are no module
        yield "stem", module
    pyramid = len(encoder.strides) > 1
    for number, module in enumerate(rest, start=1):
        yield f"stage {number}" if pyramid else "encoder", module
    if hasattr(model, "decoder"):
        yield "decoder", model.decoder  # type: ignore[misc]


def _next_node() -> int:
    return torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]


_KINDS = {  # operators by how their names begin
    "linear layers": ("mm", "addmm", "linear", "_unsafe_view"),
    "attention": ("_scaled_dot_product", "bmm", "_softmax", "_efficient_attention", "_flash", "_cudnn_att"),
    "norms": ("native_layer_norm",),
    "activations": ("gelu",),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat", "constant_pad_nd", "index_select", "stack"),
}


def kind_of(operator: str, stack: tuple[str, ...]) -> str:
    """What an operator (without its namespace) does: the piece of DM-MSA that it is in, else its kind."""
    piece = stack[-1] if stack else ""
    if piece and not piece.startswith(("stage", "stem", "encoder", "decoder")):
        return piece
    return next((kind for kind, names in _KINDS.items() if operator.startswith(names)), "other elementwise")
