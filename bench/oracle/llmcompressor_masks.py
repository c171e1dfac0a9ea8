"""Prune a Hugging Face model with llm-compressor's own modifiers and save what it kept.

Runs in this folder's own environment (see README.md); imports nothing of causalprune.

    python llmcompressor_masks.py MODEL_DIR TOKENS.json OUT.safetensors --method wanda --sparsity 0.5
"""

import argparse
import json
import logging
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when llm-compressor, tqdm and the hub client are imported.
# ERROR, because llm-compressor's per-matrix METRIC lines rank above WARNING.
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers.pruning import (
    MagnitudePruningModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import (
    accumulate_hessian,
    make_empty_hessian,
    sparsify_weight,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

CALIBRATED = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of all Linear modules except the output head."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def token_loader(sequences: list[list[int]]) -> DataLoader[list[int]]:
    """Serve the sequences in file order, one per batch, unpadded and untruncated.

    A DataLoader is used as it is; a Dataset would be shuffled and cut to 512 samples.
    """

    def collate(batch: list[list[int]]) -> dict[str, Tensor]:
        ids = torch.tensor(batch)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return DataLoader(sequences, batch_size=1, shuffle=False, collate_fn=collate)


def prune_calibrated(
    model: PreTrainedModel, method: str, targets: list[str], sequences: list[list[int]], sparsity: float
) -> None:
    """Run Wanda or SparseGPT through `oneshot`, decoder layer by decoder layer."""
    modifier = CALIBRATED[method](sparsity=sparsity, mask_structure="0:0", targets=targets)
    # A DataLoader needs no tokenizer; any object keeps `oneshot` from loading one from MODEL_DIR.
    oneshot(
        model=model,
        processor=object(),
        recipe=modifier,
        dataset=token_loader(sequences),
        pipeline="sequential",
    )


def prune_alone(
    model: PreTrainedModel, names: list[str], sequences: list[list[int]], sparsity: float
) -> dict[str, float]:
    """Run SparseGPT on every matrix with the intact model's inputs; return its error as a share of the output's energy."""
    modules = {name: model.get_submodule(name) for name in names}
    found = {name: (make_empty_hessian(module), 0) for name, module in modules.items()}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
            found[name] = accumulate_hessian(args[0], module, *found[name])

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with torch.inference_mode():
        for tokens in sequences:
            model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    errors = {}
    for name, module in modules.items():
        hessian, before = found.pop(name)[0], module.weight.detach().clone()
        own = {module: hessian.clone()}
        after = sparsify_weight(module, own, sparsity, 0, 0, 128, 0.01, preserve_sparsity_mask=False)[1]
        module.weight.data = after
        change = after - before
        errors[name] = float(((change @ hessian) * change).sum() / ((before @ hessian) * before).sum())
    return errors


def prune_magnitude(model: PreTrainedModel, targets: list[str], sparsity: float) -> None:
    """Run the magnitude modifier through one training step's events.

    `oneshot` never applies this modifier's masks: it multiplies them in only after an optimizer step.
    """
    modifier = MagnitudePruningModifier(
        targets=targets, init_sparsity=sparsity, final_sparsity=sparsity, start=0.0, end=1.0
    )
    session = active_session()
    session.reset()
    session.initialize(model=model, recipe=modifier, start=-1)
    LifecycleCallbacks.batch_start()
    LifecycleCallbacks.optim_post_step()
    session.finalize()


def memory_bytes(field: str) -> int:
    """Return VmRSS or VmHWM (peak RSS) of this process.

    `ru_maxrss` would also count the parent that started us, as it survives exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def main() -> None:
    """Parse the command line, prune, write the masks and print one summary line."""
    parser = argparse.ArgumentParser(description="Masks of llm-compressor's pruning modifiers.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("tokens", type=Path, help="JSON: list of lists of token ids")
    parser.add_argument("out", type=Path, help="safetensors file of bool keep masks")
    parser.add_argument("--method", choices=("wanda", "magnitude", "sparsegpt"), required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--alone", action="store_true", help="every matrix with the intact model's inputs")
    args = parser.parse_args()
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # a deprecation in the tracer
    sequences: list[list[int]] = json.loads(args.tokens.read_text())

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    names = linear_names(model)
    load_seconds, rss_before = time.perf_counter() - start, memory_bytes("VmRSS")

    start, cpu_start = time.perf_counter(), time.process_time()
    errors: dict[str, float] = {}
    if args.alone:
        errors = prune_alone(model, names, sequences, args.sparsity)
    elif args.method == "magnitude":
        prune_magnitude(model, names, args.sparsity)
    else:
        prune_calibrated(model, args.method, names, sequences, args.sparsity)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = memory_bytes("VmHWM")

    keep = {f"{name}.weight": model.get_parameter(f"{name}.weight").ne(0) for name in names}
    info = {
        "method": args.method,
        "sparsity": args.sparsity,
        "achieved": 1 - sum(int(k.sum()) for k in keep.values()) / sum(k.numel() for k in keep.values()),
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "load_seconds": round(load_seconds, 3),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "rss_before_bytes": rss_before,
        "peak_rss_bytes": peak,
        "threads": torch.get_num_threads(),
    }
    info |= {package: version(package) for package in ("llmcompressor", "torch", "transformers")}
    save_file(keep, args.out, metadata={key: str(value) for key, value in info.items()})
    print(json.dumps({**info, "errors": errors}))


if __name__ == "__main__":
    main()
