"""Draw what the result files say, for the docs: `python bench/plots.py` (needs matplotlib).

docs/reliability.svg: rank correlation to the reference against cost, for every estimator and both effects.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import ROOT, record

STYLES = {"exact": ("#0072b2", "o-"), "gradient": ("#d55e00", "s"), "adaptive": ("#009e73", ".")}
TITLES = {"ce": "effect ce: rise of the cross-entropy", "kl": "effect kl: divergence from the intact model"}
HEADING = "How reliable a ranking of {} heads is for its cost (reference: {} GSM8K problems, exact)"


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that no cheaper row beats, in order of their cost."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if not found or row["spearman"] > found[-1]["spearman"]:
            found.append(row)
    return found


def reliability() -> Path:
    """Draw reliability against cost; for `adaptive`, a line through the best choices of problems and budget."""
    raw = record("attribution")["raw"]
    drawn = raw["curves"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, effect in zip(axes, ("ce", "kl"), strict=True):
        for name, (colour, style) in STYLES.items():
            rows = sorted((r for r in drawn[effect] if r["estimator"] == name), key=lambda row: row["tokens"])
            cost, rank = [[row[key] for row in rows] for key in ("tokens", "spearman")]
            axis.plot(cost, rank, style, color=colour, label=name, markersize=5)
            if name != "exact":
                cost, rank = [[row[key] for row in best(rows)] for key in ("tokens", "spearman")]
                axis.plot(cost, rank, "-", color=colour, linewidth=1)
        axis.set(
            xscale="log", title=TITLES[effect], xlabel="tokens forwarded (a backward pass counts as two)"
        )
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Spearman with the reference")
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(HEADING.format(raw["speed"]["heads"], drawn["sequences"]), fontsize=11)
    figure.tight_layout()
    path = ROOT / "docs" / "reliability.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    print(reliability())
