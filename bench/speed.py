"""How much smaller and faster `shrink` makes models, and what that costs; each row is kept, so a stopped bench goes on.

    python bench/speed.py                # SmolLM2 and Qwen2.5-Coder-0.5B at 10, 20, 30 % fewer parameters
    python bench/speed.py smollm2        # one of them
    python bench/speed.py --memory       # memory of the rows that lack it
    python bench/speed.py --speeds       # speeds and memory of the rows that are there again, as on a quieter machine

Every smaller model is made from the same 48 GSM8K problems, its units chosen by effect, activation, magnitude or at random, all
updated alike, and measured on the same test solutions. Speeds are medians of rounds in which the whole and the
smaller model take turns in one process: prefill of 512 tokens, and greedy decoding after it, batch of one. Memory is the
most that a process of its own holds which loads a checkpoint with transformers and reads those 512 tokens.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import data_folder, made, record, write_figures
from models import fetched
from packed import light

from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import load
from causalprune.checkpoints.saving import save
from causalprune.core.progress import shown
from causalprune.core.types import Decoder, EvalResult
from causalprune.evaluation.measures import Settings, evaluate, evaluation_contents
from causalprune.evaluation.results import headline, paired_difference, results_in
from causalprune.shrinking.removal import shrink
from causalprune.shrinking.worth import Shrinking

MODELS = {"smollm2": lambda: "embedded", "qwen": lambda: str(fetched("qwen"))}
SHARES = (0.2, 0.3, 0.1)
CHOICES = ("effect", "activation", "magnitude", "random")
EXAMPLES, TEST = 48, "gsm8k_nll:100"
PREFILL_TOKENS, NEW_TOKENS, ROUNDS = 512, 32, 7
LOADED = f"""
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.inference_mode():
    model(torch.arange(100, 100 + {PREFILL_TOKENS})[None], logits_to_keep=1)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
"""Prints the most KiB that were resident; what getrusage says would count the parent's too."""


def shrunk(name: str, share: float, by: str) -> tuple[Decoder, EvalResult]:
    """Return a model with `share` fewer parameters (0: whole), and its losses on test solutions."""
    decoder, settings = load(name), Settings(data_dir=data_folder())
    if share:
        exclude = evaluation_contents([TEST], settings, decoder.tokenizer)
        calibration = calibrate(
            decoder.tokenizer, ["gsm8k"], n=EXAMPLES, subsets=1, data_dir=data_folder(), exclude=exclude
        )
        decoder = shrink(decoder, share, calibration, Shrinking(by, "refit"), stage=shown).decoder
    with shown(f"{share:g} {by}") as progress:
        return decoder, evaluate(decoder, [TEST], settings, on_progress=progress)[0]


def speeds(whole: Decoder, smaller: Decoder) -> dict[str, Any]:
    """Return tokens per second of both models, and by how much the smaller one is faster, taking turns."""
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 40_000, (1, PREFILL_TOKENS), generator=random)
    phases = {"prefill": (_prefill, PREFILL_TOKENS), "decode": (_decode, NEW_TOKENS)}
    found: dict[str, Any] = {}
    for phase, (run, tokens) in phases.items():
        seconds: dict[str, list[float]] = {"whole": [], "smaller": []}
        for turn in range(ROUNDS + 1):
            for name, decoder in (("whole", whole), ("smaller", smaller)):
                took = run(decoder, prompt)
                if turn:  # the first round warms up
                    seconds[name].append(took)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        found[phase] = {
            "seconds": seconds,
            **{f"{name}_tokens_per_second": tokens / median for name, median in medians.items()},
            "speedup": statistics.median(
                a / b for a, b in zip(seconds["whole"], seconds["smaller"], strict=True)
            ),
        }
    return found


def compared(whole: Decoder, smaller: Decoder) -> dict[str, Any]:
    """Return what a smaller model gains: speeds, and the most memory of a process that holds either."""
    return {**held(whole, smaller), "speed": speeds(whole, smaller), "timed": made()}


def held(whole: Decoder, smaller: Decoder) -> dict[str, Any]:
    """Return the most memory of a process that holds either model."""
    return {"resident_bytes": {"whole": _resident(whole), "smaller": _resident(smaller)}}


def _resident(decoder: Decoder) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        save(decoder, Path(scratch) / "model", manifest={})
        command = [sys.executable, "-c", LOADED, str(Path(scratch) / "model")]
        return 1024 * int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def _prefill(decoder: Decoder, prompt: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        decoder.model(prompt, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - start


def _decode(decoder: Decoder, prompt: torch.Tensor) -> float:
    with torch.inference_mode():
        output = decoder.model(prompt, logits_to_keep=1, use_cache=True)
        token, start = output.logits[:, -1:].argmax(-1), time.perf_counter()
        for _ in range(NEW_TOKENS):
            output = decoder.model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start


def _bytes(decoder: Decoder) -> dict[str, int]:
    """Return parameters, their bytes in memory, and the bytes of the files on disk."""
    parameters = list(decoder.model.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        save(decoder, Path(scratch) / "model", manifest={})
        disk = sum(file.stat().st_size for file in (Path(scratch) / "model").glob("*.safetensors"))
    memory = sum(p.numel() * p.element_size() for p in parameters)
    return {"parameters": sum(p.numel() for p in parameters), "memory_bytes": memory, "disk_bytes": disk}


def measured(model: str, rows: dict[str, Any], keep: Callable[[], None]) -> None:
    """Add the rows of a model that are missing: whole, then every choice of units at every share."""
    name = MODELS[model]()
    whole: Decoder | None = None
    if f"{model} whole" not in rows:
        whole, result = shrunk(name, 0.0, "whole")
        rows[f"{model} whole"] = {
            **_bytes(whole),
            "nll": headline(result),
            "result": light(vars(result)),
            "made": made(),
        }
        keep()
    for share in SHARES:
        for by in CHOICES:
            label = f"{model} {by} {share:g}"
            if label in rows:
                continue
            decoder, result = shrunk(name, share, by)
            own = {"nll": headline(result), "result": light(vars(result)), "made": made()}
            row = {**_bytes(decoder), **own}
            if by == CHOICES[0]:  # all have the same shapes
                whole = whole or load(name)
                row |= compared(whole, decoder)
            rows[label] = row
            keep()


def again(model: str, rows: dict[str, Any], keep: Callable[[], None], *, memory: bool) -> None:
    """Measure speeds and memory of a model's rows again, or only the memory of those that lack it.

    Both depend on shapes alone, so units are chosen and left as is quickest.
    """
    whole = load(MODELS[model]())
    calibration = calibrate(whole.tokenizer, ["gsm8k"], n=1, subsets=1, data_dir=data_folder())
    for share in SHARES:
        row = rows.get(f"{model} {CHOICES[0]} {share}")
        if row and not (memory and "resident_bytes" in row):
            decoder = load(MODELS[model]())
            decoder = shrink(decoder, share, calibration, Shrinking("magnitude", "none"), stage=shown).decoder
            row |= held(whole, decoder) if memory else compared(whole, decoder)
            keep()


def figures(rows: dict[str, Any]) -> dict[str, float]:
    """Return sizes, speed-ups over the share removed, and losses with their paired differences."""
    found: dict[str, float] = {}
    for label, row in rows.items():
        model, by, *share = label.split()
        whole = rows[f"{model} whole"]
        if not share:
            continue
        removed = 1 - row["parameters"] / whole["parameters"]
        suffix = f"{model}_{float(share[0]) * 100:.0f}"
        found[f"nll_{by}_{suffix}"] = row["nll"]
        if "speed" in row:
            found[f"removed_{suffix}"] = removed
            if memory := row.get("resident_bytes"):
                found[f"memory_saved_over_share_{suffix}"] = (
                    1 - memory["smaller"] / memory["whole"]
                ) / removed
            for phase in ("prefill", "decode"):
                faster = 1 - 1 / row["speed"][phase]["speedup"]
                found[f"{phase}_speedup_{suffix}"] = row["speed"][phase]["speedup"]
                found[f"{phase}_time_saved_over_share_{suffix}"] = faster / removed
            worse = min(found[f"{phase}_speedup_{suffix}"] for phase in ("prefill", "decode"))
            found[f"shrink_speedup_over_share_{suffix}"] = (worse - 1) / removed
        if by != CHOICES[0] and (best := rows.get(f"{model} {CHOICES[0]} {share[0]}")):
            pair = results_in([best["result"], row["result"]])
            found[f"effect_minus_{by}_high_{suffix}"] = paired_difference(*pair).high
    return found


def main() -> None:
    """Measure what is missing and write `results/speed.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--memory", action="store_true", help="Only the memory of rows that lack it.")
    parser.add_argument(
        "--speeds", action="store_true", help="Only speeds and memory of rows that are there."
    )
    arguments = parser.parse_args()
    rows: dict[str, Any] = record("speed")["raw"].get("rows", {})

    def keep() -> None:
        print(write_figures("speed", figures(rows), {"rows": rows}, seeds=[0]), flush=True)

    for model in arguments.models or MODELS:
        if arguments.speeds or arguments.memory:
            again(model, rows, keep, memory=arguments.memory)
        else:
            measured(model, rows, keep)


if __name__ == "__main__":
    main()
