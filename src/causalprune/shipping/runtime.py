"""A GGUF file in llama.cpp's own runtime, `xllamacpp`: its tokens, its logits, its text and its speed."""

import http.client
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from causalprune.core import ModelError
from causalprune.shipping.converting import needed

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "x = [3.14, 42]\n\n\tprint(x)",
    "naïve café, 你好 👋🏽",
    ":\n\n1. Add\nx =  42",
)
"""Texts whose tokens tell two tokenizers apart: numbers, blanks, other scripts."""


@dataclass(frozen=True)
class Running:
    """A model that answers at an address of this machine, until its `running` ends."""

    address: str
    server: Any

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Return how the file's own tokenizer cuts a text."""
        asked = {"content": text, "add_special": special, "parse_special": True}
        return [int(token) for token in self._ask("/tokenize", asked)["tokens"]]

    def write(self, prompt: str | Sequence[int], tokens: int) -> str:
        """Return what the model writes on, the likeliest token each time, until its text ends."""
        answer = self._ask("/completion", {**_greedy(prompt), "n_predict": tokens})
        return str(answer["content"])

    def rate(self, prompt: str | Sequence[int], tokens: int) -> float:
        """Return how many tokens a second the model writes, past whatever ends its text: all models write as many."""
        asked = {**_greedy(prompt), "n_predict": tokens, "ignore_eos": True}
        timings = self._ask("/completion", asked)["timings"]
        if timings["predicted_n"] != tokens:
            raise ModelError(
                f"llama.cpp wrote {timings['predicted_n']} tokens, and {tokens} were to be timed"
            )
        return float(timings["predicted_per_second"])

    def log_probabilities(self, prompt: Sequence[int], vocabulary: int) -> Float[ndarray, "vocab"]:
        """Return the logarithm of the probability of every next token.

        The next token is chosen to be a letter, whatever is likeliest: half a character would not be answered.
        """
        letter = [[self.tokens("a")[0], 1e6]]
        asked = {**_greedy(prompt), "n_predict": 1, "n_probs": vocabulary, "logit_bias": letter}
        answer = self._ask("/completion", asked)
        found = np.full(vocabulary, -np.inf)
        for one in answer["completion_probabilities"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310  an address of this machine
            f"{self.address}{path}", data, {"Content-Type": "application/json"}
        )
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        )  # whatever proxy the machine names
        try:
            with direct.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ModelError(f"llama.cpp refuses {path}: {error.read().decode(errors='replace')}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ModelError(f"llama.cpp does not answer any more at {path}: {error}") from error


def _greedy(prompt: str | Sequence[int]) -> dict[str, Any]:
    own = prompt if isinstance(prompt, str) else [*prompt]
    return {"prompt": own, "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "cache_prompt": False}


@contextmanager
def running(file: Path, *, context: int = 1024, threads: int = 0, exact: bool = False) -> Iterator[Running]:
    """Load a file in llama.cpp for as long as it lasts; `exact` keeps keys and values in float32 too.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    needed("xllamacpp")
    import xllamacpp as cpp  # noqa: PLC0415  an extra

    options = cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(file), context, 1
    options.warmup, options.port, options.verbosity = False, 0, 1  # errors alone
    if threads:
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    if exact:
        options.cache_type_k = options.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with tempfile.TemporaryFile() as log:
        try:
            with _heard(log):
                server = cpp.Server(options)
        except RuntimeError as error:
            raise ModelError(f"llama.cpp cannot load {str(file)!r}: {_why(log, error)}") from error
    yield Running(server.listening_address, server)


@contextmanager
def _heard(log: Any) -> Iterator[None]:
    """Lead what a library prints itself into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        yield
    finally:
        for own, stream in zip(kept, (1, 2), strict=True):
            os.dup2(own, stream)
            os.close(own)


def _why(log: Any, error: Exception) -> str:
    """Return what llama.cpp has printed of an error, or the error."""
    log.seek(0)
    lines = [line.decode(errors="replace").strip() for line in log]
    said = [line.partition(": ")[2] for line in lines if "error" in line.lower() and ": " in line]
    return said[0] if said else str(error)


def same_tokens(run: Running, tokenizer: Any) -> str | None:
    """Return the first text that the file's tokenizer cuts otherwise than the checkpoint's, None where there is none."""
    for text in PROBES:
        if run.tokens(text) != tokenizer.encode(text, add_special_tokens=False):
            return text
    return None
