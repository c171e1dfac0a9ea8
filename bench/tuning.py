"""Step of bench/large.py: zeros of SmolLM2 at 50 % while it is fine-tuned, and after an adapter was merged."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import data_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from causalprune.calibration.examples import calibrate
from causalprune.checkpoints.embedded import load
from causalprune.checkpoints.kept import keep_sparsity, reapply
from causalprune.checkpoints.saving import save
from causalprune.checkpoints.verification import Verification, verify
from causalprune.core.progress import shown
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

STEPS, BATCH, LENGTH, PROBLEMS = 20, 2, 96, 40


def finetune() -> dict[str, Any]:
    """Train 20 steps with the callback and without, train and merge an adapter, and count zeros after each."""
    decoder = load("embedded")
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=PROBLEMS, data_dir=data_folder())
    with shown("pruning") as progress:
        kept = prune(decoder, Method("wanda", 0.5), calibration=calibration, on_progress=progress)
    rows = [torch.tensor(e.tokens[-LENGTH:]) for e in calibration.examples if len(e.tokens) >= LENGTH]
    found: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "length": LENGTH}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = save(decoder, Path(scratch) / "pruned", kept)
        for name in ("with the callback", "without"):
            model = AutoModelForCausalLM.from_pretrained(pruned)
            callbacks = [keep_sparsity(model, pruned)] if name == "with the callback" else []
            _train(model, rows, Path(scratch) / "training", 1e-5, callbacks)
            model.save_pretrained(Path(scratch) / name)
            found[name] = _counted(verify(Path(scratch) / name, against=pruned))
        model = AutoModelForCausalLM.from_pretrained(pruned)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        _train(adapted, rows, Path(scratch) / "training", 1e-4, [])
        merged, out = Path(scratch) / "merged", Path(scratch) / "reapplied"
        adapted.merge_and_unload().save_pretrained(merged)
        found["adapter merged"] = _counted(verify(merged, against=pruned))
        restored = reapply(pruned, merged, out)
        found["reapplied"] = {**_counted(verify(out, against=pruned)), "restored": restored}
    return found


def _train(model: Any, rows: list[Any], folder: Path, rate: float, callbacks: list[Any]) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()


def _counted(report: Verification) -> dict[str, Any]:
    lost = [finding for finding in report.findings if finding.problem == "lost"]
    return {"zeros": report.zeros, "weights": report.weights, "matrices_that_lost_zeros": len(lost)}


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that claims rest on, from the step if it is done."""
    if (one := done.get("finetune")) is None:
        return {}
    kept, again = one["with the callback"]["matrices_that_lost_zeros"], one["reapplied"]
    return {
        "tuned_matrices_that_lost_zeros": kept,
        "untended_matrices_that_lost_zeros": one["without"]["matrices_that_lost_zeros"],
        "reapplied_matrices_that_lost_zeros": again["matrices_that_lost_zeros"],
    }
