"""Runs of mmengine: checkpoints that carry checksums, and images that need no shared memory."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coma.atomic_io import seal, seal_holds
from coma.errors import BadInput

pytestmark = [
    pytest.mark.openmmlab,
    pytest.mark.filterwarnings("ignore"),  # of mm's packages, which are imported inside
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (9, 10):
        path = tmp_path / f"iter_{step}.pth"
        torch.save({"state_dict": {"x": torch.full((9,), float(step))}}, path)
        seal(path)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_10.pth"))
    return tmp_path


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_left_for_the_one_before(folder, caplog):
    from downstream.openmmlab.checkpoint import checkpoint_weights, intact_checkpoint

    assert intact_checkpoint(folder) == folder / "iter_10.pth"
    assert checkpoint_weights(folder / "iter_10.pth")["x"][0] == 10
    spoil(folder / "iter_10.pth")
    assert intact_checkpoint(folder) == folder / "iter_9.pth"
    assert "iter_10.pth: damaged (its checksum does not match); trying the one before" in caplog.text
    with pytest.raises(BadInput, match=r"iter_10\.pth: damaged"):
        checkpoint_weights(folder / "iter_10.pth")
    spoil(folder / "iter_9.pth")
    with pytest.raises(BadInput, match="all its checkpoints are damaged"):
        intact_checkpoint(folder)


def test_a_checkpoint_without_a_checksum_is_taken_with_a_note(folder, caplog):
    from downstream.openmmlab.checkpoint import intact_checkpoint

    torch.save({}, folder / "iter_10.pth")
    assert intact_checkpoint(folder) == folder / "iter_10.pth"
    assert "has no checksum" in caplog.text


@pytest.mark.parametrize("noted", ["", None, "iter_11.pth"], ids=["empty", "missing", "dangling"])
def test_a_run_without_its_note_resumes_from_the_newest_checkpoint(folder, noted):
    from downstream.openmmlab.checkpoint import best_checkpoint, intact_checkpoint

    (folder / "last_checkpoint").unlink()
    if noted is not None:
        (folder / "last_checkpoint").write_text(noted)
    assert intact_checkpoint(folder) == best_checkpoint(folder) == folder / "iter_10.pth"
    spoil(folder / "iter_10.pth")
    assert intact_checkpoint(folder) == folder / "iter_9.pth"
    for name in ("iter_9.pth", "iter_10.pth"):
        (folder / name).unlink()
    assert intact_checkpoint(folder) is None


def test_a_checkpoint_that_was_being_written_is_left_for_the_one_before(folder, caplog):
    from downstream.openmmlab.checkpoint import intact_checkpoint

    (folder / "last_checkpoint").unlink()
    whole = (folder / "iter_10.pth").read_bytes()
    (folder / "iter_11.pth").write_bytes(whole[: len(whole) // 2])
    assert intact_checkpoint(folder) == folder / "iter_10.pth"
    assert "iter_11.pth: damaged (is cut off); trying the one before" in caplog.text


def test_damaged_best_checkpoints_are_ignored(folder, caplog):
    from downstream.openmmlab.checkpoint import best_checkpoint, checkpoint_weights

    for step in (4, 6):
        path = folder / f"best_mIoU_iter_{step}.pth"
        path.write_bytes((folder / "iter_9.pth").read_bytes())
        os.utime(path, (step, step))
    assert best_checkpoint(folder).name == "best_mIoU_iter_6.pth"
    path = folder / "best_mIoU_iter_6.pth"
    path.write_bytes(path.read_bytes()[:200])
    assert best_checkpoint(folder).name == "best_mIoU_iter_4.pth"
    assert "best_mIoU_iter_6.pth: damaged (is cut off); it is ignored" in caplog.text
    with pytest.raises(BadInput, match=r"best_mIoU_iter_6\.pth: damaged \(is cut off\)"):
        checkpoint_weights(path)
    spoil(folder / "best_mIoU_iter_4.pth")
    assert best_checkpoint(folder).name == "iter_10.pth"


def test_checkpoints_get_their_names_when_they_are_whole(tmp_path, monkeypatch):
    from downstream.openmmlab import runner

    def save(_: object, out_dir: str, filename: str, fails: bool = False) -> None:
        Path(out_dir, filename).write_bytes(b"half")
        assert not (tmp_path / "iter_1.pth").exists()
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "save_checkpoint", save)
    made = object.__new__(runner._CheckedRunner)
    with pytest.raises(KeyboardInterrupt):
        made.save_checkpoint(str(tmp_path), "iter_1.pth", fails=True)
    assert not list(tmp_path.glob("*.pth"))
    made.save_checkpoint(str(tmp_path), "iter_1.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["iter_1.pth"]
    assert seal_holds(tmp_path / "iter_1.pth")


@pytest.mark.parametrize("lost", ["no", "moved", "gone", "damaged"])
def test_resumed_runs_forget_the_best_score_of_a_lost_checkpoint(folder, monkeypatch, lost):
    from mmengine.logging import MessageHub

    from downstream.openmmlab import runner

    best = folder / "best_mIoU_iter_9.pth"
    (folder / "iter_9.pth").rename(best)
    noted = folder.parent / "before" / best.name if lost == "moved" else best
    if lost == "gone":
        best.unlink()
    elif lost == "damaged":
        spoil(best)
    hub = MessageHub(f"hub of {lost}")
    made: Any = object.__new__(runner._CheckedRunner)
    made.message_hub, made._work_dir = hub, str(folder)

    def resume(*_: object) -> None:
        hub.update_info_dict({"best_score": 0.5, "best_ckpt": str(noted), "other": 1})

    monkeypatch.setattr(runner.Runner, "resume", resume)
    made.resume("iter_10.pth")
    kept = {} if lost in ("gone", "damaged") else {"best_score": 0.5, "best_ckpt": str(best)}
    assert hub.runtime_info == {"other": 1, **kept}


class Images(Dataset):
    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"image": torch.full((1 << 20,), number, dtype=torch.uint8)}

    def __len__(self) -> int:
        return 4


def test_images_for_mm_need_no_shared_memory():
    from downstream.openmmlab.worker_init import init_worker

    init = partial(init_worker, num_workers=1, rank=0, seed=0)
    loader = DataLoader(
        Images(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=init,
        multiprocessing_context="forkserver",
    )
    for number, sample in enumerate(loader):
        assert sample["image"].eq(number).all()
        assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()
