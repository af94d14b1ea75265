"""The models of the page: only those given when it starts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from coma.artifact import ArtifactConfig, load_artifact
from coma.artifact.load import artifact_hash
from coma.config import EncoderConfig
from coma.errors import BadInput, ComaError
from coma.models import Encoder
from coma.paths import exports_beside
from coma.registry import ARCHITECTURES, entry_of, resolve
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GRAPH_KINDS, GraphKind, ModelSpec
from coma.runtimes.names import SUFFIXES, Device
from coma.runtimes.open import open_runtime
from demo.runtimes import Exported, RuntimeOption, exported_files, runtime_options, verified_file
from demo.training_data import TrainingImages


@dataclass
class Model:
    """One set of weights and its runtimes.

    Attributes:
        name: Unique name on the page.
        kind: backbone, pretrained, classifier, segmentor or detector.
        config: Configuration of the artifact; None where only exported files were given.
        artifact: Directory of the artifact; None where only exported files were given.
        files: Exported files of these weights.
        device: Device for PyTorch and ONNX Runtime.
    """

    name: str
    kind: str
    config: ArtifactConfig | None
    artifact: Path | None
    files: list[Exported]
    device: Device = "cpu"
    _options: dict[str, list[RuntimeOption]] = field(default_factory=dict, repr=False)
    _opened: dict[RuntimeOption, Runtime] = field(default_factory=dict, repr=False)
    _encoder: Encoder | None = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def forms(self) -> tuple[GraphKind, ...]:
        """Returns the graphs that at least one runtime can run."""
        possible = GRAPH_KINDS[self.kind]
        return tuple(form for form in possible if any(not option.reason for option in self.options(form)))

    def options(self, form: GraphKind) -> list[RuntimeOption]:
        """Returns the runtimes of one graph, available ones first."""
        with self._lock:
            if form not in self._options:
                self._options[form] = runtime_options(self.files, form, self.artifact, self.device)
            return list(self._options[form])

    def runtime(self, form: GraphKind, title: str | None = None) -> Runtime:
        """Opens a runtime, or returns the open one; by default the first that is available.

        Raises:
            BadInput: an unknown title, or a runtime that is not available or does not open.
        """
        options = self.options(form)
        chosen = next((option for option in options if option.title == title or title is None), None)
        if chosen is None:
            raise BadInput(f"{self.name} has no runtime {title!r}.")
        if chosen.reason or chosen.path is None:
            raise BadInput(f"{chosen.title} is not available: {chosen.reason}.")
        with self._lock:
            if chosen not in self._opened:
                self._opened[chosen] = open_runtime(chosen.path, chosen.device, form)
            return self._opened[chosen]

    def description(self, form: GraphKind) -> ModelSpec:
        """Returns the specification of the model by its first runtime."""
        return self.runtime(form).spec

    @property
    def norm_pix(self) -> bool:
        """Returns whether the model predicts normalised patches (False where only files were given)."""
        objective = self.config.objective if self.config else None
        return bool(objective and getattr(objective, "norm_pix", False))

    @property
    def undoes(self) -> str | None:
        """Returns the degradation that the model learned to undo; None if it reconstructs masks."""
        objective = self.config.objective if self.config else None
        degraded = getattr(objective, "degrade", None)
        return (
            None if objective is None or objective.zooms_in or getattr(objective, "masks", True) else degraded
        )

    @property
    def zooms_in(self) -> bool:
        """Returns whether the model sees only the centre (False where only files were given)."""
        objective = self.config.objective if self.config else None
        return bool(getattr(objective, "zooms_in", False))

    @property
    def method(self) -> str:
        """Returns the key of `demo.masking.METHODS` closest to the training of the model."""
        objective = self.config.objective if self.config else None
        if objective is None:
            return "coma"
        masks = self.undoes or entry_of(objective).masks
        return "coma4" if masks == "coma" and getattr(objective, "views", 2) > 2 else masks

    @cached_property
    def trained_on(self) -> TrainingImages | None:
        """Returns the images that it was trained on; None where they are not known."""
        try:
            return TrainingImages(self.artifact) if self.artifact else None
        except BadInput:
            return None

    @property
    def label(self) -> str:
        """Returns method, backbone, image size and data as one line."""
        if self.config is None:
            return "exported file"
        about, trained = self.config, self.config.trained
        parts = [str(trained.get("method") or self.kind), _backbone(about.model)]
        parts.append(f"{about.image_size} px")
        if trained.get("data"):
            parts.append(f"trained on {trained['data']} ({trained.get('images', '?')} images)")
        return ", ".join(parts)

    def encoder(self) -> Encoder:
        """Returns the encoder in PyTorch, for introspection.

        Raises:
            BadInput: only exported files were given, or the kind has no encoder.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = _load_encoder(self)
            return self._encoder

    def class_names(self) -> tuple[str, ...]:
        """Returns the class names of a fine-tuned model."""
        about = self.description(cast(GraphKind, self.kind))
        return about.class_names or ()

    def palette(self) -> list[tuple[int, int, int]]:
        """Returns a colour for every class."""
        from downstream.datasets.label_classes import default_palette

        head: dict[str, Any] = (self.config.head if self.config else None) or {}
        colours = head.get("palette") or default_palette(max(len(self.class_names()), 1))
        return [(int(r), int(g), int(b)) for r, g, b in colours]


class Models:
    """The models of the page by name.

    Args:
        given: Artifacts and exported files. Files of the same weights form one model, with those that
            `coma export` wrote to `export` beside the artifact.
        device: Device for PyTorch and ONNX Runtime.

    Raises:
        BadInput: a path that is neither an artifact nor a verified file, or is damaged.
    """

    def __init__(self, given: Sequence[Path], device: Device = "cpu") -> None:
        self._models: dict[str, Model] = {}
        artifacts = [path for path in given if path.suffix not in SUFFIXES.values()]
        by_source: dict[str, Model] = {}
        for path in dict.fromkeys(artifacts):
            config = load_artifact(path).config
            source = artifact_hash(path)
            if source in by_source:
                continue
            model = Model(self._name(path), config.kind, config, path, _beside(path, source), device)
            by_source[source] = self._models[model.name] = model
        for path in dict.fromkeys(each for each in given if each not in artifacts):
            entry = verified_file(path)
            if entry.source not in by_source:
                model = Model(self._name(path), entry.kind, None, None, [], device)
                by_source[entry.source] = self._models[model.name] = model
            model = by_source[entry.source]
            if all(known.path.resolve() != path.resolve() for known in model.files):
                model.files.append(entry)
        if not self._models:
            raise BadInput("no model was given; name an artifact or an exported file")

    @property
    def names(self) -> list[str]:
        """Returns the names in the order given."""
        return list(self._models)

    def __getitem__(self, name: str) -> Model:
        """Returns a model.

        Raises:
            BadInput: no model has this name.
        """
        if name not in self._models:
            raise BadInput("There is no such model; choose one from the list.")
        return self._models[name]

    def having(self, form: GraphKind) -> list[Model]:
        """Returns the models that can run this graph."""
        return [model for model in self._models.values() if form in model.forms]

    def with_encoder(self) -> list[Model]:
        """Returns the models whose encoder can be loaded in PyTorch."""
        kinds = ("backbone", "pretrained", "classifier")
        return [model for model in self._models.values() if model.artifact and model.kind in kinds]

    def _name(self, path: Path) -> str:
        """Returns a short, unique name: the folder of the run or the artifact, never a whole path."""
        parts = [part for part in path.resolve().parts if part not in ("artifact", "run", "export", "/")]
        name = " / ".join(parts[-1:]) if path.suffix == "" else path.name
        names = (name, *(f"{name} ({number})" for number in range(2, len(self._models) + 2)))
        return next(each for each in names if each not in self._models)


def _backbone(config: EncoderConfig) -> str:
    """Returns the name of the preset, or that of the network or the class."""
    for architecture in ARCHITECTURES.values():
        for name, preset in architecture.presets.items():
            same = all(getattr(config, key, None) == value for key, value in preset.settings.items())
            if preset.settings and same and isinstance(config, resolve(architecture.config)):
                return name
    return getattr(config, "name", type(config).__name__.removesuffix("Config"))


def _beside(artifact: Path, source: str) -> list[Exported]:
    """Returns the files of these weights in `export` beside an artifact."""
    try:
        return [entry for entry in exported_files(exports_beside(artifact)) if entry.source == source]
    except ComaError:  # no folder of exports
        return []


def _load_encoder(model: Model) -> Encoder:
    from coma.artifact import load_classifier, load_encoder

    if model.artifact is None:
        raise BadInput("Only exported files of this model were given; introspection needs the artifact.")
    if model.kind == "classifier":
        return cast(Encoder, load_classifier(model.artifact))
    return load_encoder(model.artifact)
