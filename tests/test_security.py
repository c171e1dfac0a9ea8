"""What comes with a model runs nothing and reaches nothing outside its folder, unless the user says so."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import FAMILIES

from causalprune.calibration.data import templates
from causalprune.core.errors import ModelError, OptionError
from causalprune.models.folders import INDEX
from causalprune.models.loading import load
from causalprune.runs.recipe import read_recipe


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickled(folder: Path, **extra: Any) -> Path:
    model = FAMILIES["llama2"]()
    model.config.save_pretrained(folder)
    torch.save({**model.state_dict(), **extra}, folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_unless_they_are_asked_for(run: Run, tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code.*--allow-pickle"):
        load(str(folder))
    code, _, err = run("prune", folder, "-o", tmp_path / "out", "--method", "magnitude")
    assert code == 2
    assert "--allow-pickle" in err
    assert not (tmp_path / "out").exists()
    FAMILIES["llama2"]().save_pretrained(tmp_path / "safe")
    assert load(str(folder), allow_pickle=True).fingerprint == load(str(tmp_path / "safe")).fingerprint
    code, _, err = run("prune", folder, "-o", tmp_path / "out", "--method", "magnitude", "--allow-pickle")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_pickles_on_the_hub_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def from_pretrained(name: str, **options: Any) -> None:
        given.update(options)
        raise OSError("cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`.")

    config = FAMILIES["llama2"]().config
    monkeypatch.setattr("causalprune.models.loading.AutoConfig.from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"somebody/model.*no weights as safetensors: pass --allow-pickle"):
        load("somebody/model")
    assert given["use_safetensors"] is True
    assert given["weights_only"] is True


def test_a_pickle_that_would_run_code_is_refused_even_if_it_is_asked_for(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model", trap=Trap(tmp_path / "sprung"))
    with pytest.raises(ModelError):
        load(str(folder), allow_pickle=True)
    assert not (tmp_path / "sprung").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap is no trap: the test is blind"


def test_beside_safetensors_a_pickle_is_not_read(tmp_path: Path) -> None:
    FAMILIES["llama2"]().save_pretrained(tmp_path / "model")
    intact = load(str(tmp_path / "model")).fingerprint
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not even a pickle")
    for allow in (False, True):
        with pytest.warns(UserWarning, match=r"neither read nor copied: pytorch_model\.bin"):
            assert load(str(tmp_path / "model"), allow_pickle=allow).fingerprint == intact


def test_code_of_a_model_is_not_run_unasked(tmp_path: Path) -> None:
    FAMILIES["llama2"]().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    record = json.loads(config.read_text()) | {"model_type": "own", "architectures": ["Own"]}
    record["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config.write_text(json.dumps(record))
    (tmp_path / "model" / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sprung')!r})")
    with pytest.raises(ModelError, match="pass trust_remote_code if you trust it"):
        load(str(tmp_path / "model"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("way", ["index", "link", "linked shard"])
def test_weights_outside_the_folder_are_refused(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    FAMILIES["llama2"]().save_pretrained(folder, max_shard_size="5GB" if way == "link" else "20KB")
    file = max(folder.glob("*.safetensors"))
    load(str(folder))
    shutil.move(file, tmp_path / file.name)
    if way == "index":
        record = json.loads((folder / INDEX).read_text())
        where = {name: f"../{v}" if v == file.name else v for name, v in record["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(record | {"weight_map": where}))
    else:
        file.symlink_to(tmp_path / file.name)
    with pytest.raises(ModelError, match=r"no safetensors file in that folder|outside the model"):
        load(str(folder))


def test_yaml_makes_data_and_nothing_else(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: !!python/object/apply:os.mkdir [{str(tmp_path / 'sprung')!r}]\n")
    with pytest.raises(OptionError, match=r"recipe\.yaml"):
        read_recipe(recipe)
    assert not (tmp_path / "sprung").exists()


def test_problems_are_filled_in_and_not_carried_out() -> None:
    prompt, _ = templates("gsm8k")
    row = {"question": "{{ 7 * 191 }} {% raw %}", "answer": "1 #### 1"}
    assert row["question"] in prompt.render(**row)
