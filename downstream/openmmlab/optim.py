"""Layer-wise learning-rate decay: the further from the head, the lower the rate of an encoder layer.

The rate of layer i is `base * decay ** (n - i)`: the stem is layer 0, each of the n - 1 blocks is one layer
(a merge belongs to the block after it, the last norm to the last block), and everything outside the encoder
is layer n, with the full rate (BEiT, Bao et al. 2021, app. H; after ELECTRA, Clark et al. 2020, app. A).
"""

from __future__ import annotations

import logging
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from coma.errors import BadInput
from coma.models import Encoder
from downstream.openmmlab.backbones import DyViT, PlainViT

log = logging.getLogger(__name__)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimizer groups for a model whose backbone is `DyViT` or `PlainViT`.

    `optim_wrapper=dict(constructor='LayerDecayConstructor', paramwise_cfg=dict(decay_rate=0.8), ...)`.
    Vectors (biases, norms, tokens) and what the encoder's `no_weight_decay()` names have no weight decay.
    """

    def _validate_cfg(self) -> None:
        rate = self.paramwise_cfg.get("decay_rate") or 0.0
        if set(self.paramwise_cfg) != {"decay_rate"} or not 0 < rate <= 1:
            raise BadInput(
                f"LayerDecayConstructor: paramwise_cfg {dict(self.paramwise_cfg)} must be "
                "dict(decay_rate=...), above 0 and up to 1"
            )
        if self.base_lr is None:
            raise BadInput("LayerDecayConstructor: the optimizer needs lr")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, *_: Any, **__: Any) -> None:
        """Appends one group per learning rate and weight decay; see `parameter_groups`."""
        decay = self.base_wd or 0.0
        groups = parameter_groups(module, self.base_lr, decay, self.paramwise_cfg["decay_rate"])
        params.extend(groups)
        names = ", ".join(f"{len(g['params'])} at {g['lr']:.3g}" for g in groups if g["weight_decay"])
        log.info("layer-wise learning rates, matrices: %s", names)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, decay_rate: float
) -> list[dict[str, Any]]:
    """Returns groups with `params`, `names`, `lr` and `weight_decay`, from the stem to the heads.

    Raises:
        BadInput: the model's `backbone` is not one of ours.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, DyViT | PlainViT):
        raise BadInput(
            f"LayerDecayConstructor: needs backbone DyViT or PlainViT, not {type(backbone).__name__}"
        )
    layers = {f"backbone.encoder.{name}": i for name, i in encoder_layers(backbone.encoder).items()}
    exempt = {f"backbone.encoder.{name}" for name in backbone.encoder.no_weight_decay()}
    top = max(layers.values()) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layers.get(name, top), parameter.ndim > 1 and name not in exempt
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "lr": lr * decay_rate ** (top - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def encoder_layers(encoder: Encoder) -> dict[str, int]:
    """Returns the layer of every encoder parameter: 0 is the stem, 1 the first block."""
    groups: Any = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    return {name: int(layer) for name, layer in groups.items()}
