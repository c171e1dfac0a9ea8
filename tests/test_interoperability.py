"""Pruned checkpoints are plain ones: what other people load models with finds the zeros and the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reference import fresh, logits
from safetensors.torch import load_file
from tinydata import tiny_decoder, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from causalprune.checkpoints.saving import KEEP, save
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = tiny_decoder()
    pruned = prune(decoder, Method("magnitude", 0.5, "row"))
    return save(decoder, tmp_path_factory.mktemp("pruned") / "out", pruned)


@pytest.mark.thorough
def test_transformers_needs_nothing_of_ours(pruned: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('Ann has 3 pears.', return_tensors='pt')\n"
        "torch.save(model(**tokens).logits[0].detach(), sys.argv[2])\n"
        "assert not [name for name in sys.modules if name.startswith('causalprune')]\n"
    )
    subprocess.run([sys.executable, "-c", script, str(pruned), str(tmp_path / "logits")], check=True)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    tokens = AutoTokenizer.from_pretrained(pruned)("Ann has 3 pears.")["input_ids"]
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert pipeline("text-generation", str(pruned))("Ann", max_new_tokens=2)[0]["generated_text"]


def test_files_are_what_any_reader_of_safetensors_expects(pruned: Path) -> None:
    values = load_file(pruned / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in values.values())
    weights = [t for name, t in values.items() if "proj" in name]
    assert sum(int((t == 0).sum()) for t in weights) * 2 == sum(t.numel() for t in weights)
    config = json.loads((pruned / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if "spars" in key or "prun" in key or "quant" in key]
    assert (pruned / KEEP).name not in str(config)


def test_older_readers_find_rotary_embeddings_where_they_look(tmp_path: Path) -> None:
    for family in ("llama2", "llama3"):
        decoder = fresh(family)
        save(decoder, tmp_path / family, manifest={})
        config = json.loads((tmp_path / family / "config.json").read_text())
        own = decoder.model.config.rope_parameters
        assert config["rope_theta"] == own["rope_theta"] == config["rope_parameters"]["rope_theta"]
        scaling = {key: value for key, value in own.items() if key != "rope_theta"}
        assert config.get("rope_scaling") == (scaling if family == "llama3" else None)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert again.config.rope_parameters == own
        assert torch.equal(logits(again, range(40)), logits(decoder.model, range(40)))


@pytest.mark.slow
def test_the_evaluation_harness_takes_it_on_its_own_command_line(pruned: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "a": f" {i + 1}", "b": " many"} for i in range(4)]
    task = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl(tmp_path / "own.jsonl", rows))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{[a, b]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={pruned},dtype=float32", "--tasks", "own_sums"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_own_sums_*.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    for sample in map(json.loads, file.read_text().splitlines()):
        for key, (found, _) in zip("ab", sample["filtered_resps"], strict=True):
            prompt = tokenizer(sample["doc"]["prompt"])["input_ids"]
            target = tokenizer(sample["doc"][key], add_special_tokens=False)["input_ids"]
            every = logits(model, prompt + target).double().log_softmax(-1)
            wanted = sum(float(every[len(prompt) - 1 + i, token]) for i, token in enumerate(target))
            assert float(found) == pytest.approx(wanted, abs=1e-4)
