"""The run directory: the files of a run, and what happens when the disk is full.

    config.json           settings; `--from` starts a new run with them, `--resume` continues the run
    data.json.gz          names and sizes of the images, which a resumed run checks
    metrics.jsonl         one JSON object per log point (and per probe; fine-tuning: per validation,
                          val_*, and one row of the test at the end, test_*)
    tensorboard/          the same, settings and pictures; wandb/ and mlflow/ likewise (`--track`)
    trackers.json         which runs of wandb and MLflow a resumed run continues
    reconstructions/      step-00000500.png ... (pre-training)
    state/                the resumable state (see `checkpoint`)
    artifact/             pre-training: encoder and decoder, usable from the first save on; fine-tuning: the
                          best classifier so far, from the first validation on
    loss_curve.png        at the end
    nonfinite/            only after a loss that was not finite
    .lock                 locked by the process that trains, which removes it at the end

A file that cannot be written does not end a run: a warning names the step of the last good state, and
training continues. Only at the end is it an error.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, Generic, Literal

import torch
from torch import Tensor

from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.config import EncoderConfig, ObjectiveConfig, PretrainConfig
from coma.config.serialization import to_plain
from coma.data import Batch, Source, evaluation_batches, normalize
from coma.data.listing import (
    Listing,
    changes,
    check_listing,
    list_data,
    read_listing,
    write_listing,
)
from coma.errors import ComaError
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.initialization import origin_of
from coma.objectives.teachers import caveats
from pretrain.evaluate import Probe, open_probe
from pretrain.training.callbacks import Callback, open_trackers
from pretrain.training.checkpoint import read_state, write_state
from pretrain.training.console import TrainingConsole
from pretrain.training.metric_logs import MetricsLog, drop_lines
from pretrain.training.run_plan import PretrainPlan, RunPlan
from pretrain.training.run_settings import Settings, write_config
from pretrain.visualize.curves import loss_curve
from pretrain.visualize.reconstructions import reconstruction_sheet

_PROBES = 8
"""Images on a sheet of reconstructions."""
_PREFIX = "encoder."
"""Prefix of the encoder's tensors among the objective's."""


class RunDirectory(ABC, Generic[Settings]):
    """Writes the run directory, on process 0 only.

    A subclass for each kind of run evaluates the weights (`evaluate`) and describes the artifact
    (`artifact_payload`).

    Args:
        plan: The run.
        console: Receives warnings about files that could not be written.
        callbacks: The user's callbacks, called after the trackers.
    """

    def __init__(
        self, plan: RunPlan[Settings], console: TrainingConsole, callbacks: Sequence[Callback] = ()
    ) -> None:
        self._failed: dict[str, str] = {}
        self._plan, self._console = plan, console
        self._good: int | None = None
        self._listing: Listing = {}
        self.may_change = self.changed = False
        """Whether a resumed run may continue with changed images, and whether it does."""
        self._evaluated = -1  # step of the last evaluation that the state knows of
        self.at_once: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context of work that a request to stop interrupts."""
        self._metrics: MetricsLog | None = None
        self._trackers = open_trackers(plan.config.run.trackers, console.say, console.warn)
        self._callbacks = callbacks
        self._opened = self._finished = False

    def check_data(self, *, resume: bool, allow: bool) -> None:
        """Lists the images of a new run, or compares those of a resumed run with the first ones.

        Raises:
            BadInput: the images have changed, and that is not allowed.
        """
        self._listing, self.may_change = self._plan.list_data(), allow
        if resume:
            self.changed = check_listing(self._plan.folder, self._listing, self._console.warn, allow=allow)

    def resume(self) -> dict[str, Any] | None:
        """Returns the state to resume from, if there is one."""
        state = read_state(self._plan.folder / "state", self._console.warn)
        self._good = state["step"] if state else None
        return state

    def open(self, step: int) -> None:
        """Writes the settings and opens the logs at `step`.

        Rows that a killed run wrote after its last state are removed, including an evaluation at that same
        step that was not saved; the resumed run repeats it.

        Raises:
            OSError: the directory cannot be written.
        """

        def known(row: dict[str, Any]) -> bool:
            return row["step"] < step or (row["step"] == step and ("loss" in row or self._evaluated == step))

        write_config(self._plan.config)
        if read_listing(self._plan.folder) != self._listing:
            write_listing(self._plan.folder, self._listing)
        path = self._plan.folder / "metrics.jsonl"
        kept = drop_lines(path, known)
        self._metrics = MetricsLog(path)
        config = to_plain(self._plan.config)
        self._opened = True
        self._notify(step, lambda each: each.on_start(self._plan.folder, config, step))
        for row in kept:
            if row["step"] == step and "tensorboard" in self._trackers:  # which forgets what is at this step
                self._trackers["tensorboard"].on_metrics(step, _numbers(row))

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics."""
        if self._metrics:
            with self._or_say("metrics", row["step"]):
                self._metrics.add_row(row)
        self._notify(row["step"], lambda each: each.on_metrics(row["step"], _numbers(row)))

    def _notify(self, step: int, call: Callable[[Callback], None]) -> None:
        """Calls the trackers, whose failures are warnings, and the user's callbacks."""
        for name, tracker in self._trackers.items():
            with self._or_say(name, step, Exception):
                call(tracker)
        for callback in self._callbacks:
            call(callback)

    @abstractmethod
    def evaluate(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Evaluates these weights before they are saved; a resumed run may repeat it."""

    @abstractmethod
    def artifact_payload(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], ArtifactConfig] | None:
        """Returns tensors and description of the artifact; None where there is nothing new to write."""

    def save(self, state: dict[str, Any]) -> None:
        """Writes the resumable state and the artifact."""
        step = state["step"]
        with self._or_say("metrics", step):
            if self._metrics:
                self._metrics.sync()
        with self._or_say("state", step):
            write_state(self._plan.folder / "state", state, keep=self._good)
            self._good = step
        with self._or_say("artifact", step):
            handed = self.artifact_payload(state)
            if handed:
                tensors, description = handed
                save_artifact(self._plan.folder / "artifact", tensors=tensors, config=description)

    def conclude(self) -> None:
        """Draws the loss curve of a finished run."""
        self._finished = True
        path = self._plan.folder / "loss_curve.png"
        with self._or_say(path.name, self._plan.steps, Exception):
            loss_curve(self._plan.folder / "metrics.jsonl", path)

    def missing(self) -> str:
        """Returns which results could not be written at the last attempt, and why; pictures do not count."""
        results = ("state", "artifact", "metrics")
        return ", ".join(f"{what} ({self._failed[what]})" for what in results if what in self._failed)

    def close(self) -> None:
        """Closes the logs, and ends the trackers and callbacks."""
        if self._metrics:
            self._metrics.close()
        if self._opened:
            self._opened = False
            self._notify(self._plan.steps, lambda each: each.on_end(self._finished))

    @contextmanager
    def _or_say(
        self,
        what: str,
        step: int,
        errors: type[Exception] | tuple[type[Exception], ...] = (OSError, ComaError),
    ) -> Iterator[None]:
        """Records a failure to write `what`, and warns once until it works again."""
        try:
            yield
        except errors as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if what not in self._failed or what == "state":
                last = (
                    "no state was saved yet"
                    if self._good is None
                    else f"the last good state is step {self._good}"
                )
                self._console.warn(
                    f"step {step}: could not write {what} ({reason}); {last}; training continues"
                )
            self._failed[what] = reason
        else:
            self._failed.pop(what, None)


class PretrainRunDirectory(RunDirectory[PretrainConfig]):
    """Draws reconstructions, probes features, and writes encoder and decoder as the artifact.

    Args:
        plan: The run.
        console: Receives warnings about files that could not be written.
        callbacks: The user's callbacks.

    Raises:
        BadInput: no image, or no labelled image of the probe, can be read with the model's channels; or the
            probe's images are unlabelled or too few.
    """

    def __init__(
        self, plan: PretrainPlan, console: TrainingConsole, callbacks: Sequence[Callback] = ()
    ) -> None:
        super().__init__(plan, console, callbacks)
        self._pretraining = plan
        self._first = first_images(plan.source, plan.config.model, plan.config.view_size)
        self._probe = open_probe(plan.config.probe)
        for source in (self._probe.train, self._probe.test) if self._probe else ():
            first_images(source, plan.config.model, plan.config.data.image_size)
        if self._probe:
            console.say(str(self._probe))

    def resume(self) -> dict[str, Any] | None:
        """Returns the state to resume from, if there is one."""
        state = super().resume()
        self._evaluated = state.get("probed", -1) if state else -1
        return state

    def check_data(self, *, resume: bool, allow: bool) -> None:
        """See `RunDirectory`; changed images of the probe only cause a warning."""
        super().check_data(resume=resume, allow=allow)
        if self._probe is None:
            return
        of_probe = {"probe's training images": self._probe.train, "probe's test images": self._probe.test}
        now = list_data(of_probe)
        for change in changes(read_listing(self._plan.folder) or {}, now) if resume else ():
            self._console.warn(f"{change}; their scores before and after cannot be compared")
        self._listing |= now

    def save(self, state: dict[str, Any]) -> None:
        """Writes the resumable state and the artifact."""
        super().save(state | {"probed": self._evaluated} if self._probe else state)

    def evaluate(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Draws reconstructions, runs the probe, or both, as is due."""
        last = step == self._plan.steps
        if last or self._pretraining.draws_reconstructions_at(step):
            self._draw(weights, step, device)
        if self._probe and (last or self._pretraining.probes_at(step)) and self._evaluated != step:
            self._measure(self._probe, weights, step, device)

    def _measure(self, probe: Probe, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Logs the probe's scores of these weights; a probe that fails does not end the run."""
        config = self._plan.config
        with torch.device("meta"):
            encoder = build_encoder(config.model)
        own = {name.removeprefix(_PREFIX): t for name, t in weights.items() if name.startswith(_PREFIX)}
        encoder.load_state_dict(own, assign=True)
        began = time.perf_counter()
        try:
            with self.at_once():
                values = probe.measure(
                    encoder.to(device), self._about("backbone", {}), workers=config.data.workers
                )
        except (ComaError, OSError, RuntimeError) as error:  # memory, an SVD that does not converge
            reason = str(error).partition("\n")[0]
            self._console.warn(f"step {step}: the probe failed ({reason}); training continues")
            return
        self._evaluated = step
        row = {f"probe_{name}": value for name, value in values.items()}
        row["probe_seconds"] = round(time.perf_counter() - began, 3)
        self.log({"step": step, "images_seen": step * config.optimizer.batch_size, **row})
        self._console.probed(step, values)

    def _draw(self, weights: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Draws reconstructions of the first images, always with the same masks."""
        mean, std = self._plan.statistics
        path = self._plan.folder / "reconstructions" / f"step-{step:06d}.png"
        with self._or_say("reconstructions", step, Exception):
            with torch.device("meta"):
                encoder = build_encoder(self._plan.config.model)
                objective = build_objective(self._plan.config.objective, encoder)
            objective.load_state_dict(encoder_and_decoder(weights), assign=True)
            objective.to(device)
            images = normalize(self._first.images.to(device), mean, std)
            seeds = self._first.seeds.to(device)
            reconstruction_sheet(objective, images, seeds, mean, std, path, caption=f"Step {step}")
        if path.is_file():
            self._notify(step, lambda each: each.on_reconstruction(step, path))

    def artifact_payload(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], ArtifactConfig]:
        """Returns the current weights, or their moving average."""
        config, source = self._plan.config, self._plan.source
        trained = {
            "method": to_plain(config.objective, ObjectiveConfig)["method"],
            "steps": state["step"],
            "steps_planned": self._plan.steps,
            "images_seen": state["step"] * config.optimizer.batch_size,
            "loss": state["loss"],
            "data": source.location.name,
            "images": len(source),
            "ema": config.optimizer.ema_decay,
        }
        notes = caveats(config.objective)
        trained |= {"remarks": list(notes)} if notes else {}
        return encoder_and_decoder(weights_to_publish(state)), self._about("pretrained", trained)

    def _about(self, kind: Literal["backbone", "pretrained"], trained: dict[str, Any]) -> ArtifactConfig:
        config, (mean, std) = self._plan.config, self._plan.statistics
        return ArtifactConfig(
            kind=kind,
            model=config.model,
            objective=config.objective,
            image_size=config.data.image_size,
            mean=mean,
            std=std,
            class_names=None,
            trained=trained,
            versions=library_versions(),
            init=origin_of(config),
        )


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row of metrics, except its step."""
    return {name: float(value) for name, value in row.items() if name != "step" and value is not None}


def weights_to_publish(state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights of a state that the artifact holds: their moving average where there is one."""
    return state["model"] if state["ema"] is None else state["ema"]


def encoder_and_decoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights that an artifact holds, without those that only training needs."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "decoder."))}


def first_images(source: Source, model: EncoderConfig, image_size: ImageSize) -> Batch:
    """Returns the first images of a source that can be read.

    Raises:
        BadInput: there is none, or none has the channels that the model takes.
    """
    batches = evaluation_batches(
        source, image_size=image_size, channels=model.channels, batch_size=_PROBES, workers=0
    )
    with closing(batches):
        return next(batches)
