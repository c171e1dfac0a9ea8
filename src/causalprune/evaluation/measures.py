"""Measuring a model: answers, solution losses, perplexity, and benchmarks through lm-evaluation-harness.

Task names: `<source>_answers` (and its older name, `<data set>_cot`) for answers that the model writes, `<source>_NAME` for
a scorer's opinion of them, `<source>_nll` for the loss of gold solutions, `<text>_ppl` for perplexity, `own_ppl` and `own_kl` for
perplexity of, and divergence on, a text that the intact model writes (`written`), `<source>_loops` and its like for what a model
writes when it goes on by itself (`continuing`), a task file of `causalprune/tasks`, or the path
of one. `name:limit` bounds one task: problems, or tokens of text. Every result keeps per-example values, so that models are
compared in pairs.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from causalprune import calibration
from causalprune.calibration import (
    OWN_TEXT,
    SOURCES,
    TASK_FILES,
    TEXT_SOURCES,
    contents,
    is_file,
    load_problems,
)
from causalprune.core import DataError, Decoder, EvalResult, Example, OptionError, Progress, bar, say, unknown
from causalprune.evaluation.answering import chosen, right_or_wrong, scored, scorer_in
from causalprune.evaluation.continuing import behaving
from causalprune.evaluation.settings import Settings, described, reader_for
from causalprune.evaluation.tasks.files import is_task_file, task_file
from causalprune.evaluation.tasks.repeating import TRAITS
from causalprune.evaluation.written import (
    AND,
    OWN_TASKS,
    TOKENS,
    by_example,
    own_measures,
    own_text,
    together,
)
from causalprune.interventions import target_nats
from causalprune.models import positions

Metric = Literal["accuracy", "acc_norm", "nats_per_token", "perplexity"]

METRICS: dict[str, Metric] = {"acc": "accuracy", "exact_match": "accuracy", "acc_norm": "acc_norm"}
"""The harness's metrics that are 0 or 1 per example, and what we call them."""


def evaluate(
    decoder: Decoder,
    tasks: Sequence[str],
    settings: Settings = Settings(),
    *,
    on_progress: Progress | None = None,
    **changes: Any,
) -> list[EvalResult]:
    """Return the results of all tasks; a multiple-choice task may give two, by metric.

    `changes` are fields of `Settings`. All names are checked before the first forward pass.
    `on_progress` is called with what is done and the total of the current task: sequences, or
    requests in the harness; where none is given, every task has a bar (`silent`: none has).
    """
    settings = replace(settings, **changes)
    for task in tasks:
        _runner(calibration.with_limit(task)[0], settings.scorers)
    found: dict[str, list[EvalResult]] = {}
    for group in together(tasks, settings.scorers):
        names = [calibration.with_limit(task)[0] for task in group]
        limit = calibration.with_limit(group[0])[1]
        own = settings if limit is None else replace(settings, limit=limit)
        start, held = time.perf_counter(), list(digests(names[:1], settings.scorers).values())
        with bar(on_progress, AND.join(names)) as tell:
            say(tell, unit=_unit(names[0], settings.scorers))
            if len(names) > 1:
                shared = _both if names[0] in OWN_TASKS else behaving
                every = [[result] for result in shared(decoder, names, own, tell)]
            else:
                every = [_runner(names[0], settings.scorers)(decoder, names[0], own, tell)]
        seconds = (time.perf_counter() - start) / len(group)
        data = {"data": held[0]} if held else {}
        for task, results in zip(group, every, strict=True):
            found[task] = [_shared(result, seconds, len(group), data) for result in results]
    return [result for task in tasks for result in found[task]]


def _shared(result: EvalResult, seconds: float, tasks: int, data: dict[str, Any]) -> EvalResult:
    """Return a result with its part of what a pass for several tasks took."""
    told = result.description | data
    tokens = {key: told[key] / tasks for key in ("tokens_forwarded",) if key in told}
    return replace(result, seconds=seconds, description=told | tokens)


def _unit(name: str, scorers: Iterable[str]) -> str:
    """Return what a task counts while it runs."""
    if name.endswith("_ppl"):
        return "windows"
    return {"loss": "problems", "generate_until": "answers"}.get(output_type(name, scorers), "options")


def task_names(scorers: Iterable[str] = ()) -> list[str]:
    """Return the names of all tasks that come with the library, and those of scorers on its data sets."""
    files = [path.stem for path in TASK_FILES.glob("*.yaml")]
    solved = [source for source in SOURCES if source not in TEXT_SOURCES]
    written = [f"{source}_answers" for source in solved]
    written += [f"{source}_{measure}" for source in SOURCES for measure in (*TRAITS, *scorers)]
    measured = [*(f"{s}_nll" for s in SOURCES), *(f"{s}_ppl" for s in TEXT_SOURCES)]
    return sorted([*files, *OWN_TASKS, *written, *measured])


def check_tasks(tasks: Sequence[str], scorers: Iterable[str] = ()) -> None:
    """Raise `OptionError` for tasks of which one does not exist, or is there with two limits, and for a scorer that has none."""
    named = dict[str, str]()
    for task in tasks:
        _runner(name := calibration.with_limit(task)[0], scorers)
        if (other := named.setdefault(name, task)) != task:
            raise OptionError(f"{other} and {task} would both be called {name}: take one of them")
    for scorer in scorers:
        if scorer not in {scorer_in(name, scorers) for name in named}:
            raise OptionError(f"--scorer {scorer} scores nothing: name a measure, as --on gsm8k_{scorer}")


def source_of(name: str, scorers: Iterable[str] = ()) -> str | None:
    """Return the data that a task (without its limit) reads; None for a task file with data of its own."""
    runner = _runner(name, scorers)
    if runner is _harness:
        source: str | None = task_file(name)["metadata"].get("source")
        return source
    if runner in WRITING[1:]:
        return name.removesuffix(f"_{scorer_in(name, (*scorers, *TRAITS))}")
    return name.rpartition("_")[0]


def digests(tasks: Sequence[str], scorers: Iterable[str] = ()) -> dict[str, str]:
    """Return what users' files that tasks measure hold now, by the name of the file."""
    sources = (source_of(calibration.with_limit(task)[0], scorers) for task in tasks)
    return {source: own for source in sources if source is not None and (own := calibration.digest(source))}


def output_type(name: str, scorers: Iterable[str] = ()) -> str:
    """Return what a task (without its limit) asks of the model: generate_until, multiple_choice, … or loss."""
    runner = _runner(name, scorers)
    if runner is _harness:
        return str(task_file(name)["output_type"])
    return "generate_until" if runner in WRITING else "loss"


def goes_on(name: str, scorers: Iterable[str] = ()) -> bool:
    """Tell whether a task (without its limit) looks at what the model writes of its own."""
    return _runner(name, scorers) is _behaving


def evaluation_contents(tasks: Sequence[str], settings: Settings, decoder: Decoder | None) -> dict[str, str]:
    """Return the content hashes of all examples that the tasks may show, and where from: what calibration must not see.

    For data sets that is the whole evaluation split; for a file of the user's, which may serve
    both ends, the examples that the task will draw from it (without a `decoder`: but for those that are too long).
    """
    found: dict[str, str] = {}
    for task in tasks:
        name, limit = calibration.with_limit(task)
        source = source_of(name, settings.scorers)
        if source is None or source == OWN_TEXT:  # text that is written has random numbers of its own
            continue
        own = replace(settings, limit=limit or settings.limit)
        some: Iterable[str]
        if not is_file(source):
            some, source = contents(source, "evaluation", data_dir=settings.data_dir), f"what {name} measures"
        elif _runner(name, settings.scorers) in WRITING:
            problems = load_problems(source, "evaluation", with_targets=False)
            some = [problem.content for problem in chosen(problems, own)]
        elif decoder is None:
            problems = calibration.shuffled(load_problems(source, "evaluation"), settings.seed)
            some = [problem.content for problem in problems[: own.limit]]
        else:
            drawn = calibration.draw(reader_for(decoder, settings), source, "evaluation")
            some = [example.content for example in itertools.islice(drawn, own.limit)]
        found |= dict.fromkeys(some, source)
    return found


def same_as_before(tasks: Sequence[str], settings: Settings, decoder: Decoder) -> bool:
    """Tell whether tasks give the numbers that they gave with version 1 of the method, on this model.

    That tokenised targets apart, wrote answers without a template after a blank line, and knew neither the model's
    positions nor rows with equal prompts.
    """
    reader = reader_for(decoder, settings)
    if (reader.chat and calibration.date_of(decoder.tokenizer)) or reader.limit < reader.max_tokens:
        return False
    for task in tasks:
        name = calibration.with_limit(task)[0]
        runner = _runner(name, settings.scorers)
        if output_type(name, settings.scorers) == "generate_until" and not reader.chat:
            return False
        if runner is _solution_loss and (source := name.removesuffix("_nll")) not in TEXT_SOURCES:
            problems = load_problems(source, "evaluation", data_dir=settings.data_dir)
            if len({p.content for p in problems}) < len({(p.content, p.target) for p in problems}):
                return False
            if not all(calibration.apart(reader, problem) for problem in problems):
                return False
    return True


def _behaving(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    return behaving(decoder, [name], settings, on_progress)


Runner = Callable[[Decoder, str, Settings, Progress], list[EvalResult]]
WRITING: tuple[Runner, ...] = (right_or_wrong, scored, _behaving)
"""What lets the model write."""


def _runner(name: str, scorers: Iterable[str] = ()) -> Runner:
    if is_task_file(name):
        return _harness
    source, _, measure = name.rpartition("_")
    scorer = scorer_in(name, scorers)
    scores = name.removesuffix(f"_{scorer}") if scorer else ""
    if is_file(scores):
        return scored
    if is_file(source):
        if measure not in OF_FILES:
            raise OptionError(
                f"unknown task {name!r}: a file is measured as FILE_nll, as FILE_answers, by how its continuations repeat themselves "
                "(FILE_loops, FILE_rep4, …), or by a function of yours as FILE_NAME with --scorer NAME=module:function"
            )
        return OF_FILES[measure]
    if name not in (known := task_names(scorers)):
        calibration.check_path(source or name)
        raise unknown("task", name, known)
    if name in OWN_TASKS:
        return _own
    if scores in SOURCES:
        return _behaving if scores in TEXT_SOURCES else scored
    return OF_SOURCES.get(measure, _harness)


def _solution_loss(
    decoder: Decoder, name: str, settings: Settings, on_progress: Progress
) -> list[EvalResult]:
    reader = reader_for(decoder, settings)
    examples = calibration.taken(reader, name.removesuffix("_nll"), "evaluation", settings.limit)
    description = described(decoder, settings, chat=reader.chat) | {
        "max_tokens": reader.limit,
        "skipped": reader.skipped.described(),
    }
    nats = _nats(decoder, examples, settings, on_progress)
    decode = decoder.tokenizer.decode
    prompts = tuple(decode(e.tokens[: e.target_start], skip_special_tokens=True) for e in examples)
    targets = [[t for t, own in zip(e.tokens, e.is_target, strict=True) if own] for e in examples]
    golds = tuple(decode(own, skip_special_tokens=True) for own in targets)
    found = _loss_result(name, "nats_per_token", nats, examples, description)
    return [replace(found, prompts=prompts, golds=golds)]


def _perplexity(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    """Perplexity by the usual convention: text tokenised once, windows that do not overlap."""
    source = name.removesuffix("_ppl")
    window = min(settings.window, positions(decoder.model.config) or settings.window)
    tokens = calibration.text_tokens(decoder.tokenizer, source, "evaluation", data_dir=settings.data_dir)
    calibration.enough(name, settings.limit, len(tokens), unit="tokens")
    tokens = tokens[: settings.limit]
    examples = calibration.windows(decoder.tokenizer, tokens, source, window)
    if not examples:
        raise DataError(
            f"{name}: {len(tokens)} tokens do not fill one window of {window}; "
            f"its limit counts tokens, as in {name}:40000"
        )
    description = described(decoder, settings) | {
        "window": window,
        "tokens": len(tokens),
        "tokens_in_windows": len(examples) * window,
    }
    nats = _nats(decoder, examples, settings, on_progress)
    return [_loss_result(name, "perplexity", nats, examples, description)]


def _own(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    return _both(decoder, [name], settings, on_progress)


def _both(
    decoder: Decoder, names: Sequence[str], settings: Settings, on_progress: Progress
) -> list[EvalResult]:
    """Perplexity of the text that the intact model writes, and divergence from the intact model on it: one result for each name."""
    hardest = "own_kl" if "own_kl" in names else names[0]  # what errors name: it needs more of the cache
    own = own_text(decoder, hardest, settings.limit or TOKENS, settings.seed, on_progress)
    size = {"window": own.text.piece, "tokens": own.text.tokens}
    description = described(decoder, settings) | size | {"written_by": own.text.model}
    if "own_kl" in names:
        found = own_measures(decoder, own, names, settings.batch_tokens, on_progress)
    else:
        found = {"own_ppl": _nats(decoder, own.documents, settings, on_progress)}
    metrics: dict[str, Metric] = {"own_ppl": "perplexity", "own_kl": "nats_per_token"}
    return [_loss_result(name, metrics[name], found[name], own.documents, description) for name in names]


OF_FILES: dict[str, Runner] = {
    "nll": _solution_loss,
    "answers": right_or_wrong,
    **dict.fromkeys(TRAITS, _behaving),
}
"""Measures of a user's file, by the last word of a task."""
OF_SOURCES: dict[str, Runner] = {**OF_FILES, "cot": right_or_wrong, "ppl": _perplexity}
"""Measures of data sets."""


def _nats(
    decoder: Decoder, examples: Sequence[Example], settings: Settings, on_progress: Progress
) -> list[float]:
    groups = calibration.batches(examples, max_batch_tokens=settings.batch_tokens)
    return by_example(groups, lambda batch: target_nats(decoder, batch).tolist(), on_progress)


def _loss_result(
    task: str, metric: Metric, nats: Sequence[float], examples: Sequence[Example], description: dict[str, Any]
) -> EvalResult:
    weights = tuple(float(e.target_tokens) for e in examples)
    shown = tuple(e.content for e in examples)
    description = description | {"tokens_forwarded": sum(len(e.tokens) for e in examples)}
    return EvalResult(task, metric, tuple(nats), weights, shown, description=description)


def _harness(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    """Run a task file in lm-evaluation-harness: zero-shot, greedy unless the file says otherwise."""
    from causalprune.evaluation.tasks import harness  # noqa: PLC0415 (takes seconds)

    config = task_file(name)
    chat = calibration.uses_chat(decoder.tokenizer, _chat(config, settings))
    if config["output_type"] == "generate_until":
        if settings.thinking == "on":
            raise OptionError(f"{name}: task files are answered without thinking: leave out --thinking on")
        config = _generation(config, settings)
    with harness.quiet():
        task = harness.build(config, _rows(config, settings))
        hashes = harness.contents(task)
    calibration.enough(name, settings.limit, len(hashes))
    order = sorted(range(len(hashes)), key=lambda i: calibration.shuffle_key(hashes[i], settings.seed))
    chosen = sorted(order[: settings.limit])
    with harness.quiet():
        samples, tokens = harness.run(
            decoder, task, chosen, chat=chat, batch_size=settings.batch_size, on_progress=on_progress
        )
    description = described(decoder, settings, chat=chat) | {
        "engine": f"lm_eval {harness.VERSION}",
        "task_version": config["metadata"].get("version"),
        **harness.chance(task, samples),
        "batch_size": settings.batch_size,
        "generation": config.get("generation_kwargs"),
        "tokens_forwarded": tokens,
    }
    shown = tuple(hashes[i] for i in chosen)
    prompts = tuple(str(task.doc_to_text(sample["doc"])) for sample in samples)
    golds = tuple(harness.gold(task, sample) for sample in samples)
    results = []
    for metric, ours in METRICS.items():
        if metric in samples[0]:
            values = tuple(float(sample[metric]) for sample in samples)
            weights = (1.0,) * len(values)
            texts = tuple(harness.answer(task, sample, metric) for sample in samples)
            own = values, weights, shown, texts, prompts, golds
            results.append(EvalResult(config["task"], ours, *own, description=description))
    if not results:
        raise OptionError(f"{name}: none of its metrics is one of {', '.join(METRICS)}")
    return results


def _chat(config: Mapping[str, Any], settings: Settings) -> calibration.Chat:
    """Return the template setting: the task file's, which leaves it to the caller if it says auto."""
    own: calibration.Chat = config["metadata"].get("chat", "auto")
    return settings.chat if own == "auto" else own


def _generation(config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the task file with our length of answers."""
    options = dict(config.get("generation_kwargs") or {})
    if settings.max_new_tokens is not None:
        options["max_gen_toks"] = settings.max_new_tokens
    return config | {"generation_kwargs": options}


def _rows(config: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]] | None:
    source = config["metadata"].get("source")
    if source is None:
        return None
    problems = load_problems(source, "evaluation", data_dir=settings.data_dir)
    columns = ("question", "options", "solution", "answer", "content")
    lists = ("labels", "choices")
    return [
        {name: getattr(p, name) for name in columns}
        | {name: list(getattr(p, name)) for name in lists}
        | {"gold": p.gold if p.labels else -1}
        for p in problems
    ]
