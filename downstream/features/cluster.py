"""Features computed by tasks of a Ray cluster: each task computes one part and returns its content.

This process alone writes. A part whose machine or process dies is computed again elsewhere, as long as the
cluster has a machine left, so nothing is lost, and as a part is written once, nothing is there twice. The
images and the model have to be at the same paths on all machines; --out only has to be here.
"""

from __future__ import annotations

import socket
from functools import cache
from typing import Any

from coma.data import open_source
from coma.errors import BadInput, ComaError
from coma.library_errors import first_line
from coma.preflight import require_packages
from coma.progress import Bar
from downstream.features.models import FeatureRequest, open_feature_model
from downstream.features.parts import FeatureParts
from downstream.features.reading import Reading, compute_parts
from downstream.parts import listing_hash

_PATIENCE = 10.0
"""Seconds to wait for a cluster to answer."""
_AHEAD = 2
"""Parts that are asked for at a time for each processor of the cluster."""


def compute_on_cluster(
    address: str,
    request: FeatureRequest,
    reading: Reading,
    parts: FeatureParts,
    todo: list[int],
    bar: Bar | None,
) -> None:
    """Computes parts on a cluster and writes them.

    Args:
        address: Address of the cluster, as `ray.init` takes it; `local` starts one on this machine.
        request: The model.
        reading: The images.
        parts: Where the parts are written.
        todo: Numbers of the parts.
        bar: Shows the progress.

    Raises:
        BadInput: the cluster cannot be reached, or its machines do not see the same model or images.
        ComaError: the cluster gave up, or the disk is full; finished parts are kept.
    """
    require_packages("ray")
    import ray

    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, ...
        raise BadInput(
            f"--ray {address}: the cluster cannot be reached ({first_line(error)}); `ray start --head` "
            "starts one and prints its address"
        ) from None
    try:
        gpus = 1 if request.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(_part)
        _run(ray, task, request, reading, parts, todo, bar)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuses an address at which nothing answers; Ray itself would wait for minutes.

    Raises:
        OSError: nothing answers there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _run(
    ray: Any,
    task: Any,
    request: FeatureRequest,
    reading: Reading,
    parts: FeatureParts,
    todo: list[int],
    bar: Bar | None,
) -> None:
    waiting, running = list(reversed(todo)), {}
    most = _AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    while waiting or running:
        while waiting and len(running) < most:
            number = waiting.pop()
            running[task.remote(request, reading, parts, number)] = number
        for done in ray.wait(list(running), num_returns=1)[0]:
            number = running.pop(done)
            parts.write(number, _result(ray, done))
            if bar:
                bar.advance(len(parts.images(number)))


def _result(ray: Any, reference: Any) -> bytes:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ComaError):
            raise type(error.cause)(f"on the Ray cluster: {error.cause}") from None
        raise ComaError(f"a task of the Ray cluster failed: {first_line(error.cause or error)}") from error
    except ray.exceptions.RayError as error:
        raise ComaError(
            f"the Ray cluster gave up ({first_line(error)}); finished parts are kept, run the same command "
            "again"
        ) from error


def _part(request: FeatureRequest, reading: Reading, parts: FeatureParts, number: int) -> bytes:
    """Runs on a machine of the cluster: returns the content of a part."""
    model, source, names, listing = _opened(request, reading)
    here, wanted = model.spec, parts.info.spec
    if (here.sha256, here.precision, listing) != (wanted.sha256, wanted.precision, parts.info.listing):
        what = "images" if listing != parts.info.listing else "model"
        raise BadInput(f"a machine sees another {what} at the same path; give a folder that all share")
    rows, failures = next(compute_parts(model, source, names, reading, [parts.images(number)]))
    return parts.encode(rows, failures)


@cache
def _opened(request: FeatureRequest, reading: Reading) -> Any:
    """Returns the model and the images; a process of the cluster keeps them for its next parts."""
    source = open_source(reading.images, reading.split, tiles=reading.tiles)
    return open_feature_model(request), source, *listing_hash(source)
