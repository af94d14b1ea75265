"""Requests to the page of the demo as a program of somebody else sends them."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

JSON = {"content-type": "application/json"}
of_one_event_and_of_all = pytest.mark.parametrize(
    "names", [("reconstruct",), pytest.param((), marks=pytest.mark.slow)], ids=["one", "all"]
)
"""Names of the events that a walk visits; those of the slow one are all that there are."""


class Server(NamedTuple):
    web: httpx.Client
    config: dict[str, Any]
    folder: Path
    outside: Path


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


def usual(server: Server, dependency: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A call of one event with the values that the page starts with."""
    components = {each["id"]: each for each in server.config["components"]}
    values = [changes.get(components[each]["props"].get("elem_id"), components[each]["props"].get("value"))
              for each in dependency["inputs"]]  # fmt: skip
    return {"fn_index": dependency["id"], "data": values, "event_data": {"index": [1, 2], "value": None}}
