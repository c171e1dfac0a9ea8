"""lm-evaluation-harness as an engine: one task, chosen examples, a loaded model. Imported lazily."""

import copy
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import datasets
import lm_eval.evaluator
import torch
import tqdm
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import pad

from causalprune.calibration import content_hash, folded, rendered, seeded
from causalprune.core import AtOnce, DataError, Decoder, Progress, out_of_memory
from causalprune.evaluation.tasks.answers import is_correct
from causalprune.evaluation.tasks.generation import AT_ONCE, alone, greedy, plain_generation

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
    decoder: Decoder, task: Any, chosen: Sequence[int], *, chat: bool, batch_size: int, on_progress: Progress
) -> tuple[list[dict[str, Any]], int]:
    """Return the harness's records of the chosen examples (ascending positions), zero-shot, and the tokens read and written.

    Models that could think first do not. Where predictions are not numbers, no metric is.

    Raises DataError where an example does not fit the model's positions; nothing is cut.
    """
    written = task.OUTPUT_TYPE == "generate_until"
    with plain_generation(decoder.model), torch.random.fork_rng(), seeded():
        torch.manual_seed(0)
        # The chat template writes its own special tokens; plain text gets the tokenizer's.
        engine = _Engine(
            pretrained=decoder.model,
            tokenizer=copy.deepcopy(decoder.tokenizer),  # the harness sets a padding token
            batch_size=1 if written and alone(decoder.model) else batch_size * (AT_ONCE if written else 1),
            add_bos_token=False if chat else None,
            enable_thinking=False,
        )
        engine.chat = chat
        engine._device = decoder.device  # noqa: SLF001 (the harness takes that of the first parameter, which may be on disk)
        engine.set_cache_hook(_Progress(engine, on_progress))
        record = lm_eval.evaluator.evaluate(
            lm=engine,
            task_dict={"tasks": {task.task_name: task}},
            samples={task.task_name: list(chosen)},
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    samples: list[dict[str, Any]] = record["samples"][task.task_name]
    if engine.broken:  # an accuracy would say that the first option was chosen
        for sample in samples:
            sample.update(dict.fromkeys(sample["metrics"], math.nan))
    return samples, engine.tokens


def gold(task: Any, sample: Mapping[str, Any]) -> str:
    """Return the right answer of an example, as text."""
    target = sample["target"]
    if isinstance(target, int) and task.OUTPUT_TYPE == "multiple_choice":
        return str(task.doc_to_choice(sample["doc"])[target])
    return str(target)


def chance(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracy of who chooses among the options blindly; nothing for other kinds of tasks."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    return {"chance": fmean(1 / len(task.doc_to_choice(sample["doc"])) for sample in samples)}


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
            warnings.filterwarnings("always", "out of memory with ")  # ours
            yield
    finally:
        tqdm.std.tqdm.__init__ = start
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _scorer(kind: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]]:
    def score(row: Mapping[str, Any], generated: Sequence[str]) -> dict[str, float]:
        found = is_correct(generated[0], kind, row["answer"], row.get("labels", ()), marked=True)
        return {"exact_match": float(found)}

    return score


class _Engine(HFLM):  # type: ignore[misc]  # the harness has no type stubs
    """The harness's Hugging Face model, which here refuses what the original cuts with a log line."""

    batch_size_per_gpu: int
    total = 0
    tokens = 0
    chat = False
    broken = False
    """Whether some prediction was not a number."""

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self.total, self.at_once = len(requests), AtOnce()
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Generate greedily; answers that have ended leave the batch, so that the longest does not hold up the rest."""
        if options.get("do_sample"):
            options["attention_mask"] = attention_mask
            return super()._model_generate(context, max_length, stop, **options)  # type: ignore[no-any-return]

        def answers(rows: list[int]) -> Tensor:
            def ended(count: int) -> None:
                self.cache_hook.ended(rows[0] + count)

            found = greedy(self, context[rows], attention_mask[rows], max_length, stop, ended)
            self.broken |= found.broken
            return found.tokens

        with torch.inference_mode():
            found = self.at_once(len(context), max_length, answers)
        longest, padding = max(part.shape[1] for part in found), self.tokenizer.pad_token_id
        return torch.cat([pad(part, (0, longest - part.shape[1]), value=padding) for part in found])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as the template writes it; with a system turn before the user's where it refuses one."""
        how = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        how |= self.chat_template_args
        try:
            return rendered(self.tokenizer, chat_history, **how)
        except DataError:
            return rendered(self.tokenizer, folded(chat_history), **how)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        # The token that pads may be one that the model has not; without a template the answer holds the white space before it.
        strings = strings if self.chat else [text.rstrip() for text in strings]
        tokens, keep = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        tokens = tokens * keep
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
        found = None
        while found is None:
            try:
                found = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            except RuntimeError as error:
                own = min(self.batch_size_per_gpu, len(requests))
                if not out_of_memory(error) or own == 1:
                    raise
                message = f"out of memory with {own} sequences at once: starting again with {own // 2}"
                warnings.warn(message, stacklevel=2)
                self.batch_size_per_gpu, self.cache_hook.done = own // 2, 0
        self.broken |= any(math.isnan(value) for value, _ in found)
        return found

    @staticmethod
    def _check(longest: int, room: int | None) -> None:
        if room is not None and longest > room:
            raise DataError(
                f"a prompt of {longest} tokens does not fit into the model's {room} free positions"
            )


class _Progress:
    """Takes the place of the harness's response cache, which hears of every finished request."""

    def __init__(self, engine: _Engine, report: Progress) -> None:
        self.engine, self.report, self.done, self.most = engine, report, 0, 0

    def ended(self, count: int) -> None:
        """Report a batch that is at work, of which `count` answers have ended."""
        self.most = max(self.most, self.done + count)  # each is heard of once more when its batch is read
        self.report(self.most, self.engine.total)

    def add_partial(self, kind: str, request: Any, response: Any) -> None:
        self.done += 1
        if kind == "generate_until":
            self.engine.tokens += len(self.engine.tok_encode(str(response)))
        self.ended(0)
