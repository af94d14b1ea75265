"""The steps in order of importance, with the share of the time that each may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        key: What `--steps` calls it.
        title: For tables.
        where: Module of this package and function that takes a `Session`.
        seconds: Time limit of the step on a GPU; the sum is scaled to `--minutes`.
        dry_seconds: Time limit of the step on a CPU, at reduced sizes.
        on_cpu: What a run on a CPU shows of it, all sizes being reduced.
    """

    key: str
    title: str
    where: str
    seconds: float
    dry_seconds: float
    on_cpu: str


STEPS = (
    Step("m", "machine and its ceilings", "ceilings:run", 12, 2, "ceilings of a CPU"),
    Step("a", "training step", "training:run", 160, 17, "fp32; compiled is traced only"),
    Step("b", "correctness", "correctness:run", 60, 20, "the device is the reference itself"),
    Step("c", "where the time goes", "profiling:run", 35, 3, "operators in place of kernels"),
    Step("c2", "remedies", "remedies:run", 75, 12, "no CUDA graphs, no FlexAttention"),
    Step("d", "inference beside timm's encoders", "encoders:run", 50, 2, "two small encoders"),
    Step("e", "tests marked gpu", "marked_tests:run", 40, 42, "the same tests on the CPU"),
    Step("f", "loader into the device", "loading:run", 35, 4, "copies within memory, no pinning"),
    Step("g", "a real pre-training", "loading:pretrain_for_a_minute", 62, 9, "a few steps of a tiny model"),
    Step("h", "mmdet and mmseg steps", "openmmlab:run", 50, 48, "fp32, tiny encoders"),
    Step("i", "ONNX Runtime", "runtimes:onnx_runtime", 30, 36, "its CPU provider"),
    Step("j", "TensorRT-RTX", "runtimes:tensorrt_rtx", 12, 18, "compiles an engine, runs none"),
    Step("j2", "ONNX Runtime's TensorRT provider", "runtimes:tensorrt_provider", 40, 4, "skipped"),
    Step("k", "large with gradient checkpointing", "training:large_model", 45, 18, "a tiny model"),
    Step("l", "NCCL with one process", "distributed:run", 20, 3, "gloo"),
)
