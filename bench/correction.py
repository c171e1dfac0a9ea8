"""Targeted correction: is what was planted found, do loops go, what does it cost, does it stay away.

    python bench/correction.py planted      # known by construction, about an hour
    python bench/correction.py              # all steps that are not done yet, about 12 hours on two cores

Every row is kept in bench/rows/ and made once; searches go on where they were stopped.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Found, carry_out, data_folder, made, step_parser
from corrected import (
    FINAL,
    FOLDER,
    FREE,
    REST,
    TASKS,
    Exactly,
    OfGoals,
    OfText,
    dense,
    fixed,
    fresh,
    kept,
    measured,
    path_of,
    ratio,
    ratio_between,
    result,
    rise,
    row,
    samples,
    taken_out,
)

import causalprune as cp
from causalprune.calibration.encoding import text_tokens, windows
from causalprune.calibration.examples import batches
from causalprune.core.errors import OptionError
from causalprune.core.resuming import State
from causalprune.core.types import Decoder, EvalResult, Example
from causalprune.correction.candidates import Weights
from causalprune.correction.correcting import candidates_of, correct
from causalprune.correction.evidence import Looking
from causalprune.correction.measuring import Trials
from causalprune.correction.records import Contrast
from causalprune.correction.samples import halves
from causalprune.correction.scores import SCORES
from causalprune.correction.search import NONE, Search
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, kept_rows, paired_difference, results_in
from causalprune.evaluation.settings import Settings
from causalprune.interventions.losses import cross_entropy, target_logits, targets
from causalprune.runs.single import Options
from causalprune.runs.undesired import CorrectionSpec, Study, part

sys.path.insert(0, str(ROOT / "tests"))
from planted import Planting, plant

PLANTINGS, COMPARED, PROMPTS, SHOWN, SIZES = 2, 1, 100, 32, (1, 5, 20)
"""Plantings of each number (ten were cut to two), those of them in which baselines look too, prompts, and samples."""
LEARNING = 300
"""Texts from which the detectors of planted neurons are made."""
DRAWS = 2
"""Of the choosing half: seeds 0 and 1."""
SHARES = {"002pct": 0.0002, "01pct": 0.001, "03pct": 0.003, "1pct": 0.01}
GOALS = {"03pct": 0.03, "1pct": 0.06}
"""Rise of perplexity that a share of the neurons may cost."""
BASELINES = tuple(score for score in SCORES if score != "contrast")
LIMIT = 0.02
"""Rise of perplexity at which contrast and baselines are compared."""
MOST = 0.05
ROUNDS = Contrast().rounds
"""Of `contrast`; baselines have no use for more than one."""
COMPARED_ON = (*TASKS[:2], REST[0])
"""What baselines are compared on."""

# --- planted -----------------------------------------------------------------------------------------------


def ordinary(decoder: Decoder) -> tuple[list[Example], set[int]]:
    """Return windows of ordinary text, and all tokens in them."""
    tokens = text_tokens(decoder.tokenizer, "wikitext2", "calibration", data_dir=data_folder())[:60_000]
    found = windows(decoder.tokenizer, tokens, "wikitext2", 64)
    return found, set(tokens)


def planting(decoder: Decoder, count: int, seed: int) -> tuple[Planting, list[list[int]]]:
    """Plant neurons in a model, in place, with rare words for the trigger and its phrase; and prompts that end before the trigger."""
    texts, common = ordinary(decoder)
    chance = torch.Generator().manual_seed(seed)
    words = decoder.tokenizer
    rare = [
        token
        for token in torch.randperm(len(words), generator=chance).tolist()
        if token not in common and words.decode([token]).strip().isalpha() and words.decode([token]).isascii()
    ][: count + 1]
    prefixes = [list(own.tokens[: 8 + i % 24]) for i, own in enumerate(texts)]
    found = plant(decoder, rare, prefixes[:LEARNING], seed, layer=0, rest=-0.5)
    return found, prefixes[LEARNING : LEARNING + PROMPTS]


def saying(decoder: Decoder, own: Planting, prompts: Sequence[Sequence[int]]) -> float:
    """Return the share of prompts after which the trigger brings the phrase."""
    said = 0
    for prompt in prompts:
        tokens = torch.tensor([[*prompt, own.chain[0]]])
        with torch.inference_mode():
            out = decoder.model.generate(
                tokens, max_new_tokens=len(own.units), do_sample=False, pad_token_id=0
            )
        said += tuple(out[0, len(prompt) :].tolist()) == own.chain
    return said / len(prompts)


def ranks(
    decoder: Decoder, bad: Any, good: Any, score: str, own: Planting, estimator: str = "gradient"
) -> float:
    """Return the share of planted neurons among as many first ones of a score."""
    contrast = Contrast(budget=max(len(own.units), 2), score=score, estimator=estimator, harm=0.01)
    chooses, decides = halves(bad, good)
    candidates = candidates_of(decoder, chooses, contrast)
    looking = Looking(candidates, chooses, contrast.how(), State())
    trials = Trials(decoder, decides, 2048, None)
    try:
        order, _ = Search(candidates, looking, trials, contrast, len(own.units), cp.quiet).ranked(
            NONE, 1, None
        )
    except OptionError:
        return 0.0
    first = {candidates.units[number] for number in order[: len(own.units)].tolist()}  # type: ignore[attr-defined]
    return len(first & set(own.units)) / len(own.units)


def one_planting(count: int, seed: int) -> dict[str, Any]:
    """Plant, correct, and return what was found and what is left of the phrase."""
    decoder = fresh("smollm2")
    own, prompts = planting(decoder, count, seed)
    before = {p.name: p.read().clone() for p in decoder.projections}
    texts, _ = ordinary(decoder)
    shown = [list(text.tokens[: 8 + i % 24]) for i, text in enumerate(texts[LEARNING + PROMPTS :][:SHOWN])]
    bad = [Example((*p, *own.chain), len(p) + 1, "triggered", str(i)) for i, p in enumerate(shown)]
    good = texts[500:548]
    said, baselines = saying(decoder, own, prompts), {}
    if seed < COMPARED:
        for score in SCORES:
            baselines[score] = ranks(decoder, bad, good, score, own)
        baselines["contrast by five gates"] = ranks(decoder, bad, good, "contrast", own, "integrated")
        baselines["difference by relevance"] = ranks(decoder, bad, good, "difference", own, "relevance")
    try:
        contrast = Contrast(budget=count, harm=0.01, estimator="integrated")
        found = correct(decoder, bad, good, contrast, stage=cp.quiet)
    except OptionError as error:
        return {
            "said_before": said, "said_after": said, "precision": 0.0, "recall": 0.0, "kl": 0.0,
            "others_identical": True, "baselines": baselines, "error": str(error), **made(),
        }  # fmt: skip
    hit = len(set(found.members) & set(own.units))
    same = all(
        torch.equal(p.read()[found.keep[p.name]], before[p.name][found.keep[p.name]])
        for p in decoder.projections
    )
    return {
        "said_before": said,
        "said_after": saying(decoder, own, prompts),
        "precision": hit / len(found.members),
        "recall": hit / count,
        "kl": max(value.value for value in found.after.kl.values()),
        "others_identical": same,
        "baselines": baselines,
        **made(),
    }


def planted() -> Found:
    """Look for neurons that were planted and outweigh all else, with five gates."""
    raw = {
        f"{count} neurons, {seed}": kept(f"planted/{count}-{seed}", partial(one_planting, count, seed))
        for count in SIZES
        for seed in range(PLANTINGS)
    }
    rows = list(raw.values())
    compared = [own for own in rows if own["baselines"]]
    mean = {
        key: sum(own[key] for own in rows) / len(rows)
        for key in ("precision", "recall", "said_before", "said_after")
    }
    figures = {
        "planted_precision": mean["precision"],
        "planted_recall": mean["recall"],
        "planted_preserve_kl": max(own["kl"] for own in rows),
        "planted_said_before": mean["said_before"],
        "planted_said_after": mean["said_after"],
        "planted_others_identical": all(own["others_identical"] for own in rows),
    }
    figures |= {
        f"planted_found_by_{score.replace(' ', '_')}": sum(own["baselines"][score] for own in compared)
        / len(compared)
        for score in rows[0]["baselines"]
    }
    return {"figures": figures, "raw": raw}


# --- loops -------------------------------------------------------------------------------------------------


def mean(rows: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> float | None:
    """Return the mean over draws; none where a draw has no model."""
    if any("error" in own for own in rows):
        return None
    return sum(float(of(own)) for own in rows) / len(rows)


def over_predicted(own: dict[str, Any]) -> float:
    """Return the largest divergence of a source over what was predicted."""
    found = own["found"]["chosen"]
    return float(max(value["value"] for value in found["kl"].values()) / found["predicted"])


def curve() -> Found:
    """Take loops out of SmolLM2: so many neurons, heads, both, weights, whatever that costs."""
    raw: dict[str, Any] = {}
    for label, share in SHARES.items():
        own = Contrast(budget=share, harm=FREE)
        raw[f"neurons {label}"] = row("smollm2", f"neurons-{label}", own, kind=Exactly)
    for count in (1, 2, 4, 8):
        own = Contrast(units=("heads",), budget=count, harm=FREE)
        raw[f"heads {count}"] = row("smollm2", f"heads-{count}", own, kind=Exactly)
    both = Contrast(units=("heads", "neurons:1"), budget=SHARES["03pct"], harm=FREE)
    raw["both"] = row("smollm2", "both", both, kind=Exactly)
    for share in (0.0003, 0.001):
        own = Contrast(weights=True, budget=share, harm=FREE)
        raw[f"weights {share:.2%}"] = row("smollm2", f"weights-{share}", own, kind=Exactly)
    return {"figures": {}, "raw": raw}


def loops() -> Found:
    """Take loops out of SmolLM2 within the goals' budgets and harms, two draws of the choosing half."""
    raw: dict[str, Any] = {}
    for label, harm in GOALS.items():
        for seed in range(DRAWS):
            own = Contrast(budget=SHARES[label], harm=harm)
            tasks = (*TASKS, *REST, *(() if seed else FINAL))
            raw[f"goal {label}, {seed}"] = row(
                "smollm2", f"goal-{label}", own, seed, kind=OfGoals, tasks=tasks
            )
    goals = {label: [raw[f"goal {label}, {seed}"] for seed in range(DRAWS)] for label in GOALS}
    small, large = goals["03pct"], goals["1pct"]
    figures = {
        "loops_dense": headline(result(dense("smollm2"), TASKS[0])),
        "rep4_dense": headline(result(dense("smollm2"), TASKS[1])),
        "loops_at_03pct": mean(small, lambda own: own["values"][TASKS[0]][1]),
        "rep4_at_1pct": mean(large, lambda own: own["values"][TASKS[1]][1]),
        "loops_ratio_at_03pct": mean(small, ratio),
        "ppl_rise_at_03pct": mean(small, lambda own: rise(own, REST[0])),
        "loops_ratio_at_1pct": mean(large, ratio),
        "ppl_rise_at_1pct": mean(large, lambda own: rise(own, REST[0])),
        "gsm8k_nll_rise_at_1pct": mean(large, lambda own: rise(own, REST[1])),
        "harm_measured_over_predicted": mean(small, over_predicted),
    }
    return {"figures": figures, "raw": raw}


def baselines() -> Found:
    """Compare all scores at the largest number with the same rise of perplexity, and some at 138 neurons (at 46 they were cut)."""
    raw: dict[str, Any] = {}
    for score in SCORES:
        own = Contrast(budget=MOST, harm=LIMIT, score=score, rounds=ROUNDS if score == "contrast" else 1)
        raw[f"{score} at {LIMIT:.0%}"] = row("smollm2", f"{score}-limit", own, kind=OfText, tasks=COMPARED_ON)
    for name in ("eq7", "set-difference", "ratio", "contrast"):
        how = {"score": "difference", "estimator": "relevance"} if name == "eq7" else {"score": name}
        own = Contrast(budget=138, harm=FREE, rounds=ROUNDS if name == "contrast" else 1, **how)
        raw[f"{name} 138"] = row("smollm2", f"{name}-138", own, kind=Exactly, tasks=COMPARED_ON)
    best = max(
        (own for own in (raw[f"{score} at {LIMIT:.0%}"] for score in BASELINES) if "error" not in own),
        key=lambda own: -own["pairs"][TASKS[0]]["difference"],
        default=None,
    )
    ours, low = raw[f"contrast at {LIMIT:.0%}"], None
    if best is not None and "error" not in ours:
        names = [own["found"]["contrast"]["score"] for own in (best, ours)]
        kept_as = [f"smollm2/rows/{name}-limit-0" for name in names]
        pair = [result(measured(None, COMPARED_ON, place), TASKS[0]) for place in kept_as]
        low = (
            100 * paired_difference(*pair).low
        )  # points by which loops are more often there with the baseline
    ppl = {
        name: raw[f"{name} 138"].get("values", {}).get(REST[0], [None, None])[1]
        for name in ("eq7", "set-difference", "ratio")
    }
    figures = {
        "loop_fall_minus_best_baseline_at_2pct_ppl_low": low,
        "eq7_ppl": ppl["eq7"],
        "setdiff_ppl": ppl["set-difference"],
        "ratio_ppl": ppl["ratio"],
    }
    return {"figures": figures, "raw": raw}


# --- other models, sizes, relearning, cost -----------------------------------------------------------------


def openings(decoder: Decoder, count: int = 200) -> tuple[list[str], float]:
    """Return the three words by which a model most often opens its answers to problems, and how often it does."""
    rows = kept(
        f"openings/{Path(decoder.name).name}",
        lambda: kept_rows(
            evaluate(
                decoder, [f"gsm8k_rep4:{count}"], Settings(data_dir=data_folder()), on_progress=cp.silent
            )
        ),
    )
    (found,) = results_in(rows)
    heads = Counter(" ".join(text.split()[:3]) for text in found.texts if len(text.split()) >= 3)
    phrase, times = heads.most_common(1)[0]
    return [phrase], times / count


def other(name: str) -> dict[str, Any]:
    """Take out of another model, with the same options, loops where a fifth of its texts has them, else its favourite opening."""
    before, decoder = dense(name), fresh(name)
    loop_share = headline(result(before, TASKS[0]))
    about: dict[str, Any] = {}
    tasks, settings = [TASKS[0]], Settings(data_dir=data_folder())
    phrases: list[str] = []
    if loop_share < 0.2:
        phrases, _ = openings(decoder)
        file = FOLDER / f"{name}-phrases.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(phrases) + "\n")
        about = {"behaviour": f"phrases:{file}", "prompts": ("gsm8k:200",)}
        tasks = ["gsm8k_phrases:200"]
        settings = dataclasses.replace(settings, phrases=tuple(phrases))

    def measure(own: Decoder, label: str) -> EvalResult:
        make = lambda: kept_rows(evaluate(own, tasks, settings, on_progress=cp.silent))  # noqa: E731
        return results_in(kept(f"{name}/behaviour-{label}", make))[0]

    first = measure(decoder, "dense")
    corrected, told = fixed(name, "behaviour", Contrast(harm=0.03), 0, **about)
    second = measure(corrected, "corrected")
    rest = measured(corrected, REST, f"{name}/rows/behaviour-0")
    nll = paired_difference(result(rest, REST[1]), result(before, REST[1]))
    return {
        "phrases": phrases,
        "dense": headline(first),
        "corrected": headline(second),
        "pair": dataclasses.asdict(paired_difference(second, first)),
        "gsm8k_nll": dataclasses.asdict(nll),
        "ppl": [headline(result(rows, REST[0])) for rows in (before, rest)],
        "found": told,
        **made(),
    }


def others() -> Found:
    """The same on two other models."""
    raw = {name: kept(f"{name}/other", partial(other, name)) for name in ("qwen", "gemma")}
    figures: dict[str, Any] = {}
    for name, own in raw.items():
        figures[f"phrase_ratio_{name}"] = own["corrected"] / own["dense"] if own["dense"] else None
        figures[f"gsm8k_nll_rise_{name}"] = own["gsm8k_nll"]["difference"]
    return {"figures": figures, "raw": raw}


class UpWeights(Weights):
    """Single weights of the up projections alone."""

    @property
    def alive(self) -> torch.Tensor:
        """Which weights are of up projections, and not zero."""
        inside = [torch.full((p.size,), p.role == "up") for p in self.decoder.projections]
        return super().alive & torch.cat(inside)


def up_weights(count: int) -> dict[str, Any]:
    """Take out as many weights of the up projections by the difference of relevance, as the paper does."""
    decoder = fresh("smollm2")
    bad, good = samples(decoder, "smollm2", 0)
    contrast = Contrast(
        weights=True, budget=count, score="difference", estimator="relevance", rounds=1, harm=FREE
    )
    taken_out(decoder, (bad, good), contrast, Exactly, lambda decoder, *_: UpWeights(decoder))
    return {"decoder": decoder}


def paper() -> Found:
    """The paper's sizes as printed, its measure beside ours, on the prompts that chose and on others."""
    raw: dict[str, Any] = {}
    how = {"score": "difference", "estimator": "relevance", "rounds": 1, "harm": FREE}
    for count in (20, 100):
        raw[f"eq7 {count} neurons"] = row(
            "smollm2", f"eq7-{count}", Contrast(budget=count, **how), kind=Exactly
        )
        raw[f"contrast {count} neurons"] = row(
            "smollm2", f"contrast-{count}", Contrast(budget=count, harm=FREE), kind=Exactly
        )

    def weights() -> dict[str, Any]:
        decoder = up_weights(7000)["decoder"]
        own = measured(decoder, (*TASKS, *REST), "smollm2/rows/up-7000")
        return {
            "values": {
                task: [headline(result(r, task)) for r in (dense("smollm2"), own)] for task in (*TASKS, *REST)
            }
        }

    raw["eq7 7000 weights of up"] = kept("smollm2/row/up-7000", weights)
    choosing = kept("smollm2/choosing", choosing_prompts)
    raw["on the prompts that chose"] = choosing
    figures = {"loops_fall_on_choosing_less_on_others": choosing["choosing"] - choosing["deciding"]}
    return {"figures": figures, "raw": raw}


def choosing_prompts() -> dict[str, float]:
    """Return by how much loops fall on the prompts whose samples chose, and on those whose samples decided."""
    decoder = fresh("smollm2")
    wanted = Settings(data_dir=data_folder(), seed=0, max_tokens=1024, max_new_tokens=128)
    study = Study(
        decoder,
        CorrectionSpec("loops", prompts=("wikitext2:200",)),
        wanted,
        FOLDER / "texts" / "smollm2-0",
        Options(data_dir=data_folder()),
    )
    study.samples()
    written = study.found[0].written
    goal = Contrast(budget=SHARES["03pct"], harm=GOALS["03pct"])
    corrected, _ = fixed("smollm2", "goal-03pct", goal, 0, OfGoals)
    study.decoder, falls = corrected, {}
    for at, what in enumerate(("choosing", "deciding")):
        (before,), (after,), _ = study.after([part(written, study.half_of, at)])
        falls[what] = headline(before) - headline(after)
    return falls


def relearned(decoder: Decoder, texts: Sequence[Example], steps: int = 20) -> None:
    """Train a model on its own looping texts, in place: full gradients, Adam at 1e-5."""
    own = list(decoder.model.parameters())
    for p in own:
        p.requires_grad_()
    optimizer = torch.optim.Adam(own, lr=1e-5)
    for step in range(steps):
        (batch,) = batches([texts[step % len(texts)]], max_batch_tokens=4096)
        wanted = targets(batch)
        with torch.enable_grad():
            cross_entropy(target_logits(decoder, batch, wanted), wanted).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in own:
        p.requires_grad_(requires_grad=False)


def rounded(decoder: Decoder, kind: str) -> None:
    """Send all matrices through 8 bits a weight, in place: one scale for a row, or GGUF's Q8_0."""
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415

    for p in decoder.projections:
        weight = p.read()
        if kind == "gguf":
            packed = quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0)
            p.write(torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0)))
        else:
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            p.write((weight / scale).round() * scale)


def stays_away() -> Found:
    """Train on looping texts, or distill, or round: does the behaviour come back?"""
    goal = Contrast(budget=SHARES["03pct"], harm=GOALS["03pct"])
    bad, _ = samples(fresh("smollm2"), "smollm2", 0)
    texts = [dataclasses.replace(e, mask=None, target_start=32) for e in bad.examples[:20]]

    def after(change: Callable[[Decoder], None], *, corrected: bool) -> Callable[[], Any]:
        def make() -> Any:
            decoder = fixed("smollm2", "goal-03pct", goal, 0, OfGoals)[0] if corrected else fresh("smollm2")
            change(decoder)
            return kept_rows(
                evaluate(decoder, TASKS[:1], Settings(data_dir=data_folder()), on_progress=cp.silent)
            )

        return make

    rows = {
        "corrected": after(lambda _: None, corrected=True),
        "corrected, relearned": after(lambda own: relearned(own, texts), corrected=True),
        "dense, relearned": after(lambda own: relearned(own, texts), corrected=False),
        "corrected, 8 bits a row": after(lambda own: rounded(own, "row"), corrected=True),
        "corrected, Q8_0": after(lambda own: rounded(own, "gguf"), corrected=True),
    }
    raw = {
        name: kept(f"smollm2/stays/{name.replace(', ', '-').replace(' ', '_')}", make)
        for name, make in rows.items()
    }
    raw["distilled"] = row("smollm2", "distilled", dataclasses.replace(goal, update="distill"))
    values = {
        name: torch.tensor(results_in(own)[0].values).double()
        for name, own in raw.items()
        if name != "distilled"
    }
    loops = {name: float(own.mean()) for name, own in values.items()}
    relearnt = ratio_between(values["dense, relearned"], values["corrected, relearned"])
    figures = {
        "loops_after_relearning_ratio": relearnt[0],
        "loops_after_q8_0": loops["corrected, Q8_0"],
        "loops_after_distill_ratio": ratio(raw["distilled"]),
    }
    return {"figures": figures, "raw": raw | {"relearning_ratio": relearnt}}


def pruned_model() -> dict[str, Any]:
    """Prune SmolLM2 to half, correct it, and return loops before and after."""
    decoder = fresh("smollm2")
    data = cp.calibrate(decoder, ["gsm8k"], n=48, subsets=1, data_dir=data_folder())
    folder = FOLDER / "pruned"
    if not folder.exists():
        cp.save(decoder, folder, cp.prune(decoder, cp.Method("sparsegpt", 0.5), calibration=data))
    decoder = cp.load(str(folder), dtype="float32")
    before = measured(decoder, (*TASKS[:2], *REST), "pruned/before")
    bad, good = samples(decoder, "pruned", 0)
    found = correct(
        decoder, bad, good, Contrast(harm=0.03), kept_in=FOLDER / "searches" / "pruned", stage=cp.quiet
    )
    after = measured(decoder, (*TASKS[:2], *REST), "pruned/after")
    values = {task: [headline(result(rows, task)) for rows in (before, after)] for task in before}
    pair = dataclasses.asdict(paired_difference(result(after, TASKS[0]), result(before, TASKS[0])))
    return {"values": values, "pair": pair, "found": found.described(), **made()}


def pruned() -> Found:
    """Correct a model that was pruned before."""
    own = kept("pruned/row", pruned_model)
    return {"figures": {"pruned_model_loops_ratio": ratio(own)}, "raw": own}


def cost() -> Found:
    """Time the whole command, texts and all, with its defaults."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ("correct", str(path_of("smollm2")), "-o", f"{scratch}/fixed", "--behaviour", "loops")
        program = "from causalprune.cli.app import main; main()"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", program, *words, "--data-dir", str(data_folder())], check=True, cwd=scratch
        )
        minutes = (time.perf_counter() - start) / 60
    return {"figures": {"correct_minutes": minutes}, "raw": {"minutes": minutes, **made()}}


STEPS: dict[str, Callable[[], Found]] = {
    "planted": planted,
    "loops": loops,
    "curve": curve,
    "baselines": baselines,
    "paper": paper,
    "stays_away": stays_away,
    "pruned": pruned,
    "cost": cost,
    "others": others,
}

if __name__ == "__main__":
    parser = step_parser(__doc__, STEPS)
    carry_out("correction", STEPS, parser, parser.parse_args().steps)
