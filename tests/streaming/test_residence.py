"""Layers that are in memory one at a time are pruned as in a model that is there as a whole, byte for byte."""

import shutil
import warnings
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from families import FAMILIES
from pretended import pretended
from reference import calibration, fresh
from test_streaming import effects_of, same, saved, tensors
from tinydata import tiny_decoder, write_data
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from causalprune.checkpoints import saving as checkpoint
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CheckpointError, MismatchError, OptionError
from causalprune.core.resuming import State
from causalprune.interventions.ablation import LayerInputs
from causalprune.models.loading import load, skeleton
from causalprune.pruning import training
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.pruned import manifest
from causalprune.streaming import files
from causalprune.streaming.copies import Copies, check_unshared
from causalprune.streaming.files import Seen, prune_stream
from causalprune.streaming.residence import HiddenStates, Residence

ROOM = 28
SEEN = Seen(calibration(), max_batch_tokens=ROOM)
OFTEN = ("llama3", "gemma3", "qwen3_moe", "gpt2")
SELDOM = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family not in OFTEN]
METHODS = {
    "causal": Method("causal", 0.5),
    "fisher": Method("fisher", 0.5, "matrix"),
    "wanda": Method("wanda", 0.5),
    "sparsegpt": Method("sparsegpt", 0.5),
    "wanda:2:4+refit": Method("wanda", 0.5, "2:4", update="refit"),
    "magnitude+obs": Method("magnitude", 0.4, "row", update="obs"),
    "cap:row+obs": Method("cap", 0.5, "row", update="obs"),
}


def check_same(source: Path, method: Method, where: Path, seen: Seen = SEEN, **options: Any) -> None:
    decoder = load(str(source))
    pruned = prune(
        decoder, method, calibration=seen.calibration, max_batch_tokens=seen.max_batch_tokens, **options
    )
    record = manifest(pruned, seen.calibration, options.get("effects"))
    checkpoint.save(decoder, where / "memory", manifest=record, keep=pruned.keep)
    done = prune_stream(source, where / "stream", method, seen=replace(seen, **options))
    own, other = tensors(where / "stream"), tensors(where / "memory")
    assert own.keys() == other.keys() == tensors(source).keys()
    assert [name for name in own if not same(own[name], other[name])] == []
    keeps = [checkpoint.load_keep(where / name) for name in ("stream", "memory")]
    assert keeps[0].keys() == keeps[1].keys()
    assert all(torch.equal(keeps[0][name], keeps[1][name]) for name in keeps[0])
    manifests = [checkpoint.read_manifest(where / name) for name in ("stream", "memory")]
    assert manifests[0]["sparsity"] == manifests[1]["sparsity"]
    assert manifests[0]["base"]["fingerprint"] == manifests[1]["base"]["fingerprint"]
    assert manifests[0]["run"].pop("size")
    assert manifests[0]["run"] == {**manifests[1]["run"], "streamed": True}
    assert done.unrouted == pruned.unrouted
    assert verify(where / "stream").ok


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_as_in_memory(family: str, method: str, tmp_path: Path) -> None:
    check_same(saved(family, tmp_path / "source"), METHODS[method], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("family", [*OFTEN, *SELDOM])
def test_every_family_is_trained_as_in_memory(family: str, tmp_path: Path) -> None:
    check_same(saved(family, tmp_path / "source"), METHODS["causal"], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "limit_gib"), [("llama3", 0.0), ("gemma3", 4e-6), ("llama3", 1.0)])
def test_training_in_half_precision_with_inputs_anywhere(
    family: str, limit_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "AT_ONCE", 2)
    seen = Seen(calibration(), ROOM, limit_gib)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*kept on disk")
        check_same(saved(family, tmp_path / "source", torch.bfloat16), METHODS["causal"], tmp_path, seen)


@pytest.mark.thorough
def test_another_score_is_streamed(tmp_path: Path) -> None:
    check_same(saved("llama3", tmp_path / "source"), METHODS["fisher"], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama3", "gemma3", "olmoe"])
def test_in_half_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_same(saved(family, tmp_path / "source", dtype), METHODS["wanda"], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["wanda:2:4+refit", "magnitude+obs"])
def test_patterns_and_updates(method: str, tmp_path: Path) -> None:
    check_same(saved("llama3", tmp_path / "source"), METHODS[method], tmp_path)


@pytest.mark.thorough
def test_effects_and_an_update(tmp_path: Path) -> None:
    source = saved("llama3", tmp_path / "source")
    check_same(source, METHODS["cap:row+obs"], tmp_path, effects=effects_of(source))


@pytest.mark.thorough
@pytest.mark.parametrize("limit_gib", [0.0, 1.0])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama3", "causal"),
        ("olmoe", "wanda"),
        ("gpt2", "sparsegpt"),
        ("phi3", "wanda:2:4+refit"),
        ("llama3", "cap:row+obs"),
    ],
)
def test_the_layer_at_work_is_on_the_device(
    family: str, method: str, limit_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = saved(family, tmp_path / "source"), Seen(calibration(), ROOM, limit_gib)
    options = {"effects": effects_of(source)} if "effects" in METHODS[method].needs else {}
    with pretended(monkeypatch), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*kept on disk")
        check_same(source, METHODS[method], tmp_path, replace(seen, device=torch.device("cuda")), **options)


def test_what_stays_in_float32_does_from_files_too(tmp_path: Path) -> None:
    """The router of a mixture, as transformers keeps it."""
    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_num_experts=4, moe_k=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Ernie4_5_MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert {p.dtype for p in load(str(tmp_path / "source")).model.parameters()} == {
        torch.float32,
        torch.bfloat16,
    }
    check_same(tmp_path / "source", METHODS["wanda"], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("limit_gib", [0.0, 2e-6])
def test_hidden_states_that_do_not_fit_are_on_disk_and_it_is_said(limit_gib: float, tmp_path: Path) -> None:
    source = saved("qwen2", tmp_path / "source", torch.bfloat16)
    with pytest.warns(UserWarning, match=r"do not fit into .* GiB: the rest of them is kept on disk"):
        check_same(source, METHODS["sparsegpt"], tmp_path, Seen(calibration(), ROOM, limit_gib))
    assert not [path for path in tmp_path.rglob("*") if "hidden" in path.name or "tmp" in path.name]


def test_what_fits_is_in_memory_and_nothing_is_said(tmp_path: Path) -> None:
    source = saved("llama2", tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(source, METHODS["wanda"], tmp_path)


def test_one_layer_is_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen, fill = saved("mistral", tmp_path / "source"), set[int](), Residence._fill

    def watched(self: Residence, name: str, parameter: Any, newer: Any = None) -> Any:
        found = fill(self, name, parameter, newer)
        there = [
            layer.index
            for layer in self.decoder.layers
            if any(not p.is_meta for p in layer.module.parameters())
        ]
        assert len(there) <= 1
        seen.update(there)
        return found

    monkeypatch.setattr(Residence, "_fill", watched)
    prune_stream(source, tmp_path / "out", METHODS["wanda"], seen=SEEN)
    assert seen == {0, 1, 2}


def test_a_skeleton_that_is_to_run_has_buffers_and_no_weights(tmp_path: Path) -> None:
    model = skeleton(saved("gemma3", tmp_path / "source"), dtype=torch.float32).model
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not model.training


def test_hidden_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    states = HiddenStates(0.0, tmp_path)
    some = [torch.randn(2, 3, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    with pytest.warns(UserWarning, match="kept on disk"):
        kept = [states.keep(LayerInputs({0: one}, as_tuple=False)) for one in some]
    for one, found in zip(some, kept, strict=True):
        assert same(found.hidden[0], one)
        assert list(found.hidden) == [0]
    del found
    kept.clear()  # nobody has those of the first layer any more
    assert list(states._files) == []
    states.close()
    assert not list(tmp_path.iterdir())


def test_room_for_one_layer_is_room_for_all(tmp_path: Path) -> None:
    one = torch.randn(2, 3, 4)
    size = one.numel() * 4

    def spilled(limit: int) -> int:
        with closing(HiddenStates(float(limit), tmp_path)) as states:
            inputs = [states.keep(LayerInputs({0: one}, as_tuple=False)) for _ in range(3)]
            for layer in range(1, 4):
                for number in range(3):
                    inputs[number] = states.keep(LayerInputs({layer: one}, as_tuple=False))
            return states.spilled_bytes

    assert spilled(3 * size) == 0
    with pytest.warns(UserWarning, match="kept on disk"):
        assert spilled(2 * size - 1) > 0


def test_wanda_is_streamed_on_the_command_line(run: Run, tmp_path: Path) -> None:
    decoder = tiny_decoder()
    decoder.model.save_pretrained(tmp_path / "model")
    decoder.tokenizer.save_pretrained(tmp_path / "model")
    options = ("--method", "wanda", "--sparsity", "0.5", "-n", 6, "--data-dir", write_data(tmp_path / "data"))
    for name, way in (("memory", ()), ("stream", ("--stream",))):
        code, out, err = run("prune", tmp_path / "model", "-o", tmp_path / name, *options, *way)
        assert code == 0, err
        assert "(50.0000%)" in out
    own, other = tensors(tmp_path / "stream"), tensors(tmp_path / "memory")
    assert all(same(own[name], other[name]) for name in own)
    code, _, err = run(
        "prune",
        tmp_path / "model",
        "-o",
        tmp_path / "two",
        *options,
        "--method",
        "sparsegpt+graded+distill",
        "--stream",
    )
    assert code == 2
    assert "leave out --stream" in err


class StoppedError(BaseException):
    """Stands for a kill."""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "device"),
    [
        ("llama3", "cpu"),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in (("llama3", "cuda"), ("qwen3_moe", "cpu"))),
    ],
)
def test_a_streamed_run_that_is_stopped_anywhere_ends_with_the_same_bytes(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(monkeypatch) if device == "cuda" else nullcontext():
        _stopped_anywhere(family, replace(SEEN, device=torch.device(device)), tmp_path, monkeypatch)


@pytest.mark.thorough
def test_layers_that_were_fitted_are_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped_anywhere("llama3", SEEN, tmp_path, monkeypatch, Method("wanda", 0.5, update="refit"))


def test_a_layer_of_another_step_is_refused(tmp_path: Path) -> None:
    """As a power cut may leave one: what a step writes is not synced file by file."""
    state = State(tmp_path / "kept", ["some"], needed=True)
    there: Any = SimpleNamespace(decoder=fresh("llama3"), release=lambda: None)
    copies, layer = Copies(state, there), there.decoder.layers[0]
    with copies.around(1) as moved:
        moved(layer)
    copies.settle(1)
    assert copies._newer(layer)
    copies.settle(3)  # which is the other step of the same turn
    with pytest.raises(CheckpointError, match=r"odd-0 is not of training step 3: delete .*kept to begin"):
        copies._newer(layer)
    (tmp_path / "kept" / "odd-0").unlink()
    copies.settle(1)
    with pytest.raises(CheckpointError, match="is not of training step 1"):
        copies._newer(layer)


def _stopped_anywhere(
    family: str,
    seen: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method = METHODS["causal"],
) -> None:
    source = saved(family, tmp_path / "source")
    prune_stream(source, tmp_path / "whole", method, seen=seen)
    write, writes, left = State._write, 0, 1

    def limited(self: State, values: dict[str, Any], **how: Any) -> None:
        nonlocal writes
        if self.path is not None and values:
            writes += 1
            if writes > left:
                raise StoppedError
        write(self, values, **how)

    monkeypatch.setattr(State, "_write", limited)
    stops = 0
    while True:
        writes = 0
        try:
            prune_stream(source, tmp_path / "stopped", method, seen=seen)
            break
        except StoppedError:
            stops, left = stops + 1, left + 1
    assert stops > (5 if method.takes_long else 0)
    own, other = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert all(same(own[name], other[name]) for name in other)
    assert not (tmp_path / "stopped.pruning").exists()


def test_a_disk_without_room_for_copies_is_named_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama3", tmp_path / "source")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.5 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Residence, "bring", None)  # a layer may not be read
    with pytest.raises(CheckpointError, match=r"GB are needed for .*stream.* GB are free there"):
        prune_stream(source, tmp_path / "stream", METHODS["causal"], seen=SEEN)


@pytest.mark.parametrize("method", [METHODS["wanda"], Method("magnitude", 0.5)])
def test_what_another_run_has_kept_is_not_deleted(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, kept = saved("llama3", tmp_path / "source"), tmp_path / "out.pruning"
    State(kept, ["some"]).keep(one=1)
    with pytest.raises(MismatchError, match=r"out\.pruning is of a stopped run with other options"):
        prune_stream(source, tmp_path / "out", method, seen=SEEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pruning", "source"]
    assert State(kept, ["some"]).values == {"one": 1}
    (kept / "one").unlink()
    prune_stream(source, tmp_path / "out", method, seen=SEEN)
    assert not kept.exists()
    with monkeypatch.context() as patch:  # another run begins meanwhile
        patch.setattr(files, "_check_room", lambda *_: State(kept, ["some"]).keep(one=1))
        prune_stream(source, tmp_path / "out", method, seen=SEEN, overwrite=True)
    assert State(kept, ["some"]).values == {"one": 1}


def test_a_matrix_that_layers_share_is_not_trained_from_files(tmp_path: Path) -> None:
    decoder = fresh("llama3")
    first, last = decoder.layers[0].projections[-1], decoder.layers[-1].projections[-1]
    layer = replace(
        decoder.layers[-1],
        projections=(
            *decoder.layers[-1].projections[:-1],
            replace(last, parameter_name=first.parameter_name),
        ),
    )
    with pytest.raises(OptionError, match=r"shared by layers 0 and 2.*without --stream"):
        check_unshared(replace(decoder, layers=(*decoder.layers[:-1], layer)))


def test_weights_begin_where_cache_lines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fill, at = saved("llama3", tmp_path / "source"), Residence._fill, list[int]()
    headers = [int.from_bytes(file.read_bytes()[:8], "little") for file in source.glob("*.safetensors")]
    assert any((header + 8) % 64 for header in headers), "or else the test is blind"

    def watched(self: Residence, name: str, parameter: Any, newer: Any = None) -> Any:
        absent = fill(self, name, parameter, newer)
        at.append(parameter.data_ptr() % 64)
        return absent

    monkeypatch.setattr(Residence, "_fill", watched)
    prune_stream(source, tmp_path / "out", METHODS["wanda"], seen=SEEN)
    assert at
    assert not any(at)
    assert not any(parameter.data_ptr() % 64 for parameter in load(str(source)).model.parameters())
