"""mmengine configurations, fitted to an artifact and to the machine: what detection and segmentation share.

A configuration is one of `downstream/configs`, or any of mmdet's or mmseg's own. Fitting changes only what
depends on the encoder: its settings and weights, the channels and strides that necks and heads expect, and
the mean and deviation of the pixels.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pretrain.config import DyViTConfig, EncoderConfig, encoder_preset
from pretrain.errors import BadInput

PRESETS = Path(__file__).parent / "configs"
IMPORTS, CHANNELS = "downstream.openmmlab", "downstream.channels"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Preset = Literal["tiny", "small", "base", "large", "vit-tiny", "vit-small", "vit-base", "vit-large"]


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how to train; with --config, only what is given here changes it."""

    epochs: float | None = None
    """Passes over the training images (default: 24 for detection, 100 for segmentation)."""
    steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    batch_size: int | None = None
    """Images per step, all processes together (default: 4 for detection, 8 for segmentation)."""
    lr: float | None = None
    """Peak learning rate of AdamW (default: 1e-4)."""
    weight_decay: float | None = None
    """Of matrices; vectors have none (default: 0.05)."""
    layer_decay: float | None = None
    """Learning rate of an encoder's layer over that of the next (default: 0.8 for detection, 0.75 for
    segmentation)."""
    drop_path: float | None = None
    """Largest stochastic-depth rate of the encoder (default: 0.1)."""
    head_channels: int | None = None
    """Width of neck and head (default: 256 for detection, 512 for segmentation); 128 suits
    the tiny encoder, and CPUs."""
    frozen_stages: int = -1
    """Keep the weights of the stem and so many stages (0: the stem alone); -1 trains all."""
    global_blocks: int | None = None
    """Blocks of stage 3 that attend to the whole map, evenly spaced; with any, all of stage 4 (DyViT)."""
    checkpoint_gradients: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of matrix products; bf16 and fp16 use automatic mixed precision."""
    validations: int = 12
    """How often to measure on the validation images, evenly over the run."""
    save_steps: int | None = None
    """Save the resumable state every so many steps (default: at every validation)."""
    workers: int | None = None
    """Processes that read images; default: one per core beside the trainer (0 on 1 or 2 cores), at most 8."""
    seed: int = 0
    """Of weights, order and augmentation."""


@dataclass(frozen=True)
class FromOptions:
    """Where the encoder and the configuration come from."""

    artifact: Annotated[Path | None, tyro.conf.Positional] = None
    """Pre-trained artifact (run/artifact)."""
    preset: Preset | None = None
    """In place of an artifact: an encoder with random weights, to compare with."""
    config: Path | None = None
    """Any mmengine configuration, in place of ours; --cfg-options change it."""
    cfg_options: tuple[str, ...] = ()
    """Changes to the configuration, as OpenMMLab's tools take them: model.backbone.drop_path=0.2 ..."""


@dataclass(frozen=True)
class Described:
    """What of an encoder the rest of a model has to fit.

    Attributes:
        model: Its settings.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, likewise.
        backbone: `artifact` or `preset`, as the backbone takes it.
    """

    model: EncoderConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: dict[str, Any]

    @property
    def hierarchical(self) -> bool:
        """Whether it makes a pyramid by itself."""
        return isinstance(self.model, DyViTConfig)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels per token of the pyramid's four maps, whoever makes them."""
        first = self.model.patch if isinstance(self.model, DyViTConfig) else self.model.patch // 4
        return (first, first * 2, first * 4, first * 8)

    @property
    def channels(self) -> list[int]:
        """Channels of what the encoder hands out."""
        if isinstance(self.model, DyViTConfig):
            return [self.model.dim * 2**i for i in range(4)]
        return [self.model.dim]


def describe(artifact: Path | None, preset: str | None) -> Described:
    """The encoder asked for; its weights are not read yet.

    Raises:
        BadInput: not exactly one of the two, or a ViT whose patches are too small for a pyramid.
        BadArtifact: not an artifact, or not one of an encoder.
    """
    if (artifact is None) == (preset is None):
        raise BadInput("give an artifact (run/artifact), or --preset for random weights, and not both")
    if artifact is None:
        model = encoder_preset(str(preset))
        described = Described(model, IMAGENET_MEAN, IMAGENET_STD, {"preset": preset})
    else:
        from pretrain.artifact import load_encoder

        about = load_encoder(artifact)[1]
        described = Described(about.model, about.mean, about.std, {"artifact": str(artifact.resolve())})
    if described.strides[0] < 1:
        raise BadInput(
            f"{artifact or preset}: patches of {described.model.patch} px are too small; 4 or more"
        )
    return described


def load_config(path: Path) -> Any:
    """An mmengine configuration.

    Raises:
        BadInput: it cannot be read.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise BadInput(f"--config {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of third parties about each other
            return Config.fromfile(path)
    except Exception as error:  # a configuration is a program: anything may go wrong in it
        raise BadInput(f"--config {path}: cannot be read ({type(error).__name__}: {error})") from error


def change(config: Any, options: tuple[str, ...]) -> None:
    """Apply changes given as `name=value`, as OpenMMLab's tools do.

    Raises:
        BadInput: one is not of that form, or does not fit the configuration.
    """
    from mmengine.config import DictAction

    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BadInput(f"--cfg-options {option}: must be name=value")
        try:
            config.merge_from_dict({name: DictAction._parse_iterable(value)})
        except (KeyError, TypeError, AssertionError, ValueError) as error:
            raise BadInput(f"--cfg-options {option}: does not fit ({error})") from None


def fit_encoder(config: Any, encoder: Described, options: TrainingOptions) -> None:
    """Put the encoder into `config.model`, and fit necks, heads, anchors and pixel statistics to it.

    Raises:
        BadInput: options or a model that this encoder does not go with.
    """
    model = config.model
    model.pop("pretrained", None)
    before = model.get("backbone", {})
    drop_path = options.drop_path if options.drop_path is not None else before.get("drop_path", 0.1)
    backbone: dict[str, Any] = {
        "type": "DyViT" if encoder.hierarchical else "PlainViT",
        **encoder.backbone,
        "drop_path": drop_path,
        "frozen_stages": options.frozen_stages,
        "with_cp": options.checkpoint_gradients,
    }
    finest = max((model.get("neck") or {}).get("start_level", 0), min(before.get("out_indices") or (0,)))
    if encoder.hierarchical:
        backbone["out_indices"] = tuple(range(finest, 4))
        backbone["global_blocks"] = options.global_blocks or 0
    elif options.global_blocks:
        raise BadInput("--global-blocks: a plain ViT attends to the whole map in every block")
    model.backbone = backbone
    _fit_statistics(model, encoder)
    if options.head_channels is not None:
        _fit_width(model, options.head_channels)
    _fit_pyramid(model, encoder, finest)
    imports = config.setdefault("custom_imports", {"imports": []})
    needed = [IMPORTS]
    if model.data_preprocessor.get("type") == "DetDataPreprocessor" and encoder.model.channels not in (1, 3):
        model.data_preprocessor.type = "ChannelsDetDataPreprocessor"
        needed.append(CHANNELS)
    imports["imports"] = list(dict.fromkeys([*needed, *imports["imports"]]))
    imports["allow_failed_imports"] = False


def _fit_statistics(model: Any, encoder: Described) -> None:
    channels = encoder.model.channels
    preprocessor = model.setdefault("data_preprocessor", {})
    preprocessor["mean"] = [255 * value for value in encoder.mean]
    preprocessor["std"] = [255 * value for value in encoder.std]
    preprocessor["bgr_to_rgb"] = channels == 3


def _fit_pyramid(model: Any, encoder: Described, finest: int) -> None:
    # maps finer than number `finest` are not made: what nothing uses would have no gradient
    neck = model.get("neck") or {}
    channels = encoder.channels
    if neck or not encoder.hierarchical:
        channels = [neck.get("out_channels", 256)] * 4
    if not encoder.hierarchical:
        model.neck = {
            "type": "SimpleFeaturePyramid",
            "in_channels": encoder.channels[0],
            "out_channels": channels[0],
            "num_outs": neck.get("num_outs", 4),
            "start_level": finest,
        }
    elif neck:
        neck.in_channels = encoder.channels[finest:]
        neck.start_level = 0
    for name in ("rpn_head", "bbox_head"):
        anchors = model.get(name, {}).get("anchor_generator")
        if anchors:
            anchors.strides = [encoder.strides[0] * 2 ** (finest + i) for i in range(len(anchors.strides))]
    roi_head = model.get("roi_head", {})
    for extractor in (roi_head.get("bbox_roi_extractor"), roi_head.get("mask_roi_extractor")):
        for each in _each(extractor):
            each.featmap_strides = list(encoder.strides[: len(each.featmap_strides)])
    decode_head = model.get("decode_head", {})
    if isinstance(decode_head.get("in_channels"), list | tuple):
        decode_head.in_channels = channels
    for head in _each(model.get("auxiliary_head")):
        head.in_channels = channels[head.get("in_index", 2)]


def _fit_width(model: Any, width: int) -> None:
    """Neck and heads of this width, with the proportions that mm's configurations have."""
    if width < 32 or width % 32:
        raise BadInput(f"--head-channels {width}: must be a multiple of 32")
    if model.get("decode_head"):
        model.decode_head.channels = width
        for head in _each(model.get("auxiliary_head")):
            head.channels = width // 2
        return
    if model.get("neck"):
        model.neck.out_channels = width
    for name in ("rpn_head", "bbox_head"):
        if model.get(name):
            model[name].in_channels = model[name].feat_channels = width
    roi_head = model.get("roi_head", {})
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        for extractor in _each(roi_head.get(name)):
            extractor.out_channels = width
    for head in _each(roi_head.get("bbox_head")):
        head.in_channels, head.fc_out_channels = width, 4 * width
    for head in _each(roi_head.get("mask_head")):
        head.in_channels = head.conv_out_channels = width


def _each(value: Any) -> list[Any]:
    return [] if not value else list(value) if isinstance(value, list | tuple) else [value]


def fit_schedule(config: Any, options: TrainingOptions, images: int, defaults: dict[str, float]) -> None:
    """Steps, batches, rates, validations and saving; `defaults` are a task's own.

    Raises:
        BadInput: numbers that make no run.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = options.batch_size or int(defaults["batch_size"])
    if batch < 1 or batch % world:
        raise BadInput(f"--batch-size {batch}: must be a multiple of the {world} processes")
    epochs = options.epochs if options.epochs is not None else defaults["epochs"]
    steps = options.steps if options.steps is not None else round(epochs * images / batch)
    if steps < 1:
        raise BadInput(f"{steps} steps: give --epochs or --steps of more than 0")
    if options.validations < 1:
        raise BadInput(f"--validations {options.validations}: must be at least 1")
    every = max(-(-steps // options.validations), 1)
    warmup = min(500, steps // 10)
    lr = options.lr if options.lr is not None else defaults["lr"]
    decay = options.weight_decay if options.weight_decay is not None else defaults["weight_decay"]
    rate = options.layer_decay if options.layer_decay is not None else defaults["layer_decay"]
    amp = {"type": "AmpOptimWrapper", "dtype": {"bf16": "bfloat16"}.get(options.precision, "float16")}
    config.optim_wrapper = {
        **({"type": "OptimWrapper"} if options.precision == "fp32" else amp),
        "constructor": "LayerDecayConstructor",
        "paramwise_cfg": {"decay_rate": rate},
        "clip_grad": {"max_norm": 1.0, "norm_type": 2},
        "optimizer": {"type": "AdamW", "lr": lr, "betas": (0.9, 0.999), "weight_decay": decay},
    }
    rising = {"type": "LinearLR", "start_factor": 1e-3, "by_epoch": False, "begin": 0, "end": warmup}
    falling = {"type": "CosineAnnealingLR", "eta_min": 0.0, "by_epoch": False, "begin": warmup, "end": steps}
    config.param_scheduler = [rising] * (warmup > 0) + [{**falling, "T_max": steps - warmup}]
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps, "val_interval": every}
    config.val_cfg, config.test_cfg = {"type": "ValLoop"}, {"type": "TestLoop"}
    loader = config.train_dataloader
    loader.batch_size = batch // world
    loader.sampler = {"type": "InfiniteSampler", "shuffle": True, "seed": options.seed}
    loader.pop("batch_sampler", None)
    hooks = config.setdefault("default_hooks", {})
    hooks["checkpoint"] = {
        "type": "CheckpointHook",
        "by_epoch": False,
        "interval": options.save_steps or every,
        "max_keep_ckpts": 2,
        "save_best": defaults["best"],
        "rule": "greater",
    }
    hooks["logger"] = {
        "type": "LoggerHook",
        "interval": min(50, max(steps // 20, 1)),
        "log_metric_by_epoch": False,
    }
    config.log_processor = {"type": "LogProcessor", "by_epoch": False, "window_size": min(50, steps)}
    config.randomness = {"seed": options.seed}


def pipeline_of(dataset: Any) -> list[Any]:
    """How a dataset is read; inside wrappers that repeat, join or mix some, the first one."""
    while "pipeline" not in dataset or "dataset" in dataset or "datasets" in dataset:
        inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
        if inner is None:
            return []
        dataset = inner
    return dataset["pipeline"]


def fit_workers(config: Any, workers: int | None) -> None:
    """The same number of reading processes for all loaders."""
    from pretrain.data.workers import default_workers

    count = min(default_workers(), 8) if workers is None else workers
    if count < 0:
        raise BadInput(f"--workers {count}: must be 0 or more")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config[name].num_workers = count
        config[name].persistent_workers = count > 0
