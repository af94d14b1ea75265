"""Layer-wise learning-rate decay: the further from the head, the lower the rate of an encoder layer.

The rate of layer i is `base * decay ** (n - i)`: the stem is layer 0, each of the n - 1 blocks is one layer
(a merge belongs to the block after it, the last norm to the last block), and everything outside the encoder
is layer n, with the full rate (BEiT, Bao et al. 2021, app. H; after ELECTRA, Clark et al. 2020, app. A).
"""

from __future__ import annotations

import logging
import math
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn

from coma.errors import BadInput
from coma.models import Encoder
from downstream.configs.schedule import MULTIPLIERS, SETTINGS
from downstream.openmmlab.backbones import DyViT, PlainViT

log = logging.getLogger(__name__)
CUSTOM = ("lr_mult", "decay_mult", "lr", "weight_decay")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Optimizer groups for a model whose backbone is `DyViT` or `PlainViT`.

        optim_wrapper=dict(
            constructor='LayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=0.8, custom_keys=dict(neck=dict(lr_mult=2.0)), norm_decay_mult=0.0),
            ...,
        )

    Other settings of `paramwise_cfg` mean what they mean for mmengine's `DefaultOptimWrapperConstructor`, and
    the decay multiplies the rates that they give; an `lr` of `custom_keys` is a rate of its own, which is not
    multiplied. There are two other defaults: vectors (biases, norms, tokens) and what the encoder's
    `no_weight_decay()` names have no weight decay unless a setting gives them one, and `bypass_duplicate` is
    True: a parameter that two modules share is optimized once.

    Raises:
        BadInput: settings that are unknown or out of range, or another backbone.
    """

    def _validate_cfg(self) -> None:
        given = self.paramwise_cfg
        try:
            super()._validate_cfg()
        except (TypeError, ValueError) as error:
            raise BadInput(f"LayerDecayConstructor: {error}") from error
        if fault := _fault(given):
            raise BadInput(f"LayerDecayConstructor: paramwise_cfg {dict(given)}: {fault}")
        if self.base_lr is None:
            raise BadInput("LayerDecayConstructor: the optimizer needs lr")
        self.paramwise_cfg = {"bypass_duplicate": True, **given}

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Appends the groups of mmengine's rules; for the whole model, decayed by layer and merged."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # the default constructor calls this method for every part of the model
            return
        params[:] = self._merge(params, module)
        decayed = [group for group in params if group.get("weight_decay") != 0]
        rates = ", ".join(f"{len(group['params'])} at {group['lr']:.3g}" for group in decayed)
        log.info("layer-wise learning rates, matrices: %s", rates)

    def _merge(self, singles: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        """Returns a group for each layer and set of options, from the stem to the heads."""
        layers, exempt = _encoder_layers(model)
        top = max(layers.values()) + 1
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        custom = self.paramwise_cfg.get("custom_keys", {})
        if idle := [key for key in custom if not any(key in name for name in names.values())]:
            log.warning("custom_keys: %s: no parameter has this in its name", ", ".join(idle))
        groups: dict[tuple[int, bool, str], dict[str, Any]] = {}
        for options in singles:
            (parameter,) = options.pop("params")
            name = names[id(parameter)]
            layer = layers.get(name, top)
            key = next((key for key in sorted(sorted(custom), key=len, reverse=True) if key in name), None)
            options.setdefault("lr", self.base_lr)
            if "lr" not in custom.get(key, {}):
                options["lr"] *= self.paramwise_cfg["decay_rate"] ** (top - layer)
            if key is None and (parameter.ndim < 2 or name in exempt):
                options.setdefault("weight_decay", 0.0)
            kind = (layer, options.get("weight_decay") != 0, repr(sorted(options.items())))
            group = groups.setdefault(kind, {**options, "params": [], "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
        return [groups[kind] for kind in sorted(groups)]


def _fault(settings: dict[str, Any]) -> str:
    """Returns what is wrong with the settings of the constructor, or nothing."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        return f"has no {', '.join(unknown)}; it may hold {', '.join(SETTINGS)}"
    if not _is_number(settings.get("decay_rate")) or not 0 < settings["decay_rate"] <= 1:
        return "decay_rate must be above 0 and up to 1"
    multipliers = {name: settings[name] for name in MULTIPLIERS if name in settings}
    for key, options in settings.get("custom_keys", {}).items():
        if not isinstance(options, dict):
            return f"custom_keys {key!r} must be a dict, such as dict(lr_mult=0.1)"
        multipliers |= {f"{key}.{name}": options[name] for name in CUSTOM if name in options}
    wrong = [name for name, value in multipliers.items() if not _is_number(value) or value < 0]
    return f"{wrong[0]} must be a number from 0 on" if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _encoder_layers(model: nn.Module) -> tuple[dict[str, int], set[str]]:
    """Returns the layer of every parameter of a model's encoder, and the names that have no weight decay.

    Raises:
        BadInput: the model's `backbone` is not one of ours.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, DyViT | PlainViT):
        raise BadInput(
            f"LayerDecayConstructor: needs backbone DyViT or PlainViT, not {type(backbone).__name__}"
        )
    layers = {f"backbone.encoder.{name}": i for name, i in encoder_layers(backbone.encoder).items()}
    return layers, {f"backbone.encoder.{name}" for name in backbone.encoder.no_weight_decay()}


def encoder_layers(encoder: Encoder) -> dict[str, int]:
    """Returns the layer of every encoder parameter: 0 is the stem, 1 the first block."""
    groups: Any = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    return {name: int(layer) for name, layer in groups.items()}
