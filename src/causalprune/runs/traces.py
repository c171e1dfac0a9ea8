"""Calibration examples of a recipe, among them the intact model's own chains of thought (RAC, arXiv 2509.12464)."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from causalprune.calibration import (
    OWN,
    OWN_TEXT,
    TRACE_END,
    Exclude,
    Problem,
    Reader,
    Skipped,
    content_hash,
    contents,
    date_of,
    draw,
    drawn,
    encode,
    enough,
    is_file,
    load_problems,
    question_text,
    question_tokens,
    uses_thinking,
    with_limit,
)
from causalprune.core import (
    METHOD_VERSION,
    AtOnce,
    Calibration,
    DataError,
    Decoder,
    Example,
    Ledger,
    OptionError,
    Progress,
    cache_folder,
    say,
    silent,
)
from causalprune.evaluation import (
    Text,
    alone,
    ends_of,
    own_pieces,
    plain_generation,
    version_of,
    write_text,
)
from causalprune.models import positions
from causalprune.runs.recipe import CalibrationSpec

BATCH = 16
"""Answers that are written at once."""
TRIES = 4
"""Problems that are tried for each answer that is wanted: those without an end are left out."""


def calibrated(
    decoder: Decoder,
    wanted: CalibrationSpec,
    data_dir: Path | str | None = None,
    exclude: Exclude | None = None,
    on_progress: Progress = silent,
    beside: Sequence[Text] = (),
) -> Calibration:
    """Return the examples that a recipe or the command line asks for, in fewer subsets where there are fewer examples.

    `own:NAME` stands for problems of NAME with the answers that the model itself writes to them, `own` for text that it
    writes; both are written once for a model, and kept in the cache folder; answers have the content of their problem. Where such text has to be written, so are the
    texts `beside` it, which takes little longer.
    """
    counts = wanted.counts()
    reader = wanted.reader(decoder.tokenizer, positions(decoder.model.config), data_dir)
    reader = replace(reader, thinking=uses_thinking(decoder.tokenizer, wanted.thinking, chat=reader.chat))
    say(on_progress, unit="answers")
    files = {
        name: own_answers(decoder, reader, name.removeprefix(OWN), count, exclude, on_progress)
        for name, count in counts.items()
        if name.startswith(OWN)
    }
    counts |= {name: len(load_problems(str(path), "calibration")) for name, path in files.items()}
    asked = {str(files.get(name, name)): count for name, count in counts.items()}
    given: dict[str, Sequence[Example]] = {}
    if OWN_TEXT in counts:
        task, count = dict(list(asked.items())[: len(wanted.task)]), counts[OWN_TEXT]
        if OWN_TEXT not in task:
            read = drawn(replace(reader, skipped=Skipped()), task, 1, exclude).description["tokens"]
            count = wanted.counts(read)[OWN_TEXT]
        counts[OWN_TEXT] = asked[OWN_TEXT] = count
        given[OWN_TEXT] = own_pieces(decoder, count, wanted.max_tokens, wanted.seed, on_progress, beside)
    found = drawn(replace(reader, skipped=Skipped()), asked, wanted.subsets, exclude, given)
    prompts = {
        content_hash(problem.prompt): problem.content
        for name in files
        for problem in load_problems(name.removeprefix(OWN), "calibration", data_dir=data_dir)
    }
    answered = set(map(str, files.values()))
    examples = [
        replace(e, content=prompts.get(e.content, e.content)) if e.source in answered else e
        for e in found.examples
    ]
    taken = dict(zip(counts, found.description["sources"].values(), strict=True))
    description: dict[str, Any] = {**found.description, "sources": taken}
    if wanted.preserve:
        description["preserve"] = [with_limit(source)[0] for source in wanted.preserve]
    if OWN_TEXT in given:
        text = repr([example.tokens for example in given[OWN_TEXT]]).encode()
        description["own_text_sha256"] = hashlib.sha256(text).hexdigest()
        description["own_text"] = {
            "version": version_of(decoder),
            "pieces": len(given[OWN_TEXT]),
            "share": wanted.preserve_share,
        }
    if files:
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        description["own_answers_sha256"] = hashes
    return replace(found, examples=tuple(examples), description=description)


def own_answers(
    decoder: Decoder,
    reader: Reader,
    source: str,
    count: int,
    exclude: Exclude | None = None,
    on_progress: Progress = silent,
) -> Path:
    """Return a JSONL file of `count` problems with the model's own greedy answers, written where they are missing.

    Answers that do not end within the reader's `max_tokens` are left out, and so are problems in `exclude` (None:
    those of the source's evaluation split). Where the source holds fewer, all are taken. Thoughts are part of an answer. What is
    written survives a kill.

    Raises:
        DataError: too few answers come to an end, or running text has nothing to answer.
    """
    if source == "ioi":
        raise OptionError(
            f"{OWN}{source}: pairs are there to compare two answers, and have none of their own: take {source}"
        )
    if decoder.device.type == "meta":
        raise OptionError(f"{OWN}{source} needs a model that writes: leave out --stream, or take {source}")
    identity = _identity(decoder, reader, source)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "answers"
    if exclude is None and not is_file(source):  # which has no evaluation problems apart
        exclude = contents(source, "evaluation", data_dir=reader.data_dir)
    every = load_problems(source, "calibration", data_dir=reader.data_dir, with_text=False)
    problems = {p.content: p for p in every}
    before = reader.skipped.copy()
    found = _apart(draw(reader, source, "calibration", exclude=exclude or frozenset()), reader.skipped)
    kept: list[dict[str, Any]] = []
    tried, at_once = 0, AtOnce()
    # One run at a time: another may be writing the same answers.
    with Ledger(folder / f"{name}.ledger", identity, wait=True) as book:
        for examples in _batched(islice(found, TRIES * count)):
            missing = [problems[e.content] for e in examples if e.content not in book.rows]
            texts = [question_text(reader, p, thinking=reader.thinking) for p in missing]
            prompts = [question_tokens(reader, *own) for own in zip(missing, texts, strict=True)]
            write = partial(_answers, decoder, prompts, reader)
            answers = chain(*at_once(len(missing), reader.limit, write))
            for problem, answer in zip(missing, answers, strict=True):
                own = replace(problem, target=answer)
                fits = bool(answer.strip()) and len(encode(reader, own).tokens) <= reader.limit
                book.append(problem.content, answer if fits else None)
            tried += len(examples)
            for example in examples:
                answer = book.rows[example.content]
                if answer is not None:
                    kept.append(_row(problems[example.content], answer))
            on_progress(min(len(kept), count), count)
            if len(kept) >= count:
                break
        out = reader.skipped.since(before)
        _check_enough(source, count, len(kept), replace(out, too_long=out.too_long + tried - len(kept)))
        path = folder / f"{name}-{min(len(kept), count)}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept[:count])
        write_text(path, text)
    return path


def _check_enough(source: str, count: int, found: int, skipped: Skipped) -> None:
    try:
        enough(f"{OWN}{source}", count, found, skipped)
    except DataError as error:
        raise DataError(f"{error}, or take the worked solutions (without {OWN})") from None


def _identity(decoder: Decoder, reader: Reader, source: str) -> dict[str, Any]:
    """Return what the answers depend on."""
    day = date_of(decoder.tokenizer) if reader.chat else None
    return {
        "model": decoder.fingerprint,
        "source": source,
        "seed": reader.seed,
        "chat": reader.chat,
        "max_tokens": reader.limit,
        **({"thinking": True} if reader.thinking else {}),
        **({"fold_system": True} if reader.fold_system else {}),
        **({} if day is None else {"date": day}),
        **(
            {} if reader.chat else {"asked": METHOD_VERSION}
        ),  # version 1 put a blank line after plain prompts
    }


def _row(problem: Problem, answer: str) -> dict[str, Any]:
    """Return a problem with an answer as a line of a file."""
    if not problem.before:
        return {"prompt": problem.prompt, "target": answer}
    return {"messages": [*problem.messages, {"role": "assistant", "content": answer}]}


def _apart(examples: Iterator[Example], skipped: Skipped) -> Iterator[Example]:
    """Yield one example of each prompt, which is answered once whatever its targets are; count the others."""
    seen: set[str] = set()
    for example in examples:
        if example.content in seen:
            skipped.duplicate += 1
        else:
            seen.add(example.content)
            yield example


def _answers(decoder: Decoder, asked: Sequence[list[int]], reader: Reader, rows: Sequence[int]) -> list[str]:
    """Return the greedy answers to these prompts; empty where one does not end.

    Those for which the model's positions leave less room beside the longest prompt than alone go on alone.
    """
    prompts = [asked[i] for i in rows]
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    if len(rows) > 1 and alone(decoder.model):
        return [answer for row in rows for answer in _answers(decoder, asked, reader, [row])]
    room = max(min(reader.limit - shortest, (reader.positions or math.inf) - longest), 1)
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with plain_generation(decoder.model), torch.inference_mode():
        found = decoder.model.generate(
            tokens.to(decoder.device),
            attention_mask=real.to(decoder.device),
            max_new_tokens=int(room),
            pad_token_id=0,  # what a tokenizer pads with may be beyond the model's embedding
        )
    ends = ends_of(decoder.model, decoder.tokenizer)
    answers = [_ended(reader, row[longest:].tolist(), ends) for row in found]
    return [
        _answers(decoder, asked, reader, [row])[0]
        if not answer and len(rows) > 1 and len(asked[row]) + room < reader.limit
        else answer
        for row, answer in zip(rows, answers, strict=True)
    ]


def _ended(reader: Reader, tokens: Sequence[int], ends: Set[int]) -> str:
    """Return the text before the first token that ends an answer; empty if there is none, or thoughts go on."""
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    if at is None:
        return ""
    text = str(reader.tokenizer.decode(tokens[:at], skip_special_tokens=not reader.thinking))
    text = (
        text if reader.chat else text.lstrip()
    )  # the prompt ended without the white space before its answer
    return text if TRACE_END in text or not reader.thinking else ""


def _batched(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while batch := list(islice(examples, BATCH)):
        yield batch
