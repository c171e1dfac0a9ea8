"""Files that ship: which formats keep exact zeros.

    python bench/fit.py zeros     # one half-empty matrix of SmolLM2 through every format that libraries offer (2 GB of packages)

Figures and raw data are in `results/fit.json`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import consumers
import numpy as np
from common import Found, carry_out, step_parser

from causalprune.checkpoints.embedded import load

NAME, MATRIX, ROWS, KEEPS = "fit", "layers.15.down", 64, 0.999


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


STEPS = {"zeros": zeros}


def main() -> None:
    """Carry out the steps that are named, or those not done yet."""
    parser = step_parser(__doc__, STEPS)
    carry_out(NAME, STEPS, parser, parser.parse_args().steps)


if __name__ == "__main__":
    sys.exit(main())
