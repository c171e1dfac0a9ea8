"""Prune a model with SparseGPT here, as `llmcompressor_masks.py` does there, and say what it took.

python causalprune_masks.py MODEL_DIR TOKENS.json OUT.safetensors [--alone]

Loaded without a tokenizer and run on one sequence at a time, as there.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from causalprune.core.memory import Masks
from causalprune.core.provenance import peak_bytes
from causalprune.core.types import Calibration, Decoder, Example
from causalprune.models.anatomy import inspect_model
from causalprune.pruning.budgets import trial
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.parts import Steps
from causalprune.pruning.walks import Gathered, planned, walk

METHOD = Method("sparsegpt", 0.5)


def alone(decoder: Decoder, calibration: Calibration) -> tuple[Masks, dict[str, float]]:
    """Prune every matrix with the intact model's inputs; return its error as a share of the output's energy."""
    plan, gathered = planned(decoder, METHOD, {}, calibration, max_batch_tokens=1), Gathered()
    keep, errors = Masks(), {}
    for layer in walk(plan, gathered, Steps(), advance_pruned=False, moments=True):
        for p in layer.projections:
            before, (after,) = p.read(), trial(plan, gathered, p, [METHOD.sparsity])
            change, hessian = after - before, gathered.moments.hessians[p.name]
            errors[p.name] = float(((change @ hessian) * change).sum() / ((before @ hessian) * before).sum())
            keep.add(p.name, after != 0)
    return keep, errors


def main() -> None:
    """Prune, write the masks and print one summary line."""
    sequences = json.loads(Path(sys.argv[2]).read_text())
    examples = tuple(Example(tuple(tokens), 1, "gsm8k", str(i)) for i, tokens in enumerate(sequences))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    decoder = inspect_model(model.eval().requires_grad_(False), None, name=sys.argv[1])
    loaded = time.perf_counter()
    calibration, errors = Calibration(examples, (0,) * len(examples)), dict[str, float]()
    if "--alone" in sys.argv:
        keep, errors = alone(decoder, calibration)
    else:
        keep = prune(decoder, METHOD, calibration=calibration, max_batch_tokens=1).keep
    seconds = time.perf_counter() - loaded
    peak = peak_bytes()["process"]
    save_file({p.parameter_name: keep[p.name] for p in decoder.projections}, sys.argv[3])
    found = {"seconds": seconds, "load_seconds": loaded - start, "peak_rss_bytes": peak, "errors": errors}
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
