"""Greedy answers of a loaded model, many at a time: those that have ended leave the batch."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from causalprune.core import AtOnce, DataError, Decoder, Progress
from causalprune.evaluation.sampling import ends_of
from causalprune.models import go_on

AT_ONCE = 4
"""Answers that are generated at once, in multiples of the batch size: a step costs hardly more for many than for one."""
TOKENS_AT_ONCE = 65_536
"""Tokens of all answers that are generated at once, prompts included, at most: what long ones keep of each is large."""
UNPADDED = ("rwkv", "recurrent_gemma", "minimax")
"""Types of models that read padding on the left as text: one prompt at a time there."""
LEAVE = 7 / 8
"""Rows that have ended leave a batch when no more than this share of it is left."""


@dataclass(frozen=True, eq=False)
class Continued:
    """Sequences `[batch time]` with their greedy continuations, padded on both sides.

    `written` counts the new tokens of each, an end among them; `ended` says whether it came to one, or to a stop.
    `broken`: some prediction was not a number.
    """

    tokens: Tensor
    written: list[int]
    ended: list[bool]
    broken: bool


@dataclass(frozen=True)
class Answer:
    """The new tokens of an answer, without the one that ends it; `written` counts that too."""

    tokens: tuple[int, ...]
    written: int
    ended: bool
    broken: bool


def answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: Sequence[str],
    batch_size: int,
    on_progress: Progress,
) -> list[Answer]:
    """Return greedy answers of up to `limit` tokens to prompts, which should come by length, the longest first."""
    ends = ends_of(decoder.model, decoder.tokenizer)
    most = 0

    def some(rows: list[int]) -> list[Answer]:
        longest = max(len(prompts[i]) for i in rows)
        context = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(context)
        for row, i in enumerate(rows):
            context[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1

        def ended(count: int) -> None:
            nonlocal most
            most = max(most, rows[0] + count)  # fewer where a batch was begun again
            on_progress(most, len(prompts))

        place = decoder.device
        found = greedy(decoder, context.to(place), mask.to(place), longest + limit, stop, ended)
        on_progress(max(most, rows[-1] + 1), len(prompts))
        return list(_answers(found, longest, ends))

    width = len(prompts[0]) + limit
    at_once = AtOnce(1 if alone(decoder.model) else min(AT_ONCE * batch_size * width, TOKENS_AT_ONCE))
    with plain_generation(decoder.model), torch.inference_mode():
        return [answer for part in at_once(len(prompts), width, some) for answer in part]


def _answers(found: Continued, longest: int, ends: set[int]) -> Iterator[Answer]:
    for row, written, ended in zip(found.tokens.tolist(), found.written, found.ended, strict=True):
        own = row[longest : longest + written]
        yield Answer(tuple(own[: written - (own[-1] in ends)]), written, ended, found.broken)


def greedy(
    speaker: Any,
    context: Tensor,
    mask: Tensor,
    max_length: int,
    stop: Sequence[str],
    on_ended: Callable[[int], None] = lambda _: None,
) -> Continued:
    """Return the context, padded on the left, with greedy continuations up to an end or a stop, padded on the right.

    `speaker` has the `model` and its `tokenizer`. `on_ended` hears at every step how many rows have ended. Rows leave the
    batch and its cache once an eighth of them have ended, where the cache lets them.
    """
    model, words = speaker.model, speaker.tokenizer
    ends = torch.tensor(sorted(ends_of(model, words)), dtype=torch.long, device=context.device)
    padding = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id or 0
    found = torch.full((len(context), max_length), padding, device=context.device)
    found[:, : context.shape[1]] = context
    rows, running = torch.arange(len(context)), torch.ones(len(context), dtype=torch.bool)
    written, broken = torch.zeros(len(context), dtype=torch.long), False
    known = inspect.signature(model.forward).parameters
    step, places, cache = context, mask.cumsum(-1).sub(1).clamp_min(0), None
    tail = max([len(words(text)["input_ids"]) for text in stop], default=0) + 2
    for at in range(context.shape[1], max_length):
        extra = {"position_ids": places, "logits_to_keep": 1}
        extra = {name: value for name, value in extra.items() if name in known}
        output, cache = go_on(model, step, cache, mask, **extra)
        if cache is None and at + 1 < max_length:
            raise DataError(
                f"{type(model).__name__} keeps no cache of what it reads: it cannot write an answer here"
            )
        last = output.logits[:, -1]
        broken |= bool(last.amax(-1).isnan().any())
        token = last.argmax(-1)
        found[rows[running], at] = token[running.to(token.device)]
        written[rows[running]] += 1
        if stop:
            shown = words.batch_decode(found[rows, max(at + 1 - tail, context.shape[1]) : at + 1])
            running &= ~torch.tensor([any(_holds(own, text) for text in stop) for own in shown])
        running &= ~torch.isin(token, ends).cpu()
        on_ended(len(context) - int(running.sum()))
        if not bool(running.any()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        places, step = places[:, -1:] + 1, token[:, None]
        can_leave = all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))
        if can_leave and int(running.sum()) <= LEAVE * len(running):
            keep = running.nonzero()[:, 0]  # on the CPU: layers of the cache may lie on several devices
            cache.batch_select_indices(keep)
            mask, places, step = mask[keep], places[keep], step[keep]
            rows, running = rows[keep], running[keep]
    over = torch.ones(len(context), dtype=torch.bool)
    over[rows[running]] = False
    return Continued(found[:, : at + 1], written.tolist(), over.tolist(), broken)


def _holds(answer: str, stop: str) -> bool:
    """Tell whether a stop is in an answer; one of white space may open it, as the prompt ends without any."""
    return stop in (answer.lstrip() if stop.isspace() else answer)


def alone(model: Any) -> bool:
    """Tell whether a model is wrong about prompts that are padded on the left, or goes on from them wrongly."""
    return model.config.model_type in UNPADDED


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Generate without the defaults of a model's own file, such as a repetition penalty.

    The output head gets the last positions of a prompt as a copy: given them as a slice, torch copies the head's weights
    for every sequence of the batch (17 GB for 64 sequences and a vocabulary of 152,000).
    """
    own = model.generation_config
    tokens = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()
        model.generation_config = own
