"""Shapes in signatures are checked in every test; models and data that may be absent are fixtures."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkedshapes import check_shapes

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "src" / "causalprune"
CHECKED = [
    f"causalprune.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli"
]
"""All wings but the one whose types typer reads."""

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; read when huggingface_hub is imported
torch.set_num_threads(1)  # tiny matrices: threads cost more than they bring
check_shapes(CHECKED)  # before the first import of the package


OFTEN = ("llama3", "gemma3", "gpt2", "qwen3_moe")
"""Families that differ most: of a test on many families the others are `thorough`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of one more family `thorough`, where the same test is there for one of `OFTEN`; and all of these `slow`."""
    cases = {item: getattr(item, "callspec", None) for item in items}
    family = {item: case.params.get("family") for item, case in cases.items() if case}
    tried = {item.function for item, own in family.items() if own in OFTEN}  # type: ignore[attr-defined]
    for item in items:
        own = family.get(item)
        seldom = own and own not in OFTEN and item.function in tried  # type: ignore[attr-defined]
        if seldom and item.get_closest_marker("slow") is None:
            item.add_marker("thorough")
        if item.get_closest_marker("thorough"):
            item.add_marker("slow")


def unavailable(reason: str) -> NoReturn:
    """Skip the test; where `CI` is set, nothing may be skipped and it fails instead."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (required, as CI is set)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the path of SmolLM2, from CAUSALPRUNE_SMOLLM2 or the embedded model; only CI fetches it for the tests."""
    given = os.environ.get("CAUSALPRUNE_SMOLLM2")
    if given:
        path = Path(given)
        return path if path.exists() else unavailable(f"CAUSALPRUNE_SMOLLM2 is {given}, which does not exist")
    from causalprune.checkpoints.embedded import cache_folder, embedded_model
    from causalprune.core.errors import CausalPruneError

    if not (os.environ.get("CI") or (cache_folder() / "SmolLM2-135M-Instruct").is_dir()):
        pytest.skip("SmolLM2 is not on this machine: `make demo` fetches it, and so do tests where CI is set")
    try:
        return embedded_model()
    except (CausalPruneError, OSError, ImportError) as error:
        unavailable(f"no SmolLM2: {error}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of the data sets, from CAUSALPRUNE_DATA or beside the repository."""
    path = Path(os.environ.get("CAUSALPRUNE_DATA", REPOSITORY.parent / "shared" / "data"))
    return path if path.is_dir() else unavailable(f"no data sets in {path}: set CAUSALPRUNE_DATA")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small data sets, in the layout of `--data-dir`."""
    from tinydata import write_data

    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model with its tokenizer."""
    from tinydata import write_model

    return write_model(tmp_path_factory.mktemp("model"))


Run = Callable[..., tuple[int, str, str]]
"""Runs the command line in this process: exit code, output, errors."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("CAUSALPRUNE_DATA", raising=False)

    from causalprune.cli.app import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let warnings reach stderr as they do outside of tests."""

    def show(message: Warning | str, category: type[Warning], name: str, line: int, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, name, line))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", show)
        yield


def assert_refused(outcome: tuple[int, str, str], words: str, output: Path) -> None:
    """Check exit code 2, one readable error that names the thing, no traceback and nothing written."""
    code, _, err = outcome
    assert code == 2, err
    assert words in err
    assert "Traceback" not in err
    assert "unexpected" not in err
    if err.startswith("error: "):
        assert len(err.strip().splitlines()) == 1
    assert not output.exists()
    assert not list(output.parent.glob("*.partial-*"))
