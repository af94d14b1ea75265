"""The free memory, the bytes that a backward pass keeps, and the stop of a step before memory runs out."""

import gc
import weakref

import pytest
import torch
from torch import nn

from coma import memory
from coma.errors import BadInput


def test_free_memory_is_below_the_total():
    free, total = memory.free_memory(torch.device("cpu")), memory.total_memory()
    assert free is not None and total is not None and 0 < free <= total


def test_a_container_may_have_less(monkeypatch):
    monkeypatch.setattr(memory, "_container", lambda: (3 * memory.GIB, memory.GIB))
    monkeypatch.setattr(memory, "_meminfo", lambda: {"MemAvailable": 9 * memory.GIB, "MemTotal": 2**40})
    assert memory.free_memory(torch.device("cpu")) == 2 * memory.GIB
    assert memory.total_memory() == 3 * memory.GIB
    monkeypatch.setattr(memory, "_container", lambda: (None, None))
    monkeypatch.setattr(memory, "_meminfo", dict)
    assert memory.free_memory(torch.device("cpu")) is None and memory.total_memory() is None


def test_what_backward_keeps_counts_once():
    layer = nn.Linear(8, 8, bias=False)
    image = torch.randn(16, 8)
    with memory.SavedBytes(layer) as saved:
        first = layer(image)  # keeps the image; the weight is the model's
        torch.exp(first)  # keeps its result
        (first.view(4, 4, 8) ** 2).sum()  # keeps `first`, seen as another shape
    assert saved.total == 3 * image.numel() * 4


def test_cached_files_of_a_container_are_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._container() == (None, None)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 2400\ninactive_file 2000\nactive_file 300\n")
    assert memory._container() == (3000, 600)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container() == (None, None)


def step(layers: int) -> None:
    value = torch.randn(64, 64, requires_grad=True)
    for _ in range(layers):
        value = torch.tanh(value)
    value.sum().backward()


def test_a_step_stops_before_memory_ends(monkeypatch):
    with memory.MemoryGuard(lambda: "never"):
        step(100)
    free = iter([10 * memory.GIB, memory.GIB // 10] + [0] * 100)
    monkeypatch.setattr(memory, "free_memory", lambda device: next(free))
    monkeypatch.setattr(memory, "total_memory", lambda: 10 * memory.GIB)
    monkeypatch.setattr(memory, "_LOOK", 2**18)  # every 16 tensors of a step
    with (
        pytest.raises(BadInput, match=r"0\.1 GiB are left; take fewer"),
        memory.MemoryGuard(lambda: "take fewer"),
    ):
        step(100)


def test_a_gpu_has_errors_of_its_own():
    assert isinstance(memory.guarded(torch.device("cpu"), str), memory.MemoryGuard)
    assert not isinstance(memory.guarded(torch.device("cuda"), str), memory.MemoryGuard)


def test_the_guard_keeps_no_tensor():
    with memory.MemoryGuard(lambda: "never"):
        value = torch.exp(torch.randn(8, requires_grad=True))  # exp keeps its own result
    last = weakref.ref(value)
    del value
    gc.collect()
    assert last() is None
