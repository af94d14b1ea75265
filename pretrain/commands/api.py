"""`coma.pretrain` and `coma.evaluate`: commands as functions, whose keywords are named like the flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.arguments import from_keywords
from coma.config import PretrainConfig
from coma.errors import BadInput
from pretrain.commands import evaluate as evaluate_command
from pretrain.commands import pretrain as pretrain_command

if TYPE_CHECKING:
    from pretrain.evaluate import Score
    from pretrain.training.callbacks import Callback


def pretrain(
    config: PretrainConfig | None = None,
    *,
    resume: bool | str | Path = False,
    callbacks: Sequence[Callback] = (),
    allow_changed_data: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> Path:
    """Pre-trains an encoder on a folder of images, as `coma pretrain` does; under torchrun, on all processes.

        coma.pretrain(images="PHOTOS", out="runs/first", model="tiny", image_size=64, epochs=20)
        coma.pretrain(resume="runs/first", epochs=40)

    Args:
        config: All settings, in place of keywords.
        resume: The run directory to continue; with `config`, True continues in `config.run.out`.
        callbacks: Objects that see metrics and pictures of the run; see `Callback`.
        allow_changed_data: Resume although the images are not those that the run was started with.
        dry_run: Print what the run is going to do, with its time and memory estimated; write nothing.
        settings: Flags of `coma pretrain` as keywords: `images`, `out`, `model`, `method`, `epochs`,
            `batch_size`, `from_`; `**{"model.dim": 16}` for flags with a dot. Checks and messages are those
            of the command.

    Returns:
        The run directory.

    Raises:
        BadInput: settings, data or directory that cannot be used.
        CheckFailed: a loss or gradient that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    from pretrain import training

    if config is None:
        settings |= {"allow_changed_data": allow_changed_data, "resume": resume or None}
        config, again, *_ = pretrain_command.parse(from_keywords(settings, positional=("images",)))
    elif settings or not isinstance(resume, bool):
        raise BadInput("coma.pretrain takes a PretrainConfig (and resume=True), or keywords, not both")
    else:
        again = resume
    return training.pretrain(
        config, resume=again, allow_changed_data=allow_changed_data, dry_run=dry_run, callbacks=callbacks
    )


def evaluate(artifact: str | Path | Sequence[str | Path], **settings: Any) -> list[Score]:
    """Evaluates frozen features on labelled images, as `coma evaluate` does.

        scores = coma.evaluate("runs/first/artifact", data="CLASSES", protocols=("knn",))
        print(scores[0].top1)

    Args:
        artifact: An artifact directory or `tiny-64`, or several.
        settings: Flags of `coma evaluate` as keywords: `data`, `protocols`, `random_baseline`, `out`.

    Returns:
        A score for every encoder and protocol; random encoders come last.

    Raises:
        BadInput: artifacts, images or settings that cannot be used.
        CheckFailed: an encoder's features are not finite.
    """
    artifacts = [artifact] if isinstance(artifact, str | Path) else artifact
    argv = from_keywords({"artifacts": artifacts, **settings}, positional=("artifacts",))
    return evaluate_command.evaluate(evaluate_command.parse(argv))
