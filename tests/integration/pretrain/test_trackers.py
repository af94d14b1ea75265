"""Trackers and callbacks: real files of TensorBoard, wandb (offline) and MLflow, and what a failure does."""

import errno
import json
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_runs import at, interrupted, rows

from coma.config import RunConfig
from coma.config.serialization import flat, read_config, to_plain
from coma.errors import BadInput
from pretrain.training import pretrain
from pretrain.training.callbacks import Background, Callback


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings or keys of the machine's user, and no slow picture of the curve."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # so that it is unset again
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setattr("pretrain.training.run_directory.loss_curve", lambda *_: None)
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # it keeps the address of its server


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a file of wandb's, which has the format of LevelDB's logs behind a header of 7 bytes."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_runs(run: Path) -> tuple[list[dict[str, Any]], set[str], dict[str, Any]]:
    """All rows that wandb's files hold, the identities of their runs, and the settings of the last one."""
    from wandb.proto import wandb_internal_pb2

    history, identities, config = [], set(), {}
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        for content in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
            if items := record.history.item:
                keys = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                history.append(keys)
            if record.run.run_id:
                identities.add(record.run.run_id)
                for item in record.run.config.update:
                    config[item.key] = json.loads(item.value_json)
    return history, identities, config


@pytest.mark.slow
def test_every_tracker_gets_metrics_settings_and_pictures_and_continues_its_run(settings, capsys):
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = at(settings, settings.run.out, track="tensorboard,wandb,mlflow")
    interrupted(config, 3)
    pretrain(config, resume=True)
    run, told = config.run.out, capsys.readouterr().err
    losses = {row["step"]: pytest.approx(row["loss"]) for row in rows(run)}
    pictures = [int(path.stem.removeprefix("step-")) for path in sorted(run.glob("reconstructions/*.png"))]
    plain = to_plain(read_config(run))

    history, identities, kept = wandb_runs(run)
    assert len(identities) == 1 and len([*run.glob("wandb/offline-run-*")]) == 2
    assert {row["step"]: row["loss"] for row in history if "loss" in row} == losses
    drawn = [row for row in history if "reconstructions._type" in row or "reconstructions" in row]
    assert [row["step"] for row in drawn] == pictures
    assert len([*run.glob("wandb/offline-run-*/files/media/images/*.png")]) == len(pictures)
    assert kept["optimizer"] == json.loads(json.dumps(plain["optimizer"]))
    assert f"wandb: offline (no API key); upload the run with: wandb sync {run}/wandb/offline-run-*" in told

    client = MlflowClient((run / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("coma")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id])
    identity = found.info.run_id
    assert found.info.status == "FINISHED"
    assert {each.step: each.value for each in client.get_metric_history(identity, "loss")} == losses
    assert found.data.params == {name: str(value) for name, value in flat(plain).items()}
    stored = client.list_artifacts(identity, "reconstructions")
    assert len(stored) == len(pictures)
    assert "mlflow server --backend-store-uri" in told

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == losses
    assert [event.step for event in events.Images("reconstructions")] == pictures
    text = events.Tensors("config")[-1].tensor_proto.string_val[0]
    assert b'"track": "tensorboard,wandb,mlflow"' in text
    assert "warning" not in told


def test_without_trackers_nothing_is_written_for_them(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run = pretrain(at(settings, settings.run.out, track="none", reconstruction_every=0))
    assert not {"tensorboard", "wandb", "mlflow", "trackers.json"} & {path.name for path in run.iterdir()}
    assert [row["step"] for row in rows(run)] == [2, 4, 5]


@pytest.mark.parametrize("names", ["tensorbord", "", ",", "wandb;mlflow"])
def test_unknown_trackers_are_refused(names):
    with pytest.raises(BadInput, match="give some of tensorboard, wandb, mlflow, none, separated by commas"):
        RunConfig(track=names)


def test_a_tracker_that_is_not_installed_is_named_before_anything_else(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match=r"the package wandb .*pip install 'coma-dyvit\[track\]'"):
        pretrain(at(settings, settings.run.out, track="wandb"))
    assert not settings.run.out.exists()


class Seen(Callback):
    """Notes all calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        self.calls.append(("start", folder, config["run"]["log_steps"], step))

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        assert all(isinstance(value, float) for value in metrics.values())
        self.calls.append(("metrics", step, metrics["loss"]))

    def on_reconstruction(self, step: int, path: Path) -> None:
        assert path.is_file()
        self.calls.append(("picture", step, path.name))

    def on_end(self, finished: bool) -> None:
        self.calls.append(("end", finished))


def test_callbacks_see_the_run(settings):
    seen, run = Seen(), settings.run.out
    pretrain(settings, callbacks=[seen])
    loss = {row["step"]: row["loss"] for row in rows(run)}
    assert seen.calls == [
        ("start", run, 2, 0),
        ("metrics", 2, loss[2]),
        ("picture", 3, "step-000003.png"),
        ("metrics", 4, loss[4]),
        ("metrics", 5, loss[5]),
        ("picture", 5, "step-000005.png"),
        ("end", True),
    ]


def test_what_a_callback_raises_ends_the_run(settings):
    class Broken(Seen):
        def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
            raise ZeroDivisionError(f"in step {step}")

    broken = Broken()
    with pytest.raises(ZeroDivisionError, match="in step 2"):
        pretrain(settings, callbacks=[broken])
    assert broken.calls[-1] == ("end", False)


@pytest.mark.parametrize("when", ["on_start", "on_metrics", "on_reconstruction", "on_end"])
def test_a_tracker_that_fails_is_one_warning(settings, monkeypatch, capsys, when):
    tracker = Seen()

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tracker, when, no_room)
    monkeypatch.setattr(
        "pretrain.training.run_directory.open_trackers",
        lambda names, say, warn: {"own": Background("own", tracker, warn)},
    )
    run = pretrain(settings)
    assert capsys.readouterr().err.count("warning: own: ") == 1
    assert [row["step"] for row in rows(run)] == [2, 4, 5]
    assert ("end", True) in tracker.calls or when in ("on_start", "on_end")


@pytest.mark.slow
def test_servers_that_do_not_answer_stop_nothing(settings, monkeypatch, capsys):
    """MLflow is given up; wandb records the run on the disk."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = pretrain(at(settings, settings.run.out, track="wandb,mlflow", reconstruction_every=0))
    told = capsys.readouterr().err
    assert told.count("warning: mlflow: ") == told.count("warning: ") == 1 and "training continues" in told
    assert re.search(r"wandb: offline \((?!no API key).+\); upload the run with: ", told)  # wandb's own words
    assert {row["step"] for row in wandb_runs(run)[0]} == {2, 4, 5}


@pytest.mark.slow
def test_a_run_that_was_moved_leaves_nothing_where_it_was(settings, tmp_path, capsys):
    run = pretrain(at(settings, settings.run.out, track="mlflow")).rename(tmp_path / "moved")
    config = at(read_config(run), run)
    pretrain(replace(config, optimizer=replace(config.optimizer, steps=6)), resume=True)
    assert not settings.run.out.exists()
    assert len([*run.glob("mlflow/*/*/artifacts/reconstructions/*.png")]) == 3
    assert "warning" not in capsys.readouterr().err


def test_a_slow_tracker_does_not_hold_the_end_for_ever(settings, monkeypatch, capsys):
    forever = threading.Event()

    class Slow(Callback):
        def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
            forever.wait()

    monkeypatch.setattr("pretrain.training.callbacks._PATIENCE", 0.1)
    monkeypatch.setattr(
        "pretrain.training.run_directory.open_trackers",
        lambda names, say, warn: {"slow": Background("slow", Slow(), warn)},
    )
    pretrain(settings)
    assert "warning: slow: does not finish within 0 seconds" in capsys.readouterr().err
    forever.set()
