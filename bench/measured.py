"""What is measured: the text that the model meets, every row counted, the same tomorrow: writes `results/measured.json`.

    python bench/measured.py              # all steps that are not there yet
    python bench/measured.py border time  # some of them, anew

Steps: border (tokens of ten tokenizers), harness (log-probabilities against lm-evaluation-harness), chat (documented numbers whose
tokens moved), forms, rows (left out, too long), dates (every command on two days; minutes), time (against the build before, in turn).
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from before import before, median_interval
from common import ROOT, Found, carry_out, data_folder, step_parser
from models import MODELS, fetched
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "calibration"))
import test_forms as forms
import words
from tinydata import tiny_decoder, write_data, write_jsonl, write_model

from causalprune.calibration.data import Problem, load_problems
from causalprune.calibration.encoding import Reader, apart, encode, prompt_text
from causalprune.calibration.examples import batch_of
from causalprune.checkpoints.embedded import load
from causalprune.core.types import Example
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.tasks import harness as engine
from causalprune.interventions.losses import target_nats

ROWS, HARNESS_ROWS, TIMED_ROWS, PAIRS = 200, 40, 1000, 7
SOURCES = ("gsm8k", "strategyqa", "arc_challenge")
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CLOCK = """
import datetime, sys, transformers.utils.chat_template_utils as inside
class Now(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 7, int(sys.argv[1]))
inside.datetime = Now
from causalprune.cli import main
main(sys.argv[2:])
"""
"""Runs a command on a day of July 2031, as far as chat templates know."""
TIMED = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from causalprune import calibration
from causalprune.calibration import Reader, encode
try:
    from causalprune.calibration import load_problems
except ImportError:
    from causalprune.data import load_problems
model, data, rows, chat = sys.argv[1:]
reader = Reader(AutoTokenizer.from_pretrained(model), chat == "chat", 512)
problems = load_problems("gsm8k", "calibration", data_dir=Path(data))[: int(rows)]
encode(reader, problems[0])
start = time.perf_counter()
for problem in problems:
    encode(reader, problem)
print(time.perf_counter() - start)
"""


def problems(source: str = "gsm8k", count: int = ROWS) -> list[Problem]:
    """Return the first problems that a data set is measured on."""
    return load_problems(source, "evaluation", data_dir=data_folder())[:count]


def border() -> Found:
    """Compare the tokens of rows, and where targets begin, with what the tokenizer makes of the whole text."""
    own = {"SmolLM2": load("embedded").tokenizer}
    own |= {name: AutoTokenizer.from_pretrained(fetched(name)) for name in MODELS}
    wrong = {}
    for name in [*own, *words.KINDS]:
        for chat in (False, True):
            tokenizer = own.get(name) or words.tokenizer(name, chat=chat)
            if chat and not tokenizer.chat_template:
                continue
            reader = Reader(tokenizer, chat, 9999)
            wrong[f"{name}, {'chat' if chat else 'plain'}"] = sum(not _whole(reader, p) for p in problems())
    return {"figures": {"border_tokens_differ": sum(wrong.values())}, "raw": wrong}


def _whole(reader: Reader, problem: Problem) -> bool:
    """Tell whether a row has the tokens of its whole text, and its target all that hold a character of it."""
    found, prompt = encode(reader, problem), prompt_text(reader, problem)
    whole = reader.tokenizer(
        prompt + problem.target, add_special_tokens=not reader.chat, return_offsets_mapping=True
    )
    size = len(found.tokens)
    holds = [end > len(prompt) for _, end in whole["offset_mapping"][:size]]
    return list(found.tokens) == whole["input_ids"][:size] and holds == list(found.is_target)


def harness() -> Found:
    """Compare log-probabilities of targets with lm-evaluation-harness, from the later of both cuts on."""
    decoder = load("embedded")
    reader, differences = Reader(decoder.tokenizer, False, 9999), []
    with engine.quiet():
        theirs = engine._Engine(  # noqa: SLF001
            pretrained=decoder.model, tokenizer=copy.deepcopy(decoder.tokenizer), batch_size=1
        )
        for problem in problems(count=HARNESS_ROWS):
            own = encode(reader, problem)
            context, rest = theirs._encode_pair(prompt_text(reader, problem), problem.target)  # noqa: SLF001
            whole, cut = [*context, *rest], max(len(context), own.target_start)
            assert whole == list(own.tokens), problem.prompt
            theirs.set_cache_hook(engine._Progress(theirs, lambda *_: None))  # noqa: SLF001
            ((value, _),) = theirs._loglikelihood_tokens([(("", ""), whole[:cut], whole[cut:])])  # noqa: SLF001
            ours = target_nats(decoder, batch_of([Example(own.tokens, cut, "", "")], [0]))
            differences.append(abs(float(ours) + value) / (len(whole) - cut))
    return {"figures": {"lm_eval_loglikelihood_max_diff": max(differences)}, "raw": differences}


def chat() -> Found:
    """Count the documented numbers through the chat template some of whose rows have other tokens than before."""
    reader = Reader(load("embedded").tokenizer, True, 512)
    moved = {}
    for source in SOURCES:
        for split in ("evaluation", "calibration"):
            rows = load_problems(source, split, data_dir=data_folder())
            moved[f"{source}, {split}"] = sum(not apart(reader, problem) for problem in rows)
    return {"figures": {"chat_numbers_changed": sum(n > 0 for n in moved.values())}, "raw": moved}


def read_forms() -> Found:
    """Write the same rows in every form, and count those that give the same tokens."""
    alike = {}
    for shape, write in forms.FORMS:
        with tempfile.TemporaryDirectory() as scratch:
            rows = [forms.SHAPES[shape](*row) for row in forms.ROWS]
            plain = write_jsonl(
                Path(scratch) / "plain.jsonl", [{"prompt": p, "target": t} for p, t in forms.ROWS]
            )
            alike[f"{shape} {write.__name__}"] = forms.tokens(write(Path(scratch), rows)) == forms.tokens(
                str(plain)
            )
    return {"figures": {"forms_read": sum(alike.values())}, "raw": alike}


def rows() -> Found:
    """Measure files with rows that cannot be measured, and count those that no table speaks of."""
    long = "x" * 200
    texts = {
        "equal prompts": [("Write a line.", f"Line {i}.") for i in range(12)],
        "repeated": [(f"p{i // 2}", "t") for i in range(12)],
        "too long": [(f"p{i}", long if i % 3 == 0 else "t") for i in range(12)],
    }
    unsaid, decoder = {}, tiny_decoder(positions=128)
    with tempfile.TemporaryDirectory() as scratch:
        for name, pairs in texts.items():
            path = write_jsonl(Path(scratch) / "own.jsonl", [{"prompt": p, "target": t} for p, t in pairs])
            (found,) = evaluate(decoder, [f"{path}_nll"], max_tokens=512)
            out = found.description["skipped"]
            unsaid[name] = len(pairs) - len(found.values) - out["too_long"] - out["duplicate"]
            unsaid[f"{name}, longer than the model"] = sum(weight > 128 for weight in found.weights)
    figures = {"rows_left_out_unsaid": sum(unsaid.values()), "too_long_unsaid": unsaid["too long"]}
    return {"figures": figures, "raw": unsaid}


@contextmanager
def dated() -> Iterator[tuple[Path, Path, Path]]:
    """Make a folder with a model whose template writes the date, and data."""
    with tempfile.TemporaryDirectory() as scratch:
        place, decoder = Path(scratch), tiny_decoder(chat=True)
        decoder.tokenizer.chat_template = DATED
        yield place, write_model(place / "model", decoder), write_data(place / "data")


def _command(day: int, *given: Any) -> str:
    code = [sys.executable, "-c", CLOCK, str(day), *map(str, given)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, given))}\n{done.stderr[-2000:]}")
    return done.stdout


def dates() -> Found:
    """Run every command on two days and compare what they print as JSON; stop an attribution before midnight."""
    with dated() as (place, model, data):
        (place / "recipe.yaml").write_text(
            json.dumps(
                {
                    "model": {"name": str(model)},
                    "calibration": {"task": ["gsm8k"], "n": 6},
                    "methods": ["wanda", "cap"],
                    "sparsities": [0.5],
                    "on": ["gsm8k_nll:4", "gsm8k_answers:2"],
                    "max_new_tokens": 8,
                }
            )
        )
        some = ("-t", "gsm8k", "-n", 6, "--data-dir", data)
        calls = {
            "attribute": ("attribute", model, "-o", "OUT", *some),
            "stability": (
                "stability",
                model,
                "-o",
                "OUT",
                "-t",
                "gsm8k",
                "-n",
                1,
                "--top",
                3,
                "--data-dir",
                data,
            ),
            "prune": ("prune", model, "-o", "OUT", "--method", "sparsegpt", *some),
            "shrink": ("shrink", model, "-o", "OUT", "--layers", 0.5, "--no-time", *some),
            "sweep": ("sweep", model, "-o", "OUT", "--method", "wanda", *some, "--on", "gsm8k_nll:2"),
            "evaluate": (
                "evaluate",
                model,
                "-o",
                "OUT",
                "--on",
                "gsm8k_nll:4",
                "--on",
                "arc_challenge:2",
                "--data-dir",
                data,
            ),
            "run": ("run", place / "recipe.yaml", "-o", "OUT", "--data-dir", data),
            "data": ("data", model, "-t", "gsm8k", "--data-dir", data),
        }
        differ = {}
        for name, call in calls.items():
            said = []
            for day in (1, 2):
                out = place / f"{name}-{day}"
                text = _command(day, *[out if word == "OUT" else word for word in call], "--json")
                said.append((text.replace(str(out), "OUT"), _weights(out)))
            differ[name] = int(said[0] != said[1])
        resumed = _resumed(place, model, data)
    figures = {"dates_differ": sum(differ.values()), "resume_after_midnight": resumed}
    return {"figures": figures, "raw": differ}


def _weights(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.rglob("*.safetensors"))] if out.is_dir() else []


def _resumed(place: Path, model: Path, data: Path) -> int:
    """Tell whether the half of an attribution that was done on one day is gone on with on the next."""
    call = ("attribute", model, "-o", place / "stopped", "-t", "gsm8k", "-n", 6, "--data-dir", data)
    _command(1, *call)
    ledger = place / "stopped" / "attribution.ledger"
    half = b"".join(ledger.read_bytes().splitlines(keepends=True)[:3])
    ledger.write_bytes(half)
    (place / "stopped" / "effects.json").unlink()
    _command(2, *call)
    return int(ledger.read_bytes().startswith(half) and (place / "stopped" / "effects.json").exists())


def tokenising() -> Found:
    """Time the tokenising of problems by both builds, in turn."""
    python, model = before(), load("embedded").name
    found: dict[str, Any] = {}
    for kind in ("chat", "plain"):
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(PAIRS):
            for name, path in (("ours", {"PYTHONPATH": str(ROOT / "src")}), ("theirs", {})):
                command = [str(python), "-c", TIMED, model, str(data_folder()), str(TIMED_ROWS), kind]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=True,
                    env={"HOME": str(Path.home()), **path},
                )
                seconds[name].append(float(done.stdout))
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        median = sorted(ratios)[len(ratios) // 2]
        found[kind] = {
            "seconds": seconds,
            "ratios": ratios,
            "median": median,
            "interval": median_interval(ratios),
        }
    worst = max(found[kind]["median"] for kind in found)
    return {"figures": {"tokenise_time_over_before": worst}, "raw": found}


STEPS: dict[str, Callable[[], Found]] = {
    "border": border,
    "harness": harness,
    "chat": chat,
    "forms": read_forms,
    "rows": rows,
    "dates": dates,
    "time": tokenising,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/measured.json`."""
    parser = step_parser(__doc__, STEPS)
    torch.manual_seed(0)
    carry_out("measured", STEPS, parser, parser.parse_args().steps)


if __name__ == "__main__":
    main()
