"""Files that ship: which formats keep exact zeros, and how good smaller models are.

    python bench/fit.py zeros             # one half-empty matrix of SmolLM2 through every format that libraries offer (2 GB of packages)
    python bench/fit.py smollm2_20        # `shrink` of both builds at 20 % of the parameters, on the same problems
    python bench/fit.py smollm2_20 --peer optipfair=FOLDER --peer 2ssp=FOLDER   # and models that peers have written, beside them

Steps: zeros, smollm2_20, smollm2_30, qwen_20 (hours). A peer's folder is measured, not made: beside it may lie `FOLDER.json` with
`repository`, `commit` and `options`. Models are kept in `runs/fit`, so that a stopped bench goes on. Figures and raw data are in
`results/fit.json`.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import consumers
import numpy as np
from before import before
from common import RUNS, Found, carry_out, data_folder, step_parser
from lean import COMMAND, MODELS
from models import fetched

from causalprune.checkpoints.embedded import load
from causalprune.core.types import EvalResult
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, paired_difference
from causalprune.evaluation.settings import Settings

NAME, MATRIX, ROWS, KEEPS = "fit", "layers.15.down", 64, 0.999
PROBLEMS, ON = 48, ("gsm8k_nll:100", "wikitext2_ppl:20000")
PEERS: dict[str, Path] = {}
"""Folders of models that peers have written, by name."""


def zeros() -> Found:
    """Set the smaller half of each row of a matrix to zero, and let every format have it."""
    decoder = load("embedded")
    weights = next(p for p in decoder.projections if p.name == MATRIX).read()[:ROWS].numpy().copy()
    smaller = np.abs(weights).argsort(1)[:, : weights.shape[1] // 2]
    np.put_along_axis(weights, smaller, 0.0, axis=1)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "weights.npy"
        np.save(file, weights)
        answer = consumers.in_own("zeros", "zeros.py", file)
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    ran = {name: row for name, row in found.items() if "zeros_kept" in row}
    figures: dict[str, float | None] = {
        "zeros_table_formats": len(ran),
        "zeros_table_keeping": sum(row["zeros_kept"] >= KEEPS for row in ran.values()),
    }
    return {"figures": figures, "matrix": MATRIX, "shape": [*weights.shape], "formats": found}


def smaller(name: str, percent: int) -> Found:
    """Make a model smaller with both builds and their defaults on the same problems, and measure them beside peers' models."""
    model, dtype = MODELS[name]
    model, step = model if model == "embedded" else str(fetched(model)), f"{name}_{percent}"
    words = ["shrink", model, "-t", "gsm8k", "-n", str(PROBLEMS), "--parameters", str(percent / 100)]
    words += ["--dtype", dtype, "--device", "cpu", "--data-dir", str(data_folder())]
    places = {build: RUNS / "fit" / f"{step}-{build}" for build in ("ours", "before")}
    pythons = {"ours": sys.executable, "before": str(before())}
    seconds = {
        build: _made(place, [pythons[build], "-c", COMMAND, *words]) for build, place in places.items()
    }
    every = {"dense": Path(model), **places, **PEERS}
    results = {label: _measured(place, dtype) for label, place in every.items()}
    losses, texts = ({label: own[at] for label, own in results.items()} for at in (0, 1))
    rise = {label: headline(own) - headline(losses["dense"]) for label, own in losses.items()}
    figures = {
        f"shrink_rise_over_before_{step}": rise["ours"] / rise["before"],
        f"shrink_ppl_over_dense_{step}": headline(texts["ours"]) / headline(texts["dense"]),
        f"shrink_minutes_{step}": seconds["ours"] / 60,
    }
    if PEERS:
        best, clearest = (min(PEERS, key=lambda peer: headline(own[peer])) for own in (losses, texts))
        figures[f"shrink_over_best_peer_{step}"] = rise["ours"] / rise[best]
        apart = paired_difference(texts["ours"], texts[clearest])
        figures[f"shrink_ppl_minus_best_peer_high_{step}"] = apart.high
    pairs = {
        f"ours - {label}": [
            vars(paired_difference(one, its)) for one, its in zip(results["ours"], other, strict=True)
        ]
        for label, other in results.items()
        if label != "ours"
    }
    values = {
        label: [{"value": headline(one), "values": list(one.values)} for one in own]
        for label, own in results.items()
    }
    peers = {label: _described(place) for label, place in PEERS.items()}
    raw = {"on": ON, "seconds": seconds, "measured": values, "differences": pairs, "peers": peers}
    return {"figures": figures, "raw": raw}


def _made(place: Path, command: list[str]) -> float:
    """Let a command write a model where it is not there yet, and return the seconds that it took."""
    note = place.with_name(f"{place.name}.seconds")
    if not note.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        subprocess.run([*command, "-o", str(place)], check=True)
        note.write_text(str(time.perf_counter() - start))
    return float(note.read_text())


def _measured(model: Path, dtype: str) -> list[EvalResult]:
    return evaluate(load(str(model), dtype=dtype, device="cpu"), ON, Settings(data_dir=data_folder()))


def _described(folder: Path) -> Mapping[str, Any]:
    """Return what is known of a peer's model: what its maker noted beside it, and the hash of its weights."""
    note, sha = folder.with_name(f"{folder.name}.json"), hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        sha.update(file.read_bytes())
    return {"sha256": sha.hexdigest(), **(json.loads(note.read_text()) if note.exists() else {})}


STEPS = {
    "zeros": zeros,
    "smollm2_20": partial(smaller, "smollm2", 20),
    "smollm2_30": partial(smaller, "smollm2", 30),
    "qwen_20": partial(smaller, "qwen", 20),
}


def main() -> None:
    """Carry out the steps that are named, or those not done yet."""
    parser = step_parser(__doc__, STEPS)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="A peer's model.")
    given = parser.parse_args()
    for text in given.peer:
        name, mark, folder = text.partition("=")
        if not mark or not Path(folder).is_dir():
            parser.error(f"--peer {text}: NAME=FOLDER is wanted, with the folder of a model")
        PEERS[name] = Path(folder)
    carry_out(NAME, STEPS, parser, given.steps)


if __name__ == "__main__":
    sys.exit(main())
