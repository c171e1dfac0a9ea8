"""Every causal and every image-and-text type of the installed transformers, as a tiny model: does it work, is it refused, or wrong?

A type works where everything in tests/working.py holds. Each row is kept, so a stopped sweep goes on; a row of another version
of transformers, or of other settings, is made again. `python bench/families.py sweep` runs it, and writes docs/families.md.
"""

import contextlib
import hashlib
import io
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a card asks for its base's, which is nowhere

import torch
import transformers
from common import ROOT, RUNS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

sys.path.insert(0, str(ROOT / "tests"))

import configs
import finishing
import sources
import working

from causalprune import Method, load, prune, save
from causalprune.core.errors import CausalPruneError
from causalprune.evaluation.results import read_json, write_json

PLACE = RUNS / "families" / "sweep"
SECONDS = 600
"""For one check, at most."""
NAMED = [
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "kimi_linear",
    "minicpm3",
    "gemma4",
    "gemma3n",
    "llama4",
    "nemotron_h",
    "granitemoehybrid",
    "falcon",
    "falcon_h1",
    "jamba",
    "bamba",
    "zamba2",
    "lfm2_moe",
    "minimax",
    "gptj",
    "gpt_bigcode",
    "mpt",
    "qwen3_vl",
    "mistral3",
    "llava",
]


def sweep() -> dict[str, Any]:
    """Return a row for every type, by what loads it."""
    PLACE.mkdir(parents=True, exist_ok=True)
    _quiet()
    kinds = {"causal": configs.CAUSAL, "image_text": configs.IMAGE_TEXT}
    found: dict[str, Any] = {"transformers": transformers.__version__}
    workers, spawned = os.cpu_count() or 1, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, _quiet) as pool:
        for kind, names in kinds.items():
            found[kind] = dict(zip(names, pool.map(partial(_kept, kind), names), strict=True))
    found["packed"] = packed()
    return found


def _quiet() -> None:
    """Say nothing of a model's own, and compute on one core: models are tiny, and another is checked beside."""
    transformers.logging.set_verbosity(50)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def packed() -> dict[str, Any]:
    """Return what the checks say of a gpt-oss whose experts are MXFP4, as it is published."""
    with tempfile.TemporaryDirectory() as scratch:
        source = sources.mxfp4(Path(scratch) / "source").model
        pruned, out = load(str(source)), Path(scratch) / "out"
        save(pruned, out, prune(pruned, Method("magnitude", 0.5)))
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        error = working.apart(working.logits(again), working.logits(pruned.model.float()))
        if error > working.SMALL:
            raise SystemExit(f"gpt-oss in MXFP4: the saved model differs by {error:.1e}")
        decoder = working.inspected(load(str(source), dtype="float32").model)
        return {
            "closing": working.closing_is_zeroing(decoder),
            "gradient": working.gradient_is_slope(decoder),
            "reload": error,
            "pruning": finishing.pruning_is_exact(working.fresh(decoder.model)),
            "stream": finishing.streams(Path(scratch)),
        }


def _kept(kind: str, name: str) -> dict[str, Any]:
    path = PLACE / f"{kind}-{name}.json"
    files = [Path(own.__file__ or "") for own in (configs, working, finishing)]
    made = [transformers.__version__, *(hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files)]
    if path.exists() and (row := read_json(path))["made"] == made:
        return dict(row["row"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _row(kind, name)
    write_json(path, {"made": made, "row": row})
    print(name, row["status"], row.get("why", "")[:200], flush=True)
    return row


def _row(kind: str, name: str) -> dict[str, Any]:
    """Return what became of a type: `works`, `refused`, `wrong`, `traceback`, or `unbuilt`."""
    image_text = kind == "image_text"

    def build(**options: Any) -> Any:
        return configs.build(configs.tiny_config(name), image_text=image_text, **options)

    auto = AutoModelForImageTextToText if image_text else AutoModelForCausalLM
    try:
        model = build()
        working.logits(model)
        with tempfile.TemporaryDirectory() as own:
            model.save_pretrained(own)
            auto.from_pretrained(own)  # transformers itself
    except Exception as error:
        return {"status": "unbuilt", "why": _said(error)}
    try:
        decoder = working.inspected(model)
    except CausalPruneError as error:
        return {"status": "refused", "why": str(error)}
    except Exception as error:
        return {"status": "traceback", "why": _said(error)}
    places = sorted({m.place for layer in decoder.layers for m in layer.mixers})
    row: dict[str, Any] = {"status": "works", "units": working.kinds(decoder), "mixers": places, "checks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for check, run in _checks(decoder, model, auto, build, Path(scratch)):
            start = time.perf_counter()
            try:
                with _limited(), contextlib.redirect_stderr(io.StringIO()):
                    row["checks"][check] = run()
            except AssertionError as error:
                return row | {"status": "wrong", "why": f"{check}: {_said(error)}"}
            except CausalPruneError as error:
                row["checks"][check] = f"refused: {error}"
            except Exception as error:
                return row | {"status": "traceback", "why": f"{check}: {_said(error)}"}
            row.setdefault("seconds", {})[check] = round(time.perf_counter() - start, 2)
    refused = [
        own for check, own in row["checks"].items() if check != "stream" and str(own).startswith("refused")
    ]
    return row | ({"status": "refused", "why": refused[0]} if refused else {})


def _checks(
    decoder: Any, model: Any, auto: Any, build: Callable[..., Any], place: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "closing", lambda: working.closing_is_zeroing(decoder)
    yield "rows", lambda: working.rows_reach_their_units(decoder)
    yield "gradient", lambda: working.gradient_is_slope(decoder)
    yield "exact", lambda: working.exact_is_naive(decoder)
    yield "pruning", lambda: finishing.pruning_is_exact(working.fresh(model))
    yield "reload", lambda: finishing.reloads(model, auto, place)
    yield "stream", lambda: finishing.streams(place)
    yield "shrink", lambda: finishing.shrinks(working.fresh(model), auto, place / "shrunk")
    yield "generation", lambda: finishing.generates(decoder)
    if any(layer.mixers for layer in decoder.layers):
        yield "kernels", lambda: finishing.kernels_agree(lambda **own: working.inspected(build(**own)))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def over(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _said(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{at}"


def figures(raw: dict[str, Any]) -> dict[str, float | None]:
    """Return the counts, and for types that had to be understood whether they work."""
    causal, image = raw["causal"], raw["image_text"]
    every = [*causal.values(), *image.values()]
    works = {name for rows in (causal, image) for name, row in rows.items() if row["status"] == "works"}
    known = {n: "gemma3n_text" if n == "gemma3n" else n for n in NAMED}
    closing = [
        row["checks"]["closing"] for row in every if isinstance(row.get("checks", {}).get("closing"), float)
    ]
    streams = [row for row in every if row["status"] == "wrong" and row["why"].startswith("stream")]
    found: dict[str, float | None] = {
        "types_known": len(causal),
        "types_working": sum(row["status"] == "works" for row in causal.values()),
        "types_silently_wrong": sum(row["status"] == "wrong" for row in every),
        "types_traceback": sum(row["status"] == "traceback" for row in every),
        "types_unbuilt": sum(row["status"] == "unbuilt" for row in causal.values()),
        "image_text_types_known": len(image),
        "image_text_types_working": sum(row["status"] == "works" for row in image.values()),
        "hook_vs_owned_max": max(closing, default=None),
        "stream_differs_types": len(streams),
    }
    found["works_gpt_oss_mxfp4"] = int("packed" in raw)
    return found | {f"works_{name}": int(own in works) for name, own in known.items()}


def page(raw: dict[str, Any]) -> str:
    """Return the list of types as a page."""
    lines = [
        "# Does it work with my model?",
        "",
        "```bash",
        "causalprune inspect embedded   # what of a model is understood, from its configuration alone",
        "```",
        "",
        "A type that works went through all of this as a tiny random model: closing a unit and zeroing what it owns give the",
        "same logits, gradients are slopes, pruning is exact and touches nothing else, saved folders reload with stock",
        "transformers, streamed ones are the same bytes, and a cache changes nothing. Every other type is refused in one line.",
        "`heads` are those of attention, `mixers` those of linear attention and state spaces, or groups of a convolution's channels.",
        "",
        f"Made by `python bench/families.py sweep`, with every type that transformers {raw['transformers']} knows.",
        "",
    ]
    for kind, title in (("causal", "Causal language models"), ("image_text", "Image-and-text models")):
        rows = raw[kind]
        works = {name: row for name, row in rows.items() if row["status"] == "works"}
        lines += [
            f"## {title}",
            "",
            f"{len(works)} of {len(rows)} types work.",
            "",
            "| type | units | streamed | shrink |",
        ]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {name} | {_units(row)} | {_streamed(row)} | {_shrunk(row)} |" for name, row in works.items()
        ]
        lines += ["", "Refused, or not to be built with small settings:", "", "| type | why |", "|---|---|"]
        lines += [f"| {n} | {_why(row)} |" for n, row in rows.items() if row["status"] != "works"] + [""]
    return "\n".join(lines)


def _units(row: dict[str, Any]) -> str:
    return ", ".join(
        name for name in (own.partition(":")[0] for own in row["units"]) if name not in ("layers", "mlp")
    )


def _streamed(row: dict[str, Any]) -> str:
    return "no" if str(row["checks"].get("stream")).startswith("refused") else "yes"


def _shrunk(row: dict[str, Any]) -> str:
    return (
        ", ".join(kind for kind, own in row["checks"]["shrink"].items() if own == "standard").replace(
            "_", " "
        )
        or "none"
    )


def _why(row: dict[str, Any]) -> str:
    text = (
        row["why"].replace("|", "/").replace("refused: ", "").replace("'tiny' ", "").replace("'tiny'", "this")
    )
    return f"cannot be built: {text}" if row["status"] == "unbuilt" else text


def write_page(raw: dict[str, Any]) -> None:
    """Write docs/families.md."""
    (ROOT / "docs" / "families.md").write_text(page(raw), encoding="utf-8")


torch.set_num_threads(1)
