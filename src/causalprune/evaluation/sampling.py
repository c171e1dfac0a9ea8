"""A model writes text of its own: many pieces at once, one token after the other.

A piece is a row of tokens in which documents follow each other. A document begins with `bos`, or with an opener where `bos`
begins a chat or there is none; it ends with a token that ends answers, or with its piece, and sees nothing of the document
before. Tokens are drawn at temperature 1 from the nucleus of `TOP_P`, special ones never, but for those that end.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.calibration import rendered, tokenize
from causalprune.core import DataError, Decoder
from causalprune.models import go_on

Piece: TypeAlias = tuple[list[int], list[int]]
"""Tokens, and the places of those that were given and not chosen: where documents begin."""
TOP_P = 0.95
STATES = ("conv_states", "recurrent_states", "ssm_states", "linear_cache")
"""What caches, or their layers, call states that are not by position."""
OPENERS = (
    *("The", "In", "It", "A", "This", "When", "If", "There", "He", "She", "They", "We", "I", "You"),
    *("For", "On", "At", "As", "After", "Most", "Many", "One", "By", "How", "To", "What", "But", "My"),
)
"""Words that English sentences often begin with."""


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer, by the tokenizer and by the model's generation file; there may be none."""
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def starts_of(decoder: Decoder) -> list[list[int]]:
    """Return the token sequences that a document may begin with: `bos`, or openers where that would begin a chat."""
    words, bos = decoder.tokenizer, decoder.tokenizer.bos_token_id
    if bos is not None and not _begins_chat(decoder, bos):
        return [[bos]]
    return [tokenize(words, opener, special=True) for opener in OPENERS]


def _begins_chat(decoder: Decoder, bos: int) -> bool:
    """Tell whether the chat template writes `bos` more than once, or the model goes on after it as the template does."""
    words = decoder.tokenizer
    if not words.chat_template:
        return False
    shown = rendered(words, [{"role": "user", "content": OPENERS[0]}], add_generation_prompt=True)
    tokens = words(shown, add_special_tokens=False)["input_ids"]
    if tokens.count(bos) > 1:
        return True
    marks = _special(words) | {after for token, after in itertools.pairwise(tokens) if token == bos}
    with torch.inference_mode():
        logits = decoder.model(input_ids=torch.tensor([[bos]], device=decoder.device), use_cache=False).logits
    return int(logits[0, -1].argmax()) in marks


def _special(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


@torch.inference_mode()
def write(
    decoder: Decoder, uniforms: Float[Tensor, "piece time"], on_step: Callable[[int], None] = lambda _: None
) -> list[Piece]:
    """Return pieces in which every token falls to its uniform number.

    `on_step` hears how many tokens of each piece are there.

    Raises:
        DataError: the model keeps no cache of what it has read, or one that cannot forget, or predicts what is not a number.
    """
    words, (n, size) = decoder.tokenizer, uniforms.shape
    starts, ends = starts_of(decoder), ends_of(decoder.model, words)
    barred, last = (torch.tensor(sorted(own), dtype=torch.long) for own in (_special(words) - ends, ends))
    known = max(words.get_vocab().values()) + 1
    tokens, begun = torch.zeros(n, size, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    given, step = torch.zeros(n, size, dtype=torch.bool), _Step(decoder)
    logits = torch.empty(0)
    for at in range(size):
        ended = torch.isin(tokens[:, at - 1], last) & ~given[:, at - 1] if at else torch.ones(n).bool()
        for row in ended.nonzero()[:, 0].tolist():
            start = starts[int(uniforms[row, at] * len(starts))][: size - at]
            tokens[row, at : at + len(start)], given[row, at : at + len(start)] = torch.tensor(start), True
            begun[row] = at
        if not bool(given[:, at].all()):
            logits[:, barred[barred < logits.shape[1]]], logits[:, known:] = -torch.inf, -torch.inf
            tokens[:, at] = tokens[:, at].where(given[:, at], nucleus(logits, uniforms[:, at]))
        if at + 1 < size:
            logits = step(tokens[:, at], begun)
        on_step(at + 1)
    return [(row.tolist(), own.nonzero()[:, 0].tolist()) for row, own in zip(tokens, given, strict=True)]


class _Step:
    """Reads one more token of every piece, and returns what the model predicts after it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._cache, self._read = decoder, None, 0
        self._places = "position_ids" in inspect.signature(decoder.model.forward).parameters

    def __call__(
        self, tokens: Int[Tensor, "piece"], begun: Int[Tensor, "piece"]
    ) -> Float[Tensor, "piece vocab"]:
        """Read the tokens, of documents that have `begun` at these places, before which nothing is seen."""
        device, at = self._decoder.device, self._read
        if bool((anew := begun == at).any()) and at:
            self._forget(anew)
        seen = (torch.arange(at + 1) >= begun[:, None]).long()
        places = {"position_ids": (at - begun)[:, None].to(device)} if self._places else {}
        model, step = self._decoder.model, tokens[:, None].to(device)
        output, self._cache = go_on(model, step, self._cache, seen.to(device), **places)
        self._read = at + 1
        logits: Tensor = output.logits[:, -1].float()
        if self._cache is None:
            raise DataError(f"{self._decoder.name} keeps no cache of what it reads: it cannot write a text")
        if bool(logits.isnan().any()):
            raise DataError(f"{self._decoder.name} predicts what is not a number: it cannot write a text")
        return logits

    def _forget(self, rows: Bool[Tensor, "piece"]) -> None:
        """Let what no mask hides of these pieces, states of convolutions and recurrences, be what it is before any token."""
        for own in (self._cache, *getattr(self._cache, "layers", ())):
            if hasattr(own, "compressed_kv"):
                raise DataError(
                    f"{self._decoder.name} compresses what it has read, and a second document of a piece would see the first: "
                    "take other text (--preserve c4, or none; of a recipe general_text: none)"
                )
            for states in (getattr(own, name, ()) for name in STATES):
                for state in states.values() if isinstance(states, dict) else states:
                    if isinstance(state, Tensor):
                        state[rows.to(state.device)] = 0


def nucleus(
    logits: Float[Tensor, "piece vocab"], uniforms: Float[Tensor, "piece"], most: int = 4096
) -> Int[Tensor, "piece"]:
    """Return the tokens that numbers between 0 and 1 fall to, among the likeliest that make up `TOP_P` together.

    Looks among the `most` likely ones, and among all where those are too few: to sort them all takes longer than the model.
    """
    p, order = logits.softmax(-1).topk(min(most, logits.shape[1]))
    sums = p.cumsum(-1)
    if p.shape[1] < logits.shape[1] and bool((sums[:, -1] < TOP_P).any()):
        return nucleus(logits, uniforms, logits.shape[1])
    kept = (sums - p < TOP_P).sum(-1, keepdim=True)
    at = uniforms.to(p)[:, None] * sums.gather(-1, kept - 1)
    rank = (sums < at).sum(-1, keepdim=True).minimum(kept - 1)
    return order.gather(-1, rank)[:, 0].cpu()
