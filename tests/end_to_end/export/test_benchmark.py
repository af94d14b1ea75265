"""`coma benchmark`: who is timed, who is not and why, and files that are not those that were verified."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from downstream_data import artifact

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from export_files import Silent  # noqa: E402

from coma import cli  # noqa: E402
from coma.artifact.load import artifact_hash  # noqa: E402
from coma.config import DyViTConfig  # noqa: E402
from coma.errors import BadInput  # noqa: E402
from coma.runtimes.manifest import (  # noqa: E402
    Entry,
    Manifest,
    Selection,
    versions,
)
from coma.runtimes.model_spec import METADATA, read_model_spec, to_json  # noqa: E402
from coma.runtimes.shape_ranges import Shape, Shapes  # noqa: E402
from export.benchmark import (  # noqa: E402
    EAGER,
    Call,
    LoadedModel,
    busy_note,
    measure,
    open_exports,
    open_torch,
    prepare_calls,
)
from export.commands import benchmark  # noqa: E402
from export.graphs.load import load_exportable  # noqa: E402
from export.image_sets import ImageSet  # noqa: E402
from export.latency import time_interleaved  # noqa: E402
from export.onnx_export import write_onnx  # noqa: E402

SMALL = DyViTConfig(dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((8,), (4,), (0,), (0,)))
QUICK = ("--benchmark-seconds", "0.01")


def entry(path: Path, precision: str, **changes) -> Entry:
    known = {
        "file": path.name,
        "graph": "encoder",
        "precision": precision,
        "runtime": "",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "",
        "bytes": 1,
        "parameters": 1,
        "shapes": [],
        "tolerances": {},
        "verification": {"outputs": {}, "failures": []},
        "images": "photographs",
    }
    return Entry(**known | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An artifact without exports."""
    return artifact(tmp_path_factory.mktemp("plain") / "artifact", SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An artifact and, beside it, its exports: one that a CPU runs, and others for every reason not to."""
    root = tmp_path_factory.mktemp("made")
    directory, folder = artifact(root / "artifact", SMALL), root / "export"
    exportable, one = load_exportable(directory, "encoder"), Shape(1, 64, 64)
    write_onnx(exportable, Shapes(one, one, Shape(4, 64, 64)), folder / "encoder.onnx")
    model = onnx.load(folder / "encoder.onnx")
    says = to_json(replace(read_model_spec(model, "encoder"), precision="bf16"))
    onnx.helper.set_model_props(model, {METADATA: says})
    onnx.save(model, folder / "encoder-bf16.onnx")
    (folder / "encoder.engine").write_bytes(b"no engine")
    (folder / "strange.onnx").write_bytes(b"in no manifest")
    manifest = Manifest("artifact", artifact_hash(directory), "backbone")
    for name, precision, changes in (
        ("encoder.onnx", "fp32", {}),
        ("encoder-bf16.onnx", "bf16", {}),
        ("encoder.engine", "fp32", {}),
        ("gone.onnx", "fp16", {}),
        ("reconstructor.onnx", "fp32", {"graph": "reconstructor"}),
    ):
        manifest.add(entry(folder / name, precision, **changes), passed=True)
    refused = {"verification": {"outputs": {}, "failures": ["pooled: cosine 0.5 is below 0.99"]}}
    manifest.add(entry(folder / "encoder-int8.onnx.rejected", "int8", **refused), passed=False)
    manifest.write(folder)
    return directory


def results(directory: Path, out: Path, *argv: str) -> dict:
    benchmark.run([str(directory), "--out", str(out), *QUICK, *argv])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def measured(made: Path, tmp_path_factory) -> dict:
    return results(made, tmp_path_factory.mktemp("out") / "new" / "results.json", "--batch", "1,3")


def test_pytorch_and_the_file_are_timed_at_every_batch_alone_and_end_to_end(measured):
    found = {(row["name"], row["batch"], row["what"]) for row in measured["rows"]}
    names, whats = ("torch eager", "encoder.onnx"), ("compute", "end to end")
    assert found == {(name, batch, what) for name in names for batch in (1, 3) for what in whats}
    assert len(measured["rows"]) == len(found)
    for row in measured["rows"]:
        assert 0 < row["p50"] <= row["p90"] <= row["p99"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["p50"])
        assert row["runs"] >= 5
        if row["name"] == "torch eager":
            assert row["speed"] == 1
    assert {row["runtime"].partition(" ")[0] for row in measured["rows"]} == {"torch", "ONNX"}


def test_speed_is_pytorchs_median_over_ones_own(measured):
    p50 = {(row["name"], row["batch"], row["what"]): row["p50"] for row in measured["rows"]}
    for row in measured["rows"]:
        eager = p50["torch eager", row["batch"], row["what"]]
        assert row["speed"] == pytest.approx(eager / row["p50"])


def test_speed_is_that_on_the_same_device():
    runtime: Any = SimpleNamespace(title="")
    calls = [
        Call(LoadedModel(name, "fp32", runtime, device), "compute", lambda: None, 0.0)
        for name, device in ((EAGER, "cpu"), ("a.onnx", "cpu"), ("a.engine", "cuda"))
    ]
    assert [row.speed is None for row in measure(calls, 1, 0)] == [False, False, True]
    calls.append(Call(LoadedModel(EAGER, "fp32", runtime, "cuda"), "compute", lambda: None, 0.0))
    rows = measure(calls, 1, 0)
    assert rows[1].speed == rows[0].latency.p50 / rows[1].latency.p50
    assert rows[2].speed == rows[3].latency.p50 / rows[2].latency.p50


def test_decoding_takes_time(measured):
    by_what = {row["what"]: row["p50"] for row in measured["rows"] if row["name"] == "torch eager"}
    assert by_what["end to end"] > 2 * by_what["compute"]  # photographs of half a megapixel, 64 px


def test_what_is_not_run_is_named_with_its_reason(measured):
    reasons = {each["name"]: each["reason"] for each in measured["not_run"]}
    assert "no bf16 on a CPU; use a GPU (cuda)" in reasons["encoder-bf16.onnx"]
    assert "--compile" in reasons["torch compiled"]
    assert "missing" in reasons["gone.onnx"]
    assert "not of the encoder" in reasons["reconstructor.onnx"]
    assert "cosine 0.5 is below 0.99" in reasons["encoder-int8.onnx.rejected"]
    assert reasons["encoder.engine"]
    assert reasons["strange.onnx"] == "is not listed in manifest.json, so it was never verified"
    assert len(reasons) == 7


def test_the_file_says_what_was_measured_and_where(measured, made):
    assert measured["source"] == artifact_hash(made)
    assert (measured["kind"], measured["graph"], measured["size"]) == ("backbone", "encoder", [64, 64])
    assert measured["machine"] and measured["versions"] == versions()
    assert measured["threads"] == torch.get_num_threads()
    assert "scikit-image" in measured["images"]


def test_a_batch_that_a_file_does_not_take_is_named_and_the_rest_is_timed(made, tmp_path):
    # ONNX Runtime itself takes other sizes than asked for; static axes it does not
    found = results(made, tmp_path / "r.json", "--batch", "2", "--size", "64x96")
    assert {row["name"] for row in found["rows"]} == {"torch eager"}
    reason = next(each for each in found["not_run"] if each["name"] == "encoder.onnx")
    assert reason["batch"] == 2 and "64" in reason["reason"] and "96" in reason["reason"]


def test_the_table_is_on_stdout_and_the_progress_is_not(made, capsys):
    benchmark.run([str(made), *QUICK, "--batch", "2", "--threads", "1"])
    shown = capsys.readouterr()
    for word in ("p50 ms", "p99", "images/s", "torch eager", "encoder.onnx", "1.00 x", "end to end"):
        assert word in shown.out
    assert "not run  encoder-bf16.onnx: " in shown.out
    assert "timing" in shown.err and "timing" not in shown.out


def test_a_changed_file_is_refused_by_name(made, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for path in (made.parent / "export").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with (folder / "encoder.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadInput, match=r"encoder\.onnx: has changed since its verification.*coma export"):
        benchmark.run([str(made), *QUICK, "--exports", str(folder)])


def test_without_exports_pytorch_is_timed_alone(model, tmp_path):
    found = results(model, tmp_path / "r.json", "--batch", "1")
    assert {row["name"] for row in found["rows"]} == {"torch eager"}
    assert any("coma export" in each["reason"] for each in found["not_run"])


def test_exports_of_another_artifact_are_not_taken_for_its_own(made, tmp_path):
    other = artifact(tmp_path / "other", SMALL, seed=1)
    with pytest.raises(BadInput, match="holds exports of another artifact"):
        benchmark.run([str(other), *QUICK, "--exports", str(made.parent / "export")])
    (tmp_path / "export").symlink_to(made.parent / "export")
    found = results(other, tmp_path / "r.json", "--batch", "1")
    assert {row["name"] for row in found["rows"]} == {"torch eager"}
    assert any("another artifact" in each["reason"] for each in found["not_run"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "1,0"], "--batch: 0 must be at least 1"),
        (["--batch", "1,,8"], "--batch"),
        (["--size", "64"], "--size '64': give HxW"),
        (["--size", "16x64"], "mask unit is 32 x 32 px"),
        (["--benchmark-seconds", "0"], "--benchmark-seconds 0 must be more than 0"),
        (["--threads", "0"], "--threads 0 must be 1 to 4096"),
        (["--graph", "reconstructor"], "is a backbone; its graph is encoder"),
        (["--exports", "nowhere"], "--exports nowhere: no manifest.json; run coma export"),
        (["--images", "nowhere"], "nowhere"),
        (["--out", "."], "is a directory"),
    ],
)
def test_bad_settings_say_what_to_give(model, argv, message):
    with pytest.raises(BadInput) as raised:
        benchmark.run([str(model), *QUICK, *argv])
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(model):
    with pytest.raises(BadInput, match="finds no GPU"):
        benchmark.run([str(model), *QUICK, "--device", "cuda"])


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"source": "x", "files": [{}], "rejected": []}'])
def test_a_manifest_that_cannot_be_read_is_an_error(made, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json: not readable"):
        benchmark.run([str(made), *QUICK, "--exports", str(tmp_path)])


def test_threads_are_given_back_after_an_error_too(model, monkeypatch):
    used, before = [], torch.get_num_threads()

    def fail(*_) -> None:
        used.append(torch.get_num_threads())
        raise BadInput("of no importance")

    monkeypatch.setattr(benchmark, "_benchmark", fail)
    with pytest.raises(BadInput):
        benchmark.run([str(model), "--threads", str(before + 1)])
    assert (used, torch.get_num_threads()) == ([before + 1], before)


def test_files_are_opened_on_the_device_and_with_the_threads_asked_for(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("coma.runtimes.onnxruntime.OnnxRuntime", lambda *how: opened.append(how))
    entries = [entry(tmp_path / f"{name}.onnx", name) for name in ("fp32", "bf16")]
    found, _ = open_exports(tmp_path, entries, ["cuda"], 3, Silent())
    assert [how[:3] for how in opened] == [(tmp_path / f"{n}.onnx", "cuda", 3) for n in ("fp32", "bf16")]
    assert [(each.precision, each.device) for each in found] == [("fp32", "cuda"), ("bf16", "cuda")]


def test_threads_of_onnx_runtime_do_not_wait_actively_between_runs(made):
    entries = [entry(made.parent / "export" / "encoder.onnx", "fp32")]
    (found,), _ = open_exports(made.parent / "export", entries, ["cpu"], 1, Silent())
    settings = found.runtime._session.get_session_options()  # pyright: ignore[reportAttributeAccessIssue]
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_machine_that_is_busy_is_remarked(monkeypatch):
    monkeypatch.setattr("export.benchmark.cores", lambda: 4)
    for load, threads, busy in (
        (0.5, 4, False),
        (1.9, 4, True),
        (1.9, 2, False),
        (3, 1, False),
        (5, 1, True),
    ):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert (busy_note(threads) is not None) == busy
    assert "fewer --threads" in (busy_note(4) or "")


def test_images_without_files_are_not_decoded(model):
    contenders, _ = open_torch(model, "encoder", ["cpu"], compiled=False)
    pictures = (np.zeros((70, 80, 3), np.uint8),)
    images = ImageSet(Selection("arrays", 1, 1), pictures)
    calls, left_out = prepare_calls(contenders, images, 2, (64, 64), Silent())
    assert [call.what for call in calls] == ["compute"]
    assert not left_out


def test_calls_run_in_turns():
    order: list[str] = []
    time_interleaved([lambda: order.append("a"), lambda: order.append("b")], 1, seconds=0, least=3)
    assert order == [*"aaabbb", *"ab" * 3]  # warm each, then in turns


def test_latency_is_what_the_clock_counts():
    ticks = iter(range(100))
    (latency,) = time_interleaved([lambda: None], 4, seconds=0, least=3, clock=lambda: next(ticks) / 2)
    assert (latency.p50, latency.images_per_second, latency.runs) == (500, 8, 3)


def test_help_says_what_it_does(capsys):
    assert cli.main(["benchmark", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in (
        "exports",
        "graph",
        "device",
        "batch",
        "size",
        "benchmark-seconds",
        "compile",
        "threads",
        "images",
    ):
        assert f"--{flag}" in shown
    assert cli.main(["--help"]) == 0
    assert (
        "Measure the latency of an artifact in PyTorch and in all files exported from it, side by side"
        in capsys.readouterr().out
    )
