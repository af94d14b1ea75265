"""The folder of `coma demo --space` in an empty environment, by the commands of its Dockerfile.

Docker is not needed: the steps of the Dockerfile run in a folder of their own with a new environment, whose
`pip` is uv's. The user and the base image are checked by their text alone.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from demo_files import models

from coma.cli import main
from demo.examples import PICTURES, path_of

UV = Path(sys.executable).with_name("uv")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def container(tmp_path) -> Path:
    """An empty folder in place of the container, with an empty environment."""
    home = tmp_path / "container"
    home.mkdir()
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, home / "env"], check=True)
    return home


def environment(container: Path) -> dict[str, str]:
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    path = f"{container / 'env' / 'bin'}:{os.environ['PATH']}"
    return {**plain, "PATH": path, "VIRTUAL_ENV": str(container / "env"), "HOME": str(container / "home")}


def test_the_app_starts_by_the_commands_of_the_dockerfile(tmp_path, container):
    space, work = tmp_path / "space", container / "app"
    given = models(tmp_path / "given")
    assert main(["demo", "--space", "--out", str(space), str(given[0]), str(given[1])]) == 0
    work.mkdir()
    installed = False
    for step, rest in steps(space / "Dockerfile"):
        if step == "FROM":
            assert rest == f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        elif step == "COPY":
            *sources, target = (each for each in shlex.split(rest) if not each.startswith("--chown"))
            for pattern in sources:
                if pattern == ".":
                    shutil.copytree(space, work / target, dirs_exist_ok=True)
                    continue
                for path in space.glob(pattern):
                    shutil.copy(path, work / target)
        elif step == "RUN" and rest.startswith("pip install"):
            command = rest.replace("pip install --no-cache-dir", f"{UV} pip install --quiet")
            subprocess.run(
                ["sh", "-ec", command], cwd=work, env=environment(container) | {"INDEX": ""}, check=True
            )
            installed = True
        elif step == "CMD":
            assert installed
            serves(shlex.split(rest.strip("[]").replace(",", " ")), work, container)
            return
        else:
            assert step in ("RUN", "USER", "ENV", "WORKDIR", "ARG", "EXPOSE"), step
    pytest.fail("no CMD")


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    lines = [line for line in dockerfile.read_text().splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def serves(command: list[str], work: Path, container: Path) -> None:
    """Starts the app and reconstructs a picture on its page, as a visitor's program does."""
    from gradio_client import Client, handle_file

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "OMP_NUM_THREADS": "1"}
    log = container / "log"
    with log.open("w") as file:
        app = subprocess.Popen(
            command, cwd=work, env=environment(container) | settings, stdout=file, stderr=file
        )
    try:
        address = f"http://127.0.0.1:{port}/"
        until = time.monotonic() + 300
        while time.monotonic() < until and app.poll() is None and "open http" not in log.read_text():
            time.sleep(0.5)
        assert app.poll() is None and httpx.get(address).status_code == 200, log.read_text()
        client = Client(address, verbose=False, download_files=str(container / "results"))
        picture = handle_file(str(path_of(PICTURES["temple"])))
        *_, facts = client.predict(picture=picture, painted=None, api_name="/reconstruct")
        assert facts["psnr_db"] > 0 and facts["in_training_data"] is None
        imported = client.predict(picture=picture, api_name="/classify")
        assert imported["label"] in ("cat", "cup", "face")
    finally:
        app.terminate()
        assert app.wait(60) == 143, log.read_text()
    assert not re.search("Traceback|Error", log.read_text())
