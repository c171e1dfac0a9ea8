"""Where a model is pruned is chosen from its configuration and the memory that is free, before anything is read."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from tinydata import tiny_decoder, write_data

from causalprune.core.errors import ModelError, OptionError
from causalprune.pruning.methods import Method
from causalprune.runs import fitting
from causalprune.runs.recipe import ModelSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    decoder = tiny_decoder()
    decoder.model.save_pretrained(tmp_path / "model")
    decoder.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 1000.0)


def test_what_fits_is_pruned_in_memory(model: Path) -> None:
    found = fitting.place(ModelSpec(str(model)), Method("causal", 0.5), 2048)
    assert not found.stream
    assert found.needed_bytes < found.free_bytes
    assert str(found).startswith("in memory: about ")
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert found.disk_bytes >= 0.95 * stored, "in the dtype of its files, float32"


@pytest.mark.usefixtures("little")
def test_what_does_not_fit_goes_from_its_files_or_is_refused(model: Path) -> None:
    spec = ModelSpec(str(model))
    found = fitting.place(spec, Method("causal", 0.5), 2048)
    assert found.stream
    assert found.disk_bytes == 3 * fitting.place(spec, Method("wanda", 0.5), 2048).disk_bytes
    assert "from file to file" in str(found)
    assert not fitting.place(spec, Method("causal", 0.5), 2048, stream=False).stream
    with pytest.raises(ModelError, match=r"GiB of memory, .* are free.*graded budgets needs the whole"):
        fitting.place(spec, Method("causal", 0.5, budgets="graded"), 2048)
    with pytest.raises(ModelError, match=r"cannot be pruned from its files: --stream keeps the dtype"):
        fitting.place(replace(spec, dtype="bfloat16"), Method("causal", 0.5), 2048)


def test_a_model_that_is_no_folder_is_not_streamed() -> None:
    with pytest.raises(
        OptionError, match=r"--stream takes a local folder .*'org/x' is none: download it first"
    ):
        fitting.check_stored(ModelSpec("org/x"))


@pytest.mark.usefixtures("little")
def test_prune_says_how_and_does_it(model: Path, tmp_path: Path, run: Run) -> None:
    options = ("-n", 6, "--data-dir", write_data(tmp_path / "data"), "--sparsity", "0.5")
    code, out, err = run("prune", model, "-o", tmp_path / "out", *options, "--dry-run")
    assert code == 0, err
    assert out.startswith("from file to file, a layer in memory at a time: about ")
    assert not (tmp_path / "out").exists()
    code, out, err = run("prune", model, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert out.startswith("from file to file")
    assert "nothing is preserved beside the task" in out
    assert '"streamed": true' in (tmp_path / "out" / "causalprune.json").read_text()
