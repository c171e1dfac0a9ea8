"""Files that ship: which formats keep exact zeros, and how good smaller models are.

    python bench/fit.py zeros             # one half-empty matrix of SmolLM2 through every format that libraries offer (2 GB of packages)
    python bench/fit.py smollm2_20        # `shrink` of both builds at 20 % of the parameters, on the same problems
    python bench/fit.py smollm2_20 --peer optipfair=FOLDER --peer 2ssp=FOLDER   # and models that peers have written, beside them

Steps: zeros, smollm2_20, smollm2_30, qwen_20, qwen_solved (hours), runtime (tiny models in transformers and llama.cpp), speed (of the model of
`smollm2_20`, in llama.cpp), smollm2_files, qwen_files (what `fit` chooses at some sizes, from a model off the grid that it lies on). A peer's folder is measured, not made: beside it may lie `FOLDER.json` with
`repository`, `commit` and `options`. Models are kept in `runs/fit` and what was measured in `rows/fit`, so that a stopped bench goes on. Figures
and raw data are in `results/fit.json`.
"""

import hashlib
import json
import statistics
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
import torch
from before import before, median_interval, variables
from common import ROOT, RUNS, Found, carry_out, data_folder, is_kept, kept, made, step_parser
from lean import COMMAND, MODELS
from models import fetched

sys.path.insert(0, str(ROOT / "tests"))
import shipped

from causalprune.checkpoints.embedded import load, resolve
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.progress import shown
from causalprune.core.sizes import size_of
from causalprune.core.types import EvalResult
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, kept_rows, paired_difference, results_in
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.written import own_pieces
from causalprune.shipping.exporting import export
from causalprune.shipping.runtime import running
from causalprune.shrinking.worth import KINDS, Kind

NAME, MATRIX, ROWS, KEEPS = "fit", "layers.15.down", 64, 0.999
CLOSE, ROUNDS = 1e-3, 15
"""Of the range of logits, how far two runtimes may be apart; and how often speeds are taken."""
PIECES, STEPS_OFF, STEP = 32, 300, 1e-5
"""Text and steps of training that take a model off its grid."""
SAME = "same"
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
    untrained = RUNS / "fit" / f"{step}-untrained"
    seconds["untrained"] = _made(untrained, [sys.executable, "-c", COMMAND, *words, "--update", "none"])
    every = {"dense": Path(model), **places, "untrained": untrained, **PEERS}
    results = {label: _measured(f"{step}/{label}", place, dtype) for label, place in every.items()}
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
        figures[f"shrink_untrained_over_best_peer_{step}"] = rise["untrained"] / rise[best]
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
        env = variables(ours=command[0] == sys.executable)
        subprocess.run([*command, "-o", str(place)], check=True, env=env)
        note.write_text(str(time.perf_counter() - start))
    return float(note.read_text())


def _measured(row: str, model: Path, dtype: str, on: tuple[str, ...] = ON) -> list[EvalResult]:
    """Return results of a model, which are kept as a row."""

    def results() -> list[Any]:
        decoder = load(str(model), dtype=dtype, device="cpu")
        return kept_rows(evaluate(decoder, on, Settings(data_dir=data_folder())))

    return results_in(kept(f"fit/{row}", results))


def _described(folder: Path) -> Mapping[str, Any]:
    """Return what is known of a peer's model: what its maker noted beside it, and the hash of its weights."""
    note, sha = folder.with_name(f"{folder.name}.json"), hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        sha.update(file.read_bytes())
    return {"sha256": sha.hexdigest(), **(json.loads(note.read_text()) if note.exists() else {})}


def runtime() -> Found:
    """Run tiny models of every architecture in transformers and in llama.cpp, from one folder: whole ones, and some made smaller."""
    rows: dict[str, dict[str, Any]] = {}
    smaller_: dict[str, dict[str, str]] = {}
    for family in shipped.CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            other, apart = shipped.in_both(family, Path(scratch))
        rows[family] = {"cut_otherwise": other, "logits_apart": apart}
        smaller_[family] = {kind: _without(family, kind) for kind in KINDS}
        print(family, apart, smaller_[family], flush=True)
    figures: dict[str, float | None] = {
        "gguf_same_tokens_families": sum(row["cut_otherwise"] is None for row in rows.values()),
        "gguf_same_logits_families": sum(row["logits_apart"] <= CLOSE for row in rows.values()),
        "gguf_smaller_same": sum(own == SAME for found in smaller_.values() for own in found.values()),
    }
    return {"figures": figures, "raw": rows, "smaller": smaller_}


def _without(family: str, kind: Kind) -> str:
    """Say what becomes of a tiny model without some units of a kind."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            other, apart = shipped.smaller_in_both(family, kind, Path(scratch))
        except OptionError:
            return "has none"
        except ModelError as error:
            return "llama.cpp does not load it" if "llama.cpp" in str(error) else "not in a standard form"
    return SAME if other is None and apart <= CLOSE else f"{apart:.1g} apart"


def speed() -> Found:
    """Time the whole model and the one that `smollm2_20` made, in turns, in llama.cpp: F16, two threads, 128 tokens after 64."""
    places = {"dense": Path(resolve("embedded")), "ours": RUNS / "fit" / "smollm2_20-ours"}
    sizes = {name: size_of(load(str(place), device="cpu")).parameters for name, place in places.items()}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.gguf" for name in places}
        for name, place in places.items():
            export(place, files[name], "f16")
        for _ in range(ROUNDS):
            for name, file in files.items():
                with running(file, context=512, threads=2) as run:
                    run.rate([*range(100, 108)], 8)
                    seconds[name].append(1 / run.rate([*range(100, 164)], 128))
    share = 1 - sizes["ours"] / sizes["dense"]
    saved = [1 - ours / dense for ours, dense in zip(seconds["ours"], seconds["dense"], strict=True)]
    figures = {"decode_time_saved_over_share_20": statistics.median(saved) / share}
    raw = {"seconds_a_token": seconds, "saved": saved, "share": share, "interval": median_interval(saved)}
    return {"figures": figures, "raw": raw}


def frontier(name: str, sizes: tuple[int, ...]) -> Found:
    """Let `fit` choose files of a model that is off its grid, at some sizes; the smaller of each is compared with the best whole one."""
    place, base = RUNS / "fit" / f"{name}-frontier", off_grid(name)
    words = [
        "fit",
        str(base),
        "-o",
        str(place),
        "-t",
        f"gsm8k:{PROBLEMS}",
        "--on",
        "gsm8k_nll:200",
        "--device",
        "cpu",
    ]
    words += ["--data-dir", str(data_folder())]
    found = {}
    for number, size in enumerate(sizes):
        start, row = time.perf_counter(), f"fit/{name}_files/{size}"
        if not is_kept(row):
            done = subprocess.run([sys.executable, "-c", COMMAND, *words, "--size", f"{size}MB"], check=False)
            if done.returncode:  # refused, or stopped: the other sizes are not lost with it
                print(f"{name}: no file of {size} MB")
                continue
            minutes = (time.perf_counter() - start) / 60 if not number else None
            record = json.loads((place / "frontier.json").read_text())
            kept(row, partial(dict, record, minutes=minutes, **made()))
        found[str(size)] = kept(row, dict)
    figures: dict[str, float | None] = {}
    for size, own in found.items():
        over, whole = own["minus_best_whole"], not own["chosen"]["share"]
        high = over["high"] if over else 0.0 if whole else None  # none: no whole file is so small
        figures[f"fit_minus_unshrunk_nats_high_{name}_{size}"] = high
    figures[f"fit_pays_points_{name}"] = sum(own is not None and own < 0 for own in figures.values())
    if (minutes := found.get(str(sizes[0]), {}).get("minutes")) is not None:
        figures[f"fit_minutes_{name}"] = minutes
    return {"figures": figures, "raw": found}


def solved() -> Found:
    """Let Qwen2.5-Coder-0.5B, and what `shrink` makes of it on its own answers, solve problems."""
    model, dtype = MODELS["qwen"]
    place, own = RUNS / "fit" / "qwen_solved-ours", str(fetched(model))
    words = ["shrink", own, "-t", "own:gsm8k", "-n", str(PROBLEMS), "--parameters", "0.2", "--dtype", dtype]
    words += ["--device", "cpu", "--data-dir", str(data_folder())]
    seconds = _made(place, [sys.executable, "-c", COMMAND, *words])
    results = {
        name: _measured(f"qwen_solved/{name}", path, dtype, ("gsm8k_answers:800",))[0]
        for name, path in {"dense": Path(own), "ours": place}.items()
    }
    share = headline(results["ours"]) / headline(results["dense"])
    apart = paired_difference(results["ours"], results["dense"])
    values = {name: list(result.values) for name, result in results.items()}
    raw = {"seconds": seconds, "solved": values, "ours - dense": vars(apart)}
    return {"figures": {"qwen_solved_share_20": share}, "raw": raw}


def off_grid(name: str) -> Path:
    """Return a model that lies on no grid of quantised values: trained for some steps on text that it writes itself.

    The models at hand come from files of four bits, and lie on their grid: there, four bits cost nothing.
    """
    place = RUNS / "fit" / f"{name}-base"
    if (place / "config.json").exists():
        return place
    model, _ = MODELS[name]
    decoder = load(model if model == "embedded" else str(fetched(model)), dtype="float32", device="cpu")
    torch.manual_seed(0)
    pieces = own_pieces(decoder, PIECES, 512, seed=0)
    optimizer = torch.optim.AdamW(decoder.model.parameters(), lr=STEP, weight_decay=0.0)
    for parameter in decoder.model.parameters():
        parameter.requires_grad_()
    with shown("off the grid") as progress:
        for step in range(STEPS_OFF):
            row = torch.tensor([pieces[step % len(pieces)].tokens])
            decoder.model(input_ids=row, labels=row, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, STEPS_OFF)
    decoder.model.requires_grad_(requires_grad=False)
    decoder.model.save_pretrained(place)
    decoder.tokenizer.save_pretrained(place)
    return place


STEPS = {
    "zeros": zeros,
    "smollm2_20": partial(smaller, "smollm2", 20),
    "smollm2_30": partial(smaller, "smollm2", 30),
    "qwen_20": partial(smaller, "qwen", 20),
    "qwen_solved": solved,
    "runtime": runtime,
    "speed": speed,
    "smollm2_files": partial(frontier, "smollm2", (80, 60, 100)),
    "qwen_files": partial(frontier, "qwen", (250, 350)),
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
