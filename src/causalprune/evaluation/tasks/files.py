"""Task files: benchmarks in the format of lm-evaluation-harness."""

from pathlib import Path
from typing import Any

import yaml

from causalprune.calibration import TASK_FILES
from causalprune.core import OptionError
from causalprune.evaluation.tasks.answers import check_kind


def is_task_file(name: str) -> bool:
    """Tell whether a task is the path of a task file."""
    return name.endswith((".yaml", ".yml"))


def task_file(name: str) -> dict[str, Any]:
    """Return what the task file of a name, or of a path, says; `OptionError` where it cannot be used."""
    path = Path(name) if is_task_file(name) else TASK_FILES / f"{name}.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as cause:
        raise OptionError(f"cannot read the task file {path}: {cause}") from cause
    if not isinstance(config, dict) or not {"task", "output_type", "doc_to_text"} <= config.keys():
        raise OptionError(f"{path}: a task file needs at least task, output_type and doc_to_text")
    config["metadata"] = config.get("metadata") or {}
    answer = config["metadata"].get("answer")
    if answer is not None:
        try:
            check_kind(str(answer))
        except OptionError as cause:
            raise OptionError(f"{path}: {cause}") from cause
    if not ({"dataset_path", "custom_dataset"} & config.keys() or config["metadata"].get("source")):
        raise OptionError(f"{path}: a task file names its data: dataset_path, or source in its metadata")
    return config
