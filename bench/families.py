"""Which types of models work, and attribution on two other families with real weights; each part is kept.

python bench/families.py         # all that is not there yet (about an hour on two cores)
python bench/families.py inspect # a configuration of 700 billion weights
python bench/families.py experts # SparseGPT on stacks of experts, against the build before
python bench/families.py wanda   # loading and Wanda on two real models, against the build before
python bench/families.py hybrids # two hybrids trained here, pruned by four methods (an hour)
python bench/families.py sweep   # every type of the installed transformers as a tiny model, and docs/families.md
python bench/families.py qwen    # Qwen2.5-Coder-0.5B-Instruct: 336 heads within a budget, on two draws
python bench/families.py gemma   # Gemma 3 270M: one KV head for four heads, sliding windows: exact and cheaper
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from before import alternate, before, variables
from common import ROOT, RUNS, data_folder, record, write_figures
from hybrids import hybrids
from models import fetched
from sweep import figures as sweep_figures
from sweep import sweep, write_page
from transformers import DeepseekV3Config

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.attribution.uncertainty import estimate, reliability, spearman, top_overlap
from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import embedded_model
from causalprune.checkpoints.saving import load_effects, save_effects
from causalprune.core.progress import shown
from causalprune.core.types import Calibration, Decoder, Effects
from causalprune.evaluation.results import headline, read_json, rows_of, write_json
from causalprune.models.loading import load

FOLDER = RUNS / "families"
EXAMPLES = 8
PAIRS = 5
QWEN = {"ce": 20.0, "kl": 50.0}
"""Budget of each effect on Qwen: the share of a whole pass per head and problem is one over it."""
GEMMA = {"exact": Estimator(), "gradient": Estimator("gradient"), "10x": Estimator("adaptive", budget=10.0)}


def draws(decoder: Decoder, n: int) -> list[Calibration]:
    """Return n calibrations of `EXAMPLES` GSM8K problems each that share no problem."""
    whole = calibrate(decoder.tokenizer, ["gsm8k"], n=n * EXAMPLES, subsets=1, data_dir=data_folder())
    cuts = [slice(i * EXAMPLES, (i + 1) * EXAMPLES) for i in range(n)]
    return [Calibration(whole.examples[c], (0,) * EXAMPLES, whole.description) for c in cuts]


def measured(
    decoder: Decoder, calibration: Calibration, question: Question, how: Estimator, path: Path
) -> tuple[Effects, float]:
    """Measure, or read what was measured; with the seconds it took."""
    seconds = path.with_suffix(".seconds.json")
    if not seconds.exists():
        start = time.perf_counter()
        with shown(path.stem) as progress:
            found = attribute(decoder, calibration, question, how, on_progress=progress)
        save_effects(found, path)
        write_json(seconds, {"seconds": time.perf_counter() - start})
    return load_effects(path), float(read_json(seconds)["seconds"])


def _cost(effects: Effects, seconds: float, calibration: Calibration) -> dict[str, Any]:
    naive = (len(effects.units) + 1) * sum(len(e.tokens) for e in calibration.examples)
    tokens = float(effects.description["tokens_forwarded"])
    found = estimate(effects)
    return {
        "units": len(effects.units),
        "seconds": seconds,
        "tokens_forwarded": tokens,
        "share_of_naive_tokens": tokens / naive,
        "value_nats": found.value.tolist(),
        "low_nats": found.low.tolist(),
        "high_nats": found.high.tolist(),
        **reliability(effects),
    }


def qwen() -> dict[str, Any]:
    """Rank the heads of Qwen within a budget on two draws of problems, by either effect."""
    decoder = load(str(fetched("qwen")))
    pair, found = draws(decoder, 2), {}
    for effect, budget in QWEN.items():
        ranked, rows = [], []
        for number, calibration in enumerate(pair):
            question, how = Question(effect=effect), Estimator("adaptive", budget=budget)  # type: ignore[arg-type]
            effects, seconds = measured(
                decoder, calibration, question, how, FOLDER / f"qwen-{effect}-{number}.json"
            )
            ranked.append(estimate(effects).value)
            rows.append(_cost(effects, seconds, calibration))
        agreement = {
            "spearman_between_draws": spearman(*ranked),
            "top_fifth_between_draws": top_overlap(*ranked),
        }
        found[effect] = {"budget": budget, "problems_per_draw": EXAMPLES, **agreement, "draws": rows}
    return found


def gemma() -> dict[str, Any]:
    """Compare cheaper estimators with the exact effects of all heads of Gemma, on the same problems."""
    decoder = load(str(fetched("gemma")))
    (calibration,) = draws(decoder, 1)
    rows: dict[str, Any] = {}
    exact: Effects | None = None
    for name, how in GEMMA.items():
        effects, seconds = measured(decoder, calibration, Question(), how, FOLDER / f"gemma-{name}.json")
        exact = exact or effects
        value = estimate(effects).value
        agreement = {
            "spearman_with_exact": spearman(value, exact.paired_delta_nats()),
            "top_fifth_of_exact": top_overlap(value, exact.paired_delta_nats()),
        }
        rows[name] = {**_cost(effects, seconds, calibration), **agreement}
    return {"problems": EXAMPLES, "estimators": rows}


def whole_configuration() -> dict[str, Any]:
    """Time `inspect` of a mixture of 700 billion weights from its configuration alone, with its memory, and what imports take of it."""
    config = DeepseekV3Config()
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["DeepseekV3ForCausalLM"]
        config.save_pretrained(folder)
        command = [
            sys.executable,
            "-c",
            "from causalprune.cli.app import main; main()",
            "inspect",
            folder,
            "--json",
        ]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        imports = [sys.executable, "-c", "import transformers.modeling_utils"]
        runs: dict[str, list[float]] = {"imports": [], "inspect": []}
        for _ in range(1 + PAIRS):  # the first compiles, as where it is installed
            for name, words in (("imports", imports), ("inspect", command)):
                start = time.perf_counter()
                done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
                runs[name].append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds = {name: median(own[1:]) for name, own in runs.items()}
    return {"seconds": seconds, "runs": runs, "gib": peak, "found": json.loads(done.stdout)}


def experts() -> dict[str, Any]:
    """Time SparseGPT on 64 experts in each of four layers in both builds, in turn, and compare what stays."""
    pythons, rows = {"ours": sys.executable, "theirs": str(before())}, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(PAIRS):
            found = {}
            for name, python in pythons.items():
                path = Path(folder) / f"{name}.json"
                env = variables(ours=name == "ours")
                subprocess.run(
                    [python, str(ROOT / "bench" / "experts.py"), str(path)],
                    env=env,
                    check=True,
                    capture_output=True,
                )
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            rows.append({name: own["seconds"] for name, own in found.items()})
    ours, theirs = (
        [
            (model, name, i)
            for model, own in enumerate(found[build]["stays"])
            for name in own
            for i in own[name]
        ]
        for build in pythons
    )
    return {"seconds": rows, "kept": len(theirs), "kept_alike": len(set(ours) & set(theirs))}


def wanda() -> dict[str, Any]:
    """Time loading and Wanda on two real models in both builds, in turn, in the environment of the build before."""
    found, python = {}, str(before())
    for name, folder in {"smollm2": embedded_model(), "qwen": fetched("qwen")}.items():
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "output"
            command = [
                python,
                "-c",
                "from causalprune.cli import main; main()",
                "prune",
                str(folder),
                "-o",
                str(output),
            ]
            command += ["--method", "wanda", "-t", "gsm8k", "-n", "16"]
            data = {"CAUSALPRUNE_DATA": str(data_folder())}
            env = {"ours": data, "theirs": data}
            how = {"caches": [output, output.with_name("output.pruning")], "cwd": Path(scratch), "env": env}
            alternate(command, command, 1, **how)  # type: ignore[arg-type]
            found[name] = alternate(command, command, PAIRS, **how)  # type: ignore[arg-type]
    return found


STEPS = {
    "sweep": sweep,
    "inspect": whole_configuration,
    "experts": experts,
    "wanda": wanda,
    "hybrids": hybrids,
    "qwen": qwen,
    "gemma": gemma,
}


def figures(done: dict[str, Any]) -> dict[str, float | None]:
    """Return what each family's ranking costs and how it agrees with another draw, or with exact effects."""
    found: dict[str, float | None] = sweep_figures(done["sweep"]) if "sweep" in done else {}
    if own := done.get("inspect"):
        found |= {f"{name}_700b_seconds": value for name, value in own["seconds"].items()}
        found["inspect_700b_gib"] = own["gib"]
    if own := done.get("experts"):
        found["experts_speedup_over_before"] = median(row["theirs"] / row["ours"] for row in own["seconds"])
        found["experts_kept_alike"] = own["kept_alike"] / own["kept"]
    for name, own in done.get("wanda", {}).items():
        found[f"wanda_time_over_before_{name}"] = own["ours_over_theirs"]["wall"]["median"]
    for name, rows in done.get("hybrids", {}).items():
        own = {label.partition("-")[0]: headline(results[0]) for label, results in rows_of({"rows": rows})}
        found |= {
            f"hybrid_{name}_{method}_rise": value - own["dense"]
            for method, value in own.items()
            if method != "dense"
        }
    for effect, own in done.get("qwen", {}).items():
        found[f"qwen_{effect}_spearman_between_draws"] = own["spearman_between_draws"]
        found[f"qwen_{effect}_share_of_naive_tokens"] = own["draws"][0]["share_of_naive_tokens"]
        found[f"qwen_{effect}_seconds"] = own["draws"][0]["seconds"]
    for name, own in done.get("gemma", {}).get("estimators", {}).items():
        found[f"gemma_{name}_spearman_with_exact"] = own["spearman_with_exact"]
        found[f"gemma_{name}_share_of_naive_tokens"] = own["share_of_naive_tokens"]
    return found


def main() -> None:
    """Carry out the parts asked for, or those not done yet, and write `results/families.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="PART", help=", ".join(STEPS))
    FOLDER.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = record("families")["raw"]
    for name in parser.parse_args().steps or [name for name in STEPS if name not in done]:
        done[name] = STEPS[name]()
        if name == "sweep":
            write_page(done[name])
        print(write_figures("families", figures(done), done, seeds=[0]))


if __name__ == "__main__":
    main()
