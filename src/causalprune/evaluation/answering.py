"""Tasks whose answers the model writes itself: right or wrong, or as a user's function says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from causalprune import calibration
from causalprune.calibration import TRACE_START, Problem, is_file, load_problems
from causalprune.core import DataError, Decoder, EvalResult, OptionError, Progress, Remarked
from causalprune.evaluation.settings import Settings, described, reader_for
from causalprune.evaluation.tasks.answers import (
    MARK,
    REGEX,
    after_trace,
    extract,
    guess,
    is_correct,
    is_part,
    labels_of,
)
from causalprune.evaluation.tasks.files import task_file
from causalprune.evaluation.tasks.generation import Answer, answers
from causalprune.evaluation.tasks.scorers import reference, scores
from causalprune.models import positions

NEW_TOKENS, NEW_TOKENS_THINKING = 512, 4096
"""The longest answer, where nothing else is asked for."""
BLANK = "\n\n"


@dataclass(frozen=True)
class Written:
    """What a model wrote to problems: the texts after its thoughts, and what is to be said of them.

    `over` is False where thoughts do not come to an end; the text is that of the thoughts then. `broken`: some prediction
    was not a number. `tokens` are those of prompts and of what was written, where that is looked at (`continuing`).
    """

    problems: Sequence[Problem]
    texts: tuple[str, ...]
    over: tuple[bool, ...]
    broken: bool
    description: dict[str, Any]
    tokens: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    def result(self, name: str, metric: str, values: Sequence[float], **about: Any) -> EvalResult:
        """Return the values of all problems as a result."""
        shown = [(p.content, p.prompt, p.target) for p in self.problems]
        contents, prompts, golds = (tuple(column) for column in zip(*shown, strict=True))
        values = [float("nan")] * len(values) if self.broken else values
        weights = (1.0,) * len(values)
        said = self.description | about
        return EvalResult(
            name, metric, tuple(values), weights, contents, self.texts, prompts, golds, description=said
        )


def right_or_wrong(
    decoder: Decoder, name: str, settings: Settings, on_progress: Progress
) -> list[EvalResult]:
    """Return 1 for every problem whose answer is that of its target, else 0."""
    source = name.rpartition("_")[0]
    problems = load_problems(source, "evaluation", data_dir=settings.data_dir, with_text=False)
    kind = _reading(source, problems, settings)
    about = {}
    if is_file(source):
        about = {"read_as": kind, "reading_guessed": settings.answer is None}
        if settings.answer is None and isinstance(on_progress, Remarked):
            on_progress.remark(f"answers are read as {kind}, as all targets end so")
    labels = labels_of([p.target for p in problems]) if kind == "letter" else ()
    found = write(decoder, source, problems, settings, on_progress)
    values = [
        float(
            over and is_correct(text, kind, p.answer or p.target, p.labels or labels, marked=MARK in p.target)
        )
        for over, text, p in zip(found.over, found.texts, found.problems, strict=True)
    ]
    return [found.result(name, "accuracy", values, **about)]


def scored(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    """Return what a user's function says of every answer."""
    metric = scorer_in(name, settings.scorers)
    scorer, source = settings.scorers[metric], name.removesuffix(f"_{metric}")
    problems = load_problems(source, "evaluation", data_dir=settings.data_dir, with_targets=False)
    known = all(p.target for p in problems)

    def targets(some: Sequence[Problem]) -> list[str] | None:
        return [p.target for p in some] if known else None

    tried = problems[:2]  # before anything is written
    scores(metric, scorer, [p.target or p.prompt for p in tried], targets(tried))
    found = write(decoder, source, problems, settings, on_progress)
    texts = [text if over else "" for text, over in zip(found.texts, found.over, strict=True)]
    values = scores(metric, scorer, texts, targets(found.problems))
    higher = bool(getattr(scorer, "higher_is_better", True))
    return [found.result(name, metric, values, scorer=reference(scorer), higher_is_better=higher)]


def scorer_in(name: str, scorers: Any) -> str:
    """Return the scorer that a task names, the longest where several fit; empty if there is none."""
    fitting = [scorer for scorer in scorers if name.endswith(f"_{scorer}")]
    return max(fitting, key=len, default="")


def chosen(problems: Sequence[Problem], settings: Settings) -> list[Problem]:
    """Return the problems that the seed chooses, in their own order."""
    order = sorted(
        range(len(problems)), key=lambda i: calibration.shuffle_key(problems[i].content, settings.seed)
    )
    return [problems[i] for i in sorted(order[: settings.limit])]


def write(
    decoder: Decoder, source: str, problems: Sequence[Problem], settings: Settings, on_progress: Progress
) -> Written:
    """Let the model answer those of the problems that the settings choose, greedily.

    Prompts are those of calibration, with thinking where it is asked for; without a template, white space at their end
    goes, since tokens of the answer may hold it.
    """
    tokenizer, few = decoder.tokenizer, chosen(problems, settings)
    reader = reader_for(decoder, settings)
    thinking = calibration.uses_thinking(tokenizer, settings.thinking, chat=reader.chat)
    shown = [calibration.question_text(reader, problem, thinking=thinking) for problem in few]
    calibration.enough(source, settings.limit, len(few))
    tokens = [
        calibration.question_tokens(reader, problem, text) for problem, text in zip(few, shown, strict=True)
    ]
    asks = settings
    if settings.max_new_tokens is None and not thinking and not is_file(source):
        asks = replace(
            settings, max_new_tokens=task_file(f"{source}_cot")["generation_kwargs"]["max_gen_toks"]
        )
    limit = room_for(decoder, source, max(map(len, tokens)), asks, thinking=thinking)
    stop = [] if thinking else _stops(source, problems, chat=reader.chat)  # thoughts may hold anything
    asked = list(zip(tokens, shown, strict=True))
    own = answered_in_order(decoder, asked, limit, stop, settings.batch_size, on_progress)
    texts = [_text(tokenizer, answer, stop, thinking=thinking) for answer in own]
    after = [
        after_trace(text, opened=prompt.rstrip().endswith(TRACE_START))
        for text, prompt in zip(texts, shown, strict=True)
    ]
    over = tuple(text is not None for text in after)
    description = described(decoder, settings, chat=reader.chat) | {
        "task_version": None if is_file(source) else task_file(f"{source}_cot")["metadata"].get("version"),
        **({"thinking": True} if thinking else {}),
        "batch_size": settings.batch_size,
        "generation": {"do_sample": False, "max_gen_toks": limit, "until": stop},
        "tokens_forwarded": sum(map(len, tokens)) + sum(answer.written for answer in own),
        "answers": _told([answer.ended and done for answer, done in zip(own, over, strict=True)], own),
    }
    final = tuple(text if rest is None else rest for text, rest in zip(texts, after, strict=True))
    return Written(few, final, over, any(answer.broken for answer in own), description)


def answered_in_order(
    decoder: Decoder,
    prompts: Sequence[tuple[Sequence[int], str]],
    limit: int,
    stop: Sequence[str],
    batch_size: int,
    on_progress: Progress,
) -> list[Answer]:
    """Return `answers` in the order of the prompts, each tokens and their text."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i][0]), prompts[i][1]))
    by_length = answers(decoder, [prompts[i][0] for i in order], limit, stop, batch_size, on_progress)
    return [answer for _, answer in sorted(zip(order, by_length, strict=True), key=lambda pair: pair[0])]


def _told(ended: Sequence[bool], own: Sequence[Answer]) -> dict[str, Any]:
    """Return how answers ended: the share that did not, tokens to the end (or the limit), and where there was none."""
    tokens = [answer.written for answer in own]
    unended = [i for i, over in enumerate(ended) if not over]
    return {
        "not_ended": len(unended) / len(ended),
        "mean_tokens": fmean(tokens),
        "tokens": tokens,
        "unended": unended,
    }


def _text(tokenizer: Any, answer: Answer, stop: Sequence[str], *, thinking: bool) -> str:
    """Return an answer as text; with thoughts, the tokens around them show even where they are special ones."""
    text = str(tokenizer.decode(answer.tokens, skip_special_tokens=not thinking))
    for word in stop:
        text = (text.lstrip() if word.isspace() else text).split(word, maxsplit=1)[0]
    return text


def room_for(decoder: Decoder, source: str, longest: int, settings: Settings, *, thinking: bool) -> int:
    """Return how many tokens an answer may have."""
    longest_text = positions(decoder.model.config)
    room = None if longest_text is None else longest_text - longest
    limit = settings.max_new_tokens or (NEW_TOKENS_THINKING if thinking else NEW_TOKENS)
    if room is not None and thinking and settings.max_new_tokens is None:
        limit = min(limit, max(room, 1))
    if room is not None and limit > room:
        way_out = (
            f"ask for --max-new-tokens {room} at most (`correct`: --new-tokens; in a recipe max_new_tokens)"
            if room > 0
            else "shorten it"
        )
        raise DataError(
            f"{source}: a prompt of {longest} tokens with an answer of up to {limit} does not fit into the model's "
            f"{longest_text} positions: {way_out}"
        )
    return limit


def _stops(source: str, problems: Sequence[Problem], *, chat: bool) -> list[str]:
    """Return the texts that end an answer.

    A data set's file says it. For a file of a user's, a chat template does; without one, a blank line ends answers where
    no target has any.
    """
    if not is_file(source):
        return list(task_file(f"{source}_cot")["generation_kwargs"]["until"])
    blank = any(BLANK in p.target.strip() or not p.target for p in problems)
    return [] if chat or blank else [BLANK]


def _reading(source: str, problems: Sequence[Problem], settings: Settings) -> str:
    """Return how answers are read; checks that every target of a file has an answer of this kind."""
    if not is_file(source):
        return str(task_file(f"{source}_cot")["metadata"]["answer"])
    targets = [p.target for p in problems]
    kind = settings.answer or guess(targets)
    if kind is None:
        raise OptionError(
            f"{source}: its targets do not all end in a number, in yes or no, or in a letter, so say how answers are read: "
            f"--answer number, number_comma, yes_no, letter, text or {REGEX}PATTERN (answer in a recipe)"
        )
    labels = labels_of(targets) if kind == "letter" else ()
    bare = [t for t in targets if extract(t, kind, labels) is None and not kind.startswith(REGEX)]
    if bare:
        raise DataError(
            f"{source}: {len(bare)} of {len(targets)} targets have no answer to read as {kind}, such as {bare[0][:60]!r}"
        )
    if parts := [t for t in targets if is_part(t, kind)]:
        raise DataError(
            f"{source}: {len(parts)} of {len(targets)} targets are more than the {kind} that would be read, such as {parts[0][-60:]!r}: "
            f"take --answer text or {REGEX}PATTERN"
        )
    return kind
