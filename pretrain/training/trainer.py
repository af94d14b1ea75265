"""The training loop: set up, step, log, save, evaluate, finish; the same for every kind of training.

The loop knows no method, model or file format. A subclass of `Trainer` supplies the objective, the batches
and the run directory. After every step all processes know the same: the loss, whether one of them was asked
to stop, and whether process 0 wants to save.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch

from coma.amp import choose_precision
from coma.data import Batch
from coma.errors import BadInput, CheckFailed, Interrupted, is_out_of_gpu_memory
from coma.locks import lock_run
from coma.memory import guarded
from coma.objectives import Objective
from coma.objectives.classification import Classification
from coma.signals import StopNow, StopRequest
from pretrain.training.console import TrainingConsole
from pretrain.training.distributed import Processes
from pretrain.training.metric_logs import Window
from pretrain.training.nonfinite_replay import stop_run
from pretrain.training.optimizer import learning_rate
from pretrain.training.run_directory import RunDirectory, weights_to_publish
from pretrain.training.run_plan import RunPlan, check_resumable, extended
from pretrain.training.run_settings import resume_command
from pretrain.training.run_summary import Measurement, summary
from pretrain.training.step_memory import check_step_memory
from pretrain.training.throughput import Meter, peak_memory
from pretrain.training.train_step import NotFinite, StepResult, TrainStep

AnyPlan = TypeVar("AnyPlan", bound=RunPlan[Any])

_NAMED_FILLED = 3
"""Images with filled values that are named; `filled` in metrics.jsonl counts all."""
_MEASURED = 3
"""Steps of a dry run."""
_GRACE = 10.0
"""Seconds that one of many processes keeps waiting for images after it was asked to stop."""


class Trainer(ABC, Generic[AnyPlan]):
    """Trains one run, from the beginning or from its last saved state.

    Args:
        plan: The run.
        group: The processes that share it.
        console: Receives progress and warnings.
    """

    def __init__(self, plan: AnyPlan, group: Processes, console: TrainingConsole) -> None:
        self.plan, self.group, self.console = plan, group, console
        self._done, self._loss = 0, 0.0  # optimizer steps so far, loss of the last one
        self._window = Window()
        self._skipped: dict[str, None] = {}  # images that could not be read, in the order they came
        self._filled = 0  # images seen by this process whose missing values were filled
        self._saved_at = time.monotonic()
        self._directory: RunDirectory[Any] | None = None  # on process 0

    @abstractmethod
    def objective(self) -> Objective | Classification:
        """Returns a fresh objective on the CPU; the global generators are seeded before."""

    @abstractmethod
    def batches(self, start: int) -> Iterator[Batch]:
        """Returns the training batches from position `start` of the sample stream."""

    @abstractmethod
    def run_directory(self) -> RunDirectory[Any]:
        """Returns what writes the run directory; called on process 0 only."""

    def train(self, *, resume: bool, allow_changed_data: bool = False) -> None:
        """Runs all steps that are left, then evaluates, saves and draws the loss curve.

        Raises:
            BadInput: settings that the machine cannot serve, a state that cannot be resumed, images that
                have changed where that was not allowed, or another process that trains in the directory.
            CheckFailed: a loss or gradient that is not finite, or results that could not be written.
            Interrupted: Ctrl-C or SIGTERM; everything is saved.
        """
        plan, run = self.plan, self.plan.config.run
        with StopRequest(quiet=not self.group.main) as self._stop, ExitStack() as locked, closing(self):
            self._set_up()
            with self.group.raise_on_all_ranks():
                if self._directory:
                    locked.enter_context(lock_run(plan.config.run.out))
            for line in self.summary():
                self.console.say(line)
            self._begin(resume, allow_changed_data)
            with self.group.raise_on_all_ranks():
                if self._directory:
                    self._directory.open(self._done)
            self.console.start(self._done, plan.steps)
            if plan.evaluates_at(self._done) and self._done < plan.steps:
                self._evaluate_and_save(evaluate=True, save=False)
            with closing(self._interruptible(self.batches(self._position))) as batches:
                while self._done < plan.steps:
                    began, cpu_began = time.perf_counter(), time.process_time()
                    try:
                        result, lr = self._take_step(self._done, batches)
                    except StopNow:
                        self._stop_while_waiting()
                    except NotFinite as problem:
                        stop_run(plan, self._train_step, self.group, self._done + 1, problem)
                    self._done += 1
                    last = self._done == plan.steps
                    self._record(result, time.perf_counter() - began, time.process_time() - cpu_began)
                    if last or self._done % run.log_steps == 0:
                        self._log(lr)
                    stop, time_to_save = result.requests
                    save = stop or time_to_save or bool(run.save_steps and self._done % run.save_steps == 0)
                    evaluate = plan.evaluates_at(self._done) and not stop  # the resumed run evaluates then
                    if (save or evaluate) and not last:
                        self._evaluate_and_save(evaluate=evaluate, save=save)
                    if stop and not last:
                        self._stop_early()
            self._finish()

    def measure(self, *, resume: bool, allow_changed_data: bool = False) -> Measurement | None:
        """Takes the next steps of the run to estimate its time and memory, and forgets them; writes nothing.

        Returns:
            The measurement; None where the run has no step left.

        Raises:
            BadInput, CheckFailed, Interrupted: as `train`.
        """
        plan, seconds, waited = self.plan, [], []
        with StopRequest(quiet=not self.group.main) as self._stop, closing(self):
            self._set_up()
            self._begin(resume, allow_changed_data)
            with closing(self._interruptible(self.batches(self._position))) as batches:
                for number in range(self._done, min(self._done + _MEASURED, plan.steps)):
                    began = time.perf_counter()
                    try:
                        result, _ = self._take_step(number, batches)
                    except StopNow:
                        raise Interrupted("stopped; a dry run writes nothing") from None
                    except NotFinite as problem:
                        raise CheckFailed(
                            f"step {number + 1}: {problem}; a lower --base-lr may help"
                        ) from None
                    seconds.append(time.perf_counter() - began)
                    waited.append(result.waited)
        if not seconds:
            return None
        if len(seconds) > 1:  # the first step starts workers, allocates memory and compiles
            del seconds[0], waited[0]
        return Measurement(
            steps=len(seconds),
            seconds=sum(seconds) / len(seconds),
            waited=sum(waited) / sum(seconds),
            left=plan.steps - self._done,
            memory=peak_memory(self.group.device),
            device=self.group.device,
        )

    def summary(self) -> list[str]:
        """Returns the lines that say what the run is going to do; none on the other processes."""
        return summary(self.plan, self.group, self._train_step.precision) if self.group.main else []

    def _take_step(self, number: int, batches: Iterator[Batch]) -> tuple[StepResult, float]:
        """Takes a step; returns what it computed, and its learning rate."""
        steps = self.plan.steps
        lr = learning_rate(number, steps, self.plan.config.optimizer)
        try:
            with self._guard():
                return self._train_step(number, lr, batches, self._requests, number / steps), lr
        except RuntimeError as error:
            _raise_readable(error, self.plan.slices.micro_batch)

    def _guard(self) -> AbstractContextManager[object]:
        """Returns what stops a step before memory runs out; compiled steps take no hooks."""
        plan = self.plan
        if plan.config.run.compile:
            return nullcontext()
        return guarded(self.group.device, lambda: f"try {_smaller(plan.slices.micro_batch)}")

    def close(self) -> None:
        """Closes the logs."""
        if self._directory:
            self._directory.close()

    @property
    def _position(self) -> int:
        """Samples consumed so far: the position in the sample stream."""
        return self._done * self.plan.slices.global_batch

    def _set_up(self) -> None:
        """Opens the run directory's writer on process 0, and builds the objective and the train step."""
        plan, group = self.plan, self.group
        with group.raise_on_all_ranks():
            precision = choose_precision(plan.config.run.precision, group.device)
            if group.main:
                self._directory = self.run_directory()
                self._directory.at_once = self._stop.at_once
            check_step_memory(plan, precision, group.device)
        torch.manual_seed(plan.config.run.seed)
        self._train_step = TrainStep(
            self.objective().to(group.device),
            plan.config.optimizer,
            plan.config.run,
            group,
            plan.slices,
            precision,
            *plan.statistics,
        )
        self._meter = Meter(plan.config, group, precision, self.console.warn)

    def _begin(self, resume: bool, allow_changed_data: bool) -> None:
        """Loads the last state, if there is one to resume."""
        state: dict[str, Any] | None = None
        new_schedule: str | None = None
        with self.group.raise_on_all_ranks():
            if self._directory:
                self._directory.check_data(resume=resume, allow=allow_changed_data)
            if resume and self._directory:
                state = self._directory.resume()
            if state:
                check_resumable(self.plan, state, allow_changed_data=allow_changed_data)
                new_schedule = extended(self.plan, state)
        facts = self.group.share(state and {k: state[k] for k in ("step", "loss", "window", "skipped")})
        if facts:
            self._filled = state.get("filled", 0) if state else 0
            self._train_step.load_state_dict(state)
            self._done, self._loss = facts["step"], facts["loss"]
            self._window.load_state_dict(facts["window"])
            self._skipped = dict.fromkeys(facts["skipped"])
        if resume:
            self.console.say(
                f"resuming at step {self._done} of {self.plan.steps}"
                if facts
                else "no state was saved before the run ended; starting again from step 0"
            )
        if new_schedule:
            self.console.say(new_schedule)

    def _interruptible(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Yields the batches; a request to stop ends the wait for one, at once or after a grace period.

        A single process stops at once and loses nothing, since the current step has changed nothing yet. One
        of many processes waits `_GRACE` seconds first.
        """
        with closing(cast("Any", batches)):
            while True:
                with self._stop.at_once(grace=_GRACE if self.group.world > 1 else 0.0):
                    batch = next(batches)
                yield batch

    def _requests(self) -> tuple[bool, bool]:
        """Returns whether this process was asked to stop, and whether it wants to save."""
        run = self.plan.config.run
        due = time.monotonic() - self._saved_at > run.save_minutes * 60
        return self._stop.asked, bool(self._directory) and run.save_steps is None and due

    def _record(self, result: StepResult, seconds: float, cpu_seconds: float) -> None:
        """Adds a step to the means of the next log point, and names images that were skipped or filled."""
        self._loss = result.values["loss"]
        self._window.add(result.values)
        self._meter.add(seconds, result.waited, cpu_seconds)
        for failure in result.failures:
            if failure not in self._skipped:
                self._skipped[failure] = None
                self.console.warn(f"skipped {failure}")
        filled = [each for batch in self._train_step.batches for each in batch.filled]
        for each in filled[: max(_NAMED_FILLED - self._filled, 0)]:
            self.console.warn(each)
        self._filled += len(filled)
        self.console.advance(self._done, self._loss, seconds, result.waited)

    def _log(self, lr: float) -> None:
        means = self._window.take()
        row: dict[str, Any] = {
            "step": self._done,
            "epoch": round(self.plan.epochs(self._done), 4),
            "images_seen": self._position,
            "loss": means.pop("loss"),
            "lr": lr,
            "grad_norm": means.pop("grad_norm", None),
            **self._meter.take(),
            "skipped": len(self._skipped),
            **({"filled": self._filled} if self._filled else {}),
            **means,
        }
        if self._directory:
            self._directory.log(row)
            self.console.row(row)

    def _evaluate_and_save(self, *, evaluate: bool, save: bool) -> bool:
        """Evaluates the weights, saves the run, or both; collective, though process 0 does most of the work.

        Returns:
            Whether process 0 finished the evaluation; if not, a resumed run repeats it.
        """
        state = self._train_step.state_dict() if save else {}
        weights = weights_to_publish(state) if save else self._train_step.weights_to_publish()
        evaluated = not (self._directory and evaluate)
        try:
            if self._directory and evaluate:
                with suppress(StopNow):
                    self._directory.evaluate(weights, self._done, self.group.device)
                    evaluated = True
        finally:  # an evaluation that fails ends the run, whose steps are saved first
            if self._directory and save:
                state |= {
                    "step": self._done,
                    "loss": self._loss,
                    "images": len(self.plan.source),
                    "window": self._window.state_dict(),
                    "skipped": list(self._skipped),
                    "filled": self._filled,
                }
                self._directory.save(state)
        if save:
            self._saved_at = time.monotonic()
        return evaluated

    def _finish(self) -> None:
        """Evaluates and saves the last weights, and draws the loss curve."""
        evaluated = self._evaluate_and_save(evaluate=True, save=True)
        with self.group.raise_on_all_ranks():
            if self._directory:
                if not evaluated:
                    raise Interrupted(
                        f"all {self._done} steps are done and saved, but the final evaluation is missing; "
                        f"run it with: {resume_command(self.plan.config)}"
                    )
                self._directory.conclude()
                if missing := self._directory.missing():
                    raise CheckFailed(
                        f"{self.plan.folder}: all {self._done} steps are done, but not everything could be "
                        f"written: {missing}; free some space, then run: {resume_command(self.plan.config)}"
                    )

    def _stop_early(self) -> NoReturn:
        with self.group.raise_on_all_ranks():
            missing = self._directory.missing() if self._directory else ""
            where = f"stopped at step {self._done} of {self.plan.steps}"
            command = resume_command(self.plan.config)
            if not self._done:
                raise Interrupted(f"{where}; nothing was learned yet, start again with: {command}")
            if missing:
                raise CheckFailed(
                    f"{where}, but could not save: {missing}; free some space, then run: {command}"
                )
            raise Interrupted(f"{where}; everything is saved, resume with: {command}")
        raise AssertionError("every process raised")

    def _stop_while_waiting(self) -> NoReturn:
        """Gives up the step that waits for images, saves where one process can, and stops."""
        if self.group.world > 1:  # saving takes all processes, and the others are in the middle of the step
            raise Interrupted(
                f"stopped at step {self._done} of {self.plan.steps} while waiting for images; resume from "
                f"the last saved state with: {resume_command(self.plan.config)}"
            )
        if self._done:
            self._evaluate_and_save(evaluate=False, save=True)
        self._stop_early()


def _smaller(micro_batch: int) -> str:
    """Returns what takes less memory, for messages."""
    smaller = max((m for m in range(1, micro_batch) if micro_batch % m == 0), default=None)
    fewer = f"--micro-batch {smaller}, " if smaller else ""
    return f"{fewer}--grad-checkpointing, a smaller --image-size or a smaller model"


def _raise_readable(error: RuntimeError, micro_batch: int) -> NoReturn:
    """Raises out-of-memory and compiler errors as `BadInput` that says what to do, and others as they are."""
    if is_out_of_gpu_memory(error):
        raise BadInput(
            f"out of GPU memory with {micro_batch} images per pass; try {_smaller(micro_batch)}"
        ) from error
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--compile does not work here ({reason}); leave it out") from error
    raise error
