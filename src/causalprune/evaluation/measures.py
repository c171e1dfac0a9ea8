"""Measuring a model: benchmarks through lm-evaluation-harness, solution losses, perplexity.

Task names: a task file of `causalprune/tasks` (or the path of one), `<source>_nll` for the loss of
gold solutions and `<text>_ppl` for perplexity. `name:limit` bounds one task: problems, or tokens for
perplexity. Every result keeps per-example values, so that models are compared in pairs.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from causalprune import calibration
from causalprune.calibration import SOURCES, TASK_FILES, TEXT_SOURCES, contents, is_file, load_problems
from causalprune.core import (
    AtOnce,
    Batch,
    DataError,
    Decoder,
    EvalResult,
    Example,
    OptionError,
    Progress,
    bar,
    unknown,
)
from causalprune.evaluation.tasks.answers import KINDS
from causalprune.interventions import selected, target_nats

Metric = Literal["accuracy", "acc_norm", "nats_per_token", "perplexity"]

METRICS: dict[str, Metric] = {"acc": "accuracy", "exact_match": "accuracy", "acc_norm": "acc_norm"}
"""The harness's metrics that are 0 or 1 per example, and what we call them."""


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    `limit` is the number of problems (tokens for perplexity) of tasks that name none; which ones is
    fixed by `seed`. `max_tokens` bounds a sequence of a solution loss, `window` is the length of a
    perplexity window, or the model's positions where it has fewer. A batch holds up to `batch_tokens` tokens, in the harness `batch_size`
    sequences. `max_new_tokens` overrides the task files' length of generated answers.
    """

    limit: int | None = None
    data_dir: Path | None = None
    seed: int = 0
    max_tokens: int = 512
    window: int = 2048
    chat: calibration.Chat = "auto"
    batch_tokens: int = 4096
    batch_size: int = 16
    max_new_tokens: int | None = None


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
    jobs = [(*calibration.with_limit(name), name) for name in tasks]
    runners = [_runner(name) for name, _, _ in jobs]
    results: list[EvalResult] = []
    for (name, limit, _), run in zip(jobs, runners, strict=True):
        own = settings if limit is None else replace(settings, limit=limit)
        start = time.perf_counter()
        with bar(on_progress, name) as tell:
            found = run(decoder, name, own, tell)
        seconds = time.perf_counter() - start
        results += [replace(result, seconds=seconds) for result in found]
    return results


def task_names() -> list[str]:
    """Return the names of all tasks that come with the library."""
    files = [path.stem for path in TASK_FILES.glob("*.yaml")]
    return sorted([*files, *(f"{s}_nll" for s in SOURCES), *(f"{s}_ppl" for s in TEXT_SOURCES)])


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise `OptionError` for a task that does not exist or a limit that cannot be."""
    for name in tasks:
        _runner(calibration.with_limit(name)[0])


def source_of(name: str) -> str | None:
    """Return the data that a task (without its limit) reads; None for a task file with data of its own."""
    if _runner(name) is _harness:
        source: str | None = _task_file(name)["metadata"].get("source")
        return source
    return name.rpartition("_")[0]


def output_type(name: str) -> str:
    """Return what a task (without its limit) asks of the model: generate_until, multiple_choice, … or loss."""
    return str(_task_file(name)["output_type"]) if _runner(name) is _harness else "loss"


def evaluation_contents(tasks: Sequence[str], settings: Settings, tokenizer: Any) -> frozenset[str]:
    """Return the content hashes of all examples that the tasks may show: what calibration must not see.

    For data sets that is the whole evaluation split; for a file of the user's, which may serve
    both ends, the examples that the task will draw from it.
    """
    found: set[str] = set()
    for task in tasks:
        name, limit = calibration.with_limit(task)
        source = source_of(name)
        if source is None:
            continue
        if not is_file(source):
            found |= contents(source, "evaluation", data_dir=settings.data_dir)
            continue
        chat = calibration.uses_chat(tokenizer, settings.chat)
        reader = calibration.Reader(tokenizer, chat, settings.max_tokens, settings.seed, settings.data_dir)
        drawn = calibration.draw(reader, source, "evaluation")
        found |= {example.content for example in itertools.islice(drawn, limit or settings.limit)}
    return frozenset(found)


Runner = Callable[[Decoder, str, Settings, Progress], list[EvalResult]]


def _runner(name: str) -> Runner:
    if name.endswith((".yaml", ".yml")):
        return _harness
    if name.endswith("_nll") and is_file(name.removesuffix("_nll")):
        return _solution_loss
    if name not in task_names():
        raise unknown("task", name, task_names())
    if name.endswith("_nll"):
        return _solution_loss
    return _perplexity if name.endswith("_ppl") else _harness


def _solution_loss(
    decoder: Decoder, name: str, settings: Settings, on_progress: Progress
) -> list[EvalResult]:
    chat = calibration.uses_chat(decoder.tokenizer, settings.chat)
    reader = calibration.Reader(
        decoder.tokenizer, chat, settings.max_tokens, settings.seed, settings.data_dir
    )
    drawn = calibration.draw(reader, name.removesuffix("_nll"), "evaluation")
    examples = list(itertools.islice(drawn, settings.limit))
    if not examples:
        raise DataError(
            f"{name}: no example is usable ({reader.skipped}); raise max_tokens = {settings.max_tokens}"
        )
    description = _description(decoder, settings) | {
        "max_tokens": settings.max_tokens,
        "chat_template": chat,
        "skipped": dict(vars(reader.skipped)),
    }
    nats = _nats(decoder, examples, settings, on_progress)
    decode = decoder.tokenizer.decode
    prompts = tuple(decode(e.tokens[: e.target_start], skip_special_tokens=True) for e in examples)
    golds = tuple(decode(e.tokens[e.target_start :], skip_special_tokens=True) for e in examples)
    found = _loss_result(name, "nats_per_token", nats, examples, description)
    return [replace(found, prompts=prompts, golds=golds)]


def _perplexity(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    """Perplexity by the usual convention: text tokenised once, windows that do not overlap."""
    source = name.removesuffix("_ppl")
    longest = getattr(decoder.model.config, "max_position_embeddings", None)
    window = min(settings.window, longest or settings.window)
    tokens = calibration.text_tokens(decoder.tokenizer, source, "evaluation", data_dir=settings.data_dir)
    tokens = tokens[: settings.limit]
    examples = calibration.windows(decoder.tokenizer, tokens, source, window)
    if not examples:
        raise DataError(
            f"{name}: {len(tokens)} tokens do not fill one window of {window}; "
            f"its limit counts tokens, as in {name}:40000"
        )
    description = _description(decoder, settings) | {
        "window": window,
        "tokens": len(tokens),
        "tokens_in_windows": len(examples) * window,
        "chat_template": False,
    }
    nats = _nats(decoder, examples, settings, on_progress)
    return [_loss_result(name, "perplexity", nats, examples, description)]


def _nats(
    decoder: Decoder, examples: Sequence[Example], settings: Settings, on_progress: Progress
) -> list[float]:
    nats = [0.0] * len(examples)
    done, at_once = 0, AtOnce()
    on_progress(done, len(examples))
    for batch in calibration.batches(examples, max_batch_tokens=settings.batch_tokens):

        def some(rows: list[int], own: Batch = batch) -> list[float]:
            return target_nats(decoder, selected(own, rows)).tolist()

        found = at_once(len(batch.indices), batch.tokens.shape[1], some)
        for i, value in zip(batch.indices, itertools.chain(*found), strict=True):
            nats[i] = value
        done += len(batch.indices)
        on_progress(done, len(examples))
    return nats


def _loss_result(
    task: str, metric: Metric, nats: Sequence[float], examples: Sequence[Example], description: dict[str, Any]
) -> EvalResult:
    weights = tuple(float(e.target_tokens) for e in examples)
    shown = tuple(e.content for e in examples)
    description = description | {"tokens_forwarded": sum(len(e.tokens) for e in examples)}
    return EvalResult(task, metric, tuple(nats), weights, shown, description=description)


def _description(decoder: Decoder, settings: Settings) -> dict[str, Any]:
    model = {"model": decoder.name, "revision": decoder.revision, "fingerprint": decoder.fingerprint}
    return model | {"split": "evaluation", "limit": settings.limit, "seed": settings.seed}


def _harness(decoder: Decoder, name: str, settings: Settings, on_progress: Progress) -> list[EvalResult]:
    """Run a task file in lm-evaluation-harness: zero-shot, greedy unless the file says otherwise."""
    from causalprune.evaluation.tasks import harness  # noqa: PLC0415 (takes seconds)

    config = _task_file(name)
    chat = calibration.uses_chat(decoder.tokenizer, _chat(config, settings))
    if config["output_type"] == "generate_until":
        config = _generation(config, settings, chat)
    with harness.quiet():
        task = harness.build(config, _rows(config, settings))
        hashes = harness.contents(task)
        order = sorted(range(len(hashes)), key=lambda i: calibration.shuffle_key(hashes[i], settings.seed))
        chosen = sorted(order[: settings.limit])
        samples, tokens = harness.run(
            decoder, task, chosen, chat=chat, batch_size=settings.batch_size, on_progress=on_progress
        )
    description = _description(decoder, settings) | {
        "engine": f"lm_eval {harness.VERSION}",
        "task_version": config["metadata"].get("version"),
        "chat_template": chat,
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
            results.append(
                EvalResult(
                    config["task"],
                    ours,
                    values,
                    weights,
                    shown,
                    texts,
                    prompts,
                    golds,
                    description=description,
                )
            )
    if not results:
        raise OptionError(f"{name}: none of its metrics is one of {', '.join(METRICS)}")
    return results


def _task_file(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASK_FILES / f"{name}.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as cause:
        raise OptionError(f"cannot read the task file {path}: {cause}") from cause
    if not isinstance(config, dict) or not {"task", "output_type", "doc_to_text"} <= config.keys():
        raise OptionError(f"{path}: a task file needs at least task, output_type and doc_to_text")
    config["metadata"] = config.get("metadata") or {}
    answer = config["metadata"].get("answer")
    if answer is not None and answer not in KINDS:
        raise unknown(f"answer in {path}", str(answer), KINDS)
    if not ({"dataset_path", "custom_dataset"} & config.keys() or config["metadata"].get("source")):
        raise OptionError(f"{path}: a task file names its data: dataset_path, or source in its metadata")
    return config


def _chat(config: Mapping[str, Any], settings: Settings) -> calibration.Chat:
    """Return the template setting: the task file's, which leaves it to the caller if it says auto."""
    own: calibration.Chat = config["metadata"].get("chat", "auto")
    return settings.chat if own == "auto" else own


def _generation(config: dict[str, Any], settings: Settings, chat: bool) -> dict[str, Any]:
    """Return the task file with our length of answers, and the blank line that follows a plain prompt."""
    options = dict(config.get("generation_kwargs") or {})
    if settings.max_new_tokens is not None:
        options["max_gen_toks"] = settings.max_new_tokens
    text = config["doc_to_text"] if chat else config["doc_to_text"] + "\n\n"
    return config | {"generation_kwargs": options, "doc_to_text": text}


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
