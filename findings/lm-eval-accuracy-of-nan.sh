#!/usr/bin/env bash
# lm-evaluation-harness: a model whose predictions are not numbers gets an accuracy, and no warning.
#
# Surprise: where log-likelihoods are NaN, the first option counts as chosen. So the accuracy is the share of questions whose
#   first option is right: chance, or far more where options are in a fixed order, like yes and no. Weights may all be finite:
#   activations that overflow in float16 are enough, which is what this does to a tiny model.
# Versions: lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0.
# Seen (40 questions, the first option is right in 28):
#   lm_eval 0.4.13, float16: all weights finite, log-likelihoods nan
#   accuracy 0.7
# To users: look for NaN among the log-likelihoods of the samples before you believe an accuracy in float16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 'lm_eval==0.4.13'
export HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
"$folder/env/bin/python" -W ignore - <<'END'
import math
import sys
from importlib.metadata import version

import datasets
import lm_eval.evaluator
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {"end": 0} | {f"w{number}": number for number in range(1, 64)}
plain = Tokenizer(models.WordLevel(words, unk_token="end"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="end", unk_token="end")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for matrix in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
        matrix.weight.mul_(3e4)
    if not model(torch.tensor([[3, 4]])).logits.isfinite().all():
        sys.exit("changed: the model is not finite in float32 either")
model.half()
finite = all(bool(weight.isfinite().all()) for weight in model.parameters())

rows = [{"question": f"w{n + 1}", "options": ["w3", "w4"], "right": int(n % 10 >= 7)} for n in range(40)]
table = datasets.Dataset.from_list(rows)
task = ConfigurableTask(
    config={
        "task": "first",
        "custom_dataset": lambda **_: {"test": table},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
)
engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
record = lm_eval.evaluator.evaluate(lm=engine, task_dict={"first": task}, bootstrap_iters=0, log_samples=True)
values = [float(value) for sample in record["samples"]["first"] for value, _ in sample["filtered_resps"]]
accuracy = record["results"]["first"]["acc,none"]
print(f"lm_eval {version('lm_eval')}, float16: all weights finite, log-likelihoods {', '.join(sorted({str(v) for v in values}))}")
print(f"accuracy {accuracy}")
if not (finite and all(math.isnan(value) for value in values)):
    sys.exit("changed: the model's predictions are numbers, or its weights are not finite")
if accuracy != 0.7:
    sys.exit("changed: predictions that are not numbers no longer choose the first option")
END
