"""A web server of this machine with ranges of bytes, and with the faults that servers have.

python tests/helpers/remote_files.py FOLDER SECONDS    # for benchmarks: serves until its input ends
"""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from coma.data import retries
from coma.data.retries import RetryPolicy


class FileServer:
    """Serves the files of a folder.

    Attributes:
        fails_every: Every so many requests are answered with 503; 0: none.
        seconds: Time before an answer.
        has_ranges: Whether ranges are honoured; else every answer is the whole file.
        status: Status of all answers, if it is not 0.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.fails_every, self.seconds, self.has_ranges, self.status = folder, 0, 0.0, True, 0
        self.requests: list[str] = []
        self.sent = 0
        self.url = ""
        self.lock = threading.Lock()


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """Runs a server until the block ends."""
    state = FileServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, state)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(handler: BaseHTTPRequestHandler, state: FileServer) -> None:
    with state.lock:
        state.requests.append(handler.path)
        number = len(state.requests)
    time.sleep(state.seconds)
    path = state.folder / urlsplit(handler.path).path.lstrip("/")
    status = state.status or (503 if state.fails_every and number % state.fails_every == 0 else 0)
    if status or not path.is_file():
        handler.send_response(status or 404)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    facts = path.stat()
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    with open(path, "rb") as file:
        if wanted and state.has_ranges:
            start, last = int(wanted[1]), min(int(wanted[2]), facts.st_size - 1)
            file.seek(start)
            body = file.read(last + 1 - start)
            given = f"bytes {start}-{last}/{facts.st_size}" if body else "bytes */0"
            handler.send_response(206 if body else 416)
            handler.send_header("Content-Range", given)
        else:
            body = file.read()
            handler.send_response(200)
    handler.send_header("ETag", f'"{facts.st_size}-{facts.st_mtime_ns}"')
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    try:
        handler.wfile.write(body)
        state.sent += len(body)
    except OSError:  # the client has seen enough
        handler.close_connection = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """A server of the folder `served`."""
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as state:
        yield state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses and limits, and counts from 0."""
    monkeypatch.setattr(retries, "POLICY", RetryPolicy(attempts=4, first_pause=0.01, seconds=5))
    retries.REPEATED.__init__()


if __name__ == "__main__":
    with serve(Path(sys.argv[1])) as served:
        served.seconds = float(sys.argv[2])
        print(served.url, flush=True)
        for _ in sys.stdin:  # a line for each question
            print(served.sent, flush=True)
