"""A small export that the tests of this folder share."""

import shutil
from pathlib import Path

import pytest
from export_files import VIT, classifier, export


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A run with a classifier and its fp32 file."""
    run = tmp_path_factory.mktemp("run")
    assert export(classifier(run / "artifact", VIT)) == 0
    return run


@pytest.fixture
def run_folder(exported, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "run"))
