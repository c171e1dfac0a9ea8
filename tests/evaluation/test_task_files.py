"""Benchmarks that come with the package."""

from pathlib import Path

import pytest

from causalprune.calibration.data import SOURCES, TASK_FILES
from causalprune.evaluation.tasks.files import task_file


@pytest.mark.parametrize("path", sorted(TASK_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_file_has_its_own_name_and_known_problems(path: Path) -> None:
    config = task_file(path.stem)
    assert config["task"] == path.stem
    assert config["metadata"]["source"] in SOURCES
    assert config["metadata"]["version"] >= 1
