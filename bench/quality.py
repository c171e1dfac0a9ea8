"""What pruning at 50 % costs by every method, past the paper; each row is kept, so a stopped bench goes on.

    python bench/quality.py   # rows that are not there yet (bench/quality.yaml); those of the core table are taken over

Figures: `nll_rise_<method>` in nats per token over dense, with its ratio to SparseGPT's and Wanda's, and perplexity.
"""

import shutil
from typing import Any

from common import BENCH, RUNS, data_folder, write_figures
from tables import LEFT_OUT

from causalprune.progress import shown
from causalprune.recipe import read_recipe
from causalprune.results import headline, rows_of
from causalprune.run import run

FOLDER, CORE = RUNS / "quality", RUNS / "core"


def table() -> dict[str, Any]:
    """Run the recipe; same model, calibration and batches as the core table, so its rows count here too."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("results.ledger", "attribution.ledger"):
        if (CORE / name).exists() and not (FOLDER / name).exists():
            shutil.copy(CORE / name, FOLDER / name)
    return run(read_recipe(BENCH / "quality.yaml"), FOLDER, data_dir=data_folder(), stage=shown)


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Return losses and perplexities of every method, and how its rise compares with the baselines'."""
    found: dict[str, dict[str, float]] = {}
    for label, results in rows_of(record):
        own = {r.task: headline(r) for r in results if (r.task, r.metric) != LEFT_OUT}
        found[label] = own
    dense = found.pop("dense")["gsm8k_nll"]
    rise = {label: own["gsm8k_nll"] - dense for label, own in found.items()}
    flat = {f"nll_rise_{label}": value for label, value in rise.items()}
    flat |= {f"ppl_{label}": own["wikitext2_ppl"] for label, own in found.items()}
    flat |= {f"arc_{label}": own["arc_challenge"] for label, own in found.items()}
    for base in ("sparsegpt-matrix-0.5", "wanda-row-0.5"):
        flat |= {f"rise_over_{base}_{label}": value / rise[base] for label, value in rise.items()}
    return flat


def main() -> None:
    """Measure what is missing and write `results/quality.json`."""
    record = table()
    print(write_figures("quality", figures(record), {"table": record}, seeds=[0]))


if __name__ == "__main__":
    main()
