"""What llama.cpp's converter would make another model of is refused, and weights go as they are stored."""

import json
from pathlib import Path

import pytest
import shipped
from safetensors.torch import load_file, save_file

from causalprune.checkpoints.card import _tried, write_card
from causalprune.core.errors import ModelError
from causalprune.shipping.converting import _stored, check_convertible


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layers_that_get_another_window_by_their_number_are_refused(tmp_path: Path) -> None:
    folder = shipped.write(tmp_path / "gemma", "gemma3")
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    edit(folder, layer_types=kinds)
    check_convertible(folder)
    edit(folder, layer_types=kinds[1:])
    with pytest.raises(ModelError, match=r"gemma3_text a whole text to every 6\."):
        check_convertible(folder)
    edit(folder, layer_types=kinds, query_pre_attn_scalar=17)
    with pytest.raises(ModelError, match="their scale by the width of a head"):
        check_convertible(folder)
    said = _tried({"model_type": "gemma3_text", "kept": ["layers"]})
    assert "`causalprune export` refuses that" in said


def test_an_index_beside_other_weights_is_refused(tmp_path: Path) -> None:
    folder = shipped.write(tmp_path / "model")
    check_convertible(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="transformers takes the first"):
        check_convertible(folder)


def test_weights_go_as_they_are_stored_whatever_the_configuration_says(tmp_path: Path) -> None:
    folder = shipped.write(tmp_path / "model")
    edit(folder, dtype="bfloat16")
    assert _stored(folder, {"dtype": "bfloat16"}) == "float32"
    file = folder / "model.safetensors"
    half = {name: weight if weight.ndim < 2 else weight.half() for name, weight in load_file(file).items()}
    save_file(half, file, metadata={"format": "pt"})
    assert _stored(folder, {"dtype": "bfloat16"}) == "float16"


def test_the_text_part_alone_is_said(tmp_path: Path) -> None:
    folder = shipped.write(tmp_path / "model")
    edit(folder, vision_config={"hidden_size": 8})
    with pytest.warns(UserWarning, match="the text part of the model alone"):
        check_convertible(folder)


def test_a_model_that_was_merged_has_the_card_of_the_pruned_one(tmp_path: Path) -> None:
    pruned, merged, out = (tmp_path / name for name in ("pruned", "merged", "out"))
    for folder in (pruned, merged, out):
        folder.mkdir()
    (pruned / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/base\ntags:\n- causalprune\n---\n\nPruned.\n"
    )
    record = {
        "base": {"name": str(merged), "revision": None, "fingerprint": "0" * 64},
        "sparsity": {"zeros": 1, "weights": 2, "sparsity": 0.5},
        "git_commit": "1",
        "run": {"reapplied": {"from": str(pruned), "to": str(merged)}},
        "versions": dict.fromkeys(("causalprune", "torch", "transformers"), "1"),
    }
    write_card(out, record)
    text = (out / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "base_model: org/base" in text
