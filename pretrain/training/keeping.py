"""The run directory: what is kept of a run, and what happens when the disk is full.

    config.json           settings; `--from` starts a new run with them, `--resume` goes on
    metrics.jsonl         one JSON object per log point
    tensorboard/          the same
    reconstructions/      step-00000500.png ...
    state/                the resumable state (see `state`)
    artifact/             encoder and decoder, usable from the first save on
    loss_curve.png        at the end
    nonfinite/            only after a loss that was not a number

Failing to write is no reason to lose a run: it is said, with the step of the last good state, and training
goes on. Only at the end does it count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.artifact import ArtifactConfig, library_versions, save_artifact
from pretrain.data import Batch, normalize
from pretrain.errors import ComaError
from pretrain.models import build_encoder
from pretrain.objectives import build_objective
from pretrain.pictures import loss_curve, reconstruction_sheet
from pretrain.training.metrics import MetricsLog, TensorBoardLog
from pretrain.training.report import Report
from pretrain.training.setup import Plan, write_config
from pretrain.training.state import read_state, write_state


class Keeper:
    """Writes the run directory; exists on process 0 only.

    Args:
        plan: The run.
        report: Told what could not be written.
        probe: Images whose reconstructions are drawn, always the same.
    """

    def __init__(self, plan: Plan, report: Report, probe: Batch) -> None:
        self.failed: dict[str, str] = {}
        self._plan, self._report, self._probe = plan, report, probe
        self._good: int | None = None
        self._metrics: MetricsLog | None = None
        self._tensorboard: TensorBoardLog | None = None

    def resume(self) -> dict[str, Any] | None:
        """The state to go on from, if there is one."""
        state = read_state(self._plan.folder / "state", self._report.warn)
        self._good = state["step"] if state else None
        return state

    def open(self, step: int) -> None:
        """Write the settings and begin the logs, `step` steps being done.

        Raises:
            BadInput: the directory cannot be written.
        """
        write_config(self._plan.config)
        self._metrics = MetricsLog(self._plan.folder / "metrics.jsonl", step)
        self._tensorboard = TensorBoardLog(self._plan.folder / "tensorboard", step)

    def log(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        if self._metrics and self._tensorboard:
            with self._or_say("metrics", row["step"]):
                self._metrics.add(row)
            with self._or_say("tensorboard", row["step"]):
                self._tensorboard.add(row)

    def save(self, state: dict[str, Any], published: dict[str, Tensor], trained: dict[str, Any]) -> None:
        """Write the resumable state and the artifact."""
        step = state["step"]
        with self._or_say("metrics", step):
            if self._metrics:
                self._metrics.sync()
        with self._or_say("state", step):
            write_state(self._plan.folder / "state", state, keep=self._good)
            self._good = step
        with self._or_say("artifact", step):
            save_artifact(self._plan.folder / "artifact", tensors=published, config=self._describe(trained))

    def draw(self, published: dict[str, Tensor], step: int, device: torch.device) -> None:
        """Draw reconstructions of the probe images by the weights that are published."""
        data = self._plan.config.data
        mean, std = data.mean or (), data.std or ()
        path = self._plan.folder / "reconstructions" / f"step-{step:08d}.png"
        with self._or_say("reconstructions", step, Exception):
            with torch.device("meta"):
                encoder = build_encoder(self._plan.config.model)
                objective = build_objective(self._plan.config.objective, encoder)
            objective.load_state_dict(published, assign=True)
            objective.to(device)
            images = normalize(self._probe.images.to(device), mean, std)
            seeds = self._probe.seeds.to(device)
            reconstruction_sheet(objective, images, seeds, mean, std, path, caption=f"Step {step}")

    def close(self, *, finished: bool) -> None:
        """Draw the loss curve if the run is over, and close the logs."""
        if finished and self._metrics:
            with self._or_say("loss_curve.png", self._plan.steps, Exception):
                loss_curve(self._plan.folder / "metrics.jsonl", self._plan.folder / "loss_curve.png")
        for log in (self._metrics, self._tensorboard):
            if log:
                log.close()

    def _describe(self, trained: dict[str, Any]) -> ArtifactConfig:
        config = self._plan.config
        return ArtifactConfig(
            kind="pretrained",
            model=config.model,
            objective=config.objective,
            image_size=config.data.image_size,
            mean=config.data.mean or (),
            std=config.data.std or (),
            class_names=None,
            trained=trained,
            versions=library_versions(),
        )

    @contextmanager
    def _or_say(
        self, what: str, step: int, errors: type[Exception] | tuple[type[Exception], ...] = (OSError, ComaError)
    ) -> Iterator[None]:
        """Note and report a failure to write `what`, once until it works again."""
        try:
            yield
        except errors as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if what not in self.failed or what == "state":
                last = "no state was saved yet" if self._good is None else f"the last good state is step {self._good}"
                self._report.warn(f"step {step}: could not write {what} ({reason}); {last}; training goes on")
            self.failed[what] = reason
        else:
            self.failed.pop(what, None)
