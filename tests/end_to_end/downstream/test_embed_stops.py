"""`coma embed` is stopped, killed, shared and loses machines: nothing is lost, nothing is there twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from embedding_runs import QUICK, embed, same
from export_files import open_as_int8

from coma.cli import CHILD
from downstream.features.parts import FeatureParts
from downstream.parts import Parts


def test_a_stopped_command_continues(model, pictures, reference, tmp_path, monkeypatch, capsys, caplog):
    out, computed = tmp_path / "f.parquet", []
    write = Parts.write

    def stop_after_two(self, number, content):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(number)
        write(self, number, content)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", stop_after_two)
        assert embed(model, pictures, out) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not out.exists() and computed == [0, 1]
    parts = sorted((tmp_path / "f.parquet.parts").iterdir())
    before = {path: path.stat().st_mtime_ns for path in parts}
    (tmp_path / "f.parquet.parts" / ".part-000002.parquet.part").write_bytes(b"half")  # of a kill -9

    def keep(self, number, content):
        computed.append(number)
        write(self, number, content)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", keep)
        assert embed(model, pictures, out) == 0
    assert computed == [0, 1, 2, 3]
    assert "12 images of 23 are done already" in caplog.text
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))
    written = out.read_bytes()
    assert embed(model, pictures, out) == 0  # there is nothing left to do
    assert "is complete already" in caplog.text and out.read_bytes() == written


def test_a_stopped_command_keeps_to_one_precision(model, pictures, reference, tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.parquet"

    def refused_as_int8() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr("downstream.features.models.open_model", open_as_int8)
            code = embed(model, pictures, out)
        return code == 2 and "(precision fp32 there, int8 now)" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(FeatureParts, "merge", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert embed(model, pictures, out) == 130
    assert refused_as_int8()
    request = tmp_path / "f.parquet.parts" / "request.json"
    older = json.loads(request.read_text())
    del older["precision"]  # as it was before precisions were told apart
    request.write_text(json.dumps(older))
    assert embed(model, pictures, out) == 0 and same(out, reference)
    assert refused_as_int8()


def test_a_kill_while_parts_are_merged_loses_nothing(model, pictures, reference, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"

    def killed(*_):
        raise KeyboardInterrupt

    for target in ("downstream.features.parts.write_features", "downstream.features.parts.shutil.rmtree"):
        with monkeypatch.context() as patch:
            patch.setattr(target, killed)
            assert embed(model, pictures, out) == 130
        assert list(tmp_path.glob("*.parts"))
    assert embed(model, pictures, out) == 0
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))


def test_a_full_disk_keeps_finished_parts(model, pictures, reference, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "f.parquet", os.write
    left = [12_000]

    def nearly_full(number, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        assert embed(model, pictures, out) == 1
    said = capsys.readouterr().err
    assert "No space left on device; " in said and "finished part" in said and "same command again" in said
    assert embed(model, pictures, out) == 0 and same(out, reference)


@pytest.fixture
def one_thread(monkeypatch):
    """Processes side by side are slow where each has a thread for every core."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_kill_9_loses_nothing_and_writes_nothing_twice(model, pictures, reference, tmp_path):
    out = tmp_path / "f.parquet"
    command = [*CHILD, "embed", str(model), str(pictures), "--out", str(out), *QUICK, "--part-images", "1"]
    for more in (1, 12):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while len(list(tmp_path.glob("f.parquet.parts/part-*"))) < more and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_torchrun_shares_the_work(model, pictures, reference, tmp_path):
    out = tmp_path / "f.parquet"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "coma", "embed", str(model), str(pictures), "--out", str(out), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert same(out, reference) and not list(tmp_path.glob("*.parts"))
    assert done.stdout.count("features of 21 images") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_ray_cluster_that_loses_a_machine_loses_nothing(model, pictures, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    command = [str(model), str(pictures), "--out", str(tmp_path / "f.parquet"), *QUICK, "--part-images", "1"]
    done = subprocess.run(
        [sys.executable, str(script), *command], capture_output=True, text=True, timeout=580, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost a machine after" in done.stdout
    assert same(tmp_path / "f.parquet", reference) and not list(tmp_path.glob("*.parts"))


CLUSTER = """
import subprocess, sys, time
from pathlib import Path
from typing import Any
from ray.cluster_utils import Cluster

out = Path(sys.argv[sys.argv.index("--out") + 1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
try:
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = [sys.executable, "-P", "-m", "coma", "embed", *sys.argv[1:], "--ray", cluster.address]
    process = subprocess.Popen(command)
    parts = out.with_name(out.name + ".parts")
    while len(list(parts.glob("part-*"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    done = len(list(parts.glob("part-*")))
    cluster.remove_node(workers[0], allow_graceful=False)
    print("lost a machine after", done, "parts", flush=True)
    assert 0 < done < 23, done
    code = process.wait(400)
finally:
    cluster.shutdown()
sys.exit(code)
"""
