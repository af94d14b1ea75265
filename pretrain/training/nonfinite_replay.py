"""A loss that is not finite stops the run, after the step was saved so that it can be replayed.

    run/nonfinite/step-00001234.safetensors    images, seeds (labels, if they are learned) of the batch, and
                                               the weights of that moment
    run/nonfinite/step-00001234.json           the run's settings, loss, gradient norm, names of the images

`replay_nonfinite` computes that step of a pre-training run again on any device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils import get_total_norm

from coma.amp import Precision, autocast, choose_attention
from coma.artifact import load_strict
from coma.atomic_io import write_json, write_whole
from coma.config import FinetuneConfig, PretrainConfig
from coma.config.serialization import from_plain, to_plain
from coma.data import Batch, normalize
from coma.data.pixel_values import format_values
from coma.data.transforms import stack
from coma.errors import BadInput, CheckFailed
from coma.objectives.teachers import training_objective
from pretrain.training.distributed import Processes
from pretrain.training.run_plan import RunPlan
from pretrain.training.train_step import NotFinite, TrainStep, pass_seed, seed_generators

_WEIGHTS = "weights."
_FAR = 100.0
"""Distance from the mean, in standard deviations, that no pixel of an ordinary image reaches."""


class Replay(NamedTuple):
    """Loss and gradient norm of a replayed step."""

    loss: float
    grad_norm: float


def save_nonfinite(
    folder: Path,
    step: int,
    problem: NotFinite,
    config: PretrainConfig | FinetuneConfig,
    precision: Precision,
    batches: list[Batch],
    weights: Mapping[str, Tensor],
    names: list[str],
    progress: float = 0.0,
) -> Path:
    """Writes the step to files.

    Args:
        folder: `run/nonfinite`.
        step: Number of the step, from 1.
        problem: Loss and gradient norm.
        config: Settings of the run, with mean and std.
        precision: Number format of the forward pass.
        batches: The micro batches of all processes, in the order of the stream.
        weights: Weights before the step.
        names: Names of the images.
        progress: Share of the run before the step.

    Returns:
        The `.safetensors` file.

    Raises:
        OSError: the disk is full.
    """
    labels = [batch.labels for batch in batches if batch.labels is not None]
    tensors = {
        "images": _images(batches),
        "seeds": torch.cat([batch.seeds for batch in batches]),
        **({"labels": torch.cat(labels)} if labels else {}),
        **{_WEIGHTS + name: weight.contiguous() for name, weight in weights.items()},
    }
    facts = {
        "step": step,
        "loss": str(problem.loss),
        "grad_norm": str(problem.grad_norm),
        "precision": precision,
        "micro_batch": len(batches[0].images),
        "progress": progress,
        "images": names,
        "config": to_plain(config),
    }
    path = folder / f"step-{step:06d}.safetensors"
    write_json(path.with_suffix(".json"), facts)
    write_whole(path, lambda file: file.write(save(tensors)))
    return path


def stop_run(
    plan: RunPlan, train_step: TrainStep, group: Processes, step: int, problem: NotFinite
) -> NoReturn:
    """Saves step number `step` (counted from 1) and ends the run on all processes.

    Raises:
        CheckFailed: with the step, the file, and what to try.
    """
    per_process = group.collect([replace(b, images=b.images.cpu()) for b in train_step.batches])
    weights = train_step.weights()
    with group.raise_on_all_ranks():
        if group.main:
            batches = [each[a] for a in range(plan.slices.accumulation) for each in per_process]
            where = _write_down(plan, train_step, step, problem, batches, weights)
            raise CheckFailed(f"step {step}: {problem}; {where}; {advice(plan, batches, weights)}")
    raise AssertionError("process 0 raised, and so did all")


def advice(plan: RunPlan, batches: list[Batch], weights: Mapping[str, Tensor]) -> str:
    """Returns advice about a loss that is not finite, derived from the weights and the batch."""
    damaged = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if damaged:
        return (
            f"the weights were not finite any more before this step ({damaged[0]}): go back to an older "
            "state, with a lower --base-lr"
        )
    mean, std = plan.statistics
    pixels = _images(batches)
    names = [plan.source.describe(i) for batch in batches for i in batch.indices.tolist()]
    bad = (~pixels.isfinite().flatten(1).all(dim=1)).nonzero()
    if len(bad):
        return f"{names[int(bad[0])]} holds values that are NaN or infinite: mend it or take it out"
    farthest = normalize(pixels, mean, std).abs().flatten(1).amax(dim=1)
    worst = int(farthest.argmax())
    name = names[worst]
    if farthest[worst] > _FAR:
        return (
            f"{name} holds values that are {farthest[worst]:.4g} standard deviations away from the mean: "
            "look for missing values that are not declared as nodata, for another unit, and at the mean "
            f"({format_values(mean)}) and standard deviation ({format_values(std)})"
        )
    low, high = torch.aminmax(pixels.flatten(2), dim=2)
    if (low == high).all():
        return f"all {len(pixels)} images of the batch are of one colour each, such as {name}: look at them"
    return "try a lower --base-lr, a longer --warmup, a smaller --clip-grad or --precision fp32"


def _images(batches: list[Batch]) -> Tensor:
    """Returns the images of all passes `[B, C, H, W]`; uint8 among floats is scaled to 0..1."""
    return stack([image for batch in batches for image in batch.images])


def _write_down(
    plan: RunPlan,
    train_step: TrainStep,
    step: int,
    problem: NotFinite,
    batches: list[Batch],
    weights: Mapping[str, Tensor],
) -> str:
    """Saves the step and returns where it is, or why it could not be written."""
    names = [plan.source.describe(i) for batch in batches for i in batch.indices.tolist()]
    folder = plan.folder / "nonfinite"
    try:
        path = save_nonfinite(
            folder,
            step,
            problem,
            plan.config,
            train_step.precision,
            batches,
            weights,
            names,
            train_step.progress,
        )
    except OSError as error:
        return f"the batch that leads to it could not be written ({error.strerror})"
    return f"the batch and the weights that lead to it are in {path}"


def replay_nonfinite(path: Path, device: str = "cpu") -> Replay:
    """Computes a saved step again: the mean loss of its batch and the norm of its gradient.

    Args:
        path: The `.safetensors` file, its `.json` beside it.
        device: Device to compute on.

    Raises:
        BadInput: files that are missing or not what `save_nonfinite` wrote.
    """
    facts, tensors = _read(path)
    config: PretrainConfig = from_plain(facts["config"], PretrainConfig, source=str(path))
    objective = training_objective(config).to(device).train()
    objective.before_step(facts.get("progress", 0.0))
    weights = {n.removeprefix(_WEIGHTS): t for n, t in tensors.items() if n.startswith(_WEIGHTS)}
    load_strict(objective, weights, source=str(path))
    objective.set_grad_checkpointing(config.run.grad_checkpointing)
    how = facts["precision"], torch.device(device)
    choose_attention(objective, *how)
    micro = facts["micro_batch"]
    passes = list(zip(tensors["images"].split(micro), tensors["seeds"].split(micro), strict=True))
    first, losses = (facts["step"] - 1) * config.optimizer.batch_size, []
    for number, (images, seeds) in enumerate(passes):
        seed_generators(pass_seed(config.run.seed), first + number * micro)
        pixels = normalize(images.to(device), config.data.mean or (), config.data.std or ())
        with autocast(*how):
            loss = objective(pixels, seeds.to(device)).loss
        (loss / len(passes)).backward()
        losses.append(loss.item())
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    return Replay(sum(losses) / len(losses), get_total_norm(gradients).item())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        missing = {"step", "config", "precision", "micro_batch"} - set(facts) | {"images", "seeds"} - set(
            tensors
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{path}: not a saved step ({error})") from None
    if missing:
        raise BadInput(f"{path}: not a saved step, it has no {', '.join(sorted(missing))}")
    return facts, tensors
