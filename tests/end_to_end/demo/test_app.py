"""The served page, called by programs: round trips, many at once, strangers, and the command line."""

import json
import re
import shutil
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from demo_files import models, served
from gradio_client import handle_file
from PIL import Image
from upload_files import bad_files, good_files

from coma.cli import main
from coma.errors import BadInput, CheckFailed
from demo.commands import demo
from demo.examples import PICTURES, path_of

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio and what it builds on warn of each other

NAME = "small"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served(folder / "uploads", *models(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return connect(page, tmp_path_factory.mktemp("results"))


def connect(page: Any, folder: Path) -> Any:
    from gradio_client import Client

    return Client(page.local_url, verbose=False, download_files=str(folder), httpx_kwargs={"timeout": 120})


@pytest.fixture(scope="module")
def photograph() -> Any:
    import skimage

    return handle_file(str(Path(skimage.__file__).parent / "data" / "coffee.png"))


def reconstruct(client: Any, picture: Any, painted: Any = None, **changes: Any) -> tuple:
    values = {
        "model": NAME, "method": "coma", "mask_ratio": 0.75, "seed": 3, "resize_mode": "crop",
        "runtime": "PyTorch",        "statistics": "visible", **changes,
    }  # fmt: skip
    return client.predict(picture=picture, painted=painted, **values, api_name="/reconstruct")


def test_a_pair_comes_back_as_png_with_numbers(client, photograph):
    seen, masked, after, views, about, text, facts = reconstruct(client, photograph)
    assert [view["caption"].split(":")[0] for view in views] == [
        "what view A sees", "B reconstructed from A", "what view B sees", "A reconstructed from B",
        "reconstruction", "error of the reconstruction",
    ]  # fmt: skip
    assert "600 x 400 px, PNG" in about and "centre crop, resized to 48 x 48 px" in text
    for path in (seen, masked, after, *(view["image"] for view in views)):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.size == (512, 512)
    assert facts["psnr_db"] > 0 and -1 <= facts["ssim"] <= 1 and facts["unit_px"] == 16 and facts["seed"] == 3
    assert [view["hidden"] for view in facts["views"]] == pytest.approx([4 / 9, 5 / 9], abs=1e-3)
    assert "PSNR" in text and f"{facts['psnr_db']:.2f} dB" in text
    again = reconstruct(client, photograph)[-1]
    assert again["psnr_db"] == facts["psnr_db"]
    assert reconstruct(client, photograph, seed=4)[-1]["psnr_db"] != facts["psnr_db"]


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"method": "coma4"}, 10),
        ({"method": "mae", "resize_mode": "letterbox"}, 5),
        ({"resize_mode": "whole", "method": "blur"}, 6),
    ],
)
def test_other_methods_and_sizes(client, photograph, changes, views):
    *_, shown, _, _, facts = reconstruct(client, photograph, **changes)
    assert len(shown) == views and facts["method"] == changes["method"]
    assert ("letter-boxed" in facts["resized"]) == (changes.get("resize_mode") == "letterbox")


def test_true_statistics_are_labelled_as_leaking(client, photograph):
    *_, text, facts = reconstruct(client, photograph, statistics="target")
    assert "leak" in text and facts["statistics"] == "target"
    *_, text, facts = reconstruct(client, photograph)
    assert "leak" not in text and facts["statistics"] == "visible"


def test_a_picture_of_the_training_data_is_marked(client, photograph, tmp_path):
    from gradio_client import handle_file

    coins = handle_file(str(path_of(PICTURES["coins"])))
    *_, about, _, facts = reconstruct(client, coins)
    assert facts["in_training_data"] and "In the model's training data" in about
    *_, about, _, facts = reconstruct(client, photograph)
    assert facts["in_training_data"] is False and "Not in the model" in about
    *_, about, _, facts = reconstruct(client, coins, model="masked", method="mae")
    assert facts["in_training_data"] is None and "is not known" in about
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1700, 9, 4), np.uint8)).save(
        tmp_path / "a.png"
    )
    file = reconstruct(client, handle_file(str(tmp_path / "a.png")))[-1]["file"]
    assert file.startswith("9 x 1700 px, PNG, 6") and file.endswith("transparent parts are shown on white")


def test_the_guide_runs_as_it_stands(page, photograph, tmp_path, monkeypatch, capsys):
    from demo.pages.guide import ADDRESS

    (code,) = (each["props"]["value"] for each in page.config["components"] if each["type"] == "code")
    monkeypatch.chdir(tmp_path)
    Image.open(photograph["path"]).save("photograph.jpg")
    exec(code.replace(ADDRESS, page.local_url), {})
    printed = capsys.readouterr().out
    assert re.search(r"^\d+\.\d+ \d+\.\d+$", printed, re.M) and "confidences" in printed


def test_models_are_compared_on_one_mask(client, photograph):
    for method in ("mae", "coma"):
        text, rows = client.predict(photograph, [NAME, "masked"], method, 0.6, 3, api_name="/compare_models")
        assert [row["model"] for row in rows] == [NAME, "masked"] and rows[0]["hidden"] == rows[1]["hidden"]
        assert rows[0]["psnr_db"] != rows[1]["psnr_db"] and text.count("<figure>") == 3
        if method == "mae":
            alone = reconstruct(client, photograph, method="mae", mask_ratio=0.6)[-1]
            assert rows[0]["psnr_db"] == round(alone["psnr_db"], 2)
    for names, problem in (([NAME], "Choose 2 to 4 models"), ([NAME, "/etc"], "give a list of")):
        with pytest.raises(Exception, match=problem):
            client.predict(photograph, names, "mae", 0.6, 3, api_name="/compare_models")


def test_the_brush(client, photograph, tmp_path):
    from gradio_client import handle_file

    strokes = np.zeros((96, 96, 4), np.uint8)
    strokes[:32, :32] = 255
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    painted = {"background": None, "composite": None, "layers": [handle_file(str(tmp_path / "strokes.png"))]}
    facts = reconstruct(client, photograph, painted, method="brush")[-1]
    assert facts["views"][0]["hidden"] == pytest.approx(1 / 9, abs=1e-3)
    assert "Paint over" in reconstruct(client, photograph, method="brush")[-1]["note"]


def test_look_inside_compare_and_classify(client, photograph):
    pyramid, gates, text, _ = client.predict(photograph, NAME, 3, 4, api_name="/features")
    assert len(pyramid) == 6 and len(gates) == 3 and "stage 1, block 1" in text
    place = {"picture": photograph, "other": photograph, "model": NAME, "stage": 3, "row": 0.2, "col": 0.8}
    *pictures, text, maps, facts = client.predict(**place, api_name="/similarity")
    assert len(set(pictures)) == 3 and "1 is bright" in text
    windows = [each["caption"].removeprefix("attention, window: ") for each in maps]
    assert windows == ["whole picture", "2 x 2 tokens"]
    assert facts["match"] == [0.25, 0.75] and facts["match_similarity"] == 1  # of 6 x 6: itself
    assert facts["patches"] == [6, 6] and -1 <= facts["lowest"] < 1
    text, rows = client.predict(photograph, f"{NAME}: reconstructor", api_name="/compare_runtimes")
    others = len(rows) - 1  # every other runtime is listed, with the reason why it does not run this artifact
    assert rows[0]["milliseconds"] > 0 and [row["reason"] is None for row in rows] == [
        True,
        *[False] * others,
    ]
    assert text.count("class='off'") == others > 0
    found = client.predict(photograph, "pets", "PyTorch", api_name="/classify")
    assert found["label"] in ("cat", "cup", "face") and len(found["confidences"]) == 3


def test_results_are_taken_home_under_telling_names(client, photograph, tmp_path):
    settings = {"picture": photograph, "model": NAME, "method": "mae", "mask_ratio": 0.6, "seed": 3,
                "resize_mode": "crop", "runtime": "PyTorch", "statistics": "visible",
                "painted": None}  # fmt: skip
    with Image.open(client.predict(**settings, api_name="/figure")) as figure:
        assert figure.format == "PNG" and figure.width > 1000
    with zipfile.ZipFile(client.predict(**settings, api_name="/archive")) as archive:
        names, facts = archive.namelist(), json.loads(archive.read("result.json"))
    assert "coffee-small-mae-ratio-60-seed-3-reconstruction.png" in names and len(names) == 7
    assert facts["psnr_db"] > 0 and facts["settings"]["picture"] == "coffee.png"
    with pytest.raises(Exception, match="Choose a picture first"):
        client.predict(**{**settings, "picture": None}, api_name="/figure")
    chosen = {each: settings[each] for each in
              ("picture", "model", "seed", "resize_mode", "runtime", "statistics")}  # fmt: skip
    chosen["picture"] = handle_file(shutil.copy(photograph["path"], tmp_path / "Кошка 猫.png"))
    animation, text, rows = client.predict(**chosen, api_name="/mask_ratios")
    assert Path(animation).name == "кошка-猫-small-mask-ratios-seed-3.gif"
    with Image.open(animation) as film:
        assert film.format == "GIF" and getattr(film, "n_frames", 0) == len(rows) == 8  # of 3 x 3 units
    shares = [row["mask_ratio"] for row in rows]
    assert shares == sorted(set(shares)) and text.count("<tr>") == 9
    alone = reconstruct(client, photograph, method="mae", mask_ratio=0.6)[-1]
    assert rows[4]["psnr_db"] == round(alone["psnr_db"], 2)


def test_twenty_at_once(page, photograph, tmp_path):
    def visit(number: int) -> float:
        return reconstruct(connect(page, tmp_path / str(number)), photograph, seed=number % 4)[-1]["psnr_db"]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(visit, range(20)))
    assert all(found[i] == found[i % 4] for i in range(20)) and len(set(found)) == 4


# strangers -------------------------------------------------------------------------------------


def test_bad_uploads_get_a_sentence_and_the_page_lives_on(client, photograph, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    for name, path in bad_files(tmp_path / "bad").items():
        with pytest.raises(AppError) as told:
            reconstruct(client, handle_file(str(path)))
        expected = name.split(".")[0].split(" (")[0]
        assert expected.replace("not a picture", "is not a picture") in str(told.value), name
    for path in good_files(tmp_path / "good").values():
        assert reconstruct(client, handle_file(str(path)))[-1]["psnr_db"] > 0
    assert reconstruct(client, photograph)[-1]["psnr_db"] > 0


def test_uploads_of_too_many_bytes_are_turned_away(page):
    import httpx

    large = {"files": ("large.png", b"\0" * (21 << 20))}
    assert httpx.post(f"{page.local_url}gradio_api/upload", files=large, timeout=60).status_code == 413
    small = {"files": ("small.png", b"\0" * 1000)}
    assert httpx.post(f"{page.local_url}gradio_api/upload", files=small).status_code == 200


def payload(**file: Any) -> dict[str, Any]:
    return {"meta": {"_type": "gradio.FileData"}, "orig_name": "x.png", **file}


def call(page: Any, picture: Any, painted: Any = None) -> str:
    """What the server says to a request that no client of good will makes."""
    import httpx

    numbers = {d["api_name"]: i for i, d in enumerate(page.config["dependencies"])}
    data = [picture, NAME, "coma", 0.5, 1, "crop", "PyTorch", "visible", painted]
    asked = {"data": data, "fn_index": numbers["reconstruct"], "session_hash": f"s{time.time_ns()}"}
    httpx.post(f"{page.local_url}gradio_api/queue/join", json=asked).raise_for_status()
    with httpx.stream(
        "GET", f"{page.local_url}gradio_api/queue/data?session_hash={asked['session_hash']}", timeout=30
    ) as events:
        return "".join(line for line in events.iter_lines() if "process_completed" in line)


def test_files_of_the_server_and_addresses_are_out_of_reach(page, tmp_path):
    secret = tmp_path / "secret.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(secret)
    assert '"success": false' in call(page, payload(path=str(secret))).replace(
        '"success":false', '"success": false'
    )
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.5)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
    for picture, painted in (
        (payload(path=address, url=address), None),
        (payload(path="https://example.invalid/x.png"), None),
        (None, {"background": None, "composite": None, "layers": [payload(path=address)]}),
    ):
        assert "not its address" in call(page, picture, painted)
    with pytest.raises(TimeoutError):
        listener.accept()  # nobody came
    listener.close()


def test_a_model_that_does_not_open_is_no_reason_not_to_serve():
    from demo.app import _warm_up

    def fails(form: str) -> None:
        asked.append(form)
        raise CheckFailed("no GPU")

    asked: list[str] = []
    models: Any = SimpleNamespace(having=lambda form: [SimpleNamespace(runtime=fails)])
    _warm_up(models)
    assert asked == ["reconstructor"]


def test_choices_that_do_not_exist_are_refused(client, photograph):
    for changes in (
        {"model": "/etc"},
        {"runtime": "TensorRT"},
        {"seed": -1},
        {"seed": 2**40},
        {"mask_ratio": 7},
    ):
        with pytest.raises(Exception) as told:
            reconstruct(client, photograph, **changes)
        assert "Traceback" not in str(told.value)


def test_drawings_that_are_never_used_do_not_pile_up(monkeypatch):
    from demo.inputs import Blobs

    blobs = Blobs()
    monkeypatch.setattr(Blobs, "most", 1000)
    for number in range(200):
        blobs.add(str(number), 1, bytes(90))
        blobs.add(str(number), 0, bytes(10))
    assert blobs.take("199") == [bytes(10), bytes(90)] and blobs.take("199") == []
    assert [bool(blobs.take(str(number))) for number in (0, 189, 198)] == [False, False, True]
    blobs.forget_older(0)
    assert blobs.take("197") == []
    for number in range(1000):
        blobs.add(str(number), 0, b"")
    assert len(blobs._kept) == Blobs.drawings and blobs.take("999") == [b""]


# the command -----------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_at_once(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/artifact"], "no such directory"),
        (["--auth", "me"], "NAME:PASSWORD"),
        (["--port", "70000"], "--port 70000 must be at most 65535"),
        (["--host", "::1"], "give an IPv4 address or a name of this machine"),
        (["--host", "nowhere.invalid"], "give an IPv4 address or a name of this machine"),
        (["model.onnx"], "no such file"),
        (["--space"], "--space and --out belong together"),
        (["--out", "folder"], "--space and --out belong together"),
        (["--space", "--out", "folder", "--search", "f.npz"], "leave it out with --space"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--port", "0", *argv]) == 2
    assert message in capsys.readouterr().err


def test_without_arguments_the_shipped_weights_and_the_quickstarts_are_served(tmp_path, monkeypatch):
    from export_files import pretrained

    monkeypatch.chdir(tmp_path)
    assert demo.load_models(demo.default_models(), "cpu").names == ["tiny-64"]
    pretrained(tmp_path / "quickstart" / "run" / "artifact")
    assert demo.load_models(demo.default_models(), "cpu").names == ["tiny-64", "quickstart"]


def test_the_command_serves_this_machine_alone_and_cleans_up(tmp_path, monkeypatch, capsys):
    seen: dict[str, Any] = {}
    (tmp_path / "m").mkdir()
    artifact = models(tmp_path / "m")[0]

    class Page:
        local_url, share_url = "http://127.0.0.1:1/", None

        def block_thread(self) -> None:
            raise KeyboardInterrupt

        def close(self, verbose: bool) -> None:
            seen["closed"] = True

    def serve(
        _: Any, folder: Path, host: str, port: int, auth: Any, share: bool, *__: Any, **___: Any
    ) -> Page:
        (folder / "upload.png").touch()
        seen.update(folder=folder, host=host, auth=auth, share=share)
        return Page()

    monkeypatch.setattr(demo, "serve", serve)
    assert main(["demo", str(artifact), "--port", "0"]) == 130
    assert (seen["host"], seen["auth"], seen["share"], seen["closed"]) == ("127.0.0.1", None, False, True)
    assert not seen["folder"].exists()
    assert "http://127.0.0.1:1/" in capsys.readouterr().out


def test_a_password_is_asked_for_and_other_servers_keep_their_uploads(client, photograph, tmp_path):
    import httpx

    from demo.commands.demo import load_models, serve

    artifact = models(tmp_path)[0]
    page = serve(load_models((artifact,), "cpu"), tmp_path / "uploads", auth=("me", "secret"))
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        assert reconstruct(client, photograph)[-1]["psnr_db"] > 0  # by the server that was there before
        with pytest.raises(BadInput):
            demo.parse_auth("me:")
    finally:
        page.close(verbose=False)
    assert threading.active_count() < 100
