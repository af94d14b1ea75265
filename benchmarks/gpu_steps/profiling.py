"""Where the time of an eager training step goes: parts of the model, kernels, share without any kernel."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType
from train_step import Step

from coma.amp import choose_precision
from gpu_steps.parts import PREFIX, Parts, kind_of
from gpu_steps.session import Session, free, median_seconds, wait
from gpu_steps.training import ON_CPU

MODELS = ("CoMA DyViT-B", "MAE ViT-B")
TOP = 10


def run(session: Session) -> None:
    """Both base models at a batch that waits for the CPU and at one that does not."""
    for name in ON_CPU["eager"] if session.small else MODELS:
        step = Step(
            name, session.device, choose_precision("auto", session.device), 32 if session.small else 224
        )
        for batch in (2,) if session.small else (64, 512):
            if session.wants(f"{name}, batch {batch}"):
                with session.attempt(f"{name}, batch {batch}"):
                    profile(session, step, batch)
        del step
        free(session.device)


def profile(session: Session, step: Step, batch: int) -> None:
    """One step: time by part, the most costly kernels, and how long the device had nothing to do."""
    device, name = session.device, f"{step.name}, batch {batch}"
    seconds = median_seconds(lambda: step(batch), device, seconds=session.repeat)
    parts = Parts()
    with torch.profiler.profile(acc_events=True) as taken, parts.named(step.model):
        step(batch)
        wait(device)
    events = taken.events() or []
    spent, kernels = attribute(events, parts, on_gpu=device.type == "cuda")
    busy = sum(spent.values())
    in_kernels = sum(micros for _, micros in kernels.values())
    values = {
        "ms": 1e3 * seconds,
        "kernels": sum(count for count, _ in kernels.values()),
        "ms in kernels": in_kernels / 1e3,
        "kernels' share": f"{in_kernels / 1e6 / seconds:.0%}",
    }
    session.add(name, values)
    for part, micros in sorted(spent.items(), key=lambda item: -item[1]):
        if micros > busy / 100:
            session.add(f"{name}: {part}", ms=micros / 1e3, share=f"{micros / busy:.1%}")
    for kernel, (count, micros) in sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP]:
        session.add(
            f"{name}: kernel {kernel[:70]}", calls=count, ms=micros / 1e3, share=f"{micros / in_kernels:.1%}"
        )
    with (session.out / "profile.txt").open("a") as file:
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = taken.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        file.write(f"{name}\n{table}\n\n")


def attribute(
    events: Any, parts: Parts, *, on_gpu: bool
) -> tuple[dict[str, float], dict[str, tuple[int, float]]]:
    """Microseconds by part of the model, and calls and microseconds by kernel (on a CPU by operator)."""
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def count(name: str, micros: float) -> None:
        calls, before = kernels[name]
        kernels[name] = calls + 1, before + micros

    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation and not event.name.startswith(PREFIX):
                count(event.name, event.self_device_time_total)
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not micros or not event.name.startswith(("aten::", "torch_attn::", "flex_", "triton")):
            continue
        if not on_gpu:
            count(event.name, micros)
        stack, backward = stack_of(event, parts)
        place = stack[0] if stack and stack[0].startswith(("stage", "decoder", "stem", "encoder")) else ""
        kind = kind_of(event.name.partition("::")[2], stack)
        spent[f"{place or 'the rest'}, {kind}, {'backward' if backward else 'forward'}"] += micros
    return dict(spent), dict(kernels)


def stack_of(event: Any, parts: Parts) -> tuple[tuple[str, ...], bool]:
    """Inside which parts an operator ran or, backwards, its node was made; and whether it ran backwards."""
    names: list[str] = []
    here = event
    while here is not None:
        if here.name.startswith(PREFIX):
            names.insert(0, here.name.removeprefix(PREFIX))
        if here.name.startswith("autograd::engine::evaluate_function"):
            return parts.of_node(here.sequence_nr), True
        here = here.cpu_parent
    return tuple(names), False
