"""Settings of the pre-training objectives, as plain frozen data without torch.

Help texts say which values are published and which are this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from coma.errors import BadInput
from coma.ranges import DEPTH, HEADS, INSIDE, SHARE, VIEWS, WIDTH, Ranged
from coma.registry import METHODS, presets, resolve

AttentionQuery = Literal["auto", "class", "mean"]
Degradation = Literal[
    "zoom-in", "zoom-out", "distort", "blur", "decolor", "zoom-in+mask", "zoom-out+mask", "zoom-in+coma"
]
Padding = Literal["zeros", "edge"]


@dataclass(frozen=True)
class DecoderConfig(Ranged):
    """Light transformer that predicts hidden units from the encoder's features; all views share it."""

    flags = "--objective.decoder."

    dim: Annotated[int, WIDTH] = 512
    depth: Annotated[int, DEPTH] = 4
    heads: Annotated[int, HEADS] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads or self.dim % 4:
            raise BadInput(f"decoder dim {self.dim} must be a multiple of 4 and of its {self.heads} heads")


class ObjectiveConfig(Ranged):
    """Base of every method's settings: what all methods have, and what only some have."""

    flags = "--objective."

    norm_pix: bool
    decoder: DecoderConfig
    teacher: TeacherConfig | None = None
    """The network that guides the method; None where it needs none."""
    __dataclass_fields__: ClassVar[dict[str, Any]]  # subclasses are dataclasses

    @property
    def zooms_in(self) -> bool:
        """Whether the encoder sees only the centre of what is predicted."""
        return False


@dataclass(frozen=True)
class CoMAConfig(ObjectiveConfig):
    """Complementary masks: every pixel is supervised in every step (CoMA, Li et al. 2025)."""

    views: Annotated[int, VIEWS] = 2
    """K: the mask units are split into K groups, and each group predicts all the others."""
    masks: Literal["complementary", "independent", "single"] = "complementary"
    """complementary: the K groups together cover the image. Controls for ablations: independent draws K
    unrelated masks of the same ratio; single uses one view."""
    norm_pix: bool = True
    """Predict pixels that are normalised per mask unit (MAE, sec. 4.1) instead of plain pixels."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass(frozen=True)
class MAEConfig(ObjectiveConfig):
    """Masked autoencoder, the baseline (He et al. 2021)."""

    mask_ratio: Annotated[float, INSIDE] = 0.75
    """Share of the mask units that the encoder does not see."""
    norm_pix: bool = True
    """Predict pixels that are normalised per mask unit (MAE, sec. 4.1) instead of plain pixels."""
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=8))


@dataclass(frozen=True)
class BeyondConfig(ObjectiveConfig):
    """Degradations other than masks ("Beyond Masking", Tian et al. 2022, arXiv 2203.14313)."""

    degrade: Degradation = "zoom-in+mask"
    """Degradation of the input. In the paper's order of fine-tuned accuracy: zoom-in+mask, masks alone
    (--method mae), zoom-in, zoom-out, distort, blur, decolor. The authors' start script masks zoom-out too:
    zoom-out+mask. Ours: zoom-in+coma; decolor's weights for each image and its grey in three channels (the
    authors': once a step, in one); blur's kernels, divided by their sums."""
    mask_ratio: Annotated[float, INSIDE] = 0.75
    """zoom-in+mask and zoom-out+mask: share of the mask units (zooming in, of the centre's) that the encoder
    does not see (value of the paper)."""
    views: Annotated[int, VIEWS] = 2
    """zoom-in+coma: number of groups into which the centre's units are split; each predicts the others."""
    border_weight: Annotated[float, INSIDE] = 0.5
    """zoom-in+mask and zoom-in+coma: weight of the border around the centre in the loss; the hidden part of
    the centre has the rest. The authors' code weighs the centre's mean error by 0.8 and the sum of four
    strips' mean errors by 0.2, which makes both equal. Plain zoom-in weighs all pixels equally."""
    padding: Padding = "zeros"
    """distort: what is seen beyond the image. zeros: black, or the mean of normalised pixels (the authors'
    code); edge: the pixels of the edge (ours)."""
    norm_pix: bool = True
    """Predict pixels that are normalised per mask unit (MAE, sec. 4.1) instead of plain pixels."""
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(384, 4, 12))
    """Width and depth are those of the authors' code."""

    @property
    def zooms_in(self) -> bool:
        """Whether the encoder sees the centre of a larger view."""
        return self.degrade.startswith("zoom-in")

    @property
    def masks(self) -> bool:
        """Whether units are hidden, other than by zooming in."""
        return self.degrade.endswith(("+mask", "+coma"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in _USED_BY.items():
            value, default = getattr(self, name), getattr(BeyondConfig, name)
            if self.degrade not in kinds and value != default:
                raise BadInput(
                    f"--objective.{name.replace('_', '-')} {value} belongs to {' and '.join(kinds)}; "
                    f"{self.degrade} does not use it; leave it at {default}"
                )


_USED_BY: Mapping[str, tuple[Degradation, ...]] = {
    "mask_ratio": ("zoom-in+mask", "zoom-out+mask"),
    "views": ("zoom-in+coma",),
    "border_weight": ("zoom-in+mask", "zoom-in+coma"),
    "padding": ("distort",),
}
"""Settings of `BeyondConfig` that only some degradations use."""


@dataclass(frozen=True)
class TeacherConfig(Ranged):
    """A frozen network that guides masks or targets."""

    flags = "--objective.teacher."

    name: str = "vit_base_patch16_clip_quickgelu_224.openai"
    """A vision transformer by its name in timm (also as timm:NAME), or the directory of an artifact. CLIP
    ViT-B/16 is the teacher published for CMT-MAE."""
    weights: Path | None = None
    """The teacher's .safetensors file. Default: the one in the local cache of the model hub; nothing is
    downloaded."""
    sha256: str | None = None
    """SHA-256 of the teacher's weights, and of how an artifact says to use them. It is filled in when the run
    starts and checked when it resumes."""
    block: Annotated[int, DEPTH] = 1
    """Block whose attention is read, counted from the last one, which is 1; the attention is averaged over
    the heads. (Our choice.)"""
    query: AttentionQuery = "auto"
    """Query of the attention: the class token, or the mean over all patches. auto uses the class token if the
    teacher was trained with one. (Our choice.)"""


@dataclass(frozen=True)
class CMTConfig(ObjectiveConfig):
    """Masks and targets made by a teacher and the student's moving average (CMT-MAE, Mo 2024)."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    mask_share: Annotated[float, SHARE] = 0.5
    """a in A = a A_teacher + (1 - a) A_student, the attention that guides the masks. The linear sum is
    published; the paper's value was not available, so this one is our choice."""
    student_block: Annotated[int, DEPTH] = 1
    """Block of the averaged student whose attention is A_student, counted from the last one (of DyViT, within
    its last stage). The attention is averaged over heads and, as no class token is trained, over all queries.
    (Our choice.)"""
    hide: Literal["attended", "ignored"] = "attended"
    """attended: hidden units are drawn in proportion to A. ignored: visible units are. (Our choice.)"""
    mask_ratio: Annotated[float, INSIDE] = 0.75
    """Share of the mask units that the encoder does not see. (Our choice: MAE's value.)"""
    random_share: Annotated[float, SHARE] = 0.1
    """Share of the run, at its beginning, that uses random masks. (Our choice.)"""
    target_share: Annotated[float, SHARE] = 0.5
    """Weight of the teacher's features in the target; the averaged student's features have the rest. Both
    targets are published; the paper's weight was not available, so this one is our choice."""
    distance: Literal["cosine", "smooth-l1"] = "cosine"
    """Loss between predicted and target features. (Our choice.)"""
    norm_targets: bool = True
    """Normalise the target features, which are those of the last layers, over their channels (LayerNorm
    without weights). (Our choice.)"""
    ema_decay: Annotated[float, SHARE] = 0.996
    """Decay of the averaged student at the first step. The moving average is the paper's (by summaries of
    it); the schedule (BYOL's) is our choice."""
    ema_decay_end: Annotated[float, SHARE] = 1.0
    """Decay of the averaged student at the last step; in between it follows half a cosine. (Our choice.)"""
    norm_pix: bool = True
    """Normalise pixels per mask unit for the linear head that draws reconstructions; the loss uses
    features."""
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(depth=8))


@dataclass(frozen=True)
class BalancedCoMAConfig(CoMAConfig):
    """Complementary masks whose views get nearly equal shares of a teacher's attention (our own)."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks != "complementary":
            raise BadInput(f"balanced views are complementary; masks {self.masks!r} cannot be balanced")


METHOD_PRESETS = tuple(presets(METHODS))


def method_preset(name: str, *, decoder_dim: int = 512, decoder_depth: int | None = None) -> ObjectiveConfig:
    """Returns the settings of the preset `name`, with a decoder of its own depth unless one is given.

    The decoder is `decoder_dim` wide at most, or as wide as the method's own.

    Raises:
        BadInput: no preset has that name.
    """
    for method in METHODS.values():
        if preset := method.presets.get(name):
            settings: ObjectiveConfig = resolve(method.config)(**preset.settings)
            dim, depth = min(decoder_dim, settings.decoder.dim), decoder_depth or settings.decoder.depth
            return replace(settings, decoder=DecoderConfig(dim, depth, max(dim // 32, 1)))
    raise BadInput(f"no method {name!r}; there are: {', '.join(METHOD_PRESETS)}")
