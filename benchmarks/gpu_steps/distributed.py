"""One process in a real process group: NCCL on a GPU, gloo on a CPU; DDP and FSDP2 against no wrapper."""

from __future__ import annotations

import copy
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpu_steps.correctness import awake
from gpu_steps.session import Session
from pretrain.training.distributed import Processes, innermost_blocks


def run(session: Session) -> None:
    """The collectives that a run uses, then a step under DDP and under FSDP2."""
    device = torch.device("cuda", 0) if session.device.type == "cuda" else session.device
    backend = "nccl" if device.type == "cuda" else "gloo"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    dist.init_process_group(backend, rank=0, world_size=1, device_id=device if backend == "nccl" else None)
    try:
        with session.attempt("collectives"):
            values = torch.arange(4.0, device=device)
            dist.all_reduce(values)
            shared: list[object] = [{"step": 3}]
            dist.broadcast_object_list(shared, src=0)
            gathered: list[object] = [None]
            dist.all_gather_object(gathered, "here")
            dist.barrier()
            right = values.tolist() == [0, 1, 2, 3] and shared == [{"step": 3}] and gathered == ["here"]
            session.add("collectives", ok=right and Processes(device).world == 1, backend=backend)
        size = 32 if session.small else 224
        model = awake("tiny" if session.small else "small", "coma", size).to(device)
        images = torch.randn(2 if session.small else 16, 3, size, size, device=device)
        expected = gradients(model, model, images)
        for name in ("DDP", "FSDP2"):
            with session.attempt(name):
                inner = copy.deepcopy(model)
                outer = wrapped(name, inner, device)
                found_gradients = gradients(outer, inner, images)
                off = max(
                    float(
                        (found_gradients[key] - expected[key]).norm() / expected[key].norm().clamp(min=1e-6)
                    )
                    for key in expected
                )
                session.add(name, ok=off < 1e-3, largest_difference=off, limit=1e-3, backend=backend)
    finally:
        dist.destroy_process_group()


def wrapped(name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """As the trainer wraps it."""
    if name == "DDP":
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (1,))
    for block in innermost_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients(outer: nn.Module, inner: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of one fp32 step, gathered from all processes."""
    inner.zero_grad(set_to_none=True)
    outer(images, torch.arange(len(images), device=images.device)).loss.backward()
    found = {}
    for name, parameter in inner.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found
