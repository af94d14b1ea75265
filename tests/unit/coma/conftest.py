"""An artifact that the tests of artifacts share."""

from pathlib import Path

import pytest
from artifact_files import description, pretrained

from coma.artifact import save_artifact


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", tensors=pretrained(), config=description())
    return tmp_path / "artifact"
