"""What goes out is what came in, but for weights that were pruned, from every form in which models are published."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from sources import SOURCES, Made, compared, edit, fp8, llama, own_head, tensors_in, untied, write
from transformers import AutoModelForCausalLM

from causalprune.checkpoints import carrying, writing
from causalprune.checkpoints.saving import read_manifest, save
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CheckpointError, ModelError
from causalprune.core.types import Decoder, Source
from causalprune.models import shards
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.shrinking.structure import Kept, smaller
from causalprune.streaming.files import prune_stream

PRUNE = ("--method", "magnitude", "--sparsity", "0.5")


def files_in(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, but for the time and the word that differ between two ways to make it."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(found["causalprune.json"])
    record.pop("created")
    record["run"].pop("streamed", None)
    return found | {"causalprune.json": json.dumps(record).encode()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_lost_or_changed_unasked(name: str, tmp_path: Path, run: Run) -> None:
    made = SOURCES[name](tmp_path / "source")
    out = tmp_path / "memory" / "out"
    code, _, err = run("prune", made.model, "-o", out, *PRUNE, *made.options)
    if made.refused:
        assert (code, made.refused in err) == (2, True), err
        return
    assert code == 0, err
    assert not any(compared(made, out).values()), compared(made, out)
    assert verify(out, trust_remote_code="--trust-remote-code" in made.options).ok
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask()}
    if made.streams:
        streamed = tmp_path / "stream" / "out"
        code, _, err = run("prune", made.model, "-o", streamed, *PRUNE, "--stream")
        assert code == 0, err
        own, other = files_in(out), files_in(streamed)
        assert own.keys() == other.keys()
        assert [file for file in own if own[file] != other[file]] == []


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def half(decoder: Decoder) -> Decoder:
    prune(decoder, Method("magnitude", 0.5))
    return decoder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_of_arithmetic_is_not_that_of_files(tmp_path: Path, dtype: str) -> None:
    made = Made(write(tmp_path / "source"))
    save(half(load(str(made.model), dtype=dtype)), tmp_path / "out")
    assert not any(compared(made, tmp_path / "out").values())
    assert verify(tmp_path / "out").ok


def test_a_narrow_dtype_of_arithmetic_loses_no_bits_of_wide_files(tmp_path: Path) -> None:
    made = Made(write(tmp_path / "source", llama().float()))
    save(half(load(str(made.model), dtype="bfloat16")), tmp_path / "out")
    assert not any(compared(made, tmp_path / "out").values())


def test_whatever_was_changed_in_memory_is_written(tmp_path: Path) -> None:
    decoder = load(str(untied(tmp_path / "source").model))
    decoder.model.get_input_embeddings().weight.add_(1)
    decoder.layers[0].module.input_layernorm.weight.mul_(2)
    save(decoder, tmp_path / "out")
    before, after = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}


def test_tensors_that_the_class_does_not_know_are_counted(tmp_path: Path, run: Run) -> None:
    made = SOURCES["extra tensors (MTP)"](tmp_path / "source")
    _, out, _ = run("inspect", made.model, "--json")
    assert json.loads(out)["left_out"]["unknown to the class"] == {"parameters": 3, "weights": 3 * 32 * 32}


def test_a_head_of_its_own_keeps_its_fingerprint_streamed(tmp_path: Path) -> None:
    source = own_head(tmp_path / "source").model
    prune_stream(source, tmp_path / "out", Method("magnitude", 0.5))
    assert read_manifest(tmp_path / "out")["base"]["fingerprint"] == load(str(source)).fingerprint


def test_packed_models_are_unpacked_in_the_dtype_that_is_asked_for(tmp_path: Path, run: Run) -> None:
    made = fp8(tmp_path / "source")
    with pytest.warns(UserWarning, match=r"packed \(FP8\): it is written unpacked, in float16, 0\.00 GB"):
        run("prune", made.model, "-o", tmp_path / "out", *PRUNE, "--dtype", "float16")
    assert tensors_in(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("float16", False)


def test_a_run_says_before_it_starts_that_a_model_is_packed(tmp_path: Path, run: Run) -> None:
    made, problems = fp8(tmp_path / "source"), tmp_path / "own.jsonl"
    problems.write_text("".join(f'{{"prompt": "{i} + 1 =", "target": "{i + 1}"}}\n' for i in range(6)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {made.model}}}\nmethods: [magnitude]\nsparsities: [0.5]\non: [{problems}_nll]\n"
        f"calibration: {{task: [{problems}], n: 6}}\ngeneral_text: none\n"
    )
    with pytest.warns(UserWarning, match=r"packed \(FP8\): it is written unpacked, in bfloat16, 0\.00 GB"):
        run("run", recipe, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "packed",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
        {"load_in_4bit": True},
    ],
)
def test_other_packed_forms_are_refused(packed: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    edit(source / "config.json", lambda record: record | {"quantization_config": packed})
    for way in (
        lambda: load(str(source)),
        lambda: prune_stream(source, tmp_path / "out", Method("magnitude", 0.5)),
    ):
        with pytest.raises(ModelError, match=r"is packed by .* pass the model that it was made from"):
            way()


@pytest.mark.parametrize("damage", ["no word of it", "no scale", "other blocks"])
def test_codes_without_the_right_scales_are_refused(damage: str, tmp_path: Path) -> None:
    source = fp8(tmp_path / "source").model
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "no word of it":
        edit(source / "config.json", lambda record: record | {"quantization_config": None})
    elif damage == "no scale":
        del tensors[f"{name}_scale_inv"]
    else:
        tensors[f"{name}_scale_inv"] = torch.ones(4, 1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    words = "by which scale" if damage != "other blocks" else "does not fit its scales"
    for way in (
        lambda: load(str(source)),
        lambda: prune_stream(source, tmp_path / "out", Method("magnitude", 0.5)),
    ):
        with pytest.raises(ModelError, match=words):
            way()


def test_what_was_not_written_as_it_is_in_memory_is_an_error_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, own = load(str(write(tmp_path / "source"))), shards.ShardWriter.write

    def flipped(writer: Any, at: int, data: Any) -> None:
        own(writer, at, bytes(data)[:-1] + b"\x11" if len(bytes(data)) == 3072 else data)

    monkeypatch.setattr(shards.ShardWriter, "write", flipped)
    for save_it in (
        lambda: save(half(decoder), tmp_path / "out"),
        lambda: prune_stream(tmp_path / "source", tmp_path / "out", Method("magnitude", 0.5)),
    ):
        with pytest.raises(CheckpointError, match=r"not written as it is in memory .*out\.differs"):
            save_it()
        assert not (tmp_path / "out").exists()
        (kept,) = tmp_path.glob("out.differs-*")
        kept.rename(tmp_path / "seen" if not (tmp_path / "seen").exists() else tmp_path / "again")


def test_links_out_of_the_model_large_files_and_code_stay_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source")
    (tmp_path / "secret.json").write_text("{}")
    (source / "notes.json").symlink_to(tmp_path / "secret.json")
    (source / "modeling_own.py").write_text("")
    (source / "large.txt").write_text("x" * 9000)
    monkeypatch.setattr(carrying, "LARGEST", 8000)
    told = r"large\.txt \(over .* MB\); modeling_own\.py \(code.*\); notes\.json \(a link"
    with pytest.warns(UserWarning, match=told):
        save(half(load(str(source))), tmp_path / "out")
    assert not {"notes.json", "modeling_own.py", "large.txt"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_what_was_found_out_about_a_model_is_not_said_of_its_child(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    found = ("correction.json", "circuit.json", "report.html", "correction.ledger")
    for name in found:
        (source / name).write_text("{}")
    save(half(load(str(source))), tmp_path / "out")
    assert not {*found} & {p.name for p in (tmp_path / "out").iterdir()}


class Hub:
    """Stands for the Hub: a snapshot in the cache that lacks two files of the repository."""

    def __init__(self, place: Path, *, reached: bool) -> None:
        self.snapshot = write(place / "models--o--m" / "snapshots" / "abc")
        self.reached, self.fetched = reached, list[str]()
        (self.snapshot / "LICENSE").unlink()

    def model_info(self, name: str, **_: Any) -> Any:
        if not self.reached:
            raise ConnectionError("no network")
        rows = [
            ("LICENSE", 4),
            ("notes.txt", 10**9),
            ("own.py", 3),
            ("model.safetensors", 5),
            ("onnx/a.json", 1),
        ]
        return type("Info", (), {"siblings": [type("F", (), {"rfilename": n, "size": s}) for n, s in rows]})

    def download(self, name: str, file: str, **_: Any) -> str:
        self.fetched.append(file)
        (self.snapshot / file).write_text("fetched")
        return str(self.snapshot / file)


@pytest.mark.parametrize("reached", [True, False])
def test_files_that_the_cache_lacks_are_fetched_or_named(
    reached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, reached=reached)
    monkeypatch.setattr(carrying.hub, "HfApi", lambda: hub)
    monkeypatch.setattr(carrying.hub, "hf_hub_download", hub.download)
    known = dict.fromkeys(("README.md", "LICENSE"))
    monkeypatch.setattr(
        carrying.hub, "try_to_load_from_cache", lambda _, file, **__: known.get(file, "there")
    )
    decoder = load(str(hub.snapshot))
    (tmp_path / "out").mkdir()
    from_hub = replace(decoder, name="o/m", source=Source(hub.snapshot, torch.bfloat16, hub=True))
    if reached:
        carrying.carry(from_hub, tmp_path / "out")
    else:
        with pytest.warns(UserWarning, match=r"cannot be asked.*if it has README\.md, LICENSE, fetch"):
            carrying.carry(from_hub, tmp_path / "out")
    assert hub.fetched == (["LICENSE"] if reached else [])
    assert (tmp_path / "out" / "LICENSE").exists() == reached
    assert decoder.source == Source(hub.snapshot, torch.bfloat16)


def test_a_smaller_model_has_dtype_and_files_of_its_source(tmp_path: Path) -> None:
    source = SOURCES["extra tensors (MTP)"](tmp_path / "source").model
    decoder = load(str(source), dtype="float32")
    kept = Kept(neurons={i: torch.arange(32) for i in range(2)})
    with pytest.warns(UserWarning, match=r"3 tensors .*such as model\.layers\.2\.eh_proj"):
        save(smaller(decoder, kept), tmp_path / "out")
    assert {t.dtype for t in tensors_in(tmp_path / "out").values()} == {torch.bfloat16}
    assert {"LICENSE", "chat_template.jinja", "README.base.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(tmp_path / "out").ok


def test_files_that_do_not_fit_any_more_are_said_and_the_model_is_saved(tmp_path: Path) -> None:
    decoder = load(str(write(tmp_path / "source")))
    decoder.model.resize_token_embeddings(264)
    with pytest.warns(
        UserWarning, match=r"cannot be written again \(.* \[264, 32\] of the model has no place"
    ):
        save(decoder, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 264


def test_new_tokenizers_are_read_by_transformers_4(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}')
    writing.for_older_tokenizers(tmp_path)
    found = json.loads(path.read_text())
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}


@pytest.mark.parametrize("has", [True, False])
def test_what_a_disk_says_while_more_is_written_is_not_lost(
    has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(shards, "AT_ONCE", 0)
    monkeypatch.setattr(shards.os, "fdatasync", full)
    if not has:  # as on macOS
        monkeypatch.delattr(shards.os, "fdatasync")
        monkeypatch.setattr(shards.os, "fsync", full)
    writer = shards.ShardWriter(tmp_path / "model.safetensors", b"header", 64)
    with pytest.raises(OSError, match="no room"):
        writer.close()
