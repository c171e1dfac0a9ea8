"""Every prunable weight is found once and belongs to the head, role and expert it is said to belong to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, N_LAYERS, SMALL, VOCAB, tiny
from ggufs import write_gguf
from sources import edit
from torch import Tensor, nn
from torch.nn import functional
from transformers import BloomConfig, GptOssConfig, PreTrainedModel

from causalprune.core.types import Decoder
from causalprune.models.anatomy import inspect_model
from causalprune.models.folders import auto_dtype, open_checkpoint
from causalprune.models.loading import load
from causalprune.models.summaries import summary

FUSED = ("gpt2", "gpt_neox", "phi3")
MIXTURES = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe")
TOKENS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def decoder_of(model: PreTrainedModel) -> Decoder:
    return inspect_model(model, None, name="tiny")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextmanager
def captured(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the input and the output of a module's last forward pass."""
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(input=args[0], output=output)

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return decoder_of(FAMILIES[request.param]())


def test_every_prunable_weight_is_found_exactly_once(decoder: Decoder) -> None:
    for parameter in decoder.model.parameters():
        parameter.zero_()
    for projection in decoder.projections:
        projection.write(projection.read() + 1)
    left = {entry.parameter_name: entry for entry in decoder.left_out}
    for name, parameter in decoder.model.named_parameters():
        assert torch.all(parameter == (0 if name in left else 1)), name
        if name in left:
            assert left[name].size == parameter.numel()
    names = [p.name for p in decoder.projections]
    assert len(set(names)) == len(names)


def test_projections_come_in_the_fixed_order(decoder: Decoder) -> None:
    for layer in decoder.layers:
        names = [p.name.removeprefix(f"layers.{layer.index}.") for p in layer.projections]
        experts = {p.name.split(".")[3] for p in layer.projections if ".experts." in p.name}
        places = [f"experts.{e}." for e in range(layer.n_experts)] if experts else [""]
        places += ["shared."] if "shared.up" in names else []
        roles = ("gate", "up", "down") if any(n.endswith("gate") for n in names) else ("up", "down")
        assert names == [*"qkvo", *(f"{place}{role}" for place in places for role in roles)]
        assert len(experts) == layer.n_experts
        assert [p.role for p in layer.projections] == [n.split(".")[-1] for n in names]


def test_writing_what_was_read_changes_no_bit(decoder: Decoder) -> None:
    before = weights(decoder.model)
    for projection in decoder.projections:
        projection.write(projection.read().clone())
    assert all(torch.equal(p, before[name]) for name, p in decoder.model.named_parameters())


def test_every_projection_acts_on_the_logits(decoder: Decoder) -> None:
    intact = logits(decoder.model)
    for projection in decoder.projections:
        before = projection.read().clone()
        assert projection.shape == tuple(before.shape)
        projection.write(torch.zeros_like(before))
        assert not torch.any(projection.read())
        assert (logits(decoder.model) - intact).abs().max() > 1e-4, projection.name
        projection.write(before)
    assert torch.equal(logits(decoder.model), intact)


def test_columns_of_o_are_the_heads(decoder: Decoder) -> None:
    intact = logits(decoder.model)
    for layer in (decoder.layers[0], decoder.layers[-1]):
        attention = layer.attention
        output = next(p for p in layer.projections if p.role == "o")
        assert output.shape[1] == attention.n_heads * attention.head_dim
        for head in range(attention.n_heads):
            columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

            def silence(_: nn.Module, args: tuple[Tensor, ...], columns: slice = columns) -> tuple[Tensor]:
                heads = args[0].clone()
                heads[..., columns] = 0
                return (heads,)

            handle = attention.output.register_forward_pre_hook(silence)
            hooked = logits(decoder.model)
            handle.remove()
            before = output.read().clone()
            cut = before.clone()
            cut[:, columns] = 0
            output.write(cut)
            torch.testing.assert_close(logits(decoder.model), hooked, rtol=0, atol=1e-6)
            assert (hooked - intact).abs().max() > 1e-4
            output.write(before)


def test_query_rows_of_a_head_reach_only_that_head(decoder: Decoder) -> None:
    """Rows of q, k, v belong to heads in the order of the columns of o, in every layout."""
    attention = decoder.layers[0].attention
    group = attention.n_heads // attention.n_kv_heads
    roles = {p.role: p for p in decoder.layers[0].projections[:4]}
    with captured(attention.output) as seen:
        logits(decoder.model)
        intact = seen["input"].unflatten(-1, (attention.n_heads, attention.head_dim))
        for role, head in (("q", 1), ("k", 0), ("v", attention.n_kv_heads - 1)):
            before = roles[role].read().clone()
            cut = before.clone()
            cut[head * attention.head_dim : (head + 1) * attention.head_dim] *= -1  # keeps all norms
            roles[role].write(cut)
            logits(decoder.model)
            changed = (seen["input"].unflatten(-1, intact.shape[-2:]) - intact).abs().amax((0, 1, 3)) > 1e-5
            roles[role].write(before)
            owners = [head] if role == "q" else range(head * group, (head + 1) * group)
            assert changed.nonzero().flatten().tolist() == list(owners), role


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_compute_their_part_of_the_output(family: str) -> None:
    decoder = decoder_of(FAMILIES[family]())
    layer = decoder.layers[1]
    attention = layer.attention
    roles = {p.role: p for p in layer.projections}
    with captured(roles["q"].module) as seen:
        logits(decoder.model)
    bias = getattr(roles["q"].module, "bias", None)
    out = seen["output"] - (bias if bias is not None else 0)
    if family == "gpt_neox":
        parts = out.unflatten(-1, (attention.n_heads, 3, attention.head_dim)).unbind(-2)
        want = {role: part.flatten(-2) for role, part in zip("qkv", parts, strict=True)}
    else:
        widths = [roles[role].shape[0] for role in "qkv"]
        want = dict(zip("qkv", out.split(widths, dim=-1), strict=True))
    for role, part in want.items():
        got = functional.linear(seen["input"], roles[role].read())
        torch.testing.assert_close(got, part, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_compute_the_output_of_their_module(family: str) -> None:
    """One routed token through gate, up and down of expert e equals the experts module itself."""
    decoder = decoder_of(FAMILIES[family]())
    layer = decoder.layers[0]
    assert layer.experts is not None
    token = torch.randn(1, decoder.model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    for e in range(layer.n_experts):
        roles = {p.role: p for p in layer.projections if p.name.startswith(f"layers.0.experts.{e}.")}
        inner = functional.silu(functional.linear(token, roles["gate"].read()))
        want = functional.linear(inner * functional.linear(token, roles["up"].read()), roles["down"].read())
        got = layer.experts(token, torch.tensor([[e]]), torch.ones(1, 1))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_mixture_may_have_dense_layers() -> None:
    decoder = decoder_of(FAMILIES["qwen3_moe"]())
    assert [layer.n_experts for layer in decoder.layers] == [3, 0, 3]
    assert [layer.experts is None for layer in decoder.layers] == [False, True, False]


def test_a_saved_model_loads_with_the_same_logits_and_fingerprint(decoder: Decoder, tmp_path: Path) -> None:
    decoder.model.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert torch.equal(logits(again.model), logits(decoder.model))
    assert again.fingerprint == decoder.fingerprint
    assert [p.name for p in again.projections] == [p.name for p in decoder.projections]
    assert again.tokenizer is None
    assert not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())


@pytest.mark.parametrize("how", ["one file", "shards", "index"])
def test_without_a_dtype_in_the_configuration_it_is_foreseen_as_it_is_loaded(
    how: str, tmp_path: Path
) -> None:
    model = FAMILIES["llama3"]().bfloat16()
    model.model.layers[0].input_layernorm.float()  # the first bytes of its file
    model.save_pretrained(tmp_path, max_shard_size="5GB" if how == "one file" else "20KB")
    edit(tmp_path / "config.json", lambda own: {k: v for k, v in own.items() if k != "dtype"})
    if how == "index":
        said = {"metadata": {"dtype": "float16"}}
        edit(tmp_path / "model.safetensors.index.json", lambda own: own | said)
    stored, loaded = open_checkpoint(tmp_path), load(str(tmp_path)).model.dtype
    assert loaded == (torch.float16 if how == "index" else torch.bfloat16)
    assert auto_dtype(tmp_path, stored) == loaded


def test_the_fingerprint_sees_every_weight_and_the_shape() -> None:
    model = FAMILIES["llama3"]()
    before = decoder_of(model).fingerprint
    assert decoder_of(FAMILIES["llama3"]()).fingerprint == before
    model.config._name_or_path = "elsewhere"
    assert decoder_of(model).fingerprint == before
    norm = model.model.norm.weight
    norm[3] = torch.nextafter(norm[3], torch.tensor(9.0))
    assert decoder_of(model).fingerprint != before
    assert decoder_of(FAMILIES["llama3"]().to(torch.bfloat16)).fingerprint != before


def test_the_summary_counts_everything(decoder: Decoder) -> None:
    seen = summary(decoder)
    left = sum(entry["weights"] for entry in seen["left_out"].values())
    assert seen["total_parameters"] == sum(p.numel() for p in decoder.model.parameters())
    assert seen["prunable_weights"] + left == seen["total_parameters"]
    assert sum(seen["prunable_by_role"].values()) == seen["prunable_weights"]
    assert seen["layers"] == N_LAYERS
    assert {"norm", "embedding"} <= set(seen["left_out"])
    assert ("output head" in seen["left_out"]) != seen["tied_embeddings"]


def test_a_head_is_as_wide_as_its_module_says() -> None:
    seen = summary(decoder_of(FAMILIES["gemma3"]()))
    assert (seen["heads"], seen["kv_heads"], seen["head_width"], seen["mlp_width"]) == (4, 2, 12, 40)


def test_experts_may_be_modules_of_their_own() -> None:
    """Remote code keeps experts in a `ModuleList`, which may be as long as the list of layers."""
    model = FAMILIES["llama2"]()
    for layer in model.model.layers:
        mixture = nn.Module()
        mixture.gate = nn.Linear(32, N_LAYERS, bias=False)
        mixture.experts = nn.ModuleList(type(layer.mlp)(model.config) for _ in range(N_LAYERS))
        layer.mlp = mixture
    decoder = decoder_of(model)
    assert [layer.name for layer in decoder.layers] == [f"model.layers.{i}" for i in range(N_LAYERS)]
    layer = decoder.layers[2]
    assert layer.n_experts == N_LAYERS
    assert layer.experts is model.model.layers[2].mlp.experts
    gate = next(p for p in layer.projections if p.name == "layers.2.experts.1.gate")
    assert gate.parameter is model.model.layers[2].mlp.experts[1].gate_proj.weight


def test_bloom_and_gpt_oss_fit_the_same_table() -> None:
    """Interleaved rows, in [in out] stacks with biases (gpt-oss) and per head (BLOOM)."""
    decoder_of(tiny(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)))
    shape = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20}
    decoder = decoder_of(tiny(GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1)))
    roles = {p.role: p for p in decoder.layers[0].projections if ".experts.1." in p.name}
    experts: Any = decoder.layers[0].experts
    token = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    fused = token @ experts.gate_up_proj[1]
    torch.testing.assert_close(functional.linear(token, roles["gate"].read()), fused[:, ::2])
    torch.testing.assert_close(functional.linear(token, roles["up"].read()), fused[:, 1::2])
    assert roles["down"].shape == (32, 20)


def test_dtype_is_that_of_the_files_unless_asked_for(tmp_path: Path) -> None:
    FAMILIES["qwen3"]().to(torch.bfloat16).save_pretrained(tmp_path)
    assert summary(load(str(tmp_path)))["dtype"] == "bfloat16"
    assert summary(load(str(tmp_path), dtype="float32"))["dtype"] == "float32"


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_model_can_be_saved_as_a_plain_one(
    named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, FAMILIES["llama2"]())
    decoder = load(str(path if named == "file" else path.parent))
    assert capfd.readouterr() == ("", "")
    assert summary(decoder)["dtype"] == "float32"
    assert decoder.tokenizer("!$")["input_ids"]
    decoder.model.save_pretrained(tmp_path / "plain")
    decoder.tokenizer.save_pretrained(tmp_path / "plain")
    plain = load(str(tmp_path / "plain"))
    assert plain.fingerprint == decoder.fingerprint
    assert torch.equal(logits(plain.model), logits(decoder.model))
    assert plain.tokenizer("!$")["input_ids"] == decoder.tokenizer("!$")["input_ids"]
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
