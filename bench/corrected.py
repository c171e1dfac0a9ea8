"""What the steps of bench/correction.py share: samples, corrections that go on, rows that are measured once."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import torch
from common import RUNS, data_folder, made
from models import fetched
from torch import Tensor

import causalprune as cp
from causalprune.checkpoints.embedded import embedded_model
from causalprune.core.errors import OptionError
from causalprune.core.ledger import Ledger
from causalprune.core.resuming import State
from causalprune.core.types import Calibration, Decoder, EvalResult
from causalprune.correction.candidates import Candidates, Chosen
from causalprune.correction.correcting import candidates_of, correct
from causalprune.correction.evidence import Looking
from causalprune.correction.measuring import Trials
from causalprune.correction.records import Contrast, Point
from causalprune.correction.samples import Given, Half, halves
from causalprune.correction.search import NONE, Search
from causalprune.evaluation.measures import evaluate, together
from causalprune.evaluation.results import headline, kept_rows, paired_difference, results_in
from causalprune.evaluation.settings import Settings
from causalprune.interventions.units import list_units
from causalprune.pruning.closing import close
from causalprune.runs.correcting import drawn_for, joined, to_stay
from causalprune.runs.recipe import CalibrationSpec
from causalprune.runs.single import Options
from causalprune.runs.undesired import CorrectionSpec, Study

FOLDER = RUNS / "correction"
MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": embedded_model,
    "qwen": lambda: fetched("qwen"),
    "gemma": lambda: fetched("gemma"),
}
SAMPLES = ("wikitext2:24", "gsm8k:48")
TASKS = (
    *("wikitext2_loops:200", "wikitext2_rep4:200"),
    *("gsm8k_loops:100", "gsm8k_rep4:100", "wikitext2_uniqueness:200"),
)
REST = ("wikitext2_ppl:40000", "gsm8k_nll:200")
FINAL = ("c4_loops:200", "arc_challenge_nll:200")
FREE = math.inf
"""No limit of harm."""
TEXT = "wikitext2"
"""The source whose perplexity limits how much goes where models are compared at the same harm."""
PROBLEMS, LOST = "gsm8k", 0.02
"""Problems, and the nats a token that they may lose where a model has to reach a goal."""
RESAMPLES = 10_000


@cache
def path_of(name: str) -> Path:
    """Return the folder of a model."""
    return MODELS[name]()


def fresh(name: str) -> Decoder:
    """Return a model of its own, to be changed."""
    return cp.load(str(path_of(name)), dtype="float32")


def kept(name: str, make: Callable[[], Any]) -> Any:
    """Return the JSON value of a row of these steps, made once."""
    return common.kept(f"correction/{name}", make)


def samples(
    decoder: Decoder,
    name: str,
    seed: int,
    behaviour: str = "loops",
    prompts: Sequence[str] = ("wikitext2:200",),
) -> tuple[Calibration, Calibration]:
    """Return what is undesired and what is to stay, with their halves; texts are written once."""
    wanted = CalibrationSpec(("gsm8k",), seed=seed, max_tokens=1024)
    settings = Settings(data_dir=data_folder(), seed=seed, max_tokens=1024, max_new_tokens=128)
    asked = CorrectionSpec(behaviour, prompts=tuple(prompts), preserve=SAMPLES)
    study = Study(
        decoder, asked, settings, FOLDER / "texts" / f"{name}-{seed}", Options(data_dir=data_folder())
    )
    bad, clean = study.samples()
    drawn = to_stay(study, drawn_for(study, wanted))
    return bad, joined([*drawn, clean])


def measured(decoder: Decoder | None, tasks: Sequence[str], name: str) -> dict[str, list[dict[str, Any]]]:
    """Return results by task as they are kept, made once for all tasks that take one pass."""
    settings, found = Settings(data_dir=data_folder()), dict[str, list[dict[str, Any]]]()
    for group in together(tasks):
        found |= kept(f"{name}/{filed(group)}", partial(_results, decoder, group, settings))
    return found


def filed(group: Sequence[str]) -> str:
    """Return the name of the row that has the results of tasks that take one pass."""
    return "+".join(group).replace(":", "-")


def _results(
    decoder: Decoder | None, tasks: Sequence[str], settings: Settings
) -> dict[str, list[dict[str, Any]]]:
    assert decoder is not None, f"{tasks} should have been measured by now"
    found = evaluate(decoder, tasks, settings, on_progress=cp.silent)
    return {task: kept_rows([own]) for task, own in zip(tasks, found, strict=True)}


def result(rows: dict[str, list[dict[str, Any]]], task: str) -> EvalResult:
    """Return a kept result."""
    return results_in(rows[task])[0]


@cache
def dense(name: str, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the results of the dense model."""
    return measured(fresh(name), (*TASKS, *REST, *FINAL), f"{name}/dense")


class OfText(Search):
    """A search that is bound by the perplexity of general text alone, and takes as many as that allows."""

    def _shares(self, point: Point) -> dict[str, float]:
        return {source: share * (source == TEXT) for source, share in super()._shares(point).items()}

    def _best(self, fitting: list[tuple[Chosen, Point]]) -> tuple[Chosen, Point]:
        return max(fitting, key=lambda own: own[1].count)


class OfGoals(Search):
    """A search that is bound by the perplexity of general text, and by what its problems may lose."""

    def _shares(self, point: Point) -> dict[str, float]:
        found = super()._shares(point)
        return {source: found[source] if source == TEXT else 0.0 for source in found} | {
            PROBLEMS: point.harm[PROBLEMS].value / LOST
        }


class Exactly(Search):
    """A search that takes a number whatever that does."""

    def run(self) -> tuple[Chosen, Point]:
        """Return the first of the last round's order, those of earlier rounds before them where they stay."""
        chosen, point = NONE, None
        for number in range(1, self.how.rounds + 1):
            stay, part = (NONE, 1.0) if self.how.anew else (chosen, number / self.how.rounds)
            more = math.ceil(self.most * part) - len(stay)
            if more < 1:  # all of them went in an earlier round
                continue
            order, harms = self.ranked(chosen, number, point)
            chosen = torch.cat([stay, order[:more]])
            point = self.point(chosen, number, float(harms[:more][-1]) if len(order) else 0.0)
        assert point is not None
        return chosen, point


def taken_out(
    decoder: Decoder,
    given: tuple[Given, Given],
    contrast: Contrast,
    kind: type[Search],
    candidates: Callable[[Decoder, Half, Contrast], Candidates] = candidates_of,
    slopes: Path | None = None,
) -> dict[str, Any]:
    """Take out of a model, in place, what another search than the library's chooses; return what was found, units by their numbers.

    `given` are undesired samples and those to preserve. Slopes of a round are kept in the folder `slopes`, where other searches
    begin with the same ones.
    """
    chooses, decides = halves(*given, decoder.tokenizer)
    own = candidates(decoder, chooses, contrast)
    looking = Looking(own, chooses, contrast.how(), State(slopes, [dataclasses.asdict(contrast.how())]))
    with (
        nullcontext()
        if slopes is None
        else Ledger(slopes.with_suffix(".ledger"), decides.described()) as book
    ):
        trials = Trials(decoder, decides, contrast.max_batch_tokens, book)
        chosen, point = kind(own, looking, trials, contrast, contrast.number(own.count), cp.quiet).run()
    own.write(chosen)
    told = {"chosen": dataclasses.asdict(point), "contrast": dataclasses.asdict(contrast)}
    if not contrast.weights:
        told["numbers"] = chosen.tolist()
    return told | {"search": kind.__name__, "candidates": own.count}


def fixed(
    name: str,
    label: str,
    contrast: Contrast,
    seed: int,
    kind: type[Search] = Search,
    **about: Any,
) -> tuple[Decoder, dict[str, Any]]:
    """Return a corrected model, and what was found; a finished search is not made again."""
    decoder = fresh(name)
    own, row = dataclasses.replace(contrast, seed=seed), f"{name}/found/{label}-{seed}"
    if common.is_kept(f"correction/{row}"):
        told = kept(row, dict)
        if "numbers" in told:
            units = list(list_units(decoder, own.units).values())
            close(decoder, [units[number] for number in told["numbers"]])
            return decoder, told
    bad, good = samples(decoder, name, seed, **about)
    sought = about.get("behaviour", "loops").partition(":")[0]
    place = (
        FOLDER
        / "searches"
        / f"{name}-{seed}-{'-'.join(own.units)}-{'weights' if own.weights else 'units'}-{sought}"
    )
    start = time.perf_counter()
    if kind is Search:
        found = correct(decoder, bad, good, own, kept_in=place, stage=cp.quiet).described()
    else:
        slopes = place.with_name(f"{place.name}-{own.estimator}.slopes")
        found = taken_out(decoder, (bad, good), own, kind, slopes=None if own.weights else slopes)
    told = kept(row, lambda: found | {"seconds": time.perf_counter() - start})
    return decoder, told


def row(
    name: str,
    label: str,
    contrast: Contrast,
    seed: int = 0,
    *,
    kind: type[Search] = Search,
    tasks: Sequence[str] = (*TASKS, *REST),
) -> dict[str, Any]:
    """Return a row: what went, results, and what became of loops and of the rest, in pairs."""

    def make() -> dict[str, Any]:
        found, place = f"{name}/found/{label}-{seed}", f"{name}/rows/{label}-{seed}"
        groups = [f"correction/{place}/{filed(group)}" for group in together(tasks)]
        if all(map(common.is_kept, (f"correction/{found}", *groups))):
            decoder, told = None, kept(found, dict)
        else:
            try:
                decoder, told = fixed(name, label, contrast, seed, kind)
            except OptionError as error:
                return {"error": str(error)}
        own = measured(decoder, tasks, place)
        before = dense(name)
        pairs = {
            task: dataclasses.asdict(paired_difference(result(own, task), result(before, task)))
            for task in tasks
        }
        values = {task: [headline(result(rows, task)) for rows in (before, own)] for task in tasks}
        first, second = (torch.tensor(result(rows, TASKS[0]).values) for rows in (before, own))
        ratios = {TASKS[0]: ratio_between(first.double(), second.double())}
        return {"found": told, "values": values, "pairs": pairs, "ratios": ratios, **made()}

    return kept(f"{name}/row/{label}-{seed}", make)


def ratio_between(before: Tensor, after: Tensor) -> list[float]:
    """Return the ratio of two means over the same prompts, with its 95 % interval over resamples of them."""
    random = torch.Generator().manual_seed(0)
    draws = torch.randint(len(before), (RESAMPLES, len(before)), generator=random)
    own = after[draws].mean(1) / before[draws].mean(1)
    low, high = own[own.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=own.dtype)).tolist()
    return [float(after.mean() / before.mean()), low, high]


def ratio(own: dict[str, Any], task: str = TASKS[0]) -> float | None:
    """Return a value after over before."""
    if "error" in own:
        return None
    before, after = own["values"][task]
    return after / before if before else None


def rise(own: dict[str, Any], task: str) -> float | None:
    """Return after less before; of perplexity as a share."""
    if "error" in own:
        return None
    before, after = own["values"][task]
    return after / before - 1 if task.endswith("ppl:40000") else after - before
