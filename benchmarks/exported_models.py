"""What `exports.py` exports: our models, of artifacts or of random weights, and timm's beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from coma.artifact import (
    LINEAR_HEAD,
    ArtifactConfig,
    library_versions,
    load_artifact,
    save_artifact,
)
from coma.artifact.load import artifact_hash
from coma.config import encoder_preset, method_preset
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.objectives import build_objective
from coma.runtimes.model_spec import (
    ExportableModel,
    GraphKind,
    ModelSpec,
    Precision,
    Preprocessing,
    TensorSpec,
)
from export.graphs.load import load_exportable

KINDS = ("encoder", "reconstructor", "classifier", "segmentor", "detector", "detector-plugin-free")
PEERS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "convnext_tiny")
CLASSES = 1000
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Model:
    """Something to export.

    Attributes:
        name: For the table, and for file names.
        weights: What they are: "random", "trained", "trained, random head".
        side: Height and width in pixels.
        load: Makes it anew, in fp32.
        precisions: To export it in.
        calibrate: Images that give int8 its ranges.
        verify: Images to compare on.
        plugin_free: Whether its files do without NonMaxSuppression and RoiAlign.
    """

    name: str
    weights: str
    side: int
    load: Callable[[], ExportableModel]
    precisions: tuple[Precision, ...]
    calibrate: Path | None
    verify: Path | None
    plugin_free: bool = False


class Peer(nn.Module):
    """A classifier of timm in the form of ours: images to a tuple of outputs, float32 at both ends.

    Hiera's attention has five axes, for which torch.onnx knows no fused one: to be exported it is written out
    (`spell_out`), as torch.onnx does with that of the others; PyTorch runs all of them fused.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = timm.create_model(name, num_classes=CLASSES)
        head = cast(nn.Linear, cast(Any, self.model).get_classifier())
        nn.init.normal_(head.weight, std=0.02)  # Hiera's is zero, and with it all that there is to compare

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Images `[b, 3, H, W]` to logits `[b, classes]`."""
        dtype = next(self.model.parameters()).dtype
        return (self.model(images.to(dtype)).float(),)

    def spell_out(self) -> None:
        """Attention as products and a softmax."""
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                cast(Any, module).fused_attn = False


def load_peer(name: str) -> ExportableModel:
    """A peer with what our exporter wants to know of it."""
    spec = ModelSpec(
        graph="classifier",
        precision="fp32",
        inputs=(TensorSpec("images", "float32", ("batch", 3, "height", "width")),),
        outputs=(TensorSpec("logits", "float32", ("batch", CLASSES)),),
        preprocessing=Preprocessing("centre-square", (224, 224), _MEAN, _STD),
        unit=32,
        class_names=None,
        source=f"timm {timm.__version__} {name}, seed 0",
        versions=library_versions(),
    )
    return ExportableModel(Peer(name).eval().requires_grad_(False), spec)


def models_of(args: argparse.Namespace, precisions: tuple[Precision, ...]) -> Iterator[Model]:
    """What was asked for; artifacts that are not given are made, with random weights."""
    pretrained = args.pretrained or random_pretrained(args.work, args.preset, args.size)
    classifier = args.classifier or headed(args.work, pretrained)
    weights = "trained" if args.pretrained else "random"
    headed_weights = (
        "trained" if args.classifier else f"{weights}, random head" if args.pretrained else weights
    )
    for kind, artifact, about in (
        ("encoder", pretrained, weights),
        ("reconstructor", pretrained, weights),
        ("classifier", classifier, headed_weights),
        ("segmentor", args.segmentor, "trained"),
        ("detector", args.detector, "trained"),
        ("detector-plugin-free", args.detector, "trained"),
    ):
        if artifact is None or kind not in args.kinds:
            continue
        config = load_artifact(artifact).config
        side = -(-max(config.image_size) // config.model.unit) * config.model.unit
        graph, _, form = kind.partition("-")
        load = partial(load_exportable, artifact, cast(GraphKind, graph))
        images = getattr(args, f"{graph}_images", None) or (args.calibrate, args.verify)
        yield Model(kind, about, side, load, precisions, *images, plugin_free=bool(form))
        if args.visible_units and kind in ("encoder", "reconstructor"):
            load = partial(load, visible_units=args.visible_units)
            yield Model(f"{kind}-visible{args.visible_units}", about, side, load, precisions, *images)
    for name in args.peers:
        yield Model(name, "random", 224, partial(load_peer, name), ("fp32",), None, args.verify)


def random_pretrained(work: Path, preset: str, side: int) -> Path:
    """An artifact of kind pretrained whose weights are those it would start with."""
    model = encoder_preset(preset, side)
    torch.manual_seed(0)
    objective = build_objective(method_preset("coma"), build_encoder(model))
    config = ArtifactConfig(
        kind="pretrained",
        model=model,
        objective=method_preset("coma"),
        image_size=ImageSize.of(side),
        mean=_MEAN,
        std=_STD,
        class_names=None,
        trained={"method": "none: random weights"},
        versions=library_versions(),
    )
    return kept(work / f"pretrained-{preset}-{side}", objective.state_dict(), config)


def headed(work: Path, pretrained: Path) -> Path:
    """A classifier: the encoder of an artifact under a random head."""
    artifact = load_artifact(pretrained)
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = build_classifier(artifact.config.model, CLASSES).state_dict()
    own = {name.removeprefix("encoder."): tensor for name, tensor in artifact.tensors.items()}
    tensors |= {name: tensor for name, tensor in own.items() if name in tensors}
    names = tuple(f"class {number}" for number in range(CLASSES))
    config = replace(artifact.config, kind="classifier", objective=None, class_names=names, head=LINEAR_HEAD)
    return kept(work / f"classifier-{artifact_name(pretrained)}", tensors, config)


def artifact_name(directory: Path) -> str:
    """A name for what is made of it: its own, and what tells its weights from others."""
    return f"{directory.name}-{artifact_hash(directory)[:8]}"


def kept(directory: Path, tensors: dict[str, Tensor], config: ArtifactConfig) -> Path:
    """Save an artifact, unless the same one is there: exports know it by its hash."""
    if directory.exists():
        known = load_artifact(directory)
        same = known.config.model == config.model and known.tensors.keys() == tensors.keys()
        if same and all(torch.equal(known.tensors[name], tensor) for name, tensor in tensors.items()):
            return directory
    save_artifact(directory, tensors=tensors, config=config)
    return directory
