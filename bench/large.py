"""What pruning costs for checkpoints far larger than comfort; each step is kept, so a stopped bench goes on.

    python bench/large.py             # all steps that are not there yet
    python bench/large.py eight       # an 8-billion-parameter checkpoint, written, copied, pruned, deleted (40 GB)
    python bench/large.py equal       # streaming against pruning in memory, three families, three dtypes
    python bench/large.py layers      # wanda on a 1.2-billion-parameter checkpoint, streaming and in memory (8 GB)
    python bench/large.py ray         # Ray on this machine: equal bits, speed (bench/cluster.py; causalprune[ray], a quiet machine)
    python bench/large.py schedule    # 64 simulated workers (bench/cluster.py)
    python bench/large.py finetune    # zeros of SmolLM2 in training, and after merging an adapter (bench/tuning.py)
    python bench/large.py interop     # a pruned SmolLM2 in llama.cpp and onnxruntime (bench/consumers.py; 3 GB)
    python bench/large.py kills       # 50 runs killed at random moments and started again (bench/faults.py)
    python bench/large.py fuzz        # 10,000 random files of every kind (bench/faults.py)

The 8-billion-parameter checkpoint has the shape and the files of Llama 3 8B and random weights. Where the kernel
lets it, the page cache is emptied before copying and before pruning.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster
import consumers
import faults
import torch
import tuning
from common import data_folder, record, write_figures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from causalprune.checkpoints.embedded import resolve
from causalprune.checkpoints.saving import load_effects, load_keep, read_manifest, save, save_effects
from causalprune.core.progress import shown
from causalprune.core.provenance import git_commit
from causalprune.core.types import Effects
from causalprune.interventions.units import list_units
from causalprune.models.anatomy import outline
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.streaming.files import Seen, prune_stream, stored_fingerprint

EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
EIGHT |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
ONE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
ONE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
"""Llama 3.2 1B."""
SHARD_BYTES = 5e9
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eight() -> dict[str, Any]:
    """Write, copy and prune the large checkpoint; report seconds, memory and the zeros that were counted."""
    place = Path(os.environ.get("CAUSALPRUNE_SCRATCH", tempfile.gettempdir())) / "causalprune-large"
    shutil.rmtree(place, ignore_errors=True)
    source = place / "source"
    try:
        size = write_checkpoint(source)
        effects = _random_effects(source, place / "effects.json")
        cold = forget_pages()
        start = time.perf_counter()
        shutil.copytree(source, place / "copy")
        os.sync()
        copied = time.perf_counter() - start
        shutil.rmtree(place / "copy")
        forget_pages()
        command = [str(Path(sys.executable).parent / "causalprune"), "prune", str(source), "--stream"]
        command += [
            "-o",
            str(place / "pruned"),
            "--method",
            "cap",
            "--sparsity",
            "0.5",
            "--effects",
            str(effects),
        ]
        start = time.perf_counter()
        peak = _peak_memory(subprocess.Popen(command))
        seconds = time.perf_counter() - start
        own = read_manifest(place / "pruned")["sparsity"]
        return {
            "bytes": size,
            "cold_cache": cold,
            "copy_seconds": copied,
            "prune_seconds": seconds,
            "peak_rss_bytes": peak,
            "weights": own["weights"],
            "zeros": own["zeros"],
            "wanted": round(0.5 * own["weights"]),
            "largest_matrix_bytes": max(row["weights"] for row in own["projections"]) * 2,
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def layers() -> dict[str, Any]:
    """Prune a checkpoint with `wanda` by streaming and in memory; report seconds and memory, and compare every byte."""
    place = Path(os.environ.get("CAUSALPRUNE_SCRATCH", tempfile.gettempdir())) / "causalprune-layers"
    shutil.rmtree(place, ignore_errors=True)
    try:
        size = write_checkpoint(place / "source", ONE)
        AutoTokenizer.from_pretrained(resolve("embedded")).save_pretrained(place / "source")
        command = [str(Path(sys.executable).parent / "causalprune"), "prune", str(place / "source")]
        command += ["--method", "wanda", "--sparsity", "0.5", "-n", "4", "-t", "gsm8k"]
        command += ["--data-dir", str(data_folder())]
        found: dict[str, Any] = {"bytes": size}
        for name, options in (("stream", ["--stream"]), ("memory", [])):
            start = time.perf_counter()
            peak = _peak_memory(subprocess.Popen([*command, "-o", str(place / name), *options]))
            found[name] = {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak}
        own = read_manifest(place / "stream")["sparsity"]
        return {**found, "zeros": own["zeros"], "weights": own["weights"], "equal": _equal(place)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _equal(place: Path) -> bool:
    """Compare two checkpoints tensor by tensor."""
    shards = [shard_of(place / name) for name in ("stream", "memory")]
    if shards[0].keys() != shards[1].keys():
        return False
    for name in shards[0]:
        values = []
        for where in shards:
            with safe_open(where[name], "pt") as file:
                values.append(file.get_tensor(name).view(torch.int16))
        if not torch.equal(*values):
            return False
    return True


def shard_of(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def write_checkpoint(folder: Path, shape: dict[str, Any] = EIGHT) -> int:
    """Write a checkpoint with random weights, shard by shard, as `save_pretrained` would; return its bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, parameter in model.named_parameters():
        if held + parameter.numel() * 2 > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tuple(parameter.shape)
        held += parameter.numel() * 2
    where, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    with shown("writing a checkpoint") as progress:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            values = {
                n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                for n, s in shard.items()
            }
            save_file(values, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            total += sum(value.numel() * 2 for value in values.values())
            progress(number, len(shards))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _random_effects(source: Path, path: Path) -> Path:
    """Write effects of all heads that belong to the checkpoint and are made up."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    units = tuple(list_units(outline(model, None, name=str(source)), ["heads"]))
    with shown("fingerprint") as progress:
        found = stored_fingerprint(source, progress)
    nats = torch.rand(len(units), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, dtype=torch.long)
    save_effects(
        Effects(units, nats, torch.zeros(3).double(), ones, ones.cumsum(0) - 1, found, "made up"), path
    )
    return path


def _peak_memory(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return its largest resident set in bytes: of its own, not what a fork began with."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max([peak, *(int(line[1]) * 1024 for line in lines)])
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"pruning ended with exit code {process.returncode}")
    return peak


def forget_pages() -> bool:
    """Empty the page cache; return whether this machine lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def equal() -> dict[str, Any]:
    """Prune small models of three families in three dtypes both ways, and compare every byte."""
    found = {}
    for family in ("llama", "qwen2", "gpt_neox"):
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                shape = {k: v for k, v in SMALL.items() if k != "num_key_value_heads" or family != "gpt_neox"}
                config: Any = AutoConfig.for_model(family, **shape, dtype=dtype)
                model: Any = AutoModelForCausalLM.from_config(config).to(dtype)
                model.save_pretrained(place / "source", max_shard_size="100KB")
                found[f"{family}, {dtype}"] = _same(place)
    return {"compared": found}


def _same(place: Path) -> bool:
    effects_file = _random_effects(place / "source", place / "effects.json")
    decoder = load(str(place / "source"))
    effects = load_effects(effects_file, decoder)
    method = Method("cap", 0.5)
    save(decoder, place / "memory", prune(decoder, method, effects=effects))
    prune_stream(place / "source", place / "stream", method, seen=Seen(effects=effects))
    both = [_bytes(place / name) for name in ("memory", "stream")]
    keeps = [load_keep(place / name) for name in ("memory", "stream")]
    same = keeps[0].keys() == keeps[1].keys()
    return both[0] == both[1] and same and all(torch.equal(keeps[0][n], keeps[1][n]) for n in keeps[0])


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.glob("*.safetensors") if file.name != "keep_masks.safetensors"]
    found = {name: value for file in files for name, value in load_file(file).items()}
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in found.items()
    }


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that the claims rest on, from the steps that are done."""
    found: dict[str, float] = {}
    if (one := done.get("eight")) is not None:
        found["peak_rss_gib"] = one["peak_rss_bytes"] / 2**30
        found["time_over_copy"] = one["prune_seconds"] / one["copy_seconds"]
        found["sparsity_error_weights"] = abs(one["zeros"] - one["wanted"])
    if (one := done.get("equal")) is not None:
        found["stream_equals_memory"] = float(all(one["compared"].values()))
    if (one := done.get("layers")) is not None:
        found["layers_peak_rss_gib"] = one["stream"]["peak_rss_bytes"] / 2**30
        found["layers_memory_peak_rss_gib"] = one["memory"]["peak_rss_bytes"] / 2**30
        found["layers_equal_memory"] = float(one["equal"])
    return (
        found | consumers.figures(done) | cluster.figures(done) | faults.figures(done) | tuning.figures(done)
    )


STEPS: dict[str, Callable[[], dict[str, Any]]] = {"equal": equal, "eight": eight, "layers": layers}
STEPS |= {
    "ray": cluster.ray,
    "schedule": cluster.schedule,
    "finetune": tuning.finetune,
    "interop": consumers.interop,
    "kills": faults.kills,
    "fuzz": faults.fuzz,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/large.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    known = record("large")["raw"]
    for name in parser.parse_args().steps or [name for name in STEPS if name not in known]:
        print(f"== {name}", flush=True)
        found = {**STEPS[name](), "commit": git_commit(), "threads": torch.get_num_threads()}
        done = {**record("large")["raw"], name: found}  # read anew: another step may have ended meanwhile
        print(write_figures("large", figures(done), done, seeds=[0]))


if __name__ == "__main__":
    main()
