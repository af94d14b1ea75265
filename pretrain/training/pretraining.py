"""Pre-training: the objective, batches and run directory of `coma pretrain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from coma.atomic_io import lies_among
from coma.config import PretrainConfig
from coma.data import Batch, training_batches
from coma.objectives import Objective
from coma.objectives.initialization import initial_objective
from coma.objectives.teachers import caveats, training_objective
from pretrain.training.callbacks import Callback
from pretrain.training.checkpoint import has_state
from pretrain.training.console import TrainingConsole
from pretrain.training.distributed import Processes, processes
from pretrain.training.run_directory import PretrainRunDirectory
from pretrain.training.run_plan import PretrainPlan, prepare
from pretrain.training.run_summary import estimate
from pretrain.training.trainer import Trainer


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    allow_changed_data: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train from the beginning, or resume from the last saved state; under torchrun, on all its processes.

    Args:
        config: The run. Resuming takes the directory `config.run.out`, and refuses settings that would
            change what is learned.
        resume: Resume a run that was interrupted.
        allow_changed_data: Resume although the images are not those that the run was started with.
        dry_run: Print what the run is going to do, with its time and memory estimated from three steps; train
            no further, and write nothing.
        callbacks: Called by process 0 with metrics and pictures; see `Callback`.

    Returns:
        The run directory; its layout is described in `pretrain.training.run_directory`.

    Raises:
        BadInput: settings, data or directory that cannot be used.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    with processes(config.run.device) as group, closing(TrainingConsole(quiet=not group.main)) as console:
        plan = prepare(config, group, resume=resume)
        for caveat in caveats(plan.config.objective):
            console.warn(caveat)
        if not resume and (note := lies_among(config.run.out, config.data.images)):
            console.say(note)
        trainer = PretrainTrainer(plan, group, console, callbacks)
        if dry_run:
            measured = trainer.measure(resume=resume, allow_changed_data=allow_changed_data)
            if group.main:
                print("\n".join([*trainer.summary(), *estimate(measured)]))
        else:
            trainer.train(resume=resume, allow_changed_data=allow_changed_data)
        return plan.folder


class PretrainTrainer(Trainer[PretrainPlan]):
    """Trains an encoder and its decoder to fill in what the objective hides; see `Trainer`."""

    def __init__(
        self,
        plan: PretrainPlan,
        group: Processes,
        console: TrainingConsole,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(plan, group, console)
        self._callbacks = callbacks

    def objective(self) -> Objective:
        """See `Trainer`; a run with a saved state no longer needs the weights that it started from."""
        config = self.plan.config
        if config.init.init is None or self.group.share(has_state(self.plan.folder / "state")):
            return training_objective(config)
        with self.group.raise_on_all_ranks():
            objective, report = initial_objective(config)
            self.console.say(report)
        return objective

    def batches(self, start: int) -> Iterator[Batch]:
        """See `Trainer`."""
        config = self.plan.config
        return training_batches(
            self.plan.source,
            replace(config.data, image_size=config.view_size),
            channels=config.model.channels,
            seed=config.run.seed,
            batch=self.plan.slices,
            start=start,
            device=self.group.device,
        )

    def run_directory(self) -> PretrainRunDirectory:
        """See `Trainer`."""
        return PretrainRunDirectory(self.plan, self.console, self._callbacks)
