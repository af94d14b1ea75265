"""Artifacts as networks of timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coma.artifact.load import load_artifact, load_classifier, load_encoder
from coma.errors import BadInput


def create_timm(
    directory: str | Path,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    norm: bool = False,
    num_classes: int | None = None,
) -> Any:
    """Returns an artifact's encoder or classifier as a network of timm, with its weights, strictly loaded.

    It has timm's methods (`forward_features`, `forward_intermediates`, `reset_classifier`, ...), and its
    `pretrained_cfg` holds image size, mean and standard deviation, for `timm.data.resolve_model_data_config`.

    Args:
        directory: Artifact of kind backbone, pretrained or classifier, of any encoder, image size and patch.
        features_only: Return maps `[b, c_i, H/s_i, W/s_i]` in place of logits; `feature_info` describes them.
        out_indices: With `features_only`: stages of DyViT (default: all four) or blocks of a vision
            transformer (default: the last), counted from 0; negative numbers count from the end.
        norm: With `features_only`: normalise by the last norm; of DyViT, the last stage only.
        num_classes: Outputs of a new head; 0: none. Default: the classifier's own head, or none.

    Returns:
        The network, in evaluation mode on the CPU.

    Raises:
        BadArtifact: no artifact, a damaged one, or one of another kind.
        BadInput: `out_indices` that the network does not have.
    """
    from timm.models._features import FeatureGetterNet

    from coma.models.classifiers import DyViTFeatures  # registers models with timm
    from coma.models.to_timm import to_timm

    about = load_artifact(directory).config
    classifies = about.kind == "classifier"
    encoder: Any = load_classifier(directory) if classifies else load_encoder(directory)
    network = to_timm(encoder, about.image_size)
    if num_classes is not None:
        network.reset_classifier(num_classes, "avg")
    hierarchical = len(about.model.strides) > 1
    network.pretrained_cfg = network.default_cfg = {
        "architecture": type(network).__name__,
        "num_classes": network.num_classes,
        "input_size": (about.model.channels, *about.image_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": about.mean,
        "std": about.std,
        "first_conv": "stem.conv" if hierarchical else "patch_embed.proj",
        "classifier": "head",
    }
    if not features_only:
        return network.eval()
    if out_indices is None:
        out_indices = range(4) if hierarchical else [-1]
    getter = DyViTFeatures if hierarchical else FeatureGetterNet
    try:
        features: Any = getter(network, tuple(out_indices), norm=norm)
    except (AssertionError, IndexError):
        raise BadInput(
            f"out_indices {tuple(out_indices)}: {directory} has {len(network.feature_info)} maps, from 0 on"
        ) from None
    features.pretrained_cfg = features.default_cfg = network.pretrained_cfg
    return features.eval()
