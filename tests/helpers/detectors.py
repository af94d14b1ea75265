"""Detectors with random weights that give dozens of different boxes, and what mmdet predicts with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from downstream_data import VIT
from PIL import Image
from skimage import data
from torch import Tensor, nn

from coma.artifact import ArtifactConfig, save_artifact
from coma.config import DyViTConfig, EncoderConfig
from downstream.artifacts import build_model, finetuned_config, load_finetuned
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import load_config
from downstream.tasks.detection import Detector, preset_path

SMALL = DyViTConfig(dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((8,), (4,), (0,), (0,)))
CLASSES = ("cat", "cup", "face")
MODELS: dict[str, tuple[Detector, EncoderConfig, dict[str, Any]]] = {
    "faster-rcnn": ("faster-rcnn", VIT, {}),
    "mask-rcnn": ("mask-rcnn", SMALL, {}),
    "cascade-mask-rcnn": ("cascade-mask-rcnn", SMALL, {}),
    "retinanet": ("retinanet", VIT, {}),
    "mask-rcnn, other options": ("mask-rcnn", SMALL, {
        "data_preprocessor.pad_size_divisor": 48,
        "rpn_head.bbox_coder.clip_border": False,
        "roi_head.bbox_head.reg_class_agnostic": True,
        "roi_head.bbox_head.type": "Shared4Conv1FCBBoxHead",
        "roi_head.bbox_head.conv_out_channels": 16,
        "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 2,
        "roi_head.bbox_roi_extractor.roi_layer.aligned": False,
        "roi_head.bbox_roi_extractor.finest_scale": 10,
        "roi_head.mask_head.class_agnostic": True,
        "test_cfg.rpn.min_bbox_size": 20,
        "test_cfg.rcnn.score_thr": 0.6,
    }),
    "cascade, boxes by class": ("cascade-mask-rcnn", SMALL, {
        f"roi_head.bbox_head.{stage}.reg_class_agnostic": False for stage in range(3)
    }),
}  # fmt: skip
"""The preset, the encoder, and what else of the settings is changed."""


class Built(dict[str, tuple[Any, ArtifactConfig]]):
    """Detectors, each built when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> tuple[Any, ArtifactConfig]:
        self[name] = build(self.folder / name, *MODELS[name])
        return self[name]


def build(
    folder: Path, preset: Detector, encoder: EncoderConfig, changes: dict[str, Any]
) -> tuple[Any, ArtifactConfig]:
    """A detector with random weights that went through an artifact."""
    config = load_config(preset_path(preset))
    described = EncoderSpec(encoder, (0.45, 0.42, 0.39), (0.24, 0.23, 0.25), {"preset": "tiny"})
    set_encoder(config, described, TrainOptions(head_channels=32))
    heads = config.model.get("roi_head", config.model)
    if "roi_head.num_stages" in changes:
        heads.bbox_head = heads.bbox_head[: changes["roi_head.num_stages"]]
    for head in (heads.bbox_head, heads.get("mask_head", [])):
        for each in head if isinstance(head, list) else [head]:
            each.num_classes = len(CLASSES)
    few = {"nms_pre": 200, "max_per_img": 60}
    if "rpn" in config.model.test_cfg:
        few = {"rpn.nms_pre": 200, "rpn.max_per_img": 150, "rcnn.max_per_img": 60}
    config.merge_from_dict({f"model.test_cfg.{name}": value for name, value in few.items()})
    config.merge_from_dict({f"model.{name}": value for name, value in changes.items()})
    spec = finetuned_config("detector", config, encoder, CLASSES)
    torch.manual_seed(1)
    model = build_model(spec)
    spread(model)
    save_artifact(folder, tensors=model.state_dict(), config=spec)
    loaded = load_finetuned(folder)
    return loaded, loaded.artifact


LAST = {"rpn_cls": 2.0, "rpn_reg": 0.3, "fc_cls": 2.0, "fc_reg": 1.0, "conv_logits": 2.0,
        "retina_cls": 1.0, "retina_reg": 0.3}  # fmt: skip
"""Deviation that the outputs of the last layers shall have."""


def spread(model: Any) -> None:
    """Scale random weights until answers differ: dozens of boxes, and no two as likely as each other."""
    model.eval()
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in LAST:
            continue
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.flatten()))
        mmdet_predicts(model, photographs(128, 128, 1))
        hook.remove()
        layer.weight.data *= LAST[name.rpartition(".")[2]] / torch.cat(seen).std()
        layer.bias.data.zero_()


def photographs(height: int, width: int, count: int) -> np.ndarray:
    """`[count, height, width, 3]` uint8, RGB."""
    sources = (data.astronaut(), data.coffee(), data.chelsea())
    pictures = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in sources]
    return np.stack([np.asarray(pictures[i % 3]) for i in range(count)])


def normalised(pictures: np.ndarray, config: ArtifactConfig) -> Tensor:
    """`[b, 3, H, W]` as the module takes it."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (config.mean, config.std))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std


def mmdet_predicts(model: Any, pictures: np.ndarray) -> list[dict[str, Tensor]]:
    """Boxes, scores, labels, and, with a mask head, probabilities of each image's masks."""
    from mmdet.structures import DetDataSample

    inputs = [torch.from_numpy(each[..., ::-1].copy()).permute(2, 0, 1) for each in pictures]  # bgr
    shape = pictures.shape[1:3]
    spec = {"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
    samples = [DetDataSample(metainfo=spec) for _ in inputs]
    logits: list[Tensor] = []
    heads = getattr(getattr(model, "roi_head", None), "mask_head", None)
    heads = heads if isinstance(heads, nn.ModuleList) else [heads] if heads else []
    hooks = [head.register_forward_hook(lambda _, __, out: logits.append(out)) for head in heads]
    with torch.no_grad():
        answers = model.test_step({"inputs": inputs, "data_samples": samples})
    for hook in hooks:
        hook.remove()
    found = [answer.pred_instances for answer in answers]
    results = [{"boxes": each.bboxes, "scores": each.scores, "labels": each.labels} for each in found]
    if heads:  # they are not asked where nothing is found
        masks = (
            torch.stack([each.sigmoid() for each in logits]).mean(0) if logits else torch.zeros(0, 1, 28, 28)
        )
        for result, mask in zip(results, masks.split([len(each) for each in found]), strict=True):
            own = result["labels"] if mask.shape[1] > 1 else 0
            result["masks"] = mask[torch.arange(len(mask)), own]
    return results
