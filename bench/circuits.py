"""Circuits: is relevance right, are known circuits found, and what is there in real models.

    python bench/circuits.py constructed planted   # minutes to an hour
    python bench/circuits.py                       # all steps that are not done yet, about 12 hours on two cores

Every search is resumable (bench/runs/circuits/); every planting and every row is kept in bench/rows/. `relevance` needs lxt in
an environment of its own (bench/oracle/lxt_relevance.py says how), whose Python $CAUSALPRUNE_LXT names.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, ROWS, RUNS, Found, carry_out, data_folder, kept, made, step_parser
from models import fetched
from torch import Tensor

import causalprune as cp
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.checkpoints.embedded import embedded_model
from causalprune.circuits.behaviour import Behaviour, Trials, behaviour
from causalprune.circuits.checking import Checks, examined
from causalprune.circuits.curves import RESAMPLES, SHARES, areas, faithfulness, resampled
from causalprune.circuits.finding import Search, halves, ledger
from causalprune.circuits.ranking import order_of, prefix, resampled_orders, stability
from causalprune.circuits.records import CIRCUIT, Circuit, load_circuit, save_circuit
from causalprune.core.errors import OptionError
from causalprune.core.progress import shown
from causalprune.core.provenance import peak_bytes
from causalprune.core.types import Calibration, Decoder, Example
from causalprune.evaluation.settings import Settings
from causalprune.interventions.losses import target_logits, targets
from causalprune.interventions.lrp import relevance as relevances
from causalprune.interventions.lrp import ruled
from causalprune.interventions.units import list_units
from causalprune.runs.circuits import measured_on

sys.path.insert(0, str(ROOT / "tests"))
from constructed import TRUE, constructed, problems

FOLDER = RUNS / "circuits"
MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": embedded_model,
    "qwen": lambda: fetched("qwen"),
    "gemma": lambda: fetched("gemma"),
}
TASKS = ("gsm8k", "strategyqa", "arc_challenge")
SCORED, DECIDED = 48, 60
"""Problems; 100 to decide on were cut: see docs/log.md."""
TESTED = 8
"""Problems of random circuits and of tests of hypotheses: some 500 passes over them."""
ESTIMATORS: dict[str, tuple[str, int, str, int]] = {
    "kl learned": ("integrated", 1, "kl", 10),
    "learned": ("integrated", 1, "ce", 10),
    "kl integrated x3": ("integrated", 3, "kl", 0),
    "kl integrated": ("integrated", 1, "kl", 0),
    "kl gradient x3": ("gradient", 3, "kl", 0),
    "kl gradient": ("gradient", 1, "kl", 0),
    "integrated x3": ("integrated", 3, "ce", 0),
    "integrated": ("integrated", 1, "ce", 0),
    "gradient": ("gradient", 1, "ce", 0),
    "gradient x3": ("gradient", 3, "ce", 0),
    "relevance": ("relevance", 1, "ce", 0),
    "relevance x3": ("relevance", 3, "ce", 0),
}
"""Estimator, rounds, effect, epochs in which gates are learned."""
DEFAULT = "kl learned"
BASELINES = ("random", "activation", "magnitude", "wanda")
GRID = {
    "neurons:1": (DEFAULT, "kl integrated x3", "kl gradient", "gradient", "relevance", *BASELINES),
    "heads": (DEFAULT, "gradient", "relevance", "adaptive", "random"),
    "heads+neurons:1": (DEFAULT, "gradient", "random"),
}
DRAWS = {
    **{("neurons:1", method): 2 for method in (DEFAULT, "gradient", "random")},
    **{("heads", method): 2 for method in ("gradient", "random")},
}
"""Draws of the problems that score; one of the other methods. For heads the other baselines and a second learned order were cut."""
PLANTED = (3.0, 1.0, 0.3, 0.1, 0.05)
PLANTINGS = {"smollm2": (2, PLANTED), "qwen": (1, PLANTED[:3])}
"""How many of which strengths: SmolLM2's first of each chooses how to look, all others report. Most of the second model's were cut."""
PAIRED = {"smollm2": ("learned", "integrated x3", "integrated", "gradient", "relevance", "random")}
SHORT = ("learned", "gradient", "random")
"""Methods for pairs, and those for larger models: the others were cut there."""
LOOKED = (
    *(
        ("counterfactual", method)
        for method in ("learned", "integrated x3", "integrated", "gradient", "relevance")
    ),
    *(("zero", method) for method in ("integrated x3", "gradient", "relevance")),
)
"""How planted neurons are looked for: what takes the place of what is closed, and the method."""
LOOKED_SHORT = tuple(
    ("counterfactual", method) for method in ("learned", "integrated", "gradient", "relevance")
)
"""The same for larger models: the others were cut there."""


@cache
def decoder(name: str) -> Decoder:
    """Return a model."""
    return cp.load(str(MODELS[name]()), dtype="float32")


@cache
def data(name: str, task: str, seed: int) -> tuple[Calibration, Calibration]:
    """Return the problems that score and those that decide: the same ones for all draws."""
    settings = Settings(data_dir=data_folder())
    own = cp.calibrate(decoder(name), [task], n=SCORED, subsets=1, seed=seed, data_dir=data_folder())
    return own, measured_on(decoder(name), [f"{task}_nll:{DECIDED}"], settings)


def relevance() -> Found:
    """Compare relevance with lxt's on real models, and the values of forward passes with and without its rules."""
    python, raw = os.environ.get("CAUSALPRUNE_LXT"), {}
    if python is None:
        raise SystemExit(
            "set CAUSALPRUNE_LXT to the Python of an environment with lxt (bench/oracle/lxt_relevance.py)"
        )
    for name in ("smollm2", "qwen"):
        own, calibration = decoder(name), data(name, "gsm8k", 0)[0]
        examples = sorted(calibration.examples, key=lambda e: len(e.tokens))[:4]
        rows = [
            {"tokens": e.tokens, "targets": [i for i, own in enumerate(e.is_target) if own]} for e in examples
        ]
        with tempfile.TemporaryDirectory() as scratch:
            tokens, output = Path(scratch) / "tokens.json", Path(scratch) / "out.json"
            tokens.write_text(json.dumps(rows))
            script = Path(__file__).parent / "oracle" / "lxt_relevance.py"
            subprocess.run([python, str(script), str(MODELS[name]()), str(tokens), str(output)], check=True)
            theirs = json.loads(output.read_text())
        units, worst, forward = list_units(own, ["heads", "neurons:1"]), 0.0, 0.0
        for example, other in zip(examples, theirs, strict=True):
            (batch,) = batches([example], max_batch_tokens=1)
            _, found = relevances(own, batch, list(units.values()))
            flat = [
                other["heads" if unit.kind == "head" else "neurons"][unit.layer][unit.index] for unit in units
            ]
            expected = torch.tensor(flat, dtype=torch.float64)
            worst = max(worst, float((found[:, 0] - expected).abs().max() / expected.abs().max()))
            wanted = targets(batch)
            with torch.no_grad():
                intact = target_logits(own, batch, wanted)
            own.model.requires_grad_(requires_grad=True)  # without slopes no rule is at work
            with ruled(own), torch.enable_grad():
                with_rules = target_logits(own, batch, wanted).detach()
            own.model.requires_grad_(requires_grad=False)
            forward = max(forward, float((with_rules - intact).abs().max()))
        raw[name] = {"difference": worst, "forward": forward, "examples": len(examples), **made()}
    figures = {
        "relevance_vs_lxt_max_rel_diff": max(own["difference"] for own in raw.values()),
        "relevance_forward_max_diff": max(own["forward"] for own in raw.values()),
    }
    return {"figures": figures, "raw": raw}


def found_or_not(model: Decoder, name: str, how: tuple[str, int, str, int], ablation: Any) -> dict[str, Any]:
    """Return which units a search finds of a circuit that is known."""
    estimator, rescore, effect, learn = how
    own = {"decide": problems(name, 24, 1), "rescore": rescore, "stage": cp.quiet}
    try:
        found = cp.circuit(
            model,
            problems(name, 24),
            Question(effect=effect, ablation=ablation),
            Estimator(estimator, epochs=learn),
            **own,
        )  # type: ignore[arg-type]
    except OptionError as error:
        return {"exact": False, "error": str(error)}
    members = sorted((unit.layer, unit.index) for unit in found.members)
    return {"exact": set(found.members) == TRUE[name], "members": members}


def known() -> Found:
    """Look for circuits that were built, with every estimator and ablation."""
    raw: dict[str, Any] = {}
    for name in TRUE:
        model = constructed(name)
        for how, ablation in itertools.product((*ESTIMATORS, "exact"), ("zero", "mean", "resample")):
            own = ESTIMATORS.get(how, ("exact", 1, "ce", 0))
            raw[f"{name}, {how}, {ablation}"] = found_or_not(model, name, own, ablation)
    default = [raw[f"{name}, {DEFAULT}, zero"]["exact"] for name in TRUE]
    return {"figures": {"constructed_exact_recovery": sum(default)}, "raw": raw}


def planting(name: str, nats: float, seed: int) -> dict[str, Any]:
    """Plant five neurons that let a trigger predict a token, and return how they rank among all neurons."""
    model, chance = cp.load(str(MODELS[name]()), dtype="float32"), np.random.default_rng(seed)
    calibration = data(name, "gsm8k", 0)[0]
    start = model.tokenizer.bos_token_id
    bodies = [example.tokens[5 : 5 + int(chance.integers(8, 16))] for example in calibration.examples[:32]]
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    trigger, wanted = (int(token) for token in chance.integers(1000, min(vocabulary, 40_000), 2))
    other = int(chance.integers(1000, min(vocabulary, 40_000)))
    rows = [(*(() if start is None else (start,)), *body, trigger, wanted) for body in bodies]
    examples = [
        Example(tokens, len(tokens) - 1, "planted", str(i), counterfactual=(*tokens[:-2], other, wanted))
        for i, tokens in enumerate(rows)
    ]
    layers = sorted(chance.choice(len(model.layers) - 4, 5, replace=False).tolist())
    with torch.no_grad():
        planted = [_plant(model, layer, examples, wanted) for layer in layers]
        strength = _strengthened(model, planted, examples, nats)
    own = Calibration(tuple(examples), (0,) * len(examples))
    how, of = Estimator("integrated", draws=0), dict[str, Behaviour]()
    for ablation in ("counterfactual", "zero"):
        question = Question(("neurons:1",), ablation=ablation)  # type: ignore[arg-type]
        of[ablation] = behaviour(model, own.examples, question, how)
    places = {(unit.layer, unit.index): number for number, unit in enumerate(of["zero"].units)}
    true = torch.tensor([places[layer, index] for layer, index, _ in planted])
    ways: dict[str, Any] = {}
    looked = LOOKED if name == "smollm2" else LOOKED_SHORT
    for ablation, method in (*looked, *(("zero", name) for name in BASELINES)):
        order = _order(of[ablation], own, method, seed)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order))
        at = ranks[true].double()
        auroc = 1 - float((at.sort().values - torch.arange(5)).mean() / (len(order) - 5))
        label = method if method in BASELINES else f"{method}, {ablation}"
        ways[label] = {"ranks": sorted(at.int().tolist()), "auroc": auroc}
    return {"nats": nats, "strength": strength, "layers": layers, "ways": ways, **made()}


def _plant(model: Decoder, layer: int, examples: Sequence[Example], wanted: int) -> tuple[int, int, Tensor]:
    """Let the neuron of least norm in a layer fire at the trigger alone; return layer, neuron, and the direction of the wanted token."""
    roles = {p.role: p for p in model.layers[layer].projections if p.role in ("gate", "up", "down")}
    gate, up, down = (roles[role].read() for role in ("gate", "up", "down"))
    index = int((gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argmin())
    inputs, last = [], []
    hook = roles["up"].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for example in examples:
        model.model(input_ids=torch.tensor([example.tokens[:-1]]), use_cache=False)
        last.append(inputs[-1][-1])
        inputs[-1] = inputs[-1][:-1]
    hook.remove()
    here, there = torch.stack(last), torch.cat(inputs)
    moments = there.T @ there / len(there) + 1e-2 * there.square().mean() * torch.eye(there.shape[1])
    direction = torch.linalg.solve(moments, here.mean(0))
    direction = direction / (here @ direction).mean()
    gate[index], up[index] = 4 * direction, direction
    for role, matrix in (("gate", gate), ("up", up)):
        roles[role].write(matrix)
    own = model.model.get_output_embeddings().weight[wanted]
    return layer, index, own / own.norm()


def _strengthened(
    model: Decoder, planted: Sequence[tuple[int, int, Tensor]], examples: Sequence[Example], nats: float
) -> float:
    """Let the planted neurons write as strongly as it takes for their removal to cost so much together."""
    groups = batches(examples, max_batch_tokens=2048)
    downs = {
        layer: next(p for p in model.layers[layer].projections if p.role == "down") for layer, *_ in planted
    }

    def loss(strength: float) -> float:
        for layer, index, direction in planted:
            matrix = downs[layer].read()
            matrix[:, index] = strength * direction
            downs[layer].write(matrix)
        from causalprune.interventions.losses import target_nats  # noqa: PLC0415

        return sum(float(target_nats(model, batch).sum()) for batch in groups) / len(examples)

    without, low, high = loss(0.0), 0.0, 0.1
    while without - loss(high) < nats and high < 1e4:
        low, high = high, high * 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if without - loss(middle) < nats else (low, middle)
    loss(high)
    return high


def _order(of: Any, calibration: Calibration, method: str, seed: int) -> Tensor:
    """Return the units of a behaviour as a method orders them."""
    if method in BASELINES:
        return baseline(of.decoder, of.units, calibration, method, seed).argsort(descending=True, stable=True)
    name, rescore, _, learn = ESTIMATORS[method]
    how = Estimator(name, draws=0, epochs=learn)
    return order_of(Search(of, of, how, "absolute", 0.9, None, cp.quiet).rounds(rescore), "absolute")


def baseline(
    model: Decoder, units: Sequence[Any], calibration: Calibration, method: str, seed: int
) -> Tensor:
    """Return what units are worth by chance, by their activations, by their weights, or by Wanda's sum over their weights."""
    if method == "random":
        return torch.rand(len(units), generator=torch.Generator().manual_seed(seed))
    groups = batches(calibration.examples, max_batch_tokens=2048)
    worth: dict[tuple[int, str], Tensor] = {}
    norms = _norms(model, groups) if method != "magnitude" else {}
    for layer in model.layers:
        for place, roles in (("heads", "qo"), ("mlp", ("gate", "up", "down"))):
            last = "o" if place == "heads" else "down"
            size = (
                layer.attention.n_heads
                if place == "heads"
                else next(p.shape[1] for p in layer.projections if p.role == "down")
            )
            total = torch.zeros(size)
            for p in (p for p in layer.projections if p.role in roles):
                weight = p.read().abs()
                if method == "wanda":
                    weight = weight * norms[p.name]
                own = weight.sum(0 if p.role == last else 1)
                total += own.view(size, -1).sum(1)
            if method == "activation":
                down = next(p for p in layer.projections if p.role == last)
                total = norms[down.name].view(size, -1).square().sum(1).sqrt()
            worth[layer.index, place] = total
    return torch.stack(
        [worth[unit.layer, "heads" if unit.kind == "head" else "mlp"][unit.index] for unit in units]
    )


def _norms(model: Decoder, groups: Sequence[Any]) -> dict[str, Tensor]:
    """Return norms of the inputs of all matrices over the tokens of all batches."""
    sums: dict[str, Tensor] = {}
    real: Tensor

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x[real].square().sum(0)

    hooks = [
        p.module.register_forward_pre_hook(lambda _, args, name=p.name: add(name, args[0]))  # type: ignore[misc]
        for p in model.projections
    ]
    with torch.no_grad():
        for batch in groups:
            real = batch.real
            model.model(input_ids=batch.tokens, attention_mask=batch.real.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: value.sqrt() for name, value in sums.items()}


def planted() -> Found:
    """Look for neurons that were planted among all others: SmolLM2's first planting of each strength chooses how, the others report it."""
    raw: dict[str, Any] = {}
    every = [
        (name, nats, seed) for name, (n, kinds) in PLANTINGS.items() for nats in kinds for seed in range(n)
    ]
    for name, nats, seed in every:
        key = f"{name}-{nats:g}-{seed}"
        raw[key] = kept(f"circuits/planted/{key}", partial(planting, name, nats, seed))
        print(key, {label: own["ranks"] for label, own in raw[key]["ways"].items()}, flush=True)
    choosing = {key: own for key, own in raw.items() if key.startswith("smollm2") and key.endswith("-0")}
    own = {key: found for key, found in raw.items() if key.startswith("smollm2") and key not in choosing}
    other = [found for key, found in raw.items() if key.startswith("qwen")]
    first = {label: _recovered(list(choosing.values()), label) for label in raw["smollm2-3-0"]["ways"]}
    found = {label: _recovered(list(own.values()), label) for label in first}
    elsewhere_ = {label: _recovered(other, label) for label in raw["qwen-3-0"]["ways"]}
    best, shared = (max(ways, key=lambda label: first[label]["auroc"]) for ways in (first, elsewhere_))
    default = "learned, counterfactual"
    figures = {f"planted_{key}": value for key, value in found[best].items()}
    figures |= {f"planted_{key}_default": value for key, value in found[default].items()}
    figures |= {f"planted_{key}_qwen": value for key, value in elsewhere_[shared].items()}
    figures |= {f"planted_{key}_default_qwen": value for key, value in elsewhere_[default].items()}
    sums = {
        "best": best,
        "best_of_both": shared,
        "by_method": found,
        "by_method_qwen": elsewhere_,
        "first": first,
    }
    return {"figures": figures, "raw": raw | sums}


def _recovered(rows: Sequence[dict[str, Any]], label: str) -> dict[str, float]:
    """Return how well planted neurons are found: among all others, and how many of the three strongest kinds are among the first ten."""
    hits = [
        sum(rank < 10 for rank in own["ways"][label]["ranks"]) / 5
        for own in rows
        if own["nats"] >= PLANTED[2]
    ]
    auroc = [own["ways"][label]["auroc"] for own in rows]
    return {"auroc": float(np.mean(auroc)), "recall_at_10": float(np.mean(hits))}


def searched(
    model: str, task: str, units: tuple[str, ...], method: str, draw: int = 0, **asked: Any
) -> dict[str, Any]:
    """Return the curve of a ranking: losses per problem at every size, and the `size` that keeps 90 %; kept once it is there."""
    rank, ablation = (asked.get(*own) for own in (("rank", "absolute"), ("ablation", "zero")))
    name = (
        "-".join((model, task, "+".join(units), method, rank, ablation, str(draw)))
        .replace(":", "")
        .replace(" ", "_")
    )

    def make() -> dict[str, Any]:
        calibration, decide = data(model, task, draw)
        estimator, rescore, effect, learn = ESTIMATORS.get(
            method, (method if method in ("exact", "adaptive") else "gradient", 1, "ce", 0)
        )
        how = Estimator(estimator, draws=int(effect == "kl" or estimator == "adaptive"), epochs=learn)  # type: ignore[arg-type]
        question = Question(units, effect, ablation)  # type: ignore[arg-type]
        scored = behaviour(decoder(model), calibration.examples, question, how)
        decided = behaviour(decoder(model), decide.examples, question, how, scored.mean)
        search = Search(
            scored, decided, how, rank, 0.9, FOLDER / name, lambda label: shown(f"{name}: {label}")
        )  # type: ignore[arg-type]
        began = time.perf_counter()
        with ledger(scored, decided, how, FOLDER / name) as book:
            rounds = [] if method in BASELINES else search.rounds(rescore)
            order = order_of(rounds, rank) if rounds else _order(scored, calibration, method, draw)  # type: ignore[arg-type]
            counts = [prefix(order, search.sizes, share) for share in SHARES]
            keeps = [search.kept(order, count) for count in (*counts, len(order), 0)]
            with shown(f"{name}: curve") as tell:
                nats = Trials(decided, book, tell).nats(keeps)
            try:
                wanted = bool(rounds) and rank == "absolute" and asked.get("size", True)
                size = search.size(order, rounds, book) / len(order) if wanted else math.nan
            except OptionError:
                size = 1.0
        sure = stability(resampled_orders(rounds, rank), search.sizes) if rounds else {}  # type: ignore[arg-type]
        return {
            "nats": nats.tolist(),
            "units": counts,
            "size": size,
            "stability": sure,
            "seconds": time.perf_counter() - began,
            **made(),
        }

    return kept(f"circuits/{name}", make)


def summed(found: Sequence[dict[str, Any]], problems_: slice = slice(None)) -> dict[str, Any]:
    """Return CPR and CMD over draws, with resamples of the problems that all methods share."""
    nats = torch.tensor([own["nats"] for own in found], dtype=torch.float64).mean(0)[:, problems_]
    f = faithfulness(resampled(nats[:-2]), resampled(nats[-2:-1]), resampled(nats[-1:]))
    whole = faithfulness(*(part.mean(1).numpy() for part in (nats[:-2], nats[-2:-1], nats[-1:])))
    cpr, cmd = areas(SHARES, whole)
    return {"cpr": float(cpr), "cmd": float(cmd), "draws": areas(SHARES, f)[1], "f": whole.tolist()}


def ratio(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Return the ratio of two CMDs with its interval over problems."""
    draws = one["draws"] / other["draws"]
    return [one["cmd"] / other["cmd"], *np.quantile(draws, [0.025, 0.975]).tolist()]


def grid() -> Found:
    """Find circuits of GSM8K in SmolLM2 by the methods of `GRID`, zero ablation."""
    raw: dict[str, Any] = {}
    choose, report = slice(0, DECIDED // 2), slice(DECIDED // 2, None)
    for units, methods in GRID.items():
        found = {
            m: [
                searched("smollm2", "gsm8k", tuple(units.split("+")), m, n)
                for n in range(DRAWS.get((units, m), 1))
            ]
            for m in methods
        }
        chosen = min(set(methods) - {*BASELINES}, key=lambda m: summed(found[m][:1], choose)["cmd"])
        own = {m: summed(found[m], report) for m in methods}
        raw[units] = {
            "best": chosen,
            "ratio_to_random": ratio(own[chosen], own["random"]),
            "ratio_to_gradient": ratio(own[chosen], own["gradient"]),
            "methods": {
                m: {key: own[m][key] for key in ("cpr", "cmd", "f")}
                | {
                    "interval": np.quantile(own[m]["draws"], (0.025, 0.975)).tolist(),
                    "cmd_by_draw": [summed([draw], report)["cmd"] for draw in found[m]],
                    "size": float(np.mean([draw["size"] for draw in found[m]])),
                    "nats": np.mean([draw["nats"] for draw in found[m]], (0, 2)).tolist(),
                }
                for m in methods
            },
        }
    for m in ("relevance", "gradient"):
        found_ = [searched("smollm2", "gsm8k", ("heads",), m, rank="signed")]
        raw[f"heads signed {m}"] = {key: summed(found_)[key] for key in ("cpr", "cmd", "f")}
    neurons, best = raw["neurons:1"], raw["neurons:1"]["best"]
    sizes = {m: own["size"] for m, own in neurons["methods"].items()}
    at = SHARES.index(0.1)
    kl = searched("smollm2", "gsm8k", ("heads",), DEFAULT)["stability"]["0.2"]
    figures = {
        "cmd_best": neurons["methods"][best]["cmd"],
        "cmd_gradient": neurons["methods"]["gradient"]["cmd"],
        "cmd_random": neurons["methods"]["random"]["cmd"],
        "cmd_ratio_to_random": neurons["ratio_to_random"][0],
        "cmd_ratio_to_gradient": neurons["ratio_to_gradient"][0],
        "cpr_best": neurons["methods"][best]["cpr"],
        "size_at_keep_90_neurons": sizes[best],
        "size_ratio_to_gradient": sizes[best] / sizes["gradient"],
        "heads_10pct_f_relevance": raw["heads signed relevance"]["f"][at],
        "heads_10pct_f_gradient": raw["heads signed gradient"]["f"][at],
        "jaccard_over_chance_heads_20": kl["over_chance"],
    }
    return {"figures": figures, "raw": raw | {"kl": kl, "resamples": RESAMPLES}}


def elsewhere() -> Found:
    """The default and one-shot gradient on other tasks and ablations, without sizes; other models were cut, but for pairs."""
    raw = {}
    for task, ablation in (("gsm8k", "mean"), ("gsm8k", "resample"), *((task, "zero") for task in TASKS[1:])):
        for method in ("gradient", DEFAULT):
            if method == DEFAULT and ablation == "zero":
                curve = default_circuit(task).curve
                f = [point.faithfulness.value for point in curve.points]
                own = {"cpr": curve.cpr.value, "cmd": curve.cmd.value, "f": f}
            else:
                found = searched("smollm2", task, ("heads",), method, ablation=ablation, size=False)
                own = {key: summed([found])[key] for key in ("cpr", "cmd", "f")}
            raw[f"smollm2, {task}, {ablation}, {method}"] = own
    return {"figures": {}, "raw": raw}


def ioi() -> Found:
    """Pairs of who gives to whom, counterfactual ablation, heads and MLPs, on every model that is mostly right.

    Half of the pairs that decide choose the best method of each model, the others report it.
    """
    raw = {model: pairs(model) for model in MODELS}
    good = {m: own for m, own in raw.items() if own["right"] >= 0.75}
    for own in good.values():
        n = len(own["random"]["nats"][0])
        choose, report = slice(0, n // 2), slice(n // 2, None)
        of = {m: summed([own[m]], report) for m in own if m != "right"}
        own["best"] = min(of.keys() - {"random"}, key=lambda m: summed([own[m]], choose)["cmd"])
        for m, found in of.items():
            interval = np.quantile(found["draws"], (0.025, 0.975)).tolist()
            own[m] |= {key: found[key] for key in ("cpr", "cmd", "f")} | {"interval": interval}

    def cmd(of: Callable[[dict[str, Any]], str]) -> float | None:
        return float(np.mean([own[of(own)]["cmd"] for own in good.values()])) if good else None

    figures = {
        "ioi_models_tried": len(raw),
        "ioi_cmd_best": cmd(lambda own: own["best"]),
        "ioi_cmd_default": cmd(lambda _: "learned"),
        "ioi_cmd_random": cmd(lambda _: "random"),
    }
    return {"figures": figures, "raw": raw}


def pairs(model: str) -> dict[str, Any]:
    """Return the share of pairs that a model has right, and where that is most, areas by method; kept once they are there."""
    whole = cp.calibrate(decoder(model), ["ioi"], n=400, subsets=1)

    def right() -> float:
        question = Question(("heads", "mlp"), ablation="counterfactual")
        of = behaviour(decoder(model), whole.examples, question, Estimator("integrated", draws=0))
        nats = Trials(of).nats([torch.ones(len(of.units), dtype=torch.bool)])[0]
        return float((nats < 0).double().mean())

    found: dict[str, Any] = {"right": kept(f"circuits/ioi-{model}", right)}
    for method in PAIRED.get(model, SHORT) if found["right"] >= 0.75 else ():
        name = f"circuits/ioi-{model}-{method.replace(' ', '_')}"
        found[method] = kept(name, partial(_ioi, model, whole, method))
    return found


def _some_pairs(model: str) -> Found:
    """Measure pairs of one model, for `ioi` to find its rows there."""
    return {"figures": {}, "raw": pairs(model)}


def _ioi(model: str, whole: Calibration, method: str) -> dict[str, Any]:
    began = time.perf_counter()
    estimator, rescore, effect, learn = ESTIMATORS.get(method, ("gradient", 1, "ce", 0))
    question = Question(("heads", "mlp"), effect, "counterfactual")  # type: ignore[arg-type]
    how = Estimator(estimator, draws=int(effect == "kl"), epochs=learn)  # type: ignore[arg-type]
    scored, decided = (behaviour(decoder(model), own.examples, question, how) for own in halves(whole))
    search = Search(
        scored, decided, how, "absolute", 0.9, None, lambda label: shown(f"ioi {model} {method}: {label}")
    )
    if method == "random":
        order = torch.rand(len(scored.units), generator=torch.Generator().manual_seed(0)).argsort()
    else:
        order = order_of(search.rounds(rescore), "absolute")
    counts = [prefix(order, search.sizes, share) for share in SHARES]
    nats = Trials(decided).nats([search.kept(order, count) for count in (*counts, len(order), 0)])
    own = summed([{"nats": nats.tolist()}])
    print(model, method, own["cmd"], flush=True)
    return {"nats": nats.tolist(), "units": counts, "seconds": time.perf_counter() - began, **made()}


def default_circuit(task: str) -> Circuit:
    """Return the default circuit of heads in SmolLM2 for a task, kept once it is there; that of GSM8K with all checks and tests."""

    def make() -> Any:
        model, (calibration, decide) = decoder("smollm2"), data("smollm2", task, 0)
        folder = FOLDER / f"default-{task}"

        def stage(label: str) -> Any:
            return shown(f"{task}: {label}")

        found = cp.circuit(model, calibration, decide=decide, folder=folder, stage=stage)
        if task == "gsm8k":
            checks = Checks(100, TESTED, tests=True)
            found = examined(found, model, calibration, checks, folder=folder, stage=stage)
        save_circuit(found, folder / CIRCUIT)
        return json.loads((folder / CIRCUIT).read_text())

    name = f"circuits/default-{task}"
    kept(name, make)
    return load_circuit(ROWS / f"{name}.json")


def _one_circuit(task: str) -> Found:
    """Find the circuit of one task, for `tested` to find it there."""
    return {"figures": {}, "raw": {"size": default_circuit(task).size}}


def tested() -> Found:
    """Test the default circuit of heads in SmolLM2, and what removing circuits does to other tasks."""
    model, circuits = decoder("smollm2"), {task: default_circuit(task) for task in TASKS}
    both = cp.overlap(circuits, model, remove=20, folder=FOLDER / "overlap", stage=shown)
    rises = np.array([[value.value for value in row] for row in both.removal])
    own, others = np.diag(rises).mean(), rises[~np.eye(3, dtype=bool)].mean()
    first = circuits["gsm8k"]
    return {
        "figures": {
            "sufficiency_p": first.tests["sufficiency"]["p"],
            "necessity_p": first.tests["partial_necessity"]["p"],
            "cross_task_own_minus_other_nats": float(own - others),
        },
        "raw": {
            "overlap": asdict(both),
            "circuits": {
                task: {"size": c.size, "checks": c.checks, "tests": c.tests, "stability": dict(c.stability)}
                for task, c in circuits.items()
            },
        },
    }


def compression() -> Found:
    """Prune SmolLM2 to 50 % row by row, as in Table 1 of arXiv 2506.13727, and measure perplexity."""

    def row(criterion: str) -> dict[str, Any]:
        own = cp.load(str(embedded_model()), dtype="float32")
        calibration = cp.calibrate(own, ["wikitext2"], n=128, data_dir=data_folder(), max_tokens=128)
        cp.prune(own, cp.Method(criterion, 0.5, "row"), calibration=calibration, on_progress=cp.silent)
        (result,) = cp.evaluate(own, ["wikitext2_ppl:40000"], data_dir=data_folder(), on_progress=cp.silent)
        return {"perplexity": math.exp(sum(result.values) / sum(result.weights)), **made()}

    names = ("relevance", "snip", "wanda", "magnitude")
    return {
        "figures": {},
        "raw": {name: kept(f"circuits/compressed-{name}", partial(row, name)) for name in names},
    }


def cost(name: str) -> Found:
    """Time one-shot scores of all heads and neurons, and the ten sizes, in a process of its own, loading included."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import circuits; circuits.once({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    raw, of = json.loads(done.stdout.splitlines()[-1]) | made(), "" if name == "smollm2" else f"_{name}"
    return {
        "figures": {f"circuit_minutes{of}": raw["minutes"], f"circuit_peak_gib{of}": raw["gib"]},
        "raw": raw,
    }


def once(name: str) -> None:
    """Score and measure once, and print minutes and the peak of memory."""
    began = time.perf_counter()
    own = cp.load(str(MODELS[name]()), dtype="float32")
    calibration = cp.calibrate(own, ["gsm8k"], n=48, subsets=1, data_dir=data_folder())
    decide = measured_on(own, ["gsm8k_nll:48"], Settings(data_dir=data_folder()))
    how, question = Estimator("gradient", draws=0), Question(("heads", "neurons:1"))
    scored, decided = (behaviour(own, d.examples, question, how) for d in (calibration, decide))
    search = Search(scored, decided, how, "absolute", 0.9, None, cp.quiet)
    order = order_of(search.rounds(1), "absolute")
    search.curve(order, prefix(order, search.sizes, 0.5), None)
    peak = peak_bytes()["process"] / 2**30
    print(json.dumps({"minutes": (time.perf_counter() - began) / 60, "gib": peak}))


STEPS: dict[str, Callable[[], Found]] = {
    "relevance": relevance,
    "constructed": known,
    "planted": planted,
    "cost": partial(cost, "smollm2"),
    "cost_qwen": partial(cost, "qwen"),
    "ioi": ioi,
    **{f"ioi_{model}": partial(_some_pairs, model) for model in MODELS},
    "grid": grid,
    **{f"circuit_{task}": partial(_one_circuit, task) for task in TASKS},
    "tested": tested,
    "elsewhere": elsewhere,
    "compression": compression,
}

if __name__ == "__main__":
    parser = step_parser(__doc__, STEPS)
    carry_out("circuits", STEPS, parser, parser.parse_args().steps)
