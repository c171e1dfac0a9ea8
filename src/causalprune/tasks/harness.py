"""lm-evaluation-harness as an engine: one task, chosen examples, a loaded model. Imported lazily."""

import copy
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.evaluator
import torch
import tqdm
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from causalprune.data import content_hash
from causalprune.errors import DataError
from causalprune.tasks.answers import AnswerKind, is_correct
from causalprune.types import Decoder, Progress

VERSION = importlib.metadata.version("lm_eval")


def build(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None) -> Any:
    """Return the harness's task; `rows` take the place of a data set that it would load itself.

    A file with `answer` in its metadata is scored by our own reading of the final answer.
    """
    config = {"num_fewshot": 0, **config}
    if rows is not None:
        table = datasets.Dataset.from_list([dict(row) for row in rows])
        config |= {"custom_dataset": lambda **_: {"test": table}, "test_split": "test"}
    if kind := config["metadata"].get("answer"):
        metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        config |= {"process_results": _scorer(kind), "metric_list": [metric]}
    return ConfigurableTask(config=config)


def contents(task: Any) -> list[str]:
    """Return the content hash of every example of a task, in the order of its data set."""
    return [
        row["content"] if "content" in row else content_hash(str(task.doc_to_text(row)))
        for row in task.eval_docs
    ]


def run(
    decoder: Decoder,
    task: Any,
    chosen: Sequence[int],
    *,
    chat: bool,
    batch_size: int,
    on_progress: Progress,
) -> tuple[list[dict[str, Any]], int]:
    """Return the harness's records of the chosen examples (ascending positions), zero-shot, and the tokens read and written.

    Raises DataError where an example does not fit the model's positions; nothing is cut.
    """
    with plain_generation(decoder.model), torch.random.fork_rng():
        torch.manual_seed(0)
        # The chat template writes its own special tokens; plain text gets the tokenizer's.
        engine = _Engine(
            pretrained=decoder.model,
            tokenizer=copy.deepcopy(decoder.tokenizer),  # the harness sets a padding token
            batch_size=batch_size,
            add_bos_token=False if chat else None,
        )
        engine.set_cache_hook(_Progress(engine, on_progress))
        record = lm_eval.evaluator.evaluate(
            lm=engine,
            task_dict={"tasks": {task.task_name: task}},
            samples={task.task_name: list(chosen)},
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    samples: list[dict[str, Any]] = record["samples"][task.task_name]
    return samples, engine.tokens


def gold(task: Any, sample: Mapping[str, Any]) -> str:
    """Return the right answer of an example, as text."""
    target = sample["target"]
    if isinstance(target, int) and task.OUTPUT_TYPE == "multiple_choice":
        return str(task.doc_to_choice(sample["doc"])[target])
    return str(target)


def answer(task: Any, sample: Mapping[str, Any], metric: str) -> str:
    """Return what the model generated, or the option that it chose by this metric; empty for other kinds of tasks."""
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    scores = [float(found[0]) for found in sample["filtered_resps"]][: len(choices)]
    if metric == "acc_norm":
        scores = [score / max(len(choice), 1) for score, choice in zip(scores, choices, strict=True)]
    return choices[scores.index(max(scores))]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and progress bars of the harness and its libraries to themselves."""
    names = ("lm_eval", "datasets", "transformers", "accelerate", "httpx", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    start = tqdm.std.tqdm.__init__

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **options | {"disable": True})

    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tqdm.std.tqdm.__init__ = disabled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.std.tqdm.__init__ = start
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Generate without the defaults of a model's own file, such as a repetition penalty."""
    own = model.generation_config
    tokens = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        model.generation_config = own


def _scorer(kind: AnswerKind) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]:
    def score(row: Mapping[str, Any], generated: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(is_correct(generated[0], kind, row["answer"], row.get("labels", ())))}

    return score


class _Engine(HFLM):  # type: ignore[misc]  # the harness has no type stubs
    """The harness's Hugging Face model, which here refuses what the original cuts with a log line."""

    total = 0
    tokens = 0

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.total = len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        tokens, keep = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        self._check(tokens.shape[1], left_truncate_len)
        self.tokens += tokens.numel()
        return tokens, keep

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        self.total = len(requests)
        lengths = [len(context) + len(choice) for _, context, choice in requests]
        self._check(max(lengths), self.max_length)
        self.tokens += sum(lengths)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    @staticmethod
    def _check(longest: int, room: int | None) -> None:
        if room is not None and longest > room:
            raise DataError(
                f"a prompt of {longest} tokens does not fit into the model's {room} free positions"
            )


class _Progress:
    """Takes the place of the harness's response cache, which hears of every finished request."""

    def __init__(self, engine: _Engine, report: Progress) -> None:
        self.engine, self.report, self.done = engine, report, 0

    def add_partial(self, kind: str, request: Any, response: Any) -> None:
        self.done += 1
        if kind == "generate_until":
            self.engine.tokens += len(self.engine.tok_encode(str(response)))
        self.report(self.done, self.engine.total)
