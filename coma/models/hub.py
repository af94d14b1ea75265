"""Weights by name, from the local caches of the Hugging Face Hub and of torch.hub.

    timm:NAME             weights of timm's, for example timm:vit_small_patch14_dinov2.lvd142m
    hf-hub:ORG/NAME       a repository of the hub, also ORG/NAME@REVISION

An existing file or folder of that name comes first. Nothing is downloaded unless that is asked for, and
nothing is opened here.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from coma.errors import BadInput

_REFERENCE = re.compile(r"(timm|hf-hub):(.*)", re.DOTALL)
_REVISION = re.compile(r"\w[\w.-]*", re.ASCII)
_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""Names of the file of weights in a repository, in the order in which they are preferred."""


@dataclass(frozen=True)
class _Places:
    """Where the weights of a reference may lie: files of a repository, and a file of torch.hub's cache."""

    repository: str | None
    revision: str | None
    files: tuple[str, ...]
    url: str | None


def is_reference(text: str) -> bool:
    """Returns whether this is `timm:NAME` or `hf-hub:ORG/NAME`, and no existing path."""
    return _REFERENCE.fullmatch(text) is not None and not os.path.lexists(text)


def weights_file(reference: str, *, download: bool = False) -> Path:
    """Returns the file of weights that a reference stands for, a `.safetensors` file where there is one.

    Args:
        reference: `timm:NAME` or `hf-hub:ORG/NAME`.
        download: Fetch it into the local cache if it is not there.

    Raises:
        BadInput: an unknown name, weights that are not in a local cache, or a failed download; the message
            says what to do.
    """
    places = _places(reference)
    if found := _cached(places):
        return found
    if download:
        return _download(reference, places)
    raise BadInput(
        f"{reference}: its weights are not on this machine; give --download to fetch them, or "
        + _by_hand(places)
    )


def cached_file(reference: str) -> Path | None:
    """Returns the file of weights that a reference stands for, if it is in a local cache; see `weights_file`.

    Raises:
        BadInput: an unknown name, or one without weights.
    """
    return _cached(_places(reference))


def timm_name(text: str) -> str:
    """Returns the name of one of timm's models, without `timm:`.

    Raises:
        BadInput: timm has none of that name; the message names similar ones.
    """
    import timm

    name = text.removeprefix("timm:")
    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        raise BadInput(f"timm:{name}: timm {timm.__version__} has no such model; {unknown_to_timm(name)}")
    known = timm.list_pretrained(f"{architecture}.*")
    if dot and name not in known:
        raise BadInput(f"timm:{name}: no such weights; timm has {', '.join(known) or 'none of this model'}")
    return name


def unknown_to_timm(name: str) -> str:
    """Returns what to do about a name that timm does not have."""
    import timm

    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"


def _places(reference: str) -> _Places:
    import timm
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadInput(f"{reference}: not a name of weights; give timm:NAME or hf-hub:ORG/NAME")
    kind, name = match.groups()
    if kind == "hf-hub":
        repository, at, revision = name.partition("@")
        try:
            validate_repo_id(repository)
        except HFValidationError:
            repository = ""
        if "/" not in repository or bool(at) != bool(_REVISION.fullmatch(revision)):
            raise BadInput(f"{reference}: not a repository of the hub; give hf-hub:ORG/NAME")
        return _Places(repository, revision or None, _FILES, None)
    config = timm.get_pretrained_cfg(timm_name(name))
    if config is None or not config.has_weights:
        raise BadInput(f"{reference}: timm has no weights of this model; give a file of weights instead")
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    url = config.url if isinstance(config.url, str) and not config.custom_load else None
    named = config.hf_hub_filename
    files = (f"{Path(named).with_suffix('')}.safetensors", named) if named else _FILES
    return _Places(repository or None, revision or None, files, url or None)


def _cached(places: _Places) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in places.files if places.repository else ():
        found = try_to_load_from_cache(str(places.repository), name, revision=places.revision)
        if isinstance(found, str):
            return Path(found)
    file = _torch_hub_file(places.url) if places.url else None
    return file if file is not None and file.is_file() else None


def _download(reference: str, places: _Places) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from torch.hub import download_url_to_file

    reason = f"its repository has no {' or '.join(places.files)}"
    try:
        for name in places.files if places.repository else ():
            try:
                return Path(hf_hub_download(str(places.repository), name, revision=places.revision))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
        if places.url:
            file = _torch_hub_file(places.url)
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([a-f0-9]{8,})\.", file.name)
            download_url_to_file(places.url, str(file), digest and digest[1])
            return file
    except Exception as error:  # huggingface_hub, httpx and urllib each raise classes of their own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    raise BadInput(
        f"{reference}: its weights could not be downloaded ({reason}); try again, or {_by_hand(places)}"
    )


def _torch_hub_file(url: str) -> Path:
    from torch.hub import get_dir

    return Path(get_dir(), "checkpoints", url.rpartition("/")[2])


def _by_hand(places: _Places) -> str:
    """Returns how to bring the weights to a machine without a network."""
    from huggingface_hub import constants, file_download

    if not places.repository:
        return (
            f"fetch {places.url} where there is a network and save it as {_torch_hub_file(str(places.url))}"
        )
    revision = f" --revision {places.revision}" if places.revision else ""
    folder = file_download.repo_folder_name(repo_id=places.repository, repo_type="model")
    return (
        f"run `hf download {places.repository}{revision}` where there is a network and copy {folder} from "
        f"its cache to {Path(constants.HF_HUB_CACHE, folder)}"
    )
