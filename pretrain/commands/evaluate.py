"""Measure artifacts on labelled images: nearest neighbours, a linear classifier, fine-tuning.

An encoder that has learned nothing is measured beside them: part of every such score comes from the
architecture and from colour alone, and only the rest is what pre-training taught. Fine-tuning trains the
whole encoder and leaves a classifier; its run can be interrupted and goes on where it was last saved.

Examples:
  coma evaluate runs/first/artifact --data CLASSES
  coma evaluate runs/first/artifact --data CLASSES --protocol finetune --run runs/classifier
  coma evaluate runs/first/artifact --data CLASSES --protocol finetune --run runs/scratch --from-scratch
  coma evaluate --resume runs/classifier
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.arguments import parse_arguments, parse_known
from coma.config import DataConfig, FinetuneConfig, FinetuneRecipe, RunConfig
from coma.config.serialization import read_config
from coma.errors import BadInput
from coma.preflight import require_file, require_packages
from coma.ranges import BATCH, MINUTES, PROCESSES, SEED, SIDE, STEPS, Range, Ranged

if TYPE_CHECKING:
    from rich.table import Table

    from coma.artifact import ArtifactConfig
    from coma.config import EncoderConfig
    from coma.data import Source
    from coma.models import Encoder
    from pretrain.evaluate import Protocol, Score


@dataclass(frozen=True)
class Finetuning(FinetuneRecipe):
    """Of --protocol finetune alone (--batch-size is per optimizer step there).

    Every image is cropped, flipped, augmented and mixed anew in every epoch. The checkpoint is chosen by
    top-1 on centre crops of validation images: those of a val split beside test, of --val, or else a part of
    the training images (--hold-out) that is not trained on. The test images are used once, at the end.
    """

    batch_size: Annotated[int, BATCH, tyro.conf.Fixed, tyro.conf.Suppress] = 256
    from_scratch: bool = False
    """Begin with random weights instead of the artifact's: what fine-tuning has to be compared with."""
    crop_scale: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.08, 1.0)
    """Area of the random crop as a share of the image (RandomResizedCrop)."""
    flip: bool = True
    """Flip half of the crops left to right."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU."""
    compile: bool = False
    """Compile the classifier with torch.compile (slow to start, faster to run)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_minutes: Annotated[float, MINUTES] = 10.0
    """Save the resumable state at least this often (and at the end, on Ctrl-C and on SIGTERM)."""
    save_steps: Annotated[int | None, STEPS] = None
    """Save the resumable state every so many steps instead."""
    log_steps: Annotated[int, STEPS] = 10
    """Write metrics every so many steps."""


@dataclass(frozen=True)
class EvaluateConfig(Ranged):
    """Accuracy on labelled images."""

    artifacts: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT ...", help_behavior_hint="")
    ]
    """Artifact directories, of kind backbone or pretrained (run/artifact)."""
    data: Path | None = None
    """Folder that holds train and test (or val): folders with one folder per class, or .npz packs."""
    train: Path | None = None
    """Labelled training images, when they do not lie in --data."""
    test: Path | None = None
    """Labelled test images of the same classes, when they do not lie in --data."""
    val: Path | None = None
    """Labelled images that choose the checkpoint (finetune), when they do not lie in --data."""
    protocol: tuple[Literal["knn", "linear", "finetune"], ...] = ("knn", "linear")
    """knn: weighted vote of the nearest training images. linear: softmax regression on frozen features of
    centre crops (not comparable with linear probing that trains on augmented crops). finetune: the whole
    encoder learns the classes, see below; takes one artifact and a --run."""
    reference: bool = True
    """Measure a randomly initialised encoder of the same architecture as well (knn, linear; training one
    takes as long as fine-tuning does, so that is a run of its own: --from-scratch)."""
    image_size: Annotated[int | None, SIDE] = None
    """Side in pixels of the images shown to the encoder; default: as it was trained."""
    k: Annotated[int, Range(1, 10**6)] = 20
    """Neighbours that vote (knn)."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 0.07
    """Of their votes (knn): smaller trusts the nearest more."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random encoder, of the training images held out to choose the penalty (linear) or the
    checkpoint (finetune), and of the run (finetune)."""
    batch_size: Annotated[int, BATCH] = 256
    """Images at a time through the encoder; per optimizer step (finetune)."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images; default: by the number of cores."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    out: Path | None = None
    """Also write the results to this file, as JSON."""
    run: Path | None = None
    """Directory for a fine-tuning run: config.json, metrics.jsonl, tensorboard/, state/, loss_curve.png, and
    in artifact/ the classifier that did best on the validation images."""
    resume: Path | None = None
    """Go on with the fine-tuning run in this directory, with its own settings."""
    allow_changed_data: bool = False
    """With --resume: go on although images were added, removed, renamed, changed in size or moved to another
    class since the start; the best score is looked for anew then."""
    finetune: Annotated[Finetuning, tyro.conf.OmitArgPrefixes] = Finetuning()


def run(argv: list[str]) -> None:
    """Parse, measure, print a table.

    Raises:
        BadInput: artifacts, images or settings that cannot be used.
        CheckFailed: an encoder's features are not finite, or a loss in fine-tuning.
        Interrupted: Ctrl-C or SIGTERM while fine-tuning; everything is saved.
    """
    config = parse(argv)
    if not config.artifacts:
        raise BadInput("give at least one artifact directory, for example run/artifact")
    resolved = [path.resolve() for path in config.artifacts]
    for path, real in zip(config.artifacts, resolved, strict=True):
        if resolved.count(real) > 1 and "finetune" not in config.protocol:
            raise BadInput(f"{path}: was given twice; leave one out")
    if not config.protocol:
        raise BadInput("give at least one --protocol: knn, linear, finetune")
    if config.out:
        require_file(config.out)
    from coma.devices import pick_device

    pick_device(config.device)
    if "finetune" in config.protocol:
        _check_finetuning(config)

    from rich.console import Console

    from coma.data import open_labelled, say_absent_classes

    console = Console()
    splits = open_labelled(config.data, config.train, config.test, config.val)
    if "finetune" not in config.protocol:  # its run says so itself
        say_absent_classes(splits)
    scores = _measure(config, splits.train, splits.test)
    if "finetune" in config.protocol:
        scores.append(_finetune(config))
    console.print(_table(scores))
    if "finetune" in config.protocol:
        print(_what_is_left(scores[-1], config.run or Path("run")))
    if config.out:
        plain = {
            "train": str(splits.train.location),
            "test": str(splits.test.location),
            "scores": [asdict(s) for s in scores],
        }
        config.out.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def parse(argv: list[str]) -> EvaluateConfig:
    """The settings that `argv` asks for; those of a run to be resumed are its own where nothing is said.

    Raises:
        BadInput: a run that cannot be read, or flags that do not go with --resume.
    """
    first = parse_known(_First, argv, prog="coma evaluate")
    default = _of_run(first.resume) if first.resume else None
    config = parse_arguments(EvaluateConfig, argv, prog="coma evaluate", description=__doc__, default=default)
    if default and (config.run, config.protocol) != (default.run, default.protocol):
        raise BadInput("--run and --protocol do not go with --resume, which goes on with a fine-tuning run")
    if config.allow_changed_data and not default:
        raise BadInput("--allow-changed-data goes with --resume; a new run takes the images as they are")
    return config


@dataclass(frozen=True)
class _First:
    """What has to be known before the other defaults are."""

    resume: Path | None = None


def _of_run(folder: Path) -> EvaluateConfig:
    saved = read_config(folder, FinetuneConfig)
    own = {
        field.name: getattr(part, field.name)
        for part in (saved.optimizer, saved.data, saved.run)
        for field in fields(Finetuning)
        if hasattr(part, field.name)
    }
    return EvaluateConfig(
        artifacts=(saved.artifact,),
        data=None if saved.test else saved.data.images,
        train=saved.data.images if saved.test else None,
        test=saved.test,
        val=saved.val,
        protocol=("finetune",),
        image_size=saved.data.image_size,
        seed=saved.run.seed,
        batch_size=saved.optimizer.batch_size,
        workers=saved.data.workers,
        device=saved.run.device,
        run=folder.parent if folder.is_file() else folder,
        finetune=Finetuning(**own, from_scratch=saved.from_scratch),
    )


def _check_finetuning(config: EvaluateConfig) -> None:
    if config.run is None:
        raise BadInput("--protocol finetune needs a directory for its run, for example --run runs/classifier")
    if len(config.artifacts) > 1:
        raise BadInput("--protocol finetune takes one artifact at a time, each into a --run of its own")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("fine-tuning runs in one process, on one GPU or a CPU; start it without torchrun")
    require_packages("tensorboard", "matplotlib")
    if len(config.protocol) > 1:  # what it would refuse is not to be found after the others are measured
        from pretrain.finetune.plan import prepare_finetuning

        prepare_finetuning(_finetune_config(config), resume=config.resume is not None)


def _finetune(config: EvaluateConfig) -> Score:
    """Fine-tune, or go on with it; a row for the table."""
    from pretrain.evaluate import Score
    from pretrain.finetune.run import finetune

    result = finetune(
        _finetune_config(config),
        resume=config.resume is not None,
        allow_changed_data=config.allow_changed_data,
    )
    test, artifact = result.test, str(config.artifacts[0])
    settings: dict[str, float] = {"step": test.step, "last_step": result.steps}
    if result.best and result.last:
        settings |= {
            "val_top1": result.best.top1,
            "last_val_top1": result.last.top1,
            "val_images": result.best.images,
        }
    return Score(
        encoder=f"random, like {artifact}" if config.finetune.from_scratch else artifact,
        protocol="finetune",
        top1=test.top1,
        top5=test.top5,
        classes=len(result.config.class_names or ()),
        train_images=result.train_images,
        test_images=test.images,
        seconds=result.seconds,
        settings=settings,
    )


def _finetune_config(config: EvaluateConfig) -> FinetuneConfig:
    """The run that the flags describe."""
    given, size = config.finetune, config.image_size
    if size is None:
        from coma.artifact import load_artifact

        size = load_artifact(config.artifacts[0]).config.image_size
    recipe = FinetuneRecipe(**{field.name: getattr(given, field.name) for field in fields(FinetuneRecipe)})
    return FinetuneConfig(
        artifact=config.artifacts[0],
        data=DataConfig(
            images=config.data or config.train,
            image_size=size,
            crop_scale=given.crop_scale,
            flip=given.flip,
            workers=config.workers,
        ),
        test=config.test,
        val=config.val,
        from_scratch=given.from_scratch,
        optimizer=replace(recipe, batch_size=config.batch_size),
        run=RunConfig(
            out=config.run or Path("run"),
            seed=config.seed,
            device=config.device,
            precision=given.precision,
            compile=given.compile,
            grad_checkpointing=given.grad_checkpointing,
            save_minutes=given.save_minutes,
            save_steps=given.save_steps,
            log_steps=given.log_steps,
            reconstruction_every=0,
        ),
    )


def _what_is_left(score: Score, folder: Path) -> str:
    settings = score.settings
    chosen = "the last step's weights, which nothing was chosen by"
    if "val_top1" in settings:
        chosen = (
            f"chosen on {settings['val_images']:,.0f} validation images ({settings['val_top1']:.2%} top-1 "
            f"there, {settings['last_val_top1']:.2%} at the last step)"
        )
    return f"""
weights of step {settings["step"]} of {settings["last_step"]}: {chosen}
top-1 in the table: on {score.test_images:,} test images, used once, at the end

  classifier       {folder / "artifact"} (of that step)
  curves           {folder / "loss_curve.png"}
  metrics          {folder / "metrics.jsonl"}, or: tensorboard --logdir {folder / "tensorboard"}"""


def _encoders(config: EvaluateConfig) -> list[tuple[str, Encoder, ArtifactConfig]]:
    """The artifacts' encoders by name; behind them, one that has learned nothing for each architecture."""
    from coma.artifact import load_encoder
    from pretrain.evaluate import random_encoder

    encoders = [(str(path), *load_encoder(path)) for path in config.artifacts]
    if not config.reference:
        return encoders
    alike: dict[tuple[EncoderConfig, int], list[tuple[str, ArtifactConfig]]] = {}
    for name, _, about in encoders:
        shown = config.image_size or about.image_size
        alike.setdefault((replace(about.model, drop_path=0.0), shown), []).append((name, about))
    for (name, about), *others in alike.values():
        more = f" and {len(others)} more" if others else ""
        encoders.append((f"random, like {name}{more}", random_encoder(about, config.seed), about))
    return encoders


def _measure(config: EvaluateConfig, train: Source, test: Source) -> list[Score]:
    """Scores of frozen encoders, where they are asked for."""
    from coma.devices import pick_device
    from coma.progress import Progress
    from pretrain.evaluate import evaluate

    protocols: list[Protocol] = [name for name in config.protocol if name != "finetune"]
    if not protocols:
        return []
    encoders, device = _encoders(config), pick_device(config.device)
    scores = []
    with Progress() as progress:
        for name, encoder, about in encoders:
            scores += evaluate(
                encoder.to(device),
                about,
                train,
                test,
                protocols,
                name=name,
                image_size=config.image_size,
                k=config.k,
                temperature=config.temperature,
                seed=config.seed,
                batch_size=config.batch_size,
                workers=config.workers,
                progress=progress,
            )
            encoder.cpu()
    return scores


def _table(scores: list[Score]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("encoder", overflow="fold"), Column("protocol", no_wrap=True))  # no name is cut
    for heading in ("test\ntop-1 %", "test\ntop-5 %", "trained\non", "tested\non", "seconds"):
        table.add_column(heading, justify="right")
    for score in scores:
        top5 = "" if score.top5 is None else f"{100 * score.top5:.2f}"
        numbers = (f"{100 * score.top1:.2f}", top5, f"{score.train_images}", f"{score.test_images}")
        table.add_row(Text(score.encoder), score.protocol, *numbers, f"{score.seconds:.1f}")
    return table
