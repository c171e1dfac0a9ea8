"""What is to be said of a correction, in sentences."""

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from causalprune.calibration import OWN
from causalprune.core import Decoder
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.records import Corrected
from causalprune.evaluation import bracketed
from causalprune.shrinking import step_of


def sentences(found: Corrected) -> list[str]:
    """Return in sentences what was taken out, what that does, and what it costs."""
    own, after = found.contrast, found.after
    said = [
        f"{found.what}: {after.weights:,} weights",
        f"log-odds of what is undesired: {_record(after.benefit, -1)} on the half that decided how many",
    ]
    if after.benefit.low <= 0 <= after.benefit.high:
        said.append("that is not told apart from nothing (the interval holds 0): give more samples")
    said += [
        f"divergence on {short(source)}: {_record(value)} nats per token"
        if source.startswith(CLEAN)
        else f"loss of {short(source)}: {_record(value)} nats per token ({math.expm1(value.value):+.2%} of perplexity), divergence {after.kl[source].value:.3g}"
        for source, value in after.harm.items()
    ]
    worst = max((value.value for value in found.chosen.kl.values()), default=math.nan)
    if found.chosen.predicted > 0:
        said.append(
            f"divergence measured over predicted: {worst / found.chosen.predicted:.3g} ({worst:.3g} over {found.chosen.predicted:.3g} nats)"
        )
    if own.update != "none" and after.benefit.value < found.chosen.benefit.value:
        said.append(
            f"the update ({own.update}) brings some of it back: log-odds {_record(found.chosen.benefit, -1)} before it, "
            f"{_record(after.benefit, -1)} after"
        )
    if after.worst(certain=own.certain) > own.limit_nats:
        said.append(f"in what was written the harm is above the limit of {own.limit_nats:.3g} nats")
    return said


def short(source: str) -> str:
    """Return the name of a source without the folder of a file."""
    head = next((own for own in (f"{CLEAN}{OWN}", CLEAN, OWN) if source.startswith(own)), "")
    return head + Path(source.removeprefix(head)).name


def for_good(found: Corrected, decoder: Decoder, place: Path) -> str:
    """Return in words how neurons that are zero can leave the model, which is saved at a place; empty where there are none."""
    if found.contrast.damp:
        return ""
    layers, total = Counter[int](), 0
    widths = dict[int, int]()
    for p in decoder.projections:
        if p.place == "mlp" and p.role == "down":
            gone = ~(p.read() != 0).any(0)
            layers[p.layer], widths[p.layer] = int(gone.sum()), len(gone)
    total = sum(layers.values())
    if not total:
        return ""
    are = "neuron is" if total == 1 else "neurons are"
    said = f"{total:,} {are} zero for good, {min(layers.values()):,} to {max(layers.values()):,} a layer"
    steps = {layer: step_of("neurons", width) for layer, width in widths.items()}
    share = min(layers[layer] // steps[layer] * steps[layer] / width for layer, width in widths.items())
    if share > 0 and len(set(widths.values())) == 1:
        names = " -o ".join(shlex.quote(f"{place}{end}") for end in ("", "-small"))
        return (
            f"{said}: `causalprune shrink {names} --neurons {share:.6g} --by magnitude --update none` takes {share:.1%} of each "
            "layer out without loss"
        )
    return (
        f"{said}; `causalprune shrink` takes as many of every layer, {max(steps.values())} at a time, which not all layers have: "
        "they stay as zeros"
    )


def _record(own: Any, sign: int = 1) -> str:
    low, high = sorted((sign * own.low, sign * own.high))
    return f"{sign * own.value:+.3g} {bracketed(low, high, 1)}"
