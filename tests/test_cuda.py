"""On a GPU everything gives what it gives on the CPU, up to the rounding of float32; without one, on one that is pretended."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Run
from families import FAMILIES
from pretended import pretended
from reference import calibration, problems
from safetensors.torch import load_file
from tinydata import tiny_decoder, write_data

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator
from causalprune.core.types import Decoder, quiet
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.settings import Settings
from causalprune.models.anatomy import inspect_model
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.shrinking.removal import Shares, shrink

pytestmark = pytest.mark.thorough
EXAMPLES = calibration(((14, 5), (13, 9), (12, 3), (14, 2), (13, 6), (12, 7)))
METHODS = {
    "magnitude": Method("magnitude", 0.5),
    "random": Method("random", 0.5),
    "wanda": Method("wanda", 0.5),
    "wanda global": Method("wanda", 0.5, "global"),
    "cap": Method("cap", 0.5),
    "sparsegpt": Method("sparsegpt", 0.5),
    "fisher with sparsegpt's update": Method("fisher", 0.5, update="obs"),
    "refit": Method("wanda", 0.5, update="refit"),
    "causal": Method("causal", 0.5),
    "causal in a pattern": Method("causal", 0.5, "2:4"),
}
SMALL = 2e-3
"""Share of keep decisions that rounding may change."""


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    with nullcontext() if torch.cuda.is_available() else pretended(monkeypatch):
        yield


def both(family: str) -> tuple[Decoder, Decoder]:
    found = [inspect_model(FAMILIES[family](), None, name=family) for _ in range(2)]
    found[1].model.to("cuda")
    assert found[1].device.type == "cuda"
    return found[0], found[1]


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gpt2", "phi3", "olmoe"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_weights_go(name: str, family: str) -> None:
    masks, weights = [], []
    for decoder in both(family):
        effects = attribute(decoder, EXAMPLES) if "effects" in METHODS[name].needs else None
        pruned = prune(decoder, METHODS[name], calibration=EXAMPLES, effects=effects)
        masks.append(torch.cat([pruned.keep[p.name].flatten().cpu() for p in decoder.projections]))
        weights.append(torch.cat([p.read().flatten().cpu() for p in decoder.projections]))
        assert all(p.device == decoder.device for p in decoder.projections)
    assert float((masks[0] != masks[1]).double().mean()) < SMALL
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 0.05


@pytest.mark.parametrize("family", ["llama3", "gpt2", "olmoe"])
def test_training_moves_weights_the_same_way(family: str) -> None:
    moved = []
    for first, second in zip(both(family), both(family), strict=True):
        prune(first, Method("magnitude", 0.5, update="refit"), calibration=EXAMPLES)
        prune(second, Method("magnitude", 0.5, update="distill"), calibration=EXAMPLES)
        pairs = zip(first.projections, second.projections, strict=True)
        moved.append(torch.cat([(b.read() - a.read()).flatten().cpu() for a, b in pairs]))
    assert float(moved[0].norm()) > 0
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["exact", "gradient"])
def test_effects_are_the_same(estimator: Any, family: str) -> None:
    how = Estimator(estimator)
    cpu, gpu = (attribute(d, EXAMPLES, estimator=how).delta_nats() for d in both(family))
    assert torch.equal(cpu.isnan(), gpu.isnan())
    assert float((cpu - gpu).nan_to_num().abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_the_same_units_are_removed(family: str) -> None:
    shares = Shares(neurons=0.3, kv_groups=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "llama.cpp was not found")
        cpu, gpu = (
            shrink(decoder, shares, problems(), update="refit", stage=quiet) for decoder in both(family)
        )
    assert all(p.device.type == "cuda" for p in gpu.decoder.projections)
    for name in ("neurons", "kv_groups"):
        for here, there in zip(
            getattr(cpu.kept, name).values(), getattr(gpu.kept, name).values(), strict=True
        ):
            assert torch.equal(here, there.cpu())


def test_scores_are_the_same(tmp_path: Path) -> None:
    tasks = ["gsm8k_nll:4", "gsm8k_cot:3", "arc_challenge:4", "strategyqa"]
    data, cpu, gpu = write_data(tmp_path / "data"), tiny_decoder(positions=2048), tiny_decoder(positions=2048)
    gpu.model.to("cuda")
    here, there = (evaluate(d, tasks, Settings(data_dir=data, max_tokens=256)) for d in (cpu, gpu))
    for one, other in zip(here, there, strict=True):
        assert other.values == pytest.approx(one.values, rel=1e-4), one.task
        assert other.texts == one.texts, one.task
    assert len(set(next(r for r in here if r.task == "gsm8k_cot").texts)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_commands_take_a_device(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoder, data, model = tiny_decoder(chat=True), write_data(tmp_path / "data"), tmp_path / "model"
    decoder.model.save_pretrained(model)
    decoder.tokenizer.save_pretrained(model)
    torch.cuda.reset_peak_memory_stats()
    where = ("--device", "cuda", "--dtype", dtype, "--data-dir", data)
    code, _, err = run(
        "prune", model, "-o", tmp_path / "pruned", "--sparsity", "0.5", "-t", "gsm8k", "-n", "6", *where,
        "--preserve", "none", "--method", "causal" if dtype != "float16" else "causal+refit",
    )  # fmt: skip
    assert code == 0, err
    recipe = {
        "model": {"name": str(model), "device": "cuda", "dtype": dtype},
        "calibration": {"task": ["gsm8k"], "n": 6},
        "methods": ["sparsegpt"],
        "sparsities": [0.5],
        "on": ["gsm8k_nll:4"],
        "general_text": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert torch.cuda.max_memory_allocated() > 0
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {own.dtype for own in written.values()} == {torch.float32}  # as in the source
    code, _, err = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "--data-dir", data)
    assert code == 0, err
    code, _, err = run(
        "evaluate", tmp_path / "pruned", "--on", "gsm8k_cot:2", "-o", tmp_path / "e.json", *where
    )
    assert code == 0, err
