"""The settings of a run in its directory: checked before it starts or resumes there, and written."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from typing import TypeVar

from coma.atomic_io import write_json
from coma.config import FinetuneConfig, ObjectiveConfig, PretrainConfig, ProbeConfig
from coma.config.serialization import flat, read_config, to_plain
from coma.errors import BadInput
from coma.library_errors import load_packages
from coma.locks import RUN_LOCK, lock_run
from coma.objectives.teachers import may_have_moved
from coma.paths import artifact_directory
from coma.preflight import require_folder

_MAY_CHANGE = {
    *("data.images", "data.workers", "data.loader", "data.on_bad_image", "test", "val"),
    "objective.teacher.weights",
    "init.download",
    *("optimizer.epochs", "optimizer.steps", "optimizer.micro_batch"),
    *("run.out", "run.device", "run.precision", "run.compile", "run.grad_checkpointing", "run.parallel"),
    *("run.save_minutes", "run.save_steps", "run.log_steps", "run.reconstruction_every", "run.track"),
    *(f"probe.{field.name}" for field in fields(ProbeConfig)),
}
"""Settings that a resumed run may change: locations, use of the machine, and length of the run."""

Settings = TypeVar("Settings", bound=PretrainConfig | FinetuneConfig)


def resume_command(config: PretrainConfig | FinetuneConfig) -> str:
    """Returns the command that resumes a run."""
    command = "pretrain" if isinstance(config, PretrainConfig) else "classify train"
    return f"coma {command} --resume {shlex.quote(str(config.run.out))}"


def check_folder(config: Settings, resume: bool) -> Settings:
    """Returns the settings to start or resume with, if the directory is fit for that.

    Raises:
        BadInput: the directory of a new run is not empty; that of an old one holds no run, or one with other
            settings; another process is training there; or a tracker is not installed.
    """
    load_packages(*config.run.trackers)
    return _resumed(config) if resume else _fresh(config)


def _check_lock(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuses a directory that another process is training in, before the images are opened."""
    if (config.run.out / RUN_LOCK).is_file():
        with lock_run(config.run.out):
            pass


def _fresh(config: Settings) -> Settings:
    out = config.run.out
    require_folder(out)
    if out.is_dir() and any(path.name != RUN_LOCK for path in out.iterdir()):
        if (out / "config.json").is_file():
            _check_lock(config)
            way_out = f"continue its run with `{resume_command(config)}`, or choose another --out"
        else:
            way_out = "choose another --out, or remove what is in it (it holds no run)"
        raise BadInput(f"--out {out}: is not empty; {way_out}")
    return config


def _resumed(config: Settings) -> Settings:
    """Returns the settings to resume with: the new ones where they do not change what is learned."""
    saved = read_config(config.run.out, type(config))
    require_folder(config.run.out, "--resume")
    _check_lock(config)
    if config.data.mean is None:
        config = replace(config, data=replace(config.data, mean=saved.data.mean, std=saved.data.std))
    may_change = _MAY_CHANGE
    if isinstance(config, PretrainConfig) and isinstance(saved, PretrainConfig):
        config = replace(config, objective=_same_teacher(config.objective, saved.objective))
        may_change = may_change | _places_of_teachers(config.objective, saved.objective)
    old, new = flat(to_plain(_located(saved))), flat(to_plain(_located(config)))
    changed = sorted(name for name in old | new if old.get(name) != new.get(name) and name not in may_change)
    if changed:
        listing = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)
        raise BadInput(
            f"{config.run.out}: cannot be resumed with other settings than it was started with: {listing}; "
            "keep these settings, or start a new run in another directory"
        )
    return config


def _same_teacher(new: ObjectiveConfig, saved: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the new settings, with the run's own teacher where they do not identify its weights."""
    if not new.teacher or not saved.teacher or new.teacher.sha256:
        return new
    return replace(new, teacher=replace(new.teacher, sha256=saved.teacher.sha256))


def _places_of_teachers(new: ObjectiveConfig, saved: ObjectiveConfig) -> set[str]:
    """Returns what may change of a teacher that is an artifact: its place. Its SHA-256 is compared later."""
    if not new.teacher or not saved.teacher:
        return set()
    return {"objective.teacher.name"} if may_have_moved(saved.teacher, new.teacher) else set()


def write_config(config: PretrainConfig | FinetuneConfig) -> None:
    """Writes the settings into the run directory.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(config.run.out / "config.json", to_plain(_located(config)))


def _located(config: Settings) -> Settings:
    """Returns the settings with absolute paths: a run may be resumed from any directory."""
    data = replace(config.data, images=config.data.images and config.data.images.absolute())
    if isinstance(config, PretrainConfig):
        probe = replace(config.probe, probe=config.probe.probe and config.probe.probe.absolute())
        return replace(config, data=data, probe=probe)
    places = {"artifact": artifact_directory(config.artifact), "test": config.test, "val": config.val}
    return replace(config, data=data, **{name: path and path.absolute() for name, path in places.items()})
