"""The training loop, one for all objectives: learn, log, look, save; stop when asked to.

Nothing in the loop knows a method, a model or a file format: a `Task` does. After every step all processes
know the same: the loss, whether one of them was asked to stop, and whether process 0 finds it time to save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from coma.amp import choose_precision
from coma.atomic_io import lies_among
from coma.config import PretrainConfig
from coma.data import Batch, training_batches
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.objectives import Objective
from coma.objectives.classification import Classification
from coma.objectives.teachers import caveats, training_objective
from coma.signals import StopNow, StopRequest
from pretrain.training.console import Report
from pretrain.training.distributed import Processes, processes
from pretrain.training.metric_logs import Window
from pretrain.training.nonfinite_replay import stop_run
from pretrain.training.optimizer import learning_rate
from pretrain.training.run_directory import PretrainRunDirectory, RunDirectory, published
from pretrain.training.run_plan import Plan, PretrainPlan, check_resumable, extended, prepare, resume_command
from pretrain.training.throughput import Meter
from pretrain.training.train_step import Learner, NotFinite, Step

_NAMED_FILLED = 3
"""Images with filled values that are named; `filled` in metrics.jsonl counts all."""
_GRACE = 10.0
"""Seconds that one of many processes goes on waiting for images after it was asked to stop."""


@dataclass(frozen=True)
class Task:
    """What is learned, and from what."""

    build: Callable[[], Objective | Classification]
    """A fresh objective on the CPU; the global generators are seeded before."""
    batches: Callable[[int, torch.device], Iterator[Batch]]
    """Training samples from a position in the stream on, for a device."""
    keep: Callable[[Report], RunDirectory]
    """What writes the run directory; called on process 0."""


def pretrain(config: PretrainConfig, *, resume: bool = False, allow_changed_data: bool = False) -> Path:
    """Train from beginning to end, or from the last saved state on; under torchrun, on all its processes.

    Args:
        config: The run. Resuming takes the directory `config.run.out`, and refuses settings that would
            change what is learned.
        resume: Go on with a run that was interrupted.
        allow_changed_data: Go on although the images are not those that the run was started with.

    Returns:
        The run directory; its layout is described in `pretrain.training.run_directory`.

    Raises:
        BadInput: settings, data or directory that cannot be used.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    with processes(config.run.device) as group, closing(Report(quiet=not group.main)) as report:
        plan = prepare(config, group, resume=resume)
        for remark in caveats(plan.config.objective):
            report.warn(remark)
        if not resume and (note := lies_among(config.run.out, config.data.images)):
            report.say(note)
        task = _pretraining(plan)
        train(plan, task, group, report, resume=resume, allow_changed_data=allow_changed_data)
        return plan.folder


def _pretraining(plan: PretrainPlan) -> Task:
    config = plan.config

    def batches(start: int, device: torch.device) -> Iterator[Batch]:
        return training_batches(
            plan.source,
            replace(config.data, image_size=config.view_size),
            channels=config.model.channels,
            seed=config.run.seed,
            batch=plan.slices,
            start=start,
            device=device,
        )

    return Task(
        build=lambda: training_objective(config),
        batches=batches,
        keep=lambda report: PretrainRunDirectory(plan, report),
    )


def train(
    plan: Plan,
    task: Task,
    group: Processes,
    report: Report,
    *,
    resume: bool,
    allow_changed_data: bool = False,
) -> None:
    """Learn `task` as `plan` says, from the beginning or from the last saved state on.

    Raises:
        BadInput: settings that the machine cannot serve, a state that cannot be resumed, or images that have
            changed where that was not allowed.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    with (
        StopRequest(quiet=not group.main) as stop,
        closing(_Run(plan, task, group, report, stop)) as run,
    ):
        run.begin(resume, allow_changed_data)
        run.go()


class _Run:
    def __init__(self, plan: Plan, task: Task, group: Processes, report: Report, stop: StopRequest) -> None:
        config = plan.config
        self._plan, self._group, self._report, self._stop = plan, group, report, stop
        self._batches = task.batches
        self._done, self._loss = 0, 0.0
        self._window = Window()
        self._skipped: dict[str, None] = {}
        self._filled = 0  # images seen by this process whose missing values were filled
        self._saved_at = time.monotonic()
        self._keeper: RunDirectory | None = None
        with group.raise_on_all_ranks():
            precision = choose_precision(config.run.precision, group.device)
            if group.main:
                self._keeper = task.keep(report)
                self._keeper.at_once = stop.at_once
        torch.manual_seed(config.run.seed)
        objective = task.build().to(group.device)
        self._learner = Learner(
            objective,
            config.optimizer,
            config.run,
            group,
            plan.slices,
            precision,
            *plan.statistics,
        )
        self._meter = Meter(config, group, precision, report.warn)

    def close(self) -> None:
        """Close the logs."""
        if self._keeper:
            self._keeper.close()

    def begin(self, resume: bool, allow_changed_data: bool) -> None:
        """Load the last state, if there is one to go on from, and open the run directory."""
        state: dict[str, Any] | None = None
        longer: str | None = None
        with self._group.raise_on_all_ranks():
            if self._keeper:
                self._keeper.check_data(resume=resume, allow=allow_changed_data)
            if resume and self._keeper:
                state = self._keeper.resume()
            if state:
                check_resumable(self._plan, state, allow_changed_data=allow_changed_data)
                longer = extended(self._plan, state)
        facts = self._group.share(state and {k: state[k] for k in ("step", "loss", "window", "skipped")})
        if facts:
            self._filled = state.get("filled", 0) if state else 0
            self._learner.load_state_dict(state)
            self._done, self._loss = facts["step"], facts["loss"]
            self._window.load_state_dict(facts["window"])
            self._skipped = dict.fromkeys(facts["skipped"])
        with self._group.raise_on_all_ranks():
            if self._keeper:
                self._keeper.open(self._done)
        if resume:
            self._report.say(
                f"resuming at step {self._done} of {self._plan.steps}"
                if facts
                else "no state was saved before the run ended; starting again from step 0"
            )
        if longer:
            self._report.say(longer)

    def go(self) -> None:
        """Train until the end, or until asked to stop."""
        batches = self._left_at_once(
            self._batches(self._done * self._plan.slices.global_batch, self._group.device)
        )
        self._report.start(self._done, self._plan.steps)
        if self._plan.looks_at(self._done) and self._done < self._plan.steps:
            self._keep(save=False, look=True)
        with closing(batches):
            while self._done < self._plan.steps:
                asked_to_stop = self._one_step(batches)
                if asked_to_stop and self._done < self._plan.steps:
                    self._leave_early()
        self._finish()

    def _left_at_once(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Yields the batches; a wait for one ends when someone asks to stop, of many processes if it is long.

        A single process loses nothing: the step at hand has changed nothing yet.
        """
        with closing(cast("Any", batches)):
            while True:
                with self._stop.at_once(grace=_GRACE if self._group.world > 1 else 0.0):
                    batch = next(batches)
                yield batch

    def _one_step(self, batches: Iterator[Batch]) -> bool:
        run, began, computed = self._plan.config.run, time.perf_counter(), time.process_time()
        lr = learning_rate(self._done, self._plan.steps, self._plan.config.optimizer)
        try:
            step = self._learner.step(self._done, lr, batches, self._requests, self._done / self._plan.steps)
        except StopNow:
            return self._stop_waiting()
        except NotFinite as problem:
            stop_run(self._plan, self._learner, self._group, self._done + 1, problem)
        except torch.OutOfMemoryError as error:
            raise _too_big(self._plan.slices.micro_batch) from error
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).partition("\n")[0]
            raise BadInput(f"--compile does not work here ({reason}); leave it out") from error
        self._done += 1
        self._take_in(step, time.perf_counter() - began, time.process_time() - computed)
        stop, time_to_save = step.requests
        last = self._done == self._plan.steps
        if last or self._done % run.log_steps == 0:
            self._log(lr)
        save = stop or time_to_save or (run.save_steps and self._done % run.save_steps == 0)
        look = (
            self._plan.looks_at(self._done) and not stop
        )  # who asks to stop may not wait: `go` makes up for it
        if (save or look) and not last:
            self._keep(save=bool(save), look=look)
        return stop

    def _take_in(self, step: Step, seconds: float, computed: float) -> None:
        self._loss = step.values["loss"]
        self._window.add(step.values)
        self._meter.add(seconds, step.waited, computed)
        for failure in step.failures:
            if failure not in self._skipped:
                self._skipped[failure] = None
                self._report.warn(f"skipped {failure}")
        filled = [each for batch in self._learner.batches for each in batch.filled]
        for each in filled[: max(_NAMED_FILLED - self._filled, 0)]:
            self._report.warn(each)
        self._filled += len(filled)
        self._report.advance(self._done, self._loss, seconds, step.waited)

    def _log(self, lr: float) -> None:
        plan, means = self._plan, self._window.take()
        row: dict[str, Any] = {
            "step": self._done,
            "epoch": round(plan.epochs(self._done), 4),
            "images_seen": self._done * plan.slices.global_batch,
            "loss": means.pop("loss"),
            "lr": lr,
            "grad_norm": means.pop("grad_norm", None),
            **self._meter.take(),
            "skipped": len(self._skipped),
            **({"filled": self._filled} if self._filled else {}),
            **means,
        }
        if self._keeper:
            self._keeper.log(row)
            self._report.row(row)

    def _keep(self, *, save: bool, look: bool) -> bool:
        """Look at what was learned, save it, or both; collective, though only process 0 has much to do.

        Returns:
            Whether process 0 has looked to the end; a resumed run makes up for it.
        """
        state = self._learner.state_dict() if save else {}
        weights = published(state) if save else self._learner.published()
        looked = not (self._keeper and look)
        if self._keeper and look:
            with suppress(StopNow):
                self._keeper.look(weights, self._done, self._group.device)
                looked = True
        if self._keeper and save:
            state |= {
                "step": self._done,
                "loss": self._loss,
                "images": len(self._plan.source),
                "window": self._window.state_dict(),
                "skipped": list(self._skipped),
                "filled": self._filled,
            }
            self._keeper.save(state)
        if save:
            self._saved_at = time.monotonic()
        return looked

    def _finish(self) -> None:
        looked = self._keep(save=True, look=True)
        with self._group.raise_on_all_ranks():
            if self._keeper:
                if not looked:
                    raise Interrupted(
                        f"all {self._done} steps are done and saved, but what was learned is not measured; "
                        f"do that with: {resume_command(self._plan.config)}"
                    )
                self._keeper.conclude()
                missing = self._keeper.missing()
                if missing:
                    raise CheckFailed(
                        f"{self._plan.folder}: all {self._done} steps are done, but not everything could be "
                        f"written: {missing}; make room, then run: {resume_command(self._plan.config)}"
                    )

    def _leave_early(self) -> None:
        with self._group.raise_on_all_ranks():
            missing = self._keeper.missing() if self._keeper else ""
            where = f"stopped at step {self._done} of {self._plan.steps}"
            command = resume_command(self._plan.config)
            if not self._done:
                raise Interrupted(f"{where}; nothing was learned yet, start again with: {command}")
            if missing:
                raise CheckFailed(f"{where}, but could not save: {missing}; make room, then run: {command}")
            raise Interrupted(f"{where}; everything is saved, go on with: {command}")

    def _stop_waiting(self) -> bool:
        """Give the step up that waits for images."""
        if self._group.world > 1:  # saving takes all of them, and the others are in the midst of the step
            raise Interrupted(
                f"stopped at step {self._done} of {self._plan.steps} while waiting for images; go on from "
                f"the state that was saved last with: {resume_command(self._plan.config)}"
            )
        if self._done:
            self._keep(save=True, look=False)
        return True

    def _requests(self) -> tuple[bool, bool]:
        """Whether this process was asked to stop, and whether it finds it time to save."""
        run = self._plan.config.run
        due = time.monotonic() - self._saved_at > run.save_minutes * 60
        return self._stop.asked, bool(self._keeper) and run.save_steps is None and due


def _too_big(micro_batch: int) -> BadInput:
    smaller = max((m for m in range(1, micro_batch) if micro_batch % m == 0), default=None)
    fewer = f"--micro-batch {smaller}, " if smaller else ""
    return BadInput(
        f"out of GPU memory with {micro_batch} images per pass; try {fewer}--grad-checkpointing, a smaller "
        "--image-size or a smaller model"
    )
