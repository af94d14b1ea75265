"""Description of an artifact, as plain frozen data: what its `config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from coma.config import EncoderConfig, ObjectiveConfig, view_size
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.ranges import MEAN, SIDE, STD, Ranged

FORMAT_VERSION = 2


Kind = Literal["backbone", "pretrained", "classifier", "detector", "segmentor"]


@dataclass(frozen=True)
class Origin:
    """Weights that a training started from."""

    name: str
    """Name of the artifact or file, or `timm:NAME` or `hf-hub:ORG/NAME`."""
    sha256: str
    """SHA-256 of the file of weights."""


@dataclass(frozen=True)
class ArtifactConfig(Ranged):
    """Everything needed to rebuild the model and to feed it images.

    Raises:
        BadInput: values that contradict each other; the message names them.
    """

    flags = ""

    kind: Kind
    """backbone: an encoder. pretrained: encoder and decoder. The others: a fine-tuned model."""
    model: EncoderConfig
    objective: ObjectiveConfig | None
    """Settings of the pre-training objective; required of kind `pretrained`, whose decoder it describes."""
    image_size: Annotated[ImageSize, SIDE]
    """Height and width of the images that the encoder was trained on; one number in files if it is square."""
    mean: Annotated[tuple[float, ...], MEAN]
    """Per-channel mean of pixels scaled to 0..1."""
    std: Annotated[tuple[float, ...], STD]
    """Per-channel standard deviation of pixels scaled to 0..1."""
    class_names: tuple[str, ...] | None
    trained: dict[str, Any]
    """Plain facts: method, steps, images_seen, loss, name of the data. Values that JSON can hold."""
    versions: dict[str, str]
    """Versions of Python and the libraries that wrote it; see `coma.artifact.library_versions`."""
    head: dict[str, Any] | None = None
    """What a fine-tuned model has beside the encoder, as plain data: the room that made it rebuilds it from
    this. None where there is nothing to say (backbone, pretrained)."""
    format_version: int = FORMAT_VERSION
    init: Origin | None = None
    """Name and SHA-256 of the weights that pre-training started from; None: random weights, or not known."""

    @property
    def view_size(self) -> ImageSize:
        """Size of the images that pre-training rebuilt: larger, where it zooms in."""
        return view_size(self.image_size, self.model.unit, self.objective)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image_size", ImageSize.of(self.image_size))  # code may give a number
        channels, unit = self.model.channels, self.model.unit
        if not len(self.mean) == len(self.std) == channels:
            raise BadInput(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give one for each of "
                f"{channels} channels"
            )
        if min(self.image_size) < unit:
            raise BadInput(f"image size {self.image_size} px is smaller than a mask unit of {unit} px")
        if self.class_names is not None and not (self.class_names and all(self.class_names)):
            raise BadInput("class names must be at least one name, none of them empty")
        if self.kind == "pretrained" and self.objective is None:
            raise BadInput("an artifact of kind 'pretrained' needs its objective")
