"""Runs that start from weights that exist: read, compared by their SHA-256, and copied as far as they fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from coma.artifact.weights import Weights, forget_weights, name_of, read_weights
from coma.config import PretrainConfig
from coma.config.artifact import Origin
from coma.errors import BadInput
from coma.models import Encoder, build_encoder
from coma.models.hub import is_reference
from coma.models.initialize import initialize
from coma.objectives import Objective
from coma.objectives.teachers import training_objective
from coma.paths import artifact_directory


def with_initial_weights(config: PretrainConfig) -> PretrainConfig:
    """Returns the settings with initial weights that can be told from others, from any directory.

    Their path is absolute then, and they have a SHA-256; they were checked to be there and to fit.

    Raises:
        BadInput: as `initial_objective`.
    """
    init = config.init
    if init.init is None:
        return config
    weights = _weights(config)
    with torch.random.fork_rng(devices=()):
        _initialize(config, build_encoder(config.model), weights)
    place = init.init if is_reference(init.init) else str(artifact_directory(init.init).absolute())
    return replace(config, init=replace(init, init=place, init_sha256=weights.origin.sha256))


def initial_objective(config: PretrainConfig) -> tuple[Objective, str]:
    """Returns the objective of a run that starts from weights, and what it took from them, in a line.

    Raises:
        BadInput: weights that cannot be read safely, are not those the run was started with, lack tensors of
            the encoder (unless that is allowed), or hold numbers that are not finite; or as `load_teacher`.
    """
    weights, encoder = _weights(config), build_encoder(config.model)
    taken = _initialize(config, encoder, weights)
    objective = training_objective(config, encoder)
    decoder = _initialize_decoder(objective, weights)
    forget_weights()
    return objective, f"starts from {weights.origin.name}: {taken}; {decoder}"


def statistics_of_weights(config: PretrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and standard deviation of the weights that a run starts from; None: not known."""
    return _weights(config).statistics


def origin_of(config: PretrainConfig) -> Origin | None:
    """Returns what an artifact of the run says about the weights that it started from."""
    init = config.init
    if init.init is None or init.init_sha256 is None:
        return None
    return Origin(name_of(init.init), init.init_sha256)


def _weights(config: PretrainConfig) -> Weights:
    init = config.init
    weights = read_weights(str(init.init), download=init.download)
    if init.init_sha256 not in (None, weights.origin.sha256):
        raise BadInput(
            f"--init {init.init}: its SHA-256 is {weights.origin.sha256}, not the expected "
            f"{init.init_sha256}; give the file that the run was set up with, or start a new run"
        )
    return weights


def _initialize(config: PretrainConfig, encoder: Encoder, weights: Weights) -> str:
    """Copies the encoder's tensors; returns a report."""
    flag = f"--init {config.init.init}"
    try:
        taken = initialize(encoder, weights.checkpoint)
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from None
    if taken.matched < taken.total and not (config.init.init_partial and taken.matched):
        way_out = "give the --model of the weights"
        if taken.matched:
            way_out += ", or start the rest from random values with --init-partial"
        raise BadInput(f"{flag}: {taken}; {way_out}")
    return str(taken)


def _initialize_decoder(objective: Objective, weights: Weights) -> str:
    """Copies those tensors of a decoder that fit; returns a report."""
    own = {name: t for name, t in objective.state_dict().items() if name.startswith("decoder.")}
    given = weights.decoder or {}
    fitting = [name for name in own if name in given and given[name].shape == own[name].shape]
    for name in fitting:
        if not bool(given[name].isfinite().all()):
            raise BadInput(f"--init {weights.origin.name}: {name} holds values that are not finite")
        own[name].copy_(given[name])
    report = f"{len(fitting)} of {len(own)} tensors of the decoder"
    before = weights.about.objective if weights.about else None
    if fitting and before and before.norm_pix != objective.config.norm_pix:
        pixels, flag = ("normalised", "norm-pix") if before.norm_pix else ("plain", "no-norm-pix")
        report += f", which predicted {pixels} pixels (--objective.{flag} continues that)"
    return report
