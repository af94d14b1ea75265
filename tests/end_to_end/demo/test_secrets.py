"""Nothing of the server comes back from the served page, whatever a request names."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_requests import Server, ask, usual
from PIL import Image

from demo.storage import EXAMPLES, GONE

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio and what it builds on warn of each other

SECRET = (201, 17, 133)
"""The colour of a picture that nobody may see."""
META = {"_type": "gradio.FileData"}


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


@pytest.mark.parametrize(
    "names", [("reconstruct",), pytest.param((), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_no_argument_of_any_event_gives_a_file_away(server, capfd, names):
    info = server.web.get("/gradio_api/info?all_endpoints=true").json()
    events = [each for each in server.config["dependencies"] if each["backend_fn"]]
    named = {each["api_name"] for each in events if each["api_visibility"] == "public"}
    assert {f"/{name}" for name in named} == set(info["named_endpoints"]) >= {"/reconstruct", "/nearest"}
    assert any(each["api_visibility"] == "private" for each in events)
    components = {each["id"]: each for each in server.config["components"]}
    calls, about = [], []
    for event in [each for each in events if not names or each["api_name"] in names]:
        for position, number in enumerate(event["inputs"]):
            kind = components[number]["type"]
            takes_files = kind in ("image", "imageeditor", "video")
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
    assert len(calls) > (50 if names else 500) and all(len(texts) == 1 for texts in seen.values()), seen
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
    assert answer["success"] and shows_secret(server, answer)
    copy.unlink()


@pytest.mark.parametrize("prefix", ["call", "call/v2", "run", "api"])
def test_the_other_ways_to_call_say_the_same(server, prefix, capfd):
    secret, nowhere = (str(traps(server)[name]) for name in ("secret", "nowhere"))
    answers = []
    for path in (secret, nowhere):
        event = next(each for each in server.config["dependencies"] if each["api_name"] == "features")
        values = usual(server, event, picture={"path": path})["data"]
        names = ("picture", "model", "stage", "regions")
        sent: Any = {"data": values} if prefix != "call/v2" else dict(zip(names, values, strict=True))
        answer = server.web.post(f"/gradio_api/{prefix}/features", json=sent)
        if answer.status_code == 200:
            number = answer.json()["event_id"]
            answer = server.web.get(f"/gradio_api/call/features/{number}", timeout=30)
            assert "event: error" in answer.text and GONE in answer.text
        answers.append((answer.status_code, answer.text))
    assert answers[0] == answers[1] and "Traceback" not in capfd.readouterr().err


def test_files_are_sent_from_the_folder_alone(server):
    upload = {"files": ("mine.png", (server.folder / EXAMPLES / "coins.png").read_bytes())}
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
            for headers in ({}, {"range": "bytes=0-3"}):
                answer = server.web.get(f"/gradio_api/{prefix}{path}", headers=headers, timeout=10)
                answers.add((answer.status_code, answer.text))
    assert answers == {(404, '{"detail":"Not found."}')}


def test_a_part_of_a_file_is_sent_and_hostile_ranges_cost_nothing(server):
    """Safari plays no video without ranges."""
    whole = (server.folder / EXAMPLES / "coins.png").read_bytes()
    size, place = len(whole), f"/gradio_api/file={server.folder / EXAMPLES / 'coins.png'}"

    def ask_for(asked: str, **more: str) -> Any:
        return server.web.get(place, headers={"range": asked, **more}, timeout=10)

    plain = server.web.get(place)
    assert plain.headers["accept-ranges"] == "bytes" and plain.content == whole
    last = size - 1
    for asked, first, end in (
        ("0-1", 0, 1), ("7-", 7, last), ("-9", size - 9, last), (f"{last}-", last, last),
        (f"5-{size * 99}", 5, last), (f"-{size * 99}", 0, last), ("0-9,3-20", 0, 20), ("x,1-2", 1, 2),
    ):  # fmt: skip
        part = ask_for(f"bytes={asked}")
        assert (part.status_code, part.content) == (206, whole[first : end + 1]), asked
        assert part.headers["content-range"] == f"bytes {first}-{end}/{size}"
        assert part.headers["content-type"] == "image/png"
        assert part.headers["x-content-type-options"] == "nosniff"
    for asked, status in {
        f"bytes={size}-": 416, "bytes=-0": 416, "bytes=9-5": 400, "bytes=--5": 416, "bytes=5": 400,
        "bytes=": 400, "bytes": 400, "items=0-1": 400, "bytes=a-b": 400, f"bytes={'9' * 5000}-": 400,
    }.items():  # fmt: skip
        answer = ask_for(asked)
        assert answer.status_code == status and len(answer.content) < 99, asked
    for each in ("0-", "0-0", "-1"):  # a thousand times the same part
        answer = ask_for("bytes=" + ",".join([each] * 1000))
        assert len(answer.content) <= size and answer.elapsed.total_seconds() < 5, each
    two = ask_for("bytes=0-3,9-9")
    assert two.status_code == 206 and two.headers["content-type"].startswith("multipart/byteranges")
    assert ask_for("bytes=0-1", **{"if-range": plain.headers["etag"]}).status_code == 206
    assert ask_for("bytes=0-1", **{"if-range": '"another"'}).content == whole
