"""The verb train of `coma detect` and `coma segment`."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.atomic_io import lies_among
from coma.errors import BadInput
from downstream.cli_options import ENCODER_OPTIONS, TrainOptions, is_main
from downstream.commands.shared import (
    COMMANDS,
    check_empty,
    device_of,
    given_flags,
    given_options,
    require_option,
    warn,
)

if TYPE_CHECKING:
    from downstream.artifacts import Kind
    from downstream.configs.adapt import EncoderSpec

log = logging.getLogger(__name__)
SOURCE_OPTIONS = ("artifact", "preset", "config", "cfg_options", "data", "classes", "out", "device")
"""Options that apply with --config, whatever the encoder."""


def train(
    kind: Kind,
    options: TrainOptions,
    argv: Sequence[str],
    make_config: Callable[[Any, EncoderSpec], Any],
    set_dataset: Callable[[Any, Any], int],
) -> None:
    """Trains with our configuration, with the user's own, or resumes a run.

    Args:
        kind: Kind of the artifact.
        options: Options of the command.
        argv: Arguments that the options were parsed from.
        make_config: Makes our configuration from the options and the encoder.
        set_dataset: Puts the dataset of the options into a configuration, and returns how many training
            images it has.

    Raises:
        BadInput: settings that do not go together.
    """
    from downstream.configs.load import load_config
    from downstream.finetune import finetune
    from downstream.openmmlab.runner import CONFIG

    command, device = COMMANDS[kind], device_of(options.device).type
    if options.resume:
        _refuse_new_settings(options, argv)
        path = options.resume / CONFIG
        if not path.is_file():
            raise BadInput(
                f"--resume {options.resume}: holds no {CONFIG}; give a run of coma {command} train"
            )
        trained = finetune(kind, load_config(path), options.resume, device=device, source=path, resume=True)
        print_trained(command, options.resume, trained)
        return
    out = require_option(options.out, "--out", f"a new run directory, for example runs/{kind}")
    if is_main():  # it may have begun to write when the other processes look
        check_empty(out, f"resume with --resume {out}, or " if (out / CONFIG).is_file() else "")
        if note := lies_among(out, options.data):
            warn([note])
    with converted_labels(out):
        config = _prepared(kind, options, argv, make_config, set_dataset, out, device)
    theirs = options.config
    try:
        trained = finetune(kind, config, out, device=device, source=theirs)
    except BadInput as error:
        if options.data or not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise BadInput(f"{error}; if this is a file of the dataset, name your own with --data") from error
    print_trained(command, out, trained)


def _refuse_new_settings(options: TrainOptions, argv: Sequence[str]) -> None:
    """Refuses an artifact, and all flags but --resume and --device.

    Raises:
        BadInput: naming them.
    """
    names = [each.name for each in fields(options) if each.name not in ("artifact", "resume", "device")]
    artifact = str(options.artifact) if options.artifact else ""
    if given := ", ".join(filter(None, (artifact, given_flags(argv, names)))):
        raise BadInput(f"{given}: a resumed run keeps its settings; start a new run")


def _prepared(
    kind: Kind,
    options: TrainOptions,
    argv: Sequence[str],
    make_config: Callable[[Any, EncoderSpec], Any],
    set_dataset: Callable[[Any, Any], int],
    out: Path,
    device: str,
) -> Any:
    """Returns the configuration of a new run: ours, or the user's own with an encoder and a dataset."""
    from downstream.configs.adapt import encoder_spec, set_encoder
    from downstream.configs.load import OURS, apply_cfg_options, config_errors, load_config
    from downstream.configs.override import (
        BACKBONE_OPTIONS,
        OVERRIDES,
        override_backbone,
        override_training,
    )
    from downstream.finetune import check_library
    from downstream.openmmlab.runner import prepare_config
    from downstream.start import load_whole
    from downstream.step_memory import split_into_passes

    encoder, theirs = None, options.config
    if options.artifact or options.preset or not theirs:
        encoder = encoder_spec(options.artifact, options.preset)
    if encoder and not theirs:
        config = make_config(options, encoder)
        load_whole(config, encoder, kind)
        apply_cfg_options(config, options.cfg_options)
        split_into_passes(kind, config, options.micro_batch, device)
    else:
        assert theirs
        config = load_config(theirs)
        check_library(kind, config, theirs)
        there = BACKBONE_OPTIONS if config.model.backbone.get("type") in OURS else ()
        refuse_without_effect(options, argv, (*OVERRIDES, *(ENCODER_OPTIONS if encoder else there)))
        given = given_options(argv, [each.name for each in fields(options)])
        with config_errors(theirs, "cannot be adapted"):
            if encoder:
                with log_changes(config, theirs, f"to fit {options.artifact or options.preset}"):
                    set_encoder(config, encoder, options)
                    load_whole(config, encoder, kind)
            images = None
            if options.data:
                with log_changes(config, theirs, f"to read {options.data}"):
                    images = set_dataset(config, options)
            with log_changes(config, theirs, "by flags", "leave the flag out to keep it"):
                if not encoder:
                    override_backbone(config, options, given)
                override_training(config, options, given, images)
            apply_cfg_options(config, options.cfg_options)
            with log_changes(config, theirs, "for this machine and --out", "--resume resumes a run"):
                config.resume = False
                prepare_config(config, out, device)
    return config


def labels_folder(out: Path | None) -> Path | None:
    """Returns the folder of a run for labels that are converted; None for a temporary one."""
    return out / "labels" if out and is_main() else None


@contextmanager
def converted_labels(out: Path) -> Iterator[None]:
    """Removes the labels that were converted inside if it fails, so that the command can be given again."""
    try:
        yield
    except BaseException:
        if is_main():
            shutil.rmtree(out / "labels", ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
        raise


def refuse_without_effect(options: TrainOptions, argv: Sequence[str], applies: Collection[str]) -> None:
    """Refuses flags that have no effect on the configuration of --config.

    Args:
        options: Options of the command.
        argv: Arguments that they were parsed from.
        applies: Names of the options that apply, beside the sources.

    Raises:
        BadInput: naming the flags.
    """
    names = [each.name for each in fields(options) if each.name not in (*SOURCE_OPTIONS, *applies)]
    if flags := given_flags(argv, names):
        raise BadInput(f"{flags}: no effect with --config; change the configuration, or use --cfg-options")


@contextmanager
def log_changes(
    config: Any, path: Path, why: str, hint: str = "--cfg-options NAME=VALUE changes it back"
) -> Iterator[None]:
    """Logs in one line which settings of the user's configuration change inside, and why."""
    from downstream.configs.load import differences

    before = config.to_dict()
    yield
    if changed := differences(before, config.to_dict()):
        log.info("%s: changed %s: %s; %s", path, why, ", ".join(changed), hint)


def print_trained(command: str, out: Path, artifact: Path | None) -> None:
    """Prints the scores of a trained run, where its files are, and what to do next."""
    from downstream.openmmlab.runner import is_headline

    if not is_main():
        return
    if artifact is None:
        print(f"\n{out}: trained; its backbone is not one of ours, so there are checkpoints but no artifact")
        return
    about = json.loads((artifact / "config.json").read_text())
    scores, last = (
        "  ".join(f"{k} {v:.4g}" for k, v in about["trained"][which].items() if is_headline(k))
        or "no score above 0"
        for which in ("scores", "last_scores")
    )
    name = about["trained"]["checkpoint"]
    kept = (
        f"best checkpoint: {name}, chosen by the val split: {scores}"
        if name.startswith("best_")
        else f"checkpoint: {name}, the last one; --cfg-options default_hooks.checkpoint.save_best=auto in a "
        "new run keeps the best one"
    )
    given = shlex.quote(str(artifact))
    print(
        f"\n{about['trained']['steps']} steps; val split, at the last step: {last}\n{kept}\n\n"
        f"  artifact     {artifact}\n"
        f"  curves       tensorboard --logdir {out}\n\n"
        f"next:\n"
        f"  coma {command} predict {given} IMAGES --out PREDICTIONS\n"
        f"  coma {command} test {given} --data DATASET"
    )
