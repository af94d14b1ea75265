"""A small export, and files of every kind, that the tests of this folder share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from export_files import VIT, classifier, export
from filelock import FileLock
from gate_cases import Case, Made

from export.image_sets import read_image_set
from export.preprocessing import Photographs


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


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    return list(read_image_set(Photographs(), 3, 6).pictures)


@pytest.fixture(scope="session")
def made(shared, pictures) -> Callable[[Case], Made]:
    """Returns a case with its file."""
    known: dict[str, Made] = {}

    def make(case: Case) -> Made:
        if case.name not in known:
            with FileLock(shared / f"{case.model}.lock"):
                known[case.name] = Made(case, shared, pictures)
        return known[case.name]

    return make
