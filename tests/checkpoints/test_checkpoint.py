"""Saved folders load as plain models, appear whole or not at all, and lose nothing unnoticed."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from causalprune.checkpoints import placing
from causalprune.checkpoints import saving as checkpoint
from causalprune.checkpoints.placing import check_destination
from causalprune.checkpoints.saving import (
    load_effects,
    load_keep,
    read_manifest,
    save,
    save_effects,
)
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.types import Decoder, Effects, Unit
from causalprune.models.anatomy import inspect_model

pytestmark = pytest.mark.filterwarnings("ignore:.*lacks method, sparsity")


def tiny(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> Decoder:
    """Return a random Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    return inspect_model(model, None, name="tiny", revision="main")


def prune_half(decoder: Decoder) -> dict[str, Tensor]:
    """Zero a random half of every projection and return the keep masks."""
    generator = torch.Generator().manual_seed(1)
    keep = {p.name: torch.rand(p.shape, generator=generator) < 0.5 for p in decoder.projections}
    for projection in decoder.projections:
        projection.write(projection.read() * keep[projection.name])
    return keep


def logits(model: Any) -> Tensor:
    """Return the logits of a fixed input."""
    return model(torch.arange(8)[None]).logits


def some_effects(fingerprint: str) -> Effects:
    """Return effects whose floats need every bit."""
    return Effects(
        units=(Unit(0, 0), Unit(0, 1), Unit(1, 3)),
        masked_nats=torch.rand(3, 4, dtype=torch.float64) / 3,
        intact_nats=torch.rand(4, dtype=torch.float64) / 3,
        tokens=torch.tensor([5, 6, 7, 8]),
        subset=torch.tensor([0, 1, 0, 1]),
        model_fingerprint=fingerprint,
        calibration_fingerprint="calibration",
        description={"method": "exact"},
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_model(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    decoder = tiny(dtype, tied=tied)
    prune_half(decoder)
    save(decoder, tmp_path / "out", manifest={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(decoder.model))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_model_and_verifies(tmp_path: Path, family: str) -> None:
    decoder = inspect_model(FAMILIES[family](), None, name=family)
    keep = prune_half(decoder)
    save(decoder, tmp_path / "out", manifest={}, keep=keep)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(decoder.model))
    report = verify(tmp_path / "out")
    assert report.ok, report.findings
    assert report.zeros >= sum(int((~mask).sum()) for mask in keep.values())


def test_a_generation_config_is_kept_even_if_invalid(tmp_path: Path) -> None:
    decoder = tiny()
    decoder.model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, max_new_tokens=7)
    save(decoder, tmp_path / "out", manifest={})
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["max_new_tokens"]) == (0.6, 7)
    assert decoder.model.generation_config.max_new_tokens == 7


def test_a_tokenizer_is_saved(tmp_path: Path) -> None:
    class Words:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    decoder = tiny()
    decoder = Decoder(**{**vars(decoder), "tokenizer": Words()})
    save(decoder, tmp_path / "out", manifest={})
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    decoder = tiny()
    keep = prune_half(decoder)
    save(decoder, tmp_path / "out", manifest={"target": 0.5}, keep=keep)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["run"] == {"target": 0.5}
    assert manifest["base"] == {"name": "tiny", "revision": "main", "fingerprint": decoder.fingerprint}
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model.safetensors", "keep_masks.safetensors"}
    sparsity = manifest["sparsity"]
    assert sparsity["zeros"] == sum(int((~mask).sum()) for mask in keep.values())
    assert sparsity["weights"] == sum(mask.numel() for mask in keep.values())
    assert sparsity["sparsity"] == sparsity["zeros"] / sparsity["weights"]
    row = sparsity["projections"][0]
    first = decoder.projections[0]
    assert (row["name"], row["parameter"], row["expert"]) == (first.name, first.parameter_name, None)
    assert (row["shape"], row["zeros"]) == ([16, 16], int((~keep[first.name]).sum()))


def test_masks_and_effects_come_back(tmp_path: Path) -> None:
    decoder = tiny()
    keep, effects = prune_half(decoder), some_effects(decoder.fingerprint)
    save(decoder, tmp_path / "out", manifest={}, keep=keep, effects=effects)
    masks = load_keep(tmp_path / "out")
    assert masks.keys() == keep.keys()
    assert all(torch.equal(masks[name], keep[name]) for name in keep)
    back = load_effects(tmp_path / "out" / "effects.json", decoder)
    assert back.units == effects.units
    assert back.description == effects.description
    for name in ("masked_nats", "intact_nats", "tokens", "subset"):
        assert getattr(back, name).dtype == getattr(effects, name).dtype
        assert torch.equal(getattr(back, name), getattr(effects, name))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_masks_of_every_shape_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, seed: int
) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    path = tmp_path_factory.mktemp("masks") / "keep_masks.safetensors"
    checkpoint.write_keep({"a": mask}, path)
    assert torch.equal(load_keep(path.parent)["a"], mask)


def test_effects_of_another_model_are_refused(tmp_path: Path) -> None:
    save_effects(some_effects(tiny(seed=1).fingerprint), tmp_path / "effects.json")
    load_effects(tmp_path / "effects.json")
    with pytest.raises(MismatchError, match="effects of another model"):
        load_effects(tmp_path / "effects.json", tiny())


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 1}', '{"format": 99}', "[]", '{"format": 1, "units": [']
)
def test_damaged_effects_are_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "effects.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"effects\.json"):
        load_effects(tmp_path / "effects.json")


def test_effects_of_the_wrong_shape_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "effects.json"
    save_effects(some_effects("model"), path)
    record = json.loads(path.read_text())
    record["units"].pop()
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"masked_nats has shape \[3, 4\] for 2 units"):
        load_effects(path)


def test_effects_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    effects = some_effects("model")
    effects.intact_nats[0] = float("nan")
    with pytest.raises(CheckpointError, match="cannot write effects"):
        save_effects(effects, tmp_path / "effects.json")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("step", ["write_model", "write_keep", "_write_json", "sync", "_replace"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    decoder = tiny()
    keep = prune_half(decoder)
    if before:
        save(decoder, tmp_path / "out", manifest={"run": "first"})
    module = placing if step in ("sync", "_replace") else checkpoint
    real = getattr(module, step)

    def full_disk(*args: Any, **options: Any) -> None:
        if step != "_replace":
            real(*args, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, step, full_disk)
    with pytest.raises(CheckpointError, match=r"cannot save to .*out: .*No space left.* GB free"):
        save(decoder, tmp_path / "out", manifest={}, keep=keep, overwrite=before)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if before else [])
    if before:
        assert read_manifest(tmp_path / "out")["run"] == {"run": "first"}


def test_a_failed_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny()
    save(decoder, tmp_path / "out", manifest={"run": "first"})
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(decoder, tmp_path / "out", manifest={}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_manifest(tmp_path / "out")["run"] == {"run": "first"}


def test_an_interrupt_cleans_up_and_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tiny(), tmp_path / "out", manifest={})
    assert not any(tmp_path.iterdir())


def test_overwrite_replaces_only_our_own_folders(tmp_path: Path) -> None:
    decoder = tiny()
    save(decoder, tmp_path / "deep" / "out", manifest={"run": 1})
    with pytest.raises(CheckpointError, match="exists: choose another folder"):
        save(decoder, tmp_path / "deep" / "out", manifest={"run": 2})
    save(decoder, tmp_path / "deep" / "out", manifest={"run": 2}, overwrite=True)
    assert read_manifest(tmp_path / "deep" / "out")["run"] == {"run": 2}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not written by causalprune"):
        save(decoder, tmp_path / "thesis", manifest={}, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "out")
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_destination(tmp_path / "link", overwrite=True)


def test_a_destination_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not a folder that you may write to"):
        check_destination(tmp_path / "file" / "deep" / "out")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(CheckpointError, match="is not a folder that you may write to"):
        check_destination(tmp_path / "out")


def test_a_mask_that_fits_no_projection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"keep mask of 'nonsense' has shape \[2, 2\]"):
        save(tiny(), tmp_path / "out", manifest={}, keep={"nonsense": torch.ones(2, 2, dtype=torch.bool)})
    assert not any(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a saved, half pruned model with masks."""
    decoder = tiny()
    return save(decoder, tmp_path / "out", manifest={}, keep=prune_half(decoder))


def test_an_untouched_folder_verifies(saved: Path) -> None:
    report = verify(saved)
    assert report.ok
    assert report.sparsity_holds
    assert (report.matrices, report.zeros) == (14, read_manifest(saved)["sparsity"]["zeros"])


def test_a_folder_without_masks_verifies(tmp_path: Path) -> None:
    assert verify(save(tiny(), tmp_path / "out", manifest={})).ok


def edit(folder: Path, *, at: Any, value: float) -> None:
    """Change weights of `layers.1.v` and write the file again."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][at] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_lost_zero_is_found_and_named(saved: Path) -> None:
    pruned = (~load_keep(saved)["layers.1.v"]).nonzero()[0]
    edit(saved, at=tuple(pruned), value=0.5)
    report = verify(saved)
    found = {f.problem: f for f in report.findings}
    assert found.keys() == {"changed", "zeros", "lost"}
    assert found["lost"].subject == "layers.1.v"
    assert "lost its zeros: 1 of" in found["lost"].message
    assert not report.sparsity_holds


def test_zeros_that_moved_are_found_by_the_masks(saved: Path) -> None:
    keep = load_keep(saved)["layers.1.v"]
    edit(saved, at=tuple((~keep).nonzero()[0]), value=0.5)
    edit(saved, at=tuple(keep.nonzero()[0]), value=0.0)
    assert {f.problem for f in verify(saved).findings} == {"changed", "lost"}


def test_a_file_saved_again_has_changed_but_keeps_its_zeros(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt", "saved": "again"})
    report = verify(saved)
    assert [f.problem for f in report.findings] == ["changed"]
    assert report.sparsity_holds
    assert not report.ok


def test_a_flipped_bit_is_found(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [(f.subject, f.problem) for f in verify(saved).findings] == [("model.safetensors", "changed")]


def test_tensors_are_found_in_other_files_by_their_names(saved: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(saved, max_shard_size="5KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    report = verify(saved)
    assert [(f.subject, f.problem) for f in report.findings] == [("model.safetensors", "changed")]
    assert "is gone: its weights were looked for by name" in report.findings[0].message
    assert report.sparsity_holds
    name, index = "model.layers.1.self_attn.v_proj.weight", saved / "model.safetensors.index.json"
    shard = saved / json.loads(index.read_text())["weight_map"][name]
    save_file({n: w + (n == name) for n, w in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert {(f.subject, f.problem) for f in verify(saved).findings} >= {("layers.1.v", "lost")}


def test_another_model_in_the_folder_is_found(saved: Path) -> None:
    torch.manual_seed(0)
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
        )
    )
    other.save_pretrained(saved)
    shapes = {f.subject for f in verify(saved).findings if f.problem == "shape"}
    assert "layers.0.down" in shapes  # narrower
    assert "layers.1.down" in shapes  # absent


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "keep_masks.safetensors").unlink(),
        lambda folder: (folder / "causalprune.json").unlink(),
        lambda folder: (folder / "causalprune.json").write_text("{"),
        lambda folder: (folder / "causalprune.json").write_text(
            '{"format":1,"base":{},"files":{},"sparsity":{}}'
        ),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99),
        lambda folder: (folder / "keep_masks.safetensors").write_bytes(b"\xff" * 99),
        shutil.rmtree,
    ],
)
def test_missing_and_unreadable_files_are_errors(saved: Path, damage: Any) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=str(saved)):
        verify(saved)
