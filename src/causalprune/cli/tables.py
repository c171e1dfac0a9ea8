"""Tables of results, as rich renderables and as Markdown: nothing here measures anything."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from causalprune.attribution import estimate, reliability
from causalprune.checkpoints import Verification
from causalprune.core import Effects, EvalResult, unknown
from causalprune.evaluation import (
    Row,
    Tried,
    answered,
    bracketed,
    headline,
    interval,
    of_task,
    paired_difference,
)
from causalprune.reports import (
    QUANTISED_ZEROS,
    RELIABLE_FROM,
    SPEED_OF_ZEROS,
    Verdict,
    measured,
    reliability_word,
)
from causalprune.runs import Looked, Outcome, Plan
from causalprune.shipping import Written

STYLES = {"better": "green", "worse": "red"}
STRONGEST = 10
UNITS = {"nats_per_token": "nats/token"}
"""What a metric is shown as, where that is not its name."""


def comparison(rows: Sequence[Row], *, against: str | None = None, sizes: Sequence[str] = ()) -> Table:
    """Return one row per model, one column per metric: value, and paired difference with 95 % interval.

    Differences are to the row called `against`, or to the first. A value is green or red only where
    the interval of its difference excludes zero. `sizes` says of every row how large and fast its model is.
    """
    base_row = _base(rows, against)
    base = {_column(result): result for result in rows[base_row][1]}
    columns = list(dict.fromkeys(_column(result) for _, results in rows for result in results))
    draws = {r.description["draws"] for _, results in rows for r in results if "draws" in r.description}
    said = f"mean ± standard deviation of {max(draws)} draws" if draws else "value"
    lines = [f"{said} (paired difference to {rows[base_row][0]}, 95 % interval)"]
    lines += dict.fromkeys(said for result in base.values() for said in of_task(result))
    table = Table(caption=Text("\n".join(lines)))
    table.add_column("model", no_wrap=True)
    for task, metric in columns:
        table.add_column(f"{task}\n{UNITS.get(metric, metric)}", justify="right", overflow="fold")
    for i, (label, results) in enumerate(rows):
        own = {_column(result): result for result in results}
        name = "\n".join(filter(None, (label, *sizes[i : i + 1])))
        table.add_row(name, *(_cell(own.get(c), base.get(c), i == base_row) for c in columns))
    return table


def figures(rows: Sequence[Row], *, against: str | None = None) -> list[dict[str, Any]]:
    """Return the numbers of `comparison`, a row for each model; the differences of the row compared with are null."""
    base_row = _base(rows, against)
    base = {_column(result): result for result in rows[base_row][1]}
    found = []
    for i, (label, results) in enumerate(rows):
        cells = []
        for result in results:
            other = None if i == base_row else base.get(_column(result))
            alone = other is None or _other_text(result, other)
            difference = None if other is None or alone else paired_difference(result, other)
            measure = {"task": result.task, "metric": result.metric}
            measure |= {
                key: result.description[key] for key in ("draws", "spread") if key in result.description
            }
            cells.append(measure | vars(interval(result)) | {"difference": difference})
        found.append({"label": label, "results": cells})
    return found


def _base(rows: Sequence[Row], against: str | None) -> int:
    """Return the place of the row that others are compared with."""
    labels = [label for label, _ in rows]
    if against is not None and against not in labels:
        raise unknown("row", against, labels)
    return 0 if against is None else labels.index(against)


def sizes(record: Mapping[str, Any]) -> list[str]:
    """Return of every row of a record how large and fast its model is, in a few words; empty where that was not noted."""
    return [_size(row) if "bytes" in row else "" for row in record.get("rows", [{}])]


def _size(row: Mapping[str, Any]) -> str:
    size, speed = f"{row['bytes'] / 1e6:,.0f} MB", row.get("speed")
    if speed:
        return f"{size}, writing {speed['writing_gain']:.2f}×"
    zeros = row["criterion"] != "dense" and not row.get("removed")
    return f"{size}, speed 1×" if zeros else size


def _column(result: EvalResult) -> tuple[str, str]:
    return result.task, result.metric


def _cell(result: EvalResult | None, base: EvalResult | None, is_base: bool) -> Text:
    if result is None:
        return Text("–")
    value, ended = f"{headline(result):.4g}", f"\n{how}" if (how := answered(result)) else ""
    if "spread" in result.description:
        value += f" ± {result.description['spread']:.2g}"
    if is_base or base is None or _other_text(result, base):
        own = interval(result)
        return Text(f"{value}\n{bracketed(own.low, own.high, own.n, '.4g')}{ended}")
    difference = paired_difference(result, base)
    bounds = f"{difference.difference:+.3g} {bracketed(difference.low, difference.high, difference.n)}"
    return Text(f"{value}\n{bounds}{ended}", style=STYLES.get(difference.verdict, ""))


def _other_text(result: EvalResult, base: EvalResult) -> bool:
    """Tell whether results are of texts that two models wrote each for itself."""
    return base.description.get("written_by") != result.description.get("written_by")


def to_markdown(table: Table) -> str:
    """Return a table of this module as Markdown; the lines of a cell come with breaks between them."""
    cells = [[_plain(column.header) for column in table.columns]]
    cells += [
        list(row)
        for row in zip(*[[_plain(c) for c in column.cells] for column in table.columns], strict=True)
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---|" + "---:|" * (len(table.columns) - 1))
    return "\n".join(lines) + (f"\n\n{table.caption}\n" if table.caption else "\n")


def _plain(cell: Any) -> str:
    return str(cell).replace("\n", " <br> ")


def looked(found: Sequence[Looked]) -> Table:
    """Return the sources of `causalprune data`: rows, what would be left out, and tokens of a row."""
    table = Table(caption="tokens of a row: least, median, most")
    for column in ("source", "rows", "usable", "left out", "tokens", "of these targets"):
        table.add_column(column, justify="left" if column in ("source", "left out") else "right")
    for own in found:
        also = [f"{n} also in {place}" for place, n in own.skipped.also_in.items()]
        out = ", ".join([str(replace(own.skipped, excluded=0)), *also]).removeprefix(", ")
        counts = (", ".join(f"{n:g}" for n in kind) for kind in (own.tokens, own.target_tokens))
        table.add_row(own.source, f"{own.rows:,}", f"{own.usable:,}", out, *counts)
    return table


def marked(own: Looked, row: int) -> Text:
    """Return one row of a source as the model sees it, its targets between marks."""
    text = Text(f"{own.source}, row {row}; targets stand between ▶ and ◀:\n", style="dim")
    for piece, target in own.shown:
        text.append(f"▶{piece}◀" if target else piece, style="bold" if target else "not dim")
    return text


def strongest(effects: Effects) -> Table:
    """Return the units whose removal raises the loss most, and how certain the effects are."""
    found, own = estimate(effects), reliability(effects)
    known = ~found.value.isnan()
    lines = []
    if "certain_signs" in own:
        lines += [f"{int((found.value < 0).sum())} of {int(known.sum())} units lower the loss when removed"]
        lines += [f"certain of their sign: {own['certain_signs']:.0%} of the units"]
    if "split_half" in own:
        word = f"{reliability_word(own['split_half'])} ({RELIABLE_FROM})"
        lines.append(
            f"two halves of the examples rank units alike: {own['split_half']:.2f} (Spearman), {word}"
        )
    if unreached := effects.description.get("unreached_experts"):
        lines.append(f"{len(unreached)} experts got no token and are unmeasured")
    table = Table(title="most critical units", caption="\n".join(lines))
    unit_of = "logits" if effects.estimator == "relevance" else "nats"
    for name in ("layer", "unit", f"Δ, {unit_of}/token", "95 % interval"):
        table.add_column(name, justify="right")
    for i in found.value.nan_to_num(-math.inf).argsort(descending=True)[:STRONGEST].tolist():
        n, unit = len(effects.intact_nats), effects.units[i]
        bounds = bracketed(float(found.low[i]), float(found.high[i]), n, ".4f")
        name = f"{unit.kind} {unit.index}"
        table.add_row(str(unit.layer), name, f"{float(found.value[i]):.4f}", bounds)
    return table


def effects(found: Effects) -> dict[str, Any]:
    """Return the effects of all units, with intervals, and how far they can be trusted."""
    own = measured(found)[0]
    return {"effect": own.effect, "exact": own.exact, "units": own.units, "reliability": own.reliability}


def stability(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of `causalprune stability`: draws, calibrations, swaps, pairs."""
    draws = Table(title="independent draws of problems")
    keys: tuple[str, ...] = (
        "problems_per_draw",
        "spearman_between_draws",
        "top_fifth_between_draws",
        "split_half",
    )
    keys += ("certain_signs", "median_sd_between_draws_nats", "sd_between_units_nats")
    _fill(draws, ("source", *keys), found["within"])
    first = next(iter(found["within"]))
    between = Table(title=f"rank correlation with {first}")
    _fill(between, ("source", "spearman", "ceiling", "top_fifth"), found["between"])
    swaps = Table(title=f"{first} problems swapped for others: rank correlation with all of {first}")
    shares = list(next(iter(found["swaps"].values()), {}))
    _fill(swaps, ("swapped for", *shares), found["swaps"])
    pairs = Table(title="strong units removed in pairs: joint effect − sum")
    if "interactions" in found:
        own = {key: value for key, value in found["interactions"].items() if key != "strongest"}
        _fill(pairs, ("source", *own), {first: own})
    return [table for table in (draws, between, swaps, pairs) if table.row_count]


def _fill(table: Table, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[key]:.3g}" if key in values else "–" for key in columns[1:]))


def swept(tried: Sequence[Tried]) -> Table:
    """Return what a sweep tried, and which sparsities keep what was asked for."""
    table = Table(title="differences to dense [95 % interval]")
    columns = ("sparsity", *(task for task, _ in tried[0].differences), "keeps it")
    for column in columns:
        table.add_column(column, justify="right")
    for one in tried:
        cells = [f"{d.difference:+.3g} {bracketed(d.low, d.high, d.n)}" for _, d in one.differences]
        table.add_row(f"{one.sparsity:g}", *cells, "yes" if one.holds else "no")
    return table


def inspection(name: str, found: Mapping[str, Any]) -> Table:
    """Return what `causalprune inspect` prints of a model."""
    table = Table(title=name, show_header=False)
    for key, value in found.items():
        table.add_row(key.replace("_", " "), _lines(value))
    return table


def _lines(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_lines(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plan(plan: Plan) -> Table:
    """Return the plan of a recipe: jobs, tokens, time, memory, disk (all estimated)."""
    total = sum(job.tokens for job in plan.jobs)
    table = Table(
        title=f"plan for {plan.folder} (estimates)",
        caption=(
            f"{plan.shape.layers} layers × {plan.shape.heads} heads, {plan.shape.parameters / 1e9:.3g} G parameters · "
            f"about {_duration(plan.seconds)}, {plan.memory_bytes / 2**30:.1f} GiB of memory, "
            f"{plan.disk_bytes / 2**30:.2f} GiB of disk"
        ),
    )
    for column in ("stage", "times", "tokens", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for job in plan.jobs:
        seconds = plan.seconds * job.tokens / max(total, 1)
        table.add_row(job.name, f"{job.count:,}", f"{job.tokens:,}", _duration(seconds))
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def outcome(made: Outcome) -> str:
    """Return what came of a command, a line each: size, zeros, speed, where it is, and how to go on."""
    lines = [f"size: {made.after.beside(made.before)}"]
    if made.zeros:
        share = f"{made.zeros / made.weights:.4%}"
        lines.append(f"zeros: {made.zeros:,} of {made.weights:,} prunable weights are zero ({share})")
        lines.append(f"quantised: {QUANTISED_ZEROS}")
    if made.speed is not None:
        lines.append(
            f"speed: {made.speed}, by {made.speed.how}; other runtimes, batches and memory not measured"
        )
    else:
        late = "not measured: not asked for, or it would have taken more than a few seconds"
        lines.append(f"speed: {SPEED_OF_ZEROS if made.after == made.before else late}")
    lines += [f"saved: {made.checkpoint}"] if made.checkpoint else []
    return "\n".join([*lines, f"next: {made.then}"])


def verdict(found: Verdict) -> str:
    """Return what a run says of its models, a line for each reason."""
    return "\n".join([f"verdict: {found.headline}", *(f"  {reason}" for reason in found.reasons)])


def unrouted(names: Sequence[str], what: str) -> str:
    """Return which experts no calibration token reached, and what was done with them."""
    return f"{len(names)} {what}: {', '.join(names[:STRONGEST])}"


def verification(report: Verification) -> str:
    """Return the findings of a verification, a line each, or that all is as the manifest says."""
    head = (
        f"{report.folder}: {report.matrices} matrices, {report.zeros:,} zeros of {report.weights:,} weights"
    )
    if report.ok:
        return f"{head}; as the manifest says"
    return "\n".join([head, *(f"  {finding.message}" for finding in report.findings)])


def shipped(made: Written) -> str:
    """Return what became of a checkpoint as a file, a line each: size, types, zeros, where it is, and how to run it."""
    types = Counter[str]()
    for own in made.matrices:
        types[own.type] += own.weights
    total = sum(types.values())
    shares = ", ".join(f"{kind} {n / total:.1%}" for kind, n in types.most_common())
    zeros = f"{made.kept:,} of {made.zeros_before:,} weights that were zero are in the file ({made.zeros:,} with those made by rounding)"
    lost = made.kept < 0.99 * made.zeros_before
    return "\n".join(
        [
            f"size: {made.bytes / 1e6:.1f} MB ({made.mix}: {shares} of the weights in matrices)",
            f"zeros: {zeros}"
            + ("; types with an offset for each block, as Q4_K, do not keep them" if lost else ""),
            f"saved: {made.file}",
            runs_in(made.file),
        ]
    )


def runs_in(file: Path | str) -> str:
    """Return the command that a GGUF file is tried with."""
    return f"next: llama-cli -m {shlex.quote(str(file))}   (a program of llama.cpp's, which causalprune[ship] does not bring)"
