"""Step of bench/large.py: a pruned SmolLM2 in the hands of what other people load models with."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BENCH, data_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import load
from causalprune.checkpoints.saving import read_manifest, save
from causalprune.core.progress import shown
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

HOME = BENCH / "interop"
PROMPT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
TOKENS, PROBLEMS = 24, 40


def interop() -> dict[str, Any]:
    """Prune SmolLM2 with Wanda to 50 %; compare transformers, llama.cpp and onnxruntime on one prompt."""
    decoder = load("embedded")
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=PROBLEMS, data_dir=data_folder())
    with shown("pruning") as progress:
        kept = prune(decoder, Method("wanda", 0.5), calibration=calibration, on_progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save(decoder, place / "pruned", kept)
        own = read_manifest(place / "pruned")["sparsity"]
        tokenizer = AutoTokenizer.from_pretrained(place / "pruned")
        model = AutoModelForCausalLM.from_pretrained(place / "pruned")
        given = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**given).logits[0]
            after = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0, logits.shape[0] :]
        text = tokenizer.decode(after)
        found: dict[str, Any] = {
            "transformers": {"text": text, "zeros": own["zeros"], "weights": own["weights"]}
        }
        answer = in_own("llama", "llama_cpp.py", place / "pruned", place / "pruned.gguf", PROMPT, TOKENS)
        found["llama.cpp"] = json.loads(answer.splitlines()[-1])
        (place / "tokens.json").write_text(json.dumps(given["input_ids"][0].tolist()))
        in_own("onnx", "onnx_logits.py", place / "pruned", place / "onnx", place / "tokens.json")
        theirs = torch.from_numpy(np.load(place / "onnx" / "logits.npy"))
        found["onnxruntime"] = {
            "largest_difference_of_logits": float((theirs - logits).abs().max()),
            "same_next_token_everywhere": bool((theirs.argmax(-1) == logits.argmax(-1)).all()),
        }
    return found


def in_own(environment: str, script: str, *arguments: object) -> str:
    """Run a script in an environment of its own, which is made if it is not there; return what it prints."""
    python = HOME / ".venv" / environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        requirements = ["-r", HOME / f"{environment}.txt"]
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *requirements], check=True)
    command = [str(python), str(HOME / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that claims rest on, from the step if it is done."""
    if (one := done.get("interop")) is None:
        return {}
    ours, theirs = one["transformers"], one["llama.cpp"]
    return {
        "llama_cpp_same_text": float(ours["text"].startswith(theirs["text"]) and bool(theirs["text"])),
        "llama_cpp_zeros_lost": ours["zeros"] - theirs["zeros"],
        "onnx_largest_difference_of_logits": one["onnxruntime"]["largest_difference_of_logits"],
    }
