"""Problems with a counterfactual and a wrong answer: from files, and from templates."""

from pathlib import Path
from typing import Any

import pytest
from tinydata import byte_tokenizer, write_jsonl

from causalprune.calibration import ioi
from causalprune.calibration.data import content_hash, load_problems
from causalprune.calibration.encoding import Reader, encode
from causalprune.calibration.examples import batches, calibrate
from causalprune.core.errors import DataError

ROW = {
    "prompt": "Ann met Bob. Bob called",
    "target": " Ann",
    "counterfactual": "Ann met Bob. Ann called",
    "instead": " Bob",
}


def read(folder: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(folder / "pairs.jsonl", rows))


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {key: f"{text}{'' if key in ('target', 'instead') else i}" for key, text in ROW.items()}
        for i in range(10, 10 + count)
    ]


def test_a_pair_is_two_prompts_of_one_length_and_two_answers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    found = calibrate(tokenizer, [read(tmp_path, rows(9))], n=9, subsets=1)
    for one in found.examples:
        assert one.counterfactual is not None
        assert one.instead is not None
        text, other, wrong = (
            tokenizer.decode(own) for own in (one.tokens, one.counterfactual, one.instead.tokens)
        )
        assert text.endswith(" Ann"), "no blank line between: the target goes on with the prompt"
        assert "Bob called" in text
        assert other == text.replace("Bob called", "Ann called")
        assert wrong == text.removesuffix(" Ann") + " Bob"
        assert one.instead.target_start == one.target_start
        assert one.instead.counterfactual is not None
    (batch,) = batches(found.examples, max_batch_tokens=4096)
    assert batch.counterfactual is not None
    assert batch.counterfactual.shape == batch.tokens.shape
    assert (batch.counterfactual != batch.tokens).any(1).all()
    plain = [{"prompt": own["prompt"], "target": own["target"]} for own in rows(9)]
    other_file = str(write_jsonl(tmp_path / "plain.jsonl", plain))
    assert calibrate(tokenizer, [other_file], n=9, subsets=1).fingerprint != found.fingerprint


def test_a_misspelt_key_is_told_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} and", "target": " on", "insted": " off", "index": i, "instance": i} for i in range(3)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.warns(
        UserWarning, match=r"pairs.jsonl:1: 'insted' is not read: is 'instead' meant\?"
    ) as told:
        load_problems(str(tmp_path / "pairs.jsonl"), "calibration")
    assert len(told) == 1


@pytest.mark.parametrize("key", ["counterfactual", "instead"])
def test_a_line_without_what_others_have_is_named(key: str, tmp_path: Path) -> None:
    own = rows(9)
    del own[4][key]
    with pytest.raises(DataError, match=rf"pairs\.jsonl:5: no '{key}', which other rows have"):
        load_problems(read(tmp_path, own), "calibration")


def test_another_length_is_named_with_both(tmp_path: Path) -> None:
    own = rows(9)
    own[2]["counterfactual"] += "!!"
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:3: the counterfactual has 27 tokens and the prompt 25"
    ):
        calibrate(byte_tokenizer(), [read(tmp_path, own)], n=9, subsets=1)


@pytest.mark.parametrize(("key", "of"), [("counterfactual", "prompt"), ("instead", "target")])
def test_a_pair_of_one_and_the_same_is_named(key: str, of: str, tmp_path: Path) -> None:
    own = rows(9)
    own[3][key] = own[3][of]
    with pytest.raises(DataError, match=rf"pairs\.jsonl:4: '{key}' is the {of} itself"):
        calibrate(byte_tokenizer(), [read(tmp_path, own)], n=9, subsets=1)


def test_a_counterfactual_is_a_text_beside_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: 'counterfactual' is a text"):
        load_problems(read(tmp_path, [ROW | {"counterfactual": 3}]), "calibration")


def test_ioi_flips_who_acts() -> None:
    problems, measured = (load_problems("ioi", split) for split in ("calibration", "evaluation"))  # type: ignore[arg-type]
    assert len({p.prompt for p in problems}) > 1500
    contents = {content_hash(p.prompt) for p in problems}
    assert len([p for p in measured if p.content in contents]) < 0.1 * len(measured)
    names = set(ioi.NAMES.split())
    for p in problems[:200]:
        given, actor = p.target.strip(), p.instead.strip()
        assert {given, actor} <= names
        words = p.prompt.replace(",", " ").replace(".", " ").split()
        assert (words.count(given), words.count(actor)) == (1, 2)
        other = p.counterfactual.replace(",", " ").replace(".", " ").split()
        assert (other.count(given), other.count(actor)) == (2, 1)
    reader = Reader(byte_tokenizer(chat=True), chat=True, max_tokens=512)
    text = reader.tokenizer.decode(encode(reader, problems[0]).tokens)
    assert text == problems[0].prompt + problems[0].target, "never in a chat template"


def test_names_of_two_lengths_are_left_out_of_our_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers cut names differently; of a user's file such a pair is an error."""
    monkeypatch.setattr(ioi, "NAMES", "Al Bo Anna Carl")
    found = calibrate(byte_tokenizer(), ["ioi"], n=40, subsets=1)
    assert len(found.examples) == 40
    assert found.description["skipped"]["unequal"] > 10
    assert all(len(e.tokens) == len(e.counterfactual) for e in found.examples)
