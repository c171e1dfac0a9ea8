import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tinydata import byte_tokenizer, write_data, write_jsonl

from causalprune.calibration import data
from causalprune.calibration.data import Problem, content_hash, contents, load_problems
from causalprune.calibration.encoding import Reader, encode, prompt_text, text_tokens, windows
from causalprune.calibration.examples import batches, calibrate, few, split_counts
from causalprune.calibration.templates import uses_chat
from causalprune.core.errors import DataError, OptionError
from causalprune.core.types import Example

SUFFIX = (
    "\n\nThink step by step, then give the final answer as a number on a last line that starts with ####."
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def text(example: Example, tokenizer: Any) -> tuple[str, str]:
    start = example.target_start
    return tokenizer.decode(example.tokens[:start]), tokenizer.decode(example.tokens[start:])


def test_gsm8k_rows_lose_calculator_marks_and_nothing_else(folder: Path) -> None:
    problem = load_problems("gsm8k", "calibration", data_dir=folder)[3]
    assert problem.prompt == f"Ann has 3 pears and gets 2. How many?{SUFFIX}"
    assert problem.target == "She has 3+2=5 pears.\n#### 5"
    assert problem.answer == "5"


def test_strategyqa_and_arc_targets_end_in_the_answer_line(folder: Path) -> None:
    assert (
        load_problems("strategyqa", "calibration", data_dir=folder)[1].target
        == "1 is a number.\nEven is 2k.\n#### no"
    )
    problem = load_problems("arc_challenge", "calibration", data_dir=folder)[1]
    assert problem.target == "2. xx1\n#### 2"
    assert problem.prompt.startswith("What is 1?\n1. x1\n2. xx1\n3. xxx1\n4. xxxx1\n\nThink step by step")


@pytest.mark.parametrize(("row", "labels"), [(0, "ABCD"), (1, "1234"), (2, "ABC"), (3, "ABCDE")])
def test_arc_gold_follows_the_labels(folder: Path, row: int, labels: str) -> None:
    problem = load_problems("arc_challenge", "calibration", data_dir=folder)[row]
    assert "".join(problem.labels) == labels
    assert problem.gold == row % 3
    assert problem.choices[problem.gold] == "x" * (row % 3 + 1) + str(row)


def test_arc_rows_of_the_hub_have_columns() -> None:
    row = {"question": "Q", "choices": {"label": ["1", "2", "3"], "text": ["a", "b", "c"]}, "answerKey": "3"}
    fields = data.SOURCES["arc_challenge"].parse(row)
    assert (fields["labels"], fields["choices"], fields["solution"]) == (
        ("1", "2", "3"),
        ("a", "b", "c"),
        "3. c",
    )


def test_arc_answer_without_an_option_names_the_line(folder: Path) -> None:
    path = folder / "arc_challenge" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["answerKey"] = "Z"
    write_jsonl(path, rows)
    with pytest.raises(DataError, match=r"train.jsonl:5: malformed row"):
        load_problems("arc_challenge", "calibration", data_dir=folder)


def test_subsets_are_disjoint_and_interleaved(folder: Path) -> None:
    found = calibrate(byte_tokenizer(), ["gsm8k"], n=10, subsets=3, data_dir=folder)
    assert found.subset == (0, 1, 2, 0, 1, 2, 0, 1, 2, 0)
    assert len({e.content for e in found.examples}) == 10
    assert found.n_subsets == 3


def test_draw_depends_on_seed_and_content_only(folder: Path) -> None:
    first = calibrate(byte_tokenizer(), ["gsm8k"], n=6, data_dir=folder)
    questions = [f"Ann has {i} pears and gets 2. How many?" for i in range(12)]
    hashes = [hashlib.sha256(q.casefold().encode()).hexdigest() for q in questions]
    expected = sorted(hashes, key=lambda h: hashlib.sha256(f"0:{h}".encode()).hexdigest())[:6]
    assert [e.content for e in first.examples] == expected
    path = folder / "gsm8k" / "train.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert calibrate(byte_tokenizer(), ["gsm8k"], n=6, data_dir=folder).fingerprint == first.fingerprint
    other = calibrate(byte_tokenizer(), ["gsm8k"], n=6, seed=1, data_dir=folder)
    assert other.fingerprint != first.fingerprint


def test_excluded_contents_never_appear(folder: Path) -> None:
    everything = calibrate(byte_tokenizer(), ["gsm8k"], n=12, data_dir=folder)
    exclude = frozenset(e.content for e in everything.examples[:4])
    found = calibrate(byte_tokenizer(), ["gsm8k"], n=8, data_dir=folder, exclude=exclude)
    assert not exclude & {e.content for e in found.examples}
    assert found.description["skipped"]["excluded"] == 4


def test_evaluation_problems_are_excluded_without_being_asked(folder: Path) -> None:
    train, test = folder / "gsm8k" / "train.jsonl", folder / "gsm8k" / "test.jsonl"
    train.write_text(train.read_text() + test.read_text().replace("Ann has", "ANN  has"))
    with pytest.raises(DataError, match=r"18 examples asked for, 12 of 18 usable .6 kept for measuring"):
        calibrate(byte_tokenizer(), ["gsm8k"], n=18, data_dir=folder)


def test_repeated_examples_are_skipped_and_counted(folder: Path) -> None:
    path = folder / "gsm8k" / "train.jsonl"
    path.write_text(path.read_text() * 2)
    found = calibrate(byte_tokenizer(), ["gsm8k"], n=12, data_dir=folder)
    assert len({e.content for e in found.examples}) == 12
    with pytest.raises(DataError, match=r"14 .* asked for, 12 of 24 usable .12 repeated"):
        calibrate(byte_tokenizer(), ["gsm8k"], n=14, data_dir=folder)


def test_over_long_examples_are_skipped_and_reported_not_cut(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "target": "t" * (40 if i % 2 else 10)} for i in range(8)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    found = calibrate(byte_tokenizer(), [str(path)], n=4, subsets=1, max_tokens=30)
    assert [e.target_tokens for e in found.examples] == [10] * 4
    with pytest.raises(
        DataError,
        match=r"5 .* asked for, 4 of 8 usable \(4 too long\): ask for fewer or raise the token limit",
    ):
        calibrate(byte_tokenizer(), [str(path)], n=5, subsets=1, max_tokens=30)


def test_a_source_that_holds_fewer_gives_all_and_says_so(folder: Path) -> None:
    with pytest.warns(UserWarning, match="gsm8k: 99 examples asked for, 12 taken: all that it holds$"):
        found = calibrate(byte_tokenizer(), ["gsm8k:99", "strategyqa:2"], n=None, data_dir=folder)
    assert found.description["sources"] == {"gsm8k": 12, "strategyqa": 2}
    assert len(found.examples) == len(found.subset) == 14


@pytest.mark.parametrize(("long", "n"), [(2, 20), (1, 99), (3, 20), (3, 99)])
def test_nine_in_ten_are_enough(tmp_path: Path, long: int, n: int) -> None:
    rows = [{"prompt": f"p{i}", "target": "t" * (40 if i < long else 10)} for i in range(20)]
    path = str(write_jsonl(tmp_path / "own.jsonl", rows))
    if long > 2:
        with pytest.raises(DataError, match=rf"{n} examples asked for, 17 of 20 usable \(3 too long\)"):
            calibrate(byte_tokenizer(), [path], n=n, max_tokens=30)
        return
    said = rf"{n} examples asked for, {20 - long} taken: all that it holds but {long} too long"
    with pytest.warns(UserWarning, match=said):
        assert len(calibrate(byte_tokenizer(), [path], n=n, max_tokens=30).examples) == 20 - long


def test_subsets_are_cut_from_what_is_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "p", "target": "t"}])
    with (
        pytest.warns(UserWarning, match="1 taken"),
        pytest.raises(DataError, match="1 examples cannot be cut"),
    ):
        calibrate(byte_tokenizer(), [str(path)], n=3, subsets=3)


@pytest.mark.parametrize(("n", "subsets"), [(2, 3), (4, 0)])
def test_too_few_examples_for_the_subsets(folder: Path, n: int, subsets: int) -> None:
    with pytest.raises(DataError, match=f"{n} examples cannot be cut into {subsets} subsets"):
        calibrate(byte_tokenizer(), ["gsm8k"], n=n, subsets=subsets, data_dir=folder)


def test_mix_is_even_and_takes_own_counts(folder: Path) -> None:
    assert split_counts(["gsm8k", "strategyqa", "arc_challenge"], 8) == {
        "gsm8k": 3,
        "strategyqa": 3,
        "arc_challenge": 2,
    }
    assert split_counts(["gsm8k:2", "strategyqa"], 8) == {"gsm8k": 2, "strategyqa": 6}
    assert split_counts(["gsm8k:2", "c4:3"], None) == {"gsm8k": 2, "c4": 3}
    found = calibrate(byte_tokenizer(), ["gsm8k:2", "strategyqa"], n=5, data_dir=folder)
    assert [e.source for e in found.examples] == ["gsm8k"] * 2 + ["strategyqa"] * 3
    assert found.description["sources"] == {"gsm8k": 2, "strategyqa": 3}


@pytest.mark.parametrize(
    ("sources", "n", "error"),
    [
        ([], 8, OptionError),
        (["gsm8k", "gsm8k:2"], 8, OptionError),
        (["gsm8k:2"], 8, OptionError),
        (["gsm8k:0"], 8, OptionError),
        (["gsm8k:8", "c4"], 8, DataError),
        (["gsm8k"], None, DataError),
    ],
)
def test_counts_that_do_not_add_up(sources: list[str], n: int | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        split_counts(sources, n)


def test_unknown_source_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'gsm8k'"):
        calibrate(byte_tokenizer(), ["gsm8"], n=8)


def test_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k.test.jsonl.*--data-dir"):
        calibrate(byte_tokenizer(), ["gsm8k"], n=8, data_dir=tmp_path)


def test_hub_failure_says_to_pass_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"openai/gsm8k .*no network.*--data-dir"):
        load_problems("gsm8k", "calibration")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not valid JSON"),
        ("[1]", "a JSON object is wanted"),
        ('{"prompt": "p"}', "no text under 'target'"),
        ('{"prompt": 3, "target": "t"}', "no text under 'prompt'"),
        ('{"prompt": "p", "target": " "}', "the target is empty"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"own.jsonl:3: {message}"):
        load_problems(str(path), "calibration")


def test_empty_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        load_problems(str(path), "calibration")


@pytest.mark.parametrize("bos", [False, True])
def test_plain_prompt_ends_in_a_blank_line(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    example = encode(Reader(tokenizer, chat=False, max_tokens=99), Problem("own", "prompt", "target"))
    assert text(example, tokenizer) == ("<s>" * bos + "prompt\n\n", "target")


@pytest.mark.parametrize("bos", [False, True])
def test_chat_template_writes_its_own_special_tokens(bos: bool) -> None:
    tokenizer = byte_tokenizer(chat=True, bos=bos)
    example = encode(Reader(tokenizer, chat=True, max_tokens=99), Problem("own", "prompt", "target"))
    assert text(example, tokenizer) == ("[user]prompt[assistant]", "target")


def test_chat_follows_the_tokenizer_unless_told(folder: Path) -> None:
    for chat, expected in (("auto", True), ("on", True), ("off", False)):
        found = calibrate(byte_tokenizer(chat=True), ["gsm8k"], n=3, chat=chat, data_dir=folder)
        assert found.description["chat_template"] is expected
        assert text(found.examples[0], byte_tokenizer())[0].startswith("[user]") is expected
    assert not uses_chat(byte_tokenizer(), "auto")
    with pytest.raises(OptionError, match="no chat template"):
        calibrate(byte_tokenizer(), ["gsm8k"], n=3, chat="on", data_dir=folder)


def test_target_of_one_token_without_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to predict"):
        encode(Reader(byte_tokenizer(), chat=False, max_tokens=99), Problem("own", "", "t"))


def test_running_text_comes_in_full_blocks_without_template(folder: Path) -> None:
    for source in ("wikitext2", "c4"):
        found = calibrate(byte_tokenizer(chat=True), [source], n=5, max_tokens=32, data_dir=folder)
        assert {(len(e.tokens), e.target_start) for e in found.examples} == {(32, 1)}
        assert "[user]" not in text(found.examples[0], byte_tokenizer())[1]


def test_wikitext_is_joined_as_usual(folder: Path) -> None:
    lines = (folder / "wikitext2" / "wiki.test.raw").read_text().removesuffix("\n").split("\n")
    usual = "\n\n".join("" if not line.strip() else line + "\n" for line in lines)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(text_tokens(tokenizer, "wikitext2", "evaluation", data_dir=folder)) == usual


def test_windows_do_not_overlap_and_cover_the_text() -> None:
    found = windows(byte_tokenizer(), range(2, 25), "own", 5)
    assert [list(e.tokens) for e in found] == [list(range(i, i + 5)) for i in (2, 7, 12, 17)]


def test_c4_splits_do_not_share_rows(folder: Path) -> None:
    first, second = (contents("c4", split, data_dir=folder) for split in ("calibration", "evaluation"))
    assert (len(first), len(second)) == (10, 10)
    assert not first & second


def test_content_ignores_case_and_white_space_only() -> None:
    assert content_hash(" A  b\n") == content_hash("a B")
    assert content_hash("a b") != content_hash("a c")
    with_instruction = Problem("gsm8k", f"Why?{SUFFIX}", "t", question="Why?")
    assert with_instruction.content == content_hash("why?")


@pytest.mark.thorough
def test_gsm_symbolic_needs_no_files_and_splits_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(data, "SYMBOLIC_SEEDS", {"calibration": (0, 300), "evaluation": (1_000_000, 100)})
    found = calibrate(byte_tokenizer(), ["gsm_symbolic"], n=40, max_tokens=2000)
    assert not contents("gsm_symbolic", "evaluation") & {e.content for e in found.examples}
    problems = load_problems("gsm_symbolic", "evaluation")
    assert not any(p.answer.endswith(".0") for p in problems)
    assert all(p.target.endswith(f"\n#### {p.answer}") for p in problems)


def test_batches_hold_every_sequence_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 300, (60,), generator=generator).tolist()
    examples = [
        Example(tuple(range(1, size + 1)), size // 2, "own", str(i)) for i, size in enumerate(lengths)
    ]
    found = batches(examples, max_batch_tokens=1000)
    assert sorted(i for b in found for i in b.indices) == list(range(60))
    for batch in found:
        assert batch.tokens.numel() <= 1000
        assert batch.lengths.max() <= 1.12 * batch.lengths.min()
        for row, i in enumerate(batch.indices):
            size = lengths[i]
            assert tuple(batch.tokens[row, :size].tolist()) == examples[i].tokens
            assert not batch.tokens[row, size:].any()
            assert batch.lengths[row] == size
            assert batch.is_target[row].nonzero()[:, 0].tolist() == list(range(size // 2, size))
    assert len(found) < 30


def test_an_example_beyond_the_batch_limit_goes_alone() -> None:
    examples = [Example((1,) * size, 1, "own", str(size)) for size in (50, 5, 5)]
    assert [b.indices for b in batches(examples, max_batch_tokens=12)] == [(0,), (1, 2)]


@pytest.mark.thorough
def test_real_data_calibrates_apart_from_evaluation(data_dir: Path) -> None:
    sources = ["gsm8k", "strategyqa", "arc_challenge"]
    found = calibrate(byte_tokenizer(), sources, n=96, max_tokens=3000, data_dir=data_dir)
    seen = frozenset().union(*(contents(s, "evaluation", data_dir=data_dir) for s in sources))
    drawn = {e.content for e in found.examples}
    assert len(drawn) == 96
    assert not seen & drawn


def test_real_data_has_the_rows_it_should(data_dir: Path) -> None:
    sizes = {"gsm8k": (7473, 1319), "strategyqa": (2061, 229), "arc_challenge": (1119, 1172)}
    for source, expected in sizes.items():
        found = [load_problems(source, split, data_dir=data_dir) for split in ("calibration", "evaluation")]
        assert tuple(map(len, found)) == expected
        assert not any("<<" in p.target for problems in found for p in problems)
    labels = [p.labels for p in load_problems("arc_challenge", "evaluation", data_dir=data_dir)]
    assert {len(row) for row in labels} == {3, 4, 5}
    assert sum(row[0] == "1" for row in labels) == 22


@pytest.mark.parametrize(
    ("n", "tokens", "expected"), [(3, 5, 3), (48, 100, 8), (48, 40, 15), (20, 5, 20), (48, 5, 32)]
)
def test_few_examples_come_from_everywhere(n: int, tokens: int, expected: int) -> None:
    examples = [Example(tuple(range(tokens + 1)), 1, "s", str(i)) for i in range(n)]
    chosen = [int(e.content) for e in few(examples)]
    assert len(chosen) == len(set(chosen)) == expected
    assert chosen == sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise([-1, *chosen, n])]
    assert max(gaps) <= 1.5 * n / expected + 1


def test_every_window_opens_as_a_text_does() -> None:
    tokenizer, text = byte_tokenizer(bos=True), "abcdefghij"
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    found = windows(tokenizer, tokens, "text", 4)
    assert [e.tokens for e in found] == [(tokens[0], *tokens[i : i + 3]) for i in (1, 4, 7)]


def test_models_that_could_think_first_do_not() -> None:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    problem = Problem("own", "Say 7", "7")
    assert prompt_text(Reader(tokenizer, chat=True, max_tokens=9), problem) == "Say 7"
