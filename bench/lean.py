"""What training without states costs and gains, against the build before and SparseGPT; a stopped bench goes on step by step.

    python bench/lean.py                 # all steps that are not there yet (many hours, `qwen` and `draws` most of them)
    python bench/lean.py smollm2 kills   # some of them, anew

Steps: bytes (of training, for each weight), smollm2, gemma, qwen (both builds in turn on 48 problems, and with text of the
model's own preserved: time and loss), more (problems in the time of the build before), stream (from files against in memory), large
(a step of training in the shape of Llama 3 8B), kills, draws (defaults against SparseGPT over five draws of problems), pattern (2:4),
mix (calibrated on four sources), solved (answers of Qwen2.5-Coder-0.5B, calibrated on its own).
"""

import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import faults
import numpy as np
import torch
from before import alternate, before, timed, variables
from common import BENCH, Found, carry_out, data_folder, kept, made, record, step_parser
from large import EIGHT, write_checkpoint
from models import fetched
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import load as load_embedded
from causalprune.checkpoints.saving import save
from causalprune.core.places import cache_folder
from causalprune.core.provenance import peak_bytes
from causalprune.core.resuming import State
from causalprune.core.types import Decoder, EvalResult, Example
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, paired_difference
from causalprune.evaluation.settings import Settings
from causalprune.models import open_checkpoint
from causalprune.models.loading import load
from causalprune.pruning import training
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import CalibrationSpec
from causalprune.runs.rows import parse_method, writes_own
from causalprune.runs.traces import calibrated
from causalprune.streaming import files
from causalprune.streaming.copies import Copies
from causalprune.streaming.residence import HiddenStates
from causalprune.streaming.stored import Store

KEPT = BENCH / "runs" / "lean"
"""Checkpoints of both builds."""
MODELS = {"smollm2": ("embedded", "auto"), "gemma": ("gemma", "float32"), "qwen": ("qwen", "bfloat16")}
BUILDS = {"smollm2": ("ours", "before", "preserve")}
"""What prunes a model, in turn, once each where three times were asked for; with text of its own no figure asks for the others."""
PROBLEMS, DRAWS = 48, 5
METHODS = ("causal", "sparsegpt")
MIX = ("gsm8k", "strategyqa", "arc_challenge", "wikitext2")
MIX_ONS = ("gsm8k_nll:200", "arc_challenge_nll:200", "strategyqa_nll:200", "wikitext2_ppl:40000")
ANSWERS, ANSWERED_DRAWS = "gsm8k_answers:800", 3
ONS = ("gsm8k_nll:200", "wikitext2_ppl:40000")
COMMAND = "from causalprune.cli import main; main()"
SHORT = 64, 128
"""Tokens of two steps of training, below the positions whose logits exist at once: what the first has beyond half of the second stays."""
BY_LAYERS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lean import step_from_files, step_in_memory
{"files": step_from_files, "memory": step_in_memory}[sys.argv[2]](Path(sys.argv[3]))
"""


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in its block and still there, and their peak; views of a model are none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        there = [*model.parameters(), *model.buffers()]
        self._known = {own.untyped_storage()._cdata for own in there}  # noqa: SLF001

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 (of the same memory, the same)
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def bytes_of_training() -> Found:
    """Return the bytes for each weight that a step of training holds beside parameters and what grows with tokens."""
    decoder = load(str(fetched("qwen")), dtype="bfloat16", device="cpu")
    weights = sum(p.size for p in decoder.projections)
    tokens = calibrate(decoder.tokenizer, ["gsm8k"], n=8, data_dir=data_folder()).examples
    line = [token for example in tokens for token in example.tokens]
    peaks = {}
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            parameter.mul_(1)  # files are mapped: here they become memory
    for count in SHORT:
        example = Example(tuple(line[:count]), 1, "lean", "lean")
        followed = training.lessons(decoder, [example], 2048)
        gc.collect()
        with Live(decoder.model) as live, one_round():
            training.distill(decoder, followed, how=training.Training(), on_step=lambda *now: None)
        peaks[str(count)] = live.peak
    fixed = 2 * peaks[str(SHORT[0])] - peaks[str(SHORT[1])]
    return {
        "figures": {"train_bytes_per_weight": fixed / weights},
        "raw": {"peaks": peaks, "weights": weights},
    }


@contextmanager
def one_round() -> Iterator[None]:
    """Let training go through the data once."""
    own = training.FEWEST, training.MOST
    training.FEWEST = training.MOST = 1
    try:
        yield
    finally:
        training.FEWEST, training.MOST = own


def builds(name: str) -> Found:
    """Prune with both builds in turn on the same problems, and with text of its own preserved; compare times and losses."""
    model, dtype = MODELS[name]
    model = model if model == "embedded" else str(fetched(model))
    words = ["prune", model, "-t", "gsm8k", "-n", str(PROBLEMS), "--sparsity", "0.5", "--method", "causal"]
    words += ["--dtype", dtype, "--device", "cpu", "--data-dir", str(data_folder())]
    KEPT.mkdir(parents=True, exist_ok=True)
    places = {build: KEPT / f"{name}-{build}" for build in BUILDS.get(name, ("ours", "before"))}
    pythons = {"ours": sys.executable, "before": str(before()), "preserve": sys.executable}
    own = {"ours": ["--preserve", "none"], "before": [], "preserve": ["--preserve", "own"]}
    commands = {
        build: [pythons[build], "-c", COMMAND, *words, *own[build], "-o", str(places[build])]
        for build in places
    }
    seconds = {}
    for build, command in commands.items():
        seconds[build] = once(command, places[build])
        print(name, build, seconds[build], flush=True)
    results = {build: measured(path, dtype) for build, path in {"dense": Path(model), **places}.items()}
    losses, texts = ({build: own[at] for build, own in results.items()} for at in (0, 1))
    apart = paired_difference(losses["ours"], losses["before"])
    ratios = {build: own / seconds["before"] for build, own in seconds.items()}
    figures = {f"loss_minus_before_{name}_high": apart.high}
    pairs = {"ours - before": vars(apart)}
    if name != "gemma":
        figures[f"time_over_before_{name}"] = ratios["ours"]
    if "preserve" in places:
        cost = paired_difference(losses["preserve"], losses["ours"])
        pairs["preserve - ours"] = vars(cost)
        figures["time_with_preserve_over_before_smollm2"] = ratios["preserve"]
        figures["ppl_over_dense_50"] = headline(texts["preserve"]) / headline(texts["dense"])
        figures["task_cost_of_preserve"] = cost.difference
    values = {
        build: [{"value": headline(one), "values": list(one.values)} for one in both]
        for build, both in results.items()
    }
    raw = {"seconds": seconds, "ratios": ratios, "on": ONS, "measured": values, **pairs, **made()}
    return {"figures": figures, "raw": raw}


def more() -> Found:
    """Prune with as many problems as the build before's time for 48 has room for, by the ratio that `smollm2` found."""
    ratio = record("lean")["raw"]["smollm2"]["raw"]["ratios"]["ours"]
    count, place = int(PROBLEMS / ratio), KEPT / "smollm2-more"
    words = ["prune", "embedded", "-t", "gsm8k", "-n", str(count), "--preserve", "none", "--sparsity", "0.5"]
    words += ["--device", "cpu", "--data-dir", str(data_folder()), "-o", str(place)]
    seconds = once([sys.executable, "-c", COMMAND, *words], place)
    dense, ours = (measured(path)[0] for path in (Path("embedded"), place))
    apart = paired_difference(ours, dense)
    return {
        "figures": {"rise_at_before_time": apart.difference},
        "raw": {
            "problems": count,
            "seconds": seconds,
            "ours - dense": vars(apart),
            "values": list(ours.values),
        },
    }


def once(command: list[str], place: Path) -> float:
    """Prune to a place with nothing of the product's caches, and return the seconds; a place that is there is kept."""
    note = place.with_name(f"{place.name}.seconds")
    if not note.exists():
        for path in (place, place.with_name(f"{place.name}.pruning"), cache_folder() / "own"):
            shutil.rmtree(path, ignore_errors=True)
        note.write_text(str(timed(command, env=variables(ours=command[0] == sys.executable))["wall"]))
    return float(note.read_text())


def measured(model: Path, dtype: str = "auto") -> list[EvalResult]:
    """Return the loss of a model on test problems, and its perplexity on general text."""
    decoder = load_embedded(str(model), dtype=dtype, device="cpu")
    return evaluate(decoder, ONS, Settings(data_dir=data_folder()))


def stream() -> Found:
    """Prune SmolLM2 in memory and from its files in turn, and compare times and bytes."""
    with tempfile.TemporaryDirectory(dir=BENCH) as scratch:
        place = Path(scratch)
        save(load_embedded("embedded"), place / "float32")
        save(load_embedded("embedded", dtype="bfloat16"), place / "bfloat16")
        ratios, equal = [], []
        for dtype, count, pairs in (("float32", PROBLEMS, 1), ("bfloat16", 4, 1)):
            words = [
                sys.executable,
                "-c",
                COMMAND,
                "prune",
                str(place / dtype),
                "-t",
                "gsm8k",
                "-n",
                str(count),
            ]
            words += ["--sparsity", "0.5", "--preserve", "none", "--data-dir", str(data_folder())]
            files, memory = place / f"{dtype}-files", place / f"{dtype}-memory"
            ours = [*words, "--stream", "-o", str(files)]
            theirs, env = [*words, "--no-stream", "-o", str(memory)], {"theirs": variables(ours=True)}
            times = alternate(ours, theirs, pairs, env=env)
            if dtype == "float32":
                ratios = times["ours_over_theirs"]["wall"]["ratios"]
            own, other = (load_file(path / "model.safetensors") for path in (files, memory))
            equal.append(
                own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in other)
            )
    figures = {
        "stream_equals_memory": int(all(equal)),
        "stream_time_over_memory_smollm2": statistics.median(ratios),
    }
    return {"figures": figures, "raw": {"ratios": ratios, "equal": equal}}


def large() -> Found:
    """Return the peaks of memory of one step of training of a model of 8 billion weights, 2 × 64 tokens."""
    peaks = {}
    with tempfile.TemporaryDirectory(dir=BENCH) as scratch:
        write_checkpoint(Path(scratch) / "eight", EIGHT)
        for way in ("files", "memory"):
            words = [sys.executable, "-c", BY_LAYERS, str(BENCH), way, str(Path(scratch) / "eight")]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            peaks[way] = float(done.stdout.split()[-1]) / 2**30
    figures = {"stream_peak_gib_8b": peaks["files"], "memory_peak_gib_8b": peaks["memory"]}
    return {"figures": figures, "raw": {"gib": peaks}}


def step_in_memory(folder: Path) -> None:
    """Train a loaded model for a step, and print the most bytes that were resident."""
    decoder = load(str(folder), dtype="bfloat16", device="cpu")
    followed = training.lessons(decoder, two(), 64)
    with one_round():
        training.distill(decoder, followed, how=training.Training(), on_step=lambda *now: None)
    print(peak_bytes()["process"])


def step_from_files(folder: Path) -> None:
    """Train a model in files for a step, and print the most bytes that were resident."""
    stored = open_checkpoint(folder)
    _, sources = files._opened(folder, stored, Store(0, lambda *now: None))  # noqa: SLF001 (one step, and nothing before it)
    with files._residence(folder, sources, stored, torch.device("cpu"), head=True) as residence, one_round():  # noqa: SLF001
        state = State(folder.with_name("copies"), needed=True)
        copies, hidden = Copies(state, residence), HiddenStates(2.0**30, folder.parent)
        followed = training.lessons(residence.decoder, two(), 64, hold=hidden.keep)
        how = training.Training(hold=hidden.keep, around=copies.around)
        training.distill(residence.decoder, followed, how=how, on_step=lambda *now: None, state=state)
    print(peak_bytes()["process"])


def two() -> list[Example]:
    """Return two sequences of 64 tokens."""
    return [Example(tuple(range(at, at + 64)), 1, str(at), str(at)) for at in (100, 300)]


def kills() -> Found:
    """Kill 20 runs from files at random moments, start each again, and compare every byte."""
    found = faults.kills(20, "fitting from files")
    lost = sum(bool(kill["lost"]) for kill in found["kills"])
    return {"figures": {"kills_lost": lost}, "raw": found}


def against(name: str, methods: tuple[str, str], sparsity: float | None, draws: int) -> Found:
    """Return the rise of one method over that of SparseGPT on the same problems, over some draws of them; defaults else.

    What a draw gave is kept, so that a stopped step goes on.
    """
    dense = kept(
        "lean/dense", lambda: [(list(own.values), headline(own)) for own in measured(Path("embedded"))]
    )
    rises: dict[str, list[list[float]]] = {method: [] for method in methods}
    texts: dict[str, list[float]] = {method: [] for method in methods}
    for seed in range(draws):
        for method in methods:
            row = f"lean/{name}-{method.replace(':', '-')}-{seed}"
            losses, perplexity = kept(row, partial(drawn, parse_method(method, sparsity), seed))
            rises[method].append(list(np.array(losses) - np.array(dense[0][0])))
            texts[method].append(perplexity / dense[1][1])
            print(name, method, seed, float(np.mean(rises[method][-1])), texts[method][-1], flush=True)
    means = {method: np.mean(own, 0) for method, own in rises.items()}
    ours, theirs = (means[method] for method in methods)
    at = np.random.default_rng(0).integers(len(ours), size=(10_000, len(ours)))
    low, high = np.percentile(ours[at].sum(1) / theirs[at].sum(1), (2.5, 97.5))
    raw = {"rises": rises, "interval": [low, high], "ppl_over_dense": texts}
    raw["by_draw"] = {method: [float(np.mean(one)) for one in own] for method, own in rises.items()}
    return {"figures": {name: float(ours.sum() / theirs.sum())}, "raw": raw}


def drawn(method: Method, seed: int) -> tuple[list[float], float]:
    """Return the losses and the perplexity after pruning the embedded model by a method, with a draw of problems."""
    wanted = CalibrationSpec(("gsm8k",), n=PROBLEMS, seed=seed)
    losses, text = halved(load_embedded("embedded", device="cpu"), method, wanted, ONS)
    return list(losses.values), headline(text)


def halved(
    decoder: Decoder, method: Method, wanted: CalibrationSpec, on: tuple[str, ...]
) -> list[EvalResult]:
    """Return what is measured after pruning a model by a method, with what the method preserves by default."""
    prune(
        decoder,
        method,
        calibration=calibrated(decoder, wanted.settled(writes_own(method)), data_folder()),
    )
    return evaluate(decoder, on, Settings(data_dir=data_folder()))


def results(row: str, make: Callable[[], list[EvalResult]]) -> list[EvalResult]:
    """Return the results of a row, which is measured once and kept without its texts."""
    found = kept(row, lambda: [asdict(replace(own, texts=(), prompts=(), golds=())) for own in make()])
    return [EvalResult(**own) for own in found]


def mix() -> Found:
    """Calibrate on four sources and count the losses, each of one source's, that are better than SparseGPT's by interval."""
    rows = {name: results(f"lean/mix-{name}", partial(mixed, parse_method(name, 0.5))) for name in METHODS}
    pairs = {own.task: paired_difference(own, other) for own, other in zip(*rows.values(), strict=True)}
    figures = {"mix_losses_better_than_sparsegpt": sum(own.verdict == "better" for own in pairs.values())}
    values = {name: {own.task: headline(own) for own in row} for name, row in rows.items()}
    raw = {"values": values, "causal - sparsegpt": {task: vars(own) for task, own in pairs.items()}}
    return {"figures": figures, "raw": raw}


def mixed(method: Method) -> list[EvalResult]:
    """Return what is measured of the embedded model after pruning it by a method, with examples of four sources."""
    decoder = load_embedded("embedded", device="cpu")
    return halved(decoder, method, CalibrationSpec(MIX, n=64), MIX_ONS)


def solved() -> Found:
    """Let Qwen2.5-Coder-0.5B solve problems, whole and pruned by two methods with answers of its own to some draws of problems."""
    (dense,) = results("lean/solved-dense", lambda: answered(None, 0))
    shares: dict[str, list[EvalResult]] = {name: [] for name in METHODS}
    for seed in range(ANSWERED_DRAWS):
        for name in METHODS:
            method = parse_method(name, 0.5)
            shares[name] += results(f"lean/solved-{name}-{seed}", partial(answered, method, seed))
            print("solved", name, seed, headline(shares[name][-1]) / headline(dense), flush=True)
    own, other = (np.mean([one.values for one in shares[name]], 0) for name in METHODS)
    at = np.random.default_rng(0).integers(len(own), size=(10_000, len(own)))
    apart = np.percentile((own - other)[at].mean(1), (2.5, 97.5)).tolist()
    figures = {
        "qwen_solved_share_50": float(own.mean()) / headline(dense),
        "qwen_solved_share_50_sparsegpt": float(other.mean()) / headline(dense),
        "qwen_solved_minus_sparsegpt_low": apart[0],
    }
    values = {name: [list(one.values) for one in row] for name, row in shares.items()}
    raw = {"dense": list(dense.values), "solved": values, "interval of causal - sparsegpt": apart}
    return {"figures": figures, "raw": raw}


def answered(method: Method | None, seed: int) -> list[EvalResult]:
    """Return which problems Qwen2.5-Coder-0.5B solves, whole or after pruning with a draw of problems and its own answers to them."""
    model, dtype = MODELS["qwen"]
    decoder = load(str(fetched(model)), dtype=dtype, device="cpu")
    if method is None:
        return evaluate(decoder, [ANSWERS], Settings(data_dir=data_folder()))
    return halved(decoder, method, CalibrationSpec(("own:gsm8k",), n=PROBLEMS, seed=seed), (ANSWERS,))


STEPS: dict[str, Callable[[], Found]] = {
    "bytes": bytes_of_training,
    "smollm2": partial(builds, "smollm2"),
    "more": more,
    "kills": kills,
    "stream": stream,
    "large": large,
    "gemma": partial(builds, "gemma"),
    "draws": partial(against, "rise_over_sparsegpt_50", METHODS, 0.5, DRAWS),
    "pattern": partial(against, "causal_24_rise_over_sparsegpt_24", ("causal:2:4", "sparsegpt:2:4"), None, 1),
    "mix": mix,
    "qwen": partial(builds, "qwen"),
    "solved": solved,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/lean.json`."""
    parser = step_parser(__doc__, STEPS)
    carry_out("lean", STEPS, parser, parser.parse_args().steps)


if __name__ == "__main__":
    main()
