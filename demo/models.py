"""The models that the page may use: those named when it was started, and no others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from coma.artifact import ArtifactConfig, load_artifact
from coma.artifact.load import artifact_hash
from coma.errors import BadInput, ComaError
from coma.models import Encoder
from coma.registry import entry_of
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GRAPH_KINDS, GraphKind, ModelSpec
from coma.runtimes.open import Device, open_runtime
from demo.runtimes import Exported, Offer, exported_files, offers_of, verified_file


@dataclass
class Model:
    """One set of weights, and the ways to run it.

    Attributes:
        name: For the picker, unique.
        kind: backbone, pretrained, classifier, segmentor or detector.
        config: What the artifact says; None where only exported files were given.
        artifact: Its directory, likewise.
        files: Exported files of these weights.
        device: For PyTorch and ONNX Runtime.
    """

    name: str
    kind: str
    config: ArtifactConfig | None
    artifact: Path | None
    files: list[Exported]
    device: Device = "cpu"
    _offers: dict[str, list[Offer]] = field(default_factory=dict, repr=False)
    _opened: dict[Offer, Runtime] = field(default_factory=dict, repr=False)
    _encoder: Encoder | None = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def forms(self) -> tuple[GraphKind, ...]:
        """What it can be used as."""
        possible = GRAPH_KINDS[self.kind]
        return tuple(form for form in possible if any(not offer.reason for offer in self.offers(form)))

    def offers(self, form: GraphKind) -> list[Offer]:
        """Runtimes of one form; those that are not available say why, and come last."""
        with self._lock:
            if form not in self._offers:
                self._offers[form] = offers_of(self.files, form, self.artifact, self.device)
            return list(self._offers[form])

    def runtime(self, form: GraphKind, title: str | None = None) -> Runtime:
        """Open a runtime, or the one that is open; the first that is available by default.

        Raises:
            BadInput: there is none of this title, it is not available, or it does not open.
        """
        offers = self.offers(form)
        chosen = next((offer for offer in offers if offer.title == title or title is None), None)
        if chosen is None:
            raise BadInput(f"{self.name} has no runtime called {title!r}.")
        if chosen.reason or chosen.path is None:
            raise BadInput(f"{chosen.title} is not available: {chosen.reason}.")
        with self._lock:
            if chosen not in self._opened:
                self._opened[chosen] = open_runtime(chosen.path, chosen.device, form)
            return self._opened[chosen]

    def description(self, form: GraphKind) -> ModelSpec:
        """What the first runtime says of the model."""
        return self.runtime(form).spec

    @property
    def norm_pix(self) -> bool:
        """Whether it predicts pixels without mean and contrast; not known, so False, of files alone."""
        objective = self.config.objective if self.config else None
        return bool(objective and getattr(objective, "norm_pix", False))

    @property
    def undoes(self) -> str | None:
        """The degradation that it learned to undo, predicting every pixel; None if it fills in masks."""
        objective = self.config.objective if self.config else None
        return None if objective is None or getattr(objective, "zooms_in", True) else str(objective.degrade)  # type: ignore[union-attr]

    @property
    def zooms_in(self) -> bool:
        """Whether it sees the centre of a picture alone; not known, so False, of files alone."""
        objective = self.config.objective if self.config else None
        return bool(getattr(objective, "zooms_in", False))

    @property
    def method(self) -> str:
        """The key of `demo.masking.METHODS` nearest to how it was trained."""
        objective = self.config.objective if self.config else None
        if objective is None:
            return "coma"
        masks = self.undoes or entry_of(objective).masks
        return "coma4" if masks == "coma" and getattr(objective, "views", 2) > 2 else masks

    def encoder(self) -> Encoder:
        """Its encoder, to look inside.

        Raises:
            BadInput: only exported files were given, or a kind whose encoder is not at hand.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = _load_encoder(self)
            return self._encoder

    def class_names(self) -> tuple[str, ...]:
        """Of a fine-tuned model."""
        about = self.description(cast(GraphKind, self.kind))
        return about.class_names or ()

    def palette(self) -> list[tuple[int, int, int]]:
        """A colour for every class."""
        from downstream.datasets.label_classes import default_palette

        head: dict[str, Any] = (self.config.head if self.config else None) or {}
        colours = head.get("palette") or default_palette(max(len(self.class_names()), 1))
        return [(int(r), int(g), int(b)) for r, g, b in colours]


class Models:
    """All of them.

    Args:
        given: Artifacts and exported files; files of an artifact's weights go with it, as do those that
            `coma export` left in `export` beside it.
        device: For PyTorch and ONNX Runtime.

    Raises:
        BadInput: something that is neither, is damaged or was never verified.
    """

    def __init__(self, given: Sequence[Path], device: Device = "cpu") -> None:
        self._models: dict[str, Model] = {}
        artifacts = [path for path in given if path.suffix not in (".onnx", ".engine")]
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
            raise BadInput("no model was given")

    @property
    def names(self) -> list[str]:
        """In the order in which they were given."""
        return list(self._models)

    def __getitem__(self, name: str) -> Model:
        """One of them.

        Raises:
            BadInput: no model of that name was given at the start.
        """
        if name not in self._models:
            raise BadInput("There is no such model here; choose one from the list.")
        return self._models[name]

    def having(self, form: GraphKind) -> list[Model]:
        """Those that can be used as `form`."""
        return [model for model in self._models.values() if form in model.forms]

    def looked_into(self) -> list[Model]:
        """Those whose encoder is at hand."""
        kinds = ("backbone", "pretrained", "classifier")
        return [model for model in self._models.values() if model.artifact and model.kind in kinds]

    def _name(self, path: Path) -> str:
        """A short name: the folder of a run, else of the artifact; never a whole path."""
        parts = [part for part in path.resolve().parts if part not in ("artifact", "run", "export", "/")]
        name = " / ".join(parts[-1:]) if path.suffix == "" else path.name
        number = sum(known == name or known.startswith(f"{name} (") for known in self._models)
        return f"{name} ({number + 1})" if number else name


def _beside(artifact: Path, source: str) -> list[Exported]:
    """Files of these weights in `export` beside an artifact."""
    try:
        return [entry for entry in exported_files(artifact.parent / "export") if entry.source == source]
    except ComaError:  # nothing was exported, or something that is none of ours
        return []


def _load_encoder(model: Model) -> Encoder:
    from coma.artifact import load_classifier, load_encoder

    if model.artifact is None:
        raise BadInput("Only exported files of this model were given; name its artifact to look inside.")
    if model.kind == "classifier":
        return cast(Encoder, load_classifier(model.artifact))
    return load_encoder(model.artifact)
