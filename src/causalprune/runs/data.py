"""Calibration examples for who has a model at hand, the model's own answers among them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causalprune import calibration
from causalprune.calibration import Chat, Exclude
from causalprune.core import Calibration, Decoder, Progress, bar
from causalprune.runs.recipe import CalibrationSpec
from causalprune.runs.traces import calibrated


def calibrate(  # noqa: PLR0913 (the command's options)
    decoder: Decoder | Any,
    sources: Sequence[str],
    *,
    n: int | None = 128,
    subsets: int = 3,
    seed: int = 0,
    max_tokens: int = 512,
    chat: Chat = "auto",
    data_dir: Path | str | None = None,
    exclude: Exclude | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Return `n` examples drawn from the sources and cut into disjoint subsets.

    A source is a data set (`gsm8k`), a file of prompts and targets, or `own:` before either: its problems with the
    answers that the model writes, which takes a while the first time; a bar shows how far it has come, unless an
    `on_progress` is given (`silent`: nothing does). Where no source is `own:`, a tokenizer will do in place of the decoder.
    The commands add text that the model itself writes to what trains or removes parts, a quarter of the task's tokens; here it
    is named: `["gsm8k:48", "own:12"]` has twelve pieces of it.
    The rest is as in `causalprune.calibration.calibrate`.
    """
    if not isinstance(decoder, Decoder):
        return calibration.calibrate(
            decoder,
            sources,
            n=n,
            subsets=subsets,
            seed=seed,
            max_tokens=max_tokens,
            chat=chat,
            data_dir=data_dir,
            exclude=exclude,
        )
    wanted = CalibrationSpec(tuple(sources), n or 0, subsets, seed, max_tokens, chat)
    with bar(on_progress, "own answers") as tell:
        found = calibrated(decoder, wanted, data_dir, exclude, tell)
    calibration.check_subsets(len(found.examples), subsets)
    return found
