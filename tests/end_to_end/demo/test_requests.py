"""Hostile requests to the served page: each gets an answer in a sentence, nothing hangs."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from page_requests import JSON, ask, usual

from demo import inputs, middleware

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio and what it builds on warn of each other


JUNK = [
    float("nan"),
    float("inf"),
    -float("inf"),
    None,
    1e308,
    -1,
    10**400,
    True,
    "",
    "x",
    "\0",
    [],
    {},
    [[1]],
]


@pytest.mark.parametrize(
    "names", [("reconstruct",), pytest.param((), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_values_that_fit_nowhere_get_a_sentence(server, capfd, names):
    calls = []
    for event in server.config["dependencies"]:
        if names and event["api_name"] not in names:
            continue
        for position in range(len(event["inputs"])):
            for value in JUNK:
                call = usual(server, event)
                call["data"][position] = value
                calls.append(call)
        if event["inputs"]:
            for values in ([], usual(server, event)["data"][:-1], [*usual(server, event)["data"], 1]):
                calls.append({"fn_index": event["id"], "data": values})
        for value in (
            None,
            3,
            {"index": None},
            {"index": float("nan")},
            {"index": [10**400, "x"]},
            {"index": 99},
        ):
            calls.append({**usual(server, event), "event_data": value, "trigger_id": -(10**30)})
    answers = ask(server, calls)
    for call, answer in zip(calls, answers, strict=True):
        assert answer["success"] or answer["output"]["error"], call
    failed = [answer["output"]["error"] for answer in answers if not answer["success"]]
    assert len(failed) > len(calls) / 2
    assert "Mask seed: give a number from 0 to 2147483647." in failed
    assert any(text.startswith("Resize mode: choose one of crop, letterbox, whole") for text in failed)
    assert "This takes 9 values, not 8: see Use via API on the page." in failed
    assert "Traceback" not in capfd.readouterr().err


ROUTES = [
    "proxy=http://example.invalid/", "stream/x/y/1/playlist.m3u8", "stream/x/y/1/playlist-file", "dev/reload",
    "custom_component/x/client/component/index.js", "monitoring", "runs", "vibe-code", "nothing",
    "deep_link?session_hash=x", "run-history/buckets",
]  # fmt: skip


def test_only_the_routes_that_the_page_uses_are_there(server, capfd):
    for route in (*(f"gradio_api/{each}" for each in ROUTES), "monitoring/summary", "pwa_icon", "docs", "x"):
        assert server.web.get(f"/{route}").status_code == 404, route
        assert server.web.post(f"/{route}", json={}).status_code == 404, route
    for route in ("static", "assets", "svelte"):
        outside, missing = (f"{'%2e%2e/' * 20}etc/{name}" for name in ("passwd", "nothing"))
        answers = [server.web.get(f"/{route}/{path}") for path in (outside, missing)]
        assert answers[0].text == answers[1].text and answers[0].status_code in (403, 404)
    assert server.web.get("/gradio_api/queue/data?session_hash=nobody").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


BODIES = [
    b"",
    b"{",
    b"[]",
    b'{"data": 3}',
    b"[" * 100_000,
    b'{"data": [NaN], "fn_index": 1e400}',
    b"\xff" * 99,
]
POSTS = ["queue/join", "call/reconstruct", "call/v2/reconstruct", "call/nothing", "call/v2/nothing", "run/x",
         "cancel", "reset", "component_server", "upload", "api/reconstruct"]  # fmt: skip


@pytest.mark.parametrize("route", [*(f"gradio_api/{each}" for each in POSTS), "login"])
def test_bodies_that_are_none_are_refused_and_large_ones_too(server, route, capfd):
    boundary = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    parts = {"content-type": "multipart/form-data; boundary=x"}
    for body in BODIES:
        for headers in (JSON, parts, {"content-type": "multipart/form-data"}, {}):
            answer = server.web.post(f"/{route}", content=body, headers=headers)
            assert answer.status_code < 500, (body, answer.text)

    def chunks(first: bytes, each: bytes, size: int) -> Iterator[bytes]:
        yield first
        for _ in range(size // len(each)):
            yield each

    part = boundary + b"x" * 2**19 + b"\r\n"
    large = (
        (JSON, b'{"data": ["', b"x" * 2**18, 50 << 20),
        (parts, boundary, b"x" * 2**18, 30 << 20),
        (parts, b"", part, 30 << 20),
        ({"content-type": "application/x-www-form-urlencoded"}, b"x=", b"x" * 2**18, 3 << 20),
    )
    before = {path.name for path in server.folder.iterdir()}
    for headers, first, each, size in large:
        answer = server.web.post(f"/{route}", content=chunks(first, each, size), headers=headers, timeout=30)
        unread = answer.status_code in (400, 422) and route.endswith(("login", "upload"))  # refused unread
        assert answer.status_code == 413 or unread, (headers, answer.text)
    declared = server.web.post(f"/{route}", content=b"x" * (3 << 20), headers=JSON)
    assert declared.status_code == 413 and "too large" in declared.text
    assert {path.name for path in server.folder.iterdir()} == before  # nothing half written is left
    assert "Traceback" not in capfd.readouterr().err


def test_uploads_that_break_off_or_never_end_leave_nothing(server, monkeypatch):
    head = (b"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n"
            b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; "
            b'name="files"; filename="a"\r\n\r\nhalf')  # fmt: skip
    before = {path.name for path in server.folder.iterdir()}
    address = ("127.0.0.1", server.web.base_url.port)
    import socket

    with socket.create_connection(address) as broken:
        broken.sendall(head)
        until(lambda: {path.name for path in server.folder.iterdir()} != before)
    until(lambda: {path.name for path in server.folder.iterdir()} == before)
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    with socket.create_connection(address) as slow:
        slow.sendall(head)
        assert b" 408 " in slow.recv(1000)
    until(lambda: {path.name for path in server.folder.iterdir()} == before)


def test_a_full_storage_refuses_uploads_and_results_with_a_sentence(server, monkeypatch):
    before = {path.name for path in server.folder.iterdir()}
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "reconstruct")
    with monkeypatch.context() as patch:
        patch.setattr("demo.storage.MOST_BYTES", -1)
        for size in (1, 15 << 20):
            answer = server.web.post("/gradio_api/upload", files={"files": b"x" * size})
            assert answer.status_code == 507 and "storage is full" in answer.json()["detail"]
        assert "storage is full" in ask(server, [usual(server, event)])[0]["output"]["error"]
    assert {path.name for path in server.folder.iterdir()} == before
    assert server.web.post("/gradio_api/upload", files={"files": b"x"}).status_code == 200
    assert ask(server, [usual(server, event)])[0]["success"]


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_event_that_does_not_end_is_given_up_and_the_next_one_runs(server, monkeypatch):
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "reconstruct")
    free = threading.Event()

    def stuck(*_: Any) -> None:
        free.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "EVENT_SECONDS", 0.5)
        patch.setattr("demo.pages.reconstruct.mask_picture", stuck)
        answers = ask(server, [usual(server, event)] * 3)
        assert {answer["output"]["error"] for answer in answers} == {
            "This took longer than 0.5 seconds and was cancelled."
        }
    assert ask(server, [usual(server, event)])[0]["success"]  # though three threads are stuck
    free.set()


def test_who_goes_away_frees_the_place(server, monkeypatch):
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "features")
    for _ in range(3):
        call = json.dumps({**usual(server, event), "session_hash": f"s{time.time_ns()}"})
        server.web.post("/gradio_api/queue/join", content=call, headers=JSON).raise_for_status()
        session = json.loads(call)["session_hash"]
        with server.web.stream("GET", f"/gradio_api/queue/data?session_hash={session}"):
            pass  # closed before there was an answer
    assert ask(server, [usual(server, event)])[0]["success"]


def test_drawings_of_no_good_are_not_kept(server, capfd):
    editor = next(each for each in server.config["components"] if each["type"] == "imageeditor")
    form = {
        "component_id": str(editor["id"]),
        "session_hash": "x",
        "fn_name": "accept_blobs",
        "type": "layer",
    }
    indices = [{"index": number} for number in (str(10**12), "-1", "x")]
    for more in (*indices, {}, {"index": "0", "id": "x" * 1000}, {"fn_name": "preprocess"}):
        sent = {**form, "id": "a", **more}
        answer = server.web.post("/gradio_api/component_server", data=sent, files={"file": b"x"})
        assert answer.status_code in (400, 404), more
    good = {**form, "id": "a", "index": "0"}
    sent = server.web.post("/gradio_api/component_server", data=good, files={"file": b"x"})
    assert sent.status_code == 200 and inputs.BLOBS.take("a") == [b"x"]
    assert "Traceback" not in capfd.readouterr().err


def test_an_unexpected_error_is_one_line_in_the_log(server, monkeypatch, caplog, capfd):
    def broken(*_: Any) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr("demo.pages.reconstruct.mask_picture", broken)
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "reconstruct")
    answer = ask(server, [usual(server, event)])[0]
    assert answer["output"]["error"] == "The server failed; its log says why."
    said = [each.getMessage() for each in caplog.records if each.name == "demo"]
    assert len(said) == 1 and said[0].startswith("reconstruct failed: KeyError: ") and "\n" not in said[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_password_guards_the_files_too(tmp_path):
    from demo.middleware import RequestGuard
    from demo.storage import Storage

    kept, sent = Storage(tmp_path), []
    (kept.folder / "mine.png").write_bytes(b"mine")

    class App:
        auth, cookie_id, tokens = {"me": "secret"}, "c", {"t": "me"}

    async def ask_for(cookie: bytes) -> int:
        scope = {"type": "http", "method": "GET", "path": f"/gradio_api/file={kept.folder}/mine.png",
                 "headers": [(b"cookie", cookie)], "app": App}  # fmt: skip

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        sent.clear()
        await RequestGuard(App, kept)(scope, receive, send)  # pyright: ignore[reportArgumentType]
        return sent[0]["status"]

    cookies = (b"", b"access-token-c=x", b"access-token-c=t", b"access-token-unsecure-c=t")
    assert [asyncio.run(ask_for(cookie)) for cookie in cookies] == [401, 401, 200, 200]
