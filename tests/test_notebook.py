"""The notebook of the examples runs from top to bottom on the embedded model."""

import os
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow


def test_the_quickstart_runs(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `docs`")
    import nbformat

    for path in (REPOSITORY / "examples").glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    notebook = nbformat.read(REPOSITORY / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    pictures = [data["text/html"] for data in shown if "text/html" in data]
    assert [("<svg" in html, "<table" in html) for html in pictures] == [
        (True, False),  # effects
        (False, True),  # compared
        (False, True),  # the run
    ]
    assert all(data["text/plain"].count("\n") < 5 for data in shown)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
