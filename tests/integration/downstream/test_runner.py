"""Runs of mmengine: checkpoints that carry checksums, and images that need no shared memory."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coma.atomic_io import seal
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
