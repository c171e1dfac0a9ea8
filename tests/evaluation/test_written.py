"""Text that the intact model writes, and what other versions of it make of that text."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import tiny_config
from families import FAMILIES, tiny
from tinydata import byte_tokenizer, tiny_decoder, write_model

from causalprune.checkpoints import embedded
from causalprune.checkpoints.saving import MANIFEST, save
from causalprune.core.errors import DataError, MismatchError, OptionError
from causalprune.core.types import Decoder
from causalprune.evaluation import pieces as piecewise
from causalprune.evaluation import written
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, paired_difference
from causalprune.evaluation.sampling import OPENERS, _Step, nucleus, starts_of, write
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.written import own_pieces, own_text, own_texts
from causalprune.interventions.ablation import last_hidden
from causalprune.models.anatomy import inspect_model

TASKS = ("own_ppl:96", "own_kl:96")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep texts apart, and pieces short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(written, "PIECE", 24)
    return tmp_path / "cache" / "causalprune" / "own"


def pruned(decoder: Decoder) -> Decoder:
    """Remove every other column of a projection, in place."""
    for p in decoder.projections[:3]:
        weight = p.read().clone()
        weight[:, ::2] = 0
        p.write(weight)
    return decoder


def texts(decoder: Decoder, tokens: int = 96, seed: int = 0) -> list[tuple[int, ...]]:
    return [e.tokens for e in own_text(decoder, "own_ppl", tokens, seed).documents]


def steered(decoder: Decoder, token: int) -> Decoder:
    """Let the model always predict this token above all."""
    head = decoder.model.get_output_embeddings()
    chosen = torch.zeros(head.weight.shape[0])
    chosen[token] = 1e3
    head.register_forward_hook(lambda _module, _args, output: output + chosen)
    return decoder


def test_a_number_falls_to_a_token_of_the_nucleus() -> None:
    shares = torch.tensor([0.02, 0.6, 0.08, 0.3])  # 0.6, 0.3 and 0.08 make up more than 0.95: 0.02 is out
    borders = torch.tensor([0.0, 0.59, 0.61, 0.89, 0.91, 0.979]) / 0.98
    found = nucleus(shares.log().expand(len(borders), -1), borders)
    assert found.tolist() == [1, 1, 3, 3, 2, 2]
    assert nucleus(shares.log().expand(len(borders), -1), borders, most=2).tolist() == [1, 1, 3, 3, 2, 2]


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3", "gpt2", "opt", "qwen3_moe"])
def test_documents_are_written_as_if_each_was_alone(family: str) -> None:
    decoder = inspect_model(FAMILIES[family](), byte_tokenizer(), name=family)
    uniforms, starts = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)), starts_of(decoder)
    ends, count = {1, 2}, 0
    assert starts == [[0]]
    for numbers, (tokens, given) in zip(uniforms, write(decoder, uniforms), strict=True):
        assert given[0] == 0
        assert {tokens[at - 1] for at in given[1:]} <= ends, (
            "another begins where one has ended, and nowhere else"
        )
        assert sum(token in ends for token in tokens[:-1]) == len(given) - 1
        for begin, end in itertools.pairwise([*given, len(tokens)]):
            with torch.inference_mode():
                logits = decoder.model(input_ids=torch.tensor([tokens[begin:end]])).logits[0, :-1].float()
                logits[:, 0] = -torch.inf  # special, and no end
            assert nucleus(logits, numbers[begin + 1 : end]).tolist() == tokens[begin + 1 : end]
            count += 1
    assert count > 8


@pytest.mark.parametrize("model_type", ["llama", "mamba", "bamba", "qwen3_next", "falcon_h1", "minimax"])
def test_states_do_not_go_on_from_one_document_to_the_next(model_type: str) -> None:
    decoder = inspect_model(tiny(tiny_config(model_type)), byte_tokenizer(), name=model_type)
    tokens = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    begins, step = torch.tensor([0, 5, 9]), _Step(decoder)
    with torch.inference_mode():
        every = [step(tokens[:, at], begins.where(begins <= at, 0)) for at in range(16)]
        for row, begin in enumerate(begins.tolist()):
            anew, zero = _Step(decoder), torch.zeros(1, dtype=torch.long)
            alone = torch.cat([anew(tokens[row : row + 1, at], zero) for at in range(begin, 16)])
            together = torch.stack([logits[row] for logits in every[begin:]])
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert piecewise.version_of(decoder) == (1 if model_type == "llama" else 2)


def test_documents_that_are_compressed_into_one_another_are_refused() -> None:
    decoder = dataclasses.replace(tiny_decoder(), model=tiny(tiny_config("deepseek_v4")))
    step, tokens = _Step(decoder), torch.tensor([5, 6])
    with torch.inference_mode():
        step(tokens, torch.tensor([0, 0]))
        with pytest.raises(
            DataError, match=r"a second document of a piece would see the first.*--preserve c4"
        ):
            step(tokens, torch.tensor([0, 1]))


def test_tokens_are_those_that_tokenizer_and_model_both_know(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    size, words = decoder.model.config.vocab_size, decoder.tokenizer
    words.add_special_tokens({"additional_special_tokens": [f"<image{i}>" for i in range(size)]})
    assert max(words.get_vocab().values()) >= size
    (piece,) = write(decoder, torch.rand(1, 12, generator=torch.Generator().manual_seed(0)))
    assert max(piece[0]) < size
    monkeypatch.setattr(type(words), "__len__", lambda _: 1)  # as where ids have gaps
    assert write(decoder, torch.rand(1, 12, generator=torch.Generator().manual_seed(0))) == [piece]


def test_a_document_begins_with_bos_where_that_begins_no_chat() -> None:
    words = byte_tokenizer(chat=True)
    plain, opened = words.chat_template, "<s>" + words.chat_template
    letter, bracket = words("a[")["input_ids"]
    for template, predicted, chat in (
        (None, bracket, False),
        (plain, bracket, False),
        (opened, letter, False),
        (opened, bracket, True),
        (plain, words.eos_token_id, True),
        ("{% for m in messages %}<s>{{ m['content'] }}{% endfor %}<s>", letter, True),
    ):
        words.chat_template = template
        decoder = dataclasses.replace(steered(tiny_decoder(), predicted), tokenizer=words)
        assert (starts_of(decoder) != [[words.bos_token_id]]) == chat, (template, predicted)
    words.bos_token = None
    starts = starts_of(dataclasses.replace(tiny_decoder(), tokenizer=words))
    assert [words.decode(start) for start in starts] == list(OPENERS)


def test_text_that_is_of_no_use_is_written_again_and_then_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied, loop, ended = ([*range(40)], [0]), ([7] * 40, [0]), ([0, 9] * 20, [*range(0, 40, 2)])
    assert [piecewise.useless(own) for own in (varied, loop, ended)] == [False, True, True]
    monkeypatch.setattr(piecewise, "DISTINCT", 0.2)
    decoder, drawn, real = tiny_decoder(), list[torch.Tensor](), piecewise.write

    def first_loops(own: Decoder, uniforms: torch.Tensor, on_step: Any) -> list[Any]:
        drawn.append(uniforms)
        found = real(own, uniforms, on_step)
        return [([7] * 24, [0]), *found[1:]] if len(drawn) == 1 else found

    monkeypatch.setattr(piecewise, "write", first_loops)
    with pytest.warns(UserWarning, match="1 of 3 pieces .* written again"):
        assert len(own_pieces(decoder, 3, 24, 0)) == 3
    assert [len(own) for own in drawn] == [3, 1], "the one that loops, with other numbers"
    assert not torch.equal(drawn[1][0], drawn[0][0])
    monkeypatch.setattr(piecewise, "write", real)
    refused = r"repeats itself or ends at once: 2 of 2 pieces, 3 times each.*--preserve c4"
    with pytest.warns(UserWarning, match="written again"), pytest.raises(DataError, match=refused):
        own_pieces(steered(tiny_decoder(), 9), 2, 24, 1)
    assert len(list(cache.glob("*.ledger"))) == 2


def test_a_text_is_written_once_and_comes_out_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, said = tiny_decoder(), list[tuple[int, int]]()
    first = own_text(decoder, "own_ppl", 100, 0, lambda *done: said.append(done)).documents
    assert said[-1] == (120, 120), "whole pieces are written"
    assert sum(len(e.tokens) for e in first) <= 100
    (file,) = cache.iterdir()
    assert file.name.startswith(decoder.fingerprint[:16])
    file.unlink()
    assert own_text(decoder, "own_kl", 100, 0).documents == first
    monkeypatch.setattr(piecewise, "write", None)  # it may not be called
    assert own_text(decoder, "own_ppl", 100, 0).documents == first
    with pytest.raises(TypeError):
        own_text(decoder, "own_ppl", 100, 1)


def test_what_calibrates_and_what_is_measured_are_written_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def counted(decoder: Decoder, uniforms: torch.Tensor, on_step: Any) -> Any:
        rows.append(len(uniforms))
        return write(decoder, uniforms, on_step)

    decoder, alone = tiny_decoder(), texts(tiny_decoder())
    pieces = own_pieces(decoder, 3, 512, 0)
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr(piecewise, "write", counted)
    beside = own_texts(decoder, TASKS, Settings())
    assert own_pieces(decoder, 3, 512, 0, beside=beside) == pieces
    assert texts(decoder) == alone
    assert rows == [3 + 96 // 24]
    other = own_texts(decoder, TASKS[:1], Settings(seed=1))
    assert own_pieces(decoder, 3, 512, 0, beside=other) == pieces, "what is there is not written again"
    assert len(rows) == 1


@pytest.mark.thorough
def test_a_stopped_or_damaged_text_is_written_to_its_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise, "BATCH", 1)
    calm, calls = texts(tiny_decoder()), []
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)

    def counted(*given: Any) -> Any:
        calls.append(len(given[1]))
        return write(*given)

    monkeypatch.setattr(piecewise, "write", counted)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while the third piece was written
    assert texts(tiny_decoder()) == calm
    assert calls == [1, 1]
    file.write_bytes(whole.replace(b'"given"', b'"taken"', 1))
    with pytest.warns(UserWarning, match="damaged row.*written anew"):
        assert texts(tiny_decoder()) == calm
    assert file.read_bytes() == whole


def test_measures_are_those_of_plain_logits() -> None:
    decoder = tiny_decoder()
    before = evaluate(decoder, TASKS)
    documents = own_text(decoder, "own_ppl", 96, 0).documents
    intact = [decoder.model(input_ids=torch.tensor([e.tokens])).logits[0].log_softmax(-1) for e in documents]
    after = evaluate(pruned(decoder), TASKS)
    assert set(before[1].values) == {0.0}
    nats, divergences = [], []
    for e, p in zip(documents, intact, strict=True):
        own = slice(e.target_start - 1, len(e.tokens) - 1)
        q = decoder.model(input_ids=torch.tensor([e.tokens])).logits[0].log_softmax(-1)
        nats.append(float(-q[own].gather(1, torch.tensor(e.tokens[e.target_start :])[:, None]).sum()))
        divergences.append(float((p.exp() * (p - q))[own].sum()))
    assert after[0].values == pytest.approx(nats, rel=1e-5)
    assert after[1].values == pytest.approx(divergences, rel=1e-4)
    assert [r.metric for r in after] == ["perplexity", "nats_per_token"]
    assert headline(after[1]) > 0.01
    assert paired_difference(*reversed([after[0], before[0]])).n == len(documents) > 3


@pytest.mark.parametrize("change", [lambda decoder: decoder, pruned])
def test_both_measures_of_a_text_take_one_pass(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(tiny_decoder(), [*TASKS, "own_ppl:48"])
    decoder, passes = change(tiny_decoder()), []
    apart = [evaluate(decoder, [task])[0] for task in TASKS]

    def counted(*given: Any) -> Any:
        passes.append(len(given[1].indices))
        return last_hidden(*given)

    monkeypatch.setattr(written, "last_hidden", counted)
    found = evaluate(decoder, [TASKS[1], "own_ppl:48", TASKS[0], TASKS[1]])
    assert [result.task for result in found] == ["own_kl", "own_ppl", "own_ppl", "own_kl"]
    assert found[0].values == found[3].values
    assert sum(passes) == len(apart[0].values)
    assert found[2].values == pytest.approx(apart[0].values, rel=1e-5)
    assert found[0].values == pytest.approx(apart[1].values, rel=1e-5)


def test_a_changed_model_does_not_write(cache: Path) -> None:
    with pytest.raises(
        DataError, match=r"own_ppl:96: .* is not intact: `causalprune evaluate tiny --on own_ppl:96 --seed 0 "
    ):
        evaluate(pruned(tiny_decoder()), TASKS[:1])
    assert not cache.exists()
    evaluate(tiny_decoder(), TASKS[:1])
    with pytest.raises(DataError, match=r"--on own_kl:96"):
        evaluate(pruned(tiny_decoder()), TASKS)


@pytest.mark.parametrize("bits", [{"dtype": torch.bfloat16}, {}])
def test_another_head_is_refused(bits: dict[str, Any]) -> None:
    decoder = tiny_decoder()
    evaluate(decoder, TASKS)
    decoder.model.to(**bits)
    if not bits:
        decoder.model.get_output_embeddings().weight.data[3, 3] += 1
    with pytest.raises(MismatchError, match="own_kl:96: embedding, final norm or head of tiny differ"):
        evaluate(decoder, TASKS[1:])


def test_what_the_intact_model_makes_of_it_is_made_anew_where_it_is_damaged(cache: Path) -> None:
    evaluate(tiny_decoder(), TASKS)
    (file,) = cache.glob("*.hidden")
    whole = file.read_bytes()
    expected = evaluate(pruned(tiny_decoder()), TASKS[1:])[0].values
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged"):
        evaluate(tiny_decoder(), TASKS)
    assert evaluate(pruned(tiny_decoder()), TASKS[1:])[0].values == expected


@pytest.mark.thorough
def test_a_checkpoint_is_measured_on_the_text_of_its_base(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    base = embedded.load(str(model))
    assert base.base is None
    save(pruned(base), tmp_path / "out", manifest={"method": {}})
    own = embedded.load(str(tmp_path / "out"))
    assert own.base == {"name": str(model), "fingerprint": base.fingerprint}
    with pytest.raises(DataError, match=f"causalprune evaluate {model} --on own_kl:96"):
        evaluate(own, TASKS)
    intact = evaluate(embedded.load(str(model)), TASKS)
    for one, other in zip(intact, evaluate(own, TASKS), strict=True):
        assert paired_difference(other, one).difference > 0
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())
    record["run"] = {"source": "elsewhere"}  # converted, not pruned
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(record))
    assert embedded.load(str(tmp_path / "out")).base is None
    record["run"] = {"shrink": {}}
    record["base"]["fingerprint"] = own.fingerprint  # as earlier releases noted it
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"own_kl:96: .* does not say"):
        evaluate(embedded.load(str(tmp_path / "out")), TASKS)


def test_pieces_to_calibrate_on_are_others_than_what_is_measured() -> None:
    decoder = tiny_decoder()
    found = own_pieces(decoder, 4, 512, 0)
    assert [len(e.tokens) for e in found] == [24] * 4
    assert {e.target_start for e in found} == {1}
    assert {e.source for e in found} == {"own"}
    measured = {e.content for e in own_text(decoder, "own_ppl", 96, 0).documents}
    assert not measured & {e.content for e in found}
    assert [len(e.tokens) for e in own_pieces(decoder, 2, 16, 0)] == [16, 16]
    with torch.device("meta"):
        bare = dataclasses.replace(decoder, model=type(decoder.model)(decoder.model.config))
    with pytest.raises(OptionError, match="--preserve c4, or pass --no-stream"):
        own_pieces(bare, 2, 16, 0)


def test_what_cannot_write_says_so() -> None:
    decoder = tiny_decoder()
    decoder.model.get_output_embeddings().weight.data.fill_(float("nan"))
    broken = dataclasses.replace(inspect_model(decoder.model, decoder.tokenizer, name="broken"))
    with pytest.raises(DataError, match="broken predicts what is not a number"):
        evaluate(broken, TASKS)
    with pytest.raises(DataError, match="too short a text; the limit counts tokens"):
        evaluate(tiny_decoder(), ["own_ppl:1"])
    with pytest.raises(DataError, match="no tokenizer"):
        evaluate(dataclasses.replace(decoder, tokenizer=None), TASKS)


def test_models_that_wrote_texts_of_their_own_stand_side_by_side() -> None:
    from causalprune.cli.tables import comparison, to_markdown

    other = tiny_decoder()
    other.model.get_output_embeddings().weight.data.mul_(0.5)
    other = inspect_model(other.model, other.tokenizer, name="other")
    rows = [(d.name, evaluate(d, TASKS)) for d in (tiny_decoder(), other)]
    assert to_markdown(comparison(rows)).count("[") == 4, "intervals of both, and no difference"
