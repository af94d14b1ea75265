"""Weights by name are found in local caches, and never fetched unasked."""

from pathlib import Path

import pytest

from coma.errors import BadInput
from coma.models.hub import is_reference, timm_name, weights_file

DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches; whatever would go to the network fails."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    return tmp_path


def cached(cache: Path, repository: str, *names: str, revision: str = "main") -> Path:
    """Fills the hub's cache as the hub does; returns the folder of the snapshot."""
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_bytes(b"weights")
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text("0123abcd")
    return snapshot


def test_names_have_a_grammar_and_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_reference("timm:vit") and is_reference("hf-hub:timm/vit")
    assert (
        not is_reference("runs/first")
        and not is_reference("file.safetensors")
        and not is_reference("tim:vit")
    )
    (tmp_path / "timm:vit").mkdir()
    assert not is_reference("timm:vit")


@pytest.mark.parametrize(
    ("reference", "repository"),
    [
        (f"timm:{DINO}", f"timm/{DINO}"),
        ("timm:vit_small_patch14_dinov2", f"timm/{DINO}"),
        ("hf-hub:someone/model", "someone/model"),
    ],
)
def test_the_hubs_cache_is_searched(caches: Path, reference: str, repository: str) -> None:
    snapshot = cached(caches, repository, "pytorch_model.bin", "model.safetensors")
    assert weights_file(reference) == snapshot / "model.safetensors"
    (snapshot / "model.safetensors").unlink()
    assert weights_file(reference) == snapshot / "pytorch_model.bin"


def test_a_revision_has_files_of_its_own(caches: Path) -> None:
    snapshot = cached(caches, "someone/model", "model.safetensors", revision="v2")
    assert weights_file("hf-hub:someone/model@v2") == snapshot / "model.safetensors"
    with pytest.raises(BadInput, match="--revision v3"):
        weights_file("hf-hub:someone/model@v3")


def test_the_cache_of_torch_hub_is_searched_last(caches: Path) -> None:
    file = caches / "torch" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    assert weights_file(f"timm:{DINO}") == file
    snapshot = cached(caches, f"timm/{DINO}", "model.safetensors")
    assert weights_file(f"timm:{DINO}") == snapshot / "model.safetensors"


def test_absent_weights_are_refused_with_two_ways_out(caches: Path) -> None:
    with pytest.raises(BadInput, match=r"--download.*hf download timm/\S+lvd142m.*models--timm--"):
        weights_file(f"timm:{DINO}")


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("timm:vit_smal_patch14_dinov2", "did you mean vit_small_patch14_dinov2"),
        ("timm:vit_small_patch14_dinov2.imaginary", f"timm has {DINO}"),
        ("timm:", "no such model"),
        ("timm:botnet50ts_256", "give a file of weights"),
        ("hf-hub:model", "ORG/NAME"),
        ("hf-hub:../..", "ORG/NAME"),
        ("hf-hub:someone/model@", "ORG/NAME"),
        ("hf-hub:someone/model@../../x", "ORG/NAME"),
        ("somewhere", "not a name of weights"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(reference: str, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        weights_file(reference, download=True)


def test_timm_names_are_checked() -> None:
    assert (
        timm_name("timm:vit_tiny_patch16_224") == timm_name("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    )
    with pytest.raises(BadInput, match="no such model"):
        timm_name("timm:nothing_at_all")


def test_downloads_are_asked_for(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked = []

    def fetch(repository: str, name: str, **_: object) -> str:
        asked.append(name)
        if name.endswith(".safetensors"):
            raise EntryNotFoundError("no such file")
        return str(cached(caches, repository, name) / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert weights_file("hf-hub:someone/model", download=True).name == "pytorch_model.bin"
    assert asked == ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"]
    assert weights_file("hf-hub:someone/model", download=True).name == "pytorch_model.bin"
    assert len(asked) == 3  # the second time it is in the cache

    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("please check your connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(BadInput, match=r"could not be downloaded \(please check your connection\)"):
        weights_file("hf-hub:someone/other", download=True)


def test_files_without_a_repository_come_from_their_address(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    config = timm.get_pretrained_cfg(DINO)
    assert config is not None
    config.hf_hub_id = None
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda *_: config)
    with pytest.raises(BadInput, match=r"save it as .*dinov2_vits14_pretrain\.pth"):
        weights_file(f"timm:{DINO}")
    monkeypatch.setattr(
        "torch.hub.download_url_to_file", lambda _, file, __: Path(file).write_bytes(b"weights")
    )
    assert (
        weights_file(f"timm:{DINO}", download=True) == caches / "torch/checkpoints/dinov2_vits14_pretrain.pth"
    )
