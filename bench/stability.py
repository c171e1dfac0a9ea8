"""What a referee would ask of the ranking of SmolLM2's heads, by the functions behind `causalprune stability`.

    python bench/stability.py   # about half an hour on two cores; resumable

The GSM8K problems are those of the reference of bench/attribution.py, as five draws of equal size; ARC-Challenge,
WikiText-2 and pairs of heads are measured here.
"""

from dataclasses import replace
from typing import Any

import torch
from attribution import Reference, chosen
from common import RUNS, data_folder, write_figures

from causalprune.attribution.estimators import attribute
from causalprune.attribution.plan import planned
from causalprune.attribution.questions import Question
from causalprune.attribution.repeatability import DRAWS, Pairs, compared, draws, interactions, swapped
from causalprune.calibration.examples import calibrate
from causalprune.core.progress import shown
from causalprune.core.types import Calibration

FOLDER = RUNS / "stability"
EXAMPLES = {"arc_challenge": 20, "wikitext2": 10}
WINDOW = 128
"""Longest example in tokens: WikiText-2 comes in windows of this length."""
EFFECTS = ("ce", "kl")


def main() -> None:
    """Measure what is missing and write `results/stability.json`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    whole = Reference.load()
    size = len(whole.examples) // DRAWS
    first = chosen(whole.effects, range(size * DRAWS))
    measured = {"gsm8k": replace(first, subset=torch.arange(size * DRAWS) // size)}
    for name, n in EXAMPLES.items():
        limit = {"max_tokens": WINDOW} if name == "wikitext2" else {}
        own = calibrate(whole.decoder.tokenizer, [name], n=n, subsets=DRAWS, data_dir=data_folder(), **limit)
        with shown(f"effects on {name}") as progress:
            measured[name] = attribute(
                whole.decoder,
                own,
                Question(effect="kl"),
                ledger=FOLDER / f"{name}.ledger",
                on_progress=progress,
            )
    pairs = Pairs()
    few = Calibration(whole.examples[: pairs.sequences], (0,) * pairs.sequences)
    found: dict[str, Any] = {}
    for effect in EFFECTS:
        by = {
            name: own if effect == "kl" else replace(own, effect="ce", kl_nats=None)
            for name, own in measured.items()
        }
        one = by["gsm8k"]
        found[effect] = {
            "within": {name: draws(own) for name, own in by.items()},
            "between": {name: compared(one, by[name]) for name in EXAMPLES},
            "swaps": {name: swapped(one, by[name]) for name in EXAMPLES},
        }
    with shown("pairs of heads") as progress:
        plan = planned(whole.decoder, few, Question())
        ledger = FOLDER / "pairs.ledger"
        one = replace(measured["gsm8k"], effect="ce", kl_nats=None)
        found["ce"]["interactions"] = interactions(plan, one, pairs.top, ledger=ledger, on_progress=progress)
    flat = {
        f"{effect}_{key}_{name}": own[key]
        for effect in EFFECTS
        for name, own in found[effect]["within"].items()
        for key in ("spearman_between_draws", "split_half", "certain_signs")
        if key in own
    }
    print(
        write_figures(
            "stability", flat, {"problems": {"gsm8k": size * DRAWS, **EXAMPLES}, **found}, seeds=[0]
        )
    )


if __name__ == "__main__":
    main()
