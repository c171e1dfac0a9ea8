"""What is lost or changed when checkpoints of every form are written again, and whether others read what comes out.

    python bench/written.py                # all steps that are not there yet
    python bench/written.py sources        # twenty tiny checkpoints (tests/sources.py), pruned in memory and streamed
    python bench/written.py older          # the same folders read by transformers 4, in an environment of its own
    python bench/written.py readback       # what reading back costs, of `prune --method magnitude` on 1 GB
    python bench/written.py stream         # `--stream` over copying the files, 1 GB, in turns
    python bench/written.py gguf --converter FOLDER   # logits of GGUF files against their sources (bench/written_gguf.py)

The environment is in `bench/.transformers4`; the first call makes it.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import written_gguf
from before import median_interval
from common import BENCH, ROOT, made, record, write_figures
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "tests"))

from large import ONE, forget_pages, write_checkpoint
from sources import SOURCES, Made, compared, fates

from causalprune.checkpoints import writing
from causalprune.cli.app import main as causalprune
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.streaming.files import prune_stream

OLDER = "transformers==4.57.6"
TOKENS = torch.arange(3, 40)[None]
TEXT = "What goes out is what came in."
HALF = {**ONE, "num_hidden_layers": 8, "vocab_size": 49152}
"""About 1 GB in bfloat16."""
PAIRS = 5
READ = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None] % model.config.vocab_size).logits

def tokens(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(sys.argv[2])["input_ids"]

def distance(a, b):
    return float((a - b).abs().max() / (b.max() - b.min()))

for row in json.load(open(sys.argv[1])):
    try:
        wanted = load_file(row["logits"])
        found = {"distance": distance(logits(row["out"]), wanted["out"]), "tokens": tokens(row["out"]) == row["tokens"]}
        if found["distance"] > 1e-5:
            found["source_distance"] = distance(logits(row["source"]), wanted["source"])
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps({"name": row["name"], **found}), flush=True)
"""


def sources() -> dict[str, Any]:
    """Prune every source in memory and streamed, and compare folders, tensors, logits and modes."""
    with tempfile.TemporaryDirectory() as scratch:
        return {name: _source(Path(scratch) / str(i), name) for i, name in enumerate(SOURCES)}


def _source(place: Path, name: str) -> dict[str, Any]:
    """Return what became of one source."""
    source = SOURCES[name](place / "source")
    done = _prune(source, place / "memory" / "out")
    if source.refused:
        return {"refused": done[1].strip(), "as_wanted": done[0] == 2 and source.refused in done[1]}
    row: dict[str, Any] = compared(source, place / "memory" / "out")
    row["fates"] = fates(source, place / "memory" / "out")
    row["said"] = [line for line in done[1].splitlines() if line.startswith("warning")]
    row["reload_differs"] = not torch.equal(_in_memory(source), _logits(place / "memory" / "out"))
    files = [path for path in (place / "memory" / "out").rglob("*") if path.is_file()]
    row["modes"] = sorted({oct(path.stat().st_mode & 0o777) for path in files})
    if source.streams:
        _prune(source, place / "stream" / "out", "--stream")
        row["stream_differs"] = _differences(place / "memory" / "out", place / "stream" / "out")
    return row


def _prune(source: Made, out: Path, *options: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and what it said."""
    command = ["prune", str(source.model), "-o", str(out), "--method", "magnitude", "--sparsity", "0.5"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            causalprune([*command, *source.options, *options])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    if code and not source.refused:
        raise SystemExit(f"{source.model}: {said.getvalue()[-2000:]}")
    return code, said.getvalue()


def _in_memory(source: Made) -> torch.Tensor:
    """Return logits of a source pruned in memory, in float32 from the values that files have."""
    options = {option.removeprefix("--").replace("-", "_"): True for option in source.options}
    decoder = load(str(source.model), **options)  # type: ignore[arg-type]
    prune(decoder, Method("magnitude", 0.5))
    assert decoder.source is not None
    for parameter in decoder.model.parameters():  # not buffers, which are wider
        parameter.data = parameter.data.to(decoder.source.dtype).float()
    return _run(decoder.model)


def _logits(folder: Path) -> torch.Tensor:
    return _run(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    )


def _run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS % model.config.vocab_size).logits
    return found


def _differences(memory: Path, stream: Path) -> list[str]:
    """Return the files of two folders that are not equal, but for the time and the word `streamed` of manifests."""
    found = []
    for folder in (memory, stream):
        own = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        manifest = json.loads(own["causalprune.json"])
        manifest.pop("created")
        manifest["run"].pop("streamed", None)
        found.append(own | {"causalprune.json": json.dumps(manifest).encode()})
    return sorted(
        name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name)
    )


def older() -> dict[str, Any]:
    """Let transformers 4 read what comes out, and compare logits and tokens with those of today's."""
    python = _environment()
    with tempfile.TemporaryDirectory() as scratch:
        place, rows = Path(scratch), []
        for i, (name, make) in enumerate(SOURCES.items()):
            source = make(place / str(i) / "source")
            if source.refused:
                continue
            out = place / str(i) / "out"
            _prune(source, out)
            wanted = {"out": _logits(out)}
            if source.model.is_dir() and not source.options and source.tensors is None:
                wanted["source"] = _logits(source.model)
            save_file(wanted, place / f"{i}.safetensors")
            tokens = AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"]
            row = {"name": name, "out": str(out), "source": str(source.model), "tokens": tokens}
            rows.append(row | {"logits": str(place / f"{i}.safetensors")})
        (place / "rows.json").write_text(json.dumps(rows))
        (place / "read.py").write_text(READ)
        command = [str(python), str(place / "read.py"), str(place / "rows.json"), TEXT]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"transformers": OLDER, "rows": {row.pop("name"): row for row in found}}


def _environment() -> Path:
    """Return the interpreter of an environment with transformers 4, made on the first call."""
    place = BENCH / ".transformers4"
    python, made_of = place / "bin" / "python", place / "made"
    if made_of.exists() and made_of.read_text() == OLDER:
        return python
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    (place / ".gitignore").write_text("*\n")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [pin for pin in pins if pin.partition("==")[0] in ("torch", "numpy", "safetensors", "jinja2")]
    (place / "constraints.txt").write_text("\n".join(kept) + "\n")
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(place / "constraints.txt")]
    subprocess.run([*pip, OLDER, "torch", "safetensors", "jinja2"], check=True, stdout=sys.stderr)
    made_of.write_text(OLDER)
    return python


def readback() -> dict[str, Any]:
    """Time reading back within a pruning of 1 GB in memory."""
    with _checkpoint() as place:
        seconds: dict[str, list[float]] = {"prune": [], "read_back": []}
        own = writing.read_back
        from causalprune.checkpoints import saving  # noqa: PLC0415
        from causalprune.runs.recipe import CalibrationSpec, ModelSpec  # noqa: PLC0415
        from causalprune.runs.single import prune_checkpoint  # noqa: PLC0415

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            own(*arguments)
            seconds["read_back"].append(time.perf_counter() - start)

        saving.read_back = timed  # type: ignore[assignment]
        for _ in range(3):
            start = time.perf_counter()
            spec, wanted = ModelSpec(str(place / "source")), CalibrationSpec(("gsm8k",))
            prune_checkpoint(spec, Method("magnitude", 0.5), place / "out", wanted)
            seconds["prune"].append(time.perf_counter() - start)
            shutil.rmtree(place / "out")
        shares = [a / b for a, b in zip(seconds["read_back"], seconds["prune"], strict=True)]
        return {"seconds": seconds, "shares": shares}


def stream() -> dict[str, Any]:
    """Copy the files of a checkpoint of 1 GB, and prune it streamed, in turns."""
    with _checkpoint() as place:
        rows = []
        for _ in range(PAIRS):
            forget_pages()
            start = time.perf_counter()
            shutil.copytree(place / "source", place / "copy")
            os.sync()
            copied = time.perf_counter() - start
            forget_pages()
            start = time.perf_counter()
            prune_stream(place / "source", place / "out", Method("magnitude", 0.5, "global"))
            rows.append({"copy": copied, "stream": time.perf_counter() - start})
            shutil.rmtree(place / "copy")
            shutil.rmtree(place / "out")
        ratios = [row["stream"] / row["copy"] for row in rows]
        return {"seconds": rows, "ratios": ratios, "interval": median_interval(ratios)}


class _checkpoint:  # noqa: N801 (used as a function)
    """A folder with a checkpoint of 1 GB in `source`, deleted in the end."""

    def __enter__(self) -> Path:
        scratch = os.environ.get("CAUSALPRUNE_SCRATCH", tempfile.gettempdir())
        self.place = Path(tempfile.mkdtemp(dir=scratch))
        write_checkpoint(self.place / "source", HALF)
        return self.place

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


def figures(raw: dict[str, Any]) -> dict[str, float | None]:
    """Return the figures of all steps that are there."""
    found: dict[str, float | None] = {}
    if rows := raw.get("sources"):
        written = [row for row in rows.values() if "refused" not in row]
        kinds = ("tensors_lost", "tensors_changed_unasked", "settings_lost", "files_lost", "stream_differs")
        found |= {kind: sum(len(row.get(kind, ())) for row in written) for kind in kinds}
        found |= {"sources": len(rows), "sources_refused": len(rows) - len(written)}
        found["sources_refused_as_wanted"] = sum(row.get("as_wanted", False) for row in rows.values())
        found["reload_differs"] = sum(row["reload_differs"] for row in written)
        wanted = oct(0o666 & ~_umask())
        found["modes_by_umask"] = int(all(row["modes"] == [wanted] for row in written))
    if own := raw.get("older"):
        rows = {name: row for name, row in own["rows"].items() if row.get("source_distance", 0) <= 1e-5}
        found["reload_differs_transformers_4"] = sum(
            row.get("distance", 1) > 1e-5 or not row["tokens"] for row in rows.values()
        )
        found["reload_transformers_4"] = len(rows)
    if own := raw.get("readback"):
        found["readback_share"] = statistics.median(own["shares"])
    if own := raw.get("stream"):
        found["stream_time_over_copy"] = statistics.median(own["ratios"])
    if own := raw.get("gguf"):
        found |= written_gguf.figures(own)
    return found


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


STEPS = {"sources": sources, "older": older, "readback": readback, "stream": stream}


def main() -> None:
    """Run steps, and write their figures after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS, "gguf"])
    parser.add_argument(
        "--converter", type=Path, help="folder of llama.cpp's convert_hf_to_gguf.py, for gguf"
    )
    given, raw = parser.parse_args(), record("written")["raw"]
    steps = {**STEPS, **({"gguf": lambda: written_gguf.gguf(given.converter)} if given.converter else {})}
    if "gguf" in given.steps and "gguf" not in steps:
        parser.error("gguf needs --converter")
    for step in given.steps or [step for step in steps if step not in raw]:
        raw[step] = steps[step]()
        raw.setdefault("made", {})[step] = made()
        print(write_figures("written", figures(raw), raw, seeds=[0]))


if __name__ == "__main__":
    main()
