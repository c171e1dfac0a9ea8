import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES
from tinydata import byte_tokenizer, tiny_decoder, write_data, write_jsonl

from causalprune.calibration import examples as calibration
from causalprune.calibration.data import load_problems
from causalprune.core.errors import DataError, OptionError
from causalprune.core.types import Decoder, Example
from causalprune.evaluation import measures
from causalprune.evaluation.measures import check_tasks, evaluate, evaluation_contents, task_names
from causalprune.evaluation.results import headline
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks import generation
from causalprune.evaluation.tasks.answers import extract, is_correct
from causalprune.interventions import losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(chat=True)


NUMBERS = [
    ("so 3 pears\n#### 72", "72"),
    ("#### 5\nno, wait\n####72", "72"),
    ("#### $1,234.50 in 3 days", "1234.5"),
    ("####\n-7", "-7"),
    ("#### 70.00", "70"),
    ("That is 10-3=7 apples.", "7"),
    ("He pays 3, then 18.", "18"),
    ("First 1,000,000, then 2,000.", "2000"),
    ("#### none, but 4 before", "4"),
    ("there are 12 ####", "12"),
    ("it was 3 -\n#### .5", "0.5"),
    ("#### -0", "0"),
    ("10-3", "3"),
    ("nothing", None),
    ("####", None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_number_is_read_from_the_last_mark_else_from_the_end(text: str, expected: str | None) -> None:
    assert extract(text, "number") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No doubt.\n#### Yes", "yes"),
        ("yes ... #### **no**, not yes", "no"),
        ("Yes, or rather no.", "no"),
        ("nothing known", None),
        ("#### maybe\n", None),
    ],
)
def test_yes_or_no(text: str, expected: str | None) -> None:
    assert extract(text, "yes_no") == expected


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("A plant, B.\n#### C", "ABCD", "C"),
        ("#### (B) A thing", "ABCD", "B"),
        ("#### **D**", "ABCD", "D"),
        ("#### 3. Ice", "1234", "3"),
        ("The answer is B. A plant needs light.", "ABCD", "B"),
        ("The answer is a mystery. C is left", "ABCD", None),
        ("Either A or B.", "ABCD", "B"),
        ("It must be (2).", "1234", "2"),
        ("#### E", "ABCD", None),
        ("DNA", "ABCD", None),
    ],
)
def test_letter_is_one_of_the_rows_own_labels(text: str, labels: str, expected: str | None) -> None:
    assert extract(text, "letter", tuple(labels)) == expected


def test_answers_are_compared_by_value() -> None:
    assert is_correct("#### 1,000.0", "number", "1000")
    assert not is_correct("#### 100", "number", "1000")
    assert not is_correct("", "number", "1000")
    assert is_correct("#### YES", "yes_no", "yes")
    assert not is_correct("no idea", "letter", "A", ("A", "B"))


def own_score(decoder: Decoder, context: str, choices: list[str]) -> list[float]:
    """Return the log-likelihood of every continuation, computed without the harness."""
    encoded = [
        Example(tuple(decoder.tokenizer(context + " " + c)["input_ids"]), len(context), "", "")
        for c in choices
    ]
    found = {}
    for batch in calibration.batches(encoded, max_batch_tokens=4096):
        found |= dict(zip(batch.indices, (-losses.target_nats(decoder, batch)).tolist(), strict=True))
    return [found[i] for i in range(len(choices))]


def test_choice_task_agrees_with_our_own_log_likelihoods(decoder: Decoder, folder: Path) -> None:
    accuracy, normalised = evaluate(decoder, ["arc_challenge"], data_dir=folder, batch_size=4)
    assert (accuracy.metric, normalised.metric) == ("accuracy", "acc_norm")
    assert accuracy.description["chat_template"] is False
    problems = load_problems("arc_challenge", "evaluation", data_dir=folder)
    assert accuracy.examples == tuple(p.content for p in problems)
    for i, problem in enumerate(problems):
        context = f"Question: {problem.question}\nAnswer:"
        scores = torch.tensor(own_score(decoder, context, list(problem.choices)))
        lengths = torch.tensor([len(c) for c in problem.choices])
        assert accuracy.values[i] == float(scores.argmax() == problem.gold)
        assert normalised.values[i] == float((scores / lengths).argmax() == problem.gold)


def test_answers_stand_beside_problems_and_right_answers(decoder: Decoder, folder: Path) -> None:
    accuracy, normalised = evaluate(decoder, ["arc_challenge"], data_dir=folder)
    problems = load_problems("arc_challenge", "evaluation", data_dir=folder)
    for result in (accuracy, normalised):
        assert result.golds == tuple(p.choices[p.gold] for p in problems)
        right = tuple(float(a == b) for a, b in zip(result.texts, result.golds, strict=True))
        assert right == result.values
        assert all(p.question in prompt for p, prompt in zip(problems, result.prompts, strict=True))
    assert accuracy.description["tokens_forwarded"] > sum(len(p.question) for p in problems)
    (generated,) = evaluate(decoder, ["gsm8k_cot"], data_dir=folder, max_new_tokens=4)
    assert all(
        gold.endswith(p.answer)
        for gold, p in zip(
            generated.golds, load_problems("gsm8k", "evaluation", data_dir=folder), strict=True
        )
    )
    (loss,) = evaluate(decoder, ["gsm8k_nll"], data_dir=folder)
    assert set(loss.golds) == {p.target for p in load_problems("gsm8k", "evaluation", data_dir=folder)}


def test_yes_no_task_knows_the_gold_answer(decoder: Decoder, folder: Path) -> None:
    (result,) = evaluate(decoder, ["strategyqa"], data_dir=folder)
    for value, problem in zip(
        result.values, load_problems("strategyqa", "evaluation", data_dir=folder), strict=True
    ):
        no, yes = own_score(decoder, f"Question: {problem.question}\nAnswer:", ["no", "yes"])
        assert value == float((yes > no) == (problem.answer == "yes"))


@pytest.mark.parametrize("task", ["gsm8k_cot", "strategyqa_cot", "arc_challenge_cot"])
def test_generated_answers_do_not_depend_on_the_batch(decoder: Decoder, folder: Path, task: str) -> None:
    options: dict[str, Any] = {"data_dir": folder, "max_new_tokens": 6}
    (alone,) = evaluate(decoder, [task], batch_size=1, **options)
    (together,) = evaluate(decoder, [task], batch_size=6, **options)
    assert alone.texts == together.texts
    assert len(alone.texts) == len(alone.values) == len(alone.examples) == 6
    assert alone.weights == (1.0,) * 6
    assert any(alone.texts)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_generation_sees_the_prompt_of_calibration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chat: bool, bos: bool
) -> None:
    decoder = tiny_decoder(chat=chat, bos=bos)
    seen: list[list[int]] = []

    def greedy(
        _speaker: Any, context: torch.Tensor, mask: torch.Tensor, max_length: int, stop: list[str], ended: Any
    ) -> generation.Continued:
        seen.extend(row[real > 0].tolist() for row, real in zip(context, mask, strict=True))
        assert max_length == context.shape[1] + 3
        assert "\nQuestion:" in stop
        answer = torch.tensor([byte_tokenizer()("#### 102")["input_ids"]])
        n, written = len(context), answer.shape[1]
        tokens = torch.cat([context, answer.expand(n, -1)], 1)
        return generation.Continued(tokens, [written] * n, [True] * n, broken=False)

    monkeypatch.setattr(generation, "greedy", greedy)
    (result,) = evaluate(decoder, ["gsm8k_cot"], data_dir=folder, batch_size=1, max_new_tokens=3)
    reader = calibration.Reader(decoder.tokenizer, chat=chat, max_tokens=9999)
    examples = [calibration.encode(reader, p) for p in load_problems("gsm8k", "evaluation", data_dir=folder)]
    assert sorted(seen) == sorted([*e.tokens[: e.target_start][: None if chat else -2]] for e in examples)
    assert result.texts == ("#### 102",) * 6
    assert sum(result.values) == 1.0  # of 100 … 105 plus 2 pears, one is 102
    assert result.values[0] == 1.0


def test_limit_is_a_fixed_selection_for_every_model(folder: Path) -> None:
    options: dict[str, Any] = {"data_dir": folder, "seed": 3}
    first = evaluate(tiny_decoder(), ["strategyqa:3", "gsm8k_nll:3"], **options)
    second = evaluate(tiny_decoder(positions=900), ["strategyqa:3", "gsm8k_nll:3"], **options)
    assert [r.examples for r in first] == [r.examples for r in second]
    assert [len(r.values) for r in first] == [3, 3]
    whole = evaluate(tiny_decoder(), ["strategyqa"], **options)[0].examples
    assert set(first[0].examples) < set(whole)
    assert first[0].examples != whole[:3]
    assert evaluate(tiny_decoder(), ["strategyqa"], limit=3, **options)[0].examples == first[0].examples


def test_solution_loss_is_that_of_every_sequence_alone(decoder: Decoder, folder: Path) -> None:
    (result,) = evaluate(decoder, ["gsm8k_nll"], data_dir=folder, batch_tokens=900)
    reader = calibration.Reader(decoder.tokenizer, chat=True, max_tokens=512, data_dir=folder)
    examples = list(calibration.draw(reader, "gsm8k", "evaluation"))
    for example, nats, weight, content in zip(
        examples, result.values, result.weights, result.examples, strict=True
    ):
        (batch,) = calibration.batches([example], max_batch_tokens=1)
        assert nats == pytest.approx(losses.target_nats(decoder, batch).item(), rel=1e-5)
        assert weight == example.target_tokens
        assert content == example.content
    assert headline(result) == pytest.approx(sum(result.values) / sum(result.weights))


def test_solution_loss_of_a_file_and_its_skipped_lines(decoder: Decoder, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "target": "a" * (400 if i == 2 else 10)} for i in range(4)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    with pytest.warns(UserWarning, match="all that it holds but 1 too long"):
        (result,) = evaluate(decoder, [f"{path}_nll"], max_tokens=100)
    assert (result.weights, result.description["skipped"]["too_long"]) == ((10.0,) * 3, 1)
    with pytest.raises(DataError, match=r"all examples asked for, 0 of 4 usable \(4 too long\)"):
        evaluate(decoder, [f"{path}_nll"], max_tokens=5)


def test_perplexity_takes_windows_of_the_first_tokens(decoder: Decoder, folder: Path) -> None:
    (result,) = evaluate(decoder, ["wikitext2_ppl:300"], data_dir=folder, window=64)
    assert result.metric == "perplexity"
    assert result.weights == (63.0,) * 4
    assert (result.description["window"], result.description["tokens"]) == (64, 300)
    text = calibration.text_tokens(decoder.tokenizer, "wikitext2", "evaluation", data_dir=folder)
    (batch,) = calibration.batches([Example(tuple(text[64:128]), 1, "", "")], max_batch_tokens=64)
    assert result.values[1] == pytest.approx(losses.target_nats(decoder, batch).item(), rel=1e-5)
    with pytest.raises(DataError, match=r"50 tokens do not fill one window of 64"):
        evaluate(decoder, ["wikitext2_ppl:50"], data_dir=folder, window=64)
    (short,) = evaluate(tiny_decoder(positions=48), ["wikitext2_ppl:300"], data_dir=folder)
    assert (short.description["window"], short.weights) == (48, (47.0,) * 6)


def test_prompts_beyond_the_models_positions_are_refused_not_cut(folder: Path) -> None:
    with pytest.raises(DataError, match="does not fit"):
        evaluate(tiny_decoder(positions=120), ["gsm8k_cot"], data_dir=folder, max_new_tokens=6)


def test_a_task_file_is_all_a_new_benchmark_needs(decoder: Decoder, tmp_path: Path) -> None:
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"q": f"{i} + 1?", "options": ["1", "2"], "right": i % 2} for i in range(3)]
    )
    config = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(config))
    (result,) = evaluate(decoder, [f"{path}:2"])
    assert (result.task, len(result.values), len(set(result.examples))) == ("sums", 2, 2)


def test_task_files_are_checked(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps({"task": "bad"}))
    with pytest.raises(OptionError, match="needs at least task"):
        evaluate(decoder, [str(path)])
    config = {
        "task": "bad",
        "output_type": "generate_until",
        "doc_to_text": "",
        "metadata": {"answer": "numbr"},
    }
    path.write_text(json.dumps(config))
    with pytest.raises(OptionError, match="did you mean 'number'"):
        evaluate(decoder, [str(path)])


def test_names_are_checked_before_anything_runs(
    decoder: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "target_nats", lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(OptionError, match="did you mean 'gsm8k_cot'"):
        evaluate(decoder, ["gsm8k_nll", "gsm8k_cott"], data_dir=folder)
    with pytest.raises(OptionError, match="at least 1"):
        check_tasks(["gsm8k_nll:0"])
    assert {"gsm8k_cot", "arc_challenge", "strategyqa_nll", "wikitext2_ppl"} <= set(task_names())


def test_calibration_can_be_kept_apart_from_tasks(folder: Path) -> None:
    seen = evaluation_contents(["gsm8k_nll:2", "arc_challenge"], Settings(data_dir=folder), tiny_decoder())
    for source in ("gsm8k", "arc_challenge"):
        problems = load_problems(source, "evaluation", data_dir=folder)
        assert {p.content for p in problems} <= seen.keys()


def test_progress_is_reported_and_nothing_is_left_changed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    decoder = tiny_decoder()
    model, tokenizer = decoder.model, decoder.tokenizer
    generation, level, state = (
        model.generation_config,
        logging.getLogger("lm_eval").level,
        torch.get_rng_state(),
    )
    steps: list[tuple[int, int]] = []
    evaluate(
        decoder,
        ["gsm8k_cot", "strategyqa", "gsm8k_nll"],
        data_dir=folder,
        max_new_tokens=3,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert (6, 6) in steps
    assert (12, 12) in steps
    assert all(done <= total for done, total in steps)
    assert capfd.readouterr() == ("", "")
    assert model.generation_config is generation
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level
    assert torch.equal(torch.get_rng_state(), state)


def test_a_repetition_penalty_of_the_model_does_not_bend_greedy_answers(folder: Path) -> None:
    plain, bent = tiny_decoder(), tiny_decoder()
    bent.model.generation_config.repetition_penalty = 5.0
    options: dict[str, Any] = {"data_dir": folder, "max_new_tokens": 8}
    assert (
        evaluate(plain, ["gsm8k_cot"], **options)[0].texts
        == evaluate(bent, ["gsm8k_cot"], **options)[0].texts
    )


def test_the_output_head_gets_the_last_positions_as_a_copy(folder: Path) -> None:
    decoder, seen = tiny_decoder(), []
    head = decoder.model.get_output_embeddings()
    head.register_forward_hook(lambda _m, args, _o: seen.append((args[0].shape[:2], args[0].is_contiguous())))
    evaluate(decoder, ["gsm8k_cot:3"], data_dir=folder, max_new_tokens=2)
    assert seen[0][0] == (3, 1)
    assert all(whole for _, whole in seen)


def test_a_model_need_not_say_what_ends_an_answer() -> None:
    own = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert generation.ends_of(own, SimpleNamespace(eos_token_id=None)) == set()
    assert generation.ends_of(own, SimpleNamespace(eos_token_id=2)) == {2}
    own.generation_config.eos_token_id = [2, 7]
    assert generation.ends_of(own, SimpleNamespace(eos_token_id=None)) == {2, 7}


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral", "gpt2", "opt", "qwen3_moe"])
def test_answers_that_leave_the_batch_are_those_of_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = FAMILIES[family](), byte_tokenizer()
    words.pad_token = "</s>"
    random = torch.Generator().manual_seed(0)
    lengths, size = (5, 9, 3, 7, 9, 6, 4, 8), model.config.vocab_size
    context, mask = (
        torch.zeros(len(lengths), 9, dtype=torch.long),
        torch.zeros(len(lengths), 9, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        context[row, 9 - length :] = torch.randint(3, size, (length,), generator=random)
        mask[row, 9 - length :] = 1
    with torch.inference_mode():
        plain = model.generate(
            context, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=-1, pad_token_id=1
        )
    stop = words.decode(plain[2, 11])  # a token that some answers reach early
    speaker, sizes, told = SimpleNamespace(model=model, tokenizer=words), [], list[int]()
    hook = model.register_forward_pre_hook(
        lambda _m, _a, own: sizes.append(len(own["input_ids"])), with_kwargs=True
    )
    with torch.inference_mode():
        found = generation.greedy(speaker, context, mask, 23, [stop], told.append)
    hook.remove()
    ends = 0
    for row, (one, other) in enumerate(zip(found.tokens.tolist(), plain.tolist(), strict=True)):
        answer = words.decode(other[9:])
        ended = [i for i in range(10, 24) if stop in words.decode(other[9:i]) or other[i - 1] in (1, 2)]
        end = ended[0] if ended else 23
        assert (found.written[row], found.ended[row]) == (end - 9, bool(ended))
        assert one[:end] == other[:end], answer
        assert set(one[end:]) <= {words.pad_token_id}
        ends += bool(ended)
    assert told == sorted(told)
    assert len(told) == len(sizes)
    assert told[-1] == ends
    assert min(sizes) < len(lengths), "nobody left: the test is blind"
