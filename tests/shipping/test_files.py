"""GGUF files that are written: types, tokens and zeros as they should be, and every broken file refused in one line."""

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shipped
import torch
from conftest import Run, assert_refused
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalprune import models
from causalprune.core.errors import CheckpointError, ModelError, OptionError
from causalprune.core.types import Calibration, Example
from causalprune.shipping import files
from causalprune.shipping.converting import convert
from causalprune.shipping.exporting import Exporting, export
from causalprune.shipping.files import ZEROS, Held, decoded, encoded, field, opened, planned, quantise
from causalprune.shipping.recounting import looked_into, verify_file
from causalprune.shipping.runtime import running, same_tokens
from causalprune.shipping.uneven import compacted, cut_importance
from causalprune.shipping.weighing import importance

TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, half of whose MLP is zero, with a chat template."""
    folder = shipped.write(tmp_path_factory.mktemp("model") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    file = folder.with_name("whole.gguf")
    convert(folder, file, pre_tokenizer="gpt-2")
    return file


@pytest.fixture(scope="module")
def eights(whole: Path) -> Path:
    return quantise(whole, whole.with_name("q8_0.gguf"), "q8_0").file


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_quantised_as_llama_cpp_does(kind: str) -> None:
    import gguf
    import xllamacpp

    chunk = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    random = np.random.default_rng(0)
    weights = random.standard_normal((4, 512), np.float32) * (random.random((4, 512)) > 0.5)
    weighing = random.random(512, np.float32)
    for own in (None, weighing):
        data = encoded(weights, kind, None if own is None else own[None])
        theirs, number = np.zeros_like(data), int(gguf.GGMLQuantizationType[kind])
        pointers = weights.ctypes.data, theirs.ctypes.data
        chunk(number, *pointers, 0, 4, 512, None if own is None else own.ctypes.data)
        assert (data == theirs).all()
        assert (decoded(data, kind) == gguf.quants.dequantize(data, gguf.GGMLQuantizationType(number))).all()


@pytest.mark.thorough
def test_a_file_says_what_the_checkpoint_does(whole: Path, eights: Path) -> None:
    before, after = GGUFReader(whole), GGUFReader(eights)
    for key in before.fields:
        if not key.startswith(("GGUF.", "general.file_type", "general.quantization_version")):
            assert after.fields[key].contents() == before.fields[key].contents(), key
    assert field(after, "tokenizer.chat_template") == "{{ messages[0]['content'] }}"
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]


@pytest.mark.thorough
def test_a_mix_falls_back_where_its_blocks_do_not_fit(whole: Path) -> None:
    written = quantise(whole, whole.with_name("q4_k_m.gguf"), "q4_k_m")
    assert {own.type for own in written.matrices} == {"Q5_0", "Q8_0"}
    assert planned(opened(written.file), "f16", weighted=False)["output_norm.weight"] == "F32"


@pytest.mark.thorough
def test_running_gives_the_same_tokens_and_logits(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody is, and nothing should be sent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer.encode(shipped.TEXT)[:30]
    with running(whole, context=128, exact=True) as run, torch.inference_mode():
        assert same_tokens(run, tokenizer) is None
        for length in (3, 30):
            expected = model(torch.tensor([tokens[:length]])).logits[0, -1].double().log_softmax(-1).numpy()
            found = run.log_probabilities(tokens[:length], shipped.ROWS)
            assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)
        text, speed = run.write(tokens[:5], 4), run.rate(tokens[:5], 4)
    assert speed > 0
    written = model.generate(torch.tensor([tokens[:5]]), max_new_tokens=4, do_sample=False)[0, 5:]
    assert text == tokenizer.decode(written)
    ending = shutil.copy(whole, whole.with_name("ending.gguf"))
    reader = GGUFReader(ending, "r+")
    end = reader.get_field("tokenizer.ggml.eos_token_id")
    end.parts[end.data[0]][0] = int(written[0])  # the model ends its text at once
    reader.data.flush()
    with running(Path(ending), context=128, exact=True) as run:
        assert run.write(tokens[:5], 4) == tokenizer.decode(written[:1]) != text
        assert run.rate(tokens[:5], 4) > 0


@pytest.mark.thorough
def test_zeros_are_counted_where_they_come_out(whole: Path, eights: Path) -> None:
    kept = quantise(whole, whole.with_name("kept.gguf"), "q8_0")
    lost = quantise(whole, whole.with_name("lost.gguf"), "q4_1")
    assert kept.kept == kept.zeros_before == 2 * 96 * 32
    assert lost.kept < 0.1 * lost.zeros_before
    assert verify_file(eights).sparsity_holds
    found = verify_file(lost.file)
    assert [finding.problem for finding in found.findings] == ["lost", "lost"]
    assert found.findings[0].message.startswith("blk.0.ffn_up.weight (Q4_1): ")
    held = looked_into(eights, zeros=True)
    assert held["zeros_before_quantising"] == kept.zeros_before
    assert sum(own["zeros"] for own in held["types"].values()) == kept.zeros
    with pytest.raises(CheckpointError, match="--against"):
        verify_file(whole)


def test_an_importance_matrix_spares_what_is_used(folder: Path) -> None:
    decoder = models.load(str(folder), device="cpu")
    tokens = tuple(range(5, 45))
    seen = importance(decoder, Calibration((Example(tokens, 1, "x", "x"),), (0,)))
    names = {f"blk.{i}.{part}.weight" for i in (0, 1) for part in ("attn_q", "attn_output", "ffn_down")}
    assert names <= seen.keys()
    weights = decoder.projections[-1].read().numpy()
    own = seen["blk.1.ffn_down.weight"]
    errors = [
        float((own * (decoded(encoded(weights, "Q4_0", how), "Q4_0") - weights) ** 2).sum())
        for how in (None, own)
    ]
    assert errors[1] < errors[0]


@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(eights: Path, share: float, tmp_path: Path) -> None:
    data = eights.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut|no GGUF"):
        opened(file)


@pytest.mark.thorough
def test_a_file_that_contradicts_itself_is_refused(whole: Path, tmp_path: Path) -> None:
    for key, name in (("llama.block_count", "layers"), ("llama.embedding_length", "embedding_length")):
        file = Path(shutil.copy(whole, tmp_path / "other.gguf"))
        reader = GGUFReader(file, "r+")
        reader.fields[key].parts[-1][0] += 1
        del reader
        with pytest.raises(ModelError, match=name):
            opened(file)


def test_mistakes_are_said_in_one_line(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    other = Path(shutil.copytree(folder, tmp_path / "code"))
    (other / "config.json").write_text('{"auto_map": {}}', encoding="utf-8")
    for words, said in (
        ((folder, "-o", tmp_path / "a.gguf", "--gguf", "q4_km"), "did you mean 'q4_k_m'"),
        ((folder, "-o", tmp_path / "there.gguf"), "--overwrite"),
        ((folder, "-o", tmp_path / "a.bin"), ".gguf"),
        ((tmp_path, "-o", tmp_path / "a.gguf"), "no config.json"),
        ((other, "-o", tmp_path / "a.gguf"), "--trust-remote-code"),
    ):
        output = words[2]
        if output.name == "there.gguf":
            assert said in run("export", *words)[2]
        else:
            assert_refused(run("export", *words), said, output)


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a-00002-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one of 3 parts of a split GGUF file: join them first"):
        opened(tmp_path / "a-00002-of-00003.gguf")


def test_zeros_beyond_32_bits_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "small.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    many = [Held("blk.0.attn_q.weight", "F32", (8, 32), 1024, 2**31)]
    monkeypatch.setattr(files, "counted", lambda *_: many)
    monkeypatch.setattr(files, "_check_agreement", lambda *_: None)
    monkeypatch.setattr(files, "planned", lambda *_, **__: {"blk.0.attn_q.weight": "Q8_0"})
    written = quantise(source, tmp_path / "q8_0.gguf", "q8_0")
    assert field(opened(written.file), ZEROS) == [2**31]


def test_types_that_need_an_importance_matrix_say_so() -> None:
    names = {"general.architecture": "llama", "llama.block_count": 1}
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in names.items()}
    tensor = SimpleNamespace(name="blk.0.attn_q.weight", shape=[256, 8])
    reader = SimpleNamespace(fields=fields, tensors=[tensor])
    assert planned(reader, "iq3_xxs", weighted=True) == {"blk.0.attn_q.weight": "IQ2_S"}
    with pytest.raises(OptionError, match="-t gsm8k"):
        planned(reader, "iq3_xxs", weighted=False)


@pytest.mark.thorough
@pytest.mark.parametrize(("at", "heads"), [(1, (2, 1)), (1, (0, 0)), (0, (0, 0))])
def test_an_uneven_llama_computes_the_same(
    at: int, heads: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    """A layer may have fewer heads, or no attention at all, but for the first, of which one group stays."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 10:40] = 0
        model.model.layers[1].mlp.gate_proj.weight[:70] = 0
        model.model.layers[at].self_attn.o_proj.weight[:, : 64 - 16 * heads[0]] = 0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    whole, file = tmp_path / "whole.gguf", tmp_path / "uneven.gguf"
    convert(tmp_path / "model", whole, pre_tokenizer="gpt-2")
    kept = compacted(opened(whole), file)
    left = [(2, 1), (4, 2)] if at == 0 else [(4, 2), heads]
    assert [(len(layer.neurons), layer.heads) for layer in kept.values()] == [(96, left[0]), (32, left[1])]
    assert file.stat().st_size < whole.stat().st_size
    tokens = [*range(5, 25)]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1).numpy()
    with running(file, context=128, exact=True) as run:
        assert np.abs(run.log_probabilities(tokens, shipped.ROWS) - expected).max() <= 1e-3 * np.ptp(expected)
    seen = {f"blk.{i}.ffn_down.weight": np.ones((1, 96), np.float32) for i in (0, 1)}
    written = quantise(file, tmp_path / "q8_0.gguf", "q8_0", cut_importance(seen, kept))
    assert {own.shape for own in written.matrices if "ffn_down" in own.name} == {(64, 96), (64, 32)}
    with pytest.raises(ModelError, match="--uneven"):
        compacted(opened(file), tmp_path / "again.gguf")
    assert verify_file(quantise(file, tmp_path / "f32.gguf", "f32").file, tmp_path / "model").sparsity_holds


def test_what_has_nothing_to_leave_out_is_refused_before_it_is_weighed(tmp_path: Path) -> None:
    asked: list[None] = []
    how = Exporting("gpt-2", uneven=True)
    with pytest.raises(ModelError, match="nothing can be left out"):
        export(
            shipped.write(tmp_path / "whole"), tmp_path / "a.gguf", "q8_0", lambda: asked.append(None), how
        )
    assert not asked


def test_an_uneven_llama_with_biases_is_refused(tmp_path: Path) -> None:
    names = {
        "general.architecture": "llama",
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    }
    names |= {"llama.embedding_length": 8, "llama.block_count": 0, "llama.feed_forward_length": 8}
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in names.items()}
    reader = SimpleNamespace(fields=fields, tensors=[SimpleNamespace(name="blk.0.ffn_up.bias")])
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.bias .*--uneven"):
        compacted(reader, tmp_path / "uneven.gguf")
