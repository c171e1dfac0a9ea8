"""A report's numbers for machines: one row for every model and measure, as CSV."""

import csv
import io
from collections.abc import Mapping
from typing import Any

ABOUT = ("run", "label", "method", "criterion", "scope", "sparsity", "achieved")
SIZE = ("removed", "parameters", "bytes")
GAINS = ("reading_gain", "writing_gain")
COLUMNS = (*ABOUT, *SIZE, *GAINS, "task", "metric", "n", "value", "low", "high")
DIFFERENCE = ("difference", "low", "high", "verdict")


def to_csv(told: Mapping[str, Any]) -> str:
    """Return all values with their intervals, and the paired differences to dense and to Wanda.

    Texts that a spreadsheet would take for a formula get an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [*COLUMNS, *(f"{name} to {other}" for other in ("dense", "wanda") for name in DIFFERENCE)]
    writer.writerow(header)
    for run in told["runs"]:
        for model in run["models"]:
            for task in run["tasks"]:
                cell = model["cells"].get(task["key"])
                if cell is None:
                    continue
                gains = {name: (model["speed"] or {}).get(name) for name in GAINS}
                values = {**task, **model, **gains, **cell, "run": run["name"]}
                row = [values[name] for name in COLUMNS]
                for other in ("dense", "wanda"):
                    row += [(cell[other] or {}).get(name) for name in DIFFERENCE]
                writer.writerow([_safe(value) for value in row])
    return text.getvalue()


def _safe(value: Any) -> Any:
    dangerous = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if dangerous else value
