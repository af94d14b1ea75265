"""The folder of uploads: what cannot be read from it, and when it is emptied."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from coma.errors import BadImage
from demo import storage
from demo.storage import EXAMPLES, GONE, PREFIX, Storage, delete_leftovers, temporary_storage


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_regular_files_below_the_folder_are_opened_and_nothing_else(tmp_path):
    secret, kept = tmp_path / "secret.png", Storage(tmp_path / "uploads")
    folder = kept.folder
    secret.write_bytes(b"secret")
    (folder / "a").mkdir()
    (folder / "a" / "mine.png").write_bytes(b"mine")
    with kept.open(str(folder / "a" / "mine.png")) as file:
        assert file.read() == b"mine"
    (folder / "link.png").symlink_to(secret)
    (folder / "inner.png").symlink_to(folder / "a" / "mine.png")
    (folder / "elsewhere").symlink_to(tmp_path)
    os.link(secret, folder / "hard.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
    inside = [
        "link.png",
        "inner.png",
        "elsewhere/secret.png",
        "hard.png",
        "pipe.png",
        "socket.png",
        "a",
        "b/c",
    ]
    odd = ["../secret.png", "a/../../secret.png", "a/../a/mine.png", "x\0.png", "\ud800", "x" * 5000]
    outside = [
        str(secret),
        str(tmp_path / "nowhere"),
        "/dev/stdin",
        "/dev/zero",
        "/proc/self/environ",
        "",
        ".",
    ]
    for path in [*(f"{folder}/{name}" for name in (*inside, *odd)), *outside, str(folder), f"{folder}x/a"]:
        with pytest.raises(BadImage) as told:
            kept.open(path)
        assert str(told.value) == GONE, path
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(50):
        with pytest.raises(BadImage):
            kept.open(str(folder / "elsewhere" / "secret.png"))
    assert len(os.listdir("/dev/fd")) == descriptors


def test_what_is_old_is_deleted_and_the_examples_stay(tmp_path):
    kept = Storage(tmp_path / "uploads")
    for name in ("hash/old.png", "hash/new.png", "gone/old.png", f"{EXAMPLES}/old.png", "result.png"):
        path = kept.folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        if "new" not in name:
            age(path, 4000)
    (kept.folder / "link").symlink_to(tmp_path)
    for folder in (kept.folder / "gone", kept.folder / "hash"):
        age(folder, 4000)
    kept.delete_older(3300)
    left = {str(path.relative_to(kept.folder)) for path in kept.folder.rglob("*") if not path.is_dir()}
    assert left == {"hash/new.png", f"{EXAMPLES}/old.png"}
    age(kept.folder / "gone", 4000)
    kept.delete_older(3300)
    assert not (kept.folder / "gone").exists()


def test_no_more_is_accepted_than_there_is_space_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_BYTES", 100)
    kept = Storage(tmp_path / "uploads")
    (kept.folder / "old.png").write_bytes(b"x" * 60)
    (kept.folder / "new.png").write_bytes(b"x" * 30)
    kept.accept(90)
    with pytest.raises(BadImage, match="storage is full"):
        kept.accept(11)
    kept.accept(10)  # what was refused is not counted
    kept.delete_older(3300)
    kept.accept(10)  # the sweep counts what is there
    with pytest.raises(BadImage):
        kept.accept(1)
    age(kept.folder / "old.png", 4000)
    kept.delete_older(3300)
    kept.accept(70)
    assert not (kept.folder / "old.png").exists()
    monkeypatch.setattr(storage, "MOST_BYTES", 2**60)
    kept.accept(100)
    monkeypatch.setattr(storage, "LEAST_FREE", 2**60)  # more than the disk has
    with pytest.raises(BadImage, match="storage is full"):
        kept.accept()


def test_a_running_server_sweeps_its_files_and_its_memory(tmp_path, monkeypatch):
    from demo import app
    from demo.inputs import BLOBS
    from demo.upload import Uploads

    assert app.KEPT_SECONDS + 2 * app.SWEEP_SECONDS < 3600
    monkeypatch.setattr(app, "SWEEP_SECONDS", 0.01)
    kept = Storage(tmp_path)
    uploads, path = Uploads(kept), kept.folder / "mine.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(path)
    age(path, 4000)
    uploads.read(str(path), 3)
    monkeypatch.setattr("demo.inputs.time", SimpleNamespace(time=lambda: time.time() - 4000))
    BLOBS.add("mine", 0, b"x")
    monkeypatch.undo()
    monkeypatch.setattr(app, "SWEEP_SECONDS", 0.01)
    page, failed = SimpleNamespace(temp_file_sets=[{"mine.png"}]), []

    def fail_once(seconds: float) -> None:
        if not failed:
            failed.append(seconds)
            raise OSError("the disk is away")
        Storage.delete_older(kept, seconds)

    monkeypatch.setattr(kept, "delete_older", fail_once)
    session = SimpleNamespace(storage=kept, uploads=uploads)

    async def serve() -> None:
        async with app._sweeping(session, page):  # pyright: ignore[reportArgumentType]
            while path.exists() or page.temp_file_sets[0]:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(serve(), 30))
    assert failed == [app.KEPT_SECONDS] and not uploads._kept and BLOBS.take("mine") == []


def test_leftovers_of_dead_servers_are_deleted_and_live_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_storage() as alive:
        (alive.folder / "upload.png").touch()
        dead, older, fresh = (tmp_path / f"{PREFIX}{name}" for name in ("dead", "older", "fresh"))
        for folder in (dead, older, fresh):
            folder.mkdir()
            (folder / "upload.png").touch()
        (dead / "lock").touch()
        age(older, 2 * storage._DAY)
        (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
        (tmp_path / f"{PREFIX}file").touch()
        assert delete_leftovers() == 2
        left = {path.name.removeprefix(PREFIX) for path in tmp_path.iterdir()}
        assert left == {alive.folder.parent.name.removeprefix(PREFIX), "fresh", "link", "file"}
        assert (alive.folder / "upload.png").exists()
    assert not alive.folder.parent.exists()


SERVER = """
import time
from pathlib import Path
from demo.commands.demo import _ended_by_signals
from demo.storage import delete_leftovers, temporary_storage
print(delete_leftovers(), flush=True)
with _ended_by_signals(), temporary_storage() as storage:
    (storage.folder / "upload.png").touch()
    print(storage.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_end_a_server_and_its_uploads(number, tmp_path):
    def start() -> tuple[subprocess.Popen[str], int, Path]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        assert process.stdout
        return process, int(process.stdout.readline()), Path(process.stdout.readline().strip())

    process, _, folder = start()
    assert (folder / "upload.png").exists()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0 and folder.exists() == (number == signal.SIGKILL)
    if folder.exists():
        process, deleted, _ = start()
        assert deleted == 1 and not folder.exists()
        process.kill()
        process.communicate(timeout=60)
