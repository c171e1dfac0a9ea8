"""Everything that the first table and its claims rest on; each step is kept, so a stopped bench goes on.

    python bench/core.py                # all steps that are not there yet
    python bench/core.py table oracle   # some of them
    python bench/core.py --full         # the table on all problems (hours)

Steps: table (bench/core.yaml), speed (bench/attribution.py), oracle (bench/oracle), sparsity, resume, demo.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import BENCH, ROOT, RUNS, data_folder, made, record, write_figures
from packed import light
from safetensors.torch import load_file
from tables import reported

from causalprune.calibration.examples import calibrate, with_limit
from causalprune.checkpoints.embedded import load
from causalprune.checkpoints.saving import load_effects
from causalprune.core.progress import shown
from causalprune.evaluation.measures import evaluate, evaluation_contents
from causalprune.evaluation.results import headline, read_json, rows_of, write_json
from causalprune.evaluation.settings import Settings
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import Recipe, read_recipe, without_limits
from causalprune.runs.study import run
from causalprune.runs.traces import calibrated

NAMES = {"magnitude-matrix": "magnitude_matrix", "magnitude-global": "magnitude_global", "wanda-row": "wanda"}
NAMES |= {"cap-global": "cap", "dense": "dense"}
MEASURES = {"gsm8k_nll": "nll", "wikitext2_ppl": "ppl", "arc_challenge": "arc", "strategyqa": "strategyqa"}
MEASURES |= {"arc_challenge_nll": "arc_nll", "strategyqa_nll": "strategyqa_nll"}
ORACLE_SPARSITY = 0.5
ORACLE_PROBLEMS = 12
RESUME_PROBLEMS = 3


def table(full: bool) -> dict[str, float]:
    """Dense and every method × sparsity × task of bench/core.yaml; tasks that the result file has are not measured again."""
    recipe = read_recipe(BENCH / "core.yaml")
    if full:
        found = run(without_limits(recipe), RUNS / "core_full", data_dir=data_folder(), stage=shown)
    else:
        found = _completed(recipe, record("core")["raw"].get("table"))
        write_json(RUNS / "core_table.json", found)
    figures = {}
    for label, results in rows_of(found):
        name, _, sparsity = label.rpartition("-")
        suffix = f"{NAMES[name]}_{float(sparsity) * 100:.0f}" if name else NAMES[label]
        for result in reported(results):
            figures[f"{MEASURES[result.task]}_{suffix}"] = headline(result)
    return figures


def _completed(recipe: Recipe, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the table with the tasks that it lacks, each result with where it was `made`; a row that is finished is kept.

    The first time it is a run; later, models are pruned again with the effects that it has left.
    """
    if not before:
        return light(run(recipe, RUNS / "core", data_dir=data_folder(), stage=shown))
    there = {r["task"] for row in before["rows"] for r in row["results"]}
    tasks = [with_limit(task)[0] for task in recipe.on]
    missing = tuple(task for task, name in zip(recipe.on, tasks, strict=True) if name not in there)
    settings, place = Settings(data_dir=data_folder()), RUNS / "core_more"
    cells = recipe.cells()
    for row in before["rows"] if missing else ():
        path = place / f"{row['label']}.json"
        if not path.exists():
            results = evaluate(_pruned(recipe, cells[row["label"]]), missing, settings)
            place.mkdir(parents=True, exist_ok=True)
            write_json(path, {"made": made(), "results": [asdict(result) for result in results]})
            print(row["label"], *map(headline, results), flush=True)
        own = light(read_json(path))
        new = [{**r, "description": {**r["description"], "made": own["made"]}} for r in own["results"]]
        row["results"] = sorted(row["results"] + new, key=lambda r: tasks.index(r["task"]))
    return before


def _pruned(recipe: Recipe, method: Any) -> Any:
    """Return a model of the table: with the calibration and the effects that it was first made with."""
    decoder = load("embedded")
    if method is None:
        return decoder
    exclude = evaluation_contents(recipe.on, Settings(data_dir=data_folder()), decoder)
    data = calibrated(decoder, recipe.calibration, data_folder(), exclude)
    effects = load_effects(RUNS / "core" / "effects.json", decoder)
    if effects.calibration_fingerprint != data.fingerprint:
        raise SystemExit("other calibration examples are drawn than those of the effects in bench/runs/core")
    prune(decoder, method, calibration=data, effects=effects if "effects" in method.needs else None)
    return decoder


def speed(full: bool) -> dict[str, float]:
    """Exact attribution against hook and full forward pass."""
    subprocess.run([sys.executable, BENCH / "attribution.py", "speed"], check=True)  # keeps its raw values
    found = record("attribution")
    per_sequence = found["raw"]["speed"]["agreement"]["max_abs_diff_nats_per_sequence"]
    return {
        "exact_vs_naive_speedup": found["figures"]["exact_speedup_vs_naive"],
        "exact_vs_naive_max_abs_diff_nats": found["figures"]["exact_vs_naive_max_abs_diff_nats"],
        "exact_vs_naive_max_abs_diff_nats_per_sequence": per_sequence,
    }


def sparsity(full: bool) -> dict[str, float]:
    """`cap` twice: distance from the target in weights, and whether both runs agree to the bit."""
    effects = load_effects(RUNS / "core" / "effects.json")
    error, identical = 0, True
    for target in (0.1, 0.2, 0.5):
        kept = []
        for _ in range(2):
            decoder = load("embedded")
            prune(decoder, Method("cap", target), effects=effects)
            kept.append([p.read().clone() for p in decoder.projections])
            zeros = sum(int((weight == 0).sum()) for weight in kept[-1])
            error = max(error, abs(zeros - round(target * sum(p.size for p in decoder.projections))))
        identical &= all(bool((a == b).all()) for a, b in zip(*kept, strict=True))
    return {"cap_sparsity_error_weights": error, "cap_second_run_bit_identical": float(identical)}


def resume(full: bool) -> dict[str, float]:
    """Attribution killed with SIGKILL half-way and started again, against an undisturbed run."""
    with tempfile.TemporaryDirectory() as scratch:
        calm, killed = Path(scratch) / "calm", Path(scratch) / "killed"
        start = time.perf_counter()
        subprocess.run(_attribute(calm), check=True)
        seconds = time.perf_counter() - start
        process = subprocess.Popen(_attribute(killed))
        time.sleep(seconds / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = len((killed / "attribution.ledger").read_text().splitlines()) - 1
        subprocess.run(_attribute(killed), check=True)
        same = (calm / "effects.json").read_bytes() == (killed / "effects.json").read_bytes()
    return {"resume_bit_identical": float(same), "resume_rows_before_kill": rows}


def _attribute(folder: Path) -> list[str]:
    command = [str(Path(sys.executable).parent / "causalprune"), "attribute", "embedded", "-o", str(folder)]
    return [*command, "-t", "gsm8k", "-n", str(RESUME_PROBLEMS), "--data-dir", str(data_folder())]


def oracle(full: bool) -> dict[str, float]:
    """Keep decisions equal to llm-compressor's, which runs in an environment of its own."""
    python = oracle_python()
    decoder = load("embedded")
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=ORACLE_PROBLEMS, data_dir=data_folder())
    figures = {}
    for method in ("wanda", "magnitude"):
        with tempfile.TemporaryDirectory() as scratch:
            tokens, masks = Path(scratch) / "tokens.json", Path(scratch) / "masks.safetensors"
            tokens.write_text(json.dumps([list(e.tokens) for e in calibration.examples]))
            command = [python, BENCH / "oracle" / "llmcompressor_masks.py", decoder.name, tokens, masks]
            subprocess.run([*command, "--method", method, "--sparsity", str(ORACLE_SPARSITY)], check=True)
            theirs = load_file(masks)
        own = load("embedded")
        prune(own, Method(method, ORACLE_SPARSITY), calibration=calibration)
        equal = sum(int(((p.read() != 0) == theirs[p.parameter_name]).sum()) for p in own.projections)
        figures[f"oracle_{method}_agreement"] = equal / sum(p.size for p in own.projections)
    return figures


def oracle_python() -> Path:
    """Return the interpreter of llm-compressor's own environment, which is made where it is missing."""
    python = BENCH / "oracle" / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        requirements = BENCH / "oracle" / "requirements.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    return python


def demo(full: bool) -> dict[str, float]:
    """`make demo` and `make test` on a fresh clone of the commit, set-up included."""
    figures = {}
    for target in ("demo", "test"):
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["git", "clone", "-q", str(ROOT), scratch], check=True)
            start = time.perf_counter()
            environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}
            environment["CAUSALPRUNE_DATA"] = str(data_folder())
            subprocess.run(["make", target], cwd=scratch, env=environment, check=True)
            figures[f"{target}_minutes"] = (time.perf_counter() - start) / 60
    return figures


STEPS: dict[str, Callable[[bool], dict[str, float]]] = {
    step.__name__: step for step in (table, speed, oracle, sparsity, resume, demo)
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/core.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    done_file = RUNS / "core_steps.json"
    done: dict[str, Any] = read_json(done_file)["steps"] if done_file.exists() else {}
    for name in arguments.steps or [name for name in STEPS if name not in done]:
        print(f"== {name}", flush=True)
        done[name] = STEPS[name](arguments.full)
        write_json(done_file, {"steps": done})
        figures = {key: value for step in done.values() for key, value in step.items()}
        print(write_figures("core", figures, _raw(), seeds=[0]))


def _raw() -> dict[str, Any]:
    """Return the rows of the table: as its step wrote them here, or as the result file has them from elsewhere."""
    path = RUNS / "core_table.json"
    return {"table": read_json(path)} if path.exists() else dict(record("core")["raw"])


if __name__ == "__main__":
    main()
