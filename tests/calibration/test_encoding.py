"""Prompt and target are one text to the model, and to us: which tokens are targets is read off that text."""

from functools import partial
from typing import Any

import pytest
import torch
import words
from families import FAMILIES
from reference import ROUNDING, calibration, nats, shared
from tinydata import byte_tokenizer, tiny_decoder

from causalprune.attribution import plan as attribution
from causalprune.calibration import encoding
from causalprune.calibration.data import Problem
from causalprune.calibration.encoding import Reader, apart, encode
from causalprune.calibration.examples import batch_of
from causalprune.calibration.templates import lead
from causalprune.core.errors import DataError
from causalprune.core.types import Calibration, Example
from causalprune.interventions.losses import target_nats
from causalprune.pruning import walks as pruning
from causalprune.pruning.methods import Method

ROWS = [
    ("Ann has 3 pears. How many?", "She has 3 pears.\n#### 3"),
    ("How many pears?\n\n", "5"),
    ("Q: 2+3?\nA: ", " 5 pears"),
    ("Say it:\n", "\n\nÄpfel 東京 🙂"),
    ("x" * 9, "xxxx"),
    ("return x", "\n#### 5"),
]
CHAT = (("system", "Be brief."), ("user", "2+3?"), ("assistant", "It is 5."), ("user", "And 3+4?"))


def reader(tokenizer: Any, *, chat: bool = False, **options: Any) -> Reader:
    return Reader(tokenizer, chat, max_tokens=999, **options)


@pytest.mark.parametrize("kind", words.KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_those_of_the_whole_text(kind: str, chat: bool) -> None:
    tokenizer = words.tokenizer(kind, chat=chat)
    own = reader(tokenizer, chat=chat)
    for prompt, target in ROWS:
        problem = Problem("own", prompt, target)
        found, before = encode(own, problem), encoding.prompt_text(own, problem)
        whole = tokenizer(before + target, add_special_tokens=not chat, return_offsets_mapping=True)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        closed = not chat and ids[-1] == tokenizer.eos_token_id
        assert list(found.tokens) == ids[: len(ids) - closed]
        ends = [end for _, end in offsets[: len(found.tokens)]]
        assert ends[found.target_start] > len(before)
        assert all(end <= len(before) for end in ends[: found.target_start]), (
            "the first token with a character"
        )


def test_a_token_across_the_border_belongs_to_the_target() -> None:
    tokenizer = words.tokenizer("byte level")
    pears = tokenizer(" pears")["input_ids"]
    example = encode(reader(tokenizer), Problem("own", "3", "x"))
    assert len(pears) == 1
    tokens, ((start, end),) = encoding._marked(tokenizer, "Ann has 3 pears", [(11, 15)], special=False)
    assert (tokens[start:], end) == (pears, len(tokens))
    assert example.target_tokens == 1


def test_no_lone_space_stands_before_a_target() -> None:
    tokenizer = words.tokenizer("metaspace, always")
    problem = Problem("own", "How many pears?", "She has 5 pears.")
    assert not apart(reader(tokenizer), problem), "what it was"
    example = encode(reader(tokenizer), problem)
    assert tokenizer.convert_ids_to_tokens([example.tokens[example.target_start]])[0].startswith("S")


def test_clean_borders_have_the_tokens_that_they_had() -> None:
    tokenizer = words.tokenizer("byte level", chat=True)
    assert apart(reader(tokenizer, chat=True), Problem("own", *ROWS[0]))
    assert not apart(reader(tokenizer), Problem("own", *ROWS[3]))
    for chat in (False, True):
        assert all(apart(reader(byte_tokenizer(chat=chat), chat=chat), Problem("own", *row)) for row in ROWS)


@pytest.mark.parametrize("kind", ["byte level", "byte level, whole offsets", "opened and closed"])
def test_without_offsets_a_target_begins_where_it_changes_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [Problem("own", *row) for row in ROWS]
    for chat in (False, True):
        own = reader(words.tokenizer(kind, chat=chat), chat=chat)
        clean = [apart(own, problem) for problem in problems]
        fast = [encode(own, problem) for problem in problems]
        with monkeypatch.context() as patch:
            patch.setattr(type(own.tokenizer), "is_fast", False)
            for problem, before, as_it_was in zip(problems, fast, clean, strict=True):
                found = encode(own, problem)
                assert found.tokens == before.tokens
                assert found.target_start <= before.target_start
                assert not as_it_was or found == before
    assert any(clean)


@pytest.mark.parametrize("kind", words.KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_every_answer_can_be_a_target(kind: str, chat: bool) -> None:
    tokenizer = words.tokenizer(kind, chat=chat)
    problem = Problem("own", "\n\n".join(text for _, text in CHAT), "It is 7.", before=CHAT)
    last = encode(reader(tokenizer, chat=chat), problem)
    both = encode(reader(tokenizer, chat=chat, turns="all"), problem)
    assert last.mask is None
    assert both.tokens == last.tokens
    assert both.is_target[last.target_start :] == last.is_target[last.target_start :]
    earlier = [
        t for t, own in list(zip(both.tokens, both.is_target, strict=True))[: last.target_start] if own
    ]
    said = tokenizer.decode(earlier).replace(" ", "").lower()
    assert said.rstrip() == "itis5."
    assert both.target_start == both.is_target.index(True)


def test_a_template_that_rewrites_earlier_answers_is_named() -> None:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('is', 'was') }}{% endfor %}[assistant]"
    )
    problem = Problem("own", "x", "It is 7.", before=CHAT)
    with pytest.raises(DataError, match=r"rewrites the earlier answer 'It is 5.'.*without --turns all"):
        encode(reader(tokenizer, chat=True, turns="all"), problem)
    assert encode(reader(tokenizer, chat=True), problem).target_tokens == 8


def test_fingerprints_of_suffixes_stay_and_masks_count() -> None:
    suffix = Example((5, 6, 7, 8), 2, "own", "a")
    masked = Example((5, 6, 7, 8), 1, "own", "a", (False, True, False, True))
    assert Calibration((suffix,), (0,)).fingerprint == (
        "7e3d2cf22c0dade12143ff57cdd7342f5ba219661d19f6c08592ee4160fb5993"
    )
    assert Calibration((masked,), (0,)).fingerprint != Calibration((suffix,), (0,)).fingerprint
    assert (masked.target_tokens, suffix.target_tokens) == (2, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_a_mask_are_those_of_its_tokens(family: str) -> None:
    decoder, examples = shared(family), calibration().examples
    masks = [tuple(i > 0 and i % 3 != 1 for i in range(len(e.tokens))) for e in examples]
    masked = [
        Example(e.tokens, m.index(True), e.source, e.content, m) for e, m in zip(examples, masks, strict=True)
    ]
    found = target_nats(decoder, batch_of(masked, range(len(masked))))
    expected = []
    for e in masked:
        each = [
            nats(decoder.model, Example(e.tokens, i, "", ""))
            - nats(decoder.model, Example(e.tokens, i + 1, "", ""))
            if i + 1 < len(e.tokens)
            else nats(decoder.model, Example(e.tokens, i, "", ""))
            for i, own in enumerate(e.is_target)
            if own
        ]
        expected.append(sum(each))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **ROUNDING)


def test_examples_longer_than_the_model_has_positions_are_refused() -> None:
    long = Calibration((Example((5,) * 20, 3, "own", "a"),), (0,))
    for planned in (attribution.planned, partial(pruning.planned, method=Method("wanda", 0.5), factors={})):
        with pytest.raises(
            DataError, match=r"20 tokens does not fit into the 16 positions of tiny: .*max_tokens=16"
        ):
            planned(tiny_decoder(positions=16), calibration=long)


def test_a_target_without_thoughts_follows_the_end_of_those_that_a_template_opens() -> None:
    words = byte_tokenizer(chat=True)
    words.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    reader = Reader(words, chat=True, max_tokens=200)
    for target, between in (("Four.", "\n</think>\n\n"), ("2 + 2.</think>Four.", "")):
        found = encode(reader, Problem("own", "2 + 2?", target))
        assert words.decode(found.tokens[: found.target_start]) == f"2 + 2?<think>\n{between}"
        assert words.decode(found.tokens[found.target_start :]) == target


def test_a_blank_that_the_template_puts_before_an_answer_goes_with_it() -> None:
    """Of Llama 2, Mistral and DeepSeek; the first token takes it in, and all turns can be told."""
    words = byte_tokenizer(chat=True)
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    turns = (("user", "How many?"), ("assistant", "Three."), ("user", "Sure?"))
    problem = Problem("own", "Sure?", "Yes.", before=turns)
    for all_turns in (False, True):
        reader = Reader(words, chat=True, max_tokens=200, turns="all" if all_turns else "last")
        found = encode(reader, problem)
        text = "[INST] How many? [/INST] Three.</s>[INST] Sure? [/INST] Yes."
        assert words.decode(found.tokens) == text
        wanted = "Yes." if not all_turns else "Three.Yes."
        at = [
            i
            for i, own in enumerate(found.mask or [i >= found.target_start for i in range(len(found.tokens))])
            if own
        ]
        assert words.decode([found.tokens[i] for i in at]) == wanted
    written = encode(reader, Problem("own", "Sure?", " Yes."))  # as the model wrote it
    assert words.decode(written.tokens) == "[INST] Sure? [/INST] Yes."
    assert lead(byte_tokenizer(chat=True), "x") == ""
