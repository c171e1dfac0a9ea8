"""The model card of a checkpoint: what the Hub shows of it, and what somebody who finds the folder has to know.

Made from the manifest alone, so that a streamed checkpoint has the card of one saved in memory; `describe` adds what
a run has measured.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import yaml

from causalprune.core import EvalResult, Size, Speed
from causalprune.evaluation import Row, bracketed, headline, interval, paired_difference, write_text

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HERE = Path(__file__).parent


def write_card(
    folder: Path, record: Mapping[str, Any], rows: Sequence[Row] = (), *, title: str | None = None
) -> None:
    """Write the card of a checkpoint from its manifest; `rows` are the dense model's results and its own."""
    name, source = title or folder.name, source_metadata(record["base"])
    if again := record["run"].get(
        "reapplied"
    ):  # a merged model has no card: that of the pruned one says where it comes from
        other = source_metadata({"name": again["from"], "revision": None})
        source = {key: source[key] or other[key] for key in source}
    write_text(folder / CARD, card_text(name, record, source, rows))


def card_text(
    title: str, record: Mapping[str, Any], source: Mapping[str, Any], rows: Sequence[Row] = ()
) -> str:
    """Return the card as Markdown with its metadata in front."""
    results = rows[-1][1] if len(rows) > 1 else []
    run, loader = record["run"], record.get("loader", {"class": "AutoModelForCausalLM", "code": False})
    method = run.get("method") or {}
    tags = ["causalprune", "pruned", *(["sparse", str(method["criterion"])] if method else [])]
    data = hub.ModelCardData(
        base_model=source.get("base_model"),
        library_name="transformers",
        pipeline_tag="text-generation" if "Causal" in loader["class"] else "image-text-to-text",
        tags=tags,
        model_name=title,
        eval_results=[found for result in results for found in _index(result)] or None,
        **{key: source[key] for key in CARRIED if source.get(key)},
    )
    base = source.get("base_model") or Path(str(record["base"]["name"])).name
    licence = (
        f"Carried over from the base model: {source['license']}. Its terms hold for this model too."
        if source.get("license")
        else "The base model's card was not found or names no licence: look it up before you pass this model on."
    )
    body = _words("card").format(
        title=title,
        loader=loader["class"],
        code=", trust_remote_code=True" if loader["code"] else "",
        what=_what(base, record),
        warning=_warning(run).strip(),
        corrected=_corrected(run.get("correction")),
        made=_made(record),
        results=_results(rows),
        licence=licence,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def source_metadata(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card of the model that was pruned says of licence and origin, as far as there is one.

    Of a local folder the card in it is read; of a model on the Hub its card is fetched, if the Hub can be reached.
    """
    name, revision = str(base["name"]), base["revision"]
    place = Path(name).expanduser()
    local = place.is_dir() or place.is_file()
    found: dict[str, Any] = {}
    try:
        path = (place if place.is_dir() else place.parent) / CARD
        if not local:
            path = Path(hub.hf_hub_download(name, CARD, revision=revision))
        if path.is_file():
            found = hub.ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError, hub.errors.EntryNotFoundError):
        found = {}  # the card then says that no licence was found
    derived = "causalprune" in (found.get("tags") or [])
    origin = found.get("base_model") if derived else None if local else name
    known = isinstance(origin, str) and HUB_NAME.fullmatch(origin)
    return {**{key: found.get(key) for key in CARRIED}, "base_model": origin if known else None}


def _words(name: str) -> str:
    return (HERE / f"{name}.md").read_text(encoding="utf-8")


def alike() -> Mapping[str, Sequence[str]]:
    """Return by kind of unit the architectures whose tiny models without some compute the same in llama.cpp (`bench/fit.py runtime`)."""
    found: Mapping[str, Sequence[str]] = yaml.safe_load((HERE / "alike.yaml").read_text(encoding="utf-8"))
    return found


def _warning(run: Mapping[str, Any]) -> str:
    """Return what zeros do not bring, or where smaller models of this architecture were tried."""
    if "shrink" not in run:
        return _words("card_zeros")
    return _words("card_smaller").format(tried=_tried(run["shrink"]))


NUMBERED = ("gemma2", "gemma3_text", "cohere2", "gpt_oss", "smollm3", "exaone4")
"""Architectures whose layers differ in llama.cpp by their numbers."""


def portable(model_type: str, kind: str) -> bool:
    """Tell whether an architecture may run in llama.cpp without some units of a kind: without KV groups where that was tried."""
    if kind == "kv_groups":
        return model_type in alike()[kind]
    return kind != "layers" or model_type not in NUMBERED


def _tried(shrunk: Mapping[str, Any]) -> str:
    """Return in which runtimes models without such units were run; an older release did not say of which architecture this is."""
    own = shrunk.get("model_type")
    named = {kind: {"kv_groups": "KV groups"}.get(kind, kind) for kind in shrunk.get("kept", ())}
    if own is None:
        return "Try it in the runtime that you want before you rely on it."
    if "layers" in named and own in NUMBERED:
        return (
            f"llama.cpp treats layers of {own} by their numbers: without some of them a file would mostly be another model, "
            "and `causalprune export` refuses that."
        )
    tried = alike()
    if other := [name for kind, name in named.items() if own not in tried[kind]]:
        return f"In llama.cpp {own} without some {' and '.join(other)} was not found to run: try it before you rely on it there."
    return f"Tiny models of this architecture ({own}) without some {' and '.join(named.values())} compute the same in llama.cpp as in transformers."


def _what(base: str, record: Mapping[str, Any]) -> str:
    run, sparsity = record["run"], record["sparsity"]
    if shrunk := run.get("shrink"):
        before, after = shrunk["parameters_before"], shrunk["parameters_after"]
        text = f"{base} with {1 - after / before:.1%} of its parameters removed: {after:,} of {before:,} are left."
        return f"{text} {_size(shrunk)}".strip()
    damped = f" Parts of it are scaled: {run['correction']['what']}." if is_damped(run) else ""
    if not sparsity["zeros"]:
        return f"{base}, as plain safetensors; no weight was set to zero.{damped}"
    share, zeros, weights = sparsity["sparsity"], sparsity["zeros"], sparsity["weights"]
    counts, by = f"{zeros:,} of {weights:,}", " by causalprune"
    if own := run.get("correction"):  # the model before may have had zeros too
        by = "" if damped else f", {own['after']['weights']:,} of them where parts were taken out"
    text = f"{base} with {share:.2%} of the weights in its decoder layers ({counts}) set to zero{by}."
    return f"{text}{damped} {_size(run)}".strip()


def is_damped(run: Mapping[str, Any]) -> bool:
    """Tell whether a run scaled what units send, which leaves no zeros."""
    return bool(run.get("method", {}).get("damp"))


def _corrected(own: Mapping[str, Any] | None) -> str:
    """Return which behaviour was taken out, how much of it, and what that cost; nothing for other models."""
    if own is None:
        return ""
    said = own.get("sentences") or [own["what"]]
    lines = "\n".join(f"- {sentence}" for sentence in said)
    return _words("card_corrected").format(behaviour=own.get("behaviour", "given samples"), sentences=lines)


def _size(about: Mapping[str, Any]) -> str:
    """Return size and measured speed in sentences; nothing where an older release did not record them."""
    said = []
    if size := about.get("size"):
        said.append(f"It has {Size(**size['after']).beside(Size(**size['before']))}.")
    if speed := about.get("speed"):
        said.append(f"Speed when it was made: {Speed(**speed)}, by {speed['how']}.")
    return " ".join(said)


def _made(record: Mapping[str, Any]) -> str:
    """Return the recipe as a list; what was not part of it is left out."""
    run, versions = record["run"], record["versions"]
    method, calibration = run.get("method") or run.get("shrink") or {}, run.get("calibration") or {}
    sources = ", ".join(f"{n} examples of {name}" for name, n in (calibration.get("sources") or {}).items())
    plain = {key: value for key, value in method.items() if isinstance(value, str | int | float)}
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in plain.items()]
    lines += [f"calibration data: {sources}"] if sources else []
    lines += [f"SHA-256 of the base model: {record['base']['fingerprint']}"]
    own = ", ".join(f"{name} {versions[name]}" for name in ("causalprune", "torch", "transformers"))
    lines += [f"made with {own}; commit {record['git_commit'] or 'not known'}"]
    return "\n".join(f"- {line}" for line in lines)


def _results(rows: Sequence[Row]) -> str:
    """Return the table of results beside those of the dense model, with paired differences."""
    if len(rows) < 2:
        return ""
    dense = {(result.task, result.metric): result for result in rows[0][1]}
    lines = [
        "\n## Results",
        "Values with 95 % bootstrap intervals; differences are paired, example by example.\n",
    ]
    lines += ["| task | measure | dense | this model | difference | |", "|---|---|---:|---:|---:|---|"]
    for result in rows[-1][1]:
        own, before = interval(result), dense[result.task, result.metric]
        change = paired_difference(result, before)
        cells = [
            _plain(result.task),
            result.metric,
            f"{headline(before):.4g}",
            f"{own.value:.4g} {bracketed(own.low, own.high, own.n, '.4g')}",
            f"{change.difference:+.3g} {bracketed(change.low, change.high, change.n)}",
            change.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _index(result: EvalResult) -> list[hub.EvalResult]:
    """Return a result as an entry of the model index; none where the value is not finite."""
    value = headline(result)
    if not math.isfinite(value):
        return []
    return [
        hub.EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9_.-]+", "-", result.task.lower()),
            dataset_name=result.task,
            metric_type=result.metric,
            metric_name=f"{result.metric} of {len(result.values)} examples",
            metric_value=value,
        )
    ]


def _plain(text: str) -> str:
    """Return text that neither ends a cell of a table nor is markup."""
    return re.sub(r"[|<>`\[\]\s]+", " ", text).strip()
