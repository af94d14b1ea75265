"""A fine-tuning run before its first step: what fits together is put together, what does not is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pretrain.artifact import ArtifactConfig, load_encoder
from pretrain.config import FinetuneConfig
from pretrain.data import Source, open_source, shared_labels
from pretrain.errors import BadInput
from pretrain.training.optimizer import default_layer_decay
from pretrain.training.setup import (
    Plan,
    check_folder,
    check_shapes,
    check_space,
    count_steps,
    is_multiple,
    share_out,
)


@dataclass(frozen=True)
class FinetunePlan(Plan[FinetuneConfig]):
    """A fine-tuning run, ready to start."""

    about: ArtifactConfig
    """Of the artifact that is fine-tuned."""
    encoder: dict[str, Tensor]
    """Its encoder's weights."""
    labels: Tensor
    """Of the training images, int64 `[n]`."""
    test: Source
    test_labels: Tensor
    """Of the test images, int64 `[m]`, counted alike."""

    def looks_at(self, step: int) -> bool:
        """Whether a validation is due."""
        recipe = self.config.optimizer
        return step > 0 and is_multiple(
            step, max(1, round(recipe.validate * len(self.source) / recipe.batch_size))
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class, in the order of the labels."""
        return self.config.class_names or ()


def prepare_finetuning(config: FinetuneConfig, *, resume: bool) -> FinetunePlan:
    """Fill in what follows from artifact and images, and check the settings against them.

    Raises:
        BadInput: an artifact without an encoder to fine-tune, images without labels or of one class, test
            images of unknown classes, settings that do not fit, or a directory that cannot be used.
    """
    encoder, about = load_encoder(config.artifact)
    if config.test is None:
        folder = config.data.images
        if folder is None:
            raise BadInput("give the labelled images: --data, or --train and --test")
        train, test = open_source(folder, "train"), open_source(folder, "test")
    else:
        if config.data.images is None:
            raise BadInput("give --train beside --test")
        train, test = open_source(config.data.images), open_source(config.test)
    labels, test_labels, classes = shared_labels(train, test)
    names = train.class_names or tuple(str(number) for number in range(classes))
    config = check_folder(_filled_in(config, about, names[:classes]), resume)
    check_shapes(config)
    slices = share_out(config.optimizer, rank=0, world=1)
    if slices.micro_batch % 2 and (config.optimizer.mixup or config.optimizer.cutmix):
        raise BadInput(
            f"{slices.micro_batch} images per pass: mixup and CutMix pair them, so give an even --batch-size "
            "and --micro-batch, or --mixup 0 --cutmix 0"
        )
    steps = count_steps(config.optimizer, len(train))
    weights = encoder.state_dict()
    check_space(config, sum(tensor.numel() for tensor in weights.values()))
    return FinetunePlan(config, train, slices, steps, about, weights, labels, test, test_labels)


def _filled_in(config: FinetuneConfig, about: ArtifactConfig, names: tuple[str, ...]) -> FinetuneConfig:
    data, recipe = config.data, config.optimizer
    if data.mean is None:
        data = replace(data, mean=about.mean, std=about.std)
    if recipe.layer_decay is None:
        recipe = replace(recipe, layer_decay=default_layer_decay(about.model))
    model = replace(about.model, drop_path=recipe.drop_path)
    return replace(config, data=data, model=model, class_names=names, optimizer=recipe)
