"""What attribution costs and how far it can be trusted; each step is kept, so a stopped bench goes on.

    python bench/attribution.py              # all steps that are not there yet (hours)
    python bench/attribution.py speed        # naive, exact, gradient and adaptive in one run (minutes)
    python bench/attribution.py reference    # 96 problems, exact, cross-entropy and KL, in chunks of 16
    python bench/attribution.py curves       # reliability against cost, from the reference and its gradients
    python bench/attribution.py prune        # CAP at 20 % from either effect, compared in pairs

Naive: a hook that zeroes the head, a full forward pass of one padded batch, logits at all positions.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from common import RUNS, data_folder, record, write_figures
from packed import write_dense
from torch import Tensor

from causalprune.attribution.estimators import ESTIMATORS, attribute, exact, expanded
from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan, planned
from causalprune.attribution.questions import Estimator, Question
from causalprune.attribution.uncertainty import estimate, reliability, spearman
from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import load
from causalprune.checkpoints.saving import load_effects, save_effects
from causalprune.core.progress import shown
from causalprune.core.types import Batch, Calibration, Decoder, Effects, Example, Unit, silent
from causalprune.evaluation.measures import Settings, evaluate, evaluation_contents
from causalprune.evaluation.results import headline, paired_difference, read_json
from causalprune.interventions.units import Parts
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

FOLDER = RUNS / "attribution"
REFERENCE, CHUNK = 96, 16
SPEED_EXAMPLES, TIMED_HEADS, AGREEMENT_EXAMPLES = 8, 2, 2
PAPER_EXAMPLES = 128
RELIABILITY = 0.8
"""Rank correlation to the reference at which costs are compared: about what exact reaches with 8 problems."""
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAWS = 20
PER_SEQUENCE = ("masked_nats", "intact_nats", "tokens", "subset", "kl_nats")
ORDERS = ("first", "second")
BUDGETS = (50.0, 40.0, 30.0, 20.0, 15.0, 10.0)


def naive(decoder: Decoder, calibration: Calibration, units: Sequence[Unit]) -> Tensor:
    """Return `[unit sequence]` nats of the target tokens by one full forward pass per head."""
    examples = calibration.examples
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.tensor([list(e.tokens) + [0] * (longest - len(e.tokens)) for e in examples])
    real = torch.tensor([[i < len(e.tokens) for i in range(longest)] for e in examples])
    rows = []
    with shown("naive") as progress, torch.inference_mode():
        for unit in units:
            attention = decoder.layers[unit.layer].attention
            own = slice(unit.index * attention.head_dim, (unit.index + 1) * attention.head_dim)
            rows.append(_removed(decoder, attention.output, own, tokens, real))
            progress(len(rows), len(units))
    spans = [(i, slice(e.target_start - 1, len(e.tokens) - 1)) for i, e in enumerate(examples)]
    return torch.stack([torch.stack([nats[i, span].sum() for i, span in spans]) for nats in rows])


def _removed(decoder: Decoder, output: torch.nn.Module, own: slice, tokens: Tensor, real: Tensor) -> Tensor:
    def zero(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].clone()
        heads[..., own] = 0
        return (heads,)

    hook = output.register_forward_pre_hook(zero)
    try:
        logits = decoder.model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
    finally:
        hook.remove()
    # by logsumexp: cross_entropy loses too much (findings/torch-cross-entropy-strided.sh)
    chosen_logits = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return (logits[:, :-1].logsumexp(-1) - chosen_logits).double()


def speed() -> dict[str, Any]:
    """Time naive and all estimators on the same problems in one process, one after the other.

    Agreement: every head, on few problems. Time: `TIMED_HEADS` heads of every layer on more problems, as naive
    takes long; exact is timed on the same heads, gradient and adaptive on all of them, against naive scaled up.
    """
    decoder = load("embedded")
    found: dict[str, Any] = {"agreement": _agreement(decoder)}
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=SPEED_EXAMPLES, data_dir=data_folder())
    lengths = [len(e.tokens) for e in calibration.examples]
    plan = planned(decoder, calibration)
    n_heads = decoder.layers[0].attention.n_heads
    timed = {u for u in plan.units if (u.index - u.layer) % n_heads < TIMED_HEADS}
    found["heads_timed"], found["heads"] = len(timed), len(plan.units)
    start = time.perf_counter()
    naive(decoder, calibration, sorted(timed, key=lambda u: (u.layer, u.index)))
    one = (time.perf_counter() - start) / len(timed)
    padded = max(lengths) * len(lengths)
    found["naive"] = {"seconds": one * len(plan.units), "tokens_forwarded": padded * len(plan.units)}
    few = replace(plan, units={unit: parts for unit, parts in plan.units.items() if unit in timed})
    start = time.perf_counter()
    with shown("exact") as progress:
        tokens = float(exact(Measured(Passes(few)), progress).description["tokens_forwarded"])
    seconds = time.perf_counter() - start
    scale = (
        found["heads"] / found["heads_timed"]
    )  # its intact passes too, which it needs only once: to its cost
    found["exact"] = {"seconds": seconds * scale, "tokens_forwarded": tokens * scale}
    for name, how in (("gradient", Estimator("gradient")), ("adaptive", Estimator("adaptive", budget=20.0))):
        start = time.perf_counter()
        with shown(name) as progress:
            effects = attribute(decoder, calibration, Question(), how, on_progress=progress)
        tokens = float(effects.description["tokens_forwarded"])
        found[name] = {"seconds": time.perf_counter() - start, "tokens_forwarded": tokens}
    return {"tokens": lengths, **found}


def _agreement(decoder: Decoder) -> dict[str, Any]:
    """Compare exact with naive for every head."""
    calibration = calibrate(
        decoder.tokenizer, ["gsm8k"], n=AGREEMENT_EXAMPLES, subsets=1, data_dir=data_folder()
    )
    with shown("exact, every head") as progress:
        effects = attribute(decoder, calibration, on_progress=progress)
    slow = naive(decoder, calibration, effects.units)
    difference = effects.masked_nats - slow
    return {
        "max_abs_diff_nats": float((difference.sum(1) / effects.tokens.sum()).abs().max()),
        "max_abs_diff_nats_per_sequence": float((difference / effects.tokens).abs().max()),
        "exact_nats": effects.masked_nats.tolist(),
        "naive_nats": slow.tolist(),
    }


def reference() -> dict[str, Any]:
    """Measure both effects of all heads on 96 problems, and predict them, in chunks that can be used alone."""
    decoder, chunks = _chunks()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(chunks):
        predicted, measured = (FOLDER / f"{name}-{number}.json" for name in ("gradient", "exact"))
        if not predicted.exists():
            with shown(f"gradients {number + 1}/{len(chunks)}") as progress:
                plan = planned(decoder, chunk, estimator=Estimator("gradient"))
                parts = expanded(Measured(Passes(plan)), progress)
            first, second = (part.tolist() for part in parts)
            write_dense(
                predicted,
                {"first": first, "second": second, "lengths": [len(e.tokens) for e in chunk.examples]},
            )
        if not measured.exists():
            ledger = FOLDER / f"exact-{number}.ledger"
            with shown(f"exact {number + 1}/{len(chunks)}") as progress:
                found = attribute(decoder, chunk, Question(effect="kl"), ledger=ledger, on_progress=progress)
            save_effects(found, measured)
            ledger.unlink()
    return {"examples": len(Reference.load().effects.tokens)}


def _chunks() -> tuple[Decoder, list[Calibration]]:
    decoder = load("embedded")
    settings = Settings(data_dir=data_folder())
    exclude = evaluation_contents(["gsm8k_nll:200"], settings, decoder.tokenizer)
    whole = calibrate(decoder.tokenizer, ["gsm8k"], n=REFERENCE, data_dir=data_folder(), exclude=exclude)
    cuts = [slice(at, at + CHUNK) for at in range(0, REFERENCE, CHUNK)]
    return decoder, [Calibration(whole.examples[c], whole.subset[c], whole.description) for c in cuts]


@dataclass(frozen=True)
class Reference:
    """The chunks of the reference that are finished, as one: effects and both orders of the prediction."""

    decoder: Decoder
    examples: tuple[Example, ...]
    effects: Effects
    first: Tensor
    second: Tensor

    @staticmethod
    def load() -> "Reference":
        """Read every finished chunk."""
        decoder, chunks = _chunks()
        parts = [load_effects(path) for path in sorted(FOLDER.glob("exact-*.json"))]
        joined = {name: torch.cat([getattr(part, name) for part in parts], -1) for name in PER_SEQUENCE}
        effects = replace(parts[0], **joined)
        n = len(effects.tokens)
        rows = [read_json(path) for path in sorted(FOLDER.glob("gradient-*.json"))]
        orders = [torch.cat([torch.tensor(row[k]).double() for row in rows], 1)[:, :n] for k in ORDERS]
        return Reference(decoder, tuple(e for chunk in chunks for e in chunk.examples)[:n], effects, *orders)

    def by(self, effect: str) -> Effects:
        """Return the effects by one of the two that were measured."""
        return self.effects if effect == "kl" else replace(self.effects, effect="ce", kl_nats=None)

    def tokens(self, at: Sequence[int]) -> int:
        """Return the tokens of some of the sequences."""
        return sum(len(self.examples[i].tokens) for i in at)


def chosen(effects: Effects, at: Sequence[int]) -> Effects:
    """Return effects on some of the sequences."""
    cut = {k: value[..., list(at)] for k in PER_SEQUENCE if (value := getattr(effects, k)) is not None}
    return replace(effects, **cut)


class Replay(Passes):
    """Passes that look up cells and predictions in the reference; all else is the product's own."""

    def __init__(self, plan: Plan, truth: Effects, first: Tensor, second: Tensor) -> None:
        super().__init__(plan)
        self.truth, self.orders = truth, {"first": first, "second": second}
        self.unit_of = {id(parts): i for i, parts in enumerate(plan.units.values())}

    def intact_row(self, number: int) -> dict[str, Any]:
        """Look up the losses of an intact batch."""
        return {"ce": self.truth.intact_nats[list(self.plan.groups[number].indices)].tolist()}

    def predicted_row(self, batch: Batch) -> dict[str, Any]:
        """Look up the losses of an intact batch and the predictions."""
        own = list(batch.indices)
        orders = {name: values[:, own].tolist() for name, values in self.orders.items()}
        return {"ce": self.truth.intact_nats[own].tolist(), **orders}

    def joint(self, number: int, layer: int, cells: Sequence[tuple[Parts, int]]) -> dict[str, list[float]]:
        """Look up cells."""
        own = self.plan.groups[number].indices
        at = [self.unit_of[id(parts)] for parts, _ in cells], [own[row] for _, row in cells]
        kl = {} if self.truth.kl_nats is None else {"kl": self.truth.kl_nats[at].tolist()}
        return {"ce": self.truth.masked_nats[at].tolist(), **kl}


def curves() -> dict[str, Any]:
    """Reliability (rank correlation to the reference) against tokens, for every estimator and effect."""
    whole = Reference.load()
    units, n = whole.effects.units, len(whole.examples)
    depth = len(whole.decoder.layers)
    found: dict[str, Any] = {
        "sequences": n,
        "naive_tokens_per_sequence": (len(units) + 1) * whole.tokens(range(n)) / n,
        "naive_over_exact": (len(units) + 1) / (sum((depth - u.layer) / depth for u in units) + 2),
    }
    for effect in ("ce", "kl"):
        rows = [_row(whole, effect, "exact", n, None) for n in SIZES if n < len(whole.examples)]
        for n in (s for s in SIZES if 8 <= s <= len(whole.examples)):
            rows.append(_row(whole, effect, "gradient", n, None))
            budgets = [b for b in BUDGETS if b < (len(whole.effects.units) + 1) / 5]
            rows += [_row(whole, effect, "adaptive", n, budget) for budget in budgets]
        found[effect] = rows
        found[f"split_half_{effect}"] = reliability(whole.by(effect))["split_half"]
    return found


def _row(whole: Reference, effect: str, name: str, n: int, budget: float | None) -> dict[str, Any]:
    """Estimate from n random sequences of the reference, `DRAWS` times; return means."""
    random, own = np.random.default_rng(n), whole.by(effect)
    truth, total = own.paired_delta_nats(), len(whole.examples)
    tokens, ranks, inside = [], [], []
    for seed in range(DRAWS):
        at = random.permutation(total)[:n].tolist()
        examples = Calibration(tuple(whole.examples[i] for i in at), tuple(i % 3 for i in range(n)))
        how = Estimator(name, budget=budget, seed=seed)  # type: ignore[arg-type]
        plan = planned(whole.decoder, examples, Question(effect=effect), how)  # type: ignore[arg-type]
        vars(plan)["model_fingerprint"] = own.model_fingerprint  # known: it takes longer than all the rest
        replay = Replay(plan, chosen(own, at), whole.first[:, at], whole.second[:, at])
        effects = ESTIMATORS[name](Measured(replay), silent)
        bounds = estimate(effects)
        tokens.append(float(effects.description["tokens_forwarded"]))
        ranks.append(spearman(bounds.value, truth))
        inside.append(float(((bounds.low <= truth) & (truth <= bounds.high)).double().mean()))
    means = {"tokens": tokens, "spearman": ranks, "coverage": inside}
    row = {key: float(np.mean(values)) for key, values in means.items()}
    return {"estimator": name, "sequences": n, "budget": budget, **row}


def pruned() -> dict[str, Any]:
    """Prune with CAP at 20 % from either effect, and compare the loss of 200 test solutions in pairs."""
    whole, results = Reference.load(), {}
    settings = Settings(data_dir=data_folder())
    for effect in ("ce", "kl"):
        decoder = load("embedded")
        prune(decoder, Method("cap", 0.2), effects=whole.by(effect))
        with shown(f"cap from {effect}") as progress:
            results[effect] = evaluate(decoder, ["gsm8k_nll:200"], settings, on_progress=progress)[0]
    difference = paired_difference(results["kl"], results["ce"])
    return {
        "nll": {effect: headline(result) for effect, result in results.items()},
        "kl_minus_ce": asdict(difference),
        "values": {effect: result.values for effect, result in results.items()},
    }


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that the claims rest on, from the steps that are done."""
    found: dict[str, float] = {}
    if (timed := done.get("speed")) is not None:
        for name in ("exact", "gradient", "adaptive"):
            found[f"{name}_speedup_vs_naive"] = timed["naive"]["seconds"] / timed[name]["seconds"]
        found["exact_vs_naive_max_abs_diff_nats"] = timed["agreement"]["max_abs_diff_nats"]
    if (drawn := done.get("curves")) is not None:
        found |= _curve_figures(drawn)
    return found


def _curve_figures(drawn: dict[str, Any]) -> dict[str, float]:
    """Compare costs where the curves reach `RELIABILITY`: exact by interpolation, others by their cheapest row."""
    rows, n = drawn["ce"], drawn["sequences"]
    exact_rows = [row for row in rows if row["estimator"] == "exact"]
    ranks, costs = ([row[key] for row in exact_rows] for key in ("spearman", "tokens"))
    exact_cost = float(np.interp(RELIABILITY, ranks, costs))
    good = [r for r in rows if r["estimator"] == "adaptive" and r["spearman"] >= RELIABILITY]
    largest = max((r for r in rows if r["estimator"] == "gradient"), key=lambda r: r["sequences"])
    inner = {
        effect: [
            r["coverage"] for r in drawn[effect] if r["estimator"] == "exact" and 4 <= r["sequences"] <= n / 8
        ]
        for effect in ("ce", "kl")
    }
    found = {
        "reference_examples": float(n),
        "split_half_ce": drawn["split_half_ce"],
        "split_half_kl": drawn["split_half_kl"],
        "gradient_spearman": largest["spearman"],
        "interval_coverage": float(np.mean(inner["ce"])),
        "interval_coverage_kl": float(np.mean(inner["kl"])),
    }
    if good:
        best = min(good, key=lambda row: row["tokens"])
        found["adaptive_token_ratio_to_exact"] = best["tokens"] / exact_cost
        found["adaptive_token_ratio_to_naive"] = best["tokens"] / (exact_cost * drawn["naive_over_exact"])
        found["reliability_compared_at"] = best["spearman"]
    for level in (0.85, 0.9):  # the higher, the less is saved
        reached = [r["tokens"] for r in rows if r["estimator"] == "adaptive" and r["spearman"] >= level]
        if reached and level <= max(ranks):
            found[f"adaptive_token_ratio_to_exact_at_{level:g}"] = min(reached) / float(
                np.interp(level, ranks, costs)
            )
    limit = drawn["naive_tokens_per_sequence"] * PAPER_EXAMPLES / 50
    within = [row["spearman"] for row in drawn["kl"] if row["tokens"] <= limit]
    if within:
        found["kl_spearman_at_fiftieth"] = max(within)
    return found


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "speed": speed,
    "reference": reference,
    "curves": curves,
    "prune": pruned,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/attribution.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    done: dict[str, Any] = record("attribution")["raw"]
    for name in parser.parse_args().steps or [name for name in STEPS if name not in done]:
        print(f"== {name}", flush=True)
        done[name] = STEPS[name]()
        print(write_figures("attribution", figures(done), done, seeds=[0]))


if __name__ == "__main__":
    main()
