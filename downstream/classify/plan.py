"""The plan of a fine-tuning run: settings filled in from artifact and images, data splits, and all checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from coma.artifact import ArtifactConfig, is_multi_label, load_artifact, load_encoder
from coma.config import FinetuneConfig
from coma.data import (
    Source,
    Subset,
    align_labels,
    check_sample,
    hold_out,
    log_missing_classes,
    open_labelled_splits,
)
from coma.data.class_sampling import ClassSampler
from coma.errors import BadInput
from coma.messages import abridged, counted
from coma.objectives.classification import balanced_weights
from coma.preflight import require_packages
from pretrain.training.optimizer import default_layer_decay
from pretrain.training.run_plan import (
    RunPlan,
    check_shapes,
    check_space,
    count_steps,
    is_multiple,
    split_batch,
)
from pretrain.training.run_settings import check_folder


@dataclass(frozen=True)
class FinetunePlan(RunPlan[FinetuneConfig]):
    """A fine-tuning run, ready to start."""

    pretrained: ArtifactConfig
    """Description of the artifact that is fine-tuned."""
    encoder: dict[str, Tensor]
    """The artifact's encoder weights."""
    head: dict[str, Tensor] | None
    """Head to go on from, of a classifier of the same classes, in the order of this run's classes."""
    labels: Tensor
    """Labels of the training images, int64 `[n]`, or float32 `[n, classes]` for any number per image."""
    test: Source
    """Test images, used once, at the end."""
    test_labels: Tensor
    """Labels of the test images, with the same numbers for the same classes."""
    val: Source | None
    """Validation images, which choose the checkpoint; None publishes the weights of the last step."""
    val_labels: Tensor
    """Labels of the validation images, with the same numbers."""
    held_out: bool
    """Whether the validation images are a part of the training split, which is not trained on."""
    notes: tuple[str, ...]
    """Lines to print before the first step."""

    @property
    def sources(self) -> dict[str, Source]:
        """See `RunPlan.sources`."""
        val = {} if self.val is None else {"validation images": self.val}
        return {"training images": self.source, **val, "test images": self.test}

    def evaluates_at(self, step: int) -> bool:
        """Returns whether a validation is due."""
        recipe = self.config.optimizer
        every = max(1, round(recipe.validate * len(self.source) / recipe.batch_size))
        return self.val is not None and step > 0 and is_multiple(step, every)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    @cached_property
    def class_weights(self) -> Tensor | None:
        """The weight of every class in the loss; None where all weigh the same."""
        if self.config.optimizer.class_balance != "weights":
            return None
        return balanced_weights(self.labels, len(self.class_names))

    @cached_property
    def sampler(self) -> ClassSampler | None:
        """What draws the training images; None shows every image once in an epoch."""
        return ClassSampler(self.labels) if self.config.optimizer.class_balance == "sampling" else None

    def balance(self) -> tuple[str, ...]:
        """Returns lines on what makes rare classes count as much as frequent ones."""
        if self.class_weights is not None:
            low, high = int(self.class_weights.argmin()), int(self.class_weights.argmax())
            ends = (f"{self.class_weights[i]:.3g} ({self.class_names[i]})" for i in (low, high))
            return (f"class weights: {' to '.join(ends)}",)
        if self.sampler is None:
            return ()
        counts = self.sampler.counts
        shown = len(self.source) / len(counts)
        most, fewest = (f"{shown / int(each):.3g} times" for each in (counts.min(), counts.max()))
        line = (
            f"balanced sampling: an epoch of {len(self.source):,} samples shows each of {len(counts)} "
            f"classes {shown:,.0f} times: an image of the rarest {most}, one of the most frequent {fewest}"
        )
        if self.multi_label:
            line += "; images of several classes have the turns of each, those without a class are one more"
        if self.source.blocks is None:
            return (line,)
        note = "the images lie in row groups, which balanced sampling reads many times in an epoch"
        return line, f"{note}; --class-balance weights reads each once"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self.config.class_names or ()


def prepare_finetuning(config: FinetuneConfig, *, resume: bool) -> FinetunePlan:
    """Fills in what follows from artifact and images, and checks the settings against them.

    Raises:
        BadInput: an artifact without an encoder to fine-tune, images without labels or of one class, test
            images of unknown classes, settings that do not fit, or a directory that cannot be used.
    """
    if config.optimizer.frozen and config.optimizer.frozen_stages >= 0:
        raise BadInput("--frozen freezes the whole encoder; leave --frozen-stages out")
    if config.optimizer.frozen and config.optimizer.class_balance == "sampling":
        raise BadInput(
            "--class-balance sampling has no effect with --frozen, which uses all images at once; give "
            "--class-balance weights"
        )
    encoder = load_encoder(config.artifact)
    about, stages = encoder.artifact, len(encoder.parts()) - 1
    if config.optimizer.frozen_stages > stages:
        raise BadInput(
            f"--frozen-stages {config.optimizer.frozen_stages}: {config.artifact} has {stages} stages (plain "
            f"ViT: blocks); give -1 to {stages}"
        )
    images = config.data.images
    splits = (
        open_labelled_splits(images, val=config.val)
        if config.test is None
        else open_labelled_splits(None, images, config.test, config.val)
    )
    train, val, test = splits.train, splits.val, splits.test
    labels, test_labels, names = align_labels(train, test)
    if labels.ndim == 2:
        require_packages("sklearn")
    log_missing_classes(splits)
    metric = "mAP" if labels.ndim == 2 else "top-1"
    notes: tuple[str, ...] = ()
    if config.optimizer.label_share < 1:
        kept = ~hold_out(labels, 1 - config.optimizer.label_share, config.run.seed)
        notes = (
            f"labels: {int(kept.sum()):,} of the {len(train):,} images of {train.location}, drawn with seed "
            f"{config.run.seed} (--label-share {config.optimizer.label_share:g})",
        )
        train, labels = Subset(train, np.flatnonzero(kept)), labels[kept]
    share, val_labels, held_out = config.optimizer.hold_out, labels[:0], val is None
    chosen_by = "checkpoint: the last step's; nothing chooses it (--hold-out 0)"
    if val is not None:
        _, val_labels, _ = align_labels(train, val)
        chosen_by = f"checkpoint: chosen by {metric} on {len(val):,} images of {val.location}"
    elif share:
        chosen = hold_out(labels, share, config.run.seed)
        if not chosen.any():
            raise BadInput(
                f"{train.location}: every class has a single image, so none can be held out to choose the "
                "checkpoint; give validation images (--val), or take the last step's weights (--hold-out 0)"
                f"{', or a larger --label-share' * (config.optimizer.label_share < 1)}"
            )
        single = 0 if labels.ndim == 2 else int((labels.bincount() == 1).sum())
        drawn = "all" if labels.ndim == 2 else "every class"
        without = f"; {counted(single, 'class', 'classes')} with a single image have none" if single else ""
        chosen_by = (
            f"checkpoint: chosen by {metric} on {int(chosen.sum()):,} of the {len(labels):,} images of "
            f"{train.location}, which are not trained on: {share:.3g} of {drawn}, at least one of two, "
            f"drawn with seed {config.run.seed}{without} (--val or --hold-out change this)"
        )
        val, val_labels = Subset(train, np.flatnonzero(chosen)), labels[chosen]
        train, labels = Subset(train, np.flatnonzero(~chosen)), labels[~chosen]
    head, started = _head_of(config, about, names, multi_label=labels.ndim == 2)
    notes += *started, chosen_by, f"test: {len(test):,} images of {test.location}, used once, at the end"
    config = check_folder(_filled_in(config, about, names), resume)
    check_shapes(config)
    slices = split_batch(config.optimizer, rank=0, world=1)
    if slices.micro_batch % 2 and (config.optimizer.mixup or config.optimizer.cutmix):
        raise BadInput(
            f"{slices.micro_batch} images per pass: mixup and CutMix pair them, so give an even --batch-size "
            "and --micro-batch, or --mixup 0 --cutmix 0"
        )
    for source in (train, *((val,) if val else ()), test):
        check_sample(source, config.model.channels, config.data.mean or (), config.data.std or (), fixed=True)
    steps = count_steps(config.optimizer, len(train))
    weights = encoder.state_dict()
    check_space(config, sum(tensor.numel() for tensor in weights.values()))
    plan = FinetunePlan(
        config=config,
        source=train,
        slices=slices,
        steps=steps,
        pretrained=about,
        encoder=weights,
        head=head,
        labels=labels,
        test=test,
        test_labels=test_labels,
        val=val,
        val_labels=val_labels,
        held_out=held_out and val is not None,
        notes=notes,
    )
    return replace(plan, notes=(*notes, *plan.balance()))


def _filled_in(config: FinetuneConfig, about: ArtifactConfig, names: tuple[str, ...]) -> FinetuneConfig:
    data, recipe = config.data, config.optimizer
    if not any(data.image_size):
        data = replace(data, image_size=about.image_size)
    if data.mean is None:
        data = replace(data, mean=about.mean, std=about.std)
    if recipe.layer_decay is None:
        recipe = replace(recipe, layer_decay=default_layer_decay(about.model))
    model = replace(about.model, drop_path=recipe.drop_path)
    return replace(config, data=data, model=model, class_names=names, optimizer=recipe)


def _head_of(
    config: FinetuneConfig, about: ArtifactConfig, names: tuple[str, ...], *, multi_label: bool
) -> tuple[dict[str, Tensor] | None, tuple[str, ...]]:
    """Returns the head of a classifier of the same classes, and a line about what the run starts from."""
    if config.from_scratch or about.kind in ("backbone", "pretrained"):
        return None, ()
    place = config.artifact
    if about.kind != "classifier":
        return None, (f"starts from the encoder of the {about.kind} {place}; the head is new",)
    before = about.class_names or ()
    if config.optimizer.frozen:
        return None, (f"starts from the encoder of the classifier {place}; the head is fitted anew",)
    if is_multi_label(about) != multi_label:
        kind = "any number of classes per image" if is_multi_label(about) else "one class per image"
        return None, (f"starts from the encoder of {place}; the head is new, since that one is for {kind}",)
    if set(before) != set(names):
        other = f"{abridged(before, 5)}; these images: {abridged(names, 5)}"
        return None, (f"starts from the encoder of {place}; the head is new, since its classes are {other}",)
    rows = [before.index(name) for name in names]
    tensors = load_artifact(place).tensors
    head = {name: tensors[name][rows] for name in ("head.weight", "head.bias")}
    order = "" if before == names else " (its classes, sorted as those of these images)"
    return head, (f"starts from the whole classifier {place}: encoder and head{order}",)
