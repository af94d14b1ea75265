"""Serve a web demo that reconstructs masked images with any exported model."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.messages import counted
from coma.paths import SHIPPED
from coma.preflight import require_folder, require_packages
from coma.ranges import Range, Ranged
from demo.storage import Storage, delete_leftovers, temporary_storage

if TYPE_CHECKING:
    from demo.models import Models
    from demo.nearest import PictureSearch

_ADDRESSES = "give an IPv4 address or a name of this machine, such as 127.0.0.1; 0.0.0.0 is all of them"
QUICKSTART = Path("quickstart/run/artifact")
"""The model of `coma quickstart`, which is shown beside them where it is there."""


@dataclass(frozen=True)
class DemoConfig(Ranged):
    """Serves a web page that reconstructs masked images, compares runtimes and shows features.

    Only this machine can open it, unless --host or --share is given. Only the models named here are used.
    """

    models: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="MODEL",
            help_behavior_hint=f"(default: {SHIPPED}, and the quickstart's model if there is one)",
        ),
    ] = ()
    """Artifacts, and files of `coma export`; exported files beside an artifact are found. tiny-64 comes with
    the package."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 admits other machines."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """Port to listen on; 0 picks a free one."""
    share: bool = False
    """Create a public address through gradio's servers; everyone who knows it can use the page."""
    auth: Annotated[str | None, tyro.conf.arg(metavar="NAME:PASSWORD", help_behavior_hint="")] = None
    """User name and password that visitors must enter."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for PyTorch and ONNX Runtime; auto is the GPU where there is one."""
    open: bool = False
    """Open the page in the browser of this machine."""
    search: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of `coma embed` by one of the models, .parquet or .npz: visitors get thumbnails and file names of
    its nearest pictures."""
    space: bool = False
    """Write a folder that serves the page as a Space of Hugging Face or as a container, and stop."""
    out: Path | None = None
    """Folder that --space writes; it must be new or empty."""


def run(argv: list[str]) -> None:
    """Serves the page until Ctrl-C or another signal ends it.

    Raises:
        BadInput: no artifact, a port in use, or a malformed --auth.
    """
    given = parse_arguments(DemoConfig, argv, prog="coma demo")
    auth = parse_auth(given.auth)
    require_packages("gradio", "skimage")
    if given.space or given.out:
        print_space(given)
        return
    check_port(given.host, given.port)
    device = pick_device(given.device)
    models = load_models(given.models or default_models(), device)
    search = open_search(given.search, models) if given.search else None
    if dead := delete_leftovers():
        print(f"deleted the pictures of {counted(dead, 'demo server')} that did not end cleanly", flush=True)
    with _ended_by_signals(), temporary_storage() as storage:
        server = serve(
            models, storage.folder, given.host, given.port, auth, given.share, given.open, search=search
        )
        print(f"\n  open {server.share_url or server.local_url} in a browser; Ctrl-C stops\n", flush=True)
        if (given.share or given.host not in ("127.0.0.1", "localhost")) and not auth:
            print(
                "  everyone who can reach this address can use the page; --auth NAME:PASSWORD restricts it\n",
                flush=True,
            )
        try:
            server.block_thread()
        finally:
            server.close(verbose=False)


def print_space(given: DemoConfig) -> None:
    """Writes the folder of --space and prints what to do with it.

    Raises:
        BadInput: --space or --out without the other, a folder that is not empty, or unfit models.
    """
    if not given.space or not given.out:
        raise BadInput("--space and --out belong together: coma demo --space --out DIR MODEL")
    if given.search:
        raise BadInput("--search: its pictures stay on this machine; leave it out with --space")
    require_folder(given.out)
    from demo.space import write_space

    names = write_space(given.out, load_models(given.models or default_models(), "cpu"))
    print(f"{given.out}: {', '.join(names)}")
    there = shlex.quote(str(given.out))
    print(f"next: push it to a Space of Hugging Face, or: docker build -t coma-demo {there}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP exit like Ctrl-C does, so that temporary files are deleted."""

    def stop(number: int, _: object) -> None:
        for each in (*before, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def serve(
    models: Models,
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    auth: tuple[str, str] | None = None,
    share: bool = False,
    inbrowser: bool = False,
    search: PictureSearch | None = None,
) -> Any:
    """Starts the page in the background.

    Args:
        models: Models that visitors can use.
        folder: Folder for uploads and results; the caller deletes it.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        auth: User name and password.
        share: Create a public address through gradio's servers.
        inbrowser: Open the page in a browser.
        search: Pictures that visitors can search in.

    Returns:
        The running page of gradio, with `local_url` and `close()`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    storage = Storage(folder)
    os.environ["GRADIO_TEMP_DIR"] = str(storage.folder)
    from demo.app import build_page
    from demo.style import CSS, theme

    page, protection = build_page(models, storage, search)
    page.launch(
        server_name=host,
        server_port=port or free_port(host),
        auth=auth,
        share=share,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
        **protection,
    )
    return page


def load_models(given: tuple[Path, ...], device: Literal["cpu", "cuda"]) -> Models:
    """Loads the models.

    Raises:
        BadInput: a path that is neither an artifact nor a verified file.
    """
    from demo.models import Models

    return Models(given, device)


def open_search(file: Path, models: Models) -> PictureSearch:
    """Opens a file of features.

    Raises:
        BadInput: the file or its images cannot be read, or no model of the page made it.
    """
    from demo.nearest import PictureSearch

    return PictureSearch(file, models)


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Returns the device; auto is the GPU where there is one.

    Raises:
        BadInput: cuda was asked for, but there is no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch finds no GPU")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def default_models() -> tuple[Path, ...]:
    """Returns the weights that come with the package, and the quickstart's model if there is one."""
    return (Path(SHIPPED), *((QUICKSTART,) if QUICKSTART.is_dir() else ()))


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """Returns the user name and the password of NAME:PASSWORD.

    Raises:
        BadInput: a missing colon, or an empty part.
    """
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise BadInput("--auth: give NAME:PASSWORD")
    return name, password


def check_port(host: str, port: int) -> None:
    """Checks, before models are loaded, that the port is free.

    Raises:
        BadInput: the port is in use or reserved, or the address is no IPv4 address of this machine.
    """
    if not host.strip():
        raise BadInput("--host '' is not an address; 127.0.0.1 serves this machine only")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        ports = error.errno in (errno.EADDRINUSE, errno.EACCES)
        way_out = "give another port, or --port 0 for a free one" if ports else _ADDRESSES
        raise BadInput(f"--host {host} --port {port}: {reason}; {way_out}") from None


def free_port(host: str) -> int:
    """Returns a free port."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]
