"""Every setting as plain frozen data, without torch: architectures, objectives and runs."""

from coma.config.architectures import (
    ENCODER_PRESETS,
    DyViTConfig,
    EncoderConfig,
    ViTConfig,
    Windows,
    dyvit_preset,
    encoder_preset,
)
from coma.config.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRecipe,
    FinetuneRunConfig,
)
from coma.config.objectives import (
    METHOD_PRESETS,
    BalancedCoMAConfig,
    BeyondConfig,
    CMTConfig,
    CoMAConfig,
    DecoderConfig,
    Degradation,
    MAEConfig,
    ObjectiveConfig,
    TeacherConfig,
    method_preset,
)
from coma.config.runs import DataConfig, OptimizerConfig, PretrainConfig, ProbeConfig, RunConfig, view_size

__all__ = [
    "ENCODER_PRESETS",
    "METHOD_PRESETS",
    "BalancedCoMAConfig",
    "BeyondConfig",
    "CMTConfig",
    "CoMAConfig",
    "DataConfig",
    "DecoderConfig",
    "Degradation",
    "DyViTConfig",
    "EncoderConfig",
    "FinetuneConfig",
    "FinetuneDataConfig",
    "FinetuneRecipe",
    "FinetuneRunConfig",
    "MAEConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RunConfig",
    "TeacherConfig",
    "ViTConfig",
    "Windows",
    "dyvit_preset",
    "encoder_preset",
    "method_preset",
    "view_size",
]
