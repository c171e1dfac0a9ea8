"""What cannot be loaded or is not understood is refused, in one line that names it."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_refused
from families import FAMILIES, SMALL, VOCAB, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RwkvConfig,
    T5Config,
    ZayaConfig,
)
from transformers.utils import logging as hf_logging

from causalprune.checkpoints import embedded
from causalprune.cli.options import ModelOptions
from causalprune.core.errors import CausalPruneError, CheckpointError, ModelError, OptionError
from causalprune.models.anatomy import inspect_model
from causalprune.models.loading import device_of, load, outlined, read_shape, reading, skeleton
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import ModelSpec
from causalprune.streaming.files import prune_stream


@pytest.mark.parametrize("place", ["folder", "file", "embedded"])
@pytest.mark.parametrize("read", [load, read_shape, reading, outlined])
def test_a_revision_of_what_is_on_this_machine_is_refused(
    read: Callable[..., Any], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"")
    monkeypatch.setattr(embedded, "embedded_model", lambda: tmp_path)
    name = {"folder": tmp_path, "file": tmp_path / "tiny.gguf", "embedded": embedded.resolve("embedded")}
    with pytest.raises(OptionError, match="has no revisions: leave out revision 'v2'"):
        read(str(name[place]), revision="v2")


def of_another_type() -> Any:
    model = FAMILIES["phi3"]()
    model.config.model_type = "phi9"
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        pytest.param(
            of_another_type, "qkv_proj.*order of fused roles in phi9", id="fused in an unknown order"
        ),
        pytest.param(
            lambda: tiny(RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
            "no list of 2 decoder layers, each with a known output projection",
            id="no output projection",
        ),
        pytest.param(
            lambda: tiny(JetMoeConfig(**SMALL, num_key_value_heads=2, kv_channels=8, intermediate_size=40)),
            r"mlp.input_linear.weight of shape \[8, 80, 32\] in a JetMoeParallelExperts is not known",
            id="experts of an unknown kind",
        ),
        pytest.param(
            lambda: tiny(ZayaConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_experts=2)),
            r"qkv_proj.q_proj.weight \[.*known neither",
            id="convolved queries",
        ),
    ],
)
def test_what_is_not_understood_is_named(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        inspect_model(make(), None, name="tiny")
    assert "\n" not in str(caught.value)


def test_an_unexplained_matrix_is_an_error() -> None:
    model = FAMILIES["llama2"]()
    model.model.layers[1].mlp.adapter = nn.Linear(32, 4)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.adapter\.weight"):
        inspect_model(model, None, name="tiny")


def test_a_linear_called_gate_is_a_router_only_beside_experts() -> None:
    model = FAMILIES["llama2"]()
    model.model.layers[0].mlp.gate = nn.Linear(32, 32, bias=False)
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight"):
        inspect_model(model, None, name="tiny")


def test_two_candidate_lists_are_ambiguous() -> None:
    model = FAMILIES["llama2"]()
    model.other = nn.Module()
    model.other.layers = FAMILIES["llama2"]().model.layers
    with pytest.raises(ModelError, match=r"ambiguous.*model\.layers.*other\.layers"):
        inspect_model(model, None, name="tiny")


def save_headless(config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (BertConfig(**SMALL, intermediate_size=40), "encoder .masked"),
        (
            T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4),
            "encoder-decoder",
        ),
    ],
    ids=["bert", "t5"],
)
def test_models_of_another_kind_are_refused(config: Any, complaint: str, tmp_path: Path) -> None:
    save_headless(config, tmp_path)
    with pytest.raises(ModelError, match=complaint) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    FAMILIES["llama2"]().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def truncate(folder: Path) -> None:
    shard = max(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_from_index(folder: Path) -> None:
    """A checkpoint that never had the weights of its last shard, which transformers only warns of."""
    shard = max(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != shard.name}
    index.write_text(json.dumps(content))
    shard.unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "corrupted"),
        (lambda folder: max(folder.glob("model-*.safetensors")).unlink(), "cannot be loaded"),
        (drop_from_index, "lacks .* weights"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (shutil.rmtree, "no file or folder"),
    ],
    ids=["truncated", "shard missing", "weights missing", "no config", "broken config", "no folder"],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], object], complaint: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(ModelError, match=complaint) as caught:
        load(str(sharded))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"(?s)no model 'nobody/nothing'.*pass a Hub name") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_the_device_auto_is_cuda_where_there_is_one(
    there: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert device_of("auto") == name
    assert [device_of(own) for own in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    defaults = [inspect.signature(load).parameters["device"].default, ModelSpec("x").device]
    assert [*defaults, ModelOptions("x").loading.device] == ["auto"] * 3


@pytest.mark.parametrize(
    "option", [{"dtype": "float23"}, {"attention": "sdpq"}, {"device": "cuda:99"}, {"device": "abacus"}]
)
def test_impossible_options_are_refused_before_loading(option: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        load("nobody/nothing", **option)


@pytest.mark.parametrize("name", ["flash_attention_2", "somebody/kernel"])
def test_attention_that_cannot_be_had_is_replaced_and_named(name: str, tmp_path: Path) -> None:
    model = FAMILIES["llama2"]()
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text()) | {"attn_implementation": name}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=f"asks for {name}.*sdpa takes its place"):
        found = load(str(tmp_path), device="cpu")
    assert torch.equal(found.model(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    with pytest.warns(UserWarning, match=f"asks for {name}.*sdpa takes its place"):
        skeleton(tmp_path, dtype=torch.float32)
    assert load(str(tmp_path), device="cpu", attention="eager").model.config._attn_implementation == "eager"
    assert read_shape(str(tmp_path))[0] == len(found.layers)


@pytest.mark.parametrize(
    ("renamed", "wrapper"),
    [
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "torch.compile"),
    ],
)
def test_names_that_a_wrapper_has_changed_are_explained(
    renamed: Callable[[str], str], wrapper: str, tmp_path: Path
) -> None:
    FAMILIES["llama2"]().save_pretrained(tmp_path)
    own = load_file(tmp_path / "model.safetensors")
    save_file(
        {renamed(name): value for name, value in own.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=f"comes from {wrapper}, which was saved in place of the model"):
        load(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"comes from {wrapper}, which was saved in place of the model"):
        prune_stream(tmp_path, tmp_path / "out", Method("magnitude", 0.5))


def test_an_adapter_is_no_model(run: Run, tmp_path: Path) -> None:
    record = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    save_file({"base_model.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    words = "is an adapter for owner/base: merge it first, with `model = peft.AutoPeftModelForCausalLM"
    for stream in ((), ("--stream",)):
        refused = run("prune", tmp_path, "-o", tmp_path / "out", "--method", "magnitude", *stream)
        assert_refused(refused, words, tmp_path / "out")


def test_loading_is_silent_and_leaves_logging_as_it_was(
    sharded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = hf_logging.get_verbosity()
    try:
        hf_logging.set_verbosity_error()
        load(str(sharded), dtype="bfloat16")
        assert hf_logging.get_verbosity() == hf_logging.ERROR
        truncate(sharded)
        with pytest.raises(CausalPruneError):
            load(str(sharded))
        assert hf_logging.get_verbosity() == hf_logging.ERROR
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def with_settings(**own: Any) -> Any:
    model = FAMILIES["llama2"]()
    for name, value in own.items():
        setattr(model.config, name, value)
    return model


def with_module(make: Callable[[nn.Linear], nn.Linear], name: str = "q_proj") -> Any:
    model = FAMILIES["llama2"]()
    attention = model.model.layers[1].self_attn
    setattr(attention, name, make(getattr(attention, name)))
    return model


def of_three_axes(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.data[None])
    return linear


def of_numbers(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    return linear


def with_heads(count: int, groups: int) -> Any:
    model = with_settings(num_attention_heads=count, num_key_value_heads=groups)
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = count // groups
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: with_settings(model_type="paligemma"), "'tiny' .paligemma. lets a prompt see what follows"),
        (lambda: with_settings(cross_attention_layers=[1]), "is a decoder with cross-attention"),
        (lambda: with_settings(prompt_length=3), "puts tokens of its own before a text"),
        (lambda: with_settings(num_hidden_layers=0), "has no num_hidden_layers"),
        (lambda: with_settings(indexer_types=["full", "shared"]), "share the choices of an indexer"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)), "whose head predicts no next"),
        (lambda: with_module(of_numbers), r"q_proj.weight of 'tiny' is quantised \(torch.int8\)"),
        (
            lambda: with_module(of_three_axes),
            r"q_proj.weight of shape \[1, 32, 32\] in a Linear is not known",
        ),
        (
            lambda: with_module(lambda own: nn.Linear(32, 36), "o_proj"),
            r"down_proj.weight, as down, is \(32, 40\) .* instead of \(36, 40\)",
        ),
        (lambda: with_module(lambda own: nn.Linear(32, 96)), "instead of one width for all heads"),
        (lambda: with_heads(5, 5), "has 32 columns, and llama says 5 heads"),
        (lambda: with_module(lambda own: nn.Linear(32, 24), "v_proj"), "4 heads cannot share 3 of keys"),
    ],
)
def test_a_model_that_contradicts_itself_or_is_something_else_is_named(
    make: Callable[[], Any], complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        inspect_model(make(), None, name="tiny")
    assert "\n" not in str(caught.value)


def test_a_model_without_weights_is_not_taken_for_one() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(ModelError, match="of 'tiny' has no values: load it with its weights"):
        inspect_model(model, None, name="tiny")
