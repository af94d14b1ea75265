"""Adapts mmengine configurations to an encoder.

Only what depends on the encoder changes: its settings and weights, the channels and strides of necks and
heads, and the mean and std of the pixels.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coma.artifact import ArtifactConfig
from coma.config import EncoderConfig, encoder_preset
from coma.config.serialization import from_plain
from coma.errors import BadInput
from coma.paths import artifact_directory
from downstream.cli_options import ENCODER_OPTIONS, TrainOptions
from downstream.configs.load import (
    OURS,
    REGISTER_MODULE,
    as_list,
    config_errors,
    image_reader,
    load_config,
    nodes,
    require_imports,
)
from downstream.configs.schedule import use_layer_decay
from downstream.configs.strides import scale_strides

log = logging.getLogger(__name__)
CHANNELS, SSD = "downstream.openmmlab.data_preprocessor", "downstream.openmmlab.ssd_head"
PYRAMID = "SimpleFeaturePyramid"
OTHER_DECAYS = ("LearningRateDecayOptimizerConstructor", "LayerDecayOptimizerConstructor")
"""Constructors of layer-wise learning rates that know the layers of other backbones alone."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, as far as the rest of a model depends on it.

    Attributes:
        model: Configuration of the encoder.
        mean: Mean of pixels in 0..1, per channel.
        std: Standard deviation of pixels in 0..1, per channel.
        backbone: The `artifact` or `preset` argument of the backbone.
        about: Description of the artifact, of any kind; None for a preset.
    """

    model: EncoderConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: dict[str, Any]
    about: ArtifactConfig | None = None

    @property
    def hierarchical(self) -> bool:
        """Returns whether the encoder outputs a feature pyramid."""
        return len(self.model.strides) > 1

    @property
    def strides(self) -> tuple[float, float, float, float]:
        """Returns the strides of the four pyramid levels, of encoder or neck; integers are of type int."""
        patch = self.model.patch
        first = patch if self.hierarchical else patch / 4 if patch % 4 else patch // 4
        return (first, first * 2, first * 4, first * 8)

    @property
    def channels(self) -> list[int]:
        """Returns the channels of the encoder's outputs."""
        return list(self.model.widths)


def encoder_spec(artifact: Path | None, preset: str | None) -> EncoderSpec:
    """Returns the specification of an artifact's or a preset's encoder.

    Raises:
        BadInput: not exactly one of the two, or a ViT whose patches are too small for a pyramid.
        BadArtifact: not an artifact of an encoder.
    """
    if (artifact is None) == (preset is None):
        raise BadInput("give an artifact (run/artifact), or --preset for random weights, and not both")
    if artifact is None:
        model = encoder_preset(str(preset))
        described = EncoderSpec(model, IMAGENET_MEAN, IMAGENET_STD, {"preset": preset})
    else:
        from coma.artifact import load_encoder

        about = load_encoder(artifact).artifact
        source = {"artifact": str(artifact_directory(artifact).resolve())}
        described = EncoderSpec(about.model, about.mean, about.std, source, about)
    if described.strides[0] < 1:
        raise BadInput(
            f"{artifact or preset}: patches of {described.model.patch} px are too small; 4 or more are needed"
        )
    return described


def set_encoder(config: Any, encoder: EncoderSpec, options: TrainOptions) -> None:
    """Replaces the backbone of `config.model` and adapts necks, heads, anchors and pixel statistics.

    Raises:
        BadInput: options or a model that do not fit the encoder.
    """
    model = config.model
    before = model.get("backbone", {})
    ours = before.get("type") in OURS
    weights = {"load_from": None if ours else config.pop("load_from", None)}
    weights |= dict(_pop_checkpoints(before, "model.backbone") if ours else _pop_checkpoints(model, "model"))
    dropped = ", ".join(f"{name}={value}" for name, value in weights.items() if value)
    if dropped:
        log.info(
            "not loaded: %s; the encoder starts from %s; --cfg-options load_from=FILE loads a checkpoint "
            "instead",
            dropped,
            encoder.backbone.get("artifact") or "random weights",
        )
    if config.get("load_from"):
        hint = "--cfg-options load_from=None leaves it out"
        log.info("load_from=%s is loaded over the encoder; %s", config.load_from, hint)
    kind = "DyViT" if encoder.hierarchical else "PlainViT"
    kept = ("drop_path", "frozen_stages", "with_cp", "global_blocks") if before.get("type") == kind else ()
    outputs = _adapted_outputs(config)
    asked = {
        "drop_path": options.drop_path,
        "frozen_stages": options.frozen_stages,
        "with_cp": options.grad_checkpointing or None,
        "global_blocks": options.global_blocks,
    }
    if options.global_blocks and not encoder.hierarchical:
        raise BadInput("--global-blocks: a plain ViT has global attention in every block")
    backbone = {"type": kind, **encoder.backbone, "drop_path": 0.1}
    backbone |= {name: before[name] for name in kept if name in before}
    backbone |= {name: value for name, value in asked.items() if value is not None}
    backbone |= {"outputs": outputs} if outputs else {}
    finest = _finest(model)
    if encoder.hierarchical and not outputs:
        backbone["out_indices"] = tuple(range(finest, 4))
    model.backbone = backbone
    readers = ("train_dataloader", "val_dataloader", "test_dataloader", "custom_hooks")
    _set_image_reader([config.get(name) for name in readers], encoder.model.channels)
    _set_pixel_statistics(model, encoder)
    _set_layer_decay(config)
    if options.head_channels is not None:
        _set_head_channels(model, options.head_channels)
    if not outputs:
        _set_pyramid(model, encoder, finest)
        _scale_heads(config, encoder.strides[0] / _finest_stride(before))
    require_imports(config, REGISTER_MODULE)
    if model.data_preprocessor.get("type") == "DetDataPreprocessor" and encoder.model.channels not in (1, 3):
        model.data_preprocessor.type = "ChannelsDetDataPreprocessor"
        require_imports(config, REGISTER_MODULE, CHANNELS)
    for head in as_list(model.get("bbox_head")):
        if head.get("type") == "SSDHead":
            head.type = "PredictingSSDHead"
            require_imports(config, REGISTER_MODULE, SSD)


def _pop_checkpoints(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Removes the checkpoints of other backbones, and of parts of them, and yields names and files."""
    if isinstance(node, dict):
        if node.get("pretrained"):
            yield f"{name}.pretrained", node.pop("pretrained")
        settings = node.get("init_cfg")
        if isinstance(settings, dict) and settings.get("checkpoint"):
            yield f"{name}.init_cfg", node.pop("init_cfg")["checkpoint"]
    children = list(node.items()) if isinstance(node, dict) else ()
    for key, child in enumerate(node) if isinstance(node, list | tuple) else children:
        yield from _pop_checkpoints(child, f"{name}.{key}")


def fit_backbone(
    config: Any, artifact: str | Path | None = None, *, preset: str | None = None, **options: Any
) -> Any:
    """Returns a configuration of MMDetection or MMSegmentation with a pre-trained encoder as its backbone.

    Neck and heads stay as they are: the encoder outputs the channels and strides that those of the
    configuration's own backbone had. (An FPN takes the encoder's channels instead.) Channels, strides, pixel
    statistics and image readers are changed; what else, and what is not loaded, is logged.

    Args:
        config: File of the configuration, or an mmengine `Config`, which is not changed.
        artifact: Directory of a pre-trained model.
        preset: Name of a preset instead, for random weights.
        options: drop_path, head_channels, frozen_stages, global_blocks and grad_checkpointing, as the flags
            of `coma detect train`.

    Raises:
        BadInput: a configuration that cannot be read or adapted, or options that do not fit.
        BadArtifact: not an artifact of an encoder.
    """
    path = Path(config if isinstance(config, str | Path) else config.filename or "the configuration")
    adapted = load_config(path) if isinstance(config, str | Path) else copy.deepcopy(config)
    if not isinstance(adapted.get("model"), dict) or not isinstance(adapted.model.get("backbone"), dict):
        raise BadInput(f"{path}: has no model with a backbone")
    unknown = sorted(options.keys() - set(ENCODER_OPTIONS))
    if unknown:
        raise BadInput(f"{', '.join(unknown)}: must be among {', '.join(ENCODER_OPTIONS)}")
    encoder = encoder_spec(Path(artifact) if artifact is not None else None, preset)
    with config_errors(path, "cannot be adapted"):
        set_encoder(adapted, encoder, TrainOptions(**options))
    return adapted


def _adapted_outputs(config: Any) -> dict[str, Any] | None:
    """Returns the `outputs` argument of our backbone; None if neck and heads take our own channels.

    These are FPNs, and configurations that were written for one of our backbones.
    """
    before = config.model.backbone
    if before.get("type") in OURS:
        return before.get("outputs")
    necks = as_list(config.model.get("neck"))
    if necks and necks[0].get("type") in ("FPN", PYRAMID):
        return None
    from downstream.configs.contract import backbone_outputs

    try:
        found = backbone_outputs(config.model, config.get("default_scope", "mmdet"))
    except BadInput as error:
        raise BadInput(f"{config.filename or 'the configuration'}: {error}") from error
    log.info(
        "model.backbone: its %s outputs channels %s at strides %s; the encoder's stages are projected and "
        "resized to these",
        before.get("type"), list(found.channels), list(found.strides),
    )  # fmt: skip
    return {name: value for name, value in vars(found).items() if value not in ((), False, None)}


def _scale_heads(config: Any, ratio: float) -> None:
    if ratio == 1:
        return
    for name, head in config.model.items():
        if name not in ("backbone", "neck", "data_preprocessor"):
            scale_strides(head, ratio, config.get("default_scope", "mmdet"))


def _set_layer_decay(config: Any) -> None:
    """Replaces layer-wise learning rates that are written for other backbones by those of ours."""
    wrapper = config.get("optim_wrapper") or {}
    if wrapper.get("constructor") in OTHER_DECAYS:
        given = wrapper.get("paramwise_cfg") or {}
        use_layer_decay(wrapper, given.get("decay_rate") or given.get("layer_decay_rate", 1.0))


def _finest(model: Any) -> int:
    """Returns the index of the finest of the four levels that the neck, or heads without a neck, use."""
    necks = as_list(model.get("neck"))
    if necks and "in_channels" in necks[0] and necks[0].get("type") != PYRAMID:
        return max(necks[0].get("start_level", 0), 4 - len(as_list(necks[0]["in_channels"])), 0)
    first = min(model.get("backbone", {}).get("out_indices") or (0,))
    return min(necks[0].get("start_level", 0) if necks else first, 3)


def _finest_stride(backbone: Any) -> float:
    """Returns the finest stride that the heads of a configuration expect."""
    if backbone.get("type") not in OURS:
        return 4
    try:
        if backbone.get("encoder"):
            model = from_plain(backbone["encoder"], EncoderConfig, source="encoder")
            return EncoderSpec(model, (), (), {}).strides[0]
        artifact = backbone.get("artifact")
        return encoder_spec(artifact and Path(artifact), backbone.get("preset")).strides[0]
    except BadInput:  # the artifact is gone; `check_strides` checks the result
        return 4


def _set_image_reader(node: Any, channels: int) -> None:
    """Replaces LoadImageFromFile by ReadImage in every pipeline below `node`."""
    for each in nodes(node):
        if each.get("type") == "LoadImageFromFile":
            each.clear()
            each.update(image_reader(channels))


def _set_pixel_statistics(model: Any, encoder: EncoderSpec) -> None:
    channels = encoder.model.channels
    preprocessor = model.setdefault("data_preprocessor", {})
    preprocessor["mean"] = [255 * value for value in encoder.mean]
    preprocessor["std"] = [255 * value for value in encoder.std]
    preprocessor["bgr_to_rgb"] = channels == 3


def _set_pyramid(model: Any, encoder: EncoderSpec, finest: int) -> None:
    # levels finer than `finest` are left out, since unused layers would get no gradient
    necks = as_list(model.get("neck"))
    neck: Any = necks[0] if necks else {}
    channels = encoder.channels
    if neck or not encoder.hierarchical:
        channels = [neck.get("out_channels", 256)] * 4
    if not encoder.hierarchical:
        pyramid = {
            "type": PYRAMID,
            "in_channels": encoder.channels[0],
            "out_channels": channels[0],
            "num_outs": neck.get("num_outs", 4),
            "start_level": finest,
        }
        model.neck = [pyramid, *necks[1:]] if necks[1:] else pyramid
    elif neck.get("type") == PYRAMID:
        rest = {"out_channels": channels[0], "num_outs": neck.get("num_outs", 4)}
        pyramid = {"type": "FPN", "in_channels": encoder.channels[finest:], **rest}
        model.neck = [pyramid, *necks[1:]] if necks[1:] else pyramid
    elif neck:
        several = isinstance(neck.get("in_channels"), list | tuple)
        neck.in_channels = encoder.channels[finest:] if several else encoder.channels[-1]
        if neck.get("start_level"):
            neck.start_level = 0
    for head in (*as_list(model.get("decode_head")), *as_list(model.get("auxiliary_head"))):
        several = isinstance(head.get("in_channels"), list | tuple)
        index = head.get("in_index", range(len(channels)) if several else -1)
        head.in_channels = (
            channels[index] if isinstance(index, int) else [channels[i] for i in index]
        )  # as mmseg's heads pick from the pyramid


def _set_head_channels(model: Any, width: int) -> None:
    """Sets the channels of neck and heads in the proportions of OpenMMLab's configurations."""
    if width < 32 or width % 32:
        raise BadInput(f"--head-channels {width}: must be a multiple of 32")
    for head in as_list(model.get("decode_head")):
        _set_width(head, width, "channels")
    for head in as_list(model.get("auxiliary_head")):
        _set_width(head, width // 2, "channels")
    for neck in as_list(model.get("neck"))[:1]:
        _set_width(neck, width, "out_channels")
    for name in ("rpn_head", "bbox_head"):
        for head in as_list(model.get(name)):
            _set_width(head, width, "in_channels", "feat_channels")
    roi_head = model.get("roi_head", {})
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        for extractor in as_list(roi_head.get(name)):
            _set_width(extractor, width, "out_channels")
    for head in as_list(roi_head.get("bbox_head")):
        _set_width(head, width, "in_channels")
        _set_width(head, 4 * width, "fc_out_channels")
    for head in as_list(roi_head.get("mask_head")):
        _set_width(head, width, "in_channels", "conv_out_channels")


def _set_width(part: Any, width: int, *names: str) -> None:
    for name in names:
        if not isinstance(part.get(name), int):
            raise BadInput(
                f"--head-channels: {part.get('type')} has no single setting {name}; omit the flag, or use "
                "--cfg-options"
            )
        part[name] = width
