"""Callbacks of a training run, and the trackers that are callbacks: TensorBoard, Weights & Biases, MLflow.

Only process 0 calls them. What a user's callback raises ends the run; a tracker that fails is a warning.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from coma.atomic_io import LineFile, write_json
from coma.config.serialization import flat
from coma.library_errors import first_line

_PATIENCE = 60.0
"""Seconds that the end of a run waits for a tracker."""
_PROJECT = "coma"
_IDS = "trackers.json"
_WRITING_IDS = threading.Lock()


class Callback:
    """Base of callbacks: every method does nothing until a subclass overrides it."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Called once, before the first step.

        Args:
            folder: The run directory.
            config: The settings, as config.json has them.
            step: Number of steps that are done; more than 0 in a resumed run.
        """

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Called at every log point and after every evaluation, with the numbers of a row of metrics.jsonl.

        Args:
            step: Number of steps that are done.
            metrics: `loss`, `lr`, `images_per_s` and so on, or those of an evaluation (`probe_knn`).
        """

    def on_reconstruction(self, step: int, path: Path) -> None:
        """Called after a picture of reconstructions was written (pre-training only).

        Args:
            step: Number of steps that are done.
            path: The PNG file.
        """

    def on_end(self, finished: bool) -> None:
        """Called once, at the end.

        Args:
            finished: Whether all steps are done; False where the run was stopped or failed.
        """


class TensorBoardLog(Callback):
    """Metrics, settings and pictures for TensorBoard, written in this thread so that a full disk is noticed.

    TensorBoard's own SummaryWriter is not used: when the disk is full (measured), its thread prints a
    traceback, its file ends with a broken record, and it never writes again. Here a refused record waits.
    """

    def __init__(self) -> None:
        self._file: LineFile | None = None

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Opens a file; TensorBoard ignores what earlier files hold from `step` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[attr-defined]

        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = LineFile(folder / "tensorboard" / name)
        self._add_event(file_version="brain.Event:2")
        self._add_event(step=step, session_log=SessionLog(status=SessionLog.SessionStatus.START))
        text = json.dumps(config, indent=2).replace("\n", "\n    ")  # Markdown: a block of code
        tensor = {"dtype": "DT_STRING", "string_val": [f"    {text}".encode()]}
        metadata = {"plugin_data": {"plugin_name": "text"}}
        self._add_values(step, {"tag": "config", "metadata": metadata, "tensor": tensor})

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the metrics."""
        self._add_values(step, *({"tag": tag, "simple_value": value} for tag, value in metrics.items()))

    def on_reconstruction(self, step: int, path: Path) -> None:
        """Appends the picture."""
        with Image.open(path) as image:
            width, height = image.size
        picture = {"height": height, "width": width, "encoded_image_string": path.read_bytes()}
        self._add_values(step, {"tag": "reconstructions", "image": picture})

    def on_end(self, finished: bool) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()

    def _add_values(self, step: int, *values: dict[str, Any]) -> None:
        self._add_event(step=step, summary={"value": values})

    def _add_event(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        if self._file:
            self._file.add(record.getvalue())


class WandbRun(Callback):
    """Metrics, settings and pictures for Weights & Biases, in `wandb/` of the run directory.

    It is online where the server takes the user's API key, and offline without one, or where WANDB_MODE says
    so.

    Args:
        say: Receives the line that says where the data go.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._run: Any = None

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Starts a run, or continues the one that the run directory remembers."""
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "online")
        reason = f"WANDB_MODE is {mode}"
        if mode == "online":
            try:
                mode, reason = ("online", "") if wandb.login(prompt=False) else ("offline", "no API key")
            except wandb.Error as error:  # the server does not answer, or refuses the key
                mode, reason = "offline", first_line(error)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=_remembered(folder, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=folder,
            config=config,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=_PATIENCE),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run may repeat steps
        if mode == "offline":
            runs = folder / "wandb" / "offline-run-*"
            self._say(f"wandb: offline ({reason}); upload the run with: wandb sync {runs}")
        else:
            self._say(f"wandb: {self._run.url or reason}")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics over the step."""
        self._run.log({"step": step, **metrics})

    def on_reconstruction(self, step: int, path: Path) -> None:
        """Logs the picture."""
        import wandb

        self._run.log({"step": step, "reconstructions": wandb.Image(str(path))})

    def on_end(self, finished: bool) -> None:
        """Ends the run; what is not uploaded by then stays in its folder."""
        self._run.finish(exit_code=0 if finished else 1)


class MlflowRun(Callback):
    """Metrics, settings and pictures for MLflow: at MLFLOW_TRACKING_URI, or in the run's own `mlflow/`.

    Args:
        say: Receives the line that says where the data go.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._client: Any = None
        self._run = ""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Starts a run, or continues the one that the run directory remembers for this address."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        address = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow 3 wants to hear
        client = MlflowClient(tracking_uri=address)

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = client.get_experiment_by_name(name)
            if found and address.startswith("file:") and address not in (found.artifact_location or ""):
                client.rename_experiment(found.experiment_id, f"{name} {found.experiment_id}")
                found = None  # the run directory was moved, and pictures would go to where it was
            experiment = found.experiment_id if found else client.create_experiment(name)
            run = client.create_run(experiment, run_name=folder.name).info.run_id
            params = [Param(name, str(value)) for name, value in flat(config).items()]
            for start in range(0, len(params), 100):  # the most that MLflow takes at once
                client.log_batch(run, params=params[start : start + 100])
            return run

        self._run = _remembered(folder, f"mlflow {address}", create)
        self._client = client
        client.update_run(self._run, status="RUNNING")
        client.log_dict(self._run, config, "config.json")
        allow = "MLFLOW_ALLOW_FILE_STORE=true " if address.startswith("file:") else ""
        self._say(f"mlflow: look at the run with: {allow}mlflow server --backend-store-uri {address}")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics over the step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def on_reconstruction(self, step: int, path: Path) -> None:
        """Stores the picture among the run's artifacts."""
        self._client.log_artifact(self._run, str(path), "reconstructions")

    def on_end(self, finished: bool) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


def _remembered(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Returns the identity of a tracker's run from `trackers.json`, which gets a new one if there is none."""
    path = folder / _IDS
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        made = create()
        with _WRITING_IDS:
            known = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, known | {name: made})
        return made
    return known[name]


class Background(Callback):
    """Calls a tracker in a thread of its own: a slow or failing one neither delays nor stops the training.

    Args:
        name: The tracker, for the warning.
        tracker: The tracker; it is closed at its first failure to start.
        warn: Receives one warning at the first failure.
    """

    def __init__(self, name: str, tracker: Callback, warn: Callable[[str], object]) -> None:
        self._name, self._tracker, self._warn = name, tracker, warn
        self._calls: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._failed = False

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Starts the thread, and the tracker in it."""
        self._thread.start()
        self._calls.put((self._tracker.on_start, folder, config, step))

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the metrics to the thread."""
        self._calls.put((self._tracker.on_metrics, step, metrics))

    def on_reconstruction(self, step: int, path: Path) -> None:
        """Hands the picture to the thread."""
        self._calls.put((self._tracker.on_reconstruction, step, path))

    def on_end(self, finished: bool) -> None:
        """Ends the tracker, and waits for that, but not for ever."""
        if not self._thread.ident:
            return
        self._calls.put((self._tracker.on_end, finished))
        self._calls.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._warn(f"{self._name}: does not finish within {_PATIENCE:.0f} seconds; some may be missing")

    def _work(self) -> None:
        while call := self._calls.get():
            function, *arguments = call
            try:
                function(*arguments)
            except Exception as error:
                if not self._failed:
                    self._failed = True
                    reason = first_line(error)
                    self._warn(f"{self._name}: {reason}; training continues, metrics.jsonl has all metrics")
                if function == self._tracker.on_start:
                    return


def open_trackers(
    names: Sequence[str], say: Callable[[str], object], warn: Callable[[str], object]
) -> dict[str, Callback]:
    """Returns the trackers of a run by their names; see `RunConfig.track`."""
    trackers: dict[str, Callback] = {}
    for name in names:
        if name == "tensorboard":
            trackers[name] = TensorBoardLog()
        else:
            kind = {"wandb": WandbRun, "mlflow": MlflowRun}[name]
            trackers[name] = Background(name, kind(say), warn)
    return trackers
