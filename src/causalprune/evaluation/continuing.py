"""Tasks that let a model go on by itself, and look at what it writes: whether it loops, repeats itself, uses stock phrases."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from causalprune import calibration
from causalprune.calibration import TEXT_SOURCES, Problem, Split, load_problems
from causalprune.core import Decoder, EvalResult, OptionError, Progress, unknown
from causalprune.evaluation.answering import Written, answered_in_order, chosen, room_for, scorer_in
from causalprune.evaluation.settings import Settings, described, reader_for
from causalprune.evaluation.tasks.repeating import TRAITS
from causalprune.evaluation.tasks.scorers import Scorer, reference, scores

OPENING, CONTINUATION = 32, 128
"""Tokens of a text that a model goes on from, and tokens that it writes, where nothing else is asked for."""


Begun: TypeAlias = tuple[Sequence[Problem], Sequence[Sequence[int]]]
"""What a model goes on from: problems, and their tokens."""


def continued(
    decoder: Decoder, source: str, split: Split, begun: Begun, settings: Settings, on_progress: Progress
) -> Written:
    """Return how a model goes on from what is `begun`, greedily.

    Nothing but the model's own end stops it before `CONTINUATION` tokens, or `max_new_tokens`.

    Raises:
        DataError: a prompt does not fit into the model's positions.
    """
    problems, prompts = begun
    reader = reader_for(decoder, settings, chat=False if source in TEXT_SOURCES else None)
    thinking = source not in TEXT_SOURCES and calibration.uses_thinking(
        decoder.tokenizer, settings.thinking, chat=reader.chat
    )
    wanted = replace(settings, max_new_tokens=settings.max_new_tokens or CONTINUATION)
    limit = room_for(decoder, source, max(map(len, prompts)), wanted, thinking=False)
    asked = [(tokens, problem.prompt) for tokens, problem in zip(prompts, problems, strict=True)]
    own = answered_in_order(decoder, asked, limit, [], settings.batch_size, on_progress)
    texts = tuple(decoder.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in own)
    description = described(decoder, settings, chat=reader.chat) | {
        "split": split,
        **({"thinking": True} if thinking else {}),
        "batch_size": settings.batch_size,
        "generation": {"do_sample": False, "max_gen_toks": limit, "until": []},
        "tokens_forwarded": sum(map(len, prompts)) + sum(answer.written for answer in own),
    }
    broken = any(answer.broken for answer in own)
    found = Written(problems, texts, (True,) * len(own), broken, description)
    return replace(found, tokens=tuple((tuple(p), a.tokens) for p, a in zip(prompts, own, strict=True)))


def begin(decoder: Decoder, source: str, split: Split, settings: Settings) -> Begun:
    """Return the first `OPENING` tokens of texts without a template, or problems by the template, as many as the settings say.

    Raises:
        DataError: there are too few.
    """
    reader = reader_for(decoder, settings)
    if source not in TEXT_SOURCES:
        every = load_problems(source, split, data_dir=settings.data_dir, with_targets=False)
        calibration.enough(source, settings.limit, len(every), unit="prompts")
        thinking = calibration.uses_thinking(decoder.tokenizer, settings.thinking, chat=reader.chat)
        few = chosen(every, settings)
        texts = [calibration.question_text(reader, problem, thinking=thinking) for problem in few]
        return few, [calibration.question_tokens(reader, *own) for own in zip(few, texts, strict=True)]
    pairs = list(itertools.islice(_openings(decoder, source, split, settings), settings.limit))
    calibration.enough(source, settings.limit, len(pairs), unit="openings")
    return [problem for problem, _ in pairs], [tokens for _, tokens in pairs]


def _openings(
    decoder: Decoder, source: str, split: Split, settings: Settings
) -> Iterator[tuple[Problem, list[int]]]:
    """Yield how texts of at least `OPENING` tokens begin, in the order that the seed fixes."""
    words = decoder.tokenizer
    for problem in calibration.shuffled(
        load_problems(source, split, data_dir=settings.data_dir), settings.seed
    ):
        tokens = calibration.tokenize(words, problem.target, special=True)
        size = OPENING + (tokens[:1] == [words.bos_token_id])
        if len(tokens) >= size:
            shown = words.decode(tokens[:size], skip_special_tokens=True)
            yield replace(problem, question=problem.target, prompt=shown, target=""), tokens[:size]


def behaving(
    decoder: Decoder, names: Sequence[str], settings: Settings, on_progress: Progress
) -> list[EvalResult]:
    """Return how much of each trait is in what a model writes of its own, or what a user's function says of it.

    The names are of one source, from which the model goes on once.
    """
    measures = {name: scorer_in(name, (*settings.scorers, *TRAITS)) for name in names}
    judges = {name: judge_of(measure, settings) for name, measure in measures.items()}
    (source,) = {name.removesuffix(f"_{measure}") for name, measure in measures.items()}
    begun = begin(decoder, source, "evaluation", settings)
    found = continued(decoder, source, "evaluation", begun, settings, on_progress)
    return [
        found.result(name, measures[name], judge.values(found), **judge.about)
        for name, judge in judges.items()
    ]


@dataclass(frozen=True)
class Judge:
    """What gives continuations numbers, and what results say of it."""

    name: str
    scorer: Scorer | None
    phrases: tuple[str, ...]
    about: dict[str, Any]

    def values(self, found: Written) -> tuple[float, ...]:
        """Return a number for every continuation."""
        if self.scorer is not None:
            return scores(f"{self.name} ({reference(self.scorer)})", self.scorer, found.texts, None)
        each = zip(found.tokens, found.texts, strict=True)
        return tuple(TRAITS[self.name].score(new, text, self.phrases) for (_, new), text in each)


def judge_of(name: str, settings: Settings) -> Judge:
    """Return what a measure of continuations is judged by: one of `TRAITS`, or a scorer, which is tried."""
    if (scorer := settings.scorers.get(name)) is not None:
        told = reference(scorer)
        scores(f"{name} ({told})", scorer, ["One text.", "Another one."], None)  # before anything is written
        higher = bool(getattr(scorer, "higher_is_better", True))
        return Judge(name, scorer, (), {"scorer": told, "higher_is_better": higher})
    if name not in TRAITS:
        raise unknown("measure of what a model writes", name, (*TRAITS, *settings.scorers))
    about = {"scorer": _phrases_in(settings.phrases)} if name == "phrases" else {}
    return Judge(name, None, settings.phrases, about)


def _phrases_in(phrases: Sequence[str]) -> str:
    """Return how results say which phrases were looked for; `OptionError` where there are none."""
    if not phrases:
        raise OptionError("no phrases to look for: name a list of them with --phrases, one a line")
    return f"phrases:{hashlib.sha256(repr(tuple(phrases)).encode()).hexdigest()[:16]}"
