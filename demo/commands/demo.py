"""Show in the browser what a model makes of hidden parts of a picture."""

from __future__ import annotations

import os
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
from coma.preflight import require_packages
from coma.ranges import Range, Ranged
from demo.storage import Storage, delete_leftovers, temporary_storage

if TYPE_CHECKING:
    from demo.models import Models

QUICKSTART = Path("quickstart")
"""Where `make quickstart` leaves its run; `--out` of `coma quickstart`."""


@dataclass(frozen=True)
class DemoConfig(Ranged):
    """Serve a page: rebuild hidden parts of pictures, compare runtimes, look inside, classify, detect.

    For this machine alone unless --host or --share says otherwise. Only the models named here can be used.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Artifacts, and files that `coma export` made (those beside an artifact are found). Default: the model
    of the quickstart in this folder, which is trained first where there is none."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """0 takes a free one."""
    share: bool = False
    """Make a public address through gradio's servers. Everybody who has it can use the page."""
    auth: str | None = None
    """NAME:PASSWORD that visitors have to give."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For PyTorch and ONNX Runtime; auto: a GPU where there is one."""
    open: bool = False
    """Open it in this machine's browser."""


def run(argv: list[str]) -> None:
    """Parse, load, serve until Ctrl-C or another signal that ends programs.

    Raises:
        BadInput: no artifact, a port that is taken, a malformed --auth.
    """
    given = parse_arguments(DemoConfig, argv, prog="coma demo")
    auth = parse_auth(given.auth)
    require_packages("gradio", "skimage")
    check_port(given.host, given.port)
    device = pick_device(given.device)
    models = load_models(given.models or (quickstart(),), device)
    if dead := delete_leftovers():
        print(f"deleted the pictures of {counted(dead, 'demo server')} that had been killed", flush=True)
    with _ended_by_signals(), temporary_storage() as storage:
        server = serve(models, storage.folder, given.host, given.port, auth, given.share, given.open)
        print(f"\n  open {server.share_url or server.local_url} in a browser; Ctrl-C stops\n", flush=True)
        if given.host not in ("127.0.0.1", "localhost", "::1") and not auth:
            print(
                "  anybody who reaches this machine can use it; --auth NAME:PASSWORD asks first\n", flush=True
            )
        try:
            server.block_thread()
        finally:
            server.close(verbose=False)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make the signals that end programs leave by the way of Ctrl-C, so that everything is put away."""

    def stop(number: int, _: object) -> None:
        for each in (*before, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # a second one would interrupt the putting away
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
) -> Any:
    """Start the page in the background.

    Args:
        models: What it may use.
        folder: For uploads and results; whoever made it removes it.
        host: Address.
        port: 0 takes a free one.
        auth: Name and password.
        share: Through gradio's servers.
        inbrowser: Open it.

    Returns:
        gradio's page, running: `local_url`, `close()`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    storage = Storage(folder)
    os.environ["GRADIO_TEMP_DIR"] = str(storage.folder)
    from demo.app import build_page
    from demo.style import CSS, theme

    page, protection = build_page(models, storage)
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
    """What was named.

    Raises:
        BadInput: something that is no artifact and no verified file.
    """
    from demo.models import Models

    return Models(given, device)


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device to use; auto: a GPU where there is one.

    Raises:
        BadInput: there is no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch sees no GPU")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def quickstart(folder: Path = QUICKSTART) -> Path:
    """The quickstart's artifact, trained now (with a progress bar) if there is none."""
    artifact = folder / "run" / "artifact"
    if not (artifact / "model.safetensors").exists():
        print(f"no model was named, and there is no {artifact}: training a tiny one first", flush=True)
        from pretrain.commands import quickstart as command

        command.run(["--out", str(folder)])
    return artifact


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """NAME:PASSWORD as two strings.

    Raises:
        BadInput: no colon, or one side of it empty.
    """
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise BadInput("--auth: give NAME:PASSWORD")
    return name, password


def check_port(host: str, port: int) -> None:
    """Find out before anything is loaded whether the port can be had.

    Raises:
        BadInput: it is taken, or the address is none of this machine's.
    """
    if not host.strip():
        raise BadInput("--host '' is no address; give 127.0.0.1 for this machine alone")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        raise BadInput(
            f"--host {host} --port {port}: {reason}; give another port, or --port 0 for a free one"
        ) from None


def free_port(host: str) -> int:
    """A port that nobody listens at."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]
