"""Every method and every encoder, each listed once: whoever needs a list of them asks here.

To add a method, write its settings (a frozen dataclass that derives from `coma.config.ObjectiveConfig`) and
its objective (a class that derives from `coma.objectives.MaskedPixels`), and add one entry to `METHODS`.
Flags, help texts, `config.json`, artifacts and the training loop then know it. Classes are named by
"module:Class" and imported on first use, so that this module needs neither torch nor the settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named choice of settings: what `--method NAME` or `--model NAME` stands for.

    Attributes:
        help: Description of the preset, for the help text of the flag.
        settings: Settings that differ from their defaults.
    """

    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A pre-training method; its key in `METHODS` is the `method` in config.json.

    Attributes:
        config: Class of its settings.
        objective: Class of its objective; it is built from settings, encoder and, if the settings have a
            `teacher`, the teacher or None.
        presets: Values of `--method`.
        masks: Kind of masks that the demo shows for its models.
    """

    config: str
    objective: str
    presets: Mapping[str, Preset]
    masks: str = "mae"


@dataclass(frozen=True)
class Architecture:
    """An encoder; its key in `ARCHITECTURES` is the `architecture` in config.json.

    Attributes:
        config: Class of its settings.
        encoder: Class of the encoder, built from its settings.
        classifier: Class of the encoder under a linear head, built from settings and a number of classes.
        presets: Values of `--model`.
        by_name: Function that returns the settings of a network from its name and the channels of its
            images: `--model KEY:NAME`. None where there are only presets.
    """

    config: str
    encoder: str
    classifier: str
    presets: Mapping[str, Preset] = field(default_factory=dict)
    by_name: str | None = None


METHODS = {
    "coma": Method(
        "coma.config:CoMAConfig",
        "coma.objectives.coma:CoMA",
        {
            "coma": Preset("two complementary views"),
            "coma4": Preset("four complementary views", {"views": 4}),
            "coma-independent": Preset("control: two unrelated masks", {"masks": "independent"}),
            "coma-single": Preset("control: one of the two views", {"masks": "single"}),
        },
        masks="coma",
    ),
    "mae": Method(
        "coma.config:MAEConfig",
        "coma.objectives.mae:MAE",
        {"mae": Preset("one view of a quarter of the image")},
    ),
    "beyond": Method(
        "coma.config:BeyondConfig",
        "coma.objectives.beyond:Beyond",
        {"beyond": Preset("degradations other than masks (Beyond Masking), see --degrade")},
        masks="zoom-in",
    ),
    "cmt": Method(
        "coma.config:CMTConfig",
        "coma.objectives.cmt:CMT",
        {"cmt": Preset("masks and targets from a frozen teacher and the model's moving average (CMT-MAE)")},
        masks="guided",
    ),
    "coma-balanced": Method(
        "coma.config:BalancedCoMAConfig",
        "coma.objectives.balanced:BalancedCoMA",
        {"coma-balanced": Preset("coma, with views that get equal shares of a teacher's attention")},
        masks="coma",
    ),
}

ARCHITECTURES = {
    "dyvit": Architecture(
        "coma.config:DyViTConfig",
        "coma.models.dyvit:DyViT",
        "coma.models.classifiers:DyViTClassifier",
        {
            "tiny": Preset("3.1 M", {"dim": 32, "depths": (1, 1, 6, 2), "heads": (2, 4, 8, 16)}),
            "small": Preset("15.5 M", {"dim": 64, "depths": (1, 1, 10, 2), "heads": (2, 2, 4, 8)}),
            "base": Preset("34.8 M", {"dim": 96, "depths": (1, 1, 10, 2), "heads": (2, 4, 6, 12)}),
            "large": Preset("119.8 M", {"dim": 144, "depths": (1, 1, 20, 2), "heads": (2, 6, 12, 24)}),
        },
    ),
    "vit": Architecture(
        "coma.config:ViTConfig",
        "coma.models.vit:ViT",
        "coma.models.classifiers:ViTClassifier",
        {
            "vit-tiny": Preset("5.5 M", {"dim": 192, "depth": 12, "heads": 3}),
            "vit-small": Preset("21.6 M", {"dim": 384, "depth": 12, "heads": 6}),
            "vit-base": Preset("85.6 M", {"dim": 768, "depth": 12, "heads": 12}),
            "vit-large": Preset("303 M", {"dim": 1024, "depth": 24, "heads": 16}),
        },
    ),
    "timm": Architecture(
        "coma.config:TimmConfig",
        "coma.models.timm_vit:TimmViT",
        "coma.models.classifiers:TimmViTClassifier",
        by_name="coma.models.timm_vit:timm_config",
    ),
}


def resolve(name: str) -> Any:
    """Imports the class that is named by "module:Class"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def presets(table: Mapping[str, Method] | Mapping[str, Architecture]) -> dict[str, Preset]:
    """Returns all presets of `METHODS` or `ARCHITECTURES` by name, in the order of the table."""
    return {name: preset for entry in table.values() for name, preset in entry.presets.items()}


def entry_of(config: Any) -> Any:
    """Returns the entry, in either table, whose settings these are.

    Raises:
        TypeError: settings of a class that is in no entry.
    """
    kind = type(config)
    for entry in (*METHODS.values(), *ARCHITECTURES.values()):
        if entry.config.rpartition(":")[2] == kind.__name__ and resolve(entry.config) is kind:
            return entry
    raise TypeError(f"{kind.__name__} is in no entry of coma.registry")
