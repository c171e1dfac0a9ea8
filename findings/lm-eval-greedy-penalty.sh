#!/usr/bin/env bash
# lm-evaluation-harness: "greedy" answers are not greedy where the model's own file has a repetition penalty.
#
# Surprise: `do_sample: false` and `temperature: 0` in a task leave the rest of the model's generation_config.json in force. Those of
#   Qwen2.5's instruct models have a repetition penalty of 1.05 or 1.1; what the question says then counts as repeated. Nothing in
#   the results says so, and the same weights without that file, as a tool may save them, score otherwise.
# Versions: lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0.
# Seen:
#   lm_eval 0.4.13, the same weights and request, do_sample false, temperature 0
#   no penalty in the model's file: the likeliest token at each of 24 steps
#   penalty 1.1 in the model's file: another answer from step 7
# To users: compare models with the same generation_config.json, or without penalties in any.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 'lm_eval==0.4.13'
export HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
"$folder/env/bin/python" -W ignore - <<'END'
import sys
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, PENALTY = 24, 1.1
words = {"end": 0} | {f"w{number}": number for number in range(1, 64)}
plain = Tokenizer(models.WordLevel(words, unk_token="end"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="end", unk_token="end")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.1,
    eos_token_id=0,
)
model = LlamaForCausalLM(config).eval()


def answer(penalty):
    model.generation_config.repetition_penalty = penalty
    engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    wanted = {"until": ["end"], "max_gen_toks": STEPS, "do_sample": False, "temperature": 0.0}
    request = Instance("generate_until", {}, ("w5 w6 w7", wanted), 0)
    return engine.generate_until([request], disable_tqdm=True)[0].split()


def likeliest():
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        for _ in range(STEPS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(tokens[0, 3:]).split()


greedy, without, penalised = likeliest(), answer(None), answer(PENALTY)
print(f"lm_eval {version('lm_eval')}, the same weights and request, do_sample false, temperature 0")
if without != greedy:
    sys.exit(f"changed: without a penalty the answer is {without}, the likeliest tokens {greedy}")
print(f"no penalty in the model's file: the likeliest token at each of {STEPS} steps")
if penalised == greedy:
    sys.exit("changed: a penalty in the model's own file has no effect")
step = next(n for n, pair in enumerate(zip(greedy, [*penalised, *greedy]), 1) if pair[0] != pair[1])
print(f"penalty {PENALTY} in the model's file: another answer from step {step}")
END
