"""Write the tables of README and docs from the result files: between `<!-- table: NAME -->` and `<!-- end -->`.

python bench/tables.py           # write
python bench/tables.py --check   # fail if a table is not what its result file says
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, record
from tabled import CIRCUITS, OTHERS

from causalprune.cli.tables import comparison, to_markdown
from causalprune.cli.tables import stability as stability_tables
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import headline, paired_difference, results_in, rows_of

TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LEFT_OUT = ("arc_challenge", "accuracy")
"""Options differ in length, so ARC-Challenge is usually reported by `acc_norm`."""
CHOSEN, WIDEST = ("accuracy", "acc_norm"), 5
"""Measures of what is chosen from options, and the most measures that a table has side by side."""
CHOICES = ("effect", "activation", "magnitude", "random")
CALIBRATIONS = {
    "gsm8k": "causal, 48 GSM8K problems",
    "general": "causal, a quarter of them general text",
    "own": "causal, with the model's own answers",
    "mix": "causal, on the mix",
}
SHOWN, BUDGETS = (4, 8, 16, 32, 64), (None, 10.0, 20.0, 50.0)
"""Rows of the reliability table; all of them are in the result file."""
LEAN = {
    "time over the build before's, SmolLM2, 48 problems": ("time_over_before_smollm2", "{:.2f}"),
    "the same with text of its own preserved, which is written first": (
        "time_with_preserve_over_before_smollm2",
        "{:.2f}",
    ),
    "the same, Qwen2.5-Coder-0.5B, without": ("time_over_before_qwen", "{:.2f}"),
    "bytes for each weight that training holds beside the model": ("train_bytes_per_weight", "{:.2f}"),
    "nats a token more than the build before, upper end, SmolLM2": (
        "loss_minus_before_smollm2_high",
        "{:+.4f}",
    ),
    "Gemma 3 270M": ("loss_minus_before_gemma_high", "{:+.4f}"),
    "Qwen2.5-Coder-0.5B": ("loss_minus_before_qwen_high", "{:+.4f}"),
    "nats a token over dense with the problems that fit into the build before's time": (
        "rise_at_before_time",
        "{:+.4f}",
    ),
    "rise of the loss over SparseGPT's, five draws, defaults": ("rise_over_sparsegpt_50", "{:.2f}"),
    "the same at 2:4, one draw": ("causal_24_rise_over_sparsegpt_24", "{:.2f}"),
    "perplexity of WikiText-2 over dense's, with text of its own": ("ppl_over_dense_50", "{:.2f}"),
    "nats a token that this text costs the task": ("task_cost_of_preserve", "{:+.4f}"),
    "time from files over time in memory, the same bits": ("stream_time_over_memory_smollm2", "{:.2f}"),
    "GiB of a step of training in the shape of Llama 3 8B, from files": ("stream_peak_gib_8b", "{:.1f}"),
    "in memory": ("memory_peak_gib_8b", "{:.1f}"),
    "runs of 20 that a kill made differ": ("kills_lost", "{}"),
}
"""What `lean` shows: a figure's name and its form, by what it is called."""
PAGES = ("README.md", "docs/*.md")


def reported(results: list[EvalResult]) -> list[EvalResult]:
    """Return the results that tables and figures go by: one a task."""
    return [r for r in results if (r.task, r.metric) != LEFT_OUT]


def _rows(name: str, step: str, only: tuple[str, ...] = ()) -> str:
    """Return dense and every row of a step, or some of them, with paired intervals."""
    raw = record(name)["raw"]
    rows = rows_of(raw[step]) if step in raw else []
    rows = [row for row in rows if not only or row[0] in only]
    if not rows:
        return "Not measured yet.\n"
    return _compared(rows)


def _compared(rows: Sequence[tuple[str, list[EvalResult]]]) -> str:
    """Return rows with paired intervals; what is chosen from options in a table of its own where all would be too wide."""
    shown = [(label, reported(results)) for label, results in rows]
    if len(shown[0][1]) <= WIDEST:
        return to_markdown(comparison(shown))
    kinds = (lambda own: own.metric not in CHOSEN, lambda own: own.metric in CHOSEN)
    parts = [[(label, [own for own in results if kind(own)]) for label, results in shown] for kind in kinds]
    return "\n".join(to_markdown(comparison(part)) for part in parts)


def calibrations() -> str:
    """What `causal` makes of other calibration data, on the same measures."""
    raw, rows = record("quality")["raw"], dict[str, list[EvalResult]]()
    for step, name in CALIBRATIONS.items():
        found = dict(rows_of(raw[step])) if step in raw else {}
        if "causal-matrix-0.5" in found:
            rows |= {"dense": found["dense"], name: found["causal-matrix-0.5"]}
    if len(rows) < 3:
        return "Not measured yet.\n"
    return _compared([*rows.items()])


def front() -> str:
    """What half of the weights costs a model that solves problems: plain numbers, for the README."""
    own, names = record("quality")["raw"], ("dense", "causal", "sparsegpt", "wanda")
    rows = {
        label.split("-")[0]: results
        for label, results in rows_of(own["qwen"])
        if label.endswith(("dense", "-0.5"))
    }
    if not {*names} <= {*rows}:
        return "Not measured yet.\n"
    size = 2 * record("speed")["raw"]["rows"]["qwen whole"]["parameters"]
    lines = ["| model | problems solved | prunable weights | size and speed |", "|---|---:|---:|---|"]
    for name in names:
        solved = next(result for result in rows[name] if result.task == "gsm8k_cot")
        rest = ("all", f"{size / 1e9:.2f} GB in bfloat16") if name == "dense" else ("half", "as dense")
        lines.append(f"| {name} | {sum(solved.values):.0f} of {len(solved.values)} | {' | '.join(rest)} |")
    return "\n".join(lines) + "\n"


def draws() -> str:
    """Rise of the loss over dense at 50 % on every calibration draw."""
    raw = record("quality")["raw"]
    names = [name for name in ("gsm8k", *(f"draw_{number}" for number in range(1, 5))) if name in raw]
    labels = ("wanda-row-0.5", "sparsegpt-matrix-0.5", "causal-matrix-0.5")
    if len(names) < 2:
        return "Not measured yet.\n"
    lines = ["| draw | " + " | ".join(labels) + " |", "|---|" + "---:|" * len(labels)]
    for name in names:
        loss = {
            label: headline(next(r for r in results if r.task == "gsm8k_nll"))
            for label, results in rows_of(raw[name])
        }
        cells = [f"+{loss[label] - loss['dense']:.3f}" if label in loss else "–" for label in labels]
        lines.append(f"| {name.removeprefix('draw_').replace('gsm8k', '0')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def oracle() -> str:
    """SparseGPT here against llm-compressor's."""
    found = record("quality")["figures"]
    names = {
        "keep decisions that are equal, every matrix with the intact model's inputs": "oracle_sparsegpt_agreement",
        "the same from end to end": "oracle_sparsegpt_agreement_end_to_end",
        "llm-compressor with itself from end to end, sequences in reverse order": "oracle_llmcompressor_agreement_with_itself_end_to_end",
        "error of the outputs, ours over theirs": "oracle_sparsegpt_error_over_llmcompressor",
        "seconds, ours over theirs": "sparsegpt_seconds_over_llmcompressor",
        "largest resident set, ours over theirs": "sparsegpt_rss_over_llmcompressor",
    }
    if any(name not in found for name in names.values()):
        return "Not measured yet.\n"
    lines = ["| SmolLM2-135M-Instruct, 48 problems, 50 % | |", "|---|---:|"]
    lines += [f"| {label} | {found[name]:.4f} |" for label, name in names.items()]
    return "\n".join(lines) + "\n"


def predicted() -> str:
    """How the rise that gradients predict for a pruned group agrees with the measured one."""
    own = record("quality")["figures"]
    if "predicted_rank_correlation" not in own:
        return "Not measured yet.\n"
    lines = ["| rank correlation with the measured divergence | all trials | at 50 % |", "|---|---:|---:|"]
    for name, suffix in (
        ("Fisher information as a quadratic form", ""),
        ("its diagonal (`fisher`)", "_diagonal"),
    ):
        at = [own[f"predicted_rank_correlation{suffix}{part}"] for part in ("", "_50")]
        lines.append(f"| {name} | {at[0]:.2f} | {at[1]:.2f} |")
    return "\n".join(lines) + "\n"


def _held(rows: dict[str, Any], label: str) -> str:
    """Return the most memory of a process that holds a model; of the whole one as measured beside a smaller one."""
    model, by, *_ = label.split()
    which, of = ("whole", f"{model} ") if by == "whole" else ("smaller", label)
    found = (
        row["resident_bytes"][which]
        for name, row in rows.items()
        if name.startswith(of) and "resident_bytes" in row
    )
    return next((f"{size / 1e6:.0f}" for size in found), "–")


def speed() -> str:
    """Size, speed and loss of smaller models, by what their units were chosen."""
    rows = record("speed")["raw"].get("rows", {})
    if not rows:
        return "Not measured yet.\n"
    sizes = ["| model | parameters | MB on disk | MB in memory | prefill, tokens/s | decoding, tokens/s |"]
    sizes.append("|---|" + "---:|" * 5)
    chosen = ["| nats/token, chosen by | effect | activation | magnitude | random |", "|---|" + "---:|" * 4]
    for label, row in sorted(rows.items(), key=lambda item: (item[0].split()[0], -item[1]["parameters"])):
        model, by, *share = label.split()
        if by not in ("whole", "effect"):
            continue
        whole = rows[f"{model} whole"]
        size = f"{row['parameters']:,} | {row['disk_bytes'] / 1e6:.0f} | {_held(rows, label)}"
        losses = [
            rows.get(f"{model} {name} {share[0]}", {}).get("nll") if share else None for name in CHOICES
        ]
        shown = [f"{loss:.3f}" if loss is not None else "–" for loss in losses]
        if not share:
            shown[0] = f"{whole['nll']:.3f} (whole)"
        fast = [
            "{whole_tokens_per_second:.0f} → {smaller_tokens_per_second:.0f} ({speedup:.2f}×)".format(
                **row["speed"][p]
            )
            if share
            else ""
            for p in ("prefill", "decode")
        ]
        name = f"{model} −{float(share[0]):.0%}" if share else model
        sizes.append(f"| {name} | {size} | {' | '.join(fast)} |")
        chosen.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*sizes, "", *chosen]) + "\n"


def ours(label: str) -> str:
    """Return the label of the row of a mixture of experts that another row is compared with."""
    kind, *rest = label.split()
    return " ".join([kind, "causal" if kind == "prune" else "effect", *rest[1:]])


def moe() -> str:
    """Loss of a small mixture of experts, pruned by every method and shrunk by every choice of experts."""
    rows = record("moe")["raw"].get("rows", {})
    if not rows:
        return "Not measured yet.\n"
    results = dict(zip(rows, results_in(list(rows.values())), strict=True))
    dense = results["dense"]
    lines = ["| | nats/token | over dense | over `causal` or `effect` |", "|---|---:|---:|---:|"]
    for label, result in results.items():
        best = results.get(ours(label), result)
        pairs = [paired_difference(result, other) if other is not result else None for other in (dense, best)]
        bounds = [f"{own.difference:+.4f} [{own.low:+.4f}, {own.high:+.4f}]" if own else "" for own in pairs]
        lines.append(f"| {label} | {headline(result):.4f} | {' | '.join(bounds)} |")
    return "\n".join(lines) + "\n"


def hybrids() -> str:
    """Losses of two small hybrids, most of whose weights every method sets to zero."""
    found = record("families")["raw"].get("hybrids")
    if not found:
        return "Not measured yet.\n"
    lines = ["| model | method | nats/token | over dense | over `causal` |", "|---|---|---:|---:|---:|"]
    for name, rows in found.items():
        results = {label: own[0] for label, own in rows_of({"rows": rows})}
        best = next(own for label, own in results.items() if label.startswith("causal"))
        for label, own in results.items():
            pairs = [paired_difference(own, other) for other in (results["dense"], best) if other is not own]
            said = [f"{pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]" for pair in pairs]
            said = said if len(said) == 2 else ["", *said] if label == "dense" else [*said, ""]
            lines.append(f"| {name} | {label} | {headline(own):.3f} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def cost() -> str:
    """Seconds and tokens of naive attribution and of every estimator."""
    timed = _attribution("speed")
    if timed is None:
        return "Not measured yet.\n"
    lines = [
        "| estimator | seconds | times faster | tokens forwarded | share of naive |",
        "|---|---:|---:|---:|---:|",
    ]
    naive = timed["naive"]
    for name in ("naive", "exact", "gradient", "adaptive"):
        own = timed[name]
        tokens, share = own["tokens_forwarded"], own["tokens_forwarded"] / naive["tokens_forwarded"]
        faster = naive["seconds"] / own["seconds"]
        lines.append(f"| {name} | {own['seconds']:.0f} | {faster:.1f} | {tokens:,.0f} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def reliability() -> str:
    """Rank correlation to the reference against tokens, for every estimator and both effects."""
    drawn = _attribution("curves")
    if drawn is None:
        return "Not measured yet.\n"
    head = "| estimator | problems | budget | tokens | Spearman | intervals that contain the reference |"
    lines = []
    for effect in ("ce", "kl"):
        lines += ["", f"*Effect `{effect}`*", "", head, "|---|---:|---:|---:|---:|---:|"]
        for row in (row for row in drawn[effect] if row["sequences"] in SHOWN and row["budget"] in BUDGETS):
            budget = f"{row['budget']:.0f}x" if row["budget"] else "–"
            numbers = f"{row['tokens']:,.0f} | {row['spearman']:.3f} | {row['coverage']:.1%}"
            lines.append(f"| {row['estimator']} | {row['sequences']} | {budget} | {numbers} |")
    return "\n".join(lines[1:]) + f"\n\nReference: {drawn['sequences']} problems, exact.\n"


def families() -> str:
    """What a ranking costs on other families, and how it agrees with another draw or with exact effects."""
    raw = record("families")["raw"]
    lines = ["| model | effect, estimator | seconds | share of naive tokens | Spearman | top fifth shared |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for effect, own in raw.get("qwen", {}).items():
        one = own["draws"][0]
        cost = f"{one['seconds']:.0f} | {one['share_of_naive_tokens']:.1%}"
        found = f"{own['spearman_between_draws']:.2f} | {own['top_fifth_between_draws']:.2f}"
        lines.append(f"| Qwen2.5-Coder-0.5B ¹ | {effect}, adaptive {own['budget']:.0f}x | {cost} | {found} |")
    for name, own in raw.get("gemma", {}).get("estimators", {}).items():
        cost = f"{own['seconds']:.0f} | {own['share_of_naive_tokens']:.1%}"
        found = f"{own['spearman_with_exact']:.2f} | {own['top_fifth_of_exact']:.2f}"
        lines.append(f"| Gemma 3 270M ² | ce, {name} | {cost} | {found} |")
    notes = "¹ between two draws of 8 problems each, measured apart. ² with the exact effects on the same 8 problems."
    return "\n".join(lines) + f"\n\n{notes}\n" if raw else "Not measured yet.\n"


def stability() -> str:
    """What `causalprune stability` shows, for both effects."""
    raw, parts = record("stability")["raw"], list[str]()
    if not raw:
        return "Not measured yet.\n"
    for effect in ("ce", "kl"):
        parts.append(f"### Effect `{effect}`\n")
        parts += [f"*{table.title}*\n\n{to_markdown(table)}" for table in stability_tables(raw[effect])]
    return "\n".join(parts)


def large() -> str:
    """What streaming an 8-billion-parameter checkpoint costs."""
    found = record("large")
    if "eight" not in found["raw"]:
        return "Not measured yet.\n"
    own, machine = found["raw"]["eight"], found["machine"]
    rows = [
        ("checkpoint", f"{own['bytes'] / 1e9:.1f} GB in bfloat16, the shape of Llama 3 8B"),
        ("copying its files", f"{own['copy_seconds']:.0f} s"),
        ("`prune --stream --method cap --sparsity 0.5`", f"{own['prune_seconds']:.0f} s"),
        ("largest resident set", f"{own['peak_rss_bytes'] / 2**30:.2f} GiB"),
        ("weights that are zero, and wanted", f"{own['zeros']:,} and {own['wanted']:,}"),
    ]
    lines = [f"| {machine['cores']} cores, {machine['cpu']} | |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def layers() -> str:
    """What pruning layer by layer from disk costs, and in memory."""
    own = record("large")["raw"].get("layers")
    if own is None:
        return "Not measured yet.\n"
    lines = [
        f"| {own['bytes'] / 1e9:.1f} GB in bfloat16, the shape of Llama 3.2 1B | seconds | largest resident set |",
        "|---|---:|---:|",
    ]
    for name, option in (("stream", "`--stream`"), ("memory", "in memory")):
        lines.append(
            f"| {option} | {own[name]['seconds']:.0f} | {own[name]['peak_rss_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def cluster() -> str:
    """How evenly 64 simulated workers are busy, and what two workers of Ray are worth here."""
    raw = record("large")["raw"]
    lines = [
        "| 64 simulated workers | jobs | all done after | lower bound | over it |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, own in raw.get("schedule", {}).items():
        if isinstance(own, dict):
            times = f"{own['makespan']:.1f} | {own['bound']:.1f} | {own['over_bound'] - 1:.1%}"
            lines.append(f"| {name} | {own['jobs']:,} | {times} |")
    if (one := raw.get("ray")) is not None:
        alone, both = (one["workers"][name] for name in ("1", "2"))
        same = "equal to" if alone["equal"] and both["equal"] else "not"
        faster = both["tokens_per_second"] / alone["tokens_per_second"]
        lines.append(
            f"\nTwo workers of Ray on {one['cores']} cores: {faster:.2f} times as fast as one, {same} a serial run bit for bit."
        )
    return "\n".join(lines) + "\n" if "schedule" in raw else "Not measured yet.\n"


def interop() -> str:
    """What other runtimes make of a pruned SmolLM2."""
    own = record("large")["raw"].get("interop")
    if own is None:
        return "Not measured yet.\n"
    plain, llama, onnx = own["transformers"], own["llama.cpp"], own["onnxruntime"]
    same = "the same" if plain["text"].startswith(llama["text"]) and llama["text"] else "another"
    tokens = "the same" if onnx["same_next_token_everywhere"] else "another"
    apart = f"logits differ by {onnx['largest_difference_of_logits']:.1e} at most"
    rows = [
        ("transformers", f"{plain['zeros']:,} zeros among {plain['weights']:,} prunable weights"),
        (
            "llama.cpp",
            f"{llama['zeros']:,} zeros among {llama['weights']:,}; {same} greedy text as transformers",
        ),
        ("onnxruntime", f"{apart}, {tokens} likeliest token at every position"),
    ]
    return (
        "\n".join(["| runtime | found |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows)])
        + "\n"
    )


def finetune() -> str:
    """What training and merging leave of the zeros of SmolLM2."""
    own = record("large")["raw"].get("finetune")
    if own is None:
        return "Not measured yet.\n"
    lines = ["| SmolLM2 at 50 % | zeros | matrices that lost zeros |", "|---|---:|---:|"]
    for name in ("with the callback", "without", "adapter merged", "reapplied"):
        tuned = f"{own['steps']} steps, {name}" if name in ("with the callback", "without") else name
        lines.append(f"| {tuned} | {own[name]['zeros']:,} | {own[name]['matrices_that_lost_zeros']} |")
    return "\n".join(lines) + "\n"


def kills() -> str:
    """What came of runs that were killed."""
    own = record("large")["raw"].get("kills")
    if own is None:
        return "Not measured yet.\n"
    lines = [
        "| killed during | runs | finished before the kill | results that differ or are partial |",
        "|---|---:|---:|---:|",
    ]
    for stage in own["undisturbed_seconds"]:
        found = [kill for kill in own["kills"] if kill["stage"] == stage]
        late, lost = (sum(bool(kill[key]) for kill in found) for key in ("complete", "lost"))
        lines.append(f"| {stage} | {len(found)} | {late} | {lost} |")
    return "\n".join(lines) + "\n"


def carried() -> str:
    """What becomes of every file beside the weights, over all sources."""
    rows = record("written")["raw"].get("sources")
    if rows is None:
        return "Not measured yet.\n"
    found: dict[str, dict[str, list[str]]] = {}
    for source, row in rows.items():
        for name, fate in row.get("fates", {}).items():
            kind = found.setdefault(re.sub(r"\d{5}", "N", name), {}).setdefault(fate, [])
            kind += [] if source in kind else [source]
    lines = ["| file | what becomes of it |", "|---|---|"]
    for name, kinds in sorted(found.items()):
        usual = max(kinds, key=lambda fate: len(kinds[fate]))
        others = [f"{', '.join(own)}: {fate}" for fate, own in kinds.items() if fate != usual]
        lines.append(f"| `{name}` | {'; '.join([usual, *others])} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """What was lost or changed of every source, and who reads what comes out."""
    raw = record("written")["raw"]
    if raw.get("sources") is None:
        return "Not measured yet.\n"
    older = raw.get("older", {}).get("rows", {})
    lines = [
        "| source | tensors lost, changed unasked | files lost | streamed | read by transformers 5 | 4 |",
        "|---|---:|---:|---|---|---|",
    ]
    for source, row in raw["sources"].items():
        if "refused" in row:
            lines.append(f"| {source} | | | refused | | |")
            continue
        counts = [len(row[kind]) for kind in ("tensors_lost", "tensors_changed_unasked", "files_lost")]
        streamed = "equal" if row.get("stream_differs") == [] else row.get("stream_differs") or "not streamed"
        own = older.get(source, {})
        four = (
            "equal"
            if own.get("distance", 1) <= 1e-5 and own.get("tokens")
            else "otherwise, as it reads the source"
        )
        four = four if own.get("source_distance", 1) > 1e-5 or four == "equal" else "differs"
        five = "differs" if row["reload_differs"] else "equal"
        lines.append(f"| {source} | {counts[0]}, {counts[1]} | {counts[2]} | {streamed} | {five} | {four} |")
    return "\n".join(lines) + "\n"


def zeros() -> str:
    """Which formats of which libraries keep exact zeros."""
    own = record("fit")["raw"].get("zeros")
    if own is None:
        return "Not measured yet.\n"
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in own["formats"].items():
        if (share := row.get("zeros_kept")) is not None:
            fate = "all" if share >= 0.999 else "most" if share >= 0.9 else "lost"
            added = f" (+{row['others_lost']:.0%} of its own)" if row["others_lost"] >= 0.005 else ""
            kinds = found.setdefault(row["library"], {"all": [], "most": [], "lost": []})
            kinds[fate].append(name + (f" ({share:.0%})" if fate == "most" else "") + added)
    lines = ["| library | keeps every zero | most of them | loses them |", "|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(map(", ".join, kinds.values())) + " |" for name, kinds in found.items()
    ]
    return "\n".join(lines) + "\n"


def smaller() -> str:
    """What becomes of tiny models without some units of a kind, in transformers and in llama.cpp."""
    found = record("fit")["raw"].get("runtime", {}).get("smaller")
    if not found:
        return "Not measured yet.\n"
    fates = ("same", "llama.cpp does not load it", "not in a standard form")
    lines = [
        "| without some | the same in both | llama.cpp does not load it | no standard form |",
        "|---|---|---|---|",
    ]
    for kind in next(iter(found.values())):
        title = {"kv_groups": "KV groups"}.get(kind, kind)
        cells = [", ".join(family for family, own in found.items() if own[kind] == fate) for fate in fates]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _listed(name: str, wanted: Mapping[str, tuple[str, str]]) -> str:
    """Return figures of a result file, by what they are called and how they are written; those that are there."""
    own = record(name)["figures"]
    found = [
        f"| {said} | {shape.format(own[key])} |"
        for said, (key, shape) in wanted.items()
        if own.get(key) is not None
    ]
    return "\n".join(["| | |", "|---|---:|", *found]) + "\n" if found else "Not measured yet.\n"


def lean() -> str:
    """What training without states costs and gains, against the build before and SparseGPT."""
    return _listed("lean", LEAN)


def _attribution(step: str) -> Any:
    return record("attribution")["raw"].get(step)


TABLES: dict[str, Callable[[], str]] = {
    "core": partial(_rows, "core", "table"),
    "quality": partial(_rows, "quality", "gsm8k"),
    "front": front,
    "mix": partial(_rows, "quality", "mix"),
    "qwen": partial(_rows, "quality", "qwen"),
    "qwen_worked": partial(_rows, "quality", "qwen_worked"),
    "gemma": partial(_rows, "quality", "gemma"),
    "calibrations": calibrations,
    "draws": draws,
    "oracle": oracle,
    "predicted": predicted,
    "speed": speed,
    "moe": moe,
    "hybrids": hybrids,
    "cost": cost,
    "reliability": reliability,
    "families": families,
    "stability": stability,
    "large": large,
    "layers": layers,
    "cluster": cluster,
    "finetune": finetune,
    "interop": interop,
    "kills": kills,
    "carried": carried,
    "written": written,
    "zeros": zeros,
    "smaller": smaller,
    "lean": lean,
    **CIRCUITS,
    **OTHERS,
}


def rewritten(text: str) -> str:
    """Return a page with its tables made anew."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages: list[Path] = sorted(page for pattern in PAGES for page in ROOT.glob(pattern))
    stale = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "all tables are as the result files say")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
