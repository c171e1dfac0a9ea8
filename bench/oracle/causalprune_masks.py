"""Prune the embedded model with SparseGPT here, as `llmcompressor_masks.py` does there, and say what it took.

python causalprune_masks.py TOKENS.json OUT.safetensors
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from causalprune.embedded import load
from causalprune.methods import Method
from causalprune.pruning import prune
from causalprune.types import Calibration, Example


def main() -> None:
    """Prune, write the masks and print one summary line."""
    sequences = json.loads(Path(sys.argv[1]).read_text())
    examples = tuple(Example(tuple(tokens), 1, "gsm8k", str(i)) for i, tokens in enumerate(sequences))
    start = time.perf_counter()
    decoder = load("embedded")
    loaded = time.perf_counter()
    pruned = prune(decoder, Method("sparsegpt", 0.5), calibration=Calibration(examples, (0,) * len(examples)))
    seconds = time.perf_counter() - loaded
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    save_file({p.parameter_name: pruned.keep[p.name] for p in decoder.projections}, sys.argv[2])
    found = {"seconds": seconds, "load_seconds": loaded - start, "peak_rss_bytes": peak}
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
