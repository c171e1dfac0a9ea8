"""Zeros that fine-tuning and merging would lose stay, or come back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from reference import fresh
from tinydata import tiny_decoder
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from causalprune.checkpoints.kept import keep_sparsity, reapply
from causalprune.checkpoints.saving import KEEP, read_manifest, save
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.models.anatomy import outline
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

STEPS = 20
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(params=["llama3", "gpt_neox", "mixtral"])
def pruned(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    decoder = fresh(request.param)
    return save(decoder, tmp_path / "pruned", prune(decoder, Method("magnitude", 0.5, "global")))


def zeros(model: Any) -> int:
    return sum(int((p.read() == 0).sum()) for p in outline(model, None, name="trained").projections)


def train(model: Any, folder: Path, callbacks: list[Any]) -> None:
    rows = torch.randint(0, 64, (STEPS * 2, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # the trainer has warnings of its own
def test_the_trainer_keeps_zeros_with_the_callback_and_loses_them_without(
    pruned: Path, tmp_path: Path
) -> None:
    models = [AutoModelForCausalLM.from_pretrained(pruned) for _ in range(2)]
    before = zeros(models[0])
    first = models[0].state_dict()[
        "lm_head.weight" if "lm_head.weight" in models[0].state_dict() else "embed_out.weight"
    ]
    first = first.clone()
    callback = keep_sparsity(models[0], pruned)
    assert callback.restored == 0
    train(models[0], tmp_path / "with", [callback])
    train(models[1], tmp_path / "without", [])
    assert zeros(models[0]) == before
    assert zeros(models[1]) < before / 100
    assert not torch.equal(first, models[0].get_output_embeddings().weight), "nothing was trained"


def test_in_a_loop_of_ones_own(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    before, keep_zeros = zeros(model), keep_sparsity(model, str(pruned))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()
        assert keep_zeros() > before / 2
        assert keep_zeros() == 0
    assert zeros(model) == before


def test_what_a_merge_lost_comes_back(pruned: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01
            )
    model.save_pretrained(tmp_path / "merged")
    assert zeros(model) == 0
    restored = reapply(pruned, tmp_path / "merged", tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.ok
    assert report.zeros == restored == verify(pruned).zeros
    own = read_manifest(tmp_path / "out")
    assert own["run"]["reapplied"]["to"].endswith("merged")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = [torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True)]
    assert True in changed, "what is not prunable was touched"
    assert False in changed


TARGETS = {"llama3": ["q_proj", "down_proj"], "gpt_neox": ["query_key_value"]}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # peft has warnings of its own
@pytest.mark.parametrize("family", TARGETS)
def test_zeros_that_a_merged_adapter_loses_are_named_and_come_back(
    family: str, run: Run, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    decoder = fresh(family)
    made, merged = prune(decoder, Method("magnitude", 0.5, "global")), tmp_path / "merged"
    keep, pruned = made.keep, save(decoder, tmp_path / "pruned", made)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    config = LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False)
    before = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    adapted = get_peft_model(model, config)
    assert sum(int((parameter == 0).sum()) for parameter in adapted.parameters()) == before
    adapted.merge_and_unload().save_pretrained(merged)
    touched = {p.name for p in decoder.projections if p.parameter_name.split(".")[-2] in TARGETS[family]}
    report = verify(merged, against=pruned)
    assert {f.subject for f in report.findings if f.problem == "lost"} == touched
    code, out, _ = run("verify", merged, "--against", pruned)
    assert code == 1
    assert all(f"{name} lost its zeros" in out for name in touched)
    lost = sum(int((~keep[name]).sum()) for name in touched)
    code, out, err = run("reapply", pruned, merged, "-o", tmp_path / "out")
    assert code == 0, err
    assert f"{lost:,} weights set back to zero" in out
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", against=pruned).ok
    ours = {p.name: p.read() for p in load(str(tmp_path / "out")).projections}
    for p in load(str(merged)).projections:
        assert torch.equal(ours[p.name], torch.where(keep[p.name], p.read(), 0.0)), p.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.xdist_group("smollm2")
def test_smollm2_at_half_keeps_its_zeros_through_training(smollm2: Path, tmp_path: Path) -> None:
    decoder = load(str(smollm2))
    pruned = save(decoder, tmp_path / "pruned", prune(decoder, Method("magnitude", 0.5, "row")))
    for kept in (True, False):
        model = AutoModelForCausalLM.from_pretrained(pruned)
        train(model, tmp_path / "training", [keep_sparsity(model, pruned)] if kept else [])
        model.save_pretrained(tmp_path / f"tuned-{kept}")
    assert not verify(tmp_path / "tuned-True", against=pruned).findings
    report = verify(tmp_path / "tuned-False", against=pruned)
    assert len([f for f in report.findings if f.problem == "lost"]) == len(decoder.projections)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    decoder = fresh("llama3")
    save(decoder, tmp_path / "pruned", prune(decoder, Method("magnitude", 0.5)))
    with pytest.raises(MismatchError, match=r"layers\.\d\.\w+ is .* in the model"):
        keep_sparsity(fresh("gpt2").model, tmp_path / "pruned")
    (tmp_path / "pruned" / KEEP).unlink()
    with pytest.raises(CheckpointError, match="has no keep_masks"):
        keep_sparsity(decoder.model, tmp_path / "pruned")


def test_a_merged_model_without_a_tokenizer_gets_that_of_the_pruned_one(run: Run, tmp_path: Path) -> None:
    decoder = tiny_decoder()
    decoder.model.save_pretrained(tmp_path / "merged")
    pruned = save(decoder, tmp_path / "pruned", prune(decoder, Method("magnitude", 0.5)))
    code, out, err = run("reapply", pruned, tmp_path / "merged", "-o", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "saved": str(tmp_path / "out"),
        "restored": read_manifest(pruned)["sparsity"]["zeros"],
    }
    assert load(str(tmp_path / "out")).tokenizer("abc")["input_ids"] == decoder.tokenizer("abc")["input_ids"]


def test_code_of_a_model_is_run_by_every_command_that_is_told_to(run: Run, tmp_path: Path) -> None:
    decoder = fresh("llama2")
    pruned = save(decoder, tmp_path / "pruned", prune(decoder, Method("magnitude", 0.5)))
    record = json.loads((pruned / "config.json").read_text()) | {"model_type": "own"}
    record["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (pruned / "config.json").write_text(json.dumps(record))
    (pruned / "own.py").write_text(OWN_CODE)
    for words in (["verify", pruned], ["reapply", pruned, pruned, "-o", tmp_path / "out"]):
        code, _, err = run(*words)
        assert (code, "pass trust_remote_code" in err) == (2, True)
        code, _, err = run(*words, "--trust-remote-code")
        assert code == 0, err
