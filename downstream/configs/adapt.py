"""An mmengine configuration, fitted to an encoder.

Fitting changes only what depends on the encoder: its settings and weights, the channels and strides that
necks and heads expect, and the mean and deviation of the pixels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coma.config import EncoderConfig, encoder_preset
from coma.config.serialization import from_plain
from coma.errors import BadInput
from downstream.cli_options import TrainOptions
from downstream.configs.load import REGISTER_MODULE, require_imports
from downstream.configs.strides import scale_strides

log = logging.getLogger(__name__)
CHANNELS, PYRAMID = "downstream.openmmlab.data_preprocessor", "SimpleFeaturePyramid"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderSpec:
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
        return len(self.model.strides) > 1

    @property
    def strides(self) -> tuple[float, float, float, float]:
        """Pixels per token of the pyramid's four maps, whoever makes them; whole numbers are of type int."""
        patch = self.model.patch
        first = patch if self.hierarchical else patch / 4 if patch % 4 else patch // 4
        return (first, first * 2, first * 4, first * 8)

    @property
    def channels(self) -> list[int]:
        """Channels of what the encoder hands out."""
        return list(self.model.widths)


def encoder_spec(artifact: Path | None, preset: str | None) -> EncoderSpec:
    """The encoder asked for.

    Raises:
        BadInput: not exactly one of the two, or a ViT whose patches are too small for a pyramid.
        BadArtifact: not an artifact, or not one of an encoder.
    """
    if (artifact is None) == (preset is None):
        raise BadInput("give an artifact (run/artifact), or --preset for random weights, and not both")
    if artifact is None:
        model = encoder_preset(str(preset))
        described = EncoderSpec(model, IMAGENET_MEAN, IMAGENET_STD, {"preset": preset})
    else:
        from coma.artifact import load_encoder

        about = load_encoder(artifact).artifact
        described = EncoderSpec(about.model, about.mean, about.std, {"artifact": str(artifact.resolve())})
    if described.strides[0] < 1:
        raise BadInput(
            f"{artifact or preset}: patches of {described.model.patch} px are too small; 4 or more"
        )
    return described


def set_encoder(config: Any, encoder: EncoderSpec, options: TrainOptions) -> None:
    """Put the encoder into `config.model`, and fit necks, heads, anchors and pixel statistics to it.

    Raises:
        BadInput: options or a model that this encoder does not go with.
    """
    model = config.model
    before = model.get("backbone", {})
    weights = {
        "load_from": config.pop("load_from", None),
        "model.pretrained": model.pop("pretrained", None),
        "model.backbone.init_cfg": (before.get("init_cfg") or {}).get("checkpoint"),
    }
    dropped = ", ".join(f"{name}={value}" for name, value in weights.items() if value)
    if dropped:
        log.info(
            "not loaded: %s; the encoder's weights are those of %s, and --cfg-options load_from=FILE loads a "
            "checkpoint over them",
            dropped,
            encoder.backbone.get("artifact") or "nothing (random)",
        )
    kind = "DyViT" if encoder.hierarchical else "PlainViT"
    kept = ("drop_path", "frozen_stages", "with_cp", "global_blocks") if before.get("type") == kind else ()
    asked = {
        "drop_path": options.drop_path,
        "frozen_stages": options.frozen_stages,
        "with_cp": options.grad_checkpointing or None,
        "global_blocks": options.global_blocks,
    }
    if options.global_blocks and not encoder.hierarchical:
        raise BadInput("--global-blocks: a plain ViT attends to the whole map in every block")
    backbone = {"type": kind, **encoder.backbone, "drop_path": 0.1}
    backbone |= {name: before[name] for name in kept if name in before}
    backbone |= {name: value for name, value in asked.items() if value is not None}
    finest = _finest(model)
    if encoder.hierarchical:
        backbone["out_indices"] = tuple(range(finest, 4))
    model.backbone = backbone
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(loader):
            _set_image_reader(config[loader].dataset, encoder.model.channels)
    _set_pixel_statistics(model, encoder)
    if options.head_channels is not None:
        _set_head_channels(model, options.head_channels)
    _set_pyramid(model, encoder, finest)
    ratio = encoder.strides[0] / _finest_stride(before)
    if ratio != 1:
        for name, head in model.items():
            if name not in ("backbone", "neck", "data_preprocessor"):
                scale_strides(head, ratio, config.get("default_scope", "mmdet"))
    require_imports(config, REGISTER_MODULE)
    if model.data_preprocessor.get("type") == "DetDataPreprocessor" and encoder.model.channels not in (1, 3):
        model.data_preprocessor.type = "ChannelsDetDataPreprocessor"
        require_imports(config, REGISTER_MODULE, CHANNELS)


def _finest(model: Any) -> int:
    """Number of the finest of four maps that a neck, or heads without one, take."""
    necks = as_list(model.get("neck"))
    if necks and "in_channels" in necks[0] and necks[0].get("type") != PYRAMID:
        return max(necks[0].get("start_level", 0), 4 - len(as_list(necks[0]["in_channels"])), 0)
    first = min(model.get("backbone", {}).get("out_indices") or (0,))
    return min(necks[0].get("start_level", 0) if necks else first, 3)


def _finest_stride(backbone: Any) -> float:
    """Pixels between the places of the finest map that the heads of a configuration were written for."""
    if backbone.get("type") not in ("DyViT", "PlainViT"):
        return 4
    try:
        if backbone.get("encoder"):
            model = from_plain(backbone["encoder"], EncoderConfig, source="encoder")
            return EncoderSpec(model, (), (), {}).strides[0]
        artifact = backbone.get("artifact")
        return encoder_spec(artifact and Path(artifact), backbone.get("preset")).strides[0]
    except BadInput:  # an artifact that is no longer there; `check_strides` sees what does not fit
        return 4


def _set_image_reader(node: Any, channels: int) -> None:
    """Our reader in place of mm's, wherever a pipeline begins with it."""
    if isinstance(node, dict):
        if node.get("type") == "LoadImageFromFile":
            node.clear()
            node.update(type="ReadImage", channels=channels)
        for child in list(node.values()):
            _set_image_reader(child, channels)
    elif isinstance(node, list | tuple):
        for child in node:
            _set_image_reader(child, channels)


def _set_pixel_statistics(model: Any, encoder: EncoderSpec) -> None:
    channels = encoder.model.channels
    preprocessor = model.setdefault("data_preprocessor", {})
    preprocessor["mean"] = [255 * value for value in encoder.mean]
    preprocessor["std"] = [255 * value for value in encoder.std]
    preprocessor["bgr_to_rgb"] = channels == 3


def _set_pyramid(model: Any, encoder: EncoderSpec, finest: int) -> None:
    # maps finer than number `finest` are not made: what nothing uses would have no gradient
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
    elif isinstance(neck.get("in_channels"), int):
        neck.in_channels = encoder.channels[-1]
    elif neck:
        falling = as_list(neck.get("in_channels")) != sorted(as_list(neck.get("in_channels")))
        neck.in_channels = encoder.channels[finest:][:: -1 if falling else 1]
        if neck.get("start_level"):
            neck.start_level = 0
    for head in (*as_list(model.get("decode_head")), *as_list(model.get("auxiliary_head"))):
        several = isinstance(head.get("in_channels"), list | tuple)
        index = head.get("in_index", range(len(channels)) if several else -1)
        head.in_channels = (
            channels[index] if isinstance(index, int) else [channels[i] for i in index]
        )  # as mmseg's heads pick from the pyramid


def _set_head_channels(model: Any, width: int) -> None:
    """Neck and heads of this width, with the proportions that mm's configurations have."""
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
                f"--head-channels: {part.get('type')} has no single width {name}; leave the flag out, or set "
                "the widths by --cfg-options"
            )
        part[name] = width


def as_list(value: Any) -> list[Any]:
    """A list of what may be one, several or none."""
    return [] if not value else list(value) if isinstance(value, list | tuple) else [value]
