"""The plan of a run: its settings, checked before the first step and before anything is written.

The plan also holds what follows from settings, data and machine: the split of the batch, the number of steps,
mean and standard deviation of the data.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch

from coma.config import FinetuneConfig, OptimizerConfig, PretrainConfig
from coma.config.serialization import read_config
from coma.data import BatchLayout, Source, check_loader, check_sample, compute_mean_std, open_source
from coma.data.listing import FLAG, Listing, list_data, read_listing
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.masking.patchify import cover, unit_grid
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.initialization import statistics_of_weights, with_initial_weights
from coma.objectives.teachers import with_weights_hash
from coma.paths import Address
from coma.preflight import require_space
from pretrain.training.checkpoint import count_states
from pretrain.training.distributed import Processes
from pretrain.training.optimizer import learning_rate
from pretrain.training.run_settings import Settings, check_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan(Generic[Settings]):
    """A run, ready to start."""

    config: Settings
    """The settings, with mean and standard deviation filled in."""
    source: Source
    slices: BatchLayout
    steps: int
    """Optimizer steps of the whole run."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.run.out

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of pixels scaled to 0..1."""
        return self.config.data.mean or (), self.config.data.std or ()

    @property
    def sources(self) -> dict[str, Source]:
        """The images of the run by their names in messages; see `list_data`."""
        return {"images": self.source}

    def list_data(self) -> Listing:
        """Returns names and sizes of the images that influence the result."""
        return list_data(self.sources, labels=isinstance(self.config, FinetuneConfig))

    def evaluates_at(self, step: int) -> bool:
        """Returns whether an evaluation is due after `step` steps."""
        return self.draws_reconstructions_at(step)

    def draws_reconstructions_at(self, step: int) -> bool:
        """Returns whether a picture of reconstructions is due."""
        return step > 0 and is_multiple(step, self.config.run.reconstruction_every)

    def epochs(self, steps: int) -> float:
        """Returns the passes over the data after `steps` steps."""
        return steps * self.slices.global_batch / len(self.source)


@dataclass(frozen=True)
class PretrainPlan(RunPlan[PretrainConfig]):
    """A pre-training run, ready to start."""

    def evaluates_at(self, step: int) -> bool:
        """Returns whether a picture or a probe is due."""
        return self.draws_reconstructions_at(step) or self.probes_at(step)

    def probes_at(self, step: int) -> bool:
        """Returns whether the online probe is due, which it also is before the first step."""
        probe = self.config.probe
        if probe.probe is None:
            return False
        every = probe.probe_steps
        if every is None:
            every = max(1, round(probe.probe_epochs * len(self.source) / self.slices.global_batch))
        return is_multiple(step, every)


def is_multiple(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0


def prepare(config: PretrainConfig, group: Processes, *, resume: bool) -> PretrainPlan:
    """Checks the settings against the data, the machine and the run directory.

    Raises:
        BadInput: on every process, with what does not fit and what would.
    """
    with group.raise_on_all_ranks():
        if group.main:
            config = check_folder(config, resume)
    config = group.share(config)
    with group.raise_on_all_ranks():
        if config.data.images is None:
            raise BadInput("give the images to train on, for example: coma pretrain PHOTOS --out runs/first")
        check_shapes(config)
        parameters = check_objective(config)
        if group.main:
            check_space(config, parameters)
        check_loader(config.data, config.model.channels)
        slices = split_batch(config.optimizer, group.rank, group.world)
        images, source = config.data.images, None
        tiles = config.data.tiles
        shared = isinstance(images, Address) or tiles is not None
        if not shared:
            source = open_source(images)
        elif group.main:  # one process reads what is in the files, for all
            saved = read_listing(config.run.out) if resume else None
            source = open_source(images, listing=(saved or {}).get("images"), tiles=tiles)
        if group.main and not resume:
            config = with_initial_weights(config)
    if shared:
        source = group.share(source)
    assert source is not None
    steps = count_steps(config.optimizer, len(source))
    sizes = group.gather(len(source))
    with group.raise_on_all_ranks():
        if len(set(sizes)) > 1:
            raise BadInput(f"{config.data.images}: the processes see different numbers of images, {sizes}")
    with group.raise_on_all_ranks():
        if group.main and config.data.mean is None:
            mean, std = initial_statistics(config, source) or compute_mean_std(
                source, config.model.channels, workers=config.data.workers
            )
            config = replace(config, data=replace(config.data, mean=mean, std=std))
        elif group.main:
            check_sample(source, config.model.channels, config.data.mean or (), config.data.std or ())
    config = group.share(config)
    with group.raise_on_all_ranks():
        if group.main:
            config = with_weights_hash(config)
    return PretrainPlan(group.share(config), source, slices, steps)


def initial_statistics(
    config: PretrainConfig, source: Source
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and standard deviation that the initial weights expect; None: those of the images count.

    Logs which ones count, where there are initial weights.
    """
    init, channels = config.init, config.model.channels
    if init.init is None:
        return None
    known, reason = statistics_of_weights(config), ""
    if init.init_normalization == "images":
        reason = "--init-normalization weights takes those of the weights"
    elif known is None:
        reason = "the weights do not name theirs; --mean and --std set them"
    elif len(known[0]) != channels:
        reason = f"those of the weights have {len(known[0])} channels, the images {channels}"
    else:
        try:
            check_sample(source, channels, *known)
        except BadInput as error:
            reason = f"those of the weights do not fit: {error}"
    whose = "pixels are normalised by mean and standard deviation of the"
    if reason or known is None:
        log.info("%s images (%s)", whose, reason)
        return None
    shown = " and ".join(" ".join(f"{value:.3g}" for value in values) for values in known)
    log.info("%s weights (%s); --init-normalization images takes those of the images", whose, shown)
    return known


def check_shapes(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuses an image size that is no multiple of the mask unit, and statistics for other channels.

    Raises:
        BadInput: naming sizes that fit.
    """
    size, unit, channels = config.data.image_size, config.model.unit, config.model.channels
    if any(side < unit or side % unit for side in size):
        below = ImageSize(*(max(side // unit, 1) * unit for side in size))
        above = ImageSize(*(cover(max(side, 1), unit) * unit for side in size))
        fitting = " or ".join(dict.fromkeys((below.words, above.words)))
        multiple = "must be a multiple" if size.height == size.width else "both must be multiples"
        raise BadInput(
            f"--image-size {size.words}: {multiple} of the {unit} px mask unit; {fitting} would do"
        )
    if config.data.mean is not None and len(config.data.mean) != channels:
        raise BadInput(
            f"--mean and --std have {len(config.data.mean)} values, the images {channels} channels"
        )


def check_space(config: PretrainConfig | FinetuneConfig, parameters: int) -> None:
    """Refuses a disk without room for what the run adds to its directory.

    Raises:
        BadInput: with the space that is needed and the space that is free.
    """
    needed = disk_space(config, parameters, saved=count_states(config.run.out / "state"))
    require_space(config.run.out, needed, f"a run of {parameters:,} weights")


def disk_space(config: PretrainConfig | FinetuneConfig, parameters: int, saved: int = 0) -> int:
    """Returns the bytes of the states and the artifact of a run with this many trained weights.

    A third state is written before the oldest is removed; of `saved` states, two at most are there already.
    """
    copies = 4 if config.optimizer.ema_decay else 3  # weights, two moments of AdamW, their moving average
    copies += isinstance(config, FinetuneConfig)  # the best weights so far
    return 4 * parameters * ((3 - min(saved, 2)) * copies + 1)


def check_objective(config: PretrainConfig) -> int:
    """Refuses an objective that does not fit images of this size, without computing a model.

    Returns:
        The number of trained weights.

    Raises:
        BadInput: masks that hide everything, or an encoder without global attention that is to guide them.
    """
    size, model = config.view_size, config.model
    with torch.device("meta"):
        objective = build_objective(config.objective, build_encoder(model))
    h, w = unit_grid(*size, model.unit)
    visible = objective.draw_visible(torch.zeros(1, dtype=torch.int64), h, w)
    if not visible.flatten(1).any(dim=1).all():
        raise BadInput(f"{len(visible)} views are too many for {h * w} mask units: some would see nothing")
    objective.check_images(*size)
    return sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)


def split_batch(optimizer: OptimizerConfig, rank: int, world: int) -> BatchLayout:
    """Splits the global batch over processes and passes.

    Raises:
        BadInput: it cannot be split evenly; the message names numbers that can.
    """
    batch, micro = optimizer.batch_size, optimizer.micro_batch
    together = world * (micro or 1)
    if batch % together:
        below, above = batch // together * together, -(-batch // together) * together
        what = f"{world} processes" + (f" with --micro-batch {micro}" if micro else "")
        fitting = [f"--batch-size {good}" for good in (below, above) if good]
        if micro and batch % world == 0:
            share = batch // world
            fitting.append(
                f"--micro-batch {max(m for m in range(1, min(micro, share) + 1) if share % m == 0)}"
            )
        raise BadInput(
            f"--batch-size {batch} cannot be split evenly over {what}; {' or '.join(fitting)} would do"
        )
    return BatchLayout(batch, micro or batch // world, rank, world)


def count_steps(optimizer: OptimizerConfig, images: int) -> int:
    """Returns the optimizer steps of the whole run."""
    return optimizer.steps or math.ceil(optimizer.epochs * images / optimizer.batch_size)


def check_resumable(plan: RunPlan, state: dict[str, Any], *, allow_changed_data: bool) -> None:
    """Refuses to resume from `state` with another number of images, or with fewer steps than are done.

    Raises:
        BadInput: naming both numbers.
    """
    images, before = len(plan.source), state["images"]
    if before != images and not allow_changed_data:
        raise BadInput(
            f"{plan.source.location}: has {images} images, but the run was started with {before}, so their "
            f"order would change; give the same data, start a new run, or continue anyway with {FLAG}"
        )
    if state["step"] > plan.steps:
        raise BadInput(f"{plan.folder}: has done {state['step']} steps, more than the {plan.steps} asked for")


def extended(plan: RunPlan, state: dict[str, Any]) -> str | None:
    """Returns a note on the learning rate where a resumed run has another number of steps than before."""
    done, config = state["step"], plan.config
    before = count_steps(read_config(plan.folder, type(config)).optimizer, state["images"])
    if before == plan.steps or not 0 < done < plan.steps:
        return None
    old = learning_rate(done - 1, before, config.optimizer)
    new = learning_rate(done, plan.steps, config.optimizer)
    return (
        f"the schedule now ends at step {plan.steps} instead of {before}: the learning rate goes from "
        f"{old:.3g} at step {done} to {new:.3g} at step {done + 1}"
    )
