"""Where a model is pruned is chosen from its configuration and the memory that is free, before anything is read."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run, assert_refused
from tinydata import tiny_decoder, write_data

from causalprune.core.errors import MismatchError, ModelError, OptionError
from causalprune.core.resuming import State, forget
from causalprune.models import folders
from causalprune.pruning.methods import Method
from causalprune.runs import fitting, plans
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


def test_a_stopped_run_goes_on_as_it_began(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_in, spec, method = tmp_path / "out.pruning", ModelSpec(str(model)), Method("causal", 0.5)
    for identity, free, stream in ((["streamed", "model"], 1e12, True), (["model"], 1000.0, False)):
        State(kept_in, identity).keep(one=1)
        monkeypatch.setattr(fitting, "free_bytes", lambda device, free=free: free)
        assert fitting.place(spec, method, 2048).stream is not stream
        assert fitting.place(spec, method, 2048, kept_in=kept_in).stream is stream
        forget(kept_in)


def test_what_is_left_of_a_run_from_files_is_named_where_another_cannot_go_so(
    model: Path, tmp_path: Path
) -> None:
    kept_in, spec, method = tmp_path / "out.pruning", ModelSpec(str(model)), Method("causal", 0.5)
    State(kept_in, ["streamed", "model"]).keep(one=1)
    others = [(replace(spec, dtype="bfloat16"), method), (spec, replace(method, budgets="graded"))]
    for own, other in others:
        with pytest.raises(
            MismatchError, match=r"out\.pruning is of a stopped run from files: delete it, or choose another"
        ):
            fitting.place(own, other, 2048, kept_in=kept_in)
        with pytest.raises(OptionError):
            fitting.place(own, other, 2048, stream=True, kept_in=kept_in)


@pytest.mark.usefixtures("little")
def test_a_model_that_is_spread_is_taken_to_fit(model: Path) -> None:
    assert not fitting.place(ModelSpec(str(model), device_map="auto"), Method("causal", 0.5), 2048).stream


@pytest.mark.usefixtures("little")
def test_adam_remembers_too_much_to_go_from_files(model: Path) -> None:
    method = Method("causal", 0.5, update="adam")
    with pytest.raises(OptionError, match="adam remembers eight bytes of every weight"):
        fitting.place(ModelSpec(str(model)), method, 2048, stream=True)


@pytest.mark.usefixtures("little")
def test_effects_that_are_missing_are_said_before_the_start(model: Path) -> None:
    with pytest.raises(OptionError, match="'cap' from files needs effects that were measured before"):
        fitting.place(ModelSpec(str(model)), Method("cap", 0.5), 2048, stream=True, effects=False)
    assert fitting.place(ModelSpec(str(model)), Method("cap", 0.5), 2048, stream=True).stream


def test_the_type_of_a_name_on_the_hub_is_what_its_configuration_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    monkeypatch.setattr(folders, "try_to_load_from_cache", lambda *_, **__: str(file))
    for text, dtype in (
        ('{"torch_dtype": "float16"}', torch.float16),
        ('{"text_config": {"dtype": "bfloat16"}}', torch.bfloat16),
        ("{}", torch.float32),
    ):
        file.write_text(text)
        assert plans.dtype_of(ModelSpec("org/name")) is dtype
    file.write_text('{"torch_dtype": "float16"}')
    with pytest.raises(OptionError, match="float16, in which gradients"):
        fitting.check_trained(ModelSpec("org/name"), "distill")
    monkeypatch.setattr(folders, "try_to_load_from_cache", lambda *_, **__: None)
    assert plans.dtype_of(ModelSpec("org/name")) is torch.bfloat16


def test_a_type_too_narrow_to_train_is_refused_before_anything_is_loaded(model: Path) -> None:
    half = tiny_decoder()
    half.model.to(torch.float16).save_pretrained(model)
    for spec, method in (
        (ModelSpec(str(model)), Method("causal", 0.5)),
        (ModelSpec("org/absent", dtype="float16"), Method("wanda", 0.5, update="distill")),
    ):
        with pytest.raises(OptionError, match="float16, in which gradients of training become zero"):
            fitting.place(spec, method, 2048)
    fitting.place(ModelSpec(str(model)), Method("wanda", 0.5), 2048)
    fitting.place(ModelSpec(str(model), dtype="bfloat16"), Method("causal", 0.5), 2048)


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_a_full_disk_is_named_before_the_start(
    command: str, model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    share = ("--sparsity", "0.5") if command == "prune" else ("--neurons", "0.5")
    words = (
        "-o",
        tmp_path / "out",
        *share,
        "-n",
        6,
        "--preserve",
        "none",
        "--data-dir",
        write_data(tmp_path / "data"),
    )
    refused = run(command, model, *words)
    assert_refused(refused, r"GB are needed for", tmp_path / "out")


def test_room_is_spared_by_weights_alone_that_are_there(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    whole = fitting.room_of(decoder, tmp_path)
    (tmp_path / "lessons").write_bytes(bytes(100))
    assert fitting.room_of(decoder, tmp_path) == whole
    (tmp_path / "layer-0").write_bytes(bytes(100))
    assert fitting.room_of(decoder, tmp_path) == whole - 100


def test_a_model_that_is_no_folder_is_not_streamed() -> None:
    with pytest.raises(
        OptionError,
        match=r"--stream takes a local folder .*'org/x' is none: for a name on the Hub, `hf download",
    ):
        fitting.check_stored(ModelSpec("org/x"))


@pytest.mark.usefixtures("little")
def test_prune_says_how_and_does_it(model: Path, tmp_path: Path, run: Run) -> None:
    options = ("-n", 6, "--data-dir", write_data(tmp_path / "data"), "--sparsity", "0.5")
    code, out, err = run("prune", model, "-o", tmp_path / "out", *options, "--dry-run")
    assert code == 0, err
    assert out.startswith("from file to file, a layer in memory at a time (the whole model would take about ")
    assert not (tmp_path / "out").exists()
    code, out, err = run("prune", model, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert out.startswith("from file to file")
    assert "nothing is preserved beside the task" in out
    assert '"streamed": true' in (tmp_path / "out" / "causalprune.json").read_text()
