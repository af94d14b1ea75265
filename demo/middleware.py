"""Middleware in front of gradio: allowed routes, and limits on the size and time of requests.

Every error behind it is answered with one sentence and logged as one line.
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import os
import re

from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coma.errors import BadImage
from demo.gradio_internals import is_logged_in
from demo.inputs import one_line
from demo.storage import Storage
from demo.upload import MAX_BYTES

MAX_JSON = 2**20
"""Largest request without an upload, in bytes; requests name pictures by their paths."""
_SLACK = 2**20  # headers of the parts of an upload
BODY_SECONDS = 120
"""Seconds until a request must have arrived."""
ANSWER_SECONDS = 60
"""Seconds until a request must be answered; event streams are exempt."""
_DRAINED = 256 * 2**20  # bytes that are read and dropped before the answer

_FILE = re.compile(r"/gradio_api/file[=/](.*)", re.DOTALL)
_ROUTES = re.compile(
    r"/((config|login|logout|theme\.css|robots\.txt|favicon\.ico|manifest\.json)/?"
    r"|(static|assets|svelte)/.*"
    r"|gradio_api/((info|openapi\.json|theme\.css|startup-events|app_id|user|token|login_check|upload"
    r"|upload_progress|component_server|cancel|reset|queue/(join|data|status))/?"
    r"|(heartbeat|call|run|api)/.*))?"
)
"""Routes of gradio that the page and its clients use. The others download from other servers, keep recordings
and links, or edit the program."""
_STREAMS = re.compile(r"/gradio_api/(heartbeat/|queue/data|upload_progress|call/)")
_SHOWN = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/avif",
          "video/mp4", "video/webm", "video/quicktime")  # fmt: skip
_log = logging.getLogger("demo")


class RequestGuard:
    """Answers file requests from the storage, refuses unknown routes, and limits all other requests.

    Args:
        app: The application behind it.
        storage: The only folder that files are served from.
    """

    def __init__(self, app: ASGIApp, storage: Storage) -> None:
        self.app = app
        self.storage = storage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted, reading = _FILE.fullmatch(scope["path"]), scope["method"] in ("GET", "HEAD")
        if wanted and reading:
            await self._file(wanted[1], scope, receive, send)
        elif wanted or not _ROUTES.fullmatch(scope["path"]):
            await _answer(404, "Not found.")(scope, receive, send)
        else:
            await _GuardedExchange(scope, receive, send, self.storage).run(self.app)

    async def _file(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends an upload or a result, or the part of it in a Range; everything else gets the same answer."""
        if not is_logged_in(scope):
            return await _answer(401, "Not authenticated.")(scope, receive, send)
        try:
            file = self.storage.open(path)
        except BadImage:
            return await _answer(404, "Not found.")(scope, receive, send)
        kind, headers = mimetypes.guess_type(path)[0], {"x-content-type-options": "nosniff"}
        if kind not in _SHOWN:
            kind, headers["content-disposition"] = "application/octet-stream", "attachment"
        with file:  # by its number: another file may have its path by now
            about = os.fstat(file.fileno())
            await FileResponse(
                f"/dev/fd/{file.fileno()}", headers=headers, media_type=kind, stat_result=about
            )(scope, receive, send)


class _GuardedExchange:
    """One request and its answer, within the limits."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, storage: Storage) -> None:
        self._scope, self._receive, self._send, self._storage = scope, receive, send, storage
        headers = dict(scope["headers"])
        self._upload = headers.get(b"content-type", b"").lower().startswith(b"multipart/")
        self._most = MAX_BYTES + _SLACK if self._upload else MAX_JSON
        self._declared = int(headers.get(b"content-length") or 0)
        self._size, self._complete, self._started = 0, False, False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        self._refused: Response | None = None

    async def run(self, app: ASGIApp) -> None:
        stream = self._scope["method"] == "GET" and _STREAMS.match(self._scope["path"])
        seconds = None if stream else BODY_SECONDS + ANSWER_SECONDS
        try:
            async with asyncio.timeout(seconds):
                if self._declared > self._most:
                    await self._too_large()
                await app(self._scope, self.receive, self.send)
        except Exception as error:
            if not self._refused and isinstance(error, TimeoutError):
                self._refused = _answer(503, "This took too long and was cancelled.")
            if not self._refused:
                about = f"{self._scope['method']} {self._scope['path'][:100]!r}"
                _log.warning("%s failed: %s", about, one_line(error))
                self._refused = _answer(400, "This request is not valid; see Use via API on the page.")
        if self._refused and not self._started:
            await self._refused(self._scope, self._receive, self._send)
        elif self._refused:  # the answer has begun: end it
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._next()
        size = len(message.get("body", b""))
        self._size += size
        if self._size > self._most:
            await self._too_large()
        if self._upload:
            try:
                self._storage.accept(size)
            except BadImage as error:
                await self._refuse(507, str(error))
        return message

    async def _too_large(self) -> None:
        await self._refuse(
            413, f"This is too large: at most {MAX_BYTES >> 20} MB of files, else {MAX_JSON >> 20} MB."
        )

    async def _refuse(self, status: int, text: str) -> None:
        self._refused = _answer(status, text)
        while not self._complete and self._size < _DRAINED:  # the client reads no answer while it sends
            self._size += len((await self._next()).get("body", b""))
        raise MultiPartException(text)  # makes gradio delete the partial files

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self._refused = _answer(408, f"The request did not arrive within {BODY_SECONDS} seconds.")
            raise MultiPartException("too slow") from None
        if message["type"] == "http.disconnect":
            self._refused = _answer(400, "The request ended too early.")
            raise MultiPartException("cut short")
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if not self._refused:
            self._started = True
            await self._send(message)


def _answer(status: int, text: str) -> Response:
    return JSONResponse({"detail": text}, status)
