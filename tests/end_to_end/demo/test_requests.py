"""Hostile requests to the served page: nothing of the server comes back, nothing hangs."""

import asyncio
import gc
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from demo_files import models, served
from PIL import Image

from demo import inputs, middleware
from demo.storage import EXAMPLES, GONE

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio and what it builds on warn of each other

SECRET = (201, 17, 133)
"""The colour of a picture that nobody may see."""
META = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module", autouse=True)
def litter():
    yield
    gc.collect()


class Server(NamedTuple):
    web: httpx.Client
    config: dict[str, Any]
    folder: Path
    outside: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with served(folder / "uploads", *models(folder)) as page, httpx.Client(timeout=60) as web:
        web.base_url = page.local_url
        yield Server(web, page.config, (folder / "uploads").resolve(), folder)


def traps(server: Server) -> dict[str, Path]:
    """Places that nothing may come from, by what they are."""
    (server.folder / "a").mkdir(exist_ok=True)
    found = {
        "secret": server.outside / "secret.png",
        "above": server.folder / "a" / ".." / ".." / "secret.png",
        "nowhere": server.outside / "nowhere.png",
        "device": Path("/dev/stdin"),
        "process": Path("/proc/self/environ"),
        "pipe": server.outside / "pipe.png",
        "link": server.folder / "a" / "link.png",
        "linked folder": server.folder / "a" / "out" / "secret.png",
        "hard link": server.folder / "a" / "hard.png",
        "pipe inside": server.folder / "a" / "pipe.png",
        "folder": server.folder / "a",
        "whole folder": server.folder,
        "missing": server.folder / "a" / "missing.png",
    }
    if not found["secret"].exists():
        Image.new("RGB", (64, 64), SECRET).save(found["secret"])
        found["secret"].chmod(0o600)
        found["link"].symlink_to(found["secret"])
        found["linked folder"].parent.symlink_to(server.outside)
        os.link(found["secret"], found["hard link"])
        os.mkfifo(found["pipe"])
        os.mkfifo(found["pipe inside"])
    return found


def shapes(path: str) -> dict[str, Any]:
    """A file in every shape that a payload may have."""
    plain, meta = {"path": path}, {"path": path, "meta": META}
    return {
        "plain": plain,
        "meta": meta,
        "other meta": {"path": path, "meta": "x"},
        "text": path,
        "address": {"path": f"file://{path}", "url": f"file://{path}"},
        "url": {"path": None, "url": f"/gradio_api/file={path}", "meta": META},
        "both": {
            "path": path,
            "url": f"/gradio_api/file={path}",
            "orig_name": path,
            "mime_type": "image/png",
        },
        "stream": {**meta, "is_stream": True, "size": 3},
        "list": [meta],
        "nested": {"image": meta, "caption": [{"video": plain}]},
        "update": {"__type__": "update", "value": meta},
        "background": {"background": meta, "composite": None, "layers": []},
        "composite": {"background": None, "composite": plain, "layers": [], "id": None},
        "layer": {"background": None, "composite": None, "layers": [plain]},
        "layers": {"background": None, "composite": None, "layers": [None, meta, path], "id": ""},
        "drawing": {"background": None, "composite": None, "layers": [], "id": path},
    }


def ask(server: Server, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the queue says at last to each of these calls."""
    answers: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    for start in range(0, len(calls), 40):
        session = f"s{time.time_ns()}"
        for each in calls[start : start + 40]:
            sent = json.dumps({**each, "session_hash": session})  # as Python writes it: NaN, Infinity
            joined = server.web.post("/gradio_api/queue/join", content=sent, headers=JSON)
            joined.raise_for_status()
            order.append(joined.json()["event_id"])
        with server.web.stream("GET", f"/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    answers[message["event_id"]] = message
    return [answers[each] for each in order]


JSON = {"content-type": "application/json"}


def usual(server: Server, dependency: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A call of one event with the values that the page starts with."""
    components = {each["id"]: each for each in server.config["components"]}
    values = [changes.get(components[each]["props"].get("elem_id"), components[each]["props"].get("value"))
              for each in dependency["inputs"]]  # fmt: skip
    return {"fn_index": dependency["id"], "data": values, "event_data": {"index": [1, 2], "value": None}}


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_of(each)


def shows_secret(server: Server, answer: dict[str, Any]) -> bool:
    """Whether a picture of an answer holds the secret's colour, or a text its path."""
    for text in set(texts_of(answer["output"])):
        if "secret" in text:
            return True
        if text.startswith(str(server.folder)) and text.endswith(".png"):
            fetched = server.web.get(f"/gradio_api/file={text}")
            assert fetched.status_code == 200
            pixels = np.asarray(Image.open(Path(text)).convert("RGB")).astype(int)
            if (np.abs(pixels - SECRET).sum(axis=-1) < 20).mean() > 0.01:
                return True
    return False


def test_no_argument_of_any_event_gives_a_file_away(server, capfd):
    info = server.web.get("/gradio_api/info?all_endpoints=true").json()
    events = [each for each in server.config["dependencies"] if each["backend_fn"]]
    named = {each["api_name"] for each in events if each["api_visibility"] == "public"}
    assert {f"/{name}" for name in named} == set(info["named_endpoints"]) >= {"/reconstruct", "/attention"}
    assert any(each["api_visibility"] == "private" for each in events)
    components = {each["id"]: each for each in server.config["components"]}
    calls, about = [], []
    for event in events:
        for position, number in enumerate(event["inputs"]):
            kind = components[number]["type"]
            takes_files = kind in ("image", "imageeditor")
            places = traps(server) if takes_files else {"secret": traps(server)["secret"]}
            for place, path in places.items():
                for shape, value in shapes(str(path)).items():
                    everything = takes_files and place in ("secret", "link", "missing")
                    if not everything and shape not in ("plain", "meta", "text", "layer"):
                        continue
                    call = usual(server, event, method="brush")
                    call["data"][position] = value
                    calls.append(call)
                    about.append((kind, event["id"], position, shape, place))
    seen: dict[Any, set[str]] = defaultdict(set)
    for what, answer in zip(about, ask(server, calls), strict=True):
        kind, event, position, shape, place = what
        assert not shows_secret(server, answer), what
        unread = kind == "imageeditor" and shape in ("background", "composite", "drawing")
        assert answer["success"] <= unread, what
        if not answer["success"]:
            assert answer["output"]["error"] and str(server.outside) not in answer["output"]["error"], what
        inside = unread and str(traps(server)[place]).startswith(f"{server.folder}/") and place != "above"
        seen[event, position, shape, inside].add(str(answer["output"].get("error")))
    assert len(calls) > 500 and all(len(texts) == 1 for texts in seen.values()), seen
    assert {GONE} in seen.values()
    assert "Traceback" not in capfd.readouterr().err
    event = next(each for each in events if each["api_name"] == "reconstruct")
    assert ask(server, [usual(server, event)])[0]["success"]


def test_the_walk_would_notice_a_secret(server):
    traps(server)
    copy = server.folder / EXAMPLES / "copy.png"
    Image.new("RGB", (64, 64), SECRET).save(copy)
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "reconstruct")
    answer = ask(server, [usual(server, event, picture=str(copy))])[0]
    copy.unlink()
    assert answer["success"] and shows_secret(server, answer)


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


def test_values_that_fit_nowhere_get_a_sentence(server, capfd):
    calls = []
    for event in server.config["dependencies"]:
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


@pytest.mark.parametrize("prefix", ["call", "call/v2", "run", "api"])
def test_the_other_ways_to_call_say_the_same(server, prefix, capfd):
    secret, nowhere = (str(traps(server)[name]) for name in ("secret", "nowhere"))
    answers = []
    for path in (secret, nowhere):
        event = next(each for each in server.config["dependencies"] if each["api_name"] == "inside")
        values = usual(server, event, picture={"path": path})["data"]
        sent: Any = {"data": values} if prefix != "call/v2" else {"picture": values[0], "model": values[1]}
        answer = server.web.post(f"/gradio_api/{prefix}/inside", json=sent)
        if answer.status_code == 200:
            number = answer.json()["event_id"]
            answer = server.web.get(f"/gradio_api/call/inside/{number}", timeout=30)
            assert "event: error" in answer.text and GONE in answer.text
        answers.append((answer.status_code, answer.text))
    assert answers[0] == answers[1] and "Traceback" not in capfd.readouterr().err


def test_files_are_sent_from_the_folder_alone(server):
    upload = {"files": ("mine.png", (server.folder / EXAMPLES / "astronaut.png").read_bytes())}
    mine = server.web.post("/gradio_api/upload", files=upload).json()[0]
    page = {"files": ("page.html", b"<script>alert(1)</script>")}
    text = server.web.post("/gradio_api/upload", files=page).json()[0]
    good = server.web.get(f"/gradio_api/file={mine}")
    assert good.content == Path(mine).read_bytes() and good.headers["content-type"] == "image/png"
    assert server.web.head(f"/gradio_api/file={mine}").headers["content-length"] == str(len(good.content))
    assert server.web.get(f"/gradio_api/file={text}").headers["content-disposition"] == "attachment"
    answers = set()
    for path in [*map(str, traps(server).values()), "http://127.0.0.1:1/x", "file:///etc/passwd", "", "%00"]:
        for prefix in ("file=", "file/", "file=/", "file=./"):
            answer = server.web.get(f"/gradio_api/{prefix}{path}", timeout=10)
            answers.add((answer.status_code, answer.text))
    assert answers == {(404, '{"detail":"Not found."}')}


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
        patch.setattr("demo.pages.reconstruct.hide", stuck)
        answers = ask(server, [usual(server, event)] * 3)
        assert {answer["output"]["error"] for answer in answers} == {
            "This took longer than 0.5 seconds and was cancelled."
        }
    assert ask(server, [usual(server, event)])[0]["success"]  # though three threads are stuck
    free.set()


def test_who_goes_away_frees_the_place(server, monkeypatch):
    event = next(each for each in server.config["dependencies"] if each["api_name"] == "inside")
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
    for more in ({"index": str(10**12)}, {"index": "-1"}, {"index": "x"}, {}, {"fn_name": "preprocess"}):
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

    monkeypatch.setattr("demo.pages.reconstruct.hide", broken)
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
